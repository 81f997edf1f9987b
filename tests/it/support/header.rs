//! Parses and writes qcow2 headers, for images that no tool makes. It shares no code with the crate
//! under test.

use std::fs;
use std::os::unix::fs::FileExt;
use std::path::Path;

/// Type of the backing format extension.
pub const EXT_BACKING_FORMAT: u32 = 0xE279_2ACA;
/// Byte offsets of header fields.
pub const AT_VERSION: u64 = 4;
pub const AT_BACKING_OFFSET: u64 = 8;
pub const AT_BACKING_SIZE: u64 = 16;
pub const AT_CLUSTER_BITS: u64 = 20;
pub const AT_SIZE: u64 = 24;
pub const AT_CRYPT_METHOD: u64 = 32;
pub const AT_L1_SIZE: u64 = 36;
pub const AT_L1_OFFSET: u64 = 40;
pub const AT_REFCOUNT_TABLE_OFFSET: u64 = 48;
pub const AT_REFCOUNT_TABLE_CLUSTERS: u64 = 56;
pub const AT_INCOMPATIBLE: u64 = 72;
pub const AT_COMPATIBLE: u64 = 80;
pub const AT_AUTOCLEAR: u64 = 88;
pub const AT_REFCOUNT_ORDER: u64 = 96;
pub const AT_HEADER_LENGTH: u64 = 100;

/// The first cluster of an image.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Header {
    /// The fixed fields, as in the file.
    pub fields: Vec<u8>,
    /// Type and payload, without the end marker.
    pub extensions: Vec<(u32, Vec<u8>)>,
    /// The bytes of the backing file name.
    pub backing: Option<Vec<u8>>,
}

fn be32(bytes: &[u8], at: u64) -> u32 {
    let at = usize::try_from(at).expect("small");
    u32::from_be_bytes(bytes[at..at + 4].try_into().expect("four bytes"))
}

fn be64(bytes: &[u8], at: u64) -> u64 {
    let at = usize::try_from(at).expect("small");
    u64::from_be_bytes(bytes[at..at + 8].try_into().expect("eight bytes"))
}

impl Header {
    pub fn load(path: &Path) -> Header {
        let image = fs::read(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        assert_eq!(&image[..4], b"QFI\xfb", "{} is not qcow2", path.display());
        let length =
            if be32(&image, AT_VERSION) == 2 { 72 } else { be32(&image, AT_HEADER_LENGTH) };
        let mut at = u64::from(length);
        let mut extensions = Vec::new();
        while be32(&image, at) != 0 {
            let len = be32(&image, at + 4);
            let start = usize::try_from(at + 8).expect("small");
            extensions.push((be32(&image, at), image[start..start + len as usize].to_vec()));
            at += 8 + u64::from(len).next_multiple_of(8);
        }
        let name_at = usize::try_from(be64(&image, AT_BACKING_OFFSET)).expect("small");
        let name_len = be32(&image, AT_BACKING_SIZE) as usize;
        let backing = (name_at != 0).then(|| image[name_at..name_at + name_len].to_vec());
        Header { fields: image[..length as usize].to_vec(), extensions, backing }
    }

    pub fn u64(&self, at: u64) -> u64 {
        be64(&self.fields, at)
    }

    pub fn u32(&self, at: u64) -> u32 {
        be32(&self.fields, at)
    }

    pub fn set_u64(&mut self, at: u64, value: u64) {
        let at = usize::try_from(at).expect("small");
        self.fields[at..at + 8].copy_from_slice(&value.to_be_bytes());
    }

    /// Writes the whole first cluster again.
    pub fn store(mut self, path: &Path) {
        let cluster = 1usize << self.u32(AT_CLUSTER_BITS);
        let mut tail = Vec::new();
        for (kind, payload) in &self.extensions {
            tail.extend(kind.to_be_bytes());
            tail.extend(u32::try_from(payload.len()).expect("small").to_be_bytes());
            tail.extend(payload);
            tail.resize(tail.len().next_multiple_of(8), 0);
        }
        tail.extend([0; 8]);
        let (name_at, name_len) = match &self.backing {
            None => (0, 0),
            Some(name) => {
                let at = self.fields.len() + tail.len();
                tail.extend(name);
                (at as u64, u32::try_from(name.len()).expect("small"))
            }
        };
        self.set_u64(AT_BACKING_OFFSET, name_at);
        self.fields[16..20].copy_from_slice(&name_len.to_be_bytes());
        let mut first = self.fields;
        first.extend(tail);
        assert!(first.len() <= cluster, "the header does not fit its cluster");
        first.resize(cluster, 0);
        poke(path, 0, &first);
    }
}

/// Loads the header, changes it and stores it.
pub fn edit(path: &Path, change: impl FnOnce(&mut Header)) {
    let mut header = Header::load(path);
    change(&mut header);
    header.store(path);
}

/// Overwrites bytes of a file.
pub fn poke(path: &Path, offset: u64, bytes: &[u8]) {
    let file = fs::OpenOptions::new()
        .write(true)
        .open(path)
        .unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    file.write_all_at(bytes, offset).expect("poke");
}
