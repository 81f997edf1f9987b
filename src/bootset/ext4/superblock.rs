//! The superblock, and where group descriptors are.

use std::ops::Range;

use crate::bytes::{join, le16, le32};
use crate::disk::Disk;
use crate::failure::{Failure, Step};

const INCOMPAT_RECOVER: u32 = 0x4;
const INCOMPAT_META_BG: u32 = 0x10;
const INCOMPAT_64BIT: u32 = 0x80;
/// FILETYPE, RECOVER, META_BG, EXTENTS, 64BIT, MMP, FLEX_BG, EA_INODE, CSUM_SEED, LARGEDIR,
/// INLINE_DATA, ENCRYPT, CASEFOLD.
const INCOMPAT_KNOWN: u32 = 0x3_e7d6;
const RO_COMPAT_SPARSE_SUPER: u32 = 0x1;
const COMPAT_HAS_JOURNAL: u32 = 0x4;
const COMPAT_SPARSE_SUPER2: u32 = 0x200;

/// The fields of the superblock that the walk needs, checked.
#[derive(Clone, Debug)]
pub(crate) struct Superblock {
    /// Bytes of a block: 1024 to 65536.
    pub(crate) block_size: u64,
    /// Blocks of the file system, or of the partition if that has fewer.
    pub(crate) blocks: u64,
    pub(crate) label: String,
    /// Whether the journal has to be replayed.
    pub(crate) needs_recovery: bool,
    /// Inode of the journal, if it is in the file system.
    pub(crate) journal: Option<u32>,
    pub(super) inodes: u32,
    pub(super) inodes_per_group: u32,
    pub(super) inode_size: u64,
    pub(super) is_64bit: bool,
    first_data_block: u32,
    blocks_per_group: u32,
    descriptor_size: u64,
    first_meta_bg: Option<u32>,
    sparse: Sparse,
}

/// Which groups begin with a copy of the superblock.
#[derive(Clone, Copy, Debug)]
enum Sparse {
    All,
    Powers,
    Two([u32; 2]),
}

impl Superblock {
    /// Reads and checks the superblock of the file system in `range` of the disk.
    pub(super) fn read(disk: &mut Disk, range: &Range<u64>) -> Step<Superblock> {
        let mut bytes = [0; 1024];
        if range.end.saturating_sub(range.start) < 2048 {
            return Err(Failure::damaged("the partition is too small for a superblock"));
        }
        disk.read(range.start + 1024, &mut bytes)?;
        Superblock::parse(&bytes, range.end - range.start)?
            .ok_or_else(|| Failure::damaged("the superblock is damaged"))
    }

    /// `Ok(None)`: a field is out of its bounds.
    fn parse(bytes: &[u8], partition: u64) -> Step<Option<Superblock>> {
        let fields = || {
            let magic = le16(bytes, 0x38)?;
            let compat = le32(bytes, 0x5c)?;
            let incompat = le32(bytes, 0x60)?;
            Some((magic, compat, incompat, le32(bytes, 0x64)?))
        };
        let Some((magic, compat, incompat, ro_compat)) = fields() else { return Ok(None) };
        if magic != 0xef53 {
            return Ok(None);
        }
        // Revision 0 has none of these fields.
        let is_dynamic = le32(bytes, 0x4c) != Some(0);
        let unknown = incompat & !INCOMPAT_KNOWN;
        if is_dynamic && unknown != 0 {
            return Err(Failure::damaged(format!(
                "the file system has features that are not read here (incompatible {unknown:#x})"
            )));
        }
        let (compat, incompat, ro_compat) =
            if is_dynamic { (compat, incompat, ro_compat) } else { (0, 0, 0) };
        Ok(Superblock::fields(bytes, partition, is_dynamic, compat, incompat, ro_compat))
    }

    fn fields(
        bytes: &[u8],
        partition: u64,
        is_dynamic: bool,
        compat: u32,
        incompat: u32,
        ro_compat: u32,
    ) -> Option<Superblock> {
        let log_block_size = le32(bytes, 0x18).filter(|&log| log <= 6)?;
        let block_size = 1024_u64 << log_block_size;
        let is_64bit = incompat & INCOMPAT_64BIT != 0;
        let high = if is_64bit { le32(bytes, 0x150)? } else { 0 };
        let blocks = join(high, le32(bytes, 0x4)?).min(partition / block_size);
        let inode_size = if is_dynamic { le16(bytes, 0x58)?.into() } else { 128_u64 };
        let descriptor_size = match le16(bytes, 0xfe)? {
            size if is_64bit => u64::from(size),
            _ => 32,
        };
        let journal = le32(bytes, 0xe0).filter(|&journal| journal != 0);
        let sparse = if compat & COMPAT_SPARSE_SUPER2 != 0 {
            Sparse::Two([le32(bytes, 0x24c)?, le32(bytes, 0x250)?])
        } else if ro_compat & RO_COMPAT_SPARSE_SUPER != 0 {
            Sparse::Powers
        } else {
            Sparse::All
        };
        let meta_bg = incompat & INCOMPAT_META_BG != 0;
        let label = bytes.get(0x78..0x88)?.split(|&byte| byte == 0).next().unwrap_or_default();
        let is_valid =
            |size: u64, least: u64| size.is_power_of_two() && (least..=block_size).contains(&size);
        let superblock = Superblock {
            block_size,
            blocks,
            label: String::from_utf8_lossy(label).into_owned(),
            needs_recovery: incompat & INCOMPAT_RECOVER != 0,
            journal: journal.filter(|_| compat & COMPAT_HAS_JOURNAL != 0),
            inodes: le32(bytes, 0)?,
            inodes_per_group: le32(bytes, 0x28).filter(|&inodes| inodes > 0)?,
            inode_size,
            is_64bit,
            first_data_block: le32(bytes, 0x14).filter(|&first| first <= 1)?,
            blocks_per_group: le32(bytes, 0x20).filter(|&blocks| blocks > 0)?,
            descriptor_size,
            first_meta_bg: if meta_bg { Some(le32(bytes, 0x104)?) } else { None },
            sparse,
        };
        let least = if is_64bit { 64 } else { 32 };
        (is_valid(inode_size, 128) && is_valid(descriptor_size, least)).then_some(superblock)
    }

    /// Returns the number of groups.
    pub(crate) fn groups(&self) -> u64 {
        let blocks = self.blocks.saturating_sub(self.first_data_block.into());
        blocks.div_ceil(self.blocks_per_group.into())
    }

    /// Returns how many group descriptors a block has.
    pub(crate) fn descriptors_per_block(&self) -> u64 {
        self.block_size / self.descriptor_size.max(1)
    }

    /// Returns the offset in bytes of the descriptor of a group, within the file system.
    pub(super) fn descriptor(&self, group: u64) -> Option<(u64, usize)> {
        let per_block = self.descriptors_per_block().max(1);
        let index = group / per_block;
        let first: u64 = self.first_data_block.into();
        let block = match self.first_meta_bg {
            Some(first_meta) if index >= first_meta.into() => {
                let holder = index.checked_mul(per_block)?;
                let start = holder.checked_mul(self.blocks_per_group.into())?.checked_add(first)?;
                start.checked_add(u64::from(self.has_copy(holder)))?
            }
            _ => first.checked_add(1)?.checked_add(index)?,
        };
        let within = (group % per_block).checked_mul(self.descriptor_size)?;
        let size = usize::try_from(self.descriptor_size).ok()?;
        Some((block.checked_mul(self.block_size)?.checked_add(within)?, size))
    }

    /// Whether a group begins with a copy of the superblock.
    fn has_copy(&self, group: u64) -> bool {
        match self.sparse {
            Sparse::All => true,
            Sparse::Two(groups) => {
                group == 0 || groups.iter().any(|&copy| copy != 0 && u64::from(copy) == group)
            }
            Sparse::Powers => group <= 1 || [3, 5, 7].into_iter().any(|base| is_power(group, base)),
        }
    }
}

fn is_power(mut number: u64, base: u64) -> bool {
    while number > 1 && number.is_multiple_of(base) {
        number /= base;
    }
    number == 1
}

#[cfg(test)]
mod tests {
    use super::is_power;

    #[test]
    fn powers() {
        let powers: Vec<u64> =
            (1..130).filter(|&n| [3, 5, 7].into_iter().any(|base| is_power(n, base))).collect();
        assert_eq!(powers, [1, 3, 5, 7, 9, 25, 27, 49, 81, 125]);
        assert!(!is_power(0, 3));
    }
}
