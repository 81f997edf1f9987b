//! Decides which threads wait for requests at /dev/fuse: all of them, or one that polls.
//!
//! A thread that polls saves a client that sends one request at a time two wake-ups per
//! request (`polling.rs`). But the kernel wakes a thread that waits in read(2) for every
//! request, even if another one takes it, so the others must not wait there meanwhile.
//!
//! ```text
//! all read   every thread waits in read(2); the kernel gives each request to one of them
//!    │ ▲
//!    │ └── the next request did not come within POLL, or there was one more when a request was
//!    │     read, MOST_CROWDED times in a row, or a request was served for longer than LOOK
//!    ▼
//! one polls  enough requests in a row came one at a time and soon: the thread that has served the
//!            last one polls /dev/fuse before it waits. The others park, each after the next
//!            request that the kernel gives it.
//! ```
//! Where all read, one thread at a time lets other threads run once (sched_yield) before
//! it waits, if it has served requests beside another one: a client with several requests
//! in flight is often about to send the next ones, and then neither the thread nor the
//! client has to be woken. Reads at depth 32: 167 000 a second instead of 148 000.
//!
//! A thread that stores the copy of a read whose reply it has sent is not at work on a
//! request in this sense: the client waits for nothing, and its next request is still one at
//! a time. The thread that polls takes that one when the copy is stored, which is mostly
//! after the client has sent it; two threads in turn would both have to be woken, and
//! would compete with the client. First reads of 4 KiB: 46 000 a second instead of 36 000.
//!
//! A parked thread looks every [`LOOK`] whether the one that polls has served a request. If it has
//! not, because it hangs in one or there is none, all read again: a file that hangs stops at most
//! one thread, and a disk without requests has all its threads in read(2), and no timer.
//!
//! **Touches:** poll(2) with a timeout of zero, sched_yield(2), parking of threads.
//! **Never:** reads a request; parks the thread that is to poll.
//! **Locks:** none.
//! **Invariants:** a thread parks only while another one is to poll. That one unparks it when it
//! has polled in vain, and when it ends; and a parked thread frees itself after at most two
//! [`LOOK`]s in which no request was served. At most one thread lets others run at a time.

use std::cell::Cell;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};
use std::thread::{self, Thread};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::polling::{POLL, Polling, REST, may_poll, processors};

/// The time since its last request within which a thread's next one comes soon. Two
/// threads that take turns have each every second request, so this is twice the time of
/// one request as the client sees it, wake-ups included.
const SOON: Duration = Duration::from_micros(200);
/// How many requests in a row may find one more behind them, before all threads read again.
const MOST_CROWDED: u32 = 4;
/// How often a parked thread looks whether the thread that polls still comes forward.
const LOOK: Duration = Duration::from_millis(2);

/// A thread that has let others run for longer than this competes with threads that
/// compute, behind which the next request would have to wait: it does not do so again for
/// [`REST`]. Behind a client that sends 32 requests, it is 128 to 512 µs.
const LONG_YIELD: Duration = Duration::from_millis(2);

#[cfg(test)]
const HOUR: Duration = Duration::from_secs(3600);

/// Value of [`Turns::polling`]: all threads wait in read(2).
const ALL_READ: usize = usize::MAX;

/// What the threads of one session share.
#[derive(Debug)]
pub(super) struct Turns {
    /// Number of the thread that polls, or [`ALL_READ`].
    polling: AtomicUsize,
    /// Threads that are parked.
    parked: AtomicUsize,
    /// Threads at work on a request.
    serving: AtomicU32,
    /// Those of them that have not sent its reply.
    unanswered: AtomicU32,
    /// Requests that were served.
    served: AtomicU64,
    /// Whether a thread lets others run before it waits in read(2).
    yields: AtomicBool,
    threads: Vec<OnceLock<Thread>>,
    /// [`may_poll`].
    may_poll: bool,
    /// [`POLL`], [`SOON`], [`LOOK`] and [`LONG_YIELD`].
    poll: Duration,
    soon: Duration,
    look: Duration,
    long_yield: Duration,
}

impl Turns {
    /// For this many threads.
    pub(super) fn new(threads: usize) -> Arc<Turns> {
        Turns::with(threads, may_poll(processors()), [POLL, SOON, LOOK, LONG_YIELD])
    }

    fn with(threads: usize, may_poll: bool, times: [Duration; 4]) -> Arc<Turns> {
        let [poll, soon, look, long_yield] = times;
        Arc::new(Turns {
            polling: AtomicUsize::new(ALL_READ),
            parked: AtomicUsize::new(0),
            serving: AtomicU32::new(0),
            unanswered: AtomicU32::new(0),
            served: AtomicU64::new(0),
            yields: AtomicBool::new(false),
            threads: (0..threads).map(|_| OnceLock::new()).collect(),
            may_poll,
            poll,
            soon,
            look,
            long_yield,
        })
    }

    /// As [`Turns::new`], but a thread may poll on a single processor, the client may take any time
    /// between two requests, other threads may run for any time, and a parked thread looks at
    /// intervals of `look`.
    #[cfg(test)]
    pub(super) fn for_tests(threads: usize, look: Duration) -> Arc<Turns> {
        Turns::with(threads, true, [HOUR, HOUR, look, HOUR])
    }

    /// Lets all threads wait in read(2), if the thread of this number is the one that polls.
    fn all_read(&self, polling: usize) {
        if self
            .polling
            .compare_exchange(polling, ALL_READ, Ordering::SeqCst, Ordering::SeqCst)
            .is_ok()
        {
            for thread in self.threads.iter().filter_map(OnceLock::get) {
                thread.unpark();
            }
        }
    }

    /// Threads that serve a request whose reply they have not sent.
    #[cfg(test)]
    pub(super) fn unanswered(&self) -> u32 {
        self.unanswered.load(Ordering::SeqCst)
    }

    /// Whether a thread polls and all others are parked.
    #[cfg(test)]
    pub(super) fn one_polls(&self) -> bool {
        self.polling.load(Ordering::SeqCst) != ALL_READ
            && self.parked.load(Ordering::SeqCst) + 1 == self.threads.len()
    }
}

/// The place of one thread among those of its session.
#[derive(Debug)]
pub(super) struct ReaderTurn {
    turns: Arc<Turns>,
    number: usize,
    /// Counts the requests that came alone and soon.
    polling: Polling,
    /// Requests in a row that had one more behind them.
    crowded: u32,
    /// Whether this thread counts in [`Turns::unanswered`].
    is_counted: Cell<bool>,
    /// Whether another thread was at work when this one had read its last request.
    is_beside_others: bool,
    /// Before this time, the thread does not let others run.
    rests_until: Option<Instant>,
    /// When the last request was served.
    done: Instant,
}

impl ReaderTurn {
    /// Of the calling thread, which has this number among those of [`Turns::new`].
    pub(super) fn new(turns: Arc<Turns>, number: usize) -> ReaderTurn {
        let _ = turns.threads[number].set(thread::current());
        let done = Instant::now();
        ReaderTurn {
            turns,
            number,
            polling: Polling::costly(),
            crowded: 0,
            is_counted: Cell::new(false),
            is_beside_others: false,
            rests_until: None,
            done,
        }
    }

    /// Returns when this thread is to read a request from `device`: at once, after it was parked,
    /// or when a request has come while it has polled.
    pub(super) fn wait(&mut self, device: &OwnedFd) {
        loop {
            match self.turns.polling.load(Ordering::SeqCst) {
                ALL_READ => {
                    self.let_others_run(device);
                    return;
                }
                polling if polling != self.number => self.park(polling),
                // The kernel wakes those that still wait in read(2). Each of them gets one of the
                // next requests, and parks after it.
                _ if self.turns.parked.load(Ordering::SeqCst) + 1 < self.turns.threads.len() => {
                    return;
                }
                _ => {
                    if !self.polling.poll(self.done, self.turns.poll, || has_request(device)) {
                        self.polling.in_vain();
                        self.turns.all_read(self.number);
                    }
                    return;
                }
            }
        }
    }

    /// Lets other threads run once, if this thread serves requests beside others and none
    /// waits. Returns whether it did.
    fn let_others_run(&mut self, device: &OwnedFd) -> bool {
        if !self.is_beside_others
            || self.rests_until.is_some_and(|until| self.done < until)
            || has_request(device)
            || self.turns.yields.swap(true, Ordering::SeqCst)
        {
            return false;
        }
        let begun = Instant::now();
        thread::yield_now();
        self.turns.yields.store(false, Ordering::SeqCst);
        self.has_yielded(begun, Instant::now());
        true
    }

    /// Notes for how long other threads have run.
    fn has_yielded(&mut self, begun: Instant, now: Instant) {
        if now.saturating_duration_since(begun) > self.turns.long_yield {
            self.rests_until = Some(now + REST);
        }
    }

    /// Parks until the thread of this number does not poll any more, or serves nothing.
    fn park(&mut self, polling: usize) {
        let turns = &self.turns;
        self.polling.begin_again();
        turns.parked.fetch_add(1, Ordering::SeqCst);
        let is_polling = || turns.polling.load(Ordering::SeqCst) == polling;
        let (mut served, mut looked) = (turns.served.load(Ordering::SeqCst), Instant::now());
        while is_polling() {
            // Returns at once if this thread was unparked when it was not parked.
            thread::park_timeout(turns.look.saturating_sub(looked.elapsed()));
            if looked.elapsed() < turns.look {
                continue;
            }
            let now = turns.served.load(Ordering::SeqCst);
            if now == served {
                turns.all_read(polling);
            }
            (served, looked) = (now, Instant::now());
        }
        turns.parked.fetch_sub(1, Ordering::SeqCst);
    }

    /// Notes that this thread has read a request from `device`.
    pub(super) fn begins(&mut self, device: &OwnedFd) {
        let is_polling = self.turns.polling.load(Ordering::Relaxed) == self.number;
        let is_crowded = is_polling && has_request(device);
        self.crowded = if is_crowded { self.crowded + 1 } else { 0 };
        if self.crowded >= MOST_CROWDED {
            self.crowded = 0;
            self.turns.all_read(self.number);
        }
        let others = self.turns.unanswered.fetch_add(1, Ordering::SeqCst);
        self.is_counted.set(true);
        let is_soon = self.done.elapsed() < self.turns.soon;
        self.polling.came(others == 0 && is_soon && !is_crowded);
        self.is_beside_others = self.turns.serving.fetch_add(1, Ordering::SeqCst) > 0;
    }

    /// Notes that the reply is about to be sent. The thread may work on the request after
    /// that; a client that waits for each reply sends one request at a time all the same.
    pub(super) fn answers(&self) {
        if self.is_counted.replace(false) {
            self.turns.unanswered.fetch_sub(1, Ordering::SeqCst);
        }
    }

    /// Notes that the request is served, or passed on to another thread.
    pub(super) fn ends(&mut self) {
        self.answers();
        let turns = &self.turns;
        turns.served.fetch_add(1, Ordering::SeqCst);
        turns.serving.fetch_sub(1, Ordering::SeqCst);
        self.done = Instant::now();
        if self.polling.is_due(self.done) && turns.may_poll {
            self.polling.begin_again();
            // If another thread polls, this one parks.
            let _ = turns.polling.compare_exchange(
                ALL_READ,
                self.number,
                Ordering::SeqCst,
                Ordering::SeqCst,
            );
        }
    }
}

/// Whether the kernel has a request. True also for an error and at the end of the mount, which are
/// left to read(2).
fn has_request(device: &OwnedFd) -> bool {
    let at_once = Timespec { tv_sec: 0, tv_nsec: 0 };
    !matches!(poll(&mut [PollFd::new(device, PollFlags::IN)], Some(&at_once)), Ok(0))
}

impl Drop for ReaderTurn {
    /// The thread ends: the others must see the end of the mount as well.
    fn drop(&mut self) {
        self.turns.all_read(self.number);
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::os::unix::net::UnixStream;

    use super::*;

    /// Protects: a thread lets others run only beside another thread that serves, only if no
    /// request waits, and only one thread at a time does.
    #[test]
    fn a_thread_among_others_lets_them_run_before_it_waits() {
        let (mut client, device) = UnixStream::pair().unwrap();
        let device = OwnedFd::from(device);
        let turns = Turns::for_tests(2, LOOK);
        let [mut first, mut second] =
            [0, 1].map(|number| ReaderTurn::new(Arc::clone(&turns), number));
        first.begins(&device);
        first.ends();
        assert!(!first.let_others_run(&device), "it serves alone");

        first.begins(&device);
        second.begins(&device);
        second.ends();
        turns.yields.store(true, Ordering::SeqCst);
        assert!(!second.let_others_run(&device), "another thread does so");
        turns.yields.store(false, Ordering::SeqCst);
        assert!(second.let_others_run(&device));
        assert!(second.let_others_run(&device), "the last one has ended");

        client.write_all(b"request").unwrap();
        assert!(!second.let_others_run(&device), "a request waits");
    }

    /// Protects: a request that comes while another thread only stores a copy comes alone,
    /// and each request is taken off the count once.
    #[test]
    fn a_request_after_an_answer_comes_alone() {
        let (_client, device) = UnixStream::pair().unwrap();
        let device = OwnedFd::from(device);
        let turns = Turns::for_tests(2, LOOK);
        let [mut first, mut second] =
            [0, 1].map(|number| ReaderTurn::new(Arc::clone(&turns), number));
        for _ in 0..64 {
            first.begins(&device);
            first.answers();
            second.begins(&device);
            assert!(second.is_beside_others);
            first.ends();
            assert_eq!(turns.unanswered(), 1);
            second.ends();
        }
        assert_eq!(turns.unanswered(), 0);
        assert_ne!(turns.polling.load(Ordering::SeqCst), ALL_READ);
    }

    /// Protects: a thread that has waited for long behind others sleeps for a while instead.
    #[test]
    fn a_thread_behind_others_that_compute_does_not_let_them_run_again() {
        let (_client, device) = UnixStream::pair().unwrap();
        let device = OwnedFd::from(device);
        let mut turn = ReaderTurn::new(Turns::for_tests(1, LOOK), 0);
        turn.is_beside_others = true;
        let now = turn.done;
        turn.has_yielded(now, now + HOUR);
        assert!(turn.let_others_run(&device));
        turn.has_yielded(now, now + 2 * HOUR);
        assert!(!turn.let_others_run(&device));
        turn.done = now + 2 * HOUR + REST;
        assert!(turn.let_others_run(&device));
    }
}
