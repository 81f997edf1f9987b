//! What lies below the overlay, read-only by type.

use std::path::{Path, PathBuf};

use crate::Result;
use crate::format::{BackingFormat, BackingReference};

/// What a range of the chain holds.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Content {
    /// Bytes that must be read.
    Data,
    /// Zeros, known without reading.
    Zero,
    /// No layer that was looked at holds anything: the layer below those decides, or it is zeros where there is none.
    Unallocated,
}

/// What the user allowed of backing files, and what is open already.
#[derive(Clone, Debug, Default)]
pub struct Gate {
    /// `--backing-format`: the format of the first backing file where its overlay's header does not say.
    pub backing_format: Option<BackingFormat>,
    /// (device, inode) of files that must not appear in the chain: the overlay.
    pub taken: Vec<(u64, u64)>,
}

/// Facts of one layer, for people and for QMP.
#[derive(Clone, Debug)]
pub struct LayerInfo {
    /// Name as it stands in the header of the image above.
    pub reference: BackingReference,
    /// The file that was opened.
    pub path: PathBuf,
    /// Its format.
    pub format: BackingFormat,
    /// Virtual size in bytes.
    pub size: u64,
    /// Bytes it occupies on the host.
    pub allocated_size: u64,
    /// Cluster size in bytes, for qcow2.
    pub cluster_size: Option<u64>,
}

/// The backing files, top first; immutable after open, at most 16.
#[derive(Debug)]
pub struct Chain {}

#[allow(clippy::todo)]
impl Chain {
    /// Opens the whole chain below an image that lies in `directory`.
    ///
    /// # Errors
    /// As documented.
    pub fn open(_first: &BackingReference, _directory: &Path, _gate: &Gate) -> Result<Chain> {
        todo!()
    }

    /// Virtual size in bytes of the first layer.
    pub fn size(&self) -> u64 {
        todo!()
    }

    /// The layers, top first.
    pub fn layers(&self) -> Vec<LayerInfo> {
        todo!()
    }

    /// Fills `buf` from `offset`; zeros past the end of a layer (and then not what lies below it).
    ///
    /// # Errors
    /// I/O, corruption.
    pub fn read(&self, _offset: u64, _buf: &mut [u8]) -> Result<()> {
        todo!()
    }

    /// What the first `depth` layers hold at `offset`, and for how many bytes, at most `max` (> 0).
    ///
    /// # Errors
    /// I/O, corruption.
    pub fn content(&self, _depth: usize, _offset: u64, _max: u64) -> Result<(Content, u64)> {
        todo!()
    }
}
