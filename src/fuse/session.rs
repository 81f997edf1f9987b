//! Transport 1: fuser session threads that read /dev/fuse. Converts between fuser's types and [`FileSystem`]'s and decides which thread
//! does the work; nothing else.

use std::ffi::OsStr;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, SystemTime};

use crossbeam_channel::Receiver;
use crossbeam_queue::ArrayQueue;
use fuser::{
    AccessFlags, BsdFileFlags, CopyFileRangeFlags, Errno, FileAttr, FileHandle, FileType, Filesystem, FopenFlags, INodeNo, InitFlags,
    IoctlFlags, KernelConfig, LockOwner, Notifier, OpenFlags, PollEvents, PollFlags, PollNotifier, ReplyAttr, ReplyBmap, ReplyData,
    ReplyEmpty, ReplyEntry, ReplyIoctl, ReplyLseek, ReplyOpen, ReplyPoll, ReplyStatfs, ReplyWrite, ReplyXattr, Request, Session,
    SessionACL, TimeOrNow, WriteFlags,
};

use super::attach::DEVICE;
use super::attributes::{Changes, TimeChange};
use super::file_system::FileSystem;
use super::handler::{Answer, Durability, Stat, Truncate};
use super::ring::Wanted;
use super::workers::{Ended, Workers};
use crate::Result;
use crate::error::Context;

/// Threads that read requests and answer hits. More than this many cost latency at depth 1 on two cores (performance.md).
const SESSION_THREADS: usize = 2;

/// Largest read or write request: 256 pages, the kernel's own limit (`fs.fuse.max_pages_limit`).
pub(super) const MAX_IO: usize = 1 << 20;

/// Asynchronous requests that the kernel hands us at once; the rest waits in the kernel. Twice the depth at which the transport saturates.
const MAX_BACKGROUND: u16 = 64;

/// Direct: every write is acknowledged by us, and no copy of the disk grows stale in the kernel. Parallel direct writes: the kernel takes the inode lock
/// shared for writes that do not extend the file, and ours never do.
pub(super) const OPEN_FLAGS: FopenFlags = FopenFlags::FOPEN_DIRECT_IO.union(FopenFlags::FOPEN_PARALLEL_DIRECT_WRITES);

/// How long the kernel may show attributes without asking. It asks anyway after every write (size and times) and setattr; what can be
/// stale this long is `st_blocks`, while a stream or copy-on-read fills the overlay.
pub(super) const ATTR_TTL: Duration = Duration::from_secs(1);

/// A running session.
pub(super) struct Running {
    /// Yields once, when the kernel has ended the session: unmounted, and the last user gone.
    pub(super) session: Receiver<io::Result<()>>,
    /// Disconnected when all workers have answered what was queued, which can only be after the session has ended.
    pub(super) workers: Ended,
    /// The way to tell the kernel something unasked.
    pub(super) notifier: Notifier,
}

/// Answers the kernel's INIT and starts to serve `device`, an open /dev/fuse that is mounted.
///
/// # Errors
/// The kernel speaks another protocol; no more threads.
pub(super) fn start(file_system: Arc<dyn FileSystem>, device: OwnedFd, transport: Wanted) -> Result<Running> {
    let (workers, workers_ended) = Workers::start(&file_system)?;
    let over_rings = Arc::new(AtomicBool::new(matches!(transport, Wanted::Rings(_))));
    let adapter = Adapter {
        file_system: Arc::clone(&file_system),
        workers: workers.clone(),
        buffers: ArrayQueue::new(SESSION_THREADS),
        over_rings: Arc::clone(&over_rings),
    };
    let mut config = fuser::Config::default();
    config.n_threads = Some(SESSION_THREADS);
    // A descriptor for each thread saves them a lock in the kernel. fuser opens /dev/fuse for it, by name; where that is not allowed here (another
    // user, a kernel without Landlock), they share one.
    config.clone_fd = File::options().read(true).write(true).open(DEVICE).is_ok();
    // Who may open the disk is the kernel's check (`allow_other`, `default_permissions`). fuser's own comes later and would fail the
    // close of a descriptor that was passed to another user.
    let session = Session::from_fd(adapter, device, SessionACL::All, config).context(|| "FUSE handshake")?;
    match transport {
        Wanted::Rings(rings) if over_rings.load(Ordering::Acquire) => rings.serve(session.as_fd(), &file_system, &workers)?,
        Wanted::Rings(_) => log::info!("requests come over /dev/fuse: this kernel does not offer FUSE over io_uring"),
        Wanted::DeviceFor(reason) => log::info!("requests come over /dev/fuse: {reason}"),
        Wanted::Device => {}
    }
    let notifier = session.notifier();
    let (ended, session_ended) = crossbeam_channel::bounded(1);
    thread::Builder::new()
        .name("session".to_string())
        .spawn(move || {
            let _ = ended.send(session.run());
        })
        .context(|| "starting the session thread")?;
    Ok(Running { session: session_ended, workers: workers_ended, notifier })
}

/// Makes the kernel know that the disk has grown to `size` bytes, for those who have it open as well.
///
/// Forgetting its attributes is enough for whoever asks for the size, with stat(2) or lseek(2); a shorter [`ATTR_TTL`] would do that too, at one
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

struct Adapter {
    file_system: Arc<dyn FileSystem>,
    workers: Workers,
    /// Buffers of [`MAX_IO`] bytes for reads on session threads: one each, so that a hit allocates nothing.
    buffers: ArrayQueue<Vec<u8>>,
    /// Requests are to come over io_uring; cleared where the kernel does not offer that.
    over_rings: Arc<AtomicBool>,
}

impl Adapter {
    /// Answers on a miss worker with what `work` returns there.
    fn on_worker<T: 'static>(
        &self,
        work: impl FnOnce(&dyn FileSystem) -> Result<T, rustix::io::Errno> + Send + 'static,
        answer: impl FnOnce(Result<T, rustix::io::Errno>) + Send + 'static,
    ) {
        let file_system = Arc::clone(&self.file_system);
        self.workers.miss(Box::new(move |_buffer| answer(work(&*file_system))));
    }
}

fn wire(errno: rustix::io::Errno) -> Errno {
    Errno::from_i32(errno.raw_os_error())
}

fn empty(result: Result<(), rustix::io::Errno>, reply: ReplyEmpty) {
    match result {
        Ok(()) => reply.ok(),
        Err(errno) => reply.error(wire(errno)),
    }
}

fn written(result: Result<usize, rustix::io::Errno>, reply: ReplyWrite) {
    match result {
        // Never more than the request, whose length is 32 bits wide.
        Ok(len) => reply.written(u32::try_from(len).unwrap_or(u32::MAX)),
        Err(errno) => reply.error(wire(errno)),
    }
}

fn attributes(result: Result<Stat, rustix::io::Errno>, reply: ReplyAttr) {
    match result {
        Ok(stat) => reply.attr(&ATTR_TTL, &file_attr(&stat)),
        Err(errno) => reply.error(wire(errno)),
    }
}

fn file_attr(stat: &Stat) -> FileAttr {
    FileAttr {
        ino: INodeNo::ROOT,
        size: stat.size,
        blocks: stat.blocks,
        atime: stat.times.atime,
        mtime: stat.times.mtime,
        ctime: stat.times.ctime,
        crtime: SystemTime::UNIX_EPOCH,
        kind: FileType::RegularFile,
        perm: stat.owner.mode,
        nlink: 1,
        uid: stat.owner.uid,
        gid: stat.owner.gid,
        rdev: 0,
        blksize: stat.blksize,
        flags: 0,
    }
}

fn time_change(time: TimeOrNow) -> TimeChange {
    match time {
        TimeOrNow::Now => TimeChange::Now,
        TimeOrNow::SpecificTime(at) => TimeChange::At(at),
    }
}

impl Filesystem for Adapter {
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

    fn lookup(&self, _req: &Request, _parent: INodeNo, _name: &OsStr, reply: ReplyEntry) {
        reply.error(Errno::ENOENT);
    }

    fn getattr(&self, _req: &Request, _ino: INodeNo, _fh: Option<FileHandle>, reply: ReplyAttr) {
        attributes(self.file_system.getattr(), reply);
    }

    fn setattr(
        &self,
        _req: &Request,
        _ino: INodeNo,
        mode: Option<u32>,
        uid: Option<u32>,
        gid: Option<u32>,
        size: Option<u64>,
        atime: Option<TimeOrNow>,
        mtime: Option<TimeOrNow>,
        _ctime: Option<SystemTime>,
        fh: Option<FileHandle>,
        _crtime: Option<SystemTime>,
        _chgtime: Option<SystemTime>,
        _bkuptime: Option<SystemTime>,
        _flags: Option<BsdFileFlags>,
        reply: ReplyAttr,
    ) {
        // fuser 0.18 panics before it calls this where a time is i64::MIN seconds (`system_time_from_time`). Whoever may set times here
        // may as well kill the daemon, so that is left to fuser.
        let changes = Changes { mode, uid, gid, atime: atime.map(time_change), mtime: mtime.map(time_change) };
        let truncate = size.map(|size| if fh.is_some() { Truncate::ByHandle(size) } else { Truncate::ByPath(size) });
        attributes(self.file_system.setattr(truncate, &changes), reply);
    }

    fn open(&self, _req: &Request, _ino: INodeNo, flags: OpenFlags, reply: ReplyOpen) {
        match self.file_system.open(flags.0) {
            Ok(()) => reply.opened(FileHandle(0), OPEN_FLAGS),
            Err(errno) => reply.error(wire(errno)),
        }
    }

    fn read(
        &self,
        _req: &Request,
        _ino: INodeNo,
        _fh: FileHandle,
        offset: u64,
        size: u32,
        _flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        reply: ReplyData,
    ) {
        // A kernel that asked for more than was negotiated would get a short read.
        let len = (size as usize).min(MAX_IO);
        let mut buffer = self.buffers.pop().unwrap_or_else(|| vec![0; MAX_IO]);
        match self.file_system.read_local(offset, &mut buffer[..len]) {
            Ok(Answer::Done(len)) => reply.data(&buffer[..len]),
            Ok(Answer::Miss) => {
                let mut reply = Some(reply);
                let mut answer = move |answer: Result<&[u8], _>| match (reply.take(), answer) {
                    (Some(reply), Ok(bytes)) => reply.data(bytes),
                    (Some(reply), Err(errno)) => reply.error(wire(errno)),
                    (None, _) => {}
                };
                if self.file_system.read_cached(offset, &mut buffer[..len], &mut answer) == Answer::Miss {
                    let file_system = Arc::clone(&self.file_system);
                    self.workers.miss(Box::new(move |buffer| file_system.read(offset, buffer.first(len), &mut answer)));
                }
            }
            Err(errno) => reply.error(wire(errno)),
        }
        // Full only if fuser ran more threads than asked for.
        let _ = self.buffers.push(buffer);
    }

    fn write(
        &self,
        _req: &Request,
        _ino: INodeNo,
        _fh: FileHandle,
        offset: u64,
        data: &[u8],
        _write_flags: WriteFlags,
        flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        let durability = Durability::of_write(flags.0);
        match self.file_system.write_local(offset, data) {
            Ok(Answer::Done(len)) if durability == Durability::Now => {
                self.workers.flush(Box::new(move |flushed| written(flushed.map(|()| len), reply)));
            }
            Ok(Answer::Done(len)) => written(Ok(len), reply),
            Ok(Answer::Miss) => {
                let data = data.to_vec();
                self.on_worker(move |file_system| file_system.write(offset, &data, durability), move |result| written(result, reply));
            }
            Err(errno) => reply.error(wire(errno)),
        }
    }

    fn flush(&self, _req: &Request, _ino: INodeNo, _fh: FileHandle, _lock_owner: LockOwner, reply: ReplyEmpty) {
        if self.file_system.needs_flush() {
            self.workers.flush(Box::new(move |flushed| empty(flushed, reply)));
        } else {
            reply.ok();
        }
    }

    fn fsync(&self, _req: &Request, _ino: INodeNo, _fh: FileHandle, _datasync: bool, reply: ReplyEmpty) {
        self.workers.flush(Box::new(move |flushed| empty(flushed, reply)));
    }

    fn fallocate(&self, _req: &Request, _ino: INodeNo, _fh: FileHandle, offset: u64, length: u64, mode: i32, reply: ReplyEmpty) {
        self.on_worker(move |file_system| file_system.fallocate(offset, length, mode), move |result| empty(result, reply));
    }

    fn lseek(&self, _req: &Request, _ino: INodeNo, _fh: FileHandle, offset: i64, whence: i32, reply: ReplyLseek) {
        self.on_worker(
            move |file_system| file_system.lseek(offset, whence),
            move |result| match result {
                Ok(found) => reply.offset(found),
                Err(errno) => reply.error(wire(errno)),
            },
        );
    }

    fn statfs(&self, _req: &Request, _ino: INodeNo, reply: ReplyStatfs) {
        match self.file_system.statfs() {
            Ok(host) => reply.statfs(
                host.f_blocks,
                host.f_bfree,
                host.f_bavail,
                host.f_files,
                host.f_ffree,
                u32::try_from(host.f_bsize).unwrap_or(u32::MAX),
                u32::try_from(host.f_namemax).unwrap_or(u32::MAX),
                u32::try_from(host.f_frsize).unwrap_or(u32::MAX),
            ),
            Err(errno) => reply.error(wire(errno)),
        }
    }

    // What follows is refused. fuser's own bodies would refuse it too, with a warning in the log each time; ENOSYS makes the kernel
    // remember the answer, which is wanted here: it asks for `security.capability` before every write otherwise.

    fn getxattr(&self, _req: &Request, _ino: INodeNo, _name: &OsStr, _size: u32, reply: ReplyXattr) {
        reply.error(Errno::ENOSYS);
    }

    fn listxattr(&self, _req: &Request, _ino: INodeNo, _size: u32, reply: ReplyXattr) {
        reply.error(Errno::ENOSYS);
    }

    fn setxattr(&self, _req: &Request, _ino: INodeNo, _name: &OsStr, _value: &[u8], _flags: i32, _position: u32, reply: ReplyEmpty) {
        reply.error(Errno::ENOSYS);
    }

    fn removexattr(&self, _req: &Request, _ino: INodeNo, _name: &OsStr, reply: ReplyEmpty) {
        reply.error(Errno::ENOSYS);
    }

    fn access(&self, _req: &Request, _ino: INodeNo, _mask: AccessFlags, reply: ReplyEmpty) {
        reply.error(Errno::ENOSYS);
    }

    fn bmap(&self, _req: &Request, _ino: INodeNo, _blocksize: u32, _idx: u64, reply: ReplyBmap) {
        reply.error(Errno::ENOSYS);
    }

    fn ioctl(
        &self,
        _req: &Request,
        _ino: INodeNo,
        _fh: FileHandle,
        _flags: IoctlFlags,
        _cmd: u32,
        _in_data: &[u8],
        _out_size: u32,
        reply: ReplyIoctl,
    ) {
        reply.error(Errno::ENOTTY);
    }

    fn poll(
        &self,
        _req: &Request,
        _ino: INodeNo,
        _fh: FileHandle,
        _ph: PollNotifier,
        _events: PollEvents,
        _flags: PollFlags,
        reply: ReplyPoll,
    ) {
        reply.error(Errno::ENOSYS);
    }

    fn copy_file_range(
        &self,
        _req: &Request,
        _ino_in: INodeNo,
        _fh_in: FileHandle,
        _offset_in: u64,
        _ino_out: INodeNo,
        _fh_out: FileHandle,
        _offset_out: u64,
        _len: u64,
        _flags: CopyFileRangeFlags,
        reply: ReplyWrite,
    ) {
        reply.error(Errno::ENOSYS);
    }
}
