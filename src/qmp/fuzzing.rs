//! What must hold whatever bytes clients send: the judge of the property test (`properties.rs`) and of the fuzz target (`tests/fuzz`), and compiled for
//! these two only.

use serde_json::{Value, json};

use super::call::{Backend, Facts, Session};
use super::codec::{self, Decoder, MAX_SIZE, MAX_TOKENS};
use super::dispatch::Answer;
use super::lexer::Token;
use crate::job::Jobs;
use crate::stream::Streams;
use crate::{Error, ErrorKind};

/// What a decoder may hold: the text of one message, its tokens, and the byte that is one too many.
const MOST_HELD: usize = MAX_SIZE + MAX_TOKENS * size_of::<Token>() + 1;
/// The length of a line: each byte of a message echoed as `\uXXXX`, and something around it. The client library `qemu.qmp` reads 10 MiB.
const LONGEST_LINE: usize = 6 * MAX_SIZE + 4096;
/// A stack for the deepest message, with room for a sanitizer's share.
const STACK: usize = 4 * codec::STACK;
/// So much nesting fits any stack, and serde's reader.
const SHALLOW: usize = 100;

/// Clients, each with the pieces in which its bytes arrive.
pub(super) type Clients<'a> = Vec<Vec<&'a [u8]>>;

/// A connection without its socket.
struct Connection {
    decoder: Decoder,
    session: Session,
    lines: Vec<String>,
    /// It has asked to quit; what follows is not read.
    over: bool,
}

impl Connection {
    fn new() -> Self {
        Connection { decoder: Decoder::default(), session: Session::new(), lines: Vec::new(), over: false }
    }

    /// What the reader of a client does with what it has read.
    fn feed(&mut self, backend: &Backend, mut piece: &[u8]) {
        while !self.over
            && let Some(found) = self.decoder.next(&mut piece)
        {
            let line = match self.session.answer(backend, found) {
                Answer::Now(line) => line,
                Answer::AtTheEnd { id } => {
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

/// A backend without a disk, whose answers are always the same.
fn backend() -> Backend {
    let no_disk = || Error::new(ErrorKind::Io, "no disk");
    let jobs = Jobs::new();
    Backend {
        streams: Streams::keeping(&jobs, "drive0", jiff::tz::TimeZone::UTC, Box::new(|_| Ok(()))),
        jobs,
        device: "drive0".into(),
        quit: crossbeam_channel::bounded(1).0,
        starting: std::sync::Arc::default(),
        info: Box::new(move || Err(no_disk())),
        stats: Box::new(Default::default),
        facts: Facts {
            mountpoint: "/disk".into(),
            started: std::time::UNIX_EPOCH,
            metrics: None,
            log: None,
            is_usable: Box::new(|| true),
            troubles: Box::new(Default::default),
            is_answering: Box::new(|| true),
            totals: Box::new(move || Err(no_disk())),
            survey: Box::new(move |_| Err(no_disk())),
            extents: Box::new(move |_, _| Err(no_disk())),
        },
        is_file: std::sync::Arc::new(|_, _| false),
        grow: Box::new(move |_| Err(no_disk())),
        start_stream: Box::new(move |_| Err(no_disk())),
    }
}

/// One reply, in ASCII, on one line.
fn check_line(line: &str) {
    assert!(line.len() <= LONGEST_LINE, "a line of {} bytes", line.len());
    let text = line.strip_suffix("\r\n").unwrap_or_else(|| panic!("no line end: {line:?}"));
    assert!(text.bytes().all(|byte| (b' '..=b'~').contains(&byte)), "{text:?}");
    let (mut decoder, mut rest) = (Decoder::default(), text.as_bytes());
    // What is echoed may be longer than what may be sent.
    if text.len() < MAX_SIZE && text.bytes().filter(|&byte| byte == b',').count() < MAX_TOKENS / 8 && depth(text.as_bytes()) < 1024 {
        let reply = decoder.next(&mut rest);
        assert!(matches!(reply, Some(Ok(Value::Object(_)))) && rest.is_empty(), "{text}");
    }
    if depth(text.as_bytes()) < SHALLOW {
        let reply: Value = serde_json::from_str(text).unwrap_or_else(|error| panic!("{error}: {text}"));
        let members = reply.as_object().unwrap_or_else(|| panic!("no object: {text}"));
        assert!(members.keys().all(|key| ["return", "error", "id"].contains(&key.as_str())), "{text}");
        assert!(members.contains_key("return") != members.contains_key("error"), "{text}");
        if let Some(error) = members.get("error") {
            assert!(error["class"].is_string() && error["desc"].is_string() && error.as_object().is_some_and(|error| error.len() == 2));
        }
    }
}

/// Brackets that open: no less than how deep they nest.
fn depth(text: &[u8]) -> usize {
    text.iter().filter(|byte| matches!(byte, b'[' | b'{')).count()
}

/// The lines that each client gets, if they all talk at once: who comes next is drawn from `seed`.
pub(super) fn converse(clients: &Clients<'_>, seed: u64) -> Vec<Vec<String>> {
    let backend = backend();
    let mut random = Random::new(seed);
    let mut connections: Vec<_> = clients.iter().map(|pieces| (Connection::new(), pieces.iter())).collect();
    let mut left: usize = clients.iter().map(Vec::len).sum();
    while left > 0 {
        let (connection, pieces) = &mut connections[random.below(clients.len())];
        if let Some(piece) = pieces.next() {
            connection.feed(&backend, piece);
            left -= 1;
        }
    }
    connections.into_iter().map(|(connection, _)| connection.lines).collect()
}

/// Lets the clients talk, and checks that each gets what it would get if it were alone and all its bytes came at once; returns it.
pub(super) fn check(streams: &[Vec<u8>], seed: u64) -> Vec<Vec<String>> {
    let alone: Vec<_> = streams.iter().map(|stream| converse(&vec![vec![&stream[..]]], 0).remove(0)).collect();
    // Those of the other run are the same.
    alone.iter().flatten().for_each(|line| check_line(line));
    let clients: Clients<'_> = streams.iter().zip(seed..).map(|(stream, seed)| cut(stream, seed)).collect();
    let together = converse(&clients, seed);
    for (client, (alone, together)) in alone.iter().zip(&together).enumerate() {
        assert!(alone == together, "client {client}: {alone:?} when alone, {together:?} in pieces of {:?}", &clients[client]);
    }
    alone
}

/// `bytes` in pieces as sockets might deliver them.
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

/// The fuzz target. Two bytes choose how many clients there are and how their bytes are cut; each sends a tail of the others.
///
/// # Panics
/// When something does not hold.
pub fn any_bytes(data: &[u8]) {
    let [first, second, bytes @ ..] = data else { return };
    if depth(bytes) < SHALLOW {
        return judge(bytes, *first, *second);
    }
    std::thread::scope(|scope| {
        let judging = std::thread::Builder::new().stack_size(STACK).spawn_scoped(scope, || judge(bytes, *first, *second));
        if let Err(panic) = judging.expect("a thread").join() {
            std::panic::resume_unwind(panic);
        }
    });
}

fn judge(bytes: &[u8], first: u8, second: u8) {
    const REQUEST: &[u8] = br#"{"execute":"query-version","id":"the last one"}"#;
    let count = [1, 1, 2, 4][usize::from(first % 4)];
    // A control byte makes an end of whatever there is.
    let end = [0xff, 0xfe, 0x00, 0x01][usize::from(first / 4 % 4)];
    let streams: Vec<Vec<u8>> = (0..count).map(|i| [&bytes[bytes.len() * i / count..], &[end], REQUEST].concat()).collect();
    for lines in check(&streams, u64::from(second)) {
        let last = lines.last().map(String::as_str).unwrap_or_default();
        let quit = lines.len() > 1 && !last.contains("the last one") && last.contains(r#""return": {}"#);
        assert!(quit || last.contains(r#""id": "the last one""#), "no answer behind a control byte: {lines:?}");
    }
}

/// A small generator of numbers (splitmix64): what is drawn must depend on the input only.
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
