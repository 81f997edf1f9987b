//! A thread that reports the state of the disk to the service manager, and reports that the disk is
//! alive as long as requests are answered.
//!
//! A disk is alive under three conditions. Its threads answer the requests that the kernel sends
//! them ([`Pulse`]; over io_uring one request from each CPU). It answers a read of its first sector
//! from the overlay, or reports that the read would have to wait ([`Disk::probe`], which takes the
//! locks and looks at the tables). Its metadata is committed ([`CommitAge`]). So the messages end
//! on a deadlock, or if fdatasync(2) of the host file system never returns, and the manager does
//! what it is configured to do. A backing file that hangs does not end the messages: requests for
//! local data do not wait for it, and a restart would not help requests that do.
//!
//! **Touches:** the disk by one method that never waits for a backing file; the session by one
//! method whose wait is bounded by an argument; the progress of jobs. **Never:** decides anything
//! else.
//! **Locks:** none of its own.

use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, RecvTimeoutError, Sender, bounded};

use super::notify::Manager;
use crate::map::units;
use engine::disk::{COMMIT_INTERVAL, CommitAge, Disk};
use engine::job::{JobInfo, Jobs, Status};
use export::Pulse;

/// Shortest time between two reports of the progress of a job.
const STATUS_INTERVAL: Duration = Duration::from_secs(3);

/// The additional time that each request for more time asks for while the disk is being closed.
const EXTENSION: Duration = Duration::from_secs(60);
/// The time between two such requests.
const EXTENSION_INTERVAL: Duration = Duration::from_secs(10);
/// How long the thread keeps asking for more time. A close that takes longer makes no progress.
const EXTENSIONS_END: Duration = Duration::from_secs(900);

/// Tells whether a disk that has just answered is alive for a watchdog of `interval`. `commit_age`
/// is the time since its last commit ended. A pass shorter than half of the interval never ends the
/// messages. A pass longer than one and a half intervals, plus the interval of commits, always
/// makes the watchdog expire.
fn is_alive(commit_age: Duration, interval: Duration) -> bool {
    commit_age <= interval / 2 + COMMIT_INTERVAL
}

/// The next phase of the thread.
#[derive(Debug)]
enum Phase {
    /// The disk is mounted; the text says which disk and where.
    Serving(String, Pulse),
    /// The disk is about to be closed.
    Stopping,
}

/// Reports to the manager until it is dropped.
#[derive(Debug)]
pub(super) struct Reporter {
    manager: Arc<Manager>,
    phase: Sender<Phase>,
}

impl Reporter {
    /// Starts the thread, which sends nothing before [`Reporter::ready`].
    pub(super) fn start(
        manager: Manager,
        disk: &Arc<Disk>,
        jobs: Jobs,
        commit_age: CommitAge,
    ) -> Reporter {
        let manager = Arc::new(manager);
        // The capacity covers all messages that are ever sent. So no sender waits for the thread,
        // which may hang with the disk.
        let (sender, phase) = bounded(2);
        let teller =
            Teller { manager: Arc::clone(&manager), disk: Arc::clone(disk), jobs, commit_age };
        let body = move || {
            if let Ok(Phase::Serving(serving, pulse)) = phase.recv() {
                teller.serve(&serving, &pulse, &phase);
            }
        };
        if let Err(error) = thread::Builder::new().name("watchdog".to_string()).spawn(body) {
            log::error!("starting the watchdog: {error}; the service manager hears nothing of it");
        }
        Reporter { manager, phase: sender }
    }

    /// Reports that the disk is mounted. `serving` names the disk and the mountpoint; `pulse` tells
    /// whether its requests are answered.
    pub(super) fn ready(&self, serving: String, pulse: Pulse) {
        self.manager.tell(&["READY=1", &format!("STATUS={serving}")]);
        self.enter(Phase::Serving(serving, pulse));
    }

    /// Reports that the disk is unmounted and about to be closed, which may take a while.
    pub(super) fn stopping(&self) {
        self.manager.tell(&["STOPPING=1", "STATUS=closing"]);
        self.enter(Phase::Stopping);
    }

    fn enter(&self, phase: Phase) {
        // If the thread could not be started, the channel has no receiver and the message is
        // dropped.
        let _ = self.phase.try_send(phase);
    }
}

/// The state of the thread.
struct Teller {
    manager: Arc<Manager>,
    disk: Arc<Disk>,
    jobs: Jobs,
    commit_age: CommitAge,
}

impl Teller {
    fn serve(&self, serving: &str, pulse: &Pulse, phase: &Receiver<Phase>) {
        let interval = self.manager.watchdog;
        let tick = interval.map_or(STATUS_INTERVAL, |interval| (interval / 2).min(STATUS_INTERVAL));
        let mut told = (serving.to_string(), Instant::now());
        loop {
            if let Some(interval) = interval
                && self.is_alive(interval, pulse)
            {
                self.manager.tell(&["WATCHDOG=1"]);
            }
            let status = self.status(serving);
            if status != told.0 && told.1.elapsed() >= STATUS_INTERVAL {
                self.manager.tell(&[&format!("STATUS={status}")]);
                told = (status, Instant::now());
            }
            match phase.recv_timeout(tick) {
                Err(RecvTimeoutError::Timeout) | Ok(Phase::Serving(..)) => {}
                Ok(Phase::Stopping) => return self.close(phase),
                Err(RecvTimeoutError::Disconnected) => return,
            }
        }
    }

    fn is_alive(&self, interval: Duration, pulse: &Pulse) -> bool {
        // The pulse is a request that the kernel sends to the serving threads, and its reply.
        let patience = interval / 2 + COMMIT_INTERVAL;
        if !pulse.is_felt(patience) {
            log::error!("requests of the kernel are not answered within {patience:?}");
            return false;
        }
        // The result does not matter: an unreadable sector is not a deadlock.
        let _ = self.disk.probe();
        is_alive(self.commit_age.age(), interval)
    }

    fn status(&self, serving: &str) -> String {
        let job = self.jobs.query().into_iter().next().or_else(|| self.jobs.last());
        let failed = (!self.disk.is_usable())
            .then(|| "writing has failed for good: see the log, and unmount".to_string());
        [Some(serving.to_string()), job.and_then(|job| in_words(&job)), failed]
            .into_iter()
            .flatten()
            .collect::<Vec<_>>()
            .join("; ")
    }

    /// Asks the manager for more time until the process ends, for at most [`EXTENSIONS_END`].
    fn close(&self, phase: &Receiver<Phase>) {
        let begin = Instant::now();
        let more = format!("EXTEND_TIMEOUT_USEC={}", EXTENSION.as_micros());
        let watchdog = self.manager.watchdog.map(|_| "WATCHDOG=1");
        let tick = self
            .manager
            .watchdog
            .map_or(EXTENSION_INTERVAL, |interval| (interval / 2).min(EXTENSION_INTERVAL));
        while begin.elapsed() < EXTENSIONS_END {
            let lines: Vec<&str> = [Some(more.as_str()), watchdog].into_iter().flatten().collect();
            self.manager.tell(&lines);
            if matches!(phase.recv_timeout(tick), Err(RecvTimeoutError::Disconnected)) {
                return;
            }
        }
    }
}

/// Describes a job in a few words; returns `None` for a cancelled one.
fn in_words(job: &JobInfo) -> Option<String> {
    let progress = &job.progress;
    let percent = units::whole_percent(progress.offset, progress.len);
    match (job.status, &job.error) {
        _ if job.cancelled => None,
        (_, Some(error)) => Some(format!("{} failed: {error}", progress.kind)),
        (Status::Concluded | Status::Null, None) => Some(format!("{} completed", progress.kind)),
        (Status::Paused | Status::Standby, None) => {
            Some(format!("{} paused at {percent} %", progress.kind))
        }
        (_, None) => Some(format!("{}ing: {percent} %, {}", progress.kind, units::rate(job.rate))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use engine::job::{JobSpec, OnError};

    #[test]
    fn a_commit_that_does_not_end_is_no_life() {
        let interval = Duration::from_secs(30);
        for (seconds, alive) in [(0, true), (15, true), (16, true), (17, false), (3600, false)] {
            assert_eq!(is_alive(Duration::from_secs(seconds), interval), alive, "{seconds}");
        }
        // A short interval is extended by the interval of the commit timer.
        assert!(is_alive(Duration::from_millis(1100), Duration::from_millis(400)));
        assert!(!is_alive(Duration::from_millis(1300), Duration::from_millis(400)));
    }

    #[test]
    fn jobs_in_words() {
        let jobs = Jobs::new();
        let spec = JobSpec {
            id: "drive0".to_string(),
            kind: "stream",
            len: 200,
            speed: 0,
            auto_finalize: true,
            auto_dismiss: true,
            on_error: OnError::Report,
            request: String::new(),
        };
        let control = jobs.create(spec).unwrap();
        let mut job = jobs.query().remove(0);
        drop(control);
        job.progress.offset = 84;
        (job.status, job.rate, job.error) = (Status::Running, 120 << 20, None);
        assert_eq!(in_words(&job).unwrap(), "streaming: 42 %, 120 MiB/s");
        job.status = Status::Paused;
        assert_eq!(in_words(&job).unwrap(), "stream paused at 42 %");
        job.status = Status::Concluded;
        assert_eq!(in_words(&job).unwrap(), "stream completed");
        job.error = Some("no space".to_string());
        assert_eq!(in_words(&job).unwrap(), "stream failed: no space");
        job.cancelled = true;
        assert_eq!(in_words(&job), None);
    }
}
