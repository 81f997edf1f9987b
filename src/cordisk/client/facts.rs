//! The facts that a daemon reports about its disk and about a job.

use std::time::Duration;

use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

use crate::map::{Cells, Shares, units};
use control::connection::Connection;
use control::facts::{
    BlockDeviceInfo, BlockInfo, BlockJobInfo, DiskCells, DiskStatus, GuestError, ImageInfo,
    JobProgress, LastJob, Timestamp,
};
use host::{Error, ErrorKind, Result};

/// A job, and the error that has paused it.
#[derive(Clone, Debug, Default)]
pub(super) struct JobFacts {
    pub(super) progress: JobProgress,
    /// `ok`, `failed` or `nospace`.
    pub(super) io_status: String,
}

impl JobFacts {
    /// Explains why the job is paused, and how to resume it.
    pub(super) fn why_paused(&self, target: &str) -> String {
        let resume = format!("`cordisk job resume {target}` goes on");
        match self.io_status.as_str() {
            "nospace" => {
                format!("paused: no space left where the image lies; make room, then {resume}")
            }
            "failed" => match &self.progress.error_detail {
                Some(detail) => {
                    format!("paused by an error of reading or writing ({detail}); {resume}")
                }
                None => format!(
                    "paused by an error of reading or writing (the daemon's log has it); {resume}"
                ),
            },
            _ => format!("paused; {resume}"),
        }
    }
}

/// Describes a fact in words.
pub(super) trait InWords {
    /// Returns the description.
    fn in_words(&self) -> String;
}

impl InWords for GuestError {
    /// For example `read of 65536 bytes at 1310720: base.qcow2: …`.
    fn in_words(&self) -> String {
        let place = match (self.offset, self.length) {
            (Some(offset), Some(0)) => format!(" at {offset}"),
            (Some(offset), Some(length)) => format!(" of {length} bytes at {offset}"),
            _ => String::new(),
        };
        format!("{}{place}: {}", self.operation, self.message)
    }
}

impl InWords for LastJob {
    /// Says how the job ended, and when.
    fn in_words(&self) -> String {
        let ago = ago(self.end_time);
        let at = || units::percent(self.offset, self.len);
        match self.result.as_str() {
            "success" => format!(
                "stream completed {ago}: {} in {}",
                units::size(self.len),
                units::duration(took(self))
            ),
            "cancelled" => format!("stream cancelled {ago} at {}", at()),
            _ => format!("stream failed {ago} at {}: {}", at(), why_failed(self)),
        }
    }
}

/// Returns how long a job that has ended took.
pub(super) fn took(job: &LastJob) -> Duration {
    job.end_time.time().duration_since(job.start_time.time()).unwrap_or_default()
}

/// Returns why a job has failed: the file and the offset, if the daemon reports them.
pub(super) fn why_failed(job: &LastJob) -> &str {
    job.error_detail.as_deref().or(job.error.as_deref()).unwrap_or("no reason was given")
}

/// Describes how long ago `at` was.
pub(super) fn ago(at: Timestamp) -> String {
    match age(at) {
        age if age.as_secs() == 0 => "just now".to_owned(),
        age => format!("{} ago", units::duration(age)),
    }
}

/// Returns the time since `at`.
pub(super) fn age(at: Timestamp) -> Duration {
    at.time().elapsed().unwrap_or_default()
}

/// Returns how many bytes of the disk are local, zero and remote, if the daemon knows.
pub(super) fn shares(status: &DiskStatus) -> Option<Shares> {
    status.bytes.map(|bytes| Shares { local: bytes.local, zero: bytes.zero, remote: bytes.remote })
}

/// Returns the answer to `x-query-status`. For an older daemon, returns the facts that its other
/// commands give.
///
/// # Errors
/// Those of [`Connection::execute`].
pub(super) fn query(connection: &mut Connection) -> Result<Value> {
    match connection.ask("x-query-status", json!({}))? {
        Ok(facts) => Ok(facts),
        Err(refusal) if refusal.is_unknown_command() => from_blocks(connection),
        Err(refusal) => Err(Error::new(
            ErrorKind::Io,
            format!("{}: {}", connection.name(), refusal.description),
        )),
    }
}

/// Returns the facts in an answer of [`query`].
///
/// # Errors
/// Those of [`query`] and [`read`].
pub(super) fn status(connection: &mut Connection) -> Result<DiskStatus> {
    read(query(connection)?, connection.name())
}

/// Parses an answer of the daemon into the expected type. `name` names the disk in messages.
///
/// # Errors
/// The answer has another shape.
pub(super) fn read<T: DeserializeOwned>(answer: Value, name: &str) -> Result<T> {
    serde_json::from_value(answer)
        .map_err(|error| Error::wrap(ErrorKind::InvalidArgument, of_another_version(name), error))
}

/// Returns the error text for an answer that cannot be parsed.
pub(super) fn of_another_version(name: &str) -> String {
    format!("{name}: the daemon's answer is of another version of cordisk")
}

/// Returns the map of a disk in at most `cells` cells.
///
/// # Errors
/// Those of [`Connection::execute`] and [`read`].
pub(super) fn cells(connection: &mut Connection, cells: u64) -> Result<Cells> {
    let answer =
        connection.execute("x-query-cells", json!({ "cells": cells.clamp(1, Cells::MOST) }))?;
    let DiskCells { size, cell_size, local, zero } = read(answer, connection.name())?;
    Cells::new(size, cell_size, local, zero)
}

fn from_blocks(connection: &mut Connection) -> Result<Value> {
    let Block { device, read_only, image } = block(connection)?;
    let layers = std::iter::successors(image.backing_image.as_deref(), |layer| {
        layer.backing_image.as_deref()
    });
    let chain: Vec<_> = layers
        .map(|layer| {
            json!({ "filename": layer.filename, "format": layer.format, "size": layer.virtual_size })
        })
        .collect();
    let mut facts = json!({
        "device": device, "image": image.filename, "size": image.virtual_size, "cluster-size": image.cluster_size,
        "allocated-size": image.actual_size, "read-only": read_only, "chain": chain, "jobs": [],
    });
    if let Ok(jobs) = connection.ask("x-query-job-progress", json!({}))? {
        facts["jobs"] = jobs;
    }
    if let Some(last) = last_job_value(connection)? {
        facts["last-job"] = last;
    }
    Ok(facts)
}

/// The facts of a disk in an answer to `query-block`.
pub(super) struct Block {
    /// The name of the device.
    pub(super) device: String,
    /// The disk was mounted read-only.
    pub(super) read_only: bool,
    /// Facts of the overlay, and in it those of the images below.
    pub(super) image: ImageInfo,
}

/// Returns the facts of the disk from `query-block`.
///
/// # Errors
/// Those of [`Connection::execute`] and [`read`]; the answer has no disk.
pub(super) fn block(connection: &mut Connection) -> Result<Block> {
    let blocks = connection.execute("query-block", json!({}))?;
    let blocks: Vec<BlockInfo> = read(blocks, connection.name())?;
    let block = blocks.into_iter().next().unwrap_or_default();
    let Some(BlockDeviceInfo { ro, image, .. }) = block.inserted else {
        let text = of_another_version(connection.name());
        return Err(Error::new(ErrorKind::InvalidArgument, text));
    };
    Ok(Block { device: block.device, read_only: ro, image })
}

/// Returns the job of the disk, if there is one.
///
/// # Errors
/// Those of [`Connection::execute`] and [`read`].
pub(super) fn job(connection: &mut Connection) -> Result<Option<JobFacts>> {
    let jobs = connection.execute("query-block-jobs", json!({}))?;
    let jobs: Vec<BlockJobInfo> = read(jobs, connection.name())?;
    let Some(job) = jobs.into_iter().next() else { return Ok(None) };
    let BlockJobInfo { kind, device: id, len, offset, speed, io_status, status, .. } = job;
    let mut progress =
        JobProgress { id, kind, status, speed, offset, len, ..JobProgress::default() };
    // Another command reports how much was really copied, and how fast.
    if let Some(detail) = progress_of(connection, &progress.id)?.as_ref().map(as_progress) {
        let JobProgress { bytes_failed, rate, bytes_left, seconds_left, error_detail, .. } = detail;
        progress =
            JobProgress { bytes_failed, rate, bytes_left, seconds_left, error_detail, ..progress };
    }
    Ok(Some(JobFacts { progress, io_status }))
}

/// Returns the job `id` from `x-query-job-progress`, if it exists.
///
/// # Errors
/// Those of [`Connection::ask`].
pub(super) fn progress_of(connection: &mut Connection, id: &str) -> Result<Option<Value>> {
    let jobs = connection.ask("x-query-job-progress", json!({}))?.unwrap_or_default();
    Ok(jobs.as_array().and_then(|jobs| jobs.iter().find(|job| job["id"] == id)).cloned())
}

/// Parses a job from an answer or an event. Missing members are empty.
pub(super) fn as_progress(value: &Value) -> JobProgress {
    JobProgress::deserialize(value).unwrap_or_default()
}

/// Returns the job that ended last.
///
/// # Errors
/// Those of [`Connection::ask`].
pub(super) fn last_job(connection: &mut Connection) -> Result<Option<LastJob>> {
    Ok(last_job_value(connection)?.and_then(|value| LastJob::deserialize(&value).ok()))
}

/// Returns the answer from which [`last_job`] is parsed.
///
/// # Errors
/// Those of [`Connection::ask`].
pub(super) fn last_job_value(connection: &mut Connection) -> Result<Option<Value>> {
    Ok(connection.ask("x-query-last-job", json!({}))?.ok())
}
