//! How the program starts its fetcher, the process that reads from servers, and what it opens over
//! it.
//!
//! ```text
//! serving process ──▶ keeper ──▶ cordisk-fetcher     at the start, and after each death of it
//!      ▲   the line: a socket, and two files of the cache   │
//!      └────────────────────────────────────────────────────┘
//! ```
//! The fetcher is a program of its own (`cordisk-fetcher`, feature `remote`), so that nothing of
//! TLS, HTTP and credentials is part of the processes that read images and mount. A command without
//! a keeper (`create`, `cache fill`) starts it directly.
//!
//! **Touches:** the fetcher process. **Never:** connects to a server.
//! **Invariants:** no credential is in an argument; the fetcher finds them in its environment and
//! in the files that its configuration names. Those of the environment of `cordisk mount` are in no
//! other environment of its processes, and in the memory of the keeper.

use std::ffi::{OsStr, OsString};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;

use host::Result;
use host::error::Context;
use remote::line::{FetcherLine, Starter};
use remote::url::SourceUrl;
use remote::{RemoteOptions, Sources};

mod child;
mod credentials;

pub use child::Fetchers;
pub use credentials::Credentials;

/// The name of the fetcher's program.
const PROGRAM: &str = "cordisk-fetcher";

/// The variable that names the fetcher's program, instead of a place beside this one.
const PROGRAM_VARIABLE: &str = "CORDISK_FETCHER";

/// The cache that `--cache` names.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub enum CacheSetting {
    /// The default directory of the user.
    #[default]
    Default,
    /// This directory.
    Directory(PathBuf),
    /// Nothing is kept.
    None,
}

/// The options that concern remote files.
#[derive(Clone, Debug, Default)]
pub struct SourceConfig {
    /// The configuration file.
    pub file: Option<PathBuf>,
    /// The cache.
    pub cache: CacheSetting,
    /// The limit of the cache in bytes.
    pub cache_size: Option<u64>,
    /// How long a read waits for a source; `None` waits for as long as the source is away.
    pub patience: Option<Duration>,
    /// Files without a strong identity are accepted.
    pub unpinned: bool,
    /// The digest of the chunk list of the first backing file.
    pub digest: Option<String>,
    /// The prefixes below which an image may name files.
    pub allowed: Vec<SourceUrl>,
    /// Orders may be written beside those files (`--learn`).
    pub writes_orders: bool,
}

impl SourceConfig {
    /// The same, with a name that the user has given in addition to the prefixes that are allowed.
    #[must_use]
    pub fn also(mut self, name: &str) -> SourceConfig {
        // Names of files of this host are no URLs.
        self.allowed.extend(SourceUrl::parse(name));
        self
    }
}

/// How the fetcher is started.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct FetcherPlan {
    /// The program.
    pub program: PathBuf,
    /// Its arguments.
    pub arguments: Vec<OsString>,
}

impl FetcherPlan {
    /// The plan for these options. `nothing_kept` is the directory for the files of `--cache none`.
    ///
    /// # Errors
    /// The path of this program is not known.
    pub fn new(config: &SourceConfig, nothing_kept: &Path) -> Result<FetcherPlan> {
        let mut arguments: Vec<OsString> = Vec::new();
        let mut add = |name: &str, value: &OsStr| {
            let mut argument = OsString::from(format!("--{name}="));
            argument.push(value);
            arguments.push(argument);
        };
        if let Some(file) = &config.file {
            add("sources", file.as_os_str());
        }
        match &config.cache {
            CacheSetting::Default => {}
            CacheSetting::Directory(directory) => add("cache", directory.as_os_str()),
            CacheSetting::None => add("keep-nothing", nothing_kept.as_os_str()),
        }
        for prefix in &config.allowed {
            add("allow", OsStr::new(&prefix.as_prefix()));
        }
        if let Some(size) = config.cache_size {
            add("cache-size", OsStr::new(&size.to_string()));
        }
        if config.writes_orders {
            arguments.push("--write-orders".into());
        }
        Ok(FetcherPlan { program: program()?, arguments })
    }

    /// A function that starts the fetcher as a child of this process, for commands without a
    /// keeper.
    pub fn starter(self) -> Starter {
        let fetchers = Mutex::new(Fetchers::default());
        // The fetcher inherits the environment of this process, which ends soon.
        Box::new(move || fetchers.lock().start(&self, &Credentials::default()))
    }
}

/// The path of the fetcher: where the variable says, beside this program, or in its `libexec`.
fn program() -> Result<PathBuf> {
    if let Some(path) = std::env::var_os(PROGRAM_VARIABLE) {
        return Ok(path.into());
    }
    let ours = std::env::current_exe().context(|| "the path of this program")?;
    let beside = ours.with_file_name(PROGRAM);
    let packaged = ours.parent().and_then(Path::parent).map(|prefix| {
        [prefix, Path::new("libexec/cordisk"), Path::new(PROGRAM)].iter().collect::<PathBuf>()
    });
    Ok(packaged.filter(|path| !beside.exists() && path.exists()).unwrap_or(beside))
}

/// Opens remote files over a fetcher that `starter` starts when the first one is opened.
pub fn sources(config: &SourceConfig, starter: Starter) -> Arc<Sources> {
    let options = RemoteOptions {
        patience: config.patience,
        unpinned: config.unpinned,
        digest: config.digest.clone(),
    };
    Arc::new(Sources::new(Arc::new(FetcherLine::new(starter)), options, config.allowed.clone()))
}
