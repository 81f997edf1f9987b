//! The L1 table in memory. It is kept in chunks, and a chunk without an entry takes no memory,
//! whatever size the header claims. For an image that is open for reading only, a chunk is read
//! when it is used. For writing, the whole table is read and checked at open: the clusters that
//! hold tables must be known before anything is written (R16).

use std::ops::Range;
use std::sync::OnceLock;

use super::allocator::Allocator;
use super::l2_table::L2Table;
use super::tables::corrupt;
use crate::format::{Header, L1Entry, be_words};
use host::storage::ReadAt;
use host::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use host::sync::{RwLock, rank};
use host::{Error, Result};

/// L1 entries that are read together: one page (4096 bytes) of the table.
pub(super) const CHUNK: usize = 512;

/// The bit of [`Slot::checked`] that says that there was a check.
pub(super) const IS_GOOD: u64 = 1 << 32;

/// One L1 entry, and its L2 table if that is in memory.
#[derive(Debug, Default)]
pub(super) struct Slot {
    /// The entry as it is on disk once everything is written back.
    pub l1_entry: AtomicU64,
    /// CRC-32 of the table on disk when it was loaded last, plus [`IS_GOOD`], if the check found
    /// nothing wrong with it; otherwise 0. A table that was evicted, and has the same bytes when it
    /// is loaded again, is not checked again: it is as if it had stayed in memory.
    pub checked: AtomicU64,
    /// The table, if it is in memory.
    pub table: RwLock<{ rank::SLOT }, Option<Box<L2Table>>>,
}

/// [`CHUNK`] entries of the L1 table.
#[derive(Debug, Default)]
pub(super) struct L1Chunk {
    /// The slots of the chunk. Set once, when the chunk is known to have an entry or gets one.
    pub slots: OnceLock<Box<[Slot]>>,
    /// Whether all entries of the chunk are zero on disk.
    pub is_empty: AtomicBool,
}

impl L1Chunk {
    /// Makes a chunk from at most [`CHUNK`] entries of the L1 table on disk.
    pub fn of(raw: &[u64]) -> L1Chunk {
        let chunk = L1Chunk::default();
        chunk.fill(raw);
        chunk
    }

    /// Sets the entries to those of the L1 table on disk.
    pub fn fill(&self, raw: &[u64]) {
        if raw.iter().all(|&entry| entry == 0) {
            self.is_empty.store(true, Ordering::Release);
        } else {
            self.slots.get_or_init(|| {
                let slot = |index| Slot {
                    l1_entry: AtomicU64::new(raw.get(index).copied().unwrap_or(0)),
                    ..Slot::default()
                };
                (0..CHUNK).map(slot).collect()
            });
        }
    }

    /// Returns the slots, and creates empty ones if the chunk has had no entry.
    pub fn made(&self) -> &[Slot] {
        self.slots.get_or_init(|| (0..CHUNK).map(|_| Slot::default()).collect())
    }
}

/// The L1 table, as far as it is in memory.
#[derive(Debug)]
pub(super) struct Slots {
    /// Number of entries.
    pub len: usize,
    /// All chunks of the table, [`CHUNK`] entries each.
    pub chunks: Vec<L1Chunk>,
}

impl Slots {
    /// Returns the slot of an L1 index, if its chunk is in memory.
    pub fn get(&self, l1_index: usize) -> Option<&Slot> {
        self.chunks[l1_index / CHUNK].slots.get().map(|slots| &slots[l1_index % CHUNK])
    }

    /// Returns the slot of a table that is resident.
    pub fn of_table(&self, l1_index: usize) -> &Slot {
        self.get(l1_index).expect("a resident table has a slot")
    }

    /// Returns the L1 indexes in the chunk of an L1 index.
    pub fn in_chunk(&self, l1_index: usize) -> Range<usize> {
        let start = l1_index / CHUNK * CHUNK;
        start..(start + CHUNK).min(self.len)
    }
}

/// Reads the L1 table of an image that is open for writing, checks it (V22) and claims the clusters
/// of all L2 tables that it names.
pub(super) fn claimed_chunks(
    storage: &dyn ReadAt,
    header: &Header,
    allocator: &Allocator,
) -> Result<Vec<L1Chunk>> {
    let geometry = header.geometry;
    let mut raw = vec![0; header.l1_size as usize * 8];
    storage
        .read_at(header.l1_table_offset, &mut raw)
        .map_err(|error| Error::io("L1 table", error))?;
    let raw: Vec<u64> = be_words(&raw).collect();
    for (index, &raw) in raw.iter().enumerate() {
        let entry = L1Entry::decode(raw, &geometry)
            .map_err(|error| Error::from(error).context(format!("L1 table, index {index}")))?;
        if let Some(entry) = entry {
            // The file must contain all of an L2 table, but only the start of a data cluster.
            let end = geometry.host_offset(entry.table).0.checked_add(geometry.cluster_size());
            if end.is_none_or(|end| end > storage.size()) {
                return Err(corrupt(format!(
                    "L1 table, index {index}: L2 table at {} is outside the file",
                    geometry.host_offset(entry.table)
                )));
            }
            allocator.claim_l2_table(entry.table, index)?;
        }
    }
    Ok(raw.chunks(CHUNK).map(L1Chunk::of).collect())
}
