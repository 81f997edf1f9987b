//! Many requests at the same time, many clients, clients that die, clients that do not read,
//! clients without permission.

use std::collections::BTreeSet;
use std::fs;
use std::io::{Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use serde_json::{Value, json};

use crate::support::{
    Daemon, KIB, MIB, QmpClient, Rig, Rng, Scratch, assert_same, poll, run_within, wait_until,
};

const PATIENCE: Duration = Duration::from_secs(60);
/// Maximum number of clients at the same time.
const MAX_CLIENTS: usize = 32;

/// Groups the events of one client by job (status or name), and asserts that each job followed the
/// transitions of the state table.
fn lives(events: &[Value]) -> Vec<Vec<String>> {
    let mut lives: Vec<(String, Vec<String>)> = Vec::new();
    for event in events {
        let data = &event["data"];
        let id = data["id"]
            .as_str()
            .or(data["device"].as_str())
            .unwrap_or_else(|| panic!("whose is {event}"));
        let name =
            data["status"].as_str().unwrap_or_else(|| event["event"].as_str().expect("name"));
        if name == "created" {
            let before = lives.last().map(|(_, life)| life.last().expect("not empty").as_str());
            assert!(
                before.is_none_or(|last| last == "null"),
                "{id} began before the one before had ended: {event}"
            );
            lives.push((id.to_owned(), Vec::new()));
        }
        let (owner, life) = lives.last_mut().unwrap_or_else(|| panic!("{event} without a job"));
        assert_eq!(owner, id, "{event} in the life of {owner}");
        life.push(name.to_owned());
    }
    lives.into_iter().map(|(_, life)| life).collect()
}

/// Protects: 500 pairs of `block-stream` and `job-cancel`, half of them in one write, the others
/// with pauses, without waiting for replies. Every request gets one reply, in order; each job that
/// was started has exactly one life, and the disk loses no data.
#[test]
fn five_hundred_pipelined_pairs() {
    const PAIRS: usize = 500;
    requires!("/dev/fuse", "qemu-img");
    let mut rng = Rng::for_test("500 pipelined pairs");
    let rig = Rig::new(64 * MIB);
    let disk = rig.mount().qmp().start();
    let mut client = disk.client();
    let mut writes = vec![String::new()];
    for pair in 0..PAIRS {
        let speed = [1, 1, 64 * KIB, MIB][usize::try_from(rng.below(4)).expect("small")];
        let arguments = json!({"device": "drive0", "job-id": format!("j{pair}"), "speed": speed});
        let start = json!({"execute": "block-stream", "arguments": arguments, "id": 2 * pair});
        let cancel = json!({"execute": "job-cancel", "arguments": {"id": format!("j{pair}")}, "id": 2 * pair + 1});
        // With and without something between them.
        let gap = ["", "\n", " \r\n\t"][usize::try_from(rng.below(3)).expect("small")];
        writes.last_mut().expect("one").push_str(&format!("{start}{gap}{cancel}{gap}"));
        // A job that is working on a chunk does not end at once when it is cancelled. During a
        // pause it ends, and the next one can start.
        if pair >= PAIRS / 2 && rng.below(2) == 0 {
            writes.push(String::new());
        }
    }
    let mut started = 0;
    let mut sending = client.another_hand();
    std::thread::scope(|scope| {
        // Replies arrive while requests are still being sent.
        scope.spawn(|| {
            for text in &writes {
                sending.write_all(text.as_bytes()).expect("send");
                std::thread::sleep(Duration::from_millis(rng.below(15)));
            }
        });
        let mut next = 0;
        while next < 2 * PAIRS {
            let message = client.message(PATIENCE).expect("the session goes on");
            if message.get("event").is_some() {
                continue;
            }
            assert_eq!(message["id"], json!(next), "replies in order, none left out: {message}");
            let desc = message["error"]["desc"].as_str().unwrap_or_default().to_owned();
            if next % 2 == 0 {
                // The job before may still be working on a chunk.
                let busy =
                    desc == "Node 'drive0' is busy: block device is in use by block job: stream";
                assert!(message["return"] == json!({}) || busy, "{message}");
                started += usize::from(!busy);
            } else {
                let gone =
                    desc == "Job not found" || desc.contains("cannot accept command verb 'cancel'");
                assert!(message["return"] == json!({}) || gone, "{message}");
            }
            next += 1;
        }
    });
    wait_until("all jobs are over", || client.ok("query-jobs", json!({})) == json!([]));
    client.listen(Duration::from_millis(100));
    eprintln!("{started} of {PAIRS} jobs were started");
    assert!(started >= 10, "{started} started");
    let lives = lives(&client.events);
    assert_eq!(lives.len(), started, "one life for each job");
    for life in lives {
        let end = &life[2..];
        let cancelled = ["aborting", "BLOCK_JOB_CANCELLED", "concluded", "null"];
        let completed = ["waiting", "pending", "BLOCK_JOB_COMPLETED", "concluded", "null"];
        assert_eq!(life[..2], ["created", "running"]);
        assert!(end == cancelled || end == completed, "{life:?}");
    }
    assert_same("disk", &disk.read_all(), &rig.content);
    drop((client, sending));
    disk.umount();
    rig.assert_overlay(&rig.content);
}

/// Protects: `quit` while a stream copies at full speed and a guest has written. All clients
/// receive the end, the client that sent `quit` gets its reply last, its later requests get no
/// reply, and the image is consistent.
#[test]
fn quit_in_the_middle_of_a_stream() {
    requires!("/dev/fuse", "qemu-img");
    let rig = Rig::new(64 * MIB);
    let mut disk = rig.mount().qmp().start();
    let mut guest = rig.guest(&disk);
    guest.write(40 * MIB + 5..41 * MIB + 7);
    guest.punch(50 * MIB..50 * MIB + 300 * KIB);
    let want = guest.shadow;
    drop(guest.file);
    let (mut one, mut other) = (disk.client(), disk.client());
    // The stream is limited, because it might otherwise end before `quit`.
    one.ok("block-stream", json!({"device": "drive0", "speed": 32 * MIB}));
    wait_until("it copies", || one.job()["offset"].as_u64().expect("offset") > 4 * MIB);
    let heard = one.events.len();
    one.send_raw(r#"{"execute":"quit","id":"q"}{"execute":"query-jobs","id":"late"}"#);
    let mut last = Value::Null;
    while let Some(message) = one.message(PATIENCE) {
        assert_ne!(message["id"], json!("late"), "nothing is answered after quit");
        last = message;
    }
    assert_eq!(last, json!({"return": {}, "id": "q"}), "the reply comes last");
    while other.message(PATIENCE).is_some() {}
    assert_eq!(
        one.events[heard..],
        other.events[other.events.len() - (one.events.len() - heard)..],
        "both hear the same"
    );
    let names = one.event_names();
    assert_eq!(
        names[heard..],
        [
            "SHUTDOWN",
            "BLOCK_EXPORT_DELETED",
            "aborting",
            "BLOCK_JOB_CANCELLED",
            "concluded",
            "null"
        ]
    );
    disk.assert_clean_end();
    rig.assert_overlay(&want);
}

/// Protects: clients that die while replies are being sent to them, at any byte, disturb neither
/// other clients nor the job nor the disk.
#[test]
fn clients_killed_in_the_middle_of_a_reply() {
    requires!("/dev/fuse", "qemu-img");
    let mut rng = Rng::for_test("killed in the middle of a reply");
    let rig = Rig::new(8 * MIB);
    let disk = rig.mount().qmp().start();
    let mut client = disk.client();
    client.ok("block-stream", json!({"device": "drive0", "speed": 64 * KIB}));
    for _ in 0..40 {
        let mut dying = UnixStream::connect(disk.socket()).expect("connect");
        dying.set_read_timeout(Some(PATIENCE)).expect("timeout");
        let queries =
            r#"{"execute":"query-named-block-nodes"}{"execute":"query-commands"}"#.repeat(20);
        dying
            .write_all(format!("{{\"execute\":\"qmp_capabilities\"}}{queries}").as_bytes())
            .expect("send");
        let mut some = vec![0; usize::try_from(1 + rng.below(20_000)).expect("small")];
        dying.read_exact(&mut some).expect("the first bytes of many replies");
        drop(dying);
        assert_eq!(client.job()["device"], json!("drive0"));
    }
    client.finish_job("drive0");
    // Their places in the limit are free again.
    let again: Vec<QmpClient> = (0..MAX_CLIENTS - 1).map(|_| disk.client()).collect();
    drop((client, again));
    disk.umount();
    rig.assert_standalone(&rig.content);
}

fn fio_while(rig: &Rig, disk: &Daemon, meanwhile: impl FnOnce(&AtomicBool)) {
    let log = rig.scratch.join("fio.log");
    let mut command = Command::new("fio");
    command.current_dir(rig.scratch.path());
    command.args([
        "--name=verify",
        "--ioengine=psync",
        "--verify=crc32c",
        "--verify_fatal=1",
        "--do_verify=1",
        "--fsync=64",
        "--thread",
    ]);
    command.args([
        "--allow_file_create=0",
        "--verify_state_save=0",
        "--rw=randwrite",
        "--bs=4k",
        "--size=8m",
        "--loops=2",
    ]);
    command.arg(format!("--filename={}", disk.path().display()));
    command
        .stdin(Stdio::null())
        .stdout(fs::File::create(&log).expect("log"))
        .stderr(fs::File::create(rig.scratch.join("fio.err")).expect("log"));
    let mut child = command.spawn().expect("fio");
    let over = AtomicBool::new(false);
    let status = std::thread::scope(|scope| {
        let waiting = scope.spawn(|| {
            let status = poll(Duration::from_secs(120), || child.try_wait().expect("wait"));
            over.store(true, Ordering::Release);
            if status.is_none() {
                let _ = child.kill();
                let _ = child.wait();
            }
            status
        });
        meanwhile(&over);
        waiting.join().expect("fio")
    });
    let log = fs::read_to_string(log).unwrap_or_default();
    assert!(
        status.is_some_and(|status| status.success()),
        "fio stalled or failed: {status:?}\n{log}\n{}",
        disk.log()
    );
}

/// Protects: 20 clients, one of which sends requests and never reads, while fio writes and
/// verifies. Jobs start and end, and each of the other 19 clients receives every event of each job,
/// in the same order; the I/O continues and is right.
#[test]
fn twenty_clients_and_one_never_reads() {
    const LISTENERS: usize = 18;
    requires!("/dev/fuse", "qemu-img", "fio");
    let rig = Rig::new(32 * MIB);
    let disk = rig.mount().qmp().start();
    let mut deaf = UnixStream::connect(disk.socket()).expect("connect");
    deaf.set_write_timeout(Some(Duration::from_millis(200))).expect("timeout");
    let flood = format!(
        "{{\"execute\":\"qmp_capabilities\"}}{}",
        r#"{"execute":"query-named-block-nodes"}"#.repeat(4000)
    );
    // As many requests as the server accepts.
    let _ = deaf.write_all(flood.as_bytes());
    let mut user = disk.client();
    let listeners: Vec<QmpClient> = (0..LISTENERS).map(|_| disk.client()).collect();
    let heard: Vec<Vec<Value>> = std::thread::scope(|scope| {
        let threads: Vec<_> = listeners
            .into_iter()
            .map(|mut client| {
                scope.spawn(move || {
                    client.wait("the end of the last job", |event| {
                        event["data"] == json!({"id": "last", "status": "null"})
                    });
                    client.events
                })
            })
            .collect();
        fio_while(&rig, &disk, |over| {
            let mut round = 0;
            // Each job copies at most one step of 512 KiB; the jobs together must not copy
            // everything.
            while round < 5 || !over.load(Ordering::Acquire) && round < 50 {
                let id = format!("j{round}");
                user.ok(
                    "block-stream",
                    json!({"device": "drive0", "job-id": id, "speed": 64 * KIB}),
                );
                user.ok("job-pause", json!({"id": id}));
                user.wait_status("paused");
                user.ok("job-resume", json!({"id": id}));
                user.wait_status("running");
                user.ok("job-cancel", json!({"id": id}));
                user.wait_status("null");
                round += 1;
            }
            eprintln!("{round} jobs");
            user.ok("block-stream", json!({"device": "drive0", "job-id": "last"}));
            user.wait("the end of the last job", |event| {
                event["data"] == json!({"id": "last", "status": "null"})
            });
        });
        threads.into_iter().map(|thread| thread.join().expect("listener")).collect()
    });
    lives(&user.events);
    for events in &heard {
        assert_eq!(events.len(), user.events.len(), "no event is lost");
        assert_eq!(events, &user.events, "all hear the same, to the microsecond");
    }
    let content = disk.read_all();
    let untouched = usize::try_from(8 * MIB).expect("small");
    assert_same("what fio did not touch", &content[untouched..], &rig.content[untouched..]);
    drop(user);
    disk.umount(); // the client that never reads is still connected
    drop(deaf);
    rig.assert_standalone(&content);
}

/// Protects: at the limit of clients, a new one is disconnected at once and without a greeting,
/// connected ones continue, and a place that becomes free is used again.
#[test]
fn more_clients_than_there_are_places() {
    requires!("/dev/fuse", "qemu-img");
    let rig = Rig::new(MIB);
    let disk = rig.mount().qmp().start();
    let turned_away = || {
        let mut late = UnixStream::connect(disk.socket()).expect("connect");
        late.set_read_timeout(Some(PATIENCE)).expect("timeout");
        let mut greeting = [0; 64];
        match late.read(&mut greeting) {
            Ok(read) => read == 0,
            Err(error) => error.kind() == std::io::ErrorKind::ConnectionReset,
        }
    };
    // The connection that tested whether the socket exists may still hold its place.
    wait_until("the first place is free", || !turned_away());
    std::thread::sleep(Duration::from_millis(200));
    let mut clients: Vec<QmpClient> = (0..MAX_CLIENTS).map(|_| disk.client()).collect();
    for _ in 0..3 {
        assert!(turned_away(), "there are {MAX_CLIENTS} already");
    }
    for client in &mut clients {
        assert_eq!(client.ok("query-jobs", json!({})), json!([]));
    }
    clients.pop().expect("a client").hang_up();
    wait_until("a place is free", || !turned_away());
    wait_until("and once more", || !turned_away());
    clients[0].ok("block-stream", json!({"device": "drive0"}));
    for client in &mut clients {
        client.wait_completed();
    }
    drop(clients);
    disk.umount();
    rig.assert_standalone(&rig.content);
}

/// Protects: the server checks the user of each connection, not only the mode of the file: another
/// user that can reach the socket is disconnected without a message.
#[test]
fn another_user_is_refused() {
    requires!("/dev/fuse", "qemu-img", "root", "setpriv", "/usr/bin/perl");
    let rig = Rig::new(MIB);
    rig.scratch.open_to_all();
    let disk = rig.mount().qmp().start();
    // A Python of the user may be in a place that others cannot read; Debian always has this Perl.
    let script = "use Socket; socket(my $s, AF_UNIX, SOCK_STREAM, 0) or die; \
                  connect($s, pack_sockaddr_un($ARGV[0])) or do { print qq($!); exit }; \
                  alarm 30; sysread($s, my $b, 9); print length($b) ? $b : 'nothing'";
    let says = |user: &str| {
        let mut command = Command::new("setpriv");
        command
            .args([
                "--reuid",
                user,
                "--regid",
                user,
                "--clear-groups",
                "/usr/bin/perl",
                "-e",
                script,
            ])
            .arg(disk.socket())
            .current_dir("/");
        let done = run_within(&mut command, PATIENCE);
        assert!(done.status.success(), "{done:?}");
        done.stdout.trim().to_owned()
    };
    assert_eq!(says("65534"), "Permission denied", "the file's mode");
    fs::set_permissions(disk.socket(), fs::Permissions::from_mode(0o666)).expect("chmod");
    for _ in 0..3 {
        assert_eq!(says("65534"), "nothing", "the credentials of the peer");
    }
    assert_eq!(says("0"), r#"{"QMP": {"#, "root is welcome");
    let mut client = disk.client();
    assert_eq!(client.ok("query-jobs", json!({})), json!([]));
    drop(client);
    disk.umount();
}

/// Protects: only the owner can access the socket, from the moment at which it has a name and with
/// any umask.
#[test]
fn the_socket_is_private_from_the_first_moment() {
    requires!("/dev/fuse", "qemu-img");
    let rig = Rig::new(MIB);
    for _ in 0..5 {
        let scratch = Scratch::new();
        let socket = scratch.join("drive0.sock");
        let (looks, done) = (AtomicU64::new(0), AtomicBool::new(false));
        let modes = std::thread::scope(|scope| {
            let watching = scope.spawn(|| {
                let mut modes = BTreeSet::new();
                while !done.load(Ordering::Relaxed) {
                    if let Ok(meta) = fs::symlink_metadata(&socket) {
                        modes.insert(meta.permissions().mode() & 0o7777);
                    }
                    looks.fetch_add(1, Ordering::Relaxed);
                }
                modes
            });
            let has_looked = || {
                let before = looks.load(Ordering::Relaxed);
                wait_until("the watcher has looked", || looks.load(Ordering::Relaxed) > before + 1);
            };
            has_looked();
            let disk =
                crate::support::Mount::new(&scratch, &rig.overlay).qmp().open_umask().start();
            disk.client().ok("query-jobs", json!({}));
            has_looked();
            done.store(true, Ordering::Relaxed);
            disk.umount();
            watching.join().expect("watcher")
        });
        assert_eq!(modes, BTreeSet::from([0o600]), "modes that were seen");
    }
}
