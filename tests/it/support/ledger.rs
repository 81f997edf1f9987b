//! The values that each sector of a disk may have after a crash, and the threads that write to the
//! disk until the crash.
//!
//! The ledger is in the test process, which survives the crash. Each write has its own version and
//! records when it began and when it was acknowledged. A flush records when it began, and counts if
//! it succeeds. A write is replaced if it was acknowledged before a later, durable write to the
//! sector began. The sector may hold any write that is not replaced.

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

/// Version of a sector that was never written.
const GOLDEN: u32 = 0;
/// Version of a sector that was discarded or zeroed.
const ZEROS: u32 = u32::MAX;
/// Logarithm of the longest write in sectors: 2^11 sectors are 1 MiB.
const LONGEST_SHIFT: u64 = 11;

/// Page size of the host, in bytes.
const PAGE: usize = 4096;

fn index(number: u64) -> usize {
    usize::try_from(number).expect("fits memory")
}

#[derive(Debug)]
struct Write {
    version: u32,
    begun: u64,
    /// When the write was acknowledged; `u64::MAX` if the crash came first.
    done: u64,
    /// Whether the write itself is durable: O_DSYNC.
    synced: bool,
}

#[derive(Debug)]
struct State {
    clock: u64,
    next_version: u32,
    /// Every write that was acknowledged by this time is durable.
    durable: u64,
    writes: Vec<Write>,
    /// For every sector: the indices of the writes that touch it.
    of: Vec<Vec<u32>>,
    /// For every sector: its version before all of these writes.
    before: Vec<u32>,
}

/// The ledger of one disk.
#[derive(Debug)]
pub struct Ledger {
    seed: u32,
    golden: Vec<u8>,
    state: Mutex<State>,
}

/// Counts of a verification.
#[derive(Clone, Copy, Debug, Default)]
pub struct Verified {
    pub sectors: u64,
    /// Sectors that were written, zeroed or discarded since the last verification.
    pub touched: u64,
    /// Sectors that a flush had made durable.
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
    /// Creates the ledger of a disk that holds `golden`, whole sectors. The patterns of its writes
    /// contain `seed`.
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

    /// Performs `work`, which writes (`Some` pattern) or zeroes sectors, and records it.
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

    /// Performs `work`, which flushes; if it succeeds, all writes that were acknowledged before it
    /// are durable.
    fn flush(&self, work: impl FnOnce() -> std::io::Result<()>) -> std::io::Result<()> {
        let begun = self.state().clock;
        work()?;
        let mut state = self.state();
        state.durable = state.durable.max(begun);
        Ok(())
    }

    /// Records a clean end: every acknowledged write is durable.
    pub fn all_acknowledged_is_durable(&self) {
        let mut state = self.state();
        state.durable = state.clock;
    }

    /// Checks that every sector of `ranges` (bytes) holds an allowed version; the versions that it
    /// finds become the starting point. `content` is the whole disk. Forgets the writes, so all
    /// ranges with writes must be verified before the next write.
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
            let touching: Vec<&Write> =
                touching.iter().map(|&number| &state.writes[index(number.into())]).collect();
            let is_durable = |write: &&&Write| {
                write.done <= state.durable || write.synced && write.done < u64::MAX
            };
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
                    let books = format!(
                        "{what}: sector {sector} may hold {allowed:?} (durable to {}): {touching:?}",
                        state.durable
                    );
                    assert_same_at(
                        &books,
                        sector * SECTOR,
                        got,
                        &bytes_of(allowed[allowed.len() - 1]),
                    );
                }
            }
            verified.sectors += 1;
            verified.touched += u64::from(!touching.is_empty());
            verified.durable += u64::from(last_durable.is_some());
        }
        verified
    }

    /// Empties the list of writes after a verification of everything.
    pub fn turn_the_page(&self) {
        let mut state = self.state();
        assert!(state.of.iter().all(Vec::is_empty), "writes that were not verified");
        state.writes.clear();
    }
}

/// The files and the ledger that the threads of a guest use. Each thread works until an operation
/// fails.
#[derive(Debug)]
pub struct Hands<'a> {
    pub ledger: &'a Ledger,
    pub file: &'a File,
    /// The same disk, opened with O_DSYNC.
    pub synced: &'a File,
    /// Set before the crash is caused: an error before that fails the test.
    pub ending: &'a AtomicBool,
}

impl Hands<'_> {
    /// Writes, zeroes, discards and flushes inside `region` (bytes), in blocks of 512 bytes to 1
    /// MiB. Returns the error that ended it.
    pub fn write_until_the_end(&self, mut rng: Rng, region: &Range<u64>) -> std::io::Error {
        // The memory is aligned like that of a virtual machine. The kernel splits a large direct
        // write at page borders of the caller's memory, and unaligned memory would split a sector.
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
            let zeros = |flags| {
                self.ledger.change(&sectors, true, false, |_| {
                    Ok(fallocate(self.file, flags, offset, bytes)?)
                })
            };
            // Flushes are rare, so that many sectors may be old or new at the crash.
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

    /// Reads and compares random parts of `region` (bytes), which no thread writes; returns the
    /// error that ended it.
    pub fn read_until_the_end(&self, mut rng: Rng, region: &Range<u64>) -> std::io::Error {
        loop {
            let part = rng.range(region.end - region.start, 300_000);
            let part = region.start + part.start..region.start + part.end;
            let mut buf = vec![0xEE; index(part.end - part.start)];
            if let Err(error) = self.file.read_exact_at(&mut buf, part.start) {
                assert!(self.ending.load(Ordering::SeqCst), "read of {part:?}: {error}");
                return error;
            }
            assert_same_at(
                "what nobody writes",
                part.start,
                &buf,
                &self.ledger.golden[index(part.start)..index(part.end)],
            );
        }
    }
}
