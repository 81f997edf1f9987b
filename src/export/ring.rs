//! Transport 2: the threads that answer the requests of FUSE over io_uring. The crate `uring` has
//! the rings and their memory.
//!
//! ```text
//! kernel ─ queue per CPU ─▶ home server ─▶ file system ─▶ Disk::read_local, …  a hit
//!                           │ ▲  ├─ worker ─▶ file system ─▶ Disk::read, …      a miss
//!                           │ └──┴─ eventfd ◀─ the answered entry comes back
//!                           └─ lane server: its part of them, while several wait
//! ```
//!
//! The kernel selects a queue by the CPU on which the requesting thread runs. It begins to use the
//! queues once the queue of each possible CPU has an entry. fuser still negotiates, and the threads
//! of `device` serve the requests that stay on /dev/fuse (FUSE_FORGET). After the unmount all
//! entries complete with ENOTCONN, and the threads end.
//!
//! A queue's home server runs on the CPU that its requests come from. That is best for
//! small requests: the client and the server take turns, and no other CPU has to be woken
//! (measured: 110,000 reads of 4 KiB per second at depth 1, against 27,000 where the
//! scheduler chooses the CPU). The server polls for its next request before it sleeps
//! (`polling.rs`): a scheduler that sees an idle CPU wakes the client there, from where
//! its next request goes to another queue (measured on two CPUs of a virtual machine:
//! 45,000 reads per second, 62,000 with polling).
//!
//! A client with many requests in flight shares the CPU with the home server, and others
//! are idle. So while several requests wait, a part of them goes to the *lane*, a second
//! server of the queue that may run on any CPU: all large ones, because copying their
//! data takes longer than waking a thread, and every second small one (reads of 4 KiB at
//! depth 32: 221,000 per second instead of 145,000, writes 171,000 instead of 115,000).
//! Small ones only if there are twice as many processors as queues of the session in use:
//! where clients keep all of them busy, a lane takes time from the home servers (210,000
//! instead of 263,000). The lane hands its answers to the kernel itself: that is a part
//! of the work, for a large request half of the copying. The entry's next request
//! therefore arrives at the lane as well. If that is a small request, and no other one
//! waits at the lane, its answer goes to the kernel through the home server, as does that
//! of a worker to any small request.
//!
//! **When this process is killed**, another one continues with the same memory of the entries, see
//! the crate `uring`. It finds in each entry a request that was not answered, and serves it; an
//! answer that the kernel may not have taken, and hands it in (the kernel refuses an answer that it
//! has already taken with ENOENT); or nothing. No request is carried out again once its answer was
//! handed in, because a later write may have been answered since. Requests that no entry had wait
//! in the kernel, and so do those that come until the successor has registered its entries.
//!
//! **Before a planned change of the process** the servers leave ([`RingThreads::leave`]): each one
//! hands in the answers that it has, and its thread ends. A thread that ends by itself finishes the
//! kernel's copies into the entries of its ring whether their memory is resident or not; a thread
//! that is killed can do so only if it is. From then on the change is the same as a kill.
//!
//! **Touches:** what `uring` does.
//! **Never:** waits for anything but its ring on a server's thread.
//! **Locks:** none.
//! **Invariants:** each entry of a queue is in exactly one place: with the kernel through one of
//! the two ports, in a task, or in a channel.

mod parcels;
mod server;
mod successor;

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Weak};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use crossbeam_channel::Receiver;
use serde::{Deserialize, Serialize};

use super::Transport;
use super::dispatch::{Dispatcher, MAX_IO};
use super::polling::{Pace, Polling, may_poll, processors};
use super::session::SessionEnding;
use super::workers::Buffer;
use host::error::Context;
use host::{Error, ErrorKind, Result};
use uring::{Anchor, EntryMemory, Places, Port, QueueOrder, Ring, RingEntry, ring};

use parcels::{Mailbox, MailboxAddress, Parcel};
use server::{QueueServer, ServerRole, Share};
use successor::{CatchUp, QueueStart};

const _: () = assert!(MAX_IO == uring::PAYLOAD);

/// Module parameter that says whether the kernel's FUSE may use io_uring.
const ENABLED: &str = "/sys/module/fuse/parameters/enable_uring";
/// The list of possible CPUs; the kernel expects one queue for each.
const POSSIBLE_CPUS: &str = "/sys/devices/system/cpu/possible";
/// Largest number of queues. A host with more possible CPUs is served over /dev/fuse, because two
/// threads for each CPU cost more than one disk justifies.
const QUEUES_AT_MOST: usize = 64;

/// Largest number of requests in progress over all queues. It bounds the memory of their buffers:
/// 1024 buffers of [`MAX_IO`] bytes are 1 GiB.
const REQUESTS: usize = 1024;
/// Smallest number of entries of one queue.
const FEWEST_OF_QUEUE: usize = 16;
/// Largest number of entries of one queue. A request keeps its entry until it is answered. If
/// requests from one CPU that hang in a dead backing file hold all entries of its queue, local
/// requests from that CPU wait too. The limit is therefore the number of asynchronous requests that
/// the kernel allows (`MAX_BACKGROUND`), plus a margin.
const MOST_OF_QUEUE: usize = 96;

/// Data size, in bytes, from which a request counts as large: copying that much takes longer than
/// waking another thread.
const LARGE: usize = 128 << 10;

/// Most entries of all queues that keep memory for a request of [`uring::USUAL`] bytes: 8 MiB.
const KEEPERS_OF_MEMORY: usize = 128;
/// Most such entries of one queue: somewhat more than the depths at which guests usually work.
const MOST_KEEPERS_OF_QUEUE: usize = 32;

/// Rings that FUSE does not know yet: two for each queue.
pub(super) struct Rings {
    queues: Vec<(Ring, Ring)>,
    anchor: Anchor,
    memory: EntryMemory,
    /// `layout.depth` entries for each queue.
    entries: Vec<RingEntry>,
    layout: RingLayout,
    /// Whether another process has used the entries.
    are_inherited: bool,
}

/// Where the memory of the entries lies, and how it is divided.
#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct RingLayout {
    /// The address at which each process maps the memory.
    pub address: u64,
    /// Number of queues: one for each possible CPU.
    pub queues: u32,
    /// Number of entries of each queue.
    pub depth: u32,
}

/// The transport that was chosen.
#[derive(Debug)]
pub(super) enum WantedTransport {
    /// Requests come over io_uring.
    Rings(Rings),
    /// Requests come over /dev/fuse, as the user asked.
    Device,
    /// Requests come over /dev/fuse, because io_uring is not available for this reason. The reason
    /// is logged only after the mount has succeeded: if the mount is refused, the user sees one
    /// line, with the reason of the refusal.
    DeviceFor(String),
}

impl std::fmt::Debug for Rings {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Rings").field(&self.layout).finish()
    }
}

impl Rings {
    /// Makes rings, if `transport` allows them and the host has them. Call this while the process
    /// may still open files.
    ///
    /// # Errors
    /// `transport` allows only io_uring, and io_uring is not available.
    pub(super) fn wanted(transport: Transport) -> Result<WantedTransport> {
        let rings = match transport {
            Transport::Dev => return Ok(WantedTransport::Device),
            Transport::UringAgain => Rings::prepare(),
            Transport::Auto | Transport::Uring => offered().and_then(|()| Rings::prepare()),
        };
        match rings {
            Ok(rings) => Ok(WantedTransport::Rings(rings)),
            Err(reason) if transport == Transport::Auto => Ok(WantedTransport::DeviceFor(reason)),
            Err(reason) => Err(Error::new(
                ErrorKind::UnsupportedFeature,
                format!("--transport uring: {reason}"),
            )),
        }
    }

    /// Does everything that can fail, before the kernel is told to use io_uring. After that the
    /// kernel sends requests in no other way.
    fn prepare() -> Result<Rings, String> {
        let possible = std::fs::read_to_string(POSSIBLE_CPUS)
            .map_err(|error| format!("{POSSIBLE_CPUS}: {error}"))?;
        let queues =
            cpus(&possible).ok_or_else(|| format!("{POSSIBLE_CPUS}: {:?}", possible.trim()))?;
        if queues > QUEUES_AT_MOST {
            return Err(format!("{queues} possible CPUs are more than {QUEUES_AT_MOST}"));
        }
        let depth = depth(queues);
        let make = || -> io::Result<Rings> {
            let anchor = Anchor::new()?;
            let rings = (0..queues).map(|_| Ok((ring(depth)?, ring(depth)?)));
            let rings = rings.collect::<io::Result<_>>()?;
            let (memory, entries) = EntryMemory::new(queues * depth)?;
            let layout = RingLayout {
                address: memory.address(),
                queues: queues as u32,
                depth: depth as u32,
            };
            let are_inherited = false;
            Ok(Rings { queues: rings, anchor, memory, entries, layout, are_inherited })
        };
        make().map_err(|error| format!("io_uring: {error}"))
    }

    /// Exchanges the memory for that of a process that has died: `memory` is what
    /// [`Rings::memory`] returned there. Works in the sandbox.
    ///
    /// # Errors
    /// The memory does not have this layout, or the rings are for another one.
    pub(super) fn adopt(self, memory: OwnedFd, layout: RingLayout) -> Result<Rings> {
        let Rings { queues, anchor, memory: own_memory, entries: own_entries, layout: own, .. } =
            self;
        let refused = |reason: String| {
            Error::new(
                ErrorKind::UnsupportedFeature,
                format!(
                    "the session cannot be taken over: {reason}: unmount and mount the disk anew"
                ),
            )
        };
        if (layout.queues, layout.depth) != (own.queues, own.depth) {
            return Err(refused(format!(
                "it has {} queues of {} requests, and here {} of {}",
                layout.queues, layout.depth, own.queues, own.depth
            )));
        }
        let number = own_entries.len();
        // Both may lie at the same address.
        drop((own_memory, own_entries));
        let (memory, entries) = EntryMemory::inherit(memory, layout.address, number)
            .map_err(|error| refused(format!("the memory of its requests: {error}")))?;
        Ok(Rings { queues, anchor, memory, entries, layout, are_inherited: true })
    }

    /// Returns the memory of the entries, which a process that takes the session over needs.
    pub(super) fn memory(&self) -> BorrowedFd<'_> {
        self.memory.as_fd()
    }

    /// Returns how the memory is divided.
    pub(super) fn layout(&self) -> RingLayout {
        self.layout
    }

    /// Registers entries and serves them, on two threads for each queue, until the disk is
    /// unmounted, or until they leave. `device` is the session's /dev/fuse, after the kernel's INIT
    /// was answered with FUSE_OVER_IO_URING.
    ///
    /// # Errors
    /// The system has no more threads or descriptors. The kernel then waits for queues that never
    /// appear, so the caller must unmount.
    pub(super) fn serve(
        self,
        device: BorrowedFd<'_>,
        dispatcher: &Dispatcher,
        ending: &Arc<SessionEnding>,
    ) -> Result<RingThreads> {
        let depth = self.layout.depth as usize;
        let (started, threads) = crossbeam_channel::unbounded();
        let mut addresses = Vec::new();
        let mut entries = self.entries.into_iter();
        let keepers = keepers(self.queues.len());
        let (pace, processors) = (Arc::new(Pace::new(self.queues.len())), processors());
        for (number, (ring, lane_ring)) in self.queues.into_iter().enumerate() {
            let own: Vec<RingEntry> = entries.by_ref().take(depth).collect();
            let places = Places::of(&own);
            let start = QueueStart { places, entries: own, are_inherited: self.are_inherited };
            let (home, to_home) = Mailbox::new().context(|| "eventfd")?;
            let (lane, to_lane) = Mailbox::new().context(|| "eventfd")?;
            addresses.extend([to_home.clone(), to_lane.clone()]);
            let queue = number as u16;
            let order = QueueOrder::new(depth, keepers);
            for (name, ring, mailbox, address, role, start) in [
                (
                    "fuse-ring",
                    ring,
                    home,
                    to_home.clone(),
                    ServerRole::Home { lane: to_lane.clone(), alive: depth },
                    Some(start),
                ),
                ("fuse-lane", lane_ring, lane, to_lane, ServerRole::Lane { home: to_home }, None),
            ] {
                let port = Port::new(ring, device, queue, Arc::clone(&order))
                    .context(|| "duplicating /dev/fuse")?;
                let server = QueueServer {
                    port,
                    queue,
                    dispatcher: dispatcher.clone(),
                    mailbox,
                    address,
                    buffer: Buffer::default(),
                    role,
                    catch_up: CatchUp::Done,
                    polling: Polling::cheap(),
                    pace: Arc::clone(&pace),
                    share: Share::new(processors),
                    may_poll: may_poll(processors),
                    is_leaving: false,
                };
                let anchor = self.anchor.clone();
                // A weak reference: the session ends with the threads that read /dev/fuse, and this
                // thread must not prolong it.
                let ending = Arc::downgrade(ending);
                let thread = thread::Builder::new()
                    .name(format!("{name}-{number}"))
                    .spawn(move || {
                        let _panic = Panic(Weak::clone(&ending));
                        if let Err(error) = server
                            .run(&anchor, start)
                            .context(|| format!("FUSE over io_uring, queue {number}"))
                            && let Some(ending) = ending.upgrade()
                        {
                            ending.fail(error);
                        }
                    })
                    .context(|| "starting a thread of FUSE over io_uring")?;
                let _ = started.send(thread);
            }
        }
        Ok(RingThreads { addresses, threads })
    }
}

/// The threads that serve the rings of a session.
#[derive(Debug)]
pub(super) struct RingThreads {
    addresses: Vec<MailboxAddress>,
    /// Those that [`RingThreads::leave`] has not waited for.
    threads: Receiver<JoinHandle<()>>,
}

impl RingThreads {
    /// Ends the servers although the disk is mounted, and waits for their threads, at most for
    /// `patience`. Returns whether all have ended. A server that is in the middle of a request
    /// finishes it first.
    ///
    /// The end of a thread includes the kernel's part of it: join(3) returns when the kernel has
    /// released the thread's memory, and it cancels the entries of the thread's ring before that
    /// (`io_uring_files_cancel` in `do_exit`, see `uring::Port::hold`).
    pub(super) fn leave(&self, patience: Duration) -> bool {
        for address in &self.addresses {
            address.send(Parcel::Leave);
        }
        let threads = self.threads.clone();
        let (sender, ended) = crossbeam_channel::bounded(1);
        // A join has no time limit, so another thread waits.
        let waiter = thread::Builder::new().name("ring-leave".to_string()).spawn(move || {
            // A panic was reported by the thread itself.
            threads.try_iter().for_each(|thread| drop(thread.join()));
            let _ = sender.send(());
        });
        waiter.is_ok() && ended.recv_timeout(patience).is_ok()
    }
}

/// Checks whether the kernel offers FUSE over io_uring to new sessions.
fn offered() -> Result<(), String> {
    let enabled = std::fs::read_to_string(ENABLED)
        .map_err(|_| "this kernel has no FUSE over io_uring".to_string())?;
    if enabled.trim_start().starts_with(['Y', '1']) {
        Ok(())
    } else {
        Err(format!("it is off in the kernel (echo Y > {ENABLED})"))
    }
}

/// Fails the session if its thread panics: the requests of the queue's CPU would otherwise wait for
/// ever.
struct Panic(Weak<SessionEnding>);

impl Drop for Panic {
    fn drop(&mut self) {
        if thread::panicking()
            && let Some(ending) = self.0.upgrade()
        {
            ending.fail(Error::new(ErrorKind::Io, "a thread of FUSE over io_uring has panicked"));
        }
    }
}

/// Returns the number of entries of each queue.
fn depth(queues: usize) -> usize {
    (REQUESTS / queues.max(1)).clamp(FEWEST_OF_QUEUE, MOST_OF_QUEUE)
}

/// Returns how many entries of each queue keep memory for a request of the usual size.
fn keepers(queues: usize) -> usize {
    (KEEPERS_OF_MEMORY / queues.max(1)).min(MOST_KEEPERS_OF_QUEUE)
}

/// Returns how many CPUs a list like `0-3,8` spans: its highest number plus 1, because the kernel
/// counts all numbers below the highest one.
fn cpus(list: &str) -> Option<usize> {
    let last = list.trim().rsplit([',', '-']).next()?;
    last.parse::<usize>().ok()?.checked_add(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_buffers_of_a_disk_are_bounded() {
        for queues in 1..=QUEUES_AT_MOST {
            let depth = depth(queues);
            assert!(
                (FEWEST_OF_QUEUE..=MOST_OF_QUEUE).contains(&depth)
                    && depth * queues * MAX_IO <= 1 << 30,
                "{queues} queues of {depth}"
            );
        }
        assert_eq!((depth(2), depth(64)), (96, 16));
        assert_eq!([1, 2, 4, 16, 64].map(keepers), [32, 32, 32, 8, 2]);
    }

    #[test]
    fn the_highest_possible_cpu_counts() {
        assert_eq!(cpus("0\n"), Some(1));
        assert_eq!(cpus("0-1\n"), Some(2));
        assert_eq!(cpus("0-3,8-11\n"), Some(12));
        assert_eq!(cpus(""), None);
        assert_eq!(cpus("x"), None);
    }
}
