//! The first steps of a queue's home server: it gives the kernel the entries, and continues what a
//! process before this one has left in them.
//!
//! **Touches:** its ring, /dev/fuse for the notification that asks for waiting requests.
//! **Never:** carries out a request again that was answered.
//! **Locks:** none.
//! **Invariants:** answers of the earlier process are handed in before any of its requests is
//! carried out.

use std::io;

use rustix::io::Errno;

use super::server::QueueServer;
use uring::{EntryState, Places, RingEntry};

/// The entries of a queue, before they are registered.
pub(super) struct QueueStart {
    pub(super) places: Places,
    pub(super) entries: Vec<RingEntry>,
    pub(super) are_inherited: bool,
}

/// Whether requests may wait in the queue that came before its entries were registered.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum CatchUp {
    /// No: each request gets an entry when it comes.
    Done,
    /// The kernel was asked for a request with this token; so many more tries are left.
    Asked { token: u64, left: usize },
    /// The request has arrived and was answered, which may have brought another one.
    Tries(usize),
}

impl QueueServer {
    /// Gives the kernel all entries. If another process has used them, this also hands in the
    /// answers that it has left, and answers what it was asked.
    pub(super) fn start(&mut self, start: QueueStart) -> io::Result<()> {
        let QueueStart { places, entries, are_inherited } = start;
        let number = entries.len();
        let (mut idle, mut answered, mut asked) = (Vec::new(), Vec::new(), Vec::new());
        for (slot, mut entry) in entries.into_iter().enumerate() {
            let state = if are_inherited { entry.inherited() } else { EntryState::Idle };
            let list = match state {
                EntryState::Idle => &mut idle,
                EntryState::Answered => &mut answered,
                EntryState::Asked => &mut asked,
            };
            list.push((slot, entry));
        }
        // The kernel prefers the entry that it got last. If that has memory already, the kernel can
        // finish its copy also when this process is killed.
        idle.sort_by_key(|(_, entry)| entry.is_large());
        self.port.register(places, idle)?;
        if !are_inherited {
            return Ok(());
        }
        log::debug!(
            "queue {}: {} requests were not answered, {} answers may not have been taken",
            self.queue,
            asked.len(),
            answered.len()
        );
        for (slot, entry) in answered {
            self.port.commit(slot, entry)?;
        }
        // The kernel says at once which of the answers it had taken. Their entries are registered.
        self.port.push()?;
        self.completions()?;
        self.port.push()?;
        for (slot, entry) in asked {
            self.request(slot, entry)?;
        }
        self.catch_up = CatchUp::Tries(number);
        self.fetch_waiting();
        Ok(())
    }

    /// Makes the kernel give an entry to a request that waits in the queue since an earlier process
    /// has died.
    ///
    /// A registered entry gets only requests that come later. One that waits gets an entry when
    /// that of another request is handed in. So this asks the kernel for a request of its own,
    /// which takes a registered entry, and whose answer brings one that waits.
    fn fetch_waiting(&mut self) {
        let CatchUp::Tries(left @ 1..) = self.catch_up else {
            self.catch_up = CatchUp::Done;
            return;
        };
        let (token, message) = self.dispatcher.nudge();
        self.catch_up = match self.port.notify(message.as_ref()) {
            Ok(()) => CatchUp::Asked { token, left: left - 1 },
            // The disk was unmounted.
            Err(Errno::NOTCONN | Errno::NODEV | Errno::NOENT) => CatchUp::Done,
            Err(errno) => {
                log::warn!(
                    "FUSE over io_uring, queue {}: asking for the requests that wait: {}",
                    self.queue,
                    host::error::os_text(&errno.into())
                );
                CatchUp::Done
            }
        }
    }

    /// Asks for the next request that waits, if the last answer may have brought one.
    pub(super) fn catch_up(&mut self) -> io::Result<()> {
        if let CatchUp::Tries(_) = self.catch_up {
            self.port.push()?;
            if self.port.has_completions() {
                self.fetch_waiting();
            } else {
                self.catch_up = CatchUp::Done;
            }
        }
        Ok(())
    }
}
