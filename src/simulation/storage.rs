//! The file in memory.

use std::io;
use std::ops::Range;
use std::sync::Arc;

use rustix::io::Errno;

use super::fault::{Failure, Fault, Matches, Times};
use super::host_cache::{HostCache, Reaches};
use super::order::OrderChecker;
use crate::storage::{Ask, CloneSource, Holding, OpenMark, Storage, Version, WriteKind};
use crate::sync::unranked::{Condvar, Mutex, MutexGuard};

/// What an operation does.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Action {
    /// [`Storage::read_at`].
    Read,
    /// [`Storage::clone_range`] of this file into another one, where it is a [`Action::Write`] after that.
    CloneFrom,
    /// [`Storage::write_at`].
    Write(WriteKind),
    /// [`Storage::punch_hole`].
    Punch,
    /// [`Storage::sync`].
    Sync,
}

/// One call of the engine.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Operation {
    /// What it does.
    pub action: Action,
    /// Where, bytes; 0 for a barrier.
    pub at: u64,
    /// How much, bytes; 0 for a barrier.
    pub len: u64,
    /// It is one of the two sides of a clone. Whoever wants the bytes can do without it.
    pub is_clone: bool,
}

/// A change as it was done, for [`SimStorage::recorded`].
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Recorded {
    /// Bytes were written.
    Write {
        /// What they are.
        kind: WriteKind,
        /// Where, bytes.
        at: u64,
        /// The bytes.
        data: Box<[u8]>,
    },
    /// A range became zero.
    Punch {
        /// Where, bytes.
        at: u64,
        /// How much, bytes.
        len: u64,
    },
    /// A barrier returned.
    Sync {
        /// It covers so many of the entries before it: those that were done when it was called.
        covers: usize,
    },
    /// A barrier failed.
    SyncFailed {
        /// So many of the entries before it may be on disk or not, and no later barrier changes that.
        covers: usize,
    },
}

/// Sees every change while it is done, in order; panics where something is wrong with it.
pub trait Observer: Send {
    /// Bytes are about to be written.
    fn write(&mut self, kind: WriteKind, at: u64, data: &[u8]);
    /// A range is about to become zero.
    fn punch(&mut self, at: u64, len: u64);
    /// A barrier is called. Returns a number for [`Observer::sync_ended`].
    fn sync_began(&mut self) -> u64;
    /// The barrier with that number has done its work.
    fn sync_ended(&mut self, number: u64);
    /// The barrier with that number has failed: what it covers may be on disk or not, and no later barrier
    /// writes it.
    fn sync_failed(&mut self, _number: u64) {}
    /// The host has dropped its cache: these are the bytes of the disk.
    fn dropped(&mut self, _bytes: &[u8]) {}
}

/// When a host knows that a file was changed.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Told {
    /// The file is its own.
    AtOnce,
    /// The file is another machine's.
    WhenItAsks,
}

/// A file in memory.
pub struct SimStorage {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    bytes: Vec<u8>,
    recorded: Option<Vec<Recorded>>,
    observer: Option<Box<dyn Observer>>,
    faults: Vec<Fault>,
    /// Blocks of so many bytes can be shared with this file; 0 where none can be.
    clones: u64,
    in_memory: bool,
    /// How often the bytes were changed by somebody else, and how many of those changes this host
    /// knows of.
    version: u32,
    known: u32,
    /// The attribute beside the bytes.
    marked: bool,
    /// None on a host on which nothing is lost by a barrier that fails.
    cache: Option<HostCache>,
    /// A write-back failed that no barrier has asked for: the next barrier reports it.
    unreported: bool,
    failures: u64,
    operations: u64,
    write_outs: Vec<Range<u64>>,
    holds: Vec<HoldState>,
    next_hold: u64,
}

struct HoldState {
    id: u64,
    matches: Matches,
    /// How many operations stand here.
    stopped: u64,
}

/// Stops every operation that matches, before it does anything, until this is dropped.
pub struct Hold {
    storage: Arc<SimStorage>,
    id: u64,
}

impl SimStorage {
    /// A file with these bytes.
    pub fn new(bytes: Vec<u8>) -> Arc<SimStorage> {
        Arc::new(SimStorage { state: Mutex::new(State { bytes, ..State::default() }), changed: Condvar::new() })
    }

    /// A file with these bytes, an image, that panics where a rule of order is broken.
    ///
    /// # Panics
    /// If the bytes are no image.
    pub fn checked(bytes: Vec<u8>) -> Arc<SimStorage> {
        let file = SimStorage::new(bytes.clone());
        file.observe(Box::new(OrderChecker::new(bytes)));
        file
    }

    /// The bytes as a reader finds them now; what a killed process leaves.
    pub fn bytes(&self) -> Vec<u8> {
        self.state.lock().bytes.clone()
    }

    /// Begins to record, from nothing.
    pub fn record(&self) {
        self.state.lock().recorded = Some(Vec::new());
    }

    /// What was recorded since [`SimStorage::record`]; recording goes on, from nothing.
    pub fn recorded(&self) -> Vec<Recorded> {
        self.state.lock().recorded.replace(Vec::new()).unwrap_or_default()
    }

    /// How many changes were recorded so far.
    pub fn recorded_len(&self) -> usize {
        self.state.lock().recorded.as_ref().map_or(0, Vec::len)
    }

    /// Shows every change to `observer` from now on.
    pub fn observe(&self, observer: Box<dyn Observer>) {
        self.state.lock().observer = Some(observer);
    }

    /// From now on blocks of `block` bytes can be cloned into this file, as into one on XFS or btrfs; 0 for none, as it is at first.
    pub fn allow_clones(&self, block: u64) {
        self.state.lock().clones = block;
    }

    /// From now on, or not any more, all of the file is in the host's memory: reads that would not wait come to pass. They are no operations.
    pub fn keep_in_memory(&self, keep: bool) {
        self.state.lock().in_memory = keep;
    }

    /// Somebody else overwrites the file with these bytes. Where the file is another machine's,
    /// this host does not know of it until it asks.
    pub fn overwrite(&self, bytes: Vec<u8>, told: Told) {
        let mut state = self.state.lock();
        state.bytes = bytes;
        state.version += 1;
        if told == Told::AtOnce {
            state.known = state.version;
        }
    }

    /// From now on a barrier that fails loses what it was to write, but for the sectors of which `reaches` says that they
    /// reach the disk: see [`HostCache`].
    pub fn forget_after_failed_barriers(&self, reaches: impl Fn(u64) -> bool + Send + 'static) {
        let reaches: Reaches = Box::new(reaches);
        self.state.lock().cache = Some(HostCache::new(reaches));
    }

    /// The host writes back without being asked to, and fails. The next barrier reports that, once.
    pub fn write_back_fails(&self) {
        let mut state = self.state.lock();
        let covers = state.recorded.as_ref().map_or(0, Vec::len);
        let number = state.sync_began();
        state.sync_failed(number, covers);
        state.unreported = true;
    }

    /// The host drops its copies of what it takes for clean, as it does when it needs the memory.
    pub fn drop_clean_pages(&self) {
        self.state.lock().drop_clean();
    }

    /// How many sectors readers see that are on no disk and that no barrier will write.
    pub fn lost_sectors(&self) -> usize {
        self.state.lock().cache.as_ref().map_or(0, HostCache::lost)
    }

    /// Adds a fault.
    pub fn inject(&self, fault: Fault) {
        self.state.lock().faults.push(fault);
    }

    /// The host is well again.
    pub fn heal(&self) {
        self.state.lock().faults.clear();
    }

    /// How many operations have failed by a fault.
    pub fn failures(&self) -> u64 {
        self.state.lock().failures
    }

    /// How many operations there were, failed ones included.
    pub fn operations(&self) -> u64 {
        self.state.lock().operations
    }

    /// Which bytes [`Storage::start_write_out`] was called for, in order.
    pub fn write_outs(&self) -> Vec<Range<u64>> {
        self.state.lock().write_outs.clone()
    }

    /// Stops operations from now on.
    pub fn hold(self: &Arc<Self>, matches: impl Fn(&Operation) -> bool + Send + 'static) -> Hold {
        let mut state = self.state.lock();
        let id = state.next_hold;
        state.next_hold += 1;
        state.holds.push(HoldState { id, matches: Box::new(matches), stopped: 0 });
        Hold { storage: Arc::clone(self), id }
    }

    /// A write, whichever way the bytes come.
    fn change(&self, kind: WriteKind, offset: u64, data: &[u8], is_clone: bool) -> io::Result<()> {
        let (mut state, failure) = self.begin(&Operation { action: Action::Write(kind), at: offset, len: data.len() as u64, is_clone });
        match failure {
            None => {
                state.write(kind, offset, data);
                Ok(())
            }
            Some(failure) => {
                let done = failure.done(data.len());
                if done > 0 {
                    state.write(kind, offset, &data[..done]);
                }
                Err(failure.error())
            }
        }
    }

    /// The begin of every operation: it may be stopped here, then it may fail.
    fn begin(&self, operation: &Operation) -> (MutexGuard<'_, State>, Option<Failure>) {
        let mut state = self.state.lock();
        state.operations += 1;
        if let Some(hold) = state.holds.iter_mut().find(|hold| (hold.matches)(operation)) {
            let id = hold.id;
            hold.stopped += 1;
            self.changed.notify_all();
            while state.holds.iter().any(|hold| hold.id == id) {
                self.changed.wait(&mut state);
            }
        }
        let mut failure = None;
        for fault in &mut state.faults {
            if !(fault.matches)(operation) {
                continue;
            }
            if fault.after > 0 {
                fault.after -= 1;
                continue;
            }
            failure = Some(fault.failure);
            if fault.times == Times::Once {
                fault.after = u64::MAX;
            }
            break;
        }
        state.failures += u64::from(failure.is_some());
        (state, failure)
    }
}

impl Hold {
    /// Waits until at least `count` operations stand here: the race that the test is about is really there.
    pub fn wait_for(&self, count: u64) {
        let mut state = self.storage.state.lock();
        while state.holds.iter().find(|hold| hold.id == self.id).is_some_and(|hold| hold.stopped < count) {
            self.storage.changed.wait(&mut state);
        }
    }

    /// How many operations stand here.
    pub fn stopped(&self) -> u64 {
        self.storage.state.lock().holds.iter().find(|hold| hold.id == self.id).map_or(0, |hold| hold.stopped)
    }
}

impl Drop for Hold {
    fn drop(&mut self) {
        self.storage.state.lock().holds.retain(|hold| hold.id != self.id);
        self.storage.changed.notify_all();
    }
}

/// The numbers of a barrier: for the observer, and for the cache.
type Barrier = (Option<u64>, Option<u64>);

impl State {
    fn sync_began(&mut self) -> Barrier {
        let observed = self.observer.as_mut().map(|observer| observer.sync_began());
        (observed, self.cache.as_mut().map(HostCache::write_back_began))
    }

    fn sync_failed(&mut self, (observed, cached): Barrier, covers: usize) {
        if let (Some(observer), Some(number)) = (&mut self.observer, observed) {
            observer.sync_failed(number);
        }
        if let (Some(cache), Some(number)) = (&mut self.cache, cached) {
            cache.write_back_ended(number, false);
        }
        if let Some(recorded) = &mut self.recorded {
            recorded.push(Recorded::SyncFailed { covers });
        }
    }

    fn drop_clean(&mut self) {
        if let Some(cache) = &mut self.cache {
            cache.drop_clean(&mut self.bytes);
        }
    }

    fn write(&mut self, kind: WriteKind, at: u64, data: &[u8]) {
        if let Some(observer) = &mut self.observer {
            observer.write(kind, at, data);
        }
        let (start, end) = (at as usize, at as usize + data.len());
        if let Some(cache) = &mut self.cache {
            cache.changes(&self.bytes, start..end);
        }
        let len = self.bytes.len().max(end);
        self.bytes.resize(len, 0);
        self.bytes[start..end].copy_from_slice(data);
        if let Some(recorded) = &mut self.recorded {
            recorded.push(Recorded::Write { kind, at, data: data.into() });
        }
    }
}

impl Storage for SimStorage {
    fn size(&self) -> u64 {
        self.state.lock().bytes.len() as u64
    }

    fn allocated_size(&self) -> io::Result<u64> {
        Ok(self.size())
    }

    fn version(&self, ask: Ask) -> io::Result<Version> {
        let mut state = self.state.lock();
        if ask == Ask::Anew {
            state.known = state.version;
        }
        // Nobody but the engine changes the size of a file of its own.
        Ok(Version { size: 0, modified: Some((0, state.known)) })
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        let (state, failure) = self.begin(&Operation { action: Action::Read, at: offset, len: buf.len() as u64, is_clone: false });
        if let Some(failure) = failure {
            return Err(failure.error());
        }
        let start = state.bytes.len().min(offset as usize);
        let here = buf.len().min(state.bytes.len() - start);
        buf[..here].copy_from_slice(&state.bytes[start..start + here]);
        buf[here..].fill(0);
        Ok(())
    }

    fn read_cached(&self, offset: u64, buf: &mut [u8]) -> bool {
        let state = self.state.lock();
        let place = usize::try_from(offset).ok().and_then(|start| Some(start..start.checked_add(buf.len())?));
        let bytes = place.and_then(|place| state.bytes.get(place)).filter(|_| state.in_memory);
        bytes.map(|bytes| buf.copy_from_slice(bytes)).is_some()
    }

    fn write_at(&self, kind: WriteKind, offset: u64, data: &[u8]) -> io::Result<()> {
        self.change(kind, offset, data, false)
    }

    fn can_clone(&self, source: CloneSource<'_>) -> io::Result<()> {
        let possible = source.of_kind::<SimStorage>().is_some() && self.state.lock().clones > 0;
        possible.then_some(()).ok_or(Errno::OPNOTSUPP.into())
    }

    /// Refuses what a file system refuses. The bytes are those of the moment of the clone; for order, faults and losses of power it is a write.
    fn clone_range(&self, kind: WriteKind, source: CloneSource<'_>, from: u64, to: u64, len: u64) -> io::Result<()> {
        let block = self.state.lock().clones;
        let (Some(source), 1..) = (source.of_kind::<SimStorage>(), block) else { return Err(Errno::OPNOTSUPP.into()) };
        let bytes = {
            let (state, failure) = source.begin(&Operation { action: Action::CloneFrom, at: from, len, is_clone: true });
            if let Some(failure) = failure {
                return Err(failure.error());
            }
            let whole = len > 0 && [from, to, len].iter().all(|number| number.is_multiple_of(block));
            match state.bytes.get(from as usize..(from + len) as usize) {
                Some(bytes) if whole => bytes.to_vec(),
                _ => return Err(Errno::INVAL.into()),
            }
        };
        self.change(kind, to, &bytes, true)
    }

    /// A hint: no operation, so that it changes no schedule of those.
    fn start_write_out(&self, offset: u64, len: u64) {
        self.state.lock().write_outs.push(offset..offset + len);
    }

    fn punch_hole(&self, offset: u64, len: u64) -> io::Result<()> {
        let (mut state, failure) = self.begin(&Operation { action: Action::Punch, at: offset, len, is_clone: false });
        if let Some(failure) = failure {
            return Err(failure.error());
        }
        if let Some(observer) = &mut state.observer {
            observer.punch(offset, len);
        }
        let start = state.bytes.len().min(offset as usize);
        let end = state.bytes.len().min((offset + len) as usize);
        let State { cache, bytes, .. } = &mut *state;
        if let Some(cache) = cache {
            cache.changes(bytes, start..end);
        }
        bytes[start..end].fill(0);
        if let Some(recorded) = &mut state.recorded {
            recorded.push(Recorded::Punch { at: offset, len });
        }
        Ok(())
    }

    fn sync(&self) -> io::Result<()> {
        let (covers, barrier) = {
            let mut state = self.state.lock();
            (state.recorded.as_ref().map_or(0, Vec::len), state.sync_began())
        };
        let (mut state, failure) = self.begin(&Operation { action: Action::Sync, at: 0, len: 0, is_clone: false });
        if let Some(failure) = failure {
            state.sync_failed(barrier, covers);
            return Err(failure.error());
        }
        if let (Some(observer), Some(number)) = (&mut state.observer, barrier.0) {
            observer.sync_ended(number);
        }
        if let (Some(cache), Some(number)) = (&mut state.cache, barrier.1) {
            cache.write_back_ended(number, true);
        }
        if let Some(recorded) = &mut state.recorded {
            recorded.push(Recorded::Sync { covers });
        }
        // What this barrier was to write is written; what it reports is of before.
        if std::mem::take(&mut state.unreported) { Err(Errno::IO.into()) } else { Ok(()) }
    }

    fn drop_cache(&self) -> io::Result<()> {
        let synced = self.sync();
        let mut state = self.state.lock();
        state.drop_clean();
        let State { observer, bytes, .. } = &mut *state;
        if let Some(observer) = observer {
            observer.dropped(bytes);
        }
        synced
    }

    fn open_mark(&self) -> io::Result<OpenMark> {
        Ok(if self.state.lock().marked { OpenMark::Present } else { OpenMark::Absent })
    }

    /// Without a barrier, unlike the file of a host: a rule of order that only that barrier keeps would not be tested.
    fn set_open_mark(&self) -> io::Result<()> {
        self.state.lock().marked = true;
        Ok(())
    }

    fn remove_open_mark(&self) -> io::Result<()> {
        self.state.lock().marked = false;
        Ok(())
    }

    fn holding(&self, offset: u64, max: u64) -> io::Result<(Holding, u64)> {
        match self.size().checked_sub(offset) {
            None | Some(0) => Ok((Holding::Hole, max)),
            Some(here) => Ok((Holding::Data, here.min(max))),
        }
    }
}

impl std::fmt::Debug for SimStorage {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("SimStorage").field("size", &self.size()).finish_non_exhaustive()
    }
}

impl std::fmt::Debug for Hold {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Hold").field("stopped", &self.stopped()).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn faults_come_in_their_turn() {
        let file = SimStorage::new(vec![1; 100]);
        let matches = |operation: &Operation| operation.action == Action::Write(WriteKind::Data);
        file.inject(Fault { matches: Box::new(matches), after: 1, failure: Failure::Short(3, 28), times: Times::Once });
        file.write_at(WriteKind::Data, 0, &[2; 10]).unwrap();
        file.write_at(WriteKind::Header, 10, &[2; 10]).unwrap();
        assert_eq!(file.write_at(WriteKind::Data, 20, &[2; 10]).unwrap_err().raw_os_error(), Some(28));
        file.write_at(WriteKind::Data, 30, &[2; 1]).unwrap();
        let bytes = file.bytes();
        assert_eq!((&bytes[18..24], bytes[30], file.failures()), (&[2, 2, 2, 2, 2, 1][..], 2, 1));
    }

    #[test]
    fn a_barrier_covers_what_was_done_when_it_was_called() {
        let file = SimStorage::new(Vec::new());
        file.record();
        file.write_at(WriteKind::Data, 0, &[1]).unwrap();
        let hold = file.hold(|operation| operation.action == Action::Sync);
        std::thread::scope(|scope| {
            scope.spawn(|| file.sync().unwrap());
            hold.wait_for(1);
            file.write_at(WriteKind::Data, 1, &[1]).unwrap();
            assert_eq!(hold.stopped(), 1);
            drop(hold);
        });
        assert_eq!(file.recorded()[2], Recorded::Sync { covers: 1 });
    }
}
