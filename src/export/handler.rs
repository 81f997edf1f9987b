//! The handler of all requests: one function per kind of request, which takes a typed request and
//! returns a typed answer or an errno. It knows no transport; every transport calls it.
//!
//! The README section "Semantics" has a table of what each operation answers. Requests are clamped
//! to the disk here, so that `disk` sees only ranges that exist. [`errno`] is the only place where
//! an [`Error`] becomes a number.

use std::ops::Range;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use rustix::fs::{FallocateFlags, OFlags, StatVfs};
use rustix::io::Errno;

use super::attributes::{AttributeChanges, Attributes, FileTimes, Owner};
use super::file_system::{FileSystem, ReadAnswer};
use super::log_limit::LogLimit;
use engine::disk::{Disk, Local, Seek};
use host::mutants::{Step, without};
use host::{Error, ErrorKind};

/// Smallest block size in stat(2) and statfs(2), in bytes: one page. `cp` uses the value as its
/// buffer size, and a discard of less than a page frees no block of the host.
const BLKSIZE_MIN: u64 = 4096;

/// The attributes that stat(2) shows.
#[derive(Clone, Copy, Debug)]
pub struct Stat {
    /// Virtual size in bytes.
    pub size: u64,
    /// Space that the overlay occupies on the host, in units of 512 bytes.
    pub blocks: u64,
    /// Preferred size of requests, in bytes.
    pub blksize: u32,
    /// Permissions and owner.
    pub owner: Owner,
    /// Access, modification and change time.
    pub times: FileTimes,
}

/// A size, in bytes, that a client wants the disk to have.
///
/// open(2) with O_TRUNC arrives as `ByPath(0)`, exactly like truncate(2) to 0 by path, and is
/// refused in the same way: the open fails. Programs that truncate a file then skip the holes of
/// the data that they write (`cp`, `tar`, `zstd -o`). If the truncation were answered with success
/// and not done, old bytes would remain in those holes.
///
/// `FUSE_ATOMIC_O_TRUNC` must not be requested. With that flag the kernel itself takes the size to
/// be 0 after such an open, until the next stat(2). Meanwhile the asynchronous reads of *all* other
/// processes meet the end of the file (observed on Linux 6.18): a virtual machine would read zeros.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Truncate {
    /// truncate(2), or open(2) with O_TRUNC.
    ByPath(u64),
    /// ftruncate(2).
    ByHandle(u64),
}

/// The result of an attempt that does not wait for everything.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Answer<T> {
    /// The request is done; this is its result.
    Done(T),
    /// Nothing was done. Call the sibling that may wait, but not for a backing file
    /// (`…_without_base`).
    Miss,
    /// A backing file may be needed. Nothing was done, or a part of a write that must be done
    /// again. Call the sibling that waits for backing files too.
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

/// Whether a write must be durable before its reply is sent.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Durability {
    /// The next flush or the commit timer makes the write durable.
    Later,
    /// The write has O_SYNC, O_DSYNC or RWF_DSYNC: flush, then reply.
    Now,
}

impl Durability {
    /// Reads the durability from the flags of a write request. With FOPEN_DIRECT_IO the kernel
    /// sends no FSYNC after such a write, so these two bits are the only sign of it (P1).
    pub fn of_write(open_flags: i32) -> Durability {
        let flags = OFlags::from_bits_retain(open_flags.cast_unsigned());
        if flags.intersects(OFlags::DSYNC | OFlags::SYNC) {
            Durability::Now
        } else {
            Durability::Later
        }
    }
}

/// Whether a request may wait for backing files.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum BaseAccess {
    Unread,
    Read,
}

/// The file system of a disk: a single file, which is the disk.
#[derive(Debug)]
pub struct Handler {
    disk: Arc<Disk>,
    attributes: Arc<Attributes>,
    /// The directory of the overlay, for statfs(2). It is opened before the mount, so that no path
    /// is looked up later (H29).
    directory: OwnedFd,
    /// Number of writes, zeroes and discards that have returned.
    written: AtomicU64,
    /// The value of `written` that the last successful flush covered.
    durable: AtomicU64,
    errors: LogLimit,
    /// A refused truncation has been logged; later ones are not.
    truncation_logged: AtomicBool,
}

impl Handler {
    /// Makes a handler. `directory` is on the file system that holds the overlay.
    pub(super) fn new(
        disk: Arc<Disk>,
        attributes: impl Into<Arc<Attributes>>,
        directory: OwnedFd,
    ) -> Self {
        Handler {
            disk,
            attributes: attributes.into(),
            directory,
            written: AtomicU64::new(0),
            durable: AtomicU64::new(0),
            errors: LogLimit::default(),
            truncation_logged: AtomicBool::new(false),
        }
    }

    /// Returns the block size in stat(2) and statfs(2), in bytes: one cluster, the unit in which
    /// discards free space.
    fn block_size(&self) -> u64 {
        self.disk.cluster_size().max(BLKSIZE_MIN)
    }

    /// Makes a change that [`FileSystem::fallocate`] asks for, and counts it as written.
    fn change_range(
        &self,
        what: &'static str,
        range: Range<u64>,
        change: impl Fn(Range<u64>) -> host::Result<Local>,
    ) -> Result<Answer<()>, Errno> {
        if range.is_empty() {
            return Ok(Answer::Done(()));
        }
        let local = change(range.clone())
            .map_err(|error| self.failed_to_change(what, range.clone(), &error))?;
        if local == Local::Done {
            self.wrote();
        }
        Ok(Answer::of(local, ()))
    }

    fn allocate(
        &self,
        offset: u64,
        len: u64,
        mode: i32,
        base: BaseAccess,
    ) -> Result<Answer<()>, Errno> {
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
                BaseAccess::Unread => self.disk.discard_without_base(range),
                BaseAccess::Read => self.disk.discard(range).map(|()| Local::Done),
            }),
            _ if mode.difference(FallocateFlags::KEEP_SIZE) == FallocateFlags::ZERO_RANGE
                && !grows =>
            {
                self.change_range("write zeroes", range, |range| match base {
                    BaseAccess::Unread => self.disk.write_zeroes_without_base(range),
                    BaseAccess::Read => self.disk.write_zeroes(range).map(|()| Local::Done),
                })
            }
            _ if grows && (mode.is_empty() || mode == FallocateFlags::ZERO_RANGE) => {
                Err(Errno::NOSPC)
            }
            _ => Err(Errno::OPNOTSUPP),
        }
    }

    fn seek(&self, offset: i64, whence: i32, base: BaseAccess) -> Result<Answer<i64>, Errno> {
        /// SEEK_DATA and SEEK_HOLE of lseek(2) on Linux.
        const SEEK_DATA: i32 = 3;
        const SEEK_HOLE: i32 = 4;
        let what = match whence {
            SEEK_DATA => Seek::Data,
            SEEK_HOLE => Seek::Hole,
            _ => return Err(Errno::INVAL),
        };
        let from = u64::try_from(offset)
            .ok()
            .filter(|&from| from < self.disk.size())
            .ok_or(Errno::NXIO)?;
        let found = match base {
            BaseAccess::Unread => self.disk.seek_without_base(from, what),
            BaseAccess::Read => self.disk.seek(from, what).map(Some),
        };
        match found.map_err(|error| self.failed("seek", Some((from, 0)), &error))? {
            None => Ok(Answer::Below),
            Some(found) => i64::try_from(found.ok_or(Errno::NXIO)?)
                .map(Answer::Done)
                .map_err(|_| Errno::OVERFLOW),
        }
    }

    /// Returns how many of `len` bytes at `offset` lie on the disk.
    fn clamp(&self, offset: u64, len: usize) -> usize {
        let left = self.disk.size().saturating_sub(offset);
        usize::try_from(left).map_or(len, |left| len.min(left))
    }

    /// Returns how many of `len` bytes may be written at `offset`; 0 only if `len` is 0.
    fn writable(&self, offset: u64, len: usize) -> Result<usize, Errno> {
        if self.disk.is_read_only() {
            return Err(Errno::ROFS);
        }
        match self.clamp(offset, len) {
            0 if len > 0 => Err(Errno::NOSPC),
            len => Ok(len),
        }
    }

    /// Logs once what a program should do instead of truncating. The program itself sees only
    /// EPERM.
    fn explain_truncation(&self) {
        if !self.truncation_logged.swap(true, Ordering::Relaxed) {
            log::warn!(
                "a program tried to truncate the disk, as cp and `>` do, and was refused: the size is fixed; \
                 write images with `qemu-img convert -n` or `dd conv=notrunc`, change the size with block_resize"
            );
        }
    }

    /// Counts a change, after it has returned and before its reply is sent, so that the next fsync
    /// or close flushes.
    fn wrote(&self) {
        self.attributes.touch();
        self.written.fetch_add(1, Ordering::AcqRel);
    }

    /// As [`Handler::failed`], for a change, which is counted: a part of it may have been made, and
    /// a client that has seen it may flush it.
    fn failed_to_change(&self, what: &'static str, range: Range<u64>, error: &Error) -> Errno {
        self.written.fetch_add(1, Ordering::AcqRel);
        self.failed(what, Some((range.start, range.end - range.start)), error)
    }

    fn failed_at(&self, what: &'static str, offset: u64, len: usize, error: &Error) -> Errno {
        self.failed(what, Some((offset, len as u64)), error)
    }

    /// Logs an error that the client sees only as a number, and keeps it for `status`.
    fn failed(&self, what: &'static str, range: Option<(u64, u64)>, error: &Error) -> Errno {
        let errno = errno(error);
        self.disk.note_failure(what, range, error);
        self.errors.run(|suppressed| {
            let place = range.map_or(String::new(), |(offset, len)| format!(" at {offset}+{len}"));
            match suppressed {
                0 => log::error!(target: crate::GUEST, "{what}{place}: {error}"),
                n => log::error!(target: crate::GUEST, "{what}{place}: {error} ({n} more errors not logged)"),
            }
        });
        errno
    }
}

impl FileSystem for Handler {
    fn getattr(&self) -> Result<Stat, Errno> {
        let allocated =
            self.disk.allocated_size().map_err(|error| self.failed("stat", None, &error))?;
        Ok(Stat {
            size: self.disk.size(),
            // GNU tar takes 0 blocks to mean that the whole file is a hole.
            blocks: allocated.div_ceil(512).max(u64::from(self.disk.size() > 0)),
            blksize: u32::try_from(self.block_size()).unwrap_or(u32::MAX),
            owner: self.attributes.owner(),
            times: self.attributes.times(),
        })
    }

    fn setattr(
        &self,
        truncate: Option<Truncate>,
        changes: &AttributeChanges,
    ) -> Result<Stat, Errno> {
        match truncate {
            None => {}
            Some(Truncate::ByPath(size) | Truncate::ByHandle(size)) if size == self.disk.size() => {
            }
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

    fn taken_over(&self) {
        // Without `wrote`: the times are those that the file has.
        self.written.fetch_add(1, Ordering::AcqRel);
    }

    fn read_local(&self, offset: u64, buf: &mut [u8]) -> Result<Answer<usize>, Errno> {
        let len = self.clamp(offset, buf.len());
        if len == 0 {
            return Ok(Answer::Done(0));
        }
        let local = self.disk.read_local(offset, &mut buf[..len]);
        local
            .map(|local| Answer::of(local, len))
            .map_err(|error| self.failed_at("read", offset, len, &error))
    }

    fn read_cached(&self, offset: u64, buf: &mut [u8], answer: &mut ReadAnswer<'_>) -> Answer<()> {
        let len = self.clamp(offset, buf.len());
        match self.disk.read_cached(offset, &mut buf[..len], &mut |bytes| answer(Ok(bytes))) {
            Ok(Local::Done) => Answer::Done(()),
            // The path that waits reports errors.
            Ok(Local::Miss | Local::Below) | Err(_) => Answer::Below,
        }
    }

    fn read_without_base(&self, offset: u64, buf: &mut [u8]) -> Result<Answer<usize>, Errno> {
        let len = self.clamp(offset, buf.len());
        if len == 0 {
            return Ok(Answer::Done(0));
        }
        let local = self.disk.read_without_base(offset, &mut buf[..len]);
        local
            .map(|local| Answer::of(local, len))
            .map_err(|error| self.failed_at("read", offset, len, &error))
    }

    fn read(&self, offset: u64, buf: &mut [u8], answer: &mut ReadAnswer<'_>) {
        let len = self.clamp(offset, buf.len());
        if len == 0 {
            return answer(Ok(&[]));
        }
        let read =
            self.disk.read_and_answer(offset, &mut buf[..len], &mut |bytes| answer(Ok(bytes)));
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
            Err(error) => Err(self.failed_to_change("write", offset..offset + len as u64, &error)),
        }
    }

    fn write_without_base(
        &self,
        offset: u64,
        data: &[u8],
        durability: Durability,
    ) -> Result<Answer<usize>, Errno> {
        let len = self.writable(offset, data.len())?;
        if len > 0 {
            let local = self.disk.write_without_base(offset, &data[..len]).map_err(|error| {
                self.failed_to_change("write", offset..offset + len as u64, &error)
            })?;
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
            self.disk.write(offset, &data[..len]).map_err(|error| {
                self.failed_to_change("write", offset..offset + len as u64, &error)
            })?;
            self.wrote();
        }
        if durability == Durability::Now && !without(Step::SyncedWritesFlush) {
            self.flush()?;
        }
        Ok(len)
    }

    fn fallocate(&self, offset: u64, len: u64, mode: i32) -> Result<(), Errno> {
        self.allocate(offset, len, mode, BaseAccess::Read).map(drop)
    }

    fn fallocate_without_base(
        &self,
        offset: u64,
        len: u64,
        mode: i32,
    ) -> Result<Answer<()>, Errno> {
        self.allocate(offset, len, mode, BaseAccess::Unread)
    }

    fn lseek(&self, offset: i64, whence: i32) -> Result<i64, Errno> {
        match self.seek(offset, whence, BaseAccess::Read)? {
            Answer::Done(found) => Ok(found),
            // `BaseAccess::Read` never returns these
            Answer::Miss | Answer::Below => Err(Errno::IO),
        }
    }

    fn lseek_without_base(&self, offset: i64, whence: i32) -> Result<Answer<i64>, Errno> {
        self.seek(offset, whence, BaseAccess::Unread)
    }

    fn is_remote(&self) -> bool {
        self.disk.has_remote_layer()
    }

    fn flush(&self) -> Result<(), Errno> {
        // Load the count first: this flush may not cover a write that returns while it runs.
        let written = self.written.load(Ordering::Acquire);
        self.disk.flush().map_err(|error| self.failed("flush", None, &error))?;
        let written = if without(Step::WritesCountedBeforeFlush) {
            self.written.load(Ordering::Acquire)
        } else {
            written
        };
        self.durable.fetch_max(written, Ordering::AcqRel);
        Ok(())
    }

    fn flush_local(&self) -> Answer<()> {
        // After a failed barrier every flush fails (P7), also one that has nothing to do.
        if self.needs_flush() || !self.disk.is_usable() {
            return Answer::Miss;
        }
        self.disk.count_flush_of_nothing();
        Answer::Done(())
    }

    fn needs_flush(&self) -> bool {
        self.durable.load(Ordering::Acquire) < self.written.load(Ordering::Acquire)
    }

    fn statfs(&self) -> Result<StatVfs, Errno> {
        let host = rustix::fs::fstatvfs(&self.directory)?;
        Ok(in_blocks(host, self.block_size()))
    }
}

/// Converts the statfs(2) values of the host's file system to blocks of `size` bytes, a power of
/// two.
///
/// A loop device takes its discard granularity from `f_bsize` (drivers/block/loop.c,
/// `loop_get_discard_config`). `f_frsize` has the same value, because some programs multiply the
/// counts by `f_bsize` and others by `f_frsize`.
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

/// Returns the errno that a client gets for `error`.
///
/// ENOSYS from the host would make the kernel treat the whole operation as unsupported: each later
/// fsync would "succeed". EINTR and EAGAIN would make clients retry an operation that failed. These
/// three become EIO, and so does every number that is no errno in the FUSE protocol.
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
            ErrorKind::PermissionDenied => Errno::ACCESS,
            ErrorKind::InvalidImage
            | ErrorKind::UnsupportedFeature
            | ErrorKind::Corrupt
            | ErrorKind::NotFound
            | ErrorKind::OutputClosed
            | ErrorKind::Io => Errno::IO,
        },
    }
}

#[cfg(test)]
mod tests;
