//! Shared and exclusive locks on byte ranges, granted in arrival order.
//!
//! **Touches:** nothing. **Never:** knows what the bytes mean, does I/O.
//! **Locks:** rank [`rank::RANGE`] for the guards; the mutexes of the stripes are held for a few
//! instructions only.
//! **Invariants:** two guards whose ranges overlap exist at the same time only if both are shared.
//! No deadlock (H28): a thread holds at most one guard (asserted in debug builds by the rank check)
//! and takes the whole range of a request at once. It enters stripes in ascending order, and in
//! each waits only for guards that were requested earlier there.
//!
//! Every request takes this lock, so it is divided into stripes by offset: requests for distant
//! ranges touch different cache lines. Two overlapping ranges share at least the stripe of a common
//! byte, where the conflict is detected.

use std::marker::PhantomData;
use std::ops::Range;

use host::mutants::{Step, without};
use host::sync::unranked::{Condvar, Mutex};
use host::sync::{Held, rank};

/// Number of stripes: a power of two that fits the bits of a `u64` mask.
const STRIPES: u64 = 64;
/// log2 of the smallest stripe length in bytes, so that a request of 1 MiB (the largest that FUSE
/// sends) touches at most two stripes.
const MIN_STRIPE_BITS: u32 = 20;

/// The lock table.
#[derive(Debug)]
pub struct RangeLock {
    stripe_bits: u32,
    stripes: Box<[Stripe]>,
}

#[derive(Debug, Default)]
#[repr(align(128))] // a cache line pair of its own
struct Stripe {
    queue: Mutex<Queue>,
    released: Condvar,
}

#[derive(Debug, Default)]
struct Queue {
    /// Entries in arrival order.
    entries: Vec<HeldRange>,
    next_ticket: u64,
    waiting: usize,
}

#[derive(Debug)]
struct HeldRange {
    range: Range<u64>,
    mode: RangeMode,
    hold: HoldTime,
    ticket: u64,
    held: bool,
}

/// How long a guard may be waited for and held.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum HoldTime {
    /// The holder neither reads below the overlay nor waits for a guard whose holder does.
    Brief,
    /// The holder may read below the overlay, for as long as a backing file hangs.
    Lasting,
}

#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum RangeMode {
    Shared,
    Exclusive,
}

impl HeldRange {
    fn conflicts(&self, range: &Range<u64>, mode: RangeMode) -> bool {
        if without(Step::ExclusiveWaits) || (without(Step::ArrivalOrder) && !self.held) {
            return false;
        }
        (self.mode == RangeMode::Exclusive || mode == RangeMode::Exclusive)
            && self.range.start < range.end
            && range.start < self.range.end
    }
}

/// Guard for using the current mapping of a range. The mapping cannot change while the guard
/// exists.
#[derive(Debug)]
pub struct Shared<'a> {
    _registration: RangeRegistration<'a>,
}

/// Guard for changing the mapping of a range. No other request uses the range while the guard
/// exists.
#[derive(Debug)]
pub struct Exclusive<'a> {
    registration: RangeRegistration<'a>,
}

impl Exclusive<'_> {
    /// Returns whether `range` lies inside the guarded range. Every change of a mapping asserts
    /// this (I1).
    pub fn covers(&self, range: &Range<u64>) -> bool {
        self.registration.range.start <= range.start && range.end <= self.registration.range.end
    }
}

#[derive(Debug)]
struct RangeRegistration<'a> {
    lock: &'a RangeLock,
    range: Range<u64>,
    mode: RangeMode,
    hold: HoldTime,
    /// The stripes that have an entry of this guard, as a bit mask.
    stripes: u64,
    _held: Held,
    _thread: PhantomData<*const ()>,
}

impl RangeLock {
    /// Makes a table whose stripes are at least `unit` bytes long (the cluster size).
    pub fn new(unit: u64) -> Self {
        let stripe_bits = MIN_STRIPE_BITS.max(unit.next_power_of_two().trailing_zeros());
        RangeLock { stripe_bits, stripes: (0..STRIPES).map(|_| Stripe::default()).collect() }
    }

    /// Waits until the mapping of `range` may be used.
    pub fn shared(&self, range: Range<u64>) -> Shared<'_> {
        Shared { _registration: self.wait(range, RangeMode::Shared) }
    }

    /// Takes a shared guard for a caller that reads nothing below the overlay while it holds the
    /// range. Returns `None` if it would have to wait for a guard of [`RangeLock::shared`] or
    /// [`RangeLock::exclusive`], whose holder may wait for a backing file.
    pub fn shared_briefly(&self, range: Range<u64>) -> Option<Shared<'_>> {
        self.wait_briefly(range, RangeMode::Shared)
            .map(|registration| Shared { _registration: registration })
    }

    /// Takes an exclusive guard under the conditions of [`RangeLock::shared_briefly`].
    pub fn exclusive_briefly(&self, range: Range<u64>) -> Option<Exclusive<'_>> {
        self.wait_briefly(range, RangeMode::Exclusive)
            .map(|registration| Exclusive { registration })
    }

    /// Returns whether [`RangeLock::shared_briefly`] would return `None` at this moment.
    pub fn is_shared_lastingly(&self, range: &Range<u64>) -> bool {
        bits(self.stripes_of(range))
            .any(|stripe| self.stripes[stripe].queue.lock().has_lasting(range, RangeMode::Shared))
    }

    /// Waits until the mapping of `range` may be changed.
    pub fn exclusive(&self, range: Range<u64>) -> Exclusive<'_> {
        Exclusive { registration: self.wait(range, RangeMode::Exclusive) }
    }

    /// Takes a shared guard, or returns `None` if it would have to wait.
    pub fn try_shared(&self, range: Range<u64>) -> Option<Shared<'_>> {
        self.try_now(range, RangeMode::Shared)
            .map(|registration| Shared { _registration: registration })
    }

    /// Takes an exclusive guard, or returns `None` if it would have to wait.
    pub fn try_exclusive(&self, range: Range<u64>) -> Option<Exclusive<'_>> {
        self.try_now(range, RangeMode::Exclusive).map(|registration| Exclusive { registration })
    }

    fn try_now(&self, range: Range<u64>, mode: RangeMode) -> Option<RangeRegistration<'_>> {
        let mut registration = self.begin(range, mode, HoldTime::Brief);
        for stripe in bits(self.stripes_of(&registration.range)) {
            let mut queue = self.stripes[stripe].queue.lock();
            if queue.entries.iter().any(|entry| entry.conflicts(&registration.range, mode)) {
                return None; // dropping the registration leaves the stripes entered so far
            }
            queue.push(&registration.range, mode, HoldTime::Brief, true);
            registration.stripes |= 1 << stripe;
        }
        Some(registration)
    }

    /// Returns how many entries wait in the queues.
    #[cfg(any(test, feature = "testing"))]
    pub fn waiting(&self) -> usize {
        self.stripes.iter().map(|stripe| stripe.queue.lock().waiting).sum()
    }

    fn wait(&self, range: Range<u64>, mode: RangeMode) -> RangeRegistration<'_> {
        let mut registration = self.begin(range, mode, HoldTime::Lasting);
        for stripe in bits(self.stripes_of(&registration.range)) {
            self.stripes[stripe].enter(&registration.range, mode, HoldTime::Lasting);
            registration.stripes |= 1 << stripe;
        }
        registration
    }

    fn wait_briefly(&self, range: Range<u64>, mode: RangeMode) -> Option<RangeRegistration<'_>> {
        let mut registration = self.begin(range, mode, HoldTime::Brief);
        for stripe in bits(self.stripes_of(&registration.range)) {
            if !self.stripes[stripe].enter(&registration.range, mode, HoldTime::Brief) {
                return None; // dropping the registration leaves the stripes entered so far
            }
            registration.stripes |= 1 << stripe;
        }
        Some(registration)
    }

    fn begin(&self, range: Range<u64>, mode: RangeMode, hold: HoldTime) -> RangeRegistration<'_> {
        RangeRegistration {
            lock: self,
            range,
            mode,
            hold,
            stripes: 0,
            _held: Held::take(rank::RANGE),
            _thread: PhantomData,
        }
    }

    /// Returns the stripes that `range` touches, as a bit mask; 0 for an empty range.
    fn stripes_of(&self, range: &Range<u64>) -> u64 {
        if range.is_empty() {
            return 0;
        }
        let first = range.start >> self.stripe_bits;
        let last = (range.end - 1) >> self.stripe_bits;
        if last - first >= STRIPES - 1 {
            return u64::MAX;
        }
        (first..=last).fold(0, |mask, stripe| mask | 1 << (stripe % STRIPES))
    }
}

/// Returns the indexes of the set bits of a mask, in ascending order.
fn bits(mut mask: u64) -> impl Iterator<Item = usize> {
    std::iter::from_fn(move || {
        if mask == 0 {
            return None;
        }
        let bit = mask.trailing_zeros() as usize;
        mask &= mask - 1;
        Some(bit)
    })
}

impl Stripe {
    /// Waits for the range. Returns `false` if the hold is brief and a lasting one conflicts. The
    /// check is needed only once: entries that arrive later do not block one that waits.
    fn enter(&self, range: &Range<u64>, mode: RangeMode, hold: HoldTime) -> bool {
        let mut queue = self.queue.lock();
        if hold == HoldTime::Brief && queue.has_lasting(range, mode) {
            return false;
        }
        let ticket = queue.push(range, mode, hold, false);
        loop {
            let mine = queue
                .entries
                .iter()
                .position(|entry| entry.ticket == ticket)
                .expect("a waiting entry stays in the queue");
            if !queue.entries[..mine].iter().any(|earlier| earlier.conflicts(range, mode)) {
                queue.entries[mine].held = true;
                return true;
            }
            queue.waiting += 1;
            self.released.wait(&mut queue);
            queue.waiting -= 1;
        }
    }

    fn leave(&self, range: &Range<u64>, mode: RangeMode, hold: HoldTime) {
        let mut queue = self.queue.lock();
        // Held entries with equal fields are interchangeable, so any of them may be removed.
        let mine = queue
            .entries
            .iter()
            .position(|entry| {
                entry.held && entry.mode == mode && entry.hold == hold && entry.range == *range
            })
            .expect("a held entry stays in the queue");
        queue.entries.remove(mine);
        if queue.waiting > 0 {
            self.released.notify_all();
        }
    }
}

impl Queue {
    /// Returns whether a lasting entry conflicts, held or waiting.
    fn has_lasting(&self, range: &Range<u64>, mode: RangeMode) -> bool {
        self.entries
            .iter()
            .any(|entry| entry.hold == HoldTime::Lasting && entry.conflicts(range, mode))
    }

    fn push(&mut self, range: &Range<u64>, mode: RangeMode, hold: HoldTime, held: bool) -> u64 {
        let ticket = self.next_ticket;
        self.next_ticket += 1;
        self.entries.push(HeldRange { range: range.clone(), mode, hold, ticket, held });
        ticket
    }
}

impl Drop for RangeRegistration<'_> {
    fn drop(&mut self) {
        for stripe in bits(self.stripes) {
            self.lock.stripes[stripe].leave(&self.range, self.mode, self.hold);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicI64, AtomicUsize, Ordering};
    use std::sync::mpsc;
    use std::thread;
    use std::time::Duration;

    fn until_waiting(lock: &RangeLock, n: usize) {
        while lock.waiting() < n {
            thread::yield_now();
        }
    }

    /// Protects: a brief request waits only for brief guards before it. It gives up if a lasting
    /// guard conflicts in any stripe, whether that guard is held or still waiting.
    #[test]
    fn who_waits_briefly_waits_for_nobody_who_may_last() {
        let lock = RangeLock::new(65536);
        let far = 65536 << 8;
        let lasting = lock.shared(far..far + 1);
        assert!(!lock.is_shared_lastingly(&(far..far + 1)), "shared with shared");
        thread::scope(|scope| {
            // A lasting guard that still waits conflicts as well.
            scope.spawn(|| drop(lock.exclusive(far..far + 1)));
            until_waiting(&lock, 1);
            assert!(lock.is_shared_lastingly(&(far..far + 1)));
            scope
                .spawn(|| {
                    assert!(lock.shared_briefly(far..far + 1).is_none());
                    assert!(lock.exclusive_briefly(0..far + 1).is_none());
                    // The failed call has left the stripes that it entered first.
                    drop(lock.exclusive(0..1));
                    let brief = lock.exclusive_briefly(0..65536).expect("nobody is there");
                    thread::scope(|inner| {
                        let waits = inner.spawn(|| lock.shared_briefly(0..1).is_some());
                        until_waiting(&lock, 2);
                        drop(brief);
                        assert!(waits.join().unwrap(), "a brief hold is waited for");
                    });
                })
                .join()
                .unwrap();
            drop(lasting);
        });
    }

    #[test]
    fn readers_share_and_distant_writers_do_not_meet() {
        let lock = RangeLock::new(65536);
        let a = lock.shared(0..4096);
        thread::scope(|scope| {
            scope.spawn(|| drop(lock.shared(0..65536)));
            scope.spawn(|| drop(lock.exclusive(65536..131072)));
        });
        drop(a);
        assert!(lock.stripes.iter().all(|stripe| stripe.queue.lock().entries.is_empty()));
    }

    #[test]
    fn try_shared_gives_up_and_leaves_nothing_behind() {
        let lock = RangeLock::new(65536);
        let held = lock.exclusive((5 << 20)..(6 << 20));
        thread::scope(|scope| {
            scope.spawn(|| {
                // The call enters the first stripe, then fails in the next.
                assert!(lock.try_shared((4 << 20)..(5 << 20) + 1).is_none());
                assert!(lock.try_shared((4 << 20)..(5 << 20)).is_some());
            });
        });
        drop(held);
        assert!(lock.try_shared((4 << 20)..(6 << 20)).is_some());
        assert!(lock.stripes.iter().all(|stripe| stripe.queue.lock().entries.is_empty()));
    }

    #[test]
    fn a_reader_that_comes_after_a_waiting_writer_waits_behind_it() {
        let lock = RangeLock::new(65536);
        let (log, order) = mpsc::channel();
        let first = lock.shared(0..100);
        thread::scope(|scope| {
            let writer = log.clone();
            let lock = &lock;
            scope.spawn(move || {
                let _guard = lock.exclusive(50..150);
                writer.send("writer").unwrap();
            });
            until_waiting(lock, 1);
            let reader = log.clone();
            scope.spawn(move || {
                let _guard = lock.shared(0..60);
                reader.send("reader").unwrap();
            });
            until_waiting(lock, 2);
            assert!(order.try_recv().is_err());
            drop(first);
        });
        assert_eq!(order.recv_timeout(Duration::from_secs(1)), Ok("writer"));
        assert_eq!(order.recv_timeout(Duration::from_secs(1)), Ok("reader"));
    }

    #[test]
    fn the_whole_disk_excludes_everything() {
        let lock = RangeLock::new(65536);
        let drained = lock.exclusive(0..u64::MAX);
        assert!(drained.covers(&(1 << 40..1 << 41)));
        thread::scope(|scope| {
            scope.spawn(|| {
                for at in [0, 1 << 20, 63 << 20, 1 << 50] {
                    assert!(lock.try_shared(at..at + 1).is_none());
                }
            });
        });
    }

    /// Many threads take random ranges. A counter per unit is negative for a writer and positive
    /// for readers, so any forbidden overlap is detected.
    #[test]
    fn random_ranges_never_overlap_wrongly() {
        let lock = RangeLock::new(65536);
        let units: Vec<AtomicI64> = (0..128).map(|_| AtomicI64::new(0)).collect();
        let exclusives = AtomicUsize::new(0);
        thread::scope(|scope| {
            for seed in 1..=4u64 {
                let (lock, units, exclusives) = (&lock, &units, &exclusives);
                scope.spawn(move || {
                    let mut x = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15);
                    for _ in 0..5000 {
                        x ^= x << 13;
                        x ^= x >> 7;
                        x ^= x << 17;
                        let start = (x % 128) as usize;
                        let end = (start + 1 + (x >> 8) as usize % 9).min(128);
                        let range = (start as u64) << 20..(end as u64) << 20;
                        if x >> 40 & 1 == 0 {
                            let _guard = lock.shared(range);
                            for unit in &units[start..end] {
                                assert!(unit.fetch_add(1, Ordering::SeqCst) >= 0);
                            }
                            for unit in &units[start..end] {
                                unit.fetch_sub(1, Ordering::SeqCst);
                            }
                        } else {
                            let _guard = lock.exclusive(range);
                            for unit in &units[start..end] {
                                assert_eq!(unit.swap(-1, Ordering::SeqCst), 0);
                            }
                            for unit in &units[start..end] {
                                unit.store(0, Ordering::SeqCst);
                            }
                            exclusives.fetch_add(1, Ordering::SeqCst);
                        }
                    }
                });
            }
        });
        assert!(exclusives.load(Ordering::SeqCst) > 1000);
    }
}
