//! mount(2) and umount(2), or fusermount3 for whoever may not call them.
//!
//! fuser could mount too, but it follows symbolic links to the mountpoint, and at the end unmounts whatever is at that path by then
//! (even if ours is gone and another disk is mounted there). Here a path is only unmounted while the kernel's list says that it is ours.

use std::ffi::{CString, OsString};
use std::io::{self, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use rustix::fs::{Mode, OFlags};
use rustix::io::{Errno, FdFlags};
use rustix::mount::{MountFlags, UnmountFlags};
use rustix::net::{AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SocketFlags, SocketType};

use super::host::MountPlan;
use super::mountinfo;
use super::mountpoint::Mountpoint;
use crate::error::{Context, os_text};
use crate::{Error, ErrorKind, Result};

/// The kernel's side of FUSE.
pub(super) const DEVICE: &str = "/dev/fuse";

/// Stands behind `fuse.` in the list of mounts.
const SUBTYPE: &str = "cordisk";

/// fusectl: one directory per connection, named by the minor device number of its mount.
const CONNECTIONS: &str = "/sys/fs/fuse/connections";

/// The set-user-id helper of libfuse 3.
const HELPER: &str = "fusermount3";

/// How long a mount may be in use until it counts as such.
const BUSY_PATIENCE: Duration = Duration::from_secs(2);
/// Between two tries. A look at the mount takes microseconds.
const BUSY_PAUSE: Duration = Duration::from_millis(5);

/// Whether an unmount has happened.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Unmounted {
    /// It is unmounted; the session ends.
    Done,
    /// Somebody has the disk open: nothing has changed.
    Busy,
}

/// Our mount. Dropping it detaches what is still mounted.
#[derive(Debug)]
pub(super) struct Attachment {
    path: PathBuf,
    /// `major:minor` of our file system. The kernel gives it to the next mount as soon as ours is gone.
    device: String,
    /// The image, which nobody else can mount while we have it locked.
    source: PathBuf,
}

/// Opens /dev/fuse. fusermount3 opens it with the user's own privileges too, so without this there is no mount.
///
/// # Errors
/// With what to do about it.
pub(super) fn open_device() -> Result<OwnedFd> {
    rustix::fs::open(DEVICE, OFlags::RDWR | OFlags::CLOEXEC, Mode::empty()).map_err(|errno| {
        let hint = match errno {
            Errno::NOENT | Errno::NODEV | Errno::NXIO => "load the fuse module (modprobe fuse)",
            _ => "this user or container may not use FUSE",
        };
        Error::new(ErrorKind::Io, format!("{DEVICE}: {}: {hint}", os_text(&errno.into())))
    })
}

/// Mounts on `target`. Returns the open /dev/fuse that serves the mount; it is `device` itself, or one from fusermount3.
///
/// # Errors
/// What mount(2) or fusermount3 says. Nothing is mounted then.
pub(super) fn attach(device: OwnedFd, target: &Mountpoint, options: &MountPlan) -> Result<(OwnedFd, Attachment)> {
    let what = || format!("mounting on {}", target.path().display());
    let device = match mount_directly(&device, target, options) {
        Ok(()) => device,
        Err(Errno::PERM) => mount_by_helper(target.path(), options).map_err(|error| error.context(what()))?,
        Err(errno) => return Err(Error::io(what(), errno.into())),
    };
    match mountinfo::mounted_at(target.path())? {
        Some(entry) if entry.fs_type.starts_with("fuse") && entry.source == options.source => {
            Ok((device, Attachment { path: target.path().to_path_buf(), device: entry.device, source: entry.source }))
        }
        // Closing the device, here, makes it a dead mount wherever it is.
        _ => Err(Error::new(ErrorKind::Io, format!("{}: it is not in the list of mounts", what()))),
    }
}

fn mount_directly(device: &OwnedFd, target: &Mountpoint, options: &MountPlan) -> Result<(), Errno> {
    let data = format!(
        "fd={},rootmode={:o},user_id={},group_id={},default_permissions{}",
        device.as_raw_fd(),
        target.raw_mode(),
        options.uid,
        options.gid,
        if options.allow_other { ",allow_other" } else { "" },
    );
    let data = CString::new(data).map_err(|_| Errno::INVAL)?;
    let mut flags = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
    flags.set(MountFlags::RDONLY, options.read_only);
    flags.set(MountFlags::SYNCHRONOUS, options.sync);
    // By descriptor: the file that was checked, not what its path means now.
    rustix::mount::mount(options.source.as_path(), target.reopen_path(), format!("fuse.{SUBTYPE}"), flags, data.as_c_str())
}

/// fusermount3 mounts and sends the open /dev/fuse over the socket whose number stands in `_FUSE_COMMFD`.
fn mount_by_helper(path: &Path, options: &MountPlan) -> Result<OwnedFd> {
    // Without CLOEXEC: `theirs` is inherited. No other process is started meanwhile.
    let (ours, theirs) = rustix::net::socketpair(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::empty(), None)
        .map_err(io::Error::from)
        .context(|| "socketpair")?;
    rustix::io::fcntl_setfd(&ours, FdFlags::CLOEXEC).map_err(io::Error::from).context(|| "fcntl")?;
    let child = Command::new(HELPER)
        .arg("-o")
        .arg(helper_options(options))
        .arg("--")
        .arg(path)
        .env("_FUSE_COMMFD", theirs.as_raw_fd().to_string())
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(|error| Error::io(format!("this user may not mount, and {HELPER}"), error))?;
    drop(theirs);
    let received = receive_descriptor(&ours);
    let output = child.wait_with_output().context(|| HELPER)?;
    match received {
        Some(device) if output.status.success() => Ok(device),
        _ => Err(Error::new(ErrorKind::Io, complaint(&output))),
    }
}

/// Options as fusermount3 takes them. A comma or backslash in the source is escaped with a backslash.
fn helper_options(options: &MountPlan) -> OsString {
    let mut text = b"fsname=".to_vec();
    for &byte in options.source.as_os_str().as_bytes() {
        if matches!(byte, b',' | b'\\') {
            text.push(b'\\');
        }
        text.push(byte);
    }
    text.extend_from_slice(format!(",subtype={SUBTYPE},nosuid,nodev,noexec,default_permissions").as_bytes());
    if options.read_only {
        text.extend_from_slice(b",ro");
    }
    if options.sync {
        text.extend_from_slice(b",sync");
    }
    if options.allow_other {
        text.extend_from_slice(b",allow_other");
    }
    OsString::from_vec(text)
}

/// One byte with one descriptor; `None` at the end of the stream, when fusermount3 has given up.
fn receive_descriptor(socket: &OwnedFd) -> Option<OwnedFd> {
    let mut byte = [0];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    rustix::io::retry_on_intr(|| rustix::net::recvmsg(socket, &mut [IoSliceMut::new(&mut byte)], &mut control, RecvFlags::CMSG_CLOEXEC))
        .ok()?;
    control.drain().find_map(|message| match message {
        RecvAncillaryMessage::ScmRights(mut descriptors) => descriptors.next(),
        _ => None,
    })
}

/// What fusermount3 wrote, on one line and without its name.
fn complaint(output: &Output) -> String {
    let text = String::from_utf8_lossy(&output.stderr);
    let text = text.lines().map(str::trim).filter(|line| !line.is_empty()).collect::<Vec<_>>().join("; ");
    match text.strip_prefix("fusermount3: ").unwrap_or(&text) {
        "" => format!("{HELPER}: {}", output.status),
        text => format!("{HELPER}: {text}"),
    }
}

/// umount2(2) at `path`, which is absolute and without symbolic links, and only there: a directory on the way may belong to somebody who puts a link in its
/// place, and would have root unmount something else.
///
/// # Errors
/// ELOOP: the path leads elsewhere by now. Those of umount2(2).
pub(super) fn take_away(path: &Path, flags: UnmountFlags) -> rustix::io::Result<()> {
    let (Some(parent), Some(name)) = (path.parent(), path.file_name()) else { return rustix::mount::unmount(path, flags) };
    let directory = rustix::fs::open(parent, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?;
    let held = Path::new("/proc/self/fd").join(directory.as_raw_fd().to_string());
    match std::fs::read_link(&held) {
        Ok(place) if place != parent => Err(Errno::LOOP),
        Ok(_) => rustix::mount::unmount(held.join(name), flags),
        // Without /proc.
        Err(_) => rustix::mount::unmount(path, flags),
    }
}

/// Unmounts what is mounted at `path`, whatever it is, unless it is in use.
///
/// # Errors
/// Neither done nor busy.
pub(super) fn unmount(path: &Path) -> io::Result<Unmounted> {
    match take_away(path, UnmountFlags::NOFOLLOW) {
        // Invalid: unmounted by somebody else since the caller looked.
        Ok(()) | Err(Errno::INVAL | Errno::NOENT) => return Ok(Unmounted::Done),
        Err(Errno::BUSY) => return Ok(Unmounted::Busy),
        Err(Errno::PERM) => {}
        Err(errno) => return Err(errno.into()),
    }
    let output = helper("-u", path)?;
    if output.status.success() {
        Ok(Unmounted::Done)
    } else if String::from_utf8_lossy(&output.stderr).contains("busy") {
        Ok(Unmounted::Busy)
    } else {
        Err(io::Error::other(complaint(&output)))
    }
}

fn helper(flag: &str, path: &Path) -> io::Result<Output> {
    Command::new(HELPER).env("LC_ALL", "C").arg(flag).arg("--").arg(path).stdin(Stdio::null()).output()
}

/// Unmounts, and tries again for a moment where the mount is in use: while a program looks at it (stat(2), `df`) the kernel says so as well, with no
/// file open.
///
/// # Errors
/// Those of `unmount`.
pub(super) fn unmount_patiently<E>(unmount: impl Fn() -> Result<Unmounted, E>) -> Result<Unmounted, E> {
    let give_up = Instant::now() + BUSY_PATIENCE;
    loop {
        match unmount() {
            Ok(Unmounted::Busy) if Instant::now() < give_up => thread::sleep(BUSY_PAUSE),
            result => return result,
        }
    }
}

impl Attachment {
    /// Unmounts if nobody has the disk open: wherever it is mounted in this mount namespace, its own place last.
    ///
    /// # Errors
    /// Neither done nor busy.
    pub(super) fn unmount(&self) -> Result<Unmounted> {
        unmount_patiently(|| {
            for place in self.places()? {
                match unmount(&place) {
                    Ok(Unmounted::Done) => {}
                    _ if !self.places()?.contains(&place) => {}
                    Ok(Unmounted::Busy) => return Ok(Unmounted::Busy),
                    Err(error) => return Err(self.failed(error)),
                }
            }
            Ok(Unmounted::Done)
        })
    }

    /// Takes the mount away from whoever uses it: their descriptors fail from now on, the path is free, the session ends. To be called
    /// while the session runs.
    ///
    /// # Errors
    /// It is still mounted.
    pub(super) fn detach(&self) -> Result<()> {
        let places = self.places()?;
        if places.is_empty() {
            // Detached by somebody else, and still open.
            self.abort();
        }
        places.iter().try_for_each(|place| self.detach_at(place))
    }

    fn detach_at(&self, place: &Path) -> Result<()> {
        // FORCE aborts the connection, which ends the session although descriptors are open; DETACH frees the path.
        let flags = UnmountFlags::FORCE | UnmountFlags::DETACH | UnmountFlags::NOFOLLOW;
        if take_away(place, flags).is_ok() {
            return Ok(());
        }
        // The same in two steps, without privilege.
        self.abort();
        let output = helper("-uz", place).map_err(|error| self.failed(error))?;
        if output.status.success() || !self.places()?.iter().any(|there| there == place) {
            return Ok(());
        }
        Err(self.failed(io::Error::other(complaint(&output))))
    }

    /// Ends the connection through fusectl, if that is mounted: its file belongs to whoever has mounted ours. Otherwise the connection
    /// ends with the process.
    fn abort(&self) {
        if let Some((_major, minor)) = self.device.split_once(':')
            && let Err(error) = std::fs::write(format!("{CONNECTIONS}/{minor}/abort"), "1")
        {
            log::debug!("aborting FUSE connection {minor}: {error}");
        }
    }

    /// Where our file system is mounted and on top, by what it is: a directory above it may have been renamed, and others may have made bind mounts of
    /// it. The newest first, and its own place last.
    fn places(&self) -> Result<Vec<PathBuf>> {
        let mut places: Vec<PathBuf> =
            mountinfo::of_device(&self.device, &self.source)?.into_iter().rev().map(|entry| entry.mountpoint).collect();
        places.sort_by_key(|place| *place == self.path);
        Ok(places)
    }

    fn failed(&self, error: io::Error) -> Error {
        Error::io(format!("unmounting {}", self.path.display()), error)
    }
}

impl Drop for Attachment {
    fn drop(&mut self) {
        if self.places().is_ok_and(|places| !places.is_empty())
            && let Err(error) = self.detach()
        {
            log::error!("{error}");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::process::ExitStatusExt;

    /// Protects: who may replace a directory on the way to a mount does not have something else unmounted.
    #[test]
    fn nothing_is_unmounted_behind_a_link() {
        let dir = tempfile::tempdir().unwrap();
        let (real, link) = (dir.path().canonicalize().unwrap().join("real"), dir.path().join("link"));
        std::fs::create_dir_all(real.join("m")).unwrap();
        std::os::unix::fs::symlink(&real, &link).unwrap();
        assert_eq!(take_away(&link.join("m"), UnmountFlags::NOFOLLOW), Err(Errno::LOOP));
        // Nothing is mounted there, which is only found out where it leads.
        let error = take_away(&real.join("m"), UnmountFlags::NOFOLLOW).unwrap_err();
        assert!([Errno::INVAL, Errno::PERM].contains(&error), "{error}");
    }

    #[test]
    fn the_source_is_escaped_for_the_helper() {
        let options = MountPlan {
            mountpoint: "/m".into(),
            source: "/a,b\\c".into(),
            taken: Vec::new(),
            read_only: true,
            allow_other: true,
            uid: 0,
            gid: 0,
            sync: true,
        };
        let text = helper_options(&options).into_string().unwrap();
        assert_eq!(text, "fsname=/a\\,b\\\\c,subtype=cordisk,nosuid,nodev,noexec,default_permissions,ro,sync,allow_other");
    }

    #[test]
    fn complaints_are_one_line() {
        let output = |stderr: &str| Output { status: ExitStatusExt::from_raw(256), stdout: vec![], stderr: stderr.into() };
        assert_eq!(complaint(&output("fusermount3: x: no\n\n more\n")), "fusermount3: x: no; more");
        assert_eq!(complaint(&output("")), "fusermount3: exit status: 1");
    }
}
