//! Reading from below before it is time to copy up: a stream has several chunks read at once, and copies them up one after the other.
//!
//! Nothing is held while a chunk is read ahead, and that is right: backing files do not change, and while there is one nothing in the overlay becomes
//! unallocated (H17). So what [`Disk::populate_read`] finds missing under its guard was missing when it was read, and the bytes are still those.
//! What the overlay got meanwhile is skipped like anything it holds (I4).

use std::ops::Range;

use super::Disk;
use super::bounce::Bounce;
use crate::format::Mapping;
use crate::{Error, Result};

/// Bytes from below, read ahead.
#[derive(Debug, Default)]
pub struct Ahead(Vec<Run>);

/// One run of whole clusters (the last one may end with the disk).
#[derive(Debug)]
struct Run {
    range: Range<u64>,
    /// Whole clusters, or why they could not be read.
    bytes: Result<Bounce, Error>,
}

impl Ahead {
    /// The bytes of these clusters, if they are here. That they could not be read is said once: whoever tries again then reads again.
    pub(super) fn take(&mut self, range: &Range<u64>, cluster_size: u64) -> Option<Result<&[u8]>> {
        let index = self.0.iter().position(|run| run.range.start <= range.start && range.end <= run.range.end)?;
        if self.0[index].bytes.is_err() {
            return self.0.swap_remove(index).bytes.err().map(Err);
        }
        let run = &self.0[index];
        let start = (range.start - run.range.start) as usize;
        let len = (range.end - range.start).next_multiple_of(cluster_size) as usize;
        run.bytes.as_ref().ok().map(|bytes| Ok(&bytes[start..start + len]))
    }
}

impl Disk {
    /// What a [`Disk::populate`] of the same arguments would have to read: runs of whole clusters, in order. A hint: it may be copied up meanwhile.
    ///
    /// # Errors
    /// I/O, corruption.
    pub fn to_read(&self, range: Range<u64>, depth: usize) -> Result<Vec<Range<u64>>> {
        self.check_range(&range)?;
        let mut runs = Vec::new();
        let Some(chain) = self.chain() else { return Ok(runs) };
        let aligned = self.aligned(&range);
        let end = aligned.end.min(self.size());
        let mut at = aligned.start;
        while at < end {
            let extent = self.map(at, end - at)?;
            let mut len = extent.len;
            if extent.mapping == Mapping::Unallocated {
                let (reads, run) = self.how_to_copy(&chain, depth, at, extent.len)?;
                len = run;
                if reads.must_be_read(self.geometry().version()) {
                    runs.push(at..at + len);
                }
            }
            at += len;
        }
        Ok(runs)
    }

    /// Reads these runs of whole clusters from below, for [`Disk::populate_read`]. Changes nothing and holds nothing.
    pub fn read_ahead(&self, runs: Vec<Range<u64>>) -> Ahead {
        let Some(chain) = self.chain() else { return Ahead::default() };
        let read = |range: Range<u64>| Run { bytes: self.read_clusters(&chain, range.clone()), range };
        Ahead(runs.into_iter().map(read).collect())
    }
}

#[cfg(test)]
#[expect(clippy::single_range_in_vec_init, reason = "lists of runs that happen to have one")]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::ErrorKind;
    use crate::chain::Chain;
    use crate::disk::Populated;
    use crate::format::{BackingFormat, BackingReference, Geometry, NewImage};
    use crate::image::Image;
    use crate::simulation::{Action, Failure, Fault, SimStorage, Times};

    const CLUSTER: u64 = 4096;

    /// A disk whose last cluster is not whole, above a base with other bytes in every cluster, whose cluster 5 is zero.
    fn disk() -> (Disk, Arc<SimStorage>, Vec<u8>) {
        let size = 16 * CLUSTER - 1024;
        let content: Vec<u8> = (0..size).map(|at| if at / CLUSTER == 5 { 0 } else { 1 + (at / CLUSTER) as u8 }).collect();
        let base = SimStorage::new(content.clone());
        let backing = BackingReference { name: "base.raw".into(), format: Some(BackingFormat::Raw) };
        let new = NewImage { geometry: Geometry::new(3, 12, 4, size).unwrap(), backing: Some(backing) };
        let layout = new.layout().unwrap();
        let mut bytes = vec![0; layout.iter().map(|(at, bytes)| *at as usize + bytes.len()).max().unwrap()];
        for (at, piece) in layout {
            bytes[at as usize..][..piece.len()].copy_from_slice(&piece);
        }
        let image = Image::open(SimStorage::checked(bytes)).unwrap();
        (Disk::for_tests(image, Some(Chain::of_raw(base.clone()))), base, content)
    }

    fn reads_fail(base: &SimStorage) {
        let matches = |operation: &crate::simulation::Operation| operation.action == Action::Read;
        base.inject(Fault { matches: Box::new(matches), after: 0, failure: Failure::Errno(5), times: Times::ForEver });
    }

    /// Protects: I4 without a guard while the base is read. What a guest writes after a chunk was read ahead is never replaced, in the middle of a run
    /// as anywhere, and nothing is read twice.
    #[test]
    fn what_a_guest_wrote_since_stays() {
        let (disk, base, mut content) = disk();
        let size = disk.size();
        assert_eq!(disk.to_read(100..size, 1).unwrap(), [0..size]);
        let ahead = disk.read_ahead(vec![0..size]);
        disk.write(3 * CLUSTER, &[0xee; 2 * CLUSTER as usize]).unwrap();
        content[3 * CLUSTER as usize..][..2 * CLUSTER as usize].fill(0xee);
        reads_fail(&base);
        let populated = disk.populate_read(0..size, 1, ahead).unwrap();
        assert_eq!(populated, Populated { copied: 13 * CLUSTER, zeroed: CLUSTER, skipped: 2 * CLUSTER });
        assert_eq!(base.failures(), 0, "nothing was read twice");
        let mut read = vec![0; size as usize];
        disk.read(0, &mut read).unwrap();
        assert!(read == content);
        assert_eq!(disk.to_read(0..size, 1).unwrap(), []);
        disk.detach_backing(1, None).unwrap();
        disk.close().unwrap();
    }

    /// Protects: a failure of reading ahead is told when the bytes are wanted, once; whoever tries again reads again; and where a guest has written
    /// what could not be read, there is no failure.
    #[test]
    fn a_failure_is_told_once_and_only_if_the_bytes_are_missing() {
        let (disk, base, content) = disk();
        let size = disk.size();
        reads_fail(&base);
        let ahead = disk.read_ahead(vec![0..9 * CLUSTER]);
        base.heal();
        let error = disk.populate_read(0..9 * CLUSTER, 1, ahead).unwrap_err();
        assert_eq!((error.kind(), error.errno()), (ErrorKind::Io, Some(5)));
        assert_eq!(disk.to_read(0..size, 1).unwrap(), [0..size]);
        disk.populate(0..8 * CLUSTER, 1).unwrap();

        reads_fail(&base);
        let ahead = disk.read_ahead(vec![8 * CLUSTER..9 * CLUSTER]);
        disk.write(8 * CLUSTER, &content[8 * CLUSTER as usize..][..CLUSTER as usize]).unwrap();
        disk.populate_read(8 * CLUSTER..9 * CLUSTER, 1, ahead).unwrap();
        base.heal();
        disk.populate(0..size, 1).unwrap();
        let mut read = vec![0; size as usize];
        disk.read(0, &mut read).unwrap();
        assert!(read == content);
    }

    /// Protects: H19 with buffers that are used again: behind the end of the disk a copied cluster is zero, whatever the buffer held.
    #[test]
    fn the_end_of_the_last_cluster_is_zero() {
        let (disk, _, mut content) = disk();
        let size = disk.size();
        disk.populate(0..size, 1).unwrap();
        disk.grow(16 * CLUSTER).unwrap();
        content.resize(16 * CLUSTER as usize, 0);
        let mut read = vec![0; content.len()];
        disk.read(0, &mut read).unwrap();
        assert!(read == content);
    }
}
