//! Where guest bytes are: in the overlay, or in which layer below.

use std::sync::Arc;
use std::time::Instant;

use super::Disk;
use crate::chain::{Chain, MapEntry};
use host::Result;
use qcow2::format::GuestOffset;
use qcow2::image::{Holes, Location};

/// A snapshot of the disk's size and chain, for one walk over the disk.
#[derive(Debug)]
pub struct Locator<'a> {
    disk: &'a Disk,
    size: u64,
    chain: Option<Arc<Chain>>,
    holes: Holes,
    deadline: Instant,
}

impl Disk {
    /// Starts a walk over the disk. The walk also asks the layers below, and so waits for a backing
    /// file that hangs; it holds no range meanwhile. Optional details that are not known by
    /// `deadline` are left out (see [`Holes`]).
    pub fn locator(&self, deadline: Instant) -> Locator<'_> {
        Locator {
            disk: self,
            size: self.size(),
            chain: self.chain(),
            holes: self.reader().holes(deadline),
            deadline,
        }
    }
}

impl Locator<'_> {
    /// Virtual size of the disk in bytes.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Finds the bytes at `at`, which is inside the disk: the run that begins there. The next run
    /// may continue in the same way.
    ///
    /// # Errors
    /// I/O errors, corruption.
    pub fn locate(&self, at: u64) -> Result<MapEntry> {
        let (place, len) = self.disk.reader().place(GuestOffset(at), self.size - at, self.holes)?;
        let below = self.chain.as_ref().filter(|chain| chain.reaches(at));
        let reserved = match place {
            Location::Below { offset } => offset,
            _ => None,
        };
        match (MapEntry::of(at, len, place), below) {
            (None, Some(chain)) => {
                let entry = chain.locate(at, len, self.deadline)?;
                Ok(MapEntry { depth: entry.depth + 1, ..entry })
            }
            (None, None) => Ok(MapEntry { offset: reserved, ..MapEntry::absent(at, len, 0) }),
            (Some(entry), _) => Ok(entry),
        }
    }
}
