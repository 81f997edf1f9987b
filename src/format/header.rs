//! The header, its extensions and the backing file name (specification: "Header", "Header extensions").

use super::{FormatError, Geometry};

/// Format of a backing file. Never probed (data-safety 3.3): it stands in the header extension or is given by the user.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum BackingFormat {
    /// Plain bytes; its first bytes are never interpreted.
    Raw,
    /// qcow2.
    Qcow2,
}

/// What a header says of its backing file: a name, never opened by this room.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct BackingReference {
    /// The name as it stands in the header, checked to be UTF-8 without control characters (V6).
    pub name: String,
    /// The format extension, if there is one.
    pub format: Option<BackingFormat>,
}

/// How compressed clusters are compressed.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum CompressionType {
    /// Raw deflate.
    Zlib,
    /// Zstandard.
    Zstd,
}

/// Feature bits (specification: "incompatible_features", "autoclear_features").
pub mod feature {
    /// Incompatible bit 0: refcounts may be inaccurate.
    pub const DIRTY: u64 = 1;
    /// Incompatible bit 1: structures may be corrupt.
    pub const CORRUPT: u64 = 1 << 1;
}

/// A change of the header as one small write, atomic by lying inside one 512-byte sector, perhaps after another one that nothing points to yet.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct HeaderPatch {
    /// To be written and made durable first: offset in bytes and bytes. `None` where everything fits the one write.
    pub before: Option<(u64, Vec<u8>)>,
    /// The write that makes the change: offset in bytes and bytes, inside the first 512 bytes.
    pub patch: (u64, Vec<u8>),
    /// The header as it is afterwards.
    pub header: Header,
}

/// Single-field patches: offset in bytes and bytes to write, each inside the first 512 bytes.
pub mod patch {
    /// incompatible_features (bytes 72 to 79, version 3).
    pub fn incompatible(bits: u64) -> (u64, [u8; 8]) {
        (72, bits.to_be_bytes())
    }

    /// autoclear_features (bytes 88 to 95, version 3).
    pub fn autoclear(bits: u64) -> (u64, [u8; 8]) {
        (88, bits.to_be_bytes())
    }

    /// refcount_table_offset and refcount_table_clusters (bytes 48 to 59) in one write (R6).
    pub fn refcount_table(offset: u64, clusters: u32) -> (u64, [u8; 12]) {
        let mut bytes = [0; 12];
        bytes[..8].copy_from_slice(&offset.to_be_bytes());
        bytes[8..].copy_from_slice(&clusters.to_be_bytes());
        (48, bytes)
    }

    /// size, crypt_method (0), l1_size and l1_table_offset (bytes 24 to 47) in one write.
    pub fn size_and_l1(size: u64, l1_size: u32, l1_table_offset: u64) -> (u64, [u8; 24]) {
        let mut bytes = [0; 24];
        bytes[..8].copy_from_slice(&size.to_be_bytes());
        bytes[12..16].copy_from_slice(&l1_size.to_be_bytes());
        bytes[16..].copy_from_slice(&l1_table_offset.to_be_bytes());
        (24, bytes)
    }
}

/// A checked header.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Header {
    /// Version, cluster size, refcount width, virtual size.
    pub geometry: Geometry,
    /// Entries of the active L1 table.
    pub l1_size: u32,
    /// Where the active L1 table is, bytes.
    pub l1_table_offset: u64,
    /// Where the refcount table is, bytes.
    pub refcount_table_offset: u64,
    /// How many clusters the refcount table has.
    pub refcount_table_clusters: u32,
    /// Number of internal snapshots.
    pub nb_snapshots: u32,
    /// Incompatible feature bits; only known ones.
    pub incompatible: u64,
    /// Compatible feature bits, kept as they are.
    pub compatible: u64,
    /// Autoclear feature bits.
    pub autoclear: u64,
    /// How compressed clusters are compressed.
    pub compression: CompressionType,
    /// The backing file, if there is one.
    pub backing: Option<BackingReference>,
}

impl Header {
    /// Parses and checks.
    ///
    /// # Errors
    /// See [`FormatError`].
    #[allow(clippy::todo)]
    pub fn parse(_first: &[u8], _file_size: u64) -> Result<Header, FormatError> {
        todo!()
    }

    /// Refuses what we cannot write.
    ///
    /// # Errors
    /// See [`FormatError`].
    #[allow(clippy::todo)]
    pub fn check_writable(&self) -> Result<(), FormatError> {
        todo!()
    }

    /// Replaces or drops the backing reference.
    ///
    /// # Errors
    /// See [`FormatError`].
    #[allow(clippy::todo)]
    pub fn with_backing(&self, _backing: Option<&BackingReference>) -> Result<HeaderPatch, FormatError> {
        todo!()
    }
}

/// What a new image is to be.
#[derive(Clone, Debug)]
pub struct NewImage {
    /// Version 3, cluster size, 16-bit refcounts, virtual size.
    pub geometry: Geometry,
    /// Its backing file.
    pub backing: Option<BackingReference>,
}
