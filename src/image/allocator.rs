//! Host clusters: which are free, whose they are, and the refcounts that say so on disk.
//!
//! New clusters come from gaps first, then from the end of the file. A refcount is raised before anything points to the cluster; it is lowered
//! only by the write-back pass, when the pointer's removal is durable (R3), and the cluster is handed out again only after its space was punched
//! (R7). On disk refcounts may therefore be too high after a crash (leaks), never too low (I2).

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::ops::Range;
use std::sync::Arc;

use crate::format::{Geometry, Header, HostCluster, RefcountBlock, decode_table_entry};
use crate::storage::Storage;
use crate::sync::{Mutex, rank};
use crate::{Error, ErrorKind, Result};

/// Largest refcount table, bytes (V9; QEMU: QCOW_MAX_REFTABLE_SIZE).
const MAX_TABLE_BYTES: u64 = 8 << 20;

/// A refcount block is written back in pieces of this many bytes.
const PIECE: usize = 4096;

/// Gaps looked at for one that is large enough, before the first is taken as it is.
const GAPS_LOOKED_AT: usize = 64;

/// What the write-back pass has to write of the refcounts.
#[derive(Debug, Default)]
pub(super) struct RefcountWrites {
    /// Host offsets in bytes and bytes of refcount blocks.
    pub pieces: Vec<(u64, Vec<u8>)>,
    /// Table entries of new blocks: host offset in bytes, and the entry.
    pub entries: Vec<(u64, u64)>,
    /// The whole table, where it moved.
    pub table: Option<NewTable>,
    dirty: BTreeSet<(usize, usize)>,
    new_blocks: BTreeSet<usize>,
}

/// A refcount table that moved because it grew (R6).
#[derive(Debug)]
pub(super) struct NewTable {
    /// Where it is now, bytes.
    pub offset: u64,
    /// How many clusters.
    pub clusters: u32,
    /// All of it.
    pub bytes: Vec<u8>,
    /// The clusters it leaves, first and count; free once the header names the new one.
    pub old: Vec<(HostCluster, u64)>,
}

/// The allocator of one writable image.
#[derive(Debug)]
pub(super) struct Allocator {
    storage: Arc<dyn Storage>,
    geometry: Geometry,
    state: Mutex<{ rank::ALLOCATOR }, State>,
}

#[derive(Debug)]
struct State {
    /// Where the refcount table is, and how many clusters it has.
    table: (HostCluster, u64),
    /// The tables it replaces, until a pass has made the header name the new one: several where it moved again before a pass went well. The
    /// header may name any of them, since a failed pass may have got as far as that.
    old_tables: Vec<(HostCluster, u64)>,
    /// The refcount table: cluster of each block, 0 for none.
    entries: Vec<u64>,
    /// Blocks in memory. They stay: two bytes a cluster at the usual width.
    blocks: Vec<Option<RefcountBlock>>,
    /// Clusters of header, tables and blocks: no guest data may be there (V24, V27, R16).
    metadata: HashSet<u64>,
    /// Free runs known so far, start to length in clusters. All below `end`.
    gaps: BTreeMap<u64, u64>,
    /// Clusters below this one have been searched for gaps.
    searched: u64,
    /// Nothing at or above this cluster is metadata or was handed out.
    end: u64,
    /// Pieces of blocks to write: (block, piece).
    dirty: BTreeSet<(usize, usize)>,
    /// Blocks whose table entry is not on disk.
    new_blocks: BTreeSet<usize>,
    /// References dropped in memory, still counted on disk: cluster to number of references.
    pending: BTreeMap<u64, u64>,
}

impl Allocator {
    /// Reads and checks the refcount table (V23).
    pub fn open(storage: Arc<dyn Storage>, header: &Header) -> Result<Self> {
        let geometry = header.geometry;
        let cluster_size = geometry.cluster_size();
        let table_clusters = u64::from(header.refcount_table_clusters);
        let mut raw = vec![0; (table_clusters * cluster_size) as usize];
        storage.read_at(header.refcount_table_offset, &mut raw).map_err(|error| Error::io("refcount table", error))?;
        let table = HostCluster(header.refcount_table_offset >> geometry.cluster_bits());
        let l1_start = header.l1_table_offset >> geometry.cluster_bits();
        let l1_clusters = (u64::from(header.l1_size) * 8).div_ceil(cluster_size);
        let mut metadata: HashSet<u64> = std::iter::once(0).collect();
        metadata.extend(table.0..table.0 + table_clusters);
        metadata.extend(l1_start..l1_start + l1_clusters);
        let mut entries = Vec::with_capacity(raw.len() / 8);
        for (index, raw) in raw.chunks_exact(8).enumerate() {
            let raw = raw.iter().fold(0, |value, &byte| value << 8 | u64::from(byte));
            let block =
                decode_table_entry(raw, &geometry).map_err(|error| Error::from(error).context(format!("refcount table, index {index}")))?;
            if let Some(block) = block {
                let end = geometry.host_offset(block).0.checked_add(cluster_size);
                if end.is_none_or(|end| end > storage.size()) {
                    return Err(corrupt(format!(
                        "refcount table, index {index}: block at {} is outside the file",
                        geometry.host_offset(block)
                    )));
                }
                if !metadata.insert(block.0) {
                    return Err(corrupt(format!(
                        "refcount table, index {index}: block at {} overlaps other metadata",
                        geometry.host_offset(block)
                    )));
                }
            }
            entries.push(block.map_or(0, |block| block.0));
        }
        // What no refcount block covers is free, however much of the file (or device) there is: nothing is searched there, and it is used next.
        let covered =
            entries.iter().rposition(|&block| block != 0).map_or(0, |last| (last as u64 + 1).saturating_mul(geometry.refblock_entries()));
        let behind_metadata = metadata.iter().max().map_or(0, |last| last + 1);
        let end = storage.size().div_ceil(cluster_size).min(covered).max(behind_metadata);
        let state = State {
            table: (table, table_clusters),
            old_tables: Vec::new(),
            blocks: vec![None; entries.len()],
            entries,
            metadata,
            gaps: BTreeMap::new(),
            searched: 1,
            end,
            dirty: BTreeSet::new(),
            new_blocks: BTreeSet::new(),
            pending: BTreeMap::new(),
        };
        Ok(Allocator { storage, geometry, state: Mutex::new(state) })
    }

    /// At open: an L1 entry names this cluster as L2 table.
    pub fn claim_l2_table(&self, cluster: HostCluster, l1_index: usize) -> Result<()> {
        let mut state = self.state.lock();
        state.end = state.end.max(cluster.0 + 1);
        if !state.metadata.insert(cluster.0) {
            return Err(corrupt(format!(
                "L1 table, index {l1_index}: L2 table at {} overlaps other metadata",
                self.geometry.host_offset(cluster)
            )));
        }
        Ok(())
    }

    /// A cluster from [`Allocator::allocate`] now holds metadata.
    pub fn became_l2_table(&self, cluster: HostCluster) {
        self.state.lock().metadata.insert(cluster.0);
    }

    /// Whether an L2 entry may name this cluster: not metadata, referenced, and exactly once if it says so (V24, V27, R9).
    pub fn check_data(&self, cluster: HostCluster, in_place: bool) -> Result<()> {
        let mut state = self.state.lock();
        let offset = self.geometry.host_offset(cluster);
        if state.metadata.contains(&cluster.0) {
            return Err(corrupt(format!("cluster at {offset} is metadata")));
        }
        match (self.refcount_in(&mut state, cluster.0)?, in_place) {
            (0, _) => Err(corrupt(format!("cluster at {offset} is in use but its refcount is zero"))),
            (2.., true) => Err(corrupt(format!("cluster at {offset} is COPIED but its refcount is not one"))),
            _ => Ok(()),
        }
    }

    /// The refcount of a cluster; zero where no block covers it.
    pub fn refcount(&self, cluster: HostCluster) -> Result<u64> {
        self.refcount_in(&mut self.state.lock(), cluster.0)
    }

    /// The clusters of all refcount blocks.
    pub fn blocks(&self) -> Vec<HostCluster> {
        self.state.lock().entries.iter().filter(|&&cluster| cluster != 0).map(|&cluster| HostCluster(cluster)).collect()
    }

    /// All clusters whose refcount is not zero, for the full check.
    pub fn counted(&self) -> Result<impl Iterator<Item = u64>> {
        let entries = self.geometry.refblock_entries();
        let mut counted = Vec::new();
        let mut state = self.state.lock();
        for index in 0..state.entries.len() {
            if let Some(block) = self.block(&mut state, index)? {
                let first = index as u64 * entries;
                counted.extend((0..entries).filter(|&entry| block.get(entry as usize) != 0).map(|entry| first + entry));
            }
        }
        Ok(counted.into_iter())
    }

    fn refcount_in(&self, state: &mut State, cluster: u64) -> Result<u64> {
        let (block, index) = self.place(cluster);
        Ok(self.block(state, block)?.map_or(0, |block| block.get(index)))
    }

    /// Block and index inside it of a cluster's refcount.
    fn place(&self, cluster: u64) -> (usize, usize) {
        let entries = self.geometry.refblock_entries();
        // A block index beyond usize has no table entry either.
        (usize::try_from(cluster / entries).unwrap_or(usize::MAX), (cluster % entries) as usize)
    }

    /// The block at `index`, loaded where needed; `None` where the table has none.
    fn block<'a>(&self, state: &'a mut State, index: usize) -> Result<Option<&'a mut RefcountBlock>> {
        let Some(&cluster) = state.entries.get(index) else { return Ok(None) };
        if cluster == 0 {
            return Ok(None);
        }
        let slot = &mut state.blocks[index];
        if slot.is_none() {
            let mut bytes = vec![0; self.geometry.cluster_size() as usize].into_boxed_slice();
            let offset = self.geometry.host_offset(HostCluster(cluster));
            self.storage.read_at(offset.0, &mut bytes).map_err(|error| Error::io(format!("refcount block at {offset}"), error))?;
            *slot = Some(RefcountBlock::from_bytes(bytes, &self.geometry));
        }
        Ok(slot.as_mut())
    }

    fn set_refcount(&self, state: &mut State, cluster: u64, value: u64) -> Result<()> {
        let (index, entry) = self.place(cluster);
        let Some(block) = self.block(state, index)? else {
            return Err(corrupt(format!("cluster {cluster} has no refcount block")));
        };
        if value > block.max() {
            return Err(corrupt(format!("refcount of cluster {cluster} overflows")));
        }
        block.set(entry, value);
        let piece = ((entry << self.geometry.refcount_order()) / 8) / PIECE;
        state.dirty.insert((index, piece));
        Ok(())
    }

    /// Hands out up to `at_most` (> 0) contiguous clusters with their refcounts raised to one: the first, and how many.
    ///
    /// # Errors
    /// [`ErrorKind::NoSpace`] when the refcount table cannot grow further; I/O while loading a block.
    pub fn allocate(&self, at_most: u64) -> Result<(HostCluster, u64)> {
        let mut state = self.state.lock();
        let state = &mut *state;
        self.search_gaps(state)?;
        let (start, len) = match Self::take_gap(state, at_most) {
            Some(run) => run,
            None => self.take_at_end(state, at_most)?,
        };
        for cluster in start..start + len {
            debug_assert_eq!(self.refcount_in(state, cluster)?, 0);
            self.set_refcount(state, cluster, 1)?;
        }
        Ok((HostCluster(start), len))
    }

    /// Up to `at_most` clusters of a gap: of one that is large enough if there is one nearby, of the first otherwise.
    fn take_gap(state: &mut State, at_most: u64) -> Option<(u64, u64)> {
        let first = state.gaps.iter().next().map(|(&start, &len)| (start, len))?;
        let fitting = state.gaps.iter().take(GAPS_LOOKED_AT).find(|(_, len)| **len >= at_most).map(|(&start, &len)| (start, len));
        let (start, len) = fitting.unwrap_or(first);
        let taken = len.min(at_most);
        state.gaps.remove(&start);
        if taken < len {
            state.gaps.insert(start + taken, len - taken);
        }
        Some((start, taken))
    }

    /// While no gap is known, searches the file further, a block at a time. A cluster that only the table says is free must not be metadata
    /// either (V27).
    fn search_gaps(&self, state: &mut State) -> Result<()> {
        while state.gaps.is_empty() && state.searched < state.end {
            let entries = self.geometry.refblock_entries();
            let searched = state.searched;
            let (index, first) = self.place(searched);
            let stop = state.end.min(searched - first as u64 + entries);
            let free: Vec<u64> = match self.block(state, index)? {
                Some(block) => (searched..stop).filter(|cluster| block.get((cluster % entries) as usize) == 0).collect(),
                // No block: nothing there can be handed out without one, so leave it to the end of the file.
                None => Vec::new(),
            };
            state.searched = stop;
            for cluster in free {
                if !state.metadata.contains(&cluster) {
                    state.add_gap(cluster);
                }
            }
        }
        Ok(())
    }

    /// Up to `at_most` clusters at the end of the file, all under one refcount block, which is made where there is none.
    fn take_at_end(&self, state: &mut State, at_most: u64) -> Result<(u64, u64)> {
        loop {
            let (index, first) = self.place(state.end);
            if state.entries.get(index).is_none_or(|&cluster| cluster == 0) {
                self.extend(state, 0)?;
                continue;
            }
            let limit = at_most.min(self.geometry.refblock_entries() - first as u64);
            let start = state.end;
            let mut len = 0;
            while len < limit && !state.metadata.contains(&(start + len)) && self.refcount_in(state, start + len)? == 0 {
                len += 1;
            }
            // Counted or claimed although beyond the end of the file: left alone.
            state.end = start + len.max(1);
            if len > 0 {
                return Ok((start, len));
            }
        }
    }

    /// Makes room for `extra` contiguous clusters at the end of the file together with the refcount blocks that cover them and themselves
    /// (R5: a block describes itself), growing the refcount table where needed; returns the first of the extra clusters, counted. After an
    /// error nothing has changed but `state.end`.
    fn extend(&self, state: &mut State, extra: u64) -> Result<u64> {
        let entries = self.geometry.refblock_entries();
        let missing = |state: &State, clusters: u64| {
            let last = (state.end + clusters.max(1) - 1) / entries;
            (state.end / entries..=last).filter(|&index| state.entries.get(index as usize).is_none_or(|&cluster| cluster == 0)).count()
                as u64
        };
        let (start, blocks, wanted) = loop {
            let mut blocks = 0;
            while missing(state, blocks + extra) > blocks {
                blocks = missing(state, blocks + extra);
            }
            let start = state.end;
            let wanted = (start + blocks + extra).div_ceil(entries);
            if wanted > state.entries.len() as u64 {
                return self.grow_table(state, wanted, extra);
            }
            // Loads every block that is there already, so that below nothing can fail half-way.
            match self.last_in_use(state, start..start + blocks + extra)? {
                // Counted although beyond the end of the file, as after a crash between refcounts and data: a leak, left alone.
                Some(leaked) => state.end = leaked + 1,
                None => break (start, blocks, wanted),
            }
        };
        let mut next = start;
        for index in start / entries..wanted {
            if state.entries[index as usize] == 0 {
                state.entries[index as usize] = next;
                state.blocks[index as usize] = Some(RefcountBlock::new(&self.geometry));
                state.metadata.insert(next);
                state.new_blocks.insert(index as usize);
                for piece in 0..(self.geometry.cluster_size() as usize).div_ceil(PIECE) {
                    state.dirty.insert((index as usize, piece));
                }
                next += 1;
            }
        }
        debug_assert_eq!(next, start + blocks);
        for cluster in start..next {
            self.set_refcount(state, cluster, 1)?;
        }
        for cluster in next..next + extra {
            self.set_refcount(state, cluster, 1)?;
        }
        state.end = next + extra;
        Ok(next)
    }

    /// The last cluster of a range that is counted or metadata.
    fn last_in_use(&self, state: &mut State, clusters: Range<u64>) -> Result<Option<u64>> {
        for cluster in clusters.rev() {
            if self.refcount_in(state, cluster)? != 0 || state.metadata.contains(&cluster) {
                return Ok(Some(cluster));
            }
        }
        Ok(None)
    }

    /// Moves the refcount table to the end of the file with at least `wanted` entries, half as many again to spare (R6), then tries anew.
    fn grow_table(&self, state: &mut State, wanted: u64, extra: u64) -> Result<u64> {
        let cluster_size = self.geometry.cluster_size();
        let clusters = ((wanted + wanted / 2 + 1) * 8).div_ceil(cluster_size);
        if clusters * cluster_size > MAX_TABLE_BYTES && wanted * 8 > MAX_TABLE_BYTES {
            return Err(Error::new(ErrorKind::NoSpace, "the refcount table has reached its largest size of 8 MiB"));
        }
        let clusters = clusters.min(MAX_TABLE_BYTES / cluster_size).max(1);
        let len = (clusters * cluster_size / 8) as usize;
        let before = state.entries.len();
        state.entries.resize(len, 0);
        state.blocks.resize(len, None);
        match self.extend(state, clusters) {
            Ok(start) => {
                state.metadata.extend(start..start + clusters);
                // One more growth on the way would have left a table too short for the entries.
                assert_eq!(state.entries.len(), len);
                let left = std::mem::replace(&mut state.table, (HostCluster(start), clusters));
                state.old_tables.push(left);
                self.extend(state, extra)
            }
            Err(error) => {
                state.entries.truncate(before);
                state.blocks.truncate(before);
                Err(error)
            }
        }
    }

    /// Contiguous clusters at the end of the file, counted, for a table that must be in one piece.
    pub fn allocate_contiguous(&self, clusters: u64) -> Result<HostCluster> {
        let mut state = self.state.lock();
        let start = self.extend(&mut state, clusters)?;
        state.metadata.extend(start..start + clusters);
        Ok(HostCluster(start))
    }

    /// Takes back clusters that were handed out and never published: their refcounts drop at once.
    pub fn give_back(&self, start: HostCluster, len: u64) {
        let mut state = self.state.lock();
        for cluster in start.0..start.0 + len {
            if let Err(error) = self.set_refcount(&mut state, cluster, 0) {
                log::warn!("cluster {cluster} stays leaked: {error}");
                continue;
            }
            state.add_gap(cluster);
        }
    }

    /// One reference less to each of `len` clusters. They stay counted until the next pass has made the removal durable (R3, R7).
    pub fn queue_free(&self, start: HostCluster, len: u64) {
        let mut state = self.state.lock();
        for cluster in start.0..start.0 + len {
            *state.pending.entry(cluster).or_default() += 1;
        }
    }

    /// For the write-back pass, step 2: what was queued so far.
    pub fn take_pending(&self) -> BTreeMap<u64, u64> {
        std::mem::take(&mut self.state.lock().pending)
    }

    /// The pass failed: what it took waits for the next one.
    pub fn requeue(&self, pending: BTreeMap<u64, u64>) {
        let mut state = self.state.lock();
        for (cluster, references) in pending {
            *state.pending.entry(cluster).or_default() += references;
        }
    }

    /// Step 10: the removals are durable. Gives the space of clusters that nothing refers to any more back to the host, then lowers refcounts;
    /// only then may they be handed out again (R7c, R8).
    pub fn release(&self, pending: &BTreeMap<u64, u64>) -> Result<()> {
        let mut unreferenced: Vec<(u64, u64)> = Vec::new();
        for (&cluster, &references) in pending {
            let refcount = self.refcount(HostCluster(cluster))?;
            if refcount < references {
                return Err(corrupt(format!("cluster {cluster} has refcount {refcount} but {references} references were dropped")));
            }
            if refcount == references {
                match unreferenced.last_mut() {
                    Some((start, len)) if *start + *len == cluster => *len += 1,
                    _ => unreferenced.push((cluster, 1)),
                }
            }
        }
        let bits = self.geometry.cluster_bits();
        for &(start, len) in &unreferenced {
            if let Err(error) = self.storage.punch_hole(start << bits, len << bits) {
                // A hint only: the cluster is free in the image all the same.
                log::debug!("space of clusters {start}..{} was not given back: {error}", start + len);
            }
        }
        let mut state = self.state.lock();
        for (&cluster, &references) in pending {
            let refcount = self.refcount_in(&mut state, cluster)?;
            self.set_refcount(&mut state, cluster, refcount - references)?;
        }
        for (start, len) in unreferenced {
            for cluster in start..start + len {
                state.metadata.remove(&cluster);
                state.add_gap(cluster);
            }
        }
        Ok(())
    }

    /// For the write-back pass, step 4: marks clean and copies.
    pub fn take_dirty(&self) -> RefcountWrites {
        let mut state = self.state.lock();
        let state = &mut *state;
        let mut writes = RefcountWrites {
            dirty: std::mem::take(&mut state.dirty),
            new_blocks: std::mem::take(&mut state.new_blocks),
            ..RefcountWrites::default()
        };
        for &(index, piece) in &writes.dirty {
            let block = state.blocks[index].as_ref().expect("a dirty block is resident");
            let offset = self.geometry.host_offset(HostCluster(state.entries[index])).0 + (piece * PIECE) as u64;
            let bytes = block.bytes();
            let bytes = &bytes[piece * PIECE..bytes.len().min((piece + 1) * PIECE)];
            match writes.pieces.last_mut() {
                Some((at, run)) if *at + run.len() as u64 == offset => run.extend_from_slice(bytes),
                _ => writes.pieces.push((offset, bytes.to_vec())),
            }
        }
        let table_offset = self.geometry.host_offset(state.table.0).0;
        let entry = |index: usize| self.geometry.host_offset(HostCluster(state.entries[index])).0;
        if state.old_tables.is_empty() {
            writes.entries = writes.new_blocks.iter().map(|&index| (table_offset + index as u64 * 8, entry(index))).collect();
        } else {
            writes.table = Some(NewTable {
                offset: table_offset,
                clusters: state.table.1 as u32,
                bytes: (0..state.entries.len()).flat_map(|index| entry(index).to_be_bytes()).collect(),
                old: std::mem::take(&mut state.old_tables),
            });
        }
        writes
    }

    /// The pass failed before all of `writes` was durable: it is dirty again.
    pub fn not_written(&self, writes: RefcountWrites) {
        let mut state = self.state.lock();
        state.dirty.extend(writes.dirty);
        state.new_blocks.extend(writes.new_blocks);
        if let Some(table) = writes.table {
            state.old_tables.extend(table.old);
        }
    }

    /// Whether a pass would find something.
    pub fn is_dirty(&self) -> bool {
        let state = self.state.lock();
        !state.dirty.is_empty() || !state.new_blocks.is_empty() || !state.old_tables.is_empty() || !state.pending.is_empty()
    }
}

impl State {
    /// Adds a free cluster to the gaps, joined with its neighbours. Where the search has not been yet it will find it by itself.
    fn add_gap(&mut self, cluster: u64) {
        if cluster >= self.searched {
            return;
        }
        let (mut start, mut len) = (cluster, 1);
        if let Some((&before, &before_len)) = self.gaps.range(..=cluster).next_back() {
            assert!(before + before_len <= cluster, "cluster {cluster} freed twice");
            if before + before_len == cluster {
                self.gaps.remove(&before);
                start = before;
                len += before_len;
            }
        }
        if let Some(after_len) = self.gaps.remove(&(cluster + 1)) {
            len += after_len;
        }
        self.gaps.insert(start, len);
    }
}

fn corrupt(text: String) -> Error {
    Error::new(ErrorKind::Corrupt, text)
}
