//! Programs that copy files infer where data is from `st_blocks`, `st_size`, SEEK_DATA and
//! SEEK_HOLE. All data of a fresh overlay is in its base, and each of these programs must find it,
//! wherever the overlay is stored.

use std::fs;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;
use std::process::Command;

use crate::support::mounts::LoopDevice;
use crate::support::{
    CLUSTER, Daemon, MIB, Mount, Pattern, Scratch, assert_same, have, qemu, run_ok,
};

const SIZE: u64 = 8 * MIB;

/// Makes a base with holes at both ends and data between them, some of it inside a cluster.
fn base(scratch: &Scratch) -> (std::path::PathBuf, Vec<u8>) {
    let path = scratch.join("base.raw");
    let file = fs::File::create(&path).expect("base");
    file.set_len(SIZE).expect("base");
    file.write_all_at(&Pattern::new(91, 1).bytes(0, MIB), 2 * MIB).expect("base");
    file.write_all_at(b"alone", 5 * MIB + 4096 + 17).expect("base");
    (path.clone(), fs::read(&path).expect("base"))
}

/// Asserts that each program copies the disk, as a file or in an archive, with all of its bytes.
fn assert_copied_by_all(what: &str, scratch: &Scratch, disk: &Path, want: &[u8]) {
    let copy = scratch.join("copy");
    for (tool, script) in [
        ("cp", r#"cp --sparse=auto "$0" "$1""#),
        ("cp", r#"cp --sparse=always "$0" "$1""#),
        ("cp", r#"cp --reflink=auto --sparse=never "$0" "$1""#),
        ("tar", r#"tar --sparse -cPf "$1.tar" "$0" && tar -xOf "$1.tar" > "$1""#),
        (
            "tar",
            r#"tar --sparse --hole-detection=raw -cPf "$1.tar" "$0" && tar -xOf "$1.tar" > "$1""#,
        ),
        ("dd", r#"dd if="$0" of="$1" bs=64K conv=sparse status=none"#),
        ("rsync", r#"rsync -S "$0" "$1""#),
        ("rsync", r#"rsync --inplace -S "$0" "$1""#),
        ("qemu-img", r#"qemu-img convert -f raw -O raw "$0" "$1""#),
        (
            "qemu-img",
            r#"qemu-img convert -f raw -O qcow2 "$0" "$1.qcow2" && qemu-img convert -O raw "$1.qcow2" "$1""#,
        ),
    ] {
        if !have(&[tool]) {
            continue;
        }
        let _ = fs::remove_file(&copy);
        run_ok(Command::new("sh").args(["-c", script]).arg(disk).arg(&copy));
        assert_same(&format!("{what}: {script}"), &fs::read(&copy).expect("copy"), want);
    }
}

fn blocks(disk: &Daemon) -> u64 {
    fs::metadata(disk.path()).expect("stat").blocks()
}

/// Protects: programs do not take an overlay without local data for an empty disk.
#[test]
fn a_fresh_overlay_is_copied_with_all_its_content() {
    requires!("/dev/fuse", "qemu-img", "tar");
    let scratch = Scratch::new();
    let (base, want) = base(&scratch);
    let overlay = scratch.join("overlay.qcow2");
    qemu::create(&overlay, None, "", Some((base.to_str().expect("UTF-8"), "raw")));
    let disk = Mount::new(&scratch, &overlay).args(&["--no-copy-on-read"]).start();
    assert!(
        (1..SIZE / 512).contains(&blocks(&disk)),
        "what the overlay occupies: {}",
        blocks(&disk)
    );
    assert_copied_by_all("a file", &scratch, disk.path(), &want);
    disk.umount();
}

/// Protects: the same for an overlay on a block device, which has no allocated blocks of its own.
/// `st_blocks` is never 0 (GNU tar would archive no data then, with exit status 0), but gives the
/// end of the image, and grows with it. Also read-only.
#[test]
fn an_overlay_on_a_block_device_is_copied_with_all_its_content() {
    requires!("root", "/dev/fuse", "qemu-img", "tar", "losetup");
    let scratch = Scratch::new();
    let (base, mut want) = base(&scratch);
    let file = scratch.join("device");
    fs::File::create(&file)
        .and_then(|file| file.set_len(256 * MIB))
        .expect("file below the device");
    let device = LoopDevice::attach(&file);
    qemu::create(device.device(), None, "", Some((base.to_str().expect("UTF-8"), "raw")));

    let disk = Mount::named(&scratch, device.device(), "readable").args(&["--read-only"]).start();
    let fresh = blocks(&disk);
    assert!(
        fresh > 0 && fresh * 512 < MIB,
        "the end of an image that holds nothing: {fresh} blocks"
    );
    assert_copied_by_all("read-only", &scratch, disk.path(), &want);
    disk.umount();

    let disk =
        Mount::named(&scratch, device.device(), "writable").args(&["--no-copy-on-read"]).start();
    assert_eq!(blocks(&disk), fresh);
    assert_copied_by_all("a device", &scratch, disk.path(), &want);
    // Only the guest's write is allocated; the kernel asks for attributes again after a write.
    disk.open().write_all_at(&Pattern::new(92, 1).bytes(0, 2 * MIB), 4 * MIB).expect("write");
    want[(4 * MIB) as usize..(6 * MIB) as usize]
        .copy_from_slice(&Pattern::new(92, 1).bytes(0, 2 * MIB));
    let grown = blocks(&disk);
    assert!(
        (2 * MIB..2 * MIB + 16 * CLUSTER).contains(&((grown - fresh) * 512)),
        "from {fresh} to {grown} blocks"
    );
    assert_copied_by_all("a device with data", &scratch, disk.path(), &want);
    disk.umount();
    device.detach();
}
