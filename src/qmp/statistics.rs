//! Counters in the words of QEMU's `BlockDeviceStats`.

use std::time::Duration;

use serde_json::{Value, json};

use super::call::Call;
use super::codec::Refusal;
use super::nodes;
use super::queries;
use crate::disk::{DiskStats, RequestCount};

/// The device with what lies below it nested, or every node by itself.
pub(super) fn query_blockstats(call: &mut Call<'_>) -> Result<Value, Refusal> {
    let layers = queries::info(call)?.backing.len();
    let counted = (call.backend.stats)();
    // Who reads from below reads from the first layer; what that one had to ask further down is not told apart.
    let stats = |depth| match depth {
        0 => guest(&counted),
        1 => block_device_stats(&DiskStats { reads: counted.backing_reads, ..DiskStats::default() }),
        _ => block_device_stats(&DiskStats::default()),
    };
    let node = |depth| json!({ "node-name": nodes::name(depth), "stats": stats(depth) });
    if call.arguments.boolean("query-nodes") == Some(true) {
        return Ok((0..=layers).map(node).collect());
    }
    let below = (1..=layers).rev().fold(None, |below, depth| Some(with_backing(node(depth), below)));
    let mut device = with_backing(node(0), below);
    device["device"] = call.backend.device.as_str().into();
    Ok(json!([device]))
}

fn with_backing(mut node: Value, below: Option<Value>) -> Value {
    if let Some(below) = below {
        node["backing"] = below;
    }
    node
}

fn guest(counted: &DiskStats) -> Value {
    let mut stats = block_device_stats(counted);
    if let Some(idle) = counted.idle {
        stats["idle_time_ns"] = nanoseconds(idle);
    }
    stats
}

/// What we do not have (merging, zones, checks of requests before they count) is zero.
fn block_device_stats(counted: &DiskStats) -> Value {
    let DiskStats { reads, writes, flushes, discards, highest_written, .. } = counted;
    let mut stats = json!({ "wr_highest_offset": highest_written, "account_invalid": false, "account_failed": false, "timed_stats": [] });
    let kinds = [("rd", *reads), ("wr", *writes), ("flush", *flushes), ("unmap", *discards), ("zone_append", RequestCount::default())];
    for (kind, count) in kinds {
        stats[format!("{kind}_operations")] = count.operations.into();
        stats[format!("{kind}_total_time_ns")] = nanoseconds(count.time);
        stats[format!("failed_{kind}_operations")] = count.failed.into();
        stats[format!("invalid_{kind}_operations")] = 0.into();
        if kind != "flush" {
            stats[format!("{kind}_bytes")] = count.bytes.into();
            stats[format!("{kind}_merged")] = 0.into();
        }
    }
    stats
}

pub(super) fn nanoseconds(time: Duration) -> Value {
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX).into()
}
