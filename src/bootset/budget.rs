//! What a search may still do. One budget is shared by the walks of all file systems.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use crate::BootSetLimits;
use crate::failure::{Failure, Step};

/// Steps of one search: entries of directories, extents, blocks of a map, lines. A walk that finds
/// its bytes in memory again and again reads nothing from the source, and ends at this number. A
/// boot of a large distribution takes less than a million.
const MOST_STEPS: u64 = 20_000_000;
/// Bytes that are copied from what is in memory, for each byte that may be read from the source.
/// Many files can be made of the same blocks.
const COPIES: u64 = 8;
/// The clock is asked once in so many steps.
const STEPS_PER_CLOCK: u64 = 256;

/// Counts what a search does against its limits.
#[derive(Debug)]
pub(crate) struct Budget {
    pub(crate) limits: BootSetLimits,
    bytes_read: AtomicU64,
    files: AtomicU64,
    steps: AtomicU64,
    copied: AtomicU64,
}

impl Budget {
    pub(crate) fn new(limits: BootSetLimits) -> Budget {
        Budget {
            limits,
            bytes_read: AtomicU64::new(0),
            files: AtomicU64::new(0),
            steps: AtomicU64::new(0),
            copied: AtomicU64::new(0),
        }
    }

    /// Counts one step.
    pub(crate) fn step(&self) -> Step<()> {
        let steps = self.steps.fetch_add(1, Ordering::Relaxed);
        if steps >= MOST_STEPS {
            return Err(Failure::Limit("the number of steps"));
        }
        if steps.is_multiple_of(STEPS_PER_CLOCK) { self.clock() } else { Ok(()) }
    }

    /// Counts bytes before they are read from the source.
    pub(crate) fn read(&self, bytes: u64) -> Step<()> {
        self.clock()?;
        count(&self.bytes_read, bytes, self.limits.most_bytes_read, "bytes read from the disk")
    }

    /// Counts bytes that are given to a caller.
    pub(crate) fn copy(&self, bytes: u64) -> Step<()> {
        let most = self.limits.most_bytes_read.saturating_mul(COPIES);
        count(&self.copied, bytes, most, "bytes looked at")
    }

    /// Counts a file or directory that is looked at.
    pub(crate) fn file(&self) -> Step<()> {
        count(&self.files, 1, self.limits.most_files, "the number of files")
    }

    /// Returns how many bytes were read.
    pub(crate) fn bytes_read(&self) -> u64 {
        self.bytes_read.load(Ordering::Relaxed)
    }

    fn clock(&self) -> Step<()> {
        match self.limits.until {
            Some(until) if Instant::now() >= until => Err(Failure::Limit("the time")),
            _ => Ok(()),
        }
    }
}

fn count(counter: &AtomicU64, more: u64, most: u64, what: &'static str) -> Step<()> {
    let before = counter.load(Ordering::Relaxed);
    match before.checked_add(more) {
        Some(after) if after <= most => {
            counter.store(after, Ordering::Relaxed);
            Ok(())
        }
        _ => Err(Failure::Limit(what)),
    }
}
