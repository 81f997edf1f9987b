//! What a partition holds, by its magic.

use std::ops::Range;

use crate::bytes::{le16, le32};
use crate::disk::Disk;
use crate::failure::Step;

/// Bytes of the beginning of a partition that are looked at: the magic of btrfs lies at 64 KiB.
const HEAD: u64 = 68 << 10;

/// What a partition holds.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Content {
    /// ext2, ext3 or ext4.
    Ext,
    /// FAT, by its boot sector.
    Fat,
    /// Something with a name that is not read here.
    Other(&'static str),
    /// Nothing that is known here.
    Unknown,
}

/// Magics: name, offset in bytes, bytes.
const MAGICS: &[(&str, usize, &[u8])] = &[
    ("XFS", 0, b"XFSB"),
    ("btrfs", 0x1_0040, b"_BHRfS_M"),
    ("NTFS", 3, b"NTFS    "),
    ("exFAT", 3, b"EXFAT   "),
    ("LUKS", 0, b"LUKS\xba\xbe"),
    ("LVM", 0x218, b"LVM2 001"),
    ("LVM", 0x18, b"LVM2 001"),
    ("BitLocker", 3, b"-FVE-FS-"),
    ("F2FS", 0x400, b"\x10\x20\xf5\xf2"),
    ("bcachefs", 0x1018, b"\xc6\x85\x73\xf6\x4e\x1a\x45\xca"),
    ("squashfs", 0, b"hsqs"),
    ("erofs", 0x400, b"\xe2\xe1\xf5\xe0"),
    ("swap", 0xff6, b"SWAPSPACE2"),
    ("a RAID member", 0x1000, b"\xfc\x4e\x2b\xa9"),
    ("a RAID member", 0, b"\xfc\x4e\x2b\xa9"),
    ("ISO 9660", 0x8001, b"CD001"),
];

/// Finds out what `range` of the disk holds.
pub(crate) fn recognise(disk: &mut Disk, range: &Range<u64>) -> Step<Content> {
    let len = range.end.saturating_sub(range.start).min(HEAD);
    let mut head = vec![0; usize::try_from(len).unwrap_or_default()];
    disk.read(range.start, &mut head)?;
    let has = |at: usize, magic: &[u8]| head.get(at..at + magic.len()) == Some(magic);
    if let Some((name, ..)) = MAGICS.iter().find(|(_, at, magic)| has(*at, magic)) {
        return Ok(Content::Other(name));
    }
    if le16(&head, 0x438) == Some(0xef53) {
        return Ok(Content::Ext);
    }
    // A boot sector has 55 AA in every case. FAT says so in one of two places.
    if le16(&head, 510) == Some(0xaa55) && (has(0x36, b"FAT") || has(0x52, b"FAT32")) {
        return Ok(Content::Fat);
    }
    if le32(&head, 0x400) == Some(0x4244_482b) || has(0x400, b"H+\x00\x04") {
        return Ok(Content::Other("HFS+"));
    }
    Ok(Content::Unknown)
}
