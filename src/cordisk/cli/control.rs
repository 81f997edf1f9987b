//! Commands about running disks: `stream`, `job`, `status`, `umount`.

use std::ffi::{OsStr, OsString};
use std::path::PathBuf;

use clap::error::ErrorKind as Wrong;
use clap::{CommandFactory, Parser, Subcommand};
use clap_complete::engine::ArgValueCompleter;

use super::completion::disks;
use super::values::{OnErrorArg, OutputArgs, absolute, parse_minute, parse_size, parse_speed};
use super::{Args, Typed, wrong_usage};
use crate::client::{
    JobAction, JobOptions, Limit, StatusOptions, StreamArguments, Targets, UmountOptions,
    UpgradeOptions,
};
use crate::metrics::Address;
use engine::stream::{Minute, Speed};

#[derive(Debug, clap::Args)]
pub(super) struct StreamArgs {
    /// The disk: its mountpoint, or its QMP socket
    #[arg(add = ArgValueCompleter::new(disks))]
    target: PathBuf,
    /// Limit in bytes per second, such as 20M or 1.5GiB/s; 0 is unlimited. Or by the local time of
    /// day, such as 08:00=20M,20:00=0 [default: 0]
    #[arg(long, value_name = "RATE|SCHEDULE", value_parser = parse_speed)]
    speed: Option<Speed>,
    /// Be as fast as it takes to be complete by this local time; the log and `cordisk status` say
    /// when that cannot be
    #[arg(long, value_name = "HH:MM", conflicts_with = "speed", value_parser = parse_minute)]
    finish_by: Option<Minute>,
    /// Copy up only what is above this file of the chain, which stays the backing file; named as
    /// the image or `cordisk status` has it
    #[arg(long, value_name = "FILE")]
    base: Option<String>,
    /// What an error of reading or writing does to the stream [default: report]
    #[arg(long, value_name = "ACTION")]
    on_error: Option<OnErrorArg>,
    /// Show the progress until the stream is complete. A stream that runs already is joined, if no
    /// other option is given
    #[arg(short, long)]
    wait: bool,
    /// With --wait: Ctrl-C cancels the stream instead of leaving it running
    #[arg(long, requires = "wait")]
    cancel_on_interrupt: bool,
    #[command(flatten)]
    output: OutputArgs,
}

impl From<StreamArgs> for StreamArguments {
    fn from(args: StreamArgs) -> StreamArguments {
        let StreamArgs {
            target,
            speed,
            finish_by,
            base,
            on_error,
            wait,
            cancel_on_interrupt,
            output,
        } = args;
        let on_error = on_error.map(|action| action.word().to_owned());
        StreamArguments {
            target,
            limit: limit(speed, finish_by),
            base,
            on_error,
            wait,
            cancel_on_interrupt,
            json: output.is_json(),
        }
    }
}

/// Returns the limit; at most one of the two arguments is given.
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
    /// End the job before it is complete, and wait until it has ended. What was copied stays in the
    /// image
    #[command(after_help = "Example: cordisk job cancel disk")]
    Cancel(TargetArgs),
    /// Change how fast the job may be
    ///
    /// The last word is the limit in bytes per second, such as 20M or 1.5GiB/s (0 is unlimited), or
    /// a schedule by the local time of day, such as 08:00=20M,20:00=0. With --finish-by every word
    /// is a disk.
    #[command(after_help = "Example: cordisk job speed disk 20M", override_usage = SPEED_USAGE)]
    Speed(SpeedArgs),
}

const SPEED_USAGE: &str = "cordisk job speed <TARGET>... <RATE|SCHEDULE>
       cordisk job speed --all <RATE|SCHEDULE>
       cordisk job speed --finish-by <HH:MM> <TARGET>...";

#[derive(Debug, clap::Args)]
struct SpeedArgs {
    /// The disks: their mountpoints, or their QMP sockets; then the limit
    // The disks and the limit are one list: clap cannot tell where the disks end if the last word
    // is optional.
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
    /// Splits the words into disks and limit.
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
                let speed = speed.map_err(|why| {
                    wrong(
                        &format!("invalid value '{text}' for '<RATE|SCHEDULE>': {why}"),
                        Wrong::ValueValidation,
                    )
                })?;
                limit(Some(speed), None).unwrap_or(Limit::Speed(0))
            }
        };
        match (all, words.is_empty()) {
            (false, true) => Err(wrong(
                "the following required arguments were not provided: <TARGET>...",
                Wrong::MissingRequiredArgument,
            )),
            (true, false) => Err(wrong(
                "the argument '--all' cannot be used with '<TARGET>...'",
                Wrong::ArgumentConflict,
            )),
            (true, true) => Ok((Targets::All, limit)),
            (false, false) => {
                Ok((Targets::Named(words.into_iter().map(PathBuf::from).collect()), limit))
            }
        }
    }
}

/// Returns an error for wrong usage that clap does not detect by itself.
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
    /// Returns the options of the client command.
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
    /// The disks: their mountpoints, or their QMP sockets; without any, a list of all disks
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
        let targets =
            if args.targets.is_empty() { Targets::All } else { Targets::Named(args.targets) };
        StatusOptions { targets, json: args.output.is_json() }
    }
}

#[derive(Debug, clap::Args)]
pub(super) struct UmountArgs {
    #[command(flatten)]
    targets: TargetArgs,
    /// Take the disk away from the programs that use it: their requests fail from then on. What was
    /// written is safe
    #[arg(short, long)]
    lazy: bool,
}

impl From<UmountArgs> for UmountOptions {
    fn from(args: UmountArgs) -> UmountOptions {
        UmountOptions { targets: args.targets.into(), lazy: args.lazy }
    }
}

#[derive(Debug, clap::Args)]
pub(super) struct UpgradeArgs {
    #[command(flatten)]
    targets: TargetArgs,
    /// Change the limit of the stream that runs, in bytes per second, such as 20M or 1.5GiB/s; 0 is
    /// unlimited. Or by the local time of day, such as 08:00=20M,20:00=0
    #[arg(long, value_name = "RATE|SCHEDULE", value_parser = parse_speed)]
    speed: Option<Speed>,
    /// Serve metrics on this TCP address from now on
    #[arg(long, value_name = "ADDR")]
    metrics: Option<Address>,
    /// Write the log to this file from now on
    #[arg(long, value_name = "FILE")]
    log: Option<PathBuf>,
    /// Use this directory as the cache of remote backing files from now on; `none` keeps nothing
    #[arg(long, value_name = "DIR|none")]
    cache: Option<PathBuf>,
    /// Limit of the cache from now on
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    cache_size: Option<u64>,
}

impl UpgradeArgs {
    /// Returns the options of the client command.
    ///
    /// # Errors
    /// The current directory does not exist any more.
    pub(super) fn options(self) -> host::Result<UpgradeOptions> {
        let option = |name: &str, value: &OsStr| {
            let mut option = OsString::from(format!("--{name}="));
            option.push(value);
            option
        };
        let mut changes = Vec::new();
        if let Some(address) = self.metrics {
            changes.push(option("metrics", address.to_string().as_ref()));
        }
        if let Some(log) = self.log {
            changes.push(option("log", absolute(&log)?.as_os_str()));
        }
        if let Some(cache) = self.cache {
            let is_none = cache.as_os_str() == "none";
            let cache = if is_none { cache } else { absolute(&cache)? };
            changes.push(option("cache", cache.as_os_str()));
        }
        if let Some(size) = self.cache_size {
            changes.push(option("cache-size", size.to_string().as_ref()));
        }
        Ok(UpgradeOptions { targets: self.targets.into(), changes, limit: limit(self.speed, None) })
    }
}

/// Returns the arguments of a mount with the changes of `options`. Of an option that is given twice
/// the last one counts.
///
/// # Errors
/// This program does not take the arguments.
pub fn changed_mount(
    arguments: &[OsString],
    options: &UpgradeOptions,
) -> host::Result<Vec<OsString>> {
    let mut changed = arguments.to_vec();
    let end = changed.iter().position(|word| word == "--").unwrap_or(changed.len());
    changed.splice(end..end, options.changes.iter().cloned());
    let line = std::iter::once(OsString::from("cordisk")).chain(changed.iter().cloned());
    match Args::try_parse_from(line) {
        Ok(Args { command: Typed::Mount(_) }) => Ok(changed),
        Ok(_) => Err(not_taken("they are not those of a mount")),
        Err(error) => {
            Err(not_taken(&wrong_usage(&error).unwrap_or_else(|| "they ask for help".into())))
        }
    }
}

fn not_taken(why: &str) -> host::Error {
    host::Error::new(
        host::ErrorKind::InvalidArgument,
        format!("this program does not take the arguments of the mount: {why}"),
    )
}

#[cfg(test)]
mod tests {
    use super::super::{Command, Refused};
    use super::*;

    fn command(line: &str) -> Command {
        Args::try_parse_from(line.split(' ')).unwrap().check().unwrap()
    }

    #[test]
    fn what_is_typed_is_what_is_asked_for() {
        let Command::Stream(options) = command("cordisk stream d") else { panic!("not stream") };
        let plain = StreamArguments {
            target: "d".into(),
            limit: None,
            base: None,
            on_error: None,
            wait: false,
            cancel_on_interrupt: false,
            json: false,
        };
        assert_eq!(options, plain);
        let Command::Stream(options) = command(
            "cordisk stream d --speed 10M/s --base b --wait --cancel-on-interrupt --on-error enospc --json",
        ) else {
            panic!("not stream")
        };
        assert_eq!(
            options,
            StreamArguments {
                limit: Some(Limit::Speed(10 << 20)),
                base: Some("b".into()),
                on_error: Some("enospc".into()),
                wait: true,
                cancel_on_interrupt: true,
                json: true,
                ..plain
            }
        );
        for (word, action) in [
            ("pause", JobAction::Pause),
            ("resume", JobAction::Resume),
            ("cancel", JobAction::Cancel),
        ] {
            let Command::Job(options) = command(&format!("cordisk job {word} d")) else {
                panic!("not job")
            };
            assert_eq!(options, JobOptions { targets: Targets::one("d"), action });
        }
        let Command::Job(options) = command("cordisk job speed d 1K") else { panic!("not job") };
        assert_eq!(options.action, JobAction::Speed(Limit::Speed(1024)));
        let planned = |line: &str| match command(line) {
            Command::Stream(StreamArguments { limit, .. }) => limit,
            Command::Job(JobOptions { action: JobAction::Speed(limit), .. }) => Some(limit),
            other => panic!("neither: {other:?}"),
        };
        let schedule = Some(Limit::Schedule("08:00=20M,20:00=0".into()));
        assert_eq!(planned("cordisk stream d --speed 08:00=20M,20:00=0"), schedule);
        assert_eq!(planned("cordisk job speed d 08:00=20M,20:00=0"), schedule);
        let deadline = Some(Limit::FinishBy("06:00".into()));
        assert_eq!(planned("cordisk stream d --finish-by 06:00"), deadline);
        assert_eq!(planned("cordisk job speed d --finish-by 06:00"), deadline);
        let Command::Status(options) = command("cordisk status --json") else {
            panic!("not status")
        };
        assert_eq!(options, StatusOptions { targets: Targets::All, json: true });
        let Command::Umount(options) = command("cordisk umount -l d") else { panic!("not umount") };
        assert_eq!(options, UmountOptions { targets: Targets::one("d"), lazy: true });
    }

    /// Protects: an upgrade changes the options that are named, keeps all others, and refuses
    /// arguments that this program does not take.
    #[test]
    fn an_upgrade_keeps_the_arguments() {
        let words = |line: &str| line.split(' ').map(OsString::from).collect::<Vec<_>>();
        let Command::Upgrade(options) =
            command("cordisk upgrade d --log /l --metrics 9184 --cache none --speed 1M")
        else {
            panic!("not upgrade")
        };
        assert_eq!(options.limit, Some(Limit::Speed(1 << 20)));
        let changed =
            changed_mount(&words("mount --background-child --log /old /i /m"), &options).unwrap();
        let line = [words("cordisk"), changed].concat();
        let Command::Mount(config) = Args::try_parse_from(line).unwrap().check().unwrap() else {
            panic!("not mount")
        };
        assert_eq!(config.log.as_deref(), Some(std::path::Path::new("/l")));
        assert_eq!(config.metrics.unwrap().to_string(), "127.0.0.1:9184");
        assert_eq!(config.mountpoint, std::path::Path::new("/m"));
        let changed = changed_mount(&words("mount -f -- -i /m"), &options).unwrap();
        assert_eq!(changed[..2], words("mount -f"));
        assert_eq!(changed[changed.len() - 3..], words("-- -i /m"));
        for wrong in ["mount --of-the-future /i /m", "status", "mount /i", "mount --help"] {
            let error = changed_mount(&words(wrong), &options).unwrap_err().to_string();
            assert!(error.contains("does not take"), "{wrong}: {error}");
        }
    }

    /// Protects: every command about running disks accepts several disks, or all of them.
    #[test]
    fn a_command_takes_several_disks() {
        let both = Targets::Named(vec!["a".into(), "b".into()]);
        for (line, targets) in [("a b", &both), ("--all", &Targets::All)] {
            let Command::Umount(options) = command(&format!("cordisk umount {line}")) else {
                panic!("not umount")
            };
            assert_eq!(&options.targets, targets);
            let Command::Status(options) = command(&format!("cordisk status {line}")) else {
                panic!("not status")
            };
            assert_eq!(&options.targets, targets);
            for (words, action) in [
                (format!("pause {line}"), JobAction::Pause),
                (format!("speed {line} 1.5M"), JobAction::Speed(Limit::Speed(3 << 19))),
                (
                    format!("speed {line} --finish-by 06:00"),
                    JobAction::Speed(Limit::FinishBy("06:00".into())),
                ),
            ] {
                let Command::Job(options) = command(&format!("cordisk job {words}")) else {
                    panic!("not job")
                };
                assert_eq!(options, JobOptions { targets: targets.clone(), action }, "{words}");
            }
        }
        let Command::Job(options) = command("cordisk job speed a --finish-by 06:00 b") else {
            panic!("not job")
        };
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
            let Err(Refused::Usage(wrong)) =
                Args::try_parse_from(&line).map_err(Refused::Usage).and_then(Args::check)
            else {
                panic!("{line:?} is taken");
            };
            assert_eq!(wrong.exit_code(), 2, "{line:?}");
        }
    }
}
