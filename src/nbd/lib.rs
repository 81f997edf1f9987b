//! A blocking client of NBD servers that only reads.
//!
//! ```text
//!  callers ──▶ client ──▶ pool ──▶ link ──▶ transport ──▶ server
//!     ▲                             │ one thread per link reads the replies
//!     └────── pieces, by channel ◀──┘
//! ```
//!
//! * [`NbdClient`] is shared by any number of threads. It divides a read into requests of at most
//!   1 MiB, and calls the sink in the thread of the caller, with a buffer that the thread of the
//!   link has filled. A caller has several requests in flight while fewer than 8 are on one of the
//!   connections. Each takes 16, so that there is a place for the first request of other callers.
//! * A link is one connection. Its thread takes replies in the order in which the server sends
//!   them, finds the request by its cookie, and never waits for a caller.
//! * If the server allows several connections (NBD_FLAG_CAN_MULTI_CONN), the pool opens another one
//!   when the others are half full.
//!
//! The protocol is that of <https://github.com/NetworkBlockDevice/nbd/blob/master/doc/proto.md>,
//! called "the NBD protocol" in this crate: fixed newstyle negotiation, TLS by NBD_OPT_STARTTLS,
//! structured replies and the metadata context `base:allocation` if the server has them.
//!
//! **Touches:** the network, Unix sockets, a file of certificate authorities. **Never:** writes to
//! an export; falls back from TLS to plain text; retries a request; trusts a length, offset or
//! count that a server has sent.
//! **Locks:** the pool, then the table of a link; the lock that sends, the count of changes and
//! the list of free buffers are leaves. No lock is held while a sink runs or while a reply is
//! received.
//! **Invariants:** a read succeeds only if the server has sent each of its bytes exactly once; each
//! wait ends at a deadline, at the stall timeout or at the end of the connection.

#![forbid(unsafe_code)]
#![cfg_attr(not(test), warn(clippy::unwrap_used))]

use std::fmt;
use std::path::PathBuf;
use std::time::Duration;

mod buffers;
mod client;
mod coverage;
mod error;
#[cfg(any(test, feature = "testing"))]
mod fuzzing;
mod handshake;
mod link;
mod pool;
mod protocol;
mod replies;
mod socket;
mod tls;
mod transport;

#[cfg(test)]
mod hostile_tests;
#[cfg(test)]
mod server_tests;
#[cfg(test)]
mod test_servers;

pub use client::{NbdClient, NbdExtent, NbdPiece};
pub use error::{NbdError, NbdErrorKind};
#[cfg(any(test, feature = "testing"))]
pub use fuzzing::fuzz_conversation;

/// TCP port that IANA has assigned to NBD.
pub const NBD_PORT: u16 = 10809;

/// The place where a server listens.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum NbdAddress {
    /// A TCP port of a host.
    Tcp {
        /// Name or IP address of the host, an IPv6 address without brackets.
        host: String,
        /// TCP port, usually [`NBD_PORT`].
        port: u16,
    },
    /// A socket of this host.
    Unix(PathBuf),
}

impl fmt::Display for NbdAddress {
    /// Writes `host:port`, `[ipv6]:port` or the path of the socket.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            NbdAddress::Tcp { host, port } if host.contains(':') => write!(f, "[{host}]:{port}"),
            NbdAddress::Tcp { host, port } => write!(f, "{host}:{port}"),
            NbdAddress::Unix(path) => write!(f, "{}", path.display()),
        }
    }
}

/// How to check the certificate of a server.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct NbdTls {
    /// PEM file of the certificate authorities that are trusted; `None`: those of this host.
    pub ca_file: Option<PathBuf>,
    /// Name or IP address that the certificate must be for.
    pub server_name: String,
}

/// What to read, and with which limits.
#[derive(Clone, Debug)]
pub struct NbdConfig {
    /// Where the server listens.
    pub address: NbdAddress,
    /// Name of the export, of at most 4096 bytes; the empty name is the server's default export.
    pub export: String,
    /// TLS, which the server must then offer; `None`: plain text.
    pub tls: Option<NbdTls>,
    /// Longest time to connect and negotiate.
    pub connect_timeout: Duration,
    /// Longest time in which no request ends and the server sends less than 4 KiB while requests
    /// are in flight.
    pub stall_timeout: Duration,
    /// Most connections at a time, at least one. More than one is only used if the server allows
    /// several.
    pub connections: usize,
}

impl NbdConfig {
    /// Creates a configuration without TLS: 5 seconds to connect, a stall timeout of 10 seconds,
    /// at most 4 connections.
    pub fn new(address: NbdAddress, export: impl Into<String>) -> NbdConfig {
        NbdConfig {
            address,
            export: export.into(),
            tls: None,
            connect_timeout: Duration::from_secs(5),
            stall_timeout: Duration::from_secs(10),
            connections: 4,
        }
    }
}
