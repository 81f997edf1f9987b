//! The release binary writes log records.
//!
//! A dependency can disable the `log` crate in release builds (`release_max_level_off`, as
//! `qcow2-rs` does), and Cargo unifies features: one such package among the dependencies silences
//! everything that is built with it. So `qcow2-rs` is used in a package of its own
//! (`tests/second-reader`), and no dependency of this package may have such a feature.
//!
//! `scripts/test.sh` runs these tests against the binary that users get (`CORDISK_RELEASE_BIN`).

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use crate::support::{CORDISK, Pattern, Scratch, mounts, poll, qemu, run_ok, run_within};

const MANIFEST: &str = include_str!("../../Cargo.toml");

/// Protects: no dependency of the program or its tests disables log records at compile time.
#[test]
fn nothing_switches_the_log_crate_off() {
    let mut cargo = Command::new(env!("CARGO"));
    cargo.current_dir(env!("CARGO_MANIFEST_DIR")).args([
        "tree",
        "--locked",
        "--offline",
        "--package",
        "cordisk",
    ]);
    let tree = run_ok(cargo.args(["--edges", "normal,build,dev,features", "--prefix", "none"]));
    assert!(
        tree.lines().any(|line| line.starts_with("log feature ")),
        "features are not listed:\n{tree}"
    );
    let levels: Vec<&str> = tree
        .lines()
        .filter(|line| line.starts_with("log feature ") && line.contains("max_level"))
        .collect();
    assert_eq!(levels, Vec::<&str>::new());
    assert_eq!(
        log::STATIC_MAX_LEVEL,
        log::LevelFilter::Trace,
        "built together with a package that switches the log crate off"
    );
}

#[test]
fn the_release_profile_is_the_one_that_was_decided() {
    for (section, line) in
        [("profile.release", "panic = \"abort\""), ("profile.release", "overflow-checks = true")]
    {
        let lines: Vec<&str> = MANIFEST
            .lines()
            .skip_while(|text| text.trim() != format!("[{section}]"))
            .skip(1)
            .take_while(|text| !text.trim_start().starts_with('['))
            .map(|text| text.split('#').next().unwrap_or_default().trim())
            .collect();
        assert!(lines.contains(&line), "Cargo.toml: [{section}] has no `{line}`, only {lines:?}");
    }
}

#[test]
fn the_release_binary_logs_what_rust_log_asks_for() {
    let binary = release_binary();
    requires!("qemu-img", "/dev/fuse", binary.to_str().expect("UTF-8 path"));
    let loud = log_of_one_session(&binary, "debug");
    let records: Vec<&str> = loud.lines().filter(|line| is_record(line)).collect();
    assert!(
        records.iter().any(|line| line.contains("cordisk")),
        "RUST_LOG=debug, but no record of ours on stderr:\n{loud}"
    );
    let quiet = log_of_one_session(&binary, "off");
    assert_eq!(
        quiet.lines().find(|line| is_record(line)),
        None,
        "RUST_LOG=off still logs:\n{quiet}"
    );
}

/// The binary under test: in a release build, the one that Cargo built for this test.
pub(crate) fn release_binary() -> PathBuf {
    if !cfg!(debug_assertions) {
        return PathBuf::from(CORDISK);
    }
    let default = || Path::new(env!("CARGO_MANIFEST_DIR")).join("target/release/cordisk");
    std::env::var_os("CORDISK_RELEASE_BIN").map_or_else(default, PathBuf::from)
}

/// Whether a line is a record of env_logger: `[2025-01-31T12:00:00Z INFO  cordisk::daemon] text`.
fn is_record(line: &str) -> bool {
    line.starts_with('[')
        && ["ERROR", "WARN", "INFO", "DEBUG", "TRACE"]
            .iter()
            .any(|level| line.contains(&format!(" {level} ")))
}

/// Mounts in the foreground, reads a little, unmounts; returns all of stderr.
fn log_of_one_session(binary: &Path, rust_log: &str) -> String {
    let scratch = Scratch::new();
    let base = scratch.raw("base.raw", 1 << 20, Pattern::new(1, 1));
    let overlay = scratch.join("overlay.qcow2");
    qemu::create(&overlay, None, "", Some((base.to_str().expect("UTF-8 path"), "raw")));
    let mountpoint = scratch.join("disk");
    let log = scratch.join("log");

    let mut command = Command::new(binary);
    command.args(["mount", "-f"]).args([&overlay, &mountpoint]).env("RUST_LOG", rust_log);
    command
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(fs::File::create(&log).expect("log file"));
    let mut child = KilledOnDrop(
        command.spawn().unwrap_or_else(|error| panic!("cannot start {command:?}: {error}")),
    );
    let text = || fs::read_to_string(&log).expect("log file");
    let mounted = poll(Duration::from_secs(30), || {
        let ended = child.0.try_wait().expect("wait");
        assert!(ended.is_none(), "{command:?} ended before it had mounted: {ended:?}\n{}", text());
        mounts::at(&mountpoint)
    });
    assert!(mounted.is_some(), "{command:?} did not mount\n{}", text());
    run_within(
        Command::new("dd")
            .args(["if=disk", "of=/dev/null", "bs=64k", "count=1"])
            .current_dir(scratch.path()),
        Duration::from_secs(20),
    );
    mounts::umount(&mountpoint);
    let status = poll(Duration::from_secs(30), || child.0.try_wait().expect("wait"));
    assert!(
        status.is_some_and(|status| status.success()),
        "{command:?} ended with {status:?}\n{}",
        text()
    );
    text()
}

struct KilledOnDrop(Child);

impl Drop for KilledOnDrop {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}
