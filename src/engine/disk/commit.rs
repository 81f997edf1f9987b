//! The commit timer: makes writes that no flush has covered durable within a second or two (P2).
//!
//! ```text
//! clean         a signal that something is dirty, or QUIET has passed   -> waiting
//! waiting       COMMIT_INTERVAL has passed, or much metadata waits      -> writing back
//! writing back  nothing is dirty at its end                             -> clean
//! writing back  something is dirty at its end                           -> waiting
//! ```
//! A disk whose metadata does not change wakes its timer once in [`QUIET`]: hundreds of idle disks
//! on one host must not keep its processors awake.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use crossbeam_channel::{Sender, select};

use super::Disk;

/// Interval between write-backs of metadata that no flush has covered. It bounds the writes that a
/// kill can lose (P2). The timer is needed because syncfs(2) does not reach a FUSE daemon, so no
/// other program requests a write-back.
pub const COMMIT_INTERVAL: Duration = Duration::from_secs(1);

/// How often the timer looks for dirty metadata without a signal: for refcounts that changed
/// without a change of a table, which cost leaked clusters at most.
const QUIET: Duration = Duration::from_secs(60);

/// Time since the commit timer finished its last pass, or since it was told that one is necessary.
/// Clones share the same time. A pass that hangs, for example in fdatasync(2), lets the age grow.
#[derive(Clone, Debug)]
pub struct CommitAge {
    start: Instant,
    /// End of the last pass in milliseconds after `start`; `u64::MAX` if no pass is due.
    last: Arc<AtomicU64>,
}

impl Default for CommitAge {
    fn default() -> Self {
        CommitAge::new()
    }
}

impl CommitAge {
    /// Starts with the age of a pass that has just ended.
    pub fn new() -> CommitAge {
        CommitAge { start: Instant::now(), last: Arc::new(AtomicU64::new(0)) }
    }

    /// Time since the end of the last pass. Zero if no pass is due: that says nothing about the
    /// disk.
    pub fn age(&self) -> Duration {
        Duration::from_millis(self.millis().saturating_sub(self.last.load(Ordering::Relaxed)))
    }

    /// Records the end of a pass, whether it succeeded or failed.
    fn renew(&self) {
        self.last.store(self.millis(), Ordering::Relaxed);
    }

    /// Records that no pass is due: nothing is dirty, or there is no timer.
    fn rest(&self) {
        self.last.store(u64::MAX, Ordering::Relaxed);
    }

    fn millis(&self) -> u64 {
        u64::try_from(self.start.elapsed().as_millis()).unwrap_or(u64::MAX)
    }
}

/// A thread that writes back a disk's metadata every [`COMMIT_INTERVAL`] while some is dirty, and
/// earlier if much metadata waits, until this handle is dropped. The drop waits for the end of a
/// running pass.
#[derive(Debug)]
pub struct CommitTimer {
    stop: Option<Sender<()>>,
    thread: Option<thread::JoinHandle<()>>,
}

impl CommitTimer {
    /// Starts the thread, which renews `age` after each pass. If the thread cannot be started, that
    /// is logged, and writes that the guest does not flush become durable only when the disk is
    /// closed.
    pub fn start(disk: &Arc<Disk>, age: CommitAge) -> CommitTimer {
        let unused = age.clone();
        let disk = Arc::clone(disk);
        let (stop, stopped) = crossbeam_channel::bounded(0);
        let body = move || {
            let mut last = None;
            let (wanted, became_dirty) = (disk.commit_wanted(), disk.became_dirty());
            loop {
                // What becomes dirty after this look leaves a signal, also what the pass of a flush
                // puts back because it could not write it.
                if !disk.is_dirty() {
                    age.rest();
                    select! {
                        recv(stopped) -> _ => break,
                        recv(became_dirty) -> _ => {}
                        default(QUIET) => {}
                    }
                    age.renew();
                }
                select! {
                    recv(stopped) -> _ => break,
                    recv(wanted) -> _ => {}
                    default(COMMIT_INTERVAL) => {}
                }
                let error = disk.flush_if_dirty().err().map(|error| error.to_string());
                age.renew();
                // Each cause is logged once, because an error of fdatasync is permanent (P7).
                if let Some(error) = &error
                    && last.as_ref() != Some(error)
                {
                    log::error!("writing metadata back: {error}");
                }
                last = error;
            }
        };
        match thread::Builder::new().name("commit".to_string()).spawn(body) {
            Ok(thread) => CommitTimer { stop: Some(stop), thread: Some(thread) },
            Err(error) => {
                log::error!(
                    "starting the commit timer: {error}; only flushes of the guest are durable"
                );
                unused.rest();
                CommitTimer { stop: None, thread: None }
            }
        }
    }
}

impl Drop for CommitTimer {
    fn drop(&mut self) {
        self.stop = None;
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use qcow2::image::Image;
    use sim::SimStorage;
    use sim::start::Start;

    #[test]
    fn the_age_of_a_commit_begins_anew_with_each() {
        let age = CommitAge::new();
        let early =
            CommitAge { start: age.start - Duration::from_secs(100), last: Arc::clone(&age.last) };
        assert!(early.age() >= Duration::from_secs(100));
        early.renew();
        assert!(early.age() < Duration::from_secs(50));
        early.last.store(0, Ordering::Relaxed);
        early.rest();
        assert_eq!(early.age(), Duration::ZERO);
    }

    /// Waits until `is_so`, but not for a look that comes without a signal.
    fn until(is_so: impl Fn() -> bool) {
        let begun = Instant::now();
        while !is_so() {
            assert!(begun.elapsed() < QUIET / 2, "the timer got no signal");
            thread::sleep(Duration::from_millis(1));
        }
    }

    /// Protects: P2. Data that is written and not flushed becomes durable without a flush, whether
    /// it was dirty when the timer started, or the timer had nothing to do when it was written.
    #[test]
    fn what_nobody_flushes_is_committed() {
        let file = SimStorage::new(Start::new("commit", 3, 16, 4, 1 << 20).bytes());
        let disk = Arc::new(Disk::for_tests(Image::open(file).unwrap(), None));
        disk.write(0, &[7; 512]).unwrap();
        let before = disk.stats().commits;
        let age = CommitAge::new();
        let timer = CommitTimer::start(&disk, age.clone());
        let is_resting = || age.last.load(Ordering::Relaxed) == u64::MAX;
        for cluster in 1..3 {
            until(|| disk.stats().commits == before + cluster && is_resting());
            assert!(!disk.is_dirty());
            disk.write(cluster << 16, &[7; 512]).unwrap();
        }
        until(|| disk.stats().commits == before + 3);
        drop(timer);
    }

    /// Protects: P2. Tables that the pass of a guest's flush takes, and cannot write, become
    /// durable all the same, although the timer has found nothing dirty meanwhile.
    #[test]
    fn what_a_failed_flush_puts_back_is_committed() {
        let file = SimStorage::new(Start::new("commit", 3, 16, 4, 1 << 20).bytes());
        let disk = Arc::new(Disk::for_tests(Image::open(file.clone()).unwrap(), None));
        disk.write(0, &[7; 512]).unwrap();
        let is_table = |operation: &sim::Operation| {
            operation.action == sim::Action::Write(host::storage::WriteKind::L2Table)
        };
        let hold = file.hold(is_table);
        file.inject(sim::Fault {
            matches: Box::new(is_table),
            after: 0,
            failure: sim::HostFailure::Errno(28),
            times: sim::Repeat::Once,
        });
        let age = CommitAge::new();
        thread::scope(|scope| {
            let flush = scope.spawn(|| disk.flush());
            hold.wait_for(1);
            let _timer = CommitTimer::start(&disk, age.clone());
            until(|| age.last.load(Ordering::Relaxed) == u64::MAX);
            drop(hold);
            flush.join().unwrap().unwrap_err();
            until(|| disk.stats().commits == 1);
        });
    }

    /// Protects: R11. A header that a failed write may have changed is put back without a flush,
    /// although the timer had nothing to do before.
    #[test]
    fn a_header_that_could_not_be_written_is_put_back() {
        let file = SimStorage::new(Start::new("commit", 3, 16, 4, 1 << 20).bytes());
        let disk = Arc::new(Disk::for_tests(Image::open(file.clone()).unwrap(), None));
        disk.close().unwrap();
        let age = CommitAge::new();
        let _timer = CommitTimer::start(&disk, age.clone());
        until(|| age.last.load(Ordering::Relaxed) == u64::MAX);
        let before = file.bytes();
        file.inject(sim::Fault {
            matches: Box::new(|operation| {
                operation.action == sim::Action::Write(host::storage::WriteKind::Header)
            }),
            after: 0,
            failure: sim::HostFailure::ShortBy(0, 28),
            times: sim::Repeat::Once,
        });
        disk.grow(1 << 21).unwrap_err();
        until(|| !disk.is_dirty());
        assert!(file.bytes()[..104] == before[..104], "the header is the old one");
    }
}
