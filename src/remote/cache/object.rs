//! One object of the cache, as a fetcher writes it.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use host::error::Context;
use host::{Error, ErrorKind, Result};
use parking_lot::{Mutex, MutexGuard};
use rustix::fs::{
    AtFlags, FallocateFlags, Mode, OFlags, SeekFrom, Timespec, Timestamps, UTIME_NOW,
};

use super::map::{self, ABSENT, DURABLE, PRESENT};
use super::{blocks_around, blocks_within, bytes_of, locks};

/// How many zeros are written at once, in bytes.
const ZEROS: usize = 1 << 20;

/// An open object: a sparse file of a remote file's size, and the map of what is in it.
///
/// All methods can be called by several threads. Clones are the same open object. The object is in
/// use, and so cannot be removed, until the last clone and the last [`ClaimedRange`] are dropped;
/// that makes what is present durable, as far as this works.
#[derive(Clone, Debug)]
pub struct CacheObject(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    name: String,
    size: u64,
    data: File,
    map: File,
    /// The directory and the name of the file whose time is the last use. None: anonymous.
    used: Option<(Arc<OwnedFd>, String)>,
    /// Taken before the lock on commits.
    commits: Mutex<()>,
    /// Taken before the lock on changes.
    changes: Mutex<()>,
    /// Blocks that threads of this process have claimed.
    claims: Mutex<Vec<Claimed>>,
    /// Blocks that this process has marked as present, and that are not durable.
    pending: Mutex<Vec<Range<u64>>>,
    /// Every error of write-back since the last commit that was carried to its end, by any process,
    /// is still to be reported by `data`. False: a commit was going on when `data` was opened, so
    /// fdatasync(2) of the other process may have taken the report.
    sees_errors: AtomicBool,
    /// The next commit is also that of blocks which other processes have marked as present: one of
    /// them may have been killed before its commit, and no other process would ever learn that the
    /// write-back of its blocks has failed.
    adopts: AtomicBool,
    /// Blocks that are lost could not be marked as absent.
    failed: AtomicBool,
}

/// What holds before fdatasync(2).
#[derive(Debug)]
struct Begun {
    /// `lost` and `forgotten` of the header.
    counts: (u64, u64),
    /// The blocks to commit that are present and not durable. Of the blocks that were to be
    /// committed, some may have been forgotten since: bytes that another process writes there
    /// during fdatasync(2) are not part of it.
    blocks: Vec<Range<u64>>,
}

/// An entry of the table of claims.
#[derive(Clone, Debug)]
struct Claimed {
    blocks: Range<u64>,
    /// `lost` of the header when the claim was made.
    lost: u64,
}

/// What came of an attempt to claim a range.
#[derive(Debug)]
pub enum Claim {
    /// The caller is the only one that downloads these blocks now.
    Got(ClaimedRange),
    /// All blocks of the range are present already.
    Present,
    /// Another thread or process downloads some of these blocks. Ask again a little later.
    Busy,
}

/// The right to download a range of blocks. It ends when this is dropped, and when the process
/// ends.
#[derive(Debug)]
pub struct ClaimedRange {
    object: Arc<Inner>,
    blocks: Range<u64>,
    locked: bool,
}

impl ClaimedRange {
    /// The claimed range in bytes: the whole blocks around the range that was asked for. Some of
    /// its blocks may be present.
    pub fn range(&self) -> Range<u64> {
        bytes_of(&self.blocks, self.object.size)
    }
}

impl Drop for ClaimedRange {
    fn drop(&mut self) {
        if self.locked {
            locks::release(&self.object.map, &map::place(&self.blocks));
        }
        // The entry goes last: as long as it is there, no other thread of this process takes the
        // same lock, which would be released here.
        let mut claims = self.object.claims.lock();
        if let Some(at) = claims.iter().position(|claim| claim.blocks == self.blocks) {
            claims.swap_remove(at);
        }
    }
}

/// The mutex of this process and the lock against other processes, on one byte of the header.
struct Held<'a> {
    map: &'a File,
    byte: Range<u64>,
    _mutex: MutexGuard<'a, ()>,
}

impl Drop for Held<'_> {
    fn drop(&mut self) {
        locks::release(self.map, &self.byte);
    }
}

impl CacheObject {
    /// Takes over the open files of an object whose header was checked. The caller holds the lock
    /// on the use of the object. `adopts`: other processes may have marked blocks.
    pub(super) fn new(
        name: String,
        size: u64,
        data: File,
        map: File,
        used: Option<(Arc<OwnedFd>, String)>,
        sees_errors: bool,
        adopts: bool,
    ) -> CacheObject {
        CacheObject(Arc::new(Inner {
            name,
            size,
            data,
            map,
            used,
            commits: Mutex::new(()),
            changes: Mutex::new(()),
            claims: Mutex::new(Vec::new()),
            pending: Mutex::new(Vec::new()),
            sees_errors: AtomicBool::new(sees_errors),
            // Otherwise the file that is open here may not report an error in their blocks.
            adopts: AtomicBool::new(adopts && sees_errors),
            failed: AtomicBool::new(false),
        }))
    }

    /// Size of the remote file in bytes.
    pub fn size(&self) -> u64 {
        self.0.size
    }

    /// Whether all blocks that overlap `range` are present.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidArgument`] for a range beyond the end of the file; those of pread(2).
    pub fn is_present(&self, range: &Range<u64>) -> Result<bool> {
        let blocks = self.0.around(range)?;
        self.0.all_present(&blocks)
    }

    /// The first run of absent blocks among the blocks that overlap the `max` bytes from `from` on,
    /// as bytes: whole blocks. None: nothing is missing there.
    ///
    /// # Errors
    /// Those of pread(2).
    pub fn next_missing(&self, from: u64, max: u64) -> Result<Option<Range<u64>>> {
        self.0.usable()?;
        let end = from.saturating_add(max).min(self.0.size).div_ceil(super::BLOCK);
        let first = (from / super::BLOCK).min(end);
        let (mut start, mut stop) = (first, None);
        map::walk(&self.0.map, &(first..end), |piece, bytes| {
            for (block, state) in (piece..).zip(bytes) {
                if map::is_present(*state) {
                    if block > start {
                        stop = Some(block);
                        return Ok(false);
                    }
                    start = block + 1;
                }
            }
            Ok(true)
        })
        .context(|| self.0.name.clone())?;
        let stop = stop.unwrap_or(end);
        Ok((start < stop).then(|| bytes_of(&(start..stop), self.0.size)))
    }

    /// Claims the blocks around `range`, so that no other thread and no other process downloads
    /// them at the same time.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidArgument`] for a range beyond the end of the file; those of fcntl(2),
    /// pread(2).
    pub fn claim(&self, range: &Range<u64>) -> Result<Claim> {
        let blocks = self.0.around(range)?;
        if self.0.all_present(&blocks)? {
            return Ok(Claim::Present);
        }
        let (lost, _) = map::read_counts(&self.0.map).context(|| self.0.name.clone())?;
        let Some(mut claimed) = self.0.claim_in_process(&blocks, lost) else {
            return Ok(Claim::Busy);
        };
        let place = map::place(&blocks);
        claimed.locked = locks::try_lock(&self.0.map, locks::Kind::Exclusive, &place)
            .context(|| self.0.name.clone())?;
        if !claimed.locked {
            return Ok(Claim::Busy);
        }
        // The process that had the claim before may have finished.
        if self.0.all_present(&blocks)? {
            return Ok(Claim::Present);
        }
        Ok(Claim::Got(claimed))
    }

    /// Writes downloaded bytes. They are not used before [`CacheObject::mark_present`].
    ///
    /// # Errors
    /// [`ErrorKind::NoSpace`] if the file system or the quota is full: the caller can prune the
    /// cache and try again. [`ErrorKind::InvalidArgument`] if one claim does not cover the range.
    /// Those of pwrite(2).
    pub fn write_at(&self, offset: u64, buf: &[u8]) -> Result<()> {
        let len = buf.len() as u64;
        let range = offset..offset.checked_add(len).ok_or_else(|| self.0.beyond_the_end())?;
        let blocks = self.0.around(&range)?;
        if blocks.is_empty() {
            return Ok(());
        }
        self.0.claim_of(&blocks)?;
        map::write_all_at(&self.0.data, offset, buf).context(|| self.0.name.clone())
    }

    /// Marks the blocks as present that lie wholly in `range`. The caller has written all their
    /// bytes; the last block of the file ends with the file.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidArgument`] if one claim does not cover the blocks. [`ErrorKind::Busy`]
    /// if write-back has failed, or may have failed, since the claim was made: the caller drops the
    /// claim, claims again, and downloads again. [`ErrorKind::NoSpace`] as
    /// [`CacheObject::write_at`].
    pub fn mark_present(&self, range: &Range<u64>) -> Result<()> {
        self.0.around(range)?;
        let blocks = blocks_within(range, self.0.size);
        if blocks.is_empty() {
            return Ok(());
        }
        let claim = self.0.claim_of(&blocks)?;
        let _held = self.0.hold_changes()?;
        let (lost, _) = map::read_counts(&self.0.map).context(|| self.0.name.clone())?;
        if lost != claim.lost {
            return Err(Error::new(
                ErrorKind::Busy,
                format!(
                    "{}: bytes may have been lost on the way to the disk; download them again",
                    self.0.name
                ),
            ));
        }
        let mark = |_, state| if state == DURABLE { DURABLE } else { PRESENT };
        map::replace(&self.0.map, &blocks, mark).context(|| self.0.name.clone())?;
        add(&mut self.0.pending.lock(), blocks);
        Ok(())
    }

    /// Marks the blocks as present that lie wholly in `range`, and makes their bytes zero. Writes
    /// nothing where the file has a hole.
    ///
    /// # Errors
    /// As [`CacheObject::write_at`] and [`CacheObject::mark_present`]; those of lseek(2).
    pub fn mark_zero(&self, range: &Range<u64>) -> Result<()> {
        let seek = SeekFrom::Data(range.start);
        let has_data = match rustix::fs::seek(&self.0.data, seek) {
            Ok(data) => data < range.end,
            Err(rustix::io::Errno::NXIO) => false,
            // The file system cannot tell.
            Err(_) => true,
        };
        if has_data {
            let zeros = vec![0; ZEROS.min((range.end - range.start) as usize)];
            let mut at = range.start;
            while at < range.end {
                let len = zeros.len().min((range.end - at) as usize);
                self.write_at(at, &zeros[..len])?;
                at += len as u64;
            }
        }
        self.mark_present(range)
    }

    /// Makes durable what this process has marked as present. The first call does the same for what
    /// other processes had marked when the object was opened. Several calls at the same time wait
    /// for each other; callers group their marks and call this every few seconds.
    ///
    /// # Errors
    /// Those of fdatasync(2), [`ErrorKind::NoSpace`] among them. All blocks of the object that were
    /// not durable are absent then, and the caller makes its readers forget
    /// ([`super::CacheReader::forget`]) what they have seen.
    pub fn commit(&self) -> Result<()> {
        self.0.commit()
    }

    /// Marks the blocks around `range` as absent, because their bytes are damaged. The bytes stay
    /// in the file until the blocks are downloaded again.
    ///
    /// # Errors
    /// Those of pwrite(2) and fdatasync(2).
    pub fn forget(&self, range: &Range<u64>) -> Result<()> {
        let blocks = self.0.around(range)?;
        self.0.make_absent(&blocks)?;
        // A block must not be durable in the map of the disk while its bytes are replaced.
        rustix::fs::fdatasync(&self.0.map).map_err(io::Error::from).context(|| self.0.name.clone())
    }

    /// Gives the space of the blocks that lie wholly in `range` back to the file system. No reader
    /// may be reading them, and the readers must have forgotten them
    /// ([`super::CacheReader::forget`]). Returns false, and leaves the blocks, if one of them is
    /// being downloaded.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidArgument`] if the object is not anonymous: readers of other processes
    /// could be reading the blocks. Those of pwrite(2) and fallocate(2).
    pub fn punch(&self, range: &Range<u64>) -> Result<bool> {
        self.0.around(range)?;
        if self.0.used.is_some() {
            return Err(Error::new(
                ErrorKind::InvalidArgument,
                format!("{}: no blocks of a shared object can be punched", self.0.name),
            ));
        }
        let blocks = blocks_within(range, self.0.size);
        if blocks.is_empty() {
            return Ok(true);
        }
        // An anonymous object has no other process, so the table of claims is enough.
        let Some(_claim) = self.0.claim_in_process(&blocks, 0) else { return Ok(false) };
        self.0.make_absent(&blocks)?;
        let bytes = bytes_of(&blocks, self.0.size);
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        rustix::fs::fallocate(&self.0.data, flags, bytes.start, bytes.end - bytes.start)
            .map_err(io::Error::from)
            .context(|| self.0.name.clone())?;
        Ok(true)
    }

    /// Number of bytes in present blocks.
    ///
    /// # Errors
    /// Those of pread(2).
    pub fn present_bytes(&self) -> Result<u64> {
        let (present, _) = map::count(&self.0.map, self.0.size).context(|| self.0.name.clone())?;
        Ok(present)
    }

    /// Reads bytes of the file, present or not; the caller asks before. It is for checks of the
    /// fetcher, such as digests of chunks.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidArgument`] for a range beyond the end of the file; those of pread(2).
    pub fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<()> {
        let end = offset.checked_add(buf.len() as u64).ok_or_else(|| self.0.beyond_the_end())?;
        self.0.around(&(offset..end))?;
        map::read_exact_at(&self.0.data, offset, buf).context(|| self.0.name.clone())
    }

    /// The data file and the map file, opened anew for reading only, for a
    /// [`super::CacheReader`] in another process. The map file holds the object in use.
    ///
    /// # Errors
    /// Those of open(2) on `/proc/self/fd`, and of fcntl(2).
    pub fn files_for_reader(&self) -> Result<(OwnedFd, OwnedFd)> {
        let reopen = |file: &File| {
            let path = format!("/proc/self/fd/{}", file.as_raw_fd());
            rustix::fs::open(&path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())
                .map_err(io::Error::from)
                .context(|| format!("{}: {path}", self.0.name))
        };
        let (data, map) = (reopen(&self.0.data)?, reopen(&self.0.map)?);
        if !locks::try_lock(&map, locks::Kind::Shared, &locks::IN_USE)
            .context(|| self.0.name.clone())?
        {
            return Err(Error::new(ErrorKind::Busy, self.0.name.clone()));
        }
        Ok((data, map))
    }
}

impl Inner {
    fn beyond_the_end(&self) -> Error {
        let text = format!("{}: a range beyond the end, {} bytes", self.name, self.size);
        Error::new(ErrorKind::InvalidArgument, text)
    }

    /// The blocks around a range, which is checked.
    fn around(&self, range: &Range<u64>) -> Result<Range<u64>> {
        self.usable()?;
        if range.end > self.size || range.start > range.end {
            return Err(self.beyond_the_end());
        }
        Ok(blocks_around(range))
    }

    /// Fails after the map could not be brought in line with what the disk has lost.
    fn usable(&self) -> Result<()> {
        if !self.failed.load(Ordering::Acquire) {
            return Ok(());
        }
        let text = format!(
            "{}: bytes are lost, and the map could not be corrected; repair the disk, then remove the object from the cache",
            self.name
        );
        Err(Error::new(ErrorKind::Io, text))
    }

    fn all_present(&self, blocks: &Range<u64>) -> Result<bool> {
        let mut all = true;
        map::walk(&self.map, blocks, |_, states| {
            all = states.iter().all(|state| map::is_present(*state));
            Ok(all)
        })
        .context(|| self.name.clone())?;
        Ok(all)
    }

    fn hold_changes(&self) -> Result<Held<'_>> {
        self.hold(&self.changes, locks::CHANGES)
    }

    fn hold<'a>(&'a self, mutex: &'a Mutex<()>, byte: Range<u64>) -> Result<Held<'a>> {
        let mutex = mutex.lock();
        locks::wait(&self.map, &byte).context(|| self.name.clone())?;
        Ok(Held { map: &self.map, byte, _mutex: mutex })
    }

    /// The claim that covers all of `blocks`.
    fn claim_of(&self, blocks: &Range<u64>) -> Result<Claimed> {
        let covers =
            |claim: &&Claimed| claim.blocks.start <= blocks.start && blocks.end <= claim.blocks.end;
        self.claims.lock().iter().find(covers).cloned().ok_or_else(|| {
            let text = format!("{}: bytes of blocks that are not claimed", self.name);
            Error::new(ErrorKind::InvalidArgument, text)
        })
    }

    /// Enters a claim against the other threads only.
    fn claim_in_process(self: &Arc<Self>, blocks: &Range<u64>, lost: u64) -> Option<ClaimedRange> {
        let mut claims = self.claims.lock();
        let overlaps =
            |claim: &Claimed| claim.blocks.start < blocks.end && blocks.start < claim.blocks.end;
        if claims.iter().any(overlaps) {
            return None;
        }
        claims.push(Claimed { blocks: blocks.clone(), lost });
        Some(ClaimedRange { object: Arc::clone(self), blocks: blocks.clone(), locked: false })
    }

    fn make_absent(&self, blocks: &Range<u64>) -> Result<()> {
        let _held = self.hold_changes()?;
        let step = || {
            let (lost, forgotten) = map::read_counts(&self.map)?;
            map::write_counts(&self.map, (lost, forgotten.wrapping_add(1)))?;
            map::replace(&self.map, blocks, |_, _| ABSENT)
        };
        step().context(|| self.name.clone())
    }

    fn commit(&self) -> Result<()> {
        self.usable()?;
        if self.adopts.swap(false, Ordering::AcqRel) {
            self.pending.lock().push(0..self.size.div_ceil(super::BLOCK));
        }
        if self.pending.lock().is_empty() && self.sees_errors.load(Ordering::Acquire) {
            return Ok(());
        }
        let _commit = self.hold(&self.commits, locks::COMMIT)?;
        // If blocks are forgotten during fdatasync(2), one of them may be present again with bytes
        // that came too late for it, so the call is repeated.
        loop {
            let pending = std::mem::take(&mut *self.pending.lock());
            match self.commit_once(&pending) {
                Ok(true) => return Ok(()),
                Ok(false) => self.pending.lock().extend(pending),
                Err(error) => return Err(error),
            }
        }
    }

    /// The steps of a commit, under the lock on commits. Returns false if blocks were forgotten
    /// meanwhile.
    fn commit_once(&self, pending: &[Range<u64>]) -> Result<bool> {
        let context = || self.name.clone();
        let begun = self.begin_commit(pending)?;
        if let Err(error) = rustix::fs::fdatasync(&self.data) {
            let _held = self.hold_changes()?;
            self.pending.lock().clear();
            self.lose(&[])?;
            self.sees_errors.store(true, Ordering::Release);
            map::write_syncing(&self.map, false).context(context)?;
            return Err(Error::io(self.name.clone(), error.into()));
        }
        self.end_commit(&begun)
    }

    /// What comes before fdatasync(2).
    fn begin_commit(&self, pending: &[Range<u64>]) -> Result<Begun> {
        let context = || self.name.clone();
        let _held = self.hold_changes()?;
        let header = map::read_header(&self.map, self.size).context(context)?;
        if header.syncing && !self.sees_errors.load(Ordering::Acquire) {
            // A process was killed between fdatasync(2), which may have failed, and the marks. The
            // own blocks were written through the file that is open here, which reports the failure
            // once more (Linux, lib/errseq.c: once for each open file).
            self.lose(pending)?;
        }
        map::write_syncing(&self.map, true).context(context)?;
        let counts = map::read_counts(&self.map).context(context)?;
        let blocks = map::present_runs(&self.map, pending).context(context)?;
        Ok(Begun { counts, blocks })
    }

    /// What comes after fdatasync(2) without an error. Returns false, and marks nothing, if blocks
    /// were forgotten since the counts were read.
    fn end_commit(&self, begun: &Begun) -> Result<bool> {
        let context = || self.name.clone();
        let _held = self.hold_changes()?;
        self.sees_errors.store(true, Ordering::Release);
        if self.used.is_none() {
            // No other process will ever ask whether a block is durable.
            map::write_syncing(&self.map, false).context(context)?;
            return Ok(true);
        }
        let unchanged = map::read_counts(&self.map).context(context)? == begun.counts;
        if unchanged {
            let mark = |_, state| if state == PRESENT { DURABLE } else { state };
            for blocks in &begun.blocks {
                map::replace(&self.map, blocks, mark).context(context)?;
            }
        }
        map::write_syncing(&self.map, false).context(context)?;
        Ok(unchanged)
    }

    /// Makes all present blocks absent that are not durable and not in `except`. The caller holds
    /// the locks on commits and on changes.
    fn lose(&self, except: &[Range<u64>]) -> Result<()> {
        lose(&self.map, self.size, except).map_err(|error| {
            self.failed.store(true, Ordering::Release);
            Error::io(format!("{}: bytes are lost", self.name), error)
        })
    }
}

/// Counts a loss, then makes the blocks absent that are present, not durable, and not in `except`.
pub(super) fn lose(map: &File, size: u64, except: &[Range<u64>]) -> io::Result<()> {
    let (lost, forgotten) = map::read_counts(map)?;
    map::write_counts(map, (lost.wrapping_add(1), forgotten))?;
    map::drop_present(map, size, except)
}

impl Drop for Inner {
    fn drop(&mut self) {
        let Some((directory, name)) = &self.used else { return };
        // Blocks of other processes are left to the other processes: their commit could take long.
        self.adopts.store(false, Ordering::Release);
        if let Err(error) = self.commit() {
            log::warn!("{error}");
        }
        touch(directory, name);
    }
}

/// Sets the time of the last use. If this fails, the object is removed from a full cache too early.
pub(super) fn touch(directory: &OwnedFd, name: &str) {
    let now = Timespec { tv_sec: 0, tv_nsec: UTIME_NOW };
    let times = Timestamps { last_access: now, last_modification: now };
    let _ = rustix::fs::utimensat(directory, name, &times, AtFlags::SYMLINK_NOFOLLOW);
}

/// Adds a range; a range that continues or repeats the last one becomes one with it.
fn add(ranges: &mut Vec<Range<u64>>, new: Range<u64>) {
    match ranges.last_mut() {
        Some(last) if last.start <= new.start && new.start <= last.end => {
            last.end = last.end.max(new.end);
        }
        _ => ranges.push(new),
    }
}

#[cfg(test)]
mod tests;
