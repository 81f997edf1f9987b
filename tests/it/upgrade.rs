//! `cordisk upgrade`: another program goes on with a disk that is in use.

use std::fs;
use std::io::IoSlice;
use std::mem::MaybeUninit;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use rustix::net::{
    AddressFamily, SendAncillaryBuffer, SendAncillaryMessage, SendFlags, SocketAddrUnix, SocketType,
};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};

use crate::release_log::release_binary;
use crate::support::daemon::server_of;
use crate::support::{
    CORDISK, Daemon, MIB, Rig, Rng, assert_same, metrics, mounts, poll, read_at, run_ok,
    run_within, wait_until,
};
use crate::takeover::{
    Done, assert_whole, is_protected, start, start_over, successor_of, takeovers, under_fio,
};
use crate::transports::has_uring;

/// How long a command may take.
const PATIENCE: Duration = Duration::from_secs(60);

/// Another build of the program: the release build if there is one that knows this command,
/// otherwise a copy.
fn other_build(rig: &Rig) -> PathBuf {
    let release = release_binary();
    let knows = |program: &Path| {
        let asked = Command::new(program).args(["upgrade", "--help"]).output();
        asked.is_ok_and(|output| output.status.success())
    };
    if release != Path::new(CORDISK) && knows(&release) {
        return release;
    }
    let copy = rig.scratch.join("another-cordisk");
    copy_program(&copy);
    copy
}

/// Copies the program by another process: a child that another thread starts meanwhile could
/// inherit a descriptor that writes to the copy, which could not be executed then.
fn copy_program(to: &Path) {
    run_ok(Command::new("cp").args([Path::new(CORDISK), to]));
}

/// `cordisk upgrade` by `program`.
fn upgrade(rig: &Rig, program: &Path, disk: &Path, args: &[&str]) -> Command {
    let mut command = Command::new(program);
    command.env("CORDISK_RUNTIME_DIR", rig.scratch.runtime_dir());
    command.arg("upgrade").arg(disk).args(args);
    command
}

/// The program of the process that serves the disk.
fn program_of(disk: &Daemon) -> PathBuf {
    let process = server_of(disk.pid()).as_raw_nonzero();
    fs::read_link(format!("/proc/{process}/exe")).expect("program")
}

/// Why a command fails.
fn failure(command: &mut Command) -> String {
    let finished = run_within(command, PATIENCE);
    assert_eq!(finished.status.code(), Some(1), "{finished:?}");
    finished.stderr.trim_end().to_owned()
}

/// Protects: fifty upgrades between two builds, in turns, while fio verifies what it writes: 0 I/O
/// errors, 0 wrong bytes. Prints how long a reader waited.
#[test]
fn fio_does_not_notice_upgrades() {
    requires!("/dev/fuse", "qemu-img", "fio");
    fio_does_not_notice_upgrades_over("dev", 50);
}

/// The same over io_uring, where an error follows if a thread is killed while the kernel copies a
/// request for it. That is rare: `CORDISK_TAKEOVERS` makes more upgrades, and a test of the crate
/// `export` has larger requests, with which one of 600 handovers gave an error.
#[test]
fn fio_does_not_notice_upgrades_over_io_uring() {
    requires!("/dev/fuse", "qemu-img", "fio");
    if has_uring() {
        fio_does_not_notice_upgrades_over("uring", 20);
    }
}

fn fio_does_not_notice_upgrades_over(transport: &str, times: u64) {
    let mut rng = Rng::for_test("fio does not notice upgrades");
    let rig = Rig::new(64 * MIB);
    let disk = start_over(transport, &rig, &[]);
    if !is_protected(&disk) {
        return;
    }
    let builds = [other_build(&rig), PathBuf::from(CORDISK)];
    let real = builds.clone().map(|build| build.canonicalize().expect("program"));
    disk.client().ok("block-stream", json!({"device": "drive0", "speed": 2 * MIB}));
    let has_ended = AtomicBool::new(false);
    let (file, content) = (disk.open(), &rig.content);
    let waits = std::thread::scope(|scope| {
        let reader = scope.spawn(|| {
            let mut waits = Vec::new();
            while !has_ended.load(Ordering::Relaxed) {
                let since = Instant::now();
                let at = 50 * MIB + (waits.len() as u64 % 256) * 4096;
                rustix::fs::fadvise(&file, at, None, rustix::fs::Advice::DontNeed).expect("advice");
                let read = read_at(&file, at, 4096);
                waits.push(since.elapsed());
                assert_same("read", &read, &content[at as usize..][..4096]);
            }
            waits
        });
        // Set when a failure unwinds as well, so that the reader ends.
        let ends = Done(&has_ended);
        let mut done = 0;
        under_fio(&rig, &disk, &mut rng, takeovers(times), || {
            let build = done % 2;
            let before = server_of(disk.pid());
            run_ok(&mut upgrade(&rig, &builds[build], disk.path(), &[]));
            assert_ne!(server_of(disk.pid()), before, "{}", disk.log());
            assert_eq!(program_of(&disk), real[build]);
            done += 1;
        });
        drop(ends);
        reader.join().expect("reader")
    });
    let mut longest = waits;
    longest.sort_unstable_by(|a, b| b.cmp(a));
    eprintln!("{} reads; the longest: {:?}", longest.len(), &longest[..longest.len().min(50)]);
    drop(file);
    assert_whole(&rig, disk);
}

/// Protects: options that are given anew hold from then on, also for the successor of a process
/// that is killed later; all others stay.
#[test]
fn options_change() {
    requires!("/dev/fuse", "qemu-img");
    let rig = Rig::new(MIB);
    let disk = start(&rig, &["--metrics", "0", "--device", "first"]);
    if !is_protected(&disk) {
        return;
    }
    let file = disk.open();
    let log = rig.scratch.join("second.log");
    let text = log.to_str().expect("UTF-8");
    let said = run_ok(&mut upgrade(&rig, Path::new(CORDISK), disk.path(), &["--log", text]));
    assert!(said.contains("served by cordisk"), "{said}");
    wait_until("the log", || fs::read_to_string(&log).is_ok_and(|log| log.contains("mounted")));
    let server = server_of(disk.pid());
    kill_process(server, Signal::KILL).expect("the serving process lives");
    successor_of(&disk, server);
    assert_same("after a kill", &read_at(&file, 0, rig.content.len()), &rig.content);
    let text = fs::read_to_string(&log).expect("log");
    assert!(text.contains("takes the disk over"), "{text}");
    // The address of the metrics server is in the new log, since port 0 means any.
    let last = text.lines().rfind(|line| line.contains("metrics at")).expect("metrics");
    let address = last.split("http://").nth(1).and_then(|rest| rest.split('/').next());
    let address = address.expect("address").parse().expect("address");
    let answer = metrics::ask(address, b"GET /metrics HTTP/1.0\r\n\r\n");
    assert!(answer.contains("device=\"first\""), "{answer}");
    drop(file);
    disk.umount();
}

/// Protects: a new process that cannot serve is followed by the previous program, with the previous
/// options, and the user learns why.
#[test]
fn a_failed_upgrade_is_taken_back() {
    requires!("/dev/fuse", "qemu-img");
    let rig = Rig::new(MIB);
    let disk = start(&rig, &[]);
    if !is_protected(&disk) {
        return;
    }
    let file = disk.open();
    file.write_all_at(b"before", 7).expect("write");
    let build = other_build(&rig);
    for attempt in 0..6 {
        let nowhere = rig.scratch.join("no-directory/log");
        let args = ["--log", nowhere.to_str().expect("UTF-8")];
        let why = failure(&mut upgrade(&rig, &build, disk.path(), &args));
        assert!(why.contains("the previous program serves the disk"), "{attempt}: {why}");
        assert_eq!(program_of(&disk), Path::new(CORDISK));
        assert_eq!(read_at(&file, 7, 6), b"before");
    }
    // What the new process has said is where the keeper's messages are.
    assert!(disk.log().contains("no-directory: No such file or directory"), "{}", disk.log());
    drop(file);
    disk.umount();
}

/// Protects: a program that the keeper cannot execute is followed by the previous one, and the
/// command learns why. The command sends a file that is no program, which no command of ours does.
#[test]
fn a_program_that_cannot_be_executed_is_taken_back() {
    requires!("/dev/fuse", "qemu-img");
    let rig = Rig::new(MIB);
    let disk = start(&rig, &[]);
    if !is_protected(&disk) {
        return;
    }
    let file = disk.open();
    file.write_all_at(b"before", 7).expect("write");
    let keeper = format!("{}.keeper", disk.pid().as_raw_nonzero());
    let keeper = SocketAddrUnix::new(rig.scratch.runtime_dir().join(keeper)).expect("address");
    let no_program = fs::File::open(rig.scratch.write("no-program", b"text")).expect("open");
    for round in 0..6 {
        let command =
            rustix::net::socket(AddressFamily::UNIX, SocketType::SEQPACKET, None).expect("socket");
        rustix::net::connect(&command, &keeper).expect("connect");
        let mut buf = vec![0; 1 << 16];
        let len = rustix::io::read(&command, &mut buf).expect("offer");
        let offer: Value = serde_json::from_slice(&buf[..len]).expect("JSON");
        let wanted = json!({"arguments": offer["arguments"]}).to_string();
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        let files = [no_program.as_fd()];
        assert!(control.push(SendAncillaryMessage::ScmRights(&files)));
        let data = [IoSlice::new(wanted.as_bytes())];
        rustix::net::sendmsg(&command, &data, &mut control, SendFlags::empty()).expect("send");
        let len = rustix::io::read(&command, &mut buf).expect("outcome");
        let outcome: Value = serde_json::from_slice(&buf[..len]).expect("JSON");
        let why = outcome["Err"].as_str().unwrap_or_default();
        assert!(why.contains("Permission denied"), "{round}: {outcome}\n{}", disk.log());
        assert_eq!(read_at(&file, 7, 6), b"before", "{round}");
    }
    drop(file);
    disk.umount();
}

/// Protects: what cannot be upgraded is refused with one line, and served on.
#[test]
fn refusals_leave_the_disk() {
    requires!("/dev/fuse", "qemu-img");
    let rig = Rig::new(MIB);
    let disk = start(&rig, &[]);
    if !is_protected(&disk) {
        return;
    }
    let server = server_of(disk.pid());
    let cordisk = Path::new(CORDISK);
    let why = failure(&mut upgrade(&rig, cordisk, &rig.scratch.join("nothing"), &[]));
    assert!(why.contains("no cordisk disk is mounted at"), "{why}");
    // Another user.
    rig.scratch.open_to_all();
    let copy = rig.scratch.join("for-all");
    copy_program(&copy);
    if rustix::process::geteuid().is_root() {
        let why = failure(upgrade(&rig, &copy, disk.path(), &[]).uid(4711).gid(4711));
        assert!(
            ["entry that this user can read", "permission denied", "has died"]
                .iter()
                .any(|text| why.contains(text)),
            "{why}"
        );
    }
    assert_eq!(server_of(disk.pid()), server);
    // A keeper of another protocol; this listener is an emulator of one.
    let entry = fs::read_dir(rig.scratch.runtime_dir())
        .expect("runtime directory")
        .map(|entry| entry.expect("entry").path())
        .find(|path| path.extension().is_some_and(|suffix| suffix == "keeper"))
        .expect("socket of the keeper");
    let kept = entry.with_extension("kept");
    fs::rename(&entry, &kept).expect("rename");
    let listener =
        rustix::net::socket(AddressFamily::UNIX, SocketType::SEQPACKET, None).expect("socket");
    rustix::net::bind(&listener, &SocketAddrUnix::new(&entry).expect("address")).expect("bind");
    rustix::net::listen(&listener, 1).expect("listen");
    let why = std::thread::scope(|scope| {
        scope.spawn(|| {
            let command = rustix::net::accept(&listener).expect("accept");
            let offer = json!({"protocol": 4711, "version": "9", "arguments": [], "refusal": null});
            rustix::io::write(&command, offer.to_string().as_bytes()).expect("offer");
        });
        failure(&mut upgrade(&rig, cordisk, disk.path(), &[]))
    });
    assert!(why.contains("(cordisk 9) speaks protocol 4711"), "{why}");
    fs::rename(&kept, &entry).expect("rename");
    run_ok(&mut upgrade(&rig, cordisk, disk.path(), &[]));
    assert_ne!(server_of(disk.pid()), server);
    assert_same("served on", &disk.read_all(), &rig.content);
    disk.umount();
}

/// Protects: a disk whose keeper has died is served on, says that it is not protected, and gets a
/// new keeper, as often as it is needed: after that a kill is survived again, signals and commands
/// find the new main process, and the unmount leaves nothing behind.
#[test]
fn a_disk_gets_a_new_keeper() {
    requires!("/dev/fuse", "qemu-img");
    let rig = Rig::new(4 * MIB);
    let mut expected = rig.content.clone();
    let pidfile = rig.scratch.join("pid");
    let args = ["--pidfile", pidfile.to_str().expect("UTF-8")];
    let disk = start(&rig, &args);
    if !is_protected(&disk) {
        return;
    }
    let main = || {
        let text = fs::read_to_string(&pidfile).ok()?;
        Pid::from_raw(text.trim().parse().ok()?)
    };
    let status = || {
        let mut command = rig.scratch.cordisk();
        run_ok(command.arg("status").arg(disk.path()))
    };
    let file = disk.open();
    wait_until("the pidfile", || main() == Some(disk.pid()));
    for life in 1..=3_u8 {
        let data = [life; 70_000];
        let at = u64::from(life) * MIB + 1234;
        file.write_all_at(&data, at).expect("write");
        expected[at as usize..][..data.len()].copy_from_slice(&data);
        let keeper = main().expect("pidfile");
        kill_process(keeper, Signal::KILL).expect("kill");
        wait_until("the death of the keeper is noticed", || {
            status().contains("is not survived: the mount keeper has died")
        });
        assert_same("served on", &read_at(&file, 0, expected.len()), &expected);
        run_ok(&mut upgrade(&rig, Path::new(CORDISK), disk.path(), &[]));
        let next = main().expect("pidfile");
        assert_ne!(next, keeper);
        assert!(status().contains(&format!("process {}", next.as_raw_nonzero())), "{}", status());
        let server = server_of(next);
        kill_process(server, Signal::KILL).expect("kill");
        assert_same("after a kill", &read_at(&file, 0, expected.len()), &expected);
        wait_until("the successor is told", || status().contains("is survived"));
    }
    drop(file);
    kill_process(main().expect("pidfile"), Signal::TERM).expect("signal");
    wait_until("it is unmounted", || mounts::at(disk.path()).is_none());
    let left = || {
        let entries = fs::read_dir(rig.scratch.runtime_dir()).expect("runtime directory");
        let mut left: Vec<_> = entries.map(|entry| entry.expect("entry").path()).collect();
        left.extend(
            [pidfile.clone(), disk.path().to_owned()].into_iter().filter(|path| path.exists()),
        );
        left
    };
    let gone = poll(PATIENCE, || left().is_empty().then_some(()));
    assert!(gone.is_some(), "{:?}", left());
    rig.assert_overlay(&expected);
}

/// Protects: the socket of the keeper goes with the disk, and a command that goes away before its
/// turn changes nothing.
#[test]
fn the_socket_goes_with_the_disk() {
    requires!("/dev/fuse", "qemu-img");
    let rig = Rig::new(MIB);
    let mut disk = start(&rig, &[]);
    let sockets = || {
        let entries = fs::read_dir(rig.scratch.runtime_dir()).expect("runtime directory");
        entries
            .map(|entry| entry.expect("entry").path())
            .filter(|path| path.extension().is_some_and(|suffix| suffix == "keeper"))
            .collect::<Vec<_>>()
    };
    let [socket] = &sockets()[..] else { panic!("one socket") };
    for _ in 0..3 {
        let command =
            rustix::net::socket(AddressFamily::UNIX, SocketType::SEQPACKET, None).expect("socket");
        let address = SocketAddrUnix::new(socket).expect("address");
        rustix::net::connect(&command, &address).expect("connect");
        let mut offer = vec![0; 1 << 16];
        let len = rustix::io::read(&command, &mut offer).expect("offer");
        assert!(String::from_utf8_lossy(&offer[..len]).contains("protocol"));
        rustix::io::write(&command, b"no message").expect("write");
    }
    assert_same("served", &disk.read_all(), &rig.content);
    disk.signal(Signal::TERM);
    disk.assert_clean_end();
    assert_eq!(sockets(), Vec::<PathBuf>::new());
}
