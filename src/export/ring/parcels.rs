//! What the threads of a queue tell each other: entries on their way between its two servers and
//! the workers.
//!
//! **Touches:** an eventfd for each server. **Never:** waits.
//! **Locks:** none.
//! **Invariants:** an entry that a worker has comes back with an answer, whatever the worker does.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use crossbeam_channel::{Receiver, Sender};
use rustix::event::EventfdFlags;
use rustix::io::Errno;

use super::super::dispatch::LaterReply;
use super::super::wire;
use uring::{REPLY_HEADER, ReplyData, RingEntry};

/// A message from another thread to a server.
pub(super) enum Parcel {
    /// An answered entry, to be handed to the kernel.
    Answered(usize, RingEntry),
    /// To a lane: an entry with a request.
    Request(usize, RingEntry),
    /// From a lane: the kernel has released an entry.
    Gone,
    /// From a lane: the kernel does not have an entry.
    Unknown(usize, RingEntry),
    /// To a lane: there is nothing left to serve.
    End,
    /// Another process goes on: hand in what is answered, and end.
    Leave,
}

/// The receiving side of a server's messages.
pub(super) struct Mailbox {
    pub(super) parcels: Receiver<Parcel>,
    pub(super) wake: Arc<OwnedFd>,
}

/// The sending side of a server's messages.
#[derive(Clone, Debug)]
pub(super) struct MailboxAddress {
    parcels: Sender<Parcel>,
    wake: Arc<OwnedFd>,
}

impl Mailbox {
    pub(super) fn new() -> io::Result<(Mailbox, MailboxAddress)> {
        let wake =
            Arc::new(rustix::event::eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?);
        let (sender, parcels) = crossbeam_channel::unbounded();
        Ok((Mailbox { parcels, wake: Arc::clone(&wake) }, MailboxAddress { parcels: sender, wake }))
    }
}

impl MailboxAddress {
    /// Sends a message. Never waits. If the server has failed, the message is dropped with its
    /// channel, because nothing waits for it.
    pub(super) fn send(&self, parcel: Parcel) {
        let _ = self.parcels.send(parcel);
        let _ = rustix::io::write(&self.wake, &1u64.to_ne_bytes());
    }
}

/// An entry that a worker answers. One that is dropped without an answer answers EIO, so that no
/// client waits for ever.
pub(super) struct Pending {
    pub(super) slot: usize,
    pub(super) entry: Option<RingEntry>,
    /// Length of a write's data, in bytes.
    pub(super) len: usize,
    pub(super) back: MailboxAddress,
}

impl Pending {
    fn give_back(&mut self, answer: Result<&[u8], Errno>) {
        if let Some(mut entry) = self.entry.take() {
            fill(&mut entry, answer);
            self.back.send(Parcel::Answered(self.slot, entry));
        }
    }
}

impl LaterReply for Pending {
    fn data(&mut self) -> &[u8] {
        self.entry.as_mut().map_or(&[], |entry| &entry.payload()[..self.len])
    }

    fn send(mut self, answer: Result<&[u8], Errno>) {
        self.give_back(answer);
    }
}

impl Drop for Pending {
    fn drop(&mut self) {
        self.give_back(Err(Errno::IO));
    }
}

/// Puts an answer into an entry.
pub(super) fn fill(entry: &mut RingEntry, bytes: Result<&[u8], Errno>) {
    // The length fits: it is never more than the payload.
    answer(
        entry,
        bytes.map(|bytes| bytes.len() as u32),
        ReplyData::Elsewhere(bytes.unwrap_or(&[])),
    );
}

/// Puts an answer into an entry: an error, or data of this length.
pub(super) fn answer(entry: &mut RingEntry, result: Result<u32, Errno>, data: ReplyData<'_>) {
    let (_, unique) = wire::in_header(entry.request().0);
    let mut header = [0; REPLY_HEADER];
    wire::out_header(&mut header, unique, result);
    entry.answer(&header, data);
}

#[cfg(test)]
mod tests {
    use super::*;
    use uring::EntryMemory;

    #[test]
    fn an_entry_that_is_dropped_on_its_way_answers_eio_and_comes_back() {
        let (mailbox, back) = Mailbox::new().unwrap();
        let (_, mut entries) = EntryMemory::new(1).unwrap();
        let mut entry = entries.pop().unwrap();
        let mut header = [0; REPLY_HEADER];
        wire::out_header(&mut header, 77, Ok(0));
        entry.answer(&header, ReplyData::InPlace(0));
        drop(Pending { slot: 5, entry: Some(entry), len: 0, back });
        let Ok(Parcel::Answered(slot, mut entry)) = mailbox.parcels.try_recv() else {
            panic!("not answered")
        };
        let header = entry.request().0;
        assert_eq!(
            (slot, &header[4..8], &header[8..16]),
            (5, &(-5i32).to_ne_bytes()[..], &77u64.to_ne_bytes()[..])
        );
    }
}
