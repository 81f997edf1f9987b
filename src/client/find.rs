//! From what the user types to a socket: the disk at a mountpoint, or behind a socket; and all disks there are.

use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::closing::Process;
use super::connection::{Connection, PATIENCE};
use crate::error::{Context, InUse};
use crate::fuse::{self, Life, SeenMount};
use crate::running::{self, Found};
use crate::{Error, ErrorKind, Result};

/// What to do where nothing was found.
const LISTED: &str = "`cordisk status` lists those that run";

/// Most entries of one mountpoint that are looked at, the own ones first.
const MOST_KNOWN: usize = 100;

/// A disk whose daemon can be talked to.
#[derive(Debug)]
pub struct Disk {
    /// As the user has named it.
    pub name: String,
    /// Its control socket.
    pub socket: PathBuf,
    /// Where it is mounted, if that is known.
    pub mountpoint: Option<PathBuf>,
    /// The entry of its daemon, if it has one.
    pub found: Option<Found>,
}

impl Disk {
    /// Connects to its daemon.
    ///
    /// # Errors
    /// Those of [`Connection::open`].
    pub fn connect(&self) -> Result<Connection> {
        self.connect_within(PATIENCE)
    }

    /// As [`Disk::connect`], with another patience.
    ///
    /// # Errors
    /// Those of [`Connection::open`].
    pub fn connect_within(&self, patience: Duration) -> Result<Connection> {
        let stranger = self.found.as_ref().map(|found| found.owner).filter(|&owner| !is_believed(owner));
        Connection::open_of(&self.socket, &self.name, patience, stranger)
    }
}

/// What there is at a name.
#[derive(Debug)]
pub enum Target {
    /// A disk that is served.
    Running(Disk),
    /// A mount that nobody serves any more.
    Dead(SeenMount),
    /// A mount that is served, or may be, by a daemon that is not entered where this user looks.
    Unregistered(SeenMount),
}

/// Finds the disk that `target` names: its mountpoint, a symbolic link to it, or its control socket.
///
/// # Errors
/// There is none, with what to do.
pub fn find(target: &Path) -> Result<Target> {
    let name = target.display().to_string();
    let mounts = fuse::mounts()?;
    if let Some(mount) = mount_at(target, &mounts) {
        return Ok(resolve(name, mount));
    }
    // Unmounted from there, and served still: its daemon closes the image, or another mount of the disk keeps it.
    let was_there = |found: &Found, path: &Path| is_believed(found.owner) && found.entry.is_at(path) && found.is_running();
    if let Some(path) = real(target)
        && let Some(found) = running::find_all().find(|found| was_there(found, &path))
    {
        return Ok(Target::Running(disk_of(name, path, found)));
    }
    // Nothing of ours is mounted there, so asking for it cannot hang on us.
    if target.metadata().is_ok_and(|there| there.file_type().is_socket()) {
        let socket = std::path::absolute(target).context(|| name.clone())?;
        let says_so = |found: &Found| speaks_for(found, &mounts) && same(&found.entry.qmp, &socket) && found.is_running();
        let found = running::find_all().find(says_so);
        let mountpoint = found.as_ref().map(|found| {
            // An entry is text. The list of mounts has the name that can be unmounted, whatever its bytes are.
            let mount = mounts.iter().find(|mount| is_of(found, mount) && same_text(&found.entry.image, &mount.image));
            mount.map_or_else(|| found.entry.mountpoint.clone(), |mount| mount.mountpoint.clone())
        });
        return Ok(Target::Running(Disk { name, socket, mountpoint, found }));
    }
    let hint = match image_of(target, &mounts) {
        Some(mount) => format!("it is the image of the disk at {0}; name that: {0}", mount.mountpoint.display()),
        None => LISTED.to_owned(),
    };
    Err(Error::new(ErrorKind::NotFound, format!("no cordisk disk is mounted at {name}; {hint}")))
}

/// As [`find`], and connects.
///
/// # Errors
/// Those of [`find`]; the disk is dead, or cannot be talked to, with what to do.
pub fn connect(target: &Path) -> Result<(Connection, Disk)> {
    match find(target)? {
        Target::Running(disk) => Ok((disk.connect()?, disk)),
        Target::Dead(_) => Err(dead(target)),
        Target::Unregistered(_) => Err(unregistered(target)),
    }
}

/// The error for whoever wants something of a dead disk.
pub(super) fn dead(target: &Path) -> Error {
    let text = format!(
        "the disk at {} is dead: its daemon was killed; mount it again with the same `cordisk mount`, or remove it: cordisk umount {}",
        target.display(),
        super::show::quoted(target)
    );
    Error::new(ErrorKind::NotFound, text)
}

/// The error for whoever wants something of a disk without an entry.
pub(super) fn unregistered(target: &Path) -> Error {
    let text = format!(
        "the disk at {} has no entry that this user can read: it belongs to another user, or its daemon could not be entered; \
         name its control socket (mount --qmp) instead of the mountpoint",
        target.display()
    );
    Error::new(ErrorKind::NotFound, text)
}

/// All disks: those that run, in the order in which they were mounted, then mounts without a daemon that is known.
///
/// # Errors
/// The list of mounts cannot be read.
pub fn find_all() -> Result<Vec<Target>> {
    let mounts = fuse::mounts()?;
    let mut all: Vec<Target> = mounts.iter().map(|mount| resolve(mount.mountpoint.display().to_string(), mount)).collect();
    // Detached from its path, or mounted where this process does not see it, and served all the same.
    let mut shown: Vec<u32> = Vec::new();
    // A disk with bind mounts is one disk, at the oldest of its places.
    all.retain(|target| {
        let Some(pid) = entry_of(target).map(|found| found.entry.pid) else { return true };
        let is_first = !shown.contains(&pid);
        shown.push(pid);
        is_first
    });
    for found in running::find_all() {
        if is_believed(found.owner) && !shown.contains(&found.entry.pid) && found.is_running() {
            let mountpoint = found.entry.mountpoint.clone();
            all.push(Target::Running(disk_of(mountpoint.display().to_string(), mountpoint, found)));
        }
    }
    all.sort_by_key(|target| (entry_of(target).is_none(), entry_of(target).map(|found| found.since)));
    Ok(all)
}

/// Whether whatever this user writes into an entry is believed.
fn is_believed(owner: u32) -> bool {
    owner == 0 || owner == rustix::process::geteuid().as_raw()
}

/// Whether what an entry says of its mountpoint counts: a user can write anything into an entry, and root would unmount it.
fn speaks_for(found: &Found, mounts: &[SeenMount]) -> bool {
    is_believed(found.owner) || mounts.iter().any(|mount| mount.user == Some(found.owner) && is_of(found, mount))
}

/// Whether a disk is mounted at `mountpoint` that may be one of the user `listener`, who says so.
pub(super) fn is_mounted_by(listener: Option<u32>, mountpoint: &Path) -> Result<bool> {
    let theirs = |mount: &SeenMount| mount.mountpoint == mountpoint && (listener.is_some_and(is_believed) || mount.user == listener);
    Ok(fuse::mounts()?.iter().any(theirs))
}

fn entry_of(target: &Target) -> Option<&Found> {
    match target {
        Target::Running(disk) => disk.found.as_ref(),
        Target::Dead(_) | Target::Unregistered(_) => None,
    }
}

/// Whether a mount is one of the disk of an entry: by its file system, since a directory above it may have been renamed.
fn is_of(found: &Found, mount: &SeenMount) -> bool {
    match &found.entry.filesystem {
        Some(device) => *device == mount.device,
        None => found.entry.is_at(&mount.mountpoint),
    }
}

/// Where the disk of an entry is mounted in this mount namespace, the oldest mount first.
///
/// # Errors
/// The list of mounts cannot be read.
pub(super) fn places_of(found: &Found) -> Result<Vec<PathBuf>> {
    let mut mounts = fuse::mounts()?;
    // Its file system has the number of one that has gone, perhaps that of this disk.
    mounts.retain(|mount| is_of(found, mount) && same_text(&found.entry.image, &mount.image));
    Ok(mounts.into_iter().map(|mount| mount.mountpoint).collect())
}

/// The absolute path of `target` without symbolic links, but for its last part, which is not looked at: it may be dead, or hang.
fn real(target: &Path) -> Option<PathBuf> {
    let absolute = std::path::absolute(target).ok()?;
    Some(absolute.parent()?.canonicalize().ok()?.join(absolute.file_name()?))
}

/// The mount that `target` names, or that a symbolic link of this name leads to.
fn mount_at<'a>(target: &Path, mounts: &'a [SeenMount]) -> Option<&'a SeenMount> {
    let at = |path: &Path| mounts.iter().find(|mount| mount.mountpoint == path);
    let path = real(target)?;
    if let Some(mount) = at(&path) {
        return Some(mount);
    }
    // readlink(2) asks nobody but the file system in which the link is.
    let leads_to = path.parent()?.join(path.read_link().ok()?);
    at(&real(&leads_to)?)
}

fn image_of<'a>(target: &Path, mounts: &'a [SeenMount]) -> Option<&'a SeenMount> {
    let path = target.canonicalize().ok()?;
    mounts.iter().find(|mount| mount.image == path)
}

/// Says where an image that is in use is mounted, if it is, and what to do: `advice` with `cordisk
/// COMMAND` for that mountpoint. Where a disk uses the file as one of its backing files, names that
/// disk. Any other error stays as it is. Asks no daemon.
pub fn explain_busy(error: Error, image: &Path, advice: &str, command: &str) -> Error {
    if error.kind() != ErrorKind::Busy {
        return error;
    }
    let Ok(path) = image.canonicalize() else { return error };
    let Some(found) = daemons_of(&path).next() else { return user_of_base(error) };
    let image = image.display();
    let text = match places_of(&found).unwrap_or_default().first() {
        Some(at) => {
            let at = super::show::quoted(at);
            format!("{image} is in use: it is mounted at {at}; {advice}: cordisk {command} {at}")
        }
        None => {
            let (at, why) = (super::show::quoted(&found.entry.mountpoint), super::closing::why_it_lives(&found));
            format!("{image} is in use: {why}; end it: cordisk umount --lazy {at}")
        }
    };
    Error::new(ErrorKind::Busy, text)
}

/// The daemons that serve `image` (without symbolic links), of those whose entries are believed.
pub(super) fn daemons_of(image: &Path) -> impl Iterator<Item = Found> + use<'_> {
    running::find_all().filter(move |found| is_believed(found.owner) && same_text(&found.entry.image, image) && found.is_running())
}

/// The error of a file that another process has open, with the disk that the process serves, if it
/// is one of ours.
fn user_of_base(error: Error) -> Error {
    let Some(pid) = error.cause::<InUse>().and_then(|in_use| in_use.holder.as_ref()).map(|holder| holder.pid) else { return error };
    let entry = find_all().unwrap_or_default().into_iter().find_map(|target| match target {
        Target::Running(disk) => disk.found.map(|found| found.entry).filter(|entry| entry.pid == pid),
        Target::Dead(_) | Target::Unregistered(_) => None,
    });
    let Some(entry) = entry else { return error };
    let (at, image) = (super::show::quoted(&entry.mountpoint), entry.image.display());
    let text = format!("{error}: that process serves the disk at {at}, for whose image {image} the file is a backing file");
    Error::new(ErrorKind::Busy, text)
}

/// Who serves a mount.
fn resolve(name: String, mount: &SeenMount) -> Target {
    // A user can write anything into an entry: it counts for that user's own mounts only.
    let believed = |found: &Found| is_believed(found.owner) || Some(found.owner) == mount.user;
    let known = running::find_all().filter(|found| is_of(found, mount) && believed(found));
    let mut known: Vec<Found> = known.take(MOST_KNOWN).collect();
    let had_entry = !known.is_empty();
    known.iter().filter(|found| !found.is_running()).for_each(Process::wait_for_the_killed);
    known.retain(Found::is_running);
    // Of several the one of this image, of those one that is believed everything (a mount may be root's for a user), and of those the newest: an older
    // one may have been detached, and still be served to those who have it open.
    known.sort_by_key(|found| (same_text(&found.entry.image, &mount.image), is_believed(found.owner), found.since));
    if let Some(found) = known.pop() {
        return Target::Running(disk_of(name, mount.mountpoint.clone(), found));
    }
    match fuse::life_of(&mount.mountpoint) {
        Life::Dead => Target::Dead(mount.clone()),
        Life::Unknown if had_entry => Target::Dead(mount.clone()),
        Life::Alive | Life::Unknown => Target::Unregistered(mount.clone()),
    }
}

fn disk_of(name: String, mountpoint: PathBuf, found: Found) -> Disk {
    Disk { name, socket: found.entry.qmp.clone(), mountpoint: Some(mountpoint), found: Some(found) }
}

/// Whether a path of an entry, which is text, is this one.
fn same_text(entry: &Path, path: &Path) -> bool {
    entry.to_string_lossy() == path.to_string_lossy()
}

/// Whether two paths lead to one file.
fn same(one: &Path, other: &Path) -> bool {
    one == other || one.canonicalize().ok().is_some_and(|one| other.canonicalize().ok() == Some(one))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::running::Entry;

    /// Protects: root does not unmount what any user says is a disk.
    #[test]
    fn an_entry_counts_for_mounts_of_its_own_user() {
        let entry = Entry {
            pid: 1,
            mountpoint: "/srv/data".into(),
            image: "/i".into(),
            device: "d".into(),
            qmp: "/s".into(),
            filesystem: None,
            metrics: None,
        };
        let me = rustix::process::geteuid().as_raw();
        let stranger = me + 4242;
        let found = |owner| Found::for_tests(entry.clone(), owner, tempfile::tempfile().unwrap());
        let mount = |mountpoint: &str, user| SeenMount {
            mountpoint: mountpoint.into(),
            image: "/i".into(),
            user: Some(user),
            device: "0:52".into(),
        };
        assert!(speaks_for(&found(me), &[]) && speaks_for(&found(0), &[]));
        assert!(speaks_for(&found(stranger), &[mount("/srv/data", stranger)]));
        for mounts in [vec![], vec![mount("/srv/data", 0)], vec![mount("/home/x", stranger)]] {
            assert!(!speaks_for(&found(stranger), &mounts), "{mounts:?}");
        }
        assert!(!is_mounted_by(Some(me), Path::new("/")).unwrap(), "a mount, and none of ours");
    }
}
