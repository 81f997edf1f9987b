//! `cordisk job`: the job that runs on a disk, told to pause, to go on, to end, or how fast to be.

use std::path::Path;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use serde_json::json;

use super::connection::{Connection, Heard};
use super::facts::{self, Job};
use super::find::{self, Target};
use super::limit::Limit;
use super::several::Targets;
use super::stream::say;
use crate::error::one_line;
use crate::map::units;
use crate::{Error, ErrorKind, Result};

/// How long a cancelled job may take to end. It needs one step of its work; a backing file that hangs makes it need for ever.
const END: Duration = Duration::from_secs(60);

/// What `cordisk job` is asked for.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct JobOptions {
    /// The disks.
    pub targets: Targets,
    /// What the job of each is told.
    pub action: JobAction,
}

/// What a job is told.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum JobAction {
    /// To do nothing until it is resumed.
    Pause,
    /// To go on.
    Resume,
    /// To end before it is complete.
    Cancel,
    /// To be as fast as this.
    Speed(Limit),
}

/// Runs the command.
///
/// # Errors
/// There is no such disk, or no job on it; the daemon refuses.
pub fn run(options: &JobOptions) -> Result<ExitCode> {
    let mut found = false;
    let status = options.targets.each(|target| {
        let all = options.targets == Targets::All;
        // With --all a disk without a job, or without a daemon, is none that was asked for.
        if all && !matches!(find::find(target), Ok(Target::Running(_))) {
            return Ok(ExitCode::SUCCESS);
        }
        match tell(target, &options.action) {
            Err(error) if all && error.kind() == ErrorKind::NotFound => Ok(ExitCode::SUCCESS),
            told => {
                found = true;
                told
            }
        }
    })?;
    if options.targets == Targets::All && !found {
        return Err(Error::new(ErrorKind::NotFound, "no job is running on any disk"));
    }
    Ok(status)
}

fn tell(target: &Path, action: &JobAction) -> Result<ExitCode> {
    let (mut connection, disk) = find::connect(target)?;
    let name = one_line(&disk.name);
    let Some(job) = facts::job(&mut connection)? else { return Err(no_job(&name)) };
    let device = json!({ "device": job.id });
    let told = match action {
        JobAction::Pause => connection.ask("block-job-pause", device)?.map(drop),
        JobAction::Resume => connection.ask("block-job-resume", device)?.map(drop),
        JobAction::Cancel => connection.ask("block-job-cancel", device)?.map(drop),
        JobAction::Speed(limit) => limit.set(&mut connection, &job.id)?,
    };
    match told {
        Ok(()) => {}
        Err(refusal) if refusal.class == "DeviceNotActive" => return Err(no_job(&name)),
        Err(refusal) => {
            let text = format!("stream of {name} ({}): {}", job.status, refusal.description);
            return Err(Error::new(ErrorKind::InvalidArgument, text));
        }
    }
    let at = units::percent(job.offset, job.len);
    say(&match action {
        JobAction::Pause => format!("stream of {name} paused at {at}"),
        JobAction::Resume => format!("stream of {name} goes on at {at}"),
        JobAction::Speed(limit) => format!("stream of {name} runs {limit} now"),
        JobAction::Cancel => {
            wait_until_gone(&mut connection, &job, &name)?;
            format!("stream of {name} cancelled at {at}; what was copied stays in the image")
        }
    })?;
    Ok(ExitCode::SUCCESS)
}

fn no_job(name: &str) -> Error {
    Error::new(ErrorKind::NotFound, format!("no job is running on {name}"))
}

fn wait_until_gone(connection: &mut Connection, job: &Job, name: &str) -> Result<()> {
    let give_up = Instant::now() + END;
    while facts::job(connection)?.is_some_and(|there| there.id == job.id && !there.is_concluded()) {
        if Instant::now() > give_up {
            let text = format!("stream of {name} was cancelled and has not ended within {} s: its backing file may hang", END.as_secs());
            return Err(Error::new(ErrorKind::Io, text));
        }
        // Its end is an event; whatever else wakes us, we look.
        if matches!(connection.next_event(Duration::from_millis(100))?, Heard::End) {
            return Ok(());
        }
    }
    Ok(())
}
