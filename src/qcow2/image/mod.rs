//! One qcow2 file: maps guest clusters to host clusters, and changes the mapping without losing a
//! cluster.
//!
//! ```text
//!            L1 slot ──► L2 table (entries: one word, or two) ──► host cluster
//!   allocate ─► fill ─► publish    life of a new cluster: refcount, then data, then the L2 entry
//!   zero, unmap                    the entry is cleared, the old cluster joins the pending frees
//!   flush                          the write-back pass: [`write_back`]
//! ```
//!
//! **Touches:** `format`, `storage`, threads that decompress; range guards as proof only.
//! **Never:** opens a backing file, knows what lies below the image, replies to a guest.
//! **Locks:** ranks `WRITE_BACK` to `SLOT` of [`host::sync::rank`], taken in that order.
//! **Invariants** (docs/invariants.md): I1 the mapping of a cluster changes only under an exclusive
//! guard of its range; I2 on disk, refcounts are never below the number of references; I3 a
//! published cluster was filled first (only [`Image::fill`], [`Image::fill_by_cloning`] and
//! `fill_own` make a [`Filled`]); I6 a lookup sees an entry as it was or as it is.
//!
//! With extended L2 entries, each of the 32 subclusters of a cluster has a mapping of its own.
//! Everything in this module counts in subclusters; without extended entries a cluster is one. The
//! entry belongs to the cluster, so a range guard covers whole clusters whichever part changes.
//! Subclusters share their host cluster: the first one that is stored allocates it, the others are
//! written into it, and it is freed with the last of them.

use std::ops::Range;
use std::sync::{Arc, OnceLock};

use crossbeam_channel::{Receiver, Sender, bounded};

use crate::format::{
    BackingReference, FormatError, Geometry, GuestOffset, Header, HeaderPatch, HostCluster,
    Mapping, feature, patch,
};
use crate::journal::{BarrierState, Journal};
use host::mutants::{Step, without};
use host::storage::{OpenMark, ReadAt, Sidecar, Storage, WriteKind};
use host::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use host::sync::{Mutex, RwLock, rank};
use host::{Error, ErrorKind, Result};

mod allocator;
mod changed;
mod check;
mod compressed_run;
mod gaps;
mod grow;
mod helpers;
mod inflated;
mod judge;
mod judged;
mod l2_table;
mod late_search;
mod lookup;
mod packed;
mod place;
mod publish;
mod refcounts;
mod settle;
mod slots;
mod start;
mod store;
mod tables;
mod take_over;
mod write_back;

#[cfg(test)]
mod tests;

pub use check::{CheckReport, Finding, Leaks, check};
pub use late_search::SearchStep;
pub use lookup::Extent;
pub use place::{Holes, Location};
pub use publish::{Allocation, Filled};
pub use settle::distrust;
pub use start::LeakSearch;

use allocator::Allocator;
use helpers::Helpers;
use inflated::Inflated;
use late_search::LateSearch;
use tables::Tables;
use write_back::GroupCommit;

/// Bytes that are read from the start of the file to parse the header. This is the largest cluster
/// size: header, extensions and backing file name lie in the first cluster.
const HEADER_AREA: u64 = 2 << 20;

/// Memory for the L2 tables of the overlay, in bytes. Above it, clean tables are packed
/// or dropped when one is loaded and at the end of a pass. 64 MiB map 512 GiB at 64 KiB
/// clusters, and much more where tables can be packed.
const OVERLAY_TABLE_MEMORY: usize = 64 << 20;
/// A commit is requested when this many bytes in new clusters are not committed. The limit bounds
/// how long the next flush of the guest takes, and, with the journal, what a crash leaks.
const UNCOMMITTED_DATA: u64 = 128 << 20;
/// A background thread waits for a pass when this many bytes of data in new clusters may not be on
/// disk. Twice as much as that after which a pass is requested: a disk that is fast enough makes
/// the thread wait for nothing.
const UNWRITTEN_DATA: u64 = 2 * UNCOMMITTED_DATA;

/// Memory for the L2 tables of one backing file, in bytes. It is smaller than the overlay's because
/// a stream reads each table once.
const BACKING_TABLE_MEMORY: usize = 16 << 20;

/// The read-only part of an open image. The backing chain holds readers of this type, so a backing
/// file cannot be written (I5).
#[derive(Debug)]
pub struct ImageReader {
    storage: Arc<dyn ReadAt>,
    header: RwLock<{ rank::LEAF }, Header>,
    tables: Tables,
    inflated: Inflated,
    /// Made by the first read of several compressed clusters.
    helpers: OnceLock<Helpers>,
}

impl ImageReader {
    /// Opens an image for reading.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidImage`], [`ErrorKind::UnsupportedFeature`] or [`ErrorKind::Corrupt`] for
    /// a header that breaks one of V1 to V21, except the rules on the location of the refcounts
    /// (see [`Header::parse_to_read`]); I/O. A bad table entry is an error only for a request that
    /// uses the entry.
    pub fn open(storage: Arc<dyn ReadAt>) -> Result<Self> {
        let header = read_header(&*storage, Header::parse_to_read)?;
        let tables = Tables::open(storage.clone(), &header, None, BACKING_TABLE_MEMORY)?;
        Ok(ImageReader {
            storage,
            header: RwLock::new(header),
            tables,
            inflated: Inflated::default(),
            helpers: OnceLock::new(),
        })
    }

    /// Returns the cluster size, the field widths and the virtual size.
    pub fn geometry(&self) -> Geometry {
        self.tables.geometry()
    }

    /// Returns a copy of the current header.
    pub fn header(&self) -> Header {
        self.header.read().clone()
    }

    /// Returns the file of the image.
    pub fn storage(&self) -> &Arc<dyn ReadAt> {
        &self.storage
    }

    /// Returns the name and format of the backing file, which this crate never opens.
    pub fn backing(&self) -> Option<BackingReference> {
        self.header.read().backing.clone()
    }
}

/// Records which parts of the mapping of an image change while this value exists.
#[derive(Debug)]
pub struct Changes<'a> {
    image: &'a Image,
    watch: u64,
}

impl Changes<'_> {
    /// Returns the guest byte ranges whose mapping may have changed since the watch began or since
    /// the last call. Each range is the span of one L2 table, and the last one may reach beyond the
    /// end of the disk.
    pub fn take(&self) -> Vec<Range<u64>> {
        let span = self.image.reader.geometry().l2_span();
        let changed = self.image.reader.tables.take_changed(self.watch);
        changed
            .into_iter()
            .map(|index| (index as u64 * span)..(index as u64 + 1).saturating_mul(span))
            .collect()
    }
}

impl Drop for Changes<'_> {
    fn drop(&mut self) {
        self.image.reader.tables.end_watch(self.watch);
    }
}

/// Parses a header from the first bytes of a file and the size of the file in bytes.
type ParseHeader = fn(&[u8], u64) -> std::result::Result<Header, FormatError>;

fn read_header(storage: &dyn ReadAt, parse: ParseHeader) -> Result<Header> {
    let size = storage.size();
    let mut first = vec![0; size.min(HEADER_AREA) as usize];
    storage.read_at(0, &mut first).map_err(|error| Error::io("header", error))?;
    Ok(parse(&first, size)?)
}

/// Bytes that a failed header write may have replaced: their offset in bytes, and their old
/// content. After an error any part of a write may be on disk, and the header may then name an L1
/// table that this process does not write to. The old bytes are therefore restored before anything
/// else is written that the header leads to.
type HeaderOnDisk = Option<(u64, Vec<u8>)>;

/// An image that is open for writing.
#[derive(Debug)]
pub struct Image {
    reader: ImageReader,
    /// The file of `reader`, with write access.
    storage: Arc<dyn Storage>,
    /// The metadata of the file that is kept outside its bytes, such as the open mark.
    sidecar: Arc<dyn Sidecar>,
    allocator: Arc<Allocator>,
    commit: GroupCommit,
    write_back: Mutex<{ rank::WRITE_BACK }, ()>,
    /// Serialises changes of the header, from reading the copy in memory until both copies are new.
    header_change: Mutex<{ rank::HEADER }, HeaderOnDisk>,
    /// Serialises fdatasync(2). The kernel reports a write-back error once per open file, so of two
    /// concurrent calls the wrong one could succeed. A barrier that waits here sees the latch
    /// `failed` afterwards (P7, H21).
    barriers: Mutex<{ rank::BARRIER }, ()>,
    /// Bytes that were written into new clusters since the last pass began.
    uncommitted: AtomicU64,
    /// Bytes that were written, and not cloned, into new clusters or unused parts of clusters since
    /// the last pass that has not failed began.
    unwritten: AtomicU64,
    /// See [`UNWRITTEN_DATA`].
    unwritten_limit: u64,
    /// Whether the last pass failed to lower the refcounts of the clusters it had freed.
    unreleased: AtomicBool,
    /// Signalled when a commit should not wait for the timer.
    commit_wanted: (Sender<()>, Receiver<()>),
    /// Latched by a failed barrier (P7) and by corruption (P11). Nothing is written after that.
    failed: AtomicBool,
    /// What a successor of this process needs to know; `None` if there will be none.
    journal: Option<Arc<Journal>>,
    /// Whether the process that opened the image first has died. Clusters that it had freed or
    /// allocated may be leaked.
    is_taken_over: bool,
    /// The search for these leaks, unless it has ended or a thread makes a step.
    late_search: Mutex<{ rank::LEAF }, Option<LateSearch>>,
    /// Whether that search has seen everything, and queued all leaks as frees.
    is_searched: AtomicBool,
}

impl Image {
    /// Opens an image for writing; the caller has locked the file. Nothing on disk changes before
    /// [`Image::begin_writing`]. If the last writer did not close the image, the host's page cache
    /// of the file is dropped first.
    ///
    /// # Errors
    /// As [`ImageReader::open`]; for tables that break V9, V10, V12, V22 or V23; for images that
    /// cannot be written: dirty or corrupt bit, internal snapshots, persistent bitmaps. I/O, also
    /// if the host cannot write back the dirty pages that the last writer left.
    pub fn open<F: Storage + Sidecar>(file: Arc<F>) -> Result<Self> {
        Image::open_parsed(Arc::clone(&file) as Arc<dyn Storage>, file, Header::parse)
    }

    /// Opens an image as [`Image::open`] does, but accepts any format of the backing file, because
    /// a repair does not open that file.
    ///
    /// # Errors
    /// As [`Image::open`] otherwise.
    pub fn open_to_repair<F: Storage + Sidecar>(file: Arc<F>) -> Result<Self> {
        Image::open_parsed(Arc::clone(&file) as Arc<dyn Storage>, file, Header::parse_to_repair)
    }

    fn open_parsed(
        storage: Arc<dyn Storage>,
        sidecar: Arc<dyn Sidecar>,
        parse: ParseHeader,
    ) -> Result<Self> {
        settle::settle(&*storage, &*sidecar)?;
        let image = Image::open_settled(storage, sidecar, parse)?;
        image.reader.header.read().check_writable()?;
        Ok(image)
    }

    /// Opens an image whose bytes in the host's page cache can be trusted.
    fn open_settled(
        storage: Arc<dyn Storage>,
        sidecar: Arc<dyn Sidecar>,
        parse: ParseHeader,
    ) -> Result<Self> {
        let header = read_header(&*storage, parse)?;
        let allocator = Arc::new(Allocator::open(storage.clone(), &header)?);
        let tables =
            Tables::open(storage.clone(), &header, Some(allocator.clone()), OVERLAY_TABLE_MEMORY)?;
        let reader = ImageReader {
            storage: storage.clone(),
            header: RwLock::new(header),
            tables,
            inflated: Inflated::default(),
            helpers: OnceLock::new(),
        };
        Ok(Image {
            reader,
            storage,
            sidecar,
            allocator,
            commit: GroupCommit::default(),
            write_back: Mutex::new(()),
            header_change: Mutex::new(None),
            barriers: Mutex::new(()),
            uncommitted: AtomicU64::new(0),
            unwritten: AtomicU64::new(0),
            unwritten_limit: UNWRITTEN_DATA,
            unreleased: AtomicBool::new(false),
            commit_wanted: bounded(1),
            failed: AtomicBool::new(false),
            journal: None,
            is_taken_over: false,
            late_search: Mutex::new(None),
            is_searched: AtomicBool::new(false),
        })
    }

    /// Prepares the image for its first change. Callers call this once, after every other step of
    /// the open that can fail. It marks the file as open, so that the next open detects a killed
    /// process, and clears the autoclear bits, which this crate does not maintain. Both are durable
    /// on return (R11; specification: "autoclear_features").
    ///
    /// # Errors
    /// I/O.
    pub fn begin_writing(&self) -> Result<()> {
        // The mark of a process that has died is there. Setting it is an fsync(2), which would take
        // the report of a failed write-back that no barrier has seen (P7).
        let is_marked = self.is_taken_over
            && self.sidecar.open_mark().is_ok_and(|mark| mark == OpenMark::Present);
        if !is_marked {
            self.sidecar
                .set_open_mark()
                .map_err(|error| Error::io("marking the image as open", error))?;
        }
        if self.reader.header().autoclear == 0 || !self.is_usable() {
            return Ok(());
        }
        self.change_header(|header| {
            header.autoclear = 0;
            let (at, bytes) = patch::autoclear(0);
            (at, bytes.to_vec())
        })
    }

    /// Removes the open mark. Callers call this last, after [`Image::close`] has succeeded and
    /// nothing is leaked. If the mark stays, the next open searches for leaks.
    pub fn end_writing(&self) {
        if (self.may_lose_mark() || without(Step::FailedImageKeepsItsMark))
            && let Err(error) = self.sidecar.remove_open_mark()
        {
            log::warn!("the mark of an open image stays: {}", host::error::os_text(&error));
        }
    }

    /// Returns the file of the image.
    pub fn storage(&self) -> &Arc<dyn Storage> {
        &self.storage
    }

    /// Returns the metadata that is kept outside the bytes of that file.
    pub fn sidecar(&self) -> &Arc<dyn Sidecar> {
        &self.sidecar
    }

    /// Returns whether the open mark may be removed after a close: no failure was latched, and what
    /// a process that has died may have leaked was searched for ([`Image::search_step`]).
    pub fn may_lose_mark(&self) -> bool {
        self.is_usable() && (!self.is_taken_over || self.is_searched.load(Ordering::Acquire))
    }

    /// Returns whether the image still accepts writes, that is, whether no failure was latched.
    pub fn is_usable(&self) -> bool {
        self.check_usable().is_ok()
    }

    /// Limits the memory for L2 tables: clean tables beyond `bytes` bytes are packed or
    /// dropped.
    #[cfg(any(test, feature = "testing"))]
    pub fn limit_table_memory(&mut self, bytes: usize) {
        self.reader.tables.limit_memory(bytes);
    }

    /// Sets after how many bytes [`Image::has_much_unwritten`] is true.
    #[cfg(any(test, feature = "testing"))]
    pub fn limit_unwritten(&mut self, bytes: u64) {
        self.unwritten_limit = bytes;
    }

    /// Returns a channel that yields when so much is uncommitted that its receiver should flush
    /// without waiting for the timer.
    pub fn commit_wanted(&self) -> Receiver<()> {
        self.commit_wanted.1.clone()
    }

    /// Returns a channel that yields when a pass has become necessary: after the first change of a
    /// table since the last pass has taken the tables, after a header write that failed, and after
    /// a pass that has left something to the next one. While it yields nothing and
    /// [`Image::is_dirty`] is false, a commit timer need not run (P2).
    pub fn became_dirty(&self) -> Receiver<()> {
        self.reader.tables.became_dirty()
    }

    /// Requests a commit, after a change of the mapping, if many new clusters are uncommitted or
    /// many tables are dirty.
    fn ask_for_commit(&self) {
        if self.uncommitted.load(Ordering::Relaxed) >= UNCOMMITTED_DATA
            || self.reader.tables.dirty_bytes() > OVERLAY_TABLE_MEMORY / 2
            || self.journal.as_deref().is_some_and(Journal::is_half_full)
        {
            // The channel is full if a request is already pending.
            let _ = self.commit_wanted.0.try_send(());
        }
    }

    /// Returns whether so much data was written into new clusters, and into unused parts of
    /// clusters, since the last pass began that background threads should wait for a pass before
    /// they write more. This bounds the data of a stream that is in the page cache only: 256 MiB,
    /// and as much again that the running pass writes.
    pub fn has_much_unwritten(&self) -> bool {
        self.unwritten.load(Ordering::Relaxed) >= self.unwritten_limit
    }

    /// Returns whether a change of the mapping may have to wait for a pass, because the journal is
    /// nearly full. Threads that must not wait leave such a change to others.
    pub fn is_pressed(&self) -> bool {
        self.journal.as_deref().is_some_and(Journal::is_nearly_full)
    }

    /// Returns the end, in bytes, of the highest cluster that was allocated since the image was
    /// opened; 0 if no cluster was.
    pub fn highest_allocated(&self) -> u64 {
        self.allocator.highest()
    }

    /// Returns the read-only part.
    pub fn reader(&self) -> &ImageReader {
        &self.reader
    }

    /// Replaces the backing reference by `backing`, durably, with one small write between two
    /// barriers (R12). The caller has flushed and holds an exclusive guard of the whole disk.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidArgument`] if the name does not fit into the first cluster; I/O. The old
    /// reference then remains.
    pub fn set_backing(&self, backing: Option<&BackingReference>) -> Result<()> {
        self.rewrite_header(|header| header.with_backing(backing))
    }

    /// Stores the pins of remote backing files in the header, durably, as [`Image::set_backing`]
    /// does. The guest's requests may go on.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidArgument`] if they do not fit; I/O. The old pins then remain.
    pub fn set_pins(&self, pins: &[u8]) -> Result<()> {
        self.rewrite_header(|header| header.with_pins(pins))
    }

    fn rewrite_header(
        &self,
        change: impl FnOnce(&Header) -> std::result::Result<HeaderPatch, FormatError>,
    ) -> Result<()> {
        self.check_usable()?;
        let mut on_disk = self.header_change.lock();
        let change = change(&self.reader.header())
            .map_err(|error| Error::wrap(ErrorKind::InvalidArgument, "backing file", error))?;
        if let Some((at, bytes)) = &change.before {
            self.write_header(&mut on_disk, *at, bytes)?;
        }
        let (at, bytes) = &change.patch;
        self.write_header(&mut on_disk, *at, bytes)?;
        *self.reader.header.write() = change.header;
        Ok(())
    }

    /// Starts to record which parts of the mapping change.
    pub fn watch_changes(&self) -> Changes<'_> {
        Changes { image: self, watch: self.reader.tables.watch_changes() }
    }

    /// Changes fields of the header: on disk and durably first, then in memory. `change` edits the
    /// header and returns the offset and the bytes to write.
    fn change_header(&self, change: impl FnOnce(&mut Header) -> (u64, Vec<u8>)) -> Result<()> {
        let mut on_disk = self.header_change.lock();
        let mut header = self.reader.header();
        let (at, bytes) = change(&mut header);
        self.write_header(&mut on_disk, at, &bytes)?;
        *self.reader.header.write() = header;
        Ok(())
    }

    /// Writes bytes inside the first cluster and makes them durable.
    fn write_header(&self, on_disk: &mut HeaderOnDisk, at: u64, bytes: &[u8]) -> Result<()> {
        assert!(
            at + bytes.len() as u64 <= self.reader.geometry().cluster_size(),
            "the header ends with the first cluster (R16)"
        );
        if !without(Step::HeaderIsPutBack) {
            self.put_header_back(on_disk)?;
        }
        let mut before = vec![0; bytes.len()];
        self.storage.read_at(at, &mut before).map_err(|error| Error::io("header", error))?;
        if let Err(error) = self.storage.write_at(WriteKind::Header, at, bytes) {
            *on_disk = Some((at, before));
            self.reader.tables.signal_dirty();
            return Err(Error::io("header", error));
        }
        self.barrier(Step::BarrierAfterHeader)
    }

    /// Restores, durably, what a failed write may have changed in the header (R11).
    fn put_header_back(&self, on_disk: &mut HeaderOnDisk) -> Result<()> {
        if let Some((at, bytes)) = &*on_disk {
            self.storage
                .write_at(WriteKind::Header, *at, bytes)
                .map_err(|error| Error::io("header", error))?;
            *on_disk = None;
            self.barrier(Step::BarrierAfterHeader)?;
        }
        Ok(())
    }

    /// Makes all earlier writes durable. A failed barrier is never retried: a later call may
    /// succeed although data that the failed one covered is lost (P7).
    fn barrier(&self, step: Step) -> Result<()> {
        let _one_at_a_time = (!without(Step::OneBarrierAtATime)).then(|| self.barriers.lock());
        self.check_usable()?;
        if without(step) {
            return Ok(());
        }
        if !without(Step::BarrierIsJournaled) {
            self.note_barrier(BarrierState::Called)?;
        }
        self.storage.sync().map_err(|error| {
            if !without(Step::FailedBarrierLatches) {
                self.latch();
            }
            log::error!("fdatasync of the overlay failed ({error}): no write is accepted until it is opened again");
            Error::io("fdatasync", error)
        })?;
        self.note_barrier(BarrierState::Succeeded)
    }

    /// Records the state of the barriers for a successor. If that is not possible, a successor
    /// could not be trusted, so the image accepts no more writes.
    fn note_barrier(&self, state: BarrierState) -> Result<()> {
        let Some(journal) = &self.journal else { return Ok(()) };
        journal.set_barrier(state).map_err(|error| self.lose_journal(error))
    }

    /// Latches the image because a change could not be recorded. Returns the error for the request
    /// that made the change.
    fn lose_journal(&self, error: std::io::Error) -> Error {
        log::error!("the journal cannot be written ({error}): no write is accepted any more");
        self.failed.store(true, Ordering::SeqCst);
        Error::io("journal", error)
    }

    /// Accepts no more writes, also in a successor of this process.
    fn latch(&self) {
        self.failed.store(true, Ordering::SeqCst);
        if let Some(journal) = &self.journal
            && !without(Step::LatchIsJournaled)
            && let Err(error) = journal.set_barrier(BarrierState::Failed)
        {
            log::error!("the journal cannot be written: {error}");
        }
    }

    /// Returns an error once [`Image::failed`] is latched.
    fn check_usable(&self) -> Result<()> {
        if self.failed.load(Ordering::SeqCst) {
            // EIO, so that a job that ends because of the latch reports the error that QEMU's job
            // reports.
            return Err(Error::io(
                "the overlay failed earlier and is not written any more, unmount and check it",
                rustix::io::Errno::IO.into(),
            ));
        }
        Ok(())
    }

    /// Returns `result` unchanged. A corruption error latches the image and sets the corrupt bit of
    /// the header (P11; specification: incompatible feature bit 1), so that the image is checked
    /// before it is written again. A table that was loaded on the way and has a bad entry latches
    /// the image too, even if `result` comes from a good entry; good entries can still be read.
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
            log::error!(
                "the overlay is corrupt ({what}): no write is accepted any more, run qemu-img check"
            );
            self.latch();
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
        // [`Image::barrier`] cannot be used here: the latch makes it fail.
        let _alone = self.barriers.lock();
        match self
            .storage
            .write_at(WriteKind::Header, at, &bytes)
            .and_then(|()| self.storage.sync())
        {
            Ok(()) => *self.reader.header.write() = header,
            Err(error) => log::error!("the corrupt bit could not be set: {error}"),
        }
    }

    /// Returns the mapping at a guest offset; see [`ImageReader::map`].
    ///
    /// # Errors
    /// As [`ImageReader::map`]; corruption latches the image.
    pub fn map(&self, at: GuestOffset, max: u64) -> Result<Extent> {
        self.watch(self.reader.map(at, max))
    }

    /// Reads the bytes of a run; see [`ImageReader::read_extent`].
    ///
    /// # Errors
    /// As [`ImageReader::read_extent`].
    pub fn read_extent(&self, at: GuestOffset, extent: &Extent, buf: &mut [u8]) -> Result<()> {
        self.reader.read_extent(at, extent, buf)
    }

    /// Overwrites bytes inside one run of clusters whose refcount is one (R10). No metadata
    /// changes.
    ///
    /// # Errors
    /// I/O.
    ///
    /// # Panics
    /// If the run is not `Data { in_place: true }` or `data` is longer than the run.
    pub fn write_in_place(&self, at: GuestOffset, extent: &Extent, data: &[u8]) -> Result<()> {
        let Mapping::Data { host, in_place: true } = extent.mapping else {
            panic!("in-place write to {:?}", extent.mapping);
        };
        assert!(data.len() as u64 <= extent.len);
        self.check_usable()?;
        self.write_data(WriteKind::Data, host, self.reader.geometry().in_cluster(at), data)
    }

    /// Writes guest data to contiguous host clusters, from byte `skip` of the first one on.
    fn write_data(
        &self,
        kind: WriteKind,
        start: HostCluster,
        skip: u64,
        data: &[u8],
    ) -> Result<()> {
        let offset = self.reader.geometry().host_offset(start).0 + skip;
        self.storage
            .write_at(kind, offset, data)
            .map_err(|error| Error::io(format!("data at {offset:#x}"), error))
    }
}
