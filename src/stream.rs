//! The one job we have: bring everything up, then cut the chain.
//!
//! ```text
//! job's thread   give way ─► checkpoint ─► ask for chunks n+1 … n+4 ─► take chunk n ─► copy it up, hand it to the disk ─► advance ─► give way …
//! readers                        read them from below, decompress; nothing is held meanwhile
//! ```
//! Several chunks are read at the same time, and copied up one after the other: host clusters are handed out in guest order, and where a job
//! stands, what it does about an error and when it obeys are those of a job that does one chunk at a time.
//!
//! Between chunks a job without a speed gives way to the guest ([`Priority::Low`], `stream/pace.rs`): it rests for as long as it takes to keep what the
//! guest feels of it within a factor. A rest is a checkpoint that lasts: it ends at once with a pause, a cancel or a new speed. A job with a speed never
//! rests beyond that: who sets one gets it, exactly.
//!
//! While it runs, a note of its arguments stands beside the image (`stream/note.rs`), by which the next mount starts it again if this process does not
//! live to see its end. Its speed may follow a plan (`stream/plan.rs`).
//!
//! **Touches:** `disk`, `job`, the clock. **Never:** sockets, the image directly. **Locks:** that of [`Streams`], before the jobs'.
//! **Invariants:** guest order, steps of [`STREAM_CHUNK`]; the chain is cut only after every byte was dealt with, and only if nothing was
//! skipped by an error (R12, QEMU `stream_prepare`). A job that ends waits for no reader: one may hang in a read that never returns.

use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::Result;
use crate::disk::{Disk, Populated, ToDo};
use crate::job::{Control, ErrorAction, Failure, Jobs, Next, OnError, Outcome, Work};
use ahead::ReadAhead;
use forecast::Forecaster;
use pace::Pace;

mod ahead;
mod bytes;
mod forecast;
mod interrupted;
mod note;
mod pace;
mod plan;
mod streams;
#[cfg(test)]
mod tests;

pub use bytes::parse_bytes;
pub use interrupted::Interrupted;
pub use plan::{FinishBy, Minute, Plan, PlanInfo, Schedule, Speed};
pub use streams::{Keep, KeptBack, Streams, local_zone};

use streams::Progress;

/// Bytes per step (QEMU: STREAM_CHUNK): the unit in which a failing place is reported and the speed is charged.
pub const STREAM_CHUNK: u64 = 512 << 10;

/// How long a paused stream looks for the place where it stands: it does not obey meanwhile.
const LONGEST_LOOK: Duration = Duration::from_secs(2);

/// The kind of job on the wire and in lists.
pub const KIND: &str = "stream";

/// Arguments of a stream, checked.
#[derive(Clone, Debug)]
pub struct StreamOptions {
    /// Job id.
    pub job_id: String,
    /// How many backing layers, from the top, are copied up; `None` for all of them (the backing link is dropped at the end).
    pub depth: Option<usize>,
    /// Bytes per second; 0 is unlimited. Of no meaning with a plan.
    pub speed: u64,
    /// What the speed follows.
    pub plan: Option<Plan>,
    /// It waits for a user to resume it.
    pub paused: bool,
    /// What an error does.
    pub on_error: OnError,
    /// The chain is cut without an order.
    pub auto_finalize: bool,
    /// The job is forgotten when it has concluded.
    pub auto_dismiss: bool,
    /// The name to write into the header for what remains below, instead of the one that stands in the chain; only with `depth`.
    pub backing_file: Option<String>,
    /// As [`crate::job::JobSpec::request`].
    pub request: String,
    /// Whether it gives way to the guest.
    pub priority: Priority,
}

/// What a stream without a speed does while the guest wants something.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub enum Priority {
    /// It gives way (`stream/pace.rs`), and what it reads ahead is read and decompressed on threads of low priority.
    #[default]
    Low,
    /// It goes on as if nobody else were there.
    Normal,
}

impl StreamOptions {
    /// Everything up, as fast as it goes, stopping at the first error: a plain `block_stream`.
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

/// Starts the job on a thread of its own, as the only stream that this disk ever has. See [`Streams`].
///
/// # Errors
/// Those of [`Streams::start`].
pub fn start(disk: &Arc<Disk>, jobs: &Jobs, options: StreamOptions) -> Result<()> {
    Streams::new(disk, jobs, "", jiff::tz::TimeZone::UTC).start(disk, options)
}

/// Walks the `len` bytes of the disk once.
fn copy_up(disk: &Arc<Disk>, control: &Control, priority: Priority, depth: usize, len: u64, progress: &mut Progress<'_>) -> Outcome {
    let mut offset = passed_already(disk, control, depth, len);
    let mut ahead = ReadAhead::new(disk, priority, depth, offset..len);
    let mut pace = (priority == Priority::Low).then(Pace::default);
    let mut forecast = Forecaster::new(len);
    let mut ignored = None;
    while offset < len {
        if give_way(disk, control, pace.as_mut()) == Next::Cancel || control.checkpoint() == Next::Cancel {
            return Outcome::Cancelled;
        }
        forecast.turn(disk, depth, len, control);
        let end = len.min(offset + STREAM_CHUNK);
        match disk.populate_read(offset..end, depth, ahead.take(offset)) {
            Ok(Populated { copied, zeroed, .. }) => control.advance(end - offset, Work { copied, zeroed, failed: 0 }),
            Err(error) => {
                log::warn!("stream: bytes {offset}..{end}: {error}");
                let failure = Failure::from(error).at(&format!("bytes {offset}..{end}"));
                match control.error(&failure) {
                    ErrorAction::Report => return Outcome::Failed(failure),
                    // The same chunk once more, when a user resumes the job.
                    ErrorAction::Stop => continue,
                    ErrorAction::Ignore => {
                        ignored.get_or_insert(failure);
                        control.advance(end - offset, Work { failed: end - offset, ..Work::default() });
                    }
                }
            }
        }
        offset = end;
        progress.at(offset);
    }
    ignored.map_or(Outcome::Done, Outcome::Failed)
}

/// Where a stream stands that is paused before its first chunk, as one that was paused when its daemon ended: behind all that needs
/// nothing, which it would pass over at once. Found by tables alone, and shown, so that a user sees what is done. 0 for any other.
/// The last chunk is always left: the job stands at a checkpoint before it, and does not end before a user resumes it.
fn passed_already(disk: &Disk, control: &Control, depth: usize, len: u64) -> u64 {
    let give_up = Instant::now() + LONGEST_LOOK;
    let mut offset = 0;
    let most = len.saturating_sub(STREAM_CHUNK);
    while control.is_paused() && offset < most && Instant::now() < give_up {
        // What is wrong is found, and told, when the stream comes there.
        let Ok((ToDo::Nothing, bytes)) = disk.to_do(offset, most - offset, depth) else { break };
        control.advance(bytes, Work::default());
        offset += bytes;
    }
    offset
}

/// Waits for as long as the pace wants. A job with a speed does not wait: its user has said how fast it is to be.
fn give_way(disk: &Disk, control: &Control, pace: Option<&mut Pace>) -> Next {
    let Some(pace) = pace else { return Next::Continue };
    while control.is_unlimited() {
        let Some(rest) = pace.next(Instant::now(), &disk.activity()) else { break };
        if control.rest(rest) == Next::Cancel {
            return Next::Cancel;
        }
    }
    Next::Continue
}
