//! The control socket: QMP, the protocol of QEMU's monitors, as QEMU 10.2 speaks it, with the names of 2012 besides.
//!
//! ```text
//!  socket ─▶ Decoder ─▶ Session ─▶ command table ─▶ Jobs, Streams, facts of the Disk, Disk::grow
//!   (one thread per client)                │ reply
//!  socket ◀─ Outbox ◀── Fanout ◀───────────┘
//!   (one more thread)    ▲ events, before the replies that come after them
//!                        └── Jobs::subscribe
//! ```
//!
//! **Touches:** one Unix socket, `job`, `stream::Streams`, facts and the size of the `disk`, the list of `map`. **Never:** FUSE, the image, a file that a client names; I/O of the disk's bytes.
//! **Locks:** the fan-out (order of what clients are sent), then the jobs' or one outbox (its bytes); neither is held while a socket is read or written,
//! nor while a command runs. Before all of them, whatever starts a job or changes the size of the disk.
//! **Invariants:** replies to a client come in the order of its requests; an event that happened before a reply was made is sent before it; a client that has
//! not negotiated is sent nothing but the greeting and replies; a client that does not read loses its connection and nothing else; memory per client is bounded;
//! nobody but the owner of the process and root is served.

mod arguments;
mod block_stream;
mod call;
mod client;
mod codec;
mod command;
mod dispatch;
mod events;
mod fanout;
#[cfg(any(test, fuzzing))]
#[doc(hidden)]
pub mod fuzzing;
mod job_commands;
mod json;
mod lexer;
mod map;
mod nodes;
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

pub use call::{IsFile, Target};
pub use fanout::ShutdownReason;
pub use server::Server;
pub use socket::{Socket, remove_socket};
