//! The mount: the disk as one regular file AT the mountpoint. Kernel requests become calls of [`Disk`].
//!
//! ```text
//!  kernel ── /dev/fuse ── device (2 threads) ──▶ dispatch ──▶ handler ──▶ Disk::read_local, write_local      a hit
//!        └── io_uring ─── ring (2 per CPU) ────▶    │
//!                                                   └── workers ── miss threads ─▶ handler ──▶ Disk::read, write, …
//!                                                           └── 1 flush thread ──▶ handler ──▶ Disk::flush
//! ```
//!
//! A transport reads requests and writes replies; `wire` knows their bytes; `dispatch` decides which thread does the work. fuser only
//! answers the kernel's INIT and sends notifications.
//!
//! The files are opened for direct I/O: every write is acknowledged by us, nothing is cached in the kernel (shared mappings excepted,
//! which Linux offers since 6.6). Writeback caching does not work with a file as mountpoint and is never asked for (data-safety 0.7).
//!
//! It has two sides, which run in two processes (see `keeper`): the *host side*, [`HostMount`], knows mountpoints and mounts and no disk; the
//! *session*, [`Prepared`] and [`Mounted`], serves the disk and can mount nothing.
//!
//! **Touches:** /dev/fuse, mount(2), umount(2), fusermount3, the mountpoint, /proc/self/mountinfo; [`Disk`] for everything else.
//! **Never:** knows jobs, QMP or qcow2; opens or stats its own mounted file (it would wait for itself, H29); waits on a session thread;
//! answers ENOSYS to fsync or flush; leaves a mount or a placeholder behind, except when the process is killed.
//! **Locks:** one leaf lock, permissions and owner in `attributes`. Requests are ordered by `Disk`, not here.
//! **Invariants:** `Disk` sees only ranges that lie on it; a reply is sent exactly once, by the thread that has the answer;
//! every change counts as written before it is answered, so that a close after it flushes.

mod attach;
mod attributes;
mod device;
mod dispatch;
mod file_system;
mod handler;
mod host;
mod log_limit;
mod mountinfo;
mod mountpoint;
mod outside;
mod pulse;
mod ring;
mod session;
mod stale;
mod wire;
mod workers;

use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use crossbeam_channel::{Receiver, RecvTimeoutError};
use rustix::fs::{Mode, OFlags};

pub use attach::Unmounted;
pub use attributes::{Changes, Owner, TimeChange, Times};
pub use file_system::{FileSystem, ReadAnswer};
pub use handler::{Answer, Durability, Handler, Stat, Truncate, errno};
pub use host::{HostMount, MountPlan};
pub use outside::{Life, SeenMount, detach, life_of, mounts, other_namespaces, remove_placeholder, unmount};
pub use pulse::Pulse;

use crate::Result;
use crate::disk::{Disk, DiskInfo};
use crate::error::Context;

/// How long [`Mounted::finish`] waits for the session and for requests that are being worked on. Longer than a healthy disk needs;
/// a backing file that hangs must not keep the process for ever.
const FINISH_TIMEOUT: Duration = Duration::from_secs(5);

/// How requests come from the kernel.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub enum Transport {
    /// io_uring where the kernel offers it, /dev/fuse otherwise.
    #[default]
    Auto,
    /// /dev/fuse.
    Dev,
    /// io_uring, or not at all.
    Uring,
}

/// How to mount.
#[derive(Clone, Debug)]
pub struct MountOptions {
    /// How requests come from the kernel.
    pub transport: Transport,
    /// A regular file, or a name that does not exist.
    pub mountpoint: PathBuf,
    /// Other users may open the disk, as far as its mode and owner allow.
    pub allow_other: bool,
    /// User id of the owner of the disk.
    pub uid: u32,
    /// Its group id.
    pub gid: u32,
    /// Permissions and owner of the disk's file, where they are not those of `uid` and `gid`.
    pub shown: ShownAs,
    /// Every write is durable when it returns (mount(8): `sync`).
    pub sync: bool,
}

/// What stat(2) shows of the disk's file.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct ShownAs {
    /// User id and group id of its owner.
    pub owner: Option<(u32, u32)>,
    /// Permission bits.
    pub mode: Option<u16>,
}

/// A disk with all that is needed to serve it: after this no path is looked up any more.
#[derive(Debug)]
pub struct Prepared {
    transport: ring::Wanted,
    file_system: Arc<dyn FileSystem>,
    plan: MountPlan,
}

/// A mounted disk, being served. It ends when the disk is unmounted, whoever does that.
#[derive(Debug)]
pub struct Mounted {
    session: Receiver<Result<()>>,
    workers: workers::Ended,
    notifier: fuser::Notifier,
    pulse: Pulse,
}

/// Tells the kernel that the size of a mounted disk has changed.
#[derive(Clone, Debug)]
pub struct SizeNotice {
    notifier: fuser::Notifier,
}

impl SizeNotice {
    /// From here on the kernel shows `size`, to those who have the disk open as well. For growth only; to be called by no session thread.
    pub fn send(&self, size: u64) {
        if let Err(error) = session::tell_size(&self.notifier, size) {
            log::warn!("telling the kernel of the new size: {error}");
        }
    }
}

/// Whether the kernel holds pages of shared mappings still that were dirty before
/// [`Mounted::write_mapped_pages`].
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum MappedPages {
    /// None: all were sent and answered.
    Written,
    /// Perhaps: a write did not return in time.
    Unknown,
}

/// Whether requests can still be running after [`Mounted::finish`].
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Finished {
    /// All requests have been answered and no more come.
    Quiet,
    /// Something hangs, or the kernel still sends requests.
    StillRunning,
}

/// Any bytes as a request from /dev/fuse.
///
/// # Panics
/// They are taken for something they are not.
#[cfg(fuzzing)]
pub fn any_request(bytes: &[u8]) {
    wire::any_bytes(bytes);
}

/// Looks up everything about `disk` that needs a path. Nothing is mounted yet: that is done with [`Prepared::plan`].
///
/// # Errors
/// The overlay or a backing file is no longer where it was.
pub fn prepare(disk: &Arc<Disk>, options: MountOptions) -> Result<Prepared> {
    let info = disk.info()?;
    let handler = Arc::new(new_handler(disk, &info, &options)?);
    let plan = MountPlan {
        mountpoint: options.mountpoint,
        taken: files_of(&info)?,
        source: info.path,
        read_only: info.read_only,
        allow_other: options.allow_other,
        uid: options.uid,
        gid: options.gid,
        sync: options.sync,
    };
    Prepared::other(handler, plan, options.transport)
}

impl Prepared {
    /// Something that is no disk, to be mounted in the same way: the benchmark's measure of what a transport costs by itself.
    ///
    /// # Errors
    /// The transport cannot be had.
    pub fn other(file_system: Arc<dyn FileSystem>, plan: MountPlan, transport: Transport) -> Result<Prepared> {
        Ok(Prepared { transport: ring::Rings::wanted(transport)?, file_system, plan })
    }

    /// What is to be mounted, and where, for [`HostMount::mount`].
    pub fn plan(&self) -> &MountPlan {
        &self.plan
    }

    /// Starts the threads that serve `device`, the open /dev/fuse of the mount.
    ///
    /// # Errors
    /// The kernel speaks another protocol; no more threads.
    pub fn serve(self, device: OwnedFd) -> Result<Mounted> {
        let running = session::start(self.file_system, device, self.transport)?;
        Ok(Mounted { session: running.session, workers: running.workers, notifier: running.notifier, pulse: running.pulse })
    }
}

fn new_handler(disk: &Arc<Disk>, info: &DiskInfo, options: &MountOptions) -> Result<Handler> {
    let what = || info.path.display().to_string();
    let modified = std::fs::metadata(&info.path).and_then(|file| file.modified()).unwrap_or_else(|_| SystemTime::now());
    let (uid, gid) = options.shown.owner.unwrap_or((options.uid, options.gid));
    let mut attributes = attributes::Attributes::new(uid, gid, modified, options.allow_other, info.read_only);
    if let Some(mode) = options.shown.mode {
        attributes.set_mode(mode);
    }
    let directory = info.path.parent().unwrap_or(Path::new("/"));
    let directory = rustix::fs::open(directory, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())
        .map_err(io::Error::from)
        .context(what)?;
    Ok(Handler::new(Arc::clone(disk), attributes, directory))
}

/// (device, inode) of the image and its backing files: what must not be the mountpoint.
fn files_of(info: &DiskInfo) -> Result<Vec<(u64, u64)>> {
    let paths = std::iter::once(&info.path).chain(info.backing.iter().map(|layer| &layer.path));
    paths.map(|path| path.metadata().map(|file| (file.dev(), file.ino())).context(|| path.display().to_string())).collect()
}

impl Mounted {
    /// For whoever changes the size of the disk.
    pub fn size_notice(&self) -> SizeNotice {
        SizeNotice { notifier: self.notifier.clone() }
    }

    /// For threads that want to know whether requests are answered.
    pub fn pulse(&self) -> Pulse {
        self.pulse.clone()
    }

    /// Makes the kernel send the pages that programs have dirtied through shared mappings of the
    /// disk: to be called before a flush that must cover them, while requests are served. Waits at
    /// most for `timeout`: a write to a cluster whose backing file hangs does not return, and is
    /// answered or ended with the session.
    pub fn write_mapped_pages(&self, timeout: Duration) -> MappedPages {
        let notifier = self.notifier.clone();
        let (written, answer) = crossbeam_channel::bounded(1);
        let thread = std::thread::Builder::new().name("mapped-pages".to_string()).spawn(move || {
            let _ = written.send(session::write_mapped_pages(&notifier));
        });
        match thread.map(|_detached| answer.recv_timeout(timeout)) {
            Ok(Ok(Ok(()))) => MappedPages::Written,
            // The session has ended: so have the mappings.
            Ok(Ok(Err(error))) => {
                log::debug!("writing mapped pages: {error}");
                MappedPages::Written
            }
            Ok(Err(_)) | Err(_) => MappedPages::Unknown,
        }
    }

    /// Yields once. Well: the kernel has ended the session, since the disk is unmounted and no process has it open any more.
    /// An error: a thread that serves has failed, and requests may wait for it for ever unless the disk is detached.
    pub fn ended(&self) -> &Receiver<Result<()>> {
        &self.session
    }

    /// Whether [`Mounted::ended`] has something to yield, waiting for it at most so long.
    pub fn ends_within(&self, timeout: Duration) -> bool {
        let mut select = crossbeam_channel::Select::new();
        select.recv(&self.session);
        select.ready_timeout(timeout).is_ok()
    }

    /// After the unmount: waits until no request is running, at most five seconds.
    pub fn finish(self) -> Finished {
        let deadline = std::time::Instant::now() + FINISH_TIMEOUT;
        // Disconnected: the result of the session was taken from `ended` before.
        let session = !matches!(self.session.recv_deadline(deadline), Err(RecvTimeoutError::Timeout));
        let workers = !matches!(self.workers.recv_deadline(deadline), Err(RecvTimeoutError::Timeout));
        if session && workers { Finished::Quiet } else { Finished::StillRunning }
    }
}
