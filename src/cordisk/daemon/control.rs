//! Jobs, the QMP server and the metrics server: the only file of the daemon that uses them.

use std::cell::Cell;
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant, SystemTime};

use crossbeam_channel::Receiver;
use jiff::tz::TimeZone;

use super::Event;
use super::order::{DiskOrder, OrderPlan};
use super::servers::Servers;
use super::survival::Survival;
use crate::cli::{MountConfig, StreamSpeed};
use crate::keeper::{EntrustedImage, Inherited, Keeper};
use crate::logging::Log;
use crate::metrics;
use control::facts::SourceStatus;
use control::{IsFile, Server, ShutdownReason, SourceStatuses, Target};
use engine::chain::Gate;
use engine::disk::Disk;
use engine::job::{Batch, Hold, JobEvent, Jobs, KeepJobs};
use engine::stream::{self, Interrupted, KIND, KeptStreams, StreamOptions, Streams};
use export::{Finished, Pulse, SizeNotice};
use host::{Error, ErrorKind, Result};
use remote::Sources;
use remote::wire::SourceFacts;

/// How long cancelled jobs may take to end: one step of a stream and a write-back pass. A job that
/// does not end in time leaves only data uncopied.
const STOP_TIMEOUT: Duration = Duration::from_secs(5);

/// How long a request may take before a status reports that none is answered. Clients wait longer
/// than this for a status.
const PULSE_TIMEOUT: Duration = Duration::from_secs(1);

/// How long a status waits for the fetcher, which answers without asking a server.
const FETCHER_TIMEOUT: Duration = Duration::from_millis(250);

/// The parts of streams that can be made only while files can be opened, and as the user that
/// started the program.
pub(super) struct PreparedControl {
    /// The time zone of schedules and deadlines.
    zone: TimeZone,
    /// The note about the stream that was interrupted.
    interrupted: Cell<Option<Interrupted>>,
    /// The jobs of the process that has died, if this one is its successor and that one has kept
    /// any.
    kept: Option<KeptStreams>,
    /// Gives the jobs to the keeper.
    keep_jobs: KeepJobs,
    /// When the disk was mounted.
    mounted: SystemTime,
    /// The image as entrusted to the keeper, which writes the note of the running stream; `None` if
    /// the image has no extended attributes.
    image: Option<EntrustedImage>,
    /// Tells whether a path that a client names leads to a backing file.
    is_file: IsFile,
    /// The servers of remote backing files.
    sources: SourceStatuses,
    /// The order of streams, as far as it is known; `None` if it is not to be found.
    order: Option<OrderPlan>,
}

impl PreparedControl {
    /// The same, with the order of streams.
    pub(super) fn with(self, order: Option<OrderPlan>) -> PreparedControl {
        PreparedControl { order, ..self }
    }

    /// Reads the note, the jobs of the process that has died, and the time zone, and entrusts the
    /// backing files to the keeper. `gate` is the one through which the chain was opened; `keeper`
    /// looks up paths.
    ///
    /// # Errors
    /// The keeper has died, or an I/O operation failed.
    pub(super) fn new(
        disk: &Disk,
        gate: &Gate,
        image: Option<EntrustedImage>,
        keeper: &Keeper,
        inherited: Option<&Inherited>,
    ) -> Result<PreparedControl> {
        let interrupted = Cell::new(Some(Interrupted::read(disk, gate)));
        let kept = inherited.and_then(|inherited| inherited.jobs.as_deref());
        let kept = kept.map(|text| KeptStreams::read(text, disk, gate));
        let mounted = inherited.and_then(|inherited| inherited.mounted);
        let files = disk.info()?.backing.iter().filter_map(|layer| layer.identity).collect();
        let is_file = Arc::new(keeper.entrust_files(files)?);
        let sources = gate.sources.clone();
        let sources: SourceStatuses =
            Arc::new(move || sources.as_ref().map(|sources| statuses(sources)).unwrap_or_default());
        Ok(PreparedControl {
            zone: stream::local_zone(),
            interrupted,
            kept,
            keep_jobs: Box::new(keeper.jobs_keeper()),
            mounted: mounted.unwrap_or_else(SystemTime::now),
            image,
            is_file,
            sources,
            order: None,
        })
    }
}

/// Asks the fetcher for the state of the servers; empty if it does not answer at once.
fn statuses(sources: &Sources) -> Vec<SourceStatus> {
    let line = sources.line();
    if !line.has_files() {
        return Vec::new();
    }
    let facts = line.facts(Instant::now() + FETCHER_TIMEOUT).unwrap_or_default();
    let status = |facts: SourceFacts| SourceStatus {
        name: facts.name,
        up: facts.up,
        fetched_bytes: facts.fetched_bytes,
        requests: facts.requests,
        retries: facts.retries,
        latency_us: facts.latency_us,
        cached_bytes: facts.cached_bytes,
        last_error: facts.last_error.map(|(error, _)| error),
    };
    facts.into_iter().map(|(_, facts)| status(facts)).collect()
}

/// Counts the streams in `batch` that have completed.
fn completed(batch: &Batch) -> u64 {
    let completed = |event: &&JobEvent| matches!(event, JobEvent::Completed { progress, error: None } if progress.kind == KIND);
    u64::try_from(batch.events.iter().filter(completed).count()).unwrap_or(u64::MAX)
}

/// The job registry and, if requested, the QMP server and the metrics server.
pub(super) struct ControlSocket {
    jobs: Jobs,
    streams: Streams,
    order: DiskOrder,
    server: Option<Server>,
    metrics: Option<metrics::MetricsServer>,
    /// Receives a message when a client asks the process to end.
    quit: Receiver<()>,
    /// Reports a new size to the kernel; set once the disk is mounted.
    size_notice: Arc<OnceLock<SizeNotice>>,
    /// Tells whether requests are answered; set once the disk is mounted.
    pulse: Arc<OnceLock<Pulse>>,
    /// The note about the stream that is to be started again.
    interrupted: Cell<Option<Interrupted>>,
    /// Receives job events if `--on-complete` is given; otherwise never receives any.
    job_events: Receiver<Arc<Batch>>,
    /// Streams that have completed since the mount, as far as `job_events` has said so.
    completed: Cell<u64>,
    /// What is left to do with the jobs of a process that has died; `None` if there was none, or it
    /// had not begun to keep its jobs.
    left: Option<LeftJobs>,
    /// Gives the jobs to the keeper, from [`ControlSocket::start_stream`] on.
    keep_jobs: Cell<Option<KeepJobs>>,
    /// Holds the jobs that were taken over until the disk is served.
    hold: Cell<Option<Hold>>,
}

/// What is known of the jobs of a process that has died.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum LeftJobs {
    /// All of them go on.
    All,
    /// Only the note of the stream says which one was at work.
    Noted,
}

impl ControlSocket {
    /// Starts the QMP server and the metrics server, where requested. `main` is the process id of
    /// the keeper.
    ///
    /// # Errors
    /// A thread could not be started.
    pub(super) fn start(
        servers: Servers,
        config: &MountConfig,
        disk: &Arc<Disk>,
        prepared: PreparedControl,
        log: &Log,
        main: u32,
        survival: &Survival,
    ) -> Result<ControlSocket> {
        let Servers { socket, metrics } = servers;
        let jobs = Jobs::new();
        let PreparedControl {
            zone,
            interrupted,
            kept,
            keep_jobs,
            mounted: started,
            image,
            is_file,
            sources,
            order,
        } = prepared;
        let keep = move |text: Option<&str>| match (&image, text) {
            (Some(image), text) => image.set_note(text),
            (None, None) => Ok(()),
            (None, Some(_)) => Err(Error::new(
                ErrorKind::UnsupportedFeature,
                "the image has no extended attributes",
            )),
        };
        let streams = Streams::keeping(&jobs, &config.device, zone, Box::new(keep));
        let order = DiskOrder::start(order, disk, &streams);
        let job_events = if config.on_complete.is_some() {
            jobs.subscribe()
        } else {
            crossbeam_channel::never()
        };
        // Before the first client is answered. The number of completed streams is read before a
        // stream that has nothing left to do completes.
        let hold = jobs.hold();
        let mut keep_jobs = Some(keep_jobs);
        let completed = kept.as_ref().map_or(0, KeptStreams::completed);
        let left = kept.map(|kept| {
            let is_complete = kept.is_complete();
            streams.take_over(disk, kept, config.stream_priority);
            if !is_complete {
                return LeftJobs::Noted;
            }
            keep_jobs.take().into_iter().for_each(|keep| jobs.keep_with(keep));
            LeftJobs::All
        });
        // The capacity is one message: the sender does not wait, and a second request adds nothing.
        let (sender, quit) = crossbeam_channel::bounded(1);
        let size_notice = Arc::new(OnceLock::new());
        let grown = {
            let size_notice: Arc<OnceLock<SizeNotice>> = Arc::clone(&size_notice);
            Arc::new(move |size| size_notice.get().into_iter().for_each(|notice| notice.send(size)))
        };
        let pulse = Arc::new(OnceLock::new());
        let is_answering = {
            let pulse: Arc<OnceLock<Pulse>> = Arc::clone(&pulse);
            Arc::new(move || pulse.get().is_none_or(|pulse| pulse.is_felt(PULSE_TIMEOUT)))
        };
        let target = Target {
            disk: Arc::clone(disk),
            mountpoint: config.mountpoint.clone(),
            pid: main,
            started,
            jobs: jobs.clone(),
            streams: streams.clone(),
            device: config.device.clone(),
            priority: config.stream_priority,
            quit: sender,
            is_file,
            log: log.facts(),
            metrics: metrics.as_ref().map(metrics::Listener::address),
            grown,
            is_answering,
            sources: Arc::clone(&sources),
            takeover: survival.source(),
            order_base: order.base_source(),
        };
        let source = metrics::Source {
            disk: Arc::clone(disk),
            jobs: jobs.clone(),
            device: config.device.clone(),
            mountpoint: config.mountpoint.clone(),
            started,
            remote: sources,
            takeover: survival.source(),
        };
        let metrics =
            metrics.map(|listener| metrics::MetricsServer::start(listener, source)).transpose()?;
        let server = socket.map(|socket| Server::start(socket, target)).transpose()?;
        Ok(ControlSocket {
            jobs,
            streams,
            order,
            server,
            metrics,
            quit,
            size_notice,
            pulse,
            interrupted,
            job_events,
            completed: Cell::new(completed),
            left,
            keep_jobs: Cell::new(keep_jobs),
            hold: Cell::new(Some(hold)),
        })
    }

    /// Leaves the order of the guest beside the base, if that is wanted.
    pub(super) fn learn(&self, disk: &Disk) {
        self.order.learn(disk);
    }

    /// The registry of jobs.
    pub(super) fn jobs(&self) -> Jobs {
        self.jobs.clone()
    }

    /// Sets the notifiers of the running session: from now on the kernel learns when the disk
    /// grows.
    pub(super) fn mounted(&self, notice: SizeNotice, pulse: Pulse) {
        let _ = self.size_notice.set(notice);
        let _ = self.pulse.set(pulse);
    }

    /// Returns the channel on which a client's `quit` arrives; without a socket nothing ever
    /// arrives.
    pub(super) fn quit(&self) -> Receiver<()> {
        if self.server.is_some() { self.quit.clone() } else { crossbeam_channel::never() }
    }

    /// Starts the job of `--stream`. Without that option, starts the stream that was interrupted
    /// when the last process that served this image ended. A successor starts neither: it goes on
    /// with the jobs that it has taken over, and those of them that have ended stay so. The keeper
    /// gets the jobs from here on.
    ///
    /// # Errors
    /// Those of [`Streams::start`], for the job of `--stream`, unless another stream runs already.
    pub(super) fn start_stream(&self, disk: &Arc<Disk>, config: &MountConfig) -> Result<()> {
        if config.stream.is_some() {
            self.order.wait();
        }
        let started = match self.left {
            None => self.start_first_stream(disk, config),
            Some(LeftJobs::Noted) => {
                self.start_interrupted(disk, config);
                Ok(())
            }
            Some(LeftJobs::All) => {
                match self.interrupted.take() {
                    Some(note) if config.resume => self.streams.forget(&note),
                    Some(note) => self.streams.keep_back(disk, &note),
                    None => {}
                }
                Ok(())
            }
        };
        drop(self.hold.take());
        if let Some(keep) = self.keep_jobs.take() {
            self.jobs.keep_with(keep);
        }
        started
    }

    /// Starts the stream that the note beside the image describes.
    fn start_interrupted(&self, disk: &Arc<Disk>, config: &MountConfig) {
        match self.interrupted.take() {
            Some(note) if config.resume => {
                self.streams.resume(disk, note, config.stream_priority);
            }
            Some(note) => self.streams.keep_back(disk, &note),
            None => {}
        }
    }

    fn start_first_stream(&self, disk: &Arc<Disk>, config: &MountConfig) -> Result<()> {
        let priority = config.stream_priority;
        let (speed, plan) = match &config.stream {
            Some(StreamSpeed::Fixed(speed)) => (*speed, None),
            Some(StreamSpeed::Planned(plan)) => (0, Some(plan.clone())),
            None => {
                self.start_interrupted(disk, config);
                return Ok(());
            }
        };
        let _reserved = self.streams.reserve();
        match self.streams.start(
            disk,
            StreamOptions {
                speed,
                plan,
                priority,
                on_error: config.on_error,
                ..StreamOptions::new(&config.device)
            },
        ) {
            // A client has started a stream first. That is no reason to unmount the disk again.
            Err(error) if error.kind() == ErrorKind::Busy => {
                log::warn!("--stream: {error}; that one goes on")
            }
            started => return started,
        }
        Ok(())
    }

    /// Returns the channel of job events. It carries events only if `--on-complete` is given.
    pub(super) fn job_events(&self) -> &Receiver<Arc<Batch>> {
        &self.job_events
    }

    /// Counts the streams in `batch` that have completed. If there are any, calls `run` with the
    /// number since the mount, to make the keeper run the command of `--on-complete`.
    pub(super) fn on_complete(&self, batch: &Batch, run: impl Fn(u64) -> Result<()>) {
        let new = completed(batch);
        self.completed.set(self.completed.get().saturating_add(new));
        if new > 0 {
            self.tell_completed(run);
        }
    }

    /// Calls `run` with the number of streams that have completed since the mount. The keeper knows
    /// for how many of them it has started the command of `--on-complete`. So the command runs once
    /// for each, wherever between the end of the stream and this call a process was killed.
    pub(super) fn tell_completed(&self, run: impl Fn(u64) -> Result<()>) {
        if let Err(error) = run(self.completed.get()) {
            log::warn!("{error}");
        }
    }

    /// Tells QMP clients that the shutdown has begun, and its reason. `None` means that the disk
    /// was unmounted from outside.
    pub(super) fn announce_shutdown(&self, event: Option<Event>) {
        if let Some(server) = &self.server {
            server.announce_shutdown(match event {
                Some(Event::Quit) => ShutdownReason::HostQmpQuit,
                Some(Event::Terminate | Event::Hangup | Event::HandOver) | None => {
                    ShutdownReason::HostSignal
                }
            });
        }
    }

    /// Announces the unmount, cancels the jobs, and waits for jobs and for clients that change the
    /// disk. The wait is at most [`STOP_TIMEOUT`] each, because a job may hang on a backing file.
    pub(super) fn stop_jobs(&self, export: &str) -> Finished {
        if let Some(server) = &self.server {
            server.announce_export_deleted(export);
        }
        let jobs = self.jobs.cancel_all_and_wait(STOP_TIMEOUT);
        // A change of size is not a job. After `settle` no change begins.
        let settled = self.server.as_ref().is_none_or(|server| server.settle(STOP_TIMEOUT));
        if jobs && settled { Finished::Quiet } else { Finished::StillRunning }
    }

    /// Closes the metrics server and the socket, after the disk is closed. Clients that sent `quit`
    /// learn whether closing succeeded.
    pub(super) fn close(self, closed: &Result<()>) {
        drop(self.metrics);
        if let Some(server) = self.server {
            server.shutdown(closed);
        }
    }
}
