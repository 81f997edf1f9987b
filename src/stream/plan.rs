//! What the speed of a stream follows: a schedule by the time of day, or a deadline. Pure: what time it is and how far the job has come are arguments.
//!
//! ```text
//! schedule   08:00=20M,20:00=0    at any local time the speed of the latest entry at or before it; before the first one, that of the last
//! deadline   06:00                bytes left / time left and a little more, anew at every look; after it, no limit
//! ```
//! A local time is what a clock on the wall shows, daylight saving time included: an hour that comes twice is governed alike both times, and a deadline
//! in it is the first of the two that is still to come; one in the hour that is left out is as much later as the clock was put forward.
//!
//! **Invariants:** a deadline is an instant from the moment the stream starts, so that it means the same to a stream that is resumed in another zone or
//! after it has passed. A job is said to be late only for what it was seen to do over [`MEASURED`], while it was neither paused nor held back by us.

use std::collections::VecDeque;
use std::fmt;
use std::str::FromStr;
use std::time::{Duration, SystemTime};

use jiff::Timestamp;
use jiff::civil::{Date, Time};
use jiff::tz::{AmbiguousOffset, TimeZone};

use super::STREAM_CHUNK;
use super::bytes::parse_rate;

#[cfg(test)]
mod tests;

/// How often a plan is looked at: a schedule is not late by more, and a deadline has the speed that it needs.
pub const LOOK: Duration = Duration::from_secs(2);
/// How much faster than needed, in hundredths: what a guest or a slow disk takes away for a moment is made good …
const MARGIN: u128 = 105;
/// … and so many milliseconds before the deadline: what is left is divided anew at every look, so who aims at the very end gets there at the very end.
const RESERVE: u128 = 30_000;
/// The rate of the job is that of so much time at most …
const WINDOW: Duration = Duration::from_secs(30);
/// … and at least: a job at the lowest speed does a step in a second.
const MEASURED: Duration = Duration::from_secs(10);
/// It is too slow where it does fewer hundredths than these of what it needs, so many looks in a row.
const CLEARLY: u128 = 80;
const LOOKS_IN_A_ROW: u32 = 5;
/// More entries than anybody types, and few enough for a note beside the image.
const MOST_ENTRIES: usize = 48;
const MINUTES_OF_A_DAY: u16 = 24 * 60;

/// A minute of the day.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub struct Minute(u16);

impl FromStr for Minute {
    type Err = String;

    fn from_str(text: &str) -> Result<Minute, String> {
        let number = |text: &str| text.bytes().all(|digit| digit.is_ascii_digit()).then(|| text.parse::<u16>().ok()).flatten();
        let minute = match text.split_once(':') {
            Some((hour, minute)) if hour.len() == 2 && minute.len() == 2 => number(hour).zip(number(minute)),
            _ => None,
        };
        let minute = minute.filter(|(hour, minute)| *hour < 24 && *minute < 60).map(|(hour, minute)| Minute(hour * 60 + minute));
        minute.ok_or_else(|| format!("\"{text}\" is no time of day; expected HH:MM from 00:00 to 23:59, such as 06:00"))
    }
}

impl fmt::Display for Minute {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:02}:{:02}", self.0 / 60, self.0 % 60)
    }
}

impl Minute {
    /// What a clock on the wall shows, without its seconds.
    fn of(now: Timestamp, zone: &TimeZone) -> Minute {
        let local = now.to_zoned(zone.clone());
        Minute((local.hour().unsigned_abs() as u16 * 60 + local.minute().unsigned_abs() as u16).min(MINUTES_OF_A_DAY - 1))
    }

    /// The next moment after `now` at which a clock shows this minute. `None` at the end of time.
    fn next(self, now: Timestamp, zone: &TimeZone) -> Option<Timestamp> {
        let time = Time::new((self.0 / 60) as i8, (self.0 % 60) as i8, 0, 0).ok()?;
        let mut day = now.to_zoned(zone.clone()).date();
        // A day may be left out where the date line was moved; never two.
        for _ in 0..3 {
            if let Some(next) = moments(day, time, zone).into_iter().flatten().find(|moment| *moment > now) {
                return Some(next);
            }
            day = day.tomorrow().ok()?;
        }
        None
    }
}

/// When it is `time` on `day`: once, twice where the clock is put back, and later where that time is left out.
fn moments(day: Date, time: Time, zone: &TimeZone) -> [Option<Timestamp>; 2] {
    let local = zone.to_ambiguous_timestamp(day.to_datetime(time));
    match local.offset() {
        AmbiguousOffset::Fold { .. } => [local.earlier().ok(), local.later().ok()],
        AmbiguousOffset::Gap { .. } | AmbiguousOffset::Unambiguous { .. } => [local.compatible().ok(), None],
    }
}

/// Speeds by the time of day.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Schedule {
    /// As it was typed.
    text: String,
    /// By time; never empty.
    entries: Vec<(Minute, u64)>,
}

impl FromStr for Schedule {
    type Err = String;

    fn from_str(text: &str) -> Result<Schedule, String> {
        let wrong = |why: String| format!("{why}; a schedule is HH:MM=RATE,HH:MM=RATE..., such as 08:00=20M,20:00=0 (0 is unlimited)");
        let mut entries: Vec<(Minute, u64)> = Vec::new();
        for entry in text.split(',') {
            let (minute, rate) = entry.split_once('=').ok_or_else(|| wrong(format!("\"{entry}\" is no entry of a schedule")))?;
            let minute: Minute = minute.parse().map_err(wrong)?;
            let rate = parse_rate(rate).map_err(|why| wrong(format!("\"{rate}\": {why}")))?;
            if entries.iter().any(|(other, _)| *other == minute) {
                return Err(wrong(format!("{minute} is there twice")));
            }
            if entries.len() == MOST_ENTRIES {
                return Err(wrong(format!("more than {MOST_ENTRIES} entries")));
            }
            entries.push((minute, rate));
        }
        entries.sort_unstable();
        Ok(Schedule { text: text.to_string(), entries })
    }
}

impl fmt::Display for Schedule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

impl Schedule {
    /// Bytes per second; 0 is unlimited.
    fn speed(&self, now: Timestamp, zone: &TimeZone) -> u64 {
        let minute = Minute::of(now, zone);
        let current = self.entries.iter().rev().find(|(from, _)| *from <= minute);
        current.or(self.entries.last()).map_or(0, |(_, speed)| *speed)
    }
}

/// What is typed for a speed.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Speed {
    /// Bytes per second; 0 is unlimited.
    Fixed(u64),
    /// By the time of day.
    Schedule(Schedule),
}

impl FromStr for Speed {
    type Err = String;

    fn from_str(text: &str) -> Result<Speed, String> {
        if text.contains([':', '=', ',']) { text.parse().map(Speed::Schedule) } else { parse_rate(text).map(Speed::Fixed) }
    }
}

/// A deadline: what was typed, and the instant that was meant.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct FinishBy {
    /// What the clock shows then.
    pub at: Minute,
    /// Seconds since 1970; known once the stream has started.
    pub deadline: Option<i64>,
}

/// What a speed follows.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Plan {
    /// The time of day.
    Schedule(Schedule),
    /// What is left to do.
    FinishBy(FinishBy),
}

impl From<Minute> for Plan {
    fn from(at: Minute) -> Plan {
        Plan::FinishBy(FinishBy { at, deadline: None })
    }
}

impl Plan {
    /// With the deadline that is meant now, unless it was fixed before.
    #[must_use]
    pub(super) fn started(self, now: Timestamp, zone: &TimeZone) -> Plan {
        match self {
            Plan::FinishBy(FinishBy { at, deadline: None }) => {
                Plan::FinishBy(FinishBy { at, deadline: Some(at.next(now, zone).unwrap_or(now).as_second()) })
            }
            plan => plan,
        }
    }
}

/// Facts of the plan that governs a job.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct PlanInfo {
    /// The job.
    pub id: String,
    /// Its schedule, as typed.
    pub schedule: Option<String>,
    /// The time of day of its deadline.
    pub finish_by: Option<String>,
    /// The instant that is meant by that.
    pub deadline: Option<SystemTime>,
    /// Bytes per second, as set by the plan; 0 is unlimited.
    pub speed: u64,
    /// Bytes per second on average until the deadline; `None` once that has passed.
    pub needed: Option<u64>,
    /// Whether it looks as if the deadline will be met; `None` while nobody can tell.
    pub feasible: Option<bool>,
}

/// How far a job has come, and when.
#[derive(Clone, Copy, Debug)]
pub(super) struct Look {
    /// The time of day.
    pub now: Timestamp,
    /// A clock that is never put forward or back.
    pub up: Duration,
    /// Bytes done: dealt with, or copied where there is a forecast.
    pub done: u64,
    /// Bytes left to do, counted likewise.
    pub left: u64,
    /// Bytes are counted that have to be copied, by the forecast of the job: the rest of a sparse disk takes no time.
    pub is_forecast: bool,
    /// It does nothing, by order.
    pub paused: bool,
}

/// What follows from a look.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub(super) struct Order {
    /// Bytes per second; 0 is unlimited.
    pub speed: u64,
    pub needed: Option<u64>,
    pub feasible: Option<bool>,
    /// What people should know now.
    pub news: Option<String>,
}

#[derive(Clone, Copy, Debug)]
struct Sample {
    up: Duration,
    done: u64,
    /// What the speed was from then on.
    speed: u64,
}

/// A plan at work.
#[derive(Clone, Debug)]
pub(super) struct Governor {
    plan: Plan,
    samples: VecDeque<Sample>,
    /// As the samples were counted.
    is_forecast: bool,
    /// How often in a row it was too slow.
    slow: u32,
    feasible: Option<bool>,
    missed: bool,
    last: Order,
}

impl Governor {
    /// Of a plan that has started.
    pub fn new(plan: Plan) -> Governor {
        Governor { plan, samples: VecDeque::new(), is_forecast: false, slow: 0, feasible: None, missed: false, last: Order::default() }
    }

    pub fn plan(&self) -> &Plan {
        &self.plan
    }

    pub fn info(&self, id: &str) -> PlanInfo {
        let (schedule, finish_by) = match &self.plan {
            Plan::Schedule(schedule) => (Some(schedule.to_string()), None),
            Plan::FinishBy(finish_by) => (None, Some(finish_by)),
        };
        let deadline = finish_by.and_then(|finish_by| u64::try_from(finish_by.deadline?).ok());
        PlanInfo {
            id: id.to_string(),
            schedule,
            finish_by: finish_by.map(|finish_by| finish_by.at.to_string()),
            deadline: deadline.and_then(|seconds| SystemTime::UNIX_EPOCH.checked_add(Duration::from_secs(seconds))),
            speed: self.last.speed,
            needed: self.last.needed,
            feasible: self.last.feasible,
        }
    }

    /// What the speed is to be from now on. To be called every [`LOOK`].
    pub fn order(&mut self, look: Look, zone: &TimeZone) -> Order {
        let order = match &self.plan {
            Plan::Schedule(schedule) => Order { speed: schedule.speed(look.now, zone), ..Order::default() },
            Plan::FinishBy(FinishBy { at, deadline }) => {
                let deadline = deadline.and_then(|seconds| Timestamp::from_second(seconds).ok()).unwrap_or(look.now);
                self.by(*at, deadline, look)
            }
        };
        self.last = order.clone();
        order
    }

    fn by(&mut self, at: Minute, deadline: Timestamp, look: Look) -> Order {
        let left = u128::from(look.left);
        let time = u128::try_from(deadline.duration_since(look.now).as_millis()).unwrap_or(0);
        if time == 0 {
            let late = left > 0;
            let news = (late && !self.missed).then(|| format!("the stream is not finished by {at}: it goes on without a limit"));
            self.missed = true;
            self.feasible = Some(!late);
            return Order { speed: 0, needed: None, feasible: self.feasible, news };
        }
        let needed = per_second(left, time);
        let speed = per_second(left * MARGIN / 100, time.saturating_sub(RESERVE).max(time / 2)).max(STREAM_CHUNK);
        let news = self.judge(at, needed, speed, look);
        Order { speed, needed: Some(needed), feasible: self.feasible, news }
    }

    /// Holds what the job does against what it needs.
    fn judge(&mut self, at: Minute, needed: u64, speed: u64, look: Look) -> Option<String> {
        // What was counted in another way cannot be held against this.
        if std::mem::replace(&mut self.is_forecast, look.is_forecast) != look.is_forecast {
            self.samples.clear();
        }
        if look.paused {
            self.samples.clear();
            self.slow = 0;
            return None;
        }
        while self.samples.get(1).is_some_and(|second| look.up.saturating_sub(second.up) >= WINDOW) {
            self.samples.pop_front();
        }
        let measured = self.samples.front().map(|first| (look.up.saturating_sub(first.up), look.done.saturating_sub(first.done)));
        let lowest = self.samples.iter().map(|sample| sample.speed).min().unwrap_or(speed);
        self.samples.push_back(Sample { up: look.up, done: look.done, speed });
        let (time, done) = measured.filter(|(time, _)| *time >= MEASURED)?;
        let rate = per_second(u128::from(done), time.as_millis());
        let below = |most: u64| u128::from(rate) * 100 < u128::from(most) * CLEARLY;
        // What is held back by our own limit could perhaps do more.
        let slow = below(needed) && below(lowest);
        self.slow = if slow { self.slow.saturating_add(1) } else { 0 };
        let before = self.feasible;
        match before {
            Some(false) if rate >= needed => self.feasible = Some(true),
            Some(false) => {}
            _ if self.slow >= LOOKS_IN_A_ROW => self.feasible = Some(false),
            _ if !slow => self.feasible = Some(true),
            _ => {}
        }
        match (before, self.feasible) {
            (None | Some(true), Some(false)) => {
                Some(format!("the stream will not be finished by {at}: it needs {} and runs at {}", in_words(needed), in_words(rate)))
            }
            (Some(false), Some(true)) => Some(format!("the stream is fast enough again to be finished by {at}")),
            _ => None,
        }
    }
}

/// Rounded up, and a speed of QMP.
fn per_second(bytes: u128, milliseconds: u128) -> u64 {
    let rate = bytes.saturating_mul(1000).div_ceil(milliseconds.max(1));
    u64::try_from(rate).unwrap_or(u64::MAX).min(i64::MAX as u64)
}

fn in_words(rate: u64) -> String {
    const MIB: u64 = 1 << 20;
    if rate >= 10 * MIB { format!("{} MiB/s", rate / MIB) } else { format!("{} KiB/s", rate >> 10) }
}
