//! `cordisk mount` without `-f`: the program starts itself again and waits until that process is ready.
//!
//! No fork: the child is this program executed anew (`/proc/self/exe`) with the same arguments and a hidden option. Its standard output
//! is a pipe on which it says [`READY`]; its standard error is a pipe that the parent copies to its own. If the child dies, both pipes
//! end, so the parent cannot hang on a dead child. If the parent dies, the child's "ready" fails and it takes the mount down again.

use std::ffi::OsString;
use std::fs::File;
use std::io::{self, BufRead, BufReader, Write};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Command, Stdio};
use std::thread;

use super::notify;
use crate::error::Context;
use crate::keeper;
use crate::{Error, ErrorKind, Result};

/// What the child says when the disk is mounted and QMP clients can connect.
const READY: &str = "ready";

/// The hidden option of `cordisk mount` (see `cli`).
const CHILD_OPTION: &str = "--background-child";

/// The parent: starts the child, with `arguments` (the subcommand first), relays its messages, returns when it is ready (true) or has failed (false,
/// after its own message). `environment` is what the child gets beside that of this process.
///
/// # Errors
/// The child could not be started, or died without a word.
pub(super) fn start(mut arguments: impl Iterator<Item = OsString>, environment: &[(&str, &str)]) -> Result<bool> {
    let subcommand = arguments.next();
    let mut command = Command::new("/proc/self/exe");
    // A service manager knows the process that it has started, and this one is about to end.
    for name in notify::VARIABLES {
        command.env_remove(name);
    }
    let mut child = command
        // Not the name of this process, which may be that of mount(8)'s helper.
        .arg0("cordisk")
        .envs(environment.iter().copied())
        .args(subcommand)
        .arg(CHILD_OPTION)
        .args(arguments)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .context(|| "starting the background process")?;

    let relay = child
        .stderr
        .take()
        .map(|mut messages| thread::Builder::new().name("relay".into()).spawn(move || io::copy(&mut messages, &mut io::stderr())));
    let relay = match relay.transpose() {
        Ok(relay) => relay,
        Err(error) => {
            // It cannot say "ready" any more, and takes down what it has mounted. Its messages
            // would be lost.
            drop(child.stdout.take());
            let _ = child.wait();
            return Err(Error::io("starting a thread", error));
        }
    };
    let mut line = String::new();
    if let Some(output) = child.stdout.take() {
        // An error here means that the child is gone, like the end of the stream.
        let _ = BufReader::new(output).read_line(&mut line);
    }
    let ready = line.trim_end() == READY;
    let status = if ready { None } else { Some(child.wait().context(|| "waiting for the background process")?) };
    // A child that is ready has given its end of the pipe away.
    if let Some(relay) = relay {
        let _ = relay.join();
    }
    match status {
        None => Ok(true),
        Some(status) => match status.signal() {
            Some(signal) => Err(Error::new(ErrorKind::Io, format!("the background process was killed by signal {signal}"))),
            // It has said why; or was told to end before it was ready.
            None => Ok(false),
        },
    }
}

/// The child, first of all, while it has opened nothing itself: gives up what it has inherited (a descriptor of whoever called, kept for the
/// life of a daemon, would hold a pipe open or a lock), and gets a session of its own, so that the terminal's signals no longer reach it, and
/// the name that ps(1) shows ("exe" otherwise).
///
/// # Errors
/// Those of setsid(2).
pub(super) fn leave_terminal() -> Result<()> {
    keeper::close_inherited();
    let _ = rustix::thread::set_name(c"cordisk");
    rustix::process::setsid().map_err(io::Error::from).context(|| "setsid")?;
    Ok(())
}

/// What the child needs to let the parent go, opened while files can be opened.
pub(super) struct Ready {
    null: File,
}

impl Ready {
    /// Opens /dev/null.
    ///
    /// # Errors
    /// Those of open(2).
    pub(super) fn prepare() -> Result<Ready> {
        Ok(Ready { null: File::options().read(true).write(true).open("/dev/null").context(|| "/dev/null")? })
    }

    /// The child, last of all: lets the parent go and gives up its pipes.
    ///
    /// # Errors
    /// The parent is gone: nobody would know of this daemon.
    pub(super) fn say(self) -> Result<()> {
        let mut output = io::stdout().lock();
        writeln!(output, "{READY}").and_then(|()| output.flush()).context(|| "the process that started the daemon is gone")?;
        let redirect = rustix::stdio::dup2_stdout(&self.null).and_then(|()| rustix::stdio::dup2_stderr(&self.null));
        redirect.map_err(io::Error::from).context(|| "redirecting to /dev/null")
    }
}
