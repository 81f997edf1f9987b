//! The version of a file, as far as the host reports it without reading the file: its size and the
//! time of its last change.

use std::fmt;

/// Size and time of the last change of a file. If two versions differ, the bytes may differ.
///
/// The time of the last status change (ctime) is not part of it: it changes with a rename and with
/// the number of names. A file that was renamed, or whose name now belongs to another file, still
/// has its bytes.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Version {
    /// Size in bytes.
    pub size: u64,
    /// Seconds since 1970 and nanoseconds; `None` if the host keeps no such time, as for block
    /// devices.
    pub modified: Option<(i64, u32)>,
}

impl fmt::Display for Version {
    /// Writes the form that the note beside an overlay contains (P10). This form must not change.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.modified {
            Some((seconds, nanoseconds)) => write!(f, "{}@{seconds}.{nanoseconds:09}", self.size),
            None => write!(f, "{}@-", self.size),
        }
    }
}

/// How much a query of a [`Version`] may cost. It matters only on network file systems, whose
/// clients cache such attributes for some seconds.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Ask {
    /// Use the cached attributes; wait for no other machine (`AT_STATX_DONT_SYNC`).
    Known,
    /// Behave as stat(2) does (`AT_STATX_SYNC_AS_STAT`).
    AsStat,
    /// Ask the machine that has the file (`AT_STATX_FORCE_SYNC`).
    Anew,
}
