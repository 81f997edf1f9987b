//! The place of a file that this program creates: its directory, open, and its name in it.
//!
//! Root may be told to put sockets, pidfiles and logs into directories of other users. Such a user
//! can replace a directory on the path, or the file itself, at any moment. Therefore a path is
//! walked once, and every later operation uses the open directory. Symbolic links of other users
//! are not followed. An existing file in a directory of another user is used only if it belongs to
//! this user alone.

use std::collections::VecDeque;
use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::path::{Component, Path, PathBuf};

use rustix::fs::{AtFlags, FileType, Mode, OFlags, Stat};
use rustix::io::Errno;

use crate::error::Context;
use crate::{Error, ErrorKind, Result};

/// Largest number of symbolic links on one path, as in path_resolution(7).
const MOST_LINKS: usize = 40;
/// Write permission for users other than the owner of a directory.
const OTHERS_WRITE: u32 = 0o022;
const STICKY: u32 = 0o1000;

/// An open directory, and a name in it.
#[derive(Debug)]
pub struct Place {
    /// Absolute, as the caller named it.
    path: PathBuf,
    directory: OwnedFd,
    name: OsString,
    foreign: bool,
}

impl Place {
    /// Opens the directory of `path`. The file itself need not exist.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidArgument`] if `path` does not end in a file name, or leads through a
    /// symbolic link of a user other than root and this one; those of open(2).
    pub fn find(path: &Path) -> Result<Place> {
        let path = std::path::absolute(path).context(|| path.display().to_string())?;
        let (Some(parent), Some(name)) = (path.parent(), path.file_name()) else {
            return Err(Error::new(ErrorKind::InvalidArgument, "not the name of a file"));
        };
        let name = name.to_owned();
        let (directory, foreign) = walk(parent)?;
        Ok(Place { path, directory, name, foreign })
    }

    /// Returns the path, absolute, as the caller named it.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Returns the directory, opened with `O_PATH`.
    pub fn directory(&self) -> BorrowedFd<'_> {
        self.directory.as_fd()
    }

    /// Returns the name in the directory.
    pub fn name(&self) -> &OsStr {
        &self.name
    }

    /// Returns whether a user other than root and this one can replace the file, or a directory
    /// above it.
    pub fn is_foreign(&self) -> bool {
        self.foreign
    }

    /// Returns a path that leads to the name in this open directory, even after the directory was
    /// renamed. It is short enough for the address of a socket, unless the name has nearly 255
    /// bytes.
    pub fn by_descriptor(&self) -> PathBuf {
        Path::new("/proc/self/fd").join(self.directory.as_raw_fd().to_string()).join(&self.name)
    }

    /// Returns the status of the entry at the name; does not follow a symbolic link.
    ///
    /// # Errors
    /// Those of fstatat(2).
    pub fn stat(&self) -> io::Result<Stat> {
        Ok(rustix::fs::statat(&self.directory, &self.name, AtFlags::SYMLINK_NOFOLLOW)?)
    }

    /// Opens the file, or creates it (mode 0600) if it does not exist. Never follows a link, waits
    /// for a FIFO, or takes a terminal as the controlling one.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidArgument`] for a file in a directory of another user that is not this
    /// user's alone: opening it could change the data of another user. Those of open(2).
    pub fn open_or_create(&self, flags: OFlags) -> Result<File> {
        let flags = flags
            | OFlags::CREATE
            | OFlags::NOFOLLOW
            | OFlags::NONBLOCK
            | OFlags::NOCTTY
            | OFlags::CLOEXEC;
        let opened =
            rustix::fs::openat(&self.directory, &self.name, flags, Mode::RUSR | Mode::WUSR);
        let file = File::from(opened.map_err(io::Error::from).context(|| "open")?);
        let there = file.metadata().context(|| "fstat")?;
        let ours = there.is_file()
            && there.uid() == rustix::process::geteuid().as_raw()
            && there.nlink() == 1;
        if self.foreign && !ours {
            let text = "lies in a directory of another user, and is not a file of this user's alone; choose another place";
            return Err(Error::new(ErrorKind::InvalidArgument, text));
        }
        Ok(file)
    }

    /// Returns whether `file` is the file that has the name now.
    pub fn holds(&self, file: &File) -> bool {
        match (file.metadata(), self.stat()) {
            (Ok(ours), Ok(there)) => (ours.dev(), ours.ino()) == (there.st_dev, there.st_ino),
            _ => false,
        }
    }

    /// Removes the file.
    ///
    /// # Errors
    /// Those of unlink(2).
    pub fn remove(&self) -> io::Result<()> {
        Ok(rustix::fs::unlinkat(&self.directory, &self.name, AtFlags::empty())?)
    }
}

/// Opens the directory `path` (absolute). Also returns whether another user can replace it, or an
/// entry on the path to it.
fn walk(path: &Path) -> Result<(OwnedFd, bool)> {
    let context = || path.display().to_string();
    let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let open = |directory: &OwnedFd, name: &OsStr| {
        rustix::fs::openat(directory, name, flags, Mode::empty())
    };
    let root =
        || rustix::fs::open("/", flags, Mode::empty()).map_err(io::Error::from).context(context);
    let me = rustix::process::geteuid().as_raw();
    let mut here = root()?;
    let mut foreign = is_open_to_others(&here, me)?;
    let mut links = 0;
    let mut rest: VecDeque<OsString> = names(path);
    while let Some(name) = rest.pop_front() {
        let next = open(&here, &name).map_err(io::Error::from).context(context)?;
        let stat = rustix::fs::fstat(&next).map_err(io::Error::from).context(context)?;
        if FileType::from_raw_mode(stat.st_mode) == FileType::Symlink {
            if ![0, me].contains(&stat.st_uid) {
                let (name, uid) = (name.display(), stat.st_uid);
                let text = format!(
                    "{}: \"{name}\" is a symbolic link of user {uid}; name the directory itself",
                    context()
                );
                return Err(Error::new(ErrorKind::InvalidArgument, text));
            }
            links += 1;
            if links > MOST_LINKS {
                return Err(Error::io(context(), Errno::LOOP.into()));
            }
            let target = rustix::fs::readlinkat(&next, "", Vec::new())
                .map_err(io::Error::from)
                .context(context)?;
            let target = PathBuf::from(<OsString as std::os::unix::ffi::OsStringExt>::from_vec(
                target.into_bytes(),
            ));
            if target.is_absolute() {
                (here, foreign) = (root()?, false);
            }
            for name in names(&target).into_iter().rev() {
                rest.push_front(name);
            }
            continue;
        }
        here = next;
        foreign |= is_open_to_others(&here, me)?;
    }
    Ok((here, foreign))
}

/// Returns the names on a path.
fn names(path: &Path) -> VecDeque<OsString> {
    let name = |component: Component<'_>| match component {
        Component::Normal(_) | Component::ParentDir => Some(component.as_os_str().to_owned()),
        Component::RootDir | Component::CurDir | Component::Prefix(_) => None,
    };
    path.components().filter_map(name).collect()
}

/// Returns whether a user other than root and `me` can replace the entries of a directory. In a
/// directory with the sticky bit, users can replace only their own entries.
fn is_open_to_others(directory: &OwnedFd, me: u32) -> Result<bool> {
    let stat = rustix::fs::fstat(directory).map_err(io::Error::from).context(|| "fstat")?;
    Ok(![0, me].contains(&stat.st_uid)
        || (stat.st_mode & OTHERS_WRITE != 0 && stat.st_mode & STICKY == 0))
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::{PermissionsExt, symlink};

    use super::*;

    /// Protects: the place stays the directory that was found, wherever its path leads later. The
    /// user's own symbolic links and `..` are followed as usual.
    #[test]
    fn a_place_stays_where_it_was_found() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        fs::create_dir_all(at("real/deep")).unwrap();
        fs::create_dir(at("victim")).unwrap();
        symlink("real/deep", at("link")).unwrap();
        symlink(at("real"), at("absolute")).unwrap();
        for path in ["real/deep/f", "link/f", "absolute/deep/f", "link/../deep/f"] {
            let place = Place::find(&at(path)).unwrap();
            drop(place.open_or_create(OFlags::RDWR).unwrap());
            assert!(at("real/deep/f").is_file(), "{path}");
            fs::rename(at("real/deep"), at("moved")).unwrap();
            symlink(at("victim"), at("real/deep")).unwrap();
            let file = place.open_or_create(OFlags::RDWR).unwrap();
            assert!(
                place.holds(&file) && at("moved/f").is_file() && place.by_descriptor().is_file(),
                "{path}"
            );
            place.remove().unwrap();
            assert!(!at("moved/f").exists() && !at("victim/f").exists(), "{path}");
            fs::remove_file(at("real/deep")).unwrap();
            fs::rename(at("moved"), at("real/deep")).unwrap();
        }
        symlink("loop", at("loop")).unwrap();
        assert!(
            Place::find(&at("loop/f")).is_err()
                && Place::find(&at("gone/f")).is_err()
                && Place::find(Path::new("/")).is_err()
        );
    }

    /// Protects: in a directory that other users can write, a file with a second name is not used,
    /// and no link is followed. In a directory with the sticky bit, or in the user's own directory,
    /// files are opened as usual.
    #[test]
    fn what_others_have_put_there_is_not_taken_over() {
        let dir = tempfile::tempdir().unwrap();
        let (victim, path) = (dir.path().join("victim"), dir.path().join("open/f"));
        fs::create_dir(dir.path().join("open")).unwrap();
        fs::write(&victim, "1").unwrap();
        for (mode, foreign) in [(0o777, true), (0o775, true), (0o1777, false), (0o755, false)] {
            fs::set_permissions(dir.path().join("open"), PermissionsExt::from_mode(mode)).unwrap();
            let place = Place::find(&path).unwrap();
            assert_eq!(place.is_foreign(), foreign, "{mode:o}");
            symlink(&victim, &path).unwrap();
            assert!(place.open_or_create(OFlags::RDWR).is_err(), "{mode:o}");
            fs::remove_file(&path).unwrap();
            fs::hard_link(&victim, &path).unwrap();
            assert_eq!(place.open_or_create(OFlags::RDWR).is_err(), foreign, "{mode:o}");
            fs::remove_file(&path).unwrap();
            drop(place.open_or_create(OFlags::RDWR).unwrap());
            place.open_or_create(OFlags::RDWR).expect("our own");
            fs::remove_file(&path).unwrap();
        }
    }

    /// Protects: root does not follow a symbolic link of another user.
    #[test]
    fn links_of_others_are_not_followed() {
        if !rustix::process::geteuid().is_root() {
            return eprintln!("skipped: not root");
        }
        let dir = tempfile::tempdir().unwrap();
        let link = dir.path().join("link");
        symlink("/etc", &link).unwrap();
        assert!(Place::find(&link.join("f")).is_ok());
        std::os::unix::fs::lchown(&link, Some(65534), None).unwrap();
        let error = Place::find(&link.join("f")).unwrap_err().to_string();
        assert!(error.contains("\"link\" is a symbolic link of user 65534"), "{error}");
        let theirs = dir.path().join("theirs");
        fs::create_dir(&theirs).unwrap();
        std::os::unix::fs::chown(&theirs, Some(65534), None).unwrap();
        fs::create_dir(theirs.join("roots")).unwrap();
        assert!(
            Place::find(&theirs.join("roots/f")).unwrap().is_foreign(),
            "all below can be moved away"
        );
    }
}
