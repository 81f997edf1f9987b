//! The log of a process: which lines are written, where they go, and the last warning among them.
//!
//! ```text
//! any thread: log::warn!() ─► filter ─► last warning ─┬─► standard error (in the background only
//!                                                     │   until the disk is there)
//!                                                     └─► queue ─► thread "log" ─► file, journal
//!                                                                                  or syslog
//! ```
//!
//! The file or socket is opened before the sandbox is entered. A request's thread never waits for
//! it: a stopped syslog daemon or a hung file system delays the thread "log" alone, and lines that
//! the queue has no room for are counted and dropped.
//!
//! **Touches:** standard error, one file or one datagram socket. **Never:** opens anything of its
//! own accord once [`Log::start_thread`] was called; waits for the outlet on another thread, but
//! for [`Log::flush`], which gives up after `FLUSH_TIMEOUT`.
//! **Locks:** leaves: that of the outlet is held across one write, that of the last warning is not
//! held across anything.

use std::io::Write;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, SystemTime};

use crossbeam_channel::{Receiver, Sender, TrySendError, bounded};
use log::{Level, LevelFilter, Metadata, Record};
use parking_lot::Mutex;

use crate::Result;
use crate::error::{Context, one_line};

mod file;
mod system;
#[cfg(test)]
mod tests;

pub use file::{Owners, open as open_file};
use system::SystemLog;

/// Lines that may wait for the outlet: some seconds of the worst burst, at most a few MiB.
const QUEUE: usize = 1024;

/// How long the end of the process waits for lines that are not written yet.
const FLUSH_TIMEOUT: Duration = Duration::from_secs(2);

/// The target of messages about requests of the guest: the disk keeps the last of them itself, so
/// they are not the last warning.
pub const GUEST: &str = "cordisk::guest";

/// The target of messages that standard error gets in other words.
pub const PANIC: &str = "cordisk::panic";

/// Where lines go beside standard error.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Place {
    /// Nowhere.
    Nowhere,
    /// This file, which is opened by [`open_file`].
    File(PathBuf, Owners),
    /// The journal; syslog where there is no journal.
    System,
}

/// What a process logs, and where.
#[derive(Clone, Debug)]
pub struct Settings {
    /// What goes to standard error unless `RUST_LOG` says otherwise; `None` for nothing.
    pub console: Option<LevelFilter>,
    /// The outlet beside it, which gets `info` and above.
    pub place: Place,
    /// What each line of the outlet begins with: which disk it is about.
    pub subject: String,
    /// Fields of each line in the journal.
    pub fields: Vec<(&'static str, String)>,
}

impl Settings {
    /// Standard error alone.
    pub fn console(level: LevelFilter) -> Settings {
        Settings { console: Some(level), place: Place::Nowhere, subject: String::new(), fields: Vec::new() }
    }
}

/// A message of level `warn` or `error`.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Warning {
    /// `warn` or `error`.
    pub level: Level,
    /// When it was logged.
    pub time: SystemTime,
    /// One line.
    pub message: String,
}

/// The log of this process; clones are the same.
#[derive(Clone)]
pub struct Log {
    shared: Arc<Shared>,
}

impl std::fmt::Debug for Log {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Log").field("place", &self.place()).finish_non_exhaustive()
    }
}

struct Shared {
    console: Option<env_logger::Logger>,
    /// Standard error leads somewhere.
    console_open: AtomicBool,
    /// What goes to the outlet.
    filter: env_logger::Logger,
    outlet: Option<Outlet>,
    last: Mutex<Option<Warning>>,
}

/// Starts the log of this process. A journal and a syslog that are missing are no error:
/// [`Log::place`] is `None` then.
///
/// # Errors
/// Those of [`open_file`].
pub fn start(settings: Settings) -> Result<Log> {
    let Settings { console, place, subject, fields } = settings;
    let sink = match place {
        Place::Nowhere => None,
        Place::File(path, owners) => {
            let file = open_file(&path, &owners).context(|| format!("--log {}", path.display()))?;
            Some((path.display().to_string(), Sink::File(file)))
        }
        Place::System => SystemLog::connect(&fields).map(|log| (log.name().to_owned(), Sink::System(log))),
    };
    let log = Log::new(console, sink.map(|(name, sink)| Outlet::new(name, subject, sink)));
    let most = |filter: &env_logger::Logger| filter.filter();
    let shared = &log.shared;
    let level = shared.console.as_ref().map_or(LevelFilter::Off, most).max(most(&shared.filter));
    if log::set_boxed_logger(Box::new(log.clone())).is_ok() {
        // Warnings are kept for `status` whatever is written.
        log::set_max_level(if shared.outlet.is_some() { level.max(LevelFilter::Warn) } else { level });
    }
    Ok(log)
}

impl Log {
    fn new(console: Option<LevelFilter>, outlet: Option<Outlet>) -> Log {
        let quiet = if outlet.is_some() { LevelFilter::Info } else { LevelFilter::Off };
        let filter = builder(quiet).build();
        let console = console.map(|level| builder(level).build());
        let console_open = AtomicBool::new(console.is_some());
        Log { shared: Arc::new(Shared { console, console_open, filter, outlet, last: Mutex::default() }) }
    }

    /// Where lines go: `journal`, `syslog` or a file; `None` where there is standard error only.
    pub fn place(&self) -> Option<&str> {
        self.shared.outlet.as_ref().map(|outlet| outlet.name.as_str())
    }

    /// The warning or error that was logged last, those about requests of the guest left aside.
    pub fn last_warning(&self) -> Option<Warning> {
        self.shared.last.lock().clone()
    }

    /// From now on nothing is written to standard error, which leads nowhere.
    pub fn leave_console(&self) {
        self.shared.console_open.store(false, Ordering::Relaxed);
    }

    /// From now on a thread of its own writes to the outlet. Without that thread, each caller
    /// writes its own lines.
    pub fn start_thread(&self) {
        let Some(outlet) = &self.shared.outlet else { return };
        let (sender, receiver) = bounded(QUEUE);
        let log = self.clone();
        let body = move || {
            if let Some(outlet) = &log.shared.outlet {
                outlet.run(&receiver);
            }
        };
        if std::thread::Builder::new().name("log".to_string()).spawn(body).is_ok() {
            *outlet.queue.lock() = Some(sender);
        }
    }

    /// Writes the error with which the process ends to the outlet alone: standard error gets it in
    /// other words.
    pub fn last_words(&self, message: &str) {
        if let Some(outlet) = &self.shared.outlet {
            outlet.put(Line::new(Level::Error, "cordisk", message));
        }
    }

    /// Whether lines go to a file, which a rotation may replace.
    pub fn has_file(&self) -> bool {
        self.shared.outlet.as_ref().is_some_and(|outlet| matches!(*outlet.sink.lock(), Sink::File(_)))
    }

    /// The file was opened anew, after it was rotated.
    pub fn replace_file(&self, file: std::fs::File) {
        if let Some(outlet) = &self.shared.outlet {
            *outlet.sink.lock() = Sink::File(file);
        }
    }

    /// Waits until all lines are written, for `FLUSH_TIMEOUT` at most.
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

/// `RUST_LOG` overrides `level`. fuser is silent by default: it calls it an error when a client was
/// killed while it waited, and what ends a session it returns to us as well. Whatever an image or a
/// client has put into a message, a line stays one line (data-safety 6.7).
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
        if record.level() <= Level::Warn && record.target() != GUEST && record.target().starts_with("cordisk") {
            let message = one_line(&record.args().to_string());
            *shared.last.lock() = Some(Warning { level: record.level(), time: SystemTime::now(), message });
        }
        if let Some(console) = shared.console.as_ref().filter(|_| shared.console_open.load(Ordering::Relaxed))
            && record.target() != PANIC
        {
            console.log(record);
        }
        if let Some(outlet) = shared.outlet.as_ref().filter(|_| shared.filter.matches(record)) {
            outlet.put(Line::new(record.level(), record.target(), &record.args().to_string()));
        }
    }

    fn flush(&self) {
        Log::flush(self);
    }
}

/// What is written to an outlet.
#[derive(Clone, Debug)]
struct Line {
    level: Level,
    time: SystemTime,
    target: String,
    text: String,
}

impl Line {
    fn new(level: Level, target: &str, text: &str) -> Line {
        Line { level, time: SystemTime::now(), target: target.to_owned(), text: one_line(text) }
    }
}

enum Message {
    Line(Line),
    /// All that came before is written when something is sent here.
    Flush(Sender<()>),
}

/// A file, or the log of the system.
enum Sink {
    File(std::fs::File),
    System(SystemLog),
}

impl Sink {
    /// The caller counts an error and goes on: a full file system must not cost the guest anything.
    fn write(&mut self, subject: &str, line: &Line) -> std::io::Result<()> {
        match self {
            Sink::File(file) => file.write_all(file::format(subject, line).as_bytes()),
            Sink::System(log) => log.send(subject, line),
        }
    }
}

/// Where lines go beside standard error.
struct Outlet {
    /// For users.
    name: String,
    subject: String,
    sink: Mutex<Sink>,
    /// To the thread that writes, once there is one. Held for a send that does not wait.
    queue: Mutex<Option<Sender<Message>>>,
    /// Lines that were not written since the last one that was.
    lost: AtomicU64,
}

impl Outlet {
    fn new(name: String, subject: String, sink: Sink) -> Outlet {
        Outlet { name, subject, sink: Mutex::new(sink), queue: Mutex::default(), lost: AtomicU64::new(0) }
    }

    fn put(&self, line: Line) {
        let queue = self.queue.lock();
        let Some(sender) = queue.as_ref() else {
            drop(queue);
            return self.write(&line);
        };
        if let Err(TrySendError::Full(_) | TrySendError::Disconnected(_)) = sender.try_send(Message::Line(line)) {
            self.lost.fetch_add(1, Ordering::Relaxed);
        }
    }

    fn run(&self, messages: &Receiver<Message>) {
        for message in messages {
            match message {
                Message::Line(line) => self.write(&line),
                Message::Flush(written) => drop(written.send(())),
            }
        }
    }

    fn write(&self, line: &Line) {
        let mut sink = self.sink.lock();
        let lost = self.lost.swap(0, Ordering::Relaxed);
        let written = match lost {
            0 => sink.write(&self.subject, line),
            count => {
                let note = Line::new(Level::Warn, "cordisk", &format!("{count} lines of the log were lost"));
                sink.write(&self.subject, &note).and_then(|()| sink.write(&self.subject, line))
            }
        };
        if written.is_err() {
            self.lost.fetch_add(lost + 1, Ordering::Relaxed);
        }
    }
}
