//! `cordisk order from-files`: the order of a base that no machine was started from, found from the
//! files on it.

use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use super::boot_search;
use super::order::{refuse_terminal, write_order};
use crate::fetching::{self, FetcherPlan, SourceConfig};
use bootset::{BootSet, BootSetLimits};
use engine::chain::{Chain, Gate, Namer};
use host::error::{Context, one_line};
use host::{Error, ErrorKind, Result};
use order::{BaseIdentity, Order, Touch};
use qcow2::format::{BackingFormat, BackingReference, signature};

/// The options of `cordisk order from-files`.
#[derive(Clone, Debug)]
pub struct FromFilesOptions {
    /// The base: a file or block device of this host, or a name of a remote file.
    pub base: String,
    /// Its format; `None` is raw, unless the base begins like an image of another format.
    pub format: Option<BackingFormat>,
    /// Files and directories of the guest, instead of the built-in list.
    pub paths: Vec<String>,
    /// How long the search takes at most.
    pub time: Duration,
    /// The file to write; `None` is standard output.
    pub output: Option<PathBuf>,
    /// How a remote base is read.
    pub sources: Box<SourceConfig>,
}

/// What the files of a base say, and which disk it is.
#[derive(Debug)]
pub struct FromFiles {
    /// The ranges and notes.
    pub found: BootSet,
    /// The identity of the disk.
    pub identity: BaseIdentity,
}

impl FromFiles {
    /// Makes an order of one record.
    pub fn into_order(self) -> Order {
        let touches = self.found.ranges.iter().map(|range| Touch {
            offset: range.start,
            len: range.end - range.start,
            at_ms: 0,
        });
        Order::from_touches(self.identity, touches)
    }
}

/// Runs `cordisk order from-files`: writes the order, and the notes to standard error.
///
/// # Errors
/// Those of [`from_files`] and of writing; standard output is a terminal.
pub fn run(options: &FromFilesOptions) -> Result<()> {
    if options.output.is_none() {
        refuse_terminal("an order")?;
    }
    let until = Instant::now().checked_add(options.time);
    let limits = BootSetLimits { until, ..BootSetLimits::default() };
    let gate = gate(&options.sources, &options.base)?;
    let from = from_files(&options.base, options.format, &gate, &options.paths, &limits)?;
    for note in &from.found.notes {
        // An error is ignored: the order is what was asked for.
        let _ = writeln!(io::stderr(), "{}", one_line(note));
    }
    write_order(&from.into_order(), options.output.as_deref())
}

/// Finds what a boot of `base` needs: opens the base and all that is below it, as a backing file is
/// opened, and searches it in a process that can do nothing else ([`boot_search::search`]).
///
/// # Errors
/// Those of [`Chain::open`]; [`ErrorKind::InvalidArgument`] if `format` is `None` and the base
/// begins like an image of another format than raw; those of [`boot_search::search`].
pub fn from_files(
    base: &str,
    format: Option<BackingFormat>,
    gate: &Gate,
    paths: &[String],
    limits: &BootSetLimits,
) -> Result<FromFiles> {
    let reference = BackingReference {
        name: base.to_owned(),
        format: Some(format.unwrap_or(BackingFormat::Raw)),
    };
    let chain = Chain::open(&reference, Namer::User { directory: Path::new(".") }, gate)?;
    let size = chain.size();
    let identity = identity_of(&chain, base, format)?;
    let read = |offset: u64, buf: &mut [u8]| chain.read(offset, buf);
    let found = boot_search::search(size, read, paths, limits).context(|| base.to_owned())?;
    Ok(FromFiles { found, identity })
}

/// What an order of the base belongs to.
///
/// # Errors
/// Those of reading; [`ErrorKind::InvalidArgument`] if `format` is `None` and the base begins like
/// an image of another format than raw.
pub(super) fn identity_of(
    chain: &Chain,
    base: &str,
    format: Option<BackingFormat>,
) -> Result<BaseIdentity> {
    let mut head = Vec::new();
    let identity = BaseIdentity::of(
        chain.size(),
        |buf| {
            chain.read(0, buf).context(|| base.to_owned())?;
            head = buf.to_vec();
            Ok(())
        },
        None,
    )?;
    if let Some((name, _)) = signature(&head).filter(|_| format.is_none()) {
        return Err(Error::new(
            ErrorKind::InvalidArgument,
            format!(
                "{base}: begins like a {name} image: say which format it has with -F raw or -F qcow2"
            ),
        ));
    }
    Ok(identity)
}

/// The gate for a base that the user has named.
pub(super) fn gate(sources: &SourceConfig, base: &str) -> Result<Gate> {
    let sources = sources.clone().also(base);
    let starter = FetcherPlan::new(&sources, &std::env::temp_dir())?.starter();
    Ok(Gate { sources: Some(fetching::sources(&sources, starter)), ..Gate::default() })
}
