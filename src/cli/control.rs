//! Commands about disks that run: `stream`, `job`, `status`, `umount`.

use std::path::PathBuf;

use clap::Subcommand;

use super::values::{parse_minute, parse_speed};
use crate::client::{JobAction, JobOptions, Limit, StatusOptions, StreamOptions, UmountOptions};
use crate::stream::{Minute, Speed};

#[derive(Debug, clap::Args)]
pub(super) struct StreamArgs {
    /// The disk: its mountpoint, or its QMP socket
    target: PathBuf,
    /// Limit in bytes per second; K, M, G and T mean powers of 1024, 0 is unlimited. Or by the local time of day, such as
    /// 08:00=20M,20:00=0 [default: 0]
    #[arg(long, value_name = "RATE|SCHEDULE", value_parser = parse_speed)]
    speed: Option<Speed>,
    /// Be as fast as it takes to be complete by this local time; the log and `cordisk status` say when that cannot be
    #[arg(long, value_name = "HH:MM", conflicts_with = "speed", value_parser = parse_minute)]
    finish_by: Option<Minute>,
    /// Copy up only what is above this file of the chain, which stays the backing file; named as the image or `cordisk status` has it
    #[arg(long, value_name = "FILE")]
    base: Option<String>,
    /// Show the progress until the stream is complete. A stream that runs already is joined, if no other option is given
    #[arg(short, long)]
    wait: bool,
    /// With --wait: Ctrl-C cancels the stream instead of leaving it running
    #[arg(long, requires = "wait")]
    cancel_on_interrupt: bool,
}

impl From<StreamArgs> for StreamOptions {
    fn from(args: StreamArgs) -> StreamOptions {
        let StreamArgs { target, speed, finish_by, base, wait, cancel_on_interrupt } = args;
        StreamOptions { target, limit: limit(speed, finish_by), base, wait, cancel_on_interrupt }
    }
}

/// At most one of the two is given.
fn limit(speed: Option<Speed>, finish_by: Option<Minute>) -> Option<Limit> {
    speed.map(Limit::Speed).or(finish_by.map(Limit::FinishBy))
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
    Pause(TargetArg),
    /// Let a paused job go on, also one that an error has paused
    #[command(after_help = "Example: cordisk job resume disk")]
    Resume(TargetArg),
    /// End the job before it is complete, and wait until it has ended. What was copied stays in the image
    #[command(after_help = "Example: cordisk job cancel disk")]
    Cancel(TargetArg),
    /// Change how fast the job may be
    #[command(after_help = "Example: cordisk job speed disk 20M")]
    Speed {
        #[command(flatten)]
        target: TargetArg,
        /// Limit in bytes per second; K, M, G and T mean powers of 1024, 0 is unlimited. Or by the local time of day, such as
        /// 08:00=20M,20:00=0
        #[arg(value_name = "RATE|SCHEDULE", value_parser = parse_speed, required_unless_present = "finish_by")]
        speed: Option<Speed>,
        /// Be as fast as it takes to be complete by this local time
        #[arg(long, value_name = "HH:MM", conflicts_with = "speed", value_parser = parse_minute)]
        finish_by: Option<Minute>,
    },
}

#[derive(Debug, clap::Args)]
struct TargetArg {
    /// The disk: its mountpoint, or its QMP socket
    target: PathBuf,
}

impl From<JobArgs> for JobOptions {
    fn from(args: JobArgs) -> JobOptions {
        let (TargetArg { target }, action) = match args.action {
            ActionArg::Pause(target) => (target, JobAction::Pause),
            ActionArg::Resume(target) => (target, JobAction::Resume),
            ActionArg::Cancel(target) => (target, JobAction::Cancel),
            // One of the two is there: the parser has seen to it.
            ActionArg::Speed { target, speed, finish_by } => {
                (target, JobAction::Speed(limit(speed, finish_by).unwrap_or(Limit::Speed(Speed::Fixed(0)))))
            }
        };
        JobOptions { target, action }
    }
}

#[derive(Debug, clap::Args)]
pub(super) struct StatusArgs {
    /// The disk: its mountpoint, or its QMP socket; all disks without
    target: Option<PathBuf>,
    /// One JSON array with an object for each disk: the members of x-query-status, and qmp and state
    #[arg(long)]
    json: bool,
}

impl From<StatusArgs> for StatusOptions {
    fn from(args: StatusArgs) -> StatusOptions {
        StatusOptions { target: args.target, json: args.json }
    }
}

#[derive(Debug, clap::Args)]
pub(super) struct UmountArgs {
    /// The disk: its mountpoint, or its QMP socket
    target: PathBuf,
    /// Take the disk away from whoever uses it: their requests fail from then on. What was written is safe
    #[arg(short, long)]
    lazy: bool,
}

impl From<UmountArgs> for UmountOptions {
    fn from(args: UmountArgs) -> UmountOptions {
        UmountOptions { target: args.target, lazy: args.lazy }
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::super::{Args, Command};
    use super::*;

    fn command(line: &str) -> Command {
        Args::try_parse_from(line.split(' ')).unwrap().check().unwrap()
    }

    #[test]
    fn what_is_typed_is_what_is_asked_for() {
        let Command::Stream(options) = command("cordisk stream d") else { panic!("not stream") };
        let plain = StreamOptions { target: "d".into(), limit: None, base: None, wait: false, cancel_on_interrupt: false };
        assert_eq!(options, plain);
        let Command::Stream(options) = command("cordisk stream d --speed 10M --base b --wait --cancel-on-interrupt") else {
            panic!("not stream")
        };
        assert_eq!(
            options,
            StreamOptions {
                limit: Some(Limit::Speed(Speed::Fixed(10 << 20))),
                base: Some("b".into()),
                wait: true,
                cancel_on_interrupt: true,
                ..plain
            }
        );
        for (word, action) in [("pause", JobAction::Pause), ("resume", JobAction::Resume), ("cancel", JobAction::Cancel)] {
            let Command::Job(options) = command(&format!("cordisk job {word} d")) else { panic!("not job") };
            assert_eq!(options, JobOptions { target: "d".into(), action });
        }
        let Command::Job(options) = command("cordisk job speed d 1K") else { panic!("not job") };
        assert_eq!(options.action, JobAction::Speed(Limit::Speed(Speed::Fixed(1024))));
        let planned = |line: &str| match command(line) {
            Command::Stream(StreamOptions { limit, .. }) => limit,
            Command::Job(JobOptions { action: JobAction::Speed(limit), .. }) => Some(limit),
            other => panic!("neither: {other:?}"),
        };
        let schedule = Some(Limit::Speed("08:00=20M,20:00=0".parse().unwrap()));
        assert_eq!(planned("cordisk stream d --speed 08:00=20M,20:00=0"), schedule);
        assert_eq!(planned("cordisk job speed d 08:00=20M,20:00=0"), schedule);
        let deadline = Some(Limit::FinishBy("06:00".parse().unwrap()));
        assert_eq!(planned("cordisk stream d --finish-by 06:00"), deadline);
        assert_eq!(planned("cordisk job speed d --finish-by 06:00"), deadline);
        let Command::Status(options) = command("cordisk status --json") else { panic!("not status") };
        assert_eq!(options, StatusOptions { target: None, json: true });
        let Command::Umount(options) = command("cordisk umount -l d") else { panic!("not umount") };
        assert_eq!(options, UmountOptions { target: "d".into(), lazy: true });
    }

    #[test]
    fn what_makes_no_sense_is_wrong_usage() {
        for line in [
            "stream",
            "stream d --cancel-on-interrupt",
            "stream d --speed fast",
            "job",
            "job speed d",
            "job speed d 1M --finish-by 06:00",
            "stream d --finish-by 24:00",
            "job pause",
            "umount",
            "status a b",
        ] {
            let line: Vec<&str> = std::iter::once("cordisk").chain(line.split(' ')).collect();
            assert_eq!(Args::try_parse_from(&line).unwrap_err().exit_code(), 2, "{line:?}");
        }
    }
}
