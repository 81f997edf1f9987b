//! `block_resize`: grows the disk.

use serde_json::{Value, json};

use super::call::Call;
use super::codec::QmpError;
use super::nodes;
use super::queries;
use engine::job::JobError;

/// Grows the disk, with the checks in the order of QEMU's `qmp_block_resize`. The reservation keeps
/// a job, which would not know the new size, from starting meanwhile. It also keeps the daemon from
/// closing the disk meanwhile, and the check of `is_closed` keeps this command from growing a disk
/// that may be closed already: see [`Server::settle`](super::Server::settle).
pub(super) fn block_resize(call: &mut Call<'_>) -> Result<Value, QmpError> {
    let arguments = &call.arguments;
    let (device, node) = (
        arguments.text("device").unwrap_or_default(),
        arguments.text("node-name").unwrap_or_default(),
    );
    let _reserved = call.target.streams.reserve();
    if call.target.jobs.is_closed() {
        return Err(QmpError::generic(JobError::ShuttingDown.to_string()));
    }
    let busy = call.target.jobs.is_busy();
    let info = queries::info(call)?;
    let depth = if device == call.target.device { Some(0) } else { nodes::find(&info, node) };
    if depth.is_none()
        && let Some(holder) = nodes::find_protocol(&info, node)
    {
        let holder = nodes::name(holder);
        return Err(QmpError::generic(format!(
            "Permission conflict on node '{node}': permissions 'resize' are both required by an unnamed block device (uses node '{node}' as 'root' \
             child) and unshared by node '{holder}' (uses node '{node}' as 'file' child)."
        )));
    }
    let depth = depth.ok_or_else(|| {
        QmpError::generic(format!("Cannot find device='{device}' nor node-name='{node}'"))
    })?;
    let size = arguments.integer("size").and_then(|size| u64::try_from(size).ok());
    let size = size.ok_or_else(|| QmpError::generic("Parameter 'size' expects a >0 size"))?;
    let name = if node.is_empty() { device } else { node };
    if depth > 0 {
        return Err(QmpError::generic(format!(
            "Node '{name}' is busy: node is used as backing hd of '{}'",
            nodes::name(depth - 1)
        )));
    }
    if busy {
        return Err(QmpError::generic(format!(
            "Node '{name}' is busy: block device is in use by block job: stream"
        )));
    }
    if info.read_only {
        return Err(QmpError::generic("Image is read-only"));
    }
    if !size.is_multiple_of(512) {
        return Err(QmpError::generic("The new size must be a multiple of 512"));
    }
    if size < info.size {
        return Err(QmpError::generic(format!(
            "Shrinking is not supported: the disk has {} bytes",
            info.size
        )));
    }
    if size == info.size {
        return Ok(json!({}));
    }
    call.target.disk.grow(size).map_err(|error| QmpError::generic(error.to_string()))?;
    (call.target.grown)(size);
    Ok(json!({}))
}
