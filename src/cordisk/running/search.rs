//! The search for running daemons.

use std::ffi::{CStr, CString, OsStr};
use std::fs::{File, Metadata};
use std::io::Read;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use rustix::fs::{Dir, FlockOperation, Mode, OFlags};
use rustix::io::Errno;

use super::Entry;
use super::directory::Surroundings;
use super::registration::pid_of;

/// The longest entry in bytes. A path has at most 4096 bytes, and JSON escapes can make it six
/// times as long.
const LONGEST: u64 = 128 << 10;
/// The most entries of one directory that are read: more than the disks that one user mounts, and
/// few enough to read quickly.
const MOST_ENTRIES: usize = 4096;

/// An entry that was found.
#[derive(Debug)]
pub struct Found {
    /// The content of the entry.
    pub entry: Entry,
    /// The user that owns the directory of the entry. Entries of root are trusted entirely; entries
    /// of another user are trusted only about that user's own mounts.
    pub owner: u32,
    /// The path of the entry.
    pub path: PathBuf,
    /// When the entry was written, which is when the disk was mounted.
    pub since: SystemTime,
    file: File,
}

impl Found {
    /// Makes an entry for a test.
    #[cfg(test)]
    pub(crate) fn for_tests(entry: Entry, owner: u32, file: File) -> Found {
        Found { entry, owner, path: PathBuf::new(), since: SystemTime::UNIX_EPOCH, file }
    }

    /// Tells whether the daemon runs, which means that it holds the lock on its entry.
    pub fn is_running(&self) -> bool {
        // The lock is shared, so that two commands that check at once do not take each other for
        // the daemon.
        match rustix::fs::flock(&self.file, FlockOperation::NonBlockingLockShared) {
            Ok(()) => {
                let _ = rustix::fs::flock(&self.file, FlockOperation::Unlock);
                false
            }
            Err(errno) => errno == Errno::WOULDBLOCK,
        }
    }
}

/// Returns all entries that this user may read, of running and of dead daemons. Invalid entries are
/// skipped; the entry of a daemon that is starting is empty, and so invalid. The iterator opens one
/// entry at a time: a caller that does not need an entry closes it before the next is opened. So a
/// user with very many entries cannot use up the caller's descriptors.
pub fn find_all() -> impl Iterator<Item = Found> {
    find_in(&Surroundings::of_this_process())
}

/// Returns the main process ids of the daemons that have not filled in their entry yet, as far as
/// this user may read it: they start, or take the disk of a killed process over.
pub fn starting() -> Vec<u32> {
    starting_in(&Surroundings::of_this_process())
}

pub(super) fn starting_in(surroundings: &Surroundings) -> Vec<u32> {
    let is_empty = |entry: &std::fs::DirEntry| {
        entry.metadata().is_ok_and(|there| there.is_file() && there.len() == 0)
    };
    let directories = surroundings.all().into_iter();
    let entries = directories.filter_map(|directory| std::fs::read_dir(directory).ok()).flatten();
    entries
        .take(MOST_ENTRIES)
        .flatten()
        .filter(is_empty)
        .filter_map(|entry| pid_of(&entry.file_name()))
        .collect()
}

pub(super) fn find_in(surroundings: &Surroundings) -> impl Iterator<Item = Found> + use<> {
    surroundings
        .all()
        .into_iter()
        .flat_map(|directory| entries_of(&directory).into_iter().flatten())
}

/// The directory is opened once, and a symbolic link is not followed. Otherwise a user that can
/// replace the path could present root's directory when the owner is read, and a different one when
/// entries are read.
fn entries_of(directory: &Path) -> Option<impl Iterator<Item = Found> + use<>> {
    let flags =
        OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let path = directory.to_owned();
    let directory = rustix::fs::open(directory, flags, Mode::empty()).ok()?;
    let owner = rustix::fs::fstat(&directory).ok()?.st_uid;
    let names = Dir::read_from(&directory)
        .ok()?
        .map_while(|entry| entry.ok().map(|entry| entry.file_name().to_owned()));
    let with_pid = |name: CString| Some((pid_of(OsStr::from_bytes(name.as_bytes()))?, name));
    let mut names: Vec<(u32, CString)> = names.filter_map(with_pid).take(MOST_ENTRIES).collect();
    names.sort_unstable();
    Some(names.into_iter().filter_map(move |(pid, name)| {
        let path = path.join(OsStr::from_bytes(name.as_bytes()));
        read(&directory, &name, pid, owner, path)
    }))
}

fn read(directory: &OwnedFd, name: &CStr, pid: u32, owner: u32, path: PathBuf) -> Option<Found> {
    // The owner of the directory may have put any file there, so the open neither blocks nor
    // follows a link.
    let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let file = File::from(rustix::fs::openat(directory, name, flags, Mode::empty()).ok()?);
    let metadata = file.metadata().ok().filter(Metadata::is_file)?;
    let mut text = Vec::new();
    (&file).take(LONGEST).read_to_end(&mut text).ok()?;
    let entry: Entry = serde_json::from_slice(&text).ok()?;
    (entry.pid == pid && entry.mountpoint.is_absolute() && entry.qmp.is_absolute())
        .then_some(Found { entry, owner, path, since: metadata.modified().ok()?, file })
}
