//! Growing the virtual size: first a larger L1 table, then the new size, each switched by one small
//! header write. Between the two, the caller makes the new range read as it must.

use std::ops::Range;

use super::Image;
use crate::format::{GuestCluster, HostCluster, L2Entry, patch};
use crate::range_lock::Exclusive;
use host::storage::WriteKind;
use host::{Error, ErrorKind, Result};

/// Largest L1 table, in bytes (V11; QEMU: QCOW_MAX_L1_SIZE).
const MAX_L1_BYTES: u64 = 32 << 20;

impl Image {
    /// Makes the L1 table, durably, large enough for a virtual size of `size` bytes. The virtual
    /// size stays. Clusters beyond it may be published and zeroed from now on.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidArgument`] for a size that is smaller, is no multiple of 512, or is
    /// beyond what an L1 table can map; I/O.
    ///
    /// # Panics
    /// If `drained` does not cover the whole disk.
    pub fn make_room(&self, drained: &Exclusive<'_>, size: u64) -> Result<()> {
        assert!(drained.covers(&(0..u64::MAX)), "growing needs the whole disk");
        let geometry = self.reader.geometry();
        let invalid =
            |what: &str| Error::new(ErrorKind::InvalidArgument, format!("new size {size}: {what}"));
        if size < geometry.size() {
            return Err(invalid("shrinking is not supported"));
        }
        if !size.is_multiple_of(512) {
            return Err(invalid("must be a multiple of 512"));
        }
        let entries = geometry.resized(size)?.l1_entries_needed();
        if entries * 8 > MAX_L1_BYTES {
            return Err(invalid("too large for the cluster size"));
        }
        if entries <= self.reader.tables.l1_len() as u64 {
            return Ok(());
        }
        // After this, every table that the new L1 table will name is on disk and named by the old
        // one.
        self.close()?;
        let clusters = (entries * 8).div_ceil(geometry.cluster_size());
        let start = self.watch(self.allocator.allocate_contiguous(clusters))?;
        let offset = geometry.host_offset(start).0;
        let mut bytes = self.reader.tables.l1_bytes();
        bytes.resize((clusters * geometry.cluster_size()) as usize, 0);
        let written = self
            .storage
            .write_at(WriteKind::L1Table, offset, &bytes)
            .map_err(|error| Error::io("new L1 table", error));
        // The flush makes the refcounts of the new table durable; `change_header` then names the
        // table.
        if let Err(error) = written.and_then(|()| self.flush()) {
            // The header does not name the new table.
            self.allocator.queue_free(start, clusters);
            return Err(error);
        }
        let old = self.reader.header();
        let changed = self.change_header(|header| {
            header.l1_size = entries as u32;
            header.l1_table_offset = offset;
            let (at, bytes) = patch::size_and_l1(header.geometry.size(), header.l1_size, offset);
            (at, bytes.to_vec())
        });
        if let Err(error) = changed {
            // The header on disk may name the new table. The pass that frees the clusters restores
            // the old header first.
            self.allocator.queue_free(start, clusters);
            return Err(error);
        }
        self.reader.tables.move_l1(entries as usize, offset);
        if old.l1_size > 0 {
            let clusters = (u64::from(old.l1_size) * 8).div_ceil(geometry.cluster_size());
            self.allocator
                .queue_free(HostCluster(old.l1_table_offset >> geometry.cluster_bits()), clusters);
        }
        Ok(())
    }

    /// Returns the first run of clusters in a range beyond the end of the disk that an L2 table
    /// maps to a host cluster, inside one table. There should be none, but another program
    /// may have left some, which no check reports as an error. The L1 table already covers the
    /// range.
    ///
    /// # Errors
    /// If an L2 table cannot be loaded.
    pub fn first_mapped(
        &self,
        clusters: Range<GuestCluster>,
    ) -> Result<Option<Range<GuestCluster>>> {
        let geometry = self.reader.geometry();
        let mut at = clusters.start;
        while at < clusters.end {
            let (l1_index, l2_index) = geometry.table_indexes(at);
            let count =
                (clusters.end.0 - at.0).min(geometry.l2_entries() - l2_index as u64) as usize;
            let found = self.watch(self.reader.tables.with(l1_index, |table| -> Result<_> {
                let shows = |index: usize| -> Result<bool> {
                    let entry = table.entry(l2_index + index, &geometry)?;
                    Ok(!matches!(entry, L2Entry::Standard { host: None, .. }))
                };
                let mut first = 0;
                while first < count && !shows(first)? {
                    first += 1;
                }
                let mut end = first;
                while end < count && shows(end)? {
                    end += 1;
                }
                Ok(first as u64..end as u64)
            }))?;
            match self.watch(found.transpose())? {
                Some(run) if !run.is_empty() => {
                    return Ok(Some(GuestCluster(at.0 + run.start)..GuestCluster(at.0 + run.end)));
                }
                _ => at.0 += count as u64,
            }
        }
        Ok(None)
    }

    /// Sets the virtual size to `size` bytes, durably and after everything that was published
    /// before.
    ///
    /// # Errors
    /// As [`Image::flush`].
    ///
    /// # Panics
    /// If `drained` does not cover the whole disk.
    pub fn set_size(&self, drained: &Exclusive<'_>, size: u64) -> Result<()> {
        assert!(drained.covers(&(0..u64::MAX)), "growing needs the whole disk");
        let after = self.reader.geometry().resized(size)?;
        self.flush()?;
        self.change_header(|header| {
            header.geometry = after;
            let (at, bytes) = patch::size_and_l1(size, header.l1_size, header.l1_table_offset);
            (at, bytes.to_vec())
        })?;
        self.reader.tables.set_size(size);
        Ok(())
    }
}
