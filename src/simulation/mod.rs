//! A host that does what a test wants: files in memory that record, fail, stop and lose power. Compiled for tests and fuzzing only.
//!
//! ```text
//! workload ──▶ Disk ──▶ Image ──▶ SimStorage ── records ──▶ cut: every state that a loss of power could leave
//!                                     ├── fails the n-th operation, once or for ever
//!                                     ├── stops an operation until the test lets it go on
//!                                     └── shows every operation to an observer (the order checker)
//! ```
//!
//! **Touches:** everything below it, as a user. **Never:** is part of the program.
//! **Locks:** one mutex per file in memory, which nothing else is taken under but the observer's own.
//! **Invariants:** what a barrier covers is decided when it is called, not when it returns: the weakest disk that is still a disk.

pub mod hostile;
mod storage;

pub use storage::{Action, Failure, Fault, Hold, Observer, Operation, Recorded, SimStorage, Times};
