//! Plans that set the speed of a stream: a schedule by the time of day, or a deadline. Pure: the
//! time and the progress of the job are arguments.
//!
//! ```text
//! schedule   08:00=20M,20:00=0    speed of the latest entry at or before the local time;
//!                                 before the first entry of the day, that of the last
//! deadline   06:00                bytes left / time left, plus a margin, anew at every look;
//!                                 after the deadline, no limit
//! ```
//! Local time includes daylight saving time. A schedule treats both passes of an hour that occurs
//! twice alike. A deadline in such an hour is the first of the two instants that is still to come.
//! A deadline in an hour that is skipped is later by as much as the clock was put forward.
//!
//! **Invariants:** a deadline becomes an instant when the stream starts. So it is the same for a
//! stream that is resumed in another time zone or after the deadline. A job is reported as late
//! only from its measured rate over [`MEASURED`], while it was neither paused nor held back by our
//! own limit.

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

/// How often the speed is recomputed. A change of a schedule is late by at most this, and the speed
/// for a deadline stays close to what it needs.
pub const LOOK: Duration = Duration::from_secs(2);
/// Speed for a deadline, in hundredths of the speed needed: makes up for short slowdowns by the
/// guest or a slow disk.
const MARGIN: u128 = 105;
/// Milliseconds before the deadline at which the job aims to finish. The bytes left are divided by
/// the time left at every look, so a job that aimed at the deadline itself would finish only in the
/// last moment.
const RESERVE: u128 = 30_000;
/// The rate of the job is measured over at most this time.
const WINDOW: Duration = Duration::from_secs(30);
/// The rate of the job is measured over at least this time, because a job at the lowest speed needs
/// a second for each step.
const MEASURED: Duration = Duration::from_secs(10);
/// A job is too slow if its rate is below this many hundredths of the rate needed in
/// `LOOKS_IN_A_ROW` consecutive looks.
const CLEARLY: u128 = 80;
const LOOKS_IN_A_ROW: u32 = 5;
/// The most entries of a schedule: more than a user types, and few enough for the note beside the
/// image.
const MOST_ENTRIES: usize = 48;
const MINUTES_OF_A_DAY: u16 = 24 * 60;

/// A minute of the day, in local time.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub struct Minute(u16);

impl FromStr for Minute {
    type Err = String;

    fn from_str(text: &str) -> Result<Minute, String> {
        let number = |text: &str| {
            text.bytes()
                .all(|digit| digit.is_ascii_digit())
                .then(|| text.parse::<u16>().ok())
                .flatten()
        };
        let minute = match text.split_once(':') {
            Some((hour, minute)) if hour.len() == 2 && minute.len() == 2 => {
                number(hour).zip(number(minute))
            }
            _ => None,
        };
        let minute = minute
            .filter(|(hour, minute)| *hour < 24 && *minute < 60)
            .map(|(hour, minute)| Minute(hour * 60 + minute));
        minute.ok_or_else(|| {
            format!(
                "\"{text}\" is no time of day; expected HH:MM from 00:00 to 23:59, such as 06:00"
            )
        })
    }
}

impl fmt::Display for Minute {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:02}:{:02}", self.0 / 60, self.0 % 60)
    }
}

impl Minute {
    /// Returns the local time of `now`, without seconds.
    fn of(now: Timestamp, zone: &TimeZone) -> Minute {
        let local = now.to_zoned(zone.clone());
        Minute(
            (local.hour().unsigned_abs() as u16 * 60 + local.minute().unsigned_abs() as u16)
                .min(MINUTES_OF_A_DAY - 1),
        )
    }

    /// Returns the next instant after `now` at which the local time is this minute; `None` if jiff
    /// cannot represent it.
    fn next(self, now: Timestamp, zone: &TimeZone) -> Option<Timestamp> {
        let time = Time::new((self.0 / 60) as i8, (self.0 % 60) as i8, 0, 0).ok()?;
        let mut day = now.to_zoned(zone.clone()).date();
        // A change of the date line can skip one day, but never two, so three days are enough.
        for _ in 0..3 {
            if let Some(next) =
                moments(day, time, zone).into_iter().flatten().find(|moment| *moment > now)
            {
                return Some(next);
            }
            day = day.tomorrow().ok()?;
        }
        None
    }
}

/// Returns the instants at which the local time is `time` on `day`: one, or two if the clock is put
/// back. If the clock is put forward over `time`, the instant is later by the same amount.
fn moments(day: Date, time: Time, zone: &TimeZone) -> [Option<Timestamp>; 2] {
    let local = zone.to_ambiguous_timestamp(day.to_datetime(time));
    match local.offset() {
        AmbiguousOffset::Fold { .. } => [local.earlier().ok(), local.later().ok()],
        AmbiguousOffset::Gap { .. } | AmbiguousOffset::Unambiguous { .. } => {
            [local.compatible().ok(), None]
        }
    }
}

/// Speeds by the time of day.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Schedule {
    /// The text that the user typed.
    text: String,
    /// Start and bytes per second of each entry, sorted by start; never empty.
    entries: Vec<(Minute, u64)>,
}

impl FromStr for Schedule {
    type Err = String;

    fn from_str(text: &str) -> Result<Schedule, String> {
        let wrong = |why: String| {
            format!(
                "{why}; a schedule is HH:MM=RATE,HH:MM=RATE..., such as 08:00=20M,20:00=0 (0 is unlimited)"
            )
        };
        let mut entries: Vec<(Minute, u64)> = Vec::new();
        for entry in text.split(',') {
            let (minute, rate) = entry
                .split_once('=')
                .ok_or_else(|| wrong(format!("\"{entry}\" is no entry of a schedule")))?;
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
    /// Returns the speed at `now` in bytes per second; 0 is unlimited.
    fn speed(&self, now: Timestamp, zone: &TimeZone) -> u64 {
        let minute = Minute::of(now, zone);
        let current = self.entries.iter().rev().find(|(from, _)| *from <= minute);
        current.or(self.entries.last()).map_or(0, |(_, speed)| *speed)
    }
}

/// A speed as a user types it.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Speed {
    /// Bytes per second; 0 is unlimited.
    Fixed(u64),
    /// Speeds by the time of day.
    Schedule(Schedule),
}

impl FromStr for Speed {
    type Err = String;

    fn from_str(text: &str) -> Result<Speed, String> {
        if text.contains([':', '=', ',']) {
            text.parse().map(Speed::Schedule)
        } else {
            parse_rate(text).map(Speed::Fixed)
        }
    }
}

/// A deadline: the time of day that the user typed, and the instant it stands for.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct FinishBy {
    /// Local time of the deadline.
    pub at: Minute,
    /// Seconds since 1970; `None` until the stream has started.
    pub deadline: Option<i64>,
}

/// The rule that sets a speed.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Plan {
    /// The speed follows the time of day.
    Schedule(Schedule),
    /// The speed follows the work and the time left.
    FinishBy(FinishBy),
}

impl From<Minute> for Plan {
    fn from(at: Minute) -> Plan {
        Plan::FinishBy(FinishBy { at, deadline: None })
    }
}

impl Plan {
    /// Returns the plan with its deadline as an instant. An instant that was set before is kept.
    #[must_use]
    pub(super) fn started(self, now: Timestamp, zone: &TimeZone) -> Plan {
        match self {
            Plan::FinishBy(FinishBy { at, deadline: None }) => Plan::FinishBy(FinishBy {
                at,
                deadline: Some(at.next(now, zone).unwrap_or(now).as_second()),
            }),
            plan => plan,
        }
    }
}

/// State of the plan that governs a job.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct PlanInfo {
    /// Id of the job.
    pub id: String,
    /// Schedule, as typed.
    pub schedule: Option<String>,
    /// Deadline as a time of day.
    pub finish_by: Option<String>,
    /// Deadline as an instant.
    pub deadline: Option<SystemTime>,
    /// Bytes per second that the plan has set; 0 is unlimited.
    pub speed: u64,
    /// Average bytes per second needed until the deadline; `None` after the deadline.
    pub needed: Option<u64>,
    /// Whether the job is expected to meet the deadline; `None` until the rate was measured.
    pub feasible: Option<bool>,
}

/// Progress of a job at one moment.
#[derive(Clone, Copy, Debug)]
pub(super) struct PlanView {
    /// Wall-clock time.
    pub now: Timestamp,
    /// Monotonic clock.
    pub up: Duration,
    /// Bytes done: copied or zeroed if there is a forecast, otherwise passed.
    pub done: u64,
    /// Bytes left, counted in the same way as `done`.
    pub left: u64,
    /// `done` and `left` come from the job's forecast and count only bytes that have to be copied.
    /// The rest of a sparse disk takes no time.
    pub is_forecast: bool,
    /// The job is paused by a user.
    pub paused: bool,
}

/// Result of a look.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub(super) struct SpeedOrder {
    /// Bytes per second; 0 is unlimited.
    pub speed: u64,
    pub needed: Option<u64>,
    pub feasible: Option<bool>,
    /// A message for the log, if there is something new to report.
    pub news: Option<String>,
}

#[derive(Clone, Copy, Debug)]
struct ProgressSample {
    up: Duration,
    done: u64,
    /// Speed that was set at this sample, in bytes per second.
    speed: u64,
}

/// Applies a plan to a job and judges whether the job meets its deadline.
#[derive(Clone, Debug)]
pub(super) struct Governor {
    plan: Plan,
    samples: VecDeque<ProgressSample>,
    /// Value of [`PlanView::is_forecast`] for the samples.
    is_forecast: bool,
    /// Number of consecutive looks at which the job was too slow.
    slow: u32,
    feasible: Option<bool>,
    missed: bool,
    last: SpeedOrder,
}

impl Governor {
    /// Creates a governor of a plan that has started.
    pub fn new(plan: Plan) -> Governor {
        Governor {
            plan,
            samples: VecDeque::new(),
            is_forecast: false,
            slow: 0,
            feasible: None,
            missed: false,
            last: SpeedOrder::default(),
        }
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
            deadline: deadline.and_then(|seconds| {
                SystemTime::UNIX_EPOCH.checked_add(Duration::from_secs(seconds))
            }),
            speed: self.last.speed,
            needed: self.last.needed,
            feasible: self.last.feasible,
        }
    }

    /// Returns the speed that the job should have from now on. To be called every [`LOOK`].
    pub fn order(&mut self, look: PlanView, zone: &TimeZone) -> SpeedOrder {
        let order = match &self.plan {
            Plan::Schedule(schedule) => {
                SpeedOrder { speed: schedule.speed(look.now, zone), ..SpeedOrder::default() }
            }
            Plan::FinishBy(FinishBy { at, deadline }) => {
                let deadline = deadline
                    .and_then(|seconds| Timestamp::from_second(seconds).ok())
                    .unwrap_or(look.now);
                self.by(*at, deadline, look)
            }
        };
        self.last = order.clone();
        order
    }

    fn by(&mut self, at: Minute, deadline: Timestamp, look: PlanView) -> SpeedOrder {
        let left = u128::from(look.left);
        let time = u128::try_from(deadline.duration_since(look.now).as_millis()).unwrap_or(0);
        if time == 0 {
            let late = left > 0;
            let news = (late && !self.missed)
                .then(|| format!("the stream is not finished by {at}: it goes on without a limit"));
            self.missed = true;
            self.feasible = Some(!late);
            return SpeedOrder { speed: 0, needed: None, feasible: self.feasible, news };
        }
        let needed = per_second(left, time);
        let speed = per_second(left * MARGIN / 100, time.saturating_sub(RESERVE).max(time / 2))
            .max(STREAM_CHUNK);
        let news = self.judge(at, needed, speed, look);
        SpeedOrder { speed, needed: Some(needed), feasible: self.feasible, news }
    }

    /// Compares the measured rate with the rate needed; returns a message if the verdict changes.
    fn judge(&mut self, at: Minute, needed: u64, speed: u64, look: PlanView) -> Option<String> {
        // Samples that count other bytes cannot be compared with this look.
        if std::mem::replace(&mut self.is_forecast, look.is_forecast) != look.is_forecast {
            self.samples.clear();
        }
        if look.paused {
            self.samples.clear();
            self.slow = 0;
            return None;
        }
        while self.samples.get(1).is_some_and(|second| look.up.saturating_sub(second.up) >= WINDOW)
        {
            self.samples.pop_front();
        }
        let measured = self
            .samples
            .front()
            .map(|first| (look.up.saturating_sub(first.up), look.done.saturating_sub(first.done)));
        let lowest = self.samples.iter().map(|sample| sample.speed).min().unwrap_or(speed);
        self.samples.push_back(ProgressSample { up: look.up, done: look.done, speed });
        let (time, done) = measured.filter(|(time, _)| *time >= MEASURED)?;
        let rate = per_second(u128::from(done), time.as_millis());
        let below = |most: u64| u128::from(rate) * 100 < u128::from(most) * CLEARLY;
        // A job at our own speed limit may be able to go faster, so it is not too slow.
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
            (None | Some(true), Some(false)) => Some(format!(
                "the stream will not be finished by {at}: it needs {} and runs at {}",
                in_words(needed),
                in_words(rate)
            )),
            (Some(false), Some(true)) => {
                Some(format!("the stream is fast enough again to be finished by {at}"))
            }
            _ => None,
        }
    }
}

/// Returns bytes per second, rounded up and capped at `i64::MAX`, the highest speed in QMP.
fn per_second(bytes: u128, milliseconds: u128) -> u64 {
    let rate = bytes.saturating_mul(1000).div_ceil(milliseconds.max(1));
    u64::try_from(rate).unwrap_or(u64::MAX).min(i64::MAX as u64)
}

fn in_words(rate: u64) -> String {
    const MIB: u64 = 1 << 20;
    if rate >= 10 * MIB { format!("{} MiB/s", rate / MIB) } else { format!("{} KiB/s", rate >> 10) }
}
