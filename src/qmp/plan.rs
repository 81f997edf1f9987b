//! The plan that governs the speed of a job: by the time of day, or to a deadline.

use serde_json::{Value, json};

use super::call::Call;
use super::codec::{self, Refusal};
use crate::stream::{Minute, Plan, PlanInfo, Schedule};

/// With neither a schedule nor a deadline the plan ends, and the speed stays what it is.
pub(super) fn x_job_set_plan(call: &mut Call<'_>) -> Result<Value, Refusal> {
    let id = call.arguments.mandatory_text("id");
    let plan = match (call.arguments.text("schedule"), call.arguments.text("finish-by")) {
        (Some(_), Some(_)) => return Err(Refusal::generic("'schedule' and 'finish-by' cannot be specified at the same time")),
        (Some(schedule), None) => Some(Plan::Schedule(schedule.parse::<Schedule>().map_err(Refusal::generic)?)),
        (None, Some(at)) => Some(Plan::from(at.parse::<Minute>().map_err(Refusal::generic)?)),
        (None, None) => None,
    };
    call.session.hold = Some(call.backend.jobs.hold());
    call.backend.streams.set_plan(id, plan).map_err(|error| Refusal::generic(error.to_string()))?;
    Ok(json!({}))
}

/// The facts of a plan.
pub(super) fn facts(info: &PlanInfo) -> Value {
    let PlanInfo { id, schedule, finish_by, deadline, speed, needed, feasible } = info;
    let mut value = json!({ "id": id, "speed": speed });
    let members = [
        ("schedule", schedule.as_deref().map(Value::from)),
        ("finish-by", finish_by.as_deref().map(Value::from)),
        ("deadline", deadline.map(codec::timestamp)),
        ("needed", needed.map(Value::from)),
        ("feasible", feasible.map(Value::from)),
    ];
    for (name, member) in members {
        if let Some(member) = member {
            value[name] = member;
        }
    }
    value
}
