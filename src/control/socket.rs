//! The file of the control socket. It is created with a mode that lets only its owner connect. It
//! never replaces the live socket of another process, and is removed only while it is still the
//! file that was created. Mode and owner are changed through a descriptor, never by path. In a
//! directory of another user, the file is created in a private directory and then moved.

use std::ffi::{OsStr, OsString};
use std::fs::{File, TryLockError};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use rustix::fs::{AtFlags, FileType, Gid, Mode, OFlags, RenameFlags, Uid, fchmod};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};

use host::error::Context;
use host::place::Place;
use host::{Error, ErrorKind, Result};

/// Mode of the file: only the owner may connect.
const MODE: u32 = 0o600;
/// Connections that may wait to be accepted: more than the limit of clients. A client with a
/// non-blocking socket (asyncio) is refused at once when the backlog is full.
const BACKLOG: i32 = 64;
/// The most names that are tried for a private directory.
const MOST_TRIES: u32 = 100;
/// How long to wait for another process that creates its socket in the same directory.
const DIRECTORY_LOCK: Duration = Duration::from_secs(1);

/// A listening socket and its file. The file is removed on drop if it is still the one that was
/// created.
#[derive(Debug)]
pub struct Socket {
    place: Place,
    /// The file, opened with `O_PATH`: it is changed through this descriptor, never by its path.
    file: OwnedFd,
    /// Device and inode of the file.
    identity: (u64, u64),
    listener: UnixListener,
    /// The file is not removed on drop ([`Socket::entrust`]).
    entrusted: bool,
}

impl Socket {
    /// Creates the socket. An existing socket is replaced if no process listens on it.
    ///
    /// # Errors
    /// [`ErrorKind::Busy`] if a process listens on it; [`ErrorKind::InvalidArgument`] if the file
    /// is not a socket; I/O errors.
    pub fn listen(path: &Path) -> Result<Socket> {
        let path =
            std::path::absolute(path).context(|| format!("QMP socket {}", path.display()))?;
        Self::bind(&path).map_err(|error| error.context(format!("QMP socket {}", path.display())))
    }

    fn bind(path: &Path) -> Result<Socket> {
        let address = SocketAddrUnix::new(path).map_err(|_| {
            Error::new(
                ErrorKind::InvalidArgument,
                "the kernel takes names of sockets with up to 107 bytes; choose a shorter one",
            )
        })?;
        let place = Place::find(path)?;
        let _lock = lock_directory(place.directory());
        remove_stale(&place)?;
        let socket = rustix::net::socket_with(
            AddressFamily::UNIX,
            SocketType::STREAM,
            SocketFlags::CLOEXEC,
            None,
        );
        let socket = socket.map_err(io::Error::from).context(|| "socket")?;
        // The file inherits the mode of the socket. No client can connect before `listen`, whatever
        // the mode is until then.
        fchmod(&socket, Mode::from_raw_mode(MODE)).map_err(io::Error::from).context(|| "mode")?;
        let bound = if place.is_foreign() {
            bind_privately(&socket, &place)
        } else {
            bind_openly(&socket, &place, &address)
        };
        let file = bound.context(|| "bind")?;
        let stat = rustix::fs::fstat(&file).map_err(io::Error::from).context(|| "fstat")?;
        Ok(Socket {
            place,
            file,
            identity: (stat.st_dev, stat.st_ino),
            listener: socket.into(),
            entrusted: false,
        })
    }

    /// Returns device and inode of the file.
    pub fn identity(&self) -> (u64, u64) {
        self.identity
    }

    /// Changes the owner of the file, so that this user (and root) is served from then on. To be
    /// called before the process becomes that user. Changes the file that was created, even if the
    /// path leads to another file by now.
    ///
    /// # Errors
    /// Those of chown(2).
    pub fn give_to(&self, uid: u32, gid: u32) -> Result<()> {
        let (uid, gid) = (Uid::from_raw(uid), Gid::from_raw(gid));
        let given = rustix::fs::chownat(&self.file, "", Some(uid), Some(gid), AtFlags::EMPTY_PATH);
        given.map_err(io::Error::from).context(|| format!("QMP socket {}", self.path().display()))
    }

    /// Leaves the removal of the file to another process, which calls [`remove_socket`].
    pub fn entrust(&mut self) {
        self.entrusted = true;
    }

    /// Returns the socket on which connections are accepted.
    pub(super) fn listener(&self) -> &UnixListener {
        &self.listener
    }

    /// Returns the absolute path of the socket.
    pub fn path(&self) -> &Path {
        self.place.path()
    }

    /// Refuses new connections. A waiting `accept` returns with an error.
    pub(super) fn stop_accepting(&self) {
        let _ = rustix::net::shutdown(&self.listener, rustix::net::Shutdown::Both);
    }
}

impl Drop for Socket {
    fn drop(&mut self) {
        if self.entrusted {
            return;
        }
        if let Err(error) = remove_socket(self.place.directory(), self.place.name(), self.identity)
        {
            log::warn!("QMP socket {}: {error}", self.path().display());
        }
    }
}

/// Removes the file `name` in `directory` if it is still the one with this `identity` (device and
/// inode).
///
/// # Errors
/// Those of unlink(2).
pub fn remove_socket(directory: impl AsFd, name: &OsStr, identity: (u64, u64)) -> io::Result<()> {
    let _lock = lock_directory(&directory);
    let ours = rustix::fs::statat(&directory, name, AtFlags::SYMLINK_NOFOLLOW)
        .is_ok_and(|stat| (stat.st_dev, stat.st_ino) == identity);
    if ours { Ok(rustix::fs::unlinkat(&directory, name, AtFlags::empty())?) } else { Ok(()) }
}

/// Binds in a directory in which only root and this user can change files, and starts to listen.
/// Returns the file.
fn bind_openly(socket: &OwnedFd, place: &Place, address: &SocketAddrUnix) -> io::Result<OwnedFd> {
    rustix::net::bind(socket, address)?;
    let listening = file_in(place.directory(), place.name()).and_then(|file| {
        rustix::net::listen(socket, BACKLOG)?;
        Ok(file)
    });
    if listening.is_err() {
        let _ = place.remove();
    }
    listening
}

/// Binds in a new directory that only this user can enter, starts to listen, and moves the file to
/// its place. So the owner of the target directory sees only a complete socket, and cannot
/// interfere with its creation.
fn bind_privately(socket: &OwnedFd, place: &Place) -> io::Result<OwnedFd> {
    let (directory, name) = private_directory(place)?;
    let inner = OsStr::new("socket");
    let address = Path::new("/proc/self/fd").join(directory.as_raw_fd().to_string()).join(inner);
    let bound = (|| {
        rustix::net::bind(socket, &SocketAddrUnix::new(&address)?)?;
        let file = file_in(directory.as_fd(), inner)?;
        rustix::net::listen(socket, BACKLOG)?;
        // Never replaces a file that another process has created since the stale one was removed.
        match rustix::fs::renameat_with(
            &directory,
            inner,
            place.directory(),
            place.name(),
            RenameFlags::NOREPLACE,
        ) {
            Err(Errno::INVAL | Errno::NOSYS) => {
                rustix::fs::renameat(&directory, inner, place.directory(), place.name())?
            }
            renamed => renamed?,
        }
        Ok(file)
    })();
    let _ = rustix::fs::unlinkat(&directory, inner, AtFlags::empty());
    let _ = rustix::fs::unlinkat(place.directory(), &name, AtFlags::REMOVEDIR);
    bound
}

/// Creates a directory beside `place` and opens it. Fails unless the opened directory belongs to
/// this user, because another user owns its parent and can replace it.
fn private_directory(place: &Place) -> io::Result<(OwnedFd, OsString)> {
    let mut tries = 0;
    let name = loop {
        let name = OsString::from(format!(".cordisk-{}-{tries}", std::process::id()));
        match rustix::fs::mkdirat(place.directory(), &name, Mode::RWXU) {
            Ok(()) => break name,
            Err(Errno::EXIST) if tries < MOST_TRIES => tries += 1,
            Err(error) => return Err(error.into()),
        }
    };
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let directory = rustix::fs::openat(place.directory(), &name, flags, Mode::empty())?;
    let stat = rustix::fs::fstat(&directory)?;
    if stat.st_uid != rustix::process::geteuid().as_raw() || stat.st_mode & 0o777 != 0o700 {
        return Err(io::Error::other("its directory is changed by another user at this moment"));
    }
    Ok((directory, name))
}

/// Opens the file of the socket just created, and sets its mode.
fn file_in(directory: BorrowedFd<'_>, name: &OsStr) -> io::Result<OwnedFd> {
    let file = rustix::fs::openat(
        directory,
        name,
        OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC,
        Mode::empty(),
    )?;
    let stat = rustix::fs::fstat(&file)?;
    if FileType::from_raw_mode(stat.st_mode) != FileType::Socket {
        return Err(io::Error::other("it was replaced by another file"));
    }
    if stat.st_mode & 0o7777 != MODE {
        // An `O_PATH` descriptor does not support fchmod(2), but this path leads to its file and to
        // no other.
        let name = Path::new("/proc/self/fd").join(file.as_raw_fd().to_string());
        rustix::fs::chmod(&name, Mode::from_raw_mode(MODE))?;
    }
    Ok(file)
}

/// Removes an existing socket on which no process listens.
fn remove_stale(place: &Place) -> Result<()> {
    let there = match place.stat() {
        Ok(there) => there,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(Error::io("stat", error)),
    };
    if FileType::from_raw_mode(there.st_mode) != FileType::Socket {
        return Err(Error::new(ErrorKind::InvalidArgument, "the file exists and is not a socket"));
    }
    // The plain path is used where it is safe; it fits a socket address, because longer ones were
    // refused before.
    let path = if place.is_foreign() { place.by_descriptor() } else { place.path().to_path_buf() };
    match probe(&path) {
        Ok(()) => Err(Error::new(ErrorKind::Busy, "another process listens to it")),
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
            place.remove().context(|| "removing a stale socket")
        }
        Err(error) => Err(Error::io("a file is there, and cannot be connected to", error)),
    }
}

/// Connects without waiting. A full backlog counts as success, because a process that no longer
/// accepts still listens.
fn probe(path: &Path) -> io::Result<()> {
    let address = SocketAddrUnix::new(path)?;
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    match rustix::net::connect(&socket, &address) {
        Err(rustix::io::Errno::AGAIN) => Ok(()),
        result => Ok(result?),
    }
}

/// Keeps other cordisk processes from looking up, creating or removing a socket in the same
/// directory at the same time. Best effort: `None` if the directory cannot be opened or locked, or
/// if another process holds the lock for longer than [`DIRECTORY_LOCK`].
fn lock_directory(directory: impl AsFd) -> Option<File> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let directory = File::from(rustix::fs::openat(directory, ".", flags, Mode::empty()).ok()?);
    let give_up = Instant::now() + DIRECTORY_LOCK;
    loop {
        match directory.try_lock() {
            Ok(()) => return Some(directory),
            Err(TryLockError::WouldBlock) if Instant::now() < give_up => {
                thread::sleep(Duration::from_millis(10))
            }
            Err(_) => return None,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::{MetadataExt, PermissionsExt};
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

    /// Protects: in a directory that other users can write to, the socket works as elsewhere: its
    /// mode, connecting, a live socket, a stale one and the removal. No other file is left there.
    #[test]
    fn a_directory_of_others_holds_a_socket_as_well() {
        let dir = tempfile::tempdir().unwrap();
        fs::set_permissions(dir.path(), PermissionsExt::from_mode(0o777)).unwrap();
        let path = dir.path().join("qmp");
        drop(UnixListener::bind(&path).unwrap());
        let socket = Socket::listen(&path).unwrap();
        let there = fs::symlink_metadata(&path).unwrap();
        assert_eq!((there.mode() & 0o7777, (there.dev(), there.ino())), (MODE, socket.identity()));
        UnixStream::connect(&path).unwrap();
        assert_eq!(Socket::listen(&path).unwrap_err().kind(), ErrorKind::Busy);
        socket
            .give_to(rustix::process::geteuid().as_raw(), rustix::process::getegid().as_raw())
            .unwrap();
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
        drop(socket);
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
    }

    /// Protects: if a user replaces the file of the socket, `give_to` and the removal do not change
    /// the file that replaced it.
    #[test]
    fn the_file_that_was_made_is_given_away_and_no_other() {
        let dir = tempfile::tempdir().unwrap();
        let (path, victim) = (dir.path().join("qmp"), dir.path().join("victim"));
        fs::write(&victim, "1").unwrap();
        fs::set_permissions(&victim, PermissionsExt::from_mode(0o640)).unwrap();
        let before = (victim.metadata().unwrap().uid(), victim.metadata().unwrap().mode());
        for mode in [0o755, 0o777] {
            fs::set_permissions(dir.path(), PermissionsExt::from_mode(mode)).unwrap();
            let socket = Socket::listen(&path).unwrap();
            fs::remove_file(&path).unwrap();
            std::os::unix::fs::symlink(&victim, &path).unwrap();
            let _ = socket.give_to(65534, 65534);
            drop(socket);
            assert_eq!(
                (victim.metadata().unwrap().uid(), victim.metadata().unwrap().mode()),
                before
            );
            fs::remove_file(&path).unwrap();
        }
    }

    /// Protects: a listener that no longer accepts counts as busy. `listen` used to wait for it for
    /// ever.
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
