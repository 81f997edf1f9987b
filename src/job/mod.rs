//! Background jobs, of no particular kind: their life, their speed, what users can ask of them and what they tell.
//!
//! ```text
//!  users ── create, verbs, query ──▶ Jobs ◀── checkpoint, advance, error, finish ── Control ── the worker's thread
//!                                     │
//!                     subscribers ◀───┘ batches of events, in the order of the changes
//! ```
//!
//! **Touches:** channels and the clock. **Never:** knows a disk, qcow2 or JSON; starts a thread; does I/O.
//! **Locks:** one leaf lock for all jobs and their subscribers, never held across a wait (other than its own condition variable) or a worker's code.
//! **Invariants:** a status moves only along the table of [`Status::may_become`] (I7, asserted); events are sent under the lock that guards what they tell of, so their
//! order is that of the changes, and whoever sees a job completed does not find it any more; a subscriber that does not read never blocks a job.
//! The model is QEMU's `job.c` and `blockjob.c`, word for word where it can be observed.

mod control;
mod error;
mod events;
mod forecast;
mod pace;
mod rate_limit;
mod registry;
mod state;
#[cfg(test)]
mod tests;

use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use crossbeam_channel::Receiver;
use parking_lot::{Condvar, Mutex};

pub use control::Control;
pub use error::{Failure, JobError};
pub use events::{Batch, JobEvent, Progress};
pub use forecast::Forecast;
pub use rate_limit::RateLimit;
pub use state::{Status, Verb};

use registry::{Job, Registry};

/// What a job does about an error (QEMU `BlockdevOnError`).
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub enum OnError {
    /// Fails.
    #[default]
    Report,
    /// Goes on, and fails at the end.
    Ignore,
    /// Pauses for want of space, fails for any other reason.
    Enospc,
    /// Pauses; tries again when resumed.
    Stop,
    /// As [`OnError::Enospc`].
    Auto,
}

/// What a job did about one error.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum ErrorAction {
    /// It fails.
    Report,
    /// It goes on.
    Ignore,
    /// It pauses.
    Stop,
}

/// Whether a job was stopped by an error.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub enum IoStatus {
    /// No.
    #[default]
    Ok,
    /// Yes.
    Failed,
    /// Yes, for want of space.
    NoSpace,
}

/// What a worker does after a checkpoint.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Next {
    /// The next chunk.
    Continue,
    /// Clean up.
    Cancel,
}

/// How a worker's work ended.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Outcome {
    /// All is done.
    Done,
    /// It was told to give up.
    Cancelled,
    /// It could not go on, or skipped something.
    Failed(Failure),
}

/// How a job has ended.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Ending {
    /// All is done.
    Completed,
    /// It could not go on, or skipped something.
    Failed,
    /// A user has given it up.
    Cancelled,
    /// The process ends; nobody has given the job up ([`Jobs::cancel_all_and_wait`]).
    Abandoned,
}

/// What the worker of a job was doing when a verb was applied.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Worker {
    /// It slept, so what was asked happens at once: [`Jobs::settle`] will not wait long.
    Asleep,
    /// It was at work, and obeys when its chunk is done.
    AtWork,
}

/// How a cancel treats a job that a user has paused.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Force {
    /// It is refused.
    No,
    /// It is cancelled.
    Yes,
}

/// What a job is created from.
#[derive(Clone, Debug)]
pub struct JobSpec {
    /// Its name: a letter, then letters, digits, `-`, `.` and `_`.
    pub id: String,
    /// What it does, in one word.
    pub kind: &'static str,
    /// Where it ends, in bytes; 0 is a job that has nothing to do.
    pub len: u64,
    /// Its limit in bytes per second; 0 is unlimited.
    pub speed: u64,
    /// Its result takes effect without an order.
    pub auto_finalize: bool,
    /// It is forgotten when it has concluded.
    pub auto_dismiss: bool,
    /// What it does about errors.
    pub on_error: OnError,
    /// What its user asked for, in the words of whoever took the request: kept for those who ask for it later, never read here.
    pub request: String,
}

/// What became of the bytes that a job has dealt with.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct Work {
    /// Read and written.
    pub copied: u64,
    /// Read, and found to be zero.
    pub zeroed: u64,
    /// Given up, where errors are ignored.
    pub failed: u64,
}

/// Facts of one job.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct JobInfo {
    /// Name, kind, and how far it has come.
    pub progress: Progress,
    /// Its status.
    pub status: Status,
    /// Its worker is at work: neither asleep nor over.
    pub busy: bool,
    /// A user, or an error, has asked it to pause; it may not have stopped yet.
    pub paused: bool,
    /// Whether an error has stopped it.
    pub io_status: IoStatus,
    /// As it was created.
    pub auto_finalize: bool,
    /// As it was created.
    pub auto_dismiss: bool,
    /// It was, or is to be, given up.
    pub cancelled: bool,
    /// Why it failed.
    pub error: Option<String>,
    /// With file and offset, the error that was met last: the job failed with it, is paused by it,
    /// or has passed it over.
    pub error_detail: Option<String>,
    /// As it was created.
    pub request: String,
    /// What was done; all the rest up to its offset needed nothing.
    pub work: Work,
    /// When it was created.
    pub created: SystemTime,
    /// When it concluded.
    pub concluded: Option<SystemTime>,
    /// Bytes per second that it has read in the last few seconds.
    pub rate: u64,
    /// Bytes that it still has to read, as far as its worker has told; never more than a guess.
    pub left: Option<u64>,
    /// How long they take, if it goes on like this; `None` while it does not go on, or nothing is known of them.
    pub remaining: Option<Duration>,
}

impl JobInfo {
    /// Bytes that needed nothing.
    pub fn skipped(&self) -> u64 {
        let Work { copied, zeroed, failed } = self.work;
        self.progress.offset.saturating_sub(copied + zeroed + failed)
    }
}

/// How many jobs have concluded, by how they ended.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct Completed {
    /// All was done.
    pub successful: u64,
    /// They failed.
    pub failed: u64,
    /// They were given up.
    pub cancelled: u64,
}

/// The registry of jobs; clones are the same registry.
#[derive(Clone, Debug, Default)]
pub struct Jobs {
    shared: Arc<Shared>,
}

#[derive(Debug, Default)]
struct Shared {
    /// Rank 6, a leaf.
    registry: Mutex<Registry>,
    /// Anything in the registry changed that somebody may wait for.
    changed: Condvar,
}

/// While one lives, no job with something to do passes a checkpoint: who starts a job can say so before the job's work shows.
#[derive(Debug)]
#[must_use]
pub struct Hold {
    shared: Arc<Shared>,
}

impl Drop for Hold {
    fn drop(&mut self) {
        let mut registry = self.shared.registry.lock();
        registry.holds -= 1;
        registry.jobs.iter_mut().for_each(|job| job.kicked = true);
        self.shared.changed.notify_all();
    }
}

impl Jobs {
    /// An empty registry.
    pub fn new() -> Self {
        Jobs::default()
    }

    /// Creates a job, whose worker is to call [`Control::start`] next.
    ///
    /// # Errors
    /// [`JobError::InvalidId`], [`JobError::AlreadyInUse`], [`JobError::ShuttingDown`].
    pub fn create(&self, spec: JobSpec) -> Result<Control, JobError> {
        if !is_valid_id(&spec.id) {
            return Err(JobError::InvalidId { id: spec.id });
        }
        let mut registry = self.shared.registry.lock();
        if registry.closed {
            return Err(JobError::ShuttingDown);
        }
        if registry.find(&spec.id).is_some() {
            return Err(JobError::AlreadyInUse { id: spec.id });
        }
        registry.created += 1;
        let (serial, id) = (registry.created, spec.id.clone());
        registry.jobs.insert(0, Job::new(serial, spec));
        registry.emit(vec![JobEvent::StatusChange { id: id.clone(), status: Status::Created }]);
        Ok(Control::new(Arc::clone(&self.shared), serial, id))
    }

    /// Asks `verb` of the job `id`; see the methods of that name for those that need more than a verb: cancel is not forced here,
    /// and set-speed and change are only checked.
    ///
    /// # Errors
    /// [`JobError::NotFound`], [`JobError::VerbRefused`], and those of [`Jobs::pause`], [`Jobs::resume`] and [`Jobs::cancel`].
    pub fn apply(&self, id: &str, verb: Verb) -> Result<Worker, JobError> {
        self.with_job(id, |job| {
            // A job that is not paused says so, whatever its status (QEMU `job_user_resume`).
            if verb == Verb::Resume && !job.user_paused {
                return Err(JobError::NotPaused);
            }
            if verb == Verb::Cancel && job.user_paused {
                return Err(JobError::CurrentlyPaused { id: id.into() });
            }
            job.check(verb)?;
            match verb {
                Verb::Pause if job.user_paused => return Err(JobError::AlreadyPaused),
                Verb::Pause => {
                    job.user_paused = true;
                    return Ok(job.settle_pause());
                }
                Verb::Resume => return Ok(job.unpause()),
                Verb::Cancel => return Ok(job.cancel()),
                Verb::Finalize => job.finalize = true,
                Verb::Dismiss => return Ok(Some(job.transition(Status::Null))),
                Verb::SetSpeed | Verb::Complete | Verb::Change => {}
            }
            Ok(None)
        })
    }

    /// Whether `verb` would be accepted now.
    ///
    /// # Errors
    /// [`JobError::NotFound`], [`JobError::VerbRefused`].
    pub fn check(&self, id: &str, verb: Verb) -> Result<(), JobError> {
        self.shared.registry.lock().find(id).ok_or(JobError::NotFound)?.check(verb)
    }

    /// Stops a job until it is resumed; its status says so when its worker has stopped.
    ///
    /// # Errors
    /// [`JobError::NotFound`], [`JobError::VerbRefused`], [`JobError::AlreadyPaused`].
    pub fn pause(&self, id: &str) -> Result<Worker, JobError> {
        self.apply(id, Verb::Pause)
    }

    /// Lets a paused job go on.
    ///
    /// # Errors
    /// [`JobError::NotFound`], [`JobError::NotPaused`], [`JobError::VerbRefused`].
    pub fn resume(&self, id: &str) -> Result<Worker, JobError> {
        self.apply(id, Verb::Resume)
    }

    /// Gives a job up. What it did stays done. Where its result is taking effect already, it comes too late and does nothing.
    ///
    /// # Errors
    /// [`JobError::NotFound`], [`JobError::VerbRefused`], and without force [`JobError::CurrentlyPaused`].
    pub fn cancel(&self, id: &str, force: Force) -> Result<Worker, JobError> {
        match force {
            Force::No => self.apply(id, Verb::Cancel),
            Force::Yes => self.with_job(id, |job| {
                job.check(Verb::Cancel)?;
                Ok(job.cancel())
            }),
        }
    }

    /// Limits a job to `bytes_per_second` on average; 0 is unlimited. A higher speed takes effect at once.
    ///
    /// # Errors
    /// [`JobError::NotFound`], [`JobError::VerbRefused`].
    pub fn set_speed(&self, id: &str, bytes_per_second: u64) -> Result<(), JobError> {
        self.with_job(id, |job| {
            job.check(Verb::SetSpeed)?;
            job.kicked |= bytes_per_second == 0 || bytes_per_second > job.spec.speed;
            job.spec.speed = bytes_per_second;
            job.limit.set_speed(bytes_per_second);
            Ok(None)
        })?;
        Ok(())
    }

    /// All jobs, newest first.
    pub fn query(&self) -> Vec<JobInfo> {
        self.shared.registry.lock().jobs.iter().map(Job::info).collect()
    }

    /// The job that concluded last, as it was then.
    pub fn last(&self) -> Option<JobInfo> {
        self.shared.registry.lock().last.clone()
    }

    /// How many have concluded.
    pub fn completed(&self) -> Completed {
        self.shared.registry.lock().completed
    }

    /// Whether there is any job. One that has concluded counts until it is dismissed, as in QEMU.
    pub fn is_busy(&self) -> bool {
        !self.shared.registry.lock().jobs.is_empty()
    }

    /// Whether [`Jobs::cancel_all_and_wait`] was called: the process is about to end.
    pub fn is_closed(&self) -> bool {
        self.shared.registry.lock().closed
    }

    /// Everything that happens to jobs from now on. The channel has no bound, so that no job ever waits for a subscriber: read it, or drop it.
    pub fn subscribe(&self) -> Receiver<Arc<Batch>> {
        let (sender, receiver) = crossbeam_channel::unbounded();
        self.shared.registry.lock().subscribe(sender);
        receiver
    }

    /// Keeps all jobs at their checkpoints until the hold is dropped.
    pub fn hold(&self) -> Hold {
        self.shared.registry.lock().holds += 1;
        Hold { shared: Arc::clone(&self.shared) }
    }

    /// Waits until the job `id`, if there is one, has concluded, but no longer than `timeout`.
    pub fn settle(&self, id: &str, timeout: Duration) {
        let give_up = Instant::now() + timeout;
        let mut registry = self.shared.registry.lock();
        let Some(serial) = registry.find(id).map(|job| job.serial) else { return };
        while registry.jobs.iter().any(|job| job.serial == serial && job.status != Status::Concluded) {
            if self.shared.changed.wait_until(&mut registry, give_up).timed_out() {
                return;
            }
        }
    }

    /// For the end of the process: admits no new job, gives up all there are, and waits for their workers, but no longer than `patience`: one
    /// may hang in a read that never returns. Says whether all have ended; those that have are forgotten.
    pub fn cancel_all_and_wait(&self, patience: Duration) -> bool {
        let give_up = Instant::now() + patience;
        let mut registry = self.shared.registry.lock();
        registry.closed = true;
        for job in registry.jobs.iter_mut().filter(|job| job.status.accepts(Verb::Cancel) && !job.cancelled) {
            job.abandoned = true;
        }
        let events = registry.jobs.iter_mut().filter(|job| job.status.accepts(Verb::Cancel)).filter_map(Job::cancel).collect();
        registry.emit(events);
        self.shared.changed.notify_all();
        while registry.has_workers() {
            if self.shared.changed.wait_until(&mut registry, give_up).timed_out() {
                return false;
            }
        }
        let concluded: Vec<u64> = registry.jobs.iter().map(|job| job.serial).collect();
        let events = concluded.into_iter().map(|serial| registry.remove(serial)).collect();
        registry.emit(events);
        true
    }

    /// Changes one job, sends the event if there is one, wakes whoever waits.
    fn with_job(&self, id: &str, change: impl FnOnce(&mut Job) -> Result<Option<JobEvent>, JobError>) -> Result<Worker, JobError> {
        let mut registry = self.shared.registry.lock();
        let job = registry.find(id).ok_or(JobError::NotFound)?;
        let worker = if job.parked || job.status == Status::Pending { Worker::Asleep } else { Worker::AtWork };
        let event = change(job)?;
        registry.jobs.retain(|job| job.status != Status::Null);
        registry.emit(event.into_iter().collect());
        self.shared.changed.notify_all();
        Ok(worker)
    }
}

/// Whether a job may be called `id` (QEMU `id_wellformed`).
pub fn is_valid_id(id: &str) -> bool {
    id.starts_with(|first: char| first.is_ascii_alphabetic())
        && id.bytes().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'.' | b'_'))
}
