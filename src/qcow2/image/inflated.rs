//! Cache of recently decompressed clusters. A guest reads 4 KiB at a time, and without the cache
//! each read would decompress the whole cluster.
//!
//! The key is the location of the compressed bytes. These bytes do not change while an entry names
//! them: backing files do not change, and compressed clusters are never overwritten. In an overlay
//! their host clusters are freed only after the entry is gone, and then no request asks for the
//! key.

use std::collections::VecDeque;
use std::sync::Arc;

use crate::format::HostOffset;
use host::sync::{Mutex, rank};

/// Most clusters that are kept.
const CLUSTERS: usize = 16;
/// Most bytes that are kept, but at least one cluster.
const BYTES: usize = 4 << 20;

/// Host offset of compressed bytes, and their number.
type CompressedPlace = (HostOffset, u32);

/// The cached clusters of one image, most recently used first.
#[derive(Debug, Default)]
pub(super) struct Inflated(Mutex<{ rank::LEAF }, VecDeque<(CompressedPlace, Arc<[u8]>)>>);

impl Inflated {
    pub fn get(&self, place: CompressedPlace) -> Option<Arc<[u8]>> {
        let mut clusters = self.0.lock();
        let index = clusters.iter().position(|(of, _)| *of == place)?;
        let found = clusters.remove(index)?;
        let bytes = Arc::clone(&found.1);
        clusters.push_front(found);
        Some(bytes)
    }

    /// Adds a cluster and evicts the least recently used ones.
    pub fn put(&self, place: CompressedPlace, bytes: Arc<[u8]>) {
        let most = (BYTES / bytes.len().max(1)).clamp(1, CLUSTERS);
        let mut clusters = self.0.lock();
        // Two readers may have decompressed the same cluster.
        clusters.retain(|(of, _)| *of != place);
        clusters.truncate(most - 1);
        clusters.push_front((place, bytes));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn place(number: u64) -> CompressedPlace {
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
        assert!(
            inflated.get(place(1)).is_none()
                && inflated.get(place(0)).is_some()
                && inflated.get(place(3)).is_some()
        );
        assert!(inflated.get((HostOffset(3 << 16), 101)).is_none(), "other bytes");
        assert_eq!(inflated.0.lock().len(), CLUSTERS);
        for number in 0..4 {
            inflated.put(place(number), vec![1; 2 << 20].into());
        }
        assert_eq!(inflated.0.lock().len(), 2, "4 MiB");
    }
}
