//! Header extensions: their location, and the content of the four types that are interpreted (V15
//! to V19). All others are kept as bytes.

use std::ops::Range;

use super::{BackingFormat, FormatError, be32, be64, invalid, printable};

const END: u32 = 0;
const BACKING_FORMAT: u32 = 0xe279_2aca;
const FEATURE_NAMES: u32 = 0x6803_f857;
const BITMAPS: u32 = 0x2385_2875;
const CRYPTO: u32 = 0x0537_be77;
const DATA_FILE: u32 = 0x4441_5441;
/// An extension of this project: the pins of remote backing files. QEMU keeps it, as all types that
/// it does not know.
const PINS: u32 = u32::from_be_bytes(*b"cPIN");
/// Types that may occur only once. The specification says so of every extension, but QEMU accepts
/// several backing formats and feature name tables and uses the last one.
const ONCE: [u32; 3] = [BITMAPS, CRYPTO, DATA_FILE];

/// Bytes of type and length in front of the data of an extension.
const PREFIX: usize = 8;
/// Bytes of one entry of the feature name table: type, bit, and a name of 46 bytes.
const FEATURE_ENTRY: usize = 48;
/// Longest backing format in bytes (V16). QEMU's buffer holds this many and a terminating zero.
const MAX_FORMAT: usize = 15;
/// Most bitmaps (V18; QEMU: QCOW2_MAX_BITMAPS).
const MAX_BITMAPS: u32 = 65535;
/// Largest bitmap directory, in bytes (V18; QEMU: QCOW2_MAX_BITMAP_DIRECTORY_SIZE).
const MAX_BITMAP_DIRECTORY: u64 = 1024 * MAX_BITMAPS as u64;

/// One extension: its type and its place in the first cluster, including the padding to 8 bytes as
/// far as the padding fits.
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
    /// Parses the extensions from `start` to END, or to the end of `bytes`, where the backing file
    /// name or the next cluster begins (V15).
    pub(super) fn parse(bytes: &[u8], start: usize) -> Result<Extensions, FormatError> {
        Extensions::walk(bytes, start, bytes.len())
    }

    /// Parses extensions that [`Extensions::parse`] has accepted. `bytes` ends with END, or with
    /// the last extension if there is no END; before, it had `end` bytes. END may have a length, so
    /// it is checked against `end`; the bytes that this length counts are never read.
    pub(super) fn parse_again(
        bytes: &[u8],
        start: usize,
        end: usize,
    ) -> Result<Extensions, FormatError> {
        Extensions::walk(bytes, start, end)
    }

    /// Parses the extensions. The data of an extension must end inside `bytes`, and that of END
    /// before `limit`. As in QEMU, the padding need not fit, and the length of END is checked like
    /// any other.
    fn walk(bytes: &[u8], start: usize, limit: usize) -> Result<Extensions, FormatError> {
        let mut list: Vec<Extension> = Vec::new();
        let mut at = start;
        while at < bytes.len() {
            if bytes.len() - at < PREFIX {
                return invalid(format!(
                    "header extension at {at:#x} does not fit before {:#x}",
                    bytes.len()
                ));
            }
            let (magic, len) = (be32(bytes, at), be32(bytes, at + 4) as usize);
            let limit = if magic == END { limit } else { bytes.len() };
            let Some(end) = len.checked_add(at + PREFIX).filter(|&end| end <= limit) else {
                return invalid(format!(
                    "header extension {magic:#010x} at {at:#x} of {len} bytes does not fit before {limit:#x}"
                ));
            };
            if magic == END {
                return Ok(Extensions { list, end: at + PREFIX, terminated: true });
            }
            if ONCE.contains(&magic) && list.iter().any(|other| other.magic == magic) {
                return invalid(format!("header extension {magic:#010x} stands there twice"));
            }
            if magic == CRYPTO {
                return invalid(
                    "encryption header extension in an image that is not encrypted".into(),
                );
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

    /// Returns where the extensions end, END included, as an offset in the first cluster.
    pub(super) fn end(&self) -> usize {
        self.end
    }

    /// Returns whether there is an END.
    pub(super) fn terminated(&self) -> bool {
        self.terminated
    }

    /// Returns the backing format (V16). Callers ask only if there is a backing file name.
    pub(super) fn backing_format(
        &self,
        cluster: &[u8],
    ) -> Result<Option<BackingFormat>, FormatError> {
        // The length of every such extension is checked, also of those that a later one overrides.
        if let Some(long) = self
            .list
            .iter()
            .find(|extension| extension.magic == BACKING_FORMAT && extension.len > MAX_FORMAT)
        {
            return invalid(format!(
                "backing format has {} bytes, at most {MAX_FORMAT} are allowed",
                long.len
            ));
        }
        let Some(extension) = self.find(BACKING_FORMAT) else { return Ok(None) };
        let payload = extension.payload(cluster);
        // To QEMU this is a C string: it ends with the first NUL, and an empty one names no format.
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

    /// Returns the name of the backing format in the extension, escaped for a message.
    pub(super) fn backing_format_name(&self, cluster: &[u8]) -> Option<String> {
        let payload = self.find(BACKING_FORMAT)?.payload(cluster);
        let name = payload.split(|&byte| byte == 0).next().unwrap_or_default();
        Some(printable(&String::from_utf8_lossy(name)))
    }

    /// Returns the data of the bitmaps extension, 24 bytes.
    pub(super) fn bitmaps<'a>(&self, cluster: &'a [u8]) -> Option<&'a [u8]> {
        self.find(BITMAPS).map(|extension| extension.payload(cluster))
    }

    /// Returns the pins of remote backing files.
    pub(super) fn pins<'a>(&self, cluster: &'a [u8]) -> Option<&'a [u8]> {
        self.find(PINS).map(|extension| extension.payload(cluster))
    }

    /// Returns all extensions byte for byte in their order, with END, but with this backing format
    /// and these pins. The backing format takes the place of the first backing format extension, or
    /// comes first if there is none; the pins come last.
    pub(super) fn with_backing_format(
        &self,
        cluster: &[u8],
        format: Option<BackingFormat>,
        pins: &PinsChange<'_>,
    ) -> Vec<u8> {
        let mut bytes = Vec::new();
        let mut format = format.map(encode_backing_format);
        if self.find(BACKING_FORMAT).is_none() {
            bytes.extend(format.take().unwrap_or_default());
        }
        for extension in &self.list {
            match (extension.magic, pins) {
                (BACKING_FORMAT, _) => bytes.extend(format.take().unwrap_or_default()),
                (PINS, PinsChange::Keep) => bytes.extend(&cluster[extension.whole.clone()]),
                (PINS, _) | (FEATURE_NAMES, PinsChange::SetInsteadOfNames(_)) => {}
                _ => bytes.extend(&cluster[extension.whole.clone()]),
            }
            // The last extension may lack its padding.
            bytes.resize(bytes.len().next_multiple_of(8), 0);
        }
        if let PinsChange::Set(pins) | PinsChange::SetInsteadOfNames(pins) = pins {
            bytes.extend(encode(PINS, pins));
        }
        bytes.extend([0; PREFIX]);
        bytes
    }

    /// Returns the last extension of this type, which overrides the others.
    fn find(&self, magic: u32) -> Option<&Extension> {
        self.list.iter().rfind(|extension| extension.magic == magic)
    }
}

/// Returns the complete extension with its padding.
pub(super) fn encode_backing_format(format: BackingFormat) -> Vec<u8> {
    encode(BACKING_FORMAT, format.to_string().as_bytes())
}

/// What a rewritten header does with the pins.
pub(super) enum PinsChange<'a> {
    /// They stay.
    Keep,
    /// They are replaced by these.
    Set(&'a [u8]),
    /// They are replaced by these, and the feature name table goes. QEMU writes that table into
    /// each image, and it fills the first sector; it is used for messages only (V17).
    SetInsteadOfNames(&'a [u8]),
    /// They go.
    Remove,
}

fn encode(magic: u32, payload: &[u8]) -> Vec<u8> {
    let mut bytes = magic.to_be_bytes().to_vec();
    bytes.extend((payload.len() as u32).to_be_bytes());
    bytes.extend(payload);
    bytes.resize(bytes.len().next_multiple_of(8), 0);
    bytes
}

/// Returns the bit and the name of each incompatible feature in the feature name table. They are
/// used for messages only, so an invalid table gives an empty list (V17).
pub(super) fn feature_names(extensions: &[u8]) -> Vec<(u8, String)> {
    let Ok(all) = Extensions::parse(extensions, 0) else { return Vec::new() };
    let Some(table) = all.find(FEATURE_NAMES) else { return Vec::new() };
    if !table.len.is_multiple_of(FEATURE_ENTRY) {
        return Vec::new();
    }
    let entries =
        table.payload(extensions).chunks_exact(FEATURE_ENTRY).filter(|entry| entry[0] == 0);
    entries
        .map(|entry| {
            let name = entry[2..].split(|&byte| byte == 0).next().unwrap_or_default();
            (entry[1], printable(&String::from_utf8_lossy(name)))
        })
        .collect()
}

/// Checks the bitmaps extension as far as the header allows (V18) and returns the range of the
/// bitmap directory in bytes. `payload` is 24 bytes.
pub(super) fn check_bitmaps(payload: &[u8]) -> Result<Range<u64>, FormatError> {
    let (count, reserved, size, offset) =
        (be32(payload, 0), be32(payload, 4), be64(payload, 8), be64(payload, 16));
    if reserved != 0 {
        return invalid(format!("bitmaps extension has a reserved field that is {reserved:#x}"));
    }
    if !(1..=MAX_BITMAPS).contains(&count) {
        return invalid(format!("nb_bitmaps is {count}, must be 1 to {MAX_BITMAPS}"));
    }
    if !(1..=MAX_BITMAP_DIRECTORY).contains(&size) {
        return invalid(format!(
            "bitmap_directory_size is {size}, must be 1 to {MAX_BITMAP_DIRECTORY}"
        ));
    }
    match offset.checked_add(size) {
        Some(end) => Ok(offset..end),
        None => invalid(format!(
            "bitmap directory at {offset:#x} ({size} bytes) is not inside the file"
        )),
    }
}
