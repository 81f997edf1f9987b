//! Tests of the handler above a real disk in a scratch directory, without a mount.

use std::fs::File;
use std::io;
use std::path::Path;
use std::time::{Duration, SystemTime};

use rustix::fs::{Mode, OFlags};

use super::*;
use engine::chain::Gate;
use engine::create::{CreateOptions, create};
use engine::disk::DiskOptions;
use host::storage::WriteKind;
use qcow2::format::BackingFormat;
use qcow2::image::Image;
use sim::start::Start;
use sim::{Action, Fault, HostFailure, Repeat, SimStorage};

/// Size in bytes. It is not a multiple of the cluster size, so that the disk ends inside a cluster.
const SIZE: u64 = 1_000_448;

const KEEP_SIZE: i32 = 1;
const PUNCH_HOLE: i32 = 2;
const ZERO_RANGE: i32 = 16;

struct Rig {
    handler: Handler,
    _scratch: tempfile::TempDir,
}

fn open_handler(directory: &Path, read_only: bool) -> Handler {
    let options = DiskOptions {
        read_only,
        copy_on_read: !read_only,
        gate: Gate::default(),
        full_check: false,
        reserve: None,
    };
    let disk = Arc::new(Disk::open(&directory.join("overlay"), &options).unwrap());
    let attributes =
        Attributes::new(7, 8, SystemTime::UNIX_EPOCH + Duration::from_secs(99), false, read_only);
    let directory =
        rustix::fs::open(directory, OFlags::PATH | OFlags::DIRECTORY, Mode::empty()).unwrap();
    Handler::new(disk, attributes, directory)
}

/// Makes an overlay over [`SIZE`] bytes of 0xbb.
fn rig(read_only: bool) -> Rig {
    let scratch = tempfile::tempdir().unwrap();
    std::fs::write(scratch.path().join("base"), vec![0xbb; SIZE as usize]).unwrap();
    let options = CreateOptions {
        overlay: scratch.path().join("overlay"),
        base: "base".to_string(),
        format: BackingFormat::Raw,
        size: None,
        cluster_size: 65536,
        extended_l2: false,
    };
    create(&options, &engine::chain::Gate::default()).unwrap();
    Rig { handler: open_handler(scratch.path(), read_only), _scratch: scratch }
}

fn read_into(handler: &Handler, offset: u64, buf: &mut [u8]) -> Result<usize, Errno> {
    let mut answers = Vec::new();
    handler.read(offset, buf, &mut |answer| answers.push(answer.map(<[u8]>::len)));
    assert_eq!(answers.len(), 1, "one answer");
    answers[0]
}

fn read(handler: &Handler, offset: u64, len: usize) -> Vec<u8> {
    let mut buf = vec![0xee; len];
    let len = read_into(handler, offset, &mut buf).unwrap();
    buf.truncate(len);
    buf
}

#[test]
fn reads_end_where_the_disk_ends() {
    let rig = rig(false);
    let mut buf = [0; 100];
    assert_eq!(rig.handler.read_local(SIZE, &mut buf), Ok(Answer::Done(0)));
    assert_eq!(rig.handler.read_local(u64::MAX, &mut buf), Ok(Answer::Done(0)));
    assert_eq!(read_into(&rig.handler, SIZE + 1, &mut buf), Ok(0));
    assert_eq!(read(&rig.handler, SIZE - 10, 100), [0xbb; 10]);
    assert_eq!(
        rig.handler.read_local(SIZE - 10, &mut buf),
        Ok(Answer::Done(10)),
        "copied up by the read before"
    );
}

#[test]
fn a_miss_does_nothing() {
    let rig = rig(false);
    let mut buf = [0xee; 4];
    assert_eq!(rig.handler.read_local(0, &mut buf), Ok(Answer::Below));
    assert_eq!(rig.handler.write_local(0, b"abcd"), Ok(Answer::Below));
    assert!(!rig.handler.needs_flush());
    assert_eq!(read(&rig.handler, 0, 4), [0xbb; 4]);
}

/// Protects: the first close after a takeover flushes, because the earlier process may have
/// answered writes that no flush has covered; and the times stay those of the file.
#[test]
fn a_disk_that_was_taken_over_is_flushed_by_the_next_close() {
    let rig = rig(false);
    let times = rig.handler.getattr().unwrap().times;
    rig.handler.taken_over();
    assert!(rig.handler.needs_flush());
    assert_eq!(rig.handler.flush_local(), Answer::Miss);
    assert_eq!(rig.handler.getattr().unwrap().times, times);
    rig.handler.flush().unwrap();
    assert!(!rig.handler.needs_flush());
}

/// Protects: P1, P7. A flush is answered at once only if an earlier one has covered every change,
/// and never after a barrier has failed. A copy from below is no change. Every flush is counted.
#[test]
fn a_flush_of_nothing_is_answered_at_once() {
    let (file, handler, _scratch) = in_memory();
    let is_done = || handler.flush_local() == Answer::Done(());
    assert!(is_done());
    handler.write(0, &[1; 100], Durability::Later).unwrap();
    assert!(!is_done() && !is_done());
    handler.flush().unwrap();
    assert!(is_done());
    assert_eq!(handler.write_local(0, &[2; 100]), Ok(Answer::Done(100)));
    assert!(!is_done());
    handler.flush().unwrap();
    handler.fallocate(0, 512, PUNCH_HOLE | KEEP_SIZE).unwrap();
    assert!(!is_done());
    handler.flush().unwrap();
    assert_eq!(handler.disk.stats().flushes.operations, 5);
    let fails_once = |action| Fault {
        matches: Box::new(move |operation| operation.action == action),
        after: 0,
        failure: HostFailure::Errno(5),
        times: Repeat::Once,
    };
    file.inject(fails_once(Action::Write(WriteKind::Data)));
    assert_eq!(handler.write_local(1 << 10, &[2; 100]), Err(Errno::IO));
    assert!(!is_done(), "a part may have been written");
    handler.flush().unwrap();
    assert!(is_done());
    handler.write(0, &[3; 100], Durability::Later).unwrap();
    file.inject(fails_once(Action::Sync));
    assert_eq!(handler.flush(), Err(Errno::IO));
    assert!(!is_done());
    handler.durable.store(u64::MAX, Ordering::Release);
    assert!(!is_done(), "the image cannot be written any more");

    let rig = rig(false);
    read(&rig.handler, 0, 4);
    assert!(rig.handler.disk.stats().copied_up.bytes > 0);
    assert_eq!(rig.handler.flush_local(), Answer::Done(()));
}

#[test]
fn writes_end_where_the_disk_ends() {
    let rig = rig(false);
    assert_eq!(rig.handler.write(SIZE, b"x", Durability::Later), Err(Errno::NOSPC));
    assert_eq!(rig.handler.write_local(u64::MAX, b"x"), Err(Errno::NOSPC));
    assert_eq!(rig.handler.write(SIZE - 2, b"abcd", Durability::Later), Ok(2));
    assert_eq!(rig.handler.write(SIZE, b"", Durability::Later), Ok(0));
    assert_eq!(read(&rig.handler, SIZE - 3, 9), b"\xbbab");
}

#[test]
fn a_close_flushes_only_what_no_flush_has_covered() {
    let rig = rig(false);
    assert!(!rig.handler.needs_flush());
    rig.handler.write(0, b"x", Durability::Later).unwrap();
    assert!(rig.handler.needs_flush());
    rig.handler.flush().unwrap();
    assert!(!rig.handler.needs_flush());
    rig.handler.write(0, b"y", Durability::Now).unwrap();
    assert!(!rig.handler.needs_flush());
    assert_eq!(rig.handler.write_local(0, b"z"), Ok(Answer::Done(1)));
    assert!(rig.handler.needs_flush());
    rig.handler.flush().unwrap();
    rig.handler.fallocate(0, 65536, PUNCH_HOLE | KEEP_SIZE).unwrap();
    assert!(rig.handler.needs_flush());
}

#[test]
fn fallocate_follows_the_operation_table() {
    let rig = rig(false);
    let fallocate = |offset, len, mode| rig.handler.fallocate(offset, len, mode);
    assert_eq!(fallocate(0, SIZE, 0), Err(Errno::OPNOTSUPP), "no space is reserved");
    assert_eq!(fallocate(SIZE - 1, 2, 0), Err(Errno::NOSPC), "the disk does not grow");
    assert_eq!(fallocate(1, u64::MAX, 0), Err(Errno::FBIG));
    assert_eq!(fallocate(0, 512, KEEP_SIZE), Err(Errno::OPNOTSUPP));
    for other in [PUNCH_HOLE, 8, 32, 64, ZERO_RANGE | PUNCH_HOLE, -1] {
        assert_eq!(fallocate(0, 65536, other), Err(Errno::OPNOTSUPP), "mode {other}");
    }
    assert!(!rig.handler.needs_flush());
    assert_eq!(read(&rig.handler, 0, 4), [0xbb; 4]);

    assert_eq!(
        fallocate(SIZE, 512, PUNCH_HOLE | KEEP_SIZE),
        Ok(()),
        "past the end: no bytes, no error"
    );
    assert_eq!(fallocate(SIZE + 99, 512, ZERO_RANGE | KEEP_SIZE), Ok(()));
    assert_eq!(fallocate(SIZE - 512, 513, ZERO_RANGE), Err(Errno::NOSPC));
    assert!(!rig.handler.needs_flush());

    assert_eq!(fallocate(100, 70_000, PUNCH_HOLE | KEEP_SIZE), Ok(()), "unaligned");
    let got = read(&rig.handler, 99, 70_002);
    assert_eq!((got[0], got[70_001]), (0xbb, 0xbb));
    assert!(got[1..70_001].iter().all(|&byte| byte == 0));
    assert_eq!(
        fallocate(SIZE - 512, 1 << 40, ZERO_RANGE | KEEP_SIZE),
        Ok(()),
        "clamped to the end"
    );
    assert_eq!(read(&rig.handler, SIZE - 513, 600), [&[0xbb][..], &[0; 512]].concat());
    assert_eq!(fallocate(SIZE - 1024, 1024, ZERO_RANGE), Ok(()));
}

#[test]
fn the_size_does_not_change() {
    let rig = rig(false);
    let nothing = AttributeChanges::default();
    let size = |truncate| rig.handler.setattr(Some(truncate), &nothing).map(|stat| stat.size);
    assert_eq!(size(Truncate::ByHandle(SIZE)), Ok(SIZE));
    assert_eq!(size(Truncate::ByPath(SIZE)), Ok(SIZE));
    assert_eq!(size(Truncate::ByPath(0)), Err(Errno::PERM), "this is what O_TRUNC looks like");
    assert_eq!(size(Truncate::ByHandle(0)), Err(Errno::PERM));
    assert_eq!(size(Truncate::ByHandle(SIZE + 512)), Err(Errno::PERM));
    assert_eq!(size(Truncate::ByPath(SIZE - 512)), Err(Errno::PERM));
    assert_eq!(size(Truncate::ByPath(SIZE - 1)), Err(Errno::INVAL));
}

#[test]
fn stat_shows_the_disk_and_keeps_its_times_until_a_write() {
    let rig = rig(false);
    let stat = rig.handler.getattr().unwrap();
    assert_eq!((stat.size, stat.blksize, stat.owner.mode), (SIZE, 65536, 0o600));
    assert_eq!(stat.times.mtime, SystemTime::UNIX_EPOCH + Duration::from_secs(99));
    assert_eq!(read(&rig.handler, 0, 1), [0xbb]);
    assert_eq!(rig.handler.getattr().unwrap().times, stat.times);
    rig.handler.write(0, b"x", Durability::Later).unwrap();
    assert!(rig.handler.getattr().unwrap().times.mtime > stat.times.mtime);
}

#[test]
fn seek_knows_the_ends() {
    let rig = rig(false);
    const DATA: i32 = 3;
    const HOLE: i32 = 4;
    let end = i64::try_from(SIZE).unwrap();
    assert_eq!(rig.handler.lseek(5, DATA), Ok(5));
    assert_eq!(rig.handler.lseek(0, HOLE), Ok(end));
    for offset in [end, end + 1, i64::MAX, -1, i64::MIN] {
        assert_eq!(rig.handler.lseek(offset, DATA), Err(Errno::NXIO));
        assert_eq!(rig.handler.lseek(offset, HOLE), Err(Errno::NXIO));
    }
    assert_eq!(rig.handler.lseek(0, 0), Err(Errno::INVAL));
    rig.handler.fallocate(0, SIZE, PUNCH_HOLE | KEEP_SIZE).unwrap();
    assert_eq!(rig.handler.lseek(0, DATA), Err(Errno::NXIO));
}

#[test]
fn a_read_only_disk_says_so() {
    let rig = rig(true);
    let handler = &rig.handler;
    assert_eq!(handler.write(0, b"x", Durability::Later), Err(Errno::ROFS));
    assert_eq!(handler.write_local(0, b"x"), Err(Errno::ROFS));
    assert_eq!(handler.fallocate(0, 512, PUNCH_HOLE | KEEP_SIZE), Err(Errno::ROFS));
    assert_eq!(
        handler.setattr(Some(Truncate::ByHandle(0)), &AttributeChanges::default()).map(|_| ()),
        Err(Errno::ROFS)
    );
    assert_eq!(
        (handler.open(0), handler.open(1), handler.open(2)),
        (Ok(()), Err(Errno::ROFS), Err(Errno::ROFS))
    );
    assert_eq!(read(handler, 0, 3), [0xbb; 3]);
    assert_eq!(handler.flush(), Ok(()));
    assert_eq!(handler.getattr().unwrap().owner.mode, 0o400);
}

/// Protects: a loop device takes the cluster size as its discard granularity, and `df` shows the
/// space of the host, by whichever of the two block sizes a program multiplies.
#[test]
fn statfs_is_that_of_the_overlay_in_clusters() {
    let rig = rig(false);
    let host = rustix::fs::fstatvfs(File::open(rig._scratch.path()).unwrap()).unwrap();
    let shown = rig.handler.statfs().unwrap();
    assert_eq!((shown.f_bsize, shown.f_frsize), (65536, 65536));
    assert_eq!(shown.f_blocks, host.f_blocks * host.f_frsize / 65536);
}

#[test]
fn counts_of_blocks_keep_their_bytes() {
    let real = || rustix::fs::fstatvfs(File::open("/").unwrap()).unwrap();
    let host = || StatVfs {
        f_bsize: 4096,
        f_frsize: 1024,
        f_blocks: 4000,
        f_bfree: 130,
        f_bavail: 127,
        ..real()
    };
    let in_pages = in_blocks(host(), 4096);
    assert_eq!(
        (in_pages.f_blocks, in_pages.f_bfree, in_pages.f_bavail),
        (1000, 32, 31),
        "rounded down"
    );
    assert_eq!(in_blocks(host(), 512).f_blocks, 8000);
    let vast = StatVfs { f_frsize: u64::MAX, f_blocks: u64::MAX, ..real() };
    assert_eq!(in_blocks(vast, 4096).f_blocks, u64::MAX);
}

#[test]
fn errors_of_the_system_pass_through_and_kinds_follow_the_table() {
    let os = |number| errno(&Error::io("x", io::Error::from_raw_os_error(number)).context("y"));
    assert_eq!(os(28), Errno::NOSPC);
    assert_eq!(os(5), Errno::IO);
    assert_eq!(os(122), Errno::DQUOT);
    for dangerous in [38, 4, 11, 512, 4095] {
        assert_eq!(os(dangerous), Errno::IO, "{dangerous}");
    }
    let kind = |kind| errno(&Error::new(kind, "x"));
    assert_eq!(kind(ErrorKind::NoSpace), Errno::NOSPC);
    assert_eq!(kind(ErrorKind::ReadOnly), Errno::ROFS);
    assert_eq!(kind(ErrorKind::InvalidArgument), Errno::INVAL);
    assert_eq!(kind(ErrorKind::Busy), Errno::BUSY);
    assert_eq!(kind(ErrorKind::Corrupt), Errno::IO);
}

#[test]
fn durability_is_in_the_flags_of_the_write() {
    assert_eq!(Durability::of_write(0o1), Durability::Later);
    assert_eq!(Durability::of_write(0o10_001), Durability::Now);
    assert_eq!(Durability::of_write(0o4_000_001), Durability::Now);
    assert_eq!(Durability::of_write(0o4_010_001), Durability::Now);
}

/// Makes a handler above an image in memory, whose barriers a test can hold.
fn in_memory() -> (Arc<SimStorage>, Handler, tempfile::TempDir) {
    let file = SimStorage::new(Start::new("handler", 3, 16, 4, 1 << 20).bytes());
    let disk = Arc::new(Disk::for_tests(Image::open(file.clone()).unwrap(), None));
    let attributes = Attributes::new(7, 8, SystemTime::UNIX_EPOCH, false, false);
    let scratch = tempfile::tempdir().unwrap();
    let directory =
        rustix::fs::open(scratch.path(), OFlags::PATH | OFlags::DIRECTORY, Mode::empty()).unwrap();
    (file, Handler::new(disk, attributes, directory), scratch)
}

/// P1: a write that returns while a flush waits for the disk is not covered by that flush, so the
/// close that follows must still flush.
#[test]
fn a_write_during_a_flush_leaves_something_to_flush() {
    let (file, handler, _scratch) = in_memory();
    handler.write(0, &[1; 65536], Durability::Later).unwrap();
    handler.flush().unwrap();
    handler.write(0, &[2; 512], Durability::Later).unwrap();
    let hold = file.hold(|operation| operation.action == Action::Sync);
    std::thread::scope(|scope| {
        let flush = scope.spawn(|| handler.flush());
        hold.wait_for(1);
        handler.write(512, &[3; 512], Durability::Later).unwrap();
        drop(hold);
        flush.join().unwrap().unwrap();
    });
    assert!(handler.needs_flush(), "the second write is covered by no flush");
    handler.flush().unwrap();
    assert!(!handler.needs_flush());
}
