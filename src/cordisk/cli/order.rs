//! `cordisk order`: its options and their checked values.

use std::path::PathBuf;
use std::time::Duration;

use clap::Subcommand;
use clap_complete::engine::ArgValueCompleter;

use super::completion::disks;
use super::sources::SourceArgs;
use super::values::{FormatArg, OutputArgs};
use crate::client::{FromFilesOptions, OrderOptions, OrderSaveOptions};
use host::Result;

/// The longest `--time`, in seconds: a day.
const LONGEST: u64 = 24 * 60 * 60;

#[derive(Debug, Subcommand)]
pub(super) enum OrderArgs {
    /// Save what the machine of a mounted disk has read first
    ///
    /// The order has what was read of the base, and of what a stream has brought, since the disk
    /// was mounted. As BASE.order beside the base, the streams of other disks of that base follow
    /// it.
    #[command(
        after_help = "Example: cordisk order save /run/vm/disk -o /images/debian.qcow2.order"
    )]
    Save {
        /// Mountpoint or QMP socket of the disk
        #[arg(value_name = "DISK", add = ArgValueCompleter::new(disks))]
        target: PathBuf,
        /// Only what was read in so many seconds after the disk was mounted
        #[arg(long, value_name = "SECONDS")]
        within: Option<u64>,
        /// Write the order to this file, as a whole or not at all [default: standard output]
        #[arg(short, long, value_name = "FILE")]
        output: Option<PathBuf>,
    },
    /// Merge orders of one disk into one
    ///
    /// What more of them have counts more, and the mean place decides what comes first. Times do
    /// not matter, so slow and fast machines can be mixed.
    #[command(
        after_help = "Example: cordisk order merge monday.order tuesday.order > debian.order"
    )]
    Merge {
        /// The orders; all belong to the same disk
        #[arg(required = true, value_name = "FILE")]
        files: Vec<PathBuf>,
        /// Write the result to this file, as a whole or not at all [default: standard output]
        #[arg(short, long, value_name = "FILE")]
        output: Option<PathBuf>,
    },
    /// Show an order: what was touched when, and where on the disk
    ///
    /// Draws the disk as rows of characters. Each shows its first touch: 0 for the first tenth of
    /// the touched bytes, 9 for the last. Below stand the times, the number of records, and the
    /// disk that the order belongs to.
    #[command(after_help = "Example: cordisk order show debian.order")]
    Show {
        /// The order
        file: PathBuf,
        #[command(flatten)]
        output: OutputArgs,
        /// Write a PNG with one square for each part of the disk; `-` is standard output. A file
        /// that exists is replaced
        #[arg(long, value_name = "FILE", conflicts_with_all = ["json", "output"])]
        png: Option<PathBuf>,
    },
    /// Make an order from the files on a base, before a machine was started from it
    ///
    /// Reads the partition table and the ext4 file systems of the base, finds the boot loader, the
    /// kernel, and what Linux needs up to a login, and lists their blocks in that order. With PATH,
    /// these files and directories of the guest are listed instead. What was found and what was
    /// left out is printed on standard error. The search runs in a process that can open nothing.
    #[command(after_help = "Example: cordisk order from-files debian.raw > debian.order")]
    FromFiles(Box<FromFilesArgs>),
    /// Search a disk: what `from-files` starts
    #[command(hide = true)]
    Search,
}

#[derive(Debug, clap::Args)]
pub(super) struct FromFilesArgs {
    /// The base: a file or block device of this host, or a file on a server (https://, http://,
    /// s3://, gs://, az://, nbd://, nbds://, nbd+unix://)
    base: String,
    /// Files and directories of the guest, such as /srv/app; `*` and `?` stand for parts of one
    /// name [default: what Linux needs to boot]
    #[arg(value_name = "PATH")]
    paths: Vec<String>,
    /// Format of the base [default: raw, if it does not begin like another]
    #[arg(short = 'F', long, value_name = "FORMAT")]
    format: Option<FormatArg>,
    /// End the search after this time, with what was found until then
    #[arg(long, value_name = "SECONDS", default_value_t = 60)]
    #[arg(value_parser = clap::value_parser!(u64).range(1..=LONGEST))]
    time: u64,
    /// Write the result to this file, as a whole or not at all [default: standard output]
    #[arg(short, long, value_name = "FILE")]
    output: Option<PathBuf>,
    /// Let the base, if it is a remote image with a backing file, name remote files below this
    /// prefix; may be given several times [default: none]
    #[arg(long = "backing-url", value_name = "PREFIX")]
    backing_urls: Vec<String>,
    #[command(flatten)]
    sources: SourceArgs,
}

impl OrderArgs {
    pub(super) fn check(self) -> Result<OrderOptions> {
        Ok(match self {
            OrderArgs::Save { target, within, output } => OrderOptions::Save(OrderSaveOptions {
                target,
                within: within.map(Duration::from_secs),
                output,
            }),
            OrderArgs::Merge { files, output } => OrderOptions::Merge { files, output },
            OrderArgs::Show { file, output, png } => {
                OrderOptions::Show { file, json: output.is_json(), png }
            }
            OrderArgs::FromFiles(args) => OrderOptions::FromFiles(Box::new(FromFilesOptions {
                base: args.base,
                format: args.format.map(Into::into),
                paths: args.paths,
                time: Duration::from_secs(args.time),
                output: args.output,
                sources: Box::new(args.sources.check(&args.backing_urls)?),
            })),
            OrderArgs::Search => OrderOptions::Search,
        })
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::super::{Args, Command};
    use super::*;

    fn options(line: &[&str]) -> OrderOptions {
        let Command::Order(options) = Args::try_parse_from(line).unwrap().check().unwrap() else {
            panic!("not order")
        };
        options
    }

    #[test]
    fn from_files_takes_a_base_and_paths() {
        let line = ["cordisk", "order", "from-files", "b", "/etc", "/srv/*", "--time", "7"];
        let OrderOptions::FromFiles(options) = options(&line) else { panic!("not from-files") };
        assert_eq!((options.base.as_str(), options.format), ("b", None));
        assert_eq!(options.paths, ["/etc", "/srv/*"]);
        assert_eq!((options.time, options.output), (Duration::from_secs(7), None));
    }

    #[test]
    fn merge_and_show_take_what_they_say() {
        let OrderOptions::Merge { files, output } =
            options(&["cordisk", "order", "merge", "a", "b", "-o", "c"])
        else {
            panic!("not merge")
        };
        assert_eq!((files, output), (vec!["a".into(), "b".into()], Some("c".into())));
        let OrderOptions::Show { file, json, png } =
            options(&["cordisk", "order", "show", "--json", "a"])
        else {
            panic!("not show")
        };
        assert_eq!((file, json, png), ("a".into(), true, None));
        for line in [
            &["cordisk", "order"][..],
            &["cordisk", "order", "merge"],
            &["cordisk", "order", "show"],
            &["cordisk", "order", "show", "a", "b"],
            &["cordisk", "order", "show", "--json", "--png", "p", "a"],
            &["cordisk", "order", "from-files"],
            &["cordisk", "order", "from-files", "--time", "0", "a"],
            &["cordisk", "order", "search", "a"],
        ] {
            assert_eq!(Args::try_parse_from(line).unwrap_err().exit_code(), 2, "{line:?}");
        }
    }
}
