//! Controls how much time a stream leaves to the guest. Pure: the time and the guest's activity are
//! arguments.
//!
//! If the guest is idle, the stream runs as fast as it can. If the guest is active, the stream
//! rests after each chunk. The rest is as short as possible, yet long enough that the guest's
//! requests cost no more than [`FACTOR`] times their cost without a stream:
//!
//! ```text
//! every WINDOW    compare the mean cost of each kind of request with its cost without a stream:
//!                 too high: double the rest; otherwise: shorten it by a quarter, in the end to 0
//! every PROBE     one rest of SETTLE + QUIET; the cost of requests in the quiet part is their
//!                 cost without a stream. If no request ends in SETTLE of the first probe, and
//!                 none waits, that probe ends there, and the next one is due after IDLE
//! a flush runs    the stream rests until the flush has ended, because the flush would have to
//!                 wait for every chunk that is written meanwhile
//! always          a chunk is copied after LONGEST at the latest
//! ```
//! Each kind of request is compared with itself only: a read that misses is slow because it copies
//! up, so it is compared with other misses. The stored cost without a stream falls at once and
//! rises slowly, so that one slow probe does not excuse the stream. If requests are slow in every
//! probe, the host itself is slow; then the stored cost rises within some probes, and the stream
//! goes on.

use std::time::{Duration, Instant};

use crate::disk::{Activity, Cost};

/// How much a stream may slow down the guest: the cost of a request may grow to this multiple of
/// its cost without a stream.
pub const FACTOR: u32 = 2;
/// The longest rest: at least one chunk is copied in this time, however slow the guest's requests
/// are.
pub const LONGEST: Duration = Duration::from_millis(100);
/// The first rest that is not 0, and the shortest.
const FIRST: Duration = Duration::from_micros(500);
/// The guest counts as idle after this time without a request.
const IDLE: Duration = Duration::from_millis(50);
/// How often the length of the rest is adjusted.
const WINDOW: Duration = Duration::from_millis(50);
/// How often a rest is long enough to measure requests without the stream.
const PROBE: Duration = Duration::from_secs(1);
/// The first part of a rest, in which the I/O that the stream has started comes to an end.
const SETTLE: Duration = Duration::from_millis(5);
/// The least length of the measured part of a rest.
const QUIET: Duration = Duration::from_millis(15);
/// How often the end of a flush is polled.
const LOOK: Duration = Duration::from_millis(1);
/// The least number of requests whose mean cost is used; fewer are too noisy.
const ENOUGH: u64 = 3;
/// Cost of a request's way through the kernel, which the daemon does not see. With it, a request of
/// a few microseconds may take more than twice as long as before and still counts as fast.
const ON_THE_WAY: Duration = Duration::from_micros(20);

/// The controller of rests. The job's thread calls [`Backoff::next`] between chunks, and again
/// after each rest, until it returns `None`.
#[derive(Debug, Default)]
pub(super) struct Backoff {
    /// Mean cost of each kind of request without a stream, if known.
    without: [Option<Duration>; Activity::KINDS],
    /// Length of the rest after a chunk.
    rest: Duration,
    resting: Option<Rest>,
    /// Start of the window over which requests are judged.
    window: Option<Moment>,
    /// The last time at which the guest's activity changed.
    active: Option<Moment>,
    /// When the next probe is due; `None` before the first one.
    probe_at: Option<Instant>,
}

#[derive(Clone, Copy, Debug)]
struct Moment {
    at: Instant,
    activity: Activity,
}

/// A rest that has begun.
#[derive(Clone, Copy, Debug)]
struct Rest {
    begun: Moment,
    until: Instant,
    /// The rest is long enough to measure requests without the stream.
    is_probe: bool,
    /// When the I/O of the stream had settled.
    quiet: Option<Moment>,
}

impl Backoff {
    /// Returns how long to wait before the next call; `None` means that the next chunk may be
    /// copied. `activity` is the guest's activity until `now`.
    pub fn next(&mut self, now: Instant, activity: &Activity) -> Option<Duration> {
        let moment = Moment { at: now, activity: *activity };
        let is_active = self.notice(&moment);
        let Some(rest) = &mut self.resting else {
            if !is_active {
                self.window = None;
                return None;
            }
            self.judge(&moment);
            let is_probe = self.probe_at.is_none_or(|due| now >= due);
            let length = if is_probe { self.rest.max(SETTLE + QUIET) } else { self.rest };
            if length.is_zero() && !activity.is_flushing {
                return None;
            }
            self.resting = Some(Rest { begun: moment, until: now + length, is_probe, quiet: None });
            return Some(if activity.is_flushing { LOOK } else { length.min(SETTLE) });
        };
        let settled = rest.begun.at + SETTLE;
        if rest.quiet.is_none() && now >= settled {
            // The guest may have been active for a moment before the stream: most streams would
            // begin with a rest for nothing.
            let is_silent = !activity.is_waiting && rest.begun.activity.costs == activity.costs;
            if self.probe_at.is_none() && is_silent {
                self.resting = None;
                self.probe_at = Some(now + IDLE);
                return None;
            }
            rest.quiet = Some(moment);
            if rest.is_probe {
                // Waits end late, so the measured part is counted from now.
                rest.until = rest.until.max(now + QUIET);
            }
        }
        // The rest may also have been longer because the job was paused meanwhile. It can be
        // measured all the same, because the stream was quiet.
        let waits_for_flush = activity.is_flushing && now < rest.begun.at + LONGEST;
        if !is_active || now >= rest.until && !waits_for_flush {
            let quiet = rest.quiet;
            self.resting = None;
            self.learn(&moment, quiet);
            return None;
        }
        let next = if rest.quiet.is_none() { settled.min(rest.until) } else { rest.until };
        let wait = next.saturating_duration_since(now);
        Some(if wait.is_zero() || activity.is_flushing { LOOK } else { wait })
    }

    /// Whether the guest was active lately, as far as [`Backoff::next`] was told.
    pub fn is_guest_active(&self, now: Instant) -> bool {
        self.active.is_some_and(|last| now < last.at + IDLE)
    }

    /// Whether the guest is active. Remembers the last change of its activity.
    fn notice(&mut self, moment: &Moment) -> bool {
        let asks = moment.activity.is_waiting
            || self.active.is_some_and(|last| last.activity.costs != moment.activity.costs);
        if asks || self.active.is_none() {
            // At the first call, activity before the stream is known only by its age.
            let recently = asks || moment.activity.idle.is_some_and(|idle| idle < IDLE);
            let at = if recently { Some(moment.at) } else { moment.at.checked_sub(IDLE) };
            self.active = at.map(|at| Moment { at, activity: moment.activity });
        }
        self.is_guest_active(moment.at)
    }

    /// Adjusts the rest once per window, if enough requests were seen.
    fn judge(&mut self, moment: &Moment) {
        let Some(window) = self.window else {
            self.window = Some(*moment);
            return;
        };
        if moment.at < window.at + WINDOW {
            return;
        }
        let costs = mean_costs(&window.activity, &moment.activity);
        let judged = costs
            .iter()
            .zip(&self.without)
            .filter_map(|(cost, without)| Some((cost.as_ref()?, without.as_ref()?)));
        let mut is_fine = None;
        for (&cost, &without) in judged {
            let allowed = (without + ON_THE_WAY).saturating_mul(FACTOR) - ON_THE_WAY;
            is_fine = Some(is_fine.unwrap_or(true) && cost <= allowed);
        }
        match is_fine {
            // Too few requests: the window goes on, but for at most ten times its length, so that
            // old requests are not held against the stream for ever.
            None if moment.at < window.at + 10 * WINDOW => return,
            None => {}
            Some(false) => self.rest = (self.rest * 2).clamp(FIRST, LONGEST),
            Some(true) => {
                self.rest = Some(self.rest - self.rest / 4)
                    .filter(|&rest| rest >= FIRST)
                    .unwrap_or_default()
            }
        }
        self.window = Some(*moment);
    }

    /// Measures the cost of requests without a stream, if the quiet part of the rest was long
    /// enough.
    fn learn(&mut self, moment: &Moment, quiet: Option<Moment>) {
        let Some(quiet) = quiet.filter(|quiet| moment.at >= quiet.at + QUIET) else { return };
        self.probe_at = Some(moment.at + PROBE);
        for (cost, without) in
            mean_costs(&quiet.activity, &moment.activity).into_iter().zip(&mut self.without)
        {
            if let Some(cost) = cost {
                *without = Some(without.map_or(cost, |before| cost.min(before + before / 4)));
            }
        }
    }
}

/// Returns the mean cost of a request of each kind between `from` and `to`; `None` for fewer than
/// [`ENOUGH`] requests.
fn mean_costs(from: &Activity, to: &Activity) -> [Option<Duration>; Activity::KINDS] {
    std::array::from_fn(|kind| {
        let (Cost { operations: before, time: spent }, Cost { operations, time }) =
            (from.costs[kind], to.costs[kind]);
        // The counters are read one after the other, so `time` may include one request more than
        // `operations`.
        let operations = operations.saturating_sub(before);
        let divisor = u32::try_from(operations).ok().filter(|_| operations >= ENOUGH)?;
        Some(time.saturating_sub(spent) / divisor)
    })
}

#[cfg(test)]
mod tests;
