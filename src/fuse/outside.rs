//! Mounts of ours as a process sees them that serves none: which there are, whether anybody serves them, how one ends.

use std::path::{Path, PathBuf};

use super::attach::{self, Unmounted};
use super::{mountinfo, mountpoint, stale};
use crate::Result;
use crate::error::Context;

pub use super::stale::Life;

/// A mounted disk.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct SeenMount {
    /// Where: absolute, without symbolic links.
    pub mountpoint: PathBuf,
    /// The image, as the list of mounts has it.
    pub image: PathBuf,
    /// The user who may open it, and whose it is.
    pub user: Option<u32>,
    /// `major:minor` of its file system: the same for each place where the disk is mounted, and wherever a directory above it is moved.
    pub device: String,
}

/// All disks that are mounted and not hidden by another mount at the same place, the oldest first.
///
/// # Errors
/// The list of mounts cannot be read.
pub fn mounts() -> Result<Vec<SeenMount>> {
    let ours = mountinfo::topmost_of_each()?.into_iter().filter(|entry| entry.fs_type == stale::OURS);
    Ok(ours.map(|entry| SeenMount { mountpoint: entry.mountpoint, image: entry.source, user: entry.user, device: entry.device }).collect())
}

/// Processes, one for each mount namespace other than that of this process, in which the disk is mounted that has this `device` and image. Of the
/// processes that this user may look at.
pub fn other_namespaces(device: &str, image: &Path) -> Vec<u32> {
    mountinfo::other_namespaces(device, image)
}

/// Whether anybody serves what is mounted at `mountpoint`. Takes two seconds at most.
pub fn life_of(mountpoint: &Path) -> Life {
    stale::life_of(mountpoint)
}

/// Unmounts what is mounted at `mountpoint`, unless it is in use, for longer than a look at it takes (stat(2), `df`).
///
/// # Errors
/// Neither done nor busy: it is still mounted.
pub fn unmount(mountpoint: &Path) -> Result<Unmounted> {
    attach::unmount_patiently(|| attach::unmount(mountpoint)).context(|| format!("unmounting {}", mountpoint.display()))
}

/// Takes what is mounted at `mountpoint` away from its path; those who have it open keep it.
///
/// # Errors
/// It is still mounted.
pub fn detach(mountpoint: &Path) -> Result<()> {
    stale::detach(mountpoint).map_err(|error| error.context(format!("unmounting {}", mountpoint.display())))
}

/// Removes the empty file that a daemon of this user, or of `user`, made to mount on and could not remove because it was killed. Any other file stays.
/// Returns whether one was removed.
pub fn remove_placeholder(mountpoint: &Path, user: Option<u32>) -> bool {
    mountpoint::remove_left_behind(mountpoint, user)
}
