//! Threads that look at disks: one for each, so that a daemon that hangs holds up nobody but its own line; and one that finds disks.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, RecvTimeoutError, Sender, bounded};
use serde_json::json;

use super::model::Seen;
use crate::Result;
use crate::client::{Connection, Target, facts, find, find_all};
use crate::error::Context;

/// How often disks are looked for, at most.
const FIND_EVERY: Duration = Duration::from_secs(2);

/// What a thread has to tell.
#[derive(Debug)]
pub(super) enum Report {
    /// What was seen of the disk of this number.
    Seen(usize, Box<Result<Seen, String>>),
    /// What came of a key.
    Message(String),
    /// The disks that run, by name.
    Running(Vec<PathBuf>),
}

/// What the screen wants to know, for all threads.
#[derive(Debug, Default)]
pub(super) struct Wanted {
    /// The number of the disk whose map is shown.
    pub disk: AtomicUsize,
    /// How many cells the map is to have.
    pub cells: AtomicU64,
}

/// What a thread is told.
#[derive(Clone, Copy, Debug)]
pub(super) enum Order {
    /// Look now.
    Look,
    /// Pause the job, or resume it.
    Toggle,
}

/// Looks at one disk again and again, until nobody gives orders any more.
pub(super) fn watch(
    index: usize,
    target: PathBuf,
    interval: Duration,
    wanted: Arc<Wanted>,
    reports: Sender<Report>,
) -> Result<Sender<Order>> {
    // Whoever presses keys faster than a daemon answers does not make a queue of them.
    let (orders, to_do) = bounded(4);
    let watcher = Watcher { index, target, interval, wanted, reports, connection: None };
    thread::Builder::new().name("watch".into()).spawn(move || watcher.run(&to_do)).context(|| "a thread that looks at a disk")?;
    Ok(orders)
}

struct Watcher {
    index: usize,
    target: PathBuf,
    interval: Duration,
    wanted: Arc<Wanted>,
    reports: Sender<Report>,
    connection: Option<Connection>,
}

impl Watcher {
    fn run(mut self, orders: &Receiver<Order>) {
        let mut next = Instant::now();
        loop {
            let seen = self.look();
            if seen.is_err() {
                self.connection = None;
            }
            if self.reports.send(Report::Seen(self.index, Box::new(seen.map_err(|error| error.to_string())))).is_err() {
                return;
            }
            next = (next + self.interval).max(Instant::now());
            match orders.recv_deadline(next) {
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => return,
                Ok(Order::Look) => {}
                Ok(Order::Toggle) => {
                    let message = self.toggle().unwrap_or_else(|error| error.to_string());
                    if self.reports.send(Report::Message(message)).is_err() {
                        return;
                    }
                }
            }
        }
    }

    fn look(&mut self) -> Result<Seen> {
        let cells = (self.wanted.disk.load(Ordering::Relaxed) == self.index).then(|| self.wanted.cells.load(Ordering::Relaxed));
        look(self.connected()?, cells)
    }

    fn connected(&mut self) -> Result<&mut Connection> {
        let connection = match self.connection.take() {
            Some(connection) => connection,
            None => connect(&self.target)?,
        };
        Ok(self.connection.insert(connection))
    }

    /// Pauses the job that runs, or resumes the one that is paused.
    fn toggle(&mut self) -> Result<String> {
        let connection = self.connected()?;
        let status = facts::status(connection)?;
        let Some(job) = status.jobs.first() else { return Ok("there is no job to pause".into()) };
        let (command, done) = if job.is_paused() { ("job-resume", "goes on") } else { ("job-pause", "is paused; p lets it go on") };
        connection.execute(command, json!({ "id": job.id }))?;
        Ok(format!("the {} {done}", job.kind))
    }
}

/// Connects to the disk of that name.
pub(super) fn connect(target: &Path) -> Result<Connection> {
    crate::client::connect(target).map(|(connection, _)| connection)
}

/// Asks for the facts, and for a map of so many cells where that is wanted.
pub(super) fn look(connection: &mut Connection, cells: Option<u64>) -> Result<Seen> {
    let status = facts::status(connection)?;
    let at = Instant::now();
    let cells = cells.map(|cells| facts::cells(connection, cells)).transpose()?;
    Ok(Seen { status, cells, at })
}

/// Names of all disks that run.
pub(super) fn running() -> Result<Vec<PathBuf>> {
    let disks = find_all()?.into_iter();
    Ok(disks
        .filter_map(|target| match target {
            // By its mountpoint it is found again when it comes back with another socket.
            Target::Running(disk) if find(Path::new(&disk.name)).is_ok() => Some(PathBuf::from(disk.name)),
            Target::Running(disk) => Some(disk.socket),
            Target::Dead(_) | Target::Unregistered(_) => None,
        })
        .collect())
}

/// Looks for disks again and again, until nobody listens any more.
pub(super) fn find_disks(interval: Duration, reports: Sender<Report>) -> Result<()> {
    let pause = interval.max(FIND_EVERY);
    let body = move || {
        loop {
            // That the list of mounts cannot be read for a moment is no reason to stop.
            let found = running().unwrap_or_default();
            if reports.send(Report::Running(found)).is_err() {
                return;
            }
            thread::sleep(pause);
        }
    };
    thread::Builder::new().name("find".into()).spawn(body).map(drop).context(|| "a thread that looks for disks")
}
