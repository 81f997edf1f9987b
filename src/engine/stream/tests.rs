//! The reaction of a stream to errors, for every policy, on a host that fails at the range and for
//! the time that the test sets.
//!
//! The expectations are QEMU's, observed (`BlockdevOnError` and `block_job_error_action`). A client
//! that drives both programs relies on three facts: the status and offset of a job after an error,
//! the command that lets it go on, and that the backing file stays unless every byte was copied up.

use std::io;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::{Duration, Instant};

use crossbeam_channel::Receiver;
use parking_lot::Mutex;
use rustix::io::Errno;

use super::*;
use crate::chain::Chain;
use crate::job::{Batch, IoStatus, JobEvent, JobInfo, Jobs, Progress, Status};
use host::storage::{BlockStatus, ReadAt, Sidecar, Storage, WriteKind};
use qcow2::format::{BackingFormat, Header, NewImage};
use qcow2::image::Image;
use sim::{Action, Fault, HostFailure, Repeat, SimStorage};

/// Longer than any step of these tests takes.
const PATIENCE: Duration = Duration::from_secs(30);

/// Not a multiple of the chunk or of the cluster.
const SIZE: u64 = (4 << 20) + (200 << 10);

/// The bad range of the backing file: in the middle of the third chunk.
const BAD_READS: Range<u64> = 0x13_0000..0x13_0200;

/// Start of the third chunk, which is also the offset of a job that could not read [`BAD_READS`].
const BAD_CHUNK: u64 = 2 * STREAM_CHUNK;

/// The range of the overlay in which the host has no space: in its data, behind the metadata of a
/// new image.
const NO_ROOM: Range<u64> = (2 << 20)..u64::MAX;

/// Kind of calls that fail.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Side {
    Reads,
    Writes,
}

/// A file in memory whose calls of one kind fail with an errno in one range, while a flag is set.
#[derive(Debug)]
struct Faulty {
    bytes: Mutex<Vec<u8>>,
    side: Side,
    range: Range<u64>,
    errno: Errno,
    failing: AtomicBool,
    /// Number of calls that failed.
    failures: AtomicU32,
    /// The ranges that were read, in order.
    reads: Mutex<Vec<Range<u64>>>,
}

impl Faulty {
    fn new(bytes: Vec<u8>, side: Side, range: Range<u64>, errno: Errno) -> Arc<Faulty> {
        let (failing, failures) = (AtomicBool::new(false), AtomicU32::new(0));
        let (bytes, reads) = (Mutex::new(bytes), Mutex::default());
        Arc::new(Faulty { bytes, side, range, errno, failing, failures, reads })
    }

    fn fail(&self, failing: bool) {
        self.failing.store(failing, Ordering::SeqCst);
    }

    fn failures(&self) -> u32 {
        self.failures.load(Ordering::SeqCst)
    }

    fn pass(&self, side: Side, offset: u64, len: usize) -> io::Result<()> {
        let touched = offset < self.range.end && self.range.start < offset + len as u64;
        if side == self.side && touched && self.failing.load(Ordering::SeqCst) {
            self.failures.fetch_add(1, Ordering::SeqCst);
            return Err(self.errno.into());
        }
        Ok(())
    }
}

impl ReadAt for Faulty {
    fn size(&self) -> u64 {
        self.bytes.lock().len() as u64
    }

    fn allocated_size(&self) -> io::Result<u64> {
        Ok(self.size())
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        self.reads.lock().push(offset..offset + buf.len() as u64);
        self.pass(Side::Reads, offset, buf.len())?;
        let bytes = self.bytes.lock();
        let start = bytes.len().min(offset as usize);
        let here = buf.len().min(bytes.len() - start);
        buf[..here].copy_from_slice(&bytes[start..start + here]);
        buf[here..].fill(0);
        Ok(())
    }

    fn status(&self, offset: u64, max: u64) -> io::Result<(BlockStatus, u64)> {
        match self.size().checked_sub(offset) {
            None | Some(0) => Ok((BlockStatus::Hole, max)),
            Some(here) => Ok((BlockStatus::Data, here.min(max))),
        }
    }
}

impl Storage for Faulty {
    fn write_at(&self, _kind: WriteKind, offset: u64, data: &[u8]) -> io::Result<()> {
        self.pass(Side::Writes, offset, data.len())?;
        let mut bytes = self.bytes.lock();
        let end = offset as usize + data.len();
        let len = bytes.len().max(end);
        bytes.resize(len, 0);
        bytes[offset as usize..end].copy_from_slice(data);
        Ok(())
    }

    fn punch_hole(&self, offset: u64, len: u64) -> io::Result<()> {
        let mut bytes = self.bytes.lock();
        let end = bytes.len().min((offset + len) as usize);
        bytes[offset as usize..end].fill(0);
        Ok(())
    }

    fn sync(&self) -> io::Result<()> {
        Ok(())
    }
}

impl Sidecar for Faulty {}

/// The end of a job as a test sees it.
#[derive(Debug)]
struct Ending {
    /// Actions taken for the errors, in order.
    actions: Vec<ErrorAction>,
    progress: Progress,
    error: Option<String>,
}

/// A disk above two faulty storages, with a registry of jobs and its events.
struct Bench {
    base: Arc<Faulty>,
    overlay: Arc<Faulty>,
    disk: Arc<Disk>,
    jobs: Jobs,
    events: Receiver<Arc<Batch>>,
    seen: Vec<JobEvent>,
    /// Bytes that the guest must read, whatever happens to the stream.
    content: Vec<u8>,
    /// The first 512 bytes of the overlay before any stream.
    header: Vec<u8>,
}

impl Bench {
    fn new() -> Bench {
        let mut content: Vec<u8> =
            (0..SIZE as usize).map(|at| (at / 512 * 7 + at * 13 + 1) as u8).collect();
        content[0x1c_0000..0x24_8000].fill(0); // zero clusters, and one that is zero in part
        content[SIZE as usize - 1000..].fill(0); // zero beyond the end of the backing file
        let base = Faulty::new(
            content[..SIZE as usize - 1000].to_vec(),
            Side::Reads,
            BAD_READS,
            Errno::IO,
        );

        let overlay = NewImage::file_for_tests(16, SIZE, Some(("base.raw", BackingFormat::Raw)));
        let overlay = Faulty::new(overlay, Side::Writes, NO_ROOM, Errno::NOSPC);
        let disk = Disk::for_tests(
            Image::open(overlay.clone()).unwrap(),
            Some(Chain::of_raw(base.clone())),
        );

        // In the bad chunk, outside of its bad range: the guest's bytes must survive all attempts.
        disk.write(BAD_CHUNK + 100, &[0xc5; 1000]).unwrap();
        content[BAD_CHUNK as usize + 100..][..1000].fill(0xc5);
        disk.flush().unwrap();

        let jobs = Jobs::new();
        let events = jobs.subscribe();
        let header = overlay.bytes.lock()[..512].to_vec();
        Bench {
            base,
            overlay,
            disk: Arc::new(disk),
            jobs,
            events,
            seen: Vec::new(),
            content,
            header,
        }
    }

    fn start(&mut self, on_error: OnError) {
        self.seen.clear();
        start(&self.disk, &self.jobs, StreamOptions { on_error, ..StreamOptions::new("job0") })
            .unwrap();
    }

    /// Reads events up to the next one in which the job changes to `status`.
    fn wait_for(&mut self, status: Status) {
        let wanted = JobEvent::StatusChange { id: "job0".into(), status };
        let give_up = Instant::now() + PATIENCE;
        loop {
            let batch = match self.events.recv_deadline(give_up) {
                Ok(batch) => batch,
                Err(error) => panic!("{error} while waiting for {wanted:?} after {:?}", self.seen),
            };
            self.seen.extend(batch.events.iter().cloned());
            if batch.events.contains(&wanted) {
                return;
            }
        }
    }

    fn actions(&self) -> Vec<ErrorAction> {
        self.seen
            .iter()
            .filter_map(|event| {
                if let JobEvent::Error { action, .. } = event { Some(*action) } else { None }
            })
            .collect()
    }

    /// Returns the job after an error has paused it.
    fn paused(&mut self) -> JobInfo {
        self.wait_for(Status::Paused);
        let job = self.jobs.query().pop().unwrap();
        assert_eq!((job.status, job.paused), (Status::Paused, true));
        assert_eq!(job.error, None, "a pause is no failure");
        job
    }

    /// Waits until the job has left the registry.
    fn end(&mut self) -> Ending {
        self.wait_for(Status::Null);
        let mut completed = self.seen.iter().filter_map(|event| match event {
            JobEvent::Completed { progress, error } => Some((progress.clone(), error.clone())),
            _ => None,
        });
        let (progress, error) = completed.next().unwrap();
        assert_eq!(completed.next(), None, "a job completes once: {:?}", self.seen);
        assert!(!self.jobs.is_busy());
        assert_eq!(progress.len, SIZE);
        Ending { actions: self.actions(), progress, error }
    }

    /// Asserts that the guest reads the expected content, byte for byte.
    fn assert_content(&self) {
        let mut read = vec![0xa5; SIZE as usize];
        self.disk.read(0, &mut read).unwrap();
        assert!(
            read == self.content,
            "first wrong byte at {:?}",
            read.iter().zip(&self.content).position(|(a, b)| a != b)
        );
    }

    /// Asserts that the backing file is still there, in memory and in the header, and that no byte
    /// is lost.
    fn assert_backing_kept(&self) {
        assert_eq!(self.disk.info().unwrap().backing.len(), 1);
        assert_eq!(self.overlay.bytes.lock()[..512], self.header, "bytes of the header");
        self.base.fail(false);
        self.overlay.fail(false);
        self.assert_content();
    }

    /// Asserts that the backing file is gone, in memory and in the header, and that the image alone
    /// holds every byte.
    fn assert_backing_gone(&self) {
        assert!(self.disk.info().unwrap().backing.is_empty());
        self.assert_content();
        self.disk.close().unwrap();
        let bytes = self.overlay.bytes.lock().clone();
        assert_eq!(Header::parse(&bytes, bytes.len() as u64).unwrap().backing, None);
        let alone = Disk::for_tests(Image::open(self.overlay.clone()).unwrap(), None);
        let mut read = vec![0xa5; SIZE as usize];
        alone.read(0, &mut read).unwrap();
        assert!(read == self.content, "the image alone");
    }

    /// Asserts that a second stream, after the faults have ended, completes the work of the first.
    fn assert_next_stream_completes(&mut self) {
        self.base.fail(false);
        self.overlay.fail(false);
        self.start(OnError::Report);
        let end = self.end();
        assert_eq!((end.actions, end.progress.offset, end.error), (vec![], SIZE, None));
        self.assert_backing_gone();
    }
}

/// Protects: `report` (the default), `enospc` and `auto` fail the job at the first EIO. Its offset
/// is the start of the chunk that failed. Image and backing file stay usable, so that a later
/// stream finishes the work.
#[test]
fn unreadable_backing_fails_the_job() {
    for on_error in [OnError::Report, OnError::Enospc, OnError::Auto] {
        let mut bench = Bench::new();
        bench.base.fail(true);
        bench.start(on_error);
        let end = bench.end();
        assert_eq!(end.actions, [ErrorAction::Report], "{on_error:?}");
        assert_eq!(end.error.as_deref(), Some("Input/output error"), "{on_error:?}");
        assert_eq!(end.progress.offset, BAD_CHUNK, "{on_error:?}");
        assert_eq!(bench.base.failures(), 1, "{on_error:?}: nothing is tried again");
        bench.assert_backing_kept();
        bench.assert_next_stream_completes();
    }
}

/// Starts a stream that follows an order.
fn start_ordered(bench: &mut Bench, order: &[Range<u64>]) {
    let streams = Streams::new(&bench.disk, &bench.jobs, "", jiff::tz::TimeZone::UTC);
    streams.set_order(StreamOrder::Guest(order.into()));
    streams.start(&bench.disk, StreamOptions::new("job0")).unwrap();
}

/// Protects: a stream brings what its order names before it walks. What the job reports, and what
/// the guest reads, is that of a walk alone.
#[test]
fn an_order_changes_the_sequence_of_reads_and_nothing_else() {
    const CLUSTER: u64 = 1 << 16;
    let order = [50 * CLUSTER..52 * CLUSTER, 7 * CLUSTER..8 * CLUSTER, 60 * CLUSTER..u64::MAX];
    let mut bench = Bench::new();
    bench.base.reads.lock().clear();
    start_ordered(&mut bench, &order);
    let end = bench.end();
    assert_eq!((end.actions, end.progress.offset, end.error), (vec![], SIZE, None));
    let reads = bench.base.reads.lock().clone();
    let is_ordered = |read: &Range<u64>| {
        order.iter().any(|range| range.start <= read.start && read.end <= range.end)
    };
    let walk = reads.iter().position(|read| !is_ordered(read)).unwrap();
    for range in &order {
        let at = reads.iter().position(|read| read.start == range.start);
        assert!(at.is_some_and(|at| at < walk), "{range:?}: {reads:?}");
    }
    let last = bench.jobs.last().unwrap();
    assert_eq!(last.work.copied + last.work.zeroed + last.skipped(), SIZE);
    assert_eq!(bench.disk.stats().brought.used, 0);
    bench.assert_backing_gone();
}

/// Protects: an error at a piece of an order is no error of the job. The walk meets it, and the job
/// fails there as without an order.
#[test]
fn an_order_that_names_what_cannot_be_read_fails_nothing_by_itself() {
    let mut bench = Bench::new();
    bench.base.fail(true);
    start_ordered(&mut bench, &[BAD_READS, 0..SIZE]);
    let end = bench.end();
    assert_eq!(end.actions, [ErrorAction::Report]);
    assert_eq!(end.progress.offset, BAD_CHUNK);
    assert!(bench.base.failures() >= 2, "the piece, and the walk");
    bench.assert_backing_kept();
    bench.assert_next_stream_completes();
}

/// Protects: `ignore` walks the whole disk, but the chain is not cut when a chunk was skipped: the
/// job fails, and the header keeps every byte.
#[test]
fn ignored_errors_keep_the_backing_file() {
    let mut bench = Bench::new();
    bench.base.fail(true);
    bench.start(OnError::Ignore);
    let end = bench.end();
    assert_eq!(end.actions, [ErrorAction::Ignore]);
    assert_eq!(end.error.as_deref(), Some("Input/output error"));
    assert_eq!(end.progress.offset, SIZE);
    assert_eq!(bench.jobs.last().unwrap().work.failed, STREAM_CHUNK);
    bench.assert_backing_kept();
    bench.assert_next_stream_completes();
}

/// Protects: `stop` loses no data. The job pauses, reports why, tries the same chunk each time it
/// is resumed, and completes once the chunk can be read.
#[test]
fn stopped_job_tries_the_same_chunk_again() {
    let mut bench = Bench::new();
    bench.base.fail(true);
    bench.start(OnError::Stop);
    for attempt in 1..=3 {
        let job = bench.paused();
        assert_eq!(
            (job.io_status, job.progress.offset),
            (IoStatus::Failed, BAD_CHUNK),
            "attempt {attempt}"
        );
        assert_eq!(bench.base.failures(), attempt);
        assert_eq!(bench.actions(), vec![ErrorAction::Stop; attempt as usize]);
        assert_eq!(bench.disk.info().unwrap().backing.len(), 1);
        if attempt == 3 {
            bench.base.fail(false);
        }
        bench.jobs.resume("job0").unwrap();
    }
    let end = bench.end();
    assert_eq!((end.actions.len(), end.progress.offset, end.error), (3, SIZE, None));
    assert_eq!(bench.jobs.last().unwrap().io_status, IoStatus::Ok, "a resume clears it");
    bench.assert_backing_gone();
}

/// Protects: a full host pauses the job under `enospc`, `auto` and `stop`. When there is space
/// again, a resume continues at the same chunk, and no cluster of the failed attempts is taken for
/// data.
#[test]
fn full_host_pauses_the_job() {
    for on_error in [OnError::Enospc, OnError::Auto, OnError::Stop] {
        let mut bench = Bench::new();
        bench.overlay.fail(true);
        bench.start(on_error);
        let first = bench.paused();
        let offset = first.progress.offset;
        assert_eq!(first.io_status, IoStatus::NoSpace, "{on_error:?}");
        assert!(
            offset > 0 && offset < SIZE && offset.is_multiple_of(STREAM_CHUNK),
            "{on_error:?}: {offset}"
        );
        // The host is still full, so the same chunk fails again.
        bench.jobs.resume("job0").unwrap();
        let second = bench.paused();
        assert_eq!(
            (second.io_status, second.progress.offset),
            (IoStatus::NoSpace, offset),
            "{on_error:?}"
        );
        assert_eq!(bench.overlay.failures(), 2, "{on_error:?}");
        bench.overlay.fail(false);
        bench.jobs.resume("job0").unwrap();
        let end = bench.end();
        assert_eq!(end.actions, [ErrorAction::Stop; 2], "{on_error:?}");
        assert_eq!((end.progress.offset, end.error), (SIZE, None), "{on_error:?}");
        bench.assert_backing_gone();
    }
}

/// Protects: under `report` and `ignore`, a full host fails the job with the text of strerror(3),
/// and the guest's data is complete above the backing file.
#[test]
fn full_host_fails_the_job() {
    for (on_error, action) in
        [(OnError::Report, ErrorAction::Report), (OnError::Ignore, ErrorAction::Ignore)]
    {
        let mut bench = Bench::new();
        bench.overlay.fail(true);
        bench.start(on_error);
        let end = bench.end();
        assert!(
            !end.actions.is_empty() && end.actions.iter().all(|done| *done == action),
            "{on_error:?}: {:?}",
            end.actions
        );
        assert_eq!(end.error.as_deref(), Some("No space left on device"), "{on_error:?}");
        let offset = end.progress.offset;
        match on_error {
            OnError::Ignore => assert_eq!(offset, SIZE),
            _ => assert!(
                offset > 0 && offset < SIZE && offset.is_multiple_of(STREAM_CHUNK),
                "{offset}"
            ),
        }
        bench.assert_backing_kept();
        bench.assert_next_stream_completes();
    }
}

/// Waits until another thread has made `done` true.
pub(super) fn wait_until(what: &str, mut done: impl FnMut() -> bool) {
    let give_up = Instant::now() + PATIENCE;
    while !done() {
        assert!(Instant::now() < give_up, "{what}");
        std::thread::yield_now();
    }
}

/// Returns a disk above a base in memory, the base, and the content that the guest reads.
pub(super) fn simulated(bits: u32, chunks: u64) -> (Arc<Disk>, Arc<SimStorage>, Vec<u8>) {
    on_host(bits, chunks, 0)
}

/// Does the same as [`simulated`], on a host that clones blocks of `clones` bytes; 0 for a host
/// that cannot clone.
fn on_host(bits: u32, chunks: u64, clones: u64) -> (Arc<Disk>, Arc<SimStorage>, Vec<u8>) {
    let size = chunks * STREAM_CHUNK;
    let content: Vec<u8> = (0..size).map(|at| (at / 4096 % 251 + 1) as u8).collect();
    let base = SimStorage::new(content.clone());
    let overlay = SimStorage::checked(NewImage::file_for_tests(
        bits,
        size,
        Some(("base.raw", BackingFormat::Raw)),
    ));
    overlay.allow_clones(clones);
    (
        Arc::new(Disk::for_tests(Image::open(overlay).unwrap(), Some(Chain::of_raw(base.clone())))),
        base,
        content,
    )
}

/// Protects: several chunks are read at the same time. While the base does not answer, a guest
/// writes into these chunks without waiting, and its writes stay. Host clusters are allocated in
/// guest order all the same.
#[test]
fn chunks_are_read_together_and_nobody_waits_for_them() {
    let (disk, base, mut content) = simulated(16, 8);
    let held = base.hold(|operation| operation.action == Action::Read);
    let jobs = Jobs::new();
    start(&disk, &jobs, StreamOptions::new("job0")).unwrap();
    wait_until("three chunks are read at the same time", || held.stopped() == 3);
    for chunk in 0..3 {
        let at = chunk * STREAM_CHUNK + (128 << 10);
        disk.write(at, &[0xee; 64 << 10]).unwrap();
        content[at as usize..][..64 << 10].fill(0xee);
    }
    assert_eq!((held.stopped(), jobs.query()[0].progress.offset), (3, 0));
    drop(held);
    jobs.settle("job0", PATIENCE);
    let job = jobs.last().unwrap();
    assert_eq!((job.error, job.work.copied), (None, 8 * STREAM_CHUNK - 3 * (64 << 10)));
    assert!(disk.info().unwrap().backing.is_empty());
    let mut read = vec![0; content.len()];
    disk.read(0, &mut read).unwrap();
    assert!(read == content);
    disk.close().unwrap();
}

/// Protects: reads leave their copies to a stream only while one runs that copies everything up, as
/// fast as it can, and shares no blocks.
#[test]
fn reads_hear_where_a_fast_stream_is() {
    let beyond = 6 * STREAM_CHUNK;
    let whole = StreamOptions::new("job0");
    for (options, told) in [
        (whole.clone(), Some(beyond)),
        (StreamOptions { speed: 1 << 40, ..whole.clone() }, None),
        (StreamOptions { depth: Some(1), ..whole }, None),
    ] {
        let (disk, base, _) = simulated(16, 8);
        let held =
            base.hold(move |operation| operation.action == Action::Read && operation.at >= beyond);
        let jobs = Jobs::new();
        start(&disk, &jobs, options.clone()).unwrap();
        held.wait_for(1);
        wait_until("it waits for its base", || jobs.query()[0].progress.offset == beyond);
        let hear = |what, told| wait_until(what, || disk.walk_position() == told);
        // The position is told before the checkpoint that follows the last chunk.
        hear("it says where it is", told);
        jobs.pause("job0").unwrap();
        hear("it is paused", None);
        jobs.resume("job0").unwrap();
        drop(held);
        jobs.settle("job0", PATIENCE);
        assert_eq!(jobs.last().unwrap().error, None);
        assert_eq!(disk.walk_position(), None, "{options:?}");
    }
}

/// Protects: a job that is slow or paused reads little beyond its offset, and reading ahead does
/// not change the offset.
#[test]
fn a_slow_job_reads_only_a_little_ahead() {
    let (disk, base, _) = simulated(16, 64);
    let jobs = Jobs::new();
    start(&disk, &jobs, StreamOptions { speed: 1, ..StreamOptions::new("job0") }).unwrap();
    wait_until("the first chunk is free", || jobs.query()[0].progress.offset == STREAM_CHUNK);
    wait_until("the next four are read", || base.operations() == 5);
    jobs.pause("job0").unwrap();
    // An operation is counted when it begins, its bytes when it ends.
    wait_until("their bytes are counted", || disk.stats().backing_reads.bytes == 5 * STREAM_CHUNK);
    assert_eq!((base.operations(), jobs.query()[0].progress.offset), (5, STREAM_CHUNK));
    jobs.cancel("job0", crate::job::Force::Yes).unwrap();
    jobs.settle("job0", PATIENCE);
    assert_eq!((jobs.last().unwrap().cancelled, base.operations()), (true, 5));
}

/// Protects: a cancelled job ends although its reader threads hang, and a job whose clusters are
/// larger than its chunks reads each cluster once.
#[test]
fn hung_readers_do_not_keep_a_job_and_large_clusters_are_read_once() {
    let (disk, base, content) = simulated(21, 16);
    let jobs = Jobs::new();
    let beyond = 4 * STREAM_CHUNK;
    let held =
        base.hold(move |operation| operation.action == Action::Read && operation.at >= beyond);
    start(&disk, &jobs, StreamOptions { speed: 1, ..StreamOptions::new("job0") }).unwrap();
    wait_until("the second cluster is being read", || held.stopped() == 1);
    wait_until("the first is copied", || jobs.query()[0].progress.offset == STREAM_CHUNK);
    jobs.cancel("job0", crate::job::Force::Yes).unwrap();
    jobs.settle("job0", PATIENCE);
    assert!(jobs.last().is_some_and(|job| job.cancelled), "it waits for no reader");
    assert_eq!(held.stopped(), 1, "which hangs still");
    drop(held);
    wait_until("the reader has gone", || Arc::strong_count(&disk) == 1);
    let before = base.operations();
    start(&disk, &jobs, StreamOptions::new("job1")).unwrap();
    jobs.settle("job1", PATIENCE);
    assert_eq!(
        (jobs.last().unwrap().error, base.operations() - before),
        (None, 3),
        "three clusters were missing"
    );
    let mut read = vec![0; content.len()];
    disk.read(0, &mut read).unwrap();
    assert!(read == content);
}

/// Protects: a job that waits for a chunk obeys a pause and a cancel, also when it tries a chunk
/// again that could not be read.
#[test]
fn a_job_that_waits_for_its_base_is_paused_and_cancelled() {
    let (disk, base, _) = simulated(16, 16);
    let jobs = Jobs::new();
    let is_read = |operation: &sim::Operation| operation.action == Action::Read;
    base.inject(sim::Fault {
        matches: Box::new(is_read),
        after: 0,
        failure: sim::HostFailure::Errno(5),
        times: sim::Repeat::ForEver,
    });
    let options = StreamOptions { on_error: OnError::Stop, ..StreamOptions::new("job0") };
    start(&disk, &jobs, options).unwrap();
    let status = || jobs.query()[0].status;
    wait_until("the error pauses the job", || status() == Status::Paused);
    wait_until("no reader is at work", || base.failures() >= 5);
    base.heal();
    let held = base.hold(is_read);
    jobs.resume("job0").unwrap();
    wait_until("the chunks are read again", || held.stopped() == 3);
    jobs.pause("job0").unwrap();
    wait_until("it pauses while it waits", || status() == Status::Paused);
    jobs.resume("job0").unwrap();
    jobs.cancel("job0", crate::job::Force::Yes).unwrap();
    jobs.settle("job0", PATIENCE);
    assert!(jobs.last().is_some_and(|job| job.cancelled), "it waits for its base");
    assert_eq!(held.stopped(), 3, "the readers still wait");
    drop(held);
}

/// Protects: on a host that can clone, a job reads nothing, not even ahead. Its progress and its
/// speed are those of any other job. Without a speed, one clone covers many chunks.
#[test]
fn what_can_be_cloned_is_not_read() {
    let (disk, base, content) = on_host(16, 8, 4096);
    let held = base.hold(|operation| operation.action == Action::Read);
    let jobs = Jobs::new();
    start(&disk, &jobs, StreamOptions { speed: 1, ..StreamOptions::new("job0") }).unwrap();
    wait_until("the first chunk is free", || jobs.query()[0].progress.offset == STREAM_CHUNK);
    jobs.pause("job0").unwrap();
    assert_eq!(
        (base.operations(), jobs.query()[0].progress.offset),
        (1, STREAM_CHUNK),
        "one chunk, one clone"
    );
    jobs.set_speed("job0", 0).unwrap();
    jobs.resume("job0").unwrap();
    jobs.settle("job0", PATIENCE);
    let job = jobs.last().unwrap();
    assert_eq!(
        (job.error, job.work.copied, job.progress.offset),
        (None, 8 * STREAM_CHUNK, 8 * STREAM_CHUNK)
    );
    assert_eq!((held.stopped(), base.operations(), disk.stats().backing_reads.bytes), (0, 2, 0));
    drop(held);
    assert!(disk.info().unwrap().backing.is_empty());
    let mut read = vec![0; content.len()];
    disk.read(0, &mut read).unwrap();
    assert!(read == content);
    disk.close().unwrap();
}

/// Protects: reads copy up for themselves beside a stream that shares blocks, because what it
/// brings is not in the page cache of the overlay.
#[test]
fn a_stream_that_shares_blocks_takes_over_no_copies() {
    let (disk, base, _) = on_host(16, 40, 4096);
    let held = base
        .hold(|operation| operation.action == Action::CloneFrom && operation.at > 2 * CLONE_STEP);
    let jobs = Jobs::new();
    start(&disk, &jobs, StreamOptions::new("job0")).unwrap();
    held.wait_for(1);
    assert_eq!(disk.walk_position(), None);
    drop(held);
    jobs.settle("job0", PATIENCE);
    assert_eq!(jobs.last().unwrap().error, None);
}

/// Protects: a stream rests while a guest's flush runs, but a flush that never ends does not stop
/// it. A stream with a speed, or of normal priority, does not rest. A cancel ends a rest.
#[test]
fn a_stream_gives_way_to_a_flush() {
    let chunks = 5;
    let (disk, overlay) = flushing(chunks);
    let held = overlay.hold(|operation| operation.action == Action::Sync);
    let flush = std::thread::spawn({
        let disk = Arc::clone(&disk);
        move || disk.flush()
    });
    held.wait_for(1);
    let jobs = Jobs::new();
    let rests = || {
        jobs.query()
            .first()
            .is_some_and(|job| !job.busy && job.progress.offset < chunks * STREAM_CHUNK)
    };
    let offset = || jobs.query()[0].progress.offset;
    start(&disk, &jobs, StreamOptions::new("job0")).unwrap();
    wait_until("it rests", rests);
    wait_until("it goes on", || offset() >= STREAM_CHUNK);
    wait_until("it rests again", rests);
    jobs.cancel("job0", crate::job::Force::Yes).unwrap();
    jobs.settle("job0", PATIENCE);
    assert!(jobs.last().is_some_and(|job| job.cancelled));

    for (priority, speed) in [(Priority::Low, u64::MAX >> 1), (Priority::Normal, 0)] {
        let options =
            StreamOptions { priority, speed, auto_finalize: false, ..StreamOptions::new("job1") };
        start(&disk, &jobs, options).unwrap();
        let mut has_rested = false;
        wait_until("all is copied", || {
            has_rested |= rests();
            offset() == chunks * STREAM_CHUNK
        });
        assert!(!has_rested, "{priority:?}");
        jobs.cancel("job1", crate::job::Force::Yes).unwrap();
        jobs.settle("job1", PATIENCE);
    }
    drop(held);
    flush.join().unwrap().unwrap();
}

/// Returns a disk with dirty data, and the file of its overlay.
fn flushing(chunks: u64) -> (Arc<Disk>, Arc<SimStorage>) {
    let size = chunks * STREAM_CHUNK;
    let overlay =
        SimStorage::new(NewImage::file_for_tests(16, size, Some(("base.raw", BackingFormat::Raw))));
    let disk = Disk::for_tests(
        Image::open(overlay.clone()).unwrap(),
        Some(Chain::of_raw(SimStorage::new(vec![7; size as usize]))),
    );
    disk.write(0, &[1]).unwrap();
    (Arc::new(disk), overlay)
}

/// Protects: a client may start a stream while the daemon is about to resume another one. Then the
/// client's stream keeps its own note and is the only stream. This also holds when the client's
/// stream is over already, and has cut the chain that the interrupted stream was meant for.
#[test]
fn a_client_that_is_faster_than_a_resumed_stream_keeps_its_note() {
    let (disk, _, _) = simulated(16, 4);
    let jobs = Jobs::new();
    let notes = Arc::new(parking_lot::Mutex::new(None::<String>));
    let kept = Arc::clone(&notes);
    let keep = move |note: Option<&str>| {
        *kept.lock() = note.map(str::to_owned);
        Ok(())
    };
    let streams = Streams::keeping(&jobs, "drive0", jiff::tz::TimeZone::UTC, Box::new(keep));
    // The first stream has nothing to do, so a pause would not keep it.
    streams.start(&disk, StreamOptions { depth: Some(0), ..StreamOptions::new("over") }).unwrap();
    wait_until("the end of the first stream", || jobs.query().is_empty());
    streams.start(&disk, StreamOptions { paused: true, ..StreamOptions::new("client") }).unwrap();
    let layers = disk.info().unwrap().backing;
    let base = serde_json::json!({ "name": layers[0].reference.name, "path": layers[0].path, "layers": 1 });
    for base in [Some(base), None] {
        let mut note = serde_json::json!({
            "version": 2, "speed": 0, "on-error": "report", "auto-finalize": true, "auto-dismiss": true, "request": "", "paused": false, "offset": 0, "len": 1,
        });
        if let Some(base) = base {
            note["base"] = base;
        }
        streams.resume(
            &disk,
            Interrupted::of(note.to_string().as_bytes(), &disk),
            Priority::Normal,
        );
        assert!(
            notes.lock().as_deref().is_some_and(|note| note.contains("\"client\"")),
            "{:?}",
            notes.lock()
        );
    }
    assert_eq!(
        streams.start(&disk, StreamOptions::new("third")).unwrap_err().kind(),
        host::ErrorKind::Busy
    );
    jobs.cancel("client", crate::job::Force::Yes).unwrap();
    wait_until("the end of the stream", || jobs.query().is_empty());
    streams.resume(
        &disk,
        Interrupted::of(notes.lock().clone().unwrap_or_default().as_bytes(), &disk),
        Priority::Normal,
    );
    assert!(jobs.query().is_empty() && notes.lock().is_none());
}

/// Protects: where chunks that were to be cloned together cannot be, and one of them cannot be read
/// either, that chunk alone is reported and ignored (QEMU: one chunk at a time).
#[test]
fn a_chunk_that_fails_fails_alone() {
    let (disk, base, content) = on_host(16, 16, 4096);
    let bad = 5 * STREAM_CHUNK + 70_000;
    base.inject(Fault {
        matches: Box::new(move |operation| {
            let reads = operation.action == Action::Read;
            let range = operation.at..operation.at + operation.len;
            operation.is_clone || reads && range.contains(&bad)
        }),
        after: 0,
        failure: HostFailure::Errno(5),
        times: Repeat::ForEver,
    });
    let jobs = Jobs::new();
    let options = StreamOptions { on_error: OnError::Ignore, ..StreamOptions::new("job0") };
    start(&disk, &jobs, options).unwrap();
    jobs.settle("job0", PATIENCE);
    let job = jobs.last().unwrap();
    let work = (job.work.failed, job.work.copied, job.progress.offset);
    assert_eq!(work, (STREAM_CHUNK, 15 * STREAM_CHUNK, 16 * STREAM_CHUNK));
    assert_eq!(job.error.as_deref(), Some("Input/output error"));
    assert!(!disk.info().unwrap().backing.is_empty(), "the chain is cut only after everything");
    base.heal();
    let mut read = vec![0; content.len()];
    disk.read(0, &mut read).unwrap();
    assert!(read == content);
    disk.close().unwrap();
}
