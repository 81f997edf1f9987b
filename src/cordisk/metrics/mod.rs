//! Metrics for Prometheus and other readers of OpenMetrics: a small HTTP server for the counters of
//! the disk and of its jobs.
//!
//! ```text
//! GET /metrics ─▶ server.rs (one thread) ─▶ exposition.rs ─▶ disk counters, job registry
//! ```
//! **Touches:** one listening TCP socket, facts of `disk` and `job`. **Never:** FUSE, images,
//! backing files; changes anything; waits for a request of the guest.
//! **Locks:** none of its own; the disk and the job registry take their leaf locks when they are
//! queried.
//! **Invariants:** the socket is bound before the sandbox is entered, because the sandbox forbids
//! it. A slow, silent or hostile client occupies one of `MOST_CONNECTIONS` places for at most
//! `CONNECTION_TIME`, and loses it earlier when other clients connect. Input of a client is parsed
//! by hyper, and only method and path are used.

mod address;
mod exposition;
mod server;

pub use address::Address;
pub use exposition::Source;
pub use server::{Listener, MetricsServer};

use std::time::Duration;

/// Most connections at a time. If one more comes, the oldest is closed.
const MOST_CONNECTIONS: usize = 16;
/// How long a connection may take from its first byte to the last byte of the answer.
const CONNECTION_TIME: Duration = Duration::from_secs(10);
