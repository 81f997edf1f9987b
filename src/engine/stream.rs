//! The stream job: copies every cluster that lies below the overlay into it, then cuts the chain.
//!
//! ```text
//! job's thread   give way ─► checkpoint ─► request chunks n+1 … n+4 ─► take chunk n
//!                    ▲                                                      │
//!                    └────── advance ◄── copy it up, hand it to the disk ◄──┘
//! readers        read the requested chunks from below and decompress them, without a range guard
//! scout          with remote layers: says far ahead what the readers will need
//! ```
//! The reader threads read several chunks at the same time; the job's thread copies them up one
//! after the other. The job's offset, its handling
//! of errors and the moments at which it obeys a command are those of a job that does one chunk at
//! a time. While the job's thread waits for a chunk, which may be long if a server or a file system
//! does not answer, it obeys a pause or a cancel as well.
//!
//! Between chunks a job without a speed gives way to the guest ([`Priority::Low`],
//! `stream/backoff.rs`): it rests long enough to keep the cost of the guest's requests within a
//! factor. A rest is a long checkpoint: a pause, a cancel or a new speed ends it at once. A job
//! with a speed does not rest beyond its rate limit, because the user asked for exactly that speed.
//!
//! Before the walk, and between its chunks, the job's thread copies up pieces that the guest needs
//! first (`stream/course.rs`). They change neither the job's offset nor its result.
//!
//! While the job runs, a note of its arguments is stored beside the image (`stream/note.rs`). If
//! this process dies before the job ends, the next mount starts the job again from the note. The
//! speed of the job may follow a plan (`stream/plan.rs`).
//!
//! **Touches:** `disk`, `job`, the clock. **Never:** sockets, the image directly. **Locks:** those
//! of [`Streams`], before those of the jobs.
//! **Invariants:** the chunks of the walk are copied in guest order, in steps of [`STREAM_CHUNK`];
//! of a long range without work only the first chunk is looked at on its own, and chunks whose
//! blocks are shared are taken together;
//! the chain is cut only after every byte was processed, and only if no chunk was skipped because
//! of an error (R12, QEMU `stream_prepare`). A job that ends does not wait for its reader threads:
//! one of them may hang in a read that never returns.

use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::disk::{Disk, Populated, ToDo, WalkReport};
use crate::job::{Control, ErrorAction, Failure, Next, OnError, Outcome, Work};
use ahead::{READ_AHEAD, ReadAhead};
use backoff::Backoff;
use course::Course;
use forecast::Forecaster;
use host::storage::Need;
use pieces::Pieces;
use scout::{Position, Scout};

mod ahead;
mod backoff;
mod bytes;
mod course;
mod forecast;
mod interrupted;
mod note;
mod pieces;
mod plan;
mod scout;
mod streams;
#[cfg(test)]
mod tests;

pub use bytes::parse_bytes;
pub use course::StreamOrder;
pub use interrupted::Interrupted;
pub use plan::{FinishBy, Minute, Plan, PlanInfo, Schedule, Speed};
pub use streams::{Keep, KeptBack, KeptStreams, Reservation, Streams, local_zone};

use streams::StreamProgress;

/// Bytes per step (QEMU: STREAM_CHUNK): the unit in which a failing range is reported and in which
/// the speed is charged.
pub const STREAM_CHUNK: u64 = 512 << 10;

/// The most that a stream without a speed clones at once, in bytes: a multiple of
/// [`STREAM_CHUNK`]. In one extent, this much costs the file system hardly more than 512 KiB. A
/// request of the guest for the same range waits for it.
const CLONE_STEP: u64 = 4 << 20;

/// The longest time that a stream which starts paused searches for its offset. The job obeys no
/// command during the search.
const LONGEST_LOOK: Duration = Duration::from_secs(2);

/// The longest time that the job's thread waits for one piece of the order before it looks whether
/// another one has come, or whether it is to pause or to end.
const PATIENCE: Duration = Duration::from_millis(20);

/// The kind of job on the wire and in lists.
pub const KIND: &str = "stream";

/// Checked arguments of a stream.
#[derive(Clone, Debug)]
pub struct StreamOptions {
    /// Id of the job.
    pub job_id: String,
    /// Number of backing layers, from the top, that are copied up; `None` copies all of them, and
    /// the backing link is dropped at the end.
    pub depth: Option<usize>,
    /// Bytes per second; 0 is unlimited. Ignored if there is a plan.
    pub speed: u64,
    /// Schedule or deadline that sets the speed.
    pub plan: Option<Plan>,
    /// The job starts paused, until a user resumes it.
    pub paused: bool,
    /// Reaction to an error.
    pub on_error: OnError,
    /// The chain is cut without waiting for [`crate::job::Verb::Finalize`].
    pub auto_finalize: bool,
    /// The job is removed from the registry as soon as it has concluded.
    pub auto_dismiss: bool,
    /// Name of the remaining base that is written into the header, instead of the name that the
    /// chain has for it; only with `depth`.
    pub backing_file: Option<String>,
    /// See [`crate::job::JobSpec::request`].
    pub request: String,
    /// Whether the stream gives way to the guest.
    pub priority: Priority,
}

/// What a stream without a speed does while the guest has requests.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub enum Priority {
    /// The stream rests between chunks (`stream/backoff.rs`), and its reader threads, which read
    /// ahead and decompress, run at low priority.
    #[default]
    Low,
    /// The stream takes no account of the guest.
    Normal,
}

impl StreamOptions {
    /// Options of a plain `block_stream`: copies everything up, without a limit, and stops at the
    /// first error.
    pub fn new(job_id: impl Into<String>) -> Self {
        StreamOptions {
            job_id: job_id.into(),
            depth: None,
            speed: 0,
            plan: None,
            paused: false,
            on_error: OnError::Report,
            auto_finalize: true,
            auto_dismiss: true,
            backing_file: None,
            request: String::new(),
            priority: Priority::default(),
        }
    }
}

/// Starts the job on its own thread, with a new [`Streams`] that knows no other stream of the disk.
///
/// # Errors
/// Those of [`Streams::start`].
#[cfg(any(test, feature = "testing"))]
pub fn start(
    disk: &Arc<Disk>,
    jobs: &crate::job::Jobs,
    options: StreamOptions,
) -> host::Result<()> {
    Streams::new(disk, jobs, "", jiff::tz::TimeZone::UTC).start(disk, options)
}

/// Where a worker has its job from.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Origin {
    /// It was started here.
    Started,
    /// It was taken over from a process that was killed.
    Continued,
}

/// How a stream copies.
#[derive(Debug)]
struct Manner {
    priority: Priority,
    /// Number of layers, from the top.
    depth: usize,
    /// The end of the stream, in bytes.
    len: u64,
    course: Arc<Course>,
    origin: Origin,
}

/// Copies the disk up, chunk by chunk.
fn copy_up(
    disk: &Arc<Disk>,
    control: &Control,
    manner: &Manner,
    progress: &mut StreamProgress<'_>,
) -> Outcome {
    let Manner { priority, depth, len, ref course, origin } = *manner;
    // Whatever the guest waits for overtakes the reads of this thread.
    host::background::mark_thread();
    let mut offset = match origin {
        Origin::Started => passed_already(disk, control, depth, len),
        // The job shows what was done, and obeys at once.
        Origin::Continued => 0,
    };
    let mut ahead = ReadAhead::new(disk, priority, depth, offset..len);
    let scout = Scout::start(disk, depth, offset..len, course);
    course.set_scouted(scout.is_some());
    let mut pieces = Pieces::new(disk, priority, depth, course);
    let _listening = course.follows_guest().then(|| Listening::new(disk, scout.as_ref()));
    let mut backoff = (priority == Priority::Low).then(Backoff::default);
    let mut forecast = Forecaster::new(len);
    let report = disk.walk_report();
    let mut ignored = None;
    // Chunks before this offset are not taken together.
    let mut alone_until = 0;
    let mut shares_blocks = false;
    while offset < len {
        let bring = Bring {
            disk,
            control,
            depth,
            course,
            scout: scout.as_ref(),
            report: &report,
            shares_blocks,
            offset,
        };
        if bring.pieces(&mut pieces, backoff.as_mut()) == Next::Cancel
            || bring.give_way(backoff.as_mut()) == Next::Cancel
            || bring.checkpoint() == Next::Cancel
        {
            return Outcome::Cancelled;
        }
        bring.tell_position();
        let speed = control.speed();
        let known = match &scout {
            Some(scout) => scout.advance(Position { offset, speed }),
            None => forecast.turn(disk, depth, len, speed),
        };
        if let Some(known) = known {
            control.forecast(known);
        }
        // While the chunk is not there, the job is paused or cancelled as at a checkpoint.
        let go_on = || bring.checkpoint() == Next::Continue;
        let Some(bytes) = ahead.take(offset, go_on) else { return Outcome::Cancelled };
        let mut end = len.min(offset + STREAM_CHUNK);
        if scout.is_none() && speed == 0 && offset >= alone_until {
            let step = end..len.min(offset + CLONE_STEP);
            let cloned = leading_chunks(disk, step, depth, ToDo::Clone);
            end += cloned;
            if cloned > 0 {
                // What the guest reads now would not be in the page cache of the overlay.
                shares_blocks = true;
                ahead.start_again(end);
            }
        }
        match disk.populate_read(offset..end, depth, bytes) {
            Ok(Populated { copied, zeroed, .. }) => {
                control.advance(end - offset, Work { copied, zeroed, failed: 0 });
                // With remote layers, this lookup could wait for a server.
                if copied == 0 && zeroed == 0 && scout.is_none() {
                    // The last chunk is left over, as in `passed_already`.
                    let rest = end..len.saturating_sub(STREAM_CHUNK);
                    let idle = leading_chunks(disk, rest, depth, ToDo::Nothing);
                    control.advance(idle, Work::default());
                    end += idle;
                    if idle > 0 {
                        ahead.start_again(end);
                    }
                }
            }
            // A chunk that fails fails alone.
            Err(error) if end - offset > STREAM_CHUNK => {
                log::debug!("stream: bytes {offset}..{end}: {error}");
                alone_until = end;
                ahead.start_again(offset);
                continue;
            }
            Err(error) => {
                log::warn!("stream: bytes {offset}..{end}: {error}");
                let failure = Failure::from(error).at(&format!("bytes {offset}..{end}"));
                match control.error(&failure) {
                    ErrorAction::Report => return Outcome::Failed(failure),
                    // The same chunk is tried again after a user has resumed the job.
                    ErrorAction::Stop => {
                        ahead.start_again(offset);
                        continue;
                    }
                    ErrorAction::Ignore => {
                        ignored.get_or_insert(failure);
                        control.advance(
                            end - offset,
                            Work { failed: end - offset, ..Work::default() },
                        );
                    }
                }
            }
        }
        offset = end;
        progress.at(offset);
    }
    ignored.map_or(Outcome::Done, Outcome::Failed)
}

/// Returns the offset at which a stream starts. If it starts paused, this is the end of the leading
/// range that needs no work; otherwise it is 0. A stream starts paused if it was paused when its
/// daemon ended. The search reads only tables, and advances the job's progress so that a user sees
/// how much is done. The last chunk is always left over, so that the job stops at the checkpoint
/// before it and cannot end before a user resumes it.
fn passed_already(disk: &Disk, control: &Control, depth: usize, len: u64) -> u64 {
    let mut offset = 0;
    if disk.has_remote_tables() {
        // The search could wait for a server, and the job could not be cancelled meanwhile.
        return offset;
    }
    let give_up = Instant::now() + LONGEST_LOOK;
    let most = len.saturating_sub(STREAM_CHUNK);
    while control.is_paused() && offset < most && Instant::now() < give_up {
        // An error ends the search; the stream meets it again at this offset and reports it.
        let Ok((ToDo::Nothing, bytes)) = disk.to_do(offset, most - offset, depth) else { break };
        control.advance(bytes, Work::default());
        offset += bytes;
    }
    offset
}

/// Returns the length of the leading chunks of a range in which the stream has `wanted` to do, in
/// bytes: whole chunks. 0 unless these are more than what is read ahead, which would otherwise be
/// read in vain.
///
/// A disk of 8 TiB that is a single hole has 16 million chunks.
fn leading_chunks(disk: &Disk, range: Range<u64>, depth: usize, wanted: ToDo) -> u64 {
    let most = range.end.saturating_sub(range.start);
    if most <= READ_AHEAD {
        return 0;
    }
    // An error ends the search; the stream meets it again and reports it.
    match disk.to_do(range.start, most, depth) {
        Ok((found, bytes)) if found == wanted && bytes > READ_AHEAD => bytes - bytes % STREAM_CHUNK,
        _ => 0,
    }
}

/// Hears of the guest's reads until it is dropped.
struct Listening<'a>(&'a Disk);

impl<'a> Listening<'a> {
    fn new(disk: &'a Disk, scout: Option<&Scout>) -> Self {
        let woken = disk.listen_to_reads();
        if let Some(scout) = scout {
            scout.follow(woken);
        }
        Listening(disk)
    }
}

impl Drop for Listening<'_> {
    fn drop(&mut self) {
        self.0.listen_no_more();
    }
}

/// What the job's thread needs between two chunks of the walk.
struct Bring<'a> {
    disk: &'a Arc<Disk>,
    control: &'a Control,
    depth: usize,
    course: &'a Course,
    scout: Option<&'a Scout>,
    report: &'a WalkReport<'a>,
    /// Whether the stream has shared blocks with the base instead of copying them.
    shares_blocks: bool,
    /// Where the walk is.
    offset: u64,
}

impl Bring<'_> {
    /// Waits while the job is paused or ahead of its rate limit.
    fn checkpoint(&self) -> Next {
        self.control.checkpoint(|| self.tell_pause())
    }

    /// Tells the scout and the guest's reads that the job's thread is about to wait for the
    /// end of a pause.
    fn tell_pause(&self) {
        if let Some(scout) = self.scout {
            scout.pause();
        }
        self.report.is_at(None);
    }

    /// Tells the guest's reads where the walk is, if they may leave their copies to it.
    fn tell_position(&self) {
        let copies_all_soon = self.depth == usize::MAX
            && self.control.is_unlimited()
            && self.scout.is_none()
            && !self.shares_blocks;
        self.report.is_at(copies_all_soon.then_some(self.offset));
    }

    /// Copies up pieces: those of the order that are left, and those near the guest's reads whose
    /// bytes have come.
    fn pieces(&self, pieces: &mut Pieces, mut backoff: Option<&mut Backoff>) -> Next {
        loop {
            // No byte is read for a job that is paused.
            if self.checkpoint() == Next::Cancel {
                return Next::Cancel;
            }
            self.tell_position();
            match self.scout {
                Some(scout) => {
                    let speed = self.control.speed();
                    if let Some(known) = scout.advance(Position { offset: self.offset, speed }) {
                        self.control.forecast(known);
                    }
                }
                None => drop(self.course.hear(&self.disk.news_of_reads())),
            }
            let has_order = pieces.has_order();
            let patience = if has_order { PATIENCE } else { Duration::ZERO };
            let Some((piece, bytes)) = pieces.take(patience) else {
                if has_order {
                    continue;
                }
                return Next::Continue;
            };
            // No rest before a piece from beside the guest's reads that comes over a network: the
            // guest is about to wait for it. The stream rests before all others.
            if (piece.need == Need::Next || self.scout.is_none())
                && self.give_way(backoff.as_deref_mut()) == Next::Cancel
            {
                return Next::Cancel;
            }
            match self.disk.populate_read(piece.range.clone(), self.depth, bytes) {
                Ok(Populated { copied, zeroed, .. }) => {
                    self.control.advance(0, Work { copied, zeroed, failed: 0 });
                }
                // The walk comes to these bytes, and reports the error if it is still there. Other
                // pieces would delay that: each may wait for the server until it times out.
                Err(error) => {
                    log::debug!("stream: bytes {:?}: {error}", piece.range);
                    pieces.give_up();
                }
            }
        }
    }

    /// Rests for as long as `backoff` asks. A job with a speed does not rest, because its
    /// user has set how fast it runs. Until the next call, the job's thread and its readers
    /// leave the processor to others between two pieces of their work, if the guest is active
    /// or the job has a speed.
    fn give_way(&self, backoff: Option<&mut Backoff>) -> Next {
        let Some(backoff) = backoff else { return Next::Continue };
        while self.control.is_unlimited() {
            let activity = self.disk.activity();
            let Some(rest) = backoff.next(Instant::now(), &activity) else { break };
            if self.control.rest(rest, || self.tell_pause()) == Next::Cancel {
                return Next::Cancel;
            }
        }
        let is_active = backoff.is_guest_active(Instant::now());
        host::background::set_gives_way(!self.control.is_unlimited() || is_active);
        host::background::let_others_run();
        Next::Continue
    }
}
