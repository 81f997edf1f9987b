//! `cordisk create`: its options and their checked values.

use std::path::PathBuf;

use super::sources::SourceArgs;
use super::values::{FormatArg, parse_cluster_size, parse_size};
use super::{Command, Refused};
use engine::create::CreateOptions;

/// Cluster size of a new overlay without subclusters, in bytes: QEMU's default.
const CLUSTER_SIZE: u64 = 64 << 10;
/// Cluster size of a new overlay with subclusters, in bytes: a subcluster has 4 KiB then, which is
/// the page of most guests and the block of most file systems, and the tables are as large as those
/// of clusters of 64 KiB without subclusters. docs/performance.md has the measurement.
const EXTENDED_CLUSTER_SIZE: u64 = 128 << 10;

#[derive(Debug, clap::Args)]
pub(super) struct CreateArgs {
    /// The file to create; it must not exist
    overlay: PathBuf,
    /// Backing file: a file or block device of this host, or a file on a server (https://, http://,
    /// s3://, gs://, az://, nbd://, nbds://, nbd+unix://). The name is stored as given; a relative
    /// one is relative to the directory of OVERLAY
    #[arg(short, long = "backing", value_name = "BASE")]
    base: String,
    /// Format of the backing file; it is never guessed
    #[arg(short = 'F', long = "backing-format", value_name = "FORMAT")]
    format: FormatArg,
    /// Size of the disk in bytes, such as 20G or 1.5TiB [default: that of the backing file]
    #[arg(value_parser = parse_size)]
    size: Option<u64>,
    /// Unit of allocation, a power of two from 512 to 2M [default: 128K with subclusters, otherwise
    /// 64K]
    #[arg(long, value_name = "SIZE", value_parser = parse_cluster_size)]
    cluster_size: Option<u64>,
    /// Whether each cluster has 32 subclusters, which are copied up one by one. QEMU can read such
    /// an image from version 5.2 on; clusters have at least 16K [default: on, off with a cluster
    /// size]
    #[arg(
        long,
        value_name = "on|off",
        num_args = 0..=1,
        require_equals = true,
        default_missing_value = "on",
        value_parser = parse_switch,
    )]
    extended_l2: Option<bool>,
    /// The same options in the words of qemu-img: cluster_size=SIZE, extended_l2=on|off, separated
    /// by commas; may be given several times
    #[arg(short, value_name = "OPTIONS", value_delimiter = ',', value_parser = parse_option)]
    options: Vec<ImageOption>,
    /// Let the backing file, if it is a remote image with a backing file of its own, name remote
    /// files below this prefix; may be given several times [default: none]
    #[arg(long = "backing-url", value_name = "PREFIX")]
    backing_urls: Vec<String>,
    #[command(flatten)]
    sources: SourceArgs,
}

/// An option of `-o`.
#[derive(Clone, Copy, Debug)]
enum ImageOption {
    ClusterSize(u64),
    ExtendedL2(bool),
}

fn parse_option(text: &str) -> Result<ImageOption, String> {
    let (name, value) = text.split_once('=').unwrap_or((text, "on"));
    match (name, value) {
        ("cluster_size", size) => parse_cluster_size(size).map(ImageOption::ClusterSize),
        ("extended_l2", switch) => parse_switch(switch).map(ImageOption::ExtendedL2),
        _ => Err("expected cluster_size=SIZE or extended_l2=on|off".to_string()),
    }
}

fn parse_switch(text: &str) -> Result<bool, String> {
    match text {
        "on" => Ok(true),
        "off" => Ok(false),
        _ => Err("expected on or off".to_string()),
    }
}

impl CreateArgs {
    /// Turns the typed arguments into a checked command. Of an option that is given twice, the last
    /// one counts, as for qemu-img; those of `-o` count last.
    pub(super) fn check(self) -> Result<Command, Refused> {
        let (mut cluster_size, mut extended_l2) = (self.cluster_size, self.extended_l2);
        for option in self.options {
            match option {
                ImageOption::ClusterSize(size) => cluster_size = Some(size),
                ImageOption::ExtendedL2(is_on) => extended_l2 = Some(is_on),
            }
        }
        // A cluster size alone is the unit of copying up as well.
        let extended_l2 = extended_l2.unwrap_or(cluster_size.is_none());
        let default = if extended_l2 { EXTENDED_CLUSTER_SIZE } else { CLUSTER_SIZE };
        let options = CreateOptions {
            overlay: self.overlay,
            base: self.base,
            format: self.format.into(),
            size: self.size,
            cluster_size: cluster_size.unwrap_or(default),
            extended_l2,
        };
        Ok(Command::Create(options, Box::new(self.sources.check(&self.backing_urls)?)))
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::super::Args;
    use super::*;
    use qcow2::format::BackingFormat;

    fn created(rest: &[&str]) -> CreateOptions {
        let line = [&["cordisk", "create", "o", "-b", "base"], rest].concat();
        match Args::try_parse_from(line).unwrap().check().unwrap() {
            Command::Create(options, _) => options,
            other => panic!("not create: {other:?}"),
        }
    }

    #[test]
    fn create_takes_the_size_as_an_option() {
        let options = created(&["-F", "raw"]);
        assert_eq!(
            (options.size, options.cluster_size, options.extended_l2, options.base.as_str()),
            (None, 128 << 10, true, "base")
        );
        let options = created(&["-F", "qcow2", "1G", "--cluster-size", "4K"]);
        assert_eq!(
            (options.size, options.cluster_size, options.extended_l2, options.format),
            (Some(1 << 30), 4096, false, BackingFormat::Qcow2)
        );
    }

    #[test]
    fn subclusters_are_asked_for_in_our_words_and_in_those_of_qemu_img() {
        for (asked, cluster_size, extended_l2) in [
            (&["--extended-l2"] as &[&str], 128 << 10, true),
            (&["--extended-l2=on"], 128 << 10, true),
            (&["--extended-l2", "4G"], 128 << 10, true),
            (&["--extended-l2=off"], 64 << 10, false),
            (&["-o", "extended_l2=off"], 64 << 10, false),
            (&["--extended-l2", "--cluster-size", "64K"], 64 << 10, true),
            (&["-o", "extended_l2=on"], 128 << 10, true),
            (&["-o", "extended_l2"], 128 << 10, true),
            (&["-o", "extended_l2=on,cluster_size=32k"], 32 << 10, true),
            (&["-o", "cluster_size=32k", "-o", "extended_l2=off"], 32 << 10, false),
            (&["--cluster-size", "4K", "-o", "cluster_size=2M"], 2 << 20, false),
        ] {
            let options = created(&[&["-F", "raw"], asked].concat());
            assert_eq!(
                (options.cluster_size, options.extended_l2),
                (cluster_size, extended_l2),
                "{asked:?}"
            );
        }
        for wrong in
            ["extended_l2=yes", "extended_l2=", "cluster_size=1000", "lazy_refcounts=on", ""]
        {
            let line = ["cordisk", "create", "o", "-b", "base", "-F", "raw", "-o", wrong];
            assert!(Args::try_parse_from(line).is_err(), "{wrong:?}");
        }
    }
}
