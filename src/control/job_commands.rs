//! Commands about jobs. `block-job-*` and `job-*` differ in the name of their argument and in the
//! error for a job that does not exist.

use std::time::Duration;

use serde_json::{Value, json};

use super::call::Call;
use super::codec::{Class, QmpError};
use super::facts::BlockJobInfo;
use super::json;
use engine::job::{ErrorAction, Force, IoStatus, JobError, JobInfo, Verb, Worker};

/// How long a reply waits for the events of a command that ends a sleeping job. They precede the
/// reply, because QEMU runs a sleeping job to its end at once. Long enough for a worker to clean
/// up, and short enough for a client of a disk that hangs.
pub(super) const SETTLE: Duration = Duration::from_secs(5);

/// Converts errors for `block-job-*`.
fn block_job(id: &str) -> impl Fn(JobError) -> QmpError {
    let id = id.to_string();
    move |error| match error {
        JobError::NotFound => {
            QmpError::new(Class::DeviceNotActive, format!("Block job '{id}' not found"))
        }
        error => QmpError::generic(error.to_string()),
    }
}

/// Converts errors for `job-*`.
fn job(error: JobError) -> QmpError {
    QmpError::generic(error.to_string())
}

fn done() -> Result<Value, QmpError> {
    Ok(json!({}))
}

fn block_job_verb(call: &mut Call<'_>, argument: &str, verb: Verb) -> Result<Value, QmpError> {
    hold(call, verb);
    let id = call.arguments.mandatory_text(argument);
    let worker = call.target.jobs.apply(id, verb).map_err(block_job(id))?;
    noted(call, id, verb);
    settle(call, id, verb, worker);
    done()
}

fn job_verb(call: &mut Call<'_>, verb: Verb) -> Result<Value, QmpError> {
    hold(call, verb);
    let id = call.arguments.mandatory_text("id");
    let worker = call.target.jobs.apply(id, verb).map_err(job)?;
    noted(call, id, verb);
    settle(call, id, verb, worker);
    done()
}

/// Updates the note of the stream before the reply is sent, so that a paused stream is also paused
/// after a restart.
fn noted(call: &Call<'_>, id: &str, verb: Verb) {
    if matches!(verb, Verb::Pause | Verb::Resume) {
        call.target.streams.changed(id);
    }
}

/// Holds all jobs, so that the reply to a command that makes a job work precedes its progress.
fn hold(call: &mut Call<'_>, verb: Verb) {
    if matches!(verb, Verb::Resume | Verb::SetSpeed) {
        call.session.hold = Some(call.target.jobs.hold());
    }
}

/// Waits until a sleeping job has ended, so that the reply to the command that ends it follows its
/// events.
fn settle(call: &Call<'_>, id: &str, verb: Verb, worker: Worker) {
    if matches!(verb, Verb::Cancel | Verb::Finalize) && worker == Worker::Asleep {
        call.target.jobs.settle(id, SETTLE);
    }
}

pub(super) fn block_job_set_speed(call: &mut Call<'_>) -> Result<Value, QmpError> {
    hold(call, Verb::SetSpeed);
    let id = call.arguments.mandatory_text("device");
    let speed = call.arguments.integer("value").or(call.arguments.integer("speed"));
    let speed = speed.ok_or_else(|| QmpError::generic("Parameter 'value' is missing"))?;
    call.target.jobs.check(id, Verb::SetSpeed).map_err(block_job(id))?;
    call.target.streams.set_speed(id, non_negative(speed)?).map_err(block_job(id))?;
    done()
}

/// Checks a speed in bytes per second.
pub(super) fn non_negative(speed: i64) -> Result<u64, QmpError> {
    u64::try_from(speed)
        .map_err(|_| QmpError::generic("Parameter 'speed' expects a non-negative value"))
}

pub(super) fn block_job_cancel(call: &mut Call<'_>) -> Result<Value, QmpError> {
    let id = call.arguments.mandatory_text("device");
    let force = if call.arguments.boolean("force") == Some(true) { Force::Yes } else { Force::No };
    let worker = call.target.jobs.cancel(id, force).map_err(block_job(id))?;
    settle(call, id, Verb::Cancel, worker);
    done()
}

pub(super) fn job_cancel(call: &mut Call<'_>) -> Result<Value, QmpError> {
    let id = call.arguments.mandatory_text("id");
    let worker = call.target.jobs.cancel(id, Force::Yes).map_err(job)?;
    settle(call, id, Verb::Cancel, worker);
    done()
}

pub(super) fn block_job_pause(call: &mut Call<'_>) -> Result<Value, QmpError> {
    block_job_verb(call, "device", Verb::Pause)
}

pub(super) fn block_job_resume(call: &mut Call<'_>) -> Result<Value, QmpError> {
    block_job_verb(call, "device", Verb::Resume)
}

pub(super) fn block_job_complete(call: &mut Call<'_>) -> Result<Value, QmpError> {
    block_job_verb(call, "device", Verb::Complete)
}

pub(super) fn block_job_finalize(call: &mut Call<'_>) -> Result<Value, QmpError> {
    block_job_verb(call, "id", Verb::Finalize)
}

pub(super) fn block_job_dismiss(call: &mut Call<'_>) -> Result<Value, QmpError> {
    block_job_verb(call, "id", Verb::Dismiss)
}

/// Refuses a change: a stream has no options that can be changed. `copy-mode` belongs only to the
/// type `mirror`.
pub(super) fn block_job_change(call: &mut Call<'_>) -> Result<Value, QmpError> {
    let id = call.arguments.mandatory_text("id");
    match (call.arguments.mandatory_text("type"), call.arguments.text("copy-mode")) {
        ("mirror", None) => return Err(QmpError::generic("Parameter 'copy-mode' is missing")),
        ("mirror", Some(_)) | (_, None) => {}
        (_, Some(_)) => return Err(QmpError::generic("Parameter 'copy-mode' is unexpected")),
    }
    call.target.jobs.check(id, Verb::Change).map_err(block_job(id))?;
    Err(QmpError::generic("Job type does not support change"))
}

pub(super) fn job_pause(call: &mut Call<'_>) -> Result<Value, QmpError> {
    job_verb(call, Verb::Pause)
}

pub(super) fn job_resume(call: &mut Call<'_>) -> Result<Value, QmpError> {
    job_verb(call, Verb::Resume)
}

pub(super) fn job_complete(call: &mut Call<'_>) -> Result<Value, QmpError> {
    job_verb(call, Verb::Complete)
}

pub(super) fn job_finalize(call: &mut Call<'_>) -> Result<Value, QmpError> {
    job_verb(call, Verb::Finalize)
}

pub(super) fn job_dismiss(call: &mut Call<'_>) -> Result<Value, QmpError> {
    job_verb(call, Verb::Dismiss)
}

pub(super) fn query_block_jobs(call: &mut Call<'_>) -> Result<Value, QmpError> {
    Ok(call.target.jobs.query().iter().map(|info| json::value(&BlockJobInfo::from(info))).collect())
}

impl From<&JobInfo> for BlockJobInfo {
    fn from(info: &JobInfo) -> BlockJobInfo {
        let JobInfo {
            progress,
            status,
            busy,
            paused,
            io_status,
            auto_finalize,
            auto_dismiss,
            error,
            ..
        } = info;
        BlockJobInfo {
            kind: progress.kind.into(),
            device: progress.id.clone(),
            len: progress.len,
            offset: progress.offset,
            busy: *busy,
            paused: *paused,
            speed: progress.speed,
            io_status: io_status_word(*io_status).into(),
            ready: false,
            status: status.to_string(),
            auto_finalize: *auto_finalize,
            auto_dismiss: *auto_dismiss,
            error: error.clone(),
        }
    }
}

pub(super) fn query_jobs(call: &mut Call<'_>) -> Result<Value, QmpError> {
    Ok(call.target.jobs.query().iter().map(job_info).collect())
}

fn job_info(info: &JobInfo) -> Value {
    let JobInfo { progress, status, error, .. } = info;
    let mut value = json!({
        "id": progress.id, "type": progress.kind, "status": status.to_string(),
        "current-progress": progress.offset, "total-progress": progress.len,
    });
    if let Some(error) = error {
        value["error"] = error.as_str().into();
    }
    value
}

pub(super) fn io_status_word(status: IoStatus) -> &'static str {
    match status {
        IoStatus::Ok => "ok",
        IoStatus::Failed => "failed",
        IoStatus::NoSpace => "nospace",
    }
}

pub(super) fn action_word(action: ErrorAction) -> &'static str {
    match action {
        ErrorAction::Report => "report",
        ErrorAction::Ignore => "ignore",
        ErrorAction::Stop => "stop",
    }
}
