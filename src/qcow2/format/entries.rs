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

/// A decoded L2 entry.
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
