//! The partitions of a disk: GPT, MBR with logical partitions, or none.

use std::io::{Seek, SeekFrom};
use std::ops::Range;

use gptman::{GPTHeader, GPTPartitionEntry};

use crate::bytes::{le16, le32};
use crate::disk::{Cursor, Disk};
use crate::failure::{Failure, Step};

/// Partition entries of a GPT that are looked at. A table has 128; Linux makes nodes for 256.
const MOST_ENTRIES: u32 = 1024;
/// Logical partitions that are looked at; Linux stops at 256 minor numbers.
const MOST_LOGICAL: usize = 256;
/// Bytes of a sector of an MBR. Disks of 4096 bytes per sector have a GPT in practice.
const SECTOR: u64 = 512;

/// An EFI system partition, as its GUID is stored.
const EFI_SYSTEM: [u8; 16] = [
    0x28, 0x73, 0x2a, 0xc1, 0x1f, 0xf8, 0xd2, 0x11, 0xba, 0x4b, 0x00, 0xa0, 0xc9, 0x3e, 0xc9, 0x3b,
];
/// A BIOS boot partition, where GRUB has its core: "Hah!IdontNeedEFI".
const BIOS_BOOT: [u8; 16] = *b"Hah!IdontNeedEFI";

/// What the table says that a partition is for.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Purpose {
    /// EFI system partition.
    Efi,
    /// BIOS boot partition: the core of a boot loader without a file system.
    BiosBoot,
    /// Anything else.
    Other,
}

/// One partition.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(crate) struct Partition {
    /// Number as Linux counts: logical ones begin at 5. 0: the whole disk.
    pub(crate) number: u32,
    /// Bytes of the disk.
    pub(crate) range: Range<u64>,
    pub(crate) purpose: Purpose,
}

/// The partitions of a disk.
#[derive(Debug, Default)]
pub(crate) struct Table {
    /// What kind of table it is, for a note.
    pub(crate) kind: &'static str,
    pub(crate) partitions: Vec<Partition>,
    /// Bytes of the disk with the table itself, in the order in which a boot reads them.
    pub(crate) metadata: Vec<Range<u64>>,
}

/// Reads the table of a disk.
pub(crate) fn partitions(disk: &mut Disk, notes: &mut Vec<String>) -> Step<Table> {
    let size = disk.size();
    let mut boot_sector = [0; SECTOR as usize];
    if size < SECTOR {
        return Ok(whole(size));
    }
    disk.read(0, &mut boot_sector)?;
    if le16(&boot_sector, 510) != Some(0xaa55) {
        return Ok(whole(size));
    }
    let entries: Vec<Entry> = (0..4).filter_map(|index| entry(&boot_sector, index)).collect();
    if entries.iter().any(|entry| entry.kind == 0xee) {
        for sector_size in [512, 4096] {
            match gpt(disk, sector_size) {
                Ok(table) => return Ok(table),
                Err(Failure::Damaged(_) | Failure::Absent) => {}
                Err(failure) => return Err(failure),
            }
        }
        notes.push("the disk has a protective MBR, and no GPT that can be read".to_owned());
    }
    // The boot sector of a file system on the whole disk has 55 AA at its end as well.
    let plausible = entries.iter().any(|entry| {
        entry.sectors > 0 && entry.kind != 0 && entry.kind != 0xee && entry.status & 0x7f == 0
    });
    if plausible { mbr(disk, &boot_sector, notes) } else { Ok(whole(size)) }
}

fn whole(size: u64) -> Table {
    let all = Partition { number: 0, range: 0..size, purpose: Purpose::Other };
    Table { kind: "no partition table", partitions: vec![all], metadata: Vec::new() }
}

/// The fields of an entry of an MBR that matter here.
#[derive(Clone, Copy, Debug)]
struct Entry {
    status: u8,
    kind: u8,
    first: u32,
    sectors: u32,
}

impl Entry {
    fn is_extended(self) -> bool {
        matches!(self.kind, 0x05 | 0x0f | 0x85)
    }
}

fn entry(sector: &[u8], index: usize) -> Option<Entry> {
    let at = 446 + 16 * index;
    Some(Entry {
        status: *sector.get(at)?,
        kind: *sector.get(at + 4)?,
        first: le32(sector, at + 8)?,
        sectors: le32(sector, at + 12)?,
    })
}

/// The bytes of `sectors` from `first` on, as far as they are on the disk.
fn bytes(first: u64, sectors: u64, sector_size: u64, size: u64) -> Option<Range<u64>> {
    let start = first.checked_mul(sector_size)?;
    let end = first.checked_add(sectors)?.checked_mul(sector_size)?.min(size);
    (start < end).then_some(start..end)
}

fn mbr(disk: &mut Disk, boot_sector: &[u8], notes: &mut Vec<String>) -> Step<Table> {
    let size = disk.size();
    let mut table = Table { kind: "MBR", ..Table::default() };
    let mut extended = None;
    for index in 0..4 {
        let Some(entry) = entry(boot_sector, index) else { continue };
        if entry.kind == 0 || entry.kind == 0xee {
            continue;
        }
        let Some(range) = bytes(entry.first.into(), entry.sectors.into(), SECTOR, size) else {
            notes.push(format!("partition {} lies behind the end of the disk", index + 1));
            continue;
        };
        if entry.is_extended() {
            extended.get_or_insert(range);
        } else {
            let purpose = if entry.kind == 0xef { Purpose::Efi } else { Purpose::Other };
            let number = u32::try_from(index + 1).unwrap_or_default();
            table.partitions.push(Partition { number, range, purpose });
        }
    }
    if let Some(extended) = extended {
        logical(disk, &extended, &mut table, notes)?;
    }
    Ok(table)
}

/// Follows the chain of extended boot records. The first entry of each is a partition, relative to
/// the record; the second is the next record, relative to the extended partition.
fn logical(
    disk: &mut Disk,
    extended: &Range<u64>,
    table: &mut Table,
    notes: &mut Vec<String>,
) -> Step<()> {
    let mut record = extended.start;
    for index in 0..MOST_LOGICAL {
        let mut sector = [0; SECTOR as usize];
        disk.read(record, &mut sector)?;
        if le16(&sector, 510) != Some(0xaa55) {
            break;
        }
        table.metadata.push(record..record.saturating_add(SECTOR));
        if let Some(entry) = entry(&sector, 0)
            && entry.kind != 0
            && let Some(range) = bytes(
                record / SECTOR + u64::from(entry.first),
                entry.sectors.into(),
                SECTOR,
                extended.end,
            )
        {
            let number = u32::try_from(index + 5).unwrap_or_default();
            table.partitions.push(Partition { number, range, purpose: Purpose::Other });
        }
        let next = entry(&sector, 1).filter(|next| next.is_extended() && next.sectors > 0);
        let Some(next) = next else { break };
        let next = extended.start.saturating_add(u64::from(next.first) * SECTOR);
        // A chain that does not go up could have no end.
        if next <= record || next >= extended.end {
            notes.push("the chain of logical partitions is damaged".to_owned());
            break;
        }
        record = next;
    }
    Ok(())
}

fn gpt(disk: &mut Disk, sector_size: u64) -> Step<Table> {
    let size = disk.size();
    let last = (size / sector_size).saturating_sub(1);
    let (header, entries) = match gpt_at(disk, sector_size, 1) {
        Err(Failure::Damaged(_) | Failure::Absent) => gpt_at(disk, sector_size, last)?,
        found => found?,
    };
    let mut table = Table { kind: "GPT", ..Table::default() };
    // Linux reads both headers and both tables.
    let array = u64::from(header.number_of_partition_entries)
        .saturating_mul(header.size_of_partition_entry.into())
        .div_ceil(sector_size);
    table.metadata.extend(bytes(0, array.saturating_add(2), sector_size, size));
    let backup = last.saturating_sub(array);
    table.metadata.extend(bytes(backup, array.saturating_add(1), sector_size, size));
    for (number, entry) in (1..).zip(entries) {
        let sectors = entry.ending_lba.checked_sub(entry.starting_lba);
        let sectors = sectors.and_then(|sectors| sectors.checked_add(1));
        let range =
            sectors.and_then(|sectors| bytes(entry.starting_lba, sectors, sector_size, size));
        if let Some(range) = range.filter(|_| entry.is_used()) {
            let purpose = match entry.partition_type_guid {
                EFI_SYSTEM => Purpose::Efi,
                BIOS_BOOT => Purpose::BiosBoot,
                _ => Purpose::Other,
            };
            table.partitions.push(Partition { number, range, purpose });
        }
    }
    Ok(table)
}

/// Reads one of the two headers and its entries. What is checked here before `gptman` reads the
/// entries: it allocates as many as the header names, and multiplies sectors without a check.
fn gpt_at(
    disk: &mut Disk,
    sector_size: u64,
    sector: u64,
) -> Step<(GPTHeader, Vec<GPTPartitionEntry>)> {
    let size = disk.size();
    let mut cursor = Cursor { disk, at: 0 };
    let damaged = |what: &dyn std::fmt::Display| Failure::damaged(format!("GPT: {what}"));
    let at = sector.checked_mul(sector_size).ok_or_else(|| damaged(&"it ends too early"))?;
    cursor.seek(SeekFrom::Start(at)).map_err(|error| damaged(&error))?;
    let header = GPTHeader::read_from(&mut cursor).map_err(|error| damaged(&error))?;
    let array = u64::from(header.number_of_partition_entries)
        .checked_mul(header.size_of_partition_entry.into())
        .and_then(|len| header.partition_entry_lba.checked_mul(sector_size)?.checked_add(len));
    if header.number_of_partition_entries > MOST_ENTRIES
        || !(128..=4096).contains(&header.size_of_partition_entry)
        || array.is_none_or(|end| end > size)
    {
        return Err(damaged(&"its header describes a table that cannot be"));
    }
    let entries =
        header.read_partitions(&mut cursor, sector_size).map_err(|error| damaged(&error))?;
    Ok((header, entries))
}
