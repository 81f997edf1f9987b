//! Arbitrary bytes as a chunk list, as a server could send it, and as the header of a map of the
//! cache. What is accepted has exactly one form.

#![no_main]

use remote::cache::MapHeader;
use remote::sums::{CHUNK, ChunkList};

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    if let Ok(list) = ChunkList::parse(data) {
        assert_eq!(list.to_bytes(), data);
        assert!(i64::try_from(list.size()).is_ok());
        let mut end = 0;
        for index in 0..list.chunks() {
            let range = list.range(index);
            assert!(range.start == end && !range.is_empty() && range.end - range.start <= CHUNK);
            assert!(!list.verify(index, b""));
            list.is_zero(index);
            end = range.end;
        }
        assert_eq!(end, list.size());
        assert!(!list.is_zero(list.chunks()) && !list.verify(u64::MAX, data));
    }
    if let Ok(header) = MapHeader::parse(data) {
        assert!(data.starts_with(&header.to_bytes()));
        assert!(header.size <= remote::cache::LARGEST_FILE);
    }
});
