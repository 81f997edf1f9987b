//! What the kernel reads when it mounts a file system: superblock, group descriptors, the root
//! inode, the journal; and the bitmaps of the groups in which a boot allocates.

use crate::failure::Step;
use crate::stage::Stage;
use crate::walk::Walk;

/// Bytes of a clean journal: its superblock is read. The rest of a cluster of 64 KiB is needed when
/// the first transaction is written to it.
const JOURNAL_HEAD: u64 = 64 << 10;
/// Bytes of a journal that has to be replayed. Larger ones are made for disks of some TiB.
const JOURNAL_WHOLE: u64 = 128 << 20;
/// Groups of which the descriptors are taken: those of 128 TiB with blocks of 4 KiB.
const MOST_GROUPS: u64 = 1 << 20;
/// Groups of which the bitmaps are taken: the first ones, which Linux fills first. With FLEX_BG
/// the bitmaps of 16 groups are neighbours.
const BITMAPS: u64 = 16;

/// Blocks of an inode table that Linux reads around an inode (`inode_readahead_blks`).
pub(super) const INODE_WINDOW: u64 = 32;

/// Takes the metadata of a mount.
pub(super) fn take(walk: &mut Walk) -> Step<()> {
    walk.stage(Stage::Mount);
    let superblock = walk.ext4.bytes_of(1024 / walk.ext4.superblock.block_size, 1);
    if let Some(superblock) = superblock {
        walk.add(superblock)?;
    }
    let groups = walk.ext4.superblock.groups().min(MOST_GROUPS);
    // One descriptor of each block of descriptors.
    let per_block = walk.ext4.superblock.descriptors_per_block().max(1);
    let mut group = 0;
    while group < groups {
        walk.ext4.disk.budget.step()?;
        let descriptor = walk.ext4.group(group);
        if walk.judge("the group descriptors", descriptor)?.is_none() {
            break;
        }
        group += per_block;
    }
    let root = walk.ext4.inode(2);
    walk.judge("the root directory", root)?;
    journal(walk)?;
    for group in 0..groups.min(BITMAPS) {
        let descriptor = walk.ext4.group(group);
        let Some(descriptor) = walk.judge("the group descriptors", descriptor)? else { break };
        for bitmap in [descriptor.block_bitmap, descriptor.inode_bitmap] {
            if let Some(range) = walk.ext4.bytes_of(bitmap, 1).filter(|_| bitmap > 0) {
                walk.add(range)?;
            }
        }
    }
    Ok(())
}

fn journal(walk: &mut Walk) -> Step<()> {
    let Some(number) = walk.ext4.superblock.journal else { return Ok(()) };
    let inode = walk.ext4.inode(number);
    let Some(inode) = walk.judge("the journal", inode)? else { return Ok(()) };
    let bytes = if walk.ext4.superblock.needs_recovery {
        walk.notes.push("its journal has to be replayed, and is taken".to_owned());
        JOURNAL_WHOLE
    } else {
        JOURNAL_HEAD
    };
    walk.take_data("the journal", &inode, bytes)
}
