//! cordisk: a FUSE-mounted copy-on-read virtual disk. (map to be completed)
#![forbid(unsafe_code)]
#![cfg_attr(not(test), warn(clippy::unwrap_used))]

pub mod chain;
pub mod cli;
pub mod create;
pub mod daemon;
pub mod disk;
pub mod error;
pub mod format;
pub mod fuse;
pub mod image;
pub mod job;
pub mod qmp;
pub mod range_lock;
pub mod storage;
pub mod stream;
pub mod sync;

pub use error::{Error, ErrorKind, Result};
