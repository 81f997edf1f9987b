//! What is where: the disk as a list of extents, the one that `qemu-img map --output=json` prints of the same chain; and as cells, in pictures.
//!
//! **Touches:** facts of the `disk`. **Never:** reads the guest's bytes, writes, holds a range: what changes meanwhile is told as it was or as it is.
//! **Locks:** none.
//! **Invariants:** extents follow each other without a gap; no two neighbours are one by the rule of QEMU ([`join`]), but where one call ended and the
//! next began; the bytes of a cell that are local, zero and remote add up to its length, whoever has counted them. A look may wait for a backing
//! file that hangs, and then nobody waits for it but who asked.

use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use crate::Result;
use crate::chain::Located;
use crate::disk::Disk;

mod cells;
mod legend;
mod offline;
mod picture;
mod png;
#[cfg(test)]
mod tests;
pub mod units;

pub use cells::{Cells, Shares};
pub use offline::OfflineMap;
pub use picture::{Canvas, Colour, Look, picture};
pub use png::write_png;

/// How long one call looks, about: an image can be made of more runs than anybody can count.
const LOOK_TIME: Duration = Duration::from_secs(1);

/// A run of guest bytes that are in one place in one way. The members are those of QEMU's `MapEntry`, in the order in which it prints them.
#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub struct Extent {
    /// The first guest byte.
    pub start: u64,
    /// How many bytes.
    pub length: u64,
    /// The layer that decides, 0 being the overlay.
    pub depth: usize,
    /// That layer holds them; otherwise they are zero because no layer has them.
    pub present: bool,
    /// They read as zero.
    pub zero: bool,
    /// There are bytes for them.
    pub data: bool,
    /// These are packed.
    pub compressed: bool,
    /// Where they are in the file of that layer, in bytes, where they have a place of their own there.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub offset: Option<u64>,
}

impl Extent {
    fn new(start: u64, length: u64, located: Located) -> Extent {
        let Located { depth, present, zero, data, compressed, offset } = located;
        Extent { start, length, depth, present, zero, data, compressed, offset }
    }

    /// Whether `next`, which begins where this ends, is told as one with it (`entry_mergeable` in QEMU's qemu-img.c).
    fn goes_on_in(&self, next: &Extent) -> bool {
        let kind = |extent: &Extent| (extent.depth, extent.present, extent.zero, extent.data, extent.compressed);
        self.start + self.length == next.start && kind(self) == kind(next) && self.offset.map(|at| at + self.length) == next.offset
    }
}

/// Puts `next` behind the list: into its last element where the two are one. For whoever puts lists together that came in pages.
pub fn join(list: &mut Vec<Extent>, next: Extent) {
    match list.last_mut() {
        Some(last) if last.goes_on_in(&next) => last.length += next.length,
        _ => list.push(next),
    }
}

/// Part of the list.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Page {
    /// The extents, of which the last one may go on in the next page where the time was up.
    pub extents: Vec<Extent>,
    /// Where the next page begins, bytes; `None` where the disk ends.
    pub next: Option<u64>,
}

/// The extents from guest byte `from` on, at most `limit` (> 0) of them; none where the disk ends before. Takes about a second at most, and comes at
/// least one run further.
///
/// # Errors
/// I/O, corruption, of the overlay's tables or of a layer below.
pub fn extents(disk: &Disk, from: u64, limit: usize) -> Result<Page> {
    extents_until(disk, from, limit, Instant::now() + LOOK_TIME)
}

fn extents_until(disk: &Disk, from: u64, limit: usize, deadline: Instant) -> Result<Page> {
    let locator = disk.locator(deadline);
    let mut extents: Vec<Extent> = Vec::new();
    let mut at = from;
    while at < locator.size() {
        if at > from && Instant::now() >= deadline {
            return Ok(Page { extents, next: Some(at) });
        }
        let (located, length) = locator.locate(at)?;
        let next = Extent::new(at, length, located);
        if extents.len() == limit && !extents.last().is_some_and(|last| last.goes_on_in(&next)) {
            return Ok(Page { extents, next: Some(at) });
        }
        join(&mut extents, next);
        at += length;
    }
    Ok(Page { extents, next: None })
}

/// All extents of the disk, however long that takes.
///
/// # Errors
/// As [`extents`].
pub fn all(disk: &Disk) -> Result<Vec<Extent>> {
    let mut list = Vec::new();
    let mut from = Some(0);
    while let Some(at) = from {
        let page = extents(disk, at, usize::MAX)?;
        page.extents.into_iter().for_each(|extent| join(&mut list, extent));
        from = page.next;
    }
    Ok(list)
}
