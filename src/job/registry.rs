//! What the registry holds of its jobs. Every change of a status is made here, under the one lock, and asserted against the tables.

use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use crossbeam_channel::Sender;

use super::pace::Pace;
use super::rate_limit::RateLimit;
use super::{Batch, Completed, Failure, Forecast, IoStatus, JobError, JobEvent, JobInfo, JobSpec, Outcome, Progress, Status, Verb, Work};

/// The text of a cancelled job's error: strerror(ECANCELED) as QEMU prints it.
const CANCELED: &str = "Operation canceled";

/// Everything behind the lock.
#[derive(Debug, Default)]
pub(super) struct Registry {
    /// Newest first.
    pub jobs: Vec<Job>,
    /// Counts jobs, to tell two of the same name apart.
    pub created: u64,
    /// While it is not 0, no job with something to do passes a checkpoint.
    pub holds: usize,
    /// No new jobs: the process is about to end.
    pub closed: bool,
    /// What became of the job that concluded last.
    pub last: Option<JobInfo>,
    /// What became of all of them.
    pub completed: Completed,
    subscribers: Vec<Sender<Arc<Batch>>>,
}

/// One job.
#[derive(Debug)]
pub(super) struct Job {
    pub serial: u64,
    pub spec: JobSpec,
    pub status: Status,
    pub offset: u64,
    pub limit: RateLimit,
    /// A user, or an error that stops, has paused it.
    pub user_paused: bool,
    /// To be given up.
    pub cancelled: bool,
    /// To be given up, because the process ends and for no other reason.
    pub abandoned: bool,
    /// Its worker waits inside a checkpoint, and looks again at everything here before it leaves.
    pub parked: bool,
    /// Sleep no longer than the limiter, asked again, says.
    pub kicked: bool,
    /// A user has given the order to finalize.
    pub finalize: bool,
    /// The result is taking effect: a cancel comes too late.
    pub finalizing: bool,
    pub io_status: IoStatus,
    pub error: Option<String>,
    /// Of the error that was met last.
    pub detail: Option<String>,
    pub work: Work,
    pub pace: Pace,
    pub forecast: Option<Forecast>,
    pub created: SystemTime,
    pub concluded: Option<SystemTime>,
}

impl Registry {
    /// The job of `serial`. It must be there: a job leaves the registry with or after its worker.
    pub fn job(&mut self, serial: u64) -> &mut Job {
        let found = self.jobs.iter_mut().find(|job| job.serial == serial);
        found.expect("a job lives as long as its worker")
    }

    /// The job named `id`.
    pub fn find(&mut self, id: &str) -> Option<&mut Job> {
        self.jobs.iter_mut().find(|job| job.spec.id == id)
    }

    /// Whether a job has a worker.
    pub fn has_workers(&self) -> bool {
        self.jobs.iter().any(|job| job.status != Status::Concluded)
    }

    pub fn subscribe(&mut self, subscriber: Sender<Arc<Batch>>) {
        self.subscribers.push(subscriber);
    }

    /// Tells all subscribers, at once. Their channels are unbounded: nobody waits for them.
    pub fn emit(&mut self, events: Vec<JobEvent>) {
        if events.is_empty() {
            return;
        }
        let batch = Arc::new(Batch { at: SystemTime::now(), events });
        self.subscribers.retain(|subscriber| subscriber.send(Arc::clone(&batch)).is_ok());
    }

    /// The end of a job's worker: its last events as one batch, and its place in the registry free again unless a user wants to look first.
    pub fn conclude(&mut self, serial: u64, outcome: Outcome) {
        let job = self.job(serial);
        let started = job.status != Status::Created;
        let mut events = Vec::new();
        match outcome {
            Outcome::Done => job.cancelled = false,
            Outcome::Cancelled => {
                job.cancelled = true;
                job.error = Some(CANCELED.into());
            }
            Outcome::Failed(failure) => {
                job.fails(&failure);
                job.error = Some(failure.text);
            }
        }
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
        job.concluded = Some(SystemTime::now());
        let (info, dismiss) = (job.info(), job.spec.auto_dismiss);
        *match (&info.error, info.cancelled) {
            (None, _) => &mut self.completed.successful,
            (Some(_), true) => &mut self.completed.cancelled,
            (Some(_), false) => &mut self.completed.failed,
        } += 1;
        self.last = Some(info);
        if dismiss {
            events.push(self.remove(serial));
        }
        self.emit(events);
    }

    /// Takes a job out; the event says so.
    pub fn remove(&mut self, serial: u64) -> JobEvent {
        let event = self.job(serial).transition(Status::Null);
        self.jobs.retain(|job| job.serial != serial);
        event
    }
}

impl Job {
    /// How much of a rest is left. A job with a speed has none.
    pub fn rest_until(&self, until: Option<Instant>) -> Option<Duration> {
        let left = until?.saturating_duration_since(Instant::now());
        (self.spec.speed == 0 && !left.is_zero()).then_some(left)
    }

    pub fn new(serial: u64, spec: JobSpec) -> Self {
        let limit = RateLimit::new(spec.speed);
        Job {
            serial,
            spec,
            status: Status::Created,
            offset: 0,
            limit,
            user_paused: false,
            cancelled: false,
            abandoned: false,
            parked: false,
            kicked: false,
            finalize: false,
            finalizing: false,
            io_status: IoStatus::Ok,
            error: None,
            detail: None,
            work: Work::default(),
            pace: Pace::default(),
            forecast: None,
            created: SystemTime::now(),
            concluded: None,
        }
    }

    /// Moves on along the table.
    pub fn transition(&mut self, next: Status) -> JobEvent {
        assert!(self.status.may_become(next), "job {}: {} -> {next}", self.spec.id, self.status);
        self.status = next;
        JobEvent::StatusChange { id: self.spec.id.clone(), status: next }
    }

    /// Whether its status allows `verb`.
    pub fn check(&self, verb: Verb) -> Result<(), JobError> {
        match self.status.accepts(verb) {
            true => Ok(()),
            false => Err(JobError::VerbRefused { id: self.spec.id.clone(), status: self.status, verb }),
        }
    }

    /// To be given up, paused or not, unless that comes too late.
    pub fn cancel(&mut self) -> Option<JobEvent> {
        if self.finalizing {
            return None;
        }
        self.cancelled = true;
        if self.user_paused { self.unpause() } else { None }
    }

    /// Shows that the worker has stopped, where it has and somebody wants it to.
    pub fn settle_pause(&mut self) -> Option<JobEvent> {
        match self.status {
            Status::Running if self.user_paused && self.parked => Some(self.transition(Status::Paused)),
            Status::Ready if self.user_paused && self.parked => Some(self.transition(Status::Standby)),
            _ => None,
        }
    }

    /// Keeps what is to be said of an error.
    pub fn fails(&mut self, failure: &Failure) {
        self.detail = Some(failure.detail.clone()).filter(|detail| !detail.is_empty());
    }

    /// Undoes a pause.
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
        Progress { id: id.clone(), kind, len: *len, offset: self.offset, speed: *speed }
    }

    /// Bytes that were read.
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
            rate: self.pace.rate(now, self.moved()),
            left,
            remaining: left.and_then(|left| self.pace.remaining(now, self.moved(), left)),
        }
    }
}
