//! The serving process's end of the socket to the keeper: requests with numbers, and how long their
//! replies are waited for.
//!
//! A keeper that is stopped (SIGSTOP, a frozen cgroup) or that hangs in a file system must not hang
//! streams and clients: what they ask for is waited for at most [`PATIENCE`]. A late reply is
//! recognised by its number and dropped. While one is missing, further requests of this kind fail at
//! once and are not sent. Mounting and unmounting are waited for without a bound: umount(2) returns
//! only when the kernel has written the pages of shared mappings back, which may take long, and a
//! caller that gave up would end the process before that.

use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use rustix::io::Errno;
use rustix::net::sockopt::{Timeout, set_socket_timeout};
use rustix::net::{Shutdown, shutdown};

use super::wire::{self, Answer, Numbered, Reply, Request};
use crate::error::Context;
use crate::{Error, ErrorKind, Result};

/// How long the keeper may take to change an attribute, to remove a file or to start a command.
/// A QMP client waits 10 s for its reply, and one such request can be part of it.
const PATIENCE: Duration = Duration::from_secs(5);
/// How long the keeper may take to end: it has nothing left to do then.
const LAST_PATIENCE: Duration = Duration::from_secs(10);
/// A call on the socket returns after this time, so that deadlines are looked at.
const TICK: Duration = Duration::from_millis(200);

/// How long a reply is waited for.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Wait {
    /// At most [`PATIENCE`].
    Bounded,
    /// Until it comes, with one line in the log after [`PATIENCE`].
    Unbounded,
}

/// The way to the keeper, for any thread.
#[derive(Debug)]
pub(super) struct Line {
    socket: OwnedFd,
    /// The process id of the keeper, for messages.
    pid: u32,
    /// [`PATIENCE`], but in tests.
    patience: Duration,
    /// A leaf: held from a request to its reply.
    turn: Mutex<Turn>,
    lost: AtomicBool,
}

/// Numbers of requests.
#[derive(Debug, Default)]
struct Turn {
    /// Of the last request that was sent.
    sent: u64,
    /// Of the last request whose reply has come.
    answered: u64,
}

impl Line {
    /// A line over `socket` to the process `pid`.
    ///
    /// # Errors
    /// Those of setsockopt(2).
    pub(super) fn new(socket: OwnedFd, pid: u32) -> Result<Line> {
        for timeout in [Timeout::Recv, Timeout::Send] {
            set_socket_timeout(&socket, timeout, Some(TICK)).map_err(io::Error::from).context(|| "mount keeper: socket")?;
        }
        Ok(Line { socket, pid, patience: PATIENCE, turn: Mutex::default(), lost: AtomicBool::new(false) })
    }

    /// The socket, to say something that no serving process would say.
    #[cfg(test)]
    pub(super) fn socket(&self) -> &OwnedFd {
        &self.socket
    }

    fn is_lost(&self) -> bool {
        self.lost.load(Ordering::Relaxed)
    }

    /// Sends a request and waits for its reply.
    ///
    /// # Errors
    /// What the keeper says; it is gone; [`ErrorKind::Io`] where it does not answer in time: the
    /// request may still be carried out.
    pub(super) fn ask(&self, request: Request, descriptor: Option<BorrowedFd<'_>>, wait: Wait) -> Result<(Answer, Option<OwnedFd>)> {
        let deadline = (wait == Wait::Bounded).then(|| Instant::now() + self.patience);
        let (reply, descriptor) = {
            let turn = match deadline {
                Some(_) => self.turn.try_lock_for(self.patience),
                None => Some(self.turn.lock()),
            };
            let mut turn = turn.ok_or_else(|| self.silent())?;
            if deadline.is_some() && turn.answered != turn.sent {
                // The reply that was not waited for any longer: it has come meanwhile, or nothing more is sent.
                self.receive(&mut turn, Some(Instant::now()))?;
            }
            self.send(&mut turn, request, descriptor, deadline)?;
            self.receive(&mut turn, deadline)?
        };
        for (level, text) in reply.log {
            let level = log::Level::iter().nth(level.saturating_sub(1)).unwrap_or(log::Level::Warn);
            log::log!(level, "{text}");
        }
        Ok((reply.result.map_err(Error::from)?, descriptor))
    }

    fn send(&self, turn: &mut Turn, request: Request, descriptor: Option<BorrowedFd<'_>>, deadline: Option<Instant>) -> Result<()> {
        let message = Numbered { number: turn.sent + 1, message: request };
        loop {
            match wire::send(&self.socket, &message, descriptor) {
                Ok(()) => {
                    turn.sent += 1;
                    return Ok(());
                }
                Err(error) if is_tick(&error) => {
                    if deadline.is_some_and(|deadline| Instant::now() >= deadline) {
                        return Err(self.silent());
                    }
                }
                Err(error) if error.kind() == ErrorKind::InvalidArgument => return Err(error),
                Err(error) => return Err(self.lose(Some(error))),
            }
        }
    }

    /// Receives replies up to that of the last request.
    fn receive(&self, turn: &mut Turn, deadline: Option<Instant>) -> Result<(Reply, Option<OwnedFd>)> {
        let started = Instant::now();
        let mut told = false;
        loop {
            match wire::receive::<Numbered<Reply>>(&self.socket) {
                Ok(Some((Numbered { number, message }, descriptor))) => {
                    turn.answered = number;
                    if number == turn.sent {
                        return Ok((message, descriptor));
                    }
                }
                Ok(None) => return Err(self.lose(None)),
                Err(error) if is_tick(&error) => {
                    if deadline.is_some_and(|deadline| Instant::now() >= deadline) {
                        return Err(self.silent());
                    }
                    if started.elapsed() >= self.patience && !std::mem::replace(&mut told, true) {
                        log::warn!("waiting for the mount keeper (process {0}): if it is stopped, continue it: kill -CONT {0}", self.pid);
                    }
                }
                Err(error) if error.kind() == ErrorKind::InvalidArgument => return Err(error),
                Err(error) => return Err(self.lose(Some(error))),
            }
        }
    }

    /// Lets the keeper go, and waits until it is gone.
    ///
    /// # Errors
    /// It has died before; it does not end.
    pub(super) fn finish(&self) -> Result<()> {
        let mut turn = self.turn.try_lock_for(LAST_PATIENCE).ok_or_else(|| self.silent())?;
        let _ = shutdown(&self.socket, Shutdown::Write);
        let deadline = Instant::now() + LAST_PATIENCE;
        // Its end of the socket closes when it ends.
        while !self.is_lost() {
            match wire::receive::<Numbered<Reply>>(&self.socket) {
                Ok(Some((reply, _))) => turn.answered = reply.number,
                Err(error) if is_tick(&error) => {
                    if Instant::now() >= deadline {
                        return Err(self.silent());
                    }
                }
                Ok(None) | Err(_) => return Ok(()),
            }
        }
        Err(gone())
    }

    fn silent(&self) -> Error {
        let text = format!("the mount keeper does not answer; if it is stopped, continue it: kill -CONT {}", self.pid);
        Error::new(ErrorKind::Io, text)
    }

    fn lose(&self, error: Option<Error>) -> Error {
        if let Some(error) = error {
            log::debug!("mount keeper: {error}");
        }
        self.lost.store(true, Ordering::Relaxed);
        gone()
    }
}

/// Whether a call has returned because of [`TICK`].
fn is_tick(error: &Error) -> bool {
    error.errno() == Some(Errno::AGAIN.raw_os_error())
}

fn gone() -> Error {
    Error::new(
        ErrorKind::Io,
        "the mount keeper has died: unmount with umount(8) or fusermount3 -u, and remove what is left of mountpoint, socket and pidfile",
    )
}

#[cfg(test)]
mod tests {
    use std::thread;

    use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};

    use super::*;

    fn pair() -> (Line, OwnedFd) {
        let (ours, theirs) = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None).unwrap();
        (Line { patience: Duration::from_millis(1), ..Line::new(ours, 4711).unwrap() }, theirs)
    }

    fn note(text: &str) -> Request {
        Request::SetNote(Some(text.to_owned()))
    }

    /// Takes the next request and answers it with an error of this text.
    fn answer(keeper: &OwnedFd, text: &str) -> Request {
        let (request, _) = wire::receive::<Numbered<Request>>(keeper).unwrap().expect("a request");
        let result = Err(Error::new(ErrorKind::Busy, text.to_owned()).into());
        wire::send(keeper, &Numbered { number: request.number, message: Reply { log: Vec::new(), result } }, None).unwrap();
        request.message
    }

    /// Protects: a keeper that is stopped hangs nobody: one request waits for it, the others fail at once and are not sent; and when it goes on, its late
    /// answer is not taken for another one's.
    #[test]
    fn a_stopped_keeper_is_not_waited_for() {
        let (line, keeper) = pair();
        for text in ["first", "second", "third"] {
            let error = line.ask(note(text), None, Wait::Bounded).unwrap_err().to_string();
            assert!(error.contains("does not answer") && error.contains("kill -CONT 4711"), "{error}");
        }
        assert!(matches!(answer(&keeper, "late"), Request::SetNote(Some(text)) if text == "first"));
        thread::scope(|scope| {
            scope.spawn(|| assert!(matches!(answer(&keeper, "in time"), Request::Release)));
            let error = line.ask(Request::Release, None, Wait::Unbounded).unwrap_err().to_string();
            assert_eq!(error, "in time", "and nothing but the first had been sent");
        });
    }

    /// Protects: an unmount is waited for, however late its answer is, and so it is by the request after one that was given up.
    #[test]
    fn an_unmount_is_waited_for() {
        let (line, keeper) = pair();
        line.ask(note("lost"), None, Wait::Bounded).unwrap_err();
        thread::scope(|scope| {
            let (sender, asked) = crossbeam_channel::bounded(1);
            let line = &line;
            scope.spawn(move || sender.send(line.ask(Request::Unmount, None, Wait::Unbounded).map(drop)));
            assert!(matches!(answer(&keeper, "late"), Request::SetNote(_)));
            let (request, _) = wire::receive::<Numbered<Request>>(&keeper).unwrap().expect("a request");
            assert!(matches!(request.message, Request::Unmount));
            // Longer than the bound, and several ticks of the socket.
            assert!(asked.recv_timeout(TICK * 3).is_err(), "it waits");
            let reply = Reply { log: Vec::new(), result: Ok(Answer::Busy) };
            wire::send(&keeper, &Numbered { number: request.number, message: reply }, None).unwrap();
            asked.recv().unwrap().unwrap();
        });
    }
}
