//! A checker and reader of qcow2 images for all tests. It is written from the specification
//! (docs/interop/qcow2.rst in QEMU's sources) and shares no code with the engine, so that both
//! cannot be wrong in the same way. It does not support internal snapshots and external data files;
//! an image with one of them is an error.
//!
//! [`Verdict`] separates findings that are harmless for the data from those that are not. Each test
//! thus chooses how strict it is: as strict as `qemu-img check`, stricter ([`Seen::sole`]), or only
//! about errors for which writing would destroy data.
//!
//! **Never:** uses `qcow2::format` or any other part of the engine.
//! **Invariants:** no bytes make it panic. Its work is bounded by the length of the file, and for
//! reading by the virtual size.

use std::collections::{BTreeMap, BTreeSet};

/// The findings of a check, in the words of `qemu-img check`.
#[derive(Clone, Debug, Default)]
pub struct Verdict {
    /// Everything that makes writing dangerous or reading wrong, one line each.
    pub errors: Vec<String>,
    /// Violations of the specification that `qemu-img check` ignores: COPIED in an L2 entry that
    /// names no cluster, the zero flag in version 2, compressed bytes that end past the end of the
    /// file but not in another cluster.
    pub tolerated: Vec<String>,
    /// Clusters of refcount one that are named without COPIED: an error for `qemu-img check`,
    /// harmless for the data.
    pub not_copied: Vec<u64>,
    /// Clusters of the file whose refcount exceeds the number of references: they only waste space.
    pub leaks: u64,
    /// Clusters beyond the end of the file that have a refcount: they only waste space, and
    /// `qemu-img check` does not report them.
    pub leaks_beyond: u64,
    /// The number after that of the last cluster with a refcount.
    pub counted_end: u64,
    /// Every referenced cluster has exactly one reference, not from a compressed cluster, and
    /// refcount one.
    pub sole: bool,
}

impl Verdict {
    /// Returns everything that the specification does not allow.
    pub fn all(&self) -> Vec<String> {
        let not_copied = self
            .not_copied
            .iter()
            .map(|cluster| format!("cluster {cluster} has refcount 1 and is not COPIED"));
        self.errors.iter().chain(&self.tolerated).cloned().chain(not_copied).collect()
    }

    /// Returns the number of leaked clusters, in the file and beyond.
    pub fn all_leaks(&self) -> u64 {
        self.leaks + self.leaks_beyond
    }
}

/// An L2 entry as it is in the file: the descriptor, and the bitmap of an extended entry (0 in an
/// image without them).
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct RawEntry {
    /// The descriptor.
    pub raw: u64,
    /// Bits 0 to 31: the subcluster is allocated. Bits 32 to 63: it reads as zeros.
    pub bitmap: u64,
}

/// What an image holds at a place of the virtual disk.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Contents {
    /// The bytes are in the file from this host offset on, up to the end of the cluster.
    Data(u64),
    /// Compressed data: the host offset of the first byte, and the number of bytes up to the end of
    /// the last sector.
    Compressed(u64, u64),
    /// Zeros.
    Zero,
    /// The bytes of the backing file; zeros without one.
    Unallocated,
}

/// The fields of a header that are needed to find tables and data.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Layout {
    /// Version, 2 or 3.
    pub version: u32,
    /// log2 of the cluster size.
    pub cluster_bits: u32,
    /// log2 of the width of a refcount in bits.
    pub refcount_order: u32,
    /// Virtual size, in bytes.
    pub size: u64,
    /// Host offset of the L1 table in bytes, and its number of entries.
    pub l1: (u64, u64),
    /// Host offset of the refcount table in bytes, and its number of clusters.
    pub refcount_table: (u64, u64),
    /// Offset of the name of the backing file and its length, both in bytes; zeros for none.
    pub backing: (u64, u64),
    /// Incompatible, compatible and autoclear feature bits.
    pub features: [u64; 3],
}

/// Reads a big-endian number of `width` bytes; returns zero if the bytes end before it does.
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

/// Returns the non-zero eight-byte words of a table with their index, up to the end of the file.
fn words(bytes: &[u8], at: u64, count: u64) -> impl Iterator<Item = (u64, u64)> {
    let start = bytes.len().min(usize::try_from(at).unwrap_or(usize::MAX));
    let len =
        usize::try_from(count.saturating_mul(8)).unwrap_or(usize::MAX).min(bytes.len() - start);
    let words = bytes[start..start + len].as_chunks::<8>().0;
    (0..)
        .zip(words)
        .filter(|(_, word)| **word != [0; 8])
        .map(|(index, word)| (index, u64::from_be_bytes(*word)))
}

impl Layout {
    /// Reads the header without any check.
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

    /// Reads the header of an image that may be damaged anywhere; `None` if it does not even define
    /// the cluster size and the refcount width.
    pub fn rough(bytes: &[u8]) -> Option<Layout> {
        let layout = Layout::unchecked(bytes);
        let makes_sense = (2..=3).contains(&layout.version)
            && (9..=21).contains(&layout.cluster_bits)
            && layout.refcount_order <= 6;
        (bytes.len() >= 104 && makes_sense).then_some(layout)
    }

    /// Reads the header and checks it.
    ///
    /// # Errors
    /// A line that says what is wrong.
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
        if number(bytes, 32, 4) != 0
            || number(bytes, 60, 4) != 0
            || layout.features[0] & !0b1_1011 != 0
        {
            return wrong("encryption, snapshots or features that are not known here".into());
        }
        if layout.has_subclusters() && (layout.cluster_bits < 14 || layout.version < 3) {
            return wrong(format!("subclusters in clusters of {cluster} bytes"));
        }
        let (offset, length) = layout.backing;
        if (offset != 0) != (length != 0)
            || length > 1023
            || offset.checked_add(length).is_none_or(|end| end > cluster)
        {
            return wrong(format!("backing file name of {length} bytes at {offset:#x}"));
        }
        let inside = |(at, bytes): (u64, u64)| {
            at != 0
                && at.is_multiple_of(cluster)
                && at.checked_add(bytes).is_some_and(|end| end <= len)
        };
        let (table, clusters) = layout.refcount_table;
        if clusters == 0 || !inside((table, clusters << layout.cluster_bits)) {
            return wrong(format!("refcount table of {clusters} clusters at {table:#x}"));
        }
        let (l1, entries) = layout.l1;
        if entries > 0 && !inside((l1, entries * 8)) {
            return wrong(format!("L1 table of {entries} entries at {l1:#x}"));
        }
        if entries < layout.size.div_ceil(cluster * layout.per_table()) {
            return wrong(format!(
                "L1 table of {entries} entries is too short for {} bytes",
                layout.size
            ));
        }
        Ok(layout)
    }

    /// Returns the cluster size, in bytes.
    pub fn cluster_size(&self) -> u64 {
        1 << self.cluster_bits
    }

    /// Returns whether L2 entries are extended.
    pub fn has_subclusters(&self) -> bool {
        self.features[0] & 16 != 0
    }

    /// Returns the number of subclusters of a cluster, 1 or 32.
    pub fn subclusters(&self) -> u64 {
        if self.has_subclusters() { 32 } else { 1 }
    }

    /// Returns the subcluster size, in bytes.
    pub fn subcluster_size(&self) -> u64 {
        self.cluster_size() / self.subclusters()
    }

    /// Returns the size of an L2 entry, in bytes.
    pub fn l2_entry_size(&self) -> u64 {
        if self.has_subclusters() { 16 } else { 8 }
    }

    /// Returns the number of entries of an L2 table.
    pub fn per_table(&self) -> u64 {
        self.cluster_size() / self.l2_entry_size()
    }

    /// Returns the number of refcounts in a refcount block.
    pub fn block_entries(&self) -> u64 {
        (self.cluster_size() * 8) >> self.refcount_order
    }

    /// Returns the refcount at `index` of a refcount block.
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

    /// Returns the refcount of a cluster.
    pub fn refcount(&self, bytes: &[u8], cluster: u64) -> u64 {
        let (index, entry) = (cluster / self.block_entries(), cluster % self.block_entries());
        if index >= self.refcount_table.1 * self.cluster_size() / 8 {
            return 0;
        }
        let block = number(bytes, self.refcount_table.0 + index * 8, 8) as usize;
        if block == 0 {
            0
        } else {
            bytes.get(block..).map_or(0, |block| self.refcount_in(block, entry))
        }
    }

    /// Returns the clusters that an L2 entry names (first and count), and what the entry says about
    /// the guest's bytes in one subcluster. The offset in [`Contents::Data`] is that of the
    /// cluster.
    pub fn l2_entry(&self, entry: RawEntry, subcluster: u64) -> (Option<(u64, u64)>, Contents) {
        let RawEntry { raw, bitmap } = entry;
        if raw & COMPRESSED != 0 {
            let bits = 62 - (self.cluster_bits - 8);
            let at = raw & ((1 << bits) - 1);
            let sectors = (raw & (COMPRESSED - 1)) >> bits;
            let end = at - at % 512 + (sectors + 1) * 512;
            let first = at >> self.cluster_bits;
            return (
                Some((first, ((end - 1) >> self.cluster_bits) - first + 1)),
                Contents::Compressed(at, end - at),
            );
        }
        let at = raw & OFFSET;
        let names = (at != 0).then_some((at >> self.cluster_bits, 1));
        if self.has_subclusters() {
            let contents = match (bitmap >> subcluster & 1, bitmap >> (32 + subcluster) & 1) {
                (1, _) => Contents::Data(at),
                (_, 1) => Contents::Zero,
                _ => Contents::Unallocated,
            };
            return (names, contents);
        }
        match (raw & 1, at) {
            (0, 0) => (names, Contents::Unallocated),
            (0, at) => (names, Contents::Data(at)),
            _ => (names, Contents::Zero),
        }
    }

    /// Returns the non-zero entries of the refcount table with their index, up to the end of the
    /// file.
    pub fn blocks(&self, bytes: &[u8]) -> impl Iterator<Item = (u64, u64)> {
        words(bytes, self.refcount_table.0, self.refcount_table.1 * self.cluster_size() / 8)
    }

    /// Returns the non-zero entries of the L1 table with their index, up to the end of the file.
    pub fn l1_entries(&self, bytes: &[u8]) -> impl Iterator<Item = (u64, u64)> {
        words(bytes, self.l1.0, self.l1.1)
    }

    /// Returns the L1 index and the host offset of every L2 table.
    pub fn l2_tables(&self, bytes: &[u8]) -> impl Iterator<Item = (u64, u64)> {
        self.l1_entries(bytes).map(|(index, raw)| (index, raw & OFFSET)).filter(|(_, at)| *at != 0)
    }

    /// Returns the non-zero entries of an L2 table with their index, up to the end of the file.
    pub fn l2_entries(&self, bytes: &[u8], table: u64) -> impl Iterator<Item = (u64, RawEntry)> {
        let per_entry = self.l2_entry_size() / 8;
        let mut entries: BTreeMap<u64, RawEntry> = BTreeMap::new();
        for (index, word) in words(bytes, table, self.cluster_size() / 8) {
            let entry = entries.entry(index / per_entry).or_default();
            if index % per_entry == 0 { entry.raw = word } else { entry.bitmap = word }
        }
        entries.into_iter()
    }

    /// Returns the non-zero entries of all L2 tables with their guest cluster.
    fn entries(&self, bytes: &[u8]) -> impl Iterator<Item = (u64, RawEntry)> {
        let per_table = self.per_table();
        let of = move |(l1_index, table)| {
            self.l2_entries(bytes, table)
                .map(move |(index, raw)| (l1_index * per_table + index, raw))
        };
        self.l2_tables(bytes).flat_map(of)
    }

    /// Returns the host cluster of every guest cluster that has an uncompressed one, visible or
    /// reserved behind zeros.
    pub fn hosts(&self, bytes: &[u8]) -> BTreeMap<u64, u64> {
        let host = |(guest, entry)| match self.l2_entry(entry, 0) {
            (_, Contents::Compressed(..)) | (None, _) => None,
            (Some((first, _)), _) => Some((guest, first)),
        };
        self.entries(bytes).filter_map(host).collect()
    }

    /// Returns the clusters that any entry or header names as metadata, correctly or not.
    pub fn metadata(&self, bytes: &[u8]) -> BTreeSet<u64> {
        let cluster = self.cluster_size();
        // A damaged header may claim any length; no metadata lies past the end of the file.
        let most = bytes.len() as u64 / cluster + 2;
        let table =
            |at: u64, clusters: u64| (at >> self.cluster_bits..).take(clusters.min(most) as usize);
        let l1 = table(self.l1.0, (self.l1.1 * 8).div_ceil(cluster));
        let blocks = self.blocks(bytes).map(|(_, raw)| raw & !0x1ff).filter(|at| *at != 0);
        let ones =
            blocks.chain(self.l2_tables(bytes).map(|(_, at)| at)).map(|at| at >> self.cluster_bits);
        [0].into_iter()
            .chain(l1)
            .chain(table(self.refcount_table.0, self.refcount_table.1))
            .chain(ones)
            .collect()
    }

    /// Returns the name of the backing file, if there is one.
    pub fn backing_name(&self, bytes: &[u8]) -> Option<String> {
        let (at, len) = self.backing;
        let end = at.checked_add(len).filter(|_| at != 0)?;
        bytes.get(at as usize..end as usize).map(|name| String::from_utf8_lossy(name).into_owned())
    }

    /// Returns everything that a guest reads. `below` are the bytes of the backing file, which are
    /// used if the image names one. The caller must ensure that the virtual size fits into memory.
    ///
    /// # Errors
    /// A compressed cluster that cannot be decompressed.
    pub fn content(&self, bytes: &[u8], below: &[u8]) -> Result<Vec<u8>, String> {
        let mut content = vec![0; self.size as usize];
        if self.backing.0 != 0 {
            let shown = content.len().min(below.len());
            content[..shown].copy_from_slice(&below[..shown]);
        }
        let file =
            |at: u64, end: u64| &bytes[bytes.len().min(at as usize)..bytes.len().min(end as usize)];
        let unit = self.subcluster_size() as usize;
        for (guest, entry) in self.entries(bytes) {
            let start = content.len().min(guest.saturating_mul(self.cluster_size()) as usize);
            let end = content.len().min(start + self.cluster_size() as usize);
            let cluster = &mut content[start..end];
            if let Contents::Compressed(at, len) = self.l2_entry(entry, 0).1 {
                let inflated = self
                    .decompressed(file(at, at + len))
                    .ok_or_else(|| format!("guest cluster {guest} cannot be inflated"))?;
                cluster.copy_from_slice(&inflated[..cluster.len()]);
                continue;
            }
            for (index, part) in (0..).zip(cluster.chunks_mut(unit)) {
                match self.l2_entry(entry, index).1 {
                    Contents::Zero => part.fill(0),
                    Contents::Data(at) => {
                        let at = at + index * unit as u64;
                        let data = file(at, at + part.len() as u64);
                        part[data.len()..].fill(0);
                        part[..data.len()].copy_from_slice(data);
                    }
                    Contents::Unallocated | Contents::Compressed(..) => {}
                }
            }
        }
        Ok(content)
    }

    /// Decompresses one cluster with the decoders' basic interface.
    fn decompressed(&self, bytes: &[u8]) -> Option<Vec<u8>> {
        let mut cluster = vec![0; self.cluster_size() as usize];
        let result = if self.features[0] & 8 != 0 {
            let mut decoder = ruzstd::decoding::StreamingDecoder::new(bytes).ok()?;
            std::io::Read::read_exact(&mut decoder, &mut cluster)
        } else {
            std::io::Read::read_exact(&mut flate2::read::DeflateDecoder::new(bytes), &mut cluster)
        };
        result.ok().map(|()| cluster)
    }

    /// Returns what the image holds at a guest offset in bytes.
    pub fn find(&self, bytes: &[u8], guest: u64) -> Contents {
        let l2_entries = self.per_table();
        let cluster = guest >> self.cluster_bits;
        if cluster / l2_entries >= self.l1.1 {
            return Contents::Unallocated;
        }
        let table = number(bytes, self.l1.0 + cluster / l2_entries * 8, 8) & OFFSET;
        if table == 0 {
            return Contents::Unallocated;
        }
        let at = table + cluster % l2_entries * self.l2_entry_size();
        let bitmap = if self.has_subclusters() { number(bytes, at + 8, 8) } else { 0 };
        let entry = RawEntry { raw: number(bytes, at, 8), bitmap };
        match self.l2_entry(entry, guest % self.cluster_size() / self.subcluster_size()).1 {
            Contents::Data(at) => Contents::Data(at + guest % self.cluster_size()),
            other => other,
        }
    }
}

/// An image that was checked and read.
#[derive(Clone, Debug)]
pub struct Seen {
    /// The header.
    pub layout: Layout,
    /// The findings of the check.
    pub verdict: Verdict,
    /// The guest's bytes.
    pub guest: Vec<u8>,
    /// The result of [`Layout::hosts`].
    pub hosts: BTreeMap<u64, u64>,
}

/// Checks an image and reads it above the bytes of its backing file.
///
/// # Errors
/// A finding that makes the image unreadable. Other errors are in [`Seen::verdict`].
pub fn look(bytes: &[u8], below: &[u8]) -> Result<Seen, String> {
    let layout = Layout::of(bytes)?;
    Ok(Seen {
        layout,
        verdict: check(bytes),
        guest: layout.content(bytes, below)?,
        hosts: layout.hosts(bytes),
    })
}

/// Returns the byte values with which the two halves of `cluster` are filled.
///
/// # Panics
/// If a half contains two values.
pub fn halves(cluster: &[u8]) -> (u8, u8) {
    let (first, second) = cluster.split_at(cluster.len() / 2);
    assert!(
        first.iter().all(|byte| *byte == first[0]) && second.iter().all(|byte| *byte == second[0]),
        "torn"
    );
    (first[0], second[0])
}

impl Seen {
    /// Returns the byte values with which the two halves of a cluster of `size` bytes are filled.
    ///
    /// # Panics
    /// If a half contains two values: two requests have written it.
    pub fn at(&self, cluster: u64, size: u64) -> (u8, u8) {
        halves(&self.guest[(cluster * size) as usize..((cluster + 1) * size) as usize])
    }

    /// Returns the image itself if it violates nothing, has no incompatible feature bits, and every
    /// cluster has one owner.
    ///
    /// # Errors
    /// What is wrong.
    pub fn sole(self) -> Result<Seen, String> {
        let wrong = self.verdict.all();
        if !wrong.is_empty() {
            return Err(wrong.join("; "));
        }
        if self.layout.features[0] & !16 != 0 {
            return Err(format!("incompatible features {:#x}", self.layout.features[0]));
        }
        if !self.verdict.sole {
            return Err("a cluster is referenced or counted more than once, or compressed".into());
        }
        Ok(self)
    }

    /// Returns whether the image still names a backing file.
    pub fn has_backing(&self) -> bool {
        self.layout.backing.0 != 0
    }
}

struct Walk<'a> {
    bytes: &'a [u8],
    layout: Layout,
    /// The number of references, by cluster of the file.
    references: Vec<u32>,
    is_metadata: Vec<bool>,
    /// The clusters in the order in which entries name them, whether that entry has COPIED, and the
    /// entry: its L1 index, and its L2 index if it is an L2 entry.
    named: Vec<(u64, bool, (u64, Option<u64>))>,
    verdict: Verdict,
}

/// Checks a whole image.
pub fn check(bytes: &[u8]) -> Verdict {
    let layout = match Layout::of(bytes) {
        Ok(layout) => layout,
        Err(error) => return Verdict { errors: vec![error], ..Verdict::default() },
    };
    let clusters = (bytes.len() as u64).div_ceil(layout.cluster_size()) as usize;
    let (references, is_metadata) = (vec![0; clusters], vec![false; clusters]);
    let verdict = Verdict { sole: true, ..Verdict::default() };
    let mut walk = Walk { bytes, layout, references, is_metadata, named: Vec::new(), verdict };
    walk.all();
    walk.count();
    walk.verdict
}

impl Walk<'_> {
    fn wrong(&mut self, what: String) {
        self.verdict.errors.push(what);
    }

    fn all(&mut self) {
        let layout = self.layout;
        let cluster = layout.cluster_size();
        self.metadata(0, 1, "header");
        let (table, clusters) = layout.refcount_table;
        self.metadata(table >> layout.cluster_bits, clusters, "refcount table");
        self.metadata(
            layout.l1.0 >> layout.cluster_bits,
            (layout.l1.1 * 8).div_ceil(cluster),
            "L1 table",
        );
        let is_table = |at: u64| {
            at.is_multiple_of(cluster) && at.saturating_add(cluster) <= self.bytes.len() as u64
        };
        for (index, block) in layout.blocks(self.bytes) {
            if is_table(block) {
                self.metadata(block >> layout.cluster_bits, 1, "refcount block");
            } else {
                self.wrong(format!("refcount table, index {index}: block at {block:#x} is unaligned or outside the file"));
            }
        }
        let mut tables = Vec::new();
        for (index, raw) in layout.l1_entries(self.bytes) {
            let at = raw & OFFSET;
            if raw & !(OFFSET | COPIED) != 0 {
                self.wrong(format!("L1 table, index {index}: reserved bits in {raw:#x}"));
            }
            if raw == COPIED {
                self.wrong(format!("L1 table, index {index}: COPIED, and names nothing"));
            }
            if at != 0 && !is_table(at) {
                self.wrong(format!(
                    "L1 table, index {index}: L2 table at {at:#x} is unaligned or outside the file"
                ));
            } else if at != 0 {
                self.metadata(at >> layout.cluster_bits, 1, "L2 table");
                self.named.push((at >> layout.cluster_bits, raw & COPIED != 0, (index, None)));
                tables.push((index, at));
            }
        }
        for (l1_index, table) in tables {
            for (index, raw) in layout.l2_entries(self.bytes, table) {
                self.l2_entry(l1_index, index, raw);
            }
        }
    }

    /// Marks clusters as metadata, which must not be used for anything else.
    fn metadata(&mut self, first: u64, count: u64, what: &str) {
        for cluster in first..first + count {
            let Some(is_metadata) = self.is_metadata.get_mut(cluster as usize) else {
                self.wrong(format!("{what}: cluster {cluster} is outside the file"));
                continue;
            };
            if std::mem::replace(is_metadata, true) {
                self.wrong(format!("{what}: cluster {cluster} overlaps other metadata"));
            }
            self.references[cluster as usize] += 1;
        }
    }

    fn l2_entry(&mut self, l1_index: u64, index: u64, entry: RawEntry) {
        let layout = self.layout;
        let RawEntry { raw, bitmap } = entry;
        let say =
            |what: &str| format!("L2 table {l1_index}, index {index}: {raw:#x} {bitmap:#x} {what}");
        let (names, held) = layout.l2_entry(entry, 0);
        let (allocated, zero) = (bitmap & 0xffff_ffff, bitmap >> 32);
        if allocated & zero != 0 {
            self.wrong(say("has a subcluster that is allocated and zero"));
        }
        let copied = raw & COPIED != 0;
        if let Contents::Compressed(at, len) = held {
            self.verdict.sole = false;
            if copied {
                self.wrong(say("is compressed and COPIED"));
            }
            if at >= 1 << 56 {
                self.wrong(say("is compressed beyond 2^56"));
            }
            if bitmap != 0 {
                self.wrong(say("is compressed and has a bitmap"));
            }
            if at + len > (self.bytes.len() as u64).next_multiple_of(512) {
                self.verdict.tolerated.push(say("ends behind the file"));
            }
        } else {
            if raw & 0x3f00_0000_0000_01fe != 0 {
                self.wrong(say("has reserved bits"));
            }
            if raw & 1 != 0 && (layout.version < 3 || layout.has_subclusters()) {
                self.verdict.tolerated.push(say("has the zero flag, which is not known here"));
            }
            if allocated != 0 && names.is_none() {
                self.wrong(say("has allocated subclusters, and names nothing"));
            }
            if !(raw & OFFSET).is_multiple_of(layout.cluster_size()) {
                self.wrong(say("is not aligned"));
            }
            if copied && names.is_none() {
                self.verdict.tolerated.push(say("is COPIED and names nothing"));
            }
        }
        let Some((first, count)) = names else { return };
        for cluster in first..first + count {
            match self.is_metadata.get(cluster as usize) {
                None => self.wrong(say("is outside the file")),
                Some(true) => self.wrong(say("names metadata")),
                Some(false) => {}
            }
            if let Some(references) = self.references.get_mut(cluster as usize) {
                *references += 1;
            }
        }
        if !matches!(held, Contents::Compressed(..)) {
            self.named.push((first, copied, (l1_index, Some(index))));
        }
    }

    /// Compares the refcounts with the references that were found.
    fn count(&mut self) {
        let (layout, entries, bytes) = (self.layout, self.layout.block_entries(), self.bytes);
        let blocks: BTreeMap<u64, &[u8]> = layout
            .blocks(bytes)
            .map(|(index, at)| {
                (index, bytes.get(usize::try_from(at).unwrap_or(usize::MAX)..).unwrap_or(&[]))
            })
            .map(|(index, rest)| (index, &rest[..rest.len().min(layout.cluster_size() as usize)]))
            .collect();
        let in_file = self.references.len() as u64;
        let indexes: BTreeSet<u64> =
            blocks.keys().copied().chain(0..in_file.div_ceil(entries)).collect();
        for index in indexes {
            let block = blocks.get(&index).copied().unwrap_or(&[]);
            // Past the end of the file only non-zero refcounts matter, and most blocks have none
            // there.
            let zeros = block.rchunks(32).take_while(|part| **part == [0; 32]).count() * 32;
            let counted = ((block.len() - zeros) as u64 * 8) >> layout.refcount_order;
            let first = index * entries;
            for entry in 0..in_file.saturating_sub(first).min(entries).max(counted) {
                let (cluster, refcount) = (
                    first + entry,
                    if entry < counted { layout.refcount_in(block, entry) } else { 0 },
                );
                let references = self.references.get(cluster as usize).copied().map(u64::from);
                if refcount > 0 {
                    self.verdict.counted_end = cluster + 1;
                }
                match references {
                    None => self.verdict.leaks_beyond += u64::from(refcount > 0),
                    Some(references) => {
                        if refcount < references {
                            self.wrong(format!(
                                "cluster {cluster}: refcount {refcount}, references {references}"
                            ));
                        }
                        self.verdict.leaks += u64::from(refcount > references);
                        self.verdict.sole &= references == 0 || (references, refcount) == (1, 1);
                    }
                }
            }
        }
        for (cluster, copied, entry) in std::mem::take(&mut self.named) {
            match (layout.refcount(bytes, cluster), copied) {
                (1, true) => {}
                (1, false) => self.verdict.not_copied.push(cluster),
                (refcount, true) => self
                    .wrong(format!("cluster {cluster}: refcount {refcount}, COPIED in {entry:?}")),
                (_, false) => {}
            }
        }
    }
}

#[cfg(test)]
mod tests;
