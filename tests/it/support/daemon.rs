//! `cordisk mount` as a child of the test: the test starts it, waits for it, and always ends it.

use std::fs::{self, File, OpenOptions};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex, OnceLock};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::process::{Pid, PidfdFlags, Signal, kill_process, pidfd_open};

use super::{CORDISK, QmpClient, RUNTIME_DIR, Scratch, mounts, poll, wait_until};

/// How long a disk may run in a test. Then it is killed, so that hanging requests and the test fail
/// instead of blocking the suite.
const LIFETIME: Duration = Duration::from_secs(240);
const START: Duration = Duration::from_secs(30);
const STOP: Duration = Duration::from_secs(60);

/// The options of a mount.
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
    /// Mounts `image` at `SCRATCH/drive0.disk`, without a socket.
    pub fn new(scratch: &Scratch, image: &Path) -> Mount {
        Mount::named(scratch, image, "drive0")
    }

    /// Mounts `image` at `SCRATCH/NAME.disk`; the device keeps its default name.
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

    /// Sets an environment variable.
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

    /// Adds `--qmp SCRATCH/NAME.sock`.
    #[must_use]
    pub fn qmp(mut self) -> Mount {
        let socket = self.socket.to_str().expect("UTF-8 path").to_owned();
        self.has_socket = true;
        self.args(&["--qmp", &socket])
    }

    /// Starts the program with umask 000.
    #[must_use]
    pub fn open_umask(mut self) -> Mount {
        self.open_umask = true;
        self
    }

    /// Mounts in the foreground (`-f`) and returns when the disk is mounted and the socket accepts.
    pub fn start(self) -> Daemon {
        let mut daemon = self.spawn();
        let ready = poll(START, || {
            let exited = daemon.try_wait();
            assert!(
                exited.is_none(),
                "the daemon ended before it had mounted: {exited:?}\n{}",
                daemon.log()
            );
            let connects = |path: &PathBuf| std::os::unix::net::UnixStream::connect(path).is_ok();
            // A mount without a process is that of an earlier daemon. The order matters: once the
            // dead mount is gone, a mount is the new one.
            (!mounts::is_dead(&daemon.mountpoint)
                && daemon.is_mounted()
                && daemon.socket.as_ref().is_none_or(connects))
            .then_some(())
        });
        assert!(ready.is_some(), "the daemon did not mount within {START:?}\n{}", daemon.log());
        // Known from now on, also when the main process is dead.
        daemon.server_pid();
        daemon
    }

    /// Like [`Mount::start`], but returns when the stream of the command line, or a resumed one,
    /// has started: the socket accepts a moment earlier.
    pub fn start_settled(self) -> Daemon {
        let disk = self.start();
        wait_until("it is decided what becomes of the stream", || disk.log().contains("mounted "));
        disk
    }

    /// Starts the process without waiting for the disk.
    pub fn spawn(self) -> Daemon {
        let log = OpenOptions::new().create(true).append(true).open(&self.log).expect("log file");
        let mut command = Command::new(if self.open_umask { "sh" } else { CORDISK });
        if self.open_umask {
            command.args(["-c", "umask 000 && exec \"$0\" \"$@\"", CORDISK]);
        }
        command.env(RUNTIME_DIR, &self.runtime_dir);
        command.args(["mount", "-f"]).args(&self.args).arg(&self.image).arg(&self.mountpoint);
        // All tests use the same transport, whatever this kernel offers; the environment can choose
        // another one.
        if !self.args.iter().any(|argument| argument == "--transport") {
            command
                .arg("--transport")
                .arg(std::env::var("CORDISK_TEST_TRANSPORT").unwrap_or("dev".into()));
        }
        command.stdin(Stdio::null()).stdout(log.try_clone().expect("log")).stderr(log);
        if std::env::var_os("RUST_LOG").is_none() {
            command.env("RUST_LOG", "info");
        }
        command.envs(self.environment);
        let child =
            command.spawn().unwrap_or_else(|error| panic!("cannot start {command:?}: {error}"));
        let pid = i32::try_from(child.id()).ok().and_then(Pid::from_raw).expect("a pid");
        let child = Arc::new(Mutex::new(child));
        Daemon {
            watchdog: watch(Arc::clone(&child), format!("{command:?}")),
            child,
            pid,
            server: OnceLock::new(),
            image: self.image,
            mountpoint: self.mountpoint,
            socket: self.has_socket.then_some(self.socket),
            log: self.log,
            ended: None,
            abandoned: false,
        }
    }
}

/// The hidden option by which the serving process is known.
const SERVING_OPTION: &str = "--serving-process";

/// Returns the children of `parent` that `is_it` accepts by their arguments.
fn children(parent: Pid, is_it: impl Fn(&[String]) -> bool) -> Vec<Pid> {
    let pid = parent.as_raw_nonzero();
    let listed = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap_or_default();
    let arguments = |child: &i32| -> Vec<String> {
        let bytes = fs::read(format!("/proc/{child}/cmdline")).unwrap_or_default();
        bytes.split(|&byte| byte == 0).map(|word| String::from_utf8_lossy(word).into()).collect()
    };
    listed
        .split_whitespace()
        .filter_map(|child| child.parse().ok())
        .filter(|child| is_it(&arguments(child)))
        .filter_map(Pid::from_raw)
        .collect()
}

/// Returns the serving process of the disk whose main process is `main`.
pub fn server_of(main: Pid) -> Pid {
    let is_it = |words: &[String]| words.iter().any(|word| word == SERVING_OPTION);
    let found = poll(START, || children(main, is_it).first().copied());
    found.unwrap_or_else(|| panic!("process {main:?} has no serving process"))
}

/// Waits until a process has ended with its last thread, and so has released all that it had open.
/// Its main thread alone may be a zombie long before.
///
/// # Panics
/// It does not end in time.
pub fn wait_for_death(process: Pid) {
    let Ok(pidfd) = pidfd_open(process, PidfdFlags::empty()) else { return };
    let mut polled = [PollFd::new(&pidfd, PollFlags::IN)];
    let limit = Timespec { tv_sec: 30, tv_nsec: 0 };
    let ended = rustix::event::poll(&mut polled, Some(&limit)).expect("poll");
    assert!(ended > 0, "process {process:?} does not end");
}

/// Kills the processes of a disk as a loss of power does: neither learns of the death of the other.
/// Waits until the serving process has ended and its files are closed; the caller waits for `main`.
pub fn kill_all(main: Pid) {
    // The main process stands still, so it starts no process meanwhile. A process that it has just
    // started may not have its own arguments yet.
    let _ = kill_process(main, Signal::STOP);
    let servers: Vec<_> = children(main, |words| words.get(1).is_some_and(|word| word == "mount"))
        .into_iter()
        .filter_map(|server| Some((server, pidfd_open(server, PidfdFlags::empty()).ok()?)))
        .collect();
    for (server, _) in &servers {
        let _ = kill_process(*server, Signal::KILL);
    }
    let _ = kill_process(main, Signal::KILL);
    for (server, end) in servers {
        let mut polled = [PollFd::new(&end, PollFlags::IN)];
        // A process in an uninterruptible wait does not die at once; the test must continue.
        let limit = Timespec { tv_sec: 10, tv_nsec: 0 };
        if !matches!(rustix::event::poll(&mut polled, Some(&limit)), Ok(1)) {
            eprintln!("process {server:?} does not die");
        }
    }
}

/// Kills the processes of the disk if the test takes too long. Dropping the sender ends the
/// watchdog.
fn watch(child: Arc<Mutex<Child>>, what: String) -> Sender<()> {
    let (sender, receiver) = channel::<()>();
    std::thread::spawn(move || {
        if receiver.recv_timeout(LIFETIME) == Err(RecvTimeoutError::Timeout) {
            eprintln!("watchdog: {what} is killed after {LIFETIME:?}");
            let child = child.lock().expect("child");
            kill_all(Pid::from_child(&child));
        }
    });
    sender
}

/// A mounted disk. Dropping it kills the process and detaches the mount; [`Daemon::umount`] is the
/// clean end that tests assert.
#[derive(Debug)]
pub struct Daemon {
    watchdog: Sender<()>,
    child: Arc<Mutex<Child>>,
    pid: Pid,
    server: OnceLock<Pid>,
    image: PathBuf,
    mountpoint: PathBuf,
    socket: Option<PathBuf>,
    log: PathBuf,
    ended: Option<ExitStatus>,
    /// Whether the dead mount stays when this is dropped.
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

    /// The main process, which the test has started: signals go to it, and its id is in the
    /// pidfile. It is the mount keeper.
    pub fn pid(&self) -> Pid {
        self.pid
    }

    /// The process that serves the disk, which has the image open.
    pub fn server_pid(&self) -> Pid {
        *self.server.get_or_init(|| server_of(self.pid))
    }

    /// Opens the disk for reading and writing.
    pub fn open(&self) -> File {
        OpenOptions::new()
            .read(true)
            .write(true)
            .open(&self.mountpoint)
            .unwrap_or_else(|error| panic!("open the disk: {error}\n{}", self.log()))
    }

    /// Reads all bytes through the mount.
    pub fn read_all(&self) -> Vec<u8> {
        let file = File::open(&self.mountpoint)
            .unwrap_or_else(|error| panic!("open the disk: {error}\n{}", self.log()));
        let size =
            usize::try_from(file.metadata().expect("stat of the disk").len()).expect("fits memory");
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

    /// Sends a signal to the serving process alone.
    pub fn signal_server(&self, signal: Signal) {
        kill_process(self.server_pid(), signal).expect("signal");
    }

    /// Stops the serving process, and waits until each of its threads has stopped: one that runs
    /// when the signal is sent may answer another request.
    pub fn stop_server(&self) {
        self.signal_server(Signal::STOP);
        let tasks = format!("/proc/{}/task", self.server_pid().as_raw_nonzero());
        let has_stopped = |task: fs::DirEntry| {
            let stat = fs::read_to_string(task.path().join("stat")).unwrap_or_default();
            stat.rsplit(") ").next().is_some_and(|rest| rest.starts_with('T'))
        };
        wait_until("every thread has stopped", || {
            fs::read_dir(&tasks).expect("threads").flatten().all(has_stopped)
        });
    }

    /// Returns what the processes wrote to stdout and stderr.
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

    /// Unmounts with umount(8) and asserts that the process ends: status 0, no longer mounted.
    pub fn umount(mut self) {
        mounts::umount(&self.mountpoint);
        self.assert_clean_end();
    }

    /// Asserts that a process that was told to end does so: status 0, no longer mounted, the socket
    /// removed.
    pub fn assert_clean_end(&mut self) {
        let status = self.ended_within(STOP);
        let log = self.log();
        let holders = if status.is_none() { mounts::holders(&self.mountpoint) } else { Vec::new() };
        assert!(
            status.is_some_and(|status| status.success()),
            "the daemon had to end with status 0 within {STOP:?}: {status:?}; still mounted in the mount namespaces of {holders:?}\n{log}"
        );
        assert!(
            mounts::at(&self.mountpoint).is_none(),
            "still mounted after the daemon has ended\n{log}"
        );
        if let Some(socket) = &self.socket {
            assert!(
                !socket.exists(),
                "the socket is still there after the daemon has ended\n{log}"
            );
        }
    }

    /// Kills both processes; then detaches the dead mount.
    pub fn kill9(mut self) {
        self.kill_and_wait();
        mounts::detach(&self.mountpoint);
    }

    /// Kills both processes and leaves the dead mount. The scratch directory detaches it at the
    /// end.
    pub fn die(mut self) {
        self.kill_and_wait();
        self.abandoned = true;
    }

    /// Kills both processes, like a loss of power, and leaves the dead mount.
    pub fn kill_all(&mut self) {
        if self.ended.is_none() {
            kill_all(self.pid);
        }
    }

    fn kill_and_wait(&mut self) {
        self.kill_all();
        // A process in an uninterruptible wait does not die at once; the test must continue.
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
