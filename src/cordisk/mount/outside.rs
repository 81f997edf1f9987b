//! Our mounts, seen by a process that serves none: lists them, tells whether they are served, and
//! ends them.

use std::path::{Path, PathBuf};

use super::attach::{self, Unmounted};
use super::{mountinfo, mountpoint, stale};
use host::Result;
use host::error::Context;

pub use super::stale::Life;

/// A mounted disk.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct SeenMount {
    /// The mountpoint: absolute, without symbolic links.
    pub mountpoint: PathBuf,
    /// The path of the image, as in the list of mounts.
    pub image: PathBuf,
    /// The user that owns the mount and may open the disk.
    pub user: Option<u32>,
    /// `major:minor` of its file system. It is the same for each place where the disk is mounted,
    /// and stays the same if a directory above the mountpoint is renamed.
    pub device: String,
}

/// Returns all mounted disks that no other mount at the same place hides, the oldest first.
///
/// # Errors
/// The list of mounts cannot be read.
pub fn mounts() -> Result<Vec<SeenMount>> {
    let ours =
        mountinfo::topmost_of_each()?.into_iter().filter(|entry| entry.fs_type == stale::OURS);
    Ok(ours
        .map(|entry| SeenMount {
            mountpoint: entry.mountpoint,
            image: entry.source,
            user: entry.user,
            device: entry.device,
        })
        .collect())
}

/// Returns one process of each other mount namespace in which the disk with this `device` and image
/// is mounted. Only processes that this user may inspect are found.
pub fn other_namespaces(device: &str, image: &Path) -> Vec<u32> {
    mountinfo::other_namespaces(device, image)
}

/// Tells whether a process serves the mount at `mountpoint`. Takes two seconds at most.
pub fn life_of(mountpoint: &Path) -> Life {
    stale::life_of(mountpoint)
}

/// Unmounts the disk at `mountpoint` unless it is in use. A use that ends soon, such as stat(2) or
/// `df`, does not count.
///
/// # Errors
/// The unmount failed for another reason than use; the disk is still mounted.
pub fn unmount(mountpoint: &Path) -> Result<Unmounted> {
    attach::unmount_patiently(|| attach::unmount(mountpoint))
        .context(|| format!("unmounting {}", mountpoint.display()))
}

/// Detaches the mount at `mountpoint` from its path. Programs that have the disk open keep it.
///
/// # Errors
/// The disk is still mounted.
pub fn detach(mountpoint: &Path) -> Result<()> {
    stale::detach(mountpoint)
        .map_err(|error| error.context(format!("unmounting {}", mountpoint.display())))
}

/// Removes the empty file on which a daemon of this user, or of `user`, had mounted, and which it
/// could not remove because it was killed. Any other file stays. Returns whether a file was
/// removed.
pub fn remove_placeholder(mountpoint: &Path, user: Option<u32>) -> bool {
    mountpoint::remove_left_behind(mountpoint, user)
}
