//! Tests that the next open for writing gives back what a crash has leaked, and that no cluster is
//! given back too early.

use super::refcount_growth::{small, small_data};
use super::*;

/// Asserts that there is no leak and no corruption.
fn assert_exact(memory: &Memory, what: &str) {
    let report = check(memory).unwrap();
    assert!(report.is_sound() && report.leaks == 0, "{what}: {:?}", report.findings);
}

/// Protects: the open mark exists from before the first change until the end of a clean close, and
/// at no other time.
#[test]
fn the_mark_says_whether_the_image_was_closed() {
    let bench = bench();
    assert!(bench.memory.state.lock().open);
    bench.store(0, 7).unwrap();
    bench.image.close().unwrap();
    assert!(bench.memory.state.lock().open, "between close and end something may still be written");
    bench.image.end_writing();
    assert!(!bench.memory.state.lock().open);
    let again = Image::open(bench.memory.clone()).unwrap();
    assert!(!again.may_leak(), "nothing to look for");
    again.begin_writing().unwrap();
    assert_eq!(bench.memory.ops().last(), Some(&Op::Mark));
    assert!(Image::open(bench.memory.killed()).unwrap().may_leak());
}

/// Protects: P7. The mark of a failed image stays, so that the next open checks it.
#[test]
fn the_mark_of_a_failed_image_stays() {
    let bench = bench();
    bench.store(0, 7).unwrap();
    bench.memory.state.lock().fail_syncs = true;
    assert!(bench.image.close().is_err());
    bench.image.end_writing();
    assert!(bench.memory.state.lock().open);
}

/// Protects: P4. After the next open, clusters are free that were counted and never published, or
/// dropped and still counted. This includes clusters that are counted beyond the end of the file,
/// where qemu-img does not look.
#[test]
fn what_a_crash_leaked_is_allocated_again() {
    let bench = bench();
    for cluster in 0..4 {
        bench.store(cluster, 7).unwrap();
    }
    bench.image.flush().unwrap();
    let dropped = bench.host(1).unwrap();
    bench.discard(1);
    let reserved = bench.image.allocate(40).unwrap();
    bench.image.flush().unwrap();
    // The pass has lowered the refcount of the dropped cluster in memory only.
    let killed = bench.memory.killed();
    drop(reserved);
    let behind = killed.size().div_ceil(CLUSTER);
    let before = check(&*killed).unwrap();
    assert!(before.is_sound() && before.leaks > 0, "{:?}", before.findings);

    let again = reopen(killed.clone());
    assert_eq!([0, 1, 2, 3].map(|cluster| again.reads(cluster)), [7, 0, 7, 7]);
    again.store(9, 9).unwrap();
    assert_eq!(again.host(9), Some(dropped), "the first free cluster");
    for cluster in 10..20 {
        again.store(cluster, 9).unwrap();
    }
    assert!(
        (10..20).all(|cluster| again.host(cluster).unwrap() < behind + 10),
        "no room was left out"
    );
    again.image.close().unwrap();
    assert_exact(&killed, "after the close");
    assert_eq!([0, 1, 9, 19].map(|cluster| reopen(killed.killed()).reads(cluster)), [7, 0, 9, 9]);
}

/// Protects: holes are punched over leaked clusters, after the barrier.
#[test]
fn space_is_given_back_behind_a_barrier() {
    let bench = bench();
    let reserved = bench.image.allocate(3).unwrap();
    let reserved = bench.image.fill(reserved, 0, &[7; 3 * CLUSTER as usize]).unwrap();
    bench.image.flush().unwrap();
    let killed = bench.memory.killed();
    drop(reserved);
    let image = Image::open(killed.clone()).unwrap();
    let leaks = image.find_leaks().unwrap();
    assert_eq!(leaks.clusters(), 1024, "three that were written, and what was reserved with them");
    image.begin_writing().unwrap();
    killed.ops();
    image.give_back(&leaks).unwrap();
    let ops = killed.ops();
    let [Op::Sync, Op::Punch { len, .. }] = ops[..] else { panic!("{ops:?}") };
    assert_eq!(len, 1024 * CLUSTER);
}

/// Protects: P4. After any number of kills, the file stays as large as what it holds, and the
/// refcounts are exact.
#[test]
fn a_hundred_crashes_do_not_grow_the_file() {
    let bench = small();
    bench.store_small(0..100).unwrap();
    bench.image.flush().unwrap();
    let mut memory = bench.memory.killed();
    let mut sizes = Vec::new();
    for round in 0..100u64 {
        let bench = reopen(memory);
        // The kill loses these allocations. Some of their clusters are written, and some lie beyond
        // the end of the file.
        let filled = bench.image.allocate(4).unwrap();
        let bytes = vec![0xee; filled.clusters() as usize * 512];
        let filled = bench.image.fill(filled, 0, &bytes).unwrap();
        let reserved = bench.image.allocate(60).unwrap();
        let held = bench.lock.exclusive(0..8 * 512);
        bench.image.discard(&held, GuestSubcluster(0)..GuestSubcluster(8)).unwrap();
        drop(held);
        bench.store_small(0..8).unwrap();
        bench.image.flush().unwrap();
        memory = bench.memory.killed();
        drop((filled, reserved));
        let report = check(&*memory).unwrap();
        assert!(report.is_sound(), "round {round}: {:?}", report.findings);
        sizes.push(memory.size());
    }
    assert!(sizes[5..].iter().all(|size| *size <= sizes[4]), "{sizes:?}");
    let bench = reopen(memory.clone());
    bench.image.close().unwrap();
    assert_exact(&memory, "at the end");
    for cluster in 0..100 {
        let mut buf = [0; 512];
        let extent = bench.image.map(GuestOffset(cluster * 512), 512).unwrap();
        bench.image.read_extent(GuestOffset(cluster * 512), &extent, &mut buf).unwrap();
        assert_eq!(buf, small_data(cluster), "cluster {cluster}");
    }
}

/// Protects: R7 after a kill. A killed program has removed a reference and not synced the removal.
/// The next open sees the removal and hands the cluster out again, and then the power fails. The
/// removal must not be lost while the cluster holds the data of its new owner.
#[test]
fn a_removal_that_is_not_durable_yet_gives_nothing_away() {
    let bench = bench();
    bench.store(0, 7).unwrap();
    bench.image.close().unwrap();
    let durable = bench.memory.state.lock().bytes.clone();
    let host = bench.host(0).unwrap();
    bench.discard(0);
    bench.memory.ops();
    bench.image.flush().unwrap();
    let ops = bench.memory.ops();
    let bytes = bench.memory.state.lock().bytes.clone();
    // Killed before the last barrier of that pass: the kernel shows everything that the pass wrote,
    // and none of it is durable.
    let mut shown = durable.clone();
    for op in ops {
        if let Op::Write { at, len } = op {
            let at = at as usize;
            shown.resize(shown.len().max(at + len), 0);
            shown[at..at + len].copy_from_slice(&bytes[at..at + len]);
        }
    }
    let state = MemoryState { bytes: shown.clone(), open: true, ..MemoryState::default() };
    let memory = Arc::new(Memory { state: parking_lot::Mutex::new(state) });
    let image = Image::open(memory.clone()).unwrap();
    let leaks = image.find_leaks().unwrap();
    image.begin_writing().unwrap();
    image.give_back(&leaks).unwrap();
    // A barrier has made durable all that the kernel showed; without a barrier nothing is durable.
    let mut after = if memory.ops().contains(&Op::Sync) { shown } else { durable };
    let again = Bench { memory, image, lock: RangeLock::new(CLUSTER) };
    again.store(5, 9).unwrap();
    assert_eq!(again.host(5), Some(host), "it is given away at once");
    // Of all writes that no barrier covers, only the data of the new owner reaches the disk.
    let at = (host * CLUSTER) as usize;
    after.resize(after.len().max(at + CLUSTER as usize), 0);
    after[at..at + CLUSTER as usize].fill(9);
    let memory = Memory {
        state: parking_lot::Mutex::new(MemoryState { bytes: after, ..MemoryState::default() }),
    };
    assert_eq!(
        reopen(Arc::new(memory)).reads(0),
        0,
        "what was discarded may come back, but not as somebody else's bytes"
    );
}

/// Protects: V28. Leaks are reclaimed in a sound image only; a corrupt image is refused and not
/// changed.
#[test]
fn nothing_is_given_back_in_a_corrupt_image() {
    let bench = bench();
    bench.store(0, 7).unwrap();
    let reserved = bench.image.allocate(2).unwrap();
    bench.image.flush().unwrap();
    let killed = bench.memory.killed();
    drop(reserved);
    let host = bench.host(0).unwrap();
    let mut word = [0; 8];
    killed.read_at(bench.image.reader().header().refcount_table_offset, &mut word).unwrap();
    // The cluster is referenced and not counted.
    killed
        .write_at(WriteKind::RefcountBlock, u64::from_be_bytes(word) + 2 * host, &[0, 0])
        .unwrap();
    killed.ops();
    let error = Image::open(killed.clone()).unwrap().find_leaks().unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Corrupt);
    assert!(
        error
            .to_string()
            .contains(&format!("2 corruptions, the first of them: ERROR OFLAG_COPIED data cluster: l2_entry=8000000000{host:02x}0000")),
        "{error}"
    );
    assert_eq!(killed.ops(), []);
}

/// Protects: R9. A refcount is not lowered to one if the only entry has no COPIED, because the
/// entry would then be wrong.
#[test]
fn a_leak_behind_an_entry_without_copied_is_left_alone() {
    let bench = bench();
    bench.store(0, 7).unwrap();
    bench.store(1, 8).unwrap();
    bench.image.close().unwrap();
    let header = bench.image.reader().header();
    let word = |at: u64| {
        let mut word = [0; 8];
        bench.memory.read_at(at, &mut word).unwrap();
        u64::from_be_bytes(word)
    };
    let l2 = word(header.l1_table_offset) & !(1 << 63);
    bench
        .memory
        .write_at(WriteKind::RefcountBlock, l2, &(word(l2) & !(1 << 63)).to_be_bytes())
        .unwrap();
    let refcounts = word(header.refcount_table_offset);
    bench
        .memory
        .write_at(WriteKind::RefcountBlock, refcounts + 2 * bench.host(0).unwrap(), &[0, 2])
        .unwrap();
    let report = check(&*bench.memory).unwrap();
    assert!(report.is_sound() && report.leaks == 1, "{:?}", report.findings);
    bench.memory.state.lock().open = true;
    let again = reopen(bench.memory.clone());
    again.image.close().unwrap();
    let report = check(&*bench.memory).unwrap();
    assert!(report.is_sound() && report.leaks == 1, "{:?}", report.findings);
    assert_eq!((again.reads(0), again.reads(1)), (7, 8));
}

/// Protects: V29. The check of a file that claims to be large and holds little takes little time
/// and memory. A file that is too large is refused before any walk.
#[test]
fn a_sparse_file_is_checked_by_what_it_holds() {
    #[derive(Debug)]
    struct Sparse(Arc<Memory>, u64);
    impl ReadAt for Sparse {
        fn size(&self) -> u64 {
            self.1
        }

        fn allocated_size(&self) -> io::Result<u64> {
            self.0.allocated_size()
        }

        fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
            self.0.read_at(offset, buf)
        }

        fn status(&self, offset: u64, max: u64) -> io::Result<(BlockStatus, u64)> {
            self.0.status(offset, max)
        }
    }

    impl Storage for Sparse {
        fn write_at(&self, kind: WriteKind, offset: u64, data: &[u8]) -> io::Result<()> {
            self.0.write_at(kind, offset, data)
        }

        fn punch_hole(&self, offset: u64, len: u64) -> io::Result<()> {
            self.0.punch_hole(offset, len)
        }

        fn sync(&self) -> io::Result<()> {
            self.0.sync()
        }
    }

    impl Sidecar for Sparse {}
    let bench = bench();
    bench.store(0, 7).unwrap();
    bench.image.close().unwrap();
    let report = check(&Sparse(bench.memory.clone(), 100 << 40)).unwrap();
    assert_eq!((report.corruptions, report.leaks, report.allocated_clusters), (0, 0, 1));
    let error = check(&Sparse(bench.memory.clone(), 1 << 62)).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::UnsupportedFeature);
}

/// Protects: all clusters that are counted beyond the end of the file are found, and no others, at
/// every refcount width.
#[test]
fn what_is_counted_behind_the_end_is_found_at_every_width() {
    for order in 0..=6 {
        let memory = Arc::new(Memory::default());
        let geometry = Geometry::new(3, 9, 4, 1 << 20).unwrap();
        for (at, bytes) in (NewImage { geometry, backing: None }).layout().unwrap() {
            memory.write_at(WriteKind::Header, at, &bytes).unwrap();
        }
        let word = |at: u64| {
            let mut word = [0; 8];
            memory.read_at(at, &mut word).unwrap();
            u64::from_be_bytes(word)
        };
        let place = word(word(48));
        let used = memory.size().div_ceil(512);
        let geometry = Geometry::new(3, 9, order, 1 << 20).unwrap();
        let entries = geometry.refblock_entries();
        let mut block = crate::format::RefcountBlock::new(&geometry);
        (0..used).for_each(|cluster| block.set(cluster as usize, 1));
        let behind = [used + 3, used + 4, used + 17, entries - 1];
        behind.iter().for_each(|cluster| block.set(*cluster as usize, 1));
        memory.write_at(WriteKind::Header, 96, &order.to_be_bytes()).unwrap();
        memory.write_at(WriteKind::Header, place, block.bytes()).unwrap();
        let image = Image::open(memory.clone()).unwrap();
        let leaks = image.find_leaks().unwrap();
        assert_eq!(leaks.clusters(), 4, "order {order}");
        image.begin_writing().unwrap();
        image.give_back(&leaks).unwrap();
        image.close().unwrap();
        assert_eq!(
            Image::open(memory.clone()).unwrap().find_leaks().unwrap().clusters(),
            0,
            "order {order}"
        );
        assert_exact(&memory, "given back");
    }
}

/// Protects: V29. The walk ends for an L1 table that names the same few clusters again and again.
#[test]
fn a_crafted_l1_table_is_not_followed_for_ever() {
    let memory = Memory::default();
    let geometry = Geometry::new(3, 9, 4, 64 << 20).unwrap();
    for (at, bytes) in (NewImage { geometry, backing: None }).layout().unwrap() {
        memory.write_at(WriteKind::Header, at, &bytes).unwrap();
    }
    let mut word = [0; 8];
    memory.read_at(40, &mut word).unwrap();
    let l1 = u64::from_be_bytes(word);
    assert_eq!(geometry.l1_entries_needed(), 2048);
    for index in 0..2048 {
        memory.write_at(WriteKind::Header, l1 + index * 8, &l1.to_be_bytes()).unwrap();
    }
    let error = check(&memory).unwrap_err();
    assert!(error.to_string().contains("more L2 tables than its file has clusters"), "{error}");
}
