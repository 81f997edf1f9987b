//! The directory of the cache: opens, lists and removes objects.

use std::collections::BTreeSet;
use std::env;
use std::ffi::OsString;
use std::fs::{DirBuilder, File};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use host::error::Context;
use host::place::Place;
use host::{Error, ErrorKind, Result};
use rustix::fs::{AtFlags, Mode, OFlags};
use rustix::io::Errno;
use serde::{Deserialize, Serialize};

use super::anonymous::check_size;
use super::locks::{self, CHANGES, IN_USE, Kind};
use super::map::{self, BootId, MapHeader};
use super::object::{self, CacheObject};
use crate::pin::{Pin, cache_key};
use crate::url::SourceUrl;

/// Attempts to open an object that other processes remove at the same time.
const ATTEMPTS: u32 = 100;
/// Write permission for users other than the owner.
const OTHERS_WRITE: u32 = 0o022;
/// Length of a key in characters.
const KEY_LEN: usize = 64;
/// Largest description that is read, in bytes.
const LONGEST_DESCRIPTION: u64 = 64 << 10;
/// What a name consists of after the key. The map goes last when an object is removed: as long as
/// it has its name, the lock on it keeps others from making the object anew.
const SUFFIXES: [&str; 5] = [".data", ".json.new", ".json", ".sums", ".map"];

/// The open directory of the cache.
#[derive(Clone, Debug)]
pub struct CacheDirectory {
    path: PathBuf,
    directory: Arc<OwnedFd>,
    limit: Option<u64>,
    boot: BootId,
}

/// What is known of one object of the cache.
#[derive(Clone, Debug)]
pub struct ObjectFacts {
    /// [`cache_key`]
    pub key: String,
    /// The name of the remote file, without what could be a secret. None: the description is
    /// missing or damaged.
    pub name: Option<String>,
    /// What the object is pinned to, from the description.
    pub pin: Option<Pin>,
    /// Bytes in present blocks.
    pub present_bytes: u64,
    /// Bytes in blocks that outlive a failure of the power.
    pub durable_bytes: u64,
    /// Bytes that the files occupy on the file system.
    pub allocated_bytes: u64,
    /// When the object was last opened or closed.
    pub last_used: SystemTime,
    /// Whether a process has it open.
    pub in_use: bool,
}

/// What came of a prune.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct Pruned {
    /// Number of removed objects.
    pub objects: u64,
    /// Bytes that they occupied.
    pub bytes: u64,
    /// Bytes that the remaining objects occupy. They can exceed the limit if objects are in use.
    pub left: u64,
}

/// The content of `KEY.json`.
#[derive(Deserialize, Serialize)]
#[serde(rename_all = "kebab-case")]
struct Description {
    name: String,
    pin: Pin,
    /// Seconds since the start of 1970.
    created: u64,
}

/// Whether an object that does not exist is made.
#[derive(Clone, Copy, Eq, PartialEq)]
enum Absent {
    Make,
    Leave,
}

/// What came of an attempt to remove an object.
enum Removal {
    Done,
    InUse,
    /// Another process has removed or replaced it meanwhile.
    Gone,
}

impl CacheDirectory {
    /// Opens the directory of the cache; makes it (mode 0700) if it does not exist. `limit` is the
    /// number of bytes to which [`CacheDirectory::prune_to_limit`] prunes.
    ///
    /// # Errors
    /// [`ErrorKind::PermissionDenied`] if a user other than root and this one can write into the
    /// directory or replace it; those of mkdir(2), open(2).
    pub fn open(path: &Path, limit: Option<u64>) -> Result<CacheDirectory> {
        CacheDirectory::open_in_boot(path, limit, map::this_boot()?)
    }

    /// As [`CacheDirectory::open`], in a boot of another name.
    pub(super) fn open_in_boot(
        path: &Path,
        limit: Option<u64>,
        boot: BootId,
    ) -> Result<CacheDirectory> {
        let path = std::path::absolute(path).context(|| path.display().to_string())?;
        let context = || format!("cache directory {}", path.display());
        DirBuilder::new().recursive(true).mode(0o700).create(&path).context(context)?;
        let place = Place::find(&path.join("x")).context(context)?;
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let directory = rustix::fs::openat(place.directory(), ".", flags, Mode::empty())
            .map_err(io::Error::from)
            .context(context)?;
        let stat = rustix::fs::fstat(&directory).map_err(io::Error::from).context(context)?;
        if place.is_foreign() || stat.st_mode & OTHERS_WRITE != 0 {
            let text = format!(
                "{}: other users can write into it or replace it; use a directory of your own with mode 0700, below directories that only you or root can write",
                context()
            );
            return Err(Error::new(ErrorKind::PermissionDenied, text));
        }
        Ok(CacheDirectory { path, directory: Arc::new(directory), limit, boot })
    }

    /// The directory that is used if the user names none: the first of `CACHE_DIRECTORY` (set by
    /// systemd), for root `/var/cache/cordisk`, for others `cordisk` in `XDG_CACHE_HOME` or in
    /// `~/.cache` (XDG Base Directory Specification).
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`] if the user has no home directory.
    pub fn default_path() -> Result<PathBuf> {
        default_path(|name| env::var_os(name), rustix::process::geteuid().is_root())
    }

    /// The path of the directory.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Opens the object for a remote file; makes it if it does not exist. An object that is damaged
    /// and not in use becomes empty, with a warning in the log.
    ///
    /// # Errors
    /// [`ErrorKind::Corrupt`] if the object is damaged and in use.
    /// [`ErrorKind::UnsupportedFeature`] for a file above [`super::LARGEST_FILE`]. Those of
    /// open(2), fcntl(2), pread(2), pwrite(2).
    pub fn object(&self, url: &SourceUrl, pin: &Pin) -> Result<CacheObject> {
        self.open_object(url, pin, Absent::Make)?.ok_or_else(|| {
            let text = format!("{}: other processes keep removing {url}", self.path.display());
            Error::new(ErrorKind::Busy, text)
        })
    }

    /// Opens the object for a remote file if it exists.
    ///
    /// # Errors
    /// As [`CacheDirectory::object`].
    pub fn find(&self, url: &SourceUrl, pin: &Pin) -> Result<Option<CacheObject>> {
        self.open_object(url, pin, Absent::Leave)
    }

    /// What is in the cache, in the order of the keys. Objects that other processes remove
    /// meanwhile may be missing.
    ///
    /// # Errors
    /// Those of readdir(3).
    pub fn list(&self) -> Result<Vec<ObjectFacts>> {
        Ok(self.keys()?.into_iter().filter_map(|key| self.facts(key)).collect())
    }

    /// Removes the least recently used objects that are not in use, until the cache occupies at
    /// most `limit` bytes.
    ///
    /// # Errors
    /// Those of readdir(3), unlink(2).
    pub fn prune(&self, limit: u64) -> Result<Pruned> {
        let mut objects: Vec<(SystemTime, u64, String)> = self
            .keys()?
            .into_iter()
            .map(|key| (self.last_used(&key), self.allocated(&key), key))
            .collect();
        objects.sort();
        let mut pruned = Pruned {
            left: objects.iter().fold(0, |sum, object| sum.saturating_add(object.1)),
            ..Pruned::default()
        };
        for (_, bytes, key) in objects {
            if pruned.left <= limit {
                break;
            }
            match self.try_remove(&key)? {
                Removal::Done => {
                    pruned.objects += 1;
                    pruned.bytes = pruned.bytes.saturating_add(bytes);
                    pruned.left = pruned.left.saturating_sub(bytes);
                }
                Removal::Gone => pruned.left = pruned.left.saturating_sub(bytes),
                Removal::InUse => {}
            }
        }
        Ok(pruned)
    }

    /// [`CacheDirectory::prune`] to the limit of this directory, if it has one.
    ///
    /// # Errors
    /// As [`CacheDirectory::prune`].
    pub fn prune_to_limit(&self) -> Result<Pruned> {
        self.limit.map_or(Ok(Pruned::default()), |limit| self.prune(limit))
    }

    /// Removes the object with this key.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`]; [`ErrorKind::Busy`] if a process has it open; those of unlink(2).
    pub fn remove(&self, key: &str) -> Result<()> {
        let exists = |suffix: &str| self.stat(&format!("{key}{suffix}")).is_some();
        if !is_key(key) || !SUFFIXES.iter().any(|suffix| exists(suffix)) {
            let text = format!("{}: has no object {key}", self.path.display());
            return Err(Error::new(ErrorKind::NotFound, text));
        }
        match self.try_remove(key)? {
            Removal::Done | Removal::Gone => Ok(()),
            Removal::InUse => {
                let text = format!("{}: a process uses it", self.full(key));
                Err(Error::new(ErrorKind::Busy, text))
            }
        }
    }

    fn open_object(
        &self,
        url: &SourceUrl,
        pin: &Pin,
        absent: Absent,
    ) -> Result<Option<CacheObject>> {
        check_size(pin.size).context(|| url.to_string())?;
        let key = cache_key(url, pin);
        for _ in 0..ATTEMPTS {
            let Some(map) = self.open_file(&format!("{key}.map"), absent)? else {
                return Ok(None);
            };
            // Closing the file in an error path or for another attempt releases its locks.
            locks::wait(&map, &CHANGES).context(|| self.full(&key))?;
            if !self.leads_to(&format!("{key}.map"), &map) {
                continue;
            }
            let in_use = locks::is_held_by_others(&map, &IN_USE).context(|| self.full(&key))?;
            let prepared = self.prepare(&key, &map, (pin.size, in_use), absent)?;
            let Some((data, sees_errors)) = prepared else {
                return Ok(None);
            };
            if !locks::try_lock(&map, Kind::Shared, &IN_USE).context(|| self.full(&key))? {
                return Err(Error::new(ErrorKind::Busy, self.full(&key)));
            }
            let description = format!("{key}.json");
            if self.stat(&description).is_none() {
                self.describe(&key, url, pin)?;
            }
            object::touch(&self.directory, &description);
            locks::release(&map, &CHANGES);
            let used = Some((Arc::clone(&self.directory), description));
            return Ok(Some(CacheObject::new(
                self.full(&key),
                pin.size,
                data,
                map,
                used,
                sees_errors,
                in_use,
            )));
        }
        Ok(None)
    }

    /// Brings the files of an object into a state that can be trusted, and returns the data file,
    /// with what [`CacheDirectory::recover`] says of it. The caller holds the lock on changes.
    /// None: there is no object that can be trusted, and none was to be made.
    fn prepare(
        &self,
        key: &str,
        map: &File,
        (size, in_use): (u64, bool),
        absent: Absent,
    ) -> Result<Option<(File, bool)>> {
        let full = || self.full(key);
        let data = self.open_file(&format!("{key}.data"), absent)?;
        let is_new = map.metadata().context(full)?.len() == 0;
        let why = match (&data, map::read_header(map, size)) {
            (Some(file), Ok(header)) => match file.metadata().context(full)?.len() {
                len if len == size => {
                    let sees_errors = self.recover(map, &header, in_use).context(full)?;
                    return Ok(data.map(|data| (data, sees_errors)));
                }
                len => format!("the data has {len} bytes instead of {size}"),
            },
            (None, _) => "the data is missing".to_owned(),
            (_, Err(error)) => error.to_string(),
        };
        if in_use {
            let text = format!("{}: damaged, and in use: {why}", full());
            return Err(Error::new(ErrorKind::Corrupt, text));
        }
        let Some(data) = data.filter(|_| absent == Absent::Make) else { return Ok(None) };
        if !is_new {
            log::warn!("{}: damaged, starts empty: {why}", full());
        }
        self.reset(map, &data, size).context(full)?;
        Ok(Some((data, true)))
    }

    /// Makes the blocks absent of which it is not certain that their bytes were kept. Returns
    /// whether no commit is going on, or was cut off: then every later error of write-back is
    /// reported by a data file that is open already.
    fn recover(&self, map: &File, header: &MapHeader, in_use: bool) -> io::Result<bool> {
        if header.boot == self.boot && in_use {
            return Ok(!header.syncing);
        }
        // In this order: if this process is killed in between, the next one finds the old boot.
        object::lose(map, header.size, &[])?;
        let lost = header.lost.wrapping_add(1);
        map::write_header(map, &MapHeader { boot: self.boot, syncing: false, lost, ..*header })?;
        rustix::fs::fdatasync(map)?;
        Ok(true)
    }

    /// Makes the object empty. No process uses it.
    fn reset(&self, map: &File, data: &File, size: u64) -> io::Result<()> {
        // A map that says more than the data has must not be on the disk at any time.
        map.set_len(0)?;
        rustix::fs::fdatasync(map)?;
        data.set_len(0)?;
        data.set_len(size)?;
        map.set_len(map::length(size))?;
        let header = MapHeader { size, boot: self.boot, syncing: false, lost: 0, forgotten: 0 };
        map::write_header(map, &header)
    }

    /// Removes the files of an object, unless a process has it open or is opening it.
    fn try_remove(&self, key: &str) -> Result<Removal> {
        match self.open_file(&format!("{key}.map"), Absent::Make)? {
            Some(map) => self.remove_by(key, &map),
            None => Ok(Removal::Gone),
        }
    }

    /// Removes the files of an object whose map is open, if the map still has its name.
    fn remove_by(&self, key: &str, map: &File) -> Result<Removal> {
        let full = || self.full(key);
        let name = format!("{key}.map");
        for byte in [CHANGES, IN_USE] {
            if !locks::try_lock(map, Kind::Exclusive, &byte).context(full)? {
                return Ok(Removal::InUse);
            }
        }
        if !self.leads_to(&name, map) {
            return Ok(Removal::Gone);
        }
        // The names can come back after a failure of the power, each by itself. An empty map makes
        // sure that the data is not trusted then.
        map.set_len(0).context(full)?;
        rustix::fs::fdatasync(map).map_err(io::Error::from).context(full)?;
        for suffix in SUFFIXES {
            let name = format!("{key}{suffix}");
            match rustix::fs::unlinkat(&self.directory, &name, AtFlags::empty()) {
                Ok(()) | Err(Errno::NOENT) => {}
                Err(errno) => return Err(Error::io(full(), errno.into())),
            }
        }
        Ok(Removal::Done)
    }

    /// Writes the description of an object. The caller holds the lock on changes.
    fn describe(&self, key: &str, url: &SourceUrl, pin: &Pin) -> Result<()> {
        let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        let description =
            Description { name: url.to_string(), pin: pin.clone(), created: since.as_secs() };
        let (new, name) = (format!("{key}.json.new"), format!("{key}.json"));
        let write = || -> io::Result<()> {
            let mut text = serde_json::to_string_pretty(&description)?;
            text.push('\n');
            let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::TRUNC;
            let file = File::from(self.openat(&new, flags)?);
            map::write_all_at(&file, 0, text.as_bytes())?;
            Ok(rustix::fs::renameat(&self.directory, &new, &self.directory, &name)?)
        };
        write().context(|| self.full(key))
    }

    fn facts(&self, key: String) -> Option<ObjectFacts> {
        let map = self.openat(&format!("{key}.map"), OFlags::RDONLY).ok().map(File::from);
        let counted = map.as_ref().and_then(|map| {
            let mut bytes = [0; map::HEADER as usize];
            map::read_exact_at(map, 0, &mut bytes).ok()?;
            let size = MapHeader::parse(&bytes).ok()?.size;
            map::count(map, size).ok()
        });
        let (present_bytes, durable_bytes) = counted.unwrap_or_default();
        let in_use = map.is_some_and(|map| locks::is_held_by_others(&map, &IN_USE).unwrap_or(true));
        let description = self.description(&key);
        // An object that was removed meanwhile has no file any more.
        SUFFIXES.iter().find(|suffix| self.stat(&format!("{key}{suffix}")).is_some())?;
        Some(ObjectFacts {
            name: description.as_ref().map(|description| description.name.clone()),
            pin: description.map(|description| description.pin),
            present_bytes,
            durable_bytes,
            allocated_bytes: self.allocated(&key),
            last_used: self.last_used(&key),
            in_use,
            key,
        })
    }

    fn description(&self, key: &str) -> Option<Description> {
        let file = File::from(self.openat(&format!("{key}.json"), OFlags::RDONLY).ok()?);
        let len = file.metadata().ok()?.len();
        if len > LONGEST_DESCRIPTION {
            return None;
        }
        let mut bytes = vec![0; usize::try_from(len).ok()?];
        map::read_exact_at(&file, 0, &mut bytes).ok()?;
        serde_json::from_slice(&bytes).ok()
    }

    /// The keys of all files in the directory that look like parts of objects.
    fn keys(&self) -> Result<BTreeSet<String>> {
        let context = || format!("cache directory {}", self.path.display());
        let mut keys = BTreeSet::new();
        let entries = rustix::fs::Dir::read_from(&self.directory)
            .map_err(io::Error::from)
            .context(context)?;
        for entry in entries {
            let entry = entry.map_err(io::Error::from).context(context)?;
            let Ok(name) = entry.file_name().to_str() else { continue };
            let key = SUFFIXES.iter().find_map(|suffix| name.strip_suffix(suffix));
            keys.extend(key.filter(|key| is_key(key)).map(str::to_owned));
        }
        Ok(keys)
    }

    fn allocated(&self, key: &str) -> u64 {
        SUFFIXES
            .iter()
            .filter_map(|suffix| self.stat(&format!("{key}{suffix}")))
            .map(|stat| u64::try_from(stat.st_blocks).unwrap_or(0).saturating_mul(512))
            .fold(0, u64::saturating_add)
    }

    /// The time of the last use; the oldest of all times if the description is missing.
    fn last_used(&self, key: &str) -> SystemTime {
        let since = self
            .stat(&format!("{key}.json"))
            .and_then(|stat| {
                u64::try_from(stat.st_mtime).ok().zip(stat.st_mtime_nsec.try_into().ok())
            })
            .map(|(seconds, nanoseconds): (u64, u32)| Duration::new(seconds, nanoseconds));
        since
            .and_then(|since| SystemTime::UNIX_EPOCH.checked_add(since))
            .unwrap_or(SystemTime::UNIX_EPOCH)
    }

    fn stat(&self, name: &str) -> Option<rustix::fs::Stat> {
        rustix::fs::statat(&self.directory, name, AtFlags::SYMLINK_NOFOLLOW).ok()
    }

    fn leads_to(&self, name: &str, file: &File) -> bool {
        match (self.stat(name), file.metadata()) {
            (Some(there), Ok(open)) => (there.st_dev, there.st_ino) == (open.dev(), open.ino()),
            _ => false,
        }
    }

    fn open_file(&self, name: &str, absent: Absent) -> Result<Option<File>> {
        let flags = match absent {
            Absent::Make => OFlags::RDWR | OFlags::CREATE,
            Absent::Leave => OFlags::RDWR,
        };
        match self.openat(name, flags) {
            Ok(file) => Ok(Some(file.into())),
            Err(Errno::NOENT) if absent == Absent::Leave => Ok(None),
            Err(errno) => Err(Error::io(self.full(name), errno.into())),
        }
    }

    fn openat(&self, name: &str, flags: OFlags) -> rustix::io::Result<OwnedFd> {
        let flags = flags | OFlags::CLOEXEC | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::NOCTTY;
        rustix::fs::openat(self.directory.as_fd(), name, flags, Mode::RUSR | Mode::WUSR)
    }

    /// A name for messages.
    fn full(&self, name: &str) -> String {
        self.path.join(name).display().to_string()
    }
}

fn is_key(key: &str) -> bool {
    key.len() == KEY_LEN && key.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'))
}

fn default_path(variable: impl Fn(&str) -> Option<OsString>, root: bool) -> Result<PathBuf> {
    let absolute = |name: &str| variable(name).map(PathBuf::from).filter(|path| path.is_absolute());
    if let Some(paths) = variable("CACHE_DIRECTORY")
        && let Some(first) = env::split_paths(&paths).find(|path| path.is_absolute())
    {
        return Ok(first);
    }
    if root {
        return Ok(PathBuf::from("/var/cache/cordisk"));
    }
    absolute("XDG_CACHE_HOME")
        .or_else(|| absolute("HOME").map(|home| home.join(".cache")))
        .map(|path| path.join("cordisk"))
        .ok_or_else(|| {
            let text = "there is no home directory for the cache: set HOME or XDG_CACHE_HOME, or name a directory";
            Error::new(ErrorKind::NotFound, text)
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Protects: a prune that has opened an object, which another prune removes and a process makes
    /// anew before it goes on, removes nothing of the new one, which is in use.
    #[test]
    fn two_prunes_do_not_remove_an_object_in_use() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("cache");
        let (slow, fast) = (
            CacheDirectory::open(&path, None).unwrap(),
            CacheDirectory::open(&path, None).unwrap(),
        );
        let url = SourceUrl::parse("s3://golden/base.raw").unwrap();
        let size = 2 * crate::cache::BLOCK;
        let pin = Pin { size, validator: crate::pin::Validator::Version("1".into()), digest: None };
        let key = cache_key(&url, &pin);
        drop(fast.object(&url, &pin).unwrap());

        let map = slow.open_file(&format!("{key}.map"), Absent::Make).unwrap().unwrap();
        assert_eq!(fast.prune(0).unwrap().objects, 1);
        let object = fast.object(&url, &pin).unwrap();
        let claim = object.claim(&(0..size)).unwrap();
        object.write_at(0, &vec![7; size as usize]).unwrap();
        object.mark_present(&(0..size)).unwrap();
        assert!(matches!(slow.remove_by(&key, &map).unwrap(), Removal::Gone));

        let again = fast.find(&url, &pin).unwrap().expect("in use, and removed");
        assert!(again.is_present(&(0..size)).unwrap(), "another object by the same name");
        drop(claim);
    }

    /// Protects: where the cache is if the user names no directory.
    #[test]
    fn the_default_place_follows_systemd_and_xdg() {
        let place = |set: &[(&str, &str)], root| {
            let variable = |name: &str| {
                set.iter().find(|(set, _)| *set == name).map(|(_, value)| OsString::from(value))
            };
            default_path(variable, root).map(|path| path.display().to_string()).ok()
        };
        let (home, xdg) = (("HOME", "/home/u"), ("XDG_CACHE_HOME", "/c"));
        let systemd = ("CACHE_DIRECTORY", "/var/cache/a:/var/cache/b");
        assert_eq!(place(&[systemd, xdg, home], false).unwrap(), "/var/cache/a");
        assert_eq!(place(&[systemd], true).unwrap(), "/var/cache/a");
        assert_eq!(place(&[xdg, home], true).unwrap(), "/var/cache/cordisk");
        assert_eq!(place(&[xdg, home], false).unwrap(), "/c/cordisk");
        assert_eq!(place(&[home], false).unwrap(), "/home/u/.cache/cordisk");
        let relative = [("CACHE_DIRECTORY", ""), ("XDG_CACHE_HOME", "c"), home];
        assert_eq!(place(&relative, false).unwrap(), "/home/u/.cache/cordisk");
        assert_eq!(place(&[("HOME", "")], false), None);
    }
}
