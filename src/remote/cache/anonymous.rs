//! An object without a name, for one process: bytes on their way into an overlay
//! (`--cache none`).

use std::fs::File;
use std::io;
use std::path::Path;
use std::time::SystemTime;

use host::error::Context;
use host::{Error, ErrorKind, Result};
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;

use super::map::{self, MapHeader};
use super::object::CacheObject;
use super::{LARGEST_FILE, locks};

/// Attempts to find a name that no file has, where the file system has no files without a name.
const NAMES: u32 = 100;

impl CacheObject {
    /// Makes an object of `size` bytes whose files have no names in `directory`. They are gone when
    /// the last process has closed them.
    ///
    /// # Errors
    /// [`ErrorKind::UnsupportedFeature`] for a size above [`LARGEST_FILE`]; those of open(2),
    /// ftruncate(2).
    pub fn anonymous(directory: &Path, size: u64) -> Result<CacheObject> {
        let name = format!("{}: file without a name", directory.display());
        check_size(size).context(|| name.clone())?;
        let make = || -> io::Result<(File, File)> {
            let (data, map) = (nameless(directory)?, nameless(directory)?);
            data.set_len(size)?;
            map.set_len(map::length(size))?;
            let boot = map::this_boot().map_err(io::Error::other)?;
            let header = MapHeader { size, boot, syncing: false, lost: 0, forgotten: 0 };
            map::write_header(&map, &header)?;
            Ok((data, map))
        };
        let (data, map) = make().context(|| name.clone())?;
        locks::try_lock(&map, locks::Kind::Shared, &locks::IN_USE).context(|| name.clone())?;
        Ok(CacheObject::new(name, size, data, map, None, true, false))
    }
}

/// Refuses sizes for which the map would be too large.
pub(super) fn check_size(size: u64) -> Result<()> {
    if size <= LARGEST_FILE {
        return Ok(());
    }
    let text = format!("a remote file of {size} bytes; at most {LARGEST_FILE} are supported");
    Err(Error::new(ErrorKind::UnsupportedFeature, text))
}

fn nameless(directory: &Path) -> io::Result<File> {
    let mode = Mode::RUSR | Mode::WUSR;
    let flags = OFlags::RDWR | OFlags::CLOEXEC;
    match rustix::fs::open(directory, flags | OFlags::TMPFILE, mode) {
        Ok(file) => return Ok(file.into()),
        Err(Errno::OPNOTSUPP | Errno::ISDIR | Errno::INVAL) => {}
        Err(errno) => return Err(errno.into()),
    }
    named_and_removed(directory)
}

/// For file systems without `O_TMPFILE` (NFS, FUSE).
fn named_and_removed(directory: &Path) -> io::Result<File> {
    let flags = OFlags::RDWR | OFlags::CLOEXEC | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW;
    for _ in 0..NAMES {
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        let name = format!(".cordisk-{}-{}", std::process::id(), now.as_nanos());
        let path = directory.join(name);
        match rustix::fs::open(&path, flags, Mode::RUSR | Mode::WUSR) {
            Ok(file) => {
                std::fs::remove_file(&path)?;
                return Ok(file.into());
            }
            Err(Errno::EXIST) => {}
            Err(errno) => return Err(errno.into()),
        }
    }
    Err(Errno::EXIST.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Protects: a file system without `O_TMPFILE` also gets files without a name.
    #[test]
    fn the_fallback_leaves_no_name() {
        let dir = tempfile::tempdir().unwrap();
        let (one, two) =
            (named_and_removed(dir.path()).unwrap(), named_and_removed(dir.path()).unwrap());
        map::write_all_at(&one, 0, b"one").unwrap();
        map::write_all_at(&two, 0, b"two").unwrap();
        let mut bytes = [0; 3];
        map::read_exact_at(&one, 0, &mut bytes).unwrap();
        assert_eq!(&bytes, b"one");
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
    }
}
