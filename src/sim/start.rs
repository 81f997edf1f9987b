//! Initial images for tests, laid out cluster by cluster. They can have any version and any width
//! of refcounts, and any table can be just before it must grow. Written from the specification,
//! like [`super::spec`].

/// The initial content of a guest cluster.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Fill {
    /// Data: [`pattern`] of this tag.
    Data(u64),
    /// Zeros, without a host cluster.
    Zero,
    /// Zeros, with a host cluster that contains [`pattern`] of this tag.
    Reserved(u64),
    /// A host cluster that contains [`pattern`] of this tag, in an image with extended L2 entries:
    /// bits 0 to 31 say which subclusters are allocated, bits 32 to 63 which read as zeros.
    Parts(u64, u64),
}

/// The description of an image.
#[derive(Clone, Debug)]
pub struct Start {
    /// The name of the image in failure messages.
    pub name: &'static str,
    /// Version, 2 or 3.
    pub version: u32,
    /// log2 of the cluster size.
    pub cluster_bits: u32,
    /// log2 of the width of a refcount in bits.
    pub refcount_order: u32,
    /// Virtual size, in bytes.
    pub size: u64,
    /// Size of the raw backing file in bytes; 0 for none. Its name is `base.raw`.
    pub base: u64,
    /// Block size in bytes in which the backing file can be cloned; 0 if it cannot.
    pub clones: u64,
    /// The allocated guest clusters.
    pub clusters: Vec<(u64, Fill)>,
    /// Unused clusters below this number are counted, as after many crashes. The next cluster is
    /// the one for which a table must grow.
    pub counted: u64,
    /// How many clusters stay free before the counted ones.
    pub free: u64,
    /// Size of the refcount table, in clusters.
    pub table: u64,
    /// Autoclear feature bits.
    pub autoclear: u64,
    /// Whether L2 entries are extended.
    pub extended: bool,
}

/// Returns 512 bytes that occur for no other tag and sector.
pub fn pattern(tag: u64, sector: u64) -> [u8; 512] {
    let word = (tag << 40 | (sector + 1)).wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut bytes = [0; 512];
    bytes.chunks_exact_mut(8).for_each(|chunk| chunk.copy_from_slice(&word.to_be_bytes()));
    bytes
}

/// Returns the bytes of a backing file: data in most places, zeros in every seventh 4 KiB.
pub fn base_bytes(len: u64) -> Vec<u8> {
    (0..len.div_ceil(512))
        .flat_map(|sector| if sector / 8 % 7 == 3 { [0; 512] } else { pattern(0xba5e, sector) })
        .take(len as usize)
        .collect()
}

/// Sets a refcount in a refcount block.
pub fn set_refcount(block: &mut [u8], order: u32, index: u64, value: u64) {
    if order < 3 {
        let bit = index << order;
        let mask = ((1u16 << (1 << order)) - 1) as u8;
        let byte = &mut block[(bit / 8) as usize];
        *byte = *byte & !(mask << (bit % 8)) | (value as u8 & mask) << (bit % 8);
    } else {
        let width = 1 << (order - 3);
        let at = index as usize * width;
        block[at..at + width].copy_from_slice(&value.to_be_bytes()[8 - width..]);
    }
}

impl Start {
    /// Makes an empty image without a backing file, with the smallest possible tables.
    pub fn new(
        name: &'static str,
        version: u32,
        cluster_bits: u32,
        refcount_order: u32,
        size: u64,
    ) -> Start {
        let (clusters, counted, free) = (Vec::new(), 0, 0);
        Start {
            name,
            version,
            cluster_bits,
            refcount_order,
            size,
            base: 0,
            clones: 0,
            clusters,
            counted,
            free,
            table: 1,
            autoclear: 0,
            extended: false,
        }
    }

    /// Returns the bytes of the file.
    ///
    /// # Panics
    /// If the tables do not fit this layout.
    pub fn bytes(&self) -> Vec<u8> {
        let cluster = 1usize << self.cluster_bits;
        let entry_size = if self.extended { 16 } else { 8 };
        let l2_entries = cluster as u64 / entry_size;
        let block_entries = (cluster as u64 * 8) >> self.refcount_order;
        let l1_entries = self.size.div_ceil(cluster as u64 * l2_entries);
        let l1_clusters = (l1_entries * 8).div_ceil(cluster as u64);
        let mut tables: Vec<u64> =
            self.clusters.iter().map(|(guest, _)| guest / l2_entries).collect();
        tables.sort_unstable();
        tables.dedup();
        let hosts = self.clusters.iter().filter(|(_, fill)| *fill != Fill::Zero).count() as u64;
        let mut blocks = 1;
        let used = loop {
            let used = 1 + self.table + blocks + l1_clusters + tables.len() as u64 + hosts;
            let needed = used.max(self.counted).div_ceil(block_entries);
            if needed <= blocks {
                break used;
            }
            blocks = needed;
        };
        assert!(
            blocks <= cluster as u64 / 8 * self.table,
            "so many blocks do not fit the refcount table"
        );
        let mut bytes = vec![0; used as usize * cluster];
        let mut put = |at: usize, value: &[u8]| bytes[at..at + value.len()].copy_from_slice(value);
        let (block_at, l1_at) = (1 + self.table, 1 + self.table + blocks);
        let l2_at = l1_at + l1_clusters;
        let offset = |at: u64| at * cluster as u64;

        put(0, b"QFI\xfb");
        put(4, &self.version.to_be_bytes());
        put(20, &self.cluster_bits.to_be_bytes());
        put(24, &self.size.to_be_bytes());
        put(36, &(l1_entries as u32).to_be_bytes());
        put(40, &offset(l1_at).to_be_bytes());
        put(48, &offset(1).to_be_bytes());
        put(56, &(self.table as u32).to_be_bytes());
        let mut end = 72;
        if self.version >= 3 {
            put(72, &(if self.extended { 16_u64 } else { 0 }).to_be_bytes());
            put(88, &self.autoclear.to_be_bytes());
            put(96, &self.refcount_order.to_be_bytes());
            put(100, &104u32.to_be_bytes());
            end = 104;
        }
        if self.base > 0 {
            put(end, &0xe279_2acau32.to_be_bytes());
            put(end + 4, &3u32.to_be_bytes());
            put(end + 8, b"raw");
            put(8, &(end as u64 + 24).to_be_bytes());
            put(16, &8u32.to_be_bytes());
            put(end + 24, b"base.raw");
        }
        for block in 0..blocks {
            put(cluster + block as usize * 8, &offset(block_at + block).to_be_bytes());
        }
        let mut next = l2_at + tables.len() as u64;
        for (index, table) in tables.iter().enumerate() {
            put(
                (offset(l1_at) + table * 8) as usize,
                &(1 << 63 | offset(l2_at + index as u64)).to_be_bytes(),
            );
        }
        for &(guest, fill) in &self.clusters {
            let table =
                l2_at + tables.binary_search(&(guest / l2_entries)).expect("listed above") as u64;
            // The zero flag is in the descriptor or in the bitmap.
            let zero = u64::from(!self.extended);
            let (descriptor, bitmap) = match fill {
                Fill::Zero => (zero, u64::from(u32::MAX) << 32),
                Fill::Data(tag) | Fill::Reserved(tag) | Fill::Parts(tag, _) => {
                    for sector in 0..cluster as u64 / 512 {
                        put(
                            (offset(next) + sector * 512) as usize,
                            &pattern(tag, guest * (cluster as u64 / 512) + sector),
                        );
                    }
                    next += 1;
                    let named = 1 << 63 | offset(next - 1);
                    match fill {
                        Fill::Reserved(_) => (named | zero, u64::from(u32::MAX) << 32),
                        Fill::Parts(_, bitmap) => (named, bitmap),
                        Fill::Data(_) | Fill::Zero => (named, u64::from(u32::MAX)),
                    }
                }
            };
            let at = (offset(table) + guest % l2_entries * entry_size) as usize;
            put(at, &descriptor.to_be_bytes());
            if self.extended {
                put(at + 8, &bitmap.to_be_bytes());
            }
        }
        assert_eq!(next, used);
        for counted in (0..used).chain(used + self.free..self.counted) {
            let block = offset(block_at + counted / block_entries) as usize;
            set_refcount(
                &mut bytes[block..block + cluster],
                self.refcount_order,
                counted % block_entries,
                1,
            );
        }
        bytes
    }
}
