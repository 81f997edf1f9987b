//! The number of requests that the stream has in flight: as many as raise the throughput.
//!
//! A server or a link that is far away needs many requests in flight; one that is near, or slow, is
//! not faster with more. The number climbs while each step makes the measured throughput better by
//! [`WORTH`], and goes back otherwise; a server that asks for less halves it.

use std::time::{Duration, Instant};

/// The number at the start.
const FIRST: usize = 4;

/// The largest number.
pub const MOST: usize = 16;

/// The shortest time over which the throughput is measured.
const MEASURED: Duration = Duration::from_millis(300);

/// Measurements after a step back before the next step up.
const HOLD: u32 = 10;

/// How long a server that asked for less is not given more.
const SLOWED: Duration = Duration::from_secs(10);

/// A step is kept if it makes the throughput this much better.
const WORTH: f64 = 1.05;

/// The number of requests in flight, and the measurement that led to it.
#[derive(Debug)]
pub struct Slots {
    limit: usize,
    /// The limit before the last step up, and the throughput that it had, in bytes per second.
    before: Option<(usize, f64)>,
    hold: u32,
    /// When the server has asked for less the last time.
    slowed: Option<Instant>,
    since: Instant,
    bytes: u64,
    completed: usize,
    /// The throughput of the last measurement, in bytes per second.
    rate: f64,
}

impl Slots {
    /// The state at the start.
    pub fn new(now: Instant) -> Slots {
        Slots {
            limit: FIRST,
            before: None,
            hold: 0,
            slowed: None,
            since: now,
            bytes: 0,
            completed: 0,
            rate: 0.0,
        }
    }

    /// The number of requests that may be in flight.
    pub fn limit(&self) -> usize {
        self.limit
    }

    /// The throughput of the last measurement, in bytes per second; 0 before the first one.
    pub fn rate(&self) -> f64 {
        self.rate
    }

    /// Whether the server has asked for fewer requests in the last [`SLOWED`].
    pub fn is_slowed(&self, now: Instant) -> bool {
        self.slowed.is_some_and(|slowed| now < slowed + SLOWED)
    }

    /// Forgets the running measurement: the stream had nothing to do meanwhile.
    pub fn idle(&mut self, now: Instant) {
        (self.since, self.bytes, self.completed) = (now, 0, 0);
    }

    /// Notes bytes that have arrived.
    pub fn arrived(&mut self, bytes: u64) {
        self.bytes += bytes;
    }

    /// Notes a request that has ended, and decides on the number.
    pub fn completed(&mut self, now: Instant) {
        self.completed += 1;
        let time = now.saturating_duration_since(self.since);
        if time < MEASURED || self.completed < self.limit {
            return;
        }
        let rate = self.bytes as f64 / time.as_secs_f64();
        self.rate = rate;
        self.idle(now);
        match self.before {
            Some((limit, before)) if rate < before * WORTH => {
                (self.limit, self.before, self.hold) = (limit, None, HOLD);
            }
            _ if self.hold > 0 => self.hold -= 1,
            _ if self.limit < MOST && self.slowed.is_none_or(|slowed| now >= slowed + SLOWED) => {
                self.before = Some((self.limit, rate));
                self.limit = (self.limit + self.limit.div_ceil(2)).min(MOST);
            }
            _ => self.before = None,
        }
    }

    /// The server has asked for fewer requests (429, 503) in its answer to a request of the time
    /// `asked`. The answers to all requests that were in flight at the same time count once.
    pub fn slow_down(&mut self, asked: Instant, now: Instant) {
        if self.slowed.is_some_and(|slowed| asked < slowed) {
            return;
        }
        self.limit = (self.limit / 2).max(1);
        self.before = None;
        self.slowed = Some(now);
        self.idle(now);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Runs a model in which `rate` is the throughput in bytes per second with so many requests.
    fn run(seconds: u32, rate: impl Fn(usize) -> f64) -> (Slots, usize) {
        let start = Instant::now();
        let mut slots = Slots::new(start);
        let mut most = 0;
        let part = 8u64 << 20;
        let mut now = start;
        while now < start + Duration::from_secs(seconds.into()) {
            now += Duration::from_secs_f64(part as f64 / rate(slots.limit()));
            slots.arrived(part);
            slots.completed(now);
            most = most.max(slots.limit());
        }
        (slots, most)
    }

    #[test]
    fn a_far_server_is_given_many_requests() {
        let (slots, _) = run(20, |requests| requests as f64 * 20e6);
        assert_eq!(slots.limit(), MOST);
    }

    #[test]
    fn a_server_that_is_not_faster_with_more_is_not_given_more() {
        let (slots, most) = run(20, |_| 50e6);
        assert!(slots.limit() <= 6, "{slots:?}");
        assert!(most <= 6, "{most}");
    }

    #[test]
    fn a_server_that_asks_for_less_is_given_less_for_some_time() {
        let start = Instant::now();
        let mut slots = Slots::new(start);
        slots.slow_down(start, start + MEASURED);
        assert_eq!(slots.limit(), FIRST / 2);
        slots.slow_down(start, start + MEASURED);
        assert_eq!(slots.limit(), FIRST / 2, "the same burst of requests counts once");
        slots.slow_down(start + MEASURED, start + MEASURED);
        assert_eq!(slots.limit(), 1);
        let mut now = start + MEASURED;
        while now < start + SLOWED - Duration::from_secs(1) {
            now += Duration::from_millis(400);
            slots.arrived(8 << 20);
            slots.completed(now);
            assert_eq!(slots.limit(), 1);
        }
    }
}
