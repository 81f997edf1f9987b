//! Compressed clusters that were decompressed lately: a guest reads 4 KiB at a time, and each costs the whole cluster.
//!
//! Keyed by where the compressed bytes lie. Those do not change while an entry names them: no backing file changes, and in an overlay their host
//! clusters are not given back before the entry is gone, after which nothing asks for them; compressed clusters are never written.

use std::collections::VecDeque;
use std::sync::Arc;

use crate::format::HostOffset;
use crate::sync::{Mutex, rank};

/// Clusters that are kept, at most.
const CLUSTERS: usize = 16;
/// And bytes, but for one cluster in any case.
const BYTES: usize = 4 << 20;

/// Where compressed bytes lie, and how many.
type Place = (HostOffset, u32);

/// The clusters of one image, the one used last first.
#[derive(Debug, Default)]
pub(super) struct Inflated(Mutex<{ rank::LEAF }, VecDeque<(Place, Arc<[u8]>)>>);

impl Inflated {
    pub fn get(&self, place: Place) -> Option<Arc<[u8]>> {
        let mut clusters = self.0.lock();
        let index = clusters.iter().position(|(of, _)| *of == place)?;
        let found = clusters.remove(index)?;
        let bytes = Arc::clone(&found.1);
        clusters.push_front(found);
        Some(bytes)
    }

    /// Keeps a cluster, in place of the one that was not used for longest.
    pub fn put(&self, place: Place, bytes: Arc<[u8]>) {
        let most = (BYTES / bytes.len().max(1)).clamp(1, CLUSTERS);
        let mut clusters = self.0.lock();
        // Two readers may have decompressed the same one.
        clusters.retain(|(of, _)| *of != place);
        clusters.truncate(most - 1);
        clusters.push_front((place, bytes));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn place(number: u64) -> Place {
        (HostOffset(number << 16), 100)
    }

    #[test]
    fn the_cluster_that_was_not_used_for_longest_goes() {
        let inflated = Inflated::default();
        for number in 0..CLUSTERS as u64 {
            inflated.put(place(number), vec![number as u8; 65536].into());
        }
        inflated.put(place(3), vec![3; 65536].into());
        assert_eq!(inflated.get(place(0)).unwrap()[..2], [0, 0], "used now");
        inflated.put(place(100), vec![100; 65536].into());
        assert!(inflated.get(place(1)).is_none() && inflated.get(place(0)).is_some() && inflated.get(place(3)).is_some());
        assert!(inflated.get((HostOffset(3 << 16), 101)).is_none(), "other bytes");
        assert_eq!(inflated.0.lock().len(), CLUSTERS);
        for number in 0..4 {
            inflated.put(place(number), vec![1; 2 << 20].into());
        }
        assert_eq!(inflated.0.lock().len(), 2, "4 MiB");
    }
}
