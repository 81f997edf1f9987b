//! The entries of an L2 table that cannot be used as they are (V24 to V27, V30). They are found
//! when the table is loaded and reported when the entry is used; the other entries of the table
//! stay usable.

use crate::format::{Geometry, HostCluster, L2Entry, RawL2Entry};
use host::sync::atomic::{AtomicU64, Ordering};
use host::{Error, ErrorKind, Result};

/// Number of bad entries per table whose reason is kept. Errors for further bad entries have a
/// general text.
const MOST_REASONS: usize = 64;

/// What is wrong with one entry.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Fault {
    /// The entry is good.
    None,
    /// The format does not allow the entry, it names a place outside the file, or refcounts or
    /// other metadata contradict it.
    Bad,
    /// The refcount of the host cluster cannot be read. Reads go on, because the data can be read.
    Unproven,
}

/// The faulty entries of one table: one bit per entry and kind of fault.
#[derive(Debug)]
pub(super) struct Judged {
    bad: Box<[u64]>,
    /// A bit is cleared when its entry is replaced.
    unproven: Box<[AtomicU64]>,
    /// Index and reason of the first [`MOST_REASONS`] bad entries.
    reasons: Vec<(usize, String)>,
}

impl Judged {
    /// Makes a record of `entries` entries, all of them good.
    pub fn new(entries: usize) -> Judged {
        let words = entries.div_ceil(64);
        Judged {
            bad: vec![0; words].into(),
            unproven: (0..words).map(|_| AtomicU64::new(0)).collect(),
            reasons: Vec::new(),
        }
    }

    /// Marks the entry at `index` as bad.
    pub fn set_bad(&mut self, index: usize, why: &Error) {
        let bit = 1 << (index % 64);
        if self.bad[index / 64] & bit == 0 && self.reasons.len() < MOST_REASONS {
            self.reasons.push((index, why.to_string()));
        }
        self.bad[index / 64] |= bit;
    }

    /// Records that the refcount of the cluster that the entry at `index` names could not be read.
    pub fn set_unproven(&mut self, index: usize) {
        *self.unproven[index / 64].get_mut() |= 1 << (index % 64);
    }

    /// Records that the entry at `index` was replaced by a new one, which is good.
    pub fn replaced(&self, index: usize) {
        let bit = 1 << (index % 64);
        if self.unproven[index / 64].load(Ordering::Relaxed) & bit != 0 {
            self.unproven[index / 64].fetch_and(!bit, Ordering::AcqRel);
        }
    }

    /// Returns what is wrong with the entry at `index`.
    pub fn fault(&self, index: usize) -> Fault {
        let bit = 1 << (index % 64);
        if self.bad[index / 64] & bit != 0 {
            Fault::Bad
        } else if self.unproven[index / 64].load(Ordering::Acquire) & bit != 0 {
            Fault::Unproven
        } else {
            Fault::None
        }
    }

    /// Returns the reason of the first bad entry, if there is one.
    pub fn first_bad(&self) -> Option<&str> {
        self.reasons.first().map(|(_, why)| why.as_str())
    }

    /// Decodes the entry `raw` at `index` of the table in cluster `host`. A bad entry is an error;
    /// an unproven one has no COPIED bit in the result.
    pub fn entry(
        &self,
        index: usize,
        raw: RawL2Entry,
        host: HostCluster,
        geometry: &Geometry,
    ) -> Result<L2Entry> {
        match self.fault(index) {
            Fault::None => Ok(L2Entry::decode(raw, geometry)?),
            Fault::Unproven => Ok(L2Entry::decode(raw, geometry)?.not_in_place()),
            Fault::Bad => {
                let known =
                    self.reasons.iter().find(|(of, _)| *of == index).map(|(_, why)| why.clone());
                let why = known.unwrap_or_else(|| {
                    format!("index {index}: L2 entry {:#018x} cannot be right", raw.descriptor)
                });
                Err(Error::new(
                    ErrorKind::Corrupt,
                    format!("L2 table at {}, {why}", geometry.host_offset(host)),
                ))
            }
        }
    }
}
