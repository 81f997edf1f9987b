//! The write-back pass: the ordered flush, and nothing but it.
//!
//! ```text
//! 1 one pass at a time        2 take the pending frees     3 take dirty L2 tables     4 THEN take dirty refcounts
//!   (between 2 and 3: a header write that failed and may have been done is undone, durably: R11)
//! 5 write refcounts (new blocks, barrier, the entries or the moved table that names them; for that one barrier, header: R5, R6)
//! 6 barrier: refcounts, and every byte of data written before any publish of step 3, are durable (R1, R2)
//! 7 write L2 tables           8 tables that the L1 table does not name yet: barrier, write their L1 entries (R4)
//! 9 barrier: from here on a crash finds the new mapping
//! 10 lower the refcounts of (2); they become allocatable now, and their blocks are dirty for the next pass (R3, R7)
//! ```
//! 3 before 4: whatever a copied table points to had its refcount raised before it was published, so the later copy of the refcounts holds it.
//! 2 before 3: an entry is changed before its free is queued, so the copied table no longer holds what (2) frees.
//! A crash at any point leaves leaks at worst. A torn table write is harmless: entries are eight aligned bytes, old or new, both legal.

use super::Image;
use crate::format::patch;
use crate::mutants::{Step, without};
use crate::storage::WriteKind;
use crate::sync::atomic::{AtomicU64, Ordering};
use crate::sync::unranked::{Condvar, Mutex};
use crate::{Error, ErrorKind, Result};

/// What a disk writes whole or not at all, bytes.
const SECTOR: u64 = 512;

/// Concurrent flushes share a pass: each waits for one that began after it came.
#[derive(Debug, Default)]
pub(super) struct GroupCommit {
    state: Mutex<Passes>,
    ended: Condvar,
    /// Passes that have written something, successfully.
    commits: AtomicU64,
}

#[derive(Debug, Default)]
struct Passes {
    begun: u64,
    running: bool,
    ended: u64,
    /// How the last one ended: errno or none, and the text.
    failure: Option<(ErrorKind, Option<i32>, String)>,
}

impl Image {
    /// Makes every change that was complete before the call durable.
    ///
    /// # Errors
    /// I/O and [`ErrorKind::NoSpace`]: what was not written stays dirty and is tried again by the next flush. After a failed barrier every
    /// later flush fails (P7).
    pub fn flush(&self) -> Result<()> {
        let mut passes = self.commit.state.lock();
        // A pass that runs already may have taken its copies before our last change.
        let wanted = passes.begun + u64::from(!without(Step::FlushWaitsForNextPass));
        loop {
            if passes.ended >= wanted {
                return match &passes.failure {
                    None => Ok(()),
                    Some((kind, None, text)) => Err(Error::new(*kind, text.clone())),
                    Some((_, Some(errno), text)) => Err(Error::io(text.clone(), std::io::Error::from_raw_os_error(*errno))),
                };
            }
            if passes.running && !without(Step::OnePassAtATime) {
                self.commit.ended.wait(&mut passes);
                continue;
            }
            passes.begun += 1;
            passes.running = true;
            let this = passes.begun;
            drop(passes);
            let result = self.write_back_pass();
            passes = self.commit.state.lock();
            passes.running = false;
            passes.ended = this;
            passes.failure = result.as_ref().err().map(|error| (error.kind(), error.errno(), format!("flush: {error}")));
            self.commit.ended.notify_all();
            return result;
        }
    }

    /// Flushes if any metadata waits to be written back: for the commit timer, so that what is only in memory does not grow old (P2).
    ///
    /// # Errors
    /// As [`Image::flush`].
    pub fn flush_if_dirty(&self) -> Result<()> {
        if self.is_dirty() { self.flush() } else { Ok(()) }
    }

    /// Flushes until nothing is left to write: also the refcounts that the last pass lowered. No cluster is leaked after that.
    ///
    /// # Errors
    /// As [`Image::flush`].
    pub fn close(&self) -> Result<()> {
        // What was acknowledged is written back whether the rest can be given up or not.
        let given_up = self.allocator.give_up_reserved();
        self.flush()?;
        while self.is_dirty() {
            if self.unreleased.load(Ordering::Relaxed) {
                return Err(Error::new(ErrorKind::Io, "a refcount block cannot be read: what was freed stays leaked until the next open"));
            }
            self.flush()?;
        }
        given_up
    }

    pub(super) fn is_dirty(&self) -> bool {
        self.reader.tables.is_dirty() || self.allocator.is_dirty() || self.header_change.lock().is_some()
    }

    /// How many passes have written something since the image was opened.
    pub fn commits(&self) -> u64 {
        self.commit.commits.load(Ordering::Relaxed)
    }

    fn write_back_pass(&self) -> Result<()> {
        let _one_at_a_time = (!without(Step::OnePassAtATime)).then(|| self.write_back.lock());
        self.check_usable()?;
        self.uncommitted.store(0, Ordering::Relaxed);
        // The frees first: what a header write that fails from now on would have led to is not among them. Then the header, before a table is
        // written that only the old one leads to, and before what only the new one would lead to is freed.
        let mut frees = self.allocator.take_pending();
        if let Err(error) = self.put_header_back(&mut self.header_change.lock()) {
            self.allocator.requeue(frees);
            return Err(error);
        }
        let early = without(Step::TablesBeforeRefcounts).then(|| self.allocator.take_dirty());
        let tables = self.reader.tables.take_dirty();
        let mut refcounts = early.unwrap_or_else(|| self.allocator.take_dirty());
        if without(Step::FreesBeforeTables) {
            self.allocator.take_pending().into_iter().for_each(|(cluster, references)| *frees.entry(cluster).or_default() += references);
        }
        let has_work = !tables.is_empty() || !refcounts.pieces.is_empty() || !refcounts.entries.is_empty() || refcounts.table.is_some();
        let write = || -> Result<()> {
            self.write_all(WriteKind::RefcountBlock, &refcounts.pieces)?;
            if let Some(table) = &refcounts.table {
                // Behind its blocks: where an earlier pass failed after it had changed the header, this table is the live one.
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
                let entries: Vec<_> = refcounts.entries.iter().map(|(at, entry)| (*at, entry.to_be_bytes())).collect();
                // A block may lie in a cluster that another new block counts, whose entry comes before its own: in the same sector, or in one that
                // is durable first (R2).
                for (index, sector) in entries.chunk_by(|(a, _), (b, _)| a / SECTOR == b / SECTOR).enumerate() {
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
                .filter_map(|table| table.l1_entry.map(|entry| (self.reader.tables.l1_entry_offset(table.l1_index), entry.to_be_bytes())))
                .collect();
            if !l1.is_empty() {
                self.barrier(Step::BarrierBeforeL1)?;
                self.write_all(WriteKind::L1Table, &l1)?;
            }
            self.barrier(Step::BarrierBeforeFrees)
        };
        match write() {
            Ok(()) => {
                self.commit.commits.fetch_add(u64::from(has_work), Ordering::Relaxed);
                self.reader.tables.written();
                if let Some(table) = refcounts.table.take() {
                    for cluster in table.old.iter().flat_map(|&(old, clusters)| old.0..old.0 + clusters) {
                        *frees.entry(cluster).or_default() += 1;
                    }
                }
                let released = self.allocator.release(&mut frees);
                // What was not lowered, though durably unreferenced, is not forgotten.
                self.allocator.requeue(frees);
                match self.watch(released) {
                    // A refcount block could not be read. Everything is durable all the same, so the guest's flush has gone well (P6).
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

    fn write_all(&self, kind: WriteKind, writes: &[(u64, impl AsRef<[u8]>)]) -> Result<()> {
        for (at, bytes) in writes {
            self.reader.storage.write_at(kind, *at, bytes.as_ref()).map_err(|error| Error::io(format!("{kind} at {at:#x}"), error))?;
        }
        Ok(())
    }
}
