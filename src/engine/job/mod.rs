//! Background jobs of any kind: their status, their rate limit, the commands that users can give
//! them and the events that they emit.
//!
//! ```text
//!  users ── create, verbs, query ──▶ Jobs ◀── checkpoint, advance, error, finish ── Control
//!                                     │                                      (job's thread)
//!                     subscribers ◀───┘ batches of events, in the order of the changes
//! ```
//!
//! **Touches:** channels and the clock. **Never:** knows a disk, qcow2 or JSON; starts a thread;
//! does I/O.
//! **Locks:** one leaf lock for all jobs and their subscribers. No thread holds it while it runs
//! code of a worker or waits for anything but the lock's own condition variable. `keeping`, before
//! it: the thread that has changed a job holds it while it gives the jobs away (`job/kept.rs`).
//! **Invariants:** a status changes only along the table of [`Status::may_become`] (I7, asserted).
//! Events are sent under the same lock that guards the changes they report, so they arrive in the
//! order of the changes, and a job that was reported as completed is no longer in the registry. A
//! subscriber that does not read never blocks a job. The model is QEMU's `job.c` and `blockjob.c`,
//! to the word wherever a client can observe it.

mod control;
mod error;
mod events;
mod forecast;
mod kept;
mod rate_estimate;
mod rate_limit;
mod registry;
mod state;
#[cfg(test)]
mod tests;

use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use crossbeam_channel::Receiver;
use parking_lot::{Condvar, Mutex};
use serde::{Deserialize, Serialize};

pub use control::Control;
pub use error::{Failure, JobError};
pub use events::{Batch, JobEvent, Progress};
pub(crate) use forecast::Forecast;
pub(crate) use kept::{JobPhase, KeptJob};
pub use kept::{KeptJobs, LONGEST_KEPT_JOBS};
pub use state::{Status, Verb};

use registry::{Job, Registry};

/// Takes the text of the jobs ([`KeptJobs`]) at each change of them.
pub type KeepJobs = Box<dyn Fn(&str) -> host::Result<()> + Send + Sync>;

/// Policy of a job for errors (QEMU `BlockdevOnError`).
#[derive(Clone, Copy, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum OnError {
    /// The job fails.
    #[default]
    Report,
    /// The job goes on, and fails at the end.
    Ignore,
    /// The job pauses if there is no space, and fails on any other error.
    Enospc,
    /// The job pauses, and tries again when it is resumed.
    Stop,
    /// Same as [`OnError::Enospc`].
    Auto,
}

/// The action that a job took on one error.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum ErrorAction {
    /// The job fails.
    Report,
    /// The job goes on.
    Ignore,
    /// The job pauses.
    Stop,
}

/// Whether an error has stopped the job.
#[derive(Clone, Copy, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum IoStatus {
    /// No error has stopped it.
    #[default]
    Ok,
    /// An error other than a lack of space has stopped it.
    Failed,
    /// A lack of space has stopped it.
    NoSpace,
}

/// The next step of a worker after a checkpoint.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Next {
    /// Process the next chunk.
    Continue,
    /// Clean up, because the job was cancelled.
    Cancel,
}

/// Result of a worker.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Outcome {
    /// All work is done.
    Done,
    /// The job was cancelled.
    Cancelled,
    /// The worker could not go on, or has skipped something because of an error.
    Failed(Failure),
}

/// How a job ended.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum JobEnding {
    /// All work is done.
    Completed,
    /// The worker could not go on, or has skipped something because of an error.
    Failed,
    /// A user has cancelled the job.
    Cancelled,
    /// The process ends, and no user had cancelled the job ([`Jobs::cancel_all_and_wait`]).
    Abandoned,
}

/// State of the worker of a job when a verb was applied.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Worker {
    /// The worker slept, so it obeys at once: [`Jobs::settle`] does not wait long.
    Asleep,
    /// The worker was busy, and obeys after its current chunk.
    AtWork,
}

/// How a cancel treats a job that a user has paused.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Force {
    /// The cancel is refused.
    No,
    /// The job is cancelled.
    Yes,
}

/// Arguments of a new job.
#[derive(Clone, Debug)]
pub struct JobSpec {
    /// Id of the job: a letter, then letters, digits, `-`, `.` and `_`.
    pub id: String,
    /// Kind of the job, in one word.
    pub kind: &'static str,
    /// Total bytes of the job; 0 if there is nothing to do.
    pub len: u64,
    /// Rate limit in bytes per second; 0 is unlimited.
    pub speed: u64,
    /// The result takes effect without [`Verb::Finalize`].
    pub auto_finalize: bool,
    /// The job is removed from the registry as soon as it has concluded.
    pub auto_dismiss: bool,
    /// Policy for errors.
    pub on_error: OnError,
    /// The arguments of the client's request, as text. The registry only stores it, for later
    /// queries.
    pub request: String,
}

/// The result for the bytes that a job has processed.
#[derive(Clone, Copy, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
pub struct Work {
    /// Bytes read and written.
    pub copied: u64,
    /// Bytes read, and found to be zero.
    pub zeroed: u64,
    /// Bytes skipped because of an error that the policy ignores.
    pub failed: u64,
}

/// State of one job.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct JobInfo {
    /// Id, kind, offset and speed.
    pub progress: Progress,
    /// Status.
    pub status: Status,
    /// The worker runs: it neither sleeps nor has it ended.
    pub busy: bool,
    /// A user or an error has requested a pause; the worker may not have stopped yet.
    pub paused: bool,
    /// Whether an error has stopped the job.
    pub io_status: IoStatus,
    /// See [`JobSpec::auto_finalize`].
    pub auto_finalize: bool,
    /// See [`JobSpec::auto_dismiss`].
    pub auto_dismiss: bool,
    /// The job was cancelled, or is being cancelled.
    pub cancelled: bool,
    /// Text of the error with which the job failed.
    pub error: Option<String>,
    /// The last error with file and offset: the error that failed the job, that has paused it, or
    /// that it has skipped.
    pub error_detail: Option<String>,
    /// See [`JobSpec::request`].
    pub request: String,
    /// Results so far. The rest of the bytes up to the offset needed no work.
    pub work: Work,
    /// Time of creation.
    pub created: SystemTime,
    /// Time at which the job concluded.
    pub concluded: Option<SystemTime>,
    /// Bytes per second that were read in the last few seconds.
    pub rate: u64,
    /// Estimate of the bytes that are left to read; `None` until the worker has made a forecast.
    pub left: Option<u64>,
    /// Estimate of the time that the bytes left take at the current rate; `None` while the job
    /// makes no progress, or without a forecast.
    pub remaining: Option<Duration>,
}

impl JobInfo {
    /// Returns the number of bytes that needed no work.
    pub fn skipped(&self) -> u64 {
        let Work { copied, zeroed, failed } = self.work;
        self.progress.offset.saturating_sub(copied + zeroed + failed)
    }
}

/// Number of concluded jobs, by result.
#[derive(Clone, Copy, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
pub struct Completed {
    /// Jobs that did all their work.
    pub successful: u64,
    /// Jobs that failed.
    pub failed: u64,
    /// Jobs that were cancelled.
    pub cancelled: u64,
}

/// The registry of jobs; clones share one registry.
#[derive(Clone, Debug, Default)]
pub struct Jobs {
    shared: Arc<JobsShared>,
}

#[derive(Default)]
struct JobsShared {
    /// Gives the jobs away; nothing before [`Jobs::keep_with`]. Taken before `registry`, and held
    /// while the text is given away, so that the last text is the newest.
    keeping: Mutex<Keeping>,
    /// A leaf lock: no other lock is taken while it is held.
    registry: Mutex<Registry>,
    /// Signalled after each change of the registry for which a worker or a waiting caller may wait.
    changed: Condvar,
}

#[derive(Default)]
struct Keeping {
    keep: Option<KeepJobs>,
    /// The warning that the jobs cannot be kept was logged.
    warned: bool,
}

impl std::fmt::Debug for JobsShared {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("JobsShared").field("registry", &self.registry).finish_non_exhaustive()
    }
}

impl JobsShared {
    /// Gives the jobs away for the process that continues them if this one is killed. To be called
    /// without a lock of the registry, after each change that a client can observe. The progress is
    /// no such change. A process that is about to end keeps nothing more: what it cancels goes on
    /// if it is killed before it has unmounted the disk.
    fn keep(&self) {
        let mut keeping = self.keeping.lock();
        let Some(keep) = &keeping.keep else { return };
        let kept = {
            let registry = self.registry.lock();
            if registry.closed {
                return;
            }
            registry.kept()
        };
        if let Err(error) = kept.into_text().and_then(|text| keep(&text))
            && !std::mem::replace(&mut keeping.warned, true)
        {
            log::warn!("{error}: if this process is killed, its jobs are not known exactly");
        }
    }
}

/// Holds all jobs with work at their next checkpoint until it is dropped. With it, the reply to the
/// command that starts a job precedes the job's first progress.
#[derive(Debug)]
#[must_use]
pub struct Hold {
    shared: Arc<JobsShared>,
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
    /// Creates an empty registry.
    pub fn new() -> Self {
        Jobs::default()
    }

    /// Creates a job, whose worker has to call [`Control::start`] next.
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

    /// Applies `verb` to the job `id`. Some verbs need more and have methods of their own: `cancel`
    /// is not forced here, and `set-speed`, `complete` and `change` are only checked.
    ///
    /// # Errors
    /// [`JobError::NotFound`], [`JobError::VerbRefused`], and those of [`Jobs::pause`],
    /// [`Jobs::resume`] and [`Jobs::cancel`].
    pub fn apply(&self, id: &str, verb: Verb) -> Result<Worker, JobError> {
        self.with_job(id, |job| {
            // A resume of a job that is not paused gets this error in every status (QEMU
            // `job_user_resume`).
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

    /// Checks whether `verb` would be accepted now.
    ///
    /// # Errors
    /// [`JobError::NotFound`], [`JobError::VerbRefused`].
    pub fn check(&self, id: &str, verb: Verb) -> Result<(), JobError> {
        self.shared.registry.lock().find(id).ok_or(JobError::NotFound)?.check(verb)
    }

    /// Pauses a job until it is resumed. Its status changes when its worker has stopped.
    ///
    /// # Errors
    /// [`JobError::NotFound`], [`JobError::VerbRefused`], [`JobError::AlreadyPaused`].
    pub fn pause(&self, id: &str) -> Result<Worker, JobError> {
        self.apply(id, Verb::Pause)
    }

    /// Resumes a paused job.
    ///
    /// # Errors
    /// [`JobError::NotFound`], [`JobError::NotPaused`], [`JobError::VerbRefused`].
    pub fn resume(&self, id: &str) -> Result<Worker, JobError> {
        self.apply(id, Verb::Resume)
    }

    /// Cancels a job. Work that was done is kept. A cancel does nothing if the result of the job is
    /// already taking effect.
    ///
    /// # Errors
    /// [`JobError::NotFound`], [`JobError::VerbRefused`], and without force
    /// [`JobError::CurrentlyPaused`].
    pub fn cancel(&self, id: &str, force: Force) -> Result<Worker, JobError> {
        match force {
            Force::No => self.apply(id, Verb::Cancel),
            Force::Yes => self.with_job(id, |job| {
                job.check(Verb::Cancel)?;
                Ok(job.cancel())
            }),
        }
    }

    /// Limits a job to `bytes_per_second` on average; 0 is unlimited. A higher speed takes effect
    /// at once.
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

    /// Calls `keep` with the text of all jobs ([`KeptJobs`]) now and after each change of them,
    /// before the change is confirmed to its client.
    pub fn keep_with(&self, keep: KeepJobs) {
        self.shared.keeping.lock().keep = Some(keep);
        self.shared.keep();
    }

    /// Keeps the jobs after a change that the registry does not know: of a recipe, or of progress.
    pub(crate) fn keep_now(&self) {
        self.shared.keep();
    }

    /// Takes the jobs of another process over, into an empty registry. No event reports that.
    /// Returns the handles for the workers of those that have not ended. `kind` is the kind of all
    /// jobs.
    pub(crate) fn restore(&self, kept: KeptJobs, kind: &'static str) -> Vec<Control> {
        let mut registry = self.shared.registry.lock();
        registry.completed = kept.completed;
        registry.last = kept.last.clone().map(|last| last.into_info(kind));
        registry.last_kept = kept.last;
        let mut controls = Vec::new();
        // The oldest has the lowest number.
        for job in kept.jobs.into_iter().rev() {
            registry.created += 1;
            let (serial, id, phase) = (registry.created, job.id.clone(), job.phase);
            registry.jobs.insert(0, job.into_job(serial, kind));
            if phase != JobPhase::Concluded {
                controls.push(Control::new(Arc::clone(&self.shared), serial, id));
            }
        }
        controls
    }

    /// Stores what a worker needs to continue the job `id`, as [`Control::set_recipe`] does.
    pub(crate) fn set_recipe(&self, id: &str, recipe: String) {
        if let Some(job) = self.shared.registry.lock().find(id) {
            job.recipe = recipe;
        }
    }

    /// Returns all jobs, newest first.
    pub fn query(&self) -> Vec<JobInfo> {
        self.shared.registry.lock().jobs.iter().map(Job::info).collect()
    }

    /// Returns the job that concluded last, in its final state.
    pub fn last(&self) -> Option<JobInfo> {
        self.shared.registry.lock().last.clone()
    }

    /// Returns the number of concluded jobs.
    pub fn completed(&self) -> Completed {
        self.shared.registry.lock().completed
    }

    /// Whether the registry has any job. A concluded job counts until it is dismissed, as in QEMU.
    pub fn is_busy(&self) -> bool {
        !self.shared.registry.lock().jobs.is_empty()
    }

    /// Whether [`Jobs::cancel_all_and_wait`] was called because the process is about to end.
    pub fn is_closed(&self) -> bool {
        self.shared.registry.lock().closed
    }

    /// Subscribes to all events from now on. The channel is unbounded, so that no job waits for a
    /// subscriber; the caller has to read it or to drop it.
    pub fn subscribe(&self) -> Receiver<Arc<Batch>> {
        let (sender, receiver) = crossbeam_channel::unbounded();
        self.shared.registry.lock().subscribe(sender);
        receiver
    }

    /// Holds all jobs at their checkpoints until the result is dropped.
    pub fn hold(&self) -> Hold {
        self.shared.registry.lock().holds += 1;
        Hold { shared: Arc::clone(&self.shared) }
    }

    /// Waits until the job `id`, if there is one, has concluded, at most for `timeout`.
    pub fn settle(&self, id: &str, timeout: Duration) {
        let give_up = Instant::now() + timeout;
        let mut registry = self.shared.registry.lock();
        let Some(serial) = registry.find(id).map(|job| job.serial) else { return };
        while registry
            .jobs
            .iter()
            .any(|job| job.serial == serial && job.status != Status::Concluded)
        {
            if self.shared.changed.wait_until(&mut registry, give_up).timed_out() {
                return;
            }
        }
    }

    /// Ends all jobs before the process ends: refuses new jobs, cancels all jobs, and waits for
    /// their workers, at most for `patience`, because a worker may hang in a read that never
    /// returns. Returns whether all workers have ended; if so, all jobs are removed.
    pub fn cancel_all_and_wait(&self, patience: Duration) -> bool {
        let give_up = Instant::now() + patience;
        let mut registry = self.shared.registry.lock();
        registry.closed = true;
        for job in registry
            .jobs
            .iter_mut()
            .filter(|job| job.status.accepts(Verb::Cancel) && !job.cancelled)
        {
            job.abandoned = true;
        }
        let events = registry
            .jobs
            .iter_mut()
            .filter(|job| job.status.accepts(Verb::Cancel))
            .filter_map(Job::cancel)
            .collect();
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

    /// Changes one job, sends the event if there is one, and wakes all waiting threads.
    fn with_job(
        &self,
        id: &str,
        change: impl FnOnce(&mut Job) -> Result<Option<JobEvent>, JobError>,
    ) -> Result<Worker, JobError> {
        let mut registry = self.shared.registry.lock();
        let job = registry.find(id).ok_or(JobError::NotFound)?;
        let worker = if job.parked || job.status == Status::Pending {
            Worker::Asleep
        } else {
            Worker::AtWork
        };
        let event = change(job)?;
        registry.jobs.retain(|job| job.status != Status::Null);
        registry.emit(event.into_iter().collect());
        self.shared.changed.notify_all();
        drop(registry);
        self.shared.keep();
        Ok(worker)
    }
}

/// Whether `id` is a valid id of a job (QEMU `id_wellformed`).
pub fn is_valid_id(id: &str) -> bool {
    id.starts_with(|first: char| first.is_ascii_alphabetic())
        && id.bytes().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'.' | b'_'))
}
