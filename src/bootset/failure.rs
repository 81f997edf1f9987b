//! Why a step of the walk failed, and what that means for the rest of it.

use std::fmt;

/// Shorthand for results of the walk.
pub(crate) type Step<T> = Result<T, Failure>;

/// Why a step failed.
#[derive(Debug)]
pub(crate) enum Failure {
    /// A limit is reached: the search ends.
    Limit(&'static str),
    /// The source cannot be read: the walk of this file system ends.
    Unreadable(String),
    /// The bytes contradict themselves: this file is left out.
    Damaged(String),
    /// There is no such file.
    Absent,
}

impl Failure {
    /// A failure of bytes that contradict themselves.
    pub(crate) fn damaged(what: impl Into<String>) -> Failure {
        Failure::Damaged(what.into())
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Failure::Limit(limit) => write!(f, "the search ended at its limit: {limit}"),
            Failure::Unreadable(what) | Failure::Damaged(what) => f.write_str(what),
            Failure::Absent => f.write_str("there is no such file"),
        }
    }
}
