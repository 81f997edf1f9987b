//! Requests and replies as the kernel lays them out in memory (`include/uapi/linux/fuse.h`, protocol
//! 7.42): bytes in, values out, and back. Pure. Both transports use it; fuser parses only INIT.
//!
//! No bytes cause a panic: every number is read with a bounds check, and a request whose structure is
//! cut short is refused with EIO. All numbers are in the byte order of the machine.

use std::time::{Duration, SystemTime};

use rustix::fs::StatVfs;
use rustix::io::Errno;

use super::attributes::{Changes, TimeChange};
use super::handler::{Stat, Truncate};

/// Bytes of `struct fuse_in_header`.
pub(super) const IN_HEADER: usize = 40;
/// Bytes of `struct fuse_out_header`.
pub(super) const OUT_HEADER: usize = 16;
/// Bytes before the data of a write request: `struct fuse_in_header` and `struct fuse_write_in`.
pub(super) const WRITE_HEADER: usize = IN_HEADER + 40;
/// The largest structure of a reply, `struct fuse_attr_out`, in bytes.
const LARGEST: usize = 104;
/// The file at the mountpoint (FUSE_ROOT_ID).
const ROOT: u64 = 1;
/// The bit that the numbers of requests have that [`retrieve`] asks for, and no others.
const ECHO: u64 = 1 << 63;
/// Nanoseconds in a second.
const SECOND: u32 = 1_000_000_000;

/// A request of /dev/fuse.
#[derive(Debug)]
pub(super) struct Request<'a> {
    /// The number that its reply carries.
    pub(super) unique: u64,
    /// What is to be done.
    pub(super) operation: Operation,
    /// The bytes of a write; empty for all other operations.
    pub(super) data: &'a [u8],
}

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
    /// FUSE_FORGET and FUSE_BATCH_FORGET: nothing to be done, and the kernel takes no reply.
    NoReply,
    /// FUSE_NOTIFY_REPLY: what [`retrieve`] has asked for. The kernel takes no reply.
    Echo {
        /// As it was given to [`retrieve`].
        token: u64,
    },
    /// Not offered.
    Refused(Errno),
}

/// The opcode and the number of a request, from `struct fuse_in_header`.
pub(super) fn in_header(bytes: &[u8]) -> (u32, u64) {
    (u32_at(bytes, 4), u64_at(bytes, 8))
}

/// The request that was read from /dev/fuse. `None` where the bytes are not one: they are fewer than a
/// header, or not as many as the header says. Such a request cannot even be answered.
pub(super) fn request(bytes: &[u8]) -> Option<Request<'_>> {
    if bytes.len() < IN_HEADER || u32_at(bytes, 0) as usize != bytes.len() {
        return None;
    }
    let (opcode, unique) = in_header(bytes);
    let operation = operation(opcode, unique, &bytes[IN_HEADER..]);
    let (operation, data) = match operation {
        Operation::Write { len, .. } => match bytes.get(WRITE_HEADER..).filter(|data| data.len() == len as usize) {
            Some(data) => (operation, data),
            None => (Operation::Refused(Errno::IO), &[][..]),
        },
        _ => (operation, &[][..]),
    };
    Some(Request { unique, operation, data })
}

/// Writes `struct fuse_out_header`: the answer to request `unique`, followed by `len` bytes, or an error.
///
/// # Panics
/// `bytes` are fewer than [`OUT_HEADER`].
pub(super) fn out_header(bytes: &mut [u8], unique: u64, result: Result<u32, Errno>) {
    let (len, error) = match result {
        Ok(len) => (len, 0),
        Err(errno) => (0, -errno.raw_os_error()),
    };
    bytes[0..4].copy_from_slice(&len.saturating_add(OUT_HEADER as u32).to_ne_bytes());
    bytes[4..8].copy_from_slice(&error.to_ne_bytes());
    bytes[8..16].copy_from_slice(&unique.to_ne_bytes());
}

/// The operation of a request from its opcode and the structure that belongs to it, which may be
/// followed by other bytes. An opcode that is not offered is ENOSYS: the kernel remembers that and does
/// not ask again. That is wanted of FUSE_INTERRUPT too: a request is never given up half done, and the
/// kernel waits for its reply in any case. A structure that is cut short is EIO.
pub(super) fn operation(opcode: u32, unique: u64, body: &[u8]) -> Operation {
    let len = match opcode {
        15 | 16 => 40,
        4 => 88,
        14 => 8,
        43 => 32,
        46 => 24,
        _ => 0,
    };
    if body.len() < len {
        return Operation::Refused(Errno::IO);
    }
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
        // FORGET, BATCH_FORGET.
        2 | 42 => Operation::NoReply,
        // NOTIFY_REPLY. Its number is what is sure to come: over io_uring the structure is zeros.
        41 => Operation::Echo { token: (unique & !ECHO) >> 1 },
        // LOOKUP: there is no other file.
        1 => Operation::Refused(Errno::NOENT),
        // IOCTL.
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

/// A notification (FUSE_NOTIFY_RETRIEVE) that makes the kernel send [`Operation::Echo`]: `struct
/// fuse_out_header` and `struct fuse_notify_retrieve_out`, which asks for no bytes of the file. `token` is
/// any number that has not been used for one that is still on its way.
pub(super) fn retrieve(token: u64) -> [u8; OUT_HEADER + 32] {
    /// FUSE_NOTIFY_RETRIEVE.
    const RETRIEVE: u32 = 5;
    // Requests of clients have small numbers. All are even: an odd one stands for an interrupt.
    let unique = ECHO | token << 1;
    let mut bytes = [0; OUT_HEADER + 32];
    let len = bytes.len() as u32;
    bytes[0..4].copy_from_slice(&len.to_ne_bytes());
    bytes[4..8].copy_from_slice(&RETRIEVE.to_ne_bytes());
    for (at, value) in [(16, unique), (24, ROOT)] {
        bytes[at..at + 8].copy_from_slice(&u64::to_ne_bytes(value));
    }
    bytes
}

/// A structure of a reply.
#[derive(Clone, Copy, Debug)]
pub(super) struct Structure {
    bytes: [u8; LARGEST],
    len: usize,
}

impl Structure {
    /// Its bytes.
    pub(super) fn bytes(&self) -> &[u8] {
        &self.bytes[..self.len]
    }

    /// No bytes.
    pub(super) fn none() -> Structure {
        Structure::new()
    }

    fn new() -> Structure {
        Structure { bytes: [0; LARGEST], len: 0 }
    }

    fn u64(mut self, value: u64) -> Structure {
        self.bytes[self.len..self.len + 8].copy_from_slice(&value.to_ne_bytes());
        self.len += 8;
        self
    }

    fn u32(mut self, value: u32) -> Structure {
        self.bytes[self.len..self.len + 4].copy_from_slice(&value.to_ne_bytes());
        self.len += 4;
        self
    }
}

/// `struct fuse_attr_out`.
pub(super) fn attributes(stat: &Stat, valid: Duration) -> Structure {
    let times = [stat.times.atime, stat.times.mtime, stat.times.ctime].map(seconds);
    let mode = rustix::fs::FileType::RegularFile.as_raw_mode() | u32::from(stat.owner.mode);
    let mut out = Structure::new().u64(valid.as_secs()).u32(valid.subsec_nanos()).u32(0);
    out = out.u64(ROOT).u64(stat.size).u64(stat.blocks);
    out = times.iter().fold(out, |out, (seconds, _)| out.u64(seconds.cast_unsigned()));
    out = times.iter().fold(out, |out, (_, nanoseconds)| out.u32(*nanoseconds));
    [mode, 1, stat.owner.uid, stat.owner.gid, 0, stat.blksize, 0].into_iter().fold(out, Structure::u32)
}

/// `struct fuse_open_out` with these `FOPEN_` flags.
pub(super) fn opened(flags: u32) -> Structure {
    Structure::new().u64(0).u32(flags).u32(0)
}

/// `struct fuse_write_out`.
pub(super) fn written(len: usize) -> Structure {
    // Never more than the request, whose length is 32 bits wide.
    Structure::new().u32(u32::try_from(len).unwrap_or(u32::MAX)).u32(0)
}

/// `struct fuse_lseek_out`.
pub(super) fn sought(offset: i64) -> Structure {
    Structure::new().u64(offset.cast_unsigned())
}

/// `struct fuse_statfs_out`.
pub(super) fn file_system(host: &StatVfs) -> Structure {
    let counts = [host.f_blocks, host.f_bfree, host.f_bavail, host.f_files, host.f_ffree];
    let sizes = [host.f_bsize, host.f_namemax, host.f_frsize];
    let out = counts.into_iter().fold(Structure::new(), Structure::u64);
    let out = sizes.into_iter().fold(out, |out, value| out.u32(u32::try_from(value).unwrap_or(u32::MAX)));
    (0..7).fold(out, |out, _| out.u32(0))
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

/// What must hold of a request whatever its bytes are: the judge of tests and of the fuzzer.
///
/// # Panics
/// It does not hold.
#[cfg(any(test, fuzzing))]
pub(super) fn any_bytes(bytes: &[u8]) {
    let parsed = request(bytes);
    let is_whole = bytes.len() >= IN_HEADER && u32_at(bytes, 0) as usize == bytes.len();
    assert_eq!(parsed.is_some(), is_whole);
    match parsed.map(|request| (request.operation, request.data)) {
        Some((Operation::Write { len, .. }, data)) => assert_eq!(len as usize, data.len()),
        Some((Operation::SetAttributes { changes, .. }, _)) => {
            for time in [changes.atime, changes.mtime].into_iter().flatten() {
                if let TimeChange::At(at) = time {
                    assert!(seconds(at).1 < SECOND);
                }
            }
        }
        _ => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn operation(opcode: u32, body: &[u8]) -> Operation {
        super::operation(opcode, 7, body)
    }

    #[test]
    fn times_that_no_clock_can_say_are_no_panic() {
        assert_eq!(seconds(time(-5, 250)), (-5, 250));
        assert_eq!(seconds(time(1 << 33, 7)), (1 << 33, 7));
        for wild in [i64::MIN, i64::MAX, i64::MIN + 1] {
            let _ = seconds(time(wild, u32::MAX));
        }
    }

    /// A request as /dev/fuse yields it.
    fn bytes(opcode: u32, unique: u64, body: &[u8]) -> Vec<u8> {
        let len = (IN_HEADER + body.len()) as u32;
        let mut bytes = [&len.to_ne_bytes()[..], &opcode.to_ne_bytes(), &unique.to_ne_bytes(), &[0; 24]].concat();
        bytes.extend_from_slice(body);
        bytes
    }

    #[test]
    fn a_request_that_is_cut_short_is_refused() {
        for (opcode, len) in [(15, 40), (16, 40), (4, 88), (14, 8), (43, 32), (46, 24)] {
            assert!(matches!(operation(opcode, &vec![0xff; len - 1]), Operation::Refused(Errno::IO)), "{opcode}");
            assert!(!matches!(operation(opcode, &vec![0xff; len]), Operation::Refused(_)), "{opcode}");
        }
        assert!(matches!(operation(9999, &[]), Operation::Refused(Errno::NOSYS)));
        assert!(request(&[0; IN_HEADER - 1]).is_none());
        assert!(request(&[0; IN_HEADER]).is_none(), "the header says that it is 0 bytes long");
    }

    #[test]
    fn the_data_of_a_write_are_as_long_as_it_says() {
        let mut body = [&[0; 8][..], &4096u64.to_ne_bytes(), &3u32.to_ne_bytes(), &[0; 20]].concat();
        body.extend_from_slice(b"abc");
        let whole = bytes(16, 7, &body);
        let parsed = request(&whole).unwrap();
        assert_eq!((parsed.unique, parsed.data), (7, &b"abc"[..]));
        assert!(matches!(parsed.operation, Operation::Write { offset: 4096, len: 3, flags: 0 }), "{parsed:?}");
        for wrong in [&body[..42], &body[..39], &[&body[..], b"d"].concat()] {
            let wrong = bytes(16, 8, wrong);
            let parsed = request(&wrong).unwrap();
            assert!(matches!(parsed.operation, Operation::Refused(Errno::IO)) && parsed.data.is_empty(), "{parsed:?}");
        }
    }

    #[test]
    fn what_takes_no_reply_and_what_the_kernel_shall_not_ask_again() {
        for opcode in [2, 42] {
            assert!(matches!(operation(opcode, &[]), Operation::NoReply), "{opcode}");
        }
        // GETXATTR, ACCESS, INTERRUPT, POLL, COPY_FILE_RANGE, STATX.
        for opcode in [22, 34, 36, 40, 47, 52] {
            assert!(matches!(operation(opcode, &[0; 256]), Operation::Refused(Errno::NOSYS)), "{opcode}");
        }
    }

    proptest::proptest! {
        /// Whatever the bytes are: a request or none, never a panic, also in what is made of it.
        #[test]
        fn any_bytes_are_a_request_or_none(mut bytes: Vec<u8>, opcode in 0..60u32, honest: bool) {
            if honest && bytes.len() >= IN_HEADER {
                let len = bytes.len() as u32;
                bytes[..4].copy_from_slice(&len.to_ne_bytes());
                bytes[4..8].copy_from_slice(&opcode.to_ne_bytes());
            }
            any_bytes(&bytes);
        }

        /// The setting of times that end the conversion of others: any numbers are a time that goes back into a reply.
        #[test]
        fn any_time_is_one_that_can_be_told(seconds_of: i64, nanoseconds: u32) {
            let (back, rest) = seconds(time(seconds_of, nanoseconds));
            proptest::prop_assert!(rest < SECOND);
            if nanoseconds < SECOND && seconds_of > i64::MIN && back != 0 {
                proptest::prop_assert_eq!((back, rest), (seconds_of, nanoseconds));
            }
        }
    }

    #[test]
    fn replies_are_as_long_as_the_kernel_wants_them() {
        assert_eq!(opened(3).bytes().len(), 16);
        assert_eq!(written(512).bytes(), [&512u32.to_ne_bytes()[..], &[0; 4]].concat());
        assert_eq!(sought(-1).bytes(), [0xff; 8]);
        let mut to = [0xff; OUT_HEADER];
        out_header(&mut to, 77, Err(Errno::IO));
        assert_eq!((u32_at(&to, 0), i32_at(&to, 4), u64_at(&to, 8)), (16, -5, 77));
        out_header(&mut to, 78, Ok(100));
        assert_eq!((u32_at(&to, 0), i32_at(&to, 4), u64_at(&to, 8)), (116, 0, 78));
    }
}
