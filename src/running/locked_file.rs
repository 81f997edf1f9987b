//! A file that says of a process that it lives: held by a lock, so that one that a killed process left behind is known as such.

use std::fs::File;
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt};
use std::path::Path;

use rustix::fs::{FlockOperation, OFlags};
use rustix::io::Errno;

use super::Place;
use crate::error::Context;
use crate::{Error, ErrorKind, Result};

/// A locked file. Dropping it removes the file, unless that was left to somebody else.
#[derive(Debug)]
pub struct LockedFile {
    /// What it is, for messages.
    name: &'static str,
    place: Place,
    file: File,
    entrusted: bool,
}

impl LockedFile {
    /// Creates the file (mode 0600) or takes over one that nobody holds, and locks it. It is empty then. `name` says in messages what it is. `inspect` looks at what is there before it
    /// is touched, and says who the holder is, for the error.
    ///
    /// # Errors
    /// Busy: somebody holds it. What `inspect` says. Otherwise what the system says.
    pub fn acquire(name: &'static str, path: &Path, mut inspect: impl FnMut(&mut File) -> Result<String>) -> Result<LockedFile> {
        let what = || format!("{name} {}", path.display());
        let place = Place::find(path).map_err(|error| error.context(what()))?;
        loop {
            let mut file = place.open_or_create(OFlags::RDWR).map_err(|error| error.context(what()))?;
            let holder = inspect(&mut file).map_err(|error| error.context(what()))?;
            match rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
                Ok(()) => {}
                Err(Errno::WOULDBLOCK) => {
                    return Err(Error::new(ErrorKind::Busy, format!("{}: in use by another daemon{holder}", what())));
                }
                Err(errno) => return Err(Error::io(what(), errno.into())),
            }
            // Its owner may have removed it between our open and our lock; then the lock is on a file that nobody will find.
            if place.holds(&file) {
                file.set_len(0).context(what)?;
                return Ok(LockedFile { name, place, file, entrusted: false });
            }
        }
    }

    fn what(&self) -> String {
        format!("{} {}", self.name, self.place.path().display())
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        self.place.path()
    }

    /// Its (device, inode).
    ///
    /// # Errors
    /// Those of fstat(2).
    pub fn identity(&self) -> Result<(u64, u64)> {
        let metadata = self.file.metadata().context(|| self.what())?;
        Ok((metadata.dev(), metadata.ino()))
    }

    /// From now on it is for somebody else to remove the file.
    pub fn entrust(&mut self) {
        self.entrusted = true;
    }

    /// Fills the empty file. Needs nothing but the open descriptor.
    ///
    /// # Errors
    /// Those of write(2).
    pub fn write(&self, content: &[u8]) -> Result<()> {
        // At offset 0: the file may have been read to its end.
        self.file.write_all_at(content, 0).context(|| self.what())
    }

    /// Lets everybody read it, whatever the umask says.
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
