//! Watches every write to an image: data is never written over a table, and a table never over data
//! (R16).

use std::collections::BTreeSet;
use std::ops::RangeInclusive;

use host::storage::WriteKind;
use sim::Observer;
use sim::spec::Layout;

/// A copy of the file, and the use of each cluster according to the file and to the writes since.
pub(super) struct Watch {
    disk: Vec<u8>,
    bits: u32,
    /// Clusters of the tables that the file names, including the header.
    named: BTreeSet<u64>,
    /// Clusters to which tables were written since they were last punched.
    tables: BTreeSet<u64>,
    /// Clusters to which data was written since they were last punched.
    data: BTreeSet<u64>,
}

impl Watch {
    /// Creates a watch of an image; `None` if it has no header.
    pub fn new(disk: Vec<u8>) -> Option<Watch> {
        let layout = Layout::rough(&disk)?;
        let (bits, named) = (layout.cluster_bits, layout.metadata(&disk));
        Some(Watch { disk, bits, named, tables: BTreeSet::new(), data: BTreeSet::new() })
    }

    fn clusters(&self, at: u64, len: u64) -> RangeInclusive<u64> {
        at >> self.bits..=(at + len.max(1) - 1) >> self.bits
    }

    fn look_again(&mut self) {
        self.named = Layout::rough(&self.disk)
            .expect("the engine keeps the header readable")
            .metadata(&self.disk);
    }
}

impl Observer for Watch {
    fn write(&mut self, kind: WriteKind, at: u64, data: &[u8]) {
        for cluster in self.clusters(at, data.len() as u64) {
            match kind {
                WriteKind::Header => assert!(cluster == 0, "R16: the header is written at {at:#x}"),
                WriteKind::Data | WriteKind::NewCluster => {
                    assert!(
                        !self.named.contains(&cluster),
                        "R16: {kind:?} at {at:#x} overwrites a table that the file names"
                    );
                    assert!(
                        !self.tables.contains(&cluster),
                        "R16: {kind:?} at {at:#x} overwrites a new table"
                    );
                    self.data.insert(cluster);
                }
                WriteKind::RefcountTable
                | WriteKind::RefcountBlock
                | WriteKind::L1Table
                | WriteKind::L2Table => {
                    assert!(cluster != 0, "R16: {kind:?} at {at:#x} overwrites the header");
                    assert!(
                        !self.data.contains(&cluster),
                        "R16: {kind:?} at {at:#x} overwrites data"
                    );
                    self.tables.insert(cluster);
                }
            }
        }
        let (start, end) = (at as usize, at as usize + data.len());
        self.disk.resize(self.disk.len().max(end), 0);
        self.disk[start..end].copy_from_slice(data);
        if matches!(kind, WriteKind::Header | WriteKind::RefcountTable | WriteKind::L1Table) {
            self.look_again();
        }
    }

    fn punch(&mut self, at: u64, len: u64) {
        for cluster in self.clusters(at, len) {
            assert!(
                !self.named.contains(&cluster),
                "R16: a table that the file names, at cluster {cluster}, becomes a hole"
            );
            self.tables.remove(&cluster);
            self.data.remove(&cluster);
        }
        let end = self.disk.len().min((at + len) as usize);
        self.disk[(at as usize).min(end)..end].fill(0);
    }

    fn sync_began(&mut self) -> u64 {
        0
    }

    fn sync_ended(&mut self, _number: u64) {}
}

#[cfg(test)]
mod tests {
    use super::super::template::{Kind, Shape, build};
    use super::*;

    fn watch() -> Watch {
        let shape = Shape {
            version: 3,
            bits: 9,
            order: 4,
            zstd: false,
            extended: false,
            size: 1024,
            l1_slack: 0,
            backing: None,
        };
        // The clusters in order: header, refcount table, L1 table, data, data, L2 table, refcount
        // block.
        Watch::new(build(&shape, &[Kind::Data(1), Kind::Data(2)], [0, 0])).unwrap()
    }

    #[test]
    fn what_belongs_to_the_guest_may_be_written() {
        let mut watch = watch();
        watch.write(WriteKind::Data, 3 * 512 + 7, &[1; 600]);
        watch.write(WriteKind::Header, 24, &[0, 0, 0, 0, 0, 0, 2, 0]);
        watch.write(WriteKind::L2Table, 5 * 512, &[0; 512]);
        watch.write(WriteKind::NewCluster, 7 * 512, &[1; 512]);
        watch.punch(7 * 512, 512);
        watch.write(WriteKind::L2Table, 7 * 512, &[0; 512]);
    }

    #[test]
    fn what_does_not_may_not() {
        let wrongs: [fn(&mut Watch); 6] = [
            |watch| watch.write(WriteKind::Data, 5 * 512 - 1, &[1; 2]),
            |watch| watch.write(WriteKind::NewCluster, 0, &[1; 512]),
            |watch| watch.write(WriteKind::Header, 510, &[1; 3]),
            |watch| watch.punch(4 * 512, 2048),
            |watch| {
                watch.write(WriteKind::Data, 3 * 512, &[1; 1]);
                watch.write(WriteKind::L2Table, 3 * 512, &[1; 8]);
            },
            |watch| {
                watch.write(WriteKind::L2Table, 8 * 512, &[1; 8]);
                watch.write(WriteKind::Data, 8 * 512, &[1; 8]);
            },
        ];
        for (index, wrong) in wrongs.into_iter().enumerate() {
            let result = std::panic::catch_unwind(move || wrong(&mut watch()));
            let panic = result.expect_err("seen").downcast::<String>().unwrap();
            assert!(panic.contains("R16"), "{index}: {panic}");
        }
    }
}
