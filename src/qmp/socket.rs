//! The socket's file: made so that only its owner can ever connect, never over another process's, removed only while it is ours.

use std::ffi::OsStr;
use std::fs::{self, File, TryLockError};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use rustix::fs::{AtFlags, Gid, Mode, OFlags, Uid, fchmod};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};

use crate::error::Context;
use crate::{Error, ErrorKind, Result};

/// Nobody but the owner.
const MODE: u32 = 0o600;
/// How many connections may wait to be accepted: more than there are places for clients, since one that does not block (as of an asyncio client) is
/// refused at once when they are too many.
const BACKLOG: i32 = 64;
/// How long another process may take to make its socket in the same directory.
const DIRECTORY_LOCK: Duration = Duration::from_secs(1);

/// A listening socket and its file, which is removed on drop if it is still ours.
#[derive(Debug)]
pub struct Socket {
    path: PathBuf,
    /// (device, inode) of the file.
    identity: (u64, u64),
    listener: UnixListener,
    /// Somebody else removes the file.
    entrusted: bool,
}

impl Socket {
    /// Makes the socket. One that is there already is replaced if nobody listens to it.
    ///
    /// # Errors
    /// [`ErrorKind::Busy`] if somebody listens to it; [`ErrorKind::InvalidArgument`] if the file is no socket; I/O.
    pub fn listen(path: &Path) -> Result<Socket> {
        let path = std::path::absolute(path).context(|| format!("QMP socket {}", path.display()))?;
        Self::bind(&path).map_err(|error| error.context(format!("QMP socket {}", path.display())))
    }

    fn bind(path: &Path) -> Result<Socket> {
        let address = SocketAddrUnix::new(path).map_err(|_| {
            Error::new(ErrorKind::InvalidArgument, "the kernel takes names of sockets with up to 107 bytes; choose a shorter one")
        })?;
        let directory = open_parent(path).ok();
        let _lock = directory.as_ref().and_then(lock_directory);
        remove_stale(path)?;
        let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None);
        let socket = socket.map_err(io::Error::from).context(|| "socket")?;
        // The file inherits the mode of the socket. Whatever it has, nobody connects before `listen`.
        fchmod(&socket, Mode::from_raw_mode(MODE)).map_err(io::Error::from).context(|| "mode")?;
        rustix::net::bind(&socket, &address).map_err(io::Error::from).context(|| "bind")?;
        let listening = secure(path).and_then(|identity| {
            rustix::net::listen(&socket, BACKLOG)?;
            Ok(identity)
        });
        match listening {
            Ok(identity) => Ok(Socket { path: path.into(), identity, listener: socket.into(), entrusted: false }),
            Err(error) => {
                let _ = fs::remove_file(path);
                Err(Error::io("listen", error))
            }
        }
    }

    /// (device, inode) of its file.
    pub fn identity(&self) -> (u64, u64) {
        self.identity
    }

    /// Gives the file to another user, who is served from then on (and root): to be called before becoming that user.
    ///
    /// # Errors
    /// Those of chown(2); the file is no longer ours.
    pub fn give_to(&self, uid: u32, gid: u32) -> Result<()> {
        let what = || format!("QMP socket {}", self.path.display());
        // Never through a link, and not to a file that has replaced ours meanwhile.
        let file = rustix::fs::open(&self.path, OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC, Mode::empty());
        let file = file.map_err(io::Error::from).context(what)?;
        let stat = rustix::fs::fstat(&file).map_err(io::Error::from).context(what)?;
        if (stat.st_dev, stat.st_ino) != self.identity {
            return Err(Error::new(ErrorKind::Busy, format!("{}: was replaced by another file", what())));
        }
        let (uid, gid) = (Uid::from_raw(uid), Gid::from_raw(gid));
        rustix::fs::chownat(&file, "", Some(uid), Some(gid), AtFlags::EMPTY_PATH).map_err(io::Error::from).context(what)
    }

    /// From now on it is for somebody else to remove the file, with [`remove_socket`].
    pub fn entrust(&mut self) {
        self.entrusted = true;
    }

    /// The socket, for whoever accepts connections.
    pub(super) fn listener(&self) -> &UnixListener {
        &self.listener
    }

    /// Where it is, absolute.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Lets nobody connect any more, and ends an `accept` that waits, with an error.
    pub(super) fn stop_accepting(&self) {
        let _ = rustix::net::shutdown(&self.listener, rustix::net::Shutdown::Both);
    }
}

impl Drop for Socket {
    fn drop(&mut self) {
        if self.entrusted {
            return;
        }
        let name = self.path.file_name().unwrap_or_default();
        if let Err(error) = open_parent(&self.path).and_then(|directory| remove_socket(directory, name, self.identity)) {
            log::warn!("QMP socket {}: {error}", self.path.display());
        }
    }
}

/// Removes the file of a socket, `name` in `directory`, if it is still the one of `identity` (device, inode).
///
/// # Errors
/// Those of unlink(2).
pub fn remove_socket(directory: impl AsFd, name: &OsStr, identity: (u64, u64)) -> io::Result<()> {
    let _lock = lock_directory(&directory);
    let ours = rustix::fs::statat(&directory, name, AtFlags::SYMLINK_NOFOLLOW).is_ok_and(|stat| (stat.st_dev, stat.st_ino) == identity);
    if ours { Ok(rustix::fs::unlinkat(&directory, name, AtFlags::empty())?) } else { Ok(()) }
}

/// The directory that a path leads into.
fn open_parent(path: &Path) -> io::Result<OwnedFd> {
    let parent = path.parent().ok_or(io::ErrorKind::InvalidInput)?;
    Ok(rustix::fs::open(parent, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?)
}

/// Gives the file its mode, if it has another one, and says which file it is.
fn secure(path: &Path) -> io::Result<(u64, u64)> {
    let meta = fs::symlink_metadata(path)?;
    if meta.mode() & 0o7777 != MODE {
        fs::set_permissions(path, fs::Permissions::from_mode(MODE))?;
    }
    Ok((meta.dev(), meta.ino()))
}

/// Removes a socket that nobody listens to.
fn remove_stale(path: &Path) -> Result<()> {
    let meta = match fs::symlink_metadata(path) {
        Ok(meta) => meta,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(Error::io("stat", error)),
    };
    if !meta.file_type().is_socket() {
        return Err(Error::new(ErrorKind::InvalidArgument, "the file exists and is not a socket"));
    }
    match probe(path) {
        Ok(()) => Err(Error::new(ErrorKind::Busy, "another process listens to it")),
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => fs::remove_file(path).context(|| "removing a stale socket"),
        Err(error) => Err(Error::io("a file is there, and cannot be connected to", error)),
    }
}

/// Connects, if that needs no waiting: a process that has stopped accepting, and whose backlog is full, listens as well.
fn probe(path: &Path) -> io::Result<()> {
    let address = SocketAddrUnix::new(path)?;
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    match rustix::net::connect(&socket, &address) {
        Err(rustix::io::Errno::AGAIN) => Ok(()),
        result => Ok(result?),
    }
}

/// Keeps other processes of ours from looking for, making or removing a socket in the same directory at the same time. Best effort: `None` where the
/// directory cannot be opened or locked, or somebody else keeps the lock.
fn lock_directory(directory: impl AsFd) -> Option<File> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let directory = File::from(rustix::fs::openat(directory, ".", flags, Mode::empty()).ok()?);
    let give_up = Instant::now() + DIRECTORY_LOCK;
    loop {
        match directory.try_lock() {
            Ok(()) => return Some(directory),
            Err(TryLockError::WouldBlock) if Instant::now() < give_up => thread::sleep(Duration::from_millis(10)),
            Err(_) => return None,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixStream;

    use super::*;

    #[test]
    fn only_the_owner_may_connect_and_the_file_goes_away() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("qmp");
        let socket = Socket::listen(&path).unwrap();
        assert_eq!(fs::symlink_metadata(&path).unwrap().mode() & 0o7777, MODE);
        UnixStream::connect(&path).unwrap();
        drop(socket);
        assert!(!path.exists());
    }

    #[test]
    fn a_live_socket_is_left_alone_and_a_stale_one_replaced() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("qmp");
        let first = Socket::listen(&path).unwrap();
        assert_eq!(Socket::listen(&path).unwrap_err().kind(), ErrorKind::Busy);
        assert!(path.exists());
        let Socket { listener, .. } = &first;
        let duplicate = listener.try_clone().unwrap();
        drop(duplicate);
        drop(UnixListener::bind(dir.path().join("stale")).unwrap());
        let second = Socket::listen(&dir.path().join("stale")).unwrap();
        UnixStream::connect(second.path()).unwrap();
    }

    /// It was waited for, for ever.
    #[test]
    fn a_listener_that_no_longer_accepts_is_busy() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("qmp");
        let listener = UnixListener::bind(&path).unwrap();
        rustix::net::listen(&listener, 0).unwrap();
        let _waiting = UnixStream::connect(&path).unwrap();
        let (sender, bound) = std::sync::mpsc::channel();
        thread::spawn(move || sender.send(Socket::listen(&path).unwrap_err().kind()));
        assert_eq!(bound.recv_timeout(Duration::from_secs(10)), Ok(ErrorKind::Busy));
    }

    #[test]
    fn other_files_are_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("qmp");
        fs::write(&path, "precious").unwrap();
        assert_eq!(Socket::listen(&path).unwrap_err().kind(), ErrorKind::InvalidArgument);
        assert_eq!(fs::read(&path).unwrap(), b"precious");
        fs::remove_file(&path).unwrap();
        let socket = Socket::listen(&path).unwrap();
        fs::remove_file(&path).unwrap();
        fs::write(&path, "somebody else's").unwrap();
        drop(socket);
        assert!(path.exists(), "no longer ours");
    }

    #[test]
    fn a_path_that_is_too_long_is_an_error() {
        let dir = tempfile::tempdir().unwrap();
        assert!(Socket::listen(&dir.path().join("x".repeat(120))).is_err());
        assert!(Socket::listen(&dir.path().join("nowhere/qmp")).is_err());
    }
}
