//! A checker and a reader of qcow2 images, written from the specification (docs/interop/qcow2.rst in QEMU's sources) and from nothing
//! else: it shares no line with the engine, so that both cannot be wrong in the same way. Internal snapshots, external data files,
//! extended L2 entries and the content of compressed clusters are left out; an image with one of the first three is an error here.

/// What a check found; words as in `qemu-img check`.
#[derive(Clone, Debug, Default)]
pub struct Verdict {
    /// Everything that makes the image wrong, one line each.
    pub errors: Vec<String>,
    /// Clusters of the file that are counted more often than they are referenced: lost space, nothing else.
    pub leaks: u64,
}

/// What an image says of a place of the virtual disk.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Held {
    /// Its bytes are in the file from this host offset on, up to the end of the cluster.
    Data(u64),
    /// Compressed: the host offset of the first byte, and the number of bytes up to the end of the last sector.
    Compressed(u64, u64),
    /// Zeros.
    Zero,
    /// The backing file decides; zeros without one.
    Unallocated,
}

/// The fields of a header that are needed to find anything.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Layout {
    /// Version, 2 or 3.
    pub version: u32,
    /// log2 of the cluster size.
    pub cluster_bits: u32,
    /// log2 of the width of a refcount in bits.
    pub refcount_order: u32,
    /// Virtual size, bytes.
    pub size: u64,
    /// Host offset of the L1 table in bytes, and its number of entries.
    pub l1: (u64, u64),
    /// Host offset of the refcount table in bytes, and its number of clusters.
    pub refcount_table: (u64, u64),
    /// Where the name of the backing file stands in bytes, and its length; zeros for none.
    pub backing: (u64, u64),
    /// Incompatible, compatible and autoclear feature bits.
    pub features: [u64; 3],
}

/// A big-endian number of `width` bytes; zero where the bytes end before.
fn number(bytes: &[u8], at: u64, width: usize) -> u64 {
    let at = usize::try_from(at).unwrap_or(usize::MAX);
    match at.checked_add(width).and_then(|end| bytes.get(at..end)) {
        Some([a, b, c, d, e, f, g, h]) => u64::from_be_bytes([*a, *b, *c, *d, *e, *f, *g, *h]),
        Some(bytes) => bytes.iter().fold(0, |value, &byte| value << 8 | u64::from(byte)),
        None => 0,
    }
}

const COPIED: u64 = 1 << 63;
const COMPRESSED: u64 = 1 << 62;
const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;

impl Layout {
    /// Reads the header as it stands, whatever it says.
    pub fn unchecked(bytes: &[u8]) -> Layout {
        let version = number(bytes, 4, 4) as u32;
        let of_version_3 = |at, width| if version >= 3 { number(bytes, at, width) } else { 0 };
        Layout {
            version,
            cluster_bits: number(bytes, 20, 4) as u32,
            refcount_order: if version >= 3 { number(bytes, 96, 4) as u32 } else { 4 },
            size: number(bytes, 24, 8),
            l1: (number(bytes, 40, 8), number(bytes, 36, 4)),
            refcount_table: (number(bytes, 48, 8), number(bytes, 56, 4)),
            backing: (number(bytes, 8, 8), number(bytes, 16, 4)),
            features: [of_version_3(72, 8), of_version_3(80, 8), of_version_3(88, 8)],
        }
    }

    /// Reads the header and refuses what makes no sense.
    ///
    /// # Errors
    /// What is wrong, in one line.
    pub fn of(bytes: &[u8]) -> Result<Layout, String> {
        let layout = Layout::unchecked(bytes);
        let wrong = |what: String| Err(format!("header: {what}"));
        if bytes.get(..4) != Some(b"QFI\xfb") {
            return wrong("no magic".into());
        }
        if !(2..=3).contains(&layout.version) {
            return wrong(format!("version {}", layout.version));
        }
        if !(9..=21).contains(&layout.cluster_bits) {
            return wrong(format!("cluster_bits {}", layout.cluster_bits));
        }
        let (cluster, len) = (layout.cluster_size(), bytes.len() as u64);
        if layout.version == 3 {
            let length = number(bytes, 100, 4);
            if length < 104 || length > cluster || !length.is_multiple_of(8) {
                return wrong(format!("header_length {length}"));
            }
        }
        if layout.refcount_order > 6 {
            return wrong(format!("refcount_order {}", layout.refcount_order));
        }
        if number(bytes, 32, 4) != 0 || number(bytes, 60, 4) != 0 || layout.features[0] & !0b1011 != 0 {
            return wrong("encryption, snapshots or features that are not known here".into());
        }
        let (offset, length) = layout.backing;
        if (offset != 0) != (length != 0) || length > 1023 || offset.checked_add(length).is_none_or(|end| end > cluster) {
            return wrong(format!("backing file name of {length} bytes at {offset:#x}"));
        }
        let inside = |(at, bytes): (u64, u64)| at != 0 && at.is_multiple_of(cluster) && at.checked_add(bytes).is_some_and(|end| end <= len);
        let (table, clusters) = layout.refcount_table;
        if clusters == 0 || !inside((table, clusters << layout.cluster_bits)) {
            return wrong(format!("refcount table of {clusters} clusters at {table:#x}"));
        }
        let (l1, entries) = layout.l1;
        if entries > 0 && !inside((l1, entries * 8)) {
            return wrong(format!("L1 table of {entries} entries at {l1:#x}"));
        }
        if entries < layout.size.div_ceil(cluster * cluster / 8) {
            return wrong(format!("L1 table of {entries} entries is too short for {} bytes", layout.size));
        }
        Ok(layout)
    }

    /// Cluster size, bytes.
    pub fn cluster_size(&self) -> u64 {
        1 << self.cluster_bits
    }

    /// Refcounts in a refcount block.
    pub fn block_entries(&self) -> u64 {
        (self.cluster_size() * 8) >> self.refcount_order
    }

    /// The refcount at `index` of a refcount block.
    pub fn refcount_in(&self, block: &[u8], index: u64) -> u64 {
        match self.refcount_order {
            order @ 0..3 => {
                let (bits, bit) = (1 << order, index << order);
                let byte = block.get((bit / 8) as usize).copied().unwrap_or(0);
                u64::from(byte >> (bit % 8)) & ((1 << bits) - 1)
            }
            order => number(block, index << (order - 3), 1 << (order - 3)),
        }
    }

    /// The refcount of a cluster.
    pub fn refcount(&self, bytes: &[u8], cluster: u64) -> u64 {
        let (index, entry) = (cluster / self.block_entries(), cluster % self.block_entries());
        if index >= self.refcount_table.1 * self.cluster_size() / 8 {
            return 0;
        }
        let block = number(bytes, self.refcount_table.0 + index * 8, 8) as usize;
        if block == 0 { 0 } else { bytes.get(block..).map_or(0, |block| self.refcount_in(block, entry)) }
    }

    /// The clusters that an L2 entry names, first and count, and what it says of the guest's bytes; the offset is that of the cluster.
    pub fn l2_entry(&self, raw: u64) -> (Option<(u64, u64)>, Held) {
        if raw & COMPRESSED != 0 {
            let bits = 62 - (self.cluster_bits - 8);
            let at = raw & ((1 << bits) - 1);
            let sectors = (raw & (COMPRESSED - 1)) >> bits;
            let end = at - at % 512 + (sectors + 1) * 512;
            let first = at >> self.cluster_bits;
            return (Some((first, ((end - 1) >> self.cluster_bits) - first + 1)), Held::Compressed(at, end - at));
        }
        let at = raw & OFFSET;
        let names = (at != 0).then_some((at >> self.cluster_bits, 1));
        match (raw & 1, at) {
            (0, 0) => (names, Held::Unallocated),
            (0, at) => (names, Held::Data(at)),
            _ => (names, Held::Zero),
        }
    }

    /// What the image says of a guest offset in bytes.
    pub fn find(&self, bytes: &[u8], guest: u64) -> Held {
        let l2_entries = self.cluster_size() / 8;
        let cluster = guest >> self.cluster_bits;
        if cluster / l2_entries >= self.l1.1 {
            return Held::Unallocated;
        }
        let table = number(bytes, self.l1.0 + cluster / l2_entries * 8, 8) & OFFSET;
        if table == 0 {
            return Held::Unallocated;
        }
        match self.l2_entry(number(bytes, table + cluster % l2_entries * 8, 8)).1 {
            Held::Data(at) => Held::Data(at + guest % self.cluster_size()),
            other => other,
        }
    }
}

/// One reference that says whether it is the only one.
struct Named {
    cluster: u64,
    copied: bool,
    /// L1 index, and L2 index where it is an L2 entry.
    entry: (u64, Option<u64>),
}

struct Walk<'a> {
    bytes: &'a [u8],
    layout: Layout,
    /// By cluster of the file.
    references: Vec<u32>,
    is_metadata: Vec<bool>,
    named: Vec<Named>,
    errors: Vec<String>,
}

/// Checks everything.
pub fn check(bytes: &[u8]) -> Verdict {
    let layout = match Layout::of(bytes) {
        Ok(layout) => layout,
        Err(error) => return Verdict { errors: vec![error], leaks: 0 },
    };
    let clusters = (bytes.len() as u64).div_ceil(layout.cluster_size()) as usize;
    let (references, is_metadata) = (vec![0; clusters], vec![false; clusters]);
    let mut walk = Walk { bytes, layout, references, is_metadata, named: Vec::new(), errors: Vec::new() };
    walk.all();
    let leaks = walk.count();
    Verdict { errors: walk.errors, leaks }
}

impl Walk<'_> {
    fn all(&mut self) {
        let layout = self.layout;
        let cluster = layout.cluster_size();
        self.metadata(0, 1, "header");
        let (table, clusters) = layout.refcount_table;
        self.metadata(table >> layout.cluster_bits, clusters, "refcount table");
        self.metadata(layout.l1.0 >> layout.cluster_bits, (layout.l1.1 * 8).div_ceil(cluster), "L1 table");
        for index in 0..clusters * cluster / 8 {
            let block = number(self.bytes, table + index * 8, 8);
            if block == 0 {
                continue;
            }
            if !block.is_multiple_of(cluster) || block + cluster > self.bytes.len() as u64 {
                self.errors.push(format!("refcount table, index {index}: block at {block:#x} is unaligned or outside the file"));
                continue;
            }
            self.metadata(block >> layout.cluster_bits, 1, "refcount block");
        }
        let mut tables = Vec::new();
        for index in 0..layout.l1.1 {
            let raw = number(self.bytes, layout.l1.0 + index * 8, 8);
            let at = raw & OFFSET;
            if raw & !(OFFSET | COPIED) != 0 || raw == COPIED {
                self.errors.push(format!("L1 table, index {index}: reserved bits in {raw:#x}"));
            }
            if at == 0 {
                continue;
            }
            if !at.is_multiple_of(cluster) || at + cluster > self.bytes.len() as u64 {
                self.errors.push(format!("L1 table, index {index}: L2 table at {at:#x} is unaligned or outside the file"));
                continue;
            }
            self.metadata(at >> layout.cluster_bits, 1, "L2 table");
            self.named.push(Named { cluster: at >> layout.cluster_bits, copied: raw & COPIED != 0, entry: (index, None) });
            tables.push((index, at));
        }
        for (l1_index, table) in tables {
            let start = table as usize;
            for (index, raw) in self.bytes[start..start + cluster as usize].chunks_exact(8).enumerate() {
                let raw = number(raw, 0, 8);
                if raw != 0 {
                    self.l2_entry(l1_index, index as u64, raw);
                }
            }
        }
    }

    /// Clusters that must not be anything else.
    fn metadata(&mut self, first: u64, count: u64, what: &str) {
        for cluster in first..first + count {
            let Some(is_metadata) = self.is_metadata.get_mut(cluster as usize) else {
                self.errors.push(format!("{what}: cluster {cluster} is outside the file"));
                continue;
            };
            if std::mem::replace(is_metadata, true) {
                self.errors.push(format!("{what}: cluster {cluster} overlaps other metadata"));
            }
            self.references[cluster as usize] += 1;
        }
    }

    fn l2_entry(&mut self, l1_index: u64, index: u64, raw: u64) {
        let layout = self.layout;
        let mut wrong = |what: &str| self.errors.push(format!("L2 table {l1_index}, index {index}: {raw:#x} {what}"));
        let (names, held) = layout.l2_entry(raw);
        let copied = raw & COPIED != 0;
        if matches!(held, Held::Compressed(..)) {
            if copied {
                wrong("is compressed and COPIED");
            }
        } else {
            if raw & 0x3f00_0000_0000_01fe != 0 || (raw & 1 != 0 && layout.version < 3) {
                wrong("has reserved bits");
            }
            if !(raw & OFFSET).is_multiple_of(layout.cluster_size()) {
                wrong("is not aligned");
            }
            if copied && names.is_none() {
                wrong("is COPIED and names nothing");
            }
        }
        let Some((first, count)) = names else { return };
        for cluster in first..first + count {
            match self.is_metadata.get(cluster as usize) {
                None => wrong("is outside the file"),
                Some(true) => wrong("names metadata"),
                Some(false) => {}
            }
            if let Some(references) = self.references.get_mut(cluster as usize) {
                *references += 1;
            }
        }
        if !matches!(held, Held::Compressed(..)) {
            self.named.push(Named { cluster: first, copied, entry: (l1_index, Some(index)) });
        }
    }

    /// Holds the refcounts against what was found; returns the number of leaks.
    fn count(&mut self) -> u64 {
        let mut leaks = 0;
        let entries = self.layout.block_entries();
        for (index, references) in self.references.chunks(entries as usize).enumerate() {
            let at = number(self.bytes, self.layout.refcount_table.0 + index as u64 * 8, 8) as usize;
            let in_table = (index as u64) < self.layout.refcount_table.1 * self.layout.cluster_size() / 8;
            let block = if at == 0 || !in_table { &[][..] } else { self.bytes.get(at..).unwrap_or(&[]) };
            for (entry, &references) in references.iter().enumerate() {
                let refcount = self.layout.refcount_in(block, entry as u64);
                if refcount < u64::from(references) {
                    let cluster = index as u64 * entries + entry as u64;
                    self.errors.push(format!("cluster {cluster}: refcount {refcount}, references {references}"));
                }
                leaks += u64::from(refcount > u64::from(references));
            }
        }
        for named in std::mem::take(&mut self.named) {
            let refcount = self.layout.refcount(self.bytes, named.cluster);
            if (refcount == 1) != named.copied {
                let (cluster, entry) = (named.cluster, named.entry);
                self.errors.push(format!("cluster {cluster}: refcount {refcount}, COPIED is {} in {entry:?}", named.copied));
            }
        }
        leaks
    }
}

#[cfg(test)]
mod tests;
