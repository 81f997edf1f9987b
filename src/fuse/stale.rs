//! What a killed daemon leaves at the mountpoint: a mount that nobody serves. The next mount of the same image at the same place removes it.
//!
//! A mount is only removed if all of this holds: its type is ours, its source is the image that we have just opened (and so locked), and
//! it answers ENOTCONN, which the kernel says of a FUSE mount only after its daemon has gone for good. It has to be asked for fresh attributes:
//! those that it has cached outlive the daemon.

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
use crate::error::Context;
use crate::{Error, ErrorKind, Result};

/// Type of our mounts in the list of mounts.
pub(super) const OURS: &str = "fuse.cordisk";

/// Dead mounts on top of each other that are removed at most: one a death, so nobody has as many.
const DEEPEST: u32 = 1000;

/// How long it may take until somebody counts as alive: for the dead the kernel answers at once.
const ANSWER: Duration = Duration::from_secs(2);

/// Detaches the dead mounts of `image` at `mountpoint`, however many there are. Whatever else is mounted there stays, and so does a mountpoint
/// that is none: what is to be said of it is said by [`super::mountpoint`].
///
/// # Errors
/// Busy: another image is mounted there, dead or alive. Otherwise what the system says.
pub(super) fn remove(mountpoint: &Path, image: &Path) -> Result<()> {
    let (Some(parent), Some(name)) = (mountpoint.parent(), mountpoint.file_name()) else { return Ok(()) };
    // The last part of the path is not resolved: it is what is dead.
    let Ok(parent) = parent.canonicalize() else { return Ok(()) };
    let path = parent.join(name);
    for _ in 0..DEEPEST {
        let Some(entry) = mountinfo::mounted_at(&path)?.filter(|entry| entry.fs_type == OURS) else { return Ok(()) };
        // Nobody else is asked whether he is dead: he may stand still, and never answer.
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
        detach(&path).map_err(|error| error.context(format!("mountpoint {}: the daemon that was mounted here is gone", path.display())))?;
        log::info!("{}: removed the mount of a daemon that has died", path.display());
    }
    Ok(())
}

/// Whether anybody serves a mount.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Life {
    /// Nobody does any more: the process was killed.
    Dead,
    /// Somebody does, or stands still.
    Alive,
    /// This user may not ask.
    Unknown,
}

/// Whether anybody serves what is mounted at `path`. Asks whoever does: of our own image that can be one who also only reads it, or where
/// the file system has no locks. He may stand still, so a thread asks, which is left behind when he does not answer; it ends with the process.
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

/// Whether a mount shows `image`: by path, or by what the path leads to.
fn is_of(entry: &MountEntry, image: &Path) -> bool {
    let identity = |path: &Path| path.metadata().map(|file| (file.dev(), file.ino())).ok();
    entry.source == image || identity(&entry.source).is_some_and(|there| identity(image) == Some(there))
}

/// Takes the topmost mount away: by umount2(2), or by fusermount3 for whoever may not call it.
pub(super) fn detach(path: &Path) -> Result<()> {
    match attach::take_away(path, UnmountFlags::DETACH | UnmountFlags::NOFOLLOW) {
        // Invalid: somebody else was faster.
        Ok(()) | Err(Errno::INVAL) => return Ok(()),
        Err(Errno::PERM) => {}
        Err(error) => return Err(Error::io("unmounting it", error.into())),
    }
    let mut helper = Command::new("fusermount3");
    let output = helper.args(["-u", "-z", "--"]).arg(path).stdin(Stdio::null()).output().context(|| "fusermount3")?;
    if output.status.success() {
        return Ok(());
    }
    let text = String::from_utf8_lossy(&output.stderr);
    Err(Error::new(ErrorKind::Io, text.lines().next().unwrap_or("fusermount3 failed").to_string()))
}
