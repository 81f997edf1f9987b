//! Real file systems, ext4 and XFS, with real files, on a mounted disk through a loop device: the
//! main use of the program.

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::json;

use crate::support::mounts::{LoopDevice, LoopMount, make_fs};
use crate::support::{
    CORDISK, Daemon, MIB, Mount, Pattern, Rng, Scratch, assert_same, qemu, run_ok, sha256,
};

/// Directories with real files; the first ones that exist are used, up to a limit.
const SOURCES: [&str; 4] = ["/etc", "/usr/share/doc", "/usr/include", "/usr/lib/python3"];
const MOST_BYTES: u64 = 20 * MIB;
const MOST_FILES: usize = 3000;

/// Regular files by relative name, with their content.
type Tree = BTreeMap<PathBuf, Vec<u8>>;

/// Copies real files into `dir`.
fn gather(dir: &Path) {
    let (mut bytes, mut count) = (0, 0);
    let mut todo: Vec<PathBuf> = SOURCES.iter().rev().map(PathBuf::from).collect();
    while let Some(next) = todo.pop() {
        let Ok(entries) = fs::read_dir(&next) else { continue };
        let mut entries: Vec<PathBuf> =
            entries.filter_map(|entry| Some(entry.ok()?.path())).collect();
        entries.sort();
        for path in entries {
            let Ok(meta) = fs::symlink_metadata(&path) else { continue };
            if meta.is_dir() {
                todo.push(path);
            } else if meta.is_file()
                && meta.len() < MIB
                && bytes + meta.len() < MOST_BYTES
                && count < MOST_FILES
            {
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

/// Returns the regular files below `dir` that satisfy `wanted`. The others are not opened.
fn tree_of(dir: &Path, wanted: &dyn Fn(&Path) -> bool) -> Tree {
    let mut tree = Tree::new();
    let mut todo = vec![dir.to_owned()];
    while let Some(next) = todo.pop() {
        for entry in
            fs::read_dir(&next).unwrap_or_else(|error| panic!("{}: {error}", next.display()))
        {
            let path = entry.expect("entry").path();
            let meta = fs::symlink_metadata(&path)
                .unwrap_or_else(|error| panic!("{}: {error}", path.display()));
            if meta.is_dir() {
                todo.push(path);
            } else if meta.is_file() && wanted(&path) {
                let content =
                    fs::read(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
                tree.insert(path.strip_prefix(dir).expect("below").to_owned(), content);
            }
        }
    }
    tree
}

fn assert_same_trees(what: &str, got: &Tree, want: &Tree) {
    for (name, content) in want {
        let found =
            got.get(name).unwrap_or_else(|| panic!("{what}: {} is missing", name.display()));
        assert_same(&format!("{what}: {}", name.display()), found, content);
    }
    let extra: Vec<&PathBuf> = got.keys().filter(|name| !want.contains_key(*name)).collect();
    assert!(extra.is_empty(), "{what}: these should not be there: {extra:?}");
}

/// Writes, overwrites, appends and deletes files, in `dir` and in `tree`.
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
                let content = Pattern::new(50, u32::try_from(index).expect("small"))
                    .bytes(0, 1 + rng.below(50_000));
                fs::write(&path, &content).expect("overwrite");
                tree.insert(name.clone(), content);
            }
            2 => {
                use std::io::Write;
                OpenOptions::new()
                    .append(true)
                    .open(&path)
                    .and_then(|mut file| file.write_all(b"one more line\n"))
                    .expect("append");
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
            File::open(dir.join(&name))
                .and_then(|file| file.sync_all())
                .expect("fsync of a file inside");
        }
        tree.insert(name, content);
    }
}

/// One way to use the disk.
struct Case {
    fstype: &'static str,
    cluster: &'static str,
    /// Whether the stream is so slow that it cannot end before the test removes the limit.
    slow: bool,
    /// Whether the loop device bypasses the page cache of the mounted file.
    direct: bool,
}

impl Case {
    /// XFS needs at least 300 MiB.
    fn size(&self) -> u64 {
        if self.fstype == "xfs" { 304 * MIB } else { 64 * MIB }
    }

    fn fsck(&self, device: &Path) {
        let mut command = match self.fstype {
            "xfs" => Command::new("xfs_repair"),
            _ => Command::new("e2fsck"),
        };
        if self.fstype != "xfs" {
            command.arg("-f");
        }
        run_ok(command.arg("-n").arg(device));
    }

    fn mount(&self, disk: &Path, dir: &Path) -> LoopMount {
        LoopMount::on(LoopDevice::attach_as(disk, self.direct), self.fstype, dir)
    }
}

/// A file that is not read before the test removes the speed limit: it keeps a slow stream busy.
const HELD_BACK: &str = "held-back";
const HELD_BACK_SIZE: u64 = 8 * MIB;
/// Bytes per second; the held-back file takes two minutes at this speed.
const SLOW: u64 = 64 << 10;

/// Returns the files of a mounted file system: all, or only those that a test may read while the
/// stream is slow.
fn inside(dir: &Path, all: bool) -> Tree {
    let held_back = dir.join(HELD_BACK);
    let mut tree = tree_of(dir, &|path| all || path != held_back);
    tree.retain(|name, _| !name.starts_with("lost+found"));
    tree
}

fn run(case: &Case) {
    requires!("/dev/fuse", "root", "qemu-img", "losetup", "fstrim");
    let fs_of = format!("fs:{}", case.fstype);
    let mkfs = format!("mkfs.{}", case.fstype);
    requires!(&fs_of, &mkfs, if case.fstype == "xfs" { "xfs_repair" } else { "e2fsck" });
    let mut rng = Rng::for_test(&format!("{} with clusters of {}", case.fstype, case.cluster));
    let scratch = Scratch::new();
    let base = scratch.join("base.raw");
    make_fs(&base, case.fstype, case.size());
    let golden = LoopMount::new(&base, case.fstype, &scratch.dir("mnt"));
    gather(golden.dir());
    let held_back = Pattern::new(49, 0).bytes(0, HELD_BACK_SIZE);
    fs::write(golden.dir().join(HELD_BACK), &held_back).expect("held back");
    let mut tree = inside(golden.dir(), false);
    golden.umount().detach();
    case.fsck(&base);
    let base_before = sha256(&base);
    let base_mtime = fs::metadata(&base).expect("stat").mtime_nsec();

    let overlay = scratch.join("overlay.qcow2");
    run_ok(Command::new(CORDISK).arg("create").arg(&overlay).args([
        "-b",
        "base.raw",
        "-F",
        "raw",
        "--cluster-size",
        case.cluster,
    ]));
    let disk: Daemon = Mount::new(&scratch, &overlay).qmp().start();
    let mut client = disk.client();
    client
        .ok("block_stream", json!({"device": "drive0", "speed": if case.slow { SLOW } else { 0 }}));
    let mounted = case.mount(disk.path(), &scratch.dir("mnt"));
    assert_same_trees("through the overlay", &inside(mounted.dir(), false), &tree);
    change_files(mounted.dir(), &mut tree, &mut rng);
    assert_same_trees("after changes", &inside(mounted.dir(), false), &tree);
    run_ok(Command::new("fstrim").arg(mounted.dir()));
    assert_same_trees("after fstrim", &inside(mounted.dir(), false), &tree);
    let device: LoopDevice = mounted.umount();
    case.fsck(device.device());
    device.detach();
    if case.slow {
        let job = client.job();
        assert_eq!(job["status"], "running", "{job}");
    }

    client.finish_job("drive0");
    assert_eq!(sha256(&base), base_before, "the base must never change");
    assert_eq!(fs::metadata(&base).expect("stat").mtime_nsec(), base_mtime, "nor be touched");
    fs::rename(&base, scratch.join("moved away")).expect("move the base away");

    let mounted = case.mount(disk.path(), &scratch.dir("mnt"));
    tree.insert(HELD_BACK.into(), held_back);
    assert_same_trees("without the base", &inside(mounted.dir(), true), &tree);
    let device = mounted.umount();
    case.fsck(device.device());
    device.detach();
    let content = disk.read_all();
    drop(client);
    disk.umount();
    qemu::assert_clean(&overlay);
    qemu::assert_independent(&overlay);
    let raw = qemu::to_raw(&overlay, &scratch.join("converted"));
    assert_same("as QEMU reads it", &fs::read(&raw).expect("converted"), &content);
    case.fsck(&raw);
}

/// Protects: the main use at the default cluster size: a real ext4 base is read, written, trimmed
/// and checked through a mounted disk while a stream with a speed limit runs. Afterwards the base
/// is not needed, and every file is right.
#[test]
fn ext4_while_a_slow_stream_runs() {
    run(&Case { fstype: "ext4", cluster: "64K", slow: true, direct: false });
}

/// Protects: the same at full speed and with clusters as small as a page, where tables change all
/// the time; bypassing the page cache of the mounted file.
#[test]
fn ext4_while_a_fast_stream_runs() {
    run(&Case { fstype: "ext4", cluster: "4K", slow: false, direct: true });
}

/// Protects: the same with XFS, whose log and writes have other places and larger sizes, bypassing
/// the page cache of the mounted file.
#[test]
fn xfs_while_a_slow_stream_runs() {
    run(&Case { fstype: "xfs", cluster: "64K", slow: true, direct: true });
}

/// Protects: the same with XFS, small clusters and full speed.
#[test]
fn xfs_while_a_fast_stream_runs() {
    run(&Case { fstype: "xfs", cluster: "4K", slow: false, direct: false });
}
