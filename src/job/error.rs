//! What can be wrong with a request to a job, and what can go wrong inside one.

use std::fmt;
use std::io;

use super::{Status, Verb};
use crate::error::{Error, ErrorKind, os_text};

/// Why a request to the registry was refused. The texts are QEMU's (`job.c`, `job-qmp.c`, `blockdev.c`).
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum JobError {
    /// There is no job of that name.
    NotFound,
    /// The verb makes no sense in the job's status.
    VerbRefused {
        /// Which job.
        id: String,
        /// Its status.
        status: Status,
        /// What was asked.
        verb: Verb,
    },
    /// Pause of a job that a user has paused.
    AlreadyPaused,
    /// Resume of a job that no user has paused.
    NotPaused,
    /// A cancel that was not forced, of a paused job.
    CurrentlyPaused {
        /// Which job.
        id: String,
    },
    /// A second job of the same name.
    AlreadyInUse {
        /// The name.
        id: String,
    },
    /// The name is not a letter followed by letters, digits, `-`, `.` and `_`.
    InvalidId {
        /// The name.
        id: String,
    },
    /// The process is about to end, no job can be started.
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
            JobError::CurrentlyPaused { id } => write!(f, "The block job for device '{id}' is currently paused"),
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

/// Why a chunk or a whole job failed, as its users are told.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct Failure {
    /// The text of strerror(3) where the operating system is to blame (QEMU says no more than that), else the whole error.
    pub text: String,
    /// The whole error, with the file and the offset; empty where `text` is all there is to say.
    pub detail: String,
    /// It failed for want of space: some policies stop only for that.
    pub no_space: bool,
}

impl From<&Error> for Failure {
    fn from(error: &Error) -> Self {
        let no_space = error.kind() == ErrorKind::NoSpace;
        let text = match error.errno() {
            Some(errno) => os_text(&io::Error::from_raw_os_error(errno)),
            None if no_space => os_text(&io::Error::from_raw_os_error(rustix::io::Errno::NOSPC.raw_os_error())),
            None => error.to_string(),
        };
        let detail = error.to_string();
        Failure { detail: if detail == text { String::new() } else { detail }, text, no_space }
    }
}

impl Failure {
    /// With `place` in front of the whole error.
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
        let failure = Failure { text: "Input/output error".into(), detail: detail.into(), no_space: false };
        assert_eq!(Failure::from(error), failure);
        assert_eq!(failure.at("stream").detail, format!("stream: {detail}"));
        let error = Error::new(ErrorKind::NoSpace, "the refcount table is full");
        let detail = "the refcount table is full".into();
        assert_eq!(Failure::from(error), Failure { text: "No space left on device".into(), detail, no_space: true });
        let error = Error::new(ErrorKind::Corrupt, "L2 entry 0x2");
        assert_eq!(Failure::from(error), Failure { text: "L2 entry 0x2".into(), detail: String::new(), no_space: false });
    }

    #[test]
    fn refusals_speak_as_qemu_does() {
        let refused = JobError::VerbRefused { id: "j".into(), status: Status::Running, verb: Verb::Complete };
        assert_eq!(refused.to_string(), "Job 'j' in state 'running' cannot accept command verb 'complete'");
        assert_eq!(Error::from(JobError::InvalidId { id: "1x".into() }).to_string(), "Invalid job ID '1x'");
    }
}
