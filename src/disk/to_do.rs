//! What a stream would have to do at a place, by tables and block status alone: nothing is read, copied or held.

use super::Disk;
use super::populate::Way;
use crate::Result;
use crate::format::{GuestOffset, Mapping};

/// What there is to do for a run of the disk.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum ToDo {
    /// The overlay has it, or nothing below does.
    Nothing,
    /// It reads as zero, which the overlay does not say yet.
    MarkZero,
    /// Bytes from below.
    Copy,
}

impl Disk {
    /// What a stream of the first `depth` backing layers has to do at `at`, and for how many bytes, at most `max` (> 0), that is so.
    /// A hint: the guest may write there at any time.
    ///
    /// Asks the file systems of backing files where they have data, and so waits for one that hangs.
    ///
    /// # Errors
    /// A table that is corrupt, or cannot be read.
    pub fn to_do(&self, at: u64, max: u64, depth: usize) -> Result<(ToDo, u64)> {
        // The reader's map: what is wrong in a table is acted upon by the stream that comes there.
        let extent = self.reader().map(GuestOffset(at), max)?;
        let (Mapping::Unallocated, Some(chain)) = (extent.mapping, self.chain()) else { return Ok((ToDo::Nothing, extent.len)) };
        let (way, len) = self.how_to_copy(&chain, depth, at, extent.len)?;
        let to_do = match way {
            Way::Leave => ToDo::Nothing,
            Way::Zero => ToDo::MarkZero,
            Way::Clone(_) | Way::Read => ToDo::Copy,
        };
        Ok((to_do, len.clamp(1, max)))
    }
}
