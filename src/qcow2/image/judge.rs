//! Checks the entries of an L2 table when it is loaded (V24 to V27, V30).
//!
//! A table has thousands of entries, and the whole table is checked before the first of them is
//! used. The check therefore begins with all clusters that the table names, as runs of clusters
//! that follow each other in the file. Only if refcounts or metadata contradict one of them are all
//! entries checked one by one, to find which ones are bad.

use std::ops::Range;

use super::allocator::{Allocator, NamedRun, Unreadable};
use super::judged::Judged;
use super::tables::{OUTSIDE, corrupt};
use crate::format::{Geometry, HostCluster, L2Entry, RawL2Entry, raw_entries};
use host::{ErrorKind, Result};

/// Checks the entries of a table, given as the words that were read from disk. Returns the bad
/// ones, if any. For a backing file (without an allocator) it checks only what reading needs.
/// `size` is the size of the file in bytes.
pub(super) fn judge(
    words: &[u64],
    geometry: &Geometry,
    size: u64,
    allocator: Option<&Allocator>,
) -> Option<Box<Judged>> {
    let count = words.len() / geometry.l2_entry_words();
    let mut judged: Option<Box<Judged>> = None;
    let new = || Box::new(Judged::new(count));
    let mut runs: Vec<NamedRun> = Vec::new();
    let mut lost_its_end = false;
    let mut before = RawL2Entry::default();
    let end_of_file = size.div_ceil(geometry.cluster_size());
    for (index, raw) in raw_entries(words, geometry).enumerate() {
        let last = runs.last_mut().filter(|run| run.clusters.end < end_of_file);
        // Clusters that were written in order have such entries, and nearly all tables have many.
        if let Some(run) = last
            && raw.is_next_of(before, geometry)
        {
            run.clusters.end += 1;
            before = raw;
            continue;
        }
        match referenced(raw, geometry, size) {
            Ok((clusters, _)) if clusters.is_empty() => {}
            Ok((clusters, in_place)) => {
                runs.push(NamedRun { clusters, in_place });
                before = raw;
            }
            Err(error) => {
                lost_its_end |= raw.descriptor == OUTSIDE || L2Entry::decode(raw, geometry).is_ok();
                judged
                    .get_or_insert_with(new)
                    .set_bad(index, &error.context(format!("index {index}")));
            }
        }
    }
    // A file may end inside its last cluster, and the rest of that cluster reads as zeros. A file
    // that has lost whole clusters has lost that rest as well, so zeros would be wrong there.
    if lost_its_end {
        for (index, raw) in raw_entries(words, geometry).enumerate() {
            if let Ok(entry) = L2Entry::decode(raw, geometry)
                && let L2Entry::Standard { host: Some((host, _)), allocated, .. } = entry
                && size.saturating_sub(geometry.host_offset(host).0)
                    < u64::from(u32::BITS - allocated.leading_zeros()) << geometry.subcluster_bits()
            {
                let error = corrupt(format!(
                    "index {index}: the file ends inside the cluster at {}",
                    geometry.host_offset(host)
                ));
                judged.get_or_insert_with(new).set_bad(index, &error);
            }
        }
    }
    let Some(allocator) = allocator else { return judged };
    let unreadable = match allocator.check_runs(&runs) {
        Ok(true) => return judged,
        Ok(false) => None,
        Err(Unreadable { block }) => Some(block),
    };
    judge_each(words, geometry, size, allocator, unreadable, judged.get_or_insert_with(new));
    judged
}

/// Checks the cluster of each entry against refcounts and metadata, one by one. `unreadable` is the
/// index of the first refcount block that cannot be read, if one is known.
fn judge_each(
    words: &[u64],
    geometry: &Geometry,
    size: u64,
    allocator: &Allocator,
    mut unreadable: Option<u64>,
    judged: &mut Judged,
) {
    let mut named: Vec<(HostCluster, bool, usize)> = raw_entries(words, geometry)
        .enumerate()
        .filter_map(|(index, raw)| Some((index, referenced(raw, geometry, size).ok()?)))
        .flat_map(|(index, (clusters, in_place))| {
            clusters.map(move |cluster| (HostCluster(cluster), in_place, index))
        })
        .collect();
    // Sorted in the order of the file, so that each refcount block is loaded once, wherever the
    // entries point. A block that cannot be read is not tried again for every entry.
    named.sort_unstable();
    for (cluster, in_place, index) in named {
        let block = allocator.block_of(cluster);
        let checked = if unreadable == Some(block) {
            allocator.check_is_no_metadata(cluster)
        } else {
            allocator.check_data(cluster, in_place)
        };
        match checked {
            Ok(()) if unreadable != Some(block) => {}
            Err(error) if error.kind() == ErrorKind::Corrupt => {
                judged.set_bad(index, &error.context(format!("index {index}")));
            }
            Ok(()) | Err(_) => {
                unreadable = Some(block);
                judged.set_unproven(index);
            }
        }
    }
}

/// Returns the host clusters that an L2 entry names, and whether the entry says COPIED. `size` is
/// the size of the file in bytes.
pub(super) fn referenced(
    raw: RawL2Entry,
    geometry: &Geometry,
    size: u64,
) -> Result<(Range<u64>, bool)> {
    if raw.descriptor == OUTSIDE {
        return Err(corrupt("the entry is outside the file".into()));
    }
    match L2Entry::decode(raw, geometry)? {
        L2Entry::Standard { host: None, .. } => Ok((0..0, false)),
        L2Entry::Compressed { at, len } => {
            let end =
                at.0.checked_add(u64::from(len)).filter(|&end| end <= size.next_multiple_of(512));
            let Some(end) = end else {
                return Err(corrupt(format!("compressed cluster at {at} is outside the file")));
            };
            Ok((geometry.host_cluster(at).0..((end - 1) >> geometry.cluster_bits()) + 1, false))
        }
        L2Entry::Standard { host: Some((host, in_place)), .. } => {
            if geometry.host_offset(host).0 >= size {
                return Err(corrupt(format!(
                    "cluster at {} is outside the file",
                    geometry.host_offset(host)
                )));
            }
            Ok((host.0..host.0 + 1, in_place))
        }
    }
}
