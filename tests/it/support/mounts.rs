//! The kernel's mount table, loop devices, and file systems on them. Everything is undone on drop.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use super::{poll, run_ok, run_within};

/// The mount table of this process.
pub const TABLE: &str = "/proc/self/mountinfo";

/// One line of the mount table.
#[derive(Clone, Debug)]
pub struct MountEntry {
    pub mountpoint: PathBuf,
    pub fstype: String,
    pub source: String,
    /// Per-mount options: `rw,nosuid,nodev`.
    pub options: String,
    /// Options of the file system: `user_id=0,default_permissions`.
    pub super_options: String,
}

/// The mount table of this process.
pub fn table() -> Vec<MountEntry> {
    read(Path::new(TABLE)).expect("the mount table: is /proc mounted?")
}

/// Mounts of other programs may have names that are not UTF-8; the tests do not need them.
fn read(table: &Path) -> std::io::Result<Vec<MountEntry>> {
    Ok(String::from_utf8_lossy(&fs::read(table)?).lines().filter_map(parse).collect())
}

/// `36 35 98:0 /root /mountpoint rw,noatime shared:1 - ext3 /dev/root rw,errors=continue`
fn parse(line: &str) -> Option<MountEntry> {
    let (left, right) = line.split_once(" - ")?;
    let left: Vec<&str> = left.split(' ').collect();
    let right: Vec<&str> = right.split(' ').collect();
    Some(MountEntry {
        mountpoint: PathBuf::from(unescape(left.get(4)?)),
        options: (*left.get(5)?).to_owned(),
        fstype: (*right.first()?).to_owned(),
        source: unescape(right.get(1)?),
        super_options: (*right.get(2)?).to_owned(),
    })
}

/// The table writes space, tab, newline and backslash in octal.
fn unescape(text: &str) -> String {
    [("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\")]
        .iter()
        .fold(text.to_owned(), |text, (from, to)| text.replace(from, to))
}

/// Returns the topmost mount at a path.
pub fn at(path: &Path) -> Option<MountEntry> {
    table().into_iter().rev().find(|entry| entry.mountpoint == path)
}

/// Returns the processes that have a mount at a path, by name and id. A process in its own mount
/// namespace keeps a mount alive that is unmounted here.
pub fn holders(path: &Path) -> Vec<String> {
    let sees = |process: &Path| {
        read(&process.join("mountinfo"))
            .unwrap_or_default()
            .iter()
            .any(|entry| entry.mountpoint == path)
    };
    let processes = fs::read_dir("/proc").into_iter().flatten().flatten().map(|entry| entry.path());
    let name = |process: &Path| {
        Some(format!(
            "{} ({})",
            fs::read_to_string(process.join("comm")).ok()?.trim(),
            process.display()
        ))
    };
    processes.filter(|process| sees(process)).filter_map(|process| name(&process)).collect()
}

/// Whether the daemon of the mount at a path is dead. It asks for fresh attributes, because cached
/// ones outlive the daemon.
pub fn is_dead(path: &Path) -> bool {
    use rustix::fs::{AtFlags, CWD, StatxFlags, statx};
    statx(CWD, path, AtFlags::STATX_FORCE_SYNC, StatxFlags::BASIC_STATS).err()
        == Some(rustix::io::Errno::NOTCONN)
}

/// Detaches all mounts below a directory, the newest first. Without /proc a test has no mounts,
/// because every test that mounts requires /proc.
pub fn detach_below(dir: &Path) {
    for entry in read(Path::new(TABLE))
        .unwrap_or_default()
        .iter()
        .rev()
        .filter(|entry| entry.mountpoint.starts_with(dir))
    {
        detach(&entry.mountpoint);
    }
}

/// Detaches a mount with `umount -l`; errors are ignored.
pub fn detach(path: &Path) {
    let root = rustix::process::geteuid().is_root();
    let mut command = if root { Command::new("umount") } else { Command::new("fusermount3") };
    command.arg(if root { "-l" } else { "-uz" }).arg(path);
    let _ = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).status();
}

/// Unmounts like a user. A child that another test thread forks holds this process's descriptors
/// for a moment, so a "busy" error is retried.
pub fn umount(path: &Path) {
    let root = rustix::process::geteuid().is_root();
    let mut last = String::new();
    let done = poll(Duration::from_secs(20), || {
        let mut command = if root { Command::new("umount") } else { Command::new("fusermount3") };
        if !root {
            command.arg("-u");
        }
        let done = run_within(command.arg(path), Duration::from_secs(60));
        last = done.stderr;
        if done.status.success() || !last.contains("busy") {
            return Some(done.status.success());
        }
        std::thread::sleep(Duration::from_millis(20));
        None
    });
    assert_eq!(done, Some(true), "umount {}: {last}", path.display());
}

/// A loop device over a file.
#[derive(Debug)]
pub struct LoopDevice {
    device: PathBuf,
    attached: bool,
}

impl LoopDevice {
    pub fn attach(file: &Path) -> LoopDevice {
        LoopDevice::attach_as(file, false)
    }

    /// With `direct`, the device bypasses the page cache of the file, like O_DIRECT.
    pub fn attach_as(file: &Path, direct: bool) -> LoopDevice {
        let direct_io = format!("--direct-io={}", if direct { "on" } else { "off" });
        let out = run_ok(Command::new("losetup").args(["--find", "--show", &direct_io]).arg(file));
        let device = LoopDevice { device: PathBuf::from(out.trim()), attached: true };
        let is_direct = fs::read_to_string(device.attribute("dio")).expect("dio of a loop device");
        assert_eq!(is_direct.trim(), if direct { "1" } else { "0" }, "losetup {direct_io}");
        device
    }

    fn attribute(&self, name: &str) -> PathBuf {
        Path::new("/sys/block")
            .join(self.device.file_name().expect("device name"))
            .join("loop")
            .join(name)
    }

    pub fn device(&self) -> &Path {
        &self.device
    }

    /// Detaches the device and waits until the kernel has closed the file.
    pub fn detach(mut self) {
        self.attached = false;
        run_ok(Command::new("losetup").arg("--detach").arg(&self.device));
        let backing = self.attribute("backing_file");
        let gone = poll(Duration::from_secs(10), || (!backing.exists()).then_some(()));
        assert!(gone.is_some(), "{} still holds its file", self.device.display());
    }
}

impl Drop for LoopDevice {
    fn drop(&mut self) {
        if self.attached {
            let _ = Command::new("losetup")
                .arg("--detach")
                .arg(&self.device)
                .stderr(Stdio::null())
                .status();
        }
    }
}

/// Makes a file system of `size` bytes in a new file, without space reserved for root.
pub fn make_fs(file: &Path, fstype: &str, size: u64) {
    fs::File::create(file)
        .and_then(|file| file.set_len(size))
        .unwrap_or_else(|error| panic!("{}: {error}", file.display()));
    let mut command = Command::new(format!("mkfs.{fstype}"));
    if fstype == "ext4" {
        command.args(["-m", "0"]);
    }
    run_ok(command.arg("-q").arg(file));
}

/// A file system on a loop device on a file. Fields drop in order: first the mount, then the
/// device.
#[derive(Debug)]
pub struct LoopMount {
    mount: MountGuard,
    device: LoopDevice,
}

impl LoopMount {
    pub fn new(file: &Path, fstype: &str, dir: &Path) -> LoopMount {
        LoopMount::on(LoopDevice::attach(file), fstype, dir)
    }

    pub fn on(device: LoopDevice, fstype: &str, dir: &Path) -> LoopMount {
        run_ok(Command::new("mount").args(["-t", fstype]).arg(device.device()).arg(dir));
        LoopMount { mount: MountGuard { path: dir.to_owned(), mounted: true }, device }
    }

    pub fn dir(&self) -> &Path {
        &self.mount.path
    }

    pub fn device(&self) -> &Path {
        self.device.device()
    }

    /// Unmounts and keeps the device, for fsck.
    pub fn umount(mut self) -> LoopDevice {
        self.mount.mounted = false;
        umount(&self.mount.path);
        let LoopMount { mount: _, device } = self;
        device
    }
}

/// A mount that is unmounted on drop.
#[derive(Debug)]
pub struct MountGuard {
    path: PathBuf,
    mounted: bool,
}

impl MountGuard {
    /// Mounts a tmpfs of `size` bytes.
    pub fn tmpfs(dir: &Path, size: u64) -> MountGuard {
        run_ok(
            Command::new("mount")
                .args(["-t", "tmpfs", "-o", &format!("size={size}"), "tmpfs"])
                .arg(dir),
        );
        MountGuard { path: dir.to_owned(), mounted: true }
    }

    pub fn umount(mut self) {
        self.mounted = false;
        umount(&self.path);
    }
}

impl Drop for MountGuard {
    fn drop(&mut self) {
        if self.mounted {
            let path = &self.path;
            let tried = Command::new("umount").arg(path).stderr(Stdio::null()).status();
            if !tried.is_ok_and(|status| status.success()) {
                detach(path);
            }
        }
    }
}
