//! Small files beside a remote file: chunk lists and orders. They are read and written as a whole,
//! and have no file in the cache.
//!
//! **Touches:** servers by [`RemoteSource`]. **Never:** writes bytes that are no order.

use std::os::fd::OwnedFd;
use std::time::Instant;

use bytes::Bytes;

use host::storage::{MemoryFile, SharedBytes as _};
use host::{Error, ErrorKind, Result};
use order::{LONGEST_FILE, Order};
use remote::url::SourceUrl;

use crate::health::retried;
use crate::source::{RemoteSource, Retry, SourceError};

/// Reads the file `url` of at most `longest` bytes, as it is now. Asks again until `deadline`.
///
/// # Errors
/// The file does not exist, or is longer; the server does not answer.
pub(crate) fn read_whole(
    url: &SourceUrl,
    source: &dyn RemoteSource,
    longest: u64,
    deadline: Option<Instant>,
) -> Result<Vec<u8>> {
    retried(url, source, deadline, || {
        let pin = source.look()?;
        if pin.size > longest {
            let text = format!("has {} bytes, and {longest} are the most", pin.size);
            return Err(SourceError::new(Retry::Never, text));
        }
        let mut bytes = Vec::new();
        source.read(&pin, 0..pin.size, &mut |piece| {
            bytes.extend_from_slice(piece);
            Ok(())
        })?;
        Ok(bytes)
    })
}

/// Writes the first `len` bytes of `memory` as the file `url`. Asks again until `deadline`.
///
/// # Errors
/// The memory has not as many bytes, or they are no order; the server takes no files, refuses the
/// credentials, or does not answer.
pub(crate) fn write_order(
    url: &SourceUrl,
    source: &dyn RemoteSource,
    memory: Option<OwnedFd>,
    len: u64,
    deadline: Option<Instant>,
) -> Result<()> {
    let invalid = |why: &str| Error::new(ErrorKind::InvalidArgument, format!("{url}: {why}"));
    let memory = memory.ok_or_else(|| invalid("the request to write it carries no bytes"))?;
    let memory = MemoryFile::of_descriptor(memory)?;
    if len > memory.size().min(LONGEST_FILE) {
        return Err(invalid("the order is too long"));
    }
    let mut bytes = vec![0; usize::try_from(len).unwrap_or_default()];
    memory.read_at(0, &mut bytes).map_err(|error| Error::io(url.to_string(), error))?;
    // The server is to have nothing from a process that was taken over but an order.
    Order::decode(&bytes).map_err(|error| invalid(&error.to_string()))?;
    let bytes = Bytes::from(bytes);
    retried(url, source, deadline, || source.write(bytes.clone()))
}
