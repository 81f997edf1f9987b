//! The host clusters that this process has used or freed since it took an image over: one bit per
//! cluster, in pages that exist only where there is such a cluster. Pure data structure: no I/O, no
//! locks.

use std::collections::HashMap;

use host::mutants::{Step, without};

/// Clusters per page.
const PAGE: u64 = 4096;
/// Clusters per word of a page.
const WORD: u64 = u64::BITS as u64;

/// The clusters that the late search for leaks must leave alone.
#[derive(Debug, Default)]
pub(super) struct ChangedClusters {
    pages: HashMap<u64, Box<[u64; (PAGE / WORD) as usize]>>,
    /// The search has compared the refcounts of all clusters below this one.
    pub compared: u64,
    /// Whether a cluster with several references lost one before the search had compared it. How
    /// many references it has is not known then.
    pub has_lost_count: bool,
}

impl ChangedClusters {
    /// Adds a cluster. It stays in the set for good.
    pub fn add(&mut self, cluster: u64) {
        if !without(Step::LateSearchKeepsChanged) {
            let page = self.pages.entry(cluster / PAGE).or_insert_with(|| Box::new([0; _]));
            page[(cluster % PAGE / WORD) as usize] |= 1 << (cluster % WORD);
        }
    }

    /// Returns whether a cluster was added.
    pub fn contains(&self, cluster: u64) -> bool {
        self.pages
            .get(&(cluster / PAGE))
            .is_some_and(|page| page[(cluster % PAGE / WORD) as usize] >> (cluster % WORD) & 1 != 0)
    }

    /// Records that a cluster has lost a reference and still has others.
    pub fn still_shared(&mut self, cluster: u64) {
        self.has_lost_count |= cluster >= self.compared;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exactly_what_was_added_is_there() {
        let mut changed = ChangedClusters::default();
        let added = [0, 63, 64, 4095, 4096, u64::MAX];
        added.iter().for_each(|&cluster| changed.add(cluster));
        assert!(added.iter().all(|&cluster| changed.contains(cluster)));
        let others = [1, 62, 65, 4094, 4097, 8192, u64::MAX - 1];
        assert!(others.iter().all(|&cluster| !changed.contains(cluster)));
    }
}
