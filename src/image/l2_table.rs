//! One L2 table in memory: entries that change one by one, and which pieces of it are not on disk yet.
//! Entries are judged when the table is loaded; one that is bad costs the range that it maps.

use super::judged::{Fault, Judged};
use crate::Result;
use crate::format::{Geometry, HostCluster, Mapping};
use crate::sync::atomic::{AtomicBool, AtomicU64, Ordering};

/// An L2 table is written back in pieces of this many bytes: what one page of the host holds.
const PIECE: usize = 4096;
const PIECE_ENTRIES: usize = PIECE / 8;

/// One L2 table. Shared by all who use it; `host` and `in_place` change only under the exclusive lock of its slot.
#[derive(Debug)]
pub(super) struct L2Table {
    /// Where it is, or will be once it is written back.
    pub host: HostCluster,
    /// COPIED in the L1 entry: this table may be overwritten where it is.
    pub in_place: bool,
    entries: Box<[AtomicU64]>,
    /// Which entries were not good when the table was loaded; `None` where all were.
    judged: Option<Box<Judged>>,
    /// One bit per piece.
    dirty: Box<[AtomicU64]>,
    /// Whether it stands in the list of dirty tables.
    pub queued: AtomicBool,
    /// The L1 entry on disk does not name this table yet.
    pub l1_dirty: AtomicBool,
}

impl L2Table {
    /// A table as it is on disk, or about to be.
    pub fn new(host: HostCluster, in_place: bool, entries: Box<[AtomicU64]>, judged: Option<Box<Judged>>) -> Self {
        let pieces = entries.len().div_ceil(PIECE_ENTRIES);
        let dirty = (0..pieces.div_ceil(64)).map(|_| AtomicU64::new(0)).collect();
        L2Table { host, in_place, entries, judged, dirty, queued: AtomicBool::new(false), l1_dirty: AtomicBool::new(false) }
    }

    /// The raw entry at `index`.
    pub fn entry(&self, index: usize) -> &AtomicU64 {
        &self.entries[index]
    }

    /// What was wrong with the entry at `index` when the table was loaded.
    pub fn fault(&self, index: usize) -> Fault {
        self.judged.as_ref().map_or(Fault::None, |judged| judged.fault(index))
    }

    /// What the entry at `index` means. One whose refcount could not be read is not to be overwritten
    /// in place: a write moves it to a new cluster.
    ///
    /// # Errors
    /// [`crate::ErrorKind::Corrupt`] for a bad entry.
    pub fn mapping(&self, index: usize, geometry: &Geometry) -> Result<Mapping> {
        let raw = self.entries[index].load(Ordering::Acquire);
        match &self.judged {
            None => Ok(Mapping::decode(raw, geometry)?),
            Some(judged) => judged.mapping(index, raw, self.host, geometry),
        }
    }

    /// Sets the raw entry at `index`, then marks its piece dirty; returns the one before.
    pub fn set(&self, index: usize, raw: u64) -> u64 {
        let before = self.entries[index].swap(raw, Ordering::AcqRel);
        if let Some(judged) = &self.judged {
            judged.replaced(index);
        }
        self.mark_dirty(index);
        before
    }

    fn mark_dirty(&self, index: usize) {
        let piece = index / PIECE_ENTRIES;
        self.dirty[piece / 64].fetch_or(1 << (piece % 64), Ordering::AcqRel);
    }

    /// All of it must be written.
    pub fn mark_all_dirty(&self) {
        for first in (0..self.entries.len()).step_by(PIECE_ENTRIES) {
            self.mark_dirty(first);
        }
    }

    /// Marks clean, then copies, in this order: a change that comes in between makes it dirty again. `start` is the table's host offset in
    /// bytes; pieces that touch are one.
    pub fn take_dirty(&self, start: u64) -> Vec<(u64, Vec<u8>)> {
        let mut pieces: Vec<(u64, Vec<u8>)> = Vec::new();
        for (word, dirty) in self.dirty.iter().enumerate() {
            let mut bits = dirty.swap(0, Ordering::AcqRel);
            while bits != 0 {
                let piece = word * 64 + bits.trailing_zeros() as usize;
                bits &= bits - 1;
                let offset = start + (piece * PIECE) as u64;
                let entries = self.entries[piece * PIECE_ENTRIES..].iter().take(PIECE_ENTRIES);
                let bytes = entries.flat_map(|entry| entry.load(Ordering::Acquire).to_be_bytes());
                match pieces.last_mut() {
                    Some((at, run)) if *at + run.len() as u64 == offset => run.extend(bytes),
                    _ => pieces.push((offset, bytes.collect())),
                }
            }
        }
        pieces
    }

    /// What [`L2Table::take_dirty`] gave out was not written.
    pub fn dirty_again(&self, start: u64, pieces: &[(u64, Vec<u8>)]) {
        for (at, bytes) in pieces {
            // Moved meanwhile: then all of it is dirty already.
            if let Some(first) = at.checked_sub(start).filter(|first| *first < self.bytes() as u64) {
                for offset in (first as usize..first as usize + bytes.len()).step_by(PIECE) {
                    self.mark_dirty(offset / 8);
                }
            }
        }
    }

    /// Whether disk and memory agree, and no pass is going to look.
    pub fn is_clean(&self) -> bool {
        !self.queued.load(Ordering::Acquire)
            && !self.l1_dirty.load(Ordering::Acquire)
            && self.dirty.iter().all(|word| word.load(Ordering::Acquire) == 0)
    }

    /// Its size in bytes.
    pub fn bytes(&self) -> usize {
        self.entries.len() * 8
    }
}
