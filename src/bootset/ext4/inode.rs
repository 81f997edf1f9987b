//! Group descriptors, inodes, and data that lies in an inode.

use std::rc::Rc;

use super::{Ext4, MOST_KEPT};
use crate::bytes::{join, le16, le32};
use crate::failure::{Failure, Step};

/// EXTENTS_FL: the map is a tree of extents.
const FLAG_EXTENTS: u32 = 0x8_0000;
/// INLINE_DATA_FL: the data is in the inode.
const FLAG_INLINE: u32 = 0x1000_0000;
/// Magic of extended attributes, in the inode.
const ATTRIBUTES: u32 = 0xea02_0000;
/// Name index of `system.`, of which `data` is the rest of inline data.
const SYSTEM: u8 = 7;

/// What an inode is.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum FileKind {
    /// A regular file.
    Regular,
    /// A directory.
    Directory,
    /// A symbolic link.
    Link,
    /// A device, a pipe, a socket, or nothing that is known.
    Special,
}

/// The fields of an inode that the walk needs.
#[derive(Clone, Debug)]
pub(crate) struct Inode {
    pub(crate) number: u32,
    pub(crate) kind: FileKind,
    /// Bytes of the file.
    pub(crate) size: u64,
    /// Whether the map in [`Inode::block`] is a tree of extents.
    pub(super) has_extents: bool,
    /// i_block: 60 bytes, the root of the map, or the target of a short link.
    pub(super) block: Vec<u8>,
    /// Data in the inode, if it lies there: its two regions.
    pub(super) inline: Option<[Vec<u8>; 2]>,
}

/// What a descriptor says of its group: blocks of the file system.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Group {
    pub(crate) block_bitmap: u64,
    pub(crate) inode_bitmap: u64,
    pub(crate) inode_table: u64,
    /// Inodes at the end of the table that were never used.
    unused: u32,
}

impl Ext4 {
    /// Reads an inode.
    pub(crate) fn inode(&mut self, number: u32) -> Step<Rc<Inode>> {
        if let Some(inode) = self.inodes.get(&number) {
            return Ok(Rc::clone(inode));
        }
        self.disk.budget.step()?;
        let inode = Rc::new(self.read_inode(number)?);
        if self.inodes.len() >= MOST_KEPT {
            self.inodes.clear();
        }
        self.inodes.insert(number, Rc::clone(&inode));
        Ok(inode)
    }

    /// Returns the group of an inode.
    pub(crate) fn group_of(&self, number: u32) -> u64 {
        u64::from(number.saturating_sub(1) / self.superblock.inodes_per_group)
    }

    /// Reads the descriptor of a group.
    pub(crate) fn group(&mut self, group: u64) -> Step<Group> {
        let damaged = || Failure::damaged(format!("there is no group {group}"));
        if group >= self.superblock.groups() {
            return Err(damaged());
        }
        let (offset, size) = self.superblock.descriptor(group).ok_or_else(damaged)?;
        let mut bytes = vec![0; size];
        self.read_metadata(offset, &mut bytes)?;
        let is_64bit = self.superblock.is_64bit;
        let field = |low: usize, high: usize| {
            let high = if is_64bit { le32(&bytes, high)? } else { 0 };
            Some(join(high, le32(&bytes, low)?))
        };
        let group = || {
            Some(Group {
                block_bitmap: field(0x0, 0x20)?,
                inode_bitmap: field(0x4, 0x24)?,
                inode_table: field(0x8, 0x28)?,
                unused: match (le16(&bytes, 0x1c)?, is_64bit) {
                    (low, true) => u32::from(low) | u32::from(le16(&bytes, 0x32)?) << 16,
                    (low, false) => low.into(),
                },
            })
        };
        group().ok_or_else(damaged)
    }

    fn read_inode(&mut self, number: u32) -> Step<Inode> {
        let damaged = || Failure::damaged(format!("inode {number} is damaged"));
        if number == 0 || number > self.superblock.inodes {
            return Err(Failure::damaged(format!("there is no inode {number}")));
        }
        let group = self.group(self.group_of(number))?;
        let table = group.inode_table;
        let index = u64::from((number - 1) % self.superblock.inodes_per_group);
        let size = self.superblock.inode_size;
        let offset = table
            .checked_mul(self.superblock.block_size)
            .and_then(|start| start.checked_add(index.checked_mul(size)?))
            .ok_or_else(damaged)?;
        if table == 0 {
            return Err(damaged());
        }
        let mut bytes = vec![0; usize::try_from(size).unwrap_or_default()];
        self.read_metadata(offset, &mut bytes)?;
        self.touch_window(offset / self.superblock.block_size, group);
        parse(number, &bytes).ok_or_else(damaged)
    }

    /// Records the window of the inode table around `block`, as `__ext4_get_inode_loc` of Linux
    /// reads it: aligned, within the table, without what was never used.
    fn touch_window(&mut self, block: u64, group: Group) {
        if self.inode_window <= 1 {
            return;
        }
        let inodes = self.superblock.inodes_per_group.saturating_sub(group.unused);
        let per_block = (self.superblock.block_size / self.superblock.inode_size).max(1);
        let used = u64::from(inodes).div_ceil(per_block);
        let aligned = block - block % self.inode_window;
        let start = aligned.max(group.inode_table);
        let end =
            aligned.saturating_add(self.inode_window).min(group.inode_table.saturating_add(used));
        self.touched.extend(self.bytes_of(start, end.saturating_sub(start)));
    }
}

fn parse(number: u32, bytes: &[u8]) -> Option<Inode> {
    let kind = match le16(bytes, 0)? >> 12 {
        0o10 => FileKind::Regular,
        0o4 => FileKind::Directory,
        0o12 => FileKind::Link,
        _ => FileKind::Special,
    };
    let flags = le32(bytes, 0x20)?;
    let block = bytes.get(0x28..0x64)?.to_vec();
    let inline =
        (flags & FLAG_INLINE != 0).then(|| [block.clone(), inline_rest(bytes).unwrap_or_default()]);
    // The kernel, too, takes the upper half for regular files and directories.
    let size = join(le32(bytes, 0x6c)?, le32(bytes, 4)?);
    let size = if kind == FileKind::Link { u64::from(le32(bytes, 4)?) } else { size };
    let has_extents = flags & FLAG_EXTENTS != 0;
    Some(Inode { number, kind, size, has_extents, block, inline })
}

/// The value of the attribute `system.data`: what did not fit into i_block.
fn inline_rest(inode: &[u8]) -> Option<Vec<u8>> {
    let extra = usize::from(le16(inode, 0x80)?);
    let header = 128_usize.checked_add(extra)?;
    if le32(inode, header)? != ATTRIBUTES {
        return None;
    }
    let entries = inode.get(header.checked_add(4)?..)?;
    let mut at = 0;
    // Each entry takes at least 16 bytes of the inode.
    while let Some(entry) = entries.get(at..at + 16) {
        let [name_len, name_index, ..] = *entry else { return None };
        if name_len == 0 && name_index == 0 {
            return None;
        }
        let name = entries.get(at + 16..at + 16 + usize::from(name_len))?;
        if name_index == SYSTEM && name == b"data" {
            let start = usize::from(le16(entry, 2)?);
            let len = usize::try_from(le32(entry, 8)?).ok()?;
            return Some(entries.get(start..start.checked_add(len)?)?.to_vec());
        }
        at += (16 + usize::from(name_len)).next_multiple_of(4);
    }
    None
}
