//! The cache of remote files that all disks of a host share.
//!
//! ```text
//! fetcher ── CacheObject ──▶ KEY.data   sparse, the bytes at their offsets
//!                       └──▶ KEY.map    header, then one byte per block of 64 KiB
//! serving process ── CacheReader ──▶ the same two files, open for reading only
//! ```
//! An object is one remote file with one pin. KEY is [`crate::pin::cache_key`]. `KEY.json` says
//! for people what the object is; its modification time is the time of the last use. `KEY.sums`
//! is the chunk list, if there is one; this module only removes it.
//!
//! Each fetcher opens the directory by itself; there is no daemon. A process can be killed at any
//! moment, and the power can fail. What must hold then follows from three states of a block:
//!
//! * absent (0);
//! * present (1): the bytes are in the page cache and visible to all processes, but a failure of
//!   the power or of the write-back loses them;
//! * durable (2): fdatasync(2) has returned since the bytes were written.
//!
//! **Locks:** OFD locks on bytes of the map file, which belong to an open file and vanish with it:
//!
//! * byte 0, in use: shared for every open object and reader; exclusive to remove or reset.
//! * byte 1, changes: exclusive for every change of a byte of the map, and to open or remove.
//! * byte 2, commit: exclusive around fdatasync(2) of the data. Taken before byte 1.
//! * the byte of a block: exclusive while a process downloads the block.
//!
//! OFD locks of one open file do not conflict, so an object has a mutex for each of these as well,
//! taken before the lock.
//!
//! **Invariants:**
//!
//! * A block's data is written before its byte becomes 1, and fdatasync(2) returns before the byte
//!   becomes 2.
//! * At open, each 1 becomes 0 if the header names another boot, or if no other process has the
//!   object open. In the second case an error of write-back may have been forgotten with the inode.
//! * After a failed fdatasync(2) each 1 of the object becomes 0, and `lost` in the header is
//!   counted up. Bytes that were written before are not marked afterwards: each claim remembers
//!   `lost`. A process that is killed between fdatasync(2) and these steps leaves the mark
//!   `syncing` in the header. The next commit finds it. If that process has had the data open
//!   since before, its own fdatasync(2) reports the same failure; otherwise it does these steps.
//! * A commit makes durable what is present when it begins, and nothing that comes later. The first
//!   commit of an object that was in use at its open takes the blocks of other processes with it,
//!   because one of them may have been killed.
//! * A reader looks at the map first and at the data afterwards, and uses bytes, holes and clones
//!   only if the counts in the header have not changed from before the first look until after the
//!   last one.
//! * The data of an object that is open is never removed or truncated.
//!
//! **Touches:** the cache directory. **Never:** a network; an image. The directory must not be
//! mounted by two hosts at once: the header knows one boot only.

use std::ops::Range;

mod anonymous;
mod directory;
mod locks;
mod map;
mod object;
mod reader;
#[cfg(test)]
mod tests;

pub use directory::{CacheDirectory, ObjectFacts, Pruned};
pub use map::MapHeader;
pub use object::{CacheObject, Claim, ClaimedRange};
pub use reader::CacheReader;

/// Size of a block in bytes, the unit of presence. The last block of a file may be shorter. 64 KiB
/// is the default cluster size of qcow2.
pub const BLOCK: u64 = 64 << 10;

/// Largest size of a remote file in bytes. It bounds what a server can make this program allocate:
/// a map of 1 GiB, sparse.
pub const LARGEST_FILE: u64 = 64 << 40;

/// The blocks that overlap `range`.
fn blocks_around(range: &Range<u64>) -> Range<u64> {
    if range.start >= range.end {
        return 0..0;
    }
    range.start / BLOCK..range.end.div_ceil(BLOCK)
}

/// The blocks that lie wholly in `range` of a file of `size` bytes. The last block of the file ends
/// with the file.
fn blocks_within(range: &Range<u64>, size: u64) -> Range<u64> {
    let end = if range.end >= size { size.div_ceil(BLOCK) } else { range.end / BLOCK };
    let start = range.start.div_ceil(BLOCK);
    if start < end { start..end } else { 0..0 }
}

/// The bytes of `blocks` of a file of `size` bytes.
fn bytes_of(blocks: &Range<u64>, size: u64) -> Range<u64> {
    blocks.start * BLOCK..(blocks.end * BLOCK).min(size)
}
