//! Stores guest data: in place, in host clusters that are reserved for it, or in new ones.

use std::borrow::Cow;
use std::ops::Range;

use super::{Extent, Image};
use crate::format::{GuestOffset, GuestSubcluster, HostCluster, L2Entry, Mapping};
use crate::range_lock::Exclusive;
use host::Result;

/// Where the data of a run of guest clusters goes.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Destination {
    /// Into the host clusters that the entries name, from this one on: no other entry names them.
    Own(HostCluster),
    /// Into new host clusters: nothing of what the entries name stays in use.
    New,
    /// Into a new host cluster, with the rest of this one: other entries may name it.
    Moved(HostCluster),
}

impl Image {
    /// Stores whole subclusters of data, from guest subcluster `start` on: fills host clusters that
    /// are reserved for their guest clusters, and new ones, and publishes them. Calls `placed` with
    /// the range of each run in the file, in bytes, before the run is published.
    ///
    /// # Errors
    /// As [`Image::allocate`], [`Image::fill`] and [`Image::publish`]. What was published before
    /// the error stays.
    ///
    /// # Panics
    /// If `held` does not cover the clusters (I1), if `data` is not whole subclusters, or if it is
    /// a part of a compressed cluster.
    pub fn store(
        &self,
        held: &Exclusive<'_>,
        start: GuestSubcluster,
        data: &[u8],
        mut placed: impl FnMut(Range<u64>),
    ) -> Result<()> {
        let geometry = self.reader().geometry();
        let bits = geometry.subcluster_bits();
        let (mut at, mut rest) = (start, data);
        while !rest.is_empty() {
            let end = GuestSubcluster(at.0 + (rest.len() as u64 >> bits));
            let (destination, subclusters) = self.destination(at..end)?;
            let skip = u64::from(geometry.cluster_of(at).1) << bits;
            let len = (subclusters << bits) as usize;
            let (now, later) = rest.split_at(len);
            match destination {
                Destination::Own(host) => {
                    let filled = self.fill_own(host, skip, now)?;
                    placed(filled.place());
                    self.publish(held, at, filled)?;
                }
                Destination::New => self.store_in_new(held, at, now, &mut placed)?,
                Destination::Moved(host) => placed(self.move_cluster(held, at, host, now)?),
            }
            at.0 += subclusters;
            rest = later;
        }
        Ok(())
    }

    /// Stores whole subclusters in new clusters: in as few runs of them as there are.
    fn store_in_new(
        &self,
        held: &Exclusive<'_>,
        start: GuestSubcluster,
        data: &[u8],
        placed: &mut impl FnMut(Range<u64>),
    ) -> Result<()> {
        let geometry = self.reader().geometry();
        let bits = geometry.subcluster_bits();
        let (mut at, mut rest) = (start, data);
        while !rest.is_empty() {
            let skip = u64::from(geometry.cluster_of(at).1) << bits;
            let wanted = (skip + rest.len() as u64).div_ceil(geometry.cluster_size());
            let allocation = self.allocate(wanted)?;
            let there = (allocation.clusters() << geometry.cluster_bits()) - skip;
            let (now, later) = rest.split_at(rest.len().min(there as usize));
            let filled = self.fill(allocation, skip, now)?;
            placed(filled.place());
            self.publish(held, at, filled)?;
            at.0 += now.len() as u64 >> bits;
            rest = later;
        }
        Ok(())
    }

    /// Returns where the data of the first subclusters of a range goes, and the number of
    /// subclusters that go there.
    fn destination(&self, range: Range<GuestSubcluster>) -> Result<(Destination, u64)> {
        let geometry = self.reader().geometry();
        let per_cluster = u64::from(geometry.subclusters());
        let of = |at: GuestSubcluster| -> Result<(Destination, u64)> {
            let (cluster, place) = geometry.cluster_of(at);
            let place = u64::from(place);
            let there = (per_cluster - place).min(range.end.0 - at.0);
            let filled = geometry.subcluster_mask(place..place + there);
            let destination = match self.watch(self.reader.entry(cluster))? {
                L2Entry::Standard { host: Some((host, true)), .. } => Destination::Own(host),
                L2Entry::Standard { host: Some((host, false)), allocated, .. }
                    if allocated & !filled != 0 =>
                {
                    Destination::Moved(host)
                }
                L2Entry::Standard { .. } | L2Entry::Compressed { .. } => Destination::New,
            };
            Ok((destination, there))
        };
        let (first, mut subclusters) = of(range.start)?;
        let mut clusters = 1;
        while range.start.0 + subclusters < range.end.0 {
            let (next, more) = of(GuestSubcluster(range.start.0 + subclusters))?;
            let continues = match (first, next) {
                (Destination::Own(host), Destination::Own(next)) => next.0 == host.0 + clusters,
                (Destination::New, Destination::New) => true,
                _ => false,
            };
            if !continues {
                break;
            }
            subclusters += more;
            clusters += 1;
        }
        Ok((first, subclusters))
    }

    /// Writes `data` over a run of equal mapping, which is `extent` at `at`, mapped under `held`.
    /// Overwrites clusters that belong to this image alone; fills reserved clusters, or else new
    /// ones. `around` fills a buffer with the bytes that the guest sees from an offset on. It is
    /// called to complete the subclusters at the ends of the data, and not if the data is whole
    /// subclusters; a cluster that is compressed is completed as a whole.
    ///
    /// # Errors
    /// I/O, [`host::ErrorKind::NoSpace`], corruption; the error of `around`, before which nothing
    /// is written.
    ///
    /// # Panics
    /// If `held` does not cover the clusters (I1), or if `data` is longer than the run.
    pub fn write_run(
        &self,
        held: &Exclusive<'_>,
        at: GuestOffset,
        extent: &Extent,
        data: &[u8],
        around: impl FnMut(u64, &mut [u8]) -> Result<()>,
    ) -> Result<()> {
        assert!(data.len() as u64 <= extent.len);
        if matches!(extent.mapping, Mapping::Data { in_place: true, .. }) {
            return self.write_in_place(at, extent, data);
        }
        let geometry = self.reader().geometry();
        let range = at.0..at.0 + data.len() as u64;
        let whole = match extent.mapping {
            Mapping::Compressed { .. } => geometry.aligned(&range),
            _ => geometry.aligned_to_subclusters(&range),
        };
        let start = geometry.guest_subcluster(GuestOffset(whole.start));
        self.store(held, start, &self.completed(whole, at, data, around)?, |_| {})
    }

    /// Returns `data` at guest offset `at`, extended to `whole` with the bytes that the guest reads
    /// around it, and with zeros beyond the end of the disk (H19).
    fn completed<'a>(
        &self,
        whole: Range<u64>,
        at: GuestOffset,
        data: &'a [u8],
        mut around: impl FnMut(u64, &mut [u8]) -> Result<()>,
    ) -> Result<Cow<'a, [u8]>> {
        let range = at.0..at.0 + data.len() as u64;
        if whole == range {
            return Ok(Cow::Borrowed(data));
        }
        let size = self.reader().geometry().size();
        let mut bytes = vec![0; (whole.end - whole.start) as usize];
        let head = (range.start - whole.start) as usize;
        let tail = head + data.len();
        if head > 0 {
            around(whole.start, &mut bytes[..head])?;
        }
        let readable = (whole.end.min(size) - whole.start) as usize;
        if tail < readable {
            around(range.end, &mut bytes[tail..readable])?;
        }
        bytes[head..tail].copy_from_slice(data);
        Ok(Cow::Owned(bytes))
    }
}
