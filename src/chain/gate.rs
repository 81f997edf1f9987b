//! The gate: no file is opened because an image says so unless it passes here (data-safety 3.3, with the CVEs behind each rule).

use std::path::{Path, PathBuf};

use crate::format::{BackingFormat, BackingReference, printable};
use crate::storage::FileStorage;
use crate::{Error, ErrorKind, Result};

use super::roots::Roots;

/// What the user allowed of backing files, and what is open already.
#[derive(Clone, Debug, Default)]
pub struct Gate {
    /// `--backing-format`: the format of the first backing file where its overlay's header does not say.
    pub backing_format: Option<BackingFormat>,
    /// (device, inode) of files that must not appear in the chain: the overlay.
    pub taken: Vec<(u64, u64)>,
    /// `--backing-root`: where backing files must lie.
    pub roots: Roots,
}

impl Gate {
    /// Opens the file that `reference`, found in an image in `directory`, names: read-only, locked, and not one that is open already. It
    /// counts as taken afterwards. Says also what its format is, which is never found out by looking at it: a guest can write a header of
    /// any format into a raw disk.
    pub(super) fn admit(&mut self, reference: &BackingReference, directory: &Path) -> Result<(FileStorage, BackingFormat)> {
        let path = resolve(&reference.name, directory)?;
        let format = match (reference.format, self.backing_format.take()) {
            (Some(format), _) | (None, Some(format)) => format,
            (None, None) => return Err(missing_format(&reference.name)),
        };
        let file = self.roots.open_backing(&reference.name, directory, &path)?;
        // Before the lock, which our own open overlay would refuse with a message about another process.
        if self.taken.contains(&file.identity()) {
            return Err(invalid(format!("{}: is part of this backing chain already, or the overlay itself", path.display())));
        }
        file.lock()?;
        self.taken.push(file.identity());
        Ok((file, format))
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
