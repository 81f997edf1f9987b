//! The last request of the guest that failed: the guest gets an errno, and the user needs the file
//! and the offset.

use std::time::SystemTime;

use super::Disk;
use crate::Error;

/// A request of the guest that failed.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct GuestFailure {
    /// When its answer was made.
    pub time: SystemTime,
    /// `read`, `write`, `write zeroes`, `discard`, `flush`, `stat` or `seek`.
    pub operation: &'static str,
    /// Offset on the disk and length, both in bytes, of a request that has them.
    pub range: Option<(u64, u64)>,
    /// The error, with the file.
    pub message: String,
}

/// Why reads do not copy up at present, although they should.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum CopyPause {
    /// There is less free space than [`super::DiskOptions::reserve`] wants.
    Reserve,
    /// A copy could not be stored; it is tried again after a while.
    Error,
}

impl Disk {
    /// Keeps the failure of a request of the guest, in place of the one before.
    pub fn note_failure(&self, operation: &'static str, range: Option<(u64, u64)>, error: &Error) {
        let failure = GuestFailure { time: SystemTime::now(), operation, range, message: error.to_string() };
        *self.failure.lock() = Some(failure);
    }

    /// The request of the guest that failed last.
    pub fn last_failure(&self) -> Option<GuestFailure> {
        self.failure.lock().clone()
    }

    /// Why reads do not copy up at present; `None` where they do, or are not meant to.
    pub fn copy_pause(&self) -> Option<CopyPause> {
        if !self.copy_on_read || self.is_read_only() || self.chain().is_none() {
            return None;
        }
        self.fills.pause(&**self.reader().storage())
    }
}
