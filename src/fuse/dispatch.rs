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
//! **Touches:** [`FileSystem`], [`Workers`]. **Never:** waits; knows a transport.
//! **Locks:** none. **Invariants:** each [`Reply`] is sent once, or by its drop as EIO.

use std::sync::Arc;
use std::time::Duration;

use fuser::FopenFlags;
use rustix::io::Errno;

use super::file_system::FileSystem;
use super::handler::{Answer, Durability};
use super::wire::{self, Operation};
use super::workers::Workers;

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
}

impl Dispatcher {
    pub(super) fn new(file_system: Arc<dyn FileSystem>, workers: Workers) -> Dispatcher {
        Dispatcher { file_system, workers }
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
            Operation::Allocate { offset, len, mode } => {
                self.on_worker(reply, move |file_system, reply| {
                    let done = file_system.fallocate(offset, len, mode);
                    reply.send(done.map(|()| &[][..]));
                });
            }
            Operation::Seek { offset, whence } => {
                self.on_worker(reply, move |file_system, reply| {
                    let found = file_system.lseek(offset, whence).map(wire::sought);
                    reply.send(found.as_ref().map(wire::Structure::bytes).map_err(|errno| *errno));
                });
            }
            Operation::GetAttributes => send(reply, file_system.getattr().map(|stat| wire::attributes(&stat, ATTR_TTL))),
            Operation::SetAttributes { truncate, changes } => {
                let changed = file_system.setattr(truncate, &changes);
                send(reply, changed.map(|stat| wire::attributes(&stat, ATTR_TTL)));
            }
            Operation::Open { flags } => send(reply, file_system.open(flags).map(|()| wire::opened(OPEN_FLAGS.bits()))),
            Operation::FileSystem => send(reply, file_system.statfs().map(|host| wire::file_system(&host))),
            Operation::Nothing => reply.send(Ok(&[])),
            Operation::NoReply => reply.forget(),
            Operation::Refused(errno) => reply.send(Err(errno)),
        }
    }

    fn read(&self, offset: u64, len: usize, mut reply: impl Reply, scratch: &mut [u8]) {
        match self.file_system.read_local(offset, &mut reply.room(scratch)[..len]) {
            Ok(Answer::Done(len)) => return reply.send_room(scratch, len),
            Ok(Answer::Miss) => {}
            Err(errno) => return reply.send(Err(errno)),
        }
        let mut reply = Some(reply);
        // Through `scratch`: the reply is sent while its bytes are still to be stored.
        if reply.as_mut().is_some_and(Reply::has_time)
            && let Some(room) = scratch.get_mut(..len)
        {
            self.file_system.read_cached(offset, room, &mut |answer| {
                if let Some(reply) = reply.take() {
                    reply.send_now(answer);
                }
            });
        }
        let Some(reply) = reply else { return };
        let file_system = Arc::clone(&self.file_system);
        let mut reply = Some(reply.later());
        self.workers.miss(Box::new(move |buffer| {
            file_system.read(offset, buffer.first(len), &mut |answer| {
                if let Some(reply) = reply.take() {
                    reply.send(answer);
                }
            });
        }));
    }

    fn write(&self, offset: u64, durability: Durability, mut reply: impl Reply) {
        match self.file_system.write_local(offset, reply.data()) {
            Ok(Answer::Done(len)) if durability == Durability::Now => {
                let reply = reply.later();
                self.workers.flush(Box::new(move |flushed| {
                    let written = wire::written(len);
                    reply.send(flushed.map(|()| written.bytes()));
                }));
            }
            Ok(Answer::Done(len)) => send(reply, Ok(wire::written(len))),
            Ok(Answer::Miss) => {
                self.on_worker(reply, move |file_system, mut reply| {
                    let written = file_system.write(offset, reply.data(), durability).map(wire::written);
                    reply.send(written.as_ref().map(wire::Structure::bytes).map_err(|errno| *errno));
                });
            }
            Err(errno) => reply.send(Err(errno)),
        }
    }

    fn on_worker<R: Reply>(&self, reply: R, work: impl FnOnce(&dyn FileSystem, R::Later) + Send + 'static) {
        let file_system = Arc::clone(&self.file_system);
        let reply = reply.later();
        self.workers.miss(Box::new(move |_buffer| work(&*file_system, reply)));
    }
}

fn send(reply: impl Reply, answer: Result<wire::Structure, Errno>) {
    match answer {
        Ok(structure) => reply.send(Ok(structure.bytes())),
        Err(errno) => reply.send(Err(errno)),
    }
}
