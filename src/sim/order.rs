//! The order checker. It sees every write, punch and barrier of an image, and panics at the moment
//! when a rule of order is broken, long before a loss of power would show it. The rules
//! (docs/invariants.md):
//!
//! ```text
//! R1  an L2 entry shows a host cluster, or a subcluster of it, only after a barrier has covered a
//!     write of all of it
//! R2  an entry names a cluster only if the refcount on disk is at least the number of entries that
//!     may name the cluster
//! R3  a refcount is lowered only to at least the number of entries that may name the cluster
//! R4  an L1 entry names only an L2 table that is durable as a whole; a header likewise names
//!     only such an L1 table
//! R5  a refcount table entry names only a refcount block that is durable as a whole
//! R6  a header names only a refcount table that is durable as a whole
//! R7  no write to a cluster that an entry on disk may still name as something else
//! R8  no hole where an entry on disk may name a cluster
//! R9  COPIED exactly if the refcount is one
//! R11 the header changes inside one sector, and a barrier follows before the next write
//! R12 the backing link changes only if no write waits for a barrier
//! R16 no guest data where metadata may be, and no metadata where it does not belong
//! ```
//! "May be on disk" means the durable version of a sector, and every version that was written since
//! and that no barrier has covered. The data of a failed barrier may be on disk for ever, and no
//! later barrier makes it durable. This ends when the data is written again, or when the host has
//! dropped its cache and shows the bytes of the disk. The checker does not use the engine's
//! parsers. The content of the image at the time when the checker starts counts as durable.

use std::collections::{BTreeMap, HashMap, HashSet};

use super::spec::{Contents, Layout, RawEntry};
use super::storage::Observer;
use host::storage::WriteKind;

const SECTOR: u64 = 512;
/// The bits of all pieces of a cluster.
const ALL: u32 = u32::MAX;
const COPIED: u64 = 1 << 63;
const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;

/// The owner of a reference to a cluster. It is an index and not an offset, so that a table that
/// moves keeps its references.
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
enum Slot {
    Header,
    RefcountTable,
    /// Index in the refcount table.
    Block(u64),
    L1Table,
    /// Index in the L1 table.
    L2Table(u64),
    /// Number of the guest cluster.
    Guest(u64),
}

/// What the possible values of a slot say about the cluster that they name.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
struct Naming {
    copied: bool,
    shared: bool,
    /// The pieces whose bytes the guest, or the program, sees: one bit for each.
    shows: u32,
    /// The pieces that are kept for later use: their bytes are not seen.
    reserved: u32,
}

type Names = BTreeMap<(u64, Slot), Naming>;

/// The moments at which a piece was complete: all of it had been written as its present kind. A
/// piece is a subcluster, or a cluster in an image without subclusters.
#[derive(Debug, Default)]
struct Cover {
    kind: Option<WriteKind>,
    sectors: HashSet<u64>,
    whole: Vec<u64>,
}

/// A version of a sector that was written and is not durable.
#[derive(Debug)]
struct Version {
    /// The moment of the write.
    moment: u64,
    bytes: Vec<u8>,
    /// The barrier that was to make it durable has failed.
    lost: bool,
}

/// The checker; see the module.
#[derive(Debug)]
pub struct OrderChecker {
    cluster_bits: u32,
    /// Pieces per cluster.
    pieces: u64,
    durable: Vec<u8>,
    /// For each sector, the versions that were written since it was durable, oldest first. A
    /// version is the whole sector, as the page cache holds it.
    pending: HashMap<u64, Vec<Version>>,
    /// Counts changes.
    now: u64,
    /// Changes up to this moment are durable.
    durable_until: u64,
    /// The moment at which each barrier was called.
    barriers: Vec<u64>,
    /// By the number of the piece in the file.
    covers: HashMap<u64, Cover>,
    names: Option<Names>,
    /// The moment of a header write that no barrier has covered, and whether data may be written
    /// meanwhile.
    header: Option<(u64, bool)>,
}

impl OrderChecker {
    /// Makes a checker for an image that holds these bytes, all of them durable.
    ///
    /// # Panics
    /// If the bytes are not an image.
    pub fn new(bytes: Vec<u8>) -> OrderChecker {
        let layout = Layout::of(&bytes).expect("an image");
        let mut checker = OrderChecker {
            cluster_bits: layout.cluster_bits,
            pieces: layout.subclusters(),
            durable: bytes,
            pending: HashMap::new(),
            now: 0,
            durable_until: 0,
            barriers: Vec::new(),
            covers: HashMap::new(),
            names: None,
            header: None,
        };
        let names = checker.walk();
        for (&(cluster, _), naming) in &names {
            for piece in checker.pieces_of(cluster, !naming.reserved) {
                checker.covers.entry(piece).or_default().whole.push(0);
            }
        }
        checker.names = Some(names);
        checker
    }

    fn cluster_size(&self) -> u64 {
        1 << self.cluster_bits
    }

    /// Returns the numbers of the pieces of a cluster whose bits are set.
    fn pieces_of(&self, cluster: u64, bits: u32) -> impl Iterator<Item = u64> + use<> {
        let pieces = self.pieces;
        (0..pieces).filter(move |piece| bits >> piece & 1 != 0).map(move |at| cluster * pieces + at)
    }

    /// Returns the versions of a sector that may be on disk, the newest last.
    fn versions(&self, sector: u64) -> impl DoubleEndedIterator<Item = &[u8]> {
        let at = self.durable.len().min((sector * SECTOR) as usize);
        let durable = &self.durable[at..self.durable.len().min(at + SECTOR as usize)];
        let pending =
            self.pending.get(&sector).into_iter().flatten().map(|version| &version.bytes[..]);
        std::iter::once(durable).chain(pending)
    }

    /// Calls `f` with index and value of each entry that may be on disk in a table of `entries`
    /// eight-byte entries. It may get a value twice.
    fn each_entry(&self, table: u64, entries: u64, mut f: impl FnMut(u64, u64)) {
        let end = table + entries * 8;
        for sector in table / SECTOR..end.div_ceil(SECTOR) {
            for version in self.versions(sector) {
                for (index, raw) in version.chunks_exact(8).enumerate() {
                    let at = sector * SECTOR + index as u64 * 8;
                    let raw = raw.iter().fold(0, |value, &byte| value << 8 | u64::from(byte));
                    if raw != 0 && (table..end).contains(&at) {
                        f((at - table) / 8, raw);
                    }
                }
            }
        }
    }

    /// Calls `f` with index and value of each entry that may be on disk in an L2 table. Both words
    /// of an extended entry are of one version: they lie in one sector.
    fn each_l2_entry(&self, layout: &Layout, table: u64, mut f: impl FnMut(u64, RawEntry)) {
        let size = layout.l2_entry_size();
        for sector in table / SECTOR..(table + self.cluster_size()) / SECTOR {
            for version in self.versions(sector) {
                for (index, raw) in version.chunks_exact(size as usize).enumerate() {
                    let word = |bytes: &[u8]| {
                        bytes.iter().fold(0, |value, &byte| value << 8 | u64::from(byte))
                    };
                    let (raw, bitmap) = raw.split_at(8);
                    let entry = RawEntry { raw: word(raw), bitmap: word(bitmap) };
                    if entry != RawEntry::default() {
                        f((sector * SECTOR - table) / size + index as u64, entry);
                    }
                }
            }
        }
    }

    /// Returns every header that may be on disk, the newest last.
    fn headers(&self) -> Vec<Layout> {
        self.versions(0).map(Layout::unchecked).collect()
    }

    /// Returns all references that may be on disk.
    fn walk(&self) -> Names {
        let (bits, cluster_size) = (self.cluster_bits, self.cluster_size());
        let mut names = Names::new();
        names.insert((0, Slot::Header), Naming { shared: true, ..Naming::default() });
        let mut tables = HashSet::new();
        for header in self.headers() {
            let (table, clusters) = header.refcount_table;
            for cluster in table >> bits..(table >> bits) + clusters {
                names.entry((cluster, Slot::RefcountTable)).or_default().shows = ALL;
            }
            self.each_entry(table, clusters * cluster_size / 8, |index, raw| {
                names.entry((raw >> bits, Slot::Block(index))).or_default().shows = ALL;
            });
            let (l1, entries) = header.l1;
            for cluster in l1 >> bits..(l1 >> bits) + (entries * 8).div_ceil(cluster_size) {
                names.entry((cluster, Slot::L1Table)).or_default().shows = ALL;
            }
            self.each_entry(l1, entries, |index, raw| {
                let naming =
                    names.entry(((raw & OFFSET) >> bits, Slot::L2Table(index))).or_default();
                naming.shows = ALL;
                *(if raw & COPIED != 0 { &mut naming.copied } else { &mut naming.shared }) = true;
                tables.insert((index, raw & OFFSET));
            });
        }
        let layout = Layout::unchecked(&self.durable);
        for (l1_index, table) in tables {
            self.each_l2_entry(&layout, table, |index, entry| {
                let (Some((first, count)), held) = layout.l2_entry(entry, 0) else { return };
                for cluster in first..first + count {
                    let naming = names
                        .entry((cluster, Slot::Guest(l1_index * layout.per_table() + index)))
                        .or_default();
                    for piece in 0..self.pieces {
                        match layout.l2_entry(entry, piece).1 {
                            Contents::Zero | Contents::Unallocated => naming.reserved |= 1 << piece,
                            Contents::Data(_) | Contents::Compressed(..) => {
                                naming.shows |= 1 << piece;
                            }
                        }
                    }
                    if !matches!(held, Contents::Compressed(..)) {
                        *(if entry.raw & COPIED != 0 {
                            &mut naming.copied
                        } else {
                            &mut naming.shared
                        }) = true;
                    }
                }
            });
        }
        names
    }

    fn names(&mut self) -> &Names {
        if self.names.is_none() {
            self.names = Some(self.walk());
        }
        self.names.as_ref().expect("just made")
    }

    fn slots(&mut self, cluster: u64) -> Vec<(Slot, Naming)> {
        self.names()
            .range((cluster, Slot::Header)..(cluster + 1, Slot::Header))
            .map(|(&(_, slot), &naming)| (slot, naming))
            .collect()
    }

    /// Returns the lowest and the highest refcount of a cluster that may be on disk while the slot
    /// names it.
    fn refcounts(&self, cluster: u64, slot: Slot) -> (u64, u64) {
        let mut found: Vec<u64> = Vec::new();
        for header in self.headers() {
            if !self.header_names(&header, slot, cluster) {
                continue;
            }
            let (index, entry) =
                (cluster / header.block_entries(), cluster % header.block_entries());
            if index >= header.refcount_table.1 * self.cluster_size() / 8 {
                found.push(0);
                continue;
            }
            let at = header.refcount_table.0 + index * 8;
            // A version of this sector that does not name this block yet cannot be on disk when the
            // block is named.
            let other = match slot {
                Slot::Block(index) => Some(header.refcount_table.0 + index * 8)
                    .filter(|other| other / SECTOR == at / SECTOR),
                _ => None,
            };
            for version in self.versions(at / SECTOR) {
                if let Some(other) = other
                    && version
                        .get((other % SECTOR) as usize..(other % SECTOR) as usize + 8)
                        .is_none_or(|raw| raw == [0; 8])
                {
                    continue;
                }
                let raw =
                    version.get((at % SECTOR) as usize..(at % SECTOR) as usize + 8).unwrap_or(&[]);
                let block = raw.iter().fold(0, |value, &byte| value << 8 | u64::from(byte));
                if block == 0 {
                    found.push(0);
                    continue;
                }
                let in_sector = (SECTOR * 8) >> header.refcount_order;
                let versions = self.versions(block / SECTOR + entry / in_sector);
                found
                    .extend(versions.map(|version| header.refcount_in(version, entry % in_sector)));
            }
        }
        (found.iter().min().copied().unwrap_or(0), found.iter().max().copied().unwrap_or(0))
    }

    /// Returns whether the slot can name the cluster at all while this is the header.
    fn header_names(&self, header: &Layout, slot: Slot, cluster: u64) -> bool {
        let among = |table: u64, bytes: u64| {
            (table..table + bytes).contains(&(cluster << self.cluster_bits))
        };
        match slot {
            Slot::Header | Slot::L2Table(_) | Slot::Guest(_) => true,
            Slot::RefcountTable => {
                among(header.refcount_table.0, header.refcount_table.1 << self.cluster_bits)
            }
            Slot::L1Table => among(header.l1.0, header.l1.1 * 8),
            Slot::Block(index) => {
                let mut named = index < header.refcount_table.1 * self.cluster_size() / 8;
                if named {
                    named = false;
                    self.each_entry(header.refcount_table.0 + index * 8, 1, |_, raw| {
                        named |= raw >> self.cluster_bits == cluster
                    });
                }
                named
            }
        }
    }

    /// Returns whether all of these pieces of the cluster were written as one of `kinds`, and a
    /// barrier has covered that.
    fn is_durable(&self, cluster: u64, pieces: u32, kinds: &[WriteKind]) -> bool {
        self.pieces_of(cluster, pieces).all(|piece| {
            self.covers.get(&piece).is_some_and(|cover| {
                cover.whole.iter().any(|&moment| moment <= self.durable_until)
                    && cover.kind.is_none_or(|kind| kinds.contains(&kind))
            })
        })
    }

    /// Checks the rules about the place of a write: R7 and R16.
    fn check_place(&mut self, kind: WriteKind, at: u64, len: u64) {
        for cluster in at >> self.cluster_bits..=(at + len.max(1) - 1) >> self.cluster_bits {
            for (slot, _) in self.slots(cluster) {
                let fits = match kind {
                    WriteKind::Header => slot == Slot::Header,
                    WriteKind::RefcountTable => slot == Slot::RefcountTable,
                    WriteKind::RefcountBlock => matches!(slot, Slot::Block(_)),
                    WriteKind::L1Table => slot == Slot::L1Table,
                    WriteKind::L2Table => matches!(slot, Slot::L2Table(_)),
                    WriteKind::NewCluster => false,
                    WriteKind::Data => matches!(slot, Slot::Guest(_)),
                };
                let is_data = matches!(kind, WriteKind::Data | WriteKind::NewCluster);
                let rule = if is_data == matches!(slot, Slot::Guest(_)) || !is_data {
                    "R7"
                } else {
                    "R16"
                };
                let rule = if cluster == 0 { "R16" } else { rule };
                assert!(
                    fits,
                    "{rule}: {kind:?} of {len} bytes at {at:#x}: cluster {cluster} may still be {slot:?} on disk"
                );
            }
            assert!(
                kind != WriteKind::Header || cluster == 0,
                "R16: header fields at {at:#x}, outside the first cluster"
            );
        }
    }

    /// Checks R11 and R12 before a header write.
    fn check_header_write(&self, at: u64, data: &[u8]) {
        let end = at + data.len() as u64;
        assert!(
            at >= SECTOR || end <= SECTOR,
            "R11: header bytes {at}..{end} are more than one sector"
        );
        let before = self.versions(0).next_back().unwrap_or(&[]);
        let mut after = before.to_vec();
        if at < SECTOR {
            after[at as usize..end as usize].copy_from_slice(data);
        }
        let name = |bytes: &[u8]| {
            let (at, len) = Layout::unchecked(bytes).backing;
            bytes.get(at as usize..(at + len) as usize).map(<[u8]>::to_vec)
        };
        let (old, new) = (Layout::unchecked(before), Layout::unchecked(&after));
        if old.backing != new.backing || name(before) != name(&after) {
            assert!(
                self.pending.is_empty(),
                "R12: the backing link changes while {} sectors, the first at {:#x}, wait for a barrier",
                self.pending.len(),
                self.pending.keys().min().map_or(0, |sector| sector * SECTOR)
            );
        }
        let (name_at, name_len) = old.backing;
        assert!(
            at < SECTOR || end <= name_at || at >= name_at + name_len,
            "R11: the name of the backing file that the header names is overwritten"
        );
    }

    /// Records a change. `kind` is `None` for a punch.
    fn apply(&mut self, kind: Option<WriteKind>, at: u64, data: &[u8]) {
        self.now += 1;
        let (now, end) = (self.now, at + data.len() as u64);
        for sector in at / SECTOR..end.div_ceil(SECTOR) {
            let start = sector * SECTOR;
            let mut bytes = self.versions(sector).next_back().unwrap_or(&[]).to_vec();
            bytes.resize(SECTOR as usize, 0);
            let (from, to) = (at.max(start), end.min(start + SECTOR));
            bytes[(from - start) as usize..(to - start) as usize]
                .copy_from_slice(&data[(from - at) as usize..(to - at) as usize]);
            self.pending.entry(sector).or_default().push(Version {
                moment: now,
                bytes,
                lost: false,
            });
        }
        // New data in a part of a cluster: what was in the other parts counts no more.
        if kind == Some(WriteKind::NewCluster) {
            for cluster in at >> self.cluster_bits..end.div_ceil(self.cluster_size()) {
                for piece in self.pieces_of(cluster, ALL) {
                    self.covers.remove(&piece);
                }
            }
        }
        let size = self.cluster_size() / self.pieces;
        for piece in at / size..end.div_ceil(size) {
            let Some(kind) = kind else {
                self.covers.remove(&piece);
                continue;
            };
            let cover = self.covers.entry(piece).or_default();
            let is_new = kind == WriteKind::NewCluster;
            let is_data = |kind| matches!(kind, WriteKind::NewCluster | WriteKind::Data);
            // The cluster is reused, for new data or for another kind of table.
            if is_new
                || cover
                    .kind
                    .is_some_and(|before| before != kind && !(is_data(before) && is_data(kind)))
            {
                *cover = Cover::default();
            }
            cover.kind = Some(if is_data(kind) { WriteKind::Data } else { kind });
            let start = piece * size;
            let sectors = at.max(start).div_ceil(SECTOR)..end.min(start + size) / SECTOR;
            cover.sectors.extend(sectors);
            if cover.sectors.len() as u64 == size / SECTOR {
                cover.sectors.clear();
                cover.whole.push(now);
            }
        }
    }

    /// Checks, after a write of metadata, all references that may be on disk now and could not be
    /// before.
    fn check_new_names(&mut self, kind: WriteKind, before: &Names) {
        let after = self.walk();
        for (&(cluster, slot), &naming) in &after {
            let old = before.get(&(cluster, slot)).copied().unwrap_or_default();
            if old == naming {
                continue;
            }
            let shows = naming.shows & !old.shows;
            if shows != 0 {
                let (rule, kinds): (_, &[WriteKind]) = match slot {
                    Slot::Guest(_) => ("R1", &[WriteKind::Data, WriteKind::NewCluster]),
                    Slot::L2Table(_) => ("R4", &[WriteKind::L2Table]),
                    Slot::L1Table => ("R4", &[WriteKind::L1Table]),
                    Slot::Block(_) => ("R5", &[WriteKind::RefcountBlock]),
                    Slot::RefcountTable => ("R6", &[WriteKind::RefcountTable]),
                    Slot::Header => ("R16", &[]),
                };
                assert!(
                    self.is_durable(cluster, shows, kinds),
                    "{rule}: {kind:?}: {slot:?} names cluster {cluster}, of which {shows:#b} is not durable whole"
                );
            }
            // Writes from before a piece became zero do not count when it becomes visible again.
            // The limit is the last barrier but one, because the piece may be filled again while
            // the pass that makes it zero on disk is running.
            let keep = self.barriers.iter().rev().nth(1).copied().unwrap_or(0);
            for piece in self.pieces_of(cluster, naming.reserved & !old.reserved & old.shows) {
                if let Some(cover) = self.covers.get_mut(&piece) {
                    cover.whole.retain(|&moment| moment > keep);
                }
            }
            let count =
                after.range((cluster, Slot::Header)..(cluster + 1, Slot::Header)).count() as u64;
            let (least, most) = self.refcounts(cluster, slot);
            assert!(
                count <= least,
                "R2: {kind:?}: {count} entries, one of them {slot:?}, name cluster {cluster}: its refcount may be {least}"
            );
            if matches!(slot, Slot::L2Table(_) | Slot::Guest(_)) {
                let (new_copied, new_shared) =
                    (naming.copied && !old.copied, naming.shared && !old.shared);
                assert!(
                    !new_copied || (least, most) == (1, 1),
                    "R9: {kind:?}: {slot:?} is COPIED: refcount of {cluster} is {least} to {most}"
                );
                assert!(
                    !new_shared || most > 1,
                    "R9: {kind:?}: {slot:?} is not COPIED: the refcount of cluster {cluster} is one"
                );
            }
        }
        self.names = Some(after);
    }

    /// Checks R3 and R9 after a write to a refcount block, for all clusters that the written part
    /// counts and that may be named.
    fn check_counts(&mut self, at: u64, len: u64) {
        let layout = self.headers().pop().expect("at least the durable one");
        let block = at >> self.cluster_bits;
        for (slot, _) in self.slots(block) {
            let Slot::Block(index) = slot else { continue };
            let start = at - (block << self.cluster_bits);
            let clusters = [start, start + len]
                .map(|byte| index * layout.block_entries() + ((byte * 8) >> layout.refcount_order));
            let named: Vec<_> = self
                .names()
                .range((clusters[0], Slot::Header)..(clusters[1], Slot::Header))
                .map(|(&at, &n)| (at, n))
                .collect();
            for &((cluster, slot), naming) in &named {
                let count = named.iter().filter(|((other, _), _)| *other == cluster).count() as u64;
                let (least, most) = self.refcounts(cluster, slot);
                assert!(
                    count <= least,
                    "R3: the refcount of cluster {cluster} becomes {least}, and {count} entries may still name it"
                );
                assert!(
                    !naming.copied || most == 1,
                    "R9: the refcount of cluster {cluster} becomes {most}, and a COPIED entry may name it"
                );
            }
        }
    }
}

impl Observer for OrderChecker {
    fn write(&mut self, kind: WriteKind, at: u64, data: &[u8]) {
        let is_data = matches!(kind, WriteKind::Data | WriteKind::NewCluster);
        if let Some((_, data_may)) = self.header {
            assert!(
                is_data && data_may,
                "R11: {kind:?} at {at:#x}, and no barrier since the header was written"
            );
        }
        if kind == WriteKind::Header {
            self.check_header_write(at, data);
        }
        self.check_place(kind, at, data.len() as u64);
        for header in self.headers() {
            let [_, _, autoclear] = header.features;
            assert!(
                kind == WriteKind::Header || autoclear == 0,
                "R11: {kind:?} at {at:#x} while autoclear bits may still be set"
            );
        }
        let features = self.headers().pop().map(|header| (header.features, header.backing));
        self.names();
        self.apply(Some(kind), at, data);
        if is_data {
            return;
        }
        let before = self.names.take().expect("just made");
        self.check_new_names(kind, &before);
        match kind {
            WriteKind::Header => {
                let same = features
                    == self.headers().pop().map(|header| (header.features, header.backing));
                self.header = Some((self.now, same));
            }
            WriteKind::RefcountBlock => self.check_counts(at, data.len() as u64),
            _ => {}
        }
    }

    fn punch(&mut self, at: u64, len: u64) {
        assert!(
            self.header.is_none(),
            "R11: a hole at {at:#x}, and no barrier since the header was written"
        );
        for cluster in at >> self.cluster_bits..(at + len).div_ceil(self.cluster_size()) {
            if let Some((slot, _)) = self.slots(cluster).first() {
                panic!("R8: a hole at {at:#x}: cluster {cluster} may still be {slot:?} on disk");
            }
        }
        self.apply(None, at, &vec![0; len as usize]);
    }

    fn sync_began(&mut self) -> u64 {
        self.barriers.push(self.now);
        self.barriers.len() as u64 - 1
    }

    fn sync_ended(&mut self, number: u64) {
        let until = self.barriers[number as usize];
        self.durable_until = self.durable_until.max(until);
        for (&sector, versions) in &mut self.pending {
            let newest =
                versions.iter().rposition(|version| version.moment <= until && !version.lost);
            if let Some(Version { bytes, .. }) =
                versions.drain(..newest.map_or(0, |newest| newest + 1)).next_back()
            {
                let start = (sector * SECTOR) as usize;
                let len = self.durable.len().max(start + SECTOR as usize);
                self.durable.resize(len, 0);
                self.durable[start..start + SECTOR as usize].copy_from_slice(&bytes);
            }
        }
        self.pending.retain(|_, versions| !versions.is_empty());
        if self.header.is_some_and(|(moment, _)| moment <= until) {
            self.header = None;
        }
        self.names = None;
    }

    fn sync_failed(&mut self, number: u64) {
        let until = self.barriers[number as usize];
        self.pending
            .values_mut()
            .flatten()
            .filter(|version| version.moment <= until)
            .for_each(|version| version.lost = true);
        let durable = self.durable_until;
        for cover in self.covers.values_mut() {
            cover.sectors.clear();
            cover.whole.retain(|&moment| moment <= durable || moment > until);
        }
    }

    fn dropped(&mut self, bytes: &[u8]) {
        // Dirty pages are not dropped, so while there are any the checker keeps its state.
        if self.pending.values().flatten().all(|version| version.lost) {
            *self = OrderChecker::new(bytes.to_vec());
        }
    }
}

#[cfg(test)]
mod tests;
