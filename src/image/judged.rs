//! Which entries of an L2 table cannot be used as they stand (V24 to V27). Found when the table is
//! loaded, told when the entry is used: the other entries of the table are as good as ever.

use crate::format::{Geometry, HostCluster, Mapping};
use crate::sync::atomic::{AtomicU64, Ordering};
use crate::{Error, ErrorKind, Result};

/// Entries whose reason is kept; of the others it is said that they are bad.
const MOST_REASONS: usize = 64;

/// What is wrong with one entry.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Fault {
    /// Nothing.
    None,
    /// The format does not allow it, it names a place outside the file, or refcounts and other
    /// metadata contradict it.
    Bad,
    /// The refcount of what it names cannot be read. Its bytes can, so reads go on.
    Unproven,
}

/// The entries of one table that are not good: one bit per entry and kind.
#[derive(Debug)]
pub(super) struct Judged {
    bad: Box<[u64]>,
    /// Cleared when the entry is replaced.
    unproven: Box<[AtomicU64]>,
    /// Why, of the first [`MOST_REASONS`] bad ones: index and text.
    reasons: Vec<(usize, String)>,
}

impl Judged {
    /// Nothing is wrong with any of `entries` entries yet.
    pub fn new(entries: usize) -> Judged {
        let words = entries.div_ceil(64);
        Judged { bad: vec![0; words].into(), unproven: (0..words).map(|_| AtomicU64::new(0)).collect(), reasons: Vec::new() }
    }

    /// The entry at `index` is bad.
    pub fn set_bad(&mut self, index: usize, why: &Error) {
        let bit = 1 << (index % 64);
        if self.bad[index / 64] & bit == 0 && self.reasons.len() < MOST_REASONS {
            self.reasons.push((index, why.to_string()));
        }
        self.bad[index / 64] |= bit;
    }

    /// The refcount of what the entry at `index` names could not be read.
    pub fn set_unproven(&mut self, index: usize) {
        *self.unproven[index / 64].get_mut() |= 1 << (index % 64);
    }

    /// The entry at `index` was replaced by one of ours, which is good.
    pub fn replaced(&self, index: usize) {
        let bit = 1 << (index % 64);
        if self.unproven[index / 64].load(Ordering::Relaxed) & bit != 0 {
            self.unproven[index / 64].fetch_and(!bit, Ordering::AcqRel);
        }
    }

    /// What is wrong with the entry at `index`.
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

    /// The text of the first bad entry, if there is one.
    pub fn first_bad(&self) -> Option<&str> {
        self.reasons.first().map(|(_, why)| why.as_str())
    }

    /// What the entry `raw` at `index` of the table in cluster `host` means.
    pub fn mapping(&self, index: usize, raw: u64, host: HostCluster, geometry: &Geometry) -> Result<Mapping> {
        match self.fault(index) {
            Fault::None => Ok(Mapping::decode(raw, geometry)?),
            Fault::Unproven => Ok(match Mapping::decode(raw, geometry)? {
                Mapping::Data { host, .. } => Mapping::Data { host, in_place: false },
                Mapping::Zero { reserved: Some((host, _)) } => Mapping::Zero { reserved: Some((host, false)) },
                other => other,
            }),
            Fault::Bad => {
                let known = self.reasons.iter().find(|(of, _)| *of == index).map(|(_, why)| why.clone());
                let why = known.unwrap_or_else(|| format!("index {index}: L2 entry {raw:#018x} cannot be right"));
                Err(Error::new(ErrorKind::Corrupt, format!("L2 table at {}, {why}", geometry.host_offset(host))))
            }
        }
    }
}
