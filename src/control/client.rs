//! One connection: the queue of lines to send, and the thread that sends them.

use std::collections::VecDeque;
use std::io::{self, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};

/// Most bytes of events that may wait for a client before it loses its connection: hours of events
/// of a busy job.
const MAX_QUEUED: usize = 1 << 20;
/// Most bytes that may wait while the next request of the client is read, because a client may send
/// many requests and read later. So the replies that wait are bounded by this number plus the
/// longest reply: a request of 1 MiB may be echoed as 6 MiB.
const ROOM: usize = MAX_QUEUED / 4;
/// How long the client may leave its end of the socket full.
const WRITE_TIMEOUT: Duration = Duration::from_secs(30);

/// A connection.
#[derive(Debug)]
pub(super) struct Client {
    /// Number of the connection, for the log.
    pub number: u64,
    pub connected: Instant,
    stream: UnixStream,
    /// Taken after the lock of the fan-out. Only locks of the log are taken while it is held.
    outbox: Mutex<Outbox>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct Outbox {
    lines: VecDeque<(OutboxLine, Arc<str>)>,
    /// Bytes of the queued lines and of the line that is being written.
    bytes: usize,
    /// Bytes of events among them.
    event_bytes: usize,
    /// No more lines are accepted; the connection closes when all lines are sent.
    closed: bool,
    /// The writer thread has ended.
    ended: bool,
}

/// Kind of a line.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum OutboxLine {
    /// The greeting or a reply.
    Reply,
    /// An event.
    Event,
}

impl OutboxLine {
    fn event_bytes(self, line: &str) -> usize {
        if self == OutboxLine::Event { line.len() } else { 0 }
    }
}

impl Client {
    pub fn new(number: u64, stream: UnixStream) -> io::Result<Self> {
        stream.set_write_timeout(Some(WRITE_TIMEOUT))?;
        Ok(Client {
            number,
            connected: Instant::now(),
            stream,
            outbox: Mutex::default(),
            changed: Condvar::new(),
        })
    }

    /// Returns the socket, for the reader thread.
    pub fn stream(&self) -> &UnixStream {
        &self.stream
    }

    /// Queues a line. Never blocks: a client with too many queued events loses its connection. A
    /// thread that sends replies calls [`Client::wait_for_room`] first.
    pub fn send(&self, kind: OutboxLine, line: Arc<str>) {
        let mut outbox = self.outbox.lock();
        if outbox.closed {
            return;
        }
        if kind == OutboxLine::Event && outbox.event_bytes + line.len() > MAX_QUEUED {
            log::warn!("QMP client {}: does not read what it is sent, disconnected", self.number);
            drop(outbox);
            return self.disconnect();
        }
        outbox.bytes += line.len();
        outbox.event_bytes += kind.event_bytes(&line);
        outbox.lines.push_back((kind, line));
        self.changed.notify_all();
    }

    /// Waits until there is space for replies. Returns `false` if the connection is closed.
    pub fn wait_for_room(&self) -> bool {
        let mut outbox = self.outbox.lock();
        while outbox.bytes > ROOM && !outbox.closed {
            self.changed.wait(&mut outbox);
        }
        !outbox.closed
    }

    /// Accepts no more lines; the connection ends when the queued lines are sent.
    pub fn close(&self) {
        self.outbox.lock().closed = true;
        self.changed.notify_all();
    }

    /// Ends the connection at once.
    pub fn disconnect(&self) {
        let mut outbox = self.outbox.lock();
        outbox.closed = true;
        outbox.lines.clear();
        self.changed.notify_all();
        drop(outbox);
        // Wakes the reader and the writer thread. The socket may be closed already.
        let _ = self.stream.shutdown(Shutdown::Both);
    }

    /// Waits until the writer thread has ended, but not beyond `give_up`.
    pub fn wait_until_sent(&self, give_up: Instant) {
        let mut outbox = self.outbox.lock();
        while !outbox.ended {
            if self.changed.wait_until(&mut outbox, give_up).timed_out() {
                return;
            }
        }
    }

    /// Runs the writer thread: sends lines until the connection ends.
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

    /// Ends the connection at once, and marks the writer thread as ended.
    pub fn end(&self) {
        self.disconnect();
        self.outbox.lock().ended = true;
        self.changed.notify_all();
    }

    /// Waits until the writer thread has ended, which takes as long as the client takes to read the
    /// queued lines.
    pub fn wait_until_ended(&self) {
        let mut outbox = self.outbox.lock();
        while !outbox.ended {
            self.changed.wait(&mut outbox);
        }
    }
}
