//! What a command has when it runs: its arguments, the things it acts upon, and the client's side of the conversation.

use std::sync::Arc;
use std::time::Duration;

use crossbeam_channel::Sender;
use parking_lot::Mutex;

use super::arguments::Arguments;
use super::codec::Oob;
use crate::Result;
use crate::disk::{Disk, DiskInfo, DiskStats};
use crate::job::{Hold, Jobs};
use crate::stream::{Priority, StreamOptions, Streams};

/// What the commands act upon.
#[derive(Clone)]
pub struct Target {
    /// The disk.
    pub disk: Arc<Disk>,
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
    /// Called with the size in bytes that the disk has grown to, before the client that asked for it is answered.
    pub grown: Arc<dyn Fn(u64) + Send + Sync>,
}

impl std::fmt::Debug for Target {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Target").field("disk", &self.disk).field("jobs", &self.jobs).field("device", &self.device).finish_non_exhaustive()
    }
}

/// [`Target`] with the disk behind two functions, so that the conversation can be tested without one.
pub(super) struct Backend {
    pub jobs: Jobs,
    pub streams: Streams,
    pub device: String,
    pub quit: Sender<()>,
    /// Between the look at the jobs there are and the start of another one, or a change of size. Taken while no other lock is held.
    pub starting: Mutex<()>,
    pub info: Box<dyn Fn() -> Result<DiskInfo> + Send + Sync>,
    pub stats: Box<dyn Fn() -> DiskStats + Send + Sync>,
    pub grow: Box<dyn Fn(u64) -> Result<()> + Send + Sync>,
    pub start_stream: Box<dyn Fn(StreamOptions) -> Result<()> + Send + Sync>,
}

impl From<Target> for Backend {
    fn from(target: Target) -> Self {
        let Target { disk, jobs, streams, device, priority, quit, grown } = target;
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
        Backend { jobs, streams, device, quit, starting: Mutex::default(), info: Box::new(move || disk.info()), stats, grow, start_stream }
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
