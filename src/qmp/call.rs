//! What a command has when it runs: its arguments, the things it acts upon, and the client's side of the conversation.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use crossbeam_channel::Sender;
use parking_lot::Mutex;

use super::arguments::Arguments;
use super::codec::Oob;
use crate::Result;
use crate::disk::{CopyPause, Disk, DiskInfo, DiskStats, GuestFailure, Survey, Totals};
use crate::job::{Hold, Jobs};
use crate::logging::{Log, Warning};
use crate::map::{self, Page};
use crate::stream::{Priority, StreamOptions, Streams};

/// What the commands act upon.
#[derive(Clone)]
pub struct Target {
    /// The disk.
    pub disk: Arc<Disk>,
    /// Where it appears, absolute.
    pub mountpoint: PathBuf,
    /// Its jobs.
    pub jobs: Jobs,
    /// Its streams, which are among those jobs.
    pub streams: Streams,
    /// The name by which clients call the disk, and its jobs unless they say otherwise: a letter, then letters, digits, `-`, `.` and `_`.
    pub device: String,
    /// That of the streams it starts.
    pub priority: Priority,
    /// Where a client's wish to end the process is sent, without waiting: give the channel room for one.
    pub quit: Sender<()>,
    /// How it is found out which file a path leads to.
    pub is_file: IsFile,
    /// The log of this process.
    pub log: Log,
    /// Where metrics are served.
    pub metrics: Option<SocketAddr>,
    /// Called with the size in bytes that the disk has grown to, before the client that asked for it is answered.
    pub grown: Arc<dyn Fn(u64) + Send + Sync>,
    /// Whether the requests that the kernel sends are answered. Called by threads of the socket, which serve no such request.
    pub is_answering: Answering,
}

impl std::fmt::Debug for Target {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Target").field("disk", &self.disk).field("jobs", &self.jobs).field("device", &self.device).finish_non_exhaustive()
    }
}

/// Says whether a path leads to the file of this device and inode: not by itself, as the process
/// may not look at paths.
pub type IsFile = Arc<dyn Fn(&Path, (u64, u64)) -> bool + Send + Sync>;

/// Whether the requests that the kernel sends are answered.
pub type Answering = Arc<dyn Fn() -> bool + Send + Sync>;

/// [`Target`] with the disk behind two functions, so that the conversation can be tested without one.
pub(super) struct Backend {
    pub jobs: Jobs,
    pub streams: Streams,
    pub device: String,
    pub quit: Sender<()>,
    /// Between the look at the jobs there are and the start of another one, or a change of size. Taken while no other lock is held.
    pub starting: Arc<Mutex<()>>,
    pub info: Box<dyn Fn() -> Result<DiskInfo> + Send + Sync>,
    pub stats: Box<dyn Fn() -> DiskStats + Send + Sync>,
    pub facts: Facts,
    /// Whether a path leads to the file of this device and inode.
    pub is_file: IsFile,
    pub grow: Box<dyn Fn(u64) -> Result<()> + Send + Sync>,
    pub start_stream: Box<dyn Fn(StreamOptions) -> Result<()> + Send + Sync>,
}

/// What is told of the disk without a word for it in QEMU's language.
pub(super) struct Facts {
    pub mountpoint: PathBuf,
    /// When the disk began to be served.
    pub started: SystemTime,
    /// Where metrics are served, as a socket address.
    pub metrics: Option<SocketAddr>,
    /// Where the log goes, if not to standard error.
    pub log: Option<String>,
    pub is_usable: Box<dyn Fn() -> bool + Send + Sync>,
    pub troubles: Box<dyn Fn() -> Troubles + Send + Sync>,
    pub is_answering: Box<dyn Fn() -> bool + Send + Sync>,
    pub totals: Box<dyn Fn() -> Result<Totals> + Send + Sync>,
    pub survey: Box<dyn Fn(u64) -> Result<Arc<Survey>> + Send + Sync>,
    pub extents: Box<dyn Fn(u64, usize) -> Result<Page> + Send + Sync>,
}

/// What went wrong, as long as nothing newer has.
#[derive(Debug, Default)]
pub(super) struct Troubles {
    pub failure: Option<GuestFailure>,
    pub copy_pause: Option<CopyPause>,
    pub warning: Option<Warning>,
}

impl Facts {
    fn of(disk: &Arc<Disk>, mountpoint: PathBuf, log: Log, metrics: Option<SocketAddr>, is_answering: Answering) -> Facts {
        let [first, second, third, fourth, fifth] = std::array::from_fn(|_| Arc::clone(disk));
        Facts {
            mountpoint,
            metrics,
            log: log.place().map(str::to_owned),
            troubles: Box::new(move || Troubles {
                failure: fifth.last_failure(),
                copy_pause: fifth.copy_pause(),
                warning: log.last_warning(),
            }),
            started: SystemTime::now(),
            is_usable: Box::new(move || first.is_usable()),
            is_answering: Box::new(move || is_answering()),
            totals: Box::new(move || second.totals()),
            survey: Box::new(move |cells| third.survey(cells)),
            extents: Box::new(move |from, limit| map::extents(&fourth, from, limit)),
        }
    }
}

impl From<Target> for Backend {
    fn from(target: Target) -> Self {
        let Target { disk, mountpoint, jobs, streams, device, priority, quit, is_file, log, metrics, grown, is_answering } = target;
        let facts = Facts::of(&disk, mountpoint, log, metrics, is_answering);
        let starting = streams.starting();
        let start_stream = {
            let (disk, streams) = (Arc::clone(&disk), streams.clone());
            Box::new(move |options| streams.start(&disk, StreamOptions { priority, ..options }))
        };
        let grow = {
            let disk = Arc::clone(&disk);
            Box::new(move |size| disk.grow(size).map(|()| grown(size)))
        };
        let stats = {
            let disk = Arc::clone(&disk);
            Box::new(move || disk.stats())
        };
        Backend { jobs, streams, device, quit, starting, info: Box::new(move || disk.info()), stats, facts, is_file, grow, start_stream }
    }
}

/// What one client has said so far.
#[derive(Debug)]
pub(super) struct Session {
    /// It has negotiated capabilities: it may ask anything, and is told of events.
    pub negotiated: bool,
    pub oob: Oob,
    /// Keeps jobs at their checkpoints until the reply is on its way.
    pub hold: Option<Hold>,
    /// What it has just asked for, until its reply is on the way.
    pub progress: Option<ProgressEvents>,
    /// It has asked for the end of the process; its reply comes last of all.
    pub quitting: bool,
}

/// Whether a client is told how far jobs have come.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum ProgressEvents {
    Off,
    Every(Duration),
}

/// A command that runs.
pub(super) struct Call<'a> {
    pub arguments: Arguments,
    pub backend: &'a Backend,
    pub session: &'a mut Session,
}
