//! `cordisk mount` as a child of the test: started, waited for, and always taken down.

use std::fs::{self, File, OpenOptions};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};

use super::{CORDISK, QmpClient, RUNTIME_DIR, Scratch, mounts, poll, wait_until};

/// How long a disk may live in a test. Then it is killed: requests that hang fail, and so does the test, instead of blocking the suite.
const LIFETIME: Duration = Duration::from_secs(240);
const START: Duration = Duration::from_secs(30);
const STOP: Duration = Duration::from_secs(60);

/// What is to be mounted, and how.
#[derive(Debug)]
pub struct Mount {
    image: PathBuf,
    mountpoint: PathBuf,
    socket: PathBuf,
    log: PathBuf,
    runtime_dir: PathBuf,
    args: Vec<String>,
    has_socket: bool,
    open_umask: bool,
    environment: Vec<(String, String)>,
}

impl Mount {
    /// The image as `SCRATCH/drive0.disk`, without a socket.
    pub fn new(scratch: &Scratch, image: &Path) -> Mount {
        Mount::named(scratch, image, "drive0")
    }

    /// The image as `SCRATCH/NAME.disk`; the device keeps its default name.
    pub fn named(scratch: &Scratch, image: &Path, name: &str) -> Mount {
        let file = |suffix: &str| scratch.join(format!("{name}.{suffix}"));
        Mount {
            image: image.to_owned(),
            mountpoint: file("disk"),
            socket: file("sock"),
            log: file("log"),
            runtime_dir: scratch.runtime_dir(),
            args: Vec::new(),
            has_socket: false,
            open_umask: false,
            environment: Vec::new(),
        }
    }

    /// With this in its environment.
    #[must_use]
    pub fn env(mut self, name: &str, value: &str) -> Mount {
        self.environment.push((name.to_owned(), value.to_owned()));
        self
    }

    #[must_use]
    pub fn args(mut self, args: &[&str]) -> Mount {
        self.args.extend(args.iter().map(|arg| (*arg).to_owned()));
        self
    }

    /// With `--qmp SCRATCH/NAME.sock`.
    #[must_use]
    pub fn qmp(mut self) -> Mount {
        let socket = self.socket.to_str().expect("UTF-8 path").to_owned();
        self.has_socket = true;
        self.args(&["--qmp", &socket])
    }

    /// With a umask that takes nothing away.
    #[must_use]
    pub fn open_umask(mut self) -> Mount {
        self.open_umask = true;
        self
    }

    /// Mounts in the foreground (`-f`) and returns when the disk is there and the socket accepts.
    pub fn start(self) -> Daemon {
        let mut daemon = self.spawn();
        let ready = poll(START, || {
            let exited = daemon.try_wait();
            assert!(exited.is_none(), "the daemon ended before it had mounted: {exited:?}\n{}", daemon.log());
            let connects = |path: &PathBuf| std::os::unix::net::UnixStream::connect(path).is_ok();
            // A mount that nobody serves is what an earlier daemon has left there. In this order: once that is gone, a mount is the new one.
            (!mounts::is_dead(&daemon.mountpoint) && daemon.is_mounted() && daemon.socket.as_ref().is_none_or(connects)).then_some(())
        });
        assert!(ready.is_some(), "the daemon did not mount within {START:?}\n{}", daemon.log());
        daemon
    }

    /// As [`Mount::start`], and returns when the stream of the command line, or one that is resumed, has been started: the socket accepts a moment
    /// earlier.
    pub fn start_settled(self) -> Daemon {
        let disk = self.start();
        wait_until("it is decided what becomes of the stream", || disk.log().contains("mounted "));
        disk
    }

    /// Starts the process and does not wait for the disk.
    pub fn spawn(self) -> Daemon {
        let log = OpenOptions::new().create(true).append(true).open(&self.log).expect("log file");
        let mut command = Command::new(if self.open_umask { "sh" } else { CORDISK });
        if self.open_umask {
            command.args(["-c", "umask 000 && exec \"$0\" \"$@\"", CORDISK]);
        }
        command.env(RUNTIME_DIR, &self.runtime_dir);
        command.args(["mount", "-f"]).args(&self.args).arg(&self.image).arg(&self.mountpoint);
        // One and the same for all tests, whatever this kernel offers; another one is asked for from outside.
        if !self.args.iter().any(|argument| argument == "--transport") {
            command.arg("--transport").arg(std::env::var("CORDISK_TEST_TRANSPORT").unwrap_or("dev".into()));
        }
        command.stdin(Stdio::null()).stdout(log.try_clone().expect("log")).stderr(log);
        if std::env::var_os("RUST_LOG").is_none() {
            command.env("RUST_LOG", "info");
        }
        command.envs(self.environment);
        let child = command.spawn().unwrap_or_else(|error| panic!("cannot start {command:?}: {error}"));
        let pid = i32::try_from(child.id()).ok().and_then(Pid::from_raw).expect("a pid");
        let child = Arc::new(Mutex::new(child));
        Daemon {
            watchdog: watch(Arc::clone(&child), format!("{command:?}")),
            child,
            pid,
            image: self.image,
            mountpoint: self.mountpoint,
            socket: self.has_socket.then_some(self.socket),
            log: self.log,
            ended: None,
            abandoned: false,
        }
    }
}

/// Kills the child when the test takes too long. Ends when the sender is dropped.
fn watch(child: Arc<Mutex<Child>>, what: String) -> Sender<()> {
    let (sender, receiver) = channel::<()>();
    std::thread::spawn(move || {
        if receiver.recv_timeout(LIFETIME) == Err(RecvTimeoutError::Timeout) {
            eprintln!("watchdog: {what} is killed after {LIFETIME:?}");
            let _ = child.lock().expect("child").kill();
        }
    });
    sender
}

/// A mounted disk. Dropping it kills the process and detaches the mount; [`Daemon::umount`] is the clean end that tests assert on.
#[derive(Debug)]
pub struct Daemon {
    watchdog: Sender<()>,
    child: Arc<Mutex<Child>>,
    pid: Pid,
    image: PathBuf,
    mountpoint: PathBuf,
    socket: Option<PathBuf>,
    log: PathBuf,
    ended: Option<ExitStatus>,
    /// The dead mount is to stay.
    abandoned: bool,
}

impl Daemon {
    /// The disk: the file at the mountpoint.
    pub fn path(&self) -> &Path {
        &self.mountpoint
    }

    pub fn image(&self) -> &Path {
        &self.image
    }

    pub fn socket(&self) -> &Path {
        self.socket.as_ref().expect("this disk was mounted with a socket")
    }

    pub fn pid(&self) -> Pid {
        self.pid
    }

    /// Opens the disk for reading and writing.
    pub fn open(&self) -> File {
        OpenOptions::new()
            .read(true)
            .write(true)
            .open(&self.mountpoint)
            .unwrap_or_else(|error| panic!("open the disk: {error}\n{}", self.log()))
    }

    /// All bytes, read through the mount.
    pub fn read_all(&self) -> Vec<u8> {
        let file = File::open(&self.mountpoint).unwrap_or_else(|error| panic!("open the disk: {error}\n{}", self.log()));
        let size = usize::try_from(file.metadata().expect("stat of the disk").len()).expect("fits memory");
        super::read_at(&file, 0, size)
    }

    pub fn client(&self) -> QmpClient {
        QmpClient::connect(self.socket())
    }

    pub fn is_mounted(&self) -> bool {
        mounts::at(&self.mountpoint).is_some_and(|entry| entry.fstype == "fuse.cordisk")
    }

    pub fn signal(&self, signal: Signal) {
        kill_process(self.pid, signal).expect("signal");
    }

    /// What it wrote to stdout and stderr.
    pub fn log(&self) -> String {
        let text = fs::read_to_string(&self.log).unwrap_or_default();
        let start = text.len().saturating_sub(6000);
        let start = (start..text.len()).find(|at| text.is_char_boundary(*at)).unwrap_or(0);
        format!("--- log of {} ---\n{}", self.mountpoint.display(), &text[start..])
    }

    fn try_wait(&mut self) -> Option<ExitStatus> {
        if self.ended.is_none() {
            self.ended = self.child.lock().expect("child").try_wait().expect("wait");
        }
        self.ended
    }

    /// Waits for the process to end by itself.
    pub fn ended_within(&mut self, limit: Duration) -> Option<ExitStatus> {
        poll(limit, || self.try_wait())
    }

    /// umount(8), then the process ends by itself: status 0, nothing mounted any more.
    pub fn umount(mut self) {
        mounts::umount(&self.mountpoint);
        self.assert_clean_end();
    }

    /// The process ends (it was told to): status 0, nothing mounted any more, the socket gone.
    pub fn assert_clean_end(&mut self) {
        let status = self.ended_within(STOP);
        let log = self.log();
        let holders = if status.is_none() { mounts::holders(&self.mountpoint) } else { Vec::new() };
        assert!(
            status.is_some_and(|status| status.success()),
            "the daemon had to end with status 0 within {STOP:?}: {status:?}; still mounted in the mount namespaces of {holders:?}\n{log}"
        );
        assert!(mounts::at(&self.mountpoint).is_none(), "still mounted after the daemon has ended\n{log}");
        if let Some(socket) = &self.socket {
            assert!(!socket.exists(), "the socket is still there after the daemon has ended\n{log}");
        }
    }

    /// SIGKILL, as the out-of-memory killer would; then the dead mount is detached.
    pub fn kill9(mut self) {
        self.kill_and_wait();
        mounts::detach(&self.mountpoint);
    }

    /// SIGKILL, and the dead mount stays where it is. The scratch directory detaches it at the end.
    pub fn die(mut self) {
        self.kill_and_wait();
        self.abandoned = true;
    }

    fn kill_and_wait(&mut self) {
        let _ = self.child.lock().expect("child").kill();
        // A process inside an uninterruptible wait does not die at once; the test must go on.
        let gone = self.ended_within(Duration::from_secs(10));
        if gone.is_none() {
            eprintln!("process {:?} does not die", self.pid);
        }
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("{}", self.log());
        }
        if self.ended.is_none() {
            self.kill_and_wait();
        }
        if !self.abandoned && mounts::at(&self.mountpoint).is_some() {
            mounts::detach(&self.mountpoint);
        }
    }
}
