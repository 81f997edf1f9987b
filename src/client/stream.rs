//! `cordisk stream`: starts a stream, and shows it until it is complete.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use serde_json::{Value, json};
use signal_hook::consts::{SIGINT, SIGTERM};

use super::connection::{Connection, Heard};
use super::facts::{self, Job};
use super::limit::Limit;
use super::progress::Progress;
use super::{find, show};
use crate::error::{Context, one_line};
use crate::map::units;
use crate::{Error, ErrorKind, Result};

/// The exit status of a program that was interrupted.
const INTERRUPTED: u8 = 130;
/// How often the daemon is to tell how far it is, in milliseconds.
const INTERVAL: u64 = 250;
/// The same for lines of JSON, which nobody takes back.
const INTERVAL_OF_JSON: u64 = 1000;
/// How long one look at the socket takes at most, so that a signal is seen soon.
const LOOK: Duration = Duration::from_millis(100);

/// What `cordisk stream` is asked for.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct StreamOptions {
    /// The disk: its mountpoint or its socket.
    pub target: PathBuf,
    /// How fast it may be, where that was asked for.
    pub limit: Option<Limit>,
    /// The file of the chain that stays below; all of it is copied up without.
    pub base: Option<String>,
    /// What an error does, in QMP's words, where that was asked for.
    pub on_error: Option<String>,
    /// Stay until it is complete.
    pub wait: bool,
    /// An interrupt cancels the job instead of leaving it alone.
    pub cancel_on_interrupt: bool,
    /// For programs.
    pub json: bool,
}

impl StreamOptions {
    /// Asks for nothing but to see how it goes.
    fn only_waits(&self) -> bool {
        self.wait && self.limit.is_none() && self.base.is_none() && self.on_error.is_none()
    }
}

/// Runs the command.
///
/// # Errors
/// There is no such disk; the stream cannot be started, fails, is cancelled, or its daemon ends.
pub fn run(options: &StreamOptions) -> Result<ExitCode> {
    let (mut connection, disk) = find::connect(&options.target)?;
    let name = one_line(&disk.name);
    // Before anything starts: an interrupt from now on is for us to answer.
    let interrupt = options.wait.then(Interrupt::watch).transpose()?;
    if options.wait {
        // Before the job is looked for, so that its end is not missed. An older daemon does not tell how far it is, but when it is there.
        let interval = if options.json { INTERVAL_OF_JSON } else { INTERVAL };
        let _ = connection.ask("x-job-progress-events", json!({ "enable": true, "interval-ms": interval }))?;
    }
    let id = match facts::job(&mut connection)? {
        Some(job) if job.is_concluded() => {
            let text = format!("{name}: the job {} has ended and waits for a client to dismiss it (QMP: block-job-dismiss)", job.id);
            return Err(Error::new(ErrorKind::Busy, text));
        }
        Some(job) if options.only_waits() => job.id,
        Some(job) => return Err(busy(&name, &options.target, Some(&job))),
        None => start(&mut connection, options, &name)?,
    };
    match interrupt {
        Some(interrupt) => {
            let progress = if options.json { Progress::silent() } else { Progress::new(&disk.name) };
            Waiting { connection, name, id, target: &options.target, interrupt, progress, json: options.json, shutdown: false }.run(options)
        }
        None => {
            if options.json {
                return print_started(&mut connection, &id);
            }
            let target = show::quoted(&options.target);
            say(&format!("streaming {name}; `cordisk stream {target} --wait` shows how far it is, `cordisk job cancel {target}` ends it"))?;
            Ok(ExitCode::SUCCESS)
        }
    }
}

/// The job that was started, as `x-query-job-progress` has it; the last job, where it has ended already.
fn print_started(connection: &mut Connection, id: &str) -> Result<ExitCode> {
    let value = match job_value(connection, id)? {
        Some(job) => job,
        None => facts::last_job_value(connection)?.unwrap_or_else(|| json!({ "id": id })),
    };
    say(&value.to_string())?;
    Ok(ExitCode::SUCCESS)
}

/// The job `id` as `x-query-job-progress` has it, while it is there.
fn job_value(connection: &mut Connection, id: &str) -> Result<Option<Value>> {
    let jobs = connection.ask("x-query-job-progress", json!({}))?.unwrap_or_default();
    Ok(jobs.as_array().and_then(|jobs| jobs.iter().find(|job| job["id"] == id)).cloned())
}

fn busy(name: &str, target: &Path, job: Option<&Job>) -> Error {
    let target = show::quoted(target);
    let at = job.map_or(String::new(), |job| format!(" ({})", units::percent(job.offset, job.len)));
    let text = format!(
        "{name} is already being streamed{at}; `cordisk stream {target} --wait` waits for it, `cordisk job speed {target} RATE` changes its speed"
    );
    Error::new(ErrorKind::Busy, text)
}

/// Starts the job and returns its id.
fn start(connection: &mut Connection, options: &StreamOptions, name: &str) -> Result<String> {
    let device = facts::device(connection)?;
    let mut arguments = json!({ "device": device });
    if let Some(limit) = &options.limit {
        arguments["speed"] = limit.at_first().into();
    }
    if let Some(base) = &options.base {
        arguments["base"] = base.as_str().into();
    }
    if let Some(action) = &options.on_error {
        arguments["on-error"] = action.as_str().into();
    }
    match connection.ask("block-stream", arguments)? {
        Ok(_) => {
            if let Some(limit) = options.limit.as_ref().filter(|limit| limit.is_plan()) {
                plan(connection, limit, &device, name)?;
            }
            Ok(device)
        }
        Err(refusal) if refusal.class == "DeviceInUse" || refusal.description.contains("in use") => Err(busy(name, &options.target, None)),
        Err(refusal) => {
            let hint = match (&options.base, refusal.description.contains("read-only")) {
                (_, true) => "; it was mounted read-only",
                (Some(_), _) => "; `cordisk status` with the mountpoint shows the chain, of which --base names a file",
                _ => "",
            };
            Err(Error::new(ErrorKind::InvalidArgument, format!("{name}: {}{hint}", refusal.description)))
        }
    }
}

/// Gives the job that has just begun its plan, or takes it back.
fn plan(connection: &mut Connection, limit: &Limit, id: &str, name: &str) -> Result<()> {
    let Err(refusal) = limit.set(connection, id)? else { return Ok(()) };
    // One that had next to nothing to do is complete already.
    if facts::job(connection)?.is_none_or(|job| job.id != id) {
        return Ok(());
    }
    let _ = connection.ask("block-job-cancel", json!({ "device": id }))?;
    Err(Error::new(ErrorKind::InvalidArgument, format!("{name}: {}", refusal.description)))
}

/// Whether somebody wants us to end. The second time it is not asked: the process ends.
struct Interrupt(Arc<AtomicBool>);

impl Interrupt {
    fn watch() -> Result<Interrupt> {
        let flag = Arc::new(AtomicBool::new(false));
        for signal in [SIGINT, SIGTERM] {
            // In this order: while the flag is not set the first does nothing.
            signal_hook::flag::register_conditional_shutdown(signal, i32::from(INTERRUPTED), Arc::clone(&flag))
                .and_then(|_| signal_hook::flag::register(signal, Arc::clone(&flag)))
                .context(|| "signal handlers")?;
        }
        Ok(Interrupt(flag))
    }

    fn has_come(&self) -> bool {
        self.0.load(Ordering::Acquire)
    }
}

/// Why nobody waits any more.
enum Ended {
    Completed,
    /// By somebody else.
    Cancelled,
    CancelledByUs,
    Failed(String),
    /// An interrupt; the job goes on.
    Left,
}

/// Somebody waits for a job.
struct Waiting<'a> {
    connection: Connection,
    name: String,
    id: String,
    target: &'a Path,
    interrupt: Interrupt,
    progress: Progress,
    /// The end is one JSON object as well.
    json: bool,
    /// The daemon has said that it ends.
    shutdown: bool,
}

impl Waiting<'_> {
    fn run(mut self, options: &StreamOptions) -> Result<ExitCode> {
        let waited = self.wait(options);
        self.progress.clear();
        if self.json && matches!(waited, Ok(Ended::Completed | Ended::Cancelled | Ended::CancelledByUs | Ended::Failed(_))) {
            // The last line is the result: `"result": "success"`, `"cancelled"` or `"error"`.
            if let Some(last) = facts::last_job_value(&mut self.connection).ok().flatten().filter(|last| last["id"] == self.id.as_str()) {
                say(&last.to_string())?;
            }
        }
        match waited {
            Ok(ended) => self.report(ended),
            Err(_) if self.connection.has_ended() => Err(self.daemon_gone()),
            Err(error) => Err(error),
        }
    }

    fn wait(&mut self, options: &StreamOptions) -> Result<Ended> {
        self.look_again()?;
        let mut cancelling = false;
        loop {
            if self.interrupt.has_come() && !cancelling {
                if !options.cancel_on_interrupt {
                    return Ok(Ended::Left);
                }
                cancelling = true;
                self.progress.note(Some("cancelling".to_owned()));
                // It may have come to its end this very moment, which is heard next.
                let _ = self.connection.ask("block-job-cancel", json!({ "device": self.id }))?;
            }
            match self.connection.next_event(LOOK)? {
                Heard::Nothing => {}
                Heard::End => return Err(self.daemon_gone()),
                Heard::Event(event) => {
                    self.shutdown |= event["event"] == "SHUTDOWN";
                    match self.take_in(&event)? {
                        Some(Ended::Cancelled) if cancelling => return Ok(Ended::CancelledByUs),
                        Some(end) => return Ok(end),
                        None => {}
                    }
                }
            }
        }
    }

    fn report(self, ended: Ended) -> Result<ExitCode> {
        let target = show::quoted(self.target);
        match ended {
            Ended::Completed => return self.completed(),
            Ended::Left => {
                self.tell(&format!("goes on; `cordisk stream {target} --wait` shows it again, `cordisk job cancel {target}` ends it"))
            }
            Ended::CancelledByUs => self.tell("cancelled; what was copied stays in the image"),
            Ended::Cancelled if self.shutdown => return Err(self.daemon_gone()),
            Ended::Cancelled => {
                let text = format!("stream of {} was cancelled; what was copied stays in the image", self.name);
                return Err(Error::new(ErrorKind::Io, text));
            }
            Ended::Failed(why) => return Err(self.failed(&why)),
        }
        Ok(ExitCode::from(INTERRUPTED))
    }

    /// Shows what an event tells, and says whether it is the end.
    fn take_in(&mut self, event: &Value) -> Result<Option<Ended>> {
        let data = &event["data"];
        if data["id"] != self.id.as_str() && data["device"] != self.id.as_str() {
            return Ok(None);
        }
        match event["event"].as_str().unwrap_or_default() {
            "X_JOB_PROGRESS" if self.json => say(&data.to_string())?,
            "X_JOB_PROGRESS" => self.progress.update(&facts::as_job(data)),
            "JOB_STATUS_CHANGE" if matches!(data["status"].as_str(), Some("paused" | "standby" | "running")) => self.look_again()?,
            "BLOCK_JOB_CANCELLED" => return Ok(Some(Ended::Cancelled)),
            "BLOCK_JOB_COMPLETED" => {
                return Ok(Some(match data["error"].as_str() {
                    Some(why) => Ended::Failed(why.to_owned()),
                    None => Ended::Completed,
                }));
            }
            _ => {}
        }
        Ok(None)
    }

    /// Asks how the job is, and shows that.
    fn look_again(&mut self) -> Result<()> {
        if self.json {
            let Some(job) = job_value(&mut self.connection, &self.id)? else { return Ok(()) };
            return say(&job.to_string());
        }
        let Some(job) = facts::job(&mut self.connection)?.filter(|job| job.id == self.id) else { return Ok(()) };
        self.progress.note(job.is_paused().then(|| job.why_paused(&show::quoted(self.target))));
        self.progress.update(&job);
        Ok(())
    }

    fn completed(mut self) -> Result<ExitCode> {
        if self.json {
            return Ok(ExitCode::SUCCESS);
        }
        // A job may have followed this one already; then only the fact is known.
        let last = facts::last_job(&mut self.connection).ok().flatten().filter(|last| last.id == self.id && last.result == "success");
        let details = match last {
            Some(last) if last.len == 0 => ": there was nothing to copy".to_owned(),
            Some(last) => {
                let copied =
                    if last.bytes_copied == last.len { String::new() } else { format!(", {} copied", units::size(last.bytes_copied)) };
                format!(": {} in {}{copied}", units::size(last.len), units::duration(last.took()))
            }
            None => String::new(),
        };
        say(&format!("stream of {} completed{details}", self.name))?;
        Ok(ExitCode::SUCCESS)
    }

    /// In the words of the event, or with file and offset where the daemon still knows them.
    fn failed(mut self, why: &str) -> Error {
        // A job may have followed this one already.
        let last = facts::last_job(&mut self.connection).ok().flatten().filter(|last| last.id == self.id && last.result == "error");
        let why = last.as_ref().map_or(why, |last| last.why());
        Error::new(ErrorKind::Io, format!("stream of {} failed: {why}", self.name))
    }

    fn daemon_gone(&self) -> Error {
        let why = if self.shutdown { "the disk was unmounted" } else { "the daemon has died" };
        let text = format!(
            "stream of {}: {why} before it was complete; what was copied stays, mount it again and it goes on from there",
            self.name
        );
        Error::new(ErrorKind::Io, text)
    }

    fn tell(&self, text: &str) {
        let _ = writeln!(std::io::stderr(), "stream of {} {text}", self.name);
    }
}

/// One line for people and scripts alike.
pub(super) fn say(text: &str) -> Result<()> {
    writeln!(std::io::stdout(), "{text}").context(|| "standard output")
}
