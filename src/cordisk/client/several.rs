//! Several disks in one command: those that the user names, or all of them.
//!
//! Each disk is handled on its own. A disk that fails gets a line on standard error, does not stop
//! the command for the others, and makes the exit status 1.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use super::find::{self, FoundDisk};
use host::Result;
use host::error::one_line;

/// The disks that a command applies to.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Targets {
    /// Named by mountpoint or socket, in the order of the command line.
    Named(Vec<PathBuf>),
    /// `--all`: every disk of this user; of every user for root.
    All,
}

impl Targets {
    /// Makes a list of one disk.
    #[cfg(test)]
    pub fn one(target: impl Into<PathBuf>) -> Targets {
        Targets::Named(vec![target.into()])
    }

    /// Runs `command` for each disk. The error of a single disk is returned, as for a command that
    /// takes only one disk.
    ///
    /// # Errors
    /// Those of `command` for the only disk, or the list of mounts cannot be read. Errors of
    /// several disks are printed here and make the exit status 1.
    pub(super) fn each(
        &self,
        mut command: impl FnMut(&Path) -> Result<ExitCode>,
    ) -> Result<ExitCode> {
        let all = match self {
            Targets::Named(names) => names.clone(),
            Targets::All => all_of_this_user()?,
        };
        if let [only] = &all[..] {
            return command(only);
        }
        let mut status = ExitCode::SUCCESS;
        for target in &all {
            match command(target) {
                Ok(code) if code == ExitCode::SUCCESS => {}
                Ok(code) => status = code,
                Err(error) => {
                    let _ =
                        writeln!(std::io::stderr(), "cordisk: {}", one_line(&error.to_string()));
                    status = ExitCode::FAILURE;
                }
            }
        }
        Ok(status)
    }
}

/// Returns the names of all disks that this user may control, the one mounted last first, because
/// it may use an earlier one.
fn all_of_this_user() -> Result<Vec<PathBuf>> {
    let me = rustix::process::geteuid().as_raw();
    let is_ours = |user: Option<u32>| me == 0 || user == Some(me);
    let names = find::find_all()?.into_iter().filter_map(|target| match target {
        // The mountpoint is the name only if it leads back to this disk. The disk may be mounted
        // elsewhere, or another mount may cover it.
        FoundDisk::Running(disk) => {
            let socket = disk.socket.clone();
            let leads_back = |at: &PathBuf| match find::find(at) {
                Ok(FoundDisk::Running(there)) => there.socket == socket,
                _ => false,
            };
            Some(disk.mountpoint.filter(leads_back).unwrap_or(disk.socket))
        }
        FoundDisk::Dead(mount) | FoundDisk::Unregistered(mount) => {
            is_ours(mount.user).then_some(mount.mountpoint)
        }
    });
    let mut names: Vec<PathBuf> = names.collect();
    names.reverse();
    Ok(names)
}

#[cfg(test)]
mod tests {
    use super::*;
    use host::{Error, ErrorKind};

    #[test]
    fn one_that_fails_does_not_stop_the_others() {
        let targets = Targets::Named(vec!["a".into(), "b".into(), "c".into()]);
        let mut seen = Vec::new();
        let status = targets.each(|target| {
            seen.push(target.to_owned());
            match target.to_str() {
                Some("a") => Err(Error::new(ErrorKind::NotFound, "no a")),
                _ => Ok(ExitCode::SUCCESS),
            }
        });
        assert_eq!(seen, [Path::new("a"), Path::new("b"), Path::new("c")]);
        assert_eq!(status.unwrap(), ExitCode::FAILURE);
        let error =
            Targets::one("a").each(|_| Err(Error::new(ErrorKind::NotFound, "no a"))).unwrap_err();
        assert_eq!(error.to_string(), "no a", "the only one is an error like any other");
    }
}
