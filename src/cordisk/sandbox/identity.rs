//! The user that the process becomes (`--user`).

use std::io;

use nix::unistd::{Gid, Group, Uid, User, setgroups, setresgid, setresuid};

use host::error::Context;
use host::{Error, ErrorKind, Result};

/// A user and a group, by number.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Identity {
    /// User id.
    pub uid: u32,
    /// Group id.
    pub gid: u32,
}

impl Identity {
    /// Returns the user and group of this process.
    pub fn current() -> Identity {
        Identity {
            uid: rustix::process::getuid().as_raw(),
            gid: rustix::process::getgid().as_raw(),
        }
    }

    /// Returns the user and group that `--user` names: a user by name or number, and after a colon
    /// a group by name or number. Without a group, the user's own group is taken.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`] if there is no such user or group. [`ErrorKind::InvalidArgument`] if
    /// this process may not become another user, if the user is root, or if a number without a
    /// group belongs to no user.
    pub fn find(text: &str) -> Result<Identity> {
        let wrong =
            |why: String| Error::new(ErrorKind::InvalidArgument, format!("--user {text}: {why}"));
        if !rustix::process::geteuid().is_root() {
            return Err(wrong(
                "only root can become another user; start it as that user instead".to_string(),
            ));
        }
        let identity = Identity::named("--user", text)?;
        if identity.uid == 0 {
            return Err(wrong("that is root, who keeps all rights; name another user".to_string()));
        }
        Ok(identity)
    }

    /// Returns the user and group that an `option` names, in the syntax of [`Identity::find`], for
    /// any process and any user.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`] if there is no such user or group. [`ErrorKind::InvalidArgument`] if
    /// a number without a group belongs to no user.
    pub fn named(option: &str, text: &str) -> Result<Identity> {
        let wrong =
            |why: String| Error::new(ErrorKind::InvalidArgument, format!("{option} {text}: {why}"));
        let unknown = |what: &str, name: &str| {
            Error::new(ErrorKind::NotFound, format!("{option} {text}: there is no {what} {name}"))
        };
        let (name, group) = match text.split_once(':') {
            Some((name, group)) => (name, Some(group)),
            None => (text, None),
        };
        let number = |text: &str| text.parse::<u32>().ok().filter(|&id| id != u32::MAX);
        let ask = |result: nix::Result<Option<User>>| {
            result.map_err(io::Error::from).context(|| format!("{option} {text}"))
        };
        // Digits are a user id, even if a user has that name.
        let (uid, known) = match number(name) {
            Some(uid) => {
                (uid, if group.is_some() { None } else { ask(User::from_uid(Uid::from_raw(uid)))? })
            }
            None => {
                let user = ask(User::from_name(name))?.ok_or_else(|| unknown("user", name))?;
                (user.uid.as_raw(), Some(user))
            }
        };
        let gid = match (group, known) {
            (None, Some(user)) => user.gid.as_raw(),
            (None, None) => {
                return Err(wrong(format!(
                    "no user has this number, so name a group as well: {option} {uid}:GID"
                )));
            }
            (Some(group), _) => match number(group) {
                Some(gid) => gid,
                None => {
                    let found = Group::from_name(group)
                        .map_err(io::Error::from)
                        .context(|| format!("{option} {text}"))?;
                    found.ok_or_else(|| unknown("group", group))?.gid.as_raw()
                }
            },
        };
        Ok(Identity { uid, gid })
    }

    /// Becomes this user for good: no supplementary groups; real, effective and saved ids; in every
    /// thread. The kernel drops all capabilities with the last id of root.
    ///
    /// # Errors
    /// This process may not change its ids.
    pub fn become_it(self) -> Result<()> {
        let (uid, gid) = (Uid::from_raw(self.uid), Gid::from_raw(self.gid));
        // The user id is set last, because only root may make the other two calls.
        setgroups(&[])
            .and_then(|()| setresgid(gid, gid, gid))
            .and_then(|()| setresuid(uid, uid, uid))
            .map_err(io::Error::from)
            .context(|| format!("becoming user {} of group {}", self.uid, self.gid))?;
        assert_eq!(Identity::current(), self, "setresuid(2) has said that it was done");
        Ok(())
    }
}
