//! The streams of a disk as one thing that outlives each of them: it starts them, keeps their note, and lets a plan govern their speed.
//!
//! **Locks:** `starting`, before all others; `state`, before the jobs' and never inside one of the disk's. It is held while the note is written, so that notes come one after the
//! other; no worker waits for it between chunks but once in [`NOTE_INTERVAL`].
//! **Invariants:** a note is only ever written for the stream that runs ([`Running::serial`]), and removed before that is told to have ended. While a
//! plan governs a job, whoever else sets its speed does so under `state` and ends the plan first: what a user set last counts.

use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use jiff::Timestamp;
use jiff::tz::TimeZone;
use parking_lot::{Condvar, Mutex, MutexGuard};

use super::interrupted::{Interrupted, Seen};
use super::note::{Base, Note, Place};
use super::plan::{Governor, LOOK, Look, Plan, PlanInfo};
use super::{KIND, Priority, StreamOptions, copy_up};
use crate::disk::Disk;
use crate::job::{Ending, Failure, IoStatus, JobError, JobInfo, JobSpec, Jobs, Verb};
use crate::{Error, ErrorKind, Result};

/// How often a running stream notes how far it is: for a line in the log of who resumes it.
const NOTE_INTERVAL: Duration = Duration::from_secs(10);

/// Writes the note of the stream that runs, or removes it.
pub type Keep = Box<dyn Fn(Option<&str>) -> Result<()> + Send + Sync>;

/// The streams of one disk; clones are the same.
#[derive(Clone)]
pub struct Streams {
    shared: Arc<Shared>,
}

struct Shared {
    jobs: Jobs,
    /// The name of a job that was given none.
    device: String,
    zone: TimeZone,
    keep: Keep,
    started: Instant,
    /// As [`Streams::starting`].
    starting: Arc<Mutex<()>>,
    state: Mutex<State>,
    /// A plan has ended, or its job.
    changed: Condvar,
}

#[derive(Default)]
struct State {
    running: Option<Running>,
    /// Counts streams.
    serial: u64,
    /// That there can be no notes was said.
    warned: bool,
    /// The stream that waits for another mount. None once one was started here, whose note takes
    /// the place of its own.
    kept_back: Option<KeptBack>,
}

/// How far a stream had come that is not started again by this mount.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct KeptBack {
    /// Bytes of the disk that were dealt with.
    pub offset: u64,
    /// All of them.
    pub len: u64,
}

struct Running {
    serial: u64,
    id: String,
    /// `None` for one that has nothing to do.
    note: Option<Note>,
    governor: Option<Governor>,
    /// There is a thread that asks the governor.
    governed: bool,
}

impl std::fmt::Debug for Streams {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Streams").field("device", &self.shared.device).finish_non_exhaustive()
    }
}

/// The time zone of schedules and deadlines, read from the files of the system: to be called while files can be opened. UTC where there is none.
pub fn local_zone() -> TimeZone {
    TimeZone::system()
}

impl Streams {
    /// Those of `disk`, whose jobs are called `device` unless they are named.
    pub fn new(disk: &Arc<Disk>, jobs: &Jobs, device: &str, zone: TimeZone) -> Streams {
        let disk = Arc::clone(disk);
        Streams::keeping(jobs, device, zone, Box::new(move |note| disk.set_stream_note(note)))
    }

    /// With somebody else to keep the notes.
    pub fn keeping(jobs: &Jobs, device: &str, zone: TimeZone, keep: Keep) -> Streams {
        let (jobs, device) = (jobs.clone(), device.to_string());
        let (starting, state, changed) = (Arc::default(), Mutex::default(), Condvar::new());
        Streams { shared: Arc::new(Shared { jobs, device, zone, keep, started: Instant::now(), starting, state, changed }) }
    }

    /// Held by whoever looks at the chain and then starts a stream by what was seen, or changes the size: between the two nobody else does. Taken while no
    /// other lock is held.
    pub fn starting(&self) -> Arc<Mutex<()>> {
        Arc::clone(&self.shared.starting)
    }

    /// Starts a stream on a thread of its own.
    ///
    /// # Errors
    /// [`ErrorKind::ReadOnly`] for a read-only disk; [`ErrorKind::Busy`] while another one runs; what [`Jobs::create`] refuses; the thread could not
    /// be made.
    pub fn start(&self, disk: &Arc<Disk>, options: StreamOptions) -> Result<()> {
        if disk.is_read_only() {
            return Err(Error::new(ErrorKind::ReadOnly, "a read-only disk cannot be streamed into"));
        }
        let depth = options.depth.unwrap_or(usize::MAX);
        let len = disk.stream_len(depth);
        let plan = options.plan.clone().map(|plan| plan.started(Timestamp::now(), &self.shared.zone));
        let mut governor = plan.map(Governor::new);
        let up = self.shared.started.elapsed();
        let look = Look { now: Timestamp::now(), up, done: 0, left: len, is_forecast: false, paused: options.paused };
        let speed = governor.as_mut().map_or(options.speed, |governor| governor.order(look, &self.shared.zone).speed);
        let base = options.depth.map(|depth| disk.info().map(|info| Base::below(&info.backing, depth))).transpose()?.flatten();
        let note = (len > 0).then(|| self.note(disk, &options, base, governor.as_ref(), len));
        let mut state = self.shared.state.lock();
        // There is one chain. Clients are told before they come here; this is for one that is faster than the stream of the last mount.
        if state.running.is_some() {
            return Err(Error::new(ErrorKind::Busy, "another stream is at work"));
        }
        let control = self.shared.jobs.create(JobSpec {
            id: options.job_id.clone(),
            kind: KIND,
            len,
            speed,
            auto_finalize: options.auto_finalize,
            auto_dismiss: options.auto_dismiss,
            on_error: options.on_error,
            request: options.request.clone(),
        })?;
        let serial = self.begin(&mut state, &options.job_id, note, governor);
        drop(state);
        if options.paused {
            // It has just been created; it cannot refuse.
            let _ = self.shared.jobs.pause(&options.job_id);
        }
        control.start();
        let (streams, worked) = (self.clone(), Arc::clone(disk));
        let body = move || {
            let mut progress = Progress { streams: &streams, serial, noted: Instant::now() };
            let outcome = copy_up(&worked, &control, options.priority, depth, len, &mut progress);
            let detach = || worked.detach_backing(depth, options.backing_file.as_deref()).map_err(Failure::from);
            control.finish_noting(outcome, detach, |ending| streams.end(serial, ending));
        };
        thread::Builder::new().name("stream".into()).spawn(body).map_err(|error| {
            self.end(serial, Ending::Failed);
            Error::io("stream thread", error)
        })?;
        self.govern(&mut self.shared.state.lock());
        Ok(())
    }

    /// Starts the stream again that was running when the last process ended that had this image, if there was one. Never fails: a note that is not
    /// obeyed is warned of, and removed unless it may be right another time.
    pub fn resume(&self, disk: &Arc<Disk>, interrupted: Interrupted, priority: Priority) {
        if disk.is_read_only() {
            return self.keep_back(disk, &interrupted);
        }
        let note = match interrupted.0 {
            Seen::Nothing => return,
            Seen::Note(note) => *note,
            Seen::Unreadable(error) => return log::warn!("the note of an interrupted stream is not obeyed: {error}"),
            Seen::Foreign(why) => {
                log::warn!("the note of an interrupted stream is not obeyed, and removed: {why}");
                let _starting = self.shared.starting.lock();
                let mut state = self.shared.state.lock();
                // Unless a client was faster: then it is the note of that client's stream by now.
                if state.serial == 0 {
                    self.keep(&mut state, None);
                }
                return;
            }
        };
        // A client may be faster than we are: then the note beside the image is that of its stream, and the chain may be another one at any moment.
        let _starting = self.shared.starting.lock();
        if self.shared.state.lock().serial != 0 {
            return log::warn!("the interrupted stream is not resumed: another stream was faster");
        }
        let place = match note.base {
            Some(_) => disk.info().map(|info| note.place(&info.backing)),
            // Not a word with files below, which may hang.
            None if disk.stream_len(usize::MAX) == 0 => Ok(Place::Over),
            None => Ok(Place::Depth(None)),
        };
        let depth = match place {
            Ok(Place::Depth(depth)) if note.backing == disk.backing_name() => depth,
            Ok(Place::Over) => {
                log::debug!("the stream had come to its end");
                return self.keep(&mut self.shared.state.lock(), None);
            }
            Ok(Place::Elsewhere | Place::Depth(_)) => {
                return log::warn!(
                    "a stream was interrupted and is not resumed: the chain of backing files is another one since; start it anew"
                );
            }
            Err(error) => return log::warn!("a stream was interrupted and is not resumed: {error}"),
        };
        log::info!("resuming the stream that was interrupted at {} %", note.percent());
        if let Err(error) = self.start(disk, note.into_options(depth, &self.shared.device, priority)) {
            log::warn!("the interrupted stream is not resumed: {error}");
        }
    }

    /// Leaves the stream that was interrupted for another mount, and remembers that there is one.
    /// The note is not touched, and one that means nothing is no stream.
    pub fn keep_back(&self, disk: &Disk, interrupted: &Interrupted) {
        let Seen::Note(note) = &interrupted.0 else { return };
        if note.base.is_none() && disk.stream_len(usize::MAX) == 0 {
            return;
        }
        let mut state = self.shared.state.lock();
        // A client may have started one of its own already.
        if state.serial == 0 {
            state.kept_back = Some(KeptBack { offset: note.offset, len: note.len });
        }
    }

    /// The stream that waits for another mount, if there is one.
    pub fn kept_back(&self) -> Option<KeptBack> {
        self.shared.state.lock().kept_back
    }

    /// As [`Jobs::set_speed`], by a user: the plan of the job ends, and a stream that is resumed has this speed.
    ///
    /// # Errors
    /// Those of [`Jobs::set_speed`].
    pub fn set_speed(&self, id: &str, speed: u64) -> std::result::Result<(), JobError> {
        let mut state = self.shared.state.lock();
        self.shared.jobs.set_speed(id, speed)?;
        self.amend(&mut state, id, |running| {
            running.governor = None;
            if let Some(note) = &mut running.note {
                (note.plan, note.speed) = (None, speed);
            }
        });
        Ok(())
    }

    /// From now on the speed of the job follows `plan`; without one it stays what it is.
    ///
    /// # Errors
    /// [`JobError::NotFound`] where `id` is no stream; [`JobError::VerbRefused`].
    pub fn set_plan(&self, id: &str, plan: Option<Plan>) -> std::result::Result<(), JobError> {
        let mut state = self.shared.state.lock();
        let info = self.info(id).ok_or(JobError::NotFound)?;
        if state.running.as_ref().is_none_or(|running| running.id != id) {
            return Err(JobError::NotFound);
        }
        self.shared.jobs.check(id, Verb::SetSpeed)?;
        let plan = plan.map(|plan| plan.started(Timestamp::now(), &self.shared.zone));
        self.amend(&mut state, id, |running| {
            running.governor = plan.clone().map(Governor::new);
            if let Some(note) = &mut running.note {
                (note.plan, note.speed) = (plan, info.progress.speed);
            }
        });
        self.look(&mut state);
        self.govern(&mut state);
        Ok(())
    }

    /// Facts of the plan that governs the stream, if there is one.
    pub fn plan(&self) -> Option<PlanInfo> {
        let state = self.shared.state.lock();
        let running = state.running.as_ref()?;
        running.governor.as_ref().map(|governor| governor.info(&running.id))
    }

    /// To be called after a user has paused or resumed a job.
    pub fn changed(&self, id: &str) {
        let mut state = self.shared.state.lock();
        let Some(info) = self.info(id) else { return };
        // One that an error has stopped tries again when it is resumed.
        let paused = info.paused && info.io_status == IoStatus::Ok;
        self.amend(&mut state, id, |running| {
            if let Some(note) = &mut running.note {
                note.paused = paused;
            }
        });
    }

    fn note(&self, disk: &Disk, options: &StreamOptions, base: Option<Base>, governor: Option<&Governor>, len: u64) -> Note {
        let StreamOptions { job_id, speed, paused, on_error, auto_finalize, auto_dismiss, backing_file, request, .. } = options.clone();
        Note {
            file: disk.file_id().cloned(),
            backing: disk.backing_name(),
            job_id: Some(job_id).filter(|id| *id != self.shared.device),
            base,
            speed,
            plan: governor.map(|governor| governor.plan().clone()),
            on_error,
            auto_finalize,
            auto_dismiss,
            backing_file,
            request,
            paused,
            offset: 0,
            len,
        }
    }

    fn begin(&self, state: &mut MutexGuard<'_, State>, id: &str, note: Option<Note>, governor: Option<Governor>) -> u64 {
        state.serial += 1;
        state.kept_back = None;
        let serial = state.serial;
        state.running = Some(Running { serial, id: id.to_string(), note, governor, governed: false });
        self.write(state);
        serial
    }

    fn end(&self, serial: u64, ending: Ending) {
        let mut state = self.shared.state.lock();
        let Some(running) = state.running.take_if(|running| running.serial == serial) else { return };
        self.shared.changed.notify_all();
        if ending == Ending::Abandoned {
            // The process ends, not the job. How far it has come is worth a line to who resumes it.
            let offset = self.info(&running.id).map(|info| info.progress.offset);
            if let (Some(mut note), Some(offset)) = (running.note, offset) {
                note.offset = offset;
                self.keep(&mut state, Some(&note));
            }
        } else {
            self.keep(&mut state, None);
        }
    }

    /// Changes what is known of the stream `id`, if it is the one that runs, and its note.
    fn amend(&self, state: &mut MutexGuard<'_, State>, id: &str, change: impl FnOnce(&mut Running)) {
        let Some(running) = state.running.as_mut().filter(|running| running.id == id) else { return };
        let before = running.note.clone();
        change(running);
        let changed = running.note != before;
        self.shared.changed.notify_all();
        if changed {
            self.write(state);
        }
    }

    /// Writes the note of what runs.
    fn write(&self, state: &mut MutexGuard<'_, State>) {
        if let Some(note) = state.running.as_ref().and_then(|running| running.note.clone()) {
            self.keep(state, Some(&note));
        }
    }

    fn keep(&self, state: &mut MutexGuard<'_, State>, note: Option<&Note>) {
        let kept = match note.map(Note::to_text).transpose() {
            Ok(text) => (self.shared.keep)(text.as_deref()),
            Err(error) => Err(error),
        };
        if let Err(error) = kept
            && !std::mem::replace(&mut state.warned, true)
        {
            match note {
                Some(_) => log::warn!("{error}: the stream would not be resumed after a restart"),
                None => log::warn!("{error}: the note of the stream stays, and it would start again at the next mount (--no-resume)"),
            }
        }
    }

    fn info(&self, id: &str) -> Option<JobInfo> {
        self.shared.jobs.query().into_iter().find(|info| info.progress.id == id)
    }

    /// Has a plan, if there is one, looked after by a thread.
    fn govern(&self, state: &mut MutexGuard<'_, State>) {
        let Some(running) = state.running.as_mut().filter(|running| running.governor.is_some() && !running.governed) else { return };
        let (streams, serial) = (self.clone(), running.serial);
        match thread::Builder::new().name("plan".into()).spawn(move || streams.follow(serial)) {
            Ok(_) => running.governed = true,
            Err(error) => log::warn!("starting a thread: {error}; the speed of the stream stays what it is"),
        }
    }

    /// Until the plan ends, or the stream.
    fn follow(&self, serial: u64) {
        let mut state = self.shared.state.lock();
        loop {
            let Some(running) = state.running.as_mut().filter(|running| running.serial == serial) else { return };
            if running.governor.is_none() {
                running.governed = false;
                return;
            }
            self.look(&mut state);
            self.shared.changed.wait_for(&mut state, LOOK);
        }
    }

    /// Gives the job the speed that its plan wants now.
    fn look(&self, state: &mut MutexGuard<'_, State>) {
        let Some(running) = state.running.as_mut() else { return };
        let (Some(governor), Some(info)) = (running.governor.as_mut(), self.info(&running.id)) else { return };
        let (done, left) = match info.left {
            Some(left) => (info.work.copied + info.work.zeroed, left),
            None => (info.progress.offset, info.progress.len.saturating_sub(info.progress.offset)),
        };
        let look = Look {
            now: Timestamp::now(),
            up: self.shared.started.elapsed(),
            done,
            left,
            is_forecast: info.left.is_some(),
            paused: info.paused,
        };
        let order = governor.order(look, &self.shared.zone);
        if let Some(news) = order.news {
            log::warn!("{news}");
        }
        if order.speed != info.progress.speed {
            // A job that is about to end has no speed any more.
            let _ = self.shared.jobs.set_speed(&running.id, order.speed);
        }
    }
}

/// How a stream says how far it has come.
pub(super) struct Progress<'a> {
    streams: &'a Streams,
    serial: u64,
    noted: Instant,
}

impl Progress<'_> {
    /// Between chunks.
    pub fn at(&mut self, offset: u64) {
        if self.noted.elapsed() < NOTE_INTERVAL {
            return;
        }
        self.noted = Instant::now();
        let mut state = self.streams.shared.state.lock();
        if let Some(note) = state.running.as_mut().filter(|running| running.serial == self.serial).and_then(|running| running.note.as_mut())
        {
            note.offset = offset;
        }
        self.streams.write(&mut state);
    }
}
