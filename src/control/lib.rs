//! The control socket: QMP, the protocol of QEMU's monitors, as QEMU 10.2 speaks it, and with the
//! command names of 2012 in addition.
//!
//! ```text
//!  socket ─▶ Decoder ─▶ Session ─▶ command table ─▶ Jobs, Streams, facts of the Disk, Disk::grow
//!   (one thread per client)                │ reply
//!  socket ◀─ Outbox ◀── Fanout ◀───────────┘
//!   (one more thread)    ▲ events, before the replies that come after them
//!                        └── Jobs::subscribe
//! ```
//!
//! **Touches:** one Unix socket, `job`, `stream::Streams`, facts and the size of the `disk`, the
//! block map (`map`). **Never:** FUSE, the image, a file that a client names; I/O of the disk's
//! bytes.
//! **Locks:** the lock of the fan-out orders the lines that clients are sent. The lock of the job
//! registry or that of one outbox is taken after it, and the list of client threads is locked
//! before it. No thread holds any of them while it reads or writes a socket or runs a command. A
//! command that starts a stream or changes the size of the disk holds a
//! [`engine::stream::Reservation`], which is taken before all of them.
//! **Invariants:** replies to a client come in the order of its requests. An event that happened
//! before a reply was made is sent before that reply. A client that has not negotiated capabilities
//! gets only the greeting and replies. A client that does not read loses its connection; nothing
//! else is affected. Memory per client is bounded. Only the user of the process and root are
//! served.
//!
//! # A session
//!
//! ```
//! # use std::sync::Arc;
//! # use cordisk_control::{LogFacts, Server, Socket, Target, facts::TakeoverFacts};
//! # use engine::{disk::Disk, job::Jobs, stream::{Priority, Streams}};
//! # use host::storage::{Storage, WriteKind};
//! # use qcow2::{format::{Geometry, NewImage}, image::Image};
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! # let image = sim::SimStorage::new(Vec::new());
//! # let geometry = Geometry::new(3, 16, 4, 1 << 20)?;
//! # for (at, bytes) in (NewImage { geometry, backing: None }).layout()? {
//! #     image.write_at(WriteKind::Header, at, &bytes)?;
//! # }
//! # let disk = Arc::new(Disk::for_tests(Image::open(image)?, None));
//! # let (jobs, device) = (Jobs::new(), "drive0".to_string());
//! # let streams = Streams::new(&disk, &jobs, &device, jiff::tz::TimeZone::UTC);
//! # let target = Target {
//! #     disk, jobs, streams, device, pid: 1,
//! #     mountpoint: "/srv/vm.raw".into(), started: std::time::UNIX_EPOCH, priority: Priority::Low,
//! #     quit: crossbeam_channel::bounded(1).0, is_file: Arc::new(|_, _| false),
//! #     log: LogFacts { place: None, last_warning: Arc::new(|| None) },
//! #     metrics: None, grown: Arc::new(|_| {}), is_answering: Arc::new(|| true),
//! #     sources: Arc::new(Vec::new), order_base: Arc::new(|| None),
//! #     takeover: Arc::new(TakeoverFacts::default),
//! # };
//! # let directory = tempfile::tempdir()?;
//! # let socket = directory.path().join("vm.sock");
//! # let server = Server::start(Socket::listen(&socket)?, target)?;
//! use cordisk_control::connection::{Connection, PATIENCE};
//! use cordisk_control::facts::DiskStatus;
//! use serde_json::json;
//!
//! let mut connection = Connection::open(&socket, "vm.raw", PATIENCE)?;
//! let reply = connection.execute("x-query-status", json!({}))?;
//! let status: DiskStatus = serde_json::from_value(reply)?;
//! assert_eq!((status.device.as_str(), status.size), ("drive0", 1 << 20));
//! let refusal = connection.ask("block-job-cancel", json!({ "device": "drive0" }))?.unwrap_err();
//! assert_eq!(refusal.class, "DeviceNotActive");
//! # Ok(())
//! # }
//! ```

#![forbid(unsafe_code)]
#![cfg_attr(not(test), warn(clippy::unwrap_used))]

mod arguments;
mod block_stream;
mod call;
mod client;
mod codec;
mod command;
pub mod connection;
mod dispatch;
mod events;
pub mod facts;
mod fanout;
#[cfg(any(test, feature = "testing"))]
#[doc(hidden)]
pub mod fuzzing;
mod job_commands;
mod json;
mod lexer;
mod map;
mod nodes;
mod order;
mod parser;
mod plan;
mod progress;
#[cfg(test)]
mod properties;
mod queries;
mod resize;
mod schema;
mod server;
mod socket;
mod statistics;
mod status;
#[cfg(test)]
mod tests;
mod types;
mod unicode;

pub use call::{IsFile, LogFacts, SourceStatuses, TakeoverSource, Target, Warning};
pub use fanout::ShutdownReason;
pub use server::Server;
pub use socket::{Socket, remove_socket};
