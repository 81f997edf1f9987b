//! Looks up guest offsets, and reads the bytes of one run.

use super::ImageReader;
use super::judged::Fault;
use super::l2_table::L2Table;
use crate::format::{
    CompressionType, Geometry, GuestCluster, GuestOffset, HostOffset, L2Entry, Mapping, decompress,
};
use host::storage::Need;
use host::{Error, Result};

/// One run of equal mapping. With extended L2 entries it starts and ends at any subcluster.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Extent {
    /// The mapping of the first subcluster of the run; its host cluster is that of the cluster that
    /// contains it. The host clusters of the run, if any, are contiguous. Unallocated subclusters
    /// may have a host cluster too, which says nothing about the guest's bytes.
    pub mapping: Mapping,
    /// Bytes from the requested offset to the end of the run.
    pub len: u64,
}

/// The L2 entry at which a lookup begins, and how many bytes one L2 table maps from there on.
struct Start {
    geometry: Geometry,
    l1_index: usize,
    l2_index: usize,
    /// Bytes from the start of the cluster to the offset that is looked up.
    in_cluster: u64,
    /// Bytes from that offset on, inside the virtual size and the range of the L2 table.
    len: u64,
}

impl Start {
    /// Of a lookup of at most `max` bytes from `at` on.
    ///
    /// # Panics
    /// If `at` is not inside the virtual size.
    fn new(geometry: Geometry, at: GuestOffset, max: u64) -> Start {
        assert!(at.0 < geometry.size(), "lookup at {at:?} beyond the virtual size");
        let span = geometry.l2_span();
        let len = max.min(geometry.size() - at.0).min(span - at.0 % span);
        let (l1_index, l2_index) = geometry.table_indexes(geometry.guest_cluster(at));
        Start { geometry, l1_index, l2_index, in_cluster: geometry.in_cluster(at), len }
    }

    fn run(&self, table: &L2Table) -> Result<Extent> {
        run_at(table, self.l2_index, self.in_cluster, self.len, &self.geometry)
    }

    /// The run if there is no L2 table.
    fn unallocated(&self) -> Extent {
        Extent { mapping: Mapping::Unallocated, len: self.len }
    }
}

impl ImageReader {
    /// Returns the run of equal mapping that starts at `at` (any byte): at most `max` bytes (> 0),
    /// never beyond the virtual size or the range of one L2 table. Holds no lock on return.
    ///
    /// # Errors
    /// Corrupt tables (V22, V24 to V27); I/O if the L2 table is not in memory yet.
    ///
    /// # Panics
    /// If `at` is not inside the virtual size: the caller checks requests.
    pub fn map(&self, at: GuestOffset, max: u64) -> Result<Extent> {
        let start = Start::new(self.geometry(), at, max);
        let run = self.tables.with(start.l1_index, |table| start.run(table))?;
        run.unwrap_or_else(|| Ok(start.unallocated()))
    }

    /// As [`ImageReader::map`], but waits for no I/O: returns `None` if the L2 table is not in
    /// memory, or if its entry is bad.
    ///
    /// # Panics
    /// As [`ImageReader::map`].
    pub fn map_resident(&self, at: GuestOffset, max: u64) -> Option<Extent> {
        let start = Start::new(self.geometry(), at, max);
        let run = self.tables.with_resident(start.l1_index, |table| start.run(table));
        run.ok()?.unwrap_or_else(|| Ok(start.unallocated())).ok()
    }

    /// Returns the mapping at `at`, or its error, and for how many bytes from `at` on it applies,
    /// at most `max` (> 0). As [`ImageReader::map`], but a bad entry hides no good entry beside it,
    /// for callers that examine the whole disk.
    ///
    /// # Panics
    /// As [`ImageReader::map`].
    pub fn look(&self, at: GuestOffset, max: u64) -> (Result<Mapping>, u64) {
        let error = match self.map(at, max) {
            Ok(extent) => return (Ok(extent.mapping), extent.len),
            Err(error) => error,
        };
        let Start { geometry, l1_index, l2_index, in_cluster, len } =
            Start::new(self.geometry(), at, max);
        // If the table could not be loaded, the error applies to everything that it maps.
        let bad = self.tables.if_resident(l1_index, |table| {
            let wanted = (in_cluster + len).div_ceil(geometry.cluster_size()) as usize;
            let bad = (1..wanted)
                .take_while(|next| table.fault(l2_index + next) == Fault::Bad)
                .count() as u64
                + 1;
            len.min((bad << geometry.cluster_bits()) - in_cluster)
        });
        (Err(error), bad.unwrap_or(len))
    }

    /// Returns the entry of one cluster. The cluster may lie beyond the virtual size, because
    /// clusters there are prepared before a disk grows.
    pub(super) fn entry(&self, cluster: GuestCluster) -> Result<L2Entry> {
        let geometry = self.geometry();
        let (l1_index, l2_index) = geometry.table_indexes(cluster);
        let entry = self.tables.with(l1_index, |table| table.entry(l2_index, &geometry))?;
        Ok(entry.transpose()?.unwrap_or(L2Entry::EMPTY))
    }

    /// Reads from the start of a run that [`ImageReader::map`] returned for the same `at`.
    /// Unallocated and zero runs give zeros.
    ///
    /// # Errors
    /// Corrupt compressed data; I/O.
    ///
    /// # Panics
    /// If `buf` is longer than the run.
    pub fn read_extent(&self, at: GuestOffset, extent: &Extent, buf: &mut [u8]) -> Result<()> {
        assert!(buf.len() as u64 <= extent.len);
        let geometry = self.geometry();
        match extent.mapping {
            Mapping::Unallocated | Mapping::Zero { .. } => {
                buf.fill(0);
                Ok(())
            }
            Mapping::Data { host, .. } => {
                let offset = geometry.host_offset(host).0 + geometry.in_cluster(at);
                self.storage()
                    .read_at(offset, buf)
                    .map_err(|error| Error::io(format!("data at {offset:#x}"), error))
            }
            Mapping::Compressed { at: host, len } => {
                let start = geometry.in_cluster(at) as usize;
                if let Some(cluster) = self.inflated.get((host, len)) {
                    buf.copy_from_slice(&cluster[start..start + buf.len()]);
                    return Ok(());
                }
                // Whole-cluster reads, mostly those of a stream, bypass the cache: they do not read
                // the cluster again.
                if buf.len() as u64 == geometry.cluster_size() {
                    return self.inflate(host, len, buf);
                }
                let mut cluster = vec![0; geometry.cluster_size() as usize];
                self.inflate(host, len, &mut cluster)?;
                buf.copy_from_slice(&cluster[start..start + buf.len()]);
                self.inflated.put((host, len), cluster.into());
                Ok(())
            }
        }
    }

    /// As [`ImageReader::read_extent`], but only if the host has the bytes in memory. Returns
    /// whether `buf` was filled. Of compressed clusters, those that were decompressed lately are in
    /// memory.
    ///
    /// # Panics
    /// As [`ImageReader::read_extent`].
    pub fn read_cached(&self, at: GuestOffset, extent: &Extent, buf: &mut [u8]) -> bool {
        assert!(buf.len() as u64 <= extent.len);
        let geometry = self.geometry();
        match extent.mapping {
            Mapping::Unallocated | Mapping::Zero { .. } => {
                buf.fill(0);
                true
            }
            Mapping::Data { host, .. } => {
                let offset = geometry.host_offset(host).0 + geometry.in_cluster(at);
                self.storage().read_cached(offset, buf)
            }
            Mapping::Compressed { at: host, len } => {
                let Some(cluster) = self.inflated.get((host, len)) else { return false };
                let start = geometry.in_cluster(at) as usize;
                buf.copy_from_slice(&cluster[start..start + buf.len()]);
                true
            }
        }
    }

    /// Says that the bytes of the run at `at` will be read soon
    /// ([`host::storage::ReadAt::will_need`]).
    pub fn will_need(&self, at: GuestOffset, extent: &Extent, need: Need) {
        match extent.mapping {
            Mapping::Compressed { at, len } => self.storage().will_need(at.0, len.into(), need),
            _ => {
                if let Some(offset) = self.data_offset(at, extent) {
                    self.storage().will_need(offset, extent.len, need);
                }
            }
        }
    }

    /// Says that the guest's bytes at `at` will not be read again
    /// ([`host::storage::ReadAt::done`]). Waits for nothing: what a table maps that is not in
    /// memory is left out. So are compressed clusters, whose blocks have parts of others.
    pub fn done(&self, at: GuestOffset, len: u64) {
        let geometry = self.geometry();
        let (mut at, end) = (at.0, at.0.saturating_add(len).min(geometry.size()));
        while at < end {
            let guest = GuestOffset(at);
            let start = Start::new(geometry, guest, end - at);
            let run = self.tables.if_resident(start.l1_index, |table| start.run(table));
            let Some(Ok(extent)) = run else {
                at += start.len;
                continue;
            };
            if let Some(offset) = self.data_offset(guest, &extent) {
                self.storage().done(offset, extent.len);
            }
            at += extent.len.max(1);
        }
    }

    /// Where the file has the bytes of the run at `at`, if they are there as they are.
    fn data_offset(&self, at: GuestOffset, extent: &Extent) -> Option<u64> {
        let geometry = self.geometry();
        match extent.mapping {
            Mapping::Data { host, .. } => {
                Some(geometry.host_offset(host).0 + geometry.in_cluster(at))
            }
            _ => None,
        }
    }

    /// Reads and decompresses one cluster. After an error the content of `cluster` is undefined.
    pub(super) fn inflate(&self, host: HostOffset, len: u32, cluster: &mut [u8]) -> Result<()> {
        let mut compressed = vec![0; len as usize];
        self.storage()
            .read_at(host.0, &mut compressed)
            .map_err(|error| Error::io(format!("compressed data at {host}"), error))?;
        let compression = self.header.read().compression;
        inflate(compression, host, &compressed, cluster)
    }
}

/// Decompresses the bytes at `host`. After an error the content of `cluster` is undefined.
pub(super) fn inflate(
    compression: CompressionType,
    host: HostOffset,
    compressed: &[u8],
    cluster: &mut [u8],
) -> Result<()> {
    // A thread that gives way takes as long for one cluster as others for a piece.
    host::background::let_others_run();
    decompress(compression, compressed, cluster)
        .map_err(|error| Error::from(error).context(format!("compressed data at {host}")))
}

/// Returns the run that starts at byte `in_cluster` of the cluster of entry `index`, at most `max`
/// bytes.
fn run_at(
    table: &L2Table,
    index: usize,
    in_cluster: u64,
    max: u64,
    geometry: &Geometry,
) -> Result<Extent> {
    if geometry.has_extended_l2() {
        return subcluster_run_at(table, index, in_cluster, max, geometry);
    }
    // Another thread may replace a standard entry at any time, unless the caller holds its range.
    // The entry is therefore read once: the mapping and the following entries that belong to the
    // run are derived from the same word.
    let first = table.raw(index);
    let mapping = table.decode(index, first, geometry)?.mapping(0);
    let cluster_size = geometry.cluster_size();
    // Difference between the raw entries of two neighbouring clusters of one run.
    let step = match mapping {
        Mapping::Unallocated | Mapping::Zero { reserved: None } => 0,
        Mapping::Zero { reserved: Some(_) } | Mapping::Data { .. } => cluster_size,
        Mapping::Compressed { .. } => {
            return Ok(Extent { mapping, len: max.min(cluster_size - in_cluster) });
        }
    };
    let wanted = (in_cluster + max).div_ceil(cluster_size) as usize;
    let clusters = table.series(index, first.descriptor, step, wanted);
    Ok(Extent { mapping, len: max.min(clusters as u64 * cluster_size - in_cluster) })
}

/// Does what [`run_at`] does, with extended entries.
fn subcluster_run_at(
    table: &L2Table,
    index: usize,
    in_cluster: u64,
    max: u64,
    geometry: &Geometry,
) -> Result<Extent> {
    let (bits, subclusters) = (geometry.subcluster_bits(), geometry.subclusters());
    let first = (in_cluster >> bits) as u32;
    let entry = table.entry(index, geometry)?;
    let mapping = entry.mapping(first);
    // The subclusters from the start of the cluster to the end of the run.
    let mut end = u64::from(first + entry.run(first, subclusters));
    let mut cluster = 1;
    while end == cluster * u64::from(subclusters)
        && end << bits < in_cluster + max
        && !matches!(mapping, Mapping::Compressed { .. })
    {
        // A bad entry ends the run, and is an error for the next lookup.
        let Ok(next) = table.entry(index + cluster as usize, geometry) else { break };
        if next.mapping(0) != mapping.moved_by(cluster) {
            break;
        }
        end += u64::from(next.run(0, subclusters));
        cluster += 1;
    }
    Ok(Extent { mapping, len: max.min((end << bits) - in_cluster) })
}
