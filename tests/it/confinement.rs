//! Who may do what. Others get at neither disk, socket nor files; images get at no file that the user did not mean; the process that reads images
//! and clients can do nothing but serve, and says so in /proc; and all of that takes nothing away from whom the disk is for.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, Permissions};
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt, chown, symlink};
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use nix::libc;
use rustix::io::Errno;
use rustix::process::{Pid, Signal, kill_process, test_kill_process};
use seccompiler::{BpfProgram, SeccompAction, SeccompFilter, TargetArch};
use serde_json::json;

use crate::after_death::is_marked;
use crate::bad_input::{attempt, refused};
use crate::support::header;
use crate::support::{
    CLUSTER, CORDISK, Daemon, Finished, MIB, Mount, Pattern, QmpClient, Rig, Scratch, assert_same, errno, mounts, qemu, run_within,
    wait_until,
};

const LIMIT: Duration = Duration::from_secs(30);
/// Nobody and nogroup, as numbers that every system has.
const NOBODY: &str = "65534";
/// How the tests call it on the command line: a user, and a group of another number.
const USER: &str = "65534:65533";

/// Runs a program as another user, without any rights of its own.
fn as_user(uid: &str, gid: &str, program: &str, args: &[&str]) -> Finished {
    let mut command = Command::new("setpriv");
    command.args(["--reuid", uid, "--regid", gid, "--clear-groups", program]).args(args).current_dir("/");
    run_within(&mut command, LIMIT)
}

fn text(path: &Path) -> &str {
    path.to_str().expect("UTF-8 path")
}

/// Fields of /proc/PID/status.
fn status_of(path: &Path) -> BTreeMap<String, String> {
    let status = fs::read_to_string(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    status.lines().filter_map(|line| line.split_once(':')).map(|(name, value)| (name.to_owned(), value.trim().to_owned())).collect()
}

/// The status of every thread of a process.
fn threads_of(pid: Pid) -> Vec<BTreeMap<String, String>> {
    let tasks = format!("/proc/{}/task", pid.as_raw_nonzero());
    let tasks = fs::read_dir(tasks).expect("threads").map(|entry| entry.expect("thread").path().join("status"));
    tasks.filter(|path| path.exists()).map(|path| status_of(&path)).collect()
}

/// The mount keeper of a daemon: its only child.
fn keeper_of(daemon: Pid) -> Pid {
    let parent = daemon.as_raw_nonzero().to_string();
    let processes = fs::read_dir("/proc").expect("/proc").filter_map(|entry| entry.ok()?.file_name().to_str()?.parse::<i32>().ok());
    let children: Vec<i32> = processes
        .filter(|pid| {
            let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
            status.lines().any(|line| line.strip_prefix("PPid:").is_some_and(|id| id.trim() == parent))
        })
        .collect();
    assert_eq!(children.len(), 1, "one child of {parent}: {children:?}");
    Pid::from_raw(children[0]).expect("a pid")
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

/// Everything that a guest and a client do, with all of it checked.
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
    // A second client: its threads are made now.
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

/// Protects: everything works in the sandbox, when there has to be one: requests of all kinds, flushes, growth, a stream to its end, quit.
#[test]
fn a_confined_daemon_does_all_its_work() {
    requires!("/dev/fuse", "qemu-img");
    let rig = Rig::new(4 * MIB);
    let mut disk = rig.mount().qmp().args(&["--sandbox", "require"]).start();
    let want = exercise(&rig, &mut disk);
    rig.assert_standalone(&want);
}

/// Protects: the sandbox is on, in every thread, those included that are made late; and the keeper is not in it, or it could not unmount.
#[test]
fn every_thread_is_in_the_sandbox() {
    requires!("/dev/fuse", "qemu-img");
    let rig = Rig::new(2 * MIB);
    let disk = rig.mount().qmp().args(&["--stream", "--speed", "64K"]).start();
    let mut client = disk.client();
    client.ok("query-block-jobs", json!({}));
    assert_same("content", &disk.read_all(), &rig.content);
    let threads = threads_of(disk.pid());
    let names: Vec<&str> = threads.iter().map(|thread| thread["Name"].as_str()).collect();
    for expected in
        ["cordisk", "signals", "qmp-accept", "qmp-read", "qmp-write", "fuse-0", "fuse-1", "local-0", "below-0", "flush", "commit"]
    {
        assert!(names.contains(&expected), "no thread {expected}: {names:?}");
    }
    for thread in &threads {
        assert_eq!((thread["NoNewPrivs"].as_str(), thread["Seccomp"].as_str()), ("1", "2"), "{thread:?}");
    }
    let process = format!("/proc/{}", disk.pid().as_raw_nonzero());
    assert_eq!(fs::read_link(format!("{process}/cwd")).expect("cwd"), Path::new("/"));
    let limits = fs::read_to_string(format!("{process}/limits")).expect("limits");
    let core = limits.lines().find(|line| line.starts_with("Max core file size")).expect("a line");
    assert_eq!(core.split_whitespace().skip(4).take(2).collect::<Vec<_>>(), ["0", "0"], "{core}");
    let keeper = status_of_any(keeper_of(disk.pid()));
    assert_eq!((keeper["Seccomp"].as_str(), keeper["Threads"].as_str()), ("0", "1"));
    drop(client);
    disk.umount();

    let disk = rig.mount().args(&["--sandbox", "off"]).start();
    assert!(threads_of(disk.pid()).iter().all(|thread| thread["Seccomp"] == "0"), "off means off");
    disk.umount();
    rig.assert_overlay(&rig.content);
}

/// Protects: `--user` gives up root in every thread, for good, and the disk, its socket and its mount are that user's. Root can do without the
/// disk: the kernel lets nobody in but that user, unless told to.
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
    for thread in threads_of(disk.pid()) {
        assert_eq!(thread["Uid"], "65534\t65534\t65534\t65534", "{thread:?}");
        assert_eq!(thread["Gid"], "65533\t65533\t65533\t65533", "{thread:?}");
        assert_eq!(thread["Groups"], "", "{thread:?}");
        for capabilities in ["CapEff", "CapPrm", "CapInh", "CapAmb"] {
            assert_eq!(thread[capabilities].trim_start_matches('0'), "", "{capabilities} of {thread:?}");
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
    let written = as_user(NOBODY, "65533", "sh", &["-c", "printf written | dd of=\"$0\" conv=notrunc,fsync", text(disk.path())]);
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
    // That user may not even read the overlay, and it is closed all the same.
    assert!(!is_marked(&rig.overlay), "the mark of an open image stays");
    let log = fs::read_to_string(rig.scratch.join("drive0.log")).expect("log");
    assert!(!log.contains("WARN") && !log.contains("ERROR"), "{log}");
    let mut want = rig.content.clone();
    want[..7].copy_from_slice(b"written");
    rig.assert_overlay(&want);

    // Names are looked up; with --allow-other root gets in by the mode.
    let mut disk = rig.mount().qmp().args(&["--user", "nobody", "--allow-other", "--sandbox", "require"]).start();
    let meta = fs::metadata(disk.path()).expect("stat");
    assert_eq!(threads_of(disk.pid())[0]["Uid"].split('\t').next(), Some(meta.uid().to_string().as_str()));
    let again = Rig { scratch: Scratch::new(), base: rig.base.clone(), overlay: rig.overlay.clone(), content: want };
    let want = exercise(&again, &mut disk);
    qemu::assert_independent(&rig.overlay);
    again.assert_overlay(&want);
}

/// Protects: mistakes with `--user` are one line, and nothing is mounted.
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
    let done = as_user(NOBODY, NOBODY, &program, &["mount", "-f", "--user", "nobody", text(&image), text(&disk)]);
    assert_eq!(done.status.code(), Some(1), "{done:?}");
    assert!(done.stderr.contains("only root can become another user") && done.stderr.lines().count() == 1, "{done:?}");
}

/// The program where everybody can start it: the build directory may be private.
fn program_for_all(scratch: &Scratch) -> String {
    let program = scratch.join("cordisk");
    fs::copy(CORDISK, &program).expect("copy of the program");
    fs::set_permissions(&program, Permissions::from_mode(0o755)).expect("chmod");
    text(&program).to_owned()
}

/// Protects: who is not root mounts, and unmounts, by fusermount3, which the keeper calls: the serving process, in its sandbox, could not even start it.
/// In a mount namespace of its own, where everybody may open /dev/fuse, as on most systems.
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
    // Mounted in the background; who reads what; unmounted by SIGTERM; and again, by fusermount3 itself.
    let script = "mknod fuse c 10 229; chmod 666 fuse; mount --bind fuse /dev/fuse; cd own
        user='setpriv --reuid=65534 --regid=65534 --clear-groups'
        trap 'test ! -s pid || kill -KILL $(cat pid)' EXIT
        ended() { for i in $(seq 300); do test -e pid || return 0; sleep 0.1; done; echo \"$1: it does not end\"; return 1; }
        for how in signal helper; do
            $user \"$1\" mount --sandbox require --pidfile pid --qmp sock overlay.qcow2 disk
            grep -qx 'Seccomp:	2' /proc/$(cat pid)/status
            grep -q 'fuse.cordisk' /proc/self/mountinfo
            $user cmp disk base.raw
            if test $how = signal; then kill -TERM $(cat pid); else $user fusermount3 -u disk; fi
            ended $how
            test ! -e disk && test ! -e sock
        done
        echo well";
    let mut command = Command::new("unshare");
    command.args(["--mount", "--propagation", "private", "sh", "-ec", script, "sh", &program]).current_dir(rig.scratch.path());
    let done = run_within(&mut command, Duration::from_secs(90));
    assert!(done.status.success() && done.stdout == "well\n", "{done:?}");
    rig.assert_overlay(&rig.content);
    qemu::assert_clean(&dir.join("overlay.qcow2"));
    assert_same("the user's overlay", &qemu::read_all(&dir.join("overlay.qcow2")), &rig.content);
}

/// Protects: whatever an image is called, fusermount3 and the kernel's list of mounts give back the name by which the mount is known as ours: without
/// that it is neither made nor, at the end, removed.
#[test]
fn an_ordinary_user_mounts_images_of_any_name() {
    requires!("/dev/fuse", "qemu-img", "root", "unshare", "setpriv", "fusermount3", "mknod", "cmp");
    let rig = Rig::new(MIB);
    rig.scratch.open_to_all();
    let program = program_for_all(&rig.scratch);
    let dir = rig.scratch.dir("own");
    let names =
        ["a,b, c.qcow2", "number #1.qcow2", "back\\slash\\.qcow2", "\\040\\,#, .qcow2", "tab\tand\nline.qcow2", "-o,ro.qcow2", "ü.qcow2"];
    fs::copy(&rig.base, dir.join("base.raw")).expect("copy");
    for name in names {
        fs::copy(&rig.overlay, dir.join(name)).expect("copy");
    }
    for path in fs::read_dir(&dir).expect("directory").map(|entry| entry.expect("entry").path()).chain([dir.clone()]) {
        std::os::unix::fs::chown(path, Some(65534), Some(65534)).expect("chown");
    }
    let script = "mknod fuse c 10 229; chmod 666 fuse; mount --bind fuse /dev/fuse; cd own
        program=\"$1\"; shift
        trap 'test ! -s pid || kill -KILL $(cat pid)' EXIT
        for name; do
            setpriv --reuid=65534 --regid=65534 --clear-groups \"$program\" mount --pidfile pid -- \"$PWD/$name\" disk
            setpriv --reuid=65534 --regid=65534 --clear-groups cmp disk base.raw
            kill -TERM $(cat pid)
            for i in $(seq 300); do test -e pid || break; sleep 0.1; done
            if test -e pid || test -e disk || grep -q \"$PWD/disk \" /proc/self/mountinfo; then echo \"not unmounted: $name\"; exit 1; fi
        done
        echo well";
    let mut command = Command::new("unshare");
    command.args(["--mount", "--propagation", "private", "sh", "-ec", script, "sh", &program]).args(names);
    let done = run_within(command.current_dir(rig.scratch.path()), Duration::from_secs(90));
    assert!(done.status.success() && done.stdout == "well\n", "{done:?}");
    for name in names {
        qemu::assert_clean(&dir.join(name));
    }
}

/// Protects: another user of the machine gets nowhere: not to the disk, nor the socket, nor the pidfile, nor, after a kill, to the placeholder.
#[test]
fn others_get_at_nothing() {
    requires!("/dev/fuse", "qemu-img", "root", "setpriv", "sh", "/usr/bin/perl");
    let rig = Rig::new(MIB);
    rig.scratch.open_to_all();
    let pidfile = rig.scratch.join("pid");
    let connect = "use Socket; socket(my $s, AF_UNIX, SOCK_STREAM, 0) or die; connect($s, pack_sockaddr_un($ARGV[0])) or die qq($!\\n)";
    for options in [&[][..], &["--allow-other"]] {
        let disk = rig.mount().qmp().args(&["--pidfile", text(&pidfile)]).args(options).start();
        wait_until("the pidfile is written", || fs::metadata(&pidfile).is_ok_and(|file| file.len() > 0));
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
                assert!(!done.status.success() && done.stdout.is_empty(), "{options:?} {script} {target}: {done:?}");
            }
        }
        let done = as_user(NOBODY, NOBODY, "/usr/bin/perl", &["-e", connect, text(disk.socket())]);
        assert!(done.stderr.contains("Permission denied"), "{done:?}");
        for id in [disk.pid(), keeper_of(disk.pid())] {
            let done = as_user(NOBODY, NOBODY, "sh", &["-c", "kill -TERM $0", &id.as_raw_nonzero().to_string()]);
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

/// Protects: what replaced our pidfile or our socket is not ours to remove.
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

/// Protects: root puts a socket and a pidfile into a directory of another user: both are made there as anywhere, the socket is given to the user of
/// `--user`, and nothing else is left; a link of that user to somewhere else is refused, and so is a file that is not root's alone.
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
        wait_until("the pidfile is written", || fs::metadata(&pidfile).is_ok_and(|file| file.len() > 0));
        let there = fs::symlink_metadata(&socket).expect("socket");
        let owner = if user.is_empty() { (0, 0) } else { (65534, 65533) };
        assert_eq!((there.mode() & 0o7777, there.uid(), there.gid()), (0o600, owner.0, owner.1));
        let names = || fs::read_dir(&theirs).expect("directory").map(|entry| entry.expect("entry").file_name()).collect::<BTreeSet<_>>();
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

/// Protects: a keeper that is stopped hangs neither a stream nor a status; the log says which process to continue; and when it goes on, the note is kept
/// and the daemon ends as ever.
#[test]
fn a_stopped_keeper_hangs_nobody() {
    requires!("/dev/fuse", "qemu-img");
    let rig = Rig::new(4 * MIB);
    let mut disk = rig.mount().qmp().start();
    let keeper = keeper_of(disk.pid());
    kill_process(keeper, Signal::STOP).expect("signal");
    let mut client = disk.client();
    client.ok("block-stream", json!({"device": "drive0", "speed": 1}));
    client.ok("block-job-set-speed", json!({"device": "drive0", "speed": 2}));
    client.ok("query-block-jobs", json!({}));
    let advice = format!("the mount keeper does not answer; if it is stopped, continue it: kill -CONT {}", keeper.as_raw_nonzero());
    wait_until("the log says so", || disk.log().contains(&advice));
    let status = run_within(rig.scratch.cordisk().arg("status").arg(disk.path()).env_remove("RUST_LOG"), LIMIT);
    assert!(status.status.success() && status.stdout.contains("running"), "{status:?}");
    kill_process(keeper, Signal::CONT).expect("signal");
    client.ok("block-job-cancel", json!({"device": "drive0"}));
    client.wait_event("BLOCK_JOB_CANCELLED");
    drop(client);
    disk.signal(Signal::TERM);
    disk.assert_clean_end();
    rig.assert_overlay(&rig.content);
}

/// Protects: the file of the socket goes while the socket still listens, so that nothing else can have its inode number by then and be removed in
/// its place. Whoever asked to quit is answered after that.
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

/// Protects: the keeper is out of the terminal's reach, holds nothing open (least of all the connection), and cannot be talked out of its duty.
#[test]
fn the_keeper_stands_apart() {
    requires!("/dev/fuse", "qemu-img");
    let rig = Rig::new(MIB);
    let mut disk = rig.mount().qmp().start();
    let keeper = keeper_of(disk.pid());
    let process = format!("/proc/{}", keeper.as_raw_nonzero());
    assert_eq!(rustix::process::getsid(Some(keeper)).expect("session"), keeper, "a session of its own");
    assert_eq!(fs::read_link(format!("{process}/cwd")).expect("cwd"), Path::new("/"));
    let open: Vec<_> =
        fs::read_dir(format!("{process}/fd")).expect("descriptors").filter_map(|entry| fs::read_link(entry.ok()?.path()).ok()).collect();
    assert!(!open.iter().any(|file| file == Path::new("/dev/fuse")), "{open:?}");
    assert!(!open.iter().any(|file| file == &rig.base), "{open:?}");
    // The image, for its attributes: reading, and no locks.
    let held = open.iter().filter(|file| *file == &rig.overlay).count();
    assert_eq!(held, 1, "{open:?}");
    for signal in [Signal::INT, Signal::TERM, Signal::HUP, Signal::QUIT] {
        kill_process(keeper, signal).expect("signal");
    }
    assert_same("content", &disk.read_all(), &rig.content);
    disk.signal(Signal::INT);
    disk.assert_clean_end();
    wait_until("the keeper goes with the daemon", || !is_alive(keeper));
    rig.assert_overlay(&rig.content);
}

/// Protects: when the serving process is killed, the keeper goes too and leaves the mount dead: ENOTCONN, not an empty placeholder.
#[test]
fn the_keeper_leaves_a_dead_mount_alone() {
    requires!("/dev/fuse", "qemu-img");
    let rig = Rig::new(MIB);
    let mut disk = rig.mount().start();
    let (keeper, file) = (keeper_of(disk.pid()), disk.open());
    disk.signal(Signal::KILL);
    let status = disk.ended_within(LIMIT).expect("killed");
    assert_eq!(status.signal(), Some(libc::SIGKILL));
    wait_until("the keeper goes with the daemon", || !is_alive(keeper));
    assert_eq!(errno(fs::File::open(disk.path())), Errno::NOTCONN);
    assert_eq!(errno(file.read_at(&mut [0], 0)), Errno::NOTCONN, "the connection has ended with the daemon");
    drop(file);
    mounts::detach(disk.path());
    drop(disk);
    qemu::assert_not_corrupt(&rig.overlay);
    rig.mount().start().umount();
    rig.assert_overlay(&rig.content);
}

/// Protects: without its keeper a daemon serves on and loses nothing; it cannot unmount, says so, and ends with an error that tells what to clean up.
#[test]
fn a_daemon_without_its_keeper_serves_on() {
    requires!("/dev/fuse", "qemu-img");
    let rig = Rig::new(MIB);
    let mut disk = rig.mount().qmp().start();
    let keeper = keeper_of(disk.pid());
    kill_process(keeper, Signal::KILL).expect("kill");
    wait_until("the keeper is dead", || !is_alive(keeper));
    let mut guest = rig.guest(&disk);
    guest.check_all();
    guest.write(5000..300_000);
    disk.signal(Signal::TERM);
    wait_until("it says that it cannot unmount", || disk.log().contains("the mount keeper has died"));
    guest.write(400_000..500_000);
    guest.check_all();
    let want = std::mem::take(&mut guest.shadow);
    drop(guest);
    mounts::umount(disk.path());
    let status = disk.ended_within(LIMIT);
    assert_eq!(status.and_then(|status| status.code()), Some(1), "{}", disk.log());
    let log = disk.log();
    let last = log.lines().last().expect("a line");
    assert!(last.starts_with("cordisk: the mount keeper has died: unmount with umount(8)"), "{log}");
    assert!(disk.path().exists(), "the placeholder is left");
    rig.assert_overlay(&want);
}

/// A daemon whose disk is busy is detached by the second signal, keeper, sandbox and all.
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

/// Protects: with `--backing-root` an image gets at nothing else, whatever it calls it, and what lies below works as ever.
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
    // In any case, with a root and without.
    for bad in ["/proc/self/environ", "/proc/self/exe", "/proc/version", "magic/0"] {
        name(bad);
        refused(&scratch, &["root/top.qcow2", "disk"], &["/proc or /sys is no backing file"]);
    }
    for good in ["base.raw", "./sub/../base.raw", "inside", "../root/base.raw", &absolute("root/sub/base.raw")] {
        name(good);
        let disk = Mount::new(&scratch, &top).args(&["--backing-root", text(&root)]).start();
        assert_same(good, &disk.read_all(), &content.bytes(0, MIB));
        disk.umount();
        // Untouched clusters for the next name.
        qemu::create(&top, None, "", Some((text(&root.join("base.raw")), "raw")));
    }
    // Every layer, not only the first.
    let middle = root.join("middle.qcow2");
    qemu::create(&middle, None, "", Some((&absolute("elsewhere/secret.raw"), "raw")));
    qemu::create(&top, None, "", Some(("middle.qcow2", "qcow2")));
    refused(&scratch, &option, &["--backing-root"]);
    let both = ["--backing-root", text(&root), "--backing-root", &absolute("elsewhere")];
    let disk = Mount::new(&scratch, &top).args(&both).start();
    assert_same("two roots", &disk.read_all(), &content.bytes(0, MIB));
    disk.umount();
    refused(&scratch, &["--backing-root", "root/base.raw", "root/top.qcow2", "disk"], &["--backing-root", "not a directory"]);
    refused(&scratch, &["--backing-root", "missing", "root/top.qcow2", "disk"], &["--backing-root", "no such file"]);
}

/// Protects: no text from an image or a path reaches a terminal as anything but text on one line.
#[test]
fn nothing_from_an_image_escapes_into_the_log() {
    requires!("/dev/fuse", "qemu-img");
    let scratch = Scratch::new();
    scratch.raw("base.raw", MIB, Pattern::new(60, 1));
    let top = scratch.join("top.qcow2");
    let evil = "a\n[2026-01-01T00:00:00Z INFO  cordisk] forged\r\u{1b}[2J\u{202e}b";
    qemu::create(&top, None, "", Some(("base.raw", "raw")));
    let whole = header::Header::load(&top);
    let says = |bytes: &[u8]| !bytes.iter().any(|&byte| (byte < 0x20 && byte != b'\n') || byte == 0x7f);
    let attempts = |words: &str| {
        let done = attempt(&scratch, None, &["mount", "-f", "top.qcow2", "disk"]);
        assert_eq!((done.status.code(), done.stderr.lines().count()), (Some(1), 1), "{done:?}");
        assert!(says(done.stderr.as_bytes()) && !done.stderr.contains('\u{202e}'), "{done:?}");
        assert!(done.stderr.contains(words), "{words} in {done:?}");
    };
    // The name of a feature that we do not know: bit 60, incompatible.
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
    // Not a control character, and so a name like any other; but not in our log.
    header::edit(&top, |h| h.backing = Some("right\u{202e}tfel".as_bytes().to_vec()));
    attempts("\\u{202e}");

    // Whoever may choose directories: the path stands in the log line of the mount.
    qemu::create(&top, None, "", Some((text(&scratch.join("base.raw")), "raw")));
    let dir = scratch.dir(&evil.replace('/', "-"));
    fs::rename(&top, dir.join("top.qcow2")).expect("move");
    let disk = Mount::new(&scratch, &dir.join("top.qcow2")).start();
    wait_until("it says that it is mounted", || disk.log().contains("mounted "));
    let log = disk.log();
    let (_, log) = log.split_once('\n').expect("after the head line");
    assert!(says(log.as_bytes()) && !log.contains('\u{202e}'), "{log:?}");
    assert!(log.contains("a\\n[2026-01-01T00:00:00Z INFO  cordisk] forged\\r\\u{1b}[2J"), "{log}");
    assert!(!log.lines().any(|line| line.contains("] forged") && !line.contains("mounted ")), "{log}");
    disk.umount();
}

/// Starts `run` where the kernel answers ENOSYS to these calls.
fn without<T: Send>(calls: &[i64], run: impl FnOnce() -> T + Send) -> T {
    let rules = calls.iter().map(|&call| (call, Vec::new())).collect();
    let processor = TargetArch::try_from(std::env::consts::ARCH).expect("a known processor");
    let filter = SeccompFilter::new(rules, SeccompAction::Allow, SeccompAction::Errno(libc::ENOSYS as u32), processor).expect("filter");
    let program = BpfProgram::try_from(filter).expect("program");
    // A filter stays with its thread and with what that starts.
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| {
            seccompiler::apply_filter(&program).expect("seccomp");
            run()
        });
        thread.join().expect("thread")
    })
}

/// Protects: `--sandbox require` means it, before anything is opened; the default does what it can and says what it could not.
#[test]
fn a_kernel_without_sandboxes() {
    requires!("/dev/fuse", "qemu-img", "root");
    let rig = Rig::new(MIB);
    for (calls, name) in [(&[libc::SYS_landlock_create_ruleset][..], "Landlock"), (&[libc::SYS_seccomp], "seccomp")] {
        without(calls, || {
            let pidfile = rig.scratch.join("pid");
            let args = ["--sandbox", "require", "--pidfile", text(&pidfile), text(&rig.overlay), "disk"];
            refused(&rig.scratch, &args, &[&format!("this kernel offers no {name}")]);
            let disk = rig.mount().start();
            wait_until("it says what is missing", || disk.log().contains(&format!("{name} not offered by this kernel")));
            assert_same("content", &disk.read_all(), &rig.content);
            disk.umount();
        });
    }
    rig.assert_overlay(&rig.content);
}
