//! Rings for FUSE over io_uring (Linux 6.14 and later, with the module parameter `enable_uring`).
//! Requests and replies pass through memory that the process shares with the kernel. One system
//! call hands over the replies of a batch and brings the next requests; /dev/fuse needs two system
//! calls for each request.
//!
//! **When the kernel touches the memory.** A ring belongs to one thread
//! (`IORING_SETUP_SINGLE_ISSUER`), and the kernel does its work for the ring only when that thread
//! enters the kernel for it (`IORING_SETUP_DEFER_TASKRUN`). FUSE copies a request into an entry
//! either as such work (`fuse_uring_send_in_task`) or while it takes the entry's last answer
//! (`fuse_uring_commit_fetch`). Both happen only inside io_uring_enter(2), called by the thread
//! through whose ring the entry was handed in. Without these flags the kernel may copy at any
//! interrupt of that thread.
//!
//! **Memory that is given back.** Between two such calls the thread therefore knows which entries
//! of its ring hold no data: those that the kernel has taken and whose completion the thread has
//! not seen. Entries without a large request (more than `LITTLE` bytes) for one to two
//! `PERIOD`s give their memory back (`MADV_REMOVE`), see [`Port::give_back`]. A timer in the
//! ring starts this. The timer runs only while there is memory to give back, so that small requests
//! and an idle disk cost nothing. The entries that the kernel takes next, which are those that it
//! got last, keep `USUAL` bytes.
//!
//! **When the process is killed.** Its memory stays, see [`EntryMemory`], and so do the requests
//! that lie in it: FUSE keeps each request until its answer is handed in by its number, by any
//! process. Requests that no entry has wait in their queue, and a successor gets them when it
//! registers entries. A request would be lost only between the death of the thread and the
//! cancellation of its commands; [`Port::hold`] closes that gap.
//!
//! One case stays, in which clients get EAGAIN or EINTR: the process is killed *while* the kernel
//! copies a request into memory that was given back or never used. A page fault then fails, and so
//! do the requests that wait in the queue, because the kernel tries one after the other with the
//! same entry. Clients that wrote up to 1 MiB each, and began with memory that was never used, met
//! this after 5 of 960 kills, and after none of 960 with memory that was in use (Linux 6.18). So an
//! entry is handed in with memory for `USUAL` bytes, or for as much data as has come with any
//! request lately, and the kernel prefers the entry that it got last. What stays are the first
//! writes of more than `USUAL` bytes on a CPU after some seconds without one, and the first ones of
//! more than `LITTLE` bytes at a larger depth than that of the entries which keep memory.
//!
//! This crate contains the rings and their memory, and nothing else. It has every `unsafe` block of
//! the workspace. The crate `export` has the threads that serve the queues, and the meaning of a
//! request.
//!
//! **Touches:** io_uring, the session's /dev/fuse, shared memory.
//! **Never:** knows what a request means.
//! **Locks:** none.
//! **Invariants:** an entry belongs either to the kernel or to the process. One of the process is a
//! [`RingEntry`], a value with one owner: a queue, a task, or a channel between them. One of the
//! kernel is a `LentEntry` in a slot of a [`Port`], which gives no reference to the header and
//! payload. No other process has the memory mapped while an entry exists in this one.

mod memory;

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use io_uring::register::Restriction;
use io_uring::types::{Fd, Timespec};
use io_uring::{IoUring, cqueue, opcode, squeue};
use rustix::io::Errno;

pub use memory::{EntryMemory, EntryState, PAYLOAD, REPLY_HEADER, ReplyData, RingEntry, USUAL};

use memory::{HEADER, kept};

/// The device of the kernel's FUSE.
const DEVICE: &str = "/dev/fuse";

/// Commands of FUSE for io_uring (`enum fuse_uring_cmd`).
const REGISTER: u32 = 1;
const COMMIT_AND_FETCH: u32 = 2;

/// `user_data` of the eventfd's poll. The commands of entries carry their slot.
const WAKE: u64 = u64::MAX;
/// `user_data` of the timer.
const TICK: u64 = u64::MAX - 1;
/// `user_data` of the polls of [`Port::hold`].
const HOLD: u64 = u64::MAX - 2;
/// Number of polls of [`Port::hold`]. One is enough, unless a client is interrupted between the two
/// steps in which FUSE gives its request to an entry; none of 500 kills under load has met that.
const HOLDS: usize = 16;
/// Commands of a ring besides those of its entries: the eventfd's poll, the timer, and the polls
/// of [`Port::hold`].
const OTHER_COMMANDS: usize = 2 + HOLDS;

/// Interval of the timer that looks for unused payloads. A payload that was used for more than
/// `LITTLE` bytes stays in memory for one to two intervals.
static PERIOD: Timespec = Timespec::new().sec(2);

/// An io_uring whose submission entries have 80 bytes for a command of FUSE.
pub type Ring = IoUring<squeue::Entry128, cqueue::Entry>;

/// FUSE_DEV_IOC_CLONE: `_IOR(229, 0, uint32_t)`.
const CLONE: rustix::ioctl::Opcode = rustix::ioctl::opcode::read::<u32>(229, 0);

/// Opens one more descriptor of the connection of `device`. Each descriptor has its own list of
/// requests in the kernel: a request that was read from a descriptor must be answered on it.
///
/// # Errors
/// /dev/fuse cannot be opened by this process.
pub fn clone_device(device: &OwnedFd) -> io::Result<OwnedFd> {
    let new = File::options().read(true).write(true).open(DEVICE)?;
    let mut number = device.as_raw_fd().cast_unsigned();
    // SAFETY: the kernel reads one u32 at this address, which is on the stack of this thread until
    // the call returns: the number of a descriptor. It writes nothing.
    unsafe { rustix::ioctl::ioctl(&new, rustix::ioctl::Updater::<CLONE, u32>::new(&mut number)) }?;
    Ok(new.into())
}

/// Makes a ring for `entries` entries. The ring accepts commands of FUSE, the poll of an eventfd
/// and a timer, and nothing else, because a filter of system calls does not see what is done
/// through a ring. It accepts no commands before [`Port::enable`], and then only from the thread
/// that called that function.
pub fn ring(entries: usize) -> io::Result<Ring> {
    let size = u32::try_from(entries + OTHER_COMMANDS).map_err(io::Error::other)?;
    let ring: Ring = Ring::builder()
        .setup_r_disabled()
        .setup_submit_all()
        .setup_single_issuer()
        .setup_defer_taskrun()
        .setup_taskrun_flag()
        .setup_cqsize(2 * size.next_power_of_two())
        .build(size)?;
    let mut allowed = [
        Restriction::sqe_op(opcode::UringCmd80::CODE),
        Restriction::sqe_op(opcode::PollAdd::CODE),
        Restriction::sqe_op(opcode::Timeout::CODE),
        Restriction::sqe_flags_allowed(squeue::Flags::IO_HARDLINK.bits()),
    ];
    ring.submitter().register_restrictions(&mut allowed)?;
    Ok(ring)
}

/// What [`Port::hold`] polls: a ring that is used for nothing else.
#[derive(Clone, Debug)]
pub struct Anchor(Arc<OwnedFd>);

impl Anchor {
    /// Makes the ring.
    ///
    /// # Errors
    /// The host has no io_uring, or the system has no more descriptors.
    pub fn new() -> io::Result<Anchor> {
        let ring: IoUring = IoUring::builder().setup_r_disabled().build(1)?;
        // The descriptor alone is enough, without the memory of the ring.
        // SAFETY: the ring, a local value of this thread, has the descriptor open until the end of
        // this function, and the borrow ends before that.
        let descriptor = unsafe { BorrowedFd::borrow_raw(ring.as_raw_fd()) };
        Ok(Anchor(Arc::new(descriptor.try_clone_to_owned()?)))
    }
}

/// An event of a [`Port`].
pub enum Completion {
    /// The eventfd was written to. `false` means that the ring does not watch it any more.
    Woken(bool),
    /// It is time for [`Port::give_back`].
    Tick,
    /// The process owns the entry of this slot again: it holds a request, or an error means that
    /// the kernel has released it.
    Entry(usize, RingEntry, Result<(), Errno>),
}

/// A ring, and the entries that the kernel has through it. An entry belongs to a queue of FUSE and
/// not to a ring: its next request arrives at the ring through which its last answer was handed in.
pub struct Port {
    ring: Ring,
    device: OwnedFd,
    /// The number of the queue of FUSE.
    queue: u16,
    /// The entries that the kernel has, by slot.
    slots: Vec<Option<LentEntry>>,
    order: Arc<QueueOrder>,
    /// The addresses of the entries' memory by slot, as the REGISTER commands name them; empty in
    /// a port that registers none. The kernel reads this list when it takes the commands. The list
    /// lives as long as the ring, whichever of the commands the kernel has taken.
    places: Box<[IovecPair]>,
    /// The slots whose answers are among the commands that the kernel has not taken.
    answers: Vec<usize>,
    /// The most data that came with a request since the timer's last tick, and between the two
    /// ticks before it, in bytes.
    filled: (usize, usize),
    /// Whether the timer runs.
    ticks: bool,
}

/// An entry from the moment its command is pushed until the completion of that command. The kernel
/// may write to its header and payload whenever the thread of its port is inside
/// io_uring_enter(2), or ends. So nothing here makes a reference to them.
struct LentEntry(RingEntry);

impl LentEntry {
    /// See [`RingEntry::note_taken`]: it changes the record, which the kernel does not know.
    fn note_taken(&mut self) {
        self.0.note_taken();
    }

    /// See [`RingEntry::grow_old`]: it makes no reference. The caller knows that the payload holds
    /// neither an answer nor a request.
    fn grow_old(&mut self, keep: usize) {
        self.0.grow_old(keep);
    }

    fn is_large(&self) -> bool {
        self.0.is_large()
    }

    /// The command has completed: the kernel does not access the memory any more.
    fn back(self) -> RingEntry {
        self.0
    }
}

/// The order in which the kernel got the entries of one queue, which both of its ports share. The
/// kernel takes the entry next that it got last.
#[derive(Debug)]
pub struct QueueOrder {
    /// For each slot the number under which the kernel got its entry last.
    numbers: Box<[AtomicU64]>,
    next: AtomicU64,
    /// How many entries keep [`USUAL`] bytes of their payload in memory: those that the kernel got
    /// last. When other ones take their place, both keep them until the timers have ticked.
    keeps: usize,
}

impl QueueOrder {
    /// Makes the order of `slots` entries, of which `keeps` keep [`USUAL`] bytes.
    pub fn new(slots: usize, keeps: usize) -> Arc<QueueOrder> {
        let numbers = (0..slots).map(|_| AtomicU64::new(0)).collect();
        Arc::new(QueueOrder { numbers, next: AtomicU64::new(1), keeps })
    }

    /// Notes that the kernel gets the entry of this slot. (The numbers order nothing but
    /// themselves, so `Relaxed` is enough.)
    fn note(&self, slot: usize) {
        let number = self.next.fetch_add(1, Ordering::Relaxed);
        self.numbers[slot].store(number, Ordering::Relaxed);
    }

    /// Returns for each slot how many bytes of the payload its entry keeps.
    fn kept(&self) -> Vec<usize> {
        let numbers: Vec<u64> = self.numbers.iter().map(|n| n.load(Ordering::Relaxed)).collect();
        let mut sorted = numbers.clone();
        sorted.sort_unstable_by(|a, b| b.cmp(a));
        let since = match self.keeps.checked_sub(1) {
            Some(last) => sorted.get(last).copied().unwrap_or(0),
            None => u64::MAX,
        };
        numbers.iter().map(|&number| if number >= since { USUAL } else { kept() }).collect()
    }
}

/// A function that submits the pushed commands, waits for `want` completions, and returns how many
/// commands the kernel has taken. It is a parameter so that tests can replace it.
type Enter = fn(&Ring, usize) -> io::Result<usize>;

fn enter(ring: &Ring, want: usize) -> io::Result<usize> {
    ring.submitter().submit_and_wait(want)
}

/// How long to wait before a system call is tried again after the kernel had no memory for it.
const PAUSE: Duration = Duration::from_millis(1);
/// How many tries in a row may succeed without the kernel taking a command; then that is an error.
const TRIES: u32 = 1000;

impl Port {
    /// Makes a port to a queue, for the entries of `order`. `device` is the session's /dev/fuse.
    ///
    /// # Errors
    /// The system has no more descriptors.
    pub fn new(
        ring: Ring,
        device: BorrowedFd<'_>,
        queue: u16,
        order: Arc<QueueOrder>,
    ) -> io::Result<Port> {
        let slots = order.numbers.iter().map(|_| None).collect();
        Ok(Port {
            ring,
            device: device.try_clone_to_owned()?,
            queue,
            slots,
            order,
            places: Box::default(),
            answers: Vec::new(),
            filled: (0, 0),
            ticks: false,
        })
    }

    /// Binds the ring to the calling thread. Must be called before any other use.
    ///
    /// # Errors
    /// The ring belongs to another thread.
    pub fn enable(&self) -> io::Result<()> {
        self.ring.submitter().register_enable_rings()
    }

    /// Gives the kernel entries with their slots. It prefers the last ones. `places` are the
    /// addresses of the memory of all slots, also of those whose entries are given to it later, by
    /// [`Port::commit`].
    ///
    /// # Errors
    /// The kernel has not taken all of them.
    pub fn register(&mut self, places: Places, entries: Vec<(usize, RingEntry)>) -> io::Result<()> {
        self.register_by(places, entries, enter)
    }

    fn register_by(
        &mut self,
        places: Places,
        entries: Vec<(usize, RingEntry)>,
        enter: Enter,
    ) -> io::Result<()> {
        self.places = places.0;
        // What an earlier process has got.
        let resident = entries.iter().map(|(_, entry)| entry.resident()).max();
        self.filled.0 = self.filled.0.max(resident.unwrap_or(0));
        let others = entries.len().saturating_sub(self.order.keeps);
        for (index, (slot, mut entry)) in entries.into_iter().enumerate() {
            if index >= others {
                entry.keep_usual();
            }
            if entry.is_large() {
                entry.make_resident(self.filled.0);
            }
            self.register_again(slot, entry)?;
        }
        let mut tries = 0;
        while !self.ring.submission().is_empty() {
            let taken = self.enter_by(enter, 0)?;
            tries = if taken == 0 { tries + 1 } else { 0 };
            if tries == TRIES {
                let left = self.ring.submission().len();
                return Err(io::Error::other(format!(
                    "the kernel does not take {left} of {} entries",
                    self.slots.len()
                )));
            }
        }
        Ok(())
    }

    /// Gives the kernel an entry that it does not have, without an answer. The command is submitted
    /// by the next [`Port::wait`].
    ///
    /// # Errors
    /// This port has registered no entry with [`Port::register`], or the kernel takes no commands.
    pub fn register_again(&mut self, slot: usize, entry: RingEntry) -> io::Result<()> {
        let command = command(&self.device, REGISTER, self.queue, 0);
        let place = self.places.get(slot).ok_or_else(|| io::Error::other("no such entry"))?;
        let command = with_place(command, place);
        let is_large = entry.is_large();
        self.submit(slot, entry, command)?;
        if is_large { self.tick_later() } else { Ok(()) }
    }

    /// Makes the kernel finish its work for this ring before the thread ends, also if the process
    /// is killed. To be called once, before [`Port::register`].
    ///
    /// FUSE gives a request to an entry that waits, and leaves the copying to the thread of the
    /// ring. A thread that has ended copies nothing more, and its commands stay until a kernel
    /// thread cancels them, after the ring was closed. Each request that FUSE gives to one of them
    /// meanwhile fails (`IO_URING_F_TASK_DEAD`): its client gets ECANCELED, or waits for ever,
    /// which depends on the version of the kernel. On Linux 6.18, one kill under load gives one to
    /// four such errors.
    ///
    /// A thread that ends does cancel its commands itself (`io_uring_cancel_generic` in
    /// io_uring/cancel.c, called by `do_exit` while the thread still has its memory), and does the
    /// deferred work before and after that, but only as long as it has a command for a descriptor
    /// *of a ring*. So this function polls a ring for something that never comes. There is no
    /// interface that promises this; the tests of takeovers under load fail without it.
    ///
    /// The polls are linked: each one begins when the one before is cancelled. The kernel goes over
    /// the commands and the work of the ring once for each of them, and so finds the work for a
    /// request that FUSE was just giving to an entry.
    ///
    /// # Errors
    /// The kernel does not take the commands.
    pub fn hold(&mut self, anchor: &Anchor) -> io::Result<()> {
        let never = u32::from(rustix::event::PollFlags::PRI.bits());
        for number in 1..=HOLDS {
            let flags =
                if number < HOLDS { squeue::Flags::IO_HARDLINK } else { squeue::Flags::empty() };
            let poll = opcode::PollAdd::new(Fd(anchor.0.as_raw_fd()), never).build();
            let poll = poll.flags(flags).user_data(HOLD);
            // SAFETY: the command names a descriptor and no memory.
            if unsafe { self.ring.submission().push(&poll.into()) }.is_err() {
                // A chain must not be divided.
                return Err(io::Error::other("the ring has no space for the polls that hold it"));
            }
        }
        self.push()
    }

    /// Hands an answered entry to the kernel, which completes it here with the next request. The
    /// command is submitted by the next [`Port::wait`].
    pub fn commit(&mut self, slot: usize, mut entry: RingEntry) -> io::Result<()> {
        let usual = if self.order.keeps > 0 { USUAL } else { 0 };
        entry.make_resident(self.filled.0.max(self.filled.1).max(usual));
        let command = command(&self.device, COMMIT_AND_FETCH, self.queue, entry.commit_id());
        let is_large = entry.is_large();
        self.submit(slot, entry, command)?;
        self.answers.push(slot);
        if is_large { self.tick_later() } else { Ok(()) }
    }

    /// Starts the timer, unless it runs.
    fn tick_later(&mut self) -> io::Result<()> {
        if self.ticks {
            return Ok(());
        }
        let timer = opcode::Timeout::new(&raw const PERIOD).build().user_data(TICK);
        // SAFETY: the command names one address, which the kernel only reads: that of a static that
        // nothing changes.
        while unsafe { self.ring.submission().push(&timer.clone().into()) }.is_err() {
            self.make_room()?;
        }
        self.ticks = true;
        Ok(())
    }

    /// Handles a tick: gives back the memory of entries that the kernel has and that had no large
    /// request lately.
    ///
    /// The entry in a slot may hold an answer that the kernel has not taken, or a request whose
    /// completion this thread has not seen. Iovec is therefore given back only if three conditions
    /// hold. The kernel has taken all commands. No completion waits, neither in the ring nor in the
    /// kernel's overflow list. The kernel has no deferred work by which it would complete a
    /// request. These conditions can change only inside io_uring_enter(2) of this thread, which
    /// does not call it before this function has given the memory back. A queue that is too busy
    /// for this waits for the next tick.
    ///
    /// # Errors
    /// The kernel does not take commands any more.
    pub fn give_back(&mut self) -> io::Result<()> {
        if !self.ring.submission().is_empty() {
            self.push()?;
        }
        self.filled = (0, self.filled.0);
        let commands = self.ring.submission();
        let is_settled = commands.is_empty() && !commands.cq_overflow() && !commands.taskrun();
        drop(commands);
        let is_settled = is_settled && !self.has_completions();
        if is_settled {
            for (lent, keep) in self.slots.iter_mut().zip(self.order.kept()) {
                if let Some(lent) = lent {
                    lent.grow_old(keep);
                }
            }
        }
        if !is_settled || self.slots.iter().flatten().any(LentEntry::is_large) {
            self.tick_later()
        } else {
            Ok(())
        }
    }

    /// Pushes a command for an entry into the ring.
    fn submit(
        &mut self,
        slot: usize,
        entry: RingEntry,
        command: squeue::Entry128,
    ) -> io::Result<()> {
        self.slots[slot] = Some(LentEntry(entry));
        self.order.note(slot);
        let command = command.user_data(slot as u64);
        // SAFETY: the kernel reads `places`, which this port changes only before the first command,
        // and frees after the ring is closed. It reads and writes the entry's header and payload,
        // which stay mapped as long as the entry exists; the entry is in `slots` until `take` finds
        // the completion, or is leaked by `drop`. Meanwhile no thread has a reference to them: the
        // entry was moved here by the only thread that had it, and `LentEntry` makes none.
        while unsafe { self.ring.submission().push(&command) }.is_err() {
            self.make_room()?;
        }
        Ok(())
    }

    /// Watches an eventfd until the kernel reports that it does not any more
    /// ([`Completion::Woken`]). The eventfd must stay open until then.
    pub fn watch(&mut self, eventfd: &OwnedFd) -> io::Result<()> {
        let readable = rustix::event::PollFlags::IN.bits();
        let poll = opcode::PollAdd::new(Fd(eventfd.as_raw_fd()), u32::from(readable))
            .multi(true)
            .build()
            .user_data(WAKE);
        // SAFETY: the command names a descriptor and no memory. A descriptor that was closed or
        // reused meanwhile is no danger to memory.
        while unsafe { self.ring.submission().push(&poll.clone().into()) }.is_err() {
            self.make_room()?;
        }
        Ok(())
    }

    /// Makes space in the submission queue. The queue has space for one command of each entry, for
    /// the poll and for the timer, so this function is not expected to run.
    fn make_room(&mut self) -> io::Result<()> {
        match self.enter_by(enter, 0)? {
            0 => Err(io::Error::other("the kernel takes no commands")),
            _ => Ok(()),
        }
    }

    /// Writes a notification to /dev/fuse. If the kernel sends a request because of it, that goes
    /// to the queue of the CPU on which this thread runs.
    ///
    /// # Errors
    /// Those of write(2).
    pub fn notify(&self, message: &[u8]) -> Result<(), Errno> {
        rustix::io::retry_on_intr(|| rustix::io::write(&self.device, message)).map(drop)
    }

    /// Submits the answers that were committed, and waits for a completion.
    pub fn wait(&mut self) -> io::Result<()> {
        self.enter_by(enter, 1).map(drop)
    }

    /// Submits the answers that were committed now, for a thread that has other work to do before
    /// [`Port::wait`].
    pub fn push(&mut self) -> io::Result<()> {
        self.enter_by(enter, 0).map(drop)
    }

    /// Enters the kernel, and tries again while the kernel refuses for a temporary reason: it has
    /// no memory for a command at the moment (EAGAIN, ENOMEM), or completions must be taken first
    /// (EBUSY). If there are completions, it returns, so that the caller takes them first.
    ///
    /// # Errors
    /// All other errors of io_uring_enter(2).
    fn enter_by(&mut self, enter: Enter, want: usize) -> io::Result<usize> {
        let mut refused = 0_u64;
        loop {
            match enter(&self.ring, want) {
                Ok(taken) => {
                    self.note_taken();
                    return Ok(taken);
                }
                Err(error) => match Errno::from_io_error(&error) {
                    Some(Errno::INTR) => return Ok(0),
                    Some(Errno::AGAIN | Errno::NOMEM | Errno::BUSY | Errno::NOBUFS) => {
                        if self.has_completions() {
                            return Ok(0);
                        }
                        if refused.is_multiple_of(60_000) {
                            log::warn!(
                                "FUSE over io_uring, queue {}: {}: trying again",
                                self.queue,
                                host::error::os_text(&error)
                            );
                        }
                        refused += 1;
                        std::thread::sleep(PAUSE);
                    }
                    _ => return Err(error),
                },
            }
        }
    }

    /// Records in the entries that the kernel has taken their answers, once it has taken all
    /// commands. Called before their completions are looked at.
    fn note_taken(&mut self) {
        if !self.answers.is_empty() && self.ring.submission().is_empty() {
            for slot in self.answers.drain(..) {
                if let Some(Some(entry)) = self.slots.get_mut(slot) {
                    entry.note_taken();
                }
            }
        }
    }

    /// Takes the next event, if there is one.
    pub fn take(&mut self) -> io::Result<Option<Completion>> {
        let completion = loop {
            let Some(completion) = self.ring.completion().next() else { return Ok(None) };
            if completion.user_data() != HOLD {
                break completion;
            }
            log::debug!("queue {}: the ring is not held: {}", self.queue, completion.result());
        };
        if completion.user_data() == WAKE {
            return Ok(Some(Completion::Woken(cqueue::more(completion.flags()))));
        }
        if completion.user_data() == TICK {
            self.ticks = false;
            return Ok(Some(Completion::Tick));
        }
        let slot = completion.user_data() as usize;
        let Some(lent) = self.slots.get_mut(slot).and_then(Option::take) else {
            return Err(io::Error::other(format!(
                "the kernel completed entry {slot}, which it did not have"
            )));
        };
        let mut entry = lent.back();
        let result = if completion.result() >= 0 {
            let len = entry.payload_len();
            entry.was_filled(len);
            self.filled.0 = self.filled.0.max(len);
            Ok(())
        } else {
            Err(Errno::from_raw_os_error(-completion.result()))
        };
        Ok(Some(Completion::Entry(slot, entry, result)))
    }

    /// Returns whether a completion is in the ring.
    pub fn has_completions(&mut self) -> bool {
        !self.ring.completion().is_empty()
    }

    /// Returns how many completions are in the ring: requests, and signals of other threads.
    pub fn ready(&mut self) -> usize {
        self.ring.completion().len()
    }

    /// Returns whether more work is ready: in the ring, or as soon as this thread enters the
    /// kernel.
    pub fn has_more(&mut self) -> bool {
        self.has_completions() || self.ring.submission().taskrun()
    }
}

impl Drop for Port {
    /// Leaks the entries that the kernel still has, because their memory must not be freed. Only a
    /// port whose queue has failed has such entries.
    fn drop(&mut self) {
        self.slots.drain(..).flatten().for_each(std::mem::forget);
    }
}

/// `struct iovec`, with its address as a number, because only the kernel reads it.
#[derive(Clone, Copy)]
#[repr(C)]
struct Iovec {
    address: usize,
    len: usize,
}

/// The addresses of an entry's memory: header and payload.
type IovecPair = [Iovec; 2];

/// The addresses of the memory of all entries of a queue.
pub struct Places(Box<[IovecPair]>);

impl Places {
    /// Takes the addresses of the entries' memory.
    pub fn of(entries: &[RingEntry]) -> Places {
        Places(entries.iter().map(place).collect())
    }
}

fn place(entry: &RingEntry) -> IovecPair {
    [
        Iovec { address: entry.header.as_ptr().expose_provenance(), len: HEADER },
        Iovec {
            address: entry.payload.as_ptr().cast::<u8>().expose_provenance(),
            len: entry.payload.len(),
        },
    ]
}

/// Builds a command of FUSE. Its `struct fuse_uring_cmd_req` holds the commit id of the entry and
/// the number of the queue.
fn command(device: &OwnedFd, command: u32, queue: u16, commit_id: u64) -> squeue::Entry128 {
    let mut request = [0; 80];
    request[8..16].copy_from_slice(&commit_id.to_ne_bytes());
    request[16..18].copy_from_slice(&queue.to_ne_bytes());
    opcode::UringCmd80::new(Fd(device.as_raw_fd()), command).cmd(request).build()
}

/// Adds the address of the list of addresses to a REGISTER command.
fn with_place(command: squeue::Entry128, place: &IovecPair) -> squeue::Entry128 {
    /// Size of `struct io_uring_sqe` with 80 bytes of command, in bytes.
    const SIZE: usize = 128;
    // SAFETY: both are values of this thread. The type is `repr(C)` and holds one `struct
    // io_uring_sqe`, which consists of plain integers without padding, and 64 bytes, so that any
    // bytes are valid in both directions. `transmute` compares the sizes.
    let mut bytes: [u8; SIZE] = unsafe { std::mem::transmute(command) };
    // `addr` and `len`; `len` has no setter for this operation.
    bytes[16..24].copy_from_slice(&(place.as_ptr() as u64).to_ne_bytes());
    bytes[24..28].copy_from_slice(&(place.len() as u32).to_ne_bytes());
    // SAFETY: as above.
    unsafe { std::mem::transmute(bytes) }
}

#[cfg(test)]
mod tests;
