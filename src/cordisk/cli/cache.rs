//! `cordisk cache` and `cordisk sums`: their options and their checked values.

use std::path::PathBuf;

use clap::Subcommand;

use super::sources::SourceArgs;
use super::values::{FormatArg, OutputArgs, parse_size};
use crate::client::{CacheOptions, SumsOptions};
use host::Result;
use remote::url::SourceUrl;

#[derive(Debug, Subcommand)]
pub(super) enum CacheArgs {
    /// Show the files in the cache, the last used first
    #[command(after_help = "Example: cordisk cache list")]
    List {
        #[command(flatten)]
        directory: DirectoryArgs,
        #[command(flatten)]
        output: OutputArgs,
    },
    /// Fetch a whole file into the cache, before disks of this host need it
    ///
    /// Disks with the same backing file find it there, if they use the same cache. What the cache
    /// has already is not fetched again. With --order, only what machines need to start is fetched.
    #[command(after_help = "Example: cordisk cache fill s3://golden/debian.raw")]
    Fill {
        /// The name of the file, such as s3://golden/debian.raw or https://images.example/a.qcow2
        url: String,
        /// Fetch only what this order names (`cordisk order`)
        #[arg(long, value_name = "FILE")]
        order: Option<PathBuf>,
        /// Format of the file, which --order needs [default: raw, if it does not begin like
        /// another]
        #[arg(short = 'F', long, value_name = "FORMAT", requires = "order")]
        format: Option<FormatArg>,
        #[command(flatten)]
        sources: Box<SourceArgs>,
    },
    /// Drop files that no disk uses, those first that were not used for longest
    #[command(after_help = "Example: cordisk cache prune 20G")]
    Prune {
        /// Leave at most this much, such as 50G; 0 drops everything that is not in use
        #[arg(value_parser = parse_size)]
        size: u64,
        #[command(flatten)]
        directory: DirectoryArgs,
    },
}

#[derive(Debug, clap::Args)]
pub(super) struct DirectoryArgs {
    /// Directory of the cache [default: /var/cache/cordisk for root, ~/.cache/cordisk for others]
    #[arg(long, value_name = "DIR")]
    cache: Option<PathBuf>,
}

#[derive(Debug, clap::Args)]
pub(super) struct SumsArgs {
    /// The file, usually an image that is about to be published
    file: PathBuf,
    /// Write the list to this file [default: FILE.cordisk-sums]
    #[arg(short, long, value_name = "LIST")]
    output: Option<PathBuf>,
}

impl CacheArgs {
    pub(super) fn check(self) -> Result<CacheOptions> {
        Ok(match self {
            CacheArgs::List { directory, output } => {
                CacheOptions::List { directory: directory.cache, json: output.is_json() }
            }
            CacheArgs::Fill { url, order, format, sources } => CacheOptions::Fill {
                url: SourceUrl::parse(&url)?,
                order,
                format: format.map(Into::into),
                sources: Box::new(sources.check(&[])?),
            },
            CacheArgs::Prune { size, directory } => {
                CacheOptions::Prune { directory: directory.cache, size }
            }
        })
    }
}

impl From<SumsArgs> for SumsOptions {
    fn from(args: SumsArgs) -> Self {
        SumsOptions { file: args.file, output: args.output }
    }
}
