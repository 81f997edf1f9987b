//! The bytes of a new, empty image.

use super::extensions::encode_backing_format;
use super::tables::{MAX_L1_TABLE, MAX_REFCOUNT_TABLE};
use super::{
    BackingReference, FormatError, Geometry, MAGIC, MAX_BACKING_NAME, be64, feature, invalid,
};
use crate::format::{HostCluster, RefcountBlock};

/// Length of the header in bytes, including compression_type and its padding.
const HEADER_LENGTH: usize = 112;

/// Parameters of a new image.
#[derive(Clone, Debug)]
pub struct NewImage {
    /// Version 3, cluster size, 16-bit refcounts, virtual size, and whether L2 entries are
    /// extended.
    pub geometry: Geometry,
    /// The backing file, if there is one.
    pub backing: Option<BackingReference>,
}

/// Clusters of each part of a new image, in their order in the file.
struct ImagePlan {
    refcount_table: u64,
    refblocks: u64,
    l1: u64,
}

impl NewImage {
    /// Returns all writes that make the image, as offsets in bytes and bytes, in the order of the
    /// file:
    ///
    /// ```text
    /// | header | refcount table | refcount blocks | L1 table, zeros |
    /// ```
    ///
    /// The refcount table is large enough for the image once it is full, so that it never has to
    /// move.
    ///
    /// # Errors
    /// [`FormatError::Invalid`] if the disk is too large for the cluster size or the backing file
    /// name does not fit.
    pub fn layout(&self) -> Result<Vec<(u64, Vec<u8>)>, FormatError> {
        let geometry = &self.geometry;
        let plan = ImagePlan::new(geometry)?;
        let offset = |cluster: u64| geometry.host_offset(HostCluster(cluster)).0;
        let (refblocks_at, l1_at) =
            (1 + plan.refcount_table, 1 + plan.refcount_table + plan.refblocks);

        let mut table = vec![0; offset(plan.refcount_table) as usize];
        let entries = table.chunks_exact_mut(8).zip(refblocks_at..l1_at);
        entries.for_each(|(entry, cluster)| entry.copy_from_slice(&offset(cluster).to_be_bytes()));

        let mut writes = vec![(0, self.header(&plan)?), (offset(1), table)];
        let used = l1_at + plan.l1;
        let per_block = geometry.refblock_entries();
        for index in 0..plan.refblocks {
            let mut block = RefcountBlock::new(geometry);
            (0..(used - index * per_block).min(per_block))
                .for_each(|entry| block.set(entry as usize, 1));
            writes.push((offset(refblocks_at + index), block.bytes().to_vec()));
        }
        if plan.l1 != 0 {
            writes.push((offset(l1_at), vec![0; offset(plan.l1) as usize]));
        }
        Ok(writes)
    }

    /// Returns the file of a new image of version 3 with refcounts of 16 bits, above a backing file
    /// of this name and format. `size` is in bytes.
    #[cfg(any(test, feature = "testing"))]
    #[expect(clippy::unwrap_used, reason = "for tests")]
    pub fn file_for_tests(
        cluster_bits: u32,
        size: u64,
        backing: Option<(&str, super::BackingFormat)>,
    ) -> Vec<u8> {
        let geometry = Geometry::new(3, cluster_bits, 4, size).unwrap();
        let backing = backing
            .map(|(name, format)| BackingReference { name: name.into(), format: Some(format) });
        let mut file = Vec::new();
        for (at, bytes) in (NewImage { geometry, backing }).layout().unwrap() {
            file.resize(file.len().max(at as usize + bytes.len()), 0);
            file[at as usize..][..bytes.len()].copy_from_slice(&bytes);
        }
        file
    }

    /// Returns the bytes of the first cluster.
    fn header(&self, plan: &ImagePlan) -> Result<Vec<u8>, FormatError> {
        let geometry = &self.geometry;
        let cluster_size = geometry.cluster_size();
        let l1_entries = geometry.l1_entries_needed() as u32;
        let l1_offset = if plan.l1 == 0 {
            0
        } else {
            (1 + plan.refcount_table + plan.refblocks) * cluster_size
        };
        let mut bytes = vec![0; HEADER_LENGTH];
        let mut put = |at: usize, value: &[u8]| bytes[at..at + value.len()].copy_from_slice(value);
        put(0, &MAGIC.to_be_bytes());
        put(4, &3u32.to_be_bytes());
        put(20, &geometry.cluster_bits().to_be_bytes());
        put(24, &geometry.size().to_be_bytes());
        put(36, &l1_entries.to_be_bytes());
        put(40, &l1_offset.to_be_bytes());
        put(48, &cluster_size.to_be_bytes());
        put(56, &(plan.refcount_table as u32).to_be_bytes());
        let extended_l2 = if geometry.has_extended_l2() { feature::EXTENDED_L2 } else { 0 };
        put(72, &extended_l2.to_be_bytes());
        put(96, &geometry.refcount_order().to_be_bytes());
        put(100, &(HEADER_LENGTH as u32).to_be_bytes());
        if let Some(format) = self.backing.as_ref().and_then(|backing| backing.format) {
            bytes.extend(encode_backing_format(format));
        }
        bytes.extend([0; 8]);
        if let Some(backing) = &self.backing {
            let name = backing.name.as_bytes();
            if name.is_empty()
                || name.len() > MAX_BACKING_NAME
                || backing.name.chars().any(char::is_control)
            {
                return invalid(format!(
                    "backing file name of {} bytes is empty, too long or has control characters",
                    name.len()
                ));
            }
            let at = bytes.len() as u64;
            bytes[8..16].copy_from_slice(&at.to_be_bytes());
            bytes[16..20].copy_from_slice(&(name.len() as u32).to_be_bytes());
            bytes.extend(name);
        }
        if bytes.len() as u64 > cluster_size {
            return invalid(format!(
                "backing file name at {} does not fit the first cluster of {cluster_size} bytes: take larger clusters",
                be64(&bytes, 8)
            ));
        }
        bytes.resize(cluster_size as usize, 0);
        Ok(bytes)
    }
}

impl ImagePlan {
    fn new(geometry: &Geometry) -> Result<ImagePlan, FormatError> {
        if geometry.version() != 3 || geometry.refcount_order() != 4 {
            return invalid("new images have version 3 and 16-bit refcounts".into());
        }
        let l1_bytes = geometry.l1_entries_needed().saturating_mul(8);
        if l1_bytes > MAX_L1_TABLE {
            return invalid(format!(
                "virtual size {} is too large for clusters of {} bytes, which reach {} bytes",
                geometry.size(),
                geometry.cluster_size(),
                MAX_L1_TABLE / 8 * geometry.l2_span()
            ));
        }
        let l1 = l1_bytes.div_ceil(geometry.cluster_size());
        // The clusters of a full image: all guest clusters and L2 tables, the L1 table and the
        // header. The refcount blocks that count them and the refcount table are added below.
        let content = geometry.guest_clusters().0 + geometry.l1_entries_needed() + l1 + 1;
        let full_refblocks = Self::refblocks_for(geometry, content, |refblocks| {
            Self::table_for(geometry, refblocks)
        });
        let limit = MAX_REFCOUNT_TABLE / geometry.cluster_size();
        let refcount_table = Self::table_for(geometry, full_refblocks).clamp(1, limit);
        let refblocks = Self::refblocks_for(geometry, 1 + refcount_table + l1, |_| 0);
        Ok(ImagePlan { refcount_table, refblocks, l1 })
    }

    /// Returns the least number of refcount blocks that count `clusters`, the blocks themselves and
    /// `more(blocks)` further clusters.
    fn refblocks_for(geometry: &Geometry, clusters: u64, more: impl Fn(u64) -> u64) -> u64 {
        let mut refblocks = 1;
        loop {
            let needed =
                (clusters + refblocks + more(refblocks)).div_ceil(geometry.refblock_entries());
            if needed <= refblocks {
                return refblocks;
            }
            refblocks = needed;
        }
    }

    /// Returns the clusters of a refcount table with `refblocks` entries.
    fn table_for(geometry: &Geometry, refblocks: u64) -> u64 {
        (refblocks * 8).div_ceil(geometry.cluster_size())
    }
}
