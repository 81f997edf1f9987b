//! The overlay's file system is full, at every stage (P5): a request that needs space fails alone,
//! with the right error. No existing data is lost, and when there is space again, everything
//! continues without a new mount. Copy-on-read by itself never fills the file system.

use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use rustix::fs::{FallocateFlags, fallocate, statvfs};
use rustix::io::Errno;
use serde_json::json;

use crate::support::mounts::{LoopMount, MountGuard, make_fs};
use crate::support::{
    CLUSTER, Daemon, KIB, MIB, Mount, Pattern, Scratch, assert_same, qemu, read_at, wait_until,
};

const SIZE: u64 = 16 * MIB;

fn at(offset: u64) -> usize {
    usize::try_from(offset).expect("small")
}

/// A mounted file system that is small enough to be filled.
enum SmallFs {
    Loop(LoopMount),
    Tmpfs(MountGuard),
}

impl SmallFs {
    fn umount(self) {
        match self {
            SmallFs::Loop(mount) => mount.umount().detach(),
            SmallFs::Tmpfs(mount) => mount.umount(),
        }
    }
}

/// A base on another file system, an overlay on the small one, and the content that the guest must
/// read.
struct Rig {
    // Fields are dropped in this order.
    fs: SmallFs,
    dir: PathBuf,
    base: PathBuf,
    overlay: PathBuf,
    want: Vec<u8>,
    mounts: u32,
    scratch: Scratch,
}

impl Rig {
    fn new(fstype: &str, fs_size: u64, size: u64, options: &str) -> Rig {
        let scratch = Scratch::new();
        let dir = scratch.dir("small");
        let fs = if fstype == "tmpfs" {
            SmallFs::Tmpfs(MountGuard::tmpfs(&dir, fs_size))
        } else {
            make_fs(&scratch.join("small.img"), fstype, fs_size);
            SmallFs::Loop(LoopMount::new(&scratch.join("small.img"), fstype, &dir))
        };
        let want = Pattern::new(80, 1).bytes(0, size);
        let base = scratch.write("base.raw", &want);
        let overlay = dir.join("overlay.qcow2");
        qemu::create(&overlay, None, options, Some((base.to_str().expect("UTF-8"), "raw")));
        Rig { fs, dir, base, overlay, want, mounts: 0, scratch }
    }

    /// Mounts under a new name, so that each mount has its own log.
    fn mount(&mut self, args: &[&str]) -> Daemon {
        self.mounts += 1;
        Mount::named(&self.scratch, &self.overlay, &format!("mount{}", self.mounts))
            .args(args)
            .qmp()
            .start()
    }

    /// Fills the file system except for `leave` bytes.
    fn fill(&self, leave: u64) {
        let ballast = OpenOptions::new()
            .create(true)
            .append(true)
            .open(self.dir.join("ballast"))
            .expect("ballast");
        let mut end = ballast.metadata().expect("stat").len();
        let mut step = free(&self.dir);
        while step >= 4 * KIB {
            step = step.min(free(&self.dir).saturating_sub(leave));
            match fallocate(&ballast, FallocateFlags::empty(), end, step.max(1)) {
                Ok(()) if step > 0 => end += step,
                Ok(()) => break,
                Err(Errno::NOSPC) => step /= 2,
                Err(error) => panic!("ballast: {error}"),
            }
        }
        ballast.sync_all().expect("ballast");
    }

    fn make_room(&self) {
        fs::remove_file(self.dir.join("ballast")).expect("ballast");
        // Space of a removed file may become free a little later (XFS).
        wait_until("there is room again", || free(&self.dir) > 2 * SIZE);
    }

    fn check(&self, what: &str, disk: &Daemon) {
        assert_same(what, &disk.read_all(), &self.want);
    }

    /// Writes one cluster of this version. A write that finds no space returns ENOSPC and keeps the
    /// old content.
    fn write(&mut self, file: &File, offset: u64, version: u32) -> bool {
        let data = Pattern::new(81, version).bytes(offset, CLUSTER);
        let place = at(offset)..at(offset + CLUSTER);
        let written = match file.write_all_at(&data, offset) {
            Ok(()) => {
                self.want[place.clone()].copy_from_slice(&data);
                true
            }
            Err(error) => {
                assert_eq!(
                    error.raw_os_error(),
                    Some(Errno::NOSPC.raw_os_error()),
                    "write at {offset}"
                );
                false
            }
        };
        assert_same(
            "directly after the write",
            &read_at(file, offset, data.len()),
            &self.want[place],
        );
        written
    }

    fn finish(self) {
        assert_same(
            "the base must never change",
            &fs::read(&self.base).expect("base"),
            &Pattern::new(80, 1).bytes(0, self.want.len() as u64),
        );
        fs::remove_file(&self.base).expect("base");
        qemu::assert_clean(&self.overlay);
        qemu::assert_independent(&self.overlay);
        assert_same("the overlay alone", &qemu::read_all(&self.overlay), &self.want);
        self.fs.umount();
    }
}

/// Returns the free space as df shows it, in bytes.
fn free(dir: &Path) -> u64 {
    let host = statvfs(dir).expect("statvfs");
    host.f_bavail * host.f_frsize
}

fn assert_flush_is_honest(file: &File) {
    if let Err(error) = file.sync_all() {
        assert_eq!(error.raw_os_error(), Some(Errno::NOSPC.raw_os_error()), "fsync on a full host");
    }
}

fn full_at_every_stage(fstype: &str, fs_size: u64) {
    let mut rig = Rig::new(fstype, fs_size, SIZE, "");

    eprintln!("{fstype}: full before the first write");
    rig.fill(0);
    let disk = rig.mount(&["--reserve", "0"]);
    let file = disk.open();
    rig.check("nothing could be copied up", &disk);
    assert!(disk.log().contains("copy-on-read failed"), "it was never full\n{}", disk.log());
    assert!(!rig.write(&file, 0, 1), "there is no room");
    assert!(!rig.write(&file, SIZE - CLUSTER, 1), "there is no room");
    assert_flush_is_honest(&file);
    rig.check("after writes that failed", &disk);
    rig.make_room();
    assert!(rig.write(&file, 0, 2), "there is room");
    file.sync_all().expect("and a flush succeeds");
    drop(file);
    disk.umount();
    qemu::assert_clean(&rig.overlay);

    eprintln!("{fstype}: full during copy-on-read");
    rig.fill(2 * MIB);
    let disk = rig.mount(&["--reserve", "0"]);
    let file = disk.open();
    for offset in (0..SIZE).step_by(at(CLUSTER)) {
        let place = at(offset)..at(offset + CLUSTER);
        assert_same("a cold read", &read_at(&file, offset, place.len()), &rig.want[place]);
    }
    assert!(disk.log().contains("copy-on-read failed"), "it was never full\n{}", disk.log());
    rig.check("and again", &disk);
    assert_flush_is_honest(&file);
    rig.make_room();
    assert!(rig.write(&file, SIZE - CLUSTER, 3), "there is room");
    file.sync_all().expect("and a flush succeeds");
    drop(file);
    disk.umount();
    qemu::assert_clean(&rig.overlay);

    eprintln!("{fstype}: full during guest writes");
    rig.fill(2 * MIB);
    let disk = rig.mount(&["--reserve", "0"]);
    let file = disk.open();
    let places: Vec<u64> = (SIZE / 2..SIZE - CLUSTER).step_by(at(CLUSTER)).collect();
    let (stored, refused): (Vec<u64>, Vec<u64>) =
        places.iter().partition(|&&offset| rig.write(&file, offset, 4));
    assert!(
        !stored.is_empty() && !refused.is_empty(),
        "{} were stored, {} refused",
        stored.len(),
        refused.len()
    );
    assert!(rig.write(&file, stored[0], 5), "what it has already is overwritten in place");
    assert_flush_is_honest(&file);
    rig.check("after writes of which some failed", &disk);
    rig.make_room();
    assert!(refused.iter().all(|&offset| rig.write(&file, offset, 6)), "there is room");
    file.sync_all().expect("and a flush succeeds");
    // A kill keeps all of that without a clean end.
    disk.kill9();
    drop(file);
    qemu::assert_not_corrupt(&rig.overlay);
    assert_same("after a kill", &qemu::read_all(&rig.overlay), &rig.want);

    eprintln!("{fstype}: full during a stream");
    rig.fill(2 * MIB);
    let disk = rig.mount(&["--no-copy-on-read"]);
    let file = disk.open();
    let mut client = disk.client();
    client.ok("block-stream", json!({"device": "drive0", "on-error": "enospc"}));
    assert_eq!(client.wait_event("BLOCK_JOB_ERROR")["data"]["action"], "stop");
    client.wait_status("paused");
    rig.check("while the job waits for room", &disk);
    // Small pieces of space may be left; the job needs more for one of its steps.
    let cold: Vec<u64> = (CLUSTER..SIZE / 2).step_by(at(CLUSTER)).collect();
    assert!(cold.iter().any(|&offset| !rig.write(&file, offset, 7)), "the guest finds it full too");
    assert!(rig.write(&file, stored[0], 8), "in place");
    rig.check("the guest wrote while the job waits", &disk);
    rig.make_room();
    assert!(cold.iter().all(|&offset| rig.write(&file, offset, 9)), "there is room");
    client.ok("job-resume", json!({"id": "drive0"}));
    client.wait_completed();
    rig.check("after the stream", &disk);
    drop((file, client));
    disk.umount();
    rig.finish();
}

/// Protects: P5 on a full ext4.
#[test]
fn full_ext4_at_every_stage() {
    requires!("/dev/fuse", "root", "qemu-img", "losetup", "mkfs.ext4");
    full_at_every_stage("ext4", 64 * MIB);
}

/// Protects: P5 on a full XFS, which reserves space in advance and may fail later. (300 MiB is its
/// minimum size.)
#[test]
fn full_xfs_at_every_stage() {
    requires!("/dev/fuse", "root", "qemu-img", "losetup", "mkfs.xfs", "fs:xfs");
    full_at_every_stage("xfs", 300 * MIB);
}

/// Protects: P5 on a full tmpfs, which is full to the page.
#[test]
fn full_tmpfs_at_every_stage() {
    requires!("/dev/fuse", "root", "qemu-img");
    full_at_every_stage("tmpfs", 64 * MIB);
}

/// Protects: P5 for one write over several clusters of which only the first can be stored. The
/// write returns the error, each of its sectors is old or new, and no other byte changes. With
/// space the same write succeeds.
#[test]
fn a_write_that_runs_out_of_space_half_way() {
    requires!("/dev/fuse", "root", "qemu-img");
    let mut rig = Rig::new("tmpfs", 64 * MIB, SIZE, "");
    let disk = rig.mount(&["--no-copy-on-read"]);
    let file = disk.open();
    assert!(rig.write(&file, MIB, 1), "one cluster that is overwritten in place");
    file.sync_all().expect("its tables");
    rig.fill(0);
    let range = at(MIB + 512)..at(MIB + 5 * CLUSTER);
    let new = Pattern::new(82, 1).bytes(range.start as u64, range.len() as u64);
    let error = file
        .write_all_at(&new, range.start as u64)
        .expect_err("there is no room for the other clusters");
    assert_eq!(error.raw_os_error(), Some(Errno::NOSPC.raw_os_error()));
    let got = disk.read_all();
    let mut written = 0;
    for (sector, bytes) in got[range.clone()].chunks(512).enumerate() {
        let place = sector * 512..(sector + 1) * 512;
        let is_new = bytes == &new[place.clone()];
        assert!(
            is_new || bytes == &rig.want[range.clone()][place],
            "sector {sector} is neither old nor new"
        );
        written += usize::from(is_new);
    }
    assert!(
        (1..range.len() / 512).contains(&written),
        "{written} sectors were written: it did not run out half way"
    );
    assert_same("before it", &got[..range.start], &rig.want[..range.start]);
    assert_same("behind it", &got[range.end..], &rig.want[range.end..]);
    rig.make_room();
    file.write_all_at(&new, range.start as u64).expect("there is room");
    rig.want[range].copy_from_slice(&new);
    rig.check("after the same write with room", &disk);
    drop(file);
    disk.umount();
    qemu::assert_clean(&rig.overlay);
    assert_same("in the image", &qemu::read_all(&rig.overlay), &rig.want);
    rig.fs.umount();
}

/// Protects: P1 and P5 if the space ends between a write and its flush. There is no space for the
/// tables, the flush returns an error, and the unwritten tables stay in memory. The next flush with
/// space makes them durable, and a kill after that loses nothing.
#[test]
fn full_when_the_tables_are_flushed() {
    requires!("/dev/fuse", "root", "qemu-img", "losetup", "mkfs.ext4");
    for (fstype, fs_size) in [("ext4", 64 * MIB), ("tmpfs", 64 * MIB)] {
        // A table of 4 KiB clusters maps 2 MiB: every write here needs a new one.
        let mut rig = Rig::new(fstype, fs_size, SIZE, "cluster_size=4k");
        let disk = rig.mount(&["--reserve", "0"]);
        let file = disk.open();
        let mut refused = 0;
        for (version, offset) in (10..).zip((0..SIZE).step_by(at(2 * MIB))) {
            rig.fill(256 * KIB);
            assert!(rig.write(&file, offset, version), "there is room for a few clusters");
            rig.fill(0);
            refused += u32::from(
                file.sync_all()
                    .is_err_and(|error| error.raw_os_error() == Some(Errno::NOSPC.raw_os_error())),
            );
            rig.check("while the host is full", &disk);
            rig.make_room();
            file.sync_all().expect("a flush with room");
        }
        // The commit timer may have written some tables before the space ended, but not all of
        // them.
        eprintln!("{fstype}: {refused} flushes refused");
        assert!(refused > 0, "no flush ever met a full host");
        disk.kill9();
        drop(file);
        qemu::assert_not_corrupt(&rig.overlay);
        assert_same("after a kill", &qemu::read_all(&rig.overlay), &rig.want);
        let disk = rig.mount(&["--stream"]);
        disk.client(); // the daemon still responds
        wait_until("the stream has ended", || {
            disk.client().ok("query-block-jobs", json!({})) == json!([])
        });
        rig.check("after the stream", &disk);
        disk.umount();
        rig.finish();
    }
}

/// Protects: reads alone cannot fill the host (`--reserve`). Copy-on-read stops while the file
/// system has less free space than the reserve, which is 5 % of a small one, and reads still return
/// the right data. Writes and the stream use the rest; with enough space copying starts again.
#[test]
fn readers_leave_a_reserve() {
    requires!("/dev/fuse", "root", "qemu-img", "losetup", "mkfs.ext4");
    let size = 24 * MIB;
    let mut rig = Rig::new("ext4", 64 * MIB, size, "");
    let total = {
        let host = statvfs(&rig.dir).expect("statvfs");
        host.f_blocks * host.f_frsize
    };
    let reserve = total / 20;
    rig.fill(reserve + 6 * MIB);
    let disk = rig.mount(&[]);
    let file = disk.open();
    let before = free(&rig.dir);
    for offset in (0..size).step_by(at(CLUSTER)) {
        let place = at(offset)..at(offset + CLUSTER);
        assert_same("a cold read", &read_at(&file, offset, place.len()), &rig.want[place]);
    }
    let after = free(&rig.dir);
    eprintln!("free: {before} before, {after} after; {reserve} in reserve");
    assert!(before - after > 4 * MIB, "as long as there was room reads copied up");
    // The copy that reaches the reserve may end inside it, with its tables and the metadata of the
    // file system.
    assert!(after + 512 * KIB > reserve, "{after} bytes are left of a reserve of {reserve}");
    let log = disk.log();
    assert_eq!(log.matches("copy-on-read stops").count(), 1, "{log}");
    assert!(!log.contains("copy-on-read failed") && !log.contains("goes on"), "{log}");

    assert!(rig.write(&file, size - CLUSTER, 20), "a guest's write uses the reserve");
    let mut client = disk.client();
    client.ok("block-stream", json!({"device": "drive0", "on-error": "enospc"}));
    assert_eq!(client.wait_event("BLOCK_JOB_ERROR")["data"]["action"], "stop");
    assert!(free(&rig.dir) < reserve / 2, "so does the stream, until there is nothing");
    rig.check("on a full host", &disk);
    client.wait_status("paused");

    rig.make_room();
    let cold = size - 8 * CLUSTER;
    wait_until("copying goes on", || {
        assert_same("a cold read", &read_at(&file, cold, 512), &rig.want[at(cold)..at(cold) + 512]);
        disk.log().contains("copy-on-read goes on")
    });
    client.ok("job-cancel", json!({"id": "drive0"}));
    client.wait_event("BLOCK_JOB_CANCELLED");
    drop((file, client));
    disk.umount();
    let local = qemu::local_ranges(&rig.overlay);
    assert!(local.iter().any(|range| range.contains(&cold)), "{local:?}");

    // A reserve larger than the file system: nothing more is copied up.
    let disk = rig.mount(&["--reserve", "1T"]);
    rig.check("with a reserve of 1T", &disk);
    disk.umount();
    assert_eq!(qemu::local_ranges(&rig.overlay), local);
    // No reserve: everything is copied up.
    let disk = rig.mount(&["--reserve", "0"]);
    rig.check("without a reserve", &disk);
    disk.umount();
    assert_eq!(qemu::local_ranges(&rig.overlay), [0..size]);
    let disk = rig.mount(&["--stream"]);
    wait_until("the stream has ended", || {
        disk.client().ok("query-block-jobs", json!({})) == json!([])
    });
    disk.umount();
    rig.finish();
}

/// Protects: the policies of a stream treat a limit on the file size (RLIMIT_FSIZE, EFBIG) like
/// missing space: the stream waits.
#[test]
fn a_limit_on_the_file_size_pauses_a_stream() {
    use rustix::process::{Resource, Rlimit, prlimit};
    requires!("/dev/fuse", "qemu-img");
    let rig = crate::support::Rig::new(4 * MIB);
    let disk = rig.mount().qmp().start();
    let limit = |bytes| {
        prlimit(Some(disk.server_pid()), Resource::Fsize, Rlimit { current: bytes, maximum: None })
            .expect("prlimit")
    };
    limit(Some(fs::metadata(&rig.overlay).expect("overlay").len() + MIB));
    let mut client = disk.client();
    client.ok("block-stream", json!({"device": "drive0", "on-error": "enospc"}));
    assert_eq!(client.wait_event("BLOCK_JOB_ERROR")["data"]["action"], "stop");
    client.wait_status("paused");
    wait_until("the job rests", || client.job()["busy"] == json!(false));
    assert_eq!(client.job()["io-status"], "nospace");
    let file = disk.open();
    // A few clusters below the limit may be free.
    let mut want = rig.content.clone();
    let mut refused = 0;
    for offset in (rig.size() / 2..rig.size()).step_by(at(CLUSTER)) {
        match file.write_all_at(&[1; 512], offset) {
            Ok(()) => want[at(offset)..at(offset) + 512].fill(1),
            Err(error) => {
                assert_eq!(
                    error.raw_os_error(),
                    Some(Errno::FBIG.raw_os_error()),
                    "the guest learns what it is"
                );
                refused += 1;
            }
        }
    }
    assert!(refused > 0, "the limit was never met");
    assert_same("while the job waits", &disk.read_all(), &want);
    limit(None);
    client.ok("job-resume", json!({"id": "drive0"}));
    client.wait_completed();
    drop((file, client));
    disk.umount();
    rig.assert_standalone(&want);
}
