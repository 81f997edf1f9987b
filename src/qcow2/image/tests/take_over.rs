//! Tests of the journal of an image, and of the image that a successor opens.

use super::*;
use crate::format::GuestCluster;
use sim::SimJournal;

const CLUSTER: u64 = 512;

/// A disk of 64 KiB without a backing file, on a file that records, with a journal of this many
/// records.
fn journaled(records: u64) -> (Arc<SimStorage>, Arc<SimJournal>, Image) {
    let file = SimStorage::new(Start::new("journal", 3, 9, 4, 64 << 10).bytes());
    let journal = SimJournal::new(4096 + 40 * records, &file);
    let image = Image::open(file.clone()).unwrap().with_journal(journal.clone()).unwrap();
    image.begin_writing().unwrap();
    (file, journal, image)
}

fn geometry() -> crate::format::Geometry {
    crate::format::Geometry::new(3, 9, 4, 64 << 10).unwrap()
}

fn successor(file: &SimStorage, journal: &SimJournal) -> Result<Image> {
    let file = SimStorage::new(file.bytes());
    Image::take_over(file, SimJournal::of(journal.bytes(), None), || Ok(()))
}

/// Publishes one cluster of this byte.
fn put(image: &Image, cluster: u64, byte: u8) -> Result<()> {
    let lock = RangeLock::new(CLUSTER);
    let held = lock.exclusive(0..64 << 10);
    let filled = image.fill(image.allocate(1)?, 0, &[byte; CLUSTER as usize])?;
    image.publish(&held, GuestSubcluster(cluster), filled)
}

fn byte_of(image: &Image, cluster: u64) -> Option<u8> {
    let at = GuestOffset(cluster * CLUSTER);
    let extent = image.map(at, CLUSTER).unwrap();
    let mut bytes = [0; CLUSTER as usize];
    image.read_extent(at, &extent, &mut bytes).unwrap();
    (extent.mapping != Mapping::Unallocated).then_some(bytes[0])
}

/// Protects: P17. A journal that is full makes the change wait for a pass; nothing is lost and
/// nothing hangs. A change of more clusters than the journal has records is made in parts.
#[test]
fn a_full_journal_is_a_pass() {
    let (file, journal, image) = journaled(4);
    for cluster in 0..40 {
        // Every second cluster, so that no two changes are one record.
        put(&image, cluster * 2, cluster as u8 + 1).unwrap();
        let next = successor(&file, &journal).unwrap();
        for known in 0..=cluster {
            assert_eq!(byte_of(&next, known * 2), Some(known as u8 + 1));
        }
    }
    assert!(image.commits() >= 9, "{} passes", image.commits());
    let lock = RangeLock::new(CLUSTER);
    let held = lock.exclusive(0..64 << 10);
    image.zero(&held, GuestSubcluster(0)..GuestSubcluster(80)).unwrap();
    let next = successor(&file, &journal).unwrap();
    assert!((0..80).all(|cluster| byte_of(&next, cluster) == Some(0)));
}

/// Protects: P17, I2. If a change cannot be recorded, its request fails and the image accepts no
/// further one: a later write in place would be acknowledged and lost. The new cluster that the
/// entry in memory names is not handed out again.
#[test]
fn a_journal_that_cannot_be_written_latches() {
    let (file, journal, image) = journaled(16);
    put(&image, 1, 1).unwrap();
    journal.fail(true);
    put(&image, 2, 2).unwrap_err();
    journal.fail(false);
    assert!(!image.is_usable());
    put(&image, 3, 3).unwrap_err();
    // A request that has looked before the latch may still allocate.
    let Mapping::Data { host, .. } = image.map(GuestOffset(2 * CLUSTER), 1).unwrap().mapping else {
        panic!("the entry is set");
    };
    assert_ne!(image.allocator.allocate(1).unwrap().0, host);
    image.flush().unwrap_err();
    let next = successor(&file, &journal).unwrap();
    assert_eq!((byte_of(&next, 1), byte_of(&next, 2)), (Some(1), None));
}

/// Protects: P7. If two processes in a row have died while the result of a barrier was asked for,
/// the result is lost, and no write is accepted.
#[test]
fn an_unknown_barrier_counts_as_failed() {
    let (file, journal, image) = journaled(16);
    put(&image, 1, 1).unwrap();
    let mut asked = 0;
    let held = file.hold(|operation| operation.action == Action::Sync);
    std::thread::scope(|scope| {
        scope.spawn(|| image.flush());
        held.wait_for(1);
        let dead = SimJournal::of(journal.bytes(), None);
        let bytes = file.bytes();
        // The successor dies in the question: the journal is as it was then.
        let during = std::cell::RefCell::new(Vec::new());
        let first = Image::take_over(SimStorage::new(bytes.clone()), dead.clone(), || {
            *during.borrow_mut() = dead.bytes();
            asked += 1;
            Ok(())
        });
        assert!(first.unwrap().is_usable(), "the barrier has succeeded");
        let during = SimJournal::of(during.into_inner(), None);
        let second = Image::take_over(SimStorage::new(bytes), during, || panic!("asked again"));
        let second = second.unwrap();
        assert!(!second.is_usable() && byte_of(&second, 1) == Some(1));
        drop(held);
    });
    assert_eq!(asked, 1);
}

/// Protects: P11. An image that was found corrupt accepts no write in a successor, also in version
/// 2, whose header has no corrupt bit.
#[test]
fn corruption_is_known_to_the_successor() {
    for version in [2, 3] {
        let file = SimStorage::new(Start::new("journal", version, 9, 4, 64 << 10).bytes());
        let journal = SimJournal::new(8192, &file);
        let image = Image::open(file.clone()).unwrap().with_journal(journal.clone()).unwrap();
        put(&image, 1, 1).unwrap();
        image.watch::<()>(Err(Error::new(ErrorKind::Corrupt, "for a test"))).unwrap_err();
        let next = successor(&file, &journal).unwrap();
        assert!(!next.is_usable(), "version {version}");
        assert_eq!(byte_of(&next, 1), Some(1));
        put(&next, 2, 2).unwrap_err();
    }
}

/// Protects: P17. A cluster that had several users is used again before its lowered refcount is on
/// disk: a successor counts it once.
#[test]
fn a_cluster_that_was_shared_is_counted_once() {
    let (file, journal, image) = journaled(16);
    put(&image, 1, 1).unwrap();
    image.flush().unwrap();
    let Mapping::Data { host, .. } = image.map(GuestOffset(CLUSTER), CLUSTER).unwrap().mapping
    else {
        panic!("not mapped")
    };
    // As if two more entries had named it, and were removed.
    let block = {
        let header = image.reader().header();
        let bytes = file.bytes();
        let at = header.refcount_table_offset as usize;
        let entry = bytes[at..at + 8].iter().fold(0, |value, &byte| value << 8 | u64::from(byte));
        (entry as usize + host.0 as usize * 2, 3_u16.to_be_bytes())
    };
    let mut bytes = file.bytes();
    bytes[block.0..block.0 + 2].copy_from_slice(&block.1);
    let shared = SimStorage::new(bytes);
    let made = Journal::create(journal.clone(), &geometry()).unwrap();
    let entry = (1 << 63) | (host.0 * CLUSTER);
    let moved = crate::journal::MappingChange {
        start: GuestCluster(9),
        count: 1,
        entry,
        bitmap: 0,
        step: 0,
    };
    let gone = crate::journal::MappingChange {
        start: GuestCluster(1),
        count: 1,
        entry: 1,
        bitmap: 0,
        step: 0,
    };
    made.append(made.promise(2).unwrap(), &[gone, moved]).unwrap();
    let error = successor(&shared, &journal).map(drop).unwrap_err();
    assert!(error.to_string().contains("still needs"), "the old entry is on disk: {error}");
    // Once the removal is durable, the cluster is free for another guest cluster.
    let lock = RangeLock::new(CLUSTER);
    image.discard(&lock.exclusive(0..64 << 10), GuestSubcluster(1)..GuestSubcluster(2)).unwrap();
    image.flush().unwrap();
    let mut bytes = file.bytes();
    bytes[block.0..block.0 + 2].copy_from_slice(&block.1);
    let made = Journal::create(journal.clone(), &geometry()).unwrap();
    made.append(made.promise(1).unwrap(), &[moved]).unwrap();
    let next = successor(&SimStorage::new(bytes), &journal).unwrap();
    assert_eq!(next.allocator.refcount(host).unwrap(), 1);
    assert!(byte_of(&next, 9).is_some());
}

/// Protects: I2. A journal that does not fit the image is refused: the guest would read old bytes.
#[test]
fn a_journal_of_another_image_is_refused() {
    let (file, _, image) = journaled(16);
    put(&image, 1, 1).unwrap();
    image.flush().unwrap();
    let size = file.bytes().len() as u64;
    let copied = 1 << 63;
    let table = image.reader().header().l1_table_offset;
    let entries = [
        (1, copied | (size.next_multiple_of(CLUSTER) + CLUSTER), "does not have"),
        (1, copied, "without an offset"),
        (1, copied | table, "metadata"),
        (1, 1 << 62 | 5, "does not make"),
        (1, size & !511, "does not make"),
        (1 << 40, 1, "beyond the end"),
        (u64::MAX, 1, "no cluster"),
    ];
    for (start, entry, why) in entries {
        let journal = SimJournal::of(vec![0; 8192], None);
        let made = Journal::create(journal.clone(), &geometry()).unwrap();
        let change = crate::journal::MappingChange {
            start: GuestCluster(start),
            count: 1,
            entry,
            bitmap: 0,
            step: 0,
        };
        made.append(made.promise(1).unwrap(), &[change]).unwrap();
        let error = successor(&file, &journal).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Corrupt, "{error}");
        assert!(error.to_string().contains(why), "{start} {entry:#x}: {error}");
    }
    assert!(successor(&file, &SimJournal::of(vec![0; 8192], None)).is_err(), "zeros");
}

/// Protects: leaks of a process that has died are found by the next open: its successor leaves the
/// open mark when it closes the image.
#[test]
fn the_mark_of_a_dead_process_stays() {
    let (file, journal, image) = journaled(16);
    put(&image, 1, 1).unwrap();
    // The refcounts of the clusters that are reserved ahead are on disk after this.
    image.flush().unwrap();
    let unpublished = image.fill(image.allocate(1).unwrap(), 0, &[9; CLUSTER as usize]).unwrap();
    std::mem::forget(unpublished);
    let next_file = SimStorage::new(file.bytes());
    next_file.set_open_mark().unwrap();
    let journal = SimJournal::of(journal.bytes(), None);
    let next = Image::take_over(next_file.clone(), journal, || Ok(())).unwrap();
    next.close().unwrap();
    next.end_writing();
    assert_eq!(next_file.open_mark().unwrap(), OpenMark::Present);
    let again = Image::open(next_file.clone()).unwrap();
    assert_eq!(
        again.start_writing(LeakSearch::AfterCrash).unwrap(),
        1,
        "the one that was not published, and none of those that were reserved ahead"
    );
    again.close().unwrap();
    again.end_writing();
    assert_eq!(next_file.open_mark().unwrap(), OpenMark::Absent);
    assert_eq!(byte_of(&again, 1), Some(1));
}
