//! What stat(2) shows and chmod, chown and utimensat may change: kept in memory, gone at unmount.

use std::sync::atomic::{AtomicI64, Ordering};
use std::time::{Duration, SystemTime};

use parking_lot::Mutex;
use rustix::io::Errno;

/// Permission bits that a chmod without `--allow-other` may not set: nobody else can open the disk, so it must not look as if.
const OTHERS: u32 = 0o077;
/// Set-user-id, set-group-id and sticky: without meaning for a disk.
const SPECIAL: u32 = 0o7000;
/// All three write permissions.
const WRITE: u32 = 0o222;
/// File type bits of a mode as the kernel sends it (S_IFMT).
const TYPE: u32 = 0o170_000;

/// A point in time as a client asks for it.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum TimeChange {
    /// The time of the change.
    Now,
    /// A given time.
    At(SystemTime),
}

/// What a client asks to change of the attributes, besides the size.
#[derive(Clone, Copy, Debug, Default)]
pub struct Changes {
    /// New mode; file type bits are ignored.
    pub mode: Option<u32>,
    /// New owner.
    pub uid: Option<u32>,
    /// New group.
    pub gid: Option<u32>,
    /// New access time.
    pub atime: Option<TimeChange>,
    /// New modification time.
    pub mtime: Option<TimeChange>,
}

/// Permissions and owner.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Owner {
    /// Permission bits.
    pub mode: u16,
    /// User id.
    pub uid: u32,
    /// Group id.
    pub gid: u32,
}

/// Access, modification and change time.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Times {
    /// Last access, as set at the start or by a client: reads do not move it.
    pub atime: SystemTime,
    /// Last write.
    pub mtime: SystemTime,
    /// Last change of anything.
    pub ctime: SystemTime,
}

/// The attributes. Times are nanoseconds since 1970, each on its own, because every write moves two of them.
#[derive(Debug)]
pub(super) struct Attributes {
    owner: Mutex<Owner>,
    atime: AtomicI64,
    mtime: AtomicI64,
    ctime: AtomicI64,
    allow_other: bool,
    read_only: bool,
}

impl Attributes {
    /// Mode 0600, or 0400 when read-only, the owner given; all times are `modified`.
    pub(super) fn new(uid: u32, gid: u32, modified: SystemTime, allow_other: bool, read_only: bool) -> Self {
        let modified = to_nanoseconds(modified);
        Attributes {
            owner: Mutex::new(Owner { mode: if read_only { 0o400 } else { 0o600 }, uid, gid }),
            atime: AtomicI64::new(modified),
            mtime: AtomicI64::new(modified),
            ctime: AtomicI64::new(modified),
            allow_other,
            read_only,
        }
    }

    /// The mode that `--mode` asks for. A read-only disk has no write permission, whatever it says.
    pub(super) fn set_mode(&mut self, mode: u16) {
        let kept = if self.read_only { !WRITE as u16 } else { u16::MAX };
        self.owner.get_mut().mode = mode & 0o777 & kept;
    }

    pub(super) fn owner(&self) -> Owner {
        *self.owner.lock()
    }

    pub(super) fn times(&self) -> Times {
        let load = |time: &AtomicI64| from_nanoseconds(time.load(Ordering::Relaxed));
        Times { atime: load(&self.atime), mtime: load(&self.mtime), ctime: load(&self.ctime) }
    }

    /// The content has changed now.
    pub(super) fn touch(&self) {
        let now = to_nanoseconds(SystemTime::now());
        self.mtime.store(now, Ordering::Relaxed);
        self.ctime.store(now, Ordering::Relaxed);
    }

    /// Applies `changes`, all of them or none. Who may change is the kernel's check (`default_permissions`).
    ///
    /// # Errors
    /// EROFS for a write permission on a read-only disk. EPERM for permissions of others without `--allow-other`, and for bits without a
    /// meaning here. EOPNOTSUPP for another owner without `--allow-other`.
    pub(super) fn change(&self, changes: &Changes) -> Result<(), Errno> {
        let mut owner = self.owner.lock();
        let mut wanted = *owner;
        if let Some(mode) = changes.mode.map(|mode| mode & !TYPE) {
            if self.read_only && mode & WRITE != 0 {
                return Err(Errno::ROFS);
            }
            if mode & SPECIAL != 0 || (!self.allow_other && mode & OTHERS != 0) {
                return Err(Errno::PERM);
            }
            wanted.mode = (mode & 0o777) as u16;
        }
        wanted.uid = changes.uid.unwrap_or(owner.uid);
        wanted.gid = changes.gid.unwrap_or(owner.gid);
        if !self.allow_other && (wanted.uid, wanted.gid) != (owner.uid, owner.gid) {
            return Err(Errno::OPNOTSUPP);
        }
        *owner = wanted;
        drop(owner);

        let now = SystemTime::now();
        let set = |time: &AtomicI64, change: Option<TimeChange>| match change {
            Some(TimeChange::Now) => time.store(to_nanoseconds(now), Ordering::Relaxed),
            Some(TimeChange::At(at)) => time.store(to_nanoseconds(at), Ordering::Relaxed),
            None => {}
        };
        set(&self.atime, changes.atime);
        set(&self.mtime, changes.mtime);
        set(&self.ctime, Some(TimeChange::Now));
        Ok(())
    }
}

/// Nanoseconds since 1970, saturating: 1677 to 2262 is enough for a disk.
fn to_nanoseconds(time: SystemTime) -> i64 {
    match time.duration_since(SystemTime::UNIX_EPOCH) {
        Ok(after) => i64::try_from(after.as_nanos()).unwrap_or(i64::MAX),
        Err(before) => i64::try_from(before.duration().as_nanos()).map_or(i64::MIN, |nanoseconds| -nanoseconds),
    }
}

fn from_nanoseconds(nanoseconds: i64) -> SystemTime {
    let distance = Duration::from_nanos(nanoseconds.unsigned_abs());
    // Neither can overflow: SystemTime has 64 bits of seconds.
    if nanoseconds < 0 { SystemTime::UNIX_EPOCH - distance } else { SystemTime::UNIX_EPOCH + distance }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn attributes(allow_other: bool, read_only: bool) -> Attributes {
        Attributes::new(7, 8, SystemTime::UNIX_EPOCH + Duration::from_secs(1_000), allow_other, read_only)
    }

    fn mode(mode: u32) -> Changes {
        Changes { mode: Some(mode), ..Changes::default() }
    }

    #[test]
    fn the_mode_follows_the_operation_table() {
        let private = attributes(false, false);
        assert_eq!(private.owner(), Owner { mode: 0o600, uid: 7, gid: 8 });
        assert_eq!(private.change(&mode(0o100_644)), Err(Errno::PERM));
        assert_eq!(private.change(&mode(0o4600)), Err(Errno::PERM));
        assert_eq!(private.change(&mode(0o100_400)), Ok(()));
        assert_eq!(private.owner().mode, 0o400);
        assert_eq!(attributes(true, false).change(&mode(0o666)), Ok(()));
        let read_only = attributes(true, true);
        assert_eq!(read_only.owner().mode, 0o400);
        assert_eq!(read_only.change(&mode(0o600)), Err(Errno::ROFS));
        assert_eq!(read_only.change(&mode(0o444)), Ok(()));
    }

    #[test]
    fn a_mode_that_was_asked_for_gives_no_right_to_write_a_read_only_disk() {
        let mut shared = attributes(true, false);
        shared.set_mode(0o660);
        assert_eq!(shared.owner().mode, 0o660);
        let mut read_only = attributes(true, true);
        read_only.set_mode(0o664);
        assert_eq!(read_only.owner().mode, 0o444);
    }

    #[test]
    fn owners_change_only_where_others_may_look() {
        let other = Changes { uid: Some(9), ..Changes::default() };
        assert_eq!(attributes(false, false).change(&other), Err(Errno::OPNOTSUPP));
        assert_eq!(attributes(false, false).change(&Changes { uid: Some(7), gid: Some(8), ..Changes::default() }), Ok(()));
        let shared = attributes(true, false);
        assert_eq!(shared.change(&other), Ok(()));
        assert_eq!(shared.owner().uid, 9);
    }

    #[test]
    fn a_refused_change_changes_nothing() {
        let private = attributes(false, false);
        let times = private.times();
        let both = Changes { mode: Some(0o400), uid: Some(9), mtime: Some(TimeChange::Now), ..Changes::default() };
        assert_eq!(private.change(&both), Err(Errno::OPNOTSUPP));
        assert_eq!((private.owner().mode, private.times()), (0o600, times));
    }

    #[test]
    fn times_survive_the_round_trip_and_saturate() {
        for time in [SystemTime::UNIX_EPOCH - Duration::new(5, 250), SystemTime::UNIX_EPOCH + Duration::new(9, 999_999_999)] {
            assert_eq!(from_nanoseconds(to_nanoseconds(time)), time);
        }
        let far = SystemTime::UNIX_EPOCH + Duration::from_secs(1 << 40);
        assert_eq!(to_nanoseconds(far), i64::MAX);
        assert_eq!(to_nanoseconds(SystemTime::UNIX_EPOCH - Duration::from_secs(1 << 40)), i64::MIN);
        let _ = from_nanoseconds(i64::MIN);

        let shared = attributes(false, false);
        let before = shared.times();
        shared.change(&Changes { mtime: Some(TimeChange::At(far)), ..Changes::default() }).unwrap();
        assert_eq!(shared.times().atime, before.atime);
        assert!(shared.times().mtime > before.mtime);
        shared.touch();
        assert!(shared.times().mtime < far);
    }
}
