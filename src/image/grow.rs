//! A larger virtual size: an L1 table with more entries, switched by one small header write.

use super::Image;
use crate::format::{HostCluster, patch};
use crate::range_lock::Exclusive;
use crate::{Error, ErrorKind, Result};

/// Largest L1 table, bytes (V11; QEMU: QCOW_MAX_L1_SIZE).
const MAX_L1_BYTES: u64 = 32 << 20;

impl Image {
    /// Grows the virtual size to `size` bytes, durably. New clusters are unallocated: the caller zeroes those below which a backing file lies.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidArgument`] for a smaller size, one that is no multiple of 512, or one beyond what an L1 table can map; I/O.
    ///
    /// # Panics
    /// If `drained` does not cover the whole disk.
    pub fn grow(&self, drained: &Exclusive<'_>, size: u64) -> Result<()> {
        assert!(drained.covers(&(0..u64::MAX)), "growing needs the whole disk");
        let before = self.reader.geometry();
        let invalid = |what: &str| Error::new(ErrorKind::InvalidArgument, format!("new size {size}: {what}"));
        if size < before.size() {
            return Err(invalid("shrinking is not supported"));
        }
        if !size.is_multiple_of(512) {
            return Err(invalid("must be a multiple of 512"));
        }
        let after = before.resized(size)?;
        let entries = after.l1_entries_needed().max(self.reader.tables.l1_len() as u64);
        if entries * 8 > MAX_L1_BYTES {
            return Err(invalid("too large for the cluster size"));
        }
        // Everything that the new table will name is on disk, and named by the old one.
        self.close()?;
        let old = self.reader.header();
        let moves = entries > u64::from(old.l1_size);
        let mut offset = old.l1_table_offset;
        if moves {
            let clusters = (entries * 8).div_ceil(after.cluster_size());
            offset = after.host_offset(self.watch(self.allocator.allocate_contiguous(clusters))?).0;
            let mut bytes = self.reader.tables.l1_bytes();
            bytes.resize((clusters * after.cluster_size()) as usize, 0);
            self.reader.storage.write_at(offset, &bytes).map_err(|error| Error::io("new L1 table", error))?;
            // Its refcounts, then (write_header) the pointer to it.
            self.flush()?;
        }
        let (at, bytes) = patch::size_and_l1(size, entries as u32, offset);
        self.write_header(at, &bytes)?;
        {
            let mut header = self.reader.header.write();
            header.geometry = after;
            header.l1_size = entries as u32;
            header.l1_table_offset = offset;
        }
        self.reader.tables.grow(entries as usize, offset, size);
        if moves && old.l1_size > 0 {
            let clusters = (u64::from(old.l1_size) * 8).div_ceil(before.cluster_size());
            self.allocator.queue_free(HostCluster(old.l1_table_offset >> before.cluster_bits()), clusters);
        }
        self.flush_if_dirty()
    }
}
