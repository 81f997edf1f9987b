//! Structs for the socket's facts about a disk and its jobs: the replies to `x-query-status`,
//! `x-query-job-progress`, `x-query-last-job` and `x-query-cells`, the data of the event
//! `X_JOB_PROGRESS`, and the replies to `query-block-jobs`, `query-block` and
//! `query-named-block-nodes`. (The reply to `x-query-map` is [`engine::map::Page`].)
//!
//! The server fills and writes these structs; a client reads them. A member that a daemon does not
//! send is `None` or its [`Default`]; unknown members are ignored. So a client can read the replies
//! of an older or a newer daemon. Sizes, offsets and amounts are bytes, unless the description
//! names another unit. A client must not trust the values: they come from another process, and can
//! be anything.

mod blocks;

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};
use serde_json::Value;

pub use blocks::{
    BlockDeviceInfo, BlockInfo, BlockdevCacheInfo, BlockdevChild, ImageInfo, ImageInfoSpecific,
};

/// The server of a remote backing file, as the fetcher knows it. Counts begin with the fetcher.
#[derive(Clone, Debug, Default, Deserialize, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case", default)]
pub struct SourceStatus {
    /// The name, without what may be a secret.
    pub name: String,
    /// Whether the last requests succeeded.
    pub up: bool,
    /// Bytes that the server has sent.
    pub fetched_bytes: u64,
    /// Requests to the server.
    pub requests: u64,
    /// Requests that were made again after a failure.
    pub retries: u64,
    /// Time to the first byte of an answer, in microseconds: a moving average.
    pub latency_us: u64,
    /// Bytes of the file that the cache holds.
    pub cached_bytes: u64,
    /// The error that was met last.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub last_error: Option<String>,
}

/// The reply to `x-query-status`.
#[derive(Clone, Debug, Default, Deserialize, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case", default)]
pub struct DiskStatus {
    /// Name of the disk, and default id of its jobs.
    pub device: String,
    /// Absolute path of the overlay.
    pub image: String,
    /// Absolute path at which the disk was mounted.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mountpoint: Option<String>,
    /// Process id of the daemon's main process, to which signals are sent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pid: Option<u32>,
    /// Version of the serving program.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub version: Option<String>,
    /// When the disk was mounted.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub start_time: Option<Timestamp>,
    /// Size of the virtual disk.
    pub size: u64,
    /// Cluster size of the overlay.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cluster_size: Option<u64>,
    /// Space that the overlay takes on the host.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub allocated_size: Option<u64>,
    /// Whether the guest cannot write.
    pub read_only: bool,
    /// Whether reads copy up the data that they read from below.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub copy_on_read: Option<bool>,
    /// Reason why copy-on-read is paused: `reserve` (too little free space) or `error`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub copy_on_read_paused: Option<String>,
    /// Whether the file of the overlay was unlinked.
    pub image_deleted: bool,
    /// Backing files, the one directly below the overlay first.
    pub chain: Vec<ChainLayer>,
    /// Servers of remote backing files, in the order of the chain.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub sources: Vec<SourceStatus>,
    /// `false` if writing to the overlay has failed; nothing is written any more then.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub usable: Option<bool>,
    /// `false` if requests of the kernel wait and none of them is being answered.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub answering: Option<bool>,
    /// What happens if the serving process is killed.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub takeover: Option<TakeoverFacts>,
    /// Allocation of the disk; `None` also if the tables of the overlay cannot be read.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bytes: Option<DiskBytes>,
    /// Requests of the guest since the start, by kind.
    pub requests: Vec<RequestFacts>,
    /// Upper bounds of the classes of [`RequestFacts::latency`], in nanoseconds; the last class has
    /// no bound.
    pub latency_bounds_ns: Vec<u64>,
    /// Reads from the backing files.
    pub backing_reads: BackingReads,
    /// Number of reads that the overlay could answer alone.
    pub hits: u64,
    /// Number of reads that needed a backing file.
    pub misses: u64,
    /// Copies of reads that were stored in the overlay.
    pub copied_up: CopiedUp,
    /// What became of the blocks that streams have brought.
    pub brought: BroughtFacts,
    /// Reads that were not answered at once.
    pub waited: WaitedFacts,
    /// Number of write-back passes.
    pub commits: u64,
    /// All jobs.
    pub jobs: Vec<JobProgress>,
    /// The job that ended last.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub last_job: Option<LastJob>,
    /// PlanFacts of the running job.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub plan: Option<PlanFacts>,
    /// Interrupted stream that resumes at a mount without `--no-resume`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub stream_kept_back: Option<StreamKeptBack>,
    /// Socket address of the metrics server.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub metrics: Option<String>,
    /// Destination of the log besides standard error: `journal`, `syslog` or a file.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub log: Option<String>,
    /// The last request of the guest that failed.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub last_error: Option<GuestError>,
    /// The last warning or error that was logged.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub last_warning: Option<LogMessage>,
}

impl DiskStatus {
    /// Whether requests for the disk wait and none of them is being answered.
    pub fn is_hung(&self) -> bool {
        self.answering == Some(false)
    }

    /// Whether writing to the image has failed, so that nothing is written any more.
    pub fn has_failed(&self) -> bool {
        self.usable == Some(false)
    }
}

/// What happens if the serving process of a disk is killed, and what has happened.
#[derive(Clone, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
#[serde(default)]
pub struct TakeoverFacts {
    /// Whether another process then takes the disk over, and programs do not notice.
    pub possible: bool,
    /// Why none does, in a few words.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// How often the disk was taken over since it was mounted.
    pub count: u64,
    /// When that was the last time.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub last: Option<Timestamp>,
}

/// A point in time. Both members are -1 if the daemon's clock is before 1970, as in QEMU.
#[derive(Clone, Copy, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
#[serde(default)]
pub struct Timestamp {
    /// Seconds since 1970.
    pub seconds: i64,
    /// Microseconds within the second.
    pub microseconds: i64,
}

impl Timestamp {
    /// Returns the point in time; negative members count as 0, and a time that cannot be
    /// represented is 1970.
    pub fn time(self) -> SystemTime {
        let part = |number: i64| u64::try_from(number).unwrap_or_default();
        let since = Duration::from_secs(part(self.seconds))
            .saturating_add(Duration::from_micros(part(self.microseconds)));
        UNIX_EPOCH.checked_add(since).unwrap_or(UNIX_EPOCH)
    }
}

impl From<SystemTime> for Timestamp {
    fn from(at: SystemTime) -> Timestamp {
        match at.duration_since(UNIX_EPOCH) {
            Ok(since) => {
                let seconds = i64::try_from(since.as_secs()).unwrap_or(i64::MAX);
                Timestamp { seconds, microseconds: since.subsec_micros().into() }
            }
            Err(_) => Timestamp { seconds: -1, microseconds: -1 },
        }
    }
}

/// A backing file.
#[derive(Clone, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
#[serde(default)]
pub struct ChainLayer {
    /// Path of the file.
    pub filename: String,
    /// `raw` or `qcow2`.
    pub format: String,
    /// Size of the virtual disk that the file holds.
    pub size: u64,
    /// Whether the file was unlinked.
    pub deleted: bool,
    /// Whether the file was changed while in use.
    pub changed: bool,
}

/// Allocation of a disk.
#[derive(Clone, Copy, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case", default)]
pub struct DiskBytes {
    /// Bytes in the overlay, as data or compressed.
    pub local: u64,
    /// Bytes known to be zero from the tables alone.
    pub zero: u64,
    /// Bytes that have to be read from the backing files.
    pub remote: u64,
    /// Age of these numbers in milliseconds.
    pub age_ms: u64,
}

/// Requests of one kind since the start of the daemon.
#[derive(Clone, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case", default)]
pub struct RequestFacts {
    /// `read`, `write`, `flush` or `discard`.
    pub kind: String,
    /// Number of requests that succeeded.
    pub operations: u64,
    /// Bytes of these requests.
    pub bytes: u64,
    /// Number of requests that failed.
    pub failed: u64,
    /// Total time of the requests that succeeded, in nanoseconds.
    pub total_time_ns: u64,
    /// Number of requests in each latency class: one class more than
    /// [`DiskStatus::latency_bounds_ns`] has bounds.
    pub latency: Vec<u64>,
}

/// Reads from the backing files since the start of the daemon.
#[derive(Clone, Copy, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case", default)]
pub struct BackingReads {
    /// Number of reads that succeeded.
    pub operations: u64,
    /// Bytes of these reads.
    pub bytes: u64,
    /// Number of reads that failed.
    pub failed: u64,
    /// Total time of these reads, in nanoseconds.
    pub total_time_ns: u64,
}

/// What became of the blocks that streams have brought, in bytes.
#[derive(Clone, Copy, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case", default)]
pub struct BroughtFacts {
    /// Blocks that a stream has copied up before the guest has touched them.
    pub bytes: u64,
    /// Those of them that the guest has read since.
    pub used: u64,
    /// Those of them that the guest has written or discarded before it has read them.
    pub overwritten: u64,
}

/// Reads that were not answered at once: they have waited for a base, a copy or a lock.
#[derive(Clone, Copy, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case", default)]
pub struct WaitedFacts {
    /// Number of reads.
    pub operations: u64,
    /// Their time together, in nanoseconds.
    pub total_time_ns: u64,
}

/// What an order of a disk belongs to.
#[derive(Clone, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case", default)]
pub struct OrderBase {
    /// Size of the disk below the overlay.
    pub size: u64,
    /// SHA-256 of its first 64 KiB, as 64 hexadecimal digits.
    pub head: String,
    /// The identity that a server gives the base.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pin: Option<String>,
}

/// The reply to `x-query-order`.
#[derive(Clone, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case", default)]
pub struct OrderPage {
    /// What the order belongs to.
    pub base: OrderBase,
    /// Whether all first touches were recorded.
    pub complete: bool,
    /// The first touches, in the order in which they happened.
    pub touches: Vec<FirstTouchFacts>,
    /// The argument `first` to go on from.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub next: Option<u64>,
}

/// A run of blocks that the guest has read for the first time.
#[derive(Clone, Copy, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case", default)]
pub struct FirstTouchFacts {
    /// Offset.
    pub offset: u64,
    /// Length.
    pub length: u64,
    /// Milliseconds after the disk was opened.
    pub milliseconds: u64,
}

/// Copies of reads since the start of the daemon.
#[derive(Clone, Copy, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
#[serde(default)]
pub struct CopiedUp {
    /// Number of copies.
    pub operations: u64,
    /// Bytes copied.
    pub bytes: u64,
    /// Number of copies that failed.
    pub failed: u64,
}

/// An interrupted stream that resumes at another mount.
#[derive(Clone, Copy, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
#[serde(default)]
pub struct StreamKeptBack {
    /// Bytes processed so far.
    pub offset: u64,
    /// Total bytes.
    pub len: u64,
}

/// A request of the guest that failed.
#[derive(Clone, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
#[serde(default)]
pub struct GuestError {
    /// Time of the failure.
    pub time: Timestamp,
    /// Kind of the request: `read`, `write` and so on.
    pub operation: String,
    /// Offset in the disk, for requests that have one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub offset: Option<u64>,
    /// Length of the request; 0 if it is unknown.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub length: Option<u64>,
    /// Error text, with the file.
    pub message: String,
}

/// A message that a daemon has logged.
#[derive(Clone, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
#[serde(default)]
pub struct LogMessage {
    /// Time of the message.
    pub time: Timestamp,
    /// `warning` or `error`.
    pub level: String,
    /// Text of the message, one line.
    pub message: String,
}

/// A job: an element of the reply to `x-query-job-progress`, and the data of the event
/// `X_JOB_PROGRESS`.
///
/// The bytes copied, zero, skipped and failed add up to the offset, except for what was brought
/// before the walk came to it, and for clusters that are
/// larger than a step of the job.
#[derive(Clone, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case", default)]
pub struct JobProgress {
    /// Id of the job.
    pub id: String,
    /// `stream`.
    #[serde(rename = "type")]
    pub kind: String,
    /// QEMU's `JobStatus`.
    pub status: String,
    /// Rate limit in bytes per second; 0 is unlimited.
    pub speed: u64,
    /// Bytes processed.
    pub offset: u64,
    /// Total bytes.
    pub len: u64,
    /// Bytes copied.
    pub bytes_copied: u64,
    /// Bytes read and found to be zero.
    pub bytes_zero: u64,
    /// Bytes that needed no work.
    pub bytes_skipped: u64,
    /// Bytes skipped because of an error.
    pub bytes_failed: u64,
    /// Time of creation.
    pub start_time: Timestamp,
    /// Bytes per second that were read in the last few seconds.
    pub rate: u64,
    /// Bytes that are left to copy; absent until the forecast is complete.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bytes_left: Option<u64>,
    /// Seconds that the rest takes at the current rate.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub seconds_left: Option<u64>,
    /// The last error, with file and offset.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub error_detail: Option<String>,
    /// PlanFacts that sets the speed; only in replies to `x-query-job-progress`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub plan: Option<PlanFacts>,
}

impl JobProgress {
    /// Whether the job is paused, by a user or by an error.
    pub fn is_paused(&self) -> bool {
        matches!(self.status.as_str(), "paused" | "standby")
    }

    /// Whether the job has ended and waits for a client to dismiss it.
    pub fn is_concluded(&self) -> bool {
        self.status == "concluded"
    }
}

/// The job that ended last: the reply to `x-query-last-job`. The first members are those of
/// [`JobProgress`].
#[derive(Clone, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case", default)]
#[expect(missing_docs, reason = "the members of JobProgress are described there")]
pub struct LastJob {
    pub id: String,
    #[serde(rename = "type")]
    pub kind: String,
    pub status: String,
    pub speed: u64,
    pub offset: u64,
    pub len: u64,
    pub bytes_copied: u64,
    pub bytes_zero: u64,
    pub bytes_skipped: u64,
    pub bytes_failed: u64,
    pub start_time: Timestamp,
    /// Arguments with which the job was started.
    pub arguments: Value,
    /// `success`, `error` or `cancelled`.
    pub result: String,
    /// Time of the end.
    pub end_time: Timestamp,
    /// Reason of a failure or cancel, in QEMU's words.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
    /// The last error, with file and offset.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub error_detail: Option<String>,
}

/// A plan that sets the speed of a job.
#[derive(Clone, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case", default)]
pub struct PlanFacts {
    /// Id of the job.
    pub id: String,
    /// Schedule, as typed.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub schedule: Option<String>,
    /// Deadline as a time of day.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub finish_by: Option<String>,
    /// Deadline as an instant.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub deadline: Option<Timestamp>,
    /// Bytes per second that the plan has set; 0 is unlimited.
    pub speed: u64,
    /// Average bytes per second needed until the deadline.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub needed: Option<u64>,
    /// Whether the job is expected to meet the deadline.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub feasible: Option<bool>,
}

/// Allocation of a disk in cells of equal size; the end of the disk may cut off the last cell. The
/// reply to `x-query-cells`.
#[derive(Clone, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case", default)]
pub struct DiskCells {
    /// Size of the disk.
    pub size: u64,
    /// Size of a cell.
    pub cell_size: u64,
    /// Bytes of each cell that are in the overlay.
    pub local: Vec<u64>,
    /// Bytes of each cell that are known to be zero.
    pub zero: Vec<u64>,
}

/// An element of the reply to `query-block-jobs`, QEMU's `BlockJobInfo`.
#[derive(Clone, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case", default)]
pub struct BlockJobInfo {
    /// `stream`.
    #[serde(rename = "type")]
    pub kind: String,
    /// Id of the job.
    pub device: String,
    /// Total bytes.
    pub len: u64,
    /// Bytes processed.
    pub offset: u64,
    /// Whether the worker runs: it neither sleeps nor has it ended.
    pub busy: bool,
    /// Whether a client or an error has requested a pause.
    pub paused: bool,
    /// Rate limit in bytes per second; 0 is unlimited.
    pub speed: u64,
    /// Kind of the error that has stopped the job: `ok` (none), `failed` or `nospace`.
    pub io_status: String,
    /// Always `false`: a stream is never ready.
    pub ready: bool,
    /// QEMU's `JobStatus`.
    pub status: String,
    /// Whether the result takes effect without `block-job-finalize`.
    pub auto_finalize: bool,
    /// Whether the job is removed at its end without `block-job-dismiss`.
    pub auto_dismiss: bool,
    /// Reason of the failure.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
}

#[cfg(test)]
mod tests;
