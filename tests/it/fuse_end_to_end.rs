//! The mounted file as programs see it: every file operation, every way to mount and every way to
//! unmount.

use std::fs::{self, File, OpenOptions, Permissions};
use std::io::{Read, Seek, SeekFrom, Write};
use std::ops::Range;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, UNIX_EPOCH};

use rustix::fs::{FallocateFlags, FlockOperation, OFlags, fallocate, flock};
use rustix::io::Errno;
use rustix::process::{Pid, Signal, kill_process, test_kill_process};

use crate::support::guest::{PUNCH, ZERO};
use crate::support::{
    CLUSTER, CORDISK, Guest, KIB, MIB, Mount, Pattern, QmpClient, Rig, Scratch, assert_same, errno,
    mounts, poll, qemu, read_at, run_ok, run_within, wait_until, within,
};

const SIZE: u64 = 2 * MIB + 24 * KIB; // the last cluster is partial

fn open_flags(path: &Path, flags: OFlags) -> File {
    let flags = i32::try_from(flags.bits()).expect("open flags fit");
    OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(flags)
        .open(path)
        .expect("open the disk with flags")
}

/// Protects: the disk is one regular file of the virtual size, accessible to its owner only, and
/// the mount table names its type and its source.
#[test]
fn the_disk_is_one_regular_file() {
    requires!("/dev/fuse", "qemu-img");
    let rig = Rig::new(SIZE);
    let disk = rig.mount().start();
    let meta = fs::metadata(disk.path()).expect("stat");
    assert!(meta.is_file());
    assert_eq!(meta.len(), SIZE);
    assert_eq!(meta.mode() & 0o7777, 0o600);
    assert_eq!(meta.nlink(), 1);
    assert_eq!(meta.uid(), rustix::process::geteuid().as_raw());
    assert!(meta.blksize() >= 4096, "st_blksize {} makes cp and dd guess badly", meta.blksize());
    assert!(
        meta.blocks() * 512 < SIZE,
        "du shows what the overlay occupies, which is little as yet: {}",
        meta.blocks()
    );
    let entry = mounts::at(disk.path()).expect("mount table entry");
    assert_eq!(entry.fstype, "fuse.cordisk");
    assert_eq!(Path::new(&entry.source), rig.overlay);
    for option in ["rw", "nosuid", "nodev"] {
        assert!(
            entry.options.split(',').any(|word| word == option),
            "{option} in {}",
            entry.options
        );
    }
    assert!(!entry.super_options.contains("allow_other"), "{}", entry.super_options);
    assert!(
        rustix::fs::statfs(disk.path()).expect("statfs").f_blocks > 0,
        "statfs must not report a full disk"
    );
    let file = disk.open();
    let before = file.metadata().expect("stat").blocks();
    file.write_all_at(&Pattern::new(1, 2).bytes(0, MIB), 0).expect("write");
    file.sync_all().expect("fsync");
    wait_until("du shows the growth", || {
        fs::metadata(disk.path()).expect("stat").blocks() >= before + MIB / 512 / 2
    });
    assert_eq!(file.metadata().expect("stat").len(), SIZE);
    let mut want = rig.content.clone();
    Pattern::new(1, 2).fill(0, &mut want[..usize::try_from(MIB).expect("small")]);
    drop(file);
    disk.umount();
    rig.assert_overlay(&want);
}

/// Protects: a missing mountpoint is created and removed again; an existing one stays, with its
/// content.
#[test]
fn the_placeholder_comes_and_goes() {
    requires!("/dev/fuse", "qemu-img");
    let rig = Rig::new(MIB);
    let disk = rig.mount().start();
    let path = disk.path().to_owned();
    assert_eq!(fs::metadata(&path).expect("stat").len(), MIB);
    disk.umount();
    assert!(!path.exists(), "the placeholder was ours and has to go");

    fs::write(&path, b"").expect("a mountpoint of the user's own");
    fs::set_permissions(&path, Permissions::from_mode(0o640)).expect("chmod");
    let disk = rig.mount().start();
    assert_same("disk over an existing mountpoint", &disk.read_all(), &rig.content);
    disk.umount();
    let meta = fs::metadata(&path).expect("the user's file is still there");
    assert_eq!((meta.len(), meta.mode() & 0o777), (0, 0o640));
}

/// Protects: O_DIRECT works for reads and writes, and sees the writes of other openers.
#[test]
fn direct_io() {
    requires!("/dev/fuse", "qemu-img");
    let rig = Rig::new(SIZE);
    let disk = rig.mount().start();
    let mut guest = rig.guest(&disk);
    let direct = open_flags(disk.path(), OFlags::DIRECT);
    let len = 128 * 1024;
    let mut memory = vec![0u8; len + 4096];
    let start = memory.as_ptr().align_offset(4096);
    let buf = &mut memory[start..start + len];
    direct.read_exact_at(buf, 4096).expect("direct read");
    assert_same("direct read", buf, &guest.shadow[4096..4096 + len]);
    Pattern::new(2, 1).fill(512 * KIB, buf);
    direct.write_all_at(buf, 512 * KIB).expect("direct write");
    let at = usize::try_from(512 * KIB).expect("small");
    guest.shadow[at..at + len].copy_from_slice(buf);
    guest.write(1000..70_000);
    direct.read_exact_at(buf, 0).expect("direct read of what was written");
    assert_same("direct read after a write", buf, &guest.shadow[..len]);
    guest.check_all();
    let want = guest.shadow;
    drop((guest.file, direct));
    disk.umount();
    rig.assert_overlay(&want);
}

const MMAP: &str = r"
import mmap, os, sys
fd = os.open(sys.argv[1], os.O_RDWR)
size = os.fstat(fd).st_size
shared = mmap.mmap(fd, size, mmap.MAP_SHARED)
assert shared[:] == open(sys.argv[2], 'rb').read(), 'content through a shared mapping'
shared[70000:70011] = b'through map'
shared[size-3:size] = b'end'
shared.flush()
assert os.pread(fd, 11, 70000) == b'through map', 'read after msync'
private = mmap.mmap(fd, size, mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_WRITE)
assert private[70000:70011] == b'through map', 'private mapping'
private[0:7] = b'private'
assert os.pread(fd, 7, 0) != b'private', 'a private change must not reach the disk'
private.close(); shared.close(); os.close(fd)
";

/// Protects: the disk can be mapped, shared and private, although it uses direct I/O otherwise
/// (FUSE_DIRECT_IO_ALLOW_MMAP, Linux 6.6).
#[test]
fn memory_maps_shared_and_private() {
    requires!("/dev/fuse", "qemu-img", "python3");
    let release = fs::read_to_string("/proc/sys/kernel/osrelease").expect("kernel release");
    let numbers: Vec<u32> = release
        .split(|c: char| !c.is_ascii_digit())
        .filter_map(|text| text.parse().ok())
        .take(2)
        .collect();
    if numbers < vec![6, 6] {
        eprintln!("skipped: Linux {release} has no FUSE_DIRECT_IO_ALLOW_MMAP");
        return;
    }
    let rig = Rig::new(SIZE);
    let disk = rig.mount().start();
    run_ok(Command::new("python3").args(["-c", MMAP]).arg(disk.path()).arg(&rig.base));
    let mut want = rig.content.clone();
    want[70_000..70_011].copy_from_slice(b"through map");
    let end = want.len();
    want[end - 3..].copy_from_slice(b"end");
    assert_same("after the maps are gone", &disk.read_all(), &want);
    disk.umount();
    rig.assert_overlay(&want);
}

/// Protects: an opener never reads stale bytes after another opener's write, because the kernel
/// caches no data of the disk.
#[test]
fn two_openers_see_each_other_at_once() {
    requires!("/dev/fuse", "qemu-img");
    let rig = Rig::new(MIB);
    let disk = rig.mount().start();
    let (a, b) = (disk.open(), disk.open());
    for version in 1..200u32 {
        let offset = u64::from(version) * 4999 % (MIB - 8192);
        let data = Pattern::new(3, version).bytes(offset, 8000);
        let (writer, reader) = if version % 2 == 0 { (&a, &b) } else { (&b, &a) };
        writer.write_all_at(&data, offset).expect("write");
        assert_same("the other opener", &read_at(reader, offset, 8000), &data);
    }
    drop((a, b));
    disk.umount();
    qemu::assert_clean(&rig.overlay);
}

/// Protects: a read stops at the end of the disk; a read beyond the end returns 0 bytes and no
/// error (QEMU had an underflow there).
#[test]
fn reads_at_and_across_the_end() {
    requires!("/dev/fuse", "qemu-img");
    let rig = Rig::new(SIZE);
    let disk = rig.mount().start();
    let file = disk.open();
    let mut buf = vec![0xEE; 8192];
    for offset in [SIZE, SIZE + 1, SIZE + MIB, u64::from(u32::MAX) * 64] {
        assert_eq!(file.read_at(&mut buf, offset).expect("read past the end"), 0, "at {offset}");
    }
    for inside in [1, 511, 4096, 8191] {
        let n = file.read_at(&mut buf, SIZE - inside).expect("read across the end");
        assert_eq!(n as u64, inside);
        assert_same("the last bytes", &buf[..n], &rig.content[rig.content.len() - n..]);
    }
    drop(file);
    disk.umount();
}

/// Protects: a write never grows the disk and never reports bytes that it did not write: ENOSPC at
/// and after the end, a short write across it.
#[test]
fn writes_at_and_across_the_end() {
    requires!("/dev/fuse", "qemu-img");
    let rig = Rig::new(SIZE);
    let disk = rig.mount().start();
    let mut guest = rig.guest(&disk);
    let data = Pattern::new(4, 1).bytes(SIZE - 3000, 8192);
    for offset in [SIZE, SIZE + 1, SIZE + MIB] {
        assert_eq!(errno(guest.file.write_at(&data, offset)), Errno::NOSPC, "at {offset}");
    }
    let n = guest.file.write_at(&data, SIZE - 3000).expect("write across the end");
    assert_eq!(n, 3000, "exactly what fits");
    let at = guest.shadow.len() - 3000;
    guest.shadow[at..].copy_from_slice(&data[..3000]);
    let mut append = OpenOptions::new().append(true).open(disk.path()).expect("open to append");
    assert_eq!(errno(append.write(b"more")), Errno::NOSPC);
    assert_eq!(append.metadata().expect("stat").len(), SIZE);
    guest.check_all();
    let want = guest.shadow;
    drop((guest.file, append));
    disk.umount();
    rig.assert_overlay(&want);
}

/// Protects: a truncation never reports success without effect. `cp`, `tar` and `zstd -o` truncate
/// and then skip the holes of what they write, so old bytes would stay there. Each of them fails
/// and changes nothing; a program that writes every byte without truncating works.
#[test]
fn open_with_o_trunc_is_refused() {
    requires!("/dev/fuse", "qemu-img", "dd");
    let rig = Rig::new(SIZE);
    let disk = rig.mount().start();
    assert_eq!(errno(OpenOptions::new().write(true).truncate(true).open(disk.path())), Errno::PERM);
    // A sparse image: data, a hole, and data at the end.
    let sparse = rig.scratch.join("sparse");
    let image = File::create(&sparse).expect("sparse image");
    image.set_len(SIZE).expect("hole");
    image.write_all_at(&Pattern::new(5, 1).bytes(0, 100_000), 0).expect("start");
    image.write_all_at(&[7], SIZE - 1).expect("end");
    let new = fs::read(&sparse).expect("new content");
    let shell = |script: &str| {
        let status = Command::new("sh")
            .args(["-c", script])
            .arg(&sparse)
            .arg(disk.path())
            .stderr(Stdio::null())
            .status();
        status.expect("sh").success()
    };
    for script in [
        r#"cp "$0" "$1""#,
        r#"cp --sparse=always "$0" "$1""#,
        r#"cat "$0" > "$1""#,
        r#"dd if="$0" of="$1" bs=64K"#,
        r#"dd if="$0" of="$1" bs=64K conv=sparse"#,
        r#"tee "$1" < "$0" > /dev/null"#,
        r#"qemu-img convert -f raw -O raw "$0" "$1""#,
    ] {
        assert!(!shell(script), "{script}: it must fail");
        assert_same(script, &disk.read_all(), &rig.content);
    }
    assert!(!shell(r#"cat "$0" >> "$1""#), "there is no room behind the end");
    assert_same("after >>", &disk.read_all(), &rig.content);
    assert_eq!(
        disk.log().matches("tried to truncate the disk").count(),
        1,
        "said once\n{}",
        disk.log()
    );

    assert!(shell(r#"dd if="$0" of="$1" bs=64K conv=notrunc status=none"#));
    assert_same("after dd conv=notrunc", &disk.read_all(), &new);
    disk.open().write_all_at(&rig.content, 0).expect("the old content again");
    assert!(shell(r#"qemu-img convert -n -f raw -O raw "$0" "$1""#));
    assert_same("after qemu-img convert -n", &disk.read_all(), &new);
    disk.umount();
    rig.assert_overlay(&new);
}

/// Protects: the guest cannot change the size of the disk, and an attempt loses no data.
#[test]
fn truncate_is_refused() {
    requires!("/dev/fuse", "qemu-img");
    let rig = Rig::new(SIZE);
    let disk = rig.mount().start();
    let file = disk.open();
    // A size that no disk can have gives EINVAL, as in QEMU.
    for (size, want) in [
        (0, Errno::PERM),
        (1, Errno::INVAL),
        (SIZE - 512, Errno::PERM),
        (SIZE + 512, Errno::PERM),
        (SIZE * 2, Errno::PERM),
        (SIZE + 1, Errno::INVAL),
    ] {
        assert_eq!(errno(file.set_len(size)), want, "to {size}");
        assert_eq!(file.metadata().expect("stat").len(), SIZE);
    }
    file.set_len(SIZE).expect("to the size that it has");
    assert_same("after refused truncates", &disk.read_all(), &rig.content);
    drop(file);
    disk.umount();
    rig.assert_overlay(&rig.content);
}

/// Protects: each fallocate mode has its documented effect or is refused. Punching and zeroing work
/// at any byte, also across and past the end; every other mode is refused.
#[test]
fn fallocate_modes() {
    requires!("/dev/fuse", "qemu-img");
    let rig = Rig::new(SIZE);
    let disk = rig.mount().start();
    let mut guest = rig.guest(&disk);
    let refused = |flags: FallocateFlags, range: Range<u64>| {
        let result = fallocate(&guest.file, flags, range.start, range.end - range.start);
        assert_eq!(result, Err(Errno::OPNOTSUPP), "{flags:?} {range:?}");
    };
    refused(FallocateFlags::KEEP_SIZE, 0..CLUSTER);
    refused(FallocateFlags::COLLAPSE_RANGE, 0..CLUSTER);
    refused(FallocateFlags::INSERT_RANGE, 0..CLUSTER);
    refused(FallocateFlags::UNSHARE_RANGE, 0..CLUSTER);
    // Success would promise that space is reserved, which it is not.
    refused(FallocateFlags::empty(), 0..SIZE);
    guest.check_all();
    for flags in [FallocateFlags::empty(), FallocateFlags::ZERO_RANGE] {
        assert!(
            fallocate(&guest.file, flags, SIZE - 512, 1024).is_err(),
            "{flags:?} must not grow the disk"
        );
        assert_eq!(guest.file.metadata().expect("stat").len(), SIZE);
    }
    guest.zero(SIZE - 512..SIZE); // the refused call may have zeroed these bytes before
    guest.check_all();

    guest.punch(CLUSTER..2 * CLUSTER);
    guest.punch(3 * CLUSTER + 1..3 * CLUSTER + 2); // one byte
    guest.punch(4 * CLUSTER - 700..6 * CLUSTER + 300); // edges of clusters, whole ones between
    guest.zero(8 * CLUSTER..9 * CLUSTER);
    guest.zero(10 * CLUSTER + 5..12 * CLUSTER + 77);
    guest.write(14 * CLUSTER..16 * CLUSTER);
    guest.punch(14 * CLUSTER + 4096..15 * CLUSTER + 4096); // clusters of the overlay
    guest.check_all();
    // A zero range without KEEP_SIZE inside the disk does not grow it.
    fallocate(&guest.file, FallocateFlags::ZERO_RANGE, 20 * CLUSTER, 100)
        .expect("zero range inside the disk");
    let at = usize::try_from(20 * CLUSTER).expect("small");
    guest.shadow[at..at + 100].fill(0);

    for flags in [PUNCH, ZERO] {
        fallocate(&guest.file, flags, SIZE, CLUSTER)
            .unwrap_or_else(|error| panic!("{flags:?} wholly past the end: {error}"));
        fallocate(&guest.file, flags, SIZE + MIB, CLUSTER)
            .unwrap_or_else(|error| panic!("{flags:?} far past the end: {error}"));
    }
    fallocate(&guest.file, PUNCH, SIZE - 1000, MIB).expect("punch across the end");
    let at = guest.shadow.len() - 1000;
    guest.shadow[at..].fill(0);
    assert_eq!(guest.file.metadata().expect("stat").len(), SIZE);
    guest.check_all();
    let want = guest.shadow;
    drop(guest.file);
    disk.umount();
    rig.assert_overlay(&want);
    let disk = rig.mount().start();
    assert_same("zeros stay zeros after a restart", &disk.read_all(), &want);
    disk.umount();
}

/// Returns the runs of data that SEEK_DATA and SEEK_HOLE report.
fn data_runs(file: &File) -> Vec<Range<u64>> {
    let (mut runs, mut at) = (Vec::new(), 0);
    loop {
        let start = match rustix::fs::seek(file, rustix::fs::SeekFrom::Data(at)) {
            Ok(start) => start,
            Err(Errno::NXIO) => return runs,
            Err(error) => panic!("SEEK_DATA from {at}: {error}"),
        };
        let end = rustix::fs::seek(file, rustix::fs::SeekFrom::Hole(start)).expect("SEEK_HOLE");
        assert!(start >= at && end > start, "seek must move on: {at} {start} {end}");
        runs.push(start..end);
        at = end;
    }
}

/// Protects: SEEK_DATA and SEEK_HOLE report the block status of overlay and base together, so that
/// `cp --sparse` and `qemu-img convert` copy no hole and miss no data.
#[test]
fn seek_data_and_hole_see_the_whole_chain() {
    requires!("/dev/fuse", "qemu-img", "fallocate", "cp");
    let scratch = Scratch::new();
    let clusters = |range: Range<u64>| range.start * CLUSTER..range.end * CLUSTER;
    let mut content = vec![0; usize::try_from(32 * CLUSTER).expect("small")];
    for run in [0..4, 8..12, 20..31] {
        let run = clusters(run);
        let slice = &mut content
            [usize::try_from(run.start).expect("small")..usize::try_from(run.end).expect("small")];
        Pattern::new(6, 1).fill(run.start, slice);
    }
    let base = scratch.write("base.raw", &content);
    run_ok(Command::new("fallocate").arg("--dig-holes").arg(&base));
    if data_runs(&File::open(&base).expect("base")).len() != 3 {
        eprintln!("skipped: the file system of the scratch directory does not tell its holes");
        return;
    }
    let overlay = scratch.join("overlay.qcow2");
    qemu::create(&overlay, None, "", Some(("base.raw", "raw")));
    let disk = Mount::new(&scratch, &overlay).start();
    let file = disk.open();
    assert_eq!(
        data_runs(&file),
        [clusters(0..4), clusters(8..12), clusters(20..31)],
        "nothing but the base"
    );
    let mut guest = Guest::new(file, content, 7);
    guest.write(6 * CLUSTER + 10..6 * CLUSTER + 20); // data in a hole of the base
    guest.punch(clusters(9..10)); // a hole in its data
    guest.check_all(); // copy-on-read of all other clusters changes nothing
    let want_runs =
        [clusters(0..4), clusters(6..7), clusters(8..9), clusters(10..12), clusters(20..31)];
    assert_eq!(data_runs(&guest.file), want_runs, "overlay and base");
    let end = clusters(0..32).end;
    assert_eq!(rustix::fs::seek(&guest.file, rustix::fs::SeekFrom::Data(end)), Err(Errno::NXIO));
    assert_eq!(rustix::fs::seek(&guest.file, rustix::fs::SeekFrom::Hole(end)), Err(Errno::NXIO));
    assert_eq!(
        rustix::fs::seek(&guest.file, rustix::fs::SeekFrom::Data(end + 12345)),
        Err(Errno::NXIO)
    );
    assert_eq!(
        rustix::fs::seek(&guest.file, rustix::fs::SeekFrom::Data(31 * CLUSTER)),
        Err(Errno::NXIO),
        "only a hole up to the end"
    );
    assert_eq!(
        rustix::fs::seek(&guest.file, rustix::fs::SeekFrom::Data(1234)),
        Ok(1234),
        "inside data"
    );
    assert_eq!(
        rustix::fs::seek(&guest.file, rustix::fs::SeekFrom::Hole(5 * CLUSTER + 7)),
        Ok(5 * CLUSTER + 7),
        "inside a hole"
    );
    assert_eq!(guest.file.seek(SeekFrom::End(0)).expect("seek"), end);

    let copy = scratch.join("copy");
    run_ok(Command::new("cp").arg("--sparse=auto").arg(disk.path()).arg(&copy));
    assert_same("cp --sparse=auto", &fs::read(&copy).expect("copy"), &guest.shadow);
    assert!(fs::metadata(&copy).expect("stat").blocks() * 512 < end, "the copy has holes");
    let want = guest.shadow;
    drop(guest.file);
    disk.umount();
    qemu::assert_clean(&overlay);
    assert_same("overlay", &qemu::read_all(&overlay), &want);
}

/// Protects: touch, cp -p and rsync do not fail. Times are kept in memory; a write updates the
/// modification time, a read does not.
#[test]
fn times_are_kept() {
    requires!("/dev/fuse", "qemu-img", "touch");
    let rig = Rig::new(MIB);
    let disk = rig.mount().start();
    run_ok(Command::new("touch").args(["-d", "@1000000000"]).arg(disk.path()));
    let then = UNIX_EPOCH + Duration::from_secs(1_000_000_000);
    let modified = || fs::metadata(disk.path()).expect("stat").modified().expect("mtime");
    assert_eq!(modified(), then);
    disk.read_all();
    assert_eq!(modified(), then, "a read is no change");
    disk.open().write_all_at(b"x", 0).expect("write");
    wait_until("a write moves the modification time", || modified() > then);
    run_ok(Command::new("touch").arg(disk.path()));
    assert_eq!(fs::metadata(disk.path()).expect("stat").len(), MIB);
    disk.umount();
}

/// Protects: chmod and chown cannot open the disk to other users while only the owner may access
/// the mount; the owner's own bits may change.
#[test]
fn chmod_and_chown_rules() {
    requires!("/dev/fuse", "qemu-img");
    let rig = Rig::new(MIB);
    let disk = rig.mount().start();
    let chmod = |mode| fs::set_permissions(disk.path(), Permissions::from_mode(mode));
    let mode = || fs::metadata(disk.path()).expect("stat").mode() & 0o7777;
    for wide in [0o640, 0o604, 0o666, 0o610] {
        assert_eq!(errno(chmod(wide)), Errno::PERM, "{wide:o}");
        assert_eq!(mode(), 0o600);
    }
    chmod(0o400).expect("the owner may restrict");
    assert_eq!(mode(), 0o400);
    chmod(0o600).expect("and come back");
    assert_eq!(mode(), 0o600);
    assert!(
        std::os::unix::fs::chown(disk.path(), Some(65534), None).is_err(),
        "the disk cannot be given away"
    );
    assert_eq!(fs::metadata(disk.path()).expect("stat").uid(), rustix::process::geteuid().as_raw());
    assert_same("content", &disk.read_all(), &rig.content);
    disk.umount();
}

/// Protects: programs can lock the disk against each other.
#[test]
fn flock_between_openers() {
    requires!("/dev/fuse", "qemu-img");
    let rig = Rig::new(MIB);
    let disk = rig.mount().start();
    let (a, b) = (disk.open(), disk.open());
    flock(&a, FlockOperation::NonBlockingLockExclusive).expect("first lock");
    assert_eq!(flock(&b, FlockOperation::NonBlockingLockExclusive), Err(Errno::WOULDBLOCK));
    flock(&a, FlockOperation::Unlock).expect("unlock");
    flock(&b, FlockOperation::NonBlockingLockExclusive).expect("second lock");
    drop((a, b));
    disk.umount();
}

/// Protects: fsync, fdatasync, close and synchronous writes always return success, also the second
/// time (after one ENOSYS the kernel would never ask again). `kill_restart` proves that they make
/// data durable.
#[test]
fn every_way_to_sync_succeeds() {
    requires!("/dev/fuse", "qemu-img");
    let rig = Rig::new(MIB);
    let disk = rig.mount().start();
    let mut want = rig.content.clone();
    for round in 0..3u32 {
        for (index, flags) in [OFlags::empty(), OFlags::DSYNC, OFlags::SYNC].into_iter().enumerate()
        {
            let file = open_flags(disk.path(), flags);
            let offset = (u64::from(round) * 3 + index as u64) * 100_003;
            let data = Pattern::new(8, round).bytes(offset, 5000);
            file.write_all_at(&data, offset).expect("write");
            let at = usize::try_from(offset).expect("small");
            want[at..at + data.len()].copy_from_slice(&data);
            file.sync_data().expect("fdatasync");
            file.sync_all().expect("fsync");
            file.sync_all().expect("fsync of what is clean");
            rustix::io::dup(&file).map(drop).expect("close of a duplicate flushes too");
        }
    }
    assert_same("content", &disk.read_all(), &want);
    disk.umount();
    rig.assert_overlay(&want);
}

/// Protects: `--read-only` changes nothing: EROFS for writers, and the overlay keeps every byte,
/// even when it is read.
#[test]
fn a_read_only_mount_changes_nothing() {
    requires!("/dev/fuse", "qemu-img");
    let rig = Rig::new(SIZE);
    let before = fs::read(&rig.overlay).expect("overlay");
    let disk = rig.mount().args(&["--read-only"]).start();
    assert_eq!(fs::metadata(disk.path()).expect("stat").mode() & 0o7777, 0o400);
    assert!(mounts::at(disk.path()).expect("entry").options.split(',').any(|word| word == "ro"));
    assert_eq!(errno(OpenOptions::new().write(true).open(disk.path())), Errno::ROFS);
    assert_eq!(errno(fs::set_permissions(disk.path(), Permissions::from_mode(0o600))), Errno::ROFS);
    assert_same("read-only disk", &disk.read_all(), &rig.content);
    disk.umount();
    assert_same("the overlay file itself", &fs::read(&rig.overlay).expect("overlay"), &before);
    assert_same("the base", &fs::read(&rig.base).expect("base"), &rig.content);
}

/// Protects: without copy-on-read, a read copies nothing into the overlay; writes still work.
#[test]
fn without_copy_on_read_nothing_is_copied() {
    requires!("/dev/fuse", "qemu-img");
    let rig = Rig::new(SIZE);
    let disk = rig.mount().args(&["--no-copy-on-read"]).start();
    assert_same("disk", &disk.read_all(), &rig.content);
    disk.umount();
    assert_eq!(qemu::local_ranges(&rig.overlay), [], "the overlay must hold nothing");
    let disk = rig.mount().args(&["--no-copy-on-read"]).start();
    let mut guest = rig.guest(&disk);
    guest.write(CLUSTER + 5..CLUSTER + 6);
    guest.check_all();
    let want = guest.shadow;
    drop(guest.file);
    disk.umount();
    assert_eq!(
        qemu::local_ranges(&rig.overlay),
        [CLUSTER..2 * CLUSTER],
        "only the cluster that was written"
    );
    rig.assert_overlay(&want);
}

/// Protects: copy-on-read copies exactly the clusters that were read, each as a whole. Clusters
/// that are all zero become zero clusters and take no space. Afterwards these clusters do not need
/// the base.
#[test]
fn copy_on_read_copies_exactly_what_was_read() {
    requires!("/dev/fuse", "qemu-img");
    let mut content = Pattern::new(9, 1).bytes(0, SIZE);
    let zero =
        usize::try_from(8 * CLUSTER).expect("small")..usize::try_from(10 * CLUSTER).expect("small");
    content[zero].fill(0);
    let rig = Rig::with(content, "");
    let disk = rig.mount().start();
    let file = disk.open();
    let check = |offset: u64, len: usize| {
        let at = usize::try_from(offset).expect("small");
        assert_same("cold read", &read_at(&file, offset, len), &rig.content[at..at + len]);
        assert_same("warm read", &read_at(&file, offset, len), &rig.content[at..at + len]);
    };
    check(3 * CLUSTER + 5, 1);
    check(6 * CLUSTER - 1, 2);
    check(8 * CLUSTER + 100, 100);
    check(SIZE - 1, 1);
    drop(file);
    disk.umount();
    let last = SIZE / CLUSTER * CLUSTER;
    assert_eq!(
        qemu::local_ranges(&rig.overlay),
        [3 * CLUSTER..4 * CLUSTER, 5 * CLUSTER..7 * CLUSTER, 8 * CLUSTER..9 * CLUSTER, last..SIZE]
    );
    let runs = qemu::map(&rig.overlay);
    let run =
        runs.iter().find(|run| run.range.start == 8 * CLUSTER).expect("run of the zero cluster");
    assert!(run.zero && !run.data, "a copy of zeros takes no space: {run:?}");
    rig.assert_overlay(&rig.content);
    // The copies do not depend on the base: above another base they still have the bytes of the
    // first one.
    fs::write(&rig.base, vec![0x55; rig.content.len()]).expect("another base");
    let at =
        usize::try_from(5 * CLUSTER).expect("small")..usize::try_from(7 * CLUSTER).expect("small");
    assert_same("copied clusters", &qemu::read_all(&rig.overlay)[at.clone()], &rig.content[at]);
}

/// Protects: `fusermount3 -u` ends the daemon cleanly, like umount(8).
#[test]
fn fusermount_ends_it_cleanly() {
    requires!("/dev/fuse", "qemu-img", "fusermount3");
    let rig = Rig::new(MIB);
    let mut disk = rig.mount().qmp().start();
    let mut guest = rig.guest(&disk);
    guest.write(12_345..300_000);
    let (path, want) = (disk.path().to_owned(), guest.shadow);
    drop(guest.file);
    let done = poll(Duration::from_secs(10), || {
        let done =
            run_within(Command::new("fusermount3").arg("-u").arg(&path), Duration::from_secs(30));
        (!done.stderr.contains("busy")).then_some(done)
    });
    assert!(done.as_ref().is_some_and(|done| done.status.success()), "{done:?}");
    disk.assert_clean_end();
    assert!(!path.exists(), "placeholder");
    rig.assert_overlay(&want);
}

/// Protects: SIGTERM to an idle disk is a clean end: everything is flushed, nothing is mounted, the
/// exit status is 0 (P15).
#[test]
fn sigterm_when_idle_is_a_clean_end() {
    requires!("/dev/fuse", "qemu-img");
    for signal in [Signal::TERM, Signal::INT] {
        let rig = Rig::new(MIB);
        let mut disk = rig.mount().qmp().start();
        let mut guest = rig.guest(&disk);
        guest.write(12_345..300_000);
        let (path, want) = (disk.path().to_owned(), guest.shadow);
        drop(guest.file);
        disk.signal(signal);
        disk.assert_clean_end();
        assert!(!path.exists(), "placeholder");
        rig.assert_overlay(&want);
    }
}

/// Protects: a mount namespace that was created while the disk was mounted has its own copy of the
/// mount, and keeps the daemon running after SIGTERM. The log says so, and the daemon ends with
/// that namespace.
#[test]
fn a_namespace_that_keeps_the_disk_is_named() {
    requires!("/dev/fuse", "qemu-img", "root", "unshare");
    let rig = Rig::new(MIB);
    let mut disk = rig.mount().start();
    let mut holder = Command::new("unshare")
        .args(["--mount", "--propagation", "private", "sh", "-c", "echo held; cat > /dev/null"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .expect("unshare");
    let mut word = [0; 5];
    holder.stdout.as_mut().expect("stdout").read_exact(&mut word).expect("a word");
    disk.signal(Signal::TERM);
    wait_until("the log names the reason", || disk.log().contains("another mount namespace"));
    assert!(mounts::at(disk.path()).is_none(), "here it is unmounted");
    drop(holder.stdin.take());
    assert!(holder.wait().expect("unshare").success());
    disk.assert_clean_end();
}

/// Protects: SIGTERM while a program has the disk open does not interrupt it (P15): the daemon
/// keeps serving, and ends when the last opener has closed the disk.
#[test]
fn sigterm_when_busy_goes_on_serving() {
    requires!("/dev/fuse", "qemu-img");
    let rig = Rig::new(SIZE);
    let mut disk = rig.mount().start();
    let mut guest = rig.guest(&disk);
    guest.write(1000..2000);
    disk.signal(Signal::TERM);
    std::thread::sleep(Duration::from_millis(700));
    assert!(
        disk.ended_within(Duration::ZERO).is_none(),
        "it must not end while the disk is open\n{}",
        disk.log()
    );
    guest.check_all();
    guest.write(CLUSTER * 5 + 1..CLUSTER * 9);
    guest.file.sync_all().expect("fsync after SIGTERM");
    guest.check_all();
    let (path, want) = (disk.path().to_owned(), guest.shadow);
    drop(guest.file);
    // The daemon may notice by itself that the disk is free, or wait for the unmount; both are a
    // clean end.
    if disk.ended_within(Duration::from_secs(5)).is_none() {
        mounts::umount(&path);
    }
    disk.assert_clean_end();
    rig.assert_overlay(&want);
}

/// A daemon in the background. It is not a child of the test, so the test watches its process id.
struct Background {
    mountpoint: PathBuf,
    pid: Option<Pid>,
}

impl Drop for Background {
    fn drop(&mut self) {
        if mounts::at(&self.mountpoint).is_some() {
            mounts::detach(&self.mountpoint);
        }
        if let Some(pid) = self.pid {
            let _ = kill_process(pid, Signal::KILL);
        }
    }
}

/// Protects: without -f the command returns 0 exactly when disk and socket are usable. It closes
/// its caller's terminal and pipes, writes the process id, and the daemon ends with the unmount.
#[test]
fn background_mode_returns_when_it_is_mounted() {
    requires!("/dev/fuse", "qemu-img");
    let rig = Rig::new(MIB);
    let (disk, socket, pidfile) =
        (rig.scratch.join("disk"), rig.scratch.join("qmp.sock"), rig.scratch.join("pid"));
    let mut background = Background { mountpoint: disk.clone(), pid: None };
    // The caller has one more descriptor open. A daemon that kept it would hold pipes open and
    // locks taken during its whole life.
    let mut command = Command::new("sh");
    command.args(["-c", "exec 3>&1; exec \"$@\"", "sh", CORDISK]);
    // Without `--log`, the command prints a note on a machine that has no system log; the test
    // expects no output.
    command
        .args(["mount", "--log", "log"])
        .arg("--qmp")
        .arg(&socket)
        .arg("--pidfile")
        .arg(&pidfile)
        .arg("overlay.qcow2")
        .arg("disk");
    command.current_dir(rig.scratch.path()).env_remove("RUST_LOG");
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    // output() reads the pipes to their end: a daemon that kept them open would hang every
    // `x=$(cordisk mount ...)`.
    let output = within(Duration::from_secs(30), move || command.output().expect("run"));
    background.pid = fs::read_to_string(&pidfile)
        .ok()
        .and_then(|text| text.trim().parse().ok())
        .and_then(Pid::from_raw);
    let output = output.expect("the command must return and close its pipes");
    assert!(output.status.success(), "{output:?}");
    assert_eq!(
        (output.stdout.as_slice(), output.stderr.as_slice()),
        (&b""[..], &b""[..]),
        "nothing to say when all is well"
    );
    assert!(
        mounts::at(&disk).is_some_and(|entry| entry.fstype == "fuse.cordisk"),
        "mounted when it returns"
    );
    let mut client = QmpClient::connect(&socket);
    assert_eq!(client.ok("query-block-jobs", serde_json::json!({})), serde_json::json!([]));
    let pid = background.pid.expect("the pidfile holds a process id");
    test_kill_process(pid).expect("and that process lives");
    let file = OpenOptions::new().read(true).write(true).open(&disk).expect("open");
    let mut guest = Guest::new(file, rig.content.clone(), 12);
    guest.check_all();
    guest.write(99_999..200_001);
    let want = guest.shadow;
    drop((guest.file, client));
    mounts::umount(&disk);
    wait_until("the daemon ends with the unmount", || test_kill_process(pid).is_err());
    background.pid = None;
    for gone in [&disk, &socket, &pidfile] {
        assert!(!gone.exists(), "{} must be gone", gone.display());
    }
    rig.assert_overlay(&want);
}

/// Runs a program as the user nobody.
fn as_nobody(program: &str, args: &[&Path]) -> bool {
    let mut command = Command::new("setpriv");
    command.args(["--reuid=65534", "--regid=65534", "--clear-groups", program]).args(args);
    run_within(&mut command, Duration::from_secs(30)).status.success()
}

/// Protects: only the owner can access the disk. Without --allow-other, other users cannot even
/// stat it; with that option, the mode bits decide.
#[test]
fn other_users_see_what_the_mode_allows_and_no_more() {
    requires!("/dev/fuse", "qemu-img", "root", "setpriv", "cmp");
    let rig = Rig::new(MIB);
    rig.scratch.open_to_all();
    fs::set_permissions(&rig.base, Permissions::from_mode(0o644)).expect("chmod");
    assert!(
        as_nobody("cat", &[&rig.base]),
        "the scratch directory must let others through, or this test proves nothing"
    );
    let disk = rig.mount().start();
    assert!(!as_nobody("cat", &[disk.path()]), "not without --allow-other");
    assert!(!as_nobody("stat", &[disk.path()]), "not even stat");
    disk.umount();

    let disk = rig.mount().args(&["--allow-other"]).start();
    let options = mounts::at(disk.path()).expect("entry").super_options;
    for option in ["allow_other", "default_permissions"] {
        assert!(options.split(',').any(|word| word == option), "{option} in {options}");
    }
    assert!(!as_nobody("cat", &[disk.path()]), "mode 0600 holds");
    fs::set_permissions(disk.path(), Permissions::from_mode(0o644))
        .expect("with --allow-other the owner may open it");
    assert!(as_nobody("cmp", &[disk.path(), &rig.base]), "mode 0644 lets others read");
    assert!(
        !as_nobody("sh", &[Path::new("-c"), Path::new("echo > \"$0\""), disk.path()]),
        "and not write"
    );
    fs::set_permissions(disk.path(), Permissions::from_mode(0o600)).expect("and close it");
    assert!(!as_nobody("cat", &[disk.path()]), "mode 0600 again");
    assert_same("content", &disk.read_all(), &rig.content);
    disk.umount();
    rig.assert_overlay(&rig.content);
}

/// Protects: requests of every size and alignment, from several threads at the same time, each to
/// its own part of the disk.
#[test]
fn many_threads_write_their_own_parts() {
    requires!("/dev/fuse", "qemu-img");
    let rig = Rig::new(8 * MIB);
    let disk = rig.mount().start();
    let mut want = rig.content.clone();
    std::thread::scope(|scope| {
        // The parts meet inside clusters, so that two threads make allocating writes to the same
        // cluster.
        let part = MIB + 1000;
        for (index, slice) in want.chunks_mut(usize::try_from(part).expect("small")).enumerate() {
            let file = disk.open();
            scope.spawn(move || {
                let (mut rng, base) =
                    (crate::support::Rng::new(index as u64 + 1), index as u64 * part);
                for version in 0..60u32 {
                    let range = rng.range(slice.len() as u64, 300 * KIB);
                    let data = Pattern::new(10, version)
                        .bytes(base + range.start, range.end - range.start);
                    file.write_all_at(&data, base + range.start).expect("write");
                    let at = usize::try_from(range.start).expect("small");
                    slice[at..at + data.len()].copy_from_slice(&data);
                }
                assert_same("own part", &read_at(&file, base, slice.len()), slice);
            });
        }
    });
    assert_same("all parts", &disk.read_all(), &want);
    disk.umount();
    rig.assert_overlay(&want);
}
