//! The limits of the process (getrlimit(2)). They are checked before any file is opened, so that a
//! mount is refused with one line instead of failing half way, or at the first read.

use std::convert::Infallible;
use std::num::NonZeroUsize;
use std::thread;

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

use crate::cli::MountConfig;
use crate::map::units;
use host::{Error, ErrorKind, Result};

/// Open files of a disk regardless of the number of processors: overlay and chain (17), clients of
/// the control socket (32) and of metrics (64), and those of the process itself (sockets, pipes,
/// locks, the log).
const FILES: u64 = 144;
/// Open files per processor: its /dev/fuse, or its io_uring and the eventfd that wakes it.
const FILES_OF_PROCESSOR: u64 = 4;

/// Address space in bytes: code, tables in memory, buffers of requests, stacks, and what the
/// allocator reserves for threads.
const MEMORY: u64 = 1 << 30;
/// Address space per processor in bytes: the buffers of its queue.
const MEMORY_OF_PROCESSOR: u64 = 64 << 20;

/// The smallest accepted limit of file sizes, in bytes. It exceeds a pidfile, an entry in the
/// runtime directory and some lines of a log. An image also needs at least this much growth.
const FILE: u64 = 1 << 20;

/// Raises the limit of open files to what a disk needs, if the hard limit allows it, and refuses
/// limits that are too small to serve a disk.
///
/// # Errors
/// [`ErrorKind::InvalidArgument`], with the limit and the value it needs.
pub(super) fn check() -> Result<()> {
    let processors = thread::available_parallelism().map_or(1, |count| count.get() as u64);
    let files = FILES + FILES_OF_PROCESSOR * processors;
    let limit = getrlimit(Resource::Nofile);
    if limit.current.is_some_and(|current| current < files)
        && limit.maximum.is_none_or(|most| most >= files)
    {
        // If this fails, the check below reports it.
        let _ = setrlimit(Resource::Nofile, Rlimit { current: Some(files), ..limit });
    }
    let memory = MEMORY + MEMORY_OF_PROCESSOR * processors;
    refuse(
        getrlimit(Resource::Nofile),
        files,
        "open files",
        "ulimit -n",
        "LimitNOFILE=",
        |count| count.to_string(),
    )?;
    refuse(getrlimit(Resource::As), memory, "address space", "ulimit -v", "LimitAS=", units::size)?;
    refuse(getrlimit(Resource::Data), memory, "memory", "ulimit -d", "LimitDATA=", units::size)?;
    refuse(getrlimit(Resource::Fsize), FILE, "file sizes", "ulimit -f", "LimitFSIZE=", units::size)
}

/// Refuses a limit of file sizes at which no new cluster can be written to the image. An image
/// whose metadata cannot be read passes here; opening it reports the error.
///
/// # Errors
/// [`ErrorKind::InvalidArgument`], with the limit and the value it needs.
pub(super) fn check_growth(config: &MountConfig) -> Result<()> {
    let Some(len) = growing(config) else { return Ok(()) };
    refuse(
        getrlimit(Resource::Fsize),
        len.saturating_add(FILE),
        "file sizes",
        "ulimit -f",
        "LimitFSIZE=",
        units::size,
    )
}

/// Warns if the limit of file sizes is below the `size` of the disk, in bytes. Beyond the limit
/// writes fail and nothing is copied up, as on a full file system.
pub(super) fn warn_of_growth(config: &MountConfig, size: u64) {
    let limit = getrlimit(Resource::Fsize).current.filter(|&limit| limit < size);
    if let (Some(limit), Some(_)) = (limit, growing(config)) {
        let (image, limit, size) = (config.image.display(), units::size(limit), units::size(size));
        log::warn!(
            "{image} can grow to {limit}, which is the limit of file sizes (ulimit -f), and its disk has {size}"
        );
    }
}

/// Returns the size of the image in bytes if it is a regular file that may grow. A block device has
/// no such limit.
fn growing(config: &MountConfig) -> Option<u64> {
    let file = config.image.metadata().ok().filter(|file| file.is_file() && !config.read_only)?;
    Some(file.len())
}

/// Stack size in bytes of a thread that only waits.
const TRY_STACK: usize = 64 << 10;

/// Threads of a disk regardless of the number of processors: workers, sessions, timers, clients.
const THREADS: usize = 40;
/// Threads per processor: the servers of its queue.
const THREADS_OF_PROCESSOR: usize = 4;

/// Starts as many threads as a disk has under load, and ends them again. The limits (`ulimit -u`,
/// `TasksMax=`) also count other threads of the same user or unit, so only a try shows whether
/// enough threads are left.
///
/// # Errors
/// The system refused to start one of the threads.
pub(super) fn try_threads() -> Result<()> {
    let processors = thread::available_parallelism().map_or(1, NonZeroUsize::get);
    let wanted = THREADS + THREADS_OF_PROCESSOR * processors;
    let (stay, leave) = crossbeam_channel::bounded::<Infallible>(0);
    let mut threads = Vec::with_capacity(wanted);
    let mut refused = None;
    while threads.len() < wanted && refused.is_none() {
        let leave = leave.clone();
        match thread::Builder::new().name("try".into()).stack_size(TRY_STACK).spawn(move || {
            let _ = leave.recv();
        }) {
            Ok(thread) => threads.push(thread),
            Err(error) => refused = Some(error),
        }
    }
    let started = threads.len();
    drop(stay);
    threads.into_iter().for_each(|thread| drop(thread.join()));
    let Some(error) = refused else { return Ok(()) };
    let what = format!(
        "only {started} threads can be started, and a disk needs {wanted}: raise the limit (ulimit -u, or TasksMax= of a systemd unit)"
    );
    Err(Error::io(what, error))
}

fn refuse(
    limit: Rlimit,
    needed: u64,
    what: &str,
    shell: &str,
    unit: &str,
    show: impl Fn(u64) -> String,
) -> Result<()> {
    match limit.current {
        Some(current) if current < needed => Err(Error::new(
            ErrorKind::InvalidArgument,
            format!(
                "the limit of {what} is {}, and a disk needs {}: raise it ({shell}, or {unit} of a systemd unit)",
                show(current),
                show(needed)
            ),
        )),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn threads_are_tried_and_end() {
        try_threads().unwrap();
    }

    #[test]
    fn too_little_is_refused_and_no_limit_is_enough() {
        let limit = |current| Rlimit { current, maximum: None };
        let ask = |current| {
            refuse(limit(current), 100, "open files", "ulimit -n", "LimitNOFILE=", |count| {
                count.to_string()
            })
        };
        assert!(ask(None).is_ok() && ask(Some(100)).is_ok());
        let error = ask(Some(99)).unwrap_err().to_string();
        assert_eq!(
            error,
            "the limit of open files is 99, and a disk needs 100: raise it (ulimit -n, or LimitNOFILE= of a systemd unit)"
        );
    }
}
