//! The map of an image that is not mounted.

use std::path::Path;

use super::{Cells, Page, extents};
use engine::chain::Gate;
use engine::disk::{Disk, DiskOptions};
use host::Result;
use host::error::Context;
use qcow2::format::BackingFormat;

/// An image and its chain, open for reading. They are locked against programs that would write to
/// them, and are not changed. Remote files are not opened, and no server is asked.
#[derive(Debug)]
pub struct OfflineMap {
    disk: Disk,
}

impl OfflineMap {
    /// Opens an image. `backing_format` is the format of the first backing file, if the image does
    /// not name it.
    ///
    /// # Errors
    /// Those of [`Disk::open`]; [`host::ErrorKind::Busy`] if another process writes to the image.
    pub fn open(path: &Path, backing_format: Option<BackingFormat>) -> Result<OfflineMap> {
        let gate = Gate { backing_format, leave_remote: true, ..Gate::default() };
        let options = DiskOptions {
            read_only: true,
            copy_on_read: false,
            gate,
            full_check: false,
            reserve: None,
        };
        Ok(OfflineMap { disk: Disk::open(path, &options)? })
    }

    /// Returns the depth of the remote file at the end of the chain, as in the extents, and its
    /// name without what may be a secret.
    pub fn remote(&self) -> Option<(usize, String)> {
        let layers = self.disk.info().ok()?.backing;
        let last = layers.last().filter(|layer| layer.is_remote)?;
        Some((layers.len(), last.path.display().to_string()))
    }

    /// Returns the map of the disk in at most `cells` cells.
    ///
    /// # Errors
    /// A table is corrupt or cannot be read.
    pub fn cells(&self, cells: u64) -> Result<Cells> {
        let statistics = self.disk.allocation_statistics(cells).context(|| "the map")?;
        Cells::new(
            statistics.size,
            statistics.cell_size,
            statistics.local.clone(),
            statistics.zero.clone(),
        )
    }

    /// Returns at most `limit` extents from guest byte `from` on, see [`extents`].
    ///
    /// # Errors
    /// Those of [`extents`].
    pub fn page(&self, from: u64, limit: usize) -> Result<Page> {
        extents(&self.disk, from, limit)
    }
}
