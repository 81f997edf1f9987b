//! The blocks of a disk that its boot needs, found from the file system on it.
//!
//! ```text
//!  boot_set ──▶ partitions ──▶ for each partition: what is it?
//!                                │ ext4          │ EFI, BIOS boot     │ another
//!                                ▼               ▼                    ▼
//!               plan ──▶ walk ──▶ ext4           its beginning        a note
//!               (which files)    (which blocks)
//!                                │
//!                                ▼
//!               ranges: in the order of the stages of a boot ([`stage`])
//! ```
//! A stream that knows no earlier start of an image brings these ranges first. A range too many
//! costs a little of the link, and a range that is missing costs one round trip: nothing here
//! decides about the content of a disk.
//!
//! # Why there is a reader of ext4 here
//! The crate `ext4-view` reads the same file systems, and the tests use it as the second opinion.
//! It is not used for the walk, for these reasons (version 1.0):
//! * It has no call for the blocks of a file. A reader that records offsets sees too much (each
//!   miss of its cache reads 32 KiB) and too little (a hit of the cache is not seen), and every
//!   byte of every file would have to be read from the server. Here the data of a file is found
//!   without reading it.
//! * The journal has no path, and numbers of inodes are not public.
//! * It refuses inline data, journals without checksums of version 3, META_BG and MMP, all of which
//!   a kernel boots from. The walk does not need to understand a journal.
//! * It allocates as many group descriptors as the superblock names (up to 2³²), before it reads
//!   one, and it has assertions. A panic of a program that is built with `panic = "abort"` ends the
//!   process. This crate bounds what it allocates and has no such place.
//!
//! For the same reasons the entries of an MBR are read here: `mbrman` 0.6 adds sector numbers of
//! logical partitions without a check, and follows a chain of up to 2³² of them. `gptman` reads
//! GUID partition tables, after its header has been checked here.
//!
//! # What is not read
//! XFS, btrfs, F2FS, NTFS, FAT, LVM, LUKS, RAID members, swap, squashfs and erofs are recognised
//! and named in the notes. There is no maintained library in Rust that reads XFS (`xfs-fuse` is a
//! program). `ntfs` reads NTFS and gives the positions of data, but what Windows needs to boot is
//! not in a list of names that can be kept here. Of a FAT file system with the boot loader of UEFI
//! the beginning is taken, [`plan::EFI_HEAD`] bytes: it is written once, from its beginning, and
//! the maintained crates for FAT give no positions.
//!
//! **Touches:** a [`BlockSource`] that is given to it. **Never:** opens, writes, connects; trusts a
//! number of the disk: bytes read, ranges, files, directories, links, depths and steps are
//! bounded ([`BootSetLimits`]).
//! **Locks:** none. **Invariants:** ranges do not overlap, are not empty and lie within the disk;
//! every call ends; a damaged file system gives notes and what was found before the damage.

#![forbid(unsafe_code)]
#![allow(rustdoc::private_intra_doc_links)]
#![cfg_attr(not(test), warn(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing))]

use std::fmt;
use std::ops::Range;
use std::sync::Arc;
use std::time::Instant;

mod budget;
mod bytes;
mod disk;
mod elf;
mod ext4;
mod failure;
#[cfg(any(test, feature = "testing"))]
mod fuzzing;
mod glob;
mod partitions;
mod plan;
mod ranges;
mod recognise;
mod stage;
mod walk;

#[cfg(test)]
mod tests;

#[cfg(any(test, feature = "testing"))]
pub use fuzzing::fuzz_disk;

/// Reads bytes of the disk.
pub trait BlockSource: Send + Sync {
    /// Returns the size of the disk in bytes.
    fn size(&self) -> u64;

    /// Fills `buf` with the bytes from `offset` on. The range lies within [`BlockSource::size`].
    ///
    /// # Errors
    /// The bytes cannot be read. The walk of the file system ends then.
    fn read(&self, offset: u64, buf: &mut [u8]) -> std::io::Result<()>;
}

/// Bounds of one search. When one of them is reached, the search ends, and [`BootSet::notes`] says
/// which.
#[derive(Clone, Debug)]
pub struct BootSetLimits {
    /// The search ends then. A call of [`BlockSource::read`] that has begun is not interrupted.
    pub until: Option<Instant>,
    /// Ranges of the result.
    pub most_ranges: usize,
    /// Bytes that are read from the source.
    pub most_bytes_read: u64,
    /// Bytes of all ranges of the result.
    pub most_bytes_found: u64,
    /// Bytes of one file; a longer file is taken up to them.
    pub most_bytes_of_a_file: u64,
    /// Files and directories that are looked at.
    pub most_files: u64,
    /// Directories below each other, below a directory that is taken with all that is in it.
    pub deepest_directory: usize,
}

impl Default for BootSetLimits {
    /// Enough for a whole distribution: boots touch some 100 MiB in 10,000 ranges, and the file
    /// system of a disk of 10 GiB has some MiB of metadata that belong to these files.
    fn default() -> Self {
        BootSetLimits {
            until: None,
            most_ranges: 1 << 18,
            most_bytes_read: 512 << 20,
            most_bytes_found: 2 << 30,
            most_bytes_of_a_file: 512 << 20,
            most_files: 100_000,
            deepest_directory: 16,
        }
    }
}

/// What was found.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct BootSet {
    /// Ranges of bytes of the disk, in the order in which a boot needs them. They do not overlap,
    /// and two that follow each other in the list are not adjacent.
    pub ranges: Vec<Range<u64>>,
    /// One line each: what was found, what was left out, and why.
    pub notes: Vec<String>,
    /// False if a limit, an error or a file system that is not read left something out.
    pub is_complete: bool,
}

impl BootSet {
    /// Returns the number of bytes of all ranges.
    pub fn bytes(&self) -> u64 {
        self.ranges.iter().map(|range| range.end - range.start).sum()
    }
}

/// Finds what a boot of the disk needs. If `paths` are given, they replace the built-in list of
/// files, after the metadata of the file systems: names of files and directories from the root of
/// the guest, with `*` and `?` within a name; a directory is taken with all that is in it.
///
/// # Errors
/// [`host::ErrorKind::InvalidArgument`] for a path that is not absolute. Nothing on the disk makes
/// an error: see [`BootSet::notes`].
pub fn boot_set(
    source: Arc<dyn BlockSource>,
    paths: &[String],
    limits: &BootSetLimits,
) -> host::Result<BootSet> {
    if let Some(path) = paths.iter().find(|path| !path.starts_with('/')) {
        return Err(host::Error::new(
            host::ErrorKind::InvalidArgument,
            format!("{path}: give the path from the root of the guest, beginning with /"),
        ));
    }
    Ok(plan::search(source, paths, limits))
}

impl fmt::Debug for dyn BlockSource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "BlockSource of {} bytes", self.size())
    }
}
