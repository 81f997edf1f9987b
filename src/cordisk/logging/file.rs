//! The file of `--log`, opened so that another user cannot redirect the lines to a file of that
//! user's choice.

use std::fs::File;
use std::io::{self, Write};
use std::path::Path;

use jiff::Timestamp;
use rustix::fs::{FileType, OFlags};
use rustix::io::Errno;
use serde::{Deserialize, Serialize};

use super::LogLine;
use host::error::Context;
use host::place::Place;
use host::{Error, ErrorKind, Result};

/// Users that may own the file besides the user that opens it: a log rotation may have created the
/// file for the user of `--user`.
#[derive(Clone, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
pub struct Owners(pub Vec<u32>);

/// Opens the log file at `path` for appending, or creates it with mode 0600.
///
/// # Errors
/// The file is not a regular file, is a symbolic link, or belongs to another user that could read
/// the lines; errors of [`Place::find`] and [`Place::open_or_create`].
pub fn open(path: &Path, owners: &Owners) -> Result<File> {
    let refuse = |why: &'static str| Error::new(ErrorKind::InvalidArgument, why);
    let opened = Place::find(path)?.open_or_create(OFlags::WRONLY | OFlags::APPEND);
    let file = opened.map_err(|error| match error.errno().map(Errno::from_raw_os_error) {
        Some(Errno::LOOP) => refuse("is a symbolic link; name the file itself"),
        // A pipe without a reader, or a socket.
        Some(Errno::NXIO) => refuse("is not a regular file"),
        _ => error,
    })?;
    let stat = rustix::fs::fstat(&file).map_err(io::Error::from).context(|| "fstat")?;
    if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile {
        return Err(refuse("is not a regular file"));
    }
    let us = rustix::process::geteuid().as_raw();
    if stat.st_uid != us && !owners.0.contains(&stat.st_uid) {
        return Err(refuse("belongs to another user; name another file, or change its owner"));
    }
    Ok(file)
}

/// The open log file.
#[derive(Debug)]
pub(super) struct LogFile {
    file: File,
    /// The last line is incomplete, because there was no space for it.
    is_torn: bool,
}

impl From<File> for LogFile {
    fn from(file: File) -> LogFile {
        LogFile { file, is_torn: false }
    }
}

impl LogFile {
    /// Appends a line, which includes its line end. If the line before was torn, starts on a new
    /// line.
    ///
    /// # Errors
    /// Those of write(2). A part of the line may have been written.
    pub(super) fn append(&mut self, line: &str) -> io::Result<()> {
        let line = if self.is_torn { format!("\n{line}") } else { line.to_owned() };
        let mut rest = line.as_bytes();
        while !rest.is_empty() {
            match self.file.write(rest) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(written) => {
                    rest = &rest[written..];
                    self.is_torn = !rest.is_empty();
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }
}

/// Formats a line as on standard error, with the disk added, because several disks may share a
/// file.
pub(super) fn format(subject: &str, line: &LogLine) -> String {
    let time = Timestamp::try_from(line.time).unwrap_or_default();
    let (level, target, text) = (line.level, &line.target, &line.text);
    let separator = if subject.is_empty() { "" } else { ": " };
    format!("[{time:.0} {level:<5} {target}] {subject}{separator}{text}\n")
}
