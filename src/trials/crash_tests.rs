//! A hundred thousand losses of power (P4, R1 to R16): all pairs of operations above images whose
//! tables are about to grow, then longer random workloads. `CORDISK_CRASH_STATES` sets the number
//! of states and `CORDISK_SEED` the random numbers. `CORDISK_CRASH` replays one state, with the
//! line that a failure prints.

use std::sync::Arc;

use super::cut::{Limits, Tally, cut, ended};
use super::workload::{Files, Op, Story, play, written};
use sim::random::{Random, mix};
use sim::start::{Fill, Start, base_bytes};

/// Minimum number of different states that all tests of this module check together.
const STATES: usize = 180_000;

/// Minimum number of longer random workloads above each image.
const LONGER: usize = 150;

pub(super) fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok().and_then(|value| value.parse().ok())
}

/// Returns the images that workloads start from. They have clusters of 512 bytes where tables
/// should grow.
pub(super) fn starts() -> Vec<Start> {
    let some = vec![
        (0, Fill::Data(1)),
        (1, Fill::Data(2)),
        (2, Fill::Zero),
        (6, Fill::Data(3)),
        (7, Fill::Reserved(4)),
    ];
    let plain = vec![(0, Fill::Data(1)), (1, Fill::Data(2)), (6, Fill::Data(3))];
    let start = |name, version, bits, order, size, base, clusters: &Vec<(u64, Fill)>| Start {
        base,
        clusters: clusters.clone(),
        ..Start::new(name, version, bits, order, size)
    };
    let full = |start: Start, counted, free| Start { counted, free, ..start };
    vec![
        start("v3-512", 3, 9, 4, 64 << 10, 48 << 10, &some),
        // The last cluster is allocated whole, the disk ends inside it, and the base is longer than
        // the disk. When the disk grows, the bytes of the base behind the old end must stay hidden.
        start(
            "v3-4k",
            3,
            12,
            4,
            (125 << 10) + 512,
            150 << 10,
            &[&some[..], &[(31, Fill::Data(5))]].concat(),
        ),
        start("v2-512", 2, 9, 4, 64 << 10, 80 << 10, &plain),
        start("v2-alone", 2, 9, 4, 40 << 10, 0, &plain),
        start("v3-1bit", 3, 9, 0, 40 << 10, 40 << 10, &some),
        // The last refcount block is full except for some clusters; the next allocation needs
        // another block.
        full(start("v3-block", 3, 9, 6, 64 << 10, 64 << 10, &some), 64, 3),
        full(start("v3-2bit-block", 3, 9, 1, 40 << 10, 0, &some), 2048, 2),
        // The refcount table is full and so are its blocks: the table must move.
        full(start("v3-table", 3, 9, 6, 64 << 10, 32 << 10, &some), 4096, 2),
        // No L2 table, and an L1 table that ends with the disk.
        Start {
            autoclear: 1 << 40,
            ..start("v3-empty", 3, 9, 5, 64 << 10, 160 << 10, &Vec::new())
        },
        start("v3-4k-8bit", 3, 12, 3, 200 << 10, 100 << 10, &some),
        // Whole clusters are cloned instead of copied. One base ends inside a cluster and inside
        // the disk; the other reaches beyond the end of the disk.
        Start { clones: 512, ..start("v3-cloned", 3, 9, 4, 64 << 10, (48 << 10) + 100, &some) },
        Start {
            clones: 4096,
            ..start("v3-4k-cloned", 3, 12, 4, (125 << 10) + 512, 150 << 10, &some)
        },
        // Subclusters of 512 bytes. The disk ends inside a cluster, and its table has entries with
        // every mix of subclusters.
        subclusters(start("v3-subclusters", 3, 14, 4, (220 << 10) + 512, 240 << 10, &some)),
        Start {
            clones: 4096,
            ..subclusters(start("v3-subclusters-cloned", 3, 14, 4, 224 << 10, 130 << 10, &some))
        },
        subclusters(start("v3-subclusters-alone", 3, 14, 4, 224 << 10, 0, &some)),
    ]
}

/// Returns a start with extended L2 entries.
fn subclusters(start: Start) -> Start {
    let mixed = [
        (3, Fill::Parts(8, 0x00ff_0000_0000_ff00)),
        (4, Fill::Parts(9, 0x5555_5554_8888_8881)),
        (5, Fill::Parts(10, 0)),
    ];
    let mut clusters = start.clusters.clone();
    clusters.retain(|(cluster, _)| *cluster < 3 || *cluster == 7);
    clusters.extend(mixed);
    Start { clusters, extended: true, ..start }
}

pub(super) fn files(start: &Start) -> Files {
    Files { overlay: start.bytes(), base: Arc::new(base_bytes(start.base)), clones: start.clones }
}

/// Returns one operation of each kind, in ranges that touch or overlap each other.
pub(super) fn alphabet(start: &Start) -> Vec<Op> {
    let cluster = 1 << start.cluster_bits;
    let half = start.size / 2;
    let l2_span = (cluster * cluster / 8).min(half - half % cluster);
    let part = cluster / 32;
    let of_subclusters = vec![
        Op::Write(3 * part, part),
        Op::Write(cluster + part / 2 + 100, part),
        Op::Write(9 * cluster - 5 * part, 7 * part),
        Op::Read(8 * cluster + 4 * part + 5, 6 * part),
        Op::Populate(4 * cluster, cluster),
        Op::Discard(cluster + part / 2, 40 * part),
        Op::Zero(3 * cluster + part, 7 * part),
    ];
    let of_clusters = vec![
        Op::Write(3 * cluster, cluster),
        Op::Write(cluster / 2 + 100, cluster),
        Op::Write(5 * cluster + 70, 30),
        Op::Write(l2_span - 2 * cluster - 9, 4 * cluster),
        Op::Write(7 * cluster, cluster),
        Op::Read(4 * cluster + 5, 6 * cluster),
        Op::Populate(0, start.size / 2),
        Op::Stream,
        Op::Discard(0, 2 * cluster),
        Op::Discard(cluster / 2, 7 * cluster),
        Op::Zero(0, 7 * cluster),
        Op::Flush,
        Op::Timer,
        Op::Close,
        Op::Grow(start.size + 3 * l2_span),
        Op::During(1, Box::new(Op::Write(6 * cluster, 3 * cluster))),
        Op::During(2, Box::new(Op::Discard(0, 7 * cluster))),
        Op::During(1, Box::new(Op::Zero(cluster, 2 * cluster))),
        Op::Full(1, Box::new(Op::Write(2 * cluster, 6 * cluster))),
        Op::Full(2, Box::new(Op::Flush)),
    ];
    let of_subclusters = of_subclusters.into_iter().filter(|_| start.extended);
    of_clusters.into_iter().chain(of_subclusters).collect()
}

pub(super) fn random_op(random: &mut Random, start: &Start, depth: u32) -> Op {
    let cluster = 1 << start.cluster_bits;
    let is_small = start.extended && random.below(2) == 0;
    let cluster = if is_small { cluster / 32 } else { cluster };
    let at = random.below(start.size - 1);
    let at = if random.below(2) == 0 { at } else { at - at % cluster };
    let most = (start.size - at).min(12 * cluster);
    let len = 1 + random.below(most);
    let len = if random.below(2) == 0 && len > cluster { len - len % cluster } else { len };
    match random.below(if depth == 0 { 17 } else { 8 }) {
        0..=3 => Op::Write(at, len),
        4 => Op::Read(at, len),
        5 => Op::Populate(at, len),
        6 => Op::Discard(at, len),
        7 => Op::Zero(at, len),
        8..=10 => Op::Flush,
        11 => Op::Timer,
        12 => Op::Stream,
        13 => Op::Full(
            random.below(12),
            Box::new(
                [
                    Op::Flush,
                    Op::Stream,
                    Op::Grow(2 * start.size),
                    Op::Write(at, len),
                    Op::Discard(at, len),
                    Op::Close,
                ][random.below(6) as usize]
                    .clone(),
            ),
        ),
        14 => Op::Grow(start.size + 512 * (1 + random.below(200))),
        _ => Op::During(1 + random.below(5), Box::new(random_op(random, start, 1))),
    }
}

fn story(start: &Start, ops: &[Op], failing_barrier: Option<u64>) -> (Story, String) {
    let failing = failing_barrier.map_or(String::new(), |barrier| format!("!{barrier}"));
    let label = format!("{}{failing}/{}", start.name, written(ops));
    let played = std::panic::catch_unwind(|| play(&files(start), ops, failing_barrier));
    match played {
        Ok(story) => (story, label),
        Err(panic) => {
            println!("CORDISK_CRASH='{label}//'");
            std::panic::resume_unwind(panic)
        }
    }
}

/// Replays the state in `CORDISK_CRASH` if it belongs to this image. Returns whether the variable
/// is set.
fn replayed(start: &Start) -> bool {
    let Ok(line) = std::env::var("CORDISK_CRASH") else { return false };
    let mut parts = line.split('/');
    let mut part = || parts.next().unwrap_or("");
    let (name, ops, prefix, pieces) = (part(), part(), part(), part());
    let (name, failing) =
        name.split_once('!').map_or((name, None), |(name, barrier)| (name, barrier.parse().ok()));
    if name != start.name {
        return true;
    }
    let ops = Op::parse_all(ops).expect("operations as they were printed");
    let (story, label) = story(start, &ops, failing);
    for (index, record) in story.records.iter().enumerate() {
        match record {
            sim::Recorded::Write { kind, at, data } => {
                println!("{index} {kind:?} {at:#x}+{:#x}", data.len())
            }
            other => println!("{index} {other:?}"),
        }
    }
    let pieces: Vec<usize> = pieces.split(',').filter_map(|piece| piece.parse().ok()).collect();
    let limits = Limits { per_prefix: 1, reopen: 1, qemu: 1, from: 0 };
    let mut tally = Tally::default();
    if let Ok(prefix) = prefix.parse() {
        cut(&story, &label, limits, &mut tally, Some((prefix, &pieces)));
        assert!(tally.states > 0, "no such state");
    }
    true
}

/// Runs all pairs above one image, then random workloads until enough different states were
/// checked.
fn explore(name: &str) {
    let starts = starts();
    let start = starts.iter().find(|start| start.name == name).expect("a start of that name");
    if replayed(start) {
        return;
    }
    let wanted =
        number("CORDISK_CRASH_STATES").map_or(STATES, |states| states as usize) / starts.len();
    let seed = number("CORDISK_SEED").unwrap_or(1);
    println!("CORDISK_SEED={seed}");
    let (mut tally, began) = (Tally::default(), std::time::Instant::now());
    let ops = alphabet(start);
    let pairs = ops.len() * ops.len();
    // Two thirds of the states come from pairs, whose records are about 16 changes long. Half of
    // those states have already occurred in other pairs.
    let limits = Limits {
        per_prefix: (wanted * 2 / 3 / (pairs * 8)).max(10),
        reopen: 300,
        qemu: 2000,
        from: 0,
    };
    for first in &ops {
        for second in &ops {
            one(start, &[first.clone(), second.clone(), Op::Flush, Op::Close], limits, &mut tally);
        }
    }
    // A pass that fails after the header names another refcount table; the next pass needs one more
    // block.
    for write in 0..9 {
        let (most, cluster) = (start.size / 2, 1 << start.cluster_bits);
        let flush = Op::Full(write, Box::new(Op::Flush));
        one(
            start,
            &[
                Op::Write(9 * cluster, 4 * cluster),
                flush,
                Op::Write(most - most % cluster, most),
                Op::Flush,
                Op::Close,
            ],
            limits,
            &mut tally,
        );
    }
    let mut random = Random(mix(seed) ^ start.size);
    let limits = Limits { per_prefix: 24, ..limits };
    let mut longer = 0;
    while tally.distinct.len() < wanted || longer < LONGER {
        longer += 1;
        let mut ops: Vec<_> =
            (0..3 + random.below(4)).map(|_| random_op(&mut random, start, 0)).collect();
        ops.push(Op::Close);
        one(start, &ops, limits, &mut tally);
    }
    println!(
        "{name}: {} states, {} distinct, {} workloads, {} used again, {} shown to qemu-img, {:.1?}",
        tally.states,
        tally.distinct.len(),
        tally.workloads,
        tally.reopened,
        tally.qemu,
        began.elapsed()
    );
    assert!(tally.qemu > 0 && tally.reopened > 0);
}

fn one(start: &Start, ops: &[Op], limits: Limits, tally: &mut Tally) {
    let (story, label) = story(start, ops, None);
    ended(&story, &label);
    cut(&story, &label, limits, tally, None);
}

macro_rules! crash_tests {
    ($($test:ident: $name:literal,)*) => {
        $(
            #[test]
            fn $test() {
                explore($name);
            }
        )*

        #[test]
        fn every_start_has_a_test() {
            assert_eq!(starts().iter().map(|start| start.name).collect::<Vec<_>>(), [$($name),*]);
        }
    };
}

crash_tests! {
    power_cuts_version_3: "v3-512",
    power_cuts_large_clusters: "v3-4k",
    power_cuts_version_2: "v2-512",
    power_cuts_version_2_alone: "v2-alone",
    power_cuts_one_bit_refcounts: "v3-1bit",
    power_cuts_new_refcount_block: "v3-block",
    power_cuts_new_refcount_block_of_two_bits: "v3-2bit-block",
    power_cuts_refcount_table_moves: "v3-table",
    power_cuts_first_l2_table: "v3-empty",
    power_cuts_large_clusters_of_eight_bits: "v3-4k-8bit",
    power_cuts_after_clones: "v3-cloned",
    power_cuts_after_clones_of_large_clusters: "v3-4k-cloned",
    power_cuts_subclusters: "v3-subclusters",
    power_cuts_subclusters_after_clones: "v3-subclusters-cloned",
    power_cuts_subclusters_alone: "v3-subclusters-alone",
}

/// P7: each barrier in turn fails. The writes that it should have covered are on disk or lost.
/// Nothing more is written, and the file is consistent.
#[test]
fn failed_barriers_leave_the_file_whole() {
    let mut tally = Tally::default();
    let limits = Limits { per_prefix: 16, reopen: 100, qemu: 1000, from: 0 };
    for start in &starts() {
        if replayed(start) {
            continue;
        }
        for ops in alphabet(start).into_iter().filter(|op| !matches!(op, Op::Full(..))) {
            for barrier in 0.. {
                let ops = [
                    Op::Write(9 << start.cluster_bits, 700),
                    ops.clone(),
                    Op::Flush,
                    Op::Write(0, 512),
                    Op::Close,
                ];
                let (story, label) = story(start, &ops, Some(barrier));
                cut(&story, &label, limits, &mut tally, None);
                if !story.failed {
                    break;
                }
            }
        }
    }
    println!(
        "{} states, {} distinct, {} workloads",
        tally.states,
        tally.distinct.len(),
        tally.workloads
    );
}
