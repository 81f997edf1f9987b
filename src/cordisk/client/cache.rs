//! `cordisk cache` and `cordisk sums`: the cache of remote files on this host, and the chunk lists
//! that name content.

use std::io::{IsTerminal, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::SystemTime;

use serde::Serialize;

use super::cache_order;
use crate::fetching::{self, CacheSetting, FetcherPlan, SourceConfig};
use crate::map::units;
use host::error::{Context, one_line};
use host::storage::{Need, ReadAt};
use host::{Error, ErrorKind, Result};
use qcow2::format::BackingFormat;
use remote::cache::{CacheDirectory, ObjectFacts};
use remote::sums::ChunkList;
use remote::url::SourceUrl;

/// What `cache fill` asks for at once, in bytes.
const STEP: u64 = 64 << 20;

/// How far ahead of that it says what it will need, in bytes.
const AHEAD: u64 = 256 << 20;

/// The suffix of chunk lists.
const SUMS: &str = ".cordisk-sums";

/// `cordisk cache`.
#[derive(Clone, Debug)]
pub enum CacheOptions {
    /// Show what is in it.
    List {
        /// The directory; `None` is the default one.
        directory: Option<PathBuf>,
        /// Print JSON.
        json: bool,
    },
    /// Fetch a whole file.
    Fill {
        /// Its name.
        url: SourceUrl,
        /// Only what this order names.
        order: Option<PathBuf>,
        /// The format of the file, for the order.
        format: Option<BackingFormat>,
        /// How it is read.
        sources: Box<SourceConfig>,
    },
    /// Drop files that are not in use.
    Prune {
        /// The directory; `None` is the default one.
        directory: Option<PathBuf>,
        /// The size in bytes that is left at most.
        size: u64,
    },
}

/// `cordisk sums`.
#[derive(Clone, Debug)]
pub struct SumsOptions {
    /// The file to read.
    pub file: PathBuf,
    /// The list to write; `None` is beside the file.
    pub output: Option<PathBuf>,
}

/// Runs `cordisk cache`.
///
/// # Errors
/// Those of the cache and of the fetcher.
pub fn cache(options: &CacheOptions) -> Result<ExitCode> {
    match options {
        CacheOptions::List { directory, json } => list(directory.as_deref(), *json),
        CacheOptions::Fill { url, order, format, sources } => {
            fill(url, order.as_deref(), *format, sources)
        }
        CacheOptions::Prune { directory, size } => prune(directory.as_deref(), *size),
    }
    .map(|()| ExitCode::SUCCESS)
}

fn open(directory: Option<&Path>) -> Result<CacheDirectory> {
    let path = directory.map_or_else(CacheDirectory::default_path, |path| Ok(path.to_owned()))?;
    if !path.exists() {
        return Err(Error::new(
            ErrorKind::NotFound,
            format!("{}: there is no cache; --cache DIR names another one", path.display()),
        ));
    }
    CacheDirectory::open(&path, None)
}

/// A file of the cache, as `--json` prints it.
#[derive(Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
struct CachedFile<'a> {
    key: &'a str,
    name: Option<&'a str>,
    size: Option<u64>,
    present: u64,
    durable: u64,
    allocated: u64,
    last_used: Option<u64>,
    in_use: bool,
}

fn list(directory: Option<&Path>, json: bool) -> Result<()> {
    let mut files = open(directory)?.list()?;
    files.sort_by_key(|file| std::cmp::Reverse(file.last_used));
    let text = if json {
        let files: Vec<CachedFile<'_>> = files.iter().map(as_json).collect();
        serde_json::to_string_pretty(&files)
            .map_err(|error| Error::wrap(ErrorKind::InvalidArgument, "JSON", error))?
            + "\n"
    } else {
        table(&files)
    };
    print(&text)
}

fn as_json(file: &ObjectFacts) -> CachedFile<'_> {
    CachedFile {
        key: &file.key,
        name: file.name.as_deref(),
        size: file.pin.as_ref().map(|pin| pin.size),
        present: file.present_bytes,
        durable: file.durable_bytes,
        allocated: file.allocated_bytes,
        last_used: file
            .last_used
            .duration_since(SystemTime::UNIX_EPOCH)
            .ok()
            .map(|since| since.as_secs()),
        in_use: file.in_use,
    }
}

fn table(files: &[ObjectFacts]) -> String {
    if files.is_empty() {
        return "the cache is empty\n".to_owned();
    }
    let row = |file: &ObjectFacts| {
        let size = file.pin.as_ref().map(|pin| pin.size);
        [
            units::size(file.present_bytes),
            size.map_or_else(|| "?".to_owned(), |size| units::percent(file.present_bytes, size)),
            if file.in_use { "in use" } else { "" }.to_owned(),
            one_line(file.name.as_deref().unwrap_or(&file.key)),
        ]
    };
    let heading = ["PRESENT", "OF IT", "", "NAME"].map(str::to_owned);
    let rows: Vec<[String; 4]> = std::iter::once(heading).chain(files.iter().map(row)).collect();
    let width =
        |column: usize| rows.iter().map(|row| row[column].chars().count()).max().unwrap_or(0);
    let widths = [width(0), width(1), width(2)];
    let mut text = String::new();
    for [present, part, state, name] in &rows {
        let [a, b, c] = widths;
        text += format!("{present:>a$}  {part:>b$}  {state:<c$}  {name}").trim_end();
        text.push('\n');
    }
    let total: u64 = files.iter().map(|file| file.allocated_bytes).sum();
    text + &format!("{} on the disk\n", units::size(total))
}

fn prune(directory: Option<&Path>, size: u64) -> Result<()> {
    let pruned = open(directory)?.prune(size)?;
    let files = if pruned.objects == 1 { "file" } else { "files" };
    print(&format!(
        "{} {files} dropped ({}), {} left\n",
        pruned.objects,
        units::size(pruned.bytes),
        units::size(pruned.left)
    ))
}

/// Fetches a whole file, or what an order names of it, so that disks of this host find it in the
/// cache.
fn fill(
    url: &SourceUrl,
    order: Option<&Path>,
    format: Option<BackingFormat>,
    config: &SourceConfig,
) -> Result<()> {
    if config.cache == CacheSetting::None {
        return Err(Error::new(ErrorKind::InvalidArgument, "--cache none keeps nothing to fill"));
    }
    if let Some(order) = order {
        return print(&cache_order::fill(url, order, format, config)?);
    }
    let config = config.clone().also(url.as_str());
    let starter = FetcherPlan::new(&config, Path::new("/"))?.starter();
    let file = fetching::sources(&config, starter).open(url, None)?;
    let size = file.size();
    let bar = std::io::stderr().is_terminal().then(|| {
        let style = indicatif::ProgressStyle::with_template(
            "{bytes:>10} of {total_bytes}  {wide_bar} {binary_bytes_per_sec:>12}  {eta}",
        );
        let bar = indicatif::ProgressBar::new(size);
        if let Ok(style) = style {
            bar.set_style(style);
        }
        bar
    });
    let mut asked = 0;
    let mut at = 0;
    while at < size {
        while asked < size && asked < at + AHEAD {
            file.will_need(asked, STEP, Need::Later);
            asked += STEP;
        }
        file.bring_in(at, STEP).context(|| url.to_string())?;
        at = (at + STEP).min(size);
        if let Some(bar) = &bar {
            bar.set_position(at);
        }
    }
    if let Some(bar) = bar {
        bar.finish_and_clear();
    }
    print(&format!("{url}: {} are in the cache\n", units::size(size)))
}

/// Runs `cordisk sums`: writes the chunk list of a file, and prints its digest.
///
/// # Errors
/// Those of reading the file and of writing the list.
pub fn sums(options: &SumsOptions) -> Result<ExitCode> {
    let list = ChunkList::of_file(&options.file)?;
    let output = options.output.clone().unwrap_or_else(|| {
        let mut name = options.file.clone().into_os_string();
        name.push(SUMS);
        name.into()
    });
    std::fs::write(&output, list.to_bytes()).context(|| output.display().to_string())?;
    print(&format!("sha256:{}  {}\n", list.digest(), output.display()))?;
    Ok(ExitCode::SUCCESS)
}

fn print(text: &str) -> Result<()> {
    std::io::stdout().write_all(text.as_bytes()).map_err(Error::standard_output)
}
