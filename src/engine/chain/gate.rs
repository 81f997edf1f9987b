//! The gate: every file that an image names must pass it before it is opened. Images that name
//! other files have disclosed host files elsewhere (CVE-2022-47951, CVE-2024-32498, CVE-2024-4467).

use std::path::{Path, PathBuf};
use std::sync::Arc;

use remote::pin::{NamedPin, Pin, url_digest};
use remote::url::SourceUrl;
use remote::{RemoteFile, Sources};
use rustix::io::Errno;

use host::storage::{FileStorage, Rights};
use host::{Error, ErrorKind, Result};
use qcow2::format::{BackingFormat, BackingReference, printable};

use super::roots::Roots;
use super::unopened::UnopenedFile;

/// What the user allows for backing files, and which files are open already.
#[derive(Clone, Debug, Default)]
pub struct Gate {
    /// `--backing-format`: the format of the first backing file, if the overlay's header does not
    /// contain it. It must not contradict the header.
    pub backing_format: Option<BackingFormat>,
    /// (device, inode) of the files that must not appear again in the chain: the overlay, and the
    /// layers admitted so far.
    pub taken: Vec<(u64, u64)>,
    /// `--backing-root`: the directories that backing files must lie in.
    pub roots: Roots,
    /// The rights with which backing files are opened: those of `--user`. If `None` and the process
    /// runs as root, a file named by another user's image is opened with that user's rights, and so
    /// are all layers below it.
    pub rights: Option<Rights>,
    /// Opens remote backing files; `None` refuses their names.
    pub sources: Option<Arc<Sources>>,
    /// Remote backing files are not opened, whether there are `sources` or not: each of them counts
    /// as data everywhere, and its reads fail. For commands that need no content.
    pub leave_remote: bool,
    /// What remote backing files are pinned to, from the headers of the overlay and of the layers
    /// admitted so far: clusters of each of them belong to the file that it is pinned to.
    pub pins: Vec<NamedPin>,
    /// The names of the files that these headers pin in a way that this version does not
    /// understand: [`remote::pin::not_understood`].
    pub unknown_pins: Vec<String>,
}

/// The origin of a backing file's name.
#[derive(Clone, Copy, Debug)]
pub enum Namer<'a> {
    /// The image above it in the chain.
    Above {
        /// Path of that image.
        path: &'a Path,
        /// User id of that image's owner.
        owner: u32,
    },
    /// The image above it in the chain, which is a remote file.
    Remote(&'a SourceUrl),
    /// The user of this process, for a new image in this directory.
    User {
        /// The directory that relative names start from.
        directory: &'a Path,
    },
}

impl<'a> Namer<'a> {
    /// The directory that relative names start from. Symbolic links in the path of the image itself
    /// are not resolved (as in QEMU).
    fn directory(self) -> &'a Path {
        match self {
            Namer::Remote(_) => Path::new("."),
            Namer::Above { path, .. } => path
                .parent()
                .filter(|parent| !parent.as_os_str().is_empty())
                .unwrap_or(Path::new(".")),
            Namer::User { directory } => directory,
        }
    }
}

/// A backing file that has passed the gate.
#[derive(Debug)]
pub(super) enum Admitted {
    /// A file of this host, locked.
    Local(FileStorage),
    /// A remote file.
    Remote(RemoteFile),
    /// A remote file that is not opened.
    Unopened(UnopenedFile),
}

impl Gate {
    /// Opens the file that `reference`, found in `namer`, names: read-only, locked, and refused if
    /// it is open already. Afterwards it counts as taken.
    ///
    /// Returns the file and its format. The format is never detected from the content, because a
    /// guest can write a header of any format into a raw disk.
    pub(super) fn admit(
        &mut self,
        reference: &BackingReference,
        namer: Namer<'_>,
    ) -> Result<(Admitted, BackingFormat)> {
        let remote = source_name(&reference.name, namer)?;
        let directory = namer.directory();
        let path = match remote {
            Some(_) => PathBuf::new(),
            None => resolve(&reference.name, directory)?,
        };
        let format = match (reference.format, self.backing_format.take()) {
            (Some(format), Some(given)) if given != format => {
                return Err(contradicted(&reference.name, format, given));
            }
            (Some(format), _) | (None, Some(format)) => format,
            (None, None) => return Err(missing_format(&reference.name)),
        };
        if let Some(name) = remote {
            if self.leave_remote {
                let pinned = self.pin_of(&name)?.map(|pin| pin.size);
                return Ok((Admitted::Unopened(UnopenedFile::new(name, format, pinned)), format));
            }
            return Ok((Admitted::Remote(self.admit_remote(&name, namer)?), format));
        }
        if let Namer::Above { owner, .. } = namer {
            self.rights = Rights::below(self.rights.take(), owner)?;
        }
        let file = Rights::run_with(self.rights.as_ref(), || {
            self.roots.open_backing(&reference.name, directory, &path)
        })
        .map_err(|error| explain(error, namer, self.rights.as_ref(), &path, format))?;
        // Checked before the lock, because locking a file that this process has open as the overlay
        // fails with a message about another process.
        if self.taken.contains(&file.identity()) {
            return Err(invalid(format!(
                "{}: is part of this backing chain already, or the overlay itself",
                path.display()
            )));
        }
        file.lock()?;
        self.taken.push(file.identity());
        Ok((Admitted::Local(file), format))
    }

    /// Opens a remote file. A name that an image contains must lie below a prefix that the user
    /// allows: otherwise any image could make this host send requests, with its credentials, to a
    /// place that the image chooses.
    fn admit_remote(&mut self, name: &SourceUrl, namer: Namer<'_>) -> Result<RemoteFile> {
        let Some(sources) = &self.sources else {
            return Err(Error::new(
                ErrorKind::UnsupportedFeature,
                format!("backing file \"{name}\": this command does not open remote backing files"),
            ));
        };
        if !matches!(namer, Namer::User { .. }) && !sources.allows(name) {
            return Err(Error::new(
                ErrorKind::PermissionDenied,
                format!(
                    "backing file \"{name}\": an image may name a remote file only below a prefix that is allowed: pass --backing-url {}",
                    name.directory()
                ),
            ));
        }
        sources.open(name, self.pin_of(name)?.cloned())
    }

    /// Adds the pins of an image's header.
    pub fn add_pins(&mut self, pins: &[u8]) {
        self.pins.extend(remote::pin::decode(pins));
        self.unknown_pins.extend(remote::pin::not_understood(pins));
    }

    /// What the images admitted so far pin the file of this name to.
    fn pin_of(&self, name: &SourceUrl) -> Result<Option<&Pin>> {
        let digest = url_digest(name);
        if self.unknown_pins.contains(&digest) {
            return Err(Error::new(
                ErrorKind::UnsupportedFeature,
                format!(
                    "backing file \"{name}\": an image of the chain says what it is pinned to in a way that this version does not understand: use the version that made the image"
                ),
            ));
        }
        let pins = || self.pins.iter().filter(|named| named.url == digest).map(|named| &named.pin);
        let pin = pins().find(|pin| pin.digest.is_some()).or(pins().next());
        if let Some(pin) = pin
            && pins().any(|other| !pin.is_compatible(other))
        {
            return Err(invalid(format!(
                "backing file \"{name}\": two images of the chain were made with different files of this name"
            )));
        }
        Ok(pin)
    }
}

/// The remote file that `name`, found in `namer`, means; `None` for a file of this host.
fn source_name(name: &str, namer: Namer<'_>) -> Result<Option<SourceUrl>> {
    match namer {
        Namer::Remote(above) => above.join(name).map(Some),
        _ if SourceUrl::is_source(name) => SourceUrl::parse(name).map(Some),
        _ => Ok(None),
    }
}

/// Completes the error of opening a backing file. The user has not named that file, so the message
/// says which image names it, and what the user can do.
pub fn explain(
    error: Error,
    namer: Namer<'_>,
    rights: Option<&Rights>,
    path: &Path,
    format: BackingFormat,
) -> Error {
    let Namer::Above { path: image, owner } = namer else { return error };
    let (path, image) = (path.display(), image.display());
    let denied = [Errno::ACCESS, Errno::PERM]
        .map(|errno| Some(errno.raw_os_error()))
        .contains(&error.errno());
    match rights {
        _ if error.kind() == ErrorKind::NotFound => Error::new(
            ErrorKind::NotFound,
            format!(
                "{image}: its backing file {path} does not exist; put it there, or name the place where it is now: \
                 qemu-img rebase -u -F {format} -b PATH {image}"
            ),
        ),
        Some(rights) if denied => {
            let trust = if owner == 0 {
                String::new()
            } else {
                format!(", or, if what the image names can be trusted, chown root {image}")
            };
            error.context(format!("{image}: its backing file is opened with the rights of {rights}: let that user read it{trust}"))
        }
        None if denied => error.context(format!("{image}: its backing file")),
        _ => error,
    }
}

impl Gate {
    /// (device, inode) of the file that `name` would name in the header of the image `namer`. The
    /// file is opened with the rights of a layer below that image, and closed again without a lock.
    ///
    /// # Errors
    /// A refusal of the name by the gate; errors of open(2).
    pub fn identity_of(&self, name: &str, namer: Namer<'_>) -> Result<(u64, u64)> {
        let directory = namer.directory();
        let path = resolve(name, directory)?;
        let rights = match namer {
            Namer::Above { owner, .. } => Rights::below(self.rights.clone(), owner)?,
            Namer::User { .. } | Namer::Remote(_) => self.rights.clone(),
        };
        let file =
            Rights::run_with(rights.as_ref(), || self.roots.open_backing(name, directory, &path))?;
        Ok(file.identity())
    }
}

/// The path that a backing file name means in an image in `directory`.
fn resolve(name: &str, directory: &Path) -> Result<PathBuf> {
    if name.is_empty() || name.chars().any(char::is_control) {
        return Err(invalid(format!(
            "backing file name \"{}\" is empty or has control characters",
            printable(name)
        )));
    }
    let first_part = name.split('/').next().unwrap_or_default();
    if first_part.contains(':') {
        return Err(Error::new(
            ErrorKind::UnsupportedFeature,
            format!(
                "backing file name \"{}\": this protocol is not supported (remote files: nbd://, nbd+unix://, nbds://, http://, https://, s3://, gs://, az://); a file with a colon is written ./a:b",
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

    /// Protects: a file that a later version has pinned is not taken for one without a pin, which
    /// would be pinned to what the server has now.
    #[test]
    fn a_pin_that_is_not_understood_is_no_missing_pin() {
        let url = SourceUrl::parse("https://host/base.raw").unwrap();
        let other = SourceUrl::parse("https://host/other.raw").unwrap();
        let mut gate = Gate::default();
        gate.add_pins(format!("{} 4096 later x -\n", url_digest(&url)).as_bytes());
        let error = gate.pin_of(&url).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::UnsupportedFeature, "{error}");
        assert_eq!(gate.pin_of(&other).unwrap(), None);
        gate.add_pins(format!("{} 4096 none - -\n", url_digest(&other)).as_bytes());
        assert_eq!(gate.pin_of(&other).unwrap().map(|pin| pin.size), Some(4096));
    }

    #[test]
    fn names_are_paths_and_nothing_else() {
        let dir = Path::new("/images");
        assert_eq!(resolve("base.raw", dir).unwrap(), Path::new("/images/base.raw"));
        assert_eq!(resolve("../base.raw", dir).unwrap(), Path::new("/images/../base.raw"));
        assert_eq!(resolve("/base.raw", dir).unwrap(), Path::new("/base.raw"));
        assert_eq!(resolve("./a:b", dir).unwrap(), Path::new("/images/./a:b"));
        assert_eq!(resolve("a/b:c", dir).unwrap(), Path::new("/images/a/b:c"));
        for name in [
            "json:{}",
            "file:a",
            "fd:3",
            "nbd:localhost:10809",
            "ftp://host/a",
            "blkdebug::a",
            ":",
            "a:b",
        ] {
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
