//! Which clusters an L2 entry may name, as one bit per cluster: a table that is loaded can name
//! clusters all over the file, and reading the refcount block of each from the file for every table
//! would cost more than the table.
//!
//! With refcounts of 16 bits this takes a sixteenth of the memory of the blocks.

use std::ops::Range;

/// Most memory for the bits of one image, in bytes: those of 8 TiB with clusters of 64 KiB.
const MEMORY: usize = 16 << 20;

/// Clusters whose refcount is one and that are not metadata, as far as it is known: for the
/// clusters under some of the refcount blocks.
#[derive(Debug)]
pub(super) struct DataClusters {
    /// Clusters that one block counts: a power of two.
    per_block: u64,
    /// For each block that is known, one bit for each of its clusters. A block that is known stays
    /// so: tables whose clusters lie under more blocks than the limit allows would otherwise push
    /// out what the next one needs.
    blocks: Vec<Option<Box<[u64]>>>,
    /// Bytes that may still be used for further blocks.
    pub room: usize,
}

impl DataClusters {
    /// Makes a record without a known block. `per_block` is the number of clusters that a refcount
    /// block counts.
    ///
    /// # Panics
    /// If that is no power of two.
    pub fn new(per_block: u64) -> Self {
        assert!(per_block.is_power_of_two());
        DataClusters { per_block, blocks: Vec::new(), room: MEMORY }
    }

    /// Returns the index of the block that counts a cluster, and the index inside that block. The
    /// check of a table asks this for thousands of clusters, and a division is slow.
    fn place(&self, cluster: u64) -> (u64, u64) {
        (cluster >> self.per_block.trailing_zeros(), cluster & (self.per_block - 1))
    }

    /// Returns whether the clusters under this block are known.
    pub fn has_block(&self, index: u64) -> bool {
        matches!(self.blocks.get(index as usize), Some(Some(_)))
    }

    /// Returns whether all of these clusters are known, have a refcount of one and are not
    /// metadata.
    pub fn contain(&self, clusters: &Range<u64>) -> bool {
        let mut at = clusters.start;
        while at < clusters.end {
            let (index, first) = self.place(at);
            let Some(Some(bits)) = self.blocks.get(index as usize) else { return false };
            // Up to the end of a word, which is never beyond the end of the block.
            let len = (64 - first % 64).min(clusters.end - at).min(self.per_block - first);
            let mask = u64::MAX >> (64 - len) << (first % 64);
            if bits[(first / 64) as usize] & mask != mask {
                return false;
            }
            at += len;
        }
        true
    }

    /// Returns whether there is memory for one more block.
    pub fn has_room(&self) -> bool {
        self.room >= self.block_bytes()
    }

    fn block_bytes(&self) -> usize {
        self.per_block.div_ceil(64) as usize * 8
    }

    /// Records all clusters of the block at `index`, which is not known yet. `is_data` gets the
    /// index of a cluster inside the block.
    ///
    /// # Panics
    /// If there is no memory for it ([`DataClusters::has_room`]).
    pub fn fill(&mut self, index: u64, is_data: impl Fn(usize) -> bool) {
        debug_assert!(!self.has_block(index));
        self.room = self.room.checked_sub(self.block_bytes()).expect("the caller asks for room");
        let word = |first: u64| {
            let in_word = first..self.per_block.min(first + 64);
            in_word.rev().fold(0, |bits, at| bits << 1 | u64::from(is_data(at as usize)))
        };
        let bits: Box<[u64]> = (0..self.per_block).step_by(64).map(word).collect();
        let index = index as usize;
        if self.blocks.len() <= index {
            self.blocks.resize(index + 1, None);
        }
        self.blocks[index] = Some(bits);
    }

    /// Records one cluster, if its block is known.
    pub fn set(&mut self, cluster: u64, is_data: bool) {
        let (index, at) = self.place(cluster);
        if let Some(Some(bits)) = self.blocks.get_mut(index as usize) {
            let bit = 1 << (at % 64);
            match is_data {
                true => bits[(at / 64) as usize] |= bit,
                false => bits[(at / 64) as usize] &= !bit,
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use sim::random::Random;

    /// Protects: V24, V27. The bits are those of a plain list, for as many blocks as the memory is
    /// enough.
    #[test]
    fn bits_are_those_of_a_list() {
        let mut random = Random::of_test(7);
        for per_block in [8, 64, 256] {
            let mut list = vec![false; 10 * per_block as usize];
            let mut data = DataClusters::new(per_block);
            data.room = 3 * (per_block as usize).div_ceil(64) * 8;
            let mut filled: Vec<u64> = Vec::new();
            for _ in 0..3000 {
                let at = random.below(10 * per_block);
                match random.below(4) {
                    0 if !filled.contains(&(at / per_block)) => {
                        let index = at / per_block;
                        assert_eq!(data.has_room(), filled.len() < 3);
                        if data.has_room() {
                            data.fill(index, |bit| list[(index * per_block) as usize + bit]);
                            filled.push(index);
                        }
                    }
                    0..=2 => {
                        list[at as usize] = random.below(20) > 0;
                        data.set(at, list[at as usize]);
                    }
                    _ => {
                        let end = (at + 1 + random.below(2 * per_block)).min(10 * per_block);
                        let is_known = |at: u64| filled.contains(&(at / per_block));
                        let wanted = (at..end).all(|at| is_known(at) && list[at as usize]);
                        assert_eq!(data.contain(&(at..end)), wanted, "{per_block}: {at}..{end}");
                    }
                }
                assert!((0..10).all(|index| data.has_block(index) == filled.contains(&index)));
            }
        }
    }
}
