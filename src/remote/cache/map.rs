//! The map file of an object: a header of 4096 bytes, then one byte per block.
//!
//! ```text
//!  0  "CORDMAP\n"            64  syncing: 1 during fdatasync(2) of the data
//!  8  version, 32 bits       72  lost: count of failures that lost blocks, 64 bits
//! 12  block size, 32 bits    80  forgotten: count of other steps back to absent, 64 bits
//! 16  size of the file, 64 bits
//! 24  boot id, 36 characters as in /proc/sys/kernel/random/boot_id
//! ```
//! Numbers are big-endian. Bytes of blocks that are neither 1 nor 2 mean absent.

use std::fs::File;
use std::io;
use std::ops::Range;

use host::{Error, ErrorKind, Result};
use rustix::io::Errno;

use super::{BLOCK, LARGEST_FILE};

/// Offset of the byte of block 0, in bytes.
pub(super) const HEADER: u64 = 4096;
/// Length of the header's fields, in bytes.
const FIELDS: usize = 88;
const MAGIC: [u8; 8] = *b"CORDMAP\n";
const VERSION: u32 = 1;
const SYNCING: u64 = 64;
const LOST: u64 = 72;
/// Bytes of the map that are read at once.
const PIECE: u64 = 64 << 10;

pub(super) const ABSENT: u8 = 0;
pub(super) const PRESENT: u8 = 1;
pub(super) const DURABLE: u8 = 2;

/// The name of one run of the kernel, from its start to its end.
pub(super) type BootId = [u8; 36];

/// The header of a map file.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct MapHeader {
    /// Size of the remote file in bytes.
    pub size: u64,
    /// The boot in which blocks were marked as present.
    pub boot: [u8; 36],
    /// A process is in fdatasync(2) of the data, or was killed there.
    pub syncing: bool,
    /// How often non-durable blocks were given up after a failure.
    pub lost: u64,
    /// How often blocks were forgotten or punched.
    pub forgotten: u64,
}

impl MapHeader {
    /// Parses the first bytes of a map file.
    ///
    /// # Errors
    /// [`ErrorKind::Corrupt`] for everything that [`MapHeader::to_bytes`] does not write.
    pub fn parse(bytes: &[u8]) -> Result<MapHeader> {
        let bad = |why: &'static str| Error::new(ErrorKind::Corrupt, why);
        let short = || bad("the header is too short");
        if field::<8>(bytes, 0).ok_or_else(short)? != MAGIC {
            return Err(bad("not a map of the cache"));
        }
        let number = |at| field(bytes, at).map(u32::from_be_bytes).ok_or_else(short);
        let long = |at| field(bytes, at).map(u64::from_be_bytes).ok_or_else(short);
        if number(8)? != VERSION || u64::from(number(12)?) != BLOCK {
            return Err(bad("the map has another version or block size"));
        }
        let boot: BootId = field(bytes, 24).ok_or_else(short)?;
        let size = long(16)?;
        if size > LARGEST_FILE || !is_boot_id(&boot) {
            return Err(bad("the map has an impossible size or boot id"));
        }
        let syncing = match field::<1>(bytes, SYNCING as usize).ok_or_else(short)? {
            [0] => false,
            [1] => true,
            _ => return Err(bad("the map has an impossible mark of a commit")),
        };
        let (lost, forgotten) = (long(LOST as usize)?, long(LOST as usize + 8)?);
        let header = MapHeader { size, boot, syncing, lost, forgotten };
        if !bytes.starts_with(&header.to_bytes()) {
            return Err(bad("the map has bytes where this version has none"));
        }
        Ok(header)
    }

    /// The fields as [`MapHeader::parse`] reads them.
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(FIELDS);
        bytes.extend(MAGIC);
        bytes.extend(VERSION.to_be_bytes());
        bytes.extend((BLOCK as u32).to_be_bytes());
        bytes.extend(self.size.to_be_bytes());
        bytes.extend(self.boot);
        bytes.resize(SYNCING as usize, 0);
        bytes.push(self.syncing.into());
        bytes.resize(LOST as usize, 0);
        bytes.extend(self.lost.to_be_bytes());
        bytes.extend(self.forgotten.to_be_bytes());
        bytes
    }

    /// Number of blocks of the file.
    pub fn blocks(&self) -> u64 {
        self.size.div_ceil(BLOCK)
    }
}

fn field<const N: usize>(bytes: &[u8], at: usize) -> Option<[u8; N]> {
    bytes.get(at..at.checked_add(N)?)?.try_into().ok()
}

fn is_boot_id(boot: &BootId) -> bool {
    boot.iter().all(|byte| byte.is_ascii_hexdigit() || *byte == b'-')
}

/// The boot id of the running kernel.
pub(super) fn this_boot() -> Result<BootId> {
    const PATH: &str = "/proc/sys/kernel/random/boot_id";
    let text = std::fs::read(PATH).map_err(|error| Error::io(PATH, error))?;
    match field(text.trim_ascii_end(), 0) {
        Some(boot) if is_boot_id(&boot) => Ok(boot),
        _ => Err(Error::new(ErrorKind::UnsupportedFeature, format!("{PATH}: not a boot id"))),
    }
}

/// The length in bytes of the map of a file of `size` bytes.
pub(super) fn length(size: u64) -> u64 {
    HEADER + size.div_ceil(BLOCK)
}

/// The bytes of the map file that belong to `blocks`. They are at the same time the bytes that a
/// claim locks.
pub(super) fn place(blocks: &Range<u64>) -> Range<u64> {
    HEADER + blocks.start..HEADER + blocks.end
}

/// Reads and checks the header of a map of a file of `size` bytes, and the map's length.
pub(super) fn read_header(file: &File, size: u64) -> io::Result<MapHeader> {
    let wrong = |why: String| io::Error::new(io::ErrorKind::InvalidData, why);
    let mut bytes = [0; FIELDS];
    read_exact_at(file, 0, &mut bytes)?;
    let header = MapHeader::parse(&bytes).map_err(|error| wrong(error.to_string()))?;
    if header.size != size {
        return Err(wrong(format!("the map is of a file of {} bytes", header.size)));
    }
    if file.metadata()?.len() != length(size) {
        return Err(wrong("the map has a wrong length".to_owned()));
    }
    Ok(header)
}

/// Writes the whole header.
pub(super) fn write_header(file: &File, header: &MapHeader) -> io::Result<()> {
    write_all_at(file, 0, &header.to_bytes())
}

/// The counts `lost` and `forgotten` of the header.
pub(super) fn read_counts(file: &File) -> io::Result<(u64, u64)> {
    let mut bytes = [0; 16];
    read_exact_at(file, LOST, &mut bytes)?;
    let counts = u128::from_be_bytes(bytes);
    Ok(((counts >> 64) as u64, counts as u64))
}

/// Writes the counts. The caller holds the lock on changes.
pub(super) fn write_counts(file: &File, (lost, forgotten): (u64, u64)) -> io::Result<()> {
    let counts = u128::from(lost) << 64 | u128::from(forgotten);
    write_all_at(file, LOST, &counts.to_be_bytes())
}

/// Writes the mark that a process is in fdatasync(2). The caller holds the lock on commits.
pub(super) fn write_syncing(file: &File, syncing: bool) -> io::Result<()> {
    write_all_at(file, SYNCING, &[syncing.into()])
}

/// Whether a process is in fdatasync(2), or was killed there.
pub(super) fn read_syncing(file: &File) -> io::Result<bool> {
    let mut byte = [0];
    read_exact_at(file, SYNCING, &mut byte)?;
    Ok(byte != [0])
}

/// Whether the byte of a block means that its bytes can be read.
pub(super) fn is_present(state: u8) -> bool {
    matches!(state, PRESENT | DURABLE)
}

/// Calls `visit` with pieces of the map that cover `blocks` in ascending order: the first block of
/// the piece, and its bytes. `visit` returns false to end the walk.
pub(super) fn walk(
    file: &File,
    blocks: &Range<u64>,
    mut visit: impl FnMut(u64, &[u8]) -> io::Result<bool>,
) -> io::Result<()> {
    let Range { start: mut at, end } = place(blocks);
    let mut piece = vec![0; PIECE.min(end.saturating_sub(at)) as usize];
    while at < end {
        let len = PIECE.min(end - at);
        let Some(bytes) = piece.get_mut(..len as usize) else { return Ok(()) };
        read_exact_at(file, at, bytes)?;
        if !visit(at - HEADER, bytes)? {
            return Ok(());
        }
        at += len;
    }
    Ok(())
}

/// The blocks of `ranges` that are present and not durable.
pub(super) fn present_runs(file: &File, ranges: &[Range<u64>]) -> io::Result<Vec<Range<u64>>> {
    let mut runs: Vec<Range<u64>> = Vec::new();
    for range in ranges {
        walk(file, range, |first, states| {
            for (block, _) in (first..).zip(states).filter(|(_, state)| **state == PRESENT) {
                match runs.last_mut() {
                    Some(last) if last.end == block => last.end = block + 1,
                    _ => runs.push(block..block + 1),
                }
            }
            Ok(true)
        })?;
    }
    Ok(runs)
}

/// Replaces the bytes of `blocks`. The caller holds the lock on changes, so no other process
/// changes these bytes between the read and the write.
pub(super) fn replace(
    file: &File,
    blocks: &Range<u64>,
    mut new: impl FnMut(u64, u8) -> u8,
) -> io::Result<()> {
    let Range { start: mut at, end } = place(blocks);
    let mut piece = vec![0; PIECE.min(end.saturating_sub(at)) as usize];
    while at < end {
        let len = PIECE.min(end - at);
        let Some(bytes) = piece.get_mut(..len as usize) else { return Ok(()) };
        read_exact_at(file, at, bytes)?;
        if change(bytes, at - HEADER, &mut new) {
            write_all_at(file, at, bytes)?;
        }
        at += len;
    }
    Ok(())
}

/// Makes every present block absent that is not durable and not in one of `except`. The caller
/// holds the lock on changes.
pub(super) fn drop_present(file: &File, size: u64, except: &[Range<u64>]) -> io::Result<()> {
    replace(file, &(0..size.div_ceil(BLOCK)), |block, state| {
        let kept = state == DURABLE
            || state == PRESENT && except.iter().any(|range| range.contains(&block));
        if kept { state } else { ABSENT }
    })
}

/// Returns whether a byte has changed.
fn change(bytes: &mut [u8], first: u64, mut new: impl FnMut(u64, u8) -> u8) -> bool {
    let mut changed = false;
    for (block, byte) in (first..).zip(bytes) {
        let state = new(block, *byte);
        changed |= state != *byte;
        *byte = state;
    }
    changed
}

/// Number of bytes of the remote file in blocks that are present, and in those that are durable.
pub(super) fn count(file: &File, size: u64) -> io::Result<(u64, u64)> {
    let (mut present, mut durable) = (0, 0);
    walk(file, &(0..size.div_ceil(BLOCK)), |first, bytes| {
        for (block, state) in (first..).zip(bytes) {
            let len = BLOCK.min(size.saturating_sub(block.saturating_mul(BLOCK)));
            present += if is_present(*state) { len } else { 0 };
            durable += if *state == DURABLE { len } else { 0 };
        }
        Ok(true)
    })?;
    Ok((present, durable))
}

/// Reads exactly `buf`. The end of the file is an error.
pub(super) fn read_exact_at(file: &File, offset: u64, buf: &mut [u8]) -> io::Result<()> {
    std::os::unix::fs::FileExt::read_exact_at(file, buf, offset).map_err(|error| {
        match error.kind() {
            io::ErrorKind::UnexpectedEof => Errno::IO.into(),
            _ => error,
        }
    })
}

/// Writes all of `buf`.
pub(super) fn write_all_at(file: &File, offset: u64, buf: &[u8]) -> io::Result<()> {
    std::os::unix::fs::FileExt::write_all_at(file, buf, offset)
}

#[cfg(test)]
mod tests {
    use super::*;

    proptest::proptest! {
        /// Protects: a header is read as it was written, and nothing else is read: a changed byte
        /// makes another header or none.
        #[test]
        fn a_header_has_one_form(
            size in 0..=LARGEST_FILE,
            syncing: bool,
            lost: u64,
            forgotten: u64,
            at in 0..FIELDS,
            flip in 1..=u8::MAX,
        ) {
            let boot = *b"01234567-89ab-cdef-0123-456789abcdef";
            let header = MapHeader { size, boot, syncing, lost, forgotten };
            let mut bytes = header.to_bytes();
            proptest::prop_assert_eq!(bytes.len(), FIELDS);
            proptest::prop_assert_eq!(MapHeader::parse(&bytes).unwrap(), header);
            proptest::prop_assert!(MapHeader::parse(&bytes[..at]).is_err());
            bytes[at] ^= flip;
            if let Ok(other) = MapHeader::parse(&bytes) {
                proptest::prop_assert_ne!(other, header);
                proptest::prop_assert_eq!(other.to_bytes(), bytes);
            }
        }
    }

    /// Protects: a map cannot claim a size that makes the reader allocate more than it may.
    #[test]
    fn a_header_of_an_impossible_file_is_refused() {
        let boot = *b"01234567-89ab-cdef-0123-456789abcdef";
        for (size, boot) in [(LARGEST_FILE + 1, boot), (1, [b'\n'; 36])] {
            let header = MapHeader { size, boot, syncing: false, lost: 0, forgotten: 0 };
            assert_eq!(
                MapHeader::parse(&header.to_bytes()).unwrap_err().kind(),
                ErrorKind::Corrupt
            );
        }
        assert!(is_boot_id(&this_boot().unwrap()));
    }
}
