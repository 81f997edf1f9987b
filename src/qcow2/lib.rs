//! One qcow2 image file: open, read, write, zero, discard, flush and check.
//!
//! ```
//! use std::sync::Arc;
//! use cordisk_qcow2::Qcow2;
//! use cordisk_qcow2::host::storage::{Access, FileStorage};
//!
//! # fn main() -> cordisk_qcow2::host::Result<()> {
//! # let directory = tempfile::tempdir().unwrap();
//! # let path = directory.path().join("disk.qcow2");
//! let disk = Qcow2::create(Arc::new(FileStorage::create_new(&path)?), 64 << 20, 65536)?;
//! disk.write_at(4096, b"bytes of the guest")?;
//! disk.flush()?; // durable now
//! disk.close()?;
//!
//! let disk = Qcow2::open(Arc::new(FileStorage::open(&path, Access::ReadWrite)?))?;
//! let mut bytes = [0; 5];
//! disk.read_at(4096, &mut bytes)?;
//! assert_eq!(&bytes, b"bytes");
//! disk.discard(0..65536)?; // reads as zero
//! disk.close()?;
//!
//! let report = Qcow2::check(&FileStorage::open(&path, Access::ReadOnly)?)?;
//! assert_eq!((report.corruptions, report.leaks), (0, 0));
//! # Ok(())
//! # }
//! ```
//!
//! [`Qcow2`] is the complete interface for a virtual machine monitor. The modules below are its
//! parts, for an engine that does more work under the same guards, as `cordisk-engine` does with
//! its backing chain. [`mod@format`] encodes and decodes the bytes of the specification with pure
//! functions. [`image`] is an open file: its tables and refcounts in memory, and the order in which
//! they are written. [`range_lock`] decides which request may change the mapping of which guest
//! clusters. [`check`] counts references and compares refcounts as `qemu-img check` does.
//!
//! **Touches:** one [`host::storage::Storage`]. **Never:** opens or reads a backing file, starts a
//! thread. **Locks:** those of [`host::sync::rank`] from the range guard to the leaves.

#![forbid(unsafe_code)]
#![cfg_attr(not(test), warn(clippy::unwrap_used))]

pub mod check;
mod file;
pub mod format;
pub mod image;
mod journal;
pub mod range_lock;

pub use file::{Below, Qcow2};
pub use host;
