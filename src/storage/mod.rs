//! One host file: bytes at offsets, holes, a barrier, locks against other programs.
//!
//! **Touches:** the operating system. **Never:** knows qcow2 or what an offset means.
//! **Locks:** none of ours. **Invariants:** reads are never short; a file that shrank is an error, not zeros (P9).

use std::os::fd::OwnedFd;
use std::{fmt, io};

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

/// What a write is, for those who watch the order of writes: rules R1 to R8 are about kinds, and a file system knows none.
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub enum WriteKind {
    /// Fields of the header, in the first cluster.
    Header,
    /// The refcount table: entries of it, or a new one as a whole.
    RefcountTable,
    /// Pieces of refcount blocks.
    RefcountBlock,
    /// The L1 table: entries of it, or a new one as a whole.
    L1Table,
    /// Pieces of L2 tables.
    L2Table,
    /// Whole clusters of guest data that nothing on disk names yet.
    NewCluster,
    /// Guest data in place, in clusters that are the guest's already.
    Data,
}

impl fmt::Display for WriteKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            WriteKind::Header => "header",
            WriteKind::RefcountTable => "refcount table",
            WriteKind::RefcountBlock => "refcount block",
            WriteKind::L1Table => "L1 table",
            WriteKind::L2Table => "L2 table",
            WriteKind::NewCluster | WriteKind::Data => "data",
        })
    }
}

/// The space of the file system that a file lies on, in bytes.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct HostSpace {
    /// What whoever is not root may still use.
    pub free: u64,
    /// All of it.
    pub total: u64,
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

    /// Writes all of `data`, which is of this kind, at `offset`, growing the file where needed.
    ///
    /// # Errors
    /// Those of pwrite(2); after an error any part of `data` may have been written.
    fn write_at(&self, kind: WriteKind, offset: u64, data: &[u8]) -> io::Result<()>;

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

    /// Asks for these bytes, which were just written, to be on their way to the disk before the next [`Storage::sync`], which then has little left to
    /// do. A hint: it orders nothing, promises nothing and cannot fail. It may wait for a disk that is busy: never under a lock, and never before
    /// a guest is answered.
    fn start_write_out(&self, _offset: u64, _len: u64) {}

    /// The space where the file lies; `None` where nobody knows or it does not matter: memory, block devices, file systems that do not say.
    ///
    /// # Errors
    /// Those of fstatvfs(3).
    fn space(&self) -> io::Result<Option<HostSpace>> {
        Ok(None)
    }

    /// What [`Storage::set_base_note`] has left beside the bytes; `None` where it was never called or the file cannot have any.
    ///
    /// # Errors
    /// Those of fgetxattr(2).
    fn base_note(&self) -> io::Result<Option<String>> {
        Ok(None)
    }

    /// Leaves a note beside the bytes. Where the file cannot have one, or has no room for it, nothing happens.
    ///
    /// # Errors
    /// Those of fsetxattr(2).
    fn set_base_note(&self, _note: &str) -> io::Result<()> {
        Ok(())
    }

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

    /// Leaves the removal of the mark to somebody else: [`Storage::remove_open_mark`] does nothing from now on. Returns what that takes, the
    /// file, opened once more and without our locks, and the name of the attribute; `None` where there is no mark.
    ///
    /// # Errors
    /// Those of open(2) and fgetxattr(2).
    fn entrust_open_mark(&self) -> io::Result<Option<(OwnedFd, &'static str)>> {
        Ok(None)
    }

    /// What the file holds at `offset`, and for how many bytes, at most `max` (> 0). A hint without I/O.
    ///
    /// # Errors
    /// Those of lseek(2).
    fn holding(&self, offset: u64, max: u64) -> io::Result<(Holding, u64)>;
}
