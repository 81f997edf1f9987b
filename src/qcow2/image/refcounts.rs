//! The refcount table and its blocks in memory. Blocks are loaded on demand, dirty pieces are
//! tracked, and the table can move.
//!
//! This module stores counts, and which clusters are metadata. The allocator decides which clusters
//! are handed out.

use std::collections::{BTreeSet, VecDeque};
use std::ops::Range;
use std::sync::Arc;

use self::data::DataClusters;
use super::changed::ChangedClusters;
use crate::format::{Geometry, Header, HostCluster, RefcountBlock, be_words, decode_table_entry};
use host::mutants::{Step, without};
use host::storage::ReadAt;
use host::{Error, ErrorKind, Result};

mod data;

/// Size of the pieces in which a refcount block is written back, in bytes.
const PIECE: usize = 4096;

/// Memory for refcount blocks, in bytes. It is exceeded only while blocks are dirty, and by the
/// blocks that one operation uses. This is four times QEMU's size and enough: operations that use
/// many blocks use them in file order, and a block that is read again comes from the host's page
/// cache.
const BLOCK_MEMORY: usize = 1 << 20;
/// Least number of blocks kept in memory, whatever their size.
const BLOCKS_AT_LEAST: usize = 4;

/// The parts of the refcounts that the write-back pass has to write.
#[derive(Debug, Default)]
pub(super) struct RefcountWrites {
    /// Pieces of refcount blocks: host offset in bytes, and the bytes.
    pub pieces: Vec<(u64, Vec<u8>)>,
    /// Table entries of new blocks: host offset in bytes, and the entry.
    pub entries: Vec<(u64, u64)>,
    /// The whole table, if it moved.
    pub table: Option<NewTable>,
    dirty: BTreeSet<(usize, usize)>,
    new_blocks: BTreeSet<usize>,
}

/// A refcount table that moved because it grew (R6).
#[derive(Debug)]
pub(super) struct NewTable {
    /// New host offset of the table, in bytes.
    pub offset: u64,
    /// Size of the table, in clusters.
    pub clusters: u32,
    /// The content of the table.
    pub bytes: Vec<u8>,
    /// Clusters of the old tables: first cluster and count of each. They are free once the header
    /// names the new table.
    pub old: Vec<(HostCluster, u64)>,
}

/// The refcount table and its blocks.
#[derive(Debug)]
pub(super) struct RefcountTable {
    storage: Arc<dyn ReadAt>,
    geometry: Geometry,
    /// First cluster of the table, and its size in clusters.
    table: (HostCluster, u64),
    /// The tables that this one replaces, until a pass has made the header name the new one. There
    /// are several if the table moved again before a pass succeeded. The header may name any of
    /// them, because a failed pass may already have changed it.
    old_tables: Vec<(HostCluster, u64)>,
    /// The table: the cluster of each block, 0 for none.
    entries: Vec<u64>,
    /// The blocks that are in memory.
    blocks: Vec<Option<RefcountBlock>>,
    /// Indexes of the resident blocks, oldest first.
    resident: VecDeque<usize>,
    /// Limit for resident blocks, in bytes.
    memory: usize,
    /// Set while a write-back pass has copied blocks and not written them yet. A block that is
    /// dropped then would be read back with its old content.
    writing_back: bool,
    /// Pieces of blocks to write: (block, piece).
    dirty: BTreeSet<(usize, usize)>,
    /// Blocks whose table entry is not on disk.
    new_blocks: BTreeSet<usize>,
    /// Clusters of the header, of tables and of refcount blocks. Guest data must not be in them
    /// (V24, V27, R16).
    metadata: BTreeSet<u64>,
    /// What `blocks` and `metadata` say, for many more blocks than are in memory.
    data: DataClusters,
    /// Every cluster whose refcount was set, while a late search for leaks needs to know.
    pub changed: Option<ChangedClusters>,
}

impl RefcountTable {
    /// Reads the table and checks each of its entries (V23).
    pub fn open(storage: Arc<dyn ReadAt>, header: &Header) -> Result<Self> {
        let geometry = header.geometry;
        let clusters = u64::from(header.refcount_table_clusters);
        let mut raw = vec![0; (clusters * geometry.cluster_size()) as usize];
        storage
            .read_at(header.refcount_table_offset, &mut raw)
            .map_err(|error| Error::io("refcount table", error))?;
        let mut entries = Vec::with_capacity(raw.len() / 8);
        for (index, raw) in be_words(&raw).enumerate() {
            let block = decode_table_entry(raw, &geometry).map_err(|error| {
                Error::from(error).context(format!("refcount table, index {index}"))
            })?;
            if let Some(block) = block {
                let end = geometry.host_offset(block).0.checked_add(geometry.cluster_size());
                if end.is_none_or(|end| end > storage.size()) {
                    let offset = geometry.host_offset(block);
                    return Err(corrupt(format!(
                        "refcount table, index {index}: block at {offset} is outside the file"
                    )));
                }
            }
            entries.push(block.map_or(0, |block| block.0));
        }
        Ok(RefcountTable {
            storage,
            geometry,
            table: (HostCluster(header.refcount_table_offset >> geometry.cluster_bits()), clusters),
            old_tables: Vec::new(),
            blocks: vec![None; entries.len()],
            resident: VecDeque::new(),
            memory: BLOCK_MEMORY.max(BLOCKS_AT_LEAST << header.geometry.cluster_bits()),
            writing_back: false,
            entries,
            dirty: BTreeSet::new(),
            new_blocks: BTreeSet::new(),
            metadata: BTreeSet::new(),
            data: DataClusters::new(geometry.refblock_entries()),
            changed: None,
        })
    }

    /// Returns the clusters of the table itself: first cluster and count.
    pub fn place(&self) -> (HostCluster, u64) {
        self.table
    }

    /// Returns how many blocks the table can name.
    pub fn capacity(&self) -> u64 {
        self.entries.len() as u64
    }

    /// Returns the clusters of all blocks, with their indexes.
    pub fn blocks(&self) -> impl Iterator<Item = (usize, HostCluster)> {
        self.entries
            .iter()
            .enumerate()
            .filter(|&(_, &cluster)| cluster != 0)
            .map(|(index, &cluster)| (index, HostCluster(cluster)))
    }

    /// Returns whether there is a block at `index`.
    pub fn has_block(&self, index: u64) -> bool {
        usize::try_from(index)
            .ok()
            .and_then(|index| self.entries.get(index))
            .is_some_and(|&cluster| cluster != 0)
    }

    /// Returns how many clusters a block counts.
    fn per_block(&self) -> u64 {
        self.geometry.refblock_entries()
    }

    /// Returns the index of the block that counts a cluster, and the index inside that block.
    pub fn index_of(&self, cluster: u64) -> (u64, u64) {
        (cluster / self.per_block(), cluster % self.per_block())
    }

    /// Returns the refcount of a cluster; zero if no block covers it.
    pub fn get(&mut self, cluster: u64) -> Result<u64> {
        let (block, index) = self.index_of(cluster);
        Ok(self.block(block)?.map_or(0, |block| block.get(index as usize)))
    }

    /// Returns the clusters of a range under one block whose refcount is zero; none if there is no
    /// block.
    pub fn free_in(&mut self, clusters: Range<u64>) -> Result<Vec<u64>> {
        let entries = self.geometry.refblock_entries();
        Ok(match self.block(clusters.start / entries)? {
            Some(block) => {
                clusters.filter(|cluster| block.get((cluster % entries) as usize) == 0).collect()
            }
            None => Vec::new(),
        })
    }

    /// Drops the oldest clean blocks while there are too many in memory, and looks at a bounded
    /// number of them. An operation that changes refcounts calls this at its start only: the blocks
    /// that it loads stay until it ends, so that it cannot fail half-way.
    pub fn evict(&mut self) {
        let most = self.memory >> self.geometry.cluster_bits();
        let mut tries = self.resident.len().min(1024);
        while self.resident.len() > most && tries > 0 && !self.writing_back {
            tries -= 1;
            let Some(index) = self.resident.pop_front() else { return };
            if self.new_blocks.contains(&index)
                || self.dirty.range((index, 0)..=(index, usize::MAX)).next().is_some()
            {
                self.resident.push_back(index);
            } else {
                self.blocks[index] = None;
            }
        }
    }

    #[cfg(test)]
    pub fn limit_memory(&mut self, bytes: usize) {
        self.memory = bytes;
        self.data.room = bytes;
    }

    #[cfg(test)]
    pub fn resident(&self) -> usize {
        assert_eq!(self.resident.len(), self.blocks.iter().flatten().count());
        self.resident.len()
    }

    /// Returns the block at `index` and loads it if needed; `None` if the table names none.
    fn block(&mut self, index: u64) -> Result<Option<&mut RefcountBlock>> {
        if !self.has_block(index) {
            return Ok(None);
        }
        let index = index as usize;
        let slot = &mut self.blocks[index];
        if slot.is_none() {
            let mut bytes = vec![0; self.geometry.cluster_size() as usize].into_boxed_slice();
            let offset = self.geometry.host_offset(HostCluster(self.entries[index]));
            self.storage
                .read_at(offset.0, &mut bytes)
                .map_err(|error| Error::io(format!("refcount block at {offset}"), error))?;
            *slot = Some(RefcountBlock::from_bytes(bytes, &self.geometry));
            self.resident.push_back(index);
        }
        Ok(slot.as_mut())
    }

    /// Sets a refcount. A value beyond the refcount width is an error (R15).
    pub fn set(&mut self, cluster: u64, value: u64) -> Result<()> {
        let (index, entry) = self.index_of(cluster);
        let Some(block) = self.block(index)? else {
            return Err(corrupt(format!("cluster {cluster} has no refcount block")));
        };
        if value > block.max() {
            return Err(corrupt(format!("refcount of cluster {cluster} overflows")));
        }
        block.set(entry as usize, value);
        if self.data.has_block(index) {
            self.data.set(cluster, value == 1 && !self.metadata.contains(&cluster));
        }
        self.change(cluster);
        let piece = ((entry << self.geometry.refcount_order()) / 8) as usize / PIECE;
        self.dirty.insert((index as usize, piece));
        Ok(())
    }

    /// Marks a cluster as metadata. Returns whether it was none before.
    pub fn add_metadata(&mut self, cluster: u64) -> bool {
        if !without(Step::MetadataIsNotKnownAsData) {
            self.data.set(cluster, false);
        }
        self.metadata.insert(cluster)
    }

    /// Records that a cluster, whose refcount is zero now, is no longer metadata.
    pub fn remove_metadata(&mut self, cluster: u64) {
        self.metadata.remove(&cluster);
    }

    /// Returns whether a cluster is metadata.
    pub fn is_metadata(&self, cluster: u64) -> bool {
        self.metadata.contains(&cluster)
    }

    /// Returns the end of the last cluster that is metadata, as a cluster number.
    pub fn end_of_metadata(&self) -> u64 {
        self.metadata.last().map_or(0, |last| last + 1)
    }

    /// Returns whether all of these clusters are known to have a refcount of one and to be no
    /// metadata. Reads nothing.
    pub fn are_known_data(&self, clusters: &Range<u64>) -> bool {
        self.data.contain(clusters)
    }

    /// Returns whether L2 entries may name these clusters: none is metadata or has a refcount of
    /// zero, and all have one if the entries say COPIED (V24, V27, R9).
    ///
    /// # Errors
    /// The index of a refcount block that cannot be read.
    pub fn may_be_named(&mut self, clusters: &Range<u64>, in_place: bool) -> Result<bool, u64> {
        if self.metadata.range(clusters.clone()).next().is_some() {
            return Ok(false);
        }
        let mut at = clusters.start;
        while at < clusters.end {
            self.evict();
            let (index, first) = self.index_of(at);
            let len = (clusters.end - at).min(self.per_block() - first);
            self.know(index)?;
            let Some(block) = self.block(index).map_err(|_| index)? else { return Ok(false) };
            let mut counts = (first..first + len).map(|index| block.get(index as usize));
            if !counts.all(|count| count == 1 || count > 1 && !in_place) {
                return Ok(false);
            }
            at += len;
        }
        Ok(true)
    }

    /// Makes the clusters under a block known, if there is one, and memory for it.
    fn know(&mut self, index: u64) -> Result<(), u64> {
        if !self.has_block(index) || self.data.has_block(index) || !self.data.has_room() {
            return Ok(());
        }
        self.block(index).map_err(|_| index)?;
        let first = index * self.per_block();
        if let Some(block) = &self.blocks[index as usize] {
            self.data.fill(index, |at| block.get(at) == 1);
            for &cluster in self.metadata.range(first..first + self.per_block()) {
                self.data.set(cluster, false);
            }
        }
        Ok(())
    }

    /// Records that a cluster is used or freed, although its refcount stays for now.
    pub fn change(&mut self, cluster: u64) {
        if let Some(changed) = &mut self.changed {
            changed.add(cluster);
        }
    }

    /// Returns the index of the first block from this index on.
    pub fn next_block(&self, index: u64) -> Option<u64> {
        let from = usize::try_from(index).ok()?;
        let found = self.entries.get(from..)?.iter().position(|&cluster| cluster != 0)?;
        Some(index + found as u64)
    }

    /// Puts a new block of zeros into cluster `at`.
    ///
    /// # Panics
    /// If `index` is beyond the table, or there is a block already.
    pub fn add_block(&mut self, index: u64, at: u64) {
        assert!(!self.has_block(index));
        let index = index as usize;
        self.entries[index] = at;
        self.blocks[index] = Some(RefcountBlock::new(&self.geometry));
        self.resident.push_back(index);
        self.new_blocks.insert(index);
        for piece in 0..(self.geometry.cluster_size() as usize).div_ceil(PIECE) {
            self.dirty.insert((index, piece));
        }
    }

    /// Resizes the table in memory to `blocks` entries. Entries beyond that must be empty.
    pub fn resize(&mut self, blocks: u64) {
        self.entries.resize(blocks as usize, 0);
        self.blocks.resize(blocks as usize, None);
    }

    /// Sets a new location for the table, large enough for all of it. The next pass writes it
    /// there.
    pub fn move_to(&mut self, place: (HostCluster, u64)) {
        let left = std::mem::replace(&mut self.table, place);
        self.old_tables.push(left);
    }

    /// Marks dirty pieces clean and copies them, for step 4 of the write-back pass. No block is
    /// evicted until [`RefcountTable::written`] or [`RefcountTable::not_written`].
    pub fn take_dirty(&mut self) -> RefcountWrites {
        self.writing_back = true;
        let mut writes = RefcountWrites {
            dirty: std::mem::take(&mut self.dirty),
            new_blocks: std::mem::take(&mut self.new_blocks),
            ..RefcountWrites::default()
        };
        for &(index, piece) in &writes.dirty {
            let block = self.blocks[index].as_ref().expect("a dirty block is resident");
            let offset = self.geometry.host_offset(HostCluster(self.entries[index])).0
                + (piece * PIECE) as u64;
            let bytes = block.bytes();
            let bytes = &bytes[piece * PIECE..bytes.len().min((piece + 1) * PIECE)];
            match writes.pieces.last_mut() {
                Some((at, run)) if *at + run.len() as u64 == offset => run.extend_from_slice(bytes),
                _ => writes.pieces.push((offset, bytes.to_vec())),
            }
        }
        let table_offset = self.geometry.host_offset(self.table.0).0;
        let entry = |index: usize| self.geometry.host_offset(HostCluster(self.entries[index])).0;
        if self.old_tables.is_empty() {
            writes.entries = writes
                .new_blocks
                .iter()
                .map(|&index| (table_offset + index as u64 * 8, entry(index)))
                .collect();
        } else {
            writes.table = Some(NewTable {
                offset: table_offset,
                clusters: self.table.1 as u32,
                bytes: (0..self.entries.len())
                    .flat_map(|index| entry(index).to_be_bytes())
                    .collect(),
                old: std::mem::take(&mut self.old_tables),
            });
        }
        writes
    }

    /// Ends a pass after everything that [`RefcountTable::take_dirty`] returned is on disk.
    pub fn written(&mut self) {
        self.writing_back = false;
        self.evict();
    }

    /// Marks `writes` dirty again after the pass failed before all of them were durable.
    pub fn not_written(&mut self, writes: RefcountWrites) {
        self.writing_back = false;
        self.dirty.extend(writes.dirty);
        self.new_blocks.extend(writes.new_blocks);
        if let Some(table) = writes.table {
            self.old_tables.extend(table.old);
        }
    }

    /// Returns whether a pass would have work.
    pub fn is_dirty(&self) -> bool {
        !self.dirty.is_empty() || !self.new_blocks.is_empty() || !self.old_tables.is_empty()
    }
}

fn corrupt(text: String) -> Error {
    Error::new(ErrorKind::Corrupt, text)
}
