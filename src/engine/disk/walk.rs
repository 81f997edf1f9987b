//! Where the walk of a stream is. A read ahead of it, whose bytes the host has in memory, leaves
//! the copy to the stream.
//!
//! Such a read costs the same whether the overlay or the base answers it. Its copy would be a
//! write to the overlay's file. The threads that serve the guest, the stream's and the host's
//! write-back would wait for each other's writes, because each takes the lock of the inode (on
//! ext4 in `ext4_buffered_write_iter` and `ext4_map_blocks`). Beside a stream, one read in a
//! thousand took more than 700 µs with the copies of reads, and more than 130 µs without them.
//!
//! What is not in memory, or must be decompressed, is copied up as without a stream: to read it
//! twice would cost more.
//!
//! **Touches:** the clock. **Never:** the image. **Locks:** none.
//! **Invariants:** only the walk of a stream that copies up everything, without a limit of its
//! speed, from local files, is known here, and each position for [`TRUST`] only. Where a stream is
//! paused, waits for its base or has ended, reads copy up soon after.

use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// How long a position counts. A stream that makes progress tells a new one for each chunk, and
/// its longest rest is a tenth of this.
const TRUST: Duration = Duration::from_secs(1);

/// No walk is known.
const NOWHERE: u64 = u64::MAX;

/// The position of the walk of a stream.
#[derive(Debug)]
pub(super) struct Walk {
    opened: Instant,
    /// Guest offset in bytes: everything from here on is copied up soon.
    offset: AtomicU64,
    /// When `offset` was told, in milliseconds after `opened`. A reader that sees a new offset
    /// with an old time, or the other way round, copies up for nothing, or leaves a copy to a walk
    /// that has told its position within [`TRUST`].
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
        self.told.store(self.millis(now), Ordering::Relaxed);
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

/// Tells where the walk of a stream is, until it is dropped. At most one exists for each disk.
#[derive(Debug)]
pub struct Walking<'a>(pub(super) &'a Walk);

impl Walking<'_> {
    /// The stream copies up everything from guest offset `offset` on, in bytes, as fast as it can;
    /// with `None`, reads copy up for themselves.
    pub fn is_at(&self, offset: Option<u64>) {
        self.0.is_at(offset.unwrap_or(NOWHERE), Instant::now());
    }
}

impl Drop for Walking<'_> {
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
        drop(Walking(&walk));
        assert!(!walk.comes_to(&(4096..8192)));
    }
}
