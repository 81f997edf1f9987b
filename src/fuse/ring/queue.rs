//! Who answers the requests that come over io_uring.
//!
//! ```text
//!  kernel ── queue per CPU ──▶ its server ──▶ file system ──▶ Disk::read_local, write_local     a hit: answered in place
//!                               │  ▲  ├── workers ──▶ file system ──▶ Disk::read, write, …      a miss: the entry goes with the task …
//!                               │  └──┴── eventfd ◀── the entry, answered                       … and comes back
//!                               └── lane of the queue: large requests, when several wait
//! ```
//!
//! The kernel spreads requests over the queues by the CPU of whoever asks, and begins to use them when each possible CPU's queue has an entry. fuser
//! still negotiates, and serves what stays on /dev/fuse (FUSE_FORGET). After the unmount all entries come back with ENOTCONN, and the threads end.
//!
//! A server runs on the CPU that its requests come from, which is best for small ones: whoever asks and whoever answers take turns, and no other CPU has
//! to be woken (measured: 110,000 reads of 4 KiB per second at depth 1, against 27,000 where the scheduler chooses). Copying a large one takes longer
//! than to wake somebody. So while several wait, large ones go to the *lane*, a second server of the queue that may run anywhere. It hands its answers to
//! the kernel itself (half of the copying is done there), so the entry's next request comes to it as well; with a small request the entry goes home.
//!
//! **Touches:** what `ring` does. **Never:** waits for anything but its ring on a server's thread.
//! **Locks:** none. **Invariants:** each entry of a queue is in one place: with the kernel through one of the two ports, in a task, or in a channel.

use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::{Arc, Weak};
use std::thread;

use crossbeam_channel::{Receiver, Sender};
use rustix::event::EventfdFlags;
use rustix::io::Errno;
use rustix::thread::CpuSet;

use super::super::Transport;
use super::super::dispatch::{Dispatcher, LaterReply, MAX_IO, Reply};
use super::super::session::Ending;
use super::super::wire::Operation;
use super::{Completion, Entry, Port, Ring, ring};
use crate::error::Context;
use crate::{Error, ErrorKind, Result};

/// Whether the kernel's FUSE may use io_uring.
const ENABLED: &str = "/sys/module/fuse/parameters/enable_uring";
/// The kernel wants a queue for each of these.
const POSSIBLE_CPUS: &str = "/sys/devices/system/cpu/possible";
/// More CPUs than this are served over /dev/fuse: two threads for each would be more than a disk is worth.
const QUEUES_AT_MOST: usize = 64;

/// Requests that may be in work at a time over all queues, and so the most memory that their buffers take: 1 GiB of [`MAX_IO`] each.
const REQUESTS: usize = 1024;
/// And of one queue, at least.
const FEWEST_OF_QUEUE: usize = 16;
/// And of one queue, at most. A request keeps its entry until it is answered, so when as many from one CPU hang in a dead backing file, what is local
/// waits as well if it is asked for from there: so many are as many as there may be asynchronous ones (`MAX_BACKGROUND`), and then some.
const MOST_OF_QUEUE: usize = 96;

/// Bytes of data from which on a request is large: copying them takes longer than to wake another thread.
const LARGE: usize = 128 << 10;

/// Rings that exist and that FUSE does not know of yet: two for each queue.
pub(in super::super) struct Rings(Vec<(Ring, Ring)>);

/// The way on which requests are to come.
#[derive(Debug)]
pub(in super::super) enum Wanted {
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
    pub(in super::super) fn wanted(transport: Transport) -> Result<Wanted> {
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
        (0..queues)
            .map(|_| Ok((ring(size)?, ring(size)?)))
            .collect::<io::Result<_>>()
            .map(Rings)
            .map_err(|error| format!("io_uring: {error}"))
    }

    /// Registers entries and serves them, two threads for each queue, until the disk is unmounted. `device` is the session's, after the kernel's INIT
    /// was answered with FUSE_OVER_IO_URING.
    ///
    /// # Errors
    /// The system has no more threads or descriptors. The kernel then waits for queues that never come: the mount must be taken down.
    pub(in super::super) fn serve(self, device: BorrowedFd<'_>, dispatcher: &Dispatcher, ending: &Arc<Ending>) -> Result<()> {
        let depth = depth(self.0.len());
        for (number, (ring, lane_ring)) in self.0.into_iter().enumerate() {
            let (home, to_home) = Mailbox::new().context(|| "eventfd")?;
            let (lane, to_lane) = Mailbox::new().context(|| "eventfd")?;
            let queue = number as u16;
            for (name, ring, mailbox, address, role) in [
                ("fuse-ring", ring, home, to_home.clone(), Role::Home { lane: to_lane.clone(), alive: depth }),
                ("fuse-lane", lane_ring, lane, to_lane, Role::Lane { home: to_home }),
            ] {
                let port = Port::new(ring, device, queue, depth).context(|| "duplicating /dev/fuse")?;
                let buffer = vec![0; LARGE].into_boxed_slice();
                let server = Server { port, queue, dispatcher: dispatcher.clone(), mailbox, address, buffer, role };
                // Not kept alive by this thread: the session ends with those that read /dev/fuse.
                let ending = Arc::downgrade(ending);
                thread::Builder::new()
                    .name(format!("{name}-{number}"))
                    .spawn(move || {
                        let _panic = Panic(Weak::clone(&ending));
                        if let Err(error) = server.run().context(|| format!("FUSE over io_uring, queue {number}"))
                            && let Some(ending) = ending.upgrade()
                        {
                            ending.fail(error);
                        }
                    })
                    .context(|| "starting a thread of FUSE over io_uring")?;
            }
        }
        Ok(())
    }
}

/// A thread; dropped when it ends. Requests of its CPU would wait for ever after a panic.
struct Panic(Weak<Ending>);

impl Drop for Panic {
    fn drop(&mut self) {
        if thread::panicking()
            && let Some(ending) = self.0.upgrade()
        {
            ending.fail(Error::new(ErrorKind::Io, "a thread of FUSE over io_uring has panicked"));
        }
    }
}

/// Entries of each queue.
fn depth(queues: usize) -> usize {
    (REQUESTS / queues.max(1)).clamp(FEWEST_OF_QUEUE, MOST_OF_QUEUE)
}

/// How many CPUs a list like `0-3,8` reaches up to: the kernel counts all numbers below the highest.
fn cpus(list: &str) -> Option<usize> {
    let last = list.trim().rsplit([',', '-']).next()?;
    last.parse::<usize>().ok()?.checked_add(1)
}

/// What goes to a server from other threads.
enum Parcel {
    /// An entry with its answer, to be handed to the kernel.
    Answered(usize, Entry),
    /// To a lane: an entry with a request.
    Request(usize, Entry),
    /// From a lane: the kernel has let go of an entry.
    Gone,
    /// To a lane: there is nothing left to serve.
    End,
}

/// Where a server finds its parcels.
struct Mailbox {
    parcels: Receiver<Parcel>,
    wake: Arc<OwnedFd>,
}

/// The way to a server.
#[derive(Clone)]
struct Address {
    parcels: Sender<Parcel>,
    wake: Arc<OwnedFd>,
}

impl Mailbox {
    fn new() -> io::Result<(Mailbox, Address)> {
        let wake = Arc::new(rustix::event::eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?);
        let (sender, parcels) = crossbeam_channel::unbounded();
        Ok((Mailbox { parcels, wake: Arc::clone(&wake) }, Address { parcels: sender, wake }))
    }
}

impl Address {
    /// Never waits. Where the server has failed nobody waits for the parcel either.
    fn send(&self, parcel: Parcel) {
        let _ = self.parcels.send(parcel);
        let _ = rustix::io::write(&self.wake, &1u64.to_ne_bytes());
    }
}

/// An entry on its way through a worker. Dropped without an answer it answers EIO, so that no client waits for ever.
struct Pending {
    slot: usize,
    entry: Option<Entry>,
    /// Bytes of a write.
    len: usize,
    back: Address,
}

impl Pending {
    fn give_back(&mut self, answer: Result<&[u8], Errno>) {
        if let Some(mut entry) = self.entry.take() {
            fill(&mut entry, answer);
            self.back.send(Parcel::Answered(self.slot, entry));
        }
    }
}

impl LaterReply for Pending {
    fn data(&mut self) -> &[u8] {
        self.entry.as_mut().map_or(&[], |entry| &entry.payload()[..self.len])
    }

    fn send(mut self, answer: Result<&[u8], Errno>) {
        self.give_back(answer);
    }
}

impl Drop for Pending {
    fn drop(&mut self) {
        self.give_back(Err(Errno::IO));
    }
}

/// Puts an answer into an entry.
fn fill(entry: &mut Entry, answer: Result<&[u8], Errno>) {
    let result = answer.map(|bytes| {
        entry.payload()[..bytes.len()].copy_from_slice(bytes);
        bytes.len()
    });
    entry.answer(result);
}

/// The reply to a request, on the thread of its server.
struct RingReply<'a> {
    port: &'a mut Port,
    role: &'a Role,
    address: &'a Address,
    slot: usize,
    /// Until it is sent.
    entry: Option<Entry>,
    /// Bytes of a write.
    len: usize,
    is_large: bool,
    /// What handing it to the kernel has led to.
    handed_in: &'a mut io::Result<()>,
}

impl RingReply<'_> {
    /// With its answer in it: to the kernel, through the port by which the entry's next request is to come.
    fn hand_in(&mut self, entry: Entry) {
        match self.role {
            Role::Lane { home } if !self.is_large => home.send(Parcel::Answered(self.slot, entry)),
            _ => *self.handed_in = self.port.commit(self.slot, entry),
        }
    }

    fn answer(&mut self, answer: Result<&[u8], Errno>) {
        if let Some(mut entry) = self.entry.take() {
            fill(&mut entry, answer);
            self.hand_in(entry);
        }
    }
}

impl Reply for RingReply<'_> {
    type Later = Pending;

    fn data(&mut self) -> &[u8] {
        self.entry.as_mut().map_or(&[], |entry| &entry.payload()[..self.len])
    }

    fn room<'a>(&'a mut self, scratch: &'a mut [u8]) -> &'a mut [u8] {
        self.entry.as_mut().map_or(scratch, Entry::payload)
    }

    fn send_room(mut self, _scratch: &[u8], len: usize) {
        if let Some(mut entry) = self.entry.take() {
            entry.answer(Ok(len));
            self.hand_in(entry);
        }
    }

    fn send(mut self, answer: Result<&[u8], Errno>) {
        self.answer(answer);
    }

    fn has_time(&mut self) -> bool {
        // Where several requests wait, more threads are better.
        matches!(self.role, Role::Home { .. }) && !self.port.has_more()
    }

    fn send_now(mut self, answer: Result<&[u8], Errno>) {
        self.answer(answer);
        if self.handed_in.is_ok() {
            *self.handed_in = self.port.push();
        }
    }

    fn forget(self) {
        // Does not come this way. The entry goes back all the same.
        self.send(Ok(&[]));
    }

    fn later(mut self) -> Pending {
        Pending { slot: self.slot, entry: self.entry.take(), len: self.len, back: self.address.clone() }
    }
}

impl Drop for RingReply<'_> {
    fn drop(&mut self) {
        self.answer(Err(Errno::IO));
    }
}

/// Which of the two servers of a queue.
enum Role {
    /// The one that has registered the entries, and counts those that the kernel still takes answers from.
    Home { lane: Address, alive: usize },
    /// The one that gets large requests.
    Lane { home: Address },
}

/// One server of one queue, on its thread.
struct Server {
    port: Port,
    /// The number of the queue, which is that of its CPU.
    queue: u16,
    dispatcher: Dispatcher,
    mailbox: Mailbox,
    /// Of its own mailbox.
    address: Address,
    /// For reads that are answered before they are done with.
    buffer: Box<[u8]>,
    role: Role,
}

impl Server {
    fn run(mut self) -> io::Result<()> {
        self.port.watch(&self.mailbox.wake)?;
        if let Role::Home { .. } = self.role {
            // Where its requests come from. A CPU that is possible but not there is no error.
            let mut cpu = CpuSet::new();
            cpu.set(usize::from(self.queue));
            let _ = rustix::thread::sched_setaffinity(None, &cpu);
            self.port.register()?;
        }
        self.serve()?;
        if let Role::Home { lane, .. } = &self.role {
            lane.send(Parcel::End);
        }
        Ok(())
    }

    /// Until the kernel has let go of every entry.
    fn serve(&mut self) -> io::Result<()> {
        while !matches!(self.role, Role::Home { alive: 0, .. }) {
            self.port.wait()?;
            while let Some(completion) = self.port.next()? {
                match completion {
                    Completion::Woken(still_watched) => {
                        let _ = rustix::io::read(&self.mailbox.wake, &mut [0u8; 8]);
                        if !still_watched {
                            self.port.watch(&self.mailbox.wake)?;
                        }
                    }
                    Completion::Entry(slot, entry, Ok(())) => self.request(slot, entry)?,
                    Completion::Entry(_, _, Err(errno)) => {
                        // ENOTCONN: unmounted.
                        if errno != Errno::NOTCONN {
                            log::error!("FUSE over io_uring, queue {}: {}", self.queue, crate::error::os_text(&errno.into()));
                        }
                        self.gone();
                    }
                }
            }
            while let Ok(parcel) = self.mailbox.parcels.try_recv() {
                match parcel {
                    Parcel::Answered(slot, entry) => self.port.commit(slot, entry)?,
                    Parcel::Request(slot, entry) => self.request(slot, entry)?,
                    Parcel::Gone => self.gone(),
                    Parcel::End => return Ok(()),
                }
            }
        }
        Ok(())
    }

    /// The kernel has let go of an entry.
    fn gone(&mut self) {
        match &mut self.role {
            Role::Home { alive, .. } => *alive -= 1,
            Role::Lane { home } => home.send(Parcel::Gone),
        }
    }

    /// Answers a request here, if that takes no waiting, or has it answered.
    fn request(&mut self, slot: usize, mut entry: Entry) -> io::Result<()> {
        let operation = entry.operation();
        let is_large = matches!(operation, Operation::Read { len, .. } | Operation::Write { len, .. } if len as usize >= LARGE);
        match &self.role {
            Role::Home { lane, .. } if is_large && self.port.has_more() => {
                lane.send(Parcel::Request(slot, entry));
                return Ok(());
            }
            _ => {}
        }
        let len = match operation {
            Operation::Write { len, .. } => (len as usize).min(MAX_IO),
            _ => 0,
        };
        let mut handed_in = Ok(());
        let reply = RingReply {
            port: &mut self.port,
            role: &self.role,
            address: &self.address,
            slot,
            entry: Some(entry),
            len,
            is_large,
            handed_in: &mut handed_in,
        };
        self.dispatcher.serve(operation, reply, &mut self.buffer);
        handed_in
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_buffers_of_a_disk_are_bounded() {
        for queues in 1..=QUEUES_AT_MOST {
            let depth = depth(queues);
            assert!((FEWEST_OF_QUEUE..=MOST_OF_QUEUE).contains(&depth) && depth * queues * MAX_IO <= 1 << 30, "{queues} queues of {depth}");
        }
        assert_eq!((depth(2), depth(64)), (96, 16));
    }

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
        let (mailbox, back) = Mailbox::new().unwrap();
        let mut entry = Entry::new();
        entry.header()[8..16].copy_from_slice(&77u64.to_ne_bytes());
        drop(Pending { slot: 5, entry: Some(entry), len: 0, back });
        let Ok(Parcel::Answered(slot, mut entry)) = mailbox.parcels.try_recv() else { panic!("not answered") };
        let header = entry.header();
        assert_eq!((slot, &header[4..8], &header[8..16]), (5, &(-5i32).to_ne_bytes()[..], &77u64.to_ne_bytes()[..]));
    }
}
