//! Looking for daemons.

use std::fs::{self, File, Metadata};
use std::io::Read;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::Path;
use std::time::SystemTime;

use rustix::fs::{FlockOperation, OFlags};
use rustix::io::Errno;

use super::Entry;
use super::directory::Surroundings;
use super::registration::pid_of;

/// Paths are at most 4096 bytes, and escapes may make each six times as long.
const LONGEST: u64 = 128 << 10;

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
pub fn find_all() -> Vec<Found> {
    find_in(&Surroundings::of_this_process())
}

pub(super) fn find_in(surroundings: &Surroundings) -> Vec<Found> {
    surroundings.all().iter().flat_map(|directory| entries_of(directory)).collect()
}

fn entries_of(directory: &Path) -> Vec<Found> {
    let Ok(owner) = fs::symlink_metadata(directory).map(|there| there.uid()) else { return Vec::new() };
    let entries = fs::read_dir(directory).into_iter().flatten().flatten();
    let mut found: Vec<Found> = entries.filter_map(|entry| read(&entry.path(), pid_of(&entry.file_name())?, owner)).collect();
    found.sort_by_key(|found| found.entry.pid);
    found
}

fn read(path: &Path, pid: u32, owner: u32) -> Option<Found> {
    // Whoever owns the directory may have put anything there: what would block, and what lies elsewhere.
    let flags = (OFlags::NOFOLLOW | OFlags::NONBLOCK).bits().cast_signed();
    let file = File::options().read(true).custom_flags(flags).open(path).ok()?;
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
