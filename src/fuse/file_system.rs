//! What a transport needs of whatever it serves: the disk, or for a benchmark something with nothing behind it.

use rustix::fs::StatVfs;
use rustix::io::Errno;

use super::attributes::Changes;
use super::handler::{Answer, Durability, Stat, Truncate};

/// Gets the bytes of a read, or what went wrong.
pub type ReadAnswer<'a> = dyn FnMut(Result<&[u8], Errno>) + 'a;

/// One file. Any thread may call any method, at the same time as others. Offsets and lengths are bytes.
pub trait FileSystem: Send + Sync + std::fmt::Debug {
    /// stat(2).
    ///
    /// # Errors
    /// EIO and the like: fstat of the overlay failed.
    fn getattr(&self) -> Result<Stat, Errno>;

    /// truncate(2), chmod(2), chown(2), utimensat(2), and open(2) with O_TRUNC. A change of size is
    /// refused, so nothing is half done.
    ///
    /// # Errors
    /// EROFS, EINVAL or EPERM for another size; those of a change of attributes and of [`FileSystem::getattr`].
    fn setattr(&self, truncate: Option<Truncate>, changes: &Changes) -> Result<Stat, Errno>;

    /// open(2). O_TRUNC comes as a [`FileSystem::setattr`] of its own after it (see [`Truncate`]).
    ///
    /// # Errors
    /// EROFS for writing to a read-only disk.
    fn open(&self, open_flags: i32) -> Result<(), Errno>;

    /// read(2), if the overlay alone can answer at once. The number of bytes is short at the end of the disk and 0 past it.
    ///
    /// # Errors
    /// EIO and the like.
    fn read_local(&self, offset: u64, buf: &mut [u8]) -> Result<Answer<usize>, Errno>;

    /// read(2) after [`FileSystem::read_local`] was [`Answer::Below`], if it takes no waiting all the same; `answer` as with [`FileSystem::read`], and
    /// the same errors. [`Answer::Below`] if `answer` was not called.
    fn read_cached(&self, offset: u64, buf: &mut [u8], answer: &mut ReadAnswer<'_>) -> Answer<()>;

    /// read(2), however long it takes, into `buf`; otherwise as [`FileSystem::read_local`]. `answer` is called once, when what the client wants is
    /// known: perhaps before this returns, and `buf` is in use until then.
    fn read(&self, offset: u64, buf: &mut [u8], answer: &mut ReadAnswer<'_>);

    /// read(2) after [`FileSystem::read_local`] was [`Answer::Miss`]: it may wait for the overlay and for
    /// other requests, but for none that may wait for a backing file. [`Answer::Below`] where that does not
    /// do; so it is with the other `…_without_base`.
    ///
    /// # Errors
    /// EIO and the like.
    fn read_without_base(&self, offset: u64, buf: &mut [u8]) -> Result<Answer<usize>, Errno> {
        let _ = (offset, buf);
        Ok(Answer::Below)
    }

    /// write(2), if it overwrites in place and can be done at once. Not durable: the caller flushes where [`Durability::Now`] is asked for.
    /// The number of bytes is short where the write crosses the end of the disk.
    ///
    /// # Errors
    /// EROFS, ENOSPC at and past the end of the disk, EIO and the like.
    fn write_local(&self, offset: u64, data: &[u8]) -> Result<Answer<usize>, Errno>;

    /// write(2), however long it takes; otherwise as [`FileSystem::write_local`].
    ///
    /// # Errors
    /// EROFS, ENOSPC at and past the end of the disk or where the host is full, EIO and the like.
    fn write(&self, offset: u64, data: &[u8], durability: Durability) -> Result<usize, Errno>;

    /// As [`FileSystem::write`], without a backing file.
    ///
    /// # Errors
    /// As [`FileSystem::write`].
    fn write_without_base(&self, offset: u64, data: &[u8], durability: Durability) -> Result<Answer<usize>, Errno> {
        let _ = (offset, data, durability);
        Ok(Answer::Below)
    }

    /// As [`FileSystem::fallocate`], without a backing file.
    ///
    /// # Errors
    /// As [`FileSystem::fallocate`].
    fn fallocate_without_base(&self, offset: u64, len: u64, mode: i32) -> Result<Answer<()>, Errno> {
        let _ = (offset, len, mode);
        Ok(Answer::Below)
    }

    /// As [`FileSystem::lseek`], without a backing file.
    ///
    /// # Errors
    /// As [`FileSystem::lseek`].
    fn lseek_without_base(&self, offset: i64, whence: i32) -> Result<Answer<i64>, Errno> {
        let _ = (offset, whence);
        Ok(Answer::Below)
    }

    /// fallocate(2).
    ///
    /// Mode 0, with FALLOC_FL_KEEP_SIZE or without, is EOPNOTSUPP: a thin overlay reserves no
    /// space, and success would promise some. posix_fallocate(3) then writes one byte to each block
    /// of 4 KiB that begins with a zero, which allocates it. Past the end mode 0 is ENOSPC, like a
    /// write there: the disk does not grow. Holes and zeroes reach up to the end of the disk;
    /// without FALLOC_FL_KEEP_SIZE a range of zeroes past the end is ENOSPC as well.
    ///
    /// A hole reads as zeros to the byte: loop devices send the discards *and* the zero writes of
    /// their users as holes, and QEMU writes zeros as holes with `discard=unmap`.
    ///
    /// # Errors
    /// EROFS, EOPNOTSUPP for all other modes, ENOSPC, EIO and the like.
    fn fallocate(&self, offset: u64, len: u64, mode: i32) -> Result<(), Errno>;

    /// lseek(2) with SEEK_DATA or SEEK_HOLE; the kernel does the other kinds itself. May read tables of a backing file.
    ///
    /// # Errors
    /// ENXIO at and past the end of the disk, or where no data follows. EINVAL for another `whence`.
    fn lseek(&self, offset: i64, whence: i32) -> Result<i64, Errno>;

    /// fsync(2), fdatasync(2). Everything answered before this call is durable when it returns. Never ENOSYS: the kernel would take
    /// that for success and stop asking (data-safety 0.6).
    ///
    /// # Errors
    /// EIO and the like; for ever once a host fdatasync has failed (P7).
    fn flush(&self) -> Result<(), Errno>;

    /// close(2): whether something was written that no flush has covered. If not, the close has nothing to wait for.
    fn needs_flush(&self) -> bool;

    /// statfs(2): the file system that holds the overlay, which is where space runs out, counted in
    /// clusters.
    ///
    /// # Errors
    /// Those of fstatvfs(3).
    fn statfs(&self) -> Result<StatVfs, Errno>;
}
