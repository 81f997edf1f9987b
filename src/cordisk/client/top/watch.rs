//! Threads that query disks. Each disk has its own thread, so that a daemon that hangs delays only
//! its own line. One more thread finds disks.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, RecvTimeoutError, Sender, bounded};
use serde_json::json;

use super::model::LastSeen;
use crate::client::{Connection, FoundDisk, facts, find, find_all};
use host::Result;
use host::error::Context;

/// Shortest time between two searches for disks.
const FIND_EVERY: Duration = Duration::from_secs(2);

/// A report of a thread to the main thread.
#[derive(Debug)]
pub(super) enum Report {
    /// The result of a query of the disk with this index.
    LastSeen(usize, Box<Result<LastSeen, String>>),
    /// The result of a key.
    Message(String),
    /// The names of the running disks.
    Running(Vec<PathBuf>),
}

/// The map that the screen needs, shared by all threads.
#[derive(Debug, Default)]
pub(super) struct WatchRequest {
    /// The index of the disk whose map is shown.
    pub disk: AtomicUsize,
    /// The requested number of cells of the map.
    pub cells: AtomicU64,
}

/// An order to a thread.
#[derive(Clone, Copy, Debug)]
pub(super) enum WatchOrder {
    /// Query the disk now.
    PictureStyle,
    /// Pause the job, or resume it.
    Toggle,
}

/// Starts a thread that queries one disk repeatedly, until the returned sender is dropped.
pub(super) fn watch(
    index: usize,
    target: PathBuf,
    interval: Duration,
    wanted: Arc<WatchRequest>,
    reports: Sender<Report>,
) -> Result<Sender<WatchOrder>> {
    // The queue is short: keys that are pressed faster than the daemon answers are dropped.
    let (orders, to_do) = bounded(4);
    let watcher = Watcher { index, target, interval, wanted, reports, connection: None };
    thread::Builder::new()
        .name("watch".into())
        .spawn(move || watcher.run(&to_do))
        .context(|| "a thread that looks at a disk")?;
    Ok(orders)
}

struct Watcher {
    index: usize,
    target: PathBuf,
    interval: Duration,
    wanted: Arc<WatchRequest>,
    reports: Sender<Report>,
    connection: Option<Connection>,
}

impl Watcher {
    fn run(mut self, orders: &Receiver<WatchOrder>) {
        let mut next = Instant::now();
        loop {
            let seen = self.look();
            if seen.is_err() {
                self.connection = None;
            }
            if self
                .reports
                .send(Report::LastSeen(
                    self.index,
                    Box::new(seen.map_err(|error| error.to_string())),
                ))
                .is_err()
            {
                return;
            }
            next = (next + self.interval).max(Instant::now());
            match orders.recv_deadline(next) {
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => return,
                Ok(WatchOrder::PictureStyle) => {}
                Ok(WatchOrder::Toggle) => {
                    let message = self.toggle().unwrap_or_else(|error| error.to_string());
                    if self.reports.send(Report::Message(message)).is_err() {
                        return;
                    }
                }
            }
        }
    }

    fn look(&mut self) -> Result<LastSeen> {
        let cells = (self.wanted.disk.load(Ordering::Relaxed) == self.index)
            .then(|| self.wanted.cells.load(Ordering::Relaxed));
        look(self.connected()?, cells)
    }

    fn connected(&mut self) -> Result<&mut Connection> {
        let connection = match self.connection.take() {
            Some(connection) => connection,
            None => connect(&self.target)?,
        };
        Ok(self.connection.insert(connection))
    }

    /// Pauses the running job, or resumes a paused one.
    fn toggle(&mut self) -> Result<String> {
        let connection = self.connected()?;
        let status = facts::status(connection)?;
        let Some(job) = status.jobs.first() else { return Ok("there is no job to pause".into()) };
        let (command, done) = if job.is_paused() {
            ("job-resume", "goes on")
        } else {
            ("job-pause", "is paused; p lets it go on")
        };
        connection.execute(command, json!({ "id": job.id }))?;
        Ok(format!("the {} {done}", job.kind))
    }
}

/// Connects to the disk that `target` names.
pub(super) fn connect(target: &Path) -> Result<Connection> {
    crate::client::connect(target).map(|(connection, _)| connection)
}

/// Queries the facts, and a map of `cells` cells if requested.
pub(super) fn look(connection: &mut Connection, cells: Option<u64>) -> Result<LastSeen> {
    let status = facts::status(connection)?;
    let at = Instant::now();
    let cells = cells.map(|cells| facts::cells(connection, cells)).transpose()?;
    Ok(LastSeen { status, cells, at })
}

/// Returns the names of all running disks.
pub(super) fn running() -> Result<Vec<PathBuf>> {
    let disks = find_all()?.into_iter();
    Ok(disks
        .filter_map(|target| match target {
            // A mountpoint as name finds the disk again if it comes back with another socket.
            FoundDisk::Running(disk) if find(Path::new(&disk.name)).is_ok() => {
                Some(PathBuf::from(disk.name))
            }
            FoundDisk::Running(disk) => Some(disk.socket),
            FoundDisk::Dead(_) | FoundDisk::Unregistered(_) => None,
        })
        .collect())
}

/// Starts a thread that searches for disks repeatedly, until the receiver is dropped.
pub(super) fn find_disks(interval: Duration, reports: Sender<Report>) -> Result<()> {
    let pause = interval.max(FIND_EVERY);
    let body = move || {
        loop {
            // A temporary failure to read the list of mounts does not stop the thread.
            let found = running().unwrap_or_default();
            if reports.send(Report::Running(found)).is_err() {
                return;
            }
            thread::sleep(pause);
        }
    };
    thread::Builder::new()
        .name("find".into())
        .spawn(body)
        .map(drop)
        .context(|| "a thread that looks for disks")
}
