//! Numbers for Prometheus and whoever else reads OpenMetrics: one small HTTP server, which tells what the disk and its jobs have counted.
//!
//! ```text
//! GET /metrics ─▶ server.rs (one thread) ─▶ exposition.rs ─▶ counters of the disk, its survey, the registry of jobs
//! ```
//! **Touches:** one TCP socket that listens, facts of `disk` and `job`. **Never:** FUSE, images, backing files; changes anything; waits for a request.
//! **Locks:** the leaves that it asks take theirs.
//! **Invariants:** the socket is bound before the sandbox is entered, in which nothing can be; a client that is slow, silent or hostile costs one of
//! a few places for some seconds at most, and loses it earlier when others come; what a client sends is read by hyper and
//! looked at for method and path alone.

mod address;
mod exposition;
mod server;

pub use address::Address;
pub use exposition::Source;
pub use server::{Listener, Server};

use std::time::Duration;

/// Connections at a time. When one more comes the oldest goes.
const MOST_CONNECTIONS: usize = 16;
/// How long one may take from its first byte to the last of the answer.
const CONNECTION_TIME: Duration = Duration::from_secs(10);
