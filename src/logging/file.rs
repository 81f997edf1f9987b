//! The file of `--log`, opened so that another user cannot lead the lines to a place of his choice.

use std::fs::File;
use std::io;
use std::path::Path;

use jiff::Timestamp;
use rustix::fs::{FileType, OFlags};
use rustix::io::Errno;
use serde::{Deserialize, Serialize};

use super::Line;
use crate::error::Context;
use crate::running::Place;
use crate::{Error, ErrorKind, Result};

/// Users to whom the file may belong, beside the one that opens it: that of `--user`, for which a
/// rotation may have made it.
#[derive(Clone, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
pub struct Owners(pub Vec<u32>);

/// Opens the log file at `path` for appending, or creates it with mode 0600.
///
/// # Errors
/// It is no regular file, or a symbolic link, or belongs to another user, to whom the lines would
/// go; those of [`Place::find`] and [`Place::open_or_create`].
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

/// A line as it stands in the file: like those on standard error, and with the disk, as several may
/// share a file.
pub(super) fn format(subject: &str, line: &Line) -> String {
    let time = Timestamp::try_from(line.time).unwrap_or_default();
    let (level, target, text) = (line.level, &line.target, &line.text);
    let separator = if subject.is_empty() { "" } else { ": " };
    format!("[{time:.0} {level:<5} {target}] {subject}{separator}{text}\n")
}
