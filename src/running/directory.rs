//! Where entries are: the directory of this user, and those of others that may be looked into.

use std::fs::{self, DirBuilder};
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

use crate::error::Context;
use crate::{Error, ErrorKind, Result};

/// Overrides all others.
const VARIABLE: &str = "CORDISK_RUNTIME_DIR";
/// That of the system's own disks.
const OF_ROOT: &str = "/run/cordisk";
/// Where each user who is logged in has a directory.
const OF_USERS: &str = "/run/user";
/// Where users without one have theirs.
const FALLBACK: &str = "/tmp";
/// Before the user id.
const FALLBACK_NAME: &str = "cordisk-";

/// Whose directories are looked at.
#[derive(Clone, Debug)]
pub(super) struct Surroundings {
    /// The effective user.
    pub(super) uid: u32,
    /// Root of a user namespace in which /run is not root's: the number that the user has outside.
    /// Such a root is a user like any other.
    pub(super) outside: Option<u32>,
    /// `$CORDISK_RUNTIME_DIR`.
    pub(super) given: Option<PathBuf>,
    /// `$XDG_RUNTIME_DIR`.
    pub(super) of_session: Option<PathBuf>,
}

impl Surroundings {
    /// Those of this process.
    pub(super) fn of_this_process() -> Surroundings {
        let variable = |name| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
        let uid = rustix::process::geteuid().as_raw();
        Surroundings {
            uid,
            outside: if uid == 0 { root_outside() } else { None },
            given: variable(VARIABLE).map(|path| std::path::absolute(&path).unwrap_or(path)),
            of_session: variable("XDG_RUNTIME_DIR"),
        }
    }

    /// The directory in which this user's daemons are entered.
    pub(super) fn own(&self) -> PathBuf {
        if let Some(given) = &self.given {
            return given.clone();
        }
        if self.is_root() {
            return OF_ROOT.into();
        }
        // Who has become another user with su(1) still has the variable of the one before.
        let ours = |path: &&PathBuf| fs::metadata(path).is_ok_and(|there| there.is_dir() && there.uid() == self.uid);
        match self.of_session.as_ref().filter(ours) {
            Some(of_session) => of_session.join("cordisk"),
            None => self.fallback(),
        }
    }

    fn is_root(&self) -> bool {
        self.uid == 0 && self.outside.is_none()
    }

    fn fallback(&self) -> PathBuf {
        Path::new(FALLBACK).join(format!("{FALLBACK_NAME}{}", self.outside.unwrap_or(self.uid)))
    }

    /// All directories that may have entries of disks which this user can reach, the own one first: only that one where it was given; root looks at
    /// those of all users, others at root's.
    pub(super) fn all(&self) -> Vec<PathBuf> {
        let mut found = vec![self.own()];
        if self.given.is_some() {
            return found;
        }
        if self.is_root() {
            let below = |path: &str| fs::read_dir(path).into_iter().flatten().filter_map(|entry| entry.ok().map(|entry| entry.path()));
            found.extend(below(OF_USERS).map(|user| user.join("cordisk")));
            let name_fits = |path: &PathBuf| path.file_name().is_some_and(|name| name.to_string_lossy().starts_with(FALLBACK_NAME));
            found.extend(below(FALLBACK).filter(name_fits));
        } else {
            found.push(OF_ROOT.into());
            // Of what was mounted outside of a session.
            let fallback = self.fallback();
            if !found.contains(&fallback) {
                found.push(fallback);
            }
        }
        found
    }

    /// Makes the own directory if it is missing, and refuses one in which somebody else could put files.
    ///
    /// # Errors
    /// As said, with what to do; what the system says.
    pub(super) fn make_own(&self) -> Result<PathBuf> {
        let path = self.own();
        let what = || format!("runtime directory {}", path.display());
        let shared = self.is_root();
        let mode = if shared { 0o755 } else { 0o700 };
        match DirBuilder::new().mode(mode).create(&path) {
            // The umask may have taken rights away.
            Ok(()) => fs::set_permissions(&path, PermissionsExt::from_mode(mode)).context(what)?,
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            Err(error) => return Err(Error::io(what(), error)),
        }
        let there = fs::symlink_metadata(&path).context(what)?;
        let refuse = |why: String| Err(Error::new(ErrorKind::InvalidArgument, format!("{}: {why}", what())));
        let advice = format!("remove it, or name another one with {VARIABLE}");
        if !there.is_dir() {
            return refuse(format!("it is no directory; {advice}"));
        }
        if there.uid() != self.uid {
            return refuse(format!("it belongs to user {}; {advice}", there.uid()));
        }
        let in_tmp = path.parent() == Some(Path::new(FALLBACK)) && self.given.is_none();
        let forbidden = if in_tmp { 0o077 } else { 0o022 };
        if there.mode() & forbidden != 0 {
            let who = if in_tmp { "others may enter it; chmod 700" } else { "others may write to it; chmod go-w" };
            return refuse(format!("{who} {}", path.display()));
        }
        Ok(path)
    }
}

/// The number outside of the user who is root here, if this is a user namespace whose /run is not
/// root's. `None` on a host, and in containers that have a /run of their own.
fn root_outside() -> Option<u32> {
    let is_roots = fs::metadata("/run").is_ok_and(|run| run.uid() == 0);
    let map = if is_roots { String::new() } else { fs::read_to_string("/proc/self/uid_map").unwrap_or_default() };
    outside_of(&map)
}

/// The number outside of user 0 in a /proc/PID/uid_map, whose lines are "first inside, first
/// outside, how many".
fn outside_of(map: &str) -> Option<u32> {
    map.lines().find_map(|line| {
        let mut numbers = line.split_whitespace();
        (numbers.next() == Some("0")).then(|| numbers.next()?.parse().ok())?
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Root of a user namespace has its disks where the user outside has them, and asks no other
    /// user's.
    #[test]
    fn root_of_a_namespace_is_a_user() {
        assert_eq!(outside_of("         0       1000          1\n"), Some(1000));
        assert_eq!(outside_of("         1     100000      65536\n         0       1000          1\n"), Some(1000));
        assert_eq!(outside_of(""), None);
        let place = Surroundings { uid: 0, outside: Some(424_242), given: None, of_session: None };
        assert_eq!(place.own(), Path::new("/tmp/cordisk-424242"));
        assert_eq!(place.all(), [Path::new("/tmp/cordisk-424242"), Path::new("/run/cordisk")]);
        let root = Surroundings { outside: None, ..place };
        assert_eq!(root.own(), Path::new("/run/cordisk"));
    }
}
