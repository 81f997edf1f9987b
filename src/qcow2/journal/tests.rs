use super::*;
use sim::{SimJournal, SimStorage};

/// Size of a record of standard L2 entries, in bytes.
const RECORD: usize = RECORDS_OF[0];

fn geometry(cluster_bits: u32) -> Geometry {
    Geometry::new(3, cluster_bits, 4, 1 << 30).unwrap()
}

/// Memory for this many records.
fn memory(slots: u64) -> Arc<SimJournal> {
    SimJournal::new(RECORDS + slots * RECORD as u64, &SimStorage::new(Vec::new()))
}

fn change(start: u64) -> MappingChange {
    MappingChange { start: GuestCluster(start), count: 1, entry: start << 20, bitmap: 0, step: 0 }
}

fn append(journal: &Journal, starts: std::ops::Range<u64>) {
    let changes: Vec<_> = starts.map(change).collect();
    journal.append(journal.promise(changes.len()).unwrap(), &changes).unwrap();
}

fn starts_in(memory: Vec<u8>) -> Result<Vec<u64>> {
    let (_, changes, _) = Journal::open(SimJournal::of(memory, None), &geometry(16))?;
    Ok(changes.iter().map(|change| change.start.0).collect())
}

/// Protects: P17. A successor reads what was appended and not cut, also after the ring has gone
/// round, and space that was cut is given out again.
#[test]
fn what_is_not_cut_is_read_again() {
    let memory = memory(5);
    let journal = Journal::create(memory.clone(), &geometry(16)).unwrap();
    assert!(starts_in(memory.bytes()).unwrap().is_empty());
    let mut expected: Vec<u64> = Vec::new();
    for round in 0..20 {
        let new = round * 3..round * 3 + 3;
        append(&journal, new.clone());
        expected.extend(new);
        assert_eq!(starts_in(memory.bytes()).unwrap(), expected);
        assert!(journal.promise(3).is_none(), "five slots");
        journal.cut(journal.position() - 2).unwrap();
        expected.drain(..expected.len() - 2);
        assert_eq!(starts_in(memory.bytes()).unwrap(), expected);
    }
    let (again, changes, barrier) = Journal::open(memory.clone(), &geometry(16)).unwrap();
    assert_eq!((changes.len(), barrier), (2, BarrierState::Succeeded));
    append(&again, 100..103);
    assert_eq!(starts_in(memory.bytes()).unwrap(), [58, 59, 100, 101, 102]);
}

/// Protects: P17. A write that the death of the process has torn at any byte changes nothing that
/// was acknowledged: a torn record ends the journal, and a torn header leaves the one before.
#[test]
fn torn_writes_are_noticed() {
    let memory = memory(4);
    let journal = Journal::create(memory.clone(), &geometry(16)).unwrap();
    append(&journal, 0..4);
    journal.cut(journal.position() - 1).unwrap();
    let before = memory.bytes();
    let done = memory.writes_len();
    append(&journal, 10..11);
    journal.cut(journal.position() - 1).unwrap();
    journal.set_barrier(BarrierState::Failed).unwrap();
    let mut states = vec![(before.clone(), vec![3])];
    let mut bytes = before;
    for (write, after) in memory.writes()[done..].iter().zip([vec![3, 10], vec![10], vec![10]]) {
        let expected = states.last().unwrap().1.clone();
        for len in 0..write.data.len() {
            let mut torn = bytes.clone();
            torn[write.at as usize..][..len].copy_from_slice(&write.data[..len]);
            let found = starts_in(torn).unwrap();
            assert!(found == expected || found == after, "{len} bytes of {write:?}: {found:?}");
        }
        bytes[write.at as usize..][..write.data.len()].copy_from_slice(&write.data);
        assert_eq!(starts_in(bytes.clone()).unwrap(), after);
        states.push((bytes.clone(), after));
    }
}

/// Protects: each flipped bit of a record or of the valid header is noticed. The journal then ends
/// before the record, or is refused.
#[test]
fn damage_is_noticed() {
    let memory = memory(2);
    let journal = Journal::create(memory.clone(), &geometry(16)).unwrap();
    append(&journal, 7..9);
    journal.cut(journal.position() - 1).unwrap();
    journal.cut(journal.position() - 1).unwrap();
    let good = memory.bytes();
    assert_eq!(starts_in(good.clone()).unwrap(), [8]);
    for bit in 0..RECORD * 8 {
        let mut bad = good.clone();
        // Record 2 of a ring of two lies in the first slot.
        bad[RECORDS as usize + bit / 8] ^= 1 << (bit % 8);
        assert!(starts_in(bad).unwrap().is_empty(), "bit {bit} of the record");
    }
    for bit in 0..HEADER * 8 {
        let mut bad = good.clone();
        for at in HEADERS {
            bad[at as usize + bit / 8] ^= 1 << (bit % 8);
        }
        let error = starts_in(bad).unwrap_err().to_string();
        assert!(error.contains("no valid header"), "bit {bit} of the headers: {error}");
    }
    let other = Journal::open(SimJournal::of(good, None), &geometry(17)).unwrap_err();
    assert_eq!(other.kind(), ErrorKind::Corrupt);
    assert!(
        Journal::create(SimJournal::of(vec![0; 4100], None), &geometry(16)).is_err(),
        "too small"
    );
}

/// Protects: P7. A failure is never taken back.
#[test]
fn a_failed_barrier_stays_failed() {
    let memory = memory(2);
    let journal = Journal::create(memory.clone(), &geometry(16)).unwrap();
    for (set, seen) in [
        (BarrierState::Called, BarrierState::Called),
        (BarrierState::Succeeded, BarrierState::Succeeded),
        (BarrierState::Asked, BarrierState::Asked),
        (BarrierState::Failed, BarrierState::Failed),
        (BarrierState::Succeeded, BarrierState::Failed),
    ] {
        journal.set_barrier(set).unwrap();
        assert_eq!(Journal::open(memory.clone(), &geometry(16)).unwrap().2, seen);
    }
}

/// Protects: space that was promised and not used is given out again, and promises are kept.
#[test]
fn promises_are_kept() {
    let memory = memory(4);
    let journal = Journal::create(memory, &geometry(16)).unwrap();
    let first = journal.promise(3).unwrap();
    assert!(journal.promise(2).is_none());
    let second = journal.promise(1).unwrap();
    journal.append(first, &[change(1)]).unwrap();
    let third = journal.promise(2).unwrap();
    assert!(journal.promise(1).is_none());
    drop((second, third));
    assert!(journal.promise(3).is_some() && journal.promise(4).is_none());
}

#[test]
fn clusters_that_continue_a_run_join_it() {
    let size = 1 << 16;
    let raw = |descriptor, bitmap| RawL2Entry { descriptor, bitmap };
    let change = |start, entry, bitmap| MappingChange {
        start: GuestCluster(start),
        count: 1,
        entry,
        bitmap,
        step: 0,
    };
    let mut run = change(5, 7 * size, 9);
    assert!(run.joined_by(GuestCluster(6), raw(8 * size, 9), size));
    assert!(!run.joined_by(GuestCluster(8), raw(9 * size, 9), size), "a gap between clusters");
    assert!(!run.joined_by(GuestCluster(7), raw(8 * size, 9), size), "another step");
    assert!(!run.joined_by(GuestCluster(7), raw(9 * size, 8), size), "another bitmap");
    assert!(run.joined_by(GuestCluster(7), raw(9 * size, 9), size));
    assert_eq!((run.count, run.entry_of(2)), (3, raw(9 * size, 9)));
    let mut zeros = change(0, 1, 0);
    let one = raw(1, 0);
    assert!(zeros.joined_by(GuestCluster(1), one, size));
    assert!(zeros.joined_by(GuestCluster(2), one, size));
    assert_eq!((zeros.count, zeros.step), (3, 0));
    assert!(!zeros.joined_by(GuestCluster(3), raw(0, 0), size));
}

/// Protects: P17. The records of an image with extended L2 entries have their bitmaps, and a
/// journal is not taken for that of the other kind.
#[test]
fn bitmaps_are_in_the_journal_of_an_image_with_subclusters() {
    let extended = geometry(16).with_extended_l2().unwrap();
    let memory = memory(6);
    let journal = Journal::create(memory.clone(), &extended).unwrap();
    let changes = [3, 4].map(|start| MappingChange { bitmap: start << 40 | 1, ..change(start) });
    journal.append(journal.promise(2).unwrap(), &changes).unwrap();
    assert!(journal.promise(4).is_none(), "larger records: five slots");
    let (_, read, _) = Journal::open(memory.clone(), &extended).unwrap();
    assert_eq!(read, changes);
    assert!(Journal::open(memory.clone(), &geometry(16)).is_err());
    Journal::create(memory.clone(), &geometry(16)).unwrap();
    assert!(Journal::open(memory, &extended).is_err());
}
