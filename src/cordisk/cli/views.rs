//! `cordisk map`, `cordisk info` and `cordisk top`: their options and their checked values.

use std::path::PathBuf;
use std::time::Duration;

use clap_complete::engine::ArgValueCompleter;

use super::completion::{disks, disks_and_files};
use super::values::{FormatArg, OutputArgs};
use crate::client::{InfoOptions, MapOptions, TopOptions};
use qcow2::format::BackingFormat;

/// Seconds between two queries: nobody can read more than ten screens per second.
const INTERVALS: std::ops::RangeInclusive<f64> = 0.1..=3600.0;

#[derive(Debug, clap::Args)]
pub(super) struct MapArgs {
    /// A running disk (its mountpoint, or its control socket), or a qcow2 image that no program
    /// writes to
    #[arg(add = ArgValueCompleter::new(disks_and_files), value_name = "TARGET|IMAGE")]
    target: PathBuf,
    #[command(flatten)]
    output: OutputArgs,
    /// Write a PNG with one square for each cell; `-` is standard output. A file that exists is
    /// replaced
    #[arg(long, value_name = "FILE", conflicts_with_all = ["json", "output"])]
    png: Option<PathBuf>,
    /// Format of the first backing file, where IMAGE does not say; it is never guessed
    #[arg(long, value_name = "FORMAT")]
    backing_format: Option<FormatArg>,
}

#[derive(Debug, clap::Args)]
pub(super) struct InfoArgs {
    /// A running disk (its mountpoint, or its control socket), or an image, which may be in use
    #[arg(add = ArgValueCompleter::new(disks_and_files), value_name = "TARGET|IMAGE")]
    target: PathBuf,
    #[command(flatten)]
    output: OutputArgs,
    /// Also show the backing files, top first
    #[arg(long)]
    backing_chain: bool,
}

#[derive(Debug, clap::Args)]
pub(super) struct TopArgs {
    /// The disk: its mountpoint, or its control socket [default: all that run]
    #[arg(add = ArgValueCompleter::new(disks))]
    target: Option<PathBuf>,
    /// Seconds between two queries of a disk
    #[arg(long, value_name = "SECONDS", default_value = "1", value_parser = parse_interval)]
    interval: Duration,
    #[command(flatten)]
    output: OutputArgs,
}

impl From<MapArgs> for MapOptions {
    fn from(args: MapArgs) -> Self {
        let MapArgs { target, output, png, backing_format } = args;
        MapOptions {
            target,
            backing_format: backing_format.map(BackingFormat::from),
            json: output.is_json(),
            png,
        }
    }
}

impl From<InfoArgs> for InfoOptions {
    fn from(args: InfoArgs) -> Self {
        let InfoArgs { target, output, backing_chain } = args;
        InfoOptions { target, json: output.is_json(), backing_chain }
    }
}

impl From<TopArgs> for TopOptions {
    fn from(args: TopArgs) -> Self {
        TopOptions { target: args.target, interval: args.interval, json: args.output.is_json() }
    }
}

fn parse_interval(text: &str) -> Result<Duration, String> {
    match text.parse::<f64>() {
        Ok(seconds) if INTERVALS.contains(&seconds) => Ok(Duration::from_secs_f64(seconds)),
        _ => Err(format!(
            "expected seconds from {} to {}, such as 1 or 0.5",
            INTERVALS.start(),
            INTERVALS.end()
        )),
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::super::{Args, Command};
    use super::*;

    fn command(line: &[&str]) -> Command {
        Args::try_parse_from(line).unwrap().check().unwrap()
    }

    #[test]
    fn views_take_what_they_say() {
        let Command::Map(map) =
            command(&["cordisk", "map", "--png", "-", "--backing-format", "raw", "i"])
        else {
            panic!("not map")
        };
        assert_eq!(
            (map.target, map.json, map.png, map.backing_format),
            ("i".into(), false, Some("-".into()), Some(BackingFormat::Raw))
        );
        let Command::Info(info) = command(&["cordisk", "info", "--json", "--backing-chain", "i"])
        else {
            panic!("not info")
        };
        assert_eq!((info.target, info.json, info.backing_chain), (PathBuf::from("i"), true, true));
        let Command::Top(top) = command(&["cordisk", "top"]) else { panic!("not top") };
        assert_eq!((top.target, top.interval), (None, Duration::from_secs(1)));
        let Command::Top(top) = command(&["cordisk", "top", "--interval", "0.5", "m"]) else {
            panic!("not top")
        };
        assert_eq!((top.target, top.interval), (Some("m".into()), Duration::from_millis(500)));
        for wrong in ["0", "0.01", "-1", "inf", "NaN", "1s", "4000"] {
            let error = Args::try_parse_from(["cordisk", "top", &format!("--interval={wrong}")])
                .unwrap_err();
            assert_eq!(error.exit_code(), 2, "{wrong}");
        }
        assert_eq!(
            Args::try_parse_from(["cordisk", "map", "--json", "--png", "x", "i"])
                .unwrap_err()
                .exit_code(),
            2
        );
    }
}
