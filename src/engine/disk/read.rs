//! Reads: from the overlay alone where possible, otherwise with copy-on-read of the missing
//! clusters.

use std::ops::Range;

use super::populate::PendingCopy;
use super::{Disk, Local};
use crate::chain::Chain;
use host::Result;
use host::mutants::{Step, without};
use qcow2::format::{GuestOffset, Mapping};

/// Most bytes that [`Disk::read_cached`] reads or stores, and that [`Disk::write_local`]
/// stores in new clusters. The limit keeps them short, because they run on a server
/// thread, which other requests wait for.
pub(super) const AT_ONCE: u64 = 128 << 10;

impl Disk {
    /// Reads if the overlay alone can answer at once. Never waits for another request or a backing
    /// file.
    ///
    /// # Errors
    /// I/O errors, corruption.
    pub fn read_local(&self, offset: u64, buf: &mut [u8]) -> Result<Local> {
        let local = self.stats.read(buf.len(), || self.read_local_uncounted(offset, buf))?;
        if local == Local::Done {
            self.touches.hit(&(offset..offset + buf.len() as u64));
        }
        Ok(local)
    }

    fn read_local_uncounted(&self, offset: u64, buf: &mut [u8]) -> Result<Local> {
        let range = offset..offset.saturating_add(buf.len() as u64);
        self.check_range(&range)?;
        let range = if without(Step::ReadersHoldTheirRange) { 0..0 } else { range };
        match self.in_flight.try_shared(range.clone()) {
            Some(_shared) if self.read_overlay(offset, buf)? == buf.len() => Ok(Local::Done),
            None if !self.in_flight.is_shared_lastingly(&range) => Ok(Local::Miss),
            _ => Ok(Local::Below),
        }
    }

    /// Reads if the overlay alone can answer. Waits at most for other requests that need no backing
    /// file.
    ///
    /// # Errors
    /// I/O errors, corruption.
    pub fn read_without_base(&self, offset: u64, buf: &mut [u8]) -> Result<Local> {
        let local = self.stats.waiting_read(buf.len(), || {
            let range = offset..offset.saturating_add(buf.len() as u64);
            self.check_range(&range)?;
            match self.in_flight.shared_briefly(range) {
                Some(_shared) if self.read_overlay(offset, buf)? == buf.len() => Ok(Local::Done),
                _ => Ok(Local::Below),
            }
        })?;
        if local == Local::Done {
            self.touches.hit(&(offset..offset + buf.len() as u64));
        }
        Ok(local)
    }

    /// Health probe for the watchdog: reads the first sector as [`Disk::read_local`] does.
    ///
    /// It is not a guest request and is not counted as one. If it returns, the locks and tables of
    /// the disk are available, and, if the overlay holds that sector, its file responds.
    ///
    /// # Errors
    /// As [`Disk::read_local`].
    pub fn probe(&self) -> Result<Local> {
        let mut sector = [0; 512];
        let len = self.size().min(sector.len() as u64) as usize;
        self.read_local_uncounted(0, &mut sector[..len])
    }

    /// Reads what [`Disk::read_local`] could not, if that needs no waiting either: all of the range
    /// is missing in the overlay, and the host has the bytes of the base in memory.
    ///
    /// Otherwise as [`Disk::read_and_answer`]. The copy is stored after the reply, and is
    /// written to the overlay alone, as a write in place is; where a stream is about to
    /// copy the range up, it is left to the stream (`walk.rs`).
    ///
    /// # Errors
    /// As [`Disk::read_local`].
    pub fn read_cached(
        &self,
        offset: u64,
        buf: &mut [u8],
        answer: &mut dyn FnMut(&[u8]),
    ) -> Result<Local> {
        let range = offset..offset.saturating_add(buf.len() as u64);
        let leaves_copy = self.walk.comes_to(&range);
        let mut pending = None;
        let local = self.stats.read(buf.len(), || {
            if leaves_copy {
                return self.read_below_now(range.clone(), buf);
            }
            pending = self.read_missing_now(range.clone(), buf)?;
            Ok(if pending.is_some() { Local::Done } else { Local::Below })
        })?;
        if local == Local::Done {
            // Before the reply: the guest's next read may be recorded by another thread.
            match leaves_copy {
                true => self.touches.missed_and_left(&range),
                false => self.touches.missed(&range),
            }
            answer(buf);
            self.stats.missed();
        }
        if let Some(pending) = pending {
            self.store_copies(pending, buf)?;
        }
        Ok(local)
    }

    /// Fills `buf` if all of it is missing in the overlay and the bytes are in memory.
    /// Nothing is copied up.
    fn read_below_now(&self, range: Range<u64>, buf: &mut [u8]) -> Result<Local> {
        self.check_range(&range)?;
        if buf.len() as u64 > AT_ONCE {
            return Ok(Local::Below);
        }
        // As for every read: no request changes the range while its bytes are read.
        let (Some(_shared), Some(chain)) = (self.in_flight.try_shared(range.clone()), self.chain())
        else {
            return Ok(Local::Below);
        };
        let extent = self.map(range.start, buf.len() as u64)?;
        if extent.mapping != Mapping::Unallocated || extent.len < buf.len() as u64 {
            return Ok(Local::Below);
        }
        self.read_below_cached(&chain, range.start, buf)
    }

    /// Fills `buf` if all of it is missing in the overlay and the bytes are in memory. Returns the
    /// copy to store; `None` if the read has to wait.
    fn read_missing_now(
        &self,
        range: Range<u64>,
        buf: &mut [u8],
    ) -> Result<Option<PendingCopy<'_>>> {
        self.check_range(&range)?;
        let Some(image) = self.overlay.writable() else { return Ok(None) };
        let copied = self.aligned_to_subclusters(&range);
        if !self.copy_on_read
            || copied.end > self.size()
            || copied.end - copied.start > AT_ONCE
            || image.is_pressed()
            || !self.fills.are_welcome(&**image.storage())
        {
            return Ok(None);
        }
        // A check without the lock. The chain is loaded again under the exclusive guard.
        if self.chain().is_none() {
            return Ok(None);
        }
        let (Some(held), Some(chain)) =
            (self.in_flight.try_exclusive(self.aligned(&range)), self.chain())
        else {
            return Ok(None);
        };
        let extent = image.map(GuestOffset(range.start), buf.len() as u64)?;
        if extent.mapping != Mapping::Unallocated || extent.len < buf.len() as u64 {
            return Ok(None);
        }
        self.copy_cached(&chain, held, copied, range.start, buf)
    }

    /// Reads, and copies up the missing clusters if copy-on-read is on. A copy that fails does not
    /// fail the read (P5).
    ///
    /// # Errors
    /// I/O errors, corruption.
    pub fn read(&self, offset: u64, buf: &mut [u8]) -> Result<()> {
        self.read_and_answer(offset, buf, &mut |_| ())
    }

    /// As [`Disk::read`]. Calls `answer` once with the bytes, as soon as all of them are read.
    ///
    /// The copy of the last missing run is stored from `buf` after that call, so the reply does not
    /// wait for it. A later request for the same clusters waits for the copy, because its range is
    /// held exclusively.
    ///
    /// # Errors
    /// As [`Disk::read`]. `answer` has not been called then.
    pub fn read_and_answer(
        &self,
        offset: u64,
        buf: &mut [u8],
        answer: &mut dyn FnMut(&[u8]),
    ) -> Result<()> {
        let mut missed = false;
        let pending =
            self.stats.waiting_read(buf.len(), || self.read_waiting(offset, buf, &mut missed))?;
        if missed {
            self.stats.missed();
        }
        self.touches.hit(&(offset..offset + buf.len() as u64));
        match pending {
            Some(pending) if without(Step::CopyUpNeverFailsTheRead) => {
                self.store_copies(pending, buf)?;
                answer(buf);
            }
            Some(pending) => {
                answer(buf);
                self.store_copies(pending, buf)?;
            }
            None => answer(buf),
        }
        Ok(())
    }

    /// Reads, and stores copies of all missing runs but the last one, which is returned. Sets
    /// `missed` if anything was missing in the overlay.
    fn read_waiting(
        &self,
        offset: u64,
        buf: &mut [u8],
        missed: &mut bool,
    ) -> Result<Option<PendingCopy<'_>>> {
        let range = offset..offset.saturating_add(buf.len() as u64);
        self.check_range(&range)?;
        let mut done = 0;
        while done < buf.len() {
            let at = offset + done as u64;
            let missing = {
                let _shared = self.in_flight.shared(if without(Step::ReadersHoldTheirRange) {
                    0..0
                } else {
                    at..range.end
                });
                done += self.read_overlay(at, &mut buf[done..])?;
                if done == buf.len() {
                    return Ok(None);
                }
                let at = offset + done as u64;
                at..at + self.map(at, range.end - at)?.len
            };
            *missed = true;
            // Before the read below, so that a stream can fetch what lies beside it meanwhile.
            self.touches.missed(&missing);
            let part = &mut buf[done..done + (missing.end - missing.start) as usize];
            let copies_up = self.copy_on_read
                && self
                    .overlay
                    .writable()
                    .is_some_and(|image| self.fills.are_welcome(&**image.storage()));
            done += part.len();
            // Only the missing clusters are held while the backing file is read, so requests for
            // the clusters beside them do not wait.
            if copies_up {
                let held = self.in_flight.exclusive(self.aligned(&missing));
                let pending = self.read_missing(held, missing.start, part)?;
                if missing.end == range.end {
                    return Ok(Some(pending.seen_from(offset)));
                }
                self.store_copies(pending, part)?;
            } else {
                let _shared = self.in_flight.shared(missing.clone());
                self.read_through(missing.start, part)?;
            }
        }
        Ok(None)
    }

    /// Reads the bytes that the overlay decides alone, up to the first byte that comes from below.
    /// Returns their number. The caller holds the range.
    fn read_overlay(&self, offset: u64, buf: &mut [u8]) -> Result<usize> {
        for run in self.runs(offset..offset + buf.len() as u64) {
            let run = run?;
            let at = run.range.start;
            if run.mapping() == Mapping::Unallocated && self.chain_below(at).is_some() {
                return Ok((at - offset) as usize);
            }
            self.reader().read_extent(GuestOffset(at), &run.extent, run.of_mut(buf, offset))?;
        }
        Ok(buf.len())
    }

    /// Reads without copying anything up. The caller holds the range.
    pub(super) fn read_through(&self, offset: u64, buf: &mut [u8]) -> Result<()> {
        for run in self.runs(offset..offset + buf.len() as u64) {
            let run = run?;
            let (at, part) = (run.range.start, run.of_mut(buf, offset));
            match self.chain_below(at) {
                Some(chain) if run.mapping() == Mapping::Unallocated => {
                    self.read_below(&chain, at, part)?
                }
                _ => self.reader().read_extent(GuestOffset(at), &run.extent, part)?,
            }
        }
        Ok(())
    }

    /// Reads from the backing chain, and counts the read.
    pub(super) fn read_below(&self, chain: &Chain, offset: u64, buf: &mut [u8]) -> Result<()> {
        self.stats.read_below(buf.len(), || chain.read(offset, buf))
    }

    /// As [`Disk::read_below`], if the host has the bytes in memory.
    pub(super) fn read_below_cached(
        &self,
        chain: &Chain,
        offset: u64,
        buf: &mut [u8],
    ) -> Result<Local> {
        self.stats.read_below(buf.len(), || {
            Ok(if chain.read_cached(offset, buf) { Local::Done } else { Local::Below })
        })
    }

    pub(super) fn map(&self, at: u64, max: u64) -> Result<qcow2::image::Extent> {
        self.overlay.map(GuestOffset(at), max)
    }
}

#[cfg(test)]
mod tests;
