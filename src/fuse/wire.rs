//! Requests and replies as the kernel lays them out in memory (`include/uapi/linux/fuse.h`, protocol 7.42): bytes in, values out, and back. Pure.
//!
//! Only what [`super::ring`] needs: over /dev/fuse fuser does this. All numbers are in the byte order of the machine.

use std::time::{Duration, SystemTime};

use rustix::fs::StatVfs;
use rustix::io::Errno;

use super::attributes::{Changes, TimeChange};
use super::handler::{Stat, Truncate};

/// Bytes of `struct fuse_out_header`.
const OUT_HEADER: u32 = 16;
/// The file at the mountpoint (FUSE_ROOT_ID).
const ROOT: u64 = 1;
/// Nanoseconds in a second.
const SECOND: u32 = 1_000_000_000;

/// What the kernel wants.
#[derive(Clone, Copy, Debug)]
pub(super) enum Operation {
    /// FUSE_READ: so many bytes from an offset.
    Read {
        /// Bytes.
        offset: u64,
        /// Bytes.
        len: u32,
    },
    /// FUSE_WRITE: the data are in the payload.
    Write {
        /// Bytes.
        offset: u64,
        /// Bytes.
        len: u32,
        /// Flags of open(2), and of the call.
        flags: i32,
    },
    /// FUSE_GETATTR.
    GetAttributes,
    /// FUSE_SETATTR.
    SetAttributes {
        /// Another size.
        truncate: Option<Truncate>,
        /// And everything else.
        changes: Changes,
    },
    /// FUSE_OPEN, with the flags of open(2).
    Open {
        /// Flags of open(2).
        flags: i32,
    },
    /// FUSE_FLUSH: close(2).
    Close,
    /// FUSE_FSYNC.
    Sync,
    /// FUSE_FALLOCATE.
    Allocate {
        /// Bytes.
        offset: u64,
        /// Bytes.
        len: u64,
        /// As fallocate(2).
        mode: i32,
    },
    /// FUSE_LSEEK.
    Seek {
        /// Bytes.
        offset: i64,
        /// As lseek(2).
        whence: i32,
    },
    /// FUSE_STATFS.
    FileSystem,
    /// Nothing to be done, and that went well.
    Nothing,
    /// Not offered.
    Refused(Errno),
}

/// The opcode and the number of a request, from `struct fuse_in_header`.
pub(super) fn in_header(bytes: &[u8]) -> (u32, u64) {
    (u32_at(bytes, 4), u64_at(bytes, 8))
}

/// Writes `struct fuse_out_header`: the answer to request `unique`, followed by `len` bytes, or an error.
pub(super) fn out_header(bytes: &mut [u8], unique: u64, result: Result<u32, Errno>) {
    let (len, error) = match result {
        Ok(len) => (len, 0),
        Err(errno) => (0, -errno.raw_os_error()),
    };
    bytes[0..4].copy_from_slice(&OUT_HEADER.saturating_add(len).to_ne_bytes());
    bytes[4..8].copy_from_slice(&error.to_ne_bytes());
    bytes[8..16].copy_from_slice(&unique.to_ne_bytes());
}

/// The operation of a request from its opcode and the structure that belongs to it. What is not offered is ENOSYS, as over /dev/fuse: the kernel
/// remembers that and does not ask again.
pub(super) fn operation(opcode: u32, body: &[u8]) -> Operation {
    match opcode {
        15 => Operation::Read { offset: u64_at(body, 8), len: u32_at(body, 16) },
        16 => Operation::Write { offset: u64_at(body, 8), len: u32_at(body, 16), flags: i32_at(body, 32) },
        3 => Operation::GetAttributes,
        4 => set_attributes(body),
        14 => Operation::Open { flags: i32_at(body, 0) },
        25 => Operation::Close,
        20 => Operation::Sync,
        43 => Operation::Allocate { offset: u64_at(body, 8), len: u64_at(body, 16), mode: i32_at(body, 24) },
        46 => Operation::Seek { offset: u64_at(body, 8).cast_signed(), whence: i32_at(body, 16) },
        17 => Operation::FileSystem,
        // RELEASE, and DESTROY.
        18 | 38 => Operation::Nothing,
        1 => Operation::Refused(Errno::NOENT),
        39 => Operation::Refused(Errno::NOTTY),
        _ => Operation::Refused(Errno::NOSYS),
    }
}

fn set_attributes(body: &[u8]) -> Operation {
    let valid = u32_at(body, 0);
    let has = |bit: u32| valid & 1 << bit != 0;
    let time = |bit: u32, now: u32, seconds: usize, nanoseconds: usize| {
        has(bit).then(|| match has(now) {
            true => TimeChange::Now,
            false => TimeChange::At(time(u64_at(body, seconds).cast_signed(), u32_at(body, nanoseconds))),
        })
    };
    let size = u64_at(body, 16);
    Operation::SetAttributes {
        truncate: has(3).then_some(if has(6) { Truncate::ByHandle(size) } else { Truncate::ByPath(size) }),
        changes: Changes {
            mode: has(0).then(|| u32_at(body, 68)),
            uid: has(1).then(|| u32_at(body, 76)),
            gid: has(2).then(|| u32_at(body, 80)),
            atime: time(4, 7, 32, 56),
            mtime: time(5, 8, 40, 60),
        },
    }
}

/// A time of the kernel. What this machine's clock cannot say becomes its epoch.
fn time(seconds: i64, nanoseconds: u32) -> SystemTime {
    let epoch = SystemTime::UNIX_EPOCH;
    let whole = Duration::from_secs(seconds.unsigned_abs());
    let at = if seconds < 0 { epoch.checked_sub(whole) } else { epoch.checked_add(whole) };
    at.and_then(|at| at.checked_add(Duration::from_nanos(u64::from(nanoseconds % SECOND)))).unwrap_or(epoch)
}

/// Seconds and nanoseconds of a time.
fn seconds(time: SystemTime) -> (i64, u32) {
    match time.duration_since(SystemTime::UNIX_EPOCH) {
        Ok(since) => (i64::try_from(since.as_secs()).unwrap_or(i64::MAX), since.subsec_nanos()),
        Err(before) => {
            let before = before.duration();
            let whole = i64::try_from(before.as_secs()).unwrap_or(i64::MAX);
            match before.subsec_nanos() {
                0 => (-whole, 0),
                nanoseconds => (-whole - 1, SECOND - nanoseconds),
            }
        }
    }
}

/// `struct fuse_attr_out`; returns its length.
pub(super) fn attributes(stat: &Stat, valid: Duration, to: &mut [u8]) -> usize {
    let mut out = Out { to, len: 0 };
    out.u64(valid.as_secs());
    out.u32(valid.subsec_nanos());
    out.u32(0);
    let times = [stat.times.atime, stat.times.mtime, stat.times.ctime].map(seconds);
    for value in [ROOT, stat.size, stat.blocks] {
        out.u64(value);
    }
    times.iter().for_each(|(seconds, _)| out.u64(seconds.cast_unsigned()));
    times.iter().for_each(|(_, nanoseconds)| out.u32(*nanoseconds));
    let mode = rustix::fs::FileType::RegularFile.as_raw_mode() | u32::from(stat.owner.mode);
    for value in [mode, 1, stat.owner.uid, stat.owner.gid, 0, stat.blksize, 0] {
        out.u32(value);
    }
    out.len
}

/// `struct fuse_open_out` with these `FOPEN_` flags; returns its length.
pub(super) fn opened(flags: u32, to: &mut [u8]) -> usize {
    let mut out = Out { to, len: 0 };
    out.u64(0);
    out.u32(flags);
    out.u32(0);
    out.len
}

/// `struct fuse_write_out`; returns its length.
pub(super) fn written(len: u32, to: &mut [u8]) -> usize {
    let mut out = Out { to, len: 0 };
    out.u32(len);
    out.u32(0);
    out.len
}

/// `struct fuse_lseek_out`; returns its length.
pub(super) fn sought(offset: i64, to: &mut [u8]) -> usize {
    let mut out = Out { to, len: 0 };
    out.u64(offset.cast_unsigned());
    out.len
}

/// `struct fuse_statfs_out`; returns its length.
pub(super) fn file_system(host: &StatVfs, to: &mut [u8]) -> usize {
    let mut out = Out { to, len: 0 };
    for value in [host.f_blocks, host.f_bfree, host.f_bavail, host.f_files, host.f_ffree] {
        out.u64(value);
    }
    for value in [host.f_bsize, host.f_namemax, host.f_frsize] {
        out.u32(u32::try_from(value).unwrap_or(u32::MAX));
    }
    (0..7).for_each(|_| out.u32(0));
    out.len
}

struct Out<'a> {
    to: &'a mut [u8],
    len: usize,
}

impl Out<'_> {
    fn u64(&mut self, value: u64) {
        self.to[self.len..self.len + 8].copy_from_slice(&value.to_ne_bytes());
        self.len += 8;
    }

    fn u32(&mut self, value: u32) {
        self.to[self.len..self.len + 4].copy_from_slice(&value.to_ne_bytes());
        self.len += 4;
    }
}

/// The number at an offset; 0 where the bytes end before.
fn u32_at(bytes: &[u8], at: usize) -> u32 {
    bytes.get(at..).and_then(|bytes| bytes.first_chunk()).map_or(0, |bytes| u32::from_ne_bytes(*bytes))
}

fn i32_at(bytes: &[u8], at: usize) -> i32 {
    u32_at(bytes, at).cast_signed()
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    bytes.get(at..).and_then(|bytes| bytes.first_chunk()).map_or(0, |bytes| u64::from_ne_bytes(*bytes))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_that_no_clock_can_say_are_no_panic() {
        assert_eq!(seconds(time(-5, 250)), (-5, 250));
        assert_eq!(seconds(time(1 << 33, 7)), (1 << 33, 7));
        for wild in [i64::MIN, i64::MAX, i64::MIN + 1] {
            let _ = seconds(time(wild, u32::MAX));
        }
    }

    #[test]
    fn a_request_that_is_too_short_is_zeros() {
        assert!(matches!(operation(15, &[]), Operation::Read { offset: 0, len: 0 }));
        assert!(matches!(operation(4, &[0xff; 12]), Operation::SetAttributes { truncate: Some(Truncate::ByHandle(0)), .. }));
        assert!(matches!(operation(9999, &[]), Operation::Refused(Errno::NOSYS)));
    }

    #[test]
    fn replies_are_as_long_as_the_kernel_wants_them() {
        let mut to = [0xff; 128];
        assert_eq!(opened(3, &mut to), 16);
        assert_eq!(written(512, &mut to), 8);
        assert_eq!(sought(512, &mut to), 8);
        out_header(&mut to, 77, Err(Errno::IO));
        assert_eq!((u32_at(&to, 0), i32_at(&to, 4), u64_at(&to, 8)), (16, -5, 77));
        out_header(&mut to, 78, Ok(100));
        assert_eq!((u32_at(&to, 0), i32_at(&to, 4), u64_at(&to, 8)), (116, 0, 78));
    }
}
