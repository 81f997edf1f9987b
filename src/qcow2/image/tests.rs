//! Tests of write order, latching and reuse of clusters, on a storage in memory that records each
//! operation.

use std::io;

use super::*;
use crate::format::{GuestSubcluster, NewImage};
use crate::range_lock::RangeLock;
use host::storage::{BlockStatus, OpenMark};
use sim::start::Start;
use sim::{Action, Fault, HostFailure, Operation, Repeat, SimStorage};

mod bad_entries;
mod compressed_run;
mod judge;
mod late_search;
mod leaks;
mod refcount_growth;
mod take_over;
mod two_words;

#[derive(Clone, Debug, Eq, PartialEq)]
enum Op {
    Write {
        at: u64,
        len: usize,
    },
    Punch {
        at: u64,
        len: u64,
    },
    Sync,
    /// The mark of an open image is set, durably.
    Mark,
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
    /// Number of writes that succeed before all further ones fail.
    writes_left: Option<usize>,
    fail_syncs: bool,
    /// Barriers panic.
    panic_in_syncs: bool,
    /// The next barrier takes 200 ms and fails; barriers that overlap it succeed, as on Linux.
    fail_one_sync: bool,
    open: bool,
}

impl Memory {
    fn ops(&self) -> Vec<Op> {
        std::mem::take(&mut self.state.lock().ops)
    }

    /// Returns what a reader would find if the process were killed now.
    fn killed(&self) -> Arc<Memory> {
        let state = self.state.lock();
        let (bytes, open) = (state.bytes.clone(), state.open);
        Arc::new(Memory {
            state: parking_lot::Mutex::new(MemoryState { bytes, open, ..MemoryState::default() }),
        })
    }
}

impl ReadAt for Memory {
    fn size(&self) -> u64 {
        self.state.lock().bytes.len() as u64
    }

    fn allocated_size(&self) -> io::Result<u64> {
        Ok(self.size())
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        let state = self.state.lock();
        buf.fill(0);
        let there = state.bytes.get(offset as usize..).unwrap_or_default();
        let len = there.len().min(buf.len());
        buf[..len].copy_from_slice(&there[..len]);
        Ok(())
    }

    fn status(&self, _offset: u64, max: u64) -> io::Result<(BlockStatus, u64)> {
        Ok((BlockStatus::Data, max))
    }
}

impl Storage for Memory {
    fn write_at(&self, _kind: WriteKind, offset: u64, data: &[u8]) -> io::Result<()> {
        let mut state = self.state.lock();
        if state.fail_writes || state.writes_left == Some(0) {
            return Err(io::Error::from_raw_os_error(28));
        }
        state.writes_left = state.writes_left.map(|left| left - 1);
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
        state.bytes[(offset as usize).min(end)..end].fill(0);
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
        assert!(!state.panic_in_syncs, "as a test asked");
        if state.fail_syncs {
            return Err(io::Error::from_raw_os_error(5));
        }
        state.ops.push(Op::Sync);
        Ok(())
    }
}

impl Sidecar for Memory {
    fn open_mark(&self) -> io::Result<OpenMark> {
        Ok(if self.state.lock().open { OpenMark::Present } else { OpenMark::Absent })
    }

    fn set_open_mark(&self) -> io::Result<()> {
        let mut state = self.state.lock();
        state.open = true;
        state.ops.push(Op::Mark);
        Ok(())
    }

    fn remove_open_mark(&self) -> io::Result<()> {
        self.state.lock().open = false;
        Ok(())
    }
}

const CLUSTER: u64 = 65536;

struct Bench {
    memory: Arc<Memory>,
    image: Image,
    lock: RangeLock,
}

/// Makes an empty image of 1 GiB.
fn bench() -> Bench {
    let memory = Arc::new(Memory::default());
    let geometry = Geometry::new(3, 16, 4, 1 << 30).unwrap();
    for (at, bytes) in (NewImage { geometry, backing: None }).layout().unwrap() {
        memory.write_at(WriteKind::Header, at, &bytes).unwrap();
    }
    reopen(memory)
}

/// Opens an image for writing as a disk does.
fn reopen(memory: Arc<Memory>) -> Bench {
    let image = Image::open(memory.clone()).unwrap();
    let leaks = image.may_leak().then(|| image.find_leaks().unwrap());
    image.begin_writing().unwrap();
    if let Some(leaks) = leaks {
        image.give_back(&leaks).unwrap();
    }
    memory.ops();
    Bench { memory, image, lock: RangeLock::new(CLUSTER) }
}

impl Bench {
    fn store(&self, cluster: u64, byte: u8) -> Result<()> {
        let held = self.lock.exclusive(cluster * CLUSTER..(cluster + 1) * CLUSTER);
        let filled = self.image.fill(self.image.allocate(1)?, 0, &[byte; CLUSTER as usize])?;
        self.image.publish(&held, GuestSubcluster(cluster), filled)
    }

    fn discard(&self, cluster: u64) {
        let held = self.lock.exclusive(cluster * CLUSTER..(cluster + 1) * CLUSTER);
        self.image.discard(&held, GuestSubcluster(cluster)..GuestSubcluster(cluster + 1)).unwrap();
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

/// Protects: R1, R2, R4. The order is data and refcounts, barrier, L2 table, barrier, L1 entry,
/// barrier.
#[test]
fn first_cluster_of_an_l2_table_is_written_in_order() {
    let bench = bench();
    bench.store(0, 7).unwrap();
    let data = bench.host(0).unwrap() * CLUSTER;
    assert_eq!(
        bench.memory.ops(),
        [Op::Write { at: data, len: CLUSTER as usize }],
        "nothing but the data before the flush"
    );
    bench.image.flush().unwrap();
    let ops = bench.memory.ops();
    let l1 = bench.image.reader().header().l1_table_offset;
    let [
        Op::Write { .. },
        Op::Sync,
        Op::Write { at: l2, len: 65536 },
        Op::Sync,
        Op::Write { at, len: 8 },
        Op::Sync,
    ] = ops[..]
    else {
        panic!("{ops:?}");
    };
    assert_eq!(at, l1);
    assert_ne!(l2, data);
    // The second cluster of the same table costs two barriers and 4 KiB of table. Its refcount was
    // raised together with that of the first.
    bench.store(1, 8).unwrap();
    bench.memory.ops();
    bench.image.flush().unwrap();
    assert_eq!(bench.memory.ops(), [Op::Sync, Op::Write { at: l2, len: 4096 }, Op::Sync]);
    // Without a change a flush is one barrier.
    bench.image.flush().unwrap();
    assert_eq!(bench.memory.ops(), [Op::Sync]);
    bench.image.flush_if_dirty().unwrap();
    assert_eq!(bench.memory.ops(), []);
}

/// Protects: allocation costs one write of refcounts per 64 MiB, and no barrier before a flush. An
/// orderly close gives the reservation back.
#[test]
fn refcounts_are_raised_ahead() {
    let bench = bench();
    for cluster in 0..1500 {
        bench.store(cluster, 7).unwrap();
    }
    let ops = bench.memory.ops();
    assert!(
        ops.iter().all(|op| matches!(op, Op::Write { len: 65536, .. })) && ops.len() == 1500,
        "data, and nothing but data"
    );
    bench.image.flush().unwrap();
    bench.memory.ops();
    // Cluster 1500 and the L2 table are in the second run of 1024 reserved clusters.
    for cluster in 1500..2000 {
        bench.store(cluster, 8).unwrap();
        bench.image.flush().unwrap();
    }
    let counted = bench.host(1999).unwrap();
    let refcounts = |ops: &[Op]| {
        ops.iter().filter(|op| matches!(op, Op::Write { at, .. } if *at / CLUSTER == 2)).count()
    };
    assert_eq!(refcounts(&bench.memory.ops()), 0, "no refcount block was written");
    let killed = Image::open(bench.memory.killed()).unwrap();
    assert!(
        killed.allocator.refcount(crate::format::HostCluster(counted + 20)).unwrap() == 1,
        "a kill leaves the reservation"
    );
    bench.image.close().unwrap();
    let report = super::check::check(&*bench.memory).unwrap();
    assert_eq!((report.corruptions, report.leaks), (0, 0));
}

/// Protects: R10. An overwrite of a COPIED cluster writes no metadata.
#[test]
fn overwrite_in_place_costs_one_write() {
    let bench = bench();
    bench.store(3, 7).unwrap();
    bench.image.flush().unwrap();
    bench.memory.ops();
    let at = GuestOffset(3 * CLUSTER + 100);
    let extent = bench.image.map(at, 50).unwrap();
    bench.image.write_in_place(at, &extent, &[9; 50]).unwrap();
    assert_eq!(
        bench.memory.ops(),
        [Op::Write { at: bench.host(3).unwrap() * CLUSTER + 100, len: 50 }]
    );
    bench.image.flush().unwrap();
    assert_eq!(bench.memory.ops(), [Op::Sync]);
}

/// Protects: R3, R7, R8. A freed cluster is punched after its removal is durable, and is not handed
/// out before.
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
    let punch = ops
        .iter()
        .position(|op| *op == Op::Punch { at: freed * CLUSTER, len: CLUSTER })
        .expect("space is given back");
    assert!(ops[..punch].iter().filter(|op| **op == Op::Sync).count() >= 2, "{ops:?}");
    bench.store(2, 9).unwrap();
    assert_eq!(bench.host(2), Some(freed), "and now it is used again");
    assert_eq!((bench.reads(0), bench.reads(1), bench.reads(2)), (0, 8, 9));
}

/// Protects: P7. After a failed barrier no change is accepted, even when barriers work again.
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
    bench.image.end_writing();
    assert_eq!(
        bench.memory.open_mark().unwrap(),
        OpenMark::Present,
        "the next open must not trust the host's cache"
    );
}

/// Protects: a flush that comes after a pass that panicked fails and does not wait for ever, and so
/// does every later change: which tables the pass has written is not known.
#[test]
fn pass_that_panics_fails_what_comes_after_it() {
    let bench = bench();
    bench.store(0, 7).unwrap();
    bench.memory.state.lock().panic_in_syncs = true;
    let flush = std::panic::AssertUnwindSafe(|| bench.image.flush());
    std::panic::catch_unwind(flush).unwrap_err();
    bench.memory.state.lock().panic_in_syncs = false;
    assert_eq!(bench.image.flush().unwrap_err().errno(), Some(5));
    assert!(!bench.image.is_usable() && bench.store(1, 8).is_err());
    assert_eq!(bench.reads(0), 7, "reads go on");
}

/// Protects: P7, H21. If the kernel reports a write-back error to a change of the header, a
/// concurrent flush fails too.
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

/// Protects: P5, R14. A write-back pass that fails for lack of space loses nothing; the next one
/// writes everything.
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

/// Protects: R11. A header write that returns an error may be on disk. The old header is restored
/// before the next change of the header, so that a reader of the file sees only the new change.
#[test]
fn a_header_write_that_failed_is_undone_before_the_next_one() {
    let start = Start { autoclear: 1 << 40, ..Start::new("header", 3, 9, 4, 32 << 10) };
    let file = SimStorage::new(start.bytes());
    let image = Image::open(file.clone()).unwrap();
    let header = |file: &SimStorage| Header::parse(&file.bytes(), file.size()).unwrap();
    let before = header(&file);
    // All of the write reaches the storage, and then it returns an error.
    file.inject(Fault {
        matches: Box::new(|operation| operation.action == Action::Write(WriteKind::Header)),
        after: 0,
        failure: HostFailure::ShortBy(0, 5),
        times: Repeat::Once,
    });
    let lock = RangeLock::new(512);
    let all = lock.exclusive(0..u64::MAX);
    image.make_room(&all, 4 << 20).unwrap_err();
    let failed = header(&file);
    assert_ne!(failed.l1_table_offset, before.l1_table_offset, "the write was done");
    // This writes eight bytes of the header; the rest must be what memory holds.
    image.begin_writing().unwrap();
    let after = header(&file);
    assert_eq!((after.l1_table_offset, after.l1_size), (before.l1_table_offset, before.l1_size));
    assert_eq!((before.autoclear, after.autoclear), (1 << 40, 0), "and this change is there");
    image.close().unwrap();
}

/// Protects: H13. Clusters that were allocated and not published are free again at once.
#[test]
fn dropped_allocation_gives_itself_back() {
    let bench = bench();
    let first = bench.image.allocate(4).unwrap();
    assert_eq!(first.clusters(), 4);
    drop(first);
    for cluster in 0..4 {
        bench.store(cluster, 7).unwrap();
    }
    let hosts: Vec<u64> = (0..4).map(|cluster| bench.host(cluster).unwrap()).collect();
    assert_eq!(hosts, (hosts[0]..hosts[0] + 4).collect::<Vec<_>>());
    bench.image.close().unwrap();
    let end = bench.memory.size().div_ceil(CLUSTER);
    assert!(end <= hosts[3] + 2, "four clusters were not left behind: {hosts:?} {end}");
}

/// Protects: autoclear bits are cleared before anything else is written (specification:
/// "autoclear_features").
#[test]
fn unknown_autoclear_bits_are_cleared_first() {
    let bench = bench();
    bench.memory.write_at(WriteKind::Header, 88, &(1u64 << 40).to_be_bytes()).unwrap();
    let image = Image::open(bench.memory.clone()).unwrap();
    bench.memory.ops();
    image.begin_writing().unwrap();
    assert_eq!(bench.memory.ops(), [Op::Mark, Op::Write { at: 88, len: 8 }, Op::Sync]);
    assert_eq!(Image::open(bench.memory.clone()).unwrap().reader().header().autoclear, 0);
}

/// Protects: P11. Corruption that is met while an image is open for writing sets the corrupt bit
/// and stops writing. The image can still be read.
#[test]
fn corruption_latches_and_marks_the_image() {
    let bench = bench();
    bench.store(0, 7).unwrap();
    bench.store(9000, 8).unwrap();
    bench.image.close().unwrap();
    bench.image.end_writing();
    let l1 = bench.image.reader().header().l1_table_offset;
    let mut entry = [0; 8];
    bench.memory.read_at(l1, &mut entry).unwrap();
    let l2 = u64::from_be_bytes(entry) & !(1 << 63);
    // The second entry names a cluster outside the file.
    bench
        .memory
        .write_at(WriteKind::Header, l2 + 8, &(1u64 << 63 | 0x1000_0000_0000).to_be_bytes())
        .unwrap();
    let again = reopen(bench.memory.clone());
    assert_eq!(again.reads(9000), 8);
    assert!(again.image.is_usable());
    assert_eq!(again.image.map(GuestOffset(CLUSTER), 1).unwrap_err().kind(), ErrorKind::Corrupt);
    assert!(again.store(9001, 1).is_err());
    assert_eq!((again.reads(0), again.reads(9000)), (7, 8));
    let error = Image::open(bench.memory.clone()).unwrap_err();
    assert!(error.to_string().contains("corrupt"), "{error}");
    assert!(ImageReader::open(bench.memory.clone()).is_ok(), "still readable");
}

/// Protects: V24, R16. An entry that names metadata is refused, whatever the refcount of the
/// metadata is.
#[test]
fn guest_data_is_never_where_metadata_lies() {
    let bench = bench();
    bench.store(0, 7).unwrap();
    bench.image.close().unwrap();
    let word = |at: u64| {
        let mut word = [0; 8];
        bench.memory.read_at(at, &mut word).unwrap();
        u64::from_be_bytes(word) & !(1 << 63)
    };
    let header = bench.image.reader().header();
    let l2 = word(header.l1_table_offset);
    for metadata in [
        header.l1_table_offset,
        header.refcount_table_offset,
        word(header.refcount_table_offset),
        l2,
    ] {
        let damaged = bench.memory.killed();
        damaged.write_at(WriteKind::L2Table, l2 + 8, &(1 << 63 | metadata).to_be_bytes()).unwrap();
        let error = Image::open(damaged).unwrap().map(GuestOffset(CLUSTER), 1).unwrap_err();
        assert!(
            error.kind() == ErrorKind::Corrupt && error.to_string().contains("is metadata"),
            "{metadata:#x}: {error}"
        );
    }
}

/// Protects: V27. An entry that names a free cluster is refused, because the cluster could be
/// handed out to another guest cluster.
#[test]
fn guest_data_is_never_where_nothing_is_counted() {
    let bench = bench();
    bench.store(0, 7).unwrap();
    bench.store(1, 7).unwrap();
    let free = bench.host(0).unwrap();
    bench.discard(0);
    bench.image.close().unwrap();
    let mut entry = [0; 8];
    bench.memory.read_at(bench.image.reader().header().l1_table_offset, &mut entry).unwrap();
    let l2 = u64::from_be_bytes(entry) & !(1 << 63);
    bench
        .memory
        .write_at(WriteKind::L2Table, l2, &(1 << 63 | (free * CLUSTER)).to_be_bytes())
        .unwrap();
    let error = Image::open(bench.memory.killed()).unwrap().map(GuestOffset(0), 1).unwrap_err();
    assert!(
        error.kind() == ErrorKind::Corrupt && error.to_string().contains("refcount is zero"),
        "{error}"
    );
}

/// Protects: tables beyond the memory limit are packed or dropped when clean, and a later
/// load returns what was written to them.
#[test]
fn packed_and_evicted_tables_come_back() {
    // All forty tables stay if they are packed; none stays in the second case.
    for (memory, left) in [(2 * CLUSTER as usize, 40), (0, 0)] {
        let bench = bench();
        let mut image = Image::open(bench.memory.clone()).unwrap();
        image.reader.tables.limit_memory(memory);
        let bench = Bench { image, ..bench };
        // A disk of 1 GiB has two L2 tables only, so it is grown to forty.
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
        let tables = &bench.image.reader.tables;
        assert_eq!(tables.resident(), left, "after the pass, with {memory} bytes");
        assert!(tables.resident_bytes() <= memory);
        for round in 0..3u8 {
            for table in 0..40u64 {
                assert_eq!(bench.reads(table * 8192 + u64::from(round)), round * 40 + table as u8);
            }
        }
        assert_eq!(tables.resident(), left.max(1), "after reads");
    }
}

/// Protects: the memory that is counted is that of the tables, also after one was loaded
/// and packed, and unpacked.
#[test]
fn the_memory_of_tables_is_counted() {
    let bench = bench();
    let tables = &bench.image.reader.tables;
    bench.store(0, 1).unwrap();
    bench.image.flush().unwrap();
    let unpacked = tables.resident_bytes();
    assert!(unpacked > CLUSTER as usize);
    let bench = reopen(bench.memory.killed());
    let tables = &bench.image.reader.tables;
    assert_eq!(bench.reads(0), 1);
    let packed = tables.resident_bytes();
    assert!(packed < 300, "{packed} bytes for one run of data and one of nothing");
    bench.store(1, 2).unwrap();
    assert_eq!(tables.resident_bytes(), unpacked);
    bench.image.flush().unwrap();
    assert_eq!([0, 1].map(|cluster| bench.reads(cluster)), [1, 2]);
    let bench = reopen(bench.memory.killed());
    assert_eq!([0, 1].map(|cluster| bench.reads(cluster)), [1, 2]);
}

/// Protects: P1, R3. A change that has returned is written by the next pass, even if another thread
/// is just putting the table on the list. (Once, the change found the mark of the other thread and
/// relied on it. A flush then returned without the change, and freed a cluster that the entry on
/// disk still named.)
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
            assert!(!list.list.is_empty(), "a change returned, and no pass would write it");
        }
        drop(list);
    });
    bench.image.flush().unwrap();
    assert_eq!(reopen(bench.memory.killed()).reads(2), 8);
}

/// Copies the bytes of a memory into a file that can inject faults.
fn simulated(memory: &Memory) -> Arc<SimStorage> {
    SimStorage::new(memory.state.lock().bytes.clone())
}

/// Returns the corruptions and leaks that a full check finds.
fn checked(file: &SimStorage) -> (u64, u64) {
    let report = super::check::check(file).unwrap();
    (report.corruptions, report.leaks)
}

/// Protects: R11. After an error any part of a write may be on disk. If the header on disk named
/// the larger L1 table while this process continued with the old one, the next changes would be
/// lost.
#[test]
fn header_write_that_failed_is_undone_before_the_next_pass() {
    let file = simulated(&bench().memory);
    let image = Image::open(file.clone()).unwrap();
    let lock = RangeLock::new(CLUSTER);
    let matches = |operation: &Operation| operation.action == Action::Write(WriteKind::Header);
    file.inject(Fault {
        matches: Box::new(matches),
        after: 0,
        failure: HostFailure::Short(512, 5),
        times: Repeat::Once,
    });
    let before = file.bytes()[..512].to_vec();
    assert_eq!(
        image.make_room(&lock.exclusive(0..u64::MAX), 20 << 30).unwrap_err().errno(),
        Some(5)
    );
    assert_ne!(file.bytes()[..512], before, "it was done nevertheless");
    assert!(image.is_dirty(), "the timer looks after it");

    let held = lock.exclusive(9000 * CLUSTER..9001 * CLUSTER);
    let filled = image.fill(image.allocate(1).unwrap(), 0, &[8; CLUSTER as usize]).unwrap();
    image.publish(&held, GuestSubcluster(9000), filled).unwrap();
    image.flush().unwrap();
    assert_eq!(file.bytes()[..512], before);
    let again = Image::open(SimStorage::new(file.bytes())).unwrap();
    assert!(
        matches!(
            again.map(GuestOffset(9000 * CLUSTER), 1).unwrap().mapping,
            Mapping::Data { in_place: true, .. }
        ),
        "the write is lost"
    );
    image.close().unwrap();
    assert_eq!(checked(&file), (0, 0), "the larger table is given back");
}

/// Protects: R14. Freed clusters are not forgotten if the block that counts them cannot be read.
#[test]
fn frees_wait_where_their_refcount_block_cannot_be_read() {
    let bench = refcount_growth::small();
    bench.store_small(0..200).unwrap();
    bench.image.close().unwrap();
    let file = simulated(&bench.memory);
    let before = checked(&file);
    let image = Image::open(file.clone()).unwrap();
    let lock = RangeLock::new(512);
    let mut first_block = [0; 8];
    file.read_at(image.reader().header().refcount_table_offset, &mut first_block).unwrap();
    let first_block = u64::from_be_bytes(first_block);
    let matches = move |operation: &Operation| {
        operation.action == Action::Read && operation.at == first_block
    };
    file.inject(Fault {
        matches: Box::new(matches),
        after: 0,
        failure: HostFailure::Errno(5),
        times: Repeat::ForEver,
    });
    // The first block counts the old L1 table.
    image.make_room(&lock.exclusive(0..u64::MAX), 64 << 20).unwrap();
    image.flush().unwrap();
    assert_eq!(
        image.close().unwrap_err().kind(),
        ErrorKind::Io,
        "an end there is, and it says that something is left"
    );
    file.heal();
    image.close().unwrap();
    assert_eq!(checked(&file), before);
}

/// Protects: a commit is requested once enough new data is uncommitted, and not before.
#[test]
fn a_commit_is_wanted_when_much_is_uncommitted() {
    let bench = bench();
    let wanted = bench.image.commit_wanted();
    let clusters = UNCOMMITTED_DATA / CLUSTER;
    for cluster in 0..clusters - 1 {
        bench.store(cluster, 7).unwrap();
    }
    assert!(wanted.try_recv().is_err());
    bench.store(clusters, 7).unwrap();
    assert!(wanted.try_recv().is_ok());
    bench.image.flush().unwrap();
    bench.store(clusters + 1, 7).unwrap();
    assert!(wanted.try_recv().is_err(), "the pass has begun to count anew");
}
