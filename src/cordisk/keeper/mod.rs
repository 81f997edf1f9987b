//! The mount keeper: the small process that the user, or a supervisor, has started. It starts the
//! serving process as its child, and performs the operations that the child may no longer perform.
//!
//! ```text
//!  keeper                                          serving process
//!  (mount, umount, removal of files at the end)    (images, clients, requests; in the sandbox)
//!     │ executes itself without credentials           │ /proc/self/exe, own session
//!     ├─ starts the serving process ─────────────────▶│ over SOCK_SEQPACKET, its standard input
//!     │◀── Remember pidfile, entry, socket, command ──┤
//!     │◀──────────────────────────────────── Mount ───┤ placeholder, mount(2) or fusermount3
//!     ├─ /dev/fuse ──────────────────────────────────▶│
//!     │                    (becomes --user, enters the sandbox, answers INIT)
//!     │◀─ Keep: /dev/fuse and clones, image, journal ─┤ (serves)
//!     ├─ SIGTERM, SIGINT, SIGHUP, SIGQUIT ───────────▶│
//!     │◀──────────── Unmount, Detach, Release, Remove,┤
//!     │                        RunCommand, ConnectLog │
//!     │◀─────────────── messages to a service manager ┤ which a thread relays
//!     │ ends with the same exit status ◀──────────────┤
//! ```
//!
//! A process under Landlock cannot unmount, not even lazily, and cannot remove a file. Another
//! process has to, and it should read neither images nor messages of clients. The keeper knows
//! twenty-nine requests. They concern one mount, its session, four files, the files of the chain,
//! two attributes of one image, one command, the fetcher, the service manager, and the system log.
//! All of these except the last two were named before the serving process entered the sandbox. One
//! more is about the jobs of the disk, a text that the keeper does not read.
//!
//! A serving process that was taken over by an attacker can run the command when no stream has
//! completed, run it more than once, or never run it. It can write to the system log, tell the
//! service manager anything, remove the mark of its open image, and choose the text of the note of
//! its stream, at most 3 KiB, and the text of its jobs for a successor. It cannot change an
//! attribute of another file or of another name, run another command, or pass anything to the
//! command.
//!
//! The keeper is the *parent* of the serving process. So the process that a supervisor watches is
//! the one that outlives the other: its id is in the pidfile and in the registry, it gets the
//! signals and passes them on, a service manager hears its messages, and it ends when the serving
//! process has ended, with the same exit status (`serving.rs`).
//!
//! When the serving process is killed, the keeper starts a successor with the same arguments, which
//! gets the descriptors and takes the disk over (`legacy.rs`). `cordisk upgrade` has another
//! program started in the same way (`upgrade.rs`). The keeper reads and writes none of the
//! descriptors. If it gives up, or the session cannot be taken over, it prints one line and ends
//! with status 1. It then leaves the mount in place as a dead mount, so that programs that use it
//! get ENOTCONN. An unmount would make the empty placeholder visible.
//!
//! When the keeper dies, the serving process goes on serving. It logs that once, and cannot
//! unmount. It listens in place of the keeper (`orphan.rs`) and gives its descriptors to a new one,
//! which `cordisk upgrade` starts (`estate.rs`). The keeper of a service has its descriptors in the
//! store of systemd as well, so that the next main process of the service goes on with the disk.
//!
//! A keeper in the foreground belongs to the session of its terminal, and the serving process has a
//! session of its own. Ctrl-C so reaches the serving process once, through the keeper. Ctrl-Z stops
//! the keeper alone: the disk is served on, and what the serving process asks for meanwhile waits
//! until the keeper is continued, as `line.rs` says.
//!
//! **Touches:** in the keeper: one child process and the socket to it, the fetcher, signals, the
//! environment, the socket of a service manager, the host side of [`crate::mount`], the removal of
//! files, a socket for `cordisk upgrade`, the mark of an open image and the note of its stream, and
//! the command of `--on-complete`; in the serving process: the other end of the socket. **Never:**
//! reads an image or a message of a client; accepts a request about another mount; removes a file
//! whose (device, inode) is not the one that was named, or a file in another directory.
//! **Locks:** one leaf lock in the serving process, `line::KeeperLine`'s turn: it is held from a
//! request to its reply. One leaf lock in the keeper holds the process id of the serving process
//! while a signal is sent to it, and one the programs that are started now and next.

use std::ffi::OsStr;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, SystemTime};

use nix::sys::socket::getsockopt;
use nix::sys::socket::sockopt::PeerCredentials;

use crate::fetching::FetcherPlan;
use crate::logging::{Daemon, Owners};
use crate::mount::{MountPlan, Unmounted};
use crate::sandbox::Identity;
use engine::disk::Inheritance;
use export::{Connected, Negotiated, ShownAttributes};
use host::error::Context;
use host::storage::{MemoryFile, SharedBytes};
use host::{Error, ErrorKind, Result};
use remote::line::{StartedFetcher, Starter};

mod estate;
mod hook;
mod learned;
mod legacy;
mod line;
mod looks;
mod manager;
mod orphan;
mod process;
mod serving;
mod upgrade;
mod wire;

pub use estate::Estate;
pub use learned::LONGEST_LEARNED;
pub use manager::{PATIENCE as MANAGER_PATIENCE, VARIABLES as MANAGER_VARIABLES};
pub use serving::{Console, KeeperStart, PASSED_ON, close_inherited, run};
pub use upgrade::{Contact, HANDED_OVER, socket_beside};
pub use wire::Leftover;

use line::{KeeperLine, Wait};
use orphan::Orphan;
use wire::{Heirloom, KeeperAnswer, KeeperRequest, KeptPast, KeptSession};

/// What a serving process that has died leaves to its successor.
#[derive(Debug)]
pub struct Inherited {
    /// The image; `None` if the disk is read-only.
    pub image: Option<Inheritance>,
    /// The descriptors of the session.
    pub devices: Vec<OwnedFd>,
    /// The memory of the requests, if they come over io_uring.
    pub requests: Option<OwnedFd>,
    /// What INIT has agreed on.
    pub negotiated: Negotiated,
    /// What stat(2) has shown.
    pub attributes: Option<ShownAttributes>,
    /// The jobs, as the process has last given them to [`Keeper::jobs_keeper`].
    pub jobs: Option<String>,
    /// How often the disk was taken over since the mount, with this time.
    pub takeovers: u64,
    /// When the disk was mounted.
    pub mounted: Option<SystemTime>,
}

/// The keeper, as seen from the serving process.
#[derive(Debug)]
pub struct Keeper {
    line: Arc<KeeperLine>,
    orphan: Arc<Orphan>,
}

impl Keeper {
    /// Takes over standard input, which is the socket to the keeper that has started this process.
    /// Must be called before this process opens files or starts threads. The process gets a session
    /// of its own, so that signals of the terminal reach the keeper alone.
    ///
    /// # Errors
    /// Standard input is not a socket: this process was not started by a keeper.
    pub fn of_this_process() -> Result<Keeper> {
        let what = || "--serving-process is not for use by hand: standard input";
        // The peer is the process that has made both ends, even if it has died meanwhile.
        let peer = getsockopt(&io::stdin(), PeerCredentials).map_err(io::Error::from);
        let peer = peer.context(what)?;
        // setsid(2) fails only for the leader of a process group, which has its own already.
        let _ = rustix::process::setsid();
        let _ = rustix::thread::set_name(c"cordisk");
        let socket = io::stdin().as_fd().try_clone_to_owned().context(what)?;
        let null = File::open("/dev/null").context(|| "/dev/null")?;
        rustix::stdio::dup2_stdin(&null).map_err(io::Error::from).context(|| "/dev/null")?;
        Keeper::over(socket, u32::try_from(peer.pid()).unwrap_or(0))
    }

    fn over(socket: OwnedFd, pid: u32) -> Result<Keeper> {
        Ok(Keeper { line: Arc::new(KeeperLine::new(socket, pid)?), orphan: Arc::default() })
    }

    /// The process id of the keeper, which is the main process of this disk.
    pub fn pid(&self) -> u32 {
        self.line.pid()
    }

    /// Starts a thread that logs the death of the keeper once, and calls `dies` before. Then it
    /// waits for a new keeper, and calls `hand_over` when that one asks for the disk.
    ///
    /// # Errors
    /// The thread cannot be started.
    pub fn watch(
        &self,
        dies: impl FnOnce() + Send + 'static,
        hand_over: impl Fn() + Send + 'static,
    ) -> Result<()> {
        let (line, orphan) = (Arc::clone(&self.line), Arc::clone(&self.orphan));
        let body = move || {
            if line.dies() {
                dies();
                log::error!(
                    "the mount keeper (process {}) has died; the disk is served on, and no other process takes it over until it has a new keeper: cordisk upgrade",
                    line.pid()
                );
                orphan.wait_for_a_keeper(hand_over);
            }
        };
        let started = thread::Builder::new().name("keeper-end".into()).spawn(body);
        started.map(drop).context(|| "starting a thread that watches the mount keeper")
    }

    /// Returns the socket that takes messages to the service manager, and the interval of its
    /// watchdog. Returns no socket if the keeper was not started by a service manager, in the
    /// foreground.
    ///
    /// # Errors
    /// The keeper has died.
    pub fn connect_manager(&self) -> Result<Option<(OwnedFd, Option<Duration>)>> {
        match self.ask(KeeperRequest::ConnectManager)? {
            (KeeperAnswer::Manager { watchdog }, socket) => {
                Ok(socket.map(|socket| (socket, watchdog)))
            }
            (answer, _) => Err(unexpected(&answer)),
        }
    }

    /// Makes the keeper replace its standard output and standard error by /dev/null, because the
    /// caller of `cordisk mount` waits for their end.
    ///
    /// # Errors
    /// The keeper has died or does not answer.
    pub fn leave_console(&self) -> Result<()> {
        self.ask_briefly(KeeperRequest::LeaveConsole).map(drop)
    }

    /// Entrusts the file at `path` to the keeper. The keeper removes it when the returned value is
    /// dropped, if it still has the (device, inode) `identity`.
    ///
    /// # Errors
    /// The keeper has died.
    pub fn entrust(
        &self,
        what: Leftover,
        path: &Path,
        identity: (u64, u64),
    ) -> Result<Entrusted<'_>> {
        self.ask(KeeperRequest::Remember { what, path: path.into(), identity })?;
        Ok(Entrusted { keeper: self, what })
    }

    /// Entrusts the extended attributes of the open `image` to the keeper: the note of the stream,
    /// and the mark of an open image. The serving process cannot change them in its sandbox, and
    /// perhaps not as the user that it becomes.
    ///
    /// # Errors
    /// The keeper has died.
    pub fn entrust_image(&self, image: &OwnedFd) -> Result<EntrustedImage> {
        self.line.ask(KeeperRequest::RememberImage, Some(image.as_fd()), Wait::Unbounded)?;
        Ok(EntrustedImage { line: Arc::clone(&self.line) })
    }

    /// Names the order that the disk may leave, and the user and group with whose rights it is
    /// stored. The returned function stores it.
    ///
    /// # Errors
    /// There is no such directory; there is no memory; the keeper has died.
    pub fn entrust_order(
        &self,
        path: &Path,
        user: Option<(u32, u32)>,
    ) -> Result<impl Fn(&[u8]) -> Result<()> + Send + Sync + use<>> {
        let memory = MemoryFile::new(LONGEST_LEARNED)?;
        let request = KeeperRequest::RememberOrder { path: path.into(), user };
        self.line.ask(request, Some(memory.as_fd()), Wait::Unbounded)?;
        let line = Arc::clone(&self.line);
        Ok(move |bytes: &[u8]| {
            if bytes.len() as u64 > LONGEST_LEARNED {
                return Err(Error::new(ErrorKind::InvalidArgument, "the order is too long"));
            }
            memory.write_at(0, bytes).context(|| "--learn")?;
            let request = KeeperRequest::StoreOrder { len: bytes.len() as u64 };
            line.ask(request, None, Wait::Bounded).map(drop)
        })
    }

    /// Entrusts the command of `--on-complete` to the keeper. [`Keeper::run_command`] runs
    /// `command` with these variables in its environment, and as `user` if there is one.
    ///
    /// # Errors
    /// The command is too long, or the keeper has died.
    pub fn entrust_command(
        &self,
        command: &OsStr,
        environment: &[(&str, &OsStr)],
        user: Option<Identity>,
    ) -> Result<()> {
        let environment = environment
            .iter()
            .map(|(name, value)| (OsStr::new(name).into(), (*value).into()))
            .collect();
        let user = user.map(|Identity { uid, gid }| (uid, gid));
        self.ask(KeeperRequest::RememberCommand { command: command.into(), environment, user })
            .map(drop)
    }

    /// Names the program of the fetcher to the keeper. The returned function makes the keeper start
    /// it, and returns the socket to it.
    ///
    /// # Errors
    /// The keeper has died. The function fails with the errors of
    /// [`crate::fetching::Fetchers::start`].
    pub fn entrust_fetcher(&self, plan: &FetcherPlan) -> Result<Starter> {
        let arguments = plan.arguments.iter().map(|argument| argument.as_os_str().into()).collect();
        let program = plan.program.as_path().into();
        self.ask(KeeperRequest::RememberFetcher { program, arguments })?;
        let line = Arc::clone(&self.line);
        Ok(Box::new(move || match line.ask(KeeperRequest::StartFetcher, None, Wait::Bounded)? {
            (KeeperAnswer::Started { before }, Some(socket)) => {
                Ok(StartedFetcher { socket, before })
            }
            (answer, _) => Err(unexpected(&answer)),
        }))
    }

    /// Names the log file at `path` for [`Keeper::open_log`]. The file may belong to one of
    /// `owners`.
    ///
    /// # Errors
    /// The keeper has died.
    pub fn entrust_log(&self, path: &Path, owners: &Owners) -> Result<()> {
        self.ask(KeeperRequest::RememberLog { path: path.into(), owners: owners.clone() }).map(drop)
    }

    /// Names the backing files to the keeper by (device, inode). The returned function tells
    /// whether a path leads to one of them. It returns false for a path that cannot be looked up in
    /// time.
    ///
    /// # Errors
    /// The keeper has died.
    pub fn entrust_files(
        &self,
        files: Vec<(u64, u64)>,
    ) -> Result<impl Fn(&Path, (u64, u64)) -> bool + Send + Sync + use<>> {
        self.ask(KeeperRequest::RememberFiles(files))?;
        let line = Arc::clone(&self.line);
        Ok(move |path: &Path, identity| {
            let answer = line.ask(
                KeeperRequest::IsFile { path: path.into(), identity },
                None,
                Wait::Bounded,
            );
            matches!(answer, Ok((KeeperAnswer::Is(true), _)))
        })
    }

    /// Opens the log file again after its rotation.
    ///
    /// # Errors
    /// Those of [`crate::logging::open_file`], or the keeper has died.
    pub fn open_log(&self) -> Result<File> {
        match self.line.ask(KeeperRequest::OpenLog, None, Wait::Bounded)? {
            (KeeperAnswer::Done, Some(file)) => Ok(file.into()),
            (answer, _) => Err(unexpected(&answer)),
        }
    }

    /// Returns a function that connects again to a log daemon of the system, for use after that
    /// daemon was restarted.
    ///
    /// # Errors
    /// The returned function fails with the errors of [`Daemon::connect`], or if the keeper has
    /// died or does not answer.
    pub fn log_connector(&self) -> impl Fn(Daemon) -> Result<UnixDatagram> + Send + use<> {
        let line = Arc::clone(&self.line);
        move |daemon| match line.ask(KeeperRequest::ConnectLog(daemon), None, Wait::Bounded)? {
            (KeeperAnswer::Done, Some(socket)) => Ok(socket.into()),
            (answer, _) => Err(unexpected(&answer)),
        }
    }

    /// Starts the command, and returns without waiting for it. When the keeper ends, it neither
    /// waits for the command nor ends it. `completed` is the number of streams that have completed
    /// since the mount: the command is not started again for those for which it was.
    ///
    /// # Errors
    /// No command was named, it cannot be started, or the keeper has died.
    pub fn run_command(&self, completed: u64) -> Result<()> {
        self.ask_briefly(KeeperRequest::RunCommand { completed }).map(drop)
    }

    /// Mounts the disk. Returns the mount and the open /dev/fuse that serves it.
    ///
    /// # Errors
    /// Every problem of the mountpoint, of /dev/fuse or of the mount, on one line. After an error
    /// nothing stays mounted or created.
    pub fn mount(&self, plan: &MountPlan) -> Result<(KeptMount<'_>, OwnedFd)> {
        match self.ask(KeeperRequest::Mount(plan.into()))? {
            (KeeperAnswer::Mounted(path), Some(device)) => {
                Ok((KeptMount { keeper: self, path: path.into(), is_served: true }, device))
            }
            (answer, _) => Err(unexpected(&answer)),
        }
    }

    /// Returns what a serving process that has died has left; `None` if this is the first one.
    ///
    /// # Errors
    /// The keeper has died, or cannot duplicate a descriptor.
    pub fn inherited(&self) -> Result<Option<Inherited>> {
        let KeeperAnswer::Inherited { session, has_journal, devices, past } =
            self.ask(KeeperRequest::Inherit)?.0
        else {
            return Ok(None);
        };
        let Some(KeptSession { negotiated, attributes }) = session else { return Ok(None) };
        let take = |what| match self.ask(KeeperRequest::Take(what))? {
            (_, Some(descriptor)) => {
                if what != Heirloom::Witness {
                    self.orphan.has(what, &descriptor);
                }
                Ok(descriptor)
            }
            (answer, None) => Err(unexpected(&answer)),
        };
        let image = if has_journal {
            let journal = MemoryFile::of_descriptor(take(Heirloom::Journal)?)?;
            Some(Inheritance {
                image: take(Heirloom::Image)?,
                witness: take(Heirloom::Witness)?.into(),
                journal: Arc::new(journal),
            })
        } else {
            None
        };
        let devices = (0..devices).map(|number| take(Heirloom::Device(number)));
        let devices = devices.collect::<Result<_>>()?;
        let requests = negotiated.rings.map(|_| take(Heirloom::Requests)).transpose()?;
        let KeptPast { jobs, takeovers, mounted } = past;
        Ok(Some(Inherited {
            image,
            devices,
            requests,
            negotiated,
            attributes,
            jobs,
            takeovers,
            mounted,
        }))
    }

    /// Adopts the mount of the process that has left it. Dropping the returned value leaves the
    /// mount as it is until [`KeptMount::is_served`].
    ///
    /// # Errors
    /// Nothing is mounted, or the keeper has died.
    pub fn adopt_mount(&self) -> Result<KeptMount<'_>> {
        match self.ask(KeeperRequest::AdoptMount)? {
            (KeeperAnswer::Mounted(path), listener) => {
                self.orphan.listens(listener);
                self.orphan.kept();
                Ok(KeptMount { keeper: self, path: path.into(), is_served: false })
            }
            (answer, _) => Err(unexpected(&answer)),
        }
    }

    /// Gives the keeper a duplicate of everything by which a successor can take the disk over: the
    /// image and its journal, if it is written, and the descriptors of the session. No request of
    /// the kernel may have been read before. From then on the keeper starts a successor if this
    /// process is killed.
    ///
    /// # Errors
    /// The keeper has died, or cannot open the image once more.
    pub fn keep(
        &self,
        image: Option<(BorrowedFd<'_>, BorrowedFd<'_>)>,
        session: &Connected,
        attributes: Option<ShownAttributes>,
    ) -> Result<()> {
        let keep = |what, descriptor| {
            self.orphan.has(what, descriptor);
            self.line.ask(KeeperRequest::Keep(what), Some(descriptor), Wait::Unbounded)
        };
        if let Some((image, journal)) = image {
            keep(Heirloom::Image, image)?;
            keep(Heirloom::Journal, journal)?;
        }
        for (number, device) in session.devices().into_iter().enumerate() {
            keep(Heirloom::Device(number), device)?;
        }
        if let Some(requests) = session.shared_memory() {
            keep(Heirloom::Requests, requests)?;
        }
        let negotiated = session.negotiated().clone();
        let session = KeptSession { negotiated, attributes };
        let (_, listener) = self.ask(KeeperRequest::KeepSession(session))?;
        self.orphan.listens(listener);
        self.orphan.kept();
        Ok(())
    }

    /// Returns a function that tells the keeper of changed attributes. It waits for the keeper.
    pub fn attributes_keeper(&self) -> impl Fn(&ShownAttributes) -> Result<()> + Send + use<> {
        let (line, orphan) = (Arc::clone(&self.line), Arc::clone(&self.orphan));
        move |attributes| {
            orphan.has_attributes(attributes);
            line.ask(KeeperRequest::KeepAttributes(*attributes), None, Wait::Bounded).map(drop)
        }
    }

    /// Returns a function that gives the keeper the jobs of the disk for a successor. It waits for
    /// the keeper.
    pub fn jobs_keeper(&self) -> impl Fn(&str) -> Result<()> + Send + Sync + use<> {
        let (line, orphan) = (Arc::clone(&self.line), Arc::clone(&self.orphan));
        move |text| {
            orphan.has_jobs(text);
            line.ask(KeeperRequest::KeepJobs(text.into()), None, Wait::Bounded).map(drop)
        }
    }

    /// Tells the keeper that this process ends. Every value entrusted to it has been dropped
    /// before.
    ///
    /// # Errors
    /// The keeper has died before, or does not end. Files that it should have removed may still
    /// exist.
    pub fn finish(self) -> Result<()> {
        self.line.finish()
    }

    /// Sends a request that mounts or unmounts, or that belongs to the start; waits without a
    /// bound.
    fn ask(&self, request: KeeperRequest) -> Result<(KeeperAnswer, Option<OwnedFd>)> {
        self.line.ask(request, None, Wait::Unbounded)
    }

    /// Sends a request that must not take long; waits for a bounded time.
    fn ask_briefly(&self, request: KeeperRequest) -> Result<KeeperAnswer> {
        self.line.ask(request, None, Wait::Bounded).map(|(answer, _)| answer)
    }
}

fn unexpected(answer: &KeeperAnswer) -> Error {
    Error::new(ErrorKind::Io, format!("the mount keeper answered {answer:?}"))
}

/// A file that the keeper removes when this is dropped.
#[derive(Debug)]
pub struct Entrusted<'a> {
    keeper: &'a Keeper,
    what: Leftover,
}

impl Drop for Entrusted<'_> {
    fn drop(&mut self) {
        if let Err(error) = self.keeper.ask_briefly(KeeperRequest::Remove(self.what)) {
            log::warn!("{error}");
        }
    }
}

/// The extended attributes of the image, which the keeper changes on behalf of any thread. Dropping
/// this leaves the mark of an open image in place, since the image was not closed.
#[derive(Clone, Debug)]
pub struct EntrustedImage {
    line: Arc<KeeperLine>,
}

impl EntrustedImage {
    /// Removes the mark of an open image. Must be called only after the image was closed without an
    /// error.
    ///
    /// # Errors
    /// Those of removexattr(2), or the keeper has died or does not answer. The mark stays then, and
    /// the next open looks for leaks and finds none.
    pub fn remove_mark(&self) -> Result<()> {
        self.line.ask(KeeperRequest::RemoveMark, None, Wait::Bounded).map(drop)
    }

    /// Sets the note of the stream, or removes it.
    ///
    /// # Errors
    /// Those of fsetxattr(2) and fremovexattr(2); the note is longer than
    /// [`host::attributes::LONGEST_STREAM_NOTE`]; the keeper has died or does not answer.
    pub fn set_note(&self, note: Option<&str>) -> Result<()> {
        self.line
            .ask(KeeperRequest::SetNote(note.map(str::to_owned)), None, Wait::Bounded)
            .map(drop)
    }
}

/// Our mount. Dropping it detaches the mounts that are left, and removes the placeholder.
#[derive(Debug)]
pub struct KeptMount<'a> {
    keeper: &'a Keeper,
    path: PathBuf,
    /// Whether this process answers for the mount. A successor that fails before it serves leaves
    /// the mount to the next one.
    is_served: bool,
}

impl KeptMount<'_> {
    /// The mountpoint: absolute, without symbolic links.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Says that the mount is served.
    ///
    /// # Errors
    /// The keeper has died or does not answer. The mount is served all the same.
    pub fn is_served(&mut self) -> Result<()> {
        self.is_served = true;
        let (_, listener) = self.keeper.line.ask(KeeperRequest::Serving, None, Wait::Bounded)?;
        if listener.is_some() {
            self.keeper.orphan.listens(listener);
        }
        Ok(())
    }

    /// Tells whether a successor follows if this process leaves the disk: everything is kept, and
    /// the keeper lives, or a new one waits.
    pub fn has_successor(&self) -> bool {
        let Keeper { line, orphan } = self.keeper;
        orphan.is_kept() && (line.is_alive() || orphan.is_asked())
    }

    /// Says why the disk is not left to a successor now.
    ///
    /// # Errors
    /// The keeper has died or does not answer.
    pub fn cannot_hand_over(&self, why: &str) -> Result<()> {
        if self.keeper.orphan.refuse(why) {
            return Ok(());
        }
        self.keeper.ask_briefly(KeeperRequest::CannotHandOver(why.to_owned())).map(drop)
    }

    /// Calls [`Keeper::open_log`].
    ///
    /// # Errors
    /// Those of [`Keeper::open_log`].
    pub fn open_log(&self) -> Result<File> {
        self.keeper.open_log()
    }

    /// Calls [`Keeper::run_command`].
    ///
    /// # Errors
    /// Those of [`Keeper::run_command`].
    pub fn run_command(&self, completed: u64) -> Result<()> {
        self.keeper.run_command(completed)
    }

    /// Unmounts the disk unless a program has it open. The session ends a moment later.
    ///
    /// # Errors
    /// The unmount failed for another reason than use; the disk is still mounted and served.
    pub fn unmount(&self) -> Result<Unmounted> {
        match self.keeper.ask(KeeperRequest::Unmount)?.0 {
            KeeperAnswer::Done => Ok(Unmounted::Done),
            KeeperAnswer::Busy => Ok(Unmounted::Busy),
            answer => Err(unexpected(&answer)),
        }
    }

    /// Detaches the disk from the programs that have it open. Their requests fail with ENOTCONN
    /// from then on, and the session ends.
    ///
    /// # Errors
    /// The disk is still mounted.
    pub fn detach(&self) -> Result<()> {
        self.keeper.ask(KeeperRequest::Detach).map(drop)
    }
}

impl Drop for KeptMount<'_> {
    fn drop(&mut self) {
        if self.is_served
            && let Err(error) = self.keeper.ask(KeeperRequest::Release)
        {
            log::error!("{error}");
        }
    }
}
