//! Serves a disk to the kernel. FUSE requests become calls of [`Disk`], and the disk is one regular
//! file at the mountpoint.
//!
//! ```text
//! kernel ─ /dev/fuse ─ device (2 threads) ─▶ dispatch ─▶ handler ─▶ Disk::read_local, …     a hit
//!       └─ io_uring ── ring (2 per CPU) ──▶     │
//!                                               └─ workers ─ pools ─▶ handler ─▶ Disk::read, …
//!                                                       └─ flush thread ─▶ handler ─▶ Disk::flush
//! ```
//! A transport (`device`, `ring`) reads requests and writes replies. `turns` decides
//! which threads of /dev/fuse wait for requests, `polling` whether a thread polls before
//! it sleeps. `wire` parses and encodes their bytes. `dispatch` decides which thread does
//! the work. `notify` sends what no request has asked for. The crate fuser answers the
//! kernel's INIT; it does nothing else here.
//!
//! Files are opened for direct I/O: this process acknowledges each write, and the kernel caches
//! only the pages of shared mappings, which Linux supports since 6.6. The kernel's write-back cache
//! does not work when the mountpoint is a file, so this crate never requests it.
//!
//! The caller mounts, and passes the open /dev/fuse to [`Prepared::connect`]. If the process is
//! killed and another one holds duplicates of all descriptors, a third one can continue the session
//! with [`Prepared::take_over`]: the kernel sends the requests again that were not answered, and
//! those of io_uring still lie in the memory that the processes share.
//!
//! **Touches:** the open /dev/fuse, io_uring; [`Disk`] for everything else.
//! **Never:** knows jobs, QMP or qcow2; mounts or unmounts; opens or stats its own mounted file (it
//! would wait for itself, H29); blocks a server thread; answers ENOSYS to fsync or flush.
//! **Locks:** one lock for permissions and owner (`attributes`), under which only the listener of
//! [`Prepared::on_attributes`] runs. `Disk` orders the requests.
//! **Invariants:** `Disk` gets only ranges that lie within it. A reply is sent exactly once, by the
//! thread that has the result, and carries the number of its request, which has bit 63 set if the
//! request was sent again. Each change is counted as written before its reply is sent, so that
//! a later fsync or close flushes it; so is one that has failed, because a part may have been made.

#![forbid(unsafe_code)]
#![cfg_attr(not(test), warn(clippy::unwrap_used))]

mod attributes;
mod device;
mod dispatch;
mod file_system;
mod handler;
mod log_limit;
mod negotiated;
mod notify;
mod polling;
mod pulse;
mod ring;
mod session;
mod turns;
mod wire;
mod workers;

use std::io;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use crossbeam_channel::{Receiver, RecvTimeoutError};
use rustix::fs::{Mode, OFlags};

pub use attributes::{AttributeChanges, FileTimes, Owner, ShownAttributes, TimeChange};
pub use file_system::{FileSystem, ReadAnswer};
pub use handler::{Answer, Durability, Handler, Stat, Truncate, errno};
pub use negotiated::Negotiated;
pub use pulse::Pulse;
pub use ring::RingLayout;
pub use session::Connected;

use engine::disk::{Disk, DiskInfo};
use host::Result;
use host::error::Context;

/// How long [`Mounted::finish`] waits for the session and for running requests. A healthy disk
/// needs less. The limit exists because a hung backing file must not keep the process alive for
/// ever.
const FINISH_TIMEOUT: Duration = Duration::from_secs(5);

/// How requests reach this process from the kernel.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub enum Transport {
    /// io_uring if the kernel offers it, /dev/fuse otherwise.
    #[default]
    Auto,
    /// Only /dev/fuse.
    Dev,
    /// Only io_uring; an error if the kernel does not offer it.
    Uring,
    /// Only io_uring, for [`Prepared::take_over`] of a session that uses it already. The kernel
    /// need not offer it to new sessions any more.
    UringAgain,
}

/// How stat(2) shows the disk's file.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct ShownAs {
    /// User id of the owner.
    pub uid: u32,
    /// Group id of the owner.
    pub gid: u32,
    /// Permission bits, if they do not follow from the two fields below.
    pub mode: Option<u16>,
    /// Users other than the owner may open the file.
    pub allow_other: bool,
    /// The file cannot be written.
    pub read_only: bool,
}

/// A disk and everything needed to serve it. Serving it looks up no further path.
#[derive(Debug)]
pub struct Prepared {
    transport: ring::WantedTransport,
    file_system: Arc<dyn FileSystem>,
    /// `None` for a file system that is not a disk.
    attributes: Option<Arc<attributes::Attributes>>,
}

/// A mounted disk that is being served. It ends when the disk is unmounted, by this program or by
/// another one.
#[derive(Debug)]
pub struct Mounted {
    session: Receiver<Result<()>>,
    /// `None` over /dev/fuse.
    rings: Option<ring::RingThreads>,
    workers: workers::WorkersEnded,
    notifier: notify::Notifier,
    pulse: Pulse,
}

/// Notifies the kernel that a mounted disk has a new size.
#[derive(Clone, Debug)]
pub struct SizeNotice {
    notifier: notify::Notifier,
}

impl SizeNotice {
    /// Makes the kernel show `size`, also to programs that already have the disk open. Only for
    /// growth. Must not be called on a session thread.
    pub fn send(&self, size: u64) {
        if let Err(error) = self.notifier.tell_size(size) {
            log::warn!("telling the kernel of the new size: {error}");
        }
    }
}

/// Whether the kernel may still hold pages of shared mappings that were dirty before
/// [`Mounted::write_mapped_pages`] was called.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum MappedPages {
    /// No: the kernel has sent all of them, and the writes were answered.
    Written,
    /// Perhaps: a write did not return in time.
    Unknown,
}

/// Whether requests can still be running after [`Mounted::finish`].
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Finished {
    /// All requests have been answered, and no more can arrive.
    Quiet,
    /// A request hangs, or the kernel still sends requests.
    StillRunning,
}

/// The log target of messages about guest requests.
pub const GUEST: &str = "cordisk::guest";

/// Parses any bytes as a request from /dev/fuse and asserts the properties that hold for all
/// requests.
///
/// # Panics
/// If one of those properties does not hold.
#[cfg(feature = "testing")]
pub fn any_request(bytes: &[u8]) {
    wire::any_bytes(bytes);
}

/// Opens and reads everything for serving `disk` that needs a path.
///
/// # Errors
/// The overlay was moved or removed, or the transport is not available.
pub fn prepare(disk: &Arc<Disk>, shown: ShownAs, transport: Transport) -> Result<Prepared> {
    let info = disk.info()?;
    let attributes = Arc::new(new_attributes(&info, shown));
    let handler = Handler::new(Arc::clone(disk), Arc::clone(&attributes), directory_of(&info)?);
    let prepared = Prepared::other(Arc::new(handler), transport)?;
    Ok(Prepared { attributes: Some(attributes), ..prepared })
}

impl Prepared {
    /// Prepares a file system that is not a disk, to be served in the same way. The benchmark uses
    /// it to measure the cost of a transport alone.
    ///
    /// # Errors
    /// The transport is not available.
    pub fn other(file_system: Arc<dyn FileSystem>, transport: Transport) -> Result<Prepared> {
        let transport = ring::Rings::wanted(transport)?;
        Ok(Prepared { transport, file_system, attributes: None })
    }

    /// Returns the attributes that stat(2) is going to show, for a process that takes the session
    /// over. `None` for a file system that is not a disk.
    pub fn attributes(&self) -> Option<ShownAttributes> {
        self.attributes.as_ref().map(|attributes| attributes.shown())
    }

    /// Calls `listener` for each later chmod, chown and utimensat, with the attributes after it and
    /// before the client gets its answer. Writes change two of the times without a call.
    ///
    /// The listener runs on a thread that serves requests, under the lock of the attributes: it
    /// must not wait for a request, and may take only locks that are held for a short time. Only
    /// the first listener counts. A file system that is not a disk never calls it.
    pub fn on_attributes(&self, listener: impl Fn(&ShownAttributes) + Send + Sync + 'static) {
        if let Some(attributes) = &self.attributes {
            attributes.tell(listener);
        }
    }

    /// Shows what an earlier process has shown, instead of what follows from [`ShownAs`]: the last
    /// attributes that its listener got, or those that it had at first. If the overlay was written
    /// after that, its own time counts as the last write.
    pub fn show(&self, shown: &ShownAttributes) {
        if let Some(attributes) = &self.attributes {
            attributes.restore(shown);
        }
    }

    /// Answers the kernel's INIT over `device`, the open /dev/fuse of the mount, and opens all
    /// further descriptors of the session. No request is read before [`Connected::serve`], so the
    /// caller can give duplicates of the descriptors to a keeper in between.
    ///
    /// # Errors
    /// The kernel uses another FUSE protocol, or the disk was unmounted.
    pub fn connect(self, device: OwnedFd) -> Result<Connected> {
        Connected::connect(self.file_system, device, self.transport)
    }

    /// Continues the session of a process that was killed. `devices` are duplicates of all that
    /// [`Connected::devices`] returned there, in the same order, `shared_memory` is a duplicate of
    /// [`Connected::shared_memory`], and `negotiated` is what [`Connected::negotiated`] returned.
    /// The kernel sends no INIT again. Nothing is changed before [`Connected::serve`].
    ///
    /// If requests come over io_uring ([`Negotiated::over_io_uring`]), this value must have been
    /// prepared with [`Transport::UringAgain`]. The other process must have ended, with all of its
    /// threads, before this call.
    ///
    /// The file system must have the content that the clients of the dead process were told of.
    ///
    /// A keeper must not have the mounted file open when it starts the process that calls this: the
    /// new process inherits the file until execve(2) closes it, and that close sends FUSE_FLUSH and
    /// waits, uninterruptibly, for an answer that only the new process could give (observed on
    /// Linux 6.18; an abort of the connection, umount2(2) with MNT_FORCE, ends the wait).
    ///
    /// # Errors
    /// `devices` is empty, or [`Negotiated::check_takeover`] fails, or there are no rings or no
    /// memory that fit. `devices` are then closed,
    /// which does not affect the mount as long as a keeper holds duplicates.
    pub fn take_over(
        self,
        devices: Vec<OwnedFd>,
        shared_memory: Option<OwnedFd>,
        negotiated: &Negotiated,
    ) -> Result<Connected> {
        let Prepared { file_system, transport, .. } = self;
        Connected::take_over(file_system, transport, devices, shared_memory, negotiated.clone())
    }

    /// [`Prepared::connect`] and [`Connected::serve`] in one, for a session without a keeper.
    ///
    /// # Errors
    /// The kernel uses another FUSE protocol, or the system has no more threads.
    pub fn serve(self, device: OwnedFd) -> Result<Mounted> {
        self.connect(device)?.serve()
    }
}

fn new_attributes(info: &DiskInfo, shown: ShownAs) -> attributes::Attributes {
    let modified = std::fs::metadata(&info.path)
        .and_then(|file| file.modified())
        .unwrap_or_else(|_| SystemTime::now());
    let ShownAs { uid, gid, mode, allow_other, read_only } = shown;
    let mut attributes = attributes::Attributes::new(uid, gid, modified, allow_other, read_only);
    if let Some(mode) = mode {
        attributes.set_mode(mode);
    }
    attributes
}

/// Opens the directory of the overlay.
fn directory_of(info: &DiskInfo) -> Result<OwnedFd> {
    let directory = info.path.parent().unwrap_or(Path::new("/"));
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    rustix::fs::open(directory, flags, Mode::empty())
        .map_err(io::Error::from)
        .context(|| info.path.display().to_string())
}

impl Mounted {
    /// Returns a handle for the code that changes the size of the disk.
    pub fn size_notice(&self) -> SizeNotice {
        SizeNotice { notifier: self.notifier.clone() }
    }

    /// Returns a handle for threads that check whether requests are answered.
    pub fn pulse(&self) -> Pulse {
        self.pulse.clone()
    }

    /// Makes the kernel send all pages that programs have dirtied through shared mappings of the
    /// disk. Call it before a flush that must cover these pages, while requests are still served.
    /// Waits at most for `timeout`: a write to a cluster whose backing file hangs does not return.
    /// Such a write is answered later, or ended together with the session.
    pub fn write_mapped_pages(&self, timeout: Duration) -> MappedPages {
        let notifier = self.notifier.clone();
        let (written, answer) = crossbeam_channel::bounded(1);
        let thread =
            std::thread::Builder::new().name("mapped-pages".to_string()).spawn(move || {
                let _ = written.send(notifier.write_mapped_pages());
            });
        match thread.map(|_detached| answer.recv_timeout(timeout)) {
            Ok(Ok(Ok(()))) => MappedPages::Written,
            // The session has ended, so the mappings no longer exist.
            Ok(Ok(Err(error))) => {
                log::debug!("writing mapped pages: {error}");
                MappedPages::Written
            }
            Ok(Err(_)) | Err(_) => MappedPages::Unknown,
        }
    }

    /// Yields one result. `Ok`: the kernel has ended the session, because the disk is unmounted and
    /// no process has it open. `Err`: a serving thread has failed, and requests may wait for it for
    /// ever unless the disk is detached.
    pub fn ended(&self) -> &Receiver<Result<()>> {
        &self.session
    }

    /// Waits until [`Mounted::ended`] has a result, at most for `timeout`. Returns whether it has
    /// one.
    pub fn ends_within(&self, timeout: Duration) -> bool {
        let mut select = crossbeam_channel::Select::new();
        select.recv(&self.session);
        select.ready_timeout(timeout).is_ok()
    }

    /// Prepares the end of this process while the disk stays mounted, so that another process
    /// continues the session with [`Prepared::take_over`]. The caller must exit afterwards, because
    /// requests over io_uring are not served any more: what comes waits for the other process.
    ///
    /// The end of a process kills its threads. If the kernel is just copying a request over
    /// io_uring into memory that is not resident, that request and others fail. So the threads of
    /// io_uring hand in the answers that they have, and end by themselves; this function waits for
    /// that at most for `patience`, and a server that hangs in a read of a file makes it wait that
    /// long. Requests over /dev/fuse are served to the end, and sent again by the kernel.
    ///
    /// Returns whether the threads have ended.
    pub fn leave(&self, patience: Duration) -> bool {
        self.rings.as_ref().is_none_or(|rings| rings.leave(patience))
    }

    /// Waits after the unmount until no request is running, at most five seconds.
    pub fn finish(self) -> Finished {
        let deadline = std::time::Instant::now() + FINISH_TIMEOUT;
        // Disconnected: the result of the session was already taken from `ended`.
        let session =
            !matches!(self.session.recv_deadline(deadline), Err(RecvTimeoutError::Timeout));
        let workers =
            !matches!(self.workers.recv_deadline(deadline), Err(RecvTimeoutError::Timeout));
        if session && workers { Finished::Quiet } else { Finished::StillRunning }
    }
}
