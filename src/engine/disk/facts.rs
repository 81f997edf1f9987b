//! Properties of the disk for status queries. Nothing here asks a backing file, which may hang.

use std::path::PathBuf;

use super::Disk;
use crate::chain::LayerInfo;
use host::Result;
use qcow2::format::Qcow2Facts;

/// Properties of the disk, for users and for QMP.
#[derive(Clone, Debug)]
pub struct DiskInfo {
    /// Absolute path of the overlay.
    pub path: PathBuf,
    /// Virtual size in bytes.
    pub size: u64,
    /// Bytes that the overlay occupies on the host, see [`Disk::allocated_size`].
    pub allocated_size: u64,
    /// Cluster size of the overlay in bytes.
    pub cluster_size: u64,
    /// qcow2 version, 2 or 3.
    pub version: u32,
    /// Properties that only qcow2 images have.
    pub qcow2: Qcow2Facts,
    /// Length of the overlay's file in bytes.
    pub file_size: u64,
    /// Whether the overlay is a block device.
    pub block_device: bool,
    /// Whether the overlay has no name any more. Its bytes are then freed when this process exits.
    pub deleted: bool,
    /// Whether the disk is open read-only.
    pub read_only: bool,
    /// Whether reads copy up.
    pub copy_on_read: bool,
    /// The backing layers, top first; empty once detached.
    pub backing: Vec<LayerInfo>,
}

impl Disk {
    /// Returns the properties of the disk.
    ///
    /// # Errors
    /// fstat(2) failed.
    pub fn info(&self) -> Result<DiskInfo> {
        let geometry = self.geometry();
        let storage = self.reader().storage();
        Ok(DiskInfo {
            path: self.path.clone(),
            size: geometry.size(),
            allocated_size: self.allocated_size()?,
            cluster_size: geometry.cluster_size(),
            version: geometry.version(),
            qcow2: self.reader().header().facts(),
            file_size: storage.size(),
            block_device: storage.is_block_device(),
            deleted: storage.is_deleted(),
            read_only: self.is_read_only(),
            copy_on_read: self.copy_on_read && !self.is_read_only(),
            backing: self.chain().map_or_else(Vec::new, |chain| chain.layers()),
        })
    }
}
