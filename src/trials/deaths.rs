//! Deaths of the process (P17): the guest lives on, and a successor opens the image with the
//! journal.
//!
//! A process can die before and after each change of its file and each write into its journal, and
//! in the middle of the latter. The file then has every change before that moment, because the
//! host's page cache survives, and the journal every write. The successor must read, for each
//! sector, the value of the last request that was answered, or of a request that was not. It then
//! goes on with more requests, and searches for leaks between them; the power is cut during these,
//! or it dies as well. After a search that has ended and a close, the image has no leaks.

use std::sync::Arc;

use super::crash_tests::{alphabet, files, number, random_op, starts};
use super::cut::{Limits, Tally, cut};
use super::workload::{Files, Op, Story, go_on, play, written};
use engine::disk::Disk;
use host::Result;
use qcow2::image::{Image, SearchStep};
use sim::random::{Random, mix};
use sim::spec;
use sim::start::Start;
use sim::{Recorded, SimJournal, SimStorage};

/// Moments that are checked of each workload, besides the last one.
const MOMENTS: usize = 5;
/// Workloads of random length above each image; `CORDISK_DEATHS` sets another number.
const WORKLOADS: u64 = 60;
/// One of so many pairs of operations is played, each time others.
const PAIRS: u64 = 5;

/// The search is seldom made to its end in an image that begins with so many leaks.
const MANY_LEAKS: u64 = 100;
/// More steps than any search for leaks has.
const ALL_STEPS: u64 = 10_000;

/// A moment at which a process dies.
#[derive(Clone, Copy, Debug)]
struct Moment {
    /// Number of changes of the file before it.
    changes: usize,
    /// Number of writes into the journal before it.
    writes: usize,
    /// How many bytes of the next write into the journal were written.
    torn: usize,
}

/// Returns all moments of a story at which the process can die.
fn moments(story: &Story) -> Vec<Moment> {
    let mut moments = Vec::new();
    let mut writes = 0;
    for changes in 0..=story.records.len() {
        moments.push(Moment { changes, writes, torn: 0 });
        while let Some(write) = story.journal.get(writes).filter(|write| write.after == changes) {
            moments.push(Moment { changes, writes, torn: write.data.len() / 2 });
            moments.push(Moment { changes, writes, torn: write.data.len() - 1 });
            writes += 1;
            moments.push(Moment { changes, writes, torn: 0 });
        }
    }
    moments
}

/// Returns the file and the journal that a process leaves at this moment.
fn left(story: &Story, moment: Moment) -> (Vec<u8>, Vec<u8>) {
    let mut file = story.files.overlay.clone();
    for record in &story.records[..moment.changes] {
        match record {
            Recorded::Write { at, data, .. } => {
                let end = *at as usize + data.len();
                file.resize(file.len().max(end), 0);
                file[*at as usize..end].copy_from_slice(data);
            }
            Recorded::Punch { at, len } => {
                let end = ((at + len) as usize).min(file.len());
                let start = (*at as usize).min(end);
                file[start..end].fill(0);
            }
            Recorded::Sync { .. } | Recorded::SyncFailed { .. } => {}
        }
    }
    let size = story.journal.iter().map(|write| write.at as usize + write.data.len()).max();
    let mut journal = vec![0; size.unwrap_or(0).max(super::workload::JOURNAL as usize)];
    let whole = story.journal[..moment.writes].iter().map(|write| (write, write.data.len()));
    let torn = story.journal.get(moment.writes).map(|write| (write, moment.torn));
    for (write, len) in whole.chain(torn) {
        journal[write.at as usize..][..len].copy_from_slice(&write.data[..len]);
    }
    (file, journal)
}

/// What the host answers when a successor asks for the result of a barrier.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Asked {
    /// No barrier has failed.
    Succeeded,
    /// A barrier has failed.
    Failed,
    /// The process has lived long enough to record the result, so a successor does not ask.
    Recorded,
}

/// A successor: its file, which records since it was opened, its journal, and its disk.
type Successor = (Arc<SimStorage>, Arc<SimJournal>, Disk);

fn take_over(files: &Files, file: Vec<u8>, journal: Vec<u8>, asked: Asked) -> Result<Successor> {
    let storage = SimStorage::new(file);
    storage.allow_clones(files.clones);
    storage.record();
    let journal = SimJournal::of(journal, Some(Arc::clone(&storage)));
    let image = Image::take_over(Arc::clone(&storage), journal.clone(), || match asked {
        Asked::Succeeded => Ok(()),
        Asked::Failed => Err(std::io::Error::from_raw_os_error(5)),
        Asked::Recorded => panic!("the result is in the journal"),
    })?;
    Ok((storage, journal, files.disk_of(image)))
}

/// Checks what a successor reads, and what it does next.
fn dies(story: &Story, label: &str, moment: Moment, random: &mut Random, tally: &mut Tally) {
    let place = format!("{label} dies at {moment:?}");
    let (file, journal) = left(story, moment);
    let lost = story.records[..moment.changes]
        .iter()
        .any(|record| matches!(record, Recorded::SyncFailed { .. }));
    // Before the first header is written, there is no journal, and nothing was changed either.
    if moment.writes < 2 {
        return;
    }
    let asked = match lost {
        false => Asked::Succeeded,
        true if moment.writes == story.journal.len() => Asked::Recorded,
        true => Asked::Failed,
    };
    let successor = take_over(&story.files, file, journal, asked)
        .unwrap_or_else(|error| panic!("{error}\n{place}"));
    let disk = &successor.2;
    tally.states += 1;
    let mut found = vec![0xa5; disk.size() as usize];
    disk.read(0, &mut found).unwrap_or_else(|error| panic!("{error}\n{place}"));
    let floors = story
        .answered
        .iter()
        .rev()
        .find(|(changes, writes, _)| *changes <= moment.changes && *writes <= moment.writes)
        .map(|(_, _, floors)| floors);
    for (sector, found) in found.as_chunks::<512>().0.iter().enumerate() {
        let Some(values) = story.values.get(sector) else { continue };
        let floor = floors.and_then(|floors| floors.get(sector)).copied().unwrap_or(0);
        let mut allowed = values[floor..].iter().take_while(|(from, _)| *from <= moment.changes);
        assert!(
            allowed.any(|(_, value)| value == found),
            "P17: sector {sector} reads {:02x?}…, which is value {:?} of {}; values from {floor} on are allowed\n{place}",
            &found[..8],
            values.iter().rposition(|(_, value)| value == found),
            values.len(),
        );
    }
    if lost {
        assert!(
            !disk.is_usable(),
            "P7: a successor accepts writes after a failed barrier\n{place}"
        );
        assert!(disk.write(0, &[1; 512]).is_err() && disk.flush().is_err(), "P7\n{place}");
        return;
    }
    assert!(disk.is_usable(), "a successor accepts no writes\n{place}");
    // An image with thousands of leaks takes long to search.
    let few = spec::check(&story.files.overlay).all_leaks() < MANY_LEAKS;
    let steps = if (random.below(8) > 0) == few { ALL_STEPS } else { random.below(10) };
    match random.below(4) {
        // It searches for leaks between its requests and closes the image, which has no error then.
        0 => {
            let is_searched = searches(disk, steps, &mut found, random, &place);
            disk.close().unwrap_or_else(|error| panic!("{error}\n{place}"));
            let seen = spec::look(&successor.0.bytes(), &story.files.base).expect("an image");
            assert!(seen.verdict.all().is_empty(), "{:?}\n{place}", seen.verdict.all());
            assert!(seen.guest == found, "something else is left after the close\n{place}");
            assert_eq!(disk.may_lose_mark(), is_searched, "the mark\n{place}");
            let leaks = seen.verdict.all_leaks();
            assert!(leaks == 0 || !is_searched, "{leaks} leaks after the search\n{place}");
        }
        // It dies as well, at any moment of what it does before.
        1 => {
            let (storage, journal, disk) = successor;
            let cluster = disk.cluster_size();
            let at = random.below(disk.size() / cluster) * cluster;
            let len = cluster.min(disk.size() - at) as usize;
            let data = vec![random.next() as u8 | 1; len];
            disk.write(at, &data).unwrap_or_else(|error| panic!("{error}\n{place}"));
            found[at as usize..][..len].copy_from_slice(&data);
            for _ in 0..random.below(8) {
                disk.search_step().unwrap_or_else(|error| panic!("{error}\n{place}"));
            }
            if random.below(2) == 0 {
                disk.flush().unwrap_or_else(|error| panic!("{error}\n{place}"));
            }
            let again = take_over(&story.files, storage.bytes(), journal.bytes(), Asked::Succeeded)
                .unwrap_or_else(|error| panic!("{error}\n{place}, and its successor"));
            let mut second = vec![0xa5; found.len()];
            again.2.read(0, &mut second).unwrap_or_else(|error| panic!("{error}\n{place}"));
            assert!(second == found, "the second successor reads something else\n{place}");
            let place = format!("{place}, and so does its successor");
            searches(&again.2, steps, &mut second, random, &place);
            again.2.close().unwrap_or_else(|error| panic!("{error}\n{place}"));
            let seen = spec::look(&again.0.bytes(), &story.files.base).expect("an image");
            assert!(seen.verdict.all().is_empty(), "{:?}\n{place}", seen.verdict.all());
            assert!(seen.guest == second, "something else is left after the close\n{place}");
            let leaks = seen.verdict.all_leaks();
            assert!(leaks == 0 || !again.2.may_lose_mark(), "{leaks} leaks\n{place}");
        }
        // The power is cut during what it does next.
        _ => {
            let size = disk.size();
            let start =
                Start { size, ..Start::new("", 3, disk.cluster_size().trailing_zeros(), 4, size) };
            // Each change that the search makes is a moment for the power to fail.
            let most = if few { 6 } else { 1 };
            let steps = if few { steps } else { 0 };
            let ops: Vec<Op> = vec![
                Op::Search(random.below(most)),
                random_op(random, &start, 1),
                Op::Search(random.below(most)),
                Op::Timer,
                random_op(random, &start, 1),
                Op::Search(steps),
                Op::Flush,
                Op::Close,
            ];
            let mut next = go_on(story, moment.changes, successor, &ops);
            let mut records = story.records[..moment.changes].to_vec();
            records.extend(next.records.drain(..).map(|record| match record {
                Recorded::Sync { covers } => Recorded::Sync { covers: covers + moment.changes },
                other => other,
            }));
            next.records = records;
            let leaks = spec::check(&next.end).all_leaks();
            let is_searched = steps == ALL_STEPS;
            assert!(
                leaks == 0 || !is_searched,
                "{leaks} leaks after the search\n{place}, then {}",
                written(&ops)
            );
            let label = format!("{place}, then {}/", written(&ops));
            cut(
                &next,
                &label,
                Limits { per_prefix: 4, reopen: 0, qemu: 0, from: moment.changes },
                tally,
                None,
            );
        }
    }
}

/// Makes so many steps of the search for leaks, or all of them, with requests of a guest between
/// them. `expected` is what the disk holds, before and after. Returns whether the search has ended.
fn searches(
    disk: &Disk,
    steps: u64,
    expected: &mut [u8],
    random: &mut Random,
    place: &str,
) -> bool {
    let cluster = disk.cluster_size();
    for _ in 0..steps {
        match disk.search_step().unwrap_or_else(|error| panic!("{error}\n{place}")) {
            SearchStep::Part => {}
            SearchStep::Last { is_all, .. } => {
                assert!(is_all, "no cluster has several references\n{place}");
                return true;
            }
            SearchStep::Nothing => panic!("there is no search\n{place}"),
        }
        let at = random.below(disk.size() / 512) * 512;
        let len = (512 * (1 + random.below(2 * cluster / 512))).min(disk.size() - at);
        let range = at as usize..(at + len) as usize;
        let done = match random.below(8) {
            0 => disk.flush_if_dirty(),
            1 => disk.discard(at..at + len).map(|()| expected[range].fill(0)),
            2 => disk.write_zeroes(at..at + len).map(|()| expected[range].fill(0)),
            3 | 4 => {
                let data = vec![random.next() as u8 | 1; len as usize];
                disk.write(at, &data).map(|_| expected[range].copy_from_slice(&data))
            }
            _ => Ok(()),
        };
        done.unwrap_or_else(|error| panic!("{error}\n{place}"));
    }
    false
}

/// Plays a workload and kills its process at some of its moments.
fn one(start: &Start, ops: &[Op], failing: Option<u64>, random: &mut Random, tally: &mut Tally) {
    let label = format!("{}/{}", start.name, written(ops));
    let story = play(&files(start), ops, failing);
    let moments = moments(&story);
    if let Some(&last) = moments.last() {
        dies(&story, &label, last, random, tally);
    }
    for _ in 0..MOMENTS {
        let moment = moments[random.below(moments.len() as u64) as usize];
        dies(&story, &label, moment, random, tally);
    }
}

fn explore(name: &str) {
    let starts = starts();
    let start = starts.iter().find(|start| start.name == name).expect("a start of that name");
    let seed = number("CORDISK_SEED").unwrap_or(1);
    println!("CORDISK_SEED={seed}");
    let mut random = Random(mix(seed ^ start.size));
    let mut tally = Tally::default();
    let ops = alphabet(start);
    for first in &ops {
        for second in &ops {
            if random.below(PAIRS) > 0 {
                continue;
            }
            one(start, &[first.clone(), second.clone(), Op::Flush], None, &mut random, &mut tally);
        }
    }
    for _ in 0..number("CORDISK_DEATHS").unwrap_or(WORKLOADS) {
        let mut ops: Vec<_> =
            (0..3 + random.below(5)).map(|_| random_op(&mut random, start, 0)).collect();
        if random.below(2) == 0 {
            ops.push(Op::Close);
        }
        one(start, &ops, None, &mut random, &mut tally);
    }
    println!("{name}: {} states", tally.states);
    assert!(tally.states > 500);
}

macro_rules! deaths {
    ($($test:ident: $name:literal,)*) => {
        $(
            #[test]
            fn $test() {
                explore($name);
            }
        )*

        #[test]
        fn every_start_has_a_death() {
            assert_eq!(starts().iter().map(|start| start.name).collect::<Vec<_>>(), [$($name),*]);
        }
    };
}

deaths! {
    deaths_version_3: "v3-512",
    deaths_large_clusters: "v3-4k",
    deaths_version_2: "v2-512",
    deaths_version_2_alone: "v2-alone",
    deaths_one_bit_refcounts: "v3-1bit",
    deaths_new_refcount_block: "v3-block",
    deaths_new_refcount_block_of_two_bits: "v3-2bit-block",
    deaths_refcount_table_moves: "v3-table",
    deaths_first_l2_table: "v3-empty",
    deaths_large_clusters_of_eight_bits: "v3-4k-8bit",
    deaths_after_clones: "v3-cloned",
    deaths_after_clones_of_large_clusters: "v3-4k-cloned",
    deaths_subclusters: "v3-subclusters",
    deaths_subclusters_after_clones: "v3-subclusters-cloned",
    deaths_subclusters_alone: "v3-subclusters-alone",
}

/// P7: each barrier in turn fails, and the process dies at any moment. A successor of a process
/// that has seen the failure, or died before it could record it, accepts no write.
#[test]
fn a_failed_barrier_is_known_to_the_successor() {
    let mut random = Random::of_test(3);
    let mut tally = Tally::default();
    for start in &starts() {
        for op in alphabet(start).into_iter().filter(|op| !matches!(op, Op::Full(..))) {
            for barrier in 0..3 {
                if random.below(PAIRS) > 0 {
                    continue;
                }
                let ops = [Op::Write(9 << start.cluster_bits, 700), op.clone(), Op::Flush];
                one(start, &ops, Some(barrier), &mut random, &mut tally);
            }
        }
    }
}
