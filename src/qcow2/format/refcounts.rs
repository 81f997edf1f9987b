//! Refcount table entries and refcount blocks of every width (specification: "Host cluster
//! management").

use super::{FormatError, Geometry, HostCluster, HostOffset};

/// Bits 0 to 8 of a refcount table entry are reserved.
const TABLE_RESERVED: u64 = 0x1ff;

/// Decodes a refcount table entry: returns the cluster of the refcount block, or `None`.
///
/// # Errors
/// [`FormatError::Corrupt`] for reserved bits or an unaligned offset (V23). The caller checks that
/// the offset is inside the file.
pub fn decode_table_entry(
    raw: u64,
    geometry: &Geometry,
) -> Result<Option<HostCluster>, FormatError> {
    let offset = HostOffset(raw);
    if raw & TABLE_RESERVED != 0 || !geometry.is_aligned(offset) {
        return Err(FormatError::Corrupt(format!(
            "refcount table entry {raw:#018x} is not a cluster offset"
        )));
    }
    Ok((raw != 0).then(|| geometry.host_cluster(offset)))
}

/// One refcount block, in its format on disk. Refcounts have 1, 2, 4, … 64 bits. Widths below a
/// byte are packed from the low bits of a byte up; wider ones are big-endian.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct RefcountBlock {
    bytes: Box<[u8]>,
    order: u32,
}

impl RefcountBlock {
    /// Makes a block of zeros.
    pub fn new(geometry: &Geometry) -> Self {
        RefcountBlock {
            bytes: vec![0; geometry.cluster_size() as usize].into_boxed_slice(),
            order: geometry.refcount_order(),
        }
    }

    /// Makes a block from the bytes of one cluster that was read from disk.
    ///
    /// # Panics
    /// If `bytes` is not one cluster.
    pub fn from_bytes(bytes: Box<[u8]>, geometry: &Geometry) -> Self {
        assert_eq!(bytes.len() as u64, geometry.cluster_size());
        RefcountBlock { bytes, order: geometry.refcount_order() }
    }

    /// Returns the bytes of the block on disk.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// Returns the largest refcount that fits the width.
    pub fn max(&self) -> u64 {
        if self.order == 6 { u64::MAX } else { (1 << (1u32 << self.order)) - 1 }
    }

    /// Returns the refcount at `index`.
    pub fn get(&self, index: usize) -> u64 {
        match self.order {
            0..=2 => {
                let per_byte = 8usize >> self.order;
                let shift = (index % per_byte) << self.order;
                u64::from(self.bytes[index / per_byte] >> shift) & self.max()
            }
            3.. => {
                let width = 1usize << (self.order - 3);
                self.bytes[index * width..][..width]
                    .iter()
                    .fold(0, |value, &byte| value << 8 | u64::from(byte))
            }
        }
    }

    /// Sets the refcount at `index`.
    ///
    /// # Panics
    /// If `value` does not fit the width: the caller checks (R15).
    pub fn set(&mut self, index: usize, value: u64) {
        assert!(value <= self.max(), "refcount {value} does not fit");
        match self.order {
            0..=2 => {
                let per_byte = 8usize >> self.order;
                let shift = (index % per_byte) << self.order;
                let mask = (self.max() as u8) << shift;
                let byte = &mut self.bytes[index / per_byte];
                *byte = *byte & !mask | (value as u8) << shift;
            }
            3.. => {
                let width = 1usize << (self.order - 3);
                self.bytes[index * width..][..width]
                    .copy_from_slice(&value.to_be_bytes()[8 - width..]);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_width_keeps_its_neighbours() {
        for order in 0..=6 {
            let g = Geometry::new(3, 9, order, 0).unwrap();
            let mut block = RefcountBlock::new(&g);
            let n = g.refblock_entries() as usize;
            let value =
                |i: usize| (i as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15) & block_max(order);
            for i in 0..n {
                block.set(i, value(i));
            }
            for i in 0..n {
                assert_eq!(block.get(i), value(i), "order {order} index {i}");
            }
            assert_eq!(RefcountBlock::from_bytes(block.bytes().into(), &g), block);
        }
    }

    fn block_max(order: u32) -> u64 {
        if order == 6 { u64::MAX } else { (1 << (1u64 << order)) - 1 }
    }

    #[test]
    fn bytes_are_those_of_the_specification() {
        let mut block = RefcountBlock::new(&Geometry::new(3, 9, 0, 0).unwrap());
        block.set(0, 1);
        block.set(9, 1);
        assert_eq!(&block.bytes()[..2], &[0b1, 0b10], "1 bit wide: least significant bit first");
        let mut block = RefcountBlock::new(&Geometry::new(3, 9, 4, 0).unwrap());
        block.set(1, 0x1234);
        assert_eq!(&block.bytes()[..4], &[0, 0, 0x12, 0x34], "16 bits wide: big-endian");
    }

    #[test]
    fn table_entries() {
        let g = Geometry::new(3, 16, 4, 0).unwrap();
        assert_eq!(decode_table_entry(0, &g), Ok(None));
        assert_eq!(decode_table_entry(0x2_0000, &g), Ok(Some(HostCluster(2))));
        assert!(decode_table_entry(0x2_0001, &g).is_err());
        assert!(decode_table_entry(0x2_0200, &g).is_err());
    }
}
