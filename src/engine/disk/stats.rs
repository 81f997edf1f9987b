//! Counters of guest requests and of reads from below since the disk was opened. They only grow.
//!
//! The method of [`super::Disk`] that completes a request counts it, once. A request that first
//! misses is counted and timed by the method that completes it in the end. Counters are relaxed
//! atomics. Each kind of request has its own cache lines, so that reads and writes do not contend
//! for a line.
//!
//! A request increments only the bucket of its latency. The number of requests is the sum of the
//! buckets, so a histogram costs no more than a plain count. Likewise hits are not counted: they
//! are the reads minus the misses.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use super::{Brought, Local};
use host::Result;

/// Inclusive upper bounds of the latency buckets in nanoseconds: powers of two times one
/// microsecond, up to 8.4 s.
pub const LATENCY_BOUNDS: [u64; 24] = {
    let mut bounds = [0; 24];
    let mut index = 0;
    while index < bounds.len() {
        bounds[index] = 1000 << index;
        index += 1;
    }
    bounds
};

/// Number of buckets: one for each bound, and one for longer requests.
pub const LATENCY_BUCKETS: usize = LATENCY_BOUNDS.len() + 1;

/// Number of requests per bucket. Bucket `i` counts the requests that took at most
/// `LATENCY_BOUNDS[i]` and longer than the bound before; the last bucket counts those longer than
/// all bounds.
pub type Latency = [u64; LATENCY_BUCKETS];

/// Counters of one kind of request.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct RequestCount {
    /// Bytes of the requests that succeeded.
    pub bytes: u64,
    /// Number of requests that succeeded.
    pub operations: u64,
    /// Number of requests that failed.
    pub failed: u64,
    /// Total duration of the requests that succeeded.
    pub time: Duration,
    /// The requests that succeeded, by latency; the sum is `operations`.
    pub latency: Latency,
}

/// Counters of copy-on-read: clusters that guest reads have copied up.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct CopyCount {
    /// Bytes written to the overlay. Zero clusters count as none.
    pub bytes: u64,
    /// Number of runs of clusters that were stored.
    pub operations: u64,
    /// Number of runs that could not be stored. Their reads succeeded nevertheless (P5).
    pub failed: u64,
}

/// All counters of a disk at one moment.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct DiskStats {
    /// Reads by the guest.
    pub reads: RequestCount,
    /// Writes by the guest, including requests to write zeroes.
    pub writes: RequestCount,
    /// Flushes by the guest. They have no bytes.
    pub flushes: RequestCount,
    /// Discards by the guest.
    pub discards: RequestCount,
    /// Reads from the backing chain, for the guest or for a stream.
    pub backing_reads: RequestCount,
    /// Number of guest reads that needed bytes of the backing chain. All other guest reads were
    /// answered from the overlay alone.
    pub misses: u64,
    /// Clusters that guest reads have copied up.
    pub copied_up: CopyCount,
    /// Bytes that streams have copied up.
    pub streamed: u64,
    /// What became of the blocks that streams have brought.
    pub brought: Brought,
    /// Guest reads that a thread has served which may wait for a base, a copy or a lock.
    pub waited: Cost,
    /// Number of write-back passes that wrote something.
    pub commits: u64,
    /// The highest end of any guest write, in bytes.
    pub highest_written: u64,
    /// Time since the last guest request ended; `None` if there was none.
    pub idle: Option<Duration>,
}

impl DiskStats {
    /// Number of guest reads that were answered from the overlay alone.
    pub fn hits(&self) -> u64 {
        self.reads.operations.saturating_sub(self.misses)
    }
}

/// Number and duration of requests of one kind since the disk was opened.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct Cost {
    /// Number of requests that succeeded.
    pub operations: u64,
    /// Total duration of these requests.
    pub time: Duration,
}

/// Current load of the guest. Cheap enough to be queried for every chunk of a stream.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct Activity {
    /// Six kinds of requests: reads, writes and flushes that were answered at once; reads and
    /// writes that had to wait (for a backing file, an allocation, or a range), and flushes that
    /// had something to flush. They are kept apart because costs of different kinds cannot be
    /// compared.
    pub costs: [Cost; Activity::KINDS],
    /// Whether a request that may take long (a waiting read or write, or a flush) is in flight.
    pub is_waiting: bool,
    /// Whether a flush is in flight.
    pub is_flushing: bool,
    /// As [`DiskStats::idle`].
    pub idle: Option<Duration>,
}

impl Activity {
    /// Number of kinds of requests in `costs`.
    pub const KINDS: usize = 6;
}

/// The counters of a disk.
#[derive(Debug)]
pub(super) struct Stats {
    opened: Instant,
    reads: Counter,
    writes: Counter,
    flushes: Counter,
    discards: Counter,
    backing_reads: Counter,
    /// The reads that were not answered at once; `waited_writes` and `waited_flushes` likewise.
    /// They are also counted in `reads`, `writes` and `flushes`.
    waited_reads: Counter,
    waited_writes: Counter,
    waited_flushes: Counter,
    /// Incremented by misses only, so a hit does not touch it.
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

/// Counters of one kind of request, on cache lines of their own. The alignment is two lines,
/// because processors prefetch lines in pairs.
#[derive(Debug, Default)]
#[repr(align(128))]
struct Counter {
    bytes: AtomicU64,
    failed: AtomicU64,
    nanoseconds: AtomicU64,
    /// Number of requests in flight. Not maintained for requests that are answered at once.
    running: AtomicU64,
    /// When the last request ended, in nanoseconds since the disk was opened.
    last: AtomicU64,
    /// Number of requests that succeeded, by latency (see [`Latency`]).
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
            waited_flushes: Counter::default(),
            misses: AtomicU64::new(0),
            copied_up: Copies::default(),
            streamed: AtomicU64::new(0),
            highest_written: AtomicU64::new(0),
        }
    }

    /// Runs `work` and counts it as a guest read of `len` bytes.
    pub fn read<T: Served>(&self, len: usize, work: impl FnOnce() -> Result<T>) -> Result<T> {
        self.count([&self.reads], len as u64, work)
    }

    /// Runs `work` and counts it as a guest write, or a request to write zeroes, of `len` bytes at
    /// `offset`.
    pub fn write<T: Served>(
        &self,
        offset: u64,
        len: u64,
        work: impl FnOnce() -> Result<T>,
    ) -> Result<T> {
        let written = self.count([&self.writes], len, work)?;
        if written.is_served() {
            self.has_written(offset + len);
        }
        Ok(written)
    }

    /// As [`Stats::read`], for a read that may take long.
    pub fn waiting_read<T: Served>(
        &self,
        len: usize,
        work: impl FnOnce() -> Result<T>,
    ) -> Result<T> {
        let _running = InFlight::new(&self.waited_reads);
        self.count([&self.reads, &self.waited_reads], len as u64, work)
    }

    /// As [`Stats::write`], for a write that may take long.
    pub fn waiting_write<T: Served>(
        &self,
        offset: u64,
        len: u64,
        work: impl FnOnce() -> Result<T>,
    ) -> Result<T> {
        let _running = InFlight::new(&self.waited_writes);
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

    /// Runs `work` and counts it as a guest flush.
    pub fn flush(&self, work: impl FnOnce() -> Result<()>) -> Result<()> {
        let _running = InFlight::new(&self.waited_flushes);
        self.count([&self.flushes, &self.waited_flushes], 0, work)
    }

    /// Counts a guest flush that had nothing to flush.
    pub fn flush_of_nothing(&self) {
        let _ = self.count([&self.flushes], 0, || Ok(()));
    }

    /// Runs `work` and counts it as a guest discard of `len` bytes.
    pub fn discard<T: Served>(&self, len: u64, work: impl FnOnce() -> Result<T>) -> Result<T> {
        self.count([&self.discards], len, work)
    }

    /// Runs `work` and counts it as a read of `len` bytes from below.
    pub fn read_below<T: Served>(&self, len: usize, work: impl FnOnce() -> Result<T>) -> Result<T> {
        self.count([&self.backing_reads], len as u64, work)
    }

    /// Counts a miss of a guest read. Called after the read itself was counted, so that there are
    /// never more misses than reads.
    pub fn missed(&self) {
        self.misses.fetch_add(1, Ordering::Release);
    }

    /// Counts a copy of copy-on-read: the number of bytes written if it was stored, or the failure.
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

    /// Counts `bytes` that a stream has copied.
    pub fn streamed(&self, bytes: u64) {
        self.streamed.fetch_add(bytes, Ordering::Relaxed);
    }

    fn count<T: Served, const N: usize>(
        &self,
        counters: [&Counter; N],
        len: u64,
        work: impl FnOnce() -> Result<T>,
    ) -> Result<T> {
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

    /// All counters except `commits` and `brought`, which are counted elsewhere. Requests that end
    /// during the call may be counted in part.
    pub fn snapshot(&self) -> DiskStats {
        // Loaded before the reads, see `missed`.
        let misses = self.misses.load(Ordering::Acquire);
        let Copies { bytes, operations, failed } = &self.copied_up;
        let [bytes, operations, failed] =
            [bytes, operations, failed].map(|count| count.load(Ordering::Relaxed));
        DiskStats {
            reads: self.reads.snapshot(),
            writes: self.writes.snapshot(),
            flushes: self.flushes.snapshot(),
            discards: self.discards.snapshot(),
            backing_reads: self.backing_reads.snapshot(),
            misses,
            copied_up: CopyCount { bytes, operations, failed },
            streamed: self.streamed.load(Ordering::Relaxed),
            brought: Brought::default(),
            waited: self.waited_reads.cost(),
            commits: 0,
            highest_written: self.highest_written.load(Ordering::Relaxed),
            idle: self.idle(),
        }
    }

    /// The current load of the guest. Requests that end during the call may be counted in part.
    pub fn activity(&self) -> Activity {
        let waited_reads = self.waited_reads.cost();
        let waited_writes = self.waited_writes.cost();
        let waited_flushes = self.waited_flushes.cost();
        let at_once = |all: Cost, waited: Cost| Cost {
            operations: all.operations.saturating_sub(waited.operations),
            time: all.time.saturating_sub(waited.time),
        };
        let is_running = |counter: &Counter| counter.running.load(Ordering::Relaxed) > 0;
        Activity {
            costs: [
                at_once(self.reads.cost(), waited_reads),
                at_once(self.writes.cost(), waited_writes),
                at_once(self.flushes.cost(), waited_flushes),
                waited_reads,
                waited_writes,
                waited_flushes,
            ],
            is_waiting: [&self.waited_reads, &self.waited_writes, &self.waited_flushes]
                .into_iter()
                .any(is_running),
            is_flushing: is_running(&self.waited_flushes),
            idle: self.idle(),
        }
    }

    fn idle(&self) -> Option<Duration> {
        let guest = [&self.reads, &self.writes, &self.flushes, &self.discards];
        let last = guest
            .map(|counter| counter.last.load(Ordering::Relaxed))
            .into_iter()
            .max()
            .filter(|&last| last > 0);
        last.map(|last| self.opened.elapsed().saturating_sub(Duration::from_nanos(last)))
    }
}

/// Counts a request as in flight until it is dropped.
struct InFlight<'a>(&'a Counter);

impl<'a> InFlight<'a> {
    fn new(counter: &'a Counter) -> Self {
        counter.running.fetch_add(1, Ordering::Relaxed);
        InFlight(counter)
    }
}

impl Drop for InFlight<'_> {
    fn drop(&mut self) {
        self.0.running.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Counter {
    fn cost(&self) -> Cost {
        // Called at most once per chunk of a stream: the sum costs less than the system calls of
        // the chunk.
        Cost {
            operations: self.latency().iter().sum(),
            time: Duration::from_nanos(self.nanoseconds.load(Ordering::Relaxed)),
        }
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

/// Whether a request that did not fail was completed. If not, it is left to the blocking sibling,
/// which counts it.
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

/// A `u64` of nanoseconds holds 584 years.
fn nanoseconds(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}

/// Index of the bucket of [`Latency`] for this duration.
fn bucket(nanoseconds: u64) -> usize {
    // Exponent of the smallest power of two, in microseconds, that is not below the duration.
    let bits = u64::BITS - nanoseconds.div_ceil(1000).saturating_sub(1).leading_zeros();
    (bits as usize).min(LATENCY_BOUNDS.len())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Protects: a latency on a bound belongs to that bound's bucket, one nanosecond more to the
    /// next, and every latency has a bucket.
    #[test]
    fn bounds_are_inclusive() {
        assert_eq!((LATENCY_BOUNDS[0], LATENCY_BOUNDS[23]), (1_000, 8_388_608_000));
        assert_eq!((bucket(0), bucket(1)), (0, 0));
        for (index, &bound) in LATENCY_BOUNDS.iter().enumerate() {
            assert_eq!(
                (bucket(bound - 1), bucket(bound), bucket(bound + 1)),
                (index, index, index + 1),
                "{bound}"
            );
        }
        assert_eq!(bucket(u64::MAX), LATENCY_BUCKETS - 1);
    }

    /// Protects: a request is counted once, in the bucket of its latency. Requests that fail or are
    /// not completed are counted in no bucket.
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
        stats.read::<Local>(80, || Err(host::Error::new(host::ErrorKind::Io, "no"))).unwrap_err();
        stats.missed();
        let found = stats.snapshot();
        let reads = found.reads;
        assert_eq!(
            (reads.bytes, reads.operations, reads.failed, found.misses, found.hits()),
            (30, 2, 1, 1, 1)
        );
        assert_eq!(reads.latency.iter().sum::<u64>(), 2);
        assert_eq!(
            reads.latency[bucket(3_000_000)..].iter().sum::<u64>(),
            1,
            "the one that slept: {:?}",
            reads.latency
        );
        assert_eq!(stats.activity().costs[3].operations, 1, "the one that waited");
    }
}
