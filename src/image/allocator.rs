//! Host clusters: which are free, whose they are, and the refcounts that say so on disk.
//!
//! New clusters come from gaps first, then from the end of the file, where refcounts are raised a run of clusters ahead: most allocations touch
//! no refcount block, and none ever costs a barrier, since a pass makes data and refcounts durable with the same one (data-safety 2.4; the
//! reservation need not be durable when it is handed out, only before an L2 entry is written). What is reserved and unused is given back by an
//! orderly close, and after a crash by the next open: it is a leak like any other.
//!
//! A refcount is raised before anything points to the cluster; it is lowered only by the write-back pass, when the pointer's removal is durable
//! (R3), and the cluster is handed out again only after its space was punched (R7). On disk refcounts may therefore be too high after a crash (leaks), never too low (I2).
//!
//! A cluster that may have held guest data since the image was opened is given to guest data only, never to a table. In a hostile image a second L2
//! entry may name the same cluster, which nothing but a full check finds, and a guest writes through that entry whatever the cluster is by then: it
//! must be the guest's own data (R16). So freed clusters are kept apart from those that were free all along.

use std::collections::{BTreeMap, HashSet};
use std::ops::Range;
use std::sync::Arc;

use super::check::Leak;
use super::gaps::Gaps;
use super::refcounts::{RefcountTable, RefcountWrites};
use crate::format::{Geometry, Header, HostCluster};
use crate::mutants::{Step, without};
use crate::storage::Storage;
use crate::sync::atomic::{AtomicU64, Ordering};
use crate::sync::{Mutex, rank};
use crate::{Error, ErrorKind, Result};

/// Largest refcount table, bytes (V9; QEMU: QCOW_MAX_REFTABLE_SIZE).
const MAX_TABLE_BYTES: u64 = 8 << 20;

/// Clusters at the end of the file are reserved so many bytes ahead, as far as one refcount block covers them.
const RESERVE_AHEAD: u64 = 64 << 20;
/// How many clusters are searched for gaps at a time.
const SEARCHED_AT_ONCE: u64 = 1 << 16;

/// The allocator of one writable image.
#[derive(Debug)]
pub(super) struct Allocator {
    storage: Arc<dyn Storage>,
    geometry: Geometry,
    state: Mutex<{ rank::ALLOCATOR }, State>,
    /// Where the highest cluster ends that was handed out since the image was opened, as a cluster
    /// number.
    highest: AtomicU64,
}

#[derive(Debug)]
struct State {
    refcounts: RefcountTable,
    /// Clusters of header, tables and blocks: no guest data may be there (V24, V27, R16).
    metadata: HashSet<u64>,
    /// Free clusters known so far that were free when the image was opened, all below `searched`: for tables and data.
    gaps: Gaps,
    /// Clusters that were freed since: for data only.
    freed: Gaps,
    /// Clusters below this one have been searched for gaps.
    searched: u64,
    /// Nothing at or above this cluster is metadata or was handed out.
    end: u64,
    /// Clusters that are counted and not handed out yet. Nothing refers to them.
    reserved: Range<u64>,
    /// References dropped in memory, still counted on disk: cluster to number of references.
    pending: BTreeMap<u64, u64>,
}

impl Allocator {
    /// Reads and checks the refcount table (V23).
    pub fn open(storage: Arc<dyn Storage>, header: &Header) -> Result<Self> {
        let geometry = header.geometry;
        let cluster_size = geometry.cluster_size();
        let refcounts = RefcountTable::open(Arc::clone(&storage), header)?;
        let (table, table_clusters) = refcounts.place();
        let l1_start = header.l1_table_offset >> geometry.cluster_bits();
        let l1_clusters = (u64::from(header.l1_size) * 8).div_ceil(cluster_size);
        let mut metadata: HashSet<u64> = std::iter::once(0).collect();
        metadata.extend(table.0..table.0 + table_clusters);
        metadata.extend(l1_start..l1_start + l1_clusters);
        let mut covered = 0;
        for (index, block) in refcounts.blocks() {
            if !metadata.insert(block.0) {
                let offset = geometry.host_offset(block);
                return Err(corrupt(format!("refcount table, index {index}: block at {offset} overlaps other metadata")));
            }
            covered = (index as u64 + 1).saturating_mul(geometry.refblock_entries());
        }
        // What no refcount block covers is free, however much of the file (or device) there is: nothing is searched there, and it is used next.
        let behind_metadata = metadata.iter().max().map_or(0, |last| last + 1);
        let end = storage.size().div_ceil(cluster_size).min(covered).max(behind_metadata);
        let state = State {
            refcounts,
            metadata,
            gaps: Gaps::default(),
            freed: Gaps::default(),
            searched: 1,
            end,
            reserved: 0..0,
            pending: BTreeMap::new(),
        };
        Ok(Allocator { storage, geometry, state: Mutex::new(state), highest: AtomicU64::new(0) })
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

    /// Whether an L2 entry may name this cluster: not metadata, referenced, and exactly once if it says so (V24, V27, R9).
    pub fn check_data(&self, cluster: HostCluster, in_place: bool) -> Result<()> {
        let mut state = self.state.lock();
        state.refcounts.evict();
        let offset = self.geometry.host_offset(cluster);
        if state.metadata.contains(&cluster.0) && !without(Step::DataIsNoMetadata) {
            return Err(corrupt(format!("cluster at {offset} is metadata")));
        }
        // What is counted ahead has no reference yet: an entry that names it could give away a cluster that is handed out next.
        let counted = if state.reserved.contains(&cluster.0) { 0 } else { state.refcounts.get(cluster.0)? };
        match (counted, in_place) {
            (0, _) if !without(Step::DataIsCounted) => Err(corrupt(format!("cluster at {offset} is in use but its refcount is zero"))),
            (2.., true) => Err(corrupt(format!("cluster at {offset} is COPIED but its refcount is not one"))),
            _ => Ok(()),
        }
    }

    /// As much of [`Allocator::check_data`] as needs no refcount: an L2 entry may name no metadata.
    pub fn check_is_no_metadata(&self, cluster: HostCluster) -> Result<()> {
        if self.state.lock().metadata.contains(&cluster.0) && !without(Step::DataIsNoMetadata) {
            return Err(corrupt(format!("cluster at {} is metadata", self.geometry.host_offset(cluster))));
        }
        Ok(())
    }

    /// The index of the refcount block that counts a cluster.
    pub fn block_of(&self, cluster: HostCluster) -> u64 {
        cluster.0 / self.geometry.refblock_entries()
    }

    /// The refcount of a cluster; zero where no block covers it.
    pub fn refcount(&self, cluster: HostCluster) -> Result<u64> {
        let mut state = self.state.lock();
        state.refcounts.evict();
        state.refcounts.get(cluster.0)
    }

    /// Hands out up to `at_most` (> 0) contiguous clusters for data, with their refcounts raised to one: the first, and how many.
    ///
    /// # Errors
    /// [`ErrorKind::NoSpace`] when the refcount table cannot grow further; I/O while loading a block.
    pub fn allocate(&self, at_most: u64) -> Result<(HostCluster, u64)> {
        let mut state = self.state.lock();
        let state = &mut *state;
        state.refcounts.evict();
        let (start, len) = match state.freed.take(at_most) {
            Some((start, len)) => {
                if let Err(error) = state.count(start..start + len) {
                    (start..start + len).for_each(|cluster| state.freed.add(cluster));
                    return Err(error);
                }
                (start, len)
            }
            None => self.take_unused(state, at_most)?,
        };
        Ok((HostCluster(start), len))
    }

    /// Hands out one cluster for an L2 table, with its refcount raised to one.
    ///
    /// # Errors
    /// As [`Allocator::allocate`].
    pub fn allocate_l2_table(&self) -> Result<HostCluster> {
        let mut state = self.state.lock();
        let (cluster, _) = self.take_unused(&mut state, 1)?;
        // At once: an entry that names it must be refused from now on.
        state.metadata.insert(cluster);
        Ok(HostCluster(cluster))
    }

    /// Takes back a cluster that was handed out for an L2 table and did not become one.
    pub fn give_back_l2_table(&self, cluster: HostCluster) {
        let mut state = self.state.lock();
        if let Err(error) = state.refcounts.set(cluster.0, 0) {
            log::warn!("cluster {} stays leaked: {error}", cluster.0);
            return;
        }
        state.metadata.remove(&cluster.0);
        state.add_gap(cluster.0);
    }

    /// Where the highest cluster ends that was handed out since the image was opened, in bytes; 0
    /// where none was.
    pub fn highest(&self) -> u64 {
        self.highest.load(Ordering::Relaxed) << self.geometry.cluster_bits()
    }

    /// Clusters that nothing was in since the image was opened, counted.
    fn take_unused(&self, state: &mut State, at_most: u64) -> Result<(u64, u64)> {
        let (start, len) = self.take_gap_or_end(state, at_most)?;
        self.highest.fetch_max(start + len, Ordering::Relaxed);
        Ok((start, len))
    }

    fn take_gap_or_end(&self, state: &mut State, at_most: u64) -> Result<(u64, u64)> {
        self.search_gaps(state)?;
        if let Some((start, len)) = state.gaps.take(at_most) {
            if let Err(error) = state.count(start..start + len) {
                (start..start + len).for_each(|cluster| state.gaps.add(cluster));
                return Err(error);
            }
            return Ok((start, len));
        }
        if state.reserved.is_empty() {
            let ahead = (RESERVE_AHEAD >> self.geometry.cluster_bits()).max(at_most);
            let (start, len) = self.take_at_end(state, ahead)?;
            state.count(start..start + len)?;
            state.reserved = start..start + len;
        }
        let start = state.reserved.start;
        let len = at_most.min(state.reserved.end - start);
        state.reserved.start += len;
        Ok((start, len))
    }

    /// While no gap is known, searches the file further, a block at a time and no more than [`SEARCHED_AT_ONCE`]: what one block says is free can
    /// be more than anybody wants to remember. A cluster that only the table says is free must not be metadata either (V27).
    fn search_gaps(&self, state: &mut State) -> Result<()> {
        while state.gaps.is_empty() && state.searched < state.end {
            state.refcounts.evict();
            let searched = state.searched;
            let (_, first) = state.refcounts.index_of(searched);
            let stop = state.end.min(searched - first + self.geometry.refblock_entries()).min(searched + SEARCHED_AT_ONCE);
            // Where there is no block nothing can be handed out without making one: left to the end of the file.
            let free = state.refcounts.free_in(searched..stop)?;
            state.searched = stop;
            for cluster in free {
                if !state.metadata.contains(&cluster) && !state.freed.contains(cluster) {
                    state.gaps.add(cluster);
                }
            }
        }
        Ok(())
    }

    /// Up to `at_most` clusters at the end of the file, all under one refcount block, which is made where there is none.
    fn take_at_end(&self, state: &mut State, at_most: u64) -> Result<(u64, u64)> {
        loop {
            let (index, first) = state.refcounts.index_of(state.end);
            if !state.refcounts.has_block(index) {
                self.extend(state, 0)?;
                continue;
            }
            let limit = at_most.min(self.geometry.refblock_entries() - first);
            let start = state.end;
            let mut len = 0;
            while len < limit && !state.is_spoken_for(start + len) && state.refcounts.get(start + len)? == 0 {
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
        state.give_up_reserved()?;
        let entries = self.geometry.refblock_entries();
        let missing = |state: &State, clusters: u64| {
            let last = (state.end + clusters.max(1) - 1) / entries;
            (state.end / entries..=last).filter(|&index| !state.refcounts.has_block(index)).count() as u64
        };
        let (start, blocks, wanted) = loop {
            let mut blocks = 0;
            while missing(state, blocks + extra) > blocks {
                blocks = missing(state, blocks + extra);
            }
            let start = state.end;
            let wanted = (start + blocks + extra).div_ceil(entries);
            if wanted > state.refcounts.capacity() {
                return self.grow_table(state, wanted, extra);
            }
            // Loads every block that is there already, so that below nothing can fail half-way.
            match state.last_in_use(start..start + blocks + extra)? {
                // Counted although beyond the end of the file, as after a crash between refcounts and data: a leak, left alone.
                Some(leaked) => state.end = leaked + 1,
                None => break (start, blocks, wanted),
            }
        };
        let mut next = start;
        for index in start / entries..wanted {
            if !state.refcounts.has_block(index) {
                state.refcounts.add_block(index, next);
                state.metadata.insert(next);
                next += 1;
            }
        }
        debug_assert_eq!(next, start + blocks);
        for cluster in start..next + extra {
            state.refcounts.set(cluster, 1)?;
        }
        state.end = next + extra;
        self.highest.fetch_max(state.end, Ordering::Relaxed);
        Ok(next)
    }

    /// Moves the refcount table to the end of the file with at least `wanted` entries, half as many again to spare (R6), then tries anew.
    fn grow_table(&self, state: &mut State, wanted: u64, extra: u64) -> Result<u64> {
        let cluster_size = self.geometry.cluster_size();
        let clusters = ((wanted + wanted / 2 + 1) * 8).div_ceil(cluster_size);
        if clusters * cluster_size > MAX_TABLE_BYTES && wanted * 8 > MAX_TABLE_BYTES {
            return Err(Error::new(ErrorKind::NoSpace, "the refcount table has reached its largest size of 8 MiB"));
        }
        let clusters = clusters.min(MAX_TABLE_BYTES / cluster_size).max(1);
        let capacity = clusters * cluster_size / 8;
        let before = state.refcounts.capacity();
        state.refcounts.resize(capacity);
        match self.extend(state, clusters) {
            Ok(start) => {
                state.metadata.extend(start..start + clusters);
                // One more growth on the way would have left a table too short for the entries.
                assert_eq!(state.refcounts.capacity(), capacity);
                state.refcounts.move_to((HostCluster(start), clusters));
                self.extend(state, extra)
            }
            Err(error) => {
                state.refcounts.resize(before);
                Err(error)
            }
        }
    }

    /// Contiguous clusters at the end of the file, counted, for a table that must be in one piece.
    pub fn allocate_contiguous(&self, clusters: u64) -> Result<HostCluster> {
        let mut state = self.state.lock();
        state.refcounts.evict();
        let start = self.extend(&mut state, clusters)?;
        state.metadata.extend(start..start + clusters);
        Ok(HostCluster(start))
    }

    /// Takes back clusters that were handed out and never published: their refcounts drop at once.
    pub fn give_back(&self, start: HostCluster, len: u64) {
        let mut state = self.state.lock();
        for cluster in start.0..start.0 + len {
            // In a hostile image an entry may have named it meanwhile, and given it back before us.
            if matches!(state.refcounts.get(cluster), Ok(0)) {
                log::warn!("cluster {cluster} was given back by an L2 entry that should not name it");
                continue;
            }
            if let Err(error) = state.refcounts.set(cluster, 0) {
                log::warn!("cluster {cluster} stays leaked: {error}");
                continue;
            }
            state.freed.add(cluster);
        }
    }

    /// Gives back what is reserved and not handed out: for an orderly close.
    ///
    /// # Errors
    /// I/O while loading a block.
    pub fn give_up_reserved(&self) -> Result<()> {
        self.state.lock().give_up_reserved()
    }

    /// One reference less to each of `len` clusters. They stay counted until the next pass has made the removal durable (R3, R7).
    pub fn queue_free(&self, start: HostCluster, len: u64) {
        let mut state = self.state.lock();
        for cluster in start.0..start.0 + len {
            if without(Step::Quarantine) && matches!(state.refcounts.get(cluster), Ok(1)) && state.refcounts.set(cluster, 0).is_ok() {
                state.freed.add(cluster);
                continue;
            }
            *state.pending.entry(cluster).or_default() += 1;
        }
    }

    /// At open, behind a barrier: lowers refcounts that are too high. What nothing refers to gives its space back to the host and can be handed
    /// out.
    pub fn give_back_leaks(&self, leaks: &[Leak]) -> Result<()> {
        for leak in leaks.iter().filter(|leak| leak.references == 0) {
            self.punch(leak.start, leak.len);
        }
        let mut state = self.state.lock();
        for leak in leaks {
            for cluster in leak.start..leak.start + leak.len {
                if state.refcounts.get(cluster)? <= leak.references {
                    return Err(corrupt(format!("the refcount of cluster {cluster} was changed by somebody else")));
                }
                state.refcounts.set(cluster, leak.references)?;
                if leak.references == 0 {
                    state.add_gap(cluster);
                }
            }
        }
        Ok(())
    }

    /// Gives the space of clusters back to the host. A hint only: they are free in the image all the same.
    fn punch(&self, start: u64, len: u64) {
        let bits = self.geometry.cluster_bits();
        if let Err(error) = self.storage.punch_hole(start << bits, len << bits) {
            log::debug!("space of clusters {start}..{} was not given back: {error}", start + len);
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

    /// Step 10: all that the pass took is on disk, and the removals are durable. Gives the space of clusters that nothing refers to any more back to the host, then lowers refcounts;
    /// only then may they be handed out again (R7c, R8).
    pub fn release(&self, pending: &mut BTreeMap<u64, u64>) -> Result<()> {
        self.state.lock().refcounts.written();
        let mut unreferenced: Vec<(u64, u64)> = Vec::new();
        for (&cluster, &references) in &*pending {
            let refcount = self.refcount(HostCluster(cluster))?;
            if refcount < references && !without(Step::FreesAreCounted) {
                return Err(corrupt(format!("cluster {cluster} has refcount {refcount} but {references} references were dropped")));
            }
            if refcount == references {
                match unreferenced.last_mut() {
                    Some((start, len)) if *start + *len == cluster => *len += 1,
                    _ => unreferenced.push((cluster, 1)),
                }
            }
        }
        let punch = || unreferenced.iter().for_each(|&(start, len)| self.punch(start, len));
        if !without(Step::PunchBeforeReuse) {
            punch();
        }
        let mut state = self.state.lock();
        // What was lowered leaves the map: after an error the rest waits for the next pass.
        while let Some(free) = pending.first_entry() {
            let (cluster, references) = (*free.key(), *free.get());
            let refcount = state.refcounts.get(cluster)?;
            state.refcounts.set(cluster, refcount - references)?;
            free.remove();
            if refcount == references {
                state.metadata.remove(&cluster);
                state.freed.add(cluster);
            }
        }
        if without(Step::PunchBeforeReuse) {
            drop(state);
            punch();
        }
        Ok(())
    }

    #[cfg(test)]
    pub fn limit_memory(&self, bytes: usize) {
        self.state.lock().refcounts.limit_memory(bytes);
    }

    #[cfg(test)]
    pub fn resident_blocks(&self) -> usize {
        self.state.lock().refcounts.resident()
    }

    /// For the write-back pass, step 4: marks clean and copies.
    pub fn take_dirty(&self) -> RefcountWrites {
        self.state.lock().refcounts.take_dirty()
    }

    /// The pass failed before all of `writes` was durable: it is dirty again.
    pub fn not_written(&self, writes: RefcountWrites) {
        self.state.lock().refcounts.not_written(writes);
    }

    /// Whether a pass would find something.
    pub fn is_dirty(&self) -> bool {
        let state = self.state.lock();
        state.refcounts.is_dirty() || !state.pending.is_empty()
    }
}

impl State {
    /// Raises the refcounts of free clusters to one.
    fn count(&mut self, clusters: Range<u64>) -> Result<()> {
        // Brings the blocks into memory, so that nothing fails half-way.
        for cluster in clusters.clone() {
            let before = self.refcounts.get(cluster)?;
            debug_assert_eq!(before, 0);
        }
        for cluster in clusters {
            if !without(Step::CountedBeforeHandedOut) {
                self.refcounts.set(cluster, 1)?;
            }
        }
        Ok(())
    }

    /// Reserved clusters are free again. Nothing ever referred to them, so nothing has to become durable first.
    fn give_up_reserved(&mut self) -> Result<()> {
        if self.reserved.is_empty() {
            return Ok(());
        }
        // They are all counted by one block, which is in memory from here on.
        self.refcounts.get(self.reserved.start)?;
        let reserved = std::mem::replace(&mut self.reserved, 0..0);
        for cluster in reserved.clone() {
            self.refcounts.set(cluster, 0)?;
        }
        if reserved.end == self.end {
            self.end = reserved.start;
            self.searched = self.searched.min(self.end);
        } else {
            reserved.for_each(|cluster| self.add_gap(cluster));
        }
        Ok(())
    }

    /// A free cluster. Where the search has not been yet it will find it by itself.
    fn add_gap(&mut self, cluster: u64) {
        if cluster < self.searched {
            self.gaps.add(cluster);
        }
    }

    /// Whether a cluster that may not be counted is not to be handed out at the end of the file all the same.
    fn is_spoken_for(&self, cluster: u64) -> bool {
        self.metadata.contains(&cluster) || self.freed.contains(cluster)
    }

    /// The last cluster of a range that is counted or spoken for.
    fn last_in_use(&mut self, clusters: Range<u64>) -> Result<Option<u64>> {
        for cluster in clusters.rev() {
            if self.refcounts.get(cluster)? != 0 || self.is_spoken_for(cluster) {
                return Ok(Some(cluster));
            }
        }
        Ok(None)
    }
}

fn corrupt(text: String) -> Error {
    Error::new(ErrorKind::Corrupt, text)
}
