//! Where guest bytes are: in the overlay, or in which layer below.

use std::sync::Arc;
use std::time::Instant;

use super::Disk;
use crate::Result;
use crate::chain::{Chain, Located};
use crate::format::GuestOffset;
use crate::image::Holes;

/// The disk and its chain as they were at one moment, for one look over them.
#[derive(Debug)]
pub struct Locator<'a> {
    disk: &'a Disk,
    size: u64,
    chain: Option<Arc<Chain>>,
    holes: Holes,
    deadline: Instant,
}

impl Disk {
    /// Begins a look over the disk, which asks what lies below as well, and so waits for a backing file that hangs; it holds nothing meanwhile. Niceties
    /// that take longer than to `deadline` are left out.
    pub fn locator(&self, deadline: Instant) -> Locator<'_> {
        Locator { disk: self, size: self.size(), chain: self.chain(), holes: self.reader().holes(deadline), deadline }
    }
}

impl Locator<'_> {
    /// Virtual size of the disk in bytes.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Where the bytes from `at` on are, which is inside the disk, and for how many that is so. A run may go on behind its end in the same way.
    ///
    /// # Errors
    /// I/O, corruption.
    pub fn locate(&self, at: u64) -> Result<(Located, u64)> {
        let (place, len) = self.disk.reader().place(GuestOffset(at), self.size - at, self.holes)?;
        let below = self.chain.as_ref().filter(|chain| chain.reaches(at));
        match (Located::of(place, 0, below.is_some()), below) {
            (None, Some(chain)) => {
                let (located, len) = chain.locate(at, len, self.deadline)?;
                Ok((Located { depth: located.depth + 1, ..located }, len))
            }
            (Some(located), _) => Ok((located, len)),
            (None, None) => unreachable!("what nobody below decides the overlay does"),
        }
    }
}
