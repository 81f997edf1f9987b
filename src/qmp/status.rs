//! The disk as a whole, and in cells: what it is, how much of it is here, what was asked of it. Never asks a backing file, nor waits for a request.

use std::time::Duration;

use log::Level;
use serde_json::{Value, json};

use super::call::{Call, Troubles};
use super::codec::{self, Refusal};
use super::statistics::nanoseconds;
use super::{plan, progress, queries};
use crate::chain::LayerInfo;
use crate::disk::{CopyPause, DiskStats, GuestFailure, LATENCY_BOUNDS, MOST_CELLS, RequestCount, Survey, Totals};
use crate::format::BackingFormat;
use crate::logging::Warning;

pub(super) fn x_query_status(call: &mut Call<'_>) -> Result<Value, Refusal> {
    let info = queries::info(call)?;
    let (facts, jobs, stats) = (&call.backend.facts, &call.backend.jobs, (call.backend.stats)());
    let mut status = json!({
        "device": call.backend.device, "image": info.path.to_string_lossy(), "mountpoint": facts.mountpoint.to_string_lossy(),
        "pid": std::process::id(), "version": env!("CARGO_PKG_VERSION"), "start-time": codec::timestamp(facts.started),
        "size": info.size, "cluster-size": info.cluster_size, "allocated-size": info.allocated_size,
        "read-only": info.read_only, "copy-on-read": info.copy_on_read, "image-deleted": info.deleted,
        "chain": info.backing.iter().map(layer).collect::<Value>(), "usable": (facts.is_usable)(),
        "answering": (facts.is_answering)(),
        "requests": requests(&stats), "latency-bounds-ns": LATENCY_BOUNDS, "backing-reads": backing_reads(&stats.backing_reads),
        "hits": stats.hits(), "misses": stats.misses, "commits": stats.commits,
        "copied-up": { "operations": stats.copied_up.operations, "bytes": stats.copied_up.bytes, "failed": stats.copied_up.failed },
        "jobs": jobs.query().iter().map(progress::progress).collect::<Value>(),
    });
    match (facts.totals)() {
        Ok(Totals { local, zero, remote, age }) => {
            status["bytes"] = json!({ "local": local, "zero": zero, "remote": remote, "age-ms": milliseconds(age) });
        }
        // All else is still worth telling, and a client may ask often.
        Err(error) => log::debug!("how much of the disk is local cannot be told: {error}"),
    }
    if let Some(last) = jobs.last() {
        status["last-job"] = progress::last_job(&last);
    }
    if let Some(plan) = call.backend.streams.plan() {
        status["plan"] = plan::facts(&plan);
    }
    if let Some(kept) = call.backend.streams.kept_back() {
        status["stream-kept-back"] = json!({ "offset": kept.offset, "len": kept.len });
    }
    if let Some(address) = facts.metrics {
        status["metrics"] = address.to_string().into();
    }
    if let Some(log) = &facts.log {
        status["log"] = log.as_str().into();
    }
    add_troubles(&mut status, &(facts.troubles)());
    Ok(status)
}

fn add_troubles(status: &mut Value, troubles: &Troubles) {
    if let Some(pause) = troubles.copy_pause {
        status["copy-on-read-paused"] = match pause {
            CopyPause::Reserve => "reserve",
            CopyPause::Error => "error",
        }
        .into();
    }
    if let Some(GuestFailure { time, operation, range, message }) = &troubles.failure {
        let mut failure = json!({ "time": codec::timestamp(*time), "operation": operation, "message": message });
        if let Some((offset, length)) = range {
            (failure["offset"], failure["length"]) = ((*offset).into(), (*length).into());
        }
        status["last-error"] = failure;
    }
    if let Some(Warning { level, time, message }) = &troubles.warning {
        let level = if *level == Level::Error { "error" } else { "warning" };
        status["last-warning"] = json!({ "time": codec::timestamp(*time), "level": level, "message": message });
    }
}

fn layer(layer: &LayerInfo) -> Value {
    let format = match layer.format {
        BackingFormat::Raw => "raw",
        BackingFormat::Qcow2 => "qcow2",
    };
    json!({
        "filename": layer.path.to_string_lossy(),
        "format": format,
        "size": layer.size,
        "deleted": layer.deleted,
        "changed": layer.changed,
    })
}

fn requests(stats: &DiskStats) -> Value {
    let kinds = [("read", &stats.reads), ("write", &stats.writes), ("flush", &stats.flushes), ("discard", &stats.discards)];
    let count = |(kind, count): (&str, &RequestCount)| {
        json!({
            "kind": kind, "operations": count.operations, "bytes": count.bytes, "failed": count.failed,
            "total-time-ns": nanoseconds(count.time), "latency": count.latency,
        })
    };
    kinds.into_iter().map(count).collect()
}

fn backing_reads(count: &RequestCount) -> Value {
    json!({ "operations": count.operations, "bytes": count.bytes, "failed": count.failed, "total-time-ns": nanoseconds(count.time) })
}

fn milliseconds(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}

pub(super) fn x_query_cells(call: &mut Call<'_>) -> Result<Value, Refusal> {
    let cells = in_range(call, "cells", None, 1..=MOST_CELLS)?;
    let survey = (call.backend.facts.survey)(cells).map_err(|error| Refusal::generic(error.to_string()))?;
    let Survey { size, cell_size, local, zero } = &*survey;
    Ok(json!({ "size": size, "cell-size": cell_size, "local": local, "zero": zero }))
}

/// A number that a client may choose within bounds, or leave out where there is a `default`.
pub(super) fn in_range(call: &Call<'_>, name: &str, default: Option<u64>, range: std::ops::RangeInclusive<u64>) -> Result<u64, Refusal> {
    let given = call.arguments.integer(name);
    let value = match given {
        Some(value) => u64::try_from(value).ok(),
        None => default,
    };
    value.filter(|value| range.contains(value)).ok_or_else(|| {
        let (least, most) = range.into_inner();
        Refusal::generic(format!("Parameter '{name}' expects a value between {least} and {most}"))
    })
}
