//! Valid images of every kind, written according to the specification.

use std::io::Write;

use super::{Input, pattern};
use sim::start::set_refcount;

pub(super) const COPIED: u64 = 1 << 63;
pub(super) const COMPRESSED: u64 = 1 << 62;
const ZERO: u64 = 1;

/// A valid image with its backing file.
pub(super) struct Template {
    /// The image.
    pub image: Vec<u8>,
    /// Its backing file, raw.
    pub backing: Option<Vec<u8>>,
}

/// The parameters of an image.
#[derive(Clone, Debug)]
pub(super) struct Shape {
    pub version: u32,
    pub bits: u32,
    pub order: u32,
    pub zstd: bool,
    /// Whether L2 entries are extended.
    pub extended: bool,
    /// Virtual size in bytes.
    pub size: u64,
    /// Number of L1 entries beyond those that the size needs.
    pub l1_slack: u64,
    /// The backing file in the header: name and format.
    pub backing: Option<(Vec<u8>, Option<Vec<u8>>)>,
}

/// The kind of a guest cluster.
#[derive(Clone, Copy, Debug)]
pub(super) enum Kind {
    Unallocated,
    Data(u8),
    /// The same host cluster as the previous cluster of this kind.
    Shared,
    Zero,
    ZeroReserved(u8),
    Compressed(u8),
    /// Subclusters: bits 0 to 31 are allocated, and bits 32 to 63 read as zeros unless they are
    /// allocated. All of the data where entries are not extended.
    Parts(u8, u64),
}

/// Returns an image whose parameters the input chooses.
pub(super) fn template(input: &mut Input<'_>) -> Template {
    // Small clusters are fast, and with them the operations reach every table.
    let bits = input.pick(&[9, 9, 9, 9, 9, 10, 10, 12, 12, 12, 12, 14, 14, 14, 14, 16]);
    let version = input.pick(&[3, 3, 3, 2]);
    let order = if version == 2 { 4 } else { input.pick(&[4, 4, 0, 1, 2, 3, 5, 6]) };
    let most = match bits {
        9 => 160,
        10 => 140,
        12 => 40,
        14 => 14,
        _ => 5,
    };
    let clusters = 1 + input.below(most);
    let size = (clusters << bits) - input.below(1 << bits) / 512 * 512;
    let backing = match input.byte() % 4 {
        0 => None,
        1 => Some(size),
        2 => Some(input.below(size)),
        _ => Some(size + input.below(3 << bits)),
    };
    let backing: Option<Vec<u8>> = backing.map(|len| {
        let mut bytes = Vec::new();
        while (bytes.len() as u64) < len {
            bytes.extend(pattern(input.byte(), 1 << bits.min(11)));
        }
        bytes.truncate(len as usize);
        bytes
    });
    let shape = Shape {
        version,
        bits,
        order,
        zstd: version == 3 && input.one_in(2),
        extended: version == 3 && bits >= 14 && !input.one_in(4),
        size,
        l1_slack: input.below(3),
        backing: backing.as_ref().map(|_| (b"base.raw".to_vec(), Some(b"raw".to_vec()))),
    };
    let kinds: Vec<Kind> = (0..clusters)
        .map(|_| match input.byte() % 12 {
            0..=3 => Kind::Unallocated,
            4..=6 => Kind::Data(input.byte()),
            7 => Kind::Shared,
            8 => Kind::Zero,
            9 => Kind::ZeroReserved(input.byte()),
            10 => Kind::Parts(input.byte(), input.number(8)),
            _ => Kind::Compressed(input.byte()),
        })
        .collect();
    let unused = [input.below(3), input.below(3)];
    Template { image: build(&shape, &kinds, unused), backing }
}

/// Writes an image. `unused`: numbers of free and of leaked clusters inside the file.
pub(super) fn build(shape: &Shape, kinds: &[Kind], unused: [u64; 2]) -> Vec<u8> {
    let mut file = File {
        bits: shape.bits,
        bytes: Vec::new(),
        counts: Vec::new(),
        most: most_of(shape.order),
    };
    let cluster = 1u64 << shape.bits;
    let span_entries = cluster / if shape.extended { 16 } else { 8 };
    file.take(1);
    let table_at = file.take(1);
    let l1_entries = shape.size.div_ceil(cluster * span_entries) + shape.l1_slack;
    let l1_at = file.take((l1_entries * 8).div_ceil(cluster).max(1));
    // The descriptor and the bitmap of each entry.
    let mut l2_tables: Vec<(u64, Vec<(u64, u64)>)> = Vec::new();
    let all = u64::from(u32::MAX);
    let mut shared = None;
    let mut packed = 0;
    for (index, kind) in kinds.iter().enumerate() {
        let (table, entry) = (index as u64 / span_entries, index as u64 % span_entries);
        let kind = match *kind {
            Kind::Zero | Kind::ZeroReserved(_) if shape.version < 3 => Kind::Unallocated,
            kind => kind,
        };
        let value = match kind {
            Kind::Unallocated => continue,
            Kind::Zero => ZERO,
            Kind::Data(seed) | Kind::Parts(seed, _) => file.data(&pattern(seed, cluster as usize)),
            Kind::ZeroReserved(seed) => file.data(&pattern(seed, cluster as usize)) | ZERO,
            Kind::Shared => {
                match shared.filter(|at: &u64| file.counts[(at / cluster) as usize] < file.most) {
                    Some(at) => {
                        file.counts[(at / cluster) as usize] += 1;
                        at
                    }
                    None => *shared.insert(file.data(&pattern(7, cluster as usize))),
                }
            }
            Kind::Compressed(seed) => {
                file.compressed(&pattern(seed, cluster as usize), shape.zstd, &mut packed)
            }
        };
        if l2_tables.last().is_none_or(|(last, _)| *last < table) {
            l2_tables.push((table, vec![(0, 0); span_entries as usize]));
        }
        let (value, bitmap) = match kind {
            _ if !shape.extended => (value, 0),
            _ if value & COMPRESSED != 0 => (value, 0),
            Kind::Zero | Kind::ZeroReserved(_) => (value & !ZERO, all << 32),
            Kind::Parts(_, bits) => (value, bits & !((bits & all) << 32)),
            _ => (value, all),
        };
        l2_tables.last_mut().expect("just made").1[entry as usize] = (value, bitmap);
    }
    file.take(unused[1]);
    let free = file.take(unused[0]);
    file.counts[free as usize..].fill(0);
    // COPIED marks a cluster with one reference (specification: bit 63 of an L2 entry).
    for (table, mut entries) in l2_tables {
        for (entry, _) in &mut entries {
            if *entry & COMPRESSED == 0
                && *entry >= cluster
                && file.counts[((*entry & !ZERO) / cluster) as usize] == 1
            {
                *entry |= COPIED;
            }
        }
        let at = file.take(1);
        let words_of = |&(entry, bitmap): &(u64, u64)| {
            [entry, bitmap].into_iter().take(if shape.extended { 2 } else { 1 })
        };
        file.put(at * cluster, &words(&entries.iter().flat_map(words_of).collect::<Vec<_>>()));
        file.put(l1_at * cluster + table * 8, &((at * cluster) | COPIED).to_be_bytes());
    }
    file.refcounts(shape, table_at);
    let header = header(shape, (table_at * cluster, l1_at * cluster), l1_entries);
    file.put(0, &header);
    file.bytes
}

fn header(shape: &Shape, (table, l1): (u64, u64), l1_entries: u64) -> Vec<u8> {
    let mut bytes = vec![0; if shape.version == 2 { 72 } else { 112 }];
    let mut put = |at: usize, value: &[u8]| bytes[at..at + value.len()].copy_from_slice(value);
    put(0, b"QFI\xfb");
    put(4, &shape.version.to_be_bytes());
    put(20, &shape.bits.to_be_bytes());
    put(24, &shape.size.to_be_bytes());
    put(36, &(l1_entries as u32).to_be_bytes());
    put(40, &(if l1_entries == 0 { 0 } else { l1 }).to_be_bytes());
    put(48, &table.to_be_bytes());
    put(56, &1u32.to_be_bytes());
    if shape.version == 3 {
        let features = u64::from(shape.zstd) << 3 | u64::from(shape.extended) << 4;
        put(72, &features.to_be_bytes());
        put(96, &shape.order.to_be_bytes());
        put(100, &112u32.to_be_bytes());
        put(104, &[u8::from(shape.zstd)]);
    }
    if let Some((name, format)) = &shape.backing {
        if let Some(format) = format {
            bytes.extend(0xe279_2acau32.to_be_bytes());
            bytes.extend((format.len() as u32).to_be_bytes());
            bytes.extend(format);
            bytes.resize(bytes.len().next_multiple_of(8), 0);
        }
        bytes.extend([0; 8]);
        let at = bytes.len() as u64;
        bytes[8..16].copy_from_slice(&at.to_be_bytes());
        bytes[16..20].copy_from_slice(&(name.len() as u32).to_be_bytes());
        bytes.extend(name);
    }
    bytes.truncate(1 << shape.bits);
    bytes
}

/// An image that is being written.
struct File {
    bits: u32,
    bytes: Vec<u8>,
    /// The refcount of each cluster.
    counts: Vec<u64>,
    /// The largest possible refcount.
    most: u64,
}

impl File {
    /// Appends clusters with refcount one; returns the first of them.
    fn take(&mut self, clusters: u64) -> u64 {
        let first = self.counts.len() as u64;
        self.counts.resize((first + clusters) as usize, 1);
        self.bytes.resize(self.counts.len() << self.bits, 0);
        first
    }

    fn put(&mut self, at: u64, bytes: &[u8]) {
        self.bytes[at as usize..at as usize + bytes.len()].copy_from_slice(bytes);
    }

    /// Appends one cluster of data; returns its host offset.
    fn data(&mut self, bytes: &[u8]) -> u64 {
        let at = self.take(1) << self.bits;
        self.put(at, bytes);
        at
    }

    /// Appends one cluster of data; returns its L2 entry. It is compressed if that makes it
    /// smaller, and then begins at `packed`, the end of the previous compressed cluster.
    fn compressed(&mut self, bytes: &[u8], zstd: bool, packed: &mut u64) -> u64 {
        let payload = if zstd { zstd_frame(bytes) } else { deflate(bytes) };
        if payload.len() >= bytes.len() {
            return self.data(bytes);
        }
        let fits = |file: &File| {
            *packed >> self.bits < file.counts.len() as u64
                && file.counts[(*packed >> self.bits) as usize] < file.most
        };
        let inside = !packed.is_multiple_of(1 << self.bits);
        let continued = inside && fits(self) && {
            let left = (1 << self.bits) - *packed % (1 << self.bits);
            payload.len() as u64 <= left || *packed >> self.bits == self.counts.len() as u64 - 1
        };
        let at = if continued { *packed } else { (self.counts.len() as u64) << self.bits };
        let end = at + payload.len() as u64;
        let known = self.counts.len();
        let more = end.div_ceil(1 << self.bits).saturating_sub(known as u64);
        self.take(more);
        self.counts[known..].fill(0);
        for cluster in at >> self.bits..=(end - 1) >> self.bits {
            self.counts[cluster as usize] += 1;
        }
        self.put(at, &payload);
        *packed = end;
        let sectors = (end - 1) / 512 - at / 512;
        COMPRESSED | sectors << (62 - (self.bits - 8)) | at
    }

    /// Appends the refcount table and the refcount blocks, which count all clusters including their
    /// own.
    fn refcounts(&mut self, shape: &Shape, table_at: u64) {
        let per_block = (8u64 << self.bits) >> shape.order;
        let used = self.counts.len() as u64;
        let blocks = (1..)
            .find(|blocks| used + blocks <= blocks * per_block)
            .expect("blocks describe more than themselves");
        let first = self.take(blocks);
        let counts = self.counts.clone();
        for (cluster, &count) in counts.iter().enumerate() {
            let block = ((first + cluster as u64 / per_block) << self.bits) as usize;
            set_refcount(&mut self.bytes[block..], shape.order, cluster as u64 % per_block, count);
        }
        for block in 0..blocks {
            self.put(
                (table_at << self.bits) + block * 8,
                &((first + block) << self.bits).to_be_bytes(),
            );
        }
    }
}

/// Returns the largest refcount of a width.
fn most_of(order: u32) -> u64 {
    if order == 6 { u64::MAX } else { (1 << (1u32 << order)) - 1 }
}

/// Returns table entries as bytes, big-endian.
pub(super) fn words(entries: &[u64]) -> Vec<u8> {
    entries.iter().flat_map(|entry| entry.to_be_bytes()).collect()
}

/// Compresses with raw deflate, as qcow2 does.
pub(super) fn deflate(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::DeflateEncoder::new(Vec::new(), flate2::Compression::fast());
    encoder.write_all(bytes).and_then(|()| encoder.finish()).expect("writing into memory")
}

/// Compresses to one zstd frame.
pub(super) fn zstd_frame(bytes: &[u8]) -> Vec<u8> {
    ruzstd::encoding::compress_to_vec(bytes, ruzstd::encoding::CompressionLevel::Fastest)
}
