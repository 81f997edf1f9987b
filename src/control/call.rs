//! The context of a running command: its arguments, the objects it acts on, and the client's
//! session.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use crossbeam_channel::Sender;

use super::arguments::Arguments;
use super::codec::Oob;
use super::facts::{OrderBase, SourceStatus, TakeoverFacts};
use engine::disk::Disk;
use engine::job::{Hold, Jobs};
use engine::stream::{Priority, Streams};
use log::Level;

/// Objects that commands act on.
#[derive(Clone)]
pub struct Target {
    /// The disk.
    pub disk: Arc<Disk>,
    /// Absolute path of the mounted disk.
    pub mountpoint: PathBuf,
    /// Process id of the daemon's main process, to which signals are sent.
    pub pid: u32,
    /// When the disk was mounted.
    pub started: SystemTime,
    /// Jobs of the disk.
    pub jobs: Jobs,
    /// Streams of the disk, which are among its jobs.
    pub streams: Streams,
    /// Name of the disk, and default id of its jobs: a letter, then letters, digits, `-`, `.` and
    /// `_`.
    pub device: String,
    /// Priority of the streams that commands start.
    pub priority: Priority,
    /// Channel that gets a message when a client asks to quit. The sender does not wait, so the
    /// channel needs space for one message.
    pub quit: Sender<()>,
    /// Tests whether a path leads to a given file.
    pub is_file: IsFile,
    /// Log of this process.
    pub log: LogFacts,
    /// Address of the metrics server.
    pub metrics: Option<SocketAddr>,
    /// Called with the new size in bytes when the disk has grown, before the client gets its reply.
    pub grown: Arc<dyn Fn(u64) + Send + Sync>,
    /// Tests whether requests of the kernel are answered. Called by threads of the socket, which
    /// serve no such request.
    pub is_answering: Answering,
    /// The servers of remote backing files. Asks the fetcher, for a bounded time, and no server.
    pub sources: SourceStatuses,
    /// What happens if this process is killed.
    pub takeover: TakeoverSource,
    /// What an order of this disk belongs to.
    pub order_base: OrderBaseSource,
}

/// Returns what an order of the disk belongs to; `None` if that is not known, or not yet.
pub type OrderBaseSource = Arc<dyn Fn() -> Option<OrderBase> + Send + Sync>;

/// Returns what happens if the serving process is killed.
pub type TakeoverSource = Arc<dyn Fn() -> TakeoverFacts + Send + Sync>;

/// Returns the state of each server of a remote backing file.
pub type SourceStatuses = Arc<dyn Fn() -> Vec<SourceStatus> + Send + Sync>;

impl std::fmt::Debug for Target {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Target")
            .field("disk", &self.disk)
            .field("jobs", &self.jobs)
            .field("device", &self.device)
            .finish_non_exhaustive()
    }
}

/// Facts about the log of this process.
#[derive(Clone)]
pub struct LogFacts {
    /// Destination of the log: `journal`, `syslog` or a file; `None` for standard error only.
    pub place: Option<String>,
    /// Returns the last warning or error that was logged.
    pub last_warning: Arc<dyn Fn() -> Option<Warning> + Send + Sync>,
}

/// A log message of level `warn` or `error`.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Warning {
    /// `warn` or `error`.
    pub level: Level,
    /// Time of the message.
    pub time: SystemTime,
    /// Text of the message, one line.
    pub message: String,
}

/// Tests whether a path leads to the file of this device and inode. Another process answers,
/// because the serving process may not look up paths.
pub type IsFile = Arc<dyn Fn(&Path, (u64, u64)) -> bool + Send + Sync>;

/// Tests whether requests of the kernel are answered.
pub type Answering = Arc<dyn Fn() -> bool + Send + Sync>;

/// State of a client's session.
#[derive(Debug)]
pub(super) struct Session {
    /// The client has negotiated capabilities: it may run any command, and gets events.
    pub negotiated: bool,
    pub oob: Oob,
    /// Holds all jobs at their checkpoints until the reply was queued.
    pub hold: Option<Hold>,
    /// The client's new setting of progress events, until the reply was queued.
    pub progress: Option<ProgressEvents>,
    /// The client has asked to quit; its reply comes last.
    pub quitting: bool,
}

/// Whether, and how often, a client gets progress events.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum ProgressEvents {
    Off,
    Every(Duration),
}

/// A running command.
pub(super) struct Call<'a> {
    pub arguments: Arguments,
    pub target: &'a Target,
    pub session: &'a mut Session,
}
