//! A real file system, full of real files, on our disk: the main job as users do it.

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::json;

use crate::support::mounts::{LoopDevice, LoopMount};
use crate::support::{CORDISK, Daemon, MIB, Mount, Pattern, Rng, Scratch, assert_same, qemu, run_ok};

/// Where real files are found; the first that exist, up to a limit.
const SOURCES: [&str; 4] = ["/etc", "/usr/share/doc", "/usr/include", "/usr/lib/python3"];
const MOST_BYTES: u64 = 20 * MIB;
const MOST_FILES: usize = 3000;
const BASE_SIZE: u64 = 64 * MIB;

/// Regular files by relative name, with their content.
type Tree = BTreeMap<PathBuf, Vec<u8>>;

/// Copies real files into `dir`.
fn gather(dir: &Path) {
    let (mut bytes, mut count) = (0, 0);
    let mut todo: Vec<PathBuf> = SOURCES.iter().rev().map(PathBuf::from).collect();
    while let Some(next) = todo.pop() {
        let Ok(entries) = fs::read_dir(&next) else { continue };
        let mut entries: Vec<PathBuf> = entries.filter_map(|entry| Some(entry.ok()?.path())).collect();
        entries.sort();
        for path in entries {
            let Ok(meta) = fs::symlink_metadata(&path) else { continue };
            if meta.is_dir() {
                todo.push(path);
            } else if meta.is_file() && meta.len() < MIB && bytes + meta.len() < MOST_BYTES && count < MOST_FILES {
                let target = dir.join(path.strip_prefix("/").expect("absolute"));
                fs::create_dir_all(target.parent().expect("parent")).expect("mkdir");
                if fs::copy(&path, &target).is_ok() {
                    (bytes, count) = (bytes + meta.len(), count + 1);
                }
            }
        }
    }
    assert!(count > 50, "this host has next to no files to test with");
    eprintln!("{count} files, {bytes} bytes");
}

fn tree_of(dir: &Path) -> Tree {
    let mut tree = Tree::new();
    let mut todo = vec![dir.to_owned()];
    while let Some(next) = todo.pop() {
        for entry in fs::read_dir(&next).unwrap_or_else(|error| panic!("{}: {error}", next.display())) {
            let path = entry.expect("entry").path();
            let meta = fs::symlink_metadata(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
            if meta.is_dir() {
                todo.push(path);
            } else if meta.is_file() {
                let content = fs::read(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
                tree.insert(path.strip_prefix(dir).expect("below").to_owned(), content);
            }
        }
    }
    tree
}

fn assert_same_trees(what: &str, got: &Tree, want: &Tree) {
    for (name, content) in want {
        let found = got.get(name).unwrap_or_else(|| panic!("{what}: {} is missing", name.display()));
        assert_same(&format!("{what}: {}", name.display()), found, content);
    }
    let extra: Vec<&PathBuf> = got.keys().filter(|name| !want.contains_key(*name)).collect();
    assert!(extra.is_empty(), "{what}: these should not be there: {extra:?}");
}

/// Writes, overwrites, appends and deletes files, in `dir` and in `tree` alike.
fn change_files(dir: &Path, tree: &mut Tree, rng: &mut Rng) {
    let names: Vec<PathBuf> = tree.keys().cloned().collect();
    for (index, name) in names.iter().enumerate() {
        let path = dir.join(name);
        match rng.below(6) {
            0 => {
                fs::remove_file(&path).expect("remove");
                tree.remove(name);
            }
            1 => {
                let content = Pattern::new(50, u32::try_from(index).expect("small")).bytes(0, 1 + rng.below(50_000));
                fs::write(&path, &content).expect("overwrite");
                tree.insert(name.clone(), content);
            }
            2 => {
                use std::io::Write;
                OpenOptions::new().append(true).open(&path).and_then(|mut file| file.write_all(b"one more line\n")).expect("append");
                tree.get_mut(name).expect("in tree").extend(b"one more line\n");
            }
            _ => {}
        }
    }
    fs::create_dir(dir.join("new")).expect("mkdir");
    for number in 0..40u32 {
        let name = PathBuf::from(format!("new/{number}"));
        let content = Pattern::new(51, number).bytes(0, 1 + rng.below(300_000));
        fs::write(dir.join(&name), &content).expect("new file");
        if number % 8 == 0 {
            File::open(dir.join(&name)).and_then(|file| file.sync_all()).expect("fsync of a file inside");
        }
        tree.insert(name, content);
    }
}

fn fsck(device: &Path) {
    run_ok(Command::new("e2fsck").args(["-f", "-n"]).arg(device));
}

fn run_with(cluster: &str, speed: u64) {
    requires!("/dev/fuse", "root", "qemu-img", "losetup", "mkfs.ext4", "e2fsck", "fstrim");
    let mut rng = Rng::for_test(&format!("ext4 with clusters of {cluster}"));
    let scratch = Scratch::new();
    let source = scratch.dir("source");
    gather(&source);
    let base = scratch.join("base.raw");
    File::create(&base).and_then(|file| file.set_len(BASE_SIZE)).expect("base");
    run_ok(Command::new("mkfs.ext4").args(["-q", "-F", "-d"]).arg(&source).arg(&base));
    fsck(&base);
    let base_before = fs::read(&base).expect("base");
    let base_mtime = fs::metadata(&base).expect("stat").mtime_nsec();
    let mut tree = tree_of(&source);

    let overlay = scratch.join("overlay.qcow2");
    run_ok(Command::new(CORDISK).arg("create").arg(&overlay).args(["-b", "base.raw", "-F", "raw", "--cluster-size", cluster]));
    let disk: Daemon = Mount::new(&scratch, &overlay).qmp().start();
    let mut client = disk.client();
    client.ok("block_stream", json!({"device": "drive0", "speed": speed}));
    let mounted = LoopMount::new(disk.path(), "ext4", &scratch.dir("mnt"));
    let inside = |dir: &Path| {
        let mut tree = tree_of(dir);
        tree.retain(|name, _| !name.starts_with("lost+found"));
        tree
    };
    assert_same_trees("through the overlay", &inside(mounted.dir()), &tree);
    change_files(mounted.dir(), &mut tree, &mut rng);
    assert_same_trees("after changes", &inside(mounted.dir()), &tree);
    run_ok(Command::new("fstrim").arg(mounted.dir()));
    assert_same_trees("after fstrim", &inside(mounted.dir()), &tree);
    let device: LoopDevice = mounted.umount();
    fsck(device.device());
    device.detach();

    client.finish_job("drive0");
    assert_same("the base must never change", &fs::read(&base).expect("base"), &base_before);
    assert_eq!(fs::metadata(&base).expect("stat").mtime_nsec(), base_mtime, "nor be touched");
    fs::rename(&base, scratch.join("moved away")).expect("move the base away");

    let mounted = LoopMount::new(disk.path(), "ext4", &scratch.dir("mnt"));
    assert_same_trees("without the base", &inside(mounted.dir()), &tree);
    let device = mounted.umount();
    fsck(device.device());
    device.detach();
    let content = disk.read_all();
    drop(client);
    disk.umount();
    qemu::assert_clean(&overlay);
    qemu::assert_independent(&overlay);
    let raw = qemu::to_raw(&overlay, &scratch.join("converted"));
    assert_same("as QEMU reads it", &fs::read(&raw).expect("converted"), &content);
    fsck(&raw);
}

/// Protects: the main job at the default cluster size: a real ext4 base is read, written, trimmed and checked through our disk while a stream of
/// limited speed runs; afterwards the base is not needed, and not one file is wrong.
#[test]
fn ext4_while_a_slow_stream_runs() {
    run_with("64K", 8 * MIB);
}

/// Protects: the same at full speed and with clusters as small as a page, where tables change all the time.
#[test]
fn ext4_while_a_fast_stream_runs() {
    run_with("4K", 0);
}
