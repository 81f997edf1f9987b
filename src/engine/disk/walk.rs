//! Where the walk of a stream is. A small read ahead of it, whose bytes the host has in
//! memory, leaves the copy to the stream.
//!
//! Such a read costs the same whether the overlay or the base answers it. Its copy would
//! be a write to the overlay's file. The threads that serve the guest, the stream's and
//! the host's write-back would wait for each other's writes, because each takes the lock
//! of the inode (on ext4 in `ext4_buffered_write_iter` and `ext4_map_blocks`):
//! docs/performance.md has what a guest feels of that. Reads that go to workers copy up
//! as without a stream, among them those of bytes that are not in memory or must be
//! decompressed: to read these twice would cost more.
//!
//! **Touches:** the clock. **Never:** the image. **Locks:** none.
//! **Invariants:** only the walk of a stream is known here that copies everything up,
//! without a speed, from local files, and does not share blocks; and each position for
//! [`TRUST`] only. Where a stream is paused, waits for its base or has ended, reads copy
//! up soon after.

use std::ops::Range;
use std::time::{Duration, Instant};

use host::sync::atomic::{AtomicU64, Ordering};

/// How long a position counts. A stream tells its position for each chunk and for each
/// piece that it copies in between, and its longest rest is a tenth of this.
const TRUST: Duration = Duration::from_secs(1);

/// No walk is known.
const NOWHERE: u64 = u64::MAX;

/// The position of the walk of a stream.
#[derive(Debug)]
pub(super) struct Walk {
    opened: Instant,
    /// Guest offset in bytes: everything from here on is copied up soon.
    offset: AtomicU64,
    /// When `offset` was told, in milliseconds after `opened`. A reader may load the time
    /// of one position and the offset of the one before it: the walk was there a moment
    /// ago.
    told: AtomicU64,
}

impl Walk {
    pub fn new() -> Walk {
        Walk { opened: Instant::now(), offset: AtomicU64::new(NOWHERE), told: AtomicU64::new(0) }
    }

    /// Whether the stream will copy up all of the range soon.
    pub fn comes_to(&self, range: &Range<u64>) -> bool {
        self.comes_to_at(range, Instant::now)
    }

    /// The clock is not read while no stream runs.
    fn comes_to_at(&self, range: &Range<u64>, now: impl FnOnce() -> Instant) -> bool {
        self.offset.load(Ordering::Relaxed) <= range.start
            && self.millis(now()).saturating_sub(self.told.load(Ordering::Relaxed))
                < TRUST.as_millis() as u64
    }

    /// The walk is at guest offset `offset`, in bytes; [`NOWHERE`] if there is none.
    pub fn is_at(&self, offset: u64, now: Instant) {
        if offset != NOWHERE {
            self.told.store(self.millis(now), Ordering::Relaxed);
        }
        self.offset.store(offset, Ordering::Relaxed);
    }

    /// The position that was told last, whenever that was.
    #[cfg(test)]
    pub fn position(&self) -> Option<u64> {
        Some(self.offset.load(Ordering::Relaxed)).filter(|&offset| offset != NOWHERE)
    }

    fn millis(&self, now: Instant) -> u64 {
        u64::try_from(now.saturating_duration_since(self.opened).as_millis()).unwrap_or(u64::MAX)
    }
}

/// Tells where the walk of a stream is, until it is dropped. A disk has at most one
/// stream.
#[derive(Debug)]
pub struct WalkReport<'a>(pub(super) &'a Walk);

impl WalkReport<'_> {
    /// The stream copies up everything from guest offset `offset` on, in bytes, as fast
    /// as it can; with `None`, reads copy up for themselves.
    pub fn is_at(&self, offset: Option<u64>) {
        self.0.is_at(offset.unwrap_or(NOWHERE), Instant::now());
    }
}

impl Drop for WalkReport<'_> {
    fn drop(&mut self) {
        self.is_at(None);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_position_counts_for_a_while() {
        let walk = Walk::new();
        let now = walk.opened + Duration::from_secs(100);
        assert!(!walk.comes_to_at(&(0..1), || unreachable!("no stream runs")));
        walk.is_at(4096, now);
        for (range, later, comes) in [
            (4096..8192, Duration::ZERO, true),
            (8192..8193, TRUST / 2, true),
            (4095..4097, Duration::ZERO, false),
            (4096..8192, TRUST, false),
        ] {
            let found = walk.comes_to_at(&range, || now + later);
            assert_eq!(found, comes, "{range:?} {later:?}");
        }
        // The clock of the reader was read before that of the stream.
        assert!(walk.comes_to_at(&(4096..8192), || now - Duration::from_millis(5)));
        drop(WalkReport(&walk));
        assert!(!walk.comes_to(&(4096..8192)));
    }
}
