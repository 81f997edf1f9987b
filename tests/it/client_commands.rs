//! The commands about running disks: their output, their effects, their exit status. They find
//! disks by mountpoint, mounted without `--qmp`.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use rustix::process::{Signal, kill_process};
use serde_json::{Value, json};

use crate::hung_backing::Stopped;
use crate::support::nbd::{Fault, NbdFile};
use crate::support::terminal::Terminal;
use crate::support::{
    CORDISK, Daemon, Finished, Guest, KIB, MIB, Mount, Ours, Pattern, QmpClient, RUNTIME_DIR, Rig,
    Scratch, assert_same, mounts, poll, qemu, run_within, wait_until,
};

const LIMIT: Duration = Duration::from_secs(60);
const SIZE: u64 = 8 * MIB;

/// Runs `cordisk ARGS` in the scratch directory, without a terminal.
fn cordisk(scratch: &Scratch, args: &[&str]) -> Finished {
    let mut command = scratch.cordisk();
    command
        .args(args)
        .current_dir(scratch.path())
        .env_remove("RUST_LOG")
        .env_remove("NO_COLOR")
        .env("LC_ALL", "C.UTF-8");
    let done = run_within(&mut command, LIMIT);
    assert!(
        !done.stdout.contains('\u{1b}') && !done.stderr.contains('\u{1b}'),
        "nobody has asked for colours: {done:?}"
    );
    done
}

/// Like [`cordisk`], asserts success and returns standard output.
fn ok(scratch: &Scratch, args: &[&str]) -> String {
    let done = cordisk(scratch, args);
    assert_eq!(done.status.code(), Some(0), "{args:?}: {done:?}");
    done.stdout
}

/// Like [`cordisk`], asserts that it is refused in one line that contains all of `words`.
fn refused(scratch: &Scratch, args: &[&str], words: &[&str]) {
    let done = cordisk(scratch, args);
    assert_eq!((done.status.code(), done.stdout.as_str()), (Some(1), ""), "{args:?}: {done:?}");
    assert!(
        done.stderr.starts_with("cordisk: ") && done.stderr.lines().count() == 1,
        "{args:?}: {done:?}"
    );
    for word in words {
        assert!(done.stderr.contains(word), "{word:?} in {args:?}: {done:?}");
    }
}

/// Returns the registry entry of a daemon. It is written a moment after the disk is mounted.
fn entry(scratch: &Scratch, disk: &Daemon) -> Value {
    let path = scratch.runtime_dir().join(format!("{}.json", disk.pid().as_raw_nonzero()));
    let entry = poll(LIMIT, || serde_json::from_slice(&fs::read(&path).ok()?).ok());
    entry.unwrap_or_else(|| panic!("no entry {}\n{}", path.display(), disk.log()))
}

/// Mounts without `--qmp` at `drive0.disk`.
fn start(mount: Mount, scratch: &Scratch) -> Daemon {
    let disk = mount.start();
    entry(scratch, &disk);
    disk
}

/// Connects to the socket that the entry names.
fn session(scratch: &Scratch, disk: &Daemon) -> QmpClient {
    QmpClient::connect(Path::new(entry(scratch, disk)["qmp"].as_str().expect("a socket")))
}

fn names_in(dir: &Path) -> Vec<PathBuf> {
    fs::read_dir(dir).expect("directory").map(|entry| entry.expect("entry").path()).collect()
}

/// A command that runs beside the test; it is killed if the test fails.
struct Going(Ours);

impl Going {
    fn start(scratch: &Scratch, args: &[&str]) -> Going {
        let mut command = scratch.cordisk();
        command.args(args).current_dir(scratch.path()).env_remove("RUST_LOG").stdin(Stdio::null());
        command
            .stdout(File::create(scratch.join("going.out")).expect("stdout"))
            .stderr(File::create(scratch.join("going.err")).expect("stderr"));
        Going(Ours(command.spawn().expect("cordisk")))
    }

    fn signal(&self, signal: Signal) {
        kill_process(self.0.pid(), signal).expect("signal");
    }

    /// Waits for the end of the command; returns exit status, standard output and standard error.
    fn ended(&mut self, scratch: &Scratch) -> (Option<i32>, String, String) {
        let status =
            poll(LIMIT, || self.0.0.try_wait().expect("wait")).expect("the command had to end");
        let text = |name| fs::read_to_string(scratch.join(name)).expect("output");
        (status.code(), text("going.out"), text("going.err"))
    }
}

/// Protects: a disk is found by each of its names, and its entry is removed when it ends.
#[test]
fn a_disk_is_found_by_its_mountpoint_and_by_its_socket() {
    requires!("/dev/fuse", "qemu-img");
    let rig = Rig::new(SIZE);
    let disk = start(rig.mount(), &rig.scratch);
    let (mountpoint, image) =
        (disk.path().to_str().expect("UTF-8"), rig.overlay.to_str().expect("UTF-8"));
    let mut entry = entry(&rig.scratch, &disk);
    let filesystem = entry
        .as_object_mut()
        .and_then(|entry| entry.remove("filesystem"))
        .expect("the device of the mount");
    assert!(filesystem.as_str().is_some_and(|device| device.starts_with("0:")), "{filesystem}");
    let socket = rig.scratch.runtime_dir().join(format!("{}.sock", disk.pid().as_raw_nonzero()));
    let want = json!({ "pid": disk.pid().as_raw_nonzero().get(), "serving": disk.server_pid().as_raw_nonzero().get(), "mountpoint": mountpoint, "image": image, "device": "drive0", "qmp": socket });
    assert_eq!(entry, want);
    assert!(
        socket.metadata().expect("socket").file_type().is_socket()
            && socket.metadata().expect("socket").mode() & 0o777 == 0o600
    );
    symlink("drive0.disk", rig.scratch.join("link")).expect("symlink");
    let dotted = format!("{}/run/../drive0.disk", rig.scratch.path().display());
    for target in [
        mountpoint,
        "drive0.disk",
        "./drive0.disk",
        "link",
        &dotted,
        socket.to_str().expect("UTF-8"),
    ] {
        let text = ok(&rig.scratch, &["status", target]);
        assert!(text.starts_with(&format!("● {mountpoint}  running\n")), "{target}: {text}");
        assert!(
            text.contains(&format!("image  {image}, 8 MiB in clusters of 64 KiB, ")),
            "{target}: {text}"
        );
        assert!(
            text.contains(&format!("chain  {} (raw, 8 MiB)\n", rig.base.display())),
            "{target}: {text}"
        );
    }
    let disks: Value =
        serde_json::from_str(&ok(&rig.scratch, &["status", "link", "--json"])).expect("JSON");
    assert_eq!(
        (&disks[0]["state"], &disks[0]["qmp"], &disks[0]["size"]),
        (&json!("running"), &json!(socket), &json!(SIZE)),
        "{disks}"
    );
    assert_eq!(
        (&disks[0]["mountpoint"], &disks[0]["pid"], disks.as_array().map(Vec::len)),
        (&want["mountpoint"], &want["pid"], Some(1))
    );
    disk.umount();
    assert_eq!(names_in(&rig.scratch.runtime_dir()), Vec::<PathBuf>::new());

    // With `--qmp`, the entry names that socket.
    let disk = start(rig.mount().qmp(), &rig.scratch);
    assert_eq!(self::entry(&rig.scratch, &disk)["qmp"], json!(disk.socket()));
    let names = names_in(&rig.scratch.runtime_dir());
    let with = |suffix: &str| {
        names.iter().filter(|name| name.extension().is_some_and(|is| is == suffix)).count()
    };
    assert_eq!((with("json"), with("sock")), (1, 0), "{names:?}");
    disk.umount();
    assert_eq!(names_in(&rig.scratch.runtime_dir()), Vec::<PathBuf>::new());
}

/// Protects: a name that is not a disk gives an error that says what to do.
#[test]
fn what_is_no_disk_is_refused() {
    requires!("/dev/fuse", "qemu-img");
    let rig = Rig::new(MIB);
    rig.scratch.write("plain", b"x");
    for command in [
        &["status"][..],
        &["stream"],
        &["umount"],
        &["umount", "--lazy"],
        &["job", "pause"],
        &["job", "cancel"],
    ] {
        for target in ["plain", "missing", "no/where", "/", "."] {
            let words = ["no cordisk disk is mounted at ", "`cordisk status` lists those that run"];
            refused(&rig.scratch, &[command, &[target]].concat(), &words);
        }
    }
    let stale = rig.scratch.join("stale.sock");
    drop(std::os::unix::net::UnixListener::bind(&stale).expect("socket"));
    refused(
        &rig.scratch,
        &["status", "stale.sock"],
        &["no process listens at", "the daemon is gone"],
    );
    let disk = start(rig.mount(), &rig.scratch);
    refused(
        &rig.scratch,
        &["stream", "overlay.qcow2"],
        &["it is the image of the disk at", "drive0.disk"],
    );
    refused(&rig.scratch, &["job", "pause", "drive0.disk"], &["no job is running on drive0.disk"]);
    refused(
        &rig.scratch,
        &["stream", "drive0.disk", "--base", "nothing.raw"],
        &["nothing.raw", "shows the chain"],
    );
    disk.umount();
    let disk = start(rig.mount().args(&["--read-only"]), &rig.scratch);
    refused(&rig.scratch, &["stream", "drive0.disk"], &["it was mounted read-only"]);
    disk.umount();
}

/// Protects: `--wait` returns when the image needs no backing file, and scripts get one line.
#[test]
fn a_stream_that_is_waited_for_is_complete() {
    requires!("/dev/fuse", "qemu-img");
    let rig = Rig::new(SIZE);
    let disk = start(rig.mount(), &rig.scratch);
    let text = ok(&rig.scratch, &["stream", "drive0.disk", "--wait"]);
    let seconds = text
        .strip_prefix("stream of drive0.disk completed: 8 MiB in ")
        .and_then(|rest| rest.strip_suffix(" s\n"));
    assert!(seconds.is_some_and(|seconds| seconds.parse::<u64>().is_ok()), "{text}");
    // The daemon still has the base open, but no longer needs it.
    let status = ok(&rig.scratch, &["status", "drive0.disk"]);
    assert!(
        status.contains("chain  none: the image stands alone\n")
            && status.contains("  last job  stream completed "),
        "{status}"
    );
    assert!(status.contains("remote    0.0 %  0 B\n"), "not even for a moment: {status}");
    assert_eq!(
        ok(&rig.scratch, &["stream", "drive0.disk", "--wait"]),
        "stream of drive0.disk completed: there was nothing to copy\n"
    );
    ok(&rig.scratch, &["umount", "drive0.disk"]);
    drop(disk);
    rig.assert_standalone(&rig.content);
}

/// Protects: `--base` keeps that file as the backing file.
#[test]
fn a_stream_down_to_a_base_leaves_it() {
    requires!("/dev/fuse", "qemu-img");
    let rig = Rig::new(MIB);
    let top = rig.scratch.join("top.qcow2");
    qemu::create(&top, None, "", Some(("overlay.qcow2", "qcow2")));
    let disk = start(Mount::new(&rig.scratch, &top), &rig.scratch);
    let base = rig.base.to_str().expect("UTF-8");
    ok(&rig.scratch, &["stream", "drive0.disk", "--base", base, "--wait"]);
    let text = ok(&rig.scratch, &["status", "drive0.disk"]);
    assert!(text.contains(&format!("chain  {base} (raw, 1 MiB)\n")), "{text}");
    disk.umount();
}

/// Protects: each verb has its effect, which the test checks over QMP, and reports it.
#[test]
fn a_job_is_paused_resumed_throttled_and_cancelled() {
    requires!("/dev/fuse", "qemu-img");
    let rig = Rig::new(SIZE);
    let disk = start(rig.mount(), &rig.scratch);
    let text = ok(&rig.scratch, &["stream", "drive0.disk", "--speed", "64K"]);
    let want = "streaming drive0.disk; `cordisk stream drive0.disk --wait` shows how far it is, `cordisk job cancel drive0.disk` ends it\n";
    assert_eq!(text, want);
    let mut client = session(&rig.scratch, &disk);
    assert_eq!(client.job()["speed"], json!(64 * KIB));
    let words = [
        "is already being streamed (",
        "cordisk stream drive0.disk --wait",
        "cordisk job speed drive0.disk RATE",
    ];
    refused(&rig.scratch, &["stream", "drive0.disk"], &words);
    refused(&rig.scratch, &["stream", "drive0.disk", "--wait", "--speed", "1M"], &words);
    assert_eq!(client.job()["speed"], json!(64 * KIB), "what is refused changes nothing");

    assert!(
        ok(&rig.scratch, &["job", "pause", "drive0.disk"])
            .starts_with("stream of drive0.disk paused at ")
    );
    assert_eq!(client.job()["paused"], json!(true));
    client.wait_status("paused");
    let text = ok(&rig.scratch, &["status", "drive0.disk"]);
    assert!(
        text.contains(
            " of 8 MiB, limit 64 KiB/s, paused; `cordisk job resume drive0.disk` goes on\n"
        ),
        "{text}"
    );
    assert!(ok(&rig.scratch, &["status"]).contains(" %, paused "));
    refused(&rig.scratch, &["job", "pause", "drive0.disk"], &["stream of drive0.disk (paused): "]);
    assert!(
        ok(&rig.scratch, &["job", "resume", "drive0.disk"])
            .starts_with("stream of drive0.disk goes on at ")
    );
    assert_eq!(client.job()["paused"], json!(false));
    assert_eq!(
        ok(&rig.scratch, &["job", "speed", "drive0.disk", "128K"]),
        "stream of drive0.disk runs at 128 KiB/s at most now\n"
    );
    assert_eq!(client.job()["speed"], json!(128 * KIB));
    let text = ok(&rig.scratch, &["job", "cancel", "drive0.disk"]);
    assert!(
        text.starts_with("stream of drive0.disk cancelled at ")
            && text.ends_with(" %; what was copied stays in the image\n"),
        "{text}"
    );
    assert_eq!(client.ok("query-jobs", json!({})), json!([]), "cancel waits for the end");
    for verb in ["pause", "resume", "cancel"] {
        refused(&rig.scratch, &["job", verb, "drive0.disk"], &["no job is running on drive0.disk"]);
    }
    let text = ok(&rig.scratch, &["status", "drive0.disk"]);
    assert!(text.contains("last job  stream cancelled "), "{text}");
    ok(&rig.scratch, &["stream", "drive0.disk", "--speed", "64K"]);
    let mut waiting = Going::start(&rig.scratch, &["stream", "drive0.disk", "--wait"]);
    assert_eq!(
        ok(&rig.scratch, &["job", "speed", "drive0.disk", "0"]),
        "stream of drive0.disk runs without a limit now\n"
    );
    let (status, out, err) = waiting.ended(&rig.scratch);
    assert!(
        status == Some(0) && out.starts_with("stream of drive0.disk completed"),
        "the one who has joined: {status:?} {out} {err}"
    );
    client.hang_up();
    disk.umount();
    rig.assert_standalone(&rig.content);
}

/// Protects: Ctrl-C ends the wait and not the stream, unless an option says otherwise. The command
/// shows a bar with bytes and the remaining time.
#[test]
fn an_interrupt_leaves_the_stream_running() {
    requires!("/dev/fuse", "qemu-img", "terminal");
    let rig = Rig::new(SIZE);
    let disk = start(rig.mount(), &rig.scratch);
    let mut client = session(&rig.scratch, &disk);
    let path = disk.path().to_str().expect("UTF-8");
    let mut shown = Terminal::cordisk(
        &rig.scratch,
        &["stream", path, "--speed", "128K", "--wait"],
        &[],
        24,
        120,
    );
    let screen = shown.wait_for("a bar that has begun", |screen| {
        let text = screen.contents();
        text.contains("iB to copy, ") && text.contains(" left") && text.contains('━')
    });
    assert!(
        screen.contains("/drive0.disk   ") && screen.contains(" % ") && screen.contains("iB/s, "),
        "{screen}"
    );
    shown.send(b"\x03");
    shown.assert_status(130);
    let text = shown.contents();
    let squeezed = text.replace('\n', "");
    assert!(
        squeezed.contains(&format!(
            "stream of {path} goes on; `cordisk stream {path} --wait` shows it again"
        )),
        "{text}"
    );
    assert!(!text.contains('━'), "the bar is gone: {text}");
    assert_eq!(client.job()["status"], json!("running"), "the job goes on");

    // The same without a terminal, by SIGTERM.
    let mut waiting = Going::start(&rig.scratch, &["stream", path, "--wait"]);
    client.ok("block-job-pause", json!({"device": "drive0"}));
    wait_until("the pause is told", || {
        fs::read_to_string(rig.scratch.join("going.err"))
            .is_ok_and(|text| text.contains(": paused; `cordisk job resume"))
    });
    waiting.signal(Signal::TERM);
    let (status, out, err) = waiting.ended(&rig.scratch);
    assert_eq!((status, out.as_str()), (Some(130), ""), "{err}");
    assert!(err.contains(" goes on; ") && !err.contains('\u{1b}'), "{err}");

    // The command joins the paused job, says so, and cancels it.
    let mut shown = Terminal::cordisk(
        &rig.scratch,
        &["stream", path, "--wait", "--cancel-on-interrupt"],
        &[],
        24,
        120,
    );
    shown.wait_for("that it is paused", |screen| {
        screen.contents().contains("paused; `cordisk job resume")
    });
    client.ok("block-job-resume", json!({"device": "drive0"}));
    shown.wait_for("that it moves", |screen| screen.contents().contains("iB to copy"));
    shown.send(b"\x03");
    shown.assert_status(130);
    let text = shown.contents().replace('\n', "");
    assert!(text.contains("cancelled; what was copied stays in the image"), "{text}");
    assert_eq!(client.ok("query-jobs", json!({})), json!([]));
    assert_eq!(client.ok("x-query-last-job", json!({}))["result"], json!("cancelled"));
    client.hang_up();
    disk.umount();
    rig.assert_overlay(&rig.content);
}

/// Protects: a command that waits reports what has happened to the disk, and does not wait for
/// ever.
#[test]
fn who_waits_hears_of_the_end_of_the_daemon() {
    requires!("/dev/fuse", "qemu-img");
    let rig = Rig::new(SIZE);
    for (killed, words) in [
        (true, "the daemon has died before it was complete"),
        (false, "the disk was unmounted before it was complete"),
    ] {
        let disk = start(rig.mount().args(&["--no-resume"]), &rig.scratch);
        let mut client = session(&rig.scratch, &disk);
        let mut waiting =
            Going::start(&rig.scratch, &["stream", "drive0.disk", "--speed", "64K", "--wait"]);
        wait_until("the job runs", || client.ok("query-jobs", json!({})) != json!([]));
        // Its message about the pause shows that it waits.
        client.ok("block-job-pause", json!({"device": "drive0"}));
        wait_until("the pause is told", || {
            fs::read_to_string(rig.scratch.join("going.err"))
                .is_ok_and(|text| text.contains(": paused; "))
        });
        client.hang_up();
        if killed {
            disk.kill9()
        } else {
            disk.umount()
        }
        let (status, out, err) = waiting.ended(&rig.scratch);
        assert_eq!((status, out.as_str()), (Some(1), ""), "{err}");
        assert!(
            err.contains(words) && err.contains("what was copied stays, mount it again"),
            "{err}"
        );
    }
}

/// Protects: an error that ends a job, or pauses it, reaches a command that waits.
#[test]
fn who_waits_hears_of_errors() {
    requires!("/dev/fuse", "qemu-img", "nbdkit", "nbdfuse");
    let scratch = Scratch::new();
    let content = Pattern::new(70, 1).bytes(0, 4 * MIB);
    // The error is at the very start, because a slow machine would otherwise print a line of
    // progress first.
    let base = NbdFile::serve(&scratch, "base.raw", &content, &(64 * KIB..64 * KIB + 512));
    let overlay = scratch.join("overlay.qcow2");
    qemu::create(&overlay, None, "", Some(("base.raw", "raw")));
    let disk = start(Mount::new(&scratch, &overlay).args(&["--no-copy-on-read"]), &scratch);
    base.fail(Fault::Read);
    refused(
        &scratch,
        &["stream", "drive0.disk", "--wait"],
        &["stream of drive0.disk failed: ", "Input/output error"],
    );
    assert!(ok(&scratch, &["status", "drive0.disk"]).contains("last job  stream failed "));
    let mut client = session(&scratch, &disk);
    client.ok("block-stream", json!({"device": "drive0", "on-error": "stop"}));
    client.wait_event("BLOCK_JOB_ERROR");
    client.wait_status("paused");
    assert!(
        ok(&scratch, &["status", "drive0.disk"])
            .contains("paused by an error of reading or writing")
    );
    let mut waiting = Going::start(&scratch, &["stream", "drive0.disk", "--wait"]);
    wait_until("the reason is told", || {
        fs::read_to_string(scratch.join("going.err"))
            .is_ok_and(|text| text.contains("paused by an error of reading or writing"))
    });
    base.repair(Fault::Read);
    ok(&scratch, &["job", "resume", "drive0.disk"]);
    let (status, out, err) = waiting.ended(&scratch);
    assert!(
        status == Some(0) && out.starts_with("stream of drive0.disk completed"),
        "{status:?} {out} {err}"
    );
    client.hang_up();
    disk.umount();
}

/// Protects: a command takes several disks and lists them by name. One that fails does not stop the
/// others, and JSON output is one array.
#[test]
fn a_command_takes_several_disks() {
    requires!("/dev/fuse", "qemu-img");
    let rig = Rig::new(MIB);
    let other = rig.scratch.join("other.qcow2");
    qemu::create(&other, None, "", Some(("base.raw", "raw")));
    let later = start(Mount::named(&rig.scratch, &other, "zz"), &rig.scratch);
    let first = start(Mount::named(&rig.scratch, &rig.overlay, "aa"), &rig.scratch);
    let text = ok(&rig.scratch, &["status", "zz.disk", "aa.disk"]);
    let blocks: Vec<&str> = text.split("\n\n").collect();
    assert!(
        blocks.len() == 2
            && blocks[0].contains("zz.disk  running")
            && blocks[1].contains("aa.disk  running"),
        "{text}"
    );
    let json: Value = serde_json::from_str(&ok(
        &rig.scratch,
        &["status", "zz.disk", "aa.disk", "--output", "json"],
    ))
    .expect("JSON");
    assert_eq!(json.as_array().map(Vec::len), Some(2));
    let list = ok(&rig.scratch, &["ls"]);
    let place = |name: &str| list.find(name).unwrap_or_else(|| panic!("no {name} in {list}"));
    assert!(place("aa.disk") < place("zz.disk"), "by name, not by age: {list}");

    for disk in ["aa.disk", "zz.disk"] {
        let started: Value =
            serde_json::from_str(&ok(&rig.scratch, &["stream", disk, "--speed", "1", "--json"]))
                .expect("JSON");
        assert_eq!(started["type"], json!("stream"), "{started}");
    }
    let paused = cordisk(&rig.scratch, &["job", "pause", "aa.disk", "none.disk", "zz.disk"]);
    assert_eq!((paused.status.code(), paused.stdout.lines().count()), (Some(1), 2), "{paused:?}");
    assert!(
        paused.stderr.starts_with("cordisk: no cordisk disk is mounted at none.disk")
            && paused.stderr.lines().count() == 1,
        "{paused:?}"
    );
    ok(&rig.scratch, &["job", "speed", "aa.disk", "zz.disk", "1.5 MiB/s"]);
    ok(&rig.scratch, &["job", "resume", "aa.disk", "zz.disk"]);
    let lines = ok(&rig.scratch, &["stream", "aa.disk", "--wait", "--json"]);
    let last: Value = serde_json::from_str(lines.lines().last().expect("a line")).expect("JSON");
    assert_eq!((&last["result"], &last["len"]), (&json!("success"), &json!(MIB)), "{lines}");
    let top: Value =
        serde_json::from_str(&ok(&rig.scratch, &["top", "--json", "--interval", "0.1", "aa.disk"]))
            .expect("JSON");
    assert_eq!(top[0]["size"], json!(MIB), "{top}");

    let (first, later) = (first.path().to_owned(), later.path().to_owned());
    ok(&rig.scratch, &["unmount", "aa.disk", "zz.disk"]);
    assert!(mounts::at(&first).is_none() && mounts::at(&later).is_none());
}

/// Protects: a locale without UTF-8 gets ASCII, also on a terminal.
#[test]
fn a_locale_without_utf8_has_ascii() {
    requires!("/dev/fuse", "qemu-img", "terminal");
    let rig = Rig::new(MIB);
    let disk = start(rig.mount(), &rig.scratch);
    let mut command = rig.scratch.cordisk();
    command
        .args(["status", "drive0.disk"])
        .current_dir(rig.scratch.path())
        .env("LC_ALL", "C")
        .env_remove("RUST_LOG");
    let text = run_within(&mut command, LIMIT).stdout;
    assert!(text.is_ascii() && text.starts_with("* ") && text.contains("running"), "{text}");
    let path = disk.path().to_str().expect("UTF-8").to_owned();
    let mut top =
        Terminal::cordisk(&rig.scratch, &["top", &path], &[("LC_ALL", OsStr::new("C"))], 24, 80);
    top.wait_for_text("remote");
    assert!(top.contents().is_ascii(), "{}", top.contents());
    top.send(b"q");
    top.assert_status(0);
    disk.umount();
}

/// Protects: `status` shows all disks and marks dead ones; the clean-up of a dead disk removes
/// everything that its daemon has left.
#[test]
fn all_disks_are_listed_and_a_dead_one_is_taken_away() {
    requires!("/dev/fuse", "qemu-img", "terminal");
    let rig = Rig::new(MIB);
    let other = rig.scratch.join("other.qcow2");
    qemu::create(&other, None, "", Some(("base.raw", "raw")));
    let first = start(rig.mount(), &rig.scratch);
    let second = start(Mount::named(&rig.scratch, &other, "a b"), &rig.scratch);
    let (dead, image) = (second.path().to_owned(), second.image().to_owned());
    let line = |text: &str, path: &Path| {
        let path = path.display().to_string();
        text.lines()
            .find(|line| line.starts_with(&path))
            .unwrap_or_else(|| panic!("no {path} in\n{text}"))
            .to_owned()
    };
    let text = ok(&rig.scratch, &["status"]);
    assert!(text.starts_with("MOUNTPOINT "), "{text}");
    for (disk, image) in [(first.path(), &rig.overlay), (&dead, &image)] {
        let line = line(&text, disk);
        assert!(
            line.contains("  running  ")
                && line.contains("  1 MiB  ")
                && line.ends_with(image.to_str().expect("UTF-8")),
            "{text}"
        );
    }
    second.die();
    let text = ok(&rig.scratch, &["status"]);
    assert!(
        line(&text, &dead).contains("  dead ") && line(&text, first.path()).contains("  running  "),
        "{text}"
    );
    let done = cordisk(&rig.scratch, &["status", "a b.disk"]);
    assert_eq!(done.status.code(), Some(1), "{done:?}");
    assert!(done.stdout.starts_with(&format!("● {}  dead\n", dead.display())), "{done:?}");
    assert!(done.stdout.contains(&format!("cordisk umount '{}'", dead.display())), "{done:?}");
    let done = cordisk(&rig.scratch, &["status", "--json"]);
    let disks: Vec<Value> = serde_json::from_str(&done.stdout).expect("JSON");
    let found = disks.iter().find(|disk| disk["mountpoint"] == json!(dead)).expect("the dead one");
    assert_eq!(found, &json!({ "state": "dead", "mountpoint": dead, "image": image }));
    for command in [&["stream"][..], &["job", "pause"]] {
        refused(
            &rig.scratch,
            &[command, &["a b.disk"]].concat(),
            &["is dead: its daemon was killed", "cordisk umount 'a b.disk'"],
        );
    }

    // On a terminal the line is coloured, unless the environment disables colours.
    let red = |screen: &vt100::Screen| {
        (0..24).any(|row| {
            screen.cell(row, 0).is_some_and(|cell| cell.fgcolor() == vt100::Color::Idx(1))
        })
    };
    let dead_name = dead.to_str().expect("UTF-8");
    let mut shown = Terminal::cordisk(&rig.scratch, &["status", dead_name], &[], 24, 120);
    shown.assert_status(1);
    assert!(shown.look(red), "{}", shown.contents());
    let mut shown = Terminal::cordisk(
        &rig.scratch,
        &["status", dead_name],
        &[("NO_COLOR", OsStr::new("1"))],
        24,
        120,
    );
    shown.assert_status(1);
    assert!(
        !shown.raw().contains(&0x1b) && shown.contents().contains("dead"),
        "{}",
        shown.contents()
    );

    ok(&rig.scratch, &["umount", "a b.disk"]);
    assert!(mounts::at(&dead).is_none() && !dead.exists(), "the mount and what was below it");
    assert!(!ok(&rig.scratch, &["status"]).contains(dead_name));
    first.umount();
}

/// Protects: when `umount` returns, the image is free and consistent; a disk in use stays mounted.
#[test]
fn umount_returns_when_the_image_is_free() {
    requires!("/dev/fuse", "qemu-img");
    let rig = Rig::new(SIZE);
    let mut content = rig.content.clone();
    for round in 0..5 {
        let mut disk = start(rig.mount(), &rig.scratch);
        let mut guest = Guest::new(disk.open(), content, 7);
        guest.write(round * MIB..(round + 1) * MIB);
        refused(
            &rig.scratch,
            &["umount", "drive0.disk"],
            &["drive0.disk is in use and stays mounted", "fuser -vm", "lsof", "--lazy"],
        );
        assert!(disk.is_mounted());
        guest.check_all();
        content = guest.shadow.clone();
        drop(guest);
        let text = ok(&rig.scratch, &["umount", "drive0.disk"]);
        // Without any wait, QEMU takes the locks that the daemon had.
        qemu::assert_clean(&rig.overlay);
        assert_eq!(text, "", "no news are good news");
        disk.assert_clean_end();
        assert!(!disk.path().exists(), "the placeholder");
        assert_same("as QEMU reads it", &qemu::read_all(&rig.overlay), &content);
    }
}

/// Protects: a mountpoint may have any name that the kernel allows. A registry entry is text, so
/// its form of such a name may not exist: `umount` once took that for success, and waited for ever.
#[test]
fn a_mountpoint_of_strange_bytes_is_unmounted() {
    requires!("/dev/fuse", "qemu-img");
    let rig = Rig::new(MIB);
    let strange = OsStr::from_bytes(b"a\n\x1b[31m\xff b");
    let run = |args: &[&OsStr]| {
        run_within(
            rig.scratch.cordisk().args(args).current_dir(rig.scratch.path()).env_remove("RUST_LOG"),
            LIMIT,
        )
    };
    for by_socket in [false, true] {
        let mounted = run(&["mount".as_ref(), rig.overlay.as_os_str(), strange]);
        assert!(mounted.status.success(), "{mounted:?}");
        let status = run(&["status".as_ref(), strange]);
        assert!(
            status.status.success() && status.stdout.contains("a\\n\\u{1b}[31m\u{fffd} b  running"),
            "{status:?}"
        );
        let socket = names_in(&rig.scratch.runtime_dir())
            .into_iter()
            .find(|name| name.extension() == Some("sock".as_ref()));
        let socket = socket.expect("a control socket");
        let done = run(&["umount".as_ref(), if by_socket { socket.as_os_str() } else { strange }]);
        assert!(done.status.success() && done.stderr.is_empty(), "{done:?}");
        assert!(!rig.scratch.join(strange).exists() && !socket.exists(), "by socket: {by_socket}");
        qemu::assert_clean(&rig.overlay);
    }
}

/// Protects: the error that an image is in use names the disk that uses it, if it is a disk of
/// cordisk.
#[test]
fn an_image_in_use_is_where_it_is_mounted() {
    requires!("/dev/fuse", "qemu-img");
    let rig = Rig::new(MIB);
    let disk = start(rig.mount(), &rig.scratch);
    let (image, at) = (rig.overlay.to_str().expect("UTF-8"), disk.path().to_str().expect("UTF-8"));
    let first = format!("it is mounted at {at}; unmount it first: cordisk umount {at}");
    refused(&rig.scratch, &["check", image], &[&first]);
    refused(&rig.scratch, &["mount", image, "other.disk"], &[&first]);
    refused(
        &rig.scratch,
        &["map", image],
        &[&format!("it is mounted at {at}; ask for that: cordisk map {at}")],
    );
    disk.umount();
}

/// Protects: a closed pipe (`| head -1`) ends a command without a message, and without success.
#[test]
fn who_has_read_enough_is_told_nothing() {
    let scratch = Scratch::new();
    let (reader, writer) = std::io::pipe().expect("pipe");
    drop(reader);
    let mut command = scratch.cordisk();
    let output = command
        .args(["completions", "bash"])
        .stdin(Stdio::null())
        .stdout(writer)
        .stderr(Stdio::piped())
        .output()
        .expect("cordisk");
    assert_eq!(
        (output.status.code(), String::from_utf8_lossy(&output.stderr).as_ref()),
        (Some(128 + 13), "")
    );
}

/// Protects: `--lazy` detaches a disk in use, and loses nothing that was written.
#[test]
fn a_lazy_umount_takes_the_disk_away() {
    requires!("/dev/fuse", "qemu-img");
    let rig = Rig::new(MIB);
    let mut disk = start(rig.mount(), &rig.scratch);
    let mut guest = rig.guest(&disk);
    guest.write(0..300 * KIB);
    ok(&rig.scratch, &["umount", "--lazy", "drive0.disk"]);
    rig.assert_overlay(&guest.shadow);
    disk.assert_clean_end();
}

/// Protects: a stopped daemon is distinguished from a dead one, and no command waits for it for
/// ever.
#[test]
fn a_daemon_that_stands_still_is_not_waited_for() {
    requires!("/dev/fuse", "qemu-img");
    let rig = Rig::new(MIB);
    let disk = start(rig.mount(), &rig.scratch);
    let stopped = Stopped::stop(disk.server_pid());
    refused(&rig.scratch, &["status", "drive0.disk"], &["the daemon does not answer (10 s)"]);
    drop(stopped);
    ok(&rig.scratch, &["status", "drive0.disk"]);
    disk.umount();
}

/// Protects: other users see that a disk exists, and cannot control it.
#[test]
fn other_users_see_disks_and_are_refused() {
    requires!("/dev/fuse", "qemu-img", "root", "setpriv");
    let rig = Rig::new(MIB);
    rig.scratch.open_to_all();
    let disk = start(rig.mount(), &rig.scratch);
    // A copy, because other users may not be able to reach the test program.
    let program = rig.scratch.join("cordisk");
    fs::copy(CORDISK, &program).expect("copy");
    fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).expect("chmod");
    let as_nobody = |args: &[&str]| {
        let mut command = Command::new("setpriv");
        command
            .args(["--reuid", "65534", "--regid", "65534", "--clear-groups"])
            .arg(&program)
            .args(args);
        run_within(
            command
                .env(RUNTIME_DIR, rig.scratch.runtime_dir())
                .env_remove("RUST_LOG")
                .current_dir("/"),
            LIMIT,
        )
    };
    let path = disk.path().to_str().expect("UTF-8");
    let listed = as_nobody(&["status"]);
    assert!(
        listed.stdout.lines().any(|line| line.starts_with(path)
            && line.contains("running")
            && line.contains("(another user's)")),
        "{listed:?}"
    );
    for args in [&["status", path][..], &["stream", path], &["job", "cancel", path]] {
        let done = as_nobody(args);
        assert_eq!(done.status.code(), Some(1), "{done:?}");
        assert!(
            done.stderr.contains("permission denied: the disk belongs to another user"),
            "{done:?}"
        );
    }
    let done = as_nobody(&["umount", path]);
    assert!(done.status.code() == Some(1) && done.stderr.lines().count() == 1, "{done:?}");
    assert!(
        done.stderr.contains("permission denied: the disk belongs to another user"),
        "{done:?}"
    );
    assert!(disk.is_mounted());
    ok(&rig.scratch, &["status", path]);
    disk.umount();
}

/// Protects: the next daemon that starts removes what a killed one has left in the runtime
/// directory, and nothing else.
#[test]
fn entries_of_the_dead_go_with_the_next_daemon() {
    requires!("/dev/fuse", "qemu-img");
    let rig = Rig::new(MIB);
    let disk = start(rig.mount(), &rig.scratch);
    let left = |suffix: &str| {
        rig.scratch.runtime_dir().join(format!("{}.{suffix}", disk.pid().as_raw_nonzero()))
    };
    let (json, sock) = (left("json"), left("sock"));
    let other = rig.scratch.runtime_dir().join("notes.json");
    fs::write(&other, "mine").expect("file");
    disk.kill9();
    assert!(json.exists() && sock.exists());
    let disk = start(rig.mount(), &rig.scratch);
    assert!(!json.exists() && !sock.exists() && other.exists());
    disk.umount();
    assert_eq!(names_in(&rig.scratch.runtime_dir()), [other]);
}

/// Protects: a runtime directory that other users can write to is not used. The disk is served
/// nevertheless, and can still be unmounted.
#[test]
fn a_disk_without_an_entry_is_served() {
    requires!("/dev/fuse", "qemu-img");
    let rig = Rig::new(MIB);
    fs::set_permissions(rig.scratch.runtime_dir(), fs::Permissions::from_mode(0o777))
        .expect("chmod");
    let mut disk = rig.mount().start();
    wait_until("the warning", || disk.log().contains("others may write to it; chmod go-w"));
    assert!(
        disk.log().contains("only `umount` finds this disk; mount it with --qmp to control it"),
        "{}",
        disk.log()
    );
    assert_eq!(names_in(&rig.scratch.runtime_dir()), Vec::<PathBuf>::new());
    assert_same("served", &disk.read_all(), &rig.content);
    refused(
        &rig.scratch,
        &["status", "drive0.disk"],
        &["has no entry that this user can read", "name its control socket"],
    );
    let done = cordisk(&rig.scratch, &["umount", "drive0.disk"]);
    assert!(
        done.status.success() && done.stderr.contains("is unmounted; its daemon is not known here"),
        "{done:?}"
    );
    disk.assert_clean_end();
}
