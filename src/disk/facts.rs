//! Facts of the disk. Nothing here asks a backing file, which may hang.

use std::path::PathBuf;

use super::Disk;
use crate::Result;
use crate::chain::LayerInfo;
use crate::format::Qcow2Facts;

/// Facts of the disk, for people and for QMP.
#[derive(Clone, Debug)]
pub struct DiskInfo {
    /// The overlay's path, absolute.
    pub path: PathBuf,
    /// Virtual size in bytes.
    pub size: u64,
    /// Bytes the overlay occupies on the host.
    pub allocated_size: u64,
    /// Cluster size in bytes.
    pub cluster_size: u64,
    /// qcow2 version, 2 or 3.
    pub version: u32,
    /// What only qcow2 has.
    pub qcow2: Qcow2Facts,
    /// Bytes of the overlay's file.
    pub file_size: u64,
    /// The overlay is a block device.
    pub block_device: bool,
    /// The overlay has no name any more: its bytes go when this process does.
    pub deleted: bool,
    /// Whether it is open read-only.
    pub read_only: bool,
    /// Whether reads copy up.
    pub copy_on_read: bool,
    /// The backing layers, top first; empty once detached.
    pub backing: Vec<LayerInfo>,
}

impl Disk {
    /// Facts.
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
