//! The command of `--on-complete`: known before the sandbox is entered, run when the serving process says so.

use std::ffi::OsString;
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;

use crossbeam_channel::bounded;
use nix::unistd::{Uid, User};

use crate::error::Context;
use crate::{Error, ErrorKind, Result};

/// Who orders more than so many that do not end is not obeyed: it is nobody who streams.
const MOST_AT_A_TIME: usize = 16;

/// All that a command is told by us. What is not known to this one must not come from another mount whose command has started it.
const NAMES: [&str; 4] = ["CORDISK_IMAGE", "CORDISK_MOUNTPOINT", "CORDISK_DEVICE", "CORDISK_QMP"];

/// A command, and whoever runs it.
#[derive(Debug)]
pub(super) struct Hook {
    command: OsString,
    environment: Vec<(OsString, OsString)>,
    /// The ids of user and group; `None` is whoever runs the keeper.
    user: Option<(u32, u32)>,
    running: Arc<AtomicUsize>,
}

impl Hook {
    /// Takes the command; nothing is looked up when it runs.
    pub(super) fn new(command: OsString, mut environment: Vec<(OsString, OsString)>, user: Option<(u32, u32)>) -> Hook {
        // Those of root would be of no use.
        if let Some((uid, _)) = user
            && let Ok(Some(known)) = User::from_uid(Uid::from_raw(uid))
        {
            environment.push(("HOME".into(), known.dir.into()));
            environment.extend(["USER", "LOGNAME"].map(|name| (name.into(), OsString::from(&known.name))));
        }
        Hook { command, environment, user, running: Arc::default() }
    }

    /// Starts it and does not wait for it. It has our standard output and error, no other descriptor, and a process group of its own; with a user
    /// it has that one's rights: no supplementary groups, no capabilities.
    ///
    /// # Errors
    /// No process; too many of them.
    pub(super) fn run(&self) -> Result<()> {
        let what = || "--on-complete: /bin/sh";
        if self.running.load(Ordering::Relaxed) >= MOST_AT_A_TIME {
            return Err(Error::new(ErrorKind::Busy, format!("--on-complete: {MOST_AT_A_TIME} of them run already")));
        }
        let mut command = Command::new("/bin/sh");
        NAMES.iter().for_each(|name| {
            command.env_remove(name);
        });
        command.arg("-c").arg(&self.command).envs(self.environment.iter().cloned()).current_dir("/").stdin(Stdio::null()).process_group(0);
        if let Some((uid, gid)) = self.user {
            // The group first, then no groups, then the user: the standard library does it in this order, and gives the groups up for root.
            command.gid(gid).uid(uid);
        }
        self.running.fetch_add(1, Ordering::Relaxed);
        let running = Arc::clone(&self.running);
        let (sender, started) = bounded(1);
        // The thread first: a command that runs with nobody to wait for its end would stay a zombie, and be counted for ever.
        let body = move || {
            let spawned = command.spawn();
            let (told, child) = match spawned {
                Ok(child) => (Ok(()), Some(child)),
                Err(error) => (Err(error), None),
            };
            let _ = sender.send(told);
            match child.map(|mut child| child.wait()) {
                None => {}
                Some(Ok(status)) if status.success() => log::debug!("--on-complete: done"),
                Some(Ok(status)) => log::warn!("--on-complete: {status}"),
                Some(Err(error)) => log::warn!("--on-complete: {error}"),
            }
            running.fetch_sub(1, Ordering::Relaxed);
        };
        if let Err(error) = thread::Builder::new().name("on-complete".into()).spawn(body) {
            self.running.fetch_sub(1, Ordering::Relaxed);
            return Err(Error::io(what(), error));
        }
        started.recv().unwrap_or_else(|_| Err(std::io::Error::other("no answer"))).context(what)
    }
}
