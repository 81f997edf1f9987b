//! The life of the keeper: it starts the serving process, passes signals on to it, answers its
//! requests, and ends with its exit status.

use std::ffi::{CString, OsString};
use std::fs::File;
use std::io::{self, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::Path;
use std::process::{Child, Command, ExitCode, ExitStatus, Stdio};
use std::sync::Arc;
use std::thread;

use crossbeam_channel::Receiver;
use parking_lot::Mutex;
use rustix::fs::{Mode, OFlags};
use rustix::process::{Pid, Signal, WaitId, WaitIdOptions};
use signal_hook::consts::{SIGCHLD, SIGHUP, SIGINT, SIGQUIT, SIGTERM, SIGUSR1, SIGUSR2};
use signal_hook::iterator::Signals;

use super::estate::Estate;
use super::manager::{self, ManagerSocket};
use super::process::{self, Kept};
use super::upgrade::{HANDED_OVER, Program, Programs};
use crate::fetching::Credentials;
use crate::running::KEEPER_NAME;
use host::Result;
use host::error::{Context, one_line};

/// The hidden option of `cordisk mount` (see `cli`).
const SERVING_OPTION: &str = "--serving-process";

/// The signals that are passed on to the serving process.
const SIGNALS: [i32; 4] = [SIGTERM, SIGINT, SIGHUP, SIGQUIT];

/// Those of [`SIGNALS`] that are passed on as another signal. The serving process can so tell the
/// signal of the keeper from one that was sent to all processes, and does not count that one twice.
pub const PASSED_ON: [(i32, i32); 2] = [(SIGTERM, SIGUSR1), (SIGINT, SIGUSR2)];

/// What the keeper gives up once the disk is served.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Console {
    /// Nothing: it stays in the foreground.
    Kept,
    /// Standard output and standard error, whose ends the caller waits for.
    LeftWhenReady,
}

/// The beginning of a keeper.
#[derive(Debug)]
pub struct KeeperStart {
    /// The standard output and standard error.
    pub console: Console,
    /// What the fetcher gets.
    pub credentials: Credentials,
    /// The arguments of the serving process, the subcommand first.
    pub arguments: Vec<OsString>,
    /// The disk of a keeper that has died, which this one goes on with.
    pub estate: Option<Estate>,
    /// Why there is none, although the service manager has stored something.
    pub no_estate: Option<host::Error>,
}

/// Runs the keeper from start to end. The process has one thread when this is called, and no
/// credentials in its environment.
///
/// # Errors
/// The serving process, or the thread that passes signals on, cannot be started. Nothing is mounted
/// then.
pub fn run(start: KeeperStart) -> Result<ExitCode> {
    let inherited = inherited();
    // From here on these signals do not kill this process: without it the disk could not be
    // unmounted. They have handlers instead of being ignored, because child processes would inherit
    // "ignore". What arrives is kept until the thread runs.
    let signals = Signals::new(SIGNALS).context(|| "signal handlers")?;
    // If the caller ignores this signal, the kernel throws the exit status of a child away.
    signal_hook::flag::register(SIGCHLD, Arc::default()).context(|| "signal handlers")?;
    if let Ok(name) = CString::new(KEEPER_NAME) {
        let _ = rustix::thread::set_name(&name);
    }
    let (sender, records) = crossbeam_channel::unbounded();
    log::set_max_level(log::LevelFilter::Debug);
    let _ = log::set_boxed_logger(Box::new(process::Records(sender)));
    let null = File::options().read(true).write(true).open("/dev/null").context(|| "/dev/null")?;
    // A service manager has started only a process that stays in the foreground.
    let manager = if start.console == Console::Kept { ManagerSocket::connect() } else { None };

    // Relative paths in the arguments mean this directory for every serving process, and the keeper
    // leaves it. A descriptor of it would keep its file system from being unmounted.
    let directory = std::env::current_dir().context(|| "the current directory")?;
    let alive = Arc::new(Mutex::new(Alive::default()));
    let is_in_background = start.console == Console::LeftWhenReady;
    let programs = Programs::new(start.arguments, is_in_background);
    // What arrives before there is a process waits for it.
    pass_on(signals, Arc::clone(&alive))?;
    rustix::process::umask(Mode::from_raw_mode(0o077));
    rustix::process::chdir("/").map_err(io::Error::from).context(|| "chdir to /")?;
    let null_file = null.try_clone().context(|| "/dev/null")?;
    let mut kept = Kept::new(start.credentials, manager, null.into(), programs.clone());
    kept.alive = Arc::clone(&alive);
    kept.has_left_console = start.console == Console::Kept;
    kept.directory.clone_from(&directory);
    if let Some(error) = start.no_estate {
        kept.decline_estate(&error);
    }
    match start.estate {
        None => {}
        // The serving process of such a disk lives, and keeps it after an error.
        Some(estate) if estate.has_server() => kept.succeed(estate.settle()?),
        Some(estate) => match estate.settle() {
            Ok(settled) => {
                log::warn!("the mount keeper has died: this one goes on with the disk");
                kept.succeed(settled);
            }
            Err(error) => kept.decline_estate(&error),
        },
    }
    let spawn = |socket| spawn(socket, &programs.start(), &directory);
    // The disk of another keeper has no serving process now, so the first one is started as any
    // successor is: a failure is not the end. It writes "ready" to the standard output that this
    // process keeps until then.
    let first = if kept.mount.is_some() {
        None
    } else {
        let life = begin(&alive, &spawn)?;
        alive.lock().gets_signals();
        // A caller reads "ready" from the serving process. The pipe ends with that process alone.
        if start.console == Console::LeftWhenReady {
            rustix::stdio::dup2_stdout(&null_file)
                .map_err(io::Error::from)
                .context(|| "/dev/null")?;
        }
        Some(life)
    };
    close(inherited);
    let status = lives(&mut kept, first, &alive, &records, &spawn);
    // A command that waits learns the end, and no further one connects.
    programs.end();
    drop(kept.upgrades.take());
    drop(std::mem::take(&mut kept.testament));
    // The mount is not dropped, because dropping it would unmount.
    let was_mounted = kept.mount.take().map(std::mem::forget).is_some();
    if let Some(relay) = kept.relay.take() {
        relay.finish();
    }
    Ok(serving_ended(status?, was_mounted))
}

/// Answers serving processes, one after the other, until one has no successor. Returns the status
/// of the last one. Without a `first` one, a successor is started first.
fn lives(
    kept: &mut Kept,
    first: Option<(Child, OwnedFd)>,
    alive: &Mutex<Alive>,
    records: &Receiver<(usize, String)>,
    spawn: &dyn Fn(OwnedFd) -> Result<Child>,
) -> Result<ExitStatus> {
    let mut life = first;
    let mut status = ExitStatus::from_raw(HANDED_OVER << 8);
    loop {
        let mut has_successor = true;
        if let Some(life) = life.take() {
            status = live(kept, life, alive, records)?;
            has_successor = kept.has_successor(status);
        }
        // The successor gets this line with its first reply, and logs it.
        if has_successor && status.code() == Some(HANDED_OVER) {
            log::info!("the serving process has left the disk to another one");
        } else if has_successor {
            log::warn!("the serving process has ended ({status}): another one takes the disk over");
        }
        life = loop {
            if !has_successor || alive.lock().is_given_up {
                return Ok(status);
            }
            thread::sleep(kept.legacy.pause());
            kept.begin_again();
            match begin(alive, spawn) {
                Ok(life) => {
                    kept.testament.lives(Pid::from_child(&life.0));
                    break Some(life);
                }
                Err(error) => {
                    log::warn!("{error}");
                    has_successor = kept.cannot_start(&error);
                }
            }
        };
    }
}

/// Starts a successor.
fn begin(
    alive: &Mutex<Alive>,
    spawn: &dyn Fn(OwnedFd) -> Result<Child>,
) -> Result<(Child, OwnedFd)> {
    let (socket, theirs) = host::packet::pair().context(|| "starting the serving process")?;
    let mut alive = alive.lock();
    let server = spawn(theirs)?;
    alive.process = Some(Pid::from_child(&server));
    Ok((server, socket))
}

/// Answers a serving process until it has ended. Returns its status.
fn live(
    kept: &mut Kept,
    (mut server, socket): (Child, OwnedFd),
    alive: &Mutex<Alive>,
    records: &Receiver<(usize, String)>,
) -> Result<ExitStatus> {
    let answered = process::serve(kept, socket.as_fd(), records);
    // The serving process, if it lives, waits for this end.
    drop(socket);
    if let Err(error) = answered {
        tell(&format!("mount keeper: {error}"));
    }
    wait(&mut server, alive)
}

/// The serving process that gets signals.
#[derive(Debug, Default)]
pub(super) struct Alive {
    /// The process, until it has ended.
    process: Option<Pid>,
    /// Whether it has its handlers. Without them a signal would kill it.
    has_handlers: bool,
    /// What has arrived before that.
    waiting: Vec<Signal>,
    /// What the process was told. If it ends before the disk does, its successor is told as well.
    told: Vec<Signal>,
    /// A process that does not come to serve was told to end twice: the disk is given up.
    pub(super) is_given_up: bool,
}

impl Alive {
    /// Passes a signal on, now or when the process has its handlers. A process that hangs before
    /// that would never get it: the second signal to end kills it, and no other one follows.
    fn pass(&mut self, signal: Signal) {
        let ends = |signal: &Signal| PASSED_ON.iter().any(|pair| pair.1 == signal.as_raw());
        match self.process {
            Some(process) if self.has_handlers => {
                let _ = rustix::process::kill_process(process, signal);
                if ends(&signal) && self.told.is_empty() {
                    self.told.push(signal);
                }
            }
            _ if ends(&signal) && self.waiting.iter().any(ends) => {
                self.is_given_up = true;
                self.kill();
            }
            _ => self.waiting.push(signal),
        }
    }

    /// Asks the process to leave its disk to a successor, if it has its handlers.
    ///
    /// # Errors
    /// This process may not signal it.
    pub(super) fn hand_over(&self) -> Result<()> {
        let Some(process) = self.process.filter(|_| self.has_handlers) else { return Ok(()) };
        rustix::process::kill_process(process, Signal::WINCH)
            .map_err(io::Error::from)
            .context(|| "the mount keeper cannot signal the serving process")
    }

    /// Kills the process, unless it has ended.
    pub(super) fn kill(&self) {
        if let Some(process) = self.process {
            let _ = rustix::process::kill_process(process, Signal::KILL);
        }
    }

    /// Returns the process, until it has ended.
    pub(super) fn process(&self) -> Option<Pid> {
        self.process
    }

    /// The process has its handlers.
    pub(super) fn gets_signals(&mut self) {
        self.has_handlers = true;
        std::mem::take(&mut self.waiting).into_iter().for_each(|signal| self.pass(signal));
    }

    /// The process has ended.
    fn ends(&mut self) {
        (self.process, self.has_handlers) = (None, false);
        let told = std::mem::take(&mut self.told);
        self.waiting.splice(0..0, told);
    }
}

/// Starts a serving process in `directory`, with `socket` as its standard input.
fn spawn(socket: OwnedFd, program: &Program, directory: &Path) -> Result<Child> {
    let mut arguments = program.arguments.clone();
    arguments.insert(1.min(arguments.len()), SERVING_OPTION.into());
    let mut command = Command::new(match &program.file {
        None => "/proc/self/exe".to_owned(),
        // The child has a copy of the descriptor, and the kernel closes it once the file is found.
        Some(file) => format!("/proc/self/fd/{}", file.as_raw_fd()),
    });
    for name in manager::VARIABLES {
        command.env_remove(name);
    }
    if let Some(console) = &program.console {
        let console = console.try_clone().context(|| "the standard error of the command")?;
        command.stderr(console);
    }
    command
        .arg0(std::env::args_os().next().unwrap_or_else(|| "cordisk".into()))
        .args(arguments)
        .current_dir(directory)
        .stdin(Stdio::from(socket))
        .spawn()
        .context(|| "starting the serving process")
}

/// Starts the thread that passes signals on to the process in `server`, until it has ended.
fn pass_on(mut signals: Signals, alive: Arc<Mutex<Alive>>) -> Result<()> {
    let body = move || {
        for signal in signals.forever() {
            let signal =
                PASSED_ON.iter().find(|pair| pair.0 == signal).map_or(signal, |pair| pair.1);
            // The lock keeps the process from being waited for, so its id is not used anew.
            let mut alive = alive.lock();
            if let Some(signal) = Signal::from_named_raw(signal) {
                alive.pass(signal);
            }
        }
    };
    thread::Builder::new()
        .name("signals".into())
        .spawn(body)
        .map(drop)
        .context(|| "starting the signal thread")
}

/// Waits until the serving process has ended. `alive` is empty afterwards.
fn wait(server: &mut Child, alive: &Mutex<Alive>) -> Result<ExitStatus> {
    let what = || "waiting for the serving process";
    let pid = Pid::from_child(server);
    // This leaves the process a zombie, so that its id stays its own until no signal can be sent.
    let options = WaitIdOptions::EXITED | WaitIdOptions::NOWAIT;
    rustix::io::retry_on_intr(|| rustix::process::waitid(WaitId::Pid(pid), options))
        .map_err(io::Error::from)
        .context(what)?;
    alive.lock().ends();
    server.wait().context(what)
}

/// Decides what follows the end of the serving process: the exit status of the keeper. The mount,
/// if there was one, is left as it is.
///
/// A serving process that ends by itself has removed what it made, and has said why it failed. One
/// that was killed leaves a dead mount, so that programs that use it get ENOTCONN: an unmount would
/// make the empty placeholder visible.
fn serving_ended(status: ExitStatus, was_mounted: bool) -> ExitCode {
    if let Some(code) = status.code().filter(|code| *code != HANDED_OVER) {
        return ExitCode::from(u8::try_from(code).unwrap_or(1));
    }
    // A signal that was passed on has ended it before it had its handlers and opened anything.
    let told = status
        .signal()
        .map(|signal| PASSED_ON.iter().find(|pair| pair.1 == signal).map_or(signal, |pair| pair.0));
    let told = told.filter(|signal| SIGNALS.contains(signal));
    if let Some(signal) = told.filter(|_| !was_mounted) {
        // The default action of these signals does not end the first process of a container.
        if std::process::id() != 1 {
            let _ = signal_hook::low_level::emulate_default_handler(signal);
        }
        return ExitCode::from(u8::try_from(128 + signal).unwrap_or(1));
    }
    let mount =
        if was_mounted { "; its mount is dead: mount the image again, or unmount it" } else { "" };
    if status.code() == Some(HANDED_OVER) {
        tell(&format!("no other serving process could be started{mount}"));
    } else {
        tell(&format!("the serving process was killed ({status}){mount}"));
    }
    ExitCode::FAILURE
}

/// Writes one line to standard error.
fn tell(text: &str) {
    let _ = writeln!(io::stderr(), "cordisk: {}", one_line(text));
}

/// Closes every descriptor that this process has inherited, except the three standard ones and
/// `kept`.
pub fn close_inherited(kept: Option<RawFd>) {
    close(inherited().into_iter().filter(|&open| Some(open) != kept));
}

fn close(descriptors: impl IntoIterator<Item = RawFd>) {
    for descriptor in descriptors {
        let _ = nix::unistd::close(descriptor);
    }
}

/// The descriptors that this process has inherited, except the three standard ones. Those that it
/// has opened itself are closed by an execve(2), so an inherited one is not among them.
fn inherited() -> Vec<RawFd> {
    // Without /proc the descriptors stay open, and the process serves all the same.
    let Ok(open) = std::fs::read_dir("/proc/self/fdinfo") else { return Vec::new() };
    let inherited = open.filter_map(|entry| {
        let entry = entry.ok()?;
        let descriptor: RawFd = entry.file_name().to_str()?.parse().ok()?;
        let facts = std::fs::read_to_string(entry.path()).ok()?;
        let flags = facts.lines().find_map(|line| line.strip_prefix("flags:"))?;
        let flags = u32::from_str_radix(flags.trim(), 8).ok()?;
        let stays = !OFlags::from_bits_retain(flags).contains(OFlags::CLOEXEC);
        (descriptor > 2 && stays).then_some(descriptor)
    });
    inherited.collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Protects: a descriptor that this process has opened for itself counts as its own.
    #[test]
    fn own_descriptors_are_not_inherited() {
        let ours = File::open("/dev/null").unwrap();
        let passed = File::open("/dev/null").unwrap();
        rustix::io::fcntl_setfd(&passed, rustix::io::FdFlags::empty()).unwrap();
        let inherited = inherited();
        assert!(inherited.contains(&passed.as_raw_fd()), "{inherited:?}");
        assert!(!inherited.contains(&ours.as_raw_fd()), "{inherited:?}");
    }

    #[test]
    fn an_exit_status_is_passed_on() {
        let code = |raw| serving_ended(ExitStatus::from_raw(raw), true);
        for status in [0, 1, 2, 255_u8] {
            assert_eq!(code(i32::from(status) << 8), ExitCode::from(status));
        }
        assert_eq!(code(9), ExitCode::FAILURE);
    }
}
