//! The full check (V28): counts every reference and holds the refcounts against them, as `qemu-img check` does.

use std::collections::HashMap;
use std::sync::atomic::Ordering;

use super::Image;
use crate::format::{HostCluster, L1Entry, Mapping};
use crate::{ErrorKind, Result};

/// What a full check found. Words as in `qemu-img check`.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct CheckReport {
    /// Clusters with fewer counted than actual references, or with a wrong COPIED flag: writing may destroy data.
    pub corruptions: u64,
    /// Clusters with more counted than actual references: lost space, nothing else. Not counted where there are corruptions: what a table
    /// that cannot be used refers to is not known.
    pub leaks: u64,
}

impl Image {
    /// Walks all tables. Takes as long as reading them, and memory for every cluster in use; both are bounded by the file, not by the virtual
    /// size (V29). To be called before the first change.
    ///
    /// # Errors
    /// I/O.
    pub fn check(&self) -> Result<CheckReport> {
        let geometry = self.reader.geometry();
        let cluster_size = geometry.cluster_size();
        let header = self.reader.header();
        let mut report = CheckReport::default();
        let mut references: HashMap<u64, u64> = HashMap::new();
        let mut count =
            |first: u64, clusters: u64| (first..first + clusters).for_each(|cluster| *references.entry(cluster).or_default() += 1);
        count(0, 1);
        count(header.l1_table_offset / cluster_size, (u64::from(header.l1_size) * 8).div_ceil(cluster_size));
        count(header.refcount_table_offset / cluster_size, u64::from(header.refcount_table_clusters));
        for block in self.allocator.blocks() {
            count(block.0, 1);
        }
        // Clusters that say of themselves that they are referenced once.
        let mut copied: Vec<u64> = Vec::new();
        for l1_index in 0..self.reader.tables.l1_len() {
            let Some(entry) = L1Entry::decode(self.reader.tables.l1_entry(l1_index), &geometry)? else { continue };
            count(entry.table.0, 1);
            if entry.in_place {
                copied.push(entry.table.0);
            }
            let walked = self.reader.tables.with(l1_index, |table| -> Result<()> {
                for index in 0..geometry.l2_entries() as usize {
                    match Mapping::decode(table.entry(index).load(Ordering::Acquire), &geometry)? {
                        Mapping::Unallocated | Mapping::Zero { reserved: None } => {}
                        Mapping::Data { host, in_place } | Mapping::Zero { reserved: Some((host, in_place)) } => {
                            count(host.0, 1);
                            if in_place {
                                copied.push(host.0);
                            }
                        }
                        Mapping::Compressed { at, len } => {
                            let first = at.0 / cluster_size;
                            count(first, (at.0 + u64::from(len) - 1) / cluster_size - first + 1);
                        }
                    }
                }
                Ok(())
            });
            match walked.and_then(|walked| walked.unwrap_or(Ok(()))) {
                // The checks on load have refused the table.
                Err(error) if error.kind() == ErrorKind::Corrupt => report.corruptions += 1,
                other => other?,
            }
        }
        for (&cluster, &actual) in &references {
            match self.allocator.refcount(HostCluster(cluster))? {
                counted if counted < actual => report.corruptions += 1,
                counted if counted > actual => report.leaks += 1,
                _ => {}
            }
        }
        report.corruptions += copied.iter().filter(|cluster| references[*cluster] != 1).count() as u64;
        if report.corruptions > 0 {
            return Ok(CheckReport { leaks: 0, ..report });
        }
        report.leaks += self.allocator.counted()?.iter().filter(|cluster| !references.contains_key(*cluster)).count() as u64;
        Ok(report)
    }
}
