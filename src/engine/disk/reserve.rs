//! The free space of the host that copy-on-read leaves alone, so that a guest that only reads
//! cannot fill the host's file system.
//!
//! Only copies made by reads are subject to the reserve. A guest write needs its space in any case.
//! A stream was requested explicitly, and its `on-error` policy says what happens when there is no
//! space.
//!
//! **Never:** consulted for a read that the overlay answers. **Locks:** a leaf, which is released
//! before the host is asked.

use std::time::{Duration, Instant};

use host::storage::{HostSpace, Storage};
use host::sync::{Mutex, rank};

/// Copied bytes after which the host is asked again. Fewer if less than this was free above the
/// reserve.
const ASK_AFTER: u64 = 64 << 20;

/// Time after which the host is asked again, because other programs also use and free its space.
const ASK_AGAIN: Duration = Duration::from_secs(1);

/// Default reserve in bytes, if that is less than one [`DEFAULT_PART`]th of the file system.
const DEFAULT_RESERVE: u64 = 1 << 30;
/// One twentieth of the file system (5 %), the default reserve of a small one.
const DEFAULT_PART: u64 = 20;

/// The number of bytes to leave free, and whether more than that is free.
#[derive(Debug)]
pub(super) struct Reserve {
    /// Bytes to leave free. `None` is the default, which depends on the size of the file system.
    wanted: Option<u64>,
    state: Mutex<{ rank::LEAF }, ReserveState>,
}

#[derive(Debug, Default)]
struct ReserveState {
    asked: Option<Instant>,
    /// Bytes that may be copied before the host is asked again.
    left: u64,
    stopped: bool,
}

/// How the last answer of the host has changed the state.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Change {
    None,
    Stopped,
    GoesOn,
}

impl Reserve {
    /// Leaves `wanted` bytes free; by default the smaller of 1 GiB and 5 % of the file system.
    pub fn new(wanted: Option<u64>) -> Reserve {
        Reserve { wanted, state: Mutex::default() }
    }

    /// Whether a read may copy up the clusters that it misses. Always `true` if the host does not
    /// report its free space.
    pub fn allows(&self, overlay: &dyn Storage) -> bool {
        if self.wanted == Some(0) {
            return true;
        }
        if let Some(known) = self.known(Instant::now()) {
            return known;
        }
        let space = overlay.space().unwrap_or_else(|error| {
            log::debug!("free space of the overlay's file system: {error}");
            None
        });
        let reserve = space.map_or(0, |space| self.bytes(space));
        let free = space.map_or(u64::MAX, |space| space.free);
        match self.answered(free, reserve) {
            Change::Stopped => log::warn!(
                "copy-on-read stops, reads are answered from below: {free} bytes are free where the overlay lies, {reserve} are to stay free"
            ),
            Change::GoesOn => {
                log::warn!("copy-on-read goes on: {free} bytes are free where the overlay lies")
            }
            Change::None => {}
        }
        free >= reserve
    }

    /// Whether reads do not copy up because too little space is free. Asks the host again if its
    /// answer is old, so that space freed since then counts.
    pub fn has_stopped(&self, overlay: &dyn Storage) -> bool {
        let stopped = self.state.lock().stopped;
        stopped && !self.allows(overlay)
    }

    /// Records that a read has copied up `bytes`.
    pub fn copied(&self, bytes: u64) {
        let mut state = self.state.lock();
        state.left = state.left.saturating_sub(bytes);
    }

    fn bytes(&self, space: HostSpace) -> u64 {
        self.wanted.unwrap_or_else(|| DEFAULT_RESERVE.min(space.total / DEFAULT_PART))
    }

    /// The last answer, as long as it is recent enough. `None` makes this caller ask the host;
    /// other threads use the last answer meanwhile.
    fn known(&self, now: Instant) -> Option<bool> {
        let mut state = self.state.lock();
        let old = state.asked.is_none_or(|asked| now.saturating_duration_since(asked) >= ASK_AGAIN);
        if !old && (state.stopped || state.left > 0) {
            return Some(!state.stopped);
        }
        state.asked = Some(now);
        state.left = ASK_AFTER;
        None
    }

    fn answered(&self, free: u64, reserve: u64) -> Change {
        let mut state = self.state.lock();
        let before = std::mem::replace(&mut state.stopped, free < reserve);
        state.left = ASK_AFTER.min(free.saturating_sub(reserve));
        match (before, state.stopped) {
            (false, true) => Change::Stopped,
            (true, false) => Change::GoesOn,
            _ => Change::None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use host::storage::{Access, FileStorage};

    const MIB: u64 = 1 << 20;

    #[test]
    fn the_default_is_a_twentieth_of_the_file_system_and_a_gibibyte_at_most() {
        let reserve = Reserve::new(None);
        assert_eq!(reserve.bytes(HostSpace { free: 0, total: 64 * MIB }), 64 * MIB / 20);
        assert_eq!(reserve.bytes(HostSpace { free: 0, total: 1 << 40 }), 1 << 30);
        assert_eq!(Reserve::new(Some(5)).bytes(HostSpace { free: 0, total: 1 << 40 }), 5);
    }

    /// Protects: the host is asked at four moments only. They are the first read, the use of all
    /// space above the reserve, every 64 MiB of copies, and every second.
    #[test]
    fn the_host_is_asked_once_in_a_while() {
        let reserve = Reserve::new(Some(10 * MIB));
        let start = Instant::now();
        assert_eq!(reserve.known(start), None);
        assert_eq!(
            reserve.known(start),
            Some(true),
            "the caller before asks, this one does not wait for it"
        );
        assert_eq!(reserve.answered(13 * MIB, 10 * MIB), Change::None);
        reserve.copied(3 * MIB - 1);
        assert_eq!(reserve.known(start), Some(true));
        reserve.copied(1);
        assert_eq!(reserve.known(start), None, "all that was above the reserve is used up");
        assert_eq!(reserve.answered(1000 * MIB, 10 * MIB), Change::None);
        reserve.copied(63 * MIB);
        assert_eq!(reserve.known(start), Some(true));
        reserve.copied(MIB);
        assert_eq!(reserve.known(start), None, "64 MiB were copied");
        assert_eq!(reserve.answered(1000 * MIB, 10 * MIB), Change::None);
        assert_eq!(reserve.known(start + ASK_AGAIN / 2), Some(true));
        assert_eq!(reserve.known(start + ASK_AGAIN), None, "a second has gone by");
    }

    #[test]
    fn stopping_and_going_on_are_told_once_each() {
        let reserve = Reserve::new(Some(10));
        let start = Instant::now();
        assert_eq!(reserve.known(start), None);
        assert_eq!(reserve.answered(9, 10), Change::Stopped);
        assert_eq!(
            reserve.known(start),
            Some(false),
            "a host without room is asked once a second, not by every read"
        );
        assert_eq!(reserve.known(start + ASK_AGAIN), None);
        assert_eq!(reserve.answered(9, 10), Change::None);
        assert_eq!(reserve.known(start + 2 * ASK_AGAIN), None);
        assert_eq!(
            reserve.answered(10, 10),
            Change::GoesOn,
            "as much as is to stay free is enough"
        );
        assert_eq!(reserve.answered(11, 10), Change::None);
    }

    #[test]
    fn a_file_system_that_does_not_say_stops_nothing() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let known = FileStorage::open(file.path(), Access::ReadWrite).unwrap();
        let space = known.space().unwrap().expect("a file system of files knows");
        assert!(0 < space.total && space.free <= space.total, "{space:?}");
        let full = Reserve::new(Some(space.total + 1));
        assert!(!full.has_stopped(&known), "no read has asked");
        assert!(!full.allows(&known) && full.has_stopped(&known));
        assert!(Reserve::new(Some(0)).allows(&known));
        // procfs reports zero for all sizes.
        let unknown =
            FileStorage::open_unlocked(std::path::Path::new("/proc/self/stat"), Access::ReadOnly)
                .unwrap();
        assert_eq!(unknown.space().unwrap(), None);
        assert!(Reserve::new(Some(u64::MAX)).allows(&unknown));
    }
}
