//! Directories, read from their first block to their last: the blocks of an index look like blocks
//! without entries.

use std::collections::HashMap;
use std::rc::Rc;

use super::{Ext4, FileKind, Inode, MOST_KEPT};
use crate::bytes::{le16, le32};
use crate::failure::{Failure, Step};

/// Bytes of a directory that are read: some 100,000 names.
const MOST_BYTES: u64 = 4 << 20;

/// A name in a directory.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(crate) struct DirectoryEntry {
    /// The name; bytes that are not UTF-8 are replaced, and such a file is not found by its name.
    pub(crate) name: String,
    pub(crate) inode: u32,
}

/// The names of a directory, without `.` and `..`, in the order in which they are stored.
#[derive(Debug, Default)]
pub(crate) struct Directory {
    pub(crate) entries: Vec<DirectoryEntry>,
    /// Whether its blocks contradict themselves, or there are too many.
    pub(crate) is_damaged: bool,
    by_name: HashMap<String, u32>,
}

impl Directory {
    /// Returns the inode of a name.
    pub(crate) fn find(&self, name: &str) -> Option<u32> {
        self.by_name.get(name).copied()
    }
}

impl Ext4 {
    /// Reads a directory. All its blocks are recorded the first time.
    pub(crate) fn directory(&mut self, inode: &Inode) -> Step<Rc<Directory>> {
        if inode.kind != FileKind::Directory {
            return Err(Failure::Absent);
        }
        if let Some(directory) = self.directories.get(&inode.number) {
            return Ok(Rc::clone(directory));
        }
        let directory = Rc::new(self.read_directory(inode)?);
        if self.directories.len() >= MOST_KEPT {
            self.directories.clear();
        }
        self.directories.insert(inode.number, Rc::clone(&directory));
        Ok(directory)
    }

    fn read_directory(&mut self, inode: &Inode) -> Step<Directory> {
        let mut directory =
            Directory { is_damaged: inode.size > MOST_BYTES, ..Directory::default() };
        if let Some([first, rest]) = &inode.inline {
            // The first four bytes are the inode of the parent.
            self.names(first.get(4..).unwrap_or_default(), &mut directory)?;
            self.names(rest, &mut directory)?;
            return Ok(directory);
        }
        for extent in self.extents(inode, MOST_BYTES)? {
            for block in extent.physical..extent.physical.saturating_add(extent.count) {
                let bytes = self.block(block)?;
                self.names(&bytes, &mut directory)?;
            }
        }
        Ok(directory)
    }

    /// Adds the names of one block.
    fn names(&mut self, block: &[u8], directory: &mut Directory) -> Step<()> {
        let mut at = 0;
        while at + 8 <= block.len() {
            self.disk.budget.step()?;
            let fields = || Some((le32(block, at)?, le16(block, at + 4)?, *block.get(at + 6)?));
            let Some((inode, length, name_len)) = fields() else { break };
            // Blocks of 64 KiB: the length of an entry that takes all of it does not fit.
            let length = match usize::from(length) {
                0 | 0xffff => 1 << 16,
                length => length,
            };
            if length < 8 || !length.is_multiple_of(4) || at + length > block.len() {
                directory.is_damaged |= block.len() - at >= 12;
                break;
            }
            let name = block.get(at + 8..at + 8 + usize::from(name_len));
            match name {
                Some(name) if inode != 0 && name != b"." && name != b".." && !name.is_empty() => {
                    let name = String::from_utf8_lossy(name).into_owned();
                    directory.by_name.entry(name.clone()).or_insert(inode);
                    directory.entries.push(DirectoryEntry { name, inode });
                }
                Some(_) => {}
                None => directory.is_damaged = true,
            }
            at += length;
        }
        Ok(())
    }
}
