//! `cordisk upgrade`: this program goes on with disks that another one serves, without unmounting
//! them.

use std::ffi::OsString;
use std::io::Write;
use std::path::Path;
use std::process::ExitCode;

use super::find::{self, FoundDisk};
use super::{JobAction, JobOptions, Limit, Targets};
use crate::keeper::{self, Contact};
use host::error::one_line;
use host::{Error, ErrorKind, Result};

/// The options of `cordisk upgrade`.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct UpgradeOptions {
    /// The disks.
    pub targets: Targets,
    /// Options of `cordisk mount` that replace those of the mount.
    pub changes: Vec<OsString>,
    /// The limit of the stream that runs.
    pub limit: Option<Limit>,
}

/// Returns the arguments of a mount with the changes, or says why this program does not take them.
pub type ChangeArguments = dyn Fn(&[OsString], &UpgradeOptions) -> Result<Vec<OsString>>;

/// Starts a keeper with these arguments, for the disk with this socket, in this directory.
pub type StartKeeper = dyn Fn(Vec<OsString>, &Path, &Path) -> Result<()>;

/// Runs the command. `changed` returns the arguments of a mount with the changes, checked.
///
/// # Errors
/// There is no such disk, or its serving process was not replaced; it is served as before then.
pub fn run(
    options: &UpgradeOptions,
    changed: &ChangeArguments,
    start_keeper: &StartKeeper,
) -> Result<ExitCode> {
    options.targets.each(|target| {
        let name = one_line(&target.display().to_string());
        upgrade(target, options, changed, start_keeper)
            .map_err(|error| error.context(name.clone()))?;
        let _ = writeln!(
            std::io::stdout(),
            "{name}: served by cordisk {} now",
            env!("CARGO_PKG_VERSION")
        );
        match &options.limit {
            None => Ok(ExitCode::SUCCESS),
            Some(limit) => super::job(&JobOptions {
                targets: Targets::Named(vec![target.to_owned()]),
                action: JobAction::Speed(limit.clone()),
            }),
        }
    })
}

fn upgrade(
    target: &Path,
    options: &UpgradeOptions,
    changed: &ChangeArguments,
    start_keeper: &StartKeeper,
) -> Result<()> {
    let disk = match find::find(target)? {
        FoundDisk::Running(disk) => disk,
        FoundDisk::Dead(_) => return Err(find::dead(target)),
        FoundDisk::Unregistered(_) => return Err(find::unregistered(target)),
    };
    let found = disk.found.ok_or_else(|| {
        Error::new(ErrorKind::NotFound, "this disk is not registered; name its mountpoint")
    })?;
    let socket = keeper::socket_beside(&found.path);
    let is_ours = found.owner == rustix::process::geteuid().as_raw();
    match Contact::make(&socket)? {
        Contact::Keeper(upgrade) => {
            let arguments = changed(&upgrade.arguments, options)?;
            upgrade.run(&arguments, is_ours)
        }
        // Its facts are in a directory that its user may change.
        Contact::Orphan { .. } if !is_ours => {
            let text = format!(
                "its mount keeper has died; user {} can give it a new one with this command",
                found.owner
            );
            Err(Error::new(ErrorKind::InvalidArgument, text))
        }
        Contact::Orphan { arguments, directory } => {
            start_keeper(changed(&arguments, options)?, &socket, &directory)
        }
    }
}
