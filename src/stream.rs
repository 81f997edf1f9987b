//! The one job we have: bring everything up, then cut the chain.

use std::sync::Arc;

use crate::Result;
use crate::disk::Disk;

/// Arguments of a stream, checked.
#[derive(Clone, Debug)]
pub struct StreamOptions {
    /// Job id.
    pub job_id: String,
    /// How many backing layers, from the top, are copied up; `None` for all of them (the backing link is dropped at the end).
    pub depth: Option<usize>,
    /// Bytes per second; 0 is unlimited.
    pub speed: u64,
    /// What the job does about errors.
    pub on_error: crate::job::OnError,
    /// The result takes effect without an order.
    pub auto_finalize: bool,
    /// The job is forgotten when it has concluded.
    pub auto_dismiss: bool,
    /// The name to write into the header for what remains below, instead of the one that stands in the chain; only with `depth`.
    pub backing_file: Option<String>,
}

/// Starts the job on a thread of its own.
///
/// # Errors
/// The disk is read-only or busy, the job id is taken.
#[allow(clippy::todo)]
pub fn start(_disk: &Arc<Disk>, _jobs: &crate::job::Jobs, _options: StreamOptions) -> Result<()> {
    todo!()
}
