//! Which blocks a file has: beside debugfs, and beside a second reader of ext4.

use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;

use ext4_view::Ext4;
use tempfile::tempdir;

use super::support::*;
use crate::BootSetLimits;
use crate::budget::Budget;
use crate::disk::Disk;

/// Kinds of file systems: block size in bytes, options of mkfs.ext4, whether `ext4-view` reads it
/// (it refuses inline data, and journals that no kernel has mounted).
const KINDS: &[(u64, &[&str], bool)] = &[
    (4096, &["-b", "4096", "-O", "64bit,metadata_csum,^has_journal"], true),
    (4096, &["-b", "4096", "-O", "^64bit,^metadata_csum"], false),
    (4096, &["-b", "4096", "-O", "^64bit,metadata_csum"], false),
    (4096, &["-b", "4096", "-O", "^extents,^64bit,^has_journal"], true),
    (4096, &["-b", "4096", "-O", "inline_data"], false),
    (4096, &["-b", "4096", "-O", "meta_bg,^resize_inode"], false),
    (4096, &["-b", "4096", "-O", "^flex_bg,^sparse_super,^resize_inode,^has_journal"], true),
    (2048, &["-b", "2048", "-O", "^has_journal"], true),
    (1024, &["-b", "1024", "-O", "64bit,metadata_csum,^has_journal"], true),
    (1024, &["-b", "1024", "-O", "^64bit,^metadata_csum,^extents"], false),
    (1024, &["-b", "1024", "-O", "inline_data,64bit"], false),
    (1024, &["-b", "1024", "-O", "meta_bg,^resize_inode,sparse_super2"], false),
    (1024, &["-t", "ext2", "-b", "1024", "-I", "128"], true),
];

/// Files of the tests: name and length.
const WANTED: &[(&str, usize)] = &[
    ("/etc/wanted-empty", 0),
    ("/etc/wanted-tiny", 33),
    ("/etc/wanted-inline", 130),
    ("/usr/lib/wanted-block", 4096),
    ("/usr/lib/deep/er/wanted-large", 3_333_333),
    ("/srv/wanted-last", 70_001),
];

fn tree(root: &Path) {
    for (name, len) in WANTED {
        put(root, name, &content(name, *len));
        // A neighbour that nobody asks for.
        put(root, &name.replace("wanted", "other"), &content(&format!("not {name}"), *len));
    }
    // A directory with more than one block, so that it has an index.
    for index in 0..300 {
        let name = format!("/usr/share/many/a-name-of-some-length-{index:04}");
        put(root, &name, format!("file {index}\n").as_bytes());
    }
    // A file of many extents with holes between them.
    let holes = root.join("srv/wanted-holes");
    let file = File::create(holes).unwrap();
    for index in 0..900_u64 {
        file.write_all_at(&content(&format!("piece {index}"), 1000), index * 16384).unwrap();
    }
    link(root, "/srv/wanted-link", "../usr/lib/deep/er/wanted-large");
    let far = format!("/usr/lib/{}wanted-block", "./".repeat(100));
    link(root, "/srv/wanted-far-link", &far);
}

/// The ranges have each block of the wanted files, and no block of another file.
#[test]
fn ranges_have_exactly_the_blocks_of_the_wanted_files() {
    if !have(&["mkfs.ext4", "debugfs"]) {
        return;
    }
    let scratch = tempdir().unwrap();
    let root = scratch.path().join("root");
    tree(&root);
    let image = scratch.path().join("image");
    for (block_size, options, _) in KINDS {
        println!("{options:?}");
        let _ = fs::remove_file(&image);
        mkfs(&image, &root, 64, options);
        let names: Vec<&str> = WANTED.iter().map(|(name, _)| *name).collect();
        let mut paths = names.clone();
        paths.extend(["/srv/wanted-holes", "/usr/share/many/a-name-of-some-length-0123"]);
        let set = search(&image, &paths);
        assert!(set.is_complete, "{:?}", set.notes);
        let found = blocks_of(&set.ranges, *block_size);
        for path in &paths {
            let data = data_of(&image, path, *block_size);
            let is_inline = options.iter().any(|option| option.contains("inline_data"));
            assert!(!data.is_empty() || path.contains("empty") || is_inline, "{path}");
            assert!(data.is_subset(&found), "{path}: {} blocks", data.difference(&found).count());
        }
        for (name, _) in WANTED {
            let other = name.replace("wanted", "other");
            let data = data_of(&image, &other, *block_size);
            assert!(
                data.is_disjoint(&found),
                "{other}: {} blocks",
                data.intersection(&found).count()
            );
        }
        let other = data_of(&image, "/usr/share/many/a-name-of-some-length-0124", *block_size);
        assert!(other.is_disjoint(&found));
    }
}

/// With nothing but the ranges, debugfs and the second reader read each wanted file.
#[test]
fn the_ranges_are_enough_to_read_the_files() {
    if !have(&["mkfs.ext4", "debugfs"]) {
        return;
    }
    let scratch = tempdir().unwrap();
    let root = scratch.path().join("root");
    tree(&root);
    let image = scratch.path().join("image");
    let copy = scratch.path().join("copy");
    let many = "/usr/share/many/a-name-of-some-length-029*";
    for (_, options, has_second_reader) in KINDS {
        println!("{options:?}");
        let _ = fs::remove_file(&image);
        mkfs(&image, &root, 64, options);
        let mut paths: Vec<&str> = WANTED.iter().map(|(name, _)| *name).collect();
        paths.extend(["/srv/wanted-holes", "/srv/wanted-link", "/srv/wanted-far-link", many]);
        let set = search(&image, &paths);
        sparse_copy(&image, &set.ranges, &copy);
        paths.pop();
        let many: Vec<String> = (290..300)
            .map(|index| format!("/usr/share/many/a-name-of-some-length-{index:04}"))
            .collect();
        paths.extend(many.iter().map(String::as_str));
        let out = scratch.path().join("out");
        for path in &paths {
            let expected = fs::read(root.join(path.trim_start_matches('/')))
                .unwrap_or_else(|_| fs::read(root.join("usr/lib/wanted-block")).unwrap());
            if *path != "/srv/wanted-link" && *path != "/srv/wanted-far-link" {
                let _ = fs::remove_file(&out);
                debugfs(&copy, &format!("dump {path} {}", out.display()));
                let mut read = fs::read(&out).unwrap_or_default();
                // debugfs 1.47 writes at least 60 bytes of a file whose data is in its inode.
                if options.iter().any(|option| option.contains("inline_data")) {
                    read.truncate(expected.len());
                }
                assert!(read == expected, "debugfs reads another {path}");
            }
            if *has_second_reader {
                let ext4 = Ext4::load_from_path(&copy).unwrap();
                assert!(ext4.read(*path).unwrap() == expected, "ext4-view reads another {path}");
            }
        }
        // A file that was not asked for is not there.
        let _ = fs::remove_file(&out);
        debugfs(&copy, &format!("dump /srv/other-last {}", out.display()));
        assert!(fs::read(&out).unwrap_or_default() != content("not /srv/wanted-last", 70_001));
    }
}

/// A directory is taken with all that is in it, and no data is read to find that.
#[test]
fn the_ranges_are_enough_to_find_files_by_a_tree() {
    if !have(&["mkfs.ext4", "debugfs"]) {
        return;
    }
    let scratch = tempdir().unwrap();
    let root = scratch.path().join("root");
    tree(&root);
    let image = scratch.path().join("image");
    mkfs(&image, &root, 64, &["-O", "^has_journal"]);
    let set = search(&image, &["/usr/lib"]);
    let copy = sparse_copy(&image, &set.ranges, &scratch.path().join("copy"));
    let ext4 = Ext4::load_from_path(copy).unwrap();
    for path in ["/usr/lib/wanted-block", "/usr/lib/other-block", "/usr/lib/deep/er/wanted-large"] {
        let expected = fs::read(root.join(&path[1..])).unwrap();
        assert!(ext4.read(path).unwrap() == expected, "{path}");
    }
    // The search read metadata, and no data of 6 MiB.
    let source = FileSource::open(&image);
    let paths = ["/usr/lib".to_owned()];
    crate::boot_set(source.clone(), &paths, &BootSetLimits::default()).unwrap();
    let read = source.bytes_read.load(std::sync::atomic::Ordering::Relaxed);
    assert!(read < 2 << 20, "{read} bytes read");
}

/// Fragments: a tree of extents with nodes of its own, and a file that grew over two levels.
#[test]
fn deep_trees_of_extents_are_walked() {
    if !have(&["mkfs.ext4", "debugfs"]) {
        return;
    }
    let scratch = tempdir().unwrap();
    let root = scratch.path().join("root");
    fs::create_dir_all(&root).unwrap();
    let fragmented = root.join("fragmented");
    let file = File::create(&fragmented).unwrap();
    // 4,000 extents: more than 340 nodes of 84 entries hold at one level below the inode.
    for index in 0..4000_u64 {
        file.write_all_at(&[1], index * 2048).unwrap();
    }
    let image = scratch.path().join("image");
    mkfs(&image, &root, 64, &["-b", "1024", "-O", "^has_journal"]);
    let depth = debugfs(&image, "dump_extents -n /fragmented");
    assert!(depth.contains("1/ 2") || depth.contains("1/ 1"), "{depth}");
    let set = search(&image, &["/fragmented"]);
    let data = data_of(&image, "/fragmented", 1024);
    assert!(data.len() >= 4000 && data.is_subset(&blocks_of(&set.ranges, 1024)));
    let copy = sparse_copy(&image, &set.ranges, &scratch.path().join("copy"));
    let read = Ext4::load_from_path(copy).unwrap().read("/fragmented").unwrap();
    assert!(read == fs::read(fragmented).unwrap());
}

/// Texts and directories in inodes. The second part of a text is an extended attribute; mkfs makes
/// no directory with a second part.
#[test]
fn data_in_inodes_is_read_to_its_end() {
    if !have(&["mkfs.ext4", "debugfs"]) {
        return;
    }
    let scratch = tempdir().unwrap();
    let root = scratch.path().join("root");
    let comment = "#".repeat(70);
    let text = format!("{comment}\nlinux /boot/k\ninitrd /boot/i\n");
    put(&root, "/boot/grub/grub.cfg", text.as_bytes());
    for name in ["k", "i"] {
        put(&root, &format!("/boot/{name}"), &content(name, 9000));
    }
    for name in 1..=3 {
        put(&root, &format!("/etc/d/name-{name}"), &content("wanted", 6000));
    }
    let image = scratch.path().join("image");
    mkfs(&image, &root, 32, &["-b", "4096", "-O", "inline_data"]);
    for path in ["/boot/grub/grub.cfg", "/etc/d"] {
        let stat = debugfs(&image, &format!("stat {path}"));
        assert!(stat.contains("Size of inline data"), "{path} has blocks: {stat}");
    }
    let set = search(&image, &[]);
    let expected = "the disk: kernel /boot/k, by the boot loader";
    assert!(set.notes.iter().any(|note| note == expected), "{set:?}");
    let set = search(&image, &["/etc/d"]);
    for name in 1..=3 {
        let data = data_of(&image, &format!("/etc/d/name-{name}"), 4096);
        assert!(data.len() == 2 && data.is_subset(&blocks_of(&set.ranges, 4096)), "{name}");
    }
}

/// Data of a file that was preallocated reads as zeros: its blocks are not needed.
#[test]
fn unwritten_extents_are_left_out() {
    if !have(&["mkfs.ext4", "debugfs"]) {
        return;
    }
    let scratch = tempdir().unwrap();
    let root = scratch.path().join("root");
    put(&root, "/etc/written", &content("written", 5000));
    let image = scratch.path().join("image");
    mkfs(&image, &root, 32, &["-b", "4096", "-O", "^has_journal"]);
    OpenOptions::new().write(true).open(&image).unwrap();
    run(Command::new("debugfs").args(["-w", "-R", "fallocate /etc/written 2 1000"]).arg(&image));
    run(Command::new("debugfs")
        .args(["-w", "-R", "set_inode_field /etc/written size 4096000"])
        .arg(&image));
    let set = search(&image, &["/etc/written"]);
    let all = data_of(&image, "/etc/written", 4096);
    let found = blocks_of(&set.ranges, 4096);
    assert!(all.len() > 900, "debugfs has allocated {} blocks", all.len());
    assert!(found.len() < 100, "{} blocks", found.len());
    let written = run(Command::new("debugfs").args(["-R", "bmap /etc/written 0"]).arg(&image));
    let written: u64 = written.trim().parse().unwrap();
    assert!(found.contains(&(written * 4096)));
}

/// The descriptors of all groups, beside those that dumpe2fs prints, where they are not behind the
/// superblock as well.
#[test]
fn group_descriptors_are_those_of_dumpe2fs() {
    if !have(&["mkfs.ext4", "dumpe2fs"]) {
        return;
    }
    let scratch = tempdir().unwrap();
    let root = scratch.path().join("root");
    put(&root, "/etc/file", b"content");
    let image = scratch.path().join("image");
    for options in [
        &["-b", "1024", "-O", "meta_bg,^resize_inode,64bit"][..],
        &["-b", "1024", "-O", "meta_bg,^resize_inode,^64bit,^flex_bg"],
        &["-b", "1024", "-O", "meta_bg,^resize_inode,sparse_super2"],
        &["-b", "1024", "-O", "meta_bg,^resize_inode,^sparse_super,^flex_bg"],
        &["-b", "1024", "-O", "^meta_bg,^flex_bg"],
        &["-b", "4096", "-g", "1024", "-O", "64bit,^flex_bg"],
    ] {
        println!("{options:?}");
        let _ = fs::remove_file(&image);
        mkfs(&image, &root, 500, options);
        let printed = run(Command::new("dumpe2fs").arg(&image));
        let numbers = |before: &str| -> Vec<u64> {
            let parts = printed.split(before).skip(1);
            parts
                .map(|part| part.split(|c: char| !c.is_ascii_digit()).next().unwrap())
                .map(|number| number.parse().unwrap())
                .collect()
        };
        let source = FileSource::open(&image);
        let budget = Arc::new(Budget::new(BootSetLimits::default()));
        let mut ext4 = crate::ext4::Ext4::open(Disk::new(source, budget), 0..500 << 20).unwrap();
        let groups = ext4.superblock.groups();
        let found: Vec<_> = (0..groups).map(|group| ext4.group(group).unwrap()).collect();
        assert!(groups >= 60);
        let tables: Vec<u64> = found.iter().map(|group| group.inode_table).collect();
        assert_eq!(tables, numbers("Inode table at "));
        let bitmaps: Vec<u64> = found.iter().map(|group| group.block_bitmap).collect();
        assert_eq!(bitmaps, numbers("Block bitmap at "));
        let bitmaps: Vec<u64> = found.iter().map(|group| group.inode_bitmap).collect();
        assert_eq!(bitmaps, numbers("Inode bitmap at "));
    }
}
