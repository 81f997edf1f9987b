//! `--on-complete`: the command runs once when a stream has completed, outside the sandbox, as the
//! user of the daemon, and delays no request.

use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use rustix::process::{Pid, Signal, kill_process};
use serde_json::json;

use crate::support::{MIB, Rig, wait_until};

fn read(path: &Path) -> String {
    fs::read_to_string(path).unwrap_or_default()
}

fn lines(path: &Path) -> usize {
    read(path).lines().count()
}

/// Protects: the command gets what it needs and nothing else: its environment variables, no
/// descriptor of the daemon, the directory `/`. It runs once for each stream that completes,
/// however that stream was started, although the daemon itself could not start a process.
#[test]
fn the_command_runs_once_and_knows_what_it_is_about() {
    requires!("/dev/fuse", "qemu-img", "sh");
    let rig = Rig::new(2 * MIB);
    let out = rig.scratch.dir("out");
    // The list of descriptors is that of the shell, which has one more while it redirects a single
    // command. The signal masks are those of grep, which inherits them from the shell: the shell
    // itself blocks all signals while it starts grep.
    let command = format!(
        "cd {out}; env > env.new; exec > fds; ls -1 /proc/$$/fd; exec > /dev/null; readlink /proc/$$/fd/0 > stdin; echo $OLDPWD > cwd; grep -E '^(SigBlk|SigIgn|Seccomp):' \
         /proc/self/status > status; mv env.new env; echo done >> runs",
        out = out.display()
    );
    let disk = rig
        .mount()
        .qmp()
        .args(&["--stream", "--sandbox", "require", "--on-complete", &command])
        .start();
    let runs = out.join("runs");
    wait_until("the command has run", || lines(&runs) == 1);
    let environment = read(&out.join("env"));
    for (name, value) in [
        ("CORDISK_IMAGE", rig.overlay.as_path()),
        ("CORDISK_MOUNTPOINT", disk.path()),
        ("CORDISK_DEVICE", Path::new("drive0")),
        ("CORDISK_QMP", disk.socket()),
    ] {
        let line = format!("{name}={}", value.display());
        assert!(environment.lines().any(|have| have == line), "{line} in {environment}");
    }
    assert_eq!(read(&out.join("fds")), "0\n1\n2\n", "descriptors of the command");
    assert_eq!(
        (read(&out.join("stdin")).as_str(), read(&out.join("cwd")).as_str()),
        ("/dev/null\n", "/\n")
    );
    let status = read(&out.join("status"));
    let field = |text: &str, name: &str| {
        let value = text
            .lines()
            .find_map(|line| line.strip_prefix(name)?.strip_prefix(":\t"))
            .unwrap_or_else(|| panic!("{name} in {text}"));
        u64::from_str_radix(value, 16).expect("a mask")
    };
    assert_eq!((field(&status, "SigBlk"), field(&status, "Seccomp")), (0, 0), "{status}");
    // The parent of the daemon may have made it ignore some signals. SIGPIPE does not count,
    // because every Rust program ignores it.
    let inherited = field(&read(Path::new("/proc/self/status")), "SigIgn") & !(1 << 12);
    // Signals 32 and 33 belong to the C library, and posix_spawn(3) sets them to be ignored.
    assert_eq!(field(&status, "SigIgn") & !inherited & 0x7fff_ffff, 0, "{status}");

    // A stream that a client starts counts as well, even one that has nothing to copy.
    let mut client = disk.client();
    client.ok("block-stream", json!({"device": "drive0"}));
    client.wait_completed();
    wait_until("the command has run again", || lines(&runs) == 2);
    drop(client);
    disk.umount();
    assert_eq!(lines(&runs), 2);
    rig.assert_standalone(&rig.content);
}

/// Protects: the command does not run for a stream that was cancelled, has failed, or is
/// interrupted by the end of the daemon.
#[test]
fn it_does_not_run_for_a_stream_that_has_not_completed() {
    requires!("/dev/fuse", "qemu-img", "sh");
    let rig = Rig::new(4 * MIB);
    let runs = rig.scratch.join("runs");
    let command = format!("echo $CORDISK_DEVICE >> {}", runs.display());
    let disk = rig.mount().qmp().args(&["--on-complete", &command, "--no-resume"]).start();
    let mut client = disk.client();
    client.ok("block-stream", json!({"device": "drive0", "speed": 1}));
    client.ok("block-job-cancel", json!({"device": "drive0"}));
    client.wait_event("BLOCK_JOB_CANCELLED");
    client.wait_status("null");
    // A base that shrinks while in use cannot be read to its end.
    fs::OpenOptions::new()
        .write(true)
        .open(&rig.base)
        .expect("base")
        .set_len(MIB)
        .expect("truncate");
    client.ok("block-stream", json!({"device": "drive0"}));
    let event = client.wait_event("BLOCK_JOB_COMPLETED");
    assert!(event["data"]["error"].is_string(), "{event}");
    client.wait_status("null");
    // No layer is above this base, so this stream completes, which shows that the command works.
    client.ok("block-stream", json!({"device": "drive0", "base": "base.raw"}));
    client.wait_completed();
    client.wait_status("null");
    wait_until("the command has run", || lines(&runs) > 0);
    client.ok("block-stream", json!({"device": "drive0", "speed": 1}));
    drop(client);
    disk.umount();
    assert_eq!(read(&runs), "drive0\n", "once: for the one that completed");
}

/// Protects: with `--user` the command has only the rights of that user; with root's rights it
/// would be a way back to root.
#[test]
fn it_runs_as_the_user_of_the_daemon() {
    requires!("/dev/fuse", "qemu-img", "root", "sh");
    let rig = Rig::new(2 * MIB);
    rig.scratch.open_to_all();
    let out = rig.scratch.dir("out");
    fs::set_permissions(&out, Permissions::from_mode(0o777)).expect("chmod");
    let command = format!(
        "cd {}; grep -E '^(Uid|Gid|Groups|Cap(Eff|Prm|Inh|Amb)):' /proc/self/status > new; mv new status",
        out.display()
    );
    let disk = rig
        .mount()
        .qmp()
        .args(&["--user", "65534:65533", "--stream", "--on-complete", &command])
        .start();
    wait_until("the command has run", || out.join("status").exists());
    let status = read(&out.join("status"));
    for line in status.lines() {
        let (name, value) = line.split_once(':').expect("a field");
        match name {
            "Uid" => assert_eq!(value.trim(), "65534\t65534\t65534\t65534"),
            "Gid" => assert_eq!(value.trim(), "65533\t65533\t65533\t65533"),
            _ => assert_eq!(value.trim().trim_start_matches('0'), "", "{line}"),
        }
    }
    assert_eq!(status.lines().count(), 7, "{status}");
    disk.umount();
}

/// A process that is killed when dropped.
struct Sleeper(Pid);

impl Drop for Sleeper {
    fn drop(&mut self) {
        let _ = kill_process(self.0, Signal::KILL);
    }
}

/// Protects: a command that runs long delays neither the disk nor the end of the daemon, and does
/// not end with it.
#[test]
fn a_command_that_sleeps_holds_nobody_up() {
    requires!("/dev/fuse", "qemu-img", "sh", "sleep");
    let rig = Rig::new(2 * MIB);
    let file = rig.scratch.join("pid");
    let command = format!("echo $$ > {0}.new; mv {0}.new {0}; exec sleep 600", file.display());
    let disk = rig.mount().qmp().args(&["--stream", "--on-complete", &command]).start();
    wait_until("the command runs", || file.exists());
    let sleeper =
        Sleeper(Pid::from_raw(read(&file).trim().parse().expect("a number")).expect("a pid"));
    disk.client().ok("query-block", json!({}));
    disk.umount();
    let state = read(Path::new(&format!("/proc/{}/comm", sleeper.0.as_raw_nonzero())));
    assert_eq!(state, "sleep\n", "it outlives the daemon");
    drop(sleeper);
    rig.assert_standalone(&rig.content);
}

/// Protects: in the foreground the command's output is visible, and so is its failure.
#[test]
fn what_it_says_is_seen_in_the_foreground() {
    requires!("/dev/fuse", "qemu-img", "sh");
    let rig = Rig::new(MIB);
    let file = rig.scratch.join("pid");
    let command = format!(
        "echo said by the command; echo complained >&2; echo $$ > {0}.new; mv {0}.new {0}; exit 3",
        file.display()
    );
    let disk = rig.mount().args(&["--stream", "--on-complete", &command]).start();
    wait_until("the command has run", || file.exists());
    let process = format!("/proc/{}", read(&file).trim());
    wait_until("the keeper has looked after it", || !Path::new(&process).exists());
    let log = rig.scratch.join("drive0.log");
    disk.umount();
    let log = read(&log);
    assert!(log.contains("\nsaid by the command\n") && log.contains("\ncomplained\n"), "{log}");
    assert!(log.contains("--on-complete: exit status: 3"), "{log}");
}
