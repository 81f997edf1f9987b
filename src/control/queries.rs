//! Commands about the server and the disk.

use serde_json::{Value, json};

use super::call::Call;
use super::codec::{Class, Oob, QmpError};
use super::json;
use super::nodes::{self, Images};
use engine::disk::DiskInfo;

/// Returns the version in the greeting and in `query-version`: the QEMU version whose protocol is
/// spoken, and this program as its package.
pub(super) fn version() -> Value {
    json!({ "qemu": { "major": 10, "minor": 2, "micro": 0 }, "package": concat!("cordisk ", env!("CARGO_PKG_VERSION")) })
}

/// Returns the greeting, which is the first line of a session.
pub(super) fn greeting() -> Value {
    json!({ "QMP": { "version": version(), "capabilities": ["oob"] } })
}

pub(super) fn qmp_capabilities(call: &mut Call<'_>) -> Result<Value, QmpError> {
    if call.session.negotiated {
        return Err(QmpError::new(
            Class::CommandNotFound,
            "Capabilities negotiation is already complete, command ignored",
        ));
    }
    call.session.negotiated = true;
    call.session.oob = if call.arguments.texts("enable").any(|capability| capability == "oob") {
        Oob::On
    } else {
        Oob::Off
    };
    Ok(json!({}))
}

pub(super) fn query_version(_: &mut Call<'_>) -> Result<Value, QmpError> {
    Ok(version())
}

/// Returns the facts of the disk.
pub(super) fn info(call: &Call<'_>) -> Result<DiskInfo, QmpError> {
    call.target.disk.info().map_err(|error| QmpError::generic(error.to_string()))
}

pub(super) fn query_block(call: &mut Call<'_>) -> Result<Value, QmpError> {
    Ok(json::value(&[nodes::block_info(&call.target.device, &info(call)?)]))
}

pub(super) fn query_named_block_nodes(call: &mut Call<'_>) -> Result<Value, QmpError> {
    let images =
        if call.arguments.boolean("flat") == Some(true) { Images::Flat } else { Images::Nested };
    Ok(json::value(&nodes::all(&info(call)?, images)))
}

/// Lists one export, the mount, which exists as long as the process.
pub(super) fn query_block_exports(call: &mut Call<'_>) -> Result<Value, QmpError> {
    Ok(
        json!([{ "id": call.target.device, "type": "fuse", "node-name": nodes::OVERLAY, "shutting-down": false }]),
    )
}

/// Ends the process. The reply is the last line of the session.
pub(super) fn quit(call: &mut Call<'_>) -> Result<Value, QmpError> {
    call.session.quitting = true;
    Ok(json!({}))
}
