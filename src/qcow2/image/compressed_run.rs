//! Reads of several compressed clusters, which are decompressed on several threads.

use std::io;
use std::ops::Range;
use std::sync::Arc;

use super::ImageReader;
use super::helpers::Fill;
use super::lookup::{Extent, inflate};
use crate::format::{CompressionType, GuestOffset, HostOffset, Mapping};
use host::Result;

/// Most bytes that are decompressed at a time; the largest read of a guest. The limit bounds the
/// memory for compressed bytes.
const MOST: u64 = 1 << 20;
/// Bytes that a thread decompresses before it looks for more, but at least one cluster. Handing
/// over less costs more than it saves.
const PIECE: usize = 64 << 10;

/// Compressed clusters, and their compressed bytes.
struct CompressedRun {
    compression: CompressionType,
    /// Of each cluster, the host offset of its compressed bytes, and their place in `bytes`.
    places: Vec<(HostOffset, Range<usize>)>,
    bytes: Vec<u8>,
    cluster_size: usize,
}

impl ImageReader {
    /// As [`ImageReader::read_extent`], but `buf` may be longer than the run: if the run is a
    /// compressed cluster, the compressed clusters behind it are read as well, and all processors
    /// decompress. Returns the number of bytes that were read: at least those of the run.
    ///
    /// # Errors
    /// As [`ImageReader::read_extent`], for the first cluster that cannot be read.
    ///
    /// # Panics
    /// If `buf` is shorter than the run, or reaches beyond the virtual size.
    pub fn read_run(&self, at: GuestOffset, extent: &Extent, buf: &mut [u8]) -> Result<u64> {
        let clusters = self.compressed_clusters(at, extent, buf.len() as u64);
        let cluster_size = self.geometry().cluster_size();
        let len = clusters.len() as u64 * cluster_size;
        if clusters.len() < 2 {
            self.read_extent(at, extent, &mut buf[..extent.len as usize])?;
            return Ok(extent.len);
        }
        let buf = &mut buf[..len as usize];
        match self.read_together(&clusters) {
            Ok(run) => {
                let piece = PIECE.max(run.cluster_size);
                let fill: Fill = Arc::new(move |number, output: &mut [u8]| {
                    run.decompress(number * piece / run.cluster_size, output)
                });
                self.helpers.get_or_init(Default::default).fill(buf, piece, &fill)?;
            }
            // One by one: the error is that of a cluster, and clusters before it are read.
            Err(_) => {
                for (&(host, len), output) in
                    clusters.iter().zip(buf.chunks_exact_mut(cluster_size as usize))
                {
                    self.inflate(host, len, output)?;
                }
            }
        }
        Ok(len)
    }

    /// The location and number of the compressed bytes of whole clusters from `at` on, as far as
    /// each of them is compressed and not in the cache.
    fn compressed_clusters(
        &self,
        at: GuestOffset,
        extent: &Extent,
        max: u64,
    ) -> Vec<(HostOffset, u32)> {
        let cluster_size = self.geometry().cluster_size();
        let max = max.min(MOST);
        let mut clusters = Vec::new();
        let mut end = 0;
        let mut next = *extent;
        while let Mapping::Compressed { at: host, len } = next.mapping
            && next.len == cluster_size
            && end + cluster_size <= max
            && self.inflated.get((host, len)).is_none()
        {
            clusters.push((host, len));
            end += cluster_size;
            if end == max {
                break;
            }
            // An error is returned when the cluster is the first one that is asked for.
            let Ok(extent) = self.map(GuestOffset(at.0 + end), max - end) else { break };
            next = extent;
        }
        clusters
    }

    /// Reads the compressed bytes of clusters. Those that follow each other in the file, as
    /// qemu-img writes them, are read at once.
    fn read_together(&self, clusters: &[(HostOffset, u32)]) -> io::Result<CompressedRun> {
        let mut places = Vec::with_capacity(clusters.len());
        let mut bytes = Vec::new();
        // The bytes of the file that are read at once; their place is the end of `bytes`.
        let mut span = 0..0;
        for &(host, len) in clusters {
            // Lengths are rounded up to sectors, so that neighbours overlap.
            if !(span.start..=span.end).contains(&host.0) {
                self.read_span(&span, &mut bytes)?;
                span = host.0..host.0;
            }
            let end = span.end.max(host.0 + u64::from(len));
            bytes.resize(bytes.len() + (end - span.end) as usize, 0);
            span.end = end;
            let start = bytes.len() - (end - host.0) as usize;
            places.push((host, start..start + len as usize));
        }
        self.read_span(&span, &mut bytes)?;
        let compression = self.header.read().compression;
        let cluster_size = self.geometry().cluster_size() as usize;
        Ok(CompressedRun { compression, places, bytes, cluster_size })
    }

    /// Reads a span of the file to the end of `bytes`.
    fn read_span(&self, span: &Range<u64>, bytes: &mut [u8]) -> io::Result<()> {
        let start = bytes.len() - (span.end - span.start) as usize;
        if span.is_empty() {
            Ok(())
        } else {
            self.storage().read_at(span.start, &mut bytes[start..])
        }
    }
}

impl CompressedRun {
    /// Decompresses as many clusters, beginning with the one of this index, as `output` has.
    fn decompress(&self, first: usize, output: &mut [u8]) -> Result<()> {
        let clusters = output.chunks_exact_mut(self.cluster_size);
        for ((host, place), output) in self.places[first..].iter().zip(clusters) {
            inflate(self.compression, *host, &self.bytes[place.clone()], output)?;
        }
        Ok(())
    }
}
