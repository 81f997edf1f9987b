//! A host that does what a test wants: files in memory that record, fail, stop and lose power. Compiled for tests and fuzzing only.
//!
//! ```text
//! workload ──▶ Disk ──▶ Image ──▶ SimStorage ── records ──▶ cut: every state that a loss of power could leave
//!                                     ├── fails the n-th operation, once or for ever
//!                                     ├── forgets what a failed barrier was to write: [`host_cache`]
//!                                     ├── stops an operation until the test lets it go on
//!                                     └── shows every operation to an observer: [`order`] knows the rules of order
//! ```
//! [`spec`] says for all of them whether what is left is an image, and what the guest would read from it; [`start`] lays out images to begin
//! with. Both are written from the specification and use nothing of the engine. Any test gets the order of writes checked with [`SimStorage::checked`].
//!
//! `hazards` forces the known races one by one with stopped operations; `schedules` (feature of that name) lets a scheduler look for unknown ones.
//!
//! **Touches:** everything below it, as a user. **Never:** is part of the program.
//! **Locks:** one mutex per file in memory, which nothing else is taken under but the observer's own.
//! **Invariants:** what a barrier covers is decided when it is called, not when it returns: the weakest disk that is still a disk.

#[cfg(test)]
mod crash_tests;
#[cfg(test)]
mod cut;
mod fault;
#[cfg(test)]
mod faults;
#[cfg(test)]
mod forgetful;
#[cfg(test)]
mod hazards;
mod host_cache;
pub mod hostile;
pub mod order;
#[cfg(test)]
mod random;
#[cfg(all(test, feature = "schedules"))]
mod schedules;
pub mod spec;
pub mod start;
mod storage;
#[cfg(test)]
mod workload;

pub use fault::{Failure, Fault, Times};
pub use storage::{Action, Hold, Observer, Operation, Recorded, SimStorage, Told};
