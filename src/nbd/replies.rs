//! Replies of a server to the requests of one connection.
//!
//! [`Replies`] has the requests that are in flight. [`Replies::receive`] reads one reply from any
//! reader, checks it against its request, and sends what it contains to the caller's channel.
//!
//! **Locks:** the table of requests. The thread that receives takes a request out of the table
//! while it reads the payload, and holds no lock then.
//! **Invariants:** a read ends well only if each of its bytes has come exactly once; each request
//! gets exactly one [`Event::Done`]; the events of a request come in the order of its chunks.

use std::collections::HashMap;
use std::io::{self, Read};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::Sender;
use std::time::{Duration, Instant};

use parking_lot::Mutex;

use crate::buffers::{BufferPool, PIECE, PieceBuffer};
use crate::coverage::Coverage;
use crate::error::{NbdError, NbdErrorKind, Result, errno_name, foreign};
use crate::protocol::{self, ChunkKind, Descriptor, NbdCommand, ReplyHeader};

/// Most requests in flight on one connection, as in QEMU (block/nbd.c, MAX_NBD_REQUESTS). nbdkit
/// has 16 threads per connection.
pub(crate) const MOST_IN_FLIGHT: usize = 16;
/// Smallest chunk that a server has a reason to send on average, in bytes, and how many more are
/// allowed. A server that sends smaller ones costs more memory and time than its data is worth.
const BYTES_PER_CHUNK: u32 = 512;
const MORE_CHUNKS: u32 = 16;
/// The fewest bytes in the stall timeout that keep a connection alive on which no request ends: a
/// server that sends a byte now and then would otherwise hold its requests for ever.
const FEWEST: u64 = 4 << 10;
/// ESHUTDOWN: the server is about to end.
const ESHUTDOWN: u32 = 108;

/// What a caller receives about its requests.
#[derive(Debug)]
pub(crate) enum Event {
    /// Data of a read.
    Data { offset: u64, buffer: PieceBuffer },
    /// Zeros of a read.
    Zeros { offset: u64, len: u64 },
    /// The answer to a block status.
    Status(Vec<Descriptor>),
    /// The request that the caller calls `tag` has ended.
    Done { tag: u64, result: Result<()> },
}

/// A request of a caller.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) struct NbdRequest {
    pub command: NbdCommand,
    pub offset: u64,
    pub len: u32,
    /// Returned in [`Event::Done`].
    pub tag: u64,
}

impl NbdRequest {
    fn end(&self) -> u64 {
        self.offset.saturating_add(u64::from(self.len))
    }
}

/// What was agreed on for the replies of a connection.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) struct ReplyRules {
    /// Replies to reads are structured.
    pub structured: bool,
    /// Id of the metadata context `base:allocation`.
    pub allocation: Option<u32>,
}

/// Why a request was not taken.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(crate) enum NotTaken {
    /// As many requests are in flight as are allowed.
    Full,
    /// The connection has ended or is about to.
    Ended,
}

/// The requests in flight of one connection.
#[derive(Debug)]
pub(crate) struct Replies {
    rules: ReplyRules,
    table: Mutex<Table>,
    buffers: Arc<BufferPool>,
    created: Instant,
    /// When the server last got on or became busy, in microseconds after `created`.
    heard: AtomicU64,
    /// Bytes that it has sent since then. Only the receiving thread writes it.
    since_heard: AtomicU64,
}

#[derive(Debug, Default)]
struct Table {
    requests: HashMap<u64, InFlight>,
    /// Requests in flight, with the one that the receiving thread has taken out.
    count: usize,
    last_cookie: u64,
    answered: bool,
    /// No new requests are taken.
    ending: bool,
    /// Why the connection has ended.
    ended: Option<NbdError>,
}

#[derive(Debug)]
struct InFlight {
    request: NbdRequest,
    events: Sender<Event>,
    coverage: Coverage,
    status_came: bool,
    chunks: u32,
    failure: Option<NbdError>,
    /// The caller does not wait any more.
    abandoned: bool,
}

impl Replies {
    pub fn new(rules: ReplyRules, buffers: Arc<BufferPool>) -> Replies {
        Replies {
            rules,
            table: Mutex::default(),
            buffers,
            created: Instant::now(),
            heard: AtomicU64::new(0),
            since_heard: AtomicU64::new(0),
        }
    }

    /// Notes that the server has sent bytes. Those of [`FEWEST`] together count, and so does the
    /// end of a request.
    pub fn heard(&self, bytes: usize) {
        let since = self.since_heard.load(Ordering::Relaxed).saturating_add(bytes as u64);
        self.since_heard.store(if since < FEWEST { since } else { 0 }, Ordering::Relaxed);
        if since >= FEWEST {
            self.heard_now();
        }
    }

    fn heard_now(&self) {
        let now = u64::try_from(self.created.elapsed().as_micros()).unwrap_or(u64::MAX);
        self.heard.store(now, Ordering::Relaxed);
    }

    /// Returns since when the server does not get on although requests are in flight. `None` also
    /// if the end of the connection is only not reported yet.
    pub fn silent_since(&self) -> Option<Instant> {
        let table = self.table.lock();
        let heard = Duration::from_micros(self.heard.load(Ordering::Relaxed));
        if table.count == 0 || table.ended.is_some() {
            return None;
        }
        self.created.checked_add(heard)
    }

    /// Puts `request` into the table and returns its cookie. The caller must send the request
    /// afterwards.
    ///
    /// # Errors
    /// The request was not taken, and no event will come.
    pub fn begin(&self, request: NbdRequest, events: Sender<Event>) -> Result<u64, NotTaken> {
        let mut table = self.table.lock();
        if table.ending || table.ended.is_some() {
            return Err(NotTaken::Ended);
        }
        if table.count >= MOST_IN_FLIGHT {
            return Err(NotTaken::Full);
        }
        if table.count == 0 {
            self.heard_now(); // silence before the first request does not count
        }
        table.count += 1;
        table.last_cookie = table.last_cookie.wrapping_add(1);
        let cookie = table.last_cookie;
        let coverage = Coverage::new(request.offset..request.end());
        let in_flight = InFlight {
            request,
            events,
            coverage,
            status_came: false,
            chunks: 0,
            failure: None,
            abandoned: false,
        };
        table.requests.insert(cookie, in_flight);
        Ok(cookie)
    }

    /// Number of requests in flight.
    pub fn count(&self) -> usize {
        self.table.lock().count
    }

    /// Whether new requests are taken as soon as there is a place.
    pub fn is_open(&self) -> bool {
        let table = self.table.lock();
        !table.ending && table.ended.is_none()
    }

    /// Whether the server has announced its end, and nothing is in flight any more.
    pub fn is_drained(&self) -> bool {
        let table = self.table.lock();
        table.ending && table.count == 0
    }

    /// Notes why the connection ends, unless that is known already.
    pub fn end(&self, error: NbdError) {
        self.table.lock().ended.get_or_insert(error);
    }

    /// Ends all requests with the reason that was given to [`Replies::end`], or else with `error`.
    /// For the receiving thread, after its last [`Replies::receive`].
    pub fn fail_all(&self, error: NbdError) -> NbdError {
        let (error, requests) = {
            let mut table = self.table.lock();
            let error = table.ended.get_or_insert(error).clone();
            table.count = 0;
            (error, std::mem::take(&mut table.requests))
        };
        for (_, mut in_flight) in requests {
            in_flight.finish(Err(error.clone()));
        }
        error
    }

    /// Returns the error of a connection that the server or the network has closed.
    pub fn closed(&self, why: &str) -> NbdError {
        let answered = self.table.lock().answered;
        NbdError::new(
            NbdErrorKind::Closed { answered },
            format!("the connection has ended with requests unanswered: {why}"),
        )
    }

    /// Reads one reply from `stream`. Returns whether it was the last one of its request, which has
    /// then ended.
    ///
    /// # Errors
    /// The connection cannot be used any more: it has ended, or the server has violated the
    /// protocol. The caller must then call [`Replies::fail_all`].
    pub fn receive(&self, stream: &mut impl Read) -> Result<bool> {
        let mut start = [0; protocol::SIMPLE_REPLY_HEADER];
        self.read(stream, &mut start)?;
        let header = protocol::reply_start(&start)?;
        let (ReplyHeader::Simple { cookie, .. } | ReplyHeader::Chunk { cookie, .. }) = header;
        let taken = self.table.lock().requests.remove(&cookie);
        let mut in_flight = taken.ok_or_else(|| {
            NbdError::protocol(format!("a reply to cookie {cookie}, which no request has"))
        })?;
        let last = match header {
            ReplyHeader::Simple { error, .. } => self.simple(stream, &mut in_flight, error),
            ReplyHeader::Chunk { last, kind, .. } => self.chunk(stream, &mut in_flight, kind, last),
        };
        let mut table = self.table.lock();
        match last {
            Ok(false) => {
                table.requests.insert(cookie, in_flight);
                Ok(false)
            }
            Ok(true) => {
                table.count = table.count.saturating_sub(1);
                table.answered = true;
                drop(table);
                self.heard_now();
                let result = in_flight.failure.take().map_or(Ok(()), Err);
                in_flight.finish(result);
                Ok(true)
            }
            Err(error) => {
                // The connection may have been ended for another reason, such as a stall.
                let reason = table.ended.get_or_insert(error).clone();
                drop(table);
                in_flight.finish(Err(reason.clone()));
                Err(reason)
            }
        }
    }

    fn read(&self, stream: &mut impl Read, bytes: &mut [u8]) -> Result<()> {
        stream.read_exact(bytes).map_err(|error| match error.kind() {
            io::ErrorKind::UnexpectedEof => self.closed("the server has closed it"),
            _ => self.closed(&crate::error::io_text(&error)),
        })
    }

    fn read_number(&self, stream: &mut impl Read) -> Result<u64> {
        let mut bytes = [0; 8];
        self.read(stream, &mut bytes)?;
        Ok(u64::from_be_bytes(bytes))
    }

    /// Returns whether the reply was the last one, which a simple one always is.
    fn simple(&self, stream: &mut impl Read, in_flight: &mut InFlight, error: u32) -> Result<bool> {
        let request = in_flight.request;
        match request.command {
            NbdCommand::Read if self.rules.structured => {
                return Err(NbdError::protocol("a simple reply to a read, not a structured one"));
            }
            _ if error != 0 => self.failed(in_flight, error, b""),
            NbdCommand::Read => self.data(stream, in_flight, request.offset, request.len)?,
            NbdCommand::BlockStatus | NbdCommand::Disconnect => {
                return Err(NbdError::protocol("a block status without a status"));
            }
        }
        Ok(true)
    }

    /// Reads the rest of a chunk. Returns whether it was the last one of its request.
    fn chunk(
        &self,
        stream: &mut impl Read,
        in_flight: &mut InFlight,
        kind: u16,
        last: bool,
    ) -> Result<bool> {
        if !self.rules.structured {
            return Err(NbdError::protocol("a structured reply, which was not agreed on"));
        }
        let mut len = [0; protocol::CHUNK_HEADER_REST];
        self.read(stream, &mut len)?;
        let len = u32::from_be_bytes(len);
        let request = in_flight.request;
        in_flight.chunks = in_flight.chunks.saturating_add(1);
        if in_flight.chunks > request.len / BYTES_PER_CHUNK + MORE_CHUNKS {
            return Err(NbdError::protocol(format!(
                "more than {} chunks for {} bytes",
                in_flight.chunks - 1,
                request.len
            )));
        }
        let kind = protocol::chunk_kind(kind, last, len)?;
        match (kind, request.command) {
            (ChunkKind::None, _) => {}
            (ChunkKind::Data, NbdCommand::Read) => {
                let offset = self.read_number(stream)?;
                self.data(stream, in_flight, offset, len.saturating_sub(8))?;
            }
            (ChunkKind::Hole, NbdCommand::Read) => {
                let mut payload = [0; 12];
                self.read(stream, &mut payload)?;
                let mut payload = &payload[..];
                let offset = protocol::take_u64(&mut payload).unwrap_or_default();
                let len = u64::from(protocol::take_u32(&mut payload).unwrap_or_default());
                in_flight.cover(offset, len)?;
                in_flight.send(Event::Zeros { offset, len });
            }
            (ChunkKind::BlockStatus, NbdCommand::BlockStatus) => {
                let payload = self.payload(stream, len)?;
                let (id, descriptors) = protocol::block_status(&payload)?;
                if Some(id) != self.rules.allocation || in_flight.status_came {
                    return Err(NbdError::protocol(format!(
                        "a block status of context {id}, which was not asked for"
                    )));
                }
                in_flight.status_came = true;
                in_flight.send(Event::Status(descriptors));
            }
            (ChunkKind::Error | ChunkKind::ErrorOffset | ChunkKind::OtherError, _) => {
                let payload = self.payload(stream, len)?;
                let error = protocol::error_chunk(kind, &payload)?;
                if error.offset.is_some_and(|at| at < request.offset || at >= request.end()) {
                    return Err(NbdError::protocol("an error outside of the request"));
                }
                self.failed(in_flight, error.number, error.message);
            }
            (ChunkKind::Data | ChunkKind::Hole | ChunkKind::BlockStatus, command) => {
                return Err(NbdError::protocol(format!("a chunk of {kind:?} for {command:?}")));
            }
        }
        if last && in_flight.failure.is_none() {
            let complete = match request.command {
                NbdCommand::Read => in_flight.coverage.is_complete(),
                NbdCommand::BlockStatus | NbdCommand::Disconnect => in_flight.status_came,
            };
            if !complete {
                return Err(NbdError::protocol("the last reply came before all data"));
            }
        }
        Ok(last)
    }

    /// Reads a payload whose length was checked.
    fn payload(&self, stream: &mut impl Read, len: u32) -> Result<Vec<u8>> {
        // Grows as the bytes come: a length alone costs no memory.
        let mut payload = Vec::new();
        let read = stream.by_ref().take(u64::from(len)).read_to_end(&mut payload);
        match read {
            Ok(read) if read == len as usize => Ok(payload),
            Ok(_) => Err(self.closed("the server has closed it")),
            Err(error) => Err(self.closed(&crate::error::io_text(&error))),
        }
    }

    fn data(
        &self,
        stream: &mut impl Read,
        in_flight: &mut InFlight,
        mut offset: u64,
        len: u32,
    ) -> Result<()> {
        in_flight.cover(offset, u64::from(len))?;
        let mut left = len as usize;
        while left > 0 {
            let mut buffer = self.buffers.take(left.min(PIECE));
            self.read(stream, buffer.bytes_mut())?;
            let read = buffer.bytes().len();
            in_flight.send(Event::Data { offset, buffer });
            offset = offset.saturating_add(read as u64);
            left = left.saturating_sub(read);
        }
        Ok(())
    }

    /// Notes that the server has not executed the request. The first error counts.
    fn failed(&self, in_flight: &mut InFlight, number: u32, message: &[u8]) {
        if number == ESHUTDOWN {
            self.table.lock().ending = true;
        }
        let NbdRequest { command, offset, len, .. } = in_flight.request;
        let mut text = format!(
            "the server answers {} to {command:?} of {len} bytes at {offset}",
            errno_name(number)
        );
        if !message.is_empty() {
            text = format!("{text}: {}", foreign(message));
        }
        in_flight.failure.get_or_insert(NbdError::new(NbdErrorKind::Server(number), text));
    }
}

impl InFlight {
    fn cover(&mut self, offset: u64, len: u64) -> Result<()> {
        if self.coverage.add(offset, len) {
            return Ok(());
        }
        Err(NbdError::protocol(format!(
            "{len} bytes at {offset} in the reply to a read of {} bytes at {}, outside of it or twice",
            self.request.len, self.request.offset
        )))
    }

    fn send(&mut self, event: Event) {
        if !self.abandoned {
            self.abandoned = self.events.send(event).is_err();
        }
    }

    fn finish(&mut self, result: Result<()>) {
        self.send(Event::Done { tag: self.request.tag, result });
    }
}
