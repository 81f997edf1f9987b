//! Commands about the server and the disk.

use serde_json::{Value, json};

use super::call::Call;
use super::codec::{Class, Oob, Refusal};
use super::job_commands::io_status_word;
use super::nodes::{self, Images};
use crate::disk::DiskInfo;
use crate::job::IoStatus;

/// What the greeting and `query-version` tell: the level of the protocol that is spoken, and who speaks it.
pub(super) fn version() -> Value {
    json!({ "qemu": { "major": 10, "minor": 2, "micro": 0 }, "package": concat!("cordisk ", env!("CARGO_PKG_VERSION")) })
}

/// What a client is told first.
pub(super) fn greeting() -> Value {
    json!({ "QMP": { "version": version(), "capabilities": ["oob"] } })
}

pub(super) fn qmp_capabilities(call: &mut Call<'_>) -> Result<Value, Refusal> {
    if call.session.negotiated {
        return Err(Refusal::new(Class::CommandNotFound, "Capabilities negotiation is already complete, command ignored"));
    }
    call.session.negotiated = true;
    call.session.oob = if call.arguments.texts("enable").any(|capability| capability == "oob") { Oob::On } else { Oob::Off };
    Ok(json!({}))
}

pub(super) fn query_version(_: &mut Call<'_>) -> Result<Value, Refusal> {
    Ok(version())
}

/// The disk's facts.
pub(super) fn info(call: &Call<'_>) -> Result<DiskInfo, Refusal> {
    (call.backend.info)().map_err(|error| Refusal::generic(error.to_string()))
}

pub(super) fn query_block(call: &mut Call<'_>) -> Result<Value, Refusal> {
    Ok(json!([{
        "device": call.backend.device, "type": "unknown", "removable": false, "locked": false, "io-status": io_status_word(IoStatus::Ok),
        "inserted": nodes::block_device_info(&info(call)?, 0, Images::Nested),
    }]))
}

pub(super) fn query_named_block_nodes(call: &mut Call<'_>) -> Result<Value, Refusal> {
    let images = if call.arguments.boolean("flat") == Some(true) { Images::Flat } else { Images::Nested };
    Ok(nodes::all(&info(call)?, images).into())
}

/// The mount, which is there as long as the process.
pub(super) fn query_block_exports(call: &mut Call<'_>) -> Result<Value, Refusal> {
    Ok(json!([{ "id": call.backend.device, "type": "fuse", "node-name": nodes::OVERLAY, "shutting-down": false }]))
}

/// The reply comes after everything else that there is to tell.
pub(super) fn quit(call: &mut Call<'_>) -> Result<Value, Refusal> {
    call.session.quitting = true;
    Ok(json!({}))
}
