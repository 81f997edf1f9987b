//! Tests of what a successor finds in the memory of a process that has died at any instruction.

use super::*;

/// Makes memory at an address that no other test uses, so that it is free for a successor.
fn memory(test: usize, entries: usize) -> (EntryMemory, Vec<RingEntry>) {
    EntryMemory::from_address(FIRST_ADDRESS + (ADDRESSES + test) * NEXT_ADDRESS, entries).unwrap()
}

/// Does what the kernel does when it gives a write request to an entry.
fn ask(entry: &mut RingEntry, id: u64, data: &[u8]) {
    entry.header()[OPERATION].fill(0x11);
    entry.payload()[..data.len()].copy_from_slice(data);
    entry.header()[COMMIT_ID].copy_from_slice(&id.to_ne_bytes());
    entry.header()[PAYLOAD_LEN].copy_from_slice(&(data.len() as u32).to_ne_bytes());
    entry.header()[..UNIQUE.start].fill(0x22);
    entry.header()[UNIQUE].copy_from_slice(&id.to_ne_bytes());
}

fn reply(id: u64, byte: u8) -> [u8; REPLY_HEADER] {
    let mut header = [byte; REPLY_HEADER];
    header[UNIQUE].copy_from_slice(&id.to_ne_bytes());
    header
}

/// Ends the process that has the memory, as far as a successor can tell, and starts a successor.
fn succeed(memory: EntryMemory, entries: Vec<RingEntry>) -> (EntryMemory, Vec<RingEntry>) {
    let (kept, address) = (memory.as_fd().try_clone_to_owned().unwrap(), memory.address());
    let number = entries.len();
    drop((memory, entries));
    EntryMemory::inherit(kept, address, number).unwrap()
}

#[test]
fn a_successor_finds_what_was_asked_and_what_was_answered() {
    let (memory, mut entries) = memory(0, 4);
    ask(&mut entries[1], 6, b"asked");
    ask(&mut entries[2], 8, b"answered");
    entries[2].answer(&reply(8, 0x33), ReplyData::Elsewhere(b"small"));
    ask(&mut entries[3], 10, b"");
    entries[3].payload()[..PAYLOAD].fill(0x44);
    entries[3].answer(&reply(10, 0x55), ReplyData::InPlace(PAYLOAD));

    let (memory, mut entries) = succeed(memory, entries);
    let states: Vec<_> = entries.iter_mut().map(RingEntry::inherited).collect();
    use EntryState::{Answered, Asked, Idle};
    assert_eq!(states, [Idle, Asked, Answered, Answered]);
    assert_eq!((entries[1].payload_len(), &entries[1].payload()[..5]), (5, &b"asked"[..]));
    assert_eq!(entries[1].request().1, [0x11; 128]);
    assert_eq!((entries[2].payload_len(), &entries[2].payload()[..5]), (5, &b"small"[..]));
    assert_eq!(entries[2].header()[..REPLY_HEADER], reply(8, 0x33));
    assert_eq!(entries[3].payload_len(), PAYLOAD);
    assert!(entries[3].payload().iter().all(|&byte| byte == 0x44));
    assert_eq!(entries[3].header()[..REPLY_HEADER], reply(10, 0x55));

    entries[3].note_taken();
    let (memory, mut entries) = succeed(memory, entries);
    let states: Vec<_> = entries.iter_mut().map(RingEntry::inherited).collect();
    assert_eq!(states, [Idle, Asked, Answered, Idle]);

    // The kernel has taken an answer and given the entry another request.
    entries[2].note_taken();
    ask(&mut entries[2], 12, b"next");
    let (_memory, mut entries) = succeed(memory, entries);
    assert_eq!(entries[2].inherited(), Asked);
    assert_eq!((entries[2].payload_len(), &entries[2].payload()[..4]), (4, &b"next"[..]));
}

/// Protects: the process is killed in the middle of [`RingEntry::answer`]. Before the number is
/// stored, the request is as it was; after that, the whole answer can be made from the record.
#[test]
fn a_death_in_the_middle_of_an_answer_leaves_the_request_or_the_answer() {
    let (memory, mut entries) = memory(1, 2);
    for entry in &mut entries {
        ask(entry, 20, b"data to write");
        // An earlier answer.
        entry.record()[ANSWERED].copy_from_slice(&18u64.to_ne_bytes());
    }
    let before: Vec<_> = entries.iter_mut().map(|entry| *entry.header()).collect();
    // The first one has the record, but not the number; the second one has both, and no byte of
    // the request is changed.
    for entry in &mut entries {
        entry.answer(&reply(20, 0x66), ReplyData::Elsewhere(b"written"));
    }
    entries[0].record()[ANSWERED].copy_from_slice(&18u64.to_ne_bytes());
    for (entry, before) in entries.iter_mut().zip(before) {
        *entry.header() = before;
        entry.payload()[..13].copy_from_slice(b"data to write");
    }
    let (_memory, mut entries) = succeed(memory, entries);
    assert_eq!(entries[0].inherited(), EntryState::Asked);
    assert_eq!(
        (entries[0].payload_len(), &entries[0].payload()[..13]),
        (13, &b"data to write"[..])
    );
    assert_eq!(entries[1].inherited(), EntryState::Answered);
    assert_eq!((entries[1].payload_len(), &entries[1].payload()[..7]), (7, &b"written"[..]));
    assert_eq!(entries[1].header()[..REPLY_HEADER], reply(20, 0x66));
}

/// Protects: a request that the kernel could not copy as a whole, and has ended, is not served.
#[test]
fn a_request_without_its_header_is_none() {
    let (_memory, mut entries) = memory(2, 1);
    ask(&mut entries[0], 30, b"");
    entries[0].header()[COMMIT_ID].copy_from_slice(&32u64.to_ne_bytes());
    assert_eq!(entries[0].inherited(), EntryState::Idle);
}

#[test]
fn only_memory_of_the_right_size_is_inherited_and_only_at_its_address() {
    let (memory, entries) = memory(3, 2);
    let (address, kept) = (memory.address(), || memory.as_fd().try_clone_to_owned().unwrap());
    assert!(EntryMemory::inherit(kept(), address, 2).is_err(), "the address is in use");
    drop(entries);
    assert!(EntryMemory::inherit(kept(), address, 2).is_err(), "the address is in use");
    let kept = kept();
    drop(memory);
    for number in [0, 1, 3, usize::MAX] {
        let kept = kept.try_clone().unwrap();
        assert!(EntryMemory::inherit(kept, address, number).is_err(), "{number}");
    }
    let file = std::fs::File::open("/dev/null").unwrap();
    assert!(EntryMemory::inherit(file.into(), address, 2).is_err());
    EntryMemory::inherit(kept, address, 2).unwrap();
}
