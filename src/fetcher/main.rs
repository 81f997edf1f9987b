//! The program `cordisk-fetcher`: the process that reads remote backing files for a mounted disk.
//! `cordisk` starts it; standard input is the socket to the process that asks.

use std::io::Write;
use std::os::fd::AsFd;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::Parser;

use fetcher::Permissions;
use fetcher::config::SourcesConfig;
use fetcher::confine;
use fetcher::serve::{CacheChoice, LineLog};
use remote::cache::CacheDirectory;
use remote::url::SourceUrl;

/// Reads remote backing files for cordisk, which starts it; not for use by hand.
#[derive(Debug, Parser)]
#[command(name = "cordisk-fetcher", version, max_term_width = 100)]
struct FetcherArgs {
    /// The configuration of sources
    #[arg(long, value_name = "FILE")]
    sources: Option<PathBuf>,
    /// The directory of the cache
    #[arg(long, value_name = "DIR")]
    cache: Option<PathBuf>,
    /// The limit of the cache in bytes
    #[arg(long, value_name = "BYTES")]
    cache_size: Option<u64>,
    /// Open files below this prefix only; may be given several times
    #[arg(long, value_name = "PREFIX")]
    allow: Vec<String>,
    /// Write orders beside the files that may be opened
    #[arg(long)]
    write_orders: bool,
    /// Keep what is fetched in files without a name in this directory, and only until it is in the
    /// image
    #[arg(long, value_name = "DIR", conflicts_with = "cache")]
    keep_nothing: Option<PathBuf>,
}

fn main() -> ExitCode {
    fetcher::panic_in_one_line();
    match run(FetcherArgs::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // The process that has started this one logs the line.
            let _ = writeln!(std::io::stderr(), "{error}");
            ExitCode::FAILURE
        }
    }
}

fn run(args: FetcherArgs) -> host::Result<()> {
    let socket = fetcher::serve::line_of(std::io::stdin().as_fd())?;
    // Started first, so that the warnings of the configuration and of the cache are not lost.
    let log = LineLog::start();
    let opened = open(&args);
    match opened {
        Ok((config, cache, permissions)) => {
            fetcher::serve::serve(socket, config, cache, permissions, log)
        }
        // The process that asks gets the reason with its first request.
        Err(error) => fetcher::serve::refuse_all(&socket, &error, &log),
    }
}

/// Reads the configuration, opens the cache and confines the process.
fn open(args: &FetcherArgs) -> host::Result<(SourcesConfig, CacheChoice, Permissions)> {
    let prefixes = args.allow.iter().map(|prefix| SourceUrl::parse_prefix(prefix));
    let prefixes = prefixes.collect::<host::Result<_>>()?;
    let permissions = Permissions { prefixes, writes_orders: args.write_orders };
    let config = match &args.sources {
        Some(file) => SourcesConfig::load(file)?,
        None => SourcesConfig::load_default()?,
    };
    let cache = match &args.keep_nothing {
        Some(directory) => CacheChoice::None { directory: directory.clone() },
        None => {
            let path = args.cache.clone().map_or_else(CacheDirectory::default_path, Ok)?;
            CacheChoice::Shared(CacheDirectory::open(&path, args.cache_size)?)
        }
    };
    config
        .network()
        .runtime()
        .map_err(|error| host::Error::new(host::ErrorKind::Io, error.to_string()))?;
    confine::enter(&config, cache.path())?;
    Ok((config, cache, permissions))
}
