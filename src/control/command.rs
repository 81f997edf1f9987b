//! The table of commands. Requests are dispatched and their arguments checked by this table, and
//! `query-commands` and `query-qmp-schema` list it.

use serde_json::{Value, json};

use super::arguments::ArgumentKind::{Boolean, Enum, EnumList, Integer, String as Text};
use super::arguments::{Argument, mandatory, optional};
use super::call::Call;
use super::codec::{Class, QmpError, QmpRequest};
use super::types::Type::{List, Object};
use super::types::{NOTHING, Type};
use super::{
    block_stream, job_commands, map, order, plan, progress, queries, resize, schema, statistics,
    status,
};

/// One command.
pub(super) struct CommandSpec {
    pub name: &'static str,
    /// Arguments in the order in which they are checked, which is that of QEMU's schema.
    pub arguments: &'static [Argument],
    /// Type of the result.
    pub returns: Type,
    pub run: fn(&mut Call<'_>) -> Result<Value, QmpError>,
}

const NONE: &[Argument] = &[];
const DEVICE: &[Argument] = &[mandatory("device", Text)];
const ID: &[Argument] = &[mandatory("id", Text)];
const CANCEL: &[Argument] = &[mandatory("device", Text), optional("force", Boolean)];
const SET_SPEED: &[Argument] = &[mandatory("device", Text), mandatory("speed", Integer)];
/// The argument was called `value` until April 2012.
const SET_SPEED_2012: &[Argument] =
    &[mandatory("device", Text), optional("value", Integer), optional("speed", Integer)];
const RESIZE: &[Argument] =
    &[optional("device", Text), optional("node-name", Text), mandatory("size", Integer)];
const CHANGE: &[Argument] = &[
    mandatory("id", Text),
    mandatory("type", Enum(JOB_TYPES)),
    optional("copy-mode", Enum(&["background", "write-blocking"])),
];
/// Kinds of jobs in QEMU's schema; this program has only `stream`.
pub(super) const JOB_TYPES: &[&str] = &[
    "commit",
    "stream",
    "mirror",
    "backup",
    "create",
    "amend",
    "snapshot-load",
    "snapshot-save",
    "snapshot-delete",
];
const PROGRESS: &[Argument] = &[mandatory("enable", Boolean), optional("interval-ms", Integer)];
const CELLS: &[Argument] = &[mandatory("cells", Integer)];
const ORDER: &[Argument] = &[optional("first", Integer)];
const MAP: &[Argument] = &[optional("offset", Integer), optional("limit", Integer)];
const SET_PLAN: &[Argument] =
    &[mandatory("id", Text), optional("schedule", Text), optional("finish-by", Text)];
const STREAM: &[Argument] = &[
    optional("job-id", Text),
    mandatory("device", Text),
    optional("base", Text),
    optional("base-node", Text),
    optional("backing-file", Text),
    optional("backing-mask-protocol", Boolean),
    optional("bottom", Text),
    optional("speed", Integer),
    optional("on-error", Enum(&["report", "ignore", "enospc", "stop", "auto"])),
    optional("filter-node-name", Text),
    optional("auto-finalize", Boolean),
    optional("auto-dismiss", Boolean),
];

type CommandFn = fn(&mut Call<'_>) -> Result<Value, QmpError>;

const fn command(
    name: &'static str,
    arguments: &'static [Argument],
    run: CommandFn,
) -> CommandSpec {
    query(name, arguments, NOTHING, run)
}

const fn query(
    name: &'static str,
    arguments: &'static [Argument],
    returns: Type,
    run: CommandFn,
) -> CommandSpec {
    CommandSpec { name, arguments, returns, run }
}

/// All commands. Names with underscores date from 2012, before the first QEMU release with these
/// commands; names with `x-` are extensions of this program.
pub(super) const COMMANDS: &[CommandSpec] = &[
    command(NEGOTIATION, &[optional("enable", EnumList(&["oob"]))], queries::qmp_capabilities),
    query("query-version", NONE, Object("VersionInfo"), queries::query_version),
    query("query-commands", NONE, List(&Object("CommandInfo")), query_commands),
    query("query-qmp-schema", NONE, List(&Object("SchemaInfo")), schema::query_qmp_schema),
    query("query-block", NONE, List(&Object("BlockInfo")), queries::query_block),
    query(
        "query-named-block-nodes",
        &[optional("flat", Boolean)],
        List(&Object("BlockDeviceInfo")),
        queries::query_named_block_nodes,
    ),
    query(
        "query-blockstats",
        &[optional("query-nodes", Boolean)],
        List(&Object("BlockStats")),
        statistics::query_blockstats,
    ),
    query(
        "query-block-exports",
        NONE,
        List(&Object("BlockExportInfo")),
        queries::query_block_exports,
    ),
    command("block_resize", RESIZE, resize::block_resize),
    query("query-block-jobs", NONE, List(&Object("BlockJobInfo")), job_commands::query_block_jobs),
    query("query-jobs", NONE, List(&Object("JobInfo")), job_commands::query_jobs),
    command("block-stream", STREAM, block_stream::block_stream),
    command("block_stream", STREAM, block_stream::block_stream_2012),
    command("block-job-set-speed", SET_SPEED, job_commands::block_job_set_speed),
    command("block_job_set_speed", SET_SPEED_2012, job_commands::block_job_set_speed),
    command("block-job-cancel", CANCEL, job_commands::block_job_cancel),
    command("block_job_cancel", CANCEL, job_commands::block_job_cancel),
    command("block-job-pause", DEVICE, job_commands::block_job_pause),
    command("block_job_pause", DEVICE, job_commands::block_job_pause),
    command("block-job-resume", DEVICE, job_commands::block_job_resume),
    command("block_job_resume", DEVICE, job_commands::block_job_resume),
    command("block-job-complete", DEVICE, job_commands::block_job_complete),
    command("block_job_complete", DEVICE, job_commands::block_job_complete),
    command("block-job-finalize", ID, job_commands::block_job_finalize),
    command("block-job-dismiss", ID, job_commands::block_job_dismiss),
    command("block-job-change", CHANGE, job_commands::block_job_change),
    command("job-pause", ID, job_commands::job_pause),
    command("job-resume", ID, job_commands::job_resume),
    command("job-cancel", ID, job_commands::job_cancel),
    command("job-complete", ID, job_commands::job_complete),
    command("job-finalize", ID, job_commands::job_finalize),
    command("job-dismiss", ID, job_commands::job_dismiss),
    query("x-query-last-job", NONE, Object("LastJob"), progress::x_query_last_job),
    query(
        "x-query-job-progress",
        NONE,
        List(&Object("JobProgress")),
        progress::x_query_job_progress,
    ),
    query("x-query-status", NONE, Object("DiskStatus"), status::x_query_status),
    query("x-query-cells", CELLS, Object("DiskCells"), status::x_query_cells),
    query("x-query-map", MAP, Object("DiskMap"), map::x_query_map),
    query("x-query-order", ORDER, Object("OrderPage"), order::x_query_order),
    command("x-job-set-plan", SET_PLAN, plan::x_job_set_plan),
    command("x-job-progress-events", PROGRESS, progress::x_job_progress_events),
    command("quit", NONE, queries::quit),
];

/// The only command that is accepted before capabilities are negotiated.
pub(super) const NEGOTIATION: &str = "qmp_capabilities";

/// Finds the command of a request.
///
/// # Errors
/// There is no such command, or the request is out of band, which no command supports.
pub(super) fn find(request: &QmpRequest) -> Result<&'static CommandSpec, QmpError> {
    let name = &request.command;
    let found = COMMANDS.iter().find(|command| command.name == name);
    let command = found.ok_or_else(|| {
        QmpError::new(Class::CommandNotFound, format!("The command {name} has not been found"))
    })?;
    match request.oob {
        true => Err(QmpError::generic(format!("The command {name} does not support OOB"))),
        false => Ok(command),
    }
}

fn query_commands(_: &mut Call<'_>) -> Result<Value, QmpError> {
    Ok(COMMANDS.iter().map(|command| json!({ "name": command.name })).collect())
}

#[cfg(test)]
mod tests {
    use super::super::arguments::Arguments;
    use super::*;

    fn check(name: &str, arguments: Value) -> Result<Arguments, String> {
        let Value::Object(arguments) = arguments else { panic!("arguments are an object") };
        let request = QmpRequest { command: name.into(), oob: false, arguments: arguments.clone() };
        Arguments::check(find(&request).unwrap().arguments, arguments)
            .map_err(|refusal| refusal.desc)
    }

    #[test]
    fn names_are_unique() {
        for (i, command) in COMMANDS.iter().enumerate() {
            assert!(
                COMMANDS[..i].iter().all(|other| other.name != command.name),
                "{}",
                command.name
            );
        }
    }

    /// Protects: error texts and their order, copied from sessions with qemu-storage-daemon.
    #[test]
    fn arguments_are_checked_in_schema_order() {
        for (name, arguments, expected) in [
            ("block-stream", json!({"speed": "x"}), "Parameter 'device' is missing"),
            (
                "block-stream",
                json!({"device": null}),
                "Invalid parameter type for 'device', expected: string",
            ),
            (
                "block-stream",
                json!({"device": "d", "speed": 1.5, "yy": 1}),
                "Invalid parameter type for 'speed', expected: integer",
            ),
            (
                "block-stream",
                json!({"device": "d", "speed": u64::MAX}),
                "Invalid parameter type for 'speed', expected: integer",
            ),
            (
                "block-stream",
                json!({"device": "d", "on-error": 1}),
                "Invalid parameter type for 'on-error', expected: string",
            ),
            (
                "block-stream",
                json!({"device": "d", "on-error": "x"}),
                "Parameter 'on-error' does not accept value 'x'",
            ),
            (
                "block-stream",
                json!({"device": "d", "auto-dismiss": "x"}),
                "Invalid parameter type for 'auto-dismiss', expected: boolean",
            ),
            (
                "block-stream",
                json!({"device": "d", "zz": 1, "yy": 2}),
                "Parameter 'yy' is unexpected",
            ),
            (
                "block-stream",
                json!({"device": "d", "snapshot-file": "x"}),
                "Parameter 'snapshot-file' is unexpected",
            ),
            (
                "block-job-set-speed",
                json!({"device": "d", "value": 1}),
                "Parameter 'speed' is missing",
            ),
            ("block-job-dismiss", json!({"device": "d"}), "Parameter 'id' is missing"),
            (
                "qmp_capabilities",
                json!({"enable": "oob"}),
                "Invalid parameter type for 'enable', expected: array",
            ),
            (
                "qmp_capabilities",
                json!({"enable": [1]}),
                "Invalid parameter type for 'enable[0]', expected: string",
            ),
            (
                "qmp_capabilities",
                json!({"enable": ["foo"]}),
                "Parameter 'null' does not accept value 'foo'",
            ),
            ("query-version", json!({"a": 1}), "Parameter 'a' is unexpected"),
        ] {
            assert_eq!(check(name, arguments).unwrap_err(), expected);
        }
        check("block-stream", json!({"device": "d", "speed": -1})).unwrap();
        check("block_job_set_speed", json!({"device": "d", "value": 1})).unwrap();
        check("qmp_capabilities", json!({"enable": ["oob", "oob"]})).unwrap();
    }
}
