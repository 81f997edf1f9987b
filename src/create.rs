//! `cordisk create`: a new overlay.

use std::path::PathBuf;

use crate::Result;
use crate::format::BackingFormat;

/// What `cordisk create` is asked for.
#[derive(Clone, Debug)]
pub struct CreateOptions {
    /// The file to create; must not exist.
    pub overlay: PathBuf,
    /// The backing file name as it is to stand in the header; relative names are relative to the overlay's directory.
    pub base: String,
    /// Its format.
    pub format: BackingFormat,
    /// Virtual size in bytes; the base's where `None`.
    pub size: Option<u64>,
    /// Cluster size in bytes.
    pub cluster_size: u64,
}

/// Creates the overlay, durably.
///
/// # Errors
/// As documented.
#[allow(clippy::todo)]
pub fn create(_options: &CreateOptions) -> Result<()> {
    todo!()
}
