//! The journal of an open image: changes of the mapping that are not durable yet, in memory that
//! survives the process.
//!
//! A change of the mapping is acknowledged when it is complete in the memory of the process; the
//! file learns of it in the next write-back pass. If the process dies before that and the guest
//! lives on, the guest would read old bytes where it has written new ones. So the process also
//! appends each change to the journal, before the request that made the change returns. A successor
//! reads the journal and repeats the changes before it answers a request (P17).
//!
//! ```text
//!  page 0            two headers in turns: the start, the state of the barriers, the reservation
//!  from page 1 on    a ring of records; record n lies in slot n modulo the number of slots
//!
//!        start (cut)        position (a pass begins)         next
//!          │ durable after that pass │ stays for the next pass │
//!  ────────┴─────────────────────────┴─────────────────────────┴──────▶ numbers of records
//! ```
//!
//! A record holds the state of its clusters *after* the change, so a change that is repeated
//! although it is durable does no harm. Writes in place are not in the journal: their bytes are in
//! the host's page cache, which survives the process. A power failure loses the journal together
//! with the guest; then what holds is what is on the disk (P2, P4).
//!
//! The journal is memory of one host and one boot. Its numbers have the byte order of the host, and
//! a program refuses a journal whose version is not in [`VERSIONS`].
//!
//! **Touches:** [`SharedBytes`].
//! **Never:** writes the image; knows tables or refcounts.
//! **Locks:** one leaf lock, held across the write of a record or of a header, which waits for no
//! disk. The allocator takes it under its own lock to record what it reserves.
//! **Invariants:** records have consecutive numbers and no gap: a record is written, and only then
//! is the next number given out. So a reader stops at the first record that is not good, and that
//! record was never acknowledged.

use std::io;
use std::ops::Range;
use std::sync::Arc;

use crate::format::{Geometry, GuestCluster, RawL2Entry};
use host::mutants::{Step, without};
use host::storage::SharedBytes;
use host::sync::{Mutex, rank};
use host::{Error, ErrorKind, Result};

/// The first bytes of a header.
const MAGIC: [u8; 8] = *b"cordiskj";
/// The version of the format: that of an image with standard L2 entries, and that of an image with
/// extended ones, whose records have a bitmap. A journal of another version is refused.
const VERSIONS: [u32; 2] = [1, 2];
/// Size of a header without padding, in bytes.
const HEADER: usize = 56;
/// Offsets of the two headers, in bytes.
const HEADERS: [u64; 2] = [0, 64];
/// Offset of the first record, in bytes.
const RECORDS: u64 = 4096;
/// Size of a record, in bytes: without a bitmap, and with one.
const RECORDS_OF: [usize; 2] = [40, 48];
/// The number of the first record. Zeros are no record, so it is not 0.
const FIRST: u64 = 1;

/// A change of the mapping: what the L2 entries of a run of guest clusters are afterwards.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct MappingChange {
    /// The first guest cluster.
    pub start: GuestCluster,
    /// The number of clusters.
    pub count: u32,
    /// The descriptor in the L2 entry of the first cluster.
    pub entry: u64,
    /// The subcluster bitmap in the L2 entries of all clusters; 0 without extended L2 entries.
    pub bitmap: u64,
    /// What is added to the descriptor from one cluster to the next: 0, or the cluster size in
    /// bytes if the host clusters are contiguous.
    pub step: u64,
}

impl MappingChange {
    /// Adds the cluster at `at` with this entry, if it continues the run. Host clusters of
    /// `cluster_size` bytes continue a run if they are contiguous.
    pub fn joined_by(&mut self, at: GuestCluster, entry: RawL2Entry, cluster_size: u64) -> bool {
        if at.0 != self.start.0 + u64::from(self.count) || entry.bitmap != self.bitmap {
            return false;
        }
        let last = self.entry_of(self.count - 1).descriptor;
        let step = match entry.descriptor.checked_sub(last) {
            Some(0) => 0,
            Some(step) if step == cluster_size => step,
            _ => return false,
        };
        if self.count > 1 && step != self.step {
            return false;
        }
        (self.step, self.count) = (step, self.count + 1);
        true
    }

    /// Returns the entry of the cluster `index` clusters after the first one.
    pub fn entry_of(&self, index: u32) -> RawL2Entry {
        let descriptor = self.entry.wrapping_add(self.step.wrapping_mul(u64::from(index)));
        RawL2Entry { descriptor, bitmap: self.bitmap }
    }
}

/// What the process knew of its barriers when it wrote the header.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum BarrierState {
    /// The last barrier has returned, and it succeeded.
    Succeeded,
    /// A barrier was called. If the process died, its result is not known.
    Called,
    /// A successor asks what became of the barrier. If it died as well, the answer is lost.
    Asked,
    /// A barrier has failed, or the image is corrupt: no write is accepted (P7, P11).
    Failed,
}

/// The content of a header.
#[derive(Clone, Copy, Debug)]
struct JournalHeader {
    /// The number of this header: the higher one of two is valid.
    turn: u64,
    /// The number of the oldest record that is not cut.
    start: u64,
    version: u32,
    cluster_bits: u32,
    barrier: BarrierState,
    /// The host clusters that were reserved ahead last: first and end.
    reserved: (u64, u64),
}

impl JournalHeader {
    fn encode(&self) -> [u8; HEADER] {
        let mut bytes = [0; HEADER];
        bytes[0..8].copy_from_slice(&MAGIC);
        bytes[8..12].copy_from_slice(&self.version.to_ne_bytes());
        bytes[12..16].copy_from_slice(&self.cluster_bits.to_ne_bytes());
        bytes[16..24].copy_from_slice(&self.turn.to_ne_bytes());
        bytes[24..32].copy_from_slice(&self.start.to_ne_bytes());
        bytes[32..36].copy_from_slice(&(self.barrier as u32).to_ne_bytes());
        bytes[36..44].copy_from_slice(&self.reserved.0.to_ne_bytes());
        bytes[44..52].copy_from_slice(&self.reserved.1.to_ne_bytes());
        let sum = crc32fast::hash(&bytes[..HEADER - 4]);
        bytes[HEADER - 4..].copy_from_slice(&sum.to_ne_bytes());
        bytes
    }

    /// Returns `None` for bytes that are no header: a write that was torn, or none yet.
    fn decode(bytes: &[u8; HEADER]) -> Option<JournalHeader> {
        let word = |at: usize| u32_at(bytes, at);
        if bytes[0..8] != MAGIC
            || !VERSIONS.contains(&word(8))
            || word(HEADER - 4) != crc32fast::hash(&bytes[..HEADER - 4])
        {
            return None;
        }
        let barrier = match word(32) {
            0 => BarrierState::Succeeded,
            1 => BarrierState::Called,
            2 => BarrierState::Asked,
            3 => BarrierState::Failed,
            _ => return None,
        };
        Some(JournalHeader {
            turn: u64_at(bytes, 16),
            start: u64_at(bytes, 24),
            version: word(8),
            cluster_bits: word(12),
            barrier,
            reserved: (u64_at(bytes, 36), u64_at(bytes, 44)),
        })
    }
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    let mut word = [0; 4];
    word.copy_from_slice(&bytes[at..at + 4]);
    u32::from_ne_bytes(word)
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    let mut word = [0; 8];
    word.copy_from_slice(&bytes[at..at + 8]);
    u64::from_ne_bytes(word)
}

/// Encodes a record of `len` bytes, one of [`RECORDS_OF`].
fn encode(number: u64, change: &MappingChange, len: usize) -> Vec<u8> {
    let (mut entry, mut bitmap) = (change.entry, change.bitmap);
    if without(Step::ZeroFlagIsJournaled) {
        (entry, bitmap) = (entry & !1, bitmap & u64::from(u32::MAX));
    }
    let mut bytes = Vec::with_capacity(len);
    for word in [number, change.start.0, entry, change.step, bitmap] {
        bytes.extend(word.to_ne_bytes());
    }
    bytes.truncate(len - 8);
    bytes.extend(change.count.to_ne_bytes());
    bytes.extend(crc32fast::hash(&bytes).to_ne_bytes());
    bytes
}

/// Returns `None` for bytes that are not the record of this number.
fn decode(number: u64, bytes: &[u8]) -> Option<MappingChange> {
    let (told, sum) = bytes.split_at(bytes.len() - 4);
    let is_good = u64_at(told, 0) == number && u32_at(sum, 0) == crc32fast::hash(told);
    is_good.then(|| MappingChange {
        start: GuestCluster(u64_at(told, 8)),
        count: u32_at(told, told.len() - 4),
        entry: u64_at(told, 16),
        bitmap: if bytes.len() == RECORDS_OF[1] { u64_at(told, 32) } else { 0 },
        step: u64_at(told, 24),
    })
}

/// The journal of one image that is open for writing.
#[derive(Debug)]
pub(crate) struct Journal {
    bytes: Arc<dyn SharedBytes>,
    /// Size of a record, in bytes.
    record: usize,
    /// The number of records that the ring holds.
    slots: u64,
    state: Mutex<{ rank::LEAF }, JournalState>,
}

#[derive(Debug)]
struct JournalState {
    header: JournalHeader,
    /// The number of the next record.
    next: u64,
    /// Slots that are promised to changes that are not complete.
    promised: u64,
}

/// Space for records, which [`Journal::promise`] has set aside.
#[derive(Debug)]
pub(crate) struct PromisedSpace<'a> {
    journal: &'a Journal,
    records: u64,
}

impl Drop for PromisedSpace<'_> {
    fn drop(&mut self) {
        self.journal.state.lock().promised -= self.records;
    }
}

impl Journal {
    /// Makes an empty journal of an image.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidArgument`] if there is no space for two records; I/O.
    pub fn create(bytes: Arc<dyn SharedBytes>, geometry: &Geometry) -> Result<Journal> {
        let journal = Journal::over(bytes, geometry)?;
        for _ in HEADERS {
            // Both headers are written, so that none of an earlier journal is left.
            journal.change_header(&mut journal.state.lock(), |_| ()).map_err(of_journal)?;
        }
        Ok(journal)
    }

    /// Opens the journal of a process that has ended. Returns it with its records, oldest first,
    /// and with what that process knew of its barriers.
    ///
    /// # Errors
    /// [`ErrorKind::Corrupt`] if this is no journal of such an image; I/O.
    pub fn open(
        bytes: Arc<dyn SharedBytes>,
        geometry: &Geometry,
    ) -> Result<(Journal, Vec<MappingChange>, BarrierState)> {
        let journal = Journal::over(bytes, geometry)?;
        let mut newest: Option<JournalHeader> = None;
        for at in HEADERS {
            let mut header = [0; HEADER];
            journal.bytes.read_at(at, &mut header).map_err(of_journal)?;
            let header = JournalHeader::decode(&header);
            if let Some(header) = header
                && newest.is_none_or(|newest| newest.turn < header.turn)
            {
                newest = Some(header);
            }
        }
        let refuse = |what: &str| Error::new(ErrorKind::Corrupt, format!("the journal {what}"));
        let header =
            newest.ok_or_else(|| refuse("has no valid header, or that of another version"))?;
        let expected = journal.state.lock().header;
        if (header.version, header.cluster_bits) != (expected.version, expected.cluster_bits)
            || header.start < FIRST
        {
            return Err(refuse("is that of another image"));
        }
        let mut changes = Vec::new();
        let mut next = header.start;
        while next - header.start < journal.slots {
            let mut record = vec![0; journal.record];
            journal.bytes.read_at(journal.place_of(next), &mut record).map_err(of_journal)?;
            let Some(change) = decode(next, &record) else { break };
            changes.push(change);
            next += 1;
        }
        *journal.state.lock() = JournalState { header, next, promised: 0 };
        Ok((journal, changes, header.barrier))
    }

    fn over(bytes: Arc<dyn SharedBytes>, geometry: &Geometry) -> Result<Journal> {
        let is_extended = usize::from(geometry.has_extended_l2());
        let record = RECORDS_OF[is_extended];
        let slots = bytes.size().saturating_sub(RECORDS) / record as u64;
        if slots < 2 {
            return Err(Error::new(ErrorKind::InvalidArgument, "the journal is too small"));
        }
        let header = JournalHeader {
            turn: 0,
            start: FIRST,
            version: VERSIONS[is_extended],
            cluster_bits: geometry.cluster_bits(),
            barrier: BarrierState::Succeeded,
            reserved: (0, 0),
        };
        let state = JournalState { header, next: FIRST, promised: 0 };
        Ok(Journal { bytes, record, slots, state: Mutex::new(state) })
    }

    fn place_of(&self, number: u64) -> u64 {
        RECORDS + number % self.slots * self.record as u64
    }

    /// Sets space for this many records aside, so that a change that is made cannot fail to be
    /// recorded. Returns `None` if there is no space until a pass cuts the journal.
    pub fn promise(&self, records: usize) -> Option<PromisedSpace<'_>> {
        let records = records as u64;
        let mut state = self.state.lock();
        let taken = state.next - state.header.start + state.promised;
        if taken.checked_add(records)? > self.slots {
            return None;
        }
        state.promised += records;
        Some(PromisedSpace { journal: self, records })
    }

    /// Returns whether so many records wait for a pass that it should not wait for the timer.
    pub fn is_half_full(&self) -> bool {
        let state = self.state.lock();
        (state.next - state.header.start) * 2 > self.slots
    }

    /// Returns whether so many records wait that a change may soon have to wait for a pass.
    pub fn is_nearly_full(&self) -> bool {
        let state = self.state.lock();
        (state.next - state.header.start + state.promised) * 4 > self.slots * 3
    }

    /// Returns how many clusters one change may have at most, so that several threads that wait for
    /// space do not keep each other waiting.
    pub fn most_at_once(&self) -> u64 {
        (self.slots / 4).max(1)
    }

    /// Appends changes, as many as were promised at most. They are complete in the memory of the
    /// process: a pass that begins later takes them into its copies. So [`Journal::cut`] at the
    /// position where that pass begins is correct.
    ///
    /// # Errors
    /// Those of [`SharedBytes::write_at`]. The changes are not recorded then, and the caller must
    /// accept no further change.
    pub fn append(&self, space: PromisedSpace<'_>, changes: &[MappingChange]) -> io::Result<()> {
        assert!(changes.len() as u64 <= space.records, "more records than were promised");
        if without(Step::ChangeIsJournaled) {
            return Ok(());
        }
        let mut state = self.state.lock();
        for change in changes {
            self.bytes
                .write_at(self.place_of(state.next), &encode(state.next, change, self.record))?;
            state.next += 1;
        }
        Ok(())
    }

    /// Returns the number of the next record. A pass calls this before it takes its copies.
    pub fn position(&self) -> u64 {
        self.state.lock().next
    }

    /// Drops the records before `position`, because a pass that began there has made them durable.
    ///
    /// # Errors
    /// Those of [`SharedBytes::write_at`].
    pub fn cut(&self, position: u64) -> io::Result<()> {
        let mut state = self.state.lock();
        let position = if without(Step::CutStopsWherePassBegan) { state.next } else { position };
        if position == state.header.start {
            return Ok(());
        }
        self.change_header(&mut state, |header| header.start = position)
    }

    /// Records what is known of the barriers. A failure is never taken back.
    ///
    /// # Errors
    /// Those of [`SharedBytes::write_at`].
    pub fn set_barrier(&self, barrier: BarrierState) -> io::Result<()> {
        let mut state = self.state.lock();
        if state.header.barrier == BarrierState::Failed || state.header.barrier == barrier {
            return Ok(());
        }
        self.change_header(&mut state, |header| header.barrier = barrier)
    }

    /// Records which host clusters are reserved ahead. A failure costs leaks only.
    pub fn set_reserved(&self, clusters: Range<u64>) {
        let mut state = self.state.lock();
        let changed = self
            .change_header(&mut state, |header| header.reserved = (clusters.start, clusters.end));
        if let Err(error) = changed {
            log::debug!("journal: {error}");
        }
    }

    /// Returns the host clusters that were reserved ahead last. Some of them may have been handed
    /// out since.
    pub fn reserved(&self) -> Range<u64> {
        let (start, end) = self.state.lock().header.reserved;
        start..end
    }

    /// Writes a changed header over the older one of the two. A write that is torn leaves the
    /// newer one valid.
    fn change_header(
        &self,
        state: &mut JournalState,
        change: impl FnOnce(&mut JournalHeader),
    ) -> io::Result<()> {
        let mut header = state.header;
        change(&mut header);
        header.turn += 1;
        self.bytes.write_at(HEADERS[(header.turn % 2) as usize], &header.encode())?;
        state.header = header;
        Ok(())
    }
}

fn of_journal(error: io::Error) -> Error {
    Error::io("journal", error)
}

#[cfg(test)]
mod tests;
