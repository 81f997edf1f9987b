//! Clones instead of copies: when they are made, what follows a refusal, and that the result is the
//! same.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;

use super::super::Disk;
use super::*;
use host::ErrorKind;
use sim::spec;
use sim::start::Start;
use sim::{Action, Fault, HostFailure, Operation, Repeat, SimStorage};

const CLUSTER: u64 = 4096;
/// The disk ends inside its last cluster.
const SIZE: u64 = 16 * CLUSTER - 1024;

/// A disk above a raw base, both in memory, on a host that clones blocks of 4 KiB.
struct Rig {
    disk: Disk,
    base: Arc<SimStorage>,
    overlay: Arc<SimStorage>,
    /// The bytes that the guest must read.
    content: Vec<u8>,
    /// Number of attempted clones.
    tried: Arc<AtomicU64>,
}

impl Rig {
    /// A rig whose base has `base_len` bytes, of which cluster 5 is zero.
    fn new(base_len: u64, version: u32) -> Rig {
        let below: Vec<u8> = (0..base_len)
            .map(|at| if at / CLUSTER == 5 { 0 } else { (at / 512 % 255 + 1) as u8 })
            .collect();
        let mut content = below.clone();
        content.resize(SIZE as usize, 0);
        let base = SimStorage::new(below);
        let bytes = Start { base: base_len, ..Start::new("clones", version, 12, 4, SIZE) }.bytes();
        let overlay = SimStorage::checked(bytes);
        overlay.allow_clones(CLUSTER);
        let disk = Disk::for_tests(
            Image::open(overlay.clone()).unwrap(),
            Some(Chain::of_raw(base.clone())),
        );
        let rig = Rig { disk, base, overlay, content, tried: Arc::default() };
        rig.count();
        rig
    }

    /// Counts clones, and removes all other faults of the base.
    fn count(&self) {
        self.base.heal();
        let tried = Arc::clone(&self.tried);
        let counts = move |operation: &Operation| {
            tried.fetch_add(u64::from(operation.action == Action::CloneFrom), Ordering::SeqCst);
            false
        };
        self.fault(&self.base, counts, 0, Repeat::ForEver);
    }

    fn fault(
        &self,
        file: &SimStorage,
        matches: impl Fn(&Operation) -> bool + Send + 'static,
        errno: i32,
        times: Repeat,
    ) {
        file.inject(Fault {
            matches: Box::new(matches),
            after: 0,
            failure: HostFailure::Errno(errno),
            times,
        });
    }

    fn tried(&self) -> u64 {
        self.tried.swap(0, Ordering::SeqCst)
    }

    /// The runs that a stream would read ahead.
    fn would_read(&self) -> Vec<Range<u64>> {
        let ahead = self.disk.to_read(0..SIZE, 1);
        assert_eq!(ahead.is_empty(), ahead.end().is_none());
        ahead.runs().to_vec()
    }

    /// Asserts that the guest reads the right bytes, with and without the base, and that the image
    /// has no error and no leak.
    fn finish(self) {
        let read = |disk: &Disk| {
            let mut read = vec![0xee; SIZE as usize];
            disk.read(0, &mut read).unwrap();
            read
        };
        assert!(read(&self.disk) == self.content);
        self.disk.detach_backing(1, None).unwrap();
        assert!(read(&self.disk) == self.content);
        self.disk.close().unwrap();
        let seen = spec::look(&self.overlay.bytes(), &[]).unwrap();
        assert_eq!((seen.verdict.all(), seen.verdict.all_leaks()), (Vec::new(), 0));
        assert!(seen.guest == self.content);
    }
}

/// Protects: whole clusters are cloned without a read, whatever they hold. The cluster in which the
/// base or the disk ends is copied (H19: it is zero beyond the end).
#[test]
fn whole_clusters_are_cloned_and_the_ends_are_copied() {
    for (base_len, version, copied) in [
        (10 * CLUSTER + 100, 3, Some(10 * CLUSTER..11 * CLUSTER)),
        (10 * CLUSTER, 3, None),
        (10 * CLUSTER + 100, 2, Some(10 * CLUSTER..11 * CLUSTER)),
        (SIZE, 3, Some(15 * CLUSTER..SIZE)),
        (20 * CLUSTER, 3, Some(15 * CLUSTER..SIZE)),
    ] {
        let rig = Rig::new(base_len, version);
        let wanted: Vec<_> = copied.clone().into_iter().collect();
        assert_eq!(rig.would_read(), wanted, "{base_len}");
        let elsewhere = move |operation: &Operation| {
            operation.action == Action::Read
                && copied.as_ref().is_none_or(|copied| operation.at != copied.start)
        };
        rig.fault(&rig.base, elsewhere, 5, Repeat::ForEver);
        let populated = rig.disk.populate(0..SIZE, 1).unwrap();
        let up = base_len.min(SIZE).next_multiple_of(CLUSTER);
        assert_eq!(
            populated,
            Populated { copied: up, zeroed: 0, skipped: SIZE.saturating_sub(up) },
            "{base_len}"
        );
        let read: u64 = wanted.iter().map(|range| range.end - range.start).sum();
        assert_eq!((rig.tried(), rig.disk.stats().backing_reads.bytes), (1, read), "{base_len}");
        assert_eq!(rig.would_read(), []);
        rig.finish();
    }
}

/// Protects: a host that cannot clone is asked once, and everything is copied. No failure of a
/// clone fails the job. Only a lack of space, which need not affect other offsets, does not stop
/// further attempts.
#[test]
fn a_refusal_is_final_and_the_copy_takes_over() {
    for (errno, asks_again) in [
        (95, false),
        (25, false),
        (18, false),
        (22, false),
        (26, false),
        (1, false),
        (5, false),
        (30, false),
        (28, true),
        (122, true),
    ] {
        for side in ["base", "overlay"] {
            let rig = Rig::new(SIZE, 3);
            let file = if side == "base" { &rig.base } else { &rig.overlay };
            rig.fault(file, |operation| operation.is_clone, errno, Repeat::Once);
            let populated = rig.disk.populate(0..4 * CLUSTER, 1).unwrap();
            assert_eq!(populated, Populated { copied: 4 * CLUSTER, zeroed: 0, skipped: 0 });
            assert_eq!((rig.tried(), file.failures()), (1, 1), "{errno} of the {side}");
            assert_eq!(rig.disk.stats().backing_reads.bytes, 4 * CLUSTER, "they were copied");
            rig.disk.populate(4 * CLUSTER..8 * CLUSTER, 1).unwrap();
            rig.disk.populate(8 * CLUSTER..SIZE, 1).unwrap();
            assert_eq!(rig.tried() > 0, asks_again, "{errno} of the {side}");
            rig.finish();
        }
    }
}

/// Protects: a clone that fails half way is replaced by a copy as a whole, and its clusters are not
/// leaked.
#[test]
fn half_a_clone_is_no_clone() {
    let rig = Rig::new(10 * CLUSTER + 100, 3);
    let failure = HostFailure::Short(2 * CLUSTER + 512, 28);
    rig.overlay.inject(Fault {
        matches: Box::new(|operation| operation.is_clone),
        after: 0,
        failure,
        times: Repeat::ForEver,
    });
    // The zeros of cluster 5 are detected, because it was read.
    let populated = rig.disk.populate(0..SIZE, 1).unwrap();
    assert_eq!((populated.copied, populated.zeroed), (10 * CLUSTER, CLUSTER));
    assert!(rig.overlay.failures() > 0);
    rig.finish();
}

/// Protects P9: if the base shrank, the clone is refused like any range outside the file. The copy
/// then reports an error, never zeros, and nothing is published.
#[test]
fn what_the_copy_finds_out_is_told() {
    let rig = Rig::new(SIZE, 3);
    rig.fault(&rig.base, |operation| operation.is_clone, 22, Repeat::ForEver);
    rig.fault(&rig.base, |operation| operation.action == Action::Read, 5, Repeat::ForEver);
    let error = rig.disk.populate(0..SIZE, 1).unwrap_err();
    assert_eq!((error.kind(), error.errno()), (ErrorKind::Io, Some(5)));
    rig.count();
    assert_eq!(rig.disk.map(0, SIZE).unwrap().mapping, Mapping::Unallocated);
    assert_eq!(rig.would_read().len(), 1, "and nobody asks again");
    rig.disk.populate(0..SIZE, 1).unwrap();
    assert_eq!(rig.tried(), 1);
    rig.finish();
}

/// Protects I4: a guest write that takes its range between the stream's first lookup and the clone
/// wins. The clusters beside it are cloned.
#[test]
fn a_write_between_the_look_and_the_guard_wins() {
    let mut rig = Rig::new(SIZE, 3);
    let held =
        rig.base.hold(|operation| operation.action == Action::Read && operation.at / CLUSTER == 3);
    thread::scope(|scope| {
        // Half of the cluster, so that it must be completed by a read from below, which the test
        // holds.
        let writer = scope.spawn(|| rig.disk.write(3 * CLUSTER, &[0xee; 2048]).unwrap());
        held.wait_for(1);
        let clone = scope.spawn(|| rig.disk.populate(0..15 * CLUSTER, 1).unwrap());
        while rig.disk.waiting() == 0 {
            assert!(!clone.is_finished(), "it should have waited");
            thread::yield_now();
        }
        drop(held);
        writer.join().unwrap();
        assert_eq!(
            clone.join().unwrap(),
            Populated { copied: 14 * CLUSTER, zeroed: 0, skipped: CLUSTER }
        );
    });
    assert_eq!(rig.tried(), 2, "before it and behind it");
    rig.content[3 * CLUSTER as usize..][..2048].fill(0xee);
    rig.disk.populate(0..SIZE, 1).unwrap();
    rig.finish();
}

/// Protects I4: a guest write to a cluster that is being cloned waits, and wins.
#[test]
fn a_write_during_the_clone_waits_and_wins() {
    let mut rig = Rig::new(SIZE, 3);
    let held = rig.base.hold(|operation| operation.action == Action::CloneFrom);
    thread::scope(|scope| {
        let clone = scope.spawn(|| rig.disk.populate(0..SIZE, 1).unwrap());
        while held.stopped() == 0 {
            assert!(!clone.is_finished(), "it should clone");
            thread::yield_now();
        }
        let writer = scope.spawn(|| rig.disk.write(3 * CLUSTER + 100, &[0xee; 2048]).unwrap());
        while rig.disk.waiting() == 0 {
            assert!(!writer.is_finished(), "it should have waited");
            thread::yield_now();
        }
        drop(held);
        clone.join().unwrap();
        writer.join().unwrap();
    });
    rig.content[3 * CLUSTER as usize + 100..][..2048].fill(0xee);
    rig.finish();
}

/// Protects: copy-on-read writes the bytes that it has read, and does not clone.
#[test]
fn reads_do_not_clone() {
    let rig = Rig::new(SIZE, 3);
    let rig = Rig { disk: rig.disk.copying_up(true), ..rig };
    let mut read = vec![0; SIZE as usize];
    rig.disk.read(0, &mut read).unwrap();
    assert!(read == rig.content);
    assert_eq!((rig.tried(), rig.would_read()), (0, vec![]));
    rig.finish();
}

/// A base that notes which ranges are not needed any more.
#[derive(Debug)]
struct Released {
    base: Arc<SimStorage>,
    overlay: Arc<SimStorage>,
    /// Each range, and whether the overlay had been written by then.
    done: Mutex<{ rank::LEAF }, Vec<(Range<u64>, bool)>>,
}

impl host::storage::ReadAt for Released {
    fn size(&self) -> u64 {
        self.base.size()
    }

    fn allocated_size(&self) -> std::io::Result<u64> {
        self.base.allocated_size()
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> std::io::Result<()> {
        self.base.read_at(offset, buf)
    }

    fn status(&self, offset: u64, max: u64) -> std::io::Result<(host::storage::BlockStatus, u64)> {
        self.base.status(offset, max)
    }

    fn done(&self, offset: u64, len: u64) {
        let content = [1; 8];
        let is_written = self.overlay.bytes().windows(8).any(|window| window == content);
        self.done.lock().push((offset..offset + len, is_written));
    }
}

/// Protects: a layer that keeps nothing hears of clusters that the overlay holds, after it holds
/// them, and of no others.
#[test]
fn layers_hear_of_the_clusters_that_are_copied_up() {
    let base = SimStorage::new(vec![1; 8 * CLUSTER as usize]);
    let bytes = Start { base: 8 * CLUSTER, ..Start::new("done", 3, 12, 4, 16 * CLUSTER) }.bytes();
    let overlay = SimStorage::checked(bytes);
    let released = Arc::new(Released { base, overlay: overlay.clone(), done: Mutex::default() });
    let disk = Disk::for_tests(
        Image::open(overlay.clone()).unwrap(),
        Some(Chain::of_raw(released.clone())),
    );
    let populated = disk.populate(2 * CLUSTER..4 * CLUSTER, 1).unwrap();
    assert_eq!(populated.copied, 2 * CLUSTER);
    assert_eq!(*released.done.lock(), [(2 * CLUSTER..4 * CLUSTER, true)]);
    disk.populate(0..16 * CLUSTER, 1).unwrap();
    let done = std::mem::take(&mut *released.done.lock());
    let ranges: Vec<_> = done.into_iter().map(|(range, _)| range).collect();
    assert_eq!(ranges, [2 * CLUSTER..4 * CLUSTER, 0..2 * CLUSTER, 4 * CLUSTER..8 * CLUSTER]);
    disk.close().unwrap();
}
