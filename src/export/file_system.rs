//! The interface between the transports and the file that they serve: the disk, or a stub without
//! storage in a benchmark.

use rustix::fs::StatVfs;
use rustix::io::Errno;

use super::attributes::AttributeChanges;
use super::handler::{Answer, Durability, Stat, Truncate};

/// Receives the bytes of a read, or an error.
pub type ReadAnswer<'a> = dyn FnMut(Result<&[u8], Errno>) + 'a;

/// A file system with one file. Any thread may call any method, concurrently with other threads.
/// Offsets and lengths are in bytes.
pub trait FileSystem: Send + Sync + std::fmt::Debug {
    /// stat(2).
    ///
    /// # Errors
    /// EIO and similar: fstat of the overlay failed.
    fn getattr(&self) -> Result<Stat, Errno>;

    /// truncate(2), chmod(2), chown(2), utimensat(2), and open(2) with O_TRUNC. A change of size is
    /// refused before the other changes are made, so none is done by half.
    ///
    /// # Errors
    /// EROFS, EINVAL or EPERM for another size; those of a change of attributes and of
    /// [`FileSystem::getattr`].
    fn setattr(
        &self,
        truncate: Option<Truncate>,
        changes: &AttributeChanges,
    ) -> Result<Stat, Errno>;

    /// open(2). O_TRUNC arrives as a separate [`FileSystem::setattr`] after the open (see
    /// [`Truncate`]).
    ///
    /// # Errors
    /// EROFS for opening a read-only disk for writing.
    fn open(&self, open_flags: i32) -> Result<(), Errno>;

    /// Tells the file system that another process has served it before and was killed. Changes that
    /// were answered there may not be durable, so [`FileSystem::needs_flush`] must return `true`
    /// until the next flush, and that flush must cover them. Called once, before any request.
    fn taken_over(&self) {}

    /// read(2), if the overlay alone can answer without waiting. Returns the number of bytes, which
    /// is short at the end of the disk and 0 past it.
    ///
    /// # Errors
    /// EIO and similar.
    fn read_local(&self, offset: u64, buf: &mut [u8]) -> Result<Answer<usize>, Errno>;

    /// read(2) after [`FileSystem::read_local`] returned [`Answer::Below`], if it takes no waiting
    /// all the same. `answer` and errors are as in [`FileSystem::read`]. Returns [`Answer::Below`]
    /// if `answer` was not called.
    fn read_cached(&self, offset: u64, buf: &mut [u8], answer: &mut ReadAnswer<'_>) -> Answer<()>;

    /// read(2) into `buf`, however long it takes; otherwise like [`FileSystem::read_local`]. Calls
    /// `answer` exactly once, when the result for the client is known. That may be before this
    /// method returns, and `buf` is in use until it returns.
    fn read(&self, offset: u64, buf: &mut [u8], answer: &mut ReadAnswer<'_>);

    /// read(2) after [`FileSystem::read_local`] returned [`Answer::Miss`]. It may wait for the
    /// overlay and for other requests, but not for requests that may wait for a backing file.
    /// Returns [`Answer::Below`] if that does not suffice; the other methods `…_without_base` do
    /// the same.
    ///
    /// # Errors
    /// EIO and similar.
    fn read_without_base(&self, offset: u64, buf: &mut [u8]) -> Result<Answer<usize>, Errno> {
        let _ = (offset, buf);
        Ok(Answer::Below)
    }

    /// write(2), if it overwrites in place and takes no waiting. The write is not durable: the
    /// caller flushes if [`Durability::Now`] is requested. The number of bytes is short if the
    /// write crosses the end of the disk.
    ///
    /// # Errors
    /// EROFS, ENOSPC at and past the end of the disk, EIO and similar.
    fn write_local(&self, offset: u64, data: &[u8]) -> Result<Answer<usize>, Errno>;

    /// write(2), however long it takes; otherwise like [`FileSystem::write_local`].
    ///
    /// # Errors
    /// EROFS, ENOSPC at and past the end of the disk or if the host is full, EIO and similar.
    fn write(&self, offset: u64, data: &[u8], durability: Durability) -> Result<usize, Errno>;

    /// Like [`FileSystem::write`], without a backing file.
    ///
    /// # Errors
    /// Those of [`FileSystem::write`].
    fn write_without_base(
        &self,
        offset: u64,
        data: &[u8],
        durability: Durability,
    ) -> Result<Answer<usize>, Errno> {
        let _ = (offset, data, durability);
        Ok(Answer::Below)
    }

    /// Like [`FileSystem::fallocate`], without a backing file.
    ///
    /// # Errors
    /// Those of [`FileSystem::fallocate`].
    fn fallocate_without_base(
        &self,
        offset: u64,
        len: u64,
        mode: i32,
    ) -> Result<Answer<()>, Errno> {
        let _ = (offset, len, mode);
        Ok(Answer::Below)
    }

    /// Like [`FileSystem::lseek`], without a backing file.
    ///
    /// # Errors
    /// Those of [`FileSystem::lseek`].
    fn lseek_without_base(&self, offset: i64, whence: i32) -> Result<Answer<i64>, Errno> {
        let _ = (offset, whence);
        Ok(Answer::Below)
    }

    /// fallocate(2).
    ///
    /// Mode 0 fails with EOPNOTSUPP, with or without FALLOC_FL_KEEP_SIZE: a thin overlay reserves
    /// no space, and success would promise that it does. posix_fallocate(3) then writes one byte to
    /// each block of 4 KiB that begins with a zero, which allocates the block. Past the end of the
    /// disk, mode 0 fails with ENOSPC, like a write there, because the disk does not grow. Holes
    /// and zeroes are cut at the end of the disk; without FALLOC_FL_KEEP_SIZE, zeroes past the end
    /// fail with ENOSPC as well.
    ///
    /// A hole reads as zeros, exact to the byte: loop devices send both the discards *and* the zero
    /// writes of their users as holes, and QEMU writes zeros as holes with `discard=unmap`.
    ///
    /// # Errors
    /// EROFS, EOPNOTSUPP for all other modes, ENOSPC, EIO and similar.
    fn fallocate(&self, offset: u64, len: u64, mode: i32) -> Result<(), Errno>;

    /// lseek(2) with SEEK_DATA or SEEK_HOLE; the kernel handles the other values itself. May read
    /// tables of a backing file.
    ///
    /// # Errors
    /// ENXIO at and past the end of the disk, or if no data follows. EINVAL for another `whence`.
    fn lseek(&self, offset: i64, whence: i32) -> Result<i64, Errno>;

    /// Whether reads may wait for another machine.
    fn is_remote(&self) -> bool {
        false
    }

    /// fsync(2), fdatasync(2). Every write that was answered before this call is durable when it
    /// returns. Never fails with ENOSYS: the kernel would take that for success and stop asking.
    ///
    /// # Errors
    /// EIO and similar; every call once a host fdatasync has failed (P7).
    fn flush(&self) -> Result<(), Errno>;

    /// Does what [`FileSystem::flush`] does, if it takes no waiting because a flush has covered
    /// every change that was answered. Otherwise returns [`Answer::Miss`]. Bytes that copy-on-read
    /// or a stream has copied up since are no change: what the disk shows is the same without them.
    fn flush_local(&self) -> Answer<()> {
        Answer::Miss
    }

    /// Returns whether a change was made that no flush has covered. If there is none, close(2) has
    /// nothing to wait for.
    fn needs_flush(&self) -> bool;

    /// statfs(2) of the file system that holds the overlay, which is where space runs out. Counts
    /// are in clusters.
    ///
    /// # Errors
    /// Those of fstatvfs(3).
    fn statfs(&self) -> Result<StatVfs, Errno>;
}
