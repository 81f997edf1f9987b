//! Races of the process with its environment: the hazards of the table in `src/trials/hazards.rs`
//! that need a kernel and a mount.

use std::fs::{self, File};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use rustix::process::Signal;
use serde_json::json;

use crate::support::{CLUSTER, MIB, Pattern, Rig, mounts, poll, read_at, wait_until};

/// Protects: the daemon uses no path through its own mountpoint, where it would wait for itself:
/// neither its current directory nor any open file is there, before and after every query (H29).
#[test]
fn h29_the_daemon_keeps_away_from_its_own_mountpoint() {
    requires!("/dev/fuse", "qemu-img");
    let rig = Rig::new(4 * MIB);
    let disk = rig.mount().qmp().start();
    let process = PathBuf::from(format!("/proc/{}", disk.server_pid().as_raw_nonzero()));
    let check = || {
        assert_eq!(fs::read_link(process.join("cwd")).expect("cwd"), PathBuf::from("/"));
        // Compared by device, because the placeholder below the mount has the same name and is
        // another file.
        let of_disk = fs::metadata(disk.path()).expect("stat of the disk").dev();
        let mut fuse_is_open = false;
        for entry in fs::read_dir(process.join("fd")).expect("fd").flatten() {
            let Ok(path) = fs::read_link(entry.path()) else { continue }; // closed meanwhile
            fuse_is_open |= path == Path::new("/dev/fuse");
            let of_file = fs::metadata(entry.path()).map(|file| file.dev());
            assert!(
                of_file.is_err() || of_file.is_ok_and(|device| device != of_disk),
                "it has its own disk open as {}",
                path.display()
            );
        }
        assert!(fuse_is_open);
    };
    check();
    let mut client = disk.client();
    for query in
        ["query-named-block-nodes", "query-block-exports", "query-block-jobs", "query-blockstats"]
    {
        client.execute(query, json!({})).ok();
    }
    client.ok("block-stream", json!({"device": "drive0"}));
    client.wait_completed();
    check();
    drop(client);
    disk.umount();
    rig.assert_standalone(&rig.content);
}

/// Protects: `quit`, a signal and an unmount at the same time, during a stream: one of them takes
/// effect, the others change nothing, and the image is closed once, with everything that was
/// acknowledged (H31).
#[test]
fn h31_quit_signal_and_unmount_at_once() {
    requires!("/dev/fuse", "qemu-img");
    for round in 0..3 {
        let rig = Rig::new(32 * MIB);
        let mut disk = rig.mount().qmp().start();
        let mut guest = rig.guest(&disk);
        guest.write(20 * MIB + 5..21 * MIB + round);
        guest.punch(25 * MIB..25 * MIB + 3 * CLUSTER);
        let want = guest.shadow;
        drop(guest.file);
        let (mut quitter, mut canceller) = (disk.client(), disk.client());
        quitter.ok("block-stream", json!({"device": "drive0", "speed": 16 * MIB}));
        wait_until("it copies", || quitter.job()["offset"].as_u64().expect("offset") > 2 * MIB);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                canceller
                    .send_raw(r#"{"execute":"block-job-cancel","arguments":{"device":"drive0"}}"#)
            });
            scope.spawn(|| quitter.send_raw(r#"{"execute":"quit"}"#));
            scope.spawn(|| {
                // The daemon may have ended before the signal or the unmount arrives.
                let _ = rustix::process::kill_process(disk.pid(), Signal::TERM);
            });
            scope.spawn(|| Command::new("umount").arg(disk.path()).stderr(Stdio::null()).status());
        });
        disk.assert_clean_end();
        assert!(mounts::at(disk.path()).is_none());
        rig.assert_overlay(&want);
    }
}

/// Protects: a client that is killed during its write leaves every cluster old or new, and the disk
/// continues; FUSE_INTERRUPT stops no request in the middle (H32).
#[test]
fn h32_clients_killed_in_the_middle_of_a_write() {
    requires!("/dev/fuse", "qemu-img", "dd");
    let size = 32 * MIB;
    let rig = Rig::new(size);
    let disk = rig.mount().start();
    let mut now = rig.content.clone();
    let mut cut = 0;
    for round in 0..40 {
        let next = Pattern::new(0xC1, 200 + round).bytes(0, size);
        let source = rig.scratch.write("next.bin", &next);
        let mut writer = Command::new("dd")
            .arg(format!("if={}", source.display()))
            .arg(format!("of={}", disk.path().display()))
            .args(["bs=64K", "conv=notrunc", "oflag=direct"])
            .stderr(Stdio::null())
            .spawn()
            .expect("dd");
        let file = File::open(disk.path()).expect("open");
        let begun = poll(std::time::Duration::from_secs(30), || {
            (read_at(&file, 0, 512) == next[..512]).then_some(())
        });
        let _ = writer.kill();
        let status = writer.wait().expect("wait");
        assert!(begun.is_some(), "dd wrote nothing");
        cut += u32::from(!status.success());
        let found = disk.read_all();
        let clusters = found
            .chunks(CLUSTER as usize)
            .zip(now.chunks(CLUSTER as usize))
            .zip(next.chunks(CLUSTER as usize));
        let written: Vec<bool> = clusters
            .enumerate()
            .map(|(index, ((found, old), new))| {
                assert!(found == old || found == new, "cluster {index} is half written");
                found == new
            })
            .collect();
        assert!(
            written.is_sorted_by(|before, after| before >= after),
            "dd writes in order: {written:?}"
        );
        now = found;
        if cut == 5 {
            break;
        }
    }
    assert!(cut > 0, "no writer was killed before it had finished");
    disk.umount();
    rig.assert_overlay(&now);
}
