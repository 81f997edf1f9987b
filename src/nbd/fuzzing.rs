//! A whole conversation with a server that sends arbitrary bytes, without a connection: for the
//! fuzzer.

use std::io::{self, Read, Write};
use std::ops::Range;
use std::sync::Arc;
use std::sync::mpsc;

use crate::buffers::BufferPool;
use crate::coverage::Coverage;
use crate::error::NbdError;
use crate::handshake;
use crate::protocol::NbdCommand;
use crate::replies::{Event, NbdRequest, Replies, ReplyRules};

/// Reads and block status requests that are in flight while the server's bytes are read, so short
/// that the answers to all of them fit into an input of the fuzzer. Cookies are numbered from one.
const REQUESTS: [(NbdCommand, Range<u64>); 4] = [
    (NbdCommand::Read, 0..64),
    (NbdCommand::Read, 65536..65536 + 16),
    (NbdCommand::BlockStatus, 0..1 << 20),
    (NbdCommand::Read, 1 << 30..(1 << 30) + 200),
];

/// A server that has sent everything in advance.
struct Script<'a> {
    bytes: &'a [u8],
}

impl Read for Script<'_> {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        self.bytes.read(bytes)
    }
}

impl Write for Script<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Runs the client against a server that sends `bytes`. The first byte says where the conversation
/// starts: at the greeting, at the demand for TLS, or after a negotiation with structured or simple
/// replies.
///
/// # Panics
/// If the client accepts what contradicts its requests, or leaves one without an end.
pub fn fuzz_conversation(bytes: &[u8]) {
    let Some((&start, bytes)) = bytes.split_first() else { return };
    let mut server = Script { bytes };
    let rules = match start % 4 {
        0 => {
            let agreed = handshake::greet(&mut server)
                .and_then(|greeting| handshake::negotiate(&mut server, greeting, "export"));
            let Ok(agreed) = agreed.inspect_err(one_line) else { return };
            let sizes = agreed.sizes;
            assert!(i64::try_from(agreed.size).is_ok());
            assert!(sizes.minimum.is_power_of_two() && sizes.minimum <= sizes.maximum);
            agreed.rules
        }
        1 => {
            let agreed = handshake::greet(&mut server)
                .and_then(|greeting| handshake::start_tls(&mut server, greeting));
            let _ = agreed.inspect_err(one_line);
            return;
        }
        2 => ReplyRules { structured: true, allocation: Some(1) },
        _ => ReplyRules { structured: false, allocation: None },
    };
    transmission(&mut server, rules);
}

fn transmission(server: &mut Script<'_>, rules: ReplyRules) {
    let replies = Replies::new(rules, Arc::new(BufferPool::default()));
    let (sender, events) = mpsc::channel();
    let mut callers = Vec::new();
    for (tag, (command, range)) in (0..).zip(REQUESTS) {
        let (sender, events) = mpsc::channel();
        let len = u32::try_from(range.end - range.start).unwrap_or(u32::MAX);
        let request = NbdRequest { command, offset: range.start, len, tag };
        assert!(replies.begin(request, sender).is_ok());
        callers.push((tag, command, range, events));
    }
    // A caller that has given up.
    let request = NbdRequest { command: NbdCommand::Read, offset: 0, len: 1 << 20, tag: 99 };
    assert!(replies.begin(request, sender).is_ok());
    drop(events);
    let error = loop {
        if let Err(error) = replies.receive(server) {
            break error;
        }
    };
    one_line(&replies.fail_all(error));
    assert_eq!(replies.count(), 0);
    for (tag, command, range, events) in callers {
        check(tag, command, range, &events.iter().collect::<Vec<_>>());
    }
}

/// Checks the events of one request.
fn check(tag: u64, command: NbdCommand, range: Range<u64>, events: &[Event]) {
    let mut coverage = Coverage::new(range);
    let mut statuses = 0;
    let (last, others) = events.split_last().expect("each request gets an event");
    for event in others {
        match event {
            Event::Data { offset, buffer } => {
                assert!(coverage.add(*offset, buffer.bytes().len() as u64));
            }
            Event::Zeros { offset, len } => assert!(coverage.add(*offset, *len)),
            Event::Status(descriptors) => {
                assert!(!descriptors.is_empty() && descriptors.iter().all(|run| run.len > 0));
                statuses += 1;
            }
            Event::Done { .. } => panic!("a request has ended twice"),
        }
    }
    let Event::Done { tag: ended, result } = last else { panic!("a request has not ended") };
    assert_eq!(*ended, tag);
    match (command, result) {
        (_, Err(error)) => one_line(error),
        (NbdCommand::BlockStatus, Ok(())) => assert_eq!(statuses, 1),
        (_, Ok(())) => assert!(coverage.is_complete() && statuses == 0),
    }
}

fn one_line(error: &NbdError) {
    let text = error.to_string();
    assert!(!text.chars().any(char::is_control) && text.len() < 4096, "{text}");
}
