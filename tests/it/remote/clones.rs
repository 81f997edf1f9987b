//! Overlay and cache on one file system that shares blocks between files (XFS, btrfs): a stream
//! clones what was fetched from the file of the cache into the overlay, so that the host has it
//! once. Neither the disk's later writes nor the end of the cache's file reach the other side.

use std::os::unix::fs::FileExt;

use super::*;
use crate::support::mounts::{LoopMount, make_fs};

/// A multiple of the cluster size: the last clone ends with the file.
const SIZE: u64 = 24 * MIB;
/// A little more than the smallest size of XFS.
const LOWER: u64 = 320 * MIB;

/// Moves overlay and cache of `remote`, which is not created yet, to a new file system.
fn on(fstype: &str, remote: Remote) -> (Remote, LoopMount) {
    let image = remote.scratch.join("lower.img");
    make_fs(&image, fstype, LOWER);
    let lower = LoopMount::new(&image, fstype, &remote.scratch.dir("lower"));
    let cache = lower.dir().join("cache").display().to_string();
    let overlay = lower.dir().join("overlay.qcow2");
    let remote = Remote { overlay, options: vec!["--cache".into(), cache], ..remote };
    (remote, lower)
}

/// The bytes in use on a file system, after a sync.
fn used(lower: &LoopMount) -> u64 {
    run_ok(Command::new("sync").arg("-f").arg(lower.dir()));
    let host = rustix::fs::statvfs(lower.dir()).expect("statvfs");
    (host.f_blocks - host.f_bfree) * host.f_frsize
}

/// The bytes of a file that another file shares (FIEMAP_EXTENT_SHARED).
fn shared_bytes(file: &Path) -> u64 {
    let text = run_ok(Command::new("filefrag").args(["-v", "-b1"]).arg(file));
    // `0:  0.. 262143:  8192..  270335:  262144:  shared,eof`; a jump has one column more.
    let len = |line: &str| -> u64 {
        let column = line.split(':').nth(3).expect("a length");
        column.trim().parse().unwrap_or_else(|_| panic!("filefrag: {line}"))
    };
    text.lines().filter(|line| line.contains("shared")).map(len).sum()
}

/// The file of the cache with the bytes of the base.
fn data_of(lower: &LoopMount) -> PathBuf {
    let cache = fs::read_dir(lower.dir().join("cache")).expect("cache");
    let mut data = cache
        .map(|entry| entry.expect("entry").path())
        .filter(|path| path.extension().is_some_and(|extension| extension == "data"));
    let found = data.next().expect("a file of the cache");
    assert_eq!(data.next(), None, "one base, one file");
    found
}

fn clones(fstype: &'static str) {
    let test = format!("clones of a remote base on {fstype}");
    let mut rng = Rng::for_test(&test);
    let Some((server, remote)) = on_nginx(SIZE, "") else { return };
    let (remote, lower) = on(fstype, remote);
    let before = used(&lower);

    // A disk that is only streamed.
    let remote = remote.create();
    let disk = remote.mount().start();
    remote.stream(&disk);
    let after = used(&lower);
    let taken = after - before;
    let shared = shared_bytes(&remote.overlay);
    eprintln!("{test}: {} KiB are used, {} KiB are shared", taken / KIB, shared / KIB);
    assert!(taken >= SIZE * 3 / 4, "{taken} bytes are too few for the base: where is it?");
    assert!(taken < SIZE * 5 / 4, "{taken} bytes for a base of {SIZE}: it is there twice");
    assert!(shared >= SIZE * 3 / 4, "the file system knows of {shared} shared bytes only");
    remote.guest(&disk).check_all();
    disk.umount();
    remote.assert_standalone(&remote.content);

    // A disk whose guest writes before, during and after the stream, above the cache that is full
    // now: it needs space for what the guest writes.
    let second = lower.dir().join("second.qcow2");
    remote.create_at(&second);
    let disk = remote.mount_as(&second, "second").start();
    let mut guest = remote.guest(&disk);
    let mut writes = |guest: &mut Guest, count: u64| {
        for _ in 0..count {
            let range = rng.range(SIZE, 100 * KIB);
            match rng.below(4) {
                0 => guest.zero(range),
                _ => guest.write(range),
            }
        }
        guest.file.sync_all().expect("flush");
    };
    writes(&mut guest, 10);
    remote.stream(&disk);
    let taken = used(&lower) - after;
    eprintln!("{test}: the second disk uses {} KiB", taken / KIB);
    assert!(taken < SIZE / 2, "{taken} bytes for a disk whose base is in the cache");
    guest.check_all();
    let data = data_of(&lower);
    assert_same("the file of the cache", &fs::read(&data).expect("data"), &remote.content);
    writes(&mut guest, 20);
    guest.punch(5 * MIB..7 * MIB);
    guest.write(20 * MIB..22 * MIB + 100);
    guest.file.sync_all().expect("flush");
    guest.check_all();
    assert_same("the file of the cache, later", &fs::read(&data).expect("data"), &remote.content);
    let shadow = guest.shadow;
    drop(guest.file);
    disk.umount();

    // Without the server, and with other bytes where those of the cache were.
    drop(server);
    let scribble = File::options().write(true).open(&data).expect("data");
    scribble.write_all_at(&vec![0xEE; remote.content.len()], 0).expect("data");
    scribble.sync_all().expect("data");
    remote.assert_standalone(&remote.content);
    let second = Remote { overlay: second, ..remote };
    second.assert_standalone(&shadow);
}

/// Protects: with overlay and cache on one XFS, a streamed base needs its space once; no write of a
/// guest reaches the file of the cache, which other disks read.
#[test]
fn a_stream_clones_from_the_cache_on_xfs() {
    requires!("/dev/fuse", "root", "qemu-img", "losetup", "mkfs.xfs", "fs:xfs", "filefrag");
    requires!("nginx", "openssl");
    clones("xfs");
}

/// Protects: the same on btrfs.
#[test]
fn a_stream_clones_from_the_cache_on_btrfs() {
    requires!("/dev/fuse", "root", "qemu-img", "losetup", "mkfs.btrfs", "fs:btrfs", "filefrag");
    requires!("nginx", "openssl");
    clones("btrfs");
}
