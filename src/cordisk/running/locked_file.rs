//! A file that shows that a process is running. The process holds a lock on it, so the file of a
//! killed process can be recognised.

use std::fs::File;
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt};
use std::path::Path;

use rustix::fs::{FlockOperation, OFlags};
use rustix::io::Errno;

use host::error::Context;
use host::place::Place;
use host::{Error, ErrorKind, Result};

/// A locked file. Dropping it removes the file, unless its removal was entrusted to the keeper.
#[derive(Debug)]
pub struct LockedFile {
    /// What the file is, for messages.
    name: &'static str,
    place: Place,
    file: File,
    entrusted: bool,
}

impl LockedFile {
    /// Creates the file (mode 0600), or takes over one that no process has locked, and locks it.
    /// The file is empty then. `name` is the name of the file's kind in messages. `inspect` checks
    /// an existing file before it is changed, and returns a description of its holder for the
    /// error.
    ///
    /// # Errors
    /// Busy: another process holds the lock. Otherwise the error of `inspect` or of the system
    /// call.
    pub fn acquire(
        name: &'static str,
        path: &Path,
        mut inspect: impl FnMut(&mut File) -> Result<String>,
    ) -> Result<LockedFile> {
        let what = || format!("{name} {}", path.display());
        let place = Place::find(path).map_err(|error| error.context(what()))?;
        loop {
            let mut file =
                place.open_or_create(OFlags::RDWR).map_err(|error| error.context(what()))?;
            let holder = inspect(&mut file).map_err(|error| error.context(what()))?;
            match rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
                Ok(()) => {}
                Err(Errno::WOULDBLOCK) => {
                    return Err(Error::new(
                        ErrorKind::Busy,
                        format!("{}: in use by another daemon{holder}", what()),
                    ));
                }
                Err(errno) => return Err(Error::io(what(), errno.into())),
            }
            // The previous owner may have removed the file between our open and our lock. The lock
            // is then on a file that no path leads to.
            if place.holds(&file) {
                file.set_len(0).context(what)?;
                return Ok(LockedFile { name, place, file, entrusted: false });
            }
        }
    }

    fn what(&self) -> String {
        format!("{} {}", self.name, self.place.path().display())
    }

    /// Returns the path of the file.
    pub fn path(&self) -> &Path {
        self.place.path()
    }

    /// Returns the (device, inode) of the file.
    ///
    /// # Errors
    /// Those of fstat(2).
    pub fn identity(&self) -> Result<(u64, u64)> {
        let metadata = self.file.metadata().context(|| self.what())?;
        Ok((metadata.dev(), metadata.ino()))
    }

    /// Leaves the removal of the file to the keeper.
    pub fn entrust(&mut self) {
        self.entrusted = true;
    }

    /// Fills the empty file. Uses only the open descriptor, so it works in the sandbox.
    ///
    /// # Errors
    /// Those of write(2).
    pub fn write(&self, content: &[u8]) -> Result<()> {
        // Written at offset 0, because the position may be at the end after a read.
        self.file.write_all_at(content, 0).context(|| self.what())
    }

    /// Makes the file readable for all users, regardless of the umask.
    ///
    /// # Errors
    /// Those of fchmod(2).
    pub(super) fn publish(&self) -> Result<()> {
        self.file.set_permissions(PermissionsExt::from_mode(0o644)).context(|| self.what())
    }
}

impl Drop for LockedFile {
    fn drop(&mut self) {
        if !self.entrusted
            && self.place.holds(&self.file)
            && let Err(error) = self.place.remove()
        {
            log::warn!("removing {}: {error}", self.what());
        }
    }
}
