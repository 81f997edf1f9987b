//! Copying a range up from the chain: for a reader that waits (copy-on-read) and for nobody (stream). One mechanism, two users.
//!
//! For nobody, whole clusters of a raw file are not copied but cloned, where the file system can share blocks between files: nothing is read, and
//! nothing takes space. All else is as with a copy: the look under the exclusive guard (I4), new clusters written whole before they are named (I3),
//! the barrier before an entry names them (R1). Whatever a clone fails of, the copy takes over and finds out what is wrong, if anything is: so a base
//! that shrank is an error here as it is there (P9). Zeros that the file system does not know of are cloned like any data; they take no space either.
//!
//! For a reader that waits the bytes are in hand already. To clone them as well was measured (XFS, random places): clusters of 64 KiB cost 20 µs
//! either way, and what was cloned is not in the page cache under its new name, so the next read of it was three to eight times as slow. They are
//! written.

use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use super::bounce::Bounce;
use super::reserve::Reserve;
use super::write_out::Placed;
use super::{Ahead, CopyPause, Disk, Local};
use crate::Result;
use crate::chain::{Chain, Cloneable, Content};
use crate::format::{GuestCluster, GuestOffset, Mapping};
use crate::image::Image;
use crate::mutants::{Step, without};
use crate::range_lock::Exclusive;
use crate::storage::{Ask, Storage};
use crate::sync::{Mutex, rank};

/// After a copy-up failed (no space, I/O error on the overlay) reads come straight from below for this long before one tries again (H14).
const FILL_PAUSE: Duration = Duration::from_secs(5);

/// What one populate did, in bytes.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct Populated {
    /// Read from below and written to the overlay, or cloned.
    pub copied: u64,
    /// Read from below, found to be zero, recorded as zero.
    pub zeroed: u64,
    /// Known without reading: held by the overlay already, or zero, or nothing below.
    pub skipped: u64,
}

/// What a read has brought from below and the overlay does not hold yet. As long as this exists nobody else gets at these clusters.
#[derive(Debug)]
pub(super) struct Unstored<'a> {
    held: Exclusive<'a>,
    /// Guest offset of the reader's buffer.
    offset: u64,
    /// Guest offset of the first cluster, and whole clusters from there on.
    copies: Vec<(u64, Copied)>,
}

impl Unstored<'_> {
    /// The same, for a buffer that begins at guest offset `offset`, further to the front.
    pub(super) fn seen_from(self, offset: u64) -> Self {
        Unstored { offset, ..self }
    }
}

/// Where the bytes of whole clusters are.
#[derive(Debug)]
enum Copied {
    /// In the reader's own buffer, so many bytes.
    Buffer(usize),
    Bounce(Bounce),
}

/// How clusters come up that the overlay does not hold.
#[derive(Clone, Copy, Debug)]
pub(super) enum Way<'a> {
    /// Not at all: nobody below holds anything.
    Leave,
    /// They become zero clusters.
    Zero,
    /// The blocks that hold them below become theirs.
    Clone(Cloneable<'a>),
    /// They are read and written.
    Read,
}

/// Whether copying up on reads works at present, and there is room for it.
#[derive(Debug)]
pub(super) struct FillHealth {
    reserve: Reserve,
    failures: AtomicU64,
    paused_until: Mutex<{ rank::LEAF }, Option<Instant>>,
}

impl FillHealth {
    /// See [`super::DiskOptions::reserve`].
    pub fn new(reserve: Option<u64>) -> FillHealth {
        FillHealth { reserve: Reserve::new(reserve), failures: AtomicU64::new(0), paused_until: Mutex::new(None) }
    }

    /// Whether a read should copy up what it misses.
    pub fn are_welcome(&self, overlay: &dyn Storage) -> bool {
        // The common case without a lock: nothing ever failed.
        let healthy = self.failures.load(Ordering::Relaxed) == 0 || self.paused_until.lock().is_none_or(|until| Instant::now() >= until);
        healthy && self.reserve.allows(overlay)
    }

    /// Why reads do not copy up at present.
    pub fn pause(&self, overlay: &dyn Storage) -> Option<CopyPause> {
        if self.paused_until.lock().is_some_and(|until| Instant::now() < until) {
            return Some(CopyPause::Error);
        }
        self.reserve.has_stopped(overlay).then_some(CopyPause::Reserve)
    }

    fn failed(&self, error: &crate::Error) {
        let before = self.failures.fetch_add(1, Ordering::Relaxed);
        let first_of_pause = {
            let mut paused_until = self.paused_until.lock();
            let now = Instant::now();
            let first = paused_until.is_none_or(|until| now >= until);
            *paused_until = Some(now + FILL_PAUSE);
            first
        };
        if first_of_pause {
            log::warn!(
                "copy-on-read failed and pauses for {FILL_PAUSE:?}, reads are answered from below: {error} (failure {})",
                before + 1
            );
        }
    }
}

impl Disk {
    /// Copies up what the first `depth` backing layers hold of `range` and the overlay does not, whole clusters.
    ///
    /// Only clusters that are missing are held, so that a backing file that hangs delays nobody who wants what is beside them. What was copied
    /// is on its way to the disk when this returns (`write_out.rs`).
    ///
    /// # Errors
    /// I/O on either side, [`crate::ErrorKind::NoSpace`], corruption. What was copied before stays.
    pub fn populate(&self, range: Range<u64>, depth: usize) -> Result<Populated> {
        self.populate_read(range, depth, Ahead::default())
    }

    /// As [`Disk::populate`], but what was read ahead is not read again.
    ///
    /// # Errors
    /// As [`Disk::populate`]; those of reading ahead, where what could not be read is still missing.
    pub fn populate_read(&self, range: Range<u64>, depth: usize, mut ahead: Ahead) -> Result<Populated> {
        self.check_range(&range)?;
        let mut placed = Placed::default();
        let populated = self.populate_missing(range, depth, &mut ahead, &mut placed);
        // Nothing is held any more; what was copied before an error stays as well.
        self.start_write_out(&placed);
        populated
    }

    fn populate_missing(&self, range: Range<u64>, depth: usize, ahead: &mut Ahead, placed: &mut Placed) -> Result<Populated> {
        let mut populated = Populated::default();
        let aligned = self.aligned(&range);
        let end = aligned.end.min(self.size());
        let mut at = aligned.start;
        while at < end {
            // A hint: what is missing by now is looked at again when it is held.
            let extent = self.map(at, end - at)?;
            if extent.mapping == Mapping::Unallocated && self.chain().is_some() {
                let run = at..at + extent.len;
                let held = self.in_flight.exclusive(self.aligned(&run));
                let of_run = self.populate_held(&held, run, depth, ahead, placed)?;
                self.stats.streamed(of_run.copied);
                populated += of_run;
            } else {
                populated.skipped += extent.len;
            }
            at += extent.len;
        }
        Ok(populated)
    }

    /// As [`Disk::populate_read`] for a range that is held.
    fn populate_held(
        &self,
        held: &Exclusive<'_>,
        range: Range<u64>,
        depth: usize,
        ahead: &mut Ahead,
        placed: &mut Placed,
    ) -> Result<Populated> {
        let image = self.image()?;
        let mut populated = Populated::default();
        let size = self.size();
        let aligned = self.aligned(&range);
        let end = aligned.end.min(size);
        let mut at = aligned.start;
        while at < end {
            let extent = image.map(GuestOffset(at), end - at)?;
            // I4: what the overlay holds by now, whoever put it there, is never replaced.
            let mapping = if without(Step::LookAgainBeforeCopyUp) { Mapping::Unallocated } else { extent.mapping };
            let (Mapping::Unallocated, Some(chain)) = (mapping, self.chain()) else {
                populated.skipped += extent.len;
                at += extent.len;
                continue;
            };
            ahead.check(&(at..at + extent.len))?;
            let (way, mut len) = self.how_to_copy(&chain, depth, at, extent.len)?;
            match way {
                Way::Leave => populated.skipped += len,
                Way::Zero => {
                    image.zero(held, self.clusters(&self.aligned(&(at..at + len))))?;
                    populated.skipped += len;
                }
                Way::Clone(from) => match self.clone_up(image, held, from, at..at + len, || chain.unchanged(depth, Ask::AsStat))? {
                    0 => populated += self.read_up(image, held, &chain, at..at + len, ahead, placed)?,
                    cloned => {
                        populated.copied += cloned;
                        len = cloned;
                    }
                },
                Way::Read => populated += self.read_up(image, held, &chain, at..at + len, ahead, placed)?,
            }
            at += len;
        }
        Ok(populated)
    }

    /// How the clusters from `at` on, which the overlay does not hold, are to be copied up, and for how many bytes of `missing` that is so.
    pub(super) fn how_to_copy<'a>(&self, chain: &'a Chain, depth: usize, at: u64, missing: u64) -> Result<(Way<'a>, u64)> {
        let (content, known) = chain.content(depth, at, missing)?;
        let cluster_size = self.cluster_size();
        // Whole clusters (the last one may end with the disk). What is only partly known to be zero or absent is data.
        let whole = if at + known == self.size() { known } else { known - known % cluster_size };
        let data = match content {
            Content::Unallocated if whole > 0 => return Ok((Way::Leave, whole)),
            Content::Zero if whole > 0 && self.geometry().version() >= 3 => return Ok((Way::Zero, whole)),
            // Version 2 has no zero flag: zeros are copied like any data.
            Content::Zero if whole > 0 => return Ok((Way::Read, whole)),
            Content::Data => known.next_multiple_of(cluster_size).min(missing),
            Content::Zero | Content::Unallocated => cluster_size.min(missing),
        };
        let (from, run) = chain.cloneable(depth, at, data)?;
        Ok(match from {
            Some(from) if !from.is_possible(&**self.reader().storage()) => (Way::Read, run.next_multiple_of(cluster_size).min(data)),
            Some(from) if run >= cluster_size => (Way::Clone(from), run - run % cluster_size),
            // The cluster in which the file ends, or in which another layer begins.
            Some(_) => (Way::Read, cluster_size.min(data)),
            None => (Way::Read, run.next_multiple_of(cluster_size).min(data)),
        })
    }

    /// Copies clusters up that are read, now unless they were read ahead.
    fn read_up(
        &self,
        image: &Image,
        held: &Exclusive<'_>,
        chain: &Chain,
        run: Range<u64>,
        ahead: &Ahead,
        placed: &mut Placed,
    ) -> Result<Populated> {
        match ahead.get(&run, self.cluster_size()) {
            Some(clusters) => self.fill(image, held, run.start, clusters, placed),
            None => self.fill(image, held, run.start, &self.read_clusters(chain, run.clone())?, placed),
        }
    }

    /// Allocate, clone, publish: whole clusters. Says how many bytes came up; where those are not
    /// all, the rest can be copied. `unchanged` is asked between clone and publication: that what
    /// was cloned is of the files that were opened.
    fn clone_up(
        &self,
        image: &Image,
        held: &Exclusive<'_>,
        from: Cloneable<'_>,
        run: Range<u64>,
        unchanged: impl Fn() -> Result<()>,
    ) -> Result<u64> {
        let bits = self.geometry().cluster_bits();
        debug_assert!(
            (run.start | run.end).is_multiple_of(self.cluster_size()),
            "the last cluster of the disk, if it is not whole, is read"
        );
        let mut at = run.start;
        while at < run.end {
            let allocation = image.allocate((run.end - at) >> bits)?;
            let len = allocation.clusters() << bits;
            match image.fill_by_cloning(allocation, from.source(), at) {
                Ok(filled) => {
                    if !without(Step::LayersUnchangedBeforePublish) {
                        unchanged()?;
                    }
                    image.publish(held, GuestCluster(at >> bits), filled)?;
                }
                Err(error) => {
                    from.refused(&error);
                    break;
                }
            }
            at += len;
        }
        Ok(at - run.start)
    }

    /// The read of a miss: every run that is missing is read from below once, for the guest and for the overlay. What is to be stored is returned, with
    /// the guard of its clusters, so that the guest can be answered first.
    pub(super) fn read_missing<'a>(&self, held: Exclusive<'a>, offset: u64, buf: &mut [u8]) -> Result<Unstored<'a>> {
        let image = self.image()?;
        let mut copies = Vec::new();
        let mut done = 0;
        while done < buf.len() {
            let at = offset + done as u64;
            let extent = image.map(GuestOffset(at), (buf.len() - done) as u64)?;
            let part = &mut buf[done..done + extent.len as usize];
            match self.chain_below(at) {
                Some(chain) if extent.mapping == Mapping::Unallocated || without(Step::LookAgainBeforeFill) => {
                    let aligned = self.aligned(&(at..at + extent.len));
                    if aligned == (at..at + extent.len) {
                        self.read_below(&chain, at, part)?;
                        copies.push((at, Copied::Buffer(part.len())));
                    } else {
                        match self.read_clusters(&chain, aligned.start..aligned.end.min(self.size())) {
                            Ok(bounce) => {
                                let start = (at - aligned.start) as usize;
                                part.copy_from_slice(&bounce[start..start + part.len()]);
                                copies.push((aligned.start, Copied::Bounce(bounce)));
                            }
                            // P8: the bad place may lie in what only the copy needs.
                            Err(_) => self.read_below(&chain, at, part)?,
                        }
                    }
                }
                _ => image.read_extent(GuestOffset(at), &extent, part)?,
            }
            done += extent.len as usize;
        }
        Ok(Unstored { held, offset, copies })
    }

    /// As [`Disk::read_missing`] for `buf`, all of which is missing, in clusters (`aligned`) that lie on the disk: if the host has them in memory.
    pub(super) fn copy_cached<'a>(
        &self,
        chain: &Chain,
        held: Exclusive<'a>,
        aligned: &Range<u64>,
        offset: u64,
        buf: &mut [u8],
    ) -> Result<Option<Unstored<'a>>> {
        let mut bounce = self.bounces.take((aligned.end - aligned.start) as usize);
        let read = || Ok(if chain.read_cached(aligned.start, &mut bounce) { Local::Done } else { Local::Below });
        if self.stats.read_below((aligned.end - aligned.start) as usize, read)? != Local::Done {
            return Ok(None);
        }
        let start = (offset - aligned.start) as usize;
        buf.copy_from_slice(&bounce[start..start + buf.len()]);
        Ok(Some(Unstored { held, offset, copies: vec![(aligned.start, Copied::Bounce(bounce))] }))
    }

    /// Stores what a reader has in hand already: `buf` is the one that [`Disk::read_missing`] has filled, and nobody has changed it since (guest memory
    /// may change at any time, ours does not: H15). P5: whatever becomes of the copy, the read is good.
    pub(super) fn store_copies(&self, unstored: Unstored<'_>, buf: &[u8]) -> Result<()> {
        let image = self.image()?;
        for (at, copied) in &unstored.copies {
            let data = match copied {
                Copied::Buffer(len) => &buf[(at - unstored.offset) as usize..][..*len],
                Copied::Bounce(bounce) => bounce,
            };
            let stored = self.fill(image, &unstored.held, *at, data, &mut Placed::default());
            self.stats.copied_up(stored.as_ref().map(|filled| filled.copied));
            match stored {
                Ok(filled) => self.fills.reserve.copied(filled.copied),
                Err(error) => {
                    self.fills.failed(&error);
                    if without(Step::CopyUpNeverFailsTheRead) {
                        return Err(error);
                    }
                }
            }
        }
        Ok(())
    }

    /// Reads whole clusters from below; `range` starts on a cluster and may end with the disk, the rest of the last cluster is zeros (H19).
    pub(super) fn read_clusters(&self, chain: &Chain, range: Range<u64>) -> Result<Bounce> {
        let len = range.end - range.start;
        let mut clusters = self.bounces.take(len.next_multiple_of(self.cluster_size()) as usize);
        let (inside, beyond) = clusters.split_at_mut(len as usize);
        beyond.fill(0);
        self.read_below(chain, range.start, inside)?;
        Ok(clusters)
    }

    /// Stores whole clusters from guest offset `at` on: zeros as zero clusters where the version has them, the rest in contiguous runs.
    fn fill(&self, image: &Image, held: &Exclusive<'_>, at: u64, data: &[u8], placed: &mut Placed) -> Result<Populated> {
        let geometry = self.geometry();
        let cluster_size = geometry.cluster_size() as usize;
        let first = at >> geometry.cluster_bits();
        let zero = |cluster: usize| geometry.version() >= 3 && is_zero(&data[cluster * cluster_size..][..cluster_size]);
        let count = data.len() / cluster_size;
        let mut populated = Populated::default();
        let mut done = 0;
        while done < count {
            let zeros = zero(done);
            let run = 1 + (done + 1..count).take_while(|&cluster| zero(cluster) == zeros).count();
            let start = GuestCluster(first + done as u64);
            if zeros {
                image.zero(held, start..GuestCluster(start.0 + run as u64))?;
                populated.zeroed += (run * cluster_size) as u64;
            } else {
                self.store(image, held, start, &data[done * cluster_size..][..run * cluster_size], placed)?;
                populated.copied += (run * cluster_size) as u64;
            }
            done += run;
        }
        Ok(populated)
    }

    /// Allocate, fill, publish: whole clusters of data from guest cluster `start` on. Notes where they lie.
    pub(super) fn store(&self, image: &Image, held: &Exclusive<'_>, start: GuestCluster, data: &[u8], placed: &mut Placed) -> Result<()> {
        let bits = self.geometry().cluster_bits();
        let mut done = 0;
        while done < data.len() {
            let allocation = image.allocate(((data.len() - done) >> bits) as u64)?;
            let len = (allocation.clusters() << bits) as usize;
            let filled = image.fill(allocation, &data[done..done + len])?;
            placed.note(filled.place());
            image.publish(held, GuestCluster(start.0 + (done >> bits) as u64), filled)?;
            done += len;
        }
        Ok(())
    }
}

impl std::ops::AddAssign for Populated {
    fn add_assign(&mut self, other: Populated) {
        self.copied += other.copied;
        self.zeroed += other.zeroed;
        self.skipped += other.skipped;
    }
}

/// Whether all bytes are zero. Compares words: the compiler makes wide loads of it.
fn is_zero(bytes: &[u8]) -> bool {
    let (words, rest) = bytes.as_chunks::<64>();
    rest.iter().all(|&byte| byte == 0) && words.iter().all(|word| word == &[0; 64])
}

#[cfg(test)]
mod tests;
