//! Early write-out: what a stream has copied is on its way to the disk when its chunk is done, and not only when a guest's flush waits for it.
//!
//! A flush of the guest makes all of the file durable. A stream that writes faster than the disk would leave it everything that the page cache
//! has taken meanwhile: hundreds of MiB, and as many milliseconds. Handed over chunk by chunk, the disk is busy from the start, which makes the
//! stream shorter as well, and a disk that cannot keep up slows the stream down, where nobody waits, instead of the flush.
//!
//! **Invariants:** only new clusters that nobody else writes yet are handed over, only after their guard is given up, only by who keeps no guest
//! waiting: not what the guest has written, and not what its reads have copied up.

use std::ops::Range;

use super::{Disk, Overlay};

/// Where new clusters lie in the file of the overlay, bytes, in the order of writing; neighbours are one.
#[derive(Debug, Default, Eq, PartialEq)]
pub(super) struct Placed(Vec<Range<u64>>);

impl Placed {
    /// These were written as well.
    pub fn note(&mut self, place: Range<u64>) {
        match self.0.last_mut() {
            Some(last) if last.end == place.start => last.end = place.end,
            _ => self.0.push(place),
        }
    }
}

impl Disk {
    /// Hands the clusters over to the disk. Nothing is held.
    pub(super) fn start_write_out(&self, placed: &Placed) {
        let Overlay::Writable(image) = &self.overlay else { return };
        for place in &placed.0 {
            image.reader().storage().start_write_out(place.start, place.end - place.start);
        }
    }
}
