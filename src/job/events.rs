//! What jobs tell: plain values on a channel, no callback.

use std::time::SystemTime;

use super::{ErrorAction, Status};

/// One thing that happened to a job.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum JobEvent {
    /// It has a new status.
    StatusChange {
        /// Which job.
        id: String,
        /// The status it has now.
        status: Status,
    },
    /// It did all its work, or failed.
    Completed {
        /// How far it came.
        progress: Progress,
        /// Why it failed; `None` is success.
        error: Option<String>,
    },
    /// It was given up.
    Cancelled {
        /// How far it came.
        progress: Progress,
    },
    /// Something went wrong while it worked.
    Error {
        /// Which job.
        id: String,
        /// What it did about it.
        action: ErrorAction,
    },
    /// It waits for the order to finalize.
    Pending {
        /// Which job.
        id: String,
        /// Its kind.
        kind: &'static str,
    },
    /// It waits for the order to complete.
    Ready {
        /// How far it came.
        progress: Progress,
    },
}

/// How far a job has come.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Progress {
    /// Which job.
    pub id: String,
    /// Its kind.
    pub kind: &'static str,
    /// Where it ends, in bytes.
    pub len: u64,
    /// How many bytes it has looked at.
    pub offset: u64,
    /// Its limit in bytes per second; 0 is unlimited.
    pub speed: u64,
}

/// Events that happened at once: nobody can observe the registry between two of them.
#[derive(Clone, Debug)]
pub struct Batch {
    /// When.
    pub at: SystemTime,
    /// What, in order; never empty.
    pub events: Vec<JobEvent>,
}
