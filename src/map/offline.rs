//! The map of an image that nobody has mounted.

use std::path::Path;

use super::{Cells, Page, extents};
use crate::Result;
use crate::chain::Gate;
use crate::disk::{Disk, DiskOptions};
use crate::error::Context;
use crate::format::BackingFormat;

/// An image and its chain, open for reading: locked against whoever would write to them meanwhile, and unchanged.
#[derive(Debug)]
pub struct OfflineMap {
    disk: Disk,
}

impl OfflineMap {
    /// Opens an image; `backing_format` is the format of the first backing file, where the image does not say.
    ///
    /// # Errors
    /// As [`Disk::open`]; [`crate::ErrorKind::Busy`] where somebody else writes to it.
    pub fn open(path: &Path, backing_format: Option<BackingFormat>) -> Result<OfflineMap> {
        let gate = Gate { backing_format, ..Gate::default() };
        let options = DiskOptions { read_only: true, copy_on_read: false, gate, full_check: false, reserve: None };
        Ok(OfflineMap { disk: Disk::open(path, &options)? })
    }

    /// The disk in at most so many cells.
    ///
    /// # Errors
    /// A table that is corrupt, or cannot be read.
    pub fn cells(&self, cells: u64) -> Result<Cells> {
        let survey = self.disk.survey(cells).context(|| "the map")?;
        Cells::new(survey.size, survey.cell_size, survey.local.clone(), survey.zero.clone())
    }

    /// Extents from guest byte `from` on, see [`extents`].
    ///
    /// # Errors
    /// As [`extents`].
    pub fn page(&self, from: u64, limit: usize) -> Result<Page> {
        extents(&self.disk, from, limit)
    }

    /// Virtual size in bytes.
    pub fn size(&self) -> u64 {
        self.disk.size()
    }
}
