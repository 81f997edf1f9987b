//! Daemons whose disk is unmounted and that have not ended: umount(8) returns before the daemon has
//! written back all data and closed its image.

use std::io::Write;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::fd::OwnedFd;
use rustix::process::{Pid, PidfdFlags};

use super::find;
use crate::mount;
use crate::running::{self, Found};
use host::error::one_line;

/// How long to wait for a daemon that closes its image. It waits 5 s for its jobs, and then writes
/// back.
const CLOSING: Duration = Duration::from_secs(10);
/// After this time a message explains the wait.
const EXPLAIN: Duration = Duration::from_secs(1);
/// How long a killed process may take to end.
const DYING: Duration = Duration::from_secs(5);
/// Time between two checks.
const LOOK: Duration = Duration::from_millis(20);
/// How many processes of other mount namespaces a message names.
const MOST_NAMED: usize = 3;

/// Waits, for ten seconds at most, for the daemons that have `image` open and whose disk is no
/// longer mounted. Does not wait if the disk is mounted, here or in another mount namespace,
/// because such a daemon would not end.
pub fn wait_for_closing(image: &Path) {
    let Ok(path) = image.canonicalize() else { return };
    let started = Instant::now();
    let mut explained = false;
    for found in find::daemons_of(&path) {
        let Some(mut process) = Process::find(&found) else { continue };
        let stays = || find::places_of(&found).map_or(true, |places| !places.is_empty());
        if stays() || !elsewhere(&found).is_empty() {
            continue;
        }
        while started.elapsed() < CLOSING && !process.has_ended() && !stays() {
            if started.elapsed() > EXPLAIN && !std::mem::replace(&mut explained, true) {
                let text = format!(
                    "waiting for the last daemon (process {}) to close it",
                    found.entry.pid
                );
                let _ = writeln!(
                    std::io::stderr(),
                    "{}: {text}",
                    one_line(&image.display().to_string())
                );
            }
            thread::sleep(LOOK);
        }
    }
}

/// Returns processes in other mount namespaces in which the disk is mounted.
fn elsewhere(found: &Found) -> Vec<u32> {
    found
        .entry
        .filesystem
        .as_ref()
        .map(|device| mount::other_namespaces(device, &found.entry.image))
        .unwrap_or_default()
}

/// Describes which processes of other mount namespaces have the disk mounted; `None` if there are
/// none.
pub(super) fn other_namespace(found: &Found) -> Option<String> {
    let processes = elsewhere(found);
    if processes.is_empty() {
        return None;
    }
    let name = |pid: &u32| {
        let name = std::fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
        format!("{pid} {}", one_line(name.trim()))
    };
    let names: Vec<String> = processes.iter().take(MOST_NAMED).map(name).collect();
    Some(format!(
        "another mount namespace (a container?) has it mounted still: process {}",
        names.join(", ")
    ))
}

/// Explains why a daemon still runs although its disk is mounted nowhere in this mount namespace.
pub(super) fn why_it_lives(found: &Found) -> String {
    let (at, pid) = (found.entry.mountpoint.display(), found.entry.pid);
    match other_namespace(found) {
        Some(why) => format!("its disk is unmounted from {at}, but {why}"),
        None => format!(
            "its disk is no longer mounted at {at}, but programs have it open, or its daemon (process {pid}) does not end"
        ),
    }
}

/// The processes of a daemon, whose end can be awaited: the one that serves, and the main process,
/// which ends after it. The kernel releases a process's lock a moment before its other files, so a
/// released lock does not prove that the image is free.
pub(super) struct Process(Vec<OwnedFd>);

impl Process {
    /// Returns the processes of an entry, if the one that serves runs.
    pub(super) fn find(found: &Found) -> Option<Process> {
        let process = Process::open(found)?;
        // The process id cannot belong to another process while the daemon holds its entry.
        found.is_running().then_some(process)
    }

    fn open(found: &Found) -> Option<Process> {
        let open = |pid: u32| {
            let pid = Pid::from_raw(i32::try_from(pid).ok()?)?;
            rustix::process::pidfd_open(pid, PidfdFlags::empty()).ok()
        };
        let entry = &found.entry;
        let serving = open(entry.serving())?;
        // If the main process was killed, another program may have its id by now.
        let main = Some(entry.pid).filter(|&pid| pid != entry.serving() && is_ours(pid));
        Some(Process([Some(serving), main.and_then(open)].into_iter().flatten().collect()))
    }

    /// Waits until the processes of an unlocked entry have ended. A process that was killed a
    /// moment ago may still have its mount and its image open. If another process of the same name
    /// has the process id by now, the wait ends after [`DYING`]. Does not wait for a main process
    /// that lives on, because it may start another serving process.
    pub(super) fn wait_for_the_killed(found: &Found) {
        if has_keeper(found) {
            return;
        }
        let Some(mut process) = Process::open(found) else { return };
        let is_ours = is_ours(found.entry.serving());
        let started = Instant::now();
        while is_ours && started.elapsed() < DYING && !process.has_ended() {
            thread::sleep(LOOK);
        }
    }

    pub(super) fn has_ended(&mut self) -> bool {
        self.0.retain(|process| {
            let mut polled = [PollFd::new(process, PollFlags::IN)];
            let now = Timespec { tv_sec: 0, tv_nsec: 0 };
            matches!(rustix::event::poll(&mut polled, Some(&now)), Ok(0))
        });
        self.0.is_empty()
    }

    #[cfg(test)]
    pub(super) fn of(pid: Pid) -> Process {
        Process(vec![rustix::process::pidfd_open(pid, PidfdFlags::empty()).unwrap()])
    }
}

/// Tells whether the main process of an entry lives, which starts another serving process if the
/// one of the entry was killed.
pub(super) fn has_keeper(found: &Found) -> bool {
    found.entry.serving() != found.entry.pid && running::is_keeper(found.entry.pid)
}

/// Tells whether a daemon is starting that may take a disk over.
pub(super) fn one_is_starting() -> bool {
    running::starting().into_iter().any(running::is_keeper)
}

/// Tells whether a process has the name of one of ours.
fn is_ours(pid: u32) -> bool {
    std::fs::read_to_string(format!("/proc/{pid}/comm"))
        .is_ok_and(|name| name.starts_with("cordisk"))
}
