//! Queries and changes over the socket other than jobs, checked from both sides: the numbers count
//! what the mount really did, and the size of the mount changes at once.

use std::io::{Seek, SeekFrom};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::process::Command;

use serde_json::{Value, json};

use crate::support::{MIB, QmpClient, Rig, assert_same, qemu, read_at, run_ok};

const DOCUMENTED: &str = include_str!("../../docs/qmp.md");

/// Protects: `query-blockstats` counts the guest's requests exactly, byte for byte and once each,
/// and separately the reads from the base.
#[test]
fn statistics_are_true() {
    requires!("/dev/fuse", "qemu-img");
    let rig = Rig::new(4 * MIB);
    let disk = rig.mount().qmp().start();
    let mut client = disk.client();
    let stats = |client: &mut QmpClient| client.ok("query-blockstats", json!({}))[0].clone();
    assert_eq!(stats(&mut client)["device"], json!("drive0"));
    let file = disk.open();
    // One read that misses (a whole cluster comes from the base), one that hits, one write in
    // place, one discard of a whole cluster, one fsync.
    read_at(&file, 65_536 + 100, 1000);
    read_at(&file, 65_536 + 4000, 500);
    file.write_all_at(&[7; 300], 65_536 + 10).expect("write");
    rustix::fs::fallocate(
        &file,
        rustix::fs::FallocateFlags::PUNCH_HOLE | rustix::fs::FallocateFlags::KEEP_SIZE,
        4 * 65_536,
        65_536,
    )
    .expect("punch");
    file.sync_all().expect("fsync");
    let stats = stats(&mut client);
    let guest = &stats["stats"];
    let expected = json!({
        "rd_bytes": 1500, "rd_operations": 2, "wr_bytes": 300, "wr_operations": 1, "unmap_bytes": 65_536, "unmap_operations": 1,
        "flush_operations": 1, "failed_rd_operations": 0, "failed_wr_operations": 0, "wr_highest_offset": 65_536 + 310,
    });
    for (name, value) in expected.as_object().expect("object") {
        assert_eq!(&guest[name], value, "{name} of {guest}");
    }
    assert!(
        guest["rd_total_time_ns"].as_u64() > Some(0)
            && guest["flush_total_time_ns"].as_u64() > Some(0),
        "{guest}"
    );
    let below = &stats["backing"]["stats"];
    assert_eq!(
        (&below["rd_bytes"], &below["rd_operations"]),
        (&json!(65_536), &json!(1)),
        "{below}"
    );
    assert_eq!(client.ok("query-block-exports", json!({}))[0]["type"], json!("fuse"));
    drop(file);
    disk.umount();
}

/// Protects: `block_resize` grows the mounted disk at once, also for programs that have it open and
/// read asynchronously. The new part is zero although the base is longer. A resize during a job, a
/// smaller size and invalid sizes are refused and change nothing.
#[test]
fn resize_is_seen_at_once() {
    requires!("/dev/fuse", "qemu-img", "fio");
    let rig = Rig::new(4 * MIB);
    // The overlay is shorter than its base: the base's bytes in the new range must stay hidden.
    run_ok(
        Command::new("qemu-img")
            .args(["resize", "-q", "--shrink", "-f", "qcow2"])
            .arg(&rig.overlay)
            .arg("2M"),
    );
    let disk = rig.mount().qmp().start();
    let mut client = disk.client();
    let mut file = disk.open();
    assert_eq!(file.metadata().expect("stat").len(), 2 * MIB);
    let want: Vec<u8> =
        rig.content[..2 << 20].iter().copied().chain(std::iter::repeat_n(0, 4 << 20)).collect();

    for (arguments, expected) in [
        (json!({"device": "drive0", "size": MIB}), "Shrinking is not supported"),
        (json!({"device": "nope", "size": 6 * MIB}), "nope"),
        (json!({"device": "drive0", "size": -1}), "size"),
    ] {
        let error = client.err("block_resize", arguments);
        assert!(error.desc.contains(expected), "{error:?}");
    }
    client.ok("block-stream", json!({"device": "drive0", "speed": 1}));
    let busy = client.err("block_resize", json!({"device": "drive0", "size": 6 * MIB}));
    assert!(busy.desc.contains("is busy: block device is in use by block job: stream"), "{busy:?}");
    client.ok("block-job-cancel", json!({"device": "drive0"}));
    client.wait_status("null");
    assert_eq!(disk.path().metadata().expect("stat").size(), 2 * MIB);

    client.ok("block_resize", json!({"device": "drive0", "size": 6 * MIB}));
    // An asynchronous direct read behind the old end, before any program calls stat.
    let fio = run_ok(
        Command::new("fio")
            .args([
                "--name=r",
                "--rw=read",
                "--bs=4k",
                "--offset=4m",
                "--size=64k",
                "--ioengine=libaio",
                "--direct=1",
                "--filesize=6m",
            ])
            .args(["--output-format=terse", "--readonly", "--filename"])
            .arg(disk.path()),
    );
    assert!(fio.contains(";0;64;"), "64 KiB were read without an error: {fio}");
    assert_eq!(file.seek(SeekFrom::End(0)).expect("seek"), 6 * MIB);
    assert_same("grown", &read_at(&file, 0, 6 << 20), &want);
    file.write_all_at(b"new", 5 * MIB).expect("write behind the old end");
    file.sync_all().expect("fsync");
    let mut want = want;
    want[5 << 20..(5 << 20) + 3].copy_from_slice(b"new");
    drop(file);
    disk.umount();
    qemu::assert_clean(&rig.overlay);
    assert_same("grown, as QEMU reads it", &qemu::read_all(&rig.overlay), &want);
}

/// Protects: `x-query-last-job` and the progress event report what was really done; only the client
/// that asked gets the event.
#[test]
fn progress_and_the_last_job_are_told_to_who_asks() {
    requires!("/dev/fuse", "qemu-img");
    let mut content = vec![0; 4 << 20];
    content[..2 << 20].copy_from_slice(&crate::support::Pattern::new(5, 1).bytes(0, 2 * MIB));
    let rig = Rig::with(content, "");
    let disk = rig.mount().qmp().start();
    let (mut asks, mut silent) = (disk.client(), disk.client());
    assert_eq!(asks.err("x-query-last-job", json!({})).desc, "No job has finished yet");
    asks.ok("x-job-progress-events", json!({"enable": true, "interval-ms": 100}));
    asks.ok("block-stream", json!({"device": "drive0", "speed": 2 * MIB}));
    let event = asks.wait_event("X_JOB_PROGRESS");
    assert_eq!(event["data"]["id"], json!("drive0"), "{event}");
    let running = asks.ok("x-query-job-progress", json!({}));
    assert_eq!(running[0]["len"], json!(4 * MIB), "{running}");
    asks.wait_completed();
    silent.wait_completed();
    let names = |client: &QmpClient| {
        client.event_names().into_iter().filter(|name| name == "X_JOB_PROGRESS").count()
    };
    assert!(names(&asks) > 0);
    assert_eq!(names(&silent), 0, "nobody is told who did not ask");
    let last = asks.ok("x-query-last-job", json!({}));
    let counts: Vec<&Value> =
        ["bytes-copied", "bytes-zero", "bytes-skipped", "offset", "len", "result", "type"]
            .map(|name| &last[name])
            .to_vec();
    let done = last["bytes-zero"].as_u64().expect("number")
        + last["bytes-skipped"].as_u64().expect("number");
    assert_eq!(
        (counts[0], done, counts[3], counts[4]),
        (&json!(2 * MIB), 2 * MIB, &json!(4 * MIB), &json!(4 * MIB)),
        "{last}"
    );
    assert_eq!((counts[5], counts[6]), (&json!("success"), &json!("stream")), "{last}");
    assert!(last["end-time"].is_object() && last["arguments"].is_object(), "{last}");
    disk.umount();
    rig.assert_standalone(&rig.content);
}

/// Protects: the schema has exactly the existing commands, with the arguments that clients look
/// for.
#[test]
fn the_schema_and_the_commands_are_one() {
    requires!("/dev/fuse", "qemu-img");
    let rig = Rig::new(MIB);
    let disk = rig.mount().qmp().start();
    let mut client = disk.client();
    let schema = client.ok("query-qmp-schema", json!({}));
    let schema = schema.as_array().expect("list");
    let names = |list: &[Value]| {
        let mut names: Vec<String> =
            list.iter().map(|entry| entry["name"].as_str().expect("name").to_owned()).collect();
        names.sort();
        names
    };
    let commands: Vec<Value> =
        schema.iter().filter(|entry| entry["meta-type"] == json!("command")).cloned().collect();
    let listed = client.ok("query-commands", json!({}));
    assert_eq!(names(&commands), names(listed.as_array().expect("list")));
    let events: Vec<Value> =
        schema.iter().filter(|entry| entry["meta-type"] == json!("event")).cloned().collect();
    for name in names(&commands).into_iter().chain(names(&events)) {
        assert!(DOCUMENTED.contains(&format!("`{name}`")), "docs/qmp.md does not name {name}");
    }
    let stream = commands
        .iter()
        .find(|command| command["name"] == json!("block-stream"))
        .expect("block-stream");
    let arguments =
        schema.iter().find(|entry| entry["name"] == stream["arg-type"]).expect("its arguments");
    let members = names(arguments["members"].as_array().expect("members"));
    for member in [
        "auto-dismiss",
        "auto-finalize",
        "backing-file",
        "base",
        "base-node",
        "bottom",
        "device",
        "job-id",
        "on-error",
        "speed",
    ] {
        assert!(members.iter().any(|name| name == member), "{member} in {members:?}");
    }
    assert!(schema.iter().any(|entry| entry["meta-type"] == json!("event")
        && entry["name"] == json!("BLOCK_JOB_COMPLETED")));
    disk.umount();
}
