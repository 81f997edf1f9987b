//! Node names of the disk's layers, and their facts in the words of QEMU's `BlockDeviceInfo`.

use std::path::{Path, PathBuf};

use super::facts::{
    BlockDeviceInfo, BlockInfo, BlockdevCacheInfo, BlockdevChild, ImageInfo, ImageInfoSpecific,
};
use super::job_commands::io_status_word;
use engine::chain::LayerInfo;
use engine::disk::DiskInfo;
use engine::job::IoStatus;
use qcow2::format::BackingFormat;

/// Node name of the overlay.
pub(super) const OVERLAY: &str = "overlay";

/// Returns the node name of the `depth`-th backing layer, counted from 1 below the overlay.
pub(super) fn backing_name(depth: usize) -> String {
    format!("backing-{depth}")
}

/// Returns the node name of the layer at `depth`; 0 is the overlay.
pub(super) fn name(depth: usize) -> String {
    if depth == 0 { OVERLAY.into() } else { backing_name(depth) }
}

/// Returns the node name of the file that holds the layer at `depth`, QEMU's protocol node.
pub(super) fn file_name(depth: usize) -> String {
    format!("{}-file", name(depth))
}

/// Finds a layer by its node name. Returns its depth; 0 is the overlay.
pub(super) fn find(info: &DiskInfo, name: &str) -> Option<usize> {
    if name == OVERLAY {
        return Some(0);
    }
    (1..=info.backing.len()).find(|&depth| backing_name(depth) == name)
}

/// Finds the layer whose file has this node name. Returns its depth.
pub(super) fn find_protocol(info: &DiskInfo, name: &str) -> Option<usize> {
    (0..=info.backing.len()).find(|&depth| file_name(depth) == name)
}

/// Finds a layer below `depth` by the name of its file: the name in the header of the image above,
/// or a path relative to the directory of that image. `is` tests whether a path leads to a file, by
/// device and inode; it is used only if no name matches. Returns the depth of the layer.
pub(super) fn find_file(
    info: &DiskInfo,
    depth: usize,
    name: &str,
    is: &dyn Fn(&Path, (u64, u64)) -> bool,
) -> Option<usize> {
    let below = || info.backing.iter().enumerate().skip(depth);
    let path = |index: usize| {
        file_of(info, index)
            .parent()
            .map_or_else(|| PathBuf::from(name), |directory| directory.join(name))
    };
    let by_name =
        below().find(|(index, layer)| name == layer.reference.name || path(*index) == layer.path);
    let by_file = || {
        below().find(|(index, layer)| {
            layer.identity.is_some_and(|identity| is(&path(*index), identity))
        })
    };
    by_name.or_else(by_file).map(|(index, _)| index + 1)
}

/// Returns all layers, the overlay first, each followed by the file that holds it.
pub(super) fn all(info: &DiskInfo, images: Images) -> Vec<BlockDeviceInfo> {
    (0..=info.backing.len())
        .flat_map(|depth| [block_device_info(info, depth, images), file_info(info, depth)])
        .collect()
}

/// How the facts of an image include the images below it.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Images {
    /// Not included.
    Flat,
    /// Each image inside the one above.
    Nested,
}

/// Returns the facts of the disk `device`, with its images inside each other.
pub(super) fn block_info(device: &str, info: &DiskInfo) -> BlockInfo {
    BlockInfo {
        device: device.into(),
        kind: "unknown".into(),
        removable: false,
        locked: false,
        inserted: Some(block_device_info(info, 0, Images::Nested)),
        io_status: Some(io_status_word(IoStatus::Ok).into()),
    }
}

/// Returns the facts of the layer at `depth`; 0 is the overlay.
fn block_device_info(info: &DiskInfo, depth: usize, images: Images) -> BlockDeviceInfo {
    let below = info.backing.get(depth);
    let child =
        |child: &str, node: String| BlockdevChild { child: child.into(), node_name: Some(node) };
    // The order is QEMU's: the child that was attached last comes first.
    let backing = below.map(|_| child("backing", backing_name(depth + 1)));
    let children = backing.into_iter().chain([child("file", file_name(depth))]).collect();
    BlockDeviceInfo {
        backing_file: below.map(|below| text(&below.path)),
        // As in QEMU, only the layers that are shown count.
        backing_file_depth: match images {
            Images::Nested => (info.backing.len() - depth) as u64,
            Images::Flat => 0,
        },
        children,
        ..node(info, depth, name(depth), image_info(info, depth, images))
    }
}

/// Returns the facts of the file that holds the layer at `depth`.
fn file_info(info: &DiskInfo, depth: usize) -> BlockDeviceInfo {
    let (size, allocated) = match layer(info, depth) {
        Some(layer) => (layer.file_size, layer.allocated_size),
        None => (info.file_size, info.allocated_size),
    };
    let image = ImageInfo {
        filename: text(file_of(info, depth)),
        format: protocol(info, depth).into(),
        virtual_size: size,
        actual_size: Some(allocated),
        format_specific: Some(ImageInfoSpecific::File {}),
        ..ImageInfo::default()
    };
    node(info, depth, file_name(depth), image)
}

/// Returns the members that layers and files have in common, around the facts of the `image`.
fn node(info: &DiskInfo, depth: usize, name: String, image: ImageInfo) -> BlockDeviceInfo {
    BlockDeviceInfo {
        file: text(file_of(info, depth)),
        node_name: Some(name),
        ro: depth > 0 || info.read_only,
        drv: image.format.clone(),
        active: true,
        detect_zeroes: "off".into(),
        image,
        cache: BlockdevCacheInfo { writeback: true, direct: false, no_flush: false },
        ..BlockDeviceInfo::default()
    }
}

/// Returns QEMU's driver name of the file that holds the layer at `depth`.
pub(super) fn protocol(info: &DiskInfo, depth: usize) -> &'static str {
    let block_device = layer(info, depth).map_or(info.block_device, |layer| layer.block_device);
    if block_device { "host_device" } else { "file" }
}

fn image_info(info: &DiskInfo, depth: usize, images: Images) -> ImageInfo {
    let (size, allocated, cluster) = match layer(info, depth) {
        Some(layer) => (layer.size, layer.allocated_size, layer.cluster_size),
        None => (info.size, info.allocated_size, Some(info.cluster_size)),
    };
    let qcow2 = layer(info, depth).map_or(Some(&info.qcow2), |layer| layer.qcow2.as_ref());
    let below = info.backing.get(depth);
    ImageInfo {
        filename: text(file_of(info, depth)),
        format: driver(info, depth).into(),
        virtual_size: size,
        actual_size: Some(allocated),
        cluster_size: cluster,
        dirty_flag: false,
        backing_filename: below.map(|below| below.reference.name.clone()),
        full_backing_filename: below.map(|below| text(&below.path)),
        backing_filename_format: below.map(|_| driver(info, depth + 1).into()),
        format_specific: qcow2.cloned().map(ImageInfoSpecific::Qcow2),
        backing_image: below
            .filter(|_| images == Images::Nested)
            .map(|_| Box::new(image_info(info, depth + 1, images))),
    }
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

fn text(path: &Path) -> String {
    path.to_string_lossy().into_owned()
}

#[cfg(test)]
mod tests;
