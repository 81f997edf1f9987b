//! Manages the streams of one disk over its life: starts them, keeps the note of the running one,
//! and applies a plan to its speed.
//!
//! **Locks:** `reserved`, before all others ([`Streams::reserve`]); `state`, before those of the
//! jobs and never while a lock of the disk is held. `state` is held while the note is written, so
//! that writes of the note do not overlap. The job's thread takes `state` between chunks at most
//! once in [`NOTE_INTERVAL`].
//! **Invariants:** a note is written only for the running stream ([`RunningStream::serial`]), and
//! removed before the end of that stream is reported. While a plan governs a job, any other change
//! of its speed is made under `state` and ends the plan first. So the last speed that a user set is
//! in force.

mod continued;

use std::sync::{Arc, Weak};
use std::thread;
use std::time::{Duration, Instant};

use jiff::Timestamp;
use jiff::tz::TimeZone;
use parking_lot::{Condvar, Mutex, MutexGuard};

use super::course::Course;
use super::interrupted::{Interrupted, NoteState};
use super::note::{BasePlace, Note, NotedBase};
use super::plan::{Governor, LOOK, Plan, PlanInfo, PlanView};
use super::{KIND, Manner, Origin, Priority, StreamOptions, StreamOrder, copy_up};
use crate::disk::Disk;
use crate::job::{Failure, IoStatus, JobEnding, JobError, JobInfo, JobSpec, Jobs, Verb};
pub use continued::KeptStreams;
use host::{Error, ErrorKind, Result};

/// How often a running stream updates the offset in its note. The next mount logs the offset when
/// it resumes the stream.
const NOTE_INTERVAL: Duration = Duration::from_secs(10);

/// Writes the note of the running stream, or removes it for `None`.
pub type Keep = Box<dyn Fn(Option<&str>) -> Result<()> + Send + Sync>;

/// The streams of one disk; clones share one state.
#[derive(Clone)]
pub struct Streams {
    shared: Arc<StreamsShared>,
}

struct StreamsShared {
    jobs: Jobs,
    /// The id of a job whose client gave none.
    device: String,
    zone: TimeZone,
    keep: Keep,
    started: Instant,
    /// Held by a [`Reservation`].
    reserved: Mutex<()>,
    state: Mutex<StreamsState>,
    order: Mutex<SetOrder>,
    /// Signalled when a plan or its job has ended, or the running stream was amended.
    changed: Condvar,
}

/// The order of streams, and the course of the newest one. Its lock is taken before that of the
/// course, and after no other.
#[derive(Default)]
struct SetOrder {
    order: StreamOrder,
    course: Weak<Course>,
}

#[derive(Default)]
struct StreamsState {
    running: Option<RunningStream>,
    /// Number of streams started so far.
    serial: u64,
    /// The warning that a note cannot be kept was logged.
    warned: bool,
    /// The interrupted stream that waits for another mount. `None` once a stream was started here,
    /// because its note replaces the one that was left.
    kept_back: Option<KeptBack>,
}

/// StreamProgress of an interrupted stream that this mount does not start again.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct KeptBack {
    /// Bytes of the disk that were processed.
    pub offset: u64,
    /// Total bytes of the stream.
    pub len: u64,
}

struct RunningStream {
    serial: u64,
    id: String,
    /// `None` for a stream of 0 bytes.
    note: Option<Note>,
    governor: Option<Governor>,
    /// A thread runs [`Streams::follow`] for this stream.
    governed: bool,
}

impl std::fmt::Debug for Streams {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Streams").field("device", &self.shared.device).finish_non_exhaustive()
    }
}

/// Reads the time zone of schedules and deadlines from the system's files; UTC if there is none.
/// Has to be called before the sandbox forbids opening files.
pub fn local_zone() -> TimeZone {
    TimeZone::system()
}

/// The right to start a stream of this disk, or to change the disk's size, after a look at the
/// disk. Only one thread can hold it, so the chain and the size do not change between the look and
/// the start. Code that starts a stream while clients are served, or that changes the size, has to
/// hold one; [`Streams::resume`] takes its own.
#[must_use]
#[derive(Debug)]
pub struct Reservation<'a>(
    #[expect(dead_code, reason = "held until it is dropped")] MutexGuard<'a, ()>,
);

impl Streams {
    /// Creates the streams of `disk`. Jobs without an id are called `device`.
    pub fn new(disk: &Arc<Disk>, jobs: &Jobs, device: &str, zone: TimeZone) -> Streams {
        let disk = Arc::clone(disk);
        Streams::keeping(jobs, device, zone, Box::new(move |note| disk.set_stream_note(note)))
    }

    /// Creates streams whose notes are stored by `keep`.
    pub fn keeping(jobs: &Jobs, device: &str, zone: TimeZone, keep: Keep) -> Streams {
        let (jobs, device) = (jobs.clone(), device.to_string());
        let (reserved, state, changed) = (Mutex::default(), Mutex::default(), Condvar::new());
        Streams {
            shared: Arc::new(StreamsShared {
                jobs,
                device,
                zone,
                keep,
                started: Instant::now(),
                reserved,
                state,
                order: Mutex::default(),
                changed,
            }),
        }
    }

    /// Takes the reservation, and waits until no other thread has it. The caller must hold no other
    /// lock.
    pub fn reserve(&self) -> Reservation<'_> {
        Reservation(self.shared.reserved.lock())
    }

    /// Takes the reservation, but waits no longer than `patience`: `None` if another thread still
    /// holds it then.
    pub fn reserve_within(&self, patience: Duration) -> Option<Reservation<'_>> {
        self.shared.reserved.try_lock_for(patience).map(Reservation)
    }

    /// Starts a stream on its own thread.
    ///
    /// # Errors
    /// [`ErrorKind::ReadOnly`] for a read-only disk; [`ErrorKind::Busy`] while another stream runs;
    /// errors of [`Jobs::create`]; an I/O error if the thread could not be started.
    pub fn start(&self, disk: &Arc<Disk>, options: StreamOptions) -> Result<()> {
        if disk.is_read_only() {
            return Err(Error::new(
                ErrorKind::ReadOnly,
                "a read-only disk cannot be streamed into",
            ));
        }
        let depth = options.depth.unwrap_or(usize::MAX);
        let len = disk.stream_len(depth);
        let plan =
            options.plan.clone().map(|plan| plan.started(Timestamp::now(), &self.shared.zone));
        let mut governor = plan.map(Governor::new);
        let up = self.shared.started.elapsed();
        let look = PlanView {
            now: Timestamp::now(),
            up,
            done: 0,
            left: len,
            is_forecast: false,
            paused: options.paused,
        };
        let speed = governor
            .as_mut()
            .map_or(options.speed, |governor| governor.order(look, &self.shared.zone).speed);
        let base = options
            .depth
            .map(|depth| disk.info().map(|info| NotedBase::below(&info.backing, depth)))
            .transpose()?
            .flatten();
        let note = self.note(disk, &options, base, governor.as_ref(), len);
        // The thread is started before the job is created, because a job without a thread would
        // have to be reported as failed. If no job follows, the channel closes and the thread ends.
        let (begin, work) = crossbeam_channel::bounded::<Box<dyn FnOnce() + Send>>(1);
        let started = thread::Builder::new()
            .name("stream".into())
            .spawn(move || work.into_iter().for_each(|work| work()));
        started.map_err(|error| {
            Error::io("starting a thread for the stream", error).explain_limit()
        })?;
        let mut state = self.shared.state.lock();
        // There is one chain, so only one stream. The control socket refuses a second stream
        // earlier; this check covers a client that starts one while the stream of the last mount is
        // being resumed.
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
        control.set_recipe(note.recipe()?);
        let note = (len > 0).then_some(note);
        let serial = self.begin(&mut state, &options.job_id, note, governor);
        drop(state);
        if options.paused {
            // The job was just created, so it accepts a pause.
            let _ = self.shared.jobs.pause(&options.job_id);
        }
        control.start();
        let (streams, worked) = (self.clone(), Arc::clone(disk));
        let manner = self.manner(options.priority, depth, len, Origin::Started);
        let body = move || {
            let mut progress = StreamProgress { streams: &streams, serial, noted: Instant::now() };
            let outcome = copy_up(&worked, &control, &manner, &mut progress);
            let detach = || {
                worked.detach_backing(depth, options.backing_file.as_deref()).map_err(Failure::from)
            };
            control.finish_noting(outcome, detach, |ending| streams.end(serial, ending));
        };
        // The thread is blocked on this channel, so the send cannot fail.
        let _ = begin.send(Box::new(body));
        self.govern(&mut self.shared.state.lock());
        Ok(())
    }

    /// Starts the interrupted stream again, if the last process that had this image left one. Never
    /// fails: a note that is not obeyed is logged as a warning, and is removed unless a later mount
    /// may be able to obey it.
    pub fn resume(&self, disk: &Arc<Disk>, interrupted: Interrupted, priority: Priority) {
        if disk.is_read_only() {
            return self.keep_back(disk, &interrupted);
        }
        let note = match interrupted.0 {
            NoteState::Nothing => return,
            NoteState::Note(note) => *note,
            NoteState::Unreadable(error) => {
                return log::warn!("the note of an interrupted stream is not obeyed: {error}");
            }
            NoteState::Foreign(why) => {
                log::warn!("the note of an interrupted stream is not obeyed, and removed: {why}");
                let _reserved = self.reserve();
                let mut state = self.shared.state.lock();
                // If `serial` is not 0, a client has started a stream meanwhile and the note is
                // that of its stream.
                if state.serial == 0 {
                    self.keep(&mut state, None);
                }
                return;
            }
        };
        // A client may have started a stream before this point. Then the note beside the image is
        // that of its stream, and the chain may change at any moment.
        let _reserved = self.reserve();
        if self.shared.state.lock().serial != 0 {
            return log::warn!("the interrupted stream is not resumed: another stream was faster");
        }
        let place = match note.base {
            Some(_) => disk.info().map(|info| note.place(&info.backing)),
            // Does not call `disk.info()`, which asks the files below and may hang.
            None if disk.stream_len(usize::MAX) == 0 => Ok(BasePlace::Over),
            None => Ok(BasePlace::Depth(None)),
        };
        let depth = match place {
            Ok(BasePlace::Depth(depth)) if note.backing == disk.backing_name() => depth,
            Ok(BasePlace::Over) => {
                log::debug!("the stream had come to its end");
                return self.keep(&mut self.shared.state.lock(), None);
            }
            Ok(BasePlace::Elsewhere | BasePlace::Depth(_)) => {
                return log::warn!(
                    "a stream was interrupted and is not resumed: the chain of backing files is another one since; start it anew"
                );
            }
            Err(error) => {
                return log::warn!("a stream was interrupted and is not resumed: {error}");
            }
        };
        log::info!("resuming the stream that was interrupted at {} %", note.percent());
        if let Err(error) =
            self.start(disk, note.into_options(depth, &self.shared.device, priority))
        {
            log::warn!("the interrupted stream is not resumed: {error}");
        }
    }

    /// Leaves the interrupted stream to another mount, and remembers it for [`Streams::kept_back`].
    /// The note is not changed. A note that is invalid, or whose work is done, is not remembered.
    pub fn keep_back(&self, disk: &Disk, interrupted: &Interrupted) {
        let NoteState::Note(note) = &interrupted.0 else { return };
        if note.base.is_none() && disk.stream_len(usize::MAX) == 0 {
            return;
        }
        let mut state = self.shared.state.lock();
        // `serial` is not 0 if a client has already started a stream.
        if state.serial == 0 {
            state.kept_back = Some(KeptBack { offset: note.offset, len: note.len });
        }
    }

    /// The interrupted stream that waits for another mount, if there is one.
    pub fn kept_back(&self) -> Option<KeptBack> {
        self.shared.state.lock().kept_back
    }

    /// Sets the speed of a job by order of a user. The plan of the job ends, and a stream that is
    /// resumed later has this speed.
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

    /// Makes the speed of the job follow `plan` from now on; without a plan the speed stays as it
    /// is.
    ///
    /// # Errors
    /// [`JobError::NotFound`] if `id` is not the running stream; [`JobError::VerbRefused`] if its
    /// status does not allow a new speed.
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

    /// Returns the state of the plan that governs the stream, if there is one.
    pub fn plan(&self) -> Option<PlanInfo> {
        let state = self.shared.state.lock();
        let running = state.running.as_ref()?;
        running.governor.as_ref().map(|governor| governor.info(&running.id))
    }

    /// Updates the note. To be called after a user has paused or resumed a job.
    pub fn changed(&self, id: &str) {
        let mut state = self.shared.state.lock();
        let Some(info) = self.info(id) else { return };
        // A job that was stopped by an error is not noted as paused, because it tries again when it
        // is resumed.
        let paused = info.paused && info.io_status == IoStatus::Ok;
        self.amend(&mut state, id, |running| {
            if let Some(note) = &mut running.note {
                note.paused = paused;
            }
        });
    }

    /// Sets the order of the stream that runs, and of those that are started from now on.
    pub fn set_order(&self, order: StreamOrder) {
        let mut set = self.shared.order.lock();
        if let Some(course) = set.course.upgrade() {
            course.set_order(&order);
        }
        set.order = order;
    }

    /// The manner of a stream over `len` bytes that is about to start.
    fn manner(&self, priority: Priority, depth: usize, len: u64, origin: Origin) -> Manner {
        let mut set = self.shared.order.lock();
        let course = Arc::new(Course::new(&set.order, len));
        set.course = Arc::downgrade(&course);
        Manner { priority, depth, len, course, origin }
    }

    fn note(
        &self,
        disk: &Disk,
        options: &StreamOptions,
        base: Option<NotedBase>,
        governor: Option<&Governor>,
        len: u64,
    ) -> Note {
        let StreamOptions {
            job_id,
            speed,
            paused,
            on_error,
            auto_finalize,
            auto_dismiss,
            backing_file,
            request,
            ..
        } = options.clone();
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

    fn begin(
        &self,
        state: &mut MutexGuard<'_, StreamsState>,
        id: &str,
        note: Option<Note>,
        governor: Option<Governor>,
    ) -> u64 {
        state.serial += 1;
        state.kept_back = None;
        let serial = state.serial;
        state.running =
            Some(RunningStream { serial, id: id.to_string(), note, governor, governed: false });
        self.write(state);
        serial
    }

    fn end(&self, serial: u64, ending: JobEnding) {
        let mut state = self.shared.state.lock();
        let Some(running) = state.running.take_if(|running| running.serial == serial) else {
            return;
        };
        self.shared.changed.notify_all();
        if ending == JobEnding::Abandoned {
            // The process ends, but not the job. The next mount logs this offset.
            let offset = self.info(&running.id).map(|info| info.progress.offset);
            if let (Some(mut note), Some(offset)) = (running.note, offset) {
                note.offset = offset;
                self.keep(&mut state, Some(&note));
            }
        } else {
            self.keep(&mut state, None);
        }
    }

    /// Changes the running stream if its id is `id`, and writes its note if that has changed.
    fn amend(
        &self,
        state: &mut MutexGuard<'_, StreamsState>,
        id: &str,
        change: impl FnOnce(&mut RunningStream),
    ) {
        let Some(running) = state.running.as_mut().filter(|running| running.id == id) else {
            return;
        };
        let before = running.note.clone();
        change(running);
        let changed = running.note != before;
        self.shared.changed.notify_all();
        if changed {
            self.write(state);
            self.shared.jobs.keep_now();
        }
    }

    /// Writes the note of the running stream, and the recipe of its job.
    fn write(&self, state: &mut MutexGuard<'_, StreamsState>) {
        let Some(running) = &state.running else { return };
        let Some(note) = running.note.clone() else { return };
        if let Ok(recipe) = note.recipe() {
            self.shared.jobs.set_recipe(&running.id, recipe);
        }
        self.keep(state, Some(&note));
    }

    fn keep(&self, state: &mut MutexGuard<'_, StreamsState>, note: Option<&Note>) {
        let kept = match note.map(Note::to_text).transpose() {
            Ok(text) => (self.shared.keep)(text.as_deref()),
            Err(error) => Err(error),
        };
        if let Err(error) = kept
            && !std::mem::replace(&mut state.warned, true)
        {
            match note {
                Some(_) => log::warn!("{error}: the stream would not be resumed after a restart"),
                None => log::warn!(
                    "{error}: the note of the stream stays, and it would start again at the next mount (--no-resume)"
                ),
            }
        }
    }

    fn info(&self, id: &str) -> Option<JobInfo> {
        self.shared.jobs.query().into_iter().find(|info| info.progress.id == id)
    }

    /// Starts a thread for the plan of the running stream, if it has a plan and no such thread yet.
    fn govern(&self, state: &mut MutexGuard<'_, StreamsState>) {
        let Some(running) = state
            .running
            .as_mut()
            .filter(|running| running.governor.is_some() && !running.governed)
        else {
            return;
        };
        let (streams, serial) = (self.clone(), running.serial);
        match thread::Builder::new().name("plan".into()).spawn(move || streams.follow(serial)) {
            Ok(_) => running.governed = true,
            Err(error) => {
                log::warn!("starting a thread: {error}; the speed of the stream stays what it is")
            }
        }
    }

    /// Applies the plan every [`LOOK`] until the plan or the stream ends.
    fn follow(&self, serial: u64) {
        let mut state = self.shared.state.lock();
        loop {
            let Some(running) = state.running.as_mut().filter(|running| running.serial == serial)
            else {
                return;
            };
            if running.governor.is_none() {
                running.governed = false;
                return;
            }
            self.look(&mut state);
            self.shared.changed.wait_for(&mut state, LOOK);
        }
    }

    /// Gives the job the speed that its plan demands now.
    fn look(&self, state: &mut MutexGuard<'_, StreamsState>) {
        let Some(running) = state.running.as_mut() else { return };
        let (Some(governor), Some(info)) = (running.governor.as_mut(), self.info(&running.id))
        else {
            return;
        };
        let (done, left) = match info.left {
            Some(left) => (info.work.copied + info.work.zeroed, left),
            None => (info.progress.offset, info.progress.len.saturating_sub(info.progress.offset)),
        };
        let look = PlanView {
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
            // A job that is about to end refuses a new speed.
            let _ = self.shared.jobs.set_speed(&running.id, order.speed);
        }
    }
}

/// Reports the offset of a running stream to its [`Streams`].
pub(super) struct StreamProgress<'a> {
    streams: &'a Streams,
    serial: u64,
    noted: Instant,
}

impl StreamProgress<'_> {
    /// Records `offset`. Called between chunks.
    pub fn at(&mut self, offset: u64) {
        if self.noted.elapsed() < NOTE_INTERVAL {
            return;
        }
        self.noted = Instant::now();
        let mut state = self.streams.shared.state.lock();
        if let Some(note) = state
            .running
            .as_mut()
            .filter(|running| running.serial == self.serial)
            .and_then(|running| running.note.as_mut())
        {
            note.offset = offset;
        }
        self.streams.write(&mut state);
        // The progress of a successor begins here.
        self.streams.shared.jobs.keep_now();
    }
}
