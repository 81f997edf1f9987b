//! Reading ahead from below: reader threads of a stream read several chunks at the same time, and
//! the job's thread copies them up one after the other.
//!
//! No range is held while a chunk is read ahead. That is correct because backing files do not
//! change, and because no cluster of the overlay becomes unallocated while there is a backing file
//! (H17). Clusters that [`Disk::populate_read`] finds missing under its guard were therefore also
//! missing when they were read, and their bytes are still right. Clusters that the overlay holds by
//! then are skipped (I4). Clusters that can be cloned are not read ahead; if the clone fails, they
//! are read when they are copied up.

use std::ops::Range;

use super::Disk;
use super::bounce::Bounce;
use super::populate::CopyMethod;
use crate::chain::{Chain, Cloneable};
use host::storage::Need;
use host::{Error, Result};
use qcow2::format::Mapping;

/// The runs that must be read before a range can be copied up.
#[derive(Debug, Default)]
pub struct ToRead {
    /// Runs of whole subclusters (the last run may end with the disk), in order.
    runs: Vec<Range<u64>>,
    /// The range that could not be examined, and the error.
    unknown: Option<(Range<u64>, Error)>,
}

impl ToRead {
    /// The runs to read.
    #[cfg(test)]
    pub(super) fn runs(&self) -> &[Range<u64>] {
        &self.runs
    }

    /// Whether there is nothing to read. A range that could not be examined does not count.
    pub fn is_empty(&self) -> bool {
        self.runs.is_empty()
    }

    /// End, in bytes, of the last range that must be read or could not be examined; `None` if there
    /// is no such range.
    pub fn end(&self) -> Option<u64> {
        let last = self.runs.last().map(|run| run.end);
        self.unknown.as_ref().map(|(range, _)| range.end).or(last)
    }
}

/// Bytes from below that were read ahead.
#[derive(Debug, Default)]
pub struct Ahead(Vec<ReadRun>);

/// One run of whole subclusters (the last one may end with the disk).
#[derive(Debug)]
struct ReadRun {
    range: Range<u64>,
    /// The bytes of the whole subclusters, or the error of reading them.
    bytes: Result<Bounce, Error>,
}

impl Ahead {
    /// Whether nothing was read.
    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Returns the error of reading any of these clusters, which are still missing. The error is
    /// returned once: a caller that tries again makes the read again.
    pub(super) fn check(&mut self, missing: &Range<u64>) -> Result<()> {
        let failed = |run: &ReadRun| {
            run.bytes.is_err() && run.range.start < missing.end && missing.start < run.range.end
        };
        match self.0.iter().position(failed) {
            Some(index) => self.0.swap_remove(index).bytes.map(drop),
            None => Ok(()),
        }
    }

    /// The bytes of these subclusters, if they were read ahead. `subcluster_size` is in bytes.
    pub(super) fn get(&self, range: &Range<u64>, subcluster_size: u64) -> Option<&[u8]> {
        let run = self.0.iter().find(|run| {
            run.bytes.is_ok() && run.range.start <= range.start && range.end <= run.range.end
        })?;
        let start = (range.start - run.range.start) as usize;
        let len = (range.end - range.start).next_multiple_of(subcluster_size) as usize;
        run.bytes.as_ref().ok().map(|bytes| &bytes[start..start + len])
    }
}

impl Disk {
    /// The runs that a [`Disk::populate`] with the same arguments would have to read. A hint: other
    /// requests may copy them up meanwhile.
    pub(crate) fn to_read(&self, range: Range<u64>, depth: usize) -> ToRead {
        self.runs_to_read(range, depth, |_, _| Ok(()))
    }

    /// As [`Disk::to_read`], and calls `clone` for each range that will be cloned instead. If it
    /// fails, the range counts as one that could not be examined.
    fn runs_to_read(
        &self,
        range: Range<u64>,
        depth: usize,
        clone: impl Fn(Cloneable<'_>, Range<u64>) -> Result<()>,
    ) -> ToRead {
        let mut to_read = ToRead::default();
        let Some(chain) = self.chain() else { return to_read };
        let aligned = self.aligned(&range);
        let end = aligned.end.min(self.size());
        let mut at = aligned.start;
        while at < end {
            match self.next_to_read(&chain, depth, at..end, &clone) {
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

    /// Says to the layers below which clusters of the range a [`Disk::populate`] with this depth
    /// will read or clone. A hint: errors are left to the populate.
    pub(crate) fn will_need(&self, range: Range<u64>, depth: usize, need: Need) {
        let Some(chain) = self.chain() else { return };
        let (mut at, end) = (range.start, range.end.min(self.size()));
        while at < end {
            let Ok(extent) = self.map(at, end - at) else { return };
            if extent.mapping == Mapping::Unallocated {
                chain.will_need(depth, at..at + extent.len, need);
            }
            at += extent.len;
        }
    }

    /// Whether a layer is a remote file.
    pub fn has_remote_layer(&self) -> bool {
        self.chain().is_some_and(|chain| chain.has_remote())
    }

    /// Whether a lookup in the chain may wait for a server, because a remote layer has tables.
    pub(crate) fn has_remote_tables(&self) -> bool {
        self.chain().is_some_and(|chain| chain.has_remote_tables())
    }

    /// Takes back what [`Disk::will_need`] has said.
    pub(crate) fn need_no_more(&self) {
        self.chain().iter().for_each(|chain| chain.need_no_more());
    }

    /// Whether the clusters at the start of `range` must be read, and the number of bytes to which
    /// that applies.
    fn next_to_read(
        &self,
        chain: &Chain,
        depth: usize,
        range: Range<u64>,
        clone: impl Fn(Cloneable<'_>, Range<u64>) -> Result<()>,
    ) -> Result<(bool, u64)> {
        let extent = self.map(range.start, range.end - range.start)?;
        if extent.mapping != Mapping::Unallocated {
            return Ok((false, extent.len));
        }
        let (way, len) = self.how_to_copy(chain, depth, range.start, extent.len)?;
        if let CopyMethod::Clone(from) = way {
            clone(from, range.start..range.start + len)?;
        }
        Ok((matches!(way, CopyMethod::Read), len))
    }

    /// The end of the cluster that contains the last byte before `end`.
    pub(crate) fn end_of_clusters(&self, end: u64) -> u64 {
        self.aligned(&(0..end)).end
    }

    /// As [`Disk::read_ahead`] of [`Disk::to_read`]. Afterwards the cache of remote layers has what
    /// is to be cloned, too. Waits for servers, and so is left to threads that may hang.
    pub(crate) fn bring_ahead(&self, range: Range<u64>, depth: usize) -> Ahead {
        let to_read = self.runs_to_read(range, depth, |from, range| from.bring(range));
        self.read_ahead(to_read)
    }

    /// Reads the runs from below, for [`Disk::populate_read`]. Changes nothing and holds no range.
    pub(crate) fn read_ahead(&self, to_read: ToRead) -> Ahead {
        let Some(chain) = self.chain() else { return Ahead::default() };
        let read = |range: Range<u64>| ReadRun {
            bytes: self.read_subclusters(&chain, range.clone()),
            range,
        };
        let unknown = to_read.unknown.map(|(range, error)| ReadRun { range, bytes: Err(error) });
        Ahead(to_read.runs.into_iter().map(read).chain(unknown).collect())
    }
}

#[cfg(test)]
#[expect(clippy::single_range_in_vec_init, reason = "lists of runs that happen to have one")]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::disk::Populated;
    use host::ErrorKind;
    use qcow2::format::{BackingFormat, NewImage};
    use qcow2::image::Image;
    use sim::{Action, Fault, HostFailure, Repeat, SimStorage};

    const CLUSTER: u64 = 4096;

    /// A disk that ends inside its last cluster, above a base with different bytes in every
    /// cluster; cluster 5 is zero.
    fn disk() -> (Disk, Arc<SimStorage>, Vec<u8>, Arc<SimStorage>) {
        let size = 16 * CLUSTER - 1024;
        let content: Vec<u8> = (0..size)
            .map(|at| if at / CLUSTER == 5 { 0 } else { 1 + (at / CLUSTER) as u8 })
            .collect();
        let base = SimStorage::new(content.clone());
        let overlay = SimStorage::checked(NewImage::file_for_tests(
            12,
            size,
            Some(("base.raw", BackingFormat::Raw)),
        ));
        let image = Image::open(overlay.clone()).unwrap();
        (Disk::for_tests(image, Some(Chain::of_raw(base.clone()))), base, content, overlay)
    }

    /// Protects: a thread that gives way holds a piece of whole clusters at a time, and the rest of
    /// what it copies up stays free for the guest. The result is the same.
    #[test]
    fn a_thread_that_gives_way_holds_a_piece_at_a_time() {
        const PIECE: u64 = host::background::PIECE as u64;
        for (bits, held) in [(15, PIECE), (16, PIECE), (18, 1 << 18)] {
            let size = 1 << 20;
            let content: Vec<u8> = (0..size).map(|at| (at / 512 % 255 + 1) as u8).collect();
            let backing = Some(("base.raw", BackingFormat::Raw));
            let overlay = SimStorage::checked(NewImage::file_for_tests(bits, size, backing));
            let base = Chain::of_raw(SimStorage::new(content.clone()));
            let disk = Disk::for_tests(Image::open(overlay.clone()).unwrap(), Some(base));
            let data = Action::Write(host::storage::WriteKind::NewCluster);
            let hold = overlay.hold(move |operation| operation.action == data);
            std::thread::scope(|scope| {
                let stream = scope.spawn(|| {
                    host::background::set_gives_way(true);
                    let ahead = disk.read_ahead(disk.to_read(0..size, 1));
                    disk.populate_read(0..size, 1, ahead).unwrap()
                });
                hold.wait_for(1);
                assert!(disk.in_flight.try_shared(0..1).is_none());
                assert!(disk.in_flight.try_shared(held - 1..held).is_none());
                assert!(disk.in_flight.try_shared(held..size).is_some(), "2^{bits}");
                drop(hold);
                assert_eq!(stream.join().unwrap().copied, size);
            });
            let mut read = vec![0; size as usize];
            disk.read(0, &mut read).unwrap();
            assert!(read == content);
            disk.detach_backing(1, None).unwrap();
            disk.close().unwrap();
        }
    }

    fn reads_fail(base: &SimStorage) {
        let matches = |operation: &sim::Operation| operation.action == Action::Read;
        base.inject(Fault {
            matches: Box::new(matches),
            after: 0,
            failure: HostFailure::Errno(5),
            times: Repeat::ForEver,
        });
    }

    /// Protects: I4 without a guard while the base is read. A guest write after a chunk was read
    /// ahead is never replaced, not even in the middle of a run, and no cluster is read twice.
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
        assert_eq!(
            populated,
            Populated { copied: 13 * CLUSTER, zeroed: CLUSTER, skipped: 2 * CLUSTER }
        );
        assert_eq!(base.failures(), 0, "nothing was read twice");
        let mut read = vec![0; size as usize];
        disk.read(0, &mut read).unwrap();
        assert!(read == content);
        assert_eq!(disk.to_read(0..size, 1).runs, []);
        disk.detach_backing(1, None).unwrap();
        disk.close().unwrap();
    }

    /// Protects: an error of reading ahead is returned when the bytes are needed, and only once; a
    /// second attempt reads again. If the guest has written the clusters that could not be read,
    /// there is no error.
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

    /// Protects: H19 with reused buffers. A copied cluster is zero beyond the end of the disk,
    /// whatever the buffer contained.
    #[test]
    fn the_end_of_the_last_cluster_is_zero() {
        let (disk, _, content, overlay) = disk();
        let size = disk.size();
        disk.populate(0..size, 1).unwrap();
        // The byte with which debug builds fill buffers.
        assert!(!overlay.bytes().contains(&0xb5));
        let mut read = vec![0; content.len()];
        disk.read(0, &mut read).unwrap();
        assert!(read == content);
    }
}
