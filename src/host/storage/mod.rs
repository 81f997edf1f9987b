//! One host file: reads and writes at offsets, holes, a barrier, locks against other programs, and
//! the user rights with which it is opened.
//!
//! **Touches:** the operating system.
//! **Never:** knows qcow2 or what an offset means.
//! **Locks:** no locks between threads; fcntl(2) locks against other programs.
//! **Invariants:** reads are never short; a file that shrank is an error, not zeros (P9).

use std::any::Any;
use std::fs::File;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::{fmt, io};

use rustix::io::Errno;
use serde::{Deserialize, Serialize};

mod file;
mod holders;
mod locks;
mod memory_file;
mod rights;
mod version;

pub use file::{Access, FileStorage};
pub use memory_file::{MemoryFile, SharedBytes};
pub use rights::Rights;
pub use version::{Ask, Version};

/// The content of a range of a file, as far as the file system knows it without reading.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum BlockStatus {
    /// Bytes that must be read.
    Data,
    /// A hole, or a range past the end of the file: reads as zeros.
    Hole,
}

/// The kind of data that a write contains. Code that checks the order of writes needs it: the rules
/// R1 to R8 are about kinds, which a file system does not know.
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub enum WriteKind {
    /// Fields of the header, in the first cluster.
    Header,
    /// The refcount table: some entries, or a new table as a whole.
    RefcountTable,
    /// Pieces of refcount blocks.
    RefcountBlock,
    /// The L1 table: some entries, or a new table as a whole.
    L1Table,
    /// Pieces of L2 tables.
    L2Table,
    /// Whole clusters of guest data that no entry on disk names yet.
    NewCluster,
    /// Guest data in place, in clusters that the guest already owns.
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

/// The space of the file system that holds a file, in bytes.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct HostSpace {
    /// Bytes available to unprivileged users (`f_bavail`).
    pub free: u64,
    /// Total size, in bytes.
    pub total: u64,
}

/// The identity of a file. A note beside the bytes of a file contains it, because programs that
/// copy files copy such notes as well. It stays the same after a reboot and after a rename. A copy,
/// a file restored from a backup in its place, and a file on another file system have other
/// identities.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct FileId {
    /// `f_fsid` of statvfs(3), or the device number; `None` if neither survives an unmount.
    #[serde(skip_serializing_if = "Option::is_none")]
    file_system: Option<String>,
    /// The inode number. Alone it is not enough, because a new file can get the number of a deleted
    /// one.
    inode: u64,
    /// Creation time; `None` if the file system does not record it.
    #[serde(skip_serializing_if = "Option::is_none")]
    born: Option<String>,
}

/// The record of how the last program of this workspace that wrote a file has ended. It is stored
/// beside the bytes of the file, not in the format.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum OpenMark {
    /// The program closed the file, or there was none.
    Absent,
    /// The program was killed, or the power failed.
    Present,
    /// The file cannot have such a mark.
    Unsupported,
    /// The file is not locked, so a mark may be that of a program that is still running.
    Unlocked,
}

/// A file whose blocks may be shared with another file. Code that holds only this value can neither
/// read nor write the file.
#[derive(Clone, Copy, Debug)]
pub struct CloneSource<'a>(&'a dyn ReadAt);

impl<'a> CloneSource<'a> {
    /// Makes a source of this file.
    pub fn new(file: &'a dyn ReadAt) -> CloneSource<'a> {
        CloneSource(file)
    }

    /// Returns the file if it has the type `T`: blocks are shared only between files of one type.
    pub fn of_kind<T: ReadAt>(self) -> Option<&'a T> {
        let file: &dyn Any = self.0;
        file.downcast_ref()
    }

    /// See [`ReadAt::clone_with`].
    ///
    /// # Errors
    /// Those of [`ReadAt::clone_with`].
    pub(crate) fn clone_with(
        self,
        offset: u64,
        len: u64,
        clone: &mut dyn FnMut(&File) -> io::Result<()>,
    ) -> io::Result<()> {
        self.0.clone_with(offset, len, clone)
    }
}

/// How soon a range will be read that no thread waits for ([`ReadAt::will_need`]). What comes first
/// in this order is fetched first.
#[derive(Clone, Copy, Debug, Deserialize, Eq, Ord, PartialEq, PartialOrd, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Need {
    /// It lies beside what a guest has just read.
    Soon,
    /// Guests have read it after what this guest has read.
    Next,
    /// A stream comes to it in the course of its walk.
    Later,
}

/// A host file for reading. Code that holds only this trait cannot write the file, by type; the
/// backing chain holds its files so.
///
/// Offsets and lengths are in bytes. Errors are those of the operating system.
pub trait ReadAt: Any + Send + Sync + fmt::Debug {
    /// Returns the size of the file in bytes, as far as this handle knows: the size at open, or the
    /// end of the farthest write since.
    fn size(&self) -> u64;

    /// Returns how many bytes the file occupies on the host.
    ///
    /// # Errors
    /// Those of fstat(2).
    fn allocated_size(&self) -> io::Result<u64>;

    /// Returns whether this is a block device instead of a file.
    fn is_block_device(&self) -> bool {
        false
    }

    /// Returns whether the file has no name any more, as far as this host knows. Never waits, not
    /// even for the server of a network file system.
    fn is_deleted(&self) -> bool {
        false
    }

    /// Returns the version of the file now. The host changes the version before it changes a byte,
    /// so bytes that were read between two equal versions are those of one unchanged file.
    /// [`FileStorage::settle`] lists the exceptions.
    ///
    /// # Errors
    /// Those of statx(2).
    fn version(&self, _ask: Ask) -> io::Result<Version> {
        Ok(Version { size: self.size(), modified: None })
    }

    /// Returns a duplicate of the descriptor, for [`FileStorage::of_descriptor`] in another
    /// process. The locks stay as long as it is open, unless this value is dropped: the drop
    /// releases them.
    ///
    /// # Errors
    /// Those of fcntl(2); EOPNOTSUPP if this is no host file.
    fn descriptor(&self) -> io::Result<OwnedFd> {
        Err(Errno::OPNOTSUPP.into())
    }

    /// Fills `buf` from `offset`. The read is never short: bytes past [`ReadAt::size`] are zeros.
    ///
    /// # Errors
    /// Those of pread(2); EIO if the file ends before [`ReadAt::size`], because it was truncated
    /// while open (P9).
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()>;

    /// Fills `buf` from `offset` if that takes no waiting for a disk or for another machine,
    /// because the host has the bytes in memory. Returns whether it has filled all of `buf`. After
    /// `false` the content of `buf` is arbitrary, and [`ReadAt::read_at`] reports errors, if any.
    fn read_cached(&self, _offset: u64, _buf: &mut [u8]) -> bool {
        false
    }

    /// Makes later reads return what the disk holds: writes back the dirty pages of the file, and
    /// drops the host's cached pages, including those of a failed write-back. Call it only while no
    /// other program uses the file. A storage that does not outlive its process has no such pages.
    ///
    /// # Errors
    /// Those of fdatasync(2) and posix_fadvise(2). The pages are dropped even after an error of
    /// fdatasync.
    fn drop_cache(&self) -> io::Result<()> {
        Ok(())
    }

    /// Returns the block status at `offset` and for how many bytes it holds, at most `max` (> 0).
    /// It is a hint that needs no I/O.
    ///
    /// # Errors
    /// Those of lseek(2).
    fn status(&self, offset: u64, max: u64) -> io::Result<(BlockStatus, u64)>;

    /// Returns an open file that has the bytes of this range at the same offsets, for a file system
    /// that can share its blocks with another file; brings the range there first, if it is on
    /// another machine. A length of 0 asks for the file alone.
    ///
    /// # Errors
    /// EOPNOTSUPP if there is no such file; the errors of [`ReadAt::read_at`].
    fn file_for_clone(&self, _offset: u64, _len: u64) -> io::Result<Arc<File>> {
        Err(Errno::OPNOTSUPP.into())
    }

    /// Calls `clone` with the file of [`ReadAt::file_for_clone`]. After an error, what `clone` has
    /// shared is not to be used: the range may have left the file meanwhile.
    ///
    /// # Errors
    /// Those of [`ReadAt::file_for_clone`] and of `clone`; EAGAIN if the file may not have had the
    /// bytes of the range all the time.
    fn clone_with(
        &self,
        offset: u64,
        len: u64,
        clone: &mut dyn FnMut(&File) -> io::Result<()>,
    ) -> io::Result<()> {
        let file = self.file_for_clone(offset, len)?;
        clone(&file)
    }

    /// Says that the range will be read soon, so that a file on another machine can be on its way
    /// before it is asked for. It is a hint: it waits for nothing and cannot fail.
    fn will_need(&self, _offset: u64, _len: u64, _need: Need) {}

    /// Takes back what [`ReadAt::will_need`] has said of ranges that are not on their way yet.
    fn need_no_more(&self) {}

    /// Says that the range will not be read again, because a layer above holds it now. A cache that
    /// keeps nothing frees it. It is a hint: the range may be read all the same, and then has the
    /// same bytes. It waits for nothing and cannot fail.
    fn done(&self, _offset: u64, _len: u64) {}
}

/// A host file for reading and writing: the interface between the engine and the host. The program
/// implements it with a file; tests implement it with memory and with files that fail.
///
/// Each write carries its [`WriteKind`], which a file ignores. The kind is an argument of the write
/// and not a separate call, so that a checker of the order sees the kind and the write as one
/// event.
///
/// Offsets and lengths are in bytes. Errors are those of the operating system.
pub trait Storage: ReadAt {
    /// Writes all of `data`, which is of this kind, at `offset`. Grows the file if needed.
    ///
    /// # Errors
    /// Those of pwrite(2). After an error any part of `data` may have been written.
    fn write_at(&self, kind: WriteKind, offset: u64, data: &[u8]) -> io::Result<()>;

    /// Checks whether blocks of `source` may be shared with this file, as far as that can be known
    /// without doing it, and whether [`Storage::clone_range`] keeps its promises here. Changes
    /// nothing.
    ///
    /// # Errors
    /// The reason why not, as for [`Storage::clone_range`].
    fn can_clone(&self, _source: CloneSource<'_>) -> io::Result<()> {
        Err(Errno::OPNOTSUPP.into())
    }

    /// Replaces the `len` bytes at `to` by the bytes that `source` has at `from`, by sharing its
    /// blocks: nothing is read and nothing is copied. The bytes are of this kind afterwards. In
    /// every other respect this is a write: it grows the file if needed, and the next barrier makes
    /// it durable, together with the bytes of `source`, even if those were not durable. A later
    /// change of either file does not affect the other one.
    ///
    /// # Errors
    /// Those of ioctl_ficlonerange(2); after an error any part may have been done. Most of them say
    /// that cloning is not possible here: EOPNOTSUPP and ENOTTY (this file system or kind of file),
    /// EXDEV (two file systems), EINVAL (not whole blocks of the file system, or not inside
    /// `source`, for example because it shrank), ETXTBSY (swap); EAGAIN is that of
    /// [`ReadAt::clone_with`]. The bytes can always be copied
    /// instead, so none of these errors means that the host fails: see [`cannot_clone`].
    fn clone_range(
        &self,
        _kind: WriteKind,
        _source: CloneSource<'_>,
        _from: u64,
        _to: u64,
        _len: u64,
    ) -> io::Result<()> {
        Err(Errno::OPNOTSUPP.into())
    }

    /// Returns the space of the range to the host; the range reads as zeros afterwards. The size
    /// does not change.
    ///
    /// # Errors
    /// Those of fallocate(2), among them EOPNOTSUPP if the file system cannot punch holes.
    fn punch_hole(&self, offset: u64, len: u64) -> io::Result<()>;

    /// The barrier: when it returns, all writes that had returned before the call are durable
    /// (fdatasync(2)).
    ///
    /// # Errors
    /// Those of fdatasync(2). After an error no earlier write may be trusted (P7).
    fn sync(&self) -> io::Result<()>;

    /// Starts the write-back of bytes that were just written, so that the next [`Storage::sync`]
    /// has less to do. It is a hint: it orders nothing, promises nothing and cannot fail. It may
    /// wait for a busy disk, so it must not be called under a lock, nor before the reply to a guest
    /// is sent.
    fn start_write_out(&self, _offset: u64, _len: u64) {}

    /// Frees blocks behind the end of the file that this storage has allocated for writes
    /// to come. The writer calls this after its last write: a write that runs at the same
    /// time may be lost. A failure is only logged, since the next writer uses these
    /// blocks.
    fn free_unused_blocks(&self) {}

    /// Returns the space of the file system. `None` if it is unknown or does not matter: memory,
    /// block devices, file systems that do not report it.
    ///
    /// # Errors
    /// Those of fstatvfs(3).
    fn space(&self) -> io::Result<Option<HostSpace>> {
        Ok(None)
    }
}

/// Metadata beside the bytes of a file, in extended attributes. It is taken once, when an image is
/// opened, and passed to the code that keeps notes. The qcow2 format does not contain it.
pub trait Sidecar: Send + Sync + fmt::Debug {
    /// Returns the note of [`Sidecar::set_base_note`]; `None` if that was never called or the file
    /// cannot have attributes.
    ///
    /// # Errors
    /// Those of fgetxattr(2).
    fn base_note(&self) -> io::Result<Option<String>> {
        Ok(None)
    }

    /// Stores a note beside the bytes. Does nothing if the file cannot have attributes, or has no
    /// space for this one.
    ///
    /// # Errors
    /// Those of fsetxattr(2).
    fn set_base_note(&self, _note: &str) -> io::Result<()> {
        Ok(())
    }

    /// Returns the identity of the file; `None` for a file in memory.
    ///
    /// # Errors
    /// Those of statx(2) and fstatvfs(3).
    fn file_id(&self) -> io::Result<Option<FileId>> {
        Ok(None)
    }

    /// Returns the note of [`Sidecar::set_stream_note`]; `None` if there is none or the file cannot
    /// have attributes. The note is untrusted: the creator of the file may have written it.
    ///
    /// # Errors
    /// Those of fgetxattr(2), among them ERANGE for a note that is longer than
    /// [`crate::attributes::LONGEST_STREAM_NOTE`].
    fn stream_note(&self) -> io::Result<Option<Vec<u8>>> {
        Ok(None)
    }

    /// Stores a note of the running stream beside the bytes, or removes it. The change is not
    /// durable by itself: an fsync(2) here would consume an error that the next [`Storage::sync`]
    /// must report (P7).
    ///
    /// # Errors
    /// Those of fsetxattr(2), among them that the file cannot have attributes; those of
    /// fremovexattr(2).
    fn set_stream_note(&self, _note: Option<&str>) -> io::Result<()> {
        Ok(())
    }

    /// Hands the mark of an open image and the note of a stream over to another process: from now
    /// on [`Sidecar::remove_open_mark`] does nothing. Returns the file, opened again without this
    /// file's locks; `None` if the file cannot have attributes.
    ///
    /// # Errors
    /// Those of open(2) and fstat(2).
    fn entrust_attributes(&self) -> io::Result<Option<OwnedFd>> {
        Ok(None)
    }

    /// Returns whether [`Sidecar::set_open_mark`] was called without a later
    /// [`Sidecar::remove_open_mark`]. A storage that does not outlive its process has no mark.
    ///
    /// # Errors
    /// Those of fgetxattr(2).
    fn open_mark(&self) -> io::Result<OpenMark> {
        Ok(OpenMark::Absent)
    }

    /// Sets the mark, durably. Does nothing if the file cannot have attributes, or has no space for
    /// this one.
    ///
    /// # Errors
    /// Those of fsetxattr(2) and fsync(2). After an error of fsync no earlier write may be trusted
    /// (P7).
    fn set_open_mark(&self) -> io::Result<()> {
        Ok(())
    }

    /// Removes the mark. A loss of power may bring it back.
    ///
    /// # Errors
    /// Those of fremovexattr(2).
    fn remove_open_mark(&self) -> io::Result<()> {
        Ok(())
    }
}

/// A sidecar that stores nothing.
#[derive(Clone, Copy, Debug)]
pub struct NoSidecar;

impl Sidecar for NoSidecar {}

/// What an error of [`Storage::clone_range`] means for later attempts.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum CannotClone {
    /// Nothing: there was no space for this range (XFS shares blocks only inside one allocation
    /// group, and returns this error if that group is full), or its bytes have left the cache.
    Now,
    /// Cloning between these files is never possible.
    Ever,
    /// The host failed. The copy that follows reports the error, if it persists.
    Failed,
}

/// Classifies the errors of [`Storage::clone_range`]. None of them is an error of the request that
/// wanted the bytes, because the bytes can be copied instead.
pub fn cannot_clone(error: &io::Error) -> CannotClone {
    let Some(errno) = Errno::from_io_error(error) else { return CannotClone::Failed };
    match errno {
        Errno::NOSPC | Errno::DQUOT | Errno::AGAIN => CannotClone::Now,
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
