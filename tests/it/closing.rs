//! The end of a disk in unusual situations: a daemon that is still closing, a program that looks at
//! the mount, other mounts of the disk, a renamed directory, a kill. The commands wait for the
//! obstacle or name it.

use std::fs::{self, File};
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use rustix::process::{Signal, kill_process};
use serde_json::Value;

use crate::support::{
    Daemon, Finished, MIB, Mount, Ours, Rig, Scratch, assert_same, mounts, poll, qemu, run_ok,
    run_within, wait_until,
};

const LIMIT: Duration = Duration::from_secs(60);

fn cordisk(scratch: &Scratch, args: &[&str]) -> Finished {
    run_within(
        scratch.cordisk().args(args).current_dir(scratch.path()).env_remove("RUST_LOG"),
        LIMIT,
    )
}

/// Returns the mountpoints in `status` that belong to this test; other disks may be mounted on this
/// machine.
fn listed(scratch: &Scratch) -> Vec<String> {
    let status = cordisk(scratch, &["status", "--json"]);
    let disks: Vec<Value> = serde_json::from_str(&status.stdout).expect("JSON");
    let places = disks.iter().map(|disk| disk["mountpoint"].as_str().expect("a path").to_owned());
    places.filter(|place| Path::new(place).starts_with(scratch.path())).collect()
}

fn entered(scratch: &Scratch, disk: Daemon) -> Daemon {
    let path = scratch.runtime_dir().join(format!("{}.json", disk.pid().as_raw_nonzero()));
    wait_until("the entry is written", || {
        fs::read(&path).is_ok_and(|text| serde_json::from_slice::<Value>(&text).is_ok())
    });
    disk
}

/// Replaces a dead disk. Dropping the old one would detach the mount of the new one at the same
/// place.
fn replace(disk: &mut Daemon, next: Daemon) {
    std::mem::replace(disk, next).die();
}

/// Protects: umount(8) returns before the daemon has closed the image. A mount of the same image,
/// at the same place and with the same pidfile and socket, and a check of it, wait for that daemon;
/// so does `cordisk umount` of a disk that is unmounted already.
#[test]
fn what_comes_right_after_umount_waits_for_the_daemon() {
    requires!("/dev/fuse", "qemu-img", "root");
    let rig = Rig::new(MIB);
    let pidfile = rig.scratch.join("pid");
    let mount = || rig.mount().qmp().args(&["--pidfile", pidfile.to_str().expect("UTF-8")]);
    let mut disk = entered(&rig.scratch, mount().start());
    for what in ["mount", "check", "umount"] {
        disk.signal_server(Signal::STOP);
        // umount(8) would first ask the stopped daemon for attributes.
        rustix::mount::unmount(disk.path(), rustix::mount::UnmountFlags::NOFOLLOW)
            .expect("umount2");
        if what == "mount" {
            let next = Mount::named(&rig.scratch, &rig.overlay, "drive0")
                .qmp()
                .args(&["--pidfile", pidfile.to_str().expect("UTF-8")])
                .spawn();
            wait_until("it waits", || next.log().contains("waiting for the last daemon (process "));
            disk.signal_server(Signal::CONT);
            let ended = disk.ended_within(LIMIT);
            assert!(ended.is_some_and(|status| status.success()), "{ended:?} {}", disk.log());
            wait_until("the next one has mounted", || next.is_mounted());
            replace(&mut disk, entered(&rig.scratch, next));
            assert_same("the disk", &disk.read_all(), &rig.content);
            continue;
        }
        let target = if what == "check" { "overlay.qcow2" } else { "drive0.disk" };
        let error = rig.scratch.join("said");
        let mut command = rig.scratch.cordisk();
        command
            .args([what, target])
            .current_dir(rig.scratch.path())
            .stdin(Stdio::null())
            .stdout(Stdio::null());
        let mut going =
            Ours(command.stderr(File::create(&error).expect("file")).spawn().expect("cordisk"));
        if what == "check" {
            wait_until("it waits", || {
                fs::read_to_string(&error).expect("file").contains("waiting for the last daemon")
            });
        } else {
            wait_until("it waits", || {
                fs::read_to_string(&error).expect("file").contains("waiting for its daemon")
            });
        }
        disk.signal_server(Signal::CONT);
        let status =
            poll(LIMIT, || going.0.try_wait().expect("wait")).expect("the command had to end");
        assert!(status.success(), "{what}: {}", fs::read_to_string(&error).expect("file"));
        disk.assert_clean_end();
        replace(&mut disk, entered(&rig.scratch, mount().start()));
    }
    disk.umount();
    rig.assert_overlay(&rig.content);
}

/// Protects: programs that look at the mount and have nothing open (a monitoring agent) prevent
/// neither SIGTERM nor `cordisk umount` from ending the disk.
#[test]
fn a_look_at_the_mount_is_no_use_of_it() {
    requires!("/dev/fuse", "qemu-img");
    let rig = Rig::new(MIB);
    for how in ["SIGTERM", "umount"] {
        for _ in 0..3 {
            let mut disk = entered(&rig.scratch, rig.mount().start());
            let path = disk.path().to_owned();
            let stop = AtomicBool::new(false);
            std::thread::scope(|scope| {
                for _ in 0..2 {
                    scope.spawn(|| {
                        while !stop.load(Ordering::Relaxed) {
                            let _ = (fs::symlink_metadata(&path), rustix::fs::statvfs(&path));
                            std::thread::yield_now();
                        }
                    });
                }
                if how == "SIGTERM" {
                    disk.signal(Signal::TERM);
                    let ended = disk.ended_within(LIMIT);
                    stop.store(true, Ordering::Relaxed);
                    assert!(
                        ended.is_some_and(|status| status.success()),
                        "{ended:?} {}",
                        disk.log()
                    );
                } else {
                    let done = cordisk(&rig.scratch, &["umount", "drive0.disk"]);
                    stop.store(true, Ordering::Relaxed);
                    assert!(done.status.success() && done.stderr.is_empty(), "{done:?}");
                }
            });
            disk.assert_clean_end();
        }
    }
}

/// Protects: when a directory above the mountpoint was renamed, the disk is found at its new path
/// and listed once, and its end removes the placeholder, by a command and by a signal.
#[test]
fn a_disk_is_found_where_it_is_now() {
    requires!("/dev/fuse", "qemu-img");
    for how in ["umount", "SIGTERM", "SIGINT twice"] {
        let scratch = Scratch::new();
        let (before, after) = (scratch.dir("before"), scratch.join("after"));
        let overlay = scratch.join("overlay.qcow2");
        qemu::create(&overlay, Some(MIB), "", None);
        let mut disk = entered(&scratch, Mount::named(&scratch, &overlay, "before/drive0").start());
        fs::rename(&before, &after).expect("the directory of a mounted disk can be renamed");
        let done = cordisk(&scratch, &["status", "after/drive0.disk"]);
        assert!(done.status.success(), "{done:?}");
        assert_eq!(listed(&scratch), [after.join("drive0.disk").to_str().expect("UTF-8")]);
        let user =
            (how == "SIGINT twice").then(|| File::open(after.join("drive0.disk")).expect("open"));
        match how {
            "umount" => {
                let done = cordisk(&scratch, &["umount", "after/drive0.disk"]);
                assert!(done.status.success() && done.stderr.is_empty(), "{done:?}");
            }
            "SIGTERM" => disk.signal(Signal::TERM),
            _ => {
                disk.signal(Signal::INT);
                let log = after.join("drive0.log");
                wait_until("it says that it is in use", || {
                    fs::read_to_string(&log).is_ok_and(|log| log.contains("is in use"))
                });
                disk.signal(Signal::INT);
            }
        }
        disk.assert_clean_end();
        drop(user);
        assert!(
            fs::symlink_metadata(after.join("drive0.disk")).is_err(),
            "{how}: the placeholder is left"
        );
        assert!(!mounts::table().iter().any(|mount| mount.mountpoint.starts_with(&after)), "{how}");
    }
}

/// Protects: `cordisk umount` of the disk names a bind mount of it and changes nothing; `--lazy`
/// ends the disk everywhere, and a signal unmounts both.
#[test]
fn a_bind_mount_is_named() {
    requires!("/dev/fuse", "qemu-img", "root");
    let rig = Rig::new(MIB);
    for how in ["umount", "lazy", "SIGTERM"] {
        let bound = rig.scratch.write("bound", b"");
        let mut disk = entered(&rig.scratch, rig.mount().start());
        run_ok(Command::new("mount").arg("--bind").arg(disk.path()).arg(&bound));
        let done = cordisk(&rig.scratch, &["umount", "drive0.disk"]);
        let advice =
            format!("mounted at {} as well (a bind mount); unmount that first", bound.display());
        assert!(
            done.status.code() == Some(1)
                && done.stderr.contains(&advice)
                && done.stderr.lines().count() == 1,
            "{done:?}"
        );
        assert!(disk.is_mounted() && mounts::at(&bound).is_some());
        assert_same("the disk", &fs::read(&bound).expect("read"), &rig.content);
        assert_eq!(listed(&rig.scratch), [disk.path().to_str().expect("UTF-8")]);
        match how {
            "umount" => {
                mounts::umount(&bound);
                assert!(cordisk(&rig.scratch, &["umount", "drive0.disk"]).status.success());
            }
            "lazy" => {
                // The error names the mountpoint that the user knows, whether it is unmounted or
                // not.
                mounts::umount(disk.path());
                let next = cordisk(&rig.scratch, &["mount", "overlay.qcow2", "other.disk"]);
                assert!(
                    next.stderr.contains("is in use: it is mounted at ")
                        && next.stderr.contains("bound"),
                    "{next:?}"
                );
                let done = cordisk(&rig.scratch, &["umount", "--lazy", "drive0.disk"]);
                assert!(done.status.success(), "{done:?}");
            }
            _ => disk.signal(Signal::TERM),
        }
        disk.assert_clean_end();
        assert!(mounts::at(&bound).is_none(), "{how}");
        assert_eq!(fs::metadata(&bound).expect("the file below").len(), 0);
    }
}

/// Protects: if another mount namespace has the disk, `cordisk umount` says so while it waits, and
/// names a process. A mount of the image says so as well, and their advice is not circular.
/// `--lazy` ends the disk, also by a mountpoint where nothing is mounted any more.
#[test]
fn another_mount_namespace_is_named() {
    requires!("/dev/fuse", "qemu-img", "root", "unshare", "sh");
    let rig = Rig::new(MIB);
    let mut disk = entered(&rig.scratch, rig.mount().start());
    let entered_it = rig.scratch.join("entered");
    let mut container = Command::new("unshare");
    container
        .args(["-m", "--propagation", "private", "sh", "-c", "echo > \"$0\"; exec sleep 120"])
        .arg(&entered_it);
    let container = Ours(container.spawn().expect("unshare"));
    wait_until("there is another namespace", || entered_it.exists());
    let said = rig.scratch.join("said");
    let mut command = rig.scratch.cordisk();
    command.args(["umount", "drive0.disk"]).current_dir(rig.scratch.path()).stdin(Stdio::null());
    let mut going =
        Ours(command.stderr(File::create(&said).expect("file")).spawn().expect("cordisk"));
    wait_until("it says what keeps the disk", || {
        let said = fs::read_to_string(&said).expect("file");
        said.contains("another mount namespace")
            && said.contains(&container.pid().as_raw_nonzero().to_string())
    });
    assert!(!disk.is_mounted(), "it is unmounted here");
    let next = cordisk(&rig.scratch, &["mount", "overlay.qcow2", "other.disk"]);
    assert!(!next.status.success() && next.stderr.contains("another mount namespace"), "{next:?}");
    assert!(
        next.stderr.contains("cordisk umount --lazy ") && next.stderr.contains("drive0.disk"),
        "{next:?}"
    );
    let done = cordisk(&rig.scratch, &["umount", "--lazy", "drive0.disk"]);
    assert!(done.status.success(), "{done:?}");
    assert!(
        poll(LIMIT, || going.0.try_wait().expect("wait")).is_some_and(|status| status.success()),
        "the first one has waited for it"
    );
    assert!(disk.ended_within(LIMIT).is_some_and(|status| status.success()), "{}", disk.log());
    kill_process(container.pid(), Signal::KILL).expect("signal");
    qemu::assert_clean(&rig.overlay);
}

/// Protects: `cordisk umount` right after a kill recognizes the dead mount, waits for the end of
/// the process, and prints nothing; the image is free then.
#[test]
fn an_umount_right_after_a_kill_is_quiet() {
    requires!("/dev/fuse", "qemu-img");
    let rig = Rig::new(MIB);
    for _ in 0..5 {
        let mut disk = entered(&rig.scratch, rig.mount().start());
        assert_same("the disk", &disk.read_all(), &rig.content);
        disk.kill_all();
        let done = cordisk(&rig.scratch, &["umount", "drive0.disk"]);
        assert!(done.status.success() && done.stderr.is_empty(), "{done:?}");
        assert!(fs::symlink_metadata(disk.path()).is_err(), "the placeholder is left");
        qemu::img(&["info", rig.overlay.to_str().expect("UTF-8")]);
        assert!(disk.ended_within(LIMIT).is_some());
    }
}
