//! The host side of a mount: the placeholder, the mount, and the end of both.

use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use super::attach::{self, Attachment, Unmounted};
use super::mountpoint::Mountpoint;
use super::stale;
use crate::Result;

/// What is to be mounted, and where.
#[derive(Clone, Debug)]
pub struct MountPlan {
    /// A regular file, or a name that does not exist. Absolute.
    pub mountpoint: PathBuf,
    /// What stands as source in the list of mounts: the image.
    pub source: PathBuf,
    /// (device, inode) of the image and its backing files: what must not be the mountpoint.
    pub taken: Vec<(u64, u64)>,
    /// Mount `ro`.
    pub read_only: bool,
    /// Other users may open the disk, as far as its mode and owner allow.
    pub allow_other: bool,
    /// The user who may open it, and whose it is.
    pub uid: u32,
    /// The group of that user.
    pub gid: u32,
    /// Mount `sync`: the kernel sends a flush after each write, and answers both at once.
    pub sync: bool,
}

/// Our mount. Dropping it detaches what is still mounted, and removes the placeholder.
#[derive(Debug)]
pub struct HostMount {
    // Dropped in this order: first the mount, then the placeholder below it.
    attachment: Attachment,
    mountpoint: Mountpoint,
}

impl HostMount {
    /// Mounts. Returns the mount and the open /dev/fuse that serves it.
    ///
    /// # Errors
    /// Everything that is wrong with the mountpoint, /dev/fuse or the mount, on one line. Nothing stays mounted or created then.
    pub fn mount(plan: &MountPlan) -> Result<(HostMount, OwnedFd)> {
        let device = attach::open_device()?;
        stale::remove(&plan.mountpoint, &plan.source)?;
        let mountpoint = Mountpoint::prepare(&plan.mountpoint, &plan.taken)?;
        let (device, attachment) = attach::attach(device, &mountpoint, plan)?;
        mountpoint.hide();
        Ok((HostMount { attachment, mountpoint }, device))
    }

    /// The mountpoint: absolute, without symbolic links.
    pub fn path(&self) -> &Path {
        self.mountpoint.path()
    }

    /// Unmounts unless somebody has the disk open. The session ends a moment later.
    ///
    /// # Errors
    /// Neither done nor busy: it is still mounted and served.
    pub fn unmount(&self) -> Result<Unmounted> {
        self.attachment.unmount()
    }

    /// Takes the disk away from whoever has it open: their requests fail with ENOTCONN from now on, and the session ends.
    ///
    /// # Errors
    /// It is still mounted.
    pub fn detach(&self) -> Result<()> {
        self.attachment.detach()
    }
}
