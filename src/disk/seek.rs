//! Where the disk has data and where it has holes, for lseek(2).

use std::time::{Duration, Instant};

use super::{Disk, Patience};
use crate::Result;
use crate::chain::Content;
use crate::format::{GuestOffset, Mapping};

/// Runs that one seek looks at, at most: an image can be made of more of them than anybody can
/// count (I8).
const SEEK_RUNS: u32 = 1 << 20;
/// And no longer than this: each run may cost the loading of a table in every layer, and the tables
/// of a hostile chain can be one and the same, named a million times by a small file.
const SEEK_TIME: Duration = Duration::from_secs(1);

/// What SEEK_DATA and SEEK_HOLE look for.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Seek {
    /// The next byte that may be non-zero.
    Data,
    /// The next byte known to be zero, or the end of the disk.
    Hole,
}

impl Disk {
    /// SEEK_DATA and SEEK_HOLE over overlay and chain. `None` where there is no data before the end
    /// (ENXIO); a hole is always found, the end of the disk at the latest. A hint: what changes
    /// meanwhile may or may not be seen. Where a table is bad there is data, so that no copy skips
    /// what only a read reports as an error.
    ///
    /// # Errors
    /// [`crate::ErrorKind::InvalidArgument`] beyond the end; I/O of a raw file below.
    pub fn seek(&self, from: u64, what: Seek) -> Result<Option<u64>> {
        self.seek_until(from, what, Instant::now() + SEEK_TIME)
    }

    /// As [`Disk::seek`], as far as the overlay knows it; the outer `None` where the chain would have to
    /// be asked.
    ///
    /// # Errors
    /// As [`Disk::seek`].
    pub fn seek_without_base(&self, from: u64, what: Seek) -> Result<Option<Option<u64>>> {
        self.seek_by(from, what, Instant::now() + SEEK_TIME, Patience::Brief)
    }

    /// As [`Disk::seek`], no longer than until `deadline`.
    pub(crate) fn seek_until(&self, from: u64, what: Seek, deadline: Instant) -> Result<Option<u64>> {
        self.seek_by(from, what, deadline, Patience::Long).map(Option::flatten)
    }

    fn seek_by(&self, from: u64, what: Seek, deadline: Instant, patience: Patience) -> Result<Option<Option<u64>>> {
        let size = self.size();
        self.check_range(&(from..from))?;
        let mut at = from;
        for _ in 0..SEEK_RUNS {
            if at >= size {
                return Ok(Some((what == Seek::Hole).then_some(size)));
            }
            let (mapping, len) = self.reader().look(GuestOffset(at), size - at);
            let (holds, len) = match (mapping, self.chain_below(at)) {
                (Ok(Mapping::Data { .. } | Mapping::Compressed { .. }) | Err(_), _) => (Seek::Data, len),
                (Ok(Mapping::Unallocated), Some(_)) if patience == Patience::Brief => return Ok(None),
                (Ok(Mapping::Unallocated), Some(chain)) => match chain.content(usize::MAX, at, len)? {
                    (Content::Data, len) => (Seek::Data, len),
                    (Content::Zero | Content::Unallocated, len) => (Seek::Hole, len),
                },
                (Ok(Mapping::Unallocated | Mapping::Zero { .. }), _) => (Seek::Hole, len),
            };
            if holds == what {
                return Ok(Some(Some(at)));
            }
            at += len;
            if Instant::now() >= deadline {
                break;
            }
        }
        // Further on is further than one request may take; both answers are right, if not the best.
        Ok(Some(match what {
            Seek::Data => (at < size).then_some(at),
            Seek::Hole => Some(size),
        }))
    }
}
