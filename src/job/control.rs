//! The worker's side of a job.

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::{Ending, ErrorAction, Failure, Forecast, IoStatus, JobEvent, Next, OnError, Outcome, Shared, Status, Work};

/// The handle by which the thread that works on a job obeys its users and tells of its progress. Dropped without [`Control::finish`], it fails
/// the job; dropped before [`Control::start`], it takes the job back.
#[derive(Debug)]
pub struct Control {
    shared: Arc<Shared>,
    serial: u64,
    id: String,
    finished: bool,
}

impl Control {
    pub(super) fn new(shared: Arc<Shared>, serial: u64, id: String) -> Self {
        Control { shared, serial, id, finished: false }
    }

    /// The job's name.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// The work begins.
    ///
    /// # Panics
    /// On the second call.
    pub fn start(&self) {
        let mut registry = self.shared.registry.lock();
        let job = registry.job(self.serial);
        job.pace.note(Instant::now(), 0);
        let event = job.transition(Status::Running);
        registry.emit(vec![event]);
    }

    /// To be called before every chunk: blocks while the job is paused, held ([`super::Jobs::hold`]) or faster than its speed; a change of any of them,
    /// and a cancel, end the wait at once. After [`Next::Cancel`] the worker cleans up and calls [`Control::finish`].
    pub fn checkpoint(&self) -> Next {
        self.wait(None)
    }

    /// A checkpoint that waits for `rest` in any case, where the job has no limit: one with a speed has its pace by that alone.
    pub fn rest(&self, rest: Duration) -> Next {
        self.wait(Some(Instant::now() + rest))
    }

    /// Whether the job has no limit at present.
    pub fn is_unlimited(&self) -> bool {
        self.shared.registry.lock().job(self.serial).spec.speed == 0
    }

    /// Whether a user has paused the job, which obeys at its next checkpoint.
    pub fn is_paused(&self) -> bool {
        self.shared.registry.lock().job(self.serial).user_paused
    }

    fn wait(&self, not_before: Option<Instant>) -> Next {
        let mut registry = self.shared.registry.lock();
        loop {
            let held = registry.holds > 0;
            let job = registry.job(self.serial);
            if job.cancelled {
                job.parked = false;
                return Next::Cancel;
            }
            job.kicked = false;
            let delay = match job.user_paused || held && job.spec.len > 0 {
                true => None,
                false => match job.limit.delay(Instant::now()).or_else(|| job.rest_until(not_before)) {
                    Some(delay) => Some(delay),
                    None => {
                        job.parked = false;
                        return Next::Continue;
                    }
                },
            };
            job.parked = true;
            if let Some(event) = job.settle_pause() {
                registry.emit(vec![event]);
            }
            let wake_up = delay.map(|delay| Instant::now() + delay);
            // Other jobs' changes wake this one too. A speed that was lowered takes effect after this sleep, as in QEMU.
            loop {
                let timed_out = match wake_up {
                    Some(wake_up) => self.shared.changed.wait_until(&mut registry, wake_up).timed_out(),
                    None => {
                        self.shared.changed.wait(&mut registry);
                        true
                    }
                };
                let job = registry.job(self.serial);
                if timed_out || job.cancelled || job.user_paused || job.kicked {
                    break;
                }
            }
        }
    }

    /// `scanned` more bytes are dealt with, and this is what was done. Only what was read counts against the speed.
    pub fn advance(&self, scanned: u64, work: Work) {
        let mut registry = self.shared.registry.lock();
        let job = registry.job(self.serial);
        job.offset = job.offset.saturating_add(scanned).min(job.spec.len);
        let Work { copied, zeroed, failed } = work;
        job.work.copied += copied;
        job.work.zeroed += zeroed;
        job.work.failed += failed;
        let now = Instant::now();
        job.pace.note(now, job.moved());
        if copied + zeroed > 0 {
            job.limit.charge(copied + zeroed, now);
        }
    }

    /// How much is still to be read, beyond any place: what the time that is left is told by.
    pub fn forecast(&self, forecast: Forecast) {
        self.shared.registry.lock().job(self.serial).forecast = Some(forecast);
    }

    /// A chunk failed: says, by the job's policy, what to do. After [`ErrorAction::Stop`] the worker goes back to its checkpoint, which blocks until a user
    /// resumes the job, and tries the same chunk again; after [`ErrorAction::Ignore`] it goes on with the next one, and fails the job at the end;
    /// after [`ErrorAction::Report`] it fails the job now.
    pub fn error(&self, failure: &Failure) -> ErrorAction {
        let mut registry = self.shared.registry.lock();
        let job = registry.job(self.serial);
        job.fails(failure);
        let action = match job.spec.on_error {
            OnError::Report => ErrorAction::Report,
            OnError::Ignore => ErrorAction::Ignore,
            OnError::Stop => ErrorAction::Stop,
            OnError::Enospc | OnError::Auto if failure.no_space => ErrorAction::Stop,
            OnError::Enospc | OnError::Auto => ErrorAction::Report,
        };
        if action == ErrorAction::Stop {
            job.user_paused = true;
            if job.io_status == IoStatus::Ok {
                job.io_status = if failure.no_space { IoStatus::NoSpace } else { IoStatus::Failed };
            }
        }
        registry.emit(vec![JobEvent::Error { id: self.id.clone(), action }]);
        action
    }

    /// The work is over. `prepare` makes a success take effect: it runs without any lock, only for [`Outcome::Done`], after the order to finalize where
    /// that is a user's, and its failure is the job's. A job that was cancelled before the work was over is cancelled, whatever `outcome` says; from
    /// then on a cancel comes too late, except while a job waits for the order to finalize.
    pub fn finish(self, outcome: Outcome, prepare: impl FnOnce() -> Result<(), Failure>) {
        self.finish_noting(outcome, prepare, |_| {});
    }

    /// As [`Control::finish`]; `ended` learns how, after the result has taken effect and before anybody else does, without any lock.
    pub fn finish_noting(mut self, outcome: Outcome, prepare: impl FnOnce() -> Result<(), Failure>, ended: impl FnOnce(Ending)) {
        let outcome = match outcome {
            Outcome::Done => self.complete(prepare),
            other => other,
        };
        let abandoned = self.shared.registry.lock().job(self.serial).abandoned;
        ended(match outcome {
            Outcome::Done => Ending::Completed,
            _ if abandoned => Ending::Abandoned,
            Outcome::Cancelled => Ending::Cancelled,
            Outcome::Failed(_) => Ending::Failed,
        });
        self.conclude(outcome);
    }

    fn complete(&self, prepare: impl FnOnce() -> Result<(), Failure>) -> Outcome {
        let mut registry = self.shared.registry.lock();
        let job = registry.job(self.serial);
        if job.cancelled {
            return Outcome::Cancelled;
        }
        job.offset = job.spec.len;
        job.user_paused = false;
        let mut events = vec![job.transition(Status::Waiting), job.transition(Status::Pending)];
        let automatic = job.spec.auto_finalize;
        if !automatic {
            events.push(JobEvent::Pending { id: self.id.clone(), kind: job.spec.kind });
        }
        job.finalize = automatic;
        registry.emit(events);
        loop {
            let job = registry.job(self.serial);
            if job.finalize {
                job.finalizing = true;
                break;
            }
            if job.cancelled {
                return Outcome::Cancelled;
            }
            self.shared.changed.wait(&mut registry);
        }
        drop(registry);
        match prepare() {
            Ok(()) => Outcome::Done,
            Err(failure) => Outcome::Failed(failure),
        }
    }

    fn conclude(&mut self, outcome: Outcome) {
        self.finished = true;
        self.shared.registry.lock().conclude(self.serial, outcome);
        self.shared.changed.notify_all();
    }
}

impl Drop for Control {
    fn drop(&mut self) {
        if self.finished {
            return;
        }
        let mut registry = self.shared.registry.lock();
        if registry.job(self.serial).status == Status::Created {
            let event = registry.remove(self.serial);
            registry.emit(vec![event]);
            self.shared.changed.notify_all();
            return;
        }
        drop(registry);
        log::error!("job {}: its worker ended without a result", self.id);
        self.conclude(Outcome::Failed(Failure { text: "the job's worker ended without a result".into(), ..Failure::default() }));
    }
}
