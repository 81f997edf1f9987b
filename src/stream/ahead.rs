//! The chunks of a stream that are read before their turn.

use std::collections::VecDeque;
use std::sync::Arc;
use std::thread;

use crossbeam_channel::{Receiver, Sender, bounded, unbounded};

use super::{Priority, STREAM_CHUNK};
use crate::disk::{Ahead, Disk, ToRead};

/// Threads that read. One is enough where reading is copying; several decompress at the same time, and keep a slow host busy.
const READERS: usize = 3;
/// Chunks beyond the one whose turn it is that may be read already: what a job that is paused or slowed down has read too early, at most.
const CHUNKS_AHEAD: usize = 4;

/// The nice value of the readers of a stream that gives way. Only theirs: they hold nothing that a guest waits for, whereas the thread that copies up
/// holds ranges and locks, and on a host without a free processor would hold them for as long as it is not let run.
const NICE: i32 = 10;

/// A chunk to be read, and where the bytes are wanted.
struct Request {
    disk: Arc<Disk>,
    to_read: ToRead,
    answer: Sender<Ahead>,
}

/// A chunk that was looked at.
struct Chunk {
    start: u64,
    /// None where nothing has to be read.
    bytes: Option<Receiver<Ahead>>,
}

/// Reads the chunks of a stream ahead, in order. Threads are started when there is something to read; they end some time after this is dropped.
pub(super) struct ReadAhead {
    disk: Arc<Disk>,
    priority: Priority,
    depth: usize,
    /// Where the stream ends.
    len: u64,
    /// Where the first chunk starts that was not looked at.
    next: u64,
    /// Everything before it that has to be read was asked for: a cluster may be larger than a chunk.
    asked_to: u64,
    chunks: VecDeque<Chunk>,
    readers: Option<Sender<Request>>,
}

impl ReadAhead {
    /// Of a stream that goes from the start of `range` to its end.
    pub(super) fn new(disk: &Arc<Disk>, priority: Priority, depth: usize, range: std::ops::Range<u64>) -> ReadAhead {
        let (next, len) = (range.start, range.end);
        ReadAhead { disk: Arc::clone(disk), priority, depth, len, next, asked_to: 0, chunks: VecDeque::new(), readers: None }
    }

    /// What was read of the chunk that starts at `start`; waits for it if it is being read. Chunks are taken in order. For one that is taken
    /// again there is nothing: it is read when it is copied up.
    pub(super) fn take(&mut self, start: u64) -> Ahead {
        while self.next < self.len && self.chunks.len() <= CHUNKS_AHEAD {
            let end = self.len.min(self.next + STREAM_CHUNK);
            let bytes = self.ask(self.next..end);
            self.chunks.push_back(Chunk { start: self.next, bytes });
            self.next = end;
        }
        if self.chunks.front().is_none_or(|chunk| chunk.start != start) {
            return Ahead::default();
        }
        // No answer: the reader is gone, and with it what it has read.
        self.chunks.pop_front().and_then(|chunk| chunk.bytes).and_then(|bytes| bytes.recv().ok()).unwrap_or_default()
    }

    fn ask(&mut self, chunk: std::ops::Range<u64>) -> Option<Receiver<Ahead>> {
        let rest = chunk.start.max(self.asked_to)..chunk.end;
        if rest.is_empty() {
            return None;
        }
        let to_read = self.disk.to_read(rest, self.depth);
        self.asked_to = self.asked_to.max(to_read.end()?);
        let (answer, bytes) = bounded(1);
        if to_read.is_empty() {
            // Why nobody knows what to read is told in its turn.
            answer.send(self.disk.read_ahead(to_read)).ok()?;
        } else {
            let readers = self.readers.get_or_insert_with(|| start_readers(self.priority));
            readers.send(Request { disk: Arc::clone(&self.disk), to_read, answer }).ok()?;
        }
        Some(bytes)
    }
}

/// Gives this thread, and on Linux no other, the priority of those that nobody waits for, if it has a higher one.
fn step_back() {
    if rustix::process::getpriority_process(None).is_ok_and(|nice| nice < NICE) {
        // Where this is not allowed the thread competes with the guest as any other.
        let _ = rustix::process::setpriority_process(None, NICE);
    }
}

/// Threads that serve what is sent, until nothing can be sent any more. Where none can be started, sending fails.
fn start_readers(priority: Priority) -> Sender<Request> {
    let (sender, requests) = unbounded::<Request>();
    for _ in 0..READERS {
        let requests = requests.clone();
        let started = thread::Builder::new().name("stream-read".into()).spawn(move || {
            if priority == Priority::Low {
                step_back();
            }
            for Request { disk, to_read, answer } in requests {
                let bytes = disk.read_ahead(to_read);
                // Before the answer: a job that has all its answers is the last to use the disk.
                drop(disk);
                // Nobody waits any more: the job has ended.
                let _ = answer.send(bytes);
            }
        });
        if let Err(error) = started {
            log::warn!("a thread that reads ahead could not be started: {error}");
        }
    }
    sender
}
