//! A thread that tells the service manager what the disk does, and that it is alive: only as long as requests get through.
//!
//! Alive is a disk whose threads answer the requests that the kernel sends them ([`Pulse`]; over io_uring one from each CPU), that answers a read of its first sector from the overlay, or says that it would have to wait for something
//! ([`Disk::probe`]: it has been through the locks and the tables then), and whose metadata is committed ([`Heartbeat`]): so a deadlock and a host
//! file system that does not come back from fdatasync(2) end the messages, and the manager does what it is configured to. A backing file that hangs does not:
//! who reads what is local does not wait for it, and a restart would not help who does.
//!
//! **Touches:** the disk by one method that never waits for a backing file; the session by one that waits no longer than it is told; the jobs' progress. **Never:** decides anything else.
//! **Locks:** none of its own.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, RecvTimeoutError, Sender, bounded};

use super::COMMIT_INTERVAL;
use super::notify::Manager;
use crate::disk::Disk;
use crate::fuse::Pulse;
use crate::job::{JobInfo, Jobs, Status};
use crate::map::units;

/// How often the progress of a job is told, at most.
const STATUS_INTERVAL: Duration = Duration::from_secs(3);

/// While the disk is being closed the manager is asked for so much more time, again and again,
const EXTENSION: Duration = Duration::from_secs(60);
/// this often,
const EXTENSION_INTERVAL: Duration = Duration::from_secs(10);
/// for as long as this: a close that takes longer does not get anywhere.
const EXTENSIONS_END: Duration = Duration::from_secs(900);

/// When the commit timer has last finished a pass.
#[derive(Clone, Debug)]
pub(super) struct Heartbeat {
    start: Instant,
    /// Milliseconds after the start.
    last: Arc<AtomicU64>,
}

impl Heartbeat {
    /// One that beats now.
    pub(super) fn new() -> Heartbeat {
        Heartbeat { start: Instant::now(), last: Arc::new(AtomicU64::new(0)) }
    }

    /// A pass has ended, well or not.
    pub(super) fn beat(&self) {
        self.last.store(self.millis(), Ordering::Relaxed);
    }

    /// There will be no more, and nothing is to be concluded from that.
    pub(super) fn retire(&self) {
        self.last.store(u64::MAX, Ordering::Relaxed);
    }

    /// How long ago it was.
    fn age(&self) -> Duration {
        Duration::from_millis(self.millis().saturating_sub(self.last.load(Ordering::Relaxed)))
    }

    fn millis(&self) -> u64 {
        u64::try_from(self.start.elapsed().as_millis()).unwrap_or(u64::MAX)
    }
}

/// Whether a disk is alive that has just answered, and whose last commit ended so long ago, for a watchdog of this interval. A pass that takes less than
/// half of the interval is never held against it; one that takes longer than one and a half (and a commit's interval) always is.
fn is_alive(commit_age: Duration, interval: Duration) -> bool {
    commit_age <= interval / 2 + COMMIT_INTERVAL
}

/// What the thread is to do next.
#[derive(Debug)]
enum Phase {
    /// The disk is there, under this name.
    Serving(String, Pulse),
    /// It is about to be closed.
    Stopping,
}

/// Tells the manager until it is dropped.
#[derive(Debug)]
pub(super) struct Reporter {
    manager: Arc<Manager>,
    phase: Sender<Phase>,
}

impl Reporter {
    /// Starts the thread, which says nothing before [`Reporter::ready`].
    pub(super) fn start(manager: Manager, disk: &Arc<Disk>, jobs: Jobs, heartbeat: Heartbeat) -> Reporter {
        let manager = Arc::new(manager);
        // Room for all that is ever sent: nobody waits for the thread, which may hang with the disk.
        let (sender, phase) = bounded(2);
        let teller = Teller { manager: Arc::clone(&manager), disk: Arc::clone(disk), jobs, heartbeat };
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

    /// The disk is there. `serving` says which and where; `pulse`, whether its requests are answered.
    pub(super) fn ready(&self, serving: String, pulse: Pulse) {
        self.manager.tell(&["READY=1", &format!("STATUS={serving}")]);
        self.enter(Phase::Serving(serving, pulse));
    }

    /// The disk is not there any more; it is about to be closed, which may take a while.
    pub(super) fn stopping(&self) {
        self.manager.tell(&["STOPPING=1", "STATUS=closing"]);
        self.enter(Phase::Stopping);
    }

    fn enter(&self, phase: Phase) {
        // Without a thread there is nobody to hear it.
        let _ = self.phase.try_send(phase);
    }
}

/// The thread.
struct Teller {
    manager: Arc<Manager>,
    disk: Arc<Disk>,
    jobs: Jobs,
    heartbeat: Heartbeat,
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
        // A request that the kernel sends comes to the threads that serve, and back.
        let patience = interval / 2 + COMMIT_INTERVAL;
        if !pulse.is_felt(patience) {
            log::error!("requests of the kernel are not answered within {patience:?}");
            return false;
        }
        // What it says does not matter: a bad sector is no deadlock.
        let _ = self.disk.probe();
        is_alive(self.heartbeat.age(), interval)
    }

    fn status(&self, serving: &str) -> String {
        let job = self.jobs.query().into_iter().next().or_else(|| self.jobs.last());
        let failed = (!self.disk.is_usable()).then(|| "writing has failed for good: see the log, and unmount".to_string());
        [Some(serving.to_string()), job.and_then(|job| in_words(&job)), failed].into_iter().flatten().collect::<Vec<_>>().join("; ")
    }

    /// Until the process ends.
    fn close(&self, phase: &Receiver<Phase>) {
        let begin = Instant::now();
        let more = format!("EXTEND_TIMEOUT_USEC={}", EXTENSION.as_micros());
        let watchdog = self.manager.watchdog.map(|_| "WATCHDOG=1");
        let tick = self.manager.watchdog.map_or(EXTENSION_INTERVAL, |interval| (interval / 2).min(EXTENSION_INTERVAL));
        while begin.elapsed() < EXTENSIONS_END {
            let lines: Vec<&str> = [Some(more.as_str()), watchdog].into_iter().flatten().collect();
            self.manager.tell(&lines);
            if matches!(phase.recv_timeout(tick), Err(RecvTimeoutError::Disconnected)) {
                return;
            }
        }
    }
}

/// A job in a few words; nothing of one that was cancelled.
fn in_words(job: &JobInfo) -> Option<String> {
    let progress = &job.progress;
    let percent = units::whole_percent(progress.offset, progress.len);
    match (job.status, &job.error) {
        _ if job.cancelled => None,
        (_, Some(error)) => Some(format!("{} failed: {error}", progress.kind)),
        (Status::Concluded | Status::Null, None) => Some(format!("{} completed", progress.kind)),
        (Status::Paused | Status::Standby, None) => Some(format!("{} paused at {percent} %", progress.kind)),
        (_, None) => Some(format!("{}ing: {percent} %, {}", progress.kind, units::rate(job.rate))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::job::{JobSpec, OnError};

    #[test]
    fn a_commit_that_does_not_end_is_no_life() {
        let interval = Duration::from_secs(30);
        for (seconds, alive) in [(0, true), (15, true), (16, true), (17, false), (3600, false)] {
            assert_eq!(is_alive(Duration::from_secs(seconds), interval), alive, "{seconds}");
        }
        // A short interval leaves room for the commit timer's own.
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

    #[test]
    fn the_age_of_a_heartbeat_begins_anew_with_each() {
        let heart = Heartbeat::new();
        let early = Heartbeat { start: heart.start - Duration::from_secs(100), last: Arc::clone(&heart.last) };
        assert!(early.age() >= Duration::from_secs(100));
        early.beat();
        assert!(early.age() < Duration::from_secs(50));
        early.last.store(0, Ordering::Relaxed);
        early.retire();
        assert_eq!(early.age(), Duration::ZERO);
    }
}
