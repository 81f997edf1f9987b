//! Checks the tables that the header points to: they lie inside the file, and none overlaps another
//! (V9 to V14, V18, V21).

use std::ops::Range;

use super::extensions::check_bitmaps;
use super::{FormatError, Header, Places, feature, invalid};

/// Largest refcount table, in bytes (V9; QEMU: QCOW_MAX_REFTABLE_SIZE).
pub(super) const MAX_REFCOUNT_TABLE: u64 = 8 << 20;
/// Largest L1 table, in bytes (V11; QEMU: QCOW_MAX_L1_SIZE).
pub(super) const MAX_L1_TABLE: u64 = 32 << 20;
/// Most internal snapshots (V14; QEMU: QCOW_MAX_SNAPSHOTS).
const MAX_SNAPSHOTS: u32 = 65536;
/// Size of the smallest entry of the snapshot table, in bytes.
const MIN_SNAPSHOT_ENTRY: u64 = 40;

impl Header {
    /// Checks the tables that the header names (V9 to V14, V18, V21). `size` is the virtual size
    /// before rounding, in bytes.
    pub(super) fn check_tables(
        &self,
        size: u64,
        snapshots_offset: u64,
        bitmaps: Option<&[u8]>,
        places: Places,
    ) -> Result<(), FormatError> {
        let cluster_size = self.geometry.cluster_size();
        let bounds = match places {
            Places::Readable(file_size)
                if self.l1_size != 0 && self.l1_table_offset >= file_size =>
            {
                return invalid(format!(
                    "L1 table at {:#x} is not inside the file of {file_size} bytes",
                    self.l1_table_offset
                ));
            }
            Places::Readable(_) => cluster_size..i64::MAX as u64,
            Places::Inside(file_size) => match file_size
                .checked_next_multiple_of(cluster_size)
                .filter(|&end| end <= i64::MAX as u64)
            {
                Some(file_end) => cluster_size..file_end,
                None => return invalid(format!("file of {file_size} bytes is too large")),
            },
            Places::Anywhere => 0..i64::MAX as u64,
        };
        let for_writing = matches!(places, Places::Inside(_));
        let table = |name: &'static str, offset: u64, len: u64| {
            HeaderTable::checked(name, offset, len, cluster_size, &bounds)
        };
        let mut tables = vec![HeaderTable { name: "header", range: 0..cluster_size }];

        if self.refcount_table_clusters == 0 && for_writing {
            return invalid("refcount_table_clusters is 0".into());
        }
        let len = u64::from(self.refcount_table_clusters) * cluster_size;
        if len > MAX_REFCOUNT_TABLE {
            return invalid(format!(
                "refcount table of {} clusters is larger than 8 MiB",
                self.refcount_table_clusters
            ));
        }
        tables.push(table("refcount table", self.refcount_table_offset, len)?);

        let len = u64::from(self.l1_size) * 8;
        if len > MAX_L1_TABLE {
            return invalid(format!("l1_size is {}, larger than 32 MiB of entries", self.l1_size));
        }
        let needed = self.geometry.resized(size)?.l1_entries_needed();
        if u64::from(self.l1_size) < needed {
            return invalid(format!(
                "l1_size is {}, too small for {size} bytes, which need {needed}",
                self.l1_size
            ));
        }
        if self.l1_size != 0 {
            tables.push(table("L1 table", self.l1_table_offset, len)?);
        }

        if self.nb_snapshots > MAX_SNAPSHOTS {
            return invalid(format!(
                "nb_snapshots is {}, more than {MAX_SNAPSHOTS}",
                self.nb_snapshots
            ));
        }
        if !snapshots_offset.is_multiple_of(cluster_size) {
            return invalid(format!(
                "snapshots_offset {snapshots_offset:#x} is not at a cluster boundary"
            ));
        }
        if self.nb_snapshots != 0 {
            tables.push(table(
                "snapshot table",
                snapshots_offset,
                u64::from(self.nb_snapshots) * MIN_SNAPSHOT_ENTRY,
            )?);
        }
        // Without the autoclear bit the bitmaps extension is stale by definition, and none of it is
        // used.
        if let (Some(payload), true) = (bitmaps, self.autoclear & feature::AUTOCLEAR_BITMAPS != 0) {
            let directory = check_bitmaps(payload)?;
            tables.push(table(
                "bitmap directory",
                directory.start,
                directory.end - directory.start,
            )?);
        }
        if for_writing { check_overlaps(&tables) } else { Ok(()) }
    }
}

/// A table that the header points to, rounded up to whole clusters.
struct HeaderTable {
    name: &'static str,
    range: Range<u64>,
}

impl HeaderTable {
    /// Checks that a table is aligned, starts inside `bounds` and ends inside the file (V10, V12).
    fn checked(
        name: &'static str,
        offset: u64,
        len: u64,
        cluster_size: u64,
        bounds: &Range<u64>,
    ) -> Result<HeaderTable, FormatError> {
        if offset < bounds.start || !offset.is_multiple_of(cluster_size) {
            return invalid(format!(
                "{name} at {offset:#x} is not at a cluster boundary behind the header"
            ));
        }
        let end =
            offset.checked_add(len).and_then(|end| end.checked_next_multiple_of(cluster_size));
        match end {
            Some(end) if end <= bounds.end => Ok(HeaderTable { name, range: offset..end }),
            _ => invalid(format!("{name} at {offset:#x} ({len} bytes) is not inside the file")),
        }
    }
}

/// Checks that no two tables overlap (V21).
fn check_overlaps(tables: &[HeaderTable]) -> Result<(), FormatError> {
    for (index, a) in tables.iter().enumerate() {
        for b in &tables[index + 1..] {
            if a.range.start < b.range.end && b.range.start < a.range.end {
                return invalid(format!(
                    "{} at {:#x} overlaps the {} at {:#x}",
                    b.name, b.range.start, a.name, a.range.start
                ));
            }
        }
    }
    Ok(())
}
