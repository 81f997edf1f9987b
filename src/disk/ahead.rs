//! Reading from below before it is time to copy up: a stream has several chunks read at once, and copies them up one after the other.
//!
//! Nothing is held while a chunk is read ahead, and that is right: backing files do not change, and while there is one nothing in the overlay becomes
//! unallocated (H17). So what [`Disk::populate_read`] finds missing under its guard was missing when it was read, and the bytes are still those.
//! What the overlay got meanwhile is skipped like anything it holds (I4). What can be cloned is not read at all; where that turns out to be impossible
//! it is read when it is copied up.

use std::ops::Range;

use super::Disk;
use super::bounce::Bounce;
use super::populate::Way;
use crate::chain::Chain;
use crate::format::Mapping;
use crate::{Error, Result};

/// What has to be read before a range can be copied up.
#[derive(Debug, Default)]
pub struct ToRead {
    /// Whole clusters (the last run may end with the disk), in order.
    runs: Vec<Range<u64>>,
    /// From where on it could not be found out, up to where, and why.
    unknown: Option<(Range<u64>, Error)>,
}

impl ToRead {
    /// What is to be read.
    #[cfg(test)]
    pub(super) fn runs(&self) -> &[Range<u64>] {
        &self.runs
    }

    /// Whether there is nothing to read.
    pub fn is_empty(&self) -> bool {
        self.runs.is_empty()
    }

    /// Where that ends which was looked at and has to be read, or could not be looked at; `None` where there is no such thing.
    pub fn end(&self) -> Option<u64> {
        let last = self.runs.last().map(|run| run.end);
        self.unknown.as_ref().map(|(range, _)| range.end).or(last)
    }
}

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
    /// The error of reading any of these clusters, which are still missing. It is told once: whoever tries again then reads again.
    pub(super) fn check(&mut self, missing: &Range<u64>) -> Result<()> {
        let failed = |run: &Run| run.bytes.is_err() && run.range.start < missing.end && missing.start < run.range.end;
        match self.0.iter().position(failed) {
            Some(index) => self.0.swap_remove(index).bytes.map(drop),
            None => Ok(()),
        }
    }

    /// The bytes of these clusters, if they are here.
    pub(super) fn get(&self, range: &Range<u64>, cluster_size: u64) -> Option<&[u8]> {
        let run = self.0.iter().find(|run| run.bytes.is_ok() && run.range.start <= range.start && range.end <= run.range.end)?;
        let start = (range.start - run.range.start) as usize;
        let len = (range.end - range.start).next_multiple_of(cluster_size) as usize;
        run.bytes.as_ref().ok().map(|bytes| &bytes[start..start + len])
    }
}

impl Disk {
    /// What a [`Disk::populate`] of the same arguments would have to read. A hint: it may be copied up meanwhile.
    pub fn to_read(&self, range: Range<u64>, depth: usize) -> ToRead {
        let mut to_read = ToRead::default();
        let Some(chain) = self.chain() else { return to_read };
        let aligned = self.aligned(&range);
        let end = aligned.end.min(self.size());
        let mut at = aligned.start;
        while at < end {
            match self.next_to_read(&chain, depth, at..end) {
                Ok((must_be_read, len)) => {
                    if must_be_read {
                        to_read.runs.push(at..at + len);
                    }
                    at += len;
                }
                Err(error) => {
                    to_read.unknown = Some((at..end, error));
                    break;
                }
            }
        }
        to_read
    }

    /// Whether the clusters at the start of `range` have to be read, and for how many bytes that is so.
    fn next_to_read(&self, chain: &Chain, depth: usize, range: Range<u64>) -> Result<(bool, u64)> {
        let extent = self.map(range.start, range.end - range.start)?;
        if extent.mapping != Mapping::Unallocated {
            return Ok((false, extent.len));
        }
        let (way, len) = self.how_to_copy(chain, depth, range.start, extent.len)?;
        Ok((matches!(way, Way::Read), len))
    }

    /// Reads from below, for [`Disk::populate_read`]. Changes nothing and holds nothing.
    pub fn read_ahead(&self, to_read: ToRead) -> Ahead {
        let Some(chain) = self.chain() else { return Ahead::default() };
        let read = |range: Range<u64>| Run { bytes: self.read_clusters(&chain, range.clone()), range };
        let unknown = to_read.unknown.map(|(range, error)| Run { range, bytes: Err(error) });
        Ahead(to_read.runs.into_iter().map(read).chain(unknown).collect())
    }
}

#[cfg(test)]
#[expect(clippy::single_range_in_vec_init, reason = "lists of runs that happen to have one")]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::ErrorKind;
    use crate::disk::Populated;
    use crate::format::{BackingFormat, BackingReference, Geometry, NewImage};
    use crate::image::Image;
    use crate::simulation::{Action, Failure, Fault, SimStorage, Times};

    const CLUSTER: u64 = 4096;

    /// A disk whose last cluster is not whole, above a base with other bytes in every cluster, whose cluster 5 is zero.
    fn disk() -> (Disk, Arc<SimStorage>, Vec<u8>, Arc<SimStorage>) {
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
        let overlay = SimStorage::checked(bytes);
        let image = Image::open(overlay.clone()).unwrap();
        (Disk::for_tests(image, Some(Chain::of_raw(base.clone()))), base, content, overlay)
    }

    fn reads_fail(base: &SimStorage) {
        let matches = |operation: &crate::simulation::Operation| operation.action == Action::Read;
        base.inject(Fault { matches: Box::new(matches), after: 0, failure: Failure::Errno(5), times: Times::ForEver });
    }

    /// Protects: I4 without a guard while the base is read. What a guest writes after a chunk was read ahead is never replaced, in the middle of a run
    /// as anywhere, and nothing is read twice.
    #[test]
    fn what_a_guest_wrote_since_stays() {
        let (disk, base, mut content, _) = disk();
        let size = disk.size();
        assert_eq!(disk.to_read(100..size, 1).runs, [0..size]);
        let ahead = disk.read_ahead(disk.to_read(0..size, 1));
        disk.write(3 * CLUSTER, &[0xee; 2 * CLUSTER as usize]).unwrap();
        content[3 * CLUSTER as usize..][..2 * CLUSTER as usize].fill(0xee);
        reads_fail(&base);
        let populated = disk.populate_read(0..size, 1, ahead).unwrap();
        assert_eq!(populated, Populated { copied: 13 * CLUSTER, zeroed: CLUSTER, skipped: 2 * CLUSTER });
        assert_eq!(base.failures(), 0, "nothing was read twice");
        let mut read = vec![0; size as usize];
        disk.read(0, &mut read).unwrap();
        assert!(read == content);
        assert_eq!(disk.to_read(0..size, 1).runs, []);
        disk.detach_backing(1, None).unwrap();
        disk.close().unwrap();
    }

    /// Protects: a failure of reading ahead is told when the bytes are wanted, once; whoever tries again reads again; and where a guest has written
    /// what could not be read, there is no failure.
    #[test]
    fn a_failure_is_told_once_and_only_if_the_bytes_are_missing() {
        let (disk, base, content, _) = disk();
        let size = disk.size();
        reads_fail(&base);
        let ahead = disk.read_ahead(disk.to_read(0..9 * CLUSTER, 1));
        base.heal();
        let error = disk.populate_read(0..9 * CLUSTER, 1, ahead).unwrap_err();
        assert_eq!((error.kind(), error.errno()), (ErrorKind::Io, Some(5)));
        assert_eq!(disk.to_read(0..size, 1).runs, [0..size]);
        disk.populate(0..8 * CLUSTER, 1).unwrap();

        reads_fail(&base);
        let ahead = disk.read_ahead(disk.to_read(8 * CLUSTER..9 * CLUSTER, 1));
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
        let (disk, _, content, overlay) = disk();
        let size = disk.size();
        disk.populate(0..size, 1).unwrap();
        // What debug builds fill buffers with.
        assert!(!overlay.bytes().contains(&0xb5));
        let mut read = vec![0; content.len()];
        disk.read(0, &mut read).unwrap();
        assert!(read == content);
    }
}
