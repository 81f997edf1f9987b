//! The interface between the other crates and the machine that a disk runs on.
//!
//! [`storage`] is one host file. [`error`] is the one error type of the workspace. [`sync`] has the
//! locks and their order. [`attributes`] has the names of the extended attributes of an image file.
//! [`mutants`] lists the steps that a test run can leave out. [`place`] opens files of this program
//! in directories that another user may change. [`packet`] has messages between its processes.
//! [`background`] marks threads whose reads can wait. [`zeros`] are written over data.
//!
//! This crate is below `qcow2` so that a simulated host (crate `sim`) implements the traits of a
//! crate that is never the one under test: the unit tests of `qcow2` and `engine` run on `sim`.
//!
//! **Touches:** the operating system.
//! **Never:** knows qcow2, a guest or a request.
//! **Locks:** defines the ranks of all locks, and takes none of its own.

#![forbid(unsafe_code)]
#![cfg_attr(not(test), warn(clippy::unwrap_used))]

pub mod attributes;
pub mod background;
pub mod error;
pub mod mutants;
pub mod packet;
pub mod place;
pub mod storage;
pub mod sync;
pub mod zeros;

pub use error::{Error, ErrorKind, Result};
