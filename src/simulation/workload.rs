//! What is done to a disk before its power goes: guest operations, the record of what they made of the file, and what every sector of the
//! guest may hold at every moment of that record (P4).

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use super::fault::{Failure, Fault, Times};
use super::spec::{Held, Layout};
use super::start::pattern;
use super::storage::{Action, Operation, Recorded, SimStorage};
use crate::Result;
use crate::chain::Chain;
use crate::disk::{Disk, Local};
use crate::image::Image;
use crate::storage::WriteKind;

/// One operation; ranges are guest bytes: start and length. Written and read as one short word each, for the line that replays a failure.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Op {
    Write(u64, u64),
    /// Copies up what is missing.
    Read(u64, u64),
    Populate(u64, u64),
    /// Copies everything up and cuts the chain.
    Stream,
    Discard(u64, u64),
    Zero(u64, u64),
    Flush,
    /// What the commit timer does.
    Timer,
    Close,
    Grow(u64),
    /// A flush, and another operation while its barrier of that number (from 1) is under way.
    During(u64, Box<Op>),
    /// An operation whose write of that number (from 0), and all that follow in it, find no space; one sector of each is done.
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
            Op::Grow(size) => write!(f, "g{size}"),
            Op::During(barrier, op) => write!(f, "b{barrier}:{op}"),
            Op::Full(write, op) => write!(f, "x{write}:{op}"),
        }
    }
}

impl Op {
    fn parse(word: &str) -> Option<Op> {
        let (kind, rest) = word.split_at_checked(1)?;
        let range = || rest.split_once('+').and_then(|(at, len)| Some((at.parse().ok()?, len.parse().ok()?)));
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
            "g" => Op::Grow(rest.parse().ok()?),
            "x" => rest.split_once(':').and_then(|(write, op)| Some(Op::Full(write.parse().ok()?, Box::new(Op::parse(op)?))))?,
            "b" => rest.split_once(':').and_then(|(barrier, op)| Some(Op::During(barrier.parse().ok()?, Box::new(Op::parse(op)?))))?,
            _ => return None,
        })
    }

    /// Operations separated by commas.
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
    /// Blocks of so many bytes of it can be cloned; none for 0.
    pub clones: u64,
}

impl Files {
    /// One sector of the guest as the specification has it read.
    pub fn sector(&self, layout: &Layout, overlay: &[u8], sector: u64) -> Sector {
        let from = |bytes: &[u8], at: usize| {
            let mut content = [0; 512];
            let part = &bytes[bytes.len().min(at)..bytes.len().min(at + 512)];
            content[..part.len()].copy_from_slice(part);
            content
        };
        match layout.find(overlay, sector * 512) {
            Held::Data(at) => from(overlay, at as usize),
            Held::Unallocated if layout.backing.0 != 0 => from(&self.base, sector as usize * 512),
            Held::Unallocated | Held::Zero => [0; 512],
            Held::Compressed(..) => panic!("no workload begins with compressed clusters"),
        }
    }

    /// All of the guest as the specification has it read.
    pub fn guest(&self) -> Vec<u8> {
        let layout = Layout::of(&self.overlay).expect("a good image");
        (0..layout.size / 512).flat_map(|sector| self.sector(&layout, &self.overlay, sector)).collect()
    }

    /// The disk above these files.
    pub fn open(&self, storage: Arc<SimStorage>) -> Result<Disk> {
        storage.allow_clones(self.clones);
        let image = Image::open(storage)?;
        let chain = image.reader().backing().map(|_| {
            let base = SimStorage::new(self.base.to_vec());
            base.keep_in_memory(true);
            Chain::of_raw(base)
        });
        image.begin_writing()?;
        Ok(Disk::for_tests(image, chain).copying_up(true))
    }
}

/// What a loss of power must not take back.
#[derive(Clone, Copy, Debug)]
pub enum Fact {
    SizeAtLeast(u64),
    Detached,
}

/// A workload as it went.
pub struct Story {
    pub files: Files,
    pub records: Vec<Recorded>,
    /// Of each sector: the values it was given, oldest first, each with the length of the record when that began.
    pub values: Vec<Vec<(usize, Sector)>>,
    /// From a length of the record on (a flush had returned), values before these of each sector are gone for good.
    pub floors: Vec<(usize, Vec<usize>)>,
    pub facts: Vec<(usize, Fact)>,
    /// The length of the record when each operation began.
    pub begun: Vec<usize>,
    /// What the guest should find at the end.
    pub now: Vec<u8>,
    /// The file at the end.
    pub end: Vec<u8>,
    /// The barrier that was to fail did.
    pub failed: bool,
}

struct Teller {
    storage: Arc<SimStorage>,
    disk: Arc<Disk>,
    story: Story,
    writes: u64,
    may_fail: bool,
}

/// Runs a workload, with the order of writes checked. With `failing_barrier` the barrier of that number (from 0) fails: operations may
/// fail from then on.
pub fn play(files: &Files, ops: &[Op], failing_barrier: Option<u64>) -> Story {
    let storage = SimStorage::checked(files.overlay.clone());
    let layout = Layout::of(&files.overlay).expect("a good image to begin with");
    let now: Vec<u8> = (0..layout.size / 512).flat_map(|sector| files.sector(&layout, &files.overlay, sector)).collect();
    let values = now.as_chunks().0.iter().map(|sector| vec![(0, *sector)]).collect();
    storage.record();
    if let Some(after) = failing_barrier {
        let matches = Box::new(|operation: &Operation| operation.action == Action::Sync);
        storage.inject(Fault { matches, after, failure: Failure::Errno(5), times: Times::Once });
    }
    let story = Story {
        files: files.clone(),
        records: Vec::new(),
        values,
        floors: Vec::new(),
        facts: Vec::new(),
        begun: Vec::new(),
        now,
        end: Vec::new(),
        failed: false,
    };
    let disk = match files.open(Arc::clone(&storage)) {
        Ok(disk) => disk,
        Err(error) => {
            assert!(failing_barrier.is_some(), "{error}");
            return Story { records: storage.recorded(), end: storage.bytes(), failed: true, ..story };
        }
    };
    let mut teller = Teller { storage, disk: Arc::new(disk), story, writes: 100, may_fail: failing_barrier.is_some() };
    for op in ops {
        let position = teller.position();
        teller.story.begun.push(position);
        teller.tell(op);
    }
    let failed = failing_barrier.is_some() && teller.storage.failures() > 0;
    if failed {
        teller.has_latched();
    }
    Story { failed, records: teller.storage.recorded(), end: teller.storage.bytes(), ..teller.story }
}

impl Teller {
    fn position(&self) -> usize {
        self.storage.recorded_len()
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
                let data: Vec<u8> = (first..(at + len).div_ceil(512)).flat_map(|sector| pattern(self.writes, sector)).collect();
                let data = &data[(at % 512) as usize..(at % 512 + len) as usize];
                self.becomes(at, data);
                self.went(self.disk.write(at, data));
            }
            Op::Read(at, len) => {
                let mut found = vec![0xee; len as usize];
                let read = read(&self.disk, at, &mut found);
                if self.went(read).is_some() && !self.may_fail {
                    assert!(found == self.story.now[at as usize..(at + len) as usize], "read of {len} at {at}");
                }
            }
            Op::Populate(at, len) => drop(self.went(self.disk.populate(at..at + len, usize::MAX))),
            Op::Stream => {
                let kept = self.newest();
                let size = self.disk.size();
                let streamed = self.disk.populate(0..size, usize::MAX).and_then(|_| self.disk.detach_backing(usize::MAX, None));
                let had_backing = Layout::unchecked(&self.story.files.overlay).backing.0 != 0;
                if self.went(streamed).is_some() && had_backing && !self.is_detached() {
                    self.keeps(kept);
                    let position = self.position();
                    self.story.facts.push((position, Fact::Detached));
                }
            }
            Op::Discard(at, len) => {
                self.becomes(at, &vec![0; len as usize]);
                self.went(self.disk.discard(at..at + len));
            }
            Op::Zero(at, len) => {
                self.becomes(at, &vec![0; len as usize]);
                self.went(self.disk.write_zeroes(at..at + len));
            }
            Op::Flush | Op::Close => {
                let kept = self.newest();
                let flushed = if *op == Op::Flush { self.disk.flush() } else { self.disk.close() };
                if self.went(flushed).is_some() {
                    self.keeps(kept);
                }
            }
            Op::Timer => drop(self.went(self.disk.flush_if_dirty())),
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

    /// A flush on another thread; the inner operation while it stands at a barrier, if it has so many.
    fn during(&mut self, barrier: u64, inner: &Op) {
        let kept = self.newest();
        let seen = AtomicU64::new(0);
        let hold =
            self.storage.hold(move |operation| operation.action == Action::Sync && seen.fetch_add(1, Ordering::SeqCst) + 1 == barrier);
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

    /// An operation on a host without space, P5: each sector of the guest is as before or as after, now and from now on.
    fn full(&mut self, write: u64, inner: &Op) {
        // Writes of the header are of a few bytes in one page: the host does not do half of them.
        let header = |operation: &Operation| operation.action == Action::Write(WriteKind::Header);
        let other = move |operation: &Operation| matches!(operation.action, Action::Write(_)) && !header(operation);
        let times = Times::ForEver;
        self.storage.inject(Fault { matches: Box::new(header), after: (write + 1) / 4, failure: Failure::Errno(28), times });
        self.storage.inject(Fault { matches: Box::new(other), after: write, failure: Failure::Short(512, 28), times });
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
            let (newest, before) = (values[values.len() - 1].1, values[values.len().saturating_sub(2)].1);
            let is_of_either = value.iter().zip(newest).zip(before).all(|((&value, newest), before)| value == newest || value == before);
            assert!(is_of_either, "P5: sector {sector} is neither as before nor as after a write that failed");
            if *value != newest {
                values.push((began, *value));
            }
        }
        self.story.now = found;
    }

    fn is_detached(&self) -> bool {
        self.story.facts.iter().any(|(_, fact)| matches!(fact, Fact::Detached))
    }

    /// The guest writes: from now on every sector of it may be as before or as after.
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

    /// The index of the newest value of each sector.
    fn newest(&self) -> Vec<usize> {
        self.story.values.iter().map(|values| values.len() - 1).collect()
    }

    /// A flush has returned: what was the newest value when it was called, or a later one, is there.
    fn keeps(&mut self, mut newest: Vec<usize>) {
        newest.resize(self.story.values.len(), 0);
        let position = self.position();
        self.story.floors.push((position, newest));
    }

    /// P7: after a failed barrier nothing is accepted and nothing more reaches the file, although barriers work again.
    fn has_latched(&self) {
        let before = self.position();
        assert!(self.disk.flush().is_err(), "P7: a flush after a failed barrier");
        assert!(self.disk.write(0, &[1; 512]).is_err(), "P7: a write after a failed barrier");
        assert!(self.disk.write_zeroes(0..self.disk.size()).is_err() || self.position() == before, "P7: zeroes after a failed barrier");
        assert!(self.disk.flush().is_err() && self.disk.close().is_err(), "P7: a flush after a failed barrier");
        assert_eq!(self.position(), before, "P7: the file changes after a failed barrier");
        let mut all = vec![0; self.disk.size() as usize];
        self.disk.read(0, &mut all).expect("reads go on");
        assert_eq!(self.position(), before, "P7: the file changes after a failed barrier");
    }
}

/// Reads in the way of a transport: whatever answers at once, and who may wait only if nothing does.
fn read(disk: &Disk, at: u64, buf: &mut [u8]) -> Result<()> {
    if disk.read_local(at, buf)? == Local::Done || disk.read_cached(at, buf, &mut |_| ())? == Local::Done {
        return Ok(());
    }
    disk.read(at, buf)
}
