//! `block-stream`, and `block_stream`, its name in 2012.

use serde_json::{Value, json};

use super::call::Call;
use super::codec::{Class, QmpError};
use super::job_commands::{SETTLE, non_negative};
use super::nodes;
use super::queries;
use engine::disk::DiskInfo;
use engine::job::{self, JobSpec, OnError};
use engine::stream::{KIND, StreamOptions};

/// Selects the texts and classes of errors.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Dialect {
    Today,
    Of2012,
}

pub(super) fn block_stream(call: &mut Call<'_>) -> Result<Value, QmpError> {
    start(call, Dialect::Today)
}

pub(super) fn block_stream_2012(call: &mut Call<'_>) -> Result<Value, QmpError> {
    start(call, Dialect::Of2012)
}

/// Starts a stream, with the checks in the order of QEMU's `qmp_block_stream` and `stream_start`.
/// The reply precedes the job's progress, but follows its end if there is nothing to do.
fn start(call: &mut Call<'_>, dialect: Dialect) -> Result<Value, QmpError> {
    let arguments = &call.arguments;
    for (one, other) in [("base", "base-node"), ("base", "bottom"), ("bottom", "base-node")] {
        if arguments.text(one).is_some() && arguments.text(other).is_some() {
            return Err(QmpError::generic(format!(
                "'{one}' and '{other}' cannot be specified at the same time"
            )));
        }
    }
    let jobs = &call.target.jobs;
    let reserved = call.target.streams.reserve();
    // Queried before the disk: as long as there is no job, and the reservation keeps one from
    // starting, the chain does not change.
    let busy = jobs.is_busy();
    let info = queries::info(call)?;
    let device = arguments.mandatory_text("device");
    // The file of a layer cannot be streamed into. QEMU accepts that and does nothing.
    let top = match find(call, &info, device) {
        None if nodes::find_protocol(&info, device).is_some() => return Err(dialect.read_only()),
        found => found.ok_or_else(|| dialect.device_not_found(device))?,
    };
    let depth = depth(call, &info, top, dialect)?;
    if busy {
        let name = if top == 0 { &call.target.device } else { device };
        return Err(dialect.busy(name, device));
    }
    let backing_file = arguments.text("backing-file");
    if backing_file.is_some() && (arguments.text("base").or(arguments.text("base-node"))).is_none()
    {
        return Err(QmpError::generic("backing file specified, but streaming the entire chain"));
    }
    if info.read_only || top > 0 {
        return Err(dialect.read_only());
    }
    if let Some(name) = arguments.text("filter-node-name") {
        check_filter_name(&info, name)?;
    }
    let default_id = if device == call.target.device { device } else { "" };
    let options = StreamOptions {
        job_id: arguments.text("job-id").unwrap_or(default_id).into(),
        depth,
        speed: 0,
        plan: None,
        paused: false,
        on_error: on_error(arguments.text("on-error")),
        auto_finalize: arguments.boolean("auto-finalize").unwrap_or(true),
        auto_dismiss: arguments.boolean("auto-dismiss").unwrap_or(true),
        backing_file: backing_file.map(String::from),
        request: arguments.to_text(),
        priority: call.target.priority,
    };
    let speed = match non_negative(arguments.integer("speed").unwrap_or_default()) {
        Ok(speed) => speed,
        Err(refusal) => {
            // QEMU creates the job before it checks the speed, and then removes it: events
            // `created` and `null`, then the error.
            take_back(call, &options)?;
            return Err(refusal);
        }
    };
    let id = options.job_id.clone();
    let hold = jobs.hold();
    let started = call.target.streams.start(&call.target.disk, StreamOptions { speed, ..options });
    started.map_err(|error| QmpError::generic(error.to_string()))?;
    drop(reserved);
    if jobs.query().iter().any(|job| job.progress.id == id && job.progress.len == 0) {
        jobs.settle(&id, SETTLE);
    }
    call.session.hold = Some(hold);
    Ok(json!({}))
}

/// Returns the depth of `name`: the device, which is the overlay, or a node.
fn find(call: &Call<'_>, info: &DiskInfo, name: &str) -> Option<usize> {
    if name == call.target.device { Some(0) } else { nodes::find(info, name) }
}

/// Returns how many layers are copied up into the one at depth `top`, as given by `base`,
/// `base-node` or `bottom`; `None` is all of them.
fn depth(
    call: &Call<'_>,
    info: &DiskInfo,
    top: usize,
    dialect: Dialect,
) -> Result<Option<usize>, QmpError> {
    let arguments = &call.arguments;
    let device = arguments.mandatory_text("device");
    let unknown =
        |name: &str| QmpError::generic(format!("Cannot find device='' nor node-name='{name}'"));
    // `None` is the file of a layer, which is no layer itself.
    let node = |name: &str| match find(call, info, name) {
        None if nodes::find_protocol(info, name).is_none() => Err(unknown(name)),
        found => Ok(found),
    };
    if let Some(name) = arguments.text("base") {
        let base = nodes::find_file(info, top, name, &*call.target.is_file)
            .ok_or_else(|| dialect.base_not_found(name))?;
        return Ok(Some(base - 1 - top));
    }
    if let Some(name) = arguments.text("base-node") {
        return match node(name)?.and_then(|depth| depth.checked_sub(top + 1)) {
            Some(depth) => Ok(Some(depth)),
            None => Err(QmpError::generic(format!(
                "Node '{name}' is not a backing image of '{device}'"
            ))),
        };
    }
    if let Some(name) = arguments.text("bottom") {
        return match node(name)?.and_then(|depth| depth.checked_sub(top)) {
            // A `bottom` that is the last layer includes all layers.
            Some(depth) => Ok(Some(depth).filter(|depth| top + depth < info.backing.len())),
            None => Err(QmpError::generic(format!(
                "Node '{name}' is not in a chain starting from '{device}'"
            ))),
        };
    }
    Ok(None)
}

/// Refuses the names that QEMU refuses. QEMU has a node of this name while the job runs; this
/// program has none.
fn check_filter_name(info: &DiskInfo, name: &str) -> Result<(), QmpError> {
    let problem = match nodes::find(info, name).or_else(|| nodes::find_protocol(info, name)) {
        Some(_) => format!("Duplicate nodes with node-name='{name}'"),
        None if !job::is_valid_id(name) => format!("Invalid node-name: '{name}'"),
        None => return Ok(()),
    };
    Err(QmpError::generic(format!("Could not create node: {problem}")))
}

fn take_back(call: &Call<'_>, options: &StreamOptions) -> Result<(), QmpError> {
    let StreamOptions { job_id, on_error, auto_finalize, auto_dismiss, request, .. } =
        options.clone();
    let spec = JobSpec {
        id: job_id,
        kind: KIND,
        len: 0,
        speed: 0,
        auto_finalize,
        auto_dismiss,
        on_error,
        request,
    };
    call.target.jobs.create(spec).map(drop).map_err(|error| QmpError::generic(error.to_string()))
}

fn on_error(word: Option<&str>) -> OnError {
    match word {
        Some("ignore") => OnError::Ignore,
        Some("enospc") => OnError::Enospc,
        Some("stop") => OnError::Stop,
        Some("auto") => OnError::Auto,
        _ => OnError::Report,
    }
}

impl Dialect {
    fn device_not_found(self, device: &str) -> QmpError {
        match self {
            Dialect::Today => {
                QmpError::generic(format!("Cannot find device='{device}' nor node-name='{device}'"))
            }
            Dialect::Of2012 => {
                QmpError::new(Class::DeviceNotFound, format!("Device '{device}' not found"))
            }
        }
    }

    fn busy(self, node: &str, device: &str) -> QmpError {
        QmpError::generic(match self {
            Dialect::Today => {
                format!("Node '{node}' is busy: block device is in use by block job: {KIND}")
            }
            Dialect::Of2012 => format!("Device '{device}' is in use"),
        })
    }

    fn base_not_found(self, base: &str) -> QmpError {
        QmpError::generic(match self {
            Dialect::Today => format!("Can't find '{base}' in the backing chain"),
            Dialect::Of2012 => format!("Base '{base}' not found"),
        })
    }

    fn read_only(self) -> QmpError {
        QmpError::generic(match self {
            Dialect::Today => "Block node is read-only",
            Dialect::Of2012 => "Not supported",
        })
    }
}
