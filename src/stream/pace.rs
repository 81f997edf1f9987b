//! How much of its time a stream leaves to the guest. Pure: the time and what the guest has seen are arguments.
//!
//! A guest that asks for nothing is given nothing: the stream goes as fast as it can. Beside one that is active the stream rests after each chunk,
//! just as long as it takes for the guest's requests to cost no more than [`FACTOR`] times what they cost without a stream:
//!
//! ```text
//! every WINDOW    what did a request cost, of each kind?   too much: twice the rest │ else: a quarter less, at last none
//! every PROBE     one rest of SETTLE + QUIET; what requests cost in the quiet part is what they cost without a stream
//! a flush runs    the stream rests until it has ended: each chunk written meanwhile would be one more to wait for
//! always          after LONGEST a chunk is copied, come what may
//! ```
//! Kinds are judged each by its own: a read that misses is slow by what it copies up itself, so it is held only against other misses. What a kind
//! costs without a stream falls at once and rises slowly, so that one bad moment does not excuse the stream; yet where requests are slow in every
//! rest as well, it is not the stream's doing, and soon it goes on.

use std::time::{Duration, Instant};

use crate::disk::{Activity, Cost};

/// What a stream may do to the guest: its requests may cost so many times what they cost without one.
pub const FACTOR: u32 = 2;
/// The longest rest: at least one chunk is copied in this time, however slow the guest's requests are.
pub const LONGEST: Duration = Duration::from_millis(100);
/// The first rest, and the shortest.
const FIRST: Duration = Duration::from_micros(500);
/// A guest that has asked for nothing for so long is idle.
const IDLE: Duration = Duration::from_millis(50);
/// How often the rest is set anew.
const WINDOW: Duration = Duration::from_millis(50);
/// How often a rest is made long enough to learn from.
const PROBE: Duration = Duration::from_secs(1);
/// The part of a rest in which what the stream has set in motion comes to an end.
const SETTLE: Duration = Duration::from_millis(5);
/// The part of a rest that is learnt from, at least.
const QUIET: Duration = Duration::from_millis(15);
/// How often somebody who waits for the end of a flush looks.
const LOOK: Duration = Duration::from_millis(1);
/// Fewer requests say nothing.
const ENOUGH: u64 = 3;
/// What the way of a request through the kernel costs beside what we see of it. A request that takes a few microseconds does not become a slow one
/// by taking twice as many.
const ON_THE_WAY: Duration = Duration::from_micros(20);

/// The controller. Asked between chunks, and again after each rest, until it lets the stream go on.
#[derive(Debug, Default)]
pub(super) struct Pace {
    /// What each kind costs without a stream, where that is known.
    without: [Option<Duration>; Activity::KINDS],
    /// How long to rest after a chunk.
    rest: Duration,
    resting: Option<Rest>,
    /// Since when requests are gathered to be judged.
    window: Option<Moment>,
    /// The last change in what the guest has asked for.
    active: Option<Moment>,
    /// When there was a rest to learn from.
    learnt: Option<Instant>,
}

#[derive(Clone, Copy, Debug)]
struct Moment {
    at: Instant,
    activity: Activity,
}

/// A rest that has begun.
#[derive(Clone, Copy, Debug)]
struct Rest {
    begun: Instant,
    until: Instant,
    /// It is long enough to learn from.
    is_probe: bool,
    /// When the stream had settled.
    quiet: Option<Moment>,
}

impl Pace {
    /// How long to wait before asking again; `None` is the next chunk. `activity` is the guest's until `now`.
    pub fn next(&mut self, now: Instant, activity: &Activity) -> Option<Duration> {
        let moment = Moment { at: now, activity: *activity };
        let is_active = self.notice(&moment);
        let Some(rest) = &mut self.resting else {
            if !is_active {
                self.window = None;
                return None;
            }
            self.judge(&moment);
            let is_probe = self.learnt.is_none_or(|learnt| now >= learnt + PROBE);
            let length = if is_probe { self.rest.max(SETTLE + QUIET) } else { self.rest };
            if length.is_zero() && !activity.is_flushing {
                return None;
            }
            self.resting = Some(Rest { begun: now, until: now + length, is_probe, quiet: None });
            return Some(if activity.is_flushing { LOOK } else { length.min(SETTLE) });
        };
        let settled = rest.begun + SETTLE;
        if rest.quiet.is_none() && now >= settled {
            rest.quiet = Some(moment);
            if rest.is_probe {
                // Waits end late.
                rest.until = rest.until.max(now + QUIET);
            }
        }
        // Also because it was paused meanwhile: whatever was the reason, it was quiet.
        let waits_for_flush = activity.is_flushing && now < rest.begun + LONGEST;
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

    /// Whether the guest wants anything at present.
    fn notice(&mut self, moment: &Moment) -> bool {
        let asks = moment.activity.is_waiting || self.active.is_some_and(|last| last.activity.costs != moment.activity.costs);
        if asks || self.active.is_none() {
            // What it did before there was a stream is told by how long that is ago.
            let recently = asks || moment.activity.idle.is_some_and(|idle| idle < IDLE);
            let at = if recently { Some(moment.at) } else { moment.at.checked_sub(IDLE) };
            self.active = at.map(|at| Moment { at, activity: moment.activity });
        }
        self.active.is_some_and(|last| moment.at < last.at + IDLE)
    }

    /// Sets the rest anew, where enough is known to do so.
    fn judge(&mut self, moment: &Moment) {
        let Some(window) = self.window else {
            self.window = Some(*moment);
            return;
        };
        if moment.at < window.at + WINDOW {
            return;
        }
        let costs = mean_costs(&window.activity, &moment.activity);
        let judged = costs.iter().zip(&self.without).filter_map(|(cost, without)| Some((cost.as_ref()?, without.as_ref()?)));
        let mut is_fine = None;
        for (&cost, &without) in judged {
            let allowed = (without + ON_THE_WAY).saturating_mul(FACTOR) - ON_THE_WAY;
            is_fine = Some(is_fine.unwrap_or(true) && cost <= allowed);
        }
        match is_fine {
            // Too few requests: they are gathered on, but what is old is not held against the stream for ever.
            None if moment.at < window.at + 10 * WINDOW => return,
            None => {}
            Some(false) => self.rest = (self.rest * 2).clamp(FIRST, LONGEST),
            Some(true) => self.rest = Some(self.rest - self.rest / 4).filter(|&rest| rest >= FIRST).unwrap_or_default(),
        }
        self.window = Some(*moment);
    }

    /// Learns from a rest, where it was long enough, what requests cost without a stream.
    fn learn(&mut self, moment: &Moment, quiet: Option<Moment>) {
        let Some(quiet) = quiet.filter(|quiet| moment.at >= quiet.at + QUIET) else { return };
        self.learnt = Some(moment.at);
        for (cost, without) in mean_costs(&quiet.activity, &moment.activity).into_iter().zip(&mut self.without) {
            if let Some(cost) = cost {
                *without = Some(without.map_or(cost, |before| cost.min(before + before / 4)));
            }
        }
    }
}

/// What a request of each kind cost between the two, where there were enough.
fn mean_costs(from: &Activity, to: &Activity) -> [Option<Duration>; Activity::KINDS] {
    std::array::from_fn(|kind| {
        let (Cost { operations: before, time: spent }, Cost { operations, time }) = (from.costs[kind], to.costs[kind]);
        // Counters are read one after the other, so a time may be ahead of its operations by one request.
        let operations = operations.saturating_sub(before);
        let divisor = u32::try_from(operations).ok().filter(|_| operations >= ENOUGH)?;
        Some(time.saturating_sub(spent) / divisor)
    })
}

#[cfg(test)]
mod tests;
