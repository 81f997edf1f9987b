//! The search for the leaks of a process that has died, while its guest lives on.
//!
//! A successor opens the image without a search, because the guest waits. It searches afterwards,
//! in small steps between the guest's requests:
//!
//! 1. For each L2 table, one step counts the references of its entries.
//! 2. Then each step compares some refcounts with these counts. What is too much is queued as a
//!    free, and the next pass lowers the refcounts (R3, R7). A death in between only leaks.
//!
//! **Touches:** the tables and the allocator, both under their own locks.
//! **Never:** changes an entry; loads a table; latches the image. Whatever does not fit ends the
//! search, the open mark then stays after the close, and the next open searches with all clusters
//! at rest.
//! **Locks:** the state of the search is taken out of its leaf lock for each step, so that no lock
//! is held from one step to the next.
//! **Invariants:** a cluster that the search frees is one that
//!
//! - was counted when the image was taken over, and no thread of this process has changed or
//!   reserved it since: it is not in [`ChangedClusters`], to which [`RefcountTable::set`] adds each
//!   cluster whose refcount it sets. Clusters that change while their refcount stays are added by
//!   name: those of the journal, those that were reserved ahead, and queued frees;
//! - is no metadata, and has more counts than entries that name it.
//!
//! The counts of such a cluster are exact, although requests change entries during the walk. A new
//! reference to a cluster needs an allocation of it, and a reference that is dropped is queued as a
//! free: both add the cluster to the set. So the entries that name an unchanged cluster are the
//! same at every moment since the takeover, each at its place, and the search reads each place
//! once. Tables that are made meanwhile name only clusters that were allocated meanwhile. A table
//! that gets another cluster keeps its place in the L1 table. A cluster of compressed data may have
//! several references; it is left alone, and the image keeps its mark, if one of them is dropped
//! before the cluster was compared.
//!
//! [`ChangedClusters`]: super::changed::ChangedClusters
//! [`RefcountTable::set`]: super::refcounts::RefcountTable::set

use super::Image;
use super::check::{MOST_CLUSTERS, References};
use crate::format::RefcountBlock;
use host::mutants::{Step, without};
use host::sync::atomic::Ordering;
use host::{Error, ErrorKind, Result};

/// What [`Image::search_step`] has done.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum SearchStep {
    /// Nothing: no process has died, the search has ended, or another thread makes a step.
    Nothing,
    /// A part of the search.
    Part,
    /// The last part. The next flush gives the leaks back.
    Last {
        /// The number of leaked clusters.
        clusters: u64,
        /// Whether these are all: [`Image::may_lose_mark`] is true after this.
        is_all: bool,
    },
}

/// The state of the search between two steps.
#[derive(Debug)]
pub(super) struct LateSearch {
    /// L1 index of the next table.
    table: usize,
    /// The next cluster to compare.
    cluster: u64,
    references: References,
    leaked: u64,
    is_unclear: bool,
}

impl Image {
    /// Prepares the late search. Called before the first change of a successor.
    pub(super) fn prepare_late_search(&self) {
        self.allocator.record_changed();
        *self.late_search.lock() = Some(LateSearch {
            table: 0,
            cluster: 0,
            references: References::new(RefcountBlock::new(&self.reader.geometry()).max()),
            leaked: 0,
            is_unclear: false,
        });
    }

    /// Makes one step of the search for the leaks of a process that has died: reads one L2 table,
    /// or compares a few thousand refcounts. Requests may go on meanwhile. The search takes one
    /// byte of memory for each cluster of the file that is in use. A caller that makes no more
    /// steps leaves the leaks to the next open.
    ///
    /// # Errors
    /// [`ErrorKind::Corrupt`] and [`ErrorKind::UnsupportedFeature`] as [`Image::find_leaks`]; I/O;
    /// the error of an image that accepts no writes. The search has ended then.
    pub fn search_step(&self) -> Result<SearchStep> {
        let Some(mut search) = self.late_search.lock().take() else {
            return Ok(SearchStep::Nothing);
        };
        match self.advance(&mut search) {
            Ok(true) => {
                *self.late_search.lock() = Some(search);
                Ok(SearchStep::Part)
            }
            Ok(false) => {
                let is_unclear = self.allocator.forget_changed() || search.is_unclear;
                self.is_searched.store(!is_unclear, Ordering::Release);
                Ok(SearchStep::Last { clusters: search.leaked, is_all: !is_unclear })
            }
            Err(error) => {
                self.allocator.forget_changed();
                Err(error)
            }
        }
    }

    /// Returns whether there is more to do.
    fn advance(&self, search: &mut LateSearch) -> Result<bool> {
        self.check_usable()?;
        if let Some(l1_index) = self.reader.tables.next_table(search.table) {
            search.table = l1_index + 1;
            if without(Step::LateSearchReadsEveryTable) && l1_index % 2 == 1 {
                return Ok(true);
            }
            let references = &mut search.references;
            self.reader.tables.each_reference(l1_index, |clusters, may_be_one| {
                for cluster in clusters.clone() {
                    if cluster >= MOST_CLUSTERS {
                        let text = format!("the file has more than {MOST_CLUSTERS} clusters");
                        return Err(Error::new(ErrorKind::UnsupportedFeature, text));
                    }
                    // A cluster that was freed and used again may be counted in both places. Its
                    // count is not looked at.
                    if !references.add(cluster) && !self.allocator.has_changed(cluster) {
                        let text = format!("cluster {cluster} has too many references");
                        return Err(Error::new(ErrorKind::Corrupt, text));
                    }
                    if !may_be_one {
                        references.set_shared(cluster);
                    }
                }
                Ok(())
            })?;
            return Ok(true);
        }
        let compared = self.allocator.compare(search.cluster, &search.references)?;
        search.leaked += compared.leaked;
        search.is_unclear |= compared.is_unclear;
        search.cluster = compared.next.unwrap_or(search.cluster);
        Ok(compared.next.is_some())
    }
}
