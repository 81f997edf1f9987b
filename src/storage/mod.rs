//! One host file: bytes at offsets, holes, a barrier, locks against other programs.
//!
//! **Touches:** the operating system. **Never:** knows qcow2 or what an offset means.
//! **Locks:** none of ours. **Invariants:** reads are never short; a file that shrank is an error, not zeros (P9).

use std::io;

mod file;
mod locks;

pub use file::{Access, FileStorage};

/// What a range of a file holds, as far as the file system knows without reading it.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Holding {
    /// Bytes that must be read.
    Data,
    /// A hole, or past the end of the file: reads as zero.
    Hole,
}

/// What a file says of how the last program of ours that wrote it has ended. It says so beside its bytes, so the format knows nothing of it.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum OpenMark {
    /// It has closed it, or there was none.
    Absent,
    /// It was killed, or the power went.
    Present,
    /// This file cannot say.
    Unsupported,
}

/// The seam between the engine and the host: the file in `src`, memory and faulty ones in tests.
///
/// Offsets and lengths are bytes. Errors are the operating system's.
pub trait Storage: Send + Sync + std::fmt::Debug {
    /// The size of the file in bytes as far as this handle knows: the size at open, or the end of the farthest write since.
    fn size(&self) -> u64;

    /// Bytes that the file occupies on the host.
    ///
    /// # Errors
    /// Those of fstat(2).
    fn allocated_size(&self) -> io::Result<u64>;

    /// Fills `buf` from `offset`. Never short: past [`Storage::size`] it is zeros.
    ///
    /// # Errors
    /// Those of pread(2); EIO where the file ends before [`Storage::size`], that is, where it shrank under us (P9).
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()>;

    /// Writes all of `data` at `offset`, growing the file where needed.
    ///
    /// # Errors
    /// Those of pwrite(2); after an error any part of `data` may have been written.
    fn write_at(&self, offset: u64, data: &[u8]) -> io::Result<()>;

    /// Gives the space of the range back to the host; it reads as zero afterwards. The size stays.
    ///
    /// # Errors
    /// Those of fallocate(2), among them EOPNOTSUPP where the file system cannot.
    fn punch_hole(&self, offset: u64, len: u64) -> io::Result<()>;

    /// The barrier: when it returns, all writes that had returned before the call are durable (fdatasync(2)).
    ///
    /// # Errors
    /// Those of fdatasync(2). After an error nothing written before may be trusted (P7).
    fn sync(&self) -> io::Result<()>;

    /// Whether [`Storage::set_open_mark`] was called without [`Storage::remove_open_mark`] after it. A storage that does not outlive its user
    /// has none.
    ///
    /// # Errors
    /// Those of fgetxattr(2).
    fn open_mark(&self) -> io::Result<OpenMark> {
        Ok(OpenMark::Absent)
    }

    /// Sets the mark, durably. Where the file cannot have one, or has no room for it, nothing happens.
    ///
    /// # Errors
    /// Those of fsetxattr(2) and fsync(2). After one of fsync nothing written before may be trusted (P7).
    fn set_open_mark(&self) -> io::Result<()> {
        Ok(())
    }

    /// Removes the mark; a loss of power may bring it back.
    ///
    /// # Errors
    /// Those of fremovexattr(2).
    fn remove_open_mark(&self) -> io::Result<()> {
        Ok(())
    }

    /// What the file holds at `offset`, and for how many bytes, at most `max` (> 0). A hint without I/O.
    ///
    /// # Errors
    /// Those of lseek(2).
    fn holding(&self, offset: u64, max: u64) -> io::Result<(Holding, u64)>;
}
