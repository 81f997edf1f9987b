//! Locks with ranks. Debug builds check that each thread takes them in ascending order.
//!
//! A lock's rank is part of its type. A thread that holds a lock of rank n may take only locks of
//! higher ranks. [`rank`] lists the ranks. In release builds the check costs nothing.
//!
//! The engine takes every lock, condition variable and atomic by which its threads synchronize from
//! this module: the ranked locks, [`unranked`] for locks outside the order, and [`atomic`]. These
//! are the types of parking_lot and of the standard library, re-exported. Only tests with the
//! feature `schedules` get the types of a scheduler instead, which then decides at each of them
//! which thread runs next (`trials::schedules`).

use std::marker::PhantomData;
use std::ops::{Deref, DerefMut};

#[cfg(feature = "schedules")]
mod scheduled;

/// Locks without a rank. A thread holds one only for a few instructions, or while it waits for one
/// condition variable.
pub mod unranked {
    #[cfg(feature = "schedules")]
    pub use super::scheduled::{
        Condvar, Mutex, MutexGuard, RwLock, RwLockReadGuard, RwLockWriteGuard,
    };
    #[cfg(not(feature = "schedules"))]
    pub use parking_lot::{Condvar, Mutex, MutexGuard, RwLock, RwLockReadGuard, RwLockWriteGuard};
}

/// Atomics by which threads synchronize. (Counters on which no decision depends use the standard
/// library's atomics.)
pub mod atomic {
    #[cfg(feature = "schedules")]
    pub use shuttle::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
    #[cfg(not(feature = "schedules"))]
    pub use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
}

/// The ranks, in ascending order of acquisition.
pub mod rank {
    /// `Disk.in_flight`: a range guard. Held across I/O.
    pub const RANGE: u8 = 1;
    /// `Disk.backing`: the `Option<Arc<Chain>>`. Never held across I/O.
    pub const BACKING: u8 = 2;
    /// `Image.write_back`: serializes write-back passes. Held across I/O.
    pub const WRITE_BACK: u8 = 3;
    /// Serializes changes of the header on disk. Held across that I/O.
    pub const HEADER: u8 = 4;
    /// `Image.barriers`: serializes fdatasync calls on the overlay. Held across the call.
    pub const BARRIER: u8 = 5;
    /// Serializes the threads that load L2 tables into memory. Held across that I/O.
    pub const TABLE_LOAD: u8 = 6;
    /// Refcounts. Held across I/O only to load a refcount block.
    pub const ALLOCATOR: u8 = 7;
    /// The array of L2 table slots. Written only when the L1 table grows.
    pub const SLOTS: u8 = 8;
    /// One L2 table slot: which table is resident. The entries of the table are atomics. Never held
    /// across I/O.
    pub const SLOT: u8 = 9;
    /// Leaf locks: each protects one struct, and no lock is taken while one is held.
    pub const LEAF: u8 = 10;
}

#[cfg(debug_assertions)]
mod held {
    use std::cell::Cell;

    // A scheduler runs all its tasks on one thread of the system, so each task needs its own
    // variable.
    #[cfg(feature = "schedules")]
    use shuttle::thread_local;

    thread_local! {
        /// Bit n: this thread holds a lock of rank n.
        static HELD: Cell<u32> = const { Cell::new(0) };
    }

    /// Proof that this thread's set of held ranks contains this rank. Dropping it removes the rank.
    #[derive(Debug)]
    pub struct Held(u8);

    impl Held {
        /// Adds `rank`, and asserts the order of acquisition.
        pub fn take(rank: u8) -> Held {
            HELD.with(|held| {
                let now = held.get();
                assert!(
                    now >> rank == 0,
                    "lock order: rank {rank} asked for while holding {now:#b}"
                );
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
    /// Empty in release builds.
    #[derive(Debug)]
    pub struct Held;

    impl Held {
        /// Does nothing.
        #[inline]
        pub fn take(_rank: u8) -> Held {
            Held
        }
    }
}

pub use held::Held;

/// A guard together with the proof of its rank. It is not `Send`, because ranks are counted per
/// thread.
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

/// A mutex with a rank.
#[derive(Debug, Default)]
pub struct Mutex<const RANK: u8, T>(unranked::Mutex<T>);

impl<const RANK: u8, T> Mutex<RANK, T> {
    /// Makes a mutex around `value`.
    pub const fn new(value: T) -> Self {
        Mutex(unranked::Mutex::new(value))
    }

    /// Waits for the lock.
    pub fn lock(&self) -> Guard<unranked::MutexGuard<'_, T>> {
        let held = Held::take(RANK);
        Guard { guard: self.0.lock(), _held: held, _thread: PhantomData }
    }

    /// Returns the lock if it is free. Never waits, so it may be called in any order; code under
    /// this guard must not wait either.
    pub fn try_lock(&self) -> Option<unranked::MutexGuard<'_, T>> {
        self.0.try_lock()
    }
}

/// A reader-writer lock with a rank.
#[derive(Debug, Default)]
pub struct RwLock<const RANK: u8, T>(unranked::RwLock<T>);

impl<const RANK: u8, T> RwLock<RANK, T> {
    /// Makes a lock around `value`.
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

    /// Returns exclusive access if the lock is free. Never waits.
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
