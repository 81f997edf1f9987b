//! Decides which thread does the work of a request and when its reply is sent. Both transports pass
//! their requests through this module, and no other module makes these decisions.
//!
//! | request | first | otherwise |
//! |---|---|---|
//! | read | `read_local`, on the receiving thread | `read_cached`, same thread; then a worker |
//! | write | `write_local`, on the receiving thread (1) | a worker; it flushes for O_DSYNC |
//! | fsync, close | the receiving thread, if a flush has covered every change | the flush thread |
//! | fallocate, lseek | | a worker |
//! | everything else | the receiving thread | |
//!
//! (1) With O_DSYNC the flush thread sends the reply.
//!
//! A worker of the first pool ("local") never waits for a backing file. If its request turns out to
//! need one, the request moves on to a worker of the second pool ("below"). A request that is known
//! to need a backing file goes to the second pool at once. Requests that hang in a backing file
//! therefore do not delay the others.
//!
//! **Touches:** [`FileSystem`], [`Workers`].
//! **Never:** waits; knows a transport.
//! **Locks:** none.
//! **Invariants:** each [`Reply`] is sent once; one that is dropped unsent replies EIO.

use std::sync::Arc;
use std::time::Duration;

use fuser::FopenFlags;
use rustix::io::Errno;

use super::file_system::FileSystem;
use super::handler::{Answer, Durability};
use super::pulse::Echoes;
use super::wire::{self, Operation};
use super::workers::{Buffer, Task, Workers};

/// Largest read or write request, in bytes: 256 pages, the kernel's own limit
/// (`fs.fuse.max_pages_limit`).
pub(super) const MAX_IO: usize = 1 << 20;

/// Direct I/O: this process acknowledges each write, and the kernel keeps no copy of the disk that
/// could become stale. Parallel direct writes: the kernel holds the inode lock shared for writes
/// that do not extend the file, and no write extends the disk.
const OPEN_FLAGS: FopenFlags =
    FopenFlags::FOPEN_DIRECT_IO.union(FopenFlags::FOPEN_PARALLEL_DIRECT_WRITES);

/// How long the kernel may show attributes without asking again. The kernel asks anyway after each
/// write (size and times) and each setattr. Only `st_blocks` can be stale for this long, while a
/// stream or copy-on-read fills the overlay.
const ATTR_TTL: Duration = Duration::from_secs(1);

/// A reply that the kernel waits for, on the thread that received the request. A reply that is
/// dropped unsent replies EIO.
pub(super) trait Reply: Sized {
    /// The same reply, once it has been passed to another thread.
    type Later: LaterReply;

    /// Returns the data of a write request.
    fn data(&mut self) -> &[u8];

    /// Returns a buffer for a read that is answered on this thread: memory of the reply itself, or
    /// `scratch`. It has at least [`MAX_IO`] bytes.
    fn room<'a>(&'a mut self, scratch: &'a mut [u8]) -> &'a mut [u8];

    /// Replies with the first `len` bytes of [`Reply::room`]. `scratch` must be the same as there.
    fn send_room(self, scratch: &[u8], len: usize);

    /// Replies with bytes that lie elsewhere, or with an error.
    fn send(self, answer: Result<&[u8], Errno>);

    /// Returns whether the thread may continue to work on a request after it has sent the reply: no
    /// other request waits for this thread.
    fn has_time(&mut self) -> bool;

    /// Like [`Reply::send`], for a thread that continues to work on the request: the client is
    /// woken before this function returns.
    fn send_now(self, answer: Result<&[u8], Errno>);

    /// Sends nothing, because the request takes no reply.
    fn forget(self);

    /// Converts the reply for a worker thread. The data of a write moves along with it.
    fn later(self) -> Self::Later;
}

/// A reply that another thread sends. A reply that is dropped unsent replies EIO, so that no client
/// waits for ever.
pub(super) trait LaterReply: Send + 'static {
    /// Returns the data of a write request.
    fn data(&mut self) -> &[u8];

    /// Replies with `answer`: the bytes, or an error.
    fn send(self, answer: Result<&[u8], Errno>);
}

/// The common entry point for the requests of both transports.
#[derive(Clone)]
pub(super) struct Dispatcher {
    file_system: Arc<dyn FileSystem>,
    workers: Workers,
    echoes: Arc<Echoes>,
}

impl Dispatcher {
    /// Makes a dispatcher. It notifies `echoes` of each request that a [`super::Pulse`] has asked
    /// for.
    pub(super) fn new(
        file_system: Arc<dyn FileSystem>,
        workers: Workers,
        echoes: Arc<Echoes>,
    ) -> Dispatcher {
        Dispatcher { file_system, workers, echoes }
    }

    /// Encodes a notification that makes the kernel send [`Operation::Echo`] with the token that is
    /// returned with it, over the queue of the CPU that writes the notification.
    pub(super) fn nudge(&self) -> (u64, impl AsRef<[u8]> + use<>) {
        let token = self.echoes.unawaited();
        (token, wire::retrieve(token))
    }

    /// Answers a request on this thread if that takes no waiting, and passes it to a worker or to
    /// the flush thread otherwise. The content of `scratch` is arbitrary before and after the call.
    /// A read that is longer than `scratch` does not use it.
    pub(super) fn serve(&self, operation: Operation, reply: impl Reply, scratch: &mut [u8]) {
        let file_system = &*self.file_system;
        match operation {
            // A kernel that asks for more than was negotiated gets a short read.
            Operation::Read { offset, len } => {
                self.read(offset, (len as usize).min(MAX_IO), reply, scratch)
            }
            Operation::Write { offset, flags, .. } => {
                self.write(offset, Durability::of_write(flags), reply)
            }
            Operation::Close if !file_system.needs_flush() => reply.send(Ok(&[])),
            Operation::Sync if file_system.flush_local() == Answer::Done(()) => reply.send(Ok(&[])),
            Operation::Close | Operation::Sync => {
                let reply = reply.later();
                self.workers.flush(Box::new(move |flushed| reply.send(flushed.map(|()| &[][..]))));
            }
            Operation::Allocate { offset, len, mode } => self.on_worker(
                Route::Unknown,
                reply.later(),
                move |file_system, reply, _| {
                    give(file_system.fallocate_without_base(offset, len, mode), reply, |()| {
                        wire::Structure::none()
                    })
                },
                move |file_system, reply, _| {
                    let done = file_system.fallocate(offset, len, mode);
                    reply.send(done.map(|()| &[][..]));
                },
            ),
            Operation::Seek { offset, whence } => self.on_worker(
                Route::Unknown,
                reply.later(),
                move |file_system, reply, _| {
                    give(file_system.lseek_without_base(offset, whence), reply, wire::sought)
                },
                move |file_system, reply, _| {
                    send_later(reply, file_system.lseek(offset, whence).map(wire::sought))
                },
            ),
            Operation::GetAttributes => {
                send(reply, file_system.getattr().map(|stat| wire::attributes(&stat, ATTR_TTL)))
            }
            Operation::SetAttributes { truncate, changes } => {
                let changed = file_system.setattr(truncate, &changes);
                send(reply, changed.map(|stat| wire::attributes(&stat, ATTR_TTL)));
            }
            Operation::Open { flags } => {
                send(reply, file_system.open(flags).map(|()| wire::opened(OPEN_FLAGS.bits())))
            }
            Operation::FileSystem => {
                send(reply, file_system.statfs().map(|host| wire::file_system(&host)))
            }
            Operation::Nothing => reply.send(Ok(&[])),
            Operation::NoReply => reply.forget(),
            Operation::Echo { token } => {
                self.echoes.arrived(token);
                reply.forget();
            }
            Operation::Refused(errno) => reply.send(Err(errno)),
        }
    }

    fn read(&self, offset: u64, len: usize, mut reply: impl Reply, scratch: &mut [u8]) {
        let way = match self.file_system.read_local(offset, &mut reply.room(scratch)[..len]) {
            Ok(Answer::Done(len)) => return reply.send_room(scratch, len),
            Ok(Answer::Miss) => Route::Unknown,
            Ok(Answer::Below) => Route::Below,
            Err(errno) => return reply.send(Err(errno)),
        };
        let mut reply = Some(reply);
        // Uses `scratch`, because the reply is sent while the bytes are still to be stored in the
        // overlay.
        if way == Route::Below
            && reply.as_mut().is_some_and(Reply::has_time)
            && let Some(room) = scratch.get_mut(..len)
        {
            self.file_system.read_cached(offset, room, &mut |answer| {
                if let Some(reply) = reply.take() {
                    reply.send_now(answer);
                }
            });
        }
        let Some(reply) = reply else { return };
        self.on_worker(
            way,
            reply.later(),
            move |file_system, reply, buffer| match file_system
                .read_without_base(offset, buffer.first(len))
            {
                Ok(Answer::Done(len)) => {
                    reply.send(Ok(buffer.first(len)));
                    None
                }
                Ok(Answer::Miss | Answer::Below) => Some(reply),
                Err(errno) => {
                    reply.send(Err(errno));
                    None
                }
            },
            move |file_system, reply, buffer| {
                let mut reply = Some(reply);
                file_system.read(offset, buffer.first(len), &mut |answer| {
                    if let Some(reply) = reply.take() {
                        reply.send(answer);
                    }
                });
            },
        );
    }

    fn write(&self, offset: u64, durability: Durability, mut reply: impl Reply) {
        let way = match self.file_system.write_local(offset, reply.data()) {
            Ok(Answer::Done(len)) if durability == Durability::Now => {
                let reply = reply.later();
                return self.workers.flush(Box::new(move |flushed| {
                    send_later(reply, flushed.map(|()| wire::written(len)))
                }));
            }
            Ok(Answer::Done(len)) => return send(reply, Ok(wire::written(len))),
            Ok(Answer::Miss) => Route::Unknown,
            Ok(Answer::Below) => Route::Below,
            Err(errno) => return reply.send(Err(errno)),
        };
        self.on_worker(
            way,
            reply.later(),
            move |file_system, mut reply, _| {
                let written = file_system.write_without_base(offset, reply.data(), durability);
                give(written, reply, wire::written)
            },
            move |file_system, mut reply, _| {
                let written = file_system.write(offset, reply.data(), durability);
                send_later(reply, written.map(wire::written));
            },
        );
    }

    /// Makes a worker answer a request. `first` runs without waiting for a backing file, and
    /// returns the reply if it needs one; then `then` runs.
    fn on_worker<R: LaterReply>(
        &self,
        way: Route,
        reply: R,
        first: impl FnOnce(&dyn FileSystem, R, &mut Buffer) -> Option<R> + Send + 'static,
        then: impl FnOnce(&dyn FileSystem, R, &mut Buffer) + Send + 'static,
    ) {
        let file_system = Arc::clone(&self.file_system);
        let below =
            move |reply| -> Task { Box::new(move |buffer| then(&*file_system, reply, buffer)) };
        if way == Route::Below {
            return self.workers.below(below(reply));
        }
        let (file_system, workers) = (Arc::clone(&self.file_system), self.workers.clone());
        self.workers.local(Box::new(move |buffer| {
            if let Some(reply) = first(&*file_system, reply, buffer) {
                workers.below(below(reply));
            }
        }));
    }
}

/// Which pool of workers a request goes to, if the receiving thread cannot answer it.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Route {
    /// "local": the overlay may suffice.
    Unknown,
    /// "below": a backing file is needed.
    Below,
}

fn send(reply: impl Reply, answer: Result<wire::Structure, Errno>) {
    match answer {
        Ok(structure) => reply.send(Ok(structure.bytes())),
        Err(errno) => reply.send(Err(errno)),
    }
}

fn send_later(reply: impl LaterReply, answer: Result<wire::Structure, Errno>) {
    match answer {
        Ok(structure) => reply.send(Ok(structure.bytes())),
        Err(errno) => reply.send(Err(errno)),
    }
}

/// Replies, unless a backing file is needed. In that case it returns the reply.
fn give<R: LaterReply, T>(
    answer: Result<Answer<T>, Errno>,
    reply: R,
    structure: impl FnOnce(T) -> wire::Structure,
) -> Option<R> {
    match answer {
        Ok(Answer::Miss | Answer::Below) => return Some(reply),
        Ok(Answer::Done(value)) => send_later(reply, Ok(structure(value))),
        Err(errno) => send_later(reply, Err(errno)),
    }
    None
}
