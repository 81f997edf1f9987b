//! The host side of a mount: creates the placeholder and the mount, and removes both.

use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use super::attach::{self, Attachment, Unmounted};
use super::mountpoint::{LeftBehind, Mountpoint};
use super::stale;
use host::Result;

/// A planned mount: source, mountpoint and options.
#[derive(Clone, Debug)]
pub struct MountPlan {
    /// A regular file, or a name that does not exist. Absolute.
    pub mountpoint: PathBuf,
    /// The source in the list of mounts: the path of the image.
    pub source: PathBuf,
    /// (device, inode) of the image and its backing files, none of which may be the mountpoint.
    pub taken: Vec<(u64, u64)>,
    /// Mount read-only (`ro`).
    pub read_only: bool,
    /// Other users may open the disk, within the limits of its mode and owner.
    pub allow_other: bool,
    /// The user that owns the mount and may open the disk.
    pub uid: u32,
    /// The group of that user.
    pub gid: u32,
    /// Mount `sync`: the kernel sends a flush after each write, and write(2) returns after both.
    pub sync: bool,
}

/// Our mount. Dropping it detaches the mounts that are left, and removes the placeholder.
#[derive(Debug)]
pub struct HostMount {
    // Dropped in this order: first the mount, then the placeholder below it.
    attachment: Attachment,
    below: Below,
}

/// The file below the mount.
#[derive(Debug)]
enum Below {
    Prepared(Mountpoint),
    Adopted(LeftBehind),
}

impl HostMount {
    /// Mounts the disk. Returns the mount and the open /dev/fuse that serves it.
    ///
    /// # Errors
    /// Every problem of the mountpoint, of /dev/fuse or of the mount, on one line. After an error
    /// nothing stays mounted or created.
    pub fn mount(plan: &MountPlan) -> Result<(HostMount, OwnedFd)> {
        let device = attach::open_device()?;
        stale::remove(&plan.mountpoint, &plan.source)?;
        let mountpoint = Mountpoint::prepare(&plan.mountpoint, &plan.taken)?;
        let (device, attachment) = attach::attach(device, &mountpoint, plan)?;
        mountpoint.hide();
        Ok((HostMount { attachment, below: Below::Prepared(mountpoint) }, device))
    }

    /// Adopts the mount at `mountpoint` (absolute, without symbolic links) of a process that has
    /// died. The file system is not asked for anything: no process may serve it now.
    ///
    /// # Errors
    /// This disk is not mounted there: not a mount of ours with the number `file_system`
    /// (`major:minor`) and this source.
    pub fn adopt(mountpoint: PathBuf, file_system: &str, source: &Path) -> Result<HostMount> {
        let attachment = Attachment::adopt(&mountpoint, file_system, source)?;
        Ok(HostMount { attachment, below: Below::Adopted(LeftBehind(mountpoint)) })
    }

    /// The mountpoint: absolute, without symbolic links.
    pub fn path(&self) -> &Path {
        match &self.below {
            Below::Prepared(mountpoint) => mountpoint.path(),
            Below::Adopted(left) => &left.0,
        }
    }

    /// `major:minor` of the file system.
    pub fn file_system(&self) -> &str {
        self.attachment.device()
    }

    /// The source in the list of mounts.
    pub fn source(&self) -> &Path {
        self.attachment.source()
    }

    /// Unmounts the disk unless a program has it open. The session ends a moment later.
    ///
    /// # Errors
    /// The unmount failed for another reason than use; the disk is still mounted and served.
    pub fn unmount(&self) -> Result<Unmounted> {
        self.attachment.unmount()
    }

    /// Detaches the disk from the programs that have it open. Their requests fail with ENOTCONN
    /// from then on, and the session ends.
    ///
    /// # Errors
    /// The disk is still mounted.
    pub fn detach(&self) -> Result<()> {
        self.attachment.detach()
    }
}
