//! Header extensions: where they are, and the four of them we look into (V15 to V19). All others are kept as bytes.

use std::ops::Range;

use super::{BackingFormat, FormatError, be32, be64, invalid, printable};

const END: u32 = 0;
const BACKING_FORMAT: u32 = 0xe279_2aca;
const FEATURE_NAMES: u32 = 0x6803_f857;
const BITMAPS: u32 = 0x2385_2875;
const CRYPTO: u32 = 0x0537_be77;
const DATA_FILE: u32 = 0x4441_5441;
/// Those that may stand there once.
const KNOWN: [u32; 5] = [BACKING_FORMAT, FEATURE_NAMES, BITMAPS, CRYPTO, DATA_FILE];

/// Type and length in front of the data of an extension, bytes.
const PREFIX: usize = 8;
/// One entry of the feature name table: type, bit, name of 46 bytes.
const FEATURE_ENTRY: usize = 48;
/// V16: what QEMU has room for, with its terminating zero.
const MAX_FORMAT: usize = 15;
/// V18, QEMU's QCOW2_MAX_BITMAPS.
const MAX_BITMAPS: u32 = 65535;
/// V18, QEMU's QCOW2_MAX_BITMAP_DIRECTORY_SIZE, bytes.
const MAX_BITMAP_DIRECTORY: u64 = 1024 * MAX_BITMAPS as u64;

/// One extension: its type and where it is in the first cluster, padding to 8 bytes included where
/// there is room for it.
#[derive(Clone, Debug, Eq, PartialEq)]
struct Extension {
    magic: u32,
    whole: Range<usize>,
    len: usize,
}

impl Extension {
    fn payload<'a>(&self, cluster: &'a [u8]) -> &'a [u8] {
        &cluster[self.whole.start + PREFIX..][..self.len]
    }
}

/// All extensions, in the order of the file.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(super) struct Extensions {
    list: Vec<Extension>,
    end: usize,
    terminated: bool,
}

impl Extensions {
    /// Walks the extensions from `start` to END, or to the end of `bytes`: where the backing file name or the next cluster begins (V15).
    pub(super) fn parse(bytes: &[u8], start: usize) -> Result<Extensions, FormatError> {
        Extensions::walk(bytes, start, bytes.len())
    }

    /// As [`Extensions::parse`], for `bytes` that end with END (or, without one, with the extensions)
    /// and were parsed before, when they had `end` bytes: END may have a length, which counts bytes
    /// that nobody reads.
    pub(super) fn parse_again(bytes: &[u8], start: usize, end: usize) -> Result<Extensions, FormatError> {
        Extensions::walk(bytes, start, end)
    }

    /// `limit`: the offset that no extension may reach beyond. As in QEMU the data must fit before it,
    /// the padding need not, and the length of END is checked like any other.
    fn walk(bytes: &[u8], start: usize, limit: usize) -> Result<Extensions, FormatError> {
        let mut list: Vec<Extension> = Vec::new();
        let mut at = start;
        while at < bytes.len() {
            if bytes.len() - at < PREFIX {
                return invalid(format!("header extension at {at:#x} does not fit before {:#x}", bytes.len()));
            }
            let (magic, len) = (be32(bytes, at), be32(bytes, at + 4) as usize);
            let limit = if magic == END { limit } else { bytes.len() };
            let Some(end) = len.checked_add(at + PREFIX).filter(|&end| end <= limit) else {
                return invalid(format!("header extension {magic:#010x} at {at:#x} of {len} bytes does not fit before {limit:#x}"));
            };
            if magic == END {
                return Ok(Extensions { list, end: at + PREFIX, terminated: true });
            }
            if KNOWN.contains(&magic) && list.iter().any(|other| other.magic == magic) {
                return invalid(format!("header extension {magic:#010x} stands there twice"));
            }
            if magic == CRYPTO {
                return invalid("encryption header extension in an image that is not encrypted".into());
            }
            if magic == BITMAPS && len != 24 {
                return invalid(format!("bitmaps extension has {len} bytes, must be 24"));
            }
            let padded = end.next_multiple_of(8).min(bytes.len());
            list.push(Extension { magic, whole: at..padded, len });
            at = padded;
        }
        Ok(Extensions { list, end: at, terminated: false })
    }

    /// Where they end, END included, as an offset in the first cluster.
    pub(super) fn end(&self) -> usize {
        self.end
    }

    /// Whether there is an END.
    pub(super) fn terminated(&self) -> bool {
        self.terminated
    }

    /// V16. To be asked only where there is a backing file name.
    pub(super) fn backing_format(&self, cluster: &[u8]) -> Result<Option<BackingFormat>, FormatError> {
        let Some(extension) = self.find(BACKING_FORMAT) else { return Ok(None) };
        let payload = extension.payload(cluster);
        if payload.len() > MAX_FORMAT {
            return invalid(format!("backing format has {} bytes, at most {MAX_FORMAT} are allowed", payload.len()));
        }
        // A C string to QEMU: it ends with the first NUL, and an empty one names no format.
        match payload.split(|&byte| byte == 0).next().unwrap_or_default() {
            b"" => Ok(None),
            b"raw" => Ok(Some(BackingFormat::Raw)),
            b"qcow2" => Ok(Some(BackingFormat::Qcow2)),
            other => Err(FormatError::Unsupported(format!(
                "backing format \"{}\" is not supported, only raw and qcow2 are",
                printable(&String::from_utf8_lossy(other))
            ))),
        }
    }

    /// The name of the backing format as it stands there, for a person to read.
    pub(super) fn backing_format_name(&self, cluster: &[u8]) -> Option<String> {
        let payload = self.find(BACKING_FORMAT)?.payload(cluster);
        let name = payload.split(|&byte| byte == 0).next().unwrap_or_default();
        Some(printable(&String::from_utf8_lossy(name)))
    }

    /// The data of the bitmaps extension, 24 bytes.
    pub(super) fn bitmaps<'a>(&self, cluster: &'a [u8]) -> Option<&'a [u8]> {
        self.find(BITMAPS).map(|extension| extension.payload(cluster))
    }

    /// All extensions byte for byte in their order, with END, but with this backing format: in its place, or first where there was none.
    pub(super) fn with_backing_format(&self, cluster: &[u8], format: Option<BackingFormat>) -> Vec<u8> {
        let mut bytes = Vec::new();
        if self.find(BACKING_FORMAT).is_none() {
            bytes.extend(format.map_or(Vec::new(), encode_backing_format));
        }
        for extension in &self.list {
            match extension.magic {
                BACKING_FORMAT => bytes.extend(format.map_or(Vec::new(), encode_backing_format)),
                _ => bytes.extend(&cluster[extension.whole.clone()]),
            }
            // The last one may lack its padding.
            bytes.resize(bytes.len().next_multiple_of(8), 0);
        }
        bytes.extend([0; PREFIX]);
        bytes
    }

    fn find(&self, magic: u32) -> Option<&Extension> {
        self.list.iter().find(|extension| extension.magic == magic)
    }
}

/// The whole extension, padded.
pub(super) fn encode_backing_format(format: BackingFormat) -> Vec<u8> {
    let name = format.to_string();
    let mut bytes = BACKING_FORMAT.to_be_bytes().to_vec();
    bytes.extend((name.len() as u32).to_be_bytes());
    bytes.extend(name.as_bytes());
    bytes.resize(bytes.len().next_multiple_of(8), 0);
    bytes
}

/// Bit and name of the incompatible features that the feature name table names; for messages only, so anything odd gives nothing (V17).
pub(super) fn feature_names(extensions: &[u8]) -> Vec<(u8, String)> {
    let Ok(all) = Extensions::parse(extensions, 0) else { return Vec::new() };
    let Some(table) = all.find(FEATURE_NAMES) else { return Vec::new() };
    if !table.len.is_multiple_of(FEATURE_ENTRY) {
        return Vec::new();
    }
    let entries = table.payload(extensions).chunks_exact(FEATURE_ENTRY).filter(|entry| entry[0] == 0);
    entries
        .map(|entry| {
            let name = entry[2..].split(|&byte| byte == 0).next().unwrap_or_default();
            (entry[1], printable(&String::from_utf8_lossy(name)))
        })
        .collect()
}

/// V18 as far as the header tells: where the bitmap directory is. `payload` is 24 bytes.
pub(super) fn check_bitmaps(payload: &[u8]) -> Result<Range<u64>, FormatError> {
    let (count, reserved, size, offset) = (be32(payload, 0), be32(payload, 4), be64(payload, 8), be64(payload, 16));
    if reserved != 0 {
        return invalid(format!("bitmaps extension has a reserved field that is {reserved:#x}"));
    }
    if !(1..=MAX_BITMAPS).contains(&count) {
        return invalid(format!("nb_bitmaps is {count}, must be 1 to {MAX_BITMAPS}"));
    }
    if !(1..=MAX_BITMAP_DIRECTORY).contains(&size) {
        return invalid(format!("bitmap_directory_size is {size}, must be 1 to {MAX_BITMAP_DIRECTORY}"));
    }
    match offset.checked_add(size) {
        Some(end) => Ok(offset..end),
        None => invalid(format!("bitmap directory at {offset:#x} ({size} bytes) is not inside the file")),
    }
}
