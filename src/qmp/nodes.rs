//! Names of the disk's layers, and facts of them in the words of QEMU's `BlockDeviceInfo`.

use std::path::Path;

use serde_json::{Value, json};

use crate::chain::LayerInfo;
use crate::disk::DiskInfo;
use crate::format::BackingFormat;

/// The node name of the overlay.
pub(super) const OVERLAY: &str = "overlay";

/// The node name of the `depth`-th backing layer, counted from 1 below the overlay.
pub(super) fn backing_name(depth: usize) -> String {
    format!("backing-{depth}")
}

/// The node name of the layer at `depth`, 0 being the overlay.
pub(super) fn name(depth: usize) -> String {
    if depth == 0 { OVERLAY.into() } else { backing_name(depth) }
}

/// Finds a layer by its node name: its depth, 0 being the overlay.
pub(super) fn find(info: &DiskInfo, name: &str) -> Option<usize> {
    if name == OVERLAY {
        return Some(0);
    }
    (1..=info.backing.len()).find(|&depth| backing_name(depth) == name)
}

/// Finds a layer below `depth` by its file's name: as it stands in the image above, as it was opened, or relative to the directory of the image above.
/// Names are compared, no file is looked at. Returns its depth.
pub(super) fn find_file(info: &DiskInfo, depth: usize, name: &str) -> Option<usize> {
    let below = info.backing.iter().enumerate().skip(depth);
    let mut matching = below.filter(|(index, layer)| {
        let relative = file_of(info, *index).parent().map(|directory| directory.join(name));
        name == layer.reference.name || Path::new(name) == layer.path || relative.as_ref() == Some(&layer.path)
    });
    matching.next().map(|(index, _)| index + 1)
}

/// All layers as a list of `BlockDeviceInfo`, the overlay first.
pub(super) fn all(info: &DiskInfo, images: Images) -> Vec<Value> {
    (0..=info.backing.len()).map(|depth| block_device_info(info, depth, images)).collect()
}

/// How the facts of an image show those of the images below it.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Images {
    /// Not at all.
    Flat,
    /// Each inside the one above.
    Nested,
}

/// The facts of the layer at `depth`, 0 being the overlay.
pub(super) fn block_device_info(info: &DiskInfo, depth: usize, images: Images) -> Value {
    let below = info.backing.get(depth);
    // QEMU counts what it shows.
    let depth_below = if images == Images::Nested { info.backing.len() - depth } else { 0 };
    let mut value = json!({
        "file": path(file_of(info, depth)), "node-name": name(depth), "ro": depth > 0 || info.read_only, "drv": driver(info, depth),
        "backing_file_depth": depth_below, "children": [], "active": true, "encrypted": false, "detect_zeroes": "off",
        "bps": 0, "bps_rd": 0, "bps_wr": 0, "iops": 0, "iops_rd": 0, "iops_wr": 0,
        "image": image_info(info, depth, images),
        "cache": { "writeback": true, "direct": false, "no-flush": false }, "write_threshold": 0,
    });
    if let Some(below) = below {
        value["backing_file"] = path(&below.path);
        value["children"] = json!([{ "child": "backing", "node-name": backing_name(depth + 1) }]);
    }
    value
}

fn image_info(info: &DiskInfo, depth: usize, images: Images) -> Value {
    let (size, allocated, cluster) = match layer(info, depth) {
        Some(layer) => (layer.size, layer.allocated_size, layer.cluster_size),
        None => (info.size, info.allocated_size, Some(info.cluster_size)),
    };
    let mut value = json!({
        "filename": path(file_of(info, depth)), "format": driver(info, depth), "virtual-size": size, "actual-size": allocated,
        "dirty-flag": false,
    });
    if let Some(cluster) = cluster {
        value["cluster-size"] = cluster.into();
    }
    if let Some(below) = info.backing.get(depth) {
        value["backing-filename"] = below.reference.name.as_str().into();
        value["full-backing-filename"] = path(&below.path);
        value["backing-filename-format"] = driver(info, depth + 1).into();
        if images == Images::Nested {
            value["backing-image"] = image_info(info, depth + 1, images);
        }
    }
    value
}

fn layer(info: &DiskInfo, depth: usize) -> Option<&LayerInfo> {
    depth.checked_sub(1).and_then(|index| info.backing.get(index))
}

fn file_of(info: &DiskInfo, depth: usize) -> &Path {
    layer(info, depth).map_or(&info.path, |layer| &layer.path)
}

fn driver(info: &DiskInfo, depth: usize) -> &'static str {
    match layer(info, depth).map(|layer| layer.format) {
        Some(BackingFormat::Raw) => "raw",
        Some(BackingFormat::Qcow2) | None => "qcow2",
    }
}

fn path(path: &Path) -> Value {
    path.to_string_lossy().into()
}
