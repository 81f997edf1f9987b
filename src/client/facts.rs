//! What a daemon tells of its disk, and of a job.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

use super::connection::Connection;
use crate::map::{Cells, Shares, units};
use crate::{Error, ErrorKind, Result};

/// `x-query-status`. What an older daemon does not tell is absent, or nothing.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "kebab-case", default)]
pub(super) struct Facts {
    pub(super) device: String,
    pub(super) image: String,
    pub(super) mountpoint: Option<String>,
    pub(super) pid: Option<u32>,
    pub(super) version: Option<String>,
    pub(super) start_time: Option<Timestamp>,
    pub(super) size: u64,
    pub(super) cluster_size: Option<u64>,
    pub(super) allocated_size: Option<u64>,
    pub(super) read_only: bool,
    pub(super) copy_on_read: Option<bool>,
    /// `reserve` or `error`.
    pub(super) copy_on_read_paused: Option<String>,
    pub(super) image_deleted: bool,
    pub(super) chain: Vec<Layer>,
    pub(super) usable: Option<bool>,
    pub(super) answering: Option<bool>,
    pub(super) bytes: Option<Shares>,
    pub(super) requests: Vec<Requests>,
    pub(super) latency_bounds_ns: Vec<u64>,
    pub(super) backing_reads: Count,
    pub(super) hits: u64,
    pub(super) misses: u64,
    pub(super) copied_up: Count,
    pub(super) jobs: Vec<Job>,
    pub(super) last_job: Option<LastJob>,
    pub(super) plan: Option<Plan>,
    pub(super) stream_kept_back: Option<KeptBack>,
    pub(super) metrics: Option<String>,
    pub(super) log: Option<String>,
    pub(super) last_error: Option<GuestError>,
    pub(super) last_warning: Option<LogMessage>,
}

/// A stream that goes on at another mount.
#[derive(Clone, Copy, Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct KeptBack {
    pub(super) offset: u64,
    pub(super) len: u64,
}

/// The request of the guest that failed last.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct GuestError {
    pub(super) time: Timestamp,
    operation: String,
    offset: Option<u64>,
    length: Option<u64>,
    message: String,
}

impl GuestError {
    /// `read of 65536 bytes at 1310720: base.qcow2: …`.
    pub(super) fn in_words(&self) -> String {
        let place = match (self.offset, self.length) {
            (Some(offset), Some(0)) => format!(" at {offset}"),
            (Some(offset), Some(length)) => format!(" of {length} bytes at {offset}"),
            _ => String::new(),
        };
        format!("{}{place}: {}", self.operation, self.message)
    }
}

/// What a daemon has logged.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct LogMessage {
    pub(super) time: Timestamp,
    pub(super) message: String,
}

impl Facts {
    /// Requests for the disk wait, and none of them is answered.
    pub(super) fn is_hung(&self) -> bool {
        self.answering == Some(false)
    }

    /// Writing to the image has failed, and nothing more is written.
    pub(super) fn has_failed(&self) -> bool {
        self.usable == Some(false)
    }
}

#[derive(Clone, Copy, Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct Timestamp {
    seconds: u64,
    microseconds: u64,
}

impl Timestamp {
    pub(super) fn time(self) -> SystemTime {
        let since = Duration::from_secs(self.seconds).saturating_add(Duration::from_micros(self.microseconds));
        UNIX_EPOCH.checked_add(since).unwrap_or(UNIX_EPOCH)
    }

    /// How long ago it was, in words.
    pub(super) fn ago(self) -> String {
        match self.age() {
            age if age.as_secs() == 0 => "just now".to_owned(),
            age => format!("{} ago", units::duration(age)),
        }
    }

    /// How long ago it was.
    pub(super) fn age(self) -> Duration {
        self.time().elapsed().unwrap_or_default()
    }
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct Layer {
    pub(super) filename: String,
    pub(super) format: String,
    pub(super) size: u64,
    pub(super) deleted: bool,
    /// It was changed while it is in use.
    pub(super) changed: bool,
}

/// Requests of one kind since the daemon has started.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "kebab-case", default)]
pub(super) struct Requests {
    pub(super) kind: String,
    pub(super) operations: u64,
    pub(super) bytes: u64,
    pub(super) failed: u64,
    pub(super) total_time_ns: u64,
    /// How many took how long: one more than there are bounds.
    pub(super) latency: Vec<u64>,
}

/// What was done to answer them.
#[derive(Clone, Copy, Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct Count {
    pub(super) bytes: u64,
}

/// One job, of `x-query-job-progress`, `X_JOB_PROGRESS` or `query-block-jobs`.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "kebab-case", default)]
pub(super) struct Job {
    #[serde(alias = "device")]
    pub(super) id: String,
    #[serde(rename = "type")]
    pub(super) kind: String,
    pub(super) status: String,
    pub(super) speed: u64,
    pub(super) offset: u64,
    pub(super) len: u64,
    pub(super) bytes_failed: u64,
    pub(super) rate: u64,
    /// Bytes that have still to be copied; unknown at first.
    pub(super) bytes_left: Option<u64>,
    pub(super) seconds_left: Option<u64>,
    /// The error that has stopped it, with file and offset; not of `query-block-jobs`.
    pub(super) error_detail: Option<String>,
    /// `ok`, `failed` or `nospace`; of `query-block-jobs` only.
    pub(super) io_status: Option<String>,
}

impl Job {
    /// Told to pause, or paused by an error.
    pub(super) fn is_paused(&self) -> bool {
        matches!(self.status.as_str(), "paused" | "standby")
    }

    /// At its end, and there until a client dismisses it.
    pub(super) fn is_concluded(&self) -> bool {
        self.status == "concluded"
    }

    /// Why it is paused, and what to do.
    pub(super) fn why_paused(&self, target: &str) -> String {
        let resume = format!("`cordisk job resume {target}` goes on");
        match self.io_status.as_deref() {
            Some("nospace") => format!("paused: no space left where the image lies; make room, then {resume}"),
            Some("failed") => match &self.error_detail {
                Some(detail) => format!("paused by an error of reading or writing ({detail}); {resume}"),
                None => format!("paused by an error of reading or writing (the daemon's log has it); {resume}"),
            },
            _ => format!("paused; {resume}"),
        }
    }
}

/// `x-query-last-job`.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "kebab-case", default)]
pub(super) struct LastJob {
    pub(super) id: String,
    pub(super) result: String,
    pub(super) error: Option<String>,
    pub(super) error_detail: Option<String>,
    pub(super) offset: u64,
    pub(super) len: u64,
    pub(super) bytes_copied: u64,
    pub(super) start_time: Timestamp,
    pub(super) end_time: Timestamp,
}

impl LastJob {
    pub(super) fn took(&self) -> Duration {
        self.end_time.time().duration_since(self.start_time.time()).unwrap_or_default()
    }

    /// What became of it, and when.
    pub(super) fn in_words(&self) -> String {
        let ago = self.end_time.ago();
        let at = || units::percent(self.offset, self.len);
        match self.result.as_str() {
            "success" => format!("stream completed {ago}: {} in {}", units::size(self.len), units::duration(self.took())),
            "cancelled" => format!("stream cancelled {ago} at {}", at()),
            _ => format!("stream failed {ago} at {}: {}", at(), self.why()),
        }
    }

    /// Why it failed: the file and the offset, where the daemon says so.
    pub(super) fn why(&self) -> &str {
        self.error_detail.as_deref().or(self.error.as_deref()).unwrap_or("no reason was given")
    }
}

/// What governs the speed of a job over time.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "kebab-case", default)]
pub(super) struct Plan {
    pub(super) schedule: Option<String>,
    pub(super) finish_by: Option<String>,
    pub(super) needed: Option<u64>,
    pub(super) feasible: Option<bool>,
}

/// `x-query-status`, or as much of it as an older daemon can tell.
///
/// # Errors
/// Those of [`Connection::execute`].
pub(super) fn query(connection: &mut Connection) -> Result<Value> {
    match connection.ask("x-query-status", json!({}))? {
        Ok(facts) => Ok(facts),
        Err(refusal) if refusal.is_unknown_command() => from_blocks(connection),
        Err(refusal) => Err(Error::new(ErrorKind::Io, format!("{}: {}", connection.name(), refusal.description))),
    }
}

/// The facts in an answer of [`query`].
///
/// # Errors
/// Those of [`query`] and [`read`].
pub(super) fn status(connection: &mut Connection) -> Result<Facts> {
    read(query(connection)?, connection.name())
}

/// What the daemon of the disk that messages call `name` has answered, in the shape that is expected.
///
/// # Errors
/// It has another one.
pub(super) fn read<T: DeserializeOwned>(answer: Value, name: &str) -> Result<T> {
    serde_json::from_value(answer).map_err(|error| Error::wrap(ErrorKind::InvalidArgument, of_another_version(name), error))
}

/// The error for an answer that makes no sense here.
pub(super) fn of_another_version(name: &str) -> String {
    format!("{name}: the daemon's answer is of another version of cordisk")
}

/// The map of a disk in at most so many cells.
///
/// # Errors
/// Those of [`Connection::execute`] and [`read`].
pub(super) fn cells(connection: &mut Connection, cells: u64) -> Result<Cells> {
    #[derive(Deserialize)]
    #[serde(rename_all = "kebab-case")]
    struct Answer {
        size: u64,
        cell_size: u64,
        local: Vec<u64>,
        zero: Vec<u64>,
    }
    let answer = connection.execute("x-query-cells", json!({ "cells": cells.clamp(1, Cells::MOST) }))?;
    let Answer { size, cell_size, local, zero } = read(answer, connection.name())?;
    Cells::new(size, cell_size, local, zero)
}

fn from_blocks(connection: &mut Connection) -> Result<Value> {
    let blocks = connection.execute("query-block", json!({}))?;
    let (device, inserted) = (&blocks[0]["device"], &blocks[0]["inserted"]);
    let image = &inserted["image"];
    let mut chain = Vec::new();
    let mut layer = &image["backing-image"];
    while layer.is_object() {
        chain.push(json!({ "filename": layer["filename"], "format": layer["format"], "size": layer["virtual-size"] }));
        layer = &layer["backing-image"];
    }
    let mut facts = json!({
        "device": device, "image": image["filename"], "size": image["virtual-size"], "cluster-size": image["cluster-size"],
        "allocated-size": image["actual-size"], "read-only": inserted["ro"], "chain": chain, "jobs": [],
    });
    if let Ok(jobs) = connection.ask("x-query-job-progress", json!({}))? {
        facts["jobs"] = jobs;
    }
    if let Some(last) = last_job_value(connection)? {
        facts["last-job"] = last;
    }
    Ok(facts)
}

/// The name of the device.
///
/// # Errors
/// Those of [`Connection::execute`].
pub(super) fn device(connection: &mut Connection) -> Result<String> {
    let blocks = connection.execute("query-block", json!({}))?;
    Ok(blocks[0]["device"].as_str().unwrap_or_default().to_owned())
}

/// The one job there is, or none.
///
/// # Errors
/// Those of [`Connection::execute`].
pub(super) fn job(connection: &mut Connection) -> Result<Option<Job>> {
    let jobs = connection.execute("query-block-jobs", json!({}))?;
    let Some(first) = jobs.as_array().and_then(|jobs| jobs.first()) else { return Ok(None) };
    let mut job = as_job(first);
    // What was really copied, and how fast, is told elsewhere.
    if let Ok(details) = connection.ask("x-query-job-progress", json!({}))?
        && let Some(detail) = details.as_array().and_then(|details| details.iter().find(|detail| detail["id"] == job.id.as_str()))
    {
        let detail = as_job(detail);
        (job.rate, job.bytes_left, job.seconds_left) = (detail.rate, detail.bytes_left, detail.seconds_left);
        job.error_detail = detail.error_detail;
    }
    Ok(Some(job))
}

/// A job, as an answer or an event has it. What is not there is empty.
pub(super) fn as_job(value: &Value) -> Job {
    Job::deserialize(value).unwrap_or_default()
}

/// The job that ended last.
///
/// # Errors
/// Those of [`Connection::ask`].
pub(super) fn last_job(connection: &mut Connection) -> Result<Option<LastJob>> {
    Ok(last_job_value(connection)?.and_then(|value| LastJob::deserialize(&value).ok()))
}

/// As [`last_job`], as the daemon says it.
///
/// # Errors
/// Those of [`Connection::ask`].
pub(super) fn last_job_value(connection: &mut Connection) -> Result<Option<Value>> {
    Ok(connection.ask("x-query-last-job", json!({}))?.ok())
}
