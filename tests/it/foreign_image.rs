//! Images of other users: which backing files root opens for them, and the errors about those
//! files.

use std::fs::{self, Permissions};
use std::os::unix::fs::{PermissionsExt, chown};
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use crate::bad_input::refused;
use crate::support::header;
use crate::support::{Finished, KIB, MIB, Mount, Pattern, Scratch, assert_same, qemu, run_within};

/// A user and a group that have no names; the user is not in the group.
const ALICE: u32 = 61_234;
const GROUP: u32 = 61_999;

fn run(scratch: &Scratch, args: &[&str]) -> Finished {
    run_within(scratch.cordisk().args(args).current_dir(scratch.path()), Duration::from_secs(60))
}

fn give(path: &Path, mode: u32, owner: u32) {
    fs::set_permissions(path, Permissions::from_mode(mode)).expect("chmod");
    chown(path, Some(owner), Some(owner)).expect("chown");
}

/// Makes `public`, `secret` (0600, of root), `alices` (0600) and `groups` (0640, of a group that
/// Alice is not in).
fn bases() -> Scratch {
    let scratch = Scratch::new();
    scratch.open_to_all();
    for (name, mode, owner) in
        [("public", 0o644, 0), ("secret", 0o600, 0), ("alices", 0o600, ALICE), ("groups", 0o640, 0)]
    {
        give(&scratch.raw(name, 64 * KIB, Pattern::new(95, 1)), mode, owner);
    }
    chown(scratch.join("groups"), None, Some(GROUP)).expect("chgrp");
    scratch
}

/// Makes an image of this user above this file. The group of the image is that of `groups`, and
/// must not matter.
fn image(scratch: &Scratch, name: &str, owner: u32, base: (&str, &str)) {
    qemu::img(&[
        "create",
        "-q",
        "-u",
        "-f",
        "qcow2",
        "-b",
        base.0,
        "-F",
        base.1,
        scratch.join(name).to_str().expect("UTF-8"),
        "64k",
    ]);
    give(&scratch.join(name), 0o644, owner);
    chown(scratch.join(name), None, Some(GROUP)).expect("chgrp");
}

/// Protects: an image cannot make root read a file that the image's owner may not read, at any
/// depth of the chain. A file that the owner may read is opened, and root's own images may have
/// root's files below them.
#[test]
fn root_opens_what_the_owner_of_the_image_may_read() {
    requires!("/dev/fuse", "qemu-img", "root");
    let scratch = bases();
    image(&scratch, "middle-of-alice", ALICE, ("secret", "raw"));
    for (owner, base, works) in [
        (ALICE, ("public", "raw"), true),
        (ALICE, ("alices", "raw"), true),
        (ALICE, ("secret", "raw"), false),
        (ALICE, ("groups", "raw"), false),
        (ALICE, ("middle-of-alice", "qcow2"), false),
        (0, ("secret", "raw"), true),
        (0, ("middle-of-alice", "qcow2"), false),
    ] {
        let what = format!("{base:?} below an image of {owner}");
        let _ = fs::remove_file(scratch.join("top"));
        image(&scratch, "top", owner, base);
        if works {
            let disk = Mount::new(&scratch, &scratch.join("top")).start();
            assert_same(&what, &disk.read_all(), &Pattern::new(95, 1).bytes(0, 64 * KIB));
            disk.umount();
        } else {
            refused(
                &scratch,
                &["top", "disk"],
                &[&format!(
                    "with the rights of user {ALICE}: let that user read it, or, if what the image names can be trusted, chown root"
                )],
            );
        }
        for command in [&["map", "top"][..], &["info", "--backing-chain", "top"]] {
            let done = run(&scratch, command);
            assert_eq!(done.status.success(), works, "{command:?}, {what}: {done:?}");
        }
        // These commands open no backing file.
        for command in [&["check", "top"][..], &["info", "top"]] {
            assert!(run(&scratch, command).status.success(), "{command:?}, {what}");
        }
    }
    let done = run(&scratch, &["create", "new", "-b", "secret", "-F", "raw"]);
    assert!(done.status.success(), "root's own word: {done:?}");
    let done = run(&scratch, &["create", "newer", "-b", "middle-of-alice", "-F", "qcow2"]);
    assert!(!done.status.success() && !scratch.join("newer").exists(), "and not Alice's: {done:?}");
}

/// Protects: with `--user`, the rights of that user count, not those of the image's owner.
#[test]
fn with_user_that_user_has_to_be_able_to_read_it() {
    requires!("/dev/fuse", "qemu-img", "root");
    let user = format!("{ALICE}:{ALICE}");
    for (owner, base, works) in [
        (0, "public", true),
        (0, "alices", true),
        (0, "secret", false),
        (ALICE, "secret", false),
        (61_235, "alices", true),
    ] {
        // Each case has its own log, because the test reads there that the disk is served.
        let scratch = bases();
        image(&scratch, "top", owner, (base, "raw"));
        if works {
            Mount::new(&scratch, &scratch.join("top"))
                .args(&["--user", &user])
                .start_settled()
                .umount();
        } else {
            refused(
                &scratch,
                &["--user", &user, "top", "disk"],
                &[&format!("with the rights of user {ALICE}")],
            );
        }
        // `--backing-root` does not replace these rights.
        let root = scratch.path().to_str().expect("UTF-8").to_owned();
        if !works {
            refused(
                &scratch,
                &["--user", &user, "--backing-root", &root, "top", "disk"],
                &[&format!("with the rights of user {ALICE}")],
            );
        }
    }
    let scratch = bases();
    image(&scratch, "top", 61_235, ("alices", "raw"));
    refused(
        &scratch,
        &["--user", &user, "--backing-root", "/usr", "top", "disk"],
        &["does not lie below --backing-root"],
    );
}

/// Protects: the error of a missing backing file names the file, the image that names it, at any
/// depth of the chain, and the command that repairs it.
#[test]
fn a_missing_backing_file_is_called_that() {
    requires!("/dev/fuse", "qemu-img");
    let scratch = Scratch::new();
    scratch.raw("golden", MIB, Pattern::new(96, 1));
    scratch.dir("elsewhere");
    qemu::create(&scratch.join("vm"), None, "", Some(("golden", "raw")));
    qemu::create(&scratch.join("top"), None, "", Some(("vm", "qcow2")));
    fs::copy(scratch.join("vm"), scratch.join("elsewhere/vm")).expect("copy");
    let words = |dir: &str| {
        let dir = scratch.join(dir).display().to_string().trim_end_matches('/').to_lowercase();
        format!(
            "{dir}/vm: its backing file {dir}/golden does not exist; put it there, or name the place where it is now: qemu-img rebase -u -f raw -b path {dir}/vm"
        )
    };
    refused(&scratch, &["elsewhere/vm", "disk"], &[&words("elsewhere")]);
    fs::rename(scratch.join("golden"), scratch.join("gold")).expect("rename");
    refused(&scratch, &["vm", "disk"], &[&words("")]);
    refused(&scratch, &["top", "disk"], &[&words("")]);
    // The command in the error message works.
    qemu::img(&[
        "rebase",
        "-u",
        "-F",
        "raw",
        "-b",
        "gold",
        scratch.join("vm").to_str().expect("UTF-8"),
    ]);
    Mount::new(&scratch, &scratch.join("top")).start().umount();
}

/// Protects: the error for an image in use names the process that uses it, and the disk.
#[test]
fn the_user_of_a_busy_file_is_named() {
    requires!("/dev/fuse", "qemu-img", "root");
    let scratch = Scratch::new();
    scratch.raw("base.raw", MIB, Pattern::new(97, 1));
    qemu::create(&scratch.join("middle.qcow2"), None, "", Some(("base.raw", "raw")));
    qemu::create(&scratch.join("top.qcow2"), None, "", Some(("middle.qcow2", "qcow2")));
    let disk = Mount::new(&scratch, &scratch.join("top.qcow2")).start();
    let done = run(&scratch, &["mount", "middle.qcow2", "other"]);
    let pid = disk.server_pid().as_raw_nonzero();
    assert!(!done.status.success() && done.stderr.lines().count() == 1, "{done:?}");
    for words in [
        format!("middle.qcow2: in use by another process, {pid} cordisk"),
        format!(
            "serves the disk at {}, for whose image {}/top.qcow2 the file is a backing file",
            disk.path().display(),
            scratch.path().display()
        ),
    ] {
        assert!(done.stderr.contains(&words), "{words} in {}", done.stderr);
    }
    disk.umount();
}

/// Protects: `-F` and `--backing-format` do not override the format of the file.
#[test]
fn formats_that_contradict_are_refused_or_warned_of() {
    requires!("/dev/fuse", "qemu-img");
    let scratch = Scratch::new();
    scratch.raw("base.raw", MIB, Pattern::new(98, 1));
    qemu::create(&scratch.join("base.qcow2"), Some(MIB), "", None);
    let created = |args: &[&str]| {
        let done = run(&scratch, &[&["create", "new"], args].concat());
        assert!(done.status.success(), "{args:?}: {done:?}");
        fs::remove_file(scratch.join("new")).expect("it was made");
        done.stderr
    };
    assert_eq!(created(&["-b", "base.raw", "-F", "raw"]), "");
    assert_eq!(created(&["-b", "base.qcow2", "-F", "qcow2"]), "");
    assert_eq!(created(&["-b", "base.raw", "-F", "raw", "2M"]), "");
    let warning = created(&["-b", "base.qcow2", "-F", "raw"]);
    assert!(
        warning.contains(
            "begins like a qcow2 image, but -F raw shows the bytes of the file as they are"
        ),
        "{warning}"
    );
    let warning = created(&["-b", "base.raw", "-F", "raw", "512K"]);
    assert!(
        warning.contains("new has 524288 bytes, fewer than its base with 1048576"),
        "{warning}"
    );
    let warning = created(&["-b", "base.raw", "-F", "raw", "4K"]);
    assert!(warning.contains("less than one cluster of 131072"), "{warning}");

    qemu::create(&scratch.join("top"), None, "", Some(("base.raw", "raw")));
    refused(
        &scratch,
        &["--backing-format", "qcow2", "top", "disk"],
        &[
            "--backing-format qcow2 contradicts the image, which says that its backing file \"base.raw\" is raw",
        ],
    );
    Mount::new(&scratch, &scratch.join("top")).args(&["--backing-format", "raw"]).start().umount();
}

/// Adds a cluster to an image with clusters of 64 KiB that only a refcount block counts.
fn leak_a_cluster(image: &Path) {
    let bytes = fs::read(image).expect("image");
    let word = |at: u64| {
        u64::from_be_bytes(
            bytes[usize::try_from(at).expect("small")..][..8].try_into().expect("eight bytes"),
        )
    };
    let clusters = bytes.len().div_ceil(65536) as u64;
    let file = fs::File::options().write(true).open(image).expect("image");
    file.set_len((clusters + 1) * 65536).expect("one more");
    header::poke(image, word(word(48)) + 2 * clusters, &[0, 1]);
}

/// Protects: unknown formats do not prevent commands that do not need them, and errors name the
/// format.
#[test]
fn foreign_formats_are_named() {
    requires!("/dev/fuse", "qemu-img");
    let scratch = Scratch::new();
    let raw = scratch.raw("base.raw", MIB, Pattern::new(99, 1));
    let raw = raw.to_str().expect("UTF-8");
    for (format, name) in
        [("vmdk", "VMDK"), ("vdi", "VDI"), ("vhdx", "VHDX"), ("vpc", "VHD"), ("qed", "QED")]
    {
        let (file, top) = (format!("base.{format}"), format!("above-{format}"));
        let at = |name: &str| scratch.join(name).to_str().expect("UTF-8").to_owned();
        qemu::img(&["convert", "-O", format, raw, &at(&file)]);
        for command in ["info", "check", "map"] {
            let done = run(&scratch, &[command, &file]);
            assert!(
                !done.status.success() && done.stderr.contains(&format!("a {name} image")),
                "{command}: {done:?}"
            );
        }
        refused(
            &scratch,
            &[&file, "disk"],
            &[&format!(
                "a {name} image, not qcow2; make one of it: qemu-img convert -f {format} -O qcow2"
            )],
        );
        qemu::img(&["create", "-q", "-f", "qcow2", "-b", &file, "-F", format, &at(&top)]);
        let info = run(&scratch, &["info", &top]);
        assert!(
            info.status.success()
                && info.stdout.contains(&format!("backing file format: {format}\n")),
            "{info:?}"
        );
        let check = run(&scratch, &["check", &top]);
        assert!(
            check.status.success() && check.stdout.contains("No errors were found"),
            "{check:?}"
        );
        // A repair works too, because it writes only to the overlay.
        let (overlay, below) = (at(&top), fs::read(scratch.join(&file)).expect("base"));
        qemu::io(Path::new(&overlay), &["write -P 7 0 64k"]);
        let sound = fs::read(&overlay).expect("overlay");
        leak_a_cluster(Path::new(&overlay));
        let repaired = run(&scratch, &["check", "--repair", "leaks", &top]);
        assert!(
            repaired.status.success()
                && repaired.stdout.contains("repaired:\n\n    1 leaked clusters\n"),
            "{repaired:?}"
        );
        qemu::assert_clean(Path::new(&overlay));
        assert_eq!(
            fs::read(&overlay).expect("overlay")[..sound.len()],
            sound,
            "{format}: nothing else has changed"
        );
        assert!(fs::read(scratch.join(&file)).expect("base") == below, "{file} is not written");
        let chain = run(&scratch, &["info", "--backing-chain", &top]);
        assert!(
            !chain.status.success()
                && chain
                    .stderr
                    .contains(&format!("is of format {format}, which is not known here")),
            "{chain:?}"
        );
        refused(
            &scratch,
            &[&top, "disk"],
            &[&format!("backing format \"{format}\" is not supported")],
        );
    }
}

/// Protects: root of a user namespace of an ordinary user finds and controls the disks that it has
/// mounted.
#[test]
fn root_of_a_user_namespace_controls_its_disks() {
    requires!("/dev/fuse", "qemu-img", "root", "unshare", "setpriv", "mknod", "sh", "mount");
    let scratch = Scratch::new();
    scratch.open_to_all();
    give(&scratch.raw("base.raw", MIB, Pattern::new(90, 1)), 0o644, 0);
    // The owner has no number in the namespace.
    qemu::create(&scratch.join("middle"), None, "", Some(("base.raw", "raw")));
    give(&scratch.join("middle"), 0o644, 0);
    qemu::create(&scratch.join("top"), None, "", Some(("middle", "qcow2")));
    give(&scratch.join("top"), 0o600, ALICE);
    give(&scratch.dir("home"), 0o700, ALICE);
    let program = scratch.join("cordisk");
    fs::copy(crate::support::CORDISK, &program).expect("copy of the program");
    give(&program, 0o755, 0);
    // Every user may open this /dev/fuse, as on most systems.
    let script = "mknod \"$0/fuse\" c 10 229 && chmod 666 \"$0/fuse\" && mount --bind \"$0/fuse\" /dev/fuse || exit 77
        exec setpriv --reuid 61234 --regid 61234 --clear-groups env -u CORDISK_RUNTIME_DIR -u XDG_RUNTIME_DIR unshare -Urm sh -c '
            cd \"$0/home\" && \"$0/cordisk\" mount ../top disk && \"$0/cordisk\" status disk && \"$0/cordisk\" stream --wait disk
            result=$?
            \"$0/cordisk\" umount disk || umount disk
            exit $result' \"$0\"";
    let done = run_within(
        Command::new("unshare").args(["-m", "sh", "-c", script]).arg(scratch.path()),
        Duration::from_secs(60),
    );
    let _ = fs::remove_dir(format!("/tmp/cordisk-{ALICE}"));
    if done.status.code() == Some(77) || done.stderr.contains("unshare failed") {
        eprintln!("skipped: this machine gives users no namespace: {}", done.stderr);
        return;
    }
    assert!(done.status.success() && done.stdout.contains("running"), "{done:?}");
    qemu::assert_independent(&scratch.join("top"));
}
