//! Sessions over a real socket with a disk on a simulated host. The expected lines were copied from
//! sessions with qemu-storage-daemon.

use std::fs::{self, Permissions};
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::Command;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use crossbeam_channel::Receiver;
use serde_json::{Value, json};
use tempfile::TempDir;

use super::call::{LogFacts, Target, Warning};
use super::schema::tests::{check_event, check_return};
use super::server::Server;
use engine::chain::Chain;
use engine::disk::Disk;
use engine::job::{JobSpec, Jobs};
use engine::stream::{Priority, STREAM_CHUNK, Streams};
use host::storage::WriteKind;
use qcow2::format::{BackingFormat, NewImage};
use qcow2::image::{Image, ImageReader};
use sim::{Action, Fault, Operation, Repeat, SimStorage};

const CHUNK: u64 = STREAM_CHUNK;
const SIZE: u64 = 8 * CHUNK;

struct Fixture {
    server: Option<Server>,
    disk: Arc<Disk>,
    jobs: Jobs,
    quit: Receiver<()>,
    host: Host,
    path: PathBuf,
    _dir: TempDir,
}

/// The files of a disk: `/overlay.qcow2` on `/middle.qcow2` on `/base.raw`. All data is in the
/// base.
struct Host {
    overlay: Arc<SimStorage>,
    base: Arc<SimStorage>,
}

/// Options with which the disk is opened.
#[derive(Clone, Copy, Eq, PartialEq)]
enum Use {
    /// Reads do not copy up.
    Plain,
    CopyOnRead,
    ReadOnly,
}

fn new_image(below: &str, format: BackingFormat) -> Arc<SimStorage> {
    SimStorage::new(NewImage::file_for_tests(16, SIZE, Some((below, format))))
}

impl Host {
    fn new() -> (Host, Chain) {
        let base = SimStorage::new(vec![7; SIZE as usize]);
        let chain = Chain::of_two(new_image("base.raw", BackingFormat::Raw), base.clone()).unwrap();
        (Host { overlay: new_image("middle.qcow2", BackingFormat::Qcow2), base }, chain)
    }

    /// Makes the next read of the first chunk from the base fail.
    fn fail_a_read(&self) {
        let matches =
            |operation: &Operation| operation.action == Action::Read && operation.at < CHUNK;
        self.base.inject(Fault {
            matches: Box::new(matches),
            after: 0,
            failure: sim::HostFailure::Errno(5),
            times: Repeat::Once,
        });
    }

    /// Makes the next write of guest data fail with ENOSPC.
    fn fail_a_write(&self) {
        let matches =
            |operation: &Operation| operation.action == Action::Write(WriteKind::NewCluster);
        self.overlay.inject(Fault {
            matches: Box::new(matches),
            after: 0,
            failure: sim::HostFailure::Errno(28),
            times: Repeat::Once,
        });
    }
}

impl Fixture {
    fn new() -> Fixture {
        Self::with(Use::Plain, |_| {})
    }

    fn with(usage: Use, grown: impl Fn(u64) + Send + Sync + 'static) -> Fixture {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("qmp");
        let (host, chain) = Host::new();
        let overlay = host.overlay.clone();
        let disk = Arc::new(match usage {
            Use::ReadOnly => {
                Disk::read_only_for_tests(ImageReader::open(overlay).unwrap(), Some(chain))
            }
            _ => Disk::for_tests(Image::open(overlay).unwrap(), Some(chain))
                .copying_up(usage == Use::CopyOnRead),
        });
        let jobs = Jobs::new();
        let (sender, quit) = crossbeam_channel::bounded(1);
        let warning = Warning {
            level: log::Level::Warn,
            time: std::time::UNIX_EPOCH,
            message: "no room".into(),
        };
        let target = Target {
            disk: Arc::clone(&disk),
            mountpoint: "/srv/disk".into(),
            pid: std::process::id(),
            started: std::time::UNIX_EPOCH,
            jobs: jobs.clone(),
            streams: Streams::keeping(
                &jobs,
                "drive0",
                jiff::tz::TimeZone::UTC,
                Box::new(|_| Ok(())),
            ),
            device: "drive0".into(),
            priority: Priority::Normal,
            quit: sender,
            is_file: Arc::new(|_, _| false),
            log: LogFacts {
                place: Some("journal".into()),
                last_warning: Arc::new(move || Some(warning.clone())),
            },
            metrics: Some(([127, 0, 0, 1], 9184).into()),
            grown: Arc::new(grown),
            is_answering: Arc::new(|| true),
            sources: Arc::new(Vec::new),
            order_base: Arc::new(|| None),
            takeover: Arc::new(|| super::facts::TakeoverFacts {
                possible: true,
                count: 3,
                ..Default::default()
            }),
        };
        let server =
            Some(Server::start(super::socket::Socket::listen(&path).unwrap(), target).unwrap());
        Fixture { server, disk, jobs, quit, host, path, _dir: dir }
    }

    fn stranger(&self) -> Client {
        let stream = UnixStream::connect(&self.path).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        let mut client = Client { reader: BufReader::new(stream) };
        assert!(client.line().starts_with(r#"{"QMP": {"version": {"qemu": {"micro": 0, "minor": 2, "major": 10}, "package": "cordisk "#));
        client
    }

    fn client(&self) -> Client {
        let mut client = self.stranger();
        assert_eq!(
            client.ask(r#"{"execute":"qmp_capabilities","arguments":{"enable":["oob"]}}"#),
            r#"{"return": {}}"#
        );
        client
    }
}

impl Drop for Fixture {
    fn drop(&mut self) {
        self.jobs.cancel_all_and_wait(Duration::from_secs(60));
    }
}

struct Client {
    reader: BufReader<UnixStream>,
}

impl Client {
    fn send(&mut self, text: impl AsRef<[u8]>) {
        self.reader.get_ref().write_all(text.as_ref()).unwrap();
    }

    /// Reads the next line; empty at the end of the connection.
    fn line(&mut self) -> String {
        let mut line = String::new();
        self.reader.read_line(&mut line).unwrap();
        assert!(line.is_ascii() && (line.is_empty() || line.ends_with("\r\n")), "{line:?}");
        line.trim_end().to_string()
    }

    fn ask(&mut self, text: impl AsRef<[u8]>) -> String {
        self.send(text);
        self.line()
    }

    /// Sends a request. Returns the names of the events up to the reply, and the reply; checks all
    /// of them against the schema. The name of a status change is its status.
    fn events_and_reply(&mut self, text: &str) -> (Vec<String>, Value) {
        self.send(text);
        let mut events = Vec::new();
        loop {
            let value: Value = serde_json::from_str(&self.line()).unwrap();
            match value.get("event") {
                Some(_) => events.push(event_word(&value)),
                None => {
                    let request: Value = serde_json::from_str(text).unwrap();
                    if let (Some(returned), Some(command)) =
                        (value.get("return"), request["execute"].as_str())
                    {
                        check_return(command, returned);
                    }
                    return (events, value);
                }
            }
        }
    }

    fn events(&mut self, count: usize) -> Vec<String> {
        (0..count).map(|_| event_word(&serde_json::from_str(&self.line()).unwrap())).collect()
    }
}

fn event_word(event: &Value) -> String {
    check_event(event);
    let word = if event["event"] == "JOB_STATUS_CHANGE" {
        &event["data"]["status"]
    } else {
        &event["event"]
    };
    word.as_str().unwrap().to_string()
}

fn execute(name: &str, arguments: &Value) -> String {
    json!({ "execute": name, "arguments": arguments }).to_string()
}

fn error(reply: &Value) -> (&str, &str) {
    (
        reply["error"]["class"].as_str().unwrap_or_default(),
        reply["error"]["desc"].as_str().unwrap_or_default(),
    )
}

fn ok() -> Value {
    json!({ "return": {} })
}

#[test]
fn before_negotiation_nothing_but_negotiation_works() {
    let fixture = Fixture::new();
    let mut client = fixture.stranger();
    for (request, reply) in [
        (
            r#"{"execute":"nope","id":1}"#,
            r#"{"id": 1, "error": {"class": "CommandNotFound", "desc": "Expecting capabilities negotiation with 'qmp_capabilities'"}}"#,
        ),
        (
            r#"{"exec-oob":"qmp_capabilities"}"#,
            r#"{"error": {"class": "GenericError", "desc": "QMP input member 'exec-oob' is unexpected"}}"#,
        ),
        (
            r#"{"execute":"qmp_capabilities","arguments":{"enable":["foo"]}}"#,
            r#"{"error": {"class": "GenericError", "desc": "Parameter 'null' does not accept value 'foo'"}}"#,
        ),
        (
            r#"{"execute":"qmp_capabilities","arguments":{"enable":["oob","oob"]},"id":{"b":1,"a":[1e3,0.1]}}"#,
            r#"{"return": {}, "id": {"a": [1000, 0.10000000000000001], "b": 1}}"#,
        ),
        (
            r#"{"execute":"qmp_capabilities","arguments":{"enable":[]}}"#,
            r#"{"error": {"class": "CommandNotFound", "desc": "Capabilities negotiation is already complete, command ignored"}}"#,
        ),
        (
            r#"{"exec-oob":"query-version","id":2}"#,
            r#"{"id": 2, "error": {"class": "GenericError", "desc": "The command query-version does not support OOB"}}"#,
        ),
        (
            r#"{"execute":"query-version","exec-oob":"x","id":2}"#,
            r#"{"id": 2, "error": {"class": "GenericError", "desc": "QMP input member 'execute' clashes with 'exec-oob'"}}"#,
        ),
    ] {
        assert_eq!(client.ask(request), reply);
    }
}

#[test]
fn requests_need_no_separators_and_replies_keep_their_order() {
    let fixture = Fixture::new();
    let mut client = fixture.client();
    let many: String =
        (0..2000).map(|i| format!(r#"{{'execute':'query-block-jobs','id':{i}}}"#)).collect();
    // More than the sockets and the outbox hold: the server stops reading, and does not disconnect
    // the client.
    let mut sender =
        Client { reader: BufReader::new(client.reader.get_ref().try_clone().unwrap()) };
    let sending = thread::spawn(move || (0..20).for_each(|_| sender.send(&many)));
    thread::sleep(Duration::from_millis(50));
    for i in (0..2000).cycle().take(40_000) {
        assert_eq!(client.line(), format!(r#"{{"return": [], "id": {i}}}"#));
    }
    sending.join().unwrap();
}

/// Protects: values of the deepest allowed nesting are parsed, kept, printed and dropped without an
/// overflow of the stack.
#[test]
fn depth_is_bounded_and_survived() {
    let mut fixture = Fixture::new();
    let mut client = fixture.client();
    let deep = |depth: usize| format!("{}1{}", r#"{"a":"#.repeat(depth), "}".repeat(depth));
    let printed = deep(1023).replace(':', ": ");
    let reply = client.ask(format!(r#"{{"execute":"query-jobs","id":{}}}"#, deep(1023)));
    assert_eq!(reply, format!(r#"{{"return": [], "id": {printed}}}"#));
    let reply = client.ask(format!(r#"{{"execute":"query-jobs","arguments":{}}}"#, deep(1023)));
    assert_eq!(
        reply,
        r#"{"error": {"class": "GenericError", "desc": "Parameter 'a' is unexpected"}}"#
    );
    assert_eq!(
        client.ask(format!(r#"{{"execute":"query-jobs","id":{}"#, deep(1024))),
        r#"{"error": {"class": "GenericError", "desc": "JSON nesting depth limit exceeded"}}"#
    );
    let (mut watcher, mut client) = (fixture.client(), fixture.client());
    client.send(format!(r#"{{"execute":"quit","id":{}}}"#, deep(1023)));
    fixture.quit.recv_timeout(Duration::from_secs(10)).unwrap();
    fixture.server.take().unwrap().shutdown(&Err(host::Error::new(host::ErrorKind::Io, "too bad")));
    for client in [&mut client, &mut watcher] {
        assert!(client.line().contains("SHUTDOWN"));
        assert!(
            client.line().contains(r#""event": "X_CLOSE_FAILED", "data": {"error": "too bad"}"#),
            "all are told, not only who asked to quit"
        );
    }
    assert_eq!(
        client.line(),
        format!(r#"{{"id": {printed}, "error": {{"class": "GenericError", "desc": "too bad"}}}}"#)
    );
}

#[test]
fn a_stream_tells_its_life_in_order() {
    let fixture = Fixture::new();
    let (mut client, mut watcher, mut stranger) =
        (fixture.client(), fixture.client(), fixture.stranger());
    let (events, reply) =
        client.events_and_reply(&execute("block-stream", &json!({"device": "drive0"})));
    assert_eq!((events, reply), (vec!["created".into(), "running".into()], ok()));
    assert_eq!(client.events(3), ["waiting", "pending", "BLOCK_JOB_COMPLETED"]);
    let (events, reply) = client.events_and_reply(&execute("query-block-jobs", &json!({})));
    assert_eq!((events, reply), (vec!["concluded".into(), "null".into()], json!({"return": []})));
    assert_eq!(
        watcher.events(7),
        ["created", "running", "waiting", "pending", "BLOCK_JOB_COMPLETED", "concluded", "null"]
    );
    assert!(
        stranger.ask(r#"{"execute":"qmp_capabilities"}"#) == r#"{"return": {}}"#,
        "no event before or after"
    );
    assert_eq!(stranger.ask(r#"{"execute":"query-jobs"}"#), r#"{"return": []}"#);
}

#[test]
fn the_completed_event_has_the_members_of_2012() {
    let fixture = Fixture::new();
    let mut client = fixture.client();
    client.events_and_reply(&execute("block_stream", &json!({"device": "drive0"})));
    client.events(2);
    let event: Value = serde_json::from_str(&client.line()).unwrap();
    assert_eq!(
        event["data"],
        json!({"type": "stream", "device": "drive0", "len": SIZE, "offset": SIZE, "speed": 0})
    );
    assert!(
        event["timestamp"]["seconds"].as_i64().unwrap() > 1_600_000_000
            && event["timestamp"]["microseconds"].is_u64()
    );
}

#[test]
fn nothing_to_do_is_done_before_the_reply() {
    let fixture = Fixture::new();
    let mut client = fixture.client();
    for arguments in [
        json!({"device": "drive0", "base": "middle.qcow2"}),
        json!({"device": "overlay", "job-id": "j", "bottom": "overlay"}),
        json!({"device": "drive0", "base-node": "backing-1", "backing-file": "x"}),
    ] {
        let (events, reply) = client.events_and_reply(&execute("block-stream", &arguments));
        assert_eq!(
            events,
            [
                "created",
                "running",
                "waiting",
                "pending",
                "BLOCK_JOB_COMPLETED",
                "concluded",
                "null"
            ]
        );
        assert_eq!(reply, ok());
    }
}

#[test]
fn a_limited_job_obeys() {
    let fixture = Fixture::new();
    let mut client = fixture.client();
    client.events_and_reply(&execute(
        "block-stream",
        &json!({"device": "drive0", "job-id": "j", "speed": 1}),
    ));
    while fixture.jobs.query()[0].busy || fixture.jobs.query()[0].progress.offset == 0 {
        thread::sleep(Duration::from_millis(1));
    }
    let text = r#"{"return": [{"auto-finalize": true, "io-status": "ok", "device": "j", "auto-dismiss": true, "busy": false, "len": 4194304, "offset": 524288, "status": "running", "paused": false, "speed": 1, "ready": false, "type": "stream"}]}"#;
    assert_eq!(client.ask(execute("query-block-jobs", &json!({}))), text);
    let text = r#"{"return": [{"current-progress": 524288, "status": "running", "total-progress": 4194304, "type": "stream", "id": "j"}]}"#;
    assert_eq!(client.ask(execute("query-jobs", &json!({}))), text);

    let none: &[&str] = &[];
    for (name, arguments, events, desc) in [
        (
            "block-stream",
            json!({"device": "drive0"}),
            none,
            "Node 'drive0' is busy: block device is in use by block job: stream",
        ),
        (
            "block-stream",
            json!({"device": "backing-1"}),
            none,
            "Node 'backing-1' is busy: block device is in use by block job: stream",
        ),
        ("block_stream", json!({"device": "drive0"}), none, "Device 'drive0' is in use"),
        ("block-job-pause", json!({"device": "j"}), &["paused"], ""),
        ("job-pause", json!({"id": "j"}), none, "Job is already paused"),
        (
            "block-job-cancel",
            json!({"device": "j"}),
            none,
            "The block job for device 'j' is currently paused",
        ),
        (
            "block-job-set-speed",
            json!({"device": "j", "speed": -1}),
            none,
            "Parameter 'speed' expects a non-negative value",
        ),
        ("block_job_set_speed", json!({"device": "j", "value": 5}), none, ""),
        (
            "job-complete",
            json!({"id": "j"}),
            none,
            "Job 'j' in state 'paused' cannot accept command verb 'complete'",
        ),
        (
            "block-job-finalize",
            json!({"id": "j"}),
            none,
            "Job 'j' in state 'paused' cannot accept command verb 'finalize'",
        ),
        (
            "job-dismiss",
            json!({"id": "j"}),
            none,
            "Job 'j' in state 'paused' cannot accept command verb 'dismiss'",
        ),
        ("block_job_resume", json!({"device": "j"}), &["running"], ""),
        ("job-resume", json!({"id": "j"}), none, "Can't resume a job that was not paused"),
        ("block-job-pause", json!({"device": "j"}), &["paused"], ""),
        (
            "job-cancel",
            json!({"id": "j"}),
            &["running", "aborting", "BLOCK_JOB_CANCELLED", "concluded", "null"],
            "",
        ),
        ("job-cancel", json!({"id": "j"}), none, "Job not found"),
    ] {
        let (seen, reply) = client.events_and_reply(&execute(name, &arguments));
        assert_eq!(seen, events, "{name}");
        assert_eq!(error(&reply).1, desc, "{name}");
    }
    let (_, reply) = client
        .events_and_reply(&execute("block-job-set-speed", &json!({"device": "j", "speed": -1})));
    assert_eq!(error(&reply), ("DeviceNotActive", "Block job 'j' not found"));
}

#[test]
fn a_job_waits_for_orders_where_it_is_told_to() {
    let fixture = Fixture::new();
    let mut client = fixture.client();
    let manual = json!({"device": "drive0", "auto-finalize": false, "auto-dismiss": false});
    client.events_and_reply(&execute("block-stream", &manual));
    assert_eq!(client.events(3), ["waiting", "pending", "BLOCK_JOB_PENDING"]);
    for (name, arguments, events, desc) in [
        (
            "job-pause",
            json!({"id": "drive0"}),
            vec![],
            "Job 'drive0' in state 'pending' cannot accept command verb 'pause'",
        ),
        ("job-finalize", json!({"id": "drive0"}), vec!["BLOCK_JOB_COMPLETED", "concluded"], ""),
        (
            "job-cancel",
            json!({"id": "drive0"}),
            vec![],
            "Job 'drive0' in state 'concluded' cannot accept command verb 'cancel'",
        ),
        (
            "block-stream",
            manual.clone(),
            vec![],
            "Node 'drive0' is busy: block device is in use by block job: stream",
        ),
        ("block-job-dismiss", json!({"id": "drive0"}), vec!["null"], ""),
    ] {
        let (seen, reply) = client.events_and_reply(&execute(name, &arguments));
        assert_eq!(seen, events, "{name}");
        assert_eq!(error(&reply).1, desc, "{name}");
    }
    // A new disk, because the first one has no backing file any more.
    let fixture = Fixture::new();
    let mut client = fixture.client();
    client.events_and_reply(&execute(
        "block-stream",
        &json!({"device": "drive0", "auto-finalize": false}),
    ));
    client.events(3);
    let (seen, _) =
        client.events_and_reply(&execute("block-job-cancel", &json!({"device": "drive0"})));
    assert_eq!(seen, ["aborting", "BLOCK_JOB_CANCELLED", "concluded", "null"]);
}

#[test]
fn errors_follow_the_policy() {
    let fixture = Fixture::new();
    let mut client = fixture.client();
    let stream =
        |policy: &str| execute("block-stream", &json!({"device": "drive0", "on-error": policy}));

    fixture.host.fail_a_read();
    client.events_and_reply(&stream("report"));
    assert_eq!(client.events(2), ["BLOCK_JOB_ERROR", "aborting"]);
    let event: Value = serde_json::from_str(&client.line()).unwrap();
    assert_eq!(
        (&event["data"]["error"], &event["data"]["offset"]),
        (&json!("Input/output error"), &json!(0))
    );
    client.events(2);

    fixture.host.fail_a_read();
    client.events_and_reply(&stream("ignore"));
    assert_eq!(client.events(2), ["BLOCK_JOB_ERROR", "aborting"]);
    let event: Value = serde_json::from_str(&client.line()).unwrap();
    assert_eq!(
        (&event["data"]["error"], &event["data"]["offset"]),
        (&json!("Input/output error"), &json!(SIZE))
    );
    client.events(2);

    fixture.host.fail_a_write();
    client.events_and_reply(&stream("enospc"));
    assert_eq!(client.events(2), ["BLOCK_JOB_ERROR", "paused"]);
    let (_, reply) = client.events_and_reply(&execute("query-block-jobs", &json!({})));
    assert_eq!(reply["return"][0]["io-status"], "nospace");
    let (events, _) =
        client.events_and_reply(&execute("block-job-resume", &json!({"device": "drive0"})));
    assert_eq!(events, ["running"]);
    assert_eq!(
        client.events(5),
        ["waiting", "pending", "BLOCK_JOB_COMPLETED", "concluded", "null"]
    );
}

#[test]
fn streams_that_cannot_be_are_refused() {
    let fixture = Fixture::new();
    let mut client = fixture.client();
    let generic = "GenericError";
    for (name, arguments, class, desc) in [
        (
            "block-stream",
            json!({"device": "nope"}),
            generic,
            "Cannot find device='nope' nor node-name='nope'",
        ),
        ("block_stream", json!({"device": "nope"}), "DeviceNotFound", "Device 'nope' not found"),
        (
            "block-stream",
            json!({"device": "drive0", "base": "zz"}),
            generic,
            "Can't find 'zz' in the backing chain",
        ),
        ("block_stream", json!({"device": "drive0", "base": "zz"}), generic, "Base 'zz' not found"),
        (
            "block-stream",
            json!({"device": "backing-1", "base": "middle.qcow2"}),
            generic,
            "Can't find 'middle.qcow2' in the backing chain",
        ),
        ("block-stream", json!({"device": "overlay"}), generic, "Invalid job ID ''"),
        (
            "block-stream",
            json!({"device": "drive0", "job-id": "1x", "speed": -1}),
            generic,
            "Invalid job ID '1x'",
        ),
        (
            "block-stream",
            json!({"device": "backing-1", "job-id": "j"}),
            generic,
            "Block node is read-only",
        ),
        ("block_stream", json!({"device": "backing-1", "job-id": "j"}), generic, "Not supported"),
        (
            "block-stream",
            json!({"device": "nope", "base": "a", "base-node": "b"}),
            generic,
            "'base' and 'base-node' cannot be specified at the same time",
        ),
        (
            "block-stream",
            json!({"device": "drive0", "base-node": "overlay"}),
            generic,
            "Node 'overlay' is not a backing image of 'drive0'",
        ),
        (
            "block-stream",
            json!({"device": "overlay-file", "job-id": "j"}),
            generic,
            "Block node is read-only",
        ),
        (
            "block-stream",
            json!({"device": "drive0", "base-node": "backing-1-file"}),
            generic,
            "Node 'backing-1-file' is not a backing image of 'drive0'",
        ),
        (
            "block-stream",
            json!({"device": "drive0", "base": "other.raw"}),
            generic,
            "Can't find 'other.raw' in the backing chain",
        ),
        (
            "block-stream",
            json!({"device": "drive0", "base-node": "x"}),
            generic,
            "Cannot find device='' nor node-name='x'",
        ),
        (
            "block-stream",
            json!({"device": "backing-1", "bottom": "overlay"}),
            generic,
            "Node 'overlay' is not in a chain starting from 'backing-1'",
        ),
        (
            "block-stream",
            json!({"device": "drive0", "backing-file": "x"}),
            generic,
            "backing file specified, but streaming the entire chain",
        ),
        (
            "block-stream",
            json!({"device": "drive0", "filter-node-name": "overlay"}),
            generic,
            "Could not create node: Duplicate nodes with node-name='overlay'",
        ),
        (
            "block-stream",
            json!({"device": "drive0", "filter-node-name": "1mid"}),
            generic,
            "Could not create node: Invalid node-name: '1mid'",
        ),
    ] {
        let (events, reply) = client.events_and_reply(&execute(name, &arguments));
        assert_eq!((error(&reply), events.len()), ((class, desc), 0));
    }
    let (events, reply) = client
        .events_and_reply(&execute("block-stream", &json!({"device": "drive0", "speed": -1})));
    assert_eq!(
        (error(&reply).1, events),
        ("Parameter 'speed' expects a non-negative value", vec!["created".into(), "null".into()])
    );

    let fixture = Fixture::with(Use::ReadOnly, |_| {});
    let (_, reply) =
        fixture.client().events_and_reply(&execute("block-stream", &json!({"device": "drive0"})));
    assert_eq!(error(&reply), (generic, "Block node is read-only"));
}

#[test]
fn the_disk_can_be_looked_at() {
    let fixture = Fixture::new();
    let mut client = fixture.client();
    let (_, reply) = client.events_and_reply(&execute("query-block", &json!({})));
    let disk = &reply["return"][0];
    assert_eq!(
        (&disk["device"], &disk["inserted"]["node-name"], &disk["inserted"]["ro"]),
        (&json!("drive0"), &json!("overlay"), &json!(false))
    );
    assert_eq!(disk["inserted"]["backing_file_depth"], 2);
    assert_eq!(
        disk["inserted"]["image"]["backing-image"]["backing-image"]["filename"],
        "/base.raw"
    );
    let (_, reply) =
        client.events_and_reply(&execute("query-named-block-nodes", &json!({"flat": true})));
    let names: Vec<_> = reply["return"]
        .as_array()
        .unwrap()
        .iter()
        .map(|node| node["node-name"].as_str().unwrap())
        .collect();
    assert_eq!(
        names,
        ["overlay", "overlay-file", "backing-1", "backing-1-file", "backing-2", "backing-2-file"]
    );
    let (_, reply) = client.events_and_reply(&execute("query-commands", &json!({})));
    assert!(reply["return"].as_array().unwrap().contains(&json!({"name": "block-stream"})));
}

#[test]
fn quit_is_answered_when_everything_is_over() {
    let mut fixture = Fixture::new();
    let (mut client, mut watcher) = (fixture.client(), fixture.client());
    client.events_and_reply(&execute("block-stream", &json!({"device": "drive0", "speed": 1})));
    client.send(r#"{"execute":"quit","id":"q"}{"execute":"query-version"}"#);
    fixture.quit.recv_timeout(Duration::from_secs(10)).unwrap();
    let server = fixture.server.take().unwrap();
    server.announce_shutdown(super::ShutdownReason::HostSignal);
    server.announce_export_deleted("fuse0");
    fixture.jobs.cancel_all_and_wait(Duration::from_secs(60));
    server.shutdown(&Ok(()));
    let events = [
        "SHUTDOWN",
        "BLOCK_EXPORT_DELETED",
        "aborting",
        "BLOCK_JOB_CANCELLED",
        "concluded",
        "null",
    ];
    assert_eq!(client.events(6), events);
    assert_eq!([client.line(), client.line()], [r#"{"return": {}, "id": "q"}"#, ""]);
    watcher.events(2);
    let first: Value = serde_json::from_str(&watcher.line()).unwrap();
    assert_eq!(first["data"], json!({"guest": false, "reason": "host-qmp-quit"}));
    assert_eq!(watcher.events(5), events[1..]);
    assert_eq!(watcher.line(), "");
    assert!(!fixture.path.exists());
    assert!(
        fixture
            .jobs
            .create(JobSpec {
                id: "j".into(),
                kind: "stream",
                len: 1,
                speed: 0,
                auto_finalize: true,
                auto_dismiss: true,
                on_error: engine::job::OnError::Report,
                request: String::new(),
            })
            .is_err()
    );
}

#[test]
fn a_client_that_does_not_read_loses_its_connection_and_nothing_else() {
    let fixture = Fixture::new();
    let (mut stalled, mut client) = (fixture.client(), fixture.client());
    let start = Instant::now();
    let mut rounds = 0;
    client.events_and_reply(&execute("block-stream", &json!({"device": "drive0", "speed": 1})));
    while fixture.server.as_ref().unwrap().clients() == 2 {
        assert!(start.elapsed() < Duration::from_secs(60));
        client.events_and_reply(&execute("job-pause", &json!({"id": "drive0"})));
        client.events_and_reply(&execute("job-resume", &json!({"id": "drive0"})));
        rounds += 1;
    }
    assert!(rounds > 1000, "{rounds}");
    assert!(fixture.jobs.is_busy());
    let mut rest = Vec::new();
    stalled.reader.read_to_end(&mut rest).unwrap();
    assert!(rest.len() > 1000);
}

#[test]
fn places_are_limited_and_the_idle_do_not_keep_them() {
    let fixture = Fixture::new();
    let mut clients: Vec<_> = (0..32).map(|_| fixture.client()).collect();
    let mut refused = BufReader::new(UnixStream::connect(&fixture.path).unwrap());
    assert_eq!(refused.read_line(&mut String::new()).unwrap(), 0);
    assert_eq!(clients[31].ask(r#"{"execute":"query-jobs"}"#), r#"{"return": []}"#);
    drop(clients.pop());
    while fixture.server.as_ref().unwrap().clients() == 32 {
        thread::sleep(Duration::from_millis(1));
    }
    fixture.client();
}

#[test]
fn what_was_asked_before_the_end_of_input_is_answered() {
    let fixture = Fixture::new();
    let mut client = fixture.client();
    client.send(r#"{"execute":"query-jobs"}{"execute":"#);
    client.reader.get_ref().shutdown(std::net::Shutdown::Write).unwrap();
    assert_eq!([client.line(), client.line()], [r#"{"return": []}"#, ""]);
}

/// Protects: only the owner of the process and root are served, even if the mode of the file lets
/// another user connect. Needs root, to act as another user.
#[test]
fn nobody_but_the_owner_and_root_is_served() {
    const SAY: &str = "import socket, sys; s = socket.socket(socket.AF_UNIX); s.connect(sys.argv[1]); print(len(s.recv(1000)))";
    let fixture = Fixture::new();
    let say = |uid: &str| {
        let mut command = Command::new("setpriv");
        // The system's Python: another user cannot run one in root's home directory.
        command.env("PATH", "/usr/bin:/bin").current_dir("/");
        let path = fixture.path.as_os_str();
        let done = command
            .args(["--reuid", uid, "--regid", uid, "--clear-groups", "python3", "-c", SAY])
            .arg(path)
            .output()
            .ok()?;
        done.status
            .success()
            .then(|| String::from_utf8(done.stdout).unwrap().trim().parse::<usize>().unwrap())
    };
    if say("0").is_none() {
        return eprintln!("skipped: not root, or no setpriv or python3");
    }
    assert!(say("0").unwrap() > 10, "the greeting");
    fs::set_permissions(fixture.path.parent().unwrap(), Permissions::from_mode(0o755)).unwrap();
    assert_eq!(say("65534"), None, "the mode of the file");
    fs::set_permissions(&fixture.path, Permissions::from_mode(0o666)).unwrap();
    assert_eq!(say("65534"), Some(0), "closed without a greeting");
}

/// Protects: each byte of a request may be echoed as six, so a reply may be longer than all the
/// events that may wait.
#[test]
fn the_longest_request_is_answered() {
    let fixture = Fixture::new();
    let mut client = fixture.client();
    let id = "\u{7f}".repeat((1 << 20) - 100);
    let request = format!(r#"{{"execute":"query-jobs","id":"{id}"}}"#);
    let mut sender = client.reader.get_ref().try_clone().unwrap();
    let sending = thread::spawn(move || sender.write_all(request.as_bytes()).unwrap());
    assert_eq!(
        client.line(),
        format!(r#"{{"return": [], "id": "{}"}}"#, r"\u007F".repeat(id.len()))
    );
    sending.join().unwrap();
    assert_eq!(client.ask(r#"{"execute":"query-jobs"}"#), r#"{"return": []}"#);
}

/// Protects: a client that sends no more and does not read its replies keeps its place. The server
/// used to forget such a client while its writer thread still ran: it did not count among the 32
/// clients, and the end of the server waited for it.
#[test]
fn a_client_that_has_sent_all_keeps_its_place_and_delays_no_end() {
    let mut fixture = Fixture::new();
    let mut client = fixture.client();
    client.send(r#"{"execute":"query-commands"}"#.repeat(280));
    client.reader.get_ref().shutdown(std::net::Shutdown::Write).unwrap();
    thread::sleep(Duration::from_millis(500));
    assert_eq!(fixture.server.as_ref().unwrap().clients(), 1);
    let start = Instant::now();
    drop(fixture.server.take());
    assert!(start.elapsed() < Duration::from_secs(10), "{:?}", start.elapsed());
}

#[test]
fn the_server_goes_away_with_clients_connected() {
    let mut fixture = Fixture::new();
    let mut client = fixture.client();
    drop(fixture.server.take());
    assert_eq!(client.line(), "");
    assert!(!fixture.path.exists());
}

/// The texts are those of qemu-storage-daemon, except the one about shrinking, which QEMU supports.
#[test]
fn the_disk_grows_and_never_shrinks() {
    let fixture = Fixture::new();
    let mut client = fixture.client();
    let mut refusals = |table: &[(Value, &str)]| {
        for (arguments, desc) in table {
            let (_, reply) = client.events_and_reply(&execute("block_resize", arguments));
            assert_eq!(
                error(&reply),
                if desc.is_empty() { ("", "") } else { ("GenericError", *desc) },
                "{arguments}"
            );
        }
    };
    refusals(&[
        (json!({"size": 512}), "Cannot find device='' nor node-name=''"),
        (
            json!({"size": 512, "device": "overlay"}),
            "Cannot find device='overlay' nor node-name=''",
        ),
        (json!({"size": -1, "node-name": "x"}), "Cannot find device='' nor node-name='x'"),
        (json!({"size": -1, "device": "drive0"}), "Parameter 'size' expects a >0 size"),
        (json!({"device": "drive0"}), "Parameter 'size' is missing"),
        (json!({"size": 1000, "node-name": "overlay"}), "The new size must be a multiple of 512"),
        (
            json!({"size": SIZE, "node-name": "backing-2"}),
            "Node 'backing-2' is busy: node is used as backing hd of 'backing-1'",
        ),
        (
            json!({"size": SIZE - 512, "device": "drive0"}),
            "Shrinking is not supported: the disk has 4194304 bytes",
        ),
        (
            json!({"size": 1_u64 << 62, "device": "drive0"}),
            "virtual size 4611686018427387904 is larger than 2^61 bytes",
        ),
        (json!({"size": SIZE, "device": "drive0"}), ""),
        (json!({"size": SIZE + 512, "device": "x", "node-name": "overlay"}), ""),
    ]);
    fixture
        .client()
        .events_and_reply(&execute("block-stream", &json!({"device": "drive0", "speed": 1})));
    refusals(&[
        (json!({"size": -1, "device": "drive0"}), "Parameter 'size' expects a >0 size"),
        (
            json!({"size": 513, "device": "drive0"}),
            "Node 'drive0' is busy: block device is in use by block job: stream",
        ),
        (
            json!({"size": 513, "node-name": "overlay"}),
            "Node 'overlay' is busy: block device is in use by block job: stream",
        ),
    ]);
    let fixture = Fixture::with(Use::ReadOnly, |_| {});
    let (_, reply) = fixture.client().events_and_reply(&execute(
        "block_resize",
        &json!({"device": "drive0", "size": SIZE + 512}),
    ));
    assert_eq!(error(&reply), ("GenericError", "Image is read-only"));
}

/// A fixture that reports when its disk has grown, and delays the reply until it gets a message.
fn slow_to_grow() -> (Fixture, Receiver<u64>, crossbeam_channel::Sender<()>) {
    let (began, begins) = crossbeam_channel::unbounded();
    let (go_on, told) = crossbeam_channel::unbounded::<()>();
    let grown = move |size| {
        began.send(size).unwrap();
        let _ = told.recv();
    };
    (Fixture::with(Use::Plain, grown), begins, go_on)
}

/// Protects: once the jobs are closed, the disk may be closed. A running change of its size is
/// waited for, and no other begins.
#[test]
fn no_resize_beside_or_after_the_close() {
    let (fixture, begins, go_on) = slow_to_grow();
    let (mut early, mut late) = (fixture.client(), fixture.client());
    let resize = execute("block_resize", &json!({"device": "drive0", "size": SIZE + 512}));
    early.send(&resize);
    assert_eq!(begins.recv_timeout(Duration::from_secs(10)), Ok(SIZE + 512));
    assert!(fixture.jobs.cancel_all_and_wait(Duration::ZERO));
    let server = fixture.server.as_ref().unwrap();
    assert!(!server.settle(Duration::from_millis(10)), "one is still growing it");
    late.send(&resize);
    go_on.send(()).unwrap();
    assert_eq!(early.line(), r#"{"return": {}}"#);
    assert!(server.settle(Duration::from_secs(10)));
    let reply: Value = serde_json::from_str(&late.line()).unwrap();
    assert_eq!(error(&reply), ("GenericError", "the daemon is shutting down"));
    assert!(begins.try_recv().is_err(), "it began after all");
}

/// Protects: the server ends although a command waits for a backing file for ever.
#[test]
fn the_server_goes_away_without_a_command_that_hangs() {
    let (mut fixture, begins, go_on) = slow_to_grow();
    let mut client = fixture.client();
    client.send(execute("block_resize", &json!({"device": "drive0", "size": SIZE + 512})));
    assert!(begins.recv_timeout(Duration::from_secs(10)).is_ok());
    let server = fixture.server.take();
    let (sender, gone) = crossbeam_channel::bounded(1);
    thread::spawn(move || {
        drop(server);
        let _ = sender.send(());
    });
    assert!(gone.recv_timeout(Duration::from_secs(30)).is_ok());
    assert_eq!(client.line(), "", "its connection has ended");
    drop(go_on);
}

/// The texts were copied from a session with qemu-storage-daemon.
#[test]
fn a_stream_cannot_be_changed() {
    let fixture = Fixture::new();
    let mut client = fixture.client();
    client.events_and_reply(&execute(
        "block-stream",
        &json!({"device": "drive0", "job-id": "j", "speed": 1}),
    ));
    for (arguments, expected) in [
        (json!({"id": "x", "type": "stream"}), ("DeviceNotActive", "Block job 'x' not found")),
        (json!({"id": "j"}), ("GenericError", "Parameter 'type' is missing")),
        (
            json!({"id": "x", "type": "mirror"}),
            ("GenericError", "Parameter 'copy-mode' is missing"),
        ),
        (
            json!({"id": "j", "type": "stream", "copy-mode": "background"}),
            ("GenericError", "Parameter 'copy-mode' is unexpected"),
        ),
        (
            json!({"id": "j", "type": "xx"}),
            ("GenericError", "Parameter 'type' does not accept value 'xx'"),
        ),
        (
            json!({"id": "j", "type": "stream"}),
            ("GenericError", "Job type does not support change"),
        ),
        (
            json!({"id": "j", "type": "mirror", "copy-mode": "background"}),
            ("GenericError", "Job type does not support change"),
        ),
    ] {
        assert_eq!(
            error(&client.events_and_reply(&execute("block-job-change", &arguments)).1),
            expected,
            "{arguments}"
        );
    }
}

#[test]
fn statistics_are_told_as_qemu_does() {
    let fixture = Fixture::new();
    let disk = &fixture.disk;
    disk.read(0, &mut [0; 512]).unwrap();
    disk.write(0, &[1; 1024]).unwrap();
    disk.write(CHUNK, &[1; 512]).unwrap();
    disk.flush().unwrap();
    disk.discard(0..SIZE).unwrap();
    let counted = disk.stats();
    assert!(
        counted.highest_written > 0
            && counted.backing_reads.operations > 0
            && counted.idle.is_some()
    );
    let mut client = fixture.client();
    let mut ask = |arguments: &Value| {
        client.events_and_reply(&execute("query-blockstats", arguments)).1["return"].take()
    };
    let device = ask(&json!({}));
    assert_eq!(device.as_array().unwrap().len(), 1);
    let device = &device[0];
    assert_eq!((&device["device"], &device["node-name"]), (&json!("drive0"), &json!("overlay")));
    let stats = &device["stats"];
    assert_eq!(stats.as_object().unwrap().len(), 33, "all that QEMU 10.2 has");
    for (name, value) in [
        ("rd_bytes", 512),
        ("rd_operations", 1),
        ("wr_operations", 2),
        ("wr_bytes", 1536),
        ("flush_operations", 1),
        ("unmap_bytes", SIZE),
        ("failed_rd_operations", 0),
        ("zone_append_bytes", 0),
        ("flush_total_time_ns", counted.flushes.time.as_nanos() as u64),
        ("wr_highest_offset", counted.highest_written),
    ] {
        assert_eq!(stats[name], value, "{name}");
    }
    assert!(stats["idle_time_ns"].as_u64() >= counted.idle.map(|idle| idle.as_nanos() as u64));
    assert_eq!(stats["timed_stats"], json!([]));
    let backing = &device["backing"];
    assert_eq!(
        (&backing["node-name"], &backing["stats"]["rd_operations"], &backing["stats"]["wr_bytes"]),
        (&json!("backing-1"), &json!(counted.backing_reads.operations), &json!(0))
    );
    assert_eq!(backing["backing"]["node-name"], "backing-2");
    let nodes = ask(&json!({"query-nodes": true}));
    let names: Vec<_> =
        nodes.as_array().unwrap().iter().map(|node| node["node-name"].as_str().unwrap()).collect();
    assert_eq!(
        names,
        ["overlay-file", "overlay", "backing-1-file", "backing-1", "backing-2-file", "backing-2"]
    );
    assert!(nodes[0].get("backing").is_none() && nodes[0].get("device").is_none());
    let exports = client.events_and_reply(&execute("query-block-exports", &json!({}))).1;
    assert_eq!(
        exports["return"],
        json!([{"id": "drive0", "type": "fuse", "node-name": "overlay", "shutting-down": false}])
    );
}

#[test]
fn the_last_job_can_be_asked_for_when_it_is_gone() {
    let fixture = Fixture::new();
    let mut client = fixture.client();
    let last =
        |client: &mut Client| client.events_and_reply(&execute("x-query-last-job", &json!({}))).1;
    assert_eq!(error(&last(&mut client)), ("GenericError", "No job has finished yet"));
    let arguments = json!({"device": "drive0", "job-id": "j", "base": "middle.qcow2", "speed": 7});
    client.events_and_reply(&execute("block-stream", &arguments));
    let told = last(&mut client)["return"].take();
    assert_eq!(
        (&told["id"], &told["result"], &told["bytes-copied"]),
        (&json!("j"), &json!("success"), &json!(0))
    );
    assert_eq!(told["arguments"], arguments);

    fixture.host.fail_a_read();
    client.events_and_reply(&execute(
        "block-stream",
        &json!({"device": "drive0", "on-error": "ignore"}),
    ));
    while fixture.jobs.is_busy() {
        thread::sleep(Duration::from_millis(1));
    }
    let told = last(&mut client)["return"].take();
    assert_eq!((&told["result"], &told["error"]), (&json!("error"), &json!("Input/output error")));
    assert_eq!(
        told["error-detail"],
        "bytes 0..524288: /base.raw: reading 524288 bytes at 0: Input/output error"
    );
    let counts = ["offset", "bytes-copied", "bytes-skipped", "bytes-failed"]
        .map(|name| told[name].as_u64().unwrap());
    assert_eq!(counts, [SIZE, SIZE - CHUNK, 0, CHUNK]);

    client.events_and_reply(&execute("block-stream", &json!({"device": "drive0", "speed": 1})));
    client.events_and_reply(&execute("block-job-cancel", &json!({"device": "drive0"})));
    while fixture.jobs.is_busy() {
        thread::sleep(Duration::from_millis(1));
    }
    let told = last(&mut client)["return"].take();
    assert_eq!(
        (&told["result"], &told["error"]),
        (&json!("cancelled"), &json!("Operation canceled"))
    );
    assert!(told["end-time"]["seconds"].as_u64() >= told["start-time"]["seconds"].as_u64());
}

#[test]
fn progress_is_told_to_those_who_asked() {
    let fixture = Fixture::new();
    let (mut client, mut other) = (fixture.client(), fixture.client());
    for (interval, refused) in [(99, true), (-1, true), (i64::MAX, true), (100, false)] {
        let (_, reply) = client.events_and_reply(&execute(
            "x-job-progress-events",
            &json!({"enable": true, "interval-ms": interval}),
        ));
        assert_eq!(reply.get("error").is_some(), refused, "{interval}");
    }
    client.events_and_reply(&execute("block-stream", &json!({"device": "drive0", "speed": 1})));
    let start = Instant::now();
    let mut told = Vec::new();
    while told.len() < 3 {
        let event: Value = serde_json::from_str(&client.line()).unwrap();
        assert_eq!(event_word(&event), "X_JOB_PROGRESS");
        told.push(event["data"].clone());
    }
    assert!(start.elapsed() >= Duration::from_millis(150), "no more often than asked for");
    let last = told.pop().unwrap();
    assert_eq!(
        (&last["id"], &last["offset"], &last["bytes-copied"]),
        (&json!("drive0"), &json!(CHUNK), &json!(CHUNK))
    );
    let (_, reply) = client.events_and_reply(&execute("x-query-job-progress", &json!({})));
    assert_eq!(
        (&reply["return"][0]["len"], &reply["return"][0]["bytes-skipped"]),
        (&json!(SIZE), &json!(0))
    );
    // A client that did not enable progress events, or disabled them, gets none.
    client.events_and_reply(&execute("x-job-progress-events", &json!({"enable": false})));
    thread::sleep(Duration::from_millis(250));
    assert_eq!(client.events_and_reply(&execute("query-version", &json!({}))).0, [""; 0]);
    let (events, _) = other.events_and_reply(&execute("query-version", &json!({})));
    assert_eq!(events, ["created", "running"]);
    // No progress event of a job follows its end.
    client.events_and_reply(&execute(
        "x-job-progress-events",
        &json!({"enable": true, "interval-ms": 100}),
    ));
    let (events, _) = client.events_and_reply(&execute(
        "block-job-cancel",
        &json!({"device": "drive0", "force": true}),
    ));
    let end = events.iter().position(|word| word == "null").unwrap_or(events.len() - 1);
    assert_eq!(end, events.len() - 1, "{events:?}");
}

/// Protects: the replies about the disk match the schema, and the numbers are those of the disk.
#[test]
fn the_status_is_of_the_schema() {
    let fixture = Fixture::with(Use::CopyOnRead, |_| {});
    let disk = &fixture.disk;
    fixture.host.fail_a_write();
    disk.read(2 * CHUNK, &mut [0; 512]).unwrap();
    disk.write(0, &vec![1; CHUNK as usize]).unwrap();
    disk.write_zeroes(CHUNK..2 * CHUNK).unwrap();
    disk.flush().unwrap();
    let gone = host::Error::new(host::ErrorKind::Io, "/base.raw: gone");
    disk.note_failure("read", Some((CHUNK, 512)), &gone);
    let mut client = fixture.client();
    let mut returned = |command: &str, arguments: Value| {
        let reply = client.ask(json!({ "execute": command, "arguments": arguments }).to_string());
        let mut reply: Value = serde_json::from_str(&reply).unwrap();
        let value = reply["return"].take();
        if !value.is_null() {
            check_return(command, &value);
            return Ok(value);
        }
        Err(reply["error"]["desc"].as_str().unwrap().to_owned())
    };
    let mut status = returned("x-query-status", json!({})).unwrap();
    assert!(
        status["bytes"]["age-ms"].take().is_u64()
            && status["last-error"]["time"]["seconds"].take().is_u64()
    );
    assert_eq!(
        status["bytes"],
        json!({ "local": CHUNK, "zero": CHUNK, "remote": 6 * CHUNK, "age-ms": null })
    );
    assert_eq!(
        (&status["mountpoint"], &status["image"]),
        (&json!("/srv/disk"), &json!("/overlay.qcow2"))
    );
    assert_eq!(
        status["chain"][1],
        json!({ "filename": "/base.raw", "format": "raw", "size": SIZE, "deleted": false, "changed": false })
    );
    assert_eq!((&status["metrics"], &status["log"]), (&json!("127.0.0.1:9184"), &json!("journal")));
    let long_ago = json!({ "seconds": 0, "microseconds": 0 });
    assert_eq!(status["start-time"], long_ago);
    let failure = status["last-error"].as_object_mut().unwrap();
    failure.remove("time");
    assert_eq!(
        status["last-error"],
        json!({ "operation": "read", "offset": CHUNK, "length": 512, "message": "/base.raw: gone" })
    );
    assert_eq!(
        status["last-warning"],
        json!({ "time": long_ago, "level": "warning", "message": "no room" })
    );
    assert_eq!(
        (&status["copy-on-read-paused"], &status["image-deleted"]),
        (&json!("error"), &json!(false))
    );
    assert_eq!(
        (&status["hits"], &status["misses"], &status["commits"]),
        (&json!(0), &json!(1), &json!(disk.stats().commits))
    );
    assert_eq!(status["requests"][2]["kind"], "flush");
    let latencies = status["requests"][2]["latency"]
        .as_array()
        .unwrap()
        .iter()
        .map(|count| count.as_u64().unwrap());
    assert_eq!((&status["requests"][2]["operations"], latencies.sum()), (&json!(1), 1));
    assert_eq!(
        status["requests"][0]["latency"].as_array().unwrap().len(),
        status["latency-bounds-ns"].as_array().unwrap().len() + 1
    );
    assert_eq!(status["copied-up"], json!({ "operations": 0, "bytes": 0, "failed": 1 }));
    assert_eq!(status.get("last-job"), None);

    let cells = returned("x-query-cells", json!({ "cells": 8 })).unwrap();
    assert_eq!(
        (&cells["local"][0], &cells["zero"][1], &cells["cell-size"]),
        (&json!(CHUNK), &json!(CHUNK), &json!(CHUNK))
    );
    let page = returned("x-query-map", json!({ "limit": 1 })).unwrap();
    assert_eq!(
        (page["extents"].as_array().unwrap().len(), &page["next"]),
        (1, &page["extents"][0]["length"])
    );
    assert!(page["extents"][0]["offset"].is_u64());
    let rest = returned("x-query-map", json!({ "offset": CHUNK })).unwrap();
    assert_eq!((rest["extents"].as_array().unwrap().len(), rest.get("next")), (2, None));
    let zero = json!({ "start": CHUNK, "length": CHUNK, "depth": 0, "present": true, "zero": true, "data": false, "compressed": false });
    assert_eq!(rest["extents"][0], zero);
    assert_eq!(
        (&rest["extents"][1]["depth"], &rest["extents"][1]["offset"]),
        (&json!(2), &json!(2 * CHUNK))
    );

    let cells = "Parameter 'cells' expects a value between 1 and 65536";
    let limit = "Parameter 'limit' expects a value between 1 and 4096";
    for (command, arguments, expected) in [
        ("x-query-cells", json!({}), "Parameter 'cells' is missing"),
        ("x-query-cells", json!({ "cells": 0 }), cells),
        ("x-query-cells", json!({ "cells": -1 }), cells),
        ("x-query-cells", json!({ "cells": 65537 }), cells),
        ("x-query-map", json!({ "limit": 0 }), limit),
        ("x-query-map", json!({ "limit": 4097 }), limit),
        (
            "x-query-map",
            json!({ "offset": -1 }),
            "Parameter 'offset' expects a value between 0 and 9223372036854775807",
        ),
    ] {
        assert_eq!(returned(command, arguments).unwrap_err(), expected);
    }
}
