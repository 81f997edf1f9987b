//! The log of a daemon in the background, and the errors that `status` reports.

use std::fs;
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixDatagram;
use std::process::{Command, Stdio};
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};

use crate::support::{
    CLUSTER, CORDISK, MIB, Mount, Pattern, Rig, Scratch, errno, qemu, run_ok, run_within,
    wait_until,
};

const LIMIT: Duration = Duration::from_secs(60);

/// A disk in the background: unmounted when dropped.
struct Background<'a> {
    scratch: &'a Scratch,
    name: &'static str,
}

impl<'a> Background<'a> {
    fn mount(
        scratch: &'a Scratch,
        image: &str,
        name: &'static str,
        args: &[&str],
    ) -> Background<'a> {
        let mut command = scratch.cordisk();
        command
            .env_remove("RUST_LOG")
            .arg("mount")
            .args(args)
            .arg(scratch.join(image))
            .arg(scratch.join(name));
        let done = run_within(&mut command, LIMIT);
        assert!(done.status.success(), "{done:?}");
        Background { scratch, name }
    }

    fn status(&self) -> Value {
        let text = run_ok(
            self.scratch.cordisk().args(["status", "--json"]).arg(self.scratch.join(self.name)),
        );
        let mut disks: Value = serde_json::from_str(&text).expect("JSON");
        disks[0].take()
    }

    fn status_text(&self) -> String {
        run_ok(self.scratch.cordisk().arg("status").arg(self.scratch.join(self.name)))
    }

    fn umount(self) {
        run_ok(self.scratch.cordisk().arg("umount").arg(self.scratch.join(self.name)));
        std::mem::forget(self);
    }
}

impl Drop for Background<'_> {
    fn drop(&mut self) {
        let _ = self
            .scratch
            .cordisk()
            .args(["umount", "-l"])
            .arg(self.scratch.join(self.name))
            .stderr(Stdio::null())
            .status();
    }
}

/// Makes an overlay above a qcow2 base whose last clusters are missing, so that reads of its end
/// fail.
fn damaged(scratch: &Scratch) {
    scratch.raw("plain.raw", 2 * MIB, Pattern::new(5, 1));
    run_ok(
        Command::new("qemu-img")
            .args(["convert", "-O", "qcow2"])
            .arg(scratch.join("plain.raw"))
            .arg(scratch.join("base.qcow2")),
    );
    qemu::create(&scratch.join("vm.qcow2"), None, "", Some(("base.qcow2", "qcow2")));
    fs::File::options()
        .write(true)
        .open(scratch.join("base.qcow2"))
        .and_then(|file| file.set_len(1_500_000))
        .expect("truncate");
}

/// Protects: a daemon in the background records errors in its log file and in `status`, with the
/// file and the offset. SIGHUP makes it reopen the log file, inside the sandbox. The end is logged
/// as well.
#[test]
fn a_daemon_in_the_background_leaves_a_trace() {
    requires!("/dev/fuse", "qemu-img");
    let scratch = Scratch::new();
    damaged(&scratch);
    let log = scratch.join("vm.log");
    let disk = Background::mount(
        &scratch,
        "vm.qcow2",
        "vm.raw",
        &["--log", log.to_str().expect("UTF-8"), "--sandbox", "require"],
    );
    let file = fs::File::open(scratch.join("vm.raw")).expect("open");
    assert_eq!(errno(file.read_exact_at(&mut [0; 512], 31 * CLUSTER)), rustix::io::Errno::IO);
    let failure = disk.status()["last-error"].take();
    assert_eq!(
        (&failure["operation"], &failure["offset"].as_u64().map(|at| at / CLUSTER)),
        (&json!("read"), &Some(31)),
        "{failure}"
    );
    assert!(
        failure["message"].as_str().is_some_and(|text| text.contains("base.qcow2")),
        "{failure}"
    );
    let text = disk.status_text();
    let line = text
        .lines()
        .find(|line| line.trim_start().starts_with("error "))
        .unwrap_or_else(|| panic!("{text}"));
    assert!(line.contains("read of ") && line.contains("base.qcow2"), "{line}");
    assert!(text.contains(&format!("log {}", log.display())), "{text}");

    let read = |name: &str| fs::read_to_string(scratch.join(name)).unwrap_or_default();
    wait_until("the error is in the log", || read("vm.log").contains("base.qcow2: "));
    assert!(read("vm.log").contains("mounted "), "{}", read("vm.log"));
    fs::rename(&log, scratch.join("vm.log.1")).expect("rename");
    let pid = disk.status()["pid"]
        .as_u64()
        .and_then(|pid| Pid::from_raw(i32::try_from(pid).ok()?))
        .expect("a pid");
    kill_process(pid, Signal::HUP).expect("SIGHUP");
    wait_until("the log is opened anew", || read("vm.log").contains("goes on in a new file"));
    drop(file);
    disk.umount();
    assert!(!read("vm.log.1").contains("goes on"), "{}", read("vm.log.1"));
}

/// Protects: a log file that cannot be opened is an error before anything is mounted; a link to
/// another file is not written.
#[test]
fn a_log_that_cannot_be_opened_is_refused() {
    requires!("/dev/fuse", "qemu-img");
    let rig = Rig::new(MIB);
    let target = rig.scratch.write("precious", b"precious");
    std::os::unix::fs::symlink(&target, rig.scratch.join("link")).expect("symlink");
    for (name, why) in
        [("none/log", "No such file or directory"), ("link", "symbolic link"), ("", "directory")]
    {
        for foreground in [&[][..], &["-f"]] {
            let mut command = rig.scratch.cordisk();
            command
                .arg("mount")
                .args(foreground)
                .arg("--log")
                .arg(rig.scratch.join(name))
                .arg(&rig.overlay)
                .arg(rig.scratch.join("m"));
            let done = run_within(&mut command, LIMIT);
            assert_eq!((done.status.code(), done.stderr.lines().count()), (Some(1), 1), "{done:?}");
            assert!(done.stderr.contains("--log ") && done.stderr.contains(why), "{done:?}");
            assert!(!rig.scratch.join("m").exists());
        }
    }
    assert_eq!(fs::read(&target).expect("read"), b"precious");
}

/// Runs `script` in a mount namespace where `/run` has only what the script puts there; `$s` is the
/// scratch directory, `$c` the program.
fn with_empty_run(scratch: &Scratch, script: &str) -> crate::support::Finished {
    let prepare = "set -eu; s=$1; c=$2; trap '$c umount -l \"$s/vm.raw\" 2>/dev/null || true' EXIT; \
                   findmnt -rn -o TARGET | grep /cordisk-test- | tac | while read -r m; do umount -l \"$m\" || true; done; \
                   mount -t tmpfs tmpfs /run; cd $s; ";
    let mut command = scratch.cordisk();
    let mut inside = Command::new("unshare");
    inside
        .env_remove("RUST_LOG")
        .envs(command.get_envs().filter_map(|(name, value)| Some((name, value?))));
    inside
        .args([
            "--mount",
            "--propagation",
            "private",
            "sh",
            "-c",
            &format!("{prepare}{script}"),
            "sh",
        ])
        .arg(scratch.path())
        .arg(CORDISK);
    command = inside;
    run_within(&mut command, LIMIT)
}

/// Protects: if there is a journal, log lines go there from inside the sandbox, with their level
/// and the disk that they concern.
#[test]
fn a_daemon_in_the_background_writes_to_the_journal() {
    requires!("/dev/fuse", "qemu-img", "root", "unshare");
    let scratch = Scratch::new();
    damaged(&scratch);
    let journal = UnixDatagram::bind(scratch.join("journal")).expect("bind");
    journal.set_nonblocking(true).expect("nonblocking");
    let done = with_empty_run(
        &scratch,
        "mkdir -p /run/systemd/journal; ln -s $s/journal /run/systemd/journal/socket; \
         $c mount --sandbox require vm.qcow2 vm.raw; dd if=vm.raw of=out bs=4k skip=508 count=1 2>/dev/null && exit 9; \
         $c status vm.raw; $c umount vm.raw",
    );
    assert!(done.status.success() && done.stdout.contains(", log journal"), "{done:?}");
    assert!(!done.stderr.contains("no journal"), "{done:?}");
    let mut lines = Vec::new();
    let mut buf = vec![0; 64 << 10];
    while let Ok(len) = journal.recv(&mut buf) {
        lines.push(String::from_utf8_lossy(&buf[..len]).into_owned());
    }
    let mountpoint = scratch.join("vm.raw");
    let about = format!("CORDISK_MOUNTPOINT={}\n", mountpoint.display());
    let find = |priority: &str, text: &str| {
        let found = lines.iter().find(|line| {
            line.starts_with(&format!("PRIORITY={priority}\n")) && line.contains(text)
        });
        assert!(found.is_some_and(|line| line.contains(&about)), "{text}: {lines:?}");
    };
    find("6", "mounted ");
    find("3", "base.qcow2: ");
}

/// Protects: a restarted log daemon receives the lines from then on, although the process in the
/// sandbox cannot connect to a socket itself.
#[test]
fn a_journal_that_was_restarted_goes_on() {
    requires!("/dev/fuse", "qemu-img", "root", "unshare");
    let scratch = Scratch::new();
    damaged(&scratch);
    let path = scratch.join("journal");
    let journal = UnixDatagram::bind(&path).expect("bind");
    // The script creates a file when the disk is mounted, and continues when the socket is a new
    // one.
    let script = "mkdir -p /run/systemd/journal; ln -s $s/journal /run/systemd/journal/socket; \
                  $c mount --sandbox require --user 65534:65534 --allow-other vm.qcow2 vm.raw; touch mounted; \
                  while ! test -e again; do sleep 0.05; done; \
                  dd if=vm.raw of=out bs=4k skip=508 count=1 2>/dev/null && exit 9; $c umount vm.raw";
    scratch.open_to_all();
    for name in ["plain.raw", "base.qcow2"] {
        std::os::unix::fs::chown(scratch.join(name), Some(65534), Some(65534)).expect("chown");
    }
    let (done, second) = std::thread::scope(|scope| {
        let script = scope.spawn(|| with_empty_run(&scratch, script));
        wait_until("it is mounted", || scratch.join("mounted").exists() || script.is_finished());
        let text = received(&journal);
        assert!(text.contains("mounted "), "{text}");
        drop(journal);
        fs::remove_file(&path).expect("remove");
        let second = UnixDatagram::bind(&path).expect("bind again");
        scratch.write("again", b"");
        (script.join().expect("script"), second)
    });
    assert!(done.status.success(), "{done:?}");
    let text = received(&second);
    assert!(text.contains("base.qcow2: ") && text.contains("is closed"), "{text}");
    assert!(!text.contains("lines of the log were lost"), "{text}");
}

/// Returns everything that a socket has received.
fn received(socket: &UnixDatagram) -> String {
    socket.set_nonblocking(true).expect("nonblocking");
    let (mut text, mut buf) = (String::new(), vec![0; 64 << 10]);
    while let Ok(len) = socket.recv(&mut buf) {
        text += &String::from_utf8_lossy(&buf[..len]);
    }
    text
}

/// Protects: without a journal and a syslog the disk is mounted nevertheless, and the command says
/// how to get a log.
#[test]
fn a_machine_without_a_log_is_no_error() {
    requires!("/dev/fuse", "qemu-img", "root", "unshare");
    let scratch = Scratch::new();
    damaged(&scratch);
    let done = with_empty_run(
        &scratch,
        "test -S /dev/log && { echo has syslog; exit 0; }; $c mount vm.qcow2 vm.raw; $c status vm.raw; $c umount vm.raw",
    );
    assert!(done.status.success(), "{done:?}");
    if !done.stdout.contains("has syslog") {
        assert!(
            done.stderr.contains("note: there is no journal") && done.stderr.lines().count() == 1,
            "{done:?}"
        );
        assert!(done.stdout.contains("running") && !done.stdout.contains(", log "), "{done:?}");
    }
}

/// Protects: `status` reports what users ask next: the port behind `--metrics 0`, files that were
/// removed, suspended copy-on-read, a stream that waits.
#[test]
fn status_says_what_is_out_of_the_ordinary() {
    requires!("/dev/fuse", "qemu-img");
    let rig = Rig::new(4 * MIB);
    let disk = rig.mount().qmp().args(&["--stream", "--speed", "1"]).start_settled();
    disk.umount();

    let disk = rig
        .mount()
        .qmp()
        .args(&["--metrics", "0", "--no-resume", "--reserve", "1000000G"])
        .start_settled();
    let address = crate::support::metrics::address(&disk).to_string();
    crate::support::read_at(&disk.open(), 3 * MIB, 512);
    let ask = || disk.client().ok("x-query-status", json!({}));
    let status = ask();
    assert_eq!(status["metrics"], address.as_str());
    assert_eq!(status["copy-on-read-paused"], "reserve", "{status}");
    assert!(
        status["last-warning"]["message"]
            .as_str()
            .is_some_and(|text| text.contains("copy-on-read stops")),
        "{status}"
    );
    assert_eq!(status["stream-kept-back"]["len"].as_u64(), Some(4 * MIB), "{status}");
    assert_eq!(
        (&status["image-deleted"], &status["chain"][0]["deleted"]),
        (&json!(false), &json!(false))
    );
    fs::remove_file(&rig.base).expect("remove");
    fs::rename(&rig.overlay, rig.scratch.join("elsewhere")).expect("rename");
    let status = ask();
    assert_eq!(
        (&status["image-deleted"], &status["chain"][0]["deleted"]),
        (&json!(false), &json!(true)),
        "renamed is not deleted"
    );
    fs::remove_file(rig.scratch.join("elsewhere")).expect("remove");
    assert_eq!(ask()["image-deleted"], true);
    let text = run_ok(rig.scratch.cordisk().arg("status").arg(disk.path()));
    for part in [
        "(deleted), 4 MiB",
        ".raw (deleted) (raw, ",
        "too little free space",
        "goes on at a mount without --no-resume",
        &address,
    ] {
        assert!(text.contains(part), "{part}\n{text}");
    }
    // A new stream of this test replaces the note.
    disk.client().ok("block-stream", json!({ "device": "drive0", "speed": 1 }));
    assert_eq!(ask().get("stream-kept-back"), None);
    disk.umount();
}

/// Protects: the error of a failed stream is reported with the file and the offset, in `status` and
/// by `stream --wait`; the event has QEMU's text.
#[test]
fn a_stream_that_failed_says_where() {
    requires!("/dev/fuse", "qemu-img");
    let scratch = Scratch::new();
    damaged(&scratch);
    let disk = Mount::new(&scratch, &scratch.join("vm.qcow2")).qmp().start();
    let done = run_within(scratch.cordisk().args(["stream", "--wait"]).arg(disk.path()), LIMIT);
    assert_eq!(done.status.code(), Some(1), "{done:?}");
    let last = done.stderr.lines().last().unwrap_or_default();
    assert!(last.contains("failed: bytes ") && last.contains("base.qcow2: "), "{done:?}");
    let job = disk.client().ok("x-query-status", json!({}))["last-job"].take();
    assert!(
        job["error-detail"].as_str().is_some_and(|text| text.contains("base.qcow2: ")),
        "{job}"
    );
    let text = run_ok(scratch.cordisk().arg("status").arg(disk.path()));
    assert!(text.contains("stream failed ") && text.contains("base.qcow2: "), "{text}");
    disk.umount();
}
