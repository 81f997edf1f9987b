//! The guest's disk: an overlay above a chain of backing files.
//!
//! ```text
//! read   shared(range); read what the overlay holds; all of it?  ─► done
//!        else drop; exclusive(the missing clusters); look again; read below; go on behind them; answer; store, from the same buffer
//! write  per run: Data { in_place }? ─► shared(run); look again; overwrite
//!        else exclusive(its clusters); look again; in place │ allocate, complete the clusters from below, fill, publish
//! stream populate(512 KiB) … ; detach_backing
//! ```
//! Nothing but missing clusters is ever held while a backing file is read: one that hangs delays only those who need it.
//! "Drop, retake, look again" stands for lock upgrade: the first look is a hint, only the second decides.
//!
//! **Touches:** `image`, `chain`, `range_lock`. **Never:** FUSE, JSON, jobs; coordinate types end here, ranges are guest bytes.
//! **Locks:** ranks `RANGE` and `BACKING` of [`crate::sync::rank`], and what `image` takes below.
//! **Invariants:** I1 a guest cluster changes its mapping only while its range is held exclusively; plain reads and in-place writes hold it
//! shared, so a host cluster is never freed under a reader (H5, H6). I4 a guest write wins over any copy from below: populate looks at the
//! mapping under the exclusive guard before it publishes (H1 to H4). While there is a backing file nothing becomes `Unallocated` (H17).

use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crossbeam_channel::{Receiver, never};
use std::time::{Duration, Instant};

use crate::chain::{Chain, Gate, Namer};
use crate::error::Context;
use crate::format::{Geometry, GuestCluster, GuestOffset, Mapping};
use crate::image::{Image, ImageReader, Leaks, distrust};
use crate::mutants::{Step, without};
use crate::range_lock::{Exclusive, RangeLock, Shared};
use crate::storage::{Access, FileStorage, Storage};
use crate::sync::{Mutex, RwLock, rank};
use crate::{Error, ErrorKind, Result};

mod ahead;
mod base_note;
mod bounce;
mod detach;
mod facts;
mod failure;
mod locate;
mod note;
mod populate;
mod read;
mod reserve;
mod seek;
mod stats;
mod survey;
mod to_do;
mod write;
mod write_out;

#[cfg(test)]
mod tests;

pub use ahead::{Ahead, ToRead};
pub use facts::DiskInfo;
pub use failure::{CopyPause, GuestFailure};
pub use locate::Locator;
pub use note::{FileId, LONGEST_STREAM_NOTE};
pub use populate::Populated;
pub use seek::Seek;
pub use stats::{Activity, CopyCount, Cost, DiskStats, LATENCY_BOUNDS, LATENCY_BUCKETS, Latency, RequestCount};
pub use survey::{MOST_CELLS, Survey, Totals};
pub use to_do::ToDo;

use base_note::warn_of_changed_base;
use bounce::Bounces;
use populate::FillHealth;
use stats::Stats;
use survey::Surveys;
use write_out::Placed;

/// How long the end of an image on a block device is looked for: the table of a hostile image can
/// name one block of zeros a million times.
const END_TIME: Duration = Duration::from_secs(1);

/// How a disk is opened.
#[derive(Clone, Debug)]
pub struct DiskOptions {
    /// Nothing may be written; reads do not copy up.
    pub read_only: bool,
    /// Reads of what the overlay does not hold are copied up.
    pub copy_on_read: bool,
    /// What may be opened as backing file.
    pub gate: Gate,
    /// Before anything is written all references are counted, and an image whose refcounts do not add up is refused (V28). An image that was
    /// not closed is looked at in any case, so that what was leaked is given back.
    pub full_check: bool,
    /// Reads do not copy up while the file system of the overlay has less free space than so many bytes; `None` is the smaller of 1 GiB and
    /// 5 % of the file system.
    pub reserve: Option<u64>,
}

/// Whether an operation could be answered from the overlay without waiting.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Local {
    /// Done.
    Done,
    /// Nothing was done: it needs an allocation, or a range that is in use for a moment. Call the sibling
    /// that may wait, but not for a base (`…_without_base`).
    Miss,
    /// It needs the backing file, or a range that is in use for as long as one takes. Call the sibling that
    /// waits for whatever it takes. Nothing was done, or part of a write, which is to be done again.
    Below,
}

/// For what a request may wait.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Patience {
    /// For the overlay, and for ranges that are in use by requests that wait for nothing else either.
    Brief,
    /// For a backing file as well.
    Long,
}

#[derive(Debug)]
enum Overlay {
    Writable(Box<Image>),
    ReadOnly(Box<ImageReader>),
}

/// The disk: overlay above chain, one method per guest request. All offsets and lengths are bytes; ranges must lie inside [`Disk::size`]
/// ([`ErrorKind::InvalidArgument`] otherwise; `fuse` clamps first). Every method may be called from any thread.
#[derive(Debug)]
pub struct Disk {
    path: PathBuf,
    /// Which file the overlay is; `None` in tests.
    file_id: Option<FileId>,
    overlay: Overlay,
    /// Where the image ended when it was opened, in bytes; looked for only where the host says that
    /// it occupies nothing, as of block devices.
    end_at_open: u64,
    /// What lies below; none once detached. Cloned and released, never held across I/O.
    backing: RwLock<{ rank::BACKING }, Option<Arc<Chain>>>,
    in_flight: RangeLock,
    copy_on_read: bool,
    fills: FillHealth,
    bounces: Bounces,
    stats: Stats,
    /// Touched by requests that fail only.
    failure: Mutex<{ rank::LEAF }, Option<GuestFailure>>,
    surveys: Surveys,
}

impl Disk {
    /// Opens the overlay and its chain, with locks. Nothing is changed unless everything opens.
    ///
    /// # Errors
    /// Anything that is wrong with any of the files, in one line.
    pub fn open(path: &Path, options: &DiskOptions) -> Result<Disk> {
        let path = std::path::absolute(path).context(|| path.display().to_string())?;
        let access = if options.read_only { Access::ReadOnly } else { Access::ReadWrite };
        let file = Arc::new(FileStorage::open(&path, access)?);
        let owner = file.owner();
        let mut gate = options.gate.clone();
        gate.taken.push(file.identity());
        let file_id = file.file_id().context(|| path.display().to_string())?;
        let storage: Arc<dyn Storage> = file;
        let overlay = if options.read_only {
            ImageReader::open_locked(storage, &path).map(|reader| Overlay::ReadOnly(Box::new(reader)))
        } else {
            let checked = if options.full_check { distrust(&*storage) } else { Ok(()) };
            let image = checked.and_then(|()| Image::open(storage)).map(|image| Overlay::Writable(Box::new(image)));
            image.map_err(|error| match error.kind() {
                ErrorKind::Corrupt => {
                    Error::new(ErrorKind::Corrupt, format!("{error}: repair a copy with qemu-img check -r all, or mount with --read-only"))
                }
                _ => error,
            })
        };
        let overlay = overlay.context(|| path.display().to_string())?;
        let chain = match overlay.reader().backing() {
            Some(reference) => Some(Chain::open(&reference, Namer::Above { path: &path, owner }, &gate)?),
            None => None,
        };
        let end_at_open = match overlay.reader().storage().allocated_size() {
            Ok(0) => overlay.reader().end(Instant::now() + END_TIME),
            _ => 0,
        };
        let disk = Disk { file_id, end_at_open, ..Disk::assemble(path, overlay, chain, options.copy_on_read, options.reserve) };
        if let Overlay::Writable(image) = &disk.overlay {
            let what = || disk.path.display().to_string();
            let leaks = find_leaks(image, options.full_check).context(what)?;
            image.begin_writing().context(what)?;
            if let Some(leaks) = leaks.filter(|leaks| leaks.clusters() > 0) {
                image.give_back(&leaks).context(what)?;
                let (clusters, bytes) = (leaks.clusters(), leaks.clusters() * disk.cluster_size());
                log::info!("{}: {clusters} leaked clusters ({bytes} bytes) were given back", what());
            }
            if let Some(chain) = disk.chain() {
                warn_of_changed_base(&disk.path, &**image.reader().storage(), &chain).context(what)?;
            }
        }
        Ok(disk)
    }

    fn assemble(path: PathBuf, overlay: Overlay, chain: Option<Chain>, copy_on_read: bool, reserve: Option<u64>) -> Disk {
        let cluster_size = overlay.reader().geometry().cluster_size();
        Disk {
            path,
            file_id: None,
            overlay,
            end_at_open: 0,
            backing: RwLock::new(chain.map(Arc::new)),
            in_flight: RangeLock::new(cluster_size),
            copy_on_read,
            fills: FillHealth::new(reserve),
            bounces: Bounces::new(),
            stats: Stats::new(),
            failure: Mutex::default(),
            surveys: Surveys::default(),
        }
    }

    /// A writable disk above storages that were not opened by name. Reads do not copy up.
    #[cfg(any(test, fuzzing))]
    pub(crate) fn for_tests(image: Image, chain: Option<Chain>) -> Disk {
        Disk::assemble("/overlay.qcow2".into(), Overlay::Writable(Box::new(image)), chain, false, None)
    }

    /// The same disk; says whether reads copy up.
    #[cfg(any(test, fuzzing))]
    pub(crate) fn copying_up(self, copy_on_read: bool) -> Disk {
        Disk { copy_on_read, ..self }
    }

    /// How many requests wait for a range.
    #[cfg(test)]
    pub(crate) fn waiting(&self) -> usize {
        self.in_flight.waiting()
    }

    /// Holds a range as a request that changes mappings does; returns it as well.
    #[cfg(test)]
    pub(crate) fn hold_for_tests(&self, range: Range<u64>) -> (Range<u64>, Exclusive<'_>) {
        (range.clone(), self.in_flight.exclusive(range))
    }

    /// Makes whole clusters of a disk with a backing file unallocated, which nothing else does (H17).
    #[cfg(test)]
    pub(crate) fn uncover_for_tests(&self, held: &Exclusive<'_>, range: Range<u64>) {
        self.image().unwrap().uncover(held, self.clusters(&range)).unwrap();
    }

    fn reader(&self) -> &ImageReader {
        self.overlay.reader()
    }

    /// The overlay for writing.
    fn image(&self) -> Result<&Image> {
        match &self.overlay {
            Overlay::Writable(image) => Ok(image),
            Overlay::ReadOnly(_) => Err(Error::new(ErrorKind::ReadOnly, "the disk is read-only")),
        }
    }

    /// Holds a range for a change; `None` where that takes more than `patience`.
    fn hold(&self, range: Range<u64>, patience: Patience) -> Option<Exclusive<'_>> {
        match patience {
            Patience::Brief => self.in_flight.exclusive_briefly(range),
            Patience::Long => Some(self.in_flight.exclusive(range)),
        }
    }

    /// Holds a range as it is; `None` where that takes more than `patience`.
    fn hold_shared(&self, range: Range<u64>, patience: Patience) -> Option<Shared<'_>> {
        match patience {
            Patience::Brief => self.in_flight.shared_briefly(range),
            Patience::Long => Some(self.in_flight.shared(range)),
        }
    }

    fn chain(&self) -> Option<Arc<Chain>> {
        self.backing.read().clone()
    }

    /// The chain, if it decides what an unallocated byte at `offset` reads as; zeros otherwise.
    fn chain_below(&self, offset: u64) -> Option<Arc<Chain>> {
        self.backing.read().as_ref().filter(|chain| offset < chain.size()).cloned()
    }

    fn geometry(&self) -> Geometry {
        self.reader().geometry()
    }

    /// Virtual size in bytes.
    pub fn size(&self) -> u64 {
        self.geometry().size()
    }

    /// Cluster size of the overlay in bytes.
    pub fn cluster_size(&self) -> u64 {
        self.geometry().cluster_size()
    }

    /// Whether nothing may be written.
    pub fn is_read_only(&self) -> bool {
        matches!(self.overlay, Overlay::ReadOnly(_))
    }

    /// What was asked of the disk since it was opened.
    pub fn stats(&self) -> DiskStats {
        let commits = match &self.overlay {
            Overlay::Writable(image) => image.commits(),
            Overlay::ReadOnly(_) => 0,
        };
        DiskStats { commits, ..self.stats.snapshot() }
    }

    /// What the guest is at, for whoever gives way to it.
    pub fn activity(&self) -> Activity {
        self.stats.activity()
    }

    /// Bytes the overlay occupies on the host: `st_blocks` × 512 of a file. A block device has no
    /// blocks of its own, so there it is the end of the image on the device.
    ///
    /// # Errors
    /// fstat(2) failed.
    pub fn allocated_size(&self) -> Result<u64> {
        let allocated = self.reader().storage().allocated_size().context(|| self.path.display().to_string())?;
        Ok(match (allocated, &self.overlay) {
            (0, Overlay::Writable(image)) => self.end_at_open.max(image.highest_allocated()),
            (0, Overlay::ReadOnly(_)) => self.end_at_open,
            (allocated, _) => allocated,
        })
    }

    /// Makes every operation that has returned before this call durable (P1).
    ///
    /// # Errors
    /// I/O; sticky after a failed fdatasync (P7).
    pub fn flush(&self) -> Result<()> {
        self.stats.flush(|| match &self.overlay {
            Overlay::Writable(image) => image.flush(),
            Overlay::ReadOnly(_) => Ok(()),
        })
    }

    /// Writes back metadata if any is dirty; for the commit timer (P2).
    ///
    /// # Errors
    /// As [`Disk::flush`].
    pub fn flush_if_dirty(&self) -> Result<()> {
        match &self.overlay {
            Overlay::Writable(image) => image.flush_if_dirty(),
            Overlay::ReadOnly(_) => Ok(()),
        }
    }

    /// Yields when so much waits to be committed that [`Disk::flush_if_dirty`] should be called before its time.
    pub fn commit_wanted(&self) -> Receiver<()> {
        match &self.overlay {
            Overlay::Writable(image) => image.commit_wanted(),
            Overlay::ReadOnly(_) => never(),
        }
    }

    /// Makes everything durable and gives back what is unused. To be called once, after the last request.
    ///
    /// # Errors
    /// As [`Disk::flush`].
    pub fn close(&self) -> Result<()> {
        match &self.overlay {
            Overlay::Writable(image) => image.close().map(|()| image.end_writing()),
            Overlay::ReadOnly(_) => Ok(()),
        }
    }

    /// Whether nothing has failed for good.
    pub fn is_usable(&self) -> bool {
        match &self.overlay {
            Overlay::Writable(image) => image.is_usable(),
            Overlay::ReadOnly(_) => true,
        }
    }

    /// Grows the virtual size to `size` bytes, durably; the new range reads as zero even where a backing file is longer (2.6, H18). That is made
    /// so before the size changes, so that nobody ever sees anything else, not even after a crash.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidArgument`] for a size that is smaller, too large or no multiple of 512; read-only; I/O.
    pub fn grow(&self, size: u64) -> Result<()> {
        let image = self.image()?;
        let drained = self.in_flight.exclusive(0..u64::MAX);
        let before = self.size();
        image.make_room(&drained, size)?;
        if size > before {
            if !without(Step::CleanEndBeforeGrow) {
                self.clean_end(image, &drained)?;
            }
            let shown = self.chain().map_or(0, |chain| chain.size()).min(size);
            let shown = if without(Step::HideBelowBeforeGrow) { before } else { shown };
            let beyond = self.aligned(&(before.next_multiple_of(self.cluster_size())..size));
            self.hide(image, &drained, self.aligned(&(beyond.start..shown)))?;
            // What another program left beyond the end must not come into sight either.
            let mut rest = self.clusters(&(beyond.start.max(self.aligned(&(0..shown)).end)..beyond.end));
            while let Some(mapped) = image.first_mapped(rest.clone())? {
                let bits = self.geometry().cluster_bits();
                self.hide(image, &drained, mapped.start.0 << bits..mapped.end.0 << bits)?;
                rest.start = mapped.end;
            }
        }
        image.set_size(&drained, size)
    }

    /// Makes the part of the last cluster that lies beyond the end of the disk zero: another program may have left anything there (H19; QEMU
    /// copies up whole clusters, and keeps what it cuts off), and below there may be more than the guest has seen.
    fn clean_end(&self, image: &Image, drained: &Exclusive<'_>) -> Result<()> {
        let size = self.size();
        let start = size - size % self.cluster_size();
        if start == size {
            return Ok(());
        }
        match image.map(GuestOffset(start), 1)?.mapping {
            Mapping::Zero { .. } => return Ok(()),
            Mapping::Unallocated if self.chain_below(start).is_none() => return Ok(()),
            _ => {}
        }
        let mut cluster = vec![0; self.cluster_size() as usize];
        self.read_through(start, &mut cluster[..(size - start) as usize])?;
        self.store(image, drained, self.geometry().guest_cluster(GuestOffset(start)), &cluster, &mut Placed::default())
    }

    /// Makes whole clusters beyond the end of the disk read as zero.
    fn hide(&self, image: &Image, drained: &Exclusive<'_>, aligned: Range<u64>) -> Result<()> {
        if self.geometry().version() >= 3 {
            return image.discard(drained, self.clusters(&aligned));
        }
        // Version 2: only written zeros hide it.
        let mut at = aligned.start;
        while at < aligned.end {
            let len = write::ZERO_PIECE.max(self.cluster_size()).min(aligned.end - at);
            self.store(image, drained, self.geometry().guest_cluster(GuestOffset(at)), &vec![0; len as usize], &mut Placed::default())?;
            at += len;
        }
        Ok(())
    }

    fn check_range(&self, range: &Range<u64>) -> Result<()> {
        if range.start > range.end || range.end > self.size() {
            return Err(Error::new(
                ErrorKind::InvalidArgument,
                format!("bytes {}..{} are beyond the end of the disk", range.start, range.end),
            ));
        }
        Ok(())
    }

    /// `range` rounded outward to whole clusters; the end may lie beyond the end of the disk.
    fn aligned(&self, range: &Range<u64>) -> Range<u64> {
        let cluster_size = self.cluster_size();
        range.start - range.start % cluster_size..range.end.next_multiple_of(cluster_size)
    }

    /// The clusters of a cluster-aligned range.
    fn clusters(&self, aligned: &Range<u64>) -> Range<GuestCluster> {
        let bits = self.geometry().cluster_bits();
        GuestCluster(aligned.start >> bits)..GuestCluster(aligned.end >> bits)
    }
}

/// Leaks that a crash has left behind, if one may have, or if a full check is wanted.
fn find_leaks(image: &Image, full_check: bool) -> Result<Option<Leaks>> {
    if !full_check && !image.may_leak() {
        return Ok(None);
    }
    match image.find_leaks() {
        // Too large to be looked at: leaks stay what they are.
        Err(error) if error.kind() == ErrorKind::UnsupportedFeature && !full_check => {
            log::warn!("{error}; what a crash has leaked is not given back");
            Ok(None)
        }
        found => found.map(Some),
    }
}

impl Overlay {
    fn reader(&self) -> &ImageReader {
        match self {
            Overlay::Writable(image) => image.reader(),
            Overlay::ReadOnly(reader) => reader,
        }
    }
}
