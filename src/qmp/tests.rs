//! Conversations over a real socket, with jobs whose worker only sleeps. What is expected was copied from sessions with qemu-storage-daemon.

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
use parking_lot::Mutex;
use serde_json::{Value, json};
use tempfile::TempDir;

use super::call::{Backend, Facts, Troubles};
use super::schema::tests::{check_event, check_return};
use super::server::Server;
use crate::chain::LayerInfo;
use crate::disk::{CopyCount, CopyPause, DiskInfo, DiskStats, GuestFailure, LATENCY_BUCKETS, RequestCount, Survey, Totals};
use crate::format::{BackingFormat, BackingReference, Qcow2Facts};
use crate::job::{ErrorAction, Failure, JobSpec, Jobs, Next, Outcome, Work};
use crate::logging::Warning;
use crate::map::{Extent, Page};
use crate::stream::{StreamOptions, Streams};

const CHUNK: u64 = 512 << 10;
const SIZE: u64 = 8 * CHUNK;

struct Fixture {
    server: Option<Server>,
    jobs: Jobs,
    quit: Receiver<()>,
    /// Failures that the workers of streams are still to meet.
    failures: Arc<Mutex<Vec<Failure>>>,
    path: PathBuf,
    _dir: TempDir,
}

/// A disk of two backing layers: `/images/overlay.qcow2` on `mid.qcow2` on `/base/base.raw`.
fn disk_info() -> DiskInfo {
    let layer = |name: &str, path: &str, format, cluster_size| LayerInfo {
        reference: BackingReference { name: name.into(), format: Some(format) },
        path: path.into(),
        format,
        size: SIZE,
        allocated_size: 4096,
        cluster_size,
        qcow2: cluster_size.map(|_| qcow2_facts()),
        identity: cluster_size.is_none().then_some((1, 2)),
        file_size: 8192,
        block_device: false,
        deleted: false,
        changed: false,
    };
    DiskInfo {
        path: "/images/overlay.qcow2".into(),
        size: SIZE,
        allocated_size: 4096,
        cluster_size: 65536,
        version: 3,
        qcow2: qcow2_facts(),
        file_size: 12288,
        block_device: false,
        deleted: false,
        read_only: false,
        copy_on_read: true,
        backing: vec![
            layer("mid.qcow2", "/images/mid.qcow2", BackingFormat::Qcow2, Some(65536)),
            layer("../base/base.raw", "/base/base.raw", BackingFormat::Raw, None),
        ],
    }
}

fn qcow2_facts() -> Qcow2Facts {
    Qcow2Facts {
        compat: "1.1".into(),
        compression_type: "zlib".into(),
        lazy_refcounts: Some(false),
        refcount_bits: 16,
        corrupt: Some(false),
        extended_l2: Some(false),
    }
}

fn disk_stats() -> DiskStats {
    let count = |n| {
        let mut latency = [0; LATENCY_BUCKETS];
        latency[0] = n;
        RequestCount { bytes: n * 512, operations: n, failed: 1, time: Duration::from_nanos(n), latency }
    };
    DiskStats {
        reads: count(1),
        writes: count(2),
        flushes: count(3),
        discards: count(4),
        backing_reads: count(5),
        misses: 1,
        copied_up: CopyCount { bytes: 65536, operations: 1, failed: 2 },
        streamed: 3,
        commits: 4,
        highest_written: 6,
        idle: Some(Duration::from_nanos(7)),
    }
}

/// 8 chunks, of which the first is local and the second zero.
fn facts() -> Facts {
    let cells = |first: usize| (0..8).map(move |cell| if cell == first { CHUNK } else { 0 }).collect();
    let extent = |start, length, depth| Extent {
        start,
        length,
        depth,
        present: true,
        zero: false,
        data: true,
        compressed: depth == 1,
        offset: (depth != 1).then_some(start + 7),
    };
    Facts {
        mountpoint: "/srv/disk".into(),
        started: std::time::UNIX_EPOCH,
        metrics: Some(([127, 0, 0, 1], 9184).into()),
        log: Some("journal".into()),
        is_usable: Box::new(|| true),
        troubles: Box::new(|| Troubles {
            failure: Some(GuestFailure {
                time: std::time::UNIX_EPOCH,
                operation: "read",
                range: Some((CHUNK, 512)),
                message: "/base/base.raw: gone".into(),
            }),
            copy_pause: Some(CopyPause::Reserve),
            warning: Some(Warning { level: log::Level::Warn, time: std::time::UNIX_EPOCH, message: "no room".into() }),
        }),
        is_answering: Box::new(|| true),
        totals: Box::new(|| Ok(Totals { local: CHUNK, zero: CHUNK, remote: SIZE - 2 * CHUNK, age: Duration::from_millis(8) })),
        survey: Box::new(move |_| Ok(Arc::new(Survey { size: SIZE, cell_size: CHUNK, local: cells(0), zero: cells(1) }))),
        extents: Box::new(move |from, limit| {
            let extents = (0..8).map(|chunk| extent(chunk * CHUNK, CHUNK, chunk as usize % 3));
            let mut rest = extents.filter(|extent| extent.start >= from);
            let page = rest.by_ref().take(limit).collect();
            Ok(Page { extents: page, next: rest.next().map(|extent| extent.start) })
        }),
    }
}

fn stream(jobs: &Jobs, failures: &Arc<Mutex<Vec<Failure>>>, options: StreamOptions) -> crate::Result<()> {
    let StreamOptions { job_id, depth, speed, on_error, auto_finalize, auto_dismiss, request, .. } = options;
    let len = if depth == Some(0) { 0 } else { SIZE };
    let control = jobs.create(JobSpec { id: job_id, kind: "stream", len, speed, auto_finalize, auto_dismiss, on_error, request })?;
    control.start();
    let failures = Arc::clone(failures);
    thread::spawn(move || {
        let (mut offset, mut skipped) = (0, None);
        while offset < len {
            if control.checkpoint() == Next::Cancel {
                return control.finish(Outcome::Cancelled, || unreachable!());
            }
            let failure = failures.lock().pop();
            if let Some(failure) = failure {
                match control.error(&failure) {
                    ErrorAction::Report => return control.finish(Outcome::Failed(failure), || unreachable!()),
                    ErrorAction::Stop => continue,
                    ErrorAction::Ignore => skipped = Some(failure),
                }
            }
            control.advance(CHUNK, Work { copied: CHUNK, ..Work::default() });
            offset += CHUNK;
        }
        control.finish(skipped.map_or(Outcome::Done, Outcome::Failed), || Ok(()));
    });
    Ok(())
}

impl Fixture {
    fn new() -> Fixture {
        Self::with_disk(disk_info())
    }

    fn with_disk(info: DiskInfo) -> Fixture {
        let too_large = || crate::Error::new(crate::ErrorKind::InvalidArgument, "too large");
        Self::with(info, move |size| if size < 1 << 40 { Ok(()) } else { Err(too_large()) })
    }

    fn with(info: DiskInfo, grow: impl Fn(u64) -> crate::Result<()> + Send + Sync + 'static) -> Fixture {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("qmp");
        let (jobs, failures) = (Jobs::new(), Arc::default());
        let (sender, quit) = crossbeam_channel::bounded(1);
        let start_stream = {
            let (jobs, failures) = (jobs.clone(), Arc::clone(&failures));
            Box::new(move |options| stream(&jobs, &failures, options))
        };
        let backend = Backend {
            jobs: jobs.clone(),
            streams: Streams::keeping(&jobs, "drive0", jiff::tz::TimeZone::UTC, Box::new(|_| Ok(()))),
            device: "drive0".into(),
            quit: sender,
            starting: Arc::default(),
            info: Box::new(move || Ok(info.clone())),
            stats: Box::new(disk_stats),
            facts: facts(),
            is_file: Arc::new(|path, file| path == "/images/alias.raw" && file == (1, 2)),
            grow: Box::new(grow),
            start_stream,
        };
        let server = Some(Server::with_backend(super::socket::Socket::listen(&path).unwrap(), backend).unwrap());
        Fixture { server, jobs, quit, failures, path, _dir: dir }
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
        assert_eq!(client.ask(r#"{"execute":"qmp_capabilities","arguments":{"enable":["oob"]}}"#), r#"{"return": {}}"#);
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

    /// The next line; empty at the end.
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

    /// The names of the events up to the next reply, and what it says; all of them as the schema has it. A status change is named by its status.
    fn events_and_reply(&mut self, text: &str) -> (Vec<String>, Value) {
        self.send(text);
        let mut events = Vec::new();
        loop {
            let value: Value = serde_json::from_str(&self.line()).unwrap();
            match value.get("event") {
                Some(_) => events.push(event_word(&value)),
                None => {
                    let request: Value = serde_json::from_str(text).unwrap();
                    if let (Some(returned), Some(command)) = (value.get("return"), request["execute"].as_str()) {
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
    let word = if event["event"] == "JOB_STATUS_CHANGE" { &event["data"]["status"] } else { &event["event"] };
    word.as_str().unwrap().to_string()
}

fn execute(name: &str, arguments: &Value) -> String {
    json!({ "execute": name, "arguments": arguments }).to_string()
}

fn error(reply: &Value) -> (&str, &str) {
    (reply["error"]["class"].as_str().unwrap_or_default(), reply["error"]["desc"].as_str().unwrap_or_default())
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
    let many: String = (0..2000).map(|i| format!(r#"{{'execute':'query-block-jobs','id':{i}}}"#)).collect();
    // More than the sockets and the outbox hold: the server stops reading instead of dropping the client.
    let mut sender = Client { reader: BufReader::new(client.reader.get_ref().try_clone().unwrap()) };
    let sending = thread::spawn(move || (0..20).for_each(|_| sender.send(&many)));
    thread::sleep(Duration::from_millis(50));
    for i in (0..2000).cycle().take(40_000) {
        assert_eq!(client.line(), format!(r#"{{"return": [], "id": {i}}}"#));
    }
    sending.join().unwrap();
}

/// Values as deep as they may be, wherever they are parsed, kept, printed and dropped.
#[test]
fn depth_is_bounded_and_survived() {
    let mut fixture = Fixture::new();
    let mut client = fixture.client();
    let deep = |depth: usize| format!("{}1{}", r#"{"a":"#.repeat(depth), "}".repeat(depth));
    let printed = deep(1023).replace(':', ": ");
    let reply = client.ask(format!(r#"{{"execute":"query-jobs","id":{}}}"#, deep(1023)));
    assert_eq!(reply, format!(r#"{{"return": [], "id": {printed}}}"#));
    let reply = client.ask(format!(r#"{{"execute":"query-jobs","arguments":{}}}"#, deep(1023)));
    assert_eq!(reply, r#"{"error": {"class": "GenericError", "desc": "Parameter 'a' is unexpected"}}"#);
    assert_eq!(
        client.ask(format!(r#"{{"execute":"query-jobs","id":{}"#, deep(1024))),
        r#"{"error": {"class": "GenericError", "desc": "JSON nesting depth limit exceeded"}}"#
    );
    let (mut watcher, mut client) = (fixture.client(), fixture.client());
    client.send(format!(r#"{{"execute":"quit","id":{}}}"#, deep(1023)));
    fixture.quit.recv_timeout(Duration::from_secs(10)).unwrap();
    fixture.server.take().unwrap().shutdown(&Err(crate::Error::new(crate::ErrorKind::Io, "too bad")));
    for client in [&mut client, &mut watcher] {
        assert!(client.line().contains("SHUTDOWN"));
        assert!(
            client.line().contains(r#""event": "X_CLOSE_FAILED", "data": {"error": "too bad"}"#),
            "all are told, not only who asked to quit"
        );
    }
    assert_eq!(client.line(), format!(r#"{{"id": {printed}, "error": {{"class": "GenericError", "desc": "too bad"}}}}"#));
}

#[test]
fn a_stream_tells_its_life_in_order() {
    let fixture = Fixture::new();
    let (mut client, mut watcher, mut stranger) = (fixture.client(), fixture.client(), fixture.stranger());
    let (events, reply) = client.events_and_reply(&execute("block-stream", &json!({"device": "drive0"})));
    assert_eq!((events, reply), (vec!["created".into(), "running".into()], ok()));
    assert_eq!(client.events(3), ["waiting", "pending", "BLOCK_JOB_COMPLETED"]);
    let (events, reply) = client.events_and_reply(&execute("query-block-jobs", &json!({})));
    assert_eq!((events, reply), (vec!["concluded".into(), "null".into()], json!({"return": []})));
    assert_eq!(watcher.events(7), ["created", "running", "waiting", "pending", "BLOCK_JOB_COMPLETED", "concluded", "null"]);
    assert!(stranger.ask(r#"{"execute":"qmp_capabilities"}"#) == r#"{"return": {}}"#, "no event before or after");
    assert_eq!(stranger.ask(r#"{"execute":"query-jobs"}"#), r#"{"return": []}"#);
}

#[test]
fn the_completed_event_has_the_members_of_2012() {
    let fixture = Fixture::new();
    let mut client = fixture.client();
    client.events_and_reply(&execute("block_stream", &json!({"device": "drive0"})));
    client.events(2);
    let event: Value = serde_json::from_str(&client.line()).unwrap();
    assert_eq!(event["data"], json!({"type": "stream", "device": "drive0", "len": SIZE, "offset": SIZE, "speed": 0}));
    assert!(event["timestamp"]["seconds"].as_i64().unwrap() > 1_600_000_000 && event["timestamp"]["microseconds"].is_u64());
}

#[test]
fn nothing_to_do_is_done_before_the_reply() {
    let fixture = Fixture::new();
    let mut client = fixture.client();
    for arguments in [
        json!({"device": "drive0", "base": "mid.qcow2"}),
        json!({"device": "overlay", "job-id": "j", "bottom": "overlay"}),
        json!({"device": "drive0", "base-node": "backing-1", "backing-file": "x"}),
    ] {
        let (events, reply) = client.events_and_reply(&execute("block-stream", &arguments));
        assert_eq!(events, ["created", "running", "waiting", "pending", "BLOCK_JOB_COMPLETED", "concluded", "null"]);
        assert_eq!(reply, ok());
    }
}

#[test]
fn a_limited_job_obeys() {
    let fixture = Fixture::new();
    let mut client = fixture.client();
    client.events_and_reply(&execute("block-stream", &json!({"device": "drive0", "job-id": "j", "speed": 1})));
    while fixture.jobs.query()[0].busy || fixture.jobs.query()[0].progress.offset == 0 {
        thread::sleep(Duration::from_millis(1));
    }
    let text = r#"{"return": [{"auto-finalize": true, "io-status": "ok", "device": "j", "auto-dismiss": true, "busy": false, "len": 4194304, "offset": 524288, "status": "running", "paused": false, "speed": 1, "ready": false, "type": "stream"}]}"#;
    assert_eq!(client.ask(execute("query-block-jobs", &json!({}))), text);
    let text = r#"{"return": [{"current-progress": 524288, "status": "running", "total-progress": 4194304, "type": "stream", "id": "j"}]}"#;
    assert_eq!(client.ask(execute("query-jobs", &json!({}))), text);

    let none: &[&str] = &[];
    for (name, arguments, events, desc) in [
        ("block-stream", json!({"device": "drive0"}), none, "Node 'drive0' is busy: block device is in use by block job: stream"),
        ("block-stream", json!({"device": "backing-1"}), none, "Node 'backing-1' is busy: block device is in use by block job: stream"),
        ("block_stream", json!({"device": "drive0"}), none, "Device 'drive0' is in use"),
        ("block-job-pause", json!({"device": "j"}), &["paused"], ""),
        ("job-pause", json!({"id": "j"}), none, "Job is already paused"),
        ("block-job-cancel", json!({"device": "j"}), none, "The block job for device 'j' is currently paused"),
        ("block-job-set-speed", json!({"device": "j", "speed": -1}), none, "Parameter 'speed' expects a non-negative value"),
        ("block_job_set_speed", json!({"device": "j", "value": 5}), none, ""),
        ("job-complete", json!({"id": "j"}), none, "Job 'j' in state 'paused' cannot accept command verb 'complete'"),
        ("block-job-finalize", json!({"id": "j"}), none, "Job 'j' in state 'paused' cannot accept command verb 'finalize'"),
        ("job-dismiss", json!({"id": "j"}), none, "Job 'j' in state 'paused' cannot accept command verb 'dismiss'"),
        ("block_job_resume", json!({"device": "j"}), &["running"], ""),
        ("job-resume", json!({"id": "j"}), none, "Can't resume a job that was not paused"),
        ("block-job-pause", json!({"device": "j"}), &["paused"], ""),
        ("job-cancel", json!({"id": "j"}), &["running", "aborting", "BLOCK_JOB_CANCELLED", "concluded", "null"], ""),
        ("job-cancel", json!({"id": "j"}), none, "Job not found"),
    ] {
        let (seen, reply) = client.events_and_reply(&execute(name, &arguments));
        assert_eq!(seen, events, "{name}");
        assert_eq!(error(&reply).1, desc, "{name}");
    }
    let (_, reply) = client.events_and_reply(&execute("block-job-set-speed", &json!({"device": "j", "speed": -1})));
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
        ("job-pause", json!({"id": "drive0"}), vec![], "Job 'drive0' in state 'pending' cannot accept command verb 'pause'"),
        ("job-finalize", json!({"id": "drive0"}), vec!["BLOCK_JOB_COMPLETED", "concluded"], ""),
        ("job-cancel", json!({"id": "drive0"}), vec![], "Job 'drive0' in state 'concluded' cannot accept command verb 'cancel'"),
        ("block-stream", manual.clone(), vec![], "Node 'drive0' is busy: block device is in use by block job: stream"),
        ("block-job-dismiss", json!({"id": "drive0"}), vec!["null"], ""),
    ] {
        let (seen, reply) = client.events_and_reply(&execute(name, &arguments));
        assert_eq!(seen, events, "{name}");
        assert_eq!(error(&reply).1, desc, "{name}");
    }
    client.events_and_reply(&execute("block-stream", &json!({"device": "drive0", "auto-finalize": false})));
    client.events(3);
    let (seen, _) = client.events_and_reply(&execute("block-job-cancel", &json!({"device": "drive0"})));
    assert_eq!(seen, ["aborting", "BLOCK_JOB_CANCELLED", "concluded", "null"]);
}

#[test]
fn errors_follow_the_policy() {
    let fixture = Fixture::new();
    let mut client = fixture.client();
    let eio = Failure { text: "Input/output error".into(), ..Failure::default() };
    let enospc = Failure { text: "No space left on device".into(), no_space: true, ..Failure::default() };
    let fail = |failures: &[&Failure]| fixture.failures.lock().extend(failures.iter().map(|&failure| failure.clone()));
    let stream = |policy: &str| execute("block-stream", &json!({"device": "drive0", "on-error": policy}));

    fail(&[&eio]);
    client.events_and_reply(&stream("report"));
    assert_eq!(client.events(2), ["BLOCK_JOB_ERROR", "aborting"]);
    let event: Value = serde_json::from_str(&client.line()).unwrap();
    assert_eq!((&event["data"]["error"], &event["data"]["offset"]), (&json!("Input/output error"), &json!(0)));
    client.events(2);

    fail(&[&eio]);
    client.events_and_reply(&stream("ignore"));
    assert_eq!(client.events(2), ["BLOCK_JOB_ERROR", "aborting"]);
    let event: Value = serde_json::from_str(&client.line()).unwrap();
    assert_eq!((&event["data"]["error"], &event["data"]["offset"]), (&json!("Input/output error"), &json!(SIZE)));
    client.events(2);

    fail(&[&enospc]);
    client.events_and_reply(&stream("enospc"));
    assert_eq!(client.events(2), ["BLOCK_JOB_ERROR", "paused"]);
    let (_, reply) = client.events_and_reply(&execute("query-block-jobs", &json!({})));
    assert_eq!(reply["return"][0]["io-status"], "nospace");
    let (events, _) = client.events_and_reply(&execute("block-job-resume", &json!({"device": "drive0"})));
    assert_eq!(events, ["running"]);
    assert_eq!(client.events(5), ["waiting", "pending", "BLOCK_JOB_COMPLETED", "concluded", "null"]);
}

#[test]
fn streams_that_cannot_be_are_refused() {
    let fixture = Fixture::new();
    let mut client = fixture.client();
    let generic = "GenericError";
    for (name, arguments, class, desc) in [
        ("block-stream", json!({"device": "nope"}), generic, "Cannot find device='nope' nor node-name='nope'"),
        ("block_stream", json!({"device": "nope"}), "DeviceNotFound", "Device 'nope' not found"),
        ("block-stream", json!({"device": "drive0", "base": "zz"}), generic, "Can't find 'zz' in the backing chain"),
        ("block_stream", json!({"device": "drive0", "base": "zz"}), generic, "Base 'zz' not found"),
        ("block-stream", json!({"device": "backing-1", "base": "mid.qcow2"}), generic, "Can't find 'mid.qcow2' in the backing chain"),
        ("block-stream", json!({"device": "overlay"}), generic, "Invalid job ID ''"),
        ("block-stream", json!({"device": "drive0", "job-id": "1x", "speed": -1}), generic, "Invalid job ID '1x'"),
        ("block-stream", json!({"device": "backing-1", "job-id": "j"}), generic, "Block node is read-only"),
        ("block_stream", json!({"device": "backing-1", "job-id": "j"}), generic, "Not supported"),
        (
            "block-stream",
            json!({"device": "nope", "base": "a", "base-node": "b"}),
            generic,
            "'base' and 'base-node' cannot be specified at the same time",
        ),
        ("block-stream", json!({"device": "drive0", "base-node": "overlay"}), generic, "Node 'overlay' is not a backing image of 'drive0'"),
        ("block-stream", json!({"device": "overlay-file", "job-id": "j"}), generic, "Block node is read-only"),
        (
            "block-stream",
            json!({"device": "drive0", "base-node": "backing-1-file"}),
            generic,
            "Node 'backing-1-file' is not a backing image of 'drive0'",
        ),
        ("block-stream", json!({"device": "drive0", "base": "other.raw"}), generic, "Can't find 'other.raw' in the backing chain"),
        ("block-stream", json!({"device": "drive0", "base-node": "x"}), generic, "Cannot find device='' nor node-name='x'"),
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
    let (events, reply) = client.events_and_reply(&execute("block-stream", &json!({"device": "drive0", "speed": -1})));
    assert_eq!((error(&reply).1, events), ("Parameter 'speed' expects a non-negative value", vec!["created".into(), "null".into()]));

    let fixture = Fixture::with_disk(DiskInfo { read_only: true, ..disk_info() });
    let (_, reply) = fixture.client().events_and_reply(&execute("block-stream", &json!({"device": "drive0"})));
    assert_eq!(error(&reply), (generic, "Block node is read-only"));
}

/// Protects: a base is found by what its path leads to, where no name of the chain is the same.
#[test]
fn a_base_is_a_file_by_whatever_name() {
    let fixture = Fixture::new();
    let mut client = fixture.client();
    let (events, reply) = client.events_and_reply(&execute("block-stream", &json!({"device": "drive0", "base": "alias.raw", "speed": 1})));
    assert_eq!((events, reply), (vec!["created".into(), "running".into()], ok()));
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
    assert_eq!(disk["inserted"]["image"]["backing-image"]["backing-image"]["filename"], "/base/base.raw");
    let (_, reply) = client.events_and_reply(&execute("query-named-block-nodes", &json!({"flat": true})));
    let names: Vec<_> = reply["return"].as_array().unwrap().iter().map(|node| node["node-name"].as_str().unwrap()).collect();
    assert_eq!(names, ["overlay", "overlay-file", "backing-1", "backing-1-file", "backing-2", "backing-2-file"]);
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
    let events = ["SHUTDOWN", "BLOCK_EXPORT_DELETED", "aborting", "BLOCK_JOB_CANCELLED", "concluded", "null"];
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
                on_error: crate::job::OnError::Report,
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

/// Whoever the file lets in. Needs root, to be somebody else.
#[test]
fn nobody_but_the_owner_and_root_is_served() {
    const SAY: &str = "import socket, sys; s = socket.socket(socket.AF_UNIX); s.connect(sys.argv[1]); print(len(s.recv(1000)))";
    let fixture = Fixture::new();
    let say = |uid: &str| {
        let mut command = Command::new("setpriv");
        // The system's Python: one in root's home is nobody else's.
        command.env("PATH", "/usr/bin:/bin").current_dir("/");
        let path = fixture.path.as_os_str();
        let done = command.args(["--reuid", uid, "--regid", uid, "--clear-groups", "python3", "-c", SAY]).arg(path).output().ok()?;
        done.status.success().then(|| String::from_utf8(done.stdout).unwrap().trim().parse::<usize>().unwrap())
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

/// A byte may be echoed as six: such a reply is longer than all the events that may wait.
#[test]
fn the_longest_request_is_answered() {
    let fixture = Fixture::new();
    let mut client = fixture.client();
    let id = "\u{7f}".repeat((1 << 20) - 100);
    let request = format!(r#"{{"execute":"query-jobs","id":"{id}"}}"#);
    let mut sender = client.reader.get_ref().try_clone().unwrap();
    let sending = thread::spawn(move || sender.write_all(request.as_bytes()).unwrap());
    assert_eq!(client.line(), format!(r#"{{"return": [], "id": "{}"}}"#, r"\u007F".repeat(id.len())));
    sending.join().unwrap();
    assert_eq!(client.ask(r#"{"execute":"query-jobs"}"#), r#"{"return": []}"#);
}

/// A client that sends no more, and reads nothing of what it asked for: it used to be forgotten while its writer was still at work, so that it had no
/// place among the 32, and the end of the server waited for it.
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

/// Texts of qemu-storage-daemon, but for the one on shrinking, which it does.
#[test]
fn the_disk_grows_and_never_shrinks() {
    let fixture = Fixture::new();
    let mut client = fixture.client();
    let mut refusals = |table: &[(Value, &str)]| {
        for (arguments, desc) in table {
            let (_, reply) = client.events_and_reply(&execute("block_resize", arguments));
            assert_eq!(error(&reply), if desc.is_empty() { ("", "") } else { ("GenericError", *desc) }, "{arguments}");
        }
    };
    refusals(&[
        (json!({"size": 512}), "Cannot find device='' nor node-name=''"),
        (json!({"size": 512, "device": "overlay"}), "Cannot find device='overlay' nor node-name=''"),
        (json!({"size": -1, "node-name": "x"}), "Cannot find device='' nor node-name='x'"),
        (json!({"size": -1, "device": "drive0"}), "Parameter 'size' expects a >0 size"),
        (json!({"device": "drive0"}), "Parameter 'size' is missing"),
        (json!({"size": 1000, "node-name": "overlay"}), "The new size must be a multiple of 512"),
        (json!({"size": SIZE, "node-name": "backing-2"}), "Node 'backing-2' is busy: node is used as backing hd of 'backing-1'"),
        (json!({"size": SIZE - 512, "device": "drive0"}), "Shrinking is not supported: the disk has 4194304 bytes"),
        (json!({"size": 1_u64 << 41, "device": "drive0"}), "too large"),
        (json!({"size": SIZE, "device": "drive0"}), ""),
        (json!({"size": SIZE + 512, "device": "x", "node-name": "overlay"}), ""),
    ]);
    fixture.client().events_and_reply(&execute("block-stream", &json!({"device": "drive0", "speed": 1})));
    refusals(&[
        (json!({"size": -1, "device": "drive0"}), "Parameter 'size' expects a >0 size"),
        (json!({"size": 513, "device": "drive0"}), "Node 'drive0' is busy: block device is in use by block job: stream"),
        (json!({"size": 513, "node-name": "overlay"}), "Node 'overlay' is busy: block device is in use by block job: stream"),
    ]);
    let fixture = Fixture::with_disk(DiskInfo { read_only: true, ..disk_info() });
    let (_, reply) = fixture.client().events_and_reply(&execute("block_resize", &json!({"device": "drive0", "size": SIZE + 512})));
    assert_eq!(error(&reply), ("GenericError", "Image is read-only"));
}

/// A fixture whose disk says when it begins to grow, and has grown when it is told so.
fn slow_to_grow() -> (Fixture, Receiver<u64>, crossbeam_channel::Sender<()>) {
    let (began, begins) = crossbeam_channel::unbounded();
    let (go_on, told) = crossbeam_channel::unbounded();
    let grow = move |size| {
        began.send(size).unwrap();
        let _ = told.recv();
        Ok(())
    };
    (Fixture::with(disk_info(), grow), begins, go_on)
}

/// Once the jobs are closed, the disk may be: who changes its size is waited for, and nobody begins to.
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

/// One that waits for a backing file, for ever.
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

/// Copied from a session with qemu-storage-daemon.
#[test]
fn a_stream_cannot_be_changed() {
    let fixture = Fixture::new();
    let mut client = fixture.client();
    client.events_and_reply(&execute("block-stream", &json!({"device": "drive0", "job-id": "j", "speed": 1})));
    for (arguments, expected) in [
        (json!({"id": "x", "type": "stream"}), ("DeviceNotActive", "Block job 'x' not found")),
        (json!({"id": "j"}), ("GenericError", "Parameter 'type' is missing")),
        (json!({"id": "x", "type": "mirror"}), ("GenericError", "Parameter 'copy-mode' is missing")),
        (json!({"id": "j", "type": "stream", "copy-mode": "background"}), ("GenericError", "Parameter 'copy-mode' is unexpected")),
        (json!({"id": "j", "type": "xx"}), ("GenericError", "Parameter 'type' does not accept value 'xx'")),
        (json!({"id": "j", "type": "stream"}), ("GenericError", "Job type does not support change")),
        (json!({"id": "j", "type": "mirror", "copy-mode": "background"}), ("GenericError", "Job type does not support change")),
    ] {
        assert_eq!(error(&client.events_and_reply(&execute("block-job-change", &arguments)).1), expected, "{arguments}");
    }
}

#[test]
fn statistics_are_told_as_qemu_does() {
    let fixture = Fixture::new();
    let mut client = fixture.client();
    let mut ask = |arguments: &Value| client.events_and_reply(&execute("query-blockstats", arguments)).1["return"].take();
    let device = ask(&json!({}));
    assert_eq!(device.as_array().unwrap().len(), 1);
    let device = &device[0];
    assert_eq!((&device["device"], &device["node-name"]), (&json!("drive0"), &json!("overlay")));
    let stats = &device["stats"];
    assert_eq!(stats.as_object().unwrap().len(), 33, "all that QEMU 10.2 has");
    for (name, value) in [
        ("rd_bytes", 512),
        ("wr_operations", 2),
        ("flush_total_time_ns", 3),
        ("failed_unmap_operations", 1),
        ("zone_append_bytes", 0),
        ("wr_highest_offset", 6),
        ("idle_time_ns", 7),
    ] {
        assert_eq!(stats[name], value, "{name}");
    }
    assert_eq!(stats["timed_stats"], json!([]));
    let backing = &device["backing"];
    assert_eq!(
        (&backing["node-name"], &backing["stats"]["rd_operations"], &backing["stats"]["wr_bytes"]),
        (&json!("backing-1"), &json!(5), &json!(0))
    );
    assert_eq!(backing["backing"]["node-name"], "backing-2");
    let nodes = ask(&json!({"query-nodes": true}));
    let names: Vec<_> = nodes.as_array().unwrap().iter().map(|node| node["node-name"].as_str().unwrap()).collect();
    assert_eq!(names, ["overlay-file", "overlay", "backing-1-file", "backing-1", "backing-2-file", "backing-2"]);
    assert!(nodes[0].get("backing").is_none() && nodes[0].get("device").is_none());
    let exports = client.events_and_reply(&execute("query-block-exports", &json!({}))).1;
    assert_eq!(exports["return"], json!([{"id": "drive0", "type": "fuse", "node-name": "overlay", "shutting-down": false}]));
}

#[test]
fn the_last_job_can_be_asked_for_when_it_is_gone() {
    let fixture = Fixture::new();
    let mut client = fixture.client();
    let last = |client: &mut Client| client.events_and_reply(&execute("x-query-last-job", &json!({}))).1;
    assert_eq!(error(&last(&mut client)), ("GenericError", "No job has finished yet"));
    let arguments = json!({"device": "drive0", "job-id": "j", "base": "mid.qcow2", "speed": 7});
    client.events_and_reply(&execute("block-stream", &arguments));
    let told = last(&mut client)["return"].take();
    assert_eq!((&told["id"], &told["result"], &told["bytes-copied"]), (&json!("j"), &json!("success"), &json!(0)));
    assert_eq!(told["arguments"], arguments);

    *fixture.failures.lock() =
        vec![Failure { text: "Input/output error".into(), detail: "b.raw at 7: Input/output error".into(), no_space: false }];
    client.events_and_reply(&execute("block-stream", &json!({"device": "drive0", "on-error": "ignore"})));
    while fixture.jobs.is_busy() {
        thread::sleep(Duration::from_millis(1));
    }
    let told = last(&mut client)["return"].take();
    assert_eq!((&told["result"], &told["error"]), (&json!("error"), &json!("Input/output error")));
    assert_eq!(told["error-detail"], json!("b.raw at 7: Input/output error"));
    assert_eq!((&told["offset"], &told["bytes-copied"], &told["bytes-skipped"]), (&json!(SIZE), &json!(SIZE), &json!(0)));

    client.events_and_reply(&execute("block-stream", &json!({"device": "drive0", "speed": 1})));
    client.events_and_reply(&execute("block-job-cancel", &json!({"device": "drive0"})));
    while fixture.jobs.is_busy() {
        thread::sleep(Duration::from_millis(1));
    }
    let told = last(&mut client)["return"].take();
    assert_eq!((&told["result"], &told["error"]), (&json!("cancelled"), &json!("Operation canceled")));
    assert!(told["end-time"]["seconds"].as_u64() >= told["start-time"]["seconds"].as_u64());
}

#[test]
fn progress_is_told_to_those_who_asked() {
    let fixture = Fixture::new();
    let (mut client, mut other) = (fixture.client(), fixture.client());
    for (interval, refused) in [(99, true), (-1, true), (i64::MAX, true), (100, false)] {
        let (_, reply) = client.events_and_reply(&execute("x-job-progress-events", &json!({"enable": true, "interval-ms": interval})));
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
    assert_eq!((&last["id"], &last["offset"], &last["bytes-copied"]), (&json!("drive0"), &json!(CHUNK), &json!(CHUNK)));
    let (_, reply) = client.events_and_reply(&execute("x-query-job-progress", &json!({})));
    assert_eq!((&reply["return"][0]["len"], &reply["return"][0]["bytes-skipped"]), (&json!(SIZE), &json!(0)));
    // Who did not ask, and who asks no more, is told nothing.
    client.events_and_reply(&execute("x-job-progress-events", &json!({"enable": false})));
    thread::sleep(Duration::from_millis(250));
    assert_eq!(client.events_and_reply(&execute("query-version", &json!({}))).0, [""; 0]);
    let (events, _) = other.events_and_reply(&execute("query-version", &json!({})));
    assert_eq!(events, ["created", "running"]);
    // Nothing is told of a job after its end.
    client.events_and_reply(&execute("x-job-progress-events", &json!({"enable": true, "interval-ms": 100})));
    let (events, _) = client.events_and_reply(&execute("block-job-cancel", &json!({"device": "drive0", "force": true})));
    let end = events.iter().position(|word| word == "null").unwrap_or(events.len() - 1);
    assert_eq!(end, events.len() - 1, "{events:?}");
}

/// Protects: what clients are told of the disk is what the schema says, and the numbers are those of the disk.
#[test]
fn the_status_is_of_the_schema() {
    let fixture = Fixture::new();
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
    let status = returned("x-query-status", json!({})).unwrap();
    assert_eq!(status["bytes"], json!({ "local": CHUNK, "zero": CHUNK, "remote": 6 * CHUNK, "age-ms": 8 }));
    assert_eq!((&status["mountpoint"], &status["image"]), (&json!("/srv/disk"), &json!("/images/overlay.qcow2")));
    assert_eq!(
        status["chain"][1],
        json!({ "filename": "/base/base.raw", "format": "raw", "size": SIZE, "deleted": false, "changed": false })
    );
    assert_eq!((&status["metrics"], &status["log"]), (&json!("127.0.0.1:9184"), &json!("journal")));
    let long_ago = json!({ "seconds": 0, "microseconds": 0 });
    let failure = json!({ "time": long_ago, "operation": "read", "offset": CHUNK, "length": 512, "message": "/base/base.raw: gone" });
    assert_eq!(status["last-error"], failure);
    assert_eq!(status["last-warning"], json!({ "time": long_ago, "level": "warning", "message": "no room" }));
    assert_eq!((&status["copy-on-read-paused"], &status["image-deleted"]), (&json!("reserve"), &json!(false)));
    assert_eq!((&status["hits"], &status["misses"], &status["commits"]), (&json!(0), &json!(1), &json!(4)));
    assert_eq!(status["requests"][2]["kind"], "flush");
    assert_eq!((&status["requests"][2]["operations"], &status["requests"][2]["latency"][0]), (&json!(3), &json!(3)));
    assert_eq!(status["requests"][0]["latency"].as_array().unwrap().len(), status["latency-bounds-ns"].as_array().unwrap().len() + 1);
    assert_eq!(status["copied-up"], json!({ "operations": 1, "bytes": 65536, "failed": 2 }));
    assert_eq!(status.get("last-job"), None);

    let cells = returned("x-query-cells", json!({ "cells": 8 })).unwrap();
    assert_eq!((&cells["local"][0], &cells["zero"][1], &cells["cell-size"]), (&json!(CHUNK), &json!(CHUNK), &json!(CHUNK)));
    let page = returned("x-query-map", json!({ "limit": 3 })).unwrap();
    assert_eq!((page["extents"].as_array().unwrap().len(), &page["next"]), (3, &json!(3 * CHUNK)));
    assert_eq!((page["extents"][0].get("offset"), page["extents"][1].get("offset")), (Some(&json!(7)), None));
    let rest = returned("x-query-map", json!({ "offset": 3 * CHUNK })).unwrap();
    assert_eq!((rest["extents"].as_array().unwrap().len(), rest.get("next")), (5, None));

    let cells = "Parameter 'cells' expects a value between 1 and 65536";
    let limit = "Parameter 'limit' expects a value between 1 and 4096";
    for (command, arguments, expected) in [
        ("x-query-cells", json!({}), "Parameter 'cells' is missing"),
        ("x-query-cells", json!({ "cells": 0 }), cells),
        ("x-query-cells", json!({ "cells": -1 }), cells),
        ("x-query-cells", json!({ "cells": 65537 }), cells),
        ("x-query-map", json!({ "limit": 0 }), limit),
        ("x-query-map", json!({ "limit": 4097 }), limit),
        ("x-query-map", json!({ "offset": -1 }), "Parameter 'offset' expects a value between 0 and 9223372036854775807"),
    ] {
        assert_eq!(returned(command, arguments).unwrap_err(), expected);
    }
}
