//! Pools of threads for requests that cannot be answered at once, so that session threads never
//! wait.
//!
//! *Misses* are requests that need an allocation, a range that another request holds, or a backing
//! file. There are two pools for them, of at most [`MISS_WORKERS`] threads each (the second one has
//! up to [`REMOTE_MISS_WORKERS`] if a backing file is on another machine), and each pool
//! takes its misses in order of arrival. One pool ("local") is for misses that need no backing
//! file, or may not need one. The other ("below") is for misses that do. A hung backing file stops
//! the second pool and nothing else.
//!
//! A pool wakes the idle thread that was busy last: its buffer may still be in the CPU cache, and
//! no more threads are used than needed.
//!
//! *Flushes* have a thread of their own, so that they never wait behind misses that hang on a dead
//! backing file. That thread answers all waiting flushes with one call of [`FileSystem::flush`]:
//! each write that was answered before a flush was requested was also answered before that call
//! (P1). (A *write* that hangs does delay fsync, but in the kernel: the write holds the inode lock
//! shared, and fsync needs it exclusive.)
//!
//! The queues are unbounded, because a full bounded queue would block session threads exactly when
//! hits must continue. The kernel bounds their content: at most `max_background` asynchronous
//! requests, and one synchronous request for each waiting client thread. Each holds at most 1 MiB
//! of data to write; reads have no buffer while they are queued.
//!
//! A panic in a task means a broken invariant. In release builds it ends the process (`panic =
//! "abort"`, P16). In tests it ends its worker, and the dropped reply answers EIO.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, Thread};

use crossbeam_channel::{Receiver, Sender, unbounded};
use parking_lot::Mutex;
use rustix::io::Errno;
use rustix::thread::CpuSet;

use super::file_system::FileSystem;
use host::Result;
use host::error::Context;
use host::mutants::{Step, without};

/// Largest number of threads of a pool. A pool starts with one thread, and adds one whenever a miss
/// arrives and all are busy. The threads mostly wait for the disk, so the number does not follow
/// the number of cores. It limits how many reads from below, or requests for clusters in use, are
/// in progress at once: twice the depth at which one NVMe base saturates.
const MISS_WORKERS: usize = 16;

/// The same for misses that may wait for another machine: each takes a round trip, which no number
/// of processors makes shorter, so that only more of them at once make more per second.
const REMOTE_MISS_WORKERS: usize = 48;

/// A request together with its reply, as a function. The buffer belongs to the worker and keeps its
/// size between tasks.
pub(super) type Task = Box<dyn FnOnce(&mut Buffer) + Send>;

/// The buffer of one worker, reused by all its tasks.
#[derive(Default)]
pub(super) struct Buffer(Vec<u8>);

impl Buffer {
    /// Returns `len` bytes of arbitrary content.
    pub(super) fn first(&mut self, len: usize) -> &mut [u8] {
        if self.0.len() < len {
            self.0.resize(len, 0);
        }
        &mut self.0[..len]
    }
}

/// A callback for the end of a flush that began after the call of [`Workers::flush`].
pub(super) type Flushed = Box<dyn FnOnce(Result<(), Errno>) + Send>;

/// The queues. When the last clone is dropped, the threads finish the queued tasks and end.
#[derive(Clone)]
pub(super) struct Workers {
    local: Arc<Pool>,
    below: Arc<Pool>,
    flushes: Sender<Flushed>,
}

/// The sending side of one pool. Dropping it closes the queue.
struct Pool {
    /// Prefix of the names of the threads.
    name: &'static str,
    misses: Arc<Misses>,
    /// Each worker holds a clone. When all have ended, [`WorkersEnded`] disconnects.
    alive: Sender<Infallible>,
    /// The CPUs on which workers may run. A new thread inherits the affinity of the thread that
    /// starts it, and each ring's home server is bound to one CPU.
    processors: Option<CpuSet>,
    /// The last attempt to start a worker failed, and a warning was logged.
    is_short: AtomicBool,
}

impl Pool {
    /// Starts one more worker, unless there are as many as there may be.
    fn spawn(&self) -> Result<()> {
        let (misses, alive) = (Arc::clone(&self.misses), self.alive.clone());
        // Counted before the thread starts, so that `Misses::put` may queue tasks for it at once.
        let number = {
            let mut waiting = misses.0.lock();
            if waiting.alive == waiting.most {
                return Ok(()); // another thread has just started the last one
            }
            waiting.alive += 1;
            waiting.alive - 1
        };
        let (guard, processors) = (WorkerGuard(Arc::clone(&misses)), self.processors);
        spawn(format!("{}-{number}", self.name), move || {
            let (_alive, _guard) = (alive, guard);
            if let Some(processors) = processors {
                let _ = rustix::thread::sched_setaffinity(None, &processors);
            }
            misses.work();
        })
    }

    fn put(&self, task: Task) {
        if self.misses.put(task) == Hands::Enough {
            return;
        }
        match self.spawn() {
            Ok(()) => self.is_short.store(false, Ordering::Relaxed),
            // The existing workers take the task in turn. Log one warning, not one for each
            // request.
            Err(error) if !self.is_short.swap(true, Ordering::Relaxed) => {
                log::warn!(
                    "{}; requests wait for the workers that there are",
                    error.explain_limit()
                );
            }
            Err(_) => {}
        }
    }
}

/// Whether there is a worker for a task that was just queued.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Hands {
    Enough,
    /// No worker is idle, and the pool may start another one.
    TooFew,
}

/// The queue of one pool: misses that wait for a worker, or workers that wait for a miss.
#[derive(Default)]
struct Misses(Mutex<WaitingTasks>);

#[derive(Default)]
struct WaitingTasks {
    /// In order of arrival.
    tasks: VecDeque<Task>,
    /// Parked workers; the last element is the one that was busy last.
    idle: Vec<Thread>,
    /// Number of workers that have not ended.
    alive: usize,
    /// The largest number of workers.
    most: usize,
    is_closed: bool,
}

impl Misses {
    /// A queue for at most `most` workers.
    fn of(most: usize) -> Misses {
        Misses(Mutex::new(WaitingTasks { most, ..WaitingTasks::default() }))
    }

    fn put(&self, task: Task) -> Hands {
        let mut waiting = self.0.lock();
        // If there are no workers (all have panicked), dropping the task drops its reply, which
        // answers EIO.
        if waiting.alive == 0 {
            return Hands::Enough;
        }
        waiting.tasks.push_back(task);
        let (idle, alive, most) = (waiting.idle.pop(), waiting.alive, waiting.most);
        drop(waiting);
        match idle {
            Some(worker) => worker.unpark(),
            None if alive < most => return Hands::TooFew,
            None => {}
        }
        Hands::Enough
    }

    /// Waits for the next task and returns it; `None` once the queue is closed and empty.
    fn take(&self) -> Option<Task> {
        let this = thread::current();
        loop {
            let mut waiting = self.0.lock();
            // `park` may return spuriously: remove our stale entry.
            waiting.idle.retain(|worker| worker.id() != this.id());
            if let Some(task) = waiting.tasks.pop_front() {
                return Some(task);
            }
            if waiting.is_closed {
                return None;
            }
            waiting.idle.push(this.clone());
            drop(waiting);
            thread::park();
        }
    }

    fn work(&self) {
        let mut buffer = Buffer::default();
        while let Some(task) = self.take() {
            task(&mut buffer);
        }
    }
}

/// Counts a worker as alive until it is dropped, also by a panic.
struct WorkerGuard(Arc<Misses>);

impl Drop for WorkerGuard {
    fn drop(&mut self) {
        let mut waiting = self.0.0.lock();
        waiting.alive -= 1;
        let orphans =
            if waiting.alive == 0 { std::mem::take(&mut waiting.tasks) } else { VecDeque::new() };
        drop(waiting);
        drop(orphans);
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        let mut waiting = self.misses.0.lock();
        waiting.is_closed = true;
        let idle = std::mem::take(&mut waiting.idle);
        drop(waiting);
        idle.iter().for_each(Thread::unpark);
    }
}

/// Disconnects once all threads have ended.
pub(super) type WorkersEnded = Receiver<Infallible>;

impl Workers {
    /// Starts the threads.
    ///
    /// # Errors
    /// The system has no more threads. The threads that were already started end again.
    pub(super) fn start(file_system: &Arc<dyn FileSystem>) -> Result<(Workers, WorkersEnded)> {
        let (flushes, flush_queue) = unbounded::<Flushed>();
        let (alive, ended) = crossbeam_channel::bounded::<Infallible>(0);
        let processors = rustix::thread::sched_getaffinity(None).ok();
        let pool = |name, most| -> Result<Arc<Pool>> {
            let pool = Pool {
                name,
                misses: Arc::new(Misses::of(most)),
                alive: alive.clone(),
                processors,
                is_short: AtomicBool::default(),
            };
            pool.spawn()?;
            Ok(Arc::new(pool))
        };
        let below = if file_system.is_remote() { REMOTE_MISS_WORKERS } else { MISS_WORKERS };
        let (local, below) = (pool("local", MISS_WORKERS)?, pool("below", below)?);
        let file_system = Arc::clone(file_system);
        spawn("flush".to_string(), move || {
            let _alive = alive;
            while let Ok(first) = flush_queue.recv() {
                let mut waiting: Vec<Flushed> =
                    std::iter::once(first).chain(flush_queue.try_iter()).collect();
                let result = file_system.flush();
                if without(Step::LateFlushesWait) {
                    waiting.extend(flush_queue.try_iter());
                }
                for flushed in waiting {
                    flushed(result);
                }
            }
        })?;
        Ok((Workers { local, below, flushes }, ended))
    }

    /// Runs `task`, which must not wait for a backing file, on a worker. Never waits.
    pub(super) fn local(&self, task: Task) {
        self.local.put(task);
    }

    /// Runs `task`, which may wait for a backing file, on a worker. Never waits.
    pub(super) fn below(&self, task: Task) {
        self.below.put(task);
    }

    /// Calls `flushed` after a flush that begins after this call. Never waits.
    pub(super) fn flush(&self, flushed: Flushed) {
        let _ = self.flushes.send(flushed);
    }
}

fn spawn(name: String, body: impl FnOnce() + Send + 'static) -> Result<()> {
    thread::Builder::new().name(name).spawn(body).map(drop).context(|| "starting a worker thread")
}

#[cfg(test)]
mod tests {
    use std::time::SystemTime;

    use crossbeam_channel::bounded;
    use rustix::fs::{Mode, OFlags};

    use super::super::attributes::Attributes;
    use super::super::handler::{Durability, Handler};
    use super::*;
    use engine::disk::Disk;
    use qcow2::image::Image;
    use sim::start::Start;
    use sim::{Action, SimStorage};

    fn pool(workers: usize) -> (Pool, WorkersEnded) {
        let (alive, ended) = bounded(0);
        let processors = rustix::thread::sched_getaffinity(None).ok();
        let pool = Pool {
            name: "miss",
            misses: Arc::new(Misses::of(MISS_WORKERS)),
            alive,
            processors,
            is_short: AtomicBool::default(),
        };
        (0..workers).for_each(|_| pool.spawn().unwrap());
        (pool, ended)
    }

    fn idle(pool: &Pool) -> Vec<thread::ThreadId> {
        pool.misses.0.lock().idle.iter().map(Thread::id).collect()
    }

    /// Protects: tasks arrive while workers sleep, work and end. Each task is done once, and at the
    /// end all workers end.
    #[test]
    fn every_task_is_done_and_then_all_leave() {
        let (pool, ended) = pool(1);
        let (done, results) = unbounded();
        for number in 0..1000 {
            let done = done.clone();
            pool.put(Box::new(move |buffer| done.send(number + buffer.first(1).len()).unwrap()));
            if number % 7 == 0 {
                results.recv().unwrap();
            }
        }
        drop(pool);
        assert!(ended.recv().is_err());
        assert_eq!(results.try_iter().count(), 1000 - 1000_usize.div_ceil(7));
    }

    /// Protects: tasks that arrive one at a time, each after the one before is done, stay on one
    /// worker.
    #[test]
    fn the_worker_that_was_busy_last_comes_first() {
        let (pool, _ended) = pool(3);
        let all_idle = || {
            while idle(&pool).len() < 3 {
                thread::yield_now();
            }
            idle(&pool)
        };
        let mut last = all_idle()[2];
        for _ in 0..50 {
            let (done, ended) = bounded(1);
            pool.put(Box::new(move |_| done.send(thread::current().id()).unwrap()));
            assert_eq!(ended.recv().unwrap(), last);
            last = all_idle()[2];
        }
    }

    /// Protects: tasks that hang get one worker each, up to the limit. Further tasks wait for the
    /// first worker that becomes free.
    #[test]
    fn there_are_as_many_workers_as_are_needed() {
        let (pool, ended) = pool(1);
        let (release, held) = bounded::<()>(0);
        let (done, results) = unbounded();
        for number in 0..MISS_WORKERS + 5 {
            let (held, done) = (held.clone(), done.clone());
            pool.put(Box::new(move |_| {
                let _ = held.recv();
                done.send(number).unwrap();
            }));
            assert!(pool.misses.0.lock().alive <= (number + 2).min(MISS_WORKERS));
        }
        assert_eq!(pool.misses.0.lock().alive, MISS_WORKERS);
        assert!(results.is_empty());
        drop(release);
        drop(pool);
        assert!(ended.recv().is_err());
        assert_eq!(results.try_iter().count(), MISS_WORKERS + 5);
    }

    /// Protects: a worker may run on all CPUs, although the thread that starts it is bound to one.
    #[test]
    fn workers_run_anywhere() {
        let (pool, _ended) = pool(1);
        let all = rustix::thread::sched_getaffinity(None).unwrap();
        let first = (0..CpuSet::MAX_CPU).find(|&cpu| all.is_set(cpu)).unwrap();
        let (release, held) = bounded::<()>(0);
        let (done, results) = unbounded();
        thread::spawn(move || {
            let mut one = CpuSet::new();
            one.set(first);
            rustix::thread::sched_setaffinity(None, &one).unwrap();
            for _ in 0..3 {
                let (held, done) = (held.clone(), done.clone());
                pool.put(Box::new(move |_| {
                    done.send(rustix::thread::sched_getaffinity(None).unwrap()).unwrap();
                    let _ = held.recv();
                }));
            }
        })
        .join()
        .unwrap();
        for _ in 0..3 {
            assert_eq!(results.recv().unwrap().count(), all.count());
        }
        drop(release);
    }

    /// Protects: when the last worker has panicked, no task is kept. WaitingTasks tasks are
    /// dropped, and that answers their requests.
    #[test]
    fn without_workers_tasks_are_dropped() {
        let (pool, _ended) = pool(1);
        let (done, ended) = bounded::<()>(0);
        let kept = done.clone();
        let (held, hold) = bounded::<()>(0);
        pool.misses.put(Box::new(move |_| {
            let _ = hold.recv();
            panic!("on purpose");
        }));
        pool.misses.put(Box::new(move |_| drop(kept)));
        drop(held);
        while pool.misses.0.lock().alive > 0 {
            thread::yield_now();
        }
        pool.put(Box::new(move |_| drop(done)));
        assert!(ended.recv().is_err());
    }

    /// P1: a flush that is requested while another one waits for the disk is not answered by that
    /// one, which may not cover the writes made before the request.
    #[test]
    fn a_flush_that_comes_during_another_one_waits_for_the_next() {
        let file = SimStorage::new(Start::new("flush", 3, 16, 4, 1 << 20).bytes());
        let disk = Arc::new(Disk::for_tests(Image::open(file.clone()).unwrap(), None));
        let attributes = Attributes::new(0, 0, SystemTime::UNIX_EPOCH, false, false);
        let directory =
            rustix::fs::open("/", OFlags::PATH | OFlags::DIRECTORY, Mode::empty()).unwrap();
        let handler: Arc<dyn FileSystem> = Arc::new(Handler::new(disk, attributes, directory));
        let (workers, ended) = Workers::start(&handler).unwrap();
        handler.write(0, &[1; 65536], Durability::Later).unwrap();
        file.record();
        let (answer, answers) = unbounded();
        let flush = |name: &'static str| {
            let (answer, file) = (answer.clone(), Arc::clone(&file));
            workers.flush(Box::new(move |result| {
                answer.send((name, result, file.recorded_len())).unwrap();
            }));
        };
        let hold = file.hold(|operation| operation.action == Action::Sync);
        flush("first");
        hold.wait_for(1);
        // The write is in place, so that the running flush has nothing to do with it.
        handler.write(0, &[2; 512], Durability::Later).unwrap();
        flush("second");
        drop(hold);
        let (first, second) = (answers.recv().unwrap(), answers.recv().unwrap());
        assert_eq!((first.0, first.1, second.0, second.1), ("first", Ok(()), "second", Ok(())));
        assert!(second.2 > first.2, "no barrier came between the two answers");
        drop(workers);
        assert!(ended.recv().is_err());
    }
}
