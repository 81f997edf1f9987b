//! Errors of requests to jobs, and failures inside jobs.

use std::fmt;
use std::io;

use super::{Status, Verb};
use host::error::{Error, ErrorKind, os_text};

/// Reason why the registry refused a request. The texts are QEMU's (`job.c`, `job-qmp.c`,
/// `blockdev.c`).
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum JobError {
    /// There is no job of this id.
    NotFound,
    /// The job does not accept the verb in its status.
    VerbRefused {
        /// Id of the job.
        id: String,
        /// Status of the job.
        status: Status,
        /// The verb that was refused.
        verb: Verb,
    },
    /// A pause of a job that is already paused.
    AlreadyPaused,
    /// A resume of a job that is not paused.
    NotPaused,
    /// A cancel without force of a paused job.
    CurrentlyPaused {
        /// Id of the job.
        id: String,
    },
    /// There is already a job of this id.
    AlreadyInUse {
        /// The id.
        id: String,
    },
    /// The id is not a letter followed by letters, digits, `-`, `.` and `_`.
    InvalidId {
        /// The id.
        id: String,
    },
    /// The process is about to end, so no job can be started.
    ShuttingDown,
}

impl fmt::Display for JobError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            JobError::NotFound => f.write_str("Job not found"),
            JobError::VerbRefused { id, status, verb } => {
                write!(f, "Job '{id}' in state '{status}' cannot accept command verb '{verb}'")
            }
            JobError::AlreadyPaused => f.write_str("Job is already paused"),
            JobError::NotPaused => f.write_str("Can't resume a job that was not paused"),
            JobError::CurrentlyPaused { id } => {
                write!(f, "The block job for device '{id}' is currently paused")
            }
            JobError::AlreadyInUse { id } => write!(f, "Job ID '{id}' already in use"),
            JobError::InvalidId { id } => write!(f, "Invalid job ID '{id}'"),
            JobError::ShuttingDown => f.write_str("the daemon is shutting down"),
        }
    }
}

impl std::error::Error for JobError {}

impl From<JobError> for Error {
    fn from(error: JobError) -> Self {
        let kind = match error {
            JobError::NotFound => ErrorKind::NotFound,
            JobError::AlreadyInUse { .. } | JobError::ShuttingDown => ErrorKind::Busy,
            _ => ErrorKind::InvalidArgument,
        };
        Error::new(kind, error.to_string())
    }
}

/// Reason why a chunk or a whole job failed, as it is reported to users.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct Failure {
    /// The text of strerror(3) if there is an errno (QEMU reports only that text), otherwise the
    /// whole error.
    pub text: String,
    /// The whole error, with file and offset; empty if it is the same as `text`.
    pub detail: String,
    /// The cause is a lack of space, on which some policies stop.
    pub no_space: bool,
}

impl From<&Error> for Failure {
    fn from(error: &Error) -> Self {
        let no_space = error.kind() == ErrorKind::NoSpace;
        let text = match error.errno() {
            Some(errno) => os_text(&io::Error::from_raw_os_error(errno)),
            None if no_space => {
                os_text(&io::Error::from_raw_os_error(rustix::io::Errno::NOSPC.raw_os_error()))
            }
            None => error.to_string(),
        };
        let detail = error.to_string();
        Failure { detail: if detail == text { String::new() } else { detail }, text, no_space }
    }
}

impl Failure {
    /// Prefixes the whole error with `place`.
    #[must_use]
    pub fn at(self, place: &str) -> Failure {
        let what = if self.detail.is_empty() { &self.text } else { &self.detail };
        Failure { detail: format!("{place}: {what}"), ..self }
    }
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        Failure::from(&error)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn failures_speak_as_strerror_does() {
        let error = Error::io("base.raw: reading 512 bytes at 0", io::Error::from_raw_os_error(5));
        let detail = "base.raw: reading 512 bytes at 0: Input/output error";
        let failure =
            Failure { text: "Input/output error".into(), detail: detail.into(), no_space: false };
        assert_eq!(Failure::from(error), failure);
        assert_eq!(failure.at("stream").detail, format!("stream: {detail}"));
        let error = Error::new(ErrorKind::NoSpace, "the refcount table is full");
        let detail = "the refcount table is full".into();
        assert_eq!(
            Failure::from(error),
            Failure { text: "No space left on device".into(), detail, no_space: true }
        );
        let error = Error::new(ErrorKind::Corrupt, "L2 entry 0x2");
        assert_eq!(
            Failure::from(error),
            Failure { text: "L2 entry 0x2".into(), detail: String::new(), no_space: false }
        );
    }

    #[test]
    fn refusals_speak_as_qemu_does() {
        let refused =
            JobError::VerbRefused { id: "j".into(), status: Status::Running, verb: Verb::Complete };
        assert_eq!(
            refused.to_string(),
            "Job 'j' in state 'running' cannot accept command verb 'complete'"
        );
        assert_eq!(
            Error::from(JobError::InvalidId { id: "1x".into() }).to_string(),
            "Invalid job ID '1x'"
        );
    }
}
