//! One qcow2 file: where guest clusters are, and how that changes without ever losing one.
//!
//! ```text
//!            L1 slot ──► L2 table (entries are atomic words) ──► host cluster
//!   allocate ─► fill ─► publish            the life of a new cluster: refcount, bytes, then the pointer
//!   zero, unmap                            the pointer goes, the old cluster waits in the list of pending frees
//!   flush                                  the write-back pass: [`write_back`]
//! ```
//!
//! **Touches:** `format`, `storage`; range guards as proof only. **Never:** opens a backing file, knows what lies below, answers a guest.
//! **Locks:** ranks `WRITE_BACK` to `SLOT` of [`crate::sync::rank`], taken in that order.
//! **Invariants** (numbers of the crate docs): I1 the mapping of a cluster changes only under its exclusive guard; I2 on disk, refcounts are
//! never below references; I3 a published cluster was filled first (only [`Image::fill`] makes a [`Filled`]).

use std::ops::Range;
use std::sync::Arc;

use crossbeam_channel::{Receiver, Sender, bounded};

use crate::format::{BackingReference, FormatError, Geometry, GuestOffset, Header, Mapping, feature, patch};
use crate::mutants::{Step, without};
use crate::storage::{Storage, WriteKind};
use crate::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use crate::sync::{Mutex, RwLock, rank};
use crate::{Error, ErrorKind, Result};

mod allocator;
mod check;
mod gaps;
mod grow;
mod inflated;
mod judged;
mod l2_table;
mod lookup;
mod place;
mod publish;
mod refcounts;
mod settle;
mod slots;
mod tables;
mod write_back;

#[cfg(test)]
mod tests;

pub use check::{CheckReport, Finding, Leaks, check};
pub use lookup::Extent;
pub use place::{Holes, Place};
pub use publish::{Allocation, Filled};
pub use settle::distrust;

use allocator::Allocator;
use inflated::Inflated;
use tables::Tables;
use write_back::GroupCommit;

/// How much of the file is read to find the header: the largest cluster, since header, extensions and backing file name lie in the first one.
const HEADER_AREA: u64 = 2 << 20;

/// Memory for the L2 tables of the overlay, bytes; exceeded only while they are all dirty. 64 MiB map 512 GiB at 64 KiB clusters.
const OVERLAY_TABLE_MEMORY: usize = 64 << 20;
/// A commit is asked for when so many bytes of new clusters wait for one: what a crash leaks stays small, and the next flush of the guest short.
const UNCOMMITTED_DATA: u64 = 256 << 20;

/// Memory for the L2 tables of one backing file, bytes: read once each by a stream.
const BACKING_TABLE_MEMORY: usize = 16 << 20;

/// Enough of an image to read it; what `chain` holds, so that a backing file cannot be written by type (I5).
#[derive(Debug)]
pub struct ImageReader {
    storage: Arc<dyn Storage>,
    header: RwLock<{ rank::LEAF }, Header>,
    tables: Tables,
    inflated: Inflated,
}

impl ImageReader {
    /// Opens for reading.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidImage`], [`ErrorKind::UnsupportedFeature`] or [`ErrorKind::Corrupt`] for whatever breaks V1 to V21, but for where
    /// the refcounts are (see [`Header::parse_to_read`]); I/O. A bad entry of a table is an error where it is used, and nowhere else.
    pub fn open(storage: Arc<dyn Storage>) -> Result<Self> {
        let header = read_header(&*storage, Header::parse_to_read)?;
        let tables = Tables::open(storage.clone(), &header, None, BACKING_TABLE_MEMORY)?;
        Ok(ImageReader { storage, header: RwLock::new(header), tables, inflated: Inflated::default() })
    }

    /// Cluster size, widths and virtual size.
    pub fn geometry(&self) -> Geometry {
        self.tables.geometry()
    }

    /// The header as it is now.
    pub fn header(&self) -> Header {
        self.header.read().clone()
    }

    /// The file it lies in.
    pub fn storage(&self) -> &Arc<dyn Storage> {
        &self.storage
    }

    /// The backing file's name, never opened here.
    pub fn backing(&self) -> Option<BackingReference> {
        self.header.read().backing.clone()
    }
}

/// Remembers which parts of the mapping of an image change while it exists.
#[derive(Debug)]
pub struct Changes<'a> {
    image: &'a Image,
    watch: u64,
}

impl Changes<'_> {
    /// Guest bytes whose mapping may have changed since the begin, or since this was asked last: each the
    /// span of one L2 table, of which the last may reach beyond the end of the disk.
    pub fn take(&self) -> Vec<Range<u64>> {
        let span = self.image.reader.geometry().l2_span();
        let changed = self.image.reader.tables.take_changed(self.watch);
        changed.into_iter().map(|index| (index as u64 * span)..(index as u64 + 1).saturating_mul(span)).collect()
    }
}

impl Drop for Changes<'_> {
    fn drop(&mut self) {
        self.image.reader.tables.end_watch(self.watch);
    }
}

fn read_header(storage: &dyn Storage, parse: fn(&[u8], u64) -> std::result::Result<Header, FormatError>) -> Result<Header> {
    let size = storage.size();
    let mut first = vec![0; size.min(HEADER_AREA) as usize];
    storage.read_at(0, &mut first).map_err(|error| Error::io("header", error))?;
    Ok(parse(&first, size)?)
}

/// What a write to the header that failed may have replaced: offset in bytes, and the bytes as they were. After an error any part of a write may
/// have been done (a header may name an L1 table that we do not write to), so they are put back before anything else is written that the
/// header leads to.
type HeaderOnDisk = Option<(u64, Vec<u8>)>;

/// An image open for writing.
#[derive(Debug)]
pub struct Image {
    reader: ImageReader,
    allocator: Arc<Allocator>,
    commit: GroupCommit,
    write_back: Mutex<{ rank::WRITE_BACK }, ()>,
    /// One change of the header at a time, from reading it in memory to both copies being new.
    header_change: Mutex<{ rank::HEADER }, HeaderOnDisk>,
    /// One fdatasync at a time: the kernel reports an error once per open file, and of two at the same time it would be the wrong one that
    /// succeeds. The next one finds the latch (P7, H21).
    barriers: Mutex<{ rank::BARRIER }, ()>,
    /// Bytes of new clusters since the last pass began.
    uncommitted: AtomicU64,
    /// The last pass could not lower the refcounts of what it had freed.
    unreleased: AtomicBool,
    /// Told when a commit should not wait for the timer.
    commit_wanted: (Sender<()>, Receiver<()>),
    /// Latched by a failed barrier (P7) and by corruption (P11): nothing is written any more.
    failed: AtomicBool,
}

impl Image {
    /// Opens for writing; the caller has locked the file. Changes nothing yet: see [`Image::begin_writing`].
    /// Where the last writer has not closed the image, the host's cache of the file is dropped first.
    ///
    /// # Errors
    /// As [`ImageReader::open`], for tables that V9, V10, V12, V22 and V23 do not allow, and for what we cannot write: the dirty or corrupt bit,
    /// internal snapshots, persistent bitmaps. I/O, where the host cannot write back what the last writer left.
    pub fn open(storage: Arc<dyn Storage>) -> Result<Self> {
        settle::settle(&*storage)?;
        let header = read_header(&*storage, Header::parse)?;
        header.check_writable()?;
        let allocator = Arc::new(Allocator::open(storage.clone(), &header)?);
        let tables = Tables::open(storage.clone(), &header, Some(allocator.clone()), OVERLAY_TABLE_MEMORY)?;
        let reader = ImageReader { storage, header: RwLock::new(header), tables, inflated: Inflated::default() };
        Ok(Image {
            reader,
            allocator,
            commit: GroupCommit::default(),
            write_back: Mutex::new(()),
            header_change: Mutex::new(None),
            barriers: Mutex::new(()),
            uncommitted: AtomicU64::new(0),
            unreleased: AtomicBool::new(false),
            commit_wanted: bounded(1),
            failed: AtomicBool::new(false),
        })
    }

    /// To be called once before the first change, when everything else that can go wrong at open has not: marks the file as open, so that the
    /// next one who opens it knows if we were killed, and clears the autoclear bits that we do not know, both durably (R11; specification:
    /// "autoclear_features").
    ///
    /// # Errors
    /// I/O.
    pub fn begin_writing(&self) -> Result<()> {
        self.reader.storage.set_open_mark().map_err(|error| Error::io("marking the image as open", error))?;
        if self.reader.header().autoclear == 0 {
            return Ok(());
        }
        self.change_header(|header| {
            header.autoclear = 0;
            let (at, bytes) = patch::autoclear(0);
            (at, bytes.to_vec())
        })
    }

    /// The last thing: to be called after [`Image::close`] has gone well, when nothing is leaked. The mark goes; where it stays, the next open
    /// looks for leaks in vain.
    pub fn end_writing(&self) {
        if (self.is_usable() || without(Step::FailedImageKeepsItsMark))
            && let Err(error) = self.reader.storage.remove_open_mark()
        {
            log::warn!("the mark of an open image stays: {}", crate::error::os_text(&error));
        }
    }

    /// Whether nothing has failed for good.
    pub fn is_usable(&self) -> bool {
        self.check_usable().is_ok()
    }

    /// L2 tables beyond so many bytes are dropped when they are clean.
    #[cfg(test)]
    pub(crate) fn limit_table_memory(&mut self, bytes: usize) {
        self.reader.tables.limit_memory(bytes);
    }

    /// Yields when so much waits to be committed that somebody should flush without waiting for the timer.
    pub fn commit_wanted(&self) -> Receiver<()> {
        self.commit_wanted.1.clone()
    }

    /// After a change of the mapping: asks for a commit where the new clusters are many, or the tables that are dirty.
    fn ask_for_commit(&self) {
        if self.uncommitted.load(Ordering::Relaxed) >= UNCOMMITTED_DATA || self.reader.tables.dirty_bytes() > OVERLAY_TABLE_MEMORY / 2 {
            // Full: somebody is asked already.
            let _ = self.commit_wanted.0.try_send(());
        }
    }

    /// Where the highest cluster ends that was allocated since the image was opened, in bytes; 0
    /// where none was.
    pub fn highest_allocated(&self) -> u64 {
        self.allocator.highest()
    }

    /// The reading half.
    pub fn reader(&self) -> &ImageReader {
        &self.reader
    }

    /// Replaces the backing reference by `backing`, durably: one small write between two barriers (R12). The caller has flushed, and holds the
    /// whole disk.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidArgument`] where the name does not fit the first cluster; I/O. The old reference then still stands.
    pub fn set_backing(&self, backing: Option<&BackingReference>) -> Result<()> {
        self.check_usable()?;
        let mut on_disk = self.header_change.lock();
        let change =
            self.reader.header().with_backing(backing).map_err(|error| Error::wrap(ErrorKind::InvalidArgument, "backing file", error))?;
        if let Some((at, bytes)) = &change.before {
            self.write_header(&mut on_disk, *at, bytes)?;
        }
        let (at, bytes) = &change.patch;
        self.write_header(&mut on_disk, *at, bytes)?;
        *self.reader.header.write() = change.header;
        Ok(())
    }

    /// From now on remembers which parts of the mapping change.
    pub fn watch_changes(&self) -> Changes<'_> {
        Changes { image: self, watch: self.reader.tables.watch_changes() }
    }

    /// Changes fields of the header, on disk and durably, then in memory: `change` makes the change and says which bytes are written where.
    fn change_header(&self, change: impl FnOnce(&mut Header) -> (u64, Vec<u8>)) -> Result<()> {
        let mut on_disk = self.header_change.lock();
        let mut header = self.reader.header();
        let (at, bytes) = change(&mut header);
        self.write_header(&mut on_disk, at, &bytes)?;
        *self.reader.header.write() = header;
        Ok(())
    }

    /// Writes inside the first cluster and makes it durable.
    fn write_header(&self, on_disk: &mut HeaderOnDisk, at: u64, bytes: &[u8]) -> Result<()> {
        assert!(at + bytes.len() as u64 <= self.reader.geometry().cluster_size(), "the header ends with the first cluster (R16)");
        if !without(Step::HeaderIsPutBack) {
            self.put_header_back(on_disk)?;
        }
        let mut before = vec![0; bytes.len()];
        self.reader.storage.read_at(at, &mut before).map_err(|error| Error::io("header", error))?;
        if let Err(error) = self.reader.storage.write_at(WriteKind::Header, at, bytes) {
            *on_disk = Some((at, before));
            return Err(Error::io("header", error));
        }
        self.barrier(Step::BarrierAfterHeader)
    }

    /// Undoes what a failed write may have done to the header, durably (R11).
    fn put_header_back(&self, on_disk: &mut HeaderOnDisk) -> Result<()> {
        if let Some((at, bytes)) = &*on_disk {
            self.reader.storage.write_at(WriteKind::Header, *at, bytes).map_err(|error| Error::io("header", error))?;
            *on_disk = None;
            self.barrier(Step::BarrierAfterHeader)?;
        }
        Ok(())
    }

    /// The barrier at this step. A failed one is never retried with success: what it covered may be lost although later ones succeed (P7).
    fn barrier(&self, step: Step) -> Result<()> {
        let _one_at_a_time = (!without(Step::OneBarrierAtATime)).then(|| self.barriers.lock());
        self.check_usable()?;
        if without(step) {
            return Ok(());
        }
        self.reader.storage.sync().map_err(|error| {
            self.failed.store(!without(Step::FailedBarrierLatches), Ordering::SeqCst);
            log::error!("fdatasync of the overlay failed ({error}): no write is accepted until it is opened again");
            Error::io("fdatasync", error)
        })
    }

    /// Fails once [`Image::failed`] is latched.
    fn check_usable(&self) -> Result<()> {
        if self.failed.load(Ordering::SeqCst) {
            // With the errno of what latched it: a job that ends by this says what QEMU's says.
            return Err(Error::io(
                "the overlay failed earlier and is not written any more, unmount and check it",
                rustix::io::Errno::IO.into(),
            ));
        }
        Ok(())
    }

    /// Passes a result on; corruption latches the image and sets the corrupt bit in the header (P11), so that it is looked at before it is
    /// written again (specification: incompatible feature bit 1). That goes for a bad entry of a table that was loaded on the way too, although the
    /// result is of another one: what is good is read all the same.
    pub(crate) fn watch<T>(&self, result: Result<T>) -> Result<T> {
        match &result {
            Err(error) if error.kind() == ErrorKind::Corrupt => self.latch_corrupt(error),
            _ if self.reader.tables.is_corrupt() && !self.failed.load(Ordering::Relaxed) => {
                self.latch_corrupt(&self.reader.tables.corruption().unwrap_or_default());
            }
            _ => {}
        }
        result
    }

    fn latch_corrupt(&self, what: &dyn std::fmt::Display) {
        if !without(Step::CorruptionLatches) && !self.failed.swap(true, Ordering::SeqCst) {
            log::error!("the overlay is corrupt ({what}): no write is accepted any more, run qemu-img check");
            self.mark_corrupt();
        }
    }

    fn mark_corrupt(&self) {
        let _one_at_a_time = self.header_change.lock();
        let mut header = self.reader.header();
        if header.geometry.version() < 3 {
            return;
        }
        header.incompatible |= feature::CORRUPT;
        let (at, bytes) = patch::incompatible(header.incompatible);
        // Not by `barrier`, which the latch has closed.
        let _alone = self.barriers.lock();
        match self.reader.storage.write_at(WriteKind::Header, at, &bytes).and_then(|()| self.reader.storage.sync()) {
            Ok(()) => *self.reader.header.write() = header,
            Err(error) => log::error!("the corrupt bit could not be set: {error}"),
        }
    }

    /// The mapping at a guest offset; see [`ImageReader::map`].
    ///
    /// # Errors
    /// As [`ImageReader::map`]; corruption latches the image.
    pub fn map(&self, at: GuestOffset, max: u64) -> Result<Extent> {
        self.watch(self.reader.map(at, max))
    }

    /// Reads a run; see [`ImageReader::read_extent`].
    ///
    /// # Errors
    /// As [`ImageReader::read_extent`].
    pub fn read_extent(&self, at: GuestOffset, extent: &Extent, buf: &mut [u8]) -> Result<()> {
        self.reader.read_extent(at, extent, buf)
    }

    /// Overwrites inside one run of clusters whose refcount is one (R10): no metadata changes.
    ///
    /// # Errors
    /// I/O.
    ///
    /// # Panics
    /// If the run is not `Data { in_place: true }` or `data` is longer than it.
    pub fn write_in_place(&self, at: GuestOffset, extent: &Extent, data: &[u8]) -> Result<()> {
        let Mapping::Data { host, in_place: true } = extent.mapping else {
            panic!("in-place write to {:?}", extent.mapping);
        };
        assert!(data.len() as u64 <= extent.len);
        self.check_usable()?;
        let geometry = self.reader.geometry();
        let offset = geometry.host_offset(host).0 + geometry.in_cluster(at);
        self.reader.storage.write_at(WriteKind::Data, offset, data).map_err(|error| Error::io(format!("data at {offset:#x}"), error))
    }
}
