//! The next daemon replaces the remains of a killed one: the dead mount, the placeholder, the
//! pidfile, the socket, and the leaked clusters. Files and mounts of other programs stay.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use rustix::fs::fallocate;
use rustix::io::Errno;
use serde_json::json;

use crate::hung_backing::Stopped;
use crate::support::guest::PUNCH;
use crate::support::{
    CORDISK, Finished, KIB, MIB, Mount, Pattern, RUNTIME_DIR, Rig, Rng, assert_same, errno, mounts,
    poll, qemu, run_within,
};

/// The extended attribute of an image that was not closed.
const MARK: &str = "user.cordisk.open";

/// Whether an image has the mark of an image that was not closed.
pub(crate) fn is_marked(image: &Path) -> bool {
    let file = File::open(image).expect("image");
    match rustix::fs::fgetxattr(&file, MARK, &mut [0u8; 16]) {
        Ok(_) => true,
        Err(Errno::NODATA | Errno::OPNOTSUPP) => false,
        Err(error) => panic!("{}: {error}", image.display()),
    }
}

/// Runs `cordisk mount -f IMAGE MOUNTPOINT`, which must end by itself.
fn mount(image: &Path, mountpoint: &Path) -> Finished {
    let runtime = image.parent().expect("directory").join("run");
    run_within(
        Command::new(CORDISK)
            .env(RUNTIME_DIR, runtime)
            .args(["mount", "-f"])
            .arg(image)
            .arg(mountpoint),
        Duration::from_secs(30),
    )
}

fn assert_refused(done: &Finished, words: &[&str]) {
    assert_eq!(done.status.code(), Some(1), "{done:?}");
    assert_eq!(
        done.stderr.lines().filter(|line| line.starts_with("cordisk: ")).count(),
        1,
        "one line: {done:?}"
    );
    assert!(words.iter().all(|word| done.stderr.contains(word)), "{words:?} in {done:?}");
}

/// Returns the number of mounts at a path.
fn layers(path: &Path) -> usize {
    mounts::table().iter().filter(|entry| entry.mountpoint == path).count()
}

/// Protects: a mount that is refused when the image is already open closes it, so that the next
/// mount finds no mark and does not search for leaks.
#[test]
fn a_mount_that_is_refused_leaves_no_mark() {
    requires!("/dev/fuse", "qemu-img");
    let rig = Rig::new(MIB);
    let socket = rig.scratch.join("taken");
    let _taken = UnixListener::bind(&socket).expect("bind");
    let (runtime, mountpoint) = (rig.scratch.join("run"), rig.scratch.join("refused"));
    let mut command = Command::new(CORDISK);
    command.env(RUNTIME_DIR, runtime).args(["mount", "-f", "--qmp"]);
    let done =
        run_within(command.args([&socket, &rig.overlay, &mountpoint]), Duration::from_secs(30));
    assert_refused(&done, &["taken"]);
    assert!(!is_marked(&rig.overlay), "{done:?}");
    let disk = rig.mount().start();
    assert!(is_marked(&rig.overlay), "the file system has marks");
    disk.umount();
}

/// Protects: P14: after a kill the disk is mounted again at once, at the same place, with the same
/// socket and pidfile, and has the data that was flushed.
#[test]
fn a_killed_daemon_is_replaced_at_once() {
    requires!("/dev/fuse", "qemu-img");
    let rig = Rig::new(4 * MIB);
    let pidfile = rig.scratch.join("pid");
    let pidfile = pidfile.to_str().expect("UTF-8");
    let mut content = rig.content.clone();
    for round in 0..3u32 {
        let disk = rig.mount().qmp().args(&["--pidfile", pidfile]).start();
        let path = disk.path().to_owned();
        assert_same("mounted again", &disk.read_all(), &content);
        let file = disk.open();
        let data = Pattern::new(80, round + 2).bytes(70_000, 200_000);
        file.write_all_at(&data, 70_000).expect("write");
        content[70_000..270_000].copy_from_slice(&data);
        file.sync_all().expect("fsync");
        disk.die();
        assert_eq!(errno(file.read_at(&mut [0], 0)), Errno::NOTCONN, "whoever has it open");
        assert_eq!(errno(File::open(&path)), Errno::NOTCONN, "whoever opens it");
        assert_eq!(layers(&path), 1, "the dead mount is there");
    }
    let disk = rig.mount().qmp().args(&["--pidfile", pidfile]).start();
    let path = disk.path().to_owned();
    assert_eq!(layers(&path), 1, "and none below the new one");
    assert_same("mounted again", &disk.read_all(), &content);
    disk.client().ok("query-block-jobs", json!({}));
    disk.umount();
    assert!(!path.exists() && !Path::new(pidfile).exists(), "placeholder and pidfile are gone");
    rig.assert_overlay(&content);
}

/// Protects: several dead mounts on top of each other are all removed.
#[test]
fn dead_mounts_on_top_of_each_other_are_all_removed() {
    requires!("/dev/fuse", "qemu-img", "root");
    let rig = Rig::new(MIB);
    let disk = rig.mount().start();
    let path = disk.path().to_owned();
    for _ in 0..2 {
        rustix::mount::mount_bind(&path, &path).expect("bind mount on itself");
    }
    disk.die();
    assert_eq!(layers(&path), 3);
    let disk = rig.mount().start();
    assert_eq!(layers(&path), 1);
    assert_same("the disk", &disk.read_all(), &rig.content);
    disk.umount();
    assert_eq!(layers(&path), 0);
}

/// Protects: a live mount is never removed, whichever program serves it.
#[test]
fn a_live_mount_is_never_removed() {
    requires!("/dev/fuse", "qemu-img");
    let rig = Rig::new(MIB);
    let other = rig.scratch.join("other.qcow2");
    qemu::create(&other, Some(MIB), "", None);
    // Read-only, so that the same image can be opened once more.
    let disk = rig.mount().args(&["--read-only"]).start();
    assert_refused(&mount(&other, disk.path()), &["already mounted (fuse.cordisk)"]);
    let same = run_within(
        rig.scratch
            .cordisk()
            .args(["mount", "-f", "--read-only"])
            .arg(&rig.overlay)
            .arg(disk.path()),
        Duration::from_secs(30),
    );
    assert_refused(&same, &["already mounted (fuse.cordisk)"]);
    assert_same("still served", &disk.read_all(), &rig.content);
    disk.umount();
}

/// Protects: a dead mount of another image is not removed, because a user may look for the data of
/// that image there.
#[test]
fn a_dead_mount_of_another_image_is_refused() {
    requires!("/dev/fuse", "qemu-img");
    let rig = Rig::new(MIB);
    let other = rig.scratch.join("other.qcow2");
    qemu::create(&other, Some(MIB), "", None);
    let disk = rig.mount().start();
    let path = disk.path().to_owned();
    disk.die();
    let overlay = rig.overlay.to_str().expect("UTF-8");
    assert_refused(
        &mount(&other, &path),
        &["another image", overlay, &format!("umount -l {}", path.display())],
    );
    assert_eq!(layers(&path), 1, "it is still there");
    // If the same image is given by another name, its dead mount is removed.
    let link = rig.scratch.join("link.qcow2");
    std::os::unix::fs::symlink(&rig.overlay, &link).expect("symlink");
    let disk = Mount::new(&rig.scratch, &link).start();
    assert_same("the disk", &disk.read_all(), &rig.content);
    disk.umount();
}

/// Protects: a mountpoint whose daemon is stopped is refused at once. Only a mount of the same
/// image is checked for a dead daemon, and that check has a time limit.
#[test]
fn a_mount_whose_daemon_stands_still_is_refused() {
    requires!("/dev/fuse", "qemu-img");
    let rig = Rig::new(MIB);
    let other = rig.scratch.join("other.qcow2");
    qemu::create(&other, Some(MIB), "", None);
    let disk = rig.mount().args(&["--read-only"]).start();
    let stopped = Stopped::stop(disk.server_pid());
    let overlay = rig.overlay.to_str().expect("UTF-8");
    assert_refused(
        &mount(&other, disk.path()),
        &["already mounted (fuse.cordisk)", "another image", overlay],
    );
    // Read-only, so that the same image can be opened once more.
    let same = ["mount", "-f", "--read-only"];
    let same = run_within(
        rig.scratch.cordisk().args(same).arg(&rig.overlay).arg(disk.path()),
        Duration::from_secs(30),
    );
    assert_refused(&same, &["already mounted (fuse.cordisk)"]);
    drop(stopped);
    assert_eq!(layers(disk.path()), 1);
    assert_same("still served", &disk.read_all(), &rig.content);
    disk.umount();
}

/// A child that is killed and reaped when dropped.
struct Server(Child);

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Protects: a dead mount of another program is never removed.
#[test]
fn a_dead_mount_of_another_program_is_refused() {
    requires!("/dev/fuse", "qemu-img", "nbdkit", "nbdfuse");
    let rig = Rig::new(MIB);
    let path = rig.scratch.write("drive0.disk", b"");
    let mut command = Command::new("nbdfuse");
    command.arg(&path).args(["[", "nbdkit", "--exit-with-parent", "memory", "1M", "]"]);
    let mut server = Server(command.stdin(Stdio::null()).spawn().expect("nbdfuse"));
    let served = || fs::metadata(&path).is_ok_and(|meta| meta.len() == MIB).then_some(());
    assert!(poll(Duration::from_secs(20), served).is_some(), "nbdfuse does not serve");
    server.0.kill().expect("kill");
    server.0.wait().expect("wait");
    assert!(mounts::is_dead(&path));
    assert_refused(
        &mount(&rig.overlay, &path),
        &["already mounted (fuse", "if its daemon is gone: umount -l"],
    );
    assert_eq!(layers(&path), 1, "it is still there");
}

/// Protects: P4: after a kill in the middle of a stream and of a guest's writes, discards and
/// flushes, one mount and unmount leaves no leaked clusters, and the open mark is removed.
#[test]
fn what_a_kill_leaked_is_given_back() {
    requires!("/dev/fuse", "qemu-img");
    let mut rng = Rng::for_test("what a kill leaked");
    let mut leaked = 0;
    for options in [
        "cluster_size=64k",
        "cluster_size=4k,compat=0.10",
        "cluster_size=4k,refcount_bits=1",
        "cluster_size=512",
        "cluster_size=16k,extended_l2=on",
    ] {
        let size = 8 * MIB;
        let rig = Rig::with(Pattern::new(81, 1).bytes(0, size), options);
        for _ in 0..3 {
            let disk = rig.mount().args(&["--no-resume"]).qmp().start();
            assert!(is_marked(&rig.overlay), "{options}: while it is mounted");
            disk.client().ok("block-stream", json!({"device": "drive0", "speed": 2 * MIB}));
            let file = disk.open();
            let delay = Duration::from_millis(50 + rng.below(200));
            let killer = std::thread::spawn(move || {
                std::thread::sleep(delay);
                disk.die();
            });
            loop {
                let range = rng.range(size, 300 * KIB);
                let (offset, len) = (range.start, range.end - range.start);
                let done = match rng.below(4) {
                    0 => fallocate(&file, PUNCH, offset, len).is_ok() && file.sync_data().is_ok(),
                    1 => file.sync_data().is_ok(),
                    _ => file.write_all_at(&Pattern::new(81, 2).bytes(offset, len), offset).is_ok(),
                };
                if !done {
                    break;
                }
            }
            killer.join().expect("killer");
            assert!(is_marked(&rig.overlay), "{options}: after the kill");
            let found = qemu::check(&rig.overlay);
            assert_eq!((found.corruptions, found.check_errors), (0, 0), "{options}: {found:?}");
            leaked += found.leaks;
            let before = qemu::read_all(&rig.overlay);
            let disk = rig.mount().args(&["--no-resume"]).start();
            assert_same(options, &disk.read_all(), &before);
            disk.umount();
            assert!(!is_marked(&rig.overlay), "{options}: after the clean end");
            qemu::assert_clean(&rig.overlay);
            assert_same(options, &qemu::read_all(&rig.overlay), &before);
        }
    }
    assert!(leaked > 0, "no kill leaked anything: nothing was tested");
}

/// Protects: an image that was not closed and is corrupt is refused for writing, with a way to
/// repair it; reading works.
#[test]
fn a_corrupt_image_that_was_not_closed_is_not_written() {
    requires!("/dev/fuse", "qemu-img", "qemu-io");
    let rig = Rig::new(MIB);
    let disk = rig.mount().start();
    let file = disk.open();
    file.write_all_at(&[7; 65536], 0).expect("write");
    file.sync_all().expect("fsync");
    disk.die();
    drop(file);
    // Sets the refcount of the last cluster in use to zero.
    let bytes = fs::read(&rig.overlay).expect("overlay");
    let word = |at: usize| u64::from_be_bytes(bytes[at..at + 8].try_into().expect("eight"));
    let block = word(usize::try_from(word(48)).expect("small"));
    let l2 = usize::try_from(word(usize::try_from(word(40)).expect("small")) & !(1 << 63))
        .expect("small");
    let data = (word(l2) & !(1 << 63)) >> 16;
    crate::support::header::poke(&rig.overlay, block + 2 * data, &[0, 0]);
    let path = rig.scratch.join("elsewhere");
    assert_refused(
        &mount(&rig.overlay, &path),
        &["corruptions", "--read-only", "qemu-img check -r all"],
    );
    let disk = rig.mount().args(&["--read-only"]).start();
    let mut want = rig.content.clone();
    want[..65536].fill(7);
    assert_same("read-only", &disk.read_all(), &want);
    disk.umount();
}
