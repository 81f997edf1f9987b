//! The order of writes, latching and re-use, on a storage in memory that keeps a list of what was done to it.

use std::io;

use super::*;
use crate::format::{GuestCluster, NewImage};
use crate::range_lock::RangeLock;
use crate::storage::Holding;

#[derive(Clone, Debug, Eq, PartialEq)]
enum Op {
    Write { at: u64, len: usize },
    Punch { at: u64, len: u64 },
    Sync,
}

#[derive(Debug, Default)]
struct Memory {
    state: parking_lot::Mutex<MemoryState>,
}

#[derive(Debug, Default)]
struct MemoryState {
    bytes: Vec<u8>,
    ops: Vec<Op>,
    fail_writes: bool,
    /// So many writes go well, then they fail.
    writes_left: Option<usize>,
    fail_syncs: bool,
    /// The next barrier takes its time and fails; those that overlap it succeed, as on Linux.
    fail_one_sync: bool,
    power: Option<Power>,
}

/// What is needed to know how a file may look after a power cut.
#[derive(Debug)]
struct Power {
    durable: Vec<u8>,
    /// Since the last barrier, in order: any sectors of any of them may be lost.
    unsynced: Vec<(usize, Vec<u8>)>,
    /// The cut comes before so many more writes, punches and barriers.
    cut_in: usize,
    random: u64,
    after_cut: Option<Vec<u8>>,
}

fn next_random(x: &mut u64) -> u64 {
    *x ^= *x << 13;
    *x ^= *x >> 7;
    *x ^= *x << 17;
    *x >> 11
}

impl Power {
    fn tick(&mut self) {
        if self.cut_in == 0 && self.after_cut.is_none() {
            let mut bytes = self.durable.clone();
            // None, all, or some of them.
            let chance = [0, 4, 2, 1, 3][next_random(&mut self.random) as usize % 5];
            for (at, data) in &self.unsynced {
                for (sector, data) in data.chunks(512).enumerate() {
                    if next_random(&mut self.random) % 4 < chance {
                        let at = at + sector * 512;
                        bytes.resize(bytes.len().max(at + data.len()), 0);
                        bytes[at..at + data.len()].copy_from_slice(data);
                    }
                }
            }
            self.after_cut = Some(bytes);
        }
        self.cut_in = self.cut_in.saturating_sub(1);
    }
}

impl Memory {
    fn ops(&self) -> Vec<Op> {
        std::mem::take(&mut self.state.lock().ops)
    }

    /// What a reader would find if we were killed now.
    fn killed(&self) -> Arc<Memory> {
        let bytes = self.state.lock().bytes.clone();
        Arc::new(Memory { state: parking_lot::Mutex::new(MemoryState { bytes, ..MemoryState::default() }) })
    }
}

impl Storage for Memory {
    fn size(&self) -> u64 {
        self.state.lock().bytes.len() as u64
    }
    fn allocated_size(&self) -> io::Result<u64> {
        Ok(self.size())
    }
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        let state = self.state.lock();
        for (index, byte) in buf.iter_mut().enumerate() {
            *byte = state.bytes.get(offset as usize + index).copied().unwrap_or(0);
        }
        Ok(())
    }
    fn write_at(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        let mut state = self.state.lock();
        if state.fail_writes || state.writes_left == Some(0) {
            return Err(io::Error::from_raw_os_error(28));
        }
        state.writes_left = state.writes_left.map(|left| left - 1);
        if let Some(power) = &mut state.power {
            power.tick();
            power.unsynced.push((offset as usize, data.to_vec()));
        }
        let end = offset as usize + data.len();
        if state.bytes.len() < end {
            state.bytes.resize(end, 0);
        }
        state.bytes[offset as usize..end].copy_from_slice(data);
        state.ops.push(Op::Write { at: offset, len: data.len() });
        Ok(())
    }
    fn punch_hole(&self, offset: u64, len: u64) -> io::Result<()> {
        let mut state = self.state.lock();
        let end = ((offset + len) as usize).min(state.bytes.len());
        if let Some(power) = &mut state.power {
            power.tick();
            power.unsynced.push((offset as usize, vec![0; end.saturating_sub(offset as usize)]));
        }
        state.bytes[offset as usize..end].fill(0);
        state.ops.push(Op::Punch { at: offset, len });
        Ok(())
    }
    fn sync(&self) -> io::Result<()> {
        let mut state = self.state.lock();
        if std::mem::take(&mut state.fail_one_sync) {
            drop(state);
            std::thread::sleep(std::time::Duration::from_millis(200));
            return Err(io::Error::from_raw_os_error(5));
        }
        if state.fail_syncs {
            return Err(io::Error::from_raw_os_error(5));
        }
        state.ops.push(Op::Sync);
        if let Some(power) = &mut state.power {
            power.tick();
            for (at, data) in power.unsynced.drain(..) {
                power.durable.resize(power.durable.len().max(at + data.len()), 0);
                power.durable[at..at + data.len()].copy_from_slice(&data);
            }
        }
        Ok(())
    }
    fn holding(&self, _offset: u64, max: u64) -> io::Result<(Holding, u64)> {
        Ok((Holding::Data, max))
    }
}

const CLUSTER: u64 = 65536;

struct Bench {
    memory: Arc<Memory>,
    image: Image,
    lock: RangeLock,
}

/// An empty image of 1 GiB.
fn bench() -> Bench {
    let memory = Arc::new(Memory::default());
    let geometry = Geometry::new(3, 16, 4, 1 << 30).unwrap();
    for (at, bytes) in (NewImage { geometry, backing: None }).layout().unwrap() {
        memory.write_at(at, &bytes).unwrap();
    }
    reopen(memory)
}

fn reopen(memory: Arc<Memory>) -> Bench {
    let image = Image::open(memory.clone()).unwrap();
    image.begin_writing().unwrap();
    memory.ops();
    Bench { memory, image, lock: RangeLock::new(CLUSTER) }
}

impl Bench {
    fn store(&self, cluster: u64, byte: u8) -> Result<()> {
        let held = self.lock.exclusive(cluster * CLUSTER..(cluster + 1) * CLUSTER);
        let filled = self.image.fill(self.image.allocate(1)?, &[byte; CLUSTER as usize])?;
        self.image.publish(&held, GuestCluster(cluster), filled)
    }

    fn discard(&self, cluster: u64) {
        let held = self.lock.exclusive(cluster * CLUSTER..(cluster + 1) * CLUSTER);
        self.image.discard(&held, GuestCluster(cluster)..GuestCluster(cluster + 1)).unwrap();
    }

    fn host(&self, cluster: u64) -> Option<u64> {
        match self.image.map(GuestOffset(cluster * CLUSTER), 1).unwrap().mapping {
            Mapping::Data { host, in_place: true } => Some(host.0),
            _ => None,
        }
    }

    fn reads(&self, cluster: u64) -> u8 {
        let extent = self.image.map(GuestOffset(cluster * CLUSTER), CLUSTER).unwrap();
        let mut buf = vec![0xee; CLUSTER as usize];
        self.image.read_extent(GuestOffset(cluster * CLUSTER), &extent, &mut buf).unwrap();
        assert!(buf.iter().all(|byte| *byte == buf[0]));
        buf[0]
    }
}

/// R1, R2, R4: data and refcounts, barrier, L2 table, barrier, L1 entry, barrier.
#[test]
fn first_cluster_of_an_l2_table_is_written_in_order() {
    let bench = bench();
    bench.store(0, 7).unwrap();
    let data = bench.host(0).unwrap() * CLUSTER;
    assert_eq!(bench.memory.ops(), [Op::Write { at: data, len: CLUSTER as usize }], "nothing but the data before the flush");
    bench.image.flush().unwrap();
    let ops = bench.memory.ops();
    let l1 = bench.image.reader().header().l1_table_offset;
    let [Op::Write { .. }, Op::Sync, Op::Write { at: l2, len: 65536 }, Op::Sync, Op::Write { at, len: 8 }, Op::Sync] = ops[..] else {
        panic!("{ops:?}");
    };
    assert_eq!(at, l1);
    assert_ne!(l2, data);
    // The second cluster of the same table: two barriers, 4 KiB of table.
    bench.store(1, 8).unwrap();
    bench.memory.ops();
    bench.image.flush().unwrap();
    assert_eq!(bench.memory.ops()[2..], [Op::Write { at: l2, len: 4096 }, Op::Sync]);
    // Nothing new: one barrier.
    bench.image.flush().unwrap();
    assert_eq!(bench.memory.ops(), [Op::Sync]);
    bench.image.flush_if_dirty().unwrap();
    assert_eq!(bench.memory.ops(), []);
}

/// R10: an overwrite of a COPIED cluster costs no metadata.
#[test]
fn overwrite_in_place_costs_one_write() {
    let bench = bench();
    bench.store(3, 7).unwrap();
    bench.image.flush().unwrap();
    bench.memory.ops();
    let at = GuestOffset(3 * CLUSTER + 100);
    let extent = bench.image.map(at, 50).unwrap();
    bench.image.write_in_place(at, &extent, &[9; 50]).unwrap();
    assert_eq!(bench.memory.ops(), [Op::Write { at: bench.host(3).unwrap() * CLUSTER + 100, len: 50 }]);
    bench.image.flush().unwrap();
    assert_eq!(bench.memory.ops(), [Op::Sync]);
}

/// R3, R7, R8: a freed cluster is punched after the removal is durable, and not handed out before.
#[test]
fn freed_cluster_is_quarantined_until_the_removal_is_durable() {
    let bench = bench();
    bench.store(0, 7).unwrap();
    bench.image.flush().unwrap();
    let freed = bench.host(0).unwrap();
    bench.discard(0);
    bench.memory.ops();
    bench.store(1, 8).unwrap();
    assert_ne!(bench.host(1), Some(freed), "still referenced on disk");
    bench.memory.ops();
    bench.image.flush().unwrap();
    let ops = bench.memory.ops();
    let punch = ops.iter().position(|op| *op == Op::Punch { at: freed * CLUSTER, len: CLUSTER }).expect("space is given back");
    assert!(ops[..punch].iter().filter(|op| **op == Op::Sync).count() >= 2, "{ops:?}");
    bench.store(2, 9).unwrap();
    assert_eq!(bench.host(2), Some(freed), "and now it is used again");
    assert_eq!((bench.reads(0), bench.reads(1), bench.reads(2)), (0, 8, 9));
}

/// P7: after a failed barrier nothing is accepted, even when barriers work again.
#[test]
fn failed_barrier_is_sticky() {
    let bench = bench();
    bench.store(0, 7).unwrap();
    bench.memory.state.lock().fail_syncs = true;
    assert_eq!(bench.image.flush().unwrap_err().errno(), Some(5));
    bench.memory.state.lock().fail_syncs = false;
    assert!(bench.image.flush().is_err());
    assert!(bench.store(1, 8).is_err());
    assert_eq!(bench.reads(0), 7, "reads go on");
}

/// P7, H21: an error that the kernel reports to a change of the header is not missed by the flush next to it.
#[test]
fn failed_barrier_is_seen_by_the_one_next_to_it() {
    let bench = bench();
    bench.store(0, 7).unwrap();
    bench.memory.state.lock().fail_one_sync = true;
    std::thread::scope(|scope| {
        let header = scope.spawn(|| bench.image.set_backing(None));
        while bench.memory.state.lock().fail_one_sync {
            std::thread::yield_now();
        }
        assert!(bench.image.flush().is_err(), "what was written may be lost");
        assert!(header.join().unwrap().is_err());
    });
}

/// P5, R14: a write-back that fails for want of space loses nothing; the next one does it all.
#[test]
fn failed_write_back_is_done_by_the_next() {
    let bench = bench();
    bench.store(0, 7).unwrap();
    bench.image.flush().unwrap();
    bench.discard(0);
    bench.store(9000, 8).unwrap();
    bench.memory.state.lock().fail_writes = true;
    assert_eq!(bench.image.flush().unwrap_err().kind(), ErrorKind::NoSpace);
    assert!(bench.store(1, 9).is_err());
    bench.memory.state.lock().fail_writes = false;
    bench.image.close().unwrap();
    let again = reopen(bench.memory.clone());
    assert_eq!((again.reads(0), again.reads(9000), again.host(1)), (0, 8, None));
}

/// H13: what was allocated and not published is free again at once.
#[test]
fn dropped_allocation_gives_itself_back() {
    let bench = bench();
    let first = bench.image.allocate(4).unwrap();
    assert_eq!(first.clusters(), 4);
    drop(first);
    bench.store(0, 7).unwrap();
    let host = bench.host(0).unwrap();
    bench.image.close().unwrap();
    let end = bench.memory.size().div_ceil(CLUSTER);
    assert!(host < end && end <= host + 2, "four clusters were not left behind: {host} {end}");
}

/// Specification, autoclear_features: bits that we do not know are cleared before anything else is written.
#[test]
fn unknown_autoclear_bits_are_cleared_first() {
    let bench = bench();
    bench.memory.write_at(88, &(1u64 << 40).to_be_bytes()).unwrap();
    let image = Image::open(bench.memory.clone()).unwrap();
    bench.memory.ops();
    image.begin_writing().unwrap();
    assert_eq!(bench.memory.ops(), [Op::Write { at: 88, len: 8 }, Op::Sync]);
    assert_eq!(Image::open(bench.memory.clone()).unwrap().reader().header().autoclear, 0);
}

/// P11: corruption that is met while writing sets the corrupt bit and ends writing; the image can still be read.
#[test]
fn corruption_latches_and_marks_the_image() {
    let bench = bench();
    bench.store(0, 7).unwrap();
    bench.store(9000, 8).unwrap();
    bench.image.close().unwrap();
    let l1 = bench.image.reader().header().l1_table_offset;
    let mut entry = [0; 8];
    bench.memory.read_at(l1, &mut entry).unwrap();
    let l2 = u64::from_be_bytes(entry) & !(1 << 63);
    // The second entry names the header.
    bench.memory.write_at(l2 + 8, &(1u64 << 63 | 0x1000_0000_0000).to_be_bytes()).unwrap();
    let again = reopen(bench.memory.clone());
    assert_eq!(again.reads(9000), 8);
    assert_eq!(again.image.map(GuestOffset(0), 1).unwrap_err().kind(), ErrorKind::Corrupt);
    assert!(again.store(9001, 1).is_err());
    assert_eq!(again.reads(9000), 8);
    let error = Image::open(bench.memory.clone()).unwrap_err();
    assert!(error.to_string().contains("corrupt"), "{error}");
    assert!(ImageReader::open(bench.memory.clone()).is_ok(), "still readable");
}

/// Tables beyond the memory limit are dropped when clean and come back with what was written to them.
#[test]
fn evicted_tables_come_back() {
    let bench = bench();
    let mut image = Image::open(bench.memory.clone()).unwrap();
    image.reader.tables.limit_memory(2 * CLUSTER as usize);
    let bench = Bench { image, ..bench };
    // 1 GiB has two L2 tables only, so grow it to forty.
    let drained = bench.lock.exclusive(0..u64::MAX);
    bench.image.make_room(&drained, 20 << 30).unwrap();
    bench.image.set_size(&drained, 20 << 30).unwrap();
    drop(drained);
    for round in 0..3u8 {
        for table in 0..40u64 {
            bench.store(table * 8192 + u64::from(round), round * 40 + table as u8).unwrap();
            if table % 7 == 0 {
                bench.image.flush().unwrap();
            }
        }
    }
    bench.image.flush().unwrap();
    for round in 0..3u8 {
        for table in 0..40u64 {
            assert_eq!(bench.reads(table * 8192 + u64::from(round)), round * 40 + table as u8);
        }
    }
    assert!(bench.image.reader.tables.resident() <= 3, "{} tables in memory", bench.image.reader.tables.resident());
}

/// An empty image in which everything is small: 512-byte clusters, 64 refcounts a block, 64 blocks a table, 64 entries an L2 table.
fn small() -> Bench {
    let memory = Arc::new(Memory::default());
    let geometry = Geometry::new(3, 9, 4, 16 << 20).unwrap();
    for (at, bytes) in (NewImage { geometry, backing: None }).layout().unwrap() {
        memory.write_at(at, &bytes).unwrap();
    }
    // New images have 16-bit refcounts and a table that is large enough for all; make them 64 bits wide, and the table one cluster.
    let word = |at: u64| {
        let mut bytes = [0; 8];
        memory.read_at(at, &mut bytes).unwrap();
        u64::from_be_bytes(bytes)
    };
    let block = word(word(48));
    let used = memory.size().div_ceil(512);
    assert!(used < 64);
    memory.write_at(56, &1u32.to_be_bytes()).unwrap();
    memory.write_at(96, &6u32.to_be_bytes()).unwrap();
    memory.write_at(block, &(0..64).flat_map(|cluster| u64::from(cluster < used).to_be_bytes()).collect::<Vec<u8>>()).unwrap();
    reopen(memory)
}

impl Bench {
    /// Clusters of 512 bytes; cluster n holds the bytes of [`small_data`].
    fn store_small(&self, clusters: std::ops::Range<u64>) -> Result<()> {
        let held = self.lock.exclusive(clusters.start * 512..clusters.end * 512);
        let mut at = clusters.start;
        while at < clusters.end {
            let allocation = self.image.allocate(clusters.end - at)?;
            let count = allocation.clusters();
            let data: Vec<u8> = (at..at + count).flat_map(small_data).collect();
            self.image.publish(&held, GuestCluster(at), self.image.fill(allocation, &data)?)?;
            at += count;
        }
        Ok(())
    }

    /// Looks at some of every L2 table.
    fn has_small(&self, clusters: std::ops::Range<u64>) {
        for cluster in clusters.step_by(31) {
            let extent = self.image.map(GuestOffset(cluster * 512), 512).unwrap();
            let mut buf = [0; 512];
            self.image.read_extent(GuestOffset(cluster * 512), &extent, &mut buf).unwrap();
            assert!(buf == small_data(cluster), "cluster {cluster}");
        }
    }
}

fn small_data(cluster: u64) -> [u8; 512] {
    [(cluster % 255) as u8 + 1; 512]
}

/// P1, R3: a change that has returned is found by the next pass, even where another one is only just putting the table on the list. (It once
/// found the mark of the other one and relied on it; a flush then returned without the change, and freed what the entry on disk still named.)
#[test]
fn a_change_returns_only_when_its_table_is_on_the_list() {
    let bench = bench();
    bench.store(0, 7).unwrap();
    bench.image.flush().unwrap();
    let list = bench.image.reader.tables.dirty_list();
    let (returned, wait) = std::sync::mpsc::channel();
    std::thread::scope(|scope| {
        for cluster in [1, 2] {
            let (bench, returned) = (&bench, returned.clone());
            scope.spawn(move || {
                bench.store(cluster, 8).unwrap();
                returned.send(()).unwrap();
            });
        }
        if wait.recv_timeout(std::time::Duration::from_millis(300)).is_ok() {
            assert!(!list.is_empty(), "a change returned, and no pass would write it");
        }
        drop(list);
    });
    bench.image.flush().unwrap();
    assert_eq!(reopen(bench.memory.killed()).reads(2), 8);
}

/// R6: the table that a header names is not given away because the pass that wrote that header failed later on.
#[test]
fn refcount_table_that_moves_again_after_a_failed_pass() {
    for writes in 0.. {
        let bench = small();
        bench.store_small(0..3900).unwrap();
        bench.image.close().unwrap();
        let first = bench.image.reader().header().refcount_table_offset;
        bench.store_small(3900..4100).unwrap();
        bench.memory.state.lock().writes_left = Some(writes);
        let failed = bench.image.flush().is_err();
        bench.memory.state.lock().writes_left = None;
        // Moves once more, and what is free is used.
        bench.store_small(4100..8200).unwrap();
        reopen(bench.memory.killed()).has_small(0..3900);
        bench.image.flush().unwrap();
        reopen(bench.memory.killed()).has_small(0..8200);
        bench.image.close().unwrap();
        assert_ne!(bench.image.reader().header().refcount_table_offset, first);
        reopen(bench.memory.killed()).has_small(0..8200);
        if !failed {
            assert!(writes > 5);
            break;
        }
    }
}

/// R6: the blocks that a moved table names are durable before the table is written: after a failed pass it may be the live one.
#[test]
fn moved_refcount_table_is_written_behind_its_blocks() {
    let bench = small();
    bench.store_small(0..4100).unwrap();
    bench.memory.ops();
    bench.image.flush().unwrap();
    let ops = bench.memory.ops();
    let table = bench.image.reader().header().refcount_table_offset;
    let at = ops.iter().position(|op| matches!(op, Op::Write { at, .. } if *at == table)).expect("the table moved");
    assert_eq!(ops[at - 1], Op::Sync);
    assert_eq!(ops[at + 1..at + 4], [Op::Sync, Op::Write { at: 48, len: 12 }, Op::Sync]);
}

/// 2.5: clusters that a crash left counted behind the end of the file are leaks, not corruption, whatever is to be put there.
#[test]
fn leaks_behind_the_end_of_the_file_are_left_alone() {
    let bench = small();
    bench.store_small(0..40).unwrap();
    bench.image.flush().unwrap();
    let allocation = bench.image.allocate(8).unwrap();
    bench.image.flush().unwrap();
    let again = reopen(bench.memory.killed());
    drop(allocation);
    let drained = again.lock.exclusive(0..u64::MAX);
    again.image.make_room(&drained, 64 << 20).unwrap();
    again.image.set_size(&drained, 64 << 20).unwrap();
    drop(drained);
    again.store_small(40..9000).unwrap();
    again.image.close().unwrap();
    reopen(again.memory.killed()).has_small(0..9000);
}

/// V29: a file that is mostly hole is not searched to its end, and the space behind what was ever counted is used (as on a block device).
#[test]
fn space_behind_the_last_refcount_block_is_used() {
    let bench = small();
    bench.store_small(0..40).unwrap();
    bench.image.close().unwrap();
    let len = 2 << 20;
    bench.memory.state.lock().bytes.resize(len, 0xee);
    let again = reopen(bench.memory.killed());
    again.store_small(40..2000).unwrap();
    again.image.close().unwrap();
    assert_eq!(again.memory.size(), len as u64);
    reopen(again.memory.killed()).has_small(0..2000);
}

/// What each cluster may read as after a power cut: its value at the last flush, or any later one (P4).
struct Allowed(Vec<Vec<u8>>);

impl Allowed {
    /// Opens what the cut left and looks at all of it (2.5). One cluster is one sector, so none is torn.
    fn check(&self, bytes: Vec<u8>, what: &str) {
        let memory = Arc::new(Memory { state: parking_lot::Mutex::new(MemoryState { bytes, ..MemoryState::default() }) });
        let image = Image::open(memory.clone()).unwrap_or_else(|error| panic!("{what}: {error}"));
        let mut seen = std::collections::HashSet::new();
        for (cluster, allowed) in self.0.iter().enumerate() {
            let at = GuestOffset(cluster as u64 * 512);
            // Every host cluster that is named was checked to be counted and no metadata when its table was loaded.
            let extent = image.map(at, 512).unwrap_or_else(|error| panic!("{what}: {error}"));
            if let Mapping::Data { host, .. } | Mapping::Zero { reserved: Some((host, _)) } = extent.mapping {
                assert!(seen.insert(host), "{what}: {host:?} is named twice");
            }
            let mut buf = [0; 512];
            image.read_extent(at, &extent, &mut buf).unwrap();
            assert!(buf == [buf[0]; 512] && allowed.contains(&buf[0]), "{what}: cluster {cluster} reads {}, allowed {allowed:?}", buf[0]);
        }
        let header = image.reader().header();
        let mut tables = vec![0; header.l1_size as usize * 8 + header.refcount_table_clusters as usize * 512];
        let (l1, refcounts) = tables.split_at_mut(header.l1_size as usize * 8);
        memory.read_at(header.l1_table_offset, l1).unwrap();
        memory.read_at(header.refcount_table_offset, refcounts).unwrap();
        let named = tables.chunks_exact(8).map(|entry| u64::from_be_bytes(entry.try_into().unwrap()) & !(1 << 63)).filter(|at| *at != 0);
        let own = [header.l1_table_offset, header.refcount_table_offset, 0];
        for at in named.chain(own) {
            assert_ne!(
                image.allocator.refcount(crate::format::HostCluster(at / 512)).unwrap(),
                0,
                "{what}: metadata at {at:#x} is not counted"
            );
        }
    }
}

/// P4: stores, overwrites, discards, zeroes and flushes, with writes that fail now and then, and a power cut at any write.
#[test]
fn power_cuts_leave_leaks_at_worst() {
    let seed = std::env::var("CORDISK_SEED").ok().and_then(|seed| seed.parse().ok()).unwrap_or(1u64);
    let runs: u64 = std::env::var("CORDISK_CUTS").ok().and_then(|runs| runs.parse().ok()).unwrap_or(30);
    let bench = small();
    // Close to where the refcount table has to move.
    bench.store_small(0..3900).unwrap();
    bench.image.close().unwrap();
    let start = bench.memory.state.lock().bytes.clone();
    for run in seed..seed + runs {
        let what = format!("CORDISK_SEED={run} CORDISK_CUTS=1");
        let mut random = run.wrapping_mul(0x9e37_79b9_7f4a_7c15);
        next_random(&mut random);
        let mut state = MemoryState { bytes: start.clone(), ..MemoryState::default() };
        let cut_in = next_random(&mut random) as usize % 200;
        state.power = Some(Power { durable: start.clone(), unsynced: Vec::new(), cut_in, random, after_cut: None });
        let bench = reopen(Arc::new(Memory { state: parking_lot::Mutex::new(state) }));
        let mut allowed = Allowed((0..9000).map(|cluster| vec![if cluster < 3900 { small_data(cluster)[0] } else { 0 }]).collect());
        loop {
            let first = next_random(&mut random) % 8990;
            let clusters = first..(first + 1 + next_random(&mut random) % 200).min(9000);
            let fails = next_random(&mut random).is_multiple_of(4);
            if fails {
                bench.memory.state.lock().writes_left = Some(next_random(&mut random) as usize % 12);
            }
            let held = bench.lock.exclusive(clusters.start * 512..clusters.end * 512);
            let guests = GuestCluster(clusters.start)..GuestCluster(clusters.end);
            let mut allow = |byte: u8| clusters.clone().for_each(|cluster| allowed.0[cluster as usize].push(byte));
            let mut flushed = false;
            match next_random(&mut random) % 8 {
                0..=2 => {
                    let byte = next_random(&mut random) as u8;
                    allow(byte);
                    let store = || -> Result<()> {
                        let mut at = clusters.start;
                        while at < clusters.end {
                            let allocation = bench.image.allocate(clusters.end - at)?;
                            let count = allocation.clusters();
                            let filled = bench.image.fill(allocation, &vec![byte; count as usize * 512])?;
                            bench.image.publish(&held, GuestCluster(at), filled)?;
                            at += count;
                        }
                        Ok(())
                    };
                    let _ = store();
                }
                3 => {
                    let byte = next_random(&mut random) as u8;
                    allow(byte);
                    for cluster in clusters.clone() {
                        let at = GuestOffset(cluster * 512);
                        let extent = bench.image.map(at, 512).unwrap();
                        match extent.mapping {
                            Mapping::Data { in_place: true, .. } => drop(bench.image.write_in_place(at, &extent, &[byte; 512])),
                            Mapping::Zero { reserved: Some((host, true)) } if bench.image.fill_reserved(host, &[byte; 512]).is_ok() => {
                                let _ = bench.image.publish_reserved(&held, GuestCluster(cluster)..GuestCluster(cluster + 1));
                            }
                            _ => {}
                        }
                    }
                }
                4 => {
                    allow(0);
                    let _ = bench.image.discard(&held, guests);
                }
                5 => {
                    allow(0);
                    let _ = bench.image.zero(&held, guests);
                }
                _ => flushed = bench.image.flush().is_ok(),
            }
            drop(held);
            bench.memory.state.lock().writes_left = None;
            let after_cut = bench.memory.state.lock().power.as_mut().unwrap().after_cut.take();
            if let Some(bytes) = after_cut {
                allowed.check(bytes, &what);
                break;
            }
            if flushed {
                for (cluster, allowed) in allowed.0.iter_mut().enumerate() {
                    let at = GuestOffset(cluster as u64 * 512);
                    let extent = bench.image.map(at, 512).unwrap();
                    let mut buf = [0; 512];
                    bench.image.read_extent(at, &extent, &mut buf).unwrap();
                    assert!(allowed.contains(&buf[0]), "{what}: cluster {cluster}");
                    *allowed = vec![buf[0]];
                }
            }
        }
    }
}
