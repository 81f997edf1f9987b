//! The entry of this daemon: made, locked, filled in, and those of the dead removed.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use rustix::fs::{FlockOperation, OFlags};

use super::directory::Surroundings;
use super::{Entry, LockedFile};
use crate::{Error, ErrorKind, Result};

/// Whoever looks whether a daemon lives holds the lock for a moment.
const PATIENCE: Duration = Duration::from_secs(2);

/// The place of this daemon in the runtime directory. Dropping it removes the entry, unless that was left to somebody else.
#[derive(Debug)]
pub struct Registration {
    directory: PathBuf,
    file: LockedFile,
}

impl Registration {
    /// Makes the runtime directory if need be, removes what killed daemons have left there, and makes and locks the entry of this process. It is empty
    /// until [`Registration::publish`].
    ///
    /// # Errors
    /// The directory cannot be made, belongs to somebody else or is writable for others; what the system says.
    pub fn begin() -> Result<Registration> {
        Self::begin_in(&Surroundings::of_this_process())
    }

    pub(super) fn begin_in(surroundings: &Surroundings) -> Result<Registration> {
        let directory = surroundings.make_own()?;
        remove_dead(&directory);
        let path = directory.join(format!("{}.json", std::process::id()));
        let give_up = Instant::now() + PATIENCE;
        loop {
            match LockedFile::acquire("entry", &path, |_| Ok(String::new())) {
                Ok(file) => return Ok(Registration { directory, file }),
                Err(error) if error.kind() == ErrorKind::Busy && Instant::now() < give_up => thread::sleep(Duration::from_millis(5)),
                Err(error) => return Err(error),
            }
        }
    }

    /// Where the control socket goes that nobody has asked for.
    pub fn socket_path(&self) -> PathBuf {
        self.directory.join(format!("{}.sock", std::process::id()))
    }

    /// The entry, for whoever removes it at the end.
    pub fn file(&mut self) -> &mut LockedFile {
        &mut self.file
    }

    /// Fills the entry in and lets everybody read it: to be called once the disk is mounted.
    ///
    /// # Errors
    /// Those of write(2) and fchmod(2).
    pub fn publish(&self, entry: &Entry) -> Result<()> {
        let mut text = serde_json::to_vec(entry).map_err(|error| Error::wrap(ErrorKind::InvalidArgument, "entry", error))?;
        text.push(b'\n');
        self.file.write(&text)?;
        self.file.publish()
    }
}

/// The process id in the name of an entry.
pub(super) fn pid_of(name: &OsStr) -> Option<u32> {
    let digits = name.to_str()?.strip_suffix(".json")?;
    let plain = digits.bytes().all(|byte| byte.is_ascii_digit()) && !digits.starts_with('0');
    digits.parse().ok().filter(|_| plain)
}

/// Removes the entries that nobody holds, each with the socket beside it. What cannot be removed stays, and is seen as dead by whoever looks.
fn remove_dead(directory: &Path) {
    for entry in fs::read_dir(directory).into_iter().flatten().flatten() {
        if let Some(pid) = pid_of(&entry.file_name())
            && let Err(error) = remove_if_dead(directory, &entry.path(), pid)
        {
            log::debug!("{}: {error}", entry.path().display());
        }
    }
}

fn remove_if_dead(directory: &Path, path: &Path, pid: u32) -> io::Result<()> {
    let flags = (OFlags::NOFOLLOW | OFlags::NONBLOCK).bits().cast_signed();
    let file = File::options().read(true).custom_flags(flags).open(path)?;
    if rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive).is_err() || !is_at(&file, path) {
        return Ok(()); // it lives, or has ended properly
    }
    // The socket first: without its entry nobody would remove it any more.
    let socket = directory.join(format!("{pid}.sock"));
    if fs::symlink_metadata(&socket).is_ok_and(|there| there.file_type().is_socket()) {
        fs::remove_file(&socket)?;
    }
    fs::remove_file(path)
}

/// Whether `path` still names `file`.
fn is_at(file: &File, path: &Path) -> bool {
    match (file.metadata(), fs::symlink_metadata(path)) {
        (Ok(ours), Ok(there)) => (ours.dev(), ours.ino()) == (there.dev(), there.ino()),
        _ => false,
    }
}
