//! Counts the references to each host cluster. A counter takes one byte, in pages that exist only
//! where there are references. Memory is therefore bounded by what the file holds, not by the
//! length that a sparse file claims.

use std::collections::HashMap;

/// Clusters per page.
const PAGE: usize = 4096;

/// The counters of [`PAGE`] clusters.
#[derive(Debug)]
struct ReferencePage {
    /// Counts up to 254; 255 means 255 or more, see `References.many`.
    counts: [u8; PAGE],
    /// One bit per cluster, set if an entry without COPIED refers to it.
    shared: [u64; PAGE / 64],
}

/// The number of references to each cluster.
#[derive(Debug)]
pub(in crate::image) struct References {
    pages: Vec<Option<Box<ReferencePage>>>,
    /// Counts of clusters that are referenced more than 255 times.
    many: HashMap<u64, u64>,
    /// The largest refcount that the image can hold.
    max: u64,
}

impl References {
    /// Makes counters that are all zero. `max` is the largest count that is ever needed.
    pub fn new(max: u64) -> Self {
        References { pages: Vec::new(), many: HashMap::new(), max }
    }

    /// Adds one reference. Returns `false` and adds none if the count has reached its maximum. The
    /// caller has checked that the file reaches as far as this cluster.
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

    /// Records that an entry without COPIED refers to this cluster.
    pub fn set_shared(&mut self, cluster: u64) {
        let (page, index) = self.page(cluster);
        page.shared[index / 64] |= 1 << (index % 64);
    }

    /// Returns whether [`References::set_shared`] was called for a cluster.
    pub fn is_shared(&self, cluster: u64) -> bool {
        let (page, index) = place(cluster);
        self.pages
            .get(page)
            .and_then(Option::as_ref)
            .is_some_and(|page| page.shared[index / 64] >> (index % 64) & 1 != 0)
    }

    /// Returns the number of references to a cluster.
    pub fn get(&self, cluster: u64) -> u64 {
        let (page, index) = place(cluster);
        match self.pages.get(page).and_then(Option::as_ref).map_or(0, |page| page.counts[index]) {
            u8::MAX => self.many.get(&cluster).copied().unwrap_or(u64::from(u8::MAX)),
            count => u64::from(count),
        }
    }

    /// If no entry refers to this cluster or the rest of its page, returns the first cluster of the
    /// next page.
    pub fn none_until(&self, cluster: u64) -> Option<u64> {
        let (page, _) = place(cluster);
        self.pages.get(page).is_none_or(Option::is_none).then(|| (page as u64 + 1) * PAGE as u64)
    }

    fn page(&mut self, cluster: u64) -> (&mut ReferencePage, usize) {
        let (page, index) = place(cluster);
        if self.pages.len() <= page {
            self.pages.resize_with(page + 1, || None);
        }
        (
            self.pages[page].get_or_insert_with(|| {
                Box::new(ReferencePage { counts: [0; PAGE], shared: [0; PAGE / 64] })
            }),
            index,
        )
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
        assert!(
            references.is_shared(2 * PAGE as u64 + 1)
                && !references.is_shared(2 * PAGE as u64)
                && !references.is_shared(0)
        );
    }
}
