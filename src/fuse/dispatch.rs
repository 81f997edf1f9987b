//! What becomes of a request, whichever transport it came over: the only place that decides which
//! thread does the work and when the reply is sent.
//!
//! | request | first | otherwise |
//! |---|---|---|
//! | read | `read_local`, on the thread that received it | `read_cached`, on the same thread; then a worker |
//! | write | `write_local`, likewise; with O_DSYNC the flush thread replies | a worker, which flushes itself |
//! | fsync, and close after a write | | the flush thread |
//! | fallocate, lseek | | a worker |
//! | everything else | the thread that received it | |
//!
//! A worker of the first pool never waits for a backing file. What turns out there to need one goes on to
//! a worker of the second; what is known to need one goes there at once. However many requests hang in a
//! backing file, the others are done.
//!
//! **Touches:** [`FileSystem`], [`Workers`]. **Never:** waits; knows a transport.
//! **Locks:** none. **Invariants:** each [`Reply`] is sent once, or by its drop as EIO.

use std::sync::Arc;
use std::time::Duration;

use fuser::FopenFlags;
use rustix::io::Errno;

use super::file_system::FileSystem;
use super::handler::{Answer, Durability};
use super::pulse::Echoes;
use super::wire::{self, Operation};
use super::workers::{Buffer, Task, Workers};

/// Largest read or write request, in bytes: 256 pages, the kernel's own limit (`fs.fuse.max_pages_limit`).
pub(super) const MAX_IO: usize = 1 << 20;

/// Direct: every write is acknowledged by us, and no copy of the disk grows stale in the kernel. Parallel
/// direct writes: the kernel takes the inode lock shared for writes that do not extend the file, and ours
/// never do.
const OPEN_FLAGS: FopenFlags = FopenFlags::FOPEN_DIRECT_IO.union(FopenFlags::FOPEN_PARALLEL_DIRECT_WRITES);

/// How long the kernel may show attributes without asking. It asks anyway after every write (size and
/// times) and setattr; what can be stale this long is `st_blocks`, while a stream or copy-on-read fills
/// the overlay.
const ATTR_TTL: Duration = Duration::from_secs(1);

/// A reply that the kernel waits for, in the hands of the thread that received the request. Dropped
/// unsent it replies EIO.
pub(super) trait Reply: Sized {
    /// The same reply, for another thread.
    type Later: LaterReply;

    /// The bytes of a write.
    fn data(&mut self) -> &[u8];

    /// Where the bytes of a read are to go if it is answered at once: into memory of the reply, or
    /// into `scratch`. [`MAX_IO`] bytes at least.
    fn room<'a>(&'a mut self, scratch: &'a mut [u8]) -> &'a mut [u8];

    /// Replies with the first `len` bytes of [`Reply::room`]. `scratch` is the same.
    fn send_room(self, scratch: &[u8], len: usize);

    /// Replies with bytes that are somewhere else, or an error.
    fn send(self, answer: Result<&[u8], Errno>);

    /// Whether the thread may go on with a request after its reply was sent: no other request waits for
    /// this thread.
    fn has_time(&mut self) -> bool;

    /// As [`Reply::send`], for a thread that goes on with the request: the client is woken before this
    /// returns.
    fn send_now(self, answer: Result<&[u8], Errno>);

    /// The request takes no reply.
    fn forget(self);

    /// For a worker; the bytes of a write go with it.
    fn later(self) -> Self::Later;
}

/// A reply that another thread sends. Dropped unsent it replies EIO, so that no client waits for ever.
pub(super) trait LaterReply: Send + 'static {
    /// The bytes of the write.
    fn data(&mut self) -> &[u8];

    /// Replies with these bytes, or an error.
    fn send(self, answer: Result<&[u8], Errno>);
}

/// What both transports hand their requests to.
#[derive(Clone)]
pub(super) struct Dispatcher {
    file_system: Arc<dyn FileSystem>,
    workers: Workers,
    echoes: Arc<Echoes>,
}

impl Dispatcher {
    /// `echoes` is told when a request comes that a [`super::Pulse`] has asked for.
    pub(super) fn new(file_system: Arc<dyn FileSystem>, workers: Workers, echoes: Arc<Echoes>) -> Dispatcher {
        Dispatcher { file_system, workers, echoes }
    }

    /// Has a request answered: here if that takes no waiting, by a worker or the flush thread otherwise.
    /// `scratch` holds anything, before and after; a read that is longer than it does not use it.
    pub(super) fn serve(&self, operation: Operation, reply: impl Reply, scratch: &mut [u8]) {
        let file_system = &*self.file_system;
        match operation {
            // A kernel that asked for more than was negotiated would get a short read.
            Operation::Read { offset, len } => self.read(offset, (len as usize).min(MAX_IO), reply, scratch),
            Operation::Write { offset, flags, .. } => self.write(offset, Durability::of_write(flags), reply),
            Operation::Close if !file_system.needs_flush() => reply.send(Ok(&[])),
            Operation::Close | Operation::Sync => {
                let reply = reply.later();
                self.workers.flush(Box::new(move |flushed| reply.send(flushed.map(|()| &[][..]))));
            }
            Operation::Allocate { offset, len, mode } => self.on_worker(
                Way::Unknown,
                reply.later(),
                move |file_system, reply, _| {
                    give(file_system.fallocate_without_base(offset, len, mode), reply, |()| wire::Structure::none())
                },
                move |file_system, reply, _| {
                    let done = file_system.fallocate(offset, len, mode);
                    reply.send(done.map(|()| &[][..]));
                },
            ),
            Operation::Seek { offset, whence } => self.on_worker(
                Way::Unknown,
                reply.later(),
                move |file_system, reply, _| give(file_system.lseek_without_base(offset, whence), reply, wire::sought),
                move |file_system, reply, _| send_later(reply, file_system.lseek(offset, whence).map(wire::sought)),
            ),
            Operation::GetAttributes => send(reply, file_system.getattr().map(|stat| wire::attributes(&stat, ATTR_TTL))),
            Operation::SetAttributes { truncate, changes } => {
                let changed = file_system.setattr(truncate, &changes);
                send(reply, changed.map(|stat| wire::attributes(&stat, ATTR_TTL)));
            }
            Operation::Open { flags } => send(reply, file_system.open(flags).map(|()| wire::opened(OPEN_FLAGS.bits()))),
            Operation::FileSystem => send(reply, file_system.statfs().map(|host| wire::file_system(&host))),
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
            Ok(Answer::Miss) => Way::Unknown,
            Ok(Answer::Below) => Way::Below,
            Err(errno) => return reply.send(Err(errno)),
        };
        let mut reply = Some(reply);
        // Through `scratch`: the reply is sent while its bytes are still to be stored.
        if way == Way::Below
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
            move |file_system, reply, buffer| match file_system.read_without_base(offset, buffer.first(len)) {
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
                return self.workers.flush(Box::new(move |flushed| send_later(reply, flushed.map(|()| wire::written(len)))));
            }
            Ok(Answer::Done(len)) => return send(reply, Ok(wire::written(len))),
            Ok(Answer::Miss) => Way::Unknown,
            Ok(Answer::Below) => Way::Below,
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

    /// Has a worker answer a request: by `first`, which waits for no backing file and returns the reply
    /// where that does not do, and then by `then`.
    fn on_worker<R: LaterReply>(
        &self,
        way: Way,
        reply: R,
        first: impl FnOnce(&dyn FileSystem, R, &mut Buffer) -> Option<R> + Send + 'static,
        then: impl FnOnce(&dyn FileSystem, R, &mut Buffer) + Send + 'static,
    ) {
        let file_system = Arc::clone(&self.file_system);
        let below = move |reply| -> Task { Box::new(move |buffer| then(&*file_system, reply, buffer)) };
        if way == Way::Below {
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

/// What is known of a request that is not answered at once.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Way {
    /// It may be answered without a backing file.
    Unknown,
    /// It may not.
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

/// Replies, unless a backing file is needed: then the reply is returned.
fn give<R: LaterReply, T>(answer: Result<Answer<T>, Errno>, reply: R, structure: impl FnOnce(T) -> wire::Structure) -> Option<R> {
    match answer {
        Ok(Answer::Miss | Answer::Below) => return Some(reply),
        Ok(Answer::Done(value)) => send_later(reply, Ok(structure(value))),
        Err(errno) => send_later(reply, Err(errno)),
    }
    None
}
