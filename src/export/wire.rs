//! Parser and encoder of FUSE requests and replies, in the layout of the kernel
//! (`include/uapi/linux/fuse.h`, protocol 7.42). Pure functions between bytes and values. Both
//! transports use them; fuser parses only INIT.
//!
//! No bytes cause a panic: each number is read with a bounds check, and a request whose structure
//! is cut short is refused with EIO. All numbers are in the byte order of the machine.

use std::time::{Duration, SystemTime};

use rustix::fs::StatVfs;
use rustix::io::Errno;

use super::attributes::{AttributeChanges, TimeChange};
use super::handler::{Stat, Truncate};

/// Size of `struct fuse_in_header`, in bytes.
pub(super) const IN_HEADER: usize = 40;
/// Size of `struct fuse_out_header`, in bytes.
pub(super) const OUT_HEADER: usize = 16;
/// Offset of the data in a write request, in bytes: `struct fuse_in_header` and `struct
/// fuse_write_in`.
pub(super) const WRITE_HEADER: usize = IN_HEADER + 40;
/// Size of the largest structure of a reply, `struct fuse_attr_out`, in bytes.
const LARGEST: usize = 104;
/// Inode number of the file at the mountpoint (FUSE_ROOT_ID).
pub(super) const ROOT: u64 = 1;
/// The bit that the kernel sets in the number of a request that it sends again
/// (FUSE_UNIQUE_RESEND). It belongs to the number: the reply must carry it too.
const RESENT: u64 = 1 << 63;
/// The bit that marks the numbers of requests that [`retrieve`] asks for. No other request has it.
const ECHO: u64 = 1 << 62;
/// Nanoseconds per second.
const SECOND: u32 = 1_000_000_000;

/// A request from /dev/fuse.
#[derive(Debug)]
pub(super) struct Request<'a> {
    /// The number of the request, which its reply must carry.
    pub(super) unique: u64,
    /// The parsed operation.
    pub(super) operation: Operation,
    /// The data of a write; empty for all other operations.
    pub(super) data: &'a [u8],
}

/// An operation that the kernel requests.
#[derive(Clone, Copy, Debug)]
pub(super) enum Operation {
    /// FUSE_READ: read `len` bytes at `offset`.
    Read {
        /// Guest offset, in bytes.
        offset: u64,
        /// Length, in bytes.
        len: u32,
    },
    /// FUSE_WRITE: write the data of the payload.
    Write {
        /// Guest offset, in bytes.
        offset: u64,
        /// Length, in bytes.
        len: u32,
        /// Flags of open(2), and those of the write call.
        flags: i32,
    },
    /// FUSE_GETATTR.
    GetAttributes,
    /// FUSE_SETATTR.
    SetAttributes {
        /// The new size, if it is to change.
        truncate: Option<Truncate>,
        /// All other attributes that are to change.
        changes: AttributeChanges,
    },
    /// FUSE_OPEN.
    Open {
        /// Flags of open(2).
        flags: i32,
    },
    /// FUSE_FLUSH, which close(2) sends.
    Close,
    /// FUSE_FSYNC.
    Sync,
    /// FUSE_FALLOCATE.
    Allocate {
        /// Guest offset, in bytes.
        offset: u64,
        /// Length, in bytes.
        len: u64,
        /// Mode of fallocate(2).
        mode: i32,
    },
    /// FUSE_LSEEK.
    Seek {
        /// Guest offset, in bytes.
        offset: i64,
        /// As in lseek(2).
        whence: i32,
    },
    /// FUSE_STATFS.
    FileSystem,
    /// An operation that needs no work and succeeds.
    Nothing,
    /// FUSE_FORGET and FUSE_BATCH_FORGET: no work, and the kernel takes no reply.
    NoReply,
    /// FUSE_NOTIFY_REPLY: the request that [`retrieve`] has asked for. The kernel takes no reply.
    Echo {
        /// The token that was passed to [`retrieve`].
        token: u64,
    },
    /// An operation that is refused with this errno.
    Refused(Errno),
}

/// Returns the opcode and the number of a request, from `struct fuse_in_header`.
pub(super) fn in_header(bytes: &[u8]) -> (u32, u64) {
    (u32_at(bytes, 4), u64_at(bytes, 8))
}

/// Parses the bytes that one read of /dev/fuse returned. Returns `None` if they are fewer than a
/// header, or not as many as the header says. Such a request cannot even be answered.
pub(super) fn request(bytes: &[u8]) -> Option<Request<'_>> {
    if bytes.len() < IN_HEADER || u32_at(bytes, 0) as usize != bytes.len() {
        return None;
    }
    let (opcode, unique) = in_header(bytes);
    let operation = operation(opcode, unique, &bytes[IN_HEADER..]);
    let (operation, data) = match operation {
        Operation::Write { len, .. } => {
            match bytes.get(WRITE_HEADER..).filter(|data| data.len() == len as usize) {
                Some(data) => (operation, data),
                None => (Operation::Refused(Errno::IO), &[][..]),
            }
        }
        _ => (operation, &[][..]),
    };
    Some(Request { unique, operation, data })
}

/// Writes `struct fuse_out_header`: the reply to request `unique`, which is an error or is followed
/// by `len` bytes.
///
/// # Panics
/// If `bytes` is shorter than [`OUT_HEADER`].
pub(super) fn out_header(bytes: &mut [u8], unique: u64, result: Result<u32, Errno>) {
    let (len, error) = match result {
        Ok(len) => (len, 0),
        Err(errno) => (0, -errno.raw_os_error()),
    };
    bytes[0..4].copy_from_slice(&len.saturating_add(OUT_HEADER as u32).to_ne_bytes());
    bytes[4..8].copy_from_slice(&error.to_ne_bytes());
    bytes[8..16].copy_from_slice(&unique.to_ne_bytes());
}

/// Parses an operation from its opcode and its structure; `body` may have more bytes after the
/// structure.
///
/// An opcode that is not supported becomes ENOSYS: the kernel remembers that and does not send it
/// again. This is right for FUSE_INTERRUPT too: no request is ever abandoned half done, and the
/// kernel waits for its reply in any case. A structure that is cut short becomes EIO.
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
        16 => Operation::Write {
            offset: u64_at(body, 8),
            len: u32_at(body, 16),
            flags: i32_at(body, 32),
        },
        3 => Operation::GetAttributes,
        4 => set_attributes(body),
        14 => Operation::Open { flags: i32_at(body, 0) },
        25 => Operation::Close,
        20 => Operation::Sync,
        43 => Operation::Allocate {
            offset: u64_at(body, 8),
            len: u64_at(body, 16),
            mode: i32_at(body, 24),
        },
        46 => Operation::Seek { offset: u64_at(body, 8).cast_signed(), whence: i32_at(body, 16) },
        17 => Operation::FileSystem,
        // RELEASE and DESTROY.
        18 | 38 => Operation::Nothing,
        // FORGET and BATCH_FORGET.
        2 | 42 => Operation::NoReply,
        // NOTIFY_REPLY. Only its number is reliable: over io_uring its structure is all zeros.
        41 => Operation::Echo { token: (unique & !(RESENT | ECHO)) >> 1 },
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
            false => {
                TimeChange::At(time(u64_at(body, seconds).cast_signed(), u32_at(body, nanoseconds)))
            }
        })
    };
    let size = u64_at(body, 16);
    Operation::SetAttributes {
        truncate: has(3).then_some(if has(6) {
            Truncate::ByHandle(size)
        } else {
            Truncate::ByPath(size)
        }),
        changes: AttributeChanges {
            mode: has(0).then(|| u32_at(body, 68)),
            uid: has(1).then(|| u32_at(body, 76)),
            gid: has(2).then(|| u32_at(body, 80)),
            atime: time(4, 7, 32, 56),
            mtime: time(5, 8, 40, 60),
        },
    }
}

/// Converts a time of the kernel. A time that this machine's clock cannot represent becomes the
/// epoch.
fn time(seconds: i64, nanoseconds: u32) -> SystemTime {
    let epoch = SystemTime::UNIX_EPOCH;
    let whole = Duration::from_secs(seconds.unsigned_abs());
    let at = if seconds < 0 { epoch.checked_sub(whole) } else { epoch.checked_add(whole) };
    at.and_then(|at| at.checked_add(Duration::from_nanos(u64::from(nanoseconds % SECOND))))
        .unwrap_or(epoch)
}

/// Converts a time to seconds and nanoseconds.
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

/// Encodes a notification (FUSE_NOTIFY_RETRIEVE) that makes the kernel send [`Operation::Echo`]. It
/// consists of `struct fuse_out_header` and `struct fuse_notify_retrieve_out`, and asks for 0 bytes
/// of the file. `token` must differ from the tokens of all notifications that are still in flight.
pub(super) fn retrieve(token: u64) -> [u8; OUT_HEADER + 32] {
    /// FUSE_NOTIFY_RETRIEVE.
    const RETRIEVE: u32 = 5;
    // Requests of clients have small numbers, all of them even: an odd number marks an interrupt.
    let unique = (token << 1) & !RESENT | ECHO;
    let mut bytes = [0; OUT_HEADER + 32];
    let len = bytes.len() as u32;
    bytes[0..4].copy_from_slice(&len.to_ne_bytes());
    bytes[4..8].copy_from_slice(&RETRIEVE.to_ne_bytes());
    for (at, value) in [(16, unique), (24, ROOT)] {
        bytes[at..at + 8].copy_from_slice(&u64::to_ne_bytes(value));
    }
    bytes
}

/// A structure that follows the header of a reply.
#[derive(Clone, Copy, Debug)]
pub(super) struct Structure {
    bytes: [u8; LARGEST],
    len: usize,
}

impl Structure {
    /// Returns the encoded bytes.
    pub(super) fn bytes(&self) -> &[u8] {
        &self.bytes[..self.len]
    }

    /// Returns a structure of 0 bytes.
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

/// Encodes `struct fuse_attr_out`; the kernel may show it for `valid`.
pub(super) fn attributes(stat: &Stat, valid: Duration) -> Structure {
    let times = [stat.times.atime, stat.times.mtime, stat.times.ctime].map(seconds);
    let mode = rustix::fs::FileType::RegularFile.as_raw_mode() | u32::from(stat.owner.mode);
    let mut out = Structure::new().u64(valid.as_secs()).u32(valid.subsec_nanos()).u32(0);
    out = out.u64(ROOT).u64(stat.size).u64(stat.blocks);
    out = times.iter().fold(out, |out, (seconds, _)| out.u64(seconds.cast_unsigned()));
    out = times.iter().fold(out, |out, (_, nanoseconds)| out.u32(*nanoseconds));
    [mode, 1, stat.owner.uid, stat.owner.gid, 0, stat.blksize, 0]
        .into_iter()
        .fold(out, Structure::u32)
}

/// Encodes `struct fuse_open_out` with these `FOPEN_` flags.
pub(super) fn opened(flags: u32) -> Structure {
    Structure::new().u64(0).u32(flags).u32(0)
}

/// Encodes `struct fuse_write_out`.
pub(super) fn written(len: usize) -> Structure {
    // `len` is at most the length of the request, which is 32 bits wide.
    Structure::new().u32(u32::try_from(len).unwrap_or(u32::MAX)).u32(0)
}

/// Encodes `struct fuse_lseek_out`.
pub(super) fn sought(offset: i64) -> Structure {
    Structure::new().u64(offset.cast_unsigned())
}

/// Encodes `struct fuse_statfs_out`.
pub(super) fn file_system(host: &StatVfs) -> Structure {
    let counts = [host.f_blocks, host.f_bfree, host.f_bavail, host.f_files, host.f_ffree];
    let sizes = [host.f_bsize, host.f_namemax, host.f_frsize];
    let out = counts.into_iter().fold(Structure::new(), Structure::u64);
    let out =
        sizes.into_iter().fold(out, |out, value| out.u32(u32::try_from(value).unwrap_or(u32::MAX)));
    (0..7).fold(out, |out, _| out.u32(0))
}

/// Reads the number at an offset; returns 0 if the bytes end before it does.
fn u32_at(bytes: &[u8], at: usize) -> u32 {
    bytes
        .get(at..)
        .and_then(|bytes| bytes.first_chunk())
        .map_or(0, |bytes| u32::from_ne_bytes(*bytes))
}

fn i32_at(bytes: &[u8], at: usize) -> i32 {
    u32_at(bytes, at).cast_signed()
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    bytes
        .get(at..)
        .and_then(|bytes| bytes.first_chunk())
        .map_or(0, |bytes| u64::from_ne_bytes(*bytes))
}

/// Asserts the properties that hold for a request of any bytes, for the tests and the fuzzer.
///
/// # Panics
/// If a property does not hold.
#[cfg(any(test, feature = "testing"))]
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

    /// Builds a request as /dev/fuse yields it.
    fn bytes(opcode: u32, unique: u64, body: &[u8]) -> Vec<u8> {
        let len = (IN_HEADER + body.len()) as u32;
        let mut bytes =
            [&len.to_ne_bytes()[..], &opcode.to_ne_bytes(), &unique.to_ne_bytes(), &[0; 24]]
                .concat();
        bytes.extend_from_slice(body);
        bytes
    }

    #[test]
    fn a_request_that_is_cut_short_is_refused() {
        for (opcode, len) in [(15, 40), (16, 40), (4, 88), (14, 8), (43, 32), (46, 24)] {
            assert!(
                matches!(operation(opcode, &vec![0xff; len - 1]), Operation::Refused(Errno::IO)),
                "{opcode}"
            );
            assert!(
                !matches!(operation(opcode, &vec![0xff; len]), Operation::Refused(_)),
                "{opcode}"
            );
        }
        assert!(matches!(operation(9999, &[]), Operation::Refused(Errno::NOSYS)));
        assert!(request(&[0; IN_HEADER - 1]).is_none());
        assert!(request(&[0; IN_HEADER]).is_none(), "the header says that it is 0 bytes long");
    }

    #[test]
    fn the_data_of_a_write_are_as_long_as_it_says() {
        let mut body =
            [&[0; 8][..], &4096u64.to_ne_bytes(), &3u32.to_ne_bytes(), &[0; 20]].concat();
        body.extend_from_slice(b"abc");
        let whole = bytes(16, 7, &body);
        let parsed = request(&whole).unwrap();
        assert_eq!((parsed.unique, parsed.data), (7, &b"abc"[..]));
        assert!(
            matches!(parsed.operation, Operation::Write { offset: 4096, len: 3, flags: 0 }),
            "{parsed:?}"
        );
        for wrong in [&body[..42], &body[..39], &[&body[..], b"d"].concat()] {
            let wrong = bytes(16, 8, wrong);
            let parsed = request(&wrong).unwrap();
            assert!(
                matches!(parsed.operation, Operation::Refused(Errno::IO)) && parsed.data.is_empty(),
                "{parsed:?}"
            );
        }
    }

    #[test]
    fn what_takes_no_reply_and_what_the_kernel_shall_not_ask_again() {
        for opcode in [2, 42] {
            assert!(matches!(operation(opcode, &[]), Operation::NoReply), "{opcode}");
        }
        // GETXATTR, ACCESS, INTERRUPT, POLL, COPY_FILE_RANGE, STATX.
        for opcode in [22, 34, 36, 40, 47, 52] {
            assert!(
                matches!(operation(opcode, &[0; 256]), Operation::Refused(Errno::NOSYS)),
                "{opcode}"
            );
        }
    }

    /// Protects: the number of a request that is sent again differs from the first one in bit 63,
    /// is kept for the reply, and is never that of an echo.
    #[test]
    fn numbers_of_requests_that_are_sent_again_and_of_echoes() {
        let again = bytes(25, RESENT | 8, &[0; 24]);
        assert_eq!(request(&again).unwrap().unique, RESENT | 8);
        for token in [0, 5, 1 << 50, u64::MAX] {
            let asked = retrieve(token);
            let unique = u64_at(&asked, 16);
            assert_eq!(unique & (RESENT | ECHO), ECHO);
            let Operation::Echo { token: echoed } = super::operation(41, unique, &[]) else {
                panic!("no echo");
            };
            assert_eq!(echoed, token & ((ECHO >> 1) - 1));
        }
    }

    /// Protects: the corpus of the fuzz target has a complete request of each kind, and each of
    /// them has the properties of [`any_bytes`].
    #[test]
    fn the_corpus_of_the_fuzz_target_has_each_request() {
        let corpus = std::path::Path::new(env!("CARGO_MANIFEST_DIR"))
            .join("../../tests/fuzz/corpus/fuse_request");
        // Files that the fuzzer adds are named by their hash (40 characters) and are not committed.
        let files = std::fs::read_dir(corpus).unwrap().map(|entry| entry.unwrap().path());
        let files = files.filter(|file| file.file_name().unwrap().len() < 40);
        let mut opcodes = Vec::new();
        for file in files {
            let bytes = std::fs::read(&file).unwrap();
            any_bytes(&bytes);
            let request =
                request(&bytes).unwrap_or_else(|| panic!("{}: no request", file.display()));
            assert!(
                !matches!(request.operation, Operation::Refused(Errno::IO)),
                "{}: cut short",
                file.display()
            );
            opcodes.push(in_header(&bytes).0);
        }
        let answered = (0..100).filter(|&opcode| {
            !matches!(operation(opcode, &[0; 256]), Operation::Refused(Errno::NOSYS))
        });
        // INTERRUPT stands for the opcodes that are not supported.
        for opcode in answered.chain([36]) {
            assert!(opcodes.contains(&opcode), "no request of opcode {opcode}");
        }
    }

    proptest::proptest! {
        /// Protects: any bytes give a request or `None`, and neither the parser nor the conversion
        /// of the parsed times panics.
        #[test]
        fn any_bytes_are_a_request_or_none(mut bytes: Vec<u8>, opcode in 0..60u32, honest: bool) {
            if honest && bytes.len() >= IN_HEADER {
                let len = bytes.len() as u32;
                bytes[..4].copy_from_slice(&len.to_ne_bytes());
                bytes[4..8].copy_from_slice(&opcode.to_ne_bytes());
            }
            any_bytes(&bytes);
        }

        /// Protects: any numbers that a client sets as a time give a time that fits a reply,
        /// including numbers that other representations of time cannot hold.
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
