//! The fault matrix: the n-th operation on a file fails, n = 1, 2, … until a scenario passes without reaching it.
//!
//! ```text
//! scenario × shape × file × n × error × how often × what the guest does then
//!     a cell: open, prepare; from here on the n-th operation fails; requests ──▶ the host is well again ──▶ judgement
//! ```
//! Every cell is judged alike ([`judge`]): errors are those of the host and of nobody else; every byte is as the [`model`] has it, old or new
//! where a request failed; what is left on disk is without error, and after a clean close without a leak, as
//! [`spec`](super::spec) finds without the engine; a failed barrier is for ever; everything else is done when it is tried again.
//!
//! **Touches:** the disk and everything below, jobs. **Never:** `crate::format`, which is judged here.
//! **Locks:** none but a list of what failed. **Invariants:** a cell is determined by its name: the same name fails the same way.

mod judge;
mod model;
mod rig;
mod scenarios;
mod sketch;
#[cfg(test)]
mod tests;

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use parking_lot::Mutex;

use super::random::mix;
use super::{Action, Failure, Fault, Operation, Times};
use crate::Error;
use rig::Rig;

/// Which file fails.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Side {
    Overlay,
    Base,
    Middle,
}

/// What becomes of an operation.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Kind {
    Fails(Failure),
    /// It does not return until the test lets it; then it goes well.
    Hangs,
}

/// How an error is called in the name of a cell.
#[derive(Clone, Copy, Debug)]
struct Named {
    name: &'static str,
    kind: Kind,
}

/// Which operations fail, counted from the n-th on.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum HowOften {
    Once,
    ForEver,
    EverySecond,
    /// One of ten; n is the seed.
    Random,
    /// The n-th, and so many after it once more.
    Twice(u64),
}

/// What the guest does when the host is well again.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Then {
    /// Whatever failed, once more, and then everything is closed.
    Retry,
    /// Everything is closed.
    Close,
    /// The process is killed, and the m-th operation of the next one that opens the image fails as well.
    Reopen(u64),
}

/// What a client of the mount sees of an error, as a number: given by the tests, since this room does not know the mount.
type Mapped = fn(&Error) -> i32;

/// One cell of the matrix.
#[derive(Clone, Copy, Debug)]
struct Cell {
    scenario: &'static str,
    shape: &'static str,
    side: Side,
    n: u64,
    error: Named,
    how_often: HowOften,
    then: Then,
}

impl fmt::Display for Cell {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Cell { scenario, shape, side, n, error, how_often, then } = self;
        write!(f, "{scenario}/{shape}/{side:?}/{n}/{}/{how_often:?}/{then:?}", error.name)
    }
}

const fn errno(name: &'static str, errno: i32) -> Named {
    Named { name, kind: Kind::Fails(Failure::Errno(errno)) }
}

const fn failure(name: &'static str, failure: Failure) -> Named {
    Named { name, kind: Kind::Fails(failure) }
}

/// The errors of every run: those that hosts have, and that the engine treats differently.
const USUAL_ERRORS: [Named; 5] = [
    errno("EIO", 5),
    errno("ENOSPC", 28),
    errno("EROFS", 30),
    failure("short-511-ENOSPC", Failure::Short(511, 28)),
    Named { name: "hang", kind: Kind::Hangs },
];

/// All others.
const MORE_ERRORS: [Named; 10] = [
    errno("EDQUOT", 122),
    errno("EFBIG", 27),
    errno("ESTALE", 116),
    errno("ENOMEM", 12),
    errno("EAGAIN", 11),
    failure("short-1-EIO", Failure::Short(1, 5)),
    failure("short-1-ENOSPC", Failure::Short(1, 28)),
    failure("short-511-EIO", Failure::Short(511, 5)),
    failure("short-all-but-1-EIO", Failure::ShortBy(1, 5)),
    failure("short-all-but-1-ENOSPC", Failure::ShortBy(1, 28)),
];

impl HowOften {
    /// Whether the `count`-th operation (from 1) fails.
    fn strikes(self, n: u64, count: u64) -> bool {
        match self {
            HowOften::Once => count == n,
            HowOften::ForEver => count >= n,
            HowOften::EverySecond => count >= n && (count - n).is_multiple_of(2),
            HowOften::Random => mix(n << 32 | count).is_multiple_of(10),
            HowOften::Twice(later) => count == n || count == n + later,
        }
    }
}

/// What failed so far.
#[derive(Clone, Debug, Default)]
struct Struck {
    /// In order.
    operations: Arc<Mutex<Vec<Operation>>>,
    /// All operations, failed or not.
    counted: Arc<AtomicU64>,
}

impl Cell {
    fn storage<'a>(&self, rig: &'a Rig) -> &'a Arc<super::SimStorage> {
        match self.side {
            Side::Overlay => &rig.overlay,
            Side::Base => &rig.base,
            Side::Middle => rig.middle.as_ref().expect("only of scenarios with a file in the middle"),
        }
    }

    /// Lets operations fail from now on.
    fn inject(&self, rig: &Rig, failure: Failure) -> Struck {
        let struck = Struck::default();
        let (mine, n, how_often) = (struck.clone(), self.n, self.how_often);
        let matches = move |operation: &Operation| {
            let strikes = how_often.strikes(n, 1 + mine.counted.fetch_add(1, Ordering::SeqCst));
            if strikes {
                mine.operations.lock().push(*operation);
            }
            strikes
        };
        self.storage(rig).inject(Fault { matches: Box::new(matches), after: 0, failure, times: Times::ForEver });
        struck
    }

    /// Whether writes may be torn where nothing but a fault in the middle of a sector tears them.
    fn tears(&self) -> bool {
        matches!(self.error.kind, Kind::Fails(Failure::Short(..) | Failure::ShortBy(..)))
    }
}

/// Whether a failed operation is no reason for a request to fail: a hint for the host, or a clone, in whose place bytes are copied.
fn is_hint(operation: &Operation) -> bool {
    operation.action == Action::Punch || operation.is_clone
}
