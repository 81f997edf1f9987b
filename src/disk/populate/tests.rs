//! Clones in place of copies: when, what if not, and that nothing else changes.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;

use super::super::Disk;
use super::*;
use crate::ErrorKind;
use crate::simulation::spec;
use crate::simulation::start::Start;
use crate::simulation::{Action, Failure, Fault, Operation, SimStorage, Times};

const CLUSTER: u64 = 4096;
/// The last cluster is not whole.
const SIZE: u64 = 16 * CLUSTER - 1024;

/// A disk above a raw base, both in memory, on a host that clones blocks of 4 KiB.
struct Rig {
    disk: Disk,
    base: Arc<SimStorage>,
    overlay: Arc<SimStorage>,
    /// What the guest reads.
    content: Vec<u8>,
    /// How often a clone was tried.
    tried: Arc<AtomicU64>,
}

impl Rig {
    /// Above so many bytes, of which cluster 5 is zero.
    fn new(base_len: u64, version: u32) -> Rig {
        let below: Vec<u8> = (0..base_len).map(|at| if at / CLUSTER == 5 { 0 } else { (at / 512 % 255 + 1) as u8 }).collect();
        let mut content = below.clone();
        content.resize(SIZE as usize, 0);
        let base = SimStorage::new(below);
        let bytes = Start { base: base_len, ..Start::new("clones", version, 12, 4, SIZE) }.bytes();
        let overlay = SimStorage::checked(bytes);
        overlay.allow_clones(CLUSTER);
        let disk = Disk::for_tests(Image::open(overlay.clone()).unwrap(), Some(Chain::of_raw(base.clone())));
        let rig = Rig { disk, base, overlay, content, tried: Arc::default() };
        rig.count();
        rig
    }

    /// Counts clones; forgets all faults of the base.
    fn count(&self) {
        self.base.heal();
        let tried = Arc::clone(&self.tried);
        let counts = move |operation: &Operation| {
            tried.fetch_add(u64::from(operation.action == Action::CloneFrom), Ordering::SeqCst);
            false
        };
        self.fault(&self.base, counts, 0, Times::ForEver);
    }

    fn fault(&self, file: &SimStorage, matches: impl Fn(&Operation) -> bool + Send + 'static, errno: i32, times: Times) {
        file.inject(Fault { matches: Box::new(matches), after: 0, failure: Failure::Errno(errno), times });
    }

    fn tried(&self) -> u64 {
        self.tried.swap(0, Ordering::SeqCst)
    }

    /// What would be read.
    fn would_read(&self) -> Vec<Range<u64>> {
        let ahead = self.disk.to_read(0..SIZE, 1);
        assert_eq!(ahead.is_empty(), ahead.end().is_none());
        ahead.runs().to_vec()
    }

    /// The guest reads what it must, the image is right and has nothing too much, and needs nobody.
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

/// Protects: what is whole is cloned and not read, whatever it holds; the cluster in which base or disk ends is copied (H19: zeros behind the end).
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
            operation.action == Action::Read && copied.as_ref().is_none_or(|copied| operation.at != copied.start)
        };
        rig.fault(&rig.base, elsewhere, 5, Times::ForEver);
        let populated = rig.disk.populate(0..SIZE, 1).unwrap();
        let up = base_len.min(SIZE).next_multiple_of(CLUSTER);
        assert_eq!(populated, Populated { copied: up, zeroed: 0, skipped: SIZE.saturating_sub(up) }, "{base_len}");
        let read: u64 = wanted.iter().map(|range| range.end - range.start).sum();
        assert_eq!((rig.tried(), rig.disk.stats().backing_reads.bytes), (1, read), "{base_len}");
        assert_eq!(rig.would_read(), []);
        rig.finish();
    }
}

/// Protects: a host that cannot clone is asked once, and everything is copied as if nobody had asked; nor does any other failure of a clone become one
/// of the job. Only want of space, which the next place may have, is no reason to stop asking.
#[test]
fn a_refusal_is_final_and_the_copy_takes_over() {
    for (errno, asks_again) in
        [(95, false), (25, false), (18, false), (22, false), (26, false), (1, false), (5, false), (30, false), (28, true), (122, true)]
    {
        for side in ["base", "overlay"] {
            let rig = Rig::new(SIZE, 3);
            let file = if side == "base" { &rig.base } else { &rig.overlay };
            rig.fault(file, |operation| operation.is_clone, errno, Times::Once);
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

/// Protects: a clone that is done in part is written over as a whole, and its clusters are not leaked.
#[test]
fn half_a_clone_is_no_clone() {
    let rig = Rig::new(10 * CLUSTER + 100, 3);
    let failure = Failure::Short(2 * CLUSTER + 512, 28);
    rig.overlay.inject(Fault { matches: Box::new(|operation| operation.is_clone), after: 0, failure, times: Times::ForEver });
    // Cluster 5 is seen now: it was read.
    let populated = rig.disk.populate(0..SIZE, 1).unwrap();
    assert_eq!((populated.copied, populated.zeroed), (10 * CLUSTER, CLUSTER));
    assert!(rig.overlay.failures() > 0);
    rig.finish();
}

/// Protects P9: a base that shrank refuses the clone like any range outside of it, and the copy that is tried then finds out that it shrank: an
/// error, never zeros, and nothing is published.
#[test]
fn what_the_copy_finds_out_is_told() {
    let rig = Rig::new(SIZE, 3);
    rig.fault(&rig.base, |operation| operation.is_clone, 22, Times::ForEver);
    rig.fault(&rig.base, |operation| operation.action == Action::Read, 5, Times::ForEver);
    let error = rig.disk.populate(0..SIZE, 1).unwrap_err();
    assert_eq!((error.kind(), error.errno()), (ErrorKind::Io, Some(5)));
    rig.count();
    assert_eq!(rig.disk.map(0, SIZE).unwrap().mapping, Mapping::Unallocated);
    assert_eq!(rig.would_read().len(), 1, "and nobody asks again");
    rig.disk.populate(0..SIZE, 1).unwrap();
    assert_eq!(rig.tried(), 1);
    rig.finish();
}

/// Protects I4: a guest that came before the clone wins although the clone had looked before; what is beside its cluster is cloned.
#[test]
fn a_write_between_the_look_and_the_guard_wins() {
    let mut rig = Rig::new(SIZE, 3);
    let held = rig.base.hold(|operation| operation.action == Action::Read && operation.at / CLUSTER == 3);
    thread::scope(|scope| {
        // Half of the cluster, so that it has to be completed from below, which takes its time.
        let writer = scope.spawn(|| rig.disk.write(3 * CLUSTER, &[0xee; 2048]).unwrap());
        held.wait_for(1);
        let clone = scope.spawn(|| rig.disk.populate(0..15 * CLUSTER, 1).unwrap());
        while rig.disk.waiting() == 0 {
            assert!(!clone.is_finished(), "it should have waited");
            thread::yield_now();
        }
        drop(held);
        writer.join().unwrap();
        assert_eq!(clone.join().unwrap(), Populated { copied: 14 * CLUSTER, zeroed: 0, skipped: CLUSTER });
    });
    assert_eq!(rig.tried(), 2, "before it and behind it");
    rig.content[3 * CLUSTER as usize..][..2048].fill(0xee);
    rig.disk.populate(0..SIZE, 1).unwrap();
    rig.finish();
}

/// Protects I4: a guest that comes while its cluster is being cloned waits, and wins.
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

/// Protects: a read that copies up writes what it has in hand.
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
