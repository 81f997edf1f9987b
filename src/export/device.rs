//! Transport 1: threads that read requests from /dev/fuse and write replies to it.
//!
//! A request is one read(2) and its reply one writev(2), both on the same descriptor: the kernel
//! keeps a separate list of requests for each descriptor, and looks for the request of a reply only
//! in that list.
//!
//! **Touches:** the descriptors that it is given.
//! **Never:** knows what a request means.
//! **Locks:** none.
//! **Invariants:** a reply is written once. If the write fails, the request is ended in the kernel
//! as well.

use std::io::{self, IoSlice};
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::thread;

use rustix::event::{PollFd, PollFlags};
use rustix::io::Errno;

use super::dispatch::{Dispatcher, LaterReply, MAX_IO, Reply};
use super::session::ServerThread;
#[cfg(any(test, feature = "testing"))]
use super::session::SessionEnding;
use super::turns::{ReaderTurn, Turns};
use super::wire::{self, OUT_HEADER, WRITE_HEADER};
use host::Result;
use host::error::Context;

/// Bytes of a page. IoMemory is aligned to pages because the kernel copies to and from user memory
/// page by page.
const PAGE: usize = 4096;

/// How many reads in a row may fail for lack of memory before the thread gives up.
const TRIES: u32 = 1000;

/// Serves the requests of `device` on a thread of its own until the disk is unmounted, and reports
/// the result to `server`.
///
/// # Errors
/// The system has no more threads.
pub(super) fn serve(
    number: usize,
    device: Arc<OwnedFd>,
    dispatcher: Dispatcher,
    turns: Arc<Turns>,
    server: ServerThread,
) -> Result<()> {
    thread::Builder::new()
        .name(format!("fuse-{number}"))
        .spawn(move || {
            let turn = ReaderTurn::new(turns, number);
            let served = serve_all(&device, &dispatcher, turn);
            server.ends(served.context(|| "reading requests from /dev/fuse"));
        })
        .map(drop)
        .context(|| "starting a thread for /dev/fuse")
}

fn serve_all(
    device: &Arc<OwnedFd>,
    dispatcher: &Dispatcher,
    mut turn: ReaderTurn,
) -> io::Result<()> {
    // The data of a write, and the bytes of a reply, start at a page boundary. The kernel then pins
    // one page fewer.
    let mut requests = IoMemory::new(WRITE_HEADER + MAX_IO, WRITE_HEADER);
    requests.make_resident();
    let mut scratch = IoMemory::new(MAX_IO, 0);
    loop {
        turn.wait(device);
        let Some(bytes) = next(device, requests.bytes())? else { return Ok(()) };
        turn.begins(device);
        let Some(request) = wire::request(bytes) else {
            return Err(io::Error::other(format!("{} bytes that are no request", bytes.len())));
        };
        let reply = DeviceReply {
            device,
            turn: &turn,
            unique: request.unique,
            data: request.data,
            is_owed: true,
        };
        dispatcher.serve(request.operation, reply, scratch.bytes());
        turn.ends();
    }
}

/// Waits for the next request. Returns `None` once the disk is unmounted.
fn next<'a>(device: &OwnedFd, buffer: &'a mut [u8]) -> io::Result<Option<&'a [u8]>> {
    let mut tries = 0;
    loop {
        match rustix::io::read(device, &mut *buffer) {
            Ok(len) => return Ok(Some(&buffer[..len])),
            Err(Errno::NODEV) => return Ok(None),
            // NOENT: the client abandoned the request while it was being read.
            Err(Errno::INTR | Errno::NOENT) => {}
            // The program that opened the descriptor may have made it non-blocking.
            Err(Errno::AGAIN) => {
                let _ = rustix::event::poll(&mut [PollFd::new(device, PollFlags::IN)], None);
            }
            Err(Errno::NOMEM | Errno::NOBUFS) if tries < TRIES => {
                tries += 1;
                thread::sleep(std::time::Duration::from_millis(1));
            }
            Err(errno) => return Err(errno.into()),
        }
    }
}

/// IoMemory whose byte at index `skew` lies at the start of a page.
struct IoMemory {
    bytes: Vec<u8>,
    start: usize,
    len: usize,
}

impl IoMemory {
    fn new(len: usize, skew: usize) -> IoMemory {
        let bytes = vec![0; len + 2 * PAGE];
        // If `align_offset` cannot compute the offset, the memory is not aligned, which is only
        // slower.
        let start = bytes[skew..].as_ptr().align_offset(PAGE).min(PAGE);
        IoMemory { bytes, start, len }
    }

    /// Brings all pages into memory, before the first request is read into them.
    ///
    /// If the process is killed while the kernel copies a request, the kernel can finish the copy
    /// only if it needs no page fault, which a dying process does not get. It then keeps the
    /// request for another process to answer. Otherwise the client gets EIO, as after one of forty
    /// kills under load on Linux 6.18. Pages that the host swaps out later, or write-protects
    /// because this process forks, are no longer safe in that way. They are not locked, because of
    /// RLIMIT_MEMLOCK.
    ///
    /// The memory of replies needs no such care: its bytes were written just before.
    fn make_resident(&mut self) {
        // A value that is not zero, and that the compiler does not know: it could replace the
        // writing of zeros by the allocation of zeroed memory, which has no pages yet.
        self.bytes.fill(std::hint::black_box(1));
    }

    fn bytes(&mut self) -> &mut [u8] {
        &mut self.bytes[self.start..self.start + self.len]
    }
}

/// Writes a reply. If the kernel does not take it, the client gets EIO.
fn write(device: &OwnedFd, unique: u64, answer: Result<&[u8], Errno>) {
    match try_to_write(device, unique, answer) {
        // NOENT: the request and its client are gone. NODEV: the disk was unmounted.
        Ok(()) | Err(Errno::NOENT | Errno::NODEV) => {}
        Err(errno) => {
            log::error!("replying over /dev/fuse: {}", host::error::os_text(&errno.into()));
            // The kernel has already ended the request, unless the write failed before the kernel
            // looked for the request.
            let _ = try_to_write(device, unique, Err(Errno::IO));
        }
    }
}

fn try_to_write(device: &OwnedFd, unique: u64, answer: Result<&[u8], Errno>) -> Result<(), Errno> {
    let mut header = [0; OUT_HEADER];
    // The length is at most MAX_IO.
    wire::out_header(&mut header, unique, answer.map(|bytes| bytes.len() as u32));
    let parts = [IoSlice::new(&header), IoSlice::new(answer.unwrap_or(&[]))];
    let parts = if answer.is_ok_and(|bytes| !bytes.is_empty()) { &parts[..] } else { &parts[..1] };
    // The kernel takes all parts or none.
    rustix::io::retry_on_intr(|| rustix::io::writev(device, parts)).map(drop)
}

struct DeviceReply<'a> {
    device: &'a Arc<OwnedFd>,
    turn: &'a ReaderTurn,
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
        // The other thread takes the requests that arrive meanwhile; if it is parked because this
        // one polls, after two of its looks at the latest.
        true
    }

    fn send_now(self, answer: Result<&[u8], Errno>) {
        self.turn.answers();
        self.send(answer);
    }

    fn forget(mut self) {
        self.is_owed = false;
    }

    fn later(mut self) -> LaterDeviceReply {
        self.is_owed = false;
        LaterDeviceReply {
            device: Arc::clone(self.device),
            unique: self.unique,
            data: self.data.into(),
            is_owed: true,
        }
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
