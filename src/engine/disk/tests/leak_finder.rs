//! The thread that searches for the leaks of a process that has died.

use super::*;
use crate::disk::LeakFinder;
use host::storage::{OpenMark, Sidecar};
use sim::start::Start;
use sim::{SimJournal, SimStorage, spec};

/// A successor of a process that has died and has leaked clusters.
fn successor() -> (Arc<SimStorage>, Arc<Disk>) {
    let file = SimStorage::new(Start::new("finder", 3, 12, 4, 32 << 20).bytes());
    let journal = SimJournal::new(64 << 10, &file);
    let image = Image::open(file.clone()).unwrap().with_journal(journal.clone()).unwrap();
    std::mem::forget(image.allocate(5).unwrap());
    let disk = Disk::for_tests(image, None);
    (0..16).for_each(|table| disk.write(table << 21, &[1; 4096]).unwrap());
    disk.flush().unwrap();
    let next = SimStorage::new(file.bytes());
    next.set_open_mark().unwrap();
    let journal = SimJournal::of(journal.bytes(), None);
    let image = Image::take_over(next.clone(), journal, || Ok(())).unwrap();
    (next, Arc::new(Disk::for_tests(image, None)))
}

/// Protects: P17. The thread finds everything by itself and gives it back; the disk that is then
/// closed has no mark and no leaks.
#[test]
fn leaks_are_given_back_in_the_background() {
    let (file, disk) = successor();
    assert!(!disk.may_lose_mark());
    let finder = LeakFinder::start(&disk);
    while !disk.may_lose_mark() {
        std::thread::yield_now();
    }
    drop(finder);
    disk.close().unwrap();
    assert_eq!(file.open_mark().unwrap(), OpenMark::Absent);
    let verdict = spec::check(&file.bytes());
    assert_eq!((verdict.all(), verdict.all_leaks()), (Vec::new(), 0));
}

/// Protects: a close does not wait for the search: the thread ends with the step that it makes, and
/// the mark stays for the next open.
#[test]
fn a_close_ends_the_search() {
    let (file, disk) = successor();
    let reads = file.hold(|operation| operation.action == sim::Action::Read);
    let finder = LeakFinder::start(&disk);
    // It stands in its first step, which reads a table.
    reads.wait_for(1);
    let ended = std::thread::spawn(move || drop(finder));
    drop(reads);
    ended.join().unwrap();
    closes(&file, &disk);
    // It ends before or in its first step.
    let (file, disk) = successor();
    drop(LeakFinder::start(&disk));
    closes(&file, &disk);
}

/// Closes a disk. The mark says whether there may be leaks.
fn closes(file: &SimStorage, disk: &Disk) {
    disk.close().unwrap();
    let mark = file.open_mark().unwrap();
    let expected = if disk.may_lose_mark() { OpenMark::Absent } else { OpenMark::Present };
    assert_eq!(mark, expected);
    let verdict = spec::check(&file.bytes());
    assert!(verdict.all().is_empty());
    // A search that was ended before its last step may have found all leaks.
    assert!(verdict.all_leaks() == 0 || mark == OpenMark::Present);
}
