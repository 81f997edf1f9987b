//! The built-in list, in its order, on trees like those of distributions.

use std::fs;
use std::path::Path;

use tempfile::tempdir;

use super::support::*;
use crate::BootSet;

/// A guest as small as one can be, with systemd, GRUB, and the program of this test as every
/// program: an ELF file with libraries.
pub(super) fn guest(root: &Path) {
    let text = |path: &str, text: &str| put(root, path, text.as_bytes());
    text(
        "/boot/grub/grub.cfg",
        "insmod part_gpt\nmenuentry 'x' {\n  insmod ext2\n  linux /boot/vmlinuz-6.1.0-9 root=/dev/vda1 ro\n  initrd /boot/initrd.img-6.1.0-9\n}\n",
    );
    text(
        "/boot/grub/i386-pc/moddep.lst",
        "normal: terminal\next2: fshelp\npart_gpt:\nfshelp:\nxfs: fshelp\n",
    );
    for module in ["normal", "terminal", "part_gpt", "ext2", "fshelp", "xfs"] {
        let len = if module == "xfs" { 200_000 } else { 1500 };
        put(root, &format!("/boot/grub/i386-pc/{module}.mod"), &content(module, len));
    }
    put(root, "/boot/vmlinuz-6.1.0-9", &content("old kernel", 60_000));
    put(root, "/boot/initrd.img-6.1.0-9", &content("old initrd", 90_000));
    put(root, "/boot/vmlinuz-6.1.0-10", &content("new kernel", 200_000));
    put(root, "/boot/initrd.img-6.1.0-10", &content("new initrd", 200_000));
    link(root, "/vmlinuz", "boot/vmlinuz-6.1.0-10");
    link(root, "/initrd.img", "boot/initrd.img-6.1.0-10");
    link(root, "/lib", "usr/lib");
    link(root, "/sbin", "usr/sbin");
    link(root, "/usr/sbin/init", "/lib/systemd/systemd");
    put(
        root,
        "/usr/lib/systemd/systemd",
        &elf(&["libfirst.so.1"], Some("/lib/ld-test.so.2"), &["/usr/lib/systemd/private"]),
    );
    put(root, "/usr/lib/ld-test.so.2", &content("loader", 3000));
    put(root, "/usr/lib/systemd/private/libfirst.so.1", &elf(&["libsecond.so.2"], None, &[]));
    put(root, "/usr/lib/special/libsecond.so.2", &elf(&[], None, &[]));
    put(root, "/usr/lib/special/libunneeded.so.2", &content("unneeded", 5000));
    text("/etc/ld.so.conf", "include /etc/ld.so.conf.d/*.conf\n");
    text("/etc/ld.so.conf.d/special.conf", "# here\n/usr/lib/special\n");
    put(root, "/etc/ld.so.cache", &content("cache", 2000));
    text("/etc/fstab", "/dev/vda1 / ext4 defaults 0 1\n");
    text(
        "/usr/lib/modules/6.1.0-9/modules.dep",
        "kernel/net/virtio_net.ko.xz: kernel/net/failover.ko.xz\nkernel/net/failover.ko.xz:\nkernel/fs/rare.ko.xz:\n",
    );
    for module in ["net/virtio_net", "net/failover", "fs/rare"] {
        put(
            root,
            &format!("/usr/lib/modules/6.1.0-9/kernel/{module}.ko.xz"),
            &content(module, 2500),
        );
    }
    put(root, "/usr/lib/modules/6.1.0-10/kernel/net/virtio_net.ko", &content("newer", 2500));
    link(root, "/usr/lib/systemd/system/default.target", "multi-user.target");
    text(
        "/usr/lib/systemd/system/multi-user.target",
        "[Unit]\nRequires=basic.target\nAfter=basic.target\n",
    );
    text("/usr/lib/systemd/system/basic.target", "[Unit]\nRequires=sysinit.target\n");
    text(
        "/usr/lib/systemd/system/getty@.service",
        "[Service]\nExecStart=-/sbin/agetty -o '-p -- \\u' --noclear - $TERM\n",
    );
    text("/usr/lib/systemd/system/app.service", "[Service]\nExecStart=/usr/bin/app --flag\n");
    text("/usr/lib/systemd/system/idle.service", "[Service]\nExecStart=/usr/bin/idle\n");
    link(
        root,
        "/etc/systemd/system/getty.target.wants/getty@tty1.service",
        "/usr/lib/systemd/system/getty@.service",
    );
    link(
        root,
        "/etc/systemd/system/multi-user.target.wants/app.service",
        "/usr/lib/systemd/system/app.service",
    );
    text(
        "/etc/systemd/system/app.service.d/extra.conf",
        "[Service]\nExecStartPre=/usr/bin/prepare\n",
    );
    put(root, "/usr/sbin/agetty", &elf(&[], None, &[]));
    text("/usr/bin/app", "#!/usr/bin/env appshell\nrun\n");
    put(root, "/usr/bin/env", &elf(&[], None, &[]));
    put(root, "/usr/bin/appshell", &elf(&["libsecond.so.2"], None, &[]));
    put(root, "/usr/bin/prepare", &elf(&[], None, &[]));
    put(root, "/usr/bin/idle", &elf(&[], None, &[]));
    text("/etc/pam.d/login", "# login\nauth required pam_test.so nullok\n");
    put(root, "/usr/lib/security/pam_test.so", &elf(&[], None, &[]));
    put(root, "/var/log/journal/0123/system.journal", &content("journal", 600_000));
    text("/var/lib/systemd/random-seed", "seed");
    put(root, "/usr/share/doc/unread", &content("unread", 100_000));
}

/// An ELF file of 64 bits with a dynamic section, and a content of its own.
fn elf(needed: &[&str], interpreter: Option<&str>, runpath: &[&str]) -> Vec<u8> {
    let mut strings = vec![0_u8];
    let mut add = |text: &str| {
        let at = strings.len() as u64;
        strings.extend(text.bytes().chain([0]));
        at
    };
    let mut dynamic: Vec<(u64, u64)> = needed.iter().map(|name| (1, add(name))).collect();
    if !runpath.is_empty() {
        dynamic.push((29, add(&runpath.join(":"))));
    }
    let at_interpreter = add(interpreter.unwrap_or_default());
    const STRINGS: u64 = 0x1000;
    const DYNAMIC: u64 = 0x2000;
    const BASE: u64 = 0x40_0000;
    dynamic.push((5, BASE + STRINGS));
    dynamic.push((0, 0));
    let mut segments = vec![
        (1_u32, 0_u64, BASE, 0x3000_u64),
        (2, DYNAMIC, BASE + DYNAMIC, 16 * dynamic.len() as u64),
    ];
    if let Some(name) = interpreter {
        segments.push((3, STRINGS + at_interpreter, BASE, name.len() as u64 + 1));
    }
    let mut file = vec![0x7f, b'E', b'L', b'F', 2, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    file.extend(3_u16.to_le_bytes());
    file.extend(62_u16.to_le_bytes());
    file.extend(1_u32.to_le_bytes());
    for field in [BASE, 64, 0] {
        file.extend(field.to_le_bytes());
    }
    file.extend(0_u32.to_le_bytes());
    for field in [64_u16, 56, segments.len() as u16, 64, 0, 0] {
        file.extend(field.to_le_bytes());
    }
    for (kind, offset, address, size) in segments {
        file.extend(kind.to_le_bytes());
        file.extend(4_u32.to_le_bytes());
        for field in [offset, address, address, size, size, 8] {
            file.extend(field.to_le_bytes());
        }
    }
    file.resize(STRINGS as usize, 0xcc);
    file.extend(strings);
    file.resize(DYNAMIC as usize, 0xcc);
    for (tag, value) in dynamic {
        file.extend(tag.to_le_bytes());
        file.extend(value.to_le_bytes());
    }
    file.resize(0x3000, 0xcc);
    file
}

/// The place of the first block of a file in the answer, as the number of bytes before it.
pub(super) fn place(set: &BootSet, data: &std::collections::BTreeSet<u64>) -> Option<u64> {
    let first = *data.first()?;
    let mut before = 0;
    for range in &set.ranges {
        if range.contains(&first) {
            return Some(before + first - range.start);
        }
        before += range.end - range.start;
    }
    None
}

/// Boot loader, kernel, mount, first process, libraries, modules, units, logins, state: in this
/// order; and what is not part of the boot is left out.
#[test]
fn the_built_in_list_is_in_the_order_of_a_boot() {
    if !have(&["mkfs.ext4", "debugfs"]) {
        return;
    }
    let scratch = tempdir().unwrap();
    let root = scratch.path().join("root");
    guest(&root);
    let image = scratch.path().join("image");
    for (block_size, options) in [
        (4096, &["-b", "4096"][..]),
        (1024, &["-b", "1024"]),
        (4096, &["-b", "4096", "-O", "inline_data"]),
    ] {
        let _ = fs::remove_file(&image);
        mkfs(&image, &root, 32, options);
        let is_inline = options.contains(&"inline_data");
        let set = search(&image, &[]);
        println!("{}", set.notes.join("\n"));
        assert!(set.is_complete);
        let mut last = None;
        for path in [
            "/boot/grub/grub.cfg",
            "/boot/grub/i386-pc/normal.mod",
            "/boot/grub/i386-pc/part_gpt.mod",
            "/boot/grub/i386-pc/ext2.mod",
            "/boot/vmlinuz-6.1.0-9",
            "/boot/initrd.img-6.1.0-9",
            "<8>",
            "/etc/ld.so.cache",
            "/usr/lib/systemd/systemd",
            "/usr/lib/ld-test.so.2",
            "/usr/lib/systemd/private/libfirst.so.1",
            "/usr/lib/special/libsecond.so.2",
            "/etc/fstab",
            "/usr/lib/modules/6.1.0-9/kernel/net/failover.ko.xz",
            "/usr/lib/modules/6.1.0-9/kernel/net/virtio_net.ko.xz",
            "/usr/lib/systemd/system/multi-user.target",
            "/usr/lib/systemd/system/app.service",
            "/usr/bin/app",
            "/usr/bin/env",
            "/usr/bin/appshell",
            "/usr/bin/prepare",
            "/usr/lib/security/pam_test.so",
            "/var/log/journal/0123/system.journal",
        ] {
            let data = data_of(&image, path, block_size);
            // Its data is in its inode.
            if is_inline && data.is_empty() {
                continue;
            }
            let place = place(&set, &data);
            assert!(place.is_some(), "{path} is not in the answer");
            // GRUB's units of 32 KiB begin and end in neighbours.
            let slack = if path.starts_with("/boot") { 65536 } else { 0 };
            // Where metadata is small, files lie where blkid looks for signatures and where GRUB
            // reads its own, and come with these.
            let is_late = place.map(|place| place + slack) > last;
            let is_late = is_late || block_size == 1024 || is_inline;
            assert!(is_late, "{path} comes too early");
            last = place;
        }
        let found = blocks_of(&set.ranges, block_size);
        for path in [
            "/boot/grub/i386-pc/xfs.mod",
            "/boot/vmlinuz-6.1.0-10",
            "/boot/initrd.img-6.1.0-10",
            "/usr/lib/special/libunneeded.so.2",
            "/usr/lib/modules/6.1.0-9/kernel/fs/rare.ko.xz",
            "/usr/lib/modules/6.1.0-10/kernel/net/virtio_net.ko",
            "/usr/bin/idle",
            "/usr/share/doc/unread",
        ] {
            let data = data_of(&image, path, block_size);
            // GRUB reads units of 32 KiB, which end in the neighbours of its files.
            let most = if path.starts_with("/boot") { 2 * 32768 / block_size } else { 0 };
            let both = data.intersection(&found).count() as u64;
            assert!(!data.is_empty() && both <= most, "{path} is in the answer");
        }
        let agetty = data_of(&image, "/usr/sbin/agetty", block_size);
        assert!(agetty.is_subset(&found), "the program of a template");
        // Of a journal only the beginning.
        let journal = data_of(&image, "/var/log/journal/0123/system.journal", block_size);
        assert_eq!(journal.intersection(&found).count() as u64 * block_size, 256 << 10);
        // The end of the disk is probed.
        let size = 32 << 20;
        let tail = blocks_of(std::slice::from_ref(&(size - (512 << 10)..size)), block_size);
        assert!(tail.is_subset(&found));
    }
}

/// Without a configuration of a boot loader: links, then the newest.
#[test]
fn the_kernel_by_a_link_or_by_its_version() {
    if !have(&["mkfs.ext4", "debugfs"]) {
        return;
    }
    let scratch = tempdir().unwrap();
    let root = scratch.path().join("root");
    guest(&root);
    let image = scratch.path().join("image");
    fs::remove_file(root.join("boot/grub/grub.cfg")).unwrap();
    fs::write(root.join("boot/vmlinuz-6.1.0-11"), content("newest", 60_000)).unwrap();
    mkfs(&image, &root, 32, &["-b", "4096"]);
    let set = search(&image, &[]);
    assert!(
        set.notes.iter().any(|note| note.contains("kernel /boot/vmlinuz-6.1.0-10, by a link")),
        "{set:?}"
    );
    let initrd = data_of(&image, "/boot/initrd.img-6.1.0-10", 4096);
    assert!(initrd.is_subset(&blocks_of(&set.ranges, 4096)));

    fs::remove_file(root.join("vmlinuz")).unwrap();
    fs::remove_file(&image).unwrap();
    mkfs(&image, &root, 32, &["-b", "4096"]);
    let set = search(&image, &[]);
    assert!(
        set.notes.iter().any(|note| note.contains("kernel /boot/vmlinuz-6.1.0-11, the newest")),
        "{set:?}"
    );
}
