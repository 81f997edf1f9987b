//! The guest's disk. (docs to be written with the engine)

use std::ops::Range;
use std::path::{Path, PathBuf};

use crate::chain::{Gate, LayerInfo};
use crate::{ErrorKind, Result};

/// How a disk is opened.
#[derive(Clone, Debug)]
pub struct DiskOptions {
    /// Nothing may be written; reads do not copy up.
    pub read_only: bool,
    /// Reads of what the overlay does not hold are copied up.
    pub copy_on_read: bool,
    /// What may be opened as backing file.
    pub gate: Gate,
}

/// Whether an operation could be answered from the overlay without waiting.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Local {
    /// Done.
    Done,
    /// Nothing was done: it needs the backing file, an allocation, or a range that is in use. Call the blocking sibling on a miss worker.
    Miss,
}

/// What SEEK_DATA and SEEK_HOLE look for.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Seek {
    /// The next byte that may be non-zero.
    Data,
    /// The next byte known to be zero, or the end of the disk.
    Hole,
}

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
    /// Whether it is open read-only.
    pub read_only: bool,
    /// Whether reads copy up.
    pub copy_on_read: bool,
    /// The backing layers, top first; empty once detached.
    pub backing: Vec<LayerInfo>,
}

/// What one populate did, in bytes.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct Populated {
    /// Read from below and written to the overlay.
    pub copied: u64,
    /// Read from below, found to be zero, recorded as zero.
    pub zeroed: u64,
    /// Known without reading: held by the overlay already, or zero, or nothing below.
    pub skipped: u64,
}

/// The disk: overlay above chain, one method per guest request. All offsets and lengths in bytes; ranges must lie inside [`Disk::size`]
/// (an [`ErrorKind::InvalidArgument`] otherwise; `fuse` clamps first). Every method may be called from any thread.
#[derive(Debug)]
pub struct Disk {}

#[allow(clippy::todo, unused_variables)]
impl Disk {
    /// Opens the overlay and its chain, with locks.
    ///
    /// # Errors
    /// Anything that is wrong with any of the files.
    pub fn open(path: &Path, options: &DiskOptions) -> Result<Disk> {
        todo!()
    }
    /// Virtual size in bytes.
    pub fn size(&self) -> u64 {
        todo!()
    }
    /// Cluster size of the overlay in bytes.
    pub fn cluster_size(&self) -> u64 {
        todo!()
    }
    /// Whether nothing may be written.
    pub fn is_read_only(&self) -> bool {
        todo!()
    }
    /// Facts.
    ///
    /// # Errors
    /// fstat(2) failed.
    pub fn info(&self) -> Result<DiskInfo> {
        todo!()
    }
    /// Bytes the overlay occupies on the host (`st_blocks` × 512).
    ///
    /// # Errors
    /// fstat(2) failed.
    pub fn allocated_size(&self) -> Result<u64> {
        todo!()
    }
    /// Reads if the overlay alone can answer at once; never waits for a lock or a backing file.
    ///
    /// # Errors
    /// I/O, corruption.
    pub fn read_local(&self, offset: u64, buf: &mut [u8]) -> Result<Local> {
        todo!()
    }
    /// Reads, copying up what was missing if copy-on-read is on.
    ///
    /// # Errors
    /// I/O, corruption.
    pub fn read(&self, offset: u64, buf: &mut [u8]) -> Result<()> {
        todo!()
    }
    /// Writes if it is an in-place overwrite that can be done at once.
    ///
    /// # Errors
    /// I/O, corruption, read-only.
    pub fn write_local(&self, offset: u64, data: &[u8]) -> Result<Local> {
        todo!()
    }
    /// Writes.
    ///
    /// # Errors
    /// I/O, corruption, read-only, no space.
    pub fn write(&self, offset: u64, data: &[u8]) -> Result<()> {
        todo!()
    }
    /// The range reads as zero afterwards; host clusters stay reserved.
    ///
    /// # Errors
    /// As [`Disk::write`].
    pub fn write_zeroes(&self, range: Range<u64>) -> Result<()> {
        todo!()
    }
    /// The range reads as zero for ever after, whatever the backing file holds; host clusters are given back.
    ///
    /// # Errors
    /// As [`Disk::write`].
    pub fn discard(&self, range: Range<u64>) -> Result<()> {
        todo!()
    }
    /// Makes every operation that has returned before this call durable.
    ///
    /// # Errors
    /// I/O; sticky after a failed fdatasync (P7).
    pub fn flush(&self) -> Result<()> {
        todo!()
    }
    /// Writes back metadata if any is dirty; for the commit timer.
    ///
    /// # Errors
    /// As [`Disk::flush`].
    pub fn flush_if_dirty(&self) -> Result<()> {
        todo!()
    }
    /// SEEK_DATA and SEEK_HOLE over overlay and chain. `None` where there is no such byte before the end (data only; ENXIO).
    ///
    /// # Errors
    /// I/O, corruption.
    pub fn seek(&self, from: u64, what: Seek) -> Result<Option<u64>> {
        todo!()
    }
    /// Makes everything durable and gives back what is unused. To be called once, after the last request.
    ///
    /// # Errors
    /// As [`Disk::flush`].
    pub fn close(&self) -> Result<()> {
        todo!()
    }
}

/// For `fuse` and `qmp`: kinds are all they need.
pub type Kind = ErrorKind;
