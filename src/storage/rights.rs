//! The rights of a user on files, taken on by one thread for one piece of work.
//!
//! Root opens the files that an image names with the rights of a user, so that an image made by
//! that user cannot name a file which that user may not read. User, group and supplementary groups
//! of a thread are its own on Linux: the work is done on a new thread that takes them on and ends
//! afterwards, so nothing has to be taken back. Its capabilities go with the last user id of root.

use std::ffi::CString;
use std::{io, thread};

use nix::unistd::{Gid, Uid, User, getgrouplist};
use rustix::io::Errno;
use rustix::thread::{CapabilitySet, CapabilitySets};

use crate::error::Context;
use crate::{Error, ErrorKind, Result};

/// The group of a user whom the user database does not know: the kernel's number for a group that
/// it cannot name, which owns no files.
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
    /// Those of this user and group, with the groups that the user database gives the user.
    ///
    /// # Errors
    /// The user database cannot be read.
    pub fn of(uid: u32, gid: u32) -> Result<Rights> {
        let user = find(uid)?;
        Rights::with_groups(uid, gid, user)
    }

    /// Those of the owner of a file. The group of the file has no part in it: a user can own a file
    /// of a group without being in it.
    ///
    /// # Errors
    /// The user database cannot be read.
    fn of_owner(uid: u32) -> Result<Rights> {
        let user = find(uid)?;
        let gid = user.as_ref().map_or(NO_GROUP, |user| user.gid.as_raw());
        Rights::with_groups(uid, gid, user)
    }

    /// With whose rights the file is opened that an image of user `owner` names, where that image
    /// was opened with the rights `current` (`None`: those of this process). Root's image may name
    /// what root can read; an image of somebody else what that user can read, and so may all that
    /// it names in turn.
    ///
    /// # Errors
    /// The user database cannot be read.
    pub fn below(current: Option<Rights>, owner: u32) -> Result<Option<Rights>> {
        if current.is_some() || owner == 0 || !rustix::process::geteuid().is_root() {
            return Ok(current);
        }
        Rights::of_owner(owner).map(Some)
    }

    /// Does some work with these rights, or with those of this process.
    ///
    /// # Errors
    /// As [`Rights::run`].
    pub fn run_with<T: Send>(rights: Option<&Rights>, work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
        match rights {
            Some(rights) => rights.run(work),
            None => work(),
        }
    }

    fn with_groups(uid: u32, gid: u32, user: Option<User>) -> Result<Rights> {
        let Some(user) = user else { return Ok(Rights { uid, gid, groups: Vec::new(), name: None }) };
        let name = CString::new(user.name.as_str()).map_err(|error| Error::wrap(ErrorKind::InvalidArgument, "user name", error))?;
        let groups = getgrouplist(&name, Gid::from_raw(gid)).map_err(io::Error::from).context(|| format!("groups of {}", user.name))?;
        Ok(Rights { uid, gid, groups: groups.into_iter().map(Gid::as_raw).collect(), name: Some(user.name) })
    }

    /// Does some work with these rights and no others, on a thread of its own.
    ///
    /// In a user namespace that has no number for the user, the work is done without capabilities
    /// instead: with the rights of the user who made the namespace.
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
            let started = thread::Builder::new().name("open".into()).spawn_scoped(scope, on_thread).context(|| "thread")?;
            started.join().unwrap_or_else(|_| Err(Error::new(ErrorKind::Io, "opening a backing file has failed")))
        })
    }

    /// For good, for this thread.
    fn take_on(&self) -> rustix::io::Result<()> {
        let groups: Vec<rustix::thread::Gid> = self.groups.iter().map(|&gid| rustix::thread::Gid::from_raw(gid)).collect();
        let (uid, gid) = (rustix::thread::Uid::from_raw(self.uid), rustix::thread::Gid::from_raw(self.gid));
        let groups = match rustix::thread::set_thread_groups(&groups) {
            // One of them has no number in this namespace.
            Err(Errno::INVAL) => rustix::thread::set_thread_groups(&[]),
            done => done,
        };
        // The user last: without root the others cannot be changed.
        let ids = rustix::thread::set_thread_res_gid(gid, gid, gid).and_then(|()| rustix::thread::set_thread_res_uid(uid, uid, uid));
        match ids {
            // Nor has the user. (Such a namespace often allows no change of groups either.)
            Err(Errno::INVAL) => {
                let none = CapabilitySet::empty();
                rustix::thread::set_capabilities(None, CapabilitySets { effective: none, permitted: none, inheritable: none })
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

    /// The thread has the rights of the user for as long as the work takes, and no other thread
    /// has.
    #[test]
    fn only_the_work_has_the_rights() {
        if !rustix::process::geteuid().is_root() {
            println!("skipped: not root");
            return;
        }
        let dir = tempfile::tempdir().unwrap();
        fs::set_permissions(dir.path(), Permissions::from_mode(0o755)).unwrap();
        let path = |name: &str| dir.path().join(name);
        for (name, mode, uid, gid) in [("public", 0o644, 0, 0), ("secret", 0o600, 0, 0), ("own", 0o600, 1234, 0), ("group", 0o640, 0, 77)] {
            fs::write(path(name), name).unwrap();
            fs::set_permissions(path(name), Permissions::from_mode(mode)).unwrap();
            std::os::unix::fs::chown(path(name), Some(uid), Some(gid)).unwrap();
        }
        let rights = Rights { uid: 1234, gid: 4321, groups: vec![77], name: None };
        let opens = |rights: &Rights, name: &str| rights.run(|| File::open(path(name)).context(|| "open")).is_ok();
        assert_eq!(["public", "secret", "own", "group"].map(|name| opens(&rights, name)), [true, false, true, true]);
        let alone = Rights { groups: vec![], ..rights.clone() };
        assert!(!opens(&alone, "group"));
        // Nor a name that only root may see.
        fs::set_permissions(dir.path(), Permissions::from_mode(0o700)).unwrap();
        assert!(!opens(&rights, "public"));
        let ids = rights.run(|| Ok(fs::read_to_string("/proc/thread-self/status").unwrap())).unwrap();
        for line in
            ["Uid:\t1234\t1234\t1234\t1234", "Gid:\t4321\t4321\t4321\t4321", "CapEff:\t0000000000000000", "CapPrm:\t0000000000000000"]
        {
            assert!(ids.contains(line), "{line} in {ids}");
        }
        assert!(rustix::process::geteuid().is_root());
        assert!(File::open(path("secret")).is_ok(), "this thread is root's");
    }

    /// An error of the work comes back as it is.
    #[test]
    fn errors_come_back() {
        if !rustix::process::geteuid().is_root() {
            println!("skipped: not root");
            return;
        }
        let rights = Rights { uid: 1234, gid: 1234, groups: vec![], name: None };
        let error = rights.run(|| Err::<(), _>(Error::new(ErrorKind::NotFound, "no such thing"))).unwrap_err();
        assert_eq!((error.kind(), error.to_string()), (ErrorKind::NotFound, "no such thing".to_owned()));
        assert_eq!(
            (rights.to_string(), Rights { name: Some("vm".into()), ..rights }.to_string()),
            ("user 1234".into(), "user vm (1234)".into())
        );
    }
}
