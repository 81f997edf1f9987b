//! The note of the running stream, kept in an extended attribute of the overlay. Its content is
//! defined by the caller.

use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt;

use super::Disk;
use crate::chain::{Gate, Namer};
use host::Result;
use host::error::Context;

pub use host::attributes::LONGEST_STREAM_NOTE;
pub use host::storage::FileId;

impl Disk {
    /// Identity of the overlay's file. A note contains it, so that the note of one file is not
    /// taken for that of another.
    pub fn file_id(&self) -> Option<&FileId> {
        self.file_id.as_ref()
    }

    /// The name of the backing file that the header contains now.
    pub fn backing_name(&self) -> Option<String> {
        self.reader().backing().map(|reference| reference.name)
    }

    /// Whether `name`, in the header of this overlay, would name the layer at `depth`: it passes
    /// `gate` and leads to the file that is open. Must be called while this process can still open
    /// files.
    ///
    /// # Errors
    /// A refusal of the name by the gate; errors of open(2).
    pub(crate) fn names_layer(&self, name: &str, depth: usize, gate: &Gate) -> Result<bool> {
        let owner =
            std::fs::metadata(&self.path).context(|| self.path.display().to_string())?.uid();
        let file = gate.identity_of(name, Namer::Above { path: &self.path, owner })?;
        Ok(self.chain().is_some_and(|chain| chain.identity(depth) == Some(file)))
    }

    /// The note that [`Disk::set_stream_note`] has left, in this or another process; `None` if
    /// there is none. The maker of the image may have written it, so it is untrusted.
    ///
    /// # Errors
    /// I/O errors; a note longer than [`LONGEST_STREAM_NOTE`].
    pub fn stream_note(&self) -> Result<Option<Vec<u8>>> {
        self.sidecar.stream_note().context(|| self.path.display().to_string())
    }

    /// Sets the note beside the overlay, or removes it. It outlives this process, and a loss of
    /// power once the host has written it back.
    ///
    /// # Errors
    /// The file cannot store a note; the disk is read-only.
    pub fn set_stream_note(&self, note: Option<&str>) -> Result<()> {
        self.image()?;
        self.sidecar.set_stream_note(note).context(|| self.path.display().to_string())
    }

    /// Hands the extended attributes of the overlay's file over to another process, because this
    /// process will not be allowed to change them. Returns the file for it.
    ///
    /// From then on that process keeps the note of the stream. It also removes the mark of an open
    /// image, once [`Disk::close`] has succeeded and [`Disk::may_lose_mark`] is true. `None` if the
    /// file has no attributes.
    ///
    /// # Errors
    /// I/O errors; the disk is read-only.
    pub fn entrust_attributes(&self) -> Result<Option<OwnedFd>> {
        self.image()?;
        self.sidecar.entrust_attributes().context(|| self.path.display().to_string())
    }
}
