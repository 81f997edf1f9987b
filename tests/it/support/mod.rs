//! What every test uses: a scratch directory, checks for required tools, a mounted disk, a QMP
//! client, known content, QEMU's tools.
//!
//! **Never:** leaves a mount, a loop device or a process behind, not even when a test panics.
#![allow(dead_code)] // some helpers have only one user, or none yet

pub mod daemon;
pub mod guest;
pub mod header;
pub mod ledger;
pub mod machine;
pub mod metrics;
pub mod mounts;
pub mod nbd;
pub mod pattern;
pub mod qemu;
pub mod qmp;
pub mod rig;
pub mod source;
pub mod terminal;

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use rustix::process::Pid;
use tempfile::TempDir;

pub use daemon::{Daemon, Mount};
pub use guest::Guest;
pub use pattern::{Pattern, Rng, assert_same};
pub use qmp::QmpClient;
pub use rig::{CLUSTER, Rig};

pub const KIB: u64 = 1 << 10;
pub const MIB: u64 = 1 << 20;

/// The program under test.
pub const CORDISK: &str = env!("CARGO_BIN_EXE_cordisk");

/// The environment variable that names the registry directory of running disks.
pub const RUNTIME_DIR: &str = "CORDISK_RUNTIME_DIR";

/// Skips the test with a reason when a requirement is missing; fails instead where everything is
/// required (CI).
///
/// A requirement is `"root"`, `"terminal"` (pseudo-terminals), a path that must exist
/// (`"/dev/fuse"`), a file system that the kernel can mount (`"fs:xfs"`), `"python3-rbd"`,
/// `"nbdkit-plugin-python"`, or the name of a program.
#[macro_export]
macro_rules! requires {
    ($($need:expr),+ $(,)?) => {
        if !$crate::support::have(&[$($need),+]) {
            return;
        }
    };
}

/// See [`requires!`].
pub fn have(needs: &[&str]) -> bool {
    for need in std::iter::once(&mounts::TABLE).chain(needs) {
        let Some(reason) = missing(need) else { continue };
        let required =
            |name| std::env::var(name).is_ok_and(|value| value == "1" || value == "true");
        assert!(
            !(required("CI") || required("CORDISK_REQUIRE_ALL")),
            "this test needs what is missing here: {reason}"
        );
        eprintln!("skipped: {reason}");
        return false;
    }
    true
}

fn missing(need: &str) -> Option<String> {
    if need == "root" {
        return (!rustix::process::geteuid().is_root()).then(|| "not running as root".to_owned());
    }
    // The root of a chroot is not a mountpoint, so its mounts cannot be made private.
    if need == "unshare" && mounts::at(Path::new("/")).is_none() {
        return Some("/ is no mountpoint: unshare cannot make a mount namespace (in a chroot: mount --bind it to itself first)".to_owned());
    }
    if need == "losetup" && !Path::new("/sys/block").exists() {
        return Some(
            "loop devices cannot be looked at without /sys: mount -t sysfs sysfs /sys".to_owned(),
        );
    }
    if need == "terminal" {
        return missing("setsid").or_else(terminal::missing);
    }
    let fails = |program: &str, arguments: &[&str]| {
        let mut command = Command::new(program);
        command.args(arguments).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        (!command.status().is_ok_and(|status| status.success()))
            .then(|| format!("{need} is not installed"))
    };
    if need == "nbdkit-plugin-python" {
        return fails("nbdkit", &["python", "--dump-plugin"]);
    }
    if need == "python3-rbd" {
        // The Python of nbdkit.
        return fails("/usr/bin/python3", &["-I", "-c", "import rados, rbd"]);
    }
    if need.starts_with('/') {
        return (!Path::new(need).exists()).then(|| format!("there is no {need}"));
    }
    if let Some(fstype) = need.strip_prefix("fs:") {
        let known = || {
            fs::read_to_string("/proc/filesystems")
                .is_ok_and(|list| list.split_whitespace().any(|word| word == fstype))
        };
        let _ =
            !known() && Command::new("modprobe").arg(fstype).stderr(Stdio::null()).status().is_ok();
        return (!known()).then(|| format!("the kernel has no {fstype}"));
    }
    let path = std::env::var("PATH").unwrap_or_default() + ":/usr/sbin:/sbin";
    let found = path.split(':').any(|dir| Path::new(dir).join(need).is_file());
    (!found).then(|| format!("the program {need} is not installed"))
}

/// A temporary directory of one test. It first detaches mounts that are left below it, so that its
/// removal deletes nothing inside them.
#[derive(Debug)]
pub struct Scratch {
    dir: TempDir,
    path: PathBuf,
}

impl Scratch {
    pub fn new() -> Scratch {
        let dir =
            tempfile::Builder::new().prefix("cordisk-test-").tempdir().expect("scratch directory");
        let path = dir.path().canonicalize().expect("scratch directory has a real path");
        let scratch = Scratch { dir, path };
        // The runtime directory exists from the start, so that a mount adds no entry to the scratch
        // directory.
        fs::create_dir(scratch.runtime_dir()).expect("runtime directory");
        scratch
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The registry directory of this test's disks, for `CORDISK_RUNTIME_DIR`.
    pub fn runtime_dir(&self) -> PathBuf {
        self.path.join("run")
    }

    /// A command that runs the program under test with that registry directory.
    pub fn cordisk(&self) -> Command {
        let mut command = Command::new(CORDISK);
        command.env(RUNTIME_DIR, self.runtime_dir());
        command
    }

    pub fn join(&self, name: impl AsRef<Path>) -> PathBuf {
        self.path.join(name)
    }

    pub fn dir(&self, name: &str) -> PathBuf {
        let path = self.join(name);
        fs::create_dir_all(&path)
            .unwrap_or_else(|error| panic!("mkdir {}: {error}", path.display()));
        path
    }

    pub fn write(&self, name: &str, content: &[u8]) -> PathBuf {
        let path = self.join(name);
        fs::write(&path, content)
            .unwrap_or_else(|error| panic!("write {}: {error}", path.display()));
        path
    }

    /// Creates a raw file of `size` bytes that is filled with `pattern`.
    pub fn raw(&self, name: &str, size: u64, pattern: Pattern) -> PathBuf {
        self.write(name, &pattern.bytes(0, size))
    }

    /// Makes the directory accessible to other users, for the tests of access rights.
    pub fn open_to_all(&self) {
        fs::set_permissions(&self.path, fs::Permissions::from_mode(0o755)).expect("chmod scratch");
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        mounts::detach_below(&self.path);
        if std::env::var_os("CORDISK_KEEP").is_some() {
            eprintln!("kept: {}", self.path.display());
            self.dir.disable_cleanup(true);
        }
    }
}

/// The state of all files below a directory, by name, to assert that no file changed. Mounted disks
/// are left out, because reading one changes its overlay.
#[derive(Debug, Eq, PartialEq)]
pub struct Snapshot(BTreeMap<PathBuf, Entry>);

#[derive(Eq, PartialEq)]
struct Entry {
    mode: u32,
    size: u64,
    mtime: (i64, i64),
    content: Vec<u8>,
}

impl std::fmt::Debug for Entry {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "mode {:o} size {} mtime {:?}", self.mode, self.size, self.mtime)
    }
}

impl Snapshot {
    pub fn of(dir: &Path) -> Snapshot {
        let mut entries = BTreeMap::new();
        let mut todo = vec![dir.to_owned()];
        let device =
            fs::metadata(dir).unwrap_or_else(|error| panic!("{}: {error}", dir.display())).dev();
        while let Some(next) = todo.pop() {
            for entry in
                fs::read_dir(&next).unwrap_or_else(|error| panic!("{}: {error}", next.display()))
            {
                let path = entry.expect("directory entry").path();
                let meta = fs::symlink_metadata(&path)
                    .unwrap_or_else(|error| panic!("{}: {error}", path.display()));
                if meta.dev() != device {
                    continue;
                }
                let content = if meta.is_file() {
                    fs::read(&path).expect("read for snapshot")
                } else {
                    Vec::new()
                };
                if meta.is_dir() {
                    todo.push(path.clone());
                    // A placeholder that is created and removed changes the times of its directory,
                    // so the times of directories are not compared.
                    entries
                        .insert(path, Entry { mode: meta.mode(), size: 0, mtime: (0, 0), content });
                } else {
                    entries.insert(
                        path,
                        Entry {
                            mode: meta.mode(),
                            size: meta.len(),
                            mtime: (meta.mtime(), meta.mtime_nsec()),
                            content,
                        },
                    );
                }
            }
        }
        Snapshot(entries)
    }

    /// Returns the differences in `later`, one line each.
    pub fn changes(&self, later: &Snapshot) -> Vec<String> {
        let mut changes = Vec::new();
        for (path, before) in &self.0 {
            match later.0.get(path) {
                None => changes.push(format!("{} is gone", path.display())),
                Some(after) if after.content != before.content => {
                    changes.push(format!("content of {} changed", path.display()))
                }
                Some(after) if after != before => {
                    changes.push(format!("{}: {before:?} became {after:?}", path.display()))
                }
                Some(_) => {}
            }
        }
        changes.extend(
            later
                .0
                .keys()
                .filter(|path| !self.0.contains_key(*path))
                .map(|path| format!("{} is new", path.display())),
        );
        changes
    }
}

/// The exit status of a program and its output.
#[derive(Debug)]
pub struct Finished {
    pub status: ExitStatus,
    pub stdout: String,
    pub stderr: String,
}

/// Runs a program to its end; kills it and panics if it takes longer than `limit`. The output goes
/// to files, so that a grandchild that keeps a descriptor open does not delay the test.
pub fn run_within(command: &mut Command, limit: Duration) -> Finished {
    let out = tempfile::NamedTempFile::new().expect("file for stdout");
    let err = tempfile::NamedTempFile::new().expect("file for stderr");
    command.stdin(Stdio::null());
    command.stdout(out.reopen().expect("stdout")).stderr(err.reopen().expect("stderr"));
    let mut child =
        command.spawn().unwrap_or_else(|error| panic!("cannot start {command:?}: {error}"));
    let text = |file: &tempfile::NamedTempFile| {
        String::from_utf8_lossy(&fs::read(file.path()).unwrap_or_default()).into_owned()
    };
    let status = poll(limit, || child.try_wait().expect("wait for child"));
    let Some(status) = status else {
        let _ = child.kill();
        let _ = child.wait();
        panic!(
            "{command:?} did not end within {limit:?}\nstdout: {}\nstderr: {}",
            text(&out),
            text(&err)
        );
    };
    Finished { status, stdout: text(&out), stderr: text(&err) }
}

/// Runs a program that must succeed; returns its standard output.
pub fn run_ok(command: &mut Command) -> String {
    let done = run_within(command, Duration::from_secs(120));
    assert!(
        done.status.success(),
        "{command:?} failed: {}\nstdout: {}\nstderr: {}",
        done.status,
        done.stdout,
        done.stderr
    );
    done.stdout
}

/// A child process that runs beside the test; it is killed when dropped.
pub struct Ours(pub Child);

impl Ours {
    pub fn pid(&self) -> Pid {
        i32::try_from(self.0.id()).ok().and_then(Pid::from_raw).expect("a pid")
    }
}

impl Drop for Ours {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Returns the SHA-256 of a file in hexadecimal, without loading the file into memory.
pub fn sha256(path: &Path) -> String {
    run_ok(Command::new("sha256sum").arg(path)).split_whitespace().next().expect("a sum").to_owned()
}

/// Calls `ask` until it returns a value or the time is over.
pub fn poll<T>(limit: Duration, mut ask: impl FnMut() -> Option<T>) -> Option<T> {
    let start = Instant::now();
    loop {
        if let Some(answer) = ask() {
            return Some(answer);
        }
        if start.elapsed() > limit {
            return None;
        }
        std::thread::sleep(Duration::from_millis(3));
    }
}

/// Waits until `condition` holds; panics with `what` after 20 s.
pub fn wait_until(what: &str, mut condition: impl FnMut() -> bool) {
    let held = poll(Duration::from_secs(20), || condition().then_some(()));
    assert!(held.is_some(), "waited 20 s in vain: {what}");
}

/// Runs `work` on a thread and waits at most `limit` for its result. `None` means that it still
/// runs.
pub fn within<T: Send + 'static>(
    limit: Duration,
    work: impl FnOnce() -> T + Send + 'static,
) -> Option<T> {
    let (sender, receiver) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        let _ = sender.send(work());
    });
    receiver.recv_timeout(limit).ok()
}

/// Reads `len` bytes at `offset`; panics on a short read.
pub fn read_at(file: &fs::File, offset: u64, len: usize) -> Vec<u8> {
    let mut buf = vec![0xEE; len];
    file.read_exact_at(&mut buf, offset)
        .unwrap_or_else(|error| panic!("read of {len} bytes at {offset}: {error}"));
    buf
}

/// Returns the errno of a failed operation; panics if it succeeded.
pub fn errno<T: std::fmt::Debug>(result: std::io::Result<T>) -> rustix::io::Errno {
    let error = result.expect_err("this had to be refused");
    let number = error.raw_os_error().unwrap_or_else(|| panic!("no errno in {error:?}"));
    rustix::io::Errno::from_raw_os_error(number)
}
