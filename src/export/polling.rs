//! Decides whether a thread polls for its next request before it sleeps, and polls.
//!
//! A client that sends its next request soon after an answer waits for two wake-ups per request:
//! that of a thread here, and its own. Where the threads sleep on idle processors, these wake-ups
//! cost more than everything else together (half of 37 µs on a virtual machine). A thread that
//! polls needs none.
//!
//! ```text
//! sleeps   `needed` requests in a row came soon                  -> polls before it sleeps
//! polls    no request came within the time                       -> sleeps
//! ```
//! `needed` becomes twice as large with each time in vain, up to a bound that depends on what such
//! a time costs others, and small again after [`FEW`] requests that came in time. A client that is
//! always a bit slower therefore does not cost a processor.
//!
//! **Clients that move.** The servers of rings are bound to processors, and the client of a server
//! takes turns with it on one of them. But the scheduler, when it wakes the client, sees that the
//! server runs there, and may move the client to a processor that is idle, which costs more than
//! the request; its next request goes to the server of that processor. If the servers poll, no
//! processor is as idle as that, and the client stays. On two processors that takes the scheduler
//! some milliseconds. So a server's time is not in vain if another server had a request meanwhile
//! ([`Pace`]). With many processors, one of them is always idle, and the client moves for ever;
//! after [`MOST_MOVES`] times in a row the server therefore gives up for a while.
//!
//! QEMU's event loop polls in the same way, for at most 32 µs by default (`poll-max-ns`).
//!
//! **Touches:** the clock, sched_yield(2). **Never:** reads a request. **Locks:** none.
//! **Invariants:** a call polls for a bounded time, and lets others run between two looks.

use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

/// The longest time that a thread polls before it sleeps.
pub(super) const POLL: Duration = Duration::from_micros(32);

/// Requests in a row that came soon, before a thread polls, and requests that came while it polled,
/// before times in vain are forgotten.
const FEW: u32 = 32;

/// The most requests in a row that may be needed.
const MOST: u32 = 8192;

/// How many times in a row the client may have moved before the thread gives up for [`MOST`]
/// requests. Where the client moves for ever, polling costs a tenth of a processor.
const MOST_MOVES: u32 = 1024;

/// The state of one thread.
#[derive(Debug)]
pub(super) struct Polling {
    /// Requests in a row that came soon.
    soon: u32,
    /// The thread polls when `soon` reaches this number.
    needed: u32,
    /// Requests in a row that came while this thread polled.
    found: u32,
    /// Times in a row that a request came to another thread meanwhile.
    moved: u32,
    /// What `needed` is at most after times in vain.
    most_in_vain: u32,
}

impl Polling {
    /// Of a thread for which a time in vain costs no more than that time.
    pub(super) const fn cheap() -> Polling {
        Polling { soon: 0, needed: FEW, found: 0, moved: 0, most_in_vain: 2 * FEW }
    }

    /// Of a thread for which other threads have to wait while it polls.
    pub(super) const fn costly() -> Polling {
        Polling { most_in_vain: MOST, ..Polling::cheap() }
    }

    /// Notes that a request has come, and whether it came soon after the last one.
    pub(super) fn came(&mut self, soon: bool) {
        self.soon = if soon { self.soon.saturating_add(1) } else { 0 };
    }

    /// Begins to count anew.
    pub(super) fn begin_again(&mut self) {
        self.soon = 0;
    }

    /// Whether enough requests in a row came soon.
    pub(super) fn is_due(&self) -> bool {
        self.soon >= self.needed
    }

    /// Polls until `has_request`, or until `time` after `since`. Returns whether it has one;
    /// otherwise [`Polling::in_vain`] or [`Polling::moved`] has to follow.
    pub(super) fn poll(
        &mut self,
        since: Instant,
        time: Duration,
        mut has_request: impl FnMut() -> bool,
    ) -> bool {
        loop {
            // Other threads may have had the processor for longer than `time`: there is one more
            // look after that.
            let is_over = since.elapsed() >= time;
            if has_request() {
                self.moved = 0;
                self.found = self.found.saturating_add(1);
                if self.found >= FEW {
                    self.needed = FEW;
                }
                return true;
            }
            if is_over {
                return false;
            }
            // The client may have to run on this processor.
            thread::yield_now();
        }
    }

    /// Notes that no request has come while this thread polled.
    pub(super) fn in_vain(&mut self) {
        if self.found < FEW {
            self.needed = self.needed.max(self.most_in_vain.min(self.needed * 2));
        }
        (self.found, self.moved, self.soon) = (0, 0, 0);
    }

    /// Notes that another thread has had a request while this thread polled.
    pub(super) fn moved(&mut self) {
        self.moved += 1;
        if self.moved >= MOST_MOVES {
            self.needed = MOST;
            (self.found, self.moved, self.soon) = (0, 0, 0);
        }
    }
}

/// When the servers of a session had nothing to do for the last time, in nanoseconds after the
/// first field. It is written when a server begins to wait, not for each request.
#[derive(Debug)]
pub(super) struct Pace(Instant, AtomicU64);

impl Pace {
    pub(super) fn new() -> Pace {
        Pace(Instant::now(), AtomicU64::new(0))
    }

    /// A server begins to wait.
    pub(super) fn waits(&self, now: Instant) {
        self.1.store(self.nanos(now), Ordering::Relaxed);
    }

    /// Whether another server has begun to wait since this one did, at `begun`.
    pub(super) fn has_changed(&self, begun: Instant) -> bool {
        self.1.load(Ordering::Relaxed) != self.nanos(begun)
    }

    /// The time since any server has begun to wait.
    pub(super) fn since(&self, now: Instant) -> Duration {
        Duration::from_nanos(self.nanos(now).saturating_sub(self.1.load(Ordering::Relaxed)))
    }

    fn nanos(&self, now: Instant) -> u64 {
        u64::try_from(now.saturating_duration_since(self.0).as_nanos()).unwrap_or(u64::MAX)
    }
}

/// Whether the threads of this process may poll: they must not take the only processor from their
/// clients. To be called by a thread that is not bound to a processor.
pub(super) fn may_poll() -> bool {
    thread::available_parallelism().is_ok_and(|processors| processors.get() > 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    const HOUR: Duration = Duration::from_secs(3600);

    fn came_soon(polling: &mut Polling, times: u32) {
        (0..times).for_each(|_| polling.came(true));
    }

    /// Protects: a thread polls after a row of requests that came soon, and not after a row that a
    /// late one has ended.
    #[test]
    fn a_row_of_soon_requests_makes_a_thread_poll() {
        let mut polling = Polling::costly();
        came_soon(&mut polling, FEW - 1);
        polling.came(false);
        came_soon(&mut polling, FEW - 1);
        assert!(!polling.is_due());
        came_soon(&mut polling, 1);
        assert!(polling.is_due());
    }

    /// Protects: the number of looks is not that of a single one, and a request that is there when
    /// the time is over is found.
    #[test]
    fn a_request_is_found_also_when_the_time_is_over() {
        let mut polling = Polling::costly();
        let mut looks = 0;
        assert!(polling.poll(Instant::now(), HOUR, || {
            looks += 1;
            looks == 5
        }));
        assert!(polling.poll(Instant::now(), Duration::ZERO, || true));
        assert!(!polling.poll(Instant::now(), Duration::ZERO, || false));
        assert_eq!((polling.found, polling.needed), (2, FEW), "nothing is noted yet");
    }

    /// Protects: a client that moves does not end the polling, and one that moves for ever does.
    #[test]
    fn a_client_may_move_for_a_while() {
        let mut polling = Polling::costly();
        came_soon(&mut polling, FEW);
        for _ in 1..MOST_MOVES {
            polling.moved();
        }
        assert!(polling.is_due());
        assert!(polling.poll(Instant::now(), Duration::ZERO, || true));
        for _ in 1..MOST_MOVES {
            polling.moved();
        }
        assert!(polling.is_due());
        polling.moved();
        assert_eq!((polling.is_due(), polling.needed), (false, MOST));
        polling.in_vain();
        assert_eq!(polling.needed, MOST);
    }

    /// Protects: the pace of a session is that of all of its servers.
    #[test]
    fn a_pace_is_that_of_all_servers() {
        let pace = Pace::new();
        let [first, second] = [1, 3].map(|micros| pace.0 + Duration::from_micros(micros));
        pace.waits(first);
        assert!(!pace.has_changed(first));
        assert_eq!(pace.since(second), Duration::from_micros(2));
        pace.waits(second);
        assert!(pace.has_changed(first));
        assert_eq!(pace.since(second), Duration::ZERO);
        assert_eq!(pace.since(first), Duration::ZERO, "a clock that was read before");
    }

    #[test]
    fn a_time_in_vain_that_costs_little_is_soon_forgotten() {
        let mut polling = Polling::cheap();
        for _ in 0..9 {
            polling.in_vain();
        }
        came_soon(&mut polling, 2 * FEW);
        assert!(polling.is_due());
    }

    /// Protects: each time in vain doubles what is needed, up to a bound, and a row of requests
    /// that came in time makes it small again.
    #[test]
    fn times_in_vain_make_a_thread_poll_less() {
        let mut polling = Polling::costly();
        for wanted in [64, 128, 256, 512, 1024, 2048, 4096, 8192, 8192] {
            polling.in_vain();
            came_soon(&mut polling, wanted - 1);
            assert!(!polling.is_due(), "{wanted}");
            came_soon(&mut polling, 1);
            assert!(polling.is_due(), "{wanted}");
        }
        for _ in 0..FEW {
            assert!(polling.poll(Instant::now(), Duration::ZERO, || true));
        }
        polling.in_vain();
        came_soon(&mut polling, FEW);
        assert!(polling.is_due(), "the last time in vain came after many that were not");
    }
}
