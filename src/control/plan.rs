//! `x-job-set-plan`: the plan that sets the speed of a job, by the time of day or by a deadline.

use serde_json::{Value, json};

use super::call::Call;
use super::codec::QmpError;
use super::facts::{self, Timestamp};
use engine::stream::{Minute, Plan, PlanInfo, Schedule};

/// Sets the plan. Without a schedule and a deadline the plan ends, and the speed stays as it is.
pub(super) fn x_job_set_plan(call: &mut Call<'_>) -> Result<Value, QmpError> {
    let id = call.arguments.mandatory_text("id");
    let plan = match (call.arguments.text("schedule"), call.arguments.text("finish-by")) {
        (Some(_), Some(_)) => {
            return Err(QmpError::generic(
                "'schedule' and 'finish-by' cannot be specified at the same time",
            ));
        }
        (Some(schedule), None) => {
            Some(Plan::Schedule(schedule.parse::<Schedule>().map_err(QmpError::generic)?))
        }
        (None, Some(at)) => Some(Plan::from(at.parse::<Minute>().map_err(QmpError::generic)?)),
        (None, None) => None,
    };
    call.session.hold = Some(call.target.jobs.hold());
    call.target.streams.set_plan(id, plan).map_err(|error| QmpError::generic(error.to_string()))?;
    Ok(json!({}))
}

impl From<PlanInfo> for facts::PlanFacts {
    fn from(info: PlanInfo) -> facts::PlanFacts {
        let PlanInfo { id, schedule, finish_by, deadline, speed, needed, feasible } = info;
        facts::PlanFacts {
            id,
            schedule,
            finish_by,
            deadline: deadline.map(Timestamp::from),
            speed,
            needed,
            feasible,
        }
    }
}
