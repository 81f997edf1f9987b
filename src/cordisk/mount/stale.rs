//! What a killed daemon leaves at the mountpoint: a mount that no process serves. The next mount of
//! the same image at the same place removes it.
//!
//! A mount is removed only if all of these conditions hold. Its type is ours. Its source is the
//! image that we have just opened, and so locked. It answers ENOTCONN, which the kernel returns for
//! a FUSE mount only after its daemon has ended for good. The mount has to be asked for fresh
//! attributes, because cached attributes outlive the daemon.

use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::thread;
use std::time::Duration;

use rustix::fs::{AtFlags, CWD, StatxFlags};
use rustix::io::Errno;
use rustix::mount::UnmountFlags;

use super::attach;
use super::mountinfo::{self, MountEntry};
use host::error::Context;
use host::{Error, ErrorKind, Result};

/// File system type of our mounts in the list of mounts.
pub(super) const OURS: &str = "fuse.cordisk";

/// The most dead mounts at one place that are removed. Each death leaves one, so real stacks are
/// far smaller.
const DEEPEST: u32 = 1000;

/// How long a mount may take to answer before it counts as alive. For a dead mount the kernel
/// answers at once.
const ANSWER: Duration = Duration::from_secs(2);

/// Detaches all dead mounts of `image` at `mountpoint`. Every other mount there stays. A path that
/// cannot be a mountpoint is left to [`super::mountpoint`], which reports why.
///
/// # Errors
/// Busy: another image is mounted there, dead or alive. Otherwise the error of the system call.
pub(super) fn remove(mountpoint: &Path, image: &Path) -> Result<()> {
    let (Some(parent), Some(name)) = (mountpoint.parent(), mountpoint.file_name()) else {
        return Ok(());
    };
    // The last part of the path is not resolved, because it is the dead mount.
    let Ok(parent) = parent.canonicalize() else { return Ok(()) };
    let path = parent.join(name);
    for _ in 0..DEEPEST {
        let Some(entry) = mountinfo::mounted_at(&path)?.filter(|entry| entry.fs_type == OURS)
        else {
            return Ok(());
        };
        // A mount of another image is not asked for attributes: its daemon may be stopped and never
        // answer.
        if !is_of(&entry, image) {
            let (path, source) = (path.display(), entry.source.display());
            let text = format!(
                "mountpoint {path}: already mounted ({OURS}), with another image, {source}; unmount it first: umount {path} \
                 (if its daemon is gone: umount -l {path})"
            );
            return Err(Error::new(ErrorKind::Busy, text));
        }
        if life_of(&path) != Life::Dead {
            return Ok(());
        }
        detach(&path).map_err(|error| {
            error.context(format!(
                "mountpoint {}: the daemon that was mounted here is gone",
                path.display()
            ))
        })?;
        log::info!("{}: removed the mount of a daemon that has died", path.display());
    }
    Ok(())
}

/// Whether a process serves a mount.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Life {
    /// No process serves it: the daemon has ended.
    Dead,
    /// A process serves it, or has not answered in time.
    Alive,
    /// This user may not ask the mount.
    Unknown,
}

/// Tells whether a process serves the mount at `path`, by asking the mount for attributes. A mount
/// of our own image can still be served although we have it locked: both processes may only read
/// the image, or its file system has no locks. The other process may be stopped, so a separate
/// thread asks. If no answer arrives, the thread is left behind; it ends with the process.
pub(super) fn life_of(path: &Path) -> Life {
    let (sender, answer) = crossbeam_channel::bounded(1);
    let path = path.to_path_buf();
    let ask = move || {
        let flags = AtFlags::SYMLINK_NOFOLLOW | AtFlags::STATX_FORCE_SYNC;
        let _ = sender.send(match rustix::fs::statx(CWD, path, flags, StatxFlags::BASIC_STATS) {
            Err(Errno::NOTCONN) => Life::Dead,
            Err(Errno::ACCESS) => Life::Unknown,
            _ => Life::Alive,
        });
    };
    if thread::Builder::new().spawn(ask).is_err() {
        return Life::Unknown;
    }
    answer.recv_timeout(ANSWER).unwrap_or(Life::Alive)
}

/// Tells whether a mount shows `image`, by path, or by the file to which the path leads.
fn is_of(entry: &MountEntry, image: &Path) -> bool {
    let identity = |path: &Path| path.metadata().map(|file| (file.dev(), file.ino())).ok();
    entry.source == image
        || identity(&entry.source).is_some_and(|there| identity(image) == Some(there))
}

/// Detaches the topmost mount: by umount2(2), or by fusermount3 if this user may not call
/// umount2(2).
pub(super) fn detach(path: &Path) -> Result<()> {
    match attach::take_away(path, UnmountFlags::DETACH | UnmountFlags::NOFOLLOW) {
        // EINVAL: another process has unmounted it first.
        Ok(()) | Err(Errno::INVAL) => return Ok(()),
        Err(Errno::PERM) => {}
        Err(error) => return Err(Error::io("unmounting it", error.into())),
    }
    let mut helper = Command::new("fusermount3");
    let output = helper
        .args(["-u", "-z", "--"])
        .arg(path)
        .stdin(Stdio::null())
        .output()
        .context(|| "fusermount3")?;
    if output.status.success() {
        return Ok(());
    }
    let text = String::from_utf8_lossy(&output.stderr);
    Err(Error::new(ErrorKind::Io, text.lines().next().unwrap_or("fusermount3 failed").to_string()))
}
