//! Where entries are: the directory of this user, and those of others that may be looked into.

use std::fs::{self, DirBuilder};
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::SystemTime;

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
/// Below the directory of a user who is logged in.
const NAME: &str = "cordisk";
/// Longer names that are tried for a new directory.
const MOST_TRIES: u32 = 16;

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
    /// [`OF_USERS`], but in tests.
    pub(super) of_users: PathBuf,
    /// [`FALLBACK`], but in tests.
    pub(super) fallback: PathBuf,
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
            of_users: OF_USERS.into(),
            fallback: FALLBACK.into(),
        }
    }

    /// The directories in which this user's daemons may be entered, the first that can be used is: only that one where it was given.
    pub(super) fn own(&self) -> Vec<PathBuf> {
        if let Some(given) = &self.given {
            return vec![given.clone()];
        }
        if self.is_root() {
            return vec![OF_ROOT.into()];
        }
        // A shell started by su(1) still has the variable of the user before; one of sudo(8), cron(8) or a service has none.
        let ours = |path: &PathBuf| fs::symlink_metadata(path).is_ok_and(|there| there.is_dir() && there.uid() == self.uid);
        let logged_in = self.of_users.join(self.number().to_string());
        let mut own: Vec<PathBuf> = Vec::new();
        for directory in self.of_session.iter().chain([&logged_in]).filter(|path| ours(path)) {
            if !own.contains(&directory.join(NAME)) {
                own.push(directory.join(NAME));
            }
        }
        // Anybody can make a directory of that name in /tmp first. Then this user's is one with a longer name.
        let name = self.fallback_name();
        own.push(self.fallback.join(&name));
        let longer = format!("{name}.");
        let mut others: Vec<PathBuf> = below(&self.fallback).filter(|path| is_named(path, &longer) && ours(path)).collect();
        others.sort_unstable();
        own.extend(others);
        own
    }

    fn fallback_name(&self) -> String {
        format!("{FALLBACK_NAME}{}", self.number())
    }

    fn is_root(&self) -> bool {
        self.uid == 0 && self.outside.is_none()
    }

    /// The number of this user outside of a user namespace.
    fn number(&self) -> u32 {
        self.outside.unwrap_or(self.uid)
    }

    /// All directories that may have entries of disks which this user can reach, the own one first: only that one where it was given; root looks at
    /// those of all users, others at root's.
    pub(super) fn all(&self) -> Vec<PathBuf> {
        let mut found = self.own();
        if self.given.is_some() {
            return found;
        }
        if self.is_root() {
            found.extend(below(&self.of_users).map(|user| user.join(NAME)));
            found.extend(below(&self.fallback).filter(|path| is_named(path, FALLBACK_NAME)));
        } else {
            found.push(OF_ROOT.into());
        }
        found
    }

    /// Makes the first of the own directories that can be had, and refuses those in which somebody else could put files. Where another user has
    /// taken the last of them, a new one with a longer name is made beside it.
    ///
    /// # Errors
    /// What is wrong with the first of them, with what to do.
    pub(super) fn make_own(&self) -> Result<PathBuf> {
        let mut wrong = None;
        for path in self.own() {
            match self.make(&path) {
                Ok(()) => return Ok(path),
                Err(error) => wrong = wrong.or(Some(error)),
            }
        }
        let wrong = wrong.unwrap_or_else(|| Error::new(ErrorKind::NotFound, "no runtime directory"));
        if self.given.is_some() || self.is_root() {
            return Err(wrong);
        }
        for attempt in 0..MOST_TRIES {
            let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
            let name = format!("{}.{:x}{attempt:x}", self.fallback_name(), since.as_nanos());
            let path = self.fallback.join(name);
            if DirBuilder::new().mode(0o700).create(&path).is_ok() && self.make(&path).is_ok() {
                log::info!("{wrong}; {} is used instead", path.display());
                return Ok(path);
            }
        }
        Err(wrong)
    }

    /// Makes the directory if it is missing, and looks whether it is this user's alone.
    fn make(&self, path: &Path) -> Result<()> {
        let what = || format!("runtime directory {}", path.display());
        let shared = self.is_root();
        let mode = if shared { 0o755 } else { 0o700 };
        match DirBuilder::new().mode(mode).create(path) {
            // The umask may have taken rights away. Nobody else can have replaced it: in /tmp only the owner of a file can.
            Ok(()) => fs::set_permissions(path, PermissionsExt::from_mode(mode)).context(what)?,
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            Err(error) => return Err(Error::io(what(), error)),
        }
        let there = fs::symlink_metadata(path).context(what)?;
        let refuse = |why: String| Err(Error::new(ErrorKind::InvalidArgument, format!("{}: {why}", what())));
        let advice = format!("remove it, or name another one with {VARIABLE}");
        if !there.is_dir() {
            return refuse(format!("it is no directory; {advice}"));
        }
        if there.uid() != self.uid {
            return refuse(format!("it belongs to user {}; {advice}", there.uid()));
        }
        let in_tmp = path.parent() == Some(&self.fallback) && self.given.is_none();
        let forbidden = if in_tmp { 0o077 } else { 0o022 };
        if there.mode() & forbidden != 0 {
            let who = if in_tmp { "others may enter it; chmod 700" } else { "others may write to it; chmod go-w" };
            return refuse(format!("{who} {}", path.display()));
        }
        Ok(())
    }
}

/// What is in a directory; nothing where it cannot be read.
fn below(directory: &Path) -> impl Iterator<Item = PathBuf> + use<> {
    fs::read_dir(directory).into_iter().flatten().filter_map(|entry| entry.ok().map(|entry| entry.path()))
}

fn is_named(path: &Path, start: &str) -> bool {
    path.file_name().is_some_and(|name| name.to_string_lossy().starts_with(start))
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
        let place = Surroundings {
            uid: 0,
            outside: Some(424_242),
            given: None,
            of_session: None,
            of_users: "/nonexistent/users".into(),
            fallback: "/nonexistent/tmp".into(),
        };
        assert_eq!(place.own(), [Path::new("/nonexistent/tmp/cordisk-424242")]);
        assert_eq!(place.all(), [Path::new("/nonexistent/tmp/cordisk-424242"), Path::new("/run/cordisk")]);
        let root = Surroundings { outside: None, ..place };
        assert_eq!(root.own(), [Path::new("/run/cordisk")]);
    }
}
