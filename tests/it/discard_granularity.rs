//! Discards through a loop device. The device gets the cluster size as its granularity, so that
//! trimming a fresh overlay does not make it grow. Ranges that are discarded or zeroed through it
//! read as zeros to the byte, because the kernel sends both as holes.

use std::fs;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;
use std::process::Command;

use crate::support::mounts::{LoopDevice, LoopMount, make_fs};
use crate::support::{CLUSTER, KIB, MIB, Mount, Pattern, Rig, Scratch, assert_same, qemu, run_ok};

fn granularity(device: &Path) -> u64 {
    let name = device.file_name().expect("device name");
    let file = Path::new("/sys/block").join(name).join("queue/discard_granularity");
    fs::read_to_string(file).expect("discard_granularity").trim().parse().expect("a number")
}

/// Bytes that the image occupies on the host.
fn occupied(image: &Path) -> u64 {
    fs::metadata(image).expect("image").blocks() * 512
}

/// Protects: `fstrim` of a fresh overlay uses almost no space: no cluster is copied up to hide a
/// part that was free anyway, or zero in the base. The data of the file system is still there.
#[test]
fn trimming_a_fresh_overlay_does_not_make_it_grow() {
    requires!(
        "root",
        "/dev/fuse",
        "qemu-img",
        "losetup",
        "mkfs.ext4",
        "e2fsck",
        "fstrim",
        "fs:ext4"
    );
    let scratch = Scratch::new();
    let base = scratch.join("base.raw");
    make_fs(&base, "ext4", 128 * MIB);
    // A disk that was in use: files between the remains of deleted files.
    let golden = LoopMount::new(&base, "ext4", &scratch.dir("golden"));
    let name = |index: u64| golden.dir().join(format!("file{index}"));
    for index in 0..1200 {
        fs::write(name(index), Pattern::new(93, 1).bytes(index * 64 * KIB, 20_000)).expect("file");
    }
    run_ok(Command::new("sync").arg("-f").arg(golden.dir()));
    (0..1200)
        .filter(|index| index % 2 == 0 || (500..600).contains(index))
        .for_each(|index| fs::remove_file(name(index)).expect("remove"));
    golden.umount().detach();

    let overlay = scratch.join("overlay.qcow2");
    qemu::create(&overlay, None, "", Some((base.to_str().expect("UTF-8"), "raw")));
    let disk = Mount::new(&scratch, &overlay).start();
    let device = LoopDevice::attach(disk.path());
    assert_eq!(
        granularity(device.device()),
        CLUSTER,
        "what a loop device takes for the unit of discards"
    );
    let used = LoopMount::on(device, "ext4", &scratch.dir("used"));
    run_ok(Command::new("sync").arg("-f").arg(used.dir()));
    let before = occupied(&overlay);
    run_ok(Command::new("fstrim").arg(used.dir()));
    run_ok(Command::new("sync").arg("-f").arg(used.dir()));
    let grown = occupied(&overlay).saturating_sub(before);
    assert!(grown < 3 * MIB, "the trim made the overlay grow by {grown} bytes");
    for index in (1..500).step_by(2) {
        let got = fs::read(used.dir().join(format!("file{index}"))).expect("file");
        assert_same(
            "a file beside trimmed space",
            &got,
            &Pattern::new(93, 1).bytes(index * 64 * KIB, 20_000),
        );
    }
    let device = used.umount();
    run_ok(Command::new("e2fsck").args(["-fn"]).arg(device.device()));
    device.detach();
    disk.umount();
    qemu::assert_clean(&overlay);
}

/// Protects: a discard, a zeroing with and without deallocation, and a zeroing by fallocate, of any
/// part of any cluster, read as zeros, at once and after a restart. A loop device sends its users'
/// discards and zeroes both as holes, so a discard must not be weaker than a zeroing.
#[test]
fn discards_and_zeroes_of_a_loop_device_are_exact() {
    requires!("root", "/dev/fuse", "qemu-img", "losetup", "blkdiscard", "fallocate");
    let rig = Rig::new(16 * MIB);
    let mut want = rig.content.clone();
    let disk = rig.mount().start();
    // Half of the clusters are local already.
    disk.open().write_all_at(&want[..2 * MIB as usize], 0).expect("write");
    let device = LoopDevice::attach_as(disk.path(), true);
    let programs: [&[&str]; 4] = [
        &["blkdiscard"],
        &["blkdiscard", "--zeroout"],
        &["fallocate", "--punch-hole"],
        &["fallocate", "--zero-range"],
    ];
    for (index, program) in (0u64..).zip(programs) {
        for half in [0, 8 * MIB] {
            let start = half + index * 4 * CLUSTER;
            // The end of one cluster; a range inside one; more than one cluster, from edge to edge.
            for (offset, len) in [
                (start + CLUSTER - 4096, 4096),
                (start + CLUSTER + 512, 4096),
                (start + 2 * CLUSTER - 1024, CLUSTER + 2048),
            ] {
                let range = [
                    "--offset".to_owned(),
                    offset.to_string(),
                    "--length".to_owned(),
                    len.to_string(),
                ];
                run_ok(
                    Command::new(program[0]).args(&program[1..]).args(range).arg(device.device()),
                );
                want[offset as usize..(offset + len) as usize].fill(0);
            }
        }
    }
    device.detach();
    assert_same("at once", &disk.read_all(), &want);
    disk.umount();
    rig.assert_overlay(&want);
    let disk = rig.mount().start();
    assert_same("after a restart", &disk.read_all(), &want);
    disk.umount();
}

/// Protects: mke2fs assumes that holes of a regular file read as zeros, and then does not write its
/// inode tables: a new file system above a base full of other bytes must be sound nevertheless.
#[test]
fn a_new_file_system_over_old_bytes_is_sound() {
    requires!("root", "/dev/fuse", "qemu-img", "losetup", "mkfs.ext4", "e2fsck");
    let rig = Rig::new(64 * MIB);
    let disk = rig.mount().start();
    run_ok(
        Command::new("mkfs.ext4")
            .args(["-q", "-F", "-N", "4096", "-E", "lazy_itable_init=0,discard"])
            .arg(disk.path()),
    );
    let used = LoopMount::new(disk.path(), "ext4", &rig.scratch.dir("new"));
    for index in 0..3000 {
        fs::write(used.dir().join(format!("file{index}")), [1; 100])
            .expect("file in every inode table");
    }
    let device = used.umount();
    run_ok(Command::new("e2fsck").args(["-fn"]).arg(device.device()));
    device.detach();
    disk.umount();
    qemu::assert_clean(&rig.overlay);
}
