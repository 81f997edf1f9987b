//! Input that cannot work is refused: one line on standard error that starts with `cordisk: `, exit
//! status 1, nothing mounted, no file changed, in the foreground and in the background.

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::time::Duration;

use serde_json::json;

use crate::support::header::{self, EXT_BACKING_FORMAT};
use crate::support::{
    CORDISK, KIB, MIB, Mount, Pattern, QmpClient, RUNTIME_DIR, Rig, Scratch, Snapshot, assert_same,
    mounts, poll, qemu, run_ok, run_within,
};

const LIMIT: Duration = Duration::from_secs(30);

/// Runs the command, directly or through a shell that first prepares a mount namespace.
pub(crate) fn attempt(
    scratch: &Scratch,
    prepare: Option<&str>,
    args: &[&str],
) -> crate::support::Finished {
    let mut command = match prepare {
        None => Command::new(CORDISK),
        Some(script) => {
            let mut command = Command::new("unshare");
            // exec keeps the process: the namespace and all its mounts end with it.
            command.args([
                "--mount",
                "--propagation",
                "private",
                "sh",
                "-ec",
                &format!("{script}\nexec \"$@\""),
                "sh",
                CORDISK,
            ]);
            command
        }
    };
    command
        .args(args)
        .current_dir(scratch.path())
        .env_remove("RUST_LOG")
        .env("SCRATCH", scratch.path());
    command.env(RUNTIME_DIR, scratch.runtime_dir());
    run_within(&mut command, LIMIT)
}

/// Asserts that `cordisk mount ARGS` is refused, with -f and without; the line must contain one of
/// `words` (in lower case).
pub(crate) fn refused_in(scratch: &Scratch, prepare: Option<&str>, args: &[&str], words: &[&str]) {
    for foreground in [true, false] {
        let mut all = vec!["mount"];
        all.extend(foreground.then_some("-f"));
        all.extend(args);
        let before = Snapshot::of(scratch.path());
        let before_mounted = mounted_below(scratch);
        let done = attempt(scratch, prepare, &all);
        let what = format!("{all:?}: {done:?}");
        assert_eq!(done.status.code(), Some(1), "exit status of {what}");
        assert_eq!(done.stderr.lines().count(), 1, "exactly one line from {what}");
        assert!(done.stderr.starts_with("cordisk: ") && done.stderr.ends_with('\n'), "{what}");
        assert_eq!(done.stdout, "", "{what}");
        let line = done.stderr.to_lowercase();
        assert!(
            words.is_empty() || words.iter().any(|word| line.contains(&word.to_lowercase())),
            "one of {words:?} in {what}"
        );
        assert!(!done.stderr.contains("panicked"), "{what}");
        assert_eq!(mounted_below(scratch), before_mounted, "mounted after {what}");
        assert_eq!(before.changes(&Snapshot::of(scratch.path())), Vec::<String>::new(), "{what}");
    }
}

fn mounted_below(scratch: &Scratch) -> Vec<PathBuf> {
    mounts::table()
        .into_iter()
        .map(|entry| entry.mountpoint)
        .filter(|path| path.starts_with(scratch.path()))
        .collect()
}

pub(crate) fn refused(scratch: &Scratch, args: &[&str], words: &[&str]) {
    refused_in(scratch, None, args, words);
}

/// Asserts that the usual mount of `top.qcow2` at `disk` is refused.
fn top_refused(scratch: &Scratch, words: &[&str]) {
    refused(scratch, &["top.qcow2", "disk"], words);
}

/// Makes a valid chain for the tests to damage: base.raw ← top.qcow2.
fn good(scratch: &Scratch) -> PathBuf {
    scratch.raw("base.raw", MIB, Pattern::new(60, 1));
    let top = scratch.join("top.qcow2");
    qemu::create(&top, None, "", Some(("base.raw", "raw")));
    top
}

/// Protects: common mistakes: no such image, a directory, an empty file, a raw file, text.
#[test]
fn images_that_are_none() {
    requires!("/dev/fuse");
    let scratch = Scratch::new();
    scratch.dir("directory");
    scratch.write("empty", b"");
    scratch.write("text", b"This is not an image.\n");
    scratch.write("magic", b"QFI\xfb");
    scratch.raw("raw", MIB, Pattern::new(60, 1));
    refused(&scratch, &["missing.qcow2", "disk"], &["missing.qcow2"]);
    refused(&scratch, &["missing/top.qcow2", "disk"], &["missing/top.qcow2"]);
    for name in ["directory", "empty", "text", "magic", "raw"] {
        refused(&scratch, &[name, "disk"], &[name]);
    }
}

/// Protects: a truncated image (an interrupted download) is refused at open, or reads of the
/// missing parts are errors; data that was there never reads as zeros.
#[test]
fn truncated_images() {
    requires!("/dev/fuse", "qemu-img");
    let scratch = Scratch::new();
    let whole = scratch.join("whole.qcow2");
    qemu::create_full(&whole, 2 * MIB, "", Pattern::new(60, 2));
    let bytes = fs::read(&whole).expect("image");
    let want = Pattern::new(60, 2).bytes(0, 2 * MIB);
    for keep in [50, 104, 4096, 65536, 65536 + 1000, 2 * 65536, 3 * 65536] {
        scratch.write("top.qcow2", &bytes[..keep]);
        top_refused(&scratch, &["top.qcow2"]);
    }
    // All tables exist and some data is missing: the image may open, but reads of the missing data
    // must fail.
    let top = scratch.write("top.qcow2", &bytes[..bytes.len() - 512 * 1024 - 100]);
    let before = fs::read(&top).expect("image");
    let mut command = scratch.cordisk();
    command
        .args(["mount", "-f", "--read-only", "top.qcow2", "disk"])
        .current_dir(scratch.path())
        .env_remove("RUST_LOG");
    let mut child = command.stdin(Stdio::null()).stderr(Stdio::null()).spawn().expect("start");
    let disk = scratch.join("disk");
    let up = poll(LIMIT, || match child.try_wait().expect("wait") {
        Some(status) => Some(Some(status)),
        None => mounts::at(&disk).map(|_| None),
    });
    if let Some(None) = up {
        let file = fs::File::open(&disk).expect("open");
        let mut wrong = Vec::new();
        for (index, chunk) in want.chunks(4096).enumerate() {
            let mut buf = vec![0; chunk.len()];
            match std::os::unix::fs::FileExt::read_exact_at(&file, &mut buf, index as u64 * 4096) {
                Ok(()) if buf != chunk => wrong.push(index),
                Ok(()) | Err(_) => {}
            }
        }
        drop(file);
        mounts::umount(&disk);
        let ended = poll(LIMIT, || child.try_wait().expect("wait"));
        assert!(ended.is_some(), "it ends with the unmount");
        assert_eq!(wrong, Vec::<usize>::new(), "4 KiB blocks that read wrong without an error");
    } else {
        let _ = child.kill();
        let status = child.wait().expect("wait");
        assert_eq!(status.code(), Some(1), "refused: {up:?}");
    }
    assert_same("the truncated image", &fs::read(&top).expect("image"), &before);
}

/// Protects: incomplete chains are refused: missing base, missing middle, base of unspecified
/// format (never probed), an unknown format.
#[test]
fn chains_that_are_not_whole() {
    requires!("/dev/fuse", "qemu-img");
    let scratch = Scratch::new();
    let top = good(&scratch);
    fs::rename(scratch.join("base.raw"), scratch.join("elsewhere.raw")).expect("move");
    top_refused(&scratch, &["base.raw"]);
    fs::create_dir(scratch.join("base.raw")).expect("a directory as base");
    top_refused(&scratch, &["base.raw"]);
    fs::remove_dir(scratch.join("base.raw")).expect("rmdir");
    fs::rename(scratch.join("elsewhere.raw"), scratch.join("base.raw")).expect("move back");

    let mid = scratch.join("mid.qcow2");
    fs::rename(&top, &mid).expect("rename");
    qemu::create(&top, None, "", Some(("mid.qcow2", "qcow2")));
    fs::rename(scratch.join("base.raw"), scratch.join("elsewhere.raw")).expect("move");
    top_refused(&scratch, &["base.raw"]);
    fs::rename(scratch.join("elsewhere.raw"), scratch.join("base.raw")).expect("move back");

    // The reference says qcow2, and the base is raw.
    header::edit(&top, |h| h.backing = Some(b"base.raw".to_vec()));
    top_refused(&scratch, &["base.raw"]);
    // A format that is not supported.
    header::edit(&top, |h| {
        h.extensions
            .iter_mut()
            .filter(|(kind, _)| *kind == EXT_BACKING_FORMAT)
            .for_each(|(_, name)| *name = b"vmdk".to_vec())
    });
    top_refused(&scratch, &["vmdk"]);
}

/// Protects: formats are never guessed, because a guest could write a qcow2 header into a raw base
/// and so read any file of the host. A header without a format is an error that names the option
/// `--backing-format`, and the option works.
#[test]
fn a_base_without_format_needs_the_option() {
    requires!("/dev/fuse", "qemu-img");
    let scratch = Scratch::new();
    let top = good(&scratch);
    header::edit(&top, |h| h.extensions.retain(|(kind, _)| *kind != EXT_BACKING_FORMAT));
    top_refused(&scratch, &["--backing-format"]);
    refused(&scratch, &["--backing-format", "qcow2", "top.qcow2", "disk"], &["base.raw"]);
    let disk = Mount::new(&scratch, &top).args(&["--backing-format", "raw"]).start();
    assert_same("with --backing-format raw", &disk.read_all(), &Pattern::new(60, 1).bytes(0, MIB));
    disk.umount();
    qemu::assert_clean(&top);
}

/// Protects: a chain that contains the same file twice is detected by the identity of files, not by
/// name, and a chain that is too deep is refused.
#[test]
fn cyclic_and_endless_chains() {
    requires!("/dev/fuse", "qemu-img");
    let scratch = Scratch::new();
    let make = |name: &str, backing: &str| {
        let args = ["create", "-q", "-u", "-f", "qcow2", "-F", "qcow2", "-b", backing];
        run_ok(Command::new("qemu-img").args(args).arg(scratch.join(name)).arg("1M"));
    };
    make("top.qcow2", "top.qcow2");
    top_refused(&scratch, &[]);
    make("a.qcow2", "b.qcow2");
    make("b.qcow2", "a.qcow2");
    refused(&scratch, &["a.qcow2", "disk"], &[]);
    make("top.qcow2", "a.qcow2");
    top_refused(&scratch, &[]);
    // The same file under another name.
    fs::hard_link(scratch.join("top.qcow2"), scratch.join("other-name.qcow2")).expect("link");
    header::edit(&scratch.join("top.qcow2"), |h| h.backing = Some(b"other-name.qcow2".to_vec()));
    top_refused(&scratch, &[]);
    fs::remove_file(scratch.join("other-name.qcow2")).expect("unlink");

    qemu::create(&scratch.join("layer0.qcow2"), Some(MIB), "", None);
    for depth in 1..40 {
        make(&format!("layer{depth}.qcow2"), &format!("layer{}.qcow2", depth - 1));
    }
    refused(&scratch, &["layer39.qcow2", "disk"], &[]);
}

/// Protects: backing names that are not files are refused with one clear message and never opened:
/// an image must not make the daemon use the network, run drivers, or read devices.
#[test]
fn protocol_backing_names() {
    requires!("/dev/fuse", "qemu-img");
    let scratch = Scratch::new();
    let top = good(&scratch);
    for name in [
        "nbd://127.0.0.1:1/disk",
        "nbd:127.0.0.1:1",
        "json:{\"driver\":\"raw\",\"file\":{\"driver\":\"file\",\"filename\":\"base.raw\"}}",
        "http://127.0.0.1:1/disk.raw",
        "https://127.0.0.1:1/disk.raw",
        "ssh://127.0.0.1/disk.raw",
        "fat:rw:/tmp",
        "host_device:/dev/sda",
    ] {
        header::edit(&top, |h| h.backing = Some(name.as_bytes().to_vec()));
        top_refused(&scratch, &[name.split(':').next().expect("a prefix")]);
    }
    // Names that would break the single line, or end a C string early.
    for name in [&b"base.raw\nsecond line"[..], b"base\0.raw", b"\x1b[2J", b"\xff\xfe"] {
        header::edit(&top, |h| h.backing = Some(name.to_vec()));
        top_refused(&scratch, &[]);
    }
}

/// A program that holds an image open as QEMU does, until it is dropped.
struct Holder {
    child: Child,
    stdin: Option<ChildStdin>,
}

impl Holder {
    /// Runs `qemu-io` on the image; returns when it has the image open.
    fn open(image: &Path, format: &str, read_only: bool) -> Holder {
        let mut command = Command::new("qemu-io");
        command.args(["-f", format]).args(read_only.then_some("-r")).arg(image);
        let mut child = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .expect("qemu-io");
        let mut stdin = child.stdin.take().expect("stdin");
        stdin.write_all(b"read 0 512\n").expect("ask");
        let lines = BufReader::new(child.stdout.take().expect("stdout")).lines();
        let holder = Holder { child, stdin: Some(stdin) };
        let answered = lines.map_while(Result::ok).any(|line| line.contains("read 512/512"));
        assert!(answered, "qemu-io must open {}", image.display());
        holder
    }
}

impl Drop for Holder {
    fn drop(&mut self) {
        drop(self.stdin.take());
        let ended = poll(Duration::from_secs(5), || self.child.try_wait().ok().flatten());
        if ended.is_none() {
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
    }
}

/// Protects: P12, P10. An overlay that QEMU has open is refused, and so is a base that QEMU writes;
/// when QEMU has closed them, the mount works.
#[test]
fn images_that_qemu_has_open() {
    requires!("/dev/fuse", "qemu-img", "qemu-io");
    let scratch = Scratch::new();
    let top = good(&scratch);
    let busy = ["in use", "lock", "another process"];
    {
        let _writer = Holder::open(&top, "qcow2", false);
        top_refused(&scratch, &busy);
        refused(&scratch, &["--read-only", "top.qcow2", "disk"], &busy);
    }
    {
        let _reader = Holder::open(&top, "qcow2", true);
        top_refused(&scratch, &busy);
    }
    {
        let _writer = Holder::open(&scratch.join("base.raw"), "raw", false);
        top_refused(&scratch, &busy);
    }
    // Two readers of a base do not conflict.
    let _reader = Holder::open(&scratch.join("base.raw"), "raw", true);
    let disk = Mount::new(&scratch, &top).start();
    assert_same("disk", &disk.read_all(), &Pattern::new(60, 1).bytes(0, MIB));
    disk.umount();
    qemu::assert_clean(&top);
}

/// Protects: P12, P10, the other way round: while the daemon has an image open, QEMU's tools refuse
/// it, and no program with these locks writes its base.
#[test]
fn qemu_refuses_what_we_have_open() {
    requires!("/dev/fuse", "qemu-img", "qemu-io");
    let scratch = Scratch::new();
    let top = good(&scratch);
    let disk = Mount::new(&scratch, &top).start();
    let path = |name: &str| scratch.join(name).to_str().expect("UTF-8").to_owned();
    let (overlay, base) = (path("top.qcow2"), path("base.raw"));
    let refuses = |program: &str, args: &[&str]| {
        let done = run_within(Command::new(program).args(args), LIMIT);
        let said = format!("{}{}", done.stdout, done.stderr);
        assert!(
            !done.status.success() && said.contains("lock"),
            "{program} {args:?} had to be refused by the lock: {done:?}"
        );
    };
    refuses("qemu-img", &["info", "-f", "qcow2", &overlay]);
    refuses("qemu-img", &["check", "-f", "qcow2", &overlay]);
    refuses("qemu-img", &["resize", "-f", "qcow2", &overlay, "+1M"]);
    refuses("qemu-img", &["snapshot", "-c", "s1", &overlay]);
    refuses("qemu-img", &["convert", "-f", "qcow2", "-O", "raw", &overlay, &path("copy")]);
    refuses("qemu-io", &["-f", "qcow2", "-c", "write 0 512", &overlay]);
    refuses("qemu-io", &["-f", "raw", "-c", "write 0 512", &base]);
    run_ok(Command::new("qemu-img").args(["info", "-U", "-f", "qcow2", &overlay]));
    run_ok(Command::new("qemu-io").args(["-r", "-f", "raw", "-c", "read 0 512", &base]));
    // A second daemon is refused as well.
    refused(&scratch, &["top.qcow2", "second"], &["in use", "lock", "another process"]);
    refused(
        &scratch,
        &["--read-only", "top.qcow2", "second"],
        &["in use", "lock", "another process"],
    );
    assert_same("disk", &disk.read_all(), &Pattern::new(60, 1).bytes(0, MIB));
    disk.umount();
    qemu::assert_clean(&top);

    // A read-only mount allows other readers and keeps writers out.
    let disk = Mount::new(&scratch, &top).args(&["--read-only"]).start();
    run_ok(Command::new("qemu-img").args(["info", "-f", "qcow2", &overlay]));
    refuses("qemu-io", &["-f", "qcow2", "-c", "write 0 512", &overlay]);
    disk.umount();
}

/// Protects: impossible mountpoints: in use by another disk, a directory, without a parent
/// directory, the image or the base itself.
#[test]
fn mountpoints_that_cannot_be() {
    requires!("/dev/fuse", "qemu-img");
    let scratch = Scratch::new();
    let top = good(&scratch);
    scratch.dir("directory");
    refused(&scratch, &["top.qcow2", "directory"], &["directory"]);
    refused(&scratch, &["top.qcow2", "nowhere/disk"], &["nowhere/disk"]);
    refused(&scratch, &["top.qcow2", "top.qcow2"], &["top.qcow2"]);
    refused(&scratch, &["top.qcow2", "base.raw"], &["base.raw"]);

    let other = scratch.join("other.qcow2");
    qemu::create_full(&other, MIB, "", Pattern::new(60, 3));
    let disk = Mount::named(&scratch, &other, "taken").start();
    for foreground in [true, false] {
        let mut args = vec!["mount"];
        args.extend(foreground.then_some("-f"));
        args.extend(["top.qcow2", "taken.disk"]);
        let done = attempt(&scratch, None, &args);
        assert_eq!(done.status.code(), Some(1), "{done:?}");
        assert_eq!(done.stderr.lines().count(), 1, "{done:?}");
        assert!(
            done.stderr.starts_with("cordisk: ") && done.stderr.contains("taken.disk"),
            "{done:?}"
        );
        let count = mounts::table().iter().filter(|entry| entry.mountpoint == disk.path()).count();
        assert_eq!(count, 1, "nothing is mounted over a disk");
        assert_same(
            "the disk that was there first",
            &disk.read_all(),
            &Pattern::new(60, 3).bytes(0, MIB),
        );
    }
    disk.umount();
    qemu::assert_clean(&top);
}

/// Protects: on a machine (or in a container) without /dev/fuse, the error says so.
#[test]
fn without_dev_fuse() {
    requires!("root", "unshare", "qemu-img");
    let scratch = Scratch::new();
    good(&scratch);
    let outside = scratch.dir("dev");
    let script = "mount -t tmpfs none \"$SCRATCH/dev\"
        for name in null zero full random urandom tty; do : > \"$SCRATCH/dev/$name\"; mount --bind /dev/$name \"$SCRATCH/dev/$name\"; done
        mount --rbind \"$SCRATCH/dev\" /dev";
    let probe =
        Command::new("unshare").args(["--mount", "--propagation", "private", "true"]).status();
    if !probe.is_ok_and(|status| status.success()) {
        eprintln!("skipped: no mount namespaces here");
        return;
    }
    refused_in(&scratch, Some(script), &["top.qcow2", "disk"], &["/dev/fuse", "fuse"]);
    assert!(fs::read_dir(outside).expect("dir").next().is_none());
}

/// Protects: in a directory that is not writable, no placeholder is created and no overlay is
/// opened for writing; a read-only mount of an image in it works.
#[test]
fn read_only_directories() {
    requires!("/dev/fuse", "root", "unshare", "qemu-img");
    let scratch = Scratch::new();
    good(&scratch);
    let frozen = scratch.dir("frozen");
    fs::copy(scratch.join("base.raw"), frozen.join("base.raw")).expect("copy");
    fs::copy(scratch.join("top.qcow2"), frozen.join("top.qcow2")).expect("copy");
    let script = "mount --bind \"$SCRATCH/frozen\" \"$SCRATCH/frozen\"; mount -o remount,bind,ro \"$SCRATCH/frozen\"";
    refused_in(&scratch, Some(script), &["top.qcow2", "frozen/disk"], &["read-only"]);
    refused_in(&scratch, Some(script), &["frozen/top.qcow2", "disk"], &["read-only"]);
    refused_in(
        &scratch,
        Some(script),
        &["--qmp", "frozen/sock", "top.qcow2", "disk"],
        &["frozen/sock"],
    );
    refused_in(
        &scratch,
        Some(script),
        &["--pidfile", "frozen/pid", "top.qcow2", "disk"],
        &["frozen/pid"],
    );
}

/// Protects: unsupported features are refused by name (V7), instead of being misread or silently
/// damaged.
#[test]
fn features_that_we_do_not_do() {
    requires!("/dev/fuse", "qemu-img");
    let scratch = Scratch::new();
    let top = scratch.join("top.qcow2");
    let qemu_img = |args: &[&str]| {
        let _ = fs::remove_file(&top);
        run_ok(Command::new("qemu-img").args(args).arg(&top).arg("1M").current_dir(scratch.path()));
    };
    let luks = ["create", "-q", "--object", "secret,id=s,data=abc", "-f", "qcow2", "-o"];
    qemu_img(
        &[&luks[..], &["encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10"]].concat(),
    );
    top_refused(&scratch, &["encrypt"]);
    refused(&scratch, &["--read-only", "top.qcow2", "disk"], &["encrypt"]);
    qemu_img(&["create", "-q", "-f", "qcow2"]);
    header::poke(&top, header::AT_CRYPT_METHOD, &1u32.to_be_bytes());
    top_refused(&scratch, &["encrypt"]);
    qemu_img(&["create", "-q", "-f", "qcow2", "-o", "data_file=data.raw"]);
    top_refused(&scratch, &["data file"]);
    refused(&scratch, &["--read-only", "top.qcow2", "disk"], &["data file"]);
    qemu_img(&["create", "-q", "-f", "qcow2"]);
    header::poke(&top, header::AT_INCOMPATIBLE, &(1u64 << 40).to_be_bytes());
    top_refused(&scratch, &["feature"]);
    qemu_img(&["create", "-q", "-f", "qcow2"]);
    header::poke(&top, header::AT_INCOMPATIBLE, &2u64.to_be_bytes());
    top_refused(&scratch, &["corrupt"]);
}

/// Protects: writing would damage snapshots and bitmaps, so such images are refused by name for
/// writing, but are read correctly read-only.
#[test]
fn features_that_we_only_read() {
    requires!("/dev/fuse", "qemu-img");
    for (feature, args) in
        [("snapshot", &["snapshot", "-c", "s1"][..]), ("bitmap", &["bitmap", "--add"][..])]
    {
        let scratch = Scratch::new();
        let top = scratch.join("top.qcow2");
        qemu::create_full(&top, MIB, "", Pattern::new(60, 4));
        let mut command = Command::new("qemu-img");
        command.args(args).arg(&top);
        if feature == "bitmap" {
            command.arg("b0");
        }
        run_ok(&mut command);
        top_refused(&scratch, &[feature]);
        let before = fs::read(&top).expect("image");
        let disk = Mount::new(&scratch, &top).args(&["--read-only"]).start();
        assert_same(feature, &disk.read_all(), &Pattern::new(60, 4).bytes(0, MIB));
        disk.umount();
        assert_same("the image", &fs::read(&top).expect("image"), &before);
    }
}

/// Protects: V2 to V13: invalid numbers in a header are errors, without a panic, a hang or a huge
/// allocation.
#[test]
fn hostile_headers() {
    requires!("/dev/fuse", "qemu-img");
    let scratch = Scratch::new();
    let top = good(&scratch);
    let healthy = fs::read(&top).expect("image");
    let patches: &[(u64, &[u8])] = &[
        (header::AT_VERSION, &[0, 0, 0, 1]),
        (header::AT_VERSION, &[0, 0, 0, 4]),
        (header::AT_CLUSTER_BITS, &[0, 0, 0, 0]),
        (header::AT_CLUSTER_BITS, &[0, 0, 0, 8]),
        (header::AT_CLUSTER_BITS, &[0, 0, 0, 22]),
        (header::AT_CLUSTER_BITS, &[0, 0, 0, 64]),
        (header::AT_CLUSTER_BITS, &[0xff; 4]),
        (header::AT_SIZE, &[0x7f, 0xff, 0xff, 0xff, 0xff, 0xff, 0xfe, 0]),
        (header::AT_SIZE, &[0xff; 8]),
        (header::AT_L1_SIZE, &[0, 0, 0, 0]),
        (header::AT_L1_SIZE, &[0xff; 4]),
        (header::AT_L1_SIZE, &[0x7f, 0xff, 0xff, 0xff]),
        (header::AT_L1_OFFSET, &[0, 0, 0, 0, 0, 0, 0, 1]),
        (header::AT_L1_OFFSET, &[0x7f, 0xff, 0xff, 0xff, 0xff, 0xff, 0, 0]),
        (header::AT_L1_OFFSET, &[0, 0, 0, 1, 0, 0, 0, 0]),
        (header::AT_REFCOUNT_TABLE_OFFSET, &[0, 0, 0, 0, 0, 0, 0, 0]),
        (header::AT_REFCOUNT_TABLE_OFFSET, &[0, 0, 0, 0, 0, 0, 2, 1]),
        (header::AT_REFCOUNT_TABLE_OFFSET, &[0, 0, 0, 1, 0, 0, 0, 0]),
        (header::AT_REFCOUNT_TABLE_CLUSTERS, &[0, 0, 0, 0]),
        (header::AT_REFCOUNT_TABLE_CLUSTERS, &[0xff; 4]),
        (header::AT_REFCOUNT_ORDER, &[0, 0, 0, 7]),
        (header::AT_REFCOUNT_ORDER, &[0xff; 4]),
        (header::AT_HEADER_LENGTH, &[0, 0, 0, 72]),
        (header::AT_HEADER_LENGTH, &[0xff; 4]),
        (header::AT_BACKING_OFFSET, &[0xff; 8]),
        (header::AT_BACKING_SIZE, &[0, 0, 4, 0]),
        (header::AT_BACKING_SIZE, &[0xff; 4]),
    ];
    for (at, bytes) in patches {
        eprintln!("{bytes:x?} at {at}");
        fs::write(&top, &healthy).expect("image");
        header::poke(&top, *at, bytes);
        top_refused(&scratch, &["top.qcow2"]);
    }
    // An extension that claims to be longer than the file.
    fs::write(&top, &healthy).expect("image");
    let length = header::Header::load(&top).fields.len() as u64;
    header::poke(&top, length + 4, &[0xff, 0xff, 0xff, 0xf0]);
    top_refused(&scratch, &["top.qcow2"]);
}

/// Protects: the socket of a running process is not taken over, and a file that is not a socket is
/// not removed.
#[test]
fn socket_paths_that_are_taken() {
    requires!("/dev/fuse", "qemu-img");
    let scratch = Scratch::new();
    good(&scratch);
    scratch.write("file.sock", b"not a socket");
    refused(&scratch, &["--qmp", "file.sock", "top.qcow2", "disk"], &["file.sock"]);
    refused(&scratch, &["--qmp", "nowhere/qmp.sock", "top.qcow2", "disk"], &["nowhere/qmp.sock"]);
    refused(
        &scratch,
        &["--qmp", &"x".repeat(120), "top.qcow2", "disk"],
        &["up to 107 bytes; choose a shorter one"],
    );
    let _listener = UnixListener::bind(scratch.join("live.sock")).expect("bind");
    refused(&scratch, &["--qmp", "live.sock", "top.qcow2", "disk"], &["live.sock"]);

    let other = Rig::new(64 * KIB);
    let disk = other.mount().qmp().start();
    let socket = disk.socket().to_str().expect("UTF-8").to_owned();
    refused(&scratch, &["--qmp", &socket, "top.qcow2", "disk"], &["drive0.sock"]);
    assert_eq!(
        QmpClient::connect(disk.socket()).ok("query-block-jobs", json!({})),
        json!([]),
        "the other daemon still has its socket"
    );
    disk.umount();
}

/// Protects: one error is one line, whatever characters are in the name that it reports.
#[test]
fn names_with_control_characters_stay_on_the_line() {
    requires!("/dev/fuse", "qemu-img");
    let scratch = Scratch::new();
    good(&scratch);
    refused(
        &scratch,
        &["no\ncordisk: such\x1b[31m.qcow2", "disk"],
        &["no\\ncordisk: such\\u{1b}[31m.qcow2: no such file"],
    );
    refused(&scratch, &["top.qcow2", "no\nwhere/disk"], &["no\\nwhere/disk: no such file"]);
    refused(
        &scratch,
        &["--qmp", "no\nwhere/qmp.sock", "top.qcow2", "disk"],
        &["no\\nwhere/qmp.sock"],
    );
}

/// Protects: wrong usage differs from failures: exit status 2, one line (the help text without any
/// argument), and no effect.
#[test]
fn wrong_usage_is_status_2() {
    let scratch = Scratch::new();
    let before = Snapshot::of(scratch.path());
    for args in [
        &[][..],
        &["frobnicate"],
        &["mount"],
        &["mount", "top.qcow2"],
        &["mount", "top.qcow2", "disk", "extra"],
        &["mount", "--no-such-option", "top.qcow2", "disk"],
        &["mount", "--speed", "fast", "--stream", "top.qcow2", "disk"],
        &["mount", "--speed", "-1", "--stream", "top.qcow2", "disk"],
        &["mount", "--speed", "8Q", "--stream", "top.qcow2", "disk"],
        &["mount", "--backing-format", "vmdk", "top.qcow2", "disk"],
        &["create"],
        &["create", "new.qcow2"],
        &["create", "new.qcow2", "-b", "base.raw"],
        &["create", "new.qcow2", "-b", "base.raw", "-F", "vmdk"],
        &["create", "new.qcow2", "-b", "base.raw", "-F", "raw", "many"],
    ] {
        let done = attempt(&scratch, None, args);
        assert_eq!(done.status.code(), Some(2), "{args:?}: {done:?}");
        let one_line = done.stderr.lines().count() == 1
            && done.stderr.starts_with("cordisk: ")
            && done.stderr.ends_with(" --help\n");
        assert!(one_line != args.is_empty() && !done.stderr.is_empty(), "{args:?}: {done:?}");
        assert_eq!(before.changes(&Snapshot::of(scratch.path())), Vec::<String>::new(), "{args:?}");
    }
    for args in [&["--help"][..], &["--version"], &["mount", "--help"], &["create", "--help"]] {
        let done = attempt(&scratch, None, args);
        assert!(done.status.success() && done.stdout.contains("cordisk"), "{args:?}: {done:?}");
    }
}

/// Protects: the exit status is right even if the reader of standard error has gone: no panic, no
/// abort.
#[test]
fn a_reader_of_errors_who_is_gone_changes_nothing() {
    let missing = ["/nowhere/image", "/nowhere/disk"];
    for command in [&["mount", "-f"][..], &["mount"]] {
        let (reader, writer) = std::io::pipe().expect("pipe");
        drop(reader);
        let mut child = Command::new(CORDISK);
        child.args(command).args(missing).stdin(Stdio::null()).stdout(Stdio::null()).stderr(writer);
        let mut child = child.spawn().expect("cordisk");
        let status = poll(LIMIT, || child.try_wait().expect("wait"));
        let _ = child.kill();
        assert_eq!(status.and_then(|status| status.code()), Some(1), "{command:?}: {status:?}");
    }
}

/// Protects: a resource limit that is too small for a disk is one line of error before anything is
/// mounted, and a limit that is just large enough works.
#[test]
fn a_small_limit_is_refused_in_one_line() {
    requires!("/dev/fuse", "qemu-img");
    let rig = Rig::new(MIB);
    let mount = |limit: &str, foreground: &str| {
        let mut command = rig.scratch.cordisk();
        let inner = command
            .get_envs()
            .filter_map(|(name, value)| Some((name.to_owned(), value?.to_owned())))
            .collect::<Vec<_>>();
        command = Command::new("sh");
        command.envs(inner).args([
            "-c",
            &format!("ulimit {limit} && exec \"$0\" mount {foreground} \"$1\" \"$2\""),
            CORDISK,
        ]);
        run_within(command.arg(&rig.overlay).arg(rig.scratch.join("m")), Duration::from_secs(60))
    };
    for (limit, what) in [
        ("-n 20", "limit of open files is 20"),
        ("-v 300000", "limit of address space is 29"),
        ("-d 100000", "limit of memory is 9"),
    ] {
        for foreground in ["", "-f"] {
            let done = mount(limit, foreground);
            assert_eq!(
                (done.status.code(), done.stderr.lines().count()),
                (Some(1), 1),
                "{limit}: {done:?}"
            );
            assert!(
                done.stderr.contains(what)
                    && done.stderr.contains(&format!("ulimit {}", &limit[..2])),
                "{limit}: {done:?}"
            );
            assert!(!rig.scratch.join("m").exists(), "{limit}");
        }
    }
    // The soft limit is raised as far as the disk needs.
    let done = mount("-S -n 20", "");
    assert!(done.status.success(), "{done:?}");
    assert_eq!(fs::read(rig.scratch.join("m")).expect("read"), rig.content);
    crate::support::run_ok(rig.scratch.cordisk().arg("umount").arg(rig.scratch.join("m")));
}
