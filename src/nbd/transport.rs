//! A connection with or without TLS, for one thread that reads and many that send.
//!
//! **Locks:** `sending` (plain) or `session` (TLS) while bytes are sent; `session` is also held by
//! the thread that reads while it decrypts, but not while it waits for the socket.

use std::io::{self, Read, Write};
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use rustls::ClientConnection;

use crate::NbdConfig;
use crate::error::{NbdError, NbdErrorKind, Result, io_text};
use crate::handshake::{self, Agreement};
use crate::replies::Replies;
use crate::socket::{Socket, UntilDeadline};
use crate::tls::{self, TlsSetup};

/// Bytes per read of the socket with TLS: four of its largest records.
const CIPHERTEXT: usize = 64 << 10;

/// A connection to a server.
#[derive(Debug)]
pub(crate) struct Transport {
    socket: Socket,
    /// Orders the requests of threads that send, without TLS.
    sending: Mutex<()>,
    session: Option<Mutex<ClientConnection>>,
}

impl Transport {
    /// Connects to the server of `config`, and negotiates.
    pub fn open(
        config: &NbdConfig,
        tls: Option<&TlsSetup>,
        deadline: Instant,
    ) -> Result<(Transport, Agreement)> {
        let socket = Socket::connect(&config.address, deadline)?;
        let mut stream = UntilDeadline { socket: &socket, deadline };
        let greeting = handshake::greet(&mut stream)?;
        let (session, agreement) = match tls {
            None => (None, handshake::negotiate(&mut stream, greeting, &config.export)?),
            Some(setup) => {
                handshake::start_tls(&mut stream, greeting)?;
                let mut session = setup.session()?;
                while session.is_handshaking() {
                    session.complete_io(&mut stream).map_err(|error| handshake_failed(&error))?;
                }
                let mut encrypted = rustls::Stream::new(&mut session, &mut stream);
                let agreement = handshake::negotiate(&mut encrypted, greeting, &config.export)?;
                (Some(Mutex::new(session)), agreement)
            }
        };
        let set = |result: io::Result<()>| result.map_err(|error| handshake::failed(&error));
        set(socket.set_read_timeout(None))?;
        set(socket.set_write_timeout(config.stall_timeout.max(Duration::from_millis(1))))?;
        Ok((Transport { socket, sending: Mutex::new(()), session }, agreement))
    }

    /// Sends `bytes`, which are not divided by those of another thread. Waits at most for the stall
    /// timeout.
    pub fn send(&self, bytes: &[u8]) -> io::Result<()> {
        match &self.session {
            None => {
                let _sending = self.sending.lock();
                (&self.socket).write_all(bytes)
            }
            Some(session) => {
                let mut session = session.lock();
                session.writer().write_all(bytes)?;
                self.send_records(&mut session)
            }
        }
    }

    /// Sends the last request, if the server still reads.
    pub fn send_last(&self, request: &[u8]) {
        // A thread that has waited here for long is stuck with a server that does not read.
        const PATIENCE: Duration = Duration::from_millis(200);
        match &self.session {
            None => {
                if let Some(_sending) = self.sending.try_lock_for(PATIENCE) {
                    let _ = (&self.socket).write_all(request); // the server may be gone
                }
            }
            Some(session) => {
                if let Some(mut session) = session.try_lock_for(PATIENCE) {
                    let _ = session.writer().write_all(request);
                    session.send_close_notify();
                    let _ = self.send_records(&mut session);
                }
            }
        }
    }

    /// Ends the connection: a thread that waits for the server returns.
    pub fn shut_down(&self) {
        self.socket.shut_down();
    }

    fn send_records(&self, session: &mut ClientConnection) -> io::Result<()> {
        while session.wants_write() {
            if session.write_tls(&mut &self.socket)? == 0 {
                return Err(io::ErrorKind::WriteZero.into());
            }
        }
        Ok(())
    }
}

/// The receiving side of a [`Transport`], for one thread.
pub(crate) struct Receiving<'a> {
    transport: &'a Transport,
    replies: &'a Replies,
    ciphertext: Vec<u8>,
    /// Range of `ciphertext` that was not decrypted yet.
    start: usize,
    end: usize,
}

impl<'a> Receiving<'a> {
    /// Creates the receiving side, which tells `replies` when the server has sent something.
    pub fn new(transport: &'a Transport, replies: &'a Replies) -> Receiving<'a> {
        let size = if transport.session.is_some() { CIPHERTEXT } else { 0 };
        Receiving { transport, replies, ciphertext: vec![0; size], start: 0, end: 0 }
    }

    fn read_socket(&mut self) -> io::Result<()> {
        self.start = 0;
        self.end = (&self.transport.socket).read(&mut self.ciphertext)?;
        self.replies.heard(self.end);
        Ok(())
    }

    fn read_encrypted(
        &mut self,
        session: &Mutex<ClientConnection>,
        bytes: &mut [u8],
    ) -> io::Result<usize> {
        loop {
            {
                let mut session = session.lock();
                match session.reader().read(bytes) {
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                    other => return other,
                }
                let mut pending = self.ciphertext.get(self.start..self.end).unwrap_or_default();
                if !pending.is_empty() {
                    let taken = session.read_tls(&mut pending)?;
                    self.start = self.start.saturating_add(taken);
                    session.process_new_packets().map_err(io::Error::other)?;
                    self.transport.send_records(&mut session)?; // such as an update of keys
                    continue;
                }
            }
            self.read_socket()?;
            if self.end == 0 {
                // The end is only a good one after a close_notify, which `session` knows.
                session.lock().read_tls(&mut io::empty())?;
            }
        }
    }
}

impl Read for Receiving<'_> {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        match &self.transport.session {
            None => {
                let read = (&self.transport.socket).read(bytes)?;
                self.replies.heard(read);
                Ok(read)
            }
            Some(session) => self.read_encrypted(session, bytes),
        }
    }
}

/// Returns the error of a TLS handshake: of TLS, or of the connection below it.
fn handshake_failed(error: &io::Error) -> NbdError {
    match error.get_ref() {
        Some(cause) => tls::failed(cause.to_string()),
        None if error.kind() == io::ErrorKind::UnexpectedEof => NbdError::new(
            NbdErrorKind::Tls,
            "TLS failed: the server has closed the connection during the handshake",
        ),
        None => NbdError::new(
            NbdErrorKind::Connect,
            format!(
                "the TLS handshake failed: {}",
                match error.kind() {
                    io::ErrorKind::TimedOut | io::ErrorKind::WouldBlock => {
                        "the server does not answer in time".into()
                    }
                    _ => io_text(error),
                }
            ),
        ),
    }
}
