//! The mount keeper: a second small process, outside of the sandbox, that does what the serving process may no longer do.
//!
//! ```text
//!  serving process (images, clients, requests; in the sandbox)        keeper (mount, umount, files that go away at the end)
//!     │  starts it before anything is opened                             │  /proc/self/exe, a session of its own, cwd /
//!     ├── Remember pidfile, entry, socket, command ── SOCK_SEQPACKET ───▶│
//!     ├── Mount ────────────────────────────────────────────────────────▶│ placeholder, mount(2) or fusermount3
//!     │◀────────────────────────────────────────────── /dev/fuse ────────┤ and keeps no copy of it
//!     │  (becomes --user, enters the sandbox, serves)                    │
//!     ├── Unmount, Detach, Release, Remove, RunCommand ─────────────────▶│
//! ```
//!
//! A process under Landlock cannot unmount, not even lazily, and cannot remove a file. Somebody else has to, and it should be somebody who reads no
//! image and no client: the keeper knows sixteen requests about one mount, four files and those of
//! the chain, two attributes and one command, all named before the sandbox was
//! entered. A serving process that was taken over can have the command run when no stream has completed, more than once, or never, and choose the text
//! of the note of its stream; it cannot have another command run, nor tell it anything.
//!
//! It is the *child* of the serving process, not its parent: so the process that the user started, whose id stands in the pidfile, which gets the
//! signals and whose exit status counts, stays the one that serves the disk; a supervisor sees what it saw without a keeper.
//!
//! When the serving process dies, the socket ends, and so does the keeper, and leaves the mount as it is: dead, so that whoever uses it gets
//! ENOTCONN. An unmount would let the empty placeholder shine through. When the keeper dies, the serving process serves on, cannot
//! unmount, and says so at the end.
//!
//! **Touches:** one child process and the socket to it; there, the host side of [`crate::fuse`], the removal of files and, with `--user`, of the mark
//! of an open image, and the note of its stream; the command of `--on-complete`. **Never:** reads an
//! image or what a client sends; takes orders about another mount; removes a file that is not (device, inode) the one that was named, or from another
//! directory.
//! **Locks:** one leaf, the socket: a request and its reply belong together.

use std::ffi::OsStr;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use parking_lot::Mutex;
use rustix::net::{AddressFamily, Shutdown, SocketFlags, SocketType};

use crate::error::Context;
use crate::fuse::{MountPlan, Unmounted};
use crate::logging::Owners;
use crate::sandbox::Identity;
use crate::{Error, ErrorKind, Result};

mod hook;
mod looks;
mod process;
mod wire;

pub use process::{close_inherited, run};
pub use wire::Leftover;

use wire::{Answer, Reply, Request};

/// The hidden subcommand that a keeper is started with (see `cli`).
const SUBCOMMAND: &str = "keep-mount";

/// What the keeper's own standard output and standard error are.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Messages {
    /// Those of this process. Only a panic ever writes there, and the command of `--on-complete`.
    Inherited,
    /// Nowhere: somebody waits for the end of this one's.
    Dropped,
}

/// The keeper, as the serving process sees it.
#[derive(Debug)]
pub struct Keeper {
    line: Arc<Line>,
}

/// The way to the keeper, for any thread.
#[derive(Debug)]
struct Line {
    socket: OwnedFd,
    /// A request and its reply belong together.
    turn: Mutex<()>,
    lost: AtomicBool,
}

impl Keeper {
    /// Starts the keeper: to be called before anything is opened and before there are threads. It does not get to see the `hidden` variables of the environment.
    ///
    /// # Errors
    /// No socket, no process, no /proc.
    pub fn start(messages: Messages, hidden: &[&str]) -> Result<Keeper> {
        let what = || "starting the mount keeper";
        let (ours, theirs) = rustix::net::socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)
            .map_err(io::Error::from)
            .context(what)?;
        let output = || match messages {
            Messages::Inherited => Stdio::inherit(),
            Messages::Dropped => Stdio::null(),
        };
        let name = std::env::args_os().next().unwrap_or_else(|| "cordisk".into());
        let mut command = Command::new("/proc/self/exe");
        for name in hidden {
            command.env_remove(name);
        }
        command.arg0(name).arg(SUBCOMMAND).stdin(Stdio::from(theirs)).stdout(output()).stderr(output()).spawn().context(what)?;
        Ok(Keeper::over(ours))
    }

    fn over(socket: OwnedFd) -> Keeper {
        Keeper { line: Arc::new(Line { socket, turn: Mutex::default(), lost: AtomicBool::new(false) }) }
    }

    /// From now on the file at `path` belongs to the keeper, which removes it when the value that is returned is dropped, if it is still `identity`
    /// (device, inode).
    ///
    /// # Errors
    /// The keeper is gone.
    pub fn entrust(&self, what: Leftover, path: &Path, identity: (u64, u64)) -> Result<Entrusted<'_>> {
        self.ask(&Request::Remember { what, path: path.into(), identity })?;
        Ok(Entrusted { keeper: self, what })
    }

    /// The attribute `name` of the open `image` says that nobody has closed it: from now on it is for the keeper to remove it, when it is told so.
    /// It may when the user that we become may not.
    ///
    /// # Errors
    /// The keeper is gone.
    pub fn entrust_mark(&self, image: &OwnedFd, name: &str) -> Result<EntrustedMark<'_>> {
        self.line.ask(&Request::RememberMark(name.to_owned()), Some(image.as_fd()))?;
        Ok(EntrustedMark { keeper: self })
    }

    /// The attribute `name` of the open `image` says what is to be started again: from now on it is for the keeper to change it, when it is told so.
    /// It may when the user that we become may not.
    ///
    /// # Errors
    /// The keeper is gone.
    pub fn entrust_note(&self, image: &OwnedFd, name: &str) -> Result<EntrustedNote> {
        self.line.ask(&Request::RememberNote(name.to_owned()), Some(image.as_fd()))?;
        Ok(EntrustedNote { line: Arc::clone(&self.line) })
    }

    /// From now on [`Keeper::run_command`] runs `command`, with these variables in its environment, as `user` if there is one.
    ///
    /// # Errors
    /// It is too long; the keeper is gone.
    pub fn entrust_command(&self, command: &OsStr, environment: &[(&str, &OsStr)], user: Option<Identity>) -> Result<()> {
        let environment = environment.iter().map(|(name, value)| (OsStr::new(name).into(), (*value).into())).collect();
        let user = user.map(|Identity { uid, gid }| (uid, gid));
        self.ask(&Request::RememberCommand { command: command.into(), environment, user }).map(drop)
    }

    /// From now on [`Keeper::open_log`] opens the file at `path`, which may belong to `owners`.
    ///
    /// # Errors
    /// The keeper is gone.
    pub fn entrust_log(&self, path: &Path, owners: &Owners) -> Result<()> {
        self.ask(&Request::RememberLog { path: path.into(), owners: owners.clone() }).map(drop)
    }

    /// From now on what is returned says whether a path leads to one of these files, by device and
    /// inode. Paths that cannot be looked at soon do not.
    ///
    /// # Errors
    /// The keeper is gone.
    pub fn entrust_files(&self, files: Vec<(u64, u64)>) -> Result<impl Fn(&Path, (u64, u64)) -> bool + Send + Sync + use<>> {
        self.ask(&Request::RememberFiles(files))?;
        let line = Arc::clone(&self.line);
        Ok(move |path: &Path, identity| {
            let answer = line.ask(&Request::IsFile { path: path.into(), identity }, None);
            matches!(answer, Ok((Answer::Is(true), _)))
        })
    }

    /// Opens the log file anew: it was rotated.
    ///
    /// # Errors
    /// Those of [`crate::logging::open_file`]; the keeper is gone.
    pub fn open_log(&self) -> Result<File> {
        match self.ask(&Request::OpenLog)? {
            (Answer::Done, Some(file)) => Ok(file.into()),
            (answer, _) => Err(unexpected(&answer)),
        }
    }

    /// Starts the command, and does not wait for it. It is neither waited for nor ended when the keeper ends.
    ///
    /// # Errors
    /// There is none, it cannot be started, or the keeper is gone.
    pub fn run_command(&self) -> Result<()> {
        self.ask(&Request::RunCommand).map(drop)
    }

    /// Mounts. Returns the mount and the open /dev/fuse that serves it.
    ///
    /// # Errors
    /// Everything that is wrong with the mountpoint, /dev/fuse or the mount, on one line. Nothing stays mounted or created then.
    pub fn mount(&self, plan: &MountPlan) -> Result<(KeptMount<'_>, OwnedFd)> {
        match self.ask(&Request::Mount(plan.into()))? {
            (Answer::Mounted(path), Some(device)) => Ok((KeptMount { keeper: self, path: path.into() }, device)),
            (answer, _) => Err(unexpected(&answer)),
        }
    }

    /// The end: lets the keeper go and waits until it is gone. Everything entrusted to it has been dropped.
    ///
    /// # Errors
    /// It has died before: what it should have removed is still there.
    pub fn finish(self) -> Result<()> {
        let _turn = self.line.turn.lock();
        let _ = rustix::net::shutdown(&self.line.socket, Shutdown::Write);
        // Its end of the socket closes when it ends.
        while !self.line.is_lost() && matches!(wire::receive::<Reply>(&self.line.socket), Ok(Some(_))) {}
        if self.line.is_lost() { Err(gone()) } else { Ok(()) }
    }

    fn ask(&self, request: &Request) -> Result<(Answer, Option<OwnedFd>)> {
        self.line.ask(request, None)
    }
}

impl Line {
    fn is_lost(&self) -> bool {
        self.lost.load(Ordering::Relaxed)
    }

    fn ask(&self, request: &Request, descriptor: Option<BorrowedFd<'_>>) -> Result<(Answer, Option<OwnedFd>)> {
        let answered = {
            let _turn = self.turn.lock();
            wire::send(&self.socket, request, descriptor).and_then(|()| wire::receive::<Reply>(&self.socket))
        };
        let (reply, descriptor) = match answered {
            Ok(Some(answer)) => answer,
            Ok(None) => return Err(self.lose(None)),
            Err(error) if error.kind() == ErrorKind::InvalidArgument => return Err(error),
            Err(error) => return Err(self.lose(Some(error))),
        };
        for (level, text) in reply.log {
            let level = log::Level::iter().nth(level.saturating_sub(1)).unwrap_or(log::Level::Warn);
            log::log!(level, "{text}");
        }
        Ok((reply.result.map_err(Error::from)?, descriptor))
    }

    fn lose(&self, error: Option<Error>) -> Error {
        if let Some(error) = error {
            log::debug!("mount keeper: {error}");
        }
        self.lost.store(true, Ordering::Relaxed);
        gone()
    }
}

fn gone() -> Error {
    Error::new(
        ErrorKind::Io,
        "the mount keeper has died: unmount with umount(8) or fusermount3 -u, and remove what is left of mountpoint, socket and pidfile",
    )
}

fn unexpected(answer: &Answer) -> Error {
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
        if let Err(error) = self.keeper.ask(&Request::Remove(self.what)) {
            log::warn!("{error}");
        }
    }
}

/// The mark of an open image, which the keeper removes when told so. Dropping this leaves it: the image was not closed.
#[derive(Debug)]
pub struct EntrustedMark<'a> {
    keeper: &'a Keeper,
}

impl EntrustedMark<'_> {
    /// To be called when the image was closed, and all went well.
    ///
    /// # Errors
    /// Those of removexattr(2); the keeper is gone. The mark stays then, which only means that the next open looks for leaks in vain.
    pub fn remove(&self) -> Result<()> {
        self.keeper.ask(&Request::RemoveMark).map(drop)
    }
}

/// The note beside an open image, which the keeper changes when told so, by any thread.
#[derive(Debug)]
pub struct EntrustedNote {
    line: Arc<Line>,
}

impl EntrustedNote {
    /// Sets the note, or removes it.
    ///
    /// # Errors
    /// Those of fsetxattr(2) and fremovexattr(2); the keeper is gone.
    pub fn set(&self, note: Option<&str>) -> Result<()> {
        self.line.ask(&Request::SetNote(note.map(str::to_owned)), None).map(drop)
    }
}

/// Our mount. Dropping it detaches what is still mounted, and removes the placeholder.
#[derive(Debug)]
pub struct KeptMount<'a> {
    keeper: &'a Keeper,
    path: PathBuf,
}

impl KeptMount<'_> {
    /// The mountpoint: absolute, without symbolic links.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// As [`Keeper::open_log`].
    ///
    /// # Errors
    /// Those of [`Keeper::open_log`].
    pub fn open_log(&self) -> Result<File> {
        self.keeper.open_log()
    }

    /// As [`Keeper::run_command`].
    ///
    /// # Errors
    /// Those of [`Keeper::run_command`].
    pub fn run_command(&self) -> Result<()> {
        self.keeper.run_command()
    }

    /// Unmounts unless somebody has the disk open. The session ends a moment later.
    ///
    /// # Errors
    /// Neither done nor busy: it is still mounted and served.
    pub fn unmount(&self) -> Result<Unmounted> {
        match self.keeper.ask(&Request::Unmount)?.0 {
            Answer::Done => Ok(Unmounted::Done),
            Answer::Busy => Ok(Unmounted::Busy),
            answer => Err(unexpected(&answer)),
        }
    }

    /// Takes the disk away from whoever has it open: their requests fail with ENOTCONN from now on, and the session ends.
    ///
    /// # Errors
    /// It is still mounted.
    pub fn detach(&self) -> Result<()> {
        self.keeper.ask(&Request::Detach).map(drop)
    }
}

impl Drop for KeptMount<'_> {
    fn drop(&mut self) {
        if let Err(error) = self.keeper.ask(&Request::Release) {
            log::error!("{error}");
        }
    }
}
