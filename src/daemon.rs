//! The program's life: composition root, wiring, orderly shutdown. No logic that a test would want.
//!
//! Start: the mount keeper, lock the pidfile and the entry, bind the address of the metrics, open the disk, bind the control socket, mount, fill the entry
//! in, become `--user`, enter the sandbox; only then threads: signals, metrics, QMP, the session, the stream; say "ready". Shutdown, whatever the reason,
//! strictly in this order: unmount, stop jobs, close the disk, close QMP, let the keeper go. After that point every acknowledged write is durable or the
//! exit status says otherwise.
//!
//! **Touches:** everything once. **Never:** leaves a mount, placeholder, socket, pidfile or entry behind, on any path but a kill; starts a thread or
//! answers anybody before the sandbox is entered.
//! **Locks:** none; events come over one channel to the one thread that decides (`serve`).
//! **Invariants:** after the mount no path is looked up that could lead through our own mountpoint: the current directory is `/`, all
//! paths are absolute, files are open already (H29). In the sandbox none can be looked up at all.

mod background;
mod control;
mod helper;
mod limits;
mod notify;
mod pidfile;
mod servers;
mod signals;
mod watchdog;

use std::ffi::OsStr;
use std::io::Write;
use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use crossbeam_channel::{Receiver, Sender, select, unbounded};
use rustix::fs::Mode;

use crate::chain::{Gate, Roots};
use crate::cli::{self, Command, MountConfig, Role};
use crate::client;
use crate::disk::{Disk, DiskOptions};
use crate::error::{Context, one_line};
use crate::fuse::{self, Finished, MappedPages, MountOptions, Mounted, Pulse, ShownAs, Unmounted};
use crate::job::Batch;
use crate::keeper::{self, Entrusted, EntrustedImage, Keeper, KeptMount, Leftover, Messages};
use crate::logging::{self, Log, Owners, Place, Settings};
use crate::metrics;
use crate::qmp::Socket;
use crate::running::{LockedFile, Registration};
use crate::sandbox::{self, Identity};
use crate::storage::Rights;
use crate::{Error, Result};

use control::{Control, Prepared};
use notify::Manager;
use pidfile::Pidfile;
use servers::Servers;
use watchdog::{Heartbeat, Reporter};

/// How often metadata is written back without anybody asking: what a kill can cost at most (P2). syncfs(2) never reaches a FUSE daemon,
/// so nobody else would do it (data-safety 0.8).
const COMMIT_INTERVAL: Duration = Duration::from_secs(1);

/// How long an unmounted session may take to end before it counts as in use.
const UNMOUNT_TIMEOUT: Duration = Duration::from_secs(2);

/// How long the kernel may take to write back what programs have written to mappings of the disk,
/// before a signal or `quit` is acted on without.
const MAPPED_PAGES_TIMEOUT: Duration = Duration::from_secs(5);

/// The signal of who writes where nobody reads.
const SIGPIPE: u8 = 13;

/// What a message says of the writes before it.
const WRITTEN_BACK: &str = "all is written back";
/// The same where that could not be done.
const NOT_WRITTEN_BACK: &str = "not all could be written back";

/// A reason to end.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Event {
    /// SIGTERM or SIGINT: unmount; the second one does not take "busy" for an answer.
    Terminate,
    /// QMP `quit`: does not take "busy" for an answer either.
    Quit,
    /// SIGHUP, which ends nothing: the log file was rotated.
    Hangup,
}

/// Parses the command line, runs the command, returns the exit status: 0, or 1 after one line on standard error; `check` has others as well.
/// Wrong usage ends the process inside the parser.
pub fn main() -> ExitCode {
    match cli::parse().and_then(run) {
        Ok(status) => status,
        // As if the signal had ended it: whoever read has seen enough, and a status of 0 would say more than is known.
        Err(error) if is_closed_output(&error) => ExitCode::from(128 + SIGPIPE),
        Err(error) => {
            // Not eprintln, which panics where nobody reads any more.
            let _ = writeln!(std::io::stderr(), "cordisk: {}", one_line(&error.to_string()));
            ExitCode::FAILURE
        }
    }
}

/// Whether nobody reads standard output any more, as behind `| head -1`.
fn is_closed_output(error: &Error) -> bool {
    error.errno() == Some(rustix::io::Errno::PIPE.raw_os_error()) && error.to_string().starts_with("standard output")
}

fn run(command: Command) -> Result<ExitCode> {
    if let Some(level) = log_level(&command) {
        logging::start(Settings::console(level))?;
    }
    match command {
        Command::Create(options) => {
            let created = crate::create::create(&options).map(|()| ExitCode::SUCCESS);
            created.map_err(|error| client::explain_busy(error, &options.base_path(), "unmount it first", "umount"))
        }
        Command::Check(options) => {
            client::wait_for_closing(&options.image);
            crate::check::run(&options).map_err(|error| client::explain_busy(error, &options.image, "unmount it first", "umount"))
        }
        Command::Stream(options) => client::stream(&options),
        Command::Job(options) => client::job(&options),
        Command::Status(options) => client::status(&options),
        Command::Umount(options) => client::umount(&options),
        Command::Map(options) => client::map(&options),
        Command::Info(options) => client::info(&options),
        Command::Top(options) => client::top(&options),
        Command::Completions(shell) => cli::completions(shell).map(|()| ExitCode::SUCCESS),
        Command::Man(directory) => cli::manual_pages(&directory).map(|()| ExitCode::SUCCESS),
        Command::KeepMount => keeper::run().map(|()| ExitCode::SUCCESS),
        Command::Helper(call) => Ok(helper::run(&call)),
        Command::Mount(config) => match config.role {
            Role::Parent => limits::check().and_then(|()| background::start(std::env::args_os().skip(1), &[])).map(status),
            Role::Foreground | Role::Child => mount(&config).map(|()| ExitCode::SUCCESS),
        },
    }
}

/// The process that serves: in the background it gives up what it has inherited, then it has a log,
/// then it serves.
fn mount(config: &MountConfig) -> Result<()> {
    limits::check()?;
    if config.role == Role::Child {
        background::leave_terminal()?;
    }
    let user = config.user.as_deref().map(Identity::find).transpose()?;
    // Others may not read what a log that is made here will hold.
    rustix::process::umask(Mode::from_raw_mode(0o077));
    let owners = Owners(user.iter().map(|user| user.uid).collect());
    let log = logging::start(log_settings(config, &owners))?;
    let served = serve(config, user, &log, &owners);
    if let Err(error) = &served {
        log.last_words(&error.to_string());
    }
    log.flush();
    served
}

/// What the process that serves logs, and where.
fn log_settings(config: &MountConfig, owners: &Owners) -> Settings {
    let (console, place) = match (&config.log, config.role) {
        (Some(path), Role::Foreground) => (None, Place::File(path.clone(), owners.clone())),
        (None, Role::Foreground) => (Some(log::LevelFilter::Info), Place::Nowhere),
        // What goes wrong before the disk is there is said to the user as well.
        (Some(path), _) => (Some(log::LevelFilter::Warn), Place::File(path.clone(), owners.clone())),
        (None, _) => (Some(log::LevelFilter::Warn), Place::System),
    };
    let path = |path: &Path| path.display().to_string();
    let fields = vec![
        ("CORDISK_IMAGE", path(&config.image)),
        ("CORDISK_MOUNTPOINT", path(&config.mountpoint)),
        ("CORDISK_DEVICE", config.device.clone()),
    ];
    Settings { console, place, subject: path(&config.mountpoint), fields }
}

/// What a command logs unless `RUST_LOG` says otherwise; `None` for those that have nothing to log, or start a process that does.
fn log_level(command: &Command) -> Option<log::LevelFilter> {
    match command {
        // The process that serves has a log of its own.
        Command::Mount(_) | Command::KeepMount | Command::Helper(_) | Command::Completions(_) | Command::Man(_) => None,
        // It would go into the picture.
        Command::Top(_) => Some(log::LevelFilter::Off),
        _ => Some(log::LevelFilter::Warn),
    }
}

/// 0 for a background process that serves, 1 for one that has said why it does not.
fn status(serves: bool) -> ExitCode {
    if serves { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

/// From here to the end of the process: everything that `cordisk mount` does in the process that serves.
fn serve(config: &MountConfig, user: Option<Identity>, log: &Log, owners: &Owners) -> Result<()> {
    sandbox::check(config.sandbox)?;
    // In the background somebody waits for the end of our standard error.
    let keeper = Keeper::start(if config.role == Role::Child { Messages::Dropped } else { Messages::Inherited }, &notify::VARIABLES)?;
    if let Some(path) = &config.log {
        keeper.entrust_log(path, owners)?;
    }
    let mut entered = Entered::default();
    let served = serve_kept(config, user, &keeper, &mut entered, log);
    // Last: as long as the entry is there, commands wait for the image to be closed.
    drop(entered);
    first_of(served, keeper.finish())
}

/// The entry by which commands find this daemon. Dropped in this order: the file, then its lock.
#[derive(Default)]
struct Entered<'a> {
    _file: Option<Entrusted<'a>>,
    _registration: Option<Registration>,
}

/// As [`serve`], with a keeper: what was entrusted to it has been removed afterwards, but for the entry, which is `entered`.
fn serve_kept<'a>(config: &MountConfig, user: Option<Identity>, keeper: &'a Keeper, entered: &mut Entered<'a>, log: &Log) -> Result<()> {
    let signals = signals::register()?;
    // While files can be opened: users and groups have names in some.
    let shown_owner = config.owner.as_deref().map(|text| Identity::named("--owner", text)).transpose()?;
    let shown = ShownAs { owner: shown_owner.map(|owner| (owner.uid, owner.gid)), mode: config.mode };
    // Only who stays in the foreground is the process that a service manager has started.
    let manager = if config.role == Role::Foreground { Manager::connect() } else { None };
    // It may have the pidfile, the socket and the port as well.
    client::wait_for_closing(&config.image);
    let mut pidfile = config.pidfile.as_deref().map(Pidfile::acquire).transpose()?;
    let _pidfile = pidfile.as_mut().map(|pidfile| entrust(keeper, Leftover::Pidfile, pidfile.file())).transpose()?;
    // Before the current directory changes, to which the variable may refer.
    let registration = Registration::begin();
    rustix::process::chdir("/").map_err(std::io::Error::from).context(|| "chdir to /")?;

    // Before anything is opened: an address that is taken should leave no trace.
    let metrics = config.metrics.as_ref().map(metrics::Listener::bind).transpose()?;
    let options = DiskOptions {
        read_only: config.read_only,
        copy_on_read: config.copy_on_read,
        gate: Gate {
            backing_format: config.backing_format,
            roots: Roots::open(&config.backing_roots)?,
            rights: user.map(|user| Rights::of(user.uid, user.gid)).transpose()?,
            ..Gate::default()
        },
        full_check: config.full_check,
        reserve: config.reserve,
    };
    let disk = Arc::new(
        Disk::open(&config.image, &options).map_err(|error| client::explain_busy(error, &config.image, "unmount it first", "umount"))?,
    );
    // The socket before the mount: one that cannot be bound should not make a disk appear and vanish.
    let (mut socket, mut registration) = servers::listen(config, registration)?;
    let entry = registration.as_mut().ok().map(|place| entrust(keeper, Leftover::Entry, place.file())).transpose()?;
    let socket_file = match &mut socket {
        Some(socket) => {
            let entrusted = keeper.entrust(Leftover::Socket, socket.path(), socket.identity())?;
            socket.entrust();
            if let Some(user) = user {
                socket.give_to(user.uid, user.gid)?;
            }
            Some(entrusted)
        }
        None => None,
    };
    if let Some(command) = &config.on_complete {
        entrust_command(keeper, command, config, socket.as_ref(), user)?;
    }
    // In the sandbox no attribute of a file can be changed.
    let image = if config.read_only { None } else { disk.entrust_attributes()? };
    let image = image.map(|image| keeper.entrust_image(&image)).transpose()?;
    let streams = Prepared::new(&disk, &options.gate, image.clone(), keeper)?;
    let close = || close(&disk, config, image.as_ref());
    let ready = (config.role == Role::Child).then(background::Ready::prepare).transpose()?;
    let owner = user.unwrap_or_else(Identity::current);
    let (mountpoint, allow_other) = (config.mountpoint.clone(), config.allow_other);
    let prepared = fuse::prepare(
        &disk,
        MountOptions { mountpoint, allow_other, uid: owner.uid, gid: owner.gid, shown, sync: config.sync, transport: config.transport },
    )?;
    let (mount, device) = match keeper.mount(prepared.plan()) {
        Ok(mounted) => mounted,
        // Nothing has been served: closing has nothing to wait for.
        Err(error) => return first_of(Err(error), close()),
    };
    let servers = Servers { socket, metrics };
    // Held, and so locked, to the end.
    *entered = Entered { _file: entry, _registration: servers::register(config, registration, &servers, mount.path()).ok() };
    let confined = user.map_or(Ok(()), Identity::become_it).and_then(|()| sandbox::enter(config.sandbox));
    if let Err(error) = confined {
        drop((mount, device));
        return first_of(Err(error), close());
    }

    // From here on there are threads.
    let (sender, events) = unbounded();
    log.start_thread();
    let started = limits::try_threads()
        .and_then(|()| signals.start(sender))
        .and_then(|signals| Ok((signals, Control::start(servers, config, &disk, streams, log)?)));
    let (_signals, control) = match started {
        Ok(started) => started,
        Err(error) => {
            drop((mount, device));
            return first_of(Err(error), close());
        }
    };
    let heartbeat = Heartbeat::new();
    let reporter = manager.map(|manager| Reporter::start(manager, &disk, control.jobs(), heartbeat.clone()));
    let announcement = Announcement { pidfile: pidfile.as_ref(), ready, reporter: reporter.as_ref(), heartbeat, log };
    let (served, requests) = match prepared.serve(device) {
        Ok(mounted) => serve_disk(config, &disk, announcement, &control, &events, mount, mounted),
        Err(error) => {
            drop(mount);
            (Err(error), Finished::Quiet)
        }
    };
    // No request comes any more: the jobs, then the disk, then the socket.
    let jobs = control.stop_jobs(&config.device);
    control.told().try_iter().for_each(|batch| on_complete(&batch, || keeper.run_command()));
    let closed = if (requests, jobs) == (Finished::Quiet, Finished::Quiet) {
        close()
    } else {
        // Closing would have to wait for them, perhaps for ever: a backing file hangs. What was acknowledged is made durable all the same.
        log::warn!("requests or jobs still hang; leaving without them");
        disk.flush().context(|| format!("closing {}", config.image.display()))
    };
    // The file while the socket still listens: nothing else can have its inode number yet, and be taken for it.
    drop(socket_file);
    control.close(&closed);
    if served.is_ok() && closed.is_ok() {
        log::info!("{} is closed", config.image.display());
    }
    first_of(served, closed)
}

/// Leaves a locked file to the keeper, to be removed when what is returned is dropped.
fn entrust<'a>(keeper: &'a Keeper, what: Leftover, file: &mut LockedFile) -> Result<Entrusted<'a>> {
    let entrusted = keeper.entrust(what, file.path(), file.identity()?)?;
    file.entrust();
    Ok(entrusted)
}

/// Names the command of `--on-complete` to the keeper, and what it will be told.
fn entrust_command(keeper: &Keeper, command: &OsStr, config: &MountConfig, socket: Option<&Socket>, user: Option<Identity>) -> Result<()> {
    let mut environment = vec![
        ("CORDISK_IMAGE", config.image.as_os_str()),
        ("CORDISK_MOUNTPOINT", config.mountpoint.as_os_str()),
        ("CORDISK_DEVICE", OsStr::new(&config.device)),
    ];
    environment.extend(socket.map(|socket| ("CORDISK_QMP", socket.path().as_os_str())));
    keeper.entrust_command(command, &environment, user)
}

/// Has the command of `--on-complete` run once for each stream that has completed.
fn on_complete(batch: &Batch, run: impl Fn() -> Result<()>) {
    for _ in 0..control::completed(batch) {
        if let Err(error) = run() {
            log::warn!("{error}");
        }
    }
}

/// Closes the disk, and has the keeper remove the mark of an open image.
fn close(disk: &Disk, config: &MountConfig, image: Option<&EntrustedImage>) -> Result<()> {
    disk.close().context(|| format!("closing {}", config.image.display()))?;
    if let Some(image) = image.filter(|_| disk.is_usable())
        && let Err(error) = image.remove_mark()
    {
        log::warn!("{}: {error}", config.image.display());
    }
    Ok(())
}

/// The first error is the one to report, the other goes to the log.
fn first_of(first: Result<()>, second: Result<()>) -> Result<()> {
    match (first, second) {
        (Err(error), second) => {
            if let Err(second) = second {
                log::error!("{second}");
            }
            Err(error)
        }
        (Ok(()), second) => second,
    }
}

/// Who is told that the disk is there.
struct Announcement<'a> {
    pidfile: Option<&'a Pidfile>,
    ready: Option<background::Ready>,
    reporter: Option<&'a Reporter>,
    /// Beats as long as commits end.
    heartbeat: Heartbeat,
    log: &'a Log,
}

/// Everything between the open disk and its close: mounted, served, unmounted. Also tells whether requests are still running.
fn serve_disk(
    config: &MountConfig,
    disk: &Arc<Disk>,
    announcement: Announcement<'_>,
    control: &Control,
    events: &Receiver<Event>,
    mount: KeptMount<'_>,
    mounted: Mounted,
) -> (Result<()>, Finished) {
    control.mounted(mounted.size_notice(), mounted.pulse());
    let (reporter, heartbeat, log) = (announcement.reporter, announcement.heartbeat.clone(), announcement.log);
    let announced = announce(config, disk, control, announcement, &mount, mounted.pulse());
    let timer = CommitTimer::start(Arc::clone(disk), heartbeat);
    let ended = announced.and_then(|()| wait_for_end(&mount, &mounted, disk, events, control, log));
    if ended.is_err()
        && let Err(error) = mount.detach()
    {
        log::error!("{error}");
    }
    reporter.into_iter().for_each(Reporter::stopping);
    let finished = mounted.finish();
    // With the placeholder.
    drop(mount);
    drop(timer);
    (ended, finished)
}

/// The stream, the pidfile, and the news that the disk is there.
fn announce(
    config: &MountConfig,
    disk: &Arc<Disk>,
    control: &Control,
    told: Announcement<'_>,
    mount: &KeptMount<'_>,
    pulse: Pulse,
) -> Result<()> {
    control.start_stream(disk, config)?;
    if let Some(pidfile) = told.pidfile {
        pidfile.write()?;
    }
    log::info!("mounted {} on {}", config.image.display(), mount.path().display());
    if let Some(reporter) = told.reporter {
        reporter.ready(format!("serving {} on {}", config.image.display(), mount.path().display()), pulse);
    }
    let Some(ready) = told.ready else { return Ok(()) };
    if told.log.place().is_none() {
        let note = "there is no journal and no syslog here, so this daemon has no log; mount with --log FILE to have one";
        let _ = writeln!(std::io::stderr(), "cordisk: note: {note}");
    }
    ready.say()?;
    told.log.leave_console();
    Ok(())
}

/// Serves until the session has ended, unmounting it when asked to.
///
/// # Errors
/// The session broke, or could not be taken from the kernel.
fn wait_for_end(
    mount: &KeptMount<'_>,
    mounted: &Mounted,
    disk: &Disk,
    events: &Receiver<Event>,
    control: &Control,
    log: &Log,
) -> Result<()> {
    let mut asked = None;
    // Armed when it was unmounted, for as long as the session does not end.
    let mut overdue = crossbeam_channel::never();
    loop {
        let event = select! {
            recv(mounted.ended()) -> end => {
                control.announce_shutdown(asked);
                return end.unwrap_or(Ok(()));
            }
            recv(control.told()) -> batch => {
                if let Ok(batch) = batch {
                    on_complete(&batch, || mount.run_command());
                }
                continue;
            }
            recv(overdue) -> _ => {
                overdue = crossbeam_channel::never();
                look_again(mount);
                continue;
            }
            recv(events) -> event => match event.unwrap_or(Event::Terminate) {
                Event::Hangup => {
                    reopen_log(mount, log);
                    continue;
                }
                event => event,
            },
            recv(control.quit()) -> _ => Event::Quit,
        };
        // Whatever happens next, what was written until now is safe (P15): first the pages that the
        // kernel holds for mappings of the disk.
        let mapped = mounted.write_mapped_pages(MAPPED_PAGES_TIMEOUT);
        let flushed = disk.flush().inspect_err(|error| log::error!("flush: {error}"));
        let state = if mapped == MappedPages::Written && flushed.is_ok() { WRITTEN_BACK } else { NOT_WRITTEN_BACK };
        let unmounted = mount.unmount().inspect_err(|error| log::error!("{error}"));
        let first = asked.replace(event).is_none();
        if event == Event::Terminate && first {
            match unmounted {
                Ok(Unmounted::Done) => overdue = crossbeam_channel::after(UNMOUNT_TIMEOUT),
                Ok(Unmounted::Busy) => warn_of_use(mount, state),
                Err(_) => {}
            }
            continue;
        }
        // Done may also mean that somebody has detached it, with the disk still open.
        if matches!(unmounted, Ok(Unmounted::Done)) && mounted.ends_within(UNMOUNT_TIMEOUT) {
            continue;
        }
        log::warn!("{} is in use: {state}, detaching it", mount.path().display());
        control.announce_shutdown(Some(event));
        return mount.detach();
    }
}

/// The log file was rotated. A process that logs elsewhere has nothing to do.
fn reopen_log(mount: &KeptMount<'_>, log: &Log) {
    if !log.has_file() {
        return;
    }
    match mount.open_log() {
        Ok(file) => {
            log.replace_file(file);
            log::info!("the log goes on in a new file");
        }
        Err(error) => log::warn!("the log stays in the old file: {error}"),
    }
}

/// It was unmounted and is served still: a mount namespace that was made meanwhile has a mount of its own, or it was not ours that went.
fn look_again(mount: &KeptMount<'_>) {
    let path = mount.path().display();
    match mount.unmount() {
        Ok(Unmounted::Done) => {
            log::warn!("{path} is unmounted, but another mount namespace (a container?) has it still: the next signal ends it")
        }
        Ok(Unmounted::Busy) => warn_of_use(mount, WRITTEN_BACK),
        Err(error) => log::error!("{error}"),
    }
}

fn warn_of_use(mount: &KeptMount<'_>, state: &str) {
    log::warn!("{} is in use: {state}, serving on; the next signal detaches it", mount.path().display());
}

/// Writes metadata back every [`COMMIT_INTERVAL`] until dropped.
struct CommitTimer {
    stop: Option<Sender<()>>,
    thread: Option<thread::JoinHandle<()>>,
}

impl CommitTimer {
    fn start(disk: Arc<Disk>, heartbeat: Heartbeat) -> CommitTimer {
        let unused = heartbeat.clone();
        let (stop, stopped) = crossbeam_channel::bounded(0);
        let body = move || {
            let mut last = None;
            let wanted = disk.commit_wanted();
            loop {
                select! {
                    recv(stopped) -> _ => break,
                    recv(wanted) -> _ => {}
                    default(COMMIT_INTERVAL) => {}
                }
                let error = disk.flush_if_dirty().err().map(|error: Error| error.to_string());
                heartbeat.beat();
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
                unused.retire();
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
