//! Commands about disks that run: `stream`, `job`, `status`, `umount`.

use std::ffi::OsString;
use std::path::PathBuf;

use clap::error::ErrorKind as Wrong;
use clap::{CommandFactory, Subcommand};
use clap_complete::engine::ArgValueCompleter;

use super::Args;
use super::completion::disks;
use super::values::{OnErrorArg, OutputArgs, parse_minute, parse_speed};
use crate::client::{JobAction, JobOptions, Limit, StatusOptions, StreamOptions, Targets, UmountOptions};
use crate::stream::{Minute, Speed};

#[derive(Debug, clap::Args)]
pub(super) struct StreamArgs {
    /// The disk: its mountpoint, or its QMP socket
    #[arg(add = ArgValueCompleter::new(disks))]
    target: PathBuf,
    /// Limit in bytes per second, such as 20M or 1.5GiB/s; 0 is unlimited. Or by the local time of day, such as
    /// 08:00=20M,20:00=0 [default: 0]
    #[arg(long, value_name = "RATE|SCHEDULE", value_parser = parse_speed)]
    speed: Option<Speed>,
    /// Be as fast as it takes to be complete by this local time; the log and `cordisk status` say when that cannot be
    #[arg(long, value_name = "HH:MM", conflicts_with = "speed", value_parser = parse_minute)]
    finish_by: Option<Minute>,
    /// Copy up only what is above this file of the chain, which stays the backing file; named as the image or `cordisk status` has it
    #[arg(long, value_name = "FILE")]
    base: Option<String>,
    /// What an error of reading or writing does to the stream [default: report]
    #[arg(long, value_name = "ACTION")]
    on_error: Option<OnErrorArg>,
    /// Show the progress until the stream is complete. A stream that runs already is joined, if no other option is given
    #[arg(short, long)]
    wait: bool,
    /// With --wait: Ctrl-C cancels the stream instead of leaving it running
    #[arg(long, requires = "wait")]
    cancel_on_interrupt: bool,
    #[command(flatten)]
    output: OutputArgs,
}

impl From<StreamArgs> for StreamOptions {
    fn from(args: StreamArgs) -> StreamOptions {
        let StreamArgs { target, speed, finish_by, base, on_error, wait, cancel_on_interrupt, output } = args;
        let on_error = on_error.map(|action| action.word().to_owned());
        StreamOptions { target, limit: limit(speed, finish_by), base, on_error, wait, cancel_on_interrupt, json: output.is_json() }
    }
}

/// At most one of the two is given.
fn limit(speed: Option<Speed>, finish_by: Option<Minute>) -> Option<Limit> {
    let speed = speed.map(|speed| match speed {
        Speed::Fixed(speed) => Limit::Speed(speed),
        Speed::Schedule(schedule) => Limit::Schedule(schedule.to_string()),
    });
    speed.or_else(|| finish_by.map(|at| Limit::FinishBy(at.to_string())))
}

#[derive(Debug, clap::Args)]
pub(super) struct JobArgs {
    #[command(subcommand)]
    action: ActionArg,
}

#[derive(Debug, Subcommand)]
enum ActionArg {
    /// Let the job do nothing until it is resumed
    #[command(after_help = "Example: cordisk job pause disk")]
    Pause(TargetArgs),
    /// Let a paused job go on, also one that an error has paused
    #[command(after_help = "Example: cordisk job resume disk")]
    Resume(TargetArgs),
    /// End the job before it is complete, and wait until it has ended. What was copied stays in the image
    #[command(after_help = "Example: cordisk job cancel disk")]
    Cancel(TargetArgs),
    /// Change how fast the job may be
    ///
    /// The last word is the limit in bytes per second, such as 20M or 1.5GiB/s (0 is unlimited), or a schedule by the local time of day, such as
    /// 08:00=20M,20:00=0. With --finish-by every word is a disk.
    #[command(after_help = "Example: cordisk job speed disk 20M", override_usage = SPEED_USAGE)]
    Speed(SpeedArgs),
}

const SPEED_USAGE: &str = "cordisk job speed <TARGET>... <RATE|SCHEDULE>
       cordisk job speed --all <RATE|SCHEDULE>
       cordisk job speed --finish-by <HH:MM> <TARGET>...";

#[derive(Debug, clap::Args)]
struct SpeedArgs {
    /// The disks: their mountpoints, or their QMP sockets; then the limit
    // One list, because clap cannot tell where the disks end where the last word is optional.
    #[arg(add = ArgValueCompleter::new(disks), value_name = "TARGET|RATE|SCHEDULE")]
    words: Vec<OsString>,
    /// Every disk that has a job; of this user, or of all users for root
    #[arg(long)]
    all: bool,
    /// Be as fast as it takes to be complete by this local time
    #[arg(long, value_name = "HH:MM", value_parser = parse_minute)]
    finish_by: Option<Minute>,
}

impl SpeedArgs {
    /// Which disks, and how fast.
    fn split(self) -> Result<(Targets, Limit), clap::Error> {
        let SpeedArgs { mut words, all, finish_by } = self;
        let limit = match finish_by {
            Some(at) => Limit::FinishBy(at.to_string()),
            None => {
                let Some(word) = words.pop() else {
                    return Err(wrong(
                        "the following required arguments were not provided: <RATE|SCHEDULE>",
                        Wrong::MissingRequiredArgument,
                    ));
                };
                let text = word.to_string_lossy();
                let speed = parse_speed(&text);
                let speed =
                    speed.map_err(|why| wrong(&format!("invalid value '{text}' for '<RATE|SCHEDULE>': {why}"), Wrong::ValueValidation))?;
                limit(Some(speed), None).unwrap_or(Limit::Speed(0))
            }
        };
        match (all, words.is_empty()) {
            (false, true) => Err(wrong("the following required arguments were not provided: <TARGET>...", Wrong::MissingRequiredArgument)),
            (true, false) => Err(wrong("the argument '--all' cannot be used with '<TARGET>...'", Wrong::ArgumentConflict)),
            (true, true) => Ok((Targets::All, limit)),
            (false, false) => Ok((Targets::Named(words.into_iter().map(PathBuf::from).collect()), limit)),
        }
    }
}

/// Wrong usage that clap does not find by itself.
fn wrong(text: &str, kind: Wrong) -> clap::Error {
    Args::command().error(kind, text)
}

#[derive(Debug, clap::Args)]
struct TargetArgs {
    /// The disks: their mountpoints, or their QMP sockets
    #[arg(add = ArgValueCompleter::new(disks), value_name = "TARGET", required_unless_present = "all", conflicts_with = "all")]
    targets: Vec<PathBuf>,
    /// Every disk; of this user, or of all users for root
    #[arg(long)]
    all: bool,
}

impl From<TargetArgs> for Targets {
    fn from(args: TargetArgs) -> Targets {
        if args.all { Targets::All } else { Targets::Named(args.targets) }
    }
}

impl JobArgs {
    /// What is asked for.
    pub(super) fn options(self) -> Result<JobOptions, clap::Error> {
        let (targets, action) = match self.action {
            ActionArg::Pause(targets) => (targets.into(), JobAction::Pause),
            ActionArg::Resume(targets) => (targets.into(), JobAction::Resume),
            ActionArg::Cancel(targets) => (targets.into(), JobAction::Cancel),
            ActionArg::Speed(args) => {
                let (targets, limit) = args.split()?;
                (targets, JobAction::Speed(limit))
            }
        };
        Ok(JobOptions { targets, action })
    }
}

#[derive(Debug, clap::Args)]
pub(super) struct StatusArgs {
    /// The disks: their mountpoints, or their QMP sockets; a list of all disks without
    #[arg(add = ArgValueCompleter::new(disks), value_name = "TARGET", conflicts_with = "all")]
    targets: Vec<PathBuf>,
    /// The list of all disks, as without TARGET
    #[arg(long)]
    all: bool,
    #[command(flatten)]
    output: OutputArgs,
}

impl From<StatusArgs> for StatusOptions {
    fn from(args: StatusArgs) -> StatusOptions {
        let targets = if args.targets.is_empty() { Targets::All } else { Targets::Named(args.targets) };
        StatusOptions { targets, json: args.output.is_json() }
    }
}

#[derive(Debug, clap::Args)]
pub(super) struct UmountArgs {
    #[command(flatten)]
    targets: TargetArgs,
    /// Take the disk away from the programs that use it: their requests fail from then on. What was written is safe
    #[arg(short, long)]
    lazy: bool,
}

impl From<UmountArgs> for UmountOptions {
    fn from(args: UmountArgs) -> UmountOptions {
        UmountOptions { targets: args.targets.into(), lazy: args.lazy }
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::super::{Command, Refused};
    use super::*;

    fn command(line: &str) -> Command {
        Args::try_parse_from(line.split(' ')).unwrap().check().unwrap()
    }

    #[test]
    fn what_is_typed_is_what_is_asked_for() {
        let Command::Stream(options) = command("cordisk stream d") else { panic!("not stream") };
        let plain = StreamOptions {
            target: "d".into(),
            limit: None,
            base: None,
            on_error: None,
            wait: false,
            cancel_on_interrupt: false,
            json: false,
        };
        assert_eq!(options, plain);
        let Command::Stream(options) =
            command("cordisk stream d --speed 10M/s --base b --wait --cancel-on-interrupt --on-error enospc --json")
        else {
            panic!("not stream")
        };
        assert_eq!(
            options,
            StreamOptions {
                limit: Some(Limit::Speed(10 << 20)),
                base: Some("b".into()),
                on_error: Some("enospc".into()),
                wait: true,
                cancel_on_interrupt: true,
                json: true,
                ..plain
            }
        );
        for (word, action) in [("pause", JobAction::Pause), ("resume", JobAction::Resume), ("cancel", JobAction::Cancel)] {
            let Command::Job(options) = command(&format!("cordisk job {word} d")) else { panic!("not job") };
            assert_eq!(options, JobOptions { targets: Targets::one("d"), action });
        }
        let Command::Job(options) = command("cordisk job speed d 1K") else { panic!("not job") };
        assert_eq!(options.action, JobAction::Speed(Limit::Speed(1024)));
        let planned = |line: &str| match command(line) {
            Command::Stream(StreamOptions { limit, .. }) => limit,
            Command::Job(JobOptions { action: JobAction::Speed(limit), .. }) => Some(limit),
            other => panic!("neither: {other:?}"),
        };
        let schedule = Some(Limit::Schedule("08:00=20M,20:00=0".into()));
        assert_eq!(planned("cordisk stream d --speed 08:00=20M,20:00=0"), schedule);
        assert_eq!(planned("cordisk job speed d 08:00=20M,20:00=0"), schedule);
        let deadline = Some(Limit::FinishBy("06:00".into()));
        assert_eq!(planned("cordisk stream d --finish-by 06:00"), deadline);
        assert_eq!(planned("cordisk job speed d --finish-by 06:00"), deadline);
        let Command::Status(options) = command("cordisk status --json") else { panic!("not status") };
        assert_eq!(options, StatusOptions { targets: Targets::All, json: true });
        let Command::Umount(options) = command("cordisk umount -l d") else { panic!("not umount") };
        assert_eq!(options, UmountOptions { targets: Targets::one("d"), lazy: true });
    }

    /// Protects: several disks, or all of them, wherever a command is about one that runs.
    #[test]
    fn a_command_takes_several_disks() {
        let both = Targets::Named(vec!["a".into(), "b".into()]);
        for (line, targets) in [("a b", &both), ("--all", &Targets::All)] {
            let Command::Umount(options) = command(&format!("cordisk umount {line}")) else { panic!("not umount") };
            assert_eq!(&options.targets, targets);
            let Command::Status(options) = command(&format!("cordisk status {line}")) else { panic!("not status") };
            assert_eq!(&options.targets, targets);
            for (words, action) in [
                (format!("pause {line}"), JobAction::Pause),
                (format!("speed {line} 1.5M"), JobAction::Speed(Limit::Speed(3 << 19))),
                (format!("speed {line} --finish-by 06:00"), JobAction::Speed(Limit::FinishBy("06:00".into()))),
            ] {
                let Command::Job(options) = command(&format!("cordisk job {words}")) else { panic!("not job") };
                assert_eq!(options, JobOptions { targets: targets.clone(), action }, "{words}");
            }
        }
        let Command::Job(options) = command("cordisk job speed a --finish-by 06:00 b") else { panic!("not job") };
        assert_eq!(options.targets, both);
    }

    #[test]
    fn what_makes_no_sense_is_wrong_usage() {
        for line in [
            "stream",
            "stream d --cancel-on-interrupt",
            "stream d --speed fast",
            "job",
            "job speed d",
            "job speed 1M",
            "job speed --all",
            "job speed --all d 1M",
            "job speed d fast",
            "job pause d --all",
            "umount d --all",
            "status d --all",
            "status --json --output human",
            "stream d --on-error explode",
            "stream d --finish-by 24:00",
            "job pause",
            "umount",
        ] {
            let line: Vec<&str> = std::iter::once("cordisk").chain(line.split(' ')).collect();
            let Err(Refused::Usage(wrong)) = Args::try_parse_from(&line).map_err(Refused::Usage).and_then(Args::check) else {
                panic!("{line:?} is taken");
            };
            assert_eq!(wrong.exit_code(), 2, "{line:?}");
        }
    }
}
