//! The beginning and the end of a session: fuser answers the kernel's INIT, then the transports serve.
//! Requests of the mount never reach fuser, which ends the process for some that a client can make.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;

use crossbeam_channel::{Receiver, Sender, TrySendError};
use fuser::{Filesystem, INodeNo, InitFlags, KernelConfig, Notifier, Request, Session, SessionACL};

use super::device;
use super::dispatch::{Dispatcher, MAX_IO};
use super::file_system::FileSystem;
use super::pulse::Pulse;
use super::ring::{self, Wanted};
use super::workers::{Ended, Workers};
use crate::error::Context;
use crate::{Error, ErrorKind, Result};

/// Threads that read requests and answer hits. More than this many cost latency at depth 1 on two cores
/// (docs/performance.md).
const SESSION_THREADS: usize = 2;

/// Asynchronous requests that the kernel hands us at once; the rest waits in the kernel. Twice the depth
/// at which the transport saturates.
const MAX_BACKGROUND: u16 = 64;

/// A running session.
pub(super) struct Running {
    /// Yields once: when the kernel has ended the session (unmounted, and the last user gone), or when a
    /// thread that serves has failed.
    pub(super) session: Receiver<Result<()>>,
    /// Disconnected when all workers have answered what was queued, which can only be after the session
    /// has ended.
    pub(super) workers: Ended,
    /// The way to tell the kernel something unasked.
    pub(super) notifier: Notifier,
    /// Whether requests are answered.
    pub(super) pulse: Pulse,
}

/// Answers the kernel's INIT and starts to serve `device`, an open /dev/fuse that is mounted.
///
/// # Errors
/// The kernel speaks another protocol; no more threads.
pub(super) fn start(file_system: Arc<dyn FileSystem>, device: OwnedFd, transport: Wanted) -> Result<Running> {
    let over_rings = Arc::new(AtomicBool::new(matches!(transport, Wanted::Rings(_))));
    let negotiation = Negotiation { over_rings: Arc::clone(&over_rings) };
    // The kernel itself checks which users may open the disk (`allow_other`, `default_permissions`).
    let session = Session::from_fd(negotiation, device, SessionACL::All, fuser::Config::default()).context(|| "FUSE handshake")?;
    let notifier = session.notifier();
    let device = session.as_fd().try_clone_to_owned().context(|| "duplicating /dev/fuse")?;
    drop(session);

    let (workers, workers_ended) = Workers::start(&file_system)?;
    let echoes = Arc::default();
    let dispatcher = Dispatcher::new(file_system, workers, Arc::clone(&echoes));
    let (ending, ended) = Ending::new();
    let device = Arc::new(device);
    let pulse = Pulse::new(&echoes, &device, over_rings.load(Ordering::Acquire));
    match transport {
        Wanted::Rings(rings) if over_rings.load(Ordering::Acquire) => rings.serve(device.as_fd(), &dispatcher, &ending)?,
        Wanted::Rings(_) => log::info!("requests come over /dev/fuse: this kernel does not offer FUSE over io_uring"),
        Wanted::DeviceFor(reason) => log::info!("requests come over /dev/fuse: {reason}"),
        Wanted::Device => {}
    }
    // A descriptor for each thread spares them a lock in the kernel. Where one cannot be had (another
    // user, a kernel without Landlock) they share the first.
    let servers: Vec<Server> = (0..SESSION_THREADS).map(|_| Server::new(&ending)).collect();
    for (number, server) in servers.into_iter().enumerate() {
        let own = if number == 0 { None } else { ring::clone_device(&device).ok() };
        let own = own.map_or_else(|| Arc::clone(&device), Arc::new);
        device::serve(number, own, dispatcher.clone(), server)?;
    }
    Ok(Running { session: ended, workers: workers_ended, notifier, pulse })
}

/// The end of a session, which all its threads share.
pub(super) struct Ending {
    result: Sender<Result<()>>,
    /// Threads that read /dev/fuse.
    readers: AtomicUsize,
}

/// A thread that reads /dev/fuse; dropped when it ends, also by a panic.
pub(super) struct Server(Arc<Ending>);

impl Ending {
    pub(super) fn new() -> (Arc<Ending>, Receiver<Result<()>>) {
        let (result, ended) = crossbeam_channel::bounded(1);
        (Arc::new(Ending { result, readers: AtomicUsize::new(0) }), ended)
    }

    /// A thread cannot serve any more. Requests would wait for it for ever, so the session is to end.
    pub(super) fn fail(&self, error: Error) {
        // The first is the result, and the process reports it when it ends.
        if let Err(TrySendError::Full(Err(error))) = self.result.try_send(Err(error)) {
            log::error!("{error}");
        }
    }
}

impl Server {
    /// For one more thread that reads /dev/fuse: the session ends well with the last of them.
    pub(super) fn new(ending: &Arc<Ending>) -> Server {
        ending.readers.fetch_add(1, Ordering::AcqRel);
        Server(Arc::clone(ending))
    }

    /// The thread ends with this result.
    pub(super) fn ends(self, result: Result<()>) {
        if let Err(error) = result {
            self.0.fail(error);
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        if thread::panicking() {
            self.0.fail(Error::new(ErrorKind::Io, "a thread that serves /dev/fuse has panicked"));
        }
        if self.0.readers.fetch_sub(1, Ordering::AcqRel) == 1 {
            let _ = self.0.result.try_send(Ok(()));
        }
    }
}

/// Makes the kernel know that the disk has grown to `size` bytes, also where a program has it open already.
///
/// Forgetting its attributes is enough for a program that asks for the size, with stat(2) or lseek(2); a shorter `ATTR_TTL` would do that too, at one
/// request for every stat(2). But asynchronous reads end where the kernel *believes* the file to end, and ask nobody (tried on Linux 6.18: they find
/// nothing past the old end for as long as nobody calls stat). So it is handed the last byte, which moves its end of the file, and takes the page
/// back. The byte is right: the new range is zeros, and nobody could write to it, knowing no end beyond the old one.
///
/// # Errors
/// The disk is not mounted any more.
pub(super) fn tell_size(notifier: &Notifier, size: u64) -> io::Result<()> {
    let Some(last) = size.checked_sub(1) else { return Ok(()) };
    notifier.store(INodeNo::ROOT, last, &[0])?;
    notifier.inval_inode(INodeNo::ROOT, i64::try_from(last).unwrap_or(i64::MAX), 1)
}

/// Makes the kernel send what programs have written to shared mappings of the disk, and waits until
/// that is answered.
///
/// An invalidation writes dirty pages before it drops them (`launder_folio`). It needs no path,
/// which another mount may hide or a lazy unmount may have taken away, and no permission to open
/// the file, which root lacks where another user mounts without `allow_other`; fsync(2) of the
/// mounted file needs both. Errors of these writes are reported to the programs, by their msync(2).
///
/// # Errors
/// The disk is not mounted any more.
pub(super) fn write_mapped_pages(notifier: &Notifier) -> io::Result<()> {
    // A length of 0 is all of the file.
    notifier.inval_inode(INodeNo::ROOT, 0, 0)
}

/// What is asked for in the reply to INIT.
struct Negotiation {
    /// Requests are to come over io_uring; cleared where the kernel does not offer that.
    over_rings: Arc<AtomicBool>,
}

impl Filesystem for Negotiation {
    fn init(&mut self, _req: &Request, config: &mut KernelConfig) -> io::Result<()> {
        let _ = config.set_max_write(MAX_IO as u32);
        let _ = config.set_max_background(MAX_BACKGROUND);
        // Not FUSE_ATOMIC_O_TRUNC: see `Truncate`. Not FUSE_WRITEBACK_CACHE: it does not work on a file mountpoint.
        for wanted in [
            // Asynchronous O_DIRECT requests are sent in parallel.
            InitFlags::FUSE_ASYNC_DIO,
            // mmap(MAP_SHARED) works although the files are opened for direct I/O (Linux 6.6).
            InitFlags::FUSE_DIRECT_IO_ALLOW_MMAP,
        ] {
            if config.add_capabilities(wanted).is_err() {
                log::debug!("the kernel does not offer {wanted:?}");
            }
        }
        if self.over_rings.load(Ordering::Acquire) && config.add_capabilities(InitFlags::FUSE_OVER_IO_URING).is_err() {
            self.over_rings.store(false, Ordering::Release);
        }
        Ok(())
    }
}
