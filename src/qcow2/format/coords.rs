//! Coordinates: offsets and clusters of the guest and of the host, as distinct types.

use std::ops::Range;

use super::{FormatError, Mapping};

macro_rules! coordinate {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, Default, Eq, Hash, Ord, PartialEq, PartialOrd)]
        pub struct $name(pub u64);
    };
}

coordinate! {
    /// A byte position in the virtual disk.
    GuestOffset
}
coordinate! {
    /// A cluster of the virtual disk, counted from its start.
    GuestCluster
}
coordinate! {
    /// A subcluster of the virtual disk, counted from its start: the unit whose mapping can change.
    /// Without extended L2 entries a cluster is one subcluster.
    GuestSubcluster
}
coordinate! {
    /// A byte position in the image file.
    HostOffset
}
coordinate! {
    /// A cluster of the image file, counted from its start; cluster 0 holds the header.
    HostCluster
}
coordinate! {
    /// A number of clusters.
    ClusterCount
}

impl std::fmt::Display for HostOffset {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:#x}", self.0)
    }
}

/// log2 of the number of subclusters of a cluster with an extended L2 entry (specification:
/// "Extended L2 Entries").
const EXTENDED_BITS: u32 = 5;
/// Least log2 of the cluster size with extended L2 entries: a subcluster has at least 512 bytes.
const LEAST_EXTENDED_CLUSTER_BITS: u32 = 14;

/// The numbers of an image that determine how offsets are split into clusters and table indexes.
/// [`Geometry::new`] checks them.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Geometry {
    version: u32,
    cluster_bits: u32,
    refcount_order: u32,
    size: u64,
    extended_l2: bool,
}

impl Geometry {
    /// Checks the numbers: `version` 2 or 3, `cluster_bits` 9..=21 (V3), `refcount_order` 0..=6
    /// (V8), `size` at most 2^61 bytes (V13).
    ///
    /// # Errors
    /// [`FormatError::NotQcow2`] for another version; [`FormatError::Invalid`] naming the field
    /// otherwise.
    pub fn new(
        version: u32,
        cluster_bits: u32,
        refcount_order: u32,
        size: u64,
    ) -> Result<Self, FormatError> {
        if !(2..=3).contains(&version) {
            return Err(FormatError::NotQcow2(format!(
                "unsupported qcow2 version {version}, only 2 and 3 are known"
            )));
        }
        if !(9..=21).contains(&cluster_bits) {
            return Err(FormatError::Invalid(format!(
                "cluster_bits is {cluster_bits}, must be 9 to 21"
            )));
        }
        if refcount_order > 6 {
            return Err(FormatError::Invalid(format!(
                "refcount_order is {refcount_order}, must be 0 to 6"
            )));
        }
        if size > 1 << 61 {
            return Err(FormatError::Invalid(format!(
                "virtual size {size} is larger than 2^61 bytes"
            )));
        }
        Ok(Geometry { version, cluster_bits, refcount_order, size, extended_l2: false })
    }

    /// Returns the geometry of the same image with extended L2 entries: 16 bytes each, and a
    /// mapping for each of the 32 subclusters of a cluster.
    ///
    /// # Errors
    /// [`FormatError::Invalid`] in version 2, and for clusters of less than 16 KiB (QEMU:
    /// MIN_EXTL2_CLUSTER_SIZE).
    pub fn with_extended_l2(self) -> Result<Self, FormatError> {
        if self.version < 3 {
            return Err(FormatError::Invalid("extended L2 entries need version 3".into()));
        }
        if self.cluster_bits < LEAST_EXTENDED_CLUSTER_BITS {
            return Err(FormatError::Invalid(format!(
                "extended L2 entries need clusters of at least 16384 bytes, not {}",
                self.cluster_size()
            )));
        }
        Ok(Geometry { extended_l2: true, ..self })
    }

    /// Returns the geometry of the same image with another virtual size in bytes.
    ///
    /// # Errors
    /// As [`Geometry::new`].
    pub fn resized(&self, size: u64) -> Result<Self, FormatError> {
        let resized = Geometry::new(self.version, self.cluster_bits, self.refcount_order, size)?;
        Ok(Geometry { extended_l2: self.extended_l2, ..resized })
    }

    /// Returns the qcow2 version, 2 or 3.
    pub fn version(&self) -> u32 {
        self.version
    }

    /// Returns log2 of the cluster size.
    pub fn cluster_bits(&self) -> u32 {
        self.cluster_bits
    }

    /// Returns the cluster size in bytes, 512 to 2 MiB.
    pub fn cluster_size(&self) -> u64 {
        1 << self.cluster_bits
    }

    /// Returns log2 of the width of a refcount in bits, 0 to 6.
    pub fn refcount_order(&self) -> u32 {
        self.refcount_order
    }

    /// Returns the virtual disk size in bytes.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Returns whether L2 entries are extended: 16 bytes each, with subclusters.
    pub fn has_extended_l2(&self) -> bool {
        self.extended_l2
    }

    /// Returns the number of words of 8 bytes in an L2 entry: 1, or 2 with extended L2 entries.
    pub fn l2_entry_words(&self) -> usize {
        1 + usize::from(self.extended_l2)
    }

    /// Returns the number of entries of an L2 table (one cluster).
    pub fn l2_entries(&self) -> u64 {
        self.cluster_size() / 8 / self.l2_entry_words() as u64
    }

    /// Returns log2 of the number of subclusters of a cluster: 0, or 5 with extended L2 entries.
    fn subclusters_bits(&self) -> u32 {
        if self.extended_l2 { EXTENDED_BITS } else { 0 }
    }

    /// Returns the number of subclusters of a cluster: 1, or 32 with extended L2 entries.
    pub fn subclusters(&self) -> u32 {
        1 << self.subclusters_bits()
    }

    /// Returns the bits of all subclusters of a cluster, the first one at bit 0.
    pub fn all_subclusters(&self) -> u32 {
        u32::MAX >> (u32::BITS - self.subclusters())
    }

    /// Returns the bits of the subclusters at these places in their cluster.
    pub(crate) fn subcluster_mask(&self, places: Range<u64>) -> u32 {
        assert!(places.end <= self.subclusters().into(), "places in one cluster: {places:?}");
        ((1_u64 << places.end) - (1_u64 << places.start)) as u32
    }

    /// Returns log2 of the subcluster size.
    pub fn subcluster_bits(&self) -> u32 {
        self.cluster_bits - self.subclusters_bits()
    }

    /// Returns the subcluster size in bytes. Without extended L2 entries it is the cluster size.
    pub fn subcluster_size(&self) -> u64 {
        1 << self.subcluster_bits()
    }

    /// Returns the number of entries of a refcount block (one cluster).
    pub fn refblock_entries(&self) -> u64 {
        (self.cluster_size() * 8) >> self.refcount_order
    }

    /// Returns the bytes of guest space that one L2 table maps.
    pub fn l2_span(&self) -> u64 {
        self.l2_entries() << self.cluster_bits
    }

    /// Returns the number of L1 entries that the virtual size needs.
    pub fn l1_entries_needed(&self) -> u64 {
        self.size.div_ceil(self.l2_span())
    }

    /// Returns the number of guest clusters. The last one may reach beyond the end of the disk.
    pub fn guest_clusters(&self) -> ClusterCount {
        ClusterCount(self.size.div_ceil(self.cluster_size()))
    }

    /// Returns the guest cluster that contains `offset`.
    pub fn guest_cluster(&self, offset: GuestOffset) -> GuestCluster {
        GuestCluster(offset.0 >> self.cluster_bits)
    }

    /// Returns the position of `offset` inside its cluster, in bytes.
    pub fn in_cluster(&self, offset: GuestOffset) -> u64 {
        offset.0 & (self.cluster_size() - 1)
    }

    /// Returns the first byte of a guest cluster.
    pub fn guest_offset(&self, cluster: GuestCluster) -> GuestOffset {
        GuestOffset(cluster.0 << self.cluster_bits)
    }

    /// Returns the host cluster that contains `offset`.
    pub fn host_cluster(&self, offset: HostOffset) -> HostCluster {
        HostCluster(offset.0 >> self.cluster_bits)
    }

    /// Returns the first byte of a host cluster.
    pub fn host_offset(&self, cluster: HostCluster) -> HostOffset {
        HostOffset(cluster.0 << self.cluster_bits)
    }

    /// Returns whether a host offset lies on a cluster boundary.
    pub fn is_aligned(&self, offset: HostOffset) -> bool {
        offset.0 & (self.cluster_size() - 1) == 0
    }

    /// Returns guest bytes rounded outward to whole clusters. The end may lie beyond the end of the
    /// disk.
    pub fn aligned(&self, range: &Range<u64>) -> Range<u64> {
        let cluster_size = self.cluster_size();
        range.start - range.start % cluster_size..range.end.next_multiple_of(cluster_size)
    }

    /// Returns whether a range of guest bytes is whole clusters. The last cluster of the disk
    /// counts as whole if the range reaches the end of the disk.
    pub fn is_whole_clusters(&self, range: &Range<u64>) -> bool {
        let ends = |end: u64| end == self.size || end.is_multiple_of(self.cluster_size());
        range.start.is_multiple_of(self.cluster_size()) && ends(range.end)
    }

    /// Returns the clusters of a cluster-aligned range of guest bytes.
    pub fn clusters(&self, aligned: &Range<u64>) -> Range<GuestCluster> {
        self.guest_cluster(GuestOffset(aligned.start))..self.guest_cluster(GuestOffset(aligned.end))
    }

    /// Returns guest bytes rounded outward to whole subclusters. The end may lie beyond the end of
    /// the disk.
    pub fn aligned_to_subclusters(&self, range: &Range<u64>) -> Range<u64> {
        let size = self.subcluster_size();
        range.start - range.start % size..range.end.next_multiple_of(size)
    }

    /// Returns the subclusters of a range of guest bytes that starts and ends at subclusters.
    pub fn subclusters_of(&self, aligned: &Range<u64>) -> Range<GuestSubcluster> {
        debug_assert!((aligned.start | aligned.end).is_multiple_of(self.subcluster_size()));
        self.guest_subcluster(GuestOffset(aligned.start))
            ..self.guest_subcluster(GuestOffset(aligned.end))
    }

    /// Returns the subclusters that a run of guest bytes with this mapping touches. Those of a
    /// compressed cluster share its mapping, also beyond the end of the disk, so they are all
    /// returned.
    pub fn mapped_with(&self, mapping: Mapping, run: &Range<u64>) -> Range<GuestSubcluster> {
        self.subclusters_of(&match mapping {
            Mapping::Compressed { .. } => self.aligned(run),
            _ => self.aligned_to_subclusters(run),
        })
    }

    /// Returns the guest subcluster that contains `offset`.
    pub fn guest_subcluster(&self, offset: GuestOffset) -> GuestSubcluster {
        GuestSubcluster(offset.0 >> self.subcluster_bits())
    }

    /// Returns the guest bytes of a range of subclusters.
    pub fn guest_range(&self, subclusters: &Range<GuestSubcluster>) -> Range<u64> {
        let bits = self.subcluster_bits();
        subclusters.start.0 << bits..subclusters.end.0 << bits
    }

    /// Returns the cluster that contains a subcluster, and the place of the subcluster in it, from
    /// 0.
    pub fn cluster_of(&self, subcluster: GuestSubcluster) -> (GuestCluster, u32) {
        let bits = self.subclusters_bits();
        let place = subcluster.0 & (u64::from(self.subclusters()) - 1);
        (GuestCluster(subcluster.0 >> bits), place as u32)
    }

    /// Returns the subclusters of a range of clusters.
    pub fn subclusters_in(&self, clusters: &Range<GuestCluster>) -> Range<GuestSubcluster> {
        let bits = self.subclusters_bits();
        GuestSubcluster(clusters.start.0 << bits)..GuestSubcluster(clusters.end.0 << bits)
    }

    /// Returns the end of the whole subclusters in a range of guest bytes that ends at `end`. The
    /// last subcluster of the disk counts as whole if the range reaches the end of the disk.
    pub fn whole_end(&self, end: u64) -> u64 {
        if end == self.size() {
            end.next_multiple_of(self.subcluster_size())
        } else {
            end - end % self.subcluster_size()
        }
    }

    /// Returns the L1 index and the L2 index of a guest cluster.
    pub fn table_indexes(&self, cluster: GuestCluster) -> (usize, usize) {
        let bits = self.cluster_bits - 3 - u32::from(self.extended_l2);
        ((cluster.0 >> bits) as usize, (cluster.0 & ((1 << bits) - 1)) as usize)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn geometry_of_the_usual_image() {
        let geometry = Geometry::new(3, 16, 4, (10 << 30) + 1).unwrap();
        assert_eq!(geometry.l2_entries(), 8192);
        assert_eq!(geometry.l2_span(), 512 << 20);
        assert_eq!(geometry.l1_entries_needed(), 21);
        assert_eq!(geometry.refblock_entries(), 32768);
        assert_eq!(geometry.guest_clusters(), ClusterCount(163841));
        assert_eq!(geometry.table_indexes(GuestCluster(8193)), (1, 1));
    }

    #[test]
    fn ranges_are_split_at_clusters() {
        let geometry = Geometry::new(3, 12, 4, 10_000).unwrap();
        assert_eq!(geometry.aligned(&(4095..4097)), 0..8192);
        assert_eq!(geometry.aligned(&(4096..8192)), 4096..8192);
        assert_eq!(geometry.aligned(&(9000..10_000)), 8192..12_288);
        assert_eq!(geometry.clusters(&(4096..12_288)), GuestCluster(1)..GuestCluster(3));
        assert_eq!(
            [4096, 9999, 10_000].map(|end| geometry.whole_end(end)),
            [4096, 8192, 12_288],
            "the last cluster counts as whole with the end of the disk"
        );
    }

    #[test]
    fn geometry_with_subclusters() {
        let geometry = Geometry::new(3, 16, 4, (10 << 30) + 1).unwrap();
        assert_eq!((geometry.subclusters(), geometry.subcluster_size()), (1, 65536));
        assert_eq!((geometry.all_subclusters(), geometry.l2_entry_words()), (1, 1));
        let extended = geometry.with_extended_l2().unwrap().resized(10 << 30).unwrap();
        assert_eq!((extended.subclusters(), extended.subcluster_size()), (32, 2048));
        assert_eq!((extended.all_subclusters(), extended.l2_entry_words()), (u32::MAX, 2));
        assert_eq!((extended.l2_entries(), extended.l2_span()), (4096, 256 << 20));
        assert_eq!(extended.l1_entries_needed(), 40);
        assert_eq!(extended.table_indexes(GuestCluster(4097)), (1, 1));
        assert_eq!(extended.aligned_to_subclusters(&(2047..4097)), 0..6144);
        assert_eq!(
            extended.subclusters_of(&(2048..131_072)),
            GuestSubcluster(1)..GuestSubcluster(64)
        );
        assert_eq!(extended.cluster_of(GuestSubcluster(65)), (GuestCluster(2), 1));
        assert_eq!(
            extended.subclusters_in(&(GuestCluster(1)..GuestCluster(2))),
            GuestSubcluster(32)..GuestSubcluster(64)
        );
        assert_eq!(
            extended.guest_range(&(GuestSubcluster(32)..GuestSubcluster(33))),
            65_536..67_584
        );
        assert_eq!((extended.whole_end(2049), extended.whole_end(10 << 30)), (2048, 10 << 30));
        assert!(Geometry::new(3, 13, 4, 0).unwrap().with_extended_l2().is_err());
        assert!(Geometry::new(2, 16, 4, 0).unwrap().with_extended_l2().is_err());
        assert!(Geometry::new(3, 14, 4, 0).unwrap().with_extended_l2().is_ok());
    }

    #[test]
    fn bounds_are_checked_before_any_shift() {
        for bad in [0, 8, 22, 63, 64, u32::MAX] {
            assert!(Geometry::new(3, bad, 4, 0).is_err());
        }
        assert!(Geometry::new(3, 16, 7, 0).is_err());
        assert!(Geometry::new(3, 16, 4, (1 << 61) + 1).is_err());
        assert!(Geometry::new(4, 16, 4, 0).is_err());
        assert_eq!(Geometry::new(3, 9, 6, 0).unwrap().refblock_entries(), 64);
        assert_eq!(Geometry::new(3, 21, 0, 0).unwrap().refblock_entries(), 1 << 24);
    }
}
