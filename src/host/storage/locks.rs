//! The advisory locks by which QEMU's programs and this one exclude each other from an image (QEMU:
//! `block/file-posix.c`, raw_apply_lock_bytes and raw_check_lock_bytes).
//!
//! A program holds a shared lock on byte 100 + i for every permission i that it uses, and on byte
//! 200 + i for every permission that it denies to others. Shared locks never conflict: each program
//! takes its own locks first and then *tests* the opposite bytes for locks of others. If two
//! programs start at the same time, both may give up, but never do both continue. The locks belong
//! to the open file (OFD locks), not to the process.

use std::fs::File;
use std::io;

use nix::fcntl::{FcntlArg, fcntl};
use nix::libc;

use super::Access;

/// First byte of the permissions in use.
const USED: i64 = 100;
/// First byte of the permissions denied to others.
const DENIED: i64 = 200;

/// A permission of QEMU's block layer (`BLK_PERM_*`). The number is its offset from the first byte.
type Permission = (i64, &'static str);
const CONSISTENT_READ: Permission = (0, "consistent read");
const WRITE: Permission = (1, "write");
const RESIZE: Permission = (3, "resize");

/// Why the locks could not be taken.
#[derive(Debug)]
pub(super) enum LockFailure {
    /// Another open file uses, or denies, the permission of this name.
    Held(&'static str),
    /// The file system does not support OFD locks.
    Unsupported(io::Error),
    /// fcntl(2) failed otherwise.
    Io(io::Error),
}

/// Takes the locks for `access`, then tests for the locks of others. [`release`] releases them, and
/// so does closing the file.
pub(super) fn take(file: &File, access: Access) -> Result<(), LockFailure> {
    let used: &[Permission] = match access {
        Access::ReadWrite => &[CONSISTENT_READ, WRITE, RESIZE],
        Access::ReadOnly => &[CONSISTENT_READ],
    };
    let denied = [WRITE, RESIZE];
    for (byte, name) in bytes(USED, used).chain(bytes(DENIED, &denied)) {
        fcntl(file, FcntlArg::F_OFD_SETLK(&lock(libc::F_RDLCK, byte)))
            .map_err(|errno| failure(errno, name))?;
    }
    for (byte, name) in bytes(DENIED, used).chain(bytes(USED, &denied)) {
        let mut found = lock(libc::F_WRLCK, byte);
        fcntl(file, FcntlArg::F_OFD_GETLK(&mut found)).map_err(|errno| failure(errno, name))?;
        if i32::from(found.l_type) != libc::F_UNLCK {
            return Err(LockFailure::Held(name));
        }
    }
    Ok(())
}

/// Releases all locks of [`take`].
pub(super) fn release(file: &File) {
    let all = libc::flock { l_len: DENIED + RESIZE.0 + 1 - USED, ..lock(libc::F_UNLCK, USED) };
    // If this fails there are no locks, or the file is about to be closed, which releases them.
    let _ = fcntl(file, FcntlArg::F_OFD_SETLK(&all));
}

fn bytes(base: i64, permissions: &[Permission]) -> impl Iterator<Item = Permission> {
    permissions.iter().map(move |(number, name)| (base + number, *name))
}

fn lock(kind: i32, byte: i64) -> libc::flock {
    libc::flock {
        l_type: kind as libc::c_short,
        l_whence: libc::SEEK_SET as libc::c_short,
        l_start: byte,
        l_len: 1,
        l_pid: 0,
    }
}

fn failure(errno: nix::Error, name: &'static str) -> LockFailure {
    match errno {
        nix::Error::EAGAIN | nix::Error::EACCES => LockFailure::Held(name),
        nix::Error::EINVAL | nix::Error::ENOLCK | nix::Error::EOPNOTSUPP | nix::Error::ENOSYS => {
            LockFailure::Unsupported(errno.into())
        }
        _ => LockFailure::Io(errno.into()),
    }
}
