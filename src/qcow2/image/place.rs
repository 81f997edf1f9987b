//! Reports where the bytes of a run are stored, in the terms of `qemu-img map`.

use std::time::Instant;

use super::ImageReader;
use super::check::{allocated_clusters, counted_end};
use crate::format::{GuestOffset, Mapping};
use host::storage::BlockStatus;
use host::{Error, Result};

/// Where an image stores a run of guest bytes. [`Mapping`] says how its tables map the run; this
/// adds what only the host's file system knows, and has no error: a bad entry is a place too. What
/// a chain of images makes of it is decided above this crate.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Location {
    /// Not in this image: the layers below decide; `offset` is the place that is reserved in the
    /// cluster of other subclusters.
    Below {
        /// Host offset in bytes, if there is a cluster.
        offset: Option<u64>,
    },
    /// Zeros, known without reading; `offset` is the host cluster that is reserved for them.
    Zero {
        /// Host offset in bytes, if there is a reserved cluster.
        offset: Option<u64>,
    },
    /// Data in the file.
    Data {
        /// Host offset in bytes.
        offset: u64,
        /// Whether the host reports a hole of the file, or the offset lies beyond its end.
        hole: bool,
    },
    /// Compressed data.
    Compressed,
    /// An entry cannot be used: reading the run is an error.
    Unreadable,
}

/// Whether to look for holes of the file inside allocated clusters.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Holes {
    /// Allocated clusters are reported as data.
    Unseen,
    /// Holes that the host reports are reported as holes.
    Seen,
}

impl ImageReader {
    /// Decides, as QEMU does (`qcow2_detect_metadata_preallocation`), whether to look for holes. It
    /// does so if the image counts clearly more clusters than the host has allocated blocks for,
    /// which is the result of preallocated metadata. Counts refcounts as they are on disk, until
    /// `deadline` at the latest. If they cannot be read, or not in time, the answer is
    /// [`Holes::Unseen`].
    pub fn holes(&self, deadline: Instant) -> Holes {
        match self.is_preallocated(deadline) {
            Ok(true) => Holes::Seen,
            Ok(false) | Err(_) => Holes::Unseen,
        }
    }

    /// Returns where the image ends in its file, in bytes, according to its refcounts on disk.
    /// Returns the end of the file after `deadline`, or if the refcounts cannot be read.
    pub fn end(&self, deadline: Instant) -> u64 {
        let size = self.storage().size();
        let header = self.header();
        counted_end(&**self.storage(), &header, deadline).map_or(size, |clusters| {
            clusters.saturating_mul(header.geometry.cluster_size()).min(size)
        })
    }

    fn is_preallocated(&self, deadline: Instant) -> Result<bool> {
        let storage = self.storage();
        let header = self.header();
        let allocated = storage.allocated_size().map_err(|error| Error::io("fstat", error))?
            / header.geometry.cluster_size();
        let threshold = allocated.saturating_mul(10) / 9;
        let threshold = threshold.max(allocated.saturating_add(2));
        let clusters = storage.size().div_ceil(header.geometry.cluster_size());
        if clusters < threshold {
            return Ok(false);
        }
        allocated_clusters(&**storage, &header, clusters, threshold, deadline)
            .map(|counted| counted >= threshold)
    }

    /// Returns where the byte at `at` is stored, and for how many bytes that holds, at most `max`
    /// (> 0). Holes inside data are reported according to `holes`.
    ///
    /// # Errors
    /// lseek(2).
    pub fn place(&self, at: GuestOffset, max: u64, holes: Holes) -> Result<(Location, u64)> {
        let (mapping, len) = self.look(at, max);
        let geometry = self.geometry();
        let offset = |host| geometry.host_offset(host).0 + geometry.in_cluster(at);
        let Ok(mapping) = mapping else { return Ok((Location::Unreadable, len)) };
        Ok(match mapping {
            Mapping::Unallocated if geometry.has_extended_l2() => self.unallocated(at, len)?,
            Mapping::Unallocated => (Location::Below { offset: None }, len),
            Mapping::Zero { reserved } => {
                (Location::Zero { offset: reserved.map(|(host, _)| offset(host)) }, len)
            }
            Mapping::Compressed { .. } => (Location::Compressed, len),
            Mapping::Data { host, .. } => {
                let offset = offset(host);
                let (hole, len) = match holes {
                    Holes::Unseen => (false, len),
                    Holes::Seen => self.status(offset, len)?,
                };
                (Location::Data { offset, hole }, len)
            }
        })
    }

    /// Returns where unallocated subclusters would be stored in the cluster of others, and for how
    /// many of the `len` bytes at `at`, all of them unallocated, that holds.
    fn unallocated(&self, at: GuestOffset, len: u64) -> Result<(Location, u64)> {
        let geometry = self.geometry();
        let (l1_index, _) = geometry.table_indexes(geometry.guest_cluster(at));
        // The run lies in what one table maps.
        if self.tables.with(l1_index, |_| ())?.is_none() {
            return Ok((Location::Below { offset: None }, len));
        }
        let mut known = 0;
        while known < len {
            let here = GuestOffset(at.0 + known);
            let in_cluster = geometry.in_cluster(here);
            match self.entry(geometry.guest_cluster(here))?.host() {
                None => known += geometry.cluster_size() - in_cluster,
                Some((host, _)) if known == 0 => {
                    let offset = Some(geometry.host_offset(host).0 + in_cluster);
                    let len = len.min(geometry.cluster_size() - in_cluster);
                    return Ok((Location::Below { offset }, len));
                }
                Some(_) => break,
            }
        }
        Ok((Location::Below { offset: None }, known.min(len)))
    }

    /// Returns whether the file has a hole at `offset`, and for how many bytes. Where the host
    /// cannot tell, the range counts as data.
    fn status(&self, offset: u64, len: u64) -> Result<(bool, u64)> {
        let (holding, known) =
            self.storage().status(offset, len).map_err(|error| Error::io("lseek", error))?;
        assert!((1..=len).contains(&known), "a run of {known} bytes of at most {len}");
        Ok((holding == BlockStatus::Hole, known))
    }
}
