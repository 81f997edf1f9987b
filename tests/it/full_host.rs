//! The host has no space for the overlay any more. A limit on the file size of the running daemon
//! simulates that: it needs neither a file system of its own nor root, and can be lifted again.
//! (The error is EFBIG, which counts as "no space".)

use std::fs;
use std::os::unix::fs::FileExt;

use rustix::process::{Resource, Rlimit, prlimit};
use serde_json::json;

use crate::support::{CLUSTER, Daemon, MIB, Pattern, Rig, assert_same, read_at};

/// More bytes than the tables need, far fewer than the disk has, and never reached by the log.
const ROOM: u64 = MIB;

fn limit(disk: &Daemon, bytes: Option<u64>) {
    let maximum =
        prlimit(Some(disk.server_pid()), Resource::Fsize, Rlimit { current: bytes, maximum: None })
            .expect("prlimit")
            .maximum;
    assert_eq!(maximum, None, "this machine limits file sizes itself");
}

/// Protects: P5. Copies that cannot be stored fail no read. A write that cannot be stored fails
/// alone and loses no existing data. The job fails and keeps the backing file. With space
/// everything continues without a new mount.
#[test]
fn without_room_reads_go_on_and_nothing_is_lost() {
    requires!("/dev/fuse", "qemu-img");
    let rig = Rig::new(8 * MIB);
    let disk = rig.mount().qmp().start();
    let overlay = || fs::metadata(&rig.overlay).expect("overlay").len();
    let end = overlay() + ROOM;
    limit(&disk, Some(end));

    let mut want = rig.content.clone();
    let file = disk.open();
    for at in (0..8 * MIB).step_by(1 << 16) {
        let part =
            usize::try_from(at).expect("small")..usize::try_from(at + CLUSTER).expect("small");
        assert_same(
            "cold, with room for a part of it",
            &read_at(&file, at, part.len()),
            &want[part],
        );
    }
    assert!(
        disk.log().contains("copy-on-read failed"),
        "the limit was never reached\n{}",
        disk.log()
    );
    assert_same("again", &disk.read_all(), &want);
    let last = 8 * MIB - CLUSTER;
    let data = Pattern::new(77, 2).bytes(last, CLUSTER);
    file.write_all_at(&data, last).expect_err("there is no room for another cluster");
    assert_same(
        "what could not be overwritten",
        &read_at(&file, last, data.len()),
        &want[usize::try_from(last).expect("small")..],
    );
    // Clusters that the overlay has are overwritten in place.
    file.write_all_at(&data, 0).expect("no room is needed");
    want[..data.len()].copy_from_slice(&data);

    let mut client = disk.client();
    client.ok("block-stream", json!({"device": "drive0"}));
    let event = client.wait_event("BLOCK_JOB_COMPLETED");
    assert_eq!(event["data"]["error"], "File too large", "{event}");
    assert!(event["data"]["offset"].as_u64() < event["data"]["len"].as_u64(), "{event}");
    assert!(overlay() <= end);
    assert_same("after the failed job", &disk.read_all(), &want);
    let device = client.ok("query-block", json!({}));
    assert_eq!(device[0]["inserted"]["backing_file_depth"], 1, "{device}");

    limit(&disk, None);
    file.write_all_at(&data, last).expect("there is room again");
    want[usize::try_from(last).expect("small")..].copy_from_slice(&data);
    client.ok("block-stream", json!({"device": "drive0"}));
    client.wait_completed();
    assert_same("in the end", &disk.read_all(), &want);
    drop(file);
    drop(client);
    disk.umount();
    rig.assert_standalone(&want);
}
