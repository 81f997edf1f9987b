//! The simulated file: bytes in memory behind the storage traits.

use std::io;
use std::ops::Range;
use std::sync::Arc;

use rustix::io::Errno;

use super::fault::{Fault, HostFailure, Matches, Repeat};
use super::host_cache::{HostCache, Reaches};
use super::order::OrderChecker;
use host::storage::{
    Ask, BlockStatus, CloneSource, OpenMark, ReadAt, Sidecar, Storage, Version, WriteKind,
};
use host::sync::unranked::{Condvar, Mutex, MutexGuard};

/// The kind of an operation.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Action {
    /// [`host::storage::ReadAt::read_at`].
    Read,
    /// [`Storage::clone_range`] of this file into another one. In the other file it is an
    /// [`Action::Write`] after that.
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
    /// The kind of operation.
    pub action: Action,
    /// Offset in bytes; 0 for a barrier.
    pub at: u64,
    /// Length in bytes; 0 for a barrier.
    pub len: u64,
    /// This is one of the two sides of a clone. If it fails, the caller can copy the bytes instead.
    pub is_clone: bool,
}

/// A change that was made, for [`SimStorage::recorded`].
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Recorded {
    /// Bytes were written.
    Write {
        /// Kind of the data.
        kind: WriteKind,
        /// Offset in bytes.
        at: u64,
        /// The data.
        data: Box<[u8]>,
    },
    /// A range became zero.
    Punch {
        /// Offset in bytes.
        at: u64,
        /// Length in bytes.
        len: u64,
    },
    /// A barrier returned.
    Sync {
        /// How many of the entries before it the barrier covers: those that were done when it was
        /// called.
        covers: usize,
    },
    /// A barrier failed.
    SyncFailed {
        /// How many of the entries before it the barrier was to cover. Each of them may be on disk
        /// or not, and no later barrier changes that.
        covers: usize,
    },
}

/// Receives every change in order, while it is made. Panics if a change is wrong.
pub trait Observer: Send {
    /// Is called before bytes are written.
    fn write(&mut self, kind: WriteKind, at: u64, data: &[u8]);
    /// Is called before a range becomes zero.
    fn punch(&mut self, at: u64, len: u64);
    /// Is called when a barrier is called. Returns a number for [`Observer::sync_ended`].
    fn sync_began(&mut self) -> u64;
    /// Is called when the barrier `number` has done its work.
    fn sync_ended(&mut self, number: u64);
    /// Is called when the barrier `number` has failed: the changes that it covers may be on disk or
    /// not, and no later barrier writes them.
    fn sync_failed(&mut self, _number: u64) {}
    /// Is called when the host has dropped its cache; `bytes` are those of the disk.
    fn dropped(&mut self, _bytes: &[u8]) {}
}

/// When a host learns that another program has changed a file.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Told {
    /// At once: the file is on this host.
    AtOnce,
    /// At the next query: the file is on another machine.
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
    /// Size of the blocks that can be cloned into this file, in bytes; 0 if none can.
    clones: u64,
    in_memory: bool,
    no_facts: bool,
    /// How many times another program changed the bytes, and how many of those changes this host
    /// knows.
    version: u32,
    known: u32,
    /// Whether the file has the open mark, an attribute beside the bytes.
    marked: bool,
    /// `None` on a host where a failed barrier loses no data.
    cache: Option<HostCache>,
    /// A write-back failed that no barrier has requested: the next barrier reports it.
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
    /// How many operations are stopped here.
    stopped: u64,
}

/// Stops every matching operation before it does anything, until this value is dropped.
pub struct Stop {
    storage: Arc<SimStorage>,
    id: u64,
}

impl SimStorage {
    /// Makes a file with these bytes.
    pub fn new(bytes: Vec<u8>) -> Arc<SimStorage> {
        Arc::new(SimStorage {
            state: Mutex::new(State { bytes, ..State::default() }),
            changed: Condvar::new(),
        })
    }

    /// Makes a file with these bytes, an image. It panics when a rule of order is broken.
    ///
    /// # Panics
    /// If the bytes are not an image.
    pub fn checked(bytes: Vec<u8>) -> Arc<SimStorage> {
        let file = SimStorage::new(bytes.clone());
        file.observe(Box::new(OrderChecker::new(bytes)));
        file
    }

    /// Returns the bytes that a reader sees now. These are also the bytes that a killed process
    /// leaves.
    pub fn bytes(&self) -> Vec<u8> {
        self.state.lock().bytes.clone()
    }

    /// Starts to record, with an empty record.
    pub fn record(&self) {
        self.state.lock().recorded = Some(Vec::new());
    }

    /// Returns the changes since [`SimStorage::record`], and continues with an empty record.
    pub fn recorded(&self) -> Vec<Recorded> {
        self.state.lock().recorded.replace(Vec::new()).unwrap_or_default()
    }

    /// Returns how many changes are in the record.
    pub fn recorded_len(&self) -> usize {
        self.state.lock().recorded.as_ref().map_or(0, Vec::len)
    }

    /// Shows every later change to `observer`.
    pub fn observe(&self, observer: Box<dyn Observer>) {
        self.state.lock().observer = Some(observer);
    }

    /// Allows blocks of `block` bytes to be cloned into this file, as on XFS or btrfs. 0, the
    /// initial value, allows none.
    pub fn allow_clones(&self, block: u64) {
        self.state.lock().clones = block;
    }

    /// Sets whether the whole file is in the host's memory, so that reads that may not wait
    /// succeed. Such reads do not count as operations.
    pub fn keep_in_memory(&self, keep: bool) {
        self.state.lock().in_memory = keep;
    }

    /// Makes [`ReadAt::allocated_size`] fail with EIO from now on.
    pub fn withhold_facts(&self) {
        self.state.lock().no_facts = true;
    }

    /// Overwrites the file as another program would. With [`Told::WhenItAsks`] this host does not
    /// know of the change until it queries the version.
    pub fn overwrite(&self, bytes: Vec<u8>, told: Told) {
        let mut state = self.state.lock();
        state.bytes = bytes;
        state.version += 1;
        if told == Told::AtOnce {
            state.known = state.version;
        }
    }

    /// Makes failed barriers lose the data that they were to write, except for the sectors for
    /// which `reaches` returns true: see `host_cache.rs`.
    pub fn forget_after_failed_barriers(&self, reaches: impl Fn(u64) -> bool + Send + 'static) {
        let reaches: Reaches = Box::new(reaches);
        self.state.lock().cache = Some(HostCache::new(reaches));
    }

    /// Simulates a write-back that no barrier has requested and that fails. The next barrier
    /// reports the failure, once.
    pub fn write_back_fails(&self) {
        let mut state = self.state.lock();
        let covers = state.recorded.as_ref().map_or(0, Vec::len);
        let number = state.sync_began();
        state.sync_failed(number, covers);
        state.unreported = true;
    }

    /// Drops the pages that the host considers clean, as it does when it needs the memory.
    pub fn drop_clean_pages(&self) {
        self.state.lock().drop_clean();
    }

    /// Returns how many sectors readers see that are on no disk and that no barrier will write.
    pub fn lost_sectors(&self) -> usize {
        self.state.lock().cache.as_ref().map_or(0, HostCache::lost)
    }

    /// Adds a fault.
    pub fn inject(&self, fault: Fault) {
        self.state.lock().faults.push(fault);
    }

    /// Removes all faults.
    pub fn heal(&self) {
        self.state.lock().faults.clear();
    }

    /// Returns how many operations have failed by a fault.
    pub fn failures(&self) -> u64 {
        self.state.lock().failures
    }

    /// Returns how many operations there were, including failed ones.
    pub fn operations(&self) -> u64 {
        self.state.lock().operations
    }

    /// Returns the ranges for which [`Storage::start_write_out`] was called, in order.
    pub fn write_outs(&self) -> Vec<Range<u64>> {
        self.state.lock().write_outs.clone()
    }

    /// Stops matching operations from now on.
    pub fn hold(self: &Arc<Self>, matches: impl Fn(&Operation) -> bool + Send + 'static) -> Stop {
        let mut state = self.state.lock();
        let id = state.next_hold;
        state.next_hold += 1;
        state.holds.push(HoldState { id, matches: Box::new(matches), stopped: 0 });
        Stop { storage: Arc::clone(self), id }
    }

    /// Makes a write, of given or of cloned bytes.
    fn change(&self, kind: WriteKind, offset: u64, data: &[u8], is_clone: bool) -> io::Result<()> {
        let (mut state, failure) = self.begin(&Operation {
            action: Action::Write(kind),
            at: offset,
            len: data.len() as u64,
            is_clone,
        });
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

    /// Starts an operation: it may be stopped here, and then it may fail.
    fn begin(&self, operation: &Operation) -> (MutexGuard<'_, State>, Option<HostFailure>) {
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
            if fault.times == Repeat::Once {
                fault.after = u64::MAX;
            }
            break;
        }
        state.failures += u64::from(failure.is_some());
        (state, failure)
    }
}

impl Stop {
    /// Waits until at least `count` operations are stopped here, which proves that the race of the
    /// test takes place.
    pub fn wait_for(&self, count: u64) {
        let mut state = self.storage.state.lock();
        while state
            .holds
            .iter()
            .find(|hold| hold.id == self.id)
            .is_some_and(|hold| hold.stopped < count)
        {
            self.storage.changed.wait(&mut state);
        }
    }

    /// Returns how many operations are stopped here.
    pub fn stopped(&self) -> u64 {
        self.storage
            .state
            .lock()
            .holds
            .iter()
            .find(|hold| hold.id == self.id)
            .map_or(0, |hold| hold.stopped)
    }
}

impl Drop for Stop {
    fn drop(&mut self) {
        self.storage.state.lock().holds.retain(|hold| hold.id != self.id);
        self.storage.changed.notify_all();
    }
}

/// The numbers of a barrier: for the observer and for the cache.
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

impl ReadAt for SimStorage {
    fn size(&self) -> u64 {
        self.state.lock().bytes.len() as u64
    }

    fn allocated_size(&self) -> io::Result<u64> {
        if self.state.lock().no_facts { Err(Errno::IO.into()) } else { Ok(self.size()) }
    }

    fn version(&self, ask: Ask) -> io::Result<Version> {
        let mut state = self.state.lock();
        if ask == Ask::Anew {
            state.known = state.version;
        }
        // The size is constant: only the engine changes the size of its own file.
        Ok(Version { size: 0, modified: Some((0, state.known)) })
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        let (state, failure) = self.begin(&Operation {
            action: Action::Read,
            at: offset,
            len: buf.len() as u64,
            is_clone: false,
        });
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
        let place = usize::try_from(offset)
            .ok()
            .and_then(|start| Some(start..start.checked_add(buf.len())?));
        let bytes = place.and_then(|place| state.bytes.get(place)).filter(|_| state.in_memory);
        bytes.map(|bytes| buf.copy_from_slice(bytes)).is_some()
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

    fn status(&self, offset: u64, max: u64) -> io::Result<(BlockStatus, u64)> {
        match self.size().checked_sub(offset) {
            None | Some(0) => Ok((BlockStatus::Hole, max)),
            Some(here) => Ok((BlockStatus::Data, here.min(max))),
        }
    }
}

impl Storage for SimStorage {
    fn write_at(&self, kind: WriteKind, offset: u64, data: &[u8]) -> io::Result<()> {
        self.change(kind, offset, data, false)
    }

    fn can_clone(&self, source: CloneSource<'_>) -> io::Result<()> {
        let possible = source.of_kind::<SimStorage>().is_some() && self.state.lock().clones > 0;
        possible.then_some(()).ok_or(Errno::OPNOTSUPP.into())
    }

    /// Refuses what a file system refuses. The bytes are those at the moment of the clone. For
    /// order, faults and loss of power, a clone is a write.
    fn clone_range(
        &self,
        kind: WriteKind,
        source: CloneSource<'_>,
        from: u64,
        to: u64,
        len: u64,
    ) -> io::Result<()> {
        let block = self.state.lock().clones;
        let (Some(source), 1..) = (source.of_kind::<SimStorage>(), block) else {
            return Err(Errno::OPNOTSUPP.into());
        };
        let bytes = {
            let (state, failure) = source.begin(&Operation {
                action: Action::CloneFrom,
                at: from,
                len,
                is_clone: true,
            });
            if let Some(failure) = failure {
                return Err(failure.error());
            }
            let whole =
                len > 0 && [from, to, len].iter().all(|number| number.is_multiple_of(block));
            match state.bytes.get(from as usize..(from + len) as usize) {
                Some(bytes) if whole => bytes.to_vec(),
                _ => return Err(Errno::INVAL.into()),
            }
        };
        self.change(kind, to, &bytes, true)
    }

    /// Only records the hint. It does not count as an operation, so that it does not change the
    /// schedule of the operations.
    fn start_write_out(&self, offset: u64, len: u64) {
        self.state.lock().write_outs.push(offset..offset + len);
    }

    fn punch_hole(&self, offset: u64, len: u64) -> io::Result<()> {
        let (mut state, failure) =
            self.begin(&Operation { action: Action::Punch, at: offset, len, is_clone: false });
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
        let (mut state, failure) =
            self.begin(&Operation { action: Action::Sync, at: 0, len: 0, is_clone: false });
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
        // This barrier has written its data; the error that it reports is that of an earlier
        // write-back.
        if std::mem::take(&mut state.unreported) { Err(Errno::IO.into()) } else { Ok(()) }
    }
}

impl Sidecar for SimStorage {
    fn open_mark(&self) -> io::Result<OpenMark> {
        Ok(if self.state.lock().marked { OpenMark::Present } else { OpenMark::Absent })
    }

    /// Sets the mark without a barrier, unlike a host file: otherwise a rule of order could be
    /// satisfied by that barrier alone, and would not be tested.
    fn set_open_mark(&self) -> io::Result<()> {
        self.state.lock().marked = true;
        Ok(())
    }

    fn remove_open_mark(&self) -> io::Result<()> {
        self.state.lock().marked = false;
        Ok(())
    }
}

impl std::fmt::Debug for SimStorage {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("SimStorage").field("size", &self.size()).finish_non_exhaustive()
    }
}

impl std::fmt::Debug for Stop {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Stop").field("stopped", &self.stopped()).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use host::storage::{Access, CannotClone, FileStorage, cannot_clone};

    use super::*;

    #[test]
    fn faults_come_in_their_turn() {
        let file = SimStorage::new(vec![1; 100]);
        let matches = |operation: &Operation| operation.action == Action::Write(WriteKind::Data);
        file.inject(Fault {
            matches: Box::new(matches),
            after: 1,
            failure: HostFailure::Short(3, 28),
            times: Repeat::Once,
        });
        file.write_at(WriteKind::Data, 0, &[2; 10]).unwrap();
        file.write_at(WriteKind::Header, 10, &[2; 10]).unwrap();
        assert_eq!(
            file.write_at(WriteKind::Data, 20, &[2; 10]).unwrap_err().raw_os_error(),
            Some(28)
        );
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

    #[test]
    fn files_of_two_kinds_share_nothing() {
        let scratch = tempfile::NamedTempFile::new().unwrap();
        scratch.as_file().set_len(1 << 20).unwrap();
        let (file, memory) = (
            FileStorage::open(scratch.path(), Access::ReadWrite).unwrap(),
            SimStorage::new(vec![1; 1 << 20]),
        );
        memory.allow_clones(512);
        let answers = [
            file.can_clone(CloneSource::new(&*memory)),
            memory.can_clone(CloneSource::new(&file)),
            file.clone_range(WriteKind::NewCluster, CloneSource::new(&*memory), 0, 0, 4096),
            memory.clone_range(WriteKind::NewCluster, CloneSource::new(&file), 0, 0, 4096),
        ];
        for answer in answers {
            assert_eq!(cannot_clone(&answer.unwrap_err()), CannotClone::Ever);
        }
    }
}
