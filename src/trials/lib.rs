//! Tests of the engine on simulated hosts.
//!
//! ```text
//! workload ─▶ Disk ─▶ Image ─▶ SimStorage ─ records ─▶ cut: every state after a loss of power
//!                                 ├── fails the n-th operation, once or for ever
//!                                 ├── drops the writes that a failed barrier should have kept
//!                                 ├── stops an operation until the test releases it
//!                                 └── shows every operation to a checker of the order of writes
//! ```
//! `crash_tests` cut the power. `deaths` kill the process and let a successor take its journal.
//! `faults` fail each operation of each scenario. `forgetful` restarts the engine on a host that
//! has lost the writes of a failed barrier. `hazards` forces each known race with stopped
//! operations. `schedules` (a feature of that name) runs the engine under a scheduler that searches
//! for unknown races. [`hostile`] checks what the engine does with arbitrary bytes; the fuzz
//! targets call it.
//!
//! **Touches:** the engine, through its public interface. **Never:** is part of the program.
//! **Locks:** none.

#![forbid(unsafe_code)]

#[cfg(test)]
mod crash_tests;
#[cfg(test)]
mod cut;
#[cfg(test)]
mod deaths;
#[cfg(test)]
mod faults;
#[cfg(test)]
mod forgetful;
#[cfg(test)]
mod hazards;
pub mod hostile;
#[cfg(all(test, feature = "schedules"))]
mod schedules;
#[cfg(test)]
mod workload;
