//! Cases that the fuzz targets and their authors found, one test each.

use std::sync::Arc;
use std::time::Instant;

use super::template::{COPIED, Kind, Shape, build};
use super::watch::Watch;
use engine::chain::Chain;
use engine::disk::{Disk, Seek};
use host::storage::WriteKind;
use qcow2::image::Image;
use sim::spec::{self, Layout};
use sim::{Action, Fault, HostFailure, Operation, Repeat, SimStorage};

const CLUSTER: u64 = 512;
/// Guest bytes that one L2 table maps.
const SPAN: u64 = CLUSTER * CLUSTER / 8;

fn shape(size: u64) -> Shape {
    Shape {
        version: 3,
        bits: 9,
        order: 4,
        zstd: false,
        extended: false,
        size,
        l1_slack: 0,
        backing: None,
    }
}

/// A shape with a backing file, where a discard needs a table and no data.
fn backed(size: u64) -> Shape {
    Shape { backing: Some((b"base.raw".to_vec(), Some(b"raw".to_vec()))), ..shape(size) }
}

/// Opens a disk on an image and watches every write to the image.
fn open(image: Vec<u8>) -> (Arc<SimStorage>, Disk) {
    let file = SimStorage::new(image);
    file.observe(Box::new(Watch::new(file.bytes()).unwrap()));
    let image = Image::open(file.clone()).unwrap();
    image.begin_writing().unwrap();
    let chain =
        image.reader().backing().map(|_| Chain::of_raw(SimStorage::new(vec![0xbb; 1 << 20])));
    (file, Disk::for_tests(image, chain))
}

fn put(image: &mut [u8], at: u64, value: u64) {
    image[at as usize..at as usize + 8].copy_from_slice(&value.to_be_bytes());
}

/// Returns the host offset of entry `index` of the first L2 table, and the entry.
fn entry(image: &[u8], index: u64) -> (u64, u64) {
    let layout = Layout::of(image).unwrap();
    let (_, table) = layout.l2_tables(image).next().unwrap();
    let found = layout.l2_entries(image, table).find(|(at, _)| *at == index);
    (table + index * 8, found.map_or(0, |(_, entry)| entry.raw))
}

/// R16: two guest clusters share a host cluster of refcount one, which only a full check finds.
/// When one of them frees it, the cluster must never become a table while the other guest cluster
/// can still be written in place.
#[test]
fn a_cluster_with_two_owners_never_becomes_a_table() {
    let mut image =
        build(&backed(3 * SPAN), &[Kind::Data(1), Kind::Data(2), Kind::Data(3)], [0, 0]);
    let (_, first) = entry(&image, 0);
    let (second_at, _) = entry(&image, 1);
    put(&mut image, second_at, first);
    let (_file, disk) = open(image);
    let mut buf = vec![0; 3 * CLUSTER as usize];
    disk.read(0, &mut buf).unwrap();
    disk.discard(0..CLUSTER).unwrap();
    disk.flush().unwrap();
    for table in 1..3 {
        disk.discard(table * SPAN..table * SPAN + CLUSTER).unwrap();
        disk.flush().unwrap();
    }
    disk.write(CLUSTER, &[COPIED.to_be_bytes(); 64].concat()).unwrap();
    disk.flush().unwrap();
    disk.discard(CLUSTER..2 * CLUSTER).unwrap();
    let _ = disk.flush();
    let _ = disk.write(SPAN + CLUSTER, &[9; 100]);
    let _ = disk.close();
}

/// The same, but the second reference is in a table that is not in memory when the cluster is
/// freed.
#[test]
fn a_cluster_with_an_owner_in_another_table_never_becomes_a_table() {
    let kinds: Vec<Kind> = (0..65)
        .map(|index| if index % 64 == 0 { Kind::Data(1) } else { Kind::Unallocated })
        .collect();
    let mut image = build(&backed(4 * SPAN), &kinds, [0, 0]);
    let (_, first) = entry(&image, 0);
    let (_, other) = Layout::of(&image).unwrap().l2_tables(&image).nth(1).unwrap();
    put(&mut image, other, first);
    let (_file, disk) = open(image);
    disk.discard(0..CLUSTER).unwrap();
    // The cluster is still counted, because the removal is not durable yet.
    let _ = disk.read(SPAN, &mut [0; 1]);
    disk.flush().unwrap();
    for table in 2..4 {
        disk.discard(table * SPAN..table * SPAN + CLUSTER).unwrap();
        disk.flush().unwrap();
    }
    let _ = disk.write(SPAN, &[COPIED.to_be_bytes(); 64].concat());
    let _ = disk.close();
}

/// An L2 entry names a cluster that was free when the image was opened. The entry is read only
/// after that cluster was allocated for a write that fails. Both the write and a discard of the
/// entry's guest cluster free it; it must become free only once.
#[test]
fn a_cluster_that_two_give_back_is_free_once() {
    let kinds: Vec<Kind> = (0..65)
        .map(|index| if index % 64 == 0 { Kind::Data(1) } else { Kind::Unallocated })
        .collect();
    let mut image = build(&backed(4 * SPAN), &kinds, [1, 0]);
    let layout = Layout::of(&image).unwrap();
    let free = (1..).find(|&cluster| layout.refcount(&image, cluster) == 0).unwrap() * CLUSTER;
    assert!(free < image.len() as u64);
    let (_, other) = layout.l2_tables(&image).nth(1).unwrap();
    put(&mut image, other, COPIED | free);
    let (file, disk) = open(image);
    std::thread::scope(|scope| {
        let held = file.hold(move |operation| {
            operation.action == Action::Write(WriteKind::NewCluster) && operation.at == free
        });
        let write = scope.spawn(|| disk.write(CLUSTER, &[9; CLUSTER as usize]));
        held.wait_for(1);
        disk.discard(SPAN..SPAN + CLUSTER).unwrap();
        disk.flush().unwrap();
        let fails =
            |operation: &Operation| operation.action == Action::Write(WriteKind::NewCluster);
        file.inject(Fault {
            matches: Box::new(fails),
            after: 0,
            failure: HostFailure::Errno(5),
            times: Repeat::Once,
        });
        drop(held);
        write.join().unwrap().unwrap_err();
    });
    file.heal();
    // The cluster is allocated once.
    disk.write(CLUSTER, &[2; CLUSTER as usize]).unwrap();
    disk.write(2 * CLUSTER, &[3; CLUSTER as usize]).unwrap();
    let mut buf = vec![0; 2 * CLUSTER as usize];
    disk.read(CLUSTER, &mut buf).unwrap();
    assert!(buf[..512].iter().all(|byte| *byte == 2) && buf[512..].iter().all(|byte| *byte == 3));
    disk.close().unwrap();
    let verdict = spec::check(&file.bytes());
    // The cluster that the entry named before the damage is leaked from the start.
    assert!(verdict.errors.is_empty() && verdict.all_leaks() == 1, "{verdict:?}");
}

/// P8: a bad entry, of the overlay or of a backing file, is data for a seek or a map and an error
/// for a read. It fails no other request. A stream fails and keeps the backing file that has the
/// entry.
#[test]
fn a_bad_entry_is_data_until_it_is_read() {
    let size = 4 * SPAN;
    let kinds: Vec<Kind> = (0..10).map(|index| Kind::Data(index * 4 + 1)).collect();
    let mut damaged = build(&backed(size), &kinds, [0, 0]);
    let (at, _) = entry(&damaged, 4);
    put(&mut damaged, at, COPIED | 1 << 40);
    let bad = 4 * CLUSTER..5 * CLUSTER;

    // The bad entry is in the overlay.
    let (_file, disk) = open(damaged.clone());
    let statistics = disk.allocation_statistics(256).unwrap();
    let per_cluster = statistics.local.iter().take(11).copied().collect::<Vec<_>>();
    assert_eq!(
        (statistics.cell_size, per_cluster),
        (CLUSTER, [vec![CLUSTER; 10], vec![0]].concat())
    );
    let locator = disk.locator(Instant::now());
    let located = locator.locate(bad.start).unwrap();
    assert_eq!(
        (located.depth, located.data, located.zero, located.offset, located.length),
        (0, true, false, None, CLUSTER)
    );
    assert_eq!(locator.locate(bad.end).unwrap().depth, 0);
    assert_eq!(disk.seek(bad.start, Seek::Data).unwrap(), Some(bad.start));
    let mut buf = vec![0; CLUSTER as usize];
    assert!(disk.read(bad.start, &mut buf).is_err());
    disk.read(bad.end, &mut buf).unwrap();
    assert!(!disk.is_usable() && disk.write(bad.end, &buf).is_err());

    // The bad entry is in a backing file: writes to the overlay succeed.
    let file = SimStorage::new(build(&backed(size), &[], [0, 0]));
    let chain = Chain::of_two(SimStorage::new(damaged), SimStorage::new(vec![0xbb; size as usize]))
        .unwrap();
    let disk = Disk::for_tests(Image::open(file).unwrap(), Some(chain)).copying_up(true);
    assert_eq!(disk.seek(bad.start, Seek::Data).unwrap(), Some(bad.start));
    let located = disk.locator(Instant::now()).locate(bad.start).unwrap();
    assert_eq!(
        (located.depth, located.data, located.offset, located.length),
        (1, true, None, CLUSTER)
    );
    for cluster in 0..12 {
        let result = disk.read(cluster * CLUSTER, &mut buf);
        assert_eq!(result.is_err(), cluster == 4, "cluster {cluster}: {result:?}");
    }
    assert!(disk.populate(0..size, usize::MAX).is_err());
    for range in [0..bad.start, bad.end..size] {
        disk.populate(range, usize::MAX).unwrap();
    }
    assert!(
        disk.detach_backing(usize::MAX, None).is_err(),
        "cluster 4 is still to come from below"
    );
    // After a guest write of the whole cluster, the bad entry is not needed any more.
    disk.write(bad.start, &[6; CLUSTER as usize]).unwrap();
    disk.detach_backing(usize::MAX, None).unwrap();
    disk.read(bad.start, &mut buf).unwrap();
    assert!(buf.iter().all(|byte| *byte == 6));
    disk.close().unwrap();
}

/// Clusters that are counted before their use belong to no guest cluster: an entry that names one
/// is bad.
#[test]
fn a_cluster_that_is_reserved_is_named_by_nobody() {
    let kinds: Vec<Kind> = (0..65)
        .map(|index| if index % 64 == 0 { Kind::Data(1) } else { Kind::Unallocated })
        .collect();
    let mut image = build(&backed(4 * SPAN), &kinds, [0, 0]);
    let (_, other) = Layout::of(&image).unwrap().l2_tables(&image).nth(1).unwrap();
    // Space behind the last cluster. Allocating the first cluster counts a part of this space as a
    // reserve.
    let ahead = image.len() as u64 + 3 * CLUSTER;
    image.resize(ahead as usize + 8 * CLUSTER as usize, 0);
    put(&mut image, other, COPIED | ahead);
    let (_file, disk) = open(image);
    disk.write(CLUSTER, &[9; CLUSTER as usize]).unwrap();
    let error = disk.discard(SPAN..SPAN + CLUSTER).unwrap_err().to_string();
    assert!(error.contains("its refcount is zero"), "{error}");
}

/// H19: clusters that another program left mapped beyond the end of the disk do not become visible
/// when the disk grows.
#[test]
fn growing_shows_nothing_that_was_left_beyond_the_end() {
    for (version, backed) in [(3, false), (3, true), (2, false), (2, true)] {
        let backing = backed.then(|| (b"base.raw".to_vec(), Some(b"raw".to_vec())));
        let kinds: Vec<Kind> = (0..200).map(|index| Kind::Data(index | 1)).collect();
        let mut image =
            build(&Shape { version, backing, l1_slack: 2, ..shape(200 * CLUSTER) }, &kinds, [0, 0]);
        put(&mut image, 24, 10 * CLUSTER);
        let (file, disk) = open(image);
        if backed {
            disk.populate(0..disk.size(), usize::MAX).unwrap();
            disk.detach_backing(usize::MAX, None).unwrap();
        }
        disk.grow(150 * CLUSTER).unwrap();
        let mut beyond = vec![0xee; 140 * CLUSTER as usize];
        disk.read(10 * CLUSTER, &mut beyond).unwrap();
        assert!(beyond.iter().all(|byte| *byte == 0), "version {version}, backing {backed}");
        assert_eq!(disk.seek(10 * CLUSTER, Seek::Data).unwrap().is_none(), version == 3);
        disk.close().unwrap();
        let verdict = spec::check(&file.bytes());
        assert!(verdict.all().is_empty() && verdict.all_leaks() == 0, "{verdict:?}");
    }
}

/// A seek across a million runs, where each run makes the engine load tables, ends after a bounded
/// time. Its answer is then correct, but not the nearest one.
#[test]
fn a_seek_has_an_end() {
    let kinds: Vec<Kind> =
        (0..100).map(|index| if index % 2 == 0 { Kind::Zero } else { Kind::Unallocated }).collect();
    let (_file, disk) = open(build(&shape(100 * CLUSTER), &kinds, [0, 0]));
    let over = Instant::now();
    assert_eq!(disk.seek_until(0, Seek::Data, over).unwrap(), Some(CLUSTER));
    assert_eq!(disk.seek_until(99 * CLUSTER, Seek::Data, over).unwrap(), None);
    assert_eq!(disk.seek_until(0, Seek::Hole, over).unwrap(), Some(0));
    assert_eq!(disk.seek(0, Seek::Data).unwrap(), None);
    let (_file, disk) = open(build(&shape(2 * SPAN), &[Kind::Data(1); 128], [0, 0]));
    assert_eq!(disk.seek_until(0, Seek::Hole, over).unwrap(), Some(2 * SPAN));
}
