//! The command `order from-files`: what it lists of a disk that no machine was started from, from
//! where it can be read, and in which process that happens.

use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use order::{BaseIdentity, Order};
use rustix::process::{Pid, Signal, kill_process};

use crate::support::{Finished, MIB, Ours, Scratch, poll, run_ok, run_within};

const LIMIT: Duration = Duration::from_secs(120);
/// Where the file system begins on the disks of these tests.
const START: u64 = 4 * MIB;
const DISK: u64 = 64 * MIB;

/// A disk with a partition and a file system with a kernel, an initrd, a configuration, and a file
/// that no boot reads. Returns its path.
fn disk(scratch: &Scratch) -> PathBuf {
    let root = scratch.dir("root");
    for (name, len, seed) in [
        ("boot/vmlinuz-6.1.0", 900_001, 1_u8),
        ("boot/initrd.img-6.1.0", 700_001, 2),
        ("etc/hosts", 150_001, 3),
        ("srv/unread", 900_001, 4),
    ] {
        let path = root.join(name);
        fs::create_dir_all(path.parent().expect("directory")).expect("directory");
        fs::write(path, bytes(len, seed)).expect("file");
    }
    let file_system = scratch.join("file-system");
    run_ok(
        Command::new("mkfs.ext4")
            .args(["-q", "-F", "-b", "4096", "-d"])
            .arg(&root)
            .arg(&file_system)
            .arg("32M"),
    );
    let disk = scratch.join("disk.raw");
    File::create(&disk).expect("disk").set_len(DISK).expect("size");
    let mut table =
        Command::new("sfdisk").arg("-q").arg(&disk).stdin(Stdio::piped()).spawn().expect("sfdisk");
    let line = b"label: gpt\nstart=4MiB,size=32MiB\n";
    table.stdin.take().expect("stdin").write_all(line).expect("sfdisk");
    assert!(table.wait().expect("sfdisk").success());
    let content = fs::read(&file_system).expect("file system");
    let file = OpenOptions::new().write(true).open(&disk).expect("disk");
    file.write_all_at(&content, START).expect("partition");
    disk
}

fn bytes(len: usize, seed: u8) -> Vec<u8> {
    let mut state = u64::from(seed);
    let next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        (state >> 56) as u8 | 1
    };
    std::iter::repeat_with(next).take(len).collect()
}

fn from_files(scratch: &Scratch, args: &[&str]) -> Finished {
    run_within(scratch.cordisk().args(["order", "from-files"]).args(args), LIMIT)
}

/// Runs the command, which must succeed. Returns the order, and what it says on standard error.
fn order_of(scratch: &Scratch, args: &[&str]) -> (Order, String) {
    let output = scratch.join("out.order");
    let name = output.display().to_string();
    let done = from_files(scratch, &[&["-o", &name], args].concat());
    assert!(done.status.success(), "{args:?}: {done:?}");
    let order = Order::decode(&fs::read(&output).expect("order")).expect("an order");
    (order, done.stderr)
}

/// A copy of the file system on the disk with nothing but the ranges of an order.
fn only(scratch: &Scratch, disk: &Path, order: &Order) -> PathBuf {
    let from = File::open(disk).expect("disk");
    let path = scratch.join("only");
    let to = File::create(&path).expect("copy");
    to.set_len(DISK).expect("size");
    for range in order.ranges() {
        let mut bytes = vec![0; usize::try_from(range.len).expect("a length")];
        from.read_exact_at(&mut bytes, range.offset).expect("disk");
        // debugfs reads a file system that begins at 0.
        if range.offset >= START {
            to.write_all_at(&bytes, range.offset - START).expect("copy");
        }
    }
    path
}

/// What debugfs reads of a file in that copy.
fn content(scratch: &Scratch, copy: &Path, path: &str) -> Vec<u8> {
    let out = scratch.join("content");
    let _ = fs::remove_file(&out);
    let request = format!("dump {path} {}", out.display());
    run_ok(Command::new("debugfs").args(["-R", &request]).arg(copy));
    fs::read(out).unwrap_or_default()
}

/// Protects: the order has the kernel, the initrd and the configuration, in this order, with all
/// that is needed to find them, and it belongs to this disk.
#[test]
fn the_order_of_a_disk_has_what_its_boot_reads() {
    requires!("mkfs.ext4", "debugfs", "sfdisk");
    let scratch = Scratch::new();
    let disk = disk(&scratch);
    let name = disk.display().to_string();
    let (order, notes) = order_of(&scratch, &[&name]);
    assert!(notes.contains("partition 1: kernel /boot/vmlinuz-6.1.0, the newest"), "{notes}");
    let head = fs::read(&disk).expect("disk");
    let identity = BaseIdentity::of(
        DISK,
        |buf| {
            buf.copy_from_slice(&head[..buf.len()]);
            Ok(())
        },
        None,
    );
    assert_eq!((order.base(), order.records()), (&identity.expect("identity"), 1));
    assert_eq!(order.ranges()[0].offset, 0, "a boot begins with the boot sector");
    let copy = only(&scratch, &disk, &order);
    assert!(content(&scratch, &copy, "/boot/vmlinuz-6.1.0") == bytes(900_001, 1));
    assert!(content(&scratch, &copy, "/boot/initrd.img-6.1.0") == bytes(700_001, 2));
    assert!(content(&scratch, &copy, "/etc/hosts") == bytes(150_001, 3));
    assert!(content(&scratch, &copy, "/srv/unread") != bytes(900_001, 4));
    // The number of bytes before a block of each file. The first one can be in the 32 KiB that GRUB
    // reads of another.
    let place = |wanted: &[u8]| {
        let block = &wanted[wanted.len() / 2 / 4096 * 4096..][..4096];
        let at = head.chunks(4096).position(|other| other == block);
        let at = at.expect("a block of the file") as u64 * 4096;
        let mut before = 0;
        for range in order.ranges() {
            if range.bytes().contains(&at) {
                return Some(before + at - range.offset);
            }
            before += range.len;
        }
        None
    };
    let (kernel, initrd) = (place(&bytes(900_001, 1)), place(&bytes(700_001, 2)));
    let hosts = place(&bytes(150_001, 3));
    assert!(
        kernel.is_some() && kernel < initrd && initrd < hosts,
        "{kernel:?} {initrd:?} {hosts:?}"
    );
}

/// Protects: paths of the guest replace the list; what is not there is said.
#[test]
fn named_files_replace_the_list() {
    requires!("mkfs.ext4", "debugfs", "sfdisk");
    let scratch = Scratch::new();
    let disk = disk(&scratch);
    let name = disk.display().to_string();
    let (order, notes) = order_of(&scratch, &[&name, "/srv", "/etc/ho*", "/opt/none"]);
    assert!(notes.contains("/opt/none: there is no such file"), "{notes}");
    let copy = only(&scratch, &disk, &order);
    assert!(content(&scratch, &copy, "/srv/unread") == bytes(900_001, 4));
    assert!(content(&scratch, &copy, "/etc/hosts") == bytes(150_001, 3));
    assert!(content(&scratch, &copy, "/boot/vmlinuz-6.1.0") != bytes(900_001, 1));
    let done = from_files(&scratch, &[&name, "relative"]);
    assert_eq!((done.status.code(), done.stdout.as_str()), (Some(1), ""), "{done:?}");
    assert!(done.stderr.contains("beginning with /") && done.stderr.lines().count() == 1);
}

/// Protects: a chain of qcow2 images and an NBD server give the order of the raw disk; the format
/// of an image is never guessed.
#[test]
fn the_same_disk_elsewhere_has_the_same_order() {
    requires!("mkfs.ext4", "debugfs", "sfdisk", "qemu-img", "nbdkit");
    let scratch = Scratch::new();
    let disk = disk(&scratch);
    let (order, _) = order_of(&scratch, &[&disk.display().to_string()]);

    let (middle, top) = (scratch.join("middle.qcow2"), scratch.join("top.qcow2"));
    run_ok(Command::new("qemu-img").args(["convert", "-c", "-O", "qcow2"]).arg(&disk).arg(&middle));
    run_ok(
        Command::new("qemu-img")
            .args(["create", "-q", "-f", "qcow2", "-F", "qcow2", "-b"])
            .arg(&middle)
            .arg(&top),
    );
    let top = top.display().to_string();
    assert_eq!(order_of(&scratch, &["-F", "qcow2", &top]).0, order);
    let done = from_files(&scratch, &[&top]);
    assert_eq!((done.status.code(), done.stdout.as_str()), (Some(1), ""), "{done:?}");
    assert!(done.stderr.contains("begins like a qcow2 image: say which format"), "{done:?}");
    assert_eq!(done.stderr.lines().count(), 1, "{done:?}");

    let Some(server) = test_servers::nbdkit(&["-r", "file", &disk.display().to_string()]) else {
        return;
    };
    let args = ["--unpinned", "--cache", "none", &server.url("")];
    assert_eq!(order_of(&scratch, &args).0, order);
}

/// Starts the command on a disk of which each read takes long. Returns the command, and the child
/// that searches.
fn slow(scratch: &Scratch, url: &str) -> (Ours, Pid) {
    let errors = File::create(scratch.join("errors")).expect("file");
    let command = scratch
        .cordisk()
        .args(["order", "from-files", "--unpinned", "--cache", "none", url])
        .stdin(Stdio::null())
        .stdout(File::create(scratch.join("out")).expect("file"))
        .stderr(errors)
        .process_group(0)
        .spawn()
        .expect("cordisk");
    let command = Ours(command);
    let child = poll(LIMIT, || {
        let processes = fs::read_dir("/proc").expect("/proc").flatten();
        let mut ids = processes.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
        ids.find(|id: &i32| {
            let words = fs::read(format!("/proc/{id}/cmdline")).unwrap_or_default();
            let status = fs::read_to_string(format!("/proc/{id}/status")).unwrap_or_default();
            words == b"cordisk\0order\0search\0"
                && status.contains(&format!("PPid:\t{}\n", command.0.id()))
                && status.contains("Seccomp:\t2\n")
        })
    });
    (command, child.and_then(Pid::from_raw).expect("the child in its sandbox"))
}

/// Protects: the process that reads file systems can gain no rights, is filtered in each thread,
/// has one socket and nothing of the environment; its death is an error of one line, and no order.
#[test]
fn the_search_is_a_process_that_can_only_compute() {
    requires!("mkfs.ext4", "debugfs", "sfdisk", "nbdkit");
    let scratch = Scratch::new();
    let disk = disk(&scratch).display().to_string();
    let arguments = ["-r", "--filter=delay", "file", &disk, "delay-read=2"];
    let Some(server) = test_servers::nbdkit(&arguments) else { return };
    let (mut command, child) = slow(&scratch, &server.url(""));
    let process = format!("/proc/{}", child.as_raw_nonzero());
    for thread in fs::read_dir(format!("{process}/task")).expect("threads").flatten() {
        let status = fs::read_to_string(thread.path().join("status")).expect("status");
        assert!(status.contains("NoNewPrivs:\t1\n"), "{status}");
        assert!(status.contains("Seccomp:\t2\n"), "{status}");
    }
    // Its memory is not that of a dumpable process: only root can look further.
    if rustix::process::geteuid().is_root() {
        assert_eq!(fs::read(format!("{process}/environ")).expect("environment"), b"");
        let files = fs::read_dir(format!("{process}/fd")).expect("files").flatten();
        let files: Vec<_> = files.filter_map(|file| fs::read_link(file.path()).ok()).collect();
        let has = |what: &str| files.iter().any(|file| file.to_string_lossy().contains(what));
        assert!(has("socket:") && !has("disk.raw") && !has("nbd"), "{files:?}");
    }
    kill_process(child, Signal::KILL).expect("the child");
    let status = poll(LIMIT, || command.0.try_wait().expect("wait")).expect("the end");
    let errors = fs::read_to_string(scratch.join("errors")).expect("errors");
    assert_eq!(status.code(), Some(1), "{errors}");
    assert!(errors.contains("the search has ended early: signal 9"), "{errors}");
    assert_eq!(errors.lines().count(), 1, "{errors}");
    assert_eq!(fs::read(scratch.join("out")).expect("output"), b"");
}

/// Protects: the search ends after `--time`, with what it has found until then.
#[test]
fn the_search_ends_in_time() {
    requires!("mkfs.ext4", "debugfs", "sfdisk", "nbdkit");
    let scratch = Scratch::new();
    let disk = disk(&scratch).display().to_string();
    let arguments = ["-r", "--filter=delay", "file", &disk, "delay-read=700ms"];
    let Some(server) = test_servers::nbdkit(&arguments) else { return };
    let args = ["--time", "1", "--unpinned", "--cache", "none", &server.url("")];
    let (order, notes) = order_of(&scratch, &args);
    assert!(notes.contains("the search ended at its limit: the time"), "{notes}");
    let all = order_of(&scratch, &[&disk]).0;
    assert!(order.bytes() < all.bytes(), "{} of {} bytes", order.bytes(), all.bytes());
}

/// Protects: a base that is no disk, or is not there, is refused in one line; an empty or damaged
/// one gives a short order and a note.
#[test]
fn bases_without_a_file_system() {
    let scratch = Scratch::new();
    let done = from_files(&scratch, &[&scratch.join("none").display().to_string()]);
    assert_eq!((done.status.code(), done.stderr.lines().count()), (Some(1), 1), "{done:?}");
    let zeros = scratch.write("zeros", &vec![0; MIB as usize]);
    let (_, notes) = order_of(&scratch, &[&zeros.display().to_string()]);
    assert!(notes.contains("nothing that is known"), "{notes}");
    let mut xfs = vec![0; MIB as usize];
    xfs[..4].copy_from_slice(b"XFSB");
    let xfs = scratch.write("xfs", &xfs);
    let (_, notes) = order_of(&scratch, &[&xfs.display().to_string()]);
    assert!(notes.contains("XFS, which is not read"), "{notes}");
}
