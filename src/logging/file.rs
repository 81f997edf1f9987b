//! The file of `--log`, opened so that another user cannot lead the lines to a place of his choice.

use std::fs::File;
use std::io;
use std::path::Path;

use jiff::Timestamp;
use rustix::fs::{FileType, Mode, OFlags};
use serde::{Deserialize, Serialize};

use super::Line;
use crate::error::Context;
use crate::{Error, ErrorKind, Result};

/// Users to whom the file may belong, beside the one that opens it: that of `--user`, for which a
/// rotation may have made it.
#[derive(Clone, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
pub struct Owners(pub Vec<u32>);

/// Opens the log file at `path` for appending, or creates it with mode 0600.
///
/// # Errors
/// It is no regular file, or a symbolic link, or belongs to another user, to whom the lines would
/// go; those of open(2).
pub fn open(path: &Path, owners: &Owners) -> Result<File> {
    // NONBLOCK: a pipe without a reader is an error here, and not a wait.
    let flags = OFlags::WRONLY | OFlags::APPEND | OFlags::CREATE | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
    let refuse = |why: &'static str| Error::new(ErrorKind::InvalidArgument, why);
    let file = rustix::fs::open(path, flags, Mode::RUSR | Mode::WUSR).map_err(|error| match error {
        rustix::io::Errno::LOOP => refuse("is a symbolic link; name the file itself"),
        rustix::io::Errno::NXIO => refuse("is not a regular file"),
        error => Error::io("opening", io::Error::from(error)),
    })?;
    let stat = rustix::fs::fstat(&file).map_err(io::Error::from).context(|| "fstat")?;
    if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile {
        return Err(refuse("is not a regular file"));
    }
    let us = rustix::process::geteuid().as_raw();
    if stat.st_uid != us && !owners.0.contains(&stat.st_uid) {
        return Err(refuse("belongs to another user; name another file, or change its owner"));
    }
    Ok(File::from(file))
}

/// A line as it stands in the file: like those on standard error, and with the disk, as several may
/// share a file.
pub(super) fn format(subject: &str, line: &Line) -> String {
    let time = Timestamp::try_from(line.time).unwrap_or_default();
    let (level, target, text) = (line.level, &line.target, &line.text);
    let separator = if subject.is_empty() { "" } else { ": " };
    format!("[{time:.0} {level:<5} {target}] {subject}{separator}{text}\n")
}
