//! Compressed clusters.

use super::{CompressionType, FormatError};

/// Inflates one cluster.
///
/// # Errors
/// [`FormatError::Corrupt`].
#[allow(clippy::todo)]
pub fn decompress(_kind: CompressionType, _input: &[u8], _output: &mut [u8]) -> Result<(), FormatError> {
    todo!()
}
