//! Tests that send requests as bytes, and check their replies, over a pair of sockets in place of
//! /dev/fuse. Like /dev/fuse, the sockets keep message boundaries.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicUsize, Ordering};

use crossbeam_channel::Receiver;
use rustix::fs::StatVfs;
use rustix::net::{AddressFamily, SocketFlags, SocketType};

use super::super::attributes::AttributeChanges;
use super::super::file_system::{FileSystem, ReadAnswer};
use super::super::handler::{Answer, Durability, Stat, Truncate};
use super::super::pulse::Pulse;
use super::super::workers::Workers;
use super::*;

/// From this offset on, the stub answers no request at once.
const MISS: u64 = 1 << 40;
/// The stub answers this offset in [`FileSystem::read_cached`].
const CACHED: u64 = MISS + (1 << 20);
/// Like [`CACHED`], and after its answer waits until the test lets it go on.
const CACHED_HANG: u64 = CACHED + (1 << 19);
/// The task of a request at this offset panics.
const PANIC: u64 = MISS + (2 << 20);
/// A read at this offset waits on the thread that has received it, until the test lets it go on.
const HANG: u64 = 1 << 30;

const FORGET: u32 = 2;
const GETATTR: u32 = 3;
const SETATTR: u32 = 4;
const READ: u32 = 15;
const WRITE: u32 = 16;
const FSYNC: u32 = 20;
const FLUSH: u32 = 25;
const INTERRUPT: u32 = 36;
const BATCH_FORGET: u32 = 42;
const LSEEK: u32 = 46;

/// A file system that answers by offset and counts the calls.
#[derive(Debug, Default)]
struct Stub {
    writes: AtomicUsize,
    flushes: AtomicUsize,
    covered: AtomicUsize,
    hang: parking_lot::Mutex<()>,
}

impl FileSystem for Stub {
    fn getattr(&self) -> Result<Stat, Errno> {
        Err(Errno::NOTDIR)
    }

    fn setattr(
        &self,
        truncate: Option<Truncate>,
        _changes: &AttributeChanges,
    ) -> Result<Stat, Errno> {
        Err(if truncate.is_some() { Errno::PERM } else { Errno::ISDIR })
    }

    fn open(&self, _open_flags: i32) -> Result<(), Errno> {
        Ok(())
    }

    fn read_local(&self, offset: u64, buf: &mut [u8]) -> Result<Answer<usize>, Errno> {
        if offset >= MISS {
            let is_cached = matches!(offset, CACHED | CACHED_HANG);
            return Ok(if is_cached { Answer::Below } else { Answer::Miss });
        }
        if offset == HANG {
            let _until = self.hang.lock();
        }
        buf.fill(b'l');
        Ok(Answer::Done(buf.len()))
    }

    fn read_cached(&self, offset: u64, buf: &mut [u8], answer: &mut ReadAnswer<'_>) -> Answer<()> {
        if !matches!(offset, CACHED | CACHED_HANG) {
            return Answer::Below;
        }
        buf.fill(b'c');
        answer(Ok(buf));
        if offset == CACHED_HANG {
            let _until = self.hang.lock();
        }
        // Simulates storing the copy after the reply: by then the client must not see this memory
        // any more.
        buf.fill(b'x');
        Answer::Done(())
    }

    fn read(&self, offset: u64, buf: &mut [u8], answer: &mut ReadAnswer<'_>) {
        assert_ne!(offset, PANIC, "on purpose");
        buf.fill(b'w');
        answer(Ok(buf));
    }

    fn write_local(&self, offset: u64, data: &[u8]) -> Result<Answer<usize>, Errno> {
        if offset >= MISS {
            return Ok(Answer::Miss);
        }
        self.writes.fetch_add(1, Ordering::SeqCst);
        Ok(Answer::Done(data.len()))
    }

    fn write(&self, offset: u64, data: &[u8], durability: Durability) -> Result<usize, Errno> {
        assert_ne!(offset, PANIC, "on purpose");
        self.writes.fetch_add(1, Ordering::SeqCst);
        if durability == Durability::Now {
            self.flush()?;
        }
        // Returns the sum of the data, so that the test can check which data arrived.
        Ok(data.iter().map(|&byte| usize::from(byte)).sum())
    }

    fn fallocate(&self, _offset: u64, _len: u64, _mode: i32) -> Result<(), Errno> {
        Ok(())
    }

    fn lseek(&self, offset: i64, _whence: i32) -> Result<i64, Errno> {
        Ok(offset)
    }

    fn flush(&self) -> Result<(), Errno> {
        self.covered.store(self.writes.load(Ordering::SeqCst), Ordering::SeqCst);
        self.flushes.fetch_add(1, Ordering::SeqCst);
        Ok(())
    }

    fn needs_flush(&self) -> bool {
        self.covered.load(Ordering::SeqCst) < self.writes.load(Ordering::SeqCst)
    }

    fn statfs(&self) -> Result<StatVfs, Errno> {
        Err(Errno::NOLINK)
    }
}

/// The kernel's side of the socket pair.
struct Kernel {
    socket: OwnedFd,
    stub: Arc<Stub>,
    ended: Receiver<Result<()>>,
    pulse: Pulse,
}

fn start() -> Kernel {
    start_with(1, &Turns::new(1))
}

/// Starts this many threads, which share one socket.
fn start_with(threads: usize, turns: &Arc<Turns>) -> Kernel {
    let (socket, device) = rustix::net::socketpair(
        AddressFamily::UNIX,
        SocketType::SEQPACKET,
        SocketFlags::CLOEXEC,
        None,
    )
    .unwrap();
    // A missing reply fails the test after this time.
    let patience = Some(std::time::Duration::from_secs(60));
    rustix::net::sockopt::set_socket_timeout(
        &socket,
        rustix::net::sockopt::Timeout::Recv,
        patience,
    )
    .unwrap();
    let stub = Arc::new(Stub::default());
    let file_system: Arc<dyn FileSystem> = Arc::clone(&stub) as _;
    let (workers, _) = Workers::start(&file_system).unwrap();
    let (ending, ended) = SessionEnding::new();
    let (device, echoes) = (Arc::new(device), Arc::default());
    let pulse = Pulse::new(&echoes, &device, false);
    let dispatcher = Dispatcher::new(file_system, workers, echoes);
    let servers: Vec<_> = (0..threads).map(|_| ServerThread::new(&ending)).collect();
    for (number, server) in servers.into_iter().enumerate() {
        let (device, turns) = (Arc::clone(&device), Arc::clone(turns));
        serve(number, device, dispatcher.clone(), turns, server).unwrap();
    }
    Kernel { socket, stub, ended, pulse }
}

/// Encodes `struct fuse_read_in`, which equals the first 40 bytes of a write.
fn range(offset: u64, len: u32, flags: i32) -> Vec<u8> {
    [
        &[0; 8][..],
        &offset.to_ne_bytes(),
        &len.to_ne_bytes(),
        &[0; 12],
        &flags.to_ne_bytes(),
        &[0; 4],
    ]
    .concat()
}

fn write_of(offset: u64, data: &[u8], flags: i32) -> Vec<u8> {
    [range(offset, data.len() as u32, flags), data.to_vec()].concat()
}

impl Kernel {
    fn send(&self, opcode: u32, unique: u64, body: &[u8]) {
        let len = (wire::IN_HEADER + body.len()) as u32;
        let header =
            [&len.to_ne_bytes()[..], &opcode.to_ne_bytes(), &unique.to_ne_bytes(), &[0; 24]]
                .concat();
        rustix::io::write(&self.socket, &[&header, body].concat()).unwrap();
    }

    /// Receives the next reply: its number, the error or 0, and the bytes.
    fn receive(&self) -> (u64, i32, Vec<u8>) {
        let mut reply = vec![0; 2 << 20];
        let len = rustix::io::read(&self.socket, &mut reply).unwrap();
        reply.truncate(len);
        let number = |at: usize| i32::from_ne_bytes(reply[at..at + 4].try_into().unwrap());
        assert_eq!(number(0) as usize, len, "the length in the header");
        let (unique, error) = (u64::from_ne_bytes(reply[8..16].try_into().unwrap()), number(4));
        (unique, error, reply.split_off(OUT_HEADER))
    }

    /// Sends one request and returns the error or 0, and the bytes, of its reply.
    fn ask(&self, opcode: u32, body: &[u8]) -> (i32, Vec<u8>) {
        self.send(opcode, 7, body);
        let (unique, error, bytes) = self.receive();
        assert_eq!(unique, 7);
        (error, bytes)
    }
}

fn eio() -> (i32, Vec<u8>) {
    (-Errno::IO.raw_os_error(), vec![])
}

#[test]
fn reads_are_answered_from_where_they_can_be() {
    let kernel = start();
    for (offset, byte) in [(0, b'l'), (MISS, b'w'), (CACHED, b'c')] {
        assert_eq!(kernel.ask(READ, &range(offset, 5000, 0)), (0, vec![byte; 5000]), "{offset:#x}");
    }
    assert_eq!(kernel.ask(READ, &range(0, 0, 0)), (0, vec![]));
}

#[test]
fn what_a_write_says_of_durability_holds_wherever_it_is_done() {
    let kernel = start();
    let dsync = rustix::fs::OFlags::DSYNC.bits().cast_signed();
    let flushes = || kernel.stub.flushes.load(Ordering::SeqCst);
    let written = |len: u32| (0, [len.to_ne_bytes(), [0; 4]].concat());
    assert_eq!(kernel.ask(WRITE, &write_of(0, b"abc", 0)), written(3));
    assert_eq!(
        kernel.ask(WRITE, &write_of(MISS, &[1, 2, 3], 0)),
        written(6),
        "the sum of what arrived"
    );
    assert_eq!(flushes(), 0);
    assert_eq!(kernel.ask(WRITE, &write_of(0, b"abcd", dsync)), written(4));
    assert_eq!(flushes(), 1);
    assert_eq!(kernel.ask(WRITE, &write_of(MISS, &[4, 5], dsync)), written(9));
    assert_eq!(flushes(), 2);
    // Everything is flushed, so a close does not flush until there is another write.
    assert_eq!(kernel.ask(FLUSH, &[0; 24]), (0, vec![]));
    assert_eq!(flushes(), 2);
    kernel.ask(WRITE, &write_of(0, b"e", 0));
    assert_eq!(kernel.ask(FLUSH, &[0; 24]), (0, vec![]));
    assert_eq!(flushes(), 3);
    assert_eq!(kernel.ask(FSYNC, &[0; 16]), (0, vec![]));
    assert_eq!(flushes(), 4);
}

#[test]
fn errors_and_what_takes_no_reply() {
    let kernel = start();
    assert_eq!(kernel.ask(GETATTR, &[0; 16]).0, -Errno::NOTDIR.raw_os_error());
    assert_eq!(kernel.ask(INTERRUPT, &[0; 8]).0, -Errno::NOSYS.raw_os_error());
    assert_eq!(kernel.ask(WRITE, &write_of(0, b"abc", 0)[..42]), eio());
    // FORGET and BATCH_FORGET get no reply, so the first reply is that of LSEEK.
    kernel.send(FORGET, 1, &[0; 8]);
    kernel.send(BATCH_FORGET, 2, &[0; 24]);
    assert_eq!(kernel.ask(LSEEK, &[0; 24]), (0, vec![0; 8]));
}

#[test]
fn a_panic_of_a_task_is_eio() {
    let kernel = start();
    assert_eq!(kernel.ask(READ, &range(PANIC, 512, 0)), eio());
    assert_eq!(kernel.ask(WRITE, &write_of(PANIC, b"x", 0)), eio());
    assert_eq!(kernel.ask(READ, &range(0, 4, 0)), (0, b"llll".to_vec()));
}

/// Protects: a transport that delivers the kernel's own requests counts as alive, and one that does
/// not counts as dead.
#[test]
fn the_pulse_is_a_request_that_comes_back() {
    let kernel = start();
    let asked = || {
        let mut bytes = [0; 64];
        assert_eq!(rustix::io::read(&kernel.socket, &mut bytes).unwrap(), OUT_HEADER + 32);
        // FUSE_NOTIFY_RETRIEVE of the root inode, 0 bytes.
        assert_eq!(
            (bytes[0], bytes[4], &bytes[8..16], bytes[24], bytes[40]),
            (48, 5, &[0; 8][..], 1, 0)
        );
        u64::from_ne_bytes(bytes[16..24].try_into().unwrap())
    };
    std::thread::scope(|scope| {
        let felt = scope.spawn(|| kernel.pulse.is_felt(std::time::Duration::from_secs(60)));
        kernel.send(41, asked(), &[0; 40]);
        assert!(felt.join().unwrap());
    });
    assert!(!kernel.pulse.is_felt(std::time::Duration::ZERO));
    asked();
    // Neither request got a reply.
    assert_eq!(kernel.ask(LSEEK, &[0; 24]), (0, vec![0; 8]));
}

/// Protects: a reply that is too long for the socket, whose messages have at most about 200 KiB,
/// becomes EIO.
#[test]
fn a_reply_that_the_kernel_does_not_take_is_eio() {
    let kernel = start();
    assert_eq!(kernel.ask(READ, &range(0, 1 << 20, 0)), eio());
    assert_eq!(kernel.ask(READ, &range(MISS, 1 << 20, 0)), eio());
    assert_eq!(kernel.ask(READ, &range(0, 4, 0)), (0, b"llll".to_vec()));
}

/// Asks one request at a time until one of two threads polls and the other one is parked.
fn polled(look: std::time::Duration) -> (Kernel, Arc<Turns>) {
    let turns = Turns::for_tests(2, look);
    let kernel = start_with(2, &turns);
    for asked in 0.. {
        assert_eq!(kernel.ask(READ, &range(0, 8, 0)), (0, vec![b'l'; 8]));
        if turns.one_polls() {
            break;
        }
        assert!(asked < 10_000, "no thread polls");
    }
    (kernel, turns)
}

/// Protects: a client that asks one request at a time is served by one thread that polls, and at
/// the end of the mount the parked thread ends as well.
#[test]
fn one_thread_polls_for_a_client_that_asks_one_at_a_time() {
    let (kernel, turns) = polled(std::time::Duration::from_secs(3600));
    for _ in 0..1000 {
        assert_eq!(kernel.ask(READ, &range(0, 8, 0)), (0, vec![b'l'; 8]));
        assert_eq!(kernel.ask(READ, &range(MISS, 8, 0)), (0, vec![b'w'; 8]));
    }
    assert!(turns.one_polls());
    let Kernel { socket, ended, .. } = kernel;
    drop(socket);
    // Ends when both threads have ended. The end of a socket is no request, and so an error.
    assert!(ended.iter().all(|result| result.is_err()));
    assert_eq!(Arc::strong_count(&turns), 1);
}

/// Protects: a thread that stores the copy of a read, whose reply it has sent, counts as idle for
/// the decision whether the client asks one request at a time.
#[test]
fn a_copy_after_the_reply_is_no_second_request() {
    let turns = Turns::for_tests(2, std::time::Duration::from_secs(3600));
    let kernel = start_with(2, &turns);
    let stub = Arc::clone(&kernel.stub);
    let held = stub.hang.lock();
    assert_eq!(kernel.ask(READ, &range(CACHED_HANG, 8, 0)), (0, vec![b'c'; 8]));
    assert_eq!(turns.unanswered(), 0);
    kernel.send(READ, 1, &range(HANG, 8, 0));
    while turns.unanswered() != 1 {
        std::thread::yield_now();
    }
    drop(held);
    assert_eq!(kernel.receive(), (1, 0, vec![b'l'; 8]));
    for asked in 0.. {
        assert_eq!(kernel.ask(READ, &range(CACHED, 8, 0)), (0, vec![b'c'; 8]));
        if turns.one_polls() {
            break;
        }
        assert!(asked < 10_000, "no thread polls");
    }
    assert!(turns.unanswered() <= 1, "each request is counted once");
}

/// Protects: if the thread that polls hangs in a request, the parked one serves the others.
#[test]
fn a_thread_that_hangs_does_not_keep_the_others_parked() {
    let (kernel, turns) = polled(std::time::Duration::from_millis(1));
    let stub = Arc::clone(&kernel.stub);
    let held = stub.hang.lock();
    kernel.send(READ, 1, &range(HANG, 8, 0));
    for unique in 2..100 {
        kernel.send(READ, unique, &range(0, 8, 0));
        assert_eq!(kernel.receive(), (unique, 0, vec![b'l'; 8]), "while another one hangs");
    }
    assert!(!turns.one_polls());
    drop(held);
    assert_eq!(kernel.receive(), (1, 0, vec![b'l'; 8]));
}

/// Protects: any content of a request, including times that other representations cannot hold, gets
/// exactly one reply.
#[test]
fn whatever_a_request_holds_it_gets_one_reply() {
    let seed = std::collections::hash_map::RandomState::new();
    let seed = std::hash::BuildHasher::hash_one(&seed, 0) | 1;
    println!("seed {seed}");
    let mut state = seed;
    let mut random = move || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state
    };
    let kernel = start();
    let mut asked = BTreeMap::new();
    for unique in 1..3000_u64 {
        let opcode = match random() % 4 {
            0 => SETATTR,
            1 => (random() % 64) as u32,
            2 => [READ, WRITE, LSEEK, 43][(random() % 4) as usize],
            _ => random() as u32,
        };
        // Opcodes 2, 41 and 42 take no reply.
        if matches!(opcode, FORGET | 41 | BATCH_FORGET) {
            continue;
        }
        let mut body: Vec<u8> = (0..random() % 200)
            .map(|_| if random() % 3 == 0 { random() as u8 } else { 0xff })
            .collect();
        if opcode == READ && body.len() >= 20 {
            body[18..20].fill(0); // short enough for a message of this socket
        }
        kernel.send(opcode, unique, &body);
        asked.insert(unique, opcode);
        if asked.len() == 50 || unique == 2999 {
            while !asked.is_empty() {
                let (unique, error, _) = kernel.receive();
                assert!(
                    asked.remove(&unique).is_some(),
                    "a second reply to {unique}, or one to nothing"
                );
                assert!((-511..=0).contains(&error), "{error}");
            }
        }
    }
    assert_eq!(kernel.ask(READ, &range(0, 4, 0)), (0, b"llll".to_vec()));
    assert!(kernel.ended.is_empty());
}

#[test]
fn a_server_that_cannot_go_on_ends_the_session() {
    let kernel = start();
    rustix::io::write(&kernel.socket, &[0; 39]).unwrap();
    let error = kernel.ended.recv().unwrap().unwrap_err().to_string();
    assert!(
        error.contains("/dev/fuse") && error.contains("39 bytes that are no request"),
        "{error}"
    );
}

/// Protects: each page of a buffer for requests is in memory before the first read.
#[test]
fn the_memory_of_requests_is_resident() {
    use std::os::unix::fs::FileExt;

    let mut memory = IoMemory::new(WRITE_HEADER + MAX_IO, WRITE_HEADER);
    memory.make_resident();
    let bytes = memory.bytes().as_ptr_range();
    // The entries are 64 bits for each page of the address space; bit 63 says that it is present.
    let pages = std::fs::File::open("/proc/self/pagemap").unwrap();
    for page in bytes.start.addr() / PAGE..=(bytes.end.addr() - 1) / PAGE {
        let mut entry = [0; 8];
        pages.read_exact_at(&mut entry, (page * 8) as u64).unwrap();
        assert_ne!(u64::from_ne_bytes(entry) >> 63, 0, "page {page:#x}");
    }
}
