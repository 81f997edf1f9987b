//! Read-ahead: reader threads read the next chunks of a stream before the job's thread needs them.
//!
//! Lookups in the tables of local layers are made by the job's thread, so that a chunk without work
//! costs no message between threads. With remote layers, a lookup may wait for a server, and so may
//! the bytes of a range that will be cloned: the readers do all of that.

use std::collections::VecDeque;
use std::ops::Range;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use crossbeam_channel::{Receiver, RecvTimeoutError, Sender, bounded, unbounded};

use super::{Priority, STREAM_CHUNK};
use crate::disk::{Ahead, Disk, ToRead};

/// Number of reader threads. One is enough if reading is only copying; several decompress in
/// parallel, and keep a slow host busy.
const READERS: usize = 3;
/// Number of chunks after the current one that may be read ahead. This bounds the reads in vain of
/// a job that is paused or limited.
const CHUNKS_AHEAD: usize = 4;
/// The most that is read ahead, in bytes.
pub(super) const READ_AHEAD: u64 = (CHUNKS_AHEAD as u64 + 1) * STREAM_CHUNK;

/// The nice value of the reader threads of a stream of low priority. Only the readers have it,
/// because they hold no range guard or lock that a guest waits for. The job's thread copies up and
/// holds both; with a lower priority on a busy host it would hold them for as long as it is not
/// scheduled.
const NICE: i32 = 10;

/// How often a job that waits for a reader looks whether it is to pause or to end.
const LOOK: Duration = Duration::from_millis(100);

/// One chunk for a reader thread, and the channel for the bytes.
struct ReadAheadRequest {
    disk: Arc<Disk>,
    work: ReaderWork,
    /// Whether the reader gives way on the processor, as the job's thread does.
    gives_way: bool,
    answer: Sender<Ahead>,
}

/// What a reader thread does for a chunk.
enum ReaderWork {
    /// Read these ranges.
    Read(ToRead),
    /// Look up what has to be read, read it, and bring in what has to be cloned.
    Bring { range: Range<u64>, depth: usize },
}

/// A chunk whose mapping was looked up.
struct ReadChunk {
    start: u64,
    /// `None` if nothing has to be read.
    bytes: Option<Receiver<Ahead>>,
}

/// The reader threads of a stream. They are started with the first range that has to be read, and
/// end some time after this value is dropped.
pub(super) struct Readers {
    disk: Arc<Disk>,
    is_remote: bool,
    priority: Priority,
    depth: usize,
    requests: Option<Sender<ReadAheadRequest>>,
}

/// What a reader is doing for a range.
pub(super) struct Asked {
    /// `None` if nothing has to be read.
    pub bytes: Option<Receiver<Ahead>>,
    /// Every byte before this offset that has to be read was requested. It may lie beyond the
    /// range, because a cluster may be larger, and before it, if nothing has to be read.
    to: u64,
}

impl Readers {
    pub(super) fn new(disk: &Arc<Disk>, priority: Priority, depth: usize) -> Readers {
        let (disk, is_remote) = (Arc::clone(disk), disk.has_remote_layer());
        Readers { disk, is_remote, priority, depth, requests: None }
    }

    /// Begins to read what has to be read of a range.
    pub(super) fn ask(&mut self, range: Range<u64>) -> Asked {
        let (answer, bytes) = bounded(1);
        if self.is_remote {
            let to = self.disk.end_of_clusters(range.end);
            let is_sent = self.send(ReaderWork::Bring { range, depth: self.depth }, answer);
            return Asked { bytes: is_sent.then_some(bytes), to };
        }
        let to_read = self.disk.to_read(range, self.depth);
        let Some(to) = to_read.end() else { return Asked { bytes: None, to: 0 } };
        let is_sent = if to_read.is_empty() {
            // Nothing to read ahead: the answer may carry an error of the lookup, which is reported
            // when the range is copied up.
            answer.send(self.disk.read_ahead(to_read)).is_ok()
        } else {
            self.send(ReaderWork::Read(to_read), answer)
        };
        Asked { bytes: is_sent.then_some(bytes), to }
    }

    /// Gives work to the threads. Returns false if none could be started.
    fn send(&mut self, work: ReaderWork, answer: Sender<Ahead>) -> bool {
        let requests = self.requests.get_or_insert_with(|| start_readers(self.priority));
        let disk = Arc::clone(&self.disk);
        // The job's thread and its readers give way at the same time.
        let gives_way = host::background::gives_way();
        requests.send(ReadAheadRequest { disk, work, gives_way, answer }).is_ok()
    }
}

/// Reads the chunks of a stream ahead, in order.
pub(super) struct ReadAhead {
    readers: Readers,
    /// End of the stream, in bytes.
    len: u64,
    /// Start of the first chunk that was not yet looked up.
    next: u64,
    /// Every byte before this offset that has to be read was requested. It may lie beyond `next`,
    /// because a cluster may be larger than a chunk.
    asked_to: u64,
    chunks: VecDeque<ReadChunk>,
}

impl ReadAhead {
    /// Creates the read-ahead of a stream over `range`.
    pub(super) fn new(
        disk: &Arc<Disk>,
        priority: Priority,
        depth: usize,
        range: Range<u64>,
    ) -> ReadAhead {
        ReadAhead {
            readers: Readers::new(disk, priority, depth),
            len: range.end,
            next: range.start,
            asked_to: 0,
            chunks: VecDeque::new(),
        }
    }

    /// Returns the bytes that were read of the chunk at `start`; waits while a reader is still
    /// reading it and `go_on` returns true. Chunks are taken in order. `None` if `go_on` has
    /// returned false.
    pub(super) fn take(&mut self, start: u64, go_on: impl Fn() -> bool) -> Option<Ahead> {
        while self.next < self.len && self.chunks.len() <= CHUNKS_AHEAD {
            let end = self.len.min(self.next + STREAM_CHUNK);
            let bytes = self.ask(self.next..end);
            self.chunks.push_back(ReadChunk { start: self.next, bytes });
            self.next = end;
        }
        let chunk = self.chunks.pop_front();
        debug_assert!(chunk.as_ref().is_some_and(|chunk| chunk.start == start), "in order");
        let Some(bytes) = chunk.and_then(|chunk| chunk.bytes) else {
            return Some(Ahead::default());
        };
        loop {
            match bytes.recv_timeout(LOOK) {
                Ok(bytes) => return Some(bytes),
                Err(RecvTimeoutError::Timeout) if go_on() => {}
                Err(RecvTimeoutError::Timeout) => return None,
                // The reader thread has ended without sending its bytes. The chunk is read when it
                // is copied up.
                Err(RecvTimeoutError::Disconnected) => return Some(Ahead::default()),
            }
        }
    }

    /// Forgets what was read ahead: the next chunk to be taken is the one at `start`, and it is
    /// read again.
    pub(super) fn start_again(&mut self, start: u64) {
        self.chunks.clear();
        (self.next, self.asked_to) = (start, 0);
    }

    fn ask(&mut self, chunk: Range<u64>) -> Option<Receiver<Ahead>> {
        let rest = chunk.start.max(self.asked_to)..chunk.end;
        if rest.is_empty() {
            return None;
        }
        let Asked { bytes, to } = self.readers.ask(rest);
        self.asked_to = self.asked_to.max(to);
        bytes
    }
}

/// Starts the reader threads, which serve requests until the returned sender is dropped. If no
/// thread can be started, sending fails.
fn start_readers(priority: Priority) -> Sender<ReadAheadRequest> {
    let (sender, requests) = unbounded::<ReadAheadRequest>();
    for _ in 0..READERS {
        let requests = requests.clone();
        let started = thread::Builder::new().name("stream-read".into()).spawn(move || {
            host::background::mark_thread();
            if priority == Priority::Low {
                host::background::lower_priority(NICE);
            }
            for ReadAheadRequest { disk, work, gives_way, answer } in requests {
                host::background::set_gives_way(gives_way);
                let bytes = match work {
                    ReaderWork::Read(to_read) => disk.read_ahead(to_read),
                    ReaderWork::Bring { range, depth } => disk.bring_ahead(range, depth),
                };
                // Dropped before the answer is sent: a job that has all its answers must hold the
                // last reference to the disk.
                drop(disk);
                // Sending fails if the job has ended and dropped its receiver.
                let _ = answer.send(bytes);
            }
        });
        if let Err(error) = started {
            log::warn!("a thread that reads ahead could not be started: {error}");
        }
    }
    sender
}
