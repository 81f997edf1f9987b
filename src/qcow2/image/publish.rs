//! Maps guest subclusters to host clusters, to zeros, or to nothing. Without extended L2 entries, a
//! subcluster is a cluster.

use std::io;
use std::ops::Range;

use super::Image;
use crate::format::{Geometry, GuestCluster, GuestSubcluster, HostCluster, L2Entry, RawL2Entry};
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
        // If the journal has failed, entries in memory name the clusters, and reads go on. Another
        // request that has called `check_usable` before the image was latched must not get them.
        // The next open finds what is leaked.
        let may_be_named = !self.image.is_usable() && !without(Step::NamedIsNotGivenBack);
        if self.len > 0 && !may_be_named && !without(Step::UnpublishedIsGivenBack) {
            self.image.allocator.give_back(self.start, self.len);
        }
    }
}

/// Host clusters whose data is written. Only [`Image::fill`], [`Image::fill_by_cloning`] and
/// `fill_own` make one, so that no subcluster is published before its data (I3).
#[derive(Debug)]
pub struct Filled<'a> {
    start: HostCluster,
    /// The bytes that are written, from the start of the first host cluster on: whole subclusters.
    written: Range<u64>,
    /// The clusters, if they are new.
    new: Option<Allocation<'a>>,
    geometry: Geometry,
}

impl Filled<'_> {
    /// Returns the range that is written in the file, in bytes.
    pub fn place(&self) -> Range<u64> {
        let start = self.geometry.host_offset(self.start).0;
        start + self.written.start..start + self.written.end
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

    /// Writes the data of new clusters, from byte `skip` of the first one on: whole subclusters, to
    /// the last of the clusters. The write covers every byte that will be published, so that no old
    /// data of the host clusters becomes visible.
    ///
    /// # Errors
    /// I/O; the clusters are given back.
    ///
    /// # Panics
    /// If the data does not begin in the first cluster and end in the last one, at subclusters.
    pub fn fill<'a>(
        &'a self,
        allocation: Allocation<'a>,
        skip: u64,
        data: &[u8],
    ) -> Result<Filled<'a>> {
        let geometry = self.reader.geometry();
        let written = skip..skip + data.len() as u64;
        assert!(
            skip < geometry.cluster_size()
                && written.end.div_ceil(geometry.cluster_size()) == allocation.len
                && (written.start | written.end).is_multiple_of(geometry.subcluster_size()),
            "a fill is of whole subclusters in all new clusters: {written:?}"
        );
        self.write_data(WriteKind::NewCluster, allocation.start, skip, data)?;
        self.uncommitted.fetch_add(data.len() as u64, Ordering::Relaxed);
        self.unwritten.fetch_add(data.len() as u64, Ordering::Relaxed);
        Ok(Filled { start: allocation.start, written, new: Some(allocation), geometry })
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
        Ok(Filled { start: allocation.start, written: 0..len, new: Some(allocation), geometry })
    }

    /// Writes whole subclusters into host clusters that belong to their guest clusters alone, from
    /// byte `skip` of the first one on. They may be unallocated, or read as zero, until they are
    /// published.
    ///
    /// # Errors
    /// I/O.
    ///
    /// # Panics
    /// If the data does not begin and end at subclusters.
    pub(super) fn fill_own(
        &self,
        start: HostCluster,
        skip: u64,
        data: &[u8],
    ) -> Result<Filled<'_>> {
        self.check_usable()?;
        let geometry = self.reader.geometry();
        let written = skip..skip + data.len() as u64;
        assert!(
            (written.start | written.end).is_multiple_of(geometry.subcluster_size()),
            "a fill is of whole subclusters: {written:?}"
        );
        self.write_data(WriteKind::Data, start, skip, data)?;
        self.unwritten.fetch_add(data.len() as u64, Ordering::Relaxed);
        Ok(Filled { start, written, new: None, geometry })
    }

    /// Maps the guest subclusters from `at` on to the filled bytes: `at` has the same place in its
    /// cluster as the first of them. Host clusters that their guest clusters were mapped to before
    /// are freed, if they are others. Subclusters beside those that are filled keep their mapping.
    ///
    /// # Errors
    /// If an L2 table cannot be loaded or allocated; clusters that are not published by then are
    /// given back.
    ///
    /// # Panics
    /// If `held` does not cover the clusters (I1), or a subcluster would lose its data: it is
    /// allocated in another host cluster and not filled (I3).
    pub fn publish(
        &self,
        held: &Exclusive<'_>,
        at: GuestSubcluster,
        filled: Filled<'_>,
    ) -> Result<()> {
        let Filled { start, written, mut new, geometry } = filled;
        let bits = geometry.subcluster_bits();
        let end = GuestSubcluster(at.0 + ((written.end - written.start) >> bits));
        let (first, place) = geometry.cluster_of(at);
        assert_eq!(u64::from(place) << bits, written.start, "the data is at its place");
        let mut next = at;
        while next < end {
            next.0 += self.remap(held, next..end, |cluster, before, filled| {
                let (allocated, zero) = match before {
                    L2Entry::Standard { allocated, zero, .. } => (allocated, zero),
                    L2Entry::Compressed { .. } => (geometry.all_subclusters(), 0),
                };
                let host = HostCluster(start.0 + (cluster.0 - first.0));
                assert!(
                    before.host().is_some_and(|(before, _)| before == host)
                        || allocated & !filled == 0,
                    "I3: a published subcluster was filled first"
                );
                L2Entry::Standard {
                    host: Some((host, true)),
                    allocated: allocated | filled,
                    zero: zero & !filled,
                }
            })?;
            if let Some(new) = &mut new {
                // Clusters of which only a part was published are published as well: an entry names
                // them.
                let (cluster, place) = geometry.cluster_of(next);
                let published = cluster.0 + u64::from(place > 0) - first.0;
                let taken = published - (new.start.0 - start.0);
                new.start.0 += taken;
                new.len -= taken;
            }
        }
        Ok(())
    }

    /// Moves a cluster whose host cluster other entries may name as well to a new host cluster, and
    /// writes `data` over it from byte `skip` on: whole subclusters. The subclusters beside them
    /// keep their mapping and their bytes.
    ///
    /// # Errors
    /// I/O, [`host::ErrorKind::NoSpace`], corruption.
    ///
    /// # Panics
    /// As [`Image::publish`].
    pub(super) fn move_cluster(
        &self,
        held: &Exclusive<'_>,
        at: GuestSubcluster,
        old: HostCluster,
        data: &[u8],
    ) -> Result<Range<u64>> {
        let geometry = self.reader.geometry();
        let (cluster, place) = geometry.cluster_of(at);
        let skip = (place as usize) << geometry.subcluster_bits();
        let from = geometry.host_offset(old).0;
        let mut bytes = vec![0; geometry.cluster_size() as usize];
        // The file may end inside its last cluster. No entry shows the bytes beyond.
        let inside = self.storage.size().saturating_sub(from).min(geometry.cluster_size());
        self.storage
            .read_at(from, &mut bytes[..inside as usize])
            .map_err(|error| Error::io(format!("data at {from:#x}"), error))?;
        bytes[skip..skip + data.len()].copy_from_slice(data);
        let filled = self.fill(self.allocate(1)?, 0, &bytes)?;
        let placed = filled.place();
        let Filled { start, new, .. } = filled;
        let end = GuestSubcluster(at.0 + (data.len() as u64 >> geometry.subcluster_bits()));
        self.remap(held, at..end, |at, before, mask| match before {
            L2Entry::Standard { allocated, zero, .. } if at == cluster => L2Entry::Standard {
                host: Some((start, true)),
                allocated: allocated | mask,
                zero: zero & !mask,
            },
            other => other,
        })?;
        // An entry names the cluster.
        std::mem::forget(new);
        Ok(placed)
    }

    /// Makes subclusters read as zero. A host cluster that only their entry refers to stays
    /// reserved for its guest cluster. Version 3 only.
    ///
    /// # Errors
    /// If an L2 table cannot be loaded or allocated; subclusters before it are zero by then.
    ///
    /// # Panics
    /// If `held` does not cover the clusters (I1), for a part of a compressed cluster, or in
    /// version 2.
    pub fn zero(&self, held: &Exclusive<'_>, subclusters: Range<GuestSubcluster>) -> Result<()> {
        self.remap_all(held, subclusters, |before, mask| {
            let after = self.zeroed(before, mask);
            match after {
                // The refcount of a cluster with other users is lowered instead.
                L2Entry::Standard { host: Some((_, false)), allocated: 0, zero } => {
                    L2Entry::Standard { host: None, allocated: 0, zero }
                }
                _ => after,
            }
        })
    }

    /// Makes subclusters read as zero, and frees host clusters of which no subcluster is left.
    /// Version 3 only: version 2 has no zero flag, and an unallocated cluster would make the
    /// backing file visible again (H17).
    ///
    /// # Errors
    /// As [`Image::zero`].
    ///
    /// # Panics
    /// As [`Image::zero`].
    pub fn discard(&self, held: &Exclusive<'_>, subclusters: Range<GuestSubcluster>) -> Result<()> {
        if without(Step::DiscardHidesBelow) {
            return self.uncovered(held, subclusters);
        }
        self.remap_all(held, subclusters, |before, mask| without_host(self.zeroed(before, mask)))
    }

    /// Makes subclusters unallocated, and frees host clusters of which no subcluster is left. Only
    /// for an image without a backing file, where unallocated clusters read as zero.
    ///
    /// # Errors
    /// As [`Image::zero`].
    ///
    /// # Panics
    /// If `held` does not cover the clusters (I1), for a part of a compressed cluster, or if there
    /// is a backing file (H17).
    pub fn unmap(&self, held: &Exclusive<'_>, subclusters: Range<GuestSubcluster>) -> Result<()> {
        assert!(self.reader.backing().is_none(), "unmapping would show the backing file again");
        self.uncovered(held, subclusters)
    }

    /// Does what [`Image::unmap`] does, even if there is a backing file. Tests use it to inject
    /// that error.
    #[cfg(any(test, feature = "testing"))]
    pub fn uncover(&self, held: &Exclusive<'_>, subclusters: Range<GuestSubcluster>) -> Result<()> {
        self.uncovered(held, subclusters)
    }

    fn uncovered(&self, held: &Exclusive<'_>, subclusters: Range<GuestSubcluster>) -> Result<()> {
        self.remap_all(held, subclusters, |before, mask| match self.zeroed(before, mask) {
            L2Entry::Standard { host, allocated, zero } => {
                without_host(L2Entry::Standard { host, allocated, zero: zero & !mask })
            }
            L2Entry::Compressed { .. } => unreachable!("a zeroed cluster is a standard one"),
        })
    }

    /// Returns an entry with the subclusters of `mask` made zero.
    fn zeroed(&self, before: L2Entry, mask: u32) -> L2Entry {
        match before {
            L2Entry::Standard { host, allocated, zero } => {
                L2Entry::Standard { host, allocated: allocated & !mask, zero: zero | mask }
            }
            L2Entry::Compressed { .. } => {
                let all = self.reader.geometry().all_subclusters();
                assert_eq!(mask, all, "a part of a compressed cluster has no mapping of its own");
                L2Entry::Standard { host: None, allocated: 0, zero: mask }
            }
        }
    }

    fn remap_all(
        &self,
        held: &Exclusive<'_>,
        subclusters: Range<GuestSubcluster>,
        mut becomes: impl FnMut(L2Entry, u32) -> L2Entry,
    ) -> Result<()> {
        let mut at = subclusters.start;
        while at < subclusters.end {
            at.0 +=
                self.remap(held, at..subclusters.end, |_, before, mask| becomes(before, mask))?;
        }
        Ok(())
    }

    /// Changes L2 entries; no other function does. Handles the subclusters that the first L2 table
    /// of the range maps, and returns their number. Calls `becomes` (cluster, previous entry, bits
    /// of the subclusters that belong to the range) for each cluster. Entries change first and
    /// frees are queued afterwards: step 2 of the write-back pass needs this order.
    fn remap(
        &self,
        held: &Exclusive<'_>,
        subclusters: Range<GuestSubcluster>,
        mut becomes: impl FnMut(GuestCluster, L2Entry, u32) -> L2Entry,
    ) -> Result<u64> {
        let geometry = self.reader.geometry();
        let per_cluster = u64::from(geometry.subclusters());
        let first = geometry.cluster_of(subclusters.start).0;
        let end = GuestCluster(subclusters.end.0.div_ceil(per_cluster));
        assert!(
            held.covers(&geometry.guest_range(&geometry.subclusters_in(&(first..end)))),
            "I1: a mapping changes only under its exclusive guard"
        );
        self.check_usable()?;
        let (l1_index, l2_index) = geometry.table_indexes(first);
        let count = (end.0 - first.0).min(geometry.l2_entries() - l2_index as u64);
        let count = count.min(self.journal.as_deref().map_or(u64::MAX, Journal::most_at_once));
        let mut frees: Vec<(HostCluster, u64)> = Vec::new();
        // The exclusive guard keeps other threads from changing these entries, so the entries read
        // here are the ones that `set` replaces below.
        let mut changes = Vec::new();
        for index in 0..count {
            let at = GuestCluster(first.0 + index);
            let whole = geometry.subclusters_in(&(at..GuestCluster(at.0 + 1)));
            let part = |subcluster: GuestSubcluster| {
                subcluster.0.clamp(whole.start.0, whole.end.0) - whole.start.0
            };
            let mask = geometry.subcluster_mask(part(subclusters.start)..part(subclusters.end));
            let before = self.watch(self.reader.entry(at))?;
            let after = becomes(at, before, mask);
            if after != before {
                changes.push((l2_index + index as usize, after, before));
            }
        }
        let done = ((first.0 + count) * per_cluster).min(subclusters.end.0) - subclusters.start.0;
        if changes.is_empty() {
            return Ok(done);
        }
        let (records, space) = self.announce(first.0 - l2_index as u64, &changes)?;
        let result = self.reader.tables.change(l1_index, |set| {
            for &(l2_index, after, before) in &changes {
                let replaced = L2Entry::decode(set(l2_index, after.encode(&geometry)), &geometry);
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
        Ok(done)
    }
}

/// Returns an entry without its host cluster if no subcluster is allocated in it.
fn without_host(entry: L2Entry) -> L2Entry {
    match entry {
        L2Entry::Standard { allocated: 0, zero, .. } => {
            L2Entry::Standard { host: None, allocated: 0, zero }
        }
        other => other,
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
        changes: &[(usize, L2Entry, L2Entry)],
    ) -> Result<(Vec<MappingChange>, Option<PromisedSpace<'_>>)> {
        let Some(journal) = &self.journal else { return Ok((Vec::new(), None)) };
        let geometry = self.reader.geometry();
        let mut records: Vec<MappingChange> = Vec::new();
        for &(l2_index, after, _) in changes {
            let at = GuestCluster(first + l2_index as u64);
            let raw = after.encode(&geometry);
            let joins = records
                .last_mut()
                .is_some_and(|last| last.joined_by(at, raw, geometry.cluster_size()));
            if !joins {
                let RawL2Entry { descriptor: entry, bitmap } = raw;
                records.push(MappingChange { start: at, count: 1, entry, bitmap, step: 0 });
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
    before: L2Entry,
    after: L2Entry,
    geometry: &Geometry,
) -> Option<(HostCluster, u64)> {
    let kept = after.host().map(|(host, _)| host);
    match before {
        L2Entry::Standard { host: Some((host, _)), .. } => {
            (kept != Some(host)).then_some((host, 1))
        }
        L2Entry::Compressed { at, len } => {
            let first = geometry.host_cluster(at);
            let last = (at.0 + u64::from(len) - 1) >> geometry.cluster_bits();
            Some((first, last - first.0 + 1))
        }
        L2Entry::Standard { host: None, .. } => None,
    }
}
