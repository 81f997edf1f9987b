//! Early write-out of the clusters that a stream copies. The host starts to write them to disk when
//! their chunk is complete, and not only when a flush of the guest waits for them.
//!
//! A guest's flush makes the whole file durable. If a stream writes faster than the disk, such a
//! flush would have to wait for everything that the page cache has taken meanwhile: hundreds of
//! MiB, which take hundreds of milliseconds. With early write-out the disk is busy from the start,
//! which also makes the stream shorter. A disk that cannot keep up then slows down the stream, for
//! which no guest request waits, instead of the flush.
//!
//! What is left in the page cache all the same is bounded: a stream waits for a pass of write-back
//! when more than a set number of bytes were written into new clusters since the last one began, by
//! it and by the guest.
//!
//! **Invariants:** only what a stream has stored is written out early, and only after their
//! range guard is released. Clusters written by a guest, or copied up by its reads, are not: their
//! requests must not be delayed.

use std::ops::Range;

use super::Disk;
use host::background::Unmarked;

/// Host ranges of new clusters in the overlay's file, in bytes and in the order of writing.
/// Adjacent ranges are merged.
#[derive(Debug, Default, Eq, PartialEq)]
pub(super) struct Placed(Vec<Range<u64>>);

impl Placed {
    /// Adds the host range of clusters that were written.
    pub fn note(&mut self, place: Range<u64>) {
        match self.0.last_mut() {
            Some(last) if last.end == place.start => last.end = place.end,
            _ => self.0.push(place),
        }
    }
}

impl Disk {
    /// Asks the host to start writing the clusters to disk. The caller holds no range.
    pub(super) fn start_write_out(&self, placed: &Placed) {
        let Some(image) = self.overlay.writable() else { return };
        for place in &placed.0 {
            image.storage().start_write_out(place.start, place.end - place.start);
        }
    }
}

impl Disk {
    /// Waits for a pass of write-back if much data that streams and requests have written is not
    /// durable. Called by the threads of a stream. The caller holds no range.
    ///
    /// The stream can be paused or cancelled when the pass has ended. An error is only logged: the
    /// next chunk tries again, and if no write succeeds any more, its own write fails.
    pub(super) fn bound_unwritten(&self) {
        let Some(image) = self.overlay.writable().filter(|image| image.has_much_unwritten()) else {
            return;
        };
        // A guest's flush may wait for the pass.
        let _unmarked = Unmarked::new();
        if let Err(error) = image.flush_if_dirty() {
            log::debug!("a pass for a stream: {error}");
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::chain::Chain;
    use host::storage::WriteKind;
    use qcow2::format::{BackingFormat, NewImage};
    use qcow2::image::Image;
    use sim::{Action, Fault, HostFailure, Repeat, SimStorage};

    const CLUSTER: u64 = 4096;
    const CLUSTERS: u64 = 16;

    /// A disk with copy-on-read above a base in which only cluster 5 is zero.
    fn disk() -> (Disk, Arc<SimStorage>) {
        disk_with_limit(u64::MAX)
    }

    /// The same disk, with a limit of the bytes that a stream leaves in the page cache.
    fn disk_with_limit(unwritten: u64) -> (Disk, Arc<SimStorage>) {
        let size = CLUSTERS * CLUSTER;
        let content: Vec<u8> = (0..size)
            .map(|at| if at / CLUSTER == 5 { 0 } else { 1 + (at / CLUSTER) as u8 })
            .collect();
        let overlay = SimStorage::new(NewImage::file_for_tests(
            12,
            size,
            Some(("base.raw", BackingFormat::Raw)),
        ));
        let mut image = Image::open(overlay.clone()).unwrap();
        image.limit_unwritten(unwritten);
        (
            Disk::for_tests(image, Some(Chain::of_raw(SimStorage::new(content)))).copying_up(true),
            overlay,
        )
    }

    /// Asserts that the host ranges contain the bytes of these guest clusters, in order.
    fn assert_holds(
        overlay: &SimStorage,
        places: &[Range<u64>],
        clusters: impl Iterator<Item = u64>,
    ) {
        let bytes = overlay.bytes();
        let written: Vec<u8> = places
            .iter()
            .flat_map(|place| bytes[place.start as usize..place.end as usize].to_vec())
            .collect();
        let wanted: Vec<u8> =
            clusters.flat_map(|cluster| [1 + cluster as u8; CLUSTER as usize]).collect();
        assert!(written == wanted, "{places:?}");
    }

    /// Protects: every cluster that a stream copies is written out early, once, in the order of
    /// writing and in as few ranges as possible. Clusters that the guest writes, in place or new,
    /// and clusters that its reads copy up are not.
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
        assert_holds(
            &overlay,
            &all,
            (0..CLUSTERS).filter(|cluster| ![2, 3, 5, 7].contains(cluster)),
        );
        disk.populate(0..CLUSTERS * CLUSTER, 1).unwrap();
        disk.write(0, &buf).unwrap();
        disk.flush().unwrap();
        assert_eq!(overlay.write_outs(), all, "nothing is left to be copied");
    }

    fn populate_one_by_one(disk: &Disk) {
        for cluster in 0..CLUSTERS {
            disk.populate(cluster * CLUSTER..(cluster + 1) * CLUSTER, 1).unwrap();
        }
    }

    /// Protects: what a stream has written and no barrier has made durable is bounded. The stream
    /// waits for a pass, and goes on after it.
    #[test]
    fn a_stream_waits_for_what_it_has_written() {
        let (disk, overlay) = disk_with_limit(3 * CLUSTER);
        let copied = || disk.stats().streamed / CLUSTER;
        let hold = overlay.hold(|operation| operation.action == Action::Sync);
        std::thread::scope(|scope| {
            let stream = scope.spawn(|| populate_one_by_one(&disk));
            hold.wait_for(1);
            assert_eq!(copied(), 3, "no barrier has succeeded");
            drop(hold);
            stream.join().unwrap();
        });
        assert_eq!(copied(), CLUSTERS - 1, "one cluster is zero");
        assert_eq!(disk.stats().commits, 4, "after 3, 6, 9 and 12 clusters");
    }

    /// Protects: a pass that fails for a moment does not end the stream that waited for it.
    #[test]
    fn a_failed_pass_does_not_end_a_stream() {
        let (disk, overlay) = disk_with_limit(3 * CLUSTER);
        overlay.inject(Fault {
            matches: Box::new(|operation| operation.action == Action::Write(WriteKind::L2Table)),
            after: 0,
            failure: HostFailure::Errno(28),
            times: Repeat::Once,
        });
        populate_one_by_one(&disk);
        assert_eq!(overlay.failures(), 1);
        assert_eq!(disk.stats().streamed / CLUSTER, CLUSTERS - 1);
        assert_eq!(disk.stats().commits, 4, "the first of five has failed");
        disk.flush().unwrap();
        assert!(!disk.is_dirty());
    }

    /// Protects: when a chunk fails half way, the clusters that were copied before the error stay,
    /// and are written out early.
    #[test]
    fn what_was_copied_before_an_error_is_handed_over() {
        let (disk, overlay) = disk();
        // The zero cluster divides the rest into two runs.
        let second =
            |operation: &sim::Operation| operation.action == Action::Write(WriteKind::NewCluster);
        overlay.inject(Fault {
            matches: Box::new(second),
            after: 1,
            failure: HostFailure::Errno(28),
            times: Repeat::ForEver,
        });
        disk.populate(0..CLUSTERS * CLUSTER, 1).unwrap_err();
        assert_holds(&overlay, &overlay.write_outs(), 0..5);
    }
}
