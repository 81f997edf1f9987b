//! The messages between a process that reads remote files and its fetcher: JSON over a socket that
//! keeps the boundaries of messages ([`host::packet`]).

use serde::{Deserialize, Serialize};

use host::ErrorKind;
use host::storage::Need;

use crate::pin::Pin;

/// The longest message in bytes.
pub const LONGEST: usize = 16 << 10;

/// A message to the fetcher. Numbers of requests and files are chosen by the sender.
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub enum FetchRequest {
    /// Open a remote file and its file in the cache. Answered by [`FetchReply::Opened`] with two
    /// descriptors: the data and the map of the cache, both read-only.
    Open {
        /// Number of this request.
        id: u64,
        /// The number that later requests name the file by.
        file: u32,
        /// The name, with everything that may be a secret.
        url: String,
        /// What the file was pinned to earlier.
        pin: Option<Pin>,
        /// Accept a file without a strong validator.
        unpinned: bool,
        /// The digest of the chunk list that the content must have (64 hexadecimal digits).
        digest: Option<String>,
        /// Milliseconds until the request fails; `None` waits for as long as the source is away.
        patience: Option<u64>,
    },
    /// Bring a range into the cache. Answered by [`FetchReply::Have`] when all of it is there.
    Want {
        /// Number of this request.
        id: u64,
        /// The file.
        file: u32,
        /// Offset in bytes.
        offset: u64,
        /// Length in bytes, > 0.
        len: u64,
        /// Milliseconds until the request fails; `None` waits for as long as the source is away.
        patience: Option<u64>,
        /// The range is for a stream, and other ranges overtake it.
        background: bool,
    },
    /// Bring a range into the cache that no request waits for yet. Not answered.
    WillNeed {
        /// The file.
        file: u32,
        /// Offset in bytes.
        offset: u64,
        /// Length in bytes, > 0.
        len: u64,
        /// How soon.
        need: Need,
    },
    /// Forget what [`FetchRequest::WillNeed`] asked for and has not begun. Not answered.
    Enough {
        /// The file.
        file: u32,
    },
    /// The range is not needed any more. A cache that keeps nothing frees it. Not answered.
    Done {
        /// The file.
        file: u32,
        /// Offset in bytes.
        offset: u64,
        /// Length in bytes, > 0.
        len: u64,
    },
    /// Answered by [`FetchReply::Facts`] at once, without a question to a server.
    Facts {
        /// Number of this request.
        id: u64,
    },
    /// Read a small file that lies beside a remote file, as it is now. Answered by
    /// [`FetchReply::Content`] with one descriptor: memory.
    ReadBeside {
        /// Number of this request.
        id: u64,
        /// The name, with everything that may be a secret.
        url: String,
        /// The most bytes that the file may have.
        longest: u64,
        /// Milliseconds until the request fails; `None` waits for as long as the source is away.
        patience: Option<u64>,
    },
    /// Write an order beside a remote file: the first bytes of the memory that comes with this
    /// message. Answered by [`FetchReply::Written`].
    WriteOrder {
        /// Number of this request.
        id: u64,
        /// The name of the remote file, with everything that may be a secret.
        url: String,
        /// Length of the order in bytes.
        len: u64,
        /// Milliseconds until the request fails.
        patience: u64,
    },
}

impl FetchRequest {
    /// The number by which the reply names this request; `None` if it has no reply.
    pub fn id(&self) -> Option<u64> {
        match self {
            FetchRequest::Open { id, .. }
            | FetchRequest::Want { id, .. }
            | FetchRequest::Facts { id }
            | FetchRequest::ReadBeside { id, .. }
            | FetchRequest::WriteOrder { id, .. } => Some(*id),
            FetchRequest::WillNeed { .. }
            | FetchRequest::Enough { .. }
            | FetchRequest::Done { .. } => None,
        }
    }
}

/// A message of the fetcher.
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub enum FetchReply {
    /// The file is open.
    Opened {
        /// Number of the request.
        id: u64,
        /// What the file is pinned to: the pin of the request, or what the server says now.
        pin: Pin,
    },
    /// All of the range is in the cache.
    Have {
        /// Number of the request.
        id: u64,
    },
    /// The request has failed.
    Failed {
        /// Number of the request.
        id: u64,
        /// What has happened.
        failure: FetchFailure,
    },
    /// The state of each open file.
    Facts {
        /// Number of the request.
        id: u64,
        /// The files, by number.
        files: Vec<(u32, SourceFacts)>,
    },
    /// The file that was to be read.
    Content {
        /// Number of the request.
        id: u64,
        /// Length in bytes.
        len: u64,
    },
    /// The order is on the server.
    Written {
        /// Number of the request.
        id: u64,
    },
    /// A record for the log: level (1 is an error) and text. The fetcher has no log of its own.
    Log(usize, String),
}

impl FetchReply {
    /// The number of the request that this is the reply to; `None` for a record of the log.
    pub fn id(&self) -> Option<u64> {
        match self {
            FetchReply::Opened { id, .. }
            | FetchReply::Have { id }
            | FetchReply::Failed { id, .. }
            | FetchReply::Facts { id, .. }
            | FetchReply::Content { id, .. }
            | FetchReply::Written { id } => Some(*id),
            FetchReply::Log(..) => None,
        }
    }
}

/// An error as a message carries it.
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct FetchFailure {
    /// Its kind.
    pub kind: ErrorKind,
    /// The text, without secrets.
    pub text: String,
}

/// What is known of the server of a remote file.
#[derive(Clone, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct SourceFacts {
    /// The name, without what may be a secret.
    pub name: String,
    /// Whether the last request to the server succeeded. True before the first one.
    pub up: bool,
    /// Bytes that the server has sent since the fetcher started.
    pub fetched_bytes: u64,
    /// Requests to the server since the fetcher started.
    pub requests: u64,
    /// Requests among them that failed and were made again.
    pub retries: u64,
    /// Time from a request to the first byte of its answer, in microseconds: a moving average.
    pub latency_us: u64,
    /// Bytes of the file that the cache holds.
    pub cached_bytes: u64,
    /// The last error, and the time in seconds since 1970.
    pub last_error: Option<(String, u64)>,
}
