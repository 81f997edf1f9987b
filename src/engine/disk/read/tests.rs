//! Reads that miss: when the reply is sent, what they store in the overlay, and which reads are
//! left to the blocking path.

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::*;
use crate::chain::Chain;
use host::storage::WriteKind;
use qcow2::format::{BackingFormat, NewImage};
use qcow2::image::Image;
use sim::{Action, Fault, HostFailure, Operation, Repeat, SimStorage};

const CLUSTER: u64 = 4096;
const CLUSTERS: u64 = 64;
/// The disk ends inside its last cluster.
const SIZE: u64 = CLUSTERS * CLUSTER - 1024;

struct Rig {
    disk: Arc<Disk>,
    base: Arc<SimStorage>,
    overlay: Arc<SimStorage>,
    content: Vec<u8>,
}

/// A disk with copy-on-read above a base with different bytes in every cluster, all of it in the
/// host's memory.
fn rig() -> Rig {
    let content: Vec<u8> = (0..SIZE).map(|at| 1 + (at / CLUSTER) as u8).collect();
    let overlay = SimStorage::checked(NewImage::file_for_tests(
        12,
        SIZE,
        Some(("base.raw", BackingFormat::Raw)),
    ));
    let base = SimStorage::new(content.clone());
    base.keep_in_memory(true);
    let image = Image::open(overlay.clone()).unwrap();
    let disk = Disk::for_tests(image, Some(Chain::of_raw(base.clone()))).copying_up(true);
    Rig { disk: Arc::new(disk), base, overlay, content }
}

impl Rig {
    fn is_local(&self, cluster: u64) -> bool {
        matches!(self.disk.map(cluster * CLUSTER, 1).unwrap().mapping, Mapping::Data { .. })
    }

    /// Reads with `read_cached`. Returns the bytes of the reply, or `None` if there was none.
    fn cached(&self, offset: u64, len: u64) -> Option<Vec<u8>> {
        let (mut answers, mut buf) = (Vec::new(), vec![0; len as usize]);
        let local = self
            .disk
            .read_cached(offset, &mut buf, &mut |bytes| answers.push(bytes.to_vec()))
            .unwrap();
        assert_eq!(
            local == Local::Done,
            answers.len() == 1,
            "{local:?}, {} answers",
            answers.len()
        );
        answers.pop()
    }

    fn shown(&self, offset: u64, len: u64) -> Option<Vec<u8>> {
        Some(self.content[offset as usize..(offset + len) as usize].to_vec())
    }
}

/// Protects: the clusters of the request are copied up whole and once, without another read of the
/// base. No other cluster is copied up, and the image is sound.
#[test]
fn what_is_in_memory_is_answered_and_copied_up() {
    let rig = rig();
    let before = rig.base.operations();
    assert_eq!(rig.cached(3 * CLUSTER + 100, CLUSTER), rig.shown(3 * CLUSTER + 100, CLUSTER));
    assert_eq!(rig.base.operations(), before, "not read in any other way");
    assert_eq!([2, 3, 4, 5].map(|cluster| rig.is_local(cluster)), [false, true, true, false]);
    let stats = rig.disk.stats();
    assert_eq!(
        (stats.reads.operations, stats.reads.bytes, stats.backing_reads.bytes),
        (1, CLUSTER, 2 * CLUSTER)
    );
    rig.base.inject(Fault {
        matches: Box::new(|operation| operation.action == Action::Read),
        after: 0,
        failure: HostFailure::Errno(5),
        times: Repeat::ForEver,
    });
    rig.base.keep_in_memory(false);
    let mut buf = vec![0; 2 * CLUSTER as usize];
    rig.disk.read(3 * CLUSTER, &mut buf).unwrap();
    assert!(Some(buf) == rig.shown(3 * CLUSTER, 2 * CLUSTER), "from the overlay alone");
    rig.disk.close().unwrap();
}

/// Protects: a read that would have to wait, or of which a part is in the overlay, is left to the
/// blocking path without any change.
#[test]
fn everything_else_is_left_to_who_may_wait() {
    let rig = rig();
    rig.base.keep_in_memory(false);
    assert_eq!(rig.cached(0, 512), None, "not in memory");
    rig.base.keep_in_memory(true);
    rig.disk.write(7 * CLUSTER, &[0xee; 10]).unwrap();
    assert_eq!(rig.cached(6 * CLUSTER, 2 * CLUSTER), None, "half of it is in the overlay");
    assert_eq!(
        rig.cached((CLUSTERS - 1) * CLUSTER, 512),
        None,
        "its last cluster ends behind the disk"
    );
    assert_eq!(rig.cached(0, AT_ONCE + 1), None, "too large");
    let reader = rig.disk.in_flight.shared(CLUSTER..CLUSTER + 1);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            assert_eq!(rig.cached(CLUSTER + 2048, 512), None, "somebody reads the same cluster")
        });
    });
    drop(reader);
    assert!((0..CLUSTERS).filter(|&cluster| rig.is_local(cluster)).eq([7]));
    assert_eq!(rig.disk.stats().reads.operations, 0, "counted by who does it");

    let plain = Disk::for_tests(
        Image::open(SimStorage::new(rig.overlay.bytes())).unwrap(),
        Some(Chain::of_raw(rig.base.clone())),
    );
    assert_eq!(
        plain.read_cached(0, &mut [0; 512], &mut |_| panic!("answered")).unwrap(),
        Local::Below,
        "reads do not copy up"
    );
    rig.disk.close().unwrap();
}

/// Protects: a read that a stream is about to copy up anyway is answered from memory and leaves no
/// copy, also where another one reads the same cluster. It counts as a miss. A read behind the
/// position of the stream, or of bytes that are not in memory, copies up.
#[test]
fn a_copy_is_left_to_the_stream_that_is_on_its_way() {
    let rig = rig();
    // Told for later than any moment of this test.
    rig.disk.walk.is_at(8 * CLUSTER, Instant::now() + Duration::from_secs(3600));
    let reader = rig.disk.in_flight.shared(9 * CLUSTER..9 * CLUSTER + 1);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            assert_eq!(rig.cached(9 * CLUSTER + 7, 512), rig.shown(9 * CLUSTER + 7, 512));
        });
    });
    drop(reader);
    let end = SIZE - 512;
    assert_eq!(rig.cached(end, 512), rig.shown(end, 512), "its cluster ends behind the disk");
    assert_eq!(rig.cached(6 * CLUSTER, 3 * CLUSTER), rig.shown(6 * CLUSTER, 3 * CLUSTER));
    assert!((0..CLUSTERS).filter(|&cluster| rig.is_local(cluster)).eq([6, 7, 8]));
    let stats = rig.disk.stats();
    assert_eq!((stats.reads.operations, stats.misses, stats.copied_up.operations), (3, 3, 1));
    assert_eq!(stats.backing_reads.bytes, 512 + 512 + 3 * CLUSTER, "and nothing around them");

    assert_eq!(rig.cached(8 * CLUSTER, 2 * CLUSTER), None, "half of it is in the overlay");
    assert_eq!(rig.cached(10 * CLUSTER, AT_ONCE + 1), None, "too large");
    let held = rig.disk.in_flight.exclusive(20 * CLUSTER..21 * CLUSTER);
    std::thread::scope(|scope| {
        scope.spawn(|| assert_eq!(rig.cached(20 * CLUSTER, 512), None, "another request has it"));
    });
    drop(held);
    rig.base.keep_in_memory(false);
    assert_eq!(rig.cached(21 * CLUSTER, 512), None, "not in memory");
    let mut buf = [0; 512];
    rig.disk.read(21 * CLUSTER, &mut buf).unwrap();
    assert_eq!(Some(buf.to_vec()), rig.shown(21 * CLUSTER, 512));
    assert!(rig.is_local(21));
    rig.disk.close().unwrap();
}

/// Protects: the reply is sent before anything is written. A later request for the same cluster
/// waits and gets it from the overlay, and a guest write to it is not lost (I4). Tested for reads
/// on server threads (`read_cached`) and on workers (`read_and_answer`).
#[test]
fn the_answer_does_not_wait_for_the_copy() {
    for waits in [false, true] {
        let rig = rig();
        let held =
            rig.overlay.hold(|operation| operation.action == Action::Write(WriteKind::NewCluster));
        let (answered, answer) = crossbeam_channel::bounded(1);
        let reader = std::thread::spawn({
            let disk = Arc::clone(&rig.disk);
            move || {
                let mut buf = vec![0; 512];
                let mut send = |bytes: &[u8]| answered.send(bytes.to_vec()).unwrap();
                match waits {
                    true => {
                        disk.read_and_answer(2 * CLUSTER, &mut buf, &mut send).map(|()| Local::Done)
                    }
                    false => disk.read_cached(2 * CLUSTER, &mut buf, &mut send),
                }
            }
        });
        assert_eq!(answer.recv().ok(), rig.shown(2 * CLUSTER, 512));
        held.wait_for(1);
        assert!(!rig.is_local(2));
        let mut buf = [0; 512];
        // `read_and_answer` may wait for the base while it holds the cluster; `read_cached` may
        // not.
        let wanted = if waits { Local::Below } else { Local::Miss };
        assert_eq!(
            rig.disk.read_local(2 * CLUSTER, &mut buf).unwrap(),
            wanted,
            "the cluster is held"
        );
        assert_eq!(rig.disk.read_local(3 * CLUSTER, &mut []).unwrap(), Local::Done, "and no other");
        let writer = std::thread::spawn({
            let disk = Arc::clone(&rig.disk);
            move || disk.write(2 * CLUSTER, &[0xee; 100])
        });
        while rig.disk.in_flight.waiting() == 0 {
            std::thread::yield_now();
        }
        drop(held);
        assert_eq!(reader.join().unwrap().unwrap(), Local::Done);
        writer.join().unwrap().unwrap();
        rig.disk.read(2 * CLUSTER, &mut buf).unwrap();
        assert_eq!((buf[99], buf[100]), (0xee, rig.content[2 * CLUSTER as usize]));
        rig.disk.close().unwrap();
    }
}

/// Protects P5: if the copy fails after the reply, the read was correct, the next one is correct,
/// and no entry names a cluster that was not written.
#[test]
fn a_copy_that_fails_after_the_answer_changes_nothing() {
    let rig = rig();
    rig.overlay.inject(Fault {
        matches: Box::new(|operation| operation.action == Action::Write(WriteKind::NewCluster)),
        after: 0,
        failure: HostFailure::Errno(28),
        times: Repeat::ForEver,
    });
    assert_eq!(rig.cached(0, 512), rig.shown(0, 512));
    assert!(!rig.is_local(0));
    assert_eq!(rig.cached(0, 512), None, "copying up pauses");
    rig.overlay.heal();
    let mut buf = vec![0; 512];
    rig.disk.read(0, &mut buf).unwrap();
    assert_eq!(Some(buf), rig.shown(0, 512));
    rig.disk.close().unwrap();
}

/// Protects P8: unreadable bytes of the base are an error for reads of them. Other reads of the
/// same cluster succeed, and the cluster is not copied up.
#[test]
fn bad_place_below_hurts_only_its_readers() {
    let rig = rig();
    let bad = 5 * CLUSTER + 1024..5 * CLUSTER + 1536;
    let touches = move |operation: &Operation| {
        operation.action == Action::Read
            && operation.at < bad.end
            && bad.start < operation.at + operation.len
    };
    rig.base.inject(Fault {
        matches: Box::new(touches),
        after: 0,
        failure: HostFailure::Errno(5),
        times: Repeat::ForEver,
    });
    let mut buf = vec![0; 1024];
    rig.disk.read(5 * CLUSTER, &mut buf).unwrap();
    assert_eq!(Some(buf.clone()), rig.shown(5 * CLUSTER, 1024));
    assert_eq!(rig.disk.read(5 * CLUSTER + 1024, &mut buf).unwrap_err().errno(), Some(5));
    rig.disk.read(5 * CLUSTER + 1536, &mut buf).unwrap();
    assert_eq!(Some(buf.clone()), rig.shown(5 * CLUSTER + 1536, 1024));
    assert!(!rig.is_local(5));
}

/// Protects: runs of several layers are put together, each from the layer that decides it, and
/// nothing is read to find out which one does.
#[test]
fn layers_in_memory_are_answered_at_once() {
    let middle =
        SimStorage::new(NewImage::file_for_tests(12, SIZE, Some(("base.raw", BackingFormat::Raw))));
    let below = rig();
    let image = Image::open(middle.clone()).unwrap();
    let writer = Disk::for_tests(image, Some(Chain::of_raw(below.base.clone())));
    writer.write(3 * CLUSTER, &[0xab; CLUSTER as usize]).unwrap();
    writer.write_zeroes(5 * CLUSTER..6 * CLUSTER).unwrap();
    writer.close().unwrap();
    let mut content = below.content.clone();
    content[3 * CLUSTER as usize..4 * CLUSTER as usize].fill(0xab);
    content[5 * CLUSTER as usize..6 * CLUSTER as usize].fill(0);

    let middle = SimStorage::new(middle.bytes());
    middle.keep_in_memory(true);
    let overlay = SimStorage::checked(NewImage::file_for_tests(
        12,
        SIZE,
        Some(("middle.qcow2", BackingFormat::Qcow2)),
    ));
    let chain = Chain::of_two(middle.clone(), below.base.clone()).unwrap();
    let disk = Disk::for_tests(Image::open(overlay.clone()).unwrap(), Some(chain));
    let disk = Arc::new(disk.copying_up(true));
    let rig = Rig { disk, base: Arc::clone(&below.base), overlay, content };
    assert_eq!(rig.cached(2 * CLUSTER, 4 * CLUSTER), None, "the table is not in memory");
    rig.disk.read(40 * CLUSTER, &mut [0; 512]).unwrap();
    let before = (rig.base.operations(), middle.operations());
    assert_eq!(rig.cached(2 * CLUSTER, 5 * CLUSTER), rig.shown(2 * CLUSTER, 5 * CLUSTER));
    assert_eq!((rig.base.operations(), middle.operations()), before, "not read in any other way");
    assert!([2, 3, 4, 6].iter().all(|cluster| rig.is_local(*cluster)));
    rig.base.keep_in_memory(false);
    assert_eq!(rig.cached(10 * CLUSTER, CLUSTER), None, "the lower layer is not in memory");
    rig.disk.close().unwrap();
}
