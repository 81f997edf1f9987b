//! Jobs, the QMP socket and the metrics: the only file of the daemon that knows any of them.

use std::sync::{Arc, OnceLock};
use std::time::{Duration, SystemTime};

use crossbeam_channel::Receiver;

use super::Event;
use crate::Result;
use crate::cli::MountConfig;
use crate::disk::Disk;
use crate::fuse::{Finished, SizeNotice};
use crate::job::Jobs;
use crate::metrics;
use crate::qmp::{Server, ShutdownReason, Socket, Target};
use crate::stream::{self, Priority, StreamOptions};

/// How long cancelled jobs may take to end: one step of a stream and a write-back. What they leave unfinished is only what they have not
/// copied yet.
const STOP_TIMEOUT: Duration = Duration::from_secs(5);

/// The job registry and, if asked for, the QMP server and the one of metrics.
pub(super) struct Control {
    jobs: Jobs,
    server: Option<Server>,
    metrics: Option<metrics::Server>,
    /// A client wants the process to end.
    quit: Receiver<()>,
    /// How the kernel learns of a new size, once the disk is mounted.
    size_notice: Arc<OnceLock<SizeNotice>>,
}

impl Control {
    /// Starts to serve `socket`, and `metrics`, where they are there.
    ///
    /// # Errors
    /// No more threads.
    pub(super) fn start(
        socket: Option<Socket>,
        metrics: Option<metrics::Listener>,
        config: &MountConfig,
        disk: &Arc<Disk>,
    ) -> Result<Control> {
        let jobs = Jobs::new();
        // Room for one: who asks does not wait, and a second request adds nothing.
        let (sender, quit) = crossbeam_channel::bounded(1);
        let size_notice = Arc::new(OnceLock::new());
        let grown = {
            let size_notice: Arc<OnceLock<SizeNotice>> = Arc::clone(&size_notice);
            Arc::new(move |size| size_notice.get().into_iter().for_each(|notice| notice.send(size)))
        };
        let target = Target {
            disk: Arc::clone(disk),
            mountpoint: config.mountpoint.clone(),
            jobs: jobs.clone(),
            device: config.device.clone(),
            priority: config.stream_priority,
            quit: sender,
            grown,
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
        Ok(Control { jobs, server, metrics, quit, size_notice })
    }

    /// The session runs: from now on the kernel is told when it grows.
    pub(super) fn mounted(&self, notice: SizeNotice) {
        let _ = self.size_notice.set(notice);
    }

    /// Where a client's wish to end the process arrives; silent for ever without a socket.
    pub(super) fn quit(&self) -> Receiver<()> {
        if self.server.is_some() { self.quit.clone() } else { crossbeam_channel::never() }
    }

    /// Starts the job of `--stream`.
    ///
    /// # Errors
    /// Those of [`stream::start`].
    pub(super) fn start_stream(&self, disk: &Arc<Disk>, device: &str, speed: u64, priority: Priority) -> Result<()> {
        stream::start(disk, &self.jobs, StreamOptions { speed, priority, ..StreamOptions::new(device) })
    }

    /// Tells QMP clients that the end has begun, and why; `None` where the disk was unmounted from outside.
    pub(super) fn announce_shutdown(&self, event: Option<Event>) {
        if let Some(server) = &self.server {
            server.announce_shutdown(match event {
                Some(Event::Quit) => ShutdownReason::HostQmpQuit,
                Some(Event::Terminate) | None => ShutdownReason::HostSignal,
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
