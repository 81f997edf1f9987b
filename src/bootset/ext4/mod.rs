//! One ext2, ext3 or ext4 file system, read-only: where its metadata and the blocks of its files
//! are.
//!
//! The format is that of Documentation/filesystems/ext4 in the sources of Linux, which the names of
//! fields refer to. Checksums are not verified, and the journal is not replayed: a wrong answer
//! costs a range too many, and the kernel reads the old blocks too.
//!
//! **Touches:** the partition, through [`Disk`]. **Never:** allocates by a number of the disk
//! without a bound; follows a pointer of a tree upwards.
//! **Invariants:** each block that is read for a lookup is recorded with [`Ext4::touched`], whole,
//! before its content is used; recorded ranges lie within the partition.

mod blocks;
mod directory;
mod inode;
mod path;
mod superblock;

use std::collections::HashMap;
use std::mem;
use std::ops::Range;
use std::rc::Rc;

use crate::disk::Disk;
use crate::failure::{Failure, Step};

pub(crate) use directory::Directory;
pub(crate) use inode::{FileKind, Inode};
pub(crate) use path::Resolved;
pub(crate) use superblock::Superblock;

/// Inodes and directories that are kept in memory; the maps are emptied when they are full.
const MOST_KEPT: usize = 20_000;

/// A file system, and what was read of it.
#[derive(Debug)]
pub(crate) struct Ext4 {
    pub(crate) disk: Disk,
    /// Bytes of the disk that the partition has.
    range: Range<u64>,
    pub(crate) superblock: Superblock,
    inodes: HashMap<u32, Rc<Inode>>,
    directories: HashMap<u32, Rc<Directory>>,
    /// Bytes of the disk that lookups have read since [`Ext4::take_touched`].
    touched: Vec<Range<u64>>,
    /// Blocks of the window of an inode table that a reader reads at once, a power of two.
    pub(crate) inode_window: u64,
}

impl Ext4 {
    /// Reads the superblock of the file system in `range` of the disk.
    pub(crate) fn open(mut disk: Disk, range: Range<u64>) -> Step<Ext4> {
        let superblock = Superblock::read(&mut disk, &range)?;
        let mut ext4 = Ext4 {
            disk,
            range,
            superblock,
            inodes: HashMap::new(),
            directories: HashMap::new(),
            touched: Vec::new(),
            inode_window: 1,
        };
        ext4.touch_bytes(1024, 1024);
        Ok(ext4)
    }

    /// Returns the bytes of the disk that lookups have read since the last call, in order.
    pub(crate) fn take_touched(&mut self) -> Vec<Range<u64>> {
        mem::take(&mut self.touched)
    }

    /// The bytes of the disk of `count` blocks from `block` on, as far as the file system has them.
    pub(crate) fn bytes_of(&self, block: u64, count: u64) -> Option<Range<u64>> {
        let end = block.checked_add(count)?.min(self.superblock.blocks);
        let start = self.superblock.block_size.checked_mul(block)?.checked_add(self.range.start)?;
        let end = self.superblock.block_size.checked_mul(end)?.checked_add(self.range.start)?;
        let end = end.min(self.range.end);
        (start < end).then_some(start..end)
    }

    /// The part of a range of the disk that lies in the partition.
    pub(crate) fn within(&self, range: Range<u64>) -> Range<u64> {
        range.start.max(self.range.start)..range.end.min(self.range.end)
    }

    /// Records the whole blocks that `len` bytes from `offset` of the file system lie in.
    fn touch_bytes(&mut self, offset: u64, len: u64) {
        let block_size = self.superblock.block_size;
        let first = offset / block_size;
        let last = offset.saturating_add(len.saturating_sub(1)) / block_size;
        self.touched.extend(self.bytes_of(first, last - first + 1));
    }

    /// Reads bytes of the file system as metadata: they are recorded.
    fn read_metadata(&mut self, offset: u64, buf: &mut [u8]) -> Step<()> {
        self.touch_bytes(offset, buf.len() as u64);
        self.read(offset, buf)
    }

    /// Reads bytes of the file system without recording them.
    fn read(&mut self, offset: u64, buf: &mut [u8]) -> Step<()> {
        let end = offset.checked_add(buf.len() as u64);
        let at = self.range.start.checked_add(offset);
        match (at, end) {
            (Some(at), Some(end)) if end <= self.range.end - self.range.start => {
                self.disk.read(at, buf)
            }
            _ => Err(Failure::damaged(format!("byte {offset} is behind the end of the partition"))),
        }
    }

    /// Reads one block as metadata.
    fn block(&mut self, block: u64) -> Step<Vec<u8>> {
        if block == 0 || block >= self.superblock.blocks {
            return Err(Failure::damaged(format!("there is no block {block}")));
        }
        let size = self.superblock.block_size;
        let mut bytes = vec![0; usize::try_from(size).unwrap_or_default()];
        self.read_metadata(block.saturating_mul(size), &mut bytes)?;
        Ok(bytes)
    }
}
