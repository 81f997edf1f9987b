//! Tests of rings without FUSE: which memory the commands name, and what happens if the kernel does
//! not take them.

use std::cell::Cell;

use super::memory::{LITTLE, Touched};
use super::*;

const SLOTS: usize = 4;

thread_local! {
    static ENTERED: Cell<usize> = const { Cell::new(0) };
}

/// Makes a port to a file without FUSE; `None` if there is no io_uring.
fn port() -> Option<Port> {
    let ring = ring(SLOTS).inspect_err(|error| eprintln!("skipped: io_uring: {error}")).ok()?;
    let device = OwnedFd::from(File::open("/dev/null").unwrap());
    ENTERED.set(0);
    let port =
        Port::new(ring, std::os::fd::AsFd::as_fd(&device), 0, QueueOrder::new(SLOTS, 0)).unwrap();
    port.enable().unwrap();
    Some(port)
}

/// Registers an entry for each slot.
fn register(port: &mut Port, enter: Enter) -> io::Result<()> {
    let (_, entries) = EntryMemory::new(SLOTS).unwrap();
    let places = Places::of(&entries);
    port.register_by(places, entries.into_iter().enumerate().collect(), enter)
}

/// Makes an entry with memory of its own.
fn entry() -> RingEntry {
    EntryMemory::new(1).unwrap().1.pop().unwrap()
}

fn count() -> usize {
    ENTERED.replace(ENTERED.get() + 1)
}

#[test]
fn a_short_submit_is_an_error_and_frees_nothing_that_the_kernel_may_read() {
    let Some(mut port) = port() else { return };
    let error = register(&mut port, |_, _| {
        count();
        Ok(0)
    })
    .unwrap_err();
    assert_eq!(error.to_string(), "the kernel does not take 4 of 4 entries");
    // The commands are still in the ring. When the kernel takes them now, it finds the memory that
    // they name.
    assert_eq!(port.places.len(), SLOTS);
    assert_eq!(port.slots.iter().flatten().count(), SLOTS);
    for (place, entry) in port.places.iter().zip(&port.slots) {
        let entry = &entry.as_ref().unwrap().0;
        assert_eq!((place[0].address, place[0].len), (entry.header.as_ptr().addr(), HEADER));
        assert_eq!(
            (place[1].address, place[1].len),
            (entry.payload.as_ptr().cast::<u8>().addr(), PAYLOAD)
        );
    }
    assert_eq!(port.enter_by(enter, SLOTS).unwrap(), SLOTS);
    for _ in 0..SLOTS {
        assert!(matches!(port.take(), Ok(Some(Completion::Entry(..)))));
    }
}

#[test]
fn a_submit_in_parts_goes_on() {
    let Some(mut port) = port() else { return };
    // The first two tries take no command.
    register(&mut port, |ring, want| if count() < 2 { Ok(0) } else { enter(ring, want) }).unwrap();
    assert!(port.ring.submission().is_empty());
    assert_eq!(ENTERED.get(), 3);
}

#[test]
fn what_passes_is_tried_again_and_what_stays_is_an_error() {
    let Some(mut port) = port() else { return };
    let refused: Enter = |ring, want| match count() {
        0 => Err(Errno::AGAIN.into()),
        1 => Err(Errno::NOMEM.into()),
        2 => Err(Errno::BUSY.into()),
        _ => enter(ring, want),
    };
    register(&mut port, refused).unwrap();
    assert_eq!(ENTERED.get(), 4);
    // While completions are in the ring, no call is tried again before they are taken.
    port.enter_by(enter, SLOTS).unwrap();
    assert!(port.has_more());
    assert_eq!(port.enter_by(|_, _| Err(Errno::BUSY.into()), 1).unwrap(), 0);
    assert_eq!(port.enter_by(|_, _| Err(Errno::INTR.into()), 1).unwrap(), 0);
    assert!(port.enter_by(|_, _| Err(Errno::BADF.into()), 1).is_err());
}

/// Puts an entry into the slot of an entry of the kernel, with a payload that is entirely in
/// memory.
fn lend(port: &mut Port, slot: usize, touched: Touched) {
    let mut entry = self::entry();
    entry.payload().fill(7);
    entry.touched = touched;
    port.slots[slot] = Some(LentEntry(entry));
    port.order.note(slot);
}

/// Returns how many pages of a payload the page table has.
fn pages(port: &Port, slot: usize) -> usize {
    let address = port.slots[slot].as_ref().unwrap().0.payload.as_ptr().addr();
    let pagemap = File::open("/proc/self/pagemap").unwrap();
    let page = rustix::param::page_size();
    let mut entries = vec![0; PAYLOAD / page * 8];
    std::os::unix::fs::FileExt::read_exact_at(&pagemap, &mut entries, (address / page * 8) as u64)
        .unwrap();
    entries.chunks_exact(8).filter(|entry| entry[7] & 0xc0 != 0).count()
}

#[test]
fn memory_that_was_not_needed_for_a_tick_is_given_back() {
    let Some(mut port) = port() else { return };
    let all = PAYLOAD / rustix::param::page_size();
    for (slot, touched) in
        [Touched::Little, Touched::Before, Touched::Lately].into_iter().enumerate()
    {
        lend(&mut port, slot, touched);
    }
    port.give_back().unwrap();
    assert_eq!([0, 1, 2].map(|slot| pages(&port, slot)), [all, 1, all]);
    assert_eq!(
        [0, 1, 2].map(|slot| port.slots[slot].as_ref().unwrap().0.touched),
        [Touched::Little, Touched::Little, Touched::Before]
    );
    assert!(port.ticks, "the last one is still to come");
    // The timer's command has been pushed.
    assert!(!port.ring.submission().is_empty());
    port.ticks = false;
    port.give_back().unwrap();
    assert_eq!(pages(&port, 2), 1);
    assert!(!port.ticks, "nothing is left to give back");
    assert_eq!(pages(&port, 0), all, "a little stays");
}

#[test]
fn an_answer_or_a_request_in_a_payload_stays() {
    let Some(mut port) = port() else { return };
    // An entry that was handed in and not taken by the kernel holds an answer. One that was taken
    // (here this completes it at once) and not looked at may hold a request.
    for is_taken in [false, true] {
        let mut entry = self::entry();
        entry.payload().fill(7);
        entry.touched = Touched::Before;
        port.commit(0, entry).unwrap();
        if is_taken {
            port.push().unwrap();
            assert!(port.has_completions());
        }
        lend(&mut port, 1, Touched::Before);
        port.give_back().unwrap();
        assert_eq!(
            [0, 1].map(|slot| pages(&port, slot)),
            [PAYLOAD / rustix::param::page_size(); 2],
            "{is_taken}"
        );
        assert!(port.ticks);
        let Ok(Some(Completion::Entry(0, mut entry, _))) = port.take() else {
            panic!("the command was not taken")
        };
        assert!(entry.payload().iter().all(|&byte| byte == 7));
    }
}

#[test]
fn only_large_requests_leave_something_to_give_back() {
    let mut entry = self::entry();
    let header = [0; REPLY_HEADER];
    let bytes = vec![7; PAYLOAD];
    entry.touches(LITTLE);
    entry.answer(&header, ReplyData::InPlace(LITTLE));
    entry.answer(&header, ReplyData::Elsewhere(&bytes[..LITTLE]));
    assert!(!entry.is_large());
    entry.touches(LITTLE + 1);
    assert_eq!(entry.touched, Touched::Lately);
    entry.touched = Touched::Before;
    entry.answer(&header, ReplyData::Elsewhere(&[1]));
    assert_eq!(entry.touched, Touched::Before, "a small one does not make the memory new");
    entry.answer(&header, ReplyData::Elsewhere(&bytes));
    assert_eq!(entry.touched, Touched::Lately);
    assert_eq!(entry.payload_len(), PAYLOAD);
    assert_eq!(entry.payload(), bytes);
}

/// Protects: the entries that the kernel takes next have memory for a usual request, from the
/// beginning and after the memory of large ones was given back; others keep one page. Small
/// requests start no timer.
#[test]
fn the_entries_that_the_kernel_takes_next_keep_memory_for_usual_requests() {
    let Some(mut port) = port() else { return };
    port.order = QueueOrder::new(SLOTS, 2);
    let page = rustix::param::page_size();
    let (one, usual, all) = (1, USUAL / page, PAYLOAD / page);
    register(&mut port, enter).unwrap();
    let counts = |port: &Port| [0, 1, 2, 3].map(|slot| pages(port, slot));
    assert_eq!(counts(&port), [one, one, usual, usual]);
    assert!(!port.ticks);
    // The kernel returns all (this device is no FUSE), and gets those of small requests back.
    while let Some(completion) = port.take().unwrap() {
        let Completion::Entry(slot, entry, _) = completion else { continue };
        port.slots[slot] = Some(LentEntry(entry));
        port.order.note(slot);
    }
    let again = |port: &mut Port, slot: usize| {
        let entry = port.slots[slot].take().unwrap().back();
        port.commit(slot, entry).unwrap();
        port.push().unwrap();
        let Ok(Some(Completion::Entry(slot, entry, _))) = port.take() else { panic!("no entry") };
        port.slots[slot] = Some(LentEntry(entry));
        port.order.note(slot);
    };
    again(&mut port, 2);
    again(&mut port, 3);
    assert!(!port.ticks, "there is nothing to give back");
    // Another entry comes to the top, and after that a large request.
    again(&mut port, 0);
    assert_eq!(counts(&port), [usual, one, usual, usual]);
    assert!(port.ticks);
    let entry = &mut port.slots[3].as_mut().unwrap().0;
    entry.payload().fill(7);
    entry.touches(PAYLOAD);
    again(&mut port, 3);
    assert_eq!(counts(&port), [usual, one, usual, all]);
    for _ in 0..2 {
        port.give_back().unwrap();
    }
    assert_eq!(counts(&port), [usual, one, one, usual]);
    port.ticks = false;
    port.give_back().unwrap();
    assert!(!port.ticks, "nothing is left to give back");
}
