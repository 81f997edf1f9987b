//! Transcripts in files (`tests/data/qmp/*.txt`), run against `cordisk` and, where it is installed,
//! against `qemu-storage-daemon` on equal images. The same lines check cordisk and QEMU.
//!
//! A file is a sequence of lines:
//!
//! ```text
//! # text                 a comment
//! disk NAME              first line: `base` (overlay over base.raw), `alone` (no backing file),
//!                        `chain` (overlay over mid.qcow2 over base.raw), `read-only` (like base,
//!                        opened for reading)
//! connect                a new connection, which replaces the one before
//! -> BYTES               sends these bytes without a newline; `<<0A FF>>` are bytes in hex,
//!                        `<<5B*1025>>` repeats a byte
//! ?> JSON                repeats this request until the reply is the next line (up to 20 s)
//! <- PATTERN             the next message must match
//! <~ PATTERN             consecutive lines: replies come in this order, and so do events, but the
//!                        two may interleave
//! <# TEXT                the last message contained this text, byte for byte
//! <- EOF                 the connection ends
//! silence                no message arrives for a moment
//! after backing NAME     at the end, the overlay names this backing file (`none`: no file)
//! [cordisk] LINE         only for cordisk, [qemu] only for QEMU: an intended difference; the
//!                        comment above gives the reason
//! ```
//!
//! A pattern is JSON, compared by structure. `"*"` is any value, a member `"..."` allows any
//! further members, timestamps are arbitrary. `status ID STATUS` and `event NAME DATA` are short
//! forms of events. `${DEVICE}` is the name of the disk, `${NODE}` the overlay's node name.

use std::collections::VecDeque;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};

use crate::support::{Daemon, MIB, Mount, Pattern, QmpClient, Scratch, poll, qemu};

const PATIENCE: Duration = Duration::from_secs(20);
/// Long enough for an unexpected reply to arrive.
const SILENCE: Duration = Duration::from_millis(60);

/// Protects: requests, replies, errors and events are those that clients know from QEMU.
#[test]
fn transcripts_hold_for_cordisk() {
    requires!("/dev/fuse", "qemu-img");
    run_all(Target::Cordisk);
}

/// Protects: the transcripts themselves: QEMU must meet the same expectations.
#[test]
fn transcripts_hold_for_qemu() {
    requires!("qemu-img", "qemu-storage-daemon");
    // QEMU's messages change between releases, and a distribution has only one release. So a QEMU
    // of another version is skipped instead of failing.
    let version = crate::support::run_ok(Command::new("qemu-storage-daemon").arg("--version"));
    if !version.contains("version 10.") {
        eprintln!("skipped: the transcripts are those of QEMU 10, this is {version}");
        return;
    }
    run_all(Target::Qemu);
}

/// Runs every file, also after a failure.
fn run_all(target: Target) {
    let run =
        |file: &PathBuf| std::panic::catch_unwind(|| Transcript::load(file).run(target)).is_err();
    let failed: Vec<PathBuf> = files().into_iter().filter(run).collect();
    assert!(failed.is_empty(), "these did not hold for {target:?}: {failed:?}");
}

fn files() -> Vec<PathBuf> {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/qmp");
    let entries =
        fs::read_dir(&dir).expect("tests/data/qmp").map(|entry| entry.expect("entry").path());
    let mut files: Vec<PathBuf> = entries
        .filter(|path| path.extension().is_some_and(|extension| extension == "txt"))
        .collect();
    files.sort();
    assert!(!files.is_empty(), "no transcripts in {}", dir.display());
    files
}

#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Target {
    Cordisk,
    Qemu,
}

impl Target {
    fn device(self) -> &'static str {
        match self {
            Target::Cordisk => "drive0",
            Target::Qemu => "overlay", // qemu-storage-daemon has nodes only, no devices
        }
    }
}

#[derive(Debug)]
enum Step {
    Connect,
    Send(String),
    Until(String),
    Expect(String),
    Interleaved(String),
    Contains(String),
    Silence,
    AfterBacking(String),
}

struct Line {
    number: usize,
    only: Option<Target>,
    step: Step,
}

struct Transcript {
    name: String,
    disk: String,
    lines: Vec<Line>,
}

impl Transcript {
    fn load(path: &Path) -> Transcript {
        let name = path.file_name().expect("name").to_string_lossy().into_owned();
        let text = fs::read_to_string(path).unwrap_or_else(|error| panic!("{name}: {error}"));
        let (mut disk, mut lines, mut reason) = (None, Vec::new(), false);
        for (index, line) in text.lines().enumerate() {
            let at = format!("{name}:{}", index + 1);
            let (only, rest) = match (line.strip_prefix("[cordisk] "), line.strip_prefix("[qemu] "))
            {
                (Some(rest), _) => (Some(Target::Cordisk), rest),
                (_, Some(rest)) => (Some(Target::Qemu), rest),
                _ => (None, line),
            };
            assert!(only.is_none() || reason, "{at}: what differs needs a reason right above");
            if rest.is_empty() || rest.starts_with('#') {
                reason = rest.starts_with('#');
                continue;
            }
            reason = only.is_some();
            let text = |prefix: &str| rest.strip_prefix(prefix).map(str::to_owned);
            let step = if let Some(name) = text("disk ") {
                disk = Some(name);
                continue;
            } else if rest == "connect" {
                Step::Connect
            } else if rest == "silence" {
                Step::Silence
            } else if let Some(text) = text("-> ") {
                Step::Send(text)
            } else if let Some(text) = text("?> ") {
                Step::Until(text)
            } else if let Some(text) = text("<- ") {
                Step::Expect(text)
            } else if let Some(text) = text("<~ ") {
                Step::Interleaved(text)
            } else if let Some(text) = text("<# ") {
                Step::Contains(text)
            } else if let Some(text) = text("after backing ") {
                Step::AfterBacking(text)
            } else {
                panic!("{at}: what is {rest:?}?")
            };
            lines.push(Line { number: index + 1, only, step });
        }
        Transcript {
            disk: disk.unwrap_or_else(|| panic!("{name} says nothing of its disk")),
            name,
            lines,
        }
    }

    fn run(&self, target: Target) {
        eprintln!("{} with {target:?}", self.name);
        let scratch = Scratch::new();
        let overlay = make_images(&scratch, &self.disk);
        let server = Server::start(&scratch, target, &self.disk);
        let mut client: Option<QmpClient> = None;
        let mut after = None;
        let mut steps: VecDeque<&Line> =
            self.lines.iter().filter(|line| line.only.is_none_or(|only| only == target)).collect();
        while let Some(line) = steps.pop_front() {
            let at = format!("{}:{} with {target:?}", self.name, line.number);
            eprintln!("{at}");
            let filled = |text: &str| {
                text.replace("${DEVICE}", target.device()).replace("${NODE}", "overlay")
            };
            if matches!(line.step, Step::Connect) {
                drop(client.take());
                client = Some(QmpClient::greeted(server.socket()));
                continue;
            }
            let client = client.as_mut().unwrap_or_else(|| panic!("{at}: not connected"));
            match &line.step {
                Step::Connect => unreachable!("done above"),
                Step::Send(text) => client.send_bytes(&bytes(&filled(text))),
                Step::Until(text) => {
                    let Some(Line { step: Step::Expect(want), .. }) = steps.pop_front() else {
                        panic!("{at}: no line to wait for")
                    };
                    ask_until(client, &filled(text), &pattern(&filled(want), &at), &at);
                }
                Step::Expect(text) if text == "EOF" => {
                    let more = client.message(PATIENCE);
                    assert_eq!(more, None, "{at}: the connection had to end");
                }
                Step::Expect(text) => {
                    let want = pattern(&filled(text), &at);
                    let got = client
                        .message(PATIENCE)
                        .unwrap_or_else(|| panic!("{at}: the connection ended, expected {want}"));
                    assert!(fits(&want, &got), "{at}:\nexpected {want}\n     got {got}");
                }
                Step::Interleaved(text) => {
                    let mut group = vec![pattern(&filled(text), &at)];
                    while let Some(Line { step: Step::Interleaved(text), .. }) = steps.front() {
                        group.push(pattern(&filled(text), &at));
                        steps.pop_front();
                    }
                    expect_interleaved(client, group, &at);
                }
                Step::Contains(text) => {
                    let line = &client.line;
                    assert!(line.contains(text), "{at}: {text} in {line}");
                }
                Step::Silence => expect_silence(client, &at),
                Step::AfterBacking(name) => after = Some((at, name.as_str())),
            }
        }
        if let Some(client) = &mut client {
            expect_silence(client, &format!("the end of {} with {target:?}", self.name));
        }
        drop(client);
        server.stop();
        assert!(overlay.exists(), "{}", self.name);
        if let Some((at, name)) = after {
            let want = if name == "none" { None } else { Some(json!(name)) };
            assert_eq!(backing_name(&overlay), want, "{at}");
        }
    }
}

/// Returns the backing file's name in the header; the file need not exist.
fn backing_name(overlay: &Path) -> Option<Value> {
    let backing = crate::support::header::Header::load(overlay).backing;
    backing.map(|name| json!(String::from_utf8(name).expect("UTF-8 name")))
}

fn expect_silence(client: &mut QmpClient, at: &str) {
    let heard = client.trace.len();
    client.listen(SILENCE);
    let more = &client.trace[heard..];
    assert!(more.is_empty(), "{at}: nothing more was due: {more:?}");
}

fn ask_until(client: &mut QmpClient, request: &str, want: &Value, at: &str) {
    let start = Instant::now();
    loop {
        client.send_raw(request);
        let got = client.message(PATIENCE).unwrap_or_else(|| panic!("{at}: the connection ended"));
        if fits(want, &got) {
            return;
        }
        assert!(got.get("event").is_none(), "{at}: an event came meanwhile: {got}");
        assert!(start.elapsed() < PATIENCE, "{at}: waited in vain for {want}\nlast reply {got}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

fn expect_interleaved(client: &mut QmpClient, group: Vec<Value>, at: &str) {
    let (mut events, mut replies): (VecDeque<Value>, VecDeque<Value>) =
        group.into_iter().partition(|want| want.get("event").is_some());
    while !(events.is_empty() && replies.is_empty()) {
        let got = client.message(PATIENCE).unwrap_or_else(|| {
            panic!("{at}: the connection ended, expected {events:?} {replies:?}")
        });
        let queue = if got.get("event").is_some() { &mut events } else { &mut replies };
        let want = queue.pop_front().unwrap_or_else(|| panic!("{at}: not expected at all: {got}"));
        assert!(fits(&want, &got), "{at}:\nexpected {want}\n     got {got}");
    }
}

/// Returns the message that a line of the file stands for.
fn pattern(text: &str, at: &str) -> Value {
    let words: Vec<&str> = text.splitn(3, ' ').collect();
    match words[..] {
        ["status", id, status] => {
            json!({"event": "JOB_STATUS_CHANGE", "data": {"id": id, "status": status}, "timestamp": "*"})
        }
        ["event", name, data] => {
            let data: Value =
                serde_json::from_str(data).unwrap_or_else(|error| panic!("{at}: {error}"));
            json!({"event": name, "data": data, "timestamp": "*"})
        }
        _ => serde_json::from_str(text).unwrap_or_else(|error| panic!("{at}: {error}: {text}")),
    }
}

fn fits(want: &Value, got: &Value) -> bool {
    match (want, got) {
        (Value::String(any), _) if any == "*" => true,
        (Value::Object(want), Value::Object(got)) => {
            let open = want.contains_key("...");
            let wanted = want.iter().filter(|(key, _)| *key != "...");
            wanted.clone().all(|(key, want)| got.get(key).is_some_and(|got| fits(want, got)))
                && (open || got.keys().all(|key| want.contains_key(key)))
        }
        (Value::Array(want), Value::Array(got)) => {
            want.len() == got.len() && want.iter().zip(got).all(|(want, got)| fits(want, got))
        }
        _ => want == got,
    }
}

/// Converts `<<0A FF>>` and `<<5B*1025>>` to bytes.
fn bytes(text: &str) -> Vec<u8> {
    let mut bytes = Vec::new();
    let mut rest = text;
    while let Some((before, after)) = rest.split_once("<<") {
        let (hex, behind) = after.split_once(">>").expect(">> after <<");
        bytes.extend_from_slice(before.as_bytes());
        for word in hex.split_whitespace() {
            let (byte, count) = word.split_once('*').unwrap_or((word, "1"));
            let byte = u8::from_str_radix(byte, 16).expect("hex");
            bytes.extend(std::iter::repeat_n(byte, count.parse().expect("a count")));
        }
        rest = behind;
    }
    bytes.extend_from_slice(rest.as_bytes());
    bytes
}

const SIZE: u64 = 4 * MIB;

fn make_images(scratch: &Scratch, disk: &str) -> PathBuf {
    let overlay = scratch.join("overlay.qcow2");
    if disk == "alone" {
        qemu::create(&overlay, Some(SIZE), "", None);
        return overlay;
    }
    scratch.raw("base.raw", SIZE, Pattern::new(60, 1));
    if disk == "chain" {
        let mid = scratch.join("mid.qcow2");
        qemu::create(&mid, None, "", Some(("base.raw", "raw")));
        qemu::write_pattern(&mid, Pattern::new(60, 2), &[MIB..2 * MIB]);
        qemu::create(&overlay, None, "", Some(("mid.qcow2", "qcow2")));
        std::os::unix::fs::symlink("mid.qcow2", scratch.join("link.qcow2")).expect("symlink");
    } else {
        assert!(["base", "read-only"].contains(&disk), "which disk is {disk}?");
        qemu::create(&overlay, None, "", Some(("base.raw", "raw")));
    }
    overlay
}

/// The program under test.
enum Server {
    Cordisk(Box<Daemon>),
    Qemu(Qsd),
}

impl Server {
    fn start(scratch: &Scratch, target: Target, disk: &str) -> Server {
        match target {
            Target::Cordisk => {
                let mount = Mount::new(scratch, &scratch.join("overlay.qcow2")).qmp();
                let mount = if disk == "read-only" { mount.args(&["--read-only"]) } else { mount };
                Server::Cordisk(Box::new(mount.start()))
            }
            Target::Qemu => Server::Qemu(Qsd::start(scratch, disk)),
        }
    }

    fn socket(&self) -> &Path {
        match self {
            Server::Cordisk(disk) => disk.socket(),
            Server::Qemu(qsd) => &qsd.socket,
        }
    }

    fn stop(self) {
        match self {
            Server::Cordisk(mut disk) => {
                if disk.ended_within(Duration::ZERO).is_none() && disk.is_mounted() {
                    disk.signal(Signal::TERM);
                }
                disk.assert_clean_end();
            }
            Server::Qemu(mut qsd) => qsd.end(),
        }
    }
}

/// A `qemu-storage-daemon` whose nodes have the same names as cordisk's.
struct Qsd {
    child: Child,
    socket: PathBuf,
}

impl Qsd {
    fn start(scratch: &Scratch, disk: &str) -> Qsd {
        let mut command = Command::new("qemu-storage-daemon");
        command.current_dir(scratch.path());
        let raw = |node: &str| {
            format!(
                "driver=raw,node-name={node},read-only=on,file.driver=file,file.filename=base.raw"
            )
        };
        let overlay = "driver=qcow2,node-name=overlay,file.driver=file,file.filename=overlay.qcow2";
        match disk {
            "alone" => command.args(["--blockdev", overlay]),
            "base" => command.args([
                "--blockdev",
                &raw("backing-1"),
                "--blockdev",
                &format!("{overlay},backing=backing-1"),
            ]),
            "read-only" => command.args([
                "--blockdev",
                &raw("backing-1"),
                "--blockdev",
                &format!("{overlay},backing=backing-1,read-only=on,file.read-only=on"),
            ]),
            _ => {
                let mid =
                    "driver=qcow2,node-name=backing-1,read-only=on,file.driver=file,file.filename=mid.qcow2,backing=backing-2".to_owned();
                command.args([
                    "--blockdev",
                    &raw("backing-2"),
                    "--blockdev",
                    &mid,
                    "--blockdev",
                    &format!("{overlay},backing=backing-1"),
                ])
            }
        };
        let socket = scratch.join("qsd.sock");
        let chardev = format!("socket,id=qmp,path={},server=on,wait=off", socket.display());
        // It writes the pidfile when everything is set up. A client that connects before that
        // receives the greeting twice.
        let ready = scratch.join("qsd.pid");
        command.args(["--chardev", &chardev, "--monitor", "chardev=qmp", "--pidfile"]).arg(&ready);
        let child = command.stdin(Stdio::null()).spawn().expect("qemu-storage-daemon");
        let qsd = Qsd { child, socket };
        assert!(
            poll(PATIENCE, || ready.exists().then_some(())).is_some(),
            "qemu-storage-daemon is not ready"
        );
        qsd
    }

    fn end(&mut self) {
        if self.child.try_wait().expect("wait").is_none() {
            let pid = i32::try_from(self.child.id()).ok().and_then(Pid::from_raw).expect("a pid");
            kill_process(pid, Signal::TERM).expect("signal");
        }
        let status = poll(PATIENCE, || self.child.try_wait().expect("wait"));
        assert!(status.is_some_and(|status| status.success()), "qemu-storage-daemon: {status:?}");
    }
}

impl Drop for Qsd {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
