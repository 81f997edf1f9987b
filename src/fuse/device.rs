//! Transport 1: threads that read requests from /dev/fuse and write replies to it.
//!
//! A request is one read(2) and its reply one writev(2), both of the same descriptor: the kernel keeps
//! the requests of a descriptor in a list of its own, and looks for the request of a reply only there.
//!
//! **Touches:** the descriptors that it is given. **Never:** knows what a request means.
//! **Locks:** none. **Invariants:** a reply is written once; where writing it fails, the request is ended
//! in the kernel as well.

use std::io::{self, IoSlice};
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::thread;

use rustix::event::{PollFd, PollFlags};
use rustix::io::Errno;

use super::dispatch::{Dispatcher, LaterReply, MAX_IO, Reply};
#[cfg(test)]
use super::session::Ending;
use super::session::Server;
use super::wire::{self, OUT_HEADER, WRITE_HEADER};
use crate::Result;
use crate::error::Context;

/// Bytes of a page: the kernel copies to and from user memory page by page.
const PAGE: usize = 4096;

/// How often reading may fail for lack of memory, one time after the other, before that is final.
const TRIES: u32 = 1000;

/// Serves the requests of `device` on a thread of its own until the disk is unmounted. `server` gets
/// the result.
///
/// # Errors
/// No more threads.
pub(super) fn serve(number: usize, device: Arc<OwnedFd>, dispatcher: Dispatcher, server: Server) -> Result<()> {
    thread::Builder::new()
        .name(format!("fuse-{number}"))
        .spawn(move || server.ends(serve_all(&device, &dispatcher).context(|| "reading requests from /dev/fuse")))
        .map(drop)
        .context(|| "starting a thread for /dev/fuse")
}

fn serve_all(device: &Arc<OwnedFd>, dispatcher: &Dispatcher) -> io::Result<()> {
    // The data of a write begin at a page, and so do the bytes of a reply: one page fewer to pin.
    let mut requests = Memory::new(WRITE_HEADER + MAX_IO, WRITE_HEADER);
    let mut scratch = Memory::new(MAX_IO, 0);
    while let Some(bytes) = next(device, requests.bytes())? {
        let Some(request) = wire::request(bytes) else {
            return Err(io::Error::other(format!("{} bytes that are no request", bytes.len())));
        };
        let reply = DeviceReply { device, unique: request.unique, data: request.data, is_owed: true };
        dispatcher.serve(request.operation, reply, scratch.bytes());
    }
    Ok(())
}

/// The next request, waiting for it; `None` once the disk is unmounted.
fn next<'a>(device: &OwnedFd, buffer: &'a mut [u8]) -> io::Result<Option<&'a [u8]>> {
    let mut tries = 0;
    loop {
        match rustix::io::read(device, &mut *buffer) {
            Ok(len) => return Ok(Some(&buffer[..len])),
            Err(Errno::NODEV) => return Ok(None),
            // NOENT: the client gave up the request while it was being read.
            Err(Errno::INTR | Errno::NOENT) => {}
            // The descriptor does not block, if the program that made it has set it so.
            Err(Errno::AGAIN) => drop(rustix::event::poll(&mut [PollFd::new(device, PollFlags::IN)], None)),
            Err(Errno::NOMEM | Errno::NOBUFS) if tries < TRIES => {
                tries += 1;
                thread::sleep(std::time::Duration::from_millis(1));
            }
            Err(errno) => return Err(errno.into()),
        }
    }
}

/// Bytes of which the one at `skew` lies at the begin of a page.
struct Memory {
    bytes: Vec<u8>,
    start: usize,
    len: usize,
}

impl Memory {
    fn new(len: usize, skew: usize) -> Memory {
        let bytes = vec![0; len + 2 * PAGE];
        // `align_offset` may say that it cannot know; then the memory lies anywhere, which is slower.
        let start = bytes[skew..].as_ptr().align_offset(PAGE).min(PAGE);
        Memory { bytes, start, len }
    }

    fn bytes(&mut self) -> &mut [u8] {
        &mut self.bytes[self.start..self.start + self.len]
    }
}

/// Writes a reply. Where the kernel does not take it the client gets EIO.
fn write(device: &OwnedFd, unique: u64, answer: Result<&[u8], Errno>) {
    match try_to_write(device, unique, answer) {
        // NOENT: the request is gone, with its client. NODEV: unmounted.
        Ok(()) | Err(Errno::NOENT | Errno::NODEV) => {}
        Err(errno) => {
            log::error!("replying over /dev/fuse: {}", crate::error::os_text(&errno.into()));
            // The kernel has ended the request already, unless it failed before it looked for it.
            let _ = try_to_write(device, unique, Err(Errno::IO));
        }
    }
}

fn try_to_write(device: &OwnedFd, unique: u64, answer: Result<&[u8], Errno>) -> Result<(), Errno> {
    let mut header = [0; OUT_HEADER];
    // Never more than MAX_IO.
    wire::out_header(&mut header, unique, answer.map(|bytes| bytes.len() as u32));
    let parts = [IoSlice::new(&header), IoSlice::new(answer.unwrap_or(&[]))];
    let parts = if answer.is_ok_and(|bytes| !bytes.is_empty()) { &parts[..] } else { &parts[..1] };
    // The kernel takes all of it or none.
    rustix::io::retry_on_intr(|| rustix::io::writev(device, parts)).map(drop)
}

struct DeviceReply<'a> {
    device: &'a Arc<OwnedFd>,
    unique: u64,
    data: &'a [u8],
    is_owed: bool,
}

impl Reply for DeviceReply<'_> {
    type Later = LaterDeviceReply;

    fn data(&mut self) -> &[u8] {
        self.data
    }

    fn room<'a>(&'a mut self, scratch: &'a mut [u8]) -> &'a mut [u8] {
        scratch
    }

    fn send_room(self, scratch: &[u8], len: usize) {
        self.send(Ok(&scratch[..len]));
    }

    fn send(mut self, answer: Result<&[u8], Errno>) {
        self.is_owed = false;
        write(self.device, self.unique, answer);
    }

    fn has_time(&mut self) -> bool {
        // The other thread takes what comes meanwhile.
        true
    }

    fn send_now(self, answer: Result<&[u8], Errno>) {
        self.send(answer);
    }

    fn forget(mut self) {
        self.is_owed = false;
    }

    fn later(mut self) -> LaterDeviceReply {
        self.is_owed = false;
        LaterDeviceReply { device: Arc::clone(self.device), unique: self.unique, data: self.data.into(), is_owed: true }
    }
}

impl Drop for DeviceReply<'_> {
    fn drop(&mut self) {
        if self.is_owed {
            write(self.device, self.unique, Err(Errno::IO));
        }
    }
}

struct LaterDeviceReply {
    device: Arc<OwnedFd>,
    unique: u64,
    data: Box<[u8]>,
    is_owed: bool,
}

impl LaterReply for LaterDeviceReply {
    fn data(&mut self) -> &[u8] {
        &self.data
    }

    fn send(mut self, answer: Result<&[u8], Errno>) {
        self.is_owed = false;
        write(&self.device, self.unique, answer);
    }
}

impl Drop for LaterDeviceReply {
    fn drop(&mut self) {
        if self.is_owed {
            write(&self.device, self.unique, Err(Errno::IO));
        }
    }
}

#[cfg(test)]
mod tests;
