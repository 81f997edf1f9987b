//! Disks whose overlay has subclusters: what a request copies up, and what it reads below for that.

use std::sync::Arc;

use crate::disk::*;
use host::storage::WriteKind;
use qcow2::format::{BackingFormat, BackingReference, Geometry, Mapping, NewImage};
use sim::{Action, Fault, HostFailure, Operation, Recorded, Repeat, SimStorage};

const CLUSTER: u64 = 64 << 10;
const SUBCLUSTER: u64 = 2 << 10;
const SIZE: u64 = 8 * CLUSTER;

struct Rig {
    disk: Disk,
    base: Arc<SimStorage>,
    overlay: Arc<SimStorage>,
    content: Vec<u8>,
}

/// A disk above a base with other bytes in every sector, none of which is zero.
fn rig() -> Rig {
    let content: Vec<u8> = (0..SIZE).map(|at| (at / 512 % 251) as u8 + 1).collect();
    let geometry = Geometry::new(3, 16, 4, SIZE).unwrap().with_extended_l2().unwrap();
    let backing = BackingReference { name: "base.raw".into(), format: Some(BackingFormat::Raw) };
    let mut file = Vec::new();
    for (at, bytes) in (NewImage { geometry, backing: Some(backing) }).layout().unwrap() {
        file.resize(file.len().max(at as usize + bytes.len()), 0);
        file[at as usize..][..bytes.len()].copy_from_slice(&bytes);
    }
    let (overlay, base) = (SimStorage::checked(file), SimStorage::new(content.clone()));
    base.keep_in_memory(true);
    let image = Image::open(overlay.clone()).unwrap();
    let disk = Disk::for_tests(image, Some(Chain::of_raw(base.clone()))).copying_up(true);
    overlay.record();
    Rig { disk, base, overlay, content }
}

impl Rig {
    /// The sizes of the writes of guest data since the disk was opened, in bytes.
    fn written(&self) -> Vec<u64> {
        let len = |change| match change {
            Recorded::Write { kind: WriteKind::Data | WriteKind::NewCluster, data, .. } => {
                Some(data.len() as u64)
            }
            _ => None,
        };
        self.overlay.recorded().into_iter().filter_map(len).collect()
    }

    /// Reads as a transport does: without waiting, and otherwise like a worker.
    fn read(&self, offset: u64, len: u64) -> Vec<u8> {
        let mut buf = vec![0xee; len as usize];
        if self.disk.read_local(offset, &mut buf).unwrap() != Local::Done
            && self.disk.read_cached(offset, &mut buf, &mut |_| ()).unwrap() != Local::Done
        {
            self.disk.read(offset, &mut buf).unwrap();
        }
        buf
    }

    fn assert_read(&self, offset: u64, len: u64) {
        let wanted = &self.content[offset as usize..(offset + len) as usize];
        assert!(self.read(offset, len) == wanted, "{len} bytes at {offset}");
    }

    /// Lets every read of the base fail.
    fn break_base(&self) {
        self.base.keep_in_memory(false);
        self.base.inject(Fault {
            matches: Box::new(|operation: &Operation| operation.action == Action::Read),
            after: 0,
            failure: HostFailure::Errno(5),
            times: Repeat::ForEver,
        });
    }

    fn close(&self) {
        self.disk.close().unwrap();
        let seen = sim::spec::look(&self.overlay.bytes(), &self.content).unwrap().sole().unwrap();
        assert_eq!(seen.verdict.all_leaks(), 0);
        assert!(seen.guest == self.content, "the image, as the specification reads it");
    }
}

/// Protects: a first read of 4 KiB copies up 4 KiB, whether the bytes are in the host's memory or
/// not; an unaligned one copies the subclusters that it touches. Reads of other subclusters of the
/// same cluster go into the same host cluster.
#[test]
fn a_read_copies_up_the_subclusters_that_it_touches() {
    for in_memory in [true, false] {
        let rig = rig();
        rig.base.keep_in_memory(in_memory);
        rig.assert_read(CLUSTER + 4096, 4096);
        rig.assert_read(CLUSTER + 30 * SUBCLUSTER + 100, 50);
        rig.assert_read(CLUSTER + 9 * SUBCLUSTER - 1, 2);
        rig.assert_read(CLUSTER + 4096, 4096);
        assert_eq!(rig.written(), [4096, SUBCLUSTER, 2 * SUBCLUSTER]);
        rig.disk.flush().unwrap();
        let host = |offset: u64| match rig.disk.map(offset, 1).unwrap().mapping {
            Mapping::Data { host, in_place: true } => host,
            other => panic!("{offset}: {other:?}"),
        };
        assert_eq!(host(CLUSTER + 4096), host(CLUSTER + 30 * SUBCLUSTER));
        assert_eq!(rig.disk.map(CLUSTER, SIZE).unwrap().len, 4096, "up to the first copy");
        rig.close();
    }
}

/// Protects: a read over several clusters, some subclusters of which are there, reads the others
/// below and stores them, and what the guest wrote stays.
#[test]
fn a_long_read_fills_the_gaps() {
    let mut rig = rig();
    for at in [0, 5 * SUBCLUSTER, CLUSTER + 31 * SUBCLUSTER, 2 * CLUSTER + 512] {
        rig.disk.write(at, &[0xaa; 512]).unwrap();
        rig.content[at as usize..][..512].fill(0xaa);
    }
    rig.assert_read(100, 3 * CLUSTER);
    rig.break_base();
    rig.assert_read(0, 3 * CLUSTER);
    rig.base.heal();
    rig.close();
}

/// Protects: a first write of whole subclusters reads nothing below, and the subclusters beside it
/// still show the base.
#[test]
fn a_write_of_whole_subclusters_reads_nothing_below() {
    let mut rig = rig();
    rig.break_base();
    for (at, len) in [(3 * SUBCLUSTER, SUBCLUSTER), (CLUSTER - SUBCLUSTER, 6 * SUBCLUSTER)] {
        rig.disk.write(at, &vec![0xbb; len as usize]).unwrap();
        rig.content[at as usize..][..len as usize].fill(0xbb);
        rig.assert_read(at, len);
    }
    assert_eq!(rig.written(), [SUBCLUSTER, SUBCLUSTER, 5 * SUBCLUSTER]);
    let zeroed = 10 * SUBCLUSTER..40 * SUBCLUSTER;
    rig.disk.write_zeroes(zeroed.clone()).unwrap();
    rig.content[zeroed.start as usize..zeroed.end as usize].fill(0);
    let error = rig.disk.read(0, &mut [0; 512]).unwrap_err();
    assert_eq!(error.errno(), Some(5), "{error}");
    assert_eq!(rig.disk.write(1, &[1]).unwrap_err().errno(), Some(5), "the rest of a subcluster");
    rig.base.heal();
    rig.assert_read(0, SIZE);
    rig.close();
}

/// Protects: a discarded part of a cluster hides the base and keeps the rest; when the last
/// subcluster goes, the host cluster is freed, and used again.
#[test]
fn the_last_subcluster_frees_the_cluster() {
    let mut rig = rig();
    rig.assert_read(0, CLUSTER);
    rig.disk.flush().unwrap();
    let size = || rig.overlay.bytes().len();
    let before = size();
    for half in [0..CLUSTER / 2, CLUSTER / 2..CLUSTER] {
        rig.disk.discard(half.clone()).unwrap();
        rig.content[half.start as usize..half.end as usize].fill(0);
        rig.assert_read(0, CLUSTER);
        assert_eq!(
            rig.disk.map(half.start, 1).unwrap().mapping == Mapping::Zero { reserved: None },
            half.end == CLUSTER,
            "the host cluster is kept for the other half"
        );
    }
    rig.disk.flush().unwrap();
    rig.disk.write(3 * CLUSTER, &vec![0xcc; CLUSTER as usize]).unwrap();
    rig.content[3 * CLUSTER as usize..][..CLUSTER as usize].fill(0xcc);
    rig.disk.flush().unwrap();
    assert_eq!(size(), before, "the cluster was used again");
    rig.close();
}

/// Protects: a stream copies the missing subclusters only, and then the base is not needed.
#[test]
fn a_stream_completes_clusters() {
    let mut rig = rig();
    rig.disk.write(CLUSTER + 7 * SUBCLUSTER, &[0xdd; SUBCLUSTER as usize]).unwrap();
    rig.content[(CLUSTER + 7 * SUBCLUSTER) as usize..][..SUBCLUSTER as usize].fill(0xdd);
    rig.disk.discard(2 * CLUSTER..2 * CLUSTER + 3 * SUBCLUSTER).unwrap();
    rig.content[2 * CLUSTER as usize..][..3 * SUBCLUSTER as usize].fill(0);
    let populated = rig.disk.populate(0..SIZE, usize::MAX).unwrap();
    assert_eq!(populated.copied, SIZE - 4 * SUBCLUSTER);
    rig.disk.detach_backing(usize::MAX, None).unwrap();
    rig.break_base();
    rig.assert_read(0, SIZE);
    rig.disk.close().unwrap();
    let seen = sim::spec::look(&rig.overlay.bytes(), &[]).unwrap().sole().unwrap();
    assert!(seen.guest == rig.content && !seen.has_backing());
}
