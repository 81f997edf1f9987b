//! The disk as the walk reads it: bounded, in pieces that suit a source behind a network.

use std::collections::HashMap;
use std::fmt;
use std::io::{self, Read, Seek, SeekFrom};
use std::sync::Arc;

use crate::BlockSource;
use crate::budget::Budget;
use crate::failure::{Failure, Step};

/// Bytes of one read of the source. Metadata of a file system lies together; a block of its own
/// for each inode would be a round trip each.
const PIECE: u64 = 64 << 10;
/// Pieces that are kept: 16 MiB, more than the metadata that a boot touches.
const MOST_PIECES: usize = 256;

/// Reads bytes of the disk, and keeps the pieces that it has read.
pub(crate) struct Disk {
    source: Arc<dyn BlockSource>,
    size: u64,
    pub(crate) budget: Arc<Budget>,
    pieces: HashMap<u64, Box<[u8]>>,
}

impl Disk {
    pub(crate) fn new(source: Arc<dyn BlockSource>, budget: Arc<Budget>) -> Disk {
        let size = source.size();
        Disk { source, size, budget, pieces: HashMap::new() }
    }

    /// The size of the disk in bytes.
    pub(crate) fn size(&self) -> u64 {
        self.size
    }

    /// Fills `buf` with the bytes from `offset` on.
    pub(crate) fn read(&mut self, offset: u64, buf: &mut [u8]) -> Step<()> {
        let end = offset.checked_add(buf.len() as u64);
        if end.is_none_or(|end| end > self.size) {
            return Err(Failure::damaged(format!("offset {offset} is behind the end of the disk")));
        }
        self.budget.copy(buf.len() as u64)?;
        let mut at = offset;
        let mut rest = buf;
        while !rest.is_empty() {
            let start = at - at % PIECE;
            let piece = self.piece(start)?;
            let from = usize::try_from(at - start).unwrap_or(usize::MAX);
            let part = piece.get(from..).unwrap_or_default();
            let len = part.len().min(rest.len());
            let (Some(part), Some((now, later))) =
                (part.get(..len), rest.split_at_mut_checked(len))
            else {
                return Err(Failure::damaged("a piece of the disk is too short"));
            };
            if len == 0 {
                return Err(Failure::damaged("a piece of the disk is too short"));
            }
            now.copy_from_slice(part);
            rest = later;
            at += len as u64;
        }
        Ok(())
    }

    fn piece(&mut self, start: u64) -> Step<&[u8]> {
        if !self.pieces.contains_key(&start) {
            let len = PIECE.min(self.size.saturating_sub(start));
            self.budget.read(len)?;
            let mut piece = vec![0; usize::try_from(len).unwrap_or_default()].into_boxed_slice();
            self.source.read(start, &mut piece).map_err(|error| {
                Failure::Unreadable(format!("{len} bytes from {start} on cannot be read: {error}"))
            })?;
            if self.pieces.len() >= MOST_PIECES {
                self.pieces.clear();
            }
            self.pieces.insert(start, piece);
        }
        Ok(self.pieces.get(&start).map(|piece| &**piece).unwrap_or_default())
    }
}

impl fmt::Debug for Disk {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Disk").field("size", &self.size).finish_non_exhaustive()
    }
}

/// The disk as a stream of bytes, for libraries that read one.
pub(crate) struct Cursor<'a> {
    pub(crate) disk: &'a mut Disk,
    pub(crate) at: u64,
}

impl Read for Cursor<'_> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let left = self.disk.size().saturating_sub(self.at);
        let len = buf.len().min(usize::try_from(left).unwrap_or(usize::MAX));
        let part = buf.get_mut(..len).unwrap_or_default();
        self.disk.read(self.at, part).map_err(|failure| io::Error::other(failure.to_string()))?;
        self.at += len as u64;
        Ok(len)
    }
}

impl Seek for Cursor<'_> {
    fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
        let at = match to {
            SeekFrom::Start(at) => Some(at),
            SeekFrom::End(back) => self.disk.size().checked_add_signed(back),
            SeekFrom::Current(by) => self.at.checked_add_signed(by),
        };
        self.at = at.ok_or_else(|| io::Error::from(io::ErrorKind::InvalidInput))?;
        Ok(self.at)
    }
}
