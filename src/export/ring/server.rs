//! A server of a queue: it takes requests from its ring, and answers them or passes them on.
//!
//! **Touches:** its ring. **Never:** waits for anything else.
//! **Locks:** none.
//! **Invariants:** a server begins with the entries of its queue (home) or with none (lane). It
//! ends when the kernel has released all of them, or when it leaves them to another process.

use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::io::Errno;
use rustix::thread::CpuSet;

use super::super::dispatch::{Dispatcher, MAX_IO, Reply};
use super::super::polling::{POLL, Pace, Polling};
use super::super::wire::{self, Operation};
use super::super::workers::Buffer;
use super::LARGE;
use super::parcels::{Mailbox, MailboxAddress, Parcel, Pending, answer, fill};
use super::successor::{CatchUp, QueueStart};
use uring::{Anchor, Completion, Port, ReplyData, RingEntry};

/// A request that wakes a server has come soon if it is this short a time since a server
/// of the session has served another one, which is when that server has begun to wait.
/// Longer than one request takes for a client, wake-ups included.
const SOON: Duration = Duration::from_micros(100);

/// If at least this many requests wait behind a small one, the lane gets every second of
/// them. 2 and 4 gave 214,000 and 196,000 reads per second at depth 32; with 1, four jobs
/// at depth 1 had 161,000 instead of 174,000.
const MANY: usize = 2;

/// Which of the two servers of a queue this is.
pub(super) enum ServerRole {
    /// The server that registered the entries. `alive` counts the entries that the kernel has not
    /// released.
    Home { lane: MailboxAddress, alive: usize },
    /// The server that shares the work while several requests wait.
    Lane { home: MailboxAddress },
}

impl ServerRole {
    /// Returns the home server, if this is a lane and the entry that it has answered does
    /// not stay here.
    fn next_home(&self, stays: bool) -> Option<&MailboxAddress> {
        match self {
            ServerRole::Lane { home } if !stays => Some(home),
            _ => None,
        }
    }
}

/// A home server is active if it has begun to wait this short a time ago.
const ACTIVE: Duration = Duration::from_millis(2);

/// How often a server looks how many home servers are active.
const LOOK: Duration = Duration::from_millis(1);

/// Decides which of the small requests the lane gets.
#[derive(Debug)]
pub(super) struct Share {
    /// On how many processors the servers may run.
    processors: usize,
    /// Whether there are two of them for each active home server of the session: its own,
    /// and one for the lane. What else the processors do is not known.
    has_processor: bool,
    looked: Option<Instant>,
    /// Whether the lane gets the next one behind which [`MANY`] wait.
    is_lanes_turn: bool,
}

impl Share {
    pub(super) fn new(processors: usize) -> Share {
        Share { processors, has_processor: false, looked: None, is_lanes_turn: false }
    }

    /// Counts the active home servers, at most once in [`LOOK`].
    fn look(&mut self, now: Instant, pace: &Pace) {
        if self.looked.is_none_or(|looked| now.saturating_duration_since(looked) >= LOOK) {
            self.looked = Some(now);
            self.has_processor = 2 * pace.active(now, ACTIVE) <= self.processors;
        }
    }

    /// Returns whether the lane gets a small request with so many others behind it.
    fn is_for_lane(&mut self, waiting: usize) -> bool {
        if !self.has_processor || waiting < MANY {
            return false;
        }
        self.is_lanes_turn = !self.is_lanes_turn;
        self.is_lanes_turn
    }
}

/// One server of one queue, on its thread.
pub(super) struct QueueServer {
    pub(super) port: Port,
    /// The number of the queue, which is the number of its CPU.
    pub(super) queue: u16,
    pub(super) dispatcher: Dispatcher,
    pub(super) mailbox: Mailbox,
    /// The address of its own mailbox.
    pub(super) address: MailboxAddress,
    /// Scratch memory for reads that are answered before they are finished, as large as the largest
    /// such read so far. A server of a CPU on which no program reads has none.
    pub(super) buffer: Buffer,
    pub(super) role: ServerRole,
    pub(super) catch_up: CatchUp,
    /// Counts the requests that came soon.
    pub(super) polling: Polling,
    /// Of the session.
    pub(super) pace: Arc<Pace>,
    pub(super) share: Share,
    /// [`may_poll`](super::super::polling::may_poll).
    pub(super) may_poll: bool,
    /// Whether [`Parcel::Leave`] has arrived.
    pub(super) is_leaving: bool,
}

impl QueueServer {
    pub(super) fn run(mut self, anchor: &Anchor, start: Option<QueueStart>) -> io::Result<()> {
        self.port.enable()?;
        self.port.hold(anchor)?;
        self.port.watch(&self.mailbox.wake)?;
        if let Some(start) = start {
            // Binds the thread to the CPU that the queue's requests come from. A possible CPU may
            // be absent, so a failure is not an error.
            let mut cpu = CpuSet::new();
            cpu.set(usize::from(self.queue));
            let _ = rustix::thread::sched_setaffinity(None, &cpu);
            self.start(start)?;
        }
        self.serve()?;
        if self.is_leaving {
            return self.leave();
        }
        if let ServerRole::Home { lane, .. } = &self.role {
            lane.send(Parcel::End);
        }
        Ok(())
    }

    /// Hands in the answers that are made, and leaves the entries to another process. Requests that
    /// have arrived and were not begun stay in their entries, as do those that workers have.
    fn leave(mut self) -> io::Result<()> {
        let handed_in = self.port.push();
        // The ring must be open when the thread ends: then the thread itself cancels the entries.
        std::mem::forget(self);
        handed_in
    }

    /// Serves until the kernel has released all entries (home), until [`Parcel::End`] (lane), or
    /// until [`Parcel::Leave`].
    fn serve(&mut self) -> io::Result<()> {
        while !matches!(self.role, ServerRole::Home { alive: 0, .. }) {
            self.wait()?;
            let ticked = self.completions()?;
            while let Ok(parcel) = self.mailbox.parcels.try_recv() {
                match parcel {
                    Parcel::Answered(slot, entry) => self.port.commit(slot, entry)?,
                    Parcel::Request(slot, entry) => self.request(slot, entry)?,
                    Parcel::Gone => self.gone(),
                    Parcel::Unknown(slot, entry) => self.port.register_again(slot, entry)?,
                    Parcel::End => return Ok(()),
                    // What else has arrived comes first.
                    Parcel::Leave => self.is_leaving = true,
                }
            }
            if self.is_leaving {
                return Ok(());
            }
            if ticked {
                self.port.give_back()?;
            }
            self.catch_up()?;
        }
        Ok(())
    }

    /// Hands in the answers, and waits for a completion. A home server polls before it
    /// sleeps, if requests come soon after each other.
    fn wait(&mut self) -> io::Result<()> {
        if !self.may_poll {
            return self.port.wait();
        }
        let begun = Instant::now();
        self.share.look(begun, &self.pace);
        if matches!(self.role, ServerRole::Lane { .. }) {
            return self.port.wait();
        }
        self.pace.waits(usize::from(self.queue), begun);
        let polls = self.polling.is_due(begun) && !self.port.has_more();
        if polls {
            // The client gets its answer, and may run here as soon as this thread yields.
            self.port.push()?;
            let port = &mut self.port;
            if self.polling.poll(begun, POLL, || port.has_more()) {
                return self.port.wait();
            }
        }
        self.port.wait()?;
        let now = Instant::now();
        self.polling.woke(now, polls, self.pace.since(now) < SOON, self.pace.has_changed(begun));
        Ok(())
    }

    /// Handles the completions that are in the ring. Returns whether the timer has ticked.
    pub(super) fn completions(&mut self) -> io::Result<bool> {
        let mut ticked = false;
        while let Some(completion) = self.port.take()? {
            match completion {
                Completion::Woken(still_watched) => {
                    let _ = rustix::io::read(&self.mailbox.wake, &mut [0u8; 8]);
                    if !still_watched {
                        self.port.watch(&self.mailbox.wake)?;
                    }
                }
                Completion::Tick => ticked = true,
                Completion::Entry(slot, entry, Ok(())) => self.request(slot, entry)?,
                // The kernel had taken the answer that an earlier process has left.
                Completion::Entry(slot, entry, Err(Errno::NOENT)) => match &self.role {
                    ServerRole::Home { .. } => self.port.register_again(slot, entry)?,
                    ServerRole::Lane { home } => home.send(Parcel::Unknown(slot, entry)),
                },
                Completion::Entry(_, _, Err(errno)) => {
                    // ENOTCONN: the disk was unmounted.
                    if errno != Errno::NOTCONN {
                        log::error!(
                            "FUSE over io_uring, queue {}: {}",
                            self.queue,
                            host::error::os_text(&errno.into())
                        );
                    }
                    self.gone();
                }
            }
        }
        Ok(ticked)
    }

    /// Counts an entry that the kernel has released.
    fn gone(&mut self) {
        match &mut self.role {
            ServerRole::Home { alive, .. } => *alive -= 1,
            ServerRole::Lane { home } => home.send(Parcel::Gone),
        }
    }

    /// Answers a request on this thread if that takes no waiting; otherwise passes it on.
    pub(super) fn request(&mut self, slot: usize, mut entry: RingEntry) -> io::Result<()> {
        let operation = operation(&mut entry);
        let data = match operation {
            Operation::Read { len, .. } | Operation::Write { len, .. } => Some(len as usize),
            _ => None,
        };
        let is_large = data.is_some_and(|len| len >= LARGE);
        if let ServerRole::Home { lane, .. } = &self.role
            && match data {
                Some(LARGE..) => self.port.has_more(),
                Some(_) => self.share.is_for_lane(self.port.ready()),
                None => false,
            }
        {
            lane.send(Parcel::Request(slot, entry));
            return Ok(());
        }
        // Only a lane gives entries away.
        let stays = matches!(self.role, ServerRole::Home { .. })
            || is_large
            || self.share.has_processor
                && (self.port.has_more() || !self.mailbox.parcels.is_empty());
        let len = match operation {
            Operation::Write { len, .. } => (len as usize).min(MAX_IO),
            _ => 0,
        };
        let echo = match operation {
            Operation::Echo { token } => Some(token),
            _ => None,
        };
        let mut handed_in = Ok(());
        let reply = RingReply {
            port: &mut self.port,
            role: &self.role,
            address: &self.address,
            slot,
            entry: Some(entry),
            len,
            is_large,
            stays,
            handed_in: &mut handed_in,
        };
        let scratch = match operation {
            Operation::Read { len, .. }
                if len as usize <= LARGE && matches!(self.role, ServerRole::Home { .. }) =>
            {
                self.buffer.first(len as usize)
            }
            _ => &mut [],
        };
        self.dispatcher.serve(operation, reply, scratch);
        if let (CatchUp::Asked { token, left }, Some(arrived)) = (self.catch_up, echo)
            && token == arrived
        {
            self.catch_up = CatchUp::Tries(left);
        }
        handed_in
    }
}

/// Parses the request in an entry.
fn operation(entry: &mut RingEntry) -> Operation {
    let (header, body) = entry.request();
    let (opcode, unique) = wire::in_header(header);
    let operation = wire::operation(opcode, unique, body);
    let came = entry.payload_len();
    // A read uses the payload even if it ends with an error.
    let goes = if let Operation::Read { len, .. } = operation { len as usize } else { 0 };
    entry.touches(came.max(goes));
    operation
}

/// The reply to a request, on the thread of its server.
struct RingReply<'a> {
    port: &'a mut Port,
    role: &'a ServerRole,
    address: &'a MailboxAddress,
    slot: usize,
    /// `None` once the reply is sent.
    entry: Option<RingEntry>,
    /// Length of a write's data, in bytes.
    len: usize,
    is_large: bool,
    /// Whether this server keeps the entry if it answers at once.
    stays: bool,
    /// The result of handing the entry to the kernel.
    handed_in: &'a mut io::Result<()>,
}

impl RingReply<'_> {
    /// Hands an answered entry to the kernel, through the port on which the entry's next request is
    /// to arrive.
    fn hand_in(&mut self, entry: RingEntry) {
        match self.role.next_home(self.stays) {
            Some(home) => home.send(Parcel::Answered(self.slot, entry)),
            None => *self.handed_in = self.port.commit(self.slot, entry),
        }
    }

    fn answer(&mut self, answer: Result<&[u8], Errno>) {
        if let Some(mut entry) = self.entry.take() {
            fill(&mut entry, answer);
            self.hand_in(entry);
        }
    }
}

impl Reply for RingReply<'_> {
    type Later = Pending;

    fn data(&mut self) -> &[u8] {
        self.entry.as_mut().map_or(&[], |entry| &entry.payload()[..self.len])
    }

    fn room<'a>(&'a mut self, scratch: &'a mut [u8]) -> &'a mut [u8] {
        self.entry.as_mut().map_or(scratch, RingEntry::payload)
    }

    fn send_room(mut self, _scratch: &[u8], len: usize) {
        if let Some(mut entry) = self.entry.take() {
            // It fits: it is never more than the payload.
            answer(&mut entry, Ok(len as u32), ReplyData::InPlace(len));
            self.hand_in(entry);
        }
    }

    fn send(mut self, answer: Result<&[u8], Errno>) {
        self.answer(answer);
    }

    fn has_time(&mut self) -> bool {
        // If several requests wait, it is better that more threads serve them.
        matches!(self.role, ServerRole::Home { .. }) && !self.port.has_more()
    }

    fn send_now(mut self, answer: Result<&[u8], Errno>) {
        self.answer(answer);
        if self.handed_in.is_ok() {
            *self.handed_in = self.port.push();
        }
    }

    fn forget(self) {
        // FUSE_FORGET does not arrive over io_uring. FUSE_NOTIFY_REPLY does: the kernel takes no
        // reply to it, but the entry must still go back.
        self.send(Ok(&[]));
    }

    fn later(mut self) -> Pending {
        Pending {
            slot: self.slot,
            entry: self.entry.take(),
            len: self.len,
            back: self.role.next_home(self.is_large).unwrap_or(self.address).clone(),
        }
    }
}

impl Drop for RingReply<'_> {
    fn drop(&mut self) {
        self.answer(Err(Errno::IO));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Protects: the lane gets every second small request while several wait, and none
    /// while not.
    #[test]
    fn the_lane_shares_small_requests_while_several_wait() {
        let mut share = Share { has_processor: true, ..Share::new(2) };
        let mut lane = |waiting| share.is_for_lane(waiting);
        assert_eq!([MANY, MANY, 9, 9, MANY].map(&mut lane), [true, false, true, false, true]);
        assert_eq!([MANY - 1, 1, 0].map(&mut lane), [false; 3]);
        assert_eq!([9, 9].map(&mut lane), [false, true]);
    }

    /// Protects: the lane gets small requests only if there is a processor for it beside
    /// those of the home servers that are active.
    #[test]
    fn the_lane_needs_a_processor() {
        let pace = Pace::new(4);
        let mut share = Share::new(4);
        assert!(!share.is_for_lane(9), "it has not looked");
        let mut now = Instant::now();
        for (active, expected) in [(0..1, true), (0..2, true), (0..3, false), (0..4, false)] {
            now += ACTIVE;
            active.for_each(|server| pace.waits(server, now));
            share.look(now, &pace);
            assert_eq!(share.has_processor, expected);
        }
        share.look(now + LOOK / 2, &Pace::new(4));
        assert!(!share.has_processor, "it has looked a moment ago");
        share.look(now + LOOK, &Pace::new(4));
        assert!(share.has_processor);
    }

    /// Protects: the entry of a small request does not stay with a lane for which nothing more
    /// waits, where its next request would be a single one on another processor.
    #[test]
    fn the_entry_of_a_small_request_leaves_the_lane() {
        let (mailbox, home) = Mailbox::new().unwrap();
        let lane = ServerRole::Lane { home: home.clone() };
        assert!(lane.next_home(true).is_none());
        lane.next_home(false).unwrap().send(Parcel::Gone);
        assert!(matches!(mailbox.parcels.try_recv(), Ok(Parcel::Gone)));
        let alone = ServerRole::Home { lane: home, alive: 1 };
        assert!(alone.next_home(false).is_none());
    }
}
