//! Names of the disk's layers, and facts of them in the words of QEMU's `BlockDeviceInfo`.

use std::path::{Path, PathBuf};

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

/// The node name of the file that holds the layer at `depth`, QEMU's protocol node.
pub(super) fn file_name(depth: usize) -> String {
    format!("{}-file", name(depth))
}

/// Finds a layer by its node name: its depth, 0 being the overlay.
pub(super) fn find(info: &DiskInfo, name: &str) -> Option<usize> {
    if name == OVERLAY {
        return Some(0);
    }
    (1..=info.backing.len()).find(|&depth| backing_name(depth) == name)
}

/// Finds the layer whose file has this node name: its depth.
pub(super) fn find_protocol(info: &DiskInfo, name: &str) -> Option<usize> {
    (0..=info.backing.len()).find(|&depth| file_name(depth) == name)
}

/// Finds a layer below `depth` by its file's name: as it stands in the image above, or a path,
/// which is relative to the directory of the image above. `is` says whether a path leads to a file,
/// by device and inode: names are compared first, and files where no name is the same. Returns its
/// depth.
pub(super) fn find_file(info: &DiskInfo, depth: usize, name: &str, is: &dyn Fn(&Path, (u64, u64)) -> bool) -> Option<usize> {
    let below = || info.backing.iter().enumerate().skip(depth);
    let path = |index: usize| file_of(info, index).parent().map_or_else(|| PathBuf::from(name), |directory| directory.join(name));
    let by_name = below().find(|(index, layer)| name == layer.reference.name || path(*index) == layer.path);
    let by_file = || below().find(|(index, layer)| layer.identity.is_some_and(|identity| is(&path(*index), identity)));
    by_name.or_else(by_file).map(|(index, _)| index + 1)
}

/// All layers as a list of `BlockDeviceInfo`, the overlay first, each followed by the file that
/// holds it.
pub(super) fn all(info: &DiskInfo, images: Images) -> Vec<Value> {
    (0..=info.backing.len()).flat_map(|depth| [block_device_info(info, depth, images), file_info(info, depth)]).collect()
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
    let mut value = node(info, depth, &name(depth), driver(info, depth), image_info(info, depth, images));
    value["backing_file_depth"] = depth_below.into();
    let file = json!({ "child": "file", "node-name": file_name(depth) });
    // In QEMU's order: what was attached last comes first.
    value["children"] = match below {
        Some(_) => json!([{ "child": "backing", "node-name": backing_name(depth + 1) }, file]),
        None => json!([file]),
    };
    if let Some(below) = below {
        value["backing_file"] = path(&below.path);
    }
    value
}

/// The facts of the file that holds the layer at `depth`.
fn file_info(info: &DiskInfo, depth: usize) -> Value {
    let (size, allocated) = match layer(info, depth) {
        Some(layer) => (layer.file_size, layer.allocated_size),
        None => (info.file_size, info.allocated_size),
    };
    let driver = protocol(info, depth);
    let image = json!({
        "filename": path(file_of(info, depth)), "format": driver, "virtual-size": size, "actual-size": allocated, "dirty-flag": false,
        "format-specific": { "type": "file", "data": {} },
    });
    node(info, depth, &file_name(depth), driver, image)
}

/// What layers and files have in common.
fn node(info: &DiskInfo, depth: usize, name: &str, driver: &str, image: Value) -> Value {
    json!({
        "file": path(file_of(info, depth)), "node-name": name, "ro": depth > 0 || info.read_only, "drv": driver,
        "backing_file_depth": 0, "children": [], "active": true, "encrypted": false, "detect_zeroes": "off",
        "bps": 0, "bps_rd": 0, "bps_wr": 0, "iops": 0, "iops_rd": 0, "iops_wr": 0, "image": image,
        "cache": { "writeback": true, "direct": false, "no-flush": false }, "write_threshold": 0,
    })
}

/// QEMU's driver for the file that holds the layer at `depth`.
pub(super) fn protocol(info: &DiskInfo, depth: usize) -> &'static str {
    let block_device = layer(info, depth).map_or(info.block_device, |layer| layer.block_device);
    if block_device { "host_device" } else { "file" }
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
    let qcow2 = layer(info, depth).map_or(Some(&info.qcow2), |layer| layer.qcow2.as_ref());
    if let Some(facts) = qcow2 {
        value["format-specific"] = json!({ "type": "qcow2", "data": facts });
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
