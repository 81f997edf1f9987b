//! What the guest has asked for since the disk was opened, and what was read from below: numbers that only grow.
//!
//! A request is counted once, by the method of [`super::Disk`] that answers it: one that is a miss at first is counted, and timed, where it is done in
//! the end. Counters are relaxed atomics, one cache line for each kind of request, so that readers and writers do not take each other's line away.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use super::Local;
use crate::Result;

/// Requests of one kind.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct RequestCount {
    /// Bytes of those that succeeded.
    pub bytes: u64,
    /// How many succeeded.
    pub operations: u64,
    /// How many failed.
    pub failed: u64,
    /// How long those that succeeded took, together.
    pub time: Duration,
}

/// All counters at one moment.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct DiskStats {
    /// Reads of the guest.
    pub reads: RequestCount,
    /// Writes of the guest; a request to write zeroes is one.
    pub writes: RequestCount,
    /// Flushes of the guest; they have no bytes.
    pub flushes: RequestCount,
    /// Discards of the guest.
    pub discards: RequestCount,
    /// Reads from the backing chain, for the guest or for a stream.
    pub backing_reads: RequestCount,
    /// The end of the guest's write that reached furthest.
    pub highest_written: u64,
    /// For how long the guest has asked for nothing; `None` if it never has.
    pub idle: Option<Duration>,
}

/// The counters.
#[derive(Debug)]
pub(super) struct Stats {
    opened: Instant,
    reads: Counter,
    writes: Counter,
    flushes: Counter,
    discards: Counter,
    backing_reads: Counter,
    highest_written: AtomicU64,
}

/// One kind of request, on lines of its own (two: the processor fetches them in pairs).
#[derive(Debug, Default)]
#[repr(align(128))]
struct Counter {
    bytes: AtomicU64,
    operations: AtomicU64,
    failed: AtomicU64,
    nanoseconds: AtomicU64,
    /// When the last one ended, in nanoseconds since the disk was opened.
    last: AtomicU64,
}

impl Stats {
    pub fn new() -> Self {
        Stats {
            opened: Instant::now(),
            reads: Counter::default(),
            writes: Counter::default(),
            flushes: Counter::default(),
            discards: Counter::default(),
            backing_reads: Counter::default(),
            highest_written: AtomicU64::new(0),
        }
    }

    /// Counts a read of `len` bytes by the guest.
    pub fn read<T: Served>(&self, len: usize, work: impl FnOnce() -> Result<T>) -> Result<T> {
        self.count(&self.reads, len as u64, work)
    }

    /// Counts a write of `len` bytes at `offset`, or of zeroes.
    pub fn write<T: Served>(&self, offset: u64, len: u64, work: impl FnOnce() -> Result<T>) -> Result<T> {
        let written = self.count(&self.writes, len, work)?;
        if written.is_served() && self.highest_written.load(Ordering::Relaxed) < offset + len {
            self.highest_written.fetch_max(offset + len, Ordering::Relaxed);
        }
        Ok(written)
    }

    /// Counts a flush.
    pub fn flush(&self, work: impl FnOnce() -> Result<()>) -> Result<()> {
        self.count(&self.flushes, 0, work)
    }

    /// Counts a discard of `len` bytes.
    pub fn discard(&self, len: u64, work: impl FnOnce() -> Result<()>) -> Result<()> {
        self.count(&self.discards, len, work)
    }

    /// Counts a read of `len` bytes from below.
    pub fn read_below(&self, len: usize, work: impl FnOnce() -> Result<()>) -> Result<()> {
        self.count(&self.backing_reads, len as u64, work)
    }

    fn count<T: Served>(&self, counter: &Counter, len: u64, work: impl FnOnce() -> Result<T>) -> Result<T> {
        let start = Instant::now();
        let result = work();
        match &result {
            Ok(served) if !served.is_served() => return result,
            Ok(_) => {
                let end = Instant::now();
                counter.bytes.fetch_add(len, Ordering::Relaxed);
                counter.operations.fetch_add(1, Ordering::Relaxed);
                counter.nanoseconds.fetch_add(nanoseconds(end - start), Ordering::Relaxed);
                counter.last.store(nanoseconds(end - self.opened), Ordering::Relaxed);
            }
            Err(_) => {
                counter.failed.fetch_add(1, Ordering::Relaxed);
                counter.last.store(nanoseconds(self.opened.elapsed()), Ordering::Relaxed);
            }
        }
        result
    }

    /// All of them. Requests that end meanwhile may be counted in part.
    pub fn snapshot(&self) -> DiskStats {
        let guest = [&self.reads, &self.writes, &self.flushes, &self.discards];
        let last = guest.map(|counter| counter.last.load(Ordering::Relaxed)).into_iter().max().filter(|&last| last > 0);
        DiskStats {
            reads: self.reads.snapshot(),
            writes: self.writes.snapshot(),
            flushes: self.flushes.snapshot(),
            discards: self.discards.snapshot(),
            backing_reads: self.backing_reads.snapshot(),
            highest_written: self.highest_written.load(Ordering::Relaxed),
            idle: last.map(|last| self.opened.elapsed().saturating_sub(Duration::from_nanos(last))),
        }
    }
}

impl Counter {
    fn snapshot(&self) -> RequestCount {
        RequestCount {
            bytes: self.bytes.load(Ordering::Relaxed),
            operations: self.operations.load(Ordering::Relaxed),
            failed: self.failed.load(Ordering::Relaxed),
            time: Duration::from_nanos(self.nanoseconds.load(Ordering::Relaxed)),
        }
    }
}

/// Whether a request that did not fail was served, or is left to the blocking sibling, which counts it.
pub(super) trait Served {
    fn is_served(&self) -> bool;
}

impl Served for () {
    fn is_served(&self) -> bool {
        true
    }
}

impl<T> Served for Option<T> {
    fn is_served(&self) -> bool {
        true
    }
}

impl Served for Local {
    fn is_served(&self) -> bool {
        *self == Local::Done
    }
}

/// 584 years fit.
fn nanoseconds(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}
