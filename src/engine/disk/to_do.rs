//! The work that a stream has to do at an offset, determined by tables and block status alone.
//! Nothing is read or copied, and no range is held.

use super::Disk;
use super::populate::CopyMethod;
use host::Result;
use qcow2::format::{GuestOffset, Mapping};

/// The work to do for a run of the disk.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum ToDo {
    /// None: the overlay holds the run, or no layer below does.
    Nothing,
    /// Mark the run as zero: it reads as zero, but the overlay does not say so yet.
    MarkZero,
    /// Share the blocks of the raw file below.
    Clone,
    /// Copy the bytes from below.
    Copy,
}

impl Disk {
    /// Determines the work that a stream of the first `depth` backing layers has to do at `at`.
    /// Returns it with the number of bytes, at most `max` (> 0), to which it applies. A hint: the
    /// guest may write there at any time.
    ///
    /// Asks the file systems of backing files where they have data, and so waits for one that
    /// hangs.
    ///
    /// # Errors
    /// A table that is corrupt or cannot be read.
    pub(crate) fn to_do(&self, at: u64, max: u64, depth: usize) -> Result<(ToDo, u64)> {
        // The reader's `map` does not latch corruption: the stream that reaches a bad table does
        // that.
        let extent = self.reader().map(GuestOffset(at), max)?;
        let (Mapping::Unallocated, Some(chain)) = (extent.mapping, self.chain()) else {
            return Ok((ToDo::Nothing, extent.len));
        };
        let (way, len) = self.how_to_copy(&chain, depth, at, extent.len)?;
        let to_do = match way {
            CopyMethod::Leave => ToDo::Nothing,
            CopyMethod::Zero => ToDo::MarkZero,
            CopyMethod::Clone(_) => ToDo::Clone,
            CopyMethod::Read => ToDo::Copy,
        };
        Ok((to_do, len.clamp(1, max)))
    }
}
