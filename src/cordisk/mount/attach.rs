//! mount(2) and umount(2), or fusermount3 for users that may not call them.
//!
//! The crate `fuser` could mount too. But it follows symbolic links to the mountpoint, and at the
//! end it unmounts any mount at that path, even if ours has gone and another disk is mounted there.
//! This module unmounts a path only while the kernel's list of mounts shows that the mount is ours.

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
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SocketFlags, SocketType,
};

use super::host_side::MountPlan;
use super::mountinfo;
use super::mountpoint::Mountpoint;
use super::stale::OURS;
use host::error::{Context, os_text};
use host::{Error, ErrorKind, Result};

/// The device through which the kernel serves FUSE.
pub(super) const DEVICE: &str = "/dev/fuse";

/// The part of the file system type after `fuse.` in the list of mounts.
const SUBTYPE: &str = "cordisk";

/// The fusectl file system: one directory per connection, named by the minor device number of its
/// mount.
const CONNECTIONS: &str = "/sys/fs/fuse/connections";

/// The set-user-id helper of libfuse 3.
const HELPER: &str = "fusermount3";

/// How long the kernel may report a mount busy before it counts as in use.
const BUSY_PATIENCE: Duration = Duration::from_secs(2);
/// Time between two tries. A stat(2) of the mount takes microseconds.
const BUSY_PAUSE: Duration = Duration::from_millis(5);

/// The result of an unmount.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Unmounted {
    /// The disk is unmounted, and the session ends.
    Done,
    /// A program has the disk open; nothing has changed.
    Busy,
}

/// Our mount. Dropping it detaches the mounts that are left.
#[derive(Debug)]
pub(super) struct Attachment {
    path: PathBuf,
    /// `major:minor` of our file system. The kernel gives the number to the next mount as soon as
    /// ours has gone.
    device: String,
    /// The image, which no other process can mount while we hold its lock.
    source: PathBuf,
}

/// Opens /dev/fuse. fusermount3 also opens it with the privileges of the user, so a failure here
/// means that no mount is possible.
///
/// # Errors
/// The error of open(2), with a hint how to solve it.
pub(super) fn open_device() -> Result<OwnedFd> {
    rustix::fs::open(DEVICE, OFlags::RDWR | OFlags::CLOEXEC, Mode::empty()).map_err(|errno| {
        let hint = match errno {
            Errno::NOENT | Errno::NODEV | Errno::NXIO => "load the fuse module (modprobe fuse)",
            _ => "this user or container may not use FUSE",
        };
        Error::new(ErrorKind::Io, format!("{DEVICE}: {}: {hint}", os_text(&errno.into())))
    })
}

/// Mounts on `target`. Returns the open /dev/fuse that serves the mount: `device` itself, or a
/// descriptor from fusermount3.
///
/// # Errors
/// The error of mount(2), or the message of fusermount3. Nothing is mounted then.
pub(super) fn attach(
    device: OwnedFd,
    target: &Mountpoint,
    options: &MountPlan,
) -> Result<(OwnedFd, Attachment)> {
    let what = || format!("mounting on {}", target.path().display());
    let device = match mount_directly(&device, target, options) {
        Ok(()) => device,
        Err(Errno::PERM) => {
            mount_by_helper(target.path(), options).map_err(|error| error.context(what()))?
        }
        Err(errno) => return Err(Error::io(what(), errno.into())),
    };
    match mountinfo::mounted_at(target.path())? {
        Some(entry) if entry.fs_type.starts_with("fuse") && entry.source == options.source => Ok((
            device,
            Attachment {
                path: target.path().to_path_buf(),
                device: entry.device,
                source: entry.source,
            },
        )),
        // Closing the device here makes the new mount a dead one, wherever it is.
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
    // The target is given by descriptor. It is the file that was checked, even if its path leads
    // elsewhere by now.
    rustix::mount::mount(
        options.source.as_path(),
        target.reopen_path(),
        format!("fuse.{SUBTYPE}"),
        flags,
        data.as_c_str(),
    )
}

/// Mounts with fusermount3, which sends the open /dev/fuse over the socket whose number is in
/// `_FUSE_COMMFD`.
fn mount_by_helper(path: &Path, options: &MountPlan) -> Result<OwnedFd> {
    // Without CLOEXEC, so that the child inherits `theirs`. No other process is started meanwhile.
    let (ours, theirs) = rustix::net::socketpair(
        AddressFamily::UNIX,
        SocketType::STREAM,
        SocketFlags::empty(),
        None,
    )
    .map_err(io::Error::from)
    .context(|| "socketpair")?;
    rustix::io::fcntl_setfd(&ours, FdFlags::CLOEXEC)
        .map_err(io::Error::from)
        .context(|| "fcntl")?;
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

/// Returns the options in the syntax of fusermount3. A comma or backslash in the source is escaped
/// with a backslash.
fn helper_options(options: &MountPlan) -> OsString {
    let mut text = b"fsname=".to_vec();
    for &byte in options.source.as_os_str().as_bytes() {
        if matches!(byte, b',' | b'\\') {
            text.push(b'\\');
        }
        text.push(byte);
    }
    text.extend_from_slice(
        format!(",subtype={SUBTYPE},nosuid,nodev,noexec,default_permissions").as_bytes(),
    );
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

/// Receives one byte with one descriptor. Returns `None` at the end of the stream, which means that
/// fusermount3 has failed.
fn receive_descriptor(socket: &OwnedFd) -> Option<OwnedFd> {
    let mut byte = [0];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    rustix::io::retry_on_intr(|| {
        rustix::net::recvmsg(
            socket,
            &mut [IoSliceMut::new(&mut byte)],
            &mut control,
            RecvFlags::CMSG_CLOEXEC,
        )
    })
    .ok()?;
    control.drain().find_map(|message| match message {
        RecvAncillaryMessage::ScmRights(mut descriptors) => descriptors.next(),
        _ => None,
    })
}

/// Returns the error text of fusermount3, on one line and without the program's name.
fn complaint(output: &Output) -> String {
    let text = String::from_utf8_lossy(&output.stderr);
    let text =
        text.lines().map(str::trim).filter(|line| !line.is_empty()).collect::<Vec<_>>().join("; ");
    match text.strip_prefix("fusermount3: ").unwrap_or(&text) {
        "" => format!("{HELPER}: {}", output.status),
        text => format!("{HELPER}: {text}"),
    }
}

/// Calls umount2(2) for `path`, which is absolute and without symbolic links, and for no other
/// place. A directory on the way may belong to a user that puts a link in its place, and root would
/// then unmount something else.
///
/// # Errors
/// ELOOP: the path leads elsewhere by now. Otherwise those of umount2(2).
pub(super) fn take_away(path: &Path, flags: UnmountFlags) -> rustix::io::Result<()> {
    let (Some(parent), Some(name)) = (path.parent(), path.file_name()) else {
        return rustix::mount::unmount(path, flags);
    };
    let directory = rustix::fs::open(
        parent,
        OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC,
        Mode::empty(),
    )?;
    let held = Path::new("/proc/self/fd").join(directory.as_raw_fd().to_string());
    match std::fs::read_link(&held) {
        Ok(place) if place != parent => Err(Errno::LOOP),
        Ok(_) => rustix::mount::unmount(held.join(name), flags),
        // Without /proc the place cannot be checked.
        Err(_) => rustix::mount::unmount(path, flags),
    }
}

/// Unmounts the topmost mount at `path`, whether or not it is ours, unless it is in use.
///
/// # Errors
/// The unmount failed for another reason than use.
pub(super) fn unmount(path: &Path) -> io::Result<Unmounted> {
    match take_away(path, UnmountFlags::NOFOLLOW) {
        // EINVAL or ENOENT: another process has unmounted it since the caller looked.
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
    Command::new(HELPER)
        .env("LC_ALL", "C")
        .arg(flag)
        .arg("--")
        .arg(path)
        .stdin(Stdio::null())
        .output()
}

/// Calls `unmount`, and repeats it for up to [`BUSY_PATIENCE`] while the mount is busy. The kernel
/// also reports "busy" while a program only looks at the mount (stat(2), `df`), with no file open.
///
/// # Errors
/// Those of `unmount`.
pub(super) fn unmount_patiently<E>(
    unmount: impl Fn() -> Result<Unmounted, E>,
) -> Result<Unmounted, E> {
    let give_up = Instant::now() + BUSY_PATIENCE;
    loop {
        match unmount() {
            Ok(Unmounted::Busy) if Instant::now() < give_up => thread::sleep(BUSY_PAUSE),
            result => return result,
        }
    }
}

impl Attachment {
    /// Returns the mount at `path`, which a process that has died has made.
    ///
    /// # Errors
    /// Another one is mounted there, or none.
    pub(super) fn adopt(path: &Path, device: &str, source: &Path) -> Result<Attachment> {
        let entry = mountinfo::mounted_at(path)?.filter(|entry| {
            entry.fs_type == OURS && entry.device == device && entry.source == source
        });
        let entry = entry.ok_or_else(|| {
            let text = format!("{}: the disk is not mounted there any more", path.display());
            Error::new(ErrorKind::NotFound, text)
        })?;
        Ok(Attachment { path: path.to_owned(), device: entry.device, source: entry.source })
    }

    /// `major:minor` of the file system.
    pub(super) fn device(&self) -> &str {
        &self.device
    }

    /// The image.
    pub(super) fn source(&self) -> &Path {
        &self.source
    }

    /// Unmounts the disk unless a program has it open. Covers every place in this mount namespace
    /// where it is mounted; its own mountpoint comes last.
    ///
    /// # Errors
    /// The unmount failed for another reason than use.
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

    /// Detaches the mount from the programs that use it. Their descriptors fail from then on, the
    /// path is free, and the session ends. Must be called while the session runs.
    ///
    /// # Errors
    /// The disk is still mounted.
    pub(super) fn detach(&self) -> Result<()> {
        let places = self.places()?;
        if places.is_empty() {
            // Another process has detached the mount, and programs still have the disk open.
            self.abort();
        }
        places.iter().try_for_each(|place| self.detach_at(place))
    }

    fn detach_at(&self, place: &Path) -> Result<()> {
        // FORCE aborts the connection, which ends the session although descriptors are open; DETACH
        // frees the path.
        let flags = UnmountFlags::FORCE | UnmountFlags::DETACH | UnmountFlags::NOFOLLOW;
        if take_away(place, flags).is_ok() {
            return Ok(());
        }
        // Without privilege, two steps do the same.
        self.abort();
        let output = helper("-uz", place).map_err(|error| self.failed(error))?;
        if output.status.success() || !self.places()?.iter().any(|there| there == place) {
            return Ok(());
        }
        Err(self.failed(io::Error::other(complaint(&output))))
    }

    /// Ends the connection through fusectl, if that is mounted; its file belongs to the user that
    /// has mounted our file system. Otherwise the connection ends with the process.
    fn abort(&self) {
        if let Some((_major, minor)) = self.device.split_once(':')
            && let Err(error) = std::fs::write(format!("{CONNECTIONS}/{minor}/abort"), "1")
        {
            log::debug!("aborting FUSE connection {minor}: {error}");
        }
    }

    /// Returns the places where our file system is the topmost mount. They are found by device
    /// number and source instead of by path: a directory above the mountpoint may have been
    /// renamed, and other processes may have made bind mounts. The newest place comes first, and
    /// the original mountpoint last.
    fn places(&self) -> Result<Vec<PathBuf>> {
        let mut places: Vec<PathBuf> = mountinfo::of_device(&self.device, &self.source)?
            .into_iter()
            .rev()
            .map(|entry| entry.mountpoint)
            .collect();
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

    /// Protects: a user that may replace a directory on the way to a mount cannot make us unmount
    /// something else.
    #[test]
    fn nothing_is_unmounted_behind_a_link() {
        let dir = tempfile::tempdir().unwrap();
        let (real, link) =
            (dir.path().canonicalize().unwrap().join("real"), dir.path().join("link"));
        std::fs::create_dir_all(real.join("m")).unwrap();
        std::os::unix::fs::symlink(&real, &link).unwrap();
        assert_eq!(take_away(&link.join("m"), UnmountFlags::NOFOLLOW), Err(Errno::LOOP));
        // Nothing is mounted there, and only the umount2(2) of the real path finds that out.
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
        assert_eq!(
            text,
            "fsname=/a\\,b\\\\c,subtype=cordisk,nosuid,nodev,noexec,default_permissions,ro,sync,allow_other"
        );
    }

    #[test]
    fn complaints_are_one_line() {
        let output = |stderr: &str| Output {
            status: ExitStatusExt::from_raw(256),
            stdout: vec![],
            stderr: stderr.into(),
        };
        assert_eq!(complaint(&output("fusermount3: x: no\n\n more\n")), "fusermount3: x: no; more");
        assert_eq!(complaint(&output("")), "fusermount3: exit status: 1");
    }
}
