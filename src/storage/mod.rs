//! One host file: bytes at offsets, holes, a barrier, locks against other programs, and with whose rights it is opened.
//!
//! **Touches:** the operating system. **Never:** knows qcow2 or what an offset means.
//! **Locks:** none of ours. **Invariants:** reads are never short; a file that shrank is an error, not zeros (P9).

use std::any::Any;
use std::os::fd::OwnedFd;
use std::{fmt, io};

use rustix::io::Errno;
use serde::{Deserialize, Serialize};

mod file;
mod holders;
mod locks;
mod rights;
mod version;

pub use file::{Access, FileStorage};
pub use rights::Rights;
pub use version::{Ask, Version};

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

/// Which file it is. A note beside the bytes of a file names it, since programs that copy files copy
/// such notes as well. The same after a reboot and after a rename; another one for a copy, for what is
/// restored from a backup in place of the file, and on another file system.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct FileId {
    /// `f_fsid` of statvfs(3), or the device number; `None` where neither outlives a mount.
    #[serde(skip_serializing_if = "Option::is_none")]
    file_system: Option<String>,
    /// The number of a deleted file can be given to a new one.
    inode: u64,
    /// When the file was made; `None` where the file system does not know.
    #[serde(skip_serializing_if = "Option::is_none")]
    born: Option<String>,
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
    /// Other programs cannot be kept off: a mark may be that of a program that is still at work.
    Unlocked,
}

/// A file whose blocks may be shared with another one. Good for nothing else: whoever holds one can neither read nor write the file.
#[derive(Clone, Copy, Debug)]
pub struct CloneSource<'a>(&'a dyn Storage);

impl<'a> CloneSource<'a> {
    /// This file, as a source.
    pub fn new(file: &'a dyn Storage) -> CloneSource<'a> {
        CloneSource(file)
    }

    /// The file, if it is of the kind that asks: blocks are shared between files of one kind.
    pub fn of_kind<T: Storage>(self) -> Option<&'a T> {
        let file: &dyn Any = self.0;
        file.downcast_ref()
    }
}

/// The seam between the engine and the host: the file in `src`, memory and faulty ones in tests.
///
/// Offsets and lengths are bytes. Errors are the operating system's.
pub trait Storage: Any + Send + Sync + std::fmt::Debug {
    /// The size of the file in bytes as far as this handle knows: the size at open, or the end of the farthest write since.
    fn size(&self) -> u64;

    /// Bytes that the file occupies on the host.
    ///
    /// # Errors
    /// Those of fstat(2).
    fn allocated_size(&self) -> io::Result<u64>;

    /// Whether it is a block device, and no file.
    fn is_block_device(&self) -> bool {
        false
    }

    /// Whether the file has no name any more. Never waits, not for the server of a network file
    /// system either: by what the host knows.
    fn is_deleted(&self) -> bool {
        false
    }

    /// What the file is like now. The host changes this before it changes a byte: bytes that were
    /// read between two equal answers are those of one file, unchanged. What that does not cover is
    /// said at [`FileStorage::settle`].
    ///
    /// # Errors
    /// Those of statx(2).
    fn version(&self, _ask: Ask) -> io::Result<Version> {
        Ok(Version { size: self.size(), modified: None })
    }

    /// Fills `buf` from `offset`. Never short: past [`Storage::size`] it is zeros.
    ///
    /// # Errors
    /// Those of pread(2); EIO where the file ends before [`Storage::size`], that is, where it shrank under us (P9).
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()>;

    /// Fills `buf` from `offset` if nobody has to be waited for, no disk and no other machine: it is in memory. Says whether it has; if not, or if
    /// something is wrong, `buf` holds anything, and [`Storage::read_at`] tells more.
    fn read_cached(&self, _offset: u64, _buf: &mut [u8]) -> bool {
        false
    }

    /// Writes all of `data`, which is of this kind, at `offset`, growing the file where needed.
    ///
    /// # Errors
    /// Those of pwrite(2); after an error any part of `data` may have been written.
    fn write_at(&self, kind: WriteKind, offset: u64, data: &[u8]) -> io::Result<()>;

    /// Whether blocks of `source` may be shared with this file at all, as far as can be known without doing it, and [`Storage::clone_range`] keeps
    /// its promise there. Changes nothing.
    ///
    /// # Errors
    /// Why they cannot be, as of [`Storage::clone_range`].
    fn can_clone(&self, _source: CloneSource<'_>) -> io::Result<()> {
        Err(Errno::OPNOTSUPP.into())
    }

    /// Makes the `len` bytes at `to`, which are of this kind then, those that `source` has at `from`, by sharing its blocks: nothing is read, and
    /// nothing copied. A write in every other respect: it grows the file where needed, and the next barrier makes it durable, together with the bytes
    /// of `source`, whether those were durable or not. What either file gets later the other one does not see.
    ///
    /// # Errors
    /// Those of ioctl_ficlonerange(2); after one, any part may have been done. Above all that it cannot be done here: EOPNOTSUPP and ENOTTY (not by
    /// this file system or kind of file), EXDEV (two file systems), EINVAL (not whole blocks of the file system, or not inside `source`, as where
    /// that shrank), ETXTBSY (swap). The bytes can always be copied instead, so none of them says that the host is ill: see [`cannot_clone`].
    fn clone_range(&self, _kind: WriteKind, _source: CloneSource<'_>, _from: u64, _to: u64, _len: u64) -> io::Result<()> {
        Err(Errno::OPNOTSUPP.into())
    }

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

    /// Makes later reads show what the disk holds: writes back what the host has in memory and the disk has not, and drops
    /// the host's copies of the file, those of a failed write-back too. To be called where no other program uses the file.
    /// A storage that does not outlive its user has no such copies.
    ///
    /// # Errors
    /// Those of fdatasync(2) and posix_fadvise(2). After an error of fdatasync the copies are dropped all the same.
    fn drop_cache(&self) -> io::Result<()> {
        Ok(())
    }

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

    /// Which file it is; `None` for one that is in memory only.
    ///
    /// # Errors
    /// Those of statx(2) and fstatvfs(3).
    fn file_id(&self) -> io::Result<Option<FileId>> {
        Ok(None)
    }

    /// What [`Storage::set_stream_note`] has left beside the bytes; `None` where there is none or the file cannot have any. Whoever made the file may
    /// have written it.
    ///
    /// # Errors
    /// Those of fgetxattr(2), among them ERANGE for one that is longer than [`crate::attributes::LONGEST_STREAM_NOTE`].
    fn stream_note(&self) -> io::Result<Option<Vec<u8>>> {
        Ok(None)
    }

    /// Leaves a note of the running stream beside the bytes, or removes it. Not durable by itself: an fsync(2) of its own would take an error away
    /// from the next [`Storage::sync`], whose business it is (P7).
    ///
    /// # Errors
    /// Those of fsetxattr(2), among them that the file cannot have any; those of fremovexattr(2).
    fn set_stream_note(&self, _note: Option<&str>) -> io::Result<()> {
        Ok(())
    }

    /// Leaves the mark of an open image and the note of a stream to another process: [`Storage::remove_open_mark`] does
    /// nothing from now on. Returns the file, opened once more and without the locks of this one;
    /// `None` where the file has no attributes.
    ///
    /// # Errors
    /// Those of open(2) and fstat(2).
    fn entrust_attributes(&self) -> io::Result<Option<OwnedFd>> {
        Ok(None)
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

    /// What the file holds at `offset`, and for how many bytes, at most `max` (> 0). A hint without I/O.
    ///
    /// # Errors
    /// Those of lseek(2).
    fn holding(&self, offset: u64, max: u64) -> io::Result<(Holding, u64)>;
}

/// What an error of [`Storage::clone_range`] says of the next try.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum CannotClone {
    /// Nothing: there was no space, for this one. XFS shares only inside a group of blocks, and says so where that one is full.
    Now,
    /// It will never be possible between these files.
    Ever,
    /// The host fails. Whoever copies will be told what is wrong with it, if anything is.
    Failed,
}

/// Sorts the errors of [`Storage::clone_range`]. None of them is an error of whoever wanted the bytes.
pub fn cannot_clone(error: &io::Error) -> CannotClone {
    let Some(errno) = Errno::from_io_error(error) else { return CannotClone::Failed };
    match errno {
        Errno::NOSPC | Errno::DQUOT => CannotClone::Now,
        Errno::OPNOTSUPP
        | Errno::NOTTY
        | Errno::NOSYS
        | Errno::XDEV
        | Errno::INVAL
        | Errno::PERM
        | Errno::ACCESS
        | Errno::BADF
        | Errno::ISDIR
        | Errno::TXTBSY => CannotClone::Ever,
        _ => CannotClone::Failed,
    }
}
