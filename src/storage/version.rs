//! What a file is like, as far as the host tells it without reading the file: its size and the time
//! of its last change.

use std::fmt;

/// Size and time of the last change of a file. Two that differ mean that the bytes may differ.
///
/// The time of the last change of status (ctime) is left out on purpose: it changes with a rename
/// and with the number of names, and a file that was renamed, or whose name now belongs to another
/// file, still has its bytes.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Version {
    /// Bytes.
    pub size: u64,
    /// Seconds since 1970 and nanoseconds; `None` where the host keeps no such time, as for block
    /// devices.
    pub modified: Option<(i64, u32)>,
}

impl fmt::Display for Version {
    /// As it stands in the note beside an overlay (P10): the form does not change.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.modified {
            Some((seconds, nanoseconds)) => write!(f, "{}@{seconds}.{nanoseconds:09}", self.size),
            None => write!(f, "{}@-", self.size),
        }
    }
}

/// How much an answer about a [`Version`] may cost. It makes a difference on network file systems
/// only, whose clients remember such facts for some seconds.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Ask {
    /// What is known here; waits for no other machine (`AT_STATX_DONT_SYNC`).
    Known,
    /// As stat(2) does it (`AT_STATX_SYNC_AS_STAT`).
    AsStat,
    /// The machine that has the file is asked (`AT_STATX_FORCE_SYNC`).
    Anew,
}
