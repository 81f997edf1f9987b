//! Daemons whose disk is unmounted and that have not ended: umount(8) returns before the daemon has
//! written everything back and closed its image.

use std::io::Write;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::fd::OwnedFd;
use rustix::process::{Pid, PidfdFlags};

use super::find;
use crate::error::one_line;
use crate::fuse;
use crate::running::Found;

/// How long a daemon that closes its image is waited for: it gives its jobs 5 s, and writes back.
const CLOSING: Duration = Duration::from_secs(10);
/// After this time a line says what is waited for.
const EXPLAIN: Duration = Duration::from_secs(1);
/// How long a killed process may take to end.
const DYING: Duration = Duration::from_secs(5);
/// Between two looks.
const LOOK: Duration = Duration::from_millis(20);
/// Processes of other mount namespaces that are named.
const MOST_NAMED: usize = 3;

/// Waits for the daemons that have `image` open and whose disk is no longer mounted, ten seconds at most. Does not wait where the disk is mounted, here
/// or in another mount namespace: it would not end.
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
                let text = format!("waiting for the last daemon (process {}) to close it", found.entry.pid);
                let _ = writeln!(std::io::stderr(), "{}: {text}", one_line(&image.display().to_string()));
            }
            thread::sleep(LOOK);
        }
    }
}

/// Processes in other mount namespaces in which the disk is mounted.
fn elsewhere(found: &Found) -> Vec<u32> {
    found.entry.filesystem.as_ref().map(|device| fuse::other_namespaces(device, &found.entry.image)).unwrap_or_default()
}

/// That another mount namespace has the disk, and which processes are in it; `None` where none has.
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
    Some(format!("another mount namespace (a container?) has it mounted still: process {}", names.join(", ")))
}

/// Why a daemon lives whose disk is mounted nowhere in this mount namespace.
pub(super) fn why_it_lives(found: &Found) -> String {
    let (at, pid) = (found.entry.mountpoint.display(), found.entry.pid);
    match other_namespace(found) {
        Some(why) => format!("its disk is unmounted from {at}, but {why}"),
        None => format!("its disk is no longer mounted at {at}, but programs have it open, or its daemon (process {pid}) does not end"),
    }
}

/// A process whose end can be waited for. Its lock goes a moment before its other files, so the lock alone does not tell that the image is free.
pub(super) struct Process(OwnedFd);

impl Process {
    /// The process of an entry, while it lives.
    pub(super) fn find(found: &Found) -> Option<Process> {
        let process = Process::open(found)?;
        // Its number cannot have gone to another process while it holds its entry.
        found.is_running().then_some(process)
    }

    fn open(found: &Found) -> Option<Process> {
        let pid = Pid::from_raw(i32::try_from(found.entry.pid).ok()?)?;
        rustix::process::pidfd_open(pid, PidfdFlags::empty()).ok().map(Process)
    }

    /// Waits until the process of an entry that is not locked has ended: one that was killed a moment ago may have its mount and its image open still.
    /// Where another process has its number by now, that is waited for in vain, if it is called the same.
    pub(super) fn wait_for_the_killed(found: &Found) {
        let Some(mut process) = Process::open(found) else { return };
        let name = std::fs::read_to_string(format!("/proc/{}/comm", found.entry.pid)).unwrap_or_default();
        let started = Instant::now();
        while name.starts_with("cordisk") && started.elapsed() < DYING && !process.has_ended() {
            thread::sleep(LOOK);
        }
    }

    pub(super) fn has_ended(&mut self) -> bool {
        let mut polled = [PollFd::new(&self.0, PollFlags::IN)];
        !matches!(rustix::event::poll(&mut polled, Some(&Timespec { tv_sec: 0, tv_nsec: 0 })), Ok(0))
    }

    #[cfg(test)]
    pub(super) fn of(pid: Pid) -> Process {
        Process(rustix::process::pidfd_open(pid, PidfdFlags::empty()).unwrap())
    }
}
