//! Operations of a host that fail: which ones, how, and how often.

use std::io;

use super::storage::Operation;

/// What happens to an operation that fails.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Failure {
    /// Nothing is done; this errno.
    Errno(i32),
    /// So many bytes of a write are done, then this errno. As [`Failure::Errno`] for anything else.
    Short(u64, i32),
    /// All bytes of a write but so many are done, then this errno. As [`Failure::Errno`] for anything else.
    ShortBy(u64, i32),
}

impl Failure {
    pub(super) fn error(self) -> io::Error {
        let (Failure::Errno(errno) | Failure::Short(_, errno) | Failure::ShortBy(_, errno)) = self;
        io::Error::from_raw_os_error(errno)
    }

    /// How much of a write of `len` bytes is done.
    pub(super) fn done(self, len: usize) -> usize {
        match self {
            Failure::Errno(_) => 0,
            Failure::Short(done, _) => len.min(done as usize),
            Failure::ShortBy(missing, _) => len.saturating_sub(missing as usize),
        }
    }
}

/// How often.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Times {
    /// The next one that matches.
    Once,
    /// All that match.
    ForEver,
}

/// Which operations.
pub type Matches = Box<dyn Fn(&Operation) -> bool + Send>;

/// Makes operations fail.
pub struct Fault {
    /// Which ones.
    pub matches: Matches,
    /// So many of them go well first.
    pub after: u64,
    /// How.
    pub failure: Failure,
    /// How often.
    pub times: Times,
}
