//! L1 and L2 table entries (specification: "L1 table entry", "L2 table entry"). Apart from the full
//! check, which reads raw entries, only this file interprets their bits.

use super::{FormatError, Geometry, HostCluster, HostOffset};

const COPIED: u64 = 1 << 63;
const COMPRESSED: u64 = 1 << 62;
const ZERO: u64 = 1;
/// Bits 9 to 55: a host offset.
const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;
/// Bits 56 to 61 and 1 to 8 of a standard L2 entry.
const L2_RESERVED: u64 = 0x3f00_0000_0000_01fe;
/// Bits 56 to 62 and 0 to 8 of an L1 entry.
const L1_RESERVED: u64 = 0x7f00_0000_0000_01ff;

/// A decoded L1 entry that names an L2 table.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct L1Entry {
    /// The cluster of the L2 table.
    pub table: HostCluster,
    /// COPIED: the refcount of that cluster is exactly one, so the table may be overwritten in
    /// place.
    pub in_place: bool,
}

impl L1Entry {
    /// Decodes an L1 entry; `None` for an unallocated L2 table.
    ///
    /// # Errors
    /// [`FormatError::Corrupt`] for reserved bits, an unaligned offset, or COPIED without an offset
    /// (V22). The caller checks that the offset is inside the file.
    pub fn decode(raw: u64, geometry: &Geometry) -> Result<Option<L1Entry>, FormatError> {
        if raw & L1_RESERVED != 0 {
            return Err(FormatError::Corrupt(format!(
                "L1 entry {raw:#018x} has reserved bits set"
            )));
        }
        let offset = HostOffset(raw & OFFSET);
        if offset.0 == 0 {
            if raw & COPIED != 0 {
                return Err(FormatError::Corrupt(format!(
                    "L1 entry {raw:#018x} is COPIED without an offset"
                )));
            }
            return Ok(None);
        }
        if !geometry.is_aligned(offset) {
            return Err(FormatError::Corrupt(format!(
                "L1 entry {raw:#018x}: L2 table offset is not cluster aligned"
            )));
        }
        Ok(Some(L1Entry { table: geometry.host_cluster(offset), in_place: raw & COPIED != 0 }))
    }

    /// Encodes the entry.
    pub fn encode(&self, geometry: &Geometry) -> u64 {
        geometry.host_offset(self.table).0 | if self.in_place { COPIED } else { 0 }
    }
}

/// What an L2 entry says of one subcluster; without extended L2 entries, a decoded L2 entry.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Mapping {
    /// The image has no cluster: reads come from the backing file, or are zero.
    Unallocated,
    /// The cluster reads as zero. A host cluster may be reserved for later writes.
    Zero {
        /// The reserved host cluster, and whether its refcount is exactly one (COPIED).
        reserved: Option<(HostCluster, bool)>,
    },
    /// A standard cluster.
    Data {
        /// The host cluster with the data.
        host: HostCluster,
        /// COPIED: the refcount is exactly one, so the cluster may be overwritten in place (R10).
        in_place: bool,
    },
    /// A compressed cluster.
    Compressed {
        /// Host offset of the compressed bytes; not aligned.
        at: HostOffset,
        /// Upper bound of their number: up to the end of the last 512-byte sector that contains
        /// any.
        len: u32,
    },
}

impl Mapping {
    /// Decodes an L2 entry.
    ///
    /// # Errors
    /// [`FormatError::Corrupt`] for entries that the format does not allow: reserved bits, an
    /// unaligned offset, COPIED without an offset (V24), the zero flag in version 2 (V25), COPIED
    /// on a compressed cluster, compressed bytes beyond 2^56 (V26). The caller checks that offsets
    /// are inside the file.
    pub fn decode(raw: u64, geometry: &Geometry) -> Result<Mapping, FormatError> {
        let corrupt =
            |what: &str| Err(FormatError::Corrupt(format!("L2 entry {raw:#018x} {what}")));
        // Bit 62 is tested first: in a compressed entry bit 0 belongs to the offset.
        if raw & COMPRESSED != 0 {
            if raw & COPIED != 0 {
                return corrupt("is compressed and COPIED");
            }
            let offset_bits = 62 - (geometry.cluster_bits() - 8);
            let at = raw & ((1 << offset_bits) - 1);
            // The field is as wide as needed to count the sectors of two clusters, so an entry
            // cannot name more compressed bytes than that (V26).
            let additional_sectors = (raw & (COMPRESSED - 1)) >> offset_bits;
            let len = (additional_sectors + 1) * 512 - at % 512;
            if at >= 1 << offset_bits.min(56) {
                return corrupt("has a compressed offset beyond 2^56");
            }
            return match u32::try_from(len) {
                Ok(len) => Ok(Mapping::Compressed { at: HostOffset(at), len }),
                Err(_) => corrupt("has too many compressed bytes"),
            };
        }
        if raw & L2_RESERVED != 0 {
            return corrupt("has reserved bits set");
        }
        let zero = raw & ZERO != 0;
        if zero && geometry.version() < 3 {
            return corrupt("has the zero flag, which version 2 does not know");
        }
        let offset = HostOffset(raw & OFFSET);
        let in_place = raw & COPIED != 0;
        if !geometry.is_aligned(offset) {
            return corrupt("has an offset that is not cluster aligned");
        }
        let host = geometry.host_cluster(offset);
        Ok(match (offset.0 != 0, zero) {
            (false, _) if in_place => return corrupt("is COPIED without an offset"),
            (false, false) => Mapping::Unallocated,
            (false, true) => Mapping::Zero { reserved: None },
            (true, true) => Mapping::Zero { reserved: Some((host, in_place)) },
            (true, false) => Mapping::Data { host, in_place },
        })
    }

    /// Returns the mapping of the cluster that follows by `clusters` in the same run: its host
    /// cluster is contiguous.
    pub fn moved_by(self, clusters: u64) -> Mapping {
        let moved = |host: HostCluster| HostCluster(host.0 + clusters);
        match self {
            Mapping::Data { host, in_place } => Mapping::Data { host: moved(host), in_place },
            Mapping::Zero { reserved } => {
                Mapping::Zero { reserved: reserved.map(|(host, in_place)| (moved(host), in_place)) }
            }
            Mapping::Unallocated | Mapping::Compressed { .. } => self,
        }
    }

    /// Encodes an L2 entry. Never sets COPIED on a compressed entry (R9).
    ///
    /// # Panics
    /// For a compressed mapping, because compressed clusters are never written, and for the zero
    /// flag in version 2. Both are bugs of the caller.
    pub fn encode(&self, geometry: &Geometry) -> u64 {
        match *self {
            Mapping::Unallocated => 0,
            Mapping::Zero { reserved } => {
                assert!(geometry.version() >= 3, "zero flag in a version 2 image");
                let kept = reserved.map_or(0, |(host, in_place)| {
                    Mapping::Data { host, in_place }.encode(geometry)
                });
                kept | ZERO
            }
            Mapping::Data { host, in_place } => {
                geometry.host_offset(host).0 | if in_place { COPIED } else { 0 }
            }
            Mapping::Compressed { .. } => panic!("compressed clusters are never written"),
        }
    }
}

/// The words of an L2 entry as they are in the file.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct RawL2Entry {
    /// The cluster descriptor.
    pub descriptor: u64,
    /// The subcluster bitmap of an extended L2 entry; 0 without extended L2 entries.
    pub bitmap: u64,
}

/// Returns the words of a table as it is in a file: big-endian.
pub fn be_words(bytes: &[u8]) -> impl Iterator<Item = u64> {
    bytes.as_chunks().0.iter().map(|&word| u64::from_be_bytes(word))
}

/// Returns the entries that the words of an L2 table make up.
pub fn raw_entries<'a>(
    words: &'a [u64],
    geometry: &Geometry,
) -> impl Iterator<Item = RawL2Entry> + use<'a> {
    words.chunks_exact(geometry.l2_entry_words()).map(|entry| RawL2Entry {
        descriptor: entry[0],
        bitmap: entry.get(1).copied().unwrap_or(0),
    })
}

impl RawL2Entry {
    /// Returns whether this entry is valid and names the host cluster after that of `before`, a
    /// valid entry, with the same flags.
    #[inline]
    pub fn is_next_of(self, before: RawL2Entry, geometry: &Geometry) -> bool {
        let (allocated, zero) = (self.bitmap as u32, (self.bitmap >> 32) as u32);
        self.descriptor == before.descriptor.wrapping_add(geometry.cluster_size())
            && (self.descriptor ^ before.descriptor) & !OFFSET == 0
            && before.descriptor & COMPRESSED == 0
            && before.descriptor & OFFSET != 0
            && allocated & zero == 0
    }
}

/// A decoded L2 entry: what it says of all subclusters of its cluster.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum L2Entry {
    /// A standard cluster, or none. No subcluster is both allocated and zero, and none is allocated
    /// without a host cluster.
    Standard {
        /// The host cluster, and whether its refcount is exactly one (COPIED).
        host: Option<(HostCluster, bool)>,
        /// One bit for each subcluster whose data is in the host cluster.
        allocated: u32,
        /// One bit for each subcluster that reads as zero.
        zero: u32,
    },
    /// A compressed cluster: host offset of the bytes, and their number, as in
    /// [`Mapping::Compressed`].
    Compressed {
        /// Host offset of the compressed bytes.
        at: HostOffset,
        /// Upper bound of their number.
        len: u32,
    },
}

impl From<Mapping> for L2Entry {
    /// Returns the entry of a cluster with one subcluster.
    fn from(mapping: Mapping) -> L2Entry {
        match mapping {
            Mapping::Unallocated => L2Entry::EMPTY,
            Mapping::Zero { reserved } => {
                L2Entry::Standard { host: reserved, allocated: 0, zero: 1 }
            }
            Mapping::Data { host, in_place } => {
                L2Entry::Standard { host: Some((host, in_place)), allocated: 1, zero: 0 }
            }
            Mapping::Compressed { at, len } => L2Entry::Compressed { at, len },
        }
    }
}

impl L2Entry {
    /// The entry that says nothing: no host cluster, and all subclusters unallocated.
    pub const EMPTY: L2Entry = L2Entry::Standard { host: None, allocated: 0, zero: 0 };

    /// Decodes an L2 entry.
    ///
    /// # Errors
    /// As [`Mapping::decode`]. For an extended entry (V30): the zero flag in the descriptor, a
    /// subcluster that is both allocated and zero, an allocated subcluster without a host cluster,
    /// a compressed cluster with a bitmap.
    pub fn decode(raw: RawL2Entry, geometry: &Geometry) -> Result<L2Entry, FormatError> {
        if !geometry.has_extended_l2() {
            return Mapping::decode(raw.descriptor, geometry).map(L2Entry::from);
        }
        let corrupt = |what: &str| {
            let RawL2Entry { descriptor, bitmap } = raw;
            Err(FormatError::Corrupt(format!("L2 entry {descriptor:#018x} {bitmap:#018x} {what}")))
        };
        // The low half says which subclusters are allocated, the high half which read as zero.
        let (allocated, zero) = (raw.bitmap as u32, (raw.bitmap >> 32) as u32);
        if allocated & zero != 0 {
            return corrupt("has a subcluster that is both allocated and zero");
        }
        Ok(match Mapping::decode(raw.descriptor, geometry)? {
            Mapping::Zero { .. } => {
                return corrupt("has the zero flag, which extended L2 entries do not have");
            }
            Mapping::Unallocated if allocated != 0 => {
                return corrupt("has an allocated subcluster without a host cluster");
            }
            Mapping::Unallocated => L2Entry::Standard { host: None, allocated, zero },
            Mapping::Data { host, in_place } => {
                L2Entry::Standard { host: Some((host, in_place)), allocated, zero }
            }
            Mapping::Compressed { .. } if raw.bitmap != 0 => {
                return corrupt("is compressed and has a subcluster bitmap");
            }
            Mapping::Compressed { at, len } => L2Entry::Compressed { at, len },
        })
    }

    /// Encodes the entry.
    ///
    /// # Panics
    /// As [`Mapping::encode`].
    pub fn encode(&self, geometry: &Geometry) -> RawL2Entry {
        let L2Entry::Standard { host, allocated, zero } = *self else {
            panic!("compressed clusters are never written");
        };
        assert!(
            allocated & zero == 0 && (allocated == 0 || host.is_some()),
            "no entry can say this: {self:?}"
        );
        if !geometry.has_extended_l2() {
            return RawL2Entry { descriptor: self.mapping(0).encode(geometry), bitmap: 0 };
        }
        let data = |(host, in_place)| Mapping::Data { host, in_place }.encode(geometry);
        RawL2Entry {
            descriptor: host.map_or(0, data),
            bitmap: u64::from(zero) << 32 | u64::from(allocated),
        }
    }

    /// Returns the mapping of one subcluster.
    pub fn mapping(&self, subcluster: u32) -> Mapping {
        match *self {
            L2Entry::Compressed { at, len } => Mapping::Compressed { at, len },
            L2Entry::Standard { host, zero, .. } if zero >> subcluster & 1 != 0 => {
                Mapping::Zero { reserved: host }
            }
            L2Entry::Standard { host: Some((host, in_place)), allocated, .. }
                if allocated >> subcluster & 1 != 0 =>
            {
                Mapping::Data { host, in_place }
            }
            L2Entry::Standard { .. } => Mapping::Unallocated,
        }
    }

    /// Returns how many of the `subclusters` of the cluster have the mapping of this one, from this
    /// one on without a gap.
    pub fn run(&self, subcluster: u32, subclusters: u32) -> u32 {
        let L2Entry::Standard { allocated, zero, .. } = *self else {
            return subclusters - subcluster;
        };
        let same = |bits: u32| {
            let bits = bits >> subcluster;
            if bits & 1 != 0 { bits.trailing_ones() } else { bits.trailing_zeros() }
        };
        same(allocated).min(same(zero)).min(subclusters - subcluster)
    }

    /// Returns the host cluster, and whether its refcount is exactly one; `None` also for a
    /// compressed cluster.
    pub fn host(&self) -> Option<(HostCluster, bool)> {
        match *self {
            L2Entry::Standard { host, .. } => host,
            L2Entry::Compressed { .. } => None,
        }
    }

    /// Returns the same entry without COPIED.
    pub fn not_in_place(self) -> L2Entry {
        match self {
            L2Entry::Standard { host: Some((host, _)), allocated, zero } => {
                L2Entry::Standard { host: Some((host, false)), allocated, zero }
            }
            other => other,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn geometry(version: u32, cluster_bits: u32) -> Geometry {
        Geometry::new(version, cluster_bits, 4, 1 << 30).unwrap()
    }

    #[test]
    fn every_kind_goes_round() {
        let g = geometry(3, 16);
        let host = HostCluster(5);
        for mapping in [
            Mapping::Unallocated,
            Mapping::Zero { reserved: None },
            Mapping::Zero { reserved: Some((host, true)) },
            Mapping::Zero { reserved: Some((host, false)) },
            Mapping::Data { host, in_place: true },
            Mapping::Data { host, in_place: false },
        ] {
            assert_eq!(Mapping::decode(mapping.encode(&g), &g), Ok(mapping));
        }
        assert_eq!(Mapping::Data { host, in_place: true }.encode(&g), 0x8000_0000_0005_0000);
    }

    #[test]
    fn extended_entries_go_round() {
        let g = geometry(3, 16).with_extended_l2().unwrap();
        let host = Some((HostCluster(5), true));
        for entry in [
            L2Entry::EMPTY,
            L2Entry::Standard { host: None, allocated: 0, zero: 0xf0 },
            L2Entry::Standard { host, allocated: 0, zero: 0 },
            L2Entry::Standard { host, allocated: 0x8000_0001, zero: 0x7000_0000 },
            L2Entry::Standard { host: Some((HostCluster(9), false)), allocated: u32::MAX, zero: 0 },
        ] {
            assert_eq!(L2Entry::decode(entry.encode(&g), &g), Ok(entry));
        }
        let entry = L2Entry::Standard { host, allocated: 0b0110, zero: 0b1000 };
        assert_eq!(
            entry.encode(&g),
            RawL2Entry { descriptor: 0x8000_0000_0005_0000, bitmap: 0x0000_0008_0000_0006 }
        );
        let data = Mapping::Data { host: HostCluster(5), in_place: true };
        let mappings = [0, 1, 2, 3, 4].map(|subcluster| entry.mapping(subcluster));
        let zero = Mapping::Zero { reserved: host };
        assert_eq!(mappings, [Mapping::Unallocated, data, data, zero, Mapping::Unallocated]);
        assert_eq!([0, 1, 2, 3, 4, 31].map(|from| entry.run(from, 32)), [1, 2, 1, 1, 28, 1]);
        let compressed = RawL2Entry { descriptor: COMPRESSED | 0x5_0123, bitmap: 0 };
        let decoded = L2Entry::decode(compressed, &g).unwrap();
        assert_eq!((decoded.run(7, 32), decoded.host()), (25, None));
        assert!(matches!(decoded.mapping(31), Mapping::Compressed { .. }));
    }

    #[test]
    fn corrupt_extended_entries_are_refused() {
        let g = geometry(3, 16).with_extended_l2().unwrap();
        for (descriptor, bitmap, what) in [
            (0x5_0000, 1 << 32 | 1, "both allocated and zero"),
            (0, 1 << 31, "without a host cluster"),
            (0x5_0001, 1, "zero flag"),
            (ZERO, 0, "zero flag"),
            (COMPRESSED | 0x5_0123, 1 << 40, "compressed and has a subcluster bitmap"),
            (0x5_0002, 1, "reserved bits"),
        ] {
            let error = L2Entry::decode(RawL2Entry { descriptor, bitmap }, &g).unwrap_err();
            assert!(error.to_string().contains(what), "{error}");
        }
        assert_eq!(
            L2Entry::decode(RawL2Entry { descriptor: 0x5_0001, bitmap: 7 }, &geometry(3, 16)),
            Ok(L2Entry::Standard { host: Some((HostCluster(5), false)), allocated: 0, zero: 1 }),
            "without extended L2 entries there is no bitmap"
        );
    }

    /// Protects: V24, V30. A table that is loaded skips the decoding of such entries.
    #[test]
    fn the_next_entry_is_valid_and_names_the_next_cluster() {
        let extended = geometry(3, 16).with_extended_l2().unwrap();
        let last = OFFSET & !0xffff;
        let mut bits: Vec<u64> = (0..64).map(|bit| 1 << bit).collect();
        bits.push(0);
        for g in [geometry(2, 9), geometry(3, 16), extended] {
            for before in [0, 0x5_0000, last, COMPRESSED | 0x5_0000, ZERO, 0x5_0001, 1 << 40] {
                for flags in [0, COPIED] {
                    let before = RawL2Entry { descriptor: before | flags, bitmap: 0 };
                    let Ok(valid) = L2Entry::decode(before, &g) else { continue };
                    let next = before.descriptor.wrapping_add(g.cluster_size());
                    for (flip, bitmap) in bits.iter().flat_map(|a| bits.iter().map(move |b| (a, b)))
                    {
                        let bitmap = if g.has_extended_l2() { bitmap | bitmap >> 7 } else { 0 };
                        let raw = RawL2Entry { descriptor: next ^ flip, bitmap };
                        let host = valid.host().map(|(host, copied)| (host.0 + 1, copied));
                        let decoded = L2Entry::decode(raw, &g).ok().and_then(|entry| entry.host());
                        let is_next = host.is_some()
                            && decoded.map(|(host, copied)| (host.0, copied)) == host
                            && (raw.descriptor ^ before.descriptor) & !OFFSET == 0;
                        assert_eq!(raw.is_next_of(before, &g), is_next, "{before:x?} {raw:x?}");
                    }
                }
            }
        }
    }

    #[test]
    fn compressed_entries_of_the_specification() {
        // cluster_bits 16: 54 offset bits, 8 bits of additional sectors.
        let g = geometry(3, 16);
        let raw = COMPRESSED | 3 << 54 | 0x5_0123;
        assert_eq!(
            Mapping::decode(raw, &g),
            Ok(Mapping::Compressed { at: HostOffset(0x5_0123), len: 4 * 512 - 0x123 })
        );
        // Bit 0 is part of the offset, not the zero flag (even in version 2).
        let raw = COMPRESSED | 0x5_0001;
        assert_eq!(
            Mapping::decode(raw, &geometry(2, 16)),
            Ok(Mapping::Compressed { at: HostOffset(0x5_0001), len: 511 })
        );
        // cluster_bits 9: 61 offset bits, but an offset of 2^56 or more is refused.
        assert!(Mapping::decode(COMPRESSED | 1 << 56, &geometry(3, 9)).is_err());
        assert!(Mapping::decode(COPIED | COMPRESSED | 0x5_0000, &g).is_err());
    }

    #[test]
    fn corrupt_entries_are_refused() {
        let g = geometry(3, 16);
        for raw in [1u64 << 1, 1 << 8, 1 << 56, 1 << 61, 0x200, 0x8000, COPIED, COPIED | ZERO] {
            assert!(Mapping::decode(raw, &g).is_err(), "{raw:#x}");
        }
        assert!(Mapping::decode(0x5_0001, &geometry(2, 16)).is_err(), "zero flag in version 2");
        for raw in [1u64, 1 << 8, 1 << 56, 1 << 62, 0x200, COPIED] {
            assert!(L1Entry::decode(raw, &g).is_err(), "{raw:#x}");
        }
        assert_eq!(L1Entry::decode(0, &g), Ok(None));
        let entry = L1Entry { table: HostCluster(7), in_place: true };
        assert_eq!(L1Entry::decode(entry.encode(&g), &g), Ok(Some(entry)));
    }
}
