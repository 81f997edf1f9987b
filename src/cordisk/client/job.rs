//! `cordisk job`: pauses, resumes or cancels the job of a disk, or sets its speed.

use std::path::Path;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use serde_json::json;

use super::facts;
use super::find::{self, FoundDisk};
use super::limit::Limit;
use super::several::Targets;
use super::stream::say;
use crate::map::units;
use control::connection::{Connection, Heard};
use control::facts::JobProgress;
use host::error::one_line;
use host::{Error, ErrorKind, Result};

/// How long a cancelled job may take to end. It needs one step of its work, which never ends if a
/// backing file hangs.
const END: Duration = Duration::from_secs(60);

/// The options of `cordisk job`.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct JobOptions {
    /// The disks.
    pub targets: Targets,
    /// The action for the job of each disk.
    pub action: JobAction,
}

/// An action on a job.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum JobAction {
    /// Stop until the job is resumed.
    Pause,
    /// Resume a paused job.
    Resume,
    /// End the job before it is complete.
    Cancel,
    /// Set the speed limit.
    Speed(Limit),
}

/// Runs the command.
///
/// # Errors
/// There is no such disk, it has no job, or the daemon refuses the action.
pub fn run(options: &JobOptions) -> Result<ExitCode> {
    let mut found = false;
    let status = options.targets.each(|target| {
        let all = options.targets == Targets::All;
        // With `--all`, a disk without a job or without a daemon is skipped.
        if all && !matches!(find::find(target), Ok(FoundDisk::Running(_))) {
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
    let Some(job) = facts::job(&mut connection)?.map(|job| job.progress) else {
        return Err(no_job(&name));
    };
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

fn wait_until_gone(connection: &mut Connection, job: &JobProgress, name: &str) -> Result<()> {
    let give_up = Instant::now() + END;
    while facts::job(connection)?
        .is_some_and(|there| there.progress.id == job.id && !there.progress.is_concluded())
    {
        if Instant::now() > give_up {
            let text = format!(
                "stream of {name} was cancelled and has not ended within {} s: its backing file may hang",
                END.as_secs()
            );
            return Err(Error::new(ErrorKind::Io, text));
        }
        // An event reports the job's end. After any event, or the timeout, the loop checks again.
        if matches!(connection.next_event(Duration::from_millis(100))?, Heard::End) {
            return Ok(());
        }
    }
    Ok(())
}
