//! Checks that hold for any input of clients, for the property test (`properties.rs`) and the fuzz
//! target (`tests/fuzz`). Compiled only for these two.

use std::sync::Arc;

use serde_json::{Value, json};

use super::call::{LogFacts, Session, Target};
use super::codec::{self, Decoder, MAX_SIZE, MAX_TOKENS};
use super::dispatch::CommandAnswer;
use super::lexer::Token;
use engine::disk::Disk;
use engine::job::Jobs;
use engine::stream::{Priority, Streams};
use qcow2::format::NewImage;
use qcow2::image::Image;
use sim::SimStorage;

/// Most bytes that a decoder holds: the text of one message, its tokens, and the one byte that
/// exceeds the limit.
const MOST_HELD: usize = MAX_SIZE + MAX_TOKENS * size_of::<Token>() + 1;
/// Longest line: each byte of a message echoed as `\uXXXX`, plus the members around it. The client
/// library `qemu.qmp` reads up to 10 MiB.
const LONGEST_LINE: usize = 6 * MAX_SIZE + 4096;
/// Stack for the deepest message in bytes, including the overhead of a sanitizer.
const STACK: usize = 4 * codec::STACK;
/// A nesting that fits any stack and serde's limit.
const SHALLOW: usize = 100;

/// Clients, each with the pieces in which its bytes arrive.
pub(super) type Clients<'a> = Vec<Vec<&'a [u8]>>;

/// A connection without a socket.
struct FuzzConnection {
    decoder: Decoder,
    session: Session,
    lines: Vec<String>,
    /// The client has asked to quit, so the rest of its input is not read.
    over: bool,
}

impl FuzzConnection {
    fn new() -> Self {
        FuzzConnection {
            decoder: Decoder::default(),
            session: Session::new(),
            lines: Vec::new(),
            over: false,
        }
    }

    /// Does what the reader thread of a client does with a piece of input.
    fn feed(&mut self, target: &Target, mut piece: &[u8]) {
        while !self.over
            && let Some(found) = self.decoder.next(&mut piece)
        {
            let line = match self.session.answer(target, found) {
                CommandAnswer::Now(line) => line,
                CommandAnswer::AtTheEnd { id } => {
                    self.over = true;
                    codec::reply(Ok(json!({})), id)
                }
            };
            self.session.hold = None;
            self.lines.push(line);
        }
        assert!(self.decoder.held() <= MOST_HELD, "{} bytes held", self.decoder.held());
    }
}

/// A disk whose answers are always the same. Its host does not report the allocated size, so no job
/// can start.
fn target() -> Target {
    let image = SimStorage::new(NewImage::file_for_tests(9, 1 << 16, None));
    let disk = Disk::for_tests(Image::open(Arc::clone(&image)).expect("an image"), None);
    image.withhold_facts();
    let jobs = Jobs::new();
    Target {
        disk: Arc::new(disk),
        mountpoint: "/disk".into(),
        pid: std::process::id(),
        started: std::time::UNIX_EPOCH,
        streams: Streams::keeping(&jobs, "drive0", jiff::tz::TimeZone::UTC, Box::new(|_| Ok(()))),
        jobs,
        device: "drive0".into(),
        priority: Priority::Normal,
        quit: crossbeam_channel::bounded(1).0,
        is_file: Arc::new(|_, _| false),
        log: LogFacts { place: None, last_warning: Arc::new(|| None) },
        metrics: None,
        grown: Arc::new(|_| {}),
        is_answering: Arc::new(|| true),
        sources: Arc::new(Vec::new),
        order_base: Arc::new(|| None),
        takeover: Arc::new(super::facts::TakeoverFacts::default),
    }
}

/// Checks that a line is one reply in ASCII.
fn check_line(line: &str) {
    assert!(line.len() <= LONGEST_LINE, "a line of {} bytes", line.len());
    let text = line.strip_suffix("\r\n").unwrap_or_else(|| panic!("no line end: {line:?}"));
    assert!(text.bytes().all(|byte| (b' '..=b'~').contains(&byte)), "{text:?}");
    let (mut decoder, mut rest) = (Decoder::default(), text.as_bytes());
    // An echo may be longer than the longest message.
    if text.len() < MAX_SIZE
        && text.bytes().filter(|&byte| byte == b',').count() < MAX_TOKENS / 8
        && depth(text.as_bytes()) < 1024
    {
        let reply = decoder.next(&mut rest);
        assert!(matches!(reply, Some(Ok(Value::Object(_)))) && rest.is_empty(), "{text}");
    }
    if depth(text.as_bytes()) < SHALLOW {
        let reply: Value =
            serde_json::from_str(text).unwrap_or_else(|error| panic!("{error}: {text}"));
        let members = reply.as_object().unwrap_or_else(|| panic!("no object: {text}"));
        assert!(
            members.keys().all(|key| ["return", "error", "id"].contains(&key.as_str())),
            "{text}"
        );
        assert!(members.contains_key("return") != members.contains_key("error"), "{text}");
        if let Some(error) = members.get("error") {
            assert!(
                error["class"].is_string()
                    && error["desc"].is_string()
                    && error.as_object().is_some_and(|error| error.len() == 2)
            );
        }
    }
}

/// Returns the number of opening brackets, which is at least the nesting depth.
fn depth(text: &[u8]) -> usize {
    text.iter().filter(|byte| matches!(byte, b'[' | b'{')).count()
}

/// Returns the lines that each client gets if all talk at once; `seed` determines the order of
/// their pieces.
pub(super) fn converse(clients: &Clients<'_>, seed: u64) -> Vec<Vec<String>> {
    let target = target();
    let mut random = Random::new(seed);
    let mut connections: Vec<_> =
        clients.iter().map(|pieces| (FuzzConnection::new(), pieces.iter())).collect();
    let mut left: usize = clients.iter().map(Vec::len).sum();
    while left > 0 {
        let (connection, pieces) = &mut connections[random.below(clients.len())];
        if let Some(piece) = pieces.next() {
            connection.feed(&target, piece);
            left -= 1;
        }
    }
    connections.into_iter().map(|(connection, _)| connection.lines).collect()
}

/// Runs all clients at once, and checks that each gets the same lines as if it were alone and its
/// bytes came in one piece. Returns these lines.
pub(super) fn check(streams: &[Vec<u8>], seed: u64) -> Vec<Vec<String>> {
    let alone: Vec<_> =
        streams.iter().map(|stream| converse(&vec![vec![&stream[..]]], 0).remove(0)).collect();
    // The lines of the other run are compared with these.
    alone.iter().flatten().for_each(|line| check_line(line));
    let clients: Clients<'_> =
        streams.iter().zip(seed..).map(|(stream, seed)| cut(stream, seed)).collect();
    let together = converse(&clients, seed);
    for (client, (alone, together)) in alone.iter().zip(&together).enumerate() {
        assert!(
            alone == together,
            "client {client}: {alone:?} when alone, {together:?} in pieces of {:?}",
            &clients[client]
        );
    }
    alone
}

/// Splits `bytes` into pieces as sockets might deliver them.
fn cut(bytes: &[u8], seed: u64) -> Vec<&[u8]> {
    let mut random = Random::new(seed);
    let longest = [1, 2, 16, 1000, 100_000][random.below(5)].max(bytes.len() / 10_000);
    let (mut pieces, mut rest) = (Vec::new(), bytes);
    while !rest.is_empty() {
        let (piece, after) = rest.split_at(rest.len().min(1 + random.below(longest)));
        pieces.push(piece);
        rest = after;
    }
    pieces
}

/// Entry point of the fuzz target. Two bytes determine the number of clients and how their bytes
/// are split. Each client sends a tail of the remaining bytes.
///
/// # Panics
/// If a check fails.
pub fn any_bytes(data: &[u8]) {
    let [first, second, bytes @ ..] = data else { return };
    if depth(bytes) < SHALLOW {
        return judge(bytes, *first, *second);
    }
    std::thread::scope(|scope| {
        let judging = std::thread::Builder::new()
            .stack_size(STACK)
            .spawn_scoped(scope, || judge(bytes, *first, *second));
        if let Err(panic) = judging.expect("a thread").join() {
            std::panic::resume_unwind(panic);
        }
    });
}

fn judge(bytes: &[u8], first: u8, second: u8) {
    const REQUEST: &[u8] = br#"{"execute":"query-version","id":"the last one"}"#;
    let count = [1, 1, 2, 4][usize::from(first % 4)];
    // A control byte ends any incomplete value.
    let end = [0xff, 0xfe, 0x00, 0x01][usize::from(first / 4 % 4)];
    let streams: Vec<Vec<u8>> =
        (0..count).map(|i| [&bytes[bytes.len() * i / count..], &[end], REQUEST].concat()).collect();
    for lines in check(&streams, u64::from(second)) {
        let last = lines.last().map(String::as_str).unwrap_or_default();
        let quit =
            lines.len() > 1 && !last.contains("the last one") && last.contains(r#""return": {}"#);
        assert!(
            quit || last.contains(r#""id": "the last one""#),
            "no answer behind a control byte: {lines:?}"
        );
    }
}

/// A small generator of random numbers (splitmix64): its output depends only on the seed.
struct Random(u64);

impl Random {
    fn new(seed: u64) -> Self {
        Random(seed)
    }

    fn below(&mut self, bound: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ self.0 >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ mixed >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((mixed ^ mixed >> 31) % bound as u64) as usize
    }
}
