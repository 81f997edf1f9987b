//! The memory of the requests, which a process shares with the kernel and with its successor.
//!
//! The memory is a memfd that is mapped at an address which does not depend on the process: the
//! kernel's entry remembers the *addresses* of its header and payload, and copies from and to them
//! in the process whose thread hands the entry in. A process that maps the same memfd at the same
//! address can therefore answer what another process, which was killed, has been asked.
//! ```text
//! memfd ─ slot 0: header, record │ slot 1: header, record │ … ║ payload 0 │ payload 1 │ …
//!         └───────────── 512 bytes each ─────────────────┘     └─ 1 MiB each ─┘
//! ```
//! **The record** tells a successor what became of the request in the header. A write that was
//! answered must not be carried out again, because a later write may have been answered since. So
//! [`RingEntry::answer`] stores the whole answer outside of the request first, then the number of
//! the request that it answers, and only then changes the request's own bytes. When the kernel has
//! taken the answer, the record says that too. A successor finds one of three states, see
//! [`EntryState`].
//!
//! The kernel copies a request in this order: structure of the operation, payload, commit id,
//! header. It does so on the thread that owns the ring, which finishes the copy before it dies.
//!
//! **What makes the references of this module sound.** An entry's header, record and payload belong
//! to one [`RingEntry`], and a thread reaches them only by a borrow of it. The kernel writes header
//! and payload while it has the entry; then the entry is in a slot of a port, which never borrows
//! them (`LentEntry` in `lib.rs`). Other processes: one before has ended with all of its threads,
//! one after begins when this one has ended, and a keeper holds the memfd without mapping it.

use std::io;
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{Ordering, compiler_fence};

use rustix::fs::{MemfdFlags, SealFlags, SeekFrom};
use rustix::mm::{Advice, MapFlags, ProtFlags};

/// Size of the payload of an entry, in bytes: the largest read or write that is served.
pub const PAYLOAD: usize = 1 << 20;

/// Size of `struct fuse_uring_req_header`, in bytes. It holds the header of a request or reply, the
/// operation's structure, and `struct fuse_uring_ent_in_out`.
pub(crate) const HEADER: usize = 288;
const UNIQUE: Range<usize> = 8..16;
const OPERATION: Range<usize> = 128..256;
const COMMIT_ID: Range<usize> = 264..272;
const PAYLOAD_LEN: Range<usize> = 272..276;

/// Size of `struct fuse_out_header`, in bytes.
pub const REPLY_HEADER: usize = 16;

/// Bytes of a header together with its record.
const STRIDE: usize = 512;
/// Size of a record, in bytes.
const RECORD: usize = STRIDE - HEADER;
/// The commit id of the request that the record answers.
const ANSWERED: Range<usize> = 0..8;
/// Length of the answer's data, in bytes.
const LEN: Range<usize> = 8..12;
/// Whether the data are in the record.
const IS_SMALL: usize = 12;
/// The answer's header.
const REPLY: Range<usize> = 16..16 + REPLY_HEADER;
/// The answer's data, if they are in the record.
const DATA: Range<usize> = REPLY.end..TAKEN.start;
/// The commit id of the last answer that the kernel has taken for sure.
const TAKEN: Range<usize> = RECORD - 8..RECORD;
/// Most data of an answer that a record holds, in bytes. Every answer to a request that has data of
/// its own is smaller.
const SMALL: usize = DATA.end - DATA.start;

/// Bytes at the start of a payload that an entry has in memory from the beginning and for good:
/// one page of 4 KiB. The kernel can copy a request of that size into it at any time, see
/// `Map::make_resident`.
pub(crate) const LITTLE: usize = 4096;

/// Most bytes of the usual requests: what filesystems and guests write at once when they do not
/// stream. The entries that the kernel takes next have so much of their payload in memory.
pub const USUAL: usize = 64 << 10;

/// Where a mapping is tried first: at 64 GiB. The kernel of a 64-bit machine puts nothing there by
/// itself: programs lie below or far above, libraries and stacks at the top of the address space,
/// which has at least 512 GiB.
const FIRST_ADDRESS: usize = 1 << 36;
/// Distance to the next try, in bytes.
const NEXT_ADDRESS: usize = 1 << 32;
/// Number of tries. A process has one mapping for each session.
const ADDRESSES: usize = 32;

/// How much of an entry's payload may be in memory.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Touched {
    /// At most `LITTLE` bytes, and what the entry keeps.
    Little,
    /// More than that, but it was not used since the timer's last tick.
    Before,
    /// More than that, and it was used since the timer's last tick.
    Lately,
}

/// What a successor finds in an entry.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum EntryState {
    /// No request, or one whose answer the kernel has taken.
    Idle,
    /// A request that was not answered.
    Asked,
    /// A request that was answered. The kernel may have taken the answer or not.
    Answered,
}

/// The data of an answer.
#[derive(Clone, Copy, Debug)]
pub enum ReplyData<'a> {
    /// So many bytes, which are in the payload. Only for a request that has no data of its own.
    InPlace(usize),
    /// These bytes.
    Elsewhere(&'a [u8]),
}

/// The memory of all entries of a session.
#[derive(Debug)]
pub struct EntryMemory {
    memfd: OwnedFd,
    map: Arc<Map>,
}

/// Where the content of the memory comes from.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Origin {
    New,
    /// From another process.
    Inherited,
}

#[derive(Debug)]
struct Map {
    start: NonNull<u8>,
    len: usize,
}

// SAFETY: the address and the length of a mapping are the same for all threads, and do not change.
// The methods make no reference to the memory: they change its page tables only. The bytes are
// reached only through entries.
unsafe impl Send for Map {}
// SAFETY: as above.
unsafe impl Sync for Map {}

impl Drop for Map {
    fn drop(&mut self) {
        // SAFETY: this is the mapping that `new` has made. Each entry holds a reference to the map,
        // so that on no thread is one left which could reach the memory. Entries that the kernel
        // still has are leaked (`Port::drop`), and the map with them.
        let _ = unsafe { rustix::mm::munmap(self.start.as_ptr().cast(), self.len) };
    }
}

/// Bytes at the start of each payload that are never given back: `LITTLE`, in whole pages.
pub(crate) fn kept() -> usize {
    LITTLE.max(rustix::param::page_size())
}

/// Returns the bytes of the headers and records of `entries` entries, in whole pages, and those of
/// the whole memory.
fn sizes(entries: usize) -> io::Result<(usize, usize)> {
    let page = rustix::param::page_size();
    let headers = entries.checked_mul(STRIDE).and_then(|len| len.checked_next_multiple_of(page));
    let payloads = entries.checked_mul(PAYLOAD);
    headers
        .and_then(|headers| Some((headers, headers.checked_add(payloads?)?)))
        .ok_or_else(|| io::Error::other(format!("memory for {entries} requests is too much")))
}

impl EntryMemory {
    /// Makes memory for `entries` requests, and the entries in it.
    ///
    /// # Errors
    /// The system has no memory or no address space for it.
    pub fn new(entries: usize) -> io::Result<(EntryMemory, Vec<RingEntry>)> {
        EntryMemory::from_address(FIRST_ADDRESS, entries)
    }

    fn from_address(first: usize, entries: usize) -> io::Result<(EntryMemory, Vec<RingEntry>)> {
        let (headers, len) = sizes(entries)?;
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
        // Kernels before 6.3 do not know the flag for files that are never executed.
        let memfd = rustix::fs::memfd_create(c"cordisk-requests", flags | MemfdFlags::NOEXEC_SEAL)
            .or_else(|_| rustix::fs::memfd_create(c"cordisk-requests", flags))?;
        rustix::fs::ftruncate(&memfd, len as u64)?;
        rustix::fs::fcntl_add_seals(&memfd, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)?;
        let mut number = 0;
        let map = loop {
            match Map::new(&memfd, first + number * NEXT_ADDRESS, len) {
                Ok(map) => break map,
                Err(_) if number + 1 < ADDRESSES => number += 1,
                Err(error) => return Err(error),
            }
        };
        Ok(EntryMemory::of(memfd, map, headers, Origin::New))
    }

    /// Maps the memory that another process has made, at the address where it was there. That
    /// process must have ended, with all of its threads. Uses no system calls but fstat(2),
    /// mmap(2), madvise(2) and lseek(2).
    ///
    /// # Errors
    /// The file does not have the size for `entries` requests, or the address is in use.
    pub fn inherit(
        memfd: OwnedFd,
        address: u64,
        entries: usize,
    ) -> io::Result<(EntryMemory, Vec<RingEntry>)> {
        let (headers, len) = sizes(entries)?;
        if u64::try_from(rustix::fs::fstat(&memfd)?.st_size) != Ok(len as u64) {
            return Err(io::Error::other(format!("this is not the memory of {entries} requests")));
        }
        let address = usize::try_from(address).map_err(io::Error::other)?;
        let map = Map::new(&memfd, address, len)?;
        Ok(EntryMemory::of(memfd, map, headers, Origin::Inherited))
    }

    /// `headers` is the first of the [`sizes`], and the length of the map the second one.
    fn of(
        memfd: OwnedFd,
        map: Map,
        headers: usize,
        origin: Origin,
    ) -> (EntryMemory, Vec<RingEntry>) {
        let map = Arc::new(map);
        let entries = (map.len - headers) / PAYLOAD;
        // If the process is killed while the kernel copies a request, it cannot bring a page into
        // memory.
        map.populate(0..headers);
        let all = (0..entries)
            .map(|index| {
                let at = headers + index * PAYLOAD;
                map.populate(at..at + LITTLE);
                let resident = match origin {
                    Origin::New => LITTLE,
                    Origin::Inherited => map.make_resident(&memfd, at + kept()..at + PAYLOAD) - at,
                };
                let is_large = origin == Origin::Inherited && resident > kept();
                // SAFETY: the length of the map, the second one of `sizes`, counts the bytes from
                // both addresses on for each index below `entries`. No two indices share bytes.
                let (slot, payload) = unsafe { (map.start.add(index * STRIDE), map.start.add(at)) };
                // SAFETY: as above, and the record follows the header within its `STRIDE` bytes.
                let record = unsafe { slot.add(HEADER) };
                RingEntry {
                    header: slot.cast(),
                    record: record.cast(),
                    payload: NonNull::slice_from_raw_parts(payload, PAYLOAD),
                    touched: if is_large { Touched::Lately } else { Touched::Little },
                    resident,
                    map: Arc::clone(&map),
                }
            })
            .collect();
        (EntryMemory { memfd, map }, all)
    }

    /// Returns where the memory is mapped.
    pub fn address(&self) -> u64 {
        self.map.start.as_ptr().addr() as u64
    }
}

impl AsFd for EntryMemory {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.memfd.as_fd()
    }
}

impl Map {
    fn new(memfd: &OwnedFd, address: usize, len: usize) -> io::Result<Map> {
        // SAFETY: with this flag the call makes a new mapping, which replaces no other mapping, so
        // no memory that any thread uses changes.
        let start = unsafe {
            rustix::mm::mmap(
                std::ptr::with_exposed_provenance_mut(address),
                len,
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::SHARED | MapFlags::FIXED_NOREPLACE | MapFlags::NORESERVE,
                memfd,
                0,
            )
        }?;
        // A request of 4 KiB must take one page and not a huge page, whatever the host's setting.
        // Kernels without huge pages return an error, which is ignored. SAFETY: the mapping was
        // just made, and the call changes none of its bytes.
        let _ = unsafe { rustix::mm::madvise(start, len, Advice::LinuxNoHugepage) };
        let map = Map {
            start: NonNull::new(start.cast())
                .ok_or_else(|| io::Error::other("a mapping at address 0"))?,
            len,
        };
        // A kernel before 4.17 does not know the flag, and takes the address for a hint.
        if map.start.as_ptr().addr() != address {
            return Err(io::Error::other(format!("the address {address:#x} is not free")));
        }
        Ok(map)
    }

    /// Enters the pages that the memfd has in this range of bytes into the page table of this
    /// process. If the process is killed while the kernel copies a request into an entry, the
    /// kernel can finish the copy only if it needs no page fault. Returns the end of the last ones,
    /// or the start of the range if there are none.
    fn make_resident(&self, memfd: &OwnedFd, range: Range<usize>) -> usize {
        let (mut at, mut last) = (range.start as u64, range.start);
        while let Ok(data) = rustix::fs::seek(memfd, SeekFrom::Data(at)) {
            let Ok(hole) = rustix::fs::seek(memfd, SeekFrom::Hole(data)) else { break };
            let end = (hole as usize).min(range.end).min(self.len);
            if data as usize >= end {
                break;
            }
            // With the holes between them, which are small: requests fill a payload from its start.
            self.populate(last..end);
            (at, last) = (hole, end);
        }
        last
    }

    /// Brings this range of bytes into memory, as far as there is memory.
    fn populate(&self, range: Range<usize>) {
        if range.start >= range.end || range.end > self.len {
            return;
        }
        // SAFETY: the range lies in the mapping, which exists as long as `self`. The call changes
        // none of its bytes, so that it does not matter which thread or kernel has them.
        let _ = unsafe {
            rustix::mm::madvise(
                self.start.as_ptr().add(range.start).cast(),
                range.len(),
                Advice::LinuxPopulateWrite,
            )
        };
    }
}

/// The memory of one request, while the process owns it.
pub struct RingEntry {
    pub(crate) header: NonNull<[u8; HEADER]>,
    record: NonNull<[u8; RECORD]>,
    /// Whole pages, so that they can be given back: no other value lies in them.
    pub(crate) payload: NonNull<[u8]>,
    pub(crate) touched: Touched,
    /// How many bytes of the payload, from its start, are in memory for sure.
    resident: usize,
    map: Arc<Map>,
}

// SAFETY: the entry alone owns its memory, like a `Box`. A thread can have a reference to it only
// through the entry. (It is not `Sync`, which no thread needs.)
unsafe impl Send for RingEntry {}

impl RingEntry {
    pub(crate) fn header(&mut self) -> &mut [u8; HEADER] {
        // SAFETY: the memory is mapped as long as the entry exists (`map`), and no other entry has
        // it. The thread that has the entry borrows it for as long as the reference lives. The
        // kernel writes to it only on behalf of the command that names the entry. `Port::submit`
        // takes the entry as a value before it pushes that command, and `Port::take` returns it
        // after the completion, so that the thread which has the entry shares it with no kernel.
        unsafe { self.header.as_mut() }
    }

    fn record(&mut self) -> &mut [u8; RECORD] {
        // SAFETY: as in `header`, but also while the kernel has the entry (`note_taken`, on the
        // thread of the port): the kernel does not know these bytes, and they overlap none that it
        // knows.
        unsafe { self.record.as_mut() }
    }

    /// Returns the payload of the request or reply: [`PAYLOAD`] bytes.
    pub fn payload(&mut self) -> &mut [u8] {
        // SAFETY: as in `header`; all byte values are valid, and the pages are zeros at first.
        unsafe { self.payload.as_mut() }
    }

    /// Returns the header of the request (`struct fuse_in_header`) and the structure of its
    /// operation.
    pub fn request(&mut self) -> (&[u8], &[u8]) {
        let header = self.header();
        (&header[..OPERATION.start], &header[OPERATION])
    }

    /// Returns how many bytes of payload came with the request.
    pub fn payload_len(&mut self) -> usize {
        self.header()[PAYLOAD_LEN].first_chunk().map_or(0, |len| u32::from_ne_bytes(*len)) as usize
    }

    /// Returns the number by which the kernel knows the request.
    pub(crate) fn commit_id(&mut self) -> u64 {
        self.header()[COMMIT_ID].first_chunk().map_or(0, |id| u64::from_ne_bytes(*id))
    }

    /// Puts the answer to the request into the entry: its header (`struct fuse_out_header`) and its
    /// data, of which at most [`PAYLOAD`] bytes are used.
    pub fn answer(&mut self, header: &[u8; REPLY_HEADER], data: ReplyData<'_>) {
        let (len, small) = match data {
            ReplyData::InPlace(len) => (len.min(PAYLOAD), None),
            ReplyData::Elsewhere(bytes) if bytes.len() <= SMALL => (bytes.len(), Some(bytes)),
            ReplyData::Elsewhere(bytes) => {
                let bytes = &bytes[..bytes.len().min(PAYLOAD)];
                self.payload()[..bytes.len()].copy_from_slice(bytes);
                (bytes.len(), None)
            }
        };
        self.touches(len);
        let id = self.commit_id();
        let record = self.record();
        record[REPLY].copy_from_slice(header);
        record[LEN].copy_from_slice(&(len as u32).to_ne_bytes());
        record[IS_SMALL] = u8::from(small.is_some());
        if let Some(bytes) = small {
            record[DATA][..len].copy_from_slice(bytes);
        }
        // A thread that is killed has executed all instructions before one, and none after it. The
        // fences keep the compiler from changing their order.
        compiler_fence(Ordering::SeqCst);
        record[ANSWERED].copy_from_slice(&id.to_ne_bytes());
        compiler_fence(Ordering::SeqCst);
        self.deliver();
    }

    /// Puts the answer of the record where the kernel takes it from. Does the same when it is
    /// called again.
    fn deliver(&mut self) {
        let record = *self.record();
        let len = record[LEN].first_chunk().map_or(0, |len| u32::from_ne_bytes(*len));
        if record[IS_SMALL] != 0 {
            let len = (len as usize).min(SMALL);
            self.payload()[..len].copy_from_slice(&record[DATA][..len]);
        }
        let header = self.header();
        header[..REPLY_HEADER].copy_from_slice(&record[REPLY]);
        header[PAYLOAD_LEN].copy_from_slice(&len.to_ne_bytes());
    }

    /// Returns what an earlier process has left in this entry. An answer is then ready to be handed
    /// to the kernel ([`Port::commit`](super::Port::commit)), as it is after [`RingEntry::answer`].
    pub fn inherited(&mut self) -> EntryState {
        let id = self.commit_id();
        let header = self.header();
        if id == 0 || header[UNIQUE] != id.to_ne_bytes() {
            // The kernel writes the header last. It ends a request that it could not copy as a
            // whole.
            return EntryState::Idle;
        }
        let record = self.record();
        if record[ANSWERED] != id.to_ne_bytes() {
            return EntryState::Asked;
        }
        if record[TAKEN] == id.to_ne_bytes() {
            return EntryState::Idle;
        }
        self.deliver();
        EntryState::Answered
    }

    /// Records that the kernel has taken the answer. Changes only the record, so that the kernel
    /// may have given the entry another request meanwhile.
    pub(crate) fn note_taken(&mut self) {
        let record = self.record();
        record.copy_within(ANSWERED, TAKEN.start);
    }

    /// Notes that `len` bytes of the payload are or will be used.
    pub fn touches(&mut self, len: usize) {
        if len > LITTLE {
            self.touched = Touched::Lately;
        }
    }

    /// Notes that the kernel has copied `len` bytes of a request into the payload.
    pub(crate) fn was_filled(&mut self, len: usize) {
        self.resident = self.resident.max(len.min(PAYLOAD));
    }

    /// Returns how many bytes of the payload are in memory for sure.
    pub(crate) fn resident(&self) -> usize {
        self.resident
    }

    /// Brings the first `len` bytes of the payload into memory, so that the kernel can copy that
    /// much into it without a page fault.
    pub(crate) fn make_resident(&mut self, len: usize) {
        let len = len.min(PAYLOAD);
        if self.resident < len {
            let payload = self.payload.as_ptr().addr() - self.map.start.as_ptr().addr();
            let page = rustix::param::page_size();
            let start = self.resident / page * page;
            self.map.populate(payload + start..payload + len.next_multiple_of(page));
            self.resident = len;
            self.touches(len);
        }
    }

    /// Brings the first [`USUAL`] bytes of the payload into memory, for good.
    pub(crate) fn keep_usual(&mut self) {
        let touched = self.touched;
        self.make_resident(USUAL);
        self.touched = touched;
    }

    /// Returns whether the entry has memory to give back: more than `LITTLE` bytes of its payload
    /// were used, and stay in memory for a while.
    pub fn is_large(&self) -> bool {
        self.touched != Touched::Little
    }

    /// Handles a tick of the timer: gives back the memory if it was not used since the previous
    /// tick, except the first `keep` bytes, which are whole pages. The others are then zeros.
    pub(crate) fn grow_old(&mut self, keep: usize) {
        self.touched = match self.touched {
            Touched::Lately => Touched::Before,
            touched if touched == Touched::Before || self.resident > keep => {
                // The memory is shared, so the pages are removed from the memfd. SAFETY: the pages
                // hold nothing but the payload, of which no thread has a reference, because this
                // one has the entry (`&mut self`). The kernel may have the entry, but does not
                // access it now: this thread is that of its port, and is not inside the ring's
                // io_uring_enter(2) (`Port::give_back`).
                let done = unsafe {
                    rustix::mm::madvise(
                        self.payload.as_ptr().cast::<u8>().add(keep).cast(),
                        PAYLOAD - keep,
                        Advice::LinuxRemove,
                    )
                };
                self.resident = self.resident.min(keep);
                if done.is_ok() { Touched::Little } else { Touched::Before }
            }
            touched => touched,
        }
    }
}

#[cfg(test)]
mod tests;
