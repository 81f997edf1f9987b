//! `cordisk cache fill --order`: brings what an order names into the cache, and nothing else.

use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;

use parking_lot::Mutex;

use super::order::read_order;
use super::order_from_files::{gate, identity_of};
use crate::fetching::SourceConfig;
use crate::map::units;
use engine::chain::{Chain, Namer};
use host::error::Context;
use host::{Error, Result};
use qcow2::format::{BackingFormat, BackingReference};
use remote::url::SourceUrl;

/// Threads that read at the same time: enough for a server that is far away.
const THREADS: usize = 16;

/// What one of them reads at once at most, in bytes.
const PIECE: u64 = 1 << 20;

/// Fetches the ranges of an order of the disk in `url`. Returns what to print.
///
/// # Errors
/// Those of reading the order and the file; the order belongs to another disk; `format` is `None`
/// and the file begins like an image of another format than raw.
pub(super) fn fill(
    url: &SourceUrl,
    path: &Path,
    format: Option<BackingFormat>,
    config: &SourceConfig,
) -> Result<String> {
    let order = read_order(path)?;
    let gate = gate(config, url.as_str())?;
    let reference = BackingReference {
        name: url.as_str().to_owned(),
        format: Some(format.unwrap_or(BackingFormat::Raw)),
    };
    let chain = Chain::open(&reference, Namer::User { directory: Path::new(".") }, &gate)?;
    let identity = identity_of(&chain, &url.to_string(), format)?;
    order.check_base(&identity).context(|| format!("{}: {url}", path.display()))?;
    let pieces: Vec<(u64, u64)> = order
        .wanted()
        .into_iter()
        .flat_map(|range| {
            let end = range.end;
            range.step_by(PIECE as usize).map(move |at| (at, (end - at).min(PIECE)))
        })
        .collect();
    let next = AtomicUsize::new(0);
    let failed: Mutex<Option<Error>> = Mutex::new(None);
    thread::scope(|scope| {
        for _ in 0..THREADS.min(pieces.len()) {
            scope.spawn(|| {
                // The fetcher brings exactly these ranges, and lets those of disks overtake them.
                host::background::mark_thread();
                let mut buffer = vec![0; PIECE as usize];
                while failed.lock().is_none()
                    && let Some(&(offset, len)) = pieces.get(next.fetch_add(1, Ordering::Relaxed))
                {
                    if let Err(error) = chain.read(offset, &mut buffer[..len as usize]) {
                        failed.lock().get_or_insert(error);
                    }
                }
            });
        }
    });
    match failed.into_inner() {
        Some(error) => Err(error),
        None => Ok(format!(
            "{url}: {} in {} ranges are in the cache\n",
            units::size(order.bytes()),
            units::number(order.ranges().len() as u64)
        )),
    }
}
