//! The L1 table in memory: kept in chunks, so that one without an entry takes no memory, whatever the
//! header claims. Those of an image that is only read are read when they are used. For writing all of it
//! is read and checked at open: which clusters hold tables must be known before anything is written (R16).

use std::ops::Range;
use std::sync::OnceLock;

use super::allocator::Allocator;
use super::l2_table::L2Table;
use super::tables::{be64, corrupt};
use crate::format::{Header, L1Entry};
use crate::storage::Storage;
use crate::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use crate::sync::{RwLock, rank};
use crate::{Error, Result};

/// L1 entries that are read together: one page of the table.
pub(super) const CHUNK: usize = 512;

/// One L1 entry and the table it names, if that is in memory.
#[derive(Debug, Default)]
pub(super) struct Slot {
    /// As it is to be on disk once everything is written back.
    pub l1_entry: AtomicU64,
    /// Resident where there is one.
    pub table: RwLock<{ rank::SLOT }, Option<Box<L2Table>>>,
}

/// [`CHUNK`] entries of the L1 table.
#[derive(Debug, Default)]
pub(super) struct Chunk {
    /// Set once and for good, where there is an entry.
    pub slots: OnceLock<Box<[Slot]>>,
    /// On disk all of its entries are zero.
    pub is_empty: AtomicBool,
}

impl Chunk {
    /// A chunk of the L1 table as it stands in the file, at most [`CHUNK`] entries.
    pub fn of(raw: &[u64]) -> Chunk {
        let chunk = Chunk::default();
        chunk.fill(raw);
        chunk
    }

    /// Takes the entries as they stand in the file.
    pub fn fill(&self, raw: &[u64]) {
        if raw.iter().all(|&entry| entry == 0) {
            self.is_empty.store(true, Ordering::Release);
        } else {
            self.slots.get_or_init(|| {
                let slot = |index| Slot { l1_entry: AtomicU64::new(raw.get(index).copied().unwrap_or(0)), ..Slot::default() };
                (0..CHUNK).map(slot).collect()
            });
        }
    }

    /// Its slots, made where it has had no entry.
    pub fn made(&self) -> &[Slot] {
        self.slots.get_or_init(|| (0..CHUNK).map(|_| Slot::default()).collect())
    }
}

/// The L1 table, as far as it is known.
#[derive(Debug)]
pub(super) struct Slots {
    /// Number of entries.
    pub len: usize,
    /// All of them, [`CHUNK`] entries each.
    pub chunks: Vec<Chunk>,
}

impl Slots {
    /// The slot of an L1 index, where its chunk is in memory.
    pub fn get(&self, l1_index: usize) -> Option<&Slot> {
        self.chunks[l1_index / CHUNK].slots.get().map(|slots| &slots[l1_index % CHUNK])
    }

    /// The slot of a table that is resident.
    pub fn of_table(&self, l1_index: usize) -> &Slot {
        self.get(l1_index).expect("a resident table has a slot")
    }

    /// The entries in the chunk of an L1 index, by L1 index.
    pub fn in_chunk(&self, l1_index: usize) -> Range<usize> {
        let start = l1_index / CHUNK * CHUNK;
        start..(start + CHUNK).min(self.len)
    }
}

/// The L1 table of an image that is written: read, checked (V22), and all that it names claimed.
pub(super) fn claimed_chunks(storage: &dyn Storage, header: &Header, allocator: &Allocator) -> Result<Vec<Chunk>> {
    let geometry = header.geometry;
    let mut raw = vec![0; header.l1_size as usize * 8];
    storage.read_at(header.l1_table_offset, &mut raw).map_err(|error| Error::io("L1 table", error))?;
    let raw: Vec<u64> = raw.chunks_exact(8).map(be64).collect();
    for (index, &raw) in raw.iter().enumerate() {
        let entry = L1Entry::decode(raw, &geometry).map_err(|error| Error::from(error).context(format!("L1 table, index {index}")))?;
        if let Some(entry) = entry {
            // An L2 table must be there whole, unlike a data cluster, of which only the start must be.
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
    Ok(raw.chunks(CHUNK).map(Chunk::of).collect())
}
