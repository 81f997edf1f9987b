//! A larger virtual size: an L1 table with more entries, then the size, each switched by one small header write. Between the two the caller
//! makes sure of what the new range reads as.

use super::Image;
use crate::format::{HostCluster, patch};
use crate::range_lock::Exclusive;
use crate::storage::WriteKind;
use crate::{Error, ErrorKind, Result};

/// Largest L1 table, bytes (V11; QEMU: QCOW_MAX_L1_SIZE).
const MAX_L1_BYTES: u64 = 32 << 20;

impl Image {
    /// Makes the L1 table, durably, large enough for a virtual size of `size` bytes. The virtual size stays; clusters beyond it may be published
    /// and zeroed from now on.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidArgument`] for a smaller size, one that is no multiple of 512, or one beyond what an L1 table can map; I/O.
    ///
    /// # Panics
    /// If `drained` does not cover the whole disk.
    pub fn make_room(&self, drained: &Exclusive<'_>, size: u64) -> Result<()> {
        assert!(drained.covers(&(0..u64::MAX)), "growing needs the whole disk");
        let geometry = self.reader.geometry();
        let invalid = |what: &str| Error::new(ErrorKind::InvalidArgument, format!("new size {size}: {what}"));
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
        // Everything that the new table will name is on disk, and named by the old one.
        self.close()?;
        let clusters = (entries * 8).div_ceil(geometry.cluster_size());
        let start = self.watch(self.allocator.allocate_contiguous(clusters))?;
        let offset = geometry.host_offset(start).0;
        let mut bytes = self.reader.tables.l1_bytes();
        bytes.resize((clusters * geometry.cluster_size()) as usize, 0);
        let written = self.reader.storage.write_at(WriteKind::L1Table, offset, &bytes).map_err(|error| Error::io("new L1 table", error));
        // Its refcounts, then (change_header) the pointer to it.
        if let Err(error) = written.and_then(|()| self.flush()) {
            // Nothing names it.
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
            // The pass that frees it has put the old header back before.
            self.allocator.queue_free(start, clusters);
            return Err(error);
        }
        self.reader.tables.move_l1(entries as usize, offset);
        if old.l1_size > 0 {
            let clusters = (u64::from(old.l1_size) * 8).div_ceil(geometry.cluster_size());
            self.allocator.queue_free(HostCluster(old.l1_table_offset >> geometry.cluster_bits()), clusters);
        }
        Ok(())
    }

    /// Makes `size` bytes the virtual size, durably and after everything that was published before.
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
