//! One qcow2 file. (docs to be written with the engine)

use std::sync::Arc;

use crate::Result;
use crate::format::{BackingReference, Geometry, GuestOffset, Header, Mapping};
use crate::storage::Storage;

/// One run of equal mapping.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Extent {
    /// What the first cluster of the run maps to; data clusters that follow lie behind it without a gap.
    pub mapping: Mapping,
    /// Bytes from the offset asked for to the end of the run.
    pub len: u64,
}

/// Enough of an image to read it; what `chain` holds, so that a backing file cannot be written by type.
#[derive(Debug)]
pub struct ImageReader {}

#[allow(clippy::todo)]
impl ImageReader {
    /// Opens for reading.
    ///
    /// # Errors
    /// Whatever breaks V1 to V21, or I/O.
    pub fn open(_storage: Arc<dyn Storage>) -> Result<Self> {
        todo!()
    }

    /// The numbers of the image.
    pub fn geometry(&self) -> Geometry {
        todo!()
    }

    /// The header as it is now.
    pub fn header(&self) -> Header {
        todo!()
    }

    /// The file it lies in.
    pub fn storage(&self) -> &Arc<dyn Storage> {
        todo!()
    }

    /// A name, never opened here.
    pub fn backing(&self) -> Option<BackingReference> {
        todo!()
    }

    /// The run of equal mapping that starts at `at` (any byte), at most `max` bytes (> 0), never beyond the virtual size.
    ///
    /// # Errors
    /// Corrupt tables, I/O.
    pub fn map(&self, _at: GuestOffset, _max: u64) -> Result<Extent> {
        todo!()
    }

    /// Reads from the start of a run that [`ImageReader::map`] returned for the same `at`; `buf` is at most `extent.len` bytes.
    /// Unallocated and zero runs give zeros.
    ///
    /// # Errors
    /// Corrupt compressed data, I/O.
    pub fn read_extent(&self, _at: GuestOffset, _extent: &Extent, _buf: &mut [u8]) -> Result<()> {
        todo!()
    }
}
