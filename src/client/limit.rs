//! How fast a job may be, as it is asked for: a number, the time of day, or a deadline.

use serde_json::json;

use super::connection::{Connection, Refusal};
use crate::Result;
use crate::map::units;

/// The speed of a job that waits for its plan: bytes per second. It copies a first step and sleeps; whatever is set then wakes it.
const UNTIL_PLANNED: u64 = 1;

/// How fast a job may be.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Limit {
    /// Bytes per second; 0 is unlimited.
    Speed(u64),
    /// By the local time of day, as the daemon takes it: `08:00=20M,20:00=0`.
    Schedule(String),
    /// As fast as it must be to be complete at this local time: `06:00`.
    FinishBy(String),
}

impl Limit {
    /// The speed that a job is started with: bytes per second.
    pub(super) fn at_first(&self) -> u64 {
        match self {
            Limit::Speed(speed) => *speed,
            Limit::Schedule(_) | Limit::FinishBy(_) => UNTIL_PLANNED,
        }
    }

    /// Whether it is more than a number, and has to be set for a job that is there.
    pub(super) fn is_plan(&self) -> bool {
        !matches!(self, Limit::Speed(_))
    }

    /// Sets it for the job.
    ///
    /// # Errors
    /// The session has ended. What the daemon refuses comes back inside.
    pub(super) fn set(&self, connection: &mut Connection, id: &str) -> Result<std::result::Result<(), Refusal>> {
        let (command, arguments) = match self {
            Limit::Speed(speed) => ("block-job-set-speed", json!({ "device": id, "speed": speed })),
            Limit::Schedule(schedule) => ("x-job-set-plan", json!({ "id": id, "schedule": schedule })),
            Limit::FinishBy(at) => ("x-job-set-plan", json!({ "id": id, "finish-by": at })),
        };
        Ok(connection.ask(command, arguments)?.map(drop))
    }
}

impl std::fmt::Display for Limit {
    /// What it means for the job, after "runs".
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Limit::Speed(0) => f.write_str("without a limit"),
            Limit::Speed(speed) => write!(f, "at {} at most", units::rate(*speed)),
            Limit::Schedule(schedule) => write!(f, "by the schedule {schedule}"),
            Limit::FinishBy(at) => write!(f, "as fast as it must to be complete by {at}"),
        }
    }
}
