//! What the cache of the host holds of an image and its disk does not.
//!
//! When a write-back fails, Linux keeps the pages, takes them for clean, and never writes them again;
//! the next fdatasync(2) succeeds. A process that opens the file after that reads bytes that are on no
//! disk, until the host needs the memory. An engine that trusts them gives back clusters that the
//! tables on disk still name, and lets a guest's flush succeed above data that goes away later.
//!
//! A running disk stops writing at its first failed barrier ([`Image`](super::Image), P7). This module
//! is for the next program that opens the image. [`settle`] runs under the locks of the image and
//! before its first byte is read. It writes back what is still dirty, drops all cached pages, and fails
//! if the write-back fails: every later read is a read of the disk, or of a page that was read from it.
//!
//! Which images it does this for:
//!
//! | opened for | mark of the last writer | done |
//! |---|---|---|
//! | writing | absent: it closed the image, and its last barrier was good | nothing |
//! | writing | present: it was killed, lost power, or had a failed barrier | settled |
//! | writing | none possible (block device, no user attributes, no locks) | settled: it cannot be known |
//! | reading, backing files | present | settled, but an error is only a warning |
//! | check, `--full-check` | whatever it is | settled |
//!
//! The cost is one fdatasync(2), and that what the host had in memory of the file is read once more. On
//! a file system without user attributes and on a block device each read-write mount pays it. A backing
//! file that cannot carry a mark is not settled: many disks share one, and each mount would take its
//! pages away from all others. `cordisk check` settles such a file.
//!
//! A read-only open only warns, because the image may have to be rescued from a disk that takes no
//! writes any more, where no fdatasync(2) will ever succeed.
//!
//! The error of a write-back is reported once to each open file, and to a later one only if no other
//! has seen it (`errseq_t`). So a second attempt may find no error although bytes are lost: it is right
//! all the same, because the pages are dropped whether the write-back fails or not.

use super::ImageReader;
use crate::mutants::{Step, without};
use crate::storage::{OpenMark, Storage};
use crate::{Error, Result};

/// Makes every later read of an image that is opened for writing a read of its disk, unless its last
/// writer has closed it.
///
/// # Errors
/// The write-back has failed. The copies in memory are dropped even then, so that the next attempt
/// goes on with what the disk holds.
pub(super) fn settle(storage: &dyn Storage) -> Result<()> {
    let is_closed = storage.open_mark().is_ok_and(|mark| mark == OpenMark::Absent);
    if is_closed || without(Step::SettleBeforeFirstRead) { Ok(()) } else { distrust(storage) }
}

/// Makes every later read a read of the disk, however the last writer has ended: before an image is
/// checked.
///
/// # Errors
/// As those of a read-write open: the write-back has failed.
pub fn distrust(storage: &dyn Storage) -> Result<()> {
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
    /// As [`ImageReader::open`], for an image whose writers are kept off by a lock. Where the last writer
    /// has not closed the image, reads show what the disk holds; `name` is for the warning if the host
    /// cannot write back what that writer left.
    ///
    /// # Errors
    /// As [`ImageReader::open`].
    pub fn open_locked(storage: std::sync::Arc<dyn Storage>, name: &std::path::Path) -> Result<Self> {
        if storage.open_mark().is_ok_and(|mark| mark == OpenMark::Present)
            && let Err(error) = distrust(&*storage)
        {
            log::warn!("{}: {error}", name.display());
        }
        Self::open(storage)
    }
}
