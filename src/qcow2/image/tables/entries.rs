//! Reads the entries of L2 tables for the late search for leaks, without loading the tables: those
//! that the guest uses stay in memory, and what is wrong with an entry that no request uses is not
//! held against the guest.

use std::ops::Range;

use super::{LOADERS, Tables};
use crate::format::{L1Entry, L2Entry, RawL2Entry, raw_entries};
use crate::image::judge::referenced;
use crate::image::slots::CHUNK;
use host::sync::atomic::Ordering;
use host::{Error, Result};

impl Tables {
    /// Returns the L1 index of the first L2 table from this index on.
    pub fn next_table(&self, from: usize) -> Option<usize> {
        let mut at = from;
        loop {
            // Held for one chunk at a time: the array is written when the disk grows.
            let slots = self.slots.read();
            if at >= slots.len {
                return None;
            }
            let end = slots.in_chunk(at).end;
            let has_table = |&index: &usize| {
                slots.get(index).is_some_and(|slot| slot.l1_entry.load(Ordering::Acquire) != 0)
            };
            match slots.chunks[at / CHUNK].slots.get().and_then(|_| (at..end).find(has_table)) {
                Some(found) => return Some(found),
                None => at = end,
            }
        }
    }

    /// Calls `f` with the host clusters that each entry of an L2 table names, and whether the entry
    /// allows them a refcount of one: it says COPIED, or is that of compressed data. Each entry is
    /// as it was at some moment of the call.
    ///
    /// # Errors
    /// [`host::ErrorKind::Corrupt`] for a bad entry; I/O; those of `f`.
    pub fn each_reference(
        &self,
        l1_index: usize,
        mut f: impl FnMut(Range<u64>, bool) -> Result<()>,
    ) -> Result<()> {
        let geometry = self.geometry();
        let entries = self.entries_of(l1_index)?;
        // Taken after the entries: the file has grown before a request stores an entry that names
        // a cluster at the new end.
        let size = self.storage.size();
        for (index, raw) in entries.into_iter().enumerate() {
            let mut reference = || -> Result<()> {
                let (clusters, in_place) = referenced(raw, &geometry, size)?;
                let is_compressed =
                    matches!(L2Entry::decode(raw, &geometry)?, L2Entry::Compressed { .. });
                f(clusters, in_place || is_compressed)
            };
            reference().map_err(|error| {
                error.context(format!("L2 table of L1 index {l1_index}, index {index}"))
            })?;
        }
        Ok(())
    }

    /// Returns the entries of a table: those in memory if the table is there, and those on disk
    /// otherwise, which are the same until the table is loaded. A thread that loads the table or
    /// gives it another cluster waits for the lock in `loaders`.
    fn entries_of(&self, l1_index: usize) -> Result<Vec<RawL2Entry>> {
        let geometry = self.geometry();
        let count = geometry.l2_entries() as usize;
        let _loader = self.loaders[l1_index % LOADERS].lock();
        let l1_entry = {
            let slots = self.slots.read();
            let Some(slot) = slots.get(l1_index) else { return Ok(Vec::new()) };
            if let Some(table) = slot.table.read().as_deref() {
                return Ok((0..count).map(|index| table.raw(index)).collect());
            }
            slot.l1_entry.load(Ordering::Acquire)
        };
        let entry = L1Entry::decode(l1_entry, &geometry).map_err(Error::from)?;
        let Some(entry) = entry else { return Ok(Vec::new()) };
        let (words, _) = self.read_l2_table(geometry.host_offset(entry.table).0, &geometry)?;
        Ok(raw_entries(&words, &geometry).collect())
    }
}
