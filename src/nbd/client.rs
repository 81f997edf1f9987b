//! The client that callers share.
//!
//! A read is divided into requests. Each caller has a channel, on which the events of all of its
//! requests arrive, and calls its sink in its own thread. Events wait in the channel for as long as
//! the sink takes; no other caller does. That costs at most [`WINDOW`] bytes for each caller,
//! because not more of a read are in flight or wait for the sink at a time.

use std::io;
use std::ops::Range;
use std::sync::Arc;
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};
use std::time::Instant;

use crate::error::{NbdError, NbdErrorKind, Result, io_text};
use crate::link::Link;
use crate::pool::{Pool, WhenFull};
use crate::protocol::{BlockSizes, Descriptor, LONGEST_STRING, NbdCommand};
use crate::replies::{Event, MOST_IN_FLIGHT, NbdRequest};
use crate::{NbdAddress, NbdConfig};

/// Most bytes of one request: a read of 8 MiB is in flight as a whole on one connection, and the
/// server can still answer with several threads.
const REQUEST: u32 = 1 << 20;
/// Bytes of the first request of a read, which the next ones double: the server sends a request as
/// a whole, and a thread may wait for the first bytes of a long read.
const FIRST_REQUEST: u64 = 256 << 10;
/// Most bytes of one read that are in flight or not yet given to the sink, but always one request:
/// all that one connection has places for.
const WINDOW: u64 = MOST_IN_FLIGHT as u64 * REQUEST as u64;
/// Most bytes that one NBD_CMD_BLOCK_STATUS asks about: a multiple of every block size.
const STATUS_REQUEST: u64 = 1 << 30;
/// Most extents of one call of [`NbdClient::block_status`].
const MOST_EXTENTS: usize = 1 << 16;

/// A part of what a read has found.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum NbdPiece<'a> {
    /// Data, at most 256 KiB.
    Data(&'a [u8]),
    /// So many bytes that are zero, and that the server has not sent.
    Zeros(u64),
}

/// A run of bytes of an export.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct NbdExtent {
    /// Length in bytes, not zero.
    pub len: u64,
    /// The run reads as zeros (NBD_STATE_ZERO). If not, it may still contain zeros.
    pub zero: bool,
}

/// A client of one export, which any number of threads may share. Dropping it ends its connections
/// (NBD_CMD_DISC).
#[derive(Debug)]
pub struct NbdClient {
    pool: Arc<Pool>,
    size: u64,
}

impl NbdClient {
    /// Connects to the server of `config`, and learns the size of the export.
    ///
    /// # Errors
    /// [`NbdErrorKind::Argument`] for a configuration that cannot work, [`NbdErrorKind::Connect`],
    /// [`NbdErrorKind::Tls`], [`NbdErrorKind::NoExport`] and [`NbdErrorKind::Protocol`].
    pub fn connect(config: NbdConfig) -> Result<NbdClient, NbdError> {
        check(&config)?;
        let pool = Pool::open(config)?;
        let size = pool.agreement().map_or(0, |agreement| agreement.size);
        Ok(NbdClient { pool, size })
    }

    /// Size of the export in bytes. It never changes; see [`NbdErrorKind::Changed`].
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Block sizes of the export, in bytes: the smallest that the server accepts, and the one that
    /// it prefers. Callers need not respect them.
    pub fn block_sizes(&self) -> (u32, u32) {
        let sizes = self.sizes();
        (sizes.minimum, sizes.preferred)
    }

    /// Reads `len` bytes at `offset`, and gives them to `sink` in pieces, each with its offset in
    /// the export. Together they are the range, each byte once, but *in any order*; a failed read
    /// may have given some of them. The sink runs in the thread of the caller. A sink that takes
    /// long delays no other caller.
    ///
    /// # Errors
    /// [`NbdErrorKind::Argument`] if the range is not inside of the export,
    /// [`NbdErrorKind::Sink`] if the sink fails, [`NbdErrorKind::Deadline`] if `deadline` passes,
    /// and the kinds of connections and servers. No request is repeated.
    pub fn read(
        &self,
        offset: u64,
        len: u64,
        deadline: Instant,
        sink: &mut dyn FnMut(u64, NbdPiece<'_>) -> io::Result<()>,
    ) -> Result<(), NbdError> {
        self.read_pieces(offset, len, deadline, sink).map_err(|error| self.pool.named(error))
    }

    /// Returns what `base:allocation` says about `len` bytes at `offset`: runs that follow each
    /// other from `offset` on, at least one. They end early if there are more than 65536 of them;
    /// the caller then asks for the rest. `None`: the server does not tell. An empty range has no
    /// extents.
    ///
    /// # Errors
    /// As those of [`NbdClient::read`], without the sink.
    pub fn block_status(
        &self,
        offset: u64,
        len: u64,
        deadline: Instant,
    ) -> Result<Option<Vec<NbdExtent>>, NbdError> {
        self.extents(offset, len, deadline).map_err(|error| self.pool.named(error))
    }

    /// Number of requests in flight on all connections.
    #[cfg(test)]
    pub(crate) fn in_flight(&self) -> usize {
        self.pool.in_flight()
    }

    /// Number of connections.
    #[cfg(test)]
    pub(crate) fn connections(&self) -> usize {
        self.pool.connections()
    }

    fn sizes(&self) -> BlockSizes {
        self.pool.agreement().map(|agreement| agreement.sizes).unwrap_or_default()
    }

    /// Returns the range with its ends moved outwards to what the server accepts. The end of an
    /// export may be no multiple of the block size; the server then has to accept that.
    fn aligned(&self, offset: u64, len: u64) -> Result<Range<u64>> {
        let end = offset.checked_add(len).filter(|&end| end <= self.size).ok_or_else(|| {
            let text = format!(
                "{len} bytes at {offset} are not inside of the export, which has {} bytes",
                self.size
            );
            NbdError::new(NbdErrorKind::Argument, text)
        })?;
        let minimum = u64::from(self.sizes().minimum).max(1);
        let end = end.checked_next_multiple_of(minimum).unwrap_or(end).min(self.size);
        Ok(offset - offset % minimum..end)
    }

    fn read_pieces(
        &self,
        offset: u64,
        len: u64,
        deadline: Instant,
        sink: &mut dyn FnMut(u64, NbdPiece<'_>) -> io::Result<()>,
    ) -> Result<()> {
        let mut left = self.aligned(offset, len)?;
        if len == 0 {
            return Ok(());
        }
        let wanted = offset..offset.saturating_add(len);
        let largest = request_size(self.sizes());
        let mut size = largest.min(FIRST_REQUEST);
        let mut calls = Calls::new(&self.pool, deadline);
        loop {
            while !left.is_empty() && calls.bytes_pending() < WINDOW {
                // Requests end at multiples of their size, so that most are aligned.
                let end = left.start.saturating_add(size - left.start % size);
                let end = end.min(left.end);
                let len = u32::try_from(end - left.start).unwrap_or(u32::MAX);
                if !calls.begin(NbdCommand::Read, left.start, len)? {
                    break;
                }
                left.start = end;
                size = (size * 2).min(largest);
            }
            if calls.pending.is_empty() {
                return Ok(());
            }
            let (at, piece) = match calls.next()? {
                Event::Done { .. } | Event::Status(_) => continue,
                Event::Zeros { offset, len } => {
                    let part = clip(&(offset..offset.saturating_add(len)), &wanted);
                    (part.start, NbdPiece::Zeros(part.end.saturating_sub(part.start)))
                }
                Event::Data { offset, ref buffer } => {
                    let bytes = buffer.bytes();
                    let end = offset.saturating_add(bytes.len() as u64);
                    let part = clip(&(offset..end), &wanted);
                    let inside = part.start.saturating_sub(offset) as usize
                        ..part.end.saturating_sub(offset) as usize;
                    let bytes = bytes.get(inside).unwrap_or_default();
                    give(sink, part.start, NbdPiece::Data(bytes))?;
                    continue;
                }
            };
            give(sink, at, piece)?;
        }
    }

    fn extents(&self, offset: u64, len: u64, deadline: Instant) -> Result<Option<Vec<NbdExtent>>> {
        let aligned = self.aligned(offset, len)?;
        if self.pool.agreement().is_none_or(|agreement| agreement.rules.allocation.is_none()) {
            return Ok(None);
        }
        let (mut extents, mut at) = (Vec::new(), aligned.start);
        let wanted = offset..offset.saturating_add(len);
        while at < aligned.end && extents.len() < MOST_EXTENTS && len > 0 {
            let len = (aligned.end - at).min(STATUS_REQUEST);
            let len = u32::try_from(len).unwrap_or(u32::MAX);
            let descriptors = self.status(at, len, deadline)?;
            let asked = at.saturating_add(u64::from(len));
            for Descriptor { len, zero } in descriptors {
                // The last run may reach beyond what was asked for; such a tail is not relied on.
                let run = at..at.saturating_add(u64::from(len)).min(asked);
                at = run.end;
                add_extent(&mut extents, &clip(&run, &wanted), zero);
                if at == asked || extents.len() >= MOST_EXTENTS {
                    break;
                }
            }
        }
        Ok(Some(extents))
    }

    /// Sends one NBD_CMD_BLOCK_STATUS.
    fn status(&self, offset: u64, len: u32, deadline: Instant) -> Result<Vec<Descriptor>> {
        let mut calls = Calls::new(&self.pool, deadline);
        calls.begin(NbdCommand::BlockStatus, offset, len)?;
        let mut found = Vec::new();
        while !calls.pending.is_empty() {
            if let Event::Status(descriptors) = calls.next()? {
                found = descriptors;
            }
        }
        Ok(found)
    }
}

impl Drop for NbdClient {
    fn drop(&mut self) {
        self.pool.close();
    }
}

/// A request that is in flight, or whose events were not all taken from the channel.
struct Pending {
    tag: u64,
    len: u32,
    link: Arc<Link>,
}

/// The requests of one call of a caller.
struct Calls<'a> {
    pool: &'a Arc<Pool>,
    deadline: Instant,
    sender: Sender<Event>,
    events: Receiver<Event>,
    pending: Vec<Pending>,
    last_tag: u64,
}

impl<'a> Calls<'a> {
    fn new(pool: &'a Arc<Pool>, deadline: Instant) -> Self {
        let (sender, events) = mpsc::channel();
        Calls { pool, deadline, sender, events, pending: Vec::new(), last_tag: 0 }
    }

    /// Sends a request. Returns false if the connections are busy; that never happens while no
    /// other request of this caller is pending.
    fn begin(&mut self, command: NbdCommand, offset: u64, len: u32) -> Result<bool> {
        let when_full = if self.pending.is_empty() { WhenFull::Wait } else { WhenFull::Return };
        self.last_tag = self.last_tag.wrapping_add(1);
        let request = NbdRequest { command, offset, len, tag: self.last_tag };
        let link = self.pool.begin(request, &self.sender, self.deadline, when_full)?;
        Ok(match link {
            Some(link) => {
                self.pending.push(Pending { tag: self.last_tag, len, link });
                true
            }
            None => false,
        })
    }

    fn bytes_pending(&self) -> u64 {
        self.pending.iter().map(|pending| u64::from(pending.len)).sum()
    }

    /// Waits for the next event of a pending request. The failure of a request is an error.
    fn next(&mut self) -> Result<Event> {
        loop {
            let now = Instant::now();
            if now >= self.deadline {
                return Err(NbdError::deadline());
            }
            let stalls = self.pending.iter().filter_map(|pending| pending.link.stalls_at()).min();
            let end = stalls.map_or(self.deadline, |stalls| stalls.min(self.deadline));
            match self.events.recv_timeout(end.saturating_duration_since(now)) {
                Ok(Event::Done { tag, result }) => {
                    self.pending.retain(|pending| pending.tag != tag);
                    result?;
                    return Ok(Event::Done { tag, result: Ok(()) });
                }
                Ok(event) => return Ok(event),
                Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected) => {
                    let now = Instant::now();
                    for pending in &self.pending {
                        pending.link.check(now);
                    }
                }
            }
        }
    }
}

fn check(config: &NbdConfig) -> Result<()> {
    let bad = |text: &str| Err(NbdError::new(NbdErrorKind::Argument, text));
    if config.export.len() > LONGEST_STRING {
        return bad("the name of an NBD export has at most 4096 bytes");
    }
    if config.connections == 0 {
        return bad("an NBD client needs at least one connection");
    }
    if config.connect_timeout.is_zero() || config.stall_timeout.is_zero() {
        return bad("the timeouts of an NBD client must not be zero");
    }
    if matches!(&config.address, NbdAddress::Tcp { host, .. } if host.is_empty()) {
        return bad("the host of the NBD server is missing");
    }
    Ok(())
}

/// Returns the size of requests in bytes: a multiple of the preferred block size where possible.
fn request_size(sizes: BlockSizes) -> u64 {
    let size = REQUEST.max(sizes.preferred).min(sizes.maximum).max(sizes.minimum);
    let unit = if sizes.preferred <= size { sizes.preferred } else { sizes.minimum };
    u64::from(size - size % unit.max(1)).max(1)
}

/// Returns the part of `range` that is in `limits`; an empty range within `limits` if there is
/// none.
fn clip(range: &Range<u64>, limits: &Range<u64>) -> Range<u64> {
    let start = range.start.clamp(limits.start, limits.end);
    start..range.end.clamp(start, limits.end)
}

fn give(
    sink: &mut dyn FnMut(u64, NbdPiece<'_>) -> io::Result<()>,
    offset: u64,
    piece: NbdPiece<'_>,
) -> Result<()> {
    if matches!(piece, NbdPiece::Data([]) | NbdPiece::Zeros(0)) {
        return Ok(()); // only in what was read for the sake of alignment
    }
    sink(offset, piece).map_err(|error| {
        NbdError::new(NbdErrorKind::Sink, format!("the data cannot be used: {}", io_text(&error)))
    })
}

fn add_extent(extents: &mut Vec<NbdExtent>, run: &Range<u64>, zero: bool) {
    let len = run.end.saturating_sub(run.start);
    if len == 0 {
        return;
    }
    match extents.last_mut() {
        Some(last) if last.zero == zero => last.len = last.len.saturating_add(len),
        _ => extents.push(NbdExtent { len, zero }),
    }
}
