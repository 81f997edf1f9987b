//! The process that reads from servers. It has the network and the credentials, and opens no image:
//! it brings ranges of remote files into files of the cache, which the serving processes of disks
//! read. If it may, it writes orders beside those files (`mount --learn`), and nothing else.
//!
//! A request arrives in [`serve`], becomes ranges in a download (`download.rs`), is claimed in the
//! cache so that one fetcher of the host fetches it, is read from a [`source`], and is written into
//! the cache (`writer.rs`) after it was compared with what the file is pinned to.
//!
//! **Touches:** servers, the cache directory, files with credentials. **Never:** opens an image;
//! prints a credential.

#![forbid(unsafe_code)]
#![cfg_attr(not(test), warn(clippy::unwrap_used))]

mod ahead;
mod beside;
pub mod config;
pub mod confine;
mod connector;
mod demand;
mod download;
#[cfg(test)]
mod faults;
mod head;
mod health;
mod nbd_source;
mod network;
mod object;
mod permissions;
mod redact;
pub mod serve;
mod slots;
pub mod source;
mod space;
mod web;
mod writer;

use std::io::Write;

use remote::url::{Scheme, SourceUrl};

use config::SourcesConfig;
use source::{RemoteSource, SourceError};

pub use network::Network;
pub use permissions::Permissions;

/// Makes each panic one line on standard error, without what may be a secret, and the end of this
/// process. A thread that is missing would leave requests without an answer.
pub fn panic_in_one_line() {
    std::panic::set_hook(Box::new(|panic| {
        let thread = std::thread::current();
        let name = thread.name().unwrap_or("?");
        let _ = writeln!(std::io::stderr(), "{}", redact::panic_line(name, &panic.to_string()));
        std::process::abort();
    }));
}

/// Opens the file at `url`, of any protocol.
///
/// # Errors
/// As [`source::open`].
pub fn open(url: &SourceUrl, config: &SourcesConfig) -> Result<Box<dyn RemoteSource>, SourceError> {
    match url.scheme() {
        Scheme::Nbd | Scheme::Nbds | Scheme::NbdUnix => {
            Ok(Box::new(nbd_source::NbdSource::open(url, config)?))
        }
        _ => source::open(url, config),
    }
}
