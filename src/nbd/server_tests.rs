//! The client against nbdkit and qemu-nbd.

use std::io;
use std::sync::Barrier;
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::Signal;

use crate::test_servers::{Scratch, ServerProcess, installed, later, read, read_with_zeros, run};
use crate::{NbdAddress, NbdClient, NbdConfig, NbdErrorKind, NbdPiece, NbdTls};

const MIB: u64 = 1 << 20;

/// Returns what the pattern plugin of nbdkit has at `offset`: each 8 bytes are their offset.
fn pattern(offset: u64, len: u64) -> Vec<u8> {
    let start = offset - offset % 8;
    let mut bytes = vec![0; (offset - start + len).next_multiple_of(8) as usize];
    for (place, at) in bytes.chunks_exact_mut(8).zip((start..).step_by(8)) {
        place.copy_from_slice(&at.to_be_bytes());
    }
    bytes[(offset - start) as usize..][..len as usize].to_vec()
}

/// Protects: every way of negotiating and every size and alignment of a read gives the same bytes.
#[test]
fn reads_what_the_server_has_however_it_was_negotiated() {
    if !installed("nbdkit") {
        return;
    }
    let ways: [(&str, &[&str]); 5] = [
        ("structured", &["pattern", "65M"]),
        ("simple replies", &["--no-sr", "pattern", "65M"]),
        ("newstyle that is not fixed", &["--mask-handshake=0", "pattern", "65M"]),
        (
            "large blocks",
            &[
                "--filter=blocksize-policy",
                "pattern",
                "65M",
                "blocksize-minimum=4096",
                "blocksize-preferred=65536",
                "blocksize-maximum=131072",
                "blocksize-error-policy=error",
            ],
        ),
        ("one connection", &["--filter=multi-conn", "pattern", "65M", "multi-conn-mode=disable"]),
    ];
    for (way, arguments) in ways {
        let scratch = Scratch::new();
        let _server = ServerProcess::nbdkit(&scratch.socket(), arguments);
        let client = NbdClient::connect(scratch.config()).unwrap();
        assert_eq!(client.size(), 65 * MIB, "{way}");
        for (offset, len) in [
            (0, 0),
            (0, 1),
            (511, 2),
            (4095, 4098),
            (MIB - 3, 6),
            (3, 20 * MIB),
            (64 * MIB + 1, MIB - 1),
            (65 * MIB - 1, 1),
            (65 * MIB, 0),
        ] {
            let found = read(&client, offset, len).unwrap();
            assert!(found == pattern(offset, len), "{way}: {len} bytes at {offset}");
        }
        for (offset, len) in [(65 * MIB, 1), (65 * MIB + 1, 0), (u64::MAX, 2)] {
            let error = read(&client, offset, len).unwrap_err();
            assert_eq!(error.kind(), NbdErrorKind::Argument, "{way}: {error}");
        }
    }
}

/// Protects: holes of a qcow2 image arrive as zeros that were not sent, and block status tells them
/// for each range, however its ends lie.
#[test]
fn qemu_tells_holes_of_a_qcow2_image() {
    if !installed("qemu-nbd") || !installed("qemu-io") {
        return;
    }
    let scratch = Scratch::new();
    let image = scratch.text("image.qcow2");
    run("qemu-img", &["create", "-q", "-f", "qcow2", &image, "64M"]);
    let writes =
        ["write -P 1 1M 64k", "write -P 2 8M 3M", "write -z 9M 1M", "write -P 3 65532k 4k"];
    let writes: Vec<_> = writes.iter().flat_map(|write| ["-c", write]).collect();
    run("qemu-io", &[&["-f", "qcow2", &image], &writes[..]].concat());
    let _server = ServerProcess::qemu_nbd(&scratch.socket(), &["-f", "qcow2", &image]);
    let client = NbdClient::connect(scratch.config()).unwrap();

    let (found, zeros) = read_with_zeros(&client, 0, 64 * MIB).unwrap();
    let mut expected = vec![0; 64 << 20];
    expected[1 << 20..(1 << 20) + 65536].fill(1);
    expected[8 << 20..9 << 20].fill(2);
    expected[10 << 20..11 << 20].fill(2);
    expected[65532 << 10..].fill(3);
    assert!(found == expected);
    assert!(zeros >= 61 * MIB, "{zeros} bytes of zeros were not sent");

    let status = |offset, len| -> Vec<_> {
        let extents = client.block_status(offset, len, later()).unwrap().unwrap();
        extents.iter().map(|extent| (extent.len, extent.zero)).collect()
    };
    assert_eq!(
        status(0, 64 * MIB),
        [
            (MIB, true),
            (65536, false),
            (7 * MIB - 65536, true),
            (MIB, false),
            (MIB, true),
            (MIB, false),
            (53 * MIB - 65536, true),
            (65536, false)
        ]
    );
    assert_eq!(status(MIB - 1, 3), [(1, true), (2, false)]);
    assert_eq!(status(MIB + 7, 9), [(9, false)]);
    assert_eq!(status(5, 0), []);
    let error = client.block_status(64 * MIB, 1, later()).unwrap_err();
    assert_eq!(error.kind(), NbdErrorKind::Argument);
}

/// Protects: a server without extents or structured replies tells nothing instead of something
/// wrong.
#[test]
fn no_block_status_without_the_context() {
    if !installed("nbdkit") {
        return;
    }
    let scratch = Scratch::new();
    let server = ServerProcess::nbdkit(&scratch.socket(), &["--no-sr", "memory", "1M"]);
    let client = NbdClient::connect(scratch.config()).unwrap();
    assert_eq!(client.block_status(0, MIB, later()).unwrap(), None);
    drop(server);
    let _server = ServerProcess::nbdkit(&scratch.socket(), &["--filter=noextents", "memory", "1M"]);
    let client = NbdClient::connect(scratch.config()).unwrap();
    let extents = client.block_status(0, MIB, later()).unwrap().unwrap();
    assert_eq!(
        extents.iter().map(|extent| (extent.len, extent.zero)).collect::<Vec<_>>(),
        [(MIB, false)]
    );
}

/// Returns the kind of failure of a read of `len` bytes at the start.
fn failure(client: &NbdClient, len: u64) -> NbdErrorKind {
    let error = read(client, 0, len).map(|bytes| bytes.len()).unwrap_err();
    let text = error.to_string();
    assert!(text.starts_with("NBD server /") && !text.contains('\n'), "{text}");
    error.kind()
}

/// Protects: an error of the server ends one read, with its number; the connection stays, and the
/// server may go on afterwards.
#[test]
fn an_error_of_the_server_is_an_error_of_one_read() {
    if !installed("nbdkit") {
        return;
    }
    for reply in ["--filter=error", "--no-sr"] {
        let scratch = Scratch::new();
        let failing = scratch.path("failing");
        let trigger = format!("error-pread-file={}", failing.display());
        let filter: &[&str] = if reply == "--no-sr" { &["--no-sr"] } else { &[] };
        let others = [
            "--filter=error",
            "pattern",
            "4M",
            "error-pread=EIO",
            "error-pread-rate=100%",
            &trigger,
        ];
        let _server = ServerProcess::nbdkit(&scratch.socket(), &[filter, &others].concat());
        let client = NbdClient::connect(scratch.config()).unwrap();
        assert!(read(&client, 0, MIB).is_ok());
        std::fs::write(&failing, "").unwrap();
        assert_eq!(failure(&client, 3 * MIB), NbdErrorKind::Server(5), "{reply}");
        std::fs::remove_file(&failing).unwrap();
        assert!(read(&client, MIB + 5, MIB).unwrap() == pattern(MIB + 5, MIB));
    }
}

/// Protects: many threads, more than one connection takes requests of, get their own bytes.
#[test]
fn threads_share_a_client() {
    if !installed("nbdkit") {
        return;
    }
    for options in [&["--filter=delay"][..], &["--no-sr", "--filter=delay"]] {
        let scratch = Scratch::new();
        let others = ["pattern", "1G", "rdelay=5ms"];
        let _server = ServerProcess::nbdkit(&scratch.socket(), &[options, &others].concat());
        let client = NbdClient::connect(scratch.config()).unwrap();
        let start = Barrier::new(24);
        thread::scope(|scope| {
            for thread in 0..24u64 {
                let (client, start) = (&client, &start);
                scope.spawn(move || {
                    start.wait();
                    for round in 0..6 {
                        let offset = (thread * 31 + round * 17) % 120 * 8 * MIB + thread * 999;
                        let len = 1 + (thread * 7 + round) % 5 * 700_001;
                        let found = read(client, offset, len).unwrap();
                        assert!(found == pattern(offset, len), "{len} bytes at {offset}");
                    }
                });
            }
        });
    }
}

/// Protects: after the server has ended, reads fail at once and say so; after it is back, the same
/// client reads on.
#[test]
fn a_client_reads_on_after_the_server_is_back() {
    if !installed("nbdkit") {
        return;
    }
    let scratch = Scratch::new();
    let server = ServerProcess::nbdkit(&scratch.socket(), &["pattern", "8M"]);
    let client = NbdClient::connect(scratch.config()).unwrap();
    assert!(read(&client, 0, MIB).is_ok());
    drop(server);
    let end = later();
    let mut kinds = Vec::new();
    while kinds.last() != Some(&NbdErrorKind::Connect) {
        kinds.push(failure(&client, MIB)); // the client may not have seen the end yet
        assert!(Instant::now() < end);
    }
    for kind in kinds {
        let closed = NbdErrorKind::Closed { answered: true };
        assert!(kind == NbdErrorKind::Connect || kind == closed, "{kind:?}");
    }
    let server = ServerProcess::nbdkit(&scratch.socket(), &["pattern", "8M"]);
    assert!(read(&client, 3, 5 * MIB).unwrap() == pattern(3, 5 * MIB));
    drop(server);
    let _server = ServerProcess::nbdkit(&scratch.socket(), &["pattern", "9M"]);
    let end = later();
    while failure(&client, MIB) != NbdErrorKind::Changed {
        assert!(Instant::now() < end);
    }
    assert_eq!((client.size(), failure(&client, MIB)), (8 * MIB, NbdErrorKind::Changed));
}

/// Protects: a server that ends while requests are in flight ends them all.
#[test]
fn requests_in_flight_end_with_the_server() {
    if !installed("nbdkit") {
        return;
    }
    let scratch = Scratch::new();
    let arguments = ["--filter=delay", "pattern", "64M", "rdelay=3600"];
    let server = ServerProcess::nbdkit(&scratch.socket(), &arguments);
    let client = NbdClient::connect(NbdConfig { connections: 1, ..scratch.config() }).unwrap();
    thread::scope(|scope| {
        // One read takes all places that a caller with requests in flight may have; the request of
        // the other one is above that bound only if it comes afterwards.
        let reads = [8, 9].map(|in_flight| {
            let read = scope.spawn(|| failure(&client, 8 * MIB));
            let end = later();
            while client.in_flight() < in_flight {
                assert!(Instant::now() < end, "{} requests are in flight", client.in_flight());
                thread::yield_now();
            }
            read
        });
        server.signal(Signal::KILL);
        for read in reads {
            let kind = read.join().unwrap();
            assert_eq!(kind, NbdErrorKind::Closed { answered: false });
        }
    });
}

/// Protects: a server that is alive and silent is found by the stall timeout, and by the deadline
/// of a request if that is earlier; afterwards the client reads on.
#[test]
fn a_silent_server_is_left() {
    if !installed("qemu-nbd") {
        return;
    }
    let scratch = Scratch::new();
    std::fs::write(scratch.path("image"), pattern(0, 64 * MIB)).unwrap();
    // Not nbdkit: version 1.32 aborts if a connection with several requests in flight is closed.
    let image = ["-f", "raw", &scratch.text("image")];
    let server = ServerProcess::qemu_nbd(&scratch.socket(), &image);
    let config = NbdConfig { stall_timeout: Duration::from_millis(1500), ..scratch.config() };
    let client = NbdClient::connect(config).unwrap();
    assert!(read(&client, 0, MIB).is_ok());
    server.stop();
    let begin = Instant::now();
    let deadline = begin + Duration::from_millis(200);
    let error = client.read(0, MIB, deadline, &mut |_, _| Ok(())).unwrap_err();
    assert_eq!(error.kind(), NbdErrorKind::Deadline, "{error}");
    thread::scope(|scope| {
        let reads: Vec<_> = (0..3).map(|_| scope.spawn(|| failure(&client, 4 * MIB))).collect();
        for read in reads {
            assert_eq!(read.join().unwrap(), NbdErrorKind::Stalled);
        }
    });
    assert!(begin.elapsed() >= Duration::from_millis(1500));
    server.signal(Signal::CONT);
    assert!(read(&client, 7, 2 * MIB).unwrap() == pattern(7, 2 * MIB));
}

/// Protects: connecting to a server that accepts and says nothing ends.
#[test]
fn a_silent_server_is_no_server() {
    if !installed("nbdkit") {
        return;
    }
    let scratch = Scratch::new();
    let server = ServerProcess::nbdkit(&scratch.socket(), &["pattern", "64M"]);
    server.stop();
    let config = NbdConfig { connect_timeout: Duration::from_millis(300), ..scratch.config() };
    let error = NbdClient::connect(config).unwrap_err();
    assert_eq!(error.kind(), NbdErrorKind::Connect, "{error}");
    assert!(error.to_string().contains("does not answer in time"), "{error}");
}

/// Protects: a sink that waits for another reader delays no other read, although its own data has
/// come.
#[test]
fn a_slow_sink_delays_its_own_read_only() {
    if !installed("nbdkit") {
        return;
    }
    let scratch = Scratch::new();
    let _server = ServerProcess::nbdkit(&scratch.socket(), &["pattern", "64M"]);
    let client = NbdClient::connect(NbdConfig { connections: 1, ..scratch.config() }).unwrap();
    let (first_piece, other_reads) = (Barrier::new(2), Barrier::new(2));
    thread::scope(|scope| {
        scope.spawn(|| {
            let mut pieces = 0;
            let mut sink = |_, _: NbdPiece<'_>| {
                pieces += 1;
                if pieces == 1 {
                    first_piece.wait();
                    other_reads.wait();
                }
                Ok(())
            };
            client.read(0, 40 * MIB, later(), &mut sink).unwrap();
        });
        first_piece.wait();
        for offset in [5, 20 * MIB] {
            assert!(read(&client, offset, 30 * MIB).unwrap() == pattern(offset, 30 * MIB));
        }
        other_reads.wait();
    });
}

/// Protects: the failure of a sink ends its read, and the rest of the answers harm nothing.
#[test]
fn a_sink_may_refuse() {
    if !installed("nbdkit") {
        return;
    }
    let scratch = Scratch::new();
    let _server = ServerProcess::nbdkit(&scratch.socket(), &["pattern", "64M"]);
    let client = NbdClient::connect(scratch.config()).unwrap();
    for _ in 0..5 {
        let mut sink = |_, _: NbdPiece<'_>| Err(io::Error::from_raw_os_error(28));
        let error = client.read(0, 16 * MIB, later(), &mut sink).unwrap_err();
        assert_eq!(error.kind(), NbdErrorKind::Sink);
        assert!(error.to_string().ends_with("No space left on device"), "{error}");
    }
    assert!(read(&client, 1, 20 * MIB).unwrap() == pattern(1, 20 * MIB));
}

/// Protects: names of exports, and what the error says if there is none.
#[test]
fn exports_have_names() {
    if !installed("qemu-nbd") {
        return;
    }
    let scratch = Scratch::new();
    std::fs::write(scratch.path("image"), [7; 4096]).unwrap();
    let arguments = ["-f", "raw", "-x", "a/name", &scratch.text("image")];
    let _server = ServerProcess::qemu_nbd(&scratch.socket(), &arguments);
    let named = |export: &str| NbdConfig { export: export.into(), ..scratch.config() };
    let client = NbdClient::connect(named("a/name")).unwrap();
    assert_eq!(read(&client, 0, 4096).unwrap(), [7; 4096]);
    let error = NbdClient::connect(named("other\n")).unwrap_err();
    assert_eq!(error.kind(), NbdErrorKind::NoExport, "{error}");
    assert!(error.to_string().contains("other\\n"), "{error}");
    let error = NbdClient::connect(named(&"x".repeat(4097))).unwrap_err();
    assert_eq!(error.kind(), NbdErrorKind::Argument);
}

/// Protects: TCP, names of hosts, and addresses where no server listens.
#[test]
fn tcp_and_addresses_that_do_not_answer() {
    if !installed("nbdkit") {
        return;
    }
    let scratch = Scratch::new();
    let (server, port) = ServerProcess::nbdkit_on_tcp(&scratch, &["pattern", "8M"]);
    for host in ["127.0.0.1", "localhost"] {
        let address = NbdAddress::Tcp { host: host.into(), port };
        let client = NbdClient::connect(NbdConfig::new(address, "")).unwrap();
        assert!(read(&client, 9, 3 * MIB).unwrap() == pattern(9, 3 * MIB));
    }
    drop(server);
    for host in ["127.0.0.1", "::1", "no-such-host.invalid"] {
        let address = NbdAddress::Tcp { host: host.into(), port };
        let error = NbdClient::connect(NbdConfig::new(address, "")).unwrap_err();
        assert_eq!(error.kind(), NbdErrorKind::Connect, "{error}");
    }
}

/// Creates a certificate authority `NAME-ca.pem` and a certificate for `localhost` in `NAME/`, as
/// nbdkit wants them.
fn certificates(scratch: &Scratch, name: &str) -> String {
    let dir = scratch.text(name);
    std::fs::create_dir(&dir).unwrap();
    let file = |name: &str| format!("{dir}/{name}");
    let key = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"];
    run(
        "openssl",
        &[
            &[
                "req",
                "-x509",
                "-days",
                "30",
                "-subj",
                "/CN=test authority",
                "-keyout",
                &file("ca-key.pem"),
                "-out",
                &file("ca-cert.pem"),
            ],
            &key[..],
        ]
        .concat(),
    );
    run(
        "openssl",
        &[
            &[
                "req",
                "-subj",
                "/CN=localhost",
                "-keyout",
                &file("server-key.pem"),
                "-out",
                &file("request.pem"),
            ],
            &key[..],
        ]
        .concat(),
    );
    std::fs::write(file("names"), "subjectAltName=DNS:localhost\n").unwrap();
    run(
        "openssl",
        &[
            "x509",
            "-req",
            "-days",
            "30",
            "-in",
            &file("request.pem"),
            "-CA",
            &file("ca-cert.pem"),
            "-CAkey",
            &file("ca-key.pem"),
            "-CAcreateserial",
            "-extfile",
            &file("names"),
            "-out",
            &file("server-cert.pem"),
        ],
    );
    dir
}

/// Protects: with TLS the same bytes come, and whatever is wrong with TLS is an error; plain text
/// is never the way out.
#[test]
fn tls_is_checked_and_never_left_out() {
    if !installed("nbdkit") || !installed("openssl") {
        return;
    }
    let scratch = Scratch::new();
    let (trusted, other) = (certificates(&scratch, "trusted"), certificates(&scratch, "other"));
    let config = |ca: Option<&str>, server_name: &str| NbdConfig {
        tls: Some(NbdTls {
            ca_file: ca.map(|dir| format!("{dir}/ca-cert.pem").into()),
            server_name: server_name.into(),
        }),
        ..scratch.config()
    };
    let certificates = format!("--tls-certificates={trusted}");
    let options = ["--tls=require", &certificates, "pattern", "64M"];
    let server = ServerProcess::nbdkit(&scratch.socket(), &options);
    let client = NbdClient::connect(config(Some(&trusted), "localhost")).unwrap();
    assert_eq!(client.size(), 64 * MIB);
    thread::scope(|scope| {
        for thread in 0..4 {
            let client = &client;
            scope.spawn(move || {
                let offset = thread * 10 * MIB + 77;
                assert!(read(client, offset, 9 * MIB).unwrap() == pattern(offset, 9 * MIB));
            });
        }
    });
    for (what, config, text) in [
        ("another authority", config(Some(&other), "localhost"), "invalid peer certificate"),
        ("authorities of the host", config(None, "localhost"), "invalid peer certificate"),
        ("another name", config(Some(&trusted), "example.com"), "invalid peer certificate"),
        ("no name", config(Some(&trusted), "not a name"), "neither a host name"),
        ("no TLS", scratch.config(), "use nbds"),
    ] {
        let error = NbdClient::connect(config).unwrap_err();
        assert_eq!(error.kind(), NbdErrorKind::Tls, "{what}: {error}");
        assert!(error.to_string().contains(text), "{what}: {error}");
    }
    let no_file = config(Some(&scratch.text("missing")), "localhost");
    assert_eq!(NbdClient::connect(no_file).unwrap_err().kind(), NbdErrorKind::Tls);
    server.signal(Signal::KILL);
    drop(server);

    let config = config(Some(&trusted), "localhost");
    for options in [&["--tls=off"][..], &["--mask-handshake=0"]] {
        let options = [options, &["pattern", "64M"]].concat();
        let _server = ServerProcess::nbdkit(&scratch.socket(), &options);
        let error = NbdClient::connect(config.clone()).unwrap_err();
        assert_eq!(error.kind(), NbdErrorKind::Tls, "{error}");
        assert!(error.to_string().contains("does not offer TLS"), "{error}");
        let end = later();
        let mut kind = failure(&client, 1);
        while kind == (NbdErrorKind::Closed { answered: true }) && Instant::now() < end {
            kind = failure(&client, 1); // the client may not have seen the end yet
        }
        assert_eq!(kind, NbdErrorKind::Tls, "a reconnection");
    }
    let _server =
        ServerProcess::nbdkit(&scratch.socket(), &["--tls=on", &certificates, "pattern", "64M"]);
    assert!(read(&client, 3, MIB).unwrap() == pattern(3, MIB), "a reconnection");
}
