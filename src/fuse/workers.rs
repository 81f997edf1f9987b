//! Where requests wait that cannot be answered at once, so that session threads never do.
//!
//! *Misses* need a backing file, an allocation, or a range that is in use: [`MISS_WORKERS`] threads take them in order of arrival.
//! *Flushes* have a thread of their own, so that they never sit behind misses that hang on a dead backing file. It answers all flushes
//! that wait with one call of [`FileSystem::flush`]: whatever was answered before a flush was asked for was answered before that call (P1).
//! (A *write* that hangs does hold up fsync, in the kernel: the write has the inode lock shared, fsync wants it exclusive.)
//!
//! Both queues are unbounded, because a bounded one would make session threads wait exactly when hits must go on. The kernel bounds what
//! can be in them: at most `max_background` asynchronous requests, and one synchronous request for each client thread that waits, each
//! of at most 1 MiB of data to write; reads bring no buffer with them.
//!
//! A panic in a task is a broken invariant. In release it ends the process (`panic = "abort"`, architecture D7); in tests it ends its
//! worker, and fuser answers the request with EIO when the reply is dropped.

use std::convert::Infallible;
use std::sync::Arc;
use std::thread;

use crossbeam_channel::{Receiver, Sender, unbounded};
use rustix::io::Errno;

use super::file_system::FileSystem;
use crate::Result;
use crate::error::Context;

/// Threads for misses. They wait for the disk most of the time, so this is not a number of cores: it is how many reads from below, and
/// how many requests for clusters in use, are in progress at once. Twice the depth at which one NVMe base saturates.
const MISS_WORKERS: usize = 16;

/// One request, complete with its reply. The buffer belongs to the worker and keeps its size between tasks.
pub(super) type Task = Box<dyn FnOnce(&mut Buffer) + Send>;

/// The memory of one worker.
#[derive(Default)]
pub(super) struct Buffer(Vec<u8>);

impl Buffer {
    /// `len` bytes that hold anything.
    pub(super) fn first(&mut self, len: usize) -> &mut [u8] {
        if self.0.len() < len {
            self.0.resize(len, 0);
        }
        &mut self.0[..len]
    }
}

/// What to do when a flush that began after the call of [`Workers::flush`] has ended.
pub(super) type Flushed = Box<dyn FnOnce(Result<(), Errno>) + Send>;

/// The queues. When the last clone is dropped, the threads finish what is queued and end.
#[derive(Clone)]
pub(super) struct Workers {
    misses: Sender<Task>,
    flushes: Sender<Flushed>,
}

/// Disconnected once all threads have ended.
pub(super) type Ended = Receiver<Infallible>;

impl Workers {
    /// Starts the threads.
    ///
    /// # Errors
    /// The system has no more threads; those started end again.
    pub(super) fn start(file_system: &Arc<dyn FileSystem>) -> Result<(Workers, Ended)> {
        let (misses, queue) = unbounded::<Task>();
        let (flushes, flush_queue) = unbounded::<Flushed>();
        let (alive, ended) = crossbeam_channel::bounded::<Infallible>(0);
        for number in 0..MISS_WORKERS {
            let (queue, alive) = (queue.clone(), alive.clone());
            spawn(format!("miss-{number}"), move || {
                let _alive = alive;
                let mut buffer = Buffer::default();
                for task in queue {
                    task(&mut buffer);
                }
            })?;
        }
        let file_system = Arc::clone(file_system);
        spawn("flush".to_string(), move || {
            let _alive = alive;
            while let Ok(first) = flush_queue.recv() {
                let waiting: Vec<Flushed> = std::iter::once(first).chain(flush_queue.try_iter()).collect();
                let result = file_system.flush();
                for flushed in waiting {
                    flushed(result);
                }
            }
        })?;
        Ok((Workers { misses, flushes }, ended))
    }

    /// Runs `task` on a miss worker. Never waits.
    pub(super) fn miss(&self, task: Task) {
        // Fails only if all workers have panicked; the task then drops its reply, which answers EIO.
        let _ = self.misses.send(task);
    }

    /// Runs `flushed` after a flush that has not begun yet. Never waits.
    pub(super) fn flush(&self, flushed: Flushed) {
        let _ = self.flushes.send(flushed);
    }
}

fn spawn(name: String, body: impl FnOnce() + Send + 'static) -> Result<()> {
    thread::Builder::new().name(name).spawn(body).map(drop).context(|| "starting a worker thread")
}
