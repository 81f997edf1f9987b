//! The locks that rooms with more than one of them use. Debug builds check that ranks are taken in ascending order.
//!
//! A lock's rank is part of its type; a thread that holds rank n may take only ranks above n. The list is in the crate docs.
//! The check costs nothing in release builds.
//!
//! The engine takes every lock, condition and atomic through which its threads meet from here: the ranked ones, [`unranked`] for locks that a
//! rank has no place for, [`atomic`]. These are parking_lot's and the standard library's own types, re-exported. Only the library's tests under
//! the feature `schedules` get a scheduler's instead, which then decides who goes on at each of them (`simulation::schedules`).

use std::marker::PhantomData;
use std::ops::{Deref, DerefMut};

#[cfg(all(test, feature = "schedules"))]
mod scheduled;

/// Locks without a rank: what is done under them is a few instructions, or one condition that is waited for.
pub mod unranked {
    #[cfg(all(test, feature = "schedules"))]
    pub use super::scheduled::{Condvar, Mutex, MutexGuard, RwLock, RwLockReadGuard, RwLockWriteGuard};
    #[cfg(not(all(test, feature = "schedules")))]
    pub use parking_lot::{Condvar, Mutex, MutexGuard, RwLock, RwLockReadGuard, RwLockWriteGuard};
}

/// Atomics by which threads tell each other something. (Counters that nobody decides by are the standard library's.)
pub mod atomic {
    #[cfg(all(test, feature = "schedules"))]
    pub use shuttle::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
    #[cfg(not(all(test, feature = "schedules")))]
    pub use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
}

/// Ranks, ascending in the order of acquisition.
pub mod rank {
    /// `Disk.in_flight`: a range guard. Held across I/O.
    pub const RANGE: u8 = 1;
    /// `Disk.backing`: the `Option<Arc<Chain>>`. Never held across I/O.
    pub const BACKING: u8 = 2;
    /// `Image.write_back`: one write-back pass at a time. Held across I/O.
    pub const WRITE_BACK: u8 = 3;
    /// Changes of the header on disk. Held across that I/O.
    pub const HEADER: u8 = 4;
    /// `Image.barriers`: one fdatasync of the overlay at a time. Held across it.
    pub const BARRIER: u8 = 5;
    /// Which thread brings an L2 table into memory. Held across that I/O.
    pub const TABLE_LOAD: u8 = 6;
    /// Refcounts. Held across the load of a refcount block only.
    pub const ALLOCATOR: u8 = 7;
    /// The array of L2 table slots; written only when the L1 table grows.
    pub const SLOTS: u8 = 8;
    /// One L2 table slot: which table is resident. Entries themselves are atomic. Never held across I/O.
    pub const SLOT: u8 = 9;
    /// Leaves: one struct each, nothing is taken below them.
    pub const LEAF: u8 = 10;
}

#[cfg(debug_assertions)]
mod held {
    use std::cell::Cell;

    // All tasks of a scheduler run on one thread of the system: theirs are its own.
    #[cfg(all(test, feature = "schedules"))]
    use shuttle::thread_local;

    thread_local! {
        /// Bit n: this thread holds a lock of rank n.
        static HELD: Cell<u32> = const { Cell::new(0) };
    }

    /// Proof that this thread's set of held ranks contains ours; leaves it when dropped.
    #[derive(Debug)]
    pub struct Held(u8);

    impl Held {
        /// Asserts the order.
        pub fn take(rank: u8) -> Held {
            HELD.with(|held| {
                let now = held.get();
                assert!(now >> rank == 0, "lock order: rank {rank} asked for while holding {now:#b}");
                held.set(now | 1 << rank);
            });
            Held(rank)
        }
    }

    impl Drop for Held {
        fn drop(&mut self) {
            HELD.with(|held| held.set(held.get() & !(1 << self.0)));
        }
    }
}

#[cfg(not(debug_assertions))]
mod held {
    /// Nothing, in release builds.
    #[derive(Debug)]
    pub struct Held;

    impl Held {
        /// Nothing.
        #[inline]
        pub fn take(_rank: u8) -> Held {
            Held
        }
    }
}

pub use held::Held;

/// A guard together with the proof of its rank. Not sendable: ranks are counted per thread.
#[derive(Debug)]
pub struct Guard<G> {
    guard: G,
    _held: Held,
    _thread: PhantomData<*const ()>,
}

impl<G: Deref> Deref for Guard<G> {
    type Target = G::Target;
    fn deref(&self) -> &G::Target {
        &self.guard
    }
}

impl<G: DerefMut> DerefMut for Guard<G> {
    fn deref_mut(&mut self) -> &mut G::Target {
        &mut self.guard
    }
}

/// A mutex of a rank.
#[derive(Debug, Default)]
pub struct Mutex<const RANK: u8, T>(unranked::Mutex<T>);

impl<const RANK: u8, T> Mutex<RANK, T> {
    /// A mutex around `value`.
    pub const fn new(value: T) -> Self {
        Mutex(unranked::Mutex::new(value))
    }

    /// Waits for the lock.
    pub fn lock(&self) -> Guard<unranked::MutexGuard<'_, T>> {
        let held = Held::take(RANK);
        Guard { guard: self.0.lock(), _held: held, _thread: PhantomData }
    }

    /// The lock if nobody holds it. Never waits, so it may be asked for in any order; what is then done under it must not wait either.
    pub fn try_lock(&self) -> Option<unranked::MutexGuard<'_, T>> {
        self.0.try_lock()
    }
}

/// A reader-writer lock of a rank.
#[derive(Debug, Default)]
pub struct RwLock<const RANK: u8, T>(unranked::RwLock<T>);

impl<const RANK: u8, T> RwLock<RANK, T> {
    /// A lock around `value`.
    pub const fn new(value: T) -> Self {
        RwLock(unranked::RwLock::new(value))
    }

    /// Waits for shared access.
    pub fn read(&self) -> Guard<unranked::RwLockReadGuard<'_, T>> {
        let held = Held::take(RANK);
        Guard { guard: self.0.read(), _held: held, _thread: PhantomData }
    }

    /// Waits for exclusive access.
    pub fn write(&self) -> Guard<unranked::RwLockWriteGuard<'_, T>> {
        let held = Held::take(RANK);
        Guard { guard: self.0.write(), _held: held, _thread: PhantomData }
    }

    /// Exclusive access if nobody has any. Never waits.
    pub fn try_write(&self) -> Option<unranked::RwLockWriteGuard<'_, T>> {
        self.0.try_write()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ascending_ranks_are_fine_and_are_given_back() {
        let low: Mutex<1, u32> = Mutex::new(1);
        let high: RwLock<2, u32> = RwLock::new(2);
        for _ in 0..2 {
            let mut a = low.lock();
            *a += *high.read();
        }
        assert_eq!(*low.lock(), 5);
        drop(high.write());
        drop(low.lock());
    }

    #[test]
    #[cfg(debug_assertions)]
    #[should_panic(expected = "lock order")]
    fn descending_ranks_are_caught() {
        let low: Mutex<1, ()> = Mutex::new(());
        let high: Mutex<2, ()> = Mutex::new(());
        let _high = high.lock();
        let _low = low.lock();
    }
}
