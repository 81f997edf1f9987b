//! The walk over all tables of an image. It trusts none of them and reads raw bytes, because
//! [`super::super::Tables`] would reject some.
//!
//! It counts as `qemu-img check` does (QEMU: `block/qcow2-refcount.c`, qcow2_check_refcounts), but
//! in one pass: a COPIED flag is compared with the refcount on disk, which does not depend on the
//! references.

use super::counted::Counted;
use super::references::References;
use super::{CheckReport, Finding, Leak};
use crate::format::{Geometry, Header, RawL2Entry, RefcountBlock, be_words, raw_entries};
use host::storage::ReadAt;
use host::{Error, ErrorKind, Result};

const COPIED: u64 = 1 << 63;
const COMPRESSED: u64 = 1 << 62;
const ZERO: u64 = 1;
/// Bits 9 to 55 of an L1 or L2 entry.
const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;
const L1_RESERVED: u64 = 0x7f00_0000_0000_01ff;
const L2_RESERVED: u64 = 0x3f00_0000_0000_01fe;
/// Most clusters of a file that can be checked. QEMU has the same limit. It bounds the vector of
/// counter pages.
pub(in crate::image) const MOST_CLUSTERS: u64 = i32::MAX as u64;

/// In a good image every L2 table has a cluster of its own. The walk reads this many L2 tables more
/// than the file has clusters, to report what is wrong with tables that share a cluster. The limit
/// stops a crafted image that names millions (V29).
const SPARE_TABLES: u64 = 1024;

/// State of one walk.
#[derive(Debug)]
pub(super) struct Walk<'a> {
    storage: &'a dyn ReadAt,
    header: &'a Header,
    geometry: Geometry,
    /// The size of the file in bytes, rounded up to sectors as QEMU does.
    file_len: u64,
    /// Number of clusters that are compared: those of the file, and a last one that only starts in
    /// it.
    clusters: u64,
    references: References,
    counted: Counted<'a>,
    report: CheckReport,
    leaks: Vec<Leak>,
}

impl<'a> Walk<'a> {
    /// Walks over all tables of an image.
    ///
    /// # Errors
    /// [`ErrorKind::UnsupportedFeature`] for a file of too many clusters; I/O.
    pub fn run(storage: &'a dyn ReadAt, header: &'a Header) -> Result<Walk<'a>> {
        let geometry = header.geometry;
        let file_len = storage.size().next_multiple_of(512);
        let clusters = file_len.div_ceil(geometry.cluster_size());
        if clusters > MOST_CLUSTERS {
            let text = format!(
                "cannot be checked: its file has {clusters} clusters, more than {MOST_CLUSTERS}"
            );
            return Err(Error::new(ErrorKind::UnsupportedFeature, text));
        }
        let mut walk = Walk {
            storage,
            header,
            geometry,
            file_len,
            clusters,
            references: References::new(RefcountBlock::new(&geometry).max()),
            counted: Counted::open(storage, header)?,
            report: CheckReport {
                total_clusters: geometry.guest_clusters().0,
                ..CheckReport::default()
            },
            leaks: Vec::new(),
        };
        walk.count(0, geometry.cluster_size());
        walk.l1_table()?;
        walk.count(
            header.refcount_table_offset,
            u64::from(header.refcount_table_clusters) * geometry.cluster_size(),
        );
        walk.refcount_blocks();
        walk.compare()?;
        Ok(walk)
    }

    /// Returns the report.
    pub fn into_report(self) -> CheckReport {
        self.report
    }

    /// Returns the report and all clusters that can be given back. These include clusters that are
    /// counted beyond the end of the file, where a crash leaves clusters that were counted and
    /// never written. QEMU does not check those, and no entry can refer to them.
    ///
    /// # Errors
    /// I/O.
    pub fn into_leaks(mut self) -> Result<(CheckReport, Vec<Leak>)> {
        let entries = self.geometry.refblock_entries();
        let covered = (self.counted.table().len() as u64).saturating_mul(entries);
        let mut cluster = self.clusters;
        while cluster < covered && self.report.is_sound() {
            cluster = match self.counted.next_counted(cluster)? {
                Some(found) => {
                    self.leaked(found, 0);
                    found + 1
                }
                None => (cluster / entries + 1) * entries,
            };
        }
        Ok((self.report, self.leaks))
    }

    fn corruption(&mut self, finding: Finding) {
        self.report.corruptions += 1;
        self.report.list(finding);
    }

    /// Counts one reference to each cluster of a range of bytes. The last cluster of a file may be
    /// incomplete.
    fn count(&mut self, offset: u64, size: u64) {
        if size == 0 {
            return;
        }
        let cluster_size = self.geometry.cluster_size();
        let end = offset
            .checked_add(size)
            .filter(|&end| end < self.file_len.saturating_add(cluster_size));
        let Some(end) = end else {
            return self.corruption(Finding::OutsideTheFile { offset, size });
        };
        for cluster in offset / cluster_size..=(end - 1) / cluster_size {
            self.clusters = self.clusters.max(cluster + 1);
            if !self.references.add(cluster) {
                self.corruption(Finding::TooManyReferences { offset: cluster * cluster_size });
            }
        }
    }

    /// Compares a COPIED flag with the refcount; `None` if the refcount cannot be read.
    fn copied(&mut self, entry: u64, finding: impl FnOnce(u64) -> Finding) -> Result<Option<()>> {
        let cluster = (entry & OFFSET) >> self.geometry.cluster_bits();
        let Some(refcount) = self.counted.get(cluster)? else { return Ok(None) };
        let copied = entry & COPIED != 0;
        if (refcount == 1) != copied {
            self.corruption(finding(refcount));
        }
        // Only clusters inside the file need this mark: a leak outside the file has no reference.
        if !copied && refcount > 1 && cluster < self.clusters {
            self.references.set_shared(cluster);
        }
        Ok(Some(()))
    }

    fn l1_table(&mut self) -> Result<()> {
        let bytes = u64::from(self.header.l1_size) * 8;
        self.count(self.header.l1_table_offset, bytes);
        let mut raw = vec![0; bytes as usize];
        self.storage
            .read_at(self.header.l1_table_offset, &mut raw)
            .map_err(|error| Error::io("L1 table", error))?;
        let mut table = vec![0; self.geometry.cluster_size() as usize];
        let mut tables = 0;
        for (l1_index, entry) in be_words(&raw).enumerate() {
            if entry == 0 {
                continue;
            }
            if entry & L1_RESERVED != 0 {
                self.corruption(Finding::ReservedBitsInL1 { entry });
            }
            let offset = entry & OFFSET;
            self.count(offset, self.geometry.cluster_size());
            if !offset.is_multiple_of(self.geometry.cluster_size()) {
                self.corruption(Finding::UnalignedL2Table { offset });
            }
            // As in QEMU: an entry that has only flags is followed to the header at offset 0, but
            // its COPIED flag is not checked.
            let flags = offset != 0
                && self
                    .copied(entry, |refcount| Finding::CopiedL2Table { l1_index, entry, refcount })?
                    .is_some();
            if offset >= self.file_len {
                continue; // reads as zeros
            }
            tables += 1;
            if tables > self.clusters + SPARE_TABLES {
                let text = "cannot be checked: its L1 table names more L2 tables than its file has clusters";
                return Err(Error::new(ErrorKind::UnsupportedFeature, text));
            }
            self.storage
                .read_at(offset, &mut table)
                .map_err(|error| Error::io(format!("L2 table at {offset:#x}"), error))?;
            self.l2_table(&table, flags)?;
        }
        Ok(())
    }

    fn l2_table(&mut self, table: &[u8], flags: bool) -> Result<()> {
        let cluster_size = self.geometry.cluster_size();
        let mut contiguous = None;
        let words: Vec<u64> = be_words(table).collect();
        for (index, raw) in raw_entries(&words, &self.geometry).enumerate() {
            let RawL2Entry { descriptor: entry, bitmap } = raw;
            if entry & COMPRESSED != 0 {
                if entry & COPIED != 0 {
                    self.corruption(Finding::CopiedCompressed { offset: self.compressed(entry).0 });
                }
                if bitmap == 0 {
                    self.count_compressed(entry);
                } else {
                    self.corruption(Finding::CompressedWithBitmap { index, entry });
                }
                continue;
            }
            if entry & L2_RESERVED != 0 {
                self.corruption(Finding::ReservedBitsInL2 { entry });
            }
            let offset = entry & OFFSET;
            let (allocated, zero) = (bitmap as u32, (bitmap >> 32) as u32);
            if offset == 0 {
                if allocated != 0 {
                    self.corruption(Finding::AllocatedWithoutCluster);
                }
                continue;
            }
            if allocated & zero != 0 {
                self.corruption(Finding::CorruptBitmap { offset });
            }
            if !offset.is_multiple_of(cluster_size) {
                let has_data = if self.geometry.has_extended_l2() {
                    allocated != 0
                } else {
                    entry & ZERO == 0
                };
                self.corruption(Finding::UnalignedCluster { offset, zero: !has_data });
            }
            self.report.allocated_clusters += 1;
            if contiguous.is_some_and(|expected| expected != offset) {
                self.report.fragmented_clusters += 1;
            }
            contiguous = Some(offset + cluster_size);
            self.count(offset, cluster_size);
            if flags {
                self.copied(entry, |refcount| Finding::CopiedCluster { entry, refcount })?;
            }
        }
        Ok(())
    }

    /// Returns host offset and size, in bytes, of the data of a compressed cluster.
    fn compressed(&self, entry: u64) -> (u64, u64) {
        let offset_bits = 62 - (self.geometry.cluster_bits() - 8);
        let offset = entry & ((1 << offset_bits) - 1);
        let more_sectors = (entry & (COMPRESSED - 1)) >> offset_bits;
        (offset, (more_sectors + 1) * 512 - offset % 512)
    }

    fn count_compressed(&mut self, entry: u64) {
        let (offset, size) = self.compressed(entry);
        self.count(offset, size);
        // Compressed clusters share sectors, so each counts as fragmented.
        self.report.allocated_clusters += 1;
        self.report.compressed_clusters += 1;
        self.report.fragmented_clusters += 1;
    }

    fn refcount_blocks(&mut self) {
        let cluster_size = self.geometry.cluster_size();
        for index in 0..self.counted.table().len() {
            let entry = self.counted.table()[index];
            let offset = entry.offset();
            if entry.has_reserved_bits() {
                self.corruption(Finding::ReservedBitsInRefcountTable { index });
            } else if !offset.is_multiple_of(cluster_size) {
                self.corruption(Finding::UnalignedRefcountBlock { index });
            } else if offset / cluster_size >= self.clusters {
                self.corruption(Finding::RefcountBlockOutside { index });
            } else if offset != 0 {
                self.count(offset, cluster_size);
                let references = self.references.get(offset / cluster_size);
                if references != 1 {
                    self.corruption(Finding::RefcountBlockShared { index, references });
                }
            }
        }
    }

    /// Compares the refcounts with the references.
    fn compare(&mut self) -> Result<()> {
        let mut highest = 0;
        let mut cluster = 0;
        while cluster < self.clusters {
            if let (Some(here), Some(there)) =
                (self.counted.none_until(cluster), self.references.none_until(cluster))
            {
                cluster = here.min(there);
                continue;
            }
            let references = self.references.get(cluster);
            match self.counted.get(cluster)? {
                None => {
                    self.report.check_errors += 1;
                    self.report.list(Finding::NoRefcount { cluster });
                }
                Some(refcount) => {
                    if refcount > 0 || references > 0 {
                        highest = cluster;
                    }
                    if refcount < references {
                        self.corruption(Finding::Refcount { cluster, refcount, references });
                    } else if refcount > references {
                        self.report.leaks += 1;
                        self.report.list(Finding::Refcount { cluster, refcount, references });
                        self.leaked(cluster, references);
                    }
                }
            }
            cluster += 1;
        }
        self.report.image_end = (highest + 1) * self.geometry.cluster_size();
        Ok(())
    }

    /// Records a cluster that can be given back. A cluster whose only reference has no COPIED keeps
    /// its refcount: a refcount of 1 would make that entry wrong (R9), and the check changes no
    /// entries.
    fn leaked(&mut self, cluster: u64, references: u64) {
        if references == 1 && self.references.is_shared(cluster) {
            return;
        }
        match self.leaks.last_mut() {
            Some(last) if last.start + last.len == cluster && last.references == references => {
                last.len += 1
            }
            _ => self.leaks.push(Leak { start: cluster, len: 1, references }),
        }
    }
}
