//! What QEMU does not tell of jobs: what was really copied, how fast, for how long still, and what became of the last one.

use std::time::{Duration, SystemTime};

use serde_json::{Value, json};

use super::call::{Call, ProgressEvents};
use super::codec::{self, Refusal};
use super::plan;
use crate::job::{JobInfo, Work};

/// The event of a client that has asked for it.
pub(super) const EVENT: &str = "X_JOB_PROGRESS";
/// Often enough for a bar on a screen.
const DEFAULT_INTERVAL: i64 = 500;
/// Milliseconds: more than ten a second help nobody, and fewer than one a day are none.
const INTERVALS: std::ops::RangeInclusive<i64> = 100..=24 * 3600 * 1000;

pub(super) fn x_query_job_progress(call: &mut Call<'_>) -> Result<Value, Refusal> {
    let plan = call.backend.streams.plan();
    let jobs = call.backend.jobs.query();
    let described = jobs.iter().map(|info| {
        let mut value = progress(info);
        if let Some(plan) = plan.as_ref().filter(|plan| plan.id == info.progress.id) {
            value["plan"] = plan::facts(plan);
        }
        value
    });
    Ok(described.collect())
}

/// One job, as the query and the event have it.
pub(super) fn progress(info: &JobInfo) -> Value {
    let mut value = counts(info);
    value["rate"] = info.rate.into();
    if let Some(left) = info.left {
        value["bytes-left"] = left.into();
    }
    if let Some(remaining) = info.remaining {
        value["seconds-left"] = remaining.as_secs().into();
    }
    with_error_detail(value, info)
}

/// QEMU's word for an error is short; this says which file and where.
fn with_error_detail(mut value: Value, info: &JobInfo) -> Value {
    if let Some(detail) = &info.error_detail {
        value["error-detail"] = detail.as_str().into();
    }
    value
}

pub(super) fn x_query_last_job(call: &mut Call<'_>) -> Result<Value, Refusal> {
    let info = call.backend.jobs.last().ok_or_else(|| Refusal::generic("No job has finished yet"))?;
    Ok(last_job(&info))
}

/// A job that has ended.
pub(super) fn last_job(info: &JobInfo) -> Value {
    let mut value = counts(info);
    // One that was started from the command line has no words of a client's.
    let given = || json!({ "device": info.progress.id, "speed": info.progress.speed });
    value["arguments"] = serde_json::from_str(&info.request).unwrap_or_else(|_| given());
    value["result"] = match (&info.error, info.cancelled) {
        (None, _) => "success",
        (Some(_), true) => "cancelled",
        (Some(_), false) => "error",
    }
    .into();
    value["end-time"] = codec::timestamp(info.concluded.unwrap_or_else(SystemTime::now));
    if let Some(error) = &info.error {
        value["error"] = error.as_str().into();
    }
    with_error_detail(value, info)
}

fn counts(info: &JobInfo) -> Value {
    let Work { copied, zeroed, failed } = info.work;
    json!({
        "id": info.progress.id, "type": info.progress.kind, "status": info.status.to_string(), "speed": info.progress.speed,
        "offset": info.progress.offset, "len": info.progress.len,
        "bytes-copied": copied, "bytes-zero": zeroed, "bytes-skipped": info.skipped(), "bytes-failed": failed,
        "start-time": codec::timestamp(info.created),
    })
}

pub(super) fn x_job_progress_events(call: &mut Call<'_>) -> Result<Value, Refusal> {
    let interval = call.arguments.integer("interval-ms").unwrap_or(DEFAULT_INTERVAL);
    if !INTERVALS.contains(&interval) {
        let (least, most) = INTERVALS.into_inner();
        return Err(Refusal::generic(format!("Parameter 'interval-ms' expects a value between {least} and {most}")));
    }
    call.session.progress = Some(match call.arguments.boolean("enable") {
        Some(true) => ProgressEvents::Every(Duration::from_millis(interval.unsigned_abs())),
        _ => ProgressEvents::Off,
    });
    Ok(json!({}))
}
