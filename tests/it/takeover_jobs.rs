//! The serving process is killed while it has jobs: its successor has the same jobs, and no job
//! starts or ends twice.

use std::fs;
use std::os::unix::fs::FileExt;
use std::process::Stdio;

use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};

use crate::support::daemon::{server_of, wait_for_death};
use crate::support::metrics::Scrape;
use crate::support::nbd::{Fault, NbdFile};
use crate::support::{
    Daemon, KIB, MIB, Mount, Pattern, QmpClient, Rig, Rng, Scratch, assert_same, qemu, read_at,
    wait_until,
};
use crate::takeover::{is_protected, kill, start};

/// A speed at which a job copies one step and then sleeps for a long time, in bytes per second.
const SLOW: u64 = 1000;

/// Kills the serving process and waits until another one serves. Returns it, and a client of it.
fn kill_and_connect(disk: &Daemon, server: Pid) -> (Pid, QmpClient) {
    let server = kill(disk, server, Signal::KILL);
    // It is answered when the successor serves, and then its socket is there.
    read_at(&disk.open(), 0, 512);
    (server, disk.client())
}

/// What `query-block-jobs` tells of the job, except how far it is.
fn as_it_is(client: &mut QmpClient) -> Value {
    let mut job = client.job();
    for name in ["offset", "busy"] {
        job.as_object_mut().expect("an object").remove(name);
    }
    job
}

fn offset(client: &mut QmpClient) -> u64 {
    client.job()["offset"].as_u64().expect("a number")
}

/// Asserts that everything was copied. What the killed processes have leaked is given back by the
/// next mount.
fn assert_standalone(rig: &Rig) {
    rig.mount().start().umount();
    rig.assert_standalone(&rig.content);
}

fn count(client: &QmpClient, name: &str) -> usize {
    client.event_names().iter().filter(|event| *event == name).count()
}

/// Protects: a stream that a client has started goes on under its id, with the speed that was set
/// last, its error policy and what else the client asked for, after each of several kills. Its
/// progress does not go back. It ends once, with the event that clients wait for, and the image
/// stands alone.
#[test]
fn a_job_stays_the_job_that_it_was() {
    requires!("/dev/fuse", "qemu-img");
    let rig = Rig::new(8 * MIB);
    let disk = start(&rig, &[]);
    if !is_protected(&disk) {
        return;
    }
    let mut client = disk.client();
    let arguments = json!({
        "device": "drive0", "job-id": "copy-1", "speed": 1, "on-error": "enospc", "auto-dismiss": false,
    });
    client.ok("block-stream", arguments.clone());
    client.wait_for_first_step();
    client.ok("block-job-set-speed", json!({"device": "copy-1", "speed": SLOW}));
    let before = as_it_is(&mut client);
    assert_eq!(
        before,
        json!({"type": "stream", "device": "copy-1", "len": rig.size(), "paused": false, "speed": SLOW,
               "io-status": "ok", "ready": false, "status": "running", "auto-finalize": true, "auto-dismiss": false})
    );
    let mut done = offset(&mut client);
    let mut server = disk.server_pid();
    for _ in 0..3 {
        (server, client) = kill_and_connect(&disk, server);
        assert_eq!(as_it_is(&mut client), before);
        // Progress is not kept at each step. What is local already is passed over at once.
        wait_until("it is where it was", || offset(&mut client) >= done);
        done = offset(&mut client);
        let listed = client.ok("query-jobs", json!({}));
        assert_eq!(
            (&listed[0]["id"], &listed[0]["status"], &listed[0]["total-progress"]),
            (&json!("copy-1"), &json!("running"), &json!(rig.size()))
        );
        let error = client.err("block-stream", json!({"device": "drive0", "job-id": "second"}));
        assert!(error.desc.contains("busy"), "{error:?}");
    }
    client.ok("block-job-set-speed", json!({"device": "copy-1", "speed": 0}));
    let completed = client.wait_completed();
    assert_eq!(
        completed,
        json!({"type": "stream", "device": "copy-1", "len": rig.size(), "offset": rig.size(), "speed": 0})
    );
    client.wait_status("concluded");
    assert_eq!(count(&client, "BLOCK_JOB_COMPLETED"), 1);
    let last = client.ok("x-query-last-job", json!({}));
    assert_eq!(last["arguments"], arguments, "what the client has asked for at first");
    client.ok("job-dismiss", json!({"id": "copy-1"}));
    assert_same("after the stream", &disk.read_all(), &rig.content);
    drop(client);
    disk.umount();
    assert_standalone(&rig);
}

/// Protects: a paused job is paused and copies nothing until a client resumes it, also in the third
/// process.
#[test]
fn a_paused_job_stays_paused() {
    requires!("/dev/fuse", "qemu-img");
    let rig = Rig::new(4 * MIB);
    let disk = start(&rig, &[]);
    if !is_protected(&disk) {
        return;
    }
    let mut client = disk.client();
    client.ok("block-stream", json!({"device": "drive0", "job-id": "copy", "speed": 1}));
    client.wait_for_first_step();
    client.ok("block-job-pause", json!({"device": "copy"}));
    client.wait_status("paused");
    let before = client.job();
    assert_eq!((&before["paused"], &before["status"]), (&json!(true), &json!("paused")));
    let mut server = disk.server_pid();
    for _ in 0..2 {
        (server, client) = kill_and_connect(&disk, server);
        assert_eq!(client.job(), before);
    }
    let paused = client.err("block-job-cancel", json!({"device": "copy"}));
    assert!(paused.desc.contains("currently paused"), "{paused:?}");
    client.ok("block-job-resume", json!({"device": "copy"}));
    client.finish_job("copy");
    assert_eq!(count(&client, "BLOCK_JOB_COMPLETED"), 1);
    drop(client);
    disk.umount();
    assert_standalone(&rig);
}

/// Protects: a stream of the upper layers alone stays one: the base that the client has named stays
/// below, under the name that the client has given it, also after a second kill.
#[test]
fn a_stream_to_a_base_stops_at_it() {
    requires!("/dev/fuse", "qemu-img");
    let scratch = Scratch::new();
    let content = Pattern::new(72, 1).bytes(0, 4 * MIB);
    let base = scratch.write("base.raw", &content);
    let (middle, overlay) = (scratch.join("middle.qcow2"), scratch.join("overlay.qcow2"));
    qemu::create(&middle, None, "", Some(("base.raw", "raw")));
    let written = Pattern::new(73, 1).bytes(0, 2 * MIB);
    let disk = Mount::named(&scratch, &middle, "middle").start();
    disk.open().write_all_at(&written, 0).expect("write");
    disk.umount();
    qemu::create(&overlay, None, "", Some(("middle.qcow2", "qcow2")));
    let disk = Mount::new(&scratch, &overlay)
        .args(&["--no-copy-on-read", "--transport", "dev"])
        .qmp()
        .start();
    if !is_protected(&disk) {
        return;
    }
    let mut client = disk.client();
    let name = format!("{}/./base.raw", scratch.path().display());
    client.ok(
        "block-stream",
        json!({"device": "drive0", "speed": 1, "base": base, "backing-file": name}),
    );
    client.wait_for_first_step();
    let before = as_it_is(&mut client);
    let (server, mut client) = kill_and_connect(&disk, disk.server_pid());
    assert_eq!(as_it_is(&mut client), before);
    client.finish_job("drive0");
    let (_, mut client) = kill_and_connect(&disk, server);
    assert_eq!(client.ok("query-jobs", json!({})), json!([]));
    let inserted = client.ok("query-block", json!({}))[0]["inserted"].clone();
    assert_eq!(
        (&inserted["backing_file"], &inserted["backing_file_depth"]),
        (&json!(name), &json!(1))
    );
    drop(client);
    disk.umount();
    fs::remove_file(&middle).expect("the middle is not needed");
    Mount::new(&scratch, &overlay).start().umount();
    qemu::assert_clean(&overlay);
    let mut expected = content;
    expected[..written.len()].copy_from_slice(&written);
    assert_same("above the base", &qemu::read_all(&overlay), &expected);
}

/// Protects: a job that an error has stopped stays stopped, with the reason, and tries the same
/// chunk again when a client resumes it.
#[test]
fn a_job_that_an_error_has_stopped_stays_stopped() {
    requires!("/dev/fuse", "qemu-img", "nbdkit", "nbdfuse");
    let (chunk, size) = (512 * KIB, 4 * MIB);
    let bad = 3 * chunk + 200 * KIB;
    let scratch = Scratch::new();
    let content = Pattern::new(71, 1).bytes(0, size);
    let base = NbdFile::serve(&scratch, "base.raw", &content, &(bad..bad + 512));
    let overlay = scratch.join("overlay.qcow2");
    qemu::create(&overlay, None, "", Some(("base.raw", "raw")));
    let options = ["--no-copy-on-read", "--transport", "dev"];
    let disk = Mount::new(&scratch, &overlay).args(&options).qmp().start();
    if !is_protected(&disk) {
        return;
    }
    base.fail(Fault::Read);
    let mut client = disk.client();
    client.ok("block-stream", json!({"device": "drive0", "job-id": "copy", "on-error": "stop"}));
    client.wait_event("BLOCK_JOB_ERROR");
    client.wait_status("paused");
    let before = client.job();
    assert_eq!((&before["io-status"], &before["offset"]), (&json!("failed"), &json!(3 * chunk)));
    let (server, mut client) = kill_and_connect(&disk, disk.server_pid());
    assert_eq!(client.job(), before);
    let progress = client.ok("x-query-job-progress", json!({}));
    let why = progress[0]["error-detail"].as_str().unwrap_or_default().to_owned();
    assert!(why.contains("base.raw"), "{progress}");
    client.ok("block-job-resume", json!({"device": "copy"}));
    client.wait_event("BLOCK_JOB_ERROR");
    client.wait_status("paused");
    base.repair(Fault::Read);
    let (_, mut client) = kill_and_connect(&disk, server);
    assert_eq!(client.job(), before);
    client.ok("block-job-resume", json!({"device": "copy"}));
    client.wait_completed();
    drop(client);
    assert_same("the disk", &disk.read_all(), &content);
    disk.umount();
    Mount::new(&scratch, &overlay).start().umount();
    drop(base);
    qemu::assert_clean(&overlay);
    qemu::assert_independent(&overlay);
    assert_same("the overlay alone", &qemu::read_all(&overlay), &content);
}

/// Protects: a job that has ended and waits to be dismissed waits in the successor, which reports
/// no second end; one that waits for its finalize takes effect there, when a client says so, and
/// not before.
#[test]
fn a_job_that_waits_for_a_client_waits_on() {
    requires!("/dev/fuse", "qemu-img");
    let rig = Rig::new(2 * MIB);
    let disk = start(&rig, &[]);
    if !is_protected(&disk) {
        return;
    }
    let mut client = disk.client();
    client.ok(
        "block-stream",
        json!({"device": "drive0", "job-id": "copy", "auto-finalize": false, "auto-dismiss": false}),
    );
    client.wait_event("BLOCK_JOB_PENDING");
    let before = client.job();
    let (server, mut client) = kill_and_connect(&disk, disk.server_pid());
    assert_eq!(client.job(), before);
    assert_eq!(client.ok("query-block", json!({}))[0]["inserted"]["backing_file_depth"], json!(1));
    client.ok("job-finalize", json!({"id": "copy"}));
    client.wait_completed();
    client.wait_status("concluded");
    assert_eq!((count(&client, "BLOCK_JOB_PENDING"), count(&client, "pending")), (0, 0));
    let before = client.job();
    let (_, mut client) = kill_and_connect(&disk, server);
    assert_eq!(client.job(), before);
    assert_eq!(before["status"], json!("concluded"));
    client.ok("block-job-dismiss", json!({"id": "copy"}));
    assert_eq!(client.ok("query-jobs", json!({})), json!([]));
    assert_eq!(count(&client, "BLOCK_JOB_COMPLETED"), 0, "{:?}", client.event_names());
    drop(client);
    disk.umount();
    assert_standalone(&rig);
}

/// Starts a command of ours about the disk while the main process is stopped and the serving
/// process was killed, continues the main process when the command waits for an answer, and returns
/// the status and the output of the command.
fn in_the_gap(rig: &Rig, disk: &Daemon, arguments: &[&str]) -> (bool, String) {
    let server = server_of(disk.pid());
    disk.signal(Signal::STOP);
    kill_process(server, Signal::KILL).expect("the serving process lives");
    // Its lock on the entry goes with its last thread.
    wait_for_death(server);
    let mut command = rig.scratch.cordisk();
    command.args(arguments).arg(disk.path());
    let command = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let command = command.spawn().expect("cordisk");
    // A thread of the command asks the mount, which does not answer.
    let threads = format!("/proc/{}/task", command.id());
    wait_until("the command waits", || fs::read_dir(&threads).map_or(0, Iterator::count) > 1);
    disk.signal(Signal::CONT);
    let output = command.wait_with_output().expect("wait");
    let text = [output.stdout, output.stderr].concat();
    (output.status.success(), String::from_utf8_lossy(&text).into_owned())
}

/// Protects: a command that a user gives just after a kill waits for the process that takes the
/// disk over, and then does what it should.
#[test]
fn commands_wait_for_the_process_that_takes_over() {
    requires!("/dev/fuse", "qemu-img");
    let rig = Rig::new(2 * MIB);
    let mut disk = start(&rig, &[]);
    if !is_protected(&disk) {
        return;
    }
    let (is_done, said) = in_the_gap(&rig, &disk, &["status"]);
    assert!(is_done && said.contains("running") && said.contains("is survived; one was"), "{said}");
    let (is_done, said) = in_the_gap(&rig, &disk, &["stream", "--wait"]);
    assert!(is_done && said.contains("completed"), "{said}");
    let (is_done, said) = in_the_gap(&rig, &disk, &["umount"]);
    assert!(is_done && said.is_empty(), "{said}");
    disk.assert_clean_end();
    drop(disk);
    assert_standalone(&rig);
}

/// Protects: if no other process comes, a command says so in one line, and does not wait for ever.
#[test]
fn a_command_does_not_wait_for_ever() {
    requires!("/dev/fuse", "qemu-img");
    let rig = Rig::new(MIB);
    let disk = start(&rig, &[]);
    if !is_protected(&disk) {
        return;
    }
    disk.signal(Signal::STOP);
    let server = disk.server_pid();
    disk.signal_server(Signal::KILL);
    wait_for_death(server);
    let output = rig.scratch.cordisk().arg("status").arg(disk.path()).output().expect("status");
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(!output.status.success() && said.lines().count() == 1, "{said}");
    assert!(said.contains("no other one has taken the disk over yet; try again"), "{said}");
    disk.signal(Signal::CONT);
    crate::takeover::successor_of(&disk, server);
    assert_same("later", &disk.read_all(), &rig.content);
    disk.umount();
}

/// Protects: the number of takeovers, the time of the last one, and whether a kill is survived are
/// in the status, in its JSON and in the metrics; the time of the mount stays.
#[test]
fn takeovers_are_counted() {
    requires!("/dev/fuse", "qemu-img");
    let rig = Rig::new(MIB);
    let disk = start(&rig, &["--metrics", "127.0.0.1:0"]);
    if !is_protected(&disk) {
        return;
    }
    let status = || disk.client().ok("x-query-status", json!({}));
    let first = status();
    assert_eq!(first["takeover"], json!({"possible": true, "count": 0}));
    // The port is another one in each process.
    let metric = |name: &str| {
        let address = status()["metrics"].as_str().and_then(|address| address.parse().ok());
        Scrape::of(address.expect("an address")).value(name, &[])
    };
    assert_eq!(metric("cordisk_takeovers_total"), 0.0);
    let mut server = disk.server_pid();
    for count in 1..=2 {
        (server, _) = kill_and_connect(&disk, server);
        let now = status();
        assert_eq!(
            (&now["takeover"]["count"], &now["takeover"]["possible"]),
            (&json!(count), &json!(true))
        );
        let last = now["takeover"]["last"]["seconds"].as_i64().expect("a time");
        assert!(last >= first["start-time"]["seconds"].as_i64().expect("a time"));
        // The keeper notes the time of the mount a moment after the process that has mounted.
        let started = |status: &Value| {
            let part = |name: &str| status["start-time"][name].as_f64().expect("a number");
            part("seconds") + part("microseconds") / 1e6
        };
        assert!((started(&now) - started(&first)).abs() < 30.0, "{first} {now}");
        assert_eq!(metric("cordisk_takeovers_total"), f64::from(count));
        assert_eq!(metric("cordisk_survives_kill"), 1.0);
        assert!((metric("cordisk_last_takeover_time_seconds") - last as f64).abs() <= 1.0);
    }
    let said = rig.scratch.cordisk().arg("status").arg(disk.path()).output().expect("status");
    let said = String::from_utf8_lossy(&said.stdout).into_owned();
    assert!(said.contains("a kill  of the serving process is survived; 2 were, last "), "{said}");

    // Without its main process the disk is served on, and not protected any more.
    kill_process(disk.pid(), Signal::KILL).expect("the main process lives");
    wait_until("the reason", || {
        status()["takeover"]["reason"] == json!("the mount keeper has died")
    });
    assert_eq!(metric("cordisk_survives_kill"), 0.0);
    disk.die();
}

/// Protects: a disk that no other process could take over says why.
#[test]
fn a_disk_that_is_not_protected_says_why() {
    requires!("/dev/fuse", "qemu-img");
    let rig = Rig::new(MIB);
    let disk = rig.mount().qmp().start();
    let takeover = disk.client().ok("x-query-status", json!({}))["takeover"].clone();
    let text = takeover["reason"].as_str().unwrap_or_default();
    if takeover["possible"] == json!(true) {
        assert_eq!(text, "", "{takeover}");
    } else {
        let known = ["the session is over io_uring", "the kernel is older than Linux 6.9"];
        assert!(known.contains(&text), "{takeover}");
    }
    disk.umount();
}

/// Protects: a job that was cancelled, or that has completed, is not started again by the
/// successor, not even that of `--stream`, and its note does not start it at the next mount.
#[test]
fn a_job_that_has_ended_does_not_start_again() {
    requires!("/dev/fuse", "qemu-img");
    let rig = Rig::new(4 * MIB);
    let args = ["--transport", "dev", "--stream", "--speed", "1"];
    let disk = rig.mount().args(&args).qmp().start_settled();
    if !is_protected(&disk) {
        return;
    }
    let mut client = disk.client();
    client.wait_for_first_step();
    // It goes on, and only once.
    let (server, mut client) = kill_and_connect(&disk, disk.server_pid());
    assert_eq!(client.job()["device"], json!("drive0"));
    assert_eq!(client.job()["speed"], json!(1));
    client.ok("block-job-cancel", json!({"device": "drive0"}));
    client.wait_event("BLOCK_JOB_CANCELLED");
    let (server, mut client) = kill_and_connect(&disk, server);
    assert_eq!(client.ok("query-block-jobs", json!({})), json!([]));
    let last = client.ok("x-query-last-job", json!({}));
    assert_eq!((&last["id"], &last["result"]), (&json!("drive0"), &json!("cancelled")));
    assert_eq!(client.ok("query-block", json!({}))[0]["inserted"]["backing_file_depth"], json!(1));
    // A client can start the next one, which completes; nor does that start again.
    client.ok("block-stream", json!({"device": "drive0", "job-id": "again"}));
    client.wait_completed();
    let (_, mut client) = kill_and_connect(&disk, server);
    assert_eq!(client.ok("query-block-jobs", json!({})), json!([]));
    let last = client.ok("x-query-last-job", json!({}));
    assert_eq!((&last["id"], &last["result"]), (&json!("again"), &json!("success")));
    assert_eq!(last["offset"], json!(rig.size()));
    assert_eq!((count(&client, "BLOCK_JOB_COMPLETED"), count(&client, "created")), (0, 0));
    drop(client);
    disk.umount();
    assert_standalone(&rig);
}

/// Protects: the command of `--on-complete` runs once for each stream that has completed, although
/// the serving process is killed as soon as the stream is over, and again later.
#[test]
fn the_command_runs_once_for_each_completion() {
    requires!("/dev/fuse", "qemu-img", "sh");
    let rig = Rig::new(2 * MIB);
    let (out, go) = (rig.scratch.dir("out"), rig.scratch.write("wait", b""));
    // No command ends before the test says so: those that have run are those that have started.
    let command =
        format!("mktemp -p {}; while test -e {}; do sleep 0.1; done", out.display(), go.display());
    let disk = start(&rig, &["--on-complete", &command]);
    if !is_protected(&disk) {
        return;
    }
    let started = || fs::read_dir(&out).map_or(0, Iterator::count);
    let mut server = disk.server_pid();
    for streams in 1..=4 {
        let mut client = disk.client();
        // The first one cuts the chain; the others have nothing to copy.
        client.ok("block-stream", json!({"device": "drive0"}));
        client.wait_completed();
        (server, _) = kill_and_connect(&disk, server);
        wait_until("the command has started", || started() >= streams);
        (server, _) = kill_and_connect(&disk, server);
        assert_eq!(started(), streams);
    }
    fs::remove_file(&go).expect("the file");
    disk.umount();
    assert_eq!(started(), 4);
    assert_standalone(&rig);
}

/// Protects: wherever between the last chunk, the cut of the chain, the list of jobs, the events
/// and the command of `--on-complete` the serving process is killed, the stream ends once: as a
/// success, with one command, and with an image that stands alone.
#[test]
fn a_stream_ends_once_wherever_it_is_killed() {
    requires!("/dev/fuse", "qemu-img", "sh");
    let mut rng = Rng::for_test("a stream ends once wherever it is killed");
    for round in 0..12 {
        let rig = Rig::new(MIB);
        let out = rig.scratch.dir("out");
        let command = format!("mktemp -p {}", out.display());
        let disk = start(&rig, &["--on-complete", &command]);
        if !is_protected(&disk) {
            return;
        }
        let mut client = disk.client();
        client.ok("block-stream", json!({"device": "drive0", "job-id": "copy"}));
        // A moment that follows from what the process has done, not from a clock.
        for _ in 0..rng.below(12) {
            client.ok("query-block-jobs", json!({}));
        }
        let mut server = disk.server_pid();
        for _ in 0..=rng.below(2) {
            (server, client) = kill_and_connect(&disk, server);
        }
        wait_until("the end", || client.ok("query-jobs", json!({})) == json!([]));
        let last = client.ok("x-query-last-job", json!({}));
        assert_eq!(
            (&last["id"], &last["result"], &last["offset"], &last["len"]),
            (&json!("copy"), &json!("success"), &json!(rig.size()), &json!(rig.size())),
            "round {round}: {last}\n{}",
            disk.log()
        );
        let ran = || fs::read_dir(&out).map_or(0, Iterator::count);
        wait_until("the command has run", || ran() == 1);
        (_, client) = kill_and_connect(&disk, server);
        assert_eq!(client.ok("query-jobs", json!({})), json!([]), "round {round}");
        drop(client);
        disk.umount();
        assert_eq!(ran(), 1, "round {round}");
        assert_standalone(&rig);
    }
}
