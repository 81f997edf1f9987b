//! One connection: what is to be sent, and the thread that sends it.

use std::collections::VecDeque;
use std::io::{self, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};

/// Bytes of events that may wait for a client before it loses its connection: hours of events of a busy job.
const MAX_QUEUED: usize = 1 << 20;
/// Bytes that may wait before the client's next request is read: it may send many at once, and read later. So replies are bounded by this and the
/// longest reply, however long: a request of 1 MiB may be echoed as 6 MiB.
const ROOM: usize = MAX_QUEUED / 4;
/// How long the client may leave its end of the socket full.
const WRITE_TIMEOUT: Duration = Duration::from_secs(30);

/// A connection.
#[derive(Debug)]
pub(super) struct Client {
    /// Counts connections, for the log.
    pub number: u64,
    pub connected: Instant,
    stream: UnixStream,
    /// Rank: below the fan-out, a leaf.
    outbox: Mutex<Outbox>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct Outbox {
    lines: VecDeque<(Line, Arc<str>)>,
    /// Bytes of the lines, and of what is being written.
    bytes: usize,
    /// Those of events.
    event_bytes: usize,
    /// Nothing more is taken; the connection closes when all is sent.
    closed: bool,
    /// The writer is done.
    ended: bool,
}

/// What a line is.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Line {
    /// Asked for: the greeting, a reply.
    Reply,
    /// Not asked for.
    Event,
}

impl Line {
    fn event_bytes(self, line: &str) -> usize {
        if self == Line::Event { line.len() } else { 0 }
    }
}

impl Client {
    pub fn new(number: u64, stream: UnixStream) -> io::Result<Self> {
        stream.set_write_timeout(Some(WRITE_TIMEOUT))?;
        Ok(Client { number, connected: Instant::now(), stream, outbox: Mutex::default(), changed: Condvar::new() })
    }

    /// The socket, for its reader.
    pub fn stream(&self) -> &UnixStream {
        &self.stream
    }

    /// Sends a line, later. Never blocks: a client whose outbox is full of events loses its connection. Whoever sends replies waits for room first.
    pub fn send(&self, kind: Line, line: Arc<str>) {
        let mut outbox = self.outbox.lock();
        if outbox.closed {
            return;
        }
        if kind == Line::Event && outbox.event_bytes + line.len() > MAX_QUEUED {
            log::warn!("QMP client {}: does not read what it is sent, disconnected", self.number);
            drop(outbox);
            return self.disconnect();
        }
        outbox.bytes += line.len();
        outbox.event_bytes += kind.event_bytes(&line);
        outbox.lines.push_back((kind, line));
        self.changed.notify_all();
    }

    /// Waits until there is room for replies. `false` when the connection is over.
    pub fn wait_for_room(&self) -> bool {
        let mut outbox = self.outbox.lock();
        while outbox.bytes > ROOM && !outbox.closed {
            self.changed.wait(&mut outbox);
        }
        !outbox.closed
    }

    /// Takes no more lines; the connection ends when those there are have been sent.
    pub fn close(&self) {
        self.outbox.lock().closed = true;
        self.changed.notify_all();
    }

    /// Ends the connection now.
    pub fn disconnect(&self) {
        let mut outbox = self.outbox.lock();
        outbox.closed = true;
        outbox.lines.clear();
        self.changed.notify_all();
        drop(outbox);
        // Wakes the reader and the writer. It may be over already.
        let _ = self.stream.shutdown(Shutdown::Both);
    }

    /// Waits until the writer is done, but not beyond `give_up`.
    pub fn wait_until_sent(&self, give_up: Instant) {
        let mut outbox = self.outbox.lock();
        while !outbox.ended {
            if self.changed.wait_until(&mut outbox, give_up).timed_out() {
                return;
            }
        }
    }

    /// The writer: sends lines until the connection is over.
    pub fn write_lines(&self) {
        loop {
            let mut outbox = self.outbox.lock();
            while outbox.lines.is_empty() && !outbox.closed {
                self.changed.wait(&mut outbox);
            }
            let Some((kind, line)) = outbox.lines.pop_front() else { break };
            drop(outbox);
            if let Err(error) = (&self.stream).write_all(line.as_bytes()) {
                log::debug!("QMP client {}: {error}", self.number);
                break;
            }
            let mut outbox = self.outbox.lock();
            outbox.bytes -= line.len();
            outbox.event_bytes -= kind.event_bytes(&line);
            self.changed.notify_all();
        }
        self.end();
    }

    /// Ends the connection now; nobody will write any more.
    pub fn end(&self) {
        self.disconnect();
        self.outbox.lock().ended = true;
        self.changed.notify_all();
    }

    /// Waits until the writer is done, which takes as long as the client takes to read what there is.
    pub fn wait_until_ended(&self) {
        let mut outbox = self.outbox.lock();
        while !outbox.ended {
            self.changed.wait(&mut outbox);
        }
    }
}
