//! The log of a process: which lines are written, where they go, and the last warning among them.
//!
//! ```text
//! any thread: log::warn!() ─► filter ─► last warning ─┬─► standard error (in the background only
//!                                                     │   until the disk is mounted)
//!                                                     └─► queue ─► thread "log" ─► file, journal
//!                                                                                  or syslog
//! ```
//!
//! The file or socket (the outlet) is opened before the sandbox is entered. The keeper opens it
//! again: the file after it was rotated, the socket after the log daemon was restarted. A thread
//! that serves a request never waits for the outlet: a stopped syslog daemon or a hung file system
//! delays only the thread "log". Lines that do not fit the queue are counted and dropped.
//!
//! **Touches:** standard error, one file or one datagram socket. **Never:** opens anything by
//! itself once [`Log::start_thread`] was called; waits for the outlet on another thread, except in
//! [`Log::flush`], which gives up after at most twice `FLUSH_TIMEOUT`.
//! **Locks:** leaf locks. That of the outlet's sink is held across one write. That of the queue is
//! held across a send that does not wait. That of the last warning is held only to set or to read
//! it.

use std::io::Write;
use std::os::unix::net::UnixDatagram;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, SystemTime};

use control::{LogFacts, Warning};
use crossbeam_channel::{Receiver, Sender, TrySendError, bounded};
use log::{Level, LevelFilter, Metadata, Record};
use parking_lot::Mutex;

use host::Result;
use host::error::{Context, one_line};

mod file;
mod system;
#[cfg(test)]
mod tests;

use file::LogFile;
pub use file::{Owners, open as open_file};
pub use system::Daemon;
use system::{SystemLog, is_disconnected};

/// Most lines that may wait for the outlet: some seconds of the worst burst, at most a few MiB.
const QUEUE: usize = 1024;

/// How long the end of the process waits for lines that are not written yet.
const FLUSH_TIMEOUT: Duration = Duration::from_secs(2);

/// Target of messages that are not written to standard error, because it gets them in another form.
pub const PANIC: &str = "cordisk::panic";

/// Destination of lines besides standard error.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum LogPlace {
    /// No other destination.
    Nowhere,
    /// A file, which is opened by [`open_file`].
    File(PathBuf, Owners),
    /// The journal, or syslog if there is no journal.
    System,
}

/// Settings of the log of a process.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Level for standard error, unless `RUST_LOG` sets another one; `None` for no lines at all.
    pub console: Option<LevelFilter>,
    /// The outlet besides standard error, which gets `info` and above.
    pub place: LogPlace,
    /// Prefix of each line of the outlet, which identifies the disk.
    pub subject: String,
    /// Additional fields of each line in the journal.
    pub fields: Vec<(&'static str, String)>,
}

impl Settings {
    /// Returns the settings for standard error alone.
    pub fn console(level: LevelFilter) -> Settings {
        Settings {
            console: Some(level),
            place: LogPlace::Nowhere,
            subject: String::new(),
            fields: Vec::new(),
        }
    }
}

/// The log of this process; clones share one state.
#[derive(Clone)]
pub struct Log {
    shared: Arc<LogShared>,
}

impl std::fmt::Debug for Log {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Log").field("place", &self.place()).finish_non_exhaustive()
    }
}

struct LogShared {
    console: Option<env_logger::Logger>,
    /// Lines still go to standard error, which [`Log::leave_console`] ends.
    console_open: AtomicBool,
    /// Selects the lines for the outlet.
    filter: env_logger::Logger,
    outlet: Option<Outlet>,
    last: Mutex<Option<Warning>>,
}

/// Starts the log of this process. A missing journal and syslog is not an error; [`Log::place`] is
/// `None` then.
///
/// # Errors
/// Those of [`open_file`].
pub fn start(settings: Settings) -> Result<Log> {
    let Settings { console, place, subject, fields } = settings;
    let sink = match place {
        LogPlace::Nowhere => None,
        LogPlace::File(path, owners) => {
            let file = open_file(&path, &owners).context(|| format!("--log {}", path.display()))?;
            Some((path.display().to_string(), Sink::File(file.into())))
        }
        LogPlace::System => {
            SystemLog::connect(&fields).map(|log| (log.name().to_owned(), Sink::System(log)))
        }
    };
    let log = Log::new(console, sink.map(|(name, sink)| Outlet::new(name, subject, sink)));
    let most = |filter: &env_logger::Logger| filter.filter();
    let shared = &log.shared;
    let level = shared.console.as_ref().map_or(LevelFilter::Off, most).max(most(&shared.filter));
    if log::set_boxed_logger(Box::new(log.clone())).is_ok() {
        // `status` shows the last warning, so warnings are needed even if none is written.
        log::set_max_level(if shared.outlet.is_some() {
            level.max(LevelFilter::Warn)
        } else {
            level
        });
    }
    Ok(log)
}

impl Log {
    fn new(console: Option<LevelFilter>, outlet: Option<Outlet>) -> Log {
        let quiet = if outlet.is_some() { LevelFilter::Info } else { LevelFilter::Off };
        let filter = builder(quiet).build();
        let console = console.map(|level| builder(level).build());
        let console_open = AtomicBool::new(console.is_some());
        Log {
            shared: Arc::new(LogShared {
                console,
                console_open,
                filter,
                outlet,
                last: Mutex::default(),
            }),
        }
    }

    /// Returns the destination: `journal`, `syslog` or a file; `None` for standard error only.
    pub fn place(&self) -> Option<&str> {
        self.shared.outlet.as_ref().map(|outlet| outlet.name.as_str())
    }

    /// Returns the last warning or error that was logged, except those about requests of the guest.
    pub fn last_warning(&self) -> Option<Warning> {
        self.shared.last.lock().clone()
    }

    /// Returns the facts that the control socket reports of this log.
    pub fn facts(&self) -> LogFacts {
        let log = self.clone();
        LogFacts {
            place: self.place().map(str::to_owned),
            last_warning: Arc::new(move || log.last_warning()),
        }
    }

    /// Stops writing to standard error. A background daemon calls it once its standard error is
    /// /dev/null.
    pub fn leave_console(&self) {
        self.shared.console_open.store(false, Ordering::Relaxed);
    }

    /// Starts the thread that writes to the outlet from now on. Before that, each caller writes its
    /// own lines. `connect` connects to the log daemon of the system again after the daemon was
    /// restarted. The thread calls it without holding a lock of this module, and `connect` may log.
    pub fn start_thread(&self, connect: impl Fn(Daemon) -> Result<UnixDatagram> + Send + 'static) {
        let Some(outlet) = &self.shared.outlet else { return };
        let (sender, receiver) = bounded(QUEUE);
        let log = self.clone();
        let body = move || {
            if let Some(outlet) = &log.shared.outlet {
                outlet.run(&receiver, &connect);
            }
        };
        if std::thread::Builder::new().name("log".to_string()).spawn(body).is_ok() {
            *outlet.queue.lock() = Some(sender);
        }
    }

    /// Writes the error with which the process ends to the outlet only, because standard error gets
    /// it in another form.
    pub fn last_words(&self, message: &str) {
        if let Some(outlet) = &self.shared.outlet {
            outlet.put(LogLine::new(Level::Error, "cordisk", message));
        }
    }

    /// Whether the outlet is a file, which a log rotation may replace.
    pub fn has_file(&self) -> bool {
        self.shared
            .outlet
            .as_ref()
            .is_some_and(|outlet| matches!(*outlet.sink.lock(), Sink::File(_)))
    }

    /// Replaces the file, which was opened again after a rotation.
    pub fn replace_file(&self, file: std::fs::File) {
        if let Some(outlet) = &self.shared.outlet {
            *outlet.sink.lock() = Sink::File(file.into());
        }
    }

    /// Waits until all lines are written. Waits at most `FLUSH_TIMEOUT` for a place in the queue,
    /// and as long again for the thread.
    pub fn flush(&self) {
        let Some(outlet) = &self.shared.outlet else { return };
        let queue = outlet.queue.lock().clone();
        let Some(queue) = queue else { return };
        let (sender, written) = bounded(1);
        if queue.send_timeout(Message::Flush(sender), FLUSH_TIMEOUT).is_ok() {
            let _ = written.recv_timeout(FLUSH_TIMEOUT);
        }
    }
}

/// Builds a filter of the given level, which `RUST_LOG` overrides. fuser is silent by default: it
/// logs an error when a client was killed while it waited, and an error that ends a session is
/// returned to this program as well. A message always stays one line, whatever text of an image or
/// a client it contains.
fn builder(level: LevelFilter) -> env_logger::Builder {
    let mut builder = env_logger::Builder::new();
    builder.filter_level(level).filter_module("fuser", LevelFilter::Off).parse_default_env();
    builder.format(|out, record| {
        let (level, style) = (record.level(), out.default_level_style(record.level()));
        let text = one_line(&record.args().to_string());
        writeln!(out, "[{} {style}{level:<5}{style:#} {}] {text}", out.timestamp(), record.target())
    });
    builder
}

impl log::Log for Log {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        let shared = &self.shared;
        metadata.level() <= Level::Warn
            || shared.console.as_ref().is_some_and(|console| console.enabled(metadata))
            || shared.filter.enabled(metadata)
    }

    fn log(&self, record: &Record<'_>) {
        let shared = &self.shared;
        if record.level() <= Level::Warn
            && record.target() != export::GUEST
            && record.target().starts_with("cordisk")
        {
            let message = one_line(&record.args().to_string());
            *shared.last.lock() =
                Some(Warning { level: record.level(), time: SystemTime::now(), message });
        }
        if let Some(console) =
            shared.console.as_ref().filter(|_| shared.console_open.load(Ordering::Relaxed))
            && record.target() != PANIC
        {
            console.log(record);
        }
        if let Some(outlet) = shared.outlet.as_ref().filter(|_| shared.filter.matches(record)) {
            outlet.put(LogLine::new(record.level(), record.target(), &record.args().to_string()));
        }
    }

    fn flush(&self) {
        Log::flush(self);
    }
}

/// A line for the outlet.
#[derive(Clone, Debug)]
struct LogLine {
    level: Level,
    time: SystemTime,
    target: String,
    text: String,
}

impl LogLine {
    fn new(level: Level, target: &str, text: &str) -> LogLine {
        LogLine { level, time: SystemTime::now(), target: target.to_owned(), text: one_line(text) }
    }
}

enum Message {
    LogLine(LogLine),
    /// The thread answers when all earlier lines are written.
    Flush(Sender<()>),
}

/// A file, or the log of the system.
enum Sink {
    File(LogFile),
    System(SystemLog),
}

impl Sink {
    /// Writes a line. The caller counts an error and goes on, because a full file system must not
    /// delay the guest.
    fn write(&mut self, subject: &str, line: &LogLine) -> std::io::Result<()> {
        match self {
            Sink::File(file) => file.append(&file::format(subject, line)),
            Sink::System(log) => log.send(subject, line),
        }
    }
}

/// Destination of lines besides standard error.
struct Outlet {
    /// Name of the destination, for users.
    name: String,
    subject: String,
    sink: Mutex<Sink>,
    /// Channel to the thread that writes, once it was started. The lock is held across a send that
    /// does not wait.
    queue: Mutex<Option<Sender<Message>>>,
    /// Number of lines that were lost since the last written line.
    lost: AtomicU64,
}

impl Outlet {
    fn new(name: String, subject: String, sink: Sink) -> Outlet {
        Outlet {
            name,
            subject,
            sink: Mutex::new(sink),
            queue: Mutex::default(),
            lost: AtomicU64::new(0),
        }
    }

    fn put(&self, line: LogLine) {
        let queue = self.queue.lock();
        let Some(sender) = queue.as_ref() else {
            drop(queue);
            return self.write(&line);
        };
        if let Err(TrySendError::Full(_) | TrySendError::Disconnected(_)) =
            sender.try_send(Message::LogLine(line))
        {
            self.lost.fetch_add(1, Ordering::Relaxed);
        }
    }

    fn run(&self, messages: &Receiver<Message>, connect: &dyn Fn(Daemon) -> Result<UnixDatagram>) {
        for message in messages {
            match message {
                Message::LogLine(line) => match self.try_write(&line) {
                    Err(error) if is_disconnected(&error) && self.connect_anew(connect) => {
                        self.write(&line)
                    }
                    written => self.count(&written),
                },
                Message::Flush(written) => drop(written.send(())),
            }
        }
    }

    fn write(&self, line: &LogLine) {
        self.count(&self.try_write(line));
    }

    fn count(&self, written: &std::io::Result<()>) {
        if written.is_err() {
            self.lost.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Writes the line; if lines were lost before it, writes their number first.
    fn try_write(&self, line: &LogLine) -> std::io::Result<()> {
        let mut sink = self.sink.lock();
        let lost = self.lost.swap(0, Ordering::Relaxed);
        if lost > 0 {
            let note =
                LogLine::new(Level::Warn, "cordisk", &format!("{lost} lines of the log were lost"));
            if let Err(error) = sink.write(&self.subject, &note) {
                self.lost.fetch_add(lost, Ordering::Relaxed);
                return Err(error);
            }
        }
        sink.write(&self.subject, line)
    }

    /// Connects to the log daemon again. Returns whether that succeeded.
    fn connect_anew(&self, connect: &dyn Fn(Daemon) -> Result<UnixDatagram>) -> bool {
        let daemon = match &*self.sink.lock() {
            Sink::System(log) => log.daemon(),
            Sink::File(_) => return false,
        };
        // Without the lock of the sink: the keeper may be slow, and logs its work.
        let Ok(socket) = connect(daemon) else { return false };
        if let Sink::System(log) = &mut *self.sink.lock() {
            log.replace_socket(socket);
        }
        true
    }
}
