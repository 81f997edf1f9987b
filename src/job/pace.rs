//! How fast a job is at present. Pure: the time is an argument.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

/// What counts as the present: long enough to be a steady number for a job that sleeps between chunks.
const WINDOW: Duration = Duration::from_secs(5);
/// Distance of samples: few of them, and the window's edge moves in small steps.
const STEP: Duration = Duration::from_millis(250);

/// Where a job was at some moments of the last few seconds.
#[derive(Debug, Default)]
pub(super) struct Pace {
    samples: VecDeque<Sample>,
}

#[derive(Clone, Copy, Debug)]
struct Sample {
    at: Instant,
    moved: u64,
}

impl Pace {
    /// The job has moved so many bytes by now.
    pub fn note(&mut self, now: Instant, moved: u64) {
        if self.samples.back().is_some_and(|last| now < last.at + STEP) {
            return;
        }
        // One that is older than the window stays: a job that sleeps longer than a moment between chunks has a rate all the time.
        while self.samples.get(1).is_some_and(|second| second.at + WINDOW <= now) {
            self.samples.pop_front();
        }
        self.samples.push_back(Sample { at: now, moved });
    }

    /// Bytes moved per second.
    pub fn rate(&self, now: Instant, moved: u64) -> u64 {
        let Some((since, elapsed)) = self.since(now) else { return 0 };
        let rate = u128::from(moved - since.moved) * Duration::from_secs(1).as_nanos() / elapsed.as_nanos();
        u64::try_from(rate).unwrap_or(u64::MAX)
    }

    /// How long it takes to move `left` bytes more if it goes on like this; `None` if it does not go on.
    pub fn remaining(&self, now: Instant, moved: u64, left: u64) -> Option<Duration> {
        let (since, elapsed) = self.since(now)?;
        let done = u128::from(moved - since.moved);
        let nanoseconds = (u128::from(left) * elapsed.as_nanos()).checked_div(done)?;
        Some(u64::try_from(nanoseconds).map_or(Duration::MAX, Duration::from_nanos))
    }

    /// The newest sample that is as old as the window, or the oldest there is, and how long ago that was. Nothing in the first moment: the burst with which a
    /// limited job begins is no rate, and what it would promise is wrong.
    fn since(&self, now: Instant) -> Option<(Sample, Duration)> {
        let present = self.samples.iter().rev().find(|sample| sample.at + WINDOW <= now).or(self.samples.front())?;
        let elapsed = now.saturating_duration_since(present.at);
        (elapsed >= STEP).then_some((*present, elapsed))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    #[test]
    fn the_rate_is_that_of_the_last_seconds() {
        let (mut pace, begin) = (Pace::default(), Instant::now());
        assert_eq!((pace.rate(begin, 0), pace.remaining(begin, 0, 1)), (0, None), "nothing is known yet");
        let mut now = begin;
        let mut moved = 0;
        // 5 MiB/s for a minute; then half a MiB/s.
        for tick in 0..700 {
            pace.note(now, moved);
            now += Duration::from_millis(100);
            moved += if tick < 600 { MIB / 2 } else { MIB / 20 };
            if tick == 500 {
                assert_eq!(pace.rate(now, moved), 5 * MIB);
                assert_eq!(pace.remaining(now, moved, 50 * MIB), Some(Duration::from_secs(10)));
                assert_eq!(pace.remaining(now, moved, 0), Some(Duration::ZERO));
            }
        }
        let rate = pace.rate(now, moved);
        assert!(rate.abs_diff(MIB / 2) < 100, "{rate}");
        assert!(pace.samples.len() < 30);
    }

    #[test]
    fn who_stands_still_has_no_rate_and_no_end() {
        let (mut pace, begin) = (Pace::default(), Instant::now());
        pace.note(begin, 0);
        pace.note(begin + Duration::from_secs(1), 8 * MIB);
        let later = begin + Duration::from_secs(60);
        assert_eq!((pace.rate(later, 8 * MIB), pace.remaining(later, 8 * MIB, MIB)), (0, None));
        assert_eq!(pace.rate(begin + STEP, u64::MAX), u64::MAX, "more than a number can hold");
    }

    #[test]
    fn a_job_that_sleeps_between_chunks_has_a_rate_all_the_time() {
        let (mut pace, begin) = (Pace::default(), Instant::now());
        // A MiB every four seconds.
        for tick in 0..40_u32 {
            let now = begin + Duration::from_secs(1) * tick;
            let moved = u64::from(tick / 4) * MIB;
            if tick.is_multiple_of(4) {
                pace.note(now, moved);
            }
            if tick > 8 {
                let rate = pace.rate(now + STEP, moved);
                assert!((MIB / 9..=MIB / 2).contains(&rate), "{tick}: {rate}");
                assert!(pace.remaining(now + STEP, moved, MIB).is_some(), "{tick}");
            }
        }
    }

    #[test]
    fn the_burst_at_the_start_is_no_rate() {
        let (mut pace, begin) = (Pace::default(), Instant::now());
        pace.note(begin, 0);
        let soon = begin + STEP / 2;
        assert_eq!((pace.rate(soon, 8 * MIB), pace.remaining(soon, 8 * MIB, MIB)), (0, None));
        assert_eq!(pace.rate(begin + STEP, 8 * MIB), 32 * MIB);
    }
}
