//! Property test for any bytes that clients send, in any pieces. The answers are lines, in order.
//! Each client gets the same answers as if it were alone. Memory is bounded. `fuzzing.rs` has the
//! checks; this file generates input of which a large part is almost valid.

use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};
use serde_json::Value;

use super::codec::{Decoder, MAX_SIZE, MAX_TOKENS, STACK};
use super::fuzzing;

/// A part of a client's input.
#[derive(Clone, Debug)]
enum Part {
    /// One of [`REQUESTS`].
    QmpRequest(usize),
    /// Any bytes.
    Garbage(Vec<u8>),
    /// A byte that ends an incomplete value.
    Control(u8),
}

/// Requests with one answer each, in all notations; `@` is replaced by a string that identifies the
/// request.
const REQUESTS: &[&str] = &[
    r#"{"execute":"query-version","id":"@"}"#,
    r#"{'id':'@','execute':'query-jobs'}"#,
    r#"{"execute":"qmp_capabilities","id":"@"}"#,
    r#"{"execute":"qmp_capabilities","arguments":{"enable":["oob"]},"id":"@"}"#,
    r#"{"exec-oob":"query-version","id":"@"}"#,
    r#"{"\u0065xecute":"qu\u0065ry-block-jobs","arguments":{},"id":"@"}"#,
    "\r\n {\t\"execute\" : \n'query-block' ,\n \"id\":\"@\" } \n",
    r#"{"execute":"block-stream","arguments":{"device":"drive0","speed":-1e3},"id":"@"}"#,
    r#"{"execute":"block-stream","arguments":{"speed":18446744073709551616},"id":"@"}"#,
    r#"{"execute":"n\u00e9é😀\ud83d\ude00\/\"\'","id":"@"}"#,
    r#"{"execute":"job-pause","arguments":{"id":"it's"},"id":"@"}"#,
    r#"{"execute":7,"id":"@"}"#,
    r#"{"id":"@"}"#,
    r#"{"execute":"query-jobs","bogus":[[[{"a":{}}]]],"id":"@"}"#,
];

/// Fragments that are difficult for a JSON reader.
const SHARDS: &[&[u8]] = &[
    b"{",
    b"}",
    b"[",
    b"]",
    b":",
    b",",
    b"\"",
    b"'",
    b"\\",
    b"\\u",
    b"\\ud83d",
    b"\\u0000",
    b"\\'",
    b"0",
    b"-",
    b"01",
    b"1e999",
    b"1.",
    b"-0.0",
    b"true",
    b"nul",
    b"null",
    b"NaN",
    b" ",
    b"\t",
    b"\r\n",
    b"\x7f",
    b"\0",
    b"\x01",
    b"\xfe",
    b"\xff",
    b"\xc3",
    b"\xa9",
    b"\xc0\x80",
    b"\xed\xa0\x80",
    b"\xef\xbf\xbf",
    b"\xf8\x88\x80\x80\x80",
    "é".as_bytes(),
    "😀".as_bytes(),
    b"\"id\":",
    b"\"execute\":",
    b"'arguments':{",
    b"\"query-jobs\"",
    b"12345678901234567890123",
    b"//",
];

/// Openings of nested values.
const OPENING: &[&[u8]] = &[b"[", b"{\"a\":", b"[{'b':"];
/// Patterns for long strings.
const LONG: &[&[u8]] =
    &[b"a", b"1", b"\x7f", b"\xc3\xa9", b"\\n", b" ", b"\\ud83d\\ude00", b"\xed\xa0\x80"];

fn request(shape: usize, id: &str) -> Vec<u8> {
    REQUESTS[shape].replace('@', id).into_bytes()
}

fn garbage() -> impl Strategy<Value = Vec<u8>> {
    let shards = prop::collection::vec(prop::sample::select(SHARDS), 0..30)
        .prop_map(|shards| shards.concat());
    let mutated = (
        0..REQUESTS.len(),
        prop::collection::vec((any::<prop::sample::Index>(), any::<u8>(), 0..4), 1..5),
    )
        .prop_map(|(shape, changes)| {
            let mut bytes = request(shape, "mutated");
            for (at, byte, what) in changes {
                let at = at.index(bytes.len());
                match what {
                    0 => bytes[at] = byte,
                    1 => bytes.insert(at, byte),
                    2 if bytes.len() > 1 => _ = bytes.remove(at),
                    _ => bytes.truncate(at.max(1)),
                }
            }
            bytes
        });
    let deep = (1000usize..1100, prop::sample::select(OPENING), any::<bool>()).prop_map(
        |(depth, open, close)| {
            let mut bytes = open.repeat(depth);
            if close {
                bytes.push(b'1');
                let ends = open.iter().rev().filter_map(|&byte| match byte {
                    b'[' => Some(b']'),
                    b'{' => Some(b'}'),
                    _ => None,
                });
                bytes.extend(ends.cycle().take(
                    depth * open.iter().filter(|&&byte| matches!(byte, b'[' | b'{')).count(),
                ));
            }
            bytes
        },
    );
    // Around the limit: a little less, or twice as much.
    let huge =
        (prop::sample::select(LONG), 0usize..60, 1usize..3).prop_map(|(pattern, less, times)| {
            let len = times * MAX_SIZE - less;
            [b"{\"id\":'", &pattern.repeat(len / pattern.len())[..], b"','execute':'x'}"].concat()
        });
    prop_oneof![
        60 => prop::collection::vec(any::<u8>(), 0..60),
        120 => shards,
        120 => mutated,
        10 => deep,
        1 => huge,
    ]
}

fn part() -> impl Strategy<Value = Part> {
    let control = prop::sample::select(&[0xff, 0xfe, 0x00, 0x01, 0x1f, 0x0b][..]);
    prop_oneof![
        4 => (0..REQUESTS.len()).prop_map(Part::QmpRequest),
        3 => garbage().prop_map(Part::Garbage),
        2 => control.prop_map(Part::Control),
    ]
}

/// Returns the input of a client and the ids of its requests, each with whether it must be
/// answered: a request after garbage may be swallowed by it.
fn stream(client: usize, parts: &[Part]) -> (Vec<u8>, Vec<(String, bool)>) {
    let (mut bytes, mut ids, mut clean) = (Vec::new(), Vec::new(), true);
    for part in parts {
        match part {
            Part::QmpRequest(shape) => {
                let id = format!("client {client}, request {}", ids.len());
                bytes.extend(request(*shape, &id));
                ids.push((id, clean));
            }
            Part::Garbage(garbage) => {
                bytes.extend(garbage);
                clean = false;
            }
            Part::Control(byte) => {
                bytes.push(*byte);
                clean = true;
            }
        }
    }
    (bytes, ids)
}

/// Returns the id in a line, if it is a string.
fn id_of(line: &str) -> Option<String> {
    let (mut decoder, mut rest) = (Decoder::default(), line.as_bytes());
    match decoder.next(&mut rest) {
        Some(Ok(reply)) => reply.get("id").and_then(Value::as_str).map(String::from),
        _ => None,
    }
}

/// Runs `run` on a stack as large as that of the threads that serve clients.
fn on_a_deep_stack(run: impl FnOnce() + Send + 'static) {
    if let Err(panic) = std::thread::Builder::new().stack_size(STACK).spawn(run).unwrap().join() {
        std::panic::resume_unwind(panic);
    }
}

#[test]
fn any_bytes_in_any_pieces_are_answered_in_order() {
    on_a_deep_stack(|| {
        let clients = prop::collection::vec(prop::collection::vec(part(), 0..12), 1..5);
        let config = Config { failure_persistence: None, ..Config::default() };
        let result = TestRunner::new(config).run(&(clients, any::<u32>()), |(clients, seed)| {
            let (streams, ids): (Vec<_>, Vec<_>) =
                clients.iter().enumerate().map(|(client, parts)| stream(client, parts)).unzip();
            for (lines, ids) in fuzzing::check(&streams, seed.into()).iter().zip(ids) {
                let mut expected = ids.iter();
                for answered in lines
                    .iter()
                    .filter_map(|line| id_of(line))
                    .filter(|id| id.starts_with("client "))
                {
                    let skipped = expected
                        .by_ref()
                        .take_while(|(id, _)| *id != answered)
                        .find(|(_, must)| *must);
                    prop_assert_eq!(skipped, None, "not answered, or not before {}", answered);
                }
                prop_assert_eq!(expected.find(|(_, must)| *must), None, "not answered");
            }
            Ok(())
        });
        if let Err(error) = result {
            panic!("{error}");
        }
    });
}

/// Protects: memory is bounded for input that never ends, and a control byte ends it.
#[test]
fn floods_are_bounded_and_can_be_ended() {
    on_a_deep_stack(|| {
        let patterns: &[&[u8]] = &[
            b"\"a",
            b"a",
            b"1",
            b"-1.5",
            b"[",
            b"1,",
            b"{\"a\":",
            b" ",
            b"\\u0041",
            b"\x7f",
            b"\xc3\xa9",
            b"'a',",
            b"[]",
            b"{'a':1}",
            b"@",
        ];
        for start in [&b""[..], b"[\""] {
            for pattern in patterns {
                let mut decoder = Decoder::default();
                let flood = pattern.repeat((MAX_SIZE + 65536) / pattern.len());
                for mut piece in std::iter::once(start).chain(flood.chunks(16 << 10)) {
                    while decoder.next(&mut piece).is_some() {}
                    let most = MAX_SIZE + 1 + MAX_TOKENS * size_of::<super::lexer::Token>();
                    assert!(
                        decoder.held() <= most,
                        "{} of {}",
                        decoder.held(),
                        pattern.escape_ascii()
                    );
                }
                let mut end: &[u8] = b"\xff{\"a\":1}";
                let mut found = Vec::new();
                while let Some(next) = decoder.next(&mut end) {
                    found.push(next);
                }
                assert_eq!(
                    found.last().unwrap().as_ref().unwrap(),
                    &serde_json::json!({"a": 1}),
                    "{}",
                    pattern.escape_ascii()
                );
            }
        }
    });
}

/// Protects: the checks of the fuzz target hold for its corpus.
#[test]
fn the_corpus_of_the_fuzz_target_holds() {
    let corpus =
        std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fuzz/corpus/qmp_codec");
    let files = std::fs::read_dir(corpus).unwrap().map(|entry| entry.unwrap().path());
    // Inputs that the fuzzer adds are named by their hash, and are not committed.
    let files: Vec<_> = files.filter(|file| file.file_name().unwrap().len() < 40).collect();
    assert!(!files.is_empty());
    for file in files {
        let bytes = std::fs::read(&file).unwrap();
        for second in 0..20 {
            let data = [&[second, second], bytes.get(2..).unwrap_or_default()].concat();
            fuzzing::any_bytes(&data);
        }
    }
}
