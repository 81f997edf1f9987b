//! Locks of open files (OFD locks, `F_OFD_SETLK` in fcntl(2)) on bytes of a map file.

use std::ops::Range;
use std::os::fd::AsFd;

use host::{Error, ErrorKind, Result};
use nix::fcntl::{FcntlArg, fcntl};
use nix::libc;

/// Held shared by every open object and reader.
pub(super) const IN_USE: Range<u64> = 0..1;
/// Held to change the map, to open the object, and to remove it.
pub(super) const CHANGES: Range<u64> = 1..2;
/// Held around fdatasync(2) of the data.
pub(super) const COMMIT: Range<u64> = 2..3;

/// Whether others may hold the same lock.
#[derive(Clone, Copy)]
pub(super) enum Kind {
    Shared,
    Exclusive,
}

/// Takes the lock if no other open file holds a conflicting one. Returns whether it was taken.
pub(super) fn try_lock(file: &impl AsFd, kind: Kind, range: &Range<u64>) -> Result<bool> {
    let raw = match kind {
        Kind::Shared => libc::F_RDLCK,
        Kind::Exclusive => libc::F_WRLCK,
    };
    match fcntl(file.as_fd(), FcntlArg::F_OFD_SETLK(&lock(raw, range)?)) {
        Ok(_) => Ok(true),
        Err(nix::Error::EAGAIN | nix::Error::EACCES) => Ok(false),
        Err(errno) => Err(failure(errno)),
    }
}

/// Waits for the exclusive lock.
pub(super) fn wait(file: &impl AsFd, range: &Range<u64>) -> Result<()> {
    let wanted = lock(libc::F_WRLCK, range)?;
    loop {
        match fcntl(file.as_fd(), FcntlArg::F_OFD_SETLKW(&wanted)) {
            Ok(_) => return Ok(()),
            Err(nix::Error::EINTR) => {}
            Err(errno) => return Err(failure(errno)),
        }
    }
}

/// Releases the lock.
pub(super) fn release(file: &impl AsFd, range: &Range<u64>) {
    if let Ok(unlock) = lock(libc::F_UNLCK, range) {
        // This fails only where no lock could be taken.
        let _ = fcntl(file.as_fd(), FcntlArg::F_OFD_SETLK(&unlock));
    }
}

/// Whether another open file holds a lock, shared or exclusive, on a byte of the range.
pub(super) fn is_held_by_others(file: &impl AsFd, range: &Range<u64>) -> Result<bool> {
    let mut found = lock(libc::F_WRLCK, range)?;
    fcntl(file.as_fd(), FcntlArg::F_OFD_GETLK(&mut found)).map_err(failure)?;
    Ok(i32::from(found.l_type) != libc::F_UNLCK)
}

fn lock(kind: i32, range: &Range<u64>) -> Result<libc::flock> {
    let bad = |_| Error::new(ErrorKind::InvalidArgument, "a lock beyond the end of all files");
    Ok(libc::flock {
        l_type: kind as libc::c_short,
        l_whence: libc::SEEK_SET as libc::c_short,
        l_start: range.start.try_into().map_err(bad)?,
        l_len: range.end.saturating_sub(range.start).try_into().map_err(bad)?,
        l_pid: 0,
    })
}

fn failure(errno: nix::Error) -> Error {
    let text = match errno {
        nix::Error::EINVAL | nix::Error::ENOLCK | nix::Error::EOPNOTSUPP | nix::Error::ENOSYS => {
            "the file system has no locks for open files (OFD locks); choose another place for the cache"
        }
        _ => "locking failed",
    };
    Error::io(text, errno.into())
}
