//! The disk as a list of extents, as `qemu-img map --output=json` prints it for the same chain.
//!
//! **Touches:** properties of the `disk`. **Never:** reads the guest's bytes, writes, holds a
//! range: a run that changes meanwhile is listed by its old or its new mapping.
//! **Locks:** none.
//! **Invariants:** extents follow each other without a gap. Neighbours that QEMU would merge
//! ([`join`]) are one extent, except where one call ended and the next began. A call may wait for a
//! backing file that hangs; only its caller waits then.

use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

pub use crate::chain::MapEntry;
use crate::disk::Disk;
use host::Result;

#[cfg(test)]
mod tests;

/// Approximate time limit of one call, because an image can consist of arbitrarily many runs.
const LOOK_TIME: Duration = Duration::from_secs(1);

/// Appends `next` to the list, or merges it into the last extent. Callers use it to join the pages
/// of a list.
pub fn join(list: &mut Vec<MapEntry>, next: MapEntry) {
    match list.last_mut() {
        Some(last) if last.goes_on_in(&next) => last.length += next.length,
        _ => list.push(next),
    }
}

/// A page of the list, and the reply to the command `x-query-map` of the control socket.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub struct Page {
    /// The extents. The last one may continue in the next page if the time limit was reached.
    pub extents: Vec<MapEntry>,
    /// Guest offset in bytes at which the next page begins; `None` at the end of the disk.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub next: Option<u64>,
}

/// Lists the extents from guest offset `from` on, at most `limit` (> 0) of them. A page beyond the
/// end of the disk is empty. A call takes about a second at most, and covers at least one run.
///
/// # Errors
/// I/O errors and corruption, of the overlay's tables or of a layer below.
pub fn extents(disk: &Disk, from: u64, limit: usize) -> Result<Page> {
    extents_until(disk, from, limit, Instant::now() + LOOK_TIME)
}

fn extents_until(disk: &Disk, from: u64, limit: usize, deadline: Instant) -> Result<Page> {
    let locator = disk.locator(deadline);
    let mut extents: Vec<MapEntry> = Vec::new();
    let mut at = from;
    while at < locator.size() {
        if at > from && Instant::now() >= deadline {
            return Ok(Page { extents, next: Some(at) });
        }
        let next = locator.locate(at)?;
        if extents.len() == limit && !extents.last().is_some_and(|last| last.goes_on_in(&next)) {
            return Ok(Page { extents, next: Some(at) });
        }
        at += next.length;
        join(&mut extents, next);
    }
    Ok(Page { extents, next: None })
}

/// Lists all extents of the disk, without a time limit.
///
/// # Errors
/// As [`extents`].
pub fn all(disk: &Disk) -> Result<Vec<MapEntry>> {
    let mut list = Vec::new();
    let mut from = Some(0);
    while let Some(at) = from {
        let page = extents(disk, at, usize::MAX)?;
        page.extents.into_iter().for_each(|extent| join(&mut list, extent));
        from = page.next;
    }
    Ok(list)
}
