//! Streaming over the QMP socket: the exchange that QEMU's clients have used since 2012, its
//! members and its order, the speed, and guest requests during a stream.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use serde_json::{Value, json};

use crate::support::qmp::seconds;
use crate::support::{
    CLUSTER, Daemon, Guest, KIB, MIB, Mount, Pattern, QmpClient, Rig, Rng, Scratch, assert_same,
    poll, qemu, run_ok, wait_until,
};

/// The rate limit does not delay the first step of a job: a job at 1 byte per second stops after
/// that step (iotest 141). In bytes.
const FIRST_STEP: u64 = 512 * KIB;

fn members(object: &Value) -> BTreeSet<&str> {
    object.as_object().expect("an object").keys().map(String::as_str).collect()
}

fn set<const N: usize>(names: [&'static str; N]) -> BTreeSet<&'static str> {
    BTreeSet::from(names)
}

/// Starts a job that copies one step and then sleeps for hours.
fn start_sleeping_job(client: &mut QmpClient) {
    client.ok("block-stream", json!({"device": "drive0", "speed": 1}));
    let copied = poll(Duration::from_secs(20), || {
        (client.job()["offset"] == json!(FIRST_STEP)).then_some(())
    });
    assert!(copied.is_some(), "the first step of 512 KiB is free of charge: {}", client.job());
}

/// Protects: the exchange that clients have used since 2012, letter by letter: `block_stream`, an
/// empty return, and `BLOCK_JOB_COMPLETED` with exactly its members, where offset, len and the size
/// of the disk are equal.
#[test]
fn the_conversation_of_2012() {
    requires!("/dev/fuse", "qemu-img");
    let rig = Rig::new(3 * MIB + 7 * 512);
    let disk = rig.mount().args(&["--device", "virtio0"]).qmp().start();
    let mut client = QmpClient::greeted(disk.socket());
    let message =
        |client: &mut QmpClient| client.message(Duration::from_secs(30)).expect("a message");
    client.send_raw("{ \"execute\": \"qmp_capabilities\" }\n");
    assert_eq!(message(&mut client), json!({"return": {}}), "no id was sent, none comes back");
    client.send_raw(
        "{ \"execute\": \"block_stream\", \"arguments\": { \"device\": \"virtio0\" } }\n",
    );
    let reply = loop {
        let message = message(&mut client);
        if message.get("event").is_none() {
            break message;
        }
    };
    assert_eq!(reply, json!({"return": {}}));
    let event = client.wait_event("BLOCK_JOB_COMPLETED");
    assert_eq!(members(&event), set(["event", "data", "timestamp"]));
    assert_eq!(members(&event["timestamp"]), set(["seconds", "microseconds"]));
    let size = rig.size();
    assert_eq!(
        event["data"],
        json!({"type": "stream", "device": "virtio0", "len": size, "offset": size, "speed": 0})
    );
    client.send_raw("{ \"execute\": \"query-block-jobs\" }\n");
    let reply = loop {
        let message = message(&mut client);
        if message.get("event").is_none() {
            break message;
        }
    };
    assert_eq!(reply, json!({"return": []}), "right after the event there is no job any more");
    assert_same("disk after the stream", &disk.read_all(), &rig.content);
    disk.umount();
    rig.assert_standalone(&rig.content);
}

/// Protects: QEMU's order of events, in both dialects; clients of QEMU wait for exactly these.
#[test]
fn events_come_in_qemus_order() {
    requires!("/dev/fuse", "qemu-img");
    for command in ["block-stream", "block_stream"] {
        let rig = Rig::new(2 * MIB);
        let disk = rig.mount().qmp().start();
        let mut client = disk.client();
        assert_eq!(client.ok(command, json!({"device": "drive0"})), json!({}));
        client.wait_status("null");
        client.listen(Duration::from_millis(100));
        let want = [
            "created",
            "running",
            "waiting",
            "pending",
            "BLOCK_JOB_COMPLETED",
            "concluded",
            "null",
        ];
        assert_eq!(client.event_names(), want);
        for event in client.events.iter().filter(|event| event["event"] == "JOB_STATUS_CHANGE") {
            assert_eq!(members(&event["data"]), set(["id", "status"]));
            assert_eq!(event["data"]["id"], json!("drive0"), "the default job id is the device's");
        }
        let times: Vec<f64> = client.events.iter().map(seconds).collect();
        assert!(times.is_sorted(), "timestamps rise: {times:?}");
        disk.umount();
        rig.assert_standalone(&rig.content);
    }
}

/// Protects: a disk without backing file has nothing to stream: the job completes at once with len
/// 0.
#[test]
fn a_second_stream_has_nothing_to_do() {
    requires!("/dev/fuse", "qemu-img");
    let rig = Rig::new(MIB);
    let disk = rig.mount().qmp().start();
    let mut client = disk.client();
    client.ok("block-stream", json!({"device": "drive0"}));
    assert_eq!(client.wait_completed()["len"], json!(MIB));
    client.wait_status("null");
    client.ok("block-stream", json!({"device": "drive0", "job-id": "again"}));
    let data = client.wait_completed();
    assert_eq!(
        data,
        json!({"type": "stream", "device": "again", "len": 0, "offset": 0, "speed": 0})
    );
    client.wait_status("null");
    let names = client.event_names();
    assert_eq!(
        names[7..],
        ["created", "running", "waiting", "pending", "BLOCK_JOB_COMPLETED", "concluded", "null"]
    );
    disk.umount();
    rig.assert_standalone(&rig.content);
}

/// Protects: the members of the queries while a job runs; `set-speed` wakes a job that sleeps; the
/// query returns `[]` right after the completion event.
#[test]
fn queries_show_the_job_and_set_speed_wakes_it() {
    requires!("/dev/fuse", "qemu-img");
    let rig = Rig::new(16 * MIB);
    let disk = rig.mount().qmp().start();
    let mut client = disk.client();
    start_sleeping_job(&mut client);
    let job = client.job();
    let want = set([
        "type",
        "device",
        "len",
        "offset",
        "busy",
        "paused",
        "speed",
        "io-status",
        "ready",
        "status",
        "auto-finalize",
        "auto-dismiss",
    ]);
    assert_eq!(members(&job), want);
    for (name, value) in [
        ("type", json!("stream")),
        ("device", json!("drive0")),
        ("len", json!(16 * MIB)),
        ("offset", json!(FIRST_STEP)),
        ("paused", json!(false)),
        ("speed", json!(1)),
        ("io-status", json!("ok")),
        ("ready", json!(false)),
        ("status", json!("running")),
        ("auto-finalize", json!(true)),
        ("auto-dismiss", json!(true)),
    ] {
        assert_eq!(job[name], value, "{name} in {job}");
    }
    let jobs = client.ok("query-jobs", json!({}));
    let want = json!([{
        "id": "drive0", "type": "stream", "status": "running", "current-progress": FIRST_STEP, "total-progress": 16 * MIB,
    }]);
    assert_eq!(jobs, want);
    std::thread::sleep(Duration::from_millis(400));
    assert_eq!(client.job()["offset"], json!(FIRST_STEP), "it sleeps");

    client.ok("block-job-set-speed", json!({"device": "drive0", "speed": 0}));
    let data = client.wait_completed();
    assert_eq!(
        data,
        json!({"type": "stream", "device": "drive0", "len": 16 * MIB, "offset": 16 * MIB, "speed": 0})
    );
    assert_eq!(client.ok("query-block-jobs", json!({})), json!([]));
    assert_eq!(client.ok("query-jobs", json!({})), json!([]));
    disk.umount();
    rig.assert_standalone(&rig.content);
}

/// Protects: the speed is exact: 32 MiB of data at 8 MiB/s take 4 s within 10 %. This is the only
/// timed assertion of the suite. It uses the daemon's own timestamps, from running to waiting,
/// because the duration of the last fsync depends on the host. nextest runs it alone
/// (.config/nextest.toml).
#[test]
fn eight_mib_per_second_is_eight_mib_per_second() {
    requires!("/dev/fuse", "qemu-img");
    let rig = Rig::new(32 * MIB);
    let disk = rig.mount().qmp().start();
    let mut client = disk.client();
    client.ok("block_stream", json!({"device": "drive0", "speed": 8 * MIB}));
    let running = seconds(&client.wait_status("running"));
    let waiting = seconds(&client.wait_status("waiting"));
    assert_eq!(client.wait_completed()["speed"], json!(8 * MIB));
    disk.umount();
    rig.assert_standalone(&rig.content);
    let took = waiting - running;
    assert!((3.6..=4.4).contains(&took), "32 MiB at 8 MiB/s took {took} s");
}

/// Protects: data that is already in the overlay costs no time and does not count against the
/// speed: a job at 1 byte per second over a local disk finishes at once.
#[test]
fn what_is_local_is_not_charged() {
    requires!("/dev/fuse", "qemu-img");
    let rig = Rig::new(8 * MIB);
    let disk = rig.mount().qmp().start();
    disk.read_all(); // copy-on-read copies everything
    let mut client = disk.client();
    client.ok("block-stream", json!({"device": "drive0", "speed": 1}));
    assert_eq!(client.wait_completed()["offset"], json!(8 * MIB));
    disk.umount();
    rig.assert_standalone(&rig.content);
}

/// Protects: pause stops the copying and reports it, resume continues it; both are refused in the
/// wrong state, with QEMU's messages.
#[test]
fn pause_and_resume() {
    requires!("/dev/fuse", "qemu-img");
    for dash in ["-", "_"] {
        let rig = Rig::new(16 * MIB);
        let disk = rig.mount().qmp().start();
        let mut client = disk.client();
        let verb = |name: &str| format!("block_job_{name}").replace('_', dash);
        client.ok("block-stream", json!({"device": "drive0", "speed": 4 * MIB}));
        client.ok(&verb("pause"), json!({"device": "drive0"}));
        client.wait_status("paused");
        wait_until("paused and not busy", || {
            let job = client.job();
            job["paused"] == json!(true) && job["busy"] == json!(false)
        });
        let job = client.job();
        assert_eq!(job["status"], json!("paused"), "{job}");
        assert!(job["offset"].as_u64().expect("offset") < 16 * MIB, "{job}");
        std::thread::sleep(Duration::from_millis(500));
        assert_eq!(client.job()["offset"], job["offset"], "a paused job does not move");
        assert_eq!(
            client.err(&verb("pause"), json!({"device": "drive0"})).desc,
            "Job is already paused"
        );
        let error = client.err(&verb("cancel"), json!({"device": "drive0"}));
        assert_eq!(error.desc, "The block job for device 'drive0' is currently paused");
        client.ok("block-job-set-speed", json!({"device": "drive0", "speed": 0}));
        client.ok(&verb("resume"), json!({"device": "drive0"}));
        client.wait_status("running");
        client.wait_completed();
        disk.umount();
        rig.assert_standalone(&rig.content);
    }
}

/// Protects: resume of a running job is refused, and a job that has ended gives `DeviceNotActive`,
/// which clients test for.
#[test]
fn verbs_on_the_wrong_job() {
    requires!("/dev/fuse", "qemu-img");
    let rig = Rig::new(4 * MIB);
    let disk = rig.mount().qmp().start();
    let mut client = disk.client();
    for command in ["block-job-pause", "block-job-resume", "block-job-cancel"] {
        let error = client.err(command, json!({"device": "nope"}));
        assert_eq!(
            (error.class.as_str(), error.desc.as_str()),
            ("DeviceNotActive", "Block job 'nope' not found"),
            "{command}"
        );
    }
    let error = client.err("block-job-set-speed", json!({"device": "nope", "speed": 0}));
    assert_eq!(
        (error.class.as_str(), error.desc.as_str()),
        ("DeviceNotActive", "Block job 'nope' not found")
    );
    start_sleeping_job(&mut client);
    let error = client.err("block-job-resume", json!({"device": "drive0"}));
    assert_eq!(
        (error.class.as_str(), error.desc.as_str()),
        ("GenericError", "Can't resume a job that was not paused")
    );
    let error = client.err("block-job-set-speed", json!({"device": "drive0", "speed": -1}));
    assert_eq!(error.desc, "Parameter 'speed' expects a non-negative value");
    let error = client.err("block-job-set-speed", json!({"device": "drive0", "value": 1}));
    assert_eq!(
        error.desc, "Parameter 'speed' is missing",
        "the argument of 2012 belongs to the name of 2012"
    );
    client.ok("block_job_set_speed", json!({"device": "drive0", "value": 0}));
    client.wait_completed();
    disk.umount();
    rig.assert_standalone(&rig.content);
}

/// Protects: cancel keeps the copied data and the backing link; a new job continues from there and
/// finishes.
#[test]
fn cancel_keeps_the_data_and_a_new_job_finishes() {
    requires!("/dev/fuse", "qemu-img");
    let rig = Rig::new(16 * MIB);
    let disk = rig.mount().qmp().start();
    let mut client = disk.client();
    start_sleeping_job(&mut client);
    client.ok("block_job_cancel", json!({"device": "drive0"}));
    let event = client.wait_event("BLOCK_JOB_CANCELLED");
    let want = json!({"type": "stream", "device": "drive0", "len": 16 * MIB, "offset": FIRST_STEP, "speed": 1});
    assert_eq!(event["data"], want, "exactly these members");
    client.wait_status("null");
    assert_eq!(
        client.event_names(),
        ["created", "running", "aborting", "BLOCK_JOB_CANCELLED", "concluded", "null"]
    );
    assert_eq!(client.ok("query-block-jobs", json!({})), json!([]));
    drop(client);
    disk.umount();
    assert_eq!(qemu::local_ranges(&rig.overlay), [0..FIRST_STEP], "what was copied stays");
    assert_eq!(qemu::info(&rig.overlay)["backing-filename"], json!("base.raw"), "the link stays");
    rig.assert_overlay(&rig.content);

    let disk = rig.mount().qmp().start();
    let mut client = disk.client();
    client.ok("block-stream", json!({"device": "drive0"}));
    client.wait_completed();
    disk.umount();
    rig.assert_standalone(&rig.content);
}

/// Protects: `force` cancels a paused job.
#[test]
fn force_cancels_a_paused_job() {
    requires!("/dev/fuse", "qemu-img");
    let rig = Rig::new(16 * MIB);
    let disk = rig.mount().qmp().start();
    let mut client = disk.client();
    start_sleeping_job(&mut client);
    client.ok("block-job-pause", json!({"device": "drive0"}));
    client.wait_status("paused");
    client.ok("block-job-cancel", json!({"device": "drive0", "force": true}));
    client.wait_event("BLOCK_JOB_CANCELLED");
    client.wait_status("null");
    assert_eq!(client.ok("query-block-jobs", json!({})), json!([]));
    assert_same("disk", &disk.read_all(), &rig.content);
    disk.umount();
    rig.assert_overlay(&rig.content);
}

/// Makes a chain of three files in one directory, with relative names: base.raw ← mid.qcow2 ←
/// top.qcow2. Returns the content of the disk.
fn three_layers(scratch: &Scratch, size: u64) -> Vec<u8> {
    scratch.raw("base.raw", size, Pattern::new(20, 1));
    let (mid, top) = (scratch.join("mid.qcow2"), scratch.join("top.qcow2"));
    qemu::create(&mid, None, "", Some(("base.raw", "raw")));
    qemu::write_pattern(&mid, Pattern::new(20, 2), &[MIB..2 * MIB, 5 * MIB..5 * MIB + 512]);
    qemu::io(&mid, &["write -q -z 3M 256k"]);
    qemu::create(&top, None, "", Some(("mid.qcow2", "qcow2")));
    qemu::write_pattern(&top, Pattern::new(20, 3), &[MIB + 256 * KIB..MIB + 512 * KIB]);
    qemu::read_all(&top)
}

/// Protects: with `base`, a stream copies only the data above the base. The overlay then names the
/// base by the relative name that the chain had for it, so that the directory can still be moved.
#[test]
fn a_stream_down_to_a_base_keeps_the_base() {
    requires!("/dev/fuse", "qemu-img");
    for (command, absolute) in
        [("block-stream", false), ("block-stream", true), ("block_stream", false)]
    {
        let scratch = Scratch::new();
        let want = three_layers(&scratch, 8 * MIB);
        let top = scratch.join("top.qcow2");
        let disk = Mount::new(&scratch, &top).args(&["--no-copy-on-read"]).qmp().start();
        let mut client = disk.client();
        let path = scratch.join("base.raw");
        let base = if absolute { path.to_str().expect("UTF-8") } else { "base.raw" };
        client.ok(command, json!({"device": "drive0", "base": base}));
        let data = client.wait_completed();
        assert_eq!((&data["len"], &data["offset"]), (&json!(8 * MIB), &json!(8 * MIB)));
        assert_same("disk after the stream", &disk.read_all(), &want);
        disk.umount();
        let info = qemu::info(&top);
        assert_eq!(info["backing-filename"], json!("base.raw"), "{info}");
        assert_eq!(info["backing-filename-format"], json!("raw"), "{info}");
        fs::remove_file(scratch.join("mid.qcow2")).expect("the middle is not needed any more");
        qemu::assert_clean(&top);
        assert_same("top over base", &qemu::read_all(&top), &want);
        let clusters: u64 =
            qemu::local_ranges(&top).iter().map(|range| (range.end - range.start) / CLUSTER).sum();
        assert_eq!(clusters, 16 + 1 + 4, "what was above the base, and nothing of the base");
        let moved = scratch.dir("moved");
        for name in ["base.raw", "top.qcow2"] {
            fs::rename(scratch.join(name), moved.join(name)).expect("move");
        }
        assert_same("moved together", &qemu::read_all(&moved.join("top.qcow2")), &want);
    }
}

/// Protects: a full stream copies from every layer, and afterwards no layer is needed.
#[test]
fn a_full_stream_takes_up_every_layer() {
    requires!("/dev/fuse", "qemu-img");
    let scratch = Scratch::new();
    let want = three_layers(&scratch, 8 * MIB);
    let top = scratch.join("top.qcow2");
    let disk = Mount::new(&scratch, &top).qmp().start();
    let mut client = disk.client();
    client.ok("block-stream", json!({"device": "drive0"}));
    client.wait_completed();
    for name in ["base.raw", "mid.qcow2"] {
        fs::remove_file(scratch.join(name)).expect("not needed any more");
    }
    assert_same("disk after the stream", &disk.read_all(), &want);
    disk.umount();
    qemu::assert_clean(&top);
    qemu::assert_independent(&top);
    assert_same("top alone", &qemu::read_all(&top), &want);
}

/// Protects: a backing file that is shorter than the disk reads as zeros behind its end, before and
/// after the stream; a longer one is not copied beyond the end of the disk.
#[test]
fn streams_from_shorter_and_longer_bases() {
    requires!("/dev/fuse", "qemu-img");
    for (base_size, options) in
        [(MIB + 1000, ""), (5 * MIB, ""), (MIB + 512, "compat=0.10"), (0, "cluster_size=4k")]
    {
        let scratch = Scratch::new();
        let mut want = Pattern::new(21, 1).bytes(0, base_size);
        scratch.write("base.raw", &want);
        want.resize(usize::try_from(3 * MIB + 512).expect("small"), 0);
        let overlay = scratch.join("overlay.qcow2");
        qemu::create(&overlay, Some(want.len() as u64), options, Some(("base.raw", "raw")));
        let disk = Mount::new(&scratch, &overlay).qmp().start();
        let mut client = disk.client();
        client.ok("block-stream", json!({"device": "drive0"}));
        let data = client.wait_completed();
        assert_eq!(
            (&data["len"], &data["offset"]),
            (&json!(want.len()), &json!(want.len())),
            "base of {base_size}"
        );
        assert_same("disk", &disk.read_all(), &want);
        disk.umount();
        fs::remove_file(scratch.join("base.raw")).expect("base");
        qemu::assert_clean(&overlay);
        qemu::assert_independent(&overlay);
        assert_same("overlay alone", &qemu::read_all(&overlay), &want);
    }
}

/// Protects: QEMU's messages (and classes) for every stream that cannot be started, in both
/// dialects.
#[test]
fn refusals_in_both_dialects() {
    requires!("/dev/fuse", "qemu-img");
    let rig = Rig::new(4 * MIB);
    let disk = rig.mount().qmp().start();
    let mut client = disk.client();
    let refused = |client: &mut QmpClient, command: &str, arguments: Value| {
        let error = client.err(command, arguments);
        (error.class, error.desc)
    };
    let generic = |desc: &str| ("GenericError".to_owned(), desc.to_owned());
    for (command, arguments, want) in [
        (
            "block-stream",
            json!({"device": "nope"}),
            generic("Cannot find device='nope' nor node-name='nope'"),
        ),
        (
            "block_stream",
            json!({"device": "nope"}),
            ("DeviceNotFound".to_owned(), "Device 'nope' not found".to_owned()),
        ),
        ("block-stream", json!({}), generic("Parameter 'device' is missing")),
        (
            "block-stream",
            json!({"device": 1}),
            generic("Invalid parameter type for 'device', expected: string"),
        ),
        (
            "block-stream",
            json!({"device": "drive0", "speed": -1}),
            generic("Parameter 'speed' expects a non-negative value"),
        ),
        (
            "block-stream",
            json!({"device": "drive0", "speed": "fast"}),
            generic("Invalid parameter type for 'speed', expected: integer"),
        ),
        (
            "block-stream",
            json!({"device": "drive0", "bogus": 1}),
            generic("Parameter 'bogus' is unexpected"),
        ),
        (
            "block-stream",
            json!({"device": "drive0", "on-error": "x"}),
            generic("Parameter 'on-error' does not accept value 'x'"),
        ),
        (
            "block-stream",
            json!({"device": "drive0", "job-id": "1x"}),
            generic("Invalid job ID '1x'"),
        ),
        (
            "block-stream",
            json!({"device": "drive0", "base": "other.raw"}),
            generic("Can't find 'other.raw' in the backing chain"),
        ),
        (
            "block_stream",
            json!({"device": "drive0", "base": "other.raw"}),
            generic("Base 'other.raw' not found"),
        ),
    ] {
        assert_eq!(refused(&mut client, command, arguments.clone()), want, "{command} {arguments}");
    }
    assert_eq!(client.ok("query-block-jobs", json!({})), json!([]), "nothing was started");

    start_sleeping_job(&mut client);
    let (class, desc) =
        refused(&mut client, "block-stream", json!({"device": "drive0", "job-id": "other"}));
    assert_eq!(class, "GenericError");
    assert!(
        desc.starts_with("Node '")
            && desc.ends_with("' is busy: block device is in use by block job: stream"),
        "{desc}"
    );
    assert_eq!(
        refused(&mut client, "block_stream", json!({"device": "drive0"})),
        generic("Device 'drive0' is in use")
    );
    client.ok("block-job-set-speed", json!({"device": "drive0", "speed": 0}));
    client.wait_completed();
    disk.umount();
    rig.assert_standalone(&rig.content);
}

/// Protects: a stream into a read-only disk is refused.
#[test]
fn a_read_only_disk_is_not_streamed() {
    requires!("/dev/fuse", "qemu-img");
    let rig = Rig::new(MIB);
    let before = fs::read(&rig.overlay).expect("overlay");
    let disk = rig.mount().args(&["--read-only"]).qmp().start();
    let mut client = disk.client();
    let error = client.err("block-stream", json!({"device": "drive0"}));
    assert_eq!(
        (error.class.as_str(), error.desc.as_str()),
        ("GenericError", "Block node is read-only")
    );
    assert_eq!(client.err("block_stream", json!({"device": "drive0"})).class, "GenericError");
    assert_eq!(client.ok("query-block-jobs", json!({})), json!([]));
    disk.umount();
    assert_same("the overlay file itself", &fs::read(&rig.overlay).expect("overlay"), &before);
}

/// Protects: every client receives every event, each after its own negotiation; a client that has
/// not negotiated receives none, and no event is sent to it later.
#[test]
fn several_clients_hear_the_same() {
    requires!("/dev/fuse", "qemu-img");
    let rig = Rig::new(2 * MIB);
    let disk = rig.mount().qmp().start();
    let mut clients: Vec<QmpClient> = (0..4).map(|_| disk.client()).collect();
    let mut silent = QmpClient::greeted(disk.socket());
    let error = silent.err("query-block-jobs", json!({}));
    assert_eq!(error.class, "CommandNotFound");
    assert_eq!(error.desc, "Expecting capabilities negotiation with 'qmp_capabilities'");
    clients[2].ok("block-stream", json!({"device": "drive0"}));
    for client in &mut clients {
        client.wait_status("null");
    }
    let want = clients[0].events.clone();
    assert_eq!(want.len(), 7);
    for client in &clients {
        assert_eq!(client.events, want, "to the microsecond");
    }
    silent.ok("qmp_capabilities", json!({}));
    silent.listen(Duration::from_millis(200));
    assert_eq!(silent.events, Vec::<Value>::new(), "what happened before is not replayed");
    assert_eq!(
        silent.err("qmp_capabilities", json!({})).desc,
        "Capabilities negotiation is already complete, command ignored"
    );
    drop((clients, silent));
    disk.umount();
    rig.assert_standalone(&rig.content);
}

/// Protects: a client that sends commands and never reads delays neither the job, nor the guest,
/// nor other clients.
#[test]
fn a_client_that_never_reads_stalls_nobody() {
    requires!("/dev/fuse", "qemu-img");
    let rig = Rig::new(8 * MIB);
    let disk = rig.mount().qmp().start();
    let deaf = UnixStream::connect(disk.socket()).expect("connect");
    deaf.set_write_timeout(Some(Duration::from_millis(300))).expect("write timeout");
    let mut requests = "{\"execute\":\"qmp_capabilities\"}\n".to_owned();
    requests.extend(std::iter::repeat_n("{\"execute\":\"query-commands\"}\n", 4000));
    // The server may take some of the requests or all of them, or close the connection.
    for chunk in requests.as_bytes().chunks(16384) {
        if std::io::Write::write_all(&mut &deaf, chunk).is_err() {
            break;
        }
    }
    let mut client = disk.client();
    client.ok("block-stream", json!({"device": "drive0", "speed": 4 * MIB}));
    let mut guest = rig.guest(&disk);
    guest.write(3 * MIB + 1..4 * MIB);
    guest.check_all();
    client.finish_job("drive0");
    let want = guest.shadow;
    drop((guest.file, client));
    disk.umount(); // the client that never reads is still connected
    drop(deaf);
    rig.assert_standalone(&want);
}

/// Protects: clients that die, in the middle of a command or right after one, disturb no other
/// client.
#[test]
fn clients_that_hang_up_hurt_nobody() {
    requires!("/dev/fuse", "qemu-img");
    let rig = Rig::new(8 * MIB);
    let disk = rig.mount().qmp().start();
    let mut client = disk.client();
    start_sleeping_job(&mut client);
    for text in [
        "",
        "{",
        "{\"execute\":\"block-job-set-speed\",\"argum",
        "{\"execute\":\"query-block-jobs\"}\n{\"execute\":",
        "{\"execute\":\"query-block-jobs\"}",
        "\u{1}\u{0}nonsense}}}]",
    ] {
        let mut short = disk.client();
        short.send_raw(text);
        short.hang_up();
    }
    drop(UnixStream::connect(disk.socket()).expect("connect and go"));
    assert_eq!(client.job()["offset"], json!(FIRST_STEP), "the job is still there");
    // A client that started a job may disconnect before the job ends.
    let mut other = disk.client();
    other.ok("block-job-set-speed", json!({"device": "drive0", "speed": 0}));
    other.hang_up();
    client.wait_completed();
    disk.umount();
    rig.assert_standalone(&rig.content);
}

/// Protects: data that the guest wrote, zeroed or discarded during a stream is never overwritten by
/// old data of the base (H1 to H4): at full and at limited speed, with small and large clusters,
/// version 2 included.
#[test]
fn guests_always_win_over_the_stream() {
    requires!("/dev/fuse", "qemu-img");
    let mut rng = Rng::for_test("guests always win");
    for (options, speed) in [
        ("cluster_size=512", 0),
        ("", 0),
        ("", 8 * MIB),
        ("cluster_size=4k,compat=0.10", 0),
        ("cluster_size=2M", 0),
        ("cluster_size=2M", 8 * MIB),
        ("extended_l2=on", 0),
        ("extended_l2=on,cluster_size=2M", 8 * MIB),
    ] {
        eprintln!("{options:?} at speed {speed}");
        let rig = Rig::with(Pattern::new(22, 1).bytes(0, 8 * MIB + 1536), options);
        let disk = rig.mount().qmp().start();
        let mut guest = rig.guest(&disk);
        let mut client = disk.client();
        // The guest starts first, so that its changes lie both behind and ahead of the stream's
        // position.
        for _ in 0..10 {
            guest.step(&mut rng, 100 * KIB);
        }
        client.ok("block-stream", json!({"device": "drive0", "speed": speed}));
        let done = AtomicBool::new(false);
        let steps = std::thread::scope(|scope| {
            let guest = scope.spawn(|| {
                let mut steps = 0;
                while !done.load(Ordering::Relaxed) {
                    guest.step(&mut rng, 100 * KIB);
                    steps += 1;
                }
                steps
            });
            client.wait_completed();
            done.store(true, Ordering::Relaxed);
            guest.join().expect("guest")
        });
        eprintln!("{steps} operations while the stream ran");
        guest.check_all();
        for _ in 0..10 {
            guest.step(&mut rng, 100 * KIB);
        }
        guest.check_all();
        let want = guest.shadow;
        drop(guest.file);
        disk.umount();
        rig.assert_standalone(&want);
    }
}

/// Protects: discarding a whole disk without local data and then streaming it gives zeros: the data
/// of the base must not become visible again.
#[test]
fn a_discarded_disk_stays_empty() {
    requires!("/dev/fuse", "qemu-img");
    for options in ["", "compat=0.10", "cluster_size=512", "extended_l2=on"] {
        let rig = Rig::with(Pattern::new(23, 1).bytes(0, 4 * MIB), options);
        let disk = rig.mount().qmp().start();
        let mut guest = rig.guest(&disk);
        guest.punch(100..4 * MIB - 100);
        guest.check_all();
        let want = guest.shadow.clone();
        drop(guest.file);
        disk.umount();
        rig.assert_overlay(&want);
        let disk = rig.mount().qmp().start();
        let mut client = disk.client();
        client.ok("block-stream", json!({"device": "drive0"}));
        client.wait_completed();
        assert_same("after the stream", &disk.read_all(), &want);
        disk.umount();
        rig.assert_standalone(&want);
    }
}

/// Protects: holes and zeros of the base do not become data of the overlay: the streamed file is
/// about as large as its data (version 3).
#[test]
fn zeros_take_no_space() {
    requires!("/dev/fuse", "qemu-img");
    let mut content = vec![0; usize::try_from(64 * MIB).expect("fits")];
    Pattern::new(24, 1).fill(MIB, &mut content[1 << 20..2 << 20]);
    let rig = Rig::with(content, "");
    let disk = rig.mount().qmp().start();
    let mut client = disk.client();
    client.ok("block-stream", json!({"device": "drive0"}));
    client.wait_completed();
    disk.umount();
    let size = fs::metadata(&rig.overlay).expect("stat").len();
    assert!(size < 4 * MIB, "1 MiB of data became {size} bytes");
    rig.assert_standalone(&rig.content);
}

/// Protects: what no layer holds costs no space in a stream of all layers, for raw and for qcow2
/// bases, and QEMU reads the result as equal. A stream that is cancelled half way hides nothing.
#[test]
fn holes_cost_nothing() {
    requires!("/dev/fuse", "qemu-img", "qemu-io");
    const TIB: u64 = 1 << 40;
    let scratch = Scratch::new();
    let base = scratch.join("base.raw");
    let file = fs::File::create(&base).expect("base");
    if let Err(error) = file.set_len(8 * TIB) {
        return eprintln!("skipped: no files of 8 TiB here: {error}");
    }
    file.write_all_at(b"x", 5 * TIB + 77).expect("write");
    let image = scratch.join("base.qcow2");
    qemu::create(&image, Some(8 * TIB), "", None);
    qemu::io(&image, &["write -q -z 1T 1M", "write -q -P 7 5T 512"]);
    for (name, path, format) in [("raw", &base, "raw"), ("qcow2", &image, "qcow2")] {
        let overlay = scratch.join(format!("{name}-overlay.qcow2"));
        qemu::create(&overlay, None, "", Some((path.to_str().expect("UTF-8"), format)));
        let disk = Mount::named(&scratch, &overlay, name).qmp().start();
        let mut client = disk.client();
        client.ok("block-stream", json!({"device": "drive0", "speed": 1}));
        client.ok("block-job-cancel", json!({"device": "drive0"}));
        client.wait_event("BLOCK_JOB_CANCELLED");
        let mut byte = [0];
        let data = if format == "raw" { (5 * TIB + 77, *b"x") } else { (5 * TIB, [7]) };
        disk.open().read_exact_at(&mut byte, data.0).expect("read");
        assert_eq!(byte, data.1, "{name}: the chain is still there");
        client.ok("block-stream", json!({"device": "drive0"}));
        let event = client.wait_completed();
        assert_eq!(event["offset"], json!(8 * TIB));
        disk.umount();
        qemu::assert_independent(&overlay);
        let size = fs::metadata(&overlay).expect("stat").len();
        assert!(size < MIB, "{name}: one cluster of data became {size} bytes");
        let overlay = overlay.to_str().expect("UTF-8");
        let compare = ["compare", "-f", format, "-F", "qcow2"];
        qemu::img(&[&compare[..], &[path.to_str().expect("UTF-8"), overlay]].concat());
    }
}

/// Protects: `--stream --speed` starts the same job without a client, and the queries return the
/// values of the command line.
#[test]
fn stream_from_the_command_line() {
    requires!("/dev/fuse", "qemu-img");
    let rig = Rig::new(4 * MIB);
    let disk = rig.mount().args(&["--device", "disk-a", "--stream", "--speed", "1K"]).qmp().start();
    let mut client = disk.client();
    // In the foreground the socket appears a moment before the job (without -f the command returns
    // when both exist).
    wait_until("the job of --stream is there", || {
        client.ok("query-block-jobs", json!({})) != json!([])
    });
    let job = client.job();
    assert_eq!(
        (&job["device"], &job["speed"], &job["type"]),
        (&json!("disk-a"), &json!(1024), &json!("stream")),
        "{job}"
    );
    client.ok("block-job-set-speed", json!({"device": "disk-a", "speed": 0}));
    client.wait_completed();
    disk.umount();
    rig.assert_standalone(&rig.content);

    // The same without a socket.
    let rig = Rig::new(2 * MIB);
    let disk = rig.mount().args(&["--stream"]).start();
    assert_same("disk", &disk.read_all(), &rig.content);
    wait_until("the backing link is dropped", || {
        let out = run_ok(
            Command::new("qemu-img")
                .args(["info", "-U", "-f", "qcow2", "--output=json"])
                .arg(&rig.overlay),
        );
        !out.contains("backing-filename")
    });
    disk.umount();
    rig.assert_standalone(&rig.content);
}

/// Protects: `--stream-priority` applies to the stream of the command line and to streams that
/// clients start. The reader threads of a stream run at a lower priority unless the option says
/// otherwise. The sandbox must allow that.
#[test]
fn readers_of_a_stream_step_back() {
    requires!("/dev/fuse", "qemu-img");
    let ours = rustix::process::getpriority_process(None).expect("a priority");
    let back = ours.max(10);
    let cases = [
        (&["--stream-priority", "low"][..], back),
        (&[], back),
        (&["--stream-priority", "normal"], ours),
    ];
    for (args, nice) in cases {
        for from_the_start in [true, false] {
            let rig = Rig::new(8 * MIB);
            let mount = rig.mount().args(args).qmp();
            let disk = if from_the_start {
                mount.args(&["--stream", "--speed", "1"]).start()
            } else {
                mount.start()
            };
            let mut client = disk.client();
            if !from_the_start {
                start_sleeping_job(&mut client);
            }
            let tasks = format!("/proc/{}/task", disk.server_pid().as_raw_nonzero());
            let readers = || {
                let stat = |task: std::io::Result<fs::DirEntry>| {
                    fs::read_to_string(task.ok()?.path().join("stat")).ok()
                };
                let stats = fs::read_dir(&tasks).expect("a process").filter_map(stat);
                // Fields behind the name: the state is the 3rd field of the file, the nice value
                // the 19th.
                let nice = |stat: String| {
                    stat.split_once("(stream-read) ")?.1.split(' ').nth(16)?.parse::<i32>().ok()
                };
                stats.filter_map(nice).collect::<Vec<_>>()
            };
            let found = poll(Duration::from_secs(20), || (readers() == [nice; 3]).then_some(()));
            assert!(found.is_some(), "{args:?}, from the start: {from_the_start}: {:?}", readers());
            client.ok("block-job-set-speed", json!({"device": "drive0", "speed": 0}));
            client.wait_completed();
            disk.umount();
            rig.assert_standalone(&rig.content);
        }
    }
}

/// Protects: `quit` cancels the job (it does not complete it), flushes, unmounts and replies last;
/// the process ends with status 0.
#[test]
fn quit_is_a_clean_end() {
    requires!("/dev/fuse", "qemu-img");
    let rig = Rig::new(4 * MIB);
    let mut disk = rig.mount().qmp().start();
    let mut guest = rig.guest(&disk);
    guest.write(2 * MIB + 5..3 * MIB);
    let want = guest.shadow;
    drop(guest.file);
    let mut client = disk.client();
    start_sleeping_job(&mut client);
    assert_eq!(client.ok("quit", json!({})), json!({}));
    let names = client.event_names();
    let place = |name: &str| {
        names
            .iter()
            .position(|other| other == name)
            .unwrap_or_else(|| panic!("{name} in {names:?}"))
    };
    assert!(
        place("aborting") < place("BLOCK_JOB_CANCELLED")
            && place("BLOCK_JOB_CANCELLED") < place("concluded"),
        "{names:?}"
    );
    assert!(!names.iter().any(|name| name == "BLOCK_JOB_COMPLETED"), "{names:?}");
    assert_eq!(client.message(Duration::from_secs(30)), None, "then the session ends");
    disk.assert_clean_end();
    rig.assert_overlay(&want);
    assert_eq!(qemu::info(&rig.overlay)["backing-filename"], json!("base.raw"));
}

/// Protects: only the owner can use the socket. The socket file of a dead daemon is replaced, that
/// of a running one is not.
#[test]
fn the_socket_is_private_and_a_stale_one_is_replaced() {
    requires!("/dev/fuse", "qemu-img");
    let rig = Rig::new(MIB);
    let stale = rig.scratch.join("drive0.sock");
    drop(UnixListener::bind(&stale).expect("bind")); // the file stays without a listener
    let disk = rig.mount().qmp().start();
    assert_eq!(fs::metadata(disk.socket()).expect("stat").permissions().mode() & 0o777, 0o600);
    assert_eq!(disk.client().ok("query-block-jobs", json!({})), json!([]));
    disk.umount();
}

/// Protects: the facts that clients query first: version, commands, and the device with its image
/// and backing file.
#[test]
fn facts_about_version_commands_and_device() {
    requires!("/dev/fuse", "qemu-img");
    let rig = Rig::new(MIB);
    let disk = rig.mount().qmp().start();
    let mut client = disk.client();
    assert_eq!(client.ok("query-version", json!({})), client.greeting["QMP"]["version"]);
    let package =
        client.greeting["QMP"]["version"]["package"].as_str().expect("package").to_owned();
    assert!(package.contains("cordisk"), "{package}");
    let commands = client.ok("query-commands", json!({}));
    let names: BTreeSet<&str> = commands
        .as_array()
        .expect("list")
        .iter()
        .map(|entry| entry["name"].as_str().expect("name"))
        .collect();
    for name in [
        "qmp_capabilities",
        "block-stream",
        "block_stream",
        "query-block-jobs",
        "query-jobs",
        "block-job-set-speed",
        "block_job_set_speed",
        "block-job-cancel",
        "block_job_cancel",
        "block-job-pause",
        "block_job_pause",
        "block-job-resume",
        "block_job_resume",
        "query-block",
        "query-version",
        "query-commands",
        "quit",
    ] {
        assert!(names.contains(name), "{name} in {names:?}");
    }
    let blocks = client.ok("query-block", json!({}));
    assert_eq!(blocks.as_array().expect("list").len(), 1);
    let (device, inserted) = (&blocks[0], &blocks[0]["inserted"]);
    assert_eq!((&device["device"], &device["io-status"]), (&json!("drive0"), &json!("ok")));
    assert_eq!((&inserted["ro"], &inserted["drv"]), (&json!(false), &json!("qcow2")), "{inserted}");
    assert_eq!(inserted["file"].as_str(), rig.overlay.to_str(), "{inserted}");
    assert_eq!(inserted["image"]["virtual-size"], json!(MIB), "{inserted}");
    assert_eq!(inserted["image"]["format"], json!("qcow2"), "{inserted}");
    assert_eq!(inserted["backing_file_depth"], json!(1), "{inserted}");
    assert!(
        inserted["backing_file"].as_str().expect("backing_file").ends_with("base.raw"),
        "{inserted}"
    );
    let error = client.err("no-such-command", json!({}));
    assert_eq!(
        (error.class.as_str(), error.desc.as_str()),
        ("CommandNotFound", "The command no-such-command has not been found")
    );
    client.ok("block-stream", json!({"device": "drive0"}));
    client.wait_completed();
    let inserted = &client.ok("query-block", json!({}))[0]["inserted"];
    assert_eq!(inserted["backing_file_depth"], json!(0), "{inserted}");
    assert_eq!(inserted.get("backing_file"), None, "{inserted}");
    disk.umount();
    rig.assert_standalone(&rig.content);
}

/// Protects: a guest that only reads during a stream reads the base's bytes at every moment, in
/// every chunk size.
#[test]
fn readers_see_the_same_bytes_all_the_time() {
    requires!("/dev/fuse", "qemu-img");
    let mut rng = Rng::for_test("readers during a stream");
    let rig = Rig::new(16 * MIB);
    let disk: Daemon = rig.mount().qmp().start();
    let mut guest: Guest = rig.guest(&disk);
    let mut client = disk.client();
    client.ok("block-stream", json!({"device": "drive0", "speed": 16 * MIB}));
    while client.ok("query-block-jobs", json!({})) != json!([]) {
        for _ in 0..20 {
            let range = rng.range(16 * MIB, 600 * KIB);
            guest.check(range);
        }
    }
    guest.check_all();
    assert_eq!(guest.file.read_at(&mut [0; 16], 16 * MIB).expect("read at the end"), 0);
    drop(guest.file);
    disk.umount();
    rig.assert_standalone(&rig.content);
}
