//! The worker's side of a job.

use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use parking_lot::MutexGuard;

use super::{
    ErrorAction, Failure, Forecast, IoStatus, JobEnding, JobEvent, JobsShared, Next, OnError,
    Outcome, Status, Work,
};

/// Handle of the worker's thread: it obeys users and reports progress through it. Dropping it
/// without [`Control::finish`] fails the job. Dropping it before [`Control::start`] removes the
/// job.
#[derive(Debug)]
pub struct Control {
    shared: Arc<JobsShared>,
    serial: u64,
    id: String,
    finished: bool,
}

impl Control {
    pub(super) fn new(shared: Arc<JobsShared>, serial: u64, id: String) -> Self {
        Control { shared, serial, id, finished: false }
    }

    /// Returns the id of the job.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// Marks the job as running.
    ///
    /// # Panics
    /// On the second call.
    pub fn start(&self) {
        let mut registry = self.shared.registry.lock();
        let job = registry.job(self.serial);
        job.rate_estimate.note(Instant::now(), 0);
        let event = job.transition(Status::Running);
        registry.emit(vec![event]);
        drop(registry);
        self.shared.keep();
    }

    /// Stores what a worker of this kind needs to continue the job in another process, as text
    /// (`job/kept.rs`). The registry does not read it.
    pub fn set_recipe(&self, recipe: String) {
        self.shared.registry.lock().job(self.serial).recipe = recipe;
    }

    /// Waits while the job is paused, held ([`super::Jobs::hold`]) or ahead of its rate limit. To
    /// be called before each chunk. A change of any of these ends the wait at once, except a lower
    /// speed; so does a cancel. After [`Next::Cancel`] the worker has to clean up and to call
    /// [`Control::finish`].
    ///
    /// Calls `before_pause` once, without the lock of the registry, before the first wait
    /// for a pause.
    pub fn checkpoint(&self, before_pause: impl Fn()) -> Next {
        self.wait(None, before_pause)
    }

    /// Runs a checkpoint that waits at least for `rest`, unless the job has a rate limit: the limit
    /// alone then sets its pace.
    pub fn rest(&self, rest: Duration, before_pause: impl Fn()) -> Next {
        self.wait(Some(Instant::now() + rest), before_pause)
    }

    /// The job's rate limit at present, in bytes per second; 0 is unlimited.
    pub(crate) fn speed(&self) -> u64 {
        self.shared.registry.lock().job(self.serial).spec.speed
    }

    /// Whether the job has no rate limit at present.
    pub(crate) fn is_unlimited(&self) -> bool {
        self.speed() == 0
    }

    /// Whether a user or an error has requested a pause, which the worker obeys at its next
    /// checkpoint.
    pub fn is_paused(&self) -> bool {
        self.shared.registry.lock().job(self.serial).user_paused
    }

    fn wait(&self, not_before: Option<Instant>, before_pause: impl Fn()) -> Next {
        let mut registry = self.shared.registry.lock();
        let mut knows_of_pause = false;
        loop {
            let held = registry.holds > 0;
            let job = registry.job(self.serial);
            if job.cancelled {
                job.parked = false;
                return Next::Cancel;
            }
            if job.user_paused && !knows_of_pause {
                // The worker does nothing before this wait ends, so once is enough.
                knows_of_pause = true;
                MutexGuard::unlocked(&mut registry, &before_pause);
                continue;
            }
            job.kicked = false;
            let delay = match job.user_paused || held && job.spec.len > 0 {
                true => None,
                false => {
                    match job.limit.delay(Instant::now()).or_else(|| job.rest_until(not_before)) {
                        Some(delay) => Some(delay),
                        None => {
                            job.parked = false;
                            return Next::Continue;
                        }
                    }
                }
            };
            job.parked = true;
            if let Some(event) = job.settle_pause() {
                registry.emit(vec![event]);
            }
            let wake_up = delay.map(|delay| Instant::now() + delay);
            // Changes of other jobs wake this thread too. A lower speed takes effect only after
            // this sleep, as in QEMU.
            loop {
                let timed_out = match wake_up {
                    Some(wake_up) => {
                        self.shared.changed.wait_until(&mut registry, wake_up).timed_out()
                    }
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

    /// Advances the job by `scanned` bytes, with their results in `work`. Only bytes that were read
    /// count against the rate limit.
    pub fn advance(&self, scanned: u64, work: Work) {
        let mut registry = self.shared.registry.lock();
        let job = registry.job(self.serial);
        job.offset = job.offset.saturating_add(scanned).min(job.spec.len);
        let Work { copied, zeroed, failed } = work;
        job.work.copied += copied;
        job.work.zeroed += zeroed;
        job.work.failed += failed;
        let now = Instant::now();
        job.rate_estimate.note(now, job.moved());
        if copied + zeroed > 0 {
            job.limit.charge(copied + zeroed, now);
        }
    }

    /// Sets the forecast of the bytes that are left to read, from which the remaining time is
    /// estimated.
    pub(crate) fn forecast(&self, forecast: Forecast) {
        self.shared.registry.lock().job(self.serial).forecast = Some(forecast);
    }

    /// Records the failure of a chunk and returns the action that the policy demands. After
    /// [`ErrorAction::Stop`] the worker returns to its checkpoint, which blocks until a user
    /// resumes the job, and then tries the same chunk again. After [`ErrorAction::Ignore`] it goes
    /// on with the next chunk and fails the job at the end. After [`ErrorAction::Report`] it fails
    /// the job now.
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
        drop(registry);
        self.shared.keep();
        action
    }

    /// Ends the job. `prepare` makes a success take effect. It runs without any lock, only for
    /// [`Outcome::Done`], and after the finalize verb of a user if the job needs one; if it fails,
    /// the job fails. A job that was cancelled before this call counts as cancelled, whatever
    /// `outcome` is. After this call a cancel has an effect only while the job waits for that verb.
    pub fn finish(self, outcome: Outcome, prepare: impl FnOnce() -> Result<(), Failure>) {
        self.finish_noting(outcome, prepare, |_| {});
    }

    /// Ends the job as [`Control::finish`] does. Calls `ended` without any lock, after the result
    /// has taken effect and before the job's end becomes visible.
    pub(crate) fn finish_noting(
        mut self,
        outcome: Outcome,
        prepare: impl FnOnce() -> Result<(), Failure>,
        ended: impl FnOnce(JobEnding),
    ) {
        let outcome = match outcome {
            Outcome::Done => self.complete(prepare),
            other => other,
        };
        let abandoned = self.shared.registry.lock().job(self.serial).abandoned;
        ended(match outcome {
            Outcome::Done => JobEnding::Completed,
            _ if abandoned => JobEnding::Abandoned,
            Outcome::Cancelled => JobEnding::Cancelled,
            Outcome::Failed(_) => JobEnding::Failed,
        });
        // From here on the job counts as ended for the next process of this mount, and its end
        // becomes visible only then.
        self.shared.registry.lock().job(self.serial).ending =
            Some((outcome.clone(), SystemTime::now()));
        self.shared.keep();
        self.conclude(outcome);
    }

    fn complete(&self, prepare: impl FnOnce() -> Result<(), Failure>) -> Outcome {
        let mut registry = self.shared.registry.lock();
        let job = registry.job(self.serial);
        if job.cancelled {
            return Outcome::Cancelled;
        }
        let automatic = job.spec.auto_finalize;
        (job.offset, job.is_done) = (job.spec.len, true);
        // A job that waits is kept as pending before it is reported as such. One that does not wait
        // is kept when it has ended: a process that continues it before has nothing left to copy.
        if !automatic {
            drop(registry);
            self.shared.keep();
            registry = self.shared.registry.lock();
        }
        let job = registry.job(self.serial);
        if job.cancelled {
            return Outcome::Cancelled;
        }
        job.user_paused = false;
        job.finalize |= automatic;
        // A job that another process has left pending was reported as such.
        if job.status != Status::Pending {
            let mut events = vec![job.transition(Status::Waiting), job.transition(Status::Pending)];
            if !automatic {
                events.push(JobEvent::Pending { id: self.id.clone(), kind: job.spec.kind });
            }
            registry.emit(events);
        }
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
        self.conclude(Outcome::Failed(Failure {
            text: "the job's worker ended without a result".into(),
            ..Failure::default()
        }));
    }
}
