//! What an image says, read from the specification alone: whose each cluster is, whether the refcounts add up, what a guest reads.

use std::collections::{BTreeMap, BTreeSet};

use super::template::{COMPRESSED, COPIED};

const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;

/// An image as far as its header makes sense.
pub(super) struct Spec<'a> {
    bytes: &'a [u8],
    pub version: u32,
    pub bits: u32,
    pub order: u32,
    /// Virtual size, bytes, as it stands in the header.
    pub size: u64,
}

/// Whether an image is consistent.
#[derive(Debug, Default)]
pub(super) struct Verdict {
    /// What is wrong: writing may destroy data. Empty for a consistent image.
    pub corruptions: Vec<String>,
    /// Clusters that are counted more often than referenced.
    pub leaks: u64,
    /// Behind the last cluster that is counted.
    pub counted_end: u64,
}

impl<'a> Spec<'a> {
    /// `None` where the header is too broken to say where anything is.
    pub fn new(bytes: &'a [u8]) -> Option<Self> {
        let field = |at: usize| bytes.get(at..at + 4).map(|field| be(field) as u32);
        let (version, bits) = (field(4)?, field(20)?);
        let order = if version == 2 { 4 } else { field(96)? };
        let makes_sense = (2..=3).contains(&version) && (9..=21).contains(&bits) && order <= 6 && bytes.len() >= 104;
        makes_sense.then(|| Spec { bytes, version, bits, order, size: be(&bytes[24..32]) / 512 * 512 })
    }

    pub fn cluster(&self) -> u64 {
        1 << self.bits
    }

    /// How many clusters the file has, the last one perhaps in part.
    pub fn clusters(&self) -> u64 {
        (self.bytes.len() as u64).div_ceil(self.cluster())
    }

    fn header_field(&self, at: usize, len: usize) -> u64 {
        be(&self.bytes[at..at + len])
    }

    /// The eight-byte words of a table, as far as they are in the file.
    fn words(&self, at: u64, count: u64) -> impl Iterator<Item = u64> + use<'a> {
        let start = (at.min(self.bytes.len() as u64)) as usize;
        let len = count.saturating_mul(8).min((self.bytes.len() - start) as u64) as usize;
        self.bytes[start..start + len].chunks_exact(8).map(be)
    }

    pub fn l1(&self) -> (u64, u64) {
        (self.header_field(40, 8), self.header_field(36, 4))
    }

    pub fn refcount_table(&self) -> (u64, u64) {
        (self.header_field(48, 8), self.header_field(56, 4).saturating_mul(self.cluster()) / 8)
    }

    /// Where the L2 tables are, with the index in the L1 table and COPIED.
    pub fn l2_tables(&self) -> Vec<(usize, u64, bool)> {
        let (at, count) = self.l1();
        let entries = self.words(at, count).enumerate();
        entries.filter(|(_, raw)| raw & OFFSET != 0).map(|(index, raw)| (index, raw & OFFSET, raw & COPIED != 0)).collect()
    }

    /// Where the refcount blocks are, with the index in the table.
    pub fn blocks(&self) -> Vec<(u64, u64)> {
        let (at, count) = self.refcount_table();
        (0..).zip(self.words(at, count)).filter(|(_, raw)| raw & !0x1ff != 0).map(|(index, raw)| (index, raw & !0x1ff)).collect()
    }

    /// The raw entries of an L2 table.
    pub fn l2_entries(&self, table: u64) -> impl Iterator<Item = u64> + use<'a> {
        self.words(table, self.cluster() / 8)
    }

    /// Every cluster that holds metadata, as often as something names it.
    fn metadata_references(&self) -> Vec<u64> {
        let (l1, l1_entries) = self.l1();
        let (table, table_entries) = self.refcount_table();
        let mut list = vec![0];
        for (at, entries) in [(l1, l1_entries), (table, table_entries)] {
            let first = at >> self.bits;
            let count = entries.saturating_mul(8).div_ceil(self.cluster());
            list.extend(first..first.saturating_add(count.min(self.clusters() + 1)));
        }
        list.extend(self.blocks().iter().map(|(_, at)| at >> self.bits));
        list.extend(self.l2_tables().iter().map(|(_, at, _)| at >> self.bits));
        list
    }

    /// The clusters that hold metadata.
    pub fn metadata(&self) -> BTreeSet<u64> {
        self.metadata_references().into_iter().collect()
    }

    fn count(&self, blocks: &BTreeMap<u64, u64>, cluster: u64) -> u64 {
        let per_block = (8u64 << self.bits) >> self.order;
        let Some(&block) = blocks.get(&(cluster / per_block)) else { return 0 };
        self.count_in(block, cluster % per_block)
    }

    /// The refcount at `index` of the block at byte `block`.
    fn count_in(&self, block: u64, index: u64) -> u64 {
        let bit = index << self.order;
        let at = block.saturating_add(bit / 8).min(self.bytes.len() as u64) as usize;
        match self.order {
            0..=2 => {
                let byte = self.bytes.get(at).copied().unwrap_or(0);
                u64::from(byte >> (bit % 8)) & super::template::most_of(self.order)
            }
            _ => self.bytes.get(at..at + (1 << (self.order - 3))).map_or(0, be),
        }
    }

    /// Counts every reference.
    pub fn verdict(&self) -> Verdict {
        let mut verdict = Verdict::default();
        let mut references: BTreeMap<u64, u64> = BTreeMap::new();
        let mut metadata = BTreeSet::new();
        for cluster in self.metadata_references() {
            *references.entry(cluster).or_default() += 1;
            if !metadata.insert(cluster) {
                verdict.corruptions.push(format!("cluster {cluster} is metadata twice"));
            }
        }
        let file = self.bytes.len() as u64;
        for (table, at) in self.blocks() {
            if !at.is_multiple_of(self.cluster()) || at.saturating_add(self.cluster()) > file {
                verdict.corruptions.push(format!("refcount block {table} at {at:#x}"));
            }
        }
        let blocks: BTreeMap<u64, u64> = self.blocks().into_iter().collect();
        for (at, count) in [self.l1(), self.refcount_table()] {
            for (index, raw) in self.words(at, count).enumerate() {
                let reserved = if (at, count) == self.l1() { 0x7f00_0000_0000_01ff } else { 0x1ff };
                if raw & reserved != 0 {
                    verdict.corruptions.push(format!("entry {index} of the table at {at:#x} is {raw:#x}"));
                }
            }
        }
        let mut copied = Vec::new();
        for (index, table, is_copied) in self.l2_tables() {
            if !table.is_multiple_of(self.cluster()) || table.saturating_add(self.cluster()) > file {
                verdict.corruptions.push(format!("L2 table {index} at {table:#x}"));
            }
            if is_copied {
                copied.push(table >> self.bits);
            }
            for raw in self.l2_entries(table) {
                match self.entry(raw) {
                    Err(what) => verdict.corruptions.push(format!("entry {raw:#x} of L2 table {index} {what}")),
                    Ok(None) => {}
                    Ok(Some((first, last))) => {
                        for cluster in first..=last {
                            *references.entry(cluster).or_default() += 1;
                            if metadata.contains(&cluster) {
                                verdict.corruptions.push(format!("entry {raw:#x} of L2 table {index} names metadata"));
                            }
                        }
                        if raw & COPIED != 0 {
                            copied.push(first);
                        }
                    }
                }
            }
        }
        for (&cluster, &actual) in &references {
            let counted = self.count(&blocks, cluster);
            if counted < actual {
                verdict.corruptions.push(format!("cluster {cluster} is counted {counted} times and referenced {actual} times"));
            } else if counted > actual {
                verdict.leaks += 1;
            }
        }
        for cluster in copied {
            if self.count(&blocks, cluster) != 1 || references.get(&cluster) != Some(&1) {
                verdict.corruptions.push(format!("cluster {cluster} is COPIED"));
            }
        }
        let per_block = (8u64 << self.bits) >> self.order;
        for (&index, &at) in &blocks {
            for entry in 0..per_block {
                if self.count_in(at, entry) == 0 {
                    continue;
                }
                let cluster = index.saturating_mul(per_block).saturating_add(entry);
                verdict.counted_end = verdict.counted_end.max(cluster.saturating_add(1));
                verdict.leaks += u64::from(!references.contains_key(&cluster));
            }
        }
        verdict
    }

    /// The host clusters that an L2 entry names, first and last.
    fn entry(&self, raw: u64) -> Result<Option<(u64, u64)>, &'static str> {
        let file = self.bytes.len() as u64;
        if raw & COMPRESSED != 0 {
            let (at, len) = self.compressed(raw);
            if raw & COPIED != 0 || at >= 1 << 56 || at + len > file.next_multiple_of(512) {
                return Err("is a bad compressed one");
            }
            return Ok(Some((at >> self.bits, (at + len - 1) >> self.bits)));
        }
        let at = raw & OFFSET;
        if raw & 0x3f00_0000_0000_01fe != 0 || !at.is_multiple_of(self.cluster()) || (at != 0 && at >= file) {
            return Err("is bad");
        }
        if (at == 0 && raw & COPIED != 0) || (raw & 1 != 0 && self.version < 3) {
            return Err("has flags that do not go together");
        }
        Ok((at != 0).then_some((at >> self.bits, at >> self.bits)))
    }

    /// Where the compressed bytes of an entry start, and how many there are at most.
    fn compressed(&self, raw: u64) -> (u64, u64) {
        let offset_bits = 62 - (self.bits - 8);
        let at = raw & ((1 << offset_bits) - 1);
        let sectors = (raw & (COMPRESSED - 1)) >> offset_bits;
        (at, (sectors + 1) * 512 - at % 512)
    }

    /// What a guest reads above a raw backing file. `None` where a compressed cluster is broken.
    pub fn content(&self, backing: Option<&[u8]>) -> Option<Vec<u8>> {
        let mut content = vec![0; self.size as usize];
        let tables: BTreeMap<usize, u64> = self.l2_tables().into_iter().map(|(index, at, _)| (index, at)).collect();
        let entries = (self.cluster() / 8) as usize;
        for (index, part) in content.chunks_mut(self.cluster() as usize).enumerate() {
            let table = tables.get(&(index / entries)).copied();
            let raw = table.and_then(|table| self.l2_entries(table).nth(index % entries)).unwrap_or(0);
            if raw & COMPRESSED != 0 {
                let (at, len) = self.compressed(raw);
                let cluster = self.decompress(self.slice(at, len))?;
                part.copy_from_slice(&cluster[..part.len()]);
            } else if raw & 1 != 0 {
            } else if raw & OFFSET != 0 {
                let bytes = self.slice(raw & OFFSET, part.len() as u64);
                part[..bytes.len()].copy_from_slice(bytes);
            } else if let Some(below) = backing.and_then(|backing| backing.get(index << self.bits..)) {
                let len = part.len().min(below.len());
                part[..len].copy_from_slice(&below[..len]);
            }
        }
        Some(content)
    }

    fn slice(&self, at: u64, len: u64) -> &'a [u8] {
        let start = (self.bytes.len() as u64).min(at) as usize;
        &self.bytes[start..(self.bytes.len() as u64).min(at.saturating_add(len)) as usize]
    }

    /// As much as one cluster, with the decoders' plain interface.
    fn decompress(&self, bytes: &[u8]) -> Option<Vec<u8>> {
        let mut cluster = vec![0; self.cluster() as usize];
        let zstd = self.version >= 3 && self.header_field(72, 8) & 8 != 0;
        let result = if zstd {
            let mut decoder = ruzstd::decoding::StreamingDecoder::new(bytes).ok()?;
            std::io::Read::read_exact(&mut decoder, &mut cluster)
        } else {
            std::io::Read::read_exact(&mut flate2::read::DeflateDecoder::new(bytes), &mut cluster)
        };
        result.ok().map(|()| cluster)
    }
}

fn be(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0, |value, &byte| value << 8 | u64::from(byte))
}
