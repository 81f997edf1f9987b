//! The metrics of `--metrics`: their values match the work that was done, every HTTP client can
//! read them, whatever other clients send; and the dashboard that shows them.

use std::collections::BTreeSet;
use std::net::{TcpListener, TcpStream};
use std::process::Command;
use std::time::Duration;

use serde_json::{Value, json};

use crate::bad_input::refused_in;
use crate::support::metrics::{Scrape, address, ask};
use crate::support::{CLUSTER, Daemon, MIB, Rig, read_at, run_ok, wait_until, within};

const ANY_PORT: &[&str] = &["--metrics", "127.0.0.1:0", "--sandbox", "require"];

/// One read that misses, one that hits, one write in place, one discard of a whole cluster, one
/// fsync. Separate processes do this work: a test beside this one that starts a program has a copy
/// of this test's descriptors for a moment, and its close of them is one more flush.
fn some_work(rig: &Rig, disk: &Daemon) {
    let words = |words: &str| words.split(' ').map(str::to_owned).collect::<Vec<_>>();
    let (path, input) =
        (disk.path().to_str().expect("UTF-8"), rig.scratch.write("input", &[7; 300]));
    let dd = |from: &str, to: &str, how: &str| {
        run_ok(
            Command::new("dd")
                .args(["status=none", &format!("if={from}"), &format!("of={to}")])
                .args(words(how)),
        );
    };
    dd(path, "/dev/null", &format!("bs=1000 count=1 iflag=skip_bytes skip={}", CLUSTER + 100));
    dd(path, "/dev/null", &format!("bs=500 count=1 iflag=skip_bytes skip={}", CLUSTER + 4000));
    // The process that discards flushes when it closes the disk. The write is flushed by its fsync,
    // so its close has nothing left to flush.
    run_ok(
        Command::new("fallocate")
            .args(words(&format!("--punch-hole --offset {} --length {CLUSTER}", 4 * CLUSTER)))
            .arg(path),
    );
    let input = input.to_str().expect("UTF-8").to_owned();
    dd(
        &input,
        path,
        &format!("bs=300 count=1 oflag=seek_bytes seek={} conv=notrunc,fsync", CLUSTER + 10),
    );
}

/// Protects: every value matches the work that was done, QMP reports the same values, and this
/// works inside the sandbox. A stream is visible from its start to its result.
#[test]
fn the_numbers_are_those_of_what_was_done() {
    requires!("/dev/fuse", "qemu-img", "fallocate");
    let rig = Rig::new(4 * MIB);
    let disk = rig.mount().qmp().args(ANY_PORT).start();
    let address = address(&disk);
    let mut client = disk.client();
    let before = Scrape::of(address);
    assert_eq!(before.value("cordisk_disk_bytes", &[("state", "remote")]), 4e6 * 1.048_576);
    assert_eq!(
        (
            before.value("cordisk_job_running", &[]),
            before.value("cordisk_requests_total", &[("kind", "read")])
        ),
        (0.0, 0.0)
    );
    some_work(&rig, &disk);

    // The number of local bytes is cached for a moment. A read that misses returns before its copy
    // is stored, and is counted when the copy is stored.
    let mut scrape = before;
    wait_until("the read that missed is counted, and its cluster is local", || {
        scrape = Scrape::of(address);
        let local = scrape.value("cordisk_disk_bytes", &[("state", "local")]);
        let (misses, reads) = (
            scrape.value("cordisk_copy_on_read_misses_total", &[]),
            scrape.value("cordisk_requests_total", &[("kind", "read")]),
        );
        let copied = scrape.value("cordisk_copied_up_bytes_total", &[("by", "read")]);
        (local, misses, reads, copied) == (CLUSTER as f64, 1.0, 2.0, CLUSTER as f64)
    });
    let kinds = [
        ("read", 2.0, 1500.0),
        ("write", 1.0, 300.0),
        ("flush", 2.0, 0.0),
        ("discard", 1.0, CLUSTER as f64),
    ];
    for (kind, operations, bytes) in kinds {
        let kind = [("kind", kind)];
        assert_eq!(scrape.value("cordisk_requests_total", &kind), operations, "{kind:?}");
        assert_eq!(scrape.value("cordisk_request_bytes_total", &kind), bytes, "{kind:?}");
        assert_eq!(scrape.value("cordisk_request_errors_total", &kind), 0.0, "{kind:?}");
        assert_eq!(
            scrape.value("cordisk_request_duration_seconds_count", &kind),
            operations,
            "{kind:?}"
        );
        assert!(scrape.value("cordisk_request_duration_seconds_sum", &kind) > 0.0, "{kind:?}");
    }
    for (name, labels, expected) in [
        ("cordisk_copy_on_read_hits_total", &[][..], 1.0),
        ("cordisk_copy_on_read_misses_total", &[], 1.0),
        ("cordisk_copy_on_read_errors_total", &[], 0.0),
        ("cordisk_copied_up_bytes_total", &[("by", "read")], CLUSTER as f64),
        ("cordisk_copied_up_bytes_total", &[("by", "stream")], 0.0),
        ("cordisk_backing_reads_total", &[], 1.0),
        ("cordisk_backing_read_bytes_total", &[], CLUSTER as f64),
        ("cordisk_backing_read_errors_total", &[], 0.0),
        ("cordisk_backing_read_duration_seconds_count", &[], 1.0),
        ("cordisk_disk_bytes", &[("state", "zero")], CLUSTER as f64),
        ("cordisk_disk_bytes", &[("state", "remote")], (4 * MIB - 2 * CLUSTER) as f64),
        ("cordisk_disk_size_bytes", &[], (4 * MIB) as f64),
        ("cordisk_storage_failed", &[], 0.0),
        ("cordisk_build_info", &[("version", env!("CARGO_PKG_VERSION"))], 1.0),
    ] {
        assert_eq!(scrape.value(name, labels), expected, "{name} {labels:?}");
    }
    let (image, mountpoint) =
        (disk.image().to_str().expect("UTF-8"), disk.path().to_str().expect("UTF-8"));
    assert_eq!(
        scrape.value("cordisk_disk_info", &[("image", image), ("mountpoint", mountpoint)]),
        1.0
    );
    assert!(scrape.value("cordisk_commits_total", &[]) >= 1.0);
    told_by_qmp(&client.ok("x-query-status", json!({})), &disk);

    client.ok("block-stream", json!({"device": "drive0", "speed": 1}));
    let scrape = Scrape::of(address);
    assert_eq!(
        (scrape.value("cordisk_job_running", &[]), scrape.value("cordisk_job_paused", &[])),
        (1.0, 0.0)
    );
    assert_eq!(scrape.value("cordisk_job_speed_limit_bytes_per_second", &[("id", "drive0")]), 1.0);
    client.finish_job("drive0");
    wait_until("all is local", || {
        Scrape::of(address).value("cordisk_disk_bytes", &[("state", "remote")]) == 0.0
    });
    let scrape = Scrape::of(address);
    let id = [("id", "drive0")];
    assert_eq!(
        (scrape.value("cordisk_job_running", &[]), scrape.value("cordisk_job_offset_bytes", &id)),
        (0.0, (4 * MIB) as f64)
    );
    assert_eq!(scrape.value("cordisk_job_length_bytes", &id), (4 * MIB) as f64);
    assert_eq!(scrape.value("cordisk_jobs_completed_total", &[("result", "success")]), 1.0);
    assert_eq!(scrape.value("cordisk_jobs_completed_total", &[("result", "error")]), 0.0);
    assert_eq!(
        scrape.value("cordisk_copied_up_bytes_total", &[("by", "stream")]),
        (4 * MIB - 2 * CLUSTER) as f64
    );
    assert_eq!(client.ok("x-query-status", json!({}))["last-job"]["result"], json!("success"));
    drop(client);
    disk.umount();
    assert!(TcpStream::connect(address).is_err(), "nobody listens any more");
}

/// Checks the same numbers in `x-query-status`.
fn told_by_qmp(status: &Value, disk: &Daemon) {
    assert_eq!(
        (&status["device"], &status["usable"], &status["copy-on-read"]),
        (&json!("drive0"), &json!(true), &json!(true))
    );
    assert_eq!(
        (&status["image"], &status["mountpoint"]),
        (&json!(disk.image()), &json!(disk.path()))
    );
    assert_eq!(
        (&status["pid"], &status["version"]),
        (&json!(disk.pid().as_raw_nonzero().get()), &json!(env!("CARGO_PKG_VERSION")))
    );
    assert_eq!((&status["size"], &status["cluster-size"]), (&json!(4 * MIB), &json!(CLUSTER)));
    assert_eq!((&status["hits"], &status["misses"]), (&json!(1), &json!(1)));
    assert_eq!(status["copied-up"], json!({"operations": 1, "bytes": CLUSTER, "failed": 0}));
    assert_eq!(status["chain"][0]["format"], json!("raw"));
    let bytes =
        ["local", "zero", "remote"].map(|kind| status["bytes"][kind].as_u64().expect("bytes"));
    assert_eq!(bytes, [CLUSTER, CLUSTER, 4 * MIB - 2 * CLUSTER]);
    for request in status["requests"].as_array().expect("kinds") {
        let latency: u64 = request["latency"]
            .as_array()
            .expect("buckets")
            .iter()
            .map(|count| count.as_u64().expect("count"))
            .sum();
        assert_eq!(Some(latency), request["operations"].as_u64(), "{request}");
    }
}

/// Protects: whatever a client sends, it gets a reply or loses its connection, and the next scrape
/// gets a reply. Silent connections, four times as many as the limit, exclude no other client.
#[test]
fn bad_clients_hurt_nobody() {
    requires!("/dev/fuse", "qemu-img");
    let rig = Rig::new(MIB);
    let disk = rig.mount().args(ANY_PORT).start();
    let address = address(&disk);
    let long = format!("GET /metrics HTTP/1.1\r\nHost: {}\r\n\r\n", "x".repeat(64 << 10));
    for (request, expected) in [
        (&b"GET /metrics HTTP/1.0\r\n\r\n"[..], "HTTP/1.0 200 OK"),
        (b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", "HTTP/1.1 200 OK"),
        (b"GET /metrics/../etc/passwd HTTP/1.1\r\nHost: x\r\n\r\n", "HTTP/1.1 404 Not Found"),
        (
            b"POST /metrics HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\n\r\nabc",
            "HTTP/1.1 405 Method Not Allowed",
        ),
        (b"DELETE / HTTP/1.1\r\nHost: x\r\n\r\n", "HTTP/1.1 405 Method Not Allowed"),
        (b"nonsense\r\n\r\n", "HTTP/1.1 400 Bad Request"),
        (b"GET /metrics HTTP/1.1\r\nHo st: x\r\n\r\n", "HTTP/1.1 400 Bad Request"),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n", "HTTP/1.1 400 Bad Request"),
        (long.as_bytes(), "HTTP/1.1 431 Request Header Fields Too Large"),
    ] {
        let answer = ask(address, request);
        assert!(answer.starts_with(expected), "{expected}: {answer}");
    }
    let head = ask(address, b"HEAD /metrics HTTP/1.1\r\nHost: x\r\n\r\n");
    assert!(
        head.starts_with("HTTP/1.1 200 OK") && head.ends_with("\r\n\r\n"),
        "a head alone: {head}"
    );

    let idle: Vec<TcpStream> =
        (0..64).map(|_| TcpStream::connect(address).expect("connect")).collect();
    let scraped = within(Duration::from_secs(30), move || {
        Scrape::of(address).value("cordisk_disk_size_bytes", &[])
    });
    assert_eq!(scraped, Some(MIB as f64), "silent clients keep others out\n{}", disk.log());
    drop(idle);
    read_at(&disk.open(), 0, 4096);
    // The read is counted when its copy is stored, after its reply.
    wait_until("the read is counted", || {
        Scrape::of(address).value("cordisk_requests_total", &[("kind", "read")]) == 1.0
    });
    // An open connection does not prevent the end of the daemon.
    let _open = TcpStream::connect(address).expect("connect");
    disk.umount();
}

/// Protects: an address that is not available is refused before anything is mounted.
#[test]
fn an_address_in_use_makes_no_disk_appear() {
    requires!("/dev/fuse", "qemu-img");
    let rig = Rig::new(MIB);
    let taken = TcpListener::bind("127.0.0.1:0").expect("bind");
    let address = taken.local_addr().expect("address").to_string();
    refused_in(
        &rig.scratch,
        None,
        &["--metrics", &address, "overlay.qcow2", "disk"],
        &[&format!("--metrics {address}: cannot listen there")],
    );
    refused_in(
        &rig.scratch,
        None,
        &["--metrics", "no.such.host.invalid:1", "overlay.qcow2", "disk"],
        &["cannot listen there"],
    );
}

/// Protects: the dashboard is JSON that Grafana imports, queries only metrics that a disk has, and
/// has a panel for each metric that users look for.
#[test]
fn the_dashboard_shows_what_there_is() {
    requires!("/dev/fuse", "qemu-img");
    let dashboard: Value =
        serde_json::from_str(include_str!("../../contrib/grafana/cordisk.json")).expect("JSON");
    let rig = Rig::new(MIB);
    let disk = rig.mount().qmp().args(ANY_PORT).start();
    let mut client = disk.client();
    client.ok("block-stream", json!({"device": "drive0"}));
    client.wait_completed();
    let scrape = Scrape::of(address(&disk));
    let told = scrape.names();
    let mut asked = BTreeSet::new();
    let mut expressions = Vec::new();
    collect(&dashboard, &mut expressions);
    assert!(expressions.len() >= 12, "{expressions:?}");
    for expression in &expressions {
        let words = expression
            .split(|c: char| !c.is_ascii_alphanumeric() && c != '_')
            .filter(|word| word.starts_with("cordisk_"));
        for word in words {
            assert!(told.contains(word), "{word}, of {expression}, is nowhere in\n{}", scrape.text);
            asked.insert(word.to_owned());
        }
    }
    for name in [
        "request_bytes_total",
        "requests_total",
        "request_duration_seconds_bucket",
        "disk_bytes",
        "job_offset_bytes",
        "storage_failed",
    ] {
        assert!(asked.contains(&format!("cordisk_{name}")), "nobody shows {name}");
    }
    // The user chooses the data source at the import; every panel uses it.
    let variables: Vec<&str> = dashboard["templating"]["list"]
        .as_array()
        .expect("list")
        .iter()
        .filter_map(|v| v["name"].as_str())
        .collect();
    assert_eq!(variables, ["datasource", "device"]);
    let panels = dashboard["panels"].as_array().expect("panels");
    let ids: BTreeSet<_> = panels.iter().map(|panel| panel["id"].as_u64().expect("id")).collect();
    assert_eq!(ids.len(), panels.len(), "ids are unique");
    for panel in panels.iter().filter(|panel| panel["type"] != json!("row")) {
        assert_eq!(panel["datasource"]["uid"], json!("${datasource}"), "{panel}");
        assert!(panel["gridPos"]["w"].is_u64() && panel["title"].is_string(), "{panel}");
    }
    drop(client);
    disk.umount();
}

/// Collects all expressions and the queries of variables.
fn collect(value: &Value, expressions: &mut Vec<String>) {
    match value {
        Value::Object(members) => {
            for (name, value) in members {
                match (name.as_str(), value) {
                    ("expr" | "definition", Value::String(text)) => expressions.push(text.clone()),
                    _ => collect(value, expressions),
                }
            }
        }
        Value::Array(elements) => elements.iter().for_each(|element| collect(element, expressions)),
        _ => {}
    }
}
