//! Maps guest clusters to new host clusters, to zeros, or to nothing.

use std::io;
use std::ops::Range;

use super::Image;
use crate::format::{Geometry, GuestCluster, HostCluster, Mapping};
use crate::journal::{Journal, MappingChange, PromisedSpace};
use crate::range_lock::Exclusive;
use host::mutants::{Step, without};
use host::storage::{CloneSource, WriteKind};
use host::sync::atomic::Ordering;
use host::{Error, Result};

/// New host clusters that no entry points to. Dropping the value gives them back (H13).
#[derive(Debug)]
pub struct Allocation<'a> {
    image: &'a Image,
    start: HostCluster,
    len: u64,
}

impl Allocation<'_> {
    /// Returns the number of clusters.
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

/// New host clusters whose data is written. Only [`Image::fill`] and [`Image::fill_by_cloning`]
/// make one, so that no cluster is published before its data (I3).
#[derive(Debug)]
pub struct Filled<'a>(Allocation<'a>);

impl Filled<'_> {
    /// Returns the range of the clusters in the file, in bytes.
    pub fn place(&self) -> Range<u64> {
        let geometry = self.0.image.reader.geometry();
        let start = geometry.host_offset(self.0.start).0;
        start..start + (self.0.len << geometry.cluster_bits())
    }
}

impl Image {
    /// Allocates contiguous new clusters: at least one, at most `at_most` (> 0).
    ///
    /// # Errors
    /// [`host::ErrorKind::NoSpace`] when the image cannot grow; I/O.
    pub fn allocate(&self, at_most: u64) -> Result<Allocation<'_>> {
        self.check_usable()?;
        let (start, len) = self.watch(self.allocator.allocate(at_most))?;
        Ok(Allocation { image: self, start, len })
    }

    /// Writes the data of new clusters. The write covers every byte of them, so that no old data of
    /// the host clusters becomes visible.
    ///
    /// # Errors
    /// I/O; the clusters are given back.
    ///
    /// # Panics
    /// If `data` is not exactly as long as the allocation.
    pub fn fill<'a>(&'a self, allocation: Allocation<'a>, data: &[u8]) -> Result<Filled<'a>> {
        let geometry = self.reader.geometry();
        assert_eq!(
            data.len() as u64,
            allocation.len << geometry.cluster_bits(),
            "a fill is of whole clusters"
        );
        let offset = geometry.host_offset(allocation.start).0;
        self.storage
            .write_at(WriteKind::NewCluster, offset, data)
            .map_err(|error| Error::io(format!("data at {offset:#x}"), error))?;
        self.uncommitted.fetch_add(data.len() as u64, Ordering::Relaxed);
        Ok(Filled(allocation))
    }

    /// Fills new clusters as [`Image::fill`] does, with the bytes of `source` from offset `from`
    /// on, by sharing its blocks. The next barrier covers the clone as it covers a write.
    ///
    /// # Errors
    /// The error of [`host::storage::Storage::clone_range`], unchanged, so that the caller can
    /// classify it; the clusters are given back.
    pub fn fill_by_cloning<'a>(
        &'a self,
        allocation: Allocation<'a>,
        source: CloneSource<'_>,
        from: u64,
    ) -> io::Result<Filled<'a>> {
        let geometry = self.reader.geometry();
        let (offset, len) =
            (geometry.host_offset(allocation.start).0, allocation.len << geometry.cluster_bits());
        self.storage.clone_range(WriteKind::NewCluster, source, from, offset, len)?;
        self.uncommitted.fetch_add(len, Ordering::Relaxed);
        Ok(Filled(allocation))
    }

    /// Maps the guest clusters from `at` on to filled host clusters. The host clusters that they
    /// were mapped to before are freed.
    ///
    /// # Errors
    /// If an L2 table cannot be loaded or allocated; clusters that are not published by then are
    /// given back.
    ///
    /// # Panics
    /// If `held` does not cover the clusters (I1).
    pub fn publish(
        &self,
        held: &Exclusive<'_>,
        at: GuestCluster,
        filled: Filled<'_>,
    ) -> Result<()> {
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

    /// Makes clusters read as zero. A host cluster that only this entry refers to stays reserved
    /// for its guest cluster. Version 3 only.
    ///
    /// # Errors
    /// If an L2 table cannot be loaded or allocated; clusters before it are zero by then.
    ///
    /// # Panics
    /// If `held` does not cover the clusters (I1), or in version 2.
    pub fn zero(&self, held: &Exclusive<'_>, clusters: Range<GuestCluster>) -> Result<()> {
        self.remap_all(held, clusters, |_, before| match before {
            Mapping::Zero { .. } => None,
            Mapping::Data { host, in_place: true } => {
                Some(Mapping::Zero { reserved: Some((host, true)) })
            }
            Mapping::Unallocated | Mapping::Data { .. } | Mapping::Compressed { .. } => {
                Some(Mapping::Zero { reserved: None })
            }
        })
    }

    /// Makes clusters read as zero and frees their host clusters. Version 3 only: version 2 has no
    /// zero flag, and an unallocated cluster would make the backing file visible again (H17).
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

    /// Makes clusters unallocated and frees their host clusters. Only for an image without a
    /// backing file, where unallocated clusters read as zero.
    ///
    /// # Errors
    /// As [`Image::zero`].
    ///
    /// # Panics
    /// If `held` does not cover the clusters (I1), or there is a backing file (H17).
    pub fn unmap(&self, held: &Exclusive<'_>, clusters: Range<GuestCluster>) -> Result<()> {
        assert!(self.reader.backing().is_none(), "unmapping would show the backing file again");
        self.remap_all(held, clusters, |_, before| {
            (before != Mapping::Unallocated).then_some(Mapping::Unallocated)
        })
    }

    /// Does what [`Image::unmap`] does, even if there is a backing file. Tests use it to inject
    /// that error.
    #[cfg(any(test, feature = "testing"))]
    pub fn uncover(&self, held: &Exclusive<'_>, clusters: Range<GuestCluster>) -> Result<()> {
        self.remap_all(held, clusters, |_, before| {
            (before != Mapping::Unallocated).then_some(Mapping::Unallocated)
        })
    }

    /// Maps clusters that read as zero and have a reserved host cluster to that cluster's data. The
    /// caller has written the host clusters completely.
    ///
    /// # Errors
    /// As [`Image::zero`].
    ///
    /// # Panics
    /// As [`Image::publish`].
    pub fn publish_reserved(
        &self,
        held: &Exclusive<'_>,
        clusters: Range<GuestCluster>,
    ) -> Result<()> {
        self.remap_all(held, clusters, |_, before| match before {
            Mapping::Zero { reserved: Some((host, true)) } => {
                Some(Mapping::Data { host, in_place: true })
            }
            _ => None,
        })
    }

    /// Writes whole clusters into the reserved host clusters of a zero run, before
    /// [`Image::publish_reserved`]. Until then the guest clusters read as zero.
    ///
    /// # Errors
    /// I/O.
    ///
    /// # Panics
    /// If the length of `data` is not a multiple of the cluster size.
    pub fn fill_reserved(&self, host: HostCluster, data: &[u8]) -> Result<()> {
        self.check_usable()?;
        let geometry = self.reader.geometry();
        assert!(
            (data.len() as u64).is_multiple_of(geometry.cluster_size()),
            "a fill is of whole clusters"
        );
        let offset = geometry.host_offset(host).0;
        self.storage
            .write_at(WriteKind::Data, offset, data)
            .map_err(|error| Error::io(format!("data at {offset:#x}"), error))
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

    /// Changes L2 entries; no other function does. Handles the clusters that the first L2 table of
    /// the range maps, and returns their number. Calls `becomes` (index from the start of the
    /// range, previous mapping) for each of them. Entries change first and frees are queued
    /// afterwards: step 2 of the write-back pass needs this order.
    fn remap(
        &self,
        held: &Exclusive<'_>,
        clusters: Range<GuestCluster>,
        mut becomes: impl FnMut(u64, Mapping) -> Option<Mapping>,
    ) -> Result<u64> {
        let geometry = self.reader.geometry();
        assert!(
            held.covers(
                &(geometry.guest_offset(clusters.start).0..geometry.guest_offset(clusters.end).0)
            ),
            "I1: a mapping changes only under its exclusive guard"
        );
        self.check_usable()?;
        let (l1_index, l2_index) = geometry.table_indexes(clusters.start);
        let count =
            (clusters.end.0 - clusters.start.0).min(geometry.l2_entries() - l2_index as u64);
        let count = count.min(self.journal.as_deref().map_or(u64::MAX, Journal::most_at_once));
        let mut frees: Vec<(HostCluster, u64)> = Vec::new();
        // The exclusive guard keeps other threads from changing these entries, so the mappings read
        // here are the ones that `set` replaces below.
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
        let first = clusters.start.0 - l2_index as u64;
        let (records, space) = self.announce(first, &changes)?;
        let result = self.reader.tables.change(l1_index, |set| {
            for &(l2_index, after, before) in &changes {
                let replaced = Mapping::decode(set(l2_index, after.encode(&geometry)), &geometry);
                // COPIED may differ: `before` never has it for an entry whose refcount could not be
                // read.
                debug_assert_eq!(
                    replaced.map(|replaced| released(replaced, after, &geometry)),
                    Ok(released(before, after, &geometry))
                );
                frees.extend(released(before, after, &geometry));
            }
        });
        self.watch(result)?;
        for (start, len) in frees {
            self.allocator.queue_free(start, len);
        }
        // The tables are queued for the next pass by now, and no request has been answered with
        // the new mapping: the caller still holds the range.
        if let (Some(journal), Some(space)) = (&self.journal, space) {
            journal.append(space, &records).map_err(|error| self.lose_journal(error))?;
        }
        self.ask_for_commit();
        Ok(count)
    }
}

impl Image {
    /// Makes the records of changes of one L2 table, whose first guest cluster is `first`, and sets
    /// space in the journal aside for them, before anything changes. If the journal is full, a pass
    /// is made first.
    ///
    /// # Errors
    /// As [`Image::flush`].
    fn announce(
        &self,
        first: u64,
        changes: &[(usize, Mapping, Mapping)],
    ) -> Result<(Vec<MappingChange>, Option<PromisedSpace<'_>>)> {
        let Some(journal) = &self.journal else { return Ok((Vec::new(), None)) };
        let geometry = self.reader.geometry();
        let mut records: Vec<MappingChange> = Vec::new();
        for &(l2_index, after, _) in changes {
            let at = GuestCluster(first + l2_index as u64);
            let entry = after.encode(&geometry);
            let joins = records
                .last_mut()
                .is_some_and(|last| last.joined_by(at, entry, geometry.cluster_size()));
            if !joins {
                records.push(MappingChange { start: at, count: 1, entry, step: 0 });
            }
        }
        loop {
            match journal.promise(records.len()) {
                Some(space) => return Ok((records, Some(space))),
                None => self.flush()?,
            }
        }
    }
}

/// Returns the host clusters that lose a reference when an entry changes: first cluster and count.
pub(super) fn released(
    before: Mapping,
    after: Mapping,
    geometry: &Geometry,
) -> Option<(HostCluster, u64)> {
    let kept = match after {
        Mapping::Data { host, .. } | Mapping::Zero { reserved: Some((host, _)) } => Some(host),
        _ => None,
    };
    match before {
        Mapping::Data { host, .. } | Mapping::Zero { reserved: Some((host, _)) } => {
            (kept != Some(host)).then_some((host, 1))
        }
        Mapping::Compressed { at, len } => {
            let first = geometry.host_cluster(at);
            let last = (at.0 + u64::from(len) - 1) >> geometry.cluster_bits();
            Some((first, last - first.0 + 1))
        }
        Mapping::Unallocated | Mapping::Zero { reserved: None } => None,
    }
}
