//! The page cache of a host, as far as it can hold what the disk does not.
//!
//! ```text
//! change ──▶ dirty ──▶ under way ──▶ clean          the write-back went well: the disk has it
//!                            └─────▶ lost           it failed: clean for the host, on no disk
//! lost ──▶ dirty            the sector is written again, and is durable with the next barrier
//! lost ──▶ gone             the host drops the page: reads show what the disk has
//! ```
//! A later barrier that succeeds writes nothing of what is lost. This is what Linux does. A page of Linux
//! is as a rule larger than a sector, so that a write to one sector may carry a lost one beside it to
//! the disk; here each sector is for itself, which loses more.
//!
//! The file in memory holds what readers see. For every sector of which the disk has something else,
//! this holds what the disk has.

use std::collections::BTreeMap;
use std::ops::Range;

const SECTOR: usize = 512;

/// What the disk has in a sector, by number of the sector.
type OnDisk = BTreeMap<usize, [u8; SECTOR]>;

/// Whether a sector reaches the disk in a write-back that fails.
pub type Reaches = Box<dyn Fn(u64) -> bool + Send>;

/// See the module.
pub struct HostCache {
    reaches: Reaches,
    dirty: OnDisk,
    /// Write-backs that have begun, oldest first, by number.
    under_way: Vec<(u64, OnDisk)>,
    lost: OnDisk,
    begun: u64,
}

impl HostCache {
    /// Of a file that is all on disk. In a write-back that fails those sectors reach the disk of which
    /// `reaches` says so, by number.
    pub fn new(reaches: Reaches) -> HostCache {
        HostCache { reaches, dirty: OnDisk::new(), under_way: Vec::new(), lost: OnDisk::new(), begun: 0 }
    }

    /// To be called before bytes of this range change.
    pub fn changes(&mut self, bytes: &[u8], range: Range<usize>) {
        for sector in range.start / SECTOR..range.end.div_ceil(SECTOR) {
            let lost = self.lost.remove(&sector);
            self.dirty.entry(sector).or_insert_with(|| lost.unwrap_or_else(|| content(bytes, sector)));
        }
    }

    /// A write-back of all that is dirty begins. Returns its number.
    pub fn write_back_began(&mut self) -> u64 {
        self.begun += 1;
        self.under_way.push((self.begun, std::mem::take(&mut self.dirty)));
        self.begun
    }

    /// The write-back of that number has ended, well or not.
    pub fn write_back_ended(&mut self, number: u64, well: bool) {
        let Some(at) = self.under_way.iter().position(|(began, _)| *began == number) else { return };
        let (_, written) = self.under_way.remove(at);
        for (sector, before) in written {
            if well || (self.reaches)(sector as u64) {
                continue;
            }
            // What was taken for the content of the disk when the sector was changed again never came there.
            let later = self.under_way[at..].iter_mut().map(|(_, sectors)| sectors).chain([&mut self.dirty]);
            match later.into_iter().find_map(|sectors| sectors.get_mut(&sector)) {
                Some(later) => *later = before,
                None => drop(self.lost.insert(sector, before)),
            }
        }
    }

    /// The host drops its clean pages: the bytes become those of the disk.
    pub fn drop_clean(&mut self, bytes: &mut [u8]) {
        for (sector, before) in std::mem::take(&mut self.lost) {
            let start = bytes.len().min(sector * SECTOR);
            let end = bytes.len().min(start + SECTOR);
            bytes[start..end].copy_from_slice(&before[..end - start]);
        }
    }

    /// How many sectors are clean for the host and not on disk.
    pub fn lost(&self) -> usize {
        self.lost.len()
    }
}

/// A sector as readers see it; zeros beyond the end of the file.
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

    /// A file of four sectors, the number of each in it.
    struct File {
        cache: HostCache,
        bytes: Vec<u8>,
    }

    impl File {
        fn new(reaches: impl Fn(u64) -> bool + Send + 'static) -> File {
            File { cache: HostCache::new(Box::new(reaches)), bytes: (0..4).flat_map(|sector| [sector; SECTOR]).collect() }
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
