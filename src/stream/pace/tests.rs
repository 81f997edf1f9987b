use super::*;

const CHUNK: Duration = Duration::from_millis(1);
/// For how long a chunk is felt after it was copied.
const FELT: Duration = Duration::from_millis(3);
/// How much longer than asked for every wait takes.
const LATE: Duration = Duration::from_micros(200);
const SECOND: Duration = Duration::from_secs(1);

const READ: usize = 0;
const MISS: usize = 2;
const FLUSH: usize = 4;

fn micros(micros: u64) -> Duration {
    Duration::from_micros(micros)
}

/// A stream and a guest that asks for one thing after the other, on a clock that stands still until it is moved.
struct World {
    now: Instant,
    pace: Pace,
    activity: Activity,
    chunk_ended: Instant,
    /// For how long the request that goes on has gone on.
    begun: Duration,
}

/// What became of a stretch of time.
#[derive(Debug, Default)]
struct Ran {
    chunks: u32,
    mean: Duration,
    longest_rest: Duration,
}

impl World {
    fn new() -> World {
        let now = Instant::now() + 3600 * SECOND;
        World { now, pace: Pace::default(), activity: Activity::default(), chunk_ended: now, begun: Duration::ZERO }
    }

    /// Lets `length` pass, in which requests of `kind` cost `alone` where no chunk is felt, and `beside` one.
    fn run(&mut self, length: Duration, kind: usize, alone: Duration, beside: Duration) -> Ran {
        let (end, before) = (self.now + length, self.activity.costs[kind]);
        let mut ran = Ran::default();
        while self.now < end {
            match self.pace.next(self.now, &self.activity) {
                None => {
                    self.pass(CHUNK, kind, beside);
                    self.chunk_ended = self.now;
                    ran.chunks += 1;
                }
                Some(wait) => {
                    assert!(wait > Duration::ZERO && wait <= LONGEST, "{wait:?}");
                    let wait = wait + LATE;
                    let felt = (self.chunk_ended + FELT).saturating_duration_since(self.now).min(wait);
                    self.pass(felt, kind, beside);
                    self.pass(wait - felt, kind, alone);
                    ran.longest_rest = ran.longest_rest.max(self.now - self.chunk_ended);
                }
            }
        }
        let after = self.activity.costs[kind];
        let operations = (after.operations - before.operations) as u32;
        ran.mean = (after.time - before.time).checked_div(operations).unwrap_or_default();
        ran
    }

    /// Time passes; a request ends whenever it has gone on for long enough.
    fn pass(&mut self, time: Duration, kind: usize, cost: Duration) {
        self.now += time;
        if cost.is_zero() {
            return;
        }
        self.begun += time;
        while self.begun >= cost {
            self.begun -= cost;
            self.activity.costs[kind].operations += 1;
            self.activity.costs[kind].time += cost;
        }
    }
}

/// Protects: full speed beside a guest that wants nothing, whether it never did or has stopped.
#[test]
fn an_idle_guest_is_given_nothing() {
    let mut world = World::new();
    let never = world.run(SECOND, READ, Duration::ZERO, Duration::ZERO);
    assert_eq!((never.chunks, never.longest_rest), (1000, Duration::ZERO));
    world.run(5 * SECOND, READ, micros(100), micros(5000));
    world.run(IDLE + LONGEST, READ, Duration::ZERO, Duration::ZERO);
    let no_more = world.run(SECOND, READ, Duration::ZERO, Duration::ZERO);
    assert_eq!((no_more.chunks, no_more.longest_rest), (1000, Duration::ZERO));
}

/// Protects: the promise. What a request costs stays within the factor, for reads, misses and flushes, and the stream takes what that leaves.
#[test]
fn requests_cost_at_most_the_factor() {
    for (kind, alone, beside) in [(READ, 200, 2000), (READ, 100, 700), (MISS, 800, 5000), (FLUSH, 2000, 9000)] {
        let mut world = World::new();
        world.run(3 * SECOND, kind, micros(alone), micros(beside));
        let ran = world.run(20 * SECOND, kind, micros(alone), micros(beside));
        // The rest goes up and down around the right one.
        let allowed = (micros(alone) + ON_THE_WAY) * FACTOR * 5 / 4;
        assert!(ran.mean <= allowed, "{kind}: {alone} alone, {beside} beside: {ran:?}");
        assert!(ran.chunks > 800, "{kind}: more than the least: {ran:?}");
    }
}

/// Protects: a guest that does not feel the stream does not slow it down, but for the probes.
#[test]
fn a_stream_that_is_not_felt_goes_on() {
    let mut world = World::new();
    let ran = world.run(20 * SECOND, READ, micros(100), micros(100));
    assert!(ran.chunks > 19_000, "{ran:?}");
    // Twice of very little is little.
    let mut world = World::new();
    let ran = world.run(20 * SECOND, READ, micros(4), micros(12));
    assert!(ran.chunks > 19_000, "{ran:?}");
}

/// Protects: a stream ends some day, whatever the guest feels of it, and whatever is thought to be its fault.
#[test]
fn a_chunk_is_copied_in_the_longest_rest() {
    let mut world = World::new();
    let (mut chunks, mut longest) = (0, Duration::ZERO);
    for _ in 0..200 {
        // It never learns that the host is slow.
        world.pace.without = [Some(micros(1)); Activity::KINDS];
        let ran = world.run(LONGEST, READ, micros(5000), micros(5000));
        (chunks, longest) = (chunks + ran.chunks, longest.max(ran.longest_rest));
    }
    assert!(longest >= LONGEST && longest <= LONGEST + LOOK + 3 * LATE, "{longest:?}");
    assert!(chunks >= 190, "{chunks}");
}

/// Protects: what is slow without the stream as well is not held against it for long.
#[test]
fn a_host_that_grows_slow_is_not_the_fault_of_the_stream() {
    let mut world = World::new();
    world.run(5 * SECOND, READ, micros(100), micros(100));
    world.run(10 * SECOND, READ, micros(5000), micros(5000));
    let ran = world.run(5 * SECOND, READ, micros(5000), micros(5000));
    assert!(ran.chunks > 4500, "{ran:?}");
}

/// Protects: reads that miss are slower than those that do not, with and without a stream: many of them are no reason to rest.
#[test]
fn misses_are_held_against_misses() {
    let mut world = World::new();
    let mut chunks = 0;
    for _ in 0..20 {
        chunks += world.run(SECOND / 2, READ, micros(10), micros(10)).chunks;
        chunks += world.run(SECOND / 2, MISS, micros(2000), micros(2000)).chunks;
    }
    assert!(chunks > 19_000, "{chunks}");
}

/// Protects: while a flush runs nothing is added to what it waits for; its end is seen soon; and one that never ends does not stop the stream.
#[test]
fn a_flush_is_given_way() {
    let (mut pace, start) = (Pace::default(), Instant::now() + SECOND);
    let idle = Activity::default();
    let flushing = Activity { is_waiting: true, is_flushing: true, ..idle };
    assert_eq!(pace.next(start, &idle), None);
    let mut now = start;
    for _ in 0..30 {
        assert_eq!(pace.next(now, &flushing), Some(LOOK));
        now += LOOK;
    }
    let mut ended = idle;
    ended.costs[FLUSH] = Cost { operations: 1, time: 30 * LOOK };
    assert_eq!(pace.next(now, &ended), None);

    let begun = now;
    while pace.next(now, &flushing).is_some() {
        now += LOOK;
        assert!(now <= begun + LONGEST, "the stream starves");
    }
    assert_eq!(now, begun + LONGEST);
}

/// Protects: a guest that was there before the stream is seen at once, and a job that was paused in the middle of a rest goes on after it.
#[test]
fn rests_begin_and_end_with_the_time() {
    let (mut pace, start) = (Pace::default(), Instant::now() + SECOND);
    let busy = Activity { idle: Some(micros(10)), ..Activity::default() };
    assert_eq!(pace.next(start, &busy), Some(SETTLE));
    assert_eq!(pace.next(start + 3600 * SECOND, &busy), None);
    let mut pace = Pace::default();
    assert_eq!(pace.next(start, &Activity { idle: Some(IDLE), ..busy }), None);
}

/// Protects: waits that end late do not make a probe too short to learn from.
#[test]
fn a_probe_is_long_enough() {
    let (mut pace, start) = (Pace::default(), Instant::now() + SECOND);
    let mut busy = Activity { idle: Some(micros(10)), ..Activity::default() };
    assert_eq!(pace.next(start, &busy), Some(SETTLE));
    let late = start + SETTLE + micros(2000);
    assert_eq!(pace.next(late, &busy), Some(QUIET));
    busy.costs[READ] = Cost { operations: 100, time: QUIET };
    assert_eq!(pace.next(late + QUIET, &busy), None);
    assert_eq!((pace.learnt, pace.without[READ]), (Some(late + QUIET), Some(QUIET / 100)));
    // The next one is far away.
    assert_eq!(pace.next(late + QUIET, &busy), None);
}
