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

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::chain::Chain;
    use crate::format::{BackingFormat, BackingReference, Geometry, NewImage};
    use crate::image::Image;
    use crate::simulation::{Action, Failure, Fault, SimStorage, Times};
    use crate::storage::WriteKind;

    const CLUSTER: u64 = 4096;
    const CLUSTERS: u64 = 16;

    /// A disk that copies up what is read, above a base without zeros but in cluster 5.
    fn disk() -> (Disk, Arc<SimStorage>) {
        let size = CLUSTERS * CLUSTER;
        let content: Vec<u8> = (0..size).map(|at| if at / CLUSTER == 5 { 0 } else { 1 + (at / CLUSTER) as u8 }).collect();
        let backing = BackingReference { name: "base.raw".into(), format: Some(BackingFormat::Raw) };
        let new = NewImage { geometry: Geometry::new(3, 12, 4, size).unwrap(), backing: Some(backing) };
        let overlay = SimStorage::new(Vec::new());
        for (at, piece) in new.layout().unwrap() {
            crate::storage::Storage::write_at(&*overlay, WriteKind::Header, at, &piece).unwrap();
        }
        let image = Image::open(overlay.clone()).unwrap();
        (Disk::for_tests(image, Some(Chain::of_raw(SimStorage::new(content)))).copying_up(true), overlay)
    }

    /// The bytes of the ranges are those of these guest clusters, in order.
    fn assert_holds(overlay: &SimStorage, places: &[Range<u64>], clusters: impl Iterator<Item = u64>) {
        let bytes = overlay.bytes();
        let written: Vec<u8> = places.iter().flat_map(|place| bytes[place.start as usize..place.end as usize].to_vec()).collect();
        let wanted: Vec<u8> = clusters.flat_map(|cluster| [1 + cluster as u8; CLUSTER as usize]).collect();
        assert!(written == wanted, "{places:?}");
    }

    /// Protects: everything that is copied for a stream is handed over, once, in the order of writing and in as few pieces as it lies in; nothing of
    /// what a guest writes, in place or anew, and nothing of what its reads copy up, is.
    #[test]
    fn only_what_a_stream_has_copied_is_handed_over() {
        let (disk, overlay) = disk();
        let mut buf = vec![0; CLUSTER as usize];
        disk.write(2 * CLUSTER, &buf).unwrap();
        disk.write(2 * CLUSTER + 100, &[9; 10]).unwrap();
        disk.write(3 * CLUSTER, &[9; 10]).unwrap();
        disk.read(7 * CLUSTER, &mut buf).unwrap();
        disk.flush().unwrap();
        assert_eq!(overlay.write_outs(), []);

        disk.populate(0..2 * CLUSTER, 1).unwrap();
        let first = overlay.write_outs();
        assert_eq!(first.len(), 1, "neighbours are one: {first:?}");
        assert_holds(&overlay, &first, 0..2);
        disk.populate(0..CLUSTERS * CLUSTER, 1).unwrap();
        let all = overlay.write_outs();
        assert!(all.len() < 1 + 3, "three runs more, and some are neighbours: {all:?}");
        assert_holds(&overlay, &all, (0..CLUSTERS).filter(|cluster| ![2, 3, 5, 7].contains(cluster)));
        disk.populate(0..CLUSTERS * CLUSTER, 1).unwrap();
        disk.write(0, &buf).unwrap();
        disk.flush().unwrap();
        assert_eq!(overlay.write_outs(), all, "nothing is left to be copied");
    }

    /// Protects: a chunk that fails half way has handed over what was copied before, which stays.
    #[test]
    fn what_was_copied_before_an_error_is_handed_over() {
        let (disk, overlay) = disk();
        // The zero cluster divides the rest into two runs.
        let second = |operation: &crate::simulation::Operation| operation.action == Action::Write(WriteKind::NewCluster);
        overlay.inject(Fault { matches: Box::new(second), after: 1, failure: Failure::Errno(28), times: Times::ForEver });
        disk.populate(0..CLUSTERS * CLUSTER, 1).unwrap_err();
        assert_holds(&overlay, &overlay.write_outs(), 0..5);
    }
}
