//! One L2 table in memory: its entries, which change one by one, and the pieces that are not on
//! disk yet. Entries are checked when the table is loaded; a bad entry affects only the range that
//! it maps.
//!
//! A standard entry is one atomic word, so threads read it while another thread changes it. An
//! extended entry has two words, and words of two different entries could name the data of one
//! cluster and the host cluster of another. All reads of entries, those of the write-back pass
//! included, therefore happen under the read lock of the table's slot, and extended entries change
//! under its write lock ([`super::tables::Tables::change`]).
//!
//! A table without faulty entries may be [`Packed`]: when it is loaded, and later, if
//! memory is short, while it is clean. It is packed and unpacked under the write lock of
//! its slot, and unpacked before an entry changes.

use super::judged::{Fault, Judged};
use super::packed::Packed;
use crate::format::{Geometry, HostCluster, L2Entry, RawL2Entry};
use host::Result;
use host::sync::atomic::{AtomicBool, AtomicU64, Ordering};

/// Size of the pieces in which an L2 table is written back, in bytes: one page of the host.
const PIECE: usize = 4096;
const PIECE_WORDS: usize = PIECE / 8;

/// The entries of a table.
#[derive(Debug)]
enum Entries {
    /// The words of the entries: one for each, or descriptor and bitmap.
    Words(Box<[AtomicU64]>),
    /// The table is clean and has no faulty entry.
    Packed(Packed),
}

/// One L2 table, shared by all threads that use the image. `host`, `in_place` and whether
/// it is packed change only under the write lock of the table's slot.
#[derive(Debug)]
pub(super) struct L2Table {
    /// The host cluster where the table is, or will be once it is written back.
    pub host: HostCluster,
    /// COPIED in the L1 entry: this table may be overwritten in place.
    pub in_place: bool,
    entries: Entries,
    /// Number of words, all entries together.
    words: usize,
    /// Words per entry, 1 or 2.
    entry_words: usize,
    /// The entries that were faulty when the table was loaded; `None` if all were good.
    judged: Option<Box<Judged>>,
    /// One bit per piece.
    dirty: Box<[AtomicU64]>,
    /// Whether the table is in the list of dirty tables.
    pub queued: AtomicBool,
    /// Whether the L1 entry on disk does not name this table yet.
    pub l1_dirty: AtomicBool,
}

impl L2Table {
    /// Makes a table from the words of the entries that are on disk or are about to be written.
    pub fn new(
        host: HostCluster,
        in_place: bool,
        words: Box<[AtomicU64]>,
        judged: Option<Box<Judged>>,
        geometry: &Geometry,
    ) -> Self {
        let pieces = words.len().div_ceil(PIECE_WORDS);
        let dirty = (0..pieces.div_ceil(64)).map(|_| AtomicU64::new(0)).collect();
        L2Table {
            host,
            in_place,
            words: words.len(),
            entries: Entries::Words(words),
            entry_words: geometry.l2_entry_words(),
            judged,
            dirty,
            queued: AtomicBool::new(false),
            l1_dirty: AtomicBool::new(false),
        }
    }

    /// Returns the raw entry at `index`.
    pub fn raw(&self, index: usize) -> RawL2Entry {
        let words = match &self.entries {
            Entries::Words(words) => words,
            Entries::Packed(packed) => return packed.raw(index),
        };
        let word = |word: usize| words[index * self.entry_words + word].load(Ordering::Acquire);
        RawL2Entry { descriptor: word(0), bitmap: if self.entry_words > 1 { word(1) } else { 0 } }
    }

    /// Returns how many entries from `index` on, at most `most`, have descriptors that
    /// grow by `step` from one to the next, and the same fault. The first of them is
    /// `first`, as the caller has read it.
    pub fn series(&self, index: usize, first: u64, step: u64, most: usize) -> usize {
        if let Entries::Packed(packed) = &self.entries {
            return packed.series(index, first, step, most);
        }
        let fault = self.fault(index);
        let mut expected = first;
        let follows = |next: &usize| {
            expected = expected.wrapping_add(step);
            self.raw(index + next).descriptor == expected && self.fault(index + next) == fault
        };
        1 + (1..most).take_while(follows).count()
    }

    /// Packs the entries of a clean table, if that makes it small. Returns whether it did.
    pub fn pack(&mut self, geometry: &Geometry) -> bool {
        assert!(self.is_clean(), "a packed table has nothing to write");
        if self.judged.is_some() || self.is_packed() {
            return false;
        }
        let entries = (0..self.words / self.entry_words).map(|index| self.raw(index));
        match Packed::new(entries, self.words, geometry.cluster_size()) {
            Some(packed) => self.entries = Entries::Packed(packed),
            None => return false,
        }
        true
    }

    /// Makes words of packed entries, so that they can change.
    pub fn unpack(&mut self) {
        if let Entries::Packed(packed) = &self.entries {
            let words = packed.iter().flat_map(|raw| [raw.descriptor, raw.bitmap]);
            let words = words.enumerate().filter(|(n, _)| n % 2 < self.entry_words);
            self.entries = Entries::Words(words.map(|(_, word)| AtomicU64::new(word)).collect());
        }
    }

    /// Whether the table has to be unpacked before an entry changes.
    pub fn is_packed(&self) -> bool {
        matches!(self.entries, Entries::Packed(_))
    }

    /// Returns the fault of the entry at `index`.
    pub fn fault(&self, index: usize) -> Fault {
        self.judged.as_ref().map_or(Fault::None, |judged| judged.fault(index))
    }

    /// Decodes the entry at `index`.
    ///
    /// # Errors
    /// As [`L2Table::decode`].
    pub fn entry(&self, index: usize, geometry: &Geometry) -> Result<L2Entry> {
        self.decode(index, self.raw(index), geometry)
    }

    /// Decodes `raw`, which [`L2Table::raw`] has returned for `index`. An entry whose refcount
    /// could not be read has no COPIED bit here, so that a write goes to a new cluster.
    ///
    /// # Errors
    /// [`host::ErrorKind::Corrupt`] for a bad entry.
    pub fn decode(&self, index: usize, raw: RawL2Entry, geometry: &Geometry) -> Result<L2Entry> {
        match &self.judged {
            None => Ok(L2Entry::decode(raw, geometry)?),
            Some(judged) => judged.entry(index, raw, self.host, geometry),
        }
    }

    /// Sets the raw entry at `index`, then marks its piece dirty. Returns the previous entry.
    ///
    /// # Panics
    /// If the table is packed.
    pub fn set(&self, index: usize, raw: RawL2Entry) -> RawL2Entry {
        let Entries::Words(words) = &self.entries else { panic!("a packed table was changed") };
        let swap = |word: usize, value: u64| {
            words[index * self.entry_words + word].swap(value, Ordering::AcqRel)
        };
        let before = RawL2Entry {
            descriptor: swap(0, raw.descriptor),
            bitmap: if self.entry_words > 1 { swap(1, raw.bitmap) } else { 0 },
        };
        if let Some(judged) = &self.judged {
            judged.replaced(index);
        }
        self.mark_dirty(index * self.entry_words);
        before
    }

    /// Marks the piece of a word dirty. An entry lies in one piece.
    fn mark_dirty(&self, word: usize) {
        let piece = word / PIECE_WORDS;
        self.dirty[piece / 64].fetch_or(1 << (piece % 64), Ordering::AcqRel);
    }

    /// Marks all pieces dirty.
    pub fn mark_all_dirty(&self) {
        for first in (0..self.words).step_by(PIECE_WORDS) {
            self.mark_dirty(first);
        }
    }

    /// Marks pieces clean and then copies them. In this order, a change between the two marks the
    /// piece dirty again. `start` is the table's host offset in bytes. Adjacent pieces are joined.
    pub fn take_dirty(&self, start: u64) -> Vec<(u64, Vec<u8>)> {
        let mut pieces: Vec<(u64, Vec<u8>)> = Vec::new();
        let Entries::Words(words) = &self.entries else {
            assert!(!self.has_dirty_piece(), "a packed table is clean");
            return pieces;
        };
        for (word, dirty) in self.dirty.iter().enumerate() {
            let mut bits = dirty.swap(0, Ordering::AcqRel);
            while bits != 0 {
                let piece = word * 64 + bits.trailing_zeros() as usize;
                bits &= bits - 1;
                let offset = start + (piece * PIECE) as u64;
                let words = words[piece * PIECE_WORDS..].iter().take(PIECE_WORDS);
                let bytes = words.flat_map(|word| word.load(Ordering::Acquire).to_be_bytes());
                match pieces.last_mut() {
                    Some((at, run)) if *at + run.len() as u64 == offset => run.extend(bytes),
                    _ => pieces.push((offset, bytes.collect())),
                }
            }
        }
        pieces
    }

    /// Marks pieces that [`L2Table::take_dirty`] returned dirty again after they were not written.
    pub fn dirty_again(&self, start: u64, pieces: &[(u64, Vec<u8>)]) {
        for (at, bytes) in pieces {
            // If the table has moved meanwhile, all of it is dirty already.
            if let Some(first) =
                at.checked_sub(start).filter(|first| *first < 8 * self.words as u64)
            {
                for offset in (first as usize..first as usize + bytes.len()).step_by(PIECE) {
                    self.mark_dirty(offset / 8);
                }
            }
        }
    }

    /// Returns whether disk and memory agree and the table is in no list for a pass.
    pub fn is_clean(&self) -> bool {
        !self.queued.load(Ordering::Acquire)
            && !self.l1_dirty.load(Ordering::Acquire)
            && !self.has_dirty_piece()
    }

    fn has_dirty_piece(&self) -> bool {
        self.dirty.iter().any(|word| word.load(Ordering::Acquire) != 0)
    }

    /// Returns the memory that the table takes, in bytes. Faults are not counted.
    pub fn bytes(&self) -> usize {
        let entries = match &self.entries {
            Entries::Words(words) => words.len() * 8,
            Entries::Packed(packed) => packed.bytes(),
        };
        entries + size_of::<L2Table>() + size_of_val(&*self.dirty)
    }
}
