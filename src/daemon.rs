//! The program's life: composition root, wiring, orderly shutdown. No logic that a test would want.
//!
//! Start: lock the pidfile, open the disk, QMP, mount, stream, say "ready". Shutdown, whatever the reason, strictly in this order:
//! unmount, stop jobs, close the disk, close QMP. After that point every acknowledged write is durable or the exit status says otherwise.
//!
//! **Touches:** everything once. **Never:** leaves a mount, placeholder, socket or pidfile behind, on any path but a kill.
//! **Locks:** none; events come over one channel to the one thread that decides (`serve`).
//! **Invariants:** after the mount no path is looked up that could lead through our own mountpoint: the current directory is `/`, all
//! paths are absolute, files are open already (H29).

mod background;
mod control;
mod pidfile;
mod signals;

use std::process::ExitCode;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use crossbeam_channel::{Receiver, RecvTimeoutError, Sender, select, unbounded};
use rustix::fs::Mode;

use crate::chain::Gate;
use crate::cli::{self, Command, MountConfig, Role};
use crate::disk::{Disk, DiskOptions};
use crate::error::Context;
use crate::fuse::{self, Finished, MountOptions, Mounted, Unmounted};
use crate::{Error, Result};

use control::Control;
use pidfile::Pidfile;

/// How often metadata is written back without anybody asking: what a kill can cost at most (P2). syncfs(2) never reaches a FUSE daemon,
/// so nobody else would do it (data-safety 0.8).
const COMMIT_INTERVAL: Duration = Duration::from_secs(1);

/// How long an unmounted session may take to end before it counts as in use.
const UNMOUNT_TIMEOUT: Duration = Duration::from_secs(2);

/// A reason to end.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Event {
    /// SIGTERM or SIGINT: unmount; the second one does not take "busy" for an answer.
    Terminate,
    /// QMP `quit`: does not take "busy" for an answer either.
    Quit,
}

/// Parses the command line, runs the command, returns the exit status: 0, or 1 after one line on standard error.
/// Wrong usage ends the process with 2 inside the parser.
pub fn main() -> ExitCode {
    match cli::parse().and_then(run) {
        Ok(status) => status,
        Err(error) => {
            eprintln!("cordisk: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run(command: Command) -> Result<ExitCode> {
    match command {
        Command::Create(options) => {
            start_log(log::LevelFilter::Warn);
            crate::create::create(&options).map(|()| ExitCode::SUCCESS)
        }
        Command::Mount(config) => match config.role {
            Role::Parent => background::start(),
            Role::Foreground => {
                start_log(log::LevelFilter::Info);
                serve(&config).map(|()| ExitCode::SUCCESS)
            }
            Role::Child => {
                start_log(log::LevelFilter::Warn);
                background::leave_terminal()?;
                serve(&config).map(|()| ExitCode::SUCCESS)
            }
        },
    }
}

/// Log lines go to standard error; `RUST_LOG` overrides. fuser is silent by default: it calls it an error when a client was killed
/// while it waited, and what ends a session it returns to us as well.
fn start_log(level: log::LevelFilter) {
    env_logger::Builder::new().filter_level(level).filter_module("fuser", log::LevelFilter::Off).parse_default_env().init();
}

/// From here to the end of the process: everything that `cordisk mount` does in the process that serves.
fn serve(config: &MountConfig) -> Result<()> {
    rustix::process::umask(Mode::from_raw_mode(0o077));
    let (sender, events) = unbounded();
    let _signals = signals::start(sender)?;
    let pidfile = config.pidfile.as_deref().map(Pidfile::acquire).transpose()?;
    rustix::process::chdir("/").map_err(std::io::Error::from).context(|| "chdir to /")?;

    let options = DiskOptions {
        read_only: config.read_only,
        copy_on_read: config.copy_on_read,
        gate: Gate { backing_format: config.backing_format, ..Gate::default() },
        full_check: config.full_check,
    };
    let disk = Arc::new(Disk::open(&config.image, &options)?);
    // QMP before the mount: a socket that cannot be bound should not make a disk appear and vanish.
    let control = Control::start(config, &disk)?;
    let (served, requests) = serve_disk(config, &disk, pidfile.as_ref(), &control, &events);
    // No request comes any more: the jobs, then the disk, then the socket.
    let jobs = control.stop_jobs(&config.device);
    let closed = if (requests, jobs) == (Finished::Quiet, Finished::Quiet) {
        disk.close()
    } else {
        // Closing would have to wait for them, perhaps for ever: a backing file hangs. What was acknowledged is made durable all the same.
        log::warn!("requests or jobs still hang; leaving without them");
        disk.flush()
    };
    let closed = closed.context(|| format!("closing {}", config.image.display()));
    control.close(&closed);
    // The first error is the one to report, the other goes to the log.
    match (served, closed) {
        (Err(error), closed) => {
            if let Err(closing) = closed {
                log::error!("{closing}");
            }
            Err(error)
        }
        (Ok(()), closed) => closed,
    }
}

/// Everything between the open disk and its close: mounted, served, unmounted. Also tells whether requests are still running.
fn serve_disk(
    config: &MountConfig,
    disk: &Arc<Disk>,
    pidfile: Option<&Pidfile>,
    control: &Control,
    events: &Receiver<Event>,
) -> (Result<()>, Finished) {
    let options = MountOptions { mountpoint: config.mountpoint.clone(), allow_other: config.allow_other, transport: config.transport };
    let mounted = match fuse::mount(disk, &options) {
        Ok(mounted) => mounted,
        Err(error) => return (Err(error), Finished::Quiet),
    };
    control.mounted(mounted.size_notice());
    let announced = announce(config, disk, control, pidfile, &mounted);
    let timer = CommitTimer::start(Arc::clone(disk));
    let ended = announced.and_then(|()| wait_for_end(&mounted, disk, events, control));
    if ended.is_err()
        && let Err(error) = mounted.detach()
    {
        log::error!("{error}");
    }
    let finished = mounted.finish();
    drop(timer);
    (ended, finished)
}

/// The stream, the pidfile, and the news that the disk is there.
fn announce(config: &MountConfig, disk: &Arc<Disk>, control: &Control, pidfile: Option<&Pidfile>, mounted: &Mounted) -> Result<()> {
    if let Some(speed) = config.stream {
        control.start_stream(disk, &config.device, speed)?;
    }
    if let Some(pidfile) = pidfile {
        pidfile.write()?;
    }
    log::info!("mounted {} on {}", config.image.display(), mounted.path().display());
    if config.role == Role::Child {
        background::ready()?;
    }
    Ok(())
}

/// Serves until the session has ended, unmounting it when asked to.
///
/// # Errors
/// The session broke, or could not be taken from the kernel.
fn wait_for_end(mounted: &Mounted, disk: &Disk, events: &Receiver<Event>, control: &Control) -> Result<()> {
    let mut asked = None;
    loop {
        let event = select! {
            recv(mounted.ended()) -> end => {
                control.announce_shutdown(asked);
                return end.unwrap_or(Ok(())).context(|| "reading requests from /dev/fuse");
            }
            recv(events) -> event => event.unwrap_or(Event::Terminate),
            recv(control.quit()) -> _ => Event::Quit,
        };
        // Whatever happens next, what was written until now is safe (P15).
        if let Err(error) = disk.flush() {
            log::error!("flush: {error}");
        }
        let unmounted = mounted.unmount().inspect_err(|error| log::error!("{error}"));
        let first = asked.replace(event).is_none();
        if event == Event::Terminate && first {
            if let Ok(Unmounted::Busy) = unmounted {
                log::warn!("{} is in use: all is written back, serving on; the next signal detaches it", mounted.path().display());
            }
            continue;
        }
        // Done may also mean that somebody has detached it, with the disk still open.
        if matches!(unmounted, Ok(Unmounted::Done)) && mounted.ends_within(UNMOUNT_TIMEOUT) {
            continue;
        }
        log::warn!("{} is in use: detaching it", mounted.path().display());
        control.announce_shutdown(Some(event));
        return mounted.detach();
    }
}

/// Writes metadata back every [`COMMIT_INTERVAL`] until dropped.
struct CommitTimer {
    stop: Option<Sender<()>>,
    thread: Option<thread::JoinHandle<()>>,
}

impl CommitTimer {
    fn start(disk: Arc<Disk>) -> CommitTimer {
        let (stop, stopped) = crossbeam_channel::bounded(0);
        let body = move || {
            let mut last = None;
            while stopped.recv_timeout(COMMIT_INTERVAL) == Err(RecvTimeoutError::Timeout) {
                let error = disk.flush_if_dirty().err().map(|error: Error| error.to_string());
                // Once per cause: an error of fdatasync stays for ever (P7).
                if let Some(error) = &error
                    && last.as_ref() != Some(error)
                {
                    log::error!("writing metadata back: {error}");
                }
                last = error;
            }
        };
        match thread::Builder::new().name("commit".to_string()).spawn(body) {
            Ok(thread) => CommitTimer { stop: Some(stop), thread: Some(thread) },
            Err(error) => {
                log::error!("starting the commit timer: {error}; only flushes of the guest are durable");
                CommitTimer { stop: None, thread: None }
            }
        }
    }
}

impl Drop for CommitTimer {
    fn drop(&mut self) {
        self.stop = None;
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}
