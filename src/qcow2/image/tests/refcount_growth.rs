//! Tests of the refcount table in an image where everything is small: growing, moving, and failing
//! half-way.

use super::*;
use sim::SimStorage;
use sim::start::Start;

/// Makes an empty image in which everything is small: 512-byte clusters, 64 refcounts per block, 64
/// blocks per table, 64 entries per L2 table.
pub(super) fn small() -> Bench {
    let memory = Arc::new(Memory::default());
    let geometry = Geometry::new(3, 9, 4, 16 << 20).unwrap();
    for (at, bytes) in (NewImage { geometry, backing: None }).layout().unwrap() {
        memory.write_at(WriteKind::Header, at, &bytes).unwrap();
    }
    // New images have 16-bit refcounts and a table that is large enough for a full image. This
    // makes the refcounts 64 bits wide and the table one cluster long.
    let word = |at: u64| {
        let mut bytes = [0; 8];
        memory.read_at(at, &mut bytes).unwrap();
        u64::from_be_bytes(bytes)
    };
    let block = word(word(48));
    let used = memory.size().div_ceil(512);
    assert!(used < 64);
    memory.write_at(WriteKind::Header, 56, &1u32.to_be_bytes()).unwrap();
    memory.write_at(WriteKind::Header, 96, &6u32.to_be_bytes()).unwrap();
    memory
        .write_at(
            WriteKind::Header,
            block,
            &(0..64)
                .flat_map(|cluster| u64::from(cluster < used).to_be_bytes())
                .collect::<Vec<u8>>(),
        )
        .unwrap();
    reopen(memory)
}

impl Bench {
    /// Stores clusters of 512 bytes; cluster n holds the bytes of [`small_data`].
    pub(super) fn store_small(&self, clusters: std::ops::Range<u64>) -> Result<()> {
        let held = self.lock.exclusive(clusters.start * 512..clusters.end * 512);
        let mut at = clusters.start;
        while at < clusters.end {
            let allocation = self.image.allocate(clusters.end - at)?;
            let count = allocation.clusters();
            let data: Vec<u8> = (at..at + count).flat_map(small_data).collect();
            self.image.publish(
                &held,
                GuestSubcluster(at),
                self.image.fill(allocation, 0, &data)?,
            )?;
            at += count;
        }
        Ok(())
    }

    /// Checks some clusters of every L2 table.
    fn has_small(&self, clusters: std::ops::Range<u64>) {
        for cluster in clusters.step_by(31) {
            let extent = self.image.map(GuestOffset(cluster * 512), 512).unwrap();
            let mut buf = [0; 512];
            self.image.read_extent(GuestOffset(cluster * 512), &extent, &mut buf).unwrap();
            assert!(buf == small_data(cluster), "cluster {cluster}");
        }
    }
}

pub(super) fn small_data(cluster: u64) -> [u8; 512] {
    [(cluster % 255) as u8 + 1; 512]
}

/// Protects: R6. A refcount table that the header on disk names is not freed because the pass that
/// wrote the header failed later.
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
        // The table moves once more, and free clusters are reused.
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

/// Protects: R6. The blocks that a moved table names are durable before the table is written,
/// because after a failed pass it may be the live table.
#[test]
fn moved_refcount_table_is_written_behind_its_blocks() {
    let bench = small();
    bench.store_small(0..4100).unwrap();
    bench.memory.ops();
    bench.image.flush().unwrap();
    let ops = bench.memory.ops();
    let table = bench.image.reader().header().refcount_table_offset;
    let at = ops
        .iter()
        .position(|op| matches!(op, Op::Write { at, .. } if *at == table))
        .expect("the table moved");
    assert_eq!(ops[at - 1], Op::Sync);
    assert_eq!(ops[at + 1..at + 4], [Op::Sync, Op::Write { at: 48, len: 12 }, Op::Sync]);
}

/// Protects: P4. Clusters that a crash left counted beyond the end of the file are leaks and not
/// corruption, whatever is allocated there next.
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

/// Protects: V29. A file that is mostly a hole is not searched to its end, and the space beyond the
/// last counted cluster is used, as on a block device.
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

/// Protects: R2, R5. If several blocks are new, one may count the cluster of the next. Their table
/// entries may lie in different sectors, which reach the disk in any order. (Once, the table on
/// disk could name the second block before the first, which counts it.)
#[test]
fn new_blocks_are_named_one_sector_of_the_table_after_the_other() {
    let start = Start { counted: 63 * 64, table: 4, ..Start::new("blocks", 3, 9, 6, 64 << 10) };
    let file = SimStorage::checked(start.bytes());
    let image = Image::open(file.clone()).unwrap();
    let lock = RangeLock::new(512);
    // An L1 table of 96 clusters needs two more blocks, whose entries lie on both sides of the end
    // of the first sector of the refcount table.
    image.make_room(&lock.exclusive(0..u64::MAX), 192 << 20).unwrap();
    image.close().unwrap();
    let header = image.reader().header();
    let mut table = vec![0; header.refcount_table_clusters as usize * 512];
    file.read_at(header.refcount_table_offset, &mut table).unwrap();
    let blocks = table.chunks_exact(8).filter(|entry| **entry != [0; 8]).count();
    assert!(blocks > 64, "{blocks}");
}

/// Protects: blocks beyond the memory limit are evicted when clean, and a later load returns what
/// was written to them.
#[test]
fn refcount_blocks_are_dropped_and_come_back() {
    let bench = small();
    // Clusters of the larger refcount table that `small` cut off count as leaks.
    let leaks = |memory: &Memory| {
        let report = check::check(memory).unwrap();
        (report.corruptions, report.leaks)
    };
    let leaked = leaks(&bench.memory);
    bench.image.allocator.limit_memory(4 * 512);
    for round in 0..8u64 {
        bench.store_small(round * 400..(round + 1) * 400).unwrap();
        // The discarded clusters lie under blocks of which some were evicted.
        let held = bench.lock.exclusive(0..u64::MAX);
        bench
            .image
            .discard(&held, GuestSubcluster(round * 400 + 100)..GuestSubcluster(round * 400 + 300))
            .unwrap();
        bench
            .image
            .discard(&held, GuestSubcluster(round * 97)..GuestSubcluster(round * 97 + 31))
            .unwrap();
        drop(held);
        bench.image.flush().unwrap();
    }
    bench.image.close().unwrap();
    assert!(
        bench.image.allocator.resident_blocks() <= 4,
        "{} blocks in memory",
        bench.image.allocator.resident_blocks()
    );
    let again = reopen(bench.memory.killed());
    assert_eq!(leaks(&again.memory), leaked);
    again.has_small(3100..3200);
}

/// Protects: P1. An unreadable refcount block does not lose acknowledged changes.
#[test]
fn close_writes_back_although_the_reserve_cannot_be_given_up() {
    let storage = SimStorage::new(Vec::new());
    let geometry = Geometry::new(3, 12, 4, 64 << 20).unwrap();
    for (at, bytes) in (NewImage { geometry, backing: None }).layout().unwrap() {
        storage.write_at(WriteKind::Header, at, &bytes).unwrap();
    }
    let image = Image::open(storage.clone()).unwrap();
    let lock = RangeLock::new(4096);
    let held = lock.exclusive(0..u64::MAX);
    let allocation = image.allocate(1).unwrap();
    image
        .publish(&held, GuestSubcluster(0), image.fill(allocation, 0, &[1; 4096]).unwrap())
        .unwrap();
    image.flush().unwrap();
    // The discard is acknowledged and exists in memory only.
    image.discard(&held, GuestSubcluster(0)..GuestSubcluster(1)).unwrap();
    image.allocator.limit_memory(0);
    image.allocator.refcount(crate::format::HostCluster(1 << 30)).unwrap(); // evicts
    assert_eq!(image.allocator.resident_blocks(), 0);
    storage.inject(Fault {
        matches: Box::new(|operation| operation.action == Action::Read),
        after: 0,
        failure: HostFailure::Errno(5),
        times: Repeat::ForEver,
    });
    image.close().unwrap_err();
    drop(held);
    let killed = Image::open(SimStorage::new(storage.bytes())).unwrap();
    let mapping = killed.map(GuestOffset(0), 4096).unwrap().mapping;
    assert!(
        matches!(mapping, Mapping::Zero { .. }),
        "the discard was lost by an orderly close: {mapping:?}"
    );
}
