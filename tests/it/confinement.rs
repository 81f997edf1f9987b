//! Access rights. Other users cannot access the disk, the socket or the files. An image cannot make
//! the daemon open files that the user did not intend. The process that reads images and talks to
//! clients can only serve, as /proc shows. None of this restricts the user that the disk is for.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, Permissions};
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt, chown, symlink};
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use nix::libc;
use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, Signal, kill_process, pidfd_open, test_kill_process};
use seccompiler::{BpfProgram, SeccompAction, SeccompFilter, TargetArch};
use serde_json::json;

use crate::after_death::is_marked;
use crate::bad_input::{attempt, refused};
use crate::support::header;
use crate::support::terminal::Terminal;
use crate::support::{
    CLUSTER, CORDISK, Daemon, Finished, MIB, Mount, Pattern, QmpClient, RUNTIME_DIR, Rig, Scratch,
    assert_same, errno, mounts, qemu, read_at, run_within, wait_until,
};

const LIMIT: Duration = Duration::from_secs(30);
/// The user ids of nobody and nogroup, which every system has.
const NOBODY: &str = "65534";
/// How the tests name that user on the command line, with a group of another number.
const USER: &str = "65534:65533";

/// Runs a program as another user, without privileges.
fn as_user(uid: &str, gid: &str, program: &str, args: &[&str]) -> Finished {
    let mut command = Command::new("setpriv");
    command
        .args(["--reuid", uid, "--regid", gid, "--clear-groups", program])
        .args(args)
        .current_dir("/");
    run_within(&mut command, LIMIT)
}

fn text(path: &Path) -> &str {
    path.to_str().expect("UTF-8 path")
}

/// Reads the fields of /proc/PID/status.
fn status_of(path: &Path) -> BTreeMap<String, String> {
    let status =
        fs::read_to_string(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    status
        .lines()
        .filter_map(|line| line.split_once(':'))
        .map(|(name, value)| (name.to_owned(), value.trim().to_owned()))
        .collect()
}

/// Reads the status of every thread of a process.
fn threads_of(pid: Pid) -> Vec<BTreeMap<String, String>> {
    let tasks = format!("/proc/{}/task", pid.as_raw_nonzero());
    let tasks = fs::read_dir(tasks)
        .expect("threads")
        .map(|entry| entry.expect("thread").path().join("status"));
    tasks.filter(|path| path.exists()).map(|path| status_of(&path)).collect()
}

fn is_alive(pid: Pid) -> bool {
    let state = status_of_any(pid).get("State").cloned().unwrap_or_default();
    test_kill_process(pid).is_ok() && !state.starts_with('Z')
}

fn status_of_any(pid: Pid) -> BTreeMap<String, String> {
    let path = format!("/proc/{}/status", pid.as_raw_nonzero());
    if Path::new(&path).exists() {
        fs::read_to_string(&path).map(|_| status_of(Path::new(&path))).unwrap_or_default()
    } else {
        BTreeMap::new()
    }
}

/// Performs every kind of request of a guest and a client, and checks all results.
fn exercise(rig: &Rig, disk: &mut Daemon) -> Vec<u8> {
    let mut guest = rig.guest(disk);
    let mut rng = crate::support::Rng::new(0xC0F1);
    for _ in 0..60 {
        guest.step(&mut rng, 3 * CLUSTER);
    }
    guest.file.sync_all().expect("fsync");
    guest.check_all();
    let mut client = disk.client();
    let size = rig.size() + 2 * MIB;
    client.ok("block_resize", json!({"device": "drive0", "size": size}));
    guest.shadow.resize(usize::try_from(size).expect("small"), 0);
    guest.write(rig.size() + 1000..rig.size() + 100_000);
    client.ok("block-stream", json!({"job-id": "drive0", "device": "drive0", "speed": MIB}));
    client.ok("query-block-jobs", json!({}));
    guest.step(&mut rng, CLUSTER);
    // A second client makes the server start new threads now.
    disk.client().ok("query-blockstats", json!({}));
    client.finish_job("drive0");
    guest.check_all();
    let want = std::mem::take(&mut guest.shadow);
    drop(guest);
    client.ok("quit", json!({}));
    drop(client);
    disk.assert_clean_end();
    want
}

/// Protects: with `--sandbox require` everything works in the sandbox: requests of all kinds,
/// flushes, growth, a stream to its end, quit.
#[test]
fn a_confined_daemon_does_all_its_work() {
    requires!("/dev/fuse", "qemu-img");
    let rig = Rig::new(4 * MIB);
    let mut disk = rig.mount().qmp().args(&["--sandbox", "require"]).start();
    let want = exercise(&rig, &mut disk);
    rig.assert_standalone(&want);
}

/// Protects: every thread is in the sandbox, also threads that start late. The keeper is not,
/// because it could not unmount from there.
#[test]
fn every_thread_is_in_the_sandbox() {
    requires!("/dev/fuse", "qemu-img");
    let rig = Rig::new(2 * MIB);
    let disk = rig.mount().qmp().args(&["--stream", "--speed", "64K"]).start();
    let mut client = disk.client();
    client.ok("query-block-jobs", json!({}));
    assert_same("content", &disk.read_all(), &rig.content);
    let threads = threads_of(disk.server_pid());
    let names: Vec<&str> = threads.iter().map(|thread| thread["Name"].as_str()).collect();
    for expected in [
        "cordisk",
        "signals",
        "qmp-accept",
        "qmp-read",
        "qmp-write",
        "fuse-0",
        "fuse-1",
        "local-0",
        "below-0",
        "flush",
        "commit",
    ] {
        assert!(names.contains(&expected), "no thread {expected}: {names:?}");
    }
    for thread in &threads {
        assert_eq!(
            (thread["NoNewPrivs"].as_str(), thread["Seccomp"].as_str()),
            ("1", "2"),
            "{thread:?}"
        );
    }
    let process = format!("/proc/{}", disk.server_pid().as_raw_nonzero());
    assert_eq!(fs::read_link(format!("{process}/cwd")).expect("cwd"), Path::new("/"));
    let limits = fs::read_to_string(format!("{process}/limits")).expect("limits");
    let core = limits.lines().find(|line| line.starts_with("Max core file size")).expect("a line");
    assert_eq!(core.split_whitespace().skip(4).take(2).collect::<Vec<_>>(), ["0", "0"], "{core}");
    let keeper = status_of_any(disk.pid());
    assert_eq!((keeper["Seccomp"].as_str(), keeper["Threads"].as_str()), ("0", "3"));
    drop(client);
    disk.umount();

    let disk = rig.mount().args(&["--sandbox", "off"]).start();
    assert!(
        threads_of(disk.server_pid()).iter().all(|thread| thread["Seccomp"] == "0"),
        "off means off"
    );
    disk.umount();
    rig.assert_overlay(&rig.content);
}

/// Protects: `--user` gives up root in every thread, permanently, and the disk, its socket and its
/// mount belong to that user. Root cannot access the disk either: the kernel admits only that user,
/// unless an option allows others.
#[test]
fn another_user_serves_and_owns_the_disk() {
    requires!("/dev/fuse", "qemu-img", "root", "setpriv", "cmp", "sh");
    let rig = Rig::new(2 * MIB);
    rig.scratch.open_to_all();
    fs::set_permissions(&rig.base, Permissions::from_mode(0o644)).expect("chmod");
    let pidfile = rig.scratch.join("pid");
    fs::set_permissions(&rig.overlay, Permissions::from_mode(0o600)).expect("chmod");
    let disk = rig.mount().qmp().args(&["--user", USER, "--pidfile", text(&pidfile)]).start();
    assert!(is_marked(&rig.overlay), "while it is mounted");
    let mut client = disk.client();
    client.ok("query-block", json!({}));
    for thread in threads_of(disk.server_pid()) {
        assert_eq!(thread["Uid"], "65534\t65534\t65534\t65534", "{thread:?}");
        assert_eq!(thread["Gid"], "65533\t65533\t65533\t65533", "{thread:?}");
        assert_eq!(thread["Groups"], "", "{thread:?}");
        for capabilities in ["CapEff", "CapPrm", "CapInh", "CapAmb"] {
            assert_eq!(
                thread[capabilities].trim_start_matches('0'),
                "",
                "{capabilities} of {thread:?}"
            );
        }
        assert_eq!((thread["NoNewPrivs"].as_str(), thread["Seccomp"].as_str()), ("1", "2"));
    }
    let socket = fs::symlink_metadata(disk.socket()).expect("socket");
    assert_eq!((socket.uid(), socket.gid(), socket.mode() & 0o7777), (65534, 65533, 0o600));
    let options = mounts::at(disk.path()).expect("mounted").super_options;
    for option in ["user_id=65534", "group_id=65533", "default_permissions"] {
        assert!(options.split(',').any(|word| word == option), "{option} in {options}");
    }
    let content = as_user(NOBODY, "65533", "cmp", &[text(disk.path()), text(&rig.base)]);
    assert!(content.status.success(), "{content:?}");
    let shown = as_user(NOBODY, "65533", "stat", &["-c", "%u %g %a", text(disk.path())]);
    assert_eq!(shown.stdout, "65534 65533 600\n", "{shown:?}");
    let written = as_user(
        NOBODY,
        "65533",
        "sh",
        &["-c", "printf written | dd of=\"$0\" conv=notrunc,fsync", text(disk.path())],
    );
    assert!(written.status.success(), "{written:?}");
    for (uid, gid) in [("0", "0"), ("65532", "65533")] {
        let other = as_user(uid, gid, "cat", &[text(disk.path())]);
        assert!(!other.status.success() && other.stdout.is_empty(), "user {uid} read the disk");
    }
    drop(client);
    let (path, socket) = (disk.path().to_owned(), disk.socket().to_owned());
    disk.umount();
    for gone in [&path, &socket, &pidfile] {
        assert!(!gone.exists(), "{} must be gone", gone.display());
    }
    // That user may not even read the overlay, yet the daemon closes it properly.
    assert!(!is_marked(&rig.overlay), "the mark of an open image stays");
    let log = fs::read_to_string(rig.scratch.join("drive0.log")).expect("log");
    assert!(!log.contains("WARN") && !log.contains("ERROR"), "{log}");
    let mut want = rig.content.clone();
    want[..7].copy_from_slice(b"written");
    rig.assert_overlay(&want);

    // The option accepts user names. With --allow-other, the mode bits admit root.
    let mut disk = rig
        .mount()
        .qmp()
        .args(&["--user", "nobody", "--allow-other", "--sandbox", "require"])
        .start();
    let meta = fs::metadata(disk.path()).expect("stat");
    assert_eq!(
        threads_of(disk.server_pid())[0]["Uid"].split('\t').next(),
        Some(meta.uid().to_string().as_str())
    );
    let again = Rig {
        scratch: Scratch::new(),
        base: rig.base.clone(),
        overlay: rig.overlay.clone(),
        content: want,
    };
    let want = exercise(&again, &mut disk);
    qemu::assert_independent(&rig.overlay);
    again.assert_overlay(&want);
}

/// Protects: a wrong `--user` gives one line of error, and nothing is mounted.
#[test]
fn users_who_cannot_be() {
    requires!("/dev/fuse", "qemu-img", "root", "setpriv");
    let scratch = Scratch::new();
    scratch.raw("base.raw", MIB, Pattern::new(60, 1));
    qemu::create(&scratch.join("top.qcow2"), None, "", Some(("base.raw", "raw")));
    for (user, words) in [
        ("no-such-user", "there is no user no-such-user"),
        ("nobody:no-such-group", "there is no group no-such-group"),
        ("1234567890", "name a group as well"),
        ("root", "keeps all rights"),
        ("0:65534", "keeps all rights"),
        ("", "there is no user"),
    ] {
        refused(&scratch, &["--user", user, "top.qcow2", "disk"], &[words]);
    }
    scratch.open_to_all();
    let program = program_for_all(&scratch);
    let (image, disk) = (scratch.join("top.qcow2"), scratch.join("disk"));
    let done = as_user(
        NOBODY,
        NOBODY,
        &program,
        &["mount", "-f", "--user", "nobody", text(&image), text(&disk)],
    );
    assert_eq!(done.status.code(), Some(1), "{done:?}");
    assert!(
        done.stderr.contains("only root can become another user")
            && done.stderr.lines().count() == 1,
        "{done:?}"
    );
}

/// Copies the program to a place where every user can execute it: the build directory may be
/// private.
fn program_for_all(scratch: &Scratch) -> String {
    let program = scratch.join("cordisk");
    fs::copy(CORDISK, &program).expect("copy of the program");
    fs::set_permissions(&program, Permissions::from_mode(0o755)).expect("chmod");
    text(&program).to_owned()
}

/// Protects: a user without root mounts and unmounts through fusermount3, which the keeper runs:
/// the serving process could not start it from its sandbox. The test has a mount namespace of its
/// own where every user may open /dev/fuse, as on most systems.
#[test]
fn an_ordinary_user_has_the_same_sandbox() {
    requires!("/dev/fuse", "qemu-img", "root", "unshare", "setpriv", "fusermount3", "mknod", "cmp");
    let rig = Rig::new(MIB);
    rig.scratch.open_to_all();
    let program = program_for_all(&rig.scratch);
    let dir = rig.scratch.dir("own");
    fs::copy(&rig.base, dir.join("base.raw")).expect("copy");
    fs::copy(&rig.overlay, dir.join("overlay.qcow2")).expect("copy");
    for path in [dir.clone(), dir.join("base.raw"), dir.join("overlay.qcow2")] {
        std::os::unix::fs::chown(path, Some(65534), Some(65534)).expect("chown");
    }
    // Mounts in the background, checks which user can read what, and unmounts by SIGTERM; then
    // again with fusermount3 as the way to unmount.
    let script = "mknod fuse c 10 229; chmod 666 fuse; mount --bind fuse /dev/fuse; cd own
        user='setpriv --reuid=65534 --regid=65534 --clear-groups'
        trap 'test ! -s pid || kill -KILL $(cat /proc/$(cat pid)/task/*/children) $(cat pid)' EXIT
        ended() { for i in $(seq 300); do test -e pid || return 0; sleep 0.1; done; echo \"$1: it does not end\"; return 1; }
        for how in signal helper; do
            $user \"$1\" mount --sandbox require --pidfile pid --qmp sock overlay.qcow2 disk
            server=$(cat /proc/$(cat pid)/task/$(cat pid)/children)
            grep -qx 'Seccomp:	2' /proc/${server% }/status
            grep -q 'fuse.cordisk' /proc/self/mountinfo
            $user cmp disk base.raw
            if test $how = signal; then kill -TERM $(cat pid); else $user fusermount3 -u disk; fi
            ended $how
            test ! -e disk && test ! -e sock
        done
        echo well";
    let mut command = Command::new("unshare");
    command
        .args(["--mount", "--propagation", "private", "sh", "-ec", script, "sh", &program])
        .current_dir(rig.scratch.path());
    let done = run_within(&mut command, Duration::from_secs(90));
    assert!(done.status.success() && done.stdout == "well\n", "{done:?}");
    rig.assert_overlay(&rig.content);
    qemu::assert_clean(&dir.join("overlay.qcow2"));
    assert_same("the user's overlay", &qemu::read_all(&dir.join("overlay.qcow2")), &rig.content);
}

/// Protects: for every image name, fusermount3 and the kernel's list of mounts return the source
/// name by which the program recognizes its mount. Without that name the mount would fail, and
/// would not be removed at the end.
#[test]
fn an_ordinary_user_mounts_images_of_any_name() {
    requires!("/dev/fuse", "qemu-img", "root", "unshare", "setpriv", "fusermount3", "mknod", "cmp");
    let rig = Rig::new(MIB);
    rig.scratch.open_to_all();
    let program = program_for_all(&rig.scratch);
    let dir = rig.scratch.dir("own");
    let names = [
        "a,b, c.qcow2",
        "number #1.qcow2",
        "back\\slash\\.qcow2",
        "\\040\\,#, .qcow2",
        "tab\tand\nline.qcow2",
        "-o,ro.qcow2",
        "ü.qcow2",
    ];
    fs::copy(&rig.base, dir.join("base.raw")).expect("copy");
    for name in names {
        fs::copy(&rig.overlay, dir.join(name)).expect("copy");
    }
    for path in fs::read_dir(&dir)
        .expect("directory")
        .map(|entry| entry.expect("entry").path())
        .chain([dir.clone()])
    {
        std::os::unix::fs::chown(path, Some(65534), Some(65534)).expect("chown");
    }
    let script = "mknod fuse c 10 229; chmod 666 fuse; mount --bind fuse /dev/fuse; cd own
        program=\"$1\"; shift
        trap 'test ! -s pid || kill -KILL $(cat /proc/$(cat pid)/task/*/children) $(cat pid)' EXIT
        for name; do
            setpriv --reuid=65534 --regid=65534 --clear-groups \"$program\" mount --pidfile pid -- \"$PWD/$name\" disk
            setpriv --reuid=65534 --regid=65534 --clear-groups cmp disk base.raw
            kill -TERM $(cat pid)
            for i in $(seq 300); do test -e pid || break; sleep 0.1; done
            if test -e pid || test -e disk || grep -q \"$PWD/disk \" /proc/self/mountinfo; then echo \"not unmounted: $name\"; exit 1; fi
        done
        echo well";
    let mut command = Command::new("unshare");
    command
        .args(["--mount", "--propagation", "private", "sh", "-ec", script, "sh", &program])
        .args(names);
    let done = run_within(command.current_dir(rig.scratch.path()), Duration::from_secs(90));
    assert!(done.status.success() && done.stdout == "well\n", "{done:?}");
    for name in names {
        qemu::assert_clean(&dir.join(name));
    }
}

/// Protects: another user of the machine cannot access the disk, the socket, the pidfile, nor,
/// after a kill, the placeholder.
#[test]
fn others_get_at_nothing() {
    requires!("/dev/fuse", "qemu-img", "root", "setpriv", "sh", "/usr/bin/perl");
    let rig = Rig::new(MIB);
    rig.scratch.open_to_all();
    let pidfile = rig.scratch.join("pid");
    let connect = "use Socket; socket(my $s, AF_UNIX, SOCK_STREAM, 0) or die; connect($s, pack_sockaddr_un($ARGV[0])) or die qq($!\\n)";
    for options in [&[][..], &["--allow-other"]] {
        let disk = rig.mount().qmp().args(&["--pidfile", text(&pidfile)]).args(options).start();
        wait_until("the pidfile is written", || {
            fs::metadata(&pidfile).is_ok_and(|file| file.len() > 0)
        });
        let pid = fs::read_to_string(&pidfile).expect("pidfile");
        let path = text(disk.path());
        for script in [
            "cat \"$0\"",
            "echo > \"$0\"",
            "chmod 666 \"$0\"",
            "rm -f \"$0\"",
            "mv \"$0\" \"$0.moved\"",
            "dd if=\"$0\" bs=512 count=1 iflag=direct",
        ] {
            for target in [path, text(&pidfile), text(disk.socket())] {
                let done = as_user(NOBODY, NOBODY, "sh", &["-c", script, target]);
                assert!(
                    !done.status.success() && done.stdout.is_empty(),
                    "{options:?} {script} {target}: {done:?}"
                );
            }
        }
        let done = as_user(NOBODY, NOBODY, "/usr/bin/perl", &["-e", connect, text(disk.socket())]);
        assert!(done.stderr.contains("Permission denied"), "{done:?}");
        for id in [disk.pid(), disk.server_pid()] {
            let done = as_user(
                NOBODY,
                NOBODY,
                "sh",
                &["-c", "kill -TERM $0", &id.as_raw_nonzero().to_string()],
            );
            assert!(!done.status.success(), "{done:?}");
        }
        assert_eq!(fs::read_to_string(&pidfile).expect("pidfile"), pid);
        assert_same("the disk", &disk.read_all(), &rig.content);
        if options.is_empty() {
            disk.umount();
        } else {
            let path = disk.path().to_owned();
            disk.kill9();
            let placeholder = fs::symlink_metadata(&path).expect("the placeholder is left behind");
            assert_eq!((placeholder.mode() & 0o7777, placeholder.len()), (0, 0));
            let done = as_user(NOBODY, NOBODY, "cat", &[text(&path)]);
            assert!(!done.status.success(), "an empty file in place of the disk: {done:?}");
        }
    }
    qemu::assert_not_corrupt(&rig.overlay);
}

/// Protects: the daemon does not remove a file that has replaced its pidfile or its socket.
#[test]
fn files_that_replaced_ours_stay() {
    requires!("/dev/fuse", "qemu-img");
    let rig = Rig::new(MIB);
    let pidfile = rig.scratch.join("pid");
    let mut disk = rig.mount().qmp().args(&["--pidfile", text(&pidfile)]).start();
    let socket = disk.socket().to_owned();
    for file in [&pidfile, &socket] {
        fs::remove_file(file).expect("remove");
        fs::write(file, "another daemon's").expect("replace");
    }
    disk.signal(Signal::TERM);
    let status = disk.ended_within(LIMIT);
    assert_eq!(status.and_then(|status| status.code()), Some(0), "{}", disk.log());
    for file in [&pidfile, &socket] {
        assert_eq!(fs::read_to_string(file).expect("it stays"), "another daemon's");
    }
}

/// Protects: root can put a socket and a pidfile into a directory of another user. Both are created
/// as usual, the socket is given to the user of `--user`, and no other file is left. A link that
/// this user has placed there is refused, and so is a file that does not belong to root alone.
#[test]
fn a_directory_of_another_user_is_not_trusted() {
    requires!("/dev/fuse", "qemu-img", "root");
    let rig = Rig::new(MIB);
    rig.scratch.open_to_all();
    let theirs = rig.scratch.dir("theirs");
    chown(&theirs, Some(65534), Some(65534)).expect("chown");
    let (socket, pidfile) = (theirs.join("qmp"), theirs.join("pid"));
    let options = ["--qmp", text(&socket), "--pidfile", text(&pidfile)];
    for user in [&[][..], &["--user", "65534:65533"]] {
        let mut disk = rig.mount().args(&options).args(user).start();
        wait_until("the pidfile is written", || {
            fs::metadata(&pidfile).is_ok_and(|file| file.len() > 0)
        });
        let there = fs::symlink_metadata(&socket).expect("socket");
        let owner = if user.is_empty() { (0, 0) } else { (65534, 65533) };
        assert_eq!((there.mode() & 0o7777, there.uid(), there.gid()), (0o600, owner.0, owner.1));
        let names = || {
            fs::read_dir(&theirs)
                .expect("directory")
                .map(|entry| entry.expect("entry").file_name())
                .collect::<BTreeSet<_>>()
        };
        assert_eq!(names(), BTreeSet::from(["pid".into(), "qmp".into()]));
        QmpClient::connect(&socket).ok("query-version", json!({}));
        disk.signal(Signal::TERM);
        disk.assert_clean_end();
        assert_eq!(names(), BTreeSet::new());
    }
    let refused = |options: &[&str], word: &str| {
        let mut disk = rig.mount().args(options).spawn();
        let status = disk.ended_within(LIMIT).expect("it had to end");
        assert!(!status.success() && disk.log().contains(word), "{options:?}: {}", disk.log());
    };
    symlink(rig.scratch.path(), theirs.join("away")).expect("symlink");
    std::os::unix::fs::lchown(theirs.join("away"), Some(65534), Some(65534)).expect("lchown");
    let away = theirs.join("away/new");
    refused(&["--qmp", text(&away)], "\"away\" is a symbolic link of user 65534");
    refused(&["--pidfile", text(&away)], "\"away\" is a symbolic link of user 65534");
    let precious = rig.scratch.write("precious", b"4711\n");
    fs::hard_link(&precious, &pidfile).expect("link");
    refused(&["--pidfile", text(&pidfile)], "is not a file of this user's alone");
    assert_eq!(fs::read(&precious).expect("file"), b"4711\n");
}

/// Protects: a stopped keeper blocks neither a stream nor a status query. The log says which
/// process to continue. When the keeper continues, it stores the note of the stream, and the daemon
/// ends as usual.
#[test]
fn a_stopped_keeper_hangs_nobody() {
    requires!("/dev/fuse", "qemu-img");
    let rig = Rig::new(4 * MIB);
    let mut disk = rig.mount().qmp().start();
    let keeper = disk.pid();
    kill_process(keeper, Signal::STOP).expect("signal");
    let mut client = disk.client();
    client.ok("block-stream", json!({"device": "drive0", "speed": 1}));
    client.ok("block-job-set-speed", json!({"device": "drive0", "speed": 2}));
    client.ok("query-block-jobs", json!({}));
    let advice = format!(
        "the mount keeper does not answer; if it is stopped, continue it: kill -CONT {}",
        keeper.as_raw_nonzero()
    );
    wait_until("the log says so", || disk.log().contains(&advice));
    let status = run_within(
        rig.scratch.cordisk().arg("status").arg(disk.path()).env_remove("RUST_LOG"),
        LIMIT,
    );
    assert!(status.status.success() && status.stdout.contains("running"), "{status:?}");
    kill_process(keeper, Signal::CONT).expect("signal");
    client.ok("block-job-cancel", json!({"device": "drive0"}));
    client.wait_event("BLOCK_JOB_CANCELLED");
    drop(client);
    disk.signal(Signal::TERM);
    disk.assert_clean_end();
    rig.assert_overlay(&rig.content);
}

/// Protects: the socket file is removed while the socket still listens. So no other file can have
/// its inode number by then and be removed in its place. The reply to `quit` is sent after that.
#[test]
fn the_socket_is_removed_before_it_is_closed() {
    requires!("/dev/fuse", "qemu-img");
    let rig = Rig::new(MIB);
    for _ in 0..5 {
        let mut disk = rig.mount().qmp().start();
        disk.client().ok("quit", json!({}));
        assert!(!disk.socket().exists(), "the last answer has come, and the file is still there");
        disk.assert_clean_end();
    }
}

/// Protects: the keeper, which the user has started, holds no file open that it does not need: what
/// a successor of the serving process gets, and no backing file. The serving process has a session
/// of its own, so that the terminal signals the keeper alone.
#[test]
fn the_keeper_stands_apart() {
    requires!("/dev/fuse", "qemu-img");
    let rig = Rig::new(MIB);
    let mut disk = rig.mount().qmp().start();
    let (keeper, server) = (disk.pid(), disk.server_pid());
    let process = format!("/proc/{}", keeper.as_raw_nonzero());
    // Not getsid(2): the leader of our session may be outside of this namespace of process ids, and
    // its id is then 0, which `Pid` cannot hold.
    let session = |process: &str| {
        let stat = fs::read_to_string(format!("/proc/{process}/stat")).expect("process");
        let (_, fields) = stat.rsplit_once(')').expect("name");
        fields.split_whitespace().nth(3).expect("session").parse::<i32>().expect("session")
    };
    let server_id = server.as_raw_nonzero().get();
    assert_eq!(session(&server_id.to_string()), server_id, "a session of its own");
    assert_eq!(session(&keeper.as_raw_nonzero().to_string()), session("self"), "that of the user");
    assert_eq!(fs::read_link(format!("{process}/cwd")).expect("cwd"), Path::new("/"));
    let open: Vec<_> = fs::read_dir(format!("{process}/fd"))
        .expect("descriptors")
        .filter_map(|entry| fs::read_link(entry.ok()?.path()).ok())
        .collect();
    assert!(!open.iter().any(|file| file == &rig.base), "{open:?}");
    let held = |path: &Path| open.iter().filter(|file| *file == path).count();
    // The image for its extended attributes, open for reading and without locks. If a successor can
    // take the disk over, also the image with its locks, once more for a failed write-back, and one
    // descriptor of the connection for each thread that reads it.
    let can_survive = !disk.log().contains("no other one takes the disk over");
    let expected = if can_survive { (3, 2) } else { (1, 0) };
    assert_eq!((held(&rig.overlay), held(Path::new("/dev/fuse"))), expected, "{open:?}");
    disk.signal(Signal::INT);
    disk.assert_clean_end();
    wait_until("the serving process has ended", || !is_alive(server));
    rig.assert_overlay(&rig.content);
}

/// Protects: a signal reaches the disk whether it is sent to the main process or to the serving
/// process. One that is sent to both counts once: it does not detach a disk in use, as a second
/// signal does.
#[test]
fn a_signal_may_go_to_either_process() {
    requires!("/dev/fuse", "qemu-img");
    let rig = Rig::new(MIB);
    for signal in [Signal::TERM, Signal::INT] {
        for directly in [false, true] {
            let mut disk = rig.mount().start();
            if directly {
                disk.signal_server(signal);
            } else {
                disk.signal(signal);
            }
            disk.assert_clean_end();
        }
    }
    let mut disk = rig.mount().start();
    let file = disk.open();
    disk.signal_server(Signal::TERM);
    disk.signal(Signal::TERM);
    wait_until("it is busy", || disk.log().contains("is in use: all is written back"));
    // This event comes after the other signal, because one thread sends both.
    disk.signal(Signal::HUP);
    assert_same("served on", &read_at(&file, 0, rig.content.len()), &rig.content);
    assert!(disk.is_mounted(), "{}", disk.log());
    drop(file);
    mounts::umount(disk.path());
    disk.assert_clean_end();
}

/// Protects: the exit status of the main process is that of the serving process, and its last words
/// are there once.
#[test]
fn the_exit_status_is_passed_on() {
    requires!("/dev/fuse", "qemu-img");
    let rig = Rig::new(MIB);
    let broken = rig.scratch.write("broken.qcow2", b"no image");
    let mut disk = Mount::new(&rig.scratch, &broken).spawn();
    let status = disk.ended_within(LIMIT).expect("it ends");
    let log = disk.log();
    assert_eq!(status.code(), Some(1), "{log}");
    assert_eq!(log.lines().filter(|line| line.starts_with("cordisk: ")).count(), 1, "{log}");
    // A caller that ignores the ends of its children makes the kernel forget their status.
    let mut careless = Command::new("sh");
    careless.args(["-c", "trap '' CHLD; exec \"$@\"", "sh", CORDISK, "mount", "-f"]);
    careless.arg(&broken).arg(rig.scratch.join("disk")).env(RUNTIME_DIR, rig.scratch.runtime_dir());
    let done = run_within(&mut careless, LIMIT);
    assert_eq!((done.status.code(), done.stderr.lines().count()), (Some(1), 1), "{done:?}");
    let usage = run_within(rig.scratch.cordisk().args(["mount", "-f", "--no-such"]), LIMIT);
    assert_eq!(usage.status.code(), Some(2), "{usage:?}");
}

/// Protects: without its keeper a daemon keeps serving and loses no data. It says so at once, and
/// once. It cannot unmount, and its last line says what to clean up.
#[test]
fn a_daemon_without_its_keeper_serves_on() {
    requires!("/dev/fuse", "qemu-img");
    let rig = Rig::new(MIB);
    let mut disk = rig.mount().qmp().start();
    let server = disk.server_pid();
    let end = pidfd_open(server, PidfdFlags::empty()).expect("the serving process");
    disk.signal(Signal::KILL);
    assert!(disk.ended_within(LIMIT).is_some_and(|status| status.signal() == Some(libc::SIGKILL)));
    let noticed = format!(
        "the mount keeper (process {}) has died; the disk is served on",
        disk.pid().as_raw_nonzero()
    );
    wait_until("it says so", || disk.log().contains(&noticed));
    let mut guest = rig.guest(&disk);
    guest.check_all();
    guest.write(5000..300_000);
    disk.signal_server(Signal::TERM);
    wait_until("it says that it cannot unmount", || {
        disk.log().contains("the mount keeper has died")
    });
    guest.write(400_000..500_000);
    guest.check_all();
    let want = std::mem::take(&mut guest.shadow);
    drop(guest);
    mounts::umount(disk.path());
    let mut polled = [PollFd::new(&end, PollFlags::IN)];
    let limit = Timespec { tv_sec: 30, tv_nsec: 0 };
    assert_eq!(rustix::event::poll(&mut polled, Some(&limit)), Ok(1), "{}", disk.log());
    let log = disk.log();
    assert_eq!(log.matches(&noticed).count(), 1, "{log}");
    let last = log.lines().last().expect("a line");
    assert!(
        last.starts_with("cordisk: the mount keeper has died: unmount with umount(8)"),
        "{log}"
    );
    assert!(disk.path().exists(), "the placeholder is left");
    rig.assert_overlay(&want);
}

/// Protects: Ctrl-C in a terminal ends a disk in the foreground once and cleanly. It reaches the
/// main process; the serving process is not in the session of the terminal.
#[test]
fn ctrl_c_ends_a_disk_in_the_foreground() {
    requires!("/dev/fuse", "qemu-img", "terminal");
    let rig = Rig::new(MIB);
    let path = rig.scratch.join("drive0.disk");
    let words = ["mount", "-f", text(&rig.overlay), text(&path)];
    let mut terminal =
        Terminal::cordisk(&rig.scratch, &words, &[("RUST_LOG", "info".as_ref())], 40, 200);
    terminal.wait_for_text("mounted ");
    assert_same("the disk", &fs::read(&path).expect("read"), &rig.content);
    terminal.send(b"\x03");
    terminal.assert_status(0);
    let said = String::from_utf8_lossy(&terminal.raw()).into_owned();
    assert_eq!(said.matches("signal 2").count(), 1, "{said}");
    assert!(mounts::at(&path).is_none() && !path.exists(), "{said}");
    rig.assert_overlay(&rig.content);
}

/// Protects: Ctrl-Z stops the main process, and the disk is served on. An unmount is complete when
/// the main process has been continued.
#[test]
fn ctrl_z_stops_no_disk() {
    requires!("/dev/fuse", "qemu-img", "terminal");
    let rig = Rig::new(MIB);
    let path = rig.scratch.join("drive0.disk");
    let pidfile = rig.scratch.join("pid");
    // Under job control the disk has a process group whose parent is in the same session. Another
    // one would not be stopped. A shell also returns from `wait` when the process is stopped.
    let script = "set -m; \"$@\" & p=$!
        while kill -0 $p 2>/dev/null; do wait $p; sleep 0.1; done
        wait $p; echo status $?; cat";
    let words = ["-c", script, "sh", CORDISK, "mount", "-f", "--pidfile", text(&pidfile)];
    let words = [&words[..], &[text(&rig.overlay), text(&path)]].concat();
    let runtime = rig.scratch.runtime_dir();
    let environment = [("RUST_LOG", "info".as_ref()), (RUNTIME_DIR, runtime.as_os_str())];
    let terminal = Terminal::spawn("sh", &words, &environment, 40, 200);
    terminal.wait_for_text("mounted ");
    let main = fs::read_to_string(&pidfile).expect("pidfile").trim().parse().expect("a number");
    let main = Pid::from_raw(main).expect("a pid");
    kill_process(main, Signal::TSTP).expect("what Ctrl-Z sends");
    wait_until("it is stopped", || {
        status_of_any(main).get("State").is_some_and(|state| state.starts_with('T'))
    });
    assert_same("the disk", &fs::read(&path).expect("read"), &rig.content);
    kill_process(main, Signal::TERM).expect("signal");
    mounts::umount(&path);
    kill_process(main, Signal::CONT).expect("continue");
    terminal.wait_for_text("status 0");
    assert!(mounts::at(&path).is_none() && !path.exists());
}

/// The second signal detaches a daemon whose disk is busy, with keeper and sandbox.
#[test]
fn the_second_signal_detaches_from_inside_the_sandbox() {
    requires!("/dev/fuse", "qemu-img");
    let rig = Rig::new(MIB);
    let mut disk = rig.mount().args(&["--sandbox", "require"]).start();
    let mut guest = rig.guest(&disk);
    disk.signal(Signal::TERM);
    wait_until("it is busy", || disk.log().contains("is in use: all is written back"));
    guest.write(0..100_000);
    guest.file.sync_all().expect("fsync");
    disk.signal(Signal::TERM);
    let status = disk.ended_within(LIMIT);
    assert_eq!(status.and_then(|status| status.code()), Some(0), "{}", disk.log());
    assert!(mounts::at(disk.path()).is_none() && !disk.path().exists());
    assert!(!disk.log().contains("still hang"), "the session ends at once: {}", disk.log());
    assert_eq!(errno(guest.file.read_at(&mut [0], 0)), Errno::NOTCONN);
    rig.assert_overlay(&guest.shadow);
}

/// Protects: with `--backing-root` an image can open no file outside, by whatever name, and backing
/// files below that directory work as usual.
#[test]
fn backing_files_stay_below_their_roots() {
    requires!("/dev/fuse", "qemu-img");
    let scratch = Scratch::new();
    let root = scratch.dir("root");
    scratch.dir("root/sub");
    scratch.dir("elsewhere");
    let content = Pattern::new(60, 1);
    for name in ["root/base.raw", "root/sub/base.raw", "elsewhere/secret.raw"] {
        scratch.raw(name, MIB, content);
    }
    symlink("sub/base.raw", root.join("inside")).expect("link");
    symlink("../elsewhere/secret.raw", root.join("out")).expect("link");
    symlink("../elsewhere", root.join("away")).expect("link");
    symlink("/proc/self/fd", root.join("magic")).expect("link");
    let top = root.join("top.qcow2");
    qemu::create(&top, None, "", Some((text(&root.join("base.raw")), "raw")));
    let name = |name: &str| header::edit(&top, |h| h.backing = Some(name.as_bytes().to_vec()));
    let absolute = |name: &str| text(&scratch.join(name)).to_owned();
    let option = ["--backing-root", "root", "root/top.qcow2", "disk"];
    for bad in [
        "../elsewhere/secret.raw",
        "sub/../../elsewhere/secret.raw",
        "out",
        "away/secret.raw",
        &absolute("elsewhere/secret.raw"),
        &absolute("root/../elsewhere/secret.raw"),
        "/etc/passwd",
        "/proc/self/environ",
        "/proc/self/fd/0",
        "magic/0",
        "..",
        "/",
    ] {
        name(bad);
        refused(&scratch, &option, &["--backing-root", "not a regular file"]);
    }
    // These names are refused with and without a root.
    for bad in ["/proc/self/environ", "/proc/self/exe", "/proc/version", "magic/0"] {
        name(bad);
        refused(&scratch, &["root/top.qcow2", "disk"], &["/proc or /sys is no backing file"]);
    }
    for good in [
        "base.raw",
        "./sub/../base.raw",
        "inside",
        "../root/base.raw",
        &absolute("root/sub/base.raw"),
    ] {
        name(good);
        let disk = Mount::new(&scratch, &top).args(&["--backing-root", text(&root)]).start();
        assert_same(good, &disk.read_all(), &content.bytes(0, MIB));
        disk.umount();
        // New unallocated clusters, so that the next name is used.
        qemu::create(&top, None, "", Some((text(&root.join("base.raw")), "raw")));
    }
    // The rule applies to every layer, not only to the first.
    let middle = root.join("middle.qcow2");
    qemu::create(&middle, None, "", Some((&absolute("elsewhere/secret.raw"), "raw")));
    qemu::create(&top, None, "", Some(("middle.qcow2", "qcow2")));
    refused(&scratch, &option, &["--backing-root"]);
    let both = ["--backing-root", text(&root), "--backing-root", &absolute("elsewhere")];
    let disk = Mount::new(&scratch, &top).args(&both).start();
    assert_same("two roots", &disk.read_all(), &content.bytes(0, MIB));
    disk.umount();
    refused(
        &scratch,
        &["--backing-root", "root/base.raw", "root/top.qcow2", "disk"],
        &["--backing-root", "not a directory"],
    );
    refused(
        &scratch,
        &["--backing-root", "missing", "root/top.qcow2", "disk"],
        &["--backing-root", "no such file"],
    );
}

/// Protects: text from an image or a path reaches a terminal as printable text on one line only.
#[test]
fn nothing_from_an_image_escapes_into_the_log() {
    requires!("/dev/fuse", "qemu-img");
    let scratch = Scratch::new();
    scratch.raw("base.raw", MIB, Pattern::new(60, 1));
    let top = scratch.join("top.qcow2");
    let evil = "a\n[2026-01-01T00:00:00Z INFO  cordisk] forged\r\u{1b}[2J\u{202e}b";
    qemu::create(&top, None, "", Some(("base.raw", "raw")));
    let whole = header::Header::load(&top);
    let says =
        |bytes: &[u8]| !bytes.iter().any(|&byte| (byte < 0x20 && byte != b'\n') || byte == 0x7f);
    let attempts = |words: &str| {
        let done = attempt(&scratch, None, &["mount", "-f", "top.qcow2", "disk"]);
        assert_eq!((done.status.code(), done.stderr.lines().count()), (Some(1), 1), "{done:?}");
        assert!(says(done.stderr.as_bytes()) && !done.stderr.contains('\u{202e}'), "{done:?}");
        assert!(done.stderr.contains(words), "{words} in {done:?}");
    };
    // Adds the name of an unknown feature: bit 60, incompatible.
    header::edit(&top, |h| {
        let mut entry = vec![0, 60];
        entry.extend("a\n[2J\u{1b}[2J\u{202e}b".as_bytes());
        entry.resize(48, 0);
        h.extensions.retain(|(kind, _)| *kind != 0x6803_f857);
        h.extensions.push((0x6803_f857, entry));
        h.set_u64(72, 1 << 60);
    });
    attempts("\\u{1b}[2J");
    whole.store(&top);
    header::edit(&top, |h| h.backing = Some(evil.as_bytes().to_vec()));
    attempts("\\u{1b}[2J");
    // U+202E is not a control character, so the name is allowed; but the log escapes it.
    header::edit(&top, |h| h.backing = Some("right\u{202e}tfel".as_bytes().to_vec()));
    attempts("\\u{202e}");

    // The path of the image is in the log line of the mount, and other users may choose directory
    // names.
    qemu::create(&top, None, "", Some((text(&scratch.join("base.raw")), "raw")));
    let dir = scratch.dir(&evil.replace('/', "-"));
    fs::rename(&top, dir.join("top.qcow2")).expect("move");
    let disk = Mount::new(&scratch, &dir.join("top.qcow2")).start();
    wait_until("it says that it is mounted", || disk.log().contains("mounted "));
    let log = disk.log();
    let (_, log) = log.split_once('\n').expect("after the head line");
    assert!(says(log.as_bytes()) && !log.contains('\u{202e}'), "{log:?}");
    assert!(log.contains("a\\n[2026-01-01T00:00:00Z INFO  cordisk] forged\\r\\u{1b}[2J"), "{log}");
    assert!(
        !log.lines().any(|line| line.contains("] forged") && !line.contains("mounted ")),
        "{log}"
    );
    disk.umount();
}

/// Runs `run` on a thread where the kernel returns ENOSYS for these system calls.
fn without<T: Send>(calls: &[i64], run: impl FnOnce() -> T + Send) -> T {
    let rules = calls.iter().map(|&call| (call, Vec::new())).collect();
    let processor = TargetArch::try_from(std::env::consts::ARCH).expect("a known processor");
    let filter = SeccompFilter::new(
        rules,
        SeccompAction::Allow,
        SeccompAction::Errno(libc::ENOSYS as u32),
        processor,
    )
    .expect("filter");
    let program = BpfProgram::try_from(filter).expect("program");
    // A seccomp filter applies to its thread and to the processes that the thread starts.
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| {
            seccompiler::apply_filter(&program).expect("seccomp");
            run()
        });
        thread.join().expect("thread")
    })
}

/// Protects: with `--sandbox require` the command fails before it opens anything if the kernel has
/// no sandbox. The default uses what the kernel has and logs what is missing.
#[test]
fn a_kernel_without_sandboxes() {
    requires!("/dev/fuse", "qemu-img", "root");
    let rig = Rig::new(MIB);
    for (calls, name) in
        [(&[libc::SYS_landlock_create_ruleset][..], "Landlock"), (&[libc::SYS_seccomp], "seccomp")]
    {
        without(calls, || {
            let pidfile = rig.scratch.join("pid");
            let args =
                ["--sandbox", "require", "--pidfile", text(&pidfile), text(&rig.overlay), "disk"];
            refused(&rig.scratch, &args, &[&format!("this kernel offers no {name}")]);
            let disk = rig.mount().start();
            wait_until("it says what is missing", || {
                disk.log().contains(&format!("{name} not offered by this kernel"))
            });
            assert_same("content", &disk.read_all(), &rig.content);
            disk.umount();
        });
    }
    rig.assert_overlay(&rig.content);
}
