//! What the fuzz targets and their authors found, one by one.

use std::sync::Arc;
use std::time::Instant;

use super::template::{COPIED, Kind, Shape, build};
use super::watch::Watch;
use crate::chain::Chain;
use crate::disk::{Disk, Seek};
use crate::image::Image;
use crate::simulation::SimStorage;
use crate::simulation::spec::{self, Layout};

const CLUSTER: u64 = 512;
/// What one L2 table maps, bytes.
const SPAN: u64 = CLUSTER * CLUSTER / 8;

fn shape(size: u64) -> Shape {
    Shape { version: 3, bits: 9, order: 4, zstd: false, size, l1_slack: 0, backing: None }
}

/// With a backing file, where a discard needs a table and no data.
fn backed(size: u64) -> Shape {
    Shape { backing: Some((b"base.raw".to_vec(), Some(b"raw".to_vec()))), ..shape(size) }
}

/// A disk over an image, every write to which is watched.
fn open(image: Vec<u8>) -> (Arc<SimStorage>, Disk) {
    let file = SimStorage::new(image);
    file.observe(Box::new(Watch::new(file.bytes()).unwrap()));
    let image = Image::open(file.clone()).unwrap();
    image.begin_writing().unwrap();
    let chain = image.reader().backing().map(|_| Chain::of_raw(SimStorage::new(vec![0xbb; 1 << 20])));
    (file, Disk::for_tests(image, chain))
}

fn put(image: &mut [u8], at: u64, value: u64) {
    image[at as usize..at as usize + 8].copy_from_slice(&value.to_be_bytes());
}

/// Where entry `index` of the first L2 table is, and what it is.
fn entry(image: &[u8], index: u64) -> (u64, u64) {
    let layout = Layout::of(image).unwrap();
    let (_, table) = layout.l2_tables(image).next().unwrap();
    let found = layout.l2_entries(image, table).find(|(at, _)| *at == index);
    (table + index * 8, found.map_or(0, |(_, raw)| raw))
}

/// R16: two guest clusters that share a host cluster of refcount one, which only a full check finds. What one of them gives back must never hold a
/// table while the other can still be written in place.
#[test]
fn a_cluster_with_two_owners_never_becomes_a_table() {
    let mut image = build(&backed(3 * SPAN), &[Kind::Data(1), Kind::Data(2), Kind::Data(3)], [0, 0]);
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

/// The same with the other owner in a table that is not in memory when the cluster is given back.
#[test]
fn a_cluster_with_an_owner_in_another_table_never_becomes_a_table() {
    let kinds: Vec<Kind> = (0..65).map(|index| if index % 64 == 0 { Kind::Data(1) } else { Kind::Unallocated }).collect();
    let mut image = build(&backed(4 * SPAN), &kinds, [0, 0]);
    let (_, first) = entry(&image, 0);
    let (_, other) = Layout::of(&image).unwrap().l2_tables(&image).nth(1).unwrap();
    put(&mut image, other, first);
    let (_file, disk) = open(image);
    disk.discard(0..CLUSTER).unwrap();
    // Still counted: the removal is not durable yet.
    let _ = disk.read(SPAN, &mut [0; 1]);
    disk.flush().unwrap();
    for table in 2..4 {
        disk.discard(table * SPAN..table * SPAN + CLUSTER).unwrap();
        disk.flush().unwrap();
    }
    let _ = disk.write(SPAN, &[COPIED.to_be_bytes(); 64].concat());
    let _ = disk.close();
}

/// 2.6: clusters that another program left mapped beyond the end of the disk do not come into sight when it grows.
#[test]
fn growing_shows_nothing_that_was_left_beyond_the_end() {
    for (version, backed) in [(3, false), (3, true), (2, false), (2, true)] {
        let backing = backed.then(|| (b"base.raw".to_vec(), Some(b"raw".to_vec())));
        let kinds: Vec<Kind> = (0..200).map(|index| Kind::Data(index | 1)).collect();
        let mut image = build(&Shape { version, backing, l1_slack: 2, ..shape(200 * CLUSTER) }, &kinds, [0, 0]);
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

/// A seek through a million runs, each of which costs the loading of tables, does not go on for ever: it says what is right if not the best.
#[test]
fn a_seek_has_an_end() {
    let kinds: Vec<Kind> = (0..100).map(|index| if index % 2 == 0 { Kind::Zero } else { Kind::Unallocated }).collect();
    let (_file, disk) = open(build(&shape(100 * CLUSTER), &kinds, [0, 0]));
    let over = Instant::now();
    assert_eq!(disk.seek_until(0, Seek::Data, over).unwrap(), Some(CLUSTER));
    assert_eq!(disk.seek_until(99 * CLUSTER, Seek::Data, over).unwrap(), None);
    assert_eq!(disk.seek_until(0, Seek::Hole, over).unwrap(), Some(0));
    assert_eq!(disk.seek(0, Seek::Data).unwrap(), None);
    let (_file, disk) = open(build(&shape(2 * SPAN), &[Kind::Data(1); 128], [0, 0]));
    assert_eq!(disk.seek_until(0, Seek::Hole, over).unwrap(), Some(2 * SPAN));
}
