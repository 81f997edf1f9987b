//! The full check (V28): counts every reference and compares the refcounts with the counts, with
//! the texts and numbers of `qemu-img check`. Also gives leaked clusters back.
//!
//! ```text
//! header ─► L1 ─► L2 tables ─► clusters ─┐
//!        └► refcount table ─► blocks ────┼─► references.rs: references ─┐
//!                               └─► counted.rs: refcounts ──────────────┴─► corruptions, leaks
//! ```
//! **Touches:** the storage, for reading. **Never:** trusts a table; uses [`super::Tables`] or
//! [`super::Allocator`] to read, because they reject what the check must report; changes anything
//! except refcounts that are too high, and those only through the write-back pass.
//! **Locks:** none; the caller has locked other programs out of the file. **Invariants:** memory is
//! bounded by the file (V29). Each L2 table and each refcount block is read once.

use std::fmt;

use super::{HEADER_AREA, Image};
use crate::format::{Header, feature};
use host::mutants::Step;
use host::storage::{OpenMark, ReadAt};
use host::{Error, ErrorKind, Result};

mod counted;
mod references;
mod walk;

pub(super) use counted::{allocated_clusters, counted_end};
pub(super) use references::References;
pub(super) use walk::MOST_CLUSTERS;
use walk::Walk;

/// Findings that are kept one by one, so that memory is bounded. Further findings are only counted.
const LISTED: usize = 1000;

/// One defect of an image. Its text is that of `qemu-img check`.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Finding {
    /// The refcount of a cluster differs from the number of references to it: too low is a
    /// corruption, too high a leak.
    Refcount {
        /// The cluster.
        cluster: u64,
        /// The refcount on disk.
        refcount: u64,
        /// The number of references.
        references: u64,
    },
    /// A reference reaches beyond the end of the file by a cluster or more.
    OutsideTheFile {
        /// Host offset of its start, in bytes.
        offset: u64,
        /// Its length in bytes.
        size: u64,
    },
    /// A cluster has more references than a refcount of this image can hold.
    TooManyReferences {
        /// Host offset of the cluster, in bytes.
        offset: u64,
    },
    /// An L1 entry has reserved bits (V22).
    ReservedBitsInL1 {
        /// The entry.
        entry: u64,
    },
    /// An L2 table is not at a cluster boundary (V22).
    UnalignedL2Table {
        /// Host offset of the table, in bytes.
        offset: u64,
    },
    /// COPIED of an L1 entry contradicts the refcount (R9).
    CopiedL2Table {
        /// Index of the entry.
        l1_index: usize,
        /// The entry.
        entry: u64,
        /// The refcount of the L2 table.
        refcount: u64,
    },
    /// An L2 entry has reserved bits (V24).
    ReservedBitsInL2 {
        /// The entry.
        entry: u64,
    },
    /// A cluster is not at a cluster boundary (V24).
    UnalignedCluster {
        /// Host offset of the cluster, in bytes.
        offset: u64,
        /// Whether the entry reads as zero.
        zero: bool,
    },
    /// COPIED of an L2 entry contradicts the refcount (R9).
    CopiedCluster {
        /// The entry.
        entry: u64,
        /// The refcount of the cluster.
        refcount: u64,
    },
    /// The entry of a compressed cluster has COPIED (R9, V26).
    CopiedCompressed {
        /// Host offset of the cluster, in bytes.
        offset: u64,
    },
    /// The extended entry of a compressed cluster has a subcluster bitmap (V30).
    CompressedWithBitmap {
        /// Index of the entry in its L2 table.
        index: usize,
        /// The descriptor.
        entry: u64,
    },
    /// An extended entry has a subcluster that is both allocated and zero (V30).
    CorruptBitmap {
        /// Host offset of the cluster, in bytes.
        offset: u64,
    },
    /// An extended entry has an allocated subcluster and no host cluster (V30).
    AllocatedWithoutCluster,
    /// An entry of the refcount table has reserved bits (V23).
    ReservedBitsInRefcountTable {
        /// Index of the entry.
        index: usize,
    },
    /// A refcount block is not at a cluster boundary (V23).
    UnalignedRefcountBlock {
        /// Index in the refcount table.
        index: usize,
    },
    /// A refcount block is outside the file (V23).
    RefcountBlockOutside {
        /// Index in the refcount table.
        index: usize,
    },
    /// The cluster of a refcount block has more than this reference (V23).
    RefcountBlockShared {
        /// Index in the refcount table.
        index: usize,
        /// Number of references to the cluster.
        references: u64,
    },
    /// The refcount of a cluster cannot be read, because the entry of its refcount block is no
    /// valid offset.
    NoRefcount {
        /// The cluster.
        cluster: u64,
    },
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Finding::Refcount { cluster, refcount, references } => {
                let word = if refcount < references { "ERROR" } else { "Leaked" };
                write!(f, "{word} cluster {cluster} refcount={refcount} reference={references}")
            }
            Finding::OutsideTheFile { offset, size } => write!(
                f,
                "ERROR: counting reference for region exceeding the end of the file by one cluster or more: offset {offset:#x} size {size:#x}"
            ),
            Finding::TooManyReferences { offset } => {
                write!(f, "ERROR: overflow cluster offset={offset:#x}")
            }
            Finding::ReservedBitsInL1 { entry } => {
                write!(f, "ERROR found L1 entry with reserved bits set: {entry:x}")
            }
            Finding::UnalignedL2Table { offset } => {
                write!(
                    f,
                    "ERROR l2_offset={offset:x}: Table is not cluster aligned; L1 entry corrupted"
                )
            }
            Finding::CopiedL2Table { l1_index, entry, refcount } => {
                write!(
                    f,
                    "ERROR OFLAG_COPIED L2 cluster: l1_index={l1_index} l1_entry={entry:x} refcount={refcount}"
                )
            }
            Finding::ReservedBitsInL2 { entry } => {
                write!(f, "ERROR found l2 entry with reserved bits set: {entry:x}")
            }
            Finding::UnalignedCluster { offset, zero } => {
                let what = if zero { "Preallocated cluster" } else { "Data cluster" };
                write!(
                    f,
                    "ERROR offset={offset:x}: {what} is not properly aligned; L2 entry corrupted."
                )
            }
            Finding::CopiedCluster { entry, refcount } => {
                write!(f, "ERROR OFLAG_COPIED data cluster: l2_entry={entry:x} refcount={refcount}")
            }
            Finding::CopiedCompressed { offset } => {
                write!(
                    f,
                    "ERROR: coffset={offset:#x}: copied flag must never be set for compressed clusters"
                )
            }
            Finding::CompressedWithBitmap { index, entry } => {
                write!(
                    f,
                    "ERROR compressed cluster {index} with non-zero subcluster allocation bitmap, entry={entry:#x}"
                )
            }
            Finding::CorruptBitmap { offset } => {
                write!(
                    f,
                    "ERROR offset={offset:x}: Allocated cluster has corrupted subcluster allocation bitmap"
                )
            }
            Finding::AllocatedWithoutCluster => {
                write!(f, "ERROR: Unallocated cluster has non-zero subcluster allocation map")
            }
            Finding::ReservedBitsInRefcountTable { index } => {
                write!(f, "ERROR refcount table entry {index} has reserved bits set")
            }
            Finding::UnalignedRefcountBlock { index } => {
                write!(
                    f,
                    "ERROR refcount block {index} is not cluster aligned; refcount table entry corrupted"
                )
            }
            Finding::RefcountBlockOutside { index } => {
                write!(f, "ERROR refcount block {index} is outside image")
            }
            Finding::RefcountBlockShared { index, references } => {
                write!(f, "ERROR refcount block {index} refcount={references}")
            }
            Finding::NoRefcount { cluster } => {
                write!(f, "Can't get refcount for cluster {cluster}: Input/output error")
            }
        }
    }
}

/// Result of a check. Terms and numbers are those of `qemu-img check`.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct CheckReport {
    /// Defects that have destroyed data or through which a write may destroy data: clusters with
    /// fewer counted than actual references, wrong COPIED flags, entries that point outside the
    /// file.
    pub corruptions: u64,
    /// Clusters with more counted than actual references. They waste space and harm no data.
    pub leaks: u64,
    /// Clusters that could not be checked. If there are any, the other numbers are incomplete.
    pub check_errors: u64,
    /// The end of the last cluster that is counted or referenced, in bytes.
    pub image_end: u64,
    /// Clusters of the virtual disk.
    pub total_clusters: u64,
    /// Clusters of the virtual disk that have a host cluster.
    pub allocated_clusters: u64,
    /// Allocated clusters whose host cluster does not follow that of the cluster before.
    pub fragmented_clusters: u64,
    /// Allocated clusters that are compressed.
    pub compressed_clusters: u64,
    /// The first thousand findings, in the order of the walk.
    pub findings: Vec<Finding>,
    /// Number of findings that are not in `findings`.
    pub not_listed: u64,
}

impl CheckReport {
    fn list(&mut self, finding: Finding) {
        if self.findings.len() < LISTED {
            self.findings.push(finding);
        } else {
            self.not_listed += 1;
        }
    }

    /// Returns whether all refcounts and references are known and no refcount is too low. A sound
    /// image has leaks at worst.
    pub fn is_sound(&self) -> bool {
        self.corruptions == 0 && self.check_errors == 0
    }
}

/// A run of host clusters whose refcounts are higher than their number of references.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) struct Leak {
    /// The first cluster.
    pub start: u64,
    /// The number of clusters.
    pub len: u64,
    /// The number of references to each cluster, to which its refcount must be lowered.
    pub references: u64,
}

/// The leaks that [`Image::find_leaks`] found and [`Image::give_back`] gives back.
#[derive(Debug)]
pub struct Leaks(Vec<Leak>);

impl Leaks {
    /// Returns the number of leaked clusters.
    pub fn clusters(&self) -> u64 {
        self.0.iter().map(|leak| leak.len).sum()
    }
}

/// Checks an image without trusting it; the image may be one that [`Image::open`] refuses. Changes
/// nothing.
///
/// # Errors
/// [`ErrorKind::InvalidImage`] and [`ErrorKind::UnsupportedFeature`] if the image cannot be
/// checked; I/O.
pub fn check(storage: &dyn ReadAt) -> Result<CheckReport> {
    let mut first = vec![0; HEADER_AREA as usize];
    let there = storage.size().min(HEADER_AREA) as usize;
    storage.read_at(0, &mut first[..there]).map_err(|error| Error::io("header", error))?;
    let header = Header::parse_to_check(&first)?;
    let refuse = |what: &str| {
        Err(Error::new(
            ErrorKind::UnsupportedFeature,
            format!("cannot be checked: {what}; use qemu-img check"),
        ))
    };
    if header.nb_snapshots != 0 {
        return refuse("it has internal snapshots");
    }
    if header.autoclear & feature::AUTOCLEAR_BITMAPS != 0 {
        return refuse("it has persistent bitmaps");
    }
    Ok(Walk::run(storage, &header)?.into_report())
}

impl Image {
    /// Returns whether a search for leaks is needed: the last program that wrote the image was
    /// killed, or that cannot be known. No other code gives such leaks back.
    pub fn may_leak(&self) -> bool {
        match self.sidecar.open_mark() {
            Ok(mark) => matches!(mark, OpenMark::Present | OpenMark::Unsupported),
            Err(error) => {
                log::warn!(
                    "whether the image was closed cannot be read: {}",
                    host::error::os_text(&error)
                );
                true
            }
        }
    }

    /// Searches for leaks. Callers call it before the first change; it changes nothing. It takes
    /// the time to read all L2 tables and refcount blocks, and one byte of memory for each cluster
    /// of the file.
    ///
    /// # Errors
    /// [`ErrorKind::Corrupt`] if there is a defect other than a leak: the image must not be
    /// written. I/O.
    pub fn find_leaks(&self) -> Result<Leaks> {
        assert!(!self.is_dirty(), "what is on disk is all there is");
        let (report, leaks) =
            Walk::run(&*self.reader.storage, &self.reader.header())?.into_leaks()?;
        match report
            .findings
            .iter()
            .find(|finding| !matches!(finding, Finding::Refcount { refcount, references, .. } if refcount > references))
        {
            _ if report.is_sound() => Ok(Leaks(leaks)),
            first => {
                let first = first.map_or(String::new(), |first| format!(", the first of them: {first}"));
                let text = format!(
                    "{} corruptions{first}: mount it with --read-only, or repair it with qemu-img check -r all",
                    report.corruptions + report.check_errors
                );
                Err(Error::new(ErrorKind::Corrupt, text))
            }
        }
    }

    /// Lowers the refcounts of the leaks that [`Image::find_leaks`] found, in memory. The clusters
    /// can be allocated at once, and the next pass makes the change durable. Callers call it after
    /// [`Image::begin_writing`], before any other change.
    ///
    /// A killed program leaves changes that were written and not synced, and the walk reads them as
    /// if they were durable. A loss of power could still undo them. It could thereby bring back a
    /// removed reference to a cluster that has a new owner by then (R7). A barrier therefore comes
    /// first. After it no table on disk can refer to these clusters, so they need not wait for a
    /// pass.
    ///
    /// # Errors
    /// I/O.
    pub fn give_back(&self, leaks: &Leaks) -> Result<()> {
        if leaks.0.is_empty() {
            return Ok(());
        }
        self.barrier(Step::BarrierBeforeGiveBack)?;
        self.watch(self.allocator.give_back_leaks(&leaks.0))
    }
}
