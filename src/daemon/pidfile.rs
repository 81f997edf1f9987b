//! The file with the process id: held by a lock, so that one that a killed daemon left behind is known as such.

use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::{FlockOperation, OFlags};
use rustix::io::Errno;

use crate::error::Context;
use crate::{Error, ErrorKind, Result};

/// Longest content that is taken for a process id; anything else is somebody's file and is left alone.
const LONGEST: u64 = 32;

/// A locked pidfile. Dropping it removes the file, unless that was left to somebody else.
#[derive(Debug)]
pub(super) struct Pidfile {
    path: PathBuf,
    file: File,
    entrusted: bool,
}

impl Pidfile {
    /// Creates or takes over the file, and locks it. It stays empty until [`Pidfile::write`].
    ///
    /// # Errors
    /// Busy: another daemon holds it. InvalidArgument: it is no pidfile. Otherwise what the system says.
    pub(super) fn acquire(path: &Path) -> Result<Pidfile> {
        let what = || format!("pidfile {}", path.display());
        loop {
            let mut file = File::options()
                .read(true)
                .write(true)
                .create(true)
                .truncate(false)
                .mode(0o600)
                .custom_flags((OFlags::NOFOLLOW | OFlags::NONBLOCK).bits().cast_signed())
                .open(path)
                .context(what)?;
            let content = content(&mut file).map_err(|error| error.context(what()))?;
            match rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
                Ok(()) => {}
                Err(Errno::WOULDBLOCK) => {
                    let holder = if content.is_empty() { String::new() } else { format!(" (process {content})") };
                    return Err(Error::new(ErrorKind::Busy, format!("{}: in use by another daemon{holder}", what())));
                }
                Err(errno) => return Err(Error::io(what(), errno.into())),
            }
            // Its owner may have removed it between our open and our lock; then the lock is on a file that nobody will find.
            if is_at(&file, path) {
                file.set_len(0).context(what)?;
                return Ok(Pidfile { path: path.to_path_buf(), file, entrusted: false });
            }
        }
    }

    /// Where it is.
    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// Its (device, inode).
    ///
    /// # Errors
    /// Those of fstat(2).
    pub(super) fn identity(&self) -> Result<(u64, u64)> {
        let metadata = self.file.metadata().context(|| format!("pidfile {}", self.path.display()))?;
        Ok((metadata.dev(), metadata.ino()))
    }

    /// From now on it is for somebody else to remove the file.
    pub(super) fn entrust(&mut self) {
        self.entrusted = true;
    }

    /// Writes the process id and a newline.
    ///
    /// # Errors
    /// Those of write(2).
    pub(super) fn write(&self) -> Result<()> {
        // At offset 0: the file has been read to its end.
        let line = format!("{}\n", std::process::id());
        self.file.write_all_at(line.as_bytes(), 0).context(|| format!("pidfile {}", self.path.display()))
    }
}

impl Drop for Pidfile {
    fn drop(&mut self) {
        if !self.entrusted
            && is_at(&self.file, &self.path)
            && let Err(error) = std::fs::remove_file(&self.path)
        {
            log::warn!("removing pidfile {}: {error}", self.path.display());
        }
    }
}

/// The digits in `file`, checked to be all there is.
fn content(file: &mut File) -> Result<String> {
    let strange = || Error::new(ErrorKind::InvalidArgument, "exists and is not a pidfile");
    if !file.metadata().context(|| "fstat")?.is_file() {
        return Err(strange());
    }
    let mut text = String::new();
    file.take(LONGEST + 1).read_to_string(&mut text).map_err(|error| match error.kind() {
        io::ErrorKind::InvalidData => strange(),
        _ => Error::io("read", error),
    })?;
    let digits = text.trim();
    if text.len() as u64 <= LONGEST && digits.bytes().all(|byte| byte.is_ascii_digit()) { Ok(digits.to_string()) } else { Err(strange()) }
}

/// Whether `path` still names `file`.
fn is_at(file: &File, path: &Path) -> bool {
    match (file.metadata(), std::fs::symlink_metadata(path)) {
        (Ok(ours), Ok(there)) => (ours.dev(), ours.ino()) == (there.dev(), there.ino()),
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_holder_at_a_time_and_the_file_goes_with_it() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("pid");
        let held = Pidfile::acquire(&path).unwrap();
        held.write().unwrap();
        assert_eq!(std::fs::read_to_string(&path).unwrap(), format!("{}\n", std::process::id()));
        let error = Pidfile::acquire(&path).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Busy);
        assert!(error.to_string().contains(&format!("process {}", std::process::id())));
        drop(held);
        assert!(!path.exists());
    }

    #[test]
    fn a_stale_file_is_taken_over() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("pid");
        std::fs::write(&path, "4194305000\n").unwrap();
        let held = Pidfile::acquire(&path).unwrap();
        held.write().unwrap();
        assert_eq!(std::fs::read_to_string(&path).unwrap(), format!("{}\n", std::process::id()));
        drop(held);
        assert!(!path.exists());
    }

    #[test]
    fn a_file_of_somebody_else_is_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("pid");
        for other in [&b"root:x:0:0"[..], b"1 2", b"\xff", &[b'1'; 33]] {
            std::fs::write(&path, other).unwrap();
            assert_eq!(Pidfile::acquire(&path).unwrap_err().kind(), ErrorKind::InvalidArgument);
            assert_eq!(std::fs::read(&path).unwrap(), other);
        }
        assert!(Pidfile::acquire(dir.path()).is_err());
    }

    #[test]
    fn a_file_that_replaced_ours_stays() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("pid");
        let held = Pidfile::acquire(&path).unwrap();
        std::fs::remove_file(&path).unwrap();
        std::fs::write(&path, "1").unwrap();
        drop(held);
        assert!(path.exists());
    }
}
