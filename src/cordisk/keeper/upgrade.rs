//! The replacement of the serving process by one of another program, while the disk is served.
//!
//! ```text
//!  cordisk upgrade (the new program)       keeper                     serving process
//!   ├─ connects ──────────────────────────▶│ thread "upgrade"
//!   │◀─ offer: protocol, its arguments ────┤
//!   ├─ arguments, its own program file ───▶├─ SIGWINCH ──────────────▶│ flush, status HANDED_OVER
//!   │                                      │◀─────────────────────────┘
//!   │                                      ├─ starts the new program ─▶│ takes the disk over
//!   │◀─ outcome ───────────────────────────┤◀───────────────── Serving ┤
//! ```
//! It is the way of a killed process (`legacy.rs`), except that the process has flushed before and
//! that another program follows. There is no second way that would only be used by upgrades.
//!
//! **Before anything is given up** the command compares [`PROTOCOL`], and checks the arguments as
//! the new program understands them. If the new program fails before it serves, or does not serve
//! in time, the keeper starts the previous one with the previous arguments.
//!
//! A process in the background gets the standard error of the command until it serves, so that the
//! user sees why it fails. One in the foreground has that of the keeper.
//!
//! The command is believed as the user is that has started the keeper: it is that user, or root.
//! The program is the open file that the command has sent, whatever its path leads to.
//!
//! **Touches:** a socket beside the entry of the disk; the serving process, by signals. **Never:**
//! asks the serving process which program or arguments follow.
//! **Locks:** one leaf lock, over what is started next: held by this thread and by the main thread
//! of the keeper for moments.

use std::ffi::{OsStr, OsString};
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use crossbeam_channel::{RecvTimeoutError, Sender, bounded};
use nix::sys::socket::getsockopt;
use nix::sys::socket::sockopt::PeerCredentials;
use parking_lot::Mutex;
use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::fs::{AtFlags, Mode, OFlags};
use rustix::io::Errno;
use rustix::net::sockopt::{Timeout, set_socket_timeout};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::estate::Facts;
use super::serving::Alive;
use super::wire::{LONGEST, Name};
use host::error::Context;
use host::{Error, ErrorKind, Result, packet};

/// The number of what keeper, serving process and [`Upgrade`] tell each other: the messages, the
/// facts of a session that is taken over, and the format of the journal. A change that a program of
/// another number would not understand increments it.
pub const PROTOCOL: u32 = 1;

/// The exit status of a serving process that leaves its disk to a successor. (75 is EX_TEMPFAIL of
/// sysexits.h.)
pub const HANDED_OVER: i32 = 75;

/// How long a new program may take until it serves. After that the keeper ends it, and starts the
/// previous one.
const START_PATIENCE: Duration = Duration::from_secs(30);
/// How long a command waits for the outcome. Most of it is for a slow flush.
pub(super) const OUTCOME_PATIENCE: Duration = Duration::from_secs(300);
/// How long a command may take for its message.
const MESSAGE_PATIENCE: Duration = Duration::from_secs(10);
/// Time between two looks at the command and at the clock.
pub(super) const LOOK: Duration = Duration::from_millis(200);
/// Time between two signals to a serving process.
const SIGNAL_PAUSE: Duration = Duration::from_secs(1);

/// Why a disk whose session is not kept is refused.
const NOT_REPLACEABLE: &str = "its serving process cannot be replaced; the log says why: unmount the disk and mount it again to upgrade it";

/// What the keeper says first.
#[derive(Debug, Deserialize, Serialize)]
struct Offer {
    protocol: u32,
    /// The version of the keeper, for messages.
    version: String,
    /// The arguments of the serving process, the subcommand first.
    arguments: Vec<Name>,
    /// Why the serving process cannot be replaced.
    refusal: Option<String>,
    /// The keeper has died: the serving process says this.
    is_orphan: bool,
}

/// What the command wants. The message carries the program and the standard error of the command.
#[derive(Debug, Deserialize, Serialize)]
struct Wanted {
    arguments: Vec<Name>,
}

/// What has become of it.
#[derive(Debug, Deserialize, Serialize)]
struct Outcome(std::result::Result<(), String>);

/// Returns the path of the socket on which the keeper of the disk with this entry listens.
pub fn socket_beside(entry: &Path) -> PathBuf {
    entry.with_extension("keeper")
}

/// The disk, as `cordisk upgrade` finds it.
#[derive(Debug)]
pub enum Contact {
    /// Its keeper answers.
    Keeper(Upgrade),
    /// Its keeper has died, and the serving process answers: a keeper with these arguments, started
    /// in this directory, can go on with it ([`super::Estate::of_process`]).
    Orphan {
        /// The arguments of the mount, the subcommand first.
        arguments: Vec<OsString>,
        /// The directory of relative paths in them.
        directory: PathBuf,
    },
}

impl Contact {
    /// Connects to the process that listens at `path`.
    ///
    /// # Errors
    /// No process listens there; it speaks another protocol, or says that the serving process
    /// cannot be replaced, or refuses this user.
    pub fn make(path: &Path) -> Result<Contact> {
        let (socket, offer) = connect(path)?;
        if offer.is_orphan {
            let Facts { arguments, directory, .. } = Facts::beside(path)?;
            let arguments = arguments.into_iter().map(OsString::from).collect();
            return Ok(Contact::Orphan { arguments, directory: directory.into() });
        }
        let arguments = offer.arguments.into_iter().map(OsString::from).collect();
        Ok(Contact::Keeper(Upgrade { socket, arguments }))
    }
}

/// The keeper, as `cordisk upgrade` sees it.
#[derive(Debug)]
pub struct Upgrade {
    socket: OwnedFd,
    /// The arguments of the serving process, the subcommand first.
    pub arguments: Vec<OsString>,
}

impl Upgrade {
    /// Replaces the serving process by one of this program, with these arguments. Returns when that
    /// one serves. A keeper of another user does not get the standard error of this process, which
    /// may be a terminal.
    ///
    /// # Errors
    /// The serving process does not hand the disk over, or the new one does not serve; the previous
    /// program serves then. The disk was unmounted meanwhile. The keeper has died.
    pub fn run(self, arguments: &[OsString], trusts_keeper: bool) -> Result<()> {
        let program =
            rustix::fs::open("/proc/self/exe", OFlags::PATH | OFlags::CLOEXEC, Mode::empty());
        let program = program.map_err(io::Error::from).context(|| "/proc/self/exe")?;
        let arguments = arguments.iter().map(|argument| argument.as_os_str().into()).collect();
        let (wanted, console) = (Wanted { arguments }, io::stderr());
        let files = [program.as_fd(), console.as_fd()];
        let files = if trusts_keeper { &files[..] } else { &files[..1] };
        packet::send(&self.socket, &wanted, LONGEST, files)?;
        set_patience(&self.socket, OUTCOME_PATIENCE)?;
        let outcome = packet::receive::<Outcome>(&self.socket, LONGEST);
        match outcome.context(|| "waiting for the mount keeper")? {
            Some((Outcome(Ok(())), _)) => Ok(()),
            Some((Outcome(Err(why)), _)) => Err(Error::new(ErrorKind::Io, why)),
            None => Err(Error::new(ErrorKind::Io, "its mount keeper has ended meanwhile")),
        }
    }
}

/// Connects to the process that listens at `path`, and takes its offer.
fn connect(path: &Path) -> Result<(OwnedFd, Offer)> {
    let what = || "the mount keeper";
    let socket = seqpacket().context(what)?;
    let address = SocketAddrUnix::new(path).map_err(io::Error::from).context(what)?;
    set_patience(&socket, MESSAGE_PATIENCE)?;
    rustix::net::connect(&socket, &address).map_err(|errno| match errno {
        Errno::ACCESS | Errno::PERM => denied(),
        _ => Error::new(
            ErrorKind::NotFound,
            "no mount keeper listens: it is of an older version; unmount the disk and mount it again to upgrade it",
        ),
    })?;
    let (offer, _) = packet::receive::<Value>(&socket, LONGEST)?.ok_or_else(denied)?;
    // The only members that every version understands.
    let protocol = offer["protocol"].as_u64().unwrap_or_default();
    if protocol != u64::from(PROTOCOL) {
        let text = format!(
            "its mount keeper (cordisk {}) speaks protocol {protocol}, and this program {PROTOCOL}: unmount the disk and mount it again to upgrade it",
            host::error::one_line(offer["version"].as_str().unwrap_or_default()),
        );
        return Err(Error::new(ErrorKind::UnsupportedFeature, text));
    }
    let offer: Offer = serde_json::from_value(offer)
        .map_err(|error| Error::wrap(ErrorKind::InvalidArgument, "the mount keeper", error))?;
    match offer.refusal {
        Some(why) => Err(Error::new(ErrorKind::UnsupportedFeature, why)),
        None => Ok((socket, offer)),
    }
}

/// Limits how long a message to or from the other side may take.
pub(super) fn set_patience(socket: &OwnedFd, patience: Duration) -> Result<()> {
    for timeout in [Timeout::Recv, Timeout::Send] {
        set_socket_timeout(socket, timeout, Some(patience))
            .map_err(io::Error::from)
            .context(|| "socket")?;
    }
    Ok(())
}

fn denied() -> Error {
    let text = "permission denied: its mount keeper has ended, or the disk belongs to another user; ask as that user, or as root";
    Error::new(ErrorKind::InvalidArgument, text)
}

/// Connects to a serving process whose keeper has died, and asks it for its descriptors.
///
/// # Errors
/// No such process listens at `path`.
pub(super) fn connect_to_orphan(path: &Path) -> Result<OwnedFd> {
    let (socket, offer) = connect(path)?;
    if !offer.is_orphan {
        return Err(Error::new(ErrorKind::Busy, "the disk has a mount keeper"));
    }
    packet::send(&socket, &Wanted { arguments: Vec::new() }, LONGEST, &[])?;
    Ok(socket)
}

/// Greets a process that has connected to a serving process without a keeper. Returns whether it
/// wants the descriptors.
pub(super) fn greet_as_orphan(connection: &OwnedFd) -> Result<bool> {
    if !may_ask(connection)? {
        return Ok(false);
    }
    let offer = Offer {
        protocol: PROTOCOL,
        version: env!("CARGO_PKG_VERSION").to_owned(),
        arguments: Vec::new(),
        refusal: None,
        is_orphan: true,
    };
    packet::send(connection, &offer, LONGEST, &[])?;
    Ok(packet::receive::<Wanted>(connection, LONGEST)?.is_some())
}

/// How a serving process is started.
#[derive(Clone, Debug)]
pub(super) struct Program {
    /// The program; `None` for that of the keeper.
    pub(super) file: Option<Arc<OwnedFd>>,
    /// Its arguments, the subcommand first.
    pub(super) arguments: Vec<OsString>,
    /// Its standard error; `None` for that of the keeper.
    pub(super) console: Option<Arc<OwnedFd>>,
}

/// A command that waits.
#[derive(Debug)]
struct Waiting {
    /// The program that it wants; once that was started, the previous one.
    program: Program,
    outcome: Sender<Outcome>,
}

/// What is started now and next.
#[derive(Debug)]
struct Plan {
    current: Program,
    /// Why the serving process cannot be replaced.
    refusal: Option<String>,
    is_in_background: bool,
    /// Started when the serving process has ended.
    next: Option<Waiting>,
    /// The serving process of `current` was started, and does not serve yet.
    trying: Option<(Waiting, Instant)>,
}

/// The programs of the serving processes, shared by the main thread and the thread "upgrade".
#[derive(Clone, Debug)]
pub(super) struct Programs(Arc<Mutex<Plan>>);

impl Default for Programs {
    fn default() -> Programs {
        Programs::new(Vec::new(), true)
    }
}

impl Programs {
    /// The program of the keeper, with these arguments.
    pub(super) fn new(arguments: Vec<OsString>, is_in_background: bool) -> Programs {
        let current = Program { file: None, arguments, console: None };
        Programs(Arc::new(Mutex::new(Plan {
            current,
            refusal: Some(NOT_REPLACEABLE.into()),
            is_in_background,
            next: None,
            trying: None,
        })))
    }

    /// The serving process can be replaced from now on.
    pub(super) fn can_be_replaced(&self) {
        self.0.lock().refusal = None;
    }

    /// The serving process cannot be replaced any more.
    pub(super) fn cannot_be_replaced(&self) {
        self.0.lock().refusal = Some(NOT_REPLACEABLE.into());
    }

    /// The program of this keeper is tried with the arguments that it has. If it fails, it goes on
    /// with `proven` ones, which the disk had before.
    pub(super) fn try_first(&self, proven: Vec<OsString>) {
        let mut plan = self.0.lock();
        let arguments = std::mem::replace(&mut plan.current.arguments, proven);
        let program = Program { file: None, arguments, console: None };
        // No command waits for the outcome: the one that has started this keeper reads "ready".
        plan.next = Some(Waiting { program, outcome: bounded(1).0 });
    }

    /// Returns the program of the process that is about to be started.
    pub(super) fn start(&self) -> Program {
        let mut plan = self.0.lock();
        if let Some(mut waiting) = plan.next.take() {
            std::mem::swap(&mut plan.current, &mut waiting.program);
            plan.trying = Some((waiting, Instant::now()));
        }
        plan.current.clone()
    }

    /// The process that was started last serves.
    pub(super) fn serves(&self) {
        let mut plan = self.0.lock();
        plan.current.console = None;
        if let Some((waiting, _)) = plan.trying.take() {
            let _ = waiting.outcome.try_send(Outcome(Ok(())));
        }
    }

    /// The process that was started last has ended before it served. Returns whether the previous
    /// program is the next one therefore.
    pub(super) fn revert(&self, why: impl FnOnce() -> String) -> bool {
        let mut plan = self.0.lock();
        let Some((waiting, _)) = plan.trying.take() else { return false };
        plan.current = waiting.program;
        let why = format!("{}; the previous program serves the disk", why());
        let _ = waiting.outcome.try_send(Outcome(Err(why)));
        true
    }

    /// The serving process keeps the disk.
    pub(super) fn refuse(&self, why: &str) {
        if let Some(waiting) = self.0.lock().next.take() {
            let _ = waiting.outcome.try_send(Outcome(Err(why.to_owned())));
        }
    }

    /// No process is started any more.
    pub(super) fn end(&self) {
        let mut plan = self.0.lock();
        (plan.next, plan.trying) = (None, None);
    }

    /// The arguments of the process that was started last.
    pub(super) fn arguments(&self) -> Vec<Name> {
        let plan = self.0.lock();
        plan.current.arguments.iter().map(|text| text.as_os_str().into()).collect()
    }

    fn offer(&self) -> Offer {
        let plan = self.0.lock();
        Offer {
            protocol: PROTOCOL,
            version: env!("CARGO_PKG_VERSION").to_owned(),
            arguments: plan.current.arguments.iter().map(|text| text.as_os_str().into()).collect(),
            refusal: plan.refusal.clone(),
            is_orphan: false,
        }
    }

    /// Plans another program. Only this thread plans, so there is no other plan.
    fn plan(&self, mut program: Program, outcome: Sender<Outcome>) {
        let mut plan = self.0.lock();
        program.console = program.console.filter(|_| plan.is_in_background);
        plan.next = Some(Waiting { program, outcome });
    }

    /// Returns since when a new program was started and does not serve; `None` if the serving
    /// process has not ended yet.
    fn trying_since(&self) -> Option<Instant> {
        self.0.lock().trying.as_ref().map(|(_, since)| *since)
    }

    /// The command has gone. Returns whether its program is not started any more.
    fn withdraw(&self) -> bool {
        self.0.lock().next.take().is_some()
    }
}

/// The socket of the keeper, and the thread that answers there. Dropping it removes the file.
#[derive(Debug)]
pub(super) struct UpgradeSocket {
    directory: OwnedFd,
    name: OsString,
    socket: Option<OwnedFd>,
}

impl UpgradeSocket {
    /// Listens beside the entry `entry` in `directory`.
    ///
    /// # Errors
    /// Those of bind(2) and listen(2); the thread cannot be started.
    pub(super) fn open(
        directory: &OwnedFd,
        entry: &OsStr,
        programs: &Programs,
        alive: &Arc<Mutex<Alive>>,
    ) -> Result<UpgradeSocket> {
        let what = || "the socket of the mount keeper";
        let name = socket_beside(Path::new(entry)).into_os_string();
        let directory = directory.try_clone().context(what)?;
        // The directory is this user's, and the entry of this process id is locked: a socket that
        // is there is of a process that has died.
        let _ = rustix::fs::unlinkat(&directory, &name, AtFlags::empty());
        let path = Path::new("/proc/self/fd").join(directory.as_raw_fd().to_string()).join(&name);
        let address = SocketAddrUnix::new(path.as_os_str().as_bytes());
        let socket = seqpacket().context(what)?;
        // The file has the mode of the socket, so that only its owner and root can connect.
        rustix::fs::fchmod(&socket, Mode::RUSR | Mode::WUSR)
            .and_then(|()| rustix::net::bind(&socket, &address?))
            .map_err(io::Error::from)
            .context(what)?;
        let mut bound = UpgradeSocket { directory, name, socket: None };
        rustix::net::listen(&socket, 8).map_err(io::Error::from).context(what)?;
        let listener = socket.try_clone().context(what)?;
        let (programs, alive) = (programs.clone(), Arc::clone(alive));
        let body = move || {
            loop {
                match accept(&listener) {
                    Ok(command) => {
                        if let Err(error) = answer(&command, &programs, &alive) {
                            log::debug!("cordisk upgrade: {error}");
                        }
                    }
                    Err(_) => thread::sleep(LOOK),
                }
            }
        };
        thread::Builder::new().name("upgrade".into()).spawn(body).context(what)?;
        bound.socket = Some(socket);
        Ok(bound)
    }

    /// Returns a duplicate of the socket, for the serving process: it listens there once the keeper
    /// has died.
    pub(super) fn duplicate(&self) -> Option<OwnedFd> {
        self.socket.as_ref()?.try_clone().ok()
    }
}

impl Drop for UpgradeSocket {
    fn drop(&mut self) {
        let _ = rustix::fs::unlinkat(&self.directory, &self.name, AtFlags::empty());
    }
}

fn seqpacket() -> io::Result<OwnedFd> {
    Ok(rustix::net::socket_with(
        AddressFamily::UNIX,
        SocketType::SEQPACKET,
        SocketFlags::CLOEXEC,
        None,
    )?)
}

/// Accepts a connection.
pub(super) fn accept(listener: &OwnedFd) -> io::Result<OwnedFd> {
    let accepted =
        rustix::io::retry_on_intr(|| rustix::net::accept_with(listener, SocketFlags::CLOEXEC));
    Ok(accepted?)
}

/// Tells whether the process that has connected is root's or this user's. To another one the end of
/// the connection says so. A process that sends nothing is not waited for longer than
/// [`MESSAGE_PATIENCE`].
fn may_ask(connection: &OwnedFd) -> Result<bool> {
    let peer = getsockopt(connection, PeerCredentials).map_err(io::Error::from);
    let user = peer.context(|| "the user of the command")?.uid();
    set_patience(connection, MESSAGE_PATIENCE)?;
    Ok(user == 0 || user == rustix::process::geteuid().as_raw())
}

/// Answers one command, until its outcome is known.
fn answer(command: &OwnedFd, programs: &Programs, alive: &Mutex<Alive>) -> Result<()> {
    if !may_ask(command)? {
        return Ok(());
    }
    let offer = programs.offer();
    packet::send(command, &offer, LONGEST, &[])?;
    let Some((Wanted { arguments }, mut descriptors)) = packet::receive(command, LONGEST)? else {
        return Ok(());
    };
    let console = if descriptors.len() > 1 { descriptors.pop().map(Arc::new) } else { None };
    let (Some(file), None) = (descriptors.pop(), offer.refusal) else { return Ok(()) };
    let file = Some(Arc::new(file));
    let arguments = arguments.into_iter().map(OsString::from).collect();
    let (sender, outcome) = bounded(1);
    programs.plan(Program { file, arguments, console }, sender);
    let mut signalled: Option<Instant> = None;
    let outcome = loop {
        let trying = programs.trying_since();
        // Repeated, because a process that is only starting is not told.
        if trying.is_none() && signalled.is_none_or(|at| at.elapsed() >= SIGNAL_PAUSE) {
            signalled = Some(Instant::now());
            if let Err(error) = alive.lock().hand_over() {
                programs.refuse(&error.to_string());
            }
        }
        if trying.is_some_and(|since| since.elapsed() >= START_PATIENCE) {
            alive.lock().kill();
        }
        match outcome.recv_timeout(LOOK) {
            Ok(outcome) => break outcome,
            Err(RecvTimeoutError::Disconnected) => {
                break Outcome(Err("the disk was unmounted meanwhile".into()));
            }
            Err(RecvTimeoutError::Timeout) => {}
        }
        if has_gone(command) && programs.withdraw() {
            return Ok(());
        }
    };
    packet::send(command, &outcome, LONGEST, &[])
}

/// Tells whether the other side has closed its end.
pub(super) fn has_gone(command: &OwnedFd) -> bool {
    let mut polled = [PollFd::new(command, PollFlags::empty())];
    let now = Timespec { tv_sec: 0, tv_nsec: 0 };
    rustix::event::poll(&mut polled, Some(&now)).is_ok_and(|ready| ready > 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn program(word: &str) -> Program {
        Program { file: None, arguments: vec![word.into()], console: None }
    }

    fn planned() -> (Programs, crossbeam_channel::Receiver<Outcome>) {
        let programs = Programs::new(vec!["old".into()], true);
        assert_eq!(programs.start().arguments, ["old"]);
        let (sender, outcome) = bounded(1);
        programs.plan(program("new"), sender);
        (programs, outcome)
    }

    /// Protects: a program that fails before it serves is followed by the previous one, and one
    /// that has served by itself.
    #[test]
    fn a_program_that_fails_is_taken_back() {
        let (programs, outcome) = planned();
        assert_eq!(programs.start().arguments, ["new"]);
        assert!(programs.revert(|| "exit status: 1".into()));
        let Outcome(told) = outcome.try_recv().unwrap();
        assert!(told.unwrap_err().contains("exit status: 1"));
        assert_eq!(programs.start().arguments, ["old"]);
        assert!(!programs.revert(String::new), "there is no other");

        let (programs, outcome) = planned();
        programs.start();
        programs.serves();
        assert_eq!(outcome.try_recv().unwrap().0, Ok(()));
        assert!(!programs.revert(String::new), "it has served");
        assert_eq!(programs.start().arguments, ["new"]);
    }

    /// Protects: a command learns what became of its disk, and one that has gone changes nothing.
    #[test]
    fn a_plan_ends() {
        let (programs, outcome) = planned();
        programs.refuse("no space");
        assert_eq!(outcome.try_recv().unwrap().0, Err("no space".into()));
        assert_eq!(programs.start().arguments, ["old"]);

        let (programs, outcome) = planned();
        programs.end();
        assert_eq!(outcome.recv_timeout(LOOK).unwrap_err(), RecvTimeoutError::Disconnected);

        let (programs, _outcome) = planned();
        assert!(programs.withdraw() && !programs.withdraw());
        assert_eq!(programs.start().arguments, ["old"]);
    }
}
