//! Finds the socket for a name that the user gives: a mountpoint or a socket. Also lists all disks.

use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use super::closing::{self, Process};
use crate::mount::{self, Life, SeenMount};
use crate::running::{self, Found};
use control::connection::{Connection, PATIENCE};
use host::error::{Context, InUse};
use host::{Error, ErrorKind, Result};

/// The hint in an error if no disk was found.
const LISTED: &str = "`cordisk status` lists those that run";

/// The most entries of one mountpoint that are read, those of this user first.
const MOST_KNOWN: usize = 100;

/// How long a command waits for the process that takes a disk over, whose serving process was
/// killed. That usually takes less than a tenth of a second.
const TAKEOVER: Duration = Duration::from_secs(2);
/// Time between two attempts.
const LOOK: Duration = Duration::from_millis(10);

/// A disk with a daemon that accepts connections.
#[derive(Debug)]
pub struct DiskHandle {
    /// The name as the user has given it.
    pub name: String,
    /// Its control socket.
    pub socket: PathBuf,
    /// The mountpoint, if known.
    pub mountpoint: Option<PathBuf>,
    /// The entry of its daemon, if it has one.
    pub found: Option<Found>,
}

impl DiskHandle {
    /// Connects to the daemon of the disk.
    ///
    /// # Errors
    /// Those of [`Connection::open`].
    pub fn connect(&self) -> Result<Connection> {
        self.connect_within(PATIENCE)
    }

    /// Connects as [`DiskHandle::connect`] does, with another time limit. If the serving process
    /// was killed and another one takes the disk over, waits for that one, at most for
    /// [`TAKEOVER`].
    ///
    /// # Errors
    /// Those of [`Connection::open`].
    pub fn connect_within(&self, patience: Duration) -> Result<Connection> {
        let stranger =
            self.found.as_ref().map(|found| found.owner).filter(|&owner| !is_believed(owner));
        let give_up = Instant::now() + TAKEOVER;
        loop {
            let connected = Connection::open_of(&self.socket, &self.name, patience, stranger);
            let Err(error) = connected else { return connected };
            // The socket refuses or is gone; or it has hung up, which has other reasons as well.
            let refuses = error.kind() == ErrorKind::NotFound;
            let may_return = refuses || matches!(error.kind(), ErrorKind::Busy | ErrorKind::Io);
            if !may_return || !self.is_taken_over() {
                return Err(error);
            }
            if Instant::now() >= give_up {
                return Err(if refuses { not_yet(&self.name) } else { error });
            }
            thread::sleep(LOOK);
        }
    }

    /// Tells whether another process may be about to take the disk over.
    fn is_taken_over(&self) -> bool {
        match &self.found {
            Some(found) => closing::has_keeper(found),
            None => {
                let is_of = |found: &Found| same(&found.entry.qmp, &self.socket);
                closing::one_is_starting()
                    || running::find_all().any(|found| is_of(&found) && closing::has_keeper(&found))
            }
        }
    }
}

/// The result of a search for a name.
#[derive(Debug)]
pub enum FoundDisk {
    /// A disk that is served.
    Running(DiskHandle),
    /// A mount that no process serves any more.
    Dead(SeenMount),
    /// A mount that is served, or may be, by a daemon without an entry that this user can find.
    Unregistered(SeenMount),
}

/// Finds the disk that `target` names: its mountpoint, a symbolic link to it, or its control
/// socket.
///
/// # Errors
/// There is no such disk; the error has a hint.
pub fn find(target: &Path) -> Result<FoundDisk> {
    let name = target.display().to_string();
    let mounts = mount::mounts()?;
    if let Some(mount) = mount_at(target, &mounts) {
        return Ok(resolve(name, mount));
    }
    // The disk was unmounted from there and is still served: its daemon is closing the image, or
    // another mount of the disk exists.
    let was_there = |found: &Found, path: &Path| {
        is_believed(found.owner) && found.entry.is_at(path) && found.is_running()
    };
    if let Some(path) = real(target)
        && let Some(found) = running::find_all().find(|found| was_there(found, &path))
    {
        return Ok(FoundDisk::Running(disk_of(name, path, found)));
    }
    // Nothing of ours is mounted there, so stat(2) cannot hang on a daemon of ours.
    if target.metadata().is_ok_and(|there| there.file_type().is_socket()) {
        let socket = std::path::absolute(target).context(|| name.clone())?;
        let says_so = |found: &Found| {
            speaks_for(found, &mounts) && same(&found.entry.qmp, &socket) && found.is_running()
        };
        let found = running::find_all().find(says_so);
        let mountpoint = found.as_ref().map(|found| {
            // Paths in an entry are UTF-8 text. The list of mounts has the exact bytes of the path,
            // which umount(2) needs.
            let mount = mounts
                .iter()
                .find(|mount| is_of(found, mount) && same_text(&found.entry.image, &mount.image));
            mount.map_or_else(|| found.entry.mountpoint.clone(), |mount| mount.mountpoint.clone())
        });
        return Ok(FoundDisk::Running(DiskHandle { name, socket, mountpoint, found }));
    }
    let hint = match image_of(target, &mounts) {
        Some(mount) => format!(
            "it is the image of the disk at {0}; name that: {0}",
            mount.mountpoint.display()
        ),
        None => LISTED.to_owned(),
    };
    Err(Error::new(ErrorKind::NotFound, format!("no cordisk disk is mounted at {name}; {hint}")))
}

/// Finds the disk as [`find`] does, and connects to its daemon.
///
/// # Errors
/// Those of [`find`]; or the disk is dead or cannot be reached. The error has a hint.
pub fn connect(target: &Path) -> Result<(Connection, DiskHandle)> {
    match find(target)? {
        FoundDisk::Running(disk) => Ok((disk.connect()?, disk)),
        FoundDisk::Dead(_) => Err(dead(target)),
        FoundDisk::Unregistered(_) => Err(unregistered(target)),
    }
}

/// Returns the error for a command about a dead disk.
pub(super) fn dead(target: &Path) -> Error {
    let text = format!(
        "the disk at {} is dead: its daemon was killed; mount it again with the same `cordisk mount`, or remove it: cordisk umount {}",
        target.display(),
        super::show::quoted(target)
    );
    Error::new(ErrorKind::NotFound, text)
}

/// Returns the error for a command about a disk whose next serving process does not serve yet.
fn not_yet(name: &str) -> Error {
    let text = format!(
        "{name}: its serving process was killed, and no other one has taken the disk over yet; try again, or look at its log"
    );
    Error::new(ErrorKind::Busy, text)
}

/// Returns the error for a command about a disk without an entry.
pub(super) fn unregistered(target: &Path) -> Error {
    let waits_for_another = |found: Found| !found.is_running() && closing::has_keeper(&found);
    if closing::one_is_starting() || running::find_all().any(waits_for_another) {
        return not_yet(&target.display().to_string());
    }
    let text = format!(
        "the disk at {} has no entry that this user can read: it belongs to another user, or its daemon could not be entered; \
         name its control socket (mount --qmp) instead of the mountpoint",
        target.display()
    );
    Error::new(ErrorKind::NotFound, text)
}

/// Returns all disks: the running ones in the order in which they were mounted, then mounts without
/// a known daemon.
///
/// # Errors
/// The list of mounts cannot be read.
pub fn find_all() -> Result<Vec<FoundDisk>> {
    let mounts = mount::mounts()?;
    let mut all: Vec<FoundDisk> =
        mounts.iter().map(|mount| resolve(mount.mountpoint.display().to_string(), mount)).collect();
    // Process ids of the daemons that are in `all`. The last loop adds daemons that still serve
    // although their disk was detached from its path, or is mounted where this process does not see
    // it.
    let mut shown: Vec<u32> = Vec::new();
    // A disk with bind mounts is listed once, at the oldest of its places.
    all.retain(|target| {
        let Some(pid) = entry_of(target).map(|found| found.entry.pid) else { return true };
        let is_first = !shown.contains(&pid);
        shown.push(pid);
        is_first
    });
    for found in running::find_all() {
        if is_believed(found.owner) && !shown.contains(&found.entry.pid) && found.is_running() {
            let mountpoint = found.entry.mountpoint.clone();
            all.push(FoundDisk::Running(disk_of(
                mountpoint.display().to_string(),
                mountpoint,
                found,
            )));
        }
    }
    all.sort_by_key(|target| {
        (entry_of(target).is_none(), entry_of(target).map(|found| found.since))
    });
    Ok(all)
}

/// Tells whether entries of this user are trusted entirely.
fn is_believed(owner: u32) -> bool {
    owner == 0 || owner == rustix::process::geteuid().as_raw()
}

/// Tells whether the mountpoint in an entry is trusted. A user can write any text into an entry,
/// and root would unmount that path.
fn speaks_for(found: &Found, mounts: &[SeenMount]) -> bool {
    is_believed(found.owner)
        || mounts.iter().any(|mount| mount.user == Some(found.owner) && is_of(found, mount))
}

/// Tells whether a disk is mounted at `mountpoint` that may belong to the user `listener`, whose
/// daemon has claimed that path.
pub(super) fn is_mounted_by(listener: Option<u32>, mountpoint: &Path) -> Result<bool> {
    let theirs = |mount: &SeenMount| {
        mount.mountpoint == mountpoint
            && (listener.is_some_and(is_believed) || mount.user == listener)
    };
    Ok(mount::mounts()?.iter().any(theirs))
}

fn entry_of(target: &FoundDisk) -> Option<&Found> {
    match target {
        FoundDisk::Running(disk) => disk.found.as_ref(),
        FoundDisk::Dead(_) | FoundDisk::Unregistered(_) => None,
    }
}

/// Tells whether a mount is one of the entry's disk. It is compared by file system, because a
/// directory above the mountpoint may have been renamed.
fn is_of(found: &Found, mount: &SeenMount) -> bool {
    match &found.entry.filesystem {
        Some(device) => *device == mount.device,
        None => found.entry.is_at(&mount.mountpoint),
    }
}

/// Returns the places where the disk of an entry is mounted in this mount namespace, the oldest
/// first.
///
/// # Errors
/// The list of mounts cannot be read.
pub(super) fn places_of(found: &Found) -> Result<Vec<PathBuf>> {
    let mut mounts = mount::mounts()?;
    // The image is compared as well: the kernel reuses device numbers, so another disk may have
    // that of this one.
    mounts.retain(|mount| is_of(found, mount) && same_text(&found.entry.image, &mount.image));
    Ok(mounts.into_iter().map(|mount| mount.mountpoint).collect())
}

/// Returns the absolute path of `target` without symbolic links. The last part is not resolved,
/// because the mount may be dead or hang.
fn real(target: &Path) -> Option<PathBuf> {
    let absolute = std::path::absolute(target).ok()?;
    Some(absolute.parent()?.canonicalize().ok()?.join(absolute.file_name()?))
}

/// Returns the mount that `target` names, directly or as a symbolic link.
fn mount_at<'a>(target: &Path, mounts: &'a [SeenMount]) -> Option<&'a SeenMount> {
    let at = |path: &Path| mounts.iter().find(|mount| mount.mountpoint == path);
    let path = real(target)?;
    if let Some(mount) = at(&path) {
        return Some(mount);
    }
    // readlink(2) concerns only the file system that contains the link.
    let leads_to = path.parent()?.join(path.read_link().ok()?);
    at(&real(&leads_to)?)
}

fn image_of<'a>(target: &Path, mounts: &'a [SeenMount]) -> Option<&'a SeenMount> {
    let path = target.canonicalize().ok()?;
    mounts.iter().find(|mount| mount.image == path)
}

/// Adds to a "busy" error the mountpoint of the image and a hint: `advice` with `cordisk COMMAND`
/// for that mountpoint. If a disk uses the file as one of its backing files, names that disk. Any
/// other error is returned unchanged. Contacts no daemon.
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
            let (at, why) = (
                super::show::quoted(&found.entry.mountpoint),
                super::closing::why_it_lives(&found),
            );
            format!("{image} is in use: {why}; end it: cordisk umount --lazy {at}")
        }
    };
    Error::new(ErrorKind::Busy, text)
}

/// Returns the daemons that serve `image` (a path without symbolic links), from trusted entries
/// only.
pub(super) fn daemons_of(image: &Path) -> impl Iterator<Item = Found> + use<'_> {
    running::find_all().filter(move |found| {
        is_believed(found.owner) && same_text(&found.entry.image, image) && found.is_running()
    })
}

/// Completes the error about a file that another process has open. If that process is one of our
/// daemons, the error names the disk that it serves.
fn user_of_base(error: Error) -> Error {
    let Some(pid) =
        error.cause::<InUse>().and_then(|in_use| in_use.holder.as_ref()).map(|holder| holder.pid)
    else {
        return error;
    };
    let entry = find_all().unwrap_or_default().into_iter().find_map(|target| match target {
        FoundDisk::Running(disk) => {
            disk.found.map(|found| found.entry).filter(|entry| entry.serving() == pid)
        }
        FoundDisk::Dead(_) | FoundDisk::Unregistered(_) => None,
    });
    let Some(entry) = entry else { return error };
    let (at, image) = (super::show::quoted(&entry.mountpoint), entry.image.display());
    let text = format!(
        "{error}: that process serves the disk at {at}, for whose image {image} the file is a backing file"
    );
    Error::new(ErrorKind::Busy, text)
}

/// Finds the daemon of a mount.
fn resolve(name: String, mount: &SeenMount) -> FoundDisk {
    let known = entries_of(mount);
    let had_entry = !known.is_empty();
    let may_return = known.iter().any(|found| !found.is_running() && closing::has_keeper(found));
    known.iter().filter(|found| !found.is_running()).for_each(Process::wait_for_the_killed);
    if let Some(found) = newest_running(known, mount) {
        return FoundDisk::Running(disk_of(name, mount.mountpoint.clone(), found));
    }
    // A disk that is taken over answers when the next process serves, whose entry is there by then.
    let life = mount::life_of(&mount.mountpoint);
    if life != Life::Dead
        && let Some(found) = awaited(mount, life, may_return)
    {
        return FoundDisk::Running(disk_of(name, mount.mountpoint.clone(), found));
    }
    match life {
        Life::Dead => FoundDisk::Dead(mount.clone()),
        Life::Unknown if had_entry => FoundDisk::Dead(mount.clone()),
        Life::Alive | Life::Unknown => FoundDisk::Unregistered(mount.clone()),
    }
}

/// Looks for the entry of a running daemon once more. If this user may not ask the mount, which so
/// does not tell when it is served, waits for the entry while another process may take the disk
/// over, at most for [`TAKEOVER`].
fn awaited(mount: &SeenMount, life: Life, may_return: bool) -> Option<Found> {
    let give_up = Instant::now() + TAKEOVER;
    loop {
        let found = newest_running(entries_of(mount), mount);
        let may_come = life == Life::Unknown && (may_return || closing::one_is_starting());
        if found.is_some() || !may_come || Instant::now() >= give_up {
            return found;
        }
        thread::sleep(LOOK);
    }
}

/// Returns the entries of a mount, of running and of dead daemons.
fn entries_of(mount: &SeenMount) -> Vec<Found> {
    // A user can write any text into an entry, so an entry counts only for that user's own mounts.
    let believed = |found: &Found| is_believed(found.owner) || Some(found.owner) == mount.user;
    let known = running::find_all().filter(|found| is_of(found, mount) && believed(found));
    known.take(MOST_KNOWN).collect()
}

/// Returns the entry of the running daemon that serves a mount, out of those that may.
fn newest_running(mut known: Vec<Found>, mount: &SeenMount) -> Option<Found> {
    known.retain(Found::is_running);
    // The order of preference is: an entry of this image, then an entry that is trusted entirely
    // (root may have mounted for a user), then the newest. An older disk may have been detached and
    // still be served to programs that have it open.
    known.sort_by_key(|found| {
        (same_text(&found.entry.image, &mount.image), is_believed(found.owner), found.since)
    });
    known.pop()
}

fn disk_of(name: String, mountpoint: PathBuf, found: Found) -> DiskHandle {
    DiskHandle {
        name,
        socket: found.entry.qmp.clone(),
        mountpoint: Some(mountpoint),
        found: Some(found),
    }
}

/// Tells whether a path in an entry, which is UTF-8 text, is `path`.
fn same_text(entry: &Path, path: &Path) -> bool {
    entry.to_string_lossy() == path.to_string_lossy()
}

/// Tells whether two paths lead to one file.
fn same(one: &Path, other: &Path) -> bool {
    one == other
        || one.canonicalize().ok().is_some_and(|one| other.canonicalize().ok() == Some(one))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::running::Entry;

    /// Protects: root does not unmount a path because some user's entry claims that it is a disk.
    #[test]
    fn an_entry_counts_for_mounts_of_its_own_user() {
        let entry = Entry {
            pid: 1,
            serving: None,
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
