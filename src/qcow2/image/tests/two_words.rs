//! Entries of two words, which another thread reads while they change.

use super::*;
use crate::format::{GuestCluster, HostCluster, L2Entry};
use host::sync::atomic::{AtomicBool, Ordering};

/// How often the entry changes. Without the lock, the test failed in three runs of three.
const CHANGES: u64 = 300_000;

/// Protects: I6. A lookup that holds no range, and a pass that copies the table, see both words of
/// one entry.
#[test]
fn an_entry_of_two_words_changes_whole() {
    let start = Start { extended: true, ..Start::new("two words", 3, 14, 4, 1 << 20) };
    let image = Image::open(SimStorage::new(start.bytes())).unwrap();
    let geometry = image.reader.geometry();
    let data = L2Entry::Standard {
        host: Some((HostCluster(9), true)),
        allocated: 0xffff_0000,
        zero: 0x0000_ffff,
    };
    let zero = L2Entry::Standard { host: None, allocated: 0, zero: u32::MAX };
    let set = |entry: L2Entry| {
        let raw = entry.encode(&geometry);
        image.reader.tables.change(0, |set| set(3, raw)).unwrap();
        raw
    };
    let (zero_raw, data_raw) = (set(zero), set(data));
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !done.load(Ordering::Relaxed) {
                let seen = image.reader.entry(GuestCluster(3)).unwrap();
                assert!(seen == data || seen == zero, "{seen:?}");
            }
        });
        scope.spawn(|| {
            let two = [zero_raw, data_raw]
                .map(|raw| [raw.descriptor.to_be_bytes(), raw.bitmap.to_be_bytes()].concat());
            while !done.load(Ordering::Relaxed) {
                let writes = image.reader.tables.take_dirty();
                for (_, bytes) in writes.iter().flat_map(|write| &write.pieces) {
                    assert!(two.iter().any(|entry| entry[..] == bytes[48..64]), "copied in part");
                }
                image.reader.tables.written();
            }
        });
        for change in 0..CHANGES {
            set(if change % 2 == 0 { zero } else { data });
        }
        done.store(true, Ordering::Relaxed);
    });
}
