//! Searching for data and holes of the disk, for lseek(2).

use std::time::{Duration, Instant};

use super::{Disk, Patience};
use crate::chain::Content;
use host::Result;
use qcow2::format::{GuestOffset, Mapping};

/// Largest number of runs that one seek examines, because an image can consist of arbitrarily many
/// (I8).
const SEEK_RUNS: u32 = 1 << 20;
/// Longest time that one seek takes. Each run may require loading a table of every layer, and a
/// small file of a hostile chain can name a single table a million times.
const SEEK_TIME: Duration = Duration::from_secs(1);

/// What to search for: SEEK_DATA or SEEK_HOLE.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Seek {
    /// The next byte that may be non-zero.
    Data,
    /// The next byte known to be zero, or the end of the disk.
    Hole,
}

impl Disk {
    /// Finds data or a hole, as SEEK_DATA and SEEK_HOLE do, in the overlay and its chain.
    ///
    /// Returns `None` if there is no data before the end (ENXIO). A hole is always found, at the
    /// latest the end of the disk. The result is a hint: changes during the search may or may not
    /// be seen. A bad table entry counts as data, so that a copying program does not skip bytes
    /// whose read is an error.
    ///
    /// # Errors
    /// [`host::ErrorKind::InvalidArgument`] beyond the end of the disk; I/O errors of a raw layer.
    pub fn seek(&self, from: u64, what: Seek) -> Result<Option<u64>> {
        self.seek_until(from, what, Instant::now() + SEEK_TIME)
    }

    /// As [`Disk::seek`], if the overlay alone can answer. The outer `None` means that the chain
    /// would have to be asked.
    ///
    /// # Errors
    /// As [`Disk::seek`].
    pub fn seek_without_base(&self, from: u64, what: Seek) -> Result<Option<Option<u64>>> {
        self.seek_by(from, what, Instant::now() + SEEK_TIME, Patience::Brief)
    }

    /// As [`Disk::seek`], with a limit: ends at `deadline`.
    pub fn seek_until(&self, from: u64, what: Seek, deadline: Instant) -> Result<Option<u64>> {
        self.seek_by(from, what, deadline, Patience::Long).map(Option::flatten)
    }

    fn seek_by(
        &self,
        from: u64,
        what: Seek,
        deadline: Instant,
        patience: Patience,
    ) -> Result<Option<Option<u64>>> {
        let size = self.size();
        self.check_range(&(from..from))?;
        let mut at = from;
        for _ in 0..SEEK_RUNS {
            if at >= size {
                return Ok(Some((what == Seek::Hole).then_some(size)));
            }
            let (mapping, len) = self.reader().look(GuestOffset(at), size - at);
            let (holds, len) = match (mapping, self.chain_below(at)) {
                (Ok(Mapping::Data { .. } | Mapping::Compressed { .. }) | Err(_), _) => {
                    (Seek::Data, len)
                }
                (Ok(Mapping::Unallocated), Some(_)) if patience == Patience::Brief => {
                    return Ok(None);
                }
                (Ok(Mapping::Unallocated), Some(chain)) => {
                    match chain.content(usize::MAX, at, len)? {
                        (Content::Data, len) => (Seek::Data, len),
                        (Content::Zero | Content::Unallocated, len) => (Seek::Hole, len),
                    }
                }
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
        // The limit of one request is reached. Both answers are correct, although not the best
        // ones: data may begin here, and the end of the disk is a hole.
        Ok(Some(match what {
            Seek::Data => (at < size).then_some(at),
            Seek::Hole => Some(size),
        }))
    }
}
