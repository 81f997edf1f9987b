//! Counters in the words of QEMU's `BlockDeviceStats`.

use std::time::Duration;

use serde_json::{Value, json};

use super::call::Call;
use super::codec::Refusal;
use super::nodes;
use super::queries;
use crate::disk::{DiskInfo, DiskStats, RequestCount};

/// The device with what lies below it nested, or every node by itself.
pub(super) fn query_blockstats(call: &mut Call<'_>) -> Result<Value, Refusal> {
    let info = queries::info(call)?;
    let layers = info.backing.len();
    let counted = (call.backend.stats)();
    // Who reads from below reads from the first layer; what that one had to ask further down is not told apart.
    let stats = |depth| match depth {
        0 => guest(&counted),
        1 => block_device_stats(&DiskStats { reads: counted.backing_reads, ..DiskStats::default() }),
        _ => block_device_stats(&DiskStats::default()),
    };
    let node = |depth| json!({ "node-name": nodes::name(depth), "stats": stats(depth), "parent": file(&info, &counted, depth) });
    if call.arguments.boolean("query-nodes") == Some(true) {
        // In QEMU's order.
        return Ok((0..=layers).flat_map(|depth| [file(&info, &counted, depth), node(depth)]).collect());
    }
    let below = (1..=layers).rev().fold(None, |below, depth| Some(with_backing(node(depth), below)));
    let mut device = with_backing(node(0), below);
    device["device"] = call.backend.device.as_str().into();
    Ok(json!([device]))
}

/// The file that holds the layer at `depth`. As in QEMU, requests are counted above it; of itself
/// it knows how far it was written since it was opened, which is what libvirt takes for the
/// allocation of an image on a block device.
fn file(info: &DiskInfo, counted: &DiskStats, depth: usize) -> Value {
    let written = counted.commits > 0 || counted.writes.operations > 0 || counted.copied_up.bytes > 0 || counted.streamed > 0;
    let highest_written = match (depth, written) {
        (0, true) if info.block_device => info.allocated_size,
        (0, true) => info.file_size,
        _ => 0,
    };
    json!({
        "node-name": nodes::file_name(depth), "stats": block_device_stats(&DiskStats { highest_written, ..DiskStats::default() }),
        "driver-specific": {
            "driver": nodes::protocol(info, depth), "discard-nb-ok": 0, "discard-nb-failed": 0, "discard-bytes-ok": 0,
        },
    })
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
