//! The guest's disk: an overlay above a chain of backing files.
//!
//! ```text
//! read   shared(range); read what the overlay holds; if that is all of it, done
//!        else drop; exclusive(missing clusters); map again; read below; continue behind them;
//!             send the reply; store the copy from the same buffer; drop
//! write  per run: Data { in_place }? shared(run); map again; overwrite
//!        else exclusive(its clusters); map again;
//!             overwrite in place, or allocate, complete from below, fill, publish
//! stream populate(512 KiB) repeatedly; then detach_backing
//! ```
//! While a backing file is read, only the missing clusters are held. A backing file that hangs
//! therefore delays only requests for those clusters. Range guards cannot be upgraded: a request
//! drops its shared guard, takes the exclusive one, and maps the range again. The first lookup is a
//! hint; only the second one decides.
//!
//! **Touches:** `image`, `chain`, `range_lock`. **Never:** FUSE, JSON, jobs. Coordinate types end
//! here: ranges are guest bytes.
//! **Locks:** ranks `RANGE` and `BACKING` of [`host::sync::rank`], and the locks that `image` takes
//! below them.
//! **Invariants:** I1: the mapping of a guest cluster changes only while its range is held
//! exclusively. Reads and in-place writes hold it shared, so a host cluster is never freed under a
//! reader (H5, H6). I4: a guest write wins over any copy from below, because populate maps the
//! clusters again under the exclusive guard before it publishes (H1 to H4). While there is a
//! backing file, no cluster becomes `Unallocated` (H17).

use std::ops::Range;
use std::path::PathBuf;
use std::sync::{Arc, OnceLock};

use crossbeam_channel::Receiver;

use crate::chain::{Chain, Gate};
use host::error::Context;
use host::storage::Sidecar;
use host::sync::{Mutex, RwLock, rank};
use host::{Error, ErrorKind, Result};
use qcow2::format::{Geometry, GuestSubcluster};
use qcow2::image::{Image, ImageReader, SearchStep};
use qcow2::range_lock::{Exclusive, RangeLock, Shared};

mod ahead;
mod allocation_statistics;
mod base;
mod base_note;
mod block_set;
mod bounce;
mod commit;
mod detach;
mod facts;
mod failure;
mod leak_finder;
mod locate;
mod note;
mod open;
mod overlay;
mod populate;
mod read;
mod reserve;
mod resize;
mod runs;
mod seek;
mod stats;
mod to_do;
mod touches;
mod walk;
mod write;
mod write_out;

#[cfg(test)]
mod tests;

pub(crate) use ahead::{Ahead, ToRead};
pub use allocation_statistics::{AllocationStatistics, MOST_CELLS, Totals};
pub use base::Base;
pub use commit::{COMMIT_INTERVAL, CommitAge, CommitTimer};
pub use facts::DiskInfo;
pub use failure::{CopyPause, GuestFailure};
pub use leak_finder::LeakFinder;
pub use locate::Locator;
pub use note::{FileId, LONGEST_STREAM_NOTE};
pub use open::Inheritance;
pub use populate::Populated;
pub use seek::Seek;
pub(crate) use stats::Activity;
pub use stats::{
    CopyCount, Cost, DiskStats, LATENCY_BOUNDS, LATENCY_BUCKETS, Latency, RequestCount,
};
pub(crate) use to_do::ToDo;
pub(crate) use touches::GuestRead;
pub use touches::{Brought, FirstTouch, MOST_TOUCHES, TouchRecord};
pub use walk::WalkReport;

use allocation_statistics::StatisticsCache;
use base::BeforeDetach;
use bounce::Bounces;
use overlay::Overlay;
use populate::FillHealth;
use stats::Stats;
use touches::Touches;
use walk::Walk;

/// Options of [`Disk::open`].
#[derive(Clone, Debug)]
pub struct DiskOptions {
    /// Open read-only: all writes fail, and reads do not copy up.
    pub read_only: bool,
    /// Copy-on-read: reads copy up the clusters that the overlay does not hold.
    pub copy_on_read: bool,
    /// Decides which files may be opened as backing files.
    pub gate: Gate,
    /// Count all references before the first write, and refuse an image whose refcounts do not
    /// match them (V28). Without this option, only an image that was not closed is checked, so that
    /// its leaked clusters are reclaimed.
    pub full_check: bool,
    /// Reads stop copying up while the file system of the overlay has fewer free bytes than this.
    /// `None` means the smaller of 1 GiB and 5 % of the file system.
    pub reserve: Option<u64>,
}

/// Whether an operation was answered from the overlay without waiting for a backing file.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Local {
    /// The operation is complete.
    Done,
    /// Nothing was done: the operation needs an allocation, or a range that another request holds
    /// for a short time. The caller should use the sibling that may wait, but not for a backing
    /// file (`…_without_base`).
    Miss,
    /// The operation needs a backing file, or a range whose holder may wait for one. Nothing was
    /// done, or part of a write, which the caller must repeat as a whole. The caller should use the
    /// sibling that waits without limit.
    Below,
}

/// What a request may wait for.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Patience {
    /// The overlay, and ranges held by requests that wait for nothing but the overlay.
    Brief,
    /// A backing file as well, and ranges held by requests that wait for one.
    Long,
}

/// A disk: an overlay above a chain, with one method per guest request.
///
/// All offsets and lengths are bytes. Ranges must lie inside [`Disk::size`], otherwise methods
/// return [`ErrorKind::InvalidArgument`]; `export` clamps requests first. Every method may be
/// called from any thread.
#[derive(Debug)]
pub struct Disk {
    path: PathBuf,
    /// Identity of the overlay's file; `None` in tests.
    file_id: Option<FileId>,
    overlay: Overlay,
    /// The extended attributes of the overlay's file.
    sidecar: Arc<dyn Sidecar>,
    /// End of the image when it was opened, in bytes. Determined only where the host reports no
    /// allocated blocks, as it does for block devices; 0 otherwise.
    end_at_open: u64,
    /// The backing chain; `None` after it was detached. The `Arc` is cloned under this lock, which
    /// is never held across I/O.
    backing: RwLock<{ rank::BACKING }, Option<Arc<Chain>>>,
    in_flight: RangeLock,
    copy_on_read: bool,
    fills: FillHealth,
    bounces: Bounces,
    stats: Stats,
    touches: Touches,
    walk: Walk,
    before_detach: OnceLock<BeforeDetach>,
    /// The last failed guest request. Locked only by failing requests and by status queries.
    failure: Mutex<{ rank::LEAF }, Option<GuestFailure>>,
    statistics_cache: StatisticsCache,
}

impl Disk {
    fn assemble(
        path: PathBuf,
        overlay: Overlay,
        sidecar: Arc<dyn Sidecar>,
        chain: Option<Chain>,
        copy_on_read: bool,
        reserve: Option<u64>,
    ) -> Disk {
        let cluster_size = overlay.reader().geometry().cluster_size();
        Disk {
            path,
            file_id: None,
            overlay,
            sidecar,
            end_at_open: 0,
            backing: RwLock::new(chain.map(Arc::new)),
            in_flight: RangeLock::new(cluster_size),
            copy_on_read,
            fills: FillHealth::new(reserve),
            bounces: Bounces::new(),
            stats: Stats::new(),
            touches: Touches::new(),
            walk: Walk::new(),
            before_detach: OnceLock::new(),
            failure: Mutex::default(),
            statistics_cache: StatisticsCache::default(),
        }
    }

    /// Creates a writable disk above storages that were not opened by name. Reads do not copy up.
    #[cfg(any(test, feature = "testing"))]
    pub fn for_tests(image: Image, chain: Option<Chain>) -> Disk {
        let sidecar = Arc::clone(image.sidecar());
        Disk::assemble(
            "/overlay.qcow2".into(),
            Overlay::Writable(Box::new(image)),
            sidecar,
            chain,
            false,
            None,
        )
    }

    /// As [`Disk::for_tests`], read-only.
    #[cfg(any(test, feature = "testing"))]
    pub fn read_only_for_tests(image: ImageReader, chain: Option<Chain>) -> Disk {
        Disk::assemble(
            "/overlay.qcow2".into(),
            Overlay::ReadOnly(Box::new(image)),
            Arc::new(host::storage::NoSidecar),
            chain,
            false,
            None,
        )
    }

    /// The same disk with copy-on-read switched on or off.
    #[cfg(any(test, feature = "testing"))]
    pub fn copying_up(self, copy_on_read: bool) -> Disk {
        Disk { copy_on_read, ..self }
    }

    /// Number of requests that wait for a range.
    #[cfg(any(test, feature = "testing"))]
    pub fn waiting(&self) -> usize {
        self.in_flight.waiting()
    }

    /// Holds a range exclusively, as a request that changes mappings does. Returns the range with
    /// its guard.
    #[cfg(any(test, feature = "testing"))]
    pub fn hold_for_tests(&self, range: Range<u64>) -> (Range<u64>, Exclusive<'_>) {
        (range.clone(), self.in_flight.exclusive(range))
    }

    /// Makes whole clusters of a disk with a backing file unallocated. No other code does this
    /// (H17).
    #[cfg(any(test, feature = "testing"))]
    #[expect(clippy::unwrap_used, reason = "for tests")]
    pub fn uncover_for_tests(&self, held: &Exclusive<'_>, range: Range<u64>) {
        self.image().unwrap().uncover(held, self.subclusters(&range)).unwrap();
    }

    fn reader(&self) -> &ImageReader {
        self.overlay.reader()
    }

    /// The overlay, opened for writing.
    ///
    /// # Errors
    /// [`ErrorKind::ReadOnly`].
    fn image(&self) -> Result<&Image> {
        self.overlay.image()
    }

    /// Holds a range exclusively; `None` where `patience` does not allow the wait.
    fn hold(&self, range: Range<u64>, patience: Patience) -> Option<Exclusive<'_>> {
        match patience {
            Patience::Brief => self.in_flight.exclusive_briefly(range),
            Patience::Long => Some(self.in_flight.exclusive(range)),
        }
    }

    /// Holds a range shared; `None` where `patience` does not allow the wait.
    fn hold_shared(&self, range: Range<u64>, patience: Patience) -> Option<Shared<'_>> {
        match patience {
            Patience::Brief => self.in_flight.shared_briefly(range),
            Patience::Long => Some(self.in_flight.shared(range)),
        }
    }

    /// The order in which the guest has first read what was below the overlay, or what a stream has
    /// brought: without the first `skip` runs, and at most `most`.
    pub fn first_touches(&self, skip: usize, most: usize) -> TouchRecord {
        self.touches.record(skip, most)
    }

    /// For a stream that is about to walk over the disk: through the value that is returned, it
    /// tells reads where it is, so that they need not copy up what it is about to copy.
    pub fn walk_report(&self) -> WalkReport<'_> {
        WalkReport(&self.walk)
    }

    /// The position that a stream told last.
    #[cfg(test)]
    pub(crate) fn walk_position(&self) -> Option<u64> {
        self.walk.position()
    }

    /// Begins to collect what the guest reads below, for [`Disk::news_of_reads`]. The channel is
    /// readable when there is something new. There is one listener: the last one.
    pub(crate) fn listen_to_reads(&self) -> Receiver<()> {
        self.touches.listen()
    }

    /// Ends [`Disk::listen_to_reads`].
    pub(crate) fn listen_no_more(&self) {
        self.touches.listen_no_more();
    }

    /// What the guest has read below, or of what a stream has brought, since the last call.
    pub(crate) fn news_of_reads(&self) -> Vec<GuestRead> {
        self.touches.news()
    }

    fn chain(&self) -> Option<Arc<Chain>> {
        self.backing.read().clone()
    }

    /// The chain, if an unallocated byte at `offset` is read from it. `None` where that byte reads
    /// as zero.
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

    /// Whether the disk was opened read-only.
    pub fn is_read_only(&self) -> bool {
        matches!(self.overlay, Overlay::ReadOnly(_))
    }

    /// Counters of the requests since the disk was opened.
    pub fn stats(&self) -> DiskStats {
        let (commits, brought) = (self.overlay.commits(), self.touches.outcome());
        DiskStats { commits, brought, ..self.stats.snapshot() }
    }

    /// Current load of the guest. The stream's pacing uses it to give way to guest requests.
    pub(crate) fn activity(&self) -> Activity {
        self.stats.activity()
    }

    /// Bytes that the overlay occupies on the host.
    ///
    /// For a file this is `st_blocks` × 512. A block device reports no blocks of its own, so for
    /// one it is the end of the image on the device.
    ///
    /// # Errors
    /// fstat(2) failed.
    pub fn allocated_size(&self) -> Result<u64> {
        let allocated =
            self.reader().storage().allocated_size().context(|| self.path.display().to_string())?;
        Ok(if allocated == 0 {
            self.end_at_open.max(self.overlay.highest_allocated())
        } else {
            allocated
        })
    }

    /// Makes every operation that returned before this call durable (P1).
    ///
    /// # Errors
    /// I/O errors. After a failed fdatasync every further call fails as well (P7).
    pub fn flush(&self) -> Result<()> {
        self.stats.flush(|| self.overlay.flush())
    }

    /// Counts a flush of the guest that was answered without [`Disk::flush`], because an earlier
    /// one has covered all changes.
    pub fn count_flush_of_nothing(&self) {
        self.stats.flush_of_nothing();
    }

    /// Writes back metadata if any is dirty. Called by the commit timer (P2).
    ///
    /// # Errors
    /// As [`Disk::flush`].
    pub fn flush_if_dirty(&self) -> Result<()> {
        self.overlay.flush_if_dirty()
    }

    /// Whether metadata is dirty that no running pass has taken.
    fn is_dirty(&self) -> bool {
        self.overlay.is_dirty()
    }

    /// As [`qcow2::image::Image::became_dirty`]; yields nothing for a read-only disk.
    fn became_dirty(&self) -> Receiver<()> {
        self.overlay.became_dirty()
    }

    /// Channel that yields when so much metadata waits for write-back that [`Disk::flush_if_dirty`]
    /// should be called at once, and not after the interval of the commit timer.
    pub fn commit_wanted(&self) -> Receiver<()> {
        self.overlay.commit_wanted()
    }

    /// Makes everything durable and reclaims unused clusters. Call it once, after the last request.
    ///
    /// # Errors
    /// As [`Disk::flush`].
    pub fn close(&self) -> Result<()> {
        self.overlay.close()
    }

    /// Makes one step of the search for what a process that has died has leaked
    /// ([`Image::search_step`]). [`LeakFinder`] makes all of them.
    ///
    /// # Errors
    /// As [`Image::search_step`].
    pub fn search_step(&self) -> Result<SearchStep> {
        self.overlay.search_step()
    }

    /// Whether the mark of an open image may be removed after [`Disk::close`]: no failure has
    /// latched, and what a process that has died has leaked was searched for.
    pub fn may_lose_mark(&self) -> bool {
        self.overlay.may_lose_mark()
    }

    /// Whether the image can still be written: no failure has latched.
    pub fn is_usable(&self) -> bool {
        self.overlay.is_usable()
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

    /// `range` rounded outward to whole clusters, as it is held when the mapping of a part changes.
    /// The end may lie beyond the end of the disk.
    fn aligned(&self, range: &Range<u64>) -> Range<u64> {
        self.geometry().aligned(range)
    }

    /// `range` rounded outward to whole subclusters: what is copied or made zero for it. The end
    /// may lie beyond the end of the disk. Without extended L2 entries, a subcluster is a cluster.
    fn aligned_to_subclusters(&self, range: &Range<u64>) -> Range<u64> {
        self.geometry().aligned_to_subclusters(range)
    }

    /// The subclusters of a range that starts and ends at subclusters.
    fn subclusters(&self, aligned: &Range<u64>) -> Range<GuestSubcluster> {
        self.geometry().subclusters_of(aligned)
    }
}
