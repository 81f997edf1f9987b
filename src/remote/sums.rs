//! The chunk list of a file: SHA-256 of each chunk of 1 MiB. The SHA-256 of the list is the name of
//! the content.
//!
//! ```text
//!  0  "CORDSUMS"             16  size of the file, 64 bits
//!  8  version, 32 bits       24  SHA-256 of each chunk, 32 bytes each
//! 12  chunk size, 32 bits
//! ```
//! Numbers are big-endian. The last chunk ends with the file and is hashed with its real length.
//! A file of 40 GiB has a list of 1.3 MB. The list is flat, not a tree, because it is read as a
//! whole, once.
//!
//! **Touches:** files only in [`ChunkList::of_file`]. **Never:** trusts a list: the caller compares
//! [`ChunkList::digest`] with the name. **Locks:** none.
//!
//! **Invariants:** there are as many digests as the size has chunks.

use std::fs::File;
use std::io::Read;
use std::ops::Range;
use std::path::Path;
use std::sync::mpsc;

use host::error::Context;
use host::{Error, ErrorKind, Result};
use sha2::{Digest as _, Sha256};

use crate::pin::hex;

/// Size of a chunk in bytes. It is also what a demand miss fetches, so that a chunk can be checked
/// before the first of its bytes is used.
pub const CHUNK: u64 = 1 << 20;

/// Length of a list without its digests, in bytes.
const HEADER: usize = 24;
const MAGIC: [u8; 8] = *b"CORDSUMS";
const VERSION: u32 = 1;
/// Length of a digest in bytes.
const DIGEST: usize = 32;
/// Chunks that may wait for the hashing thread while a list is made: they bound its memory.
const READ_AHEAD: usize = 4;
/// SHA-256 of a chunk of zeros.
const ZEROS: [u8; DIGEST] = [
    0x30, 0xe1, 0x49, 0x55, 0xeb, 0xf1, 0x35, 0x22, 0x66, 0xdc, 0x2f, 0xf8, 0x06, 0x7e, 0x68, 0x10,
    0x46, 0x07, 0xe7, 0x50, 0xab, 0xb9, 0xd3, 0xb3, 0x65, 0x82, 0xb8, 0xaf, 0x90, 0x9f, 0xcb, 0x58,
];
/// What a digest of this program starts with.
const ALGORITHM: &str = "sha256:";

/// The digests of all chunks of a file.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct ChunkList {
    size: u64,
    digests: Vec<[u8; DIGEST]>,
    /// The digest of zeros of the length of the last chunk.
    last_zeros: [u8; DIGEST],
}

impl ChunkList {
    /// Reads `size` bytes and hashes them. One thread reads, another one hashes.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidArgument`] if `source` has another size;
    /// [`ErrorKind::UnsupportedFeature`] if no file can be that large; those of reading.
    pub fn make(source: &mut dyn Read, size: u64) -> Result<ChunkList> {
        let digests = std::thread::scope(|scope| {
            let (chunks, to_hash) = mpsc::sync_channel::<Vec<u8>>(READ_AHEAD);
            let hashing = std::thread::Builder::new()
                .name("hash".to_owned())
                .spawn_scoped(scope, move || to_hash.iter().map(|chunk| hash(&chunk)).collect())
                .context(|| "a thread that hashes chunks")?;
            let read = read_chunks(source, size, |chunk| {
                chunks.send(chunk).map_err(|_| Error::new(ErrorKind::Io, "hashing has ended"))
            });
            drop(chunks);
            let digests: Vec<[u8; DIGEST]> =
                hashing.join().map_err(|_| Error::new(ErrorKind::Io, "hashing has ended"))?;
            read.map(|()| digests)
        })?;
        ChunkList::new(size, digests)
    }

    /// [`ChunkList::make`] of the file at `path`: a regular file or a block device.
    ///
    /// # Errors
    /// Those of open(2), and of [`ChunkList::make`], which tell that the file has changed its size.
    pub fn of_file(path: &Path) -> Result<ChunkList> {
        let make = || {
            let mut file = File::open(path).context(|| "open")?;
            // The end of a block device is found by seeking; its metadata has no size.
            let size = rustix::fs::seek(&file, rustix::fs::SeekFrom::End(0))
                .and_then(|size| {
                    rustix::fs::seek(&file, rustix::fs::SeekFrom::Start(0)).map(|_| size)
                })
                .map_err(std::io::Error::from)
                .context(|| "lseek")?;
            ChunkList::make(&mut file, size)
        };
        make().context(|| path.display().to_string())
    }

    /// Parses a list.
    ///
    /// # Errors
    /// [`ErrorKind::Corrupt`] for everything that [`ChunkList::to_bytes`] does not write.
    pub fn parse(bytes: &[u8]) -> Result<ChunkList> {
        let bad = |why: &'static str| Error::new(ErrorKind::Corrupt, why);
        let Some((header, digests)) = bytes.split_at_checked(HEADER) else {
            return Err(bad("the chunk list is shorter than its header"));
        };
        let wanted = [&MAGIC[..], &VERSION.to_be_bytes(), &(CHUNK as u32).to_be_bytes()].concat();
        let Some(size) = header.strip_prefix(&wanted[..]).and_then(|size| size.try_into().ok())
        else {
            return Err(bad("not a chunk list of a version that this program knows"));
        };
        let size = u64::from_be_bytes(size);
        let (digests, rest) = digests.as_chunks();
        if !rest.is_empty() || digests.len() as u64 != size.div_ceil(CHUNK) {
            return Err(bad("the chunk list has a wrong length for the size of its file"));
        }
        ChunkList::new(size, digests.to_vec())
    }

    /// The list as [`ChunkList::parse`] reads it.
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(HEADER + self.digests.len() * DIGEST);
        bytes.extend(MAGIC);
        bytes.extend(VERSION.to_be_bytes());
        bytes.extend((CHUNK as u32).to_be_bytes());
        bytes.extend(self.size.to_be_bytes());
        bytes.extend(self.digests.as_flattened());
        bytes
    }

    /// SHA-256 of the list, which names the content, as 64 hexadecimal digits
    /// ([`crate::pin::Pin::digest`]).
    pub fn digest(&self) -> String {
        hex(&Sha256::digest(self.to_bytes()))
    }

    /// Size of the file in bytes.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Number of chunks.
    pub fn chunks(&self) -> u64 {
        self.digests.len() as u64
    }

    /// The bytes of a chunk; empty beyond the last one.
    pub fn range(&self, index: u64) -> Range<u64> {
        let at = |index: u64| index.saturating_mul(CHUNK).min(self.size);
        at(index)..at(index.saturating_add(1))
    }

    /// Whether `bytes` are the chunk `index`, whole.
    pub fn verify(&self, index: u64, bytes: &[u8]) -> bool {
        let range = self.range(index);
        bytes.len() as u64 == range.end - range.start
            && self.at(index).is_some_and(|digest| *digest == hash(bytes))
    }

    /// Whether the chunk consists of zeros.
    pub fn is_zero(&self, index: u64) -> bool {
        let is_last = index.saturating_add(1) == self.chunks();
        let zeros = if is_last { &self.last_zeros } else { &ZEROS };
        self.at(index) == Some(zeros)
    }

    fn at(&self, index: u64) -> Option<&[u8; DIGEST]> {
        self.digests.get(usize::try_from(index).ok()?)
    }

    fn new(size: u64, digests: Vec<[u8; DIGEST]>) -> Result<ChunkList> {
        check_size(size)?;
        let last_zeros = match size % CHUNK {
            0 => ZEROS,
            rest => hash(&vec![0; rest as usize]),
        };
        Ok(ChunkList { size, digests, last_zeros })
    }
}

/// The 64 hexadecimal digits, in lower case, of `sha256:HEX`.
///
/// # Errors
/// [`ErrorKind::InvalidArgument`] for any other text.
pub fn parse_digest(text: &str) -> Result<String> {
    let digits = text.strip_prefix(ALGORITHM).unwrap_or_default();
    if digits.len() == 2 * DIGEST && digits.bytes().all(|byte| byte.is_ascii_hexdigit()) {
        return Ok(digits.to_ascii_lowercase());
    }
    let text = format!("\"{text}\": not a digest; it is written sha256: and 64 hexadecimal digits");
    Err(Error::new(ErrorKind::InvalidArgument, text))
}

fn hash(bytes: &[u8]) -> [u8; DIGEST] {
    Sha256::digest(bytes).into()
}

fn check_size(size: u64) -> Result<()> {
    if i64::try_from(size).is_ok() {
        return Ok(());
    }
    let text = format!("a file of {size} bytes is larger than any file can be");
    Err(Error::new(ErrorKind::UnsupportedFeature, text))
}

/// Reads the chunks of `size` bytes one after the other, and tests that nothing comes after them.
fn read_chunks(
    source: &mut dyn Read,
    size: u64,
    mut chunk: impl FnMut(Vec<u8>) -> Result<()>,
) -> Result<()> {
    check_size(size)?;
    let mut at = 0;
    while at < size {
        let len = CHUNK.min(size - at);
        let mut bytes = Vec::with_capacity(len as usize);
        source.take(len).read_to_end(&mut bytes).context(|| format!("read at {at}"))?;
        at += bytes.len() as u64;
        if bytes.len() as u64 != len {
            let text = format!("ends after {at} bytes instead of {size}: has it changed?");
            return Err(Error::new(ErrorKind::InvalidArgument, text));
        }
        chunk(bytes)?;
    }
    if source.take(1).read_to_end(&mut Vec::new()).context(|| format!("read at {at}"))? != 0 {
        let text = format!("has more than {size} bytes: has it changed?");
        return Err(Error::new(ErrorKind::InvalidArgument, text));
    }
    Ok(())
}

#[cfg(test)]
mod tests;
