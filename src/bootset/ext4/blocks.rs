//! The blocks of a file: trees of extents, and the older map of single blocks.

use super::{Ext4, Inode};
use crate::bytes::{join, le16, le32};
use crate::failure::{Failure, Step};

/// Magic of a node of a tree of extents.
const NODE: u16 = 0xf30a;
/// Deepest tree that Linux makes.
const DEEPEST: u16 = 5;
/// Longest extent with data; longer ones are unwritten, and read as zeros.
const LONGEST_WRITTEN: u16 = 1 << 15;
/// Extents of one file that are remembered. A file of 512 MiB in single blocks of 4 KiB has
/// 131,072.
const MOST_EXTENTS: usize = 1 << 19;

/// Blocks of a file that lie together.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) struct FileExtent {
    /// First block within the file.
    pub(crate) logical: u64,
    /// First block within the file system.
    pub(crate) physical: u64,
    /// Number of blocks.
    pub(crate) count: u64,
}

/// The extents found so far, the block behind the last one of them, and the block behind the last
/// one that is wanted. Blocks ascend, so that the sum of all extents is bounded by the end.
struct Found {
    extents: Vec<FileExtent>,
    next: u64,
    end: u64,
}

impl Found {
    fn add(&mut self, logical: u64, physical: u64, count: u64) -> Step<()> {
        if logical < self.next {
            return Err(Failure::damaged("the extents of a file overlap"));
        }
        let count = count.min(self.end.saturating_sub(logical));
        self.next = logical.saturating_add(count);
        if count == 0 {
            return Ok(());
        }
        if let Some(last) = self.extents.last_mut()
            && last.logical + last.count == logical
            && last.physical + last.count == physical
        {
            last.count += count;
            return Ok(());
        }
        if self.extents.len() >= MOST_EXTENTS {
            return Err(Failure::damaged("a file has too many extents"));
        }
        self.extents.push(FileExtent { logical, physical, count });
        Ok(())
    }
}

impl Ext4 {
    /// Returns where the first `bytes` bytes of a file are. Holes and unwritten extents are left
    /// out. Data that lies in the inode has no blocks.
    pub(crate) fn extents(&mut self, inode: &Inode, bytes: u64) -> Step<Vec<FileExtent>> {
        let end = inode.size.min(bytes).div_ceil(self.superblock.block_size);
        let mut found = Found { extents: Vec::new(), next: 0, end };
        if inode.inline.is_some() || end == 0 {
            return Ok(found.extents);
        }
        if inode.has_extents {
            self.node(&inode.block, None, &mut found)?;
        } else {
            self.map(inode, &mut found)?;
        }
        Ok(found.extents)
    }

    /// Walks a node. Its children are one less deep, so the walk ends.
    fn node(&mut self, node: &[u8], depth: Option<u16>, found: &mut Found) -> Step<()> {
        let damaged = || Failure::damaged("a tree of extents is damaged");
        let header = || Some((le16(node, 0)?, le16(node, 2)?, le16(node, 6)?));
        let (magic, entries, here) = header().ok_or_else(damaged)?;
        if magic != NODE || here > DEEPEST || depth.is_some_and(|depth| depth != here) {
            return Err(damaged());
        }
        for index in 1..=usize::from(entries) {
            self.disk.budget.step()?;
            let entry = node.get(12 * index..12 * (index + 1)).ok_or_else(damaged)?;
            let fields = || Some((le32(entry, 0)?, le16(entry, 4)?, le16(entry, 6)?));
            let (logical, len, high) = fields().ok_or_else(damaged)?;
            if u64::from(logical) >= found.end {
                break;
            }
            if here > 0 {
                // An index: the low half of the child's block stands where a leaf has the length.
                let low = le32(entry, 4).ok_or_else(damaged)?;
                let child = join(le16(entry, 8).ok_or_else(damaged)?.into(), low);
                let child = self.block(child)?;
                self.node(&child, Some(here - 1), found)?;
            } else if len <= LONGEST_WRITTEN {
                let low = le32(entry, 8).ok_or_else(damaged)?;
                found.add(logical.into(), join(high.into(), low), len.into())?;
            }
        }
        Ok(())
    }

    /// The map of ext2 and ext3: 12 blocks, and one block each of pointers to blocks, to blocks of
    /// pointers, and one deeper.
    fn map(&mut self, inode: &Inode, found: &mut Found) -> Step<()> {
        let mut logical = 0;
        for index in 0..15 {
            let pointer = le32(&inode.block, 4 * index).unwrap_or_default();
            self.pointer(
                pointer,
                u32::try_from(index.saturating_sub(11)).unwrap_or(3),
                &mut logical,
                found,
            )?;
        }
        Ok(())
    }

    /// Follows a pointer of which `depth` levels of pointers lie below.
    fn pointer(
        &mut self,
        block: u32,
        depth: u32,
        logical: &mut u64,
        found: &mut Found,
    ) -> Step<()> {
        if *logical >= found.end {
            return Ok(());
        }
        self.disk.budget.step()?;
        let per_block = self.superblock.block_size / 4;
        let below = per_block.saturating_pow(depth);
        if block == 0 {
            *logical = logical.saturating_add(below);
            return Ok(());
        }
        let Some(depth) = depth.checked_sub(1) else {
            found.add(*logical, block.into(), 1)?;
            *logical = logical.saturating_add(1);
            return Ok(());
        };
        let pointers = self.block(block.into())?;
        for index in 0..usize::try_from(per_block).unwrap_or_default() {
            self.pointer(le32(&pointers, 4 * index).unwrap_or_default(), depth, logical, found)?;
        }
        Ok(())
    }

    /// Reads up to `most` bytes of the beginning of a file, and records nothing of its data. A hole
    /// is zeros.
    pub(crate) fn content(&mut self, inode: &Inode, most: u64) -> Step<Vec<u8>> {
        self.content_at(inode, 0, most)
    }

    /// Reads up to `most` bytes of a file from `from` on. The caller bounds `most`.
    pub(crate) fn content_at(&mut self, inode: &Inode, from: u64, most: u64) -> Step<Vec<u8>> {
        let size = inode.size.min(from.saturating_add(most));
        if let Some(regions) = &inode.inline {
            let all = regions.concat();
            let at = |offset: u64| usize::try_from(offset).unwrap_or(usize::MAX).min(all.len());
            return Ok(all.get(at(from)..at(size)).unwrap_or_default().to_vec());
        }
        let extents = self.extents(inode, size)?;
        let len = size.saturating_sub(from);
        let mut bytes = vec![0; usize::try_from(len).unwrap_or_default()];
        let block_size = self.superblock.block_size;
        for extent in extents {
            let start = extent.logical.saturating_mul(block_size);
            let end = start.saturating_add(extent.count.saturating_mul(block_size)).min(size);
            let first = start.max(from);
            if first >= end {
                continue;
            }
            let offset = extent.physical.saturating_mul(block_size).saturating_add(first - start);
            let part = usize::try_from(first - from).ok().zip(usize::try_from(end - from).ok());
            if let Some(part) = part.and_then(|(start, end)| bytes.get_mut(start..end)) {
                self.read(offset, part)?;
            }
        }
        Ok(bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Extents that overlap could make a file of a few blocks out of any number of bytes.
    #[test]
    fn extents_ascend_and_end_with_the_file() {
        let mut found = Found { extents: Vec::new(), next: 0, end: 20 };
        found.add(0, 100, 5).unwrap();
        found.add(5, 105, 2).unwrap();
        found.add(10, 50, 100).unwrap();
        let extent = |logical, physical, count| FileExtent { logical, physical, count };
        assert_eq!(found.extents, [extent(0, 100, 7), extent(10, 50, 10)]);
        assert!(matches!(found.add(12, 300, 1), Err(Failure::Damaged(_))));
        found.add(20, 300, 1).unwrap();
        assert_eq!(found.extents.len(), 2);
    }
}
