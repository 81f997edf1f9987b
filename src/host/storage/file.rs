//! The implementation of the storage traits by a host file or block device.

use std::fs::{File, OpenOptions};
use std::io::{self, IoSliceMut, Seek, SeekFrom};
use std::num::NonZeroU64;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use reflink_copy::ReflinkBlockBuilder;
use rustix::fs::{
    Advice, AtFlags, CWD, FallocateFlags, FileType, Mode, OFlags, ResolveFlags, StatxFlags,
    XattrFlags,
};
use rustix::io::{Errno, ReadWriteFlags, retry_on_intr};

use super::{
    Ask, BlockStatus, CloneSource, FileId, HostSpace, OpenMark, ReadAt, Sidecar, Storage, Version,
    WriteKind, holders, locks,
};
use crate::attributes::{
    BASE_NOTE, LONGEST_BASE_NOTE, LONGEST_STREAM_NOTE, OPEN_MARK, STREAM_NOTE,
};
use crate::background;
use crate::error::{Context, InUse};
use crate::mutants::{Step, without};
use crate::{Error, ErrorKind};
use ext4::Ahead;

mod change;
mod ext4;

/// Unit of `st_blocks` in stat(2), in bytes, whatever the block size of the device.
const STAT_BLOCK: u64 = 512;
/// Mode of a new image before the umask. As with qemu-img, other users may not write it.
const NEW_FILE_MODE: u32 = 0o644;

/// How often a path walk that a rename disturbed is tried again.
const OPEN_TRIES: u32 = 128;
/// File system types of statfs(2) for XFS and btrfs. On these fdatasync(2) is known to make a clone
/// durable, and a source range outside the file is refused before the destination is looked at. On
/// a network file system both depend on the server.
const SHARING: [u64; 2] = [0x5846_5342, 0x9123_683e];
/// An offset past the end of any file. It is odd, so it is not aligned to a block either.
const NO_OFFSET: u64 = i64::MAX as u64 - 1024;
/// File system types of statfs(2) for /proc and /sys (linux/magic.h).
const PROC_SUPER_MAGIC: u64 = 0x9fa0;
const SYSFS_MAGIC: u64 = 0x6265_6572;
const TMPFS_MAGIC: u64 = 0x0102_1994;
/// How an image file is opened, and what is locked against other programs.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Access {
    /// For reading and writing; no other program may write or resize the file.
    ReadWrite,
    /// For reading; no other program may write or resize the file meanwhile.
    ReadOnly,
}

/// A file that is opened once and used by offset only. Dropping it releases its locks.
#[derive(Debug)]
pub struct FileStorage {
    path: PathBuf,
    file: File,
    access: Access,
    identity: (u64, u64),
    /// User id of the owner when the file was opened.
    owner: u32,
    /// In bytes; only grows.
    size: AtomicU64,
    /// The locks are held, so that other programs are excluded.
    locked: AtomicBool,
    /// Set once shrinking was reported, so that it is logged once and not for each request.
    shrinking_reported: AtomicBool,
    /// Another process removes the mark of an open image.
    mark_entrusted: AtomicBool,
    /// Another process has a duplicate of the descriptor, and the locks are its as well.
    is_shared: bool,
    /// Whether this is a regular file and not a block device.
    is_file: bool,
    /// Whether the host records when the file was changed last.
    keeps_time: AtomicBool,
    /// Whether the file is on a tmpfs: the host has all of it in memory, unless it has swapped some
    /// of it out.
    is_in_memory: bool,
    /// Whether this is a regular file on ext4.
    is_on_ext4: bool,
    /// What was allocated ahead of the writes of new clusters.
    ahead: Ahead,
}

impl FileStorage {
    /// Opens and locks a file.
    ///
    /// # Errors
    /// Those of [`FileStorage::open_unlocked`] and [`FileStorage::lock`].
    pub fn open(path: &Path, access: Access) -> crate::Result<Self> {
        let file = Self::open_unlocked(path, access)?;
        file.lock()?;
        Ok(file)
    }

    /// Takes over a file that another process has opened for this `access`, by a duplicate of its
    /// descriptor. Both share one open file, and so its locks, which last as long as the last
    /// duplicate: the drop of this value does not release them.
    ///
    /// # Errors
    /// As [`FileStorage::open`].
    pub fn of_descriptor(path: &Path, access: Access, descriptor: OwnedFd) -> crate::Result<Self> {
        let mut file = Self::from_file(path, access, File::from(descriptor))?;
        file.is_shared = true;
        file.lock()?;
        Ok(file)
    }

    /// Opens a file without a lock, for a caller that first checks its identity, or that reads an
    /// image that another program uses.
    ///
    /// # Errors
    /// Those of open(2); [`ErrorKind::InvalidArgument`] for anything but a regular file or a block
    /// device.
    pub fn open_unlocked(path: &Path, access: Access) -> crate::Result<Self> {
        let mut options = OpenOptions::new();
        options.read(true).write(access == Access::ReadWrite);
        Self::opened(path, access, &mut options)
    }

    /// Opens a file whose name comes from an image, for reading and without a lock. `name` is
    /// relative to `directory`. If that is a directory and not [`CWD`], the file must lie beneath
    /// it, whatever `..` and symbolic links the path contains. `path` becomes the path of the
    /// returned file.
    ///
    /// # Errors
    /// Those of [`FileStorage::open_unlocked`]; EXDEV for a name that leads out of `directory`;
    /// [`ErrorKind::InvalidArgument`] for the links in /proc that stand for open files, and for any
    /// other file in /proc and /sys.
    pub fn open_backing(directory: impl AsFd, name: &Path, path: &Path) -> crate::Result<Self> {
        let context = || path.display().to_string();
        let of_kernel = || {
            Error::new(
                ErrorKind::InvalidArgument,
                format!("{}: what is in /proc or /sys is no backing file", path.display()),
            )
        };
        let beneath = if directory.as_fd().as_raw_fd() == CWD.as_raw_fd() {
            ResolveFlags::empty()
        } else {
            ResolveFlags::BENEATH
        };
        let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK | OFlags::NOCTTY;
        let mut tries = 0;
        let file = loop {
            match rustix::fs::openat2(
                &directory,
                name,
                flags,
                Mode::empty(),
                ResolveFlags::NO_MAGICLINKS | beneath,
            ) {
                Ok(file) => break File::from(file),
                // A rename disturbed the resolution of `..`; the kernel asks the caller to try
                // again.
                Err(Errno::AGAIN) if tries < OPEN_TRIES => tries += 1,
                Err(Errno::INTR) => {}
                // The kernel returns ELOOP both for a magic link and for a loop of links.
                Err(Errno::LOOP) if leads_into_proc(path) => return Err(of_kernel()),
                Err(error) => return Err(Error::io(context(), error.into())),
            }
        };
        let kind = rustix::fs::fstatfs(&file).map_err(io::Error::from).context(context)?;
        if [PROC_SUPER_MAGIC, SYSFS_MAGIC].contains(&(kind.f_type as u64)) {
            return Err(of_kernel());
        }
        Self::from_file(path, Access::ReadOnly, file)
    }

    /// Creates a file that must not exist, opened for reading and writing and locked.
    ///
    /// # Errors
    /// Those of open(2) and of [`FileStorage::lock`].
    pub fn create_new(path: &Path) -> crate::Result<Self> {
        let mut options = OpenOptions::new();
        options.read(true).write(true).create_new(true).mode(NEW_FILE_MODE);
        let file = Self::opened(path, Access::ReadWrite, &mut options)?;
        file.lock()?;
        Ok(file)
    }

    /// Opens a file. O_NONBLOCK makes a FIFO an error instead of a wait. O_NOCTTY keeps a terminal
    /// from becoming the controlling terminal.
    fn opened(path: &Path, access: Access, options: &mut OpenOptions) -> crate::Result<Self> {
        let context = || path.display().to_string();
        let flags = OFlags::NONBLOCK | OFlags::NOCTTY;
        let file = options.custom_flags(flags.bits().cast_signed()).open(path).context(context)?;
        Self::from_file(path, access, file)
    }

    fn from_file(path: &Path, access: Access, mut file: File) -> crate::Result<Self> {
        let context = || path.display().to_string();
        let metadata = file.metadata().context(context)?;
        let kind = metadata.file_type();
        let size = if kind.is_block_device() {
            file.seek(SeekFrom::End(0)).context(context)?
        } else if kind.is_file() {
            metadata.size()
        } else {
            return Err(Error::new(
                ErrorKind::InvalidArgument,
                format!("{}: not a regular file or block device", path.display()),
            ));
        };
        let file_system =
            rustix::fs::fstatfs(&file).map_or(0, |kind| kind.f_type as u64 & 0xffff_ffff);
        let is_on_ext4 = kind.is_file() && ext4::is_ext4(file_system);
        Ok(FileStorage {
            path: path.to_path_buf(),
            file,
            access,
            identity: (metadata.dev(), metadata.ino()),
            owner: metadata.uid(),
            size: AtomicU64::new(size),
            locked: AtomicBool::new(false),
            shrinking_reported: AtomicBool::new(false),
            mark_entrusted: AtomicBool::new(false),
            is_shared: false,
            is_file: kind.is_file(),
            keeps_time: AtomicBool::new(kind.is_file()),
            is_in_memory: file_system == TMPFS_MAGIC,
            is_on_ext4,
            ahead: Ahead::new(is_on_ext4),
        })
    }

    /// Takes the locks that QEMU takes on its images (see `locks.rs`). If the file system has no
    /// locks, logs a warning and continues without them.
    ///
    /// # Errors
    /// [`ErrorKind::Busy`] if another program holds the file; those of fcntl(2).
    pub fn lock(&self) -> crate::Result<()> {
        match locks::take(&self.file, self.access) {
            Ok(()) => {
                self.locked.store(true, Ordering::Relaxed);
                // The previous holder of the lock may have grown the file after it was opened here.
                self.look_at_size()
            }
            Err(locks::LockFailure::Held(lock)) => {
                let in_use = InUse { lock, holder: holders::find(self.identity.1) };
                Err(Error::wrap(ErrorKind::Busy, self.path.display().to_string(), in_use))
            }
            Err(locks::LockFailure::Unsupported(error)) => {
                log::warn!(
                    "{}: cannot be locked here ({}); take care that no other program uses it",
                    self.path.display(),
                    crate::error::os_text(&error)
                );
                Ok(())
            }
            Err(locks::LockFailure::Io(error)) => {
                Err(Error::io(format!("{}: locking", self.path.display()), error))
            }
        }
    }

    fn look_at_size(&self) -> crate::Result<()> {
        let metadata = self.file.metadata().context(|| self.path.display().to_string())?;
        if metadata.is_file() {
            self.size.store(metadata.size(), Ordering::Release);
        }
        Ok(())
    }

    /// Returns the path by which the file was opened.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Returns the device and inode numbers, which identify the file under any name.
    pub fn identity(&self) -> (u64, u64) {
        self.identity
    }

    /// Returns the id of the user that owned the file when it was opened.
    pub fn owner(&self) -> u32 {
        self.owner
    }

    /// Makes the name of a new file durable: fsync(2) of its directory.
    ///
    /// # Errors
    /// Those of open(2) and fsync(2).
    pub fn sync_directory(&self) -> io::Result<()> {
        let directory = self
            .path
            .parent()
            .filter(|parent| !parent.as_os_str().is_empty())
            .unwrap_or(Path::new("."));
        File::open(directory)?.sync_all()
    }

    /// Clones a range with FICLONERANGE, after the source has brought `needed` (offset and length)
    /// into its file.
    fn share(
        &self,
        source: CloneSource<'_>,
        needed: (u64, u64),
        from: u64,
        to: u64,
        len: NonZeroU64,
    ) -> io::Result<()> {
        let mut share = |file: &File| loop {
            match ReflinkBlockBuilder::new(file, &self.file, len)
                .from_offset(from)
                .to_offset(to)
                .reflink_block()
            {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                done => return done,
            }
        };
        match source.of_kind::<FileStorage>() {
            Some(source) => share(&source.file),
            None => source.clone_with(needed.0, needed.1, &mut share),
        }
    }

    /// Opens the file once more, for another process. A duplicated descriptor would keep this
    /// file's locks as long as that process has it.
    fn reopened(&self) -> io::Result<OwnedFd> {
        let file = format!("/proc/self/fd/{}", self.file.as_raw_fd());
        Ok(rustix::fs::open(
            file,
            OFlags::RDONLY | OFlags::NONBLOCK | OFlags::CLOEXEC,
            Mode::empty(),
        )?)
    }

    /// Logs that the file ends before the known size, once, and returns EIO (P9).
    fn shrank(&self, at: u64) -> io::Error {
        if !self.shrinking_reported.swap(true, Ordering::Relaxed) {
            let (path, size) = (self.path.display(), self.size());
            log::error!(
                "{path}: ends at {at} or before, but had {size} bytes: it was truncated while in use"
            );
        }
        Errno::IO.into()
    }
}

/// Returns whether the path leads into /proc, along symbolic links. It only selects the error
/// message.
fn leads_into_proc(path: &Path) -> bool {
    let mut path = path.to_path_buf();
    for _ in 0..OPEN_TRIES {
        let directory = path.parent().unwrap_or(Path::new("/")).to_path_buf();
        if directory.canonicalize().is_ok_and(|real| real.starts_with("/proc")) {
            return true;
        }
        let Ok(target) = std::fs::read_link(&path) else { break };
        path = directory.join(target);
    }
    false
}

impl Drop for FileStorage {
    /// Releases the locks explicitly. Closing the descriptor is not enough: a child that another
    /// thread has just forked shares the open file until it calls exec(2), and would keep the image
    /// locked until then. The locks of a file that was taken over are not only ours.
    fn drop(&mut self) {
        if !self.is_shared {
            locks::release(&self.file);
        }
    }
}

impl ReadAt for FileStorage {
    fn size(&self) -> u64 {
        self.size.load(Ordering::Acquire)
    }

    fn allocated_size(&self) -> io::Result<u64> {
        Ok(self.file.metadata()?.blocks() * STAT_BLOCK)
    }

    fn is_block_device(&self) -> bool {
        let flags = AtFlags::EMPTY_PATH | AtFlags::STATX_DONT_SYNC;
        let stat = rustix::fs::statx(&self.file, "", flags, StatxFlags::TYPE);
        stat.is_ok_and(|stat| {
            FileType::from_raw_mode(stat.stx_mode.into()) == FileType::BlockDevice
        })
    }

    fn is_deleted(&self) -> bool {
        let flags = AtFlags::EMPTY_PATH | AtFlags::STATX_DONT_SYNC;
        rustix::fs::statx(&self.file, "", flags, StatxFlags::NLINK)
            .is_ok_and(|stat| stat.stx_nlink == 0)
    }

    fn version(&self, ask: Ask) -> io::Result<Version> {
        self.version_now(ask)
    }

    fn descriptor(&self) -> io::Result<OwnedFd> {
        self.file.as_fd().try_clone_to_owned()
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        let inside = self.size().saturating_sub(offset).min(buf.len() as u64) as usize;
        let (inside, beyond) = buf.split_at_mut(inside);
        beyond.fill(0);
        let mut done = 0;
        while done < inside.len() {
            let at = offset + done as u64;
            let end = done + background::piece(inside.len() - done);
            if done > 0 {
                background::let_others_run();
            }
            match retry_on_intr(|| rustix::io::pread(&self.file, &mut inside[done..end], at))? {
                0 if without(Step::ShrunkFileIsAnError) => {
                    inside[done..].fill(0);
                    break;
                }
                0 => return Err(self.shrank(at)),
                len => done += len,
            }
        }
        Ok(())
    }

    fn read_cached(&self, offset: u64, buf: &mut [u8]) -> bool {
        if offset.checked_add(buf.len() as u64).is_none_or(|end| end > self.size()) {
            return false;
        }
        let len = buf.len();
        // The read is short if a page is not in memory. Devices, tmpfs and most network file
        // systems do not support the flag, and a tmpfs needs none.
        let read = if self.is_in_memory {
            rustix::io::pread(&self.file, buf, offset)
        } else {
            let buf = &mut [IoSliceMut::new(buf)];
            rustix::io::preadv2(&self.file, buf, offset, ReadWriteFlags::NOWAIT)
        };
        match read {
            Ok(read) => read == len || without(Step::ShortCachedReadIsAMiss),
            Err(_) => false,
        }
    }

    /// Uses posix_fadvise(2) with `POSIX_FADV_DONTNEED` for the whole file. The call can leave
    /// these pages in memory (`mm/truncate.c`, `mapping_try_invalidate`), which is harmless:
    ///
    /// * Dirty pages and pages under write-back: fdatasync(2) has waited for all of them, and the
    ///   locks exclude writers. If the file system is shut down, its dirty pages stay, and
    ///   fdatasync(2) has returned an error.
    /// * Pages in a per-CPU batch that is not yet on the LRU lists: the kernel drains the batches
    ///   of all CPUs and tries again.
    /// * Pages that another thread is reading at this moment: they are locked or pinned only for
    ///   that time, and are read from the disk if they are not in memory yet. The second call drops
    ///   pages that were pinned only by such a reader.
    /// * Pages that a process has mapped or pinned for long. That process has opened an image in
    ///   use without QEMU's locks, and no call of a program can take pages from it, not even
    ///   `/proc/sys/vm/drop_caches`.
    ///
    /// Memory file systems and DAX ignore the advice: they have no second copy.
    fn drop_cache(&self) -> io::Result<()> {
        let synced = self.sync();
        let dropped = || rustix::fs::fadvise(&self.file, 0, None, Advice::DontNeed);
        let dropped = dropped().and_then(|()| dropped());
        synced?;
        Ok(dropped?)
    }

    fn status(&self, offset: u64, max: u64) -> io::Result<(BlockStatus, u64)> {
        if offset >= self.size() {
            return Ok((BlockStatus::Hole, max));
        }
        let seek = |from| retry_on_intr(|| rustix::fs::seek(&self.file, from));
        let run = |end: u64| (end - offset).min(max);
        match seek(rustix::fs::SeekFrom::Data(offset)) {
            Ok(data) if data > offset => Ok((BlockStatus::Hole, run(data))),
            Ok(_) => match seek(rustix::fs::SeekFrom::Hole(offset)) {
                Ok(hole) if hole > offset => Ok((BlockStatus::Data, run(hole))),
                // Another program punched a hole between the two calls. The read decides what the
                // range holds.
                Ok(_) | Err(Errno::NXIO) => Ok((BlockStatus::Data, max)),
                Err(error) => Err(error.into()),
            },
            // A hole up to the end of the file, unless the file was truncated.
            Err(Errno::NXIO) if self.file.metadata()?.size() < self.size() => {
                Err(self.shrank(offset))
            }
            Err(Errno::NXIO) => Ok((BlockStatus::Hole, max)),
            // Block devices and some network file systems do not support SEEK_DATA.
            Err(Errno::INVAL | Errno::OPNOTSUPP) => Ok((BlockStatus::Data, run(self.size()))),
            Err(error) => Err(error.into()),
        }
    }
}

impl Storage for FileStorage {
    fn write_at(&self, kind: WriteKind, offset: u64, data: &[u8]) -> io::Result<()> {
        if kind == WriteKind::NewCluster {
            self.ahead.before_new(&self.file, offset, data.len() as u64);
        }
        let mut done = 0;
        while done < data.len() {
            let (at, left) = (offset + done as u64, &data[done..]);
            let piece =
                if self.is_on_ext4 { ext4::piece(kind, at, left.len()) } else { left.len() };
            match retry_on_intr(|| rustix::io::pwrite(&self.file, &left[..piece], at))? {
                0 => return Err(Errno::IO.into()),
                len => done += len,
            }
            self.size.fetch_max(offset + done as u64, Ordering::AcqRel);
        }
        Ok(())
    }

    fn can_clone(&self, source: CloneSource<'_>) -> io::Result<()> {
        if !SHARING.contains(&(rustix::fs::fstatfs(&self.file)?.f_type as u64 & 0xffff_ffff)) {
            return Err(Errno::OPNOTSUPP.into());
        }
        // No file has bytes at this offset, so every file system refuses the call. A file system
        // that can share blocks refuses it because of the offset (EINVAL).
        match self.share(source, (0, 0), NO_OFFSET, 0, NonZeroU64::MIN) {
            Err(error) if error.raw_os_error() == Some(Errno::INVAL.raw_os_error()) => Ok(()),
            Err(error) => Err(error),
            Ok(()) => Err(Errno::OPNOTSUPP.into()),
        }
    }

    fn clone_range(
        &self,
        _kind: WriteKind,
        source: CloneSource<'_>,
        from: u64,
        to: u64,
        len: u64,
    ) -> io::Result<()> {
        // A length of 0 would clone up to the end of the file.
        let Some(whole) = NonZeroU64::new(len) else { return Ok(()) };
        self.share(source, (from, len), from, to, whole)?;
        self.size.fetch_max(to + len, Ordering::AcqRel);
        Ok(())
    }

    fn punch_hole(&self, offset: u64, len: u64) -> io::Result<()> {
        if len == 0 {
            return Ok(());
        }
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        Ok(retry_on_intr(|| rustix::fs::fallocate(&self.file, flags, offset, len))?)
    }

    /// Uses posix_fadvise(2) with `POSIX_FADV_DONTNEED`. Like sync_file_range(2), for which no
    /// crate has a safe function, it starts the write-back of the dirty pages in the range and does
    /// not wait for its end (`mm/fadvise.c`). Afterwards it drops the clean pages of the range. No
    /// written page is clean yet: a page is dirty until its write-back begins, and is not dropped
    /// during the write-back. The next fdatasync(2) reports an error of this write-back like any
    /// other.
    fn start_write_out(&self, offset: u64, len: u64) {
        if let Some(len) = NonZeroU64::new(len) {
            // A file system that ignores the advice writes back at the next fdatasync(2).
            let _ = rustix::fs::fadvise(&self.file, offset, Some(len), Advice::DontNeed);
        }
    }

    fn free_unused_blocks(&self) {
        self.ahead.give_back(&self.file, self.size());
    }

    fn sync(&self) -> io::Result<()> {
        match retry_on_intr(|| rustix::fs::fdatasync(&self.file)) {
            Err(error) if !without(Step::SyncErrorsAreErrors) => Err(error.into()),
            _ => Ok(()),
        }
    }

    fn space(&self) -> io::Result<Option<HostSpace>> {
        if self.file.metadata()?.file_type().is_block_device() {
            return Ok(None);
        }
        let host = retry_on_intr(|| rustix::fs::fstatvfs(&self.file))?;
        let bytes = |blocks: u64| blocks.saturating_mul(host.f_frsize);
        // Some file systems report zero for all values if they do not know them.
        Ok((host.f_blocks > 0)
            .then(|| HostSpace { free: bytes(host.f_bavail), total: bytes(host.f_blocks) }))
    }
}

impl Sidecar for FileStorage {
    fn base_note(&self) -> io::Result<Option<String>> {
        let mut note = [0; LONGEST_BASE_NOTE];
        match retry_on_intr(|| rustix::fs::fgetxattr(&self.file, BASE_NOTE, &mut note)) {
            Ok(len) => Ok(Some(String::from_utf8_lossy(&note[..len]).into_owned())),
            Err(Errno::NODATA | Errno::OPNOTSUPP | Errno::PERM | Errno::NOSYS | Errno::RANGE) => {
                Ok(None)
            }
            Err(error) => Err(error.into()),
        }
    }

    fn set_base_note(&self, note: &str) -> io::Result<()> {
        match retry_on_intr(|| {
            rustix::fs::fsetxattr(&self.file, BASE_NOTE, note.as_bytes(), XattrFlags::empty())
        }) {
            Ok(())
            | Err(
                Errno::OPNOTSUPP
                | Errno::PERM
                | Errno::NOSYS
                | Errno::NOSPC
                | Errno::DQUOT
                | Errno::ACCESS,
            ) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }

    fn file_id(&self) -> io::Result<Option<FileId>> {
        let wanted = StatxFlags::INO | StatxFlags::BTIME;
        let stat =
            retry_on_intr(|| rustix::fs::statx(&self.file, "", AtFlags::EMPTY_PATH, wanted))?;
        let host = retry_on_intr(|| rustix::fs::fstatvfs(&self.file))?;
        // The device numbers of btrfs, overlayfs, NFS and tmpfs (major 0) change with each mount.
        let file_system = match (host.f_fsid, stat.stx_dev_major, stat.stx_dev_minor) {
            (0, 0, _) => None,
            (0, major, minor) => Some(format!("{major}:{minor}")),
            (id, ..) => Some(format!("{id:016x}")),
        };
        let has_birth = StatxFlags::from_bits_retain(stat.stx_mask).contains(StatxFlags::BTIME);
        let born =
            has_birth.then(|| format!("{}.{:09}", stat.stx_btime.tv_sec, stat.stx_btime.tv_nsec));
        Ok(Some(FileId { file_system, inode: stat.stx_ino, born }))
    }

    fn stream_note(&self) -> io::Result<Option<Vec<u8>>> {
        let mut note = vec![0; LONGEST_STREAM_NOTE];
        match retry_on_intr(|| rustix::fs::fgetxattr(&self.file, STREAM_NOTE, &mut note)) {
            Ok(len) => {
                note.truncate(len);
                Ok(Some(note))
            }
            Err(Errno::NODATA | Errno::OPNOTSUPP | Errno::PERM | Errno::NOSYS) => Ok(None),
            Err(error) => Err(error.into()),
        }
    }

    fn set_stream_note(&self, note: Option<&str>) -> io::Result<()> {
        let Some(note) = note else {
            return match retry_on_intr(|| rustix::fs::fremovexattr(&self.file, STREAM_NOTE)) {
                Ok(()) | Err(Errno::NODATA | Errno::OPNOTSUPP | Errno::PERM | Errno::NOSYS) => {
                    Ok(())
                }
                Err(error) => Err(error.into()),
            };
        };
        Ok(retry_on_intr(|| {
            rustix::fs::fsetxattr(&self.file, STREAM_NOTE, note.as_bytes(), XattrFlags::empty())
        })?)
    }

    fn entrust_attributes(&self) -> io::Result<Option<OwnedFd>> {
        self.mark_entrusted.store(true, Ordering::Release);
        Ok(if self.file.metadata()?.is_file() { Some(self.reopened()?) } else { None })
    }

    fn open_mark(&self) -> io::Result<OpenMark> {
        if !self.locked.load(Ordering::Relaxed) {
            return Ok(OpenMark::Unlocked);
        }
        // Devices cannot have user attributes, and reading one does not report that.
        if !self.file.metadata()?.is_file() {
            return Ok(OpenMark::Unsupported);
        }
        match retry_on_intr(|| rustix::fs::fgetxattr(&self.file, OPEN_MARK, &mut [0u8; 16])) {
            Ok(_) | Err(Errno::RANGE) => Ok(OpenMark::Present),
            Err(Errno::NODATA) => Ok(OpenMark::Absent),
            Err(Errno::OPNOTSUPP | Errno::PERM | Errno::NOSYS) => Ok(OpenMark::Unsupported),
            Err(error) => Err(error.into()),
        }
    }

    fn set_open_mark(&self) -> io::Result<()> {
        match retry_on_intr(|| {
            rustix::fs::fsetxattr(&self.file, OPEN_MARK, b"1", XattrFlags::empty())
        }) {
            Ok(()) => {}
            Err(Errno::OPNOTSUPP | Errno::PERM | Errno::NOSYS) => return Ok(()),
            Err(error @ (Errno::NOSPC | Errno::DQUOT | Errno::ACCESS)) => {
                let why = crate::error::os_text(&error.into());
                log::warn!(
                    "{}: cannot be marked as open ({why}): what a crash leaks will not be given back",
                    self.path.display()
                );
                return Ok(());
            }
            Err(error) => return Err(error.into()),
        }
        // fsync(2), because fdatasync(2) need not write attributes.
        Ok(retry_on_intr(|| rustix::fs::fsync(&self.file))?)
    }

    fn remove_open_mark(&self) -> io::Result<()> {
        if self.mark_entrusted.load(Ordering::Acquire) {
            return Ok(());
        }
        match retry_on_intr(|| rustix::fs::fremovexattr(&self.file, OPEN_MARK)) {
            Ok(()) | Err(Errno::NODATA | Errno::OPNOTSUPP | Errno::PERM | Errno::NOSYS) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }
}

#[cfg(test)]
mod tests;
