//! The messages between the serving process and the keeper: a request and its reply in turns, each
//! message at most [`LONGEST`] bytes.

use std::ffi::{OsStr, OsString};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::logging::{Daemon, Owners};
use crate::mount::MountPlan;
use host::{Error, ErrorKind, Result, packet};

/// The longest message in bytes. A path has at most 4096 bytes, and a message has at most four of
/// them; the rest is for a command.
pub(super) const LONGEST: usize = 128 << 10;

/// The longest text of [`KeeperRequest::KeepJobs`] in bytes. A message holds it as a JSON string,
/// in which each quotation mark and backslash of the text takes two bytes.
pub(super) const LONGEST_JOBS: usize = engine::job::LONGEST_KEPT_JOBS;

/// One request or one reply, with its number. A reply has the number of its request. So a late
/// reply, for which the serving process has stopped waiting, is not taken for the reply to the next
/// request.
#[derive(Debug, Deserialize, Serialize)]
pub(super) struct Numbered<T> {
    pub(super) number: u64,
    pub(super) message: T,
}

/// A request of the serving process.
#[derive(Debug, Deserialize, Serialize)]
pub(super) enum KeeperRequest {
    /// Remove this file at the end, if it still has this identity. Only before the mount.
    Remember { what: Leftover, path: Name, identity: (u64, u64) },
    /// The message carries the image, whose attributes [`KeeperRequest::SetNote`] and
    /// [`KeeperRequest::RemoveMark`] change. Once, and only before the mount.
    RememberImage,
    /// The command to run when a stream has completed, with its variables and its user and group.
    /// Only before the mount.
    RememberCommand { command: Name, environment: Vec<(Name, Name)>, user: Option<(u32, u32)> },
    /// The log file, and the users that may own it. Only before the mount.
    RememberLog { path: Name, owners: Owners },
    /// The name of the order that the disk may leave, and the user and group with whose rights it
    /// is stored. The message carries the memory that will have it. Only before the mount; the
    /// first name counts.
    RememberOrder { path: Name, user: Option<(u32, u32)> },
    /// Store so many bytes of that memory under that name.
    StoreOrder { len: u64 },
    /// The backing files that are open, by device and inode. Only before the mount.
    RememberFiles(Vec<(u64, u64)>),
    /// Ask whether the path leads to the remembered file with this identity.
    IsFile { path: Name, identity: (u64, u64) },
    /// Mount; the reply carries /dev/fuse. Once.
    Mount(KeeperPlan),
    /// Ask for the session of a serving process that has died. Only before the mount.
    Inherit,
    /// Ask for one of its descriptors. Only before the mount.
    Take(Heirloom),
    /// Adopt the mount of that process, and get the signals that came meanwhile.
    AdoptMount,
    /// The message carries a descriptor for a successor. Before the first request of the kernel.
    Keep(Heirloom),
    /// Everything is kept; the text is [`export::Negotiated`] and [`export::ShownAttributes`]. From
    /// here on a successor is started if this process is killed.
    KeepSession(KeptSession),
    /// The attributes that the disk shows were changed.
    KeepAttributes(export::ShownAttributes),
    /// The jobs of the disk have changed: a text of at most [`LONGEST_JOBS`] bytes for a successor,
    /// which the keeper does not read.
    KeepJobs(String),
    /// A successor serves.
    Serving,
    /// The disk cannot be left to a successor now, for this reason.
    CannotHandOver(String),
    /// Unmount the disk unless it is in use.
    Unmount,
    /// Detach the disk even if programs use it.
    Detach,
    /// The session has ended: detach mounts that are left, and remove the placeholder.
    Release,
    /// Remove a file that was remembered.
    Remove(Leftover),
    /// Remove [`host::attributes::OPEN_MARK`] of the image, which was closed.
    RemoveMark,
    /// Set [`host::attributes::STREAM_NOTE`] of the image to at most
    /// [`host::attributes::LONGEST_STREAM_NOTE`] bytes, or remove it.
    SetNote(Option<String>),
    /// The program of the fetcher and its arguments. Only before the mount.
    RememberFetcher { program: Name, arguments: Vec<Name> },
    /// Start the fetcher that was remembered; the reply carries the socket to it.
    StartFetcher,
    /// Start the command that was remembered, once for each stream that has completed since the
    /// mount and for which it was not started yet. `completed` is the number of those streams, in
    /// all serving processes of the disk.
    RunCommand { completed: u64 },
    /// Relay messages to the service manager; the reply carries the socket that takes them. Once.
    ConnectManager,
    /// The disk is served in the background: let go of the caller's standard output and error.
    LeaveConsole,
    /// Open the log file that was remembered; the reply carries it.
    OpenLog,
    /// Connect to this log daemon of the system; the reply carries the socket.
    ConnectLog(Daemon),
}

/// A descriptor of a served disk that outlives its serving process in the keeper.
#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub(super) enum Heirloom {
    /// The image, with its locks.
    Image,
    /// The image, opened by the keeper when it got [`Heirloom::Image`].
    Witness,
    /// The journal of the image.
    Journal,
    /// /dev/fuse: the mounted one is number 0, then its clones in order.
    Device(usize),
    /// The memory of the requests that come over io_uring.
    Requests,
}

/// What a successor has to know of a session.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub(super) struct KeptSession {
    pub(super) negotiated: export::Negotiated,
    pub(super) attributes: Option<export::ShownAttributes>,
}

/// What has happened to a disk before a serving process took it over.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub(super) struct KeptPast {
    /// The last text of [`KeeperRequest::KeepJobs`].
    pub(super) jobs: Option<String>,
    /// How often the disk was taken over since the mount, with this time.
    pub(super) takeovers: u64,
    /// When the disk was mounted.
    pub(super) mounted: Option<SystemTime>,
}

/// A file other than the mountpoint that is removed at the end.
#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub enum Leftover {
    /// The pidfile.
    Pidfile,
    /// The file of the control socket.
    Socket,
    /// The entry in the runtime directory.
    Entry,
}

/// A path or a piece of a command, as bytes.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub(super) struct Name(Vec<u8>);

impl From<&Path> for Name {
    fn from(path: &Path) -> Name {
        Name(path.as_os_str().as_encoded_bytes().to_vec())
    }
}

impl From<&OsStr> for Name {
    fn from(text: &OsStr) -> Name {
        Path::new(text).into()
    }
}

impl From<Name> for OsString {
    fn from(name: Name) -> OsString {
        OsString::from_vec(name.0)
    }
}

impl From<Name> for PathBuf {
    fn from(name: Name) -> PathBuf {
        OsString::from(name).into()
    }
}

/// [`MountPlan`] as a message carries it.
#[derive(Debug, Deserialize, Serialize)]
pub(super) struct KeeperPlan {
    mountpoint: Name,
    source: Name,
    taken: Vec<(u64, u64)>,
    read_only: bool,
    allow_other: bool,
    uid: u32,
    gid: u32,
    sync: bool,
}

impl From<&MountPlan> for KeeperPlan {
    fn from(plan: &MountPlan) -> KeeperPlan {
        KeeperPlan {
            mountpoint: plan.mountpoint.as_path().into(),
            source: plan.source.as_path().into(),
            taken: plan.taken.clone(),
            read_only: plan.read_only,
            allow_other: plan.allow_other,
            uid: plan.uid,
            gid: plan.gid,
            sync: plan.sync,
        }
    }
}

impl From<KeeperPlan> for MountPlan {
    fn from(plan: KeeperPlan) -> MountPlan {
        MountPlan {
            mountpoint: plan.mountpoint.into(),
            source: plan.source.into(),
            taken: plan.taken,
            read_only: plan.read_only,
            allow_other: plan.allow_other,
            uid: plan.uid,
            gid: plan.gid,
            sync: plan.sync,
        }
    }
}

/// A reply of the keeper.
#[derive(Debug, Deserialize, Serialize)]
pub(super) struct KeeperReply {
    /// Records that the keeper would have logged: level (1 is an error) and text. The keeper has no
    /// log of its own.
    pub(super) log: Vec<(usize, String)>,
    pub(super) result: Result<KeeperAnswer, KeeperFailure>,
}

/// The successful result of a request.
#[derive(Debug, Deserialize, Serialize)]
pub(super) enum KeeperAnswer {
    Done,
    /// The reply to an unmount of a disk that is in use.
    Busy,
    /// The reply to [`KeeperRequest::StartFetcher`], with what
    /// [`remote::line::StartedFetcher::before`] says.
    Started {
        before: Option<String>,
    },
    /// The reply to [`KeeperRequest::ConnectManager`]: the interval of the watchdog, if there is
    /// one for the keeper. No socket is carried if there is no manager.
    Manager {
        watchdog: Option<Duration>,
    },
    /// The reply to [`KeeperRequest::IsFile`].
    Is(bool),
    /// The mountpoint, absolute and without symbolic links.
    Mounted(Name),
    /// The reply to [`KeeperRequest::Inherit`]: the session, if there is one, whether there is a
    /// journal, the number of descriptors of /dev/fuse, and what has happened.
    Inherited {
        session: Option<KeptSession>,
        has_journal: bool,
        devices: usize,
        past: KeptPast,
    },
}

/// An [`Error`] as a message carries it.
#[derive(Debug, Deserialize, Serialize)]
pub(super) struct KeeperFailure {
    kind: ErrorKind,
    text: String,
}

impl From<Error> for KeeperFailure {
    fn from(error: Error) -> KeeperFailure {
        KeeperFailure { kind: error.kind(), text: error.to_string() }
    }
}

impl From<KeeperFailure> for Error {
    fn from(failure: KeeperFailure) -> Error {
        Error::new(failure.kind, failure.text)
    }
}

/// Sends one message, with one descriptor if there is one.
///
/// # Errors
/// Those of [`packet::send`].
pub(super) fn send(
    socket: impl AsFd,
    message: &impl Serialize,
    descriptor: Option<BorrowedFd<'_>>,
) -> Result<()> {
    packet::send(socket, message, LONGEST, descriptor.as_slice())
}

/// Receives one message, with the descriptor that it carries. Returns `None` if the other side has
/// closed the socket.
///
/// # Errors
/// Those of [`packet::receive`].
pub(super) fn receive<T: DeserializeOwned>(
    socket: impl AsFd,
) -> Result<Option<(T, Option<OwnedFd>)>> {
    let received = packet::receive(socket, LONGEST)?;
    Ok(received.map(|(message, descriptors)| (message, descriptors.into_iter().next())))
}
