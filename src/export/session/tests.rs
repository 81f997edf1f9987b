//! Sessions that outlive their process. The tests mount a plain file, serve it in a child process,
//! kill that process, and let another one continue. The test process is the client of the mount,
//! and the keeper: it holds duplicates of all descriptors.
//!
//! The children are this test binary, which runs only the test [`server`]. Their standard input is
//! the socket over which they get descriptors.
//!
//! All children of a test are started before it opens the mounted file, and wait for their turn. A
//! child that is started while this process has the file open inherits it until it executes the
//! binary. Closing it then sends FUSE_FLUSH, whose answer the child would wait for,
//! uninterruptibly, without any process that serves. For the same reason only one test at a time
//! has a mount.

use std::fs::{File, OpenOptions};
use std::io::Write as _;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use crossbeam_channel::Receiver;
use parking_lot::{Mutex, MutexGuard};
use rustix::fs::{OFlags, StatVfs};
use rustix::io::Errno;
use rustix::mount::{MountFlags, UnmountFlags};
use rustix::net::sockopt::{Timeout, set_socket_timeout};
use rustix::thread::CpuSet;
use serde::{Deserialize, Serialize};

use super::super::ring::Rings;
use super::super::wire::{IN_HEADER, OUT_HEADER};
use super::*;
use crate::*;
use host::packet;

/// Set in a child.
const IS_SERVER: &str = "CORDISK_TEST_TAKEOVER_SERVER";
/// After this time a test fails, instead of waiting for ever.
const PATIENCE: Duration = Duration::from_secs(30);
/// Longest message between the processes, in bytes.
const LONGEST: usize = 4096;

/// Size of the file, in bytes.
const SIZE: u64 = 16 << 20;
/// Unit of the clients, in bytes.
const BLOCK: u64 = 4096;
/// A process with [`Hold::Before`] hangs in requests at this offset, and does nothing for them.
const MARK: u64 = SIZE - BLOCK;

/// Which requests at [`MARK`] hang.
#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq, Serialize)]
enum Hold {
    Nothing,
    /// They hang before anything is done.
    Before,
    /// They are done, but never answered.
    After,
    /// A read hangs on the thread that serves its CPU's queue. A write waits on a worker for such a
    /// read, and is then answered.
    Server,
}

/// To a child, with the mounted descriptor, or with all descriptors if the session is taken over.
#[derive(Debug, Deserialize, Serialize)]
struct Order {
    image: PathBuf,
    log: PathBuf,
    hold: Hold,
    over: Over,
    take_over: Option<Negotiated>,
}

/// The transport of a session.
#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq, Serialize)]
enum Over {
    Device,
    /// The last descriptor is the shared memory.
    Uring,
}

/// To a child that serves: it leaves the session to another process, and ends.
#[derive(Debug, Deserialize, Serialize)]
struct Leave;

/// Exit status of a child that has left.
const LEFT: i32 = 75;

/// From a child.
#[derive(Debug, Deserialize, PartialEq, Serialize)]
enum News {
    /// With all descriptors.
    Connected(Negotiated),
    Serving,
    /// A request at [`MARK`] hangs.
    Held,
}

/// A plain file. It writes what it does to a log, one line each.
#[derive(Debug)]
struct PlainFile {
    file: File,
    log: Mutex<File>,
    hold: Hold,
    control: OwnedFd,
    needs_flush: AtomicBool,
    /// A message when a read hangs with [`Hold::Server`].
    hangs: (crossbeam_channel::Sender<()>, Receiver<()>),
}

impl PlainFile {
    fn open(order: &Order, control: OwnedFd) -> PlainFile {
        PlainFile {
            file: File::options().read(true).write(true).open(&order.image).unwrap(),
            log: Mutex::new(File::options().append(true).create(true).open(&order.log).unwrap()),
            hold: order.hold,
            control,
            needs_flush: AtomicBool::new(false),
            hangs: crossbeam_channel::unbounded(),
        }
    }

    fn note(&self, line: &str) {
        // One system call: a kill leaves a whole line or none.
        self.log.lock().write_all(format!("{line}\n").as_bytes()).unwrap();
    }

    /// Does the work of a request at [`MARK`], and hangs at the place that the order says.
    fn at_mark(&self, offset: u64, work: impl FnOnce()) {
        if offset != MARK || self.hold != Hold::Before {
            work();
        }
        if offset == MARK && self.hold == Hold::Server {
            self.tell_held();
            self.hangs.1.recv().unwrap();
        } else if offset == MARK && self.hold != Hold::Nothing {
            self.hang();
        }
    }

    fn tell_held(&self) {
        packet::send(&self.control, &News::Held, LONGEST, &[]).unwrap();
    }

    fn hang(&self) -> ! {
        self.tell_held();
        loop {
            thread::park();
        }
    }
}

/// Requests at these offsets are answered by a worker.
fn is_miss(offset: u64) -> bool {
    offset == MARK || offset / BLOCK % 8 == 3
}

impl FileSystem for PlainFile {
    fn getattr(&self) -> Result<Stat, Errno> {
        let host = self.file.metadata().unwrap();
        let modified = host.modified().unwrap();
        let times = FileTimes { atime: modified, mtime: modified, ctime: modified };
        let owner = Owner { mode: 0o600, uid: host.uid(), gid: host.gid() };
        Ok(Stat { size: host.size(), blocks: host.blocks(), blksize: 4096, owner, times })
    }

    fn setattr(
        &self,
        _truncate: Option<Truncate>,
        _changes: &AttributeChanges,
    ) -> Result<Stat, Errno> {
        self.getattr()
    }

    fn open(&self, _open_flags: i32) -> Result<(), Errno> {
        Ok(())
    }

    fn taken_over(&self) {
        self.note("taken over");
        self.needs_flush.store(true, Ordering::SeqCst);
    }

    fn read_local(&self, offset: u64, buf: &mut [u8]) -> Result<Answer<usize>, Errno> {
        if offset == MARK && self.hold == Hold::Server {
            self.hangs.0.send(()).unwrap();
            self.hang();
        }
        if is_miss(offset) {
            return Ok(Answer::Miss);
        }
        Ok(Answer::Done(self.file.read_at(buf, offset).unwrap()))
    }

    fn read_cached(&self, _: u64, _: &mut [u8], _: &mut ReadAnswer<'_>) -> Answer<()> {
        Answer::Below
    }

    fn read(&self, offset: u64, buf: &mut [u8], answer: &mut ReadAnswer<'_>) {
        let mut len = 0;
        self.at_mark(offset, || {
            self.note(&format!("read {offset}"));
            len = self.file.read_at(buf, offset).unwrap();
        });
        answer(Ok(&buf[..len]));
    }

    fn write_local(&self, offset: u64, data: &[u8]) -> Result<Answer<usize>, Errno> {
        if is_miss(offset) {
            return Ok(Answer::Miss);
        }
        self.needs_flush.store(true, Ordering::SeqCst);
        self.file.write_all_at(data, offset).unwrap();
        Ok(Answer::Done(data.len()))
    }

    fn write(&self, offset: u64, data: &[u8], _: Durability) -> Result<usize, Errno> {
        self.at_mark(offset, || {
            self.note(&format!("write {offset}"));
            self.needs_flush.store(true, Ordering::SeqCst);
            self.file.write_all_at(data, offset).unwrap();
        });
        Ok(data.len())
    }

    fn fallocate(&self, _offset: u64, _len: u64, _mode: i32) -> Result<(), Errno> {
        Err(Errno::OPNOTSUPP)
    }

    fn lseek(&self, _offset: i64, _whence: i32) -> Result<i64, Errno> {
        Err(Errno::NXIO)
    }

    fn flush(&self) -> Result<(), Errno> {
        self.needs_flush.store(false, Ordering::SeqCst);
        self.note("flush");
        Ok(())
    }

    fn needs_flush(&self) -> bool {
        self.needs_flush.load(Ordering::SeqCst)
    }

    fn statfs(&self) -> Result<StatVfs, Errno> {
        Err(Errno::NOSYS)
    }
}

/// The process that serves. Without the environment variable this test does nothing.
#[test]
fn server() {
    if std::env::var_os(IS_SERVER).is_none() {
        return;
    }
    let control = std::io::stdin().as_fd().try_clone_to_owned().unwrap();
    let (order, devices): (Order, _) = packet::receive(&control, LONGEST).unwrap().unwrap();
    let file = Arc::new(PlainFile::open(&order, control.try_clone().unwrap()));
    let transport = match (order.over, &order.take_over) {
        (Over::Device, _) => Transport::Dev,
        (Over::Uring, None) => Transport::Uring,
        (Over::Uring, Some(_)) => Transport::UringAgain,
    };
    let prepared = Prepared::other(file, transport).unwrap();
    let connected = match &order.take_over {
        Some(negotiated) => {
            let mut devices = devices;
            let memory = (order.over == Over::Uring).then(|| devices.pop().unwrap());
            prepared.take_over(devices, memory, negotiated).unwrap()
        }
        None => {
            let connected = prepared.connect(devices.into_iter().next().unwrap()).unwrap();
            let news = News::Connected(connected.negotiated().clone());
            let mut kept = connected.devices();
            kept.extend(connected.shared_memory());
            packet::send(&control, &news, LONGEST, &kept).unwrap();
            connected
        }
    };
    let mounted = connected.serve().unwrap();
    packet::send(&control, &News::Serving, LONGEST, &[]).unwrap();
    let (leave, wants_to_leave) = crossbeam_channel::bounded(1);
    let kept = leave.clone();
    thread::spawn(move || {
        // Nothing more comes if the test ends.
        if let Ok(Some((Leave, _))) = packet::receive(&control, LONGEST) {
            leave.send(()).unwrap();
        }
    });
    crossbeam_channel::select! {
        recv(mounted.ended()) -> _ => {}
        recv(wants_to_leave) -> _ => {
            let status = if mounted.leave(PATIENCE) { LEFT } else { 1 };
            std::process::exit(status);
        }
    }
    drop(kept);
}

/// A child that serves. It is killed and waited for when this value is dropped.
struct Server {
    child: Child,
    control: OwnedFd,
    /// News that came and were not expected yet.
    early: Mutex<Vec<News>>,
}

impl Server {
    /// Starts a child, which waits for an order.
    fn start() -> Server {
        let (control, stdin) = packet::pair().unwrap();
        set_socket_timeout(&control, Timeout::Recv, Some(PATIENCE)).unwrap();
        let child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "session::tests::server", "--nocapture"])
            .env(IS_SERVER, "1")
            .stdin(stdin)
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        Server { child, control, early: Mutex::default() }
    }

    fn order(&self, order: &Order, devices: &[BorrowedFd<'_>]) {
        packet::send(&self.control, order, LONGEST, devices).unwrap();
    }

    fn next(&self) -> (News, Vec<OwnedFd>) {
        packet::receive(&self.control, LONGEST).unwrap().expect("the server has ended")
    }

    /// Waits for this news. A successor may hang in a request before it says that it serves.
    fn expect(&self, news: &News) {
        let mut early = self.early.lock();
        if let Some(at) = early.iter().position(|early| early == news) {
            early.remove(at);
            return;
        }
        loop {
            match self.next().0 {
                next if &next == news => return,
                next => early.push(next),
            }
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Held by the test that has a mount.
static MOUNT: Mutex<()> = Mutex::new(());

/// A mounted file, and what a keeper holds.
struct Rig {
    scratch: tempfile::TempDir,
    over: Over,
    devices: Vec<OwnedFd>,
    negotiated: Negotiated,
    server: Option<Server>,
    /// Children for [`Rig::succeed`].
    successors: Vec<Server>,
    _only: MutexGuard<'static, ()>,
}

impl Rig {
    /// Mounts a file of [`SIZE`] bytes and starts its first server, and children for `takeovers`.
    /// `None` if this host cannot.
    fn mount(over: Over, hold: Hold, takeovers: u64) -> Option<Rig> {
        if !rustix::process::geteuid().is_root() {
            eprintln!("skipped: not running as root");
            return None;
        }
        let Ok(device) = File::options().read(true).write(true).open("/dev/fuse") else {
            eprintln!("skipped: /dev/fuse cannot be opened");
            return None;
        };
        if over == Over::Uring
            && let Err(error) = Rings::wanted(Transport::Uring)
        {
            eprintln!("skipped: {error}");
            return None;
        }
        let _only = MOUNT.lock();
        let server = Server::start();
        let successors = (0..takeovers).map(|_| Server::start()).collect();
        let scratch = tempfile::tempdir().unwrap();
        let image = scratch.path().join("image");
        File::create(&image).unwrap().set_len(SIZE).unwrap();
        File::create(scratch.path().join("mountpoint")).unwrap();
        let options = std::ffi::CString::new(format!(
            "fd={},rootmode=100000,user_id=0,group_id=0,default_permissions",
            std::os::fd::AsRawFd::as_raw_fd(&device)
        ))
        .unwrap();
        let flags = MountFlags::NOSUID | MountFlags::NODEV;
        let mountpoint = scratch.path().join("mountpoint");
        if let Err(errno) = rustix::mount::mount("test", &mountpoint, "fuse", flags, &*options) {
            eprintln!("skipped: mounting: {errno}");
            return None;
        }
        let negotiated = Negotiated {
            over_io_uring: false,
            minor: 0,
            max_write: 0,
            capabilities: 0,
            rings: None,
        };
        let devices = vec![device.into()];
        let mut rig = Rig { scratch, over, devices, negotiated, server: None, successors, _only };
        server.order(&rig.order(hold, None), &[rig.devices[0].as_fd()]);
        let (News::Connected(negotiated), devices) = server.next() else {
            panic!("no descriptors")
        };
        rig.server = Some(server);
        let memory = usize::from(over == Over::Uring);
        assert_eq!(devices.len(), 2 + memory, "the mounted descriptor and a clone");
        assert_eq!(negotiated.over_io_uring, over == Over::Uring);
        (rig.devices, rig.negotiated) = (devices, negotiated);
        rig.server().expect(&News::Serving);
        if !rig.negotiated.can_resend() {
            eprintln!("skipped: this kernel cannot send requests again (Linux 6.9 can)");
            return None;
        }
        Some(rig)
    }

    fn order(&self, hold: Hold, take_over: Option<Negotiated>) -> Order {
        let (image, log, over) = (self.path("image"), self.path("log"), self.over);
        Order { image, log, hold, over, take_over }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.scratch.path().join(name)
    }

    fn server(&self) -> &Server {
        self.server.as_ref().expect("a server")
    }

    /// Kills the server, and returns when all of its threads have ended.
    fn kill(&mut self) {
        self.server = None;
    }

    /// Ends the server as a panic does (`abort`), and returns when all of its threads have ended.
    fn abort(&mut self) {
        let mut server = self.server.take().expect("a server");
        let pid = rustix::process::Pid::from_child(&server.child);
        rustix::process::kill_process(pid, rustix::process::Signal::ABORT).unwrap();
        server.child.wait().unwrap();
    }

    /// Lets the server leave, and returns when it has ended.
    fn leave(&mut self) {
        let mut server = self.server.take().expect("a server");
        packet::send(&server.control, &Leave, LONGEST, &[]).unwrap();
        let status = in_time(move || server.child.wait().unwrap());
        assert_eq!(status.code(), Some(LEFT));
    }

    /// Starts the next server and waits until it serves.
    fn succeed(&mut self, hold: Hold) {
        let devices: Vec<_> = self.devices.iter().map(|device| device.as_fd()).collect();
        let order = self.order(hold, Some(self.negotiated.clone()));
        let server = self.successors.pop().expect("a child for each takeover");
        server.order(&order, &devices);
        self.server = Some(server);
        self.server().expect(&News::Serving);
    }

    /// Opens the mounted file.
    fn open(&self, flags: OFlags) -> Arc<File> {
        let path = self.path("mountpoint");
        in_time(move || {
            let mut options = OpenOptions::new();
            options.read(true).write(true).custom_flags(flags.bits().cast_signed());
            Arc::new(options.open(path).unwrap())
        })
    }

    /// Returns how often a line stands in the log.
    fn noted(&self, line: &str) -> usize {
        let log = std::fs::read_to_string(self.path("log")).unwrap_or_default();
        log.lines().filter(|noted| *noted == line).count()
    }
}

impl Drop for Rig {
    fn drop(&mut self) {
        let mountpoint = self.path("mountpoint");
        // Ends all requests. EBUSY: a client has the file open.
        let _ = rustix::mount::unmount(&mountpoint, UnmountFlags::FORCE);
        let _ = rustix::mount::unmount(&mountpoint, UnmountFlags::DETACH);
    }
}

/// Runs `work`, which is a client of the mount, on a thread of its own.
fn started<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Receiver<T> {
    let (done, result) = crossbeam_channel::bounded(1);
    thread::spawn(move || done.send(work()));
    result
}

/// Runs `work` and fails if it takes too long. The [`Rig`] then ends the requests that it waits
/// for.
fn in_time<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
    started(work).recv_timeout(PATIENCE).expect("no panic and no wait for ever")
}

fn read(file: &Arc<File>, offset: u64, len: usize) -> Vec<u8> {
    let file = Arc::clone(file);
    in_time(move || {
        let mut bytes = vec![0xee; len];
        file.read_exact_at(&mut bytes, offset).unwrap();
        bytes
    })
}

fn write(file: &Arc<File>, offset: u64, bytes: &[u8]) {
    let (file, bytes) = (Arc::clone(file), bytes.to_vec());
    in_time(move || file.write_all_at(&bytes, offset).unwrap());
}

/// What stat(2) shows.
fn shown(path: &Path) -> (u64, u32, u32, u32, i64, i64) {
    let path = path.to_owned();
    in_time(move || {
        let stat = path.metadata().unwrap();
        (stat.size(), stat.mode(), stat.uid(), stat.gid(), stat.mtime(), stat.mtime_nsec())
    })
}

/// Defines each test once for each transport.
macro_rules! over_each_transport {
    ($($name:ident)*) => {
        mod over_device {
            $(#[test]
            fn $name() {
                super::$name(super::Over::Device);
            })*
        }

        mod over_uring {
            $(#[test]
            fn $name() {
                super::$name(super::Over::Uring);
            })*
        }
    };
}

over_each_transport! {
    an_idle_session_continues
    what_was_read_and_not_answered_is_answered_once
    what_was_done_and_not_answered_is_done_again
    what_was_answered_is_not_done_again
    what_comes_while_no_process_serves_is_answered
    without_a_keeper_requests_end
    clients_under_load_do_not_notice_kills
    clients_under_load_do_not_notice_servers_that_leave
    what_workers_have_stays_when_a_server_leaves
}

/// Protects: a client that has the file open, and sends nothing while no process serves, finds
/// everything as it was. A close after the takeover flushes, because the dead process may have
/// answered writes that no flush has covered.
fn an_idle_session_continues(over: Over) {
    let Some(mut rig) = Rig::mount(over, Hold::Nothing, 2) else { return };
    let file = rig.open(OFlags::empty());
    write(&file, 0, b"before the kill");
    let before = shown(&rig.path("mountpoint"));
    rig.kill();
    rig.succeed(Hold::Nothing);
    assert_eq!(rig.noted("taken over"), 1);
    assert_eq!(read(&file, 0, 15), b"before the kill");
    assert_eq!(shown(&rig.path("mountpoint")), before);
    let flushes = rig.noted("flush");
    in_time(move || drop(file));
    assert_eq!(rig.noted("flush"), flushes + 1);

    let file = rig.open(OFlags::DIRECT);
    write(&file, 1 << 20, &[7; 2 << 20]);
    rig.kill();
    rig.succeed(Hold::Nothing);
    assert_eq!(read(&file, 1 << 20, 2 << 20), [7; 2 << 20]);
    assert_eq!(std::fs::read(rig.path("image")).unwrap()[1 << 20..3 << 20], [7; 2 << 20]);
}

/// Protects: requests that were read and not answered are answered by the process that comes next,
/// and by no more than one. The first server hangs before it does anything, the second one as well:
/// what it was sent again must be sent once more.
fn what_was_read_and_not_answered_is_answered_once(over: Over) {
    let Some(mut rig) = Rig::mount(over, Hold::Before, 2) else { return };
    let file = rig.open(OFlags::DIRECT);
    let writer = {
        let file = Arc::clone(&file);
        started(move || file.write_at(&[0x5a; BLOCK as usize], MARK))
    };
    rig.server().expect(&News::Held);
    rig.kill();
    rig.succeed(Hold::Before);
    rig.server().expect(&News::Held);
    rig.kill();
    assert!(writer.is_empty());
    assert_eq!(std::fs::read(rig.path("image")).unwrap()[MARK as usize..], [0; BLOCK as usize]);
    rig.succeed(Hold::Nothing);
    assert_eq!(writer.recv_timeout(PATIENCE).unwrap().unwrap(), BLOCK as usize);
    assert_eq!(rig.noted(&format!("write {MARK}")), 1);
    assert_eq!(std::fs::read(rig.path("image")).unwrap()[MARK as usize..], [0x5a; BLOCK as usize]);

    // Both descriptors serve on.
    for byte in 0..20 {
        write(&file, u64::from(byte) * BLOCK, &[byte; BLOCK as usize]);
        assert_eq!(read(&file, u64::from(byte) * BLOCK, BLOCK as usize), [byte; BLOCK as usize]);
    }
    assert_eq!(rig.noted(&format!("write {MARK}")), 1);
}

/// Protects: a request that was done, but not answered, is done again by the next process.
fn what_was_done_and_not_answered_is_done_again(over: Over) {
    let Some(mut rig) = Rig::mount(over, Hold::After, 3) else { return };
    let file = rig.open(OFlags::DIRECT);
    let writer = {
        let file = Arc::clone(&file);
        started(move || file.write_at(&[0xc3; BLOCK as usize], MARK))
    };
    rig.server().expect(&News::Held);
    rig.kill();
    rig.succeed(Hold::Nothing);
    assert_eq!(writer.recv_timeout(PATIENCE).unwrap().unwrap(), BLOCK as usize);
    assert_eq!(rig.noted(&format!("write {MARK}")), 2);
    rig.kill();
    rig.succeed(Hold::After);
    let reader = {
        let file = Arc::clone(&file);
        started(move || {
            let mut bytes = vec![0; BLOCK as usize];
            file.read_at(&mut bytes, MARK).map(|len| bytes[..len].to_vec())
        })
    };
    rig.server().expect(&News::Held);
    rig.kill();
    rig.succeed(Hold::Nothing);
    assert_eq!(reader.recv_timeout(PATIENCE).unwrap().unwrap(), [0xc3; BLOCK as usize]);
    assert_eq!(rig.noted(&format!("read {MARK}")), 2);
}

/// Protects: a write that was answered is not carried out again by later processes: it could
/// overwrite a later one. Over io_uring it still lies in the shared memory.
fn what_was_answered_is_not_done_again(over: Over) {
    let Some(mut rig) = Rig::mount(over, Hold::Nothing, 4) else { return };
    let file = rig.open(OFlags::DIRECT);
    let offset = |number: u8| (8 * u64::from(number) + 3) * BLOCK;
    for (number, is_forgotten) in (1..).zip([false, true, false, true]) {
        write(&file, offset(number), &[number; BLOCK as usize]);
        rig.kill();
        if is_forgotten && over == Over::Uring {
            // The process has died before it could note that the kernel has taken its answers.
            let (memory, entries) = rig.memory();
            for slot in 0..entries {
                memory.write_all_at(&[0; 8], ((slot + 1) * STRIDE - 8) as u64).unwrap();
            }
        }
        rig.succeed(Hold::Nothing);
    }
    for number in 1..=4 {
        assert_eq!(read(&file, offset(number), BLOCK as usize), [number; BLOCK as usize]);
        assert_eq!(rig.noted(&format!("write {}", offset(number))), 1);
    }
}

/// Runs the calling thread on one CPU: the first one on which it may run.
fn stay_on_one_cpu() {
    let allowed = rustix::thread::sched_getaffinity(None).unwrap();
    let first = (0..CpuSet::MAX_CPU).find(|&cpu| allowed.is_set(cpu)).unwrap();
    let mut one = CpuSet::new();
    one.set(first);
    rustix::thread::sched_setaffinity(None, &one).unwrap();
}

/// Protects: requests that come after the death wait, and all of them are answered, also those of
/// one CPU, whose queue gives the successor no more than one of them for each answer.
fn what_comes_while_no_process_serves_is_answered(over: Over) {
    /// More requests than the successor has answers to hand in.
    const WRITERS: u64 = 5;
    let Some(mut rig) = Rig::mount(over, Hold::Nothing, 1) else { return };
    let file = rig.open(OFlags::DIRECT);
    rig.kill();
    let (tell, told) = crossbeam_channel::unbounded();
    let writers: Vec<_> = (0..WRITERS)
        .map(|number| {
            let (file, tell) = (Arc::clone(&file), tell.clone());
            started(move || {
                stay_on_one_cpu();
                tell.send(rustix::thread::gettid()).unwrap();
                file.write_at(&[number as u8; BLOCK as usize], number * BLOCK)
            })
        })
        .collect();
    let descriptor = format!("{:#x}", std::os::fd::AsRawFd::as_raw_fd(&*file));
    for thread in told.iter().take(WRITERS as usize) {
        // Wait until the thread waits in a system call for this file.
        let path = format!("/proc/self/task/{}/syscall", thread.as_raw_nonzero());
        in_time({
            let descriptor = descriptor.clone();
            move || {
                while std::fs::read_to_string(&path).unwrap().split(' ').nth(1) != Some(&descriptor)
                {
                    thread::yield_now();
                }
            }
        });
    }
    rig.succeed(Hold::Nothing);
    for (number, writer) in (0..).zip(writers) {
        assert_eq!(writer.recv_timeout(PATIENCE).unwrap().unwrap(), BLOCK as usize);
        assert_eq!(read(&file, number * BLOCK, BLOCK as usize), [number as u8; BLOCK as usize]);
    }
}

/// Size of the header and the record of a request in the shared memory, in bytes. Of the layout,
/// which is that of the crate `uring`, the tests know where these numbers are: the commit id (264),
/// the id of the answer (288), the length of its data (296), and the id of the last answer that the
/// kernel has taken (504).
const STRIDE: usize = 512;

impl Rig {
    /// Returns the shared memory and the number of entries in it.
    fn memory(&self) -> (File, usize) {
        let layout = self.negotiated.rings.expect("a session over io_uring");
        let memory = self.devices.last().unwrap().try_clone().unwrap();
        (memory.into(), layout.queues as usize * layout.depth as usize)
    }

    /// Takes the memory of all payloads away, except that of requests and answers, as if no request
    /// had ever come. Call it while no server lives.
    fn forget_payloads(&self) {
        let (memory, entries) = self.memory();
        let headers = (entries * STRIDE).next_multiple_of(rustix::param::page_size());
        let start = headers as u64;
        let mut bytes = vec![0; entries * STRIDE];
        memory.read_exact_at(&mut bytes, 0).unwrap();
        for (slot, bytes) in bytes.chunks_exact(STRIDE).enumerate() {
            let is_asked = bytes[264..272] == bytes[8..16] && bytes[264..272] != bytes[288..296];
            let is_answered =
                bytes[264..272] == bytes[288..296] && bytes[288..296] != bytes[504..512];
            if is_asked || is_answered {
                continue;
            }
            let flags =
                rustix::fs::FallocateFlags::PUNCH_HOLE | rustix::fs::FallocateFlags::KEEP_SIZE;
            let at = start + ((slot as u64) << 20);
            rustix::fs::fallocate(&memory, flags, at, 1 << 20).unwrap();
        }
    }

    /// Gives memory to the entries that the kernel prefers, as they have it after a while under
    /// load. If the server is killed while the kernel copies a large request into an entry without
    /// memory, the client gets EAGAIN or EINTR: in this test, after one of two hundred kills.
    fn make_resident(&self) {
        /// More entries of a queue than the clients use at once.
        const PREFERRED: usize = 24;
        let layout = self.negotiated.rings.expect("a session over io_uring");
        let (memory, entries) = self.memory();
        let headers = (entries * STRIDE).next_multiple_of(rustix::param::page_size());
        for last in (1..=layout.queues as usize).map(|queue| queue * layout.depth as usize) {
            let first = last - PREFERRED.min(layout.depth as usize);
            let (start, len) = (headers + first * (1 << 20), (last - first) << 20);
            memory.write_all_at(&vec![0; len], start as u64).unwrap();
        }
    }
}

/// Returns the ids of the writes whose answers lie in the shared memory.
fn answered_writes((memory, entries): &(File, usize)) -> Vec<u64> {
    let mut bytes = vec![0; entries * STRIDE];
    memory.read_exact_at(&mut bytes, 0).unwrap();
    bytes
        .chunks_exact(STRIDE)
        .filter(|slot| slot[264..272] == slot[288..296] && slot[296..300] == 8u32.to_ne_bytes())
        .map(|slot| u64::from_ne_bytes(slot[288..296].try_into().unwrap()))
        .filter(|&id| id != 0)
        .collect()
}

/// Protects: an answer that the process had made, and had not handed to the kernel, reaches the
/// client without the request being carried out again.
#[test]
fn an_answer_that_was_not_handed_in_is_handed_in() {
    let Some(mut rig) = Rig::mount(Over::Uring, Hold::Server, 1) else { return };
    let file = rig.open(OFlags::DIRECT);
    let writer = {
        let file = Arc::clone(&file);
        started(move || {
            stay_on_one_cpu();
            file.write_at(&[0x77; BLOCK as usize], MARK)
        })
    };
    // The write is on a worker, and done.
    rig.server().expect(&News::Held);
    let memory = rig.memory();
    let before = answered_writes(&memory);
    let reader = {
        let file = Arc::clone(&file);
        started(move || {
            stay_on_one_cpu();
            let mut bytes = vec![0; BLOCK as usize];
            file.read_at(&mut bytes, MARK).map(|len| bytes[..len].to_vec())
        })
    };
    // The server of the queue hangs in the read. It hands in no answers any more.
    rig.server().expect(&News::Held);
    in_time(move || {
        while answered_writes(&memory).iter().all(|id| before.contains(id)) {
            thread::yield_now();
        }
    });
    assert!(writer.is_empty());
    rig.kill();
    assert!(writer.is_empty());
    rig.succeed(Hold::Nothing);
    assert_eq!(writer.recv_timeout(PATIENCE).unwrap().unwrap(), BLOCK as usize);
    assert_eq!(reader.recv_timeout(PATIENCE).unwrap().unwrap(), [0x77; BLOCK as usize]);
    assert_eq!(rig.noted(&format!("write {MARK}")), 1);
}

/// Protects: when the last descriptor is closed, requests end instead of waiting for ever.
fn without_a_keeper_requests_end(over: Over) {
    let Some(mut rig) = Rig::mount(over, Hold::Before, 0) else { return };
    let file = rig.open(OFlags::DIRECT);
    let writer = started(move || file.write_at(&[1; BLOCK as usize], MARK));
    rig.server().expect(&News::Held);
    rig.kill();
    assert!(writer.is_empty());
    rig.devices.clear();
    let error = writer.recv_timeout(PATIENCE).unwrap().unwrap_err();
    assert_eq!(error.raw_os_error(), Some(Errno::CONNABORTED.raw_os_error()));
}

/// A generator of numbers (xorshift).
struct Numbers(u64);

impl Numbers {
    fn below(&mut self, end: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % end
    }
}

/// Clients of the test under load, each with a region of its own.
const CLIENTS: u64 = 6;
/// Blocks of a region.
const REGION: u64 = 600;
/// Kills of the test under load.
const KILLS: u64 = 40;

/// The content of a block that was written as `version`; version 0 is what the file has at first.
/// Each sector begins with both numbers. It is made of few calls, because clients that make no
/// content have more requests in flight.
fn content(block: u64, version: u64) -> [u8; BLOCK as usize] {
    let mut bytes = [version as u8; BLOCK as usize];
    if version > 0 {
        for sector in bytes.chunks_exact_mut(512) {
            sector[..8].copy_from_slice(&version.to_ne_bytes());
            sector[8..16].copy_from_slice(&block.to_ne_bytes());
        }
    }
    bytes
}

/// One client: it writes and reads its region until `stop`, and then returns the number of requests
/// and what each of its blocks must contain.
fn client(
    file: &File,
    number: u64,
    seed: u64,
    blocks: &[u64],
    stop: &AtomicBool,
) -> (u64, Vec<u64>) {
    let mut numbers = Numbers(seed);
    let first = number * REGION;
    let mut versions = vec![0; REGION as usize];
    let mut done = 0;
    let content = |range: std::ops::Range<u64>, versions: &[u64]| -> Vec<u8> {
        range.flat_map(|block| content(first + block, versions[block as usize])).collect()
    };
    while !stop.load(Ordering::Relaxed) {
        done += 1;
        let most = blocks[numbers.below(blocks.len() as u64) as usize];
        let len = 1 + numbers.below(most);
        let start = numbers.below(REGION - len);
        let at = (first + start) * BLOCK;
        if numbers.below(60) == 0 {
            file.sync_data().unwrap_or_else(|error| panic!("seed {seed}: fsync: {error}"));
        } else if numbers.below(2) == 0 {
            versions[start as usize..(start + len) as usize].fill(done);
            // Not `write_all_at`, which would try again after EINTR.
            let bytes = content(start..start + len, &versions);
            let written = file.write_at(&bytes, at);
            assert_eq!(
                written.unwrap_or_else(|error| panic!("seed {seed}: write at {at}: {error}")),
                bytes.len()
            );
        } else {
            let mut bytes = vec![0xee; (len * BLOCK) as usize];
            let read = file.read_at(&mut bytes, at);
            assert_eq!(
                read.unwrap_or_else(|error| panic!("seed {seed}: read at {at}: {error}")),
                bytes.len()
            );
            let expected = content(start..start + len, &versions);
            assert!(
                bytes == expected,
                "seed {seed}: wrong bytes in a read of {len} blocks at {at}"
            );
        }
    }
    (done, versions)
}

/// Protects: clients with requests in flight at every moment notice nothing of servers that are
/// killed at any moment: no error, and no wrong byte. A kill that meets the kernel while it copies
/// a request into memory that is not resident gives EIO, so this test fails without resident
/// buffers, if not each time.
fn clients_under_load_do_not_notice_kills(over: Over) {
    clients_under_load_do_not_notice(over, |rig, number| match number {
        None if over == Over::Uring => {
            rig.make_resident();
            rig.kill();
        }
        Some(0) => rig.abort(),
        None | Some(_) => rig.kill(),
    });
}

/// Protects: the same for servers that leave, whatever memory is resident.
fn clients_under_load_do_not_notice_servers_that_leave(over: Over) {
    clients_under_load_do_not_notice(over, |rig, _| rig.leave());
}

/// Protects: a server that leaves does not wait for what its workers do. It answers none of these
/// requests, and the next one answers each of them once.
fn what_workers_have_stays_when_a_server_leaves(over: Over) {
    let Some(mut rig) = Rig::mount(over, Hold::Before, 1) else { return };
    let file = rig.open(OFlags::DIRECT);
    let writer = {
        let file = Arc::clone(&file);
        started(move || file.write_at(&[0x5a; BLOCK as usize], MARK))
    };
    rig.server().expect(&News::Held);
    write(&file, 0, &[1; BLOCK as usize]);
    rig.leave();
    assert!(writer.is_empty());
    rig.succeed(Hold::Nothing);
    assert_eq!(writer.recv_timeout(PATIENCE).unwrap().unwrap(), BLOCK as usize);
    assert_eq!(rig.noted(&format!("write {MARK}")), 1);
    assert_eq!(read(&file, 0, BLOCK as usize), [1; BLOCK as usize]);
}

/// Protects: over io_uring, requests of the usual sizes need no memory that other requests have
/// left. If a successor has memory for one page of each request only, most runs of this test fail.
#[test]
fn clients_of_usual_sizes_do_not_notice_kills() {
    clients_notice_nothing(Over::Uring, &[1, 4, 16], |rig, _| {
        rig.kill();
        rig.forget_payloads();
    });
}

fn clients_under_load_do_not_notice(over: Over, end: impl Fn(&mut Rig, Option<u64>)) {
    clients_notice_nothing(over, &[1, 4, 16, 256], end);
}

/// Runs clients while `end` ends server after server: before the load with `None`, and later with
/// a random number below 4. The numbers of blocks of a request are at most one of `blocks`.
fn clients_notice_nothing(over: Over, blocks: &'static [u64], end: impl Fn(&mut Rig, Option<u64>)) {
    let seed = std::hash::BuildHasher::hash_one(&std::hash::RandomState::new(), 0) | 1;
    println!("seed {seed}");
    let Some(mut rig) = Rig::mount(over, Hold::Nothing, KILLS + 1) else { return };
    end(&mut rig, None);
    rig.succeed(Hold::Nothing);
    let stop = Arc::new(AtomicBool::new(false));
    let clients: Vec<_> = (0..CLIENTS)
        .map(|number| {
            let (file, stop) = (rig.open(OFlags::DIRECT), Arc::clone(&stop));
            let seed = seed.wrapping_mul(2 * number + 3) | 1;
            started(move || client(&file, number, seed, blocks, &stop))
        })
        .collect();
    let mut numbers = Numbers(seed);
    for _ in 0..KILLS {
        // The moment of the kill is random; no result depends on this time.
        thread::sleep(Duration::from_micros(numbers.below(60_000)));
        end(&mut rig, Some(numbers.below(4)));
        rig.succeed(Hold::Nothing);
    }
    stop.store(true, Ordering::Relaxed);
    let image = File::open(rig.path("image")).unwrap();
    let mut total = 0;
    for (number, client) in (0..).zip(clients) {
        let (done, versions) = client.recv_timeout(PATIENCE).expect("a client without an error");
        println!("client {number}: {done} requests");
        total += done;
        for (block, version) in (number * REGION..).zip(versions) {
            let mut bytes = [0; BLOCK as usize];
            image.read_exact_at(&mut bytes, block * BLOCK).unwrap();
            assert!(bytes[..] == content(block, version), "seed {seed}: block {block}");
        }
    }
    assert!(total > KILLS, "the clients have made no more than {total} requests");
    assert_eq!(rig.noted("taken over"), KILLS as usize + 1);
}

// ---- without a mount

/// What the kernel of a test without a mount has agreed on.
fn agreed() -> Negotiated {
    let capabilities = fuser::InitFlags::FUSE_HAS_RESEND.bits();
    Negotiated { over_io_uring: false, minor: 40, max_write: 1 << 20, capabilities, rings: None }
}

fn plain_file(scratch: &tempfile::TempDir) -> Prepared {
    plain_file_over(scratch, Transport::Dev)
}

fn plain_file_over(scratch: &tempfile::TempDir, transport: Transport) -> Prepared {
    let (image, log) = (scratch.path().join("image"), scratch.path().join("log"));
    std::fs::write(&image, "content").unwrap();
    let order = Order { image, log, hold: Hold::Nothing, over: Over::Device, take_over: None };
    let (control, _) = packet::pair().unwrap();
    let file = Arc::new(PlainFile::open(&order, control));
    Prepared::other(file, transport).unwrap()
}

/// Protects: the kernel is asked once to send requests again, over the mounted descriptor, before
/// the first request is answered. A request that comes again has bit 63 of its number set, and is
/// answered with the same number over its own descriptor.
#[test]
fn requests_that_come_again_keep_their_numbers() {
    let scratch = tempfile::tempdir().unwrap();
    let ((kernel, device), (other_kernel, clone)) =
        (packet::pair().unwrap(), packet::pair().unwrap());
    let request = |unique: u64| {
        let len = (IN_HEADER + 16) as u32;
        // GETATTR.
        [&len.to_ne_bytes()[..], &3u32.to_ne_bytes(), &unique.to_ne_bytes(), &[0; 40]].concat()
    };
    let (first, second) = (1 << 63 | 8, 1 << 63 | 1 << 20);
    // Both requests wait before the session begins.
    rustix::io::write(&kernel, &request(first)).unwrap();
    rustix::io::write(&other_kernel, &request(second)).unwrap();
    let connected = plain_file(&scratch).take_over(vec![device, clone], None, &agreed()).unwrap();
    assert_eq!(connected.devices().len(), 2);
    assert_eq!(connected.negotiated(), &agreed());
    let mounted = connected.serve().unwrap();
    let message = |kernel: &OwnedFd| {
        set_socket_timeout(kernel, Timeout::Recv, Some(PATIENCE)).unwrap();
        let mut bytes = [0; 256];
        let len = rustix::io::read(kernel, &mut bytes).unwrap();
        let code = i32::from_ne_bytes(bytes[4..8].try_into().unwrap());
        (len, code, u64::from_ne_bytes(bytes[8..16].try_into().unwrap()))
    };
    assert_eq!(message(&kernel), (OUT_HEADER, 7, 0));
    assert_eq!(message(&kernel), (OUT_HEADER + 104, 0, first));
    assert_eq!(message(&other_kernel), (OUT_HEADER + 104, 0, second));
    drop(mounted);
}

/// Protects: with one descriptor, all threads share it.
#[test]
fn a_session_with_one_descriptor_can_be_taken_over() {
    let scratch = tempfile::tempdir().unwrap();
    let (kernel, device) = packet::pair().unwrap();
    let connected = plain_file(&scratch).take_over(vec![device], None, &agreed()).unwrap();
    assert_eq!(connected.devices().len(), 1);
    let _mounted = connected.serve().unwrap();
    let mut bytes = [0; 256];
    assert_eq!(rustix::io::read(&kernel, &mut bytes), Ok(OUT_HEADER));
}

/// Protects: a refused takeover has sent nothing to the kernel.
#[test]
fn a_refused_takeover_changes_nothing() {
    let scratch = tempfile::tempdir().unwrap();
    let error = plain_file(&scratch).take_over(vec![], None, &agreed()).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::InvalidArgument);
    for refused in [
        Negotiated { over_io_uring: true, ..agreed() },
        Negotiated { max_write: 131_072, ..agreed() },
        Negotiated { capabilities: 0, ..agreed() },
        Negotiated { capabilities: u64::MAX, ..agreed() },
    ] {
        let (kernel, device) = packet::pair().unwrap();
        let error = plain_file(&scratch).take_over(vec![device], None, &refused).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::UnsupportedFeature);
        assert!(!error.to_string().contains('\n'), "{error}");
        assert_eq!(rustix::io::read(&kernel, &mut [0; 64]), Ok(0), "{error}");
    }
}

/// Protects: a session over io_uring is refused without its memory, and without rings, and with
/// memory of another size.
#[test]
fn a_takeover_over_io_uring_needs_rings_and_their_memory() {
    let scratch = tempfile::tempdir().unwrap();
    let layout = RingLayout { address: 1 << 40, queues: 1, depth: 1 };
    let agreed = Negotiated { over_io_uring: true, rings: Some(layout), ..agreed() };
    let memory = || Some(OwnedFd::from(File::open("/dev/null").unwrap()));
    let refused = |transport: Transport, memory: Option<OwnedFd>, reason: &str| {
        let (kernel, device) = packet::pair().unwrap();
        let prepared = plain_file_over(&scratch, transport);
        let error = prepared.take_over(vec![device], memory, &agreed).unwrap_err().to_string();
        assert!(error.contains(reason) && !error.contains('\n'), "{error}");
        assert_eq!(rustix::io::read(&kernel, &mut [0; 64]), Ok(0), "{error}");
    };
    refused(Transport::Dev, memory(), "no ring was made");
    refused(Transport::Dev, None, "no memory was kept");
    if let Err(error) = Rings::wanted(Transport::UringAgain) {
        eprintln!("skipped: {error}");
        return;
    }
    refused(Transport::UringAgain, None, "no memory was kept");
    refused(Transport::UringAgain, memory(), "1 queues of 1 requests");
}

/// Protects: a kernel before Linux 6.9 is named in the error. An epoll descriptor answers each
/// write with EINVAL, as that kernel does.
#[test]
fn a_kernel_that_cannot_send_again_is_an_error() {
    let scratch = tempfile::tempdir().unwrap();
    let device = rustix::event::epoll::create(rustix::event::epoll::CreateFlags::CLOEXEC).unwrap();
    let connected = plain_file(&scratch).take_over(vec![device], None, &agreed()).unwrap();
    let error = connected.serve().unwrap_err().to_string();
    assert!(error.contains("Linux 6.9"), "{error}");
}
