//! The program without the credentials of its environment: the process that the user has started
//! executes itself once without them.
//!
//! The process id stays the same, so supervisors and the process that waits for "ready" notice
//! nothing. The credentials are in a file in memory meanwhile, which the keeper reads.

use std::ffi::OsString;
use std::fs::File;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::process::CommandExt;
use std::process::Command;

use super::background::KEEPER_OPTION;
use crate::fetching::Credentials;
use host::error::Context;
use host::{Error, Result};

/// The hidden option of `cordisk mount` (see `cli`), with the number of a descriptor.
const CREDENTIALS_OPTION: &str = "--credentials-from";

/// Executes the program again, with the same arguments, if there are credentials in its
/// environment. Returns if there are none. Called before the process opens anything.
///
/// # Errors
/// The file in memory cannot be made, or the program cannot be executed.
pub(super) fn leave_credentials() -> Result<()> {
    let credentials = Credentials::of_environment();
    if credentials.is_empty() {
        return Ok(());
    }
    let file = credentials.to_file()?;
    let mut arguments = std::env::args_os();
    let name = arguments.next().unwrap_or_else(|| "cordisk".into());
    let subcommand = arguments.next();
    let option = OsString::from(format!("{CREDENTIALS_OPTION}={}", file.as_raw_fd()));
    let mut command = Command::new("/proc/self/exe");
    credentials.names().for_each(|name| {
        command.env_remove(name);
    });
    let error = command.arg0(name).args(subcommand).arg(option).args(arguments).exec();
    Err(Error::io("starting this program again without credentials", error))
}

/// The arguments of this process without its name, and without the options that
/// [`leave_credentials`] and [`super::background::start_keeper`] add.
pub(super) fn arguments() -> Vec<OsString> {
    let is_ours = |argument: &OsString| {
        [CREDENTIALS_OPTION, KEEPER_OPTION]
            .iter()
            .any(|option| argument.as_encoded_bytes().starts_with(format!("{option}=").as_bytes()))
    };
    // They stand before the words of the user.
    let ours = 1..=3;
    let arguments = std::env::args_os().skip(1).enumerate();
    arguments
        .filter(|(place, argument)| !(ours.contains(place) && is_ours(argument)))
        .map(|(_, argument)| argument)
        .collect()
}

/// Reads the file that [`leave_credentials`] has left at `descriptor`, which is closed.
///
/// # Errors
/// There is no such descriptor, or it is another file.
pub(super) fn take_credentials(descriptor: RawFd) -> Result<Credentials> {
    let file = File::open(format!("/proc/self/fd/{descriptor}"))
        .context(|| format!("{CREDENTIALS_OPTION}={descriptor}"))?;
    let _ = nix::unistd::close(descriptor);
    Credentials::read(file)
}
