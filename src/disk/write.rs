//! Writing, zeroing and discarding.

use std::ops::Range;

use super::write_out::Placed;
use super::{Disk, Local, Patience};
use crate::Result;
use crate::chain::Content;
use crate::format::{GuestOffset, Mapping};
use crate::image::Image;
use crate::mutants::{Step, without};
use crate::range_lock::Exclusive;

/// Zeros are written as data (version 2) in pieces of this many bytes.
pub(super) const ZERO_PIECE: u64 = 1 << 20;

/// A large zero or discard holds at most this many bytes of the disk at a time, so that others get their turn.
const ZERO_HOLD: u64 = 1 << 30;

/// What becomes of the host clusters of a range that is to read as zero.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum HostClusters {
    Keep,
    GiveBack,
}

impl Disk {
    /// Writes if every byte is an overwrite in place that can be done at once.
    ///
    /// # Errors
    /// I/O, corruption, read-only.
    pub fn write_local(&self, offset: u64, data: &[u8]) -> Result<Local> {
        self.stats.write(offset, data.len() as u64, || {
            let image = self.image()?;
            let range = offset..offset.saturating_add(data.len() as u64);
            self.check_range(&range)?;
            let range = if without(Step::WritersHoldTheirRange) { 0..0 } else { range };
            match self.in_flight.try_shared(range) {
                Some(_shared) if self.write_in_place(image, offset, data)? => Ok(Local::Done),
                Some(_shared) if self.completes_from_below(image, offset, data.len())? => Ok(Local::Below),
                _ => Ok(Local::Miss),
            }
        })
    }

    /// As [`Disk::write`], if that needs no backing file: it waits at most for other requests that need
    /// none. With [`Local::Below`] part of the data may have been written.
    ///
    /// # Errors
    /// As [`Disk::write`].
    pub fn write_without_base(&self, offset: u64, data: &[u8]) -> Result<Local> {
        self.stats.waiting_write(offset, data.len() as u64, || self.write_waiting(offset, data, Patience::Brief))
    }

    /// Writes. Where a cluster is allocated, overlapping writes are done one after the other (H20); two plain overwrites of the same bytes at
    /// the same time leave either's bytes, as on any disk.
    ///
    /// # Errors
    /// I/O, corruption, read-only, [`crate::ErrorKind::NoSpace`]; part of the data may be written then.
    pub fn write(&self, offset: u64, data: &[u8]) -> Result<()> {
        self.stats.waiting_write(offset, data.len() as u64, || self.write_waiting(offset, data, Patience::Long).map(drop))
    }

    fn write_waiting(&self, offset: u64, data: &[u8], patience: Patience) -> Result<Local> {
        let image = self.image()?;
        self.check_range(&(offset..offset.saturating_add(data.len() as u64)))?;
        let needs_more = |at, len| -> Result<bool> { Ok(patience == Patience::Brief && self.completes_from_below(image, at, len)?) };
        // A hint, so that nothing is written twice.
        if needs_more(offset, data.len())? {
            return Ok(Local::Below);
        }
        let mut done = 0;
        while done < data.len() {
            let at = offset + done as u64;
            // A hint: both branches look again under their guard. Only one run is held at a time, so that a backing file that hangs while
            // a cluster is completed delays nobody who wants what is beside it.
            let extent = image.map(GuestOffset(at), (data.len() - done) as u64)?;
            let part = &data[done..done + extent.len as usize];
            let run = at..at + extent.len;
            let written = matches!(extent.mapping, Mapping::Data { in_place: true, .. }) && {
                let range = if without(Step::WritersHoldTheirRange) { 0..0 } else { run.clone() };
                let Some(_shared) = self.hold_shared(range, patience) else { return Ok(Local::Below) };
                self.write_in_place(image, at, part)?
            };
            if !written {
                let Some(held) = self.hold(self.aligned(&run), patience) else { return Ok(Local::Below) };
                if needs_more(at, part.len())? {
                    return Ok(Local::Below);
                }
                self.write_held(image, &held, at, part)?;
            }
            done += part.len();
        }
        Ok(Local::Done)
    }

    /// Whether a write begins or ends inside a cluster that is to be completed from below. A hint, unless
    /// the range is held.
    fn completes_from_below(&self, image: &Image, offset: u64, len: usize) -> Result<bool> {
        let end = offset + len as u64;
        let mut at = offset;
        while at < end {
            let extent = image.map(GuestOffset(at), end - at)?;
            let run = at..at + extent.len;
            if extent.mapping == Mapping::Unallocated {
                let aligned = self.aligned(&run);
                let head = aligned.start < run.start && self.chain_below(aligned.start).is_some();
                let tail = run.end < aligned.end.min(self.size()) && self.chain_below(run.end).is_some();
                if head || tail {
                    return Ok(true);
                }
            }
            at = run.end;
        }
        Ok(false)
    }

    /// Overwrites if no mapping has to change; `false`, with nothing written, otherwise. The range is held.
    fn write_in_place(&self, image: &Image, offset: u64, data: &[u8]) -> Result<bool> {
        if data.is_empty() {
            return Ok(true);
        }
        // Look at all of it before anything is written: a miss must leave nothing half done.
        let first = image.map(GuestOffset(offset), data.len() as u64)?;
        if !matches!(first.mapping, Mapping::Data { in_place: true, .. }) {
            return Ok(false);
        }
        let mut covered = first.len;
        while covered < data.len() as u64 {
            let extent = image.map(GuestOffset(offset + covered), data.len() as u64 - covered)?;
            if !matches!(extent.mapping, Mapping::Data { in_place: true, .. }) {
                return Ok(false);
            }
            covered += extent.len;
        }
        let mut done = 0;
        let mut extent = first;
        loop {
            let at = GuestOffset(offset + done as u64);
            image.write_in_place(at, &extent, &data[done..done + extent.len as usize])?;
            done += extent.len as usize;
            if done == data.len() {
                return Ok(true);
            }
            extent = image.map(GuestOffset(offset + done as u64), (data.len() - done) as u64)?;
        }
    }

    /// The write of a miss: each run in place, or into new clusters that are completed from what the guest sees there now.
    fn write_held(&self, image: &Image, held: &Exclusive<'_>, offset: u64, data: &[u8]) -> Result<()> {
        let mut done = 0;
        while done < data.len() {
            let at = offset + done as u64;
            let extent = image.map(GuestOffset(at), (data.len() - done) as u64)?;
            let part = &data[done..done + extent.len as usize];
            match extent.mapping {
                Mapping::Data { in_place: true, .. } => image.write_in_place(GuestOffset(at), &extent, part)?,
                Mapping::Zero { reserved: Some((host, true)) } => {
                    let aligned = self.aligned(&(at..at + extent.len));
                    let whole = self.completed(at, part)?;
                    image.fill_reserved(host, &whole)?;
                    image.publish_reserved(held, self.clusters(&aligned))?;
                }
                _ => {
                    let start = self.geometry().guest_cluster(GuestOffset(at));
                    let is_whole = at.is_multiple_of(self.cluster_size()) && (part.len() as u64).is_multiple_of(self.cluster_size());
                    if is_whole {
                        self.store(image, held, start, part, &mut Placed::default())?;
                    } else {
                        self.store(image, held, start, &self.completed(at, part)?, &mut Placed::default())?;
                    }
                }
            }
            done += extent.len as usize;
        }
        Ok(())
    }

    /// `data` at guest offset `at`, completed to whole clusters by what the guest reads around it; zeros beyond the end of the disk (H19).
    fn completed(&self, at: u64, data: &[u8]) -> Result<Vec<u8>> {
        let end = at + data.len() as u64;
        let aligned = self.aligned(&(at..end));
        let mut whole = vec![0; (aligned.end - aligned.start) as usize];
        let head = (at - aligned.start) as usize;
        let tail = head + data.len();
        if head > 0 {
            self.read_through(aligned.start, &mut whole[..head])?;
        }
        let readable = (aligned.end.min(self.size()) - aligned.start) as usize;
        if tail < readable {
            self.read_through(end, &mut whole[tail..readable])?;
        }
        whole[head..tail].copy_from_slice(data);
        Ok(whole)
    }

    /// The range reads as zero afterwards; host clusters stay reserved for later writes.
    ///
    /// # Errors
    /// As [`Disk::write`].
    pub fn write_zeroes(&self, range: Range<u64>) -> Result<()> {
        self.stats
            .write(range.start, range.end.saturating_sub(range.start), || self.make_zero(range, HostClusters::Keep, Patience::Long))
            .map(drop)
    }

    /// As [`Disk::write_zeroes`], if that needs no backing file; as [`Disk::write_without_base`] otherwise.
    ///
    /// # Errors
    /// As [`Disk::write`].
    pub fn write_zeroes_without_base(&self, range: Range<u64>) -> Result<Local> {
        self.stats.write(range.start, range.end.saturating_sub(range.start), || self.make_zero(range, HostClusters::Keep, Patience::Brief))
    }

    /// The range reads as zero for ever after, whatever the backing file holds (2.6); host clusters are given back.
    ///
    /// # Errors
    /// As [`Disk::write`].
    pub fn discard(&self, range: Range<u64>) -> Result<()> {
        self.stats
            .discard(range.end.saturating_sub(range.start), || self.make_zero(range, HostClusters::GiveBack, Patience::Long))
            .map(drop)
    }

    /// As [`Disk::discard`], if that needs no backing file; as [`Disk::write_without_base`] otherwise.
    ///
    /// # Errors
    /// As [`Disk::write`].
    pub fn discard_without_base(&self, range: Range<u64>) -> Result<Local> {
        let len = range.end.saturating_sub(range.start);
        self.stats.discard(len, || self.make_zero(range, HostClusters::GiveBack, Patience::Brief))
    }

    /// Whole clusters by their mapping, the edges by writing: never rounded outward.
    fn make_zero(&self, range: Range<u64>, hosts: HostClusters, patience: Patience) -> Result<Local> {
        self.image()?;
        self.check_range(&range)?;
        // Version 2 asks the chain what it holds.
        if patience == Patience::Brief && self.geometry().version() < 3 && self.chain().is_some() {
            return Ok(Local::Below);
        }
        let cluster_size = self.cluster_size();
        // The last cluster of the disk is whole where the range reaches the end of the disk.
        let end_whole = || match range.end == self.size() {
            true => range.end.next_multiple_of(cluster_size),
            false => range.end - range.end % cluster_size,
        };
        let mut at = range.start.next_multiple_of(cluster_size);
        let tail = |at: u64| at.min(range.end)..range.end;
        // Both edges before anything is done, so that little is done twice.
        if patience == Patience::Brief
            && (self.edge_is_below(&(range.start..at.min(range.end)))? || self.edge_is_below(&tail(end_whole().max(at)))?)
        {
            return Ok(Local::Below);
        }
        if self.write_zero_bytes(range.start..at.min(range.end), patience)? != Local::Done {
            return Ok(Local::Below);
        }
        while at < end_whole() {
            let end = end_whole().min(at + ZERO_HOLD);
            let Some(held) = self.hold(at..end, patience) else { return Ok(Local::Below) };
            // The size stands still now; had the disk grown meanwhile, its last cluster would hold what was written behind our range.
            let end = end.min(end_whole());
            self.make_clusters_zero(&held, at..end, hosts)?;
            at = end;
        }
        self.write_zero_bytes(tail(at), patience)
    }

    /// Whether the cluster at an edge of a range, where it has one, is only below.
    fn edge_is_below(&self, edge: &Range<u64>) -> Result<bool> {
        Ok(!edge.is_empty() && self.map(edge.start, 1)?.mapping == Mapping::Unallocated && self.chain_below(edge.start).is_some())
    }

    /// Zeros by writing, for the edges of a range; nothing is written where the bytes are known to be zero.
    fn write_zero_bytes(&self, range: Range<u64>, patience: Patience) -> Result<Local> {
        let mut at = range.start;
        while at < range.end {
            let len = (range.end - at).min(self.cluster_size() - at % self.cluster_size());
            match self.reads_as_zero(at..at + len, patience)? {
                None => return Ok(Local::Below),
                Some(true) => {}
                Some(false) if self.write_waiting(at, &vec![0; len as usize], patience)? != Local::Done => return Ok(Local::Below),
                Some(false) => {}
            }
            at += len;
        }
        Ok(Local::Done)
    }

    /// Whether a part of one cluster reads as zero already. A hint: a write that comes in between
    /// is as if it came after us.
    ///
    /// The bytes of a cluster that is not allocated are read below: zeros there cost nothing, where
    /// zeros written here would copy the rest of the cluster up. fstrim(8) of a fresh overlay
    /// begins and ends in the middle of clusters, and free space of a golden image is often zeros.
    /// `None` where that takes more than `patience`.
    fn reads_as_zero(&self, part: Range<u64>, patience: Patience) -> Result<Option<bool>> {
        let chain = {
            let Some(_shared) = self.hold_shared(part.clone(), patience) else { return Ok(None) };
            match (self.map(part.start, 1)?.mapping, self.chain_below(part.start)) {
                (Mapping::Zero { .. }, _) | (Mapping::Unallocated, None) => return Ok(Some(true)),
                (Mapping::Unallocated, Some(_)) if patience == Patience::Brief => return Ok(None),
                (Mapping::Unallocated, Some(chain)) => chain,
                _ => return Ok(Some(false)),
            }
        };
        // The chain is read-only: what it holds now it held while the guard was held.
        let mut at = part.start;
        while at < part.end {
            match chain.content(usize::MAX, at, part.end - at) {
                Ok((Content::Zero | Content::Unallocated, len)) => at += len,
                Ok((Content::Data, len)) => {
                    let mut bytes = vec![0; len as usize];
                    // A failed read below fails no request: these bytes are replaced.
                    if self.read_below(&chain, at, &mut bytes).is_err() || bytes.iter().any(|byte| *byte != 0) {
                        return Ok(Some(false));
                    }
                    at += len;
                }
                Err(_) => return Ok(Some(false)),
            }
        }
        Ok(Some(true))
    }

    fn make_clusters_zero(&self, held: &Exclusive<'_>, aligned: Range<u64>, hosts: HostClusters) -> Result<()> {
        let image = self.image()?;
        let version = self.geometry().version();
        let size = self.size();
        let mut at = aligned.start;
        while at < aligned.end.min(size) {
            let extent = image.map(GuestOffset(at), aligned.end.min(size) - at)?;
            let run = at..at + extent.len;
            let clusters = self.clusters(&self.aligned(&run));
            at = run.end;
            let shows_below = self.chain().is_some();
            match (extent.mapping, hosts) {
                // Nothing below and nothing here: zero already. (A shorter backing file may be exchanged for a longer one, so it counts.)
                (Mapping::Unallocated, _) if !shows_below => {}
                (_, HostClusters::Keep) if version >= 3 => image.zero(held, clusters)?,
                (_, HostClusters::GiveBack) if version >= 3 => image.discard(held, clusters)?,
                (_, HostClusters::GiveBack) if !shows_below => image.unmap(held, clusters)?,
                _ => self.write_zero_clusters(image, held, extent.mapping, run)?,
            }
        }
        Ok(())
    }

    /// Version 2 with a backing file has nothing but written zeros to hide it with. Where the backing file is known to be zero there is nothing
    /// to hide, and nothing is written: a guest that trims its free space must not fill the host.
    fn write_zero_clusters(&self, image: &Image, held: &Exclusive<'_>, mapping: Mapping, run: Range<u64>) -> Result<()> {
        let cluster_size = self.cluster_size();
        let chain = self.chain().filter(|_| mapping == Mapping::Unallocated);
        let mut at = run.start;
        while at < run.end {
            let mut len = run.end - at;
            if let Some(chain) = &chain {
                let (content, known) = chain.content(usize::MAX, at, len)?;
                let whole = if known == len { len } else { known - known % cluster_size };
                if content != Content::Data && whole > 0 {
                    at += whole;
                    continue;
                }
                len = len.min(known.next_multiple_of(cluster_size));
            }
            let len = len.min(ZERO_PIECE.max(cluster_size));
            self.write_held(image, held, at, &vec![0; len as usize])?;
            at += len;
        }
        Ok(())
    }
}
