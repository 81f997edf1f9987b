//! A simulated host for tests: files in memory that record, fail, stop and lose power.
//!
//! A [`SimStorage`] records every operation, makes the n-th one fail, loses the data of a failed
//! barrier (`host_cache.rs`), stops an operation until the test releases it, and shows each
//! operation to an [`Observer`]. A [`SimJournal`] is memory that outlives the process beside it.
//! [`order`] checks the rules of write order
//! ([`SimStorage::checked`]). [`spec`] decides for any bytes whether they are an image, and returns
//! what a guest would read from it. [`start`] lays out initial images. [`spec`] and [`start`] are
//! written from the specification and use no code of the engine.
//!
//! **Touches:** memory.
//! **Never:** is part of the program.
//! **Locks:** one mutex per file; only the observer's own lock is taken under it.
//! **Invariants:** the writes that a barrier covers are determined when it is called, not when it
//! returns. This is the weakest behaviour that a disk may have.

#![forbid(unsafe_code)]

mod fault;
mod host_cache;
mod journal;
pub mod order;
pub mod random;
pub mod spec;
pub mod start;
mod storage;

pub use fault::{Fault, HostFailure, Repeat};
pub use journal::{JournalWrite, SimJournal};
pub use storage::{Action, Observer, Operation, Recorded, SimStorage, Stop, Told};
