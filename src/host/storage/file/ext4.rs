//! What makes writes to a file on ext4 faster.
//!
//! **Blocks are allocated before they are written.** ext4 takes 15 us for 64 KiB that are
//! written behind the end of a file, and 11 us if the blocks are already allocated: it
//! reserves and maps each new page of a write on its own. XFS allocates ahead by itself
//! (8 us either way), btrfs gains nothing, and a tmpfs would fill the pages with zeros,
//! only to have them overwritten.
//!
//! New clusters come from the end of an image in order, so the next blocks are known.
//! They are allocated only while new clusters fill what was allocated before: an image
//! with subclusters, of which a guest writes a few each, would otherwise take the space
//! of whole clusters.
//!
//! **Large writes are made in pieces.** Since Linux 6.16 the page cache of a file on ext4
//! has large folios: one for each write, of up to 2 MiB. Each later write of 4 KiB goes
//! through the list of all blocks of its folio (`ext4_block_write_begin`). It takes 2 us
//! in a folio of 4 KiB, 4 in one of 64 KiB, 5.5 in one of 128 KiB, 20 in one of 1 MiB,
//! and holds the lock of the file meanwhile. XFS and tmpfs have large folios without such
//! lists.

use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::MetadataExt;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use rustix::fs::FallocateFlags;
use rustix::io::Errno;

use super::STAT_BLOCK;
use crate::storage::WriteKind;

/// File system type of statfs(2) for ext4 (linux/magic.h). ext2 and ext3 have the same
/// one; they refuse fallocate(2) with EOPNOTSUPP.
const EXT4_SUPER_MAGIC: u64 = 0xef53;
/// Most bytes of new clusters that one pwrite(2) writes.
const NEW_PIECE: u64 = 64 << 10;
/// Most bytes that one pwrite(2) writes in place. Most of these writes find their folios
/// in the page cache, which pieces cannot change: 1 MiB takes up to 7 % longer in pieces
/// of 128 KiB, and up to 11 % in those of 64 KiB.
const PIECE: u64 = 128 << 10;
/// Bytes that are allocated at a time, and so the most that lie behind the end of a file.
/// A call takes some 20 us; 1 MiB at a time is measurably slower, 8 MiB are not faster.
const WINDOW: u64 = 4 << 20;
/// While the file system has less free space, in bytes, nothing is allocated ahead. The
/// reserve that copies of reads leave (`--reserve`), and other programs, come first.
const LEAST_FREE: u64 = 512 << 20;

/// Whether statfs(2) has given this type for the file system of a file.
pub(super) fn is_ext4(file_system: u64) -> bool {
    file_system == EXT4_SUPER_MAGIC
}

/// Returns how many of `len` bytes at `offset` one pwrite(2) should write. A folio lies
/// at a multiple of its size, so pieces end at multiples of theirs.
pub(super) fn piece(kind: WriteKind, offset: u64, len: usize) -> usize {
    let most = if kind == WriteKind::NewCluster { NEW_PIECE } else { PIECE };
    len.min((most - offset % most) as usize)
}

/// What one open file has allocated ahead. All fields are hints for the speed of later
/// writes, so they need no order among each other: threads that meet allocate less, never
/// a wrong range.
#[derive(Debug, Default)]
pub(super) struct Ahead {
    /// Whether the file system gains from it and nothing else has allocated blocks for
    /// this file.
    is_useful: AtomicBool,
    /// The end of the window: the bytes before it are allocated, or only watched.
    end: AtomicU64,
    /// Bytes that were written into the window.
    filled: AtomicU64,
    /// Some blocks were allocated ahead, so the close has to give back what was not used.
    has_allocated: AtomicBool,
}

impl Ahead {
    /// For a file on a file system that gains from it, or not.
    pub fn new(is_useful: bool) -> Ahead {
        Ahead { is_useful: AtomicBool::new(is_useful), ..Ahead::default() }
    }

    /// Allocates the blocks that follow, if this write of new clusters leaves the window.
    /// A failure is no error: the write allocates its own blocks then, and reports what
    /// is wrong.
    pub fn before_new(&self, file: &File, offset: u64, len: u64) {
        if !self.is_useful.load(Ordering::Relaxed) {
            return;
        }
        let Some(range) = self.next(offset, len) else { return };
        let free = rustix::fs::fstatvfs(file)
            .map_or(0, |host| host.f_bavail.saturating_mul(host.f_frsize));
        if free < LEAST_FREE {
            return;
        }
        let blocks = || file.metadata().map_or(0, |metadata| metadata.blocks() * STAT_BLOCK);
        let before = blocks();
        let len = range.end - range.start;
        match rustix::fs::fallocate(file, FallocateFlags::KEEP_SIZE, range.start, len) {
            // A part is allocated.
            Err(Errno::NOSPC | Errno::DQUOT | Errno::INTR) => {}
            Err(_) => return,
            Ok(()) if blocks() >= before + len / 2 => {}
            // Another program has allocated them, so that this file is sure to have them: there is
            // nothing to gain, and the close must not give them back.
            Ok(()) => {
                self.is_useful.store(false, Ordering::Relaxed);
                return;
            }
        }
        self.has_allocated.store(true, Ordering::Relaxed);
    }

    /// Counts a write, and moves the window if the write leaves it. Returns the range to
    /// allocate: the new window, if writes have filled three quarters of the one before
    /// it.
    fn next(&self, offset: u64, len: u64) -> Option<Range<u64>> {
        let end = self.end.load(Ordering::Relaxed);
        let written = offset.checked_add(len)?;
        if written <= end {
            if offset.saturating_add(WINDOW) >= end {
                self.filled.fetch_add(len, Ordering::Relaxed);
            }
            return None;
        }
        // A write far behind the window is the first one of a file that was written before.
        let from = if offset > end.saturating_add(WINDOW) { offset } else { end };
        let next = written.max(from.checked_add(WINDOW)?);
        // One of the threads that leave the window moves it.
        self.end.compare_exchange(end, next, Ordering::Relaxed, Ordering::Relaxed).ok()?;
        let filled = self.filled.swap(len, Ordering::Relaxed);
        (from == end && filled >= WINDOW / 4 * 3).then_some(from..next)
    }

    /// Frees the blocks behind the end of the file, if some were allocated ahead. `size`
    /// is the size of the file in bytes as its writer knows it. The writer calls this
    /// after its last write: what is written behind `size` at the same time is cut off.
    pub fn give_back(&self, file: &File, size: u64) {
        if !self.has_allocated.swap(false, Ordering::Relaxed) {
            return;
        }
        // fallocate(2) punches no hole behind the end of a file on ext4. A truncation to the size
        // that the file has frees these blocks. A file that another program has made shorter must
        // not get the old size back, since that would hide the loss (P9).
        let done = file.metadata().and_then(|metadata| match metadata.size() == size {
            true => file.set_len(size),
            false => Ok(()),
        });
        if let Err(error) = done {
            log::debug!("blocks behind the end of the file were not given back: {error}");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const CLUSTER: u64 = 64 << 10;

    /// Writes clusters one behind the other, of which `len` bytes each are written.
    /// Returns the ranges that would have been allocated.
    fn walk(ahead: &Ahead, clusters: Range<u64>, len: u64) -> Vec<Range<u64>> {
        clusters.filter_map(|cluster| ahead.next(cluster * CLUSTER, len)).collect()
    }

    #[test]
    fn what_follows_a_full_window_is_allocated() {
        let ahead = Ahead::default();
        let per_window = WINDOW / CLUSTER;
        assert_eq!(walk(&ahead, 0..per_window, CLUSTER), [], "the first window is watched");
        let windows = [WINDOW..2 * WINDOW, 2 * WINDOW..3 * WINDOW];
        assert_eq!(walk(&ahead, per_window..per_window * 3, CLUSTER), windows);
    }

    #[test]
    fn a_file_that_was_written_before_starts_where_it_ends() {
        let ahead = Ahead::default();
        let (first, per_window) = (1_000_003, WINDOW / CLUSTER);
        let start = first * CLUSTER + WINDOW;
        let found = walk(&ahead, first..first + 2 * per_window, CLUSTER);
        assert_eq!(found, vec![start..start + WINDOW]);
    }

    #[test]
    fn parts_of_clusters_allocate_nothing() {
        let ahead = Ahead::default();
        assert_eq!(walk(&ahead, 0..1000, 4096), []);
        assert_eq!(walk(&ahead, 1000..1000 + WINDOW / CLUSTER, CLUSTER), [], "not full yet");
        assert_ne!(walk(&ahead, 1100..1200, CLUSTER), []);
    }

    #[test]
    fn reused_clusters_do_not_fill_the_window() {
        let ahead = Ahead::default();
        assert_eq!(ahead.next(100 * WINDOW, CLUSTER), None);
        assert_eq!(walk(&ahead, 0..1000, CLUSTER), [], "far before the window");
        assert_eq!(ahead.next(101 * WINDOW, CLUSTER), None);
    }

    #[test]
    fn pieces_end_at_multiples_of_their_size() {
        let pieces = |kind, mut offset: u64, mut len: usize| {
            let mut found = Vec::new();
            while len > 0 {
                let piece = piece(kind, offset, len);
                found.push(piece >> 10);
                (offset, len) = (offset + piece as u64, len - piece);
            }
            found
        };
        assert_eq!(pieces(WriteKind::NewCluster, 3 << 16, 192 << 10), [64, 64, 64]);
        assert_eq!(pieces(WriteKind::NewCluster, 4 << 10, 64 << 10), [60, 4]);
        assert_eq!(pieces(WriteKind::Data, 3 << 16, 192 << 10), [64, 128]);
        assert_eq!(pieces(WriteKind::L2Table, 1 << 20, 4 << 10), [4]);
    }

    #[test]
    fn writes_that_are_larger_than_a_window_and_offsets_beyond_all_files_are_taken() {
        let ahead = Ahead::default();
        assert_eq!(ahead.next(0, 3 * WINDOW), None);
        assert_eq!(ahead.next(3 * WINDOW, 5 * WINDOW), Some(3 * WINDOW..8 * WINDOW));
        assert_eq!(ahead.next(u64::MAX - 1, 1), None);
        assert_eq!(ahead.next(u64::MAX, 1), None);
    }

    /// Protects: P9: the end of the writer neither gives a file that was made shorter its old
    /// size back, nor cuts off what it does not know of.
    #[test]
    fn p9_the_size_of_the_file_stays() {
        let file = tempfile::tempfile().unwrap();
        for (real, known) in [(4096, 8192), (8192, 4096), (8192, 8192)] {
            file.set_len(real).unwrap();
            let ahead = Ahead::new(true);
            ahead.has_allocated.store(true, Ordering::Relaxed);
            ahead.give_back(&file, known);
            assert_eq!(file.metadata().unwrap().size(), real, "{known} bytes are known");
        }
    }
}
