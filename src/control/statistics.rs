//! `query-blockstats`: counters in the words of QEMU's `BlockDeviceStats`.

use serde_json::{Value, json};

use super::call::Call;
use super::codec::QmpError;
use super::nodes;
use super::queries;
use super::status::nanoseconds;
use engine::disk::{DiskInfo, DiskStats, RequestCount};

/// Returns the device with its backing layers nested, or with `query-nodes` a list of all nodes.
pub(super) fn query_blockstats(call: &mut Call<'_>) -> Result<Value, QmpError> {
    let info = queries::info(call)?;
    let layers = info.backing.len();
    let counted = call.target.disk.stats();
    // All reads from below count for the first backing layer; the part that went to lower layers is
    // not counted separately.
    let stats = |depth| match depth {
        0 => guest(&counted),
        1 => {
            block_device_stats(&DiskStats { reads: counted.backing_reads, ..DiskStats::default() })
        }
        _ => block_device_stats(&DiskStats::default()),
    };
    let node = |depth| json!({ "node-name": nodes::name(depth), "stats": stats(depth), "parent": file(&info, &counted, depth) });
    if call.arguments.boolean("query-nodes") == Some(true) {
        // The order is QEMU's.
        return Ok((0..=layers)
            .flat_map(|depth| [file(&info, &counted, depth), node(depth)])
            .collect());
    }
    let below =
        (1..=layers).rev().fold(None, |below, depth| Some(with_backing(node(depth), below)));
    let mut device = with_backing(node(0), below);
    device["device"] = call.target.device.as_str().into();
    Ok(json!([device]))
}

/// Returns the statistics of the file that holds the layer at `depth`. As in QEMU, requests are
/// counted at the layer above the file. The file has only its highest written offset since it was
/// opened, which libvirt takes for the allocation of an image on a block device.
fn file(info: &DiskInfo, counted: &DiskStats, depth: usize) -> Value {
    let written = counted.commits > 0
        || counted.writes.operations > 0
        || counted.copied_up.bytes > 0
        || counted.streamed > 0;
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
        stats["idle_time_ns"] = nanoseconds(idle).into();
    }
    stats
}

/// Counters that this program does not have (merging, zones, invalid requests) are zero.
fn block_device_stats(counted: &DiskStats) -> Value {
    let DiskStats { reads, writes, flushes, discards, highest_written, .. } = counted;
    let mut stats = json!({ "wr_highest_offset": highest_written, "account_invalid": false, "account_failed": false, "timed_stats": [] });
    let kinds = [
        ("rd", *reads),
        ("wr", *writes),
        ("flush", *flushes),
        ("unmap", *discards),
        ("zone_append", RequestCount::default()),
    ];
    for (kind, count) in kinds {
        stats[format!("{kind}_operations")] = count.operations.into();
        stats[format!("{kind}_total_time_ns")] = nanoseconds(count.time).into();
        stats[format!("failed_{kind}_operations")] = count.failed.into();
        stats[format!("invalid_{kind}_operations")] = 0.into();
        if kind != "flush" {
            stats[format!("{kind}_bytes")] = count.bytes.into();
            stats[format!("{kind}_merged")] = 0.into();
        }
    }
    stats
}
