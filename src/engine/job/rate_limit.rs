//! Rate limit of a job. Pure: the time is an argument.

use std::time::{Duration, Instant};

/// Length of a slice (QEMU `BLOCK_JOB_SLICE_TIME`): short enough that a limited job runs smoothly,
/// long enough that a slice of a usual speed holds a whole chunk.
const SLICE: Duration = Duration::from_millis(100);
/// Slices per second.
const SLICES_PER_SECOND: u64 = 10;
/// The longest delay: far beyond the life of any process, and small enough to be added to an
/// [`Instant`].
const LONGEST: Duration = Duration::from_secs(100 * 365 * 24 * 3600);

/// QEMU's limiter (`include/qemu/ratelimit.h`). Bytes are charged after they were processed, so the
/// first chunk of each slice does not wait. A slice takes at most its quota plus one chunk. An
/// excess lengthens the slice, so the average speed is exact in the long run.
#[derive(Clone, Debug, Default)]
pub struct RateLimit {
    /// Bytes per slice; 0 is unlimited.
    quota: u64,
    /// Bytes charged in this slice.
    dispatched: u64,
    /// Start and end of the current slice; the end moves later if the slice took more than its
    /// quota.
    slice: Option<(Instant, Instant)>,
}

impl RateLimit {
    /// Creates a limiter for `bytes_per_second`; 0 is unlimited.
    pub fn new(bytes_per_second: u64) -> Self {
        let mut limit = RateLimit::default();
        limit.set_speed(bytes_per_second);
        limit
    }

    /// Changes the speed in bytes per second; 0 is unlimited. Bytes charged in the current slice
    /// stay charged, against the new quota.
    pub fn set_speed(&mut self, bytes_per_second: u64) {
        self.quota =
            if bytes_per_second == 0 { 0 } else { (bytes_per_second / SLICES_PER_SECOND).max(1) };
    }

    /// Charges `bytes` that were just processed.
    pub fn charge(&mut self, bytes: u64, now: Instant) {
        self.account(bytes, now);
    }

    /// Returns the delay before the next chunk; `None` for no delay.
    pub fn delay(&mut self, now: Instant) -> Option<Duration> {
        self.account(0, now)
    }

    fn account(&mut self, bytes: u64, now: Instant) -> Option<Duration> {
        if self.quota == 0 {
            return None;
        }
        let start = match self.slice {
            Some((start, end)) if end >= now => start,
            ended => {
                // Sleeps always end a little late. A delay of up to one slice is made up for,
                // unlike in QEMU, whose jobs are slower than their speed on a busy host.
                let start =
                    ended.map(|(_, end)| end).filter(|&end| now < end + SLICE).unwrap_or(now);
                self.dispatched = 0;
                self.slice = Some((start, start + SLICE));
                start
            }
        };
        self.dispatched = self.dispatched.saturating_add(bytes);
        if self.dispatched < self.quota {
            return None;
        }
        let nanos = u128::from(self.dispatched) * SLICE.as_nanos() / u128::from(self.quota);
        let length = u64::try_from(nanos).map_or(LONGEST, Duration::from_nanos).min(LONGEST);
        let end = start + length;
        self.slice = Some((start, end));
        Some(end.saturating_duration_since(now)).filter(|delay| !delay.is_zero())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const CHUNK: u64 = 512 * 1024;

    /// Runs chunks of [`CHUNK`] on a simulated clock on which every sleep ends `late`. Returns the
    /// bytes processed in `length`.
    fn run(limit: &mut RateLimit, begin: Instant, length: Duration, late: Duration) -> u64 {
        let (mut now, mut done) = (begin, 0);
        loop {
            if let Some(delay) = limit.delay(now) {
                now += delay + late;
            } else {
                done += CHUNK;
                now += Duration::from_micros(100); // the copy itself
                limit.charge(CHUNK, now);
            }
            if now >= begin + length {
                return done;
            }
        }
    }

    #[test]
    fn unlimited_never_waits() {
        let (mut limit, now) = (RateLimit::new(0), Instant::now());
        for _ in 0..1000 {
            limit.charge(u64::MAX, now);
            assert_eq!(limit.delay(now), None);
        }
    }

    /// Protects: at `speed: 1` a job copies one chunk and then sleeps 14.6 hours, on which iotest
    /// 141 relies.
    #[test]
    fn speed_one_copies_exactly_one_chunk() {
        let (mut limit, now) = (RateLimit::new(1), Instant::now());
        assert_eq!(limit.delay(now), None, "the first chunk is free");
        limit.charge(CHUNK, now);
        assert_eq!(limit.delay(now), Some(Duration::from_millis(CHUNK * 100)));
    }

    #[test]
    fn the_long_run_meets_the_speed_and_a_slice_overshoots_by_one_chunk_at_most() {
        for speed in [CHUNK / 3, CHUNK, 5 * CHUNK, 10 * CHUNK, 64 * CHUNK] {
            for late in [0, 3, 30, 90].map(Duration::from_millis) {
                let seconds = 60;
                let done = run(
                    &mut RateLimit::new(speed),
                    Instant::now(),
                    Duration::from_secs(seconds),
                    late,
                );
                assert!(
                    done <= speed * seconds + speed / 5 + CHUNK,
                    "speed {speed}, late {late:?}: {done} is too much"
                );
                assert!(
                    done >= speed * seconds * 98 / 100,
                    "speed {speed}, late {late:?}: {done} is too little"
                );
            }
        }
    }

    #[test]
    fn raising_the_speed_shortens_the_wait_and_zero_ends_it() {
        let (mut limit, now) = (RateLimit::new(1), Instant::now());
        limit.charge(CHUNK, now);
        limit.set_speed(CHUNK);
        let delay = limit.delay(now).unwrap();
        assert!(
            delay > Duration::from_millis(990) && delay < Duration::from_millis(1010),
            "{delay:?}"
        );
        limit.set_speed(0);
        assert_eq!(limit.delay(now), None);
    }

    #[test]
    fn a_slice_that_is_over_is_forgotten() {
        let (mut limit, now) = (RateLimit::new(10 * CHUNK), Instant::now());
        limit.charge(CHUNK, now);
        assert_eq!(limit.delay(now + Duration::from_millis(40)), Some(Duration::from_millis(60)));
        assert_eq!(limit.delay(now + Duration::from_millis(101)), None);
    }

    /// Protects: a job that had nothing to copy for a while does not make up for it with a burst.
    #[test]
    fn idle_time_is_not_saved_up() {
        let (mut limit, now) = (RateLimit::new(10 * CHUNK), Instant::now());
        limit.charge(CHUNK, now);
        let later = now + Duration::from_secs(10);
        assert_eq!(limit.delay(later), None);
        limit.charge(CHUNK, later);
        assert_eq!(limit.delay(later), Some(Duration::from_millis(100)));
    }

    #[test]
    fn absurd_numbers_do_not_overflow() {
        let (mut limit, now) = (RateLimit::new(1), Instant::now());
        limit.charge(u64::MAX, now);
        limit.charge(u64::MAX, now);
        assert_eq!(limit.delay(now), Some(LONGEST));
    }
}
