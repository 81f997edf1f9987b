//! The rights of a user on files, taken on by one thread for one piece of work.
//!
//! Root opens the files that an image names with the rights of the owner of the image. An
//! image of that user thus cannot name a file that the user may not read. On Linux the user, group
//! and supplementary groups belong to a thread. The work runs on a new thread that takes on the
//! rights and ends afterwards, so nothing has to be undone. The thread loses its capabilities once
//! none of its user ids is root's any more.

use std::ffi::CString;
use std::{io, thread};

use nix::unistd::{Gid, Uid, User, getgrouplist};
use rustix::io::Errno;
use rustix::thread::{CapabilitySet, CapabilitySets};

use crate::error::Context;
use crate::{Error, ErrorKind, Result};

/// The group of a user that is not in the user database: the kernel's overflow group id, which owns
/// no files.
const NO_GROUP: u32 = 65534;

/// A user, a group, and the supplementary groups of the user.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Rights {
    uid: u32,
    gid: u32,
    groups: Vec<u32>,
    /// The user's name, if it has one.
    name: Option<String>,
}

impl Rights {
    /// Returns the rights of this user and group, with the user's groups from the user database.
    ///
    /// # Errors
    /// The user database cannot be read.
    pub fn of(uid: u32, gid: u32) -> Result<Rights> {
        let user = find(uid)?;
        Rights::with_groups(uid, gid, user)
    }

    /// Returns the rights of the owner of a file. They do not include the group of the file: a user
    /// can own a file of a group without being a member.
    ///
    /// # Errors
    /// The user database cannot be read.
    fn of_owner(uid: u32) -> Result<Rights> {
        let user = find(uid)?;
        let gid = user.as_ref().map_or(NO_GROUP, |user| user.gid.as_raw());
        Rights::with_groups(uid, gid, user)
    }

    /// Returns the rights with which the files that an image names are opened. `owner` owns the
    /// image, and `current` are the rights with which the image was opened (`None`: those of this
    /// process). An image of root may name any file that root can read. An image of another user
    /// may name files that this user can read, and so may all images that it names in turn.
    ///
    /// # Errors
    /// The user database cannot be read.
    pub fn below(current: Option<Rights>, owner: u32) -> Result<Option<Rights>> {
        if current.is_some() || owner == 0 || !rustix::process::geteuid().is_root() {
            return Ok(current);
        }
        Rights::of_owner(owner).map(Some)
    }

    /// The user and the group.
    pub fn user_and_group(&self) -> (u32, u32) {
        (self.uid, self.gid)
    }

    /// Runs `work` with these rights, or with the rights of this process for `None`.
    ///
    /// # Errors
    /// Those of [`Rights::run`].
    pub fn run_with<T: Send>(
        rights: Option<&Rights>,
        work: impl FnOnce() -> Result<T> + Send,
    ) -> Result<T> {
        match rights {
            Some(rights) => rights.run(work),
            None => work(),
        }
    }

    fn with_groups(uid: u32, gid: u32, user: Option<User>) -> Result<Rights> {
        let Some(user) = user else {
            return Ok(Rights { uid, gid, groups: Vec::new(), name: None });
        };
        let name = CString::new(user.name.as_str())
            .map_err(|error| Error::wrap(ErrorKind::InvalidArgument, "user name", error))?;
        let groups = getgrouplist(&name, Gid::from_raw(gid))
            .map_err(io::Error::from)
            .context(|| format!("groups of {}", user.name))?;
        Ok(Rights {
            uid,
            gid,
            groups: groups.into_iter().map(Gid::as_raw).collect(),
            name: Some(user.name),
        })
    }

    /// Runs `work` with these rights and no others, on a thread of its own.
    ///
    /// In a user namespace that does not map the user, the work runs without capabilities instead,
    /// with the rights of the creator of the namespace.
    ///
    /// # Errors
    /// Those of `work`; this process may not take on the rights of another user.
    pub fn run<T: Send>(&self, work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
        let on_thread = || {
            self.take_on()
                .map_err(io::Error::from)
                .context(|| format!("taking on the rights of {self} to open what an image names (needs CAP_SETUID and CAP_SETGID)"))?;
            work()
        };
        thread::scope(|scope| {
            let started = thread::Builder::new()
                .name("open".into())
                .spawn_scoped(scope, on_thread)
                .context(|| "thread")?;
            started.join().unwrap_or_else(|_| {
                Err(Error::new(ErrorKind::Io, "opening a backing file has failed"))
            })
        })
    }

    /// Takes on the rights on this thread, irrevocably.
    fn take_on(&self) -> rustix::io::Result<()> {
        let groups: Vec<rustix::thread::Gid> =
            self.groups.iter().map(|&gid| rustix::thread::Gid::from_raw(gid)).collect();
        let (uid, gid) =
            (rustix::thread::Uid::from_raw(self.uid), rustix::thread::Gid::from_raw(self.gid));
        let groups = match rustix::thread::set_thread_groups(&groups) {
            // The namespace does not map one of the groups.
            Err(Errno::INVAL) => rustix::thread::set_thread_groups(&[]),
            done => done,
        };
        // The user id is changed last, because only root can change the others.
        let ids = rustix::thread::set_thread_res_gid(gid, gid, gid)
            .and_then(|()| rustix::thread::set_thread_res_uid(uid, uid, uid));
        match ids {
            // The namespace does not map the user. (Such a namespace often allows no change of
            // groups either.)
            Err(Errno::INVAL) => {
                let none = CapabilitySet::empty();
                rustix::thread::set_capabilities(
                    None,
                    CapabilitySets { effective: none, permitted: none, inheritable: none },
                )
            }
            done => done.and(groups),
        }
    }
}

impl std::fmt::Display for Rights {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match &self.name {
            Some(name) => write!(f, "user {name} ({})", self.uid),
            None => write!(f, "user {}", self.uid),
        }
    }
}

fn find(uid: u32) -> Result<Option<User>> {
    User::from_uid(Uid::from_raw(uid)).map_err(io::Error::from).context(|| format!("user {uid}"))
}

#[cfg(test)]
mod tests {
    use std::fs::{self, File, Permissions};
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    /// Protects: only the thread that runs the work has the rights of the user.
    #[test]
    fn only_the_work_has_the_rights() {
        if !rustix::process::geteuid().is_root() {
            println!("skipped: not root");
            return;
        }
        let dir = tempfile::tempdir().unwrap();
        fs::set_permissions(dir.path(), Permissions::from_mode(0o755)).unwrap();
        let path = |name: &str| dir.path().join(name);
        for (name, mode, uid, gid) in [
            ("public", 0o644, 0, 0),
            ("secret", 0o600, 0, 0),
            ("own", 0o600, 1234, 0),
            ("group", 0o640, 0, 77),
        ] {
            fs::write(path(name), name).unwrap();
            fs::set_permissions(path(name), Permissions::from_mode(mode)).unwrap();
            std::os::unix::fs::chown(path(name), Some(uid), Some(gid)).unwrap();
        }
        let rights = Rights { uid: 1234, gid: 4321, groups: vec![77], name: None };
        let opens = |rights: &Rights, name: &str| {
            rights.run(|| File::open(path(name)).context(|| "open")).is_ok()
        };
        assert_eq!(
            ["public", "secret", "own", "group"].map(|name| opens(&rights, name)),
            [true, false, true, true]
        );
        let alone = Rights { groups: vec![], ..rights.clone() };
        assert!(!opens(&alone, "group"));
        // The user cannot open a file in a directory that only root may search.
        fs::set_permissions(dir.path(), Permissions::from_mode(0o700)).unwrap();
        assert!(!opens(&rights, "public"));
        let ids =
            rights.run(|| Ok(fs::read_to_string("/proc/thread-self/status").unwrap())).unwrap();
        for line in [
            "Uid:\t1234\t1234\t1234\t1234",
            "Gid:\t4321\t4321\t4321\t4321",
            "CapEff:\t0000000000000000",
            "CapPrm:\t0000000000000000",
        ] {
            assert!(ids.contains(line), "{line} in {ids}");
        }
        assert!(rustix::process::geteuid().is_root());
        assert!(File::open(path("secret")).is_ok(), "this thread is root's");
    }

    /// Protects: an error of the work is returned unchanged.
    #[test]
    fn errors_come_back() {
        if !rustix::process::geteuid().is_root() {
            println!("skipped: not root");
            return;
        }
        let rights = Rights { uid: 1234, gid: 1234, groups: vec![], name: None };
        let error = rights
            .run(|| Err::<(), _>(Error::new(ErrorKind::NotFound, "no such thing")))
            .unwrap_err();
        assert_eq!(
            (error.kind(), error.to_string()),
            (ErrorKind::NotFound, "no such thing".to_owned())
        );
        assert_eq!(
            (rights.to_string(), Rights { name: Some("vm".into()), ..rights }.to_string()),
            ("user 1234".into(), "user vm (1234)".into())
        );
    }
}
