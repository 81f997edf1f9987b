//! The uppermost image, opened for writing or for reading only.

use crossbeam_channel::{Receiver, never};

use host::{Error, ErrorKind, Result};
use qcow2::format::GuestOffset;
use qcow2::image::{Extent, Image, ImageReader, SearchStep};

/// The overlay. A read-only overlay has nothing to write back, so its flush and close succeed at
/// once.
#[derive(Debug)]
pub(super) enum Overlay {
    Writable(Box<Image>),
    ReadOnly(Box<ImageReader>),
}

impl Overlay {
    /// The image for reading.
    pub fn reader(&self) -> &ImageReader {
        match self {
            Overlay::Writable(image) => image.reader(),
            Overlay::ReadOnly(reader) => reader,
        }
    }

    /// The image for writing; `None` if the overlay is read-only.
    pub fn writable(&self) -> Option<&Image> {
        match self {
            Overlay::Writable(image) => Some(image),
            Overlay::ReadOnly(_) => None,
        }
    }

    /// The image for writing.
    ///
    /// # Errors
    /// [`ErrorKind::ReadOnly`].
    pub fn image(&self) -> Result<&Image> {
        self.writable().ok_or_else(|| Error::new(ErrorKind::ReadOnly, "the disk is read-only"))
    }

    /// Maps the `max` bytes (> 0) at `at`, as far as one entry or a run of equal entries describes
    /// them.
    ///
    /// # Errors
    /// I/O errors, corruption.
    pub fn map(&self, at: GuestOffset, max: u64) -> Result<Extent> {
        match self {
            Overlay::Writable(image) => image.map(at, max),
            Overlay::ReadOnly(reader) => reader.map(at, max),
        }
    }

    /// As [`Image::flush`].
    pub fn flush(&self) -> Result<()> {
        self.writable().map_or(Ok(()), Image::flush)
    }

    /// As [`Image::flush_if_dirty`].
    pub fn flush_if_dirty(&self) -> Result<()> {
        self.writable().map_or(Ok(()), Image::flush_if_dirty)
    }

    /// As [`Image::close`], and removes the mark of an open image.
    pub fn close(&self) -> Result<()> {
        self.writable().map_or(Ok(()), |image| image.close().map(|()| image.end_writing()))
    }

    /// As [`Image::is_dirty`].
    pub fn is_dirty(&self) -> bool {
        self.writable().is_some_and(Image::is_dirty)
    }

    /// As [`Image::became_dirty`].
    pub fn became_dirty(&self) -> Receiver<()> {
        self.writable().map_or_else(never, Image::became_dirty)
    }

    /// As [`Image::commit_wanted`].
    pub fn commit_wanted(&self) -> Receiver<()> {
        self.writable().map_or_else(never, Image::commit_wanted)
    }

    /// As [`Image::commits`].
    pub fn commits(&self) -> u64 {
        self.writable().map_or(0, Image::commits)
    }

    /// As [`Image::highest_allocated`].
    pub fn highest_allocated(&self) -> u64 {
        self.writable().map_or(0, Image::highest_allocated)
    }

    /// As [`Image::search_step`].
    pub fn search_step(&self) -> Result<SearchStep> {
        self.writable().map_or(Ok(SearchStep::Nothing), Image::search_step)
    }

    /// As [`Image::may_lose_mark`].
    pub fn may_lose_mark(&self) -> bool {
        self.writable().is_none_or(Image::may_lose_mark)
    }

    /// As [`Image::is_usable`].
    pub fn is_usable(&self) -> bool {
        self.writable().is_none_or(Image::is_usable)
    }
}
