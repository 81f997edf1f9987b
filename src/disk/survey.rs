//! How much of the disk is local, zero, or still below, from the overlay's tables alone.
//!
//! Never asks what lies below: a backing file that hangs must not hang whoever asks how far things are. So what is unallocated here and zero there
//! counts as remote, until a stream or a read has found out.
//!
//! No range is held: a cluster that changes meanwhile may be counted as what it was or as what it is, once.
//!
//! A walk looks at one run after the other. Where nothing is allocated one run is the span of an L2 table, which need not exist; a full table of
//! single clusters costs one step for each of them. Asking often must not keep a processor busy, so the result of a walk is told again until it is
//! [`FRESH`] times as old as the walk has taken. One walk goes on at a time; who comes meanwhile is told the last result, if there is one.

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::Disk;
use crate::format::{GuestOffset, Mapping};
use crate::sync::unranked::{Condvar, Mutex};
use crate::{Error, ErrorKind, Result};

/// The least age at which a result is looked for anew.
const LEAST_AGE: Duration = Duration::from_secs(1);
/// And in relation to what it has cost: walks take at most one part in so many of the time.
const FRESH: u32 = 20;

/// No walk takes longer: a small file can be made to name one L2 table so often that nobody lives to see the end of it. Shorter than a
/// client waits for an answer.
const LONGEST_WALK: Duration = Duration::from_secs(8);
/// How many steps of a walk are done between two looks at the clock.
const STEPS: u64 = 4096;

/// The most cells that a disk is divided into.
pub const MOST_CELLS: u64 = 65536;

/// What the whole disk is made of, in bytes: the three make up its size.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Totals {
    /// In data clusters, compressed or not, of the overlay, and where a table of the overlay is bad.
    pub local: u64,
    /// Zero clusters of the overlay, and what reads as zero because no backing file reaches so far.
    pub zero: u64,
    /// The rest: decided by the backing files.
    pub remote: u64,
    /// For how long this has been known.
    pub age: Duration,
}

/// The same for pieces of the disk.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Survey {
    /// Virtual size of the disk in bytes.
    pub size: u64,
    /// Size of a cell in bytes, whole clusters; the last one may end before.
    pub cell_size: u64,
    /// As [`Totals::local`], for each cell.
    pub local: Vec<u64>,
    /// As [`Totals::zero`], for each cell. The rest of a cell is remote.
    pub zero: Vec<u64>,
}

/// The last results, and whether somebody looks for a new one.
#[derive(Debug, Default)]
pub(super) struct Surveys {
    state: Mutex<State>,
    ended: Condvar,
}

#[derive(Debug, Default)]
struct State {
    walking: bool,
    last: Option<Walked>,
    /// When a walk was given up that took too long: who asks soon after is told so at once.
    gave_up: Option<Instant>,
    /// How often all that is below has changed at once: a walk that began before is not told again.
    changes: u64,
}

#[derive(Clone, Debug)]
struct Walked {
    /// How many were asked for.
    cells: u64,
    survey: Arc<Survey>,
    at: Instant,
    took: Duration,
}

impl Walked {
    fn is_fresh(&self) -> bool {
        self.at.elapsed() < LEAST_AGE.max(self.took.saturating_mul(FRESH))
    }
}

/// Says that nobody walks any more, however the walk has ended.
struct Walking<'a>(&'a Surveys);

impl Drop for Walking<'_> {
    fn drop(&mut self) {
        self.0.state.lock().walking = false;
        self.0.ended.notify_all();
    }
}

impl Surveys {
    /// What is below has changed for every cluster at once: nothing that was found out before is told any more.
    pub fn forget(&self) {
        let mut state = self.state.lock();
        state.last = None;
        state.changes += 1;
    }
}

impl Disk {
    /// What the disk is made of, in at most `cells` pieces, between 1 and [`MOST_CELLS`]; a little old at times.
    ///
    /// # Errors
    /// [`ErrorKind::Busy`] where the tables are too many to be counted in time.
    pub fn survey(&self, cells: u64) -> Result<Arc<Survey>> {
        Ok(self.walked(Some(cells.clamp(1, MOST_CELLS)))?.survey)
    }

    /// What the disk is made of, as a whole; a little old at times.
    ///
    /// # Errors
    /// As [`Disk::survey`].
    pub fn totals(&self) -> Result<Totals> {
        let walked = self.walked(None)?;
        let survey = &walked.survey;
        let (local, zero) = (survey.local.iter().sum::<u64>(), survey.zero.iter().sum::<u64>());
        Ok(Totals { local, zero, remote: survey.size - local - zero, age: walked.at.elapsed() })
    }

    /// A result for so many cells, or for any number of them.
    fn walked(&self, cells: Option<u64>) -> Result<Walked> {
        let mut state = self.surveys.state.lock();
        loop {
            let fits = |walked: &&Walked| cells.is_none_or(|cells| walked.cells == cells);
            if let Some(last) = state.last.as_ref().filter(fits)
                && (last.is_fresh() && last.survey.size == self.size() || state.walking)
            {
                return Ok(last.clone());
            }
            if state.gave_up.is_some_and(|at| at.elapsed() < LONGEST_WALK.saturating_mul(FRESH)) {
                return Err(too_long());
            }
            if !state.walking {
                break;
            }
            self.surveys.ended.wait(&mut state);
        }
        state.walking = true;
        let (last, changes) = (state.last.as_ref().map(|last| last.cells), state.changes);
        drop(state);
        let _walking = Walking(&self.surveys);
        let start = Instant::now();
        // Who asks for the whole gets the cells that somebody else looks at, so that those are not lost.
        let cells = cells.or(last).unwrap_or(1);
        let survey = match self.walk(cells, start + LONGEST_WALK) {
            Ok(survey) => Arc::new(survey),
            Err(error) => {
                if error.kind() == ErrorKind::Busy {
                    self.surveys.state.lock().gave_up = Some(Instant::now());
                }
                return Err(error);
            }
        };
        let walked = Walked { cells, survey, at: Instant::now(), took: start.elapsed() };
        let mut state = self.surveys.state.lock();
        if state.changes == changes {
            state.last = Some(walked.clone());
        }
        drop(state);
        Ok(walked)
    }

    /// [`ErrorKind::Busy`] where it is not done by `deadline`.
    fn walk(&self, cells: u64, deadline: Instant) -> Result<Survey> {
        let size = self.size();
        let below = self.chain().map_or(0, |chain| chain.size()).min(size);
        let cell_size = size.div_ceil(cells).next_multiple_of(self.cluster_size()).max(self.cluster_size());
        let count = size.div_ceil(cell_size) as usize;
        let mut survey = Survey { size, cell_size, local: vec![0; count], zero: vec![0; count] };
        let (mut at, mut steps) = (0, 0_u64);
        while at < size {
            if steps.is_multiple_of(STEPS) && Instant::now() >= deadline {
                return Err(too_long());
            }
            steps += 1;
            // The tables alone. What is wrong in them counts as local, for it does not come from below; reads and writes of it report the error.
            let (mapping, len) = self.reader().look(GuestOffset(at), size - at);
            let end = at + len;
            match mapping {
                Ok(Mapping::Data { .. } | Mapping::Compressed { .. }) | Err(_) => add(&mut survey.local, cell_size, at, end),
                Ok(Mapping::Zero { .. }) => add(&mut survey.zero, cell_size, at, end),
                Ok(Mapping::Unallocated) => add(&mut survey.zero, cell_size, at.max(below), end),
            }
            at = end;
        }
        Ok(survey)
    }
}

fn too_long() -> Error {
    Error::new(ErrorKind::Busy, "the tables of the image are too many to be counted")
}

/// Distributes the bytes from `at` to `end`, where there are any.
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
    use crate::format::{BackingFormat, BackingReference, Geometry, NewImage};
    use crate::image::Image;
    use crate::simulation::{Action, Failure, Fault, SimStorage, Times};

    const CLUSTER: u64 = 4096;

    /// A disk whose last cluster is not whole, above a base that ends in the middle of cluster 12.
    fn disk(clusters: u64) -> (Disk, Arc<SimStorage>) {
        let size = clusters * CLUSTER - 1024;
        let base = SimStorage::new(vec![7; (12 * CLUSTER + 512) as usize]);
        let backing = BackingReference { name: "base.raw".into(), format: Some(BackingFormat::Raw) };
        let new = NewImage { geometry: Geometry::new(3, 12, 4, size).unwrap(), backing: Some(backing) };
        let layout = new.layout().unwrap();
        let mut bytes = vec![0; layout.iter().map(|(at, bytes)| *at as usize + bytes.len()).max().unwrap()];
        for (at, piece) in layout {
            bytes[at as usize..][..piece.len()].copy_from_slice(&piece);
        }
        let image = Image::open(SimStorage::new(bytes)).unwrap();
        (Disk::for_tests(image, Some(Chain::of_raw(base.clone()))), base)
    }

    fn sums(survey: &Survey) -> (u64, u64) {
        (survey.local.iter().sum(), survey.zero.iter().sum())
    }

    /// Protects: the parts are what they are said to be and make up the disk, however it is cut, also where the base ends inside a cluster; nothing is
    /// read below.
    #[test]
    fn every_byte_is_in_one_place() {
        let (disk, base) = disk(16);
        let size = disk.size();
        let any = |_: &crate::simulation::Operation| true;
        base.inject(Fault { matches: Box::new(any), after: 0, failure: Failure::Errno(5), times: Times::ForEver });
        disk.write(2 * CLUSTER, &[1; 3 * CLUSTER as usize]).unwrap();
        disk.write_zeroes(7 * CLUSTER..8 * CLUSTER).unwrap();
        disk.discard(4 * CLUSTER..5 * CLUSTER).unwrap();
        let (local, zero) = (2 * CLUSTER, 2 * CLUSTER + size - (12 * CLUSTER + 512));
        for cells in [1, 3, 4, 16, 100] {
            let survey = disk.survey(cells).unwrap();
            assert_eq!(sums(&survey), (local, zero), "{cells} cells");
            assert!(survey.local.len() as u64 <= cells && survey.cell_size.is_multiple_of(CLUSTER), "{survey:?}");
            assert_eq!(survey.local.len() as u64, size.div_ceil(survey.cell_size));
        }
        let fine = disk.survey(16).unwrap();
        let expected = |cluster: u64| match cluster {
            2 | 3 => (CLUSTER, 0),
            4 | 7 | 13 | 14 => (0, CLUSTER),
            12 => (0, CLUSTER - 512),
            15 => (0, CLUSTER - 1024),
            _ => (0, 0),
        };
        for cluster in 0..16 {
            assert_eq!((fine.local[cluster as usize], fine.zero[cluster as usize]), expected(cluster), "cluster {cluster}");
        }
        let totals = disk.totals().unwrap();
        assert_eq!((totals.local, totals.zero, totals.remote), (local, zero, size - local - zero));
        assert_eq!(base.failures(), 0, "nobody asked the base");
    }

    /// Protects: who asks again at once is told the same, and causes no walk; a disk that has grown is looked at anew.
    #[test]
    fn asking_often_costs_nothing() {
        let (disk, _) = disk(16);
        let before = disk.totals().unwrap();
        disk.write(0, &[1; CLUSTER as usize]).unwrap();
        let again = disk.totals().unwrap();
        assert_eq!((again.local, before.local), (0, 0), "told again");
        disk.surveys.state.lock().last.as_mut().unwrap().at -= 2 * LEAST_AGE;
        assert_eq!(disk.totals().unwrap().local, CLUSTER);
        disk.surveys.state.lock().last.as_mut().unwrap().took = 10 * LEAST_AGE;
        disk.surveys.state.lock().last.as_mut().unwrap().at -= 100 * LEAST_AGE;
        disk.write(CLUSTER, &[1; CLUSTER as usize]).unwrap();
        let old = disk.totals().unwrap();
        assert_eq!(old.local, CLUSTER, "a walk that takes so long is not made again so soon");
        assert!(old.age >= 100 * LEAST_AGE);
        disk.grow(32 * CLUSTER).unwrap();
        let grown = disk.totals().unwrap();
        assert_eq!((grown.local, grown.local + grown.zero + grown.remote), (2 * CLUSTER, 32 * CLUSTER));
    }

    /// Protects: when a stream is complete nothing is said to be remote any more, not even for a moment, nor by a walk that had begun before.
    #[test]
    fn nothing_is_remote_once_the_chain_is_gone() {
        let (disk, _) = disk(16);
        assert!(disk.totals().unwrap().remote > 0);
        let before = disk.surveys.state.lock().changes;
        disk.populate(0..disk.size(), usize::MAX).unwrap();
        assert!(disk.totals().unwrap().remote > 0, "told again");
        disk.detach_backing(usize::MAX, None).unwrap();
        assert_eq!(disk.totals().unwrap().remote, 0);
        assert!(disk.surveys.state.lock().changes > before);
    }

    /// Protects: an image that takes for ever to count takes nobody's time for ever, and not again and again.
    #[test]
    fn a_walk_that_takes_too_long_is_given_up() {
        let (disk, _) = disk(16);
        assert_eq!(disk.walk(16, Instant::now()).unwrap_err().kind(), ErrorKind::Busy);
        disk.surveys.state.lock().gave_up = Some(Instant::now());
        // Somebody who walked would be waited for.
        disk.surveys.state.lock().walking = true;
        assert_eq!(disk.totals().unwrap_err().kind(), ErrorKind::Busy);
        drop(Walking(&disk.surveys));
        disk.surveys.state.lock().gave_up = Some(Instant::now() - FRESH * LONGEST_WALK);
        assert!(disk.totals().is_ok());
    }

    /// Protects: who comes while somebody walks is told the last result instead of waiting, and a walk that fails leaves nobody waiting.
    #[test]
    fn nobody_waits_for_a_walk_when_something_is_known() {
        let (disk, _) = disk(16);
        disk.totals().unwrap();
        disk.surveys.state.lock().last.as_mut().unwrap().at -= 2 * LEAST_AGE;
        disk.surveys.state.lock().walking = true;
        assert!(disk.totals().unwrap().age >= 2 * LEAST_AGE, "the old one");
        drop(Walking(&disk.surveys));
        assert!(disk.totals().unwrap().age < 2 * LEAST_AGE, "a new one");
        // No table is looked at that is not there: 1 TiB takes a moment.
        let new = NewImage { geometry: Geometry::new(3, 16, 4, 1 << 40).unwrap(), backing: None };
        let storage = SimStorage::new(Vec::new());
        for (at, piece) in new.layout().unwrap() {
            crate::storage::Storage::write_at(&*storage, crate::storage::WriteKind::Header, at, &piece).unwrap();
        }
        let large = Disk::for_tests(Image::open(storage.clone()).unwrap(), None);
        let reads = |operation: &crate::simulation::Operation| operation.action == Action::Read;
        storage.inject(Fault { matches: Box::new(reads), after: 0, failure: Failure::Errno(5), times: Times::ForEver });
        assert_eq!(large.totals().unwrap().zero, 1 << 40);
        assert_eq!(storage.failures(), 0, "no table was read");
    }
}
