//! Tests of the search for leaks that a successor makes while the guest goes on.

use super::*;
use crate::format::HostCluster;
use sim::random::Random;
use sim::{SimJournal, spec};

const CLUSTER: u64 = 512;
/// Size of the disk in bytes: eight L2 tables.
const SIZE: u64 = 8 * 64 * CLUSTER;

/// A process: its file, its journal and its image.
struct Process {
    file: Arc<SimStorage>,
    journal: Arc<SimJournal>,
    image: Image,
    lock: RangeLock,
}

impl Process {
    fn first() -> Process {
        Process::of(Start::new("search", 3, 9, 4, SIZE).bytes())
    }

    fn of(bytes: Vec<u8>) -> Process {
        let file = SimStorage::new(bytes);
        let journal = SimJournal::new(64 << 10, &file);
        let image = Image::open(file.clone()).unwrap().with_journal(journal.clone()).unwrap();
        image.begin_writing().unwrap();
        Process { file, journal, image, lock: RangeLock::new(CLUSTER) }
    }

    /// The process dies here, and another one takes the image over.
    fn successor(&self) -> Process {
        self.successor_on(SimStorage::new(self.file.bytes()))
    }

    fn successor_on(&self, file: Arc<SimStorage>) -> Process {
        file.set_open_mark().unwrap();
        let journal = SimJournal::of(self.journal.bytes(), Some(file.clone()));
        let image = Image::take_over(file.clone(), journal.clone(), || Ok(())).unwrap();
        Process { file, journal, image, lock: RangeLock::new(CLUSTER) }
    }

    fn put(&self, cluster: u64, byte: u8) {
        let filled = self.fill(byte);
        self.publish(cluster, filled);
    }

    fn fill(&self, byte: u8) -> Filled<'_> {
        self.image.fill(self.image.allocate(1).unwrap(), 0, &[byte; CLUSTER as usize]).unwrap()
    }

    fn publish(&self, cluster: u64, filled: Filled<'_>) {
        let held = self.lock.exclusive(0..SIZE);
        self.image.publish(&held, GuestSubcluster(cluster), filled).unwrap();
    }

    fn discard(&self, cluster: u64) {
        let held = self.lock.exclusive(0..SIZE);
        self.image.discard(&held, GuestSubcluster(cluster)..GuestSubcluster(cluster + 1)).unwrap();
    }

    /// Allocates clusters that are never published.
    fn leak(&self, clusters: usize) {
        for _ in 0..clusters {
            std::mem::forget(self.fill(0xee));
        }
    }

    fn host(&self, cluster: u64) -> Option<u64> {
        match self.image.map(GuestOffset(cluster * CLUSTER), CLUSTER).unwrap().mapping {
            Mapping::Data { host, .. } => Some(host.0),
            _ => None,
        }
    }

    fn byte(&self, cluster: u64) -> u8 {
        let at = GuestOffset(cluster * CLUSTER);
        let extent = self.image.map(at, CLUSTER).unwrap();
        let mut bytes = [0; CLUSTER as usize];
        if extent.mapping != Mapping::Unallocated {
            self.image.read_extent(at, &extent, &mut bytes).unwrap();
        }
        assert!(bytes.iter().all(|byte| *byte == bytes[0]), "cluster {cluster}: {bytes:02x?}");
        bytes[0]
    }

    /// Makes all steps that are left, with `between` after each of them. Returns the number of
    /// leaks, and whether they are all.
    fn search(&self, mut between: impl FnMut()) -> (u64, bool) {
        loop {
            match self.image.search_step().unwrap() {
                SearchStep::Part => between(),
                SearchStep::Last { clusters, is_all } => return (clusters, is_all),
                SearchStep::Nothing => panic!("the search has ended"),
            }
        }
    }

    fn close(&self) -> OpenMark {
        self.image.close().unwrap();
        self.image.end_writing();
        self.file.open_mark().unwrap()
    }

    /// Corruptions and leaks of the file, those beyond its end included.
    fn defects(&self) -> (Vec<String>, u64) {
        let verdict = spec::check(&self.file.bytes());
        (verdict.all(), verdict.all_leaks())
    }
}

/// Protects: P17. A successor gives back what the dead process has allocated and not published, and
/// what it has freed and not given back; the mark of an open image then goes with the close, so
/// that the next open does not search.
#[test]
fn the_leaks_of_a_dead_process_are_given_back() {
    let dead = Process::first();
    (0..200).for_each(|cluster| dead.put(cluster * 2, 1));
    dead.image.flush().unwrap();
    dead.discard(20);
    dead.image.flush().unwrap();
    // Freed in memory only, and unpublished in an older place and at the end.
    dead.leak(3);
    dead.image.flush().unwrap();
    let next = dead.successor();
    let before = next.defects();
    assert!(before.0.is_empty() && before.1 >= 3, "{before:?}");
    let (clusters, is_all) = next.search(|| ());
    assert!(clusters >= 3 && is_all, "{clusters} leaks");
    assert_eq!(next.image.search_step().unwrap(), SearchStep::Nothing);
    assert_eq!(next.close(), OpenMark::Absent);
    assert_eq!(next.defects(), (Vec::new(), 0));
    assert!((0..200).all(|cluster| next.byte(cluster * 2) == u8::from(cluster != 10)));
    assert!(!Image::open(next.file).unwrap().may_leak());
}

/// Protects: R3, R7. What the search finds is freed by a pass, behind a barrier: until then nothing
/// in the file says that the cluster is free, and no request gets it.
#[test]
fn a_leak_is_freed_by_a_pass() {
    let dead = Process::first();
    dead.put(0, 1);
    dead.leak(1);
    dead.put(1, 1);
    dead.image.flush().unwrap();
    let leaked = dead.host(1).unwrap() - 1;
    // The file checks the order of what is written to it.
    let next = dead.successor_on(SimStorage::checked(dead.file.bytes()));
    let before = next.file.bytes();
    assert_eq!(next.search(|| ()), (1, true));
    assert!(next.file.bytes() == before, "the search has written");
    next.put(2, 2);
    assert_ne!(next.host(2), Some(leaked));
    next.image.flush().unwrap();
    next.put(3, 3);
    assert_eq!(next.host(3), Some(leaked), "freed clusters are used first");
}

/// Protects: I2. Requests go on between the steps: clusters are allocated, published, freed and
/// given back, tables are made, evicted and loaded, and one allocation is older than the search.
/// Nothing that is in use is freed, and all leaks are.
#[test]
fn requests_in_the_middle_of_the_search_lose_nothing() {
    for seed in 0..40 {
        let mut random = Random::of_test(seed);
        let dead = Process::first();
        let mut expected = vec![0; (SIZE / CLUSTER) as usize];
        let some = |process: &Process, random: &mut Random, expected: &mut Vec<u8>| {
            let cluster = random.below(SIZE / CLUSTER);
            let byte = 1 + random.below(200) as u8;
            match random.below(8) {
                0 => process.image.flush().unwrap(),
                1 | 2 => {
                    process.discard(cluster);
                    expected[cluster as usize] = 0;
                }
                3 => drop(process.fill(byte)),
                _ => {
                    process.put(cluster, byte);
                    expected[cluster as usize] = byte;
                }
            }
        };
        for _ in 0..random.below(300) {
            some(&dead, &mut random, &mut expected);
            if random.below(10) == 0 {
                dead.leak(1);
            }
        }
        let mut next = dead.successor();
        if seed % 2 == 0 {
            next.image.limit_table_memory(2 * CLUSTER as usize);
        }
        let old = next.fill(7);
        let mut new = None;
        let (_, is_all) = next.search(|| {
            for _ in 0..random.below(6) {
                some(&next, &mut random, &mut expected);
            }
            // A second allocation from a step in the middle to the end.
            if new.is_none() && random.below(4) == 0 {
                new = Some(next.fill(8));
            }
        });
        assert!(is_all, "seed {seed}");
        for (cluster, filled) in [(9, Some(old)), (300, new)] {
            if let Some(filled) = filled {
                expected[cluster as usize] = if cluster == 9 { 7 } else { 8 };
                next.publish(cluster, filled);
            }
        }
        next.image.flush().unwrap();
        // A cluster that was freed by mistake is handed out here.
        for cluster in 400..420 {
            next.put(cluster, 9);
            expected[cluster as usize] = 9;
        }
        let found: Vec<u8> = (0..SIZE / CLUSTER).map(|cluster| next.byte(cluster)).collect();
        assert!(found == expected, "seed {seed}");
        assert_eq!(next.close(), OpenMark::Absent);
        assert_eq!(next.defects(), (Vec::new(), 0), "seed {seed}");
    }
}

/// Protects: I2. What was reserved ahead and is handed out during the search is left alone,
/// although its refcount does not change then.
#[test]
fn what_was_reserved_ahead_is_no_leak() {
    let dead = Process::first();
    dead.put(0, 1);
    dead.image.flush().unwrap();
    let next = dead.successor();
    let filled = next.fill(5);
    assert!(next.search(|| ()).1);
    next.image.flush().unwrap();
    next.publish(70, filled);
    (71..80).for_each(|cluster| next.put(cluster, 6));
    assert_eq!(next.byte(70), 5);
    assert_eq!(next.close(), OpenMark::Absent);
    assert_eq!(next.defects(), (Vec::new(), 0));
}

/// Protects: a second death in the middle of the search, before or after the pass that gives back
/// what it has found: the next process finds the rest.
#[test]
fn a_process_that_dies_in_the_search_has_a_successor() {
    for steps in 0..12 {
        for flushed in [false, true] {
            let dead = Process::first();
            (0..100).for_each(|cluster| dead.put(cluster * 5, 1));
            dead.leak(5);
            dead.image.flush().unwrap();
            let second = dead.successor();
            for _ in 0..steps {
                second.image.search_step().unwrap();
            }
            if flushed {
                second.image.flush().unwrap();
                second.put(1, 2);
            }
            second.leak(2);
            let third = second.successor();
            assert!(third.search(|| ()).1);
            assert_eq!(third.close(), OpenMark::Absent);
            assert_eq!(third.defects(), (Vec::new(), 0), "{steps} steps");
            assert!((0..100).all(|cluster| third.byte(cluster * 5) == 1));
            assert_eq!(third.byte(1), if flushed { 2 } else { 0 });
        }
    }
}

/// Protects: a search that was not finished leaves the mark, and the next open finds the leaks.
#[test]
fn half_a_search_leaves_the_mark() {
    let dead = Process::first();
    dead.put(0, 1);
    dead.leak(4);
    dead.put(500, 1);
    dead.image.flush().unwrap();
    let next = dead.successor();
    assert_eq!(next.image.search_step().unwrap(), SearchStep::Part);
    assert_eq!(next.close(), OpenMark::Present);
    assert_eq!(next.defects(), (Vec::new(), 4));
    let again = Image::open(next.file.clone()).unwrap();
    assert_eq!(again.start_writing(LeakSearch::AfterCrash).unwrap(), 4);
    again.close().unwrap();
    assert_eq!(next.defects(), (Vec::new(), 0));
}

/// Protects: V29, P6. A table that cannot be read, and an entry that cannot be right, end the
/// search: nothing is freed, the guest goes on, and the mark stays.
#[test]
fn what_cannot_be_read_ends_the_search() {
    let dead = Process::first();
    (0..8).for_each(|table| dead.put(table * 64, 1));
    dead.leak(4);
    dead.image.flush().unwrap();
    let layout = spec::Layout::of(&dead.file.bytes()).unwrap();
    let table = layout.l2_tables(&dead.file.bytes()).nth(5).unwrap().1;
    for fails in [false, true] {
        let mut bytes = dead.file.bytes();
        if !fails {
            let wrong = ((1_u64 << 63) | (1 << 40)).to_be_bytes();
            bytes[table as usize + 8..table as usize + 16].copy_from_slice(&wrong);
        }
        let file = SimStorage::new(bytes);
        file.set_open_mark().unwrap();
        let journal = SimJournal::of(dead.journal.bytes(), None);
        let image = Image::take_over(file.clone(), journal.clone(), || Ok(())).unwrap();
        let next = Process { file, journal, image, lock: RangeLock::new(CLUSTER) };
        if fails {
            next.file.inject(Fault {
                matches: Box::new(move |operation: &Operation| {
                    operation.action == Action::Read && operation.at == table
                }),
                after: 0,
                failure: HostFailure::Errno(5),
                times: Repeat::Once,
            });
        }
        let error = loop {
            match next.image.search_step() {
                Ok(step) => assert_eq!(step, SearchStep::Part),
                Err(error) => break error,
            }
        };
        let kind = if fails { ErrorKind::Io } else { ErrorKind::Corrupt };
        assert_eq!(error.kind(), kind, "{error}");
        assert_eq!(next.image.search_step().unwrap(), SearchStep::Nothing);
        assert!(next.image.is_usable());
        next.put(3, 3);
        assert_eq!(next.close(), OpenMark::Present);
        assert_eq!(next.defects().1, 4);
    }
}

/// Protects: V29. A refcount far beyond the end of the file is lowered, and the cluster is not
/// handed out: the file would grow that far.
#[test]
fn a_leak_behind_the_end_of_the_file_is_not_used() {
    let dead = Process::first();
    dead.put(0, 1);
    dead.image.flush().unwrap();
    let mut bytes = dead.file.bytes();
    let layout = spec::Layout::of(&bytes).unwrap();
    let (index, block) = layout.blocks(&bytes).last().unwrap();
    assert_eq!(index, 0);
    // Of the clusters behind the end only the last one that the only block counts is counted.
    let end = bytes.len() / CLUSTER as usize;
    let block = &mut bytes[block as usize..][..CLUSTER as usize];
    block[end * 2..].fill(0);
    *block.last_mut().unwrap() = 1;
    let dead = Process { file: SimStorage::new(bytes), ..dead };
    // As if nothing had been reserved.
    dead.image.journal.as_deref().unwrap().set_reserved(0..0);
    let next = dead.successor();
    let size = next.file.bytes().len() as u64;
    assert_eq!(next.search(|| ()), (1, true));
    next.image.flush().unwrap();
    next.put(1, 1);
    assert!(next.host(1).unwrap() <= size / CLUSTER, "{:?} of {size}", next.host(1));
    assert_eq!(next.close(), OpenMark::Absent);
    assert_eq!(next.defects(), (Vec::new(), 0));
}

/// An image with two compressed guest clusters in one host cluster, whose refcount is `refcount`.
/// Returns it with that host cluster.
fn compressed(refcount: u16) -> (Process, u64) {
    let dead = Process::first();
    dead.put(0, 1);
    dead.image.flush().unwrap();
    let mut bytes = dead.file.bytes();
    let layout = spec::Layout::of(&bytes).unwrap();
    let host = dead.host(0).unwrap();
    let table = layout.l2_tables(&bytes).next().unwrap().1 as usize;
    let entry = ((1_u64 << 62) | (host * CLUSTER)).to_be_bytes();
    bytes[table..table + 8].copy_from_slice(&entry);
    bytes[table + 8..table + 16].copy_from_slice(&entry);
    let block = layout.blocks(&bytes).next().unwrap().1 as usize + host as usize * 2;
    bytes[block..block + 2].copy_from_slice(&refcount.to_be_bytes());
    (Process { file: SimStorage::new(bytes), ..dead }, host)
}

/// Protects: I2. The references of compressed clusters are counted, so that a host cluster with two
/// of them keeps a refcount of two.
#[test]
fn references_of_compressed_clusters_are_counted() {
    for (refcount, leaked) in [(2, 0), (3, 1), (5, 1)] {
        let (dead, host) = compressed(refcount);
        let next = dead.successor();
        assert_eq!(next.search(|| ()), (leaked, true), "refcount {refcount}");
        assert_eq!(next.close(), OpenMark::Absent);
        assert_eq!(next.image.allocator.refcount(HostCluster(host)).unwrap(), 2);
        assert_eq!(next.defects(), (Vec::new(), 0));
    }
    let (dead, _) = compressed(1);
    let next = dead.successor();
    let error = loop {
        match next.image.search_step() {
            Ok(step) => assert_eq!(step, SearchStep::Part),
            Err(error) => break error,
        }
    };
    assert_eq!(error.kind(), ErrorKind::Corrupt, "{error}");
    assert!(error.to_string().contains("has 2 references but its refcount is 1"), "{error}");
}

/// Protects: I2, P4. One of several references is dropped before the cluster is compared, before or
/// after its table was read, and whether a pass comes in between or not: the cluster is left alone,
/// and the mark stays, so that the next open counts again.
#[test]
fn a_shared_cluster_that_changes_is_left_to_the_next_open() {
    for steps in 0..2 {
        for flushed in [false, true] {
            let (dead, host) = compressed(3);
            let next = dead.successor();
            for _ in 0..steps {
                next.image.search_step().unwrap();
            }
            next.discard(1);
            if flushed {
                next.image.flush().unwrap();
            }
            assert_eq!(next.search(|| ()), (0, false), "{steps} steps, flushed: {flushed}");
            assert_eq!(next.close(), OpenMark::Present);
            assert_eq!(next.image.allocator.refcount(HostCluster(host)).unwrap(), 2);
            assert_eq!(next.defects(), (Vec::new(), 1));
        }
    }
    // If all are dropped, one count is left and no reference.
    let (dead, host) = compressed(3);
    let next = dead.successor();
    next.discard(0);
    next.discard(1);
    next.image.flush().unwrap();
    assert_eq!(next.search(|| ()), (0, false));
    assert_eq!(next.close(), OpenMark::Present);
    assert_eq!(next.image.allocator.refcount(HostCluster(host)).unwrap(), 1);
    assert_eq!(next.defects(), (Vec::new(), 1));
    // Behind the comparison nothing is unknown any more.
    let (dead, host) = compressed(3);
    let next = dead.successor();
    assert_eq!(next.search(|| ()), (1, true));
    next.discard(1);
    assert_eq!(next.close(), OpenMark::Absent);
    assert_eq!(next.image.allocator.refcount(HostCluster(host)).unwrap(), 1);
    assert_eq!(next.defects(), (Vec::new(), 0));
}
