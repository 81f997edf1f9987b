//! The full check (V28): counts every reference and holds the refcounts against them, in the words and with the numbers of `qemu-img check`;
//! and what is leaked given back.
//!
//! ```text
//! header ─► L1 ─► L2 tables ─► clusters ─┐
//!        └► refcount table ─► blocks ────┼─► references.rs: how often each cluster is referenced ─┐
//!                               └─► counted.rs: how often it is counted ──────────────────────────┴─► corruptions, leaks
//! ```
//! **Touches:** the storage, reading. **Never:** trusts a table; uses what [`super::Tables`] and [`super::Allocator`] hold, which refuse what
//! is to be reported here; changes anything but refcounts that are too high, and those by the write-back pass only.
//! **Locks:** none; whoever checks has the file for himself. **Invariants:** memory is bounded by the file (V29). Time is that of reading all
//! L2 tables and refcount blocks once.

use std::fmt;

use super::{HEADER_AREA, Image};
use crate::format::{Header, feature};
use crate::mutants::Step;
use crate::storage::{OpenMark, Storage};
use crate::{Error, ErrorKind, Result};

mod counted;
mod references;
mod walk;

pub(super) use counted::{allocated_clusters, counted_end};
use walk::Walk;

/// So many findings are kept one by one; the rest is only counted.
const LISTED: usize = 1000;

/// One thing that is wrong. Its text is that of `qemu-img check`.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Finding {
    /// The refcount of a cluster is not the number of references to it: too low is a corruption, too high a leak.
    Refcount {
        /// The cluster.
        cluster: u64,
        /// As it is counted on disk.
        refcount: u64,
        /// As it is.
        references: u64,
    },
    /// Something lies beyond the end of the file, by a cluster or more. Bytes.
    OutsideTheFile {
        /// Where.
        offset: u64,
        /// How long it is.
        size: u64,
    },
    /// More references than a refcount of this image can say.
    TooManyReferences {
        /// Where the cluster is, bytes.
        offset: u64,
    },
    /// An L1 entry has bits that are reserved (V22).
    ReservedBitsInL1 {
        /// The entry.
        entry: u64,
    },
    /// An L2 table is not at a cluster boundary (V22).
    UnalignedL2Table {
        /// Where it is, bytes.
        offset: u64,
    },
    /// COPIED of an L1 entry is not what the refcount says (R9).
    CopiedL2Table {
        /// Index of the entry.
        l1_index: usize,
        /// The entry.
        entry: u64,
        /// The refcount of the L2 table.
        refcount: u64,
    },
    /// An L2 entry has bits that are reserved (V24).
    ReservedBitsInL2 {
        /// The entry.
        entry: u64,
    },
    /// A cluster is not at a cluster boundary (V24).
    UnalignedCluster {
        /// Where it is, bytes.
        offset: u64,
        /// The entry reads as zero.
        zero: bool,
    },
    /// COPIED of an L2 entry is not what the refcount says (R9).
    CopiedCluster {
        /// The entry.
        entry: u64,
        /// The refcount of the cluster.
        refcount: u64,
    },
    /// A compressed cluster says COPIED (R9, V26).
    CopiedCompressed {
        /// Where it is, bytes.
        offset: u64,
    },
    /// An entry of the refcount table has bits that are reserved (V23).
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
    /// A refcount block is something else as well (V23).
    RefcountBlockShared {
        /// Index in the refcount table.
        index: usize,
        /// How often it is referenced.
        references: u64,
    },
    /// The refcount of a cluster cannot be read, because its block has no place.
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
            Finding::TooManyReferences { offset } => write!(f, "ERROR: overflow cluster offset={offset:#x}"),
            Finding::ReservedBitsInL1 { entry } => write!(f, "ERROR found L1 entry with reserved bits set: {entry:x}"),
            Finding::UnalignedL2Table { offset } => {
                write!(f, "ERROR l2_offset={offset:x}: Table is not cluster aligned; L1 entry corrupted")
            }
            Finding::CopiedL2Table { l1_index, entry, refcount } => {
                write!(f, "ERROR OFLAG_COPIED L2 cluster: l1_index={l1_index} l1_entry={entry:x} refcount={refcount}")
            }
            Finding::ReservedBitsInL2 { entry } => write!(f, "ERROR found l2 entry with reserved bits set: {entry:x}"),
            Finding::UnalignedCluster { offset, zero } => {
                let what = if zero { "Preallocated cluster" } else { "Data cluster" };
                write!(f, "ERROR offset={offset:x}: {what} is not properly aligned; L2 entry corrupted.")
            }
            Finding::CopiedCluster { entry, refcount } => {
                write!(f, "ERROR OFLAG_COPIED data cluster: l2_entry={entry:x} refcount={refcount}")
            }
            Finding::CopiedCompressed { offset } => {
                write!(f, "ERROR: coffset={offset:#x}: copied flag must never be set for compressed clusters")
            }
            Finding::ReservedBitsInRefcountTable { index } => write!(f, "ERROR refcount table entry {index} has reserved bits set"),
            Finding::UnalignedRefcountBlock { index } => {
                write!(f, "ERROR refcount block {index} is not cluster aligned; refcount table entry corrupted")
            }
            Finding::RefcountBlockOutside { index } => write!(f, "ERROR refcount block {index} is outside image"),
            Finding::RefcountBlockShared { index, references } => write!(f, "ERROR refcount block {index} refcount={references}"),
            Finding::NoRefcount { cluster } => write!(f, "Can't get refcount for cluster {cluster}: Input/output error"),
        }
    }
}

/// What a check found. Words and numbers as in `qemu-img check`.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct CheckReport {
    /// What writing to may destroy data, or what is lost already: clusters with fewer counted than actual references, wrong COPIED flags,
    /// entries that point nowhere.
    pub corruptions: u64,
    /// Clusters with more counted than actual references: lost space, nothing else.
    pub leaks: u64,
    /// Clusters that could not be checked: then the numbers are not the whole truth.
    pub check_errors: u64,
    /// The end of the last cluster that is counted or referenced, bytes.
    pub image_end: u64,
    /// Clusters of the virtual disk.
    pub total_clusters: u64,
    /// Those that have a host cluster.
    pub allocated_clusters: u64,
    /// Those whose host cluster is not behind that of the one before.
    pub fragmented_clusters: u64,
    /// Those that are compressed.
    pub compressed_clusters: u64,
    /// The first thousand of what is wrong, in the order of the walk.
    pub findings: Vec<Finding>,
    /// How many more there are.
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

    /// Whether refcounts and references are known and none is too low: leaks at worst.
    pub fn is_sound(&self) -> bool {
        self.corruptions == 0 && self.check_errors == 0
    }
}

/// A run of host clusters that are counted more often than they are referenced.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) struct Leak {
    /// The first.
    pub start: u64,
    /// How many.
    pub len: u64,
    /// The references to each of them, which its refcount is to be lowered to.
    pub references: u64,
}

/// What [`Image::find_leaks`] found and [`Image::give_back`] gives back.
#[derive(Debug)]
pub struct Leaks(Vec<Leak>);

impl Leaks {
    /// How many clusters.
    pub fn clusters(&self) -> u64 {
        self.0.iter().map(|leak| leak.len).sum()
    }
}

/// Checks an image that cannot be trusted, and may be one that [`Image::open`] refuses. Nothing is changed.
///
/// # Errors
/// [`ErrorKind::InvalidImage`] and [`ErrorKind::UnsupportedFeature`] where it cannot be checked; I/O.
pub fn check(storage: &dyn Storage) -> Result<CheckReport> {
    let mut first = vec![0; HEADER_AREA as usize];
    let there = storage.size().min(HEADER_AREA) as usize;
    storage.read_at(0, &mut first[..there]).map_err(|error| Error::io("header", error))?;
    let header = Header::parse_to_check(&first)?;
    let refuse = |what: &str| Err(Error::new(ErrorKind::UnsupportedFeature, format!("cannot be checked: {what}; use qemu-img check")));
    if header.nb_snapshots != 0 {
        return refuse("it has internal snapshots");
    }
    if header.autoclear & feature::AUTOCLEAR_BITMAPS != 0 {
        return refuse("it has persistent bitmaps");
    }
    Ok(Walk::run(storage, &header)?.into_report())
}

impl Image {
    /// Whether clusters may be leaked that nobody gives back unless they are looked for: the last program that wrote the image was killed,
    /// or it cannot be known.
    pub fn may_leak(&self) -> bool {
        match self.reader.storage.open_mark() {
            Ok(mark) => matches!(mark, OpenMark::Present | OpenMark::Unsupported),
            Err(error) => {
                log::warn!("whether the image was closed cannot be read: {}", crate::error::os_text(&error));
                true
            }
        }
    }

    /// Looks for leaks. To be called before the first change; changes nothing. Takes as long as reading all L2 tables and refcount blocks, and
    /// a byte of memory for each cluster of the file.
    ///
    /// # Errors
    /// [`ErrorKind::Corrupt`] where something is wrong that is no leak: the image is not to be written. I/O.
    pub fn find_leaks(&self) -> Result<Leaks> {
        assert!(!self.is_dirty(), "what is on disk is all there is");
        let (report, leaks) = Walk::run(&*self.reader.storage, &self.reader.header())?.into_leaks()?;
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

    /// Lowers the refcounts of what [`Image::find_leaks`] found, in memory: the clusters can be allocated at once, the next pass makes it
    /// durable. To be called after [`Image::begin_writing`], before anything else.
    ///
    /// A killed program leaves changes that were written and not synced. The walk has read them as if they were there for good; a loss of
    /// power could still take them back, and with them the removal of a reference to a cluster that by then has a new owner (R7). Therefore
    /// a barrier comes first. After it no table on disk refers to these clusters, whatever happens, and nothing has to be waited for any more.
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

fn be64(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0, |value, &byte| value << 8 | u64::from(byte))
}
