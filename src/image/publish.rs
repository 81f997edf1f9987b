//! Pointing guest clusters at new host clusters, at zero, or at nothing.

use std::io;
use std::ops::Range;

use super::Image;
use crate::format::{Geometry, GuestCluster, HostCluster, Mapping};
use crate::mutants::{Step, without};
use crate::range_lock::Exclusive;
use crate::storage::{CloneSource, WriteKind};
use crate::sync::atomic::Ordering;
use crate::{Error, Result};

/// New host clusters that nothing points to. Dropped, they are given back (H13).
#[derive(Debug)]
pub struct Allocation<'a> {
    image: &'a Image,
    start: HostCluster,
    len: u64,
}

impl Allocation<'_> {
    /// How many clusters.
    pub fn clusters(&self) -> u64 {
        self.len
    }
}

impl Drop for Allocation<'_> {
    fn drop(&mut self) {
        if self.len > 0 && !without(Step::UnpublishedIsGivenBack) {
            self.image.allocator.give_back(self.start, self.len);
        }
    }
}

/// New host clusters whose bytes are written. Only [`Image::fill`] and [`Image::fill_by_cloning`] make one, so that nothing is published before its
/// data (I3).
#[derive(Debug)]
pub struct Filled<'a>(Allocation<'a>);

impl Filled<'_> {
    /// Where they lie in the file, bytes.
    pub fn place(&self) -> Range<u64> {
        let geometry = self.0.image.reader.geometry();
        let start = geometry.host_offset(self.0.start).0;
        start..start + (self.0.len << geometry.cluster_bits())
    }
}

impl Image {
    /// Contiguous new clusters, at least one, at most `at_most` (> 0).
    ///
    /// # Errors
    /// [`crate::ErrorKind::NoSpace`] when the image cannot grow; I/O.
    pub fn allocate(&self, at_most: u64) -> Result<Allocation<'_>> {
        self.check_usable()?;
        let (start, len) = self.watch(self.allocator.allocate(at_most))?;
        Ok(Allocation { image: self, start, len })
    }

    /// Writes the bytes of new clusters: whole clusters, all of them, so that nothing of an earlier owner can show.
    ///
    /// # Errors
    /// I/O; the clusters are given back.
    ///
    /// # Panics
    /// If `data` is not exactly as long as the allocation.
    pub fn fill<'a>(&'a self, allocation: Allocation<'a>, data: &[u8]) -> Result<Filled<'a>> {
        let geometry = self.reader.geometry();
        assert_eq!(data.len() as u64, allocation.len << geometry.cluster_bits(), "a fill is of whole clusters");
        let offset = geometry.host_offset(allocation.start).0;
        self.reader
            .storage
            .write_at(WriteKind::NewCluster, offset, data)
            .map_err(|error| Error::io(format!("data at {offset:#x}"), error))?;
        self.uncommitted.fetch_add(data.len() as u64, Ordering::Relaxed);
        Ok(Filled(allocation))
    }

    /// As [`Image::fill`] with the bytes that `source` has from `from` on, by sharing its blocks: for the next barrier it is a write like that one.
    ///
    /// # Errors
    /// Those of [`crate::storage::Storage::clone_range`], as they are, so that they can be sorted; the clusters are given back.
    pub fn fill_by_cloning<'a>(&'a self, allocation: Allocation<'a>, source: CloneSource<'_>, from: u64) -> io::Result<Filled<'a>> {
        let geometry = self.reader.geometry();
        let (offset, len) = (geometry.host_offset(allocation.start).0, allocation.len << geometry.cluster_bits());
        self.reader.storage.clone_range(WriteKind::NewCluster, source, from, offset, len)?;
        self.uncommitted.fetch_add(len, Ordering::Relaxed);
        Ok(Filled(allocation))
    }

    /// Points the guest clusters from `at` on at filled ones. What they pointed to before is given back.
    ///
    /// # Errors
    /// Where an L2 table cannot be loaded or allocated; clusters that were not published by then are given back.
    ///
    /// # Panics
    /// If `held` does not cover the clusters (I1).
    pub fn publish(&self, held: &Exclusive<'_>, at: GuestCluster, filled: Filled<'_>) -> Result<()> {
        let mut rest = filled.0;
        let mut at = at;
        while rest.len > 0 {
            let done = self.remap(held, at..GuestCluster(at.0 + rest.len), |index, _| {
                Some(Mapping::Data { host: HostCluster(rest.start.0 + index), in_place: true })
            })?;
            rest.start.0 += done;
            rest.len -= done;
            at.0 += done;
        }
        Ok(())
    }

    /// Makes clusters read as zero while they keep the host clusters that are theirs alone. Version 3 only.
    ///
    /// # Errors
    /// Where an L2 table cannot be loaded or allocated; clusters before it are zero by then.
    ///
    /// # Panics
    /// If `held` does not cover the clusters (I1), or in version 2.
    pub fn zero(&self, held: &Exclusive<'_>, clusters: Range<GuestCluster>) -> Result<()> {
        self.remap_all(held, clusters, |_, before| match before {
            Mapping::Zero { .. } => None,
            Mapping::Data { host, in_place: true } => Some(Mapping::Zero { reserved: Some((host, true)) }),
            Mapping::Unallocated | Mapping::Data { .. } | Mapping::Compressed { .. } => Some(Mapping::Zero { reserved: None }),
        })
    }

    /// Makes clusters read as zero and gives their host clusters back. Version 3 only: the backing file must never shine through again (2.6).
    ///
    /// # Errors
    /// As [`Image::zero`].
    ///
    /// # Panics
    /// As [`Image::zero`].
    pub fn discard(&self, held: &Exclusive<'_>, clusters: Range<GuestCluster>) -> Result<()> {
        self.remap_all(held, clusters, |_, before| match before {
            Mapping::Zero { reserved: None } => None,
            _ if without(Step::DiscardHidesBelow) => Some(Mapping::Unallocated),
            _ => Some(Mapping::Zero { reserved: None }),
        })
    }

    /// Leaves clusters unallocated and gives their host clusters back. Only for an image without backing file, where that reads as zero.
    ///
    /// # Errors
    /// As [`Image::zero`].
    ///
    /// # Panics
    /// If `held` does not cover the clusters (I1), or there is a backing file (H17).
    pub fn unmap(&self, held: &Exclusive<'_>, clusters: Range<GuestCluster>) -> Result<()> {
        assert!(self.reader.backing().is_none(), "unmapping would show the backing file again");
        self.remap_all(held, clusters, |_, before| (before != Mapping::Unallocated).then_some(Mapping::Unallocated))
    }

    /// As [`Image::unmap`], although there is a backing file: a mistake that tests make on purpose.
    #[cfg(test)]
    pub(crate) fn uncover(&self, held: &Exclusive<'_>, clusters: Range<GuestCluster>) -> Result<()> {
        self.remap_all(held, clusters, |_, before| (before != Mapping::Unallocated).then_some(Mapping::Unallocated))
    }

    /// Turns clusters that read as zero but keep a host cluster into data clusters. The host clusters have been written whole.
    ///
    /// # Errors
    /// As [`Image::zero`].
    ///
    /// # Panics
    /// As [`Image::publish`].
    pub fn publish_reserved(&self, held: &Exclusive<'_>, clusters: Range<GuestCluster>) -> Result<()> {
        self.remap_all(held, clusters, |_, before| match before {
            Mapping::Zero { reserved: Some((host, true)) } => Some(Mapping::Data { host, in_place: true }),
            _ => None,
        })
    }

    /// Writes whole clusters into host clusters that a zero run keeps, before [`Image::publish_reserved`]. Until then they read as zero.
    ///
    /// # Errors
    /// I/O.
    ///
    /// # Panics
    /// If `data` is not whole clusters.
    pub fn fill_reserved(&self, host: HostCluster, data: &[u8]) -> Result<()> {
        self.check_usable()?;
        let geometry = self.reader.geometry();
        assert!((data.len() as u64).is_multiple_of(geometry.cluster_size()), "a fill is of whole clusters");
        let offset = geometry.host_offset(host).0;
        self.reader.storage.write_at(WriteKind::Data, offset, data).map_err(|error| Error::io(format!("data at {offset:#x}"), error))
    }

    fn remap_all(
        &self,
        held: &Exclusive<'_>,
        clusters: Range<GuestCluster>,
        mut becomes: impl FnMut(u64, Mapping) -> Option<Mapping>,
    ) -> Result<()> {
        let mut at = clusters.start;
        while at < clusters.end {
            at.0 += self.remap(held, at..clusters.end, &mut becomes)?;
        }
        Ok(())
    }

    /// The one place where entries change: asks `becomes` (index from the start of the range, mapping before) for each cluster of the range
    /// that lies in the first L2 table of it, and returns how many those were. Entries first, then the list of frees (D6).
    fn remap(
        &self,
        held: &Exclusive<'_>,
        clusters: Range<GuestCluster>,
        mut becomes: impl FnMut(u64, Mapping) -> Option<Mapping>,
    ) -> Result<u64> {
        let geometry = self.reader.geometry();
        assert!(
            held.covers(&(geometry.guest_offset(clusters.start).0..geometry.guest_offset(clusters.end).0)),
            "I1: a mapping changes only under its exclusive guard"
        );
        self.check_usable()?;
        let (l1_index, l2_index) = geometry.table_indexes(clusters.start);
        let count = (clusters.end.0 - clusters.start.0).min(geometry.l2_entries() - l2_index as u64);
        let mut frees: Vec<(HostCluster, u64)> = Vec::new();
        // Under the exclusive guard nobody else changes these entries: what map saw is what set replaces.
        let mut changes = Vec::new();
        let mut index = 0;
        while index < count {
            let at = GuestCluster(clusters.start.0 + index);
            let before = self.watch(self.reader.mapping(at))?;
            if let Some(after) = becomes(index, before) {
                changes.push((l2_index + index as usize, after, before));
            }
            index += 1;
        }
        if changes.is_empty() {
            return Ok(count);
        }
        let result = self.reader.tables.change(l1_index, |set| {
            for &(l2_index, after, before) in &changes {
                let replaced = Mapping::decode(set(l2_index, after.encode(&geometry)), &geometry);
                // But for COPIED, which `before` does not say of an entry that is not proven.
                debug_assert_eq!(replaced.map(|replaced| released(replaced, after, &geometry)), Ok(released(before, after, &geometry)));
                frees.extend(released(before, after, &geometry));
            }
        });
        self.watch(result)?;
        for (start, len) in frees {
            self.allocator.queue_free(start, len);
        }
        self.ask_for_commit();
        Ok(count)
    }
}

/// The host clusters that lose a reference when an entry changes: first and count.
fn released(before: Mapping, after: Mapping, geometry: &Geometry) -> Option<(HostCluster, u64)> {
    let kept = match after {
        Mapping::Data { host, .. } | Mapping::Zero { reserved: Some((host, _)) } => Some(host),
        _ => None,
    };
    match before {
        Mapping::Data { host, .. } | Mapping::Zero { reserved: Some((host, _)) } => (kept != Some(host)).then_some((host, 1)),
        Mapping::Compressed { at, len } => {
            let first = geometry.host_cluster(at);
            let last = (at.0 + u64::from(len) - 1) >> geometry.cluster_bits();
            Some((first, last - first.0 + 1))
        }
        Mapping::Unallocated | Mapping::Zero { reserved: None } => None,
    }
}
