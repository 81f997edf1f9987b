//! Plans on a clock that the test sets, in a zone whose daylight saving time begins on 2026-03-29
//! at 02:00 and ends on 2026-10-25 at 03:00.

use super::*;

const MIB: u64 = 1 << 20;
const SECOND: Duration = Duration::from_secs(1);

fn zone() -> TimeZone {
    TimeZone::posix("CET-1CEST,M3.5.0,M10.5.0/3").unwrap()
}

fn at(text: &str) -> Timestamp {
    text.parse().unwrap()
}

fn minute(text: &str) -> Minute {
    text.parse().unwrap()
}

#[test]
fn times_of_day_are_written_in_one_way() {
    for text in ["00:00", "06:00", "23:59"] {
        assert_eq!(minute(text).to_string(), text);
    }
    for wrong in [
        "", "24:00", "6:00", "06:0", "06:60", "06", "06:00:00", "+6:00", "06:+1", " 06:00",
        "٠6:00", "-1:00", "06-00",
    ] {
        let error = wrong.parse::<Minute>().unwrap_err();
        assert!(error.contains("HH:MM"), "{wrong:?}: {error}");
    }
}

#[test]
fn speeds_are_rates_or_schedules() {
    assert_eq!("20M".parse(), Ok(Speed::Fixed(20 * MIB)));
    let Speed::Schedule(schedule) = "20:00=0,08:00=20M".parse().unwrap() else {
        panic!("a schedule")
    };
    assert_eq!(schedule.entries, [(minute("08:00"), 20 * MIB), (minute("20:00"), 0)]);
    assert_eq!(schedule.to_string(), "20:00=0,08:00=20M", "as it was typed");
    for wrong in [
        "08:00",
        "08:00=",
        "08:00=20M,",
        ",08:00=20M",
        "08:00=20X",
        "8=20M",
        "24:00=0",
        "08:00=1,08:00=2",
        "08:00=1=2",
        "08:00=-1",
        "=1",
    ] {
        let error = wrong.parse::<Speed>().unwrap_err();
        assert!(error.contains("08:00=20M,20:00=0"), "{wrong:?}: {error}");
    }
    let many: Vec<String> = (0..60).map(|minute| format!("01:{minute:02}=1")).collect();
    assert!(many[..MOST_ENTRIES].join(",").parse::<Schedule>().is_ok());
    assert!(many.join(",").parse::<Schedule>().unwrap_err().contains("more than"));
}

/// Protects: at every minute of a week in which the clock is changed, in spring and in autumn, the
/// schedule gives the speed for the local time.
#[test]
fn a_schedule_follows_the_clock_on_the_wall() {
    let schedule: Schedule = "08:00=1,20:00=2,02:30=3".parse().unwrap();
    for start in ["2026-03-26T00:00:00Z", "2026-10-22T00:00:00Z"] {
        let start = at(start);
        let mut seen = std::collections::BTreeSet::new();
        for passed in 0..7 * 24 * 60 {
            let now = start + jiff::SignedDuration::from_mins(passed);
            let local = now.to_zoned(zone());
            let shown = (local.hour(), local.minute());
            let want = match shown {
                (hour, _) if hour >= 20 => 2,
                (hour, _) if hour >= 8 => 1,
                shown if shown >= (2, 30) => 3,
                _ => 2,
            };
            assert_eq!(schedule.speed(now, &zone()), want, "{local}");
            seen.insert(want);
        }
        assert_eq!(seen.len(), 3);
    }
    let one: Schedule = "08:00=7".parse().unwrap();
    assert_eq!(
        one.speed(at("2026-01-01T00:00:00Z"), &zone()),
        7,
        "before the first entry of the day: the last one"
    );
}

#[test]
fn a_deadline_is_the_next_such_moment() {
    for (now, by, want) in [
        ("2026-01-10T12:00:00Z", "14:00", "2026-01-10T13:00:00Z"),
        ("2026-01-10T12:00:00Z", "13:00", "2026-01-11T12:00:00Z"), // it is 13:00 now: tomorrow
        ("2026-01-10T12:00:00Z", "06:00", "2026-01-11T05:00:00Z"),
        ("2026-12-31T22:59:59Z", "00:00", "2026-12-31T23:00:00Z"),
        // A night of 23 hours, and one of 25.
        ("2026-03-28T22:00:00Z", "06:00", "2026-03-29T04:00:00Z"),
        ("2026-10-24T21:00:00Z", "06:00", "2026-10-25T05:00:00Z"),
        // A time that is skipped: later by as much as the clock was put forward, once on that day.
        ("2026-03-29T00:00:00Z", "02:30", "2026-03-29T01:30:00Z"),
        ("2026-03-29T01:30:00Z", "02:30", "2026-03-30T00:30:00Z"),
        // A time that occurs twice: the first instant; between the two, the second.
        ("2026-10-24T23:00:00Z", "02:30", "2026-10-25T00:30:00Z"),
        ("2026-10-25T00:30:00Z", "02:30", "2026-10-25T01:30:00Z"),
        ("2026-10-25T01:30:00Z", "02:30", "2026-10-26T01:30:00Z"),
    ] {
        assert_eq!(minute(by).next(at(now), &zone()), Some(at(want)), "{by} after {now}");
    }
    // A plan that has started keeps its instant in another zone and at a later date.
    let now = at("2026-01-10T12:00:00Z");
    let started = Plan::from(minute("14:00")).started(now, &zone());
    assert_eq!(started.clone().started(at("2026-05-01T00:00:00Z"), &TimeZone::UTC), started);
    assert_eq!(
        Governor::new(started).info("j").deadline,
        Some(SystemTime::from(at("2026-01-10T13:00:00Z")))
    );
}

/// A job with a deadline on a disk of a given rate, under a governor.
struct World {
    governor: Governor,
    start: Timestamp,
    up: Duration,
    offset: u64,
    len: u64,
    news: Vec<String>,
}

impl World {
    /// A job of `len` bytes that has 30 minutes until its deadline.
    fn new(len: u64) -> World {
        let start = at("2026-01-10T12:30:00Z");
        let governor = Governor::new(Plan::from(minute("14:00")).started(start, &zone()));
        World { governor, start, up: Duration::ZERO, offset: 0, len, news: Vec::new() }
    }

    fn order(&mut self, paused: bool) -> SpeedOrder {
        let now = self.start + jiff::SignedDuration::try_from(self.up).unwrap();
        let order = self.governor.order(
            PlanView {
                now,
                up: self.up,
                done: self.offset,
                left: self.len - self.offset,
                is_forecast: false,
                paused,
            },
            &zone(),
        );
        self.news.extend(order.news.clone());
        order
    }

    /// Passes `time`, in which the disk gives at most `most` bytes per second.
    fn run(&mut self, time: Duration, most: u64) -> SpeedOrder {
        let end = self.up + time;
        let mut order = self.order(false);
        while self.up < end && self.offset < self.len {
            let speed = if order.speed == 0 { most } else { order.speed.min(most) };
            self.offset = self.len.min(self.offset + speed * LOOK.as_secs());
            self.up += LOOK;
            order = self.order(false);
        }
        order
    }
}

#[test]
fn a_deadline_has_the_speed_that_it_needs() {
    let mut world = World::new(18_000 * MIB);
    let order = world.order(false);
    assert_eq!(order.needed, Some(10 * MIB));
    assert_eq!(order.speed, (18_000 * MIB * 105 / 100).div_ceil(1770));
    // The job does not use a fast disk beyond the speed it needs, and it makes up for a slow phase.
    world.run(300 * SECOND, 1000 * MIB);
    assert!((3000 * MIB..3400 * MIB).contains(&world.offset), "{}", world.offset);
    let order = world.run(300 * SECOND, 8 * MIB);
    assert!(order.needed.is_some_and(|needed| needed > 10 * MIB), "{order:?}");
    let order = world.run(1200 * SECOND, 1000 * MIB);
    assert_eq!(world.offset, world.len);
    assert!(world.up < 1800 * SECOND, "{:?}", world.up);
    assert_eq!(order.feasible, Some(true));
}

#[test]
fn a_little_has_the_lowest_speed_and_an_endless_lot_the_highest() {
    assert_eq!(World::new(MIB).order(false).speed, STREAM_CHUNK);
    assert_eq!(World::new(0).order(false).speed, STREAM_CHUNK);
    let mut endless = World::new(u64::MAX);
    endless.up = Duration::from_millis(1_799_999);
    assert_eq!(endless.order(false).speed, i64::MAX as u64);
}

#[test]
fn who_cannot_says_so_once_and_once_when_he_can_again() {
    let mut world = World::new(18_000 * MIB);
    assert_eq!(world.run(8 * SECOND, 5 * MIB).feasible, None, "nobody can tell yet");
    let order = world.run(60 * SECOND, 5 * MIB);
    assert_eq!(order.feasible, Some(false));
    world.run(200 * SECOND, 5 * MIB);
    assert_eq!(world.news.len(), 1, "{:?}", world.news);
    assert!(
        world.news[0].starts_with(
            "the stream will not be finished by 14:00: it needs 10 MiB/s and runs at 5120 KiB/s"
        ),
        "{:?}",
        world.news
    );
    let order = world.run(100 * SECOND, 100 * MIB);
    assert_eq!((order.feasible, world.news.len()), (Some(true), 2), "{:?}", world.news);
    assert!(world.news[1].contains("fast enough again"), "{:?}", world.news);
}

#[test]
fn a_disk_that_is_a_little_slow_for_a_moment_is_no_news() {
    let mut world = World::new(18_000 * MIB);
    for _ in 0..10 {
        world.run(4 * SECOND, MIB);
        world.run(60 * SECOND, 20 * MIB);
    }
    assert_eq!(world.news, Vec::<String>::new());
}

#[test]
fn a_job_that_is_paused_or_held_back_by_us_is_not_late() {
    let mut world = World::new(18_000 * MIB);
    world.run(60 * SECOND, 100 * MIB);
    for _ in 0..300 {
        world.up += LOOK;
        assert_eq!(world.order(true).news, None);
    }
    // The pause has cost ten minutes, so the job resumes at once at a higher speed.
    let order = world.run(60 * SECOND, 1000 * MIB);
    assert_eq!((order.feasible, world.news.len()), (Some(true), 0));
    assert!(order.speed > 15 * MIB, "{order:?}");
}

#[test]
fn after_the_deadline_there_is_no_limit() {
    let mut world = World::new(18_000 * MIB);
    world.run(1798 * SECOND, 9 * MIB);
    world.news.clear();
    world.up = 1800 * SECOND;
    for _ in 0..3 {
        let order = world.order(false);
        assert_eq!((order.speed, order.needed, order.feasible), (0, None, Some(false)));
        world.up += LOOK;
    }
    assert_eq!(world.news, ["the stream is not finished by 14:00: it goes on without a limit"]);
    // A stream that is resumed after its deadline has no limit either.
    let mut late = World::new(MIB);
    late.up = 86_400 * SECOND;
    assert_eq!(late.order(false).speed, 0);
}
