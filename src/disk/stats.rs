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

/// What requests of one kind have cost since the disk was opened.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct Cost {
    /// How many succeeded.
    pub operations: u64,
    /// How long they took, together.
    pub time: Duration,
}

/// What the guest is at, for whoever gives way to it: cheap to ask for, often.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct Activity {
    /// Reads and writes that were answered at once, reads and writes that had to wait (for a backing file, for an allocation, for a range), flushes.
    /// Each is like its like only.
    pub costs: [Cost; Activity::KINDS],
    /// Some request that may take long has begun, and has not ended.
    pub is_waiting: bool,
    /// One of them is a flush.
    pub is_flushing: bool,
    /// As [`DiskStats::idle`].
    pub idle: Option<Duration>,
}

impl Activity {
    /// How many kinds of requests are told apart.
    pub const KINDS: usize = 5;
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
    /// Those of the reads, and of the writes, that were not answered at once.
    waited_reads: Counter,
    waited_writes: Counter,
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
    /// How many go on at present; of what is answered at once nobody counts that.
    running: AtomicU64,
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
            waited_reads: Counter::default(),
            waited_writes: Counter::default(),
            highest_written: AtomicU64::new(0),
        }
    }

    /// Counts a read of `len` bytes by the guest.
    pub fn read<T: Served>(&self, len: usize, work: impl FnOnce() -> Result<T>) -> Result<T> {
        self.count([&self.reads], len as u64, work)
    }

    /// Counts a write of `len` bytes at `offset`, or of zeroes.
    pub fn write<T: Served>(&self, offset: u64, len: u64, work: impl FnOnce() -> Result<T>) -> Result<T> {
        let written = self.count([&self.writes], len, work)?;
        if written.is_served() {
            self.has_written(offset + len);
        }
        Ok(written)
    }

    /// As [`Stats::read`], for one that may take long.
    pub fn waiting_read<T: Served>(&self, len: usize, work: impl FnOnce() -> Result<T>) -> Result<T> {
        let _running = Running::new(&self.waited_reads);
        self.count([&self.reads, &self.waited_reads], len as u64, work)
    }

    /// As [`Stats::write`], for one that may take long.
    pub fn waiting_write(&self, offset: u64, len: u64, work: impl FnOnce() -> Result<()>) -> Result<()> {
        let _running = Running::new(&self.waited_writes);
        self.count([&self.writes, &self.waited_writes], len, work)?;
        self.has_written(offset + len);
        Ok(())
    }

    fn has_written(&self, end: u64) {
        if self.highest_written.load(Ordering::Relaxed) < end {
            self.highest_written.fetch_max(end, Ordering::Relaxed);
        }
    }

    /// Counts a flush.
    pub fn flush(&self, work: impl FnOnce() -> Result<()>) -> Result<()> {
        let _running = Running::new(&self.flushes);
        self.count([&self.flushes], 0, work)
    }

    /// Counts a discard of `len` bytes.
    pub fn discard(&self, len: u64, work: impl FnOnce() -> Result<()>) -> Result<()> {
        self.count([&self.discards], len, work)
    }

    /// Counts a read of `len` bytes from below.
    pub fn read_below<T: Served>(&self, len: usize, work: impl FnOnce() -> Result<T>) -> Result<T> {
        self.count([&self.backing_reads], len as u64, work)
    }

    fn count<T: Served, const N: usize>(&self, counters: [&Counter; N], len: u64, work: impl FnOnce() -> Result<T>) -> Result<T> {
        let start = Instant::now();
        let result = work();
        if result.as_ref().is_ok_and(|served| !served.is_served()) {
            return result;
        }
        let end = Instant::now();
        for counter in counters {
            if result.is_ok() {
                counter.bytes.fetch_add(len, Ordering::Relaxed);
                counter.operations.fetch_add(1, Ordering::Relaxed);
                counter.nanoseconds.fetch_add(nanoseconds(end - start), Ordering::Relaxed);
            } else {
                counter.failed.fetch_add(1, Ordering::Relaxed);
            }
            counter.last.store(nanoseconds(end - self.opened), Ordering::Relaxed);
        }
        result
    }

    /// All of them. Requests that end meanwhile may be counted in part.
    pub fn snapshot(&self) -> DiskStats {
        DiskStats {
            reads: self.reads.snapshot(),
            writes: self.writes.snapshot(),
            flushes: self.flushes.snapshot(),
            discards: self.discards.snapshot(),
            backing_reads: self.backing_reads.snapshot(),
            highest_written: self.highest_written.load(Ordering::Relaxed),
            idle: self.idle(),
        }
    }

    /// What the guest is at. Requests that end meanwhile may be counted in part.
    pub fn activity(&self) -> Activity {
        let (waited_reads, waited_writes) = (self.waited_reads.cost(), self.waited_writes.cost());
        let at_once = |all: Cost, waited: Cost| Cost {
            operations: all.operations.saturating_sub(waited.operations),
            time: all.time.saturating_sub(waited.time),
        };
        let is_running = |counter: &Counter| counter.running.load(Ordering::Relaxed) > 0;
        Activity {
            costs: [
                at_once(self.reads.cost(), waited_reads),
                at_once(self.writes.cost(), waited_writes),
                waited_reads,
                waited_writes,
                self.flushes.cost(),
            ],
            is_waiting: [&self.waited_reads, &self.waited_writes, &self.flushes].into_iter().any(is_running),
            is_flushing: is_running(&self.flushes),
            idle: self.idle(),
        }
    }

    fn idle(&self) -> Option<Duration> {
        let guest = [&self.reads, &self.writes, &self.flushes, &self.discards];
        let last = guest.map(|counter| counter.last.load(Ordering::Relaxed)).into_iter().max().filter(|&last| last > 0);
        last.map(|last| self.opened.elapsed().saturating_sub(Duration::from_nanos(last)))
    }
}

/// One more that goes on, until dropped.
struct Running<'a>(&'a Counter);

impl<'a> Running<'a> {
    fn new(counter: &'a Counter) -> Self {
        counter.running.fetch_add(1, Ordering::Relaxed);
        Running(counter)
    }
}

impl Drop for Running<'_> {
    fn drop(&mut self) {
        self.0.running.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Counter {
    fn cost(&self) -> Cost {
        Cost { operations: self.operations.load(Ordering::Relaxed), time: Duration::from_nanos(self.nanoseconds.load(Ordering::Relaxed)) }
    }

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
