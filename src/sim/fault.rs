//! Faults: which operations of a host fail, how, and how often.

use std::io;

use super::storage::Operation;

/// How an operation fails.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum HostFailure {
    /// Nothing is done; the operation returns this errno.
    Errno(i32),
    /// A write stores this many bytes of its data, then returns this errno. Like
    /// [`HostFailure::Errno`] for any other operation.
    Short(u64, i32),
    /// A write stores all bytes of its data except this many, then returns this errno. Like
    /// [`HostFailure::Errno`] for any other operation.
    ShortBy(u64, i32),
}

impl HostFailure {
    pub(super) fn error(self) -> io::Error {
        let (HostFailure::Errno(errno)
        | HostFailure::Short(_, errno)
        | HostFailure::ShortBy(_, errno)) = self;
        io::Error::from_raw_os_error(errno)
    }

    /// Returns how many bytes of a write of `len` bytes are done.
    pub(super) fn done(self, len: usize) -> usize {
        match self {
            HostFailure::Errno(_) => 0,
            HostFailure::Short(done, _) => len.min(done as usize),
            HostFailure::ShortBy(missing, _) => len.saturating_sub(missing as usize),
        }
    }
}

/// How often a fault occurs.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Repeat {
    /// For the next operation that matches.
    Once,
    /// For all operations that match.
    ForEver,
}

/// A predicate that selects operations.
pub type Matches = Box<dyn Fn(&Operation) -> bool + Send>;

/// A rule that makes operations fail.
pub struct Fault {
    /// Selects the operations.
    pub matches: Matches,
    /// This many matching operations succeed first.
    pub after: u64,
    /// How they fail.
    pub failure: HostFailure,
    /// How often they fail.
    pub times: Repeat,
}
