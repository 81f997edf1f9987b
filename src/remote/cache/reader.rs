//! One object of the cache, as the serving process reads it.

use std::fs::File;
use std::io::{self, IoSliceMut};
use std::ops::Range;
use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use host::storage::BlockStatus;
use rustix::fs::SeekFrom;
use rustix::io::{Errno, ReadWriteFlags};

use super::map;
use super::{BLOCK, LARGEST_FILE, blocks_around};

/// After this time the counts of the header are looked at again: a fetcher may have lost or
/// forgotten blocks that this reader has seen.
const COUNTS_HOLD: Duration = Duration::from_secs(1);
/// The most bytes of one answer of [`CacheReader::status`].
const STATUS: u64 = 64 << 20;
/// The most bytes of absent blocks in one answer. Zeros that the fetcher finds there later are seen
/// by the next look.
const ABSENT: u64 = 1 << 20;
/// Blocks of one word of the table of known blocks.
const WORD: u64 = u64::BITS as u64;
/// Words of one part of the table of known blocks. A part of 4 KiB stands for 2 GiB of the file,
/// and is allocated when the first of its blocks is seen.
const PART: u64 = 512;

type Part = Box<[AtomicU64]>;

/// The two files of an object, open for reading only.
///
/// The files come from [`super::CacheObject::files_for_reader`] through a socket. The reader opens
/// nothing, and needs pread(2), preadv2(2) and fstat(2). All methods can be called by several
/// threads.
#[derive(Debug)]
pub struct CacheReader {
    data: Arc<File>,
    map: File,
    size: u64,
    is_anonymous: bool,
    /// One bit per block: was seen as present. A hit is answered from here without a system call.
    known: Vec<OnceLock<Part>>,
    started: Instant,
    /// When the counts were compared last, in milliseconds after `started`.
    compared: AtomicU64,
    /// `lost` and `forgotten` of the header when the table was cleared last, as one sum.
    counts: AtomicU64,
}

impl CacheReader {
    /// Checks the files: the header of the map, and that both have the size that a file of `size`
    /// bytes needs.
    ///
    /// # Errors
    /// [`io::ErrorKind::InvalidData`] if the files do not fit; those of fstat(2), pread(2).
    pub fn new(data: OwnedFd, map: OwnedFd, size: u64) -> io::Result<CacheReader> {
        let (data, map) = (Arc::new(File::from(data)), File::from(map));
        let wrong = |why: &str| io::Error::new(io::ErrorKind::InvalidData, why);
        if size > LARGEST_FILE {
            return Err(wrong("the remote file is too large for the cache"));
        }
        let header = map::read_header(&map, size)?;
        let metadata = data.metadata()?;
        if !metadata.is_file() || metadata.len() != size {
            return Err(wrong("the data file of the cache has a wrong size"));
        }
        let parts = size.div_ceil(BLOCK).div_ceil(WORD * PART);
        Ok(CacheReader {
            data,
            map,
            size,
            // Objects of a shared cache are not removed while they are in use.
            is_anonymous: metadata.nlink() == 0,
            known: (0..parts).map(|_| OnceLock::new()).collect(),
            started: Instant::now(),
            compared: AtomicU64::new(0),
            counts: AtomicU64::new(sum((header.lost, header.forgotten))),
        })
    }

    /// Size of the remote file in bytes.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Whether the files have no name: they belong to one disk, and what is in its overlay can be
    /// freed.
    pub fn is_anonymous(&self) -> bool {
        self.is_anonymous
    }

    /// The data file, for clones of its blocks.
    pub fn data(&self) -> &Arc<File> {
        &self.data
    }

    /// Whether all blocks that overlap `range` are present. Blocks that were seen before cost no
    /// system call, except that once per second a count of the map is read, which tells whether
    /// blocks have gone.
    ///
    /// # Errors
    /// [`io::ErrorKind::InvalidInput`] for a range beyond the end of the file; those of pread(2).
    pub fn is_present(&self, range: &Range<u64>) -> io::Result<bool> {
        if range.end > self.size || range.start > range.end {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        self.compare_counts()?;
        let blocks = blocks_around(range);
        loop {
            let Some(first) = blocks.clone().find(|block| !self.is_known_block(*block)) else {
                return Ok(true);
            };
            let counts = self.counts.load(Ordering::Acquire);
            let all = self.look(first..blocks.end)?;
            // A fetcher counts first, and makes blocks absent afterwards. If nothing was counted
            // up to here, the next comparison clears what was seen as present above.
            if sum(map::read_counts(&self.map)?) == counts {
                return Ok(all);
            }
            self.refresh()?;
            self.forget(range);
        }
    }

    /// Reads the map for `blocks` up to the first absent one. Returns whether there is none.
    fn look(&self, blocks: Range<u64>) -> io::Result<bool> {
        let mut all = true;
        map::walk(&self.map, &blocks, |first, states| {
            for (block, state) in (first..).zip(states) {
                all = map::is_present(*state);
                if !all {
                    break;
                }
                self.set_known(block);
            }
            Ok(all)
        })?;
        Ok(all)
    }

    /// Whether all blocks that overlap `range` were seen as present, without a system call.
    pub fn is_known(&self, range: &Range<u64>) -> bool {
        range.end <= self.size && blocks_around(range).all(|block| self.is_known_block(block))
    }

    /// The status of the bytes at `offset`, and for how many bytes, at most `max`, it holds. A hole
    /// is known only where the blocks are present; all else is data, which is always safe to say.
    ///
    /// # Errors
    /// Those of lseek(2) and pread(2).
    pub fn status(&self, offset: u64, max: u64) -> io::Result<(BlockStatus, u64)> {
        self.status_after(offset, max, || {})
    }

    /// As [`CacheReader::status`]. Calls `looked` after lseek(2) has looked for a hole.
    pub(super) fn status_after(
        &self,
        offset: u64,
        max: u64,
        looked: impl FnOnce(),
    ) -> io::Result<(BlockStatus, u64)> {
        let max = max.min(STATUS).min(self.size.saturating_sub(offset));
        // A look at the map is cheaper than lseek(2), which waits for writers of the data file.
        let absent = self.absent_at(offset, max.min(ABSENT))?;
        if absent > 0 {
            return Ok((BlockStatus::Data, absent));
        }
        let next = |from: fn(u64) -> SeekFrom, max: u64| match rustix::fs::seek(
            &self.data,
            from(offset),
        ) {
            Ok(found) => found.saturating_sub(offset).min(max),
            Err(Errno::NXIO) => max,
            Err(_) => 0,
        };
        // The map is read before the file. A fetcher writes the data of a block before it marks the
        // block, so a hole of the file where a block was present before is zeros; a block that
        // becomes present afterwards may have been no hole but absent.
        self.refresh()?;
        let mark = self.mark();
        let present = self.present_at(offset, max)?;
        let hole = next(SeekFrom::Data, present);
        looked();
        // Blocks that have gone since may be holes, too, whether they are present again or not.
        if hole > 0 && self.none_has_gone(mark)? {
            return Ok((BlockStatus::Hole, hole));
        }
        let data = next(SeekFrom::Hole, max);
        Ok((BlockStatus::Data, data.max(max.min(BLOCK - offset % BLOCK)).max(1)))
    }

    /// How many bytes at `offset`, at most `max`, lie in blocks that are absent.
    fn absent_at(&self, offset: u64, max: u64) -> io::Result<u64> {
        if self.is_known(&(offset..offset + max.min(1))) {
            return Ok(0);
        }
        let blocks = blocks_around(&(offset..offset + max));
        let mut end = blocks.start;
        map::walk(&self.map, &blocks, |first, states| {
            let absent = states.iter().take_while(|state| !map::is_present(**state)).count();
            end = first + absent as u64;
            Ok(absent == states.len())
        })?;
        Ok((end * BLOCK).saturating_sub(offset).min(max))
    }

    /// How many bytes at `offset`, at most `max`, lie in blocks that are present.
    fn present_at(&self, offset: u64, max: u64) -> io::Result<u64> {
        if self.is_present(&(offset..offset + max))? {
            return Ok(max);
        }
        let blocks = blocks_around(&(offset..offset + max));
        let absent = blocks.clone().find(|block| !self.is_known_block(*block));
        let len = (absent.unwrap_or(blocks.end) * BLOCK).saturating_sub(offset).min(max);
        // Blocks may have gone since they were seen.
        Ok(if self.is_present(&(offset..offset + len))? { len } else { 0 })
    }

    /// Calls `clone` with the data file if the blocks that overlap `range` are present. Returns
    /// whether they were, all the time: if not, what `clone` has shared is not to be used.
    ///
    /// Blocks that are not durable count as present only if no commit is going on at the end: the
    /// write-back of their bytes may have failed, and after the fdatasync(2) that has reported this
    /// the file system shares their blocks, which hold other bytes, without an error. The commit
    /// has not counted the loss yet.
    ///
    /// # Errors
    /// [`io::ErrorKind::InvalidInput`] for a range beyond the end of the file; those of `clone` and
    /// of pread(2).
    pub fn clone_with(
        &self,
        range: &Range<u64>,
        clone: &mut dyn FnMut(&File) -> io::Result<()>,
    ) -> io::Result<bool> {
        self.refresh()?;
        let mark = self.mark();
        if !self.is_present(range)? {
            return Ok(false);
        }
        clone(&self.data)?;
        let is_settled = !map::read_syncing(&self.map)? || self.is_durable(range)?;
        Ok(is_settled && self.none_has_gone(mark)?)
    }

    /// A mark of the blocks that are known now: take it before a look at the map, for
    /// [`CacheReader::none_has_gone`] after the use of the bytes.
    pub fn mark(&self) -> u64 {
        self.counts.load(Ordering::Acquire)
    }

    /// Whether no block has gone since `mark` was taken: blocks that were present after that have
    /// been so all the time. Blocks that have gone and come back have not.
    ///
    /// # Errors
    /// Those of pread(2).
    pub fn none_has_gone(&self, mark: u64) -> io::Result<bool> {
        let is_same = sum(map::read_counts(&self.map)?) == mark;
        if !is_same {
            self.refresh()?;
        }
        Ok(is_same)
    }

    fn is_durable(&self, range: &Range<u64>) -> io::Result<bool> {
        let mut all = true;
        map::walk(&self.map, &blocks_around(range), |_, states| {
            all = states.iter().all(|state| *state == map::DURABLE);
            Ok(all)
        })?;
        Ok(all)
    }

    /// Reads bytes that are present.
    ///
    /// # Errors
    /// EIO if the file ends too early; those of pread(2).
    pub fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        map::read_exact_at(&self.data, offset, buf)
    }

    /// Reads bytes that are present, if that needs no disk. Returns whether `buf` is filled.
    pub fn read_cached(&self, offset: u64, buf: &mut [u8]) -> bool {
        let len = buf.len();
        let mut parts = [IoSliceMut::new(buf)];
        rustix::io::preadv2(&self.data, &mut parts, offset, ReadWriteFlags::NOWAIT)
            .is_ok_and(|read| read == len)
    }

    /// Makes this reader look at the map again for the blocks around `range`. A block that is
    /// punched, lost or forgotten is to be forgotten by the readers of the same disk.
    pub fn forget(&self, range: &Range<u64>) {
        for block in blocks_around(&(range.start..range.end.min(self.size))) {
            if let Some((word, bit)) = self.place(block) {
                word.fetch_and(!bit, Ordering::AcqRel);
            }
        }
    }

    /// Clears the table of known blocks if blocks have gone since it was begun.
    fn compare_counts(&self) -> io::Result<()> {
        let now = u64::try_from(self.started.elapsed().as_millis()).unwrap_or(u64::MAX);
        let compared = self.compared.load(Ordering::Acquire);
        if u128::from(now.saturating_sub(compared)) < COUNTS_HOLD.as_millis() {
            return Ok(());
        }
        self.refresh()?;
        self.compared.fetch_max(now, Ordering::AcqRel);
        Ok(())
    }

    /// Compares the counts of the header now; clears the table of known blocks if blocks have
    /// gone.
    ///
    /// # Errors
    /// Those of pread(2).
    pub fn refresh(&self) -> io::Result<()> {
        let counts = sum(map::read_counts(&self.map)?);
        if self.counts.load(Ordering::Acquire) == counts {
            return Ok(());
        }
        for part in self.known.iter().filter_map(OnceLock::get) {
            for word in part {
                word.store(0, Ordering::Release);
            }
        }
        self.counts.store(counts, Ordering::Release);
        Ok(())
    }

    fn is_known_block(&self, block: u64) -> bool {
        self.place(block).is_some_and(|(word, bit)| word.load(Ordering::Acquire) & bit != 0)
    }

    fn set_known(&self, block: u64) {
        let index = block / (WORD * PART);
        if let Some(part) = usize::try_from(index).ok().and_then(|index| self.known.get(index)) {
            part.get_or_init(|| (0..PART).map(|_| AtomicU64::new(0)).collect());
        }
        if let Some((word, bit)) = self.place(block) {
            word.fetch_or(bit, Ordering::AcqRel);
        }
    }

    /// The word and the bit of a block, if its part is allocated.
    fn place(&self, block: u64) -> Option<(&AtomicU64, u64)> {
        let part = self.known.get(usize::try_from(block / (WORD * PART)).ok()?)?.get()?;
        let word = part.get(usize::try_from(block / WORD % PART).ok()?)?;
        Some((word, 1 << (block % WORD)))
    }
}

/// Both counts in one number that changes whenever one of them goes up.
fn sum((lost, forgotten): (u64, u64)) -> u64 {
    lost.wrapping_add(forgotten)
}
