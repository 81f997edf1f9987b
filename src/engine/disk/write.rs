//! Writing, zeroing and discarding.

use std::ops::Range;

use super::read::AT_ONCE;
use super::{Disk, Local, Patience};
use crate::chain::Content;
use host::Result;
use host::mutants::{Step, without};
use host::zeros::resident_zeros;
use qcow2::format::{GuestOffset, Mapping};
use qcow2::image::Image;
use qcow2::range_lock::Exclusive;

/// Piece size, in bytes, in which version 2 images write zeros as data. It bounds the buffer of
/// zeros.
pub(super) const ZERO_PIECE: u64 = 1 << 20;

/// Bytes of the disk that a large zero or discard holds at a time, so that other requests get their
/// turn in between.
const ZERO_HOLD: u64 = 1 << 30;

/// What happens to the host clusters of a range that becomes zero.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum HostClusters {
    Keep,
    GiveBack,
}

impl Disk {
    /// Writes if that needs no waiting: every byte can be overwritten in place, or a small write is
    /// stored in new or reserved clusters, and no backing file is needed to complete them. The new
    /// clusters are written to the overlay's file alone, as a write in place is.
    ///
    /// # Errors
    /// I/O errors, corruption, a read-only disk.
    pub fn write_local(&self, offset: u64, data: &[u8]) -> Result<Local> {
        let local = self.stats.write(offset, data.len() as u64, || {
            let image = self.image()?;
            let range = offset..offset.saturating_add(data.len() as u64);
            self.check_range(&range)?;
            let held = if without(Step::WritersHoldTheirRange) { 0..0 } else { range.clone() };
            match self.in_flight.try_shared(held) {
                Some(_shared) if self.write_in_place(image, offset, data)? => {
                    return Ok(Local::Done);
                }
                Some(_shared) if self.completes_from_below(offset, data.len())? => {
                    return Ok(Local::Below);
                }
                Some(_shared) => {}
                None => return Ok(Local::Miss),
            }
            self.store_now(image, &range, data)
        });
        self.note_overwritten(local, offset..offset.saturating_add(data.len() as u64))
    }

    /// Notes that a request has overwritten the range, if it has.
    fn note_overwritten(&self, done: Result<Local>, range: Range<u64>) -> Result<Local> {
        if matches!(done, Ok(Local::Done)) {
            self.touches.overwritten(&range);
        }
        done
    }

    /// As [`Disk::write`], but only if no backing file is needed. Waits at most for other requests
    /// that need no backing file. With [`Local::Below`], part of the data may have been written.
    ///
    /// # Errors
    /// As [`Disk::write`].
    pub fn write_without_base(&self, offset: u64, data: &[u8]) -> Result<Local> {
        let local = self.stats.waiting_write(offset, data.len() as u64, || {
            self.write_waiting(offset, data, Patience::Brief)
        });
        self.note_overwritten(local, offset..offset.saturating_add(data.len() as u64))
    }

    /// Writes `data` at guest offset `offset`.
    ///
    /// Where clusters are allocated, overlapping writes are serialized by the range lock (H20). Two
    /// concurrent in-place writes of the same bytes leave the bytes of either one, as on any disk.
    ///
    /// # Errors
    /// I/O errors, corruption, a read-only disk, [`host::ErrorKind::NoSpace`]. Part of the data may
    /// have been written.
    pub fn write(&self, offset: u64, data: &[u8]) -> Result<()> {
        let local = self.stats.waiting_write(offset, data.len() as u64, || {
            self.write_waiting(offset, data, Patience::Long)
        });
        self.note_overwritten(local, offset..offset.saturating_add(data.len() as u64)).map(drop)
    }

    fn write_waiting(&self, offset: u64, data: &[u8], patience: Patience) -> Result<Local> {
        let image = self.image()?;
        self.check_range(&(offset..offset.saturating_add(data.len() as u64)))?;
        let needs_more = |at, len| -> Result<bool> {
            Ok(patience == Patience::Brief && self.completes_from_below(at, len)?)
        };
        // A hint without a guard. It avoids writing a part of the data that would be written again
        // later.
        if needs_more(offset, data.len())? {
            return Ok(Local::Below);
        }
        let mut done = 0;
        while done < data.len() {
            let at = offset + done as u64;
            // A hint: both branches map the run again under their guard. Only one run is held at a
            // time, so a backing file that hangs while a cluster is completed does not delay
            // requests for the clusters beside it.
            let extent = image.map(GuestOffset(at), (data.len() - done) as u64)?;
            let part = &data[done..done + extent.len as usize];
            let run = at..at + extent.len;
            let written = matches!(extent.mapping, Mapping::Data { in_place: true, .. }) && {
                let range = if without(Step::WritersHoldTheirRange) { 0..0 } else { run.clone() };
                let Some(_shared) = self.hold_shared(range, patience) else {
                    return Ok(Local::Below);
                };
                self.write_in_place(image, at, part)?
            };
            if !written {
                let Some(held) = self.hold(self.aligned(&run), patience) else {
                    return Ok(Local::Below);
                };
                if needs_more(at, part.len())? {
                    return Ok(Local::Below);
                }
                self.write_held(image, &held, at, part)?;
            }
            done += part.len();
        }
        Ok(Local::Done)
    }

    /// Stores a small write if no other request uses its clusters and no backing file is needed.
    /// Otherwise writes nothing.
    fn store_now(&self, image: &Image, range: &Range<u64>, data: &[u8]) -> Result<Local> {
        let stored = self.aligned_to_subclusters(range);
        if stored.end - stored.start > AT_ONCE || image.is_pressed() {
            return Ok(Local::Miss);
        }
        let clusters = self.aligned(range);
        let Some(held) = self.in_flight.try_exclusive(clusters) else { return Ok(Local::Miss) };
        // The mapping may have changed since the shared guard was dropped.
        if self.completes_from_below(range.start, data.len())? {
            return Ok(Local::Below);
        }
        for run in self.runs(range.clone()) {
            // Such a cluster is decompressed and stored as a whole.
            if matches!(run?.mapping(), Mapping::Compressed { .. }) && self.cluster_size() > AT_ONCE
            {
                return Ok(Local::Miss);
            }
        }
        self.write_held(image, &held, range.start, data)?;
        Ok(Local::Done)
    }

    /// Whether a write begins or ends inside a subcluster that must be completed from below. A
    /// hint, unless the caller holds the range.
    fn completes_from_below(&self, offset: u64, len: usize) -> Result<bool> {
        for run in self.runs(offset..offset + len as u64) {
            let run = run?;
            if run.mapping() == Mapping::Unallocated {
                let aligned = self.aligned_to_subclusters(&run.range);
                let head =
                    aligned.start < run.range.start && self.chain_below(aligned.start).is_some();
                let tail = run.range.end < aligned.end.min(self.size())
                    && self.chain_below(run.range.end).is_some();
                if head || tail {
                    return Ok(true);
                }
            }
        }
        Ok(false)
    }

    /// Overwrites the range if no mapping has to change. Otherwise writes nothing and returns
    /// `false`. The caller holds the range.
    fn write_in_place(&self, image: &Image, offset: u64, data: &[u8]) -> Result<bool> {
        if data.is_empty() {
            return Ok(true);
        }
        // The whole range is mapped before the first byte is written, so that a miss writes
        // nothing.
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

    /// Writes a range whose clusters are held exclusively. Each run is written in place, or stored
    /// in whole subclusters, which are completed with the bytes that the guest sees there now.
    fn write_held(
        &self,
        image: &Image,
        held: &Exclusive<'_>,
        offset: u64,
        data: &[u8],
    ) -> Result<()> {
        for run in self.runs(offset..offset + data.len() as u64) {
            let run = run?;
            let (at, part) = (GuestOffset(run.range.start), run.of(data, offset));
            image.write_run(held, at, &run.extent, part, |at, buf| self.read_through(at, buf))?;
        }
        Ok(())
    }

    /// Makes the range read as zero. Its host clusters stay allocated for later writes.
    ///
    /// # Errors
    /// As [`Disk::write`].
    pub fn write_zeroes(&self, range: Range<u64>) -> Result<()> {
        let local = self.stats.write(range.start, range.end.saturating_sub(range.start), || {
            self.make_zero(range.clone(), HostClusters::Keep, Patience::Long)
        });
        self.note_overwritten(local, range).map(drop)
    }

    /// As [`Disk::write_zeroes`], but only if no backing file is needed; waits like
    /// [`Disk::write_without_base`].
    ///
    /// # Errors
    /// As [`Disk::write`].
    pub fn write_zeroes_without_base(&self, range: Range<u64>) -> Result<Local> {
        let local = self.stats.write(range.start, range.end.saturating_sub(range.start), || {
            self.make_zero(range.clone(), HostClusters::Keep, Patience::Brief)
        });
        self.note_overwritten(local, range)
    }

    /// Makes the range read as zero from now on, whatever the backing file holds (H17), and frees
    /// its host clusters.
    ///
    /// # Errors
    /// As [`Disk::write`].
    pub fn discard(&self, range: Range<u64>) -> Result<()> {
        let local = self.stats.discard(range.end.saturating_sub(range.start), || {
            self.make_zero(range.clone(), HostClusters::GiveBack, Patience::Long)
        });
        self.note_overwritten(local, range).map(drop)
    }

    /// As [`Disk::discard`], but only if no backing file is needed; waits like
    /// [`Disk::write_without_base`].
    ///
    /// # Errors
    /// As [`Disk::write`].
    pub fn discard_without_base(&self, range: Range<u64>) -> Result<Local> {
        let len = range.end.saturating_sub(range.start);
        let local = self.stats.discard(len, || {
            self.make_zero(range.clone(), HostClusters::GiveBack, Patience::Brief)
        });
        self.note_overwritten(local, range)
    }

    /// Makes a range zero: whole subclusters by changing their mapping, partial ones at the edges
    /// by writing zeros. The range is never rounded outward.
    fn make_zero(
        &self,
        range: Range<u64>,
        hosts: HostClusters,
        patience: Patience,
    ) -> Result<Local> {
        self.image()?;
        self.check_range(&range)?;
        // Version 2 needs to ask the chain what it holds, see `write_zero_clusters`.
        if patience == Patience::Brief && self.geometry().version() < 3 && self.chain().is_some() {
            return Ok(Local::Below);
        }
        let end_whole = || self.geometry().whole_end(range.end);
        let mut at = range.start.next_multiple_of(self.geometry().subcluster_size());
        let tail = |at: u64| at.min(range.end)..range.end;
        // Both edges are checked before anything is written, so that little is written twice.
        if patience == Patience::Brief
            && (self.edge_is_below(&(range.start..at.min(range.end)))?
                || self.edge_is_below(&tail(end_whole().max(at)))?)
        {
            return Ok(Local::Below);
        }
        if self.write_zero_bytes(range.start..at.min(range.end), patience)? != Local::Done {
            return Ok(Local::Below);
        }
        while at < end_whole() {
            let end = end_whole().min(at + ZERO_HOLD);
            let Some(held) = self.hold(self.aligned(&(at..end)), patience) else {
                return Ok(Local::Below);
            };
            // The size cannot change while the range is held. If the disk has grown since the last
            // check, its former last subcluster no longer counts as whole: it may hold data that
            // was written behind the range.
            let end = end.min(end_whole());
            self.make_subclusters_zero(&held, at..end, hosts)?;
            at = end;
        }
        self.write_zero_bytes(tail(at), patience)
    }

    /// Whether the subcluster at an edge of a range exists only in a backing file. An empty edge
    /// has no subcluster.
    fn edge_is_below(&self, edge: &Range<u64>) -> Result<bool> {
        Ok(!edge.is_empty()
            && self.map(edge.start, 1)?.mapping == Mapping::Unallocated
            && self.chain_below(edge.start).is_some())
    }

    /// Writes zeros to the edges of a range, except where the bytes already read as zero.
    fn write_zero_bytes(&self, range: Range<u64>, patience: Patience) -> Result<Local> {
        let mut at = range.start;
        while at < range.end {
            let size = self.geometry().subcluster_size();
            let len = (range.end - at).min(size - at % size);
            match self.reads_as_zero(at..at + len, patience)? {
                None => return Ok(Local::Below),
                Some(true) => {}
                Some(false)
                    if self.write_waiting(at, &resident_zeros(len as usize), patience)?
                        != Local::Done =>
                {
                    return Ok(Local::Below);
                }
                Some(false) => {}
            }
            at += len;
        }
        Ok(Local::Done)
    }

    /// Whether a part of one subcluster already reads as zero; `None` where `patience` does not
    /// allow the wait. A hint: a concurrent write counts as a write after this request.
    ///
    /// The bytes of an unallocated subcluster are read from below. If they are zeros, nothing has
    /// to be written, whereas writing zeros would copy up the rest of the subcluster. This pays off
    /// because fstrim(8) of a fresh overlay begins and ends inside clusters, and the free space of
    /// a base image is often zeros.
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
        // The chain is read-only: its content is the same as while the guard was held.
        let mut at = part.start;
        while at < part.end {
            match chain.content(usize::MAX, at, part.end - at) {
                Ok((Content::Zero | Content::Unallocated, len)) => at += len,
                Ok((Content::Data, len)) => {
                    let mut bytes = vec![0; len as usize];
                    // A failed read from below does not fail the request, because these bytes are
                    // replaced.
                    if self.read_below(&chain, at, &mut bytes).is_err()
                        || bytes.iter().any(|byte| *byte != 0)
                    {
                        return Ok(Some(false));
                    }
                    at += len;
                }
                Err(_) => return Ok(Some(false)),
            }
        }
        Ok(Some(true))
    }

    fn make_subclusters_zero(
        &self,
        held: &Exclusive<'_>,
        aligned: Range<u64>,
        hosts: HostClusters,
    ) -> Result<()> {
        let image = self.image()?;
        let version = self.geometry().version();
        let size = self.size();
        let mut at = aligned.start;
        while at < aligned.end.min(size) {
            let extent = image.map(GuestOffset(at), aligned.end.min(size) - at)?;
            let run = at..at + extent.len;
            let subclusters = self.geometry().mapped_with(extent.mapping, &run);
            at = run.end;
            let shows_below = self.chain().is_some();
            match (extent.mapping, hosts) {
                // A compressed cluster has one mapping: its other bytes are stored again.
                (Mapping::Compressed { .. }, _) if !self.geometry().is_whole_clusters(&run) => {
                    self.write_zero_clusters(image, held, extent.mapping, run)?
                }
                // Unallocated without a chain is zero already. A chain counts even where it ends
                // before this cluster, because a shorter backing file may be exchanged for a longer
                // one.
                (Mapping::Unallocated, _) if !shows_below => {}
                (_, HostClusters::Keep) if version >= 3 => image.zero(held, subclusters)?,
                (_, HostClusters::GiveBack) if version >= 3 => image.discard(held, subclusters)?,
                (_, HostClusters::GiveBack) if !shows_below => image.unmap(held, subclusters)?,
                _ => self.write_zero_clusters(image, held, extent.mapping, run)?,
            }
        }
        Ok(())
    }

    /// Writes zeros over a run that cannot be mapped to zero: in a version 2 image with a backing
    /// file, where only written zeros can hide the backing file, or in a part of a compressed
    /// cluster. Where the backing file is known to be zero, nothing is written: a guest that trims
    /// its free space must not fill the host.
    fn write_zero_clusters(
        &self,
        image: &Image,
        held: &Exclusive<'_>,
        mapping: Mapping,
        run: Range<u64>,
    ) -> Result<()> {
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
            self.write_held(image, held, at, &resident_zeros(len as usize))?;
            at += len;
        }
        Ok(())
    }
}
