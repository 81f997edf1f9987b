//! The fault matrix: the n-th operation on a file fails, for n = 1, 2, …, until a scenario ends
//! before its n-th operation.
//!
//! ```text
//! scenario × shape × file × n × error × how often × what the guest does then
//!     a cell: open, prepare; the n-th operation fails; requests ─▶ the host recovers ─▶ checks
//! ```
//! Every cell is checked by the same rules ([`judge`]). Each error that a request returns is an
//! error that the host returned. Each byte is as the [`model`] has it: old or new where a request
//! failed. The image on disk is consistent, and after a clean close it has no new leaks;
//! [`spec`](super::spec) checks this without the engine. A failed barrier is final. Every other
//! request that failed succeeds when it is repeated.
//!
//! **Touches:** the disk and everything below it, jobs. **Never:** `qcow2::format`, which these
//! tests check.
//! **Locks:** none except the list of operations that failed. **Invariants:** the name of a cell
//! determines its run: a cell of the same name fails in the same way.

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

use host::Error;
use rig::Rig;
use sim::random::mix;
use sim::{Action, Fault, HostFailure, Operation, Repeat};

/// The file whose operations fail.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Side {
    Overlay,
    Base,
    Middle,
}

/// What happens to an operation.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Kind {
    Fails(HostFailure),
    /// The operation does not return until the test releases it; then it succeeds.
    Hangs,
}

/// An error, and its name in the name of a cell.
#[derive(Clone, Copy, Debug)]
struct Named {
    name: &'static str,
    kind: Kind,
}

/// Which operations fail, from the n-th on.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum HowOften {
    Once,
    ForEver,
    EverySecond,
    /// One of ten operations, chosen at random; n is the seed.
    Random,
    /// The n-th operation, and the one `later` operations after it.
    Twice(u64),
}

/// What the guest does when the host has recovered.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Then {
    /// Every request that failed is repeated, then the disk is closed.
    Retry,
    /// The disk is closed.
    Close,
    /// The process is killed, and the m-th operation of the next process that opens the image fails
    /// as well.
    Reopen(u64),
}

/// Converts an error to the errno that a client of the mount sees. The tests pass it in, because
/// this module does not use the crate `export`.
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
    Named { name, kind: Kind::Fails(HostFailure::Errno(errno)) }
}

const fn failure(name: &'static str, failure: HostFailure) -> Named {
    Named { name, kind: Kind::Fails(failure) }
}

/// Errors of every run: the usual errors of hosts, and those that the engine treats differently
/// from each other.
const USUAL_ERRORS: [Named; 5] = [
    errno("EIO", 5),
    errno("ENOSPC", 28),
    errno("EROFS", 30),
    failure("short-511-ENOSPC", HostFailure::Short(511, 28)),
    Named { name: "hang", kind: Kind::Hangs },
];

/// Errors of a full run only.
const MORE_ERRORS: [Named; 10] = [
    errno("EDQUOT", 122),
    errno("EFBIG", 27),
    errno("ESTALE", 116),
    errno("ENOMEM", 12),
    errno("EAGAIN", 11),
    failure("short-1-EIO", HostFailure::Short(1, 5)),
    failure("short-1-ENOSPC", HostFailure::Short(1, 28)),
    failure("short-511-EIO", HostFailure::Short(511, 5)),
    failure("short-all-but-1-EIO", HostFailure::ShortBy(1, 5)),
    failure("short-all-but-1-ENOSPC", HostFailure::ShortBy(1, 28)),
];

impl HowOften {
    /// Returns whether the `count`-th operation fails; counts from 1.
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

/// Operations of the failing file since the injection.
#[derive(Clone, Debug, Default)]
struct Struck {
    /// Operations that failed, in order.
    operations: Arc<Mutex<Vec<Operation>>>,
    /// Number of operations, failed or not.
    counted: Arc<AtomicU64>,
}

impl Cell {
    fn storage<'a>(&self, rig: &'a Rig) -> &'a Arc<sim::SimStorage> {
        match self.side {
            Side::Overlay => &rig.overlay,
            Side::Base => &rig.base,
            Side::Middle => {
                rig.middle.as_ref().expect("only of scenarios with a file in the middle")
            }
        }
    }

    /// Lets the chosen operations fail from now on.
    fn inject(&self, rig: &Rig, failure: HostFailure) -> Struck {
        let struck = Struck::default();
        let (mine, n, how_often) = (struck.clone(), self.n, self.how_often);
        let matches = move |operation: &Operation| {
            let strikes = how_often.strikes(n, 1 + mine.counted.fetch_add(1, Ordering::SeqCst));
            if strikes {
                mine.operations.lock().push(*operation);
            }
            strikes
        };
        self.storage(rig).inject(Fault {
            matches: Box::new(matches),
            after: 0,
            failure,
            times: Repeat::ForEver,
        });
        struck
    }

    /// Whether the fault tears writes inside a sector. Nothing else tears a sector.
    fn tears(&self) -> bool {
        matches!(self.error.kind, Kind::Fails(HostFailure::Short(..) | HostFailure::ShortBy(..)))
    }
}

/// Whether the failure of an operation is no reason for a request to fail: it is a hint to the
/// host, or a clone, which the engine replaces by copying the bytes.
fn is_hint(operation: &Operation) -> bool {
    operation.action == Action::Punch || operation.is_clone
}
