//! The speed limit of a job as requested: a number, a schedule, or a deadline.

use serde_json::json;

use crate::map::units;
use control::connection::{Connection, Refusal};
use host::Result;

/// The speed, in bytes per second, of a job that is started before its plan is set. The job copies
/// one step and sleeps; setting the plan wakes it.
const UNTIL_PLANNED: u64 = 1;

/// The speed limit of a job.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Limit {
    /// Bytes per second; 0 is unlimited.
    Speed(u64),
    /// A schedule by the local time of day, in the daemon's syntax: `08:00=20M,20:00=0`.
    Schedule(String),
    /// As fast as needed to be complete at this local time: `06:00`.
    FinishBy(String),
}

impl Limit {
    /// Returns the speed that a job is started with, in bytes per second.
    pub(super) fn at_first(&self) -> u64 {
        match self {
            Limit::Speed(speed) => *speed,
            Limit::Schedule(_) | Limit::FinishBy(_) => UNTIL_PLANNED,
        }
    }

    /// Tells whether the limit is a plan, which can be set only for a job that exists.
    pub(super) fn is_plan(&self) -> bool {
        !matches!(self, Limit::Speed(_))
    }

    /// Sets the limit for the job `id`.
    ///
    /// # Errors
    /// The session has ended. A refusal of the daemon is returned as the inner result.
    pub(super) fn set(
        &self,
        connection: &mut Connection,
        id: &str,
    ) -> Result<std::result::Result<(), Refusal>> {
        let (command, arguments) = match self {
            Limit::Speed(speed) => ("block-job-set-speed", json!({ "device": id, "speed": speed })),
            Limit::Schedule(schedule) => {
                ("x-job-set-plan", json!({ "id": id, "schedule": schedule }))
            }
            Limit::FinishBy(at) => ("x-job-set-plan", json!({ "id": id, "finish-by": at })),
        };
        Ok(connection.ask(command, arguments)?.map(drop))
    }
}

impl std::fmt::Display for Limit {
    /// Writes the limit in words that follow "the job runs".
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Limit::Speed(0) => f.write_str("without a limit"),
            Limit::Speed(speed) => write!(f, "at {} at most", units::rate(*speed)),
            Limit::Schedule(schedule) => write!(f, "by the schedule {schedule}"),
            Limit::FinishBy(at) => write!(f, "as fast as it must to be complete by {at}"),
        }
    }
}
