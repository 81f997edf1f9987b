//! Messages between processes of this program: JSON over a socket that keeps the boundaries of
//! messages (SOCK_SEQPACKET), with descriptors of open files.

use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::io::{Errno, retry_on_intr};
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, SocketFlags, SocketType,
};
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::error::Context;
use crate::{Error, ErrorKind, Result};

/// The most descriptors of one message.
pub const DESCRIPTORS: usize = 2;

/// Makes the two ends of a socket for messages. No program that this process executes inherits
/// them.
///
/// # Errors
/// Those of socketpair(2).
pub fn pair() -> std::io::Result<(OwnedFd, OwnedFd)> {
    Ok(rustix::net::socketpair(
        AddressFamily::UNIX,
        SocketType::SEQPACKET,
        SocketFlags::CLOEXEC,
        None,
    )?)
}

/// Sends one message of at most `longest` bytes, with at most [`DESCRIPTORS`] descriptors.
///
/// # Errors
/// The message is too long, or the other side has closed the socket.
pub fn send(
    socket: impl AsFd,
    message: &impl Serialize,
    longest: usize,
    descriptors: &[BorrowedFd<'_>],
) -> Result<()> {
    send_with(socket, message, longest, descriptors, SendFlags::NOSIGNAL)
}

/// Sends one message as [`send`] does, if that needs no waiting. Returns false if the socket has no
/// space, because the other side is slow to read.
///
/// # Errors
/// As [`send`].
pub fn try_send(
    socket: impl AsFd,
    message: &impl Serialize,
    longest: usize,
    descriptors: &[BorrowedFd<'_>],
) -> Result<bool> {
    let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
    match send_with(socket, message, longest, descriptors, flags) {
        Ok(()) => Ok(true),
        Err(error) if error.errno() == Some(Errno::AGAIN.raw_os_error()) => Ok(false),
        Err(error) => Err(error),
    }
}

fn send_with(
    socket: impl AsFd,
    message: &impl Serialize,
    longest: usize,
    descriptors: &[BorrowedFd<'_>],
    flags: SendFlags,
) -> Result<()> {
    let bytes = serde_json::to_vec(message)
        .map_err(|error| Error::wrap(ErrorKind::InvalidArgument, "message", error))?;
    if bytes.len() > longest {
        return Err(Error::new(ErrorKind::InvalidArgument, "path or command too long"));
    }
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(DESCRIPTORS))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !descriptors.is_empty() && !control.push(SendAncillaryMessage::ScmRights(descriptors)) {
        return Err(Error::new(ErrorKind::Io, "too many descriptors for one message"));
    }
    retry_on_intr(|| rustix::net::sendmsg(&socket, &[IoSlice::new(&bytes)], &mut control, flags))
        .map_err(std::io::Error::from)
        .context(|| "sendmsg")?;
    Ok(())
}

/// Receives one message of at most `longest` bytes, with the descriptors that it carries. Returns
/// `None` if the other side has closed the socket.
///
/// # Errors
/// recvmsg(2) failed, or the received bytes are not a message.
pub fn receive<T: DeserializeOwned>(
    socket: impl AsFd,
    longest: usize,
) -> Result<Option<(T, Vec<OwnedFd>)>> {
    let mut bytes = vec![0; longest];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(DESCRIPTORS))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let received = retry_on_intr(|| {
        rustix::net::recvmsg(
            &socket,
            &mut [IoSliceMut::new(&mut bytes)],
            &mut control,
            RecvFlags::CMSG_CLOEXEC,
        )
    });
    let len = match received {
        // ECONNRESET: the other side has died with a message of ours unread.
        Err(Errno::CONNRESET) => 0,
        received => received.map_err(std::io::Error::from).context(|| "recvmsg")?.bytes,
    };
    let descriptors = control
        .drain()
        .filter_map(|message| match message {
            RecvAncillaryMessage::ScmRights(descriptors) => Some(descriptors),
            _ => None,
        })
        .flatten()
        .collect();
    if len == 0 {
        return Ok(None);
    }
    let message = serde_json::from_slice(&bytes[..len])
        .map_err(|error| Error::wrap(ErrorKind::InvalidArgument, "message", error))?;
    Ok(Some((message, descriptors)))
}
