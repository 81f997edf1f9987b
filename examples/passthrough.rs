//! `passthrough FILE MOUNTPOINT [uring]`: serves the regular file FILE at the regular file
//! MOUNTPOINT, over /dev/fuse or over io_uring, and does nothing else.
//!
//! It measures the ceiling for `scripts/bench.sh`: the cost of the transport alone, with one pread
//! or pwrite behind each request and no disk logic. Over /dev/fuse it uses fuser and no code of
//! cordisk, and asks the kernel for what `cordisk` asks for: two threads with a descriptor each,
//! direct I/O, requests of up to 1 MiB, parallel direct writes. Over io_uring it uses cordisk's own
//! transport with another file system behind it. It ends when it is unmounted.

use std::cell::RefCell;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use fuser::{
    Config, Errno, FileAttr, FileHandle, FileType, Filesystem, FopenFlags, INodeNo, InitFlags,
    KernelConfig, LockOwner, MountOption, OpenFlags, ReplyAttr, ReplyData, ReplyEmpty, ReplyOpen,
    ReplyWrite, ReplyXattr, Request, Session, WriteFlags,
};

use cordisk::mount::{HostMount, MountPlan};
use export::{
    Answer, AttributeChanges, Durability, FileSystem, FileTimes, Owner, Prepared, ReadAnswer, Stat,
    Transport, Truncate,
};
use rustix::fs::StatVfs;

const THREADS: usize = 2;
const MAX_IO: usize = 1 << 20;
const MAX_BACKGROUND: u16 = 64;
const ATTR_TTL: Duration = Duration::from_secs(1);

thread_local! {
    /// One buffer for each session thread, so that a read allocates nothing.
    static BUFFER: RefCell<Vec<u8>> = RefCell::new(vec![0; MAX_IO]);
}

#[derive(Debug)]
struct Passthrough {
    file: File,
}

impl Passthrough {
    fn attributes(&self) -> io::Result<FileAttr> {
        let host = self.file.metadata()?;
        let now = SystemTime::now();
        Ok(FileAttr {
            ino: INodeNo::ROOT,
            size: host.size(),
            blocks: host.blocks(),
            atime: now,
            mtime: now,
            ctime: now,
            crtime: now,
            kind: FileType::RegularFile,
            perm: 0o600,
            nlink: 1,
            uid: host.uid(),
            gid: host.gid(),
            rdev: 0,
            blksize: 4096,
            flags: 0,
        })
    }
}

/// Reads until `buffer` is full or the file ends.
fn read_full(file: &File, mut offset: u64, buffer: &mut [u8]) -> io::Result<usize> {
    let mut done = 0;
    while done < buffer.len() {
        match file.read_at(&mut buffer[done..], offset) {
            Ok(0) => break,
            Ok(read) => {
                done += read;
                offset += read as u64;
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(done)
}

impl Filesystem for Passthrough {
    fn init(&mut self, _req: &Request, config: &mut KernelConfig) -> io::Result<()> {
        let _ = config.set_max_write(MAX_IO as u32);
        let _ = config.set_max_background(MAX_BACKGROUND);
        let _ = config.add_capabilities(InitFlags::FUSE_ASYNC_DIO);
        Ok(())
    }

    fn getattr(&self, _req: &Request, _ino: INodeNo, _fh: Option<FileHandle>, reply: ReplyAttr) {
        match self.attributes() {
            Ok(attributes) => reply.attr(&ATTR_TTL, &attributes),
            Err(error) => reply.error(error.into()),
        }
    }

    fn open(&self, _req: &Request, _ino: INodeNo, _flags: OpenFlags, reply: ReplyOpen) {
        reply.opened(
            FileHandle(0),
            FopenFlags::FOPEN_DIRECT_IO | FopenFlags::FOPEN_PARALLEL_DIRECT_WRITES,
        );
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
        BUFFER.with_borrow_mut(|buffer| {
            let len = (size as usize).min(MAX_IO);
            match read_full(&self.file, offset, &mut buffer[..len]) {
                Ok(len) => reply.data(&buffer[..len]),
                Err(error) => reply.error(error.into()),
            }
        });
    }

    fn write(
        &self,
        _req: &Request,
        _ino: INodeNo,
        _fh: FileHandle,
        offset: u64,
        data: &[u8],
        _write_flags: WriteFlags,
        _flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        match self.file.write_all_at(data, offset) {
            // A request is at most MAX_IO long.
            Ok(()) => reply.written(data.len() as u32),
            Err(error) => reply.error(error.into()),
        }
    }

    fn flush(
        &self,
        _req: &Request,
        _ino: INodeNo,
        _fh: FileHandle,
        _lock_owner: LockOwner,
        reply: ReplyEmpty,
    ) {
        reply.ok();
    }

    fn fsync(
        &self,
        _req: &Request,
        _ino: INodeNo,
        _fh: FileHandle,
        _datasync: bool,
        reply: ReplyEmpty,
    ) {
        match self.file.sync_data() {
            Ok(()) => reply.ok(),
            Err(error) => reply.error(error.into()),
        }
    }

    // The kernel calls getxattr before every write, until a reply says that there is no such call.
    fn getxattr(
        &self,
        _req: &Request,
        _ino: INodeNo,
        _name: &std::ffi::OsStr,
        _size: u32,
        reply: ReplyXattr,
    ) {
        reply.error(Errno::ENOSYS);
    }
}

impl FileSystem for Passthrough {
    fn getattr(&self) -> Result<Stat, rustix::io::Errno> {
        let host = self.file.metadata().map_err(errno)?;
        let (owner, now) =
            (Owner { mode: 0o600, uid: host.uid(), gid: host.gid() }, SystemTime::now());
        let times = FileTimes { atime: now, mtime: now, ctime: now };
        Ok(Stat { size: host.size(), blocks: host.blocks(), blksize: 4096, owner, times })
    }

    fn setattr(
        &self,
        _truncate: Option<Truncate>,
        _changes: &AttributeChanges,
    ) -> Result<Stat, rustix::io::Errno> {
        FileSystem::getattr(self)
    }

    fn open(&self, _open_flags: i32) -> Result<(), rustix::io::Errno> {
        Ok(())
    }

    fn read_local(&self, offset: u64, buf: &mut [u8]) -> Result<Answer<usize>, rustix::io::Errno> {
        read_full(&self.file, offset, buf).map(Answer::Done).map_err(errno)
    }

    fn read_cached(
        &self,
        _offset: u64,
        _buf: &mut [u8],
        _answer: &mut ReadAnswer<'_>,
    ) -> Answer<()> {
        Answer::Below
    }

    fn read(&self, offset: u64, buf: &mut [u8], answer: &mut ReadAnswer<'_>) {
        answer(read_full(&self.file, offset, buf).map(|len| &buf[..len]).map_err(errno));
    }

    fn write_local(&self, offset: u64, data: &[u8]) -> Result<Answer<usize>, rustix::io::Errno> {
        FileSystem::write(self, offset, data, Durability::Later).map(Answer::Done)
    }

    fn write(
        &self,
        offset: u64,
        data: &[u8],
        _durability: Durability,
    ) -> Result<usize, rustix::io::Errno> {
        self.file.write_all_at(data, offset).map(|()| data.len()).map_err(errno)
    }

    fn fallocate(&self, _offset: u64, _len: u64, _mode: i32) -> Result<(), rustix::io::Errno> {
        Err(rustix::io::Errno::OPNOTSUPP)
    }

    fn lseek(&self, _offset: i64, _whence: i32) -> Result<i64, rustix::io::Errno> {
        Err(rustix::io::Errno::NOSYS)
    }

    fn flush(&self) -> Result<(), rustix::io::Errno> {
        self.file.sync_data().map_err(errno)
    }

    fn needs_flush(&self) -> bool {
        false
    }

    fn statfs(&self) -> Result<StatVfs, rustix::io::Errno> {
        rustix::fs::fstatvfs(&self.file)
    }
}

fn errno(error: io::Error) -> rustix::io::Errno {
    rustix::io::Errno::from_io_error(&error).unwrap_or(rustix::io::Errno::IO)
}

fn open(file: &Path) -> io::Result<File> {
    OpenOptions::new().read(true).write(true).open(file)
}

fn serve(file: &Path, mountpoint: &Path) -> io::Result<()> {
    let mut config = Config::default();
    config.mount_options =
        vec![MountOption::FSName("passthrough".to_string()), MountOption::DefaultPermissions];
    config.n_threads = Some(THREADS);
    config.clone_fd = true;
    Session::new(Passthrough { file: open(file)? }, mountpoint, &config)?.run()
}

fn serve_over_uring(file: &Path, mountpoint: &Path) -> Result<(), Box<dyn std::error::Error>> {
    let file = open(file)?;
    let plan = MountPlan {
        mountpoint: std::path::absolute(mountpoint)?,
        source: "passthrough".into(),
        taken: vec![(file.metadata()?.dev(), file.metadata()?.ino())],
        read_only: false,
        allow_other: false,
        uid: rustix::process::getuid().as_raw(),
        gid: rustix::process::getgid().as_raw(),
        sync: false,
    };
    let prepared = Prepared::other(Arc::new(Passthrough { file }), Transport::Uring)?;
    let (_mount, device) = HostMount::mount(&plan)?;
    Ok(prepared.serve(device)?.ended().recv()??)
}

fn main() -> ExitCode {
    let arguments: Vec<_> = std::env::args_os().skip(1).collect();
    let served = match &arguments[..] {
        [file, mountpoint] => serve(Path::new(file), Path::new(mountpoint)).map_err(Into::into),
        [file, mountpoint, uring] if uring == "uring" => {
            serve_over_uring(Path::new(file), Path::new(mountpoint))
        }
        _ => {
            eprintln!("usage: passthrough FILE MOUNTPOINT [uring]");
            return ExitCode::from(2);
        }
    };
    match served {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("passthrough: {error}");
            ExitCode::FAILURE
        }
    }
}
