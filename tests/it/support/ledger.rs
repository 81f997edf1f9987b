//! What a guest was promised, sector by sector, so that a crash can be judged: and the hands that write while it comes.
//!
//! The ledger lives in the test, which survives. Every write carries a version of its own, and notes when it began and when it was
//! acknowledged; a flush notes when it began, and counts once it has succeeded. A sector may then hold any write that no durable later write
//! has replaced: one that was acknowledged before the durable one began is gone for good, everything else is old-or-new.

use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::fs::fallocate;

use super::guest::{PUNCH, ZERO};
use super::pattern::assert_same_at;
use super::{Pattern, Rng};

pub const SECTOR: u64 = 512;

/// What a sector holds that nobody has written.
const GOLDEN: u32 = 0;
/// What a sector holds that was discarded or zeroed.
const ZEROS: u32 = u32::MAX;
/// The longest write: 2^11 sectors, 1 MiB.
const LONGEST_SHIFT: u64 = 11;

/// The unit of memory.
const PAGE: usize = 4096;

fn index(number: u64) -> usize {
    usize::try_from(number).expect("fits memory")
}

#[derive(Debug)]
struct Write {
    version: u32,
    begun: u64,
    /// When it was acknowledged; never, if the crash came first.
    done: u64,
    /// Durable by itself: O_DSYNC.
    synced: bool,
}

#[derive(Debug)]
struct State {
    clock: u64,
    next_version: u32,
    /// Every write that was acknowledged by then is durable.
    durable: u64,
    writes: Vec<Write>,
    /// For every sector: the writes that touch it.
    of: Vec<Vec<u32>>,
    /// For every sector: what was there before all of them.
    before: Vec<u32>,
}

/// The ledger of one disk.
#[derive(Debug)]
pub struct Ledger {
    seed: u32,
    golden: Vec<u8>,
    state: Mutex<State>,
}

/// What a verification looked at.
#[derive(Clone, Copy, Debug, Default)]
pub struct Verified {
    pub sectors: u64,
    /// Those that had been written, zeroed or discarded since the last verification.
    pub touched: u64,
    /// Those that a flush had made durable.
    pub durable: u64,
}

impl std::ops::AddAssign for Verified {
    fn add_assign(&mut self, other: Verified) {
        self.sectors += other.sectors;
        self.touched += other.touched;
        self.durable += other.durable;
    }
}

impl Ledger {
    /// Of a disk that holds `golden`, whole sectors. Writes carry `seed`.
    pub fn new(golden: Vec<u8>, seed: u32) -> Ledger {
        assert_eq!(golden.len() as u64 % SECTOR, 0);
        let sectors = golden.len() / index(SECTOR);
        let state = State {
            clock: 1,
            next_version: 1000,
            durable: 0,
            writes: Vec::new(),
            of: vec![Vec::new(); sectors],
            before: vec![GOLDEN; sectors],
        };
        Ledger { seed, golden, state: Mutex::new(state) }
    }

    pub fn golden(&self) -> &[u8] {
        &self.golden
    }

    fn state(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().expect("no panic inside the ledger")
    }

    /// Writes (`Some` pattern) or zeroes sectors by `work`, with the books kept.
    fn change(
        &self,
        sectors: &Range<u64>,
        zeros: bool,
        synced: bool,
        work: impl FnOnce(Pattern) -> std::io::Result<()>,
    ) -> std::io::Result<()> {
        let (number, pattern) = {
            let mut state = self.state();
            state.clock += 1;
            state.next_version += 1;
            let number = u32::try_from(state.writes.len()).expect("few enough");
            let version = if zeros { ZEROS } else { state.next_version };
            let begun = state.clock;
            state.writes.push(Write { version, begun, done: u64::MAX, synced });
            for sector in sectors.clone() {
                state.of[index(sector)].push(number);
            }
            (number, Pattern::new(self.seed, state.next_version))
        };
        work(pattern)?;
        let mut state = self.state();
        state.clock += 1;
        let now = state.clock;
        state.writes[index(number.into())].done = now;
        Ok(())
    }

    /// Flushes by `work`: what was acknowledged before is durable when it succeeds.
    fn flush(&self, work: impl FnOnce() -> std::io::Result<()>) -> std::io::Result<()> {
        let begun = self.state().clock;
        work()?;
        let mut state = self.state();
        state.durable = state.durable.max(begun);
        Ok(())
    }

    /// Everything that was acknowledged must be there: a clean end.
    pub fn all_acknowledged_is_durable(&self) {
        let mut state = self.state();
        state.durable = state.clock;
    }

    /// Every sector of `range` (bytes) holds what it may hold; what is found is the truth from here on. `content` is the whole disk.
    /// Forgets the writes, so call it for all that was written before anything is written again.
    pub fn verify(&self, what: &str, content: &[u8], ranges: &[Range<u64>]) -> Verified {
        assert_eq!(content.len(), self.golden.len(), "{what}: size of the disk");
        let mut state = self.state();
        let state = &mut *state;
        let mut verified = Verified::default();
        for sector in ranges.iter().flat_map(|range| range.start / SECTOR..range.end / SECTOR) {
            let place = index(sector * SECTOR)..index((sector + 1) * SECTOR);
            let got = &content[place.clone()];
            let bytes_of = |version: u32| match version {
                GOLDEN => self.golden[place.clone()].to_vec(),
                ZEROS => vec![0; got.len()],
                version => Pattern::new(self.seed, version).bytes(sector * SECTOR, SECTOR),
            };
            let touching = std::mem::take(&mut state.of[index(sector)]);
            let touching: Vec<&Write> = touching.iter().map(|&number| &state.writes[index(number.into())]).collect();
            let is_durable = |write: &&&Write| write.done <= state.durable || write.synced && write.done < u64::MAX;
            let last_durable = touching.iter().filter(is_durable).map(|write| write.begun).max();
            let before = last_durable.is_none().then_some(state.before[index(sector)]);
            let allowed: Vec<u32> = touching
                .iter()
                .filter(|write| last_durable.is_none_or(|begun| write.done >= begun))
                .map(|write| write.version)
                .chain(before)
                .collect();
            match allowed.iter().rev().copied().find(|&version| bytes_of(version) == got) {
                Some(version) => state.before[index(sector)] = version,
                None => {
                    let books = format!("{what}: sector {sector} may hold {allowed:?} (durable to {}): {touching:?}", state.durable);
                    assert_same_at(&books, sector * SECTOR, got, &bytes_of(allowed[allowed.len() - 1]));
                }
            }
            verified.sectors += 1;
            verified.touched += u64::from(!touching.is_empty());
            verified.durable += u64::from(last_durable.is_some());
        }
        verified
    }

    /// After a verification of everything: the next writes are noted from the start.
    pub fn turn_the_page(&self) {
        let mut state = self.state();
        assert!(state.of.iter().all(Vec::is_empty), "writes that were not verified");
        state.writes.clear();
    }
}

/// The hands of a guest at work on one disk, until it fails them.
#[derive(Debug)]
pub struct Hands<'a> {
    pub ledger: &'a Ledger,
    pub file: &'a File,
    /// The same disk, opened with O_DSYNC.
    pub synced: &'a File,
    /// Set before the end is brought about: an error before that is a failure of the test.
    pub ending: &'a AtomicBool,
}

impl Hands<'_> {
    /// Writes, zeroes, discards and flushes inside `region` (bytes) with blocks of 512 bytes to 1 MiB; returns the error that ended it.
    pub fn write_until_the_end(&self, mut rng: Rng, region: &Range<u64>) -> std::io::Error {
        // Aligned, as the memory of a guest is: the kernel cuts a large direct write where pages of the caller's memory end, and would cut
        // through the middle of a sector otherwise.
        let mut memory = vec![0; index(SECTOR << LONGEST_SHIFT) + PAGE];
        let skip = memory.as_ptr().align_offset(PAGE);
        let memory = &mut memory[skip..];
        loop {
            let room = (region.end - region.start) / SECTOR;
            let len = (1 << rng.below(LONGEST_SHIFT + 1)).min(room);
            let start = region.start / SECTOR + rng.below(room - len + 1);
            let sectors = start..start + len;
            let (offset, bytes) = (start * SECTOR, len * SECTOR);
            let mut write = |file: &File, synced: bool| {
                self.ledger.change(&sectors, false, synced, |pattern| {
                    let data = &mut memory[..index(bytes)];
                    pattern.fill(offset, data);
                    file.write_all_at(data, offset)
                })
            };
            let zeros = |flags| self.ledger.change(&sectors, true, false, |_| Ok(fallocate(self.file, flags, offset, bytes)?));
            // Seldom flushed, so that much is old-or-new when the end comes.
            let done = match rng.below(128) {
                0..8 => zeros(PUNCH),
                8..12 => zeros(ZERO),
                12..15 => self.ledger.flush(|| self.file.sync_data()),
                15 => self.ledger.flush(|| self.file.sync_all()),
                16..18 => write(self.synced, true),
                _ => write(self.file, false),
            };
            if let Err(error) = done {
                assert!(self.ending.load(Ordering::SeqCst), "{bytes} bytes at {offset}: {error}");
                return error;
            }
        }
    }

    /// Reads inside `region` (bytes), which nobody writes, and compares; returns the error that ended it.
    pub fn read_until_the_end(&self, mut rng: Rng, region: &Range<u64>) -> std::io::Error {
        loop {
            let part = rng.range(region.end - region.start, 300_000);
            let part = region.start + part.start..region.start + part.end;
            let mut buf = vec![0xEE; index(part.end - part.start)];
            if let Err(error) = self.file.read_exact_at(&mut buf, part.start) {
                assert!(self.ending.load(Ordering::SeqCst), "read of {part:?}: {error}");
                return error;
            }
            assert_same_at("what nobody writes", part.start, &buf, &self.ledger.golden[index(part.start)..index(part.end)]);
        }
    }
}
