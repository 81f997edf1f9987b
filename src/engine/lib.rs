//! A disk without a front end: an overlay above its backing chain.
//!
//! ```
//! use cordisk_engine::chain::Gate;
//! use cordisk_engine::create::{CreateOptions, create};
//! use cordisk_engine::disk::{Disk, DiskOptions};
//! use qcow2::format::BackingFormat;
//!
//! # fn main() -> host::Result<()> {
//! # let directory = tempfile::tempdir().unwrap();
//! # let overlay = directory.path().join("overlay.qcow2");
//! # std::fs::write(directory.path().join("base.raw"), [7; 1 << 20]).unwrap();
//! let new = CreateOptions {
//!     overlay: overlay.clone(),
//!     base: "base.raw".into(), // relative to the directory of the overlay
//!     format: BackingFormat::Raw,
//!     size: None,
//!     cluster_size: 65536,
//!     extended_l2: false,
//! };
//! create(&new, &Gate::default())?;
//! let options = DiskOptions {
//!     read_only: false,
//!     copy_on_read: true,
//!     gate: Gate::default(),
//!     full_check: false,
//!     reserve: None,
//! };
//! let disk = Disk::open(&overlay, &options)?;
//! let mut bytes = [0; 4];
//! // Reads from the base, and copies up the cluster.
//! disk.read_and_answer(4096, &mut bytes, &mut |bytes| assert_eq!(bytes, [7; 4]))?;
//! disk.write(4098, &[1])?;
//! disk.read_and_answer(4096, &mut bytes, &mut |bytes| assert_eq!(bytes, [7, 7, 1, 7]))?;
//! disk.close()?;
//! # Ok(())
//! # }
//! ```
//!
//! [`disk`] serves the guest's reads and writes; reads copy up the clusters that the overlay lacks.
//! [`chain`] is the backing chain below the overlay, read-only by type. [`job`] is the life cycle
//! of a background job as QEMU defines it, and [`stream`] is the only kind of job. [`map`] lists
//! which layer holds which bytes. [`create`] makes a new overlay.
//!
//! **Touches:** images through [`qcow2`], their files through [`host`]. **Never:** knows FUSE, JSON
//! on a socket, or a mountpoint. **Locks:** see [`host::sync::rank`]; the locks of jobs and streams
//! are taken while no lock of that ranking is held.

#![forbid(unsafe_code)]
#![cfg_attr(not(test), warn(clippy::unwrap_used))]

pub mod chain;
pub mod create;
pub mod disk;
pub mod job;
pub mod map;
pub mod stream;
