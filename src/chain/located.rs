//! Which layer decides what bytes are, and where it has them: the facts of `qemu-img map`, run by run.

use std::time::Instant;

use super::Chain;
use crate::Result;
use crate::image::Place;

/// Where a run of guest bytes is, as QEMU tells it (`bdrv_co_do_block_status` and `get_block_status` of qemu-img).
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Located {
    /// The layer that decides, 0 being the uppermost that was asked.
    pub depth: usize,
    /// That layer holds it. Otherwise no layer does: it is zero because the chain, or a shorter layer in it, ends.
    pub present: bool,
    /// It reads as zero.
    pub zero: bool,
    /// There are bytes for it.
    pub data: bool,
    /// They are packed.
    pub compressed: bool,
    /// Where it is in the file of that layer, in bytes, where it has a place of its own there.
    pub offset: Option<u64>,
}

impl Located {
    /// What a layer says of it; `None` where that one leaves it to the next, which reaches so far (`reached`).
    pub fn of(place: Place, depth: usize, reached: bool) -> Option<Located> {
        let nowhere = Located { depth, present: false, zero: false, data: false, compressed: false, offset: None };
        let there = Located { present: true, ..nowhere };
        match place {
            Place::Below if reached => None,
            Place::Below => Some(Located { zero: true, ..nowhere }),
            Place::Zero { offset } => Some(Located { zero: true, offset, ..there }),
            Place::Data { offset, hole } => Some(Located { data: true, zero: hole, offset: Some(offset), ..there }),
            Place::Compressed => Some(Located { data: true, compressed: true, ..there }),
            // qemu-img map has no word for it, and gives up. That it is data nobody can miss.
            Place::Unreadable => Some(Located { data: true, ..there }),
        }
    }
}

impl Chain {
    /// Whether the byte at `offset` is inside of the first layer, as QEMU counts.
    pub fn reaches(&self, offset: u64) -> bool {
        self.layers.first().is_some_and(|layer| offset < layer.whole_sectors())
    }

    /// Where the bytes at `offset` are, which [`Chain::reaches`], and for how many that is so, at most `max` (> 0). What would take longer than to
    /// `deadline` to find out is left out where it is a nicety.
    ///
    /// # Errors
    /// I/O, corruption.
    pub fn locate(&self, offset: u64, max: u64, deadline: Instant) -> Result<(Located, u64)> {
        let mut len = max;
        for (depth, layer) in self.layers.iter().enumerate() {
            let place;
            (place, len) = match layer.place(offset, len, deadline) {
                Ok(found) => found,
                Err(error) => return self.proven(depth + 1, Err(error)),
            };
            let reached = self.layers.get(depth + 1).is_some_and(|below| offset < below.whole_sectors());
            if let Some(located) = Located::of(place, depth, reached) {
                return self.proven(depth + 1, Ok((located, len)));
            }
        }
        unreachable!("the last layer has none below it")
    }
}
