//! Types of replies and events, as tables that `query-qmp-schema` lists. The type names are QEMU's,
//! and are never sent to a client.

use super::arguments::Presence;
use super::command::JOB_TYPES;

/// A type on the wire.
#[derive(Clone, Copy, Debug)]
pub(super) enum Type {
    String,
    Integer,
    Boolean,
    /// Any value.
    Any,
    /// One of these strings.
    Enum(&'static [&'static str]),
    /// A list of these strings.
    EnumList(&'static [&'static str]),
    /// An object of [`OBJECTS`].
    Object(&'static str),
    List(&'static Type),
}

/// A member of an object.
#[derive(Clone, Copy, Debug)]
pub(super) struct Member {
    pub name: &'static str,
    pub kind: Type,
    pub presence: Presence,
}

use Type::{Any, Boolean as Bool, Enum, Integer as Int, List, Object, String as Str};

const fn always(name: &'static str, kind: Type) -> Member {
    Member { name, kind, presence: Presence::Mandatory }
}

const fn maybe(name: &'static str, kind: Type) -> Member {
    Member { name, kind, presence: Presence::Optional }
}

/// Result type of a command that returns an empty object.
pub(super) const NOTHING: Type = Object(EMPTY);
/// Name of the object without members.
pub(super) const EMPTY: &str = "Empty";

const JOB_TYPE: Type = Enum(JOB_TYPES);
const JOB_STATUS: Type = Enum(&[
    "undefined",
    "created",
    "running",
    "paused",
    "ready",
    "standby",
    "waiting",
    "pending",
    "aborting",
    "concluded",
    "null",
]);
const IO_STATUS: Type = Enum(&["ok", "failed", "nospace"]);
const META_TYPE: Type =
    Enum(&["builtin", "enum", "array", "object", "alternate", "command", "event"]);
const JSON_TYPE: Type =
    Enum(&["string", "number", "int", "boolean", "null", "object", "array", "value"]);

/// All objects that occur in replies.
pub(super) const OBJECTS: &[(&str, &[Member])] = &[
    (EMPTY, &[]),
    ("Timestamp", &[always("seconds", Int), always("microseconds", Int)]),
    ("JobProgress", &PROGRESS),
    (
        "Plan",
        &[
            always("id", Str),
            maybe("schedule", Str),
            maybe("finish-by", Str),
            maybe("deadline", Object("Timestamp")),
            always("speed", Int),
            maybe("needed", Int),
            maybe("feasible", Bool),
        ],
    ),
    ("LastJob", &LAST_JOB),
    ("DiskStatus", &STATUS),
    ("KeptBack", &[always("offset", Int), always("len", Int)]),
    (
        "GuestError",
        &[
            always("time", Object("Timestamp")),
            always("operation", Str),
            maybe("offset", Int),
            maybe("length", Int),
            always("message", Str),
        ],
    ),
    (
        "LogMessage",
        &[
            always("time", Object("Timestamp")),
            always("level", Enum(&["warning", "error"])),
            always("message", Str),
        ],
    ),
    (
        "DiskBytes",
        &[always("local", Int), always("zero", Int), always("remote", Int), always("age-ms", Int)],
    ),
    (
        "ChainLayer",
        &[
            always("filename", Str),
            always("format", Enum(&["raw", "qcow2"])),
            always("size", Int),
            always("deleted", Bool),
            always("changed", Bool),
        ],
    ),
    ("SourceStatus", &SOURCE),
    ("Takeover", &TAKEOVER),
    ("RequestCount", &REQUESTS),
    (
        "BackingReads",
        &[
            always("operations", Int),
            always("bytes", Int),
            always("failed", Int),
            always("total-time-ns", Int),
        ],
    ),
    ("Brought", &[always("bytes", Int), always("used", Int), always("overwritten", Int)]),
    ("Waited", &[always("operations", Int), always("total-time-ns", Int)]),
    ("OrderBase", &[always("size", Int), always("head", Str), maybe("pin", Str)]),
    (
        "OrderPage",
        &[
            always("base", Object("OrderBase")),
            always("complete", Bool),
            always("touches", List(&Object("FirstTouch"))),
            maybe("next", Int),
        ],
    ),
    ("FirstTouch", &[always("offset", Int), always("length", Int), always("milliseconds", Int)]),
    ("CopiedUp", &[always("operations", Int), always("bytes", Int), always("failed", Int)]),
    (
        "DiskCells",
        &[
            always("size", Int),
            always("cell-size", Int),
            always("local", List(&Int)),
            always("zero", List(&Int)),
        ],
    ),
    ("DiskMap", &[always("extents", List(&Object("MapEntry"))), maybe("next", Int)]),
    ("MapEntry", &MAP_ENTRY),
    ("VersionTriple", &[always("major", Int), always("minor", Int), always("micro", Int)]),
    ("VersionInfo", &[always("qemu", Object("VersionTriple")), always("package", Str)]),
    ("CommandInfo", &[always("name", Str)]),
    // QEMU has one variant for each meta-type. A client that reads this entry has already
    // understood the schema.
    (
        "SchemaInfo",
        &[
            always("name", Str),
            always("meta-type", META_TYPE),
            maybe("json-type", JSON_TYPE),
            maybe("values", List(&Str)),
            maybe("members", List(&Object("SchemaInfoMember"))),
            maybe("element-type", Str),
            maybe("arg-type", Str),
            maybe("ret-type", Str),
        ],
    ),
    ("SchemaInfoMember", &[always("name", Str), maybe("type", Str), maybe("default", Any)]),
    (
        "BlockInfo",
        &[
            always("device", Str),
            always("type", Str),
            always("removable", Bool),
            always("locked", Bool),
            maybe("inserted", Object("BlockDeviceInfo")),
            maybe("io-status", IO_STATUS),
        ],
    ),
    (
        "BlockDeviceInfo",
        &[
            always("file", Str),
            maybe("node-name", Str),
            always("ro", Bool),
            always("drv", Str),
            maybe("backing_file", Str),
            always("backing_file_depth", Int),
            always("children", List(&Object("BlockdevChild"))),
            always("active", Bool),
            always("encrypted", Bool),
            always("detect_zeroes", Enum(&["off", "on", "unmap"])),
            always("bps", Int),
            always("bps_rd", Int),
            always("bps_wr", Int),
            always("iops", Int),
            always("iops_rd", Int),
            always("iops_wr", Int),
            always("image", Object("ImageInfo")),
            always("cache", Object("BlockdevCacheInfo")),
            always("write_threshold", Int),
        ],
    ),
    ("BlockdevChild", &[always("child", Str), maybe("node-name", Str)]),
    (
        "BlockdevCacheInfo",
        &[always("writeback", Bool), always("direct", Bool), always("no-flush", Bool)],
    ),
    (
        "ImageInfo",
        &[
            always("filename", Str),
            always("format", Str),
            maybe("dirty-flag", Bool),
            maybe("actual-size", Int),
            always("virtual-size", Int),
            maybe("cluster-size", Int),
            maybe("backing-filename", Str),
            maybe("full-backing-filename", Str),
            maybe("backing-filename-format", Str),
            maybe("backing-image", Object("ImageInfo")),
            maybe("format-specific", Object("ImageInfoSpecific")),
        ],
    ),
    // QEMU has a variant for each type; for `file` its data is empty.
    (
        "ImageInfoSpecific",
        &[
            always("type", Enum(&["qcow2", "file"])),
            always("data", Object("ImageInfoSpecificQCow2")),
        ],
    ),
    (
        "ImageInfoSpecificQCow2",
        &[
            maybe("compat", Str),
            maybe("compression-type", Enum(&["zlib", "zstd"])),
            maybe("lazy-refcounts", Bool),
            maybe("refcount-bits", Int),
            maybe("corrupt", Bool),
            maybe("extended-l2", Bool),
        ],
    ),
    (
        "BlockStats",
        &[
            maybe("device", Str),
            maybe("node-name", Str),
            always("stats", Object("BlockDeviceStats")),
            maybe("driver-specific", Object("BlockStatsSpecific")),
            maybe("parent", Object("BlockStats")),
            maybe("backing", Object("BlockStats")),
        ],
    ),
    (
        "BlockStatsSpecific",
        &[
            always("driver", Enum(&["file", "host_device"])),
            always("discard-nb-ok", Int),
            always("discard-nb-failed", Int),
            always("discard-bytes-ok", Int),
        ],
    ),
    (
        "BlockDeviceStats",
        &[
            always("rd_bytes", Int),
            always("wr_bytes", Int),
            always("zone_append_bytes", Int),
            always("unmap_bytes", Int),
            always("rd_operations", Int),
            always("wr_operations", Int),
            always("zone_append_operations", Int),
            always("flush_operations", Int),
            always("unmap_operations", Int),
            always("rd_total_time_ns", Int),
            always("wr_total_time_ns", Int),
            always("zone_append_total_time_ns", Int),
            always("flush_total_time_ns", Int),
            always("unmap_total_time_ns", Int),
            always("wr_highest_offset", Int),
            always("rd_merged", Int),
            always("wr_merged", Int),
            always("zone_append_merged", Int),
            always("unmap_merged", Int),
            maybe("idle_time_ns", Int),
            always("failed_rd_operations", Int),
            always("failed_wr_operations", Int),
            always("failed_zone_append_operations", Int),
            always("failed_flush_operations", Int),
            always("failed_unmap_operations", Int),
            always("invalid_rd_operations", Int),
            always("invalid_wr_operations", Int),
            always("invalid_zone_append_operations", Int),
            always("invalid_flush_operations", Int),
            always("invalid_unmap_operations", Int),
            always("account_invalid", Bool),
            always("account_failed", Bool),
            // Always empty: intervals are set by a command that this program does not have.
            always("timed_stats", List(&Object(EMPTY))),
        ],
    ),
    (
        "BlockExportInfo",
        &[
            always("id", Str),
            always("type", Enum(&["nbd", "vhost-user-blk", "fuse", "vduse-blk"])),
            always("node-name", Str),
            always("shutting-down", Bool),
        ],
    ),
    (
        "BlockJobInfo",
        &[
            always("type", JOB_TYPE),
            always("device", Str),
            always("len", Int),
            always("offset", Int),
            always("busy", Bool),
            always("paused", Bool),
            always("speed", Int),
            always("io-status", IO_STATUS),
            always("ready", Bool),
            always("status", JOB_STATUS),
            always("auto-finalize", Bool),
            always("auto-dismiss", Bool),
            maybe("error", Str),
        ],
    ),
    (
        "JobInfo",
        &[
            always("id", Str),
            always("type", JOB_TYPE),
            always("status", JOB_STATUS),
            always("current-progress", Int),
            always("total-progress", Int),
            maybe("error", Str),
        ],
    ),
];

/// Members of `x-query-status`. `bytes` is absent if the tables of the overlay cannot be read.
const STATUS: [Member; 36] = [
    always("device", Str),
    always("image", Str),
    always("mountpoint", Str),
    always("pid", Int),
    always("version", Str),
    always("start-time", Object("Timestamp")),
    always("size", Int),
    always("cluster-size", Int),
    always("allocated-size", Int),
    always("read-only", Bool),
    always("copy-on-read", Bool),
    // Reason why copy-on-read is paused.
    maybe("copy-on-read-paused", Enum(&["reserve", "error"])),
    always("image-deleted", Bool),
    always("chain", List(&Object("ChainLayer"))),
    // Servers of remote backing files.
    maybe("sources", List(&Object("SourceStatus"))),
    always("usable", Bool),
    always("answering", Bool),
    // What happens if the serving process is killed.
    always("takeover", Object("Takeover")),
    maybe("bytes", Object("DiskBytes")),
    always("requests", List(&Object("RequestCount"))),
    always("latency-bounds-ns", List(&Int)),
    always("backing-reads", Object("BackingReads")),
    always("hits", Int),
    always("misses", Int),
    always("copied-up", Object("CopiedUp")),
    // What became of the blocks that streams have brought.
    always("brought", Object("Brought")),
    // Reads that were not answered at once.
    always("waited", Object("Waited")),
    always("commits", Int),
    always("jobs", List(&Object("JobProgress"))),
    maybe("last-job", Object("LastJob")),
    // Plan of the running job, if it has one.
    maybe("plan", Object("Plan")),
    // Interrupted stream whose note waits beside the image; it resumes at a mount without
    // --no-resume.
    maybe("stream-kept-back", Object("KeptBack")),
    // Address of --metrics, with the port that was bound.
    maybe("metrics", Str),
    // `journal`, `syslog` or a file.
    maybe("log", Str),
    maybe("last-error", Object("GuestError")),
    maybe("last-warning", Object("LogMessage")),
];
const TAKEOVER: [Member; 4] = [
    always("possible", Bool),
    // Why it is not possible.
    maybe("reason", Str),
    always("count", Int),
    maybe("last", Object("Timestamp")),
];
const SOURCE: [Member; 8] = [
    always("name", Str),
    always("up", Bool),
    always("fetched-bytes", Int),
    always("requests", Int),
    always("retries", Int),
    always("latency-us", Int),
    always("cached-bytes", Int),
    maybe("last-error", Str),
];
const REQUESTS: [Member; 6] = [
    always("kind", Enum(&["read", "write", "flush", "discard"])),
    always("operations", Int),
    always("bytes", Int),
    always("failed", Int),
    always("total-time-ns", Int),
    always("latency", List(&Int)),
];
const MAP_ENTRY: [Member; 8] = [
    always("start", Int),
    always("length", Int),
    always("depth", Int),
    always("present", Bool),
    always("zero", Bool),
    always("data", Bool),
    always("compressed", Bool),
    maybe("offset", Int),
];

/// Members of a job's progress. The bytes copied, zero, skipped and failed add up to the offset,
/// except for what was brought before the walk came to it, and for clusters that are larger than a
/// step.
const PROGRESS: [Member; 16] = [
    always("id", Str),
    always("type", JOB_TYPE),
    always("status", JOB_STATUS),
    always("speed", Int),
    always("offset", Int),
    always("len", Int),
    always("bytes-copied", Int),
    always("bytes-zero", Int),
    always("bytes-skipped", Int),
    always("bytes-failed", Int),
    always("start-time", Object("Timestamp")),
    always("rate", Int),
    maybe("bytes-left", Int),
    maybe("seconds-left", Int),
    // The last error, with file and offset.
    maybe("error-detail", Str),
    // In replies to queries only, and only for a job with a plan.
    maybe("plan", Object("Plan")),
];
const LAST_JOB: [Member; 16] = {
    let [id, kind, status, speed, offset, len, copied, zero, skipped, failed, start, ..] = PROGRESS;
    let (result, end) = (Enum(&["success", "error", "cancelled"]), Object("Timestamp"));
    let ours = [
        always("arguments", Any),
        always("result", result),
        always("end-time", end),
        maybe("error", Str),
        maybe("error-detail", Str),
    ];
    let [arguments, result, end, error, detail] = ours;
    [
        id, kind, status, speed, offset, len, copied, zero, skipped, failed, start, arguments,
        result, end, error, detail,
    ]
};

const BLOCK_JOB: [Member; 5] = [
    always("type", JOB_TYPE),
    always("device", Str),
    always("len", Int),
    always("offset", Int),
    always("speed", Int),
];
const COMPLETED: [Member; 6] = {
    let [kind, device, len, offset, speed] = BLOCK_JOB;
    [kind, device, len, offset, speed, maybe("error", Str)]
};

/// All events, with their data.
pub(super) const EVENTS: &[(&str, &[Member])] = &[
    (
        "SHUTDOWN",
        &[
            always("guest", Bool),
            always("reason", Enum(&["host-qmp-quit", "host-signal", "host-error"])),
        ],
    ),
    ("JOB_STATUS_CHANGE", &[always("id", Str), always("status", JOB_STATUS)]),
    ("BLOCK_JOB_COMPLETED", &COMPLETED),
    ("BLOCK_JOB_CANCELLED", &BLOCK_JOB),
    ("BLOCK_JOB_READY", &BLOCK_JOB),
    (
        "BLOCK_JOB_ERROR",
        &[
            always("device", Str),
            always("operation", Enum(&["read", "write"])),
            always("action", Enum(&["ignore", "report", "stop"])),
        ],
    ),
    ("BLOCK_JOB_PENDING", &[always("type", JOB_TYPE), always("id", Str)]),
    ("X_JOB_PROGRESS", &PROGRESS),
    ("BLOCK_EXPORT_DELETED", &[always("id", Str)]),
    ("X_CLOSE_FAILED", &[always("error", Str)]),
];
