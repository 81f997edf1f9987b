//! Estimate of the current rate of a job. Pure: the time is an argument.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

/// Time over which the rate is measured: long enough for a steady number if the job sleeps between
/// chunks.
const WINDOW: Duration = Duration::from_secs(5);
/// Least distance of two samples. It bounds their number, and the start of the window still moves
/// in small steps.
const STEP: Duration = Duration::from_millis(250);

/// Samples of a job's work over the last few seconds.
#[derive(Clone, Debug, Default)]
pub(super) struct RateEstimate {
    samples: VecDeque<RateSample>,
}

#[derive(Clone, Copy, Debug)]
struct RateSample {
    at: Instant,
    moved: u64,
}

impl RateEstimate {
    /// Records that the job has moved `moved` bytes by `now`.
    pub fn note(&mut self, now: Instant, moved: u64) {
        if self.samples.back().is_some_and(|last| now < last.at + STEP) {
            return;
        }
        // One sample older than the window is kept, so that a job which sleeps for longer than the
        // window between two chunks still has a rate.
        while self.samples.get(1).is_some_and(|second| second.at + WINDOW <= now) {
            self.samples.pop_front();
        }
        self.samples.push_back(RateSample { at: now, moved });
    }

    /// Returns the bytes moved per second.
    pub fn rate(&self, now: Instant, moved: u64) -> u64 {
        let Some((since, elapsed)) = self.since(now) else { return 0 };
        let rate = u128::from(moved - since.moved) * Duration::from_secs(1).as_nanos()
            / elapsed.as_nanos();
        u64::try_from(rate).unwrap_or(u64::MAX)
    }

    /// Returns the time that `left` more bytes take at the current rate; `None` if the rate is 0 or
    /// unknown.
    pub fn remaining(&self, now: Instant, moved: u64, left: u64) -> Option<Duration> {
        let (since, elapsed) = self.since(now)?;
        let done = u128::from(moved - since.moved);
        let nanoseconds = (u128::from(left) * elapsed.as_nanos()).checked_div(done)?;
        Some(u64::try_from(nanoseconds).map_or(Duration::MAX, Duration::from_nanos))
    }

    /// Returns the newest sample that is at least as old as the window, or the oldest sample,
    /// together with its age. `None` in the first moments of a job: a limited job begins with a
    /// burst, which would give a wrong estimate.
    fn since(&self, now: Instant) -> Option<(RateSample, Duration)> {
        let present = self
            .samples
            .iter()
            .rev()
            .find(|sample| sample.at + WINDOW <= now)
            .or(self.samples.front())?;
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
        let (mut estimate, begin) = (RateEstimate::default(), Instant::now());
        assert_eq!(
            (estimate.rate(begin, 0), estimate.remaining(begin, 0, 1)),
            (0, None),
            "nothing is known yet"
        );
        let mut now = begin;
        let mut moved = 0;
        // 5 MiB/s for a minute, then half a MiB/s.
        for tick in 0..700 {
            estimate.note(now, moved);
            now += Duration::from_millis(100);
            moved += if tick < 600 { MIB / 2 } else { MIB / 20 };
            if tick == 500 {
                assert_eq!(estimate.rate(now, moved), 5 * MIB);
                assert_eq!(estimate.remaining(now, moved, 50 * MIB), Some(Duration::from_secs(10)));
                assert_eq!(estimate.remaining(now, moved, 0), Some(Duration::ZERO));
            }
        }
        let rate = estimate.rate(now, moved);
        assert!(rate.abs_diff(MIB / 2) < 100, "{rate}");
        assert!(estimate.samples.len() < 30);
    }

    #[test]
    fn who_stands_still_has_no_rate_and_no_end() {
        let (mut estimate, begin) = (RateEstimate::default(), Instant::now());
        estimate.note(begin, 0);
        estimate.note(begin + Duration::from_secs(1), 8 * MIB);
        let later = begin + Duration::from_secs(60);
        assert_eq!(
            (estimate.rate(later, 8 * MIB), estimate.remaining(later, 8 * MIB, MIB)),
            (0, None)
        );
        assert_eq!(estimate.rate(begin + STEP, u64::MAX), u64::MAX, "more than a number can hold");
    }

    #[test]
    fn a_job_that_sleeps_between_chunks_has_a_rate_all_the_time() {
        let (mut estimate, begin) = (RateEstimate::default(), Instant::now());
        // One MiB every four seconds.
        for tick in 0..40_u32 {
            let now = begin + Duration::from_secs(1) * tick;
            let moved = u64::from(tick / 4) * MIB;
            if tick.is_multiple_of(4) {
                estimate.note(now, moved);
            }
            if tick > 8 {
                let rate = estimate.rate(now + STEP, moved);
                assert!((MIB / 9..=MIB / 2).contains(&rate), "{tick}: {rate}");
                assert!(estimate.remaining(now + STEP, moved, MIB).is_some(), "{tick}");
            }
        }
    }

    #[test]
    fn the_burst_at_the_start_is_no_rate() {
        let (mut estimate, begin) = (RateEstimate::default(), Instant::now());
        estimate.note(begin, 0);
        let soon = begin + STEP / 2;
        assert_eq!(
            (estimate.rate(soon, 8 * MIB), estimate.remaining(soon, 8 * MIB, MIB)),
            (0, None)
        );
        assert_eq!(estimate.rate(begin + STEP, 8 * MIB), 32 * MIB);
    }
}
