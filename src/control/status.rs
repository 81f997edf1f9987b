//! `x-query-status` and `x-query-cells`: facts of the disk, its allocation and its requests.
//! Neither reads a backing file nor waits for a request.

use std::time::Duration;

use log::Level;
use serde_json::Value;

use super::call::{Call, Warning};
use super::codec::QmpError;
use super::facts::{
    BackingReads, BroughtFacts, ChainLayer, CopiedUp, DiskBytes, DiskCells, DiskStatus, GuestError,
    JobProgress, LastJob, LogMessage, PlanFacts, RequestFacts, StreamKeptBack, WaitedFacts,
};
use super::{json, queries};
use engine::chain::LayerInfo;
use engine::disk::{
    self, AllocationStatistics, CopyPause, DiskStats, GuestFailure, LATENCY_BOUNDS, MOST_CELLS,
    Totals,
};

pub(super) fn x_query_status(call: &mut Call<'_>) -> Result<Value, QmpError> {
    let info = queries::info(call)?;
    let target = call.target;
    let (disk, stats) = (&target.disk, target.disk.stats());
    let status = DiskStatus {
        device: target.device.clone(),
        image: info.path.to_string_lossy().into_owned(),
        mountpoint: Some(target.mountpoint.to_string_lossy().into_owned()),
        pid: Some(target.pid),
        version: Some(env!("CARGO_PKG_VERSION").into()),
        start_time: Some(target.started.into()),
        size: info.size,
        cluster_size: Some(info.cluster_size),
        allocated_size: Some(info.allocated_size),
        read_only: info.read_only,
        copy_on_read: Some(info.copy_on_read),
        copy_on_read_paused: disk.copy_pause().map(|pause| pause_word(pause).into()),
        image_deleted: info.deleted,
        chain: info.backing.iter().map(ChainLayer::from).collect(),
        sources: (target.sources)(),
        usable: Some(disk.is_usable()),
        answering: Some((target.is_answering)()),
        takeover: Some((target.takeover)()),
        bytes: match disk.totals() {
            Ok(totals) => Some(totals.into()),
            // The rest of the status is still useful. Logged at debug level, because a client may
            // ask often.
            Err(error) => {
                log::debug!("how much of the disk is local cannot be told: {error}");
                None
            }
        },
        requests: requests(&stats),
        latency_bounds_ns: LATENCY_BOUNDS.to_vec(),
        backing_reads: BackingReads {
            operations: stats.backing_reads.operations,
            bytes: stats.backing_reads.bytes,
            failed: stats.backing_reads.failed,
            total_time_ns: nanoseconds(stats.backing_reads.time),
        },
        hits: stats.hits(),
        misses: stats.misses,
        copied_up: CopiedUp {
            operations: stats.copied_up.operations,
            bytes: stats.copied_up.bytes,
            failed: stats.copied_up.failed,
        },
        brought: BroughtFacts {
            bytes: stats.brought.bytes,
            used: stats.brought.used,
            overwritten: stats.brought.overwritten,
        },
        waited: WaitedFacts {
            operations: stats.waited.operations,
            total_time_ns: nanoseconds(stats.waited.time),
        },
        commits: stats.commits,
        jobs: target.jobs.query().iter().map(JobProgress::from).collect(),
        last_job: target.jobs.last().as_ref().map(LastJob::from),
        plan: target.streams.plan().map(PlanFacts::from),
        stream_kept_back: target
            .streams
            .kept_back()
            .map(|kept| StreamKeptBack { offset: kept.offset, len: kept.len }),
        metrics: target.metrics.map(|address| address.to_string()),
        log: target.log.place.clone(),
        last_error: disk.last_failure().map(GuestError::from),
        last_warning: (target.log.last_warning)().map(LogMessage::from),
    };
    Ok(json::value(&status))
}

fn pause_word(pause: CopyPause) -> &'static str {
    match pause {
        CopyPause::Reserve => "reserve",
        CopyPause::Error => "error",
    }
}

impl From<&LayerInfo> for ChainLayer {
    fn from(layer: &LayerInfo) -> ChainLayer {
        let LayerInfo { path, format, size, deleted, changed, .. } = layer;
        let (filename, format) = (path.to_string_lossy().into_owned(), format.to_string());
        ChainLayer { filename, format, size: *size, deleted: *deleted, changed: *changed }
    }
}

impl From<Totals> for DiskBytes {
    fn from(Totals { local, zero, remote, age }: Totals) -> DiskBytes {
        DiskBytes {
            local,
            zero,
            remote,
            age_ms: u64::try_from(age.as_millis()).unwrap_or(u64::MAX),
        }
    }
}

impl From<GuestFailure> for GuestError {
    fn from(GuestFailure { time, operation, range, message }: GuestFailure) -> GuestError {
        let (offset, length) = range.unzip();
        GuestError { time: time.into(), operation: operation.into(), offset, length, message }
    }
}

impl From<Warning> for LogMessage {
    fn from(Warning { level, time, message }: Warning) -> LogMessage {
        let level = if level == Level::Error { "error" } else { "warning" };
        LogMessage { time: time.into(), level: level.into(), message }
    }
}

fn requests(stats: &DiskStats) -> Vec<RequestFacts> {
    let kinds = [
        ("read", &stats.reads),
        ("write", &stats.writes),
        ("flush", &stats.flushes),
        ("discard", &stats.discards),
    ];
    let count = |(kind, count): (&str, &disk::RequestCount)| RequestFacts {
        kind: kind.into(),
        operations: count.operations,
        bytes: count.bytes,
        failed: count.failed,
        total_time_ns: nanoseconds(count.time),
        latency: count.latency.to_vec(),
    };
    kinds.into_iter().map(count).collect()
}

/// Returns a time in nanoseconds, as replies contain it.
pub(super) fn nanoseconds(time: Duration) -> u64 {
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)
}

pub(super) fn x_query_cells(call: &mut Call<'_>) -> Result<Value, QmpError> {
    let cells = in_range(call, "cells", None, 1..=MOST_CELLS)?;
    let statistics = call
        .target
        .disk
        .allocation_statistics(cells)
        .map_err(|error| QmpError::generic(error.to_string()))?;
    let AllocationStatistics { size, cell_size, local, zero } = &*statistics;
    Ok(json::value(&DiskCells {
        size: *size,
        cell_size: *cell_size,
        local: local.clone(),
        zero: zero.clone(),
    }))
}

/// Returns an integer argument within `range`. It may be omitted if there is a `default`.
pub(super) fn in_range(
    call: &Call<'_>,
    name: &str,
    default: Option<u64>,
    range: std::ops::RangeInclusive<u64>,
) -> Result<u64, QmpError> {
    let given = call.arguments.integer(name);
    let value = match given {
        Some(value) => u64::try_from(value).ok(),
        None => default,
    };
    value.filter(|value| range.contains(value)).ok_or_else(|| {
        let (least, most) = range.into_inner();
        QmpError::generic(format!("Parameter '{name}' expects a value between {least} and {most}"))
    })
}
