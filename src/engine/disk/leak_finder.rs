//! The thread that searches for the leaks of a process that has died, while its guest lives on
//! ([`Image::search_step`](qcow2::image::Image::search_step)).
//!
//! A step reads one table of the overlay at most, and no request waits for longer than that step.
//! Between steps the thread pauses, so that it uses at most a tenth of the time. It holds no lock
//! and no range while it pauses.

use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, RecvTimeoutError, Sender};

use super::Disk;
use host::Result;
use qcow2::image::SearchStep;

/// Time before the first step: the kernel sends again what the dead process has not answered, and
/// the guest has waited for that.
const START: Duration = Duration::from_millis(100);
/// Steps are made for this long before a pause. A step of an empty or small table takes a few
/// microseconds, and a pause after each would make the search of a large disk take hours.
const SLICE: Duration = Duration::from_millis(1);
/// A pause is this multiple of the time that the steps before it took.
const PAUSE: u32 = 9;

/// A thread that searches for leaks, until the search or this handle ends. The drop waits for the
/// end of a running step. What is not found by then is left to the next open of the overlay.
#[derive(Debug)]
pub struct LeakFinder {
    stop: Option<Sender<()>>,
    thread: Option<thread::JoinHandle<()>>,
}

impl LeakFinder {
    /// Starts the thread. It ends at once if no process has died. If the thread cannot be started,
    /// that is logged, and the next open searches.
    pub fn start(disk: &Arc<Disk>) -> LeakFinder {
        let disk = Arc::clone(disk);
        let (stop, stopped) = crossbeam_channel::bounded(0);
        let body = move || search(&disk, &stopped);
        match thread::Builder::new().name("leaks".to_string()).spawn(body) {
            Ok(thread) => LeakFinder { stop: Some(stop), thread: Some(thread) },
            Err(error) => {
                log::warn!("starting the search for leaks: {error}; the next mount searches");
                LeakFinder { stop: None, thread: None }
            }
        }
    }
}

impl Drop for LeakFinder {
    fn drop(&mut self) {
        self.stop = None;
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// Searches until everything is found, or `stopped` is disconnected.
fn search(disk: &Disk, stopped: &Receiver<()>) {
    let name = disk.path.display();
    let mut pause = START;
    while stopped.recv_timeout(pause) == Err(RecvTimeoutError::Timeout) {
        let start = Instant::now();
        let found = match slice(disk, start) {
            Ok(SearchStep::Nothing) => return,
            Ok(SearchStep::Part) => None,
            Ok(SearchStep::Last { clusters, is_all }) => Some((clusters, is_all)),
            Err(error) => {
                return log::warn!(
                    "{name}: the search for leaks has ended, the next mount searches again: {error}"
                );
            }
        };
        if let Some((clusters, is_all)) = found {
            // The commit timer repeats a flush that fails, and logs why.
            if clusters > 0 && disk.flush_if_dirty().is_err() {
                return;
            }
            let bytes = clusters * disk.cluster_size();
            let rest = if is_all { "" } else { "; the next mount looks for more" };
            return log::info!(
                "{name}: {clusters} leaked clusters ({bytes} bytes) of the last process were given back{rest}"
            );
        }
        pause = start.elapsed().saturating_mul(PAUSE);
    }
}

/// Makes steps for [`SLICE`], and one at least. Returns what the last one did.
fn slice(disk: &Disk, start: Instant) -> Result<SearchStep> {
    loop {
        let step = disk.search_step()?;
        if step != SearchStep::Part || start.elapsed() >= SLICE {
            return Ok(step);
        }
    }
}
