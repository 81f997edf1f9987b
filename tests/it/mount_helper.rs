//! `mount -t fuse.cordisk` and /etc/fstab: mount(8) calls the program by the name of its helper.
//!
//! mount(8) looks for helpers in /sbin only, where tests install nothing. So the link is in an
//! overlay on /usr/sbin, in a mount namespace of the test.

use std::fs;
use std::os::unix::fs::{FileExt, MetadataExt, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use crate::support::{
    CORDISK, Finished, MIB, Pattern, Scratch, assert_same, mounts, poll, qemu, run_ok, run_within,
};

struct Bench {
    scratch: Scratch,
    helper: PathBuf,
    content: Vec<u8>,
}

impl Bench {
    /// Makes `base.raw`, `vm.qcow2` above it, the mountpoint `vm.raw`, and `mount.fuse.cordisk`.
    fn new() -> Bench {
        let scratch = Scratch::new();
        let content = Pattern::new(61, 1).bytes(0, 4 * MIB);
        let base = scratch.write("base.raw", &content);
        qemu::create(
            &scratch.join("vm.qcow2"),
            None,
            "",
            Some((base.to_str().expect("UTF-8"), "raw")),
        );
        scratch.write("vm.raw", b"");
        let helper = scratch.join("mount.fuse.cordisk");
        symlink(CORDISK, &helper).expect("link");
        Bench { scratch, helper, content }
    }

    fn help(&self, args: &[&str]) -> Finished {
        run_within(
            Command::new(&self.helper).args(args).current_dir(self.scratch.path()),
            Duration::from_secs(60),
        )
    }
}

/// Protects: the helper mounts the disk with paths relative to the directory from which mount(8)
/// was called, and returns when the disk is mounted; umount(8) ends it.
#[test]
fn the_helper_mounts_and_umount_ends_it() {
    requires!("/dev/fuse", "qemu-img");
    let bench = Bench::new();
    let disk = bench.scratch.join("vm.raw");
    let options = format!(
        "rw,nosuid,_netdev,x-systemd.automount,qmp={},device=vm,stream,speed=50M",
        bench.scratch.join("a,b").display()
    );
    let options = options.replace("a,b", "\"a,b\"");
    let done = bench.help(&[
        "vm.qcow2",
        disk.to_str().expect("UTF-8"),
        "-o",
        &options,
        "-t",
        "fuse.cordisk",
    ]);
    assert_eq!(done.status.code(), Some(0), "{done:?}");
    assert_same("the disk", &fs::read(&disk).expect("read"), &bench.content);
    assert!(bench.scratch.join("a,b").exists(), "the socket whose name has a comma");
    mounts::umount(&disk);
    let gone =
        poll(Duration::from_secs(30), || (!bench.scratch.join("a,b").exists()).then_some(()));
    assert!(gone.is_some(), "the daemon ends when its disk is unmounted");
}

/// Protects: the exit status is what mount(8) expects: 1 for wrong usage, 32 for a failed mount.
/// Nothing is mounted in these cases, nor with -f.
#[test]
fn the_exit_status_is_that_of_mount() {
    requires!("/dev/fuse", "qemu-img");
    let bench = Bench::new();
    let disk = bench.scratch.join("vm.raw");
    let disk = disk.to_str().expect("UTF-8");
    let expect = |args: &[&str], status: i32, said: &str| {
        let done = bench.help(args);
        assert_eq!(done.status.code(), Some(status), "{args:?}: {done:?}");
        assert!(done.stderr.contains(said), "{args:?}: {done:?}");
        assert!(said.is_empty() || done.stderr.lines().count() == 1, "{args:?}: {done:?}");
        assert!(mounts::at(&bench.scratch.join("vm.raw")).is_none(), "{args:?}");
    };
    expect(
        &["vm.qcow2", disk, "-o", "rw,spede=1"],
        1,
        "mount.fuse.cordisk: unknown option 'spede=1'",
    );
    expect(&["vm.qcow2", disk, "-o", "stream,ro"], 1, "cannot be used with");
    expect(
        &["vm.qcow2"],
        1,
        "mount.fuse.cordisk: the following required arguments were not provided: <MOUNTPOINT>; see",
    );
    expect(&["missing.qcow2", disk, "-o", "rw"], 32, "missing.qcow2");
    expect(&["vm.qcow2", disk, "-o", "qmp=/nowhere/sock"], 32, "/nowhere/sock");
    expect(&["vm.qcow2", disk, "-f", "-o", "rw,stream"], 0, "");
    expect(
        &["vm.qcow2", disk, "-fv", "-o", "rw,stream"],
        0,
        "mount.fuse.cordisk: cordisk mount --stream -- vm.qcow2",
    );
    expect(&["vm.qcow2", disk, "-sf", "-o", "spede=1"], 0, "");
}

/// Runs `script` as root in a new mount namespace in which mount(8) finds the helper. `$s` is the
/// scratch directory.
fn with_helper(bench: &Bench, script: &str) -> String {
    // Mounts of other tests are detached first: in this namespace they would outlive their end
    // outside. tmpfs is used because not every file system can be the upper one of an overlay.
    let prepare = "set -eu; s=$1; trap 'umount -l \"$s/vm.raw\" 2>/dev/null || true' EXIT; \
                   findmnt -rn -o TARGET | grep /cordisk-test- | tac | while read -r m; do umount -l \"$m\" || true; done; \
                   mkdir -p $s/t; mount -t tmpfs tmpfs $s/t; \
                   mkdir $s/t/upper $s/t/work; mount -t overlay -o lowerdir=/usr/sbin,upperdir=$s/t/upper,workdir=$s/t/work overlay /usr/sbin; \
                   ln -s \"$2\" /usr/sbin/mount.fuse.cordisk; cd $s; ";
    let mut command = Command::new("unshare");
    command.args([
        "--mount",
        "--propagation",
        "private",
        "sh",
        "-c",
        &format!("{prepare}{script}"),
        "sh",
    ]);
    command.arg(bench.scratch.path()).arg(CORDISK);
    assert!(
        fs::canonicalize("/sbin").is_ok_and(|path| path == Path::new("/usr/sbin")),
        "a system whose /sbin is not /usr/sbin"
    );
    run_ok(&mut command)
}

/// Waits until the daemon has released its lock on the image.
const WAIT_FOR_END: &str = "i=0; while ! qemu-img check -q vm.qcow2 2>/dev/null; do i=$((i+1)); [ $i -lt 300 ] || exit 9; sleep 0.1; done; ";

/// Protects: `mount -t fuse.cordisk IMAGE FILE -o …` works, with an image path relative to the
/// current directory.
#[test]
fn mount_8_mounts_by_type() {
    requires!("/dev/fuse", "qemu-img", "root", "fs:overlay", "unshare");
    let bench = Bench::new();
    let said = with_helper(
        &bench,
        &format!(
            "mount -t fuse.cordisk vm.qcow2 $s/vm.raw -o qmp=$s/vm.sock,stream,speed=1G; cmp vm.raw base.raw; test -S vm.sock; \
             findmnt -n -o FSTYPE vm.raw; umount vm.raw; {WAIT_FOR_END} test ! -S vm.sock; \
             mount -r -t fuse.cordisk vm.qcow2 $s/vm.raw; findmnt -n -o OPTIONS vm.raw; cmp vm.raw base.raw; umount $s/vm.raw; {WAIT_FOR_END} \
             ! mount -t fuse.cordisk vm.qcow2 $s/vm.raw -o nonsense 2>&1"
        ),
    );
    let lines: Vec<&str> = said.lines().collect();
    assert_eq!(lines[0], "fuse.cordisk", "{said}");
    assert!(lines[1].starts_with("ro,"), "{said}");
    assert!(lines[2..].join("\n").contains("unknown option 'nonsense'"), "{said}");
}

/// Protects: a line of fstab(5) mounts the disk, once even if `mount -a` runs several times, with
/// the socket and the stream that it names, and is unmounted by its mountpoint.
#[test]
fn a_line_of_fstab_mounts() {
    requires!("/dev/fuse", "qemu-img", "root", "fs:overlay", "unshare");
    let bench = Bench::new();
    let (image, disk, socket) = (
        bench.scratch.join("vm.qcow2"),
        bench.scratch.join("vm.raw"),
        bench.scratch.join("vm.sock"),
    );
    let line = format!(
        "{} {} fuse.cordisk qmp={},stream,speed=50M,nofail,x-systemd.device-timeout=9 0 0\n",
        image.display(),
        disk.display(),
        socket.display()
    );
    bench.scratch.write("fstab", line.as_bytes());
    let said = with_helper(
        &bench,
        &format!(
            "mount -T fstab -a; cmp vm.raw base.raw; test -S vm.sock; mount -T fstab -a; findmnt -n -o TARGET -t fuse.cordisk | grep -c $s/vm.raw; \
             umount -T fstab vm.raw 2>/dev/null || umount vm.raw; {WAIT_FOR_END} mount -T fstab $s/vm.raw; cmp vm.raw base.raw; umount vm.raw; {WAIT_FOR_END}"
        ),
    );
    assert_eq!(said.trim(), "1", "mounted once");
}

/// Protects: `owner`, `mode` and `sync` apply to the file: stat(2) shows them, and a write is
/// durable accordingly.
#[test]
fn the_file_has_the_owner_and_mode_that_were_asked_for() {
    requires!("/dev/fuse", "qemu-img", "root");
    let bench = Bench::new();
    let disk = bench.scratch.join("vm.raw");
    let options = "allow_other,owner=65534:65533,mode=0640,sync,nofail,x-systemd.automount";
    let done = bench.help(&["vm.qcow2", disk.to_str().expect("UTF-8"), "-o", options]);
    assert_eq!(done.status.code(), Some(0), "{done:?}");
    let stat = fs::metadata(&disk).expect("stat");
    assert_eq!((stat.uid(), stat.gid(), stat.mode() & 0o7777), (65534, 65533, 0o640));
    let told = |name: &str| {
        let status = run_ok(Command::new(CORDISK).args(["status", "--json"]).arg(&disk));
        let status: serde_json::Value = serde_json::from_str(&status).expect("JSON");
        let kinds = status[0]["requests"].as_array().expect("requests").clone();
        kinds.iter().find(|kind| kind["kind"] == name).expect("kind")["operations"]
            .as_u64()
            .expect("a number")
    };
    fs::OpenOptions::new()
        .write(true)
        .open(&disk)
        .and_then(|file| file.write_at(b"x", 5))
        .expect("write");
    assert_eq!(told("write"), 1);
    assert!(told("flush") >= 1, "a write of a mount with `sync` is flushed");
    mounts::umount(&disk);
    let bad = bench.help(&["vm.qcow2", disk.to_str().expect("UTF-8"), "-o", "mode=0640"]);
    assert!(
        bad.status.code() != Some(0)
            && bad.stderr.contains("allow-other")
            && bad.stderr.lines().count() == 1,
        "{bad:?}"
    );
    let bad = bench.help(&[
        "vm.qcow2",
        disk.to_str().expect("UTF-8"),
        "-o",
        "allow_other,owner=nobody-of-this-name",
    ]);
    assert!(
        bad.status.code() == Some(32)
            && bad.stderr.contains("there is no user nobody-of-this-name"),
        "{bad:?}"
    );
    assert!(mounts::at(&disk).is_none());
}
