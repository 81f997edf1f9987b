//! Overlay and raw base on a file system that shares blocks between files (XFS, btrfs): a stream
//! clones blocks instead of copying them, inside the sandbox. The tests see that from the space
//! that the stream did not use, and from the extents that the file system reports as shared.
//! Everything else is like after any stream: the same content, no error in `qemu-img check`, a base
//! that is unchanged and not needed. If blocks cannot be shared, the stream copies.

use std::fs;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::{Value, json};

use crate::support::mounts::{LoopMount, make_fs};
use crate::support::{Daemon, KIB, MIB, Mount, Pattern, Rng, Scratch, assert_same, qemu, run_ok};

/// Neither a multiple of the cluster size nor of the host's block size.
const SIZE: u64 = 24 * MIB + 5 * 512;
/// A multiple of the cluster size, so that nothing is written behind the last clone.
const WHOLE: u64 = 24 * MIB;
/// The smallest size of XFS.
const LOWER: u64 = 300 * MIB;

fn at(offset: u64) -> usize {
    usize::try_from(offset).expect("small")
}

/// A base, an overlay on a file system of its own, and the content that the guest must read.
struct Rig {
    // Fields are dropped in this order.
    lower: LoopMount,
    base: PathBuf,
    overlay: PathBuf,
    below: Vec<u8>,
    want: Vec<u8>,
    scratch: Scratch,
}

/// The file system of the base.
#[derive(Clone, Copy, PartialEq)]
enum Base {
    Beside,
    OnAnotherFileSystem,
}

impl Rig {
    fn new(fstype: &'static str, place: Base, options: &str, size: u64) -> Rig {
        let scratch = Scratch::new();
        make_fs(&scratch.join("lower.img"), fstype, LOWER);
        let dir = scratch.dir("lower");
        let lower = LoopMount::new(&scratch.join("lower.img"), fstype, &dir);
        let mut below = Pattern::new(90, 1).bytes(0, size);
        // A hole, and zeros that are data for the file system.
        below[at(3 * MIB)..at(5 * MIB + 700)].fill(0);
        let base =
            if place == Base::Beside { dir.join("base.raw") } else { scratch.join("base.raw") };
        let file = fs::File::create(&base).expect("base");
        file.set_len(size).expect("base");
        file.write_all_at(&below[..at(3 * MIB)], 0).expect("base");
        file.write_all_at(&below[at(4 * MIB)..], 4 * MIB).expect("base");
        let overlay = dir.join("overlay.qcow2");
        qemu::create(&overlay, None, options, Some((base.to_str().expect("UTF-8"), "raw")));
        Rig { lower, base, overlay, want: below.clone(), below, scratch }
    }

    fn mount(&self, name: &str) -> Daemon {
        Mount::named(&self.scratch, &self.overlay, name).args(&["--no-copy-on-read"]).qmp().start()
    }

    /// Writes random ranges like a guest, and records them.
    fn write(&mut self, disk: &Daemon, rng: &mut Rng, version: u32) {
        let file = disk.open();
        for _ in 0..12 {
            let range = rng.range(WHOLE - MIB, 200 * KIB);
            let data = Pattern::new(91, version).bytes(range.start, range.end - range.start);
            file.write_all_at(&data, range.start).expect("write");
            self.want[at(range.start)..at(range.end)].copy_from_slice(&data);
        }
        file.sync_all().expect("flush");
    }

    /// Returns the bytes in use on the overlay's file system, after a sync.
    fn used(&self) -> u64 {
        let dir = self.lower.dir();
        run_ok(Command::new("sync").arg("-f").arg(dir));
        let host = rustix::fs::statvfs(dir).expect("statvfs");
        (host.f_blocks - host.f_bfree) * host.f_frsize
    }

    /// Streams while a guest has written before and writes afterwards, and checks what holds for
    /// copies and for clones. Returns the space that the stream has used.
    fn stream(&mut self, what: &str) -> u64 {
        let mut rng = Rng::for_test(what);
        let disk = self.mount("stream");
        self.write(&disk, &mut rng, 1);
        let before = self.used();
        let completed = stream_to_the_end(&disk);
        assert_eq!(completed["data"].get("error"), None, "{completed}");
        let taken = self.used().saturating_sub(before);
        eprintln!("{what}: the stream took {} KiB", taken / KIB);
        assert_same("through the mount", &disk.read_all(), &self.want);
        disk.umount();
        qemu::assert_clean(&self.overlay);
        qemu::assert_independent(&self.overlay);
        assert_same("as QEMU reads it", &qemu::read_all(&self.overlay), &self.want);
        taken
    }

    /// Checks that later writes to shared blocks do not change the other file, and that the base
    /// can be removed.
    fn write_and_lose_the_base(mut self, what: &str) {
        let mut rng = Rng::for_test(&format!("{what}, later"));
        let disk = self.mount("later");
        self.write(&disk, &mut rng, 2);
        disk.umount();
        assert_same(
            "the base must never change",
            &fs::read(&self.base).expect("base"),
            &self.below,
        );
        let scribble = fs::File::options().write(true).open(&self.base).expect("base");
        scribble
            .write_all_at(&vec![0xEE; self.below.len()], 0)
            .and_then(|()| scribble.sync_all())
            .expect("base");
        fs::remove_file(&self.base).expect("base");
        qemu::assert_clean(&self.overlay);
        assert_same("without the base", &qemu::read_all(&self.overlay), &self.want);
    }
}

/// Streams to the end; returns the event of its completion.
fn stream_to_the_end(disk: &Daemon) -> Value {
    let mut client = disk.client();
    client.ok("block-stream", json!({"device": "drive0"}));
    client.wait_event("BLOCK_JOB_COMPLETED")
}

/// Returns the number of extents that another file shares (FIEMAP_EXTENT_SHARED).
fn shared_extents(file: &Path) -> usize {
    run_ok(Command::new("filefrag").arg("-v").arg(file))
        .lines()
        .filter(|line| line.contains("shared"))
        .count()
}

fn clones(fstype: &'static str, options: &str, size: u64) {
    let what = format!("clones on {fstype}, {options}");
    let mut rig = Rig::new(fstype, Base::Beside, options, size);
    let taken = rig.stream(&what);
    assert!(taken < size / 8, "{what}: {taken} bytes of space for what need not be copied");
    assert!(shared_extents(&rig.overlay) > 0, "{what}: the file system knows of no shared block");
    rig.write_and_lose_the_base(&what);
}

fn copies(fstype: &'static str, place: Base, options: &str) {
    let what = format!("copies on {fstype}, {options}");
    let mut rig = Rig::new(fstype, place, options, SIZE);
    let taken = rig.stream(&what);
    assert!(taken > SIZE / 2, "{what}: {taken} bytes are too few for a copy");
    rig.write_and_lose_the_base(&what);
}

/// Protects: on XFS a stream uses almost no space, with usual clusters and with the smallest that
/// can be shared.
#[test]
fn a_stream_clones_on_xfs() {
    requires!("/dev/fuse", "root", "qemu-img", "losetup", "mkfs.xfs", "fs:xfs", "filefrag");
    clones("xfs", "cluster_size=64k", WHOLE);
    clones("xfs", "cluster_size=4k", SIZE);
    clones("xfs", "cluster_size=64k,extended_l2=on", WHOLE);
}

/// Protects: the same on btrfs, and in an image of version 2, which has no zero clusters.
#[test]
fn a_stream_clones_on_btrfs() {
    requires!("/dev/fuse", "root", "qemu-img", "losetup", "mkfs.btrfs", "fs:btrfs", "filefrag");
    clones("btrfs", "cluster_size=64k", SIZE);
    clones("btrfs", "compat=0.10", WHOLE);
}

/// Protects: where blocks cannot be shared they are copied, without an error: a file system without
/// clones, two file systems, and clusters that are smaller than its blocks.
#[test]
fn a_stream_copies_where_nothing_can_be_shared() {
    requires!("/dev/fuse", "root", "qemu-img", "losetup", "mkfs.ext4", "mkfs.xfs", "fs:xfs");
    copies("ext4", Base::Beside, "cluster_size=64k");
    copies("xfs", Base::OnAnotherFileSystem, "cluster_size=64k");
    copies("xfs", Base::Beside, "cluster_size=512");
}

/// Protects P9: if a base shrinks during a stream that clones from it, the stream fails and reads
/// no zeros; nothing of the lost part is published, and the backing file stays.
#[test]
fn a_base_that_shrank_is_not_cloned() {
    requires!("/dev/fuse", "root", "qemu-img", "losetup", "mkfs.xfs", "fs:xfs");
    let rig = Rig::new("xfs", Base::Beside, "", SIZE);
    let disk = rig.mount("shrink");
    fs::File::options()
        .write(true)
        .open(&rig.base)
        .and_then(|file| file.set_len(6 * MIB + 4096))
        .expect("truncate");
    let completed = stream_to_the_end(&disk);
    assert_eq!(completed["data"]["error"], json!("Input/output error"), "{completed}");
    assert!(disk.log().contains("base.raw: was changed while it is in use"), "{}", disk.log());
    assert_eq!(completed["data"]["offset"], json!(0), "nothing of it is trusted");
    disk.umount();
    qemu::assert_clean(&rig.overlay);
    assert_eq!(
        qemu::info(&rig.overlay)["backing-filename"],
        json!(rig.base.to_str().expect("UTF-8"))
    );
    let held = qemu::local_ranges(&rig.overlay);
    assert_eq!(held, [], "nothing was published");
}

/// Protects P13, R12: when a stream reports its completion, the cloned data survives a loss of
/// power, although the base itself was never flushed.
#[test]
fn what_was_cloned_survives_a_loss_of_power() {
    requires!(
        "/dev/fuse",
        "root",
        "qemu-img",
        "losetup",
        "mkfs.xfs",
        "fs:xfs",
        "xfs_io",
        "filefrag"
    );
    let mut rig = Rig::new("xfs", Base::Beside, "", SIZE);
    // The directory entries of both files and the empty overlay are durable; the new content of the
    // base is not.
    rig.used();
    rig.want = Pattern::new(92, 1).bytes(0, SIZE);
    fs::write(&rig.base, &rig.want).expect("base");
    let disk = rig.mount("power");
    let completed = stream_to_the_end(&disk);
    assert_eq!(completed["data"].get("error"), None, "{completed}");
    run_ok(Command::new("xfs_io").args(["-x", "-c", "shutdown"]).arg(rig.lower.dir()));
    disk.kill9();
    let Rig { lower, overlay, want, scratch, .. } = rig;
    lower.umount().detach();
    let again = LoopMount::new(&scratch.join("lower.img"), "xfs", &scratch.join("lower"));
    assert!(shared_extents(&overlay) > 0, "it was copied");
    qemu::assert_not_corrupt(&overlay);
    qemu::assert_independent(&overlay);
    assert_same("after the loss of power", &qemu::read_all(&overlay), &want);
    again.umount().detach();
}
