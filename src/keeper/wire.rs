//! What the serving process and the keeper say to each other: one message of at most [`LONGEST`] bytes each, a request and its reply in turns.

use std::ffi::{OsStr, OsString};
use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};

use rustix::io::{Errno, retry_on_intr};
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::error::Context;
use crate::fuse::MountPlan;
use crate::logging::Owners;
use crate::{Error, ErrorKind, Result};

/// Paths are at most 4096 bytes, and there are at most four in a message; the rest is for a command.
const LONGEST: usize = 128 << 10;

/// One request or one reply, with its number. A reply has the number of its request, so that a reply
/// that comes after the serving process has stopped waiting for it is not taken for the next one.
#[derive(Debug, Deserialize, Serialize)]
pub(super) struct Numbered<T> {
    pub(super) number: u64,
    pub(super) message: T,
}

/// Asked by the serving process.
#[derive(Debug, Deserialize, Serialize)]
pub(super) enum Request {
    /// The file is to be removed at the end, if it is still this one. Only before the mount.
    Remember { what: Leftover, path: Name, identity: (u64, u64) },
    /// With the image: [`Request::SetNote`] and [`Request::RemoveMark`] are about its attributes.
    /// Once, and only before the mount.
    RememberImage,
    /// To be run when a stream has completed, with these variables, as this user and group. Only before the mount.
    RememberCommand { command: Name, environment: Vec<(Name, Name)>, user: Option<(u32, u32)> },
    /// The log file, and the users to whom it may belong. Only before the mount.
    RememberLog { path: Name, owners: Owners },
    /// The backing files that are open, by device and inode. Only before the mount.
    RememberFiles(Vec<(u64, u64)>),
    /// Whether the path leads to that one of the files that were remembered.
    IsFile { path: Name, identity: (u64, u64) },
    /// Mount; the reply brings /dev/fuse. Once.
    Mount(Plan),
    /// Unmount unless it is in use.
    Unmount,
    /// Take it away from whoever uses it.
    Detach,
    /// The session has ended: detach what is still mounted, remove the placeholder.
    Release,
    /// Remove a file that was remembered.
    Remove(Leftover),
    /// Remove [`crate::attributes::OPEN_MARK`] of the image: it was closed.
    RemoveMark,
    /// Set [`crate::attributes::STREAM_NOTE`] of the image to at most
    /// [`crate::attributes::LONGEST_STREAM_NOTE`] bytes, or remove it.
    SetNote(Option<String>),
    /// Start the command that was remembered.
    RunCommand,
    /// Open the log file that was remembered; the reply brings it.
    OpenLog,
}

/// A file beside the mountpoint that goes away at the end.
#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub enum Leftover {
    /// The pidfile.
    Pidfile,
    /// The file of the control socket.
    Socket,
    /// The entry in the runtime directory.
    Entry,
}

/// A path or a piece of a command, byte by byte.
#[derive(Debug, Deserialize, Serialize)]
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

/// [`MountPlan`] as it travels.
#[derive(Debug, Deserialize, Serialize)]
pub(super) struct Plan {
    mountpoint: Name,
    source: Name,
    taken: Vec<(u64, u64)>,
    read_only: bool,
    allow_other: bool,
    uid: u32,
    gid: u32,
    sync: bool,
}

impl From<&MountPlan> for Plan {
    fn from(plan: &MountPlan) -> Plan {
        Plan {
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

impl From<Plan> for MountPlan {
    fn from(plan: Plan) -> MountPlan {
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

/// Answered by the keeper.
#[derive(Debug, Deserialize, Serialize)]
pub(super) struct Reply {
    /// What it would have logged: level (1 is an error) and text. It has no standard error of its own.
    pub(super) log: Vec<(usize, String)>,
    pub(super) result: Result<Answer, Failure>,
}

/// What a request has led to.
#[derive(Debug, Deserialize, Serialize)]
pub(super) enum Answer {
    Done,
    /// To an unmount.
    Busy,
    /// To [`Request::IsFile`].
    Is(bool),
    /// With the mountpoint, absolute and without symbolic links.
    Mounted(Name),
}

/// An [`Error`] as it travels.
#[derive(Debug, Deserialize, Serialize)]
pub(super) struct Failure {
    kind: ErrorKind,
    text: String,
}

impl From<Error> for Failure {
    fn from(error: Error) -> Failure {
        Failure { kind: error.kind(), text: error.to_string() }
    }
}

impl From<Failure> for Error {
    fn from(failure: Failure) -> Error {
        Error::new(failure.kind, failure.text)
    }
}

/// Sends one message, with one descriptor if there is one.
///
/// # Errors
/// The other side is gone.
pub(super) fn send(socket: impl AsFd, message: &impl Serialize, descriptor: Option<BorrowedFd<'_>>) -> Result<()> {
    let bytes = serde_json::to_vec(message).map_err(|error| Error::wrap(ErrorKind::InvalidArgument, "message", error))?;
    if bytes.len() > LONGEST {
        return Err(Error::new(ErrorKind::InvalidArgument, "path or command too long"));
    }
    let descriptors: Vec<BorrowedFd<'_>> = descriptor.into_iter().collect();
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !descriptors.is_empty() && !control.push(SendAncillaryMessage::ScmRights(&descriptors)) {
        return Err(Error::new(ErrorKind::Io, "no room for a descriptor"));
    }
    retry_on_intr(|| rustix::net::sendmsg(&socket, &[IoSlice::new(&bytes)], &mut control, SendFlags::NOSIGNAL))
        .map_err(std::io::Error::from)
        .context(|| "sendmsg")?;
    Ok(())
}

/// Receives one message, with the descriptor that came with it. `None` where the other side has closed.
///
/// # Errors
/// recvmsg(2) failed; what came is no message.
pub(super) fn receive<T: DeserializeOwned>(socket: impl AsFd) -> Result<Option<(T, Option<OwnedFd>)>> {
    let mut bytes = vec![0; LONGEST];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let received =
        retry_on_intr(|| rustix::net::recvmsg(&socket, &mut [IoSliceMut::new(&mut bytes)], &mut control, RecvFlags::CMSG_CLOEXEC));
    let len = match received {
        // Reset: it has died with a message of ours unread.
        Err(Errno::CONNRESET) => 0,
        received => received.map_err(std::io::Error::from).context(|| "recvmsg")?.bytes,
    };
    let descriptor = control.drain().find_map(|message| match message {
        RecvAncillaryMessage::ScmRights(mut descriptors) => descriptors.next(),
        _ => None,
    });
    if len == 0 {
        return Ok(None);
    }
    let message = serde_json::from_slice(&bytes[..len]).map_err(|error| Error::wrap(ErrorKind::InvalidArgument, "message", error))?;
    Ok(Some((message, descriptor)))
}
