//! The space of the host that copy-on-read leaves alone, so that somebody who only reads cannot fill it (data-safety 6.6).
//!
//! Only copies on reads ask here. A guest's write needs its space whatever else there is, and a stream was asked for by name and says by its
//! policy what is to happen when there is none.
//!
//! **Never:** asked on the way of a read that the overlay answers. **Locks:** a leaf, not held while the host is asked.

use std::time::{Duration, Instant};

use crate::storage::{HostSpace, Storage};
use crate::sync::{Mutex, rank};

/// After so many bytes copied the host is asked again, or earlier where there was less than that above the reserve.
const ASK_AFTER: u64 = 64 << 20;

/// After this time the host is asked again: others fill it and make room as well.
const ASK_AGAIN: Duration = Duration::from_secs(1);

/// The default: so much, or one [`DEFAULT_PART`]th of the file system where that is less.
const DEFAULT_RESERVE: u64 = 1 << 30;
/// 5 %.
const DEFAULT_PART: u64 = 20;

/// How much is to stay free, and whether there is more than that.
#[derive(Debug)]
pub(super) struct Reserve {
    /// Bytes; `None` is the default, which depends on the file system.
    wanted: Option<u64>,
    state: Mutex<{ rank::LEAF }, State>,
}

#[derive(Debug, Default)]
struct State {
    asked: Option<Instant>,
    /// Bytes that may be copied before the host is asked again.
    left: u64,
    stopped: bool,
}

/// What an answer of the host has changed.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Change {
    None,
    Stopped,
    GoesOn,
}

impl Reserve {
    /// `wanted` bytes stay free; by default the smaller of 1 GiB and 5 % of the file system.
    pub fn new(wanted: Option<u64>) -> Reserve {
        Reserve { wanted, state: Mutex::default() }
    }

    /// Whether a read may copy up what it misses. A host that does not know how much is free stops nothing.
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
            Change::GoesOn => log::warn!("copy-on-read goes on: {free} bytes are free where the overlay lies"),
            Change::None => {}
        }
        free >= reserve
    }

    /// Whether reads do not copy up for want of space. Room that was made meanwhile counts.
    pub fn has_stopped(&self, overlay: &dyn Storage) -> bool {
        let stopped = self.state.lock().stopped;
        stopped && !self.allows(overlay)
    }

    /// `bytes` were copied up by a read.
    pub fn copied(&self, bytes: u64) {
        let mut state = self.state.lock();
        state.left = state.left.saturating_sub(bytes);
    }

    fn bytes(&self, space: HostSpace) -> u64 {
        self.wanted.unwrap_or_else(|| DEFAULT_RESERVE.min(space.total / DEFAULT_PART))
    }

    /// The last answer, while it is good enough. `None` means that the caller is to ask; others go by the last answer meanwhile.
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
    use crate::storage::{Access, FileStorage};

    const MIB: u64 = 1 << 20;

    #[test]
    fn the_default_is_a_twentieth_of_the_file_system_and_a_gibibyte_at_most() {
        let reserve = Reserve::new(None);
        assert_eq!(reserve.bytes(HostSpace { free: 0, total: 64 * MIB }), 64 * MIB / 20);
        assert_eq!(reserve.bytes(HostSpace { free: 0, total: 1 << 40 }), 1 << 30);
        assert_eq!(Reserve::new(Some(5)).bytes(HostSpace { free: 0, total: 1 << 40 }), 5);
    }

    /// The host is asked at first, when what was above the reserve is used up, after 64 MiB, and after a second; at no other time.
    #[test]
    fn the_host_is_asked_once_in_a_while() {
        let reserve = Reserve::new(Some(10 * MIB));
        let start = Instant::now();
        assert_eq!(reserve.known(start), None);
        assert_eq!(reserve.known(start), Some(true), "the caller before asks, this one does not wait for it");
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
        assert_eq!(reserve.known(start), Some(false), "a host without room is asked once a second, not by every read");
        assert_eq!(reserve.known(start + ASK_AGAIN), None);
        assert_eq!(reserve.answered(9, 10), Change::None);
        assert_eq!(reserve.known(start + 2 * ASK_AGAIN), None);
        assert_eq!(reserve.answered(10, 10), Change::GoesOn, "as much as is to stay free is enough");
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
        // procfs says zero of everything.
        let unknown = FileStorage::open_unlocked(std::path::Path::new("/proc/self/stat"), Access::ReadOnly).unwrap();
        assert_eq!(unknown.space().unwrap(), None);
        assert!(Reserve::new(Some(u64::MAX)).allows(&unknown));
    }
}
