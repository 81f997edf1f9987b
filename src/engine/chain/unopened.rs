//! A remote backing file that is not opened, for commands that describe a chain without asking a
//! server.
//!
//! **Touches:** nothing. **Never:** has a byte: reads are errors.
//! **Locks:** none. **Invariants:** it counts as data everywhere, so that nothing that may be there
//! is taken for zero.

use std::io;

use host::storage::{BlockStatus, ReadAt};
use remote::url::SourceUrl;
use rustix::io::Errno;

use qcow2::format::BackingFormat;

/// The size of a file whose size is not known: the largest of a layer, in bytes.
const ANY_SIZE: u64 = i64::MAX as u64;

/// The stand-in for a remote file.
#[derive(Debug)]
pub(super) struct UnopenedFile {
    /// The name of the file.
    pub(super) name: SourceUrl,
    /// The format that the image above names.
    pub(super) format: BackingFormat,
    /// Virtual size in bytes.
    size: u64,
}

impl UnopenedFile {
    /// `pinned`: the length of the file in bytes, if the overlay has a pin of it. It says nothing
    /// about the virtual size of a qcow2 image.
    pub(super) fn new(name: SourceUrl, format: BackingFormat, pinned: Option<u64>) -> UnopenedFile {
        let size = match format {
            BackingFormat::Raw => pinned.unwrap_or(ANY_SIZE).min(ANY_SIZE),
            BackingFormat::Qcow2 => ANY_SIZE,
        };
        UnopenedFile { name, format, size }
    }
}

impl ReadAt for UnopenedFile {
    fn size(&self) -> u64 {
        self.size
    }

    fn allocated_size(&self) -> io::Result<u64> {
        Ok(0)
    }

    fn read_at(&self, _offset: u64, _buf: &mut [u8]) -> io::Result<()> {
        Err(Errno::IO.into())
    }

    fn status(&self, _offset: u64, max: u64) -> io::Result<(BlockStatus, u64)> {
        Ok((BlockStatus::Data, max))
    }
}
