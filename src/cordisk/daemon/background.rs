//! `cordisk mount` without `-f`: the program starts itself again and waits until that process is
//! ready.
//!
//! The program does not fork: the child is this program executed anew (`/proc/self/exe`) with the
//! same arguments and a hidden option. It is the mount keeper, and starts the serving process
//! ([`crate::keeper`]). The serving process writes [`READY`] to its standard output, which is a
//! pipe. The parent copies the standard error of both, another pipe, to its own. If they die, both
//! pipes end, so the parent cannot hang. If the parent dies, the serving process fails to write
//! "ready" and unmounts the disk again.

use std::ffi::OsString;
use std::fs::File;
use std::io::{self, BufRead, BufReader, Write};
use std::os::fd::RawFd;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::Path;
use std::process::{Command, Stdio};
use std::thread;

use crate::keeper::{self, Keeper};
use host::error::Context;
use host::{Error, ErrorKind, Result};

/// The line that the serving process writes when the disk is mounted and QMP clients can connect.
const READY: &str = "ready";

/// The hidden option of `cordisk mount` (see `cli`).
const CHILD_OPTION: &str = "--background-child";

/// The hidden option of `cordisk mount` for a keeper of a disk that has lost its own (see `cli`).
pub(super) const KEEPER_OPTION: &str = "--keeper-of";

/// Starts the child, relays its messages, and waits until it is ready or has failed. Runs in the
/// parent. The first of `arguments` is the subcommand; `environment` is added to the child's
/// environment, and it starts in `directory` if there is one. Returns true if the child is ready,
/// and false if it has failed after a message of its own.
///
/// # Errors
/// The child or the relay thread could not be started, or a signal killed the child.
pub(super) fn start(
    mut arguments: impl Iterator<Item = OsString>,
    environment: &[(&str, &str)],
    directory: Option<&Path>,
) -> Result<bool> {
    let subcommand = arguments.next();
    let mut command = Command::new("/proc/self/exe");
    // A service manager knows only the process that it has started, and this one is about to end.
    for name in keeper::MANAGER_VARIABLES {
        command.env_remove(name);
    }
    command
        // The name of this process may be that of mount(8)'s helper.
        .arg0("cordisk")
        .envs(environment.iter().copied())
        .args(subcommand)
        .arg(CHILD_OPTION)
        .args(arguments)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    if let Some(directory) = directory {
        command.current_dir(directory);
    }
    let mut child = command.spawn().context(|| "starting the background process")?;

    let relay = child.stderr.take().map(|mut messages| {
        thread::Builder::new()
            .name("relay".into())
            .spawn(move || io::copy(&mut messages, &mut io::stderr()))
    });
    let relay = match relay.transpose() {
        Ok(relay) => relay,
        Err(error) => {
            // Without its standard output the child fails to report "ready" and unmounts the disk.
            // Without the relay thread its messages would be lost.
            drop(child.stdout.take());
            let _ = child.wait();
            return Err(Error::io("starting a thread", error));
        }
    };
    let mut line = String::new();
    if let Some(output) = child.stdout.take() {
        // An error here means that the child has died, as the end of the stream does.
        let _ = BufReader::new(output).read_line(&mut line);
    }
    let ready = line.trim_end() == READY;
    let status = if ready {
        None
    } else {
        Some(child.wait().context(|| "waiting for the background process")?)
    };
    // A child that is ready has closed its end of the pipe.
    if let Some(relay) = relay {
        let _ = relay.join();
    }
    match status {
        None => Ok(true),
        Some(status) => match status.signal() {
            Some(signal) => Err(Error::new(
                ErrorKind::Io,
                format!("the background process was killed by signal {signal}"),
            )),
            // The child has reported its error, or it was asked to end before it was ready.
            None => Ok(false),
        },
    }
}

/// Starts a keeper that goes on with the disk of a keeper that has died, whose socket is `socket`,
/// and waits until the disk has a serving process again.
///
/// # Errors
/// Those of [`start`]; the keeper has reported why it does not go on with the disk.
pub(super) fn start_keeper(
    mut arguments: Vec<OsString>,
    socket: &Path,
    directory: &Path,
) -> Result<()> {
    let mut option = OsString::from(format!("{KEEPER_OPTION}="));
    option.push(socket);
    arguments.insert(1.min(arguments.len()), option);
    match start(arguments.into_iter(), &[], Some(directory))? {
        true => Ok(()),
        false => Err(Error::new(ErrorKind::Io, "no new keeper; the disk is as it was before")),
    }
}

/// Detaches the keeper from the process that started it. Runs first in the keeper, before it opens
/// files.
///
/// Closes inherited descriptors except `kept`: a daemon that kept a descriptor of its caller would
/// keep a pipe open or a lock held. Starts a session of its own, so that signals of the terminal do
/// not reach it.
///
/// # Errors
/// Those of setsid(2).
pub(super) fn leave_terminal(kept: Option<RawFd>) -> Result<()> {
    keeper::close_inherited(kept);
    rustix::process::setsid().map_err(io::Error::from).context(|| "setsid")?;
    Ok(())
}

/// What the serving process needs to release the parent. The descriptor is opened while files can
/// be opened.
pub(super) struct Ready<'a> {
    null: File,
    keeper: &'a Keeper,
}

impl<'a> Ready<'a> {
    /// Opens /dev/null.
    ///
    /// # Errors
    /// Those of open(2).
    pub(super) fn prepare(keeper: &'a Keeper) -> Result<Ready<'a>> {
        let null = File::options().read(true).write(true).open("/dev/null");
        Ok(Ready { null: null.context(|| "/dev/null")?, keeper })
    }

    /// Reports "ready" to the parent and redirects standard output and error of the keeper and of
    /// this process to /dev/null. It is the last step of the start.
    ///
    /// # Errors
    /// The parent has died, so no process would know about this daemon.
    pub(super) fn say(self) -> Result<()> {
        // A keeper that has died holds no pipe of the caller.
        if let Err(error) = self.keeper.leave_console() {
            log::warn!("{error}");
        }
        let mut output = io::stdout().lock();
        writeln!(output, "{READY}")
            .and_then(|()| output.flush())
            .context(|| "the process that started the daemon is gone")?;
        let redirect = rustix::stdio::dup2_stdout(&self.null)
            .and_then(|()| rustix::stdio::dup2_stderr(&self.null));
        redirect.map_err(io::Error::from).context(|| "redirecting to /dev/null")
    }
}
