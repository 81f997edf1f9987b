//! A pseudo-terminal for the tests: they can read the screen, press keys and change the size.

use std::ffi::OsStr;
use std::fs::OpenOptions;
use std::num::NonZeroU16;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::process::ExitStatusExt;
use std::process::{Child, Command, ExitStatus};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use rustix::fs::OFlags;
use rustix::process::{Pid, Signal, kill_process};
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use rustix::termios::{Winsize, tcsetwinsize};

use super::{CORDISK, RUNTIME_DIR, Scratch};

/// How long an output may take to appear.
const PATIENCE: Duration = Duration::from_secs(30);

/// A program on its own terminal. Dropping it kills the program.
#[derive(Debug)]
pub struct Terminal {
    child: Child,
    master: Arc<OwnedFd>,
    shown: Arc<(Mutex<Shown>, Condvar)>,
    ended: Option<ExitStatus>,
}

struct Shown {
    parser: vt100::Parser,
    /// All bytes that were ever written to the terminal.
    raw: Vec<u8>,
    /// Whether no process has the other end open any more.
    closed: bool,
}

impl std::fmt::Debug for Shown {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}", picture(self.parser.screen()))
    }
}

/// Returns why there are no pseudo-terminals here, as in a chroot without /dev/pts; `None` if there
/// are.
pub fn missing() -> Option<String> {
    let other_end = || {
        let master = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC)?;
        grantpt(&master).and_then(|()| unlockpt(&master))?;
        let name = ptsname(&master, Vec::new())?;
        OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags_noctty()
            .open(OsStr::from_bytes(name.as_bytes()))
    };
    other_end()
        .err()
        .map(|error| format!("no pseudo-terminals ({error}): mount -t devpts devpts /dev/pts"))
}

impl Terminal {
    /// Starts the program under test on a terminal with UTF-8 and with the registry of this test's
    /// disks. `env` overrides these variables.
    pub fn cordisk<A: AsRef<OsStr>>(
        scratch: &Scratch,
        args: &[A],
        env: &[(&str, &OsStr)],
        rows: u16,
        cols: u16,
    ) -> Terminal {
        let directory = scratch.runtime_dir();
        let env = [&[(RUNTIME_DIR, directory.as_os_str()), ("LC_ALL", OsStr::new("C.UTF-8"))], env]
            .concat();
        Terminal::spawn(CORDISK, args, &env, rows, cols)
    }

    /// Starts a program on a new terminal of this size. It is the controlling terminal of the
    /// program: Ctrl-C (`send(b"\x03")`) sends it SIGINT.
    pub fn spawn<A: AsRef<OsStr>>(
        program: impl AsRef<OsStr>,
        args: &[A],
        env: &[(&str, &OsStr)],
        rows: u16,
        cols: u16,
    ) -> Terminal {
        let (child, master) = on_a_terminal(program.as_ref(), args, env, rows, cols);
        let parser = vt100::Parser::new(nonzero(rows), nonzero(cols), 1000);
        let shown = Arc::new((
            Mutex::new(Shown { parser, raw: Vec::new(), closed: false }),
            Condvar::new(),
        ));
        let master = Arc::new(master);
        let (reader, screen) = (Arc::clone(&master), Arc::clone(&shown));
        std::thread::spawn(move || {
            let mut buf = [0; 16 << 10];
            loop {
                // EIO: no process has the other end open any more.
                let len = match rustix::io::read(&reader, &mut buf) {
                    Err(rustix::io::Errno::INTR) => continue,
                    result => result.unwrap_or(0),
                };
                let mut shown = screen.0.lock().unwrap_or_else(PoisonError::into_inner);
                shown.parser.process(&buf[..len]);
                shown.raw.extend_from_slice(&buf[..len]);
                shown.closed = len == 0;
                screen.1.notify_all();
                if len == 0 {
                    return;
                }
            }
        });
        Terminal { child, master, shown, ended: None }
    }

    fn lock(&self) -> MutexGuard<'_, Shown> {
        self.shown.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until the screen satisfies `condition`, and returns its text; panics with the screen
    /// if that takes too long.
    pub fn wait_for(
        &self,
        what: &str,
        mut condition: impl FnMut(&vt100::Screen) -> bool,
    ) -> String {
        let deadline = Instant::now() + PATIENCE;
        let mut shown = self.lock();
        loop {
            if condition(shown.parser.screen()) {
                return shown.parser.screen().contents();
            }
            let left = deadline.saturating_duration_since(Instant::now());
            assert!(!left.is_zero(), "waited {PATIENCE:?} in vain: {what}\n{shown:?}");
            assert!(!shown.closed, "the program has left the terminal: {what}\n{shown:?}");
            shown = self.shown.1.wait_timeout(shown, left).expect("screen").0;
        }
    }

    /// Waits until the text is on the screen; returns the text of the whole screen.
    pub fn wait_for_text(&self, text: &str) -> String {
        self.wait_for(&format!("{text:?} on the screen"), |screen| screen.contents().contains(text))
    }

    /// Returns the text on the screen now.
    pub fn contents(&self) -> String {
        self.lock().parser.screen().contents()
    }

    /// Inspects the screen as it is now: colours, modes, the cursor.
    pub fn look<T>(&self, at: impl FnOnce(&vt100::Screen) -> T) -> T {
        at(self.lock().parser.screen())
    }

    /// Returns every byte that was written to the terminal, including escape sequences.
    pub fn raw(&self) -> Vec<u8> {
        self.lock().raw.clone()
    }

    /// Presses keys.
    pub fn send(&self, keys: &[u8]) {
        let mut left = keys;
        while !left.is_empty() {
            let len = rustix::io::retry_on_intr(|| rustix::io::write(&self.master, left))
                .expect("typing");
            left = &left[len..];
        }
    }

    /// Changes the size; the program gets a SIGWINCH.
    pub fn resize(&self, rows: u16, cols: u16) {
        let mut shown = self.lock();
        shown.parser.set_size(nonzero(rows), nonzero(cols));
        tcsetwinsize(&self.master, winsize(rows, cols)).expect("size of the terminal");
    }

    pub fn pid(&self) -> Pid {
        i32::try_from(self.child.id()).ok().and_then(Pid::from_raw).expect("a pid")
    }

    pub fn signal(&self, signal: Signal) {
        kill_process(self.pid(), signal).expect("signal");
    }

    /// Waits until the program has ended and all its output is on the screen.
    pub fn wait(&mut self) -> ExitStatus {
        if self.ended.is_none() {
            self.ended = super::poll(PATIENCE, || self.child.try_wait().expect("wait"));
        }
        let status = self.ended.unwrap_or_else(|| {
            panic!("the program did not end within {PATIENCE:?}\n{:?}", self.lock())
        });
        // A background process of the program may keep the terminal open, so this wait is bounded.
        let _ = super::poll(Duration::from_secs(2), || self.lock().closed.then_some(()));
        status
    }

    /// Asserts that the program ends with this status.
    pub fn assert_status(&mut self, status: i32) {
        let ended = self.wait();
        assert_eq!((ended.code(), ended.signal()), (Some(status), None), "{:?}", self.lock());
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("{:?}", self.lock());
        }
        if self.ended.is_none() {
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
    }
}

/// Starts a program on a new terminal, reads until `shown` appears, and closes the terminal.
/// Returns the exit status of the program.
pub fn hang_up_on<A: AsRef<OsStr>>(
    program: impl AsRef<OsStr>,
    args: &[A],
    env: &[(&str, &OsStr)],
    shown: &str,
) -> ExitStatus {
    let (mut child, master) = on_a_terminal(program.as_ref(), args, env, 24, 80);
    let (mut text, mut buf) = (Vec::new(), [0; 16 << 10]);
    while !String::from_utf8_lossy(&text).contains(shown) {
        let len = rustix::io::read(&master, &mut buf)
            .unwrap_or_else(|error| panic!("{error}: {:?}", String::from_utf8_lossy(&text)));
        text.extend_from_slice(&buf[..len]);
    }
    drop(master);
    let ended = super::poll(PATIENCE, || child.try_wait().expect("wait"));
    if ended.is_none() {
        let _ = child.kill();
        let _ = child.wait();
    }
    ended.unwrap_or_else(|| panic!("the program outlives its terminal"))
}

/// Starts a program on a new terminal of this size; returns it with the other end of the terminal.
fn on_a_terminal<A: AsRef<OsStr>>(
    program: &OsStr,
    args: &[A],
    env: &[(&str, &OsStr)],
    rows: u16,
    cols: u16,
) -> (Child, OwnedFd) {
    let master = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC)
        .expect("a pseudo-terminal");
    grantpt(&master).expect("grantpt");
    unlockpt(&master).expect("unlockpt");
    tcsetwinsize(&master, winsize(rows, cols)).expect("size of the terminal");
    let name = ptsname(&master, Vec::new()).expect("name of the terminal");
    let slave = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags_noctty()
        .open(OsStr::from_bytes(name.as_bytes()))
        .expect("the other end of the terminal");
    // setsid(1) becomes the program without a fork, because it is not the leader of a process group
    // yet.
    let mut command = Command::new("setsid");
    command
        .arg("--ctty")
        .arg(program)
        .args(args)
        .env("TERM", "xterm-256color")
        .env_remove("NO_COLOR");
    command.env_remove("COLUMNS").env_remove("LINES").envs(env.iter().copied());
    command
        .stdin(slave.try_clone().expect("terminal"))
        .stdout(slave.try_clone().expect("terminal"))
        .stderr(slave);
    let child = command.spawn().unwrap_or_else(|error| panic!("cannot start {command:?}: {error}"));
    (child, master)
}

/// Opens a terminal without making it the controlling terminal of the test.
trait NoControllingTerminal {
    fn custom_flags_noctty(&mut self) -> &mut Self;
}

impl NoControllingTerminal for OpenOptions {
    fn custom_flags_noctty(&mut self) -> &mut Self {
        std::os::unix::fs::OpenOptionsExt::custom_flags(
            self,
            i32::try_from(OFlags::NOCTTY.bits()).expect("a flag"),
        )
    }
}

fn nonzero(number: u16) -> NonZeroU16 {
    NonZeroU16::new(number).expect("rows and columns")
}

fn winsize(rows: u16, cols: u16) -> Winsize {
    Winsize { ws_row: rows, ws_col: cols, ws_xpixel: 0, ws_ypixel: 0 }
}

/// Returns the screen with a frame, for messages.
pub fn picture(screen: &vt100::Screen) -> String {
    let (_, cols) = screen.size();
    let line = "-".repeat(usize::from(cols.get()));
    let rows: String = screen.rows(0, cols.get()).map(|row| format!("|{row}\n")).collect();
    format!("+{line}\n{rows}+{line}")
}

/// Checks what the other tests rely on: size, colours, keys, Ctrl-C, change of size.
#[test]
fn a_program_has_a_terminal() {
    if !super::have(&["terminal", "stty", "sh"]) {
        return;
    }
    let script = "trap 'echo interrupted; exit 7' INT; trap 'stty size' WINCH; stty size; printf '\\033[31mred\\033[0m\\n'; \
                  read line; echo \"got $line\"; while :; do sleep 0.05; done";
    let mut terminal = Terminal::spawn("sh", &["-c", script], &[], 11, 42);
    terminal.wait_for_text("11 42");
    terminal.wait_for("a red word", |screen| {
        screen.cell(1, 0).is_some_and(|cell| cell.fgcolor() == vt100::Color::Idx(1))
    });
    terminal.send(b"keys\r");
    terminal.wait_for_text("got keys");
    terminal.resize(20, 60);
    terminal.wait_for_text("20 60");
    terminal.send(b"\x03");
    terminal.assert_status(7);
    assert!(terminal.contents().contains("interrupted"), "{}", terminal.contents());
    assert!(terminal.raw().windows(5).any(|bytes| bytes == b"\x1b[31m"));
}
