//! The kernel's list of mounts. Reading it never touches the mounted file systems, so it cannot
//! hang on a dead one (H29).
//!
//! The crate `procfs` reads this list as text and does not decode `\ooo`. So one mountpoint of any
//! user that is not UTF-8 would hide all mounts, and a path with a blank would never be found.

use std::collections::HashSet;
use std::ffi::OsStr;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

use host::Result;
use host::error::Context;

/// The list of mounts of this process's mount namespace (proc_pid_mountinfo(5)).
const LIST: &str = "/proc/self/mountinfo";

/// One mount.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(super) struct MountEntry {
    /// `major:minor` of the mounted file system, which identifies it while it exists.
    pub(super) device: String,
    /// The path at which it is mounted.
    pub(super) mountpoint: PathBuf,
    /// File system type with its subtype, `fuse.cordisk`.
    pub(super) fs_type: String,
    /// The source of the mount; for our mounts, the path of the image.
    pub(super) source: PathBuf,
    /// For FUSE mounts: the id of the user that may use the mount.
    pub(super) user: Option<u32>,
}

/// Returns the mount at `path` (absolute, without symbolic links); the topmost one, if there are
/// several.
///
/// # Errors
/// The list cannot be read because /proc is not mounted.
pub(super) fn mounted_at(path: &Path) -> Result<Option<MountEntry>> {
    let list = std::fs::read(LIST).context(|| LIST)?;
    Ok(topmost(&list, path))
}

/// Returns the topmost mount of each mountpoint, in the order of mounting.
///
/// # Errors
/// Those of [`mounted_at`].
pub(super) fn topmost_of_each() -> Result<Vec<MountEntry>> {
    let list = std::fs::read(LIST).context(|| LIST)?;
    Ok(on_top(list.split(|&byte| byte == b'\n').filter_map(parse).collect()))
}

/// Returns the places where the file system `device` (`major:minor`) with this source is the
/// topmost mount, the oldest first. A bind mount adds a place. The device alone does not identify
/// the file system: the kernel gives its number to the next mount as soon as it is free.
///
/// # Errors
/// Those of [`mounted_at`].
pub(super) fn of_device(device: &str, source: &Path) -> Result<Vec<MountEntry>> {
    let mut entries = topmost_of_each()?;
    entries.retain(|entry| entry.device == device && entry.source == source);
    Ok(entries)
}

/// Returns one process of each other mount namespace in which that file system is mounted. Only
/// processes that this user may inspect are found.
pub(super) fn other_namespaces(device: &str, source: &Path) -> Vec<u32> {
    let namespace_of = |process: &Path| std::fs::read_link(process.join("ns/mnt")).ok();
    let mut seen: HashSet<PathBuf> = namespace_of(Path::new("/proc/self")).into_iter().collect();
    let mut found = Vec::new();
    for entry in std::fs::read_dir("/proc").into_iter().flatten().flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse().ok()) else {
            continue;
        };
        let Some(namespace) = namespace_of(&entry.path()) else { continue };
        if !seen.insert(namespace) {
            continue;
        }
        let list = std::fs::read(entry.path().join("mountinfo")).unwrap_or_default();
        let mut mounts = list.split(|&byte| byte == b'\n').filter_map(parse);
        if mounts.any(|mount| mount.device == device && mount.source == source) {
            found.push(pid);
        }
    }
    found
}

fn on_top(mut entries: Vec<MountEntry>) -> Vec<MountEntry> {
    let mut seen = HashSet::new();
    entries.reverse();
    entries.retain(|entry| seen.insert(entry.mountpoint.clone()));
    entries.reverse();
    entries
}

fn topmost(list: &[u8], path: &Path) -> Option<MountEntry> {
    list.split(|&byte| byte == b'\n').filter_map(parse).rfind(|entry| entry.mountpoint == path)
}

/// Parses one line: `36 35 0:52 / /mnt/disk rw,noatime shared:1 - fuse.cordisk /srv/overlay.qcow2
/// rw,user_id=0`.
fn parse(line: &[u8]) -> Option<MountEntry> {
    let mut fields = line.split(|&byte| byte == b' ');
    let device = fields.nth(2)?;
    let mountpoint = fields.nth(1)?;
    // Optional fields precede a hyphen.
    let mut fields = fields.skip_while(|field| *field != b"-").skip(1);
    let fs_type = fields.next()?;
    let source = fields.next()?;
    let options = String::from_utf8_lossy(fields.next().unwrap_or_default());
    Some(MountEntry {
        device: String::from_utf8(device.to_vec()).ok()?,
        mountpoint: unescape(mountpoint),
        fs_type: OsStr::from_bytes(fs_type).to_string_lossy().into_owned(),
        source: unescape(source),
        user: options.split(',').find_map(|option| option.strip_prefix("user_id=")?.parse().ok()),
    })
}

/// Decodes the kernel's `\ooo` for space, tab, newline, backslash and `#`.
fn unescape(field: &[u8]) -> PathBuf {
    let mut bytes = Vec::with_capacity(field.len());
    let mut rest = field;
    while let Some((&first, tail)) = rest.split_first() {
        match tail {
            [a @ b'0'..=b'3', b @ b'0'..=b'7', c @ b'0'..=b'7', after @ ..] if first == b'\\' => {
                bytes.push((a - b'0') << 6 | (b - b'0') << 3 | (c - b'0'));
                rest = after;
            }
            _ => {
                bytes.push(first);
                rest = tail;
            }
        }
    }
    std::ffi::OsString::from_vec(bytes).into()
}

#[cfg(test)]
mod tests {
    use super::*;

    const SAMPLE: &[u8] = b"22 1 254:0 / / rw,relatime shared:1 - ext4 /dev/root rw\n\
        90 22 0:52 / /mnt/a\\040b\\134c rw,nosuid - fuse.cordisk /o.qcow2 rw,user_id=0\n\
        91 22 0:53 / /mnt/x rw master:1 propagate_from:2 - fuse /dev/fuse rw\n\
        92 91 0:54 / /mnt/x rw - tmpfs none rw\n";

    #[test]
    fn entries_are_found_by_their_unescaped_path() {
        let entry = topmost(SAMPLE, Path::new("/mnt/a b\\c")).unwrap();
        assert_eq!((entry.device.as_str(), entry.fs_type.as_str()), ("0:52", "fuse.cordisk"));
        assert_eq!((entry.source.as_path(), entry.user), (Path::new("/o.qcow2"), Some(0)));
        assert_eq!(topmost(SAMPLE, Path::new("/mnt")), None);
    }

    #[test]
    fn the_last_mount_at_a_path_is_the_one_on_top() {
        assert_eq!(topmost(SAMPLE, Path::new("/mnt/x")).unwrap().fs_type, "tmpfs");
        let all = on_top(SAMPLE.split(|&byte| byte == b'\n').filter_map(parse).collect());
        assert_eq!(
            all.iter().map(|entry| entry.fs_type.as_str()).collect::<Vec<_>>(),
            ["ext4", "fuse.cordisk", "tmpfs"]
        );
    }

    #[test]
    fn broken_lines_are_skipped() {
        for line in [
            &b""[..],
            b"1 2 3",
            b"1 2 0:1 / /m rw",
            b"1 2 0:1 / /m rw -",
            b"1 2 0:1 / /m rw - fuse",
        ] {
            assert_eq!(parse(line), None);
        }
        assert_eq!(unescape(b"\\04"), Path::new("\\04"));
        assert_eq!(unescape(b"a\\"), Path::new("a\\"));
    }

    #[test]
    fn the_root_is_mounted() {
        assert!(mounted_at(Path::new("/")).unwrap().is_some());
    }
}
