//! Blocks that are allocated ahead of new clusters on ext4: they are given back at the
//! end, they are few, and they change nothing that a reader sees.

use std::fs::{self, OpenOptions};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::process::Command;

use rustix::fs::{FallocateFlags, fallocate};

use crate::support::mounts::{LoopMount, make_fs};
use crate::support::{
    CLUSTER, Daemon, KIB, MIB, Mount, Pattern, Scratch, assert_same, qemu, run_ok,
};

/// Most bytes that may lie behind the end of a file while it is in use.
const MOST: u64 = 4 * MIB;
/// Larger than the free space below which nothing is allocated ahead.
const FS_SIZE: u64 = 1024 * MIB;
const SIZE: u64 = 64 * MIB;

/// A base on another file system, and an overlay on an ext4.
struct Rig {
    // Fields are dropped in this order.
    fs: LoopMount,
    overlay: PathBuf,
    want: Vec<u8>,
    mounts: u32,
    scratch: Scratch,
}

impl Rig {
    fn new(options: &str) -> Rig {
        let scratch = Scratch::new();
        let dir = scratch.dir("ext4");
        make_fs(&scratch.join("fs.img"), "ext4", FS_SIZE);
        let fs = LoopMount::new(&scratch.join("fs.img"), "ext4", &dir);
        let want = Pattern::new(90, 1).bytes(0, SIZE);
        let base = scratch.write("base.raw", &want);
        let overlay = dir.join("overlay.qcow2");
        qemu::create(&overlay, None, options, Some((base.to_str().expect("UTF-8"), "raw")));
        Rig { fs, overlay, want, mounts: 0, scratch }
    }

    fn mount(&mut self) -> Daemon {
        self.mounts += 1;
        let name = format!("mount{}", self.mounts);
        Mount::named(&self.scratch, &self.overlay, &name).args(&["--no-copy-on-read"]).start()
    }

    /// Writes `len` bytes at each of these offsets.
    fn write(&mut self, disk: &Daemon, offsets: impl Iterator<Item = u64>, len: u64) {
        let file = OpenOptions::new().write(true).open(disk.path()).expect("the disk");
        for offset in offsets {
            let data = Pattern::new(91, self.mounts).bytes(offset, len);
            file.write_all_at(&data, offset).expect("write");
            let place = usize::try_from(offset).expect("small");
            self.want[place..place + data.len()].copy_from_slice(&data);
        }
        file.sync_all().expect("fsync");
    }

    /// Checks the content, the image, and the file system.
    fn finish(self) {
        qemu::assert_not_corrupt(&self.overlay);
        assert_same("in the image", &qemu::read_all(&self.overlay), &self.want);
        let device = self.fs.umount();
        run_ok(Command::new("e2fsck").args(["-f", "-n"]).arg(device.device()));
        device.detach();
    }
}

/// Returns how many bytes more a file occupies than it has.
fn behind_the_end(file: &Path) -> u64 {
    let metadata = fs::metadata(file).expect("stat");
    (metadata.blocks() * 512).saturating_sub(metadata.size())
}

/// Protects: blocks are allocated ahead, since writes are slower otherwise; no more than
/// a few MiB; and an orderly end leaves none of them. After a kill they stay, and the
/// next process uses them.
#[test]
fn what_is_not_used_is_given_back() {
    requires!("/dev/fuse", "root", "qemu-img", "losetup", "mkfs.ext4", "e2fsck");
    let mut rig = Rig::new("");
    let disk = rig.mount();
    rig.write(&disk, (0..22 * MIB).step_by(64 * 1024), CLUSTER);
    let ahead = behind_the_end(&rig.overlay);
    assert!((MIB / 2..=MOST + MIB / 4).contains(&ahead), "{ahead} bytes ahead");
    disk.umount();
    let left = behind_the_end(&rig.overlay);
    assert!(left < 64 * KIB, "{left} bytes are left behind the end");

    let disk = rig.mount();
    rig.write(&disk, (22 * MIB..44 * MIB).step_by(64 * 1024), CLUSTER);
    disk.kill9();
    let ahead = behind_the_end(&rig.overlay);
    assert!((MIB / 2..=MOST + MIB / 4).contains(&ahead), "{ahead} bytes ahead after a kill");
    let disk = rig.mount();
    rig.write(&disk, (44 * MIB..SIZE).step_by(64 * 1024), CLUSTER);
    disk.umount();
    let left = behind_the_end(&rig.overlay);
    assert!(left < 64 * KIB, "{left} bytes are left behind the end");
    rig.finish();
}

/// Protects: blocks that a user has allocated for the image are not given back by the
/// program.
#[test]
fn blocks_of_the_user_stay() {
    requires!("/dev/fuse", "root", "qemu-img", "losetup", "mkfs.ext4", "e2fsck");
    let mut rig = Rig::new("");
    let file = OpenOptions::new().write(true).open(&rig.overlay).expect("the overlay");
    fallocate(&file, FallocateFlags::KEEP_SIZE, 0, 100 * MIB).expect("fallocate");
    drop(file);
    let disk = rig.mount();
    rig.write(&disk, (0..32 * MIB).step_by(64 * 1024), CLUSTER);
    disk.umount();
    let left = behind_the_end(&rig.overlay);
    assert!(left > 60 * MIB, "only {left} bytes are left of those that the user has allocated");
    rig.finish();
}

/// Protects: an image of which a guest writes a few subclusters of each cluster takes the
/// space of those, and not of whole clusters.
#[test]
fn parts_of_clusters_take_no_space_ahead() {
    requires!("/dev/fuse", "root", "qemu-img", "losetup", "mkfs.ext4", "e2fsck");
    let mut rig = Rig::new("extended_l2=on,cluster_size=128k");
    let disk = rig.mount();
    rig.write(&disk, (0..SIZE).step_by(128 * 1024), 4 * KIB);
    let blocks = fs::metadata(&rig.overlay).expect("stat").blocks() * 512;
    assert!(blocks < 4 * MIB, "{blocks} bytes for 512 subclusters of 4 KiB");
    disk.umount();
    rig.finish();
}
