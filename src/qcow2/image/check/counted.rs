//! Reads the refcounts as they are on disk, whatever defects their table has.

use std::collections::{HashMap, VecDeque};
use std::time::Instant;

use crate::format::{Geometry, Header, RefcountBlock, be_words};
use host::storage::ReadAt;
use host::{Error, Result};

/// Memory for refcount blocks, in bytes. 64 MiB hold the blocks of 2 TiB at 64 KiB clusters.
const MEMORY: usize = 64 << 20;
/// Bits of a refcount table entry that are not part of the offset.
const RESERVED: u64 = 0x1ff;
/// QEMU's BDRV_MAX_LENGTH. QEMU reads no block that ends beyond it.
const FARTHEST: u64 = (i64::MAX as u64) & !((1 << 30) - 1);

/// One entry of the refcount table.
#[derive(Clone, Copy, Debug)]
pub(super) struct BlockEntry(pub u64);

impl BlockEntry {
    /// Returns whether reserved bits are set.
    pub fn has_reserved_bits(self) -> bool {
        self.0 & RESERVED != 0
    }

    /// Returns the host offset of the block in bytes; 0 if there is none.
    pub fn offset(self) -> u64 {
        self.0 & !RESERVED
    }
}

/// Reads refcounts, block by block.
#[derive(Debug)]
pub(super) struct Counted<'a> {
    storage: &'a dyn ReadAt,
    geometry: Geometry,
    table: Vec<BlockEntry>,
    /// Cached blocks, by host offset in bytes.
    blocks: HashMap<u64, RefcountBlock>,
    /// Offsets of the cached blocks, in the order in which they were loaded.
    order: VecDeque<u64>,
}

impl<'a> Counted<'a> {
    /// Reads the table. Entries beyond the end of the file are zero.
    pub fn open(storage: &'a dyn ReadAt, header: &Header) -> Result<Self> {
        let geometry = header.geometry;
        let mut raw =
            vec![0; (u64::from(header.refcount_table_clusters) * geometry.cluster_size()) as usize];
        storage
            .read_at(header.refcount_table_offset, &mut raw)
            .map_err(|error| Error::io("refcount table", error))?;
        let table = be_words(&raw).map(BlockEntry).collect();
        Ok(Counted { storage, geometry, table, blocks: HashMap::new(), order: VecDeque::new() })
    }

    /// Returns the entries of the table.
    pub fn table(&self) -> &[BlockEntry] {
        &self.table
    }

    /// Returns the refcount of a cluster, zero if no block covers it; `None` if the block cannot be
    /// read because its entry is no valid offset.
    pub fn get(&mut self, cluster: u64) -> Result<Option<u64>> {
        let entries = self.geometry.refblock_entries();
        let offset = self.offset(cluster);
        if offset == 0 {
            return Ok(Some(0));
        }
        if !offset.is_multiple_of(self.geometry.cluster_size())
            || offset > FARTHEST - self.geometry.cluster_size()
        {
            return Ok(None);
        }
        if offset >= self.storage.size() {
            return Ok(Some(0));
        }
        Ok(Some(self.block(offset)?.get((cluster % entries) as usize)))
    }

    /// Returns the first cluster from this one on, under the same block, whose refcount is not
    /// zero.
    pub fn next_counted(&mut self, cluster: u64) -> Result<Option<u64>> {
        if self.get(cluster)?.is_none_or(|count| count > 0) {
            return Ok(self.get(cluster)?.map(|_| cluster));
        }
        let (entries, order) = (self.geometry.refblock_entries(), self.geometry.refcount_order());
        let (index, offset) = (cluster % entries, self.offset(cluster));
        if offset == 0 || offset >= self.storage.size() {
            return Ok(None);
        }
        let block = self.block(offset)?;
        let first = ((index << order) / 8) as usize;
        let Some(zeros) = block.bytes()[first..].iter().position(|byte| *byte != 0) else {
            return Ok(None);
        };
        // One entry in that byte is not zero, but it may lie before `index`.
        let from = (((first + zeros) as u64 * 8) >> order).max(index);
        Ok((from..entries)
            .find(|index| block.get(*index as usize) != 0)
            .map(|found| cluster - index + found))
    }

    /// If no block counts this cluster, returns the first cluster of the next block; all refcounts
    /// before that are zero. Otherwise returns `None`.
    pub fn none_until(&self, cluster: u64) -> Option<u64> {
        let entries = self.geometry.refblock_entries();
        (self.offset(cluster) == 0).then(|| (cluster / entries + 1).saturating_mul(entries))
    }

    /// Returns the host offset of the block of a cluster according to the table, in bytes; 0 if
    /// there is none.
    fn offset(&self, cluster: u64) -> u64 {
        let index = usize::try_from(cluster / self.geometry.refblock_entries()).ok();
        index.and_then(|index| self.table.get(index)).map_or(0, |entry| entry.offset())
    }

    fn block(&mut self, offset: u64) -> Result<&RefcountBlock> {
        if !self.blocks.contains_key(&offset) {
            let size = self.geometry.cluster_size() as usize;
            let mut bytes = vec![0; size].into_boxed_slice();
            self.storage
                .read_at(offset, &mut bytes)
                .map_err(|error| Error::io(format!("refcount block at {offset:#x}"), error))?;
            while self.blocks.len() * size >= MEMORY
                && let Some(oldest) = self.order.pop_front()
            {
                self.blocks.remove(&oldest);
            }
            self.order.push_back(offset);
            self.blocks.insert(offset, RefcountBlock::from_bytes(bytes, &self.geometry));
        }
        Ok(&self.blocks[&offset])
    }
}

/// Returns how many of the first `clusters` clusters have a refcount on disk. Stops counting at
/// `enough`. After `deadline` the remaining clusters count as free.
///
/// # Errors
/// I/O.
pub fn allocated_clusters(
    storage: &dyn ReadAt,
    header: &Header,
    clusters: u64,
    enough: u64,
    deadline: Instant,
) -> Result<u64> {
    let mut counted = Counted::open(storage, header)?;
    let entries = header.geometry.refblock_entries();
    let (mut at, mut found) = (0, 0);
    while at < clusters && found < enough {
        // No refcount exists beyond the table. The clock is read once per block.
        let is_behind = at / entries >= counted.table().len() as u64;
        if is_behind || at.is_multiple_of(entries) && Instant::now() >= deadline {
            break;
        }
        if let Some(next) = counted.none_until(at) {
            at = next;
            continue;
        }
        found += u64::from(counted.get(at)?.is_some_and(|count| count > 0));
        at += 1;
    }
    Ok(found)
}

/// Returns the end of the last cluster that has a refcount on disk, as a cluster number. After
/// `deadline` returns an upper bound.
///
/// # Errors
/// I/O.
pub fn counted_end(storage: &dyn ReadAt, header: &Header, deadline: Instant) -> Result<u64> {
    let mut counted = Counted::open(storage, header)?;
    let entries = header.geometry.refblock_entries();
    for index in (0..counted.table().len() as u64).rev() {
        let first = index * entries;
        if counted.none_until(first).is_some() {
            continue;
        }
        if Instant::now() >= deadline {
            return Ok(first + entries);
        }
        if counted.next_counted(first)?.is_some() {
            for cluster in (first..first + entries).rev() {
                if counted.get(cluster)?.is_some_and(|count| count > 0) {
                    return Ok(cluster + 1);
                }
            }
        }
    }
    Ok(0)
}
