//! What the guest has asked for since the disk was opened, and what was read from below: numbers that only grow.
//!
//! A request is counted once, by the method of [`super::Disk`] that answers it: one that is a miss at first is counted, and timed, where it is done in
//! the end. Counters are relaxed atomics, on cache lines of each kind of request, so that readers and writers do not take each other's line away.
//!
//! A request is counted in the bucket of its latency, and nowhere else: how many there were is the sum of the buckets, so that a histogram costs no
//! more than the number. Likewise hits are not counted but what is left of the reads when the misses are taken away.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use super::Local;
use crate::Result;

/// Upper bounds of the buckets of latency, inclusive, in nanoseconds: powers of two times a microsecond, up to 8.4 s.
pub const LATENCY_BOUNDS: [u64; 24] = {
    let mut bounds = [0; 24];
    let mut index = 0;
    while index < bounds.len() {
        bounds[index] = 1000 << index;
        index += 1;
    }
    bounds
};

/// One bucket for each bound, and one for what takes longer.
pub const LATENCY_BUCKETS: usize = LATENCY_BOUNDS.len() + 1;

/// How many requests ended within each of [`LATENCY_BOUNDS`] and not within the one before; the last are those beyond all of them.
pub type Latency = [u64; LATENCY_BUCKETS];

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
    /// Those that succeeded by how long they took; they add up to `operations`.
    pub latency: Latency,
}

/// What reads of the guest have copied up.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct CopyCount {
    /// Bytes that were written to the overlay; what was found to be zero takes none.
    pub bytes: u64,
    /// How many runs of clusters were stored.
    pub operations: u64,
    /// How many could not be stored. The guest was answered all the same (P5).
    pub failed: u64,
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
    /// Of the reads of the guest, those that found something missing in the overlay, which the backing chain had to have. All others were answered
    /// from the overlay alone.
    pub misses: u64,
    /// What reads of the guest have copied up.
    pub copied_up: CopyCount,
    /// Bytes that streams have copied up.
    pub streamed: u64,
    /// Write-back passes that wrote something.
    pub commits: u64,
    /// The end of the guest's write that reached furthest.
    pub highest_written: u64,
    /// For how long the guest has asked for nothing; `None` if it never has.
    pub idle: Option<Duration>,
}

impl DiskStats {
    /// How many reads of the guest were answered from the overlay alone.
    pub fn hits(&self) -> u64 {
        self.reads.operations.saturating_sub(self.misses)
    }
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
    /// Touched by misses only.
    misses: AtomicU64,
    copied_up: Copies,
    streamed: AtomicU64,
    highest_written: AtomicU64,
}

/// As [`CopyCount`].
#[derive(Debug, Default)]
struct Copies {
    bytes: AtomicU64,
    operations: AtomicU64,
    failed: AtomicU64,
}

/// One kind of request, on lines of its own (pairs of them: the processor fetches them so).
#[derive(Debug, Default)]
#[repr(align(128))]
struct Counter {
    bytes: AtomicU64,
    failed: AtomicU64,
    nanoseconds: AtomicU64,
    /// How many go on at present; of what is answered at once nobody counts that.
    running: AtomicU64,
    /// When the last one ended, in nanoseconds since the disk was opened.
    last: AtomicU64,
    /// How many succeeded, by how long they took: as [`Latency`].
    latency: [AtomicU64; LATENCY_BUCKETS],
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
            misses: AtomicU64::new(0),
            copied_up: Copies::default(),
            streamed: AtomicU64::new(0),
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
    pub fn waiting_write<T: Served>(&self, offset: u64, len: u64, work: impl FnOnce() -> Result<T>) -> Result<T> {
        let _running = Running::new(&self.waited_writes);
        let written = self.count([&self.writes, &self.waited_writes], len, work)?;
        if written.is_served() {
            self.has_written(offset + len);
        }
        Ok(written)
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
    pub fn discard<T: Served>(&self, len: u64, work: impl FnOnce() -> Result<T>) -> Result<T> {
        self.count([&self.discards], len, work)
    }

    /// Counts a read of `len` bytes from below.
    pub fn read_below<T: Served>(&self, len: usize, work: impl FnOnce() -> Result<T>) -> Result<T> {
        self.count([&self.backing_reads], len as u64, work)
    }

    /// A read of the guest that was counted just now has found something missing. In this order, so that there are never more misses than reads.
    pub fn missed(&self) {
        self.misses.fetch_add(1, Ordering::Release);
    }

    /// A copy for a reader was stored, of which so many bytes were written; or it was not.
    pub fn copied_up<E>(&self, written: std::result::Result<u64, &E>) {
        let copies = &self.copied_up;
        match written {
            Ok(bytes) => {
                copies.bytes.fetch_add(bytes, Ordering::Relaxed);
                copies.operations.fetch_add(1, Ordering::Relaxed);
            }
            Err(_) => drop(copies.failed.fetch_add(1, Ordering::Relaxed)),
        }
    }

    /// A stream has copied so many bytes.
    pub fn streamed(&self, bytes: u64) {
        self.streamed.fetch_add(bytes, Ordering::Relaxed);
    }

    fn count<T: Served, const N: usize>(&self, counters: [&Counter; N], len: u64, work: impl FnOnce() -> Result<T>) -> Result<T> {
        let start = Instant::now();
        let result = work();
        if result.as_ref().is_ok_and(|served| !served.is_served()) {
            return result;
        }
        let end = Instant::now();
        let took = nanoseconds(end - start);
        for counter in counters {
            if result.is_ok() {
                counter.bytes.fetch_add(len, Ordering::Relaxed);
                counter.latency[bucket(took)].fetch_add(1, Ordering::Relaxed);
                counter.nanoseconds.fetch_add(took, Ordering::Relaxed);
            } else {
                counter.failed.fetch_add(1, Ordering::Relaxed);
            }
            counter.last.store(nanoseconds(end - self.opened), Ordering::Relaxed);
        }
        result
    }

    /// All of them, but the commits, which the image counts. Requests that end meanwhile may be counted in part.
    pub fn snapshot(&self) -> DiskStats {
        // Before the reads: see `missed`.
        let misses = self.misses.load(Ordering::Acquire);
        let Copies { bytes, operations, failed } = &self.copied_up;
        let [bytes, operations, failed] = [bytes, operations, failed].map(|count| count.load(Ordering::Relaxed));
        DiskStats {
            reads: self.reads.snapshot(),
            writes: self.writes.snapshot(),
            flushes: self.flushes.snapshot(),
            discards: self.discards.snapshot(),
            backing_reads: self.backing_reads.snapshot(),
            misses,
            copied_up: CopyCount { bytes, operations, failed },
            streamed: self.streamed.load(Ordering::Relaxed),
            commits: 0,
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
        // Asked for once for each chunk of a stream at most: the sum costs less than the system calls of one.
        Cost { operations: self.latency().iter().sum(), time: Duration::from_nanos(self.nanoseconds.load(Ordering::Relaxed)) }
    }

    fn latency(&self) -> Latency {
        std::array::from_fn(|bucket| self.latency[bucket].load(Ordering::Relaxed))
    }

    fn snapshot(&self) -> RequestCount {
        let latency = self.latency();
        RequestCount {
            bytes: self.bytes.load(Ordering::Relaxed),
            operations: latency.iter().sum(),
            failed: self.failed.load(Ordering::Relaxed),
            time: Duration::from_nanos(self.nanoseconds.load(Ordering::Relaxed)),
            latency,
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

/// The bucket of [`Latency`] that a request belongs to that took so long.
fn bucket(nanoseconds: u64) -> usize {
    // The power of two, in microseconds, that is not smaller.
    let bits = u64::BITS - nanoseconds.div_ceil(1000).saturating_sub(1).leading_zeros();
    (bits as usize).min(LATENCY_BOUNDS.len())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Protects: a latency on a bound is in that bound's bucket, one nanosecond more in the next, and nothing is outside.
    #[test]
    fn bounds_are_inclusive() {
        assert_eq!((LATENCY_BOUNDS[0], LATENCY_BOUNDS[23]), (1_000, 8_388_608_000));
        assert_eq!((bucket(0), bucket(1)), (0, 0));
        for (index, &bound) in LATENCY_BOUNDS.iter().enumerate() {
            assert_eq!((bucket(bound - 1), bucket(bound), bucket(bound + 1)), (index, index, index + 1), "{bound}");
        }
        assert_eq!(bucket(u64::MAX), LATENCY_BUCKETS - 1);
    }

    /// Protects: requests are counted once, by their latency, and those that fail, or were not served, in no bucket.
    #[test]
    fn operations_are_the_sum_of_the_buckets() {
        let stats = Stats::new();
        stats.read(10, || Ok(Local::Done)).unwrap();
        stats
            .waiting_read(20, || {
                std::thread::sleep(Duration::from_millis(3));
                Ok(())
            })
            .unwrap();
        stats.read(40, || Ok(Local::Miss)).unwrap();
        stats.read::<Local>(80, || Err(crate::Error::new(crate::ErrorKind::Io, "no"))).unwrap_err();
        stats.missed();
        let found = stats.snapshot();
        let reads = found.reads;
        assert_eq!((reads.bytes, reads.operations, reads.failed, found.misses, found.hits()), (30, 2, 1, 1, 1));
        assert_eq!(reads.latency.iter().sum::<u64>(), 2);
        assert_eq!(reads.latency[bucket(3_000_000)..].iter().sum::<u64>(), 1, "the one that slept: {:?}", reads.latency);
        assert_eq!(stats.activity().costs[2].operations, 1, "the one that waited");
    }
}
