//! The mount: the disk as one regular file AT the mountpoint. Kernel requests become calls of [`Disk`].
//!
//! ```text
//!  kernel ── /dev/fuse ── session (2 threads) ──▶ handler ──▶ Disk::read_local, write_local      a hit: answered where it arrived
//!                            │                                                                   miss:
//!                            └── workers ── 16 miss threads ──▶ handler ──▶ Disk::read, write, discard, seek
//!                                       └── 1 flush thread  ──▶ handler ──▶ Disk::flush
//! ```
//!
//! The files are opened for direct I/O: every write is acknowledged by us, nothing is cached in the kernel (shared mappings excepted,
//! which Linux offers since 6.6). Writeback caching does not work with a file as mountpoint and is never asked for (data-safety 0.7).
//!
//! **Touches:** /dev/fuse, mount(2), umount(2), fusermount3, the mountpoint, /proc/self/mountinfo; [`Disk`] for everything else.
//! **Never:** knows jobs, QMP or qcow2; opens or stats its own mounted file (it would wait for itself, H29); waits on a session thread;
//! answers ENOSYS to fsync or flush; leaves a mount or a placeholder behind, except when the process is killed.
//! **Locks:** one leaf lock, permissions and owner in `attributes`. Requests are ordered by `Disk`, not here.
//! **Invariants:** `Disk` sees only ranges that lie on it; a reply is sent exactly once, by the thread that has the answer;
//! every change counts as written before it is answered, so that a close after it flushes.

mod attach;
mod attributes;
mod handler;
mod log_limit;
mod mountinfo;
mod mountpoint;
mod ring;
mod session;
mod wire;
mod workers;

use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use crossbeam_channel::{Receiver, RecvTimeoutError};
use rustix::fs::{Mode, OFlags};

pub use attach::Unmounted;
pub use attributes::{Changes, Owner, TimeChange, Times};
pub use handler::{Answer, Durability, Handler, Stat, Truncate, errno};

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
}

/// A mounted disk. Dropping it detaches the mount and removes the placeholder.
#[derive(Debug)]
pub struct Mounted {
    session: Receiver<io::Result<()>>,
    workers: workers::Ended,
    notifier: fuser::Notifier,
    // Dropped in this order: first the mount, then the placeholder below it.
    attachment: attach::Attachment,
    mountpoint: mountpoint::Mountpoint,
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

/// Whether requests can still be running after [`Mounted::finish`].
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Finished {
    /// All requests have been answered and no more come.
    Quiet,
    /// Something hangs, or the kernel still sends requests.
    StillRunning,
}

/// Mounts `disk` and starts to serve it.
///
/// # Errors
/// Everything that is wrong with the mountpoint, /dev/fuse or the mount, on one line. Nothing stays mounted or created then.
pub fn mount(disk: &Arc<Disk>, options: &MountOptions) -> Result<Mounted> {
    let info = disk.info()?;
    let device = attach::open_device()?;
    let handler = Arc::new(new_handler(disk, &info, options.allow_other)?);
    let mountpoint = mountpoint::Mountpoint::prepare(&options.mountpoint, &files_of(&info)?)?;
    let how = attach::Options { source: &info.path, read_only: info.read_only, allow_other: options.allow_other };
    let (device, attachment) = attach::attach(device, &mountpoint, &how)?;
    mountpoint.hide();
    let running = session::start(handler, device, options.transport)?;
    Ok(Mounted { session: running.session, workers: running.workers, notifier: running.notifier, attachment, mountpoint })
}

/// Everything that needs a path is looked up here, before the mount.
fn new_handler(disk: &Arc<Disk>, info: &DiskInfo, allow_other: bool) -> Result<Handler> {
    let what = || info.path.display().to_string();
    let modified = std::fs::metadata(&info.path).and_then(|file| file.modified()).unwrap_or_else(|_| SystemTime::now());
    let (uid, gid) = (rustix::process::getuid().as_raw(), rustix::process::getgid().as_raw());
    let attributes = attributes::Attributes::new(uid, gid, modified, allow_other, info.read_only);
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
    /// The mountpoint: absolute, without symbolic links.
    pub fn path(&self) -> &Path {
        self.mountpoint.path()
    }

    /// For whoever changes the size of the disk.
    pub fn size_notice(&self) -> SizeNotice {
        SizeNotice { notifier: self.notifier.clone() }
    }

    /// Yields once, when the kernel has ended the session: the disk is unmounted, by whomever, and nobody has it open any more.
    /// An error is one of reading /dev/fuse.
    pub fn ended(&self) -> &Receiver<io::Result<()>> {
        &self.session
    }

    /// Whether [`Mounted::ended`] has something to yield, waiting for it at most so long.
    pub fn ends_within(&self, timeout: Duration) -> bool {
        let mut select = crossbeam_channel::Select::new();
        select.recv(&self.session);
        select.ready_timeout(timeout).is_ok()
    }

    /// Unmounts unless somebody has the disk open. The session ends a moment later.
    ///
    /// # Errors
    /// Neither done nor busy: it is still mounted and served.
    pub fn unmount(&self) -> Result<Unmounted> {
        self.attachment.unmount()
    }

    /// Takes the disk away from whoever has it open: their requests fail with ENOTCONN from now on, and the session ends.
    ///
    /// # Errors
    /// It is still mounted.
    pub fn detach(&self) -> Result<()> {
        self.attachment.detach()
    }

    /// After the unmount: waits until no request is running, at most five seconds, and removes the placeholder.
    pub fn finish(self) -> Finished {
        let deadline = std::time::Instant::now() + FINISH_TIMEOUT;
        // Disconnected: the result of the session was taken from `ended` before.
        let session = !matches!(self.session.recv_deadline(deadline), Err(RecvTimeoutError::Timeout));
        let workers = !matches!(self.workers.recv_deadline(deadline), Err(RecvTimeoutError::Timeout));
        if session && workers { Finished::Quiet } else { Finished::StillRunning }
    }
}
