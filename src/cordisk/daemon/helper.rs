//! A call of mount(8): the same as `cordisk mount`, with the exit statuses that mount(8) expects.

use std::io::Write;
use std::process::ExitCode;

use super::background;
use crate::cli::HelperMount;
use host::error::one_line;

/// The exit status that mount(8) defines for a failed mount.
const MOUNT_FAILED: u8 = 32;

/// Starts the daemon and waits until it serves.
pub(super) fn run(call: &HelperMount) -> ExitCode {
    let mut messages = std::io::stderr();
    if call.verbose {
        let words: Vec<_> = call.arguments.iter().map(|word| word.to_string_lossy()).collect();
        let _ = writeln!(messages, "mount.fuse.cordisk: cordisk {}", one_line(&words.join(" ")));
    }
    if call.fake {
        return ExitCode::SUCCESS;
    }
    let louder: &[(&str, &str)] = if call.verbose && std::env::var_os("RUST_LOG").is_none() {
        &[("RUST_LOG", "info")]
    } else {
        &[]
    };
    match background::start(call.arguments.iter().cloned(), louder, None) {
        Ok(true) => ExitCode::SUCCESS,
        // The child has reported the reason.
        Ok(false) => ExitCode::from(MOUNT_FAILED),
        Err(error) => {
            let _ = writeln!(messages, "mount.fuse.cordisk: {}", one_line(&error.to_string()));
            ExitCode::from(MOUNT_FAILED)
        }
    }
}
