//! Commands about jobs. `block-job-*` and `job-*` differ in the name of their argument and in what they say of a job that is not there.

use std::time::Duration;

use serde_json::{Value, json};

use super::call::Call;
use super::codec::{Class, Refusal};
use crate::job::{ErrorAction, Force, IoStatus, JobError, JobInfo, Verb, Worker};

/// How long a reply waits for the events of what was asked, which come first where the job slept (QEMU runs a sleeping job to its end at once).
/// Long enough for a worker to clean up, short enough for a client to bear a hung disk.
pub(super) const SETTLE: Duration = Duration::from_secs(5);

/// The dialect of `block-job-*`.
fn block_job(id: &str) -> impl Fn(JobError) -> Refusal {
    let id = id.to_string();
    move |error| match error {
        JobError::NotFound => Refusal::new(Class::DeviceNotActive, format!("Block job '{id}' not found")),
        error => Refusal::generic(error.to_string()),
    }
}

/// The dialect of `job-*`.
fn job(error: JobError) -> Refusal {
    Refusal::generic(error.to_string())
}

fn done() -> Result<Value, Refusal> {
    Ok(json!({}))
}

fn block_job_verb(call: &mut Call<'_>, argument: &str, verb: Verb) -> Result<Value, Refusal> {
    hold(call, verb);
    let id = call.arguments.mandatory_text(argument);
    let worker = call.backend.jobs.apply(id, verb).map_err(block_job(id))?;
    noted(call, id, verb);
    settle(call, id, verb, worker);
    done()
}

fn job_verb(call: &mut Call<'_>, verb: Verb) -> Result<Value, Refusal> {
    hold(call, verb);
    let id = call.arguments.mandatory_text("id");
    let worker = call.backend.jobs.apply(id, verb).map_err(job)?;
    noted(call, id, verb);
    settle(call, id, verb, worker);
    done()
}

/// A stream that is paused is so after a restart, too, when the reply is sent.
fn noted(call: &Call<'_>, id: &str, verb: Verb) {
    if matches!(verb, Verb::Pause | Verb::Resume) {
        call.backend.streams.changed(id);
    }
}

/// What sets a job to work is answered before that work shows.
fn hold(call: &mut Call<'_>, verb: Verb) {
    if matches!(verb, Verb::Resume | Verb::SetSpeed) {
        call.session.hold = Some(call.backend.jobs.hold());
    }
}

/// What ends a job that sleeps has ended it when the reply is sent.
fn settle(call: &Call<'_>, id: &str, verb: Verb, worker: Worker) {
    if matches!(verb, Verb::Cancel | Verb::Finalize) && worker == Worker::Asleep {
        call.backend.jobs.settle(id, SETTLE);
    }
}

pub(super) fn block_job_set_speed(call: &mut Call<'_>) -> Result<Value, Refusal> {
    hold(call, Verb::SetSpeed);
    let id = call.arguments.mandatory_text("device");
    let speed = call.arguments.integer("value").or(call.arguments.integer("speed"));
    let speed = speed.ok_or_else(|| Refusal::generic("Parameter 'value' is missing"))?;
    call.backend.jobs.check(id, Verb::SetSpeed).map_err(block_job(id))?;
    call.backend.streams.set_speed(id, non_negative(speed)?).map_err(block_job(id))?;
    done()
}

/// A speed in bytes per second.
pub(super) fn non_negative(speed: i64) -> Result<u64, Refusal> {
    u64::try_from(speed).map_err(|_| Refusal::generic("Parameter 'speed' expects a non-negative value"))
}

pub(super) fn block_job_cancel(call: &mut Call<'_>) -> Result<Value, Refusal> {
    let id = call.arguments.mandatory_text("device");
    let force = if call.arguments.boolean("force") == Some(true) { Force::Yes } else { Force::No };
    let worker = call.backend.jobs.cancel(id, force).map_err(block_job(id))?;
    settle(call, id, Verb::Cancel, worker);
    done()
}

pub(super) fn job_cancel(call: &mut Call<'_>) -> Result<Value, Refusal> {
    let id = call.arguments.mandatory_text("id");
    let worker = call.backend.jobs.cancel(id, Force::Yes).map_err(job)?;
    settle(call, id, Verb::Cancel, worker);
    done()
}

pub(super) fn block_job_pause(call: &mut Call<'_>) -> Result<Value, Refusal> {
    block_job_verb(call, "device", Verb::Pause)
}

pub(super) fn block_job_resume(call: &mut Call<'_>) -> Result<Value, Refusal> {
    block_job_verb(call, "device", Verb::Resume)
}

pub(super) fn block_job_complete(call: &mut Call<'_>) -> Result<Value, Refusal> {
    block_job_verb(call, "device", Verb::Complete)
}

pub(super) fn block_job_finalize(call: &mut Call<'_>) -> Result<Value, Refusal> {
    block_job_verb(call, "id", Verb::Finalize)
}

pub(super) fn block_job_dismiss(call: &mut Call<'_>) -> Result<Value, Refusal> {
    block_job_verb(call, "id", Verb::Dismiss)
}

/// Nothing of a stream can be changed this way. `copy-mode` belongs to the type `mirror`, and to no other.
pub(super) fn block_job_change(call: &mut Call<'_>) -> Result<Value, Refusal> {
    let id = call.arguments.mandatory_text("id");
    match (call.arguments.mandatory_text("type"), call.arguments.text("copy-mode")) {
        ("mirror", None) => return Err(Refusal::generic("Parameter 'copy-mode' is missing")),
        ("mirror", Some(_)) | (_, None) => {}
        (_, Some(_)) => return Err(Refusal::generic("Parameter 'copy-mode' is unexpected")),
    }
    call.backend.jobs.check(id, Verb::Change).map_err(block_job(id))?;
    Err(Refusal::generic("Job type does not support change"))
}

pub(super) fn job_pause(call: &mut Call<'_>) -> Result<Value, Refusal> {
    job_verb(call, Verb::Pause)
}

pub(super) fn job_resume(call: &mut Call<'_>) -> Result<Value, Refusal> {
    job_verb(call, Verb::Resume)
}

pub(super) fn job_complete(call: &mut Call<'_>) -> Result<Value, Refusal> {
    job_verb(call, Verb::Complete)
}

pub(super) fn job_finalize(call: &mut Call<'_>) -> Result<Value, Refusal> {
    job_verb(call, Verb::Finalize)
}

pub(super) fn job_dismiss(call: &mut Call<'_>) -> Result<Value, Refusal> {
    job_verb(call, Verb::Dismiss)
}

pub(super) fn query_block_jobs(call: &mut Call<'_>) -> Result<Value, Refusal> {
    Ok(call.backend.jobs.query().iter().map(block_job_info).collect())
}

fn block_job_info(info: &JobInfo) -> Value {
    let JobInfo { progress, status, busy, paused, io_status, auto_finalize, auto_dismiss, error, .. } = info;
    let mut value = json!({
        "type": progress.kind, "device": progress.id, "len": progress.len, "offset": progress.offset, "speed": progress.speed,
        "busy": busy, "paused": paused, "io-status": io_status_word(*io_status), "ready": false, "status": status.to_string(),
        "auto-finalize": auto_finalize, "auto-dismiss": auto_dismiss,
    });
    if let Some(error) = error {
        value["error"] = error.as_str().into();
    }
    value
}

pub(super) fn query_jobs(call: &mut Call<'_>) -> Result<Value, Refusal> {
    Ok(call.backend.jobs.query().iter().map(job_info).collect())
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
