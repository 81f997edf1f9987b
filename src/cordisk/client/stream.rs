//! `cordisk stream`: starts a stream, and shows its progress until it is complete.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use serde_json::{Value, json};
use signal_hook::consts::{SIGINT, SIGTERM};

use super::facts;
use super::limit::Limit;
use super::progress::ProgressDisplay;
use super::{find, show};
use crate::map::units;
use control::connection::{Connection, Heard};
use control::facts::JobProgress;
use host::error::{Context, one_line};
use host::{Error, ErrorKind, Result};

/// The exit status after an interrupt, as shells report SIGINT.
const INTERRUPTED: u8 = 130;
/// Interval of the daemon's progress events, in milliseconds.
const INTERVAL: u64 = 250;
/// The same for lines of JSON, in milliseconds. They are fewer because printed lines cannot be
/// overwritten.
const INTERVAL_OF_JSON: u64 = 1000;
/// Longest wait for an event, so that a signal is noticed soon.
const LOOK: Duration = Duration::from_millis(100);

/// The options of `cordisk stream`.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct StreamArguments {
    /// The disk: its mountpoint or its socket.
    pub target: PathBuf,
    /// The speed limit, if requested.
    pub limit: Option<Limit>,
    /// The file of the chain that stays as backing file; if `None`, the whole chain is copied up.
    pub base: Option<String>,
    /// The action on an error, in QMP's words, if requested.
    pub on_error: Option<String>,
    /// Wait until the stream is complete.
    pub wait: bool,
    /// An interrupt cancels the job; otherwise the job goes on.
    pub cancel_on_interrupt: bool,
    /// Print JSON for programs.
    pub json: bool,
}

impl StreamArguments {
    /// Tells whether the command only waits for a job, and gives no options for one.
    fn only_waits(&self) -> bool {
        self.wait && self.limit.is_none() && self.base.is_none() && self.on_error.is_none()
    }
}

/// Runs the command.
///
/// # Errors
/// There is no such disk; the stream cannot be started, fails, is cancelled, or its daemon ends.
pub fn run(options: &StreamArguments) -> Result<ExitCode> {
    let (mut connection, disk) = find::connect(&options.target)?;
    let name = one_line(&disk.name);
    // Installed before anything starts, so that from now on this process handles interrupts.
    let interrupt = options.wait.then(Interrupt::watch).transpose()?;
    if options.wait {
        // Enabled before the search for the job, so that its end is not missed. An older daemon
        // refuses this command and still reports the end.
        let interval = if options.json { INTERVAL_OF_JSON } else { INTERVAL };
        let _ = connection
            .ask("x-job-progress-events", json!({ "enable": true, "interval-ms": interval }))?;
    }
    let id = match facts::job(&mut connection)?.map(|job| job.progress) {
        Some(job) if job.is_concluded() => {
            let text = format!(
                "{name}: the job {} has ended and waits for a client to dismiss it (QMP: block-job-dismiss)",
                job.id
            );
            return Err(Error::new(ErrorKind::Busy, text));
        }
        Some(job) if options.only_waits() => job.id,
        Some(job) => return Err(busy(&name, &options.target, &job)),
        None => start(&mut connection, options, &name)?,
    };
    match interrupt {
        Some(interrupt) => {
            let progress = if options.json {
                ProgressDisplay::silent()
            } else {
                ProgressDisplay::new(&disk.name)
            };
            StreamWait {
                connection,
                name,
                id,
                target: &options.target,
                interrupt,
                progress,
                json: options.json,
                shutdown: false,
            }
            .run(options)
        }
        None => {
            if options.json {
                return print_started(&mut connection, &id);
            }
            let target = show::quoted(&options.target);
            say(&format!(
                "streaming {name}; `cordisk stream {target} --wait` shows how far it is, `cordisk job cancel {target}` ends it"
            ))?;
            Ok(ExitCode::SUCCESS)
        }
    }
}

/// Prints the started job from `x-query-job-progress`, or the last job if it has ended already.
fn print_started(connection: &mut Connection, id: &str) -> Result<ExitCode> {
    let value = match facts::progress_of(connection, id)? {
        Some(job) => job,
        None => facts::last_job_value(connection)?.unwrap_or_else(|| json!({ "id": id })),
    };
    say(&value.to_string())?;
    Ok(ExitCode::SUCCESS)
}

fn busy(name: &str, target: &Path, job: &JobProgress) -> Error {
    let target = show::quoted(target);
    let at = units::percent(job.offset, job.len);
    let text = format!(
        "{name} is already being streamed ({at}); `cordisk stream {target} --wait` waits for it, `cordisk job speed {target} RATE` changes its speed"
    );
    Error::new(ErrorKind::Busy, text)
}

/// Starts the job and returns its id.
fn start(connection: &mut Connection, options: &StreamArguments, name: &str) -> Result<String> {
    let facts::Block { device, read_only, .. } = facts::block(connection)?;
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
        // All refusals have the same class, and their texts are for users. So the state of the job
        // is queried to find the reason.
        Err(refusal) => {
            if let Some(job) = facts::job(connection)? {
                return Err(busy(name, &options.target, &job.progress));
            }
            let hint = match (&options.base, read_only) {
                (_, true) => "; it was mounted read-only",
                (Some(_), _) => {
                    "; `cordisk status` with the mountpoint shows the chain, of which --base names a file"
                }
                _ => "",
            };
            Err(Error::new(
                ErrorKind::InvalidArgument,
                format!("{name}: {}{hint}", refusal.description),
            ))
        }
    }
}

/// Sets the plan of the job that has just started, or cancels the job if the plan is refused.
fn plan(connection: &mut Connection, limit: &Limit, id: &str, name: &str) -> Result<()> {
    let Err(refusal) = limit.set(connection, id)? else { return Ok(()) };
    // A job that had almost nothing to copy may be complete already.
    if facts::job(connection)?.is_none_or(|job| job.progress.id != id) {
        return Ok(());
    }
    let _ = connection.ask("block-job-cancel", json!({ "device": id }))?;
    Err(Error::new(ErrorKind::InvalidArgument, format!("{name}: {}", refusal.description)))
}

/// Whether a signal has asked this process to end. The second signal ends the process at once.
struct Interrupt(Arc<AtomicBool>);

impl Interrupt {
    fn watch() -> Result<Interrupt> {
        let flag = Arc::new(AtomicBool::new(false));
        for signal in [SIGINT, SIGTERM] {
            // The order of registration matters: the conditional shutdown does nothing until the
            // flag is set.
            signal_hook::flag::register_conditional_shutdown(
                signal,
                i32::from(INTERRUPTED),
                Arc::clone(&flag),
            )
            .and_then(|_| signal_hook::flag::register(signal, Arc::clone(&flag)))
            .context(|| "signal handlers")?;
        }
        Ok(Interrupt(flag))
    }

    fn has_come(&self) -> bool {
        self.0.load(Ordering::Acquire)
    }
}

/// Why the wait has ended.
enum WaitResult {
    Completed,
    /// Another client has cancelled the job.
    Cancelled,
    CancelledByUs,
    Failed(String),
    /// An interrupt has ended the wait; the job goes on.
    Left,
}

/// A wait for the end of a job.
struct StreamWait<'a> {
    connection: Connection,
    name: String,
    id: String,
    target: &'a Path,
    interrupt: Interrupt,
    progress: ProgressDisplay,
    /// The result is printed as one JSON object too.
    json: bool,
    /// The daemon has announced its shutdown.
    shutdown: bool,
}

impl StreamWait<'_> {
    fn run(mut self, options: &StreamArguments) -> Result<ExitCode> {
        let waited = self.wait(options);
        self.progress.clear();
        if self.json
            && matches!(
                waited,
                Ok(WaitResult::Completed
                    | WaitResult::Cancelled
                    | WaitResult::CancelledByUs
                    | WaitResult::Failed(_))
            )
        {
            // The last line is the result: `"result": "success"`, `"cancelled"` or `"error"`.
            if let Some(last) = facts::last_job_value(&mut self.connection)
                .ok()
                .flatten()
                .filter(|last| last["id"] == self.id.as_str())
            {
                say(&last.to_string())?;
            }
        }
        match waited {
            Ok(ended) => self.report(ended),
            Err(_) if self.connection.has_ended() => Err(self.daemon_gone()),
            Err(error) => Err(error),
        }
    }

    fn wait(&mut self, options: &StreamArguments) -> Result<WaitResult> {
        self.look_again()?;
        let mut cancelling = false;
        loop {
            if self.interrupt.has_come() && !cancelling {
                if !options.cancel_on_interrupt {
                    return Ok(WaitResult::Left);
                }
                cancelling = true;
                self.progress.note(Some("cancelling".to_owned()));
                // The job may end at this moment; the next event reports that.
                let _ = self.connection.ask("block-job-cancel", json!({ "device": self.id }))?;
            }
            match self.connection.next_event(LOOK)? {
                Heard::Nothing => {}
                Heard::End => return Err(self.daemon_gone()),
                Heard::Event(event) => {
                    self.shutdown |= event["event"] == "SHUTDOWN";
                    match self.take_in(&event)? {
                        Some(WaitResult::Cancelled) if cancelling => {
                            return Ok(WaitResult::CancelledByUs);
                        }
                        Some(end) => return Ok(end),
                        None => {}
                    }
                }
            }
        }
    }

    fn report(self, ended: WaitResult) -> Result<ExitCode> {
        let target = show::quoted(self.target);
        match ended {
            WaitResult::Completed => return self.completed(),
            WaitResult::Left => {
                self.tell(&format!("goes on; `cordisk stream {target} --wait` shows it again, `cordisk job cancel {target}` ends it"))
            }
            WaitResult::CancelledByUs => self.tell("cancelled; what was copied stays in the image"),
            WaitResult::Cancelled if self.shutdown => return Err(self.daemon_gone()),
            WaitResult::Cancelled => {
                let text = format!("stream of {} was cancelled; what was copied stays in the image", self.name);
                return Err(Error::new(ErrorKind::Io, text));
            }
            WaitResult::Failed(why) => return Err(self.failed(&why)),
        }
        Ok(ExitCode::from(INTERRUPTED))
    }

    /// Handles an event, and returns the result if it ends the wait.
    fn take_in(&mut self, event: &Value) -> Result<Option<WaitResult>> {
        let data = &event["data"];
        if data["id"] != self.id.as_str() && data["device"] != self.id.as_str() {
            return Ok(None);
        }
        match event["event"].as_str().unwrap_or_default() {
            "X_JOB_PROGRESS" if self.json => say(&data.to_string())?,
            "X_JOB_PROGRESS" => self.progress.update(&facts::as_progress(data)),
            "JOB_STATUS_CHANGE"
                if matches!(data["status"].as_str(), Some("paused" | "standby" | "running")) =>
            {
                self.look_again()?
            }
            "BLOCK_JOB_CANCELLED" => return Ok(Some(WaitResult::Cancelled)),
            "BLOCK_JOB_COMPLETED" => {
                return Ok(Some(match data["error"].as_str() {
                    Some(why) => WaitResult::Failed(why.to_owned()),
                    None => WaitResult::Completed,
                }));
            }
            _ => {}
        }
        Ok(None)
    }

    /// Queries the state of the job, and shows it.
    fn look_again(&mut self) -> Result<()> {
        if self.json {
            let Some(job) = facts::progress_of(&mut self.connection, &self.id)? else {
                return Ok(());
            };
            return say(&job.to_string());
        }
        let Some(job) = facts::job(&mut self.connection)?.filter(|job| job.progress.id == self.id)
        else {
            return Ok(());
        };
        self.progress
            .note(job.progress.is_paused().then(|| job.why_paused(&show::quoted(self.target))));
        self.progress.update(&job.progress);
        Ok(())
    }

    fn completed(mut self) -> Result<ExitCode> {
        if self.json {
            return Ok(ExitCode::SUCCESS);
        }
        // The next job may have started already; then the details of this one are unknown.
        let last = facts::last_job(&mut self.connection)
            .ok()
            .flatten()
            .filter(|last| last.id == self.id && last.result == "success");
        let details = match last {
            Some(last) if last.len == 0 => ": there was nothing to copy".to_owned(),
            Some(last) => {
                let copied = if last.bytes_copied == last.len {
                    String::new()
                } else {
                    format!(", {} copied", units::size(last.bytes_copied))
                };
                format!(
                    ": {} in {}{copied}",
                    units::size(last.len),
                    units::duration(facts::took(&last))
                )
            }
            None => String::new(),
        };
        say(&format!("stream of {} completed{details}", self.name))?;
        Ok(ExitCode::SUCCESS)
    }

    /// Returns the error of the job: the event's text, or file and offset if the daemon still knows
    /// them.
    fn failed(mut self, why: &str) -> Error {
        // The next job may have started already.
        let last = facts::last_job(&mut self.connection)
            .ok()
            .flatten()
            .filter(|last| last.id == self.id && last.result == "error");
        let why = last.as_ref().map_or(why, facts::why_failed);
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

/// Prints one line to standard output, for users and scripts.
pub(super) fn say(text: &str) -> Result<()> {
    writeln!(std::io::stdout(), "{text}").map_err(Error::standard_output)
}
