//! The header, its extensions and the backing file name (specification: "Header", "Header
//! extensions").
//!
//! ```text
//! cluster 0:  | header 72 / header_length | extensions … END | … | backing file name | … |
//!             0                           area.len()             backing_file_offset
//! ```
//! [`Header::parse`] checks every field before it is used (V2 to V21). `tables.rs` checks the
//! tables that the header points to, `rewrite.rs` changes the backing reference in one sector
//! write, and `new_image.rs` lays out a new image.

mod extensions;
mod facts;
mod new_image;
mod rewrite;
mod tables;
#[cfg(test)]
mod tests;

use std::fmt;
use std::ops::Range;

pub use facts::Qcow2Facts;
pub use new_image::NewImage;

use super::{FormatError, Geometry, signature};
use extensions::{Extensions, feature_names};

/// First four bytes of every qcow2 image.
const MAGIC: u32 = 0x5146_49fb;
/// Length in bytes of a version 2 header, which has no length field.
const V2_LENGTH: usize = 72;
/// Least length of a version 3 header, in bytes.
const V3_LENGTH: usize = 104;
/// Longest backing file name in bytes: the limit of the specification (V6).
const MAX_BACKING_NAME: usize = 1023;
/// Bytes of a sector. QEMU addresses disks in sectors and rounds the size down to whole ones.
const GUEST_SECTOR: u64 = 512;

/// Format of a backing file. It comes from the header extension or from the user, and is never
/// probed, because the guest controls the first bytes of a raw disk.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum BackingFormat {
    /// Plain bytes. The first bytes are never interpreted.
    Raw,
    /// qcow2.
    Qcow2,
}

impl fmt::Display for BackingFormat {
    /// Writes the name that the header extension and QMP use.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            BackingFormat::Raw => "raw",
            BackingFormat::Qcow2 => "qcow2",
        })
    }
}

/// The backing file according to a header: its name and format. This module never opens it.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct BackingReference {
    /// The name in the header, checked to be UTF-8 without control characters (V6).
    pub name: String,
    /// The format in the header extension, if there is one.
    pub format: Option<BackingFormat>,
}

/// Compression method of compressed clusters.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum CompressionType {
    /// Raw deflate.
    Zlib,
    /// Zstandard.
    Zstd,
}

/// Checks on the location of the tables that a header names.
#[derive(Clone, Copy, Debug)]
enum Places {
    /// The tables must lie inside a file of this many bytes, and none may overlap another.
    Inside(u64),
    /// Only what reading needs: the L1 table lies after the header and starts inside a file of this
    /// many bytes.
    Readable(u64),
    /// The tables must be at cluster boundaries, and nothing else is checked.
    Anywhere,
}

/// Accepted formats of a backing file.
#[derive(Clone, Copy, Debug)]
enum Formats {
    /// Those of [`BackingFormat`].
    Known,
    /// Any format, because the backing file is not opened.
    Any,
}

/// Feature bits (specification: "incompatible_features", "autoclear_features").
pub mod feature {
    /// Incompatible bit 0: refcounts may be inaccurate.
    pub const DIRTY: u64 = 1;
    /// Incompatible bit 1: structures may be corrupt.
    pub const CORRUPT: u64 = 1 << 1;
    /// Incompatible bit 2: guest data lies in another file.
    pub const DATA_FILE: u64 = 1 << 2;
    /// Incompatible bit 3: the compression type is not zlib.
    pub const COMPRESSION: u64 = 1 << 3;
    /// Incompatible bit 4: L2 entries are 16 bytes with subclusters.
    pub const EXTENDED_L2: u64 = 1 << 4;
    /// Autoclear bit 0: the persistent bitmaps are up to date.
    pub const AUTOCLEAR_BITMAPS: u64 = 1;
    /// Autoclear bit 1: the external data file is a raw image.
    pub const AUTOCLEAR_RAW_DATA_FILE: u64 = 1 << 1;
}

/// A change of the header by one small write, which is atomic because it lies inside one 512-byte
/// sector. Another write may have to come before it, to bytes that no header field points to yet.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct HeaderPatch {
    /// The write that must be durable first: offset in bytes, and the bytes. `None` if the patch
    /// alone makes the change.
    pub before: Option<(u64, Vec<u8>)>,
    /// The write that makes the change: offset in bytes, and the bytes, inside the first 512 bytes.
    pub patch: (u64, Vec<u8>),
    /// The header after the change.
    pub header: Header,
}

/// Single-field patches: offset in bytes and bytes to write, each inside the first 512 bytes.
pub mod patch {
    /// Sets incompatible_features (bytes 72 to 79, version 3).
    pub fn incompatible(bits: u64) -> (u64, [u8; 8]) {
        (72, bits.to_be_bytes())
    }

    /// Sets autoclear_features (bytes 88 to 95, version 3).
    pub fn autoclear(bits: u64) -> (u64, [u8; 8]) {
        (88, bits.to_be_bytes())
    }

    /// Sets refcount_table_offset and refcount_table_clusters (bytes 48 to 59) in one write (R6).
    pub fn refcount_table(offset: u64, clusters: u32) -> (u64, [u8; 12]) {
        let mut bytes = [0; 12];
        bytes[..8].copy_from_slice(&offset.to_be_bytes());
        bytes[8..].copy_from_slice(&clusters.to_be_bytes());
        (48, bytes)
    }

    /// Sets size, crypt_method (to 0), l1_size and l1_table_offset (bytes 24 to 47) in one write.
    pub fn size_and_l1(size: u64, l1_size: u32, l1_table_offset: u64) -> (u64, [u8; 24]) {
        let mut bytes = [0; 24];
        bytes[..8].copy_from_slice(&size.to_be_bytes());
        bytes[12..16].copy_from_slice(&l1_size.to_be_bytes());
        bytes[16..].copy_from_slice(&l1_table_offset.to_be_bytes());
        (24, bytes)
    }
}

/// A checked header.
///
/// The public fields must equal the header in the file. Code that writes one of [`patch`] must
/// change the field as well, because [`Header::with_backing`] may rewrite any of the first 512
/// bytes from the fields.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Header {
    /// Version, cluster size, refcount width, and the virtual size (rounded down to 512 bytes, as
    /// QEMU does).
    pub geometry: Geometry,
    /// Number of entries of the active L1 table.
    pub l1_size: u32,
    /// Host offset of the active L1 table, in bytes.
    pub l1_table_offset: u64,
    /// Host offset of the refcount table, in bytes.
    pub refcount_table_offset: u64,
    /// Size of the refcount table, in clusters.
    pub refcount_table_clusters: u32,
    /// Number of internal snapshots.
    pub nb_snapshots: u32,
    /// Incompatible feature bits; only known ones.
    pub incompatible: u64,
    /// Compatible feature bits, kept unchanged.
    pub compatible: u64,
    /// Autoclear feature bits.
    pub autoclear: u64,
    /// Compression method of compressed clusters.
    pub compression: CompressionType,
    /// The backing file, if there is one.
    pub backing: Option<BackingReference>,
    /// The backing format if it is an unsupported one. Only [`Header::parse_to_check`] and
    /// [`Header::parse_to_repair`] accept such a format.
    pub foreign_format: Option<String>,
    area: Area,
}

/// The first bytes of the image as read at open: header and extensions, END included. It preserves
/// the parts that have no public field.
#[derive(Clone, Eq, PartialEq)]
struct Area(Vec<u8>);

impl fmt::Debug for Area {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} bytes", self.0.len())
    }
}

impl Header {
    /// Parses a header and checks it (V2 to V21). `first` is the first `min(file_size, 2 MiB)`
    /// bytes of the file; `file_size` is in bytes.
    ///
    /// # Errors
    /// [`FormatError::NotQcow2`]; [`FormatError::Invalid`] for a field out of bounds;
    /// [`FormatError::Unsupported`] for features with which the image can be neither read nor
    /// written correctly (V7, V16, V19, V20).
    pub fn parse(first: &[u8], file_size: u64) -> Result<Header, FormatError> {
        Header::parse_at(first, Places::Inside(file_size), Formats::Known)
    }

    /// Parses a header for a repair: as [`Header::parse`], but the backing file may have any
    /// format, because a repair does not open it.
    ///
    /// # Errors
    /// As [`Header::parse`] otherwise.
    pub fn parse_to_repair(first: &[u8], file_size: u64) -> Result<Header, FormatError> {
        Header::parse_at(first, Places::Inside(file_size), Formats::Any)
    }

    /// Parses a header for reading: as [`Header::parse`], but with only the checks that reading
    /// needs. Refcounts, snapshots and bitmaps may lie beyond the end of the file. The file may end
    /// inside the L1 table; the missing entries are errors when they are used. A truncated file can
    /// thus be read up to its end.
    ///
    /// # Errors
    /// As [`Header::parse`] otherwise.
    pub fn parse_to_read(first: &[u8], file_size: u64) -> Result<Header, FormatError> {
        Header::parse_at(first, Places::Readable(file_size), Formats::Known)
    }

    /// Parses a header for the full check: as [`Header::parse`], but a refcount table may be
    /// missing, and the tables may lie outside the file, over the header or over each other (V10,
    /// V12, V21). The check itself reports these defects. The backing file may have any format,
    /// because it is not opened. `first` is the first 2 MiB of the file, padded with zeros if the
    /// file is shorter.
    ///
    /// # Errors
    /// As [`Header::parse`] otherwise.
    pub fn parse_to_check(first: &[u8]) -> Result<Header, FormatError> {
        Header::parse_at(first, Places::Anywhere, Formats::Any)
    }

    fn parse_at(first: &[u8], places: Places, formats: Formats) -> Result<Header, FormatError> {
        if first.len() < 4 || be32(first, 0) != MAGIC {
            return Err(FormatError::NotQcow2(match signature(first) {
                Some((name, format)) => format!(
                    "a {name} image, not qcow2; make one of it: qemu-img convert -f {format} -O qcow2"
                ),
                None => "not a qcow2 image (no QFI magic in the first bytes)".into(),
            }));
        }
        if first.len() < V2_LENGTH {
            return Err(FormatError::NotQcow2(format!(
                "file of {} bytes is shorter than a qcow2 header",
                first.len()
            )));
        }
        let version = be32(first, 4);
        if version == 3 && first.len() < V3_LENGTH {
            return Err(FormatError::NotQcow2(format!(
                "file of {} bytes is shorter than a version 3 header",
                first.len()
            )));
        }
        let v3 = version >= 3;
        let size = be64(first, 24);
        let geometry =
            Geometry::new(version, be32(first, 20), if v3 { be32(first, 96) } else { 4 }, size)?;
        let Some(cluster) = first.get(..geometry.cluster_size() as usize) else {
            return invalid(format!(
                "file of {} bytes is shorter than its first cluster of {} bytes",
                first.len(),
                geometry.cluster_size()
            ));
        };
        let length = header_length(cluster, v3)?;
        let [incompatible, compatible, autoclear] =
            if v3 { [72, 80, 88].map(|at| be64(cluster, at)) } else { [0; 3] };
        check_features(incompatible, autoclear, &cluster[length..])?;
        let geometry = if incompatible & feature::EXTENDED_L2 != 0 {
            geometry.with_extended_l2()?
        } else {
            geometry
        };
        let crypt_method = be32(cluster, 32);
        if crypt_method != 0 {
            return Err(FormatError::Unsupported(format!(
                "encrypted images are not supported (crypt_method {crypt_method})"
            )));
        }
        let compression =
            compression_type(if length > V3_LENGTH { cluster[104] } else { 0 }, incompatible)?;

        let name = backing_name_range(cluster, length)?;
        let extensions_end = name.as_ref().map_or(cluster.len(), |range| range.start);
        let extensions = Extensions::parse(&cluster[..extensions_end], length)?;
        let mut foreign_format = None;
        let backing = match name {
            Some(range) => {
                let format = match (extensions.backing_format(cluster), formats) {
                    (Err(FormatError::Unsupported(_)), Formats::Any) => {
                        foreign_format = extensions.backing_format_name(cluster);
                        None
                    }
                    (format, _) => format?,
                };
                Some(BackingReference { name: backing_name(&cluster[range])?, format })
            }
            None => None,
        };

        let header = Header {
            geometry: geometry.resized(size - size % GUEST_SECTOR)?,
            l1_size: be32(cluster, 36),
            l1_table_offset: be64(cluster, 40),
            refcount_table_offset: be64(cluster, 48),
            refcount_table_clusters: be32(cluster, 56),
            nb_snapshots: be32(cluster, 60),
            incompatible,
            compatible,
            autoclear,
            compression,
            backing,
            foreign_format,
            area: Area(cluster[..extensions.end()].to_vec()),
        };
        header.check_tables(size, be64(cluster, 64), extensions.bitmaps(cluster), places)?;
        Ok(header)
    }

    /// Refuses images that can be read but not written correctly.
    ///
    /// # Errors
    /// [`FormatError::Unsupported`]; the text names the feature and the remedy.
    pub fn check_writable(&self) -> Result<(), FormatError> {
        let refuse = |what: &str| {
            Err(FormatError::Unsupported(format!("{what}, or mount with --read-only")))
        };
        if self.incompatible & feature::CORRUPT != 0 {
            return refuse("image is marked corrupt: repair a copy with qemu-img check -r all");
        }
        if self.incompatible & feature::DIRTY != 0 {
            return refuse(
                "image was not closed cleanly (dirty bit): repair it with qemu-img check -r all",
            );
        }
        if self.nb_snapshots != 0 {
            return refuse(&format!(
                "image has internal snapshots ({}): remove them with qemu-img snapshot -d",
                self.nb_snapshots
            ));
        }
        if self.autoclear & feature::AUTOCLEAR_BITMAPS != 0 {
            return refuse(
                "image has persistent bitmaps, which would become stale: remove them with qemu-img bitmap --remove",
            );
        }
        Ok(())
    }
}

/// Returns where the header fields end and the extensions start, in bytes (V4).
fn header_length(cluster: &[u8], v3: bool) -> Result<usize, FormatError> {
    if !v3 {
        return Ok(V2_LENGTH);
    }
    let length = be32(cluster, 100) as usize;
    if length < V3_LENGTH || length > cluster.len() || !length.is_multiple_of(8) {
        return invalid(format!(
            "header_length is {length}, must be a multiple of 8 from 104 to the cluster size {}",
            cluster.len()
        ));
    }
    Ok(length)
}

/// Refuses features with which the image can be neither read nor written (V7). `extensions` are the
/// bytes from the end of the header fields on.
fn check_features(incompatible: u64, autoclear: u64, extensions: &[u8]) -> Result<(), FormatError> {
    let known = feature::DIRTY
        | feature::CORRUPT
        | feature::DATA_FILE
        | feature::COMPRESSION
        | feature::EXTENDED_L2;
    let unknown = incompatible & !known;
    if unknown != 0 {
        let names = feature_names(extensions);
        let list: Vec<String> = (0..64u8)
            .filter(|bit| unknown >> bit & 1 != 0)
            .map(|bit| match names.iter().find(|(of, _)| *of == bit) {
                Some((_, name)) => format!("bit {bit} \"{name}\""),
                None => format!("bit {bit}"),
            })
            .collect();
        return Err(FormatError::Unsupported(format!(
            "unsupported incompatible feature(s): {}",
            list.join(", ")
        )));
    }
    if incompatible & feature::DATA_FILE != 0 || autoclear & feature::AUTOCLEAR_RAW_DATA_FILE != 0 {
        return Err(FormatError::Unsupported(
            "images with an external data file are not supported".into(),
        ));
    }
    Ok(())
}

/// Checks the compression type (V20) as QEMU's validate_compression_type does.
fn compression_type(value: u8, incompatible: u64) -> Result<CompressionType, FormatError> {
    let bit = incompatible & feature::COMPRESSION != 0;
    match (value, bit) {
        (0, false) => Ok(CompressionType::Zlib),
        (1, true) => Ok(CompressionType::Zstd),
        (0 | 1, _) => invalid(format!(
            "compression_type is {value}, but incompatible feature bit 3 is {}",
            u8::from(bit)
        )),
        _ => Err(FormatError::Unsupported(format!(
            "compression_type is {value}, only 0 (zlib) and 1 (zstd) are known"
        ))),
    }
}

/// Returns where the backing file name is: after the header fields and inside the first cluster
/// (V5, and the length of V6).
fn backing_name_range(
    cluster: &[u8],
    header_length: usize,
) -> Result<Option<Range<usize>>, FormatError> {
    let (offset, len) = (be64(cluster, 8), be32(cluster, 16) as usize);
    if (offset, len) == (0, 0) {
        return Ok(None);
    }
    if offset == 0 || len == 0 || len > MAX_BACKING_NAME {
        return invalid(format!(
            "backing file name at {offset:#x} has {len} bytes, must be 1 to {MAX_BACKING_NAME}, or 0 at 0"
        ));
    }
    let start = usize::try_from(offset).ok().filter(|&start| start >= header_length);
    match start.and_then(|start| Some(start..start.checked_add(len)?)) {
        Some(range) if range.end <= cluster.len() => Ok(Some(range)),
        _ => invalid(format!(
            "backing file name at {offset:#x} ({len} bytes) is not between the header and the end of its cluster"
        )),
    }
}

/// Checks the characters of the backing file name (V6).
fn backing_name(bytes: &[u8]) -> Result<String, FormatError> {
    match std::str::from_utf8(bytes) {
        Ok(name) if !name.chars().any(char::is_control) => Ok(name.to_string()),
        Ok(name) => {
            invalid(format!("backing file name \"{}\" has control characters", printable(name)))
        }
        Err(_) => invalid(format!(
            "backing file name \"{}\" is not UTF-8",
            printable(&String::from_utf8_lossy(bytes))
        )),
    }
}

/// Escapes text from an image for a message: one line of printable characters, at most 256 of them.
pub fn printable(text: &str) -> String {
    text.escape_debug().take(256).collect()
}

/// Reads a big-endian number at `at`; the caller has checked the length.
fn be32(bytes: &[u8], at: usize) -> u32 {
    bytes[at..at + 4].iter().fold(0, |value, &byte| value << 8 | u32::from(byte))
}

/// Reads a big-endian number as [`be32`] does.
fn be64(bytes: &[u8], at: usize) -> u64 {
    bytes[at..at + 8].iter().fold(0, |value, &byte| value << 8 | u64::from(byte))
}

fn invalid<T>(text: String) -> Result<T, FormatError> {
    Err(FormatError::Invalid(text))
}
