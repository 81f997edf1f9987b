//! The file with the process id.

use std::fs::File;
use std::io::{self, Read};
use std::path::Path;

use crate::running::LockedFile;
use host::error::Context;
use host::{Error, ErrorKind, Result};

/// Longest content in bytes that is taken for a process id. A longer file is not a pidfile and is
/// not touched.
const LONGEST: u64 = 32;

/// A locked pidfile. Dropping it removes the file, unless its removal was entrusted to the keeper.
#[derive(Debug)]
pub(super) struct Pidfile(LockedFile);

impl Pidfile {
    /// Creates or takes over the file, and locks it. The file stays empty until [`Pidfile::write`].
    ///
    /// # Errors
    /// Busy: another daemon holds the file. InvalidArgument: the file is not a pidfile. Otherwise
    /// the error of the system call.
    pub(super) fn acquire(path: &Path) -> Result<Pidfile> {
        let holder = |file: &mut File| {
            let content = content(file)?;
            Ok(if content.is_empty() { content } else { format!(" (process {content})") })
        };
        LockedFile::acquire("pidfile", path, holder).map(Pidfile)
    }

    /// Returns the locked file, so that its removal can be entrusted to the keeper.
    pub(super) fn file(&mut self) -> &mut LockedFile {
        &mut self.0
    }

    /// Writes the process id `main` and a newline.
    ///
    /// # Errors
    /// Those of write(2).
    pub(super) fn write(&self, main: u32) -> Result<()> {
        self.0.write(format!("{main}\n").as_bytes())
    }
}

/// Returns the digits in `file`, after checking that it holds nothing else.
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
    if text.len() as u64 <= LONGEST && digits.bytes().all(|byte| byte.is_ascii_digit()) {
        Ok(digits.to_string())
    } else {
        Err(strange())
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
        held.write(std::process::id()).unwrap();
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
        held.write(std::process::id()).unwrap();
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
