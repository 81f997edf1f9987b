//! Jobs, the QMP server and that of metrics: the only file of the daemon that knows any of them.

use std::cell::Cell;
use std::sync::{Arc, OnceLock};
use std::time::{Duration, SystemTime};

use crossbeam_channel::Receiver;
use jiff::tz::TimeZone;

use super::Event;
use super::servers::Servers;
use crate::chain::Gate;
use crate::cli::{MountConfig, StreamSpeed};
use crate::disk::Disk;
use crate::fuse::{Finished, Pulse, SizeNotice};
use crate::job::{Batch, JobEvent, Jobs};
use crate::keeper::{EntrustedImage, Keeper};
use crate::logging::Log;
use crate::metrics;
use crate::qmp::{IsFile, Server, ShutdownReason, Target};
use crate::stream::{self, Interrupted, KIND, StreamOptions, Streams};
use crate::{Error, ErrorKind, Result};

/// How long cancelled jobs may take to end: one step of a stream and a write-back. What they leave unfinished is only what they have not
/// copied yet.
const STOP_TIMEOUT: Duration = Duration::from_secs(5);

/// How long a request may take before a status says that none is answered. Clients wait longer for their status.
const PULSE_TIMEOUT: Duration = Duration::from_secs(1);

/// What streams need that is to be had only while files can be opened, and by the user who starts.
pub(super) struct Prepared {
    /// Of schedules and deadlines.
    zone: TimeZone,
    /// What is known of the stream that was interrupted.
    interrupted: Cell<Option<Interrupted>>,
    /// The image in the hands of the keeper, which writes the note of the stream that runs; `None`
    /// where the image has no attributes.
    image: Option<EntrustedImage>,
    /// Whether a path that a client names leads to a backing file.
    is_file: IsFile,
}

impl Prepared {
    /// Reads what there is to read. `gate` is the one through which the chain was opened; `keeper`
    /// looks at paths.
    ///
    /// # Errors
    /// The keeper is gone; I/O.
    pub(super) fn new(disk: &Disk, gate: &Gate, image: Option<EntrustedImage>, keeper: &Keeper) -> Result<Prepared> {
        let interrupted = Cell::new(Some(Interrupted::read(disk, gate)));
        let files = disk.info()?.backing.iter().filter_map(|layer| layer.identity).collect();
        let is_file = Arc::new(keeper.entrust_files(files)?);
        Ok(Prepared { zone: stream::local_zone(), interrupted, image, is_file })
    }
}

/// How many streams have completed, of what was told.
pub(super) fn completed(batch: &Batch) -> usize {
    let completed = |event: &&JobEvent| matches!(event, JobEvent::Completed { progress, error: None } if progress.kind == KIND);
    batch.events.iter().filter(completed).count()
}

/// The job registry and, if asked for, the QMP server and the one of metrics.
pub(super) struct Control {
    jobs: Jobs,
    streams: Streams,
    server: Option<Server>,
    metrics: Option<metrics::Server>,
    /// A client wants the process to end.
    quit: Receiver<()>,
    /// How the kernel learns of a new size, once the disk is mounted.
    size_notice: Arc<OnceLock<SizeNotice>>,
    /// Whether requests are answered, once the disk is mounted.
    pulse: Arc<OnceLock<Pulse>>,
    /// What is known of the stream that is to be started again.
    interrupted: Cell<Option<Interrupted>>,
    /// What happens to jobs, where somebody wants to know.
    told: Receiver<Arc<Batch>>,
}

impl Control {
    /// Starts to serve, where there is something to serve.
    ///
    /// # Errors
    /// No more threads.
    pub(super) fn start(servers: Servers, config: &MountConfig, disk: &Arc<Disk>, prepared: Prepared, log: &Log) -> Result<Control> {
        let Servers { socket, metrics } = servers;
        let jobs = Jobs::new();
        let Prepared { zone, interrupted, image, is_file } = prepared;
        let keep = move |text: Option<&str>| match (&image, text) {
            (Some(image), text) => image.set_note(text),
            (None, None) => Ok(()),
            (None, Some(_)) => Err(Error::new(ErrorKind::UnsupportedFeature, "the image has no extended attributes")),
        };
        let streams = Streams::keeping(&jobs, &config.device, zone, Box::new(keep));
        let told = if config.on_complete.is_some() { jobs.subscribe() } else { crossbeam_channel::never() };
        // Room for one: who asks does not wait, and a second request adds nothing.
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
            jobs: jobs.clone(),
            streams: streams.clone(),
            device: config.device.clone(),
            priority: config.stream_priority,
            quit: sender,
            is_file,
            log: log.clone(),
            metrics: metrics.as_ref().map(metrics::Listener::address),
            grown,
            is_answering,
        };
        let source = metrics::Source {
            disk: Arc::clone(disk),
            jobs: jobs.clone(),
            device: config.device.clone(),
            mountpoint: config.mountpoint.clone(),
            started: SystemTime::now(),
        };
        let metrics = metrics.map(|listener| metrics::Server::start(listener, source)).transpose()?;
        let server = socket.map(|socket| Server::start(socket, target)).transpose()?;
        Ok(Control { jobs, streams, server, metrics, quit, size_notice, pulse, interrupted, told })
    }

    /// The registry of jobs.
    pub(super) fn jobs(&self) -> Jobs {
        self.jobs.clone()
    }

    /// The session runs: from now on the kernel is told when it grows.
    pub(super) fn mounted(&self, notice: SizeNotice, pulse: Pulse) {
        let _ = self.size_notice.set(notice);
        let _ = self.pulse.set(pulse);
    }

    /// Where a client's wish to end the process arrives; silent for ever without a socket.
    pub(super) fn quit(&self) -> Receiver<()> {
        if self.server.is_some() { self.quit.clone() } else { crossbeam_channel::never() }
    }

    /// Starts the job of `--stream`, or else the one that was interrupted when the last process ended that had this image.
    ///
    /// # Errors
    /// Those of [`Streams::start`], for the job of `--stream`, unless another stream runs already.
    pub(super) fn start_stream(&self, disk: &Arc<Disk>, config: &MountConfig) -> Result<()> {
        let priority = config.stream_priority;
        let (speed, plan) = match &config.stream {
            Some(StreamSpeed::Fixed(speed)) => (*speed, None),
            Some(StreamSpeed::Planned(plan)) => (0, Some(plan.clone())),
            None => {
                match self.interrupted.take() {
                    Some(note) if config.resume => self.streams.resume(disk, note, priority),
                    Some(note) => self.streams.keep_back(disk, &note),
                    None => {}
                }
                return Ok(());
            }
        };
        let starting = self.streams.starting();
        let _starting = starting.lock();
        match self
            .streams
            .start(disk, StreamOptions { speed, plan, priority, on_error: config.on_error, ..StreamOptions::new(&config.device) })
        {
            // A client was faster, and its stream is no reason to take the disk away again.
            Err(error) if error.kind() == ErrorKind::Busy => log::warn!("--stream: {error}; that one goes on"),
            started => return started,
        }
        Ok(())
    }

    /// Where it is told what happens to jobs, if `--on-complete` wants to know; silent for ever otherwise.
    pub(super) fn told(&self) -> &Receiver<Arc<Batch>> {
        &self.told
    }

    /// Tells QMP clients that the end has begun, and why; `None` where the disk was unmounted from outside.
    pub(super) fn announce_shutdown(&self, event: Option<Event>) {
        if let Some(server) = &self.server {
            server.announce_shutdown(match event {
                Some(Event::Quit) => ShutdownReason::HostQmpQuit,
                Some(Event::Terminate | Event::Hangup) | None => ShutdownReason::HostSignal,
            });
        }
    }

    /// After the unmount: tells of it, cancels the jobs and waits for them and for clients that change the disk, but not for ever for one that
    /// hangs on a backing file.
    pub(super) fn stop_jobs(&self, export: &str) -> Finished {
        if let Some(server) = &self.server {
            server.announce_export_deleted(export);
        }
        let jobs = self.jobs.cancel_all_and_wait(STOP_TIMEOUT);
        // A change of size is no job; from now on none begins.
        let settled = self.server.as_ref().is_none_or(|server| server.settle(STOP_TIMEOUT));
        if jobs && settled { Finished::Quiet } else { Finished::StillRunning }
    }

    /// Last of all, with the disk closed: the metrics, and the socket. Clients that asked to quit are told how closing went.
    pub(super) fn close(self, closed: &Result<()>) {
        drop(self.metrics);
        if let Some(server) = self.server {
            server.shutdown(closed);
        }
    }
}
