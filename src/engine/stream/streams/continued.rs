//! The streams of a process that was killed, continued by the next process of the same mount.
//!
//! ```text
//! left at work  ─► a worker from the start of the disk, which passes over what is local
//! left pending  ─► the same pass, when the result may take effect, before the chain is cut
//! chain is cut  ─► nothing to copy: the job ends as its worker would have ended it
//! left ended    ─► stays in the list until it is dismissed
//! ```
//! A worker does not begin where its predecessor was: a chunk that the predecessor had copied may
//! be missing again, because the clusters of a process that was killed are only as many as it had
//! published.

use std::sync::Arc;
use std::thread;
use std::time::Instant;

use super::super::interrupted::{Interrupted, NoteState, names_its_base};
use super::super::note::{BasePlace, Note};
use super::super::plan::Governor;
use super::super::{KIND, Origin, Priority, STREAM_CHUNK, copy_up};
use super::{StreamProgress, Streams};
use crate::chain::Gate;
use crate::disk::Disk;
use crate::job::{Control, Failure, IoStatus, JobPhase, Jobs, KeptJob, KeptJobs, Outcome};
use host::{Error, ErrorKind, Result};

/// The jobs that a killed process has left, compared with the chain while files can still be
/// opened.
#[derive(Debug)]
pub struct KeptStreams {
    jobs: KeptJobs,
    /// The id of each job that has not ended, and how its stream goes on.
    ways: Vec<(String, Result<Way>)>,
}

/// How a stream goes on.
#[derive(Debug)]
struct Way {
    note: Note,
    /// Number of layers to copy up; `None` is all of them, and 0 if the chain was cut.
    depth: Option<usize>,
    phase: JobPhase,
}

impl KeptStreams {
    /// Reads the text that [`Jobs::keep_with`] has handed out. A text that cannot be read is logged
    /// as a warning, and no job is known then. `gate` is the gate through which the chain of the
    /// disk was opened.
    pub fn read(text: &str, disk: &Disk, gate: &Gate) -> KeptStreams {
        let parsed = KeptJobs::parse(text).and_then(|jobs| {
            let is_known = jobs.jobs.iter().chain(&jobs.last).all(|job| job.kind == KIND);
            let wrong = || Error::new(ErrorKind::InvalidArgument, "a job of an unknown kind");
            is_known.then_some(jobs).ok_or_else(wrong)
        });
        let mut jobs = parsed.unwrap_or_else(|error| {
            log::warn!("the jobs of the process before this one are not known: {error}");
            KeptJobs { left_out: true, ..KeptJobs::default() }
        });
        let mut ways = Vec::new();
        for job in jobs.jobs.iter_mut().filter(|job| job.phase != JobPhase::Concluded) {
            let way = Way::of(job, disk, gate);
            // A job without work reaches no checkpoint at which it could be paused.
            job.paused &= way.as_ref().is_ok_and(|way| way.len(disk) > 0);
            ways.push((job.id.clone(), way));
        }
        KeptStreams { jobs, ways }
    }

    /// Returns the number of streams that had completed since the mount.
    pub fn completed(&self) -> u64 {
        self.jobs.completed.successful
    }

    /// Whether these are all jobs of that process. If not, the note beside the image says which
    /// stream was running.
    pub fn is_complete(&self) -> bool {
        !self.jobs.left_out
    }
}

impl Way {
    /// # Errors
    /// The recipe is none, or does not fit the chain.
    fn of(job: &KeptJob, disk: &Disk, gate: &Gate) -> Result<Way> {
        let wrong = |why: &str| Error::new(ErrorKind::InvalidArgument, why.to_string());
        let note = Note::parse_recipe(job.recipe.as_bytes())?;
        let place = match note.base {
            Some(_) => note.place(&disk.info()?.backing),
            // Does not call `disk.info()`, which asks the files below and may hang.
            None if disk.stream_len(usize::MAX) == 0 => BasePlace::Over,
            None => BasePlace::Depth(None),
        };
        let depth = match place {
            BasePlace::Depth(depth) => depth,
            BasePlace::Over => Some(0),
            BasePlace::Elsewhere => return Err(wrong("the chain of backing files is another one")),
        };
        let is_named = place == BasePlace::Over && note.backing_file == disk.backing_name();
        if !is_named && !names_its_base(&note, depth, disk, gate)? {
            return Err(wrong("the name that it would give the base is that of another file"));
        }
        Ok(Way { note, depth, phase: job.phase })
    }

    fn len(&self, disk: &Disk) -> u64 {
        disk.stream_len(self.depth.unwrap_or(usize::MAX))
    }
}

impl Streams {
    /// Takes the jobs of the process before this one over, into an empty registry, and continues
    /// those that had not ended. A job that cannot be continued fails. Does not wait for any job.
    pub fn take_over(&self, disk: &Arc<Disk>, kept: KeptStreams, priority: Priority) {
        let _reserved = self.reserve();
        let KeptStreams { jobs, mut ways } = kept;
        for control in self.shared.jobs.restore(jobs, KIND) {
            let way = ways.iter().position(|(id, _)| id == control.id());
            let way = way.map(|at| ways.swap_remove(at).1).unwrap_or_else(|| {
                Err(Error::new(ErrorKind::InvalidArgument, "the job has no recipe"))
            });
            if let Err((control, error)) = self.go_on(disk, control, way, priority) {
                log::warn!("job {}: it cannot be continued: {error}", control.id());
                control.finish(Outcome::Failed(Failure::from(error)), || Ok(()));
            }
        }
        self.govern(&mut self.shared.state.lock());
    }

    /// Removes the note of a stream that the process before this one has noted, and has not
    /// confirmed to its client: that process did not keep a job for it. A stream that was started
    /// here meanwhile keeps its note.
    pub fn forget(&self, interrupted: &Interrupted) {
        if !matches!(interrupted.0, NoteState::Note(_)) {
            return;
        }
        let _reserved = self.reserve();
        let mut state = self.shared.state.lock();
        if state.serial == 0 {
            self.keep(&mut state, None);
        }
    }

    /// Starts the worker of a job that was taken over.
    ///
    /// # Errors
    /// The stream cannot go on; the job is handed back.
    fn go_on(
        &self,
        disk: &Arc<Disk>,
        control: Control,
        way: Result<Way>,
        priority: Priority,
    ) -> std::result::Result<(), (Control, Error)> {
        let Way { mut note, depth, phase } = match way {
            Ok(way) => way,
            Err(error) => return Err((control, error)),
        };
        let Some(info) = self.info(control.id()) else { return Ok(()) };
        note.job_id = Some(info.progress.id.clone()).filter(|id| *id != self.shared.device);
        if note.plan.is_none() {
            note.speed = info.progress.speed;
        }
        note.paused = info.paused && info.io_status == IoStatus::Ok;
        (note.request, note.offset) = (info.request, info.progress.offset);
        let depth = depth.unwrap_or(usize::MAX);
        let len = disk.stream_len(depth);
        let governor = note.plan.clone().map(Governor::new);
        let backing_file = note.backing_file.clone();
        let (begin, work) = crossbeam_channel::bounded::<Box<dyn FnOnce() + Send>>(1);
        let started = thread::Builder::new()
            .name("stream".into())
            .spawn(move || work.into_iter().for_each(|work| work()));
        if let Err(error) = started {
            let error = Error::io("starting a thread for the stream", error).explain_limit();
            return Err((control, error));
        }
        let mut state = self.shared.state.lock();
        if state.running.is_some() {
            return Err((control, Error::new(ErrorKind::Busy, "another stream is at work")));
        }
        let serial = self.begin(&mut state, &info.progress.id, (len > 0).then_some(note), governor);
        drop(state);
        let (streams, worked) = (self.clone(), Arc::clone(disk));
        let manner = self.manner(priority, depth, len, Origin::Continued);
        let body = move || {
            let mut progress = StreamProgress { streams: &streams, serial, noted: Instant::now() };
            let outcome = match phase {
                JobPhase::AtWork => copy_up(&worked, &control, &manner, &mut progress),
                JobPhase::Pending | JobPhase::Concluded => Outcome::Done,
            };
            let jobs = streams.shared.jobs.clone();
            let detach = || {
                if phase != JobPhase::AtWork {
                    copy_rest(&worked, &jobs, depth, len)?;
                }
                worked.detach_backing(depth, backing_file.as_deref())?;
                // If the chain was cut before, the process was killed perhaps before that was
                // durable (P3).
                if depth == 0 { worked.flush().map_err(Failure::from) } else { Ok(()) }
            };
            control.finish_noting(outcome, detach, |ending| streams.end(serial, ending));
        };
        // The thread is blocked on this channel, so the send cannot fail.
        let _ = begin.send(Box::new(body));
        Ok(())
    }
}

/// Copies up what is missing of a stream that has done its work.
fn copy_rest(disk: &Disk, jobs: &Jobs, depth: usize, len: u64) -> std::result::Result<(), Failure> {
    let mut offset = 0;
    while offset < len {
        if jobs.is_closed() {
            return Err(Failure {
                text: "the daemon is shutting down".into(),
                ..Failure::default()
            });
        }
        let end = len.min(offset.saturating_add(STREAM_CHUNK));
        let done = disk.populate(offset..end, depth).map_err(Failure::from);
        done.map_err(|failure| failure.at(&format!("bytes {offset}..{end}")))?;
        offset = end;
    }
    Ok(())
}

#[cfg(test)]
mod tests;
