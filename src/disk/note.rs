//! The note of the stream that runs, kept beside the overlay's bytes. What it says is up to who writes it.

use std::os::fd::OwnedFd;

use super::Disk;
use crate::Result;
use crate::error::Context;

pub use crate::storage::LONGEST_STREAM_NOTE;

impl Disk {
    /// What [`Disk::set_stream_note`] has left, perhaps another process, perhaps whoever made the image; `None` where there is nothing.
    ///
    /// # Errors
    /// I/O; it is longer than [`LONGEST_STREAM_NOTE`].
    pub fn stream_note(&self) -> Result<Option<Vec<u8>>> {
        self.reader().storage().stream_note().context(|| self.path.display().to_string())
    }

    /// Leaves a note beside the overlay, or removes it. It outlives this process, and a loss of power once the host has written it back.
    ///
    /// # Errors
    /// The overlay cannot have one, or not now; the disk is read-only.
    pub fn set_stream_note(&self, note: Option<&str>) -> Result<()> {
        self.image()?;
        self.reader().storage().set_stream_note(note).context(|| self.path.display().to_string())
    }

    /// Leaves [`Disk::set_stream_note`] to somebody else, who may change the attribute of the file, both returned. For a process that will not be
    /// allowed to. `None` where there can be no note.
    ///
    /// # Errors
    /// I/O; the disk is read-only.
    pub fn entrust_stream_note(&self) -> Result<Option<(OwnedFd, &'static str)>> {
        self.image()?;
        self.reader().storage().entrust_stream_note().context(|| self.path.display().to_string())
    }
}
