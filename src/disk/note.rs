//! The note of the stream that runs, kept beside the overlay's bytes. What it says is up to who writes it.

use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt;

use super::Disk;
use crate::Result;
use crate::chain::{Gate, Namer};
use crate::error::Context;

pub use crate::attributes::LONGEST_STREAM_NOTE;
pub use crate::storage::FileId;

impl Disk {
    /// Which file the overlay is, for a note that must not be taken for that of another file.
    pub fn file_id(&self) -> Option<&FileId> {
        self.file_id.as_ref()
    }

    /// The name of the backing file that stands in the header now.
    pub fn backing_name(&self) -> Option<String> {
        self.reader().backing().map(|reference| reference.name)
    }

    /// Whether `name`, in the header of this overlay, would name the layer at `depth`: it passes
    /// `gate`, and leads to the file that is open. To be called while files can be opened.
    ///
    /// # Errors
    /// What the gate says of the name; those of open(2).
    pub fn names_layer(&self, name: &str, depth: usize, gate: &Gate) -> Result<bool> {
        let owner = std::fs::metadata(&self.path).context(|| self.path.display().to_string())?.uid();
        let file = gate.identity_of(name, Namer::Above { path: &self.path, owner })?;
        Ok(self.chain().is_some_and(|chain| chain.identity(depth) == Some(file)))
    }

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

    /// Leaves the attributes of the overlay's file, which is returned, to another process: this one
    /// will not be allowed to change them. That process keeps the note of the stream, and removes
    /// the mark of an open image once [`Disk::close`] has succeeded and [`Disk::is_usable`].
    /// `None` where the file has no attributes.
    ///
    /// # Errors
    /// I/O; the disk is read-only.
    pub fn entrust_attributes(&self) -> Result<Option<OwnedFd>> {
        self.image()?;
        self.reader().storage().entrust_attributes().context(|| self.path.display().to_string())
    }
}
