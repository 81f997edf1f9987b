//! Transport 2: FUSE over io_uring (Linux 6.14 and later, with the module parameter `enable_uring`). Requests come and answers go through memory that
//! we share with the kernel: one system call takes the answers of a batch there and brings the next requests, where /dev/fuse takes two for each.
//!
//! ```text
//!  kernel ── queue per CPU ──▶ thread per queue ──▶ handler ──▶ Disk::read_local, write_local    a hit: answered in place
//!                                   ▲      └── workers ──▶ handler ──▶ Disk::read, write, …      a miss: the entry goes with the task …
//!                                   └────────── eventfd ◀── the entry, answered                  … and comes back to its queue
//! ```
//!
//! The kernel spreads requests over the queues by the CPU of whoever asks, and begins to use them when each possible CPU's queue has an entry. fuser
//! still negotiates, and serves what stays on /dev/fuse (FUSE_FORGET). After the unmount all entries come back with ENOTCONN, and the threads end.
//!
//! **Touches:** io_uring, the session's /dev/fuse, shared memory. **Never:** waits for anything but its ring on a queue's thread.
//! **Locks:** none. **Invariants:** an [`Entry`] is either the kernel's or ours. Ours, it is a value that somebody owns: the queue, a task, the channel back;
//! the kernel's, it lies in its slot and nobody looks at it.
#![allow(unsafe_code)] // the only file that needs it: memory that the kernel writes to

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::Arc;
use std::thread;

use crossbeam_channel::{Receiver, Sender};
use io_uring::register::Restriction;
use io_uring::types::Fd;
use io_uring::{IoUring, cqueue, opcode, squeue};
use rustix::event::EventfdFlags;
use rustix::io::Errno;
use rustix::thread::CpuSet;

use super::Transport;
use super::handler::{Answer, Durability, Handler};
use super::session::{ATTR_TTL, MAX_IO, OPEN_FLAGS};
use super::wire::{self, Operation};
use super::workers::Workers;
use crate::error::Context;
use crate::{Error, ErrorKind, Result};

/// Whether the kernel's FUSE may use io_uring.
const ENABLED: &str = "/sys/module/fuse/parameters/enable_uring";
/// The kernel wants a queue for each of these.
const POSSIBLE_CPUS: &str = "/sys/devices/system/cpu/possible";
/// More CPUs than this are served over /dev/fuse: a thread for each would be more than a disk is worth.
const QUEUES_AT_MOST: usize = 64;

/// Requests that may be in work at a time, over all queues.
const REQUESTS: usize = 64;
/// And of one queue, at least: a single client must be able to keep its disk busy.
const REQUESTS_OF_QUEUE: usize = 32;

/// Commands of FUSE to io_uring (`enum fuse_uring_cmd`).
const REGISTER: u32 = 1;
const COMMIT_AND_FETCH: u32 = 2;

/// `struct fuse_uring_req_header`: the header of request or reply, the operation's structure, and `struct fuse_uring_ent_in_out`.
const HEADER: usize = 288;
const OPERATION: std::ops::Range<usize> = 128..256;
const COMMIT_ID: std::ops::Range<usize> = 264..272;
const PAYLOAD_LEN: std::ops::Range<usize> = 272..276;

/// What the completion of the eventfd's poll carries; entries carry their slot.
const WAKE: u64 = u64::MAX;

type Ring = IoUring<squeue::Entry128, cqueue::Entry>;

/// Rings that exist and that FUSE does not know of yet.
pub(super) struct Rings(Vec<Ring>);

/// The way on which requests are to come.
#[derive(Debug)]
pub(super) enum Wanted {
    /// Over io_uring.
    Rings(Rings),
    /// Over /dev/fuse, as asked.
    Device,
    /// Over /dev/fuse, since io_uring cannot be had. Why is said once the disk is mounted: whoever is refused gets one line, of another reason.
    DeviceFor(String),
}

impl std::fmt::Debug for Rings {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Rings").field(&self.0.len()).finish()
    }
}

impl Rings {
    /// Rings, if requests are to come over them and can. To be called while the process may still look at files.
    ///
    /// # Errors
    /// They are to come over io_uring and over nothing else, and cannot.
    pub(super) fn wanted(transport: Transport) -> Result<Wanted> {
        match (transport, (transport != Transport::Dev).then(Rings::prepare)) {
            (_, None) => Ok(Wanted::Device),
            (_, Some(Ok(rings))) => Ok(Wanted::Rings(rings)),
            (Transport::Uring, Some(Err(reason))) => Err(Error::new(ErrorKind::UnsupportedFeature, format!("--transport uring: {reason}"))),
            (_, Some(Err(reason))) => Ok(Wanted::DeviceFor(reason)),
        }
    }

    /// Makes what can fail before the kernel is told that requests go this way: once it is, it sends none any other way.
    fn prepare() -> Result<Rings, String> {
        let enabled = std::fs::read_to_string(ENABLED).map_err(|_| "this kernel has no FUSE over io_uring".to_string())?;
        if !enabled.trim_start().starts_with(['Y', '1']) {
            return Err(format!("it is off in the kernel (echo Y > {ENABLED})"));
        }
        let possible = std::fs::read_to_string(POSSIBLE_CPUS).map_err(|error| format!("{POSSIBLE_CPUS}: {error}"))?;
        let queues = cpus(&possible).ok_or_else(|| format!("{POSSIBLE_CPUS}: {:?}", possible.trim()))?;
        if queues > QUEUES_AT_MOST {
            return Err(format!("{queues} possible CPUs are more than {QUEUES_AT_MOST}"));
        }
        // One more submission than entries: the eventfd's poll.
        let size = u32::try_from(depth(queues) + 1).unwrap_or(u32::MAX);
        (0..queues).map(|_| ring(size)).collect::<io::Result<_>>().map(Rings).map_err(|error| format!("io_uring: {error}"))
    }

    /// Registers entries and serves them, a thread for each queue, until the disk is unmounted. `device` is the session's, after the kernel's INIT
    /// was answered with FUSE_OVER_IO_URING.
    ///
    /// # Errors
    /// The system has no more threads or descriptors. The kernel then waits for queues that never come: the mount must be taken down.
    pub(super) fn serve(self, device: BorrowedFd<'_>, handler: &Arc<Handler>, workers: &Workers) -> Result<()> {
        let depth = depth(self.0.len());
        for (id, ring) in self.0.into_iter().enumerate() {
            let wake = Arc::new(eventfd().context(|| "eventfd")?);
            let (sender, returned) = crossbeam_channel::unbounded();
            let device = device.try_clone_to_owned().context(|| "duplicating /dev/fuse")?;
            let back = Back { sender, wake };
            let (handler, workers) = (Arc::clone(handler), workers.clone());
            let queue = Queue { ring, id: id as u16, device, slots: Vec::new(), alive: 0, handler, workers, returned, back };
            thread::Builder::new()
                .name(format!("fuse-ring-{id}"))
                .spawn(move || {
                    if let Err(error) = queue.run(depth) {
                        log::error!("FUSE over io_uring, queue {id}: {error}");
                    }
                })
                .context(|| "starting a thread of FUSE over io_uring")?;
        }
        Ok(())
    }
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

/// Entries of each queue.
fn depth(queues: usize) -> usize {
    (REQUESTS / queues.max(1)).max(REQUESTS_OF_QUEUE)
}

/// How many CPUs a list like `0-3,8` reaches up to: the kernel counts all numbers below the highest.
fn cpus(list: &str) -> Option<usize> {
    let last = list.trim().rsplit([',', '-']).next()?;
    last.parse::<usize>().ok()?.checked_add(1)
}

fn eventfd() -> io::Result<OwnedFd> {
    Ok(rustix::event::eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?)
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
        // `Queue::submit` takes the entry away from whoever might call this, and its completion, which gives it back.
        unsafe { self.header.as_mut() }
    }

    fn payload(&mut self) -> &mut [u8] {
        // SAFETY: as `header`.
        unsafe { self.payload.as_mut() }
    }

    fn operation(&mut self) -> Operation {
        let (opcode, _) = wire::in_header(self.header());
        wire::operation(opcode, &self.header()[OPERATION])
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
        // SAFETY: both came from a `Box` and are freed nowhere else. An entry is dropped only while it is ours (see `header`), or with its whole queue,
        // when the kernel has let go of all of them.
        unsafe {
            drop(Box::from_raw(self.header.as_ptr()));
            drop(Box::from_raw(self.payload.as_ptr()));
        }
    }
}

/// The way back to a queue, for entries that were answered elsewhere.
#[derive(Clone)]
struct Back {
    sender: Sender<(usize, Entry)>,
    wake: Arc<OwnedFd>,
}

/// An entry on its way through a worker. Dropped without an answer it answers EIO, so that no client waits for ever.
struct Pending {
    slot: usize,
    entry: Option<Entry>,
    back: Back,
}

impl Pending {
    /// Answers with what `work` makes of the entry.
    fn answer(mut self, work: impl FnOnce(&mut Entry) -> Result<usize, Errno>) {
        if let Some(entry) = &mut self.entry {
            let result = work(entry);
            entry.answer(result);
        }
        self.give_back();
    }

    fn give_back(&mut self) {
        if let Some(entry) = self.entry.take() {
            // The queue is gone only if its thread has failed; then nobody waits for this either.
            let _ = self.back.sender.send((self.slot, entry));
            let _ = rustix::io::write(&self.back.wake, &1u64.to_ne_bytes());
        }
    }
}

impl Drop for Pending {
    fn drop(&mut self) {
        if let Some(entry) = &mut self.entry {
            entry.answer(Err(Errno::IO));
        }
        self.give_back();
    }
}

/// One queue, on its thread.
struct Queue {
    ring: Ring,
    /// The number of its CPU.
    id: u16,
    device: OwnedFd,
    /// The entries that the kernel has, each in its place; others are with workers, or gone.
    slots: Vec<Option<Entry>>,
    /// Entries that the kernel still takes answers from.
    alive: usize,
    handler: Arc<Handler>,
    workers: Workers,
    returned: Receiver<(usize, Entry)>,
    back: Back,
}

impl Queue {
    fn run(mut self, depth: usize) -> io::Result<()> {
        // Where its requests come from. A CPU that is possible but not there is no error.
        let mut cpu = CpuSet::new();
        cpu.set(usize::from(self.id));
        let _ = rustix::thread::sched_setaffinity(None, &cpu);
        self.poll_wake()?;
        let entries: Vec<Entry> = (0..depth).map(|_| Entry::new()).collect();
        let places: Vec<Place> = entries.iter().map(place).collect();
        for (slot, entry) in entries.into_iter().enumerate() {
            let command = command(&self.device, REGISTER, self.id, 0);
            self.slots.push(None);
            self.submit(slot, entry, with_place(command, &places[slot]))?;
            self.alive += 1;
        }
        // The kernel reads the places while it takes the commands, here.
        self.ring.submit()?;
        drop(places);
        self.serve()
    }

    /// Until the kernel has let go of every entry.
    fn serve(&mut self) -> io::Result<()> {
        while self.alive > 0 {
            match self.ring.submit_and_wait(1) {
                Ok(_) => {}
                // Busy: there are completions to take first.
                Err(error) if matches!(Errno::from_io_error(&error), Some(Errno::INTR | Errno::BUSY)) => {}
                Err(error) => return Err(error),
            }
            loop {
                let Some(completion) = self.ring.completion().next() else { break };
                match completion.user_data() {
                    WAKE => {
                        let _ = rustix::io::read(&self.back.wake, &mut [0u8; 8]);
                        if !cqueue::more(completion.flags()) {
                            self.poll_wake()?;
                        }
                    }
                    slot => self.completed(slot as usize, completion.result())?,
                }
            }
            while let Ok((slot, entry)) = self.returned.try_recv() {
                self.commit(slot, entry)?;
            }
        }
        Ok(())
    }

    /// An entry has come back from the kernel: with a request, or for good.
    fn completed(&mut self, slot: usize, result: i32) -> io::Result<()> {
        let Some(entry) = self.slots.get_mut(slot).and_then(Option::take) else {
            return Err(io::Error::other(format!("the kernel completed entry {slot}, which it did not have")));
        };
        if result >= 0 {
            return self.request(slot, entry);
        }
        self.alive -= 1;
        match Errno::from_raw_os_error(-result) {
            // Unmounted.
            Errno::NOTCONN => {}
            errno => log::error!("FUSE over io_uring, queue {}: {}", self.id, crate::error::os_text(&errno.into())),
        }
        Ok(())
    }

    /// Answers a request here, if that takes no waiting, or has it answered.
    fn request(&mut self, slot: usize, mut entry: Entry) -> io::Result<()> {
        let result = match entry.operation() {
            Operation::Read { offset, len } => {
                let len = (len as usize).min(MAX_IO);
                match self.handler.read_local(offset, &mut entry.payload()[..len]) {
                    Ok(Answer::Done(len)) => Ok(len),
                    Ok(Answer::Miss) => {
                        self.on_worker(slot, entry, move |handler, entry| handler.read(offset, &mut entry.payload()[..len]));
                        return Ok(());
                    }
                    Err(errno) => Err(errno),
                }
            }
            Operation::Write { offset, len, flags } => {
                let (len, durability) = ((len as usize).min(MAX_IO), Durability::of_write(flags));
                match self.handler.write_local(offset, &entry.payload()[..len]) {
                    Ok(Answer::Done(len)) if durability == Durability::Now => {
                        self.after_flush(slot, entry, move |entry| wire::written(len as u32, entry.payload()));
                        return Ok(());
                    }
                    Ok(Answer::Done(len)) => Ok(wire::written(len as u32, entry.payload())),
                    Ok(Answer::Miss) => {
                        self.on_worker(slot, entry, move |handler, entry| {
                            let written = handler.write(offset, &entry.payload()[..len], durability)?;
                            Ok(wire::written(written as u32, entry.payload()))
                        });
                        return Ok(());
                    }
                    Err(errno) => Err(errno),
                }
            }
            Operation::Close if !self.handler.needs_flush() => Ok(0),
            Operation::Close | Operation::Sync => {
                self.after_flush(slot, entry, |_| 0);
                return Ok(());
            }
            Operation::Allocate { offset, len, mode } => {
                self.on_worker(slot, entry, move |handler, _| handler.fallocate(offset, len, mode).map(|()| 0));
                return Ok(());
            }
            Operation::Seek { offset, whence } => {
                self.on_worker(slot, entry, move |handler, entry| {
                    handler.lseek(offset, whence).map(|found| wire::sought(found, entry.payload()))
                });
                return Ok(());
            }
            Operation::GetAttributes => self.handler.getattr().map(|stat| wire::attributes(&stat, ATTR_TTL, entry.payload())),
            Operation::SetAttributes { truncate, changes } => {
                self.handler.setattr(truncate, &changes).map(|stat| wire::attributes(&stat, ATTR_TTL, entry.payload()))
            }
            Operation::Open { flags } => self.handler.open(flags).map(|()| wire::opened(OPEN_FLAGS.bits(), entry.payload())),
            Operation::FileSystem => self.handler.statfs().map(|host| wire::file_system(&host, entry.payload())),
            Operation::Nothing => Ok(0),
            Operation::Refused(errno) => Err(errno),
        };
        entry.answer(result);
        self.commit(slot, entry)
    }

    fn on_worker(&self, slot: usize, entry: Entry, work: impl FnOnce(&Handler, &mut Entry) -> Result<usize, Errno> + Send + 'static) {
        let handler = Arc::clone(&self.handler);
        let pending = Pending { slot, entry: Some(entry), back: self.back.clone() };
        self.workers.miss(Box::new(move |_buffer| pending.answer(|entry| work(&handler, entry))));
    }

    fn after_flush(&self, slot: usize, entry: Entry, work: impl FnOnce(&mut Entry) -> usize + Send + 'static) {
        let pending = Pending { slot, entry: Some(entry), back: self.back.clone() };
        self.workers.flush(Box::new(move |flushed| pending.answer(|entry| flushed.map(|()| work(entry)))));
    }

    /// Hands an answered entry to the kernel, which will bring it back with another request.
    fn commit(&mut self, slot: usize, mut entry: Entry) -> io::Result<()> {
        let id = entry.header()[COMMIT_ID].first_chunk().map_or(0, |id| u64::from_ne_bytes(*id));
        let command = command(&self.device, COMMIT_AND_FETCH, self.id, id);
        self.submit(slot, entry, command)
    }

    /// Puts a command with an entry into the ring; it goes to the kernel with the next call.
    fn submit(&mut self, slot: usize, entry: Entry, command: squeue::Entry128) -> io::Result<()> {
        self.slots[slot] = Some(entry);
        let command = command.user_data(slot as u64);
        // SAFETY: what the command names, the entry's memory, stays where it is and untouched in `slots` until the command completes, and the list of the
        // two places that registering reads lives until `run` has submitted it.
        while unsafe { self.ring.submission().push(&command) }.is_err() {
            // There is room for every entry, so this is for the sake of completeness.
            self.ring.submit()?;
        }
        Ok(())
    }

    /// Watches for entries that come back, until the kernel says that it does not any more.
    fn poll_wake(&mut self) -> io::Result<()> {
        let readable = rustix::event::PollFlags::IN.bits();
        let poll = opcode::PollAdd::new(Fd(self.back.wake.as_raw_fd()), u32::from(readable)).multi(true).build().user_data(WAKE);
        // SAFETY: it names a descriptor and no memory; the descriptor is the queue's own.
        while unsafe { self.ring.submission().push(&poll.clone().into()) }.is_err() {
            self.ring.submit()?;
        }
        Ok(())
    }
}

impl Drop for Queue {
    /// What the kernel still has must not be freed: only a queue that failed has such entries.
    fn drop(&mut self) {
        self.slots.drain(..).flatten().for_each(std::mem::forget);
    }
}

/// Where an entry's memory lies.
type Place = [nix::libc::iovec; 2];

fn place(entry: &Entry) -> Place {
    [
        nix::libc::iovec { iov_base: entry.header.as_ptr().cast(), iov_len: HEADER },
        nix::libc::iovec { iov_base: entry.payload.as_ptr().cast(), iov_len: entry.payload.len() },
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
mod tests {
    use super::*;

    #[test]
    fn the_highest_possible_cpu_counts() {
        assert_eq!(cpus("0\n"), Some(1));
        assert_eq!(cpus("0-1\n"), Some(2));
        assert_eq!(cpus("0-3,8-11\n"), Some(12));
        assert_eq!(cpus(""), None);
        assert_eq!(cpus("x"), None);
    }

    #[test]
    fn an_entry_that_is_dropped_on_its_way_answers_eio_and_comes_back() {
        let (sender, returned) = crossbeam_channel::unbounded();
        let back = Back { sender, wake: Arc::new(eventfd().unwrap()) };
        let mut entry = Entry::new();
        entry.header()[8..16].copy_from_slice(&77u64.to_ne_bytes());
        drop(Pending { slot: 5, entry: Some(entry), back });
        let (slot, mut entry) = returned.try_recv().unwrap();
        let header = entry.header();
        assert_eq!((slot, &header[4..8], &header[8..16]), (5, &(-5i32).to_ne_bytes()[..], &77u64.to_ne_bytes()[..]));
    }
}
