//! The command of `--on-complete`: named before the sandbox is entered, and run at the request of
//! the serving process.

use std::ffi::OsString;
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;

use crossbeam_channel::bounded;
use nix::unistd::{Uid, User};

use super::manager;
use host::error::Context;
use host::{Error, ErrorKind, Result};

/// The most commands that may run at the same time. A serving process that only runs streams never
/// asks for more, so further requests are refused.
const MOST_AT_A_TIME: usize = 16;

/// The variables that we set for a command. All of them are removed from the inherited environment
/// first: this mount may itself have been started by the command of another mount. So are those of
/// a service manager, which are for the keeper alone.
const NAMES: [&str; 4] = ["CORDISK_IMAGE", "CORDISK_MOUNTPOINT", "CORDISK_DEVICE", "CORDISK_QMP"];

/// A command, and the user that runs it.
#[derive(Debug)]
pub(super) struct Hook {
    command: OsString,
    environment: Vec<(OsString, OsString)>,
    /// The ids of user and group; `None` runs the command as the user of the keeper.
    user: Option<(u32, u32)>,
    running: Arc<AtomicUsize>,
}

impl Hook {
    /// Takes the command, and looks up the user's name and home directory now rather than at the
    /// run.
    pub(super) fn new(
        command: OsString,
        mut environment: Vec<(OsString, OsString)>,
        user: Option<(u32, u32)>,
    ) -> Hook {
        // Without this the command would inherit the variables of root.
        if let Some((uid, _)) = user
            && let Ok(Some(known)) = User::from_uid(Uid::from_raw(uid))
        {
            environment.push(("HOME".into(), known.dir.into()));
            environment
                .extend(["USER", "LOGNAME"].map(|name| (name.into(), OsString::from(&known.name))));
        }
        Hook { command, environment, user, running: Arc::default() }
    }

    /// Starts the command and does not wait for it. The command has our standard output and error,
    /// no other descriptor, and a process group of its own. With a `user` it has the rights of that
    /// user: no supplementary groups and no capabilities.
    ///
    /// # Errors
    /// The process cannot be started, or too many commands are running.
    pub(super) fn run(&self) -> Result<()> {
        let what = || "--on-complete: /bin/sh";
        if self.running.load(Ordering::Relaxed) >= MOST_AT_A_TIME {
            return Err(Error::new(
                ErrorKind::Busy,
                format!("--on-complete: {MOST_AT_A_TIME} of them run already"),
            ));
        }
        let mut command = Command::new("/bin/sh");
        NAMES.iter().chain(&manager::VARIABLES).for_each(|name| {
            command.env_remove(name);
        });
        command
            .arg("-c")
            .arg(&self.command)
            .envs(self.environment.iter().cloned())
            .current_dir("/")
            .stdin(Stdio::null())
            .process_group(0);
        if let Some((uid, gid)) = self.user {
            // The standard library sets the group first, then clears the supplementary groups, then
            // sets the user. It clears the groups only if it runs as root.
            command.gid(gid).uid(uid);
        }
        self.running.fetch_add(1, Ordering::Relaxed);
        let running = Arc::clone(&self.running);
        let (sender, started) = bounded(1);
        // The thread is started before the command. A command without a thread that waits for its
        // end would stay a zombie, and would be counted for ever.
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
