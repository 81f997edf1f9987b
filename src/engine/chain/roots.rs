//! The directories that backing files must lie in (`--backing-root`).
//!
//! The kernel resolves a name from an image below the root, with `RESOLVE_BENEATH`. Neither `..`
//! nor a symbolic link can lead out of the root, not even if directories are renamed meanwhile.
//!
//! Only the start of that walk is decided here, by comparing text. A name that begins with the path
//! of the root (as typed, or without its symbolic links) continues below the root. A relative name
//! is appended to the directory of its image. The symbolic links of that directory are resolved
//! first, so a leading `..` means the same parent as in the kernel. The file that is opened is
//! therefore the one that would be opened without the option, or none.
//!
//! Absolute symbolic links are refused wherever they lead, because the kernel does not check
//! whether they lead back below the root.

use std::os::fd::OwnedFd;
use std::path::{Component, Path, PathBuf};
use std::sync::Arc;

use rustix::fs::{Mode, OFlags};

use host::error::Context;
use host::storage::FileStorage;
use host::{Error, ErrorKind, Result};
use qcow2::format::printable;

/// The open directories. An empty list means that backing files may lie anywhere.
#[derive(Clone, Debug, Default)]
pub struct Roots(Vec<Arc<Root>>);

#[derive(Debug)]
struct Root {
    /// Absolute path as typed by the user.
    typed: PathBuf,
    /// Path without symbolic links.
    real: PathBuf,
    directory: OwnedFd,
}

impl Roots {
    /// Opens the directories. `paths` are absolute.
    ///
    /// # Errors
    /// One of the paths is no directory or cannot be opened.
    pub fn open(paths: &[PathBuf]) -> Result<Roots> {
        let open = |path: &PathBuf| {
            let what = || format!("--backing-root {}", path.display());
            let directory = rustix::fs::open(
                path,
                OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC,
                Mode::empty(),
            );
            let directory = directory.map_err(std::io::Error::from).context(what)?;
            let real = path.canonicalize().context(what)?;
            Ok(Arc::new(Root { typed: path.clone(), real, directory }))
        };
        paths.iter().map(open).collect::<Result<_>>().map(Roots)
    }

    /// Opens the backing file that `name`, found in an image in `directory`, names: read-only and
    /// not yet locked. `path` becomes the path of the opened file.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidArgument`] if it lies below none of the directories; otherwise as
    /// [`FileStorage::open_backing`].
    pub(super) fn open_backing(
        &self,
        name: &str,
        directory: &Path,
        path: &Path,
    ) -> Result<FileStorage> {
        if self.0.is_empty() {
            return FileStorage::open_backing(rustix::fs::CWD, path, path);
        }
        let refused = |why: &str| {
            let roots: Vec<String> =
                self.0.iter().map(|root| root.typed.display().to_string()).collect();
            let (name, roots) = (printable(name), roots.join(", "));
            Error::new(
                ErrorKind::InvalidArgument,
                format!("backing file \"{name}\" {why} --backing-root {roots}"),
            )
        };
        let wanted = start_of_walk(name, directory)?;
        let mut outside = None;
        for root in &self.0 {
            let Some(rest) = root.below(&wanted) else { continue };
            match FileStorage::open_backing(&root.directory, rest, path) {
                // The kernel reports a walk that leaves the root as EXDEV.
                Err(error) if error.errno() == Some(rustix::io::Errno::XDEV.raw_os_error()) => {
                    outside = Some(error)
                }
                opened => return opened,
            }
        }
        Err(match outside {
            Some(_) => refused("leads out of"),
            None => refused("does not lie below"),
        })
    }
}

impl Root {
    /// The part of `path` below this directory; `None` if `path` is not below it.
    fn below<'a>(&self, path: &'a Path) -> Option<&'a Path> {
        let rest =
            path.strip_prefix(&self.real).or_else(|_| path.strip_prefix(&self.typed)).ok()?;
        (!rest.as_os_str().is_empty()).then_some(rest)
    }
}

/// The name made absolute; a relative name is appended to the real directory of its image. A
/// leading `..` is resolved here; later ones are left to the kernel, which follows symbolic links.
fn start_of_walk(name: &str, directory: &Path) -> Result<PathBuf> {
    let name = Path::new(name);
    if name.is_absolute() {
        return Ok(name.to_path_buf());
    }
    let mut start = directory.canonicalize().context(|| directory.display().to_string())?;
    let mut components = name.components();
    loop {
        let rest = components.as_path();
        match components.next() {
            Some(Component::CurDir) => {}
            Some(Component::ParentDir) => {
                start.pop();
            }
            _ => return Ok(start.join(rest)),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::symlink;

    use super::*;

    /// A tree: `root/` with `base`, `sub/base` and links; `secret` outside of it.
    fn tree() -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        fs::create_dir_all(at("root/sub")).unwrap();
        fs::create_dir_all(at("elsewhere/deep")).unwrap();
        for name in ["root/base", "root/sub/base", "secret", "elsewhere/base"] {
            fs::write(at(name), name).unwrap();
        }
        symlink("sub/base", at("root/inside")).unwrap();
        symlink("../secret", at("root/out")).unwrap();
        symlink(at("secret"), at("root/absolute")).unwrap();
        symlink("../elsewhere", at("root/directory")).unwrap();
        symlink("../elsewhere/deep", at("root/link-to-deep")).unwrap();
        symlink("root", at("alias")).unwrap();
        dir
    }

    fn open(roots: &[&Path], name: &str, directory: &Path) -> Result<String> {
        let roots: Vec<PathBuf> = roots.iter().map(|root| root.to_path_buf()).collect();
        let file = Roots::open(&roots)?.open_backing(name, directory, &directory.join(name))?;
        let mut bytes = vec![0; host::storage::ReadAt::size(&file) as usize];
        host::storage::ReadAt::read_at(&file, 0, &mut bytes).unwrap();
        Ok(String::from_utf8(bytes).unwrap())
    }

    #[test]
    fn what_lies_below_a_root_opens() {
        let dir = tree();
        let (root, at) = (dir.path().join("root"), |name: &str| dir.path().join(name));
        let absolute = |name: &str| at(name).to_str().unwrap().to_owned();
        for (name, from, content) in [
            ("base", "root", "root/base"),
            ("./sub/../base", "root", "root/base"),
            ("../base", "root/sub", "root/base"),
            ("inside", "root", "root/sub/base"),
            ("../root/base", "elsewhere", "root/base"),
            // The image's directory is a link to the root.
            ("base", "alias", "root/base"),
            ("sub/base", "alias", "root/sub/base"),
            (&absolute("root/base"), "elsewhere", "root/base"),
        ] {
            assert_eq!(open(&[&root], name, &at(from)).unwrap(), content, "{name} from {from}");
        }
        // The root is given as a link, the file by the same link or by its real path.
        assert_eq!(
            open(&[&at("alias")], &absolute("alias/base"), dir.path()).unwrap(),
            "root/base"
        );
        assert_eq!(open(&[&at("alias")], &absolute("root/base"), dir.path()).unwrap(), "root/base");
        // Two roots: the second one contains the file.
        assert_eq!(open(&[&at("root/sub"), &root], "base", &root).unwrap(), "root/base");
        assert_eq!(
            open(&[&root, &at("elsewhere")], "../elsewhere/base", &root).unwrap(),
            "elsewhere/base"
        );
    }

    #[test]
    fn nothing_else_does() {
        let dir = tree();
        let (root, at) = (dir.path().join("root"), |name: &str| dir.path().join(name));
        let absolute = |name: &str| at(name).to_str().unwrap().to_owned();
        for (name, from) in [
            ("../secret", "root"),
            ("sub/../../secret", "root"),
            ("../../secret", "root/sub"),
            ("out", "root"),
            ("absolute", "root"),
            ("directory/base", "root"),
            ("link-to-deep/../base", "root"),
            ("base", "elsewhere"),
            (&absolute("secret"), "root"),
            (&absolute("root/../secret"), "root"),
            (&absolute("root"), "root"),
            (&absolute("rootless/base"), "root"),
            ("/etc/passwd", "root"),
            ("/proc/self/exe", "root"),
        ] {
            let error = open(&[&root], name, &at(from)).unwrap_err();
            assert!(error.to_string().contains("--backing-root"), "{name} from {from}: {error}");
            assert_eq!(error.kind(), ErrorKind::InvalidArgument);
        }
        let missing = open(&[&root], "missing", &root).unwrap_err();
        assert_eq!(missing.kind(), ErrorKind::NotFound, "{missing}");
        assert!(
            open(&[&at("root/base")], "base", &root)
                .unwrap_err()
                .to_string()
                .contains("Not a directory")
        );
    }

    /// Protects: with and without a root, a name means the same file, also where text and kernel
    /// differ about `..`.
    #[test]
    fn a_name_means_the_same_file_with_and_without_a_root() {
        let dir = tree();
        let at = |name: &str| dir.path().join(name);
        // By text alone this would be root/base.
        let without = open(&[], "link-to-deep/../base", &at("root")).unwrap();
        let with = open(&[dir.path()], "link-to-deep/../base", &at("root")).unwrap();
        assert_eq!((without.as_str(), with.as_str()), ("elsewhere/base", "elsewhere/base"));
        // The image's directory is a link: `..` is the parent of the link's target.
        let without = open(&[], "../base", &at("root/link-to-deep")).unwrap();
        let with = open(&[dir.path()], "../base", &at("root/link-to-deep")).unwrap();
        assert_eq!((without.as_str(), with.as_str()), ("elsewhere/base", "elsewhere/base"));
    }

    #[test]
    fn magic_links_and_the_kernels_files_are_never_backing_files() {
        let dir = tree();
        let file = fs::File::open(dir.path().join("secret")).unwrap();
        let magic = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&file));
        symlink(&magic, dir.path().join("root/magic")).unwrap();
        for name in [
            magic.as_str(),
            "magic",
            "/proc/self/exe",
            "/proc/version",
            "/sys/kernel/mm/ksm/run",
            "/dev/fd/0",
        ] {
            if !name.starts_with("magic") && !Path::new(name).exists() {
                continue;
            }
            let error = open(&[], name, &dir.path().join("root")).unwrap_err();
            assert!(
                error.to_string().contains("what is in /proc or /sys is no backing file"),
                "{name}: {error}"
            );
            // Below a root, the kernel first refuses absolute links, whatever their target.
            let error = open(&[Path::new("/")], name, &dir.path().join("root")).unwrap_err();
            assert!(
                error.to_string().contains("/proc or /sys")
                    || error.to_string().contains("--backing-root"),
                "{name}: {error}"
            );
        }
    }
}
