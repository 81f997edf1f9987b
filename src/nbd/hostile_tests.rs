//! The client against servers that break the protocol, or use freedoms of it that real servers
//! seldom use. The server is a thread of the test.

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use crate::test_servers::{
    Offer, PATIENCE, Received, ServerThread, chunk, data_chunk, later, option_reply, read,
    read_with_zeros, receive_option, receive_request, serve_negotiation, simple_reply,
};
use crate::{NbdClient, NbdConfig, NbdErrorKind, fuzz_conversation};

const OFFER: Offer = Offer { size: 1 << 20, structured: true, multi_conn: false };
/// Changed inputs for each file of the fuzzer's corpus.
const ROUNDS: u32 = 500;
const GREETING: &[u8] = b"NBDMAGICIHAVEOPT\0\x03";

/// Starts a server that answers each request with what `answer` returns.
fn answering(
    offer: Offer,
    mut answer: impl FnMut(Received) -> Vec<u8> + Send + 'static,
) -> ServerThread {
    ServerThread::start(move |_, stream| {
        serve_negotiation(stream, offer)?;
        loop {
            let request = receive_request(stream)?;
            if request.command == 2 {
                return Ok(());
            }
            stream.write_all(&answer(request))?;
        }
    })
}

/// Protects: replies that contradict the request end the connection, and no read takes them for
/// data; afterwards the client connects again.
#[test]
fn replies_that_contradict_the_request_are_refused() {
    type Answer = fn(Received) -> Vec<u8>;
    let table: &[(&str, Answer, &str)] = &[
        ("magic", |_| vec![7; 32], "magic 0x7070707"),
        ("cookie", |r| data_chunk(1, r.cookie + 1, 0, &[1; 4096]), "cookie"),
        ("simple reply", |r| simple_reply(0, r.cookie, &[1; 4096]), "simple reply"),
        ("simple error", |r| simple_reply(5, r.cookie, &[]), "simple reply"),
        ("too short", |r| data_chunk(1, r.cookie, r.offset, &[1; 4095]), "before all data"),
        ("too long", |r| data_chunk(1, r.cookie, r.offset, &[1; 4097]), "outside of it"),
        ("before", |r| data_chunk(1, r.cookie, r.offset - 1, &[1; 4096]), "outside of it"),
        ("far away", |r| data_chunk(1, r.cookie, u64::MAX, &[1; 4096]), "outside of it"),
        ("empty", |r| data_chunk(1, r.cookie, r.offset, &[]), "8 bytes"),
        (
            "twice",
            |r| {
                let once = data_chunk(0, r.cookie, r.offset, &[1; 2048]);
                [&once[..], &once, &data_chunk(1, r.cookie, r.offset + 2048, &[1; 2048])].concat()
            },
            "or twice",
        ),
        (
            "a hole over data",
            |r| {
                let hole = [&r.offset.to_be_bytes()[..], &4096u32.to_be_bytes()].concat();
                let data = data_chunk(0, r.cookie, r.offset + 4095, &[1]);
                [data, chunk(1, 2, r.cookie, &hole)].concat()
            },
            "or twice",
        ),
        (
            "a hole that is too large",
            |r| {
                let hole = [&r.offset.to_be_bytes()[..], &u32::MAX.to_be_bytes()].concat();
                chunk(1, 2, r.cookie, &hole)
            },
            "outside of it",
        ),
        (
            "an empty hole",
            |r| chunk(1, 2, r.cookie, &[&r.offset.to_be_bytes()[..], &[0; 4]].concat()),
            "outside of it",
        ),
        ("a cut hole", |r| chunk(1, 2, r.cookie, &[0; 11]), "11 bytes"),
        ("nothing", |r| chunk(1, 0, r.cookie, &[]), "before all data"),
        ("nothing, but more follows", |r| chunk(0, 0, r.cookie, &[]), "type None"),
        ("nothing with bytes", |r| chunk(1, 0, r.cookie, &[1]), "type None"),
        (
            "a status",
            |r| chunk(1, 5, r.cookie, &[0, 0, 0, 42, 0, 0, 16, 0, 0, 0, 0, 0]),
            "BlockStatus",
        ),
        ("an unknown chunk", |r| chunk(1, 77, r.cookie, &[]), "type 77"),
        ("unknown flags", |r| chunk(3, 0, r.cookie, &[]), "flags 0x3"),
        ("error zero", |r| chunk(1, 0x8001, r.cookie, &[0; 6]), "without an error"),
        (
            "an error that is cut",
            |r| chunk(1, 0x8001, r.cookie, b"\0\0\0\x05\0\x09x"),
            "error chunk",
        ),
        (
            "an error elsewhere",
            |r| chunk(1, 0x8002, r.cookie, b"\0\0\0\x05\0\0\0\0\0\0\0\0\0\0"),
            "outside of the request",
        ),
        (
            "a length without bytes",
            |r| {
                let mut bytes = data_chunk(1, r.cookie, r.offset, &[1; 4096]);
                bytes[16..20].copy_from_slice(&u32::MAX.to_be_bytes());
                bytes
            },
            "4294967295 bytes",
        ),
        (
            "many chunks",
            |r| (0..4096).flat_map(|at| data_chunk(0, r.cookie, r.offset + at, &[1])).collect(),
            "more than 24 chunks",
        ),
    ];
    for (what, answer, text) in table {
        let server = answering(OFFER, answer);
        let client = NbdClient::connect(server.scratch.config()).unwrap();
        for attempt in 0..2 {
            let error = read(&client, 8192, 4096).unwrap_err();
            assert_eq!(error.kind(), NbdErrorKind::Protocol, "{what}, {attempt}: {error}");
            assert!(error.to_string().contains(text), "{what}: {error}");
        }
    }
}

/// Protects: the same without structured replies.
#[test]
fn simple_replies_that_contradict_the_request_are_refused() {
    let offer = Offer { structured: false, ..OFFER };
    let server = answering(offer, |r| data_chunk(1, r.cookie, r.offset, &[1; 4096]));
    let client = NbdClient::connect(server.scratch.config()).unwrap();
    let error = read(&client, 8192, 4096).unwrap_err();
    assert_eq!(error.kind(), NbdErrorKind::Protocol, "{error}");
    let server = answering(offer, |r| simple_reply(0, r.cookie ^ 0x100, &[1; 4096]));
    let client = NbdClient::connect(server.scratch.config()).unwrap();
    assert_eq!(read(&client, 8192, 4096).unwrap_err().kind(), NbdErrorKind::Protocol);
}

/// Protects: chunks in any order, holes, and the numbers of errors.
#[test]
fn chunks_may_come_in_any_order() {
    let server = answering(OFFER, |r| {
        let hole = [&(r.offset + 1024).to_be_bytes()[..], &2048u32.to_be_bytes()].concat();
        let errors = chunk(
            0,
            0x8002,
            r.cookie,
            &[&b"\0\0\0\x1c\0\x04full"[..], &r.offset.to_be_bytes()].concat(),
        );
        match r.offset {
            0 => [
                data_chunk(0, r.cookie, 3072, &[3; 1024]),
                chunk(0, 2, r.cookie, &hole),
                data_chunk(0, r.cookie, 512, &[2; 512]),
                data_chunk(0, r.cookie, 0, &[1; 512]),
                chunk(1, 0, r.cookie, &[]),
            ]
            .concat(),
            4096 => [
                errors,
                chunk(0, 0x9999, r.cookie, b"\0\0\0\x05\0\0more"),
                chunk(1, 0, r.cookie, &[]),
            ]
            .concat(),
            _ => [
                data_chunk(0, r.cookie, r.offset, &[1; 512]),
                chunk(1, 0x8001, r.cookie, b"\0\0\0\x05\0\0"),
            ]
            .concat(),
        }
    });
    let client = NbdClient::connect(server.scratch.config()).unwrap();
    let (bytes, zeros) = read_with_zeros(&client, 1, 4095).unwrap();
    let expected = [&[1; 511][..], &[2; 512], &[0; 2048], &[3; 1024]].concat();
    assert!(bytes == expected);
    assert_eq!(zeros, 2048);
    let error = read(&client, 4096, 4096).unwrap_err();
    assert_eq!(error.kind(), NbdErrorKind::Server(28));
    assert!(error.to_string().ends_with("ENOSPC to Read of 4096 bytes at 4096: full"), "{error}");
    assert_eq!(read(&client, 8192, 4096).unwrap_err().kind(), NbdErrorKind::Server(5));
    assert!(read(&client, 0, 4096).is_ok(), "the connection is still good");
}

/// Protects: a block status that makes no sense is refused, and one that reaches too far is cut.
#[test]
fn block_status_is_checked() {
    fn runs(runs: &[(u32, u32)]) -> Vec<u8> {
        let runs = runs.iter().flat_map(|(len, flags)| [len.to_be_bytes(), flags.to_be_bytes()]);
        [42u32.to_be_bytes()].into_iter().chain(runs).flatten().collect()
    }
    type Answer = fn(Received) -> Vec<u8>;
    type Expected = Result<&'static [(u64, bool)], &'static str>;
    let table: &[(&str, Answer, Expected)] = &[
        ("one run", |r| chunk(1, 5, r.cookie, &runs(&[(8192, 3)])), Ok(&[(8192, true)])),
        (
            "short answers",
            |r| chunk(1, 5, r.cookie, &runs(&[(512, (r.offset as u32 / 2048) & 2)])),
            Ok(&[(4096, true), (4096, false)]),
        ),
        (
            "too long",
            |r| chunk(1, 5, r.cookie, &runs(&[(4096, 1), (u32::MAX, 2), (u32::MAX, 0)])),
            Ok(&[(4096, false), (4096, true)]),
        ),
        ("an empty run", |r| chunk(1, 5, r.cookie, &runs(&[(4096, 1), (0, 2)])), Err("zero bytes")),
        ("no run", |r| chunk(1, 5, r.cookie, &runs(&[])), Err("4 bytes")),
        ("another context", |r| chunk(1, 5, r.cookie, &[0; 12]), Err("zero bytes")),
        (
            "another context with runs",
            |r| chunk(1, 5, r.cookie, &[1, 0, 0, 42, 0, 0, 16, 0, 0, 0, 0, 0]),
            Err("context 16777258"),
        ),
        (
            "twice",
            |r| {
                let runs = runs(&[(8192, 0)]);
                [chunk(0, 5, r.cookie, &runs), chunk(1, 5, r.cookie, &runs)].concat()
            },
            Err("not asked for"),
        ),
        ("nothing", |r| chunk(1, 0, r.cookie, &[]), Err("before all data")),
        ("data", |r| data_chunk(1, r.cookie, r.offset, &[1; 8192]), Err("chunk of Data")),
        ("simple reply", |r| simple_reply(0, r.cookie, &[]), Err("without a status")),
        ("simple error", |r| simple_reply(5, r.cookie, &[]), Err("EIO")),
    ];
    for (what, answer, expected) in table {
        let server = answering(OFFER, answer);
        let client = NbdClient::connect(server.scratch.config()).unwrap();
        let found = client.block_status(4096, 8192, later());
        match (found, expected) {
            (Ok(Some(found)), Ok(expected)) => {
                let found: Vec<_> = found.iter().map(|run| (run.len, run.zero)).collect();
                assert_eq!(found, *expected, "{what}");
            }
            (Err(error), Err(text)) => {
                assert!(error.to_string().contains(text), "{what}: {error}");
            }
            (found, _) => panic!("{what}: {found:?}"),
        }
    }
}

/// Protects: negotiations that go wrong are told apart, and none makes the client wait or allocate
/// without bounds.
#[test]
fn negotiations_that_go_wrong() {
    type Serve = fn(&mut UnixStream) -> io::Result<()>;
    /// Replies to the option number `at` with `replies` times (kind, payload), and declines others.
    fn on(stream: &mut UnixStream, at: u32, replies: &[(u32, &[u8])]) -> io::Result<()> {
        greet(stream)?;
        loop {
            let (option, _) = receive_option(stream)?;
            if option == at {
                for (kind, payload) in replies {
                    option_reply(stream, option, *kind, payload)?;
                }
            } else if option == 8 && at == 10 {
                option_reply(stream, option, 1, &[])?;
            } else {
                option_reply(stream, option, 0x8000_0001, &[])?;
            }
        }
    }
    fn greet(stream: &mut UnixStream) -> io::Result<()> {
        stream.write_all(GREETING)?;
        stream.read_exact(&mut [0; 4])
    }
    const EXPORT: &[u8] = &[0, 0, 0, 0, 0, 0, 0, 16, 0, 0, 0, 1];
    let table: &[(&str, Serve, NbdErrorKind, &str)] = &[
        ("closed", |_| Ok(()), NbdErrorKind::Connect, "closed the connection"),
        (
            "not NBD",
            |s| s.write_all(b"SSH-2.0-OpenSSH_9.2p1\r\n"),
            NbdErrorKind::Protocol,
            "not an NBD server",
        ),
        (
            "oldstyle",
            |s| s.write_all(b"NBDMAGIC\0\0\x42\x02\x81\x86\x12\x53\0\0\0\0\0\x10\0\0"),
            NbdErrorKind::Protocol,
            "oldstyle",
        ),
        ("closed after a greeting", |s| greet(s), NbdErrorKind::Connect, "negotiation failed"),
        (
            "magic of a reply",
            |s| {
                greet(s)?;
                receive_option(s)?;
                s.write_all(&[9; 20])
            },
            NbdErrorKind::Protocol,
            "magic",
        ),
        (
            "length of a reply",
            |s| {
                greet(s)?;
                receive_option(s)?;
                s.write_all(b"\0\x03\xe8\x89\x04\x55\x65\xa9\0\0\0\x08\0\0\0\x01\xff\xff\xff\xff")
            },
            NbdErrorKind::Protocol,
            "4294967295 bytes",
        ),
        (
            "another option",
            |s| {
                greet(s)?;
                receive_option(s)?;
                option_reply(s, 7, 1, &[])
            },
            NbdErrorKind::Protocol,
            "option 7",
        ),
        ("unknown reply", |s| on(s, 8, &[(99, b"")]), NbdErrorKind::Protocol, "Unexpected(99)"),
        ("TLS wanted", |s| on(s, 8, &[(0x8000_0005, b"")]), NbdErrorKind::Tls, "nbds"),
        ("TLS wanted later", |s| on(s, 7, &[(0x8000_0005, b"")]), NbdErrorKind::Tls, "nbds"),
        ("shutting down", |s| on(s, 7, &[(0x8000_0007, b"")]), NbdErrorKind::Connect, "shutting"),
        (
            "no such export",
            |s| on(s, 7, &[(0x8000_0006, b"ask\nanother")]),
            NbdErrorKind::NoExport,
            "ask\\nanother",
        ),
        (
            "not for this client",
            |s| on(s, 7, &[(0x8000_0002, b"")]),
            NbdErrorKind::NoExport,
            "Policy",
        ),
        ("no size", |s| on(s, 7, &[(1, b"")]), NbdErrorKind::Protocol, "before the last reply"),
        (
            "a cut size",
            |s| on(s, 7, &[(3, &EXPORT[..11]), (1, b"")]),
            NbdErrorKind::Protocol,
            "length",
        ),
        (
            "a negative size",
            |s| on(s, 7, &[(3, b"\0\0\xff\xff\xff\xff\xff\xff\xff\xff\0\x01"), (1, b"")]),
            NbdErrorKind::Protocol,
            "18446744073709551615 bytes",
        ),
        (
            "no block size",
            |s| on(s, 7, &[(3, EXPORT), (3, b"\0\x03\0\0\0\0\0\0\x10\0\0\0\x10\0"), (1, b"")]),
            NbdErrorKind::Protocol,
            "block sizes 0",
        ),
        (
            "replies without end",
            |s| on(s, 7, &[(3, EXPORT); 100]),
            NbdErrorKind::Protocol,
            "more than 64 replies",
        ),
        (
            "contexts without end",
            |s| on(s, 10, &[(4, &b"\0\0\0\x01base:allocation"[..]); 2]),
            NbdErrorKind::Protocol,
            "not asked for",
        ),
        (
            "another context",
            |s| on(s, 10, &[(4, b"\0\0\0\x01qemu:dirty-bitmap:x")]),
            NbdErrorKind::Protocol,
            "not asked for",
        ),
        (
            "an old server that is not fixed",
            |s| {
                s.write_all(b"NBDMAGICIHAVEOPT\0\0")?;
                let mut answer = [0; 4];
                s.read_exact(&mut answer)?;
                assert_eq!(answer, [0; 4]);
                assert_eq!(receive_option(s)?.0, 1);
                Ok(())
            },
            NbdErrorKind::NoExport,
            "no export of this name",
        ),
    ];
    for (what, serve, kind, text) in table {
        let server = ServerThread::start(|_, stream| serve(stream));
        let error = NbdClient::connect(server.scratch.config()).unwrap_err();
        assert_eq!(error.kind(), *kind, "{what}: {error}");
        assert!(error.to_string().contains(text), "{what}: {error}");
    }
}

/// Protects: an old server that sends 124 zeros after the size.
#[test]
fn zeros_after_the_size_are_skipped() {
    let server = ServerThread::start(|_, stream| {
        stream.write_all(b"NBDMAGICIHAVEOPT\0\x01")?;
        stream.read_exact(&mut [0; 4])?;
        loop {
            let (option, payload) = receive_option(stream)?;
            if option == 1 {
                assert_eq!(payload, b"old");
                break;
            }
            option_reply(stream, option, 0x8000_0001, &[])?;
        }
        stream.write_all(&4096u64.to_be_bytes())?;
        stream.write_all(&[&[0, 1][..], &[0; 124]].concat())?;
        loop {
            let request = receive_request(stream)?;
            stream.write_all(&simple_reply(0, request.cookie, &[9; 4096]))?;
        }
    });
    let config = NbdConfig { export: "old".into(), ..server.scratch.config() };
    let client = NbdClient::connect(config).unwrap();
    assert!(read(&client, 0, 4096).unwrap() == [9; 4096]);
}

/// Protects: replies out of order reach their requests, all 8 of a read of 8 MiB are in flight at
/// once, and one caller has no more than that on a connection.
#[test]
fn requests_are_in_flight_together_and_answered_in_any_order() {
    let offer = Offer { size: 1 << 30, ..OFFER };
    let server = ServerThread::start(move |_, stream| {
        serve_negotiation(stream, offer)?;
        // The first MiB of a read is three requests.
        for count in [8, 2, 8, 8, 6] {
            let mut requests = Vec::new();
            for _ in 0..count {
                requests.push(receive_request(stream)?);
            }
            // The client could send more, but must not.
            stream.set_read_timeout(Some(Duration::from_millis(100)))?;
            let more = stream.read(&mut [0; 1]);
            assert_eq!(more.unwrap_err().kind(), io::ErrorKind::WouldBlock);
            stream.set_read_timeout(Some(Duration::from_secs(60)))?;
            for request in requests.iter().rev() {
                let data = vec![(request.offset >> 20) as u8; request.len as usize];
                let (first, second) = data.split_at(1000);
                stream.write_all(&data_chunk(0, request.cookie, request.offset, first))?;
                stream.write_all(&data_chunk(1, request.cookie, request.offset + 1000, second))?;
            }
        }
        Ok(())
    });
    let client = NbdClient::connect(server.scratch.config()).unwrap();
    for (start, mib) in [(3usize, 8usize), (40, 20)] {
        let found = read(&client, (start as u64) << 20, (mib as u64) << 20).unwrap();
        for (at, mib) in found.chunks(1 << 20).enumerate() {
            assert!(mib.iter().all(|&byte| byte as usize == start + at));
        }
    }
}

/// Protects: a caller that has no request in flight sends one at once, although another caller has
/// as many on the only connection as it may.
#[test]
fn a_small_read_does_not_wait_behind_a_large_one() {
    let offer = Offer { size: 1 << 30, multi_conn: false, ..OFFER };
    let (told, large_is_sent) = mpsc::channel();
    let server = ServerThread::start(move |_, stream| {
        serve_negotiation(stream, offer)?;
        let zeros = |request: &Received| {
            let hole = [&request.offset.to_be_bytes()[..], &request.len.to_be_bytes()].concat();
            chunk(1, 2, request.cookie, &hole)
        };
        let mut large = Vec::new();
        for _ in 0..8 {
            large.push(receive_request(stream)?);
        }
        told.send(()).unwrap();
        let small = receive_request(stream)?;
        assert_eq!(small.offset, 512 << 20);
        stream.write_all(&zeros(&small))?;
        for request in &large {
            stream.write_all(&zeros(request))?;
        }
        for _ in 8..22 {
            let request = receive_request(stream)?;
            stream.write_all(&zeros(&request))?;
        }
        Ok(())
    });
    let client = NbdClient::connect(server.scratch.config()).unwrap();
    thread::scope(|scope| {
        let large = scope.spawn(|| read(&client, 0, 20 << 20).map(drop));
        large_is_sent.recv().unwrap();
        assert!(read(&client, 512 << 20, 4096).is_ok());
        assert!(large.join().unwrap().is_ok());
    });
}

/// Protects: further connections are made when requests wait, and only if the server allows it.
#[test]
fn connections_are_added_when_they_are_needed() {
    for (multi_conn, most, expected) in [(true, 3, 3), (true, 1, 1), (false, 4, 1)] {
        let (told, connected) = mpsc::channel();
        let offer = Offer { size: 1 << 30, multi_conn, ..OFFER };
        let mut handlers = Vec::new();
        let server = ServerThread::start(move |number, stream| {
            let mut stream = stream.try_clone()?;
            let told = told.clone();
            handlers.push(thread::spawn(move || -> io::Result<()> {
                serve_negotiation(&mut stream, offer)?;
                told.send(number).unwrap();
                loop {
                    let request = receive_request(&mut stream)?;
                    if request.command == 2 {
                        told.send(100 + number).unwrap();
                        return Ok(());
                    }
                    let hole =
                        [&request.offset.to_be_bytes()[..], &request.len.to_be_bytes()].concat();
                    thread::sleep(Duration::from_millis(1));
                    stream.write_all(&chunk(1, 2, request.cookie, &hole))?;
                }
            }));
            Ok(())
        });
        let config = NbdConfig { connections: most, ..server.scratch.config() };
        let client = NbdClient::connect(config).unwrap();
        thread::scope(|scope| {
            for _ in 0..8 {
                scope.spawn(|| {
                    for _ in 0..4 {
                        client.read(0, 16 << 20, later(), &mut |_, _| Ok(())).unwrap();
                    }
                });
            }
        });
        let end = later();
        while client.connections() < expected {
            client.read(0, 16 << 20, later(), &mut |_, _| Ok(())).unwrap();
            assert!(Instant::now() < end);
        }
        assert_eq!(client.connections(), expected);
        drop(client);
        drop(server);
        let mut told: Vec<_> = connected.iter().collect();
        told.sort_unstable();
        assert_eq!(told, (0..expected).chain(100..100 + expected).collect::<Vec<_>>());
    }
}

/// Protects: while one thread connects, others wait for it, and their deadlines hold; its failure
/// is not the last word.
#[test]
fn threads_wait_for_the_connection_of_one_of_them() {
    let (go, wait) = mpsc::channel::<()>();
    let (told, connected) = mpsc::channel();
    let server = ServerThread::start(move |number, stream| {
        told.send(number).unwrap();
        match number {
            0 => serve_negotiation(stream, OFFER),
            1 => {
                wait.recv().unwrap();
                Ok(())
            }
            _ => {
                serve_negotiation(stream, OFFER)?;
                while let request @ Received { command: 0, .. } = receive_request(stream)? {
                    let data = vec![1; request.len as usize];
                    stream.write_all(&data_chunk(1, request.cookie, request.offset, &data))?;
                }
                Ok(())
            }
        }
    });
    let config = NbdConfig { connect_timeout: PATIENCE, ..server.scratch.config() };
    let client = NbdClient::connect(config).unwrap();
    assert_eq!(connected.recv().unwrap(), 0);
    while client.connections() > 0 {
        thread::yield_now();
    }
    thread::scope(|scope| {
        let first = scope.spawn(|| read(&client, 0, 4096));
        assert_eq!(connected.recv().unwrap(), 1);
        let second = scope.spawn(|| read(&client, 0, 4096));
        let deadline = Instant::now() + Duration::from_millis(300);
        let error = client.read(0, 4096, deadline, &mut |_, _| Ok(())).unwrap_err();
        assert_eq!(error.kind(), NbdErrorKind::Deadline, "{error}");
        assert!(deadline.elapsed() < PATIENCE / 2, "this thread has waited for the second one");
        go.send(()).unwrap();
        assert_eq!(first.join().unwrap().unwrap_err().kind(), NbdErrorKind::Connect);
        // The second thread has waited, or was so late that it makes a connection of its own.
        if let Err(error) = second.join().unwrap() {
            assert_eq!(error.kind(), NbdErrorKind::Connect);
        }
    });
    assert!(read(&client, 0, 4096).unwrap() == [1; 4096]);
}

/// Protects: ESHUTDOWN is an error of its request, and the next request uses another connection.
#[test]
fn a_server_that_shuts_down_is_left() {
    let server = ServerThread::start(|number, stream| {
        serve_negotiation(stream, OFFER)?;
        loop {
            let request = receive_request(stream)?;
            let last = chunk(1, 0x8001, request.cookie, b"\0\0\0\x6c\0\0");
            let data = data_chunk(1, request.cookie, request.offset, &[1; 4096]);
            stream.write_all(if number == 0 { &last } else { &data })?;
        }
    });
    let client = NbdClient::connect(server.scratch.config()).unwrap();
    assert_eq!(read(&client, 0, 4096).unwrap_err().kind(), NbdErrorKind::Server(108));
    assert!(read(&client, 0, 4096).unwrap() == [1; 4096]);
}

/// Sends a reply with a pause of 20 ms after each part of `len` bytes.
fn slowly(stream: &mut UnixStream, reply: &[u8], len: usize) -> io::Result<()> {
    for part in reply.chunks(len) {
        stream.write_all(part)?;
        thread::sleep(Duration::from_millis(20));
    }
    Ok(())
}

/// Protects: a server that sends a byte now and then holds its requests, and the places that a
/// connection has for them, no longer than one that sends nothing. One that is slow is not left.
#[test]
fn a_server_that_trickles_counts_as_stalled() {
    let server = ServerThread::start(|number, stream| {
        serve_negotiation(stream, OFFER)?;
        let request = receive_request(stream)?;
        let reply = data_chunk(1, request.cookie, request.offset, &[1; 128 << 10]);
        slowly(stream, &reply, if number == 0 { 1 } else { 2 << 10 })
    });
    let stall_timeout = Duration::from_millis(500);
    let client =
        NbdClient::connect(NbdConfig { stall_timeout, ..server.scratch.config() }).unwrap();
    let error = read(&client, 0, 128 << 10).unwrap_err();
    assert_eq!(error.kind(), NbdErrorKind::Stalled, "{error}");
    assert!(read(&client, 0, 128 << 10).unwrap() == [1; 128 << 10]);
}

/// Protects: the deadline holds against a server that is slow.
#[test]
fn a_deadline_holds_against_a_server_that_is_slow() {
    let server = ServerThread::start(|_, stream| {
        serve_negotiation(stream, OFFER)?;
        let request = receive_request(stream)?;
        let reply = data_chunk(1, request.cookie, request.offset, &[1; 4096]);
        slowly(stream, &reply, 1)
    });
    let stall_timeout = Duration::from_secs(60);
    let client =
        NbdClient::connect(NbdConfig { stall_timeout, ..server.scratch.config() }).unwrap();
    let begin = Instant::now();
    let deadline = begin + Duration::from_secs(3);
    let error = client.read(0, 4096, deadline, &mut |_, _| Ok(())).unwrap_err();
    assert_eq!(error.kind(), NbdErrorKind::Deadline, "{error}");
    assert!((3..30).contains(&begin.elapsed().as_secs()));
}

/// Protects: what the fuzzer starts from is accepted as far as it is meant to be.
#[test]
fn conversations_of_the_fuzzer() {
    let reads = |structured: bool| -> Vec<u8> {
        [(1u64, 0u64, 64usize), (2, 65536, 16), (4, 1 << 30, 200)]
            .iter()
            .flat_map(|&(cookie, offset, len)| {
                if structured {
                    data_chunk(1, cookie, offset, &vec![5; len])
                } else {
                    simple_reply(0, cookie, &vec![5; len])
                }
            })
            .collect()
    };
    fuzz_conversation(&[&[2][..], &reads(true)].concat());
    fuzz_conversation(&[&[3][..], &reads(false)].concat());
    fuzz_conversation(&[&[0][..], GREETING, &[0; 100]].concat());
    fuzz_conversation(&[]);
}

/// Protects: what the fuzz target checks, for inputs of its corpus with a few bytes changed.
#[test]
fn changed_conversations_break_nothing() {
    let corpus = concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/fuzz/corpus/nbd_replies");
    let mut inputs: Vec<_> =
        std::fs::read_dir(corpus).unwrap().map(|entry| entry.unwrap().path()).collect();
    inputs.sort();
    assert!(inputs.len() >= 10, "{corpus}");
    let seed = std::env::var("CORDISK_SEED").ok().and_then(|seed| seed.parse().ok());
    let seed: u64 = seed.unwrap_or_else(|| {
        std::time::SystemTime::UNIX_EPOCH.elapsed().map_or(1, |time| time.as_nanos() as u64)
    });
    println!("CORDISK_SEED={seed}"); // seen if the test fails
    let mut state = seed | 1;
    let mut random = |below: usize| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 16) as usize % below
    };
    for path in inputs {
        let original = std::fs::read(&path).unwrap();
        fuzz_conversation(&original);
        for _ in 0..ROUNDS {
            let mut input = original.clone();
            for _ in 0..=random(4) {
                let at = random(input.len());
                match random(5) {
                    0 => input[at] = [0, 1, 0x7f, 0x80, 0xff][random(5)],
                    1 => input[at] ^= 1 << random(8),
                    2 => input.truncate(at.max(1)),
                    3 => {
                        let end = at + random(input.len() - at) + 1;
                        input.extend_from_within(at..end);
                    }
                    _ => {
                        let end = (at + 4).min(input.len());
                        input.rotate_left(end - at);
                    }
                }
            }
            fuzz_conversation(&input);
        }
    }
}
