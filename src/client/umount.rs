//! `cordisk umount`: takes a disk away, and waits until its image may be used by others.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::thread;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::closing::{self, Process};
use super::connection::{Connection, Heard};
use super::find::{self, Disk, Target};
use super::{Targets, facts, show};
use crate::error::one_line;
use crate::fuse::{self, SeenMount, Unmounted};
use crate::running::Found;
use crate::{Error, ErrorKind, Result};

/// How long a daemon may take to be talked to: it is only asked how its end went.
const PATIENCE: Duration = Duration::from_secs(2);
/// After so long somebody wants to know what takes so long.
const EXPLAIN: Duration = Duration::from_secs(5);
/// After so long it is looked whether another mount namespace keeps the disk.
const LOOK_ELSEWHERE: Duration = Duration::from_secs(1);
/// How long a lock on the entry is believed that neither a process nor a socket goes with: whoever may read an entry of the dead may lock it.
const LOCK_ALONE: Duration = Duration::from_secs(10);
/// How long one look takes.
const LOOK: Duration = Duration::from_millis(20);

/// What `cordisk umount` is asked for.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct UmountOptions {
    /// The disks.
    pub targets: Targets,
    /// Take them away from whoever uses them.
    pub lazy: bool,
}

/// One disk to be unmounted.
struct OneUmount {
    target: PathBuf,
    lazy: bool,
}

/// Runs the command.
///
/// # Errors
/// There is no such disk; it is in use; it could not be unmounted; it was, but closing its image failed.
pub fn run(options: &UmountOptions) -> Result<ExitCode> {
    options.targets.each(|target| unmount(&OneUmount { target: target.to_owned(), lazy: options.lazy }))
}

fn unmount(options: &OneUmount) -> Result<ExitCode> {
    match find::find(&options.target)? {
        Target::Running(disk) => end(&disk, options)?,
        Target::Dead(mount) => {
            take_away(&mount.mountpoint, options)?;
            // Another dead one may be below it, and then this is not what one sees.
            fuse::remove_placeholder(&mount.mountpoint, mount.user);
        }
        Target::Unregistered(SeenMount { mountpoint, .. }) => {
            take_away(&mountpoint, options)?;
            let text = "its daemon is not known here: the image is free when that process has ended";
            let _ = writeln!(std::io::stderr(), "{} is unmounted; {text}", one_line(&options.target.display().to_string()));
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// Unmounts, or detaches.
fn take_away(mountpoint: &Path, options: &OneUmount) -> Result<()> {
    let me = rustix::process::geteuid().as_raw();
    let of_another = |mount: &SeenMount| mount.mountpoint == mountpoint && mount.user.is_some_and(|user| user != me);
    // fusermount3 would refuse as well, and say something about a list of mounts.
    if me != 0 && fuse::mounts()?.iter().any(of_another) {
        let text =
            format!("{}: permission denied: the disk belongs to another user; ask as that user, or as root", options.target.display());
        return Err(Error::new(ErrorKind::InvalidArgument, text));
    }
    match fuse::unmount(mountpoint)? {
        Unmounted::Done => Ok(()),
        Unmounted::Busy if options.lazy => fuse::detach(mountpoint),
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

/// Ends a daemon that lives, and waits for it.
fn end(disk: &Disk, options: &OneUmount) -> Result<()> {
    let process = disk.found.as_ref().and_then(Process::find);
    // Before the unmount: it says at its end how closing went. It can be unmounted without.
    let mut connection = disk.connect_within(PATIENCE);
    let mountpoint = match (&disk.mountpoint, &mut connection) {
        (Some(mountpoint), _) => Some(mountpoint.clone()),
        (None, Ok(connection)) => {
            let said = facts::status(connection)?.mountpoint.map(PathBuf::from);
            // Whoever listens may say anything, and we perhaps may unmount anything.
            said.filter(|mountpoint| find::is_mounted_by(connection.listener(), mountpoint).unwrap_or(false))
        }
        (None, Err(_)) => None,
    };
    let places = disk.found.as_ref().map(find::places_of).transpose()?;
    match (&mountpoint, &mut connection) {
        (_, Ok(connection)) if options.lazy => {
            connection.send("quit", json!({}))?;
        }
        (Some(mountpoint), _) => {
            let others: Vec<&PathBuf> = places.iter().flatten().filter(|place| *place != mountpoint).collect();
            if let Some(other) = others.first().filter(|_| !options.lazy) {
                return Err(mounted_twice(other, &options.target));
            }
            // Unmounted before, and the daemon lives still: there is only its end to wait for.
            if places.as_ref().is_none_or(|places| places.contains(mountpoint)) {
                take_away(mountpoint, options)?;
            }
        }
        (None, _) => {
            connection?;
            let name = one_line(&disk.name);
            let text =
                format!("{name}: this daemon does not say where its disk is mounted here; name the mountpoint, or end it with --lazy");
            return Err(Error::new(ErrorKind::InvalidArgument, text));
        }
    }
    wait_for_end(disk, connection.ok(), process, LOCK_ALONE)?;
    // A daemon that was killed while it was waited for has left it.
    if let Some(mountpoint) = &mountpoint {
        fuse::remove_placeholder(mountpoint, None);
    }
    Ok(())
}

/// Waits until the daemon is gone, and hears how it closed the image.
fn wait_for_end(disk: &Disk, mut connection: Option<Connection>, mut process: Option<Process>, lock_alone: Duration) -> Result<()> {
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
        // Whoever may read an entry may lock it as well, as soon as the daemon does not any more: the end of the process counts.
        if connection.is_some() || process.is_some() {
            seen = Instant::now();
        }
        let locked = !ended && seen.elapsed() < lock_alone && disk.found.as_ref().is_some_and(Found::is_running);
        if connection.is_none() && process.is_none() && !locked {
            break;
        }
        if !looked && started.elapsed() > LOOK_ELSEWHERE {
            looked = true;
            if let Some(why) = disk.found.as_ref().and_then(closing::other_namespace) {
                explained = true;
                let name = one_line(&disk.name);
                let text = format!("unmounted here, but {why}; `cordisk umount --lazy {name}` ends it; Ctrl-C only ends the waiting");
                let _ = writeln!(std::io::stderr(), "{name}: {text}");
            }
        }
        if !explained && started.elapsed() > EXPLAIN {
            explained = true;
            let who = disk.found.as_ref().map_or(String::new(), |found| format!(" (process {})", found.entry.pid));
            let text = format!("unmounted; waiting for its daemon{who} to write everything back; Ctrl-C only ends the waiting");
            let _ = writeln!(std::io::stderr(), "{}: {text}", one_line(&disk.name));
        }
        if connection.is_none() {
            thread::sleep(LOOK);
        }
    }
    match failure {
        Some(why) => {
            let text = format!("{} is unmounted, but closing its image failed: {why}", one_line(&disk.name));
            Err(Error::new(ErrorKind::Io, text))
        }
        None => Ok(()),
    }
}

/// What the daemon says of a close that went wrong: in an event to all, or in its answer to who has told it to quit.
fn failure_in(message: &Value) -> Option<String> {
    let why = if message["event"] == "X_CLOSE_FAILED" { &message["data"]["error"] } else { &message["error"]["desc"] };
    why.as_str().map(str::to_owned)
}

#[cfg(test)]
mod tests {
    use rustix::process::Pid;

    use super::*;

    /// Protects: nobody keeps an umount waiting by a lock on the entry of a daemon that is gone.
    #[test]
    fn a_lock_of_somebody_else_is_not_waited_for() {
        let entry = crate::running::Entry {
            pid: 1,
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
        let disk = Disk { name: "m".into(), socket: "/s".into(), mountpoint: None, found: Some(found) };
        wait_for_end(&disk, None, None, Duration::from_millis(50)).unwrap();
        let mut child =
            std::process::Command::new("/bin/sh").args(["-c", "read line"]).stdin(std::process::Stdio::piped()).spawn().unwrap();
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
