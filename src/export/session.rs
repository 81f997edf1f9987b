//! Start and end of a session: first INIT and all descriptors, or those of an earlier process, then
//! the transports serve. Requests of the mount never reach fuser, because fuser ends the process
//! for some requests that a client can make.
//!
//! A session outlives its process: as long as some process holds a duplicate of each descriptor,
//! the kernel keeps the mount and all requests, also those that a dead process has read. Requests
//! that came over io_uring lie in shared memory (`ring`), which is one more descriptor.
//! ```text
//! connect ───┬─▶ Connected ── devices(), negotiated() ─▶ the caller hands them to a keeper
//!            │       └─ serve ─▶ requests ─▶ … killed
//! take_over ─┴─▶ Connected ── serve ─▶ FUSE_NOTIFY_RESEND ─▶ requests, those of the dead one first
//! ```

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;

use crossbeam_channel::{Receiver, Sender, TrySendError};

use super::dispatch::Dispatcher;
use super::file_system::FileSystem;
use super::negotiated::{self, Negotiated};
use super::notify::Notifier;
use super::pulse::{Echoes, Pulse};
use super::ring::WantedTransport;
use super::turns::Turns;
use super::workers::Workers;
use super::{Mounted, device};
use host::{Error, ErrorKind, Result};

/// Number of threads that read requests and answer hits. On two cores, more threads increase the
/// latency at depth 1 (docs/performance.md).
const SESSION_THREADS: usize = 2;

/// A session whose descriptors are all open and whose terms are known. No request was read from it.
#[derive(Debug)]
pub struct Connected {
    file_system: Arc<dyn FileSystem>,
    transport: WantedTransport,
    /// The mounted descriptor first, then the clones of it. Never empty.
    devices: Vec<Arc<OwnedFd>>,
    negotiated: Negotiated,
    origin: SessionOrigin,
}

/// Where a session comes from.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum SessionOrigin {
    /// This process has answered INIT.
    New,
    /// Another process has served it.
    TakenOver,
}

impl Connected {
    /// Answers the kernel's INIT over `device`, an open /dev/fuse that is mounted, and opens a
    /// descriptor for each further thread.
    ///
    /// # Errors
    /// The kernel uses another FUSE protocol, or the disk was unmounted.
    pub(super) fn connect(
        file_system: Arc<dyn FileSystem>,
        device: OwnedFd,
        transport: WantedTransport,
    ) -> Result<Connected> {
        let layout = match &transport {
            WantedTransport::Rings(rings) => Some(rings.layout()),
            _ => None,
        };
        let (device, negotiated) = negotiated::negotiate(device, layout)?;
        let transport = match transport {
            WantedTransport::Rings(_) if !negotiated.over_io_uring => {
                log::info!(
                    "requests come over /dev/fuse: this kernel does not offer FUSE over io_uring"
                );
                WantedTransport::Device
            }
            WantedTransport::DeviceFor(reason) => {
                log::info!("requests come over /dev/fuse: {reason}");
                WantedTransport::Device
            }
            transport => transport,
        };
        // With a descriptor of its own, each thread avoids a lock in the kernel. If a second
        // descriptor cannot be opened (another user, a kernel without Landlock), the threads share
        // the first one.
        let clones: Vec<_> =
            (1..SESSION_THREADS).map_while(|_| uring::clone_device(&device).ok()).collect();
        let devices = std::iter::once(device).chain(clones).map(Arc::new).collect();
        let origin = SessionOrigin::New;
        Ok(Connected { file_system, transport, devices, negotiated, origin })
    }

    /// Continues a session that another process has served: `devices` are duplicates of all of its
    /// descriptors, and `memory` is one of [`Connected::shared_memory`]. The `transport` must have
    /// rings if the session does.
    ///
    /// # Errors
    /// There is no descriptor, or the session has terms that this version does not support.
    pub(super) fn take_over(
        file_system: Arc<dyn FileSystem>,
        transport: WantedTransport,
        devices: Vec<OwnedFd>,
        memory: Option<OwnedFd>,
        negotiated: Negotiated,
    ) -> Result<Connected> {
        negotiated.check_takeover()?;
        if devices.is_empty() {
            return Err(Error::new(
                ErrorKind::InvalidArgument,
                "the session cannot be taken over: no descriptor of /dev/fuse was kept",
            ));
        }
        let devices = devices.into_iter().map(Arc::new).collect();
        let transport = match (negotiated.rings, memory, transport) {
            (None, ..) => WantedTransport::Device,
            (Some(layout), Some(memory), WantedTransport::Rings(rings)) => {
                WantedTransport::Rings(rings.adopt(memory, layout)?)
            }
            (Some(_), memory, _) => {
                let what = if memory.is_some() { "ring was made" } else { "memory was kept" };
                return Err(Error::new(
                    ErrorKind::InvalidArgument,
                    format!("the session cannot be taken over: no {what} for its requests"),
                ));
            }
        };
        let origin = SessionOrigin::TakenOver;
        Ok(Connected { file_system, transport, devices, negotiated, origin })
    }

    /// Returns the descriptors of the session: the mounted one, then its clones. A keeper needs a
    /// duplicate of each. The kernel ends the requests that were read from a descriptor with an
    /// error when its last duplicate is closed, and ends the mount when that was the last
    /// descriptor.
    pub fn devices(&self) -> Vec<BorrowedFd<'_>> {
        self.devices.iter().map(|device| device.as_fd()).collect()
    }

    /// Returns the memory of the requests that come over io_uring, a memfd. A keeper needs a
    /// duplicate of it. `None` over /dev/fuse.
    pub fn shared_memory(&self) -> Option<BorrowedFd<'_>> {
        match &self.transport {
            WantedTransport::Rings(rings) => Some(rings.memory()),
            WantedTransport::Device | WantedTransport::DeviceFor(_) => None,
        }
    }

    /// Returns what a process that takes the session over needs to know.
    pub fn negotiated(&self) -> &Negotiated {
        &self.negotiated
    }

    /// Starts the threads that serve the session.
    ///
    /// If the session was taken over, the kernel is first asked to send every request again that
    /// was read and not answered. The process that has read them must have ended before, with all
    /// of its threads (it was waited for): a thread of it that still writes could overwrite a later
    /// write.
    ///
    /// # Errors
    /// The system has no more threads, or the kernel cannot send requests again.
    pub fn serve(self) -> Result<Mounted> {
        let Connected { file_system, transport, devices, negotiated, origin } = self;
        let Some(device) = devices.first() else {
            return Err(Error::new(ErrorKind::InvalidArgument, "no descriptor of /dev/fuse"));
        };
        let (workers, workers_ended) = Workers::start(&file_system)?;
        let echoes = Arc::new(Echoes::of_this_process());
        let dispatcher = Dispatcher::new(Arc::clone(&file_system), workers, Arc::clone(&echoes));
        let (ending, session) = SessionEnding::new();
        let notifier = Notifier::new(device);
        let pulse = Pulse::new(&echoes, device, negotiated.over_io_uring);
        if origin == SessionOrigin::TakenOver {
            file_system.taken_over();
            // Before the first read. Requests that this process has read would come again as well.
            notifier.resend()?;
        }
        let rings = match transport {
            WantedTransport::Rings(rings) => {
                Some(rings.serve(device.as_fd(), &dispatcher, &ending)?)
            }
            WantedTransport::Device | WantedTransport::DeviceFor(_) => None,
        };
        let threads = devices.len().max(SESSION_THREADS);
        let servers: Vec<ServerThread> = (0..threads).map(|_| ServerThread::new(&ending)).collect();
        let turns = Turns::new(threads);
        for (number, server) in servers.into_iter().enumerate() {
            let own = Arc::clone(devices.get(number).unwrap_or(device));
            device::serve(number, own, dispatcher.clone(), Arc::clone(&turns), server)?;
        }
        Ok(Mounted { session, rings, workers: workers_ended, notifier, pulse })
    }
}

/// The end of a session, shared by all its threads.
pub(super) struct SessionEnding {
    result: Sender<Result<()>>,
    /// Number of threads that read /dev/fuse.
    readers: AtomicUsize,
}

/// Counts a thread that reads /dev/fuse until it is dropped, also by a panic.
pub(super) struct ServerThread(Arc<SessionEnding>);

impl SessionEnding {
    pub(super) fn new() -> (Arc<SessionEnding>, Receiver<Result<()>>) {
        let (result, ended) = crossbeam_channel::bounded(1);
        (Arc::new(SessionEnding { result, readers: AtomicUsize::new(0) }), ended)
    }

    /// Ends the session, because a thread cannot serve any more and requests would wait for it for
    /// ever.
    pub(super) fn fail(&self, error: Error) {
        // The first error is the result, which the process reports when it ends. Later ones are
        // only logged.
        if let Err(TrySendError::Full(Err(error))) = self.result.try_send(Err(error)) {
            log::error!("{error}");
        }
    }
}

impl ServerThread {
    /// Counts one more thread that reads /dev/fuse. The session ends with `Ok` when the last one
    /// ends.
    pub(super) fn new(ending: &Arc<SessionEnding>) -> ServerThread {
        ending.readers.fetch_add(1, Ordering::AcqRel);
        ServerThread(Arc::clone(ending))
    }

    /// Ends the thread with this result.
    pub(super) fn ends(self, result: Result<()>) {
        if let Err(error) = result {
            self.0.fail(error);
        }
    }
}

impl Drop for ServerThread {
    fn drop(&mut self) {
        if thread::panicking() {
            self.0.fail(Error::new(ErrorKind::Io, "a thread that serves /dev/fuse has panicked"));
        }
        if self.0.readers.fetch_sub(1, Ordering::AcqRel) == 1 {
            let _ = self.0.result.try_send(Ok(()));
        }
    }
}

#[cfg(test)]
mod tests;
