//! A model of the host's page cache, as far as the cache can hold data that the disk does not.
//!
//! ```text
//! change ──▶ dirty ──▶ under way ──▶ clean      the write-back succeeded: the disk has the data
//!                            └─────▶ lost       it failed: clean for the host, but on no disk
//! lost ──▶ dirty      the sector is written again, and is durable with the next barrier
//! lost ──▶ gone       the host drops the page: reads return what the disk has
//! ```
//! A later barrier that succeeds does not write a lost sector. Linux behaves like this. A page of
//! Linux is usually larger than a sector, so a write to one sector may also carry a lost neighbour
//! to the disk. Here each sector is separate, which loses more.
//!
//! The file in memory holds the bytes that readers see. For every sector in which the disk has
//! different bytes, this model holds the bytes of the disk.

use std::collections::BTreeMap;
use std::ops::Range;

const SECTOR: usize = 512;

/// The disk's content of some sectors, by sector number.
type OnDisk = BTreeMap<usize, [u8; SECTOR]>;

/// Decides by its number whether a sector reaches the disk in a write-back that fails.
pub type Reaches = Box<dyn Fn(u64) -> bool + Send>;

/// The cache of one file; see the module.
pub struct HostCache {
    reaches: Reaches,
    dirty: OnDisk,
    /// Write-backs that have begun, oldest first, by number.
    under_way: Vec<(u64, OnDisk)>,
    lost: OnDisk,
    begun: u64,
}

impl HostCache {
    /// Makes the cache of a file that is entirely on disk. In a write-back that fails, those
    /// sectors reach the disk for whose numbers `reaches` returns true.
    pub fn new(reaches: Reaches) -> HostCache {
        HostCache {
            reaches,
            dirty: OnDisk::new(),
            under_way: Vec::new(),
            lost: OnDisk::new(),
            begun: 0,
        }
    }

    /// Must be called before bytes of this range change.
    pub fn changes(&mut self, bytes: &[u8], range: Range<usize>) {
        for sector in range.start / SECTOR..range.end.div_ceil(SECTOR) {
            let lost = self.lost.remove(&sector);
            self.dirty
                .entry(sector)
                .or_insert_with(|| lost.unwrap_or_else(|| content(bytes, sector)));
        }
    }

    /// Begins a write-back of all dirty sectors. Returns its number.
    pub fn write_back_began(&mut self) -> u64 {
        self.begun += 1;
        self.under_way.push((self.begun, std::mem::take(&mut self.dirty)));
        self.begun
    }

    /// Ends the write-back `number`, successfully or not.
    pub fn write_back_ended(&mut self, number: u64, well: bool) {
        let Some(at) = self.under_way.iter().position(|(began, _)| *began == number) else {
            return;
        };
        let (_, written) = self.under_way.remove(at);
        for (sector, before) in written {
            if well || (self.reaches)(sector as u64) {
                continue;
            }
            // When the sector was changed again, the content of this write-back was recorded as
            // that of the disk, but it never reached the disk.
            let later = self.under_way[at..]
                .iter_mut()
                .map(|(_, sectors)| sectors)
                .chain([&mut self.dirty]);
            match later.into_iter().find_map(|sectors| sectors.get_mut(&sector)) {
                Some(later) => *later = before,
                None => drop(self.lost.insert(sector, before)),
            }
        }
    }

    /// Drops the host's clean pages: the bytes become those of the disk.
    pub fn drop_clean(&mut self, bytes: &mut [u8]) {
        for (sector, before) in std::mem::take(&mut self.lost) {
            let start = bytes.len().min(sector * SECTOR);
            let end = bytes.len().min(start + SECTOR);
            bytes[start..end].copy_from_slice(&before[..end - start]);
        }
    }

    /// Returns how many sectors are clean for the host and not on disk.
    pub fn lost(&self) -> usize {
        self.lost.len()
    }
}

/// Returns the content of a sector as readers see it; zeros beyond the end of the file.
fn content(bytes: &[u8], sector: usize) -> [u8; SECTOR] {
    let mut content = [0; SECTOR];
    let start = bytes.len().min(sector * SECTOR);
    let end = bytes.len().min(start + SECTOR);
    content[..end - start].copy_from_slice(&bytes[start..end]);
    content
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A file of four sectors, each filled with its number.
    struct File {
        cache: HostCache,
        bytes: Vec<u8>,
    }

    impl File {
        fn new(reaches: impl Fn(u64) -> bool + Send + 'static) -> File {
            File {
                cache: HostCache::new(Box::new(reaches)),
                bytes: (0..4).flat_map(|sector| [sector; SECTOR]).collect(),
            }
        }

        fn write(&mut self, sector: usize, byte: u8) {
            let range = sector * SECTOR..(sector + 1) * SECTOR;
            self.cache.changes(&self.bytes, range.clone());
            self.bytes[range].fill(byte);
        }

        fn sync(&mut self, well: bool) {
            let number = self.cache.write_back_began();
            self.cache.write_back_ended(number, well);
        }

        fn shows(&self) -> [u8; 4] {
            std::array::from_fn(|sector| self.bytes[sector * SECTOR])
        }

        fn dropped(&mut self) -> [u8; 4] {
            self.cache.drop_clean(&mut self.bytes);
            self.shows()
        }
    }

    #[test]
    fn what_a_failed_write_back_has_lost_stays_until_it_is_dropped() {
        let mut file = File::new(|sector| sector == 1);
        file.write(0, 10);
        file.write(1, 11);
        file.sync(false);
        assert_eq!(file.shows(), [10, 11, 2, 3], "still there");
        file.write(2, 12);
        file.sync(true);
        assert_eq!(file.cache.lost(), 1, "and a later barrier does not write it");
        assert_eq!(file.dropped(), [0, 11, 12, 3]);
    }

    #[test]
    fn what_is_written_again_is_durable_with_the_next_barrier() {
        let mut file = File::new(|_| false);
        file.write(0, 10);
        file.sync(false);
        file.write(0, 20);
        assert_eq!(file.dropped(), [20, 1, 2, 3], "a dirty page is not dropped");
        file.sync(true);
        assert_eq!(file.dropped(), [20, 1, 2, 3]);
        file.write(0, 30);
        file.sync(false);
        assert_eq!(file.dropped(), [20, 1, 2, 3]);
    }

    #[test]
    fn what_changes_during_a_write_back_is_not_covered_by_it() {
        for (well, kept) in [(true, 10), (false, 0)] {
            let mut file = File::new(|_| false);
            file.write(0, 10);
            let number = file.cache.write_back_began();
            file.write(0, 20);
            file.cache.write_back_ended(number, well);
            assert_eq!(file.dropped()[0], 20, "dirty");
            file.sync(false);
            assert_eq!(file.dropped()[0], kept);
        }
    }
}
