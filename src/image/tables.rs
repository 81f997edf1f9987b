//! The L1 table and the L2 tables in memory: loaded on demand, checked once when loaded, evicted only when clean.

use std::collections::VecDeque;
use std::sync::Arc;

use super::allocator::Allocator;
use super::l2_table::L2Table;
use crate::format::{Geometry, Header, HostCluster, L1Entry, Mapping};
use crate::mutants::{Step, without};
use crate::storage::Storage;
use crate::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use crate::sync::{Mutex, RwLock, rank};
use crate::{Error, ErrorKind, Result};

/// Table loads that may go on side by side; each is one lock.
const LOADERS: usize = 16;

/// One L1 entry and the table it names, if that is in memory.
#[derive(Debug, Default)]
struct Slot {
    /// As it is to be on disk once everything is written back.
    l1_entry: AtomicU64,
    table: RwLock<{ rank::SLOT }, Option<Box<L2Table>>>,
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
    slots: RwLock<{ rank::SLOTS }, Vec<Slot>>,
    loaders: [Mutex<{ rank::TABLE_LOAD }, ()>; LOADERS],
    dirty: Mutex<{ rank::LEAF }, Vec<usize>>,
    /// L1 indexes of resident tables, oldest first.
    resident: Mutex<{ rank::LEAF }, VecDeque<usize>>,
    resident_bytes: AtomicUsize,
    memory: usize,
    /// Set for a writable image: refcounts to hold loaded entries against, and where new tables come from.
    allocator: Option<Arc<Allocator>>,
    /// A write-back pass copies and writes tables: nothing may be evicted between the two.
    writing_back: AtomicBool,
}

impl Tables {
    /// Reads and checks the L1 table (V22).
    pub fn open(storage: Arc<dyn Storage>, header: &Header, allocator: Option<Arc<Allocator>>, memory: usize) -> Result<Self> {
        let geometry = header.geometry;
        let mut raw = vec![0; header.l1_size as usize * 8];
        storage.read_at(header.l1_table_offset, &mut raw).map_err(|error| Error::io("L1 table", error))?;
        let mut slots = Vec::with_capacity(header.l1_size as usize);
        for (index, raw) in raw.chunks_exact(8).enumerate() {
            let raw = be64(raw);
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
                if let Some(allocator) = &allocator {
                    allocator.claim_l2_table(entry.table, index)?;
                }
            }
            slots.push(Slot { l1_entry: AtomicU64::new(raw), ..Slot::default() });
        }
        Ok(Tables {
            storage,
            geometry,
            size: AtomicU64::new(geometry.size()),
            l1_offset: AtomicU64::new(header.l1_table_offset),
            slots: RwLock::new(slots),
            loaders: Default::default(),
            dirty: Mutex::default(),
            resident: Mutex::default(),
            resident_bytes: AtomicUsize::new(0),
            memory,
            allocator,
            writing_back: AtomicBool::new(false),
        })
    }

    pub fn geometry(&self) -> Geometry {
        self.geometry.resized(self.size.load(Ordering::Acquire)).expect("only checked sizes are stored")
    }

    /// Calls `f` with the L2 table of an L1 index, loading it first where needed; `None` where there is no table.
    pub fn with<R>(&self, l1_index: usize, f: impl FnOnce(&L2Table) -> R) -> Result<Option<R>> {
        loop {
            {
                let slots = self.slots.read();
                let slot = &slots[l1_index];
                if let Some(table) = slot.table.read().as_deref() {
                    return Ok(Some(f(table)));
                }
                if slot.l1_entry.load(Ordering::Acquire) == 0 {
                    return Ok(None);
                }
            }
            self.load(l1_index)?;
        }
    }

    /// Calls `f` with the L2 table of an L1 index, ready to be changed: allocated where there is none, moved to a cluster of its own where it
    /// is shared. `f` gets a closure that sets an entry and returns the raw one before.
    pub fn change<R>(&self, l1_index: usize, f: impl FnOnce(&mut dyn FnMut(usize, u64) -> u64) -> R) -> Result<R> {
        loop {
            self.make_writable(l1_index)?;
            let slots = self.slots.read();
            let guard = slots[l1_index].table.read();
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
        let slot = &slots[l1_index];
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
                let table = Box::new(L2Table::new(host, true, entries));
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
            dirty.push(l1_index);
        }
    }

    fn account(&self, l1_index: usize, table: &L2Table) {
        self.resident_bytes.fetch_add(table.bytes(), Ordering::Relaxed);
        self.resident.lock().push_back(l1_index);
    }

    /// Brings a table into memory. One thread per table: a stale copy can then never replace a newer one.
    fn load(&self, l1_index: usize) -> Result<()> {
        let _loader = (!without(Step::OneLoaderPerTable)).then(|| self.loaders[l1_index % LOADERS].lock());
        let l1_entry = {
            let slots = self.slots.read();
            if slots[l1_index].table.read().is_some() {
                return Ok(());
            }
            slots[l1_index].l1_entry.load(Ordering::Acquire)
        };
        let geometry = self.geometry();
        let Some(entry) = L1Entry::decode(l1_entry, &geometry)? else { return Ok(()) };
        let offset = geometry.host_offset(entry.table);
        let mut raw = vec![0; geometry.cluster_size() as usize];
        self.storage.read_at(offset.0, &mut raw).map_err(|error| Error::io(format!("L2 table at {offset}"), error))?;
        let entries: Box<[u64]> = raw.chunks_exact(8).map(be64).collect();
        drop(raw);
        self.check_entries(&entries, &geometry).map_err(|error| error.context(format!("L2 table at {offset}")))?;
        if let Some(allocator) = &self.allocator
            && entry.in_place
            && allocator.refcount(entry.table)? != 1
        {
            return Err(corrupt(format!("L2 table at {offset} is COPIED but its refcount is not one")));
        }
        self.evict();
        let table = Box::new(L2Table::new(entry.table, entry.in_place, entries.iter().map(|&raw| AtomicU64::new(raw)).collect()));
        self.account(l1_index, &table);
        *self.slots.read()[l1_index].table.write() = Some(table);
        Ok(())
    }

    /// V24 to V27 for a table as it comes from disk. For a backing file only what reading needs.
    fn check_entries(&self, entries: &[u64], geometry: &Geometry) -> Result<()> {
        let size = self.storage.size();
        let mut data = Vec::new();
        let mut refers = |cluster, in_place, index| {
            if self.allocator.is_some() {
                data.push((cluster, in_place, index));
            }
        };
        for (index, &raw) in entries.iter().enumerate() {
            match Mapping::decode(raw, geometry)? {
                Mapping::Unallocated | Mapping::Zero { reserved: None } => {}
                Mapping::Compressed { at, len } => {
                    let end = at.0.checked_add(u64::from(len));
                    if end.is_none_or(|end| end > size.next_multiple_of(512)) {
                        return Err(corrupt(format!("index {index}: compressed cluster at {at} is outside the file")));
                    }
                    let clusters = geometry.host_cluster(at).0..=(at.0 + u64::from(len) - 1) >> geometry.cluster_bits();
                    clusters.for_each(|cluster| refers(HostCluster(cluster), false, index));
                }
                Mapping::Zero { reserved: Some((host, in_place)) } | Mapping::Data { host, in_place } => {
                    if geometry.host_offset(host).0 >= size {
                        return Err(corrupt(format!("index {index}: cluster at {} is outside the file", geometry.host_offset(host))));
                    }
                    refers(host, in_place, index);
                }
            }
        }
        let Some(allocator) = &self.allocator else { return Ok(()) };
        // In the order of the file: each refcount block is looked at once, wherever the entries point.
        data.sort_unstable();
        for (cluster, in_place, index) in data {
            allocator.check_data(cluster, in_place).map_err(|error| error.context(format!("index {index}")))?;
        }
        Ok(())
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
            let evicted = match slots[l1_index].table.try_write() {
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
        let queue = std::mem::take(&mut *self.dirty.lock());
        let geometry = self.geometry();
        let slots = self.slots.read();
        let mut writes = Vec::with_capacity(queue.len());
        for l1_index in queue {
            let slot = &slots[l1_index];
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
            let guard = slots[write.l1_index].table.read();
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
        !self.dirty.lock().is_empty()
    }

    /// Bytes of tables that wait for a pass.
    pub fn dirty_bytes(&self) -> usize {
        self.dirty.lock().len() * self.geometry.cluster_size() as usize
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
    pub fn dirty_list(&self) -> impl std::ops::Deref<Target = Vec<usize>> {
        self.dirty.lock()
    }

    #[cfg(test)]
    pub fn resident(&self) -> usize {
        self.resident.lock().len()
    }

    /// Number of L1 entries.
    pub fn l1_len(&self) -> usize {
        self.slots.read().len()
    }

    /// The L1 table as it is to be on disk, without entries of tables that are not there yet.
    pub fn l1_bytes(&self) -> Vec<u8> {
        self.slots.read().iter().flat_map(|slot| slot.l1_entry.load(Ordering::Acquire).to_be_bytes()).collect()
    }

    /// Switches to an L1 table of `len` entries at `offset`. The caller holds the whole disk and has flushed.
    pub fn move_l1(&self, len: usize, offset: u64) {
        self.slots.write().resize_with(len, Slot::default);
        self.l1_offset.store(offset, Ordering::Release);
    }

    /// Switches to another virtual size. The caller holds the whole disk; the L1 table is large enough.
    pub fn set_size(&self, size: u64) {
        self.size.store(size, Ordering::Release);
    }
}

fn be64(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0, |value, &byte| value << 8 | u64::from(byte))
}

fn corrupt(text: String) -> Error {
    Error::new(ErrorKind::Corrupt, text)
}
