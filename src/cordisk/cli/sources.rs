//! The options of remote backing files, which several commands have.

use std::path::PathBuf;
use std::time::Duration;

use clap::ValueEnum;

use super::values::{absolute, parse_size};
use crate::fetching::{CacheSetting, SourceConfig};
use host::{Error, ErrorKind, Result};
use remote::url::SourceUrl;

/// The longest `--source-timeout`, in seconds: a day.
const LONGEST: u64 = 24 * 60 * 60;

#[derive(Debug, clap::Args)]
#[command(next_help_heading = "Remote backing files")]
pub(super) struct SourceArgs {
    /// Configuration of servers: endpoints, regions, certificates, and the files with credentials.
    /// What it does not say comes from the environment (AWS_*, GOOGLE_*, AZURE_*) [default:
    /// /etc/cordisk/sources.toml, if it exists]
    #[arg(long, value_name = "FILE")]
    sources: Option<PathBuf>,
    /// Directory of the cache, which all disks of this user on this host share. `none` keeps what
    /// was fetched no longer than the disk is mounted [default: /var/cache/cordisk for root,
    /// ~/.cache/cordisk for others]
    #[arg(long, value_name = "DIR|none")]
    cache: Option<PathBuf>,
    /// Limit of the cache: when a remote file is opened, files that were not used for longest are
    /// dropped until the cache is no larger; files in use are never dropped [default: no limit]
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    cache_size: Option<u64>,
    /// How long a read waits for a server that does not answer
    #[arg(long, value_name = "SECONDS", default_value_t = 60)]
    #[arg(value_parser = clap::value_parser!(u64).range(1..=LONGEST))]
    source_timeout: u64,
    /// What happens then: `error` fails the read with an I/O error, `wait` goes on waiting for as
    /// long as the server is away
    #[arg(long, value_name = "ACTION", default_value = "error")]
    on_source_error: SourceErrorArg,
    /// Accept a file to which its server gives no strong identity (ETag, version). Whether its
    /// content changes is then not noticed, unless there is a chunk list
    #[arg(long)]
    unpinned: bool,
    /// Compare each chunk of the backing file with its chunk list before it is used. The list lies
    /// beside the file as NAME.cordisk-sums; `cordisk sums` makes it, and prints this digest
    #[arg(long, value_name = "sha256:HEX")]
    base_digest: Option<String>,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum SourceErrorArg {
    Error,
    Wait,
}

impl SourceArgs {
    /// `allowed`: the prefixes of `--backing-url`, as typed.
    pub(super) fn check(self, allowed: &[String]) -> Result<SourceConfig> {
        let cache = match self.cache {
            None => CacheSetting::Default,
            Some(none) if none.as_os_str() == "none" => CacheSetting::None,
            Some(directory) => CacheSetting::Directory(absolute(&directory)?),
        };
        if cache == CacheSetting::None && self.cache_size.is_some() {
            return Err(Error::new(
                ErrorKind::InvalidArgument,
                "--cache-size: there is no cache with --cache none; leave one of them out",
            ));
        }
        let patience = match self.on_source_error {
            SourceErrorArg::Error => Some(Duration::from_secs(self.source_timeout)),
            SourceErrorArg::Wait => None,
        };
        Ok(SourceConfig {
            file: self.sources.as_deref().map(absolute).transpose()?,
            cache,
            cache_size: self.cache_size,
            patience,
            unpinned: self.unpinned,
            digest: self.base_digest.as_deref().map(remote::sums::parse_digest).transpose()?,
            allowed: allowed
                .iter()
                .map(|prefix| {
                    SourceUrl::parse_prefix(prefix).map_err(|error| error.context("--backing-url"))
                })
                .collect::<Result<_>>()?,
            writes_orders: false,
        })
    }
}
