//! Encodes and decodes the bytes of qcow2: headers, table entries, refcounts, compressed clusters.
//!
//! **Touches:** nothing. **Never:** does I/O, takes a lock, reads the clock. **Invariants:** every
//! number that comes from an image is checked before it is used in a shift, a multiplication, an
//! allocation or a seek. Section names in these docs are those of QEMU's `docs/interop/qcow2.txt`,
//! the specification.

mod compressed;
mod coords;
mod entries;
mod header;
mod refcounts;
mod signature;

pub use compressed::decompress;
pub use coords::{
    ClusterCount, Geometry, GuestCluster, GuestOffset, GuestSubcluster, HostCluster, HostOffset,
};
pub use entries::{L1Entry, L2Entry, Mapping, RawL2Entry, be_words, raw_entries};
pub use header::{
    BackingFormat, BackingReference, CompressionType, Header, HeaderPatch, NewImage, Qcow2Facts,
    feature, patch, printable,
};
pub use refcounts::{RefcountBlock, decode_table_entry};
pub use signature::signature;

use std::fmt;

/// A defect in the bytes of an image. The text is one line that names the field and its value;
/// strings from images are escaped.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum FormatError {
    /// The first bytes are not those of a qcow2 version 2 or 3 image.
    NotQcow2(String),
    /// A field is outside its bounds, or two fields contradict each other.
    Invalid(String),
    /// A feature that is not implemented. The text names it, and a remedy if there is one.
    Unsupported(String),
    /// Metadata (a table entry, a compressed cluster) that the format does not allow.
    Corrupt(String),
}

impl fmt::Display for FormatError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            FormatError::NotQcow2(text)
            | FormatError::Invalid(text)
            | FormatError::Unsupported(text)
            | FormatError::Corrupt(text) => f.write_str(text),
        }
    }
}

impl std::error::Error for FormatError {}

impl From<FormatError> for host::Error {
    fn from(error: FormatError) -> Self {
        let kind = match error {
            FormatError::NotQcow2(_) | FormatError::Invalid(_) => host::ErrorKind::InvalidImage,
            FormatError::Unsupported(_) => host::ErrorKind::UnsupportedFeature,
            FormatError::Corrupt(_) => host::ErrorKind::Corrupt,
        };
        host::Error::new(kind, error.to_string())
    }
}
