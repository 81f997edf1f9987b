//! Checks all clusters that the entries of one L2 table name, run by run.

use std::ops::Range;

use super::Allocator;

/// Runs that are looked up under one hold of the lock of the allocator, without I/O. Requests that
/// allocate wait that long.
const CHECKED_AT_ONCE: usize = 256;

/// Consecutive host clusters that entries of one table name, each once.
#[derive(Debug)]
pub(in crate::image) struct NamedRun {
    /// The cluster numbers.
    pub clusters: Range<u64>,
    /// Whether the entries say COPIED.
    pub in_place: bool,
}

/// A refcount block cannot be read.
#[derive(Clone, Copy, Debug)]
pub(in crate::image) struct Unreadable {
    /// The index of the block.
    pub block: u64,
}

impl Allocator {
    /// Returns whether [`Allocator::check_data`] would accept every cluster of these runs. Stops at
    /// the first run that it would not accept.
    ///
    /// # Errors
    /// The first refcount block, in the order of the file, that cannot be read, if the runs before
    /// it are accepted.
    pub fn check_runs(&self, runs: &[NamedRun]) -> Result<bool, Unreadable> {
        let mut unknown: Vec<&NamedRun> = Vec::new();
        for runs in runs.chunks(CHECKED_AT_ONCE) {
            let state = self.state.lock();
            for run in runs {
                if state.has_reserved(&run.clusters) {
                    return Ok(false);
                }
                if !state.refcounts.are_known_data(&run.clusters) {
                    unknown.push(run);
                }
            }
        }
        // In the order of the file, so that each refcount block is loaded once.
        unknown.sort_unstable_by_key(|run| run.clusters.start);
        for run in unknown {
            // Taken for each run, because it may have to load a block.
            let mut state = self.state.lock();
            let may_be_named = state.refcounts.may_be_named(&run.clusters, run.in_place);
            if !may_be_named.map_err(|block| Unreadable { block })?
                || state.has_reserved(&run.clusters)
            {
                return Ok(false);
            }
        }
        Ok(true)
    }
}
