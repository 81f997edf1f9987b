//! Shell completion. The scripts of the shells run this program with [`VARIABLE`] set. It answers
//! from the definition of the command line, and with the names of running disks.

use std::ffi::OsStr;
use std::io::Write;
use std::path::{Path, PathBuf};

use clap::CommandFactory;
use clap_complete::Shell;
use clap_complete::engine::{CompletionCandidate, PathCompleter, ValueCompleter};
use clap_complete::env::{CompleteEnv, Shells};

use super::Args;
use super::manual::without_hidden;
use crate::client::{FoundDisk, find_all};
use host::error::Context;
use host::{Error, ErrorKind, Result};

/// The environment variable by which a shell's script asks for completions.
const VARIABLE: &str = "CORDISK_COMPLETE";

/// Answers a shell's script and ends the process, if this process is such a call.
pub(super) fn answer() {
    // Without this, hidden items would be offered where no other item fits.
    CompleteEnv::with_factory(|| without_hidden(&Args::command())).var(VARIABLE).complete();
}

/// Writes the script for `shell` to standard output.
///
/// # Errors
/// Standard output fails.
pub fn completions(shell: Shell) -> Result<()> {
    let shells = Shells::builtins();
    let unknown = || {
        Error::new(ErrorKind::InvalidArgument, format!("{shell}: no completions for this shell"))
    };
    let completer = shells.completer(&shell.to_string()).ok_or_else(unknown)?;
    let mut script = Vec::new();
    completer
        .write_registration(VARIABLE, "cordisk", "cordisk", "cordisk", &mut script)
        .context(|| "completions")?;
    let mut output = std::io::stdout().lock();
    output.write_all(&script).and_then(|()| output.flush()).map_err(Error::standard_output)
}

/// Returns the mountpoints of all disks, dead ones too.
pub(super) fn disks(current: &OsStr) -> Vec<CompletionCandidate> {
    let mountpoints =
        find_all().unwrap_or_default().into_iter().filter_map(|target| match target {
            FoundDisk::Running(disk) => disk.mountpoint,
            FoundDisk::Dead(mount) | FoundDisk::Unregistered(mount) => Some(mount.mountpoint),
        });
    let here = std::env::current_dir().unwrap_or_default();
    let mut names: Vec<PathBuf> =
        mountpoints.filter_map(|mountpoint| as_typed(&mountpoint, current, &here)).collect();
    names.sort();
    names.dedup();
    names.into_iter().map(CompletionCandidate::new).collect()
}

/// Returns disks and files.
pub(super) fn disks_and_files(current: &OsStr) -> Vec<CompletionCandidate> {
    let mut all = disks(current);
    // A disk is a file as well, so it is not listed twice.
    let files = PathCompleter::any().complete(current).into_iter();
    let others: Vec<_> =
        files.filter(|file| !all.iter().any(|disk| disk.get_value() == file.get_value())).collect();
    all.extend(others);
    all
}

/// Returns a mountpoint as a continuation of the typed text: relative if the text is relative, or
/// if the mountpoint is in the current directory.
fn as_typed(mountpoint: &Path, current: &OsStr, here: &Path) -> Option<PathBuf> {
    let text = current.to_str()?;
    let directory = match text.rsplit_once('/') {
        Some((directory, _)) => format!("{directory}/"),
        None => String::new(),
    };
    let name = mountpoint.file_name()?;
    let absolute = std::path::absolute(here.join(&directory)).ok()?;
    let absolute = absolute.canonicalize().unwrap_or(absolute);
    let shown = if mountpoint.parent() == Some(&absolute) {
        Path::new(&directory).join(name)
    } else {
        mountpoint.to_owned()
    };
    shown.to_str().is_some_and(|shown| shown.starts_with(text)).then_some(shown)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_disk_is_offered_as_it_is_typed() {
        let offered = |current: &str| {
            as_typed(Path::new("/srv/vm/disk.raw"), OsStr::new(current), Path::new("/srv/vm"))
        };
        for (current, shown) in [
            ("", Some("disk.raw")),
            ("di", Some("disk.raw")),
            ("./d", Some("./disk.raw")),
            ("/srv/vm/", Some("/srv/vm/disk.raw")),
            ("/s", Some("/srv/vm/disk.raw")),
            ("x", None),
            ("/x", None),
        ] {
            assert_eq!(offered(current).as_deref(), shown.map(Path::new), "{current}");
        }
        let elsewhere = as_typed(Path::new("/srv/vm/disk.raw"), OsStr::new(""), Path::new("/tmp"));
        assert_eq!(elsewhere.as_deref(), Some(Path::new("/srv/vm/disk.raw")));
    }
}
