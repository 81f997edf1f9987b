//! One connection to a server: sends requests, and has a thread that receives the replies.
//!
//! **Locks:** those of [`Transport`] and [`Replies`], never one inside of the other.
//! **Invariants:** after the thread has ended, no request is in flight and none is taken.

use std::io::{self, BufReader};
use std::sync::Arc;
use std::sync::mpsc::Sender;
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};

use crate::NbdConfig;
use crate::buffers::BufferPool;
use crate::error::{NbdError, NbdErrorKind, Result, io_text};
use crate::handshake::Agreement;
use crate::protocol::{self, NbdCommand};
use crate::replies::{Event, NbdRequest, NotTaken, Replies};
use crate::tls::TlsSetup;
use crate::transport::{Receiving, Transport};

/// Bytes that are read ahead with a header: enough for the headers of several small chunks. Data
/// beyond goes to the buffer of its piece without a copy.
const READ_AHEAD: usize = 4 << 10;

/// A count of changes that threads wait for: a request has ended, a connection was made or lost.
#[derive(Debug, Default)]
pub(crate) struct Changed {
    count: Mutex<u64>,
    condvar: Condvar,
}

impl Changed {
    /// The count of changes so far.
    pub fn count(&self) -> u64 {
        *self.count.lock()
    }

    /// Counts a change and wakes the threads that wait.
    pub fn bump(&self) {
        let mut count = self.count.lock();
        *count = count.wrapping_add(1);
        self.condvar.notify_all();
    }

    /// Waits until the count is not `seen` any more, or until `end`.
    pub fn wait(&self, seen: u64, end: Instant) {
        let mut count = self.count.lock();
        while *count == seen && !self.condvar.wait_until(&mut count, end).timed_out() {}
    }
}

/// A connection.
#[derive(Debug)]
pub(crate) struct Link {
    transport: Transport,
    replies: Replies,
    stall_timeout: Duration,
    thread: Mutex<Option<JoinHandle<()>>>,
    /// Counts one when the thread ends.
    finished: Changed,
}

impl Link {
    /// Connects, negotiates and starts the thread that receives.
    pub fn open(
        config: &NbdConfig,
        tls: Option<&TlsSetup>,
        deadline: Instant,
        buffers: Arc<BufferPool>,
        changed: Arc<Changed>,
    ) -> Result<(Arc<Link>, Agreement)> {
        let (transport, agreement) = Transport::open(config, tls, deadline)?;
        let link = Arc::new(Link {
            transport,
            replies: Replies::new(agreement.rules, buffers),
            stall_timeout: config.stall_timeout,
            thread: Mutex::new(None),
            finished: Changed::default(),
        });
        let receiver = Arc::clone(&link);
        let thread = thread::Builder::new()
            .name("nbd-receive".into())
            .spawn(move || receiver.receive(&changed))
            .map_err(|error| {
                let text = format!("cannot start a thread: {}", io_text(&error));
                NbdError::new(NbdErrorKind::Connect, text)
            })?;
        *link.thread.lock() = Some(thread);
        Ok((link, agreement))
    }

    /// Number of requests in flight.
    pub fn in_flight(&self) -> usize {
        self.replies.count()
    }

    /// Sends a request. Its events, the last of which is [`Event::Done`], go to `events`.
    ///
    /// # Errors
    /// The request was not taken, and no event will come.
    pub fn begin(&self, request: NbdRequest, events: Sender<Event>) -> Result<(), NotTaken> {
        let cookie = self.replies.begin(request, events)?;
        let bytes = protocol::request(request.command, cookie, request.offset, request.len);
        if let Err(error) = self.transport.send(&bytes) {
            // The thread that receives reports the end to all requests, this one included.
            self.end(match error.kind() {
                io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => self.stalled(),
                _ => self.replies.closed(&io_text(&error)),
            });
        }
        Ok(())
    }

    /// Ends the connection if the server has been silent for too long. Returns whether the
    /// connection takes requests.
    pub fn check(&self, now: Instant) -> bool {
        if self.stalls_at().is_some_and(|end| end <= now) {
            self.end(self.stalled());
        }
        self.replies.is_open()
    }

    /// When the connection will count as stalled if the server sends nothing more.
    pub fn stalls_at(&self) -> Option<Instant> {
        self.replies.silent_since().and_then(|since| since.checked_add(self.stall_timeout))
    }

    /// Tells the server that no more requests will come.
    pub fn say_goodbye(&self) {
        self.replies.end(NbdError::new(
            NbdErrorKind::Closed { answered: true },
            "this client has ended the connection",
        ));
        self.transport.send_last(&protocol::request(NbdCommand::Disconnect, 0, 0, 0));
    }

    /// Waits after [`Link::say_goodbye`] until the server has answered what its callers have given
    /// up, and has closed the connection, but not longer than until `end`. (nbdkit 1.32 aborts if
    /// a connection with several requests in flight is closed.)
    pub fn finish(&self, end: Instant) {
        self.finished.wait(0, end);
        self.transport.shut_down();
        let thread = self.thread.lock().take();
        if thread.is_some_and(|thread| thread.join().is_err()) {
            log::error!("the thread of an NBD connection has panicked");
        }
    }

    fn end(&self, error: NbdError) {
        self.replies.end(error);
        self.transport.shut_down();
    }

    fn stalled(&self) -> NbdError {
        NbdError::new(
            NbdErrorKind::Stalled,
            format!(
                "the server has sent nothing of use for {} ms: the connection is closed",
                self.stall_timeout.as_millis()
            ),
        )
    }

    fn receive(&self, changed: &Changed) {
        let receiving = Receiving::new(&self.transport, &self.replies);
        let mut stream = BufReader::with_capacity(READ_AHEAD, receiving);
        let error = loop {
            match self.replies.receive(&mut stream) {
                Ok(false) => {}
                Ok(true) => changed.bump(),
                Err(error) => break error,
            }
            if self.replies.is_drained() {
                break self.replies.closed("the server is shutting down");
            }
        };
        let error = self.replies.fail_all(error);
        log::debug!("an NBD connection has ended: {error}");
        self.transport.shut_down();
        self.finished.bump();
        changed.bump();
    }
}
