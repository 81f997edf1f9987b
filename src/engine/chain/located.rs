//! Finding the layer that decides a run of bytes, and the place of the run in its file: the data of
//! `qemu-img map`.

use std::time::Instant;

use serde::{Deserialize, Serialize};

use super::layer::{Layer, LayerAnswer};
use super::{Chain, Decision};
use host::Result;
use qcow2::image::Location;

/// A run of guest bytes with one kind of place, in the terms of QEMU (`bdrv_co_do_block_status`,
/// and `get_block_status` of qemu-img). The members are those of QEMU's `MapEntry`, in the order in
/// which QEMU prints them.
#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub struct MapEntry {
    /// Guest offset of the first byte.
    pub start: u64,
    /// Length in bytes.
    pub length: u64,
    /// Index of the layer that decides; 0 is the uppermost layer asked.
    pub depth: usize,
    /// Whether that layer holds the run. Otherwise no layer does, and it reads as zero because the
    /// chain, or a shorter layer in it, ends.
    pub present: bool,
    /// Whether the run reads as zero.
    pub zero: bool,
    /// Whether the run has bytes in the file.
    pub data: bool,
    /// Whether these bytes are compressed.
    pub compressed: bool,
    /// Offset of the run in that layer's file, in bytes, if it has a place of its own there.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub offset: Option<u64>,
}

impl MapEntry {
    /// A run of `length` bytes at `start` that no layer holds, because the chain, or the layer
    /// below the one at `depth`, ends before it.
    pub(crate) fn absent(start: u64, length: u64, depth: usize) -> MapEntry {
        MapEntry {
            start,
            length,
            depth,
            present: false,
            zero: true,
            data: false,
            compressed: false,
            offset: None,
        }
    }

    /// A run of `length` bytes at `start` that has this place in the image at depth 0; `None` if
    /// the image leaves the run to the next layer.
    pub(crate) fn of(start: u64, length: u64, place: Location) -> Option<MapEntry> {
        let there = MapEntry { present: true, zero: false, ..MapEntry::absent(start, length, 0) };
        match place {
            Location::Below { .. } => None,
            Location::Zero { offset } => Some(MapEntry { zero: true, offset, ..there }),
            Location::Data { offset, hole } => {
                Some(MapEntry { data: true, zero: hole, offset: Some(offset), ..there })
            }
            Location::Compressed => Some(MapEntry { data: true, compressed: true, ..there }),
            // qemu-img map cannot express this, and gives up. Reported as data, so that no program
            // skips it.
            Location::Unreadable => Some(MapEntry { data: true, ..there }),
        }
    }

    /// Whether QEMU would merge `next` into this extent (`entry_mergeable` in qemu-img.c). `next`
    /// must begin where this extent ends.
    pub(crate) fn goes_on_in(&self, next: &MapEntry) -> bool {
        let kind = |extent: &MapEntry| {
            (extent.depth, extent.present, extent.zero, extent.data, extent.compressed)
        };
        self.start + self.length == next.start
            && kind(self) == kind(next)
            && self.offset.map(|at| at + self.length) == next.offset
    }
}

impl Chain {
    /// Whether the byte at `offset` is inside the first layer, in whole sectors as QEMU counts.
    pub fn reaches(&self, offset: u64) -> bool {
        self.layers.first().is_some_and(|layer| offset < layer.whole_sectors())
    }

    /// Finds the bytes at `offset`, for which [`Chain::reaches`] is true: the run there of at most
    /// `max` (> 0) bytes. Optional details that are not known by `deadline` are left out.
    ///
    /// # Errors
    /// I/O errors, corruption.
    pub fn locate(&self, offset: u64, max: u64, deadline: Instant) -> Result<MapEntry> {
        let mut asked = 0;
        // The place that the last layer asked has reserved for the run, without holding it.
        let mut reserved = None;
        let decided = self.decide(
            usize::MAX,
            (offset, max),
            Layer::whole_sectors,
            &mut asked,
            |layer, len| {
                let (place, len) = layer.place(offset, len, deadline)?;
                if let Location::Below { offset } = place {
                    reserved = offset;
                }
                Ok(MapEntry::of(offset, len, place)
                    .map_or(LayerAnswer::Below(len), |entry| LayerAnswer::Here(entry, len)))
            },
        );
        let absent = |len, depth: usize| MapEntry {
            offset: reserved,
            ..MapEntry::absent(offset, len, depth.saturating_sub(1))
        };
        let entry = decided.map(|(decision, len)| match decision {
            Decision::By(depth, entry) => MapEntry { depth, ..entry },
            Decision::PastEnd(depth) => absent(len, depth),
            Decision::Nobody => absent(len, self.layers.len()),
        });
        self.proven(asked, entry)
    }
}
