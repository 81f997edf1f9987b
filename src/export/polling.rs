//! Decides whether a thread polls for its next request before it sleeps, and polls.
//!
//! A client that sends its next request soon after an answer waits for two wake-ups per
//! request: that of a thread here, and its own. Where the threads sleep on idle
//! processors, these wake-ups cost more than everything else together (half of 37 µs on a
//! virtual machine). A thread that polls needs none.
//!
//! ```text
//! sleeps   `needed` requests in a row came soon                  -> polls before it sleeps
//! polls    no request came within the time                       -> sleeps
//! ```
//! `needed` becomes twice as large with each time in vain, up to a bound that depends on
//! what such a time costs others, and small again after [`FEW`] requests in a row that
//! came in time: the time that is spent for a client which is always a bit slower is
//! small.
//!
//! **Clients that move.** The servers of rings are bound to processors, and the client of
//! a server takes turns with it on one of them. But the scheduler, when it wakes the
//! client, sees that the server runs there, and may move the client to a processor that
//! is idle, which costs more than the request; its next request goes to the server of
//! that processor. If the servers poll, no processor is as idle as that, and the client
//! stays. On two processors that takes the scheduler a while. So a server's time is not
//! in vain if another server had a request meanwhile ([`Pace`]). With many processors,
//! one of them is always idle, and the client moves for ever; after [`MOST_MOVES`] such
//! times the server therefore gives up for [`REST`], which bounds them to 3 % of its
//! processor. It gives up as well when other threads have had the processor for long
//! while it polled, because each request that is polled for may have to wait for them.
//!
//! QEMU's event loop polls in the same way, for at most 32 µs by default (`poll-max-ns`).
//!
//! **Touches:** the clock, sched_yield(2). **Never:** reads a request. **Locks:** none.
//! **Invariants:** a call polls for a bounded time, and lets others run between two looks.

use std::num::NonZero;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

/// The longest time that a thread polls before it sleeps.
pub(super) const POLL: Duration = Duration::from_micros(32);

/// Requests in a row that came soon, before a thread polls, and requests that came while
/// it polled, before times in vain are forgotten.
const FEW: u32 = 32;

/// How many times a request may have come to another thread, without [`FEW`] requests in
/// a row that came in time, before the thread gives up.
const MOST_MOVES: u32 = 1024;

/// A thread that has polled for this many times the time that it wanted to was not on a
/// processor.
const TOO_LONG: u32 = 16;

/// How long a thread does not poll after it has given up.
pub(super) const REST: Duration = Duration::from_secs(1);

/// The state of one thread.
#[derive(Debug)]
pub(super) struct Polling {
    /// Requests in a row that came soon.
    soon: u32,
    /// The thread polls when `soon` reaches this number.
    needed: u32,
    /// What `needed` is at most.
    most_needed: u32,
    /// Requests in a row that came while this thread polled.
    found: u32,
    /// Times that a request came to another thread meanwhile, since `found` was [`FEW`].
    moved: u32,
    /// The thread does not poll before this time.
    rests_until: Option<Instant>,
}

impl Polling {
    /// Of a thread whose polling keeps no other thread from its work.
    pub(super) const fn cheap() -> Polling {
        Polling {
            soon: 0,
            needed: FEW,
            most_needed: 2 * FEW,
            found: 0,
            moved: 0,
            rests_until: None,
        }
    }

    /// Of a thread for which others have to park while it polls.
    pub(super) const fn costly() -> Polling {
        Polling { most_needed: 256 * FEW, ..Polling::cheap() }
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
    pub(super) fn is_due(&self, now: Instant) -> bool {
        self.soon >= self.needed && self.rests_until.is_none_or(|until| until <= now)
    }

    /// Polls until `has_request`, or until `time` after `since`. Returns whether it has one in
    /// time; otherwise [`Polling::in_vain`] or [`Polling::woke`] has to follow.
    pub(super) fn poll(
        &mut self,
        since: Instant,
        time: Duration,
        mut has_request: impl FnMut() -> bool,
    ) -> bool {
        loop {
            let elapsed = since.elapsed();
            if elapsed >= time {
                if elapsed >= time * TOO_LONG {
                    self.give_up(since + elapsed);
                }
                return false;
            }
            if has_request() {
                self.found = self.found.saturating_add(1);
                if self.found >= FEW {
                    (self.needed, self.moved) = (FEW, 0);
                }
                return true;
            }
            // The client may have to run on this processor.
            thread::yield_now();
        }
    }

    /// Notes that a request has come after this thread has slept. `polled` says whether
    /// it has polled before that, `soon` whether any server of the session had a request
    /// shortly before, and `elsewhere` whether another one had a request since this one
    /// began to wait.
    pub(super) fn woke(&mut self, now: Instant, polled: bool, soon: bool, elsewhere: bool) {
        if !polled {
            self.came(soon);
        } else if soon && elsewhere {
            self.found = 0;
            self.moved += 1;
            if self.moved >= MOST_MOVES {
                self.give_up(now);
            }
        } else {
            self.in_vain();
        }
    }

    /// Notes that no request has come while this thread polled.
    pub(super) fn in_vain(&mut self) {
        if self.found < FEW {
            self.needed = self.most_needed.min(self.needed * 2);
        }
        (self.found, self.soon) = (0, 0);
    }

    fn give_up(&mut self, now: Instant) {
        self.rests_until = Some(now + REST);
        (self.found, self.moved, self.soon) = (0, 0, 0);
    }
}

/// When the servers of a session began to wait for the last time, in nanoseconds after the
/// start.
#[derive(Debug)]
pub(super) struct Pace {
    start: Instant,
    /// Any of them.
    last: AtomicU64,
    /// Each of them; 0 if it has not waited.
    of_each: Box<[AtomicU64]>,
}

impl Pace {
    /// For this many servers.
    pub(super) fn new(servers: usize) -> Pace {
        let of_each = (0..servers).map(|_| AtomicU64::new(0)).collect();
        Pace { start: Instant::now(), last: AtomicU64::new(0), of_each }
    }

    /// The server of this number begins to wait, because it has served its last request.
    pub(super) fn waits(&self, server: usize, now: Instant) {
        let nanos = self.nanos(now);
        self.last.store(nanos, Ordering::Relaxed);
        self.of_each[server].store(nanos, Ordering::Relaxed);
    }

    /// Whether another server has begun to wait since this one did, at `begun`.
    pub(super) fn has_changed(&self, begun: Instant) -> bool {
        self.last.load(Ordering::Relaxed) != self.nanos(begun)
    }

    /// The time since a server has begun to wait.
    pub(super) fn since(&self, now: Instant) -> Duration {
        let last = self.last.load(Ordering::Relaxed);
        Duration::from_nanos(self.nanos(now).saturating_sub(last))
    }

    /// How many servers have begun to wait in the last `time`.
    pub(super) fn active(&self, now: Instant, time: Duration) -> usize {
        let now = self.nanos(now);
        let is_active =
            |&last: &u64| last > 0 && u128::from(now.saturating_sub(last)) < time.as_nanos();
        self.of_each.iter().map(|last| last.load(Ordering::Relaxed)).filter(is_active).count()
    }

    fn nanos(&self, now: Instant) -> u64 {
        u64::try_from(now.saturating_duration_since(self.start).as_nanos()).unwrap_or(u64::MAX)
    }
}

/// On how many processors the threads of this process may run. To be called by a thread
/// that is not bound to one.
pub(super) fn processors() -> usize {
    thread::available_parallelism().map_or(1, NonZero::get)
}

/// Whether the threads of a process with so many [`processors`] may poll: they must not
/// take the only one from their clients.
pub(super) fn may_poll(processors: usize) -> bool {
    processors > 1
}

#[cfg(test)]
mod tests {
    use super::*;

    const HOUR: Duration = Duration::from_secs(3600);

    fn came_soon(polling: &mut Polling, times: u32) {
        (0..times).for_each(|_| polling.came(true));
    }

    fn is_due(polling: &Polling) -> bool {
        polling.is_due(Instant::now())
    }

    fn finds(polling: &mut Polling, times: u32) {
        for _ in 0..times {
            assert!(polling.poll(Instant::now(), HOUR, || true));
        }
    }

    /// Protects: a thread polls after a row of requests that came soon, and not after a
    /// row that a late one has ended.
    #[test]
    fn a_row_of_soon_requests_makes_a_thread_poll() {
        let mut polling = Polling::cheap();
        let woke = |polling: &mut Polling, times, soon| {
            (0..times).for_each(|_| polling.woke(Instant::now(), false, soon, true));
        };
        woke(&mut polling, FEW - 1, true);
        woke(&mut polling, 1, false);
        woke(&mut polling, FEW - 1, true);
        assert!(!is_due(&polling));
        woke(&mut polling, 1, true);
        assert!(is_due(&polling));
        polling.begin_again();
        assert!(!is_due(&polling));
    }

    /// Protects: the thread looks until a request is there or the time is over.
    #[test]
    fn a_request_is_found_in_time() {
        let mut polling = Polling::cheap();
        let mut looks = 0;
        assert!(polling.poll(Instant::now(), HOUR, || {
            looks += 1;
            looks == 5
        }));
        assert!(!polling.poll(Instant::now(), Duration::ZERO, || unreachable!("it is over")));
    }

    /// Protects: each time in vain doubles what is needed, up to a bound, and a row of
    /// requests that came in time makes it small again.
    #[test]
    fn times_in_vain_make_a_thread_poll_less() {
        for (mut polling, row) in [
            (Polling::costly(), vec![64, 128, 256, 512, 1024, 2048, 4096, 8192, 8192]),
            (Polling::cheap(), vec![64, 64]),
        ] {
            for wanted in row {
                // The client is slower than the thread polls.
                polling.woke(Instant::now(), true, true, false);
                came_soon(&mut polling, wanted - 1);
                assert!(!is_due(&polling), "{wanted}");
                came_soon(&mut polling, 1);
                assert!(is_due(&polling), "{wanted}");
            }
            finds(&mut polling, FEW);
            polling.in_vain();
            came_soon(&mut polling, FEW);
            assert!(is_due(&polling), "the last time in vain came after many that were not");
        }
    }

    /// Protects: a client that moves does not end the polling; if it moves for ever, single
    /// requests that come in time do not help, and the thread gives up for a while.
    #[test]
    fn a_client_may_move_for_a_while() {
        let mut polling = Polling::cheap();
        came_soon(&mut polling, FEW);
        let now = Instant::now();
        for move_ in 1..MOST_MOVES {
            polling.woke(now, true, true, true);
            if move_ % 10 == 0 {
                finds(&mut polling, FEW - 1);
            }
        }
        assert!(polling.is_due(now));
        polling.woke(now, true, true, true);
        came_soon(&mut polling, FEW);
        assert!(!polling.is_due(now) && !polling.is_due(now + REST / 2));
        assert!(polling.is_due(now + REST));

        polling.woke(now, true, true, true);
        finds(&mut polling, FEW);
        assert_eq!((polling.moved, polling.needed), (0, FEW), "the client stays");
    }

    /// Protects: a thread that other threads have kept from the processor while it polled
    /// sleeps for a while.
    #[test]
    fn a_thread_that_gets_no_processor_gives_up() {
        let mut polling = Polling::cheap();
        came_soon(&mut polling, FEW);
        let time = Duration::from_micros(1);
        let long_ago = Instant::now().checked_sub(TOO_LONG * time).unwrap();
        assert!(!polling.poll(long_ago, time, || unreachable!("it is over")));
        came_soon(&mut polling, FEW);
        assert!(!is_due(&polling));
        assert!(polling.is_due(Instant::now() + REST));
    }

    /// Protects: the pace of a session is that of all of its servers.
    #[test]
    fn a_pace_is_that_of_all_servers() {
        let pace = Pace::new(3);
        let [first, second] = [1, 3].map(|micros| pace.start + Duration::from_micros(micros));
        pace.waits(0, first);
        assert!(!pace.has_changed(first));
        assert_eq!(pace.since(second), Duration::from_micros(2));
        pace.waits(1, second);
        assert!(pace.has_changed(first));
        assert_eq!(pace.since(second), Duration::ZERO);
        assert_eq!(pace.since(first), Duration::ZERO, "a clock that was read before");
        let active = |micros| pace.active(second, Duration::from_micros(micros));
        assert_eq!([1, 2, 3].map(active), [1, 1, 2], "one server has never waited");
        pace.waits(0, second);
        assert_eq!(active(1), 2);
    }
}
