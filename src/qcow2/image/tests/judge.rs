//! Tests that a table that is checked run by run has the same faulty entries as one that is checked
//! entry by entry.

use super::*;
use crate::format::{HostCluster, L2Entry, RawL2Entry, RefcountBlock, raw_entries};
use crate::image::judge::{judge, referenced};
use crate::image::judged::Fault;
use crate::image::tables::OUTSIDE;
use sim::random::Random;

const COPIED: u64 = 1 << 63;
const COMPRESSED: u64 = 1 << 62;
const ZERO: u64 = 1;

/// Makes an image with data under some refcount blocks, and a few refcounts of zero or two.
fn image(geometry: Geometry, random: &mut Random) -> Image {
    let memory = Arc::new(Memory::default());
    for (at, bytes) in (NewImage { geometry, backing: None }).layout().unwrap() {
        memory.write_at(WriteKind::Header, at, &bytes).unwrap();
    }
    let image = Image::open(memory.clone()).unwrap();
    image.begin_writing().unwrap();
    let lock = RangeLock::new(geometry.cluster_size());
    let entries = geometry.refblock_entries().min(600);
    for cluster in 0..2 * entries + 50 {
        let at = cluster * geometry.cluster_size();
        let held = lock.exclusive(at..at + geometry.cluster_size());
        let filled =
            image.fill(image.allocate(1).unwrap(), 0, &vec![1; geometry.cluster_size() as usize]);
        let subcluster = GuestSubcluster(at >> geometry.subcluster_bits());
        image.publish(&held, subcluster, filled.unwrap()).unwrap();
    }
    image.close().unwrap();
    image.end_writing();
    let memory = memory.killed();
    let mut word = [0; 8];
    memory.read_at(48, &mut word).unwrap();
    memory.read_at(u64::from_be_bytes(word), &mut word).unwrap();
    let (at, mut bytes) =
        (u64::from_be_bytes(word), vec![0; geometry.cluster_size() as usize].into_boxed_slice());
    memory.read_at(at, &mut bytes).unwrap();
    let mut block = RefcountBlock::from_bytes(bytes, &geometry);
    for _ in 0..random.below(4) {
        block.set(random.below(entries) as usize, (random.below(2) * 2).min(block.max()));
    }
    memory.write_at(WriteKind::Header, at, block.bytes()).unwrap();
    // A part of a cluster, which the file has no longer.
    let lost = random.below(2) * random.below(geometry.cluster_size());
    let mut state = memory.state.lock();
    let len = state.bytes.len() - lost as usize;
    state.bytes.truncate(len);
    drop(state);
    Image::open(memory).unwrap()
}

/// Returns the words of a table: entries that follow each other, and one in `noise` that does not.
fn table(geometry: &Geometry, clusters: u64, noise: u64, random: &mut Random) -> Vec<u64> {
    let bits = geometry.cluster_bits();
    let mut last = COPIED | random.below(clusters) << bits;
    let mut words = Vec::new();
    for _ in 0..geometry.l2_entries().min(700) {
        last = if random.below(noise) > 0 {
            last.wrapping_add(1 << bits)
        } else {
            let host = random.below(clusters + 2) << bits;
            match random.below(9) {
                0 => 0,
                1 => host | ZERO,
                2 => COPIED | host | ZERO,
                3 => COMPRESSED | host | random.below(1 << bits),
                4 => OUTSIDE,
                5 => random.next(),
                6 => host,
                7 => (COPIED | 1 << 56).wrapping_sub(1 << bits),
                _ => COPIED | host,
            }
        };
        words.push(last);
        if geometry.has_extended_l2() {
            let allocated = random.next() as u32;
            let zero = if random.below(noise) > 0 { !allocated } else { random.next() as u32 };
            words.push(u64::from(zero) << 32 | u64::from(allocated));
        }
    }
    words
}

/// Protects: V24 to V27, V30, R9. The check of whole runs finds a fault in exactly those entries in
/// which the check of one entry finds one: across refcount blocks, beside metadata, reserved
/// clusters and the end of the file, while clusters are allocated and given back.
#[test]
fn runs_have_the_faults_of_their_entries() {
    let mut random = Random::of_test(31);
    let (mut good, mut bad) = (0, 0);
    for round in 0..60 {
        let small = Geometry::new(3, [9, 12, 14][round % 3], 4, 64 << 20).unwrap();
        let geometry = if round % 3 == 2 { small.with_extended_l2().unwrap() } else { small };
        let image = image(geometry, &mut random);
        image.allocator.limit_memory(random.below(2000) as usize);
        // Clusters behind the end of the file are allocated as well.
        let more = random.below(2) * 400 * geometry.cluster_size();
        let size = image.reader.storage.size() + more;
        let clusters = size.div_ceil(geometry.cluster_size());
        let (mut handed_out, mut tables) = (Vec::new(), Vec::new());
        for _ in 0..40 {
            match random.below(6) {
                0 => handed_out.push(image.allocator.allocate(1 + random.below(300)).unwrap()),
                1 => tables.push(image.allocator.allocate_l2_table().unwrap()),
                2 => drop(handed_out.pop().map(|(at, len)| image.allocator.give_back(at, len))),
                3 => drop(tables.pop().map(|at| image.allocator.give_back_l2_table(at))),
                4 => drop(image.allocator.allocate_contiguous(1 + random.below(300)).unwrap()),
                _ => {}
            }
            let noise = [2, 20, 200, 1 << 20][random.below(4) as usize];
            let words = table(&geometry, clusters, noise, &mut random);
            let judged = judge(&words, &geometry, size, Some(&image.allocator));
            // If whole clusters are lost, the last cluster of the file is bad as well: a rule with
            // tests of its own.
            let lost = |raw: RawL2Entry| {
                referenced(raw, &geometry, size).is_err()
                    && (raw.descriptor == OUTSIDE || L2Entry::decode(raw, &geometry).is_ok())
            };
            if !size.is_multiple_of(geometry.cluster_size())
                && raw_entries(&words, &geometry).any(lost)
            {
                continue;
            }
            let is_all_good = judged.is_none();
            for (index, raw) in raw_entries(&words, &geometry).enumerate() {
                let found = judged.as_ref().map_or(Fault::None, |judged| judged.fault(index));
                let wanted = referenced(raw, &geometry, size).and_then(|(hosts, copied)| {
                    hosts.into_iter().try_for_each(|cluster| {
                        image.allocator.check_data(HostCluster(cluster), copied)
                    })
                });
                let wanted = if wanted.is_ok() { Fault::None } else { Fault::Bad };
                assert_eq!(found, wanted, "round {round}, index {index}: {raw:x?}");
                good += usize::from(wanted == Fault::None && is_all_good);
                bad += usize::from(wanted == Fault::Bad);
            }
        }
    }
    assert!(good > 10_000 && bad > 10_000, "{good} good entries in good tables, {bad} bad ones");
}
