//! Events of jobs: plain values on a channel, no callbacks.

use std::time::SystemTime;

use super::{ErrorAction, Status};

/// One event of a job.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum JobEvent {
    /// The status has changed.
    StatusChange {
        /// Id of the job.
        id: String,
        /// The new status.
        status: Status,
    },
    /// The job did all its work, or failed.
    Completed {
        /// Final progress.
        progress: Progress,
        /// Reason of the failure; `None` for success.
        error: Option<String>,
    },
    /// The job was cancelled.
    Cancelled {
        /// Final progress.
        progress: Progress,
    },
    /// The worker met an error.
    Error {
        /// Id of the job.
        id: String,
        /// The action that was taken.
        action: ErrorAction,
    },
    /// The job waits for [`super::Verb::Finalize`].
    Pending {
        /// Id of the job.
        id: String,
        /// Kind of the job.
        kind: &'static str,
    },
    /// The job waits for [`super::Verb::Complete`].
    Ready {
        /// Current progress.
        progress: Progress,
    },
}

/// Progress of a job.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Progress {
    /// Id of the job.
    pub id: String,
    /// Kind of the job.
    pub kind: &'static str,
    /// Total bytes of the job.
    pub len: u64,
    /// Bytes that were processed.
    pub offset: u64,
    /// Rate limit in bytes per second; 0 is unlimited.
    pub speed: u64,
}

/// Events of one change: no other thread can observe the registry between two of them.
#[derive(Clone, Debug)]
pub struct Batch {
    /// Time of the change.
    pub at: SystemTime,
    /// The events in order; never empty.
    pub events: Vec<JobEvent>,
}
