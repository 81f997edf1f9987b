//! How fast a job may go. Pure: the time is an argument.

use std::time::{Duration, Instant};

/// Length of a slice (QEMU `BLOCK_JOB_SLICE_TIME`): short enough that a limited job looks smooth, long enough that a chunk fits a usual speed.
const SLICE: Duration = Duration::from_millis(100);
/// Slices per second.
const SLICES_PER_SECOND: u64 = 10;
/// The longest delay: far beyond any process, small enough to be added to an [`Instant`].
const LONGEST: Duration = Duration::from_secs(100 * 365 * 24 * 3600);

/// The limiter of QEMU (`include/qemu/ratelimit.h`). Work is charged after it was done, so the first chunk of every slice is free, a slice
/// takes its quota and one chunk at most, and in the long run the speed is met exactly: what one slice took too much lengthens that slice.
#[derive(Debug, Default)]
pub struct RateLimit {
    /// Bytes per slice; 0 is unlimited.
    quota: u64,
    /// Bytes charged in this slice.
    dispatched: u64,
    /// Begin and end of this slice; the end moves back when it took too much.
    slice: Option<(Instant, Instant)>,
}

impl RateLimit {
    /// A limiter for `bytes_per_second`; 0 is unlimited.
    pub fn new(bytes_per_second: u64) -> Self {
        let mut limit = RateLimit::default();
        limit.set_speed(bytes_per_second);
        limit
    }

    /// Changes the speed in bytes per second; 0 is unlimited. What the running slice took stays charged, against the new quota.
    pub fn set_speed(&mut self, bytes_per_second: u64) {
        self.quota = if bytes_per_second == 0 { 0 } else { (bytes_per_second / SLICES_PER_SECOND).max(1) };
    }

    /// Charges `bytes` that were just done.
    pub fn charge(&mut self, bytes: u64, now: Instant) {
        self.account(bytes, now);
    }

    /// How long to wait before the next chunk; `None` is not at all.
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
                // A sleep is over a little late, always. Up to a slice of that is made up, which QEMU does not do: its jobs are slower than
                // their speed on a busy host.
                let start = ended.map(|(_, end)| end).filter(|&end| now < end + SLICE).unwrap_or(now);
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

    /// Runs chunks of [`CHUNK`] on a simulated clock where every sleep is `late`; returns the bytes done when `length` has passed.
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

    /// iotest 141 relies on it: `speed: 1` copies one chunk and then sleeps 14.6 hours.
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
                let done = run(&mut RateLimit::new(speed), Instant::now(), Duration::from_secs(seconds), late);
                assert!(done <= speed * seconds + speed / 5 + CHUNK, "speed {speed}, late {late:?}: {done} is too much");
                assert!(done >= speed * seconds * 98 / 100, "speed {speed}, late {late:?}: {done} is too little");
            }
        }
    }

    #[test]
    fn raising_the_speed_shortens_the_wait_and_zero_ends_it() {
        let (mut limit, now) = (RateLimit::new(1), Instant::now());
        limit.charge(CHUNK, now);
        limit.set_speed(CHUNK);
        let delay = limit.delay(now).unwrap();
        assert!(delay > Duration::from_millis(990) && delay < Duration::from_millis(1010), "{delay:?}");
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

    /// A job that had nothing to copy for a while does not make up for it with a burst.
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
