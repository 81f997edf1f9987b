//! The jobs of a serving process as text, by which the next process of the same mount continues
//! them if this one is killed. Pure: jobs ⇄ text.
//!
//! The text is JSON. It holds what clients can observe of the jobs, and not where their workers
//! are: a worker that continues a job begins at the start of the disk, and quickly passes over what
//! was done. The text lives in the memory of another process and is never written to a disk.
//!
//! **Invariants:** a job whose end was reported to anyone is kept as ended before: a job is kept
//! with its result after that has taken effect and before its last events are sent
//! ([`super::Control::finish`]). So no job ends twice, and none that has ended starts again. A kill
//! between the two loses the last events, at most once each: the clients lose their connections by
//! the same kill, and find the result in the list of jobs or in the last job. A kill before the job
//! was kept as ended, but after its result has taken effect, makes the next process end the job,
//! which has nothing left to do.
//!
//! The text is untrusted: the process that was killed may have been taken over by an attacker.

use std::time::{Instant, SystemTime};

use serde::{Deserialize, Serialize};

use super::registry::Job;
use super::{Completed, IoStatus, JobInfo, JobSpec, OnError, Status, Work, is_valid_id};
use host::{Error, ErrorKind, Result};

/// The longest text of kept jobs in bytes.
pub const LONGEST_KEPT_JOBS: usize = 48 << 10;

/// The jobs of a process.
#[derive(Clone, Debug, Default, Deserialize, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case", default)]
pub struct KeptJobs {
    /// The jobs, newest first.
    pub(crate) jobs: Vec<KeptJob>,
    /// The job that concluded last.
    pub(crate) last: Option<KeptJob>,
    pub(crate) completed: Completed,
    /// The jobs would have made the text too long.
    pub(crate) left_out: bool,
}

/// A job.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) struct KeptJob {
    pub id: String,
    pub kind: String,
    pub len: u64,
    pub speed: u64,
    pub auto_finalize: bool,
    pub auto_dismiss: bool,
    pub on_error: OnError,
    pub request: String,
    /// See [`super::Control::set_recipe`].
    pub recipe: String,
    pub phase: JobPhase,
    pub offset: u64,
    pub paused: bool,
    pub cancelled: bool,
    /// A pending job whose result may take effect.
    pub finalize: bool,
    pub io_status: IoStatus,
    pub error: Option<String>,
    pub detail: Option<String>,
    pub work: Work,
    pub created: SystemTime,
    pub concluded: Option<SystemTime>,
}

/// How far a job has come.
#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum JobPhase {
    /// The worker has work, or is paused.
    AtWork,
    /// The work is done, and its result has not taken effect.
    Pending,
    /// The job has ended.
    Concluded,
}

impl KeptJobs {
    /// Parses the text that [`super::Jobs::keep_with`] has handed out.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidArgument`] for a text that no list of jobs has.
    pub fn parse(text: &str) -> Result<KeptJobs> {
        let wrong = |why: &str| Error::new(ErrorKind::InvalidArgument, why.to_string());
        if text.len() > LONGEST_KEPT_JOBS {
            return Err(wrong("too long"));
        }
        let kept: KeptJobs =
            serde_json::from_str(text).map_err(|error| wrong(&error.to_string()))?;
        for (at, job) in kept.jobs.iter().enumerate() {
            if !is_valid_id(&job.id) {
                return Err(wrong("an id is none"));
            }
            if kept.jobs.iter().skip(at + 1).any(|other| other.id == job.id) {
                return Err(wrong("two jobs have one id"));
            }
        }
        if kept.jobs.iter().chain(&kept.last).any(|job| job.speed > i64::MAX as u64) {
            return Err(wrong("a speed is too high"));
        }
        Ok(kept)
    }

    /// Returns the text, of at most [`LONGEST_KEPT_JOBS`] bytes. What is only shown to users is
    /// left out of a text that would be too long, and then the jobs themselves.
    pub(super) fn into_text(mut self) -> Result<String> {
        for _ in 0..2 {
            let text = serde_json::to_string(&self)
                .map_err(|error| Error::wrap(ErrorKind::InvalidArgument, "the jobs", error))?;
            if text.len() <= LONGEST_KEPT_JOBS {
                return Ok(text);
            }
            for job in self.jobs.iter_mut().chain(&mut self.last) {
                job.request.clear();
                job.detail = None;
            }
        }
        let rest = KeptJobs { completed: self.completed, left_out: true, ..KeptJobs::default() };
        serde_json::to_string(&rest)
            .map_err(|error| Error::wrap(ErrorKind::InvalidArgument, "the jobs", error))
    }
}

impl KeptJob {
    /// Returns the job, without what only its worker knows; `None` for a job that nobody was told
    /// of.
    pub(super) fn of(job: &Job) -> Option<KeptJob> {
        let phase = match job.status {
            Status::Created | Status::Null => return None,
            Status::Concluded => JobPhase::Concluded,
            _ if job.is_done => JobPhase::Pending,
            _ => JobPhase::AtWork,
        };
        let JobSpec { id, kind, len, speed, auto_finalize, auto_dismiss, on_error, request } =
            job.spec.clone();
        Some(KeptJob {
            id,
            kind: kind.into(),
            len,
            speed,
            auto_finalize,
            auto_dismiss,
            on_error,
            request,
            recipe: job.recipe.clone(),
            phase,
            offset: job.progress().offset,
            paused: job.user_paused,
            cancelled: job.cancelled,
            finalize: job.finalize,
            io_status: job.io_status,
            error: job.error.clone(),
            detail: job.detail.clone(),
            work: job.work,
            created: job.created,
            concluded: job.concluded,
        })
    }

    /// Makes the job again. `kind` is its kind.
    pub(super) fn into_job(self, serial: u64, kind: &'static str) -> Job {
        let spec = JobSpec {
            id: self.id,
            kind,
            len: self.len,
            speed: self.speed,
            auto_finalize: self.auto_finalize,
            auto_dismiss: self.auto_dismiss,
            on_error: self.on_error,
            request: self.request,
        };
        let mut job = Job::new(serial, spec);
        let has_ended = self.phase == JobPhase::Concluded;
        job.status = match self.phase {
            JobPhase::AtWork if self.paused => Status::Paused,
            JobPhase::AtWork => Status::Running,
            JobPhase::Pending => Status::Pending,
            JobPhase::Concluded => Status::Concluded,
        };
        job.is_done = self.phase != JobPhase::AtWork;
        job.recipe = self.recipe;
        // The worker begins at the start of the disk. Until it has come to where its predecessor
        // was, the job shows that offset.
        let offset = self.offset.min(self.len);
        (job.offset, job.shown) = if has_ended { (offset, 0) } else { (0, offset) };
        job.user_paused = self.paused && self.phase == JobPhase::AtWork;
        job.cancelled = self.cancelled;
        job.finalize = self.finalize;
        job.io_status = self.io_status;
        job.error = self.error.filter(|_| has_ended);
        job.detail = self.detail;
        // What has failed is tried again.
        job.work = if has_ended { self.work } else { Work { failed: 0, ..self.work } };
        (job.created, job.concluded) = (self.created, self.concluded.filter(|_| has_ended));
        job.rate_estimate.note(Instant::now(), job.moved());
        job
    }

    pub(super) fn into_info(self, kind: &'static str) -> JobInfo {
        self.into_job(0, kind).info()
    }
}

#[cfg(test)]
mod tests;
