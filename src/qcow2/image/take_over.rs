//! Opening the image of a process that has died while its guest lives on: the journal is repeated.
//!
//! The file is as the dead process left it in the host's page cache. That is one of the states that
//! a loss of power may leave as well, so refcounts on disk are never below the number of references
//! (I2). The journal tells what the process knew beyond that. Its records are repeated in memory,
//! as changes that the next pass writes:
//!
//! 1. The last change of each guest cluster counts. An earlier one is not repeated, because its
//!    host cluster may have been freed and used again since.
//! 2. All host clusters that these changes name are counted, before any other cluster is allocated
//!    ([`Allocator::claim`]).
//! 3. The entries are set. A host cluster that an entry on disk names and its successor does not is
//!    freed by the next pass (R3, R7), as after any change.
//!
//! L2 tables and refcount blocks that existed only in the memory of the dead process are made anew.
//! Host clusters that it had reserved ahead are reserved again. Those that it had allocated and not
//! published, or freed, stay counted: they are leaks. A search reads all tables, and the guest
//! would wait for it, so it is made later, in small steps ([`late_search`]). Unless it has seen
//! everything, the open mark stays when the image is closed, and the next open searches.
//!
//! A record that does not fit the image is an error, and the image is not opened: reads would be
//! answered with old bytes otherwise.
//!
//! **The last barrier.** A process that dies in fdatasync(2) has perhaps consumed an error that the
//! kernel reports once to each open file (P7). The journal says whether a barrier was called. Its
//! result is then asked for through another open file description of the image, which was opened
//! before the first write and has not been synchronised since. If that process dies too before it
//! has recorded the answer, the answer is lost, and the next one accepts no write.
//!
//! [`Allocator::claim`]: super::allocator::Allocator::claim
//! [`late_search`]: super::late_search

use std::collections::BTreeMap;
use std::io;
use std::ops::Range;
use std::sync::Arc;

use super::Image;
use super::publish::released;
use crate::format::{GuestCluster, Header, HostCluster, L2Entry, feature};
use crate::journal::{BarrierState, Journal, MappingChange};
use host::mutants::{Step, without};
use host::storage::{SharedBytes, Sidecar, Storage};
use host::{Error, ErrorKind, Result};

impl Image {
    /// Begins a journal in `bytes`. Called before the first change of the image.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidArgument`] if `bytes` is too small; I/O.
    pub fn with_journal(self, bytes: Arc<dyn SharedBytes>) -> Result<Image> {
        let journal = Journal::create(bytes, &self.reader.geometry())?;
        let journal = Arc::new(journal);
        self.allocator.record_in(&journal);
        Ok(Image { journal: Some(journal), ..self })
    }

    /// Opens the image of a process that has died, whose journal is in `journal`. No other process
    /// has written the file since, and the host has not been started anew. The caller holds the
    /// file locks of that process. Nothing on disk changes. `last_barrier` synchronises the file
    /// through an open file description that has not been synchronised since the image was opened
    /// first; it is called only if the process may have died in a barrier.
    ///
    /// An image that accepted no more writes (P7, P11) accepts none after this either.
    ///
    /// # Errors
    /// As [`Image::open`]; [`ErrorKind::Corrupt`] if the journal does not fit the image.
    pub fn take_over<F: Storage + Sidecar>(
        file: Arc<F>,
        journal: Arc<dyn SharedBytes>,
        last_barrier: impl FnOnce() -> io::Result<()>,
    ) -> Result<Image> {
        let storage = Arc::clone(&file) as Arc<dyn Storage>;
        let mut image = Image::open_settled(storage, file, Header::parse)?;
        let mut header = image.reader.header();
        // The corrupt bit stops writes and not reads, as it did in the process that has set it.
        let is_corrupt = header.incompatible & feature::CORRUPT != 0;
        header.incompatible &= !feature::CORRUPT;
        header.check_writable()?;
        let (journal, changes, barrier) = Journal::open(journal, &image.reader.geometry())?;
        image.is_taken_over = true;
        image.prepare_late_search();
        image.repeat(&changes, &journal.reserved())?;
        let journal = Arc::new(journal);
        image.allocator.record_in(&journal);
        image.journal = Some(journal);
        image.ask_for_barrier(barrier, last_barrier);
        if is_corrupt {
            image.latch();
        }
        image.ask_for_commit();
        Ok(image)
    }

    /// Latches the image if the last barrier failed, or if that cannot be known.
    fn ask_for_barrier(
        &self,
        barrier: BarrierState,
        last_barrier: impl FnOnce() -> io::Result<()>,
    ) {
        let result = match barrier {
            BarrierState::Succeeded => return,
            BarrierState::Failed => Err("the image failed before".to_string()),
            BarrierState::Asked => {
                Err("what became of the last fdatasync is not known".to_string())
            }
            BarrierState::Called => {
                let asked = |state| self.note_barrier(state).map_err(|error| error.to_string());
                asked(BarrierState::Asked)
                    .and_then(|()| {
                        last_barrier().map_err(|error| host::error::os_text(&error).to_string())
                    })
                    .and_then(|()| asked(BarrierState::Succeeded))
            }
        };
        if let Err(why) = result {
            log::error!("no write is accepted until the overlay is opened again: {why}");
            self.latch();
        }
    }

    /// Repeats the changes of a journal in memory.
    fn repeat(&self, changes: &[MappingChange], reserved: &Range<u64>) -> Result<()> {
        let pieces = last_changes(changes)?;
        let mut named: Vec<Range<u64>> = Vec::new();
        for piece in &pieces {
            named.extend(self.hosts_of(piece)?);
        }
        named.sort_by_key(|hosts| hosts.start);
        if named.windows(2).any(|pair| pair[0].end > pair[1].start) {
            return Err(unfit("names a host cluster twice"));
        }
        if !without(Step::NamedClustersAreClaimed) {
            self.allocator.claim(&named)?;
        }
        self.allocator.adopt_reserved(reserved)?;
        for piece in &pieces {
            self.repeat_one(piece, &named)?;
        }
        Ok(())
    }

    /// Returns the host clusters that a change names, after checks of its entries.
    fn hosts_of(&self, change: &MappingChange) -> Result<Option<Range<u64>>> {
        let geometry = self.reader.geometry();
        let last = change
            .start
            .0
            .checked_add(u64::from(change.count).saturating_sub(1))
            .ok_or_else(|| unfit("names clusters beyond any disk"))?;
        if geometry.table_indexes(GuestCluster(last)).0 >= self.reader.tables.l1_len() {
            return Err(unfit("names clusters beyond the end of the disk"));
        }
        let host_of = |raw| -> Result<Option<u64>> {
            match L2Entry::decode(raw, &geometry)? {
                L2Entry::Standard { host: None, .. } => Ok(None),
                L2Entry::Standard { host: Some((host, true)), .. } => Ok(Some(host.0)),
                // The entry on disk names this cluster already, and so it is counted: see
                // [`Image::repeat_one`].
                L2Entry::Standard { host: Some((_, false)), .. } if geometry.has_extended_l2() => {
                    Ok(None)
                }
                _ => Err(unfit("has an entry that this program does not make")),
            }
        };
        let end = host_of(change.entry_of(change.count - 1))?;
        match (host_of(change.entry_of(0))?, end) {
            (None, None) => Ok(None),
            (Some(first), Some(last))
                if last.checked_sub(first) == Some(u64::from(change.count) - 1)
                    && geometry.host_offset(HostCluster(last)).0 < self.storage.size() =>
            {
                Ok(Some(first..last + 1))
            }
            _ => Err(unfit("names host clusters that the file does not have")),
        }
    }

    /// Sets the entries of a change. `named` are the host clusters of all changes, in order.
    fn repeat_one(&self, change: &MappingChange, named: &[Range<u64>]) -> Result<()> {
        let geometry = self.reader.geometry();
        let mut index = 0;
        while index < change.count {
            let at = GuestCluster(change.start.0 + u64::from(index));
            let (l1_index, l2_index) = geometry.table_indexes(at);
            let in_table = geometry.l2_entries() - l2_index as u64;
            let count = u64::from(change.count - index).min(in_table) as u32;
            let mut replaced = Vec::new();
            self.reader.tables.change(l1_index, |set| {
                for one in 0..count {
                    let entry = change.entry_of(index + one);
                    replaced.push((set(l2_index + one as usize, entry), entry));
                }
            })?;
            for (before, after) in replaced {
                let before = L2Entry::decode(before, &geometry)?;
                let after = L2Entry::decode(after, &geometry)?;
                // A cluster that other entries may name only stays where it is.
                if let Some((host, false)) = after.host()
                    && before.host().is_none_or(|(before, _)| before != host)
                {
                    return Err(unfit("uses a cluster that others use"));
                }
                if let Some((start, len)) = released(before, after, &geometry) {
                    let next = named.partition_point(|hosts| hosts.end <= start.0);
                    if named.get(next).is_some_and(|hosts| hosts.start < start.0 + len) {
                        return Err(unfit("uses a cluster that the file still needs"));
                    }
                    self.allocator.queue_free(start, len);
                }
            }
            index += count;
        }
        Ok(())
    }
}

/// Returns the last change of each guest cluster, as pieces of the changes that do not overlap.
fn last_changes(changes: &[MappingChange]) -> Result<Vec<MappingChange>> {
    let mut pieces = Vec::new();
    // The clusters that later changes cover: start and end of each run; no two runs touch.
    let mut covered: BTreeMap<u64, u64> = BTreeMap::new();
    let in_order: Box<dyn Iterator<Item = &MappingChange>> = if without(Step::LastChangeWins) {
        Box::new(changes.iter())
    } else {
        Box::new(changes.iter().rev())
    };
    for change in in_order {
        let end = change.start.0.checked_add(u64::from(change.count));
        let Some(end) = end.filter(|_| change.count > 0) else {
            return Err(unfit("has a record of no cluster"));
        };
        let mut at = change.start.0;
        while at < end {
            if let Some((_, &stop)) = covered.range(..=at).next_back()
                && stop > at
            {
                at = stop;
                continue;
            }
            let stop = covered.range(at..end).next().map_or(end, |(&start, _)| start);
            let skipped = (at - change.start.0) as u32;
            pieces.push(MappingChange {
                start: GuestCluster(at),
                count: (stop - at) as u32,
                entry: change.entry_of(skipped).descriptor,
                bitmap: change.bitmap,
                step: change.step,
            });
            at = stop;
        }
        cover(&mut covered, change.start.0..end);
    }
    Ok(pieces)
}

/// Adds a run to a set of runs, and joins the runs that it touches.
fn cover(covered: &mut BTreeMap<u64, u64>, run: Range<u64>) {
    let (mut start, mut end) = (run.start, run.end);
    while let Some((&first, &stop)) = covered.range(..=end).next_back() {
        if stop < start {
            break;
        }
        covered.remove(&first);
        start = start.min(first);
        end = end.max(stop);
    }
    covered.insert(start, end);
}

fn unfit(what: &str) -> Error {
    Error::new(ErrorKind::Corrupt, format!("the journal {what}: it is not that of this image"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use sim::random::Random;

    /// Protects: P17. A change is split where later ones cover it, and each cluster gets its last
    /// entry: compared with a map of all clusters, for random changes.
    #[test]
    fn the_last_change_of_each_cluster_counts() {
        let mut random = Random::of_test(5);
        for _ in 0..200 {
            let changes: Vec<_> = (0..random.below(12))
                .map(|number| MappingChange {
                    start: GuestCluster(random.below(40)),
                    count: 1 + random.below(12) as u32,
                    entry: 1000 * (number + 1),
                    bitmap: number,
                    step: random.below(2),
                })
                .collect();
            let mut expected = BTreeMap::new();
            for change in &changes {
                for index in 0..change.count {
                    expected.insert(change.start.0 + u64::from(index), change.entry_of(index));
                }
            }
            let mut found = BTreeMap::new();
            for piece in last_changes(&changes).unwrap() {
                for index in 0..piece.count {
                    let at = piece.start.0 + u64::from(index);
                    assert!(found.insert(at, piece.entry_of(index)).is_none(), "{changes:?}");
                }
            }
            assert_eq!(found, expected, "{changes:?}");
        }
    }
}
