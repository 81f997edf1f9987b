//! The life of the program: the commands, the wiring of `cordisk mount`, and its orderly shutdown.
//! It holds no logic that a unit test would need.
//!
//! `cordisk mount` becomes the mount keeper, which starts the serving process ([`crate::keeper`]).
//! The start of the latter has this order: lock the pidfile and the registry entry, bind the
//! metrics address, open the disk, bind the control socket, mount, fill in the entry, become
//! `--user`, enter the sandbox. Only then it starts threads (signals, metrics, QMP, the session,
//! the stream) and reports "ready". The shutdown has this order, whatever its reason: unmount, stop
//! jobs, close the disk, close QMP, let the keeper go. After the shutdown every acknowledged write
//! is durable, or the exit status reports a failure.
//!
//! **Touches:** every part of the program, once. **Never:** leaves a mount, placeholder, socket,
//! pidfile or entry behind, unless the process is killed; starts a thread or answers a client
//! before it has entered the sandbox.
//! **Locks:** none; events arrive over channels at the one thread that decides (`serve`).
//! **Invariants:** after the mount the process looks up no path that could lead through its own
//! mountpoint: the current directory is `/`, all paths are absolute, and files are open already
//! (H29). In the sandbox the process cannot look up any path.

mod background;
mod control;
mod helper;
mod limits;
mod notify;
mod open_disk;
mod order;
mod pidfile;
mod scrub;
mod servers;
mod signals;
mod successor;
mod survival;
mod watchdog;

use std::ffi::OsStr;
use std::io::Write;
use std::os::fd::AsFd;
use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use crossbeam_channel::{Receiver, select, unbounded};
use rustix::fs::Mode;

use crate::cli::{self, Command, Ground, MountConfig, Role};
use crate::client;
use crate::fetching::{self, FetcherPlan, SourceConfig};
use crate::keeper::{self, Console, Entrusted, Estate, Keeper, KeeperStart, KeptMount, Leftover};
use crate::logging::{self, Log, LogPlace, Owners, Settings};
use crate::metrics;
use crate::mount::{MountOptions, MountPlan, Unmounted};
use crate::running::{LockedFile, Registration};
use crate::sandbox::{self, Identity};
use ::control::Socket;
use engine::chain::{Gate, Roots};
use engine::disk::{CommitAge, CommitTimer, Disk, DiskOptions, LeakFinder};
use export::{Connected, Finished, MappedPages, Mounted, Pulse, ShownAs};
use host::error::{Context, one_line};
use host::storage::Rights;
use host::{Error, ErrorKind, Result};

use control::{ControlSocket, PreparedControl};
use notify::Manager;
use open_disk::OpenDisk;
use order::OrderPlan;
use pidfile::Pidfile;
use servers::Servers;
use survival::Survival;
use watchdog::Reporter;

/// How long an unmounted session may take to end before the disk counts as in use.
const UNMOUNT_TIMEOUT: Duration = Duration::from_secs(2);

/// How long the kernel may take to write back dirty pages of programs' mappings of the disk. After
/// this time the daemon acts on the signal or `quit` without waiting for the rest.
const MAPPED_PAGES_TIMEOUT: Duration = Duration::from_secs(5);

/// How long the threads of io_uring may take to leave a disk that is handed over. A request that
/// they have begun takes less, unless its file hangs.
const LEAVE_TIMEOUT: Duration = Duration::from_millis(100);

/// The signal that a process gets when it writes to a pipe that has no reader.
const SIGPIPE: u8 = 13;

/// The state of earlier writes, as log messages word it, after a flush that succeeded.
const WRITTEN_BACK: &str = "all is written back";
/// The state of earlier writes, as log messages word it, after a flush that failed or was
/// incomplete.
const NOT_WRITTEN_BACK: &str = "not all could be written back";

/// An event that [`wait_for_end`] acts on.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Event {
    /// SIGTERM or SIGINT: unmount. The second one detaches the disk even if it is in use.
    Terminate,
    /// QMP `quit`: unmount, and detach the disk at once if it is in use.
    Quit,
    /// SIGHUP: the log file was rotated. It does not end the process.
    Hangup,
    /// The keeper wants to start another program that goes on with the disk.
    HandOver,
}

/// Parses the command line, runs the command, and returns the exit status. The status is 0, or 1
/// after one line on standard error; `check` has further statuses. Wrong usage ends the process
/// inside the parser.
pub fn main() -> ExitCode {
    match cli::parse().and_then(|command| signals::take_file_size().and_then(|()| run(command))) {
        Ok(status) => status,
        // The status is that of a process killed by SIGPIPE. The reader has closed the pipe early,
        // and a status of 0 would claim that the whole command succeeded.
        Err(error) if error.kind() == ErrorKind::OutputClosed => ExitCode::from(128 + SIGPIPE),
        Err(error) => {
            // `eprintln!` would panic if standard error is a pipe without a reader.
            let _ = writeln!(std::io::stderr(), "cordisk: {}", one_line(&error.to_string()));
            ExitCode::FAILURE
        }
    }
}

fn run(command: Command) -> Result<ExitCode> {
    if let Some(level) = log_level(&command) {
        logging::start(Settings::console(level))?;
    }
    match command {
        Command::Create(options, sources) => {
            let gate = gate_of(sources.also(&options.base), &options.overlay)?;
            let created = engine::create::create(&options, &gate).map(|()| ExitCode::SUCCESS);
            created.map_err(|error| {
                client::explain_busy(error, &options.base_path(), "unmount it first", "umount")
            })
        }
        Command::Check(options) => {
            client::wait_for_closing(&options.image);
            qcow2::check::run(&options).map_err(|error| {
                client::explain_busy(error, &options.image, "unmount it first", "umount")
            })
        }
        Command::Stream(options) => client::stream(&options),
        Command::Job(options) => client::job(&options),
        Command::Status(options) => client::status(&options),
        Command::Umount(options) => client::umount(&options),
        Command::Upgrade(options) => {
            client::upgrade(&options, &cli::changed_mount, &background::start_keeper)
        }
        Command::Map(options) => client::map(&options),
        Command::Info(options) => client::info(&options),
        Command::Top(options) => client::top(&options),
        Command::Cache(options) => client::cache(&options),
        Command::Sums(options) => client::sums(&options),
        Command::Order(options) => client::order(&options),
        Command::Completions(shell) => cli::completions(shell).map(|()| ExitCode::SUCCESS),
        Command::Man(directory) => cli::manual_pages(&directory).map(|()| ExitCode::SUCCESS),
        Command::Helper(call) => Ok(helper::run(&call)),
        Command::Mount(config) => {
            let done = match config.role {
                Role::Parent => limits::check()
                    .and_then(|()| background::start(std::env::args_os().skip(1), &[], None))
                    .map(status),
                Role::Keeper(ground) => {
                    scrub::leave_credentials().and_then(|()| keep(&config, ground))
                }
                Role::Server(_) => mount(&config).map(|()| ExitCode::SUCCESS),
            };
            done.map_err(Error::explain_limit)
        }
    }
}

/// The gate of a command that runs without a daemon, and makes or reads the image at `path`.
fn gate_of(sources: SourceConfig, path: &Path) -> Result<Gate> {
    let starter = FetcherPlan::new(&sources, directory_of(path))?.starter();
    Ok(Gate { sources: Some(fetching::sources(&sources, starter)), ..Gate::default() })
}

/// The directory of a file.
fn directory_of(path: &Path) -> &Path {
    path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

/// Runs `cordisk mount` in the keeper, which starts the serving process and ends with its exit
/// status. A keeper in the background first gives up inherited descriptors and its terminal.
fn keep(config: &MountConfig, ground: Ground) -> Result<ExitCode> {
    // Before this process opens anything, and before it closes what it was given.
    let (estate, no_estate) = match &config.keeper_of {
        Some(socket) => (Some(Estate::of_process(socket)?), None),
        None => match Estate::of_manager(&config.mountpoint) {
            Ok(estate) => (estate, None),
            Err(error) => (None, Some(error)),
        },
    };
    let console = match ground {
        Ground::Foreground => Console::Kept,
        Ground::Background => {
            background::leave_terminal(config.credentials)?;
            Console::LeftWhenReady
        }
    };
    let credentials = config.credentials.map(scrub::take_credentials).transpose()?;
    keeper::run(KeeperStart {
        console,
        credentials: credentials.unwrap_or_default(),
        arguments: scrub::arguments(),
        estate,
        no_estate,
    })
}

/// Runs `cordisk mount` in the serving process: the log is started, and then the disk is served.
fn mount(config: &MountConfig) -> Result<()> {
    let keeper = Keeper::of_this_process()?;
    limits::check()?;
    let user = config.user.as_deref().map(Identity::find).transpose()?;
    // A log file that is created here is not readable by other users.
    rustix::process::umask(Mode::from_raw_mode(0o077));
    let owners = Owners(user.iter().map(|user| user.uid).collect());
    let log = logging::start(log_settings(config, &owners))?;
    let served = serve(config, user, keeper, &log, &owners);
    if let Err(error) = &served {
        log.last_words(&error.to_string());
    }
    log.flush();
    served
}

/// Returns the level and the destination of the serving process's log.
fn log_settings(config: &MountConfig, owners: &Owners) -> Settings {
    let (console, place) = match (&config.log, config.role.is_in_background()) {
        (Some(path), false) => (None, LogPlace::File(path.clone(), owners.clone())),
        (None, false) => (Some(log::LevelFilter::Info), LogPlace::Nowhere),
        // Warnings go to the console as well, so that the user sees why a mount failed.
        (Some(path), true) => {
            (Some(log::LevelFilter::Warn), LogPlace::File(path.clone(), owners.clone()))
        }
        (None, true) => (Some(log::LevelFilter::Warn), LogPlace::System),
    };
    let path = |path: &Path| path.display().to_string();
    let fields = vec![
        ("CORDISK_IMAGE", path(&config.image)),
        ("CORDISK_MOUNTPOINT", path(&config.mountpoint)),
        ("CORDISK_DEVICE", config.device.clone()),
    ];
    Settings { console, place, subject: path(&config.mountpoint), fields }
}

/// Returns the log level of a command unless `RUST_LOG` overrides it. `None` stands for commands
/// that log nothing, or that start a process with a log of its own.
fn log_level(command: &Command) -> Option<log::LevelFilter> {
    match command {
        // The serving process starts a log of its own.
        Command::Mount(_) | Command::Helper(_) | Command::Completions(_) | Command::Man(_) => None,
        // Log lines would be written into the picture on the screen.
        Command::Top(_) => Some(log::LevelFilter::Off),
        _ => Some(log::LevelFilter::Warn),
    }
}

/// Returns 0 if the background process serves, and 1 if it has reported why it does not.
fn status(serves: bool) -> ExitCode {
    if serves { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

/// Does everything that `cordisk mount` does in the serving process, up to the end of the process.
fn serve(
    config: &MountConfig,
    user: Option<Identity>,
    keeper: Keeper,
    log: &Log,
    owners: &Owners,
) -> Result<()> {
    sandbox::check(config.sandbox)?;
    if let Some(path) = &config.log {
        keeper.entrust_log(path, owners)?;
    }
    let mut entered = Entered::default();
    let served = serve_kept(config, user, &keeper, &mut entered, log);
    // Dropped last: while the entry exists, commands wait until the image is closed.
    drop(entered);
    first_of(served, keeper.finish())
}

/// The entry by which commands find this daemon. The fields are dropped in this order: the file,
/// then its lock.
#[derive(Default)]
struct Entered<'a> {
    _file: Option<Entrusted<'a>>,
    _registration: Option<Registration>,
}

/// Continues [`serve`] with a running keeper. When it returns, the keeper has removed all
/// files entrusted to it except the registry entry, which is left in `entered`.
fn serve_kept<'a>(
    config: &MountConfig,
    user: Option<Identity>,
    keeper: &'a Keeper,
    entered: &mut Entered<'a>,
    log: &Log,
) -> Result<()> {
    let signals = signals::register()?;
    // Names of users and groups are looked up while files can still be opened.
    let shown_owner =
        config.owner.as_deref().map(|text| Identity::named("--owner", text)).transpose()?;
    let manager = Manager::of(keeper)?;
    let mut inherited = keeper.inherited()?;
    if inherited.is_none() {
        // A daemon that is still closing this image may also hold the pidfile, the socket and the
        // port.
        client::wait_for_closing(&config.image);
    }
    let is_successor = inherited.is_some();
    let pidfile = config.pidfile.as_deref().map(Pidfile::acquire).transpose();
    let mut pidfile = successor::or_without(is_successor, pidfile)?;
    let _pidfile = pidfile
        .as_mut()
        .map(|pidfile| entrust(keeper, Leftover::Pidfile, pidfile.file()))
        .transpose()?;
    // Called before the current directory changes, because the environment variable of the runtime
    // directory may hold a relative path.
    let registration = Registration::begin(keeper.pid());
    rustix::process::chdir("/").map_err(std::io::Error::from).context(|| "chdir to /")?;

    limits::check_growth(config)?;
    // Bound before anything is opened, so that an address in use leaves no trace.
    let metrics = config.metrics.as_ref().map(metrics::Listener::bind).transpose();
    let metrics = successor::or_without(is_successor, metrics)?;
    let plan = FetcherPlan::new(&config.sources, directory_of(&config.image))?;
    let starter = keeper.entrust_fetcher(&plan)?;
    let sources = fetching::sources(&config.sources, starter);
    let options = DiskOptions {
        read_only: config.read_only,
        copy_on_read: config.copy_on_read,
        gate: Gate {
            backing_format: config.backing_format,
            roots: Roots::open(&config.backing_roots)?,
            rights: user.map(|user| Rights::of(user.uid, user.gid)).transpose()?,
            sources: Some(Arc::clone(&sources)),
            ..Gate::default()
        },
        full_check: config.full_check,
        reserve: config.reserve,
    };
    let journal = match &inherited {
        None if !config.read_only => successor::journal(),
        _ => None,
    };
    let disk = successor::open_disk(config, &options, inherited.as_mut(), journal.as_ref())?;
    let mut open = OpenDisk::new(disk, config);
    let disk = Arc::clone(&open.disk);
    limits::warn_of_growth(config, disk.size());
    let order = OrderPlan::new(config, &disk, sources, user, keeper).map(Some);
    let order = successor::or_without(is_successor, order)?;
    // The socket is bound before the mount. Otherwise a socket that cannot be bound would make a
    // disk appear and vanish.
    let (mut socket, mut registration) = servers::listen(config, registration, is_successor)?;
    let entry = registration
        .as_mut()
        .ok()
        .map(|place| entrust(keeper, Leftover::Entry, place.file()))
        .transpose()?;
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
    // In the sandbox the process cannot change extended attributes, so the keeper does it.
    let image = if config.read_only { None } else { disk.entrust_attributes()? };
    open.image = image.map(|image| keeper.entrust_image(&image)).transpose()?;
    let (image, left) = (open.image.clone(), inherited.as_ref());
    let streams = PreparedControl::new(&disk, &options.gate, image, keeper, left)?.with(order);
    let ready =
        config.role.is_in_background().then(|| background::Ready::prepare(keeper)).transpose()?;
    let owner = user.unwrap_or_else(Identity::current);
    let (mountpoint, allow_other) = (config.mountpoint.clone(), config.allow_other);
    let (uid, gid) = shown_owner.map_or((owner.uid, owner.gid), |shown| (shown.uid, shown.gid));
    let shown = ShownAs { uid, gid, mode: config.mode, allow_other, read_only: config.read_only };
    let prepared = export::prepare(&disk, shown, successor::transport(config, &inherited))?;
    let image = disk.descriptor()?;
    // In this order, so that the mount is released before the device is closed if a step below
    // fails.
    let (device, mut mount) = match &inherited {
        None => {
            let options = MountOptions {
                mountpoint,
                allow_other,
                uid: owner.uid,
                gid: owner.gid,
                sync: config.sync,
            };
            let plan = MountPlan::of_disk(disk.info()?, options)?;
            keeper.mount(&plan).map(|(mount, device)| (Some(device), mount))?
        }
        Some(_) => (None, keeper.adopt_mount()?),
    };
    let servers = Servers { socket, metrics };
    // The registration is held, and so locked, until the end.
    *entered = Entered {
        _file: entry,
        _registration: servers::register(
            config,
            registration,
            &servers,
            mount.path(),
            keeper.pid(),
        )
        .ok(),
    };
    user.map_or(Ok(()), Identity::become_it).and_then(|()| sandbox::enter(config.sandbox))?;

    // Threads exist from here on.
    let (sender, events) = unbounded();
    log.start_thread(keeper.log_connector());
    limits::try_threads()?;
    let survival = Survival::after(inherited.as_ref().map_or(0, |inherited| inherited.takeovers));
    let without_keeper = survival.clone();
    let leave = sender.clone();
    keeper.watch(
        move || without_keeper.is_impossible("the mount keeper has died"),
        move || {
            let _ = leave.send(Event::HandOver);
        },
    )?;
    let _signals = signals.start(sender)?;
    let control =
        ControlSocket::start(servers, config, &disk, streams, log, keeper.pid(), &survival)?;
    let commit_age = CommitAge::new();
    let reporter =
        manager.map(|manager| Reporter::start(manager, &disk, control.jobs(), commit_age.clone()));
    let announcement = Announcement {
        pidfile: pidfile.as_ref().map(|pidfile| (pidfile, keeper.pid())),
        ready,
        is_successor,
        reporter: reporter.as_ref(),
        commit_age,
        log,
    };
    let connected = match (inherited, device) {
        (Some(inherited), _) => successor::take_over(prepared, inherited, keeper, &survival),
        (None, Some(device)) => successor::connect(
            config,
            prepared,
            device,
            keeper,
            image.as_fd(),
            journal.as_ref().map(AsFd::as_fd),
            &survival,
        ),
        (None, None) => Err(Error::new(ErrorKind::Io, "no /dev/fuse")),
    };
    drop((image, journal));
    let mounted = connected.and_then(Connected::serve);
    if mounted.is_ok()
        && let Err(error) = mount.is_served()
    {
        log::warn!("{error}");
    }
    let (served, requests) = match mounted {
        Ok(mounted) => serve_disk(config, &disk, announcement, &control, &events, mount, mounted),
        Err(error) => {
            drop(mount);
            (Err(error), Finished::Quiet)
        }
    };
    // No request arrives any more. Stop the jobs, then close the disk, then the socket.
    let jobs = control.stop_jobs(&config.device);
    let run = |completed| keeper.run_command(completed);
    control.job_events().try_iter().for_each(|batch| control.on_complete(&batch, run));
    let closed = if (requests, jobs) == (Finished::Quiet, Finished::Quiet) {
        open.close()
    } else {
        // Closing would have to wait for these requests or jobs, perhaps for ever, if a backing
        // file hangs.
        log::warn!("requests or jobs still hang; leaving without them");
        open.leave()
    };
    if closed.is_ok() {
        control.learn(&disk);
    }
    // The socket file is removed while the socket still listens. Until then its inode number cannot
    // be reused, so the keeper cannot mistake another file for it.
    drop(socket_file);
    control.close(&closed);
    if served.is_ok() && closed.is_ok() {
        log::info!("{} is closed", config.image.display());
    }
    first_of(served, closed)
}

/// Entrusts a locked file to the keeper, which removes it when the returned value is dropped.
fn entrust<'a>(keeper: &'a Keeper, what: Leftover, file: &mut LockedFile) -> Result<Entrusted<'a>> {
    let entrusted = keeper.entrust(what, file.path(), file.identity()?)?;
    file.entrust();
    Ok(entrusted)
}

/// Gives the keeper the command of `--on-complete` and its environment variables.
fn entrust_command(
    keeper: &Keeper,
    command: &OsStr,
    config: &MountConfig,
    socket: Option<&Socket>,
    user: Option<Identity>,
) -> Result<()> {
    let mut environment = vec![
        ("CORDISK_IMAGE", config.image.as_os_str()),
        ("CORDISK_MOUNTPOINT", config.mountpoint.as_os_str()),
        ("CORDISK_DEVICE", OsStr::new(&config.device)),
    ];
    environment.extend(socket.map(|socket| ("CORDISK_QMP", socket.path().as_os_str())));
    keeper.entrust_command(command, &environment, user)
}

/// Returns the first error; a second error goes to the log.
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

/// The recipients of the news that the disk is mounted.
struct Announcement<'a> {
    /// The pidfile, and the process id of the keeper.
    pidfile: Option<(&'a Pidfile, u32)>,
    ready: Option<background::Ready<'a>>,
    /// The guest lives already: what cannot be announced must not end the disk.
    is_successor: bool,
    reporter: Option<&'a Reporter>,
    /// The age of the last commit, which the commit timer updates.
    commit_age: CommitAge,
    log: &'a Log,
}

/// Does everything between the open disk and its close: announce, serve, unmount. The second value
/// says whether requests are still running.
fn serve_disk(
    config: &MountConfig,
    disk: &Arc<Disk>,
    announcement: Announcement<'_>,
    control: &ControlSocket,
    events: &Receiver<Event>,
    mount: KeptMount<'_>,
    mounted: Mounted,
) -> (Result<()>, Finished) {
    control.mounted(mounted.size_notice(), mounted.pulse());
    let (reporter, commit_age, log) =
        (announcement.reporter, announcement.commit_age.clone(), announcement.log);
    let is_successor = announcement.is_successor;
    let announced = announce(config, disk, control, announcement, &mount, mounted.pulse());
    let timer = CommitTimer::start(disk, commit_age);
    let finder = is_successor.then(|| LeakFinder::start(disk));
    let ended = announced.and_then(|()| wait_for_end(&mount, &mounted, disk, events, control, log));
    if ended.is_err()
        && let Err(error) = mount.detach()
    {
        log::error!("{error}");
    }
    reporter.into_iter().for_each(Reporter::stopping);
    let finished = mounted.finish();
    // This removes the placeholder as well.
    drop(mount);
    drop(finder);
    drop(timer);
    (ended, finished)
}

/// Starts the stream, writes the pidfile, and reports that the disk is mounted.
fn announce(
    config: &MountConfig,
    disk: &Arc<Disk>,
    control: &ControlSocket,
    announcement: Announcement<'_>,
    mount: &KeptMount<'_>,
    pulse: Pulse,
) -> Result<()> {
    let is_successor = announcement.is_successor;
    successor::or_without(is_successor, control.start_stream(disk, config).map(Some))?;
    if is_successor && config.on_complete.is_some() {
        control.tell_completed(|completed| mount.run_command(completed));
    }
    if let Some((pidfile, main)) = announcement.pidfile {
        successor::or_without(is_successor, pidfile.write(main).map(Some))?;
    }
    log::info!("mounted {} on {}", config.image.display(), mount.path().display());
    if let Some(reporter) = announcement.reporter {
        reporter.ready(
            format!("serving {} on {}", config.image.display(), mount.path().display()),
            pulse,
        );
    }
    let Some(ready) = announcement.ready else { return Ok(()) };
    if announcement.log.place().is_none() {
        let note = "there is no journal and no syslog here, so this daemon has no log; mount with --log FILE to have one";
        let _ = writeln!(std::io::stderr(), "cordisk: note: {note}");
    }
    successor::or_without(is_successor, ready.say().map(Some))?;
    announcement.log.leave_console();
    Ok(())
}

/// Serves until the session has ended, and unmounts it when a signal or `quit` asks for it.
///
/// # Errors
/// The session broke, or the kernel refused to unmount or detach it.
fn wait_for_end(
    mount: &KeptMount<'_>,
    mounted: &Mounted,
    disk: &Disk,
    events: &Receiver<Event>,
    control: &ControlSocket,
    log: &Log,
) -> Result<()> {
    let mut asked = None;
    // Armed after a successful unmount; it fires if the session has not ended by then.
    let mut overdue = crossbeam_channel::never();
    loop {
        let event = select! {
            recv(mounted.ended()) -> end => {
                control.announce_shutdown(asked);
                return end.unwrap_or(Ok(()));
            }
            recv(control.job_events()) -> batch => {
                if let Ok(batch) = batch {
                    control.on_complete(&batch, |completed| mount.run_command(completed));
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
                Event::HandOver => {
                    hand_over(mount, mounted, disk, log, asked.is_some());
                    continue;
                }
                event => event,
            },
            recv(control.quit()) -> _ => Event::Quit,
        };
        // Whatever happens next, every write up to here is made durable (P15). The first step is to
        // write back dirty pages that the kernel holds for mappings of the disk.
        let mapped = mounted.write_mapped_pages(MAPPED_PAGES_TIMEOUT);
        let flushed = disk.flush().inspect_err(|error| log::error!("flush: {error}"));
        let state = if mapped == MappedPages::Written && flushed.is_ok() {
            WRITTEN_BACK
        } else {
            NOT_WRITTEN_BACK
        };
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
        // `Unmounted::Done` is also the answer if another process has detached the mount while the
        // disk is still open.
        if matches!(unmounted, Ok(Unmounted::Done)) && mounted.ends_within(UNMOUNT_TIMEOUT) {
            continue;
        }
        log::warn!("{} is in use: {state}, detaching it", mount.path().display());
        control.announce_shutdown(Some(event));
        return mount.detach();
    }
}

/// Ends this process without unmounting, so that the keeper starts another one, which takes the
/// disk over. Returns if that cannot be, and the keeper knows why.
///
/// Requests go on until the end, over io_uring until its threads have left: the successor gets
/// those that are not answered. What changes after the flush is in the journal.
fn hand_over(mount: &KeptMount<'_>, mounted: &Mounted, disk: &Disk, log: &Log, is_ending: bool) {
    let flushed = if is_ending {
        Err(Error::new(ErrorKind::Busy, "the disk is being unmounted"))
    } else {
        disk.flush().map_err(|error| error.context(NOT_WRITTEN_BACK))
    };
    match flushed {
        // The keeper may have died during the flush, or the new one that has asked for the disk.
        Ok(()) if !mount.has_successor() => log::warn!("no other process follows: serving on"),
        Ok(()) => {
            log::info!("leaving the disk to another process");
            if !mounted.leave(LEAVE_TIMEOUT) {
                log::warn!("a request hangs; leaving without waiting for it");
            }
            log.flush();
            std::process::exit(keeper::HANDED_OVER)
        }
        Err(error) => {
            log::error!("the disk is not left to another process: {error}");
            if let Err(error) = mount.cannot_hand_over(&error.to_string()) {
                log::warn!("{error}");
            }
        }
    }
}

/// Reopens the log file after its rotation. A process that does not log to a file has nothing to
/// do.
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

/// Unmounts once more a disk that was unmounted and is still served. Either a mount namespace that
/// was created meanwhile has a copy of the mount, or the unmount removed a mount that was not ours.
fn look_again(mount: &KeptMount<'_>) {
    let path = mount.path().display();
    match mount.unmount() {
        Ok(Unmounted::Done) => {
            log::warn!(
                "{path} is unmounted, but another mount namespace (a container?) has it still: the next signal ends it"
            )
        }
        Ok(Unmounted::Busy) => warn_of_use(mount, WRITTEN_BACK),
        Err(error) => log::error!("{error}"),
    }
}

fn warn_of_use(mount: &KeptMount<'_>, state: &str) {
    log::warn!(
        "{} is in use: {state}, serving on; the next signal detaches it",
        mount.path().display()
    );
}
