//! State of the registry. Every change of a status is made here, under the lock of the registry,
//! and is asserted against the tables.

use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use crossbeam_channel::Sender;

use super::kept::{KeptJob, KeptJobs};
use super::rate_estimate::RateEstimate;
use super::rate_limit::RateLimit;
use super::{
    Batch, Completed, Failure, Forecast, IoStatus, JobError, JobEvent, JobInfo, JobSpec, Outcome,
    Progress, Status, Verb, Work,
};

/// Error text of a cancelled job: strerror(ECANCELED) as QEMU prints it.
const CANCELED: &str = "Operation canceled";

/// All state behind the lock of the registry.
#[derive(Debug, Default)]
pub(super) struct Registry {
    /// All jobs, newest first.
    pub jobs: Vec<Job>,
    /// Number of jobs created so far; the source of serial numbers, which tell jobs of the same id
    /// apart.
    pub created: u64,
    /// Number of holds. While it is not 0, no job with work passes a checkpoint.
    pub holds: usize,
    /// No new jobs are accepted, because the process is about to end.
    pub closed: bool,
    /// Final state of the job that concluded last.
    pub last: Option<JobInfo>,
    /// The same job, for the next process of this mount.
    pub last_kept: Option<KeptJob>,
    /// Results of all concluded jobs.
    pub completed: Completed,
    subscribers: Vec<Sender<Arc<Batch>>>,
}

/// One job.
#[derive(Clone, Debug)]
pub(super) struct Job {
    pub serial: u64,
    pub spec: JobSpec,
    /// See [`super::Control::set_recipe`].
    pub recipe: String,
    pub status: Status,
    pub offset: u64,
    /// The least offset that is shown: a worker that continues the job of another process begins
    /// anew, and the job does not go back for that.
    pub shown: u64,
    pub limit: RateLimit,
    /// A pause was requested, by a user or by an error.
    pub user_paused: bool,
    /// A cancel was requested.
    pub cancelled: bool,
    /// A cancel was requested only because the process ends.
    pub abandoned: bool,
    /// The worker waits inside a checkpoint, and reads this state again before it leaves.
    pub parked: bool,
    /// The worker in its checkpoint has to recompute its delay.
    pub kicked: bool,
    /// All work is done.
    pub is_done: bool,
    /// The result may take effect: by a user's command, or because of `auto_finalize`.
    pub finalize: bool,
    /// The result is taking effect, so a cancel does nothing.
    pub finalizing: bool,
    /// The result and the time at which it has taken effect, until the job concludes. The job is
    /// kept with it ([`Registry::kept`]).
    pub ending: Option<(Outcome, SystemTime)>,
    pub io_status: IoStatus,
    pub error: Option<String>,
    /// The last error with file and offset.
    pub detail: Option<String>,
    pub work: Work,
    pub rate_estimate: RateEstimate,
    pub forecast: Option<Forecast>,
    pub created: SystemTime,
    pub concluded: Option<SystemTime>,
}

impl Registry {
    /// Returns the job of `serial`. It must exist: a job is never removed before its worker has
    /// ended.
    pub fn job(&mut self, serial: u64) -> &mut Job {
        let found = self.jobs.iter_mut().find(|job| job.serial == serial);
        found.expect("a job lives as long as its worker")
    }

    /// Returns the job whose id is `id`.
    pub fn find(&mut self, id: &str) -> Option<&mut Job> {
        self.jobs.iter_mut().find(|job| job.spec.id == id)
    }

    /// Whether any job still has a worker.
    pub fn has_workers(&self) -> bool {
        self.jobs.iter().any(|job| job.status != Status::Concluded)
    }

    pub fn subscribe(&mut self, subscriber: Sender<Arc<Batch>>) {
        self.subscribers.push(subscriber);
    }

    /// Sends the events to all subscribers as one batch. The channels are unbounded, so this does
    /// not block.
    pub fn emit(&mut self, events: Vec<JobEvent>) {
        if events.is_empty() {
            return;
        }
        let batch = Arc::new(Batch { at: SystemTime::now(), events });
        self.subscribers.retain(|subscriber| subscriber.send(Arc::clone(&batch)).is_ok());
    }

    /// Ends a job: sends its last events as one batch, and removes it from the registry if
    /// `auto_dismiss` is set.
    pub fn conclude(&mut self, serial: u64, outcome: Outcome) {
        let job = self.job(serial);
        let started = job.status != Status::Created;
        let mut events = Vec::new();
        let at = job.ending.take().map_or_else(SystemTime::now, |(_, at)| at);
        job.end(outcome, at);
        if job.error.is_some() {
            events.push(job.transition(Status::Aborting));
        }
        if started {
            let progress = job.progress();
            events.push(match job.cancelled {
                true => JobEvent::Cancelled { progress },
                false => JobEvent::Completed { progress, error: job.error.clone() },
            });
        }
        events.push(job.transition(Status::Concluded));
        let (info, kept, dismiss) = (job.info(), KeptJob::of(job), job.spec.auto_dismiss);
        self.completed.count(info.error.as_ref(), info.cancelled);
        (self.last, self.last_kept) = (Some(info), kept);
        if dismiss {
            events.push(self.remove(serial));
        }
        self.emit(events);
    }

    /// Returns the jobs for the process that continues them if this one is killed. A job that is
    /// about to conclude is among them as one that has.
    pub fn kept(&self) -> KeptJobs {
        let mut kept = KeptJobs {
            jobs: Vec::new(),
            last: self.last_kept.clone(),
            completed: self.completed,
            left_out: false,
        };
        for job in &self.jobs {
            let Some((outcome, at)) = &job.ending else {
                kept.jobs.extend(KeptJob::of(job));
                continue;
            };
            let mut ended = job.clone();
            ended.end(outcome.clone(), *at);
            ended.status = Status::Concluded;
            kept.completed.count(ended.error.as_ref(), ended.cancelled);
            kept.last = KeptJob::of(&ended);
            kept.jobs.extend(kept.last.clone().filter(|_| !ended.spec.auto_dismiss));
        }
        kept
    }

    /// Removes a job, and returns the event that reports the removal.
    pub fn remove(&mut self, serial: u64) -> JobEvent {
        let event = self.job(serial).transition(Status::Null);
        self.jobs.retain(|job| job.serial != serial);
        event
    }
}

impl Completed {
    /// Counts a job that has ended with this error.
    fn count(&mut self, error: Option<&String>, cancelled: bool) {
        *match (error, cancelled) {
            (None, _) => &mut self.successful,
            (Some(_), true) => &mut self.cancelled,
            (Some(_), false) => &mut self.failed,
        } += 1;
    }
}

impl Job {
    /// Returns the time left until `until`; `None` if there is none, or if the job has a speed.
    pub fn rest_until(&self, until: Option<Instant>) -> Option<Duration> {
        let left = until?.saturating_duration_since(Instant::now());
        (self.spec.speed == 0 && !left.is_zero()).then_some(left)
    }

    pub fn new(serial: u64, spec: JobSpec) -> Self {
        let limit = RateLimit::new(spec.speed);
        Job {
            serial,
            spec,
            recipe: String::new(),
            status: Status::Created,
            offset: 0,
            shown: 0,
            limit,
            user_paused: false,
            cancelled: false,
            abandoned: false,
            parked: false,
            kicked: false,
            is_done: false,
            finalize: false,
            finalizing: false,
            ending: None,
            io_status: IoStatus::Ok,
            error: None,
            detail: None,
            work: Work::default(),
            rate_estimate: RateEstimate::default(),
            forecast: None,
            created: SystemTime::now(),
            concluded: None,
        }
    }

    /// Changes the status. Asserts that the table allows the change.
    pub fn transition(&mut self, next: Status) -> JobEvent {
        assert!(self.status.may_become(next), "job {}: {} -> {next}", self.spec.id, self.status);
        self.status = next;
        JobEvent::StatusChange { id: self.spec.id.clone(), status: next }
    }

    /// Checks whether the status allows `verb`.
    pub fn check(&self, verb: Verb) -> Result<(), JobError> {
        match self.status.accepts(verb) {
            true => Ok(()),
            false => {
                Err(JobError::VerbRefused { id: self.spec.id.clone(), status: self.status, verb })
            }
        }
    }

    /// Cancels the job, paused or not, unless its result is already taking effect.
    pub fn cancel(&mut self) -> Option<JobEvent> {
        if self.finalizing {
            return None;
        }
        self.cancelled = true;
        if self.user_paused { self.unpause() } else { None }
    }

    /// Changes the status to paused if a pause was requested and the worker has stopped.
    pub fn settle_pause(&mut self) -> Option<JobEvent> {
        match self.status {
            Status::Running if self.user_paused && self.parked => {
                Some(self.transition(Status::Paused))
            }
            Status::Ready if self.user_paused && self.parked => {
                Some(self.transition(Status::Standby))
            }
            _ => None,
        }
    }

    /// Stores the result of the worker, which has taken effect at this time.
    fn end(&mut self, outcome: Outcome, at: SystemTime) {
        match outcome {
            Outcome::Done => self.cancelled = false,
            Outcome::Cancelled => {
                self.cancelled = true;
                self.error = Some(CANCELED.into());
            }
            Outcome::Failed(failure) => {
                // The offset of a failure is that of the chunk that has failed.
                self.shown = 0;
                self.fails(&failure);
                self.error = Some(failure.text);
            }
        }
        self.concluded = Some(at);
    }

    /// Stores the detail of an error.
    pub fn fails(&mut self, failure: &Failure) {
        self.detail = Some(failure.detail.clone()).filter(|detail| !detail.is_empty());
    }

    /// Ends a pause.
    pub fn unpause(&mut self) -> Option<JobEvent> {
        self.user_paused = false;
        self.detail = None;
        self.io_status = IoStatus::Ok;
        match self.status {
            Status::Paused => Some(self.transition(Status::Running)),
            Status::Standby => Some(self.transition(Status::Ready)),
            _ => None,
        }
    }

    pub fn progress(&self) -> Progress {
        let JobSpec { id, kind, len, speed, .. } = &self.spec;
        let offset = self.offset.max(self.shown);
        Progress { id: id.clone(), kind, len: *len, offset, speed: *speed }
    }

    /// Returns the number of bytes that were read.
    pub fn moved(&self) -> u64 {
        self.work.copied + self.work.zeroed
    }

    pub fn info(&self) -> JobInfo {
        let now = Instant::now();
        let left = self.forecast.as_ref().map(|forecast| forecast.left(self.offset));
        JobInfo {
            progress: self.progress(),
            status: self.status,
            busy: matches!(self.status, Status::Running | Status::Ready) && !self.parked,
            paused: self.user_paused,
            io_status: self.io_status,
            auto_finalize: self.spec.auto_finalize,
            auto_dismiss: self.spec.auto_dismiss,
            cancelled: self.cancelled,
            error: self.error.clone(),
            error_detail: self.detail.clone(),
            request: self.spec.request.clone(),
            work: self.work,
            created: self.created,
            concluded: self.concluded,
            rate: self.rate_estimate.rate(now, self.moved()),
            left,
            remaining: left.and_then(|left| self.rate_estimate.remaining(now, self.moved(), left)),
        }
    }
}
