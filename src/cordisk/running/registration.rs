//! The entry of this daemon: creates, locks and fills it, and removes the entries of dead daemons.

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
use host::{Error, ErrorKind, Result};

/// How long to wait for the lock on the entry: a command that checks whether the daemon runs holds
/// it for a moment.
const PATIENCE: Duration = Duration::from_secs(2);

/// The name of the main thread of a mount keeper, as `ps` shows it.
pub const KEEPER_NAME: &str = "cordisk-keeper";

/// The place of this daemon in the runtime directory. Dropping it removes the entry, unless its
/// removal was entrusted to the keeper.
#[derive(Debug)]
pub struct Registration {
    directory: PathBuf,
    /// The process id of the daemon's main process.
    main: u32,
    file: LockedFile,
}

impl Registration {
    /// Creates the runtime directory if it is missing, removes entries and sockets of killed
    /// daemons there, and creates and locks the entry of the daemon with the main process `main`.
    /// The entry is empty until [`Registration::publish`].
    ///
    /// # Errors
    /// The directory cannot be created, belongs to another user, or is writable for others; or the
    /// error of the system call.
    pub fn begin(main: u32) -> Result<Registration> {
        Self::begin_in(&Surroundings::of_this_process(), main)
    }

    pub(super) fn begin_in(surroundings: &Surroundings, main: u32) -> Result<Registration> {
        let directory = surroundings.make_own()?;
        remove_dead(&directory, main);
        let path = directory.join(format!("{main}.json"));
        let give_up = Instant::now() + PATIENCE;
        loop {
            match LockedFile::acquire("entry", &path, |_| Ok(String::new())) {
                Ok(file) => return Ok(Registration { directory, main, file }),
                Err(error) if error.kind() == ErrorKind::Busy && Instant::now() < give_up => {
                    thread::sleep(Duration::from_millis(5))
                }
                Err(error) => return Err(error),
            }
        }
    }

    /// Returns the path of the control socket if no path was requested.
    pub fn socket_path(&self) -> PathBuf {
        self.directory.join(format!("{}.sock", self.main))
    }

    /// Returns the entry's file, so that its removal can be entrusted to the keeper.
    pub fn file(&mut self) -> &mut LockedFile {
        &mut self.file
    }

    /// Fills in the entry and makes it readable for all users. Must be called once the disk is
    /// mounted.
    ///
    /// # Errors
    /// Those of write(2) and fchmod(2).
    pub fn publish(&self, entry: &Entry) -> Result<()> {
        let mut text = serde_json::to_vec(entry)
            .map_err(|error| Error::wrap(ErrorKind::InvalidArgument, "entry", error))?;
        text.push(b'\n');
        self.file.write(&text)?;
        self.file.publish()
    }
}

/// Returns the process id in the name of an entry.
pub(super) fn pid_of(name: &OsStr) -> Option<u32> {
    let digits = name.to_str()?.strip_suffix(".json")?;
    let plain = digits.bytes().all(|byte| byte.is_ascii_digit()) && !digits.starts_with('0');
    digits.parse().ok().filter(|_| plain)
}

/// Removes the entries that no process has locked, each with what lies beside it. An entry that
/// cannot be removed stays, and commands see it as dead.
///
/// An entry whose keeper lives stays: its serving process may have died a moment ago, and the next
/// one fills the entry in again. So does that of `main`, whose keeper listens beside it already.
fn remove_dead(directory: &Path, main: u32) {
    for entry in fs::read_dir(directory).into_iter().flatten().flatten() {
        if let Some(pid) = pid_of(&entry.file_name())
            && pid != main
            && !is_keeper(pid)
            && let Err(error) = remove_if_dead(directory, &entry.path(), pid)
        {
            log::debug!("{}: {error}", entry.path().display());
        }
    }
}

/// Tells whether the process is a mount keeper that lives. Name and state are what other users can
/// see of it.
pub fn is_keeper(pid: u32) -> bool {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    let parts = stat.split_once('(').and_then(|(_, rest)| rest.rsplit_once(") "));
    // Z: it has ended, and its parent has not asked for its status yet.
    parts.is_some_and(|(name, rest)| name == KEEPER_NAME && !rest.starts_with(['Z', 'X']))
}

fn remove_if_dead(directory: &Path, path: &Path, pid: u32) -> io::Result<()> {
    let flags = (OFlags::NOFOLLOW | OFlags::NONBLOCK).bits().cast_signed();
    let file = File::options().read(true).custom_flags(flags).open(path)?;
    if rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive).is_err()
        || !is_at(&file, path)
    {
        return Ok(()); // the daemon runs, or has removed the file
    }
    // What lies beside it is removed first: without the entry no later daemon would remove it.
    let suffixes = [("sock", true), ("keeper", true), ("mount", false), ("mount.new", false)];
    for (suffix, is_socket) in suffixes {
        let path = directory.join(format!("{pid}.{suffix}"));
        let there = fs::symlink_metadata(&path).map(|there| there.file_type());
        if there.is_ok_and(|there| if is_socket { there.is_socket() } else { there.is_file() }) {
            fs::remove_file(&path)?;
        }
    }
    fs::remove_file(path)
}

/// Tells whether `path` still leads to `file`.
fn is_at(file: &File, path: &Path) -> bool {
    match (file.metadata(), fs::symlink_metadata(path)) {
        (Ok(ours), Ok(there)) => (ours.dev(), ours.ino()) == (there.dev(), there.ino()),
        _ => false,
    }
}
