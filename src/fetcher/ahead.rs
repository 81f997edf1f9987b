//! The ranges that no thread waits for, in the order in which they are fetched, and how much of
//! them may be on its way. Pure: the time and what is known of the link are arguments.
//!
//! What is on its way for a stream delays what a guest waits for, because both share the link:
//!
//! ```text
//! Soon, Next   as much as the link holds (twice its rate times its latency), in order
//! Later        the guest has not read for IDLE    as much as makes it faster (slots.rs)
//!              … for PAUSE                        as for Soon and Next, in small parts
//!              … reads                            one small part in each GIVES_WAY; large ones end
//! ```

use std::ops::Range;
use std::time::{Duration, Instant};

use host::storage::Need;

/// What one request fetches at most while the guest is idle, in bytes, unless the source asks for
/// less. A larger part makes the first bytes of the next one come later; a smaller one costs more
/// requests.
pub const PART: u64 = 8 << 20;

/// What one request fetches at most otherwise, in bytes, unless a unit is larger.
pub const SMALL_PART: u64 = 512 << 10;

/// The least that may be on its way, in bytes: while one part is on the link, the next one is asked
/// for.
const LEAST: u64 = 2 * SMALL_PART;

/// The guest counts as idle after this time without a request to the server.
const IDLE: Duration = Duration::from_secs(2);

/// The guest counts as reading for this time after a request to the server.
const PAUSE: Duration = Duration::from_millis(50);

/// While the guest reads, one part for the walk of the stream is begun in this time.
const GIVES_WAY: Duration = Duration::from_millis(100);

/// However much there is for sooner, one part for the walk is begun in this time.
const STARVES: Duration = Duration::from_secs(1);

/// The most that is queued for soon, in bytes. Where the guest was before, it needs least.
const MOST_SOON: u64 = 32 << 20;

/// The most requests for small ranges at the same time.
pub const MOST_REQUESTS: usize = 32;

/// What is known of the way to the server.
#[derive(Clone, Copy, Debug)]
pub struct Link {
    /// The number of large requests that may be in flight ([`crate::slots`]).
    pub slots: usize,
    /// Whether the server has asked for fewer requests.
    pub is_slowed: bool,
    /// Bytes per second, as last measured; 0 is unknown.
    pub rate: f64,
    /// The shortest time from a request to the first byte of its answer.
    pub latency: Duration,
    /// What one request fetches while the guest is idle, in bytes, if the link holds little.
    pub part: u64,
    /// Bytes that are fetched as a whole only: a chunk of the list, or a block.
    pub unit: u64,
}

impl Link {
    /// How many bytes keep the link busy.
    fn holds(&self) -> u64 {
        let bytes = 2.0 * self.rate * self.latency.as_secs_f64();
        let least = LEAST.max(2 * self.unit);
        (bytes as u64).clamp(least, (self.slots as u64 * PART).max(least))
    }

    /// What one request fetches while the guest is idle: a quarter of what the link holds, if that
    /// is more than the source asks for.
    fn idle_part(&self) -> u64 {
        let quarter = 1 << (self.holds() / 4).max(1).ilog2();
        quarter.clamp(self.part.min(PART), PART)
    }
}

/// The answer to a worker that asks for a range.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Taken {
    /// This one.
    Range(Need, Range<u64>),
    /// None before another one has ended, or is queued.
    Nothing,
    /// None before this time has passed.
    After(Duration),
}

/// The queue.
#[derive(Debug)]
pub struct AheadQueue {
    /// By need; those of `Soon` with the newest first.
    queue: Vec<(Need, Range<u64>)>,
    in_flight: Vec<Range<u64>>,
    /// When a thread that works for a guest has last wanted a range.
    guest_at: Option<Instant>,
    /// When the last range of [`Need::Later`] was taken.
    later_at: Option<Instant>,
    /// When a worker first saw a queued range of [`Need::Later`] since one was taken.
    waits_since: Option<Instant>,
    /// [`PAUSE`], which tests make longer.
    pub pause: Duration,
}

impl Default for AheadQueue {
    fn default() -> Self {
        let (queue, in_flight) = (Vec::new(), Vec::new());
        AheadQueue {
            queue,
            in_flight,
            guest_at: None,
            later_at: None,
            waits_since: None,
            pause: PAUSE,
        }
    }
}

impl AheadQueue {
    /// Notes that a guest waits for the server.
    pub fn guest_waits(&mut self, now: Instant) {
        self.guest_at = Some(now);
    }

    /// Queues a range. What is queued of it for later moves ahead; what is queued for sooner stays.
    pub fn push(&mut self, need: Need, range: Range<u64>) {
        let mut parts = vec![range];
        for (_, queued) in self.queue.iter().filter(|(queued, _)| *queued <= need) {
            parts = subtract(&parts, queued);
        }
        parts.iter().for_each(|part| self.withdraw(part));
        let at = match need {
            Need::Soon => 0,
            _ => self.queue.partition_point(|(queued, _)| *queued <= need),
        };
        self.queue.splice(at..at, parts.into_iter().map(|part| (need, part)));
        if need == Need::Soon {
            self.forget_old();
        }
    }

    /// Drops the oldest ranges that are needed soon, if there are too many.
    fn forget_old(&mut self) {
        let mut bytes = 0;
        self.queue.retain(|(need, range)| {
            bytes += range.end - range.start;
            *need != Need::Soon || bytes <= MOST_SOON
        });
    }

    /// Queues a range for which the job's thread of a stream waits, before all others of the walk.
    /// What is queued of it for sooner stays.
    pub fn push_first(&mut self, range: Range<u64>) {
        let mut parts = vec![range];
        for (_, queued) in self.queue.iter().filter(|(queued, _)| *queued < Need::Later) {
            parts = subtract(&parts, queued);
        }
        parts.iter().for_each(|part| self.withdraw(part));
        let at = self.queue.partition_point(|(queued, _)| *queued < Need::Later);
        self.queue.splice(at..at, parts.into_iter().map(|part| (Need::Later, part)));
    }

    /// Removes what is queued of a range.
    pub fn withdraw(&mut self, range: &Range<u64>) {
        if self.overlaps(range) {
            let queue = std::mem::take(&mut self.queue);
            self.queue = queue
                .into_iter()
                .flat_map(|(need, queued)| {
                    subtract(&[queued], range).into_iter().map(move |rest| (need, rest))
                })
                .collect();
        }
    }

    /// Removes all ranges but those that `stays` names.
    pub fn clear(&mut self, stays: impl Fn(&Range<u64>) -> bool) {
        self.queue.retain(|(_, range)| stays(range));
    }

    /// Whether a part of the range is queued.
    pub fn overlaps(&self, range: &Range<u64>) -> bool {
        self.queue.iter().any(|(_, queued)| overlap(queued, range))
    }

    /// The parts of the ranges that are not queued.
    pub fn without(&self, mut ranges: Vec<Range<u64>>) -> Vec<Range<u64>> {
        for (_, queued) in &self.queue {
            ranges = subtract(&ranges, queued);
        }
        ranges
    }

    /// Number of queued ranges. A worker may take only a part of one.
    pub fn len(&self) -> usize {
        self.queue.len()
    }

    /// The most workers that have something to do at the same time.
    pub fn most_workers(&self, link: &Link) -> usize {
        let is_small = self.queue.first().is_some_and(|(need, _)| *need < Need::Later);
        if is_small && !link.is_slowed { MOST_REQUESTS } else { link.slots }
    }

    /// Takes the next range, or the first part of it.
    pub fn take(&mut self, now: Instant, link: &Link) -> Taken {
        let walk = self.queue.partition_point(|(need, _)| *need < Need::Later);
        let has_walk = walk < self.queue.len();
        self.waits_since = self.waits_since.filter(|_| has_walk).or(has_walk.then_some(now));
        let waits = self.waits_since.map(|since| now.saturating_duration_since(since));
        let starves = waits.is_some_and(|waits| waits >= STARVES);
        let index = if starves { walk } else { 0 };
        let Some((need, range)) = self.queue.get(index) else { return Taken::Nothing };
        let (need, asked) = (*need, range.clone());
        let quiet = self.guest_at.map(|at| now.saturating_duration_since(at));
        let is_idle = need == Need::Later && quiet.is_none_or(|quiet| quiet >= IDLE);
        let part = if is_idle { link.idle_part() } else { SMALL_PART }.max(link.unit);
        // Parts begin at multiples of their size, so that all disks of a host ask for the same.
        let range = asked.start..asked.end.min(asked.start / part * part + part);
        if self.in_flight.len() >= self.most_workers(link) {
            return Taken::Nothing;
        }
        let on_its_way: u64 = self.in_flight.iter().map(|range| range.end - range.start).sum();
        if !is_idle
            && !starves
            && on_its_way > 0
            && on_its_way + (range.end - range.start) > link.holds()
        {
            return Taken::Nothing;
        }
        if need == Need::Later {
            if let Some(quiet) = quiet.filter(|quiet| *quiet < self.pause) {
                let since = self.later_at.map(|at| now.saturating_duration_since(at));
                if let Some(since) = since.filter(|since| !starves && *since < GIVES_WAY) {
                    return Taken::After((self.pause - quiet).min(GIVES_WAY - since));
                }
            }
            (self.later_at, self.waits_since) = (Some(now), None);
        }
        match range.end == asked.end {
            true => drop(self.queue.remove(index)),
            false => self.queue[index].1.start = range.end,
        }
        self.in_flight.push(range.clone());
        Taken::Range(need, range)
    }

    /// Whether a request for the walk that has `left` to fetch ends, because a guest waits.
    pub fn gives_way(&self, now: Instant, left: &Range<u64>) -> bool {
        let quiet = self.guest_at.map(|at| now.saturating_duration_since(at));
        quiet.is_some_and(|quiet| quiet < self.pause)
            && left.end.saturating_sub(left.start) > SMALL_PART
    }

    /// Notes that the work on a range that was taken has ended.
    pub fn ended(&mut self, range: &Range<u64>) {
        if let Some(index) = self.in_flight.iter().position(|taken| taken == range) {
            self.in_flight.swap_remove(index);
        }
    }
}

/// Whether two ranges have a byte in common.
pub fn overlap(a: &Range<u64>, b: &Range<u64>) -> bool {
    a.start < b.end && b.start < a.end
}

/// What is left of the ranges without `taken`.
pub fn subtract(ranges: &[Range<u64>], taken: &Range<u64>) -> Vec<Range<u64>> {
    ranges
        .iter()
        .flat_map(|range| {
            [
                range.start..range.end.min(taken.start.max(range.start)),
                range.start.max(taken.end.min(range.end))..range.end,
            ]
        })
        .filter(|range| range.start < range.end)
        .collect()
}

#[cfg(test)]
#[expect(clippy::single_range_in_vec_init, reason = "lists of ranges that happen to have one")]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    fn link(slots: usize) -> Link {
        Link { slots, is_slowed: false, rate: 0.0, latency: Duration::ZERO, part: PART, unit: 1 }
    }

    /// Takes until nothing is given; nothing ends meanwhile.
    fn all(queue: &mut AheadQueue, now: Instant, link: &Link) -> Vec<(Need, Range<u64>)> {
        let mut taken = Vec::new();
        while let Taken::Range(need, range) = queue.take(now, link) {
            taken.push((need, range));
        }
        taken
    }

    #[test]
    fn what_is_needed_sooner_is_taken_first() {
        let now = Instant::now();
        let mut queue = AheadQueue::default();
        queue.push(Need::Later, 0..MIB);
        queue.push(Need::Next, 40 * MIB..40 * MIB + 1000);
        queue.push(Need::Soon, 50 * MIB..50 * MIB + 1000);
        queue.push(Need::Next, 30 * MIB..30 * MIB + 1000);
        queue.push(Need::Soon, 60 * MIB..60 * MIB + 1000);
        queue.push_first(9 * MIB..9 * MIB + 1000);
        let starts = |taken: Vec<(Need, Range<u64>)>| -> Vec<u64> {
            taken.iter().map(|(_, range)| range.start / MIB).collect()
        };
        assert_eq!(starts(all(&mut queue, now, &link(16))), [60, 50, 40, 30, 9, 0]);
    }

    #[test]
    fn a_range_is_queued_once_and_moves_ahead() {
        let now = Instant::now();
        let mut queue = AheadQueue::default();
        queue.push(Need::Later, 0..1000);
        queue.push(Need::Next, 400..600);
        queue.push(Need::Later, 300..1200);
        queue.push(Need::Next, 500..700);
        let ranges: Vec<_> = all(&mut queue, now, &link(16)).into_iter().map(|(_, r)| r).collect();
        assert_eq!(ranges, [400..600, 600..700, 0..400, 700..1000, 1000..1200]);
        queue.push(Need::Later, 0..1000);
        queue.withdraw(&(100..200));
        assert_eq!(queue.without(vec![0..300]), [100..200]);
        assert!(!queue.overlaps(&(120..180)) && queue.overlaps(&(150..201)));
        queue.clear(|range| range.start == 200);
        assert_eq!(queue.len(), 1);
    }

    /// Protects: a guest that reads finds little of the stream before it on the link.
    #[test]
    fn the_walk_gives_way_to_a_guest_that_reads() {
        let begun = Instant::now();
        let mut queue = AheadQueue::default();
        queue.push(Need::Later, 0..64 * MIB);
        assert_eq!(all(&mut queue, begun, &link(4)).len(), 4);
        (0..4).for_each(|part| queue.ended(&(part * PART..(part + 1) * PART)));
        assert!(!queue.gives_way(begun, &(0..PART)));
        queue.guest_waits(begun);
        assert!(queue.gives_way(begun, &(0..PART)) && !queue.gives_way(begun, &(0..SMALL_PART)));
        assert!(!queue.gives_way(begun + PAUSE, &(0..PART)));
        let at = 32 * MIB;
        let first = Taken::Range(Need::Later, at..at + SMALL_PART);
        let now = begun + GIVES_WAY;
        queue.guest_waits(now);
        assert_eq!(queue.take(now, &link(4)), first);
        assert_eq!(queue.take(now, &link(4)), Taken::After(PAUSE));
        let pause = now + PAUSE - Duration::from_millis(1);
        assert_eq!(queue.take(pause, &link(4)), Taken::After(Duration::from_millis(1)));
        let taken = all(&mut queue, now + PAUSE, &link(4));
        assert_eq!(taken.len() as u64, LEAST / SMALL_PART - 1, "as much as the link holds");
        assert_eq!(queue.take(now + PAUSE, &link(4)), Taken::Nothing);
        // What a guest needs soon does not wait for the pause.
        (0..3)
            .for_each(|part| queue.ended(&(at + part * SMALL_PART..at + (part + 1) * SMALL_PART)));
        queue.guest_waits(now);
        queue.push(Need::Soon, 50 * MIB..51 * MIB);
        assert_eq!(all(&mut queue, now, &link(4)).len(), 2);
    }

    /// Protects: the walk goes on, however much a guest that reads all over the disk promotes.
    #[test]
    fn the_walk_does_not_starve() {
        let begun = Instant::now();
        let mut queue = AheadQueue::default();
        queue.push(Need::Later, 0..64 * MIB);
        let mut walk = 0;
        for tick in 0..300 {
            let now = begun + Duration::from_millis(10) * tick;
            queue.guest_waits(now);
            let start = 100 * MIB + u64::from(tick % 90) * MIB;
            queue.push(Need::Soon, start..start + MIB);
            if let Taken::Range(need, range) = queue.take(now, &link(4)) {
                walk += u64::from(need == Need::Later);
                queue.ended(&range);
            }
        }
        assert_eq!(walk, 2, "one part a second");
    }

    /// Protects: what a guest has left behind does not fill memory.
    #[test]
    fn old_neighbourhoods_are_forgotten() {
        let mut queue = AheadQueue::default();
        queue.push(Need::Next, 5000 * MIB..5001 * MIB);
        for at in 0..1000 {
            queue.push(Need::Soon, at * 2 * MIB..at * 2 * MIB + MIB);
        }
        assert_eq!(queue.len() as u64, MOST_SOON / MIB + 1);
        assert!(queue.overlaps(&(1998 * MIB..1999 * MIB)) && !queue.overlaps(&(0..MIB)));
        assert!(queue.overlaps(&(5000 * MIB..5001 * MIB)));
    }

    #[test]
    fn a_fast_and_far_link_holds_more() {
        let far = Link { rate: 100e6, latency: Duration::from_millis(100), ..link(16) };
        assert_eq!(far.holds(), 20_000_000);
        assert_eq!(Link { slots: 1, ..far }.holds(), PART);
        assert_eq!(link(16).holds(), LEAST);
        // A source that asks for small parts gets them unless the link holds much.
        let small = Link { part: 2 * MIB, ..link(16) };
        assert_eq!((small.idle_part(), link(16).idle_part()), (2 * MIB, PART));
        assert_eq!(Link { part: 2 * MIB, ..far }.idle_part(), 4 * MIB);
    }
}
