//! The L1 table and the L2 tables in memory. A table is loaded on demand, checked when it is loaded
//! unless the same bytes were good before, and evicted only when it is clean.

use std::collections::{BTreeSet, VecDeque};
use std::sync::Arc;

use crossbeam_channel::{Receiver, Sender, bounded};

use super::allocator::Allocator;
use super::judge::judge;
use super::judged::Judged;
use super::l2_table::L2Table;
use super::slots::{CHUNK, IS_GOOD, L1Chunk, Slot, Slots, claimed_chunks};
use crate::format::{Geometry, Header, HostCluster, L1Entry, RawL2Entry, be_words};
use host::background::Unmarked;
use host::mutants::{Step, without};
use host::storage::ReadAt;
use host::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use host::sync::{Mutex, RwLock, rank};
use host::{Error, ErrorKind, Result};

mod entries;

/// Number of locks for table loads, and so the number of tables that can be loaded concurrently.
const LOADERS: usize = 16;

/// How many tables the load of a table looks at to give memory back. More would delay the
/// request that waits for the load.
const MOST_LOOKS: usize = 1024;

/// Value in memory of a word of a table entry that lies outside the file. It is no valid L1 entry
/// and no valid descriptor of an L2 entry.
pub(super) const OUTSIDE: u64 = u64::MAX;

/// L1 indexes of tables that a pass has to write, and of tables that changed since a watch began.
#[derive(Debug, Default)]
pub(super) struct Dirty {
    /// L1 indexes of dirty tables.
    pub list: Vec<usize>,
    /// For each active [`Tables::watch_changes`]: its number, and the L1 indexes that have changed.
    watched: Vec<(u64, BTreeSet<usize>)>,
    watches: u64,
}

/// Sets the raw entry at an index of a table, and returns the previous one.
pub(super) type SetEntry<'a> = dyn FnMut(usize, RawL2Entry) -> RawL2Entry + 'a;

/// The parts of one L2 table that the write-back pass has to write.
#[derive(Debug)]
pub(super) struct TableWrite {
    /// The L1 index of the table.
    pub l1_index: usize,
    /// Host offsets in bytes, each with the bytes to write there.
    pub pieces: Vec<(u64, Vec<u8>)>,
    /// The L1 entry to write once the table is durable; `None` if the entry is on disk already.
    pub l1_entry: Option<u64>,
}

/// All tables of an image.
#[derive(Debug)]
pub(super) struct Tables {
    storage: Arc<dyn ReadAt>,
    geometry: Geometry,
    /// The virtual size in bytes. The rest of the geometry never changes.
    size: AtomicU64,
    /// Host offset of the L1 table, in bytes.
    l1_offset: AtomicU64,
    slots: RwLock<{ rank::SLOTS }, Slots>,
    loaders: [Mutex<{ rank::TABLE_LOAD }, ()>; LOADERS],
    dirty: Mutex<{ rank::LEAF }, Dirty>,
    /// See [`Tables::became_dirty`].
    became_dirty: (Sender<()>, Receiver<()>),
    /// L1 indexes of resident tables, oldest first.
    resident: Mutex<{ rank::LEAF }, VecDeque<usize>>,
    resident_bytes: AtomicUsize,
    memory: usize,
    /// The allocator of a writable image: checks loaded entries against refcounts, and provides
    /// clusters for new tables.
    allocator: Option<Arc<Allocator>>,
    /// Set while a write-back pass copies and writes tables. No table may be evicted between the
    /// copy and the write.
    writing_back: AtomicBool,
    /// Whether [`Tables::corruption`] returns a description.
    is_corrupt: AtomicBool,
    /// Description of the first bad entry that was found in a table of a writable image.
    corruption: Mutex<{ rank::LEAF }, Option<String>>,
}

/// A table is not in memory.
pub(super) struct NotResident<F> {
    /// What was to be called with it.
    f: F,
    /// Whether the slot of the table is in memory.
    has_slot: bool,
}

impl Tables {
    /// Opens the tables of an image. For writing (with an allocator), reads and checks the whole L1
    /// table (V22); for reading, reads nothing yet.
    pub fn open(
        storage: Arc<dyn ReadAt>,
        header: &Header,
        allocator: Option<Arc<Allocator>>,
        memory: usize,
    ) -> Result<Self> {
        let geometry = header.geometry;
        let len = header.l1_size as usize;
        let chunks = match &allocator {
            Some(allocator) => claimed_chunks(&*storage, header, allocator)?,
            None => (0..len.div_ceil(CHUNK)).map(|_| L1Chunk::default()).collect(),
        };
        Ok(Tables {
            storage,
            geometry,
            size: AtomicU64::new(geometry.size()),
            l1_offset: AtomicU64::new(header.l1_table_offset),
            slots: RwLock::new(Slots { len, chunks }),
            loaders: Default::default(),
            dirty: Mutex::default(),
            became_dirty: bounded(1),
            resident: Mutex::default(),
            resident_bytes: AtomicUsize::new(0),
            memory,
            allocator,
            writing_back: AtomicBool::new(false),
            is_corrupt: AtomicBool::new(false),
            corruption: Mutex::default(),
        })
    }

    /// Returns the first bad entry found in a loaded table of a writable image; the other entries
    /// of that table are used. Always `None` for an image that is open for reading only.
    pub fn corruption(&self) -> Option<String> {
        if self.is_corrupt.load(Ordering::Acquire) { self.corruption.lock().clone() } else { None }
    }

    /// Returns whether [`Tables::corruption`] returns a description.
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
        self.geometry
            .resized(self.size.load(Ordering::Acquire))
            .expect("only checked sizes are stored")
    }

    /// Calls `f` with the L2 table of an L1 index and loads the table first if needed; returns
    /// `None` if there is no table.
    pub fn with<R>(&self, l1_index: usize, f: impl FnOnce(&L2Table) -> R) -> Result<Option<R>> {
        let mut f = f;
        loop {
            let NotResident { f: unused, has_slot } = match self.with_resident(l1_index, f) {
                Ok(found) => return Ok(found),
                Err(missing) => missing,
            };
            f = unused;
            if has_slot {
                self.load(l1_index)?;
            } else {
                self.load_chunk(l1_index)?;
            }
        }
    }

    /// As [`Tables::with`], but loads nothing: returns `f` unused where that would be needed.
    pub fn with_resident<R, F: FnOnce(&L2Table) -> R>(
        &self,
        l1_index: usize,
        f: F,
    ) -> std::result::Result<Option<R>, NotResident<F>> {
        let slots = self.slots.read();
        match slots.get(l1_index) {
            Some(slot) => match slot.table.read().as_deref() {
                Some(table) => Ok(Some(f(table))),
                None if slot.l1_entry.load(Ordering::Acquire) == 0 => Ok(None),
                None => Err(NotResident { f, has_slot: true }),
            },
            None if slots.chunks[l1_index / CHUNK].is_empty.load(Ordering::Acquire) => Ok(None),
            None => Err(NotResident { f, has_slot: false }),
        }
    }

    /// Calls `f` as [`Tables::with`] does if the table is in memory; returns `None` if it is not.
    pub fn if_resident<R>(&self, l1_index: usize, f: impl FnOnce(&L2Table) -> R) -> Option<R> {
        let slots = self.slots.read();
        slots.get(l1_index)?.table.read().as_deref().map(f)
    }

    /// Calls `f` with the L2 table of an L1 index, ready to be changed: the table is allocated if
    /// missing, and moved to a cluster of its own if it is shared. `f` gets a closure that sets a
    /// raw entry and returns the previous one.
    ///
    /// Extended entries have two words, and are set under the write lock of the table's slot:
    /// lookups and the write-back pass, which hold the read lock, see both words of one entry.
    pub fn change<R>(&self, l1_index: usize, f: impl FnOnce(&mut SetEntry<'_>) -> R) -> Result<R> {
        let is_one_word = !self.geometry.has_extended_l2() || without(Step::EntryChangesWhole);
        loop {
            self.make_writable(l1_index)?;
            let slots = self.slots.read();
            let slot = slots.of_table(l1_index);
            let (shared, whole) = if is_one_word {
                (Some(slot.table.read()), None)
            } else {
                (None, Some(slot.table.write()))
            };
            let table = shared.as_deref().or(whole.as_deref()).and_then(Option::as_deref);
            // The table was evicted or packed meanwhile: try again.
            let may_change = |table: &&L2Table| table.in_place && !table.is_packed();
            let Some(table) = table.filter(may_change) else { continue };
            let mut set = |index: usize, raw: RawL2Entry| table.set(index, raw);
            let result = f(&mut set);
            // The table is queued after its dirty bits are set; see [`Tables::take_dirty`].
            self.queue(table, l1_index);
            return Ok(result);
        }
    }

    fn make_writable(&self, l1_index: usize) -> Result<()> {
        let allocator = self.allocator.as_deref().expect("only a writable image changes tables");
        let (is_in_place, is_packed) = self
            .with(l1_index, |table| (table.in_place, table.is_packed()))?
            .unwrap_or((false, false));
        if is_packed {
            let slots = self.slots.read();
            if let Some(table) = slots.of_table(l1_index).table.write().as_deref_mut() {
                self.unpack(table);
            }
        }
        if is_in_place {
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
                // Another thread made the table writable first.
                drop(resident);
                drop(slots);
                allocator.give_back_l2_table(host);
                return Ok(());
            }
            Some(shared) => {
                self.unpack(shared);
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
                let words = geometry.l2_entries() as usize * geometry.l2_entry_words();
                let words = (0..words).map(|_| AtomicU64::new(0)).collect();
                let table = Box::new(L2Table::new(host, true, words, None, &geometry));
                table.l1_dirty.store(true, Ordering::Release);
                table.mark_all_dirty();
                self.set_l1_entry(slot, host, &geometry);
                self.queue(&table, l1_index);
                self.account(l1_index, &table);
                *resident = Some(table);
                drop(resident);
                drop(slots);
            }
            // The table was evicted meanwhile; the caller tries again.
            None => {
                drop(resident);
                drop(slots);
                allocator.give_back_l2_table(host);
            }
        }
        Ok(())
    }

    /// Unpacks a table. Others are packed or dropped for its memory when the next one is
    /// loaded, or at the end of the next pass.
    fn unpack(&self, table: &mut L2Table) {
        let packed = table.bytes();
        table.unpack();
        self.resident_bytes.fetch_add(table.bytes() - packed, Ordering::Relaxed);
    }

    fn set_l1_entry(&self, slot: &Slot, host: HostCluster, geometry: &Geometry) {
        slot.l1_entry
            .store(L1Entry { table: host, in_place: true }.encode(geometry), Ordering::Release);
    }

    /// Puts a table on the list of the next pass. The `dirty` lock makes the mark and the list
    /// change together: a thread that finds the mark set may return, and its old cluster may be
    /// freed, so the table must be on the list by then (P1, R3).
    fn queue(&self, table: &L2Table, l1_index: usize) {
        let mut dirty = self.dirty.lock();
        if !table.queued.swap(true, Ordering::AcqRel) {
            dirty.list.push(l1_index);
            if dirty.list.len() == 1 && !without(Step::FirstDirtyTableIsSignalled) {
                self.signal_dirty();
            }
        }
        for (_, changed) in &mut dirty.watched {
            changed.insert(l1_index);
        }
    }

    /// Starts to record which tables change, until [`Tables::end_watch`]. Returns the number of the
    /// watch.
    pub fn watch_changes(&self) -> u64 {
        let mut dirty = self.dirty.lock();
        dirty.watches += 1;
        let number = dirty.watches;
        dirty.watched.push((number, BTreeSet::new()));
        number
    }

    /// Returns the L1 indexes of tables that changed since the watch began or since the last call.
    pub fn take_changed(&self, watch: u64) -> BTreeSet<usize> {
        let mut dirty = self.dirty.lock();
        dirty
            .watched
            .iter_mut()
            .find(|(number, _)| *number == watch)
            .map(|(_, changed)| std::mem::take(changed))
            .unwrap_or_default()
    }

    /// Stops recording changes for this watch.
    pub fn end_watch(&self, watch: u64) {
        self.dirty.lock().watched.retain(|(number, _)| *number != watch);
    }

    fn account(&self, l1_index: usize, table: &L2Table) {
        self.resident_bytes.fetch_add(table.bytes(), Ordering::Relaxed);
        self.resident.lock().push_back(l1_index);
    }

    /// Reads one chunk of the L1 table of an image that is open for reading only.
    fn load_chunk(&self, l1_index: usize) -> Result<()> {
        let _loader = self.loaders[l1_index / CHUNK % LOADERS].lock();
        // A guest's request may wait for the lock.
        let _unmarked = Unmarked::new();
        let slots = self.slots.read();
        let chunk = &slots.chunks[l1_index / CHUNK];
        if chunk.slots.get().is_some() || chunk.is_empty.load(Ordering::Acquire) {
            return Ok(());
        }
        let entries = slots.in_chunk(l1_index);
        drop(slots);
        let (raw, _) = self.read_table("L1", self.l1_entry_offset(entries.start), entries.len())?;
        self.slots.read().chunks[l1_index / CHUNK].fill(&raw);
        Ok(())
    }

    /// Reads the words of a table up to the end of the file, and returns them with the CRC-32 of
    /// their bytes. Words beyond the end become [`OUTSIDE`].
    fn read_table(&self, which: &str, offset: u64, words: usize) -> Result<(Vec<u64>, u32)> {
        let inside = (self.storage.size().saturating_sub(offset) / 8).min(words as u64) as usize;
        let mut raw = vec![0; inside * 8];
        if !raw.is_empty() {
            self.storage
                .read_at(offset, &mut raw)
                .map_err(|error| Error::io(format!("{which} table at {offset:#x}"), error))?;
        }
        let mut table = Vec::with_capacity(words);
        table.extend(be_words(&raw));
        table.resize(words, OUTSIDE);
        Ok((table, crc32fast::hash(&raw)))
    }

    /// Reads the L2 table at a host offset in bytes, as [`Tables::read_table`] does.
    fn read_l2_table(&self, offset: u64, geometry: &Geometry) -> Result<(Vec<u64>, u32)> {
        let per_entry = geometry.l2_entry_words();
        let (mut words, sum) =
            self.read_table("L2", offset, geometry.l2_entries() as usize * per_entry)?;
        if per_entry > 1 {
            // An entry that lies only in part inside the file lies outside.
            for entry in words.chunks_exact_mut(per_entry).rev() {
                match entry.contains(&OUTSIDE) {
                    true => entry[0] = OUTSIDE,
                    false => break,
                }
            }
        }
        Ok((words, sum))
    }

    /// Loads a table into memory. The lock in `loaders` admits one thread per table, so that a
    /// stale copy never replaces a newer one.
    fn load(&self, l1_index: usize) -> Result<()> {
        let _loader =
            (!without(Step::OneLoaderPerTable)).then(|| self.loaders[l1_index % LOADERS].lock());
        // A guest's request may wait for the lock.
        let _unmarked = Unmarked::new();
        let (l1_entry, known) = {
            let slots = self.slots.read();
            let slot = slots.of_table(l1_index);
            if slot.table.read().is_some() {
                return Ok(());
            }
            // Changed only by a thread that has the lock in `loaders`.
            let known = slot.checked.load(Ordering::Relaxed);
            (slot.l1_entry.load(Ordering::Acquire), known)
        };
        let geometry = self.geometry();
        let of_l1 = |error: Error| error.context(format!("L1 table, index {l1_index}"));
        if l1_entry == OUTSIDE {
            return Err(of_l1(corrupt("the entry is outside the file".into())));
        }
        let Some(entry) =
            L1Entry::decode(l1_entry, &geometry).map_err(|error| of_l1(error.into()))?
        else {
            return Ok(());
        };
        let offset = geometry.host_offset(entry.table);
        if offset.0 >= self.storage.size() {
            return Err(of_l1(corrupt(format!("L2 table at {offset} is outside the file"))));
        }
        let (words, sum) = self.read_l2_table(offset.0, &geometry)?;
        let checked = IS_GOOD | u64::from(sum);
        let is_known = known == checked || known != 0 && without(Step::ReloadsAreCompared);
        let (judged, in_place) = match is_known {
            true => (None, entry.in_place),
            false => self.check(entry, &words, &geometry),
        };
        let is_good = judged.is_none() && in_place == entry.in_place;
        self.evict(MOST_LOOKS);
        let words = words.into_iter().map(AtomicU64::new).collect();
        let mut table = Box::new(L2Table::new(entry.table, in_place, words, judged, &geometry));
        table.pack(&geometry);
        self.account(l1_index, &table);
        let slots = self.slots.read();
        let slot = slots.of_table(l1_index);
        slot.checked.store(if is_good { checked } else { 0 }, Ordering::Relaxed);
        *slot.table.write() = Some(table);
        Ok(())
    }

    /// Checks a table as it was read from disk: its entries, and the COPIED bit of its L1 entry.
    /// Returns the bad entries, if any, and whether the table may be overwritten in place.
    fn check(
        &self,
        entry: L1Entry,
        words: &[u64],
        geometry: &Geometry,
    ) -> (Option<Box<Judged>>, bool) {
        let allocator = self.allocator.as_deref();
        let offset = geometry.host_offset(entry.table);
        let judged = judge(words, geometry, self.storage.size(), allocator);
        if let Some(why) = judged.as_ref().and_then(|judged| judged.first_bad()) {
            self.found_corruption(format!("L2 table at {offset}, {why}"));
        }
        let Some(allocator) = allocator.filter(|_| entry.in_place) else {
            return (judged, entry.in_place);
        };
        let in_place = match allocator.refcount(entry.table) {
            Ok(1) => true,
            Ok(_) => {
                self.found_corruption(format!(
                    "L2 table at {offset} is COPIED but its refcount is not one"
                ));
                false
            }
            // Without a readable refcount the table counts as shared: a write moves it to a new
            // cluster.
            Err(_) => false,
        };
        (judged, in_place)
    }

    /// Makes clean tables smaller while memory use is above the limit: packs them, oldest
    /// first, or drops those that are many runs; and drops packed ones if that was not
    /// enough. Looks at `most` tables. Does no I/O. See [`Tables::may_evict`] for
    /// write-back passes.
    fn evict(&self, most: usize) {
        let tables = self.resident.lock().len();
        self.shrink(tables.min(most), false);
        // Until all were looked at, some may be left that take more memory than packed ones.
        if tables <= most {
            self.shrink(tables, true);
        }
    }

    /// Looks at so many tables, oldest first, while memory use is above the limit. Packs
    /// clean ones or drops them; drops those that are packed only if `drops_packed`.
    fn shrink(&self, tables: usize, drops_packed: bool) {
        let geometry = self.geometry();
        let next = geometry.cluster_size() as usize;
        for _ in 0..tables {
            if self.resident_bytes.load(Ordering::Relaxed) + next <= self.memory
                || !self.may_evict()
            {
                return;
            }
            let Some(l1_index) = self.resident.lock().pop_front() else { return };
            let slots = self.slots.read();
            // Checked again under the write lock of the slot: a pass that starts now finds either
            // no table or a clean one.
            let mut stays = true;
            if let Some(mut slot) = slots.of_table(l1_index).table.try_write()
                && let Some(table) = slot.as_deref_mut()
                && (table.is_clean() || without(Step::DirtyTablesStay))
                && (drops_packed || !table.is_packed())
                && self.may_evict()
            {
                let bytes = table.bytes();
                stays = table.is_clean() && table.pack(&geometry);
                let left = if stays { table.bytes() } else { 0 };
                self.resident_bytes.fetch_sub(bytes - left, Ordering::Relaxed);
                if !stays {
                    *slot = None;
                }
            }
            drop(slots);
            if stays {
                self.resident.lock().push_back(l1_index);
            }
        }
    }

    /// Returns false during a write-back pass: a table that is dropped after the pass
    /// copied it and before the pass wrote it would be read back with its old content,
    /// and a table that is packed then would be dirty again if the pass fails.
    fn may_evict(&self) -> bool {
        without(Step::NoEvictionDuringPass) || !self.writing_back.load(Ordering::SeqCst)
    }

    /// Marks every dirty table clean and then copies its dirty pieces, for step 3 of the write-back
    /// pass. In this order, a change between the two marks the table dirty again. No table is
    /// evicted until [`Tables::written`] or [`Tables::not_written`].
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
            let l1_entry = table
                .l1_dirty
                .swap(false, Ordering::AcqRel)
                .then(|| slot.l1_entry.load(Ordering::Acquire));
            let start = geometry.host_offset(table.host).0;
            let pieces = table.take_dirty(start);
            writes.push(TableWrite { l1_index, pieces, l1_entry });
        }
        writes
    }

    /// Ends a pass after everything that [`Tables::take_dirty`] returned is on disk.
    pub fn written(&self) {
        self.writing_back.store(false, Ordering::SeqCst);
        // Tables that were dirty can be packed or dropped now, and changes have unpacked others.
        self.evict(usize::MAX);
    }

    /// Ends a pass that failed and marks everything that it took dirty again.
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

    /// Makes the channel of [`Tables::became_dirty`] yield.
    pub fn signal_dirty(&self) {
        // The channel is full if the signal before this one was not taken yet.
        let _ = self.became_dirty.0.try_send(());
    }

    /// Returns a channel that yields after a table was put on the empty list of the next pass, and
    /// after [`Tables::signal_dirty`].
    pub fn became_dirty(&self) -> Receiver<()> {
        self.became_dirty.1.clone()
    }

    /// Returns whether a pass would have work.
    pub fn is_dirty(&self) -> bool {
        !self.dirty.lock().list.is_empty()
    }

    /// Returns the size, in bytes, of the tables that wait for a pass.
    pub fn dirty_bytes(&self) -> usize {
        self.dirty.lock().list.len() * self.geometry.cluster_size() as usize
    }

    /// Returns the host offset of an L1 entry, in bytes.
    pub fn l1_entry_offset(&self, l1_index: usize) -> u64 {
        self.l1_offset.load(Ordering::Acquire) + l1_index as u64 * 8
    }

    #[cfg(any(test, feature = "testing"))]
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

    /// Returns the memory that the resident tables are counted with, after it was
    /// compared with what they take.
    #[cfg(test)]
    pub fn resident_bytes(&self) -> usize {
        let counted = self.resident_bytes.load(Ordering::Relaxed);
        let resident = self.resident.lock().clone();
        let slots = self.slots.read();
        let bytes = |&index: &usize| slots.of_table(index).table.read().as_deref().unwrap().bytes();
        assert_eq!(counted, resident.iter().map(bytes).sum::<usize>());
        counted
    }

    /// Returns how many chunks of the L1 table are in memory.
    #[cfg(test)]
    pub fn chunks(&self) -> usize {
        self.slots.read().chunks.iter().filter(|chunk| chunk.slots.get().is_some()).count()
    }

    /// Returns the number of L1 entries.
    pub fn l1_len(&self) -> usize {
        self.slots.read().len
    }

    /// Returns the L1 table as it must be on disk. Entries that are not in memory are 0: no L2
    /// table exists for them.
    pub fn l1_bytes(&self) -> Vec<u8> {
        let slots = self.slots.read();
        let entry =
            |index| slots.get(index).map_or(0, |slot| slot.l1_entry.load(Ordering::Acquire));
        (0..slots.len).flat_map(|index| entry(index).to_be_bytes()).collect()
    }

    /// Switches to an L1 table of `len` entries at host offset `offset` (bytes). The caller holds
    /// an exclusive guard of the whole disk and has flushed.
    pub fn move_l1(&self, len: usize, offset: u64) {
        let mut slots = self.slots.write();
        slots.len = len;
        slots.chunks.resize_with(len.div_ceil(CHUNK), || L1Chunk::of(&[]));
        drop(slots);
        self.l1_offset.store(offset, Ordering::Release);
    }

    /// Switches to another virtual size, in bytes. The caller holds an exclusive guard of the whole
    /// disk; the L1 table is large enough.
    pub fn set_size(&self, size: u64) {
        self.size.store(size, Ordering::Release);
    }
}

pub(super) fn corrupt(text: String) -> Error {
    Error::new(ErrorKind::Corrupt, text)
}
