//! Tests of tables with a bad entry: using that entry is an error, and all other entries stay
//! usable.

use super::*;
use crate::image::check;

const COPIED: u64 = 1 << 63;
const COMPRESSED: u64 = 1 << 62;
/// A cluster with data that the second L2 table maps. The first eight clusters have data too.
const FAR: u64 = 9000;

/// Makes an image with data and closes it.
fn image() -> Arc<Memory> {
    let bench = bench();
    for cluster in 0..8 {
        bench.store(cluster, cluster as u8 + 1).unwrap();
    }
    bench.store(FAR, 99).unwrap();
    bench.image.close().unwrap();
    bench.image.end_writing();
    bench.memory.killed()
}

fn word(memory: &Memory, at: u64) -> u64 {
    let mut word = [0; 8];
    memory.read_at(at, &mut word).unwrap();
    u64::from_be_bytes(word)
}

fn put(memory: &Memory, at: u64, value: u64) {
    memory.write_at(WriteKind::L2Table, at, &value.to_be_bytes()).unwrap();
}

/// Returns the host offset of an L2 table, in bytes.
fn table(memory: &Memory, l1_index: u64) -> u64 {
    word(memory, word(memory, 40) + l1_index * 8) & !COPIED
}

/// Returns the byte that a cluster reads as, or the error.
fn reads(reader: &ImageReader, cluster: u64) -> Result<u8> {
    let at = GuestOffset(cluster * CLUSTER);
    let extent = reader.map(at, CLUSTER)?;
    let mut buf = vec![0xee; CLUSTER as usize];
    reader.read_extent(at, &extent, &mut buf)?;
    assert!(buf.iter().all(|byte| *byte == buf[0]));
    Ok(buf[0])
}

/// Asserts that cluster 3 of the first table is bad, and no other.
fn assert_only_three_is_bad(reader: &ImageReader, what: &str) {
    for cluster in (0..8).filter(|cluster| *cluster != 3) {
        assert_eq!(reads(reader, cluster).unwrap(), cluster as u8 + 1, "{what}");
    }
    assert_eq!((reads(reader, 8).unwrap(), reads(reader, FAR).unwrap()), (0, 99), "{what}");
    let error = reads(reader, 3).unwrap_err();
    assert!(
        error.kind() == ErrorKind::Corrupt && error.to_string().contains("index 3"),
        "{what}: {error}"
    );
    // Runs end before the bad cluster, and `look` continues after it.
    assert!(reader.map(GuestOffset(0), 8 * CLUSTER).unwrap().len <= 3 * CLUSTER, "{what}");
    let (mapping, len) = reader.look(GuestOffset(3 * CLUSTER + 5), 8 * CLUSTER);
    assert_eq!((mapping.is_err(), len), (true, CLUSTER - 5), "{what}");
    assert_eq!(
        reader.place(GuestOffset(3 * CLUSTER), CLUSTER, Holes::Unseen).unwrap(),
        (Location::Unreadable, CLUSTER),
        "{what}"
    );
}

/// Protects: P8. Each kind of bad entry affects only its own range, both in an image that is read
/// and in one that is open for writing. The latter accepts no more writes.
#[test]
fn a_bad_entry_costs_the_range_that_it_maps() {
    let good = image();
    let l2 = table(&good, 0);
    let host = word(&good, l2 + 3 * 8) & !COPIED;
    for (what, entry) in [
        ("outside the file", COPIED | 1 << 40),
        ("just outside the file", COPIED | good.size().next_multiple_of(CLUSTER)),
        ("not at a cluster", COPIED | host | 0x200),
        ("reserved bits", COPIED | host | 1 << 57),
        ("reserved bits below", COPIED | host | 1 << 1),
        ("COPIED and nothing else", COPIED),
        ("compressed and COPIED", COPIED | COMPRESSED | host),
        ("compressed, outside", COMPRESSED | 1 << 40),
        ("all ones", u64::MAX),
    ] {
        let damaged = good.killed();
        put(&damaged, l2 + 3 * 8, entry);
        assert_only_three_is_bad(&ImageReader::open(damaged.clone()).unwrap(), what);

        let bench = reopen(damaged.clone());
        assert!(bench.image.is_usable(), "{what}: nothing is known of it yet");
        assert_eq!(bench.reads(0), 1, "{what}");
        assert!(
            !bench.image.is_usable() && bench.store(20, 1).is_err(),
            "{what}: the table with the bad entry was met"
        );
        assert_only_three_is_bad(bench.image.reader(), what);
        let mark = bench.image.reader().header().incompatible & feature::CORRUPT;
        assert_ne!(mark, 0, "{what}");
    }
    // An entry that only refcounts or other tables contradict is usable in an image that is open
    // for reading only.
    let far = word(&good, table(&good, 1) + (FAR - 8192) * 8) & !COPIED;
    let uncounted = good.killed();
    let block = word(&good, word(&good, 48));
    uncounted.write_at(WriteKind::RefcountBlock, block + 2 * (far / CLUSTER), &[0, 0]).unwrap();
    for (what, damaged, entry) in
        [("is metadata", good.killed(), l2), ("refcount is zero", uncounted, far)]
    {
        put(&damaged, l2 + 3 * 8, COPIED | entry);
        assert!(
            ImageReader::open(damaged.clone()).unwrap().map(GuestOffset(3 * CLUSTER), 1).is_ok(),
            "{what}"
        );
        let bench = reopen(damaged);
        assert_eq!(bench.reads(1), 2, "{what}");
        let error = bench.image.map(GuestOffset(3 * CLUSTER), 1).unwrap_err().to_string();
        assert!(error.contains(what) && !bench.image.is_usable(), "{what}: {error}");
    }
}

/// Protects: `look` passes thousands of bad entries in one step, and each of them is reported as
/// bad.
#[test]
fn a_table_of_bad_entries_is_one_step() {
    let damaged = image();
    let l2 = table(&damaged, 0);
    for index in 3..8192 {
        put(&damaged, l2 + index * 8, COPIED | ((1 << 40) + index * CLUSTER));
    }
    let reader = ImageReader::open(damaged).unwrap();
    let (mapping, len) = reader.look(GuestOffset(3 * CLUSTER), u64::MAX);
    assert_eq!((mapping.is_err(), len), (true, 8189 * CLUSTER));
    for index in [3, 100, 8191] {
        let text = reads(&reader, index).unwrap_err().to_string();
        assert!(text.contains(&format!("index {index}:")), "{text}");
    }
    assert_eq!((reads(&reader, 2).unwrap(), reads(&reader, FAR).unwrap()), (3, 99));
}

/// Protects: V22. A bad entry of the L1 table affects the range of its L2 table in an image that is
/// read. The image is not opened for writing.
#[test]
fn a_bad_l1_entry_costs_the_range_of_its_table() {
    let good = image();
    let l1 = word(&good, 40);
    for (what, entry) in [
        ("outside the file", COPIED | 1 << 40),
        ("not cluster aligned", COPIED | table(&good, 1) | 0x200),
        ("reserved bits", COPIED | table(&good, 1) | 1 << 60),
        ("COPIED without", COPIED),
    ] {
        let damaged = good.killed();
        put(&damaged, l1 + 8, entry);
        let reader = ImageReader::open(damaged.clone()).unwrap();
        assert_eq!(reads(&reader, 7).unwrap(), 8, "{what}");
        let error = reads(&reader, FAR).unwrap_err().to_string();
        assert!(error.contains("L1 table, index 1") && error.contains(what), "{error}");
        let span = reader.geometry().l2_span();
        let (mapping, len) = reader.look(GuestOffset(FAR * CLUSTER), u64::MAX);
        assert_eq!((mapping.is_err(), len), (true, 2 * span - FAR * CLUSTER), "{what}");
        assert_eq!(reads(&reader, 2 * span / CLUSTER - 1).unwrap_err().kind(), ErrorKind::Corrupt);
        let error = Image::open(damaged).unwrap_err();
        assert!(error.kind() == ErrorKind::Corrupt && error.to_string().contains(what), "{error}");
    }
}

/// Protects: a file that was truncated inside a table, with its refcounts lost, can be read up to
/// its end.
#[test]
fn a_file_without_its_end_is_read_as_far_as_it_goes() {
    let good = image();
    // The first data cluster lies before the table that names it, the others after it.
    let (l2, first) = (table(&good, 0), word(&good, table(&good, 0)) & !COPIED);
    assert!(first < l2);
    let short = good.killed();
    short.state.lock().bytes.truncate(l2 as usize + 20);
    let reader = ImageReader::open(short).unwrap();
    assert_eq!(reads(&reader, 0).unwrap(), 1);
    for cluster in [1, 2, 8000, FAR] {
        assert_eq!(
            reads(&reader, cluster).unwrap_err().kind(),
            ErrorKind::Corrupt,
            "cluster {cluster}"
        );
    }
    let damaged = good.killed();
    put(&damaged, 48, 1 << 40);
    assert_eq!(
        reads(&ImageReader::open(damaged.clone()).unwrap(), 5).unwrap(),
        6,
        "no refcount is needed to read"
    );
    assert!(Image::open(damaged).is_err());
}

/// Protects: reads and writes go on if a refcount block cannot be read. A write goes to a new
/// cluster if the old one is not proven to have a single reference.
#[test]
fn an_unreadable_refcount_block_costs_nothing() {
    let good = image();
    let block = word(&good, word(&good, 48));
    let storage = SimStorage::new(good.state.lock().bytes.clone());
    let image = Image::open(storage.clone()).unwrap();
    image.begin_writing().unwrap();
    let is_block =
        move |operation: &Operation| operation.action == Action::Read && operation.at == block;
    storage.inject(Fault {
        matches: Box::new(is_block),
        after: 0,
        failure: HostFailure::Errno(5),
        times: Repeat::ForEver,
    });
    for cluster in 0..8 {
        assert_eq!(reads(image.reader(), cluster).unwrap(), cluster as u8 + 1);
    }
    assert!(storage.failures() <= 2, "{} reads of one block for one table", storage.failures());
    let sole = |cluster| {
        matches!(
            image.map(GuestOffset(cluster * CLUSTER), 1).unwrap().mapping,
            Mapping::Data { in_place: true, .. }
        )
    };
    assert!(!sole(2) && image.is_usable());
    storage.heal();
    let lock = RangeLock::new(CLUSTER);
    let held = lock.exclusive(2 * CLUSTER..3 * CLUSTER);
    let filled = image.fill(image.allocate(1).unwrap(), 0, &[77; CLUSTER as usize]).unwrap();
    image.publish(&held, GuestSubcluster(2), filled).unwrap();
    assert!(sole(2) && !sole(3));
    assert_eq!((reads(image.reader(), 2).unwrap(), reads(image.reader(), 3).unwrap()), (77, 4));
    image.close().unwrap();
    let report = check(&*storage).unwrap();
    assert!(report.is_sound() && report.leaks == 0, "{:?}", report.findings);
}

/// Protects: V24. A table that was evicted is checked again when it is loaded, but only if its
/// bytes are others than those that were checked.
#[test]
fn a_table_that_is_loaded_again_is_compared() {
    let good = image();
    let (l2, block) = (table(&good, 0), word(&good, word(&good, 48)));
    let storage = SimStorage::new(good.state.lock().bytes.clone());
    let mut image = Image::open(storage.clone()).unwrap();
    // One table, and no refcount block.
    image.reader.tables.limit_memory(0);
    image.allocator.limit_memory(0);
    image.begin_writing().unwrap();
    let load = || {
        reads(image.reader(), FAR).unwrap();
        reads(image.reader(), 3)
    };
    assert_eq!((load().unwrap(), load().unwrap()), (4, 4));
    storage.inject(Fault {
        matches: Box::new(move |read| read.action == Action::Read && read.at == block),
        after: 0,
        failure: HostFailure::Errno(5),
        times: Repeat::ForEver,
    });
    assert_eq!(load().unwrap(), 4);
    assert_eq!(storage.failures(), 0, "the refcounts were not asked for");
    storage.heal();

    // Another process has changed the file.
    let at = l2 + 3 * 8;
    storage.write_at(WriteKind::L2Table, at, &(COPIED | 1 << 40).to_be_bytes()).unwrap();
    let error = load().unwrap_err();
    assert!(error.to_string().contains("index 3"), "{error}");
    assert!(load().is_err(), "a bad table is checked again");
}

/// Protects: only the parts of an L1 table that are used are read, and its holes take no memory.
#[test]
fn an_l1_table_takes_memory_where_it_has_entries() {
    let good = image();
    // The header claims 4 million entries for a larger disk. The two entries that are used lie at
    // the start of a hole.
    let at = good.size().next_multiple_of(CLUSTER);
    let entries = 32_u64 << 17;
    let (first, second) = (word(&good, word(&good, 40)), word(&good, word(&good, 40) + 8));
    good.state.lock().bytes.resize((at + entries * 8) as usize, 0);
    put(&good, at, first);
    put(&good, at + 8, second);
    put(&good, 40, at);
    good.write_at(WriteKind::Header, 36, &(entries as u32).to_be_bytes()).unwrap();
    good.write_at(WriteKind::Header, 24, &(entries << 29).to_be_bytes()).unwrap();
    let storage = SimStorage::new(good.state.lock().bytes.clone());
    let reader = ImageReader::open(storage.clone()).unwrap();
    assert_eq!(
        (storage.operations(), reader.tables.chunks()),
        (1, 0),
        "the header is read, and nothing else"
    );
    assert_eq!((reads(&reader, 4).unwrap(), reads(&reader, FAR).unwrap()), (5, 99));
    assert_eq!(reader.tables.chunks(), 1);
    let before = storage.operations();
    for table in (0..entries).step_by(1000) {
        let at = GuestOffset((table << 29) + (1 << 28));
        assert_eq!(reader.map(at, 1).unwrap().mapping, Mapping::Unallocated);
        assert_eq!(reader.map(at, 1).unwrap().mapping, Mapping::Unallocated);
    }
    assert!(storage.operations() - before <= entries / 1000, "each piece is read once");
    assert_eq!(reader.tables.chunks(), 1, "a hole takes memory");
}
