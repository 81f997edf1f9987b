//! Free runs of host clusters. Pure data structure: no I/O, no locks.

use std::collections::BTreeMap;

/// Gaps that are searched for one that is large enough, before the first gap is taken. The limit
/// bounds the time of an allocation.
const LOOKED_AT: usize = 64;

/// Free runs, joined with their neighbours: start to length in clusters.
#[derive(Debug, Default)]
pub(super) struct Gaps(BTreeMap<u64, u64>);

impl Gaps {
    /// Returns whether no gap is known.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Returns whether a cluster is free.
    pub fn contains(&self, cluster: u64) -> bool {
        self.0.range(..=cluster).next_back().is_some_and(|(start, len)| cluster < start + len)
    }

    /// Adds a cluster. Adding a free cluster changes nothing: in a hostile image two entries may
    /// name a cluster that is counted once, and the removal of each frees it.
    pub fn add(&mut self, cluster: u64) {
        let (mut start, mut len) = (cluster, 1);
        if let Some((&before, &before_len)) = self.0.range(..=cluster).next_back() {
            if cluster < before + before_len {
                return;
            }
            if before + before_len == cluster {
                self.0.remove(&before);
                start = before;
                len += before_len;
            }
        }
        if let Some(after_len) = self.0.remove(&(cluster + 1)) {
            len += after_len;
        }
        self.0.insert(start, len);
    }

    /// Takes up to `at_most` clusters of one gap and returns the first cluster and the count.
    /// Prefers a gap that is large enough among the first [`LOOKED_AT`]; otherwise takes the first
    /// gap.
    pub fn take(&mut self, at_most: u64) -> Option<(u64, u64)> {
        let first = self.0.iter().next().map(|(&start, &len)| (start, len))?;
        let fitting = self
            .0
            .iter()
            .take(LOOKED_AT)
            .find(|(_, len)| **len >= at_most)
            .map(|(&start, &len)| (start, len));
        let (start, len) = fitting.unwrap_or(first);
        let taken = len.min(at_most);
        self.0.remove(&start);
        if taken < len {
            self.0.insert(start + taken, len - taken);
        }
        Some((start, taken))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn neighbours_are_joined_and_the_first_that_fits_is_taken() {
        let mut gaps = Gaps::default();
        for cluster in [10, 12, 11, 20, 30, 31, 32, 33] {
            gaps.add(cluster);
        }
        assert_eq!(gaps.0, BTreeMap::from([(10, 3), (20, 1), (30, 4)]));
        let free: Vec<u64> = (0..40).filter(|&cluster| gaps.contains(cluster)).collect();
        assert_eq!(free, [10, 11, 12, 20, 30, 31, 32, 33]);
        assert_eq!(gaps.take(4), Some((30, 4)));
        assert_eq!(gaps.take(2), Some((10, 2)));
        assert_eq!(gaps.take(9), Some((12, 1)), "none is large enough: the first");
        assert_eq!(gaps.take(1), Some((20, 1)));
        assert_eq!(gaps.take(1), None);
        assert!(gaps.is_empty());
    }

    #[test]
    fn a_cluster_that_is_freed_twice_is_free_once() {
        let mut gaps = Gaps::default();
        for cluster in [5, 6, 5, 6] {
            gaps.add(cluster);
        }
        assert_eq!(gaps.0, BTreeMap::from([(5, 2)]));
        assert_eq!((gaps.take(2), gaps.take(1)), (Some((5, 2)), None));
    }
}
