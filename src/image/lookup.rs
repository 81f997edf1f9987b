//! Where a guest offset is, and the bytes of one run.

use super::ImageReader;
use super::judged::Fault;
use super::l2_table::L2Table;
use crate::format::{Geometry, GuestCluster, GuestOffset, HostOffset, Mapping, decompress};
use crate::sync::atomic::Ordering;
use crate::{Error, Result};

/// One run of equal mapping.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Extent {
    /// What the first cluster of the run maps to. Host clusters of the ones that follow lie behind it without a gap.
    pub mapping: Mapping,
    /// Bytes from the offset asked for to the end of the run.
    pub len: u64,
}

impl ImageReader {
    /// The run of equal mapping that starts at `at` (any byte), at most `max` bytes (> 0), never beyond the virtual size nor one L2 table.
    /// Holds no lock afterwards.
    ///
    /// # Errors
    /// Corrupt tables (V22, V24 to V27); I/O where the L2 table is not in memory yet.
    ///
    /// # Panics
    /// If `at` is not inside the virtual size: the caller checks requests.
    pub fn map(&self, at: GuestOffset, max: u64) -> Result<Extent> {
        let geometry = self.geometry();
        assert!(at.0 < geometry.size(), "lookup at {at:?} beyond the virtual size");
        let span = geometry.l2_span();
        let len = max.min(geometry.size() - at.0).min(span - at.0 % span);
        let (l1_index, l2_index) = geometry.table_indexes(geometry.guest_cluster(at));
        let run = self.tables.with(l1_index, |table| run_at(table, l2_index, geometry.in_cluster(at), len, &geometry))?;
        run.unwrap_or(Ok(Extent { mapping: Mapping::Unallocated, len }))
    }

    /// As [`ImageReader::map`], but a bad place is no error for what is beside it: the mapping or what is
    /// wrong, and for how many bytes from `at` on, at most `max` (> 0), that is so. For those that
    /// want to know of the whole disk what can be known.
    ///
    /// # Panics
    /// As [`ImageReader::map`].
    pub fn look(&self, at: GuestOffset, max: u64) -> (Result<Mapping>, u64) {
        let error = match self.map(at, max) {
            Ok(extent) => return (Ok(extent.mapping), extent.len),
            Err(error) => error,
        };
        let geometry = self.geometry();
        let span = geometry.l2_span();
        let len = max.min(geometry.size() - at.0).min(span - at.0 % span);
        let (l1_index, l2_index) = geometry.table_indexes(geometry.guest_cluster(at));
        let in_cluster = geometry.in_cluster(at);
        // Without the table nothing is known of all that it maps.
        let bad = self.tables.if_resident(l1_index, |table| {
            let wanted = (in_cluster + len).div_ceil(geometry.cluster_size()) as usize;
            let bad = (1..wanted).take_while(|next| table.fault(l2_index + next) == Fault::Bad).count() as u64 + 1;
            len.min((bad << geometry.cluster_bits()) - in_cluster)
        });
        (Err(error), bad.unwrap_or(len))
    }

    /// What one cluster maps to, also one beyond the virtual size: a disk that is to grow is made ready there.
    pub(super) fn mapping(&self, cluster: GuestCluster) -> Result<Mapping> {
        let geometry = self.geometry();
        let (l1_index, l2_index) = geometry.table_indexes(cluster);
        let mapping = self.tables.with(l1_index, |table| table.mapping(l2_index, &geometry))?;
        Ok(mapping.transpose()?.unwrap_or(Mapping::Unallocated))
    }

    /// Reads from the start of a run that [`ImageReader::map`] returned for the same `at`. Unallocated and zero runs give zeros.
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
                self.storage().read_at(offset, buf).map_err(|error| Error::io(format!("data at {offset:#x}"), error))
            }
            Mapping::Compressed { at: host, len } => {
                let start = geometry.in_cluster(at) as usize;
                if let Some(cluster) = self.inflated.get((host, len)) {
                    buf.copy_from_slice(&cluster[start..start + buf.len()]);
                    return Ok(());
                }
                // Who takes a whole cluster, a stream above all, has no use for it again.
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

    /// Reads and decompresses one cluster. What it holds after an error is undefined.
    fn inflate(&self, host: HostOffset, len: u32, cluster: &mut [u8]) -> Result<()> {
        let mut packed = vec![0; len as usize];
        self.storage().read_at(host.0, &mut packed).map_err(|error| Error::io(format!("compressed data at {host}"), error))?;
        let compression = self.header.read().compression;
        decompress(compression, &packed, cluster).map_err(|error| Error::from(error).context(format!("compressed data at {host}")))
    }
}

/// The run that starts at byte `in_cluster` of entry `index`, at most `max` bytes.
fn run_at(table: &L2Table, index: usize, in_cluster: u64, max: u64, geometry: &Geometry) -> Result<Extent> {
    let first = table.entry(index).load(Ordering::Acquire);
    let mapping = table.mapping(index, geometry)?;
    let fault = table.fault(index);
    let cluster_size = geometry.cluster_size();
    // How much a raw entry grows from one cluster of a run to the next.
    let step = match mapping {
        Mapping::Unallocated | Mapping::Zero { reserved: None } => 0,
        Mapping::Zero { reserved: Some(_) } | Mapping::Data { .. } => cluster_size,
        Mapping::Compressed { .. } => return Ok(Extent { mapping, len: max.min(cluster_size - in_cluster) }),
    };
    let wanted = (in_cluster + max).div_ceil(cluster_size) as usize;
    let mut clusters = 1;
    let mut expected = first;
    while clusters < wanted {
        expected = expected.wrapping_add(step);
        if table.entry(index + clusters).load(Ordering::Acquire) != expected || table.fault(index + clusters) != fault {
            break;
        }
        clusters += 1;
    }
    Ok(Extent { mapping, len: max.min(clusters as u64 * cluster_size - in_cluster) })
}
