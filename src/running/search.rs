//! Looking for daemons.

use std::ffi::{CStr, CString, OsStr};
use std::fs::{File, Metadata};
use std::io::Read;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::time::SystemTime;

use rustix::fs::{Dir, FlockOperation, Mode, OFlags};
use rustix::io::Errno;

use super::Entry;
use super::directory::Surroundings;
use super::registration::pid_of;

/// Paths are at most 4096 bytes, and escapes may make each six times as long.
const LONGEST: u64 = 128 << 10;
/// More disks than one user mounts, and few enough to look at.
const MOST_ENTRIES: usize = 4096;

/// An entry that was found.
#[derive(Debug)]
pub struct Found {
    /// What it says.
    pub entry: Entry,
    /// The user whose directory it lies in. Root is believed everything; others only what concerns their own mounts.
    pub owner: u32,
    /// When it was written: the disk was mounted then.
    pub since: SystemTime,
    file: File,
}

impl Found {
    /// One that says what a test wants.
    #[cfg(test)]
    pub(crate) fn for_tests(entry: Entry, owner: u32, file: File) -> Found {
        Found { entry, owner, since: SystemTime::UNIX_EPOCH, file }
    }

    /// Whether the daemon lives: it holds its entry.
    pub fn is_running(&self) -> bool {
        // A shared lock, so that two who look do not take each other for the daemon.
        match rustix::fs::flock(&self.file, FlockOperation::NonBlockingLockShared) {
            Ok(()) => {
                let _ = rustix::fs::flock(&self.file, FlockOperation::Unlock);
                false
            }
            Err(errno) => errno == Errno::WOULDBLOCK,
        }
    }
}

/// All entries that this user may read, of the living and of the dead. Those that make no sense are left out: a daemon that starts has an empty one.
/// One after the other: who has no use for an entry closes it before the next is opened, so that a user with very many takes nobody's descriptors.
pub fn find_all() -> impl Iterator<Item = Found> {
    find_in(&Surroundings::of_this_process())
}

pub(super) fn find_in(surroundings: &Surroundings) -> impl Iterator<Item = Found> + use<> {
    surroundings.all().into_iter().flat_map(|directory| entries_of(&directory).into_iter().flatten())
}

/// The directory is opened once and not followed to elsewhere: whoever may replace it could otherwise have it be root's when its owner is looked at, and
/// another one when entries are read.
fn entries_of(directory: &Path) -> Option<impl Iterator<Item = Found> + use<>> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let directory = rustix::fs::open(directory, flags, Mode::empty()).ok()?;
    let owner = rustix::fs::fstat(&directory).ok()?.st_uid;
    let names = Dir::read_from(&directory).ok()?.map_while(|entry| entry.ok().map(|entry| entry.file_name().to_owned()));
    let with_pid = |name: CString| Some((pid_of(OsStr::from_bytes(name.as_bytes()))?, name));
    let mut names: Vec<(u32, CString)> = names.filter_map(with_pid).take(MOST_ENTRIES).collect();
    names.sort_unstable();
    Some(names.into_iter().filter_map(move |(pid, name)| read(&directory, &name, pid, owner)))
}

fn read(directory: &OwnedFd, name: &CStr, pid: u32, owner: u32) -> Option<Found> {
    // Whoever owns the directory may have put anything there: what would block, and what lies elsewhere.
    let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let file = File::from(rustix::fs::openat(directory, name, flags, Mode::empty()).ok()?);
    let metadata = file.metadata().ok().filter(Metadata::is_file)?;
    let mut text = Vec::new();
    (&file).take(LONGEST).read_to_end(&mut text).ok()?;
    let entry: Entry = serde_json::from_slice(&text).ok()?;
    (entry.pid == pid && entry.mountpoint.is_absolute() && entry.qmp.is_absolute()).then_some(Found {
        entry,
        owner,
        since: metadata.modified().ok()?,
        file,
    })
}
