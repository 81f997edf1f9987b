//! The serving process's end of the socket to the keeper: numbered requests, and how long it waits
//! for their replies.
//!
//! A keeper that is stopped (SIGSTOP, a frozen cgroup), or that hangs in a file system, must not
//! hang streams and clients. So their requests wait at most [`PATIENCE`] for a reply. A late reply
//! is recognised by its number and dropped. While a reply is overdue, further requests of this kind
//! fail at once and are not sent. Mounting and unmounting wait without a bound: umount(2) returns
//! only after the kernel has written back the pages of shared mappings, which may take long. A
//! caller that stopped waiting would end the process before that.

use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::io::Errno;
use rustix::net::sockopt::{Timeout, set_socket_timeout};
use rustix::net::{Shutdown, shutdown};

use super::wire::{self, KeeperAnswer, KeeperReply, KeeperRequest, Numbered};
use host::error::Context;
use host::{Error, ErrorKind, Result};

/// How long the keeper may take to change an attribute, to remove a file or to start a command. A
/// QMP client waits 10 s for its reply, and that time can include one such request.
const PATIENCE: Duration = Duration::from_secs(5);
/// How long the keeper may take to close its end. It has no other work left then.
const LAST_PATIENCE: Duration = Duration::from_secs(10);
/// Timeout of a call on the socket, after which the caller checks its deadline.
const TICK: Duration = Duration::from_millis(200);

/// How long a request waits for its reply.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Wait {
    /// At most [`PATIENCE`].
    Bounded,
    /// Until the reply arrives, with one line in the log after [`PATIENCE`].
    Unbounded,
}

/// The connection to the keeper, usable from any thread.
#[derive(Debug)]
pub(super) struct KeeperLine {
    socket: OwnedFd,
    /// The process id of the keeper, for messages.
    pid: u32,
    /// [`PATIENCE`], except in tests.
    patience: Duration,
    /// A leaf lock, held from a request to its reply.
    turn: Mutex<Turn>,
    lost: AtomicBool,
    /// Whether the keeper was told to end.
    finished: AtomicBool,
}

/// Numbers of requests.
#[derive(Debug, Default)]
struct Turn {
    /// The number of the last request that was sent.
    sent: u64,
    /// The number of the last request whose reply has arrived.
    answered: u64,
}

impl KeeperLine {
    /// Makes a line over `socket` to the process `pid`.
    ///
    /// # Errors
    /// Those of setsockopt(2).
    pub(super) fn new(socket: OwnedFd, pid: u32) -> Result<KeeperLine> {
        for timeout in [Timeout::Recv, Timeout::Send] {
            set_socket_timeout(&socket, timeout, Some(TICK))
                .map_err(io::Error::from)
                .context(|| "mount keeper: socket")?;
        }
        Ok(KeeperLine {
            socket,
            pid,
            patience: PATIENCE,
            turn: Mutex::default(),
            lost: AtomicBool::new(false),
            finished: AtomicBool::new(false),
        })
    }

    /// The process id of the keeper.
    pub(super) fn pid(&self) -> u32 {
        self.pid
    }

    /// Waits until the keeper has closed its end. Returns false if it was told to.
    pub(super) fn dies(&self) -> bool {
        // No event is asked for, so only the end is reported, and no reply is taken away.
        let mut polled = [PollFd::new(&self.socket, PollFlags::empty())];
        let waited = rustix::io::retry_on_intr(|| rustix::event::poll(&mut polled, None));
        waited.is_ok() && !self.finished.load(Ordering::Relaxed)
    }

    /// Whether the keeper lives.
    pub(super) fn is_alive(&self) -> bool {
        let mut polled = [PollFd::new(&self.socket, PollFlags::empty())];
        let now = Timespec { tv_sec: 0, tv_nsec: 0 };
        let ended = rustix::io::retry_on_intr(|| rustix::event::poll(&mut polled, Some(&now)));
        ended == Ok(0)
    }

    /// Returns the socket, so that a test can send messages that no serving process sends.
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
    /// The error in the reply; the keeper has died; [`ErrorKind::Io`] if the keeper does not answer
    /// in time, in which case it may still carry out the request.
    pub(super) fn ask(
        &self,
        request: KeeperRequest,
        descriptor: Option<BorrowedFd<'_>>,
        wait: Wait,
    ) -> Result<(KeeperAnswer, Option<OwnedFd>)> {
        let deadline = (wait == Wait::Bounded).then(|| Instant::now() + self.patience);
        let (reply, descriptor) = {
            let turn = match deadline {
                Some(_) => self.turn.try_lock_for(self.patience),
                None => Some(self.turn.lock()),
            };
            let mut turn = turn.ok_or_else(|| self.silent())?;
            if deadline.is_some()
                && turn.answered != turn.sent
                // The reply to an earlier request is overdue. Either it has arrived by now, or this
                // request fails without being sent.
                && let Err(error) = self.receive(&mut turn, Some(Instant::now()))
                && turn.answered != turn.sent
            {
                return Err(error);
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

    fn send(
        &self,
        turn: &mut Turn,
        request: KeeperRequest,
        descriptor: Option<BorrowedFd<'_>>,
        deadline: Option<Instant>,
    ) -> Result<()> {
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

    /// Receives replies until the one to the last request has arrived.
    fn receive(
        &self,
        turn: &mut Turn,
        deadline: Option<Instant>,
    ) -> Result<(KeeperReply, Option<OwnedFd>)> {
        let started = Instant::now();
        let mut told = false;
        loop {
            match wire::receive::<Numbered<KeeperReply>>(&self.socket) {
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
                        log::warn!(
                            "waiting for the mount keeper (process {0}): if it is stopped, continue it: kill -CONT {0}",
                            self.pid
                        );
                    }
                }
                // A message that cannot be parsed has taken the place of the reply: the keeper
                // answers requests in their order, so no other reply to this request comes. Without
                // this, the reply would stay overdue, and later requests would fail without being
                // sent.
                Err(error) if error.kind() == ErrorKind::InvalidArgument => {
                    turn.answered = (turn.answered + 1).min(turn.sent);
                    if turn.answered == turn.sent {
                        return Err(error);
                    }
                }
                Err(error) => return Err(self.lose(Some(error))),
            }
        }
    }

    /// Tells the keeper that no further request follows, and waits until it has closed its end. The
    /// process ends after this one.
    ///
    /// # Errors
    /// The keeper has died before, or it does not answer in time.
    pub(super) fn finish(&self) -> Result<()> {
        let mut turn = self.turn.try_lock_for(LAST_PATIENCE).ok_or_else(|| self.silent())?;
        self.finished.store(true, Ordering::Relaxed);
        let _ = shutdown(&self.socket, Shutdown::Write);
        let deadline = Instant::now() + LAST_PATIENCE;
        while !self.is_lost() {
            match wire::receive::<Numbered<KeeperReply>>(&self.socket) {
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
        let text = format!(
            "the mount keeper does not answer; if it is stopped, continue it: kill -CONT {}",
            self.pid
        );
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

/// Tells whether a call on the socket has returned because of [`TICK`].
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

    use super::*;

    fn pair() -> (KeeperLine, OwnedFd) {
        let (ours, theirs) = host::packet::pair().unwrap();
        (
            KeeperLine {
                patience: Duration::from_millis(1),
                ..KeeperLine::new(ours, 4711).unwrap()
            },
            theirs,
        )
    }

    fn note(text: &str) -> KeeperRequest {
        KeeperRequest::SetNote(Some(text.to_owned()))
    }

    /// Takes the next request and replies with an error of this text.
    fn answer(keeper: &OwnedFd, text: &str) -> KeeperRequest {
        let (request, _) =
            wire::receive::<Numbered<KeeperRequest>>(keeper).unwrap().expect("a request");
        let result = Err(Error::new(ErrorKind::Busy, text.to_owned()).into());
        wire::send(
            keeper,
            &Numbered { number: request.number, message: KeeperReply { log: Vec::new(), result } },
            None,
        )
        .unwrap();
        request.message
    }

    /// Protects: a stopped keeper hangs no thread. One request waits for its reply; later ones fail
    /// at once and are not sent. When the keeper goes on, its late reply is not taken for the reply
    /// to another request.
    #[test]
    fn a_stopped_keeper_is_not_waited_for() {
        let (line, keeper) = pair();
        for text in ["first", "second", "third"] {
            let error = line.ask(note(text), None, Wait::Bounded).unwrap_err().to_string();
            assert!(
                error.contains("does not answer") && error.contains("kill -CONT 4711"),
                "{error}"
            );
        }
        assert!(
            matches!(answer(&keeper, "late"), KeeperRequest::SetNote(Some(text)) if text == "first")
        );
        thread::scope(|scope| {
            scope.spawn(|| assert!(matches!(answer(&keeper, "in time"), KeeperRequest::Release)));
            let error =
                line.ask(KeeperRequest::Release, None, Wait::Unbounded).unwrap_err().to_string();
            assert_eq!(error, "in time", "and nothing but the first had been sent");
        });
    }

    /// Protects: a reply that cannot be parsed fails its own request, and no later one, whether it
    /// arrives in time or late.
    #[test]
    fn a_reply_that_is_no_message_is_a_reply() {
        let (line, keeper) = pair();
        let garble = || {
            wire::receive::<Numbered<KeeperRequest>>(&keeper).unwrap().expect("a request");
            wire::send(&keeper, &"no reply", None).unwrap();
        };
        thread::scope(|scope| {
            scope.spawn(garble);
            let error = line.ask(note("garbled"), None, Wait::Unbounded).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::InvalidArgument, "{error}");
        });
        line.ask(note("late"), None, Wait::Bounded).unwrap_err();
        garble();
        thread::scope(|scope| {
            scope.spawn(|| answer(&keeper, "in time"));
            let line = KeeperLine { patience: PATIENCE, ..line };
            let error = line.ask(note("answered"), None, Wait::Bounded).unwrap_err().to_string();
            assert_eq!(error, "in time");
        });
    }

    /// Protects: a keeper that dies is noticed without a request, and one that was told to end is
    /// not taken for a dead one. No reply is lost to the thread that looks.
    #[test]
    fn a_death_is_noticed() {
        for told in [false, true] {
            let (line, keeper) = pair();
            thread::scope(|scope| {
                let noticed = scope.spawn(|| line.dies());
                scope.spawn(|| answer(&keeper, "in time"));
                let error = line.ask(KeeperRequest::Release, None, Wait::Unbounded).unwrap_err();
                assert_eq!(error.to_string(), "in time");
                let ended = told.then(|| scope.spawn(|| line.finish()));
                if told {
                    assert!(wire::receive::<Numbered<KeeperRequest>>(&keeper).unwrap().is_none());
                }
                shutdown(&keeper, Shutdown::Both).unwrap();
                assert_eq!(noticed.join().unwrap(), !told);
                assert!(ended.is_none_or(|ended| ended.join().unwrap().is_ok()));
            });
        }
    }

    /// Protects: an unmount waits for its reply however late it is, also if an earlier request has
    /// timed out.
    #[test]
    fn an_unmount_is_waited_for() {
        let (line, keeper) = pair();
        line.ask(note("lost"), None, Wait::Bounded).unwrap_err();
        thread::scope(|scope| {
            let (sender, asked) = crossbeam_channel::bounded(1);
            let line = &line;
            scope.spawn(move || {
                sender.send(line.ask(KeeperRequest::Unmount, None, Wait::Unbounded).map(drop))
            });
            assert!(matches!(answer(&keeper, "late"), KeeperRequest::SetNote(_)));
            let (request, _) =
                wire::receive::<Numbered<KeeperRequest>>(&keeper).unwrap().expect("a request");
            assert!(matches!(request.message, KeeperRequest::Unmount));
            // Longer than the bound, and several ticks of the socket.
            assert!(asked.recv_timeout(TICK * 3).is_err(), "it waits");
            let reply = KeeperReply { log: Vec::new(), result: Ok(KeeperAnswer::Busy) };
            wire::send(&keeper, &Numbered { number: request.number, message: reply }, None)
                .unwrap();
            asked.recv().unwrap().unwrap();
        });
    }
}
