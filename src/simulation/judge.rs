//! Reads the bytes of an image without the engine: what the guest would find, and whether refcounts and references agree.
//!
//! Pure, and no lock: a scheduler that decides at every lock who goes on does not see it.

use std::collections::BTreeMap;

use crate::format::{Geometry, Header, L1Entry, Mapping, RefcountBlock};

/// An image as it lies in a file.
#[derive(Debug)]
pub struct Judged {
    /// The guest's bytes.
    pub guest: Vec<u8>,
    /// Whether the backing file is still named.
    pub has_backing: bool,
    /// Clusters that are counted and not referenced.
    pub leaks: u64,
    /// Host cluster of every guest cluster that has one, whether it shows or is kept behind zeros.
    pub hosts: BTreeMap<u64, u64>,
}

/// Reads an image; `base` is what lies below it, as long as it names a backing file.
///
/// # Errors
/// A sentence about the first thing that is wrong: a table that cannot be decoded, a cluster with two owners, fewer counts than references.
pub fn judge(bytes: &[u8], base: &[u8]) -> Result<Judged, String> {
    let header = Header::parse(&bytes[..bytes.len().min(2 << 20)], bytes.len() as u64).map_err(|error| error.to_string())?;
    let geometry = header.geometry;
    let cluster_size = geometry.cluster_size() as usize;
    let mut owners: BTreeMap<u64, String> = BTreeMap::new();
    let mut own = |cluster: u64, what: String| match owners.insert(cluster, what.clone()) {
        None => Ok(()),
        Some(other) => Err(format!("host cluster {cluster} is {what} and {other}")),
    };
    own(0, "header".into())?;
    let l1_clusters = (header.l1_size as usize * 8).div_ceil(cluster_size);
    for cluster in 0..l1_clusters as u64 {
        own(header.l1_table_offset / geometry.cluster_size() + cluster, "L1 table".into())?;
    }
    let refcounts = Refcounts::read(bytes, &header, &geometry, &mut own)?;
    let mut guest = vec![0; geometry.size() as usize];
    let has_backing = header.backing.is_some();
    if has_backing {
        let shown = base.len().min(guest.len());
        guest[..shown].copy_from_slice(&base[..shown]);
    }
    let mut hosts = BTreeMap::new();
    for l1_index in 0..header.l1_size as usize {
        let raw = word(bytes, header.l1_table_offset as usize + l1_index * 8);
        let Some(entry) = L1Entry::decode(raw, &geometry).map_err(|error| error.to_string())? else { continue };
        own(entry.table.0, format!("L2 table {l1_index}"))?;
        let table = geometry.host_offset(entry.table).0 as usize;
        for index in 0..geometry.l2_entries() as usize {
            let at = (l1_index * geometry.l2_entries() as usize + index) * cluster_size;
            let what = format!("guest cluster {}", at / cluster_size);
            let mapping = Mapping::decode(word(bytes, table + index * 8), &geometry).map_err(|error| format!("{what}: {error}"))?;
            let (host, data) = match mapping {
                Mapping::Unallocated => continue,
                Mapping::Zero { reserved } => (reserved, vec![0; cluster_size]),
                Mapping::Data { host, in_place } => {
                    let data = piece(bytes, geometry.host_offset(host).0 as usize, cluster_size);
                    (Some((host, in_place)), data)
                }
                Mapping::Compressed { .. } => return Err(format!("{what} is compressed")),
            };
            if let Some((host, in_place)) = host {
                own(host.0, what.clone())?;
                hosts.insert((at / cluster_size) as u64, host.0);
                if !in_place {
                    return Err(format!("{what} is not COPIED"));
                }
            }
            if at < guest.len() {
                let shown = cluster_size.min(guest.len() - at);
                guest[at..at + shown].copy_from_slice(&data[..shown]);
            }
        }
    }
    let mut leaks = 0;
    for (cluster, count) in refcounts.counted() {
        match (owners.contains_key(&cluster), count) {
            (true, 1) => {}
            (true, _) => return Err(format!("host cluster {cluster}, {}, has refcount {count}", owners[&cluster])),
            (false, _) => leaks += 1,
        }
    }
    for (cluster, what) in &owners {
        if refcounts.get(*cluster) == 0 {
            return Err(format!("host cluster {cluster}, {what}, is not counted"));
        }
    }
    Ok(Judged { guest, has_backing, leaks, hosts })
}

/// All refcounts of an image.
struct Refcounts {
    per_block: u64,
    blocks: BTreeMap<u64, RefcountBlock>,
}

impl Refcounts {
    fn read(
        bytes: &[u8],
        header: &Header,
        geometry: &Geometry,
        own: &mut impl FnMut(u64, String) -> Result<(), String>,
    ) -> Result<Refcounts, String> {
        let cluster_size = geometry.cluster_size();
        let mut blocks = BTreeMap::new();
        for cluster in 0..u64::from(header.refcount_table_clusters) {
            own(header.refcount_table_offset / cluster_size + cluster, "refcount table".into())?;
        }
        for index in 0..u64::from(header.refcount_table_clusters) * cluster_size / 8 {
            let at = word(bytes, (header.refcount_table_offset + index * 8) as usize);
            if !at.is_multiple_of(cluster_size) {
                return Err(format!("refcount table, index {index}: {at:#x}"));
            }
            if at != 0 {
                own(at / cluster_size, format!("refcount block {index}"))?;
                let block = piece(bytes, at as usize, cluster_size as usize).into_boxed_slice();
                blocks.insert(index, RefcountBlock::from_bytes(block, geometry));
            }
        }
        Ok(Refcounts { per_block: geometry.refblock_entries(), blocks })
    }

    fn get(&self, cluster: u64) -> u64 {
        self.blocks.get(&(cluster / self.per_block)).map_or(0, |block| block.get((cluster % self.per_block) as usize))
    }

    fn counted(&self) -> impl Iterator<Item = (u64, u64)> {
        let per_block = self.per_block;
        let all = self
            .blocks
            .iter()
            .flat_map(move |(index, block)| (0..per_block).map(move |entry| (index * per_block + entry, block.get(entry as usize))));
        all.filter(|(_, count)| *count != 0)
    }
}

/// Bytes of a file, zeros past its end.
fn piece(bytes: &[u8], at: usize, len: usize) -> Vec<u8> {
    let start = at.min(bytes.len());
    let mut piece = bytes[start..(at + len).min(bytes.len()).max(start)].to_vec();
    piece.resize(len, 0);
    piece
}

fn word(bytes: &[u8], at: usize) -> u64 {
    piece(bytes, at, 8).iter().fold(0, |value, &byte| value << 8 | u64::from(byte))
}
