//! Allocates and frees host clusters, and keeps the refcounts that record this on disk.
//!
//! New clusters come from gaps first, then from the end of the file, where refcounts are raised for
//! a run of clusters ahead. Most allocations therefore touch no refcount block. No allocation costs
//! a barrier: the reservation need not be durable when a cluster is handed out, only before an L2
//! entry is written. A pass makes data and refcounts durable with the same barrier. Reserved
//! clusters that were not used are given back by an orderly close. After a crash they are leaks
//! like any other, and the next open gives them back.
//!
//! A refcount is raised before any entry points to the cluster. Only the write-back pass lowers it,
//! when the removal of the entry is durable (R3). The cluster is handed out again only after its
//! space was punched (R7). On disk, refcounts may therefore be too high after a crash (leaks), but
//! never too low (I2).
//!
//! A cluster that may have held guest data since the image was opened is reused for guest data
//! only, never for a table. In a hostile image a second L2 entry may name the same cluster, which
//! only a full check detects. A guest can write through that entry, so the cluster must not become
//! a table meanwhile (R16). Freed clusters are therefore kept apart from clusters that were free
//! when the image was opened.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::{Arc, OnceLock};

use super::check::Leak;
use super::gaps::Gaps;
use super::refcounts::{RefcountTable, RefcountWrites};
use crate::format::{Geometry, Header, HostCluster};
use crate::journal::Journal;
use host::mutants::{Step, without};
use host::storage::Storage;
use host::sync::atomic::{AtomicU64, Ordering};
use host::sync::{Mutex, rank};
use host::{Error, ErrorKind, Result};

mod compare;
mod named;

pub(super) use named::{NamedRun, Unreadable};

/// Largest refcount table, in bytes (V9; QEMU: QCOW_MAX_REFTABLE_SIZE).
const MAX_TABLE_BYTES: u64 = 8 << 20;

/// Bytes of clusters that are reserved ahead at the end of the file, as far as one refcount block
/// covers them. Large enough that most allocations touch no refcount block.
const RESERVE_AHEAD: u64 = 64 << 20;
/// Clusters that one step of the search for gaps looks at. The limit bounds how many free clusters
/// are remembered.
const SEARCHED_AT_ONCE: u64 = 1 << 16;

/// The cluster allocator of one writable image.
#[derive(Debug)]
pub(super) struct Allocator {
    storage: Arc<dyn Storage>,
    geometry: Geometry,
    state: Mutex<{ rank::ALLOCATOR }, AllocatorState>,
    /// The end of the highest cluster that was handed out since the image was opened, as a cluster
    /// number.
    highest: AtomicU64,
    /// Where reservations are recorded for a successor of this process.
    journal: OnceLock<Arc<Journal>>,
}

#[derive(Debug)]
struct AllocatorState {
    refcounts: RefcountTable,
    /// Known free clusters that were free when the image was opened, all below `searched`. They are
    /// used for tables and for data.
    gaps: Gaps,
    /// Clusters that were freed since the image was opened. They are used for data only.
    freed: Gaps,
    /// Clusters below this one have been searched for gaps.
    searched: u64,
    /// No cluster at or above this one is metadata or was handed out.
    end: u64,
    /// Clusters that are counted and not handed out yet. No entry refers to them.
    reserved: Range<u64>,
    /// References that are dropped in memory and still counted on disk: cluster to number of
    /// references.
    pending: BTreeMap<u64, u64>,
}

impl Allocator {
    /// Reads the refcount table and checks it (V23).
    pub fn open(storage: Arc<dyn Storage>, header: &Header) -> Result<Self> {
        let geometry = header.geometry;
        let cluster_size = geometry.cluster_size();
        let mut refcounts = RefcountTable::open(storage.clone(), header)?;
        let (table, table_clusters) = refcounts.place();
        let l1_start = header.l1_table_offset >> geometry.cluster_bits();
        let l1_clusters = (u64::from(header.l1_size) * 8).div_ceil(cluster_size);
        refcounts.add_metadata(0);
        let tables = (table.0..table.0 + table_clusters).chain(l1_start..l1_start + l1_clusters);
        tables.for_each(|cluster| _ = refcounts.add_metadata(cluster));
        let mut covered = 0;
        let blocks: Vec<(usize, HostCluster)> = refcounts.blocks().collect();
        for (index, block) in blocks {
            if !refcounts.add_metadata(block.0) {
                let offset = geometry.host_offset(block);
                return Err(corrupt(format!(
                    "refcount table, index {index}: block at {offset} overlaps other metadata"
                )));
            }
            covered = (index as u64 + 1).saturating_mul(geometry.refblock_entries());
        }
        // Clusters that no refcount block covers are free, however large the file or device is.
        // They need no search and are used next.
        let end =
            storage.size().div_ceil(cluster_size).min(covered).max(refcounts.end_of_metadata());
        let state = AllocatorState {
            refcounts,
            gaps: Gaps::default(),
            freed: Gaps::default(),
            searched: 1,
            end,
            reserved: 0..0,
            pending: BTreeMap::new(),
        };
        Ok(Allocator {
            storage,
            geometry,
            state: Mutex::new(state),
            highest: AtomicU64::new(0),
            journal: OnceLock::new(),
        })
    }

    /// Records reservations in this journal from now on.
    pub fn record_in(&self, journal: &Arc<Journal>) {
        let _ = self.journal.set(Arc::clone(journal));
    }

    /// Marks a cluster as L2 table because an L1 entry names it. Called at open.
    pub fn claim_l2_table(&self, cluster: HostCluster, l1_index: usize) -> Result<()> {
        let mut state = self.state.lock();
        state.end = state.end.max(cluster.0 + 1);
        if !state.refcounts.add_metadata(cluster.0) {
            return Err(corrupt(format!(
                "L1 table, index {l1_index}: L2 table at {} overlaps other metadata",
                self.geometry.host_offset(cluster)
            )));
        }
        Ok(())
    }

    /// Counts the host clusters that the journal of a dead process names, once each. Called before
    /// any cluster is allocated. `named` is in order and has no overlaps.
    ///
    /// A refcount on disk may be any. It is zero if only the memory of the process counted the
    /// cluster, one if it was reserved, and the old one if the cluster had other users before: the
    /// process hands a cluster out when the removal of its last reference is durable (R3), and
    /// writes the lowered refcount later.
    ///
    /// # Errors
    /// [`ErrorKind::Corrupt`] if a cluster is metadata; I/O.
    pub fn claim(&self, named: &[Range<u64>]) -> Result<()> {
        let Some(last) = named.last() else { return Ok(()) };
        let mut state = self.state.lock();
        let state = &mut *state;
        let offset = |cluster| self.geometry.host_offset(HostCluster(cluster));
        for cluster in named.iter().flat_map(Range::clone) {
            if state.refcounts.is_metadata(cluster) {
                let at = offset(cluster);
                return Err(corrupt(format!("the journal names {at}, which is metadata")));
            }
        }
        state.end = state.end.max(last.end);
        self.highest.fetch_max(last.end, Ordering::Relaxed);
        let entries = self.geometry.refblock_entries();
        if !state.refcounts.has_block((last.end - 1) / entries) {
            // Grows the refcount table if needed, so that it has an entry for each block below.
            self.extend(state, 0)?;
        }
        for hosts in named {
            for cluster in hosts.clone() {
                state.refcounts.evict();
                let (index, _) = state.refcounts.index_of(cluster);
                if !state.refcounts.has_block(index) {
                    self.add_block_inside(state, index, named)?;
                }
                if state.refcounts.get(cluster)? != 1 {
                    state.refcounts.set(cluster, 1)?;
                }
                state.refcounts.change(cluster);
            }
        }
        Ok(())
    }

    /// Reserves the clusters that a dead process had reserved ahead and not handed out: those of
    /// `reserved` behind the end of the file. Without this, each death would leak as many. No entry
    /// names them: data and tables are written, and so inside the file, before an entry names them.
    /// Called after [`Allocator::claim`].
    ///
    /// # Errors
    /// I/O while loading a block.
    pub fn adopt_reserved(&self, reserved: &Range<u64>) -> Result<()> {
        let mut state = self.state.lock();
        let state = &mut *state;
        state.refcounts.evict();
        let start = state.end;
        let (index, first) = state.refcounts.index_of(start);
        let is_behind = start >= self.storage.size().div_ceil(self.geometry.cluster_size());
        if !is_behind || !reserved.contains(&start) || !state.refcounts.has_block(index) {
            return Ok(());
        }
        let limit = (reserved.end - start).min(self.geometry.refblock_entries() - first);
        let mut len = 0;
        while len < limit
            && !state.is_spoken_for(start + len)
            && state.refcounts.get(start + len)? == 1
        {
            state.refcounts.change(start + len);
            len += 1;
        }
        state.reserved = start..start + len;
        state.end = start + len;
        Ok(())
    }

    /// Makes the missing refcount block at `index` in a cluster that it counts itself (R5) and that
    /// is not `named`. Nothing counts the other clusters of its range, so they are free.
    fn add_block_inside(
        &self,
        state: &mut AllocatorState,
        index: u64,
        named: &[Range<u64>],
    ) -> Result<()> {
        let entries = self.geometry.refblock_entries();
        let is_named = |cluster: u64| {
            let next = named.partition_point(|hosts| hosts.end <= cluster);
            named.get(next).is_some_and(|hosts| hosts.start <= cluster)
        };
        let free = (index * entries..(index + 1) * entries)
            .find(|&cluster| !is_named(cluster) && !state.refcounts.is_metadata(cluster));
        let Some(free) = free else {
            return Err(corrupt(format!("the journal leaves no space for refcount block {index}")));
        };
        state.refcounts.add_block(index, free);
        state.refcounts.add_metadata(free);
        state.end = state.end.max(free + 1);
        state.refcounts.set(free, 1)
    }

    /// Checks that an L2 entry may name this cluster: the cluster is not metadata, its refcount is
    /// at least one, and exactly one if the entry says COPIED (V24, V27, R9).
    pub fn check_data(&self, cluster: HostCluster, in_place: bool) -> Result<()> {
        let mut state = self.state.lock();
        state.refcounts.evict();
        let offset = self.geometry.host_offset(cluster);
        if state.refcounts.is_metadata(cluster.0) && !without(Step::DataIsNoMetadata) {
            return Err(corrupt(format!("cluster at {offset} is metadata")));
        }
        let is_reserved = state.has_reserved(&(cluster.0..cluster.0 + 1));
        let counted = if is_reserved { 0 } else { state.refcounts.get(cluster.0)? };
        match (counted, in_place) {
            (0, _) if !without(Step::DataIsCounted) => {
                Err(corrupt(format!("cluster at {offset} is in use but its refcount is zero")))
            }
            (2.., true) => {
                Err(corrupt(format!("cluster at {offset} is COPIED but its refcount is not one")))
            }
            _ => Ok(()),
        }
    }

    /// Does the part of [`Allocator::check_data`] that needs no refcount: an L2 entry must not name
    /// metadata.
    pub fn check_is_no_metadata(&self, cluster: HostCluster) -> Result<()> {
        if self.state.lock().refcounts.is_metadata(cluster.0) && !without(Step::DataIsNoMetadata) {
            return Err(corrupt(format!(
                "cluster at {} is metadata",
                self.geometry.host_offset(cluster)
            )));
        }
        Ok(())
    }

    /// Returns the index of the refcount block that counts a cluster.
    pub fn block_of(&self, cluster: HostCluster) -> u64 {
        cluster.0 / self.geometry.refblock_entries()
    }

    /// Returns the refcount of a cluster; zero if no block covers it.
    pub fn refcount(&self, cluster: HostCluster) -> Result<u64> {
        let mut state = self.state.lock();
        state.refcounts.evict();
        state.refcounts.get(cluster.0)
    }

    /// Hands out up to `at_most` (> 0) contiguous clusters for data and raises their refcounts to
    /// one. Returns the first cluster and the count.
    ///
    /// # Errors
    /// [`ErrorKind::NoSpace`] when the refcount table cannot grow further; I/O while loading a
    /// block.
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

    /// Hands out one cluster for an L2 table and raises its refcount to one.
    ///
    /// # Errors
    /// As [`Allocator::allocate`].
    pub fn allocate_l2_table(&self) -> Result<HostCluster> {
        let mut state = self.state.lock();
        let (cluster, _) = self.take_unused(&mut state, 1)?;
        // Under the same lock: from now on, an entry that names the cluster must be refused.
        state.refcounts.add_metadata(cluster);
        Ok(HostCluster(cluster))
    }

    /// Takes back a cluster that was handed out for an L2 table and did not become one.
    pub fn give_back_l2_table(&self, cluster: HostCluster) {
        let mut state = self.state.lock();
        if let Err(error) = state.refcounts.set(cluster.0, 0) {
            log::warn!("cluster {} stays leaked: {error}", cluster.0);
            return;
        }
        state.refcounts.remove_metadata(cluster.0);
        state.add_gap(cluster.0);
    }

    /// Returns the end, in bytes, of the highest cluster that was handed out since the image was
    /// opened; 0 if no cluster was.
    pub fn highest(&self) -> u64 {
        self.highest.load(Ordering::Relaxed) << self.geometry.cluster_bits()
    }

    /// Hands out clusters that were never in use since the image was opened, with raised refcounts.
    fn take_unused(&self, state: &mut AllocatorState, at_most: u64) -> Result<(u64, u64)> {
        let (start, len) = self.take_gap_or_end(state, at_most)?;
        self.highest.fetch_max(start + len, Ordering::Relaxed);
        Ok((start, len))
    }

    fn take_gap_or_end(&self, state: &mut AllocatorState, at_most: u64) -> Result<(u64, u64)> {
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
            if let Some(journal) = self.journal.get() {
                journal.set_reserved(start..start + len);
            }
        }
        let start = state.reserved.start;
        let len = at_most.min(state.reserved.end - start);
        state.reserved.start += len;
        Ok((start, len))
    }

    /// Searches the file further while no gap is known, one refcount block at a time. A step covers
    /// at most [`SEARCHED_AT_ONCE`] clusters, because one block can report more free clusters than
    /// memory should hold. A cluster whose refcount is zero is not a gap if it is metadata (V27).
    fn search_gaps(&self, state: &mut AllocatorState) -> Result<()> {
        while state.gaps.is_empty() && state.searched < state.end {
            state.refcounts.evict();
            let searched = state.searched;
            let (_, first) = state.refcounts.index_of(searched);
            let stop = state
                .end
                .min(searched - first + self.geometry.refblock_entries())
                .min(searched + SEARCHED_AT_ONCE);
            // A range without a refcount block has no usable gap: handing out its clusters would
            // first need a new block. They are left to the allocation at the end of the file.
            let free = state.refcounts.free_in(searched..stop)?;
            state.searched = stop;
            for cluster in free {
                if !state.refcounts.is_metadata(cluster) && !state.freed.contains(cluster) {
                    state.gaps.add(cluster);
                }
            }
        }
        Ok(())
    }

    /// Returns up to `at_most` clusters at the end of the file, all counted by one refcount block,
    /// which is created if missing.
    fn take_at_end(&self, state: &mut AllocatorState, at_most: u64) -> Result<(u64, u64)> {
        loop {
            let (index, first) = state.refcounts.index_of(state.end);
            if !state.refcounts.has_block(index) {
                self.extend(state, 0)?;
                continue;
            }
            let limit = at_most.min(self.geometry.refblock_entries() - first);
            let start = state.end;
            let mut len = 0;
            while len < limit
                && !state.is_spoken_for(start + len)
                && state.refcounts.get(start + len)? == 0
            {
                len += 1;
            }
            // A cluster may be counted or claimed although it lies beyond the end of the file. It
            // is skipped.
            state.end = start + len.max(1);
            if len > 0 {
                return Ok((start, len));
            }
        }
    }

    /// Allocates `extra` contiguous clusters at the end of the file, together with the refcount
    /// blocks that count them and the blocks themselves (R5: a block may count its own cluster).
    /// Grows the refcount table if needed. Returns the first of the extra clusters, with refcounts
    /// raised. After an error nothing has changed except `state.end`.
    fn extend(&self, state: &mut AllocatorState, extra: u64) -> Result<u64> {
        state.give_up_reserved()?;
        let entries = self.geometry.refblock_entries();
        let missing = |state: &AllocatorState, clusters: u64| {
            let last = (state.end + clusters.max(1) - 1) / entries;
            (state.end / entries..=last).filter(|&index| !state.refcounts.has_block(index)).count()
                as u64
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
            // This loads every existing block, so that the updates below cannot fail half-way.
            match state.last_in_use(start..start + blocks + extra)? {
                // A cluster beyond the end of the file may be counted, as after a crash between the
                // writes of refcounts and data. It is a leak and is skipped.
                Some(leaked) => state.end = leaked + 1,
                None => break (start, blocks, wanted),
            }
        };
        let mut next = start;
        for index in start / entries..wanted {
            if !state.refcounts.has_block(index) {
                state.refcounts.add_block(index, next);
                state.refcounts.add_metadata(next);
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

    /// Moves the refcount table to the end of the file with at least `wanted` entries and half as
    /// many to spare (R6), then allocates again.
    fn grow_table(&self, state: &mut AllocatorState, wanted: u64, extra: u64) -> Result<u64> {
        let cluster_size = self.geometry.cluster_size();
        let clusters = ((wanted + wanted / 2 + 1) * 8).div_ceil(cluster_size);
        if clusters * cluster_size > MAX_TABLE_BYTES && wanted * 8 > MAX_TABLE_BYTES {
            return Err(Error::new(
                ErrorKind::NoSpace,
                "the refcount table has reached its largest size of 8 MiB",
            ));
        }
        let clusters = clusters.min(MAX_TABLE_BYTES / cluster_size).max(1);
        let capacity = clusters * cluster_size / 8;
        let before = state.refcounts.capacity();
        state.refcounts.resize(capacity);
        match self.extend(state, clusters) {
            Ok(start) => {
                (start..start + clusters)
                    .for_each(|cluster| _ = state.refcounts.add_metadata(cluster));
                // A second growth inside `extend` would have left a table that is too short for its
                // entries.
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

    /// Allocates contiguous clusters at the end of the file, with raised refcounts, for a table
    /// that must be in one piece.
    pub fn allocate_contiguous(&self, clusters: u64) -> Result<HostCluster> {
        let mut state = self.state.lock();
        state.refcounts.evict();
        let start = self.extend(&mut state, clusters)?;
        (start..start + clusters).for_each(|cluster| _ = state.refcounts.add_metadata(cluster));
        Ok(HostCluster(start))
    }

    /// Takes back clusters that were handed out and never published. Their refcounts drop at once.
    pub fn give_back(&self, start: HostCluster, len: u64) {
        let mut state = self.state.lock();
        for cluster in start.0..start.0 + len {
            // In a hostile image an L2 entry may have named the cluster meanwhile, and its removal
            // may already have freed the cluster.
            if matches!(state.refcounts.get(cluster), Ok(0)) {
                log::warn!(
                    "cluster {cluster} was given back by an L2 entry that should not name it"
                );
                continue;
            }
            if let Err(error) = state.refcounts.set(cluster, 0) {
                log::warn!("cluster {cluster} stays leaked: {error}");
                continue;
            }
            state.freed.add(cluster);
        }
    }

    /// Gives back clusters that are reserved and not handed out, for an orderly close.
    ///
    /// # Errors
    /// I/O while loading a block.
    pub fn give_up_reserved(&self) -> Result<()> {
        self.state.lock().give_up_reserved()
    }

    /// Drops one reference to each of `len` clusters. Their refcounts stay until the next pass has
    /// made the removal durable (R3, R7).
    pub fn queue_free(&self, start: HostCluster, len: u64) {
        let mut state = self.state.lock();
        for cluster in start.0..start.0 + len {
            if without(Step::Quarantine)
                && matches!(state.refcounts.get(cluster), Ok(1))
                && state.refcounts.set(cluster, 0).is_ok()
            {
                state.freed.add(cluster);
                continue;
            }
            state.refcounts.change(cluster);
            *state.pending.entry(cluster).or_default() += 1;
        }
    }

    /// Lowers refcounts that are too high. Called at open, after a barrier. Clusters without any
    /// reference are punched and become free.
    pub fn give_back_leaks(&self, leaks: &[Leak]) -> Result<()> {
        for leak in leaks.iter().filter(|leak| leak.references == 0) {
            self.punch(leak.start, leak.len);
        }
        let mut state = self.state.lock();
        for leak in leaks {
            for cluster in leak.start..leak.start + leak.len {
                if state.refcounts.get(cluster)? <= leak.references {
                    return Err(corrupt(format!(
                        "the refcount of cluster {cluster} was changed by another program"
                    )));
                }
                state.refcounts.set(cluster, leak.references)?;
                if leak.references == 0 {
                    state.add_gap(cluster);
                }
            }
        }
        Ok(())
    }

    /// Punches a hole over clusters. A refcount table can count clusters far beyond any file, and
    /// nothing is punched there. An error is only logged: the clusters are free in the image in any
    /// case.
    fn punch(&self, start: u64, len: u64) {
        let bits = self.geometry.cluster_bits();
        if start.saturating_add(len) > i64::MAX as u64 >> bits {
            return;
        }
        if let Err(error) = self.storage.punch_hole(start << bits, len << bits) {
            log::debug!("space of clusters {start}..{} was not given back: {error}", start + len);
        }
    }

    /// Takes the frees that were queued so far, for step 2 of the write-back pass.
    pub fn take_pending(&self) -> BTreeMap<u64, u64> {
        std::mem::take(&mut self.state.lock().pending)
    }

    /// Puts frees back into the queue after a pass failed, for the next pass.
    pub fn requeue(&self, pending: BTreeMap<u64, u64>) {
        let mut state = self.state.lock();
        for (cluster, references) in pending {
            *state.pending.entry(cluster).or_default() += references;
        }
    }

    /// Step 10 of the write-back pass: frees what the pass took. Everything that the pass took is
    /// on disk, and the removals are durable. Punches holes over clusters without any reference,
    /// then lowers refcounts. Only then may the clusters be handed out again (R7, R8).
    pub fn release(&self, pending: &mut BTreeMap<u64, u64>) -> Result<()> {
        self.state.lock().refcounts.written();
        let mut unreferenced: Vec<(u64, u64)> = Vec::new();
        for (&cluster, &references) in &*pending {
            let refcount = self.refcount(HostCluster(cluster))?;
            if refcount < references && !without(Step::FreesAreCounted) {
                return Err(corrupt(format!(
                    "cluster {cluster} has refcount {refcount} but {references} references were dropped"
                )));
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
        // A lowered refcount leaves the map, so that after an error the rest waits for the next
        // pass.
        while let Some(free) = pending.first_entry() {
            let (cluster, references) = (*free.key(), *free.get());
            let refcount = state.refcounts.get(cluster)?;
            state.refcounts.set(cluster, refcount - references)?;
            free.remove();
            if refcount == references {
                state.refcounts.remove_metadata(cluster);
                // No cluster from the end on was handed out, so it is no guest's, and the
                // allocation at the end of the file finds it.
                if cluster < state.end {
                    state.freed.add(cluster);
                }
            } else if let Some(changed) = &mut state.refcounts.changed {
                changed.still_shared(cluster);
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

    /// Marks dirty refcounts clean and copies them, for step 4 of the write-back pass.
    pub fn take_dirty(&self) -> RefcountWrites {
        self.state.lock().refcounts.take_dirty()
    }

    /// Marks `writes` dirty again after the pass failed before all of them were durable.
    pub fn not_written(&self, writes: RefcountWrites) {
        self.state.lock().refcounts.not_written(writes);
    }

    /// Returns whether a pass would have work.
    pub fn is_dirty(&self) -> bool {
        let state = self.state.lock();
        state.refcounts.is_dirty() || !state.pending.is_empty()
    }
}

impl AllocatorState {
    /// Raises the refcounts of free clusters to one.
    fn count(&mut self, clusters: Range<u64>) -> Result<()> {
        // This loads the blocks into memory, so that the updates below cannot fail half-way.
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

    /// Frees the reserved clusters. No entry ever referred to them, so no removal has to become
    /// durable first.
    fn give_up_reserved(&mut self) -> Result<()> {
        if self.reserved.is_empty() {
            return Ok(());
        }
        // One block counts all of them. This call loads it, so that the updates below cannot fail.
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

    /// Adds a free cluster to the gaps. A cluster that the search has not reached is left to the
    /// search.
    fn add_gap(&mut self, cluster: u64) {
        if cluster < self.searched {
            self.gaps.add(cluster);
        }
    }

    /// Returns whether one of these clusters is reserved: it is counted, but has no reference yet.
    /// An entry that names it could expose a cluster that is handed out next.
    fn has_reserved(&self, clusters: &Range<u64>) -> bool {
        clusters.start < self.reserved.end && self.reserved.start < clusters.end
    }

    /// Returns whether a cluster must not be handed out at the end of the file even if its refcount
    /// is zero.
    fn is_spoken_for(&self, cluster: u64) -> bool {
        self.refcounts.is_metadata(cluster) || self.freed.contains(cluster)
    }

    /// Returns the last cluster of a range that is counted or spoken for.
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
