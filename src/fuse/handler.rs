//! One function per request kind: typed request in, typed answer or errno out. Knows no transport; every transport calls these.
//!
//! What each operation answers is the table of the README, "Semantics". Requests are clamped to the disk here, so that `disk` sees only
//! ranges that exist, and [`errno`] is the only place where an [`Error`] becomes a number.

use std::ops::Range;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use rustix::fs::{FallocateFlags, OFlags, StatVfs};
use rustix::io::Errno;

use super::attributes::{Attributes, Changes, Owner, Times};
use super::file_system::{FileSystem, ReadAnswer};
use super::log_limit::LogLimit;
use crate::disk::{Disk, Local, Seek};
use crate::logging;
use crate::mutants::{Step, without};
use crate::{Error, ErrorKind};

/// Least block size of stat(2) and statfs(2), bytes: a page. `cp` takes it as its buffer size, and
/// a discard of less than a page gives the host no block back.
const BLKSIZE_MIN: u64 = 4096;

/// What stat(2) shows.
#[derive(Clone, Copy, Debug)]
pub struct Stat {
    /// Virtual size in bytes.
    pub size: u64,
    /// What the overlay occupies on the host, in units of 512 bytes.
    pub blocks: u64,
    /// Preferred size of requests in bytes.
    pub blksize: u32,
    /// Permissions and owner.
    pub owner: Owner,
    /// Times.
    pub times: Times,
}

/// A size, in bytes, that a client wants the disk to have.
///
/// open(2) with O_TRUNC arrives as `ByPath(0)`, like truncate(2) to 0 by path, and is refused like
/// it: the open fails. Programs that truncate skip the holes of what they write afterwards (`cp`,
/// `tar`, `zstd -o`); a truncation that is answered with success and not done leaves old bytes
/// there.
///
/// `FUSE_ATOMIC_O_TRUNC` must not be asked for: with it the kernel itself takes the size for 0
/// after such an open, until the next stat(2), and meanwhile asynchronous reads of *all* other
/// users meet the end of the file (tried on Linux 6.18): a virtual machine would read zeros.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Truncate {
    /// truncate(2), or open(2) with O_TRUNC.
    ByPath(u64),
    /// ftruncate(2).
    ByHandle(u64),
}

/// An answer of the fast path.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Answer<T> {
    /// The answer.
    Done(T),
    /// Nothing was done. Call the sibling that may wait, but not for a backing file (`…_without_base`).
    Miss,
    /// A backing file may be needed. Nothing was done, or part of a write, which is to be done again: call
    /// the sibling that waits for whatever it takes.
    Below,
}

impl<T> Answer<T> {
    fn of(local: Local, done: T) -> Answer<T> {
        match local {
            Local::Done => Answer::Done(done),
            Local::Miss => Answer::Miss,
            Local::Below => Answer::Below,
        }
    }
}

/// Whether a write must be durable before its answer.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Durability {
    /// The next flush or the commit timer sees to it.
    Later,
    /// O_SYNC, O_DSYNC or RWF_DSYNC: flush, then answer.
    Now,
}

impl Durability {
    /// From the flags of a write request. With FOPEN_DIRECT_IO the kernel sends no FSYNC after such a write: these two bits are all there
    /// is (data-safety 0.5).
    pub fn of_write(open_flags: i32) -> Durability {
        let flags = OFlags::from_bits_retain(open_flags.cast_unsigned());
        if flags.intersects(OFlags::DSYNC | OFlags::SYNC) { Durability::Now } else { Durability::Later }
    }
}

/// Whether a request may wait for backing files.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Base {
    Unread,
    Read,
}

/// The file system: one file, which is the disk.
#[derive(Debug)]
pub struct Handler {
    disk: Arc<Disk>,
    attributes: Attributes,
    /// The directory of the overlay, for statfs(2): opened before the mount, so that no path is looked up later (H29).
    directory: OwnedFd,
    /// Writes, zeroes and discards that have returned.
    written: AtomicU64,
    /// How many of them the last successful flush covered.
    durable: AtomicU64,
    errors: LogLimit,
    /// The log names the refused truncation once, not once for each.
    truncation_logged: AtomicBool,
}

impl Handler {
    /// `directory` is on the file system that holds the overlay.
    pub(super) fn new(disk: Arc<Disk>, attributes: Attributes, directory: OwnedFd) -> Self {
        Handler {
            disk,
            attributes,
            directory,
            written: AtomicU64::new(0),
            durable: AtomicU64::new(0),
            errors: LogLimit::default(),
            truncation_logged: AtomicBool::new(false),
        }
    }

    /// Block size in stat(2) and statfs(2), bytes: a cluster, the unit in which discards give space
    /// back.
    fn block_size(&self) -> u64 {
        self.disk.cluster_size().max(BLKSIZE_MIN)
    }

    /// A change that [`FileSystem::fallocate`] asks for.
    fn change_range(
        &self,
        what: &'static str,
        range: Range<u64>,
        change: impl Fn(Range<u64>) -> crate::Result<Local>,
    ) -> Result<Answer<()>, Errno> {
        if range.is_empty() {
            return Ok(Answer::Done(()));
        }
        let (offset, len) = (range.start, range.end - range.start);
        let local = change(range).map_err(|error| self.failed(what, Some((offset, len)), &error))?;
        if local == Local::Done {
            self.wrote();
        }
        Ok(Answer::of(local, ()))
    }

    fn allocate(&self, offset: u64, len: u64, mode: i32, base: Base) -> Result<Answer<()>, Errno> {
        if self.disk.is_read_only() {
            return Err(Errno::ROFS);
        }
        let mode = FallocateFlags::from_bits_retain(mode.cast_unsigned());
        let size = self.disk.size();
        let end = offset.checked_add(len).ok_or(Errno::FBIG)?;
        let range = offset.min(size)..end.min(size);
        let grows = !mode.contains(FallocateFlags::KEEP_SIZE) && end > size;

        let punch = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        match mode {
            _ if mode == punch => self.change_range("discard", range, |range| match base {
                Base::Unread => self.disk.discard_without_base(range),
                Base::Read => self.disk.discard(range).map(|()| Local::Done),
            }),
            _ if mode.difference(FallocateFlags::KEEP_SIZE) == FallocateFlags::ZERO_RANGE && !grows => {
                self.change_range("write zeroes", range, |range| match base {
                    Base::Unread => self.disk.write_zeroes_without_base(range),
                    Base::Read => self.disk.write_zeroes(range).map(|()| Local::Done),
                })
            }
            _ if grows && (mode.is_empty() || mode == FallocateFlags::ZERO_RANGE) => Err(Errno::NOSPC),
            _ => Err(Errno::OPNOTSUPP),
        }
    }

    fn seek(&self, offset: i64, whence: i32, base: Base) -> Result<Answer<i64>, Errno> {
        /// SEEK_DATA and SEEK_HOLE of lseek(2) on Linux.
        const SEEK_DATA: i32 = 3;
        const SEEK_HOLE: i32 = 4;
        let what = match whence {
            SEEK_DATA => Seek::Data,
            SEEK_HOLE => Seek::Hole,
            _ => return Err(Errno::INVAL),
        };
        let from = u64::try_from(offset).ok().filter(|&from| from < self.disk.size()).ok_or(Errno::NXIO)?;
        let found = match base {
            Base::Unread => self.disk.seek_without_base(from, what),
            Base::Read => self.disk.seek(from, what).map(Some),
        };
        match found.map_err(|error| self.failed("seek", Some((from, 0)), &error))? {
            None => Ok(Answer::Below),
            Some(found) => i64::try_from(found.ok_or(Errno::NXIO)?).map(Answer::Done).map_err(|_| Errno::OVERFLOW),
        }
    }

    /// How many of `len` bytes at `offset` lie on the disk.
    fn clamp(&self, offset: u64, len: usize) -> usize {
        let left = self.disk.size().saturating_sub(offset);
        usize::try_from(left).map_or(len, |left| len.min(left))
    }

    /// How many of `len` bytes may be written at `offset`; 0 only where `len` is 0.
    fn writable(&self, offset: u64, len: usize) -> Result<usize, Errno> {
        if self.disk.is_read_only() {
            return Err(Errno::ROFS);
        }
        match self.clamp(offset, len) {
            0 if len > 0 => Err(Errno::NOSPC),
            len => Ok(len),
        }
    }

    /// Says once in the log what a program that truncates should do instead; it sees EPERM only.
    fn explain_truncation(&self) {
        if !self.truncation_logged.swap(true, Ordering::Relaxed) {
            log::warn!(
                "a program tried to truncate the disk, as cp and `>` do, and was refused: the size is fixed; \
                 write images with `qemu-img convert -n` or `dd conv=notrunc`, change the size with block_resize"
            );
        }
    }

    /// After a change has returned and before its answer is sent: the next close flushes.
    fn wrote(&self) {
        self.attributes.touch();
        self.written.fetch_add(1, Ordering::AcqRel);
    }

    fn failed_at(&self, what: &'static str, offset: u64, len: usize, error: &Error) -> Errno {
        self.failed(what, Some((offset, len as u64)), error)
    }

    /// Logs what the client will only see as a number, and keeps it for `status`.
    fn failed(&self, what: &'static str, range: Option<(u64, u64)>, error: &Error) -> Errno {
        let errno = errno(error);
        self.disk.note_failure(what, range, error);
        self.errors.run(|suppressed| {
            let place = range.map_or(String::new(), |(offset, len)| format!(" at {offset}+{len}"));
            match suppressed {
                0 => log::error!(target: logging::GUEST, "{what}{place}: {error}"),
                n => log::error!(target: logging::GUEST, "{what}{place}: {error} ({n} more errors not logged)"),
            }
        });
        errno
    }
}

impl FileSystem for Handler {
    fn getattr(&self) -> Result<Stat, Errno> {
        let allocated = self.disk.allocated_size().map_err(|error| self.failed("stat", None, &error))?;
        Ok(Stat {
            size: self.disk.size(),
            // 0 would mean to GNU tar that all of the file is a hole.
            blocks: allocated.div_ceil(512).max(u64::from(self.disk.size() > 0)),
            blksize: u32::try_from(self.block_size()).unwrap_or(u32::MAX),
            owner: self.attributes.owner(),
            times: self.attributes.times(),
        })
    }

    fn setattr(&self, truncate: Option<Truncate>, changes: &Changes) -> Result<Stat, Errno> {
        match truncate {
            None => {}
            Some(Truncate::ByPath(size) | Truncate::ByHandle(size)) if size == self.disk.size() => {}
            Some(_) if self.disk.is_read_only() => return Err(Errno::ROFS),
            Some(Truncate::ByPath(size) | Truncate::ByHandle(size)) if size.is_multiple_of(512) => {
                self.explain_truncation();
                return Err(Errno::PERM);
            }
            Some(_) => return Err(Errno::INVAL),
        }
        self.attributes.change(changes)?;
        self.getattr()
    }

    fn open(&self, open_flags: i32) -> Result<(), Errno> {
        let access = OFlags::from_bits_retain(open_flags.cast_unsigned()) & OFlags::RWMODE;
        if self.disk.is_read_only() && access != OFlags::RDONLY { Err(Errno::ROFS) } else { Ok(()) }
    }

    fn read_local(&self, offset: u64, buf: &mut [u8]) -> Result<Answer<usize>, Errno> {
        let len = self.clamp(offset, buf.len());
        if len == 0 {
            return Ok(Answer::Done(0));
        }
        let local = self.disk.read_local(offset, &mut buf[..len]);
        local.map(|local| Answer::of(local, len)).map_err(|error| self.failed_at("read", offset, len, &error))
    }

    fn read_cached(&self, offset: u64, buf: &mut [u8], answer: &mut ReadAnswer<'_>) -> Answer<()> {
        let len = self.clamp(offset, buf.len());
        match self.disk.read_cached(offset, &mut buf[..len], &mut |bytes| answer(Ok(bytes))) {
            Ok(Local::Done) => Answer::Done(()),
            // Errors are reported by the sibling that waits.
            Ok(Local::Miss | Local::Below) | Err(_) => Answer::Below,
        }
    }

    fn read_without_base(&self, offset: u64, buf: &mut [u8]) -> Result<Answer<usize>, Errno> {
        let len = self.clamp(offset, buf.len());
        if len == 0 {
            return Ok(Answer::Done(0));
        }
        let local = self.disk.read_without_base(offset, &mut buf[..len]);
        local.map(|local| Answer::of(local, len)).map_err(|error| self.failed_at("read", offset, len, &error))
    }

    fn read(&self, offset: u64, buf: &mut [u8], answer: &mut ReadAnswer<'_>) {
        let len = self.clamp(offset, buf.len());
        if len == 0 {
            return answer(Ok(&[]));
        }
        let read = self.disk.read_and_answer(offset, &mut buf[..len], &mut |bytes| answer(Ok(bytes)));
        if let Err(error) = read {
            answer(Err(self.failed_at("read", offset, len, &error)));
        }
    }

    fn write_local(&self, offset: u64, data: &[u8]) -> Result<Answer<usize>, Errno> {
        let len = self.writable(offset, data.len())?;
        if len == 0 {
            return Ok(Answer::Done(0));
        }
        match self.disk.write_local(offset, &data[..len]) {
            Ok(Local::Done) => {
                self.wrote();
                Ok(Answer::Done(len))
            }
            Ok(local) => Ok(Answer::of(local, len)),
            Err(error) => Err(self.failed_at("write", offset, len, &error)),
        }
    }

    fn write_without_base(&self, offset: u64, data: &[u8], durability: Durability) -> Result<Answer<usize>, Errno> {
        let len = self.writable(offset, data.len())?;
        if len > 0 {
            let local = self.disk.write_without_base(offset, &data[..len]).map_err(|error| self.failed_at("write", offset, len, &error))?;
            if local != Local::Done {
                return Ok(Answer::Below);
            }
            self.wrote();
        }
        if durability == Durability::Now && !without(Step::SyncedWritesFlush) {
            self.flush()?;
        }
        Ok(Answer::Done(len))
    }

    fn write(&self, offset: u64, data: &[u8], durability: Durability) -> Result<usize, Errno> {
        let len = self.writable(offset, data.len())?;
        if len > 0 {
            self.disk.write(offset, &data[..len]).map_err(|error| self.failed_at("write", offset, len, &error))?;
            self.wrote();
        }
        if durability == Durability::Now && !without(Step::SyncedWritesFlush) {
            self.flush()?;
        }
        Ok(len)
    }

    fn fallocate(&self, offset: u64, len: u64, mode: i32) -> Result<(), Errno> {
        self.allocate(offset, len, mode, Base::Read).map(drop)
    }

    fn fallocate_without_base(&self, offset: u64, len: u64, mode: i32) -> Result<Answer<()>, Errno> {
        self.allocate(offset, len, mode, Base::Unread)
    }

    fn lseek(&self, offset: i64, whence: i32) -> Result<i64, Errno> {
        match self.seek(offset, whence, Base::Read)? {
            Answer::Done(found) => Ok(found),
            Answer::Miss | Answer::Below => Err(Errno::IO), // not with the base
        }
    }

    fn lseek_without_base(&self, offset: i64, whence: i32) -> Result<Answer<i64>, Errno> {
        self.seek(offset, whence, Base::Unread)
    }

    fn flush(&self) -> Result<(), Errno> {
        // The count first: a write that returns during the flush may not be covered by it.
        let written = self.written.load(Ordering::Acquire);
        self.disk.flush().map_err(|error| self.failed("flush", None, &error))?;
        let written = if without(Step::WritesCountedBeforeFlush) { self.written.load(Ordering::Acquire) } else { written };
        self.durable.fetch_max(written, Ordering::AcqRel);
        Ok(())
    }

    fn needs_flush(&self) -> bool {
        self.durable.load(Ordering::Acquire) < self.written.load(Ordering::Acquire)
    }

    fn statfs(&self) -> Result<StatVfs, Errno> {
        let host = rustix::fs::fstatvfs(&self.directory)?;
        Ok(in_blocks(host, self.block_size()))
    }
}

/// What statfs(2) says of the host's file system, counted in blocks of `size` bytes, a power of
/// two.
///
/// A loop device takes its discard granularity from `f_bsize` (drivers/block/loop.c,
/// `loop_get_discard_config`). `f_frsize` is the same: programs multiply the counts with either.
fn in_blocks(host: StatVfs, size: u64) -> StatVfs {
    let scaled = |blocks: u64| {
        let bytes = u128::from(blocks) * u128::from(host.f_frsize);
        u64::try_from(bytes / u128::from(size.max(1))).unwrap_or(u64::MAX)
    };
    StatVfs {
        f_bsize: size,
        f_frsize: size,
        f_blocks: scaled(host.f_blocks),
        f_bfree: scaled(host.f_bfree),
        f_bavail: scaled(host.f_bavail),
        ..host
    }
}

/// The number that a client sees for `error`.
///
/// ENOSYS from below would make the kernel treat the whole operation as absent (fsync would "succeed" for ever); EINTR and EAGAIN would
/// make clients retry what has failed. They become EIO, and so does everything that is no errno on the FUSE wire.
pub fn errno(error: &Error) -> Errno {
    match error.errno() {
        Some(number @ 1..=511) => match Errno::from_raw_os_error(number) {
            Errno::NOSYS | Errno::INTR | Errno::AGAIN => Errno::IO,
            errno => errno,
        },
        Some(_) => Errno::IO,
        None => match error.kind() {
            ErrorKind::NoSpace => Errno::NOSPC,
            ErrorKind::ReadOnly => Errno::ROFS,
            ErrorKind::InvalidArgument => Errno::INVAL,
            ErrorKind::Busy => Errno::BUSY,
            ErrorKind::InvalidImage | ErrorKind::UnsupportedFeature | ErrorKind::Corrupt | ErrorKind::NotFound | ErrorKind::Io => Errno::IO,
        },
    }
}

#[cfg(test)]
mod tests;
