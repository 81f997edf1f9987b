//! How often each host cluster is referenced: one byte a cluster where anything is, so that memory is bounded by what the file holds, not by
//! how long a sparse file claims to be.

use std::collections::HashMap;

/// Clusters of one page.
const PAGE: usize = 4096;

/// The counters of [`PAGE`] clusters.
#[derive(Debug)]
struct Page {
    /// Counts up to 254; 255 stands for that or more, see `References.many`.
    counts: [u8; PAGE],
    /// One bit a cluster: an entry without COPIED refers to it.
    shared: [u64; PAGE / 64],
}

/// Numbers of references.
#[derive(Debug)]
pub(super) struct References {
    pages: Vec<Option<Box<Page>>>,
    /// Clusters that are referenced more than 255 times.
    many: HashMap<u64, u64>,
    /// What a refcount of the image can say at most.
    max: u64,
}

impl References {
    /// None yet. `max` is the largest count that is ever needed.
    pub fn new(max: u64) -> Self {
        References { pages: Vec::new(), many: HashMap::new(), max }
    }

    /// One reference more; `false`, and no more, where there are as many as can be counted. The caller has checked that the file reaches as
    /// far as this cluster.
    #[must_use]
    pub fn add(&mut self, cluster: u64) -> bool {
        let max = self.max;
        if self.get(cluster) == max {
            return false;
        }
        let (page, index) = self.page(cluster);
        match page.counts[index] {
            u8::MAX => *self.many.entry(cluster).or_insert(u64::from(u8::MAX)) += 1,
            _ => page.counts[index] += 1,
        }
        true
    }

    /// An entry without COPIED refers to this cluster.
    pub fn set_shared(&mut self, cluster: u64) {
        let (page, index) = self.page(cluster);
        page.shared[index / 64] |= 1 << (index % 64);
    }

    /// Whether [`References::set_shared`] was called.
    pub fn is_shared(&self, cluster: u64) -> bool {
        let (page, index) = place(cluster);
        self.pages.get(page).and_then(Option::as_ref).is_some_and(|page| page.shared[index / 64] >> (index % 64) & 1 != 0)
    }

    /// The references of a cluster.
    pub fn get(&self, cluster: u64) -> u64 {
        let (page, index) = place(cluster);
        match self.pages.get(page).and_then(Option::as_ref).map_or(0, |page| page.counts[index]) {
            u8::MAX => self.many.get(&cluster).copied().unwrap_or(u64::from(u8::MAX)),
            count => u64::from(count),
        }
    }

    /// Whether nothing refers to any cluster from this one up to the one returned.
    pub fn none_until(&self, cluster: u64) -> Option<u64> {
        let (page, _) = place(cluster);
        self.pages.get(page).is_none_or(Option::is_none).then(|| (page as u64 + 1) * PAGE as u64)
    }

    fn page(&mut self, cluster: u64) -> (&mut Page, usize) {
        let (page, index) = place(cluster);
        if self.pages.len() <= page {
            self.pages.resize_with(page + 1, || None);
        }
        (self.pages[page].get_or_insert_with(|| Box::new(Page { counts: [0; PAGE], shared: [0; PAGE / 64] })), index)
    }
}

fn place(cluster: u64) -> (usize, usize) {
    ((cluster / PAGE as u64) as usize, (cluster % PAGE as u64) as usize)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_go_beyond_a_byte_and_end_at_the_width() {
        let mut references = References::new(300);
        for count in 1..=300 {
            assert!(references.add(5));
            assert_eq!((references.get(5), references.get(4), references.get(6)), (count, 0, 0));
        }
        assert!(!references.add(5));
        assert_eq!(references.get(5), 300);
        let mut narrow = References::new(1);
        assert!(narrow.add(9000) && !narrow.add(9000));
        assert_eq!(narrow.get(9000), 1);
    }

    #[test]
    fn empty_pages_are_skipped_whole() {
        let mut references = References::new(9);
        assert!(references.add(2 * PAGE as u64));
        assert_eq!(references.none_until(7), Some(PAGE as u64));
        assert_eq!(references.none_until(2 * PAGE as u64 + 9), None);
        assert_eq!(references.none_until(3 * PAGE as u64), Some(4 * PAGE as u64));
        references.set_shared(2 * PAGE as u64 + 1);
        assert!(references.is_shared(2 * PAGE as u64 + 1) && !references.is_shared(2 * PAGE as u64) && !references.is_shared(0));
    }
}
