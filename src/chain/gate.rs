//! The gate: no file is opened because an image says so unless it passes here (data-safety 3.3, with the CVEs behind each rule).

use std::path::{Path, PathBuf};

use rustix::io::Errno;

use crate::format::{BackingFormat, BackingReference, printable};
use crate::storage::{FileStorage, Rights};
use crate::{Error, ErrorKind, Result};

use super::roots::Roots;

/// What the user allowed of backing files, and what is open already.
#[derive(Clone, Debug, Default)]
pub struct Gate {
    /// `--backing-format`: the format of the first backing file where its overlay's header does not
    /// say. It may say the same, nothing else.
    pub backing_format: Option<BackingFormat>,
    /// (device, inode) of files that must not appear in the chain: the overlay.
    pub taken: Vec<(u64, u64)>,
    /// `--backing-root`: where backing files must lie.
    pub roots: Roots,
    /// With whose rights backing files are opened: those of `--user`. Without, root opens what an
    /// image of another user names with the rights of that user, and from there on down the chain.
    pub rights: Option<Rights>,
}

/// What names a backing file.
#[derive(Clone, Copy, Debug)]
pub enum Namer<'a> {
    /// The image above it.
    Above {
        /// Its path.
        path: &'a Path,
        /// The user who owns it.
        owner: u32,
    },
    /// The user of this process, for an image that is to be made in this directory.
    User {
        /// The directory that relative names start from.
        directory: &'a Path,
    },
}

impl<'a> Namer<'a> {
    /// The directory that relative names start from. Symbolic links in the image's own path do not
    /// move it (as QEMU).
    fn directory(self) -> &'a Path {
        match self {
            Namer::Above { path, .. } => path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new(".")),
            Namer::User { directory } => directory,
        }
    }
}

impl Gate {
    /// Opens the file that `reference`, found in `namer`, names: read-only, locked, and not one
    /// that is open already. It counts as taken afterwards. Says also what its format is, which is
    /// never found out by looking at it: a guest can write a header of any format into a raw disk.
    pub(super) fn admit(&mut self, reference: &BackingReference, namer: Namer<'_>) -> Result<(FileStorage, BackingFormat)> {
        let directory = namer.directory();
        let path = resolve(&reference.name, directory)?;
        let format = match (reference.format, self.backing_format.take()) {
            (Some(format), Some(given)) if given != format => return Err(contradicted(&reference.name, format, given)),
            (Some(format), _) | (None, Some(format)) => format,
            (None, None) => return Err(missing_format(&reference.name)),
        };
        if let Namer::Above { owner, .. } = namer {
            self.rights = Rights::below(self.rights.take(), owner)?;
        }
        let file = Rights::run_with(self.rights.as_ref(), || self.roots.open_backing(&reference.name, directory, &path))
            .map_err(|error| explain(error, namer, self.rights.as_ref(), &path, format))?;
        // Before the lock, which our own open overlay would refuse with a message about another process.
        if self.taken.contains(&file.identity()) {
            return Err(invalid(format!("{}: is part of this backing chain already, or the overlay itself", path.display())));
        }
        file.lock()?;
        self.taken.push(file.identity());
        Ok((file, format))
    }
}

/// The error of opening a backing file, which the user has not named: which image names it, and
/// what to do.
pub fn explain(error: Error, namer: Namer<'_>, rights: Option<&Rights>, path: &Path, format: BackingFormat) -> Error {
    let Namer::Above { path: image, owner } = namer else { return error };
    let (path, image) = (path.display(), image.display());
    let denied = [Errno::ACCESS, Errno::PERM].map(|errno| Some(errno.raw_os_error())).contains(&error.errno());
    match rights {
        _ if error.kind() == ErrorKind::NotFound => Error::new(
            ErrorKind::NotFound,
            format!(
                "{image}: its backing file {path} does not exist; put it there, or name the place where it is now: \
                 qemu-img rebase -u -F {format} -b PATH {image}"
            ),
        ),
        Some(rights) if denied => {
            let trust =
                if owner == 0 { String::new() } else { format!(", or, if what the image names can be trusted, chown root {image}") };
            error.context(format!("{image}: its backing file is opened with the rights of {rights}: let that user read it{trust}"))
        }
        None if denied => error.context(format!("{image}: its backing file")),
        _ => error,
    }
}

impl Gate {
    /// (device, inode) of the file that `name` names in the header of the image `namer`. The file is
    /// not locked, and closed again. It is opened with the rights that a layer below that image is opened with.
    ///
    /// # Errors
    /// The name does not pass; those of open(2).
    pub fn identity_of(&self, name: &str, namer: Namer<'_>) -> Result<(u64, u64)> {
        let directory = namer.directory();
        let path = resolve(name, directory)?;
        let rights = match namer {
            Namer::Above { owner, .. } => Rights::below(self.rights.clone(), owner)?,
            Namer::User { .. } => self.rights.clone(),
        };
        let file = Rights::run_with(rights.as_ref(), || self.roots.open_backing(name, directory, &path))?;
        Ok(file.identity())
    }
}

/// The path that a backing file name means in an image that lies in `directory`.
fn resolve(name: &str, directory: &Path) -> Result<PathBuf> {
    if name.is_empty() || name.chars().any(char::is_control) {
        return Err(invalid(format!("backing file name \"{}\" is empty or has control characters", printable(name))));
    }
    let first_part = name.split('/').next().unwrap_or_default();
    if first_part.contains(':') {
        return Err(Error::new(
            ErrorKind::UnsupportedFeature,
            format!(
                "backing file name \"{}\": protocols (json:, nbd:, file:, ...) are not supported; a file with a colon is written ./a:b",
                printable(name)
            ),
        ));
    }
    Ok(directory.join(name))
}

fn contradicted(name: &str, format: BackingFormat, given: BackingFormat) -> Error {
    invalid(format!(
        "--backing-format {given} contradicts the image, which says that its backing file \"{}\" is {format}; leave the option out, or correct \
         the image: qemu-img rebase -u -F {given} -b NAME IMAGE",
        printable(name)
    ))
}

fn missing_format(name: &str) -> Error {
    invalid(format!(
        "backing format of \"{}\" is missing: pass --backing-format raw|qcow2 if it is the first backing file, or write it into the image \
         that names it with qemu-img rebase -u -F (it is never guessed, since a guest can write any header into a raw disk)",
        printable(name)
    ))
}

fn invalid(text: String) -> Error {
    Error::new(ErrorKind::InvalidArgument, text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_paths_and_nothing_else() {
        let dir = Path::new("/images");
        assert_eq!(resolve("base.raw", dir).unwrap(), Path::new("/images/base.raw"));
        assert_eq!(resolve("../base.raw", dir).unwrap(), Path::new("/images/../base.raw"));
        assert_eq!(resolve("/base.raw", dir).unwrap(), Path::new("/base.raw"));
        assert_eq!(resolve("./a:b", dir).unwrap(), Path::new("/images/./a:b"));
        assert_eq!(resolve("a/b:c", dir).unwrap(), Path::new("/images/a/b:c"));
        for name in ["json:{}", "file:a", "fd:3", "nbd:localhost:10809", "https://host/a", "blkdebug::a", ":", "a:b"] {
            let error = resolve(name, dir).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::UnsupportedFeature, "{name}");
            assert!(error.to_string().contains("./a:b"), "{error}");
        }
        for name in ["", "a\nb", "a\0b", "a\u{1b}[31m"] {
            let error = resolve(name, dir).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::InvalidArgument);
            assert!(!error.to_string().chars().any(char::is_control), "{error}");
        }
    }
}
