//! Compares refcounts with the references that the late search for leaks has counted.

use super::{Allocator, corrupt};
use crate::format::HostCluster;
use crate::image::changed::ChangedClusters;
use crate::image::check::References;
use host::Result;

/// Clusters that one step compares. The lock of the allocator is held that long, and requests that
/// allocate wait.
const COMPARED_AT_ONCE: u64 = 1 << 13;

/// What one step has found.
#[derive(Clone, Copy, Debug, Default)]
pub(in crate::image) struct Compared {
    /// The first cluster of the next step; `None` after the last one.
    pub next: Option<u64>,
    /// Clusters whose excess references are queued as frees.
    pub leaked: u64,
    /// Whether there may be leaks that this search cannot tell from references.
    pub is_unclear: bool,
}

impl Allocator {
    /// Begins to record which clusters are used and freed. Called before the first change.
    pub fn record_changed(&self) {
        self.state.lock().refcounts.changed = Some(ChangedClusters::default());
    }

    /// Stops recording. Returns whether a cluster has lost a reference that was not counted.
    pub fn forget_changed(&self) -> bool {
        let changed = self.state.lock().refcounts.changed.take();
        changed.is_none_or(|changed| changed.has_lost_count)
    }

    /// Returns whether a cluster was used or freed since recording began.
    pub fn has_changed(&self, cluster: u64) -> bool {
        let state = self.state.lock();
        state.refcounts.changed.as_ref().is_none_or(|changed| changed.contains(cluster))
    }

    /// Compares the refcounts of a few clusters from `from` on with `references`, the references of
    /// all L2 entries, and queues what is too much as frees. The next pass lowers the refcounts as
    /// it does for any free: after a barrier that makes durable all that the dead process has
    /// written and the search has read (R3, R7).
    ///
    /// # Errors
    /// [`host::ErrorKind::Corrupt`] if a refcount is too low; I/O while loading a block.
    ///
    /// # Panics
    /// If a cluster that no request has used is known as free, freed or reserved.
    pub fn compare(&self, from: u64, references: &References) -> Result<Compared> {
        let mut state = self.state.lock();
        let state = &mut *state;
        let entries = self.geometry.refblock_entries();
        let mut compared = Compared::default();
        let Some(block) = state.refcounts.next_block(from / entries) else { return Ok(compared) };
        state.refcounts.evict();
        let from = from.max(block * entries);
        let end = ((block + 1) * entries).min(from + COMPARED_AT_ONCE);
        for cluster in from..end {
            let refcount = state.refcounts.get(cluster)?;
            let is_changed =
                state.refcounts.changed.as_ref().is_none_or(|changed| changed.contains(cluster));
            if is_changed {
                // One reference is that of its new owner. Others may be left from before.
                compared.is_unclear |= refcount > 1;
                continue;
            }
            let is_metadata = state.refcounts.is_metadata(cluster);
            let counted = references.get(cluster) + u64::from(is_metadata);
            if refcount < counted {
                return Err(corrupt(format!(
                    "cluster at {} has {counted} references but its refcount is {refcount}",
                    self.geometry.host_offset(HostCluster(cluster))
                )));
            }
            if refcount == counted {
                continue;
            }
            // Lowered to one, the refcount would contradict an entry without COPIED (R9).
            if is_metadata || counted == 1 && references.is_shared(cluster) {
                compared.is_unclear = true;
                continue;
            }
            assert!(
                !state.pending.contains_key(&cluster)
                    && !state.is_spoken_for(cluster)
                    && !state.gaps.contains(cluster)
                    && !state.reserved.contains(&cluster),
                "cluster {cluster} is in use and not recorded as changed"
            );
            state.refcounts.change(cluster);
            state.pending.insert(cluster, refcount - counted);
            compared.leaked += 1;
        }
        if let Some(changed) = &mut state.refcounts.changed {
            changed.compared = end;
        }
        compared.next = Some(end);
        Ok(compared)
    }
}
