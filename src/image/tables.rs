//! The L1 table and the L2 tables in memory: loaded on demand, judged once when loaded, evicted only when clean.

use std::collections::{BTreeSet, VecDeque};
use std::ops::Range;
use std::sync::Arc;

use super::allocator::Allocator;
use super::judged::Judged;
use super::l2_table::L2Table;
use super::slots::{CHUNK, Chunk, Slot, Slots, claimed_chunks};
use crate::format::{Geometry, Header, HostCluster, L1Entry, Mapping};
use crate::mutants::{Step, without};
use crate::storage::Storage;
use crate::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use crate::sync::{Mutex, RwLock, rank};
use crate::{Error, ErrorKind, Result};

/// Table loads that may go on side by side; each is one lock.
const LOADERS: usize = 16;

/// Stands in memory for a table entry that lies outside the file: no valid L1 or L2 entry.
const OUTSIDE: u64 = u64::MAX;

/// Tables that a pass has to write, and which have changed since somebody began to look.
#[derive(Debug, Default)]
pub(super) struct Dirty {
    /// L1 indexes of dirty tables.
    pub list: Vec<usize>,
    /// For each [`Tables::watch_changes`] that goes on: its number, and the L1 indexes that have changed.
    watched: Vec<(u64, BTreeSet<usize>)>,
    watches: u64,
}

/// What the write-back pass has to write of one L2 table.
#[derive(Debug)]
pub(super) struct TableWrite {
    /// Its L1 index.
    pub l1_index: usize,
    /// Host offsets in bytes, and bytes.
    pub pieces: Vec<(u64, Vec<u8>)>,
    /// The L1 entry to write once the table is durable, if it is not on disk yet.
    pub l1_entry: Option<u64>,
}

/// All tables of an image.
#[derive(Debug)]
pub(super) struct Tables {
    storage: Arc<dyn Storage>,
    geometry: Geometry,
    /// The virtual size in bytes; the rest of the geometry never changes.
    size: AtomicU64,
    /// Where the L1 table is, bytes.
    l1_offset: AtomicU64,
    slots: RwLock<{ rank::SLOTS }, Slots>,
    loaders: [Mutex<{ rank::TABLE_LOAD }, ()>; LOADERS],
    dirty: Mutex<{ rank::LEAF }, Dirty>,
    /// L1 indexes of resident tables, oldest first.
    resident: Mutex<{ rank::LEAF }, VecDeque<usize>>,
    resident_bytes: AtomicUsize,
    memory: usize,
    /// Set for a writable image: refcounts to hold loaded entries against, and where new tables come from.
    allocator: Option<Arc<Allocator>>,
    /// A write-back pass copies and writes tables: nothing may be evicted between the two.
    writing_back: AtomicBool,
    /// Whether [`Tables::corruption`] says something.
    is_corrupt: AtomicBool,
    /// What was wrong in the first table of a writable image that was not good throughout.
    corruption: Mutex<{ rank::LEAF }, Option<String>>,
}

impl Tables {
    /// For writing (with an allocator) reads and checks the L1 table (V22); for reading nothing yet.
    pub fn open(storage: Arc<dyn Storage>, header: &Header, allocator: Option<Arc<Allocator>>, memory: usize) -> Result<Self> {
        let geometry = header.geometry;
        let len = header.l1_size as usize;
        let chunks = match &allocator {
            Some(allocator) => claimed_chunks(&*storage, header, allocator)?,
            None => (0..len.div_ceil(CHUNK)).map(|_| Chunk::default()).collect(),
        };
        Ok(Tables {
            storage,
            geometry,
            size: AtomicU64::new(geometry.size()),
            l1_offset: AtomicU64::new(header.l1_table_offset),
            slots: RwLock::new(Slots { len, chunks }),
            loaders: Default::default(),
            dirty: Mutex::default(),
            resident: Mutex::default(),
            resident_bytes: AtomicUsize::new(0),
            memory,
            allocator,
            writing_back: AtomicBool::new(false),
            is_corrupt: AtomicBool::new(false),
            corruption: Mutex::default(),
        })
    }

    /// What was wrong in a table of a writable image that was loaded, although the rest of it is used.
    /// No table of an image that is only read says anything here.
    pub fn corruption(&self) -> Option<String> {
        if self.is_corrupt.load(Ordering::Acquire) { self.corruption.lock().clone() } else { None }
    }

    /// Whether [`Tables::corruption`] says something.
    pub fn is_corrupt(&self) -> bool {
        self.is_corrupt.load(Ordering::Acquire)
    }

    fn found_corruption(&self, what: String) {
        if self.allocator.is_some() {
            self.corruption.lock().get_or_insert(what);
            self.is_corrupt.store(true, Ordering::Release);
        }
    }

    pub fn geometry(&self) -> Geometry {
        self.geometry.resized(self.size.load(Ordering::Acquire)).expect("only checked sizes are stored")
    }

    /// Calls `f` with the L2 table of an L1 index, loading it first where needed; `None` where there is no table.
    pub fn with<R>(&self, l1_index: usize, f: impl FnOnce(&L2Table) -> R) -> Result<Option<R>> {
        loop {
            let has_slot = {
                let slots = self.slots.read();
                match slots.get(l1_index) {
                    Some(slot) => {
                        if let Some(table) = slot.table.read().as_deref() {
                            return Ok(Some(f(table)));
                        }
                        if slot.l1_entry.load(Ordering::Acquire) == 0 {
                            return Ok(None);
                        }
                        true
                    }
                    None if slots.chunks[l1_index / CHUNK].is_empty.load(Ordering::Acquire) => return Ok(None),
                    None => false,
                }
            };
            if has_slot {
                self.load(l1_index)?;
            } else {
                self.load_chunk(l1_index)?;
            }
        }
    }

    /// As [`Tables::with`], for a table that is in memory; `None` where it is not.
    pub fn if_resident<R>(&self, l1_index: usize, f: impl FnOnce(&L2Table) -> R) -> Option<R> {
        let slots = self.slots.read();
        slots.get(l1_index)?.table.read().as_deref().map(f)
    }

    /// Calls `f` with the L2 table of an L1 index, ready to be changed: allocated where there is none, moved to a cluster of its own where it
    /// is shared. `f` gets a closure that sets an entry and returns the raw one before.
    pub fn change<R>(&self, l1_index: usize, f: impl FnOnce(&mut dyn FnMut(usize, u64) -> u64) -> R) -> Result<R> {
        loop {
            self.make_writable(l1_index)?;
            let slots = self.slots.read();
            let guard = slots.of_table(l1_index).table.read();
            // Evicted or not yet ours: once more.
            let Some(table) = guard.as_deref().filter(|table| table.in_place) else { continue };
            let mut set = |index: usize, raw: u64| table.set(index, raw);
            let result = f(&mut set);
            // After the dirty bits: see take_dirty.
            self.queue(table, l1_index);
            return Ok(result);
        }
    }

    fn make_writable(&self, l1_index: usize) -> Result<()> {
        let allocator = self.allocator.as_deref().expect("only a writable image changes tables");
        if self.with(l1_index, |table| table.in_place)? == Some(true) {
            return Ok(());
        }
        let geometry = self.geometry();
        let _loader = self.loaders[l1_index % LOADERS].lock();
        let host = allocator.allocate_l2_table()?;
        let slots = self.slots.read();
        let slot = &slots.chunks[l1_index / CHUNK].made()[l1_index % CHUNK];
        let mut resident = slot.table.write();
        match resident.as_deref_mut() {
            Some(table) if table.in_place => {
                // Somebody was faster.
                drop(resident);
                drop(slots);
                allocator.give_back_l2_table(host);
                return Ok(());
            }
            Some(shared) => {
                let old = shared.host;
                shared.host = host;
                shared.in_place = true;
                shared.l1_dirty.store(true, Ordering::Release);
                shared.mark_all_dirty();
                self.set_l1_entry(slot, host, &geometry);
                self.queue(shared, l1_index);
                drop(resident);
                drop(slots);
                allocator.queue_free(old, 1);
            }
            None if slot.l1_entry.load(Ordering::Acquire) == 0 => {
                let entries = (0..geometry.l2_entries()).map(|_| AtomicU64::new(0)).collect();
                let table = Box::new(L2Table::new(host, true, entries, None));
                table.l1_dirty.store(true, Ordering::Release);
                table.mark_all_dirty();
                self.set_l1_entry(slot, host, &geometry);
                self.queue(&table, l1_index);
                self.account(l1_index, &table);
                *resident = Some(table);
                drop(resident);
                drop(slots);
            }
            // Evicted meanwhile; the caller comes again.
            None => {
                drop(resident);
                drop(slots);
                allocator.give_back_l2_table(host);
            }
        }
        Ok(())
    }

    fn set_l1_entry(&self, slot: &Slot, host: HostCluster, geometry: &Geometry) {
        slot.l1_entry.store(L1Entry { table: host, in_place: true }.encode(geometry), Ordering::Release);
    }

    /// Puts a table on the list of the next pass. Mark and list change together: who finds the mark set must not return, and perhaps have its
    /// old cluster freed, before the table is where a pass finds it (P1, R3).
    fn queue(&self, table: &L2Table, l1_index: usize) {
        let mut dirty = self.dirty.lock();
        if !table.queued.swap(true, Ordering::AcqRel) {
            dirty.list.push(l1_index);
        }
        for (_, changed) in &mut dirty.watched {
            changed.insert(l1_index);
        }
    }

    /// From now on remembers which tables change, until [`Tables::end_watch`]. Returns its number.
    pub fn watch_changes(&self) -> u64 {
        let mut dirty = self.dirty.lock();
        dirty.watches += 1;
        let number = dirty.watches;
        dirty.watched.push((number, BTreeSet::new()));
        number
    }

    /// The L1 indexes of the tables that have changed since a watch began, or since it was asked last.
    pub fn take_changed(&self, watch: u64) -> BTreeSet<usize> {
        let mut dirty = self.dirty.lock();
        dirty.watched.iter_mut().find(|(number, _)| *number == watch).map(|(_, changed)| std::mem::take(changed)).unwrap_or_default()
    }

    /// Remembers no more changes for this watch.
    pub fn end_watch(&self, watch: u64) {
        self.dirty.lock().watched.retain(|(number, _)| *number != watch);
    }

    fn account(&self, l1_index: usize, table: &L2Table) {
        self.resident_bytes.fetch_add(table.bytes(), Ordering::Relaxed);
        self.resident.lock().push_back(l1_index);
    }

    /// Reads a chunk of the L1 table of an image that is only read.
    fn load_chunk(&self, l1_index: usize) -> Result<()> {
        let _loader = self.loaders[l1_index / CHUNK % LOADERS].lock();
        let slots = self.slots.read();
        let chunk = &slots.chunks[l1_index / CHUNK];
        if chunk.slots.get().is_some() || chunk.is_empty.load(Ordering::Acquire) {
            return Ok(());
        }
        let entries = slots.in_chunk(l1_index);
        drop(slots);
        let raw = self.read_table("L1", self.l1_entry_offset(entries.start), entries.len())?;
        self.slots.read().chunks[l1_index / CHUNK].fill(&raw);
        Ok(())
    }

    /// Reads table entries, as far as the file goes: [`OUTSIDE`] is what lies behind it.
    fn read_table(&self, which: &str, offset: u64, entries: usize) -> Result<Vec<u64>> {
        let inside = (self.storage.size().saturating_sub(offset) / 8).min(entries as u64) as usize;
        let mut raw = vec![0; inside * 8];
        if !raw.is_empty() {
            self.storage.read_at(offset, &mut raw).map_err(|error| Error::io(format!("{which} table at {offset:#x}"), error))?;
        }
        let mut table = Vec::with_capacity(entries);
        table.extend(raw.chunks_exact(8).map(be64));
        table.resize(entries, OUTSIDE);
        Ok(table)
    }

    /// Brings a table into memory. One thread per table: a stale copy can then never replace a newer one.
    fn load(&self, l1_index: usize) -> Result<()> {
        let _loader = (!without(Step::OneLoaderPerTable)).then(|| self.loaders[l1_index % LOADERS].lock());
        let l1_entry = {
            let slots = self.slots.read();
            let slot = slots.of_table(l1_index);
            if slot.table.read().is_some() {
                return Ok(());
            }
            slot.l1_entry.load(Ordering::Acquire)
        };
        let geometry = self.geometry();
        let of_l1 = |error: Error| error.context(format!("L1 table, index {l1_index}"));
        if l1_entry == OUTSIDE {
            return Err(of_l1(corrupt("the entry is outside the file".into())));
        }
        let Some(entry) = L1Entry::decode(l1_entry, &geometry).map_err(|error| of_l1(error.into()))? else { return Ok(()) };
        let offset = geometry.host_offset(entry.table);
        if offset.0 >= self.storage.size() {
            return Err(of_l1(corrupt(format!("L2 table at {offset} is outside the file"))));
        }
        let entries = self.read_table("L2", offset.0, geometry.l2_entries() as usize)?;
        let judged = self.judge(&entries, &geometry);
        if let Some(why) = judged.as_ref().and_then(|judged| judged.first_bad()) {
            self.found_corruption(format!("L2 table at {offset}, {why}"));
        }
        let mut in_place = entry.in_place;
        if let Some(allocator) = &self.allocator
            && entry.in_place
        {
            match allocator.refcount(entry.table) {
                Ok(1) => {}
                Ok(_) => {
                    in_place = false;
                    self.found_corruption(format!("L2 table at {offset} is COPIED but its refcount is not one"));
                }
                // A write moves it to a cluster of its own, as if it were shared.
                Err(_) => in_place = false,
            }
        }
        self.evict();
        let entries = entries.into_iter().map(AtomicU64::new).collect();
        let table = Box::new(L2Table::new(entry.table, in_place, entries, judged));
        self.account(l1_index, &table);
        *self.slots.read().of_table(l1_index).table.write() = Some(table);
        Ok(())
    }

    /// V24 to V27 for a table as it comes from disk: which entries are not good, if any. For a backing
    /// file only what reading needs.
    fn judge(&self, entries: &[u64], geometry: &Geometry) -> Option<Box<Judged>> {
        let size = self.storage.size();
        let mut judged: Option<Box<Judged>> = None;
        let new = || Box::new(Judged::new(entries.len()));
        let mut data = Vec::new();
        let mut lost_its_end = false;
        for (index, &raw) in entries.iter().enumerate() {
            match referenced(raw, geometry, size) {
                Ok((clusters, in_place)) if self.allocator.is_some() => {
                    data.extend(clusters.map(|cluster| (HostCluster(cluster), in_place, index)));
                }
                Ok(_) => {}
                Err(error) => {
                    lost_its_end |= raw == OUTSIDE || Mapping::decode(raw, geometry).is_ok();
                    judged.get_or_insert_with(new).set_bad(index, &error.context(format!("index {index}")));
                }
            }
        }
        // A file may end inside its last cluster, and the rest of that cluster is zeros. Where the file has lost clusters,
        // it has lost that rest as well: zeros would be a lie.
        if lost_its_end {
            for (index, &raw) in entries.iter().enumerate() {
                if let Ok(Mapping::Data { host, .. }) = Mapping::decode(raw, geometry)
                    && size.saturating_sub(geometry.host_offset(host).0) < geometry.cluster_size()
                {
                    let error = corrupt(format!("index {index}: the file ends inside the cluster at {}", geometry.host_offset(host)));
                    judged.get_or_insert_with(new).set_bad(index, &error);
                }
            }
        }
        let Some(allocator) = &self.allocator else { return judged };
        // In the order of the file: each refcount block is looked at once, wherever the entries point. One that cannot be read is not tried again
        // for every entry.
        data.sort_unstable();
        let mut unreadable = None;
        for (cluster, in_place, index) in data {
            let block = allocator.block_of(cluster);
            let checked =
                if unreadable == Some(block) { allocator.check_is_no_metadata(cluster) } else { allocator.check_data(cluster, in_place) };
            match checked {
                Ok(()) if unreadable != Some(block) => {}
                Err(error) if error.kind() == ErrorKind::Corrupt => {
                    judged.get_or_insert_with(new).set_bad(index, &error.context(format!("index {index}")));
                }
                Ok(()) | Err(_) => {
                    unreadable = Some(block);
                    judged.get_or_insert_with(new).set_unproven(index);
                }
            }
        }
        judged
    }

    /// Drops the oldest clean tables while there is too much in memory, looking at a bounded number of them. Does no I/O; never while a write-back pass is between copy and write,
    /// since a table dropped then would be read back old.
    fn evict(&self) {
        let table_bytes = self.geometry().cluster_size() as usize;
        let mut tries = self.resident.lock().len().min(1024);
        while tries > 0 && self.resident_bytes.load(Ordering::Relaxed) + table_bytes > self.memory && self.may_evict() {
            tries -= 1;
            let Some(l1_index) = self.resident.lock().pop_front() else { return };
            let slots = self.slots.read();
            let evicted = match slots.of_table(l1_index).table.try_write() {
                // Asked again under the lock: a pass that starts now finds either no table or a clean one.
                Some(mut slot)
                    if slot.as_deref().is_some_and(|table| table.is_clean() || without(Step::DirtyTablesStay)) && self.may_evict() =>
                {
                    slot.take()
                }
                _ => None,
            };
            drop(slots);
            match evicted {
                Some(table) => {
                    self.resident_bytes.fetch_sub(table.bytes(), Ordering::Relaxed);
                }
                None => self.resident.lock().push_back(l1_index),
            }
        }
    }

    /// Never during a pass: a table that is dropped after it was copied and before it is written would be read back old.
    fn may_evict(&self) -> bool {
        without(Step::NoEvictionDuringPass) || !self.writing_back.load(Ordering::SeqCst)
    }

    /// For the write-back pass: marks every dirty table clean and copies what was dirty, in this order, so that a change that comes in between
    /// makes it dirty again (D6 step 3). Until [`Tables::written`] nothing is evicted.
    pub fn take_dirty(&self) -> Vec<TableWrite> {
        self.writing_back.store(true, Ordering::SeqCst);
        let queue = std::mem::take(&mut self.dirty.lock().list);
        let geometry = self.geometry();
        let slots = self.slots.read();
        let mut writes = Vec::with_capacity(queue.len());
        for l1_index in queue {
            let slot = slots.of_table(l1_index);
            let guard = slot.table.read();
            let table = guard.as_deref().expect("a dirty table is resident");
            table.queued.swap(false, Ordering::AcqRel);
            let l1_entry = table.l1_dirty.swap(false, Ordering::AcqRel).then(|| slot.l1_entry.load(Ordering::Acquire));
            let start = geometry.host_offset(table.host).0;
            let pieces = table.take_dirty(start);
            writes.push(TableWrite { l1_index, pieces, l1_entry });
        }
        writes
    }

    /// The pass is over, and everything that [`Tables::take_dirty`] gave out is on disk.
    pub fn written(&self) {
        self.writing_back.store(false, Ordering::SeqCst);
        // What could not be dropped while it was dirty can be now.
        self.evict();
    }

    /// The pass failed: everything that it took is dirty again.
    pub fn not_written(&self, writes: &[TableWrite]) {
        let geometry = self.geometry();
        let slots = self.slots.read();
        for write in writes {
            let guard = slots.of_table(write.l1_index).table.read();
            let table = guard.as_deref().expect("nothing is evicted during a pass");
            if write.l1_entry.is_some() {
                table.l1_dirty.store(true, Ordering::Release);
            }
            if !without(Step::FailedTablesStayDirty) {
                table.dirty_again(geometry.host_offset(table.host).0, &write.pieces);
                self.queue(table, write.l1_index);
            }
        }
        drop(slots);
        self.writing_back.store(false, Ordering::SeqCst);
    }

    /// Whether a pass would find something.
    pub fn is_dirty(&self) -> bool {
        !self.dirty.lock().list.is_empty()
    }

    /// Bytes of tables that wait for a pass.
    pub fn dirty_bytes(&self) -> usize {
        self.dirty.lock().list.len() * self.geometry.cluster_size() as usize
    }

    /// Host offset in bytes of an L1 entry.
    pub fn l1_entry_offset(&self, l1_index: usize) -> u64 {
        self.l1_offset.load(Ordering::Acquire) + l1_index as u64 * 8
    }

    #[cfg(test)]
    pub fn limit_memory(&mut self, bytes: usize) {
        self.memory = bytes;
    }

    #[cfg(test)]
    pub fn dirty_list(&self) -> impl std::ops::Deref<Target = Dirty> {
        self.dirty.lock()
    }

    #[cfg(test)]
    pub fn resident(&self) -> usize {
        self.resident.lock().len()
    }

    /// How many pieces of the L1 table take memory.
    #[cfg(test)]
    pub fn chunks(&self) -> usize {
        self.slots.read().chunks.iter().filter(|chunk| chunk.slots.get().is_some()).count()
    }

    /// Number of L1 entries.
    pub fn l1_len(&self) -> usize {
        self.slots.read().len
    }

    /// The L1 table as it is to be on disk, without entries of tables that are not there yet.
    pub fn l1_bytes(&self) -> Vec<u8> {
        let slots = self.slots.read();
        let entry = |index| slots.get(index).map_or(0, |slot| slot.l1_entry.load(Ordering::Acquire));
        (0..slots.len).flat_map(|index| entry(index).to_be_bytes()).collect()
    }

    /// Switches to an L1 table of `len` entries at `offset`. The caller holds the whole disk and has flushed.
    pub fn move_l1(&self, len: usize, offset: u64) {
        let mut slots = self.slots.write();
        slots.len = len;
        slots.chunks.resize_with(len.div_ceil(CHUNK), || Chunk::of(&[]));
        drop(slots);
        self.l1_offset.store(offset, Ordering::Release);
    }

    /// Switches to another virtual size. The caller holds the whole disk; the L1 table is large enough.
    pub fn set_size(&self, size: u64) {
        self.size.store(size, Ordering::Release);
    }
}

/// The host clusters that an L2 entry names, and whether it says that they are its own alone. `size`: of
/// the file in bytes.
fn referenced(raw: u64, geometry: &Geometry, size: u64) -> Result<(Range<u64>, bool)> {
    if raw == OUTSIDE {
        return Err(corrupt("the entry is outside the file".into()));
    }
    match Mapping::decode(raw, geometry)? {
        Mapping::Unallocated | Mapping::Zero { reserved: None } => Ok((0..0, false)),
        Mapping::Compressed { at, len } => {
            let end = at.0.checked_add(u64::from(len)).filter(|&end| end <= size.next_multiple_of(512));
            let Some(end) = end else { return Err(corrupt(format!("compressed cluster at {at} is outside the file"))) };
            Ok((geometry.host_cluster(at).0..((end - 1) >> geometry.cluster_bits()) + 1, false))
        }
        Mapping::Zero { reserved: Some((host, in_place)) } | Mapping::Data { host, in_place } => {
            if geometry.host_offset(host).0 >= size {
                return Err(corrupt(format!("cluster at {} is outside the file", geometry.host_offset(host))));
            }
            Ok((host.0..host.0 + 1, in_place))
        }
    }
}

pub(super) fn be64(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0, |value, &byte| value << 8 | u64::from(byte))
}

pub(super) fn corrupt(text: String) -> Error {
    Error::new(ErrorKind::Corrupt, text)
}
