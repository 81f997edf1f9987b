//! Reading: from the overlay alone if it can be, copying up what is missing otherwise.

use super::populate::Unstored;
use super::{Disk, Local, Overlay};
use crate::Result;
use crate::chain::Chain;
use crate::format::{GuestOffset, Mapping};
use crate::mutants::{Step, without};

/// The most bytes that are copied up by who must not be kept long.
const AT_ONCE: u64 = 128 << 10;

impl Disk {
    /// Reads if the overlay alone can answer at once; never waits for another request or for a backing file.
    ///
    /// # Errors
    /// I/O, corruption.
    pub fn read_local(&self, offset: u64, buf: &mut [u8]) -> Result<Local> {
        self.stats.read(buf.len(), || self.read_local_uncounted(offset, buf))
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

    /// Reads if the overlay alone can answer, waiting at most for other requests that need no base.
    ///
    /// # Errors
    /// I/O, corruption.
    pub fn read_without_base(&self, offset: u64, buf: &mut [u8]) -> Result<Local> {
        self.stats.waiting_read(buf.len(), || {
            let range = offset..offset.saturating_add(buf.len() as u64);
            self.check_range(&range)?;
            match self.in_flight.shared_briefly(range) {
                Some(_shared) if self.read_overlay(offset, buf)? == buf.len() => Ok(Local::Done),
                _ => Ok(Local::Below),
            }
        })
    }

    /// Reads the first sector as [`Disk::read_local`] does, for nobody: it is no request of the guest, and not counted as one. That it returns at all says
    /// that the locks and tables of the disk can be had, and, where the overlay holds that sector, that the file answers.
    ///
    /// # Errors
    /// As [`Disk::read_local`].
    pub fn probe(&self) -> Result<Local> {
        let mut sector = [0; 512];
        let len = self.size().min(sector.len() as u64) as usize;
        self.read_local_uncounted(0, &mut sector[..len])
    }

    /// Reads what [`Disk::read_local`] could not, if it takes no waiting either: all of it is missing, and the host has what lies below in memory. As
    /// [`Disk::read_and_answer`] for the rest; what is stored afterwards is written to the overlay alone, like a write in place.
    ///
    /// # Errors
    /// As [`Disk::read_local`].
    pub fn read_cached(&self, offset: u64, buf: &mut [u8], answer: &mut dyn FnMut(&[u8])) -> Result<Local> {
        let mut unstored = None;
        let local = self.stats.read(buf.len(), || {
            unstored = self.read_missing_now(offset, buf)?;
            Ok(if unstored.is_some() { Local::Done } else { Local::Below })
        })?;
        if let Some(unstored) = unstored {
            answer(buf);
            self.stats.missed();
            self.store_copies(unstored, buf)?;
        }
        Ok(local)
    }

    /// What was missing, all of `buf`, if it is here without waiting; what is to be stored.
    fn read_missing_now(&self, offset: u64, buf: &mut [u8]) -> Result<Option<Unstored<'_>>> {
        let range = offset..offset.saturating_add(buf.len() as u64);
        self.check_range(&range)?;
        let Overlay::Writable(image) = &self.overlay else { return Ok(None) };
        let aligned = self.aligned(&range);
        if !self.copy_on_read
            || aligned.end > self.size()
            || aligned.end - aligned.start > AT_ONCE
            || !self.fills.are_welcome(&**self.reader().storage())
        {
            return Ok(None);
        }
        // Looked at before the range is held, to spare who reads above qcow2 the way; which chain it is counts only afterwards.
        if !self.chain().is_some_and(|chain| chain.has_cached()) {
            return Ok(None);
        }
        let (Some(held), Some(chain)) = (self.in_flight.try_exclusive(aligned.clone()), self.chain()) else { return Ok(None) };
        let extent = image.map(GuestOffset(offset), buf.len() as u64)?;
        if extent.mapping != Mapping::Unallocated || extent.len < buf.len() as u64 {
            return Ok(None);
        }
        self.copy_cached(&chain, held, &aligned, offset, buf)
    }

    /// Reads, copying up what was missing if copy-on-read is on. A copy that fails does not fail the read (P5).
    ///
    /// # Errors
    /// I/O, corruption.
    pub fn read(&self, offset: u64, buf: &mut [u8]) -> Result<()> {
        self.read_and_answer(offset, buf, &mut |_| ())
    }

    /// As [`Disk::read`]. `answer` gets the bytes, once, as soon as all of them are there: nobody waits for the last copy, which is stored afterwards, from
    /// `buf`. Whoever wants the same clusters meanwhile waits for that.
    ///
    /// # Errors
    /// As [`Disk::read`]; `answer` has not been called then.
    pub fn read_and_answer(&self, offset: u64, buf: &mut [u8], answer: &mut dyn FnMut(&[u8])) -> Result<()> {
        let mut missed = false;
        let unstored = self.stats.waiting_read(buf.len(), || self.read_waiting(offset, buf, &mut missed))?;
        if missed {
            self.stats.missed();
        }
        match unstored {
            Some(unstored) if without(Step::CopyUpNeverFailsTheRead) => {
                self.store_copies(unstored, buf)?;
                answer(buf);
            }
            Some(unstored) => {
                answer(buf);
                self.store_copies(unstored, buf)?;
            }
            None => answer(buf),
        }
        Ok(())
    }

    /// Reads, and stores copies of all that was missing but the last run, which is returned. `missed` becomes true where anything was.
    fn read_waiting(&self, offset: u64, buf: &mut [u8], missed: &mut bool) -> Result<Option<Unstored<'_>>> {
        let range = offset..offset.saturating_add(buf.len() as u64);
        self.check_range(&range)?;
        let mut done = 0;
        while done < buf.len() {
            let at = offset + done as u64;
            let missing = {
                let _shared = self.in_flight.shared(if without(Step::ReadersHoldTheirRange) { 0..0 } else { at..range.end });
                done += self.read_overlay(at, &mut buf[done..])?;
                if done == buf.len() {
                    return Ok(None);
                }
                let at = offset + done as u64;
                at..at + self.map(at, range.end - at)?.len
            };
            *missed = true;
            let part = &mut buf[done..done + (missing.end - missing.start) as usize];
            let copies_up = self.copy_on_read && !self.is_read_only() && self.fills.are_welcome(&**self.reader().storage());
            done += part.len();
            // Only what is missing is held while the backing file is read: who wants what is beside it does not wait.
            if copies_up {
                let held = self.in_flight.exclusive(self.aligned(&missing));
                let unstored = self.read_missing(held, missing.start, part)?;
                if missing.end == range.end {
                    return Ok(Some(unstored.seen_from(offset)));
                }
                self.store_copies(unstored, part)?;
            } else {
                let _shared = self.in_flight.shared(missing.clone());
                self.read_through(missing.start, part)?;
            }
        }
        Ok(None)
    }

    /// Reads what the overlay decides by itself, up to the first byte that comes from below; says how many bytes that is. The range is held.
    fn read_overlay(&self, offset: u64, buf: &mut [u8]) -> Result<usize> {
        let mut done = 0;
        while done < buf.len() {
            let at = offset + done as u64;
            let extent = self.map(at, (buf.len() - done) as u64)?;
            if extent.mapping == Mapping::Unallocated && self.chain_below(at).is_some() {
                break;
            }
            let part = &mut buf[done..done + extent.len as usize];
            self.reader().read_extent(GuestOffset(at), &extent, part)?;
            done += extent.len as usize;
        }
        Ok(done)
    }

    /// Reads without copying anything up. The range is held.
    pub(super) fn read_through(&self, offset: u64, buf: &mut [u8]) -> Result<()> {
        let mut done = 0;
        while done < buf.len() {
            let at = offset + done as u64;
            let extent = self.map(at, (buf.len() - done) as u64)?;
            let part = &mut buf[done..done + extent.len as usize];
            match self.chain_below(at) {
                Some(chain) if extent.mapping == Mapping::Unallocated => self.read_below(&chain, at, part)?,
                _ => self.reader().read_extent(GuestOffset(at), &extent, part)?,
            }
            done += extent.len as usize;
        }
        Ok(())
    }

    /// Reads from the backing chain.
    pub(super) fn read_below(&self, chain: &Chain, offset: u64, buf: &mut [u8]) -> Result<()> {
        self.stats.read_below(buf.len(), || chain.read(offset, buf))
    }

    pub(super) fn map(&self, at: u64, max: u64) -> Result<crate::image::Extent> {
        match &self.overlay {
            Overlay::Writable(image) => image.map(GuestOffset(at), max),
            Overlay::ReadOnly(reader) => reader.map(GuestOffset(at), max),
        }
    }
}

#[cfg(test)]
mod tests;
