//! Images made by hand from the specification, so that each kind of cluster is where a scenario
//! needs it. No code of the engine is used.

use std::collections::BTreeSet;

use sim::start::set_refcount;

/// The geometry of an image.
#[derive(Clone, Copy, Debug)]
pub(super) struct Shape {
    pub name: &'static str,
    pub version: u32,
    pub cluster_bits: u32,
    pub refcount_order: u32,
    /// Number of guest clusters. If clusters are larger than 1 KiB, the last one is cut by 1 KiB,
    /// so that the disk ends inside a cluster.
    pub clusters: u64,
}

impl Shape {
    pub fn cluster(&self) -> u64 {
        1 << self.cluster_bits
    }

    /// Virtual size in bytes.
    pub fn size(&self) -> u64 {
        self.clusters * self.cluster() - if self.cluster_bits > 10 { 1024 } else { 0 }
    }

    pub fn l2_entries(&self) -> u64 {
        self.cluster() / 8
    }

    pub fn refblock_entries(&self) -> u64 {
        (self.cluster() * 8) >> self.refcount_order
    }

    /// The guest cluster inside which the backing file ends.
    pub fn tail(&self) -> u64 {
        self.clusters - 4
    }

    /// An allocated cluster that no scenario touches; it has its own L2 table where there are three
    /// tables.
    pub fn bystander(&self) -> u64 {
        if self.clusters > 2 * self.l2_entries() { self.clusters - 1 } else { 15 }
    }
}

/// The kind of one guest cluster.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Guest {
    Nothing,
    Own,
    /// Two consecutive guest clusters share one host cluster, whose refcount is two.
    Shared,
    /// Compressed; two consecutive ones lie in one host cluster.
    Packed,
    ZeroPlain,
    /// Zero, with a host cluster that stays allocated.
    ZeroKept,
}

/// The description of an image.
#[derive(Clone, Debug)]
pub(super) struct Sketch {
    pub shape: Shape,
    pub guests: Vec<Guest>,
    pub backing: Option<&'static str>,
    /// All host clusters below this one are counted, used or not: the unused ones are leaks from
    /// the start.
    pub pad: u64,
    pub autoclear: u64,
    /// Whether the L2 tables have refcount two and no COPIED.
    pub shared_tables: bool,
}

/// An image that was built.
#[derive(Clone, Debug)]
pub(super) struct Built {
    pub bytes: Vec<u8>,
    pub refblocks: Vec<u64>,
    /// Shared host clusters: when one reference is dropped, the entry of the other one still lacks
    /// COPIED.
    pub shared: BTreeSet<u64>,
}

impl Sketch {
    /// The usual arrangement of clusters, above a backing file called `base.raw`.
    pub fn usual(shape: Shape) -> Sketch {
        let mut guests = vec![Guest::Nothing; shape.clusters as usize];
        guests[2..4].fill(Guest::Own);
        guests[4..6].fill(Guest::Shared);
        guests[6..8].fill(Guest::Packed);
        if shape.version >= 3 {
            guests[8] = Guest::ZeroPlain;
            guests[9] = Guest::ZeroKept;
        }
        guests[shape.bystander() as usize] = Guest::Own;
        Sketch {
            shape,
            guests,
            backing: Some("base.raw"),
            pad: 0,
            autoclear: 0,
            shared_tables: false,
        }
    }

    /// Returns what the guest reads if the backing file has the content `below`.
    pub fn content(&self, below: &[u8]) -> Vec<u8> {
        let cluster = self.shape.cluster();
        let mut content = vec![0; self.shape.size() as usize];
        let under = content.len().min(below.len());
        content[..under].copy_from_slice(&below[..under]);
        for (index, (guest, part)) in
            self.guests.iter().zip(content.chunks_mut(cluster as usize)).enumerate()
        {
            if let Some(bytes) = held(*guest, index as u64, cluster) {
                part.copy_from_slice(&bytes[..part.len()]);
            }
        }
        content
    }

    /// Builds the bytes of the image.
    pub fn build(&self) -> Built {
        let shape = &self.shape;
        let (cluster, entries) = (shape.cluster(), shape.l2_entries());
        let l1_entries = shape.clusters.div_ceil(entries);
        let l1_clusters = (l1_entries * 8).div_ceil(cluster);
        let tables: Vec<u64> = (0..l1_entries)
            .filter(|table| {
                self.guests
                    .iter()
                    .skip((table * entries) as usize)
                    .take(entries as usize)
                    .any(|guest| *guest != Guest::Nothing)
            })
            .collect();
        let alone = |guest: &Guest| matches!(guest, Guest::Own | Guest::ZeroKept);
        let paired = |guest: &Guest| matches!(guest, Guest::Shared | Guest::Packed);
        let pairs = self.guests.iter().filter(|guest| paired(guest)).count() as u64;
        assert!(pairs.is_multiple_of(2));
        let data = self.guests.iter().filter(|guest| alone(guest)).count() as u64 + pairs / 2;
        let fixed = 2 + l1_clusters + tables.len() as u64 + data;
        let mut refblock_count = 1;
        while refblock_count * shape.refblock_entries() < (fixed + refblock_count).max(self.pad) {
            refblock_count += 1;
        }
        let l1_at = 2 + refblock_count;
        let l2_at = l1_at + l1_clusters;
        let mut next = l2_at + tables.len() as u64;
        let mut refcounts = vec![1u64; next as usize];
        let mut bytes = vec![0; (next * cluster) as usize];
        let mut shared = BTreeSet::new();

        for (order, table) in tables.iter().enumerate() {
            let at = l2_at + order as u64;
            let copied = if self.shared_tables { 0 } else { COPIED };
            if self.shared_tables {
                refcounts[at as usize] = 2;
            }
            put(&mut bytes, l1_at * cluster + table * 8, &((at * cluster) | copied).to_be_bytes());
        }
        // Between the two clusters of a pair: host offset of the first one, and the bytes that it
        // uses.
        let mut first: Option<(u64, u64)> = None;
        for (index, guest) in self.guests.iter().enumerate() {
            let (index, host) = (index as u64, next * cluster);
            let raw = match guest {
                Guest::Nothing => continue,
                Guest::ZeroPlain => ZERO,
                Guest::Own | Guest::ZeroKept => {
                    next += 1;
                    refcounts.push(1);
                    // The host cluster below a zero cluster may have any content.
                    put(&mut bytes, host, &held(Guest::Own, index, cluster).unwrap());
                    host | COPIED | if *guest == Guest::ZeroKept { ZERO } else { 0 }
                }
                Guest::Shared => match first.take() {
                    Some((at, _)) => at,
                    None => {
                        next += 1;
                        refcounts.push(2);
                        shared.insert(host / cluster);
                        put(&mut bytes, host, &held(Guest::Shared, index, cluster).unwrap());
                        first = Some((host, 0));
                        host
                    }
                },
                Guest::Packed => {
                    let packed = deflate(&held(Guest::Packed, index, cluster).unwrap());
                    let at = match first.take() {
                        Some((at, taken)) => at + taken,
                        None => {
                            next += 1;
                            refcounts.push(2);
                            first = Some((host, packed.len() as u64));
                            host
                        }
                    };
                    assert!(
                        at % cluster + packed.len() as u64 <= cluster,
                        "a pair of compressed clusters fits one"
                    );
                    put(&mut bytes, at, &packed);
                    let more_sectors = (at + packed.len() as u64 - 1) / 512 - at / 512;
                    COMPRESSED | more_sectors << (62 - (shape.cluster_bits - 8)) | at
                }
            };
            let order = tables.iter().position(|table| *table == index / entries).unwrap() as u64;
            put(&mut bytes, (l2_at + order) * cluster + index % entries * 8, &raw.to_be_bytes());
        }
        let end = next.max(self.pad);
        refcounts.resize(end as usize, 1);
        bytes.resize((end * cluster) as usize, 0);
        // The refcount blocks are contiguous, and so are their refcounts.
        for (index, refcount) in (0..).zip(&refcounts) {
            set_refcount(
                &mut bytes[2 * cluster as usize..],
                shape.refcount_order,
                index,
                *refcount,
            );
        }
        let refblocks: Vec<u64> = (0..refblock_count).map(|block| (2 + block) * cluster).collect();
        for (index, block) in refblocks.iter().enumerate() {
            put(&mut bytes, cluster + index as u64 * 8, &block.to_be_bytes());
        }
        self.header(&mut bytes, l1_entries, l1_at * cluster);
        Built { bytes, refblocks, shared }
    }

    fn header(&self, bytes: &mut Vec<u8>, l1_entries: u64, l1_offset: u64) {
        let shape = &self.shape;
        put(bytes, 0, b"QFI\xfb");
        put(bytes, 4, &shape.version.to_be_bytes());
        put(bytes, 20, &shape.cluster_bits.to_be_bytes());
        put(bytes, 24, &shape.size().to_be_bytes());
        put(bytes, 36, &(l1_entries as u32).to_be_bytes());
        put(bytes, 40, &l1_offset.to_be_bytes());
        put(bytes, 48, &shape.cluster().to_be_bytes());
        put(bytes, 56, &1u32.to_be_bytes());
        if shape.version >= 3 {
            put(bytes, 88, &self.autoclear.to_be_bytes());
            put(bytes, 96, &shape.refcount_order.to_be_bytes());
            put(bytes, 100, &104u32.to_be_bytes());
        }
        if let Some(name) = self.backing {
            let extensions = if shape.version >= 3 { 104 } else { 72 };
            let format = name.rsplit('.').next().unwrap();
            put(bytes, extensions, &0xe279_2acau32.to_be_bytes());
            put(bytes, extensions + 4, &(format.len() as u32).to_be_bytes());
            put(bytes, extensions + 8, format.as_bytes());
            let at = extensions + 8 + format.len().next_multiple_of(8) as u64 + 8;
            put(bytes, at, name.as_bytes());
            put(bytes, 8, &at.to_be_bytes());
            put(bytes, 16, &(name.len() as u32).to_be_bytes());
        }
    }
}

pub(super) const COPIED: u64 = 1 << 63;
pub(super) const COMPRESSED: u64 = 1 << 62;
pub(super) const ZERO: u64 = 1;

fn put(bytes: &mut Vec<u8>, at: u64, what: &[u8]) {
    let end = at as usize + what.len();
    bytes.resize(bytes.len().max(end), 0);
    bytes[at as usize..end].copy_from_slice(what);
}

/// Returns the content of a cluster that the overlay defines; `None` if the cluster comes from the
/// backing file.
fn held(guest: Guest, index: u64, cluster: u64) -> Option<Vec<u8>> {
    let index = if guest == Guest::Shared { index & !1 } else { index };
    match guest {
        Guest::Nothing => None,
        Guest::Own | Guest::Shared => {
            Some((0..cluster).map(|at| (at * 7 + at / 512 * 3 + index * 11 + 1) as u8).collect())
        }
        Guest::Packed => Some((0..cluster).map(|at| (at % 8 + index * 16) as u8).collect()),
        Guest::ZeroPlain | Guest::ZeroKept => Some(vec![0; cluster as usize]),
    }
}

fn deflate(bytes: &[u8]) -> Vec<u8> {
    let mut packed = Vec::with_capacity(bytes.len() + 64);
    let mut stream = flate2::Compress::new(flate2::Compression::best(), false);
    let end = stream.compress_vec(bytes, &mut packed, flate2::FlushCompress::Finish).unwrap();
    assert_eq!(end, flate2::Status::StreamEnd);
    packed
}

/// A backing file that ends inside a cluster, and is zero where the scenarios of zeros need it.
pub(super) fn base(shape: &Shape) -> Vec<u8> {
    let cluster = shape.cluster() as usize;
    let mut bytes: Vec<u8> = (0..shape.tail() as usize * cluster + cluster / 2 - 100)
        .map(|at| (at * 13 + at / 512 * 5 + at / 65536 + 3) as u8)
        .collect();
    bytes[10 * cluster..11 * cluster].fill(0);
    bytes
}
