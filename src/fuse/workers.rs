//! Where requests wait that cannot be answered at once, so that session threads never do.
//!
//! *Misses* need an allocation, a range that is in use, or a backing file. There are two pools of
//! [`MISS_WORKERS`] threads for them, each of which takes them in order of arrival: one for what needs no
//! backing file, or may not need one, and one for what does. A backing file that hangs stops the second
//! pool and nothing else. Of the threads that have nothing to do the one that was busy last is woken: its
//! buffer may still be in the processor's cache, and as many are used as are needed.
//! *Flushes* have a thread of their own, so that they never sit behind misses that hang on a dead backing file. It answers all flushes
//! that wait with one call of [`FileSystem::flush`]: whatever was answered before a flush was asked for was answered before that call (P1).
//! (A *write* that hangs does hold up fsync, in the kernel: the write has the inode lock shared, fsync wants it exclusive.)
//!
//! Both queues are unbounded, because a bounded one would make session threads wait exactly when hits must go on. The kernel bounds what
//! can be in them: at most `max_background` asynchronous requests, and one synchronous request for each client thread that waits, each
//! of at most 1 MiB of data to write; reads bring no buffer with them.
//!
//! A panic in a task is a broken invariant. In release it ends the process (`panic = "abort"`, architecture D7); in tests it ends its
//! worker, and the reply answers EIO when it is dropped.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::sync::Arc;
use std::thread::{self, Thread};

use crossbeam_channel::{Receiver, Sender, unbounded};
use parking_lot::Mutex;
use rustix::io::Errno;
use rustix::thread::CpuSet;

use super::file_system::FileSystem;
use crate::Result;
use crate::error::Context;
use crate::mutants::{Step, without};

/// Threads of each pool, at most: there is one, and one more whenever a miss comes and all are busy. They wait for the disk most of the time, so this is not a number of cores: it is how many reads from below, and
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
    local: Arc<Entrance>,
    below: Arc<Entrance>,
    flushes: Sender<Flushed>,
}

/// Where misses come in. When it is dropped no more come.
struct Entrance {
    /// The names of the threads begin with it.
    name: &'static str,
    misses: Arc<Misses>,
    /// Held by every worker.
    alive: Sender<Infallible>,
    /// Where workers may run. A thread inherits that from the one that starts it, and the servers of rings keep to one processor each.
    processors: Option<CpuSet>,
}

impl Entrance {
    /// One more worker.
    fn hire(&self) -> Result<()> {
        let (misses, alive) = (Arc::clone(&self.misses), self.alive.clone());
        // Before it starts: whoever has a task may come first.
        let number = {
            let mut waiting = misses.0.lock();
            if waiting.alive == MISS_WORKERS {
                return Ok(()); // somebody else was faster
            }
            waiting.alive += 1;
            waiting.alive - 1
        };
        let (leaves, processors) = (Leaves(Arc::clone(&misses)), self.processors);
        spawn(format!("{}-{number}", self.name), move || {
            let (_alive, _leaves) = (alive, leaves);
            if let Some(processors) = processors {
                let _ = rustix::thread::sched_setaffinity(None, &processors);
            }
            misses.work();
        })
    }

    fn put(&self, task: Task) {
        if self.misses.put(task) == Hands::TooFew
            && let Err(error) = self.hire()
        {
            // Those that there are come to it, one after the other.
            log::warn!("{error}");
        }
    }
}

/// Whether somebody is there for a task that has come.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Hands {
    Enough,
    /// Nobody is idle, and there may be more workers.
    TooFew,
}

/// Misses that wait for a worker, and workers that wait for a miss: never both.
#[derive(Default)]
struct Misses(Mutex<Waiting>);

#[derive(Default)]
struct Waiting {
    /// In order of arrival.
    tasks: VecDeque<Task>,
    /// The one that was busy last is the last.
    idle: Vec<Thread>,
    /// Workers that have not ended.
    alive: usize,
    is_closed: bool,
}

impl Misses {
    fn put(&self, task: Task) -> Hands {
        let mut waiting = self.0.lock();
        // Without workers (all have panicked) the task drops its reply, which answers EIO.
        if waiting.alive == 0 {
            return Hands::Enough;
        }
        waiting.tasks.push_back(task);
        let (idle, alive) = (waiting.idle.pop(), waiting.alive);
        drop(waiting);
        match idle {
            Some(worker) => worker.unpark(),
            None if alive < MISS_WORKERS => return Hands::TooFew,
            None => {}
        }
        Hands::Enough
    }

    /// The next task, waiting for it; `None` when no more come.
    fn take(&self) -> Option<Task> {
        let this = thread::current();
        loop {
            let mut waiting = self.0.lock();
            // Who was woken without a reason stands on the list still.
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

/// A worker; dropped when it ends, also by a panic.
struct Leaves(Arc<Misses>);

impl Drop for Leaves {
    fn drop(&mut self) {
        let mut waiting = self.0.0.lock();
        waiting.alive -= 1;
        let orphans = if waiting.alive == 0 { std::mem::take(&mut waiting.tasks) } else { VecDeque::new() };
        drop(waiting);
        drop(orphans);
    }
}

impl Drop for Entrance {
    fn drop(&mut self) {
        let mut waiting = self.misses.0.lock();
        waiting.is_closed = true;
        let idle = std::mem::take(&mut waiting.idle);
        drop(waiting);
        idle.iter().for_each(Thread::unpark);
    }
}

/// Disconnected once all threads have ended.
pub(super) type Ended = Receiver<Infallible>;

impl Workers {
    /// Starts the threads.
    ///
    /// # Errors
    /// The system has no more threads; those started end again.
    pub(super) fn start(file_system: &Arc<dyn FileSystem>) -> Result<(Workers, Ended)> {
        let (flushes, flush_queue) = unbounded::<Flushed>();
        let (alive, ended) = crossbeam_channel::bounded::<Infallible>(0);
        let processors = rustix::thread::sched_getaffinity(None).ok();
        let pool = |name| -> Result<Arc<Entrance>> {
            let entrance = Entrance { name, misses: Arc::default(), alive: alive.clone(), processors };
            entrance.hire()?;
            Ok(Arc::new(entrance))
        };
        let (local, below) = (pool("local")?, pool("below")?);
        let file_system = Arc::clone(file_system);
        spawn("flush".to_string(), move || {
            let _alive = alive;
            while let Ok(first) = flush_queue.recv() {
                let mut waiting: Vec<Flushed> = std::iter::once(first).chain(flush_queue.try_iter()).collect();
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

    /// Runs `task`, which does not wait for a backing file, on a worker. Never waits.
    pub(super) fn local(&self, task: Task) {
        self.local.put(task);
    }

    /// Runs `task`, which may, on a worker. Never waits.
    pub(super) fn below(&self, task: Task) {
        self.below.put(task);
    }

    /// Runs `flushed` after a flush that has not begun yet. Never waits.
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
    use crate::disk::Disk;
    use crate::image::Image;
    use crate::simulation::start::Start;
    use crate::simulation::{Action, SimStorage};

    fn entrance(workers: usize) -> (Entrance, Ended) {
        let (alive, ended) = bounded(0);
        let entrance = Entrance { name: "miss", misses: Arc::default(), alive, processors: rustix::thread::sched_getaffinity(None).ok() };
        (0..workers).for_each(|_| entrance.hire().unwrap());
        (entrance, ended)
    }

    fn idle(entrance: &Entrance) -> Vec<thread::ThreadId> {
        entrance.misses.0.lock().idle.iter().map(Thread::id).collect()
    }

    /// Tasks of all kinds of arrival, with workers that sleep, work and end: each is done once, and at the end all workers leave.
    #[test]
    fn every_task_is_done_and_then_all_leave() {
        let (entrance, ended) = entrance(1);
        let (done, results) = unbounded();
        for number in 0..1000 {
            let done = done.clone();
            entrance.put(Box::new(move |buffer| done.send(number + buffer.first(1).len()).unwrap()));
            if number % 7 == 0 {
                results.recv().unwrap();
            }
        }
        drop(entrance);
        assert!(ended.recv().is_err());
        assert_eq!(results.try_iter().count(), 1000 - 1000_usize.div_ceil(7));
    }

    /// Tasks that arrive one at a time, each when the one before is done, stay with one worker.
    #[test]
    fn the_worker_that_was_busy_last_comes_first() {
        let (entrance, _ended) = entrance(3);
        let all_idle = || {
            while idle(&entrance).len() < 3 {
                thread::yield_now();
            }
            idle(&entrance)
        };
        let mut last = all_idle()[2];
        for _ in 0..50 {
            let (done, ended) = bounded(1);
            entrance.put(Box::new(move |_| done.send(thread::current().id()).unwrap()));
            assert_eq!(ended.recv().unwrap(), last);
            last = all_idle()[2];
        }
    }

    /// As many workers as there are tasks that hang, up to the limit; what comes then waits for the first that is free.
    #[test]
    fn there_are_as_many_workers_as_are_needed() {
        let (entrance, ended) = entrance(1);
        let (release, held) = bounded::<()>(0);
        let (done, results) = unbounded();
        for number in 0..MISS_WORKERS + 5 {
            let (held, done) = (held.clone(), done.clone());
            entrance.put(Box::new(move |_| {
                let _ = held.recv();
                done.send(number).unwrap();
            }));
            assert!(entrance.misses.0.lock().alive <= (number + 2).min(MISS_WORKERS));
        }
        assert_eq!(entrance.misses.0.lock().alive, MISS_WORKERS);
        assert!(results.is_empty());
        drop(release);
        drop(entrance);
        assert!(ended.recv().is_err());
        assert_eq!(results.try_iter().count(), MISS_WORKERS + 5);
    }

    /// A worker that a thread starts which keeps to one processor may run on all of them.
    #[test]
    fn workers_run_anywhere() {
        let (entrance, _ended) = entrance(1);
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
                entrance.put(Box::new(move |_| {
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

    /// When the last worker has panicked nothing is kept: what waits is dropped, which is what answers it.
    #[test]
    fn without_workers_tasks_are_dropped() {
        let (entrance, _ended) = entrance(1);
        let (done, ended) = bounded::<()>(0);
        let kept = done.clone();
        let (held, hold) = bounded::<()>(0);
        entrance.misses.put(Box::new(move |_| {
            let _ = hold.recv();
            panic!("on purpose");
        }));
        entrance.misses.put(Box::new(move |_| drop(kept)));
        drop(held);
        while entrance.misses.0.lock().alive > 0 {
            thread::yield_now();
        }
        entrance.put(Box::new(move |_| drop(done)));
        assert!(ended.recv().is_err());
    }

    /// P1: a flush that is asked for while another one waits for the disk is not answered by that one,
    /// which may not cover what was written before it was asked for.
    #[test]
    fn a_flush_that_comes_during_another_one_waits_for_the_next() {
        let file = SimStorage::new(Start::new("flush", 3, 16, 4, 1 << 20).bytes());
        let disk = Arc::new(Disk::for_tests(Image::open(file.clone()).unwrap(), None));
        let attributes = Attributes::new(0, 0, SystemTime::UNIX_EPOCH, false, false);
        let directory = rustix::fs::open("/", OFlags::PATH | OFlags::DIRECTORY, Mode::empty()).unwrap();
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
        // In place, so that the running flush has nothing to do with it.
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
