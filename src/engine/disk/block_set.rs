//! A set of blocks of the disk that any number of threads change at the same time, without a lock.
//!
//! One bit stands for a block of [`BLOCK`] bytes. The bits lie in pages that exist only where a
//! block was added, so an empty set costs 2 KiB, and a full one 2 MiB for each TiB of the disk.
//!
//! **Invariants:** a page is never freed, so a thread may read a page that another one has made.

use std::ops::Range;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};

/// Bytes per block: the cluster size of most images, and the block of the cache of remote files.
pub(super) const BLOCK: u64 = 64 << 10;

const WORD: u64 = u64::BITS as u64;
/// Words per page: 4 KiB, which stand for 2 GiB of the disk.
const WORDS: usize = 512;
/// Pages per directory: 512 GiB of the disk.
const PAGES: usize = 256;
/// Directories. Blocks beyond 64 TiB are in no set.
const DIRECTORIES: usize = 128;

type Page = [AtomicU64; WORDS];
type Directory = [OnceLock<Box<Page>>; PAGES];

/// The set.
#[derive(Debug)]
pub(super) struct BlockSet {
    directories: [OnceLock<Box<Directory>>; DIRECTORIES],
}

impl BlockSet {
    pub fn new() -> BlockSet {
        BlockSet { directories: std::array::from_fn(|_| OnceLock::new()) }
    }

    /// Adds the block at `block * BLOCK` bytes. Returns whether it was absent.
    pub fn add(&self, block: u64) -> bool {
        let (word, bit) = (block / WORD, 1 << (block % WORD));
        let Some((directory, page, index)) = place(word) else { return false };
        let directory = self.directories[directory]
            .get_or_init(|| Box::new(std::array::from_fn(|_| OnceLock::new())));
        let page =
            directory[page].get_or_init(|| Box::new(std::array::from_fn(|_| AtomicU64::new(0))));
        page[index].fetch_or(bit, Ordering::Relaxed) & bit == 0
    }

    /// Removes a block. Returns whether it was present.
    pub fn remove(&self, block: u64) -> bool {
        let bit = 1 << (block % WORD);
        self.word(block / WORD).is_some_and(|word| {
            // Most blocks are absent, and a load does not take the cache line away.
            word.load(Ordering::Relaxed) & bit != 0
                && word.fetch_and(!bit, Ordering::Relaxed) & bit != 0
        })
    }

    /// Whether a block is present.
    pub fn contains(&self, block: u64) -> bool {
        let word = self.word(block / WORD);
        word.is_some_and(|word| word.load(Ordering::Relaxed) >> (block % WORD) & 1 != 0)
    }

    fn word(&self, word: u64) -> Option<&AtomicU64> {
        let (directory, page, index) = place(word)?;
        self.directories[directory].get()?[page].get().map(|page| &page[index])
    }
}

/// The blocks that have a byte of the range.
pub(super) fn blocks(range: &Range<u64>) -> Range<u64> {
    range.start / BLOCK..range.end.div_ceil(BLOCK)
}

/// Indices of the directory, of the page and of the word in it; `None` beyond the last one.
fn place(word: u64) -> Option<(usize, usize, usize)> {
    let page = word / WORDS as u64;
    let directory = usize::try_from(page / PAGES as u64).ok().filter(|at| *at < DIRECTORIES)?;
    Some((directory, (page % PAGES as u64) as usize, (word % WORDS as u64) as usize))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exactly_what_was_added_and_not_removed_is_there() {
        let set = BlockSet::new();
        let last = (64_u64 << 40) / BLOCK - 1;
        let added = [0, 63, 64, 32767, 32768, 8_388_607, 8_388_608, last];
        assert!(added.iter().all(|&block| set.add(block)));
        assert!(added.iter().all(|&block| !set.add(block)));
        assert!(added.iter().all(|&block| set.contains(block)));
        assert!([1, 62, 65, 32766, 32769, last - 1].iter().all(|&block| !set.contains(block)));
        assert!(set.remove(64) && !set.remove(64) && !set.contains(64) && set.contains(63));
        assert!(!set.remove(5) && !set.remove(last - 1));
    }

    #[test]
    fn blocks_beyond_the_last_one_are_in_no_set() {
        let set = BlockSet::new();
        for block in [(64_u64 << 40) / BLOCK, u64::MAX / BLOCK, u64::MAX] {
            assert!(!set.add(block) && !set.contains(block) && !set.remove(block));
        }
    }

    #[test]
    fn a_range_has_the_blocks_of_all_its_bytes() {
        assert_eq!(blocks(&(0..0)), 0..0);
        assert_eq!(blocks(&(BLOCK - 1..BLOCK)), 0..1);
        assert_eq!(blocks(&(BLOCK - 1..BLOCK + 1)), 0..2);
    }
}
