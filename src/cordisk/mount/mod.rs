//! The host side of a mount: mountpoints, mount(2) and umount(2), the kernel's list of mounts.
//!
//! It runs in the keeper's process, which reads no image. [`export`] serves the mounted disk in the
//! serving process. Commands use this module to find mounted disks.
//!
//! **Touches:** /dev/fuse, mount(2), umount(2), fusermount3, the mountpoint, /proc/self/mountinfo.
//! **Never:** knows a disk or a request; leaves a mount or a placeholder behind, except when the
//! process is killed. **Locks:** none.

mod attach;
mod host_side;
mod mountinfo;
mod mountpoint;
mod outside;
mod stale;

use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;

pub use attach::Unmounted;
pub use host_side::{HostMount, MountPlan};
pub use outside::{
    Life, SeenMount, detach, life_of, mounts, other_namespaces, remove_placeholder, unmount,
};

use engine::disk::DiskInfo;
use host::Result;
use host::error::Context;

/// The options of a mount.
#[derive(Clone, Debug)]
pub struct MountOptions {
    /// A regular file, or a name that does not exist.
    pub mountpoint: PathBuf,
    /// Other users may open the disk, within the limits of its mode and owner.
    pub allow_other: bool,
    /// User id of the owner of the mount.
    pub uid: u32,
    /// Group id of the owner of the mount.
    pub gid: u32,
    /// Every write is durable when it returns (mount(8): `sync`).
    pub sync: bool,
}

impl MountPlan {
    /// Makes the plan for [`HostMount::mount`]. After this call no path of the disk is looked up
    /// any more.
    ///
    /// # Errors
    /// The overlay or a backing file is no longer at its path.
    pub fn of_disk(info: DiskInfo, options: MountOptions) -> Result<MountPlan> {
        Ok(MountPlan {
            mountpoint: options.mountpoint,
            taken: files_of(&info)?,
            source: info.path,
            read_only: info.read_only,
            allow_other: options.allow_other,
            uid: options.uid,
            gid: options.gid,
            sync: options.sync,
        })
    }
}

/// Returns (device, inode) of the image and its backing files, none of which may be the mountpoint.
fn files_of(info: &DiskInfo) -> Result<Vec<(u64, u64)>> {
    let local = info.backing.iter().filter(|layer| !layer.is_remote).map(|layer| &layer.path);
    let paths = std::iter::once(&info.path).chain(local);
    paths
        .map(|path| {
            path.metadata()
                .map(|file| (file.dev(), file.ino()))
                .context(|| path.display().to_string())
        })
        .collect()
}
