//! Tests of reads of several compressed clusters: each byte in its place whichever thread
//! decompresses it, and errors as if the clusters were read one by one.

use super::*;
use crate::format::{CompressionType, HostOffset};
use crate::image::helpers::Helpers;
use ruzstd::encoding::{CompressionLevel, compress_to_vec};
use sim::random::Random;

const COPIED: u64 = 1 << 63;
const COMPRESSED: u64 = 1 << 62;
const SECTOR: u64 = 512;

/// An image under construction: one L2 table, data behind it.
struct Builder {
    bits: u32,
    kind: CompressionType,
    file: Vec<u8>,
    /// Offset of the L2 table.
    table: usize,
    content: Vec<u8>,
}

impl Builder {
    fn new(bits: u32, kind: CompressionType, clusters: u64) -> Builder {
        let mut file = NewImage::file_for_tests(bits, clusters << bits, None);
        if kind == CompressionType::Zstd {
            file[79] |= 8;
            file[104] = 1;
        }
        let table = file.len().next_multiple_of(1 << bits);
        file.resize(table + (1 << bits), 0);
        let l1 = u64::from_be_bytes(file[40..48].try_into().unwrap()) as usize;
        file[l1..l1 + 8].copy_from_slice(&(table as u64 | COPIED).to_be_bytes());
        Builder { bits, kind, file, table, content: vec![0; (clusters << bits) as usize] }
    }

    fn cluster_size(&self) -> usize {
        1 << self.bits
    }

    fn set_entry(&mut self, cluster: usize, entry: u64) {
        self.file[self.table + cluster * 8..][..8].copy_from_slice(&entry.to_be_bytes());
    }

    /// Text that is different in each cluster.
    fn text(&mut self, cluster: usize) -> Vec<u8> {
        let text: Vec<u8> = (0_u64..)
            .flat_map(|line| format!("cluster {cluster} line {}\n", line * 7919 % 997).into_bytes())
            .take(self.cluster_size())
            .collect();
        self.content[cluster * text.len()..][..text.len()].copy_from_slice(&text);
        text
    }

    /// Stores a cluster as it is.
    fn data(&mut self, cluster: usize) {
        let text = self.text(cluster);
        let at = self.file.len().next_multiple_of(text.len());
        self.file.resize(at, 0xee);
        self.file.extend(text);
        self.set_entry(cluster, at as u64 | COPIED);
    }

    /// Stores a cluster compressed, directly behind what was stored before.
    fn compressed(&mut self, cluster: usize) {
        let text = self.text(cluster);
        let bytes = match self.kind {
            CompressionType::Zlib => {
                let mut stream = flate2::Compress::new(flate2::Compression::fast(), false);
                let mut bytes = Vec::with_capacity(text.len());
                stream.compress_vec(&text, &mut bytes, flate2::FlushCompress::Finish).unwrap();
                bytes
            }
            CompressionType::Zstd => compress_to_vec(&text[..], CompressionLevel::Fastest),
        };
        let at = self.file.len() as u64;
        let sectors = (at + bytes.len() as u64 - 1) / SECTOR - at / SECTOR;
        self.file.extend(bytes);
        self.set_entry(cluster, COMPRESSED | sectors << (62 - (self.bits - 8)) | at);
    }

    /// The image, and a reader with helpers, however many processors there are.
    fn open(&self) -> (ImageReader, Arc<SimStorage>) {
        let file = SimStorage::new(self.file.clone());
        let reader = ImageReader::open(file.clone()).unwrap();
        reader.helpers.set(Helpers::of(3)).unwrap();
        (reader, file)
    }
}

/// Reads as a layer of the chain does.
fn read(reader: &ImageReader, at: u64, buf: &mut [u8]) -> Result<()> {
    let mut done = 0;
    while done < buf.len() {
        let guest = GuestOffset(at + done as u64);
        let extent = reader.map(guest, (buf.len() - done) as u64)?;
        let len = reader.read_run(guest, &extent, &mut buf[done..])?;
        assert!(len >= extent.len);
        done += len as usize;
    }
    Ok(())
}

/// Protects: V26, and the place of every byte. Clusters that are compressed, stored, zero or
/// unallocated, and compressed bytes in any order in the file, with gaps and without: several
/// threads read the same image, and each gets the content of its range.
#[test]
fn every_cluster_lands_in_its_place() {
    let mut random = Random::of_test(1);
    for kind in [CompressionType::Zlib, CompressionType::Zstd] {
        for (bits, clusters) in [(9, 64), (12, 400), (16, 60)] {
            let mut image = Builder::new(bits, kind, clusters);
            // Some neighbours change places in the file, so that their bytes are in no order.
            let mut order: Vec<usize> = (0..clusters as usize).collect();
            for _ in 0..clusters / 8 {
                let at = random.below(clusters - 1) as usize;
                order.swap(at, at + 1);
            }
            for cluster in order {
                match random.below(40) {
                    0 => image.data(cluster),
                    1 => image.set_entry(cluster, 1),
                    2 => {}
                    3 => {
                        let gap = image.file.len() + random.below(1500) as usize;
                        image.file.resize(gap, 0xdd);
                        image.compressed(cluster);
                    }
                    _ => image.compressed(cluster),
                }
            }
            let (reader, _) = image.open();
            let (reader, content) = (&reader, &image.content);
            std::thread::scope(|scope| {
                for _ in 0..3 {
                    let mut random = Random(random.next());
                    scope.spawn(move || {
                        for round in 0..20 {
                            let end = content.len() as u64;
                            // From every third on to the end; sector by sector and byte by byte.
                            let start = random.below(end);
                            let (start, len) = match round % 3 {
                                0 => (start >> bits << bits, end),
                                1 => (start / SECTOR * SECTOR, 1 + random.below(end)),
                                _ => (start, 1 + random.below(end)),
                            };
                            let len = len.min(end - start) as usize;
                            let mut buf = vec![0xcc; len];
                            read(reader, start, &mut buf).unwrap();
                            let expected = &content[start as usize..][..len];
                            assert!(buf == expected, "{kind:?}, {bits} bits: {len} at {start}");
                        }
                    });
                }
            });
        }
    }
}

/// Protects: clusters whose bytes follow each other in the file cost one read of it, of 1 MiB at
/// most, and not one for each cluster.
#[test]
fn clusters_beside_each_other_are_read_at_once() {
    let mut image = Builder::new(16, CompressionType::Zlib, 40);
    (0..40).for_each(|cluster| image.compressed(cluster));
    let (reader, file) = image.open();
    let mut buf = vec![0; 40 << 16];
    read(&reader, 0, &mut buf[..1 << 16]).unwrap();
    let before = file.operations();
    read(&reader, 0, &mut buf).unwrap();
    assert_eq!(file.operations() - before, 3, "16, 16 and 8 clusters");
    assert!(buf == image.content);
}

/// Protects: a cluster that cannot be decompressed is an error for reads of it and for no others.
/// The text is that of a read of this cluster alone, also if there are more bad clusters behind it.
#[test]
fn a_corrupt_cluster_is_an_error_of_its_own_range() {
    for kind in [CompressionType::Zlib, CompressionType::Zstd] {
        for bits in [12, 16] {
            let clusters = 48;
            let mut image = Builder::new(bits, kind, clusters);
            for cluster in 0..clusters as usize {
                let at = image.file.len();
                image.compressed(cluster);
                if cluster == 21 || cluster == 25 {
                    image.file[at..].fill(0xff);
                }
            }
            let (reader, _) = image.open();
            let size = image.cluster_size();
            let at = GuestOffset((21 * size) as u64);
            let extent = reader.map(at, size as u64).unwrap();
            let alone = reader.read_extent(at, &extent, &mut vec![0; size]).unwrap_err();
            assert_eq!(alone.kind(), ErrorKind::Corrupt);
            let mut buf = vec![0; image.content.len()];
            for (first, last) in [(0, 48), (20, 23), (21, 40), (10, 22)] {
                let part = &mut buf[first * size..last * size];
                let error = read(&reader, (first * size) as u64, part).unwrap_err();
                assert_eq!(error.to_string(), alone.to_string(), "{kind:?}, {first} to {last}");
            }
            for (first, last) in [(0, 21), (22, 25), (26, 48)] {
                let part = &mut buf[first * size..last * size];
                read(&reader, (first * size) as u64, part).unwrap();
                assert!(*part == image.content[first * size..last * size], "{kind:?}");
            }
        }
    }
}

/// Protects: where the file cannot be read, the error names the compressed cluster, and clusters
/// beside it can be read.
#[test]
fn an_unreadable_cluster_is_an_error_of_its_own_range() {
    let mut image = Builder::new(16, CompressionType::Zlib, 16);
    (0..16).for_each(|cluster| image.compressed(cluster));
    let (reader, file) = image.open();
    let extent = reader.map(GuestOffset(5 << 16), 1 << 16).unwrap();
    let Mapping::Compressed { at: HostOffset(bad), .. } = extent.mapping else {
        panic!("{extent:?}")
    };
    // A byte that no neighbour shares, although lengths are rounded up to sectors.
    let bad_byte = bad + SECTOR;
    file.inject(Fault {
        matches: Box::new(move |operation: &Operation| {
            (operation.at..operation.at + operation.len).contains(&bad_byte)
        }),
        after: 0,
        failure: HostFailure::Errno(5),
        times: Repeat::ForEver,
    });
    let mut buf = vec![0; 16 << 16];
    let error = read(&reader, 0, &mut buf).unwrap_err();
    assert_eq!((error.kind(), error.errno()), (ErrorKind::Io, Some(5)));
    assert!(error.to_string().contains(&format!("compressed data at {bad:#x}")), "{error}");
    assert_eq!(file.failures(), 2, "all at once, and the cluster alone");
    for (first, last) in [(0, 5), (6, 16)] {
        let part = &mut buf[first << 16..last << 16];
        read(&reader, (first as u64) << 16, part).unwrap();
        assert!(*part == image.content[first << 16..last << 16]);
    }
}
