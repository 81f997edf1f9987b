//! Copying a range up from the chain: for a waiting guest read (copy-on-read), or for a stream,
//! where no guest request waits. Both use the same mechanism.
//!
//! A stream clones whole clusters of a raw file instead of copying them, where the file system can
//! share blocks between files. Nothing is read then, and no space is used. The rest works as for a
//! copy. The clusters are mapped again under the exclusive guard (I4). New clusters are written
//! whole before an entry names them (I3), and a barrier comes before an entry names them on disk
//! (R1). If a clone fails, the copy takes over and returns the error, if there is one: a base that
//! shrank is therefore an error here as well (P9). Zeros that the file system does not know as a
//! hole are cloned like any data; they use no space either.
//!
//! A waiting read already has the bytes in its buffer, so it writes them. Cloning them as well was
//! measured (XFS, random offsets). A 64 KiB cluster takes 20 µs either way. But cloned blocks are
//! not in the page cache of the overlay's file, so the next read of them is three to eight times as
//! slow.

use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use super::bounce::Bounce;
use super::reserve::Reserve;
use super::write_out::Placed;
use super::{Ahead, CopyPause, Disk, Local};
use crate::chain::{Chain, Cloneable, Content};
use host::Result;
use host::background::{PIECE, Unmarked, gives_way, let_others_run};
use host::mutants::{Step, without};
use host::storage::{Ask, Storage};
use host::sync::{Mutex, rank};
use qcow2::format::{GuestOffset, Mapping};
use qcow2::image::Image;
use qcow2::range_lock::Exclusive;

/// Pause after a copy-up failed (no space, or an I/O error on the overlay). During the pause, reads
/// are answered from below without a copy (H14). After it, the next read tries again.
const FILL_PAUSE: Duration = Duration::from_secs(5);

/// Result of a populate, in bytes.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct Populated {
    /// Bytes that were written to the overlay after a read from below, or cloned.
    pub copied: u64,
    /// Bytes that were read from below, found to be zero, and recorded as zero clusters.
    pub zeroed: u64,
    /// Bytes that needed no read: held by the overlay already, known to be zero, or not held by any
    /// layer.
    pub skipped: u64,
}

/// Subclusters that a read has brought from below and not yet stored in the overlay. As long as
/// this value exists, its exclusive guard keeps all other requests away from their clusters.
#[derive(Debug)]
pub(super) struct PendingCopy<'a> {
    held: Exclusive<'a>,
    /// Guest offset of the reader's buffer.
    offset: u64,
    /// Guest offset of the first subcluster, and the bytes of the whole subclusters from there on.
    copies: Vec<(u64, Copied)>,
}

impl PendingCopy<'_> {
    /// The same subclusters, for a reader's buffer that begins earlier, at guest offset `offset`.
    pub(super) fn seen_from(self, offset: u64) -> Self {
        PendingCopy { offset, ..self }
    }
}

/// The buffer that holds the bytes of whole subclusters.
#[derive(Debug)]
enum Copied {
    /// The reader's own buffer: this many bytes of it.
    Buffer(usize),
    Bounce(Bounce),
}

/// How to copy up subclusters that the overlay does not hold.
#[derive(Clone, Copy, Debug)]
pub(super) enum CopyMethod<'a> {
    /// Do nothing: no layer below holds anything.
    Leave,
    /// Mark them as zero.
    Zero,
    /// Share the blocks of the raw file below.
    Clone(Cloneable<'a>),
    /// Read them from below and write them to the overlay.
    Read,
}

/// Whether reads may copy up at present: copies do not fail, and enough space is free.
#[derive(Debug)]
pub(super) struct FillHealth {
    reserve: Reserve,
    failures: AtomicU64,
    paused_until: Mutex<{ rank::LEAF }, Option<Instant>>,
}

impl FillHealth {
    /// `reserve`: see [`super::DiskOptions::reserve`].
    pub fn new(reserve: Option<u64>) -> FillHealth {
        FillHealth {
            reserve: Reserve::new(reserve),
            failures: AtomicU64::new(0),
            paused_until: Mutex::new(None),
        }
    }

    /// Whether a read should copy up the clusters that it misses.
    pub fn are_welcome(&self, overlay: &dyn Storage) -> bool {
        // The common case takes no lock: no copy-up has failed yet.
        let healthy = self.failures.load(Ordering::Relaxed) == 0
            || self.paused_until.lock().is_none_or(|until| Instant::now() >= until);
        healthy && self.reserve.allows(overlay)
    }

    /// The reason why reads do not copy up at present; `None` where they do.
    pub fn pause(&self, overlay: &dyn Storage) -> Option<CopyPause> {
        if self.paused_until.lock().is_some_and(|until| Instant::now() < until) {
            return Some(CopyPause::Error);
        }
        self.reserve.has_stopped(overlay).then_some(CopyPause::Reserve)
    }

    fn failed(&self, error: &host::Error) {
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
    /// Copies up whole clusters of `range` that the first `depth` backing layers hold and the
    /// overlay does not.
    ///
    /// Only the missing clusters are held, so a backing file that hangs does not delay requests for
    /// the clusters beside them. Waits first for a pass of write-back if much data is not durable.
    /// When this returns, the host has been asked to start writing the copied clusters to disk
    /// (`write_out.rs`).
    ///
    /// # Errors
    /// I/O errors of the overlay or of a layer, [`host::ErrorKind::NoSpace`], corruption. Clusters
    /// that were copied before the error stay.
    pub fn populate(&self, range: Range<u64>, depth: usize) -> Result<Populated> {
        self.populate_read(range, depth, Ahead::default())
    }

    /// As [`Disk::populate`], but clusters that were read ahead are not read again.
    ///
    /// # Errors
    /// As [`Disk::populate`], and the error of reading ahead, if the clusters that could not be
    /// read are still missing.
    pub(crate) fn populate_read(
        &self,
        range: Range<u64>,
        depth: usize,
        mut ahead: Ahead,
    ) -> Result<Populated> {
        self.check_range(&range)?;
        self.bound_unwritten();
        let mut placed = Placed::default();
        let populated = self.populate_missing(range, depth, &mut ahead, &mut placed);
        // No range is held any more. Clusters that were copied before an error are written out as
        // well.
        self.start_write_out(&placed);
        populated
    }

    fn populate_missing(
        &self,
        range: Range<u64>,
        depth: usize,
        ahead: &mut Ahead,
        placed: &mut Placed,
    ) -> Result<Populated> {
        let mut populated = Populated::default();
        let aligned = self.aligned(&range);
        let end = aligned.end.min(self.size());
        // A hint: the missing clusters are mapped again under the exclusive guard.
        for run in self.runs(aligned.start..end) {
            let run = run?;
            if run.mapping() != Mapping::Unallocated || self.chain().is_none() {
                populated.skipped += run.extent.len;
                continue;
            }
            let mut at = run.range.start;
            while at < run.range.end {
                let piece = at..self.end_of_piece(at, ahead).min(run.range.end);
                at = piece.end;
                let of_piece = {
                    let held = self.in_flight.exclusive(self.aligned(&piece));
                    // A guest that waits for this range waits for what is read under the guard.
                    let _unmarked = Unmarked::new();
                    self.populate_held(&held, piece, depth, ahead, placed)?
                };
                let_others_run();
                self.stats.streamed(of_piece.copied);
                populated += of_piece;
            }
        }
        Ok(populated)
    }

    /// The end of what is held at once from `at` on: a piece of whole clusters if the calling
    /// thread gives way. A range of which nothing was read ahead is not cut: it is cloned, and a
    /// large clone takes hardly longer than a small one.
    fn end_of_piece(&self, at: u64, ahead: &Ahead) -> u64 {
        if !gives_way() || ahead.is_empty() {
            return u64::MAX;
        }
        let piece = (PIECE as u64).next_multiple_of(self.cluster_size());
        (at - at % piece).saturating_add(piece)
    }

    /// As [`Disk::populate_read`], for a range that the caller holds exclusively.
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
        let aligned = self.aligned_to_subclusters(&range);
        let end = aligned.end.min(size);
        let mut at = aligned.start;
        while at < end {
            let extent = image.map(GuestOffset(at), end - at)?;
            // I4: clusters that the overlay holds by now are never replaced, whichever request
            // stored them.
            let mapping = if without(Step::LookAgainBeforeCopyUp) {
                Mapping::Unallocated
            } else {
                extent.mapping
            };
            let (Mapping::Unallocated, Some(chain)) = (mapping, self.chain()) else {
                populated.skipped += extent.len;
                at += extent.len;
                continue;
            };
            ahead.check(&(at..at + extent.len))?;
            let (way, mut len) = self.how_to_copy(&chain, depth, at, extent.len)?;
            match way {
                CopyMethod::Leave => populated.skipped += len,
                CopyMethod::Zero => {
                    let zero = self.aligned_to_subclusters(&(at..at + len));
                    image.zero(held, self.subclusters(&zero))?;
                    populated.skipped += len;
                }
                CopyMethod::Clone(from) => {
                    match self.clone_up(image, held, from, at..at + len, || {
                        chain.unchanged(depth, Ask::AsStat)
                    })? {
                        0 => {
                            populated +=
                                self.read_up(image, held, &chain, at..at + len, ahead, placed)?
                        }
                        cloned => {
                            populated.copied += cloned;
                            len = cloned;
                        }
                    }
                    self.touches.brought(&(at..at + len));
                }
                CopyMethod::Read => {
                    populated += self.read_up(image, held, &chain, at..at + len, ahead, placed)?;
                    self.touches.brought(&(at..at + len));
                }
            }
            at += len;
        }
        Ok(populated)
    }

    /// Decides how to copy up the subclusters at `at`, which the overlay does not hold. Returns the
    /// way, and the number of bytes of `missing` to which it applies.
    pub(super) fn how_to_copy<'a>(
        &self,
        chain: &'a Chain,
        depth: usize,
        at: u64,
        missing: u64,
    ) -> Result<(CopyMethod<'a>, u64)> {
        let (content, known) = chain.content(depth, at, missing)?;
        let (cluster_size, unit) = (self.cluster_size(), self.geometry().subcluster_size());
        // Only whole subclusters count (the last one may end with the disk). A subcluster of which
        // only a part is known to be zero or absent is data.
        let whole = if at + known == self.size() { known } else { known - known % unit };
        let data = match content {
            Content::Unallocated if whole > 0 => return Ok((CopyMethod::Leave, whole)),
            Content::Zero if whole > 0 && self.geometry().version() >= 3 => {
                return Ok((CopyMethod::Zero, whole));
            }
            // Version 2 has no zero flag: zeros are copied like any data.
            Content::Zero if whole > 0 => return Ok((CopyMethod::Read, whole)),
            Content::Data => known.next_multiple_of(unit).min(missing),
            Content::Zero | Content::Unallocated => unit.min(missing),
        };
        let (from, run) = chain.cloneable(depth, at, data)?;
        Ok(match from {
            Some(from)
                if !self
                    .overlay
                    .writable()
                    .is_some_and(|image| from.is_possible(&**image.storage())) =>
            {
                (CopyMethod::Read, run.next_multiple_of(unit).min(data))
            }
            Some(from) if run >= cluster_size && at.is_multiple_of(cluster_size) => {
                (CopyMethod::Clone(from), run - run % cluster_size)
            }
            // The cluster that contains the end of the file, or the boundary to another layer, or a
            // cluster of which the overlay holds other subclusters.
            Some(_) => (CopyMethod::Read, (cluster_size - at % cluster_size).min(data)),
            None => (CopyMethod::Read, run.next_multiple_of(unit).min(data)),
        })
    }

    /// Copies up subclusters that must be read. They are read now, unless they were read ahead.
    fn read_up(
        &self,
        image: &Image,
        held: &Exclusive<'_>,
        chain: &Chain,
        run: Range<u64>,
        ahead: &Ahead,
        placed: &mut Placed,
    ) -> Result<Populated> {
        match ahead.get(&run, self.geometry().subcluster_size()) {
            Some(bytes) => self.fill(image, held, run.start, bytes, placed),
            None => {
                let bytes = self.read_subclusters(chain, run.clone())?;
                self.fill(image, held, run.start, &bytes, placed)
            }
        }
    }

    /// Allocates, clones and publishes whole clusters. Returns the number of bytes that were
    /// cloned; if that is less than the whole run, the caller copies the rest.
    ///
    /// `unchanged` is called between the clone and the publication. It checks that the cloned
    /// blocks are those of the file that was opened.
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
                    let start = self.geometry().guest_subcluster(GuestOffset(at));
                    image.publish(held, start, filled)?;
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

    /// Reads a range of which some subclusters are missing. Each missing run is read from below
    /// once, for the guest and for the overlay. The subclusters to store are returned with their
    /// guard, so that the caller can send the reply first.
    pub(super) fn read_missing<'a>(
        &self,
        held: Exclusive<'a>,
        offset: u64,
        buf: &mut [u8],
    ) -> Result<PendingCopy<'a>> {
        let image = self.image()?;
        let mut copies = Vec::new();
        for run in self.runs(offset..offset + buf.len() as u64) {
            let run = run?;
            let (at, part) = (run.range.start, run.of_mut(buf, offset));
            match self.chain_below(at) {
                Some(chain)
                    if run.mapping() == Mapping::Unallocated
                        || without(Step::LookAgainBeforeFill) =>
                {
                    let aligned = self.aligned_to_subclusters(&run.range);
                    if aligned == run.range {
                        self.read_below(&chain, at, part)?;
                        copies.push((at, Copied::Buffer(part.len())));
                    } else {
                        let inside = aligned.start..aligned.end.min(self.size());
                        match self.read_subclusters(&chain, inside) {
                            Ok(bounce) => {
                                let start = (at - aligned.start) as usize;
                                part.copy_from_slice(&bounce[start..start + part.len()]);
                                copies.push((aligned.start, Copied::Bounce(bounce)));
                            }
                            // P8: the unreadable bytes may lie in the part of the subcluster that
                            // only the copy needs.
                            Err(_) => self.read_below(&chain, at, part)?,
                        }
                    }
                }
                _ => image.read_extent(GuestOffset(at), &run.extent, part)?,
            }
        }
        Ok(PendingCopy { held, offset, copies })
    }

    /// As [`Disk::read_missing`], if the host has the bytes in memory; `None` otherwise.
    ///
    /// All of `buf` is missing in the overlay. `copied` is `buf`'s range rounded to whole
    /// subclusters, which end inside the disk.
    pub(super) fn copy_cached<'a>(
        &self,
        chain: &Chain,
        held: Exclusive<'a>,
        copied: Range<u64>,
        offset: u64,
        buf: &mut [u8],
    ) -> Result<Option<PendingCopy<'a>>> {
        let len = (copied.end - copied.start) as usize;
        let read = |bytes: &mut [u8]| -> Result<bool> {
            Ok(self.read_below_cached(chain, copied.start, bytes)? == Local::Done)
        };
        let bytes = if len == buf.len() {
            read(buf)?.then_some(Copied::Buffer(len))
        } else {
            let mut bounce = self.bounces.take(len);
            if read(&mut bounce)? {
                let start = (offset - copied.start) as usize;
                buf.copy_from_slice(&bounce[start..start + buf.len()]);
                Some(Copied::Bounce(bounce))
            } else {
                None
            }
        };
        Ok(bytes.map(|bytes| PendingCopy { held, offset, copies: vec![(copied.start, bytes)] }))
    }

    /// Stores the subclusters of `pending`. `buf` is the buffer that [`Disk::read_missing`] has
    /// filled, and it is unchanged since then: guest memory may change at any time, but this buffer
    /// belongs to the daemon (H15). P5: a copy that fails does not fail the read.
    pub(super) fn store_copies(&self, pending: PendingCopy<'_>, buf: &[u8]) -> Result<()> {
        let image = self.image()?;
        for (at, copied) in &pending.copies {
            let data = match copied {
                Copied::Buffer(len) => &buf[(at - pending.offset) as usize..][..*len],
                Copied::Bounce(bounce) => bounce,
            };
            let stored = self.fill(image, &pending.held, *at, data, &mut Placed::default());
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

    /// Reads whole subclusters from below. `range` starts at a subcluster and may end with the
    /// disk; the rest of the last subcluster is filled with zeros (H19).
    pub(super) fn read_subclusters(&self, chain: &Chain, range: Range<u64>) -> Result<Bounce> {
        let len = range.end - range.start;
        let whole = len.next_multiple_of(self.geometry().subcluster_size());
        let mut bytes = self.bounces.take(whole as usize);
        let (inside, beyond) = bytes.split_at_mut(len as usize);
        beyond.fill(0);
        self.read_below(chain, range.start, inside)?;
        Ok(bytes)
    }

    /// Stores whole subclusters from guest offset `at` on: zeros by their mapping if the image
    /// version has that, other data in contiguous runs. What lies in one cluster is one or the
    /// other, so that a cluster takes one write.
    fn fill(
        &self,
        image: &Image,
        held: &Exclusive<'_>,
        at: u64,
        data: &[u8],
        placed: &mut Placed,
    ) -> Result<Populated> {
        let geometry = self.geometry();
        let cluster_size = geometry.cluster_size();
        // The end of the part of the data that lies in the cluster of this byte of it.
        let end_of_part = |from: usize| {
            let position = at + from as u64;
            let rest = cluster_size - position % cluster_size;
            from + rest.min((data.len() - from) as u64) as usize
        };
        let is_zero = |part: &[u8]| geometry.version() >= 3 && is_zero(part);
        let mut populated = Populated::default();
        let mut done = 0;
        while done < data.len() {
            let mut end = end_of_part(done);
            let zeros = is_zero(&data[done..end]);
            while end < data.len() && is_zero(&data[end..end_of_part(end)]) == zeros {
                end = end_of_part(end);
            }
            let run = at + done as u64..at + end as u64;
            let subclusters = self.subclusters(&run);
            if zeros {
                image.zero(held, subclusters)?;
                populated.zeroed += run.end - run.start;
            } else {
                let start = subclusters.start;
                image.store(held, start, &data[done..end], |place| placed.note(place))?;
                populated.copied += run.end - run.start;
            }
            done = end;
        }
        // The entries name the clusters now: reads of them do not go below.
        if let Some(chain) = self.backing.read().as_ref() {
            chain.done(at, data.len() as u64);
        }
        Ok(populated)
    }
}

impl std::ops::AddAssign for Populated {
    fn add_assign(&mut self, other: Populated) {
        self.copied += other.copied;
        self.zeroed += other.zeroed;
        self.skipped += other.skipped;
    }
}

/// Whether all bytes are zero. Compares blocks of 64 bytes, which the compiler turns into wide
/// loads.
fn is_zero(bytes: &[u8]) -> bool {
    let (words, rest) = bytes.as_chunks::<64>();
    rest.iter().all(|&byte| byte == 0) && words.iter().all(|word| word == &[0; 64])
}

#[cfg(test)]
mod tests;
