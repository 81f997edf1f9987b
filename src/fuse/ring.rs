//! Transport 2: FUSE over io_uring (Linux 6.14 and later, with the module parameter `enable_uring`). Requests come and answers go through memory that
//! we share with the kernel: one system call takes the answers of a batch there and brings the next requests, where /dev/fuse takes two for each.
//!
//! Here are that memory and the rings, which is nearly all that needs `unsafe` ([`clone_device`] is the rest); the threads are in [`queue`].
//!
//! **Touches:** io_uring, the session's /dev/fuse, shared memory. **Never:** knows what a request means.
//! **Locks:** none. **Invariants:** an [`Entry`] is either the kernel's or ours. Ours, it is a value that somebody owns: a queue, a task, a channel between
//! them; the kernel's, it lies in the slot of a [`Port`] and nobody looks at it.
#![allow(unsafe_code)] // the only file that needs it: memory that the kernel writes to

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::ptr::NonNull;
use std::time::Duration;

use io_uring::register::Restriction;
use io_uring::types::Fd;
use io_uring::{IoUring, cqueue, opcode, squeue};
use rustix::io::Errno;

use super::attach::DEVICE;
use super::dispatch::MAX_IO;
use super::wire::{self, Operation};

mod queue;

pub(super) use queue::{Rings, Wanted};

/// Commands of FUSE to io_uring (`enum fuse_uring_cmd`).
const REGISTER: u32 = 1;
const COMMIT_AND_FETCH: u32 = 2;

/// `struct fuse_uring_req_header`: the header of request or reply, the operation's structure, and `struct fuse_uring_ent_in_out`.
const HEADER: usize = 288;
const OPERATION: std::ops::Range<usize> = 128..256;
const COMMIT_ID: std::ops::Range<usize> = 264..272;
const PAYLOAD_LEN: std::ops::Range<usize> = 272..276;

/// What the completion of an eventfd's poll carries; entries carry their slot.
const WAKE: u64 = u64::MAX;

type Ring = IoUring<squeue::Entry128, cqueue::Entry>;

/// FUSE_DEV_IOC_CLONE: `_IOR(229, 0, uint32_t)`.
const CLONE: rustix::ioctl::Opcode = rustix::ioctl::opcode::read::<u32>(229, 0);

/// One more descriptor of the connection of `device`. Each has a list of requests of its own in the kernel: one that is
/// read from a descriptor is answered there.
///
/// # Errors
/// /dev/fuse cannot be opened here.
pub(super) fn clone_device(device: &OwnedFd) -> io::Result<OwnedFd> {
    let new = File::options().read(true).write(true).open(DEVICE)?;
    let mut number = device.as_raw_fd().cast_unsigned();
    // SAFETY: the kernel reads one u32 there, the number of a descriptor, and writes nothing.
    unsafe { rustix::ioctl::ioctl(&new, rustix::ioctl::Updater::<CLONE, u32>::new(&mut number)) }?;
    Ok(new.into())
}

/// A ring for so many commands. It takes those of FUSE and the poll of an eventfd and nothing else: what is done through a ring is seen by no filter of
/// system calls.
fn ring(size: u32) -> io::Result<Ring> {
    let ring: Ring = Ring::builder().setup_r_disabled().setup_submit_all().setup_cqsize(2 * size.next_power_of_two()).build(size)?;
    let mut allowed = [opcode::UringCmd80::CODE, opcode::PollAdd::CODE].map(Restriction::sqe_op);
    ring.submitter().register_restrictions(&mut allowed)?;
    ring.submitter().register_enable_rings()?;
    Ok(ring)
}

/// Memory of one request, while it is ours.
struct Entry {
    header: NonNull<[u8; HEADER]>,
    payload: NonNull<[u8]>,
}

// SAFETY: the memory is the entry's alone, like that of a `Box`; no thread has a reference to it but through the entry.
unsafe impl Send for Entry {}

impl Entry {
    fn new() -> Entry {
        let header = NonNull::from(Box::leak(Box::new([0; HEADER])));
        let payload = NonNull::from(Box::leak(vec![0; MAX_IO].into_boxed_slice()));
        Entry { header, payload }
    }

    fn header(&mut self) -> &mut [u8; HEADER] {
        // SAFETY: it came from a `Box` that was never freed. The kernel writes to it only between a submission that names it, for which
        // `Port::submit` takes the entry away from whoever might call this, and its completion, which gives it back.
        unsafe { self.header.as_mut() }
    }

    fn payload(&mut self) -> &mut [u8] {
        // SAFETY: as `header`.
        unsafe { self.payload.as_mut() }
    }

    fn operation(&mut self) -> Operation {
        let (opcode, unique) = wire::in_header(self.header());
        wire::operation(opcode, unique, &self.header()[OPERATION])
    }

    /// Puts the answer in: so many bytes of payload, or an error.
    fn answer(&mut self, result: Result<usize, Errno>) {
        let (_, unique) = wire::in_header(self.header());
        // Never more than the payload, whose length is known to fit.
        let result = result.map(|len| len as u32);
        let header = self.header();
        wire::out_header(header, unique, result);
        header[PAYLOAD_LEN].copy_from_slice(&result.unwrap_or(0).to_ne_bytes());
    }
}

impl Drop for Entry {
    fn drop(&mut self) {
        // SAFETY: both came from a `Box` and are freed nowhere else. An entry is dropped only while it is ours (see `header`), or never.
        unsafe {
            drop(Box::from_raw(self.header.as_ptr()));
            drop(Box::from_raw(self.payload.as_ptr()));
        }
    }
}

/// What comes out of a [`Port`].
enum Completion {
    /// The eventfd was written to. False: and it is not watched any more.
    Woken(bool),
    /// The entry of this slot is ours again: with a request, or for good.
    Entry(usize, Entry, Result<(), Errno>),
}

/// A ring with the entries that the kernel has through it. An entry belongs to a queue of FUSE, not to a ring: its request comes where its last answer
/// was handed in.
struct Port {
    ring: Ring,
    device: OwnedFd,
    /// The number of the queue of FUSE.
    queue: u16,
    /// The entries that the kernel has, each in its place.
    slots: Vec<Option<Entry>>,
    /// Where their memory is, as registering says it. The kernel reads that while it takes the commands. Kept as long as the ring, whatever
    /// part of them the kernel has taken.
    places: Box<[Place]>,
}

/// Submits what was pushed, and waits for so many completions; returns how many commands the kernel has taken. A parameter for tests.
type Enter = fn(&Ring, usize) -> io::Result<usize>;

fn enter(ring: &Ring, want: usize) -> io::Result<usize> {
    ring.submitter().submit_and_wait(want)
}

/// How long a system call is not tried again after the kernel had no memory for it.
const PAUSE: Duration = Duration::from_millis(1);
/// So many tries after which the kernel has taken nothing, although it said that all is well, are an error.
const TRIES: u32 = 1000;

impl Port {
    /// A way to a queue, for as many entries as `slots`. `device` is the session's.
    fn new(ring: Ring, device: BorrowedFd<'_>, queue: u16, slots: usize) -> io::Result<Port> {
        let slots = (0..slots).map(|_| None).collect();
        Ok(Port { ring, device: device.try_clone_to_owned()?, queue, slots, places: Box::default() })
    }

    /// Gives the kernel an entry for each slot.
    ///
    /// # Errors
    /// The kernel has not taken all of them.
    fn register(&mut self) -> io::Result<()> {
        self.register_by(enter)
    }

    fn register_by(&mut self, enter: Enter) -> io::Result<()> {
        let entries: Vec<Entry> = self.slots.iter().map(|_| Entry::new()).collect();
        self.places = entries.iter().map(place).collect();
        for (slot, entry) in entries.into_iter().enumerate() {
            let command = command(&self.device, REGISTER, self.queue, 0);
            let command = with_place(command, &self.places[slot]);
            self.submit(slot, entry, command)?;
        }
        let mut tries = 0;
        while !self.ring.submission().is_empty() {
            let taken = self.enter_by(enter, 0)?;
            tries = if taken == 0 { tries + 1 } else { 0 };
            if tries == TRIES {
                let left = self.ring.submission().len();
                return Err(io::Error::other(format!("the kernel does not take {left} of {} entries", self.slots.len())));
            }
        }
        Ok(())
    }

    /// Hands an answered entry to the kernel, which will bring it back here with another request. It goes there with the next [`Port::wait`].
    fn commit(&mut self, slot: usize, mut entry: Entry) -> io::Result<()> {
        let id = entry.header()[COMMIT_ID].first_chunk().map_or(0, |id| u64::from_ne_bytes(*id));
        let command = command(&self.device, COMMIT_AND_FETCH, self.queue, id);
        self.submit(slot, entry, command)
    }

    /// Puts a command with an entry into the ring.
    fn submit(&mut self, slot: usize, entry: Entry, command: squeue::Entry128) -> io::Result<()> {
        self.slots[slot] = Some(entry);
        let command = command.user_data(slot as u64);
        // SAFETY: what the command names stays where it is: the entry's memory, which nobody touches in `slots` until the command completes, and its
        // place, which `places` holds as long as the ring exists.
        while unsafe { self.ring.submission().push(&command) }.is_err() {
            self.make_room()?;
        }
        Ok(())
    }

    /// Watches an eventfd, which must stay open as long as this does, until the kernel says that it does not any more.
    fn watch(&mut self, eventfd: &OwnedFd) -> io::Result<()> {
        let readable = rustix::event::PollFlags::IN.bits();
        let poll = opcode::PollAdd::new(Fd(eventfd.as_raw_fd()), u32::from(readable)).multi(true).build().user_data(WAKE);
        // SAFETY: it names a descriptor and no memory.
        while unsafe { self.ring.submission().push(&poll.clone().into()) }.is_err() {
            self.make_room()?;
        }
        Ok(())
    }

    /// There is room for a command of every entry and for the poll, so this is for the sake of completeness.
    fn make_room(&mut self) -> io::Result<()> {
        match self.enter_by(enter, 0)? {
            0 => Err(io::Error::other("the kernel takes no commands")),
            _ => Ok(()),
        }
    }

    /// Takes the answers there, and waits until something comes out.
    fn wait(&mut self) -> io::Result<()> {
        self.enter_by(enter, 1).map(drop)
    }

    /// Takes the answers there now, for a thread that has something else to do before [`Port::wait`].
    fn push(&mut self) -> io::Result<()> {
        self.enter_by(enter, 0).map(drop)
    }

    /// Enters the kernel until that is not refused for a passing reason: no memory for a command at the moment (EAGAIN, ENOMEM), or completions
    /// that have to be taken first (EBUSY). Where there are completions they are taken first in any case, by the caller.
    ///
    /// # Errors
    /// Those that stay.
    fn enter_by(&mut self, enter: Enter, want: usize) -> io::Result<usize> {
        let mut refused = 0_u64;
        loop {
            match enter(&self.ring, want) {
                Ok(taken) => return Ok(taken),
                Err(error) => match Errno::from_io_error(&error) {
                    Some(Errno::INTR) => return Ok(0),
                    Some(Errno::AGAIN | Errno::NOMEM | Errno::BUSY | Errno::NOBUFS) => {
                        if self.has_more() {
                            return Ok(0);
                        }
                        if refused.is_multiple_of(60_000) {
                            log::warn!("FUSE over io_uring, queue {}: {}: trying again", self.queue, crate::error::os_text(&error));
                        }
                        refused += 1;
                        std::thread::sleep(PAUSE);
                    }
                    _ => return Err(error),
                },
            }
        }
    }

    /// What has come out.
    fn next(&mut self) -> io::Result<Option<Completion>> {
        let Some(completion) = self.ring.completion().next() else { return Ok(None) };
        if completion.user_data() == WAKE {
            return Ok(Some(Completion::Woken(cqueue::more(completion.flags()))));
        }
        let slot = completion.user_data() as usize;
        let Some(entry) = self.slots.get_mut(slot).and_then(Option::take) else {
            return Err(io::Error::other(format!("the kernel completed entry {slot}, which it did not have")));
        };
        let result = if completion.result() >= 0 { Ok(()) } else { Err(Errno::from_raw_os_error(-completion.result())) };
        Ok(Some(Completion::Entry(slot, entry, result)))
    }

    /// Whether more has come out already.
    fn has_more(&mut self) -> bool {
        !self.ring.completion().is_empty()
    }
}

impl Drop for Port {
    /// What the kernel still has must not be freed: only a port whose queue has failed has such entries.
    fn drop(&mut self) {
        self.slots.drain(..).flatten().for_each(std::mem::forget);
    }
}

/// `struct iovec`, with its address as a number: it is the kernel that reads it.
#[derive(Clone, Copy)]
#[repr(C)]
struct Memory {
    address: usize,
    len: usize,
}

/// Where an entry's memory lies.
type Place = [Memory; 2];

fn place(entry: &Entry) -> Place {
    [
        Memory { address: entry.header.as_ptr().expose_provenance(), len: HEADER },
        Memory { address: entry.payload.as_ptr().cast::<u8>().expose_provenance(), len: entry.payload.len() },
    ]
}

/// A command of FUSE: `struct fuse_uring_cmd_req` is the number of what is committed, and the number of the queue.
fn command(device: &OwnedFd, command: u32, queue: u16, commit_id: u64) -> squeue::Entry128 {
    let mut request = [0; 80];
    request[8..16].copy_from_slice(&commit_id.to_ne_bytes());
    request[16..18].copy_from_slice(&queue.to_ne_bytes());
    opcode::UringCmd80::new(Fd(device.as_raw_fd()), command).cmd(request).build()
}

/// Adds where the memory is, for registering.
fn with_place(command: squeue::Entry128, place: &Place) -> squeue::Entry128 {
    /// Bytes of `struct io_uring_sqe` with 80 bytes of command.
    const SIZE: usize = 128;
    // SAFETY: the type is `repr(C)` and holds nothing but one `struct io_uring_sqe`: plain integers, any bytes of which are valid. The sizes are
    // compared by `transmute`.
    let mut bytes: [u8; SIZE] = unsafe { std::mem::transmute(command) };
    // `addr` and `len`; the latter has no setter for this operation.
    bytes[16..24].copy_from_slice(&(place.as_ptr() as u64).to_ne_bytes());
    bytes[24..28].copy_from_slice(&(place.len() as u32).to_ne_bytes());
    // SAFETY: as above.
    unsafe { std::mem::transmute(bytes) }
}

#[cfg(test)]
mod tests;
