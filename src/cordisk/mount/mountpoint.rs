//! The file that the mount covers: checks which files may be one, and creates an empty placeholder
//! if the path does not exist.

use std::ffi::OsString;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, FileType, Mode, OFlags, Stat};
use rustix::io::Errno;

use super::mountinfo;
use host::error::{Context, os_text};
use host::{Error, ErrorKind, Result};

/// A file to mount on. Dropping it removes the file if it is a placeholder.
#[derive(Debug)]
pub(super) struct Mountpoint {
    /// Absolute, without symbolic links.
    path: PathBuf,
    directory: OwnedFd,
    name: OsString,
    /// Opened before the mount, so it stays the file below the mount.
    file: OwnedFd,
    stat: Stat,
    placeholder: bool,
}

impl Mountpoint {
    /// Checks `path`, and creates the placeholder if the path does not exist. `taken` holds
    /// (device, inode) of the image and its backing files.
    ///
    /// # Errors
    /// Busy: a file system is mounted there. InvalidArgument: the path is not a regular file, or it
    /// is one of `taken`. Otherwise the error of the system call.
    pub(super) fn prepare(path: &Path, taken: &[(u64, u64)]) -> Result<Self> {
        let what = || format!("mountpoint {}", path.display());
        let (Some(parent), Some(name)) = (path.parent(), path.file_name()) else {
            return Err(Error::new(
                ErrorKind::InvalidArgument,
                format!("{}: not a file name", what()),
            ));
        };
        let parent = parent.canonicalize().context(what)?;
        let path = parent.join(name);
        refuse_mounted(&path)?;

        let directory = rustix::fs::open(
            &parent,
            OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC,
            Mode::empty(),
        );
        let directory = directory.map_err(std::io::Error::from).context(what)?;
        let existing = rustix::fs::openat(
            &directory,
            name,
            OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC,
            Mode::empty(),
        );
        let (file, placeholder) = match existing {
            Ok(file) => (file, false),
            Err(Errno::NOENT) => {
                let flags = OFlags::RDWR
                    | OFlags::CREATE
                    | OFlags::EXCL
                    | OFlags::NOFOLLOW
                    | OFlags::CLOEXEC;
                let created = rustix::fs::openat(&directory, name, flags, Mode::RUSR | Mode::WUSR);
                (
                    created
                        .map_err(std::io::Error::from)
                        .context(|| format!("creating {}", what()))?,
                    true,
                )
            }
            Err(error) => return Err(Error::io(what(), error.into())),
        };
        // From here on, dropping `target` removes a file that was created.
        let stat = rustix::fs::fstat(&file).map_err(std::io::Error::from).context(what)?;
        let mut target =
            Mountpoint { path, directory, name: name.to_owned(), file, stat, placeholder };
        target.check(taken).map_err(|error| error.context(what()))?;
        target.adopt().context(what)?;
        Ok(target)
    }

    fn check(&self, taken: &[(u64, u64)]) -> Result<()> {
        let refuse = |why: &str| Err(Error::new(ErrorKind::InvalidArgument, why.to_string()));
        match FileType::from_raw_mode(self.stat.st_mode) {
            FileType::RegularFile if taken.contains(&(self.stat.st_dev, self.stat.st_ino)) => {
                refuse("it is the image or one of its backing files; mount on another file")
            }
            FileType::RegularFile => Ok(()),
            FileType::Symlink => refuse("it is a symbolic link; name the file itself"),
            FileType::Directory => {
                refuse("it is a directory; name a regular file, or one that does not exist")
            }
            _ => refuse("it is not a regular file"),
        }
    }

    /// Adopts the placeholder that a killed daemon left behind. It is empty, belongs to this user,
    /// and has mode 0, which other programs do not give a file.
    fn adopt(&mut self) -> std::io::Result<()> {
        let ours = self.stat.st_uid == rustix::process::geteuid().as_raw();
        if !self.placeholder && ours && is_placeholder(&self.stat) {
            // fusermount3 refuses files that the user cannot write. The mode is changed through
            // /proc, because this descriptor is O_PATH.
            rustix::fs::chmod(self.reopen_path(), Mode::RUSR | Mode::WUSR)?;
            self.file = rustix::fs::open(
                self.reopen_path(),
                OFlags::RDWR | OFlags::CLOEXEC,
                Mode::empty(),
            )?;
            self.placeholder = true;
        } else if !self.placeholder && self.stat.st_size > 0 {
            log::warn!(
                "{}: its {} bytes are hidden while the disk is mounted",
                self.path.display(),
                self.stat.st_size
            );
        }
        Ok(())
    }

    /// Returns the path: absolute, without symbolic links.
    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// Returns a path that names this very file, even if its own path leads elsewhere by now.
    pub(super) fn reopen_path(&self) -> PathBuf {
        format!("/proc/self/fd/{}", self.file.as_raw_fd()).into()
    }

    /// Returns type and permissions, for the kernel's `rootmode`.
    pub(super) fn raw_mode(&self) -> u32 {
        self.stat.st_mode
    }

    /// Removes all permissions of a placeholder. Must be called once the disk is mounted. A program
    /// that opens the path after an unmount then gets an error instead of an empty file.
    pub(super) fn hide(&self) {
        if self.placeholder
            && let Err(error) = rustix::fs::fchmod(&self.file, Mode::empty())
        {
            log::warn!(
                "{}: placeholder keeps its permissions: {}",
                self.path.display(),
                os_text(&error.into())
            );
        }
    }

    fn remove_placeholder(&self) -> Result<(), Errno> {
        let now = rustix::fs::statat(&self.directory, &self.name, AtFlags::SYMLINK_NOFOLLOW)?;
        let same = (now.st_dev, now.st_ino) == (self.stat.st_dev, self.stat.st_ino);
        if same && now.st_size == 0 {
            rustix::fs::unlinkat(&self.directory, &self.name, AtFlags::empty())
        } else {
            Ok(())
        }
    }
}

impl Drop for Mountpoint {
    fn drop(&mut self) {
        if !self.placeholder {
            return;
        }
        // The file stays if another file system is mounted there: a stat(2) of that mount could
        // hang, and it would not describe our file. The path is rebuilt because a directory above
        // it may have been renamed.
        let directory = std::fs::read_link(format!("/proc/self/fd/{}", self.directory.as_raw_fd()));
        let path =
            directory.map_or_else(|_| self.path.clone(), |directory| directory.join(&self.name));
        match mountinfo::mounted_at(&path) {
            Ok(None) => {}
            Ok(Some(_)) | Err(_) => return,
        }
        match self.remove_placeholder() {
            Ok(()) | Err(Errno::NOENT) => {}
            Err(error) => log::warn!(
                "{}: removing the placeholder: {}",
                self.path.display(),
                os_text(&error.into())
            ),
        }
    }
}

/// The path of a mount of another process. Dropping it removes the placeholder that this process
/// has left, once nothing is mounted there.
#[derive(Debug)]
pub(super) struct LeftBehind(pub(super) PathBuf);

impl Drop for LeftBehind {
    fn drop(&mut self) {
        remove_left_behind(&self.0, None);
    }
}

/// Tells whether a file looks like the placeholder that a daemon leaves under its mount: empty, and
/// with mode 0, which other programs do not give a file.
fn is_placeholder(stat: &Stat) -> bool {
    let plain = FileType::from_raw_mode(stat.st_mode) == FileType::RegularFile;
    plain && stat.st_size == 0 && Mode::from_raw_mode(stat.st_mode).is_empty() && stat.st_nlink == 1
}

/// Removes the placeholder that a killed daemon of this user, or of `user`, has left at `path`, if
/// nothing is mounted there. Returns whether a file was removed.
pub(super) fn remove_left_behind(path: &Path, user: Option<u32>) -> bool {
    if !matches!(mountinfo::mounted_at(path), Ok(None)) {
        return false;
    }
    let (Some(parent), Some(name)) = (path.parent(), path.file_name()) else { return false };
    // The directory is held open. It may belong to another user that could replace it with a link
    // to a different directory between the check and the removal.
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let Ok(parent) = rustix::fs::open(parent, flags, Mode::empty()) else { return false };
    let Ok(stat) = rustix::fs::statat(&parent, name, AtFlags::SYMLINK_NOFOLLOW) else {
        return false;
    };
    let ours = stat.st_uid == rustix::process::geteuid().as_raw() || Some(stat.st_uid) == user;
    ours && is_placeholder(&stat) && rustix::fs::unlinkat(&parent, name, AtFlags::empty()).is_ok()
}

/// Refuses a path at which a file system is mounted. Reads only the list of mounts: the process
/// that serves the mount may never answer.
fn refuse_mounted(path: &Path) -> Result<()> {
    let Some(mounted) = mountinfo::mounted_at(path)? else { return Ok(()) };
    let (path, fs_type) = (path.display(), mounted.fs_type);
    let lazily = if fs_type.starts_with("fuse") {
        format!(" (if its daemon is gone: umount -l {path})")
    } else {
        String::new()
    };
    let text = format!(
        "mountpoint {path}: already mounted ({fs_type}); unmount it first: umount {path}{lazily}"
    );
    Err(Error::new(ErrorKind::Busy, text))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};

    fn why(path: &Path, taken: &[(u64, u64)]) -> String {
        Mountpoint::prepare(path, taken).unwrap_err().to_string()
    }

    #[test]
    fn a_placeholder_comes_and_goes() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("disk");
        let target = Mountpoint::prepare(&path, &[]).unwrap();
        assert_eq!(path.metadata().unwrap().mode() & 0o177, 0);
        target.hide();
        assert_eq!(path.metadata().unwrap().mode() & 0o777, 0);
        drop(target);
        assert!(!path.exists());
    }

    #[test]
    fn a_placeholder_that_somebody_used_stays() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("disk");
        let target = Mountpoint::prepare(&path, &[]).unwrap();
        std::fs::write(&path, "x").unwrap();
        drop(target);
        assert!(path.exists());

        std::fs::remove_file(&path).unwrap();
        let target = Mountpoint::prepare(&path, &[]).unwrap();
        std::fs::rename(&path, dir.path().join("elsewhere")).unwrap();
        std::fs::write(&path, "").unwrap();
        drop(target);
        assert!(path.exists());
    }

    #[test]
    fn an_existing_file_stays_and_keeps_its_mode() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("disk");
        std::fs::write(&path, "").unwrap();
        let mode = path.metadata().unwrap().mode();
        let target = Mountpoint::prepare(&path, &[]).unwrap();
        target.hide();
        drop(target);
        assert_eq!(path.metadata().unwrap().mode(), mode);
    }

    #[test]
    fn the_placeholder_of_a_killed_daemon_is_taken_over() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("disk");
        std::fs::write(&path, "").unwrap();
        std::fs::set_permissions(&path, PermissionsExt::from_mode(0o000)).unwrap();
        drop(Mountpoint::prepare(&path, &[]).unwrap());
        assert!(!path.exists());
    }

    #[test]
    fn what_a_killed_daemon_left_goes_and_what_looks_like_it_stays() {
        let dir = tempfile::tempdir().unwrap();
        let file = |name: &str, content: &str, mode: u32| {
            let path = dir.path().join(name);
            std::fs::write(&path, content).unwrap();
            std::fs::set_permissions(&path, PermissionsExt::from_mode(mode)).unwrap();
            path
        };
        assert!(remove_left_behind(&file("left", "", 0), None));
        assert!(!dir.path().join("left").exists());
        for (name, content, mode) in [("used", "x", 0), ("readable", "", 0o400)] {
            let path = file(name, content, mode);
            assert!(!remove_left_behind(&path, None) && path.exists(), "{name}");
        }
        assert!(
            !remove_left_behind(Path::new("/proc"), None)
                && !remove_left_behind(&dir.path().join("none"), None)
        );
    }

    #[test]
    fn what_is_not_a_plain_file_is_refused_by_name() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("file");
        std::fs::write(&file, "").unwrap();
        symlink(&file, dir.path().join("link")).unwrap();
        symlink("nowhere", dir.path().join("dangling")).unwrap();
        assert!(why(dir.path(), &[]).contains("is a directory"));
        assert!(why(&dir.path().join("link"), &[]).contains("symbolic link"));
        assert!(why(&dir.path().join("dangling"), &[]).contains("symbolic link"));
        assert!(why(&dir.path().join("no/disk"), &[]).contains("No such file or directory"));
        assert!(why(Path::new("/"), &[]).contains("not a file name"));
        let stat = file.metadata().unwrap();
        assert!(why(&file, &[(1, 2), (stat.dev(), stat.ino())]).contains("backing files"));
        assert!(file.exists());
    }

    #[test]
    fn a_mounted_path_is_busy() {
        let error = Mountpoint::prepare(Path::new("/proc"), &[]).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Busy);
        assert!(error.to_string().contains("already mounted (proc); unmount it first"));
    }
}
