//! Stores guest data: in place, in reserved clusters, or in new ones.

use std::borrow::Cow;
use std::ops::Range;

use super::{Extent, Image};
use crate::format::{GuestCluster, GuestOffset, Mapping};
use crate::range_lock::Exclusive;
use host::Result;

impl Image {
    /// Allocates, fills and publishes whole clusters of data, from guest cluster `start` on. Calls
    /// `placed` with the range of each run of new clusters in the file, in bytes, before the run is
    /// published.
    ///
    /// # Errors
    /// As [`Image::allocate`], [`Image::fill`] and [`Image::publish`]. Clusters that were published
    /// before the error stay.
    ///
    /// # Panics
    /// If `held` does not cover the clusters (I1), or if `data` is not whole clusters.
    pub fn store(
        &self,
        held: &Exclusive<'_>,
        start: GuestCluster,
        data: &[u8],
        mut placed: impl FnMut(Range<u64>),
    ) -> Result<()> {
        let bits = self.reader().geometry().cluster_bits();
        let (mut at, mut rest) = (start, data);
        while !rest.is_empty() {
            let allocation = self.allocate(rest.len() as u64 >> bits)?;
            let clusters = allocation.clusters();
            let (now, later) = rest.split_at((clusters << bits) as usize);
            let filled = self.fill(allocation, now)?;
            placed(filled.place());
            self.publish(held, at, filled)?;
            at.0 += clusters;
            rest = later;
        }
        Ok(())
    }

    /// Writes `data` over a run of equal mapping, which is `extent` at `at`, mapped under `held`.
    /// Overwrites clusters that belong to this image alone; fills reserved clusters, or else new
    /// ones. `around` fills a buffer with the bytes that the guest sees from an offset on. It is
    /// called to complete the clusters at the ends of the data, and not if the data is whole
    /// clusters.
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
        let whole = self.completed(at, data, around)?;
        match extent.mapping {
            Mapping::Zero { reserved: Some((host, true)) } => {
                self.fill_reserved(host, &whole)?;
                let aligned = geometry.aligned(&(at.0..at.0 + data.len() as u64));
                self.publish_reserved(held, geometry.clusters(&aligned))
            }
            _ => self.store(held, geometry.guest_cluster(at), &whole, |_| {}),
        }
    }

    /// Returns `data` at guest offset `at`, extended to whole clusters with the bytes that the
    /// guest reads around it, and with zeros beyond the end of the disk (H19).
    fn completed<'a>(
        &self,
        at: GuestOffset,
        data: &'a [u8],
        mut around: impl FnMut(u64, &mut [u8]) -> Result<()>,
    ) -> Result<Cow<'a, [u8]>> {
        let geometry = self.reader().geometry();
        let range = at.0..at.0 + data.len() as u64;
        let aligned = geometry.aligned(&range);
        if aligned == range {
            return Ok(Cow::Borrowed(data));
        }
        let mut whole = vec![0; (aligned.end - aligned.start) as usize];
        let head = geometry.in_cluster(at) as usize;
        let tail = head + data.len();
        if head > 0 {
            around(aligned.start, &mut whole[..head])?;
        }
        let readable = (aligned.end.min(geometry.size()) - aligned.start) as usize;
        if tail < readable {
            around(range.end, &mut whole[tail..readable])?;
        }
        whole[head..tail].copy_from_slice(data);
        Ok(Cow::Owned(whole))
    }
}
