//! Where the bytes of a run lie, in the words in which `qemu-img map` tells it.

use std::time::Instant;

use super::ImageReader;
use super::check::{allocated_clusters, counted_end};
use crate::format::{GuestOffset, Mapping};
use crate::storage::Holding;
use crate::{Error, Result};

/// What an image says of a run of guest bytes.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Place {
    /// Nothing: what lies below decides.
    Below,
    /// Zeros, known without reading; `offset` is where a host cluster is kept for them, in bytes.
    Zero {
        /// Byte offset in the file.
        offset: Option<u64>,
    },
    /// Data in the file, from this byte on.
    Data {
        /// Byte offset in the file.
        offset: u64,
        /// The host says that it is a hole of the file, or beyond its end.
        hole: bool,
    },
    /// Data, packed.
    Compressed,
    /// The tables say that something is there, but not what: reading it is an error.
    Unreadable,
}

/// Whether the file of an image is looked at for holes inside its data.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Holes {
    /// What is allocated is data.
    Unseen,
    /// What the host knows to be a hole is told.
    Seen,
}

impl ImageReader {
    /// As QEMU decides it (`qcow2_detect_metadata_preallocation`): holes are worth a look where clearly more clusters are allocated than the host
    /// has blocks for, which is what preallocation of metadata leaves behind. Counts refcounts as they are on disk, until `deadline` at the latest;
    /// whatever cannot be read, or not in time, is no reason for a look.
    pub fn holes(&self, deadline: Instant) -> Holes {
        match self.is_preallocated(deadline) {
            Ok(true) => Holes::Seen,
            Ok(false) | Err(_) => Holes::Unseen,
        }
    }

    /// Where the image ends in its file, in bytes, by its refcounts as they are on disk. Beyond
    /// `deadline`, and where they cannot be read, the end of the file.
    pub fn end(&self, deadline: Instant) -> u64 {
        let size = self.storage().size();
        let header = self.header();
        counted_end(&**self.storage(), &header, deadline)
            .map_or(size, |clusters| clusters.saturating_mul(header.geometry.cluster_size()).min(size))
    }

    fn is_preallocated(&self, deadline: Instant) -> Result<bool> {
        let storage = self.storage();
        let header = self.header();
        let allocated = storage.allocated_size().map_err(|error| Error::io("fstat", error))? / header.geometry.cluster_size();
        let threshold = allocated.saturating_mul(10) / 9;
        let threshold = threshold.max(allocated.saturating_add(2));
        let clusters = storage.size().div_ceil(header.geometry.cluster_size());
        if clusters < threshold {
            return Ok(false);
        }
        allocated_clusters(&**storage, &header, clusters, threshold, deadline).map(|counted| counted >= threshold)
    }

    /// What is at `at`, and for how many bytes, at most `max` (> 0). Says of holes what `holes` allows.
    ///
    /// # Errors
    /// lseek(2).
    pub fn place(&self, at: GuestOffset, max: u64, holes: Holes) -> Result<(Place, u64)> {
        let (mapping, len) = self.look(at, max);
        let geometry = self.geometry();
        let offset = |host| geometry.host_offset(host).0 + geometry.in_cluster(at);
        let Ok(mapping) = mapping else { return Ok((Place::Unreadable, len)) };
        Ok(match mapping {
            Mapping::Unallocated => (Place::Below, len),
            Mapping::Zero { reserved } => (Place::Zero { offset: reserved.map(|(host, _)| offset(host)) }, len),
            Mapping::Compressed { .. } => (Place::Compressed, len),
            Mapping::Data { host, .. } => {
                let offset = offset(host);
                let (hole, len) = match holes {
                    Holes::Unseen => (false, len),
                    Holes::Seen => self.holding(offset, len)?,
                };
                (Place::Data { offset, hole }, len)
            }
        })
    }

    /// Whether there is a hole in the file, and for how many bytes. What cannot be asked is data.
    fn holding(&self, offset: u64, len: u64) -> Result<(bool, u64)> {
        let (holding, known) = self.storage().holding(offset, len).map_err(|error| Error::io("lseek", error))?;
        assert!((1..=len).contains(&known), "a run of {known} bytes of at most {len}");
        Ok((holding == Holding::Hole, known))
    }
}
