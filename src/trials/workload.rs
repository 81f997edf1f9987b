//! The workloads of the crash tests: guest operations, the record of the changes that they make to
//! the file, and the values that each sector of the guest may have at each moment of that record
//! (P4).

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use engine::chain::Chain;
use engine::disk::{Disk, Local};
use host::Result;
use host::storage::WriteKind;
use qcow2::image::{Image, SearchStep};
use sim::spec::{Contents, Layout};
use sim::start::pattern;
use sim::{Action, JournalWrite, Operation, Recorded, SimJournal, SimStorage};
use sim::{Fault, HostFailure, Repeat};

/// One operation. Ranges are guest bytes, as start and length. `Display` and `parse` use one short
/// word for each operation, for the line that replays a failure.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Op {
    Write(u64, u64),
    /// Reads, and copies up the missing clusters.
    Read(u64, u64),
    Populate(u64, u64),
    /// Populates the whole disk and detaches the backing file.
    Stream,
    Discard(u64, u64),
    Zero(u64, u64),
    Flush,
    /// Flushes like the commit timer.
    Timer,
    Close,
    /// So many steps of the search for the leaks of a process that has died.
    Search(u64),
    Grow(u64),
    /// A flush, and another operation while the flush is at the barrier of this number (from 1).
    During(u64, Box<Op>),
    /// An operation during which the host has no space: its write of this number (from 0) and all
    /// later ones fail after one sector.
    Full(u64, Box<Op>),
}

impl fmt::Display for Op {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Op::Write(at, len) => write!(f, "w{at}+{len}"),
            Op::Read(at, len) => write!(f, "r{at}+{len}"),
            Op::Populate(at, len) => write!(f, "p{at}+{len}"),
            Op::Stream => f.write_str("s"),
            Op::Discard(at, len) => write!(f, "d{at}+{len}"),
            Op::Zero(at, len) => write!(f, "z{at}+{len}"),
            Op::Flush => f.write_str("f"),
            Op::Timer => f.write_str("t"),
            Op::Close => f.write_str("c"),
            Op::Search(steps) => write!(f, "l{steps}"),
            Op::Grow(size) => write!(f, "g{size}"),
            Op::During(barrier, op) => write!(f, "b{barrier}:{op}"),
            Op::Full(write, op) => write!(f, "x{write}:{op}"),
        }
    }
}

impl Op {
    fn parse(word: &str) -> Option<Op> {
        let (kind, rest) = word.split_at_checked(1)?;
        let range = || {
            rest.split_once('+').and_then(|(at, len)| Some((at.parse().ok()?, len.parse().ok()?)))
        };
        Some(match kind {
            "w" => range().map(|(at, len)| Op::Write(at, len))?,
            "r" => range().map(|(at, len)| Op::Read(at, len))?,
            "p" => range().map(|(at, len)| Op::Populate(at, len))?,
            "d" => range().map(|(at, len)| Op::Discard(at, len))?,
            "z" => range().map(|(at, len)| Op::Zero(at, len))?,
            "s" => Op::Stream,
            "f" => Op::Flush,
            "t" => Op::Timer,
            "c" => Op::Close,
            "l" => Op::Search(rest.parse().ok()?),
            "g" => Op::Grow(rest.parse().ok()?),
            "x" => rest.split_once(':').and_then(|(write, op)| {
                Some(Op::Full(write.parse().ok()?, Box::new(Op::parse(op)?)))
            })?,
            "b" => rest.split_once(':').and_then(|(barrier, op)| {
                Some(Op::During(barrier.parse().ok()?, Box::new(Op::parse(op)?)))
            })?,
            _ => return None,
        })
    }

    /// Parses operations that are separated by commas.
    pub fn parse_all(text: &str) -> Option<Vec<Op>> {
        text.split(',').map(Op::parse).collect()
    }
}

pub fn written(ops: &[Op]) -> String {
    ops.iter().map(Op::to_string).collect::<Vec<_>>().join(",")
}

pub type Sector = [u8; 512];

/// An image file, and the raw file below it.
#[derive(Clone)]
pub struct Files {
    pub overlay: Vec<u8>,
    pub base: Arc<Vec<u8>>,
    /// The base can be cloned in blocks of this many bytes; 0 if it cannot be cloned.
    pub clones: u64,
}

impl Files {
    /// Returns one sector as the guest reads it according to the specification.
    pub fn sector(&self, layout: &Layout, overlay: &[u8], sector: u64) -> Sector {
        let from = |bytes: &[u8], at: usize| {
            let mut content = [0; 512];
            let part = &bytes[bytes.len().min(at)..bytes.len().min(at + 512)];
            content[..part.len()].copy_from_slice(part);
            content
        };
        match layout.find(overlay, sector * 512) {
            Contents::Data(at) => from(overlay, at as usize),
            Contents::Unallocated if layout.backing.0 != 0 => {
                from(&self.base, sector as usize * 512)
            }
            Contents::Unallocated | Contents::Zero => [0; 512],
            Contents::Compressed(..) => panic!("no workload begins with compressed clusters"),
        }
    }

    /// Returns the whole disk as the guest reads it according to the specification.
    pub fn guest(&self) -> Vec<u8> {
        let layout = Layout::of(&self.overlay).expect("a good image");
        (0..layout.size / 512)
            .flat_map(|sector| self.sector(&layout, &self.overlay, sector))
            .collect()
    }

    /// Opens a disk on `storage` above this base.
    pub fn open(&self, storage: Arc<SimStorage>) -> Result<Disk> {
        storage.allow_clones(self.clones);
        let image = Image::open(storage)?;
        image.begin_writing()?;
        Ok(self.disk_of(image))
    }

    /// Opens a disk as [`Files::open`] does, with a journal.
    fn open_journaled(&self, storage: Arc<SimStorage>, journal: Arc<SimJournal>) -> Result<Disk> {
        storage.allow_clones(self.clones);
        let image = Image::open(storage)?.with_journal(journal)?;
        image.begin_writing()?;
        Ok(self.disk_of(image))
    }

    /// Makes a disk of an image above this base, if its header still names one.
    pub fn disk_of(&self, image: Image) -> Disk {
        let chain = image.reader().backing().map(|_| {
            let base = SimStorage::new(self.base.to_vec());
            base.keep_in_memory(true);
            Chain::of_raw(base)
        });
        Disk::for_tests(image, chain).copying_up(true)
    }
}

/// A change that a loss of power must not undo.
#[derive(Clone, Copy, Debug)]
pub enum Fact {
    SizeAtLeast(u64),
    Detached,
}

/// The record of one run of a workload.
pub struct Story {
    pub files: Files,
    pub records: Vec<Recorded>,
    /// For each sector: its values, oldest first, each with the length of the record when the write
    /// began.
    pub values: Vec<Vec<(usize, Sector)>>,
    /// After each flush: the length of the record when it returned, and for each sector the index
    /// of the oldest value that it may still have.
    pub floors: Vec<(usize, Vec<usize>)>,
    pub facts: Vec<(usize, Fact)>,
    /// The writes into the journal.
    pub journal: Vec<JournalWrite>,
    /// After each operation that succeeded: the length of the record, the number of writes into the
    /// journal, and for each sector the index of the oldest value that a successor may read.
    pub answered: Vec<(usize, usize, Vec<usize>)>,
    /// The length of the record when each operation began.
    pub begun: Vec<usize>,
    /// The content that the guest should read at the end.
    pub now: Vec<u8>,
    /// The file after the last operation.
    pub end: Vec<u8>,
    /// Whether the barrier that was to fail did fail.
    pub failed: bool,
}

/// Size of the journal in bytes: more records than any workload makes between two flushes, because
/// a change that waits for a flush would wait for ever for one that a workload has stopped.
pub const JOURNAL: u64 = 256 << 10;

struct Teller {
    storage: Arc<SimStorage>,
    journal: Arc<SimJournal>,
    /// Changes of the file before the record of `storage` begins.
    before: usize,
    disk: Arc<Disk>,
    story: Story,
    writes: u64,
    may_fail: bool,
}

/// Runs a workload and checks the order of its writes. With `failing_barrier`, the barrier of that
/// number (from 0) fails, and operations may fail from then on.
pub fn play(files: &Files, ops: &[Op], failing_barrier: Option<u64>) -> Story {
    let storage = SimStorage::checked(files.overlay.clone());
    let layout = Layout::of(&files.overlay).expect("a good image to begin with");
    let now: Vec<u8> = (0..layout.size / 512)
        .flat_map(|sector| files.sector(&layout, &files.overlay, sector))
        .collect();
    let values = now.as_chunks().0.iter().map(|sector| vec![(0, *sector)]).collect();
    storage.record();
    if let Some(after) = failing_barrier {
        let matches = Box::new(|operation: &Operation| operation.action == Action::Sync);
        storage.inject(Fault {
            matches,
            after,
            failure: HostFailure::Errno(5),
            times: Repeat::Once,
        });
    }
    let story = Story {
        files: files.clone(),
        records: Vec::new(),
        values,
        floors: Vec::new(),
        facts: Vec::new(),
        journal: Vec::new(),
        answered: Vec::new(),
        begun: Vec::new(),
        now,
        end: Vec::new(),
        failed: false,
    };
    let journal = SimJournal::new(JOURNAL, &storage);
    let disk = match files.open_journaled(Arc::clone(&storage), Arc::clone(&journal)) {
        Ok(disk) => disk,
        Err(error) => {
            assert!(failing_barrier.is_some(), "{error}");
            return Story {
                records: storage.recorded(),
                end: storage.bytes(),
                failed: true,
                ..story
            };
        }
    };
    let mut teller = Teller {
        storage,
        journal,
        before: 0,
        disk: Arc::new(disk),
        story,
        writes: 100,
        may_fail: failing_barrier.is_some(),
    };
    teller.tell_all(ops);
    let failed = failing_barrier.is_some() && teller.storage.failures() > 0;
    if failed {
        teller.has_latched();
    }
    Story {
        failed,
        records: teller.storage.recorded(),
        journal: teller.journal.writes(),
        end: teller.storage.bytes(),
        ..teller.story
    }
}

/// Goes on with a workload whose process has died after `at` changes of its file, in the successor
/// `disk`. `storage` records since the successor opened it, and `journal` is its journal. The story
/// that is returned has the changes of both processes.
pub fn go_on(
    story: &Story,
    at: usize,
    (storage, journal, disk): (Arc<SimStorage>, Arc<SimJournal>, Disk),
    ops: &[Op],
) -> Story {
    let mut now = vec![0; disk.size() as usize];
    disk.read(0, &mut now).expect("a successor reads");
    let mut values: Vec<Vec<_>> = story.values.clone();
    values.resize(now.len() / 512, vec![(0, [0; 512])]);
    for (values, found) in values.iter_mut().zip(now.as_chunks::<512>().0) {
        values.retain(|(from, _)| *from <= at);
        if values.last().is_none_or(|(_, last)| last != found) {
            values.push((at, *found));
        }
    }
    let is_before = |from: &usize| *from <= at;
    let story = Story {
        files: story.files.clone(),
        records: Vec::new(),
        values,
        floors: story.floors.iter().filter(|(from, _)| is_before(from)).cloned().collect(),
        facts: story.facts.iter().filter(|(from, _)| is_before(from)).copied().collect(),
        journal: Vec::new(),
        answered: Vec::new(),
        begun: story.begun.iter().copied().filter(is_before).collect(),
        now,
        end: Vec::new(),
        failed: false,
    };
    let mut teller = Teller {
        storage,
        journal,
        before: at,
        disk: Arc::new(disk),
        story,
        writes: 1_000_000,
        may_fail: false,
    };
    teller.tell_all(ops);
    Story { records: teller.storage.recorded(), end: teller.storage.bytes(), ..teller.story }
}

impl Teller {
    fn tell_all(&mut self, ops: &[Op]) {
        for op in ops {
            let position = self.position();
            self.story.begun.push(position);
            self.tell(op);
        }
    }

    fn position(&self) -> usize {
        self.before + self.storage.recorded_len()
    }

    /// Records that all operations so far are answered or have failed.
    fn answered(&mut self) {
        let newest = self.newest();
        self.story.answered.push((self.position(), self.journal.writes_len(), newest));
    }

    fn went<T>(&self, result: Result<T>) -> Option<T> {
        match result {
            Ok(value) => Some(value),
            Err(error) => {
                assert!(self.may_fail, "{error}");
                None
            }
        }
    }

    fn tell(&mut self, op: &Op) {
        match *op {
            Op::Write(at, len) => {
                self.writes += 1;
                let first = at / 512;
                let data: Vec<u8> = (first..(at + len).div_ceil(512))
                    .flat_map(|sector| pattern(self.writes, sector))
                    .collect();
                let data = &data[(at % 512) as usize..(at % 512 + len) as usize];
                self.becomes(at, data);
                if self.went(self.disk.write(at, data)).is_some() {
                    self.answered();
                }
            }
            Op::Read(at, len) => {
                let mut found = vec![0xee; len as usize];
                let read = read(&self.disk, at, &mut found);
                if self.went(read).is_some() && !self.may_fail {
                    assert!(
                        found == self.story.now[at as usize..(at + len) as usize],
                        "read of {len} at {at}"
                    );
                }
            }
            Op::Populate(at, len) => drop(self.went(self.disk.populate(at..at + len, usize::MAX))),
            Op::Stream => {
                let kept = self.newest();
                let size = self.disk.size();
                let streamed = self
                    .disk
                    .populate(0..size, usize::MAX)
                    .and_then(|_| self.disk.detach_backing(usize::MAX, None));
                let had_backing = Layout::unchecked(&self.story.files.overlay).backing.0 != 0;
                if self.went(streamed).is_some() && had_backing && !self.is_detached() {
                    self.keeps(kept);
                    let position = self.position();
                    self.story.facts.push((position, Fact::Detached));
                }
            }
            Op::Discard(at, len) => {
                self.becomes(at, &vec![0; len as usize]);
                if self.went(self.disk.discard(at..at + len)).is_some() {
                    self.answered();
                }
            }
            Op::Zero(at, len) => {
                self.becomes(at, &vec![0; len as usize]);
                if self.went(self.disk.write_zeroes(at..at + len)).is_some() {
                    self.answered();
                }
            }
            Op::Flush | Op::Close => {
                let kept = self.newest();
                let flushed = if *op == Op::Flush { self.disk.flush() } else { self.disk.close() };
                if self.went(flushed).is_some() {
                    self.keeps(kept);
                }
            }
            Op::Timer => drop(self.went(self.disk.flush_if_dirty())),
            Op::Search(steps) => {
                for _ in 0..steps {
                    if self
                        .went(self.disk.search_step())
                        .is_none_or(|step| step != SearchStep::Part)
                    {
                        break;
                    }
                }
            }
            Op::Grow(size) => {
                let size = size.max(self.disk.size());
                self.story.now.resize(size as usize, 0);
                self.story.values.resize(size as usize / 512, vec![(0, [0; 512])]);
                if self.went(self.disk.grow(size)).is_some() {
                    let position = self.position();
                    self.story.facts.push((position, Fact::SizeAtLeast(size)));
                } else {
                    let size = self.disk.size();
                    self.story.now.truncate(size as usize);
                }
            }
            Op::During(barrier, ref inner) => self.during(barrier, inner),
            Op::Full(write, ref inner) => self.full(write, inner),
        }
    }

    /// Flushes on another thread and runs the inner operation while that flush is stopped at its
    /// barrier of number `barrier`. If the flush has fewer barriers, the operation runs after it.
    fn during(&mut self, barrier: u64, inner: &Op) {
        let kept = self.newest();
        let seen = AtomicU64::new(0);
        let hold = self.storage.hold(move |operation| {
            operation.action == Action::Sync && seen.fetch_add(1, Ordering::SeqCst) + 1 == barrier
        });
        let disk = Arc::clone(&self.disk);
        let flush = std::thread::spawn(move || disk.flush());
        while hold.stopped() == 0 && !flush.is_finished() {
            std::thread::yield_now();
        }
        self.tell(inner);
        drop(hold);
        let flushed = flush.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        if self.went(flushed).is_some() {
            self.keeps(kept);
        }
    }

    /// Runs an operation on a host without space and checks P5: each sector of the guest has its
    /// old or its new value, and keeps it.
    fn full(&mut self, write: u64, inner: &Op) {
        // Header writes are a few bytes in one page, so the host writes all of them or nothing.
        let header = |operation: &Operation| operation.action == Action::Write(WriteKind::Header);
        let other = move |operation: &Operation| {
            matches!(operation.action, Action::Write(_)) && !header(operation)
        };
        let times = Repeat::ForEver;
        self.storage.inject(Fault {
            matches: Box::new(header),
            after: (write + 1) / 4,
            failure: HostFailure::Errno(28),
            times,
        });
        self.storage.inject(Fault {
            matches: Box::new(other),
            after: write,
            failure: HostFailure::Short(512, 28),
            times,
        });
        let (before, began) = (self.storage.failures(), self.position());
        self.may_fail = true;
        self.tell(inner);
        self.storage.heal();
        self.may_fail = false;
        if self.storage.failures() == before {
            return;
        }
        let mut found = vec![0; self.disk.size() as usize];
        self.disk.read(0, &mut found).expect("there is space again");
        for (sector, value) in found.as_chunks::<512>().0.iter().enumerate() {
            let values = &mut self.story.values[sector];
            let (newest, before) =
                (values[values.len() - 1].1, values[values.len().saturating_sub(2)].1);
            let is_of_either = value
                .iter()
                .zip(newest)
                .zip(before)
                .all(|((&value, newest), before)| value == newest || value == before);
            assert!(
                is_of_either,
                "P5: sector {sector} is neither as before nor as after a write that failed"
            );
            if *value != newest {
                values.push((began, *value));
            }
        }
        self.story.now = found;
    }

    fn is_detached(&self) -> bool {
        self.story.facts.iter().any(|(_, fact)| matches!(fact, Fact::Detached))
    }

    /// Records a guest write: from now on each of its sectors may have the old value or the new
    /// one.
    fn becomes(&mut self, at: u64, data: &[u8]) {
        let position = self.position();
        let end = at + data.len() as u64;
        self.story.now[at as usize..end as usize].copy_from_slice(data);
        for sector in (at / 512) as usize..end.div_ceil(512) as usize {
            let mut value = [0; 512];
            value.copy_from_slice(&self.story.now[sector * 512..][..512]);
            self.story.values[sector].push((position, value));
        }
    }

    /// Returns the index of the newest value of each sector.
    fn newest(&self) -> Vec<usize> {
        self.story.values.iter().map(|values| values.len() - 1).collect()
    }

    /// Records that a flush has returned: each sector has the value that was newest when the flush
    /// was called, or a later one.
    fn keeps(&mut self, mut newest: Vec<usize>) {
        newest.resize(self.story.values.len(), 0);
        let position = self.position();
        self.story.floors.push((position, newest));
    }

    /// Checks P7: after a failed barrier the disk accepts no write and changes nothing in the file,
    /// although barriers succeed again.
    fn has_latched(&self) {
        let before = self.position();
        assert!(self.disk.flush().is_err(), "P7: a flush after a failed barrier");
        assert!(self.disk.write(0, &[1; 512]).is_err(), "P7: a write after a failed barrier");
        assert!(
            self.disk.write_zeroes(0..self.disk.size()).is_err() || self.position() == before,
            "P7: zeroes after a failed barrier"
        );
        assert!(
            self.disk.flush().is_err() && self.disk.close().is_err(),
            "P7: a flush after a failed barrier"
        );
        assert_eq!(self.position(), before, "P7: the file changes after a failed barrier");
        let mut all = vec![0; self.disk.size() as usize];
        self.disk.read(0, &mut all).expect("reads go on");
        assert_eq!(self.position(), before, "P7: the file changes after a failed barrier");
    }
}

/// Reads like a transport: first the calls that never wait, then, if neither can answer, the call
/// that may wait.
fn read(disk: &Disk, at: u64, buf: &mut [u8]) -> Result<()> {
    if disk.read_local(at, buf)? == Local::Done
        || disk.read_cached(at, buf, &mut |_| ())? == Local::Done
    {
        return Ok(());
    }
    disk.read(at, buf)
}
