//! The last guest request that failed. The guest gets only an errno; the user needs the file and
//! the offset.

use std::time::SystemTime;

use super::Disk;
use host::Error;

/// A guest request that failed.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct GuestFailure {
    /// When the request failed.
    pub time: SystemTime,
    /// `read`, `write`, `write zeroes`, `discard`, `flush`, `stat` or `seek`.
    pub operation: &'static str,
    /// Guest offset and length of the request, both in bytes; `None` if it has none.
    pub range: Option<(u64, u64)>,
    /// The error message, which names the file.
    pub message: String,
}

/// The reason why reads do not copy up at present although copy-on-read is on.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum CopyPause {
    /// Less space is free than [`super::DiskOptions::reserve`] leaves.
    Reserve,
    /// A copy could not be stored. Reads try again after a pause.
    Error,
}

impl Disk {
    /// Records a guest request that failed, in place of the one before.
    pub fn note_failure(&self, operation: &'static str, range: Option<(u64, u64)>, error: &Error) {
        let failure =
            GuestFailure { time: SystemTime::now(), operation, range, message: error.to_string() };
        *self.failure.lock() = Some(failure);
    }

    /// The guest request that failed last.
    pub fn last_failure(&self) -> Option<GuestFailure> {
        self.failure.lock().clone()
    }

    /// The reason why reads do not copy up at present. `None` if they do, or if copy-on-read is off
    /// or has nothing to copy from.
    pub fn copy_pause(&self) -> Option<CopyPause> {
        if !self.copy_on_read || self.is_read_only() || self.chain().is_none() {
            return None;
        }
        self.overlay.writable().and_then(|image| self.fills.pause(&**image.storage()))
    }
}
