//! Reads and checks an image by the specification alone: nothing of `crate::format`, so that a mistake there is not made twice.

use std::collections::BTreeSet;

use super::sketch::{COMPRESSED, COPIED, ZERO};

/// What an image is.
#[derive(Debug)]
pub(super) struct Seen {
    /// What is wrong with it, but for leaks.
    pub errors: Vec<String>,
    /// Clusters that are counted more often than they are referred to.
    pub leaks: u64,
    /// The guest's bytes.
    pub content: Vec<u8>,
}

struct Reader<'a> {
    bytes: &'a [u8],
    cluster: u64,
    version: u64,
    errors: Vec<String>,
    /// References by cluster.
    references: Vec<u64>,
    /// Clusters said to be referred to once, and others that are the guest's or L2 tables.
    copied: Vec<u64>,
    not_copied: Vec<u64>,
}

/// Looks at all of an image. `below` gives the bytes of a backing file; `was_shared` are clusters of two names, of which the other one does not
/// learn that it is the last.
pub(super) fn look(bytes: &[u8], below: impl Fn(&str) -> Vec<u8>, was_shared: &BTreeSet<u64>) -> Seen {
    let cluster_bits = number(bytes, 20, 4);
    let version = number(bytes, 4, 4);
    assert!(&bytes[..4] == b"QFI\xfb" && (2..=3).contains(&version) && (9..=21).contains(&cluster_bits), "header");
    let cluster = 1 << cluster_bits;
    let mut reader =
        Reader { bytes, cluster, version, errors: Vec::new(), references: Vec::new(), copied: Vec::new(), not_copied: Vec::new() };
    let (size, l1_entries, l1_offset) = (number(bytes, 24, 8), number(bytes, 36, 4), number(bytes, 40, 8));
    let (table, table_clusters) = (number(bytes, 48, 8), number(bytes, 56, 4));
    let order = if version >= 3 { number(bytes, 96, 4) } else { 4 };
    if version >= 3 && number(bytes, 72, 8) != 0 {
        reader.errors.push(format!("incompatible features {:#x}", number(bytes, 72, 8)));
    }
    let backing = match number(bytes, 8, 8) {
        0 => None,
        at => Some(String::from_utf8_lossy(&bytes[at as usize..][..number(bytes, 16, 4) as usize]).into_owned()),
    };
    let mut content = vec![0; size as usize];
    if let Some(name) = &backing {
        let base = below(name);
        let under = content.len().min(base.len());
        content[..under].copy_from_slice(&base[..under]);
    }

    reader.refer("header", 0, 1);
    reader.refer("L1 table", l1_offset, (l1_entries * 8).div_ceil(cluster));
    reader.refer("refcount table", table, table_clusters);
    if l1_entries * (cluster / 8) * cluster < size {
        reader.errors.push(format!("{l1_entries} L1 entries for {size} bytes"));
    }
    for index in 0..l1_entries {
        let entry = number(bytes, l1_offset + index * 8, 8);
        if entry != 0 {
            reader.l2_table(index, entry, &mut content);
        }
    }
    let mut refcounts = Vec::new();
    let width = 1u64 << order;
    let per_block = cluster * 8 / width;
    for index in 0..table_clusters * cluster / 8 {
        let block = number(bytes, table + index * 8, 8);
        if block == 0 {
            continue;
        }
        if !reader.refer("refcount block", block, 1) {
            continue;
        }
        refcounts.resize((index * per_block) as usize, 0);
        assert!(width >= 8, "images here have whole bytes");
        refcounts.extend((0..per_block).map(|entry| number(bytes, block + entry * width / 8, width / 8)));
    }
    let refcount = |cluster: u64| refcounts.get(cluster as usize).copied().unwrap_or(0);
    let mut leaks = 0;
    for at in 0..(reader.references.len().max(refcounts.len())) as u64 {
        let (references, counted) = (reader.references.get(at as usize).copied().unwrap_or(0), refcount(at));
        if counted < references {
            reader.errors.push(format!("cluster {at}: refcount {counted}, references {references}"));
        }
        leaks += u64::from(counted > references);
    }
    let wrong =
        reader.copied.iter().filter(|at| refcount(**at) != 1).map(|at| format!("cluster {at} is COPIED, refcount {}", refcount(*at)));
    let missing = reader.not_copied.iter().filter(|at| refcount(**at) == 1 && !was_shared.contains(at));
    let more: Vec<_> = wrong.chain(missing.map(|at| format!("cluster {at} is not COPIED, refcount 1"))).collect();
    reader.errors.extend(more);
    Seen { errors: reader.errors, leaks, content }
}

impl Reader<'_> {
    /// One reference more to each of `clusters` from byte `offset` on; `false`, with an error noted, where they cannot be there.
    fn refer(&mut self, what: &str, offset: u64, clusters: u64) -> bool {
        let end = offset.saturating_add(clusters.saturating_mul(self.cluster));
        // A data cluster need not be there whole.
        if !offset.is_multiple_of(self.cluster) || end > (self.bytes.len() as u64).next_multiple_of(self.cluster) {
            self.errors.push(format!("{what} at {offset:#x}: unaligned, or outside the file of {:#x} bytes", self.bytes.len()));
            return false;
        }
        let (first, end) = ((offset / self.cluster) as usize, (end / self.cluster) as usize);
        if self.references.len() < end {
            self.references.resize(end, 0);
        }
        self.references[first..end].iter_mut().for_each(|count| *count += 1);
        true
    }

    fn is_copied(&mut self, entry: u64, host: u64) {
        let list = if entry & COPIED != 0 { &mut self.copied } else { &mut self.not_copied };
        list.push(host / self.cluster);
    }

    fn l2_table(&mut self, l1_index: u64, l1_entry: u64, content: &mut [u8]) {
        let host = l1_entry & !COPIED;
        if !self.refer(&format!("L1 entry {l1_index}"), host, 1) {
            return;
        }
        self.is_copied(l1_entry, host);
        let entries = self.cluster / 8;
        for index in 0..entries {
            let entry = number(self.bytes, host + index * 8, 8);
            if entry == 0 {
                continue;
            }
            let guest = (l1_index * entries + index) * self.cluster;
            let from = content.len().min(guest as usize);
            let to = content.len().min((guest + self.cluster) as usize);
            let what = format!("L2 entry {entry:#x} of guest offset {guest:#x}");
            let part = &mut content[from..to];
            if entry & COMPRESSED != 0 {
                self.compressed(&what, entry, part);
                continue;
            }
            let (host, zero) = (entry & !COPIED & !ZERO, entry & ZERO != 0);
            if zero && self.version < 3 {
                self.errors.push(format!("{what}: zero flag in version 2"));
            }
            if host != 0 {
                if !self.refer(&what, host, 1) {
                    continue;
                }
                self.is_copied(entry, host);
            }
            if zero || host == 0 {
                part.fill(0);
            } else {
                let have = self.bytes.len().saturating_sub(host as usize).min(part.len());
                part[have..].fill(0);
                part[..have].copy_from_slice(&self.bytes[host as usize..][..have]);
            }
        }
    }

    fn compressed(&mut self, what: &str, entry: u64, part: &mut [u8]) {
        let offset_bits = 62 - (self.cluster.trailing_zeros() - 8);
        let at = entry & ((1 << offset_bits) - 1);
        let sectors = ((entry & !COPIED & !COMPRESSED) >> offset_bits) + 1;
        let end = at / 512 * 512 + sectors * 512;
        let first = at / self.cluster;
        if entry & COPIED != 0 {
            self.errors.push(format!("{what}: compressed and COPIED"));
        }
        if !self.refer(what, first * self.cluster, (end - 1) / self.cluster - first + 1) {
            return;
        }
        let packed = &self.bytes[at as usize..self.bytes.len().min(end as usize)];
        let mut whole = vec![0; self.cluster as usize];
        let mut stream = flate2::Decompress::new(false);
        let done = stream.decompress(packed, &mut whole, flate2::FlushDecompress::Finish);
        if done.is_err() || stream.total_out() != self.cluster {
            self.errors.push(format!("{what}: cannot be inflated"));
        }
        part.copy_from_slice(&whole[..part.len()]);
    }
}

/// `len` bytes at `at` as a big-endian number.
fn number(bytes: &[u8], at: u64, len: u64) -> u64 {
    bytes[at as usize..(at + len) as usize].iter().fold(0, |number, byte| number << 8 | u64::from(*byte))
}
