//! `cordisk umount`: unmounts a disk, and waits until its daemon has closed the image.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::thread;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::closing::{self, Process};
use super::find::{self, DiskHandle, FoundDisk};
use super::{Targets, facts, show};
use crate::mount::{self, SeenMount, Unmounted};
use crate::running::Found;
use control::connection::{Connection, Heard};
use host::error::one_line;
use host::{Error, ErrorKind, Result};

/// How long the daemon may take to accept a connection, which is needed only to learn whether
/// closing succeeded.
const PATIENCE: Duration = Duration::from_secs(2);
/// After this time a message explains the wait.
const EXPLAIN: Duration = Duration::from_secs(5);
/// After this time the command checks whether another mount namespace keeps the disk.
const LOOK_ELSEWHERE: Duration = Duration::from_secs(1);
/// How long a lock on the entry counts as proof of a daemon if neither a process nor a connection
/// does. Any user that may read the entry of a dead daemon may lock it.
const LOCK_ALONE: Duration = Duration::from_secs(10);
/// How long one wait for an event takes.
const LOOK: Duration = Duration::from_millis(20);

/// The options of `cordisk umount`.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct UmountOptions {
    /// The disks.
    pub targets: Targets,
    /// Detach the disks from the programs that use them.
    pub lazy: bool,
}

/// One disk to unmount.
struct OneUmount {
    target: PathBuf,
    lazy: bool,
}

/// Runs the command.
///
/// # Errors
/// There is no such disk; it is in use; it could not be unmounted; or it was unmounted, but closing
/// its image failed.
pub fn run(options: &UmountOptions) -> Result<ExitCode> {
    options
        .targets
        .each(|target| unmount(&OneUmount { target: target.to_owned(), lazy: options.lazy }))
}

fn unmount(options: &OneUmount) -> Result<ExitCode> {
    match find::find(&options.target)? {
        FoundDisk::Running(disk) => end(&disk, options)?,
        FoundDisk::Dead(mount) => {
            take_away(&mount.mountpoint, options)?;
            // Another dead mount may be below this one. The file at the path is then not the
            // placeholder, and it stays.
            mount::remove_placeholder(&mount.mountpoint, mount.user);
        }
        FoundDisk::Unregistered(SeenMount { mountpoint, .. }) => {
            take_away(&mountpoint, options)?;
            let text =
                "its daemon is not known here: the image is free when that process has ended";
            let _ = writeln!(
                std::io::stderr(),
                "{} is unmounted; {text}",
                one_line(&options.target.display().to_string())
            );
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// Unmounts the disk, or detaches it if it is in use and `--lazy` is given.
fn take_away(mountpoint: &Path, options: &OneUmount) -> Result<()> {
    let me = rustix::process::geteuid().as_raw();
    let of_another = |mount: &SeenMount| {
        mount.mountpoint == mountpoint && mount.user.is_some_and(|user| user != me)
    };
    // fusermount3 would refuse as well, with an unclear message about a list of mounts.
    if me != 0 && mount::mounts()?.iter().any(of_another) {
        let text = format!(
            "{}: permission denied: the disk belongs to another user; ask as that user, or as root",
            options.target.display()
        );
        return Err(Error::new(ErrorKind::InvalidArgument, text));
    }
    match mount::unmount(mountpoint)? {
        Unmounted::Done => Ok(()),
        Unmounted::Busy if options.lazy => mount::detach(mountpoint),
        Unmounted::Busy => Err(in_use(mountpoint, &options.target)),
    }
}

fn in_use(mountpoint: &Path, target: &Path) -> Error {
    let (mountpoint, target) = (show::quoted(mountpoint), show::quoted(target));
    let text = format!(
        "{target} is in use and stays mounted; `fuser -vm {mountpoint}` or `lsof {mountpoint}` shows by whom, \
         `cordisk umount --lazy {target}` takes it away from them"
    );
    Error::new(ErrorKind::Busy, text)
}

fn mounted_twice(other: &Path, target: &Path) -> Error {
    let (other, target) = (show::quoted(other), show::quoted(target));
    let text = format!(
        "{target} stays mounted: the disk is mounted at {other} as well (a bind mount); unmount that first: `umount {other}`, \
         or end the disk everywhere: `cordisk umount --lazy {target}`"
    );
    Error::new(ErrorKind::Busy, text)
}

/// Ends a running daemon, and waits for its end.
fn end(disk: &DiskHandle, options: &OneUmount) -> Result<()> {
    let process = disk.found.as_ref().and_then(Process::find);
    // Connects before the unmount, because the daemon reports at its end whether closing succeeded.
    // The unmount also works without a connection.
    let mut connection = disk.connect_within(PATIENCE);
    let mountpoint = match (&disk.mountpoint, &mut connection) {
        (Some(mountpoint), _) => Some(mountpoint.clone()),
        (None, Ok(connection)) => {
            let said = facts::status(connection)?.mountpoint.map(PathBuf::from);
            // The listener may name any path, and this process may have the right to unmount it. So
            // the path must be a mount of that user.
            said.filter(|mountpoint| {
                find::is_mounted_by(connection.listener(), mountpoint).unwrap_or(false)
            })
        }
        (None, Err(_)) => None,
    };
    let places = disk.found.as_ref().map(find::places_of).transpose()?;
    match (&mountpoint, &mut connection) {
        (_, Ok(connection)) if options.lazy => {
            connection.send("quit", json!({}))?;
        }
        (Some(mountpoint), _) => {
            let others: Vec<&PathBuf> =
                places.iter().flatten().filter(|place| *place != mountpoint).collect();
            if let Some(other) = others.first().filter(|_| !options.lazy) {
                return Err(mounted_twice(other, &options.target));
            }
            // If the disk was unmounted before and the daemon still runs, the command only waits
            // for its end.
            if places.as_ref().is_none_or(|places| places.contains(mountpoint)) {
                take_away(mountpoint, options)?;
            }
        }
        (None, _) => {
            connection?;
            let name = one_line(&disk.name);
            let text = format!(
                "{name}: this daemon does not say where its disk is mounted here; name the mountpoint, or end it with --lazy"
            );
            return Err(Error::new(ErrorKind::InvalidArgument, text));
        }
    }
    wait_for_end(disk, connection.ok(), process, LOCK_ALONE)?;
    // A daemon that was killed during the wait has left its placeholder.
    if let Some(mountpoint) = &mountpoint {
        mount::remove_placeholder(mountpoint, None);
    }
    Ok(())
}

/// Waits until the daemon has ended, and reads from the connection whether closing the image
/// succeeded.
fn wait_for_end(
    disk: &DiskHandle,
    mut connection: Option<Connection>,
    mut process: Option<Process>,
    lock_alone: Duration,
) -> Result<()> {
    let started = Instant::now();
    let mut seen = started;
    let (mut explained, mut looked) = (false, false);
    let mut failure = None;
    let mut ended = false;
    loop {
        match &mut connection {
            None => {}
            Some(session) => match session.next_event(LOOK) {
                Ok(Heard::Event(message)) => failure = failure.or_else(|| failure_in(&message)),
                Ok(Heard::Nothing) => {}
                Ok(Heard::End) | Err(_) => connection = None,
            },
        }
        if process.as_mut().is_some_and(|process| process.has_ended()) {
            (process, ended) = (None, true);
        }
        // Any user that may read an entry may lock it once the daemon has released it. So the end
        // of the process counts, if it can be seen.
        if connection.is_some() || process.is_some() {
            seen = Instant::now();
        }
        let locked = !ended
            && seen.elapsed() < lock_alone
            && disk.found.as_ref().is_some_and(Found::is_running);
        if connection.is_none() && process.is_none() && !locked {
            break;
        }
        if !looked && started.elapsed() > LOOK_ELSEWHERE {
            looked = true;
            if let Some(why) = disk.found.as_ref().and_then(closing::other_namespace) {
                explained = true;
                let name = one_line(&disk.name);
                let text = format!(
                    "unmounted here, but {why}; `cordisk umount --lazy {name}` ends it; Ctrl-C only ends the waiting"
                );
                let _ = writeln!(std::io::stderr(), "{name}: {text}");
            }
        }
        if !explained && started.elapsed() > EXPLAIN {
            explained = true;
            let who = disk
                .found
                .as_ref()
                .map_or(String::new(), |found| format!(" (process {})", found.entry.pid));
            let text = format!(
                "unmounted; waiting for its daemon{who} to write everything back; Ctrl-C only ends the waiting"
            );
            let _ = writeln!(std::io::stderr(), "{}: {text}", one_line(&disk.name));
        }
        if connection.is_none() {
            thread::sleep(LOOK);
        }
    }
    match failure {
        Some(why) => {
            let text = format!(
                "{} is unmounted, but closing its image failed: {why}",
                one_line(&disk.name)
            );
            Err(Error::new(ErrorKind::Io, text))
        }
        None => Ok(()),
    }
}

/// Returns the daemon's error of a failed close: from an event to all clients, or from the reply to
/// this client's `quit`.
fn failure_in(message: &Value) -> Option<String> {
    let why = if message["event"] == "X_CLOSE_FAILED" {
        &message["data"]["error"]
    } else {
        &message["error"]["desc"]
    };
    why.as_str().map(str::to_owned)
}

#[cfg(test)]
mod tests {
    use rustix::process::Pid;

    use super::*;

    /// Protects: a lock on the entry of a dead daemon cannot keep an umount waiting.
    #[test]
    fn a_lock_of_somebody_else_is_not_waited_for() {
        let entry = crate::running::Entry {
            pid: 1,
            serving: None,
            mountpoint: "/m".into(),
            image: "/i".into(),
            device: "d".into(),
            qmp: "/s".into(),
            filesystem: None,
            metrics: None,
        };
        let file = tempfile::NamedTempFile::new().unwrap();
        rustix::fs::flock(&file, rustix::fs::FlockOperation::NonBlockingLockExclusive).unwrap();
        let found = Found::for_tests(entry, 0, file.reopen().unwrap());
        assert!(found.is_running());
        let disk = DiskHandle {
            name: "m".into(),
            socket: "/s".into(),
            mountpoint: None,
            found: Some(found),
        };
        wait_for_end(&disk, None, None, Duration::from_millis(50)).unwrap();
        let mut child = std::process::Command::new("/bin/sh")
            .args(["-c", "read line"])
            .stdin(std::process::Stdio::piped())
            .spawn()
            .unwrap();
        let pid = Pid::from_child(&child);
        let process = Process::of(pid);
        drop(child.stdin.take());
        wait_for_end(&disk, None, Some(process), Duration::from_secs(3600)).unwrap();
        child.wait().unwrap();
    }

    #[test]
    fn a_close_that_failed_is_told_either_way() {
        let event = json!({ "event": "X_CLOSE_FAILED", "data": { "error": "no space" } });
        let answer = json!({ "error": { "class": "GenericError", "desc": "no space" }, "id": 2 });
        for message in [event, answer] {
            assert_eq!(failure_in(&message).as_deref(), Some("no space"));
        }
        assert_eq!(failure_in(&json!({ "event": "SHUTDOWN", "data": {} })), None);
        assert_eq!(failure_in(&json!({ "return": {}, "id": 2 })), None);
    }
}
