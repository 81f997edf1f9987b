//! Facts of jobs beyond QEMU's: bytes really copied, rate, remaining time, and the result of the
//! last job.

use std::time::{Duration, SystemTime};

use serde_json::{Value, json};

use super::call::{Call, ProgressEvents};
use super::codec::QmpError;
use super::facts::{JobProgress, LastJob, PlanFacts};
use super::json;
use engine::job::{JobInfo, Work};

/// Event for clients that have enabled it.
pub(super) const EVENT: &str = "X_JOB_PROGRESS";
/// Default interval of progress events in milliseconds: often enough for a progress bar.
const DEFAULT_INTERVAL: i64 = 500;
/// Accepted intervals in milliseconds: at least a tenth of a second, because more events are of no
/// use, and at most a day.
const INTERVALS: std::ops::RangeInclusive<i64> = 100..=24 * 3600 * 1000;

pub(super) fn x_query_job_progress(call: &mut Call<'_>) -> Result<Value, QmpError> {
    let plan = call.target.streams.plan().map(PlanFacts::from);
    let jobs = call.target.jobs.query();
    let described = jobs.iter().map(|info| {
        let plan = plan.as_ref().filter(|plan| plan.id == info.progress.id);
        json::value(&JobProgress { plan: plan.cloned(), ..JobProgress::from(info) })
    });
    Ok(described.collect())
}

/// Describes a job, without its plan, as the event does.
impl From<&JobInfo> for JobProgress {
    fn from(info: &JobInfo) -> JobProgress {
        let Work { copied, zeroed, failed } = info.work;
        JobProgress {
            id: info.progress.id.clone(),
            kind: info.progress.kind.into(),
            status: info.status.to_string(),
            speed: info.progress.speed,
            offset: info.progress.offset,
            len: info.progress.len,
            bytes_copied: copied,
            bytes_zero: zeroed,
            bytes_skipped: info.skipped(),
            bytes_failed: failed,
            start_time: info.created.into(),
            rate: info.rate,
            bytes_left: info.left,
            seconds_left: info.remaining.map(|remaining| remaining.as_secs()),
            // QEMU's error text is short; this one names file and offset.
            error_detail: info.error_detail.clone(),
            plan: None,
        }
    }
}

pub(super) fn x_query_last_job(call: &mut Call<'_>) -> Result<Value, QmpError> {
    let info =
        call.target.jobs.last().ok_or_else(|| QmpError::generic("No job has finished yet"))?;
    Ok(json::value(&LastJob::from(&info)))
}

/// Describes a job that has ended.
impl From<&JobInfo> for LastJob {
    fn from(info: &JobInfo) -> LastJob {
        let JobProgress {
            id,
            kind,
            status,
            speed,
            offset,
            len,
            bytes_copied,
            bytes_zero,
            bytes_skipped,
            bytes_failed,
            start_time,
            error_detail,
            ..
        } = info.into();
        // A job from the command line has no arguments of a client.
        let arguments = serde_json::from_str(&info.request)
            .unwrap_or_else(|_| json!({ "device": id, "speed": speed }));
        let result = match (&info.error, info.cancelled) {
            (None, _) => "success",
            (Some(_), true) => "cancelled",
            (Some(_), false) => "error",
        };
        let end_time = info.concluded.unwrap_or_else(SystemTime::now).into();
        LastJob {
            id,
            kind,
            status,
            speed,
            offset,
            len,
            bytes_copied,
            bytes_zero,
            bytes_skipped,
            bytes_failed,
            start_time,
            arguments,
            result: result.into(),
            end_time,
            error: info.error.clone(),
            error_detail,
        }
    }
}

pub(super) fn x_job_progress_events(call: &mut Call<'_>) -> Result<Value, QmpError> {
    let interval = call.arguments.integer("interval-ms").unwrap_or(DEFAULT_INTERVAL);
    if !INTERVALS.contains(&interval) {
        let (least, most) = INTERVALS.into_inner();
        return Err(QmpError::generic(format!(
            "Parameter 'interval-ms' expects a value between {least} and {most}"
        )));
    }
    call.session.progress = Some(match call.arguments.boolean("enable") {
        Some(true) => ProgressEvents::Every(Duration::from_millis(interval.unsigned_abs())),
        _ => ProgressEvents::Off,
    });
    Ok(json!({}))
}
