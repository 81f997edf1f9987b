//! The write-back pass: the ordered flush of data and metadata.
//!
//! ```text
//!  1 one pass at a time
//!  2 take the pending frees
//!    (here a header write that failed and may be on disk is undone, durably: R11)
//!  3 take dirty L2 tables
//!  4 THEN take dirty refcounts
//!  5 write refcounts: new blocks, barrier, the entries that name them (R5)
//!    or, if the table moved: blocks, barrier, new table, barrier, header (R6)
//!  6 barrier: refcounts, and all data written before any publish of step 3, are durable (R1, R2)
//!  7 write L2 tables
//!  8 for tables that the L1 table does not name yet: barrier, write their L1 entries (R4)
//!  9 barrier: from here on, the new mapping survives a crash
//!    (here the journal is cut, if there is one: what it told before step 3 is durable)
//! 10 lower the refcounts of the frees of step 2: these clusters become allocatable now, and
//!    their refcount blocks are dirty for the next pass (R3, R7)
//! ```
//! Step 3 comes before step 4: a cluster that a copied table names had its refcount raised before
//! it was published, so the later copy of the refcounts contains it. Step 2 comes before step 3: an
//! entry is changed before its old cluster is queued as a free, so the copied table no longer names
//! the clusters of step 2. A crash at any point causes leaks at worst. A torn table write is
//! harmless: an entry, of 8 or 16 aligned bytes, lies in one sector, which a disk writes as a
//! whole, and in one page, which the host's page cache copies from resident memory as a whole. Each
//! entry on disk is old or new, both of which are valid.

use super::Image;
use crate::format::patch;
use crate::journal::Journal;
use host::mutants::{Step, without};
use host::storage::WriteKind;
use host::sync::atomic::{AtomicU64, Ordering};
use host::sync::unranked::{Condvar, Mutex};
use host::{Error, ErrorKind, Result};

/// Bytes that a disk writes atomically: one sector.
const SECTOR: u64 = 512;

/// Lets concurrent flushes share a pass: each flush waits for a pass that began after the flush was
/// called.
#[derive(Debug, Default)]
pub(super) struct GroupCommit {
    state: Mutex<Passes>,
    ended: Condvar,
    /// Number of passes that succeeded and wrote something.
    commits: AtomicU64,
}

#[derive(Debug, Default)]
struct Passes {
    begun: u64,
    running: bool,
    ended: u64,
    /// Error of the last pass: kind, errno if there is one, and text. `None` after success.
    failure: Option<(ErrorKind, Option<i32>, String)>,
}

/// The running pass with this number. A pass that panics took its copies out of the tables and the
/// refcounts, so what is dirty is not known any more. Dropping the value unended therefore latches
/// the image, and fails the flushes that wait for the pass: they would wait for ever otherwise.
/// (The program ends at a panic; a program that uses this crate may go on.)
struct RunningPass<'a> {
    image: &'a Image,
    number: u64,
    has_ended: bool,
}

impl RunningPass<'_> {
    fn end(mut self, result: &Result<()>) {
        let failure = result.as_ref().err();
        self.record(failure.map(|error| (error.kind(), error.errno(), format!("flush: {error}"))));
    }

    fn record(&mut self, failure: Option<(ErrorKind, Option<i32>, String)>) {
        let mut passes = self.image.commit.state.lock();
        passes.running = false;
        passes.ended = self.number;
        passes.failure = failure;
        self.has_ended = true;
        self.image.commit.ended.notify_all();
    }
}

impl Drop for RunningPass<'_> {
    fn drop(&mut self) {
        if !self.has_ended {
            self.image.latch();
            self.record(Some((ErrorKind::Io, None, "flush: the pass has panicked".into())));
        }
    }
}

impl Image {
    /// Makes every change that was complete before the call durable.
    ///
    /// # Errors
    /// I/O and [`ErrorKind::NoSpace`]: data that was not written stays dirty, and the next flush
    /// writes it again. After a failed barrier every later flush fails (P7).
    pub fn flush(&self) -> Result<()> {
        let mut passes = self.commit.state.lock();
        // A pass that is already running may have taken its copies before the last change of this
        // caller.
        let wanted = passes.begun + u64::from(!without(Step::FlushWaitsForNextPass));
        loop {
            if passes.ended >= wanted {
                return match &passes.failure {
                    None => Ok(()),
                    Some((kind, None, text)) => Err(Error::new(*kind, text.clone())),
                    Some((_, Some(errno), text)) => {
                        Err(Error::io(text.clone(), std::io::Error::from_raw_os_error(*errno)))
                    }
                };
            }
            if passes.running && !without(Step::OnePassAtATime) {
                self.commit.ended.wait(&mut passes);
                continue;
            }
            passes.begun += 1;
            passes.running = true;
            let pass = RunningPass { image: self, number: passes.begun, has_ended: false };
            drop(passes);
            let unwritten = self.unwritten.swap(0, Ordering::Relaxed);
            let result = self.write_back_pass();
            if result.is_err() {
                self.unwritten.fetch_add(unwritten, Ordering::Relaxed);
            }
            // The pass may have lowered refcounts, or put back what it could not write.
            if self.is_dirty() {
                self.reader.tables.signal_dirty();
            }
            pass.end(&result);
            return result;
        }
    }

    /// Flushes if any metadata is dirty. The commit timer calls this, so that changes stay in
    /// memory for a bounded time only (P2).
    ///
    /// # Errors
    /// As [`Image::flush`].
    pub fn flush_if_dirty(&self) -> Result<()> {
        if self.is_dirty() { self.flush() } else { Ok(()) }
    }

    /// Flushes until nothing is dirty, including the refcounts that the last pass
    /// lowered, and frees the blocks of the host that were allocated ahead. No cluster is
    /// leaked after success. The caller has ended all requests.
    ///
    /// # Errors
    /// As [`Image::flush`].
    pub fn close(&self) -> Result<()> {
        // An error here is returned last: acknowledged writes must be flushed in any case.
        let given_up = self.allocator.give_up_reserved();
        self.flush()?;
        while self.is_dirty() {
            if self.unreleased.load(Ordering::Relaxed) {
                return Err(Error::new(
                    ErrorKind::Io,
                    "a refcount block cannot be read: what was freed stays leaked until the next open",
                ));
            }
            self.flush()?;
        }
        self.storage.free_unused_blocks();
        given_up
    }

    /// Returns whether metadata is dirty that no running pass has taken.
    pub fn is_dirty(&self) -> bool {
        self.reader.tables.is_dirty()
            || self.allocator.is_dirty()
            || self.header_change.lock().is_some()
    }

    /// Returns how many passes have written something since the image was opened.
    pub fn commits(&self) -> u64 {
        self.commit.commits.load(Ordering::Relaxed)
    }

    fn write_back_pass(&self) -> Result<()> {
        let _one_at_a_time = (!without(Step::OnePassAtATime)).then(|| self.write_back.lock());
        self.check_usable()?;
        self.uncommitted.store(0, Ordering::Relaxed);
        // The frees are taken before the header is restored. A header write that fails after this
        // point names clusters that are queued later, so they are not among these frees. The header
        // is restored before a table is written that only the old header leads to, and before
        // clusters are freed that only the new header would name.
        let mut frees = self.allocator.take_pending();
        if let Err(error) = self.put_header_back(&mut self.header_change.lock()) {
            self.allocator.requeue(frees);
            return Err(error);
        }
        // What is in the journal now is in the tables that step 3 takes. A record that names a
        // cluster was written before the cluster was queued as a free, so the records of the frees
        // of step 2 are among these: none outlives its cluster.
        let journaled = self.journal.as_deref().map(Journal::position);
        if without(Step::JournalIsCutAfterPass) {
            self.cut_journal(journaled)?;
        }
        let early = without(Step::TablesBeforeRefcounts).then(|| self.allocator.take_dirty());
        let tables = self.reader.tables.take_dirty();
        let mut refcounts = early.unwrap_or_else(|| self.allocator.take_dirty());
        if without(Step::FreesBeforeTables) {
            self.allocator
                .take_pending()
                .into_iter()
                .for_each(|(cluster, references)| *frees.entry(cluster).or_default() += references);
        }
        let has_work = !tables.is_empty()
            || !refcounts.pieces.is_empty()
            || !refcounts.entries.is_empty()
            || refcounts.table.is_some();
        let write = || -> Result<()> {
            self.write_all(WriteKind::RefcountBlock, &refcounts.pieces)?;
            if let Some(table) = &refcounts.table {
                // The blocks must be durable before this table is written: if an earlier pass
                // failed after it had changed the header, this table is already the live one.
                self.barrier(Step::BarrierBeforeRefcountTable)?;
                self.write_all(WriteKind::RefcountTable, &[(table.offset, &table.bytes)])?;
                self.barrier(Step::BarrierBeforeTableSwitch)?;
                self.change_header(|header| {
                    header.refcount_table_offset = table.offset;
                    header.refcount_table_clusters = table.clusters;
                    let (at, bytes) = patch::refcount_table(table.offset, table.clusters);
                    (at, bytes.to_vec())
                })?;
            } else if !refcounts.entries.is_empty() {
                self.barrier(Step::BarrierBeforeRefcountEntry)?;
                let entries: Vec<_> = refcounts
                    .entries
                    .iter()
                    .map(|(at, entry)| (*at, entry.to_be_bytes()))
                    .collect();
                // A new block may lie in a cluster that another new block counts. The entry of the
                // counting block must be written first: in the same sector, or in a sector that is
                // durable before (R2).
                for (index, sector) in
                    entries.chunk_by(|(a, _), (b, _)| a / SECTOR == b / SECTOR).enumerate()
                {
                    if index > 0 {
                        self.barrier(Step::BarrierBetweenRefcountEntries)?;
                    }
                    self.write_all(WriteKind::RefcountTable, sector)?;
                }
            }
            self.barrier(Step::BarrierBeforeL2)?;
            if tables.is_empty() {
                return Ok(());
            }
            for table in &tables {
                self.write_all(WriteKind::L2Table, &table.pieces)?;
            }
            let l1: Vec<_> = tables
                .iter()
                .filter_map(|table| {
                    table.l1_entry.map(|entry| {
                        (self.reader.tables.l1_entry_offset(table.l1_index), entry.to_be_bytes())
                    })
                })
                .collect();
            if !l1.is_empty() {
                self.barrier(Step::BarrierBeforeL1)?;
                self.write_all(WriteKind::L1Table, &l1)?;
            }
            self.barrier(Step::BarrierBeforeFrees)
        };
        let written = write().and_then(|()| self.cut_journal(journaled));
        match written {
            Ok(()) => {
                self.commit.commits.fetch_add(u64::from(has_work), Ordering::Relaxed);
                self.reader.tables.written();
                if let Some(table) = refcounts.table.take() {
                    for cluster in
                        table.old.iter().flat_map(|&(old, clusters)| old.0..old.0 + clusters)
                    {
                        *frees.entry(cluster).or_default() += 1;
                    }
                }
                let released = self.allocator.release(&mut frees);
                // Clusters whose refcounts could not be lowered stay queued, although the removals
                // are durable.
                self.allocator.requeue(frees);
                match self.watch(released) {
                    // A refcount block could not be read. All changes are durable in any case, so
                    // the guest's flush succeeds (P6).
                    Err(error) if error.kind() != ErrorKind::Corrupt => {
                        if !self.unreleased.swap(true, Ordering::Relaxed) {
                            log::warn!("freed clusters cannot be reused for now: {error}");
                        }
                        Ok(())
                    }
                    released => {
                        self.unreleased.store(false, Ordering::Relaxed);
                        released
                    }
                }
            }
            Err(error) => {
                self.reader.tables.not_written(&tables);
                if !without(Step::FailedRefcountsStayDirty) {
                    self.allocator.not_written(refcounts);
                }
                if !without(Step::FailedFreesStayQueued) {
                    self.allocator.requeue(frees);
                }
                Err(error)
            }
        }
    }

    /// Drops from the journal what a pass that began at `position` has made durable. This is done
    /// before step 10: a record that names a cluster must not outlive the cluster.
    fn cut_journal(&self, position: Option<u64>) -> Result<()> {
        match (self.journal.as_deref(), position) {
            (Some(journal), Some(position)) => {
                journal.cut(position).map_err(|error| self.lose_journal(error))
            }
            _ => Ok(()),
        }
    }

    fn write_all(&self, kind: WriteKind, writes: &[(u64, impl AsRef<[u8]>)]) -> Result<()> {
        for (at, bytes) in writes {
            self.storage
                .write_at(kind, *at, bytes.as_ref())
                .map_err(|error| Error::io(format!("{kind} at {at:#x}"), error))?;
        }
        Ok(())
    }
}
