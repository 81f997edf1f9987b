//! Partition tables that sfdisk makes, and contents that are only recognised.

use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Arc;

use tempfile::tempdir;

use super::order::{guest, place};
use super::support::*;
use crate::budget::Budget;
use crate::disk::Disk;
use crate::partitions::{Purpose, partitions};
use crate::recognise::{Content, recognise};
use crate::{BlockSource, BootSetLimits};

const MIB: u64 = 1 << 20;

/// Makes a disk with the table that `script` describes to sfdisk.
fn disk(path: &Path, mebibytes: u64, script: &str) {
    File::create(path).unwrap().set_len(mebibytes * MIB).unwrap();
    let path_of_programs = format!("{}:/usr/sbin:/sbin", std::env::var("PATH").unwrap());
    let mut child = Command::new("sfdisk")
        .env("PATH", path_of_programs)
        .arg("-q")
        .arg(path)
        .stdin(Stdio::piped())
        .spawn()
        .unwrap();
    child.stdin.take().unwrap().write_all(script.as_bytes()).unwrap();
    assert!(child.wait().unwrap().success());
}

/// Copies an image to its place on a disk.
fn place_image(disk: &Path, image: &Path, mebibyte: u64) {
    let to = OpenOptions::new().write(true).open(disk).unwrap();
    to.write_all_at(&fs::read(image).unwrap(), mebibyte * MIB).unwrap();
}

/// What the search takes for partitions: number, start and end in MiB, purpose.
fn table(path: &Path) -> Vec<(u32, u64, u64, Purpose)> {
    let source = FileSource::open(path);
    let budget = Arc::new(Budget::new(BootSetLimits::default()));
    let mut notes = Vec::new();
    let table = partitions(&mut Disk::new(source, budget), &mut notes).unwrap();
    assert!(notes.is_empty(), "{notes:?}");
    table
        .partitions
        .iter()
        .map(|p| (p.number, p.range.start / MIB, p.range.end / MIB, p.purpose))
        .collect()
}

#[test]
fn tables_of_each_kind() {
    if !have(&["sfdisk"]) {
        return;
    }
    let scratch = tempdir().unwrap();
    let image = scratch.path().join("disk");
    disk(
        &image,
        64,
        "label: gpt\nstart=1MiB,size=1MiB,type=21686148-6449-6E6F-744E-656564454649\nstart=2MiB,size=30MiB,type=U\nstart=32MiB,size=16MiB,type=L\n",
    );
    let expected =
        [(1, 1, 2, Purpose::BiosBoot), (2, 2, 32, Purpose::Efi), (3, 32, 48, Purpose::Other)];
    assert_eq!(table(&image), expected);

    // The first header is lost: the second one is at the end of the disk.
    OpenOptions::new().write(true).open(&image).unwrap().write_all_at(&[0; 512], 512).unwrap();
    assert_eq!(table(&image), expected);

    disk(
        &image,
        64,
        "label: dos\nstart=1MiB,size=7MiB,type=ef\nstart=8MiB,size=8MiB,type=83\nstart=16MiB,size=48MiB,type=5\nstart=17MiB,size=7MiB,type=83\nstart=25MiB,size=7MiB,type=82\nstart=33MiB,size=7MiB,type=83\n",
    );
    assert_eq!(
        table(&image),
        [
            (1, 1, 8, Purpose::Efi),
            (2, 8, 16, Purpose::Other),
            (5, 17, 24, Purpose::Other),
            (6, 25, 32, Purpose::Other),
            (7, 33, 40, Purpose::Other)
        ]
    );

    File::create(&image).unwrap().set_len(64 * MIB).unwrap();
    assert_eq!(table(&image), [(0, 0, 64, Purpose::Other)]);
}

/// A chain of logical partitions that leads back, and one that leads out of the disk.
#[test]
fn chains_of_logical_partitions_end() {
    if !have(&["sfdisk"]) {
        return;
    }
    let scratch = tempdir().unwrap();
    let image = scratch.path().join("disk");
    disk(
        &image,
        64,
        "label: dos\nstart=16MiB,size=48MiB,type=5\nstart=17MiB,size=7MiB,type=83\nstart=25MiB,size=7MiB,type=83\n",
    );
    let bytes = fs::read(&image).unwrap();
    // The second record follows the first partition; its own second entry is empty.
    let record = (16 * MIB..64 * MIB)
        .step_by(512)
        .map(|at| at as usize)
        .filter(|&at| bytes[at + 510..at + 512] == [0x55, 0xaa])
        .nth(1)
        .unwrap();
    for (first, sectors) in [(0_u32, 1000_u32), (1, 1), (u32::MAX, u32::MAX), (90_000, 0)] {
        let mut damaged = bytes.clone();
        let entry = record + 446 + 16;
        damaged[entry + 4] = 5;
        damaged[entry + 8..entry + 12].copy_from_slice(&first.to_le_bytes());
        damaged[entry + 12..entry + 16].copy_from_slice(&sectors.to_le_bytes());
        let set =
            crate::boot_set(Arc::new(Memory(damaged)), &[], &BootSetLimits::default()).unwrap();
        check(&set, 64 * MIB);
        assert!(set.notes.iter().any(|note| note.contains("partitions: 2")), "{set:?}");
    }
}

/// A cloud image: /boot and / are file systems of their own, with a BIOS boot partition and an EFI
/// system partition behind them in the table. The order is that of the boot over all of them.
#[test]
fn boot_and_root_on_partitions_of_their_own() {
    if !have(&["sfdisk", "mkfs.ext4", "debugfs"]) {
        return;
    }
    let scratch = tempdir().unwrap();
    let root = scratch.path().join("root");
    guest(&root);
    // /boot moves to its own file system, where its paths begin with /.
    let boot = scratch.path().join("boot");
    fs::rename(root.join("boot"), &boot).unwrap();
    fs::create_dir(root.join("boot")).unwrap();
    let configuration = fs::read_to_string(boot.join("grub/grub.cfg")).unwrap();
    fs::write(boot.join("grub/grub.cfg"), configuration.replace("/boot/", "/")).unwrap();
    let (root_image, boot_image) = (scratch.path().join("r"), scratch.path().join("b"));
    mkfs(&root_image, &root, 32, &["-b", "4096"]);
    mkfs(&boot_image, &boot, 16, &["-b", "1024"]);
    let image = scratch.path().join("disk");
    for (script, efi) in [
        (
            "label: gpt\nstart=40MiB,size=32MiB\nstart=80MiB,size=16MiB\nstart=4MiB,size=1MiB,type=21686148-6449-6E6F-744E-656564454649\nstart=6MiB,size=30MiB,type=U\n",
            true,
        ),
        (
            "label: dos\nstart=40MiB,size=32MiB,type=83\nstart=78MiB,size=30MiB,type=5\nstart=80MiB,size=16MiB,type=83\n",
            false,
        ),
    ] {
        disk(&image, 128, script);
        place_image(&image, &root_image, 40);
        place_image(&image, &boot_image, 80);
        let set = search(&image, &[]);
        println!("{}", set.notes.join("\n"));
        assert!(set.is_complete);
        let on = |image: &Path, path: &str, block_size: u64, mebibyte: u64| {
            let data = data_of(image, path, block_size);
            data.into_iter().map(|at| at + mebibyte * MIB).collect()
        };
        let kernel = place(&set, &on(&boot_image, "/vmlinuz-6.1.0-9", 1024, 80)).unwrap();
        let initrd = place(&set, &on(&boot_image, "/initrd.img-6.1.0-9", 1024, 80)).unwrap();
        let configuration = place(&set, &on(&boot_image, "/grub/grub.cfg", 1024, 80)).unwrap();
        let init = place(&set, &on(&root_image, "/usr/lib/systemd/systemd", 4096, 40)).unwrap();
        // The version of the kernel on the one file system chooses the modules on the other.
        let modules =
            on(&root_image, "/usr/lib/modules/6.1.0-9/kernel/net/virtio_net.ko.xz", 4096, 40);
        let modules = place(&set, &modules).unwrap();
        assert!(configuration < kernel && kernel < initrd && initrd < init && init < modules);
        let newer = on(&root_image, "/usr/lib/modules/6.1.0-10/kernel/net/virtio_net.ko", 4096, 40);
        assert_eq!(place(&set, &newer), None);
        assert_eq!(set.ranges[0].start, 0, "a boot begins with the boot sector");
        // Signatures are looked for after the kernel has started, whatever is found first.
        let probed = place(&set, &[127 * MIB + MIB / 2].into()).unwrap();
        assert!(initrd < probed && probed < init, "{initrd} {probed} {init}");
        // The gap before the first partition, and the beginnings of the other two.
        let has = |from: u64, to: u64| {
            blocks_of(std::slice::from_ref(&(from..to)), 4096)
                .is_subset(&blocks_of(&set.ranges, 4096))
        };
        assert!(has(0, MIB));
        assert_eq!(has(4 * MIB, 5 * MIB) && has(6 * MIB, 22 * MIB), efi);
        assert!(!has(22 * MIB, 23 * MIB));
        // Paths of the guest lead to the right file system.
        let named = search(&image, &["/boot/initrd.img-6.1.0-9", "/etc/fstab"]);
        assert!(place(&named, &on(&boot_image, "/initrd.img-6.1.0-9", 1024, 80)).is_some());
        assert!(place(&named, &on(&boot_image, "/vmlinuz-6.1.0-9", 1024, 80)).is_none());
        assert!(place(&named, &on(&root_image, "/etc/fstab", 4096, 40)).is_some());
    }
}

/// What is not read is named.
#[test]
fn other_contents_are_named() {
    let known: &[(&str, usize, &[u8])] = &[
        ("XFS", 0, b"XFSB"),
        ("btrfs", 0x1_0040, b"_BHRfS_M"),
        ("NTFS", 3, b"NTFS    "),
        ("LUKS", 0, b"LUKS\xba\xbe\0\x02"),
        ("LVM", 0x218, b"LVM2 001"),
        ("squashfs", 0, b"hsqs"),
    ];
    for (name, at, magic) in known {
        let mut bytes = vec![0; 1 << 20];
        bytes[*at..at + magic.len()].copy_from_slice(magic);
        let source: Arc<dyn BlockSource> = Arc::new(Memory(bytes));
        let budget = Arc::new(Budget::new(BootSetLimits::default()));
        let content =
            recognise(&mut Disk::new(Arc::clone(&source), budget), &(0..1 << 20)).unwrap();
        assert_eq!(content, Content::Other(name));
        let set = crate::boot_set(source, &[], &BootSetLimits::default()).unwrap();
        assert!(!set.is_complete, "{name}");
        let note = format!("the disk: {name}, which is not read");
        assert!(set.notes.contains(&note), "{:?}", set.notes);
    }
}

/// Where mkfs programs are here: the same for what they make.
#[test]
fn real_file_systems_are_recognised() {
    let scratch = tempdir().unwrap();
    let image = scratch.path().join("image");
    let kinds: &[(&[&str], u64, Content)] = &[
        (&["mkfs.xfs", "-q", "-f"], 512, Content::Other("XFS")),
        (&["mkfs.btrfs", "-q", "-f"], 256, Content::Other("btrfs")),
        (&["mkswap", "-q"], 16, Content::Other("swap")),
        (&["mkfs.vfat"], 64, Content::Fat),
        (&["mkfs.ext4", "-q", "-F"], 16, Content::Ext),
    ];
    for (command, mebibytes, expected) in kinds {
        if !have(&command[..1]) {
            continue;
        }
        File::create(&image).unwrap().set_len(mebibytes * MIB).unwrap();
        run(Command::new(command[0]).args(&command[1..]).arg(&image));
        let budget = Arc::new(Budget::new(BootSetLimits::default()));
        let mut disk = Disk::new(FileSource::open(&image), budget);
        assert_eq!(recognise(&mut disk, &(0..mebibytes * MIB)).unwrap(), *expected, "{command:?}");
    }
}
