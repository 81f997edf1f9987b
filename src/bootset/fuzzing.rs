//! The entry of the fuzzer: a disk that is mostly zeros, so that few bytes are a file system.

use std::io;
use std::sync::Arc;

use crate::{BlockSource, BootSetLimits, boot_set};

/// Bytes of the disk.
const SIZE: usize = 256 << 10;

/// A disk in memory.
struct Zeros(Vec<u8>);

impl BlockSource for Zeros {
    fn size(&self) -> u64 {
        self.0.len() as u64
    }

    fn read(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        let start = usize::try_from(offset).map_err(io::Error::other)?;
        let from = start.checked_add(buf.len()).and_then(|end| self.0.get(start..end));
        buf.copy_from_slice(from.ok_or_else(|| io::Error::from(io::ErrorKind::UnexpectedEof))?);
        Ok(())
    }
}

/// The disk that `data` describes: offset (3 bytes), length (1 byte) and the bytes there, again and
/// again.
pub(crate) fn disk_of(data: &[u8]) -> Vec<u8> {
    let mut disk = vec![0; SIZE];
    let mut rest = data;
    while let [a, b, c, len, tail @ ..] = rest {
        let at = usize::from(*a) | usize::from(*b) << 8 | usize::from(*c) << 16;
        let (bytes, tail) = tail.split_at(usize::from(*len).min(tail.len()));
        if let Some(place) = at.checked_add(bytes.len()).and_then(|end| disk.get_mut(at..end)) {
            place.copy_from_slice(bytes);
        }
        rest = tail;
    }
    disk
}

/// Searches a disk that is zeros but for the bytes in `data`.
///
/// # Panics
/// The answer breaks what [`crate::BootSet`] promises.
pub fn fuzz_disk(data: &[u8]) {
    let disk = disk_of(data);
    let source: Arc<dyn BlockSource> = Arc::new(Zeros(disk));
    let limits = BootSetLimits {
        most_ranges: 1000,
        most_bytes_read: 8 << 20,
        most_files: 2000,
        ..BootSetLimits::default()
    };
    for paths in [&[][..], &["/*/*".to_owned(), "/".to_owned()]] {
        let found = boot_set(Arc::clone(&source), paths, &limits);
        let Ok(set) = found else { panic!("absolute paths are refused") };
        let mut ranges = set.ranges.clone();
        ranges.sort_by_key(|range| range.start);
        assert!(ranges.len() <= limits.most_ranges);
        assert!(ranges.iter().all(|range| range.start < range.end));
        assert!(ranges.is_sorted_by(|one, next| one.end <= next.start));
        assert!(ranges.last().is_none_or(|last| last.end <= SIZE as u64));
        assert!(!set.notes.iter().any(|note| note.contains("has a fault")), "{:?}", set.notes);
    }
}
