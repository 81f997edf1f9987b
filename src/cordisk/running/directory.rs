//! The directories of entries: that of this user, and those of other users that this user may read.

use std::fs::{self, DirBuilder};
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use host::error::Context;
use host::{Error, ErrorKind, Result};

/// The variable that overrides all other directories.
const VARIABLE: &str = "CORDISK_RUNTIME_DIR";
/// The directory of root.
const OF_ROOT: &str = "/run/cordisk";
/// Contains a directory for each user that is logged in.
const OF_USERS: &str = "/run/user";
/// Contains the directories of users that are not logged in.
const FALLBACK: &str = "/tmp";
/// Prefix of a directory's name in [`FALLBACK`]; the user id follows.
const FALLBACK_NAME: &str = "cordisk-";
/// Name of the directory below that of a user that is logged in.
const NAME: &str = "cordisk";
/// How many longer names are tried for a new directory.
const MOST_TRIES: u32 = 16;

/// The facts that determine which directories are searched.
#[derive(Clone, Debug)]
pub(super) struct Surroundings {
    /// The effective user id.
    pub(super) uid: u32,
    /// Set for root of a user namespace whose /run does not belong to that root: the user's id
    /// outside. Such a root is treated like any other user.
    pub(super) outside: Option<u32>,
    /// `$CORDISK_RUNTIME_DIR`.
    pub(super) given: Option<PathBuf>,
    /// `$XDG_RUNTIME_DIR`.
    pub(super) of_session: Option<PathBuf>,
    /// [`OF_USERS`], except in tests.
    pub(super) of_users: PathBuf,
    /// [`FALLBACK`], except in tests.
    pub(super) fallback: PathBuf,
}

impl Surroundings {
    /// Returns the facts of this process.
    pub(super) fn of_this_process() -> Surroundings {
        let variable =
            |name| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
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

    /// Returns the directories for entries of this user's daemons, in order of preference. If
    /// `$CORDISK_RUNTIME_DIR` is set, that directory is the only one.
    pub(super) fn own(&self) -> Vec<PathBuf> {
        if let Some(given) = &self.given {
            return vec![given.clone()];
        }
        if self.is_root() {
            return vec![OF_ROOT.into()];
        }
        // The variable can belong to another user: a shell started by su(1) keeps the variable of
        // the previous user. A shell of sudo(8), cron(8) or a service has none.
        let ours = |path: &PathBuf| {
            fs::symlink_metadata(path).is_ok_and(|there| there.is_dir() && there.uid() == self.uid)
        };
        let logged_in = self.of_users.join(self.number().to_string());
        let mut own: Vec<PathBuf> = Vec::new();
        for directory in self.of_session.iter().chain([&logged_in]).filter(|path| ours(path)) {
            if !own.contains(&directory.join(NAME)) {
                own.push(directory.join(NAME));
            }
        }
        // Any user can create a directory of that name in /tmp first. This user's directory then
        // has a longer name.
        let name = self.fallback_name();
        own.push(self.fallback.join(&name));
        let longer = format!("{name}.");
        let mut others: Vec<PathBuf> =
            below(&self.fallback).filter(|path| is_named(path, &longer) && ours(path)).collect();
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

    /// Returns the id of this user outside the user namespace.
    fn number(&self) -> u32 {
        self.outside.unwrap_or(self.uid)
    }

    /// Returns all directories that may have entries of disks that this user can reach, its own
    /// first. If `$CORDISK_RUNTIME_DIR` is set, only that one. Root also searches those of all
    /// users; other users also search that of root.
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

    /// Creates or accepts the first usable one of the user's own directories. A directory is
    /// refused if another user could put files in it. If another user has taken the last one, a new
    /// one with a longer name is created beside it.
    ///
    /// # Errors
    /// The problem of the first directory, with advice.
    pub(super) fn make_own(&self) -> Result<PathBuf> {
        let mut wrong = None;
        for path in self.own() {
            match self.make(&path) {
                Ok(()) => return Ok(path),
                Err(error) => wrong = wrong.or(Some(error)),
            }
        }
        let wrong =
            wrong.unwrap_or_else(|| Error::new(ErrorKind::NotFound, "no runtime directory"));
        if self.given.is_some() || self.is_root() {
            return Err(wrong);
        }
        for attempt in 0..MOST_TRIES {
            let since =
                SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
            let name = format!("{}.{:x}{attempt:x}", self.fallback_name(), since.as_nanos());
            let path = self.fallback.join(name);
            if DirBuilder::new().mode(0o700).create(&path).is_ok() && self.make(&path).is_ok() {
                log::info!("{wrong}; {} is used instead", path.display());
                return Ok(path);
            }
        }
        Err(wrong)
    }

    /// Creates the directory if it is missing, and checks that only this user can write to it.
    fn make(&self, path: &Path) -> Result<()> {
        let what = || format!("runtime directory {}", path.display());
        let shared = self.is_root();
        let mode = if shared { 0o755 } else { 0o700 };
        match DirBuilder::new().mode(mode).create(path) {
            // The umask may have removed rights. No other user can have replaced the directory:
            // /tmp is sticky, so only its owner can.
            Ok(()) => fs::set_permissions(path, PermissionsExt::from_mode(mode)).context(what)?,
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            Err(error) => return Err(Error::io(what(), error)),
        }
        let there = fs::symlink_metadata(path).context(what)?;
        let refuse =
            |why: String| Err(Error::new(ErrorKind::InvalidArgument, format!("{}: {why}", what())));
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
            let who = if in_tmp {
                "others may enter it; chmod 700"
            } else {
                "others may write to it; chmod go-w"
            };
            return refuse(format!("{who} {}", path.display()));
        }
        Ok(())
    }
}

/// Returns the paths in a directory; none if it cannot be read.
fn below(directory: &Path) -> impl Iterator<Item = PathBuf> + use<> {
    fs::read_dir(directory)
        .into_iter()
        .flatten()
        .filter_map(|entry| entry.ok().map(|entry| entry.path()))
}

fn is_named(path: &Path, start: &str) -> bool {
    path.file_name().is_some_and(|name| name.to_string_lossy().starts_with(start))
}

/// Returns the outside id of the user that is root here, if this is a user namespace whose /run
/// does not belong to that root. Returns `None` on a host, and in containers with a /run of their
/// own.
fn root_outside() -> Option<u32> {
    let is_roots = fs::metadata("/run").is_ok_and(|run| run.uid() == 0);
    let map = if is_roots {
        String::new()
    } else {
        fs::read_to_string("/proc/self/uid_map").unwrap_or_default()
    };
    outside_of(&map)
}

/// Returns the outside id of user 0 in a /proc/PID/uid_map. Its lines hold the first id inside, the
/// first id outside, and the count.
fn outside_of(map: &str) -> Option<u32> {
    map.lines().find_map(|line| {
        let mut numbers = line.split_whitespace();
        (numbers.next() == Some("0")).then(|| numbers.next()?.parse().ok())?
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Protects: root of a user namespace uses the directories of the user outside, and does not
    /// search those of other users.
    #[test]
    fn root_of_a_namespace_is_a_user() {
        assert_eq!(outside_of("         0       1000          1\n"), Some(1000));
        assert_eq!(
            outside_of("         1     100000      65536\n         0       1000          1\n"),
            Some(1000)
        );
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
        assert_eq!(
            place.all(),
            [Path::new("/nonexistent/tmp/cordisk-424242"), Path::new("/run/cordisk")]
        );
        let root = Surroundings { outside: None, ..place };
        assert_eq!(root.own(), [Path::new("/run/cordisk")]);
    }
}
