//! Jobs and the QMP socket: the only file of the daemon that knows either.

use std::sync::Arc;

use crossbeam_channel::Sender;

use super::Event;
use crate::cli::MountConfig;
use crate::disk::Disk;
use crate::job::Jobs;
use crate::stream::{self, StreamOptions};
use crate::{Error, ErrorKind, Result};

/// The job registry and, if asked for, the QMP server.
pub(super) struct Control {
    jobs: Jobs,
    // SEAM(qmp): server: Option<qmp::Server>,
}

impl Control {
    /// Starts the QMP server where the command line asks for one.
    ///
    /// # Errors
    /// The socket cannot be bound.
    pub(super) fn start(config: &MountConfig, _disk: &Arc<Disk>, events: Sender<Event>) -> Result<Control> {
        let jobs = Jobs::default(); // SEAM(job): Jobs::new()
        let _quit = move || {
            let _ = events.send(Event::Quit);
        };
        if let Some(path) = &config.qmp {
            // SEAM(qmp): Server::start(path, Target { disk: Arc::clone(disk), jobs: jobs.clone(), device: config.device.clone(), quit })?
            return Err(Error::new(ErrorKind::UnsupportedFeature, format!("QMP socket {}: not wired yet", path.display())));
        }
        Ok(Control { jobs })
    }

    /// Starts the job of `--stream`.
    ///
    /// # Errors
    /// Those of [`stream::start`].
    pub(super) fn start_stream(&self, disk: &Arc<Disk>, device: &str, speed: u64) -> Result<()> {
        stream::start(disk, &self.jobs, StreamOptions { speed, ..StreamOptions::new(device) })
    }

    /// Tells QMP clients that the end has begun.
    pub(super) fn announce_shutdown(&self) {
        // SEAM(qmp): if let Some(server) = &self.server { server.announce_shutdown() }
    }

    /// After the unmount: stops the jobs, waits for them, then closes the socket, so that clients see the last events.
    pub(super) fn stop(self) {
        // SEAM(job): self.jobs.cancel_all_and_wait();
        // SEAM(qmp): if let Some(server) = self.server { server.shutdown() }
    }
}
