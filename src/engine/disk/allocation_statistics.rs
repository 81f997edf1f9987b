//! Allocation statistics: how many bytes of the disk are local, zero, or still below, by the
//! overlay's tables alone.
//!
//! The backing files are never asked: one that hangs must not hang a status query. Clusters that
//! are unallocated in the overlay and zero in a backing file therefore count as remote. A stream or
//! a read that records them as zero changes that.
//!
//! A walk holds no range. A cluster that changes during the walk is counted once, by its old or its
//! new mapping.
//!
//! A walk looks up one run after the other. Where nothing is allocated, one run is the span of an
//! L2 table, which need not exist. A full table without contiguous clusters costs one step per
//! cluster. Frequent queries must not keep a processor busy, so the result of a walk is reused
//! until its age is [`FRESH`] times the duration of the walk.
//!
//! Only one walk runs at a time. It is marked in `StatisticsCache::state`, whose lock is not held
//! during the walk. A query that arrives meanwhile gets the last result, whatever its age. It waits
//! for the walk if there is no result with its number of cells.

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::Disk;
use host::sync::unranked::{Condvar, Mutex};
use host::{Error, ErrorKind, Result};
use qcow2::format::{GuestOffset, Mapping};

/// Age up to which a result is always reused.
const LEAST_AGE: Duration = Duration::from_secs(1);
/// A result is also reused up to this multiple of the duration of its walk: walks take at most one
/// twentieth of the time.
const FRESH: u32 = 20;

/// Limit of the duration of a walk: a small hostile file can name one L2 table so often that a walk
/// would not end. Shorter than the time for which a client waits for a reply.
const LONGEST_WALK: Duration = Duration::from_secs(8);
/// Steps of a walk between two checks of the deadline.
const STEPS: u64 = 4096;

/// Largest number of cells of a statistics.
pub const MOST_CELLS: u64 = 65536;

/// Bytes of the whole disk by where they are. The sum of the three is the size of the disk.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Totals {
    /// Data clusters of the overlay, compressed or not, and ranges for which a table of the overlay
    /// is bad.
    pub local: u64,
    /// Zero clusters of the overlay, and unallocated bytes beyond the end of the backing file or
    /// without one.
    pub zero: u64,
    /// The rest: bytes that the backing files decide.
    pub remote: u64,
    /// Age of this result.
    pub age: Duration,
}

/// The same numbers for each cell, an equal piece of the disk.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct AllocationStatistics {
    /// Virtual size of the disk in bytes.
    pub size: u64,
    /// Size of a cell in bytes, a multiple of the cluster size. The last cell may be shorter.
    pub cell_size: u64,
    /// As [`Totals::local`], for each cell.
    pub local: Vec<u64>,
    /// As [`Totals::zero`], for each cell. The rest of a cell is remote.
    pub zero: Vec<u64>,
}

/// The last result, and whether a walk is running.
#[derive(Debug, Default)]
pub(super) struct StatisticsCache {
    state: Mutex<CacheState>,
    ended: Condvar,
}

#[derive(Debug, Default)]
struct CacheState {
    walking: bool,
    last: Option<Walked>,
    /// When the last walk was given up because it took too long. Queries that find no result fail
    /// at once for [`FRESH`] times [`LONGEST_WALK`] after that.
    gave_up: Option<Instant>,
    /// Number of changes of everything below at once, such as a detach. The result of a walk that
    /// began before such a change is not kept.
    changes: u64,
}

#[derive(Clone, Debug)]
struct Walked {
    /// The number of cells that the query asked for.
    cells: u64,
    statistics: Arc<AllocationStatistics>,
    at: Instant,
    took: Duration,
}

impl Walked {
    fn is_fresh(&self) -> bool {
        self.at.elapsed() < LEAST_AGE.max(self.took.saturating_mul(FRESH))
    }
}

/// Marks the walk as ended when it is dropped, also after an error or a panic, and wakes the
/// waiting queries.
struct Walking<'a>(&'a StatisticsCache);

impl Drop for Walking<'_> {
    fn drop(&mut self) {
        self.0.state.lock().walking = false;
        self.0.ended.notify_all();
    }
}

impl StatisticsCache {
    /// Drops the last result, and that of a running walk, because the backing of every cluster has
    /// changed at once.
    pub fn forget(&self) {
        let mut state = self.state.lock();
        state.last = None;
        state.changes += 1;
    }
}

impl Disk {
    /// Bytes by where they are, for at most `cells` pieces of the disk (clamped to 1 to
    /// [`MOST_CELLS`]). The result may be a reused one.
    ///
    /// # Errors
    /// [`ErrorKind::Busy`] if the tables could not be walked in time, now or a short time ago.
    pub fn allocation_statistics(&self, cells: u64) -> Result<Arc<AllocationStatistics>> {
        Ok(self.walked(Some(cells.clamp(1, MOST_CELLS)))?.statistics)
    }

    /// Bytes of the whole disk by where they are. The result may be a reused one.
    ///
    /// # Errors
    /// As [`Disk::allocation_statistics`].
    pub fn totals(&self) -> Result<Totals> {
        let walked = self.walked(None)?;
        let statistics = &walked.statistics;
        let (local, zero) =
            (statistics.local.iter().sum::<u64>(), statistics.zero.iter().sum::<u64>());
        Ok(Totals { local, zero, remote: statistics.size - local - zero, age: walked.at.elapsed() })
    }

    /// A result for this number of cells; `None` accepts any number.
    fn walked(&self, cells: Option<u64>) -> Result<Walked> {
        let mut state = self.statistics_cache.state.lock();
        loop {
            let fits = |walked: &&Walked| cells.is_none_or(|cells| walked.cells == cells);
            if let Some(last) = state.last.as_ref().filter(fits)
                && (last.is_fresh() && last.statistics.size == self.size() || state.walking)
            {
                return Ok(last.clone());
            }
            if state.gave_up.is_some_and(|at| at.elapsed() < LONGEST_WALK.saturating_mul(FRESH)) {
                return Err(too_long());
            }
            if !state.walking {
                break;
            }
            self.statistics_cache.ended.wait(&mut state);
        }
        state.walking = true;
        let (last, changes) = (state.last.as_ref().map(|last| last.cells), state.changes);
        drop(state);
        let _walking = Walking(&self.statistics_cache);
        let start = Instant::now();
        // A query for the totals uses the number of cells of the last result, so that a later query
        // for these cells can reuse the new one.
        let cells = cells.or(last).unwrap_or(1);
        let statistics = match self.walk(cells, start + LONGEST_WALK) {
            Ok(statistics) => Arc::new(statistics),
            Err(error) => {
                if error.kind() == ErrorKind::Busy {
                    self.statistics_cache.state.lock().gave_up = Some(Instant::now());
                }
                return Err(error);
            }
        };
        let walked = Walked { cells, statistics, at: Instant::now(), took: start.elapsed() };
        let mut state = self.statistics_cache.state.lock();
        if state.changes == changes {
            state.last = Some(walked.clone());
        }
        drop(state);
        Ok(walked)
    }

    /// Walks the tables. [`ErrorKind::Busy`] if the walk is not done by `deadline`.
    fn walk(&self, cells: u64, deadline: Instant) -> Result<AllocationStatistics> {
        let size = self.size();
        let below = self.chain().map_or(0, |chain| chain.size()).min(size);
        let cell_size =
            size.div_ceil(cells).next_multiple_of(self.cluster_size()).max(self.cluster_size());
        let count = size.div_ceil(cell_size) as usize;
        let mut statistics =
            AllocationStatistics { size, cell_size, local: vec![0; count], zero: vec![0; count] };
        let (mut at, mut steps) = (0, 0_u64);
        while at < size {
            if steps.is_multiple_of(STEPS) && Instant::now() >= deadline {
                return Err(too_long());
            }
            steps += 1;
            // Reads the overlay's tables only. A bad entry counts as local, because it does not
            // come from below; reads and writes of its range return the error.
            let (mapping, len) = self.reader().look(GuestOffset(at), size - at);
            let end = at + len;
            match mapping {
                Ok(Mapping::Data { .. } | Mapping::Compressed { .. }) | Err(_) => {
                    add(&mut statistics.local, cell_size, at, end)
                }
                Ok(Mapping::Zero { .. }) => add(&mut statistics.zero, cell_size, at, end),
                Ok(Mapping::Unallocated) => {
                    add(&mut statistics.zero, cell_size, at.max(below), end)
                }
            }
            at = end;
        }
        Ok(statistics)
    }
}

fn too_long() -> Error {
    Error::new(ErrorKind::Busy, "the tables of the image are too many to be counted")
}

/// Adds the bytes from `at` to `end` to their cells. An empty range adds nothing.
fn add(cells: &mut [u64], cell_size: u64, mut at: u64, end: u64) {
    while at < end {
        let len = (end - at).min(cell_size - at % cell_size);
        cells[(at / cell_size) as usize] += len;
        at += len;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::chain::Chain;
    use qcow2::format::{BackingFormat, NewImage};
    use qcow2::image::Image;
    use sim::{Action, Fault, HostFailure, Repeat, SimStorage};

    const CLUSTER: u64 = 4096;

    /// A disk that ends inside its last cluster, above a base that ends in the middle of cluster
    /// 12.
    fn disk(clusters: u64) -> (Disk, Arc<SimStorage>) {
        let size = clusters * CLUSTER - 1024;
        let base = SimStorage::new(vec![7; (12 * CLUSTER + 512) as usize]);
        let overlay = SimStorage::new(NewImage::file_for_tests(
            12,
            size,
            Some(("base.raw", BackingFormat::Raw)),
        ));
        let image = Image::open(overlay).unwrap();
        (Disk::for_tests(image, Some(Chain::of_raw(base.clone()))), base)
    }

    fn sums(statistics: &AllocationStatistics) -> (u64, u64) {
        (statistics.local.iter().sum(), statistics.zero.iter().sum())
    }

    /// Protects: every byte of the disk is counted once and in the right place, for any number of
    /// cells, also where the base ends inside a cluster. Nothing is read from below.
    #[test]
    fn every_byte_is_in_one_place() {
        let (disk, base) = disk(16);
        let size = disk.size();
        let any = |_: &sim::Operation| true;
        base.inject(Fault {
            matches: Box::new(any),
            after: 0,
            failure: HostFailure::Errno(5),
            times: Repeat::ForEver,
        });
        disk.write(2 * CLUSTER, &[1; 3 * CLUSTER as usize]).unwrap();
        disk.write_zeroes(7 * CLUSTER..8 * CLUSTER).unwrap();
        disk.discard(4 * CLUSTER..5 * CLUSTER).unwrap();
        let (local, zero) = (2 * CLUSTER, 2 * CLUSTER + size - (12 * CLUSTER + 512));
        for cells in [1, 3, 4, 16, 100] {
            let statistics = disk.allocation_statistics(cells).unwrap();
            assert_eq!(sums(&statistics), (local, zero), "{cells} cells");
            assert!(
                statistics.local.len() as u64 <= cells
                    && statistics.cell_size.is_multiple_of(CLUSTER),
                "{statistics:?}"
            );
            assert_eq!(statistics.local.len() as u64, size.div_ceil(statistics.cell_size));
        }
        let fine = disk.allocation_statistics(16).unwrap();
        let expected = |cluster: u64| match cluster {
            2 | 3 => (CLUSTER, 0),
            4 | 7 | 13 | 14 => (0, CLUSTER),
            12 => (0, CLUSTER - 512),
            15 => (0, CLUSTER - 1024),
            _ => (0, 0),
        };
        for cluster in 0..16 {
            assert_eq!(
                (fine.local[cluster as usize], fine.zero[cluster as usize]),
                expected(cluster),
                "cluster {cluster}"
            );
        }
        let totals = disk.totals().unwrap();
        assert_eq!((totals.local, totals.zero, totals.remote), (local, zero, size - local - zero));
        assert_eq!(base.failures(), 0, "nobody asked the base");
    }

    /// Protects: a query that follows at once gets the same result without a walk. A disk that has
    /// grown is walked again.
    #[test]
    fn asking_often_costs_nothing() {
        let (disk, _) = disk(16);
        let before = disk.totals().unwrap();
        disk.write(0, &[1; CLUSTER as usize]).unwrap();
        let again = disk.totals().unwrap();
        assert_eq!((again.local, before.local), (0, 0), "told again");
        disk.statistics_cache.state.lock().last.as_mut().unwrap().at -= 2 * LEAST_AGE;
        assert_eq!(disk.totals().unwrap().local, CLUSTER);
        disk.statistics_cache.state.lock().last.as_mut().unwrap().took = 10 * LEAST_AGE;
        disk.statistics_cache.state.lock().last.as_mut().unwrap().at -= 100 * LEAST_AGE;
        disk.write(CLUSTER, &[1; CLUSTER as usize]).unwrap();
        let old = disk.totals().unwrap();
        assert_eq!(old.local, CLUSTER, "a walk that takes so long is not made again so soon");
        assert!(old.age >= 100 * LEAST_AGE);
        disk.grow(32 * CLUSTER).unwrap();
        let grown = disk.totals().unwrap();
        assert_eq!(
            (grown.local, grown.local + grown.zero + grown.remote),
            (2 * CLUSTER, 32 * CLUSTER)
        );
    }

    /// Protects: when a stream is complete, no query reports remote bytes any more, not even one
    /// whose walk had begun before.
    #[test]
    fn nothing_is_remote_once_the_chain_is_gone() {
        let (disk, _) = disk(16);
        assert!(disk.totals().unwrap().remote > 0);
        let before = disk.statistics_cache.state.lock().changes;
        disk.populate(0..disk.size(), usize::MAX).unwrap();
        assert!(disk.totals().unwrap().remote > 0, "told again");
        disk.detach_backing(usize::MAX, None).unwrap();
        assert_eq!(disk.totals().unwrap().remote, 0);
        assert!(disk.statistics_cache.state.lock().changes > before);
    }

    /// Protects: a walk of an image that would take forever is given up, and is not repeated by
    /// every query.
    #[test]
    fn a_walk_that_takes_too_long_is_given_up() {
        let (disk, _) = disk(16);
        assert_eq!(disk.walk(16, Instant::now()).unwrap_err().kind(), ErrorKind::Busy);
        disk.statistics_cache.state.lock().gave_up = Some(Instant::now());
        // If the query did not fail at once, it would wait for this walk.
        disk.statistics_cache.state.lock().walking = true;
        assert_eq!(disk.totals().unwrap_err().kind(), ErrorKind::Busy);
        drop(Walking(&disk.statistics_cache));
        disk.statistics_cache.state.lock().gave_up = Some(Instant::now() - FRESH * LONGEST_WALK);
        assert!(disk.totals().is_ok());
    }

    /// Protects: a query that arrives during a walk gets the last result instead of waiting, and a
    /// walk that fails leaves no query waiting.
    #[test]
    fn nobody_waits_for_a_walk_when_something_is_known() {
        let (disk, _) = disk(16);
        disk.totals().unwrap();
        disk.statistics_cache.state.lock().last.as_mut().unwrap().at -= 2 * LEAST_AGE;
        disk.statistics_cache.state.lock().walking = true;
        assert!(disk.totals().unwrap().age >= 2 * LEAST_AGE, "the old one");
        drop(Walking(&disk.statistics_cache));
        assert!(disk.totals().unwrap().age < 2 * LEAST_AGE, "a new one");
        // Tables that do not exist are not read: 1 TiB takes a moment.
        let storage = SimStorage::new(NewImage::file_for_tests(16, 1 << 40, None));
        let large = Disk::for_tests(Image::open(storage.clone()).unwrap(), None);
        let reads = |operation: &sim::Operation| operation.action == Action::Read;
        storage.inject(Fault {
            matches: Box::new(reads),
            after: 0,
            failure: HostFailure::Errno(5),
            times: Repeat::ForEver,
        });
        assert_eq!(large.totals().unwrap().zero, 1 << 40);
        assert_eq!(storage.failures(), 0, "no table was read");
    }
}
