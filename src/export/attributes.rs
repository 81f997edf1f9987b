//! The attributes that stat(2) shows and that chmod, chown and utimensat may change. They are kept
//! in memory and lost at unmount. [`ShownAttributes`] passes them to a process that takes the
//! session over.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicI64, Ordering};
use std::time::{Duration, SystemTime};

use parking_lot::Mutex;
use rustix::io::Errno;
use serde::{Deserialize, Serialize};

/// Permission bits that a chmod without `--allow-other` may not set: no other user can open the
/// disk, so its mode must not suggest otherwise.
const OTHERS: u32 = 0o077;
/// The bits set-user-id, set-group-id and sticky, which have no meaning for a disk.
const SPECIAL: u32 = 0o7000;
/// The write permissions of owner, group and others.
const WRITE: u32 = 0o222;
/// File type bits of a mode as the kernel sends it (S_IFMT).
const TYPE: u32 = 0o170_000;

/// A point in time that a client asks for.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum TimeChange {
    /// The time of the change.
    Now,
    /// A given time.
    At(SystemTime),
}

/// The changes of attributes that a client asks for, besides the size.
#[derive(Clone, Copy, Debug, Default)]
pub struct AttributeChanges {
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
pub struct FileTimes {
    /// Last access, as set at the start or by a client; reads do not change it.
    pub atime: SystemTime,
    /// Last write.
    pub mtime: SystemTime,
    /// Last change of content or attributes.
    pub ctime: SystemTime,
}

/// What stat(2) shows, in a form that another process can read. Times are nanoseconds since 1970.
#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(deny_unknown_fields)]
pub struct ShownAttributes {
    /// Permission bits.
    pub mode: u16,
    /// User id.
    pub uid: u32,
    /// Group id.
    pub gid: u32,
    /// Last access.
    pub atime: i64,
    /// Last write.
    pub mtime: i64,
    /// Last change of content or attributes.
    pub ctime: i64,
}

/// Called after each chmod, chown and utimensat.
struct AttributesListener(Box<dyn Fn(&ShownAttributes) + Send + Sync>);

impl std::fmt::Debug for AttributesListener {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("AttributesListener")
    }
}

/// The attributes of the disk's file. FileTimes are nanoseconds since 1970. Each is an atomic of
/// its own, because every write changes two of them.
#[derive(Debug)]
pub(super) struct Attributes {
    owner: Mutex<Owner>,
    atime: AtomicI64,
    mtime: AtomicI64,
    ctime: AtomicI64,
    allow_other: bool,
    read_only: bool,
    listener: OnceLock<AttributesListener>,
}

impl Attributes {
    /// Makes attributes with mode 0600, or 0400 if read-only, and the given owner. All times are
    /// `modified`.
    pub(super) fn new(
        uid: u32,
        gid: u32,
        modified: SystemTime,
        allow_other: bool,
        read_only: bool,
    ) -> Self {
        let modified = to_nanoseconds(modified);
        Attributes {
            owner: Mutex::new(Owner { mode: if read_only { 0o400 } else { 0o600 }, uid, gid }),
            atime: AtomicI64::new(modified),
            mtime: AtomicI64::new(modified),
            ctime: AtomicI64::new(modified),
            allow_other,
            read_only,
            listener: OnceLock::new(),
        }
    }

    /// Calls `listener` after each later change by chmod, chown and utimensat. It runs while the
    /// lock of the owner is held, so that the calls come in the order of the changes. Only the
    /// first listener counts.
    pub(super) fn tell(&self, listener: impl Fn(&ShownAttributes) + Send + Sync + 'static) {
        let _ = self.listener.set(AttributesListener(Box::new(listener)));
    }

    /// Returns the attributes of this moment.
    pub(super) fn shown(&self) -> ShownAttributes {
        self.shown_of(&self.owner.lock())
    }

    fn shown_of(&self, owner: &Owner) -> ShownAttributes {
        let load = |time: &AtomicI64| time.load(Ordering::Relaxed);
        ShownAttributes {
            mode: owner.mode,
            uid: owner.uid,
            gid: owner.gid,
            atime: load(&self.atime),
            mtime: load(&self.mtime),
            ctime: load(&self.ctime),
        }
    }

    /// Continues with the attributes that an earlier process has shown. If the file was written
    /// after they were recorded, its own time counts as the last write and the last change.
    pub(super) fn restore(&self, shown: &ShownAttributes) {
        let kept = if self.read_only { !WRITE as u16 } else { u16::MAX };
        let mut owner = self.owner.lock();
        *owner = Owner { mode: shown.mode & 0o777 & kept, uid: shown.uid, gid: shown.gid };
        self.atime.store(shown.atime, Ordering::Relaxed);
        if self.mtime.load(Ordering::Relaxed) <= shown.ctime {
            self.mtime.store(shown.mtime, Ordering::Relaxed);
            self.ctime.store(shown.ctime, Ordering::Relaxed);
        }
    }

    /// Sets the mode that `--mode` asks for. A read-only disk gets no write permission in any case.
    pub(super) fn set_mode(&mut self, mode: u16) {
        let kept = if self.read_only { !WRITE as u16 } else { u16::MAX };
        self.owner.get_mut().mode = mode & 0o777 & kept;
    }

    pub(super) fn owner(&self) -> Owner {
        *self.owner.lock()
    }

    pub(super) fn times(&self) -> FileTimes {
        let load = |time: &AtomicI64| from_nanoseconds(time.load(Ordering::Relaxed));
        FileTimes { atime: load(&self.atime), mtime: load(&self.mtime), ctime: load(&self.ctime) }
    }

    /// Records that the content has changed now.
    pub(super) fn touch(&self) {
        let now = to_nanoseconds(SystemTime::now());
        self.mtime.store(now, Ordering::Relaxed);
        self.ctime.store(now, Ordering::Relaxed);
    }

    /// Applies all of `changes` or none of them. The kernel checks whether the caller may make them
    /// (`default_permissions`).
    ///
    /// # Errors
    /// EROFS for a write permission on a read-only disk. EPERM for permissions of other users
    /// without `--allow-other`, and for bits without a meaning here. EOPNOTSUPP for another owner
    /// without `--allow-other`.
    pub(super) fn change(&self, changes: &AttributeChanges) -> Result<(), Errno> {
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

        let now = SystemTime::now();
        let set = |time: &AtomicI64, change: Option<TimeChange>| match change {
            Some(TimeChange::Now) => time.store(to_nanoseconds(now), Ordering::Relaxed),
            Some(TimeChange::At(at)) => time.store(to_nanoseconds(at), Ordering::Relaxed),
            None => {}
        };
        set(&self.atime, changes.atime);
        set(&self.mtime, changes.mtime);
        set(&self.ctime, Some(TimeChange::Now));
        if let Some(AttributesListener(listener)) = self.listener.get() {
            listener(&self.shown_of(&owner));
        }
        Ok(())
    }
}

/// Converts to nanoseconds since 1970, saturating. The range, from 1677 to 2262, suffices for a
/// disk.
fn to_nanoseconds(time: SystemTime) -> i64 {
    match time.duration_since(SystemTime::UNIX_EPOCH) {
        Ok(after) => i64::try_from(after.as_nanos()).unwrap_or(i64::MAX),
        Err(before) => {
            i64::try_from(before.duration().as_nanos()).map_or(i64::MIN, |nanoseconds| -nanoseconds)
        }
    }
}

fn from_nanoseconds(nanoseconds: i64) -> SystemTime {
    let distance = Duration::from_nanos(nanoseconds.unsigned_abs());
    // Neither operation can overflow: SystemTime has 64 bits of seconds.
    if nanoseconds < 0 {
        SystemTime::UNIX_EPOCH - distance
    } else {
        SystemTime::UNIX_EPOCH + distance
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn attributes(allow_other: bool, read_only: bool) -> Attributes {
        Attributes::new(
            7,
            8,
            SystemTime::UNIX_EPOCH + Duration::from_secs(1_000),
            allow_other,
            read_only,
        )
    }

    fn mode(mode: u32) -> AttributeChanges {
        AttributeChanges { mode: Some(mode), ..AttributeChanges::default() }
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
        let other = AttributeChanges { uid: Some(9), ..AttributeChanges::default() };
        assert_eq!(attributes(false, false).change(&other), Err(Errno::OPNOTSUPP));
        assert_eq!(
            attributes(false, false).change(&AttributeChanges {
                uid: Some(7),
                gid: Some(8),
                ..AttributeChanges::default()
            }),
            Ok(())
        );
        let shared = attributes(true, false);
        assert_eq!(shared.change(&other), Ok(()));
        assert_eq!(shared.owner().uid, 9);
    }

    #[test]
    fn a_refused_change_changes_nothing() {
        let private = attributes(false, false);
        let times = private.times();
        let both = AttributeChanges {
            mode: Some(0o400),
            uid: Some(9),
            mtime: Some(TimeChange::Now),
            ..AttributeChanges::default()
        };
        assert_eq!(private.change(&both), Err(Errno::OPNOTSUPP));
        assert_eq!((private.owner().mode, private.times()), (0o600, times));
    }

    #[test]
    fn times_survive_the_round_trip_and_saturate() {
        for time in [
            SystemTime::UNIX_EPOCH - Duration::new(5, 250),
            SystemTime::UNIX_EPOCH + Duration::new(9, 999_999_999),
        ] {
            assert_eq!(from_nanoseconds(to_nanoseconds(time)), time);
        }
        let far = SystemTime::UNIX_EPOCH + Duration::from_secs(1 << 40);
        assert_eq!(to_nanoseconds(far), i64::MAX);
        assert_eq!(to_nanoseconds(SystemTime::UNIX_EPOCH - Duration::from_secs(1 << 40)), i64::MIN);
        let _ = from_nanoseconds(i64::MIN);

        let shared = attributes(false, false);
        let before = shared.times();
        shared
            .change(&AttributeChanges {
                mtime: Some(TimeChange::At(far)),
                ..AttributeChanges::default()
            })
            .unwrap();
        assert_eq!(shared.times().atime, before.atime);
        assert!(shared.times().mtime > before.mtime);
        shared.touch();
        assert!(shared.times().mtime < far);
    }
    /// Protects: a process that takes the session over shows what the earlier one has shown,
    /// including changes by chmod, chown and utimensat, of which the listener was told in order.
    #[test]
    fn a_successor_shows_what_was_changed() {
        let first = attributes(true, false);
        let (told, changes) = crossbeam_channel::unbounded();
        first.tell(move |shown| told.send(*shown).unwrap());
        first.change(&mode(0o640)).unwrap();
        let old = SystemTime::UNIX_EPOCH + Duration::from_secs(5);
        let change = AttributeChanges {
            uid: Some(70),
            gid: Some(80),
            mtime: Some(TimeChange::At(old)),
            ..AttributeChanges::default()
        };
        first.change(&change).unwrap();
        first.change(&mode(0o4640)).unwrap_err();
        let told: Vec<_> = changes.try_iter().collect();
        assert_eq!((told.len(), told[0].mode, told[0].uid), (2, 0o640, 7));
        assert_eq!(told[1], first.shown());

        let text = serde_json::to_string(&told[1]).unwrap();
        let successor = attributes(true, false);
        successor.restore(&serde_json::from_str(&text).unwrap());
        assert_eq!(successor.owner(), Owner { mode: 0o640, uid: 70, gid: 80 });
        assert_eq!((successor.times(), successor.times().mtime), (first.times(), old));
    }

    /// Protects: writes after the last change of attributes are not hidden by it, and no record
    /// makes a read-only disk look writable.
    #[test]
    fn a_successor_shows_the_time_of_later_writes() {
        let shown =
            ShownAttributes { atime: 3, mtime: 1, ctime: 2, ..attributes(true, true).shown() };
        let successor = attributes(true, true);
        successor.restore(&ShownAttributes { mode: 0o666, ..shown });
        assert_eq!(successor.owner().mode, 0o444);
        let written = attributes(true, true).times().mtime;
        let times = successor.times();
        assert_eq!((times.mtime, times.ctime), (written, written));
        assert_eq!(times.atime, from_nanoseconds(3));
    }
}
