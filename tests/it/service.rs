//! The messages to a service manager (sd_notify(3)), received on a socket of the test.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::{IoSliceMut, Read, Write};
use std::mem::MaybeUninit;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::fs::FileExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::channel;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use rustix::net::sockopt::set_socket_passcred;
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags};
use rustix::process::Pid;

use crate::hung_backing::Stopped;
use crate::support::mounts::{LoopMount, make_fs};
use crate::support::{
    CLUSTER, Daemon, MIB, Mount, Pattern, Scratch, assert_same, poll, qemu, read_at, run_ok,
    wait_until,
};

/// Interval of the watchdog; pings come at half of it.
const INTERVAL: Duration = Duration::from_secs(1);
/// After this time without a ping, the pings have stopped: it is longer than the accepted age of a
/// commit.
const SILENCE: Duration = Duration::from_secs(5);

/// A message: when it came, the process that has sent it, and its text.
type Message = (Instant, Pid, String);

/// A service manager that records all messages.
pub(crate) struct Manager {
    /// A path, or an abstract name with an @ in front.
    address: String,
    messages: Arc<Mutex<Vec<Message>>>,
}

impl Manager {
    pub(crate) fn new(scratch: &Scratch) -> Manager {
        let path = scratch.join("notify");
        Manager::listen(
            path.to_str().expect("UTF-8").to_owned(),
            UnixDatagram::bind(&path).expect("notify socket"),
        )
    }

    /// Listens on an abstract address.
    fn without_a_path() -> Manager {
        let name = format!("cordisk-test-{}", std::process::id());
        let address = SocketAddr::from_abstract_name(&name).expect("an address");
        Manager::listen(
            format!("@{name}"),
            UnixDatagram::bind_addr(&address).expect("notify socket"),
        )
    }

    fn listen(address: String, socket: UnixDatagram) -> Manager {
        let messages = Arc::new(Mutex::new(Vec::new()));
        let heard = Arc::clone(&messages);
        set_socket_passcred(&socket, true).expect("SO_PASSCRED");
        std::thread::spawn(move || {
            while let Some((sender, text)) = receive(&socket) {
                // This manager stores nothing; another test has one that does.
                if text.starts_with("FDSTORE") || text.starts_with("BARRIER") {
                    continue;
                }
                heard.lock().expect("messages").push((Instant::now(), sender, text));
            }
        });
        Manager { address, messages }
    }

    /// Starts the disk as a service of this manager.
    pub(crate) fn starts(&self, mount: Mount) -> Mount {
        mount
            .env("NOTIFY_SOCKET", &self.address)
            .env("WATCHDOG_USEC", &INTERVAL.as_micros().to_string())
    }

    /// Returns the lines that have arrived, oldest first.
    fn lines(&self) -> Vec<String> {
        self.messages
            .lock()
            .expect("messages")
            .iter()
            .flat_map(|(_, _, text)| text.lines().map(str::to_owned).collect::<Vec<_>>())
            .collect()
    }

    fn heard(&self, line: &str) -> bool {
        self.lines().iter().any(|heard| heard == line)
    }

    /// Returns the processes that have sent messages.
    fn senders(&self) -> BTreeSet<i32> {
        let messages = self.messages.lock().expect("messages");
        messages.iter().map(|(_, sender, _)| sender.as_raw_nonzero().get()).collect()
    }

    /// Returns the number of pings that have arrived.
    fn pings(&self) -> usize {
        self.lines().iter().filter(|line| *line == "WATCHDOG=1").count()
    }

    /// Whether the last ping is older than [`SILENCE`].
    pub(crate) fn is_silent(&self) -> bool {
        let messages = self.messages.lock().expect("messages");
        let last = messages.iter().rev().find(|(_, _, text)| text.contains("WATCHDOG=1"));
        last.is_some_and(|(at, ..)| at.elapsed() >= SILENCE)
    }

    pub(crate) fn wait_for_more_pings(&self, more: usize) {
        let before = self.pings();
        wait_until("pings of the watchdog", || self.pings() >= before + more);
    }
}

/// Receives a message with the id of the process that has sent it, as the kernel says.
fn receive(socket: &UnixDatagram) -> Option<(Pid, String)> {
    let mut buf = [0; 4096];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmCredentials(1))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let mut parts = [IoSliceMut::new(&mut buf)];
    let len =
        rustix::net::recvmsg(socket, &mut parts, &mut control, RecvFlags::empty()).ok()?.bytes;
    let sender = control.drain().find_map(|message| match message {
        RecvAncillaryMessage::ScmCredentials(sender) => Some(sender.pid),
        _ => None,
    });
    Some((sender.expect("credentials"), String::from_utf8_lossy(&buf[..len]).into_owned()))
}

/// Creates the overlay `DIR/overlay.qcow2` above a raw file with `content`.
fn overlay_in(dir: &Path, scratch: &Scratch, content: &[u8]) -> PathBuf {
    let base = scratch.write("base.raw", content);
    let overlay = dir.join("overlay.qcow2");
    qemu::create(&overlay, None, "", Some((base.to_str().expect("UTF-8"), "raw")));
    overlay
}

fn environment_of(process: &str) -> String {
    String::from_utf8_lossy(&fs::read(format!("/proc/{process}/environ")).expect("environ"))
        .into_owned()
}

/// Protects: READY=1 means that the disk can be read. The status line reports the stream, the
/// serving process does not know the manager's socket, and the end is announced. Every message
/// comes from the main process, because a manager accepts no others (`NotifyAccess=main`).
#[test]
fn a_manager_is_told_when_the_disk_is_there_and_what_it_does() {
    requires!("/dev/fuse", "qemu-img");
    let scratch = Scratch::new();
    let content = Pattern::new(62, 1).bytes(0, 8 * MIB);
    let overlay = overlay_in(scratch.path(), &scratch, &content);
    let manager = Manager::new(&scratch);
    let mut disk: Daemon =
        manager.starts(Mount::new(&scratch, &overlay).args(&["--stream", "--speed", "1M"])).spawn();
    let path = disk.path().to_owned();
    wait_until("READY=1", || manager.heard("READY=1"));
    // Reads a part only: reading everything would leave nothing to stream.
    assert_same(
        "the disk, at once",
        &read_at(&File::open(&path).expect("open"), 0, 4096),
        &content[..4096],
    );
    let serving = format!("STATUS=serving {} on {}", overlay.display(), path.display());
    assert!(manager.heard(&serving), "{:?}", manager.lines());
    let server = disk.server_pid().as_raw_nonzero().to_string();
    assert!(environment_of(&server).contains("PATH="), "this is how to look at it");
    assert!(
        !environment_of(&server).contains("NOTIFY_SOCKET")
            && !environment_of(&server).contains("WATCHDOG_USEC")
    );
    wait_until("progress", || {
        manager.lines().iter().any(|line| {
            line.starts_with(&format!("{serving}; streaming: ")) && line.ends_with("iB/s")
        })
    });
    manager.wait_for_more_pings(3);
    wait_until("the end of the stream", || manager.heard(&format!("{serving}; stream completed")));
    assert!(!manager.heard("STOPPING=1"));
    crate::support::mounts::umount(&path);
    disk.assert_clean_end();
    wait_until("the end", || manager.heard("STOPPING=1"));
    let ready: Vec<usize> = manager
        .lines()
        .iter()
        .enumerate()
        .filter(|(_, line)| *line == "READY=1")
        .map(|(at, _)| at)
        .collect();
    assert_eq!(ready, [0], "once, and before anything else");
    assert_eq!(manager.senders(), BTreeSet::from([disk.pid().as_raw_nonzero().get()]));
}

/// Protects: the sandbox allows no new connection to an abstract socket, but keeps the one that was
/// made before.
#[test]
fn a_manager_with_an_abstract_socket_is_told() {
    requires!("/dev/fuse", "qemu-img");
    let scratch = Scratch::new();
    let content = Pattern::new(67, 1).bytes(0, MIB);
    let overlay = overlay_in(scratch.path(), &scratch, &content);
    let manager = Manager::without_a_path();
    let disk = manager.starts(Mount::new(&scratch, &overlay)).start();
    assert!(disk.log().contains("sandbox: "), "{}", disk.log());
    wait_until("READY=1", || manager.heard("READY=1"));
    manager.wait_for_more_pings(2);
    disk.umount();
    wait_until("the end", || manager.heard("STOPPING=1"));
}

/// Protects: a daemon in the background sends no messages: the manager knows another process, which
/// has ended.
#[test]
fn a_daemon_in_the_background_tells_nobody() {
    requires!("/dev/fuse", "qemu-img");
    let scratch = Scratch::new();
    let content = Pattern::new(63, 1).bytes(0, MIB);
    let overlay = overlay_in(scratch.path(), &scratch, &content);
    let manager = Manager::new(&scratch);
    let disk = scratch.write("disk", b"");
    let mut command = Command::new(crate::support::CORDISK);
    command
        .arg("mount")
        .arg(&overlay)
        .arg(&disk)
        .env("NOTIFY_SOCKET", &manager.address)
        .env("WATCHDOG_USEC", "200000");
    run_ok(&mut command);
    assert_same("the disk", &fs::read(&disk).expect("read"), &content);
    crate::support::mounts::umount(&disk);
    wait_until("the image is free", || {
        crate::support::run_within(
            Command::new("qemu-img").arg("check").arg(&overlay),
            INTERVAL * 30,
        )
        .status
        .success()
    });
    assert_eq!(manager.lines(), [""; 0]);
}

/// A shell that freezes a file system on request, and thaws it when this is dropped. It is started
/// before the disk is opened: a process that starts later would inherit the test's files and close
/// them, and each close of the disk is a flush, which commits or waits for the thaw.
struct Freezer(Child);

impl Freezer {
    fn prepare(dir: &Path) -> Freezer {
        let script = "read go && fsfreeze -f \"$1\" && echo frozen; read go; fsfreeze -u \"$1\"";
        let mut command = Command::new("sh");
        command.args(["-c", script, "sh"]).arg(dir).stdin(Stdio::piped()).stdout(Stdio::piped());
        Freezer(command.spawn().expect("sh"))
    }

    fn freeze(&mut self) {
        let (go, done) =
            (self.0.stdin.as_mut().expect("stdin"), self.0.stdout.as_mut().expect("stdout"));
        go.write_all(b"go\n").expect("tell the shell");
        let mut said = [0; 7];
        done.read_exact(&mut said).expect("fsfreeze");
        assert_eq!(&said, b"frozen\n");
    }
}

impl Drop for Freezer {
    fn drop(&mut self) {
        drop(self.0.stdin.take());
        let _ = self.0.wait();
    }
}

/// Protects: if the host's file system blocks a commit, the pings stop, although reads are
/// answered; they resume when the commit completes.
#[test]
fn a_commit_that_hangs_ends_the_pings() {
    requires!("/dev/fuse", "qemu-img", "root", "losetup", "mkfs.ext4", "fsfreeze");
    let scratch = Scratch::new();
    let content = Pattern::new(64, 1).bytes(0, 4 * MIB);
    let host = scratch.join("host.ext4");
    make_fs(&host, "ext4", 64 * MIB);
    let host = LoopMount::new(&host, "ext4", &scratch.dir("host"));
    let overlay = overlay_in(host.dir(), &scratch, &content);
    let manager = Manager::new(&scratch);
    let disk = manager.starts(Mount::new(&scratch, &overlay)).start();
    let file = disk.open();
    assert_same("what becomes local", &read_at(&file, 0, 4096), &content[..4096]);
    manager.wait_for_more_pings(3);

    // The commit timer may run before fsfreeze(8), and then has nothing left to write.
    let mut frozen = None;
    for round in 0..10 {
        let mut freezer = Freezer::prepare(host.dir());
        file.write_all_at(&[7; 4096], MIB + round * CLUSTER).expect("a write that allocates");
        freezer.freeze();
        if poll(SILENCE * 2, || manager.is_silent().then_some(())).is_some() {
            frozen = Some(freezer);
            break;
        }
        eprintln!("round {round}: all was committed already");
    }
    assert!(frozen.is_some(), "a pass that hangs has to end the pings");
    assert_same("what is local", &read_at(&file, 0, 4096), &content[..4096]);
    assert!(manager.is_silent());

    drop(frozen);
    manager.wait_for_more_pings(3);
    file.sync_all().expect("fsync");
    assert_same("what was written", &read_at(&file, MIB, 4096), &[7; 4096]);
    drop(file);
    disk.umount();
    host.umount().detach();
}

/// Protects: a base that hangs does not stop the pings of a disk that serves its local data, even
/// while reads wait for the base.
#[test]
fn a_hung_base_does_not_end_the_pings() {
    requires!("/dev/fuse", "qemu-img");
    let scratch = Scratch::new();
    let content = Pattern::new(65, 1).bytes(0, 4 * MIB);
    let served = scratch.join("served.qcow2");
    qemu::create_full(&served, 4 * MIB, "", Pattern::new(65, 1));
    let lower = Mount::named(&scratch, &served, "lower").start();
    let overlay = scratch.join("overlay.qcow2");
    qemu::create(&overlay, None, "", Some((lower.path().to_str().expect("UTF-8"), "raw")));
    let manager = Manager::new(&scratch);
    let upper = manager.starts(Mount::named(&scratch, &overlay, "upper")).start();
    let stopped = Stopped::stop(lower.server_pid());
    let (sender, hung) = channel();
    // The first sector is among them, because the watchdog reads it.
    for offset in [0, CLUSTER * 8, CLUSTER * 16] {
        let (sender, path) = (sender.clone(), upper.path().to_owned());
        std::thread::spawn(move || {
            let mut buf = vec![0; 512];
            let result = File::open(path).and_then(|file| file.read_exact_at(&mut buf, offset));
            let _ = sender.send((offset, result, buf));
        });
    }
    // Long enough for the pings to stop, if they did.
    let begin = Instant::now();
    while begin.elapsed() < SILENCE * 2 {
        manager.wait_for_more_pings(1);
    }
    assert!(
        !manager.is_silent() && hung.try_recv().is_err(),
        "the base hangs, and the pings do not"
    );
    drop(stopped);
    for _ in 0..3 {
        let (offset, result, buf) =
            hung.recv_timeout(Duration::from_secs(30)).expect("the hung reads complete");
        result.expect("after the base came back");
        let at = usize::try_from(offset).expect("small");
        assert_same("hung read", &buf, &content[at..at + 512]);
    }
    upper.umount();
    lower.umount();
}
