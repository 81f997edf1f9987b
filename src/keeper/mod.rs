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
//! image and no client: the keeper knows fifteen requests about one mount, four files and those of the chain, the two attributes of one image and one
//! command, all named before the sandbox was entered. A serving process that was taken over can have the command run when no stream has completed, more
//! than once, or never, remove the mark of its open image, and choose the text of the note of its stream, at most 3 KiB; it cannot change an attribute
//! of another file or of another name, have another command run, or pass anything to the command.
//!
//! It is the *child* of the serving process, not its parent: so the process that the user started, whose id stands in the pidfile, which gets the
//! signals and whose exit status counts, stays the one that serves the disk; a supervisor sees what it saw without a keeper.
//!
//! When the serving process dies, the socket ends, and so does the keeper, and leaves the mount as it is: dead, so that whoever uses it gets
//! ENOTCONN. An unmount would let the empty placeholder shine through. When the keeper dies, the serving process serves on, cannot
//! unmount, and says so at the end.
//!
//! **Touches:** one child process and the socket to it; there, the host side of [`crate::fuse`], the removal of files, the
//! mark of an open image and the note of its stream; the command of `--on-complete`. **Never:** reads an
//! image or what a client sends; takes orders about another mount; removes a file that is not (device, inode) the one that was named, or from another
//! directory.
//! **Locks:** one leaf in the serving process, `line::Line`'s turn: a request and its reply belong together.

use std::ffi::OsStr;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;

use rustix::net::{AddressFamily, SocketFlags, SocketType};

use crate::error::Context;
use crate::fuse::{MountPlan, Unmounted};
use crate::logging::Owners;
use crate::sandbox::Identity;
use crate::{Error, ErrorKind, Result};

mod hook;
mod line;
mod looks;
mod process;
mod wire;

pub use process::{close_inherited, run};
pub use wire::Leftover;

use line::{Line, Wait};
use wire::{Answer, Request};

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
        let command = command.arg0(name).arg(SUBCOMMAND).stdin(Stdio::from(theirs)).stdout(output()).stderr(output());
        let keeper = command.spawn().context(what)?;
        Keeper::over(ours, keeper.id())
    }

    fn over(socket: OwnedFd, pid: u32) -> Result<Keeper> {
        Ok(Keeper { line: Arc::new(Line::new(socket, pid)?) })
    }

    /// From now on the file at `path` belongs to the keeper, which removes it when the value that is returned is dropped, if it is still `identity`
    /// (device, inode).
    ///
    /// # Errors
    /// The keeper is gone.
    pub fn entrust(&self, what: Leftover, path: &Path, identity: (u64, u64)) -> Result<Entrusted<'_>> {
        self.ask(Request::Remember { what, path: path.into(), identity })?;
        Ok(Entrusted { keeper: self, what })
    }

    /// From now on the keeper changes the attributes of the open `image`: the note of the stream, and
    /// the mark of an open image. The serving process may not in its sandbox, nor perhaps as the user
    /// that it becomes.
    ///
    /// # Errors
    /// The keeper is gone.
    pub fn entrust_image(&self, image: &OwnedFd) -> Result<EntrustedImage> {
        self.line.ask(Request::RememberImage, Some(image.as_fd()), Wait::Unbounded)?;
        Ok(EntrustedImage { line: Arc::clone(&self.line) })
    }

    /// From now on [`Keeper::run_command`] runs `command`, with these variables in its environment, as `user` if there is one.
    ///
    /// # Errors
    /// It is too long; the keeper is gone.
    pub fn entrust_command(&self, command: &OsStr, environment: &[(&str, &OsStr)], user: Option<Identity>) -> Result<()> {
        let environment = environment.iter().map(|(name, value)| (OsStr::new(name).into(), (*value).into())).collect();
        let user = user.map(|Identity { uid, gid }| (uid, gid));
        self.ask(Request::RememberCommand { command: command.into(), environment, user }).map(drop)
    }

    /// From now on [`Keeper::open_log`] opens the file at `path`, which may belong to `owners`.
    ///
    /// # Errors
    /// The keeper is gone.
    pub fn entrust_log(&self, path: &Path, owners: &Owners) -> Result<()> {
        self.ask(Request::RememberLog { path: path.into(), owners: owners.clone() }).map(drop)
    }

    /// From now on what is returned says whether a path leads to one of these files, by device and
    /// inode. Paths that cannot be looked at soon do not.
    ///
    /// # Errors
    /// The keeper is gone.
    pub fn entrust_files(&self, files: Vec<(u64, u64)>) -> Result<impl Fn(&Path, (u64, u64)) -> bool + Send + Sync + use<>> {
        self.ask(Request::RememberFiles(files))?;
        let line = Arc::clone(&self.line);
        Ok(move |path: &Path, identity| {
            let answer = line.ask(Request::IsFile { path: path.into(), identity }, None, Wait::Bounded);
            matches!(answer, Ok((Answer::Is(true), _)))
        })
    }

    /// Opens the log file anew: it was rotated.
    ///
    /// # Errors
    /// Those of [`crate::logging::open_file`]; the keeper is gone.
    pub fn open_log(&self) -> Result<File> {
        match self.line.ask(Request::OpenLog, None, Wait::Bounded)? {
            (Answer::Done, Some(file)) => Ok(file.into()),
            (answer, _) => Err(unexpected(&answer)),
        }
    }

    /// Starts the command, and does not wait for it. It is neither waited for nor ended when the keeper ends.
    ///
    /// # Errors
    /// There is none, it cannot be started, or the keeper is gone.
    pub fn run_command(&self) -> Result<()> {
        self.ask_briefly(Request::RunCommand).map(drop)
    }

    /// Mounts. Returns the mount and the open /dev/fuse that serves it.
    ///
    /// # Errors
    /// Everything that is wrong with the mountpoint, /dev/fuse or the mount, on one line. Nothing stays mounted or created then.
    pub fn mount(&self, plan: &MountPlan) -> Result<(KeptMount<'_>, OwnedFd)> {
        match self.ask(Request::Mount(plan.into()))? {
            (Answer::Mounted(path), Some(device)) => Ok((KeptMount { keeper: self, path: path.into() }, device)),
            (answer, _) => Err(unexpected(&answer)),
        }
    }

    /// The end: lets the keeper go and waits until it is gone. Everything entrusted to it has been dropped.
    ///
    /// # Errors
    /// It has died before, or does not end: what it should have removed may still be there.
    pub fn finish(self) -> Result<()> {
        self.line.finish()
    }

    /// Asks for something that mounts or unmounts, or that belongs to the start.
    fn ask(&self, request: Request) -> Result<(Answer, Option<OwnedFd>)> {
        self.line.ask(request, None, Wait::Unbounded)
    }

    /// Asks for something that must not take long.
    fn ask_briefly(&self, request: Request) -> Result<Answer> {
        self.line.ask(request, None, Wait::Bounded).map(|(answer, _)| answer)
    }
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
        if let Err(error) = self.keeper.ask_briefly(Request::Remove(self.what)) {
            log::warn!("{error}");
        }
    }
}

/// The attributes of the image, which the keeper changes, asked by any thread. Dropping this leaves the
/// mark of an open image: it was not closed.
#[derive(Clone, Debug)]
pub struct EntrustedImage {
    line: Arc<Line>,
}

impl EntrustedImage {
    /// Removes the mark of an open image: to be called when the image was closed, and all went well.
    ///
    /// # Errors
    /// Those of removexattr(2); the keeper is gone, or does not answer. The mark stays then: the next
    /// open looks for leaks and finds none.
    pub fn remove_mark(&self) -> Result<()> {
        self.line.ask(Request::RemoveMark, None, Wait::Bounded).map(drop)
    }

    /// Sets the note of the stream, or removes it.
    ///
    /// # Errors
    /// Those of fsetxattr(2) and fremovexattr(2); the note is longer than
    /// [`crate::attributes::LONGEST_STREAM_NOTE`]; the keeper is gone, or does not answer.
    pub fn set_note(&self, note: Option<&str>) -> Result<()> {
        self.line.ask(Request::SetNote(note.map(str::to_owned)), None, Wait::Bounded).map(drop)
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
        match self.keeper.ask(Request::Unmount)?.0 {
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
        self.keeper.ask(Request::Detach).map(drop)
    }
}

impl Drop for KeptMount<'_> {
    fn drop(&mut self) {
        if let Err(error) = self.keeper.ask(Request::Release) {
            log::error!("{error}");
        }
    }
}
