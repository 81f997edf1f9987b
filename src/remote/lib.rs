//! Backing files that live elsewhere, as the processes of this host see them: their names, what
//! they are pinned to, the cache that all disks of the host share, and the line to the fetcher.
//!
//! The serving process has no network. It holds a [`RemoteFile`] for each remote layer: a
//! file of the cache for the bytes that are there, and a socket to the fetcher for the others. The
//! fetcher is another process, which has the network and the credentials and opens no image.
//!
//! **Touches:** the cache directory, the socket to the fetcher. **Never:** connects to a server;
//! holds a credential.

#![forbid(unsafe_code)]
#![cfg_attr(not(test), warn(clippy::unwrap_used))]

pub mod cache;
pub mod line;
pub mod pin;
mod sources;
mod storage;
pub mod sums;
pub mod url;
pub mod wire;

pub use sources::Sources;
pub use storage::{RemoteFile, RemoteOptions};
