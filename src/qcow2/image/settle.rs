//! Discards cached data of an image that may never have reached its disk.
//!
//! When a write-back fails, Linux keeps the pages, marks them clean, and never writes them again;
//! the next fdatasync(2) succeeds. A process that opens the file after that reads bytes that are on
//! no disk, until the host reclaims the pages. An engine that trusts them gives back clusters that
//! the tables on disk still name. It also lets a guest's flush succeed although that depends on
//! data that is lost later.
//!
//! A running disk stops writing at its first failed barrier ([`Image`](super::Image), P7). This
//! module is for the next program that opens the image. [`settle`] runs under the file locks of the
//! image and before its first byte is read. It writes back what is still dirty, drops all cached
//! pages, and fails if the write-back fails. Every later read then reads from the disk, or from a
//! page that was read from the disk.
//!
//! Images that are settled:
//!
//! | opened for | mark of the last writer | action |
//! |---|---|---|
//! | writing | absent: it closed the image, and its last barrier succeeded | none |
//! | writing | present: it was killed, lost power, or had a failed barrier | settled |
//! | writing | unavailable (block device, no user attributes, no locks): state unknown | settled |
//! | reading, backing files | present | settled, but an error is only a warning |
//! | check, `--full-check` | any | settled |
//!
//! The cost is one fdatasync(2), and that the cached part of the file is read again from the disk.
//! On a file system without user attributes and on a block device, each read-write mount pays it. A
//! backing file that cannot carry a mark is not settled: many disks share one, and each mount would
//! evict the pages that the others use. `cordisk check` settles such a file.
//!
//! A read-only open only warns, because the user may have to rescue the image from a disk that
//! accepts no more writes, where no fdatasync(2) can succeed.
//!
//! The kernel reports a write-back error once to each open file, and to a file opened later only if
//! no other file has reported it (`errseq_t`). A second attempt may therefore find no error
//! although bytes are lost. This is still correct, because the pages are dropped whether the
//! write-back fails or not.

use super::ImageReader;
use host::mutants::{Step, without};
use std::path::Path;
use std::sync::Arc;

use host::storage::{OpenMark, ReadAt, Sidecar};
use host::{Error, Result};

/// Makes every later read of an image that is opened for writing a read of its disk, unless its
/// last writer has closed it.
///
/// # Errors
/// I/O if the write-back fails. The cached pages are dropped even then, so that the next attempt
/// uses what the disk holds.
pub(super) fn settle(storage: &dyn ReadAt, sidecar: &dyn Sidecar) -> Result<()> {
    let is_closed = sidecar.open_mark().is_ok_and(|mark| mark == OpenMark::Absent);
    if is_closed || without(Step::SettleBeforeFirstRead) { Ok(()) } else { distrust(storage) }
}

/// Makes every later read a read of the disk, however the last writer ended. Called before an image
/// is checked.
///
/// # Errors
/// I/O if the write-back fails, as in a read-write open.
pub fn distrust(storage: &dyn ReadAt) -> Result<()> {
    match storage.drop_cache() {
        Err(error) if !without(Step::FailedWriteBackRefusesImage) => Err(Error::io(
            "not closed cleanly, and its last writes cannot be written to the disk (see the kernel log); \
             once the disk works, try again to use what the disk holds",
            error,
        )),
        _ => Ok(()),
    }
}

impl ImageReader {
    /// Opens an image as [`ImageReader::open`] does, after the caller has locked writers out. If
    /// the last writer did not close the image, reads return what the disk holds. `name` appears in
    /// the warning that is logged if the host cannot write back the dirty pages of that writer.
    ///
    /// # Errors
    /// As [`ImageReader::open`].
    pub fn open_locked<F: ReadAt + Sidecar>(storage: Arc<F>, name: &Path) -> Result<Self> {
        if storage.open_mark().is_ok_and(|mark| mark == OpenMark::Present)
            && let Err(error) = distrust(&*storage)
        {
            log::warn!("{}: {error}", name.display());
        }
        Self::open(storage)
    }
}
