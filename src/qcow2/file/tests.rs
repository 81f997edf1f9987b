//! Tests that compare the disk with a vector of bytes, on a storage that panics when an ordering
//! rule is broken.

use super::*;
use host::storage::{Access, FileStorage, OpenMark, Sidecar};
use sim::random::Random;
use sim::start::{Fill, Start, base_bytes, pattern, set_refcount};
use sim::{Action, Fault, HostFailure, Repeat, SimStorage, spec};

/// A backing file in memory.
#[derive(Debug)]
struct Bytes(Vec<u8>);

impl Below for Bytes {
    fn size(&self) -> u64 {
        self.0.len() as u64
    }
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<()> {
        buf.copy_from_slice(&self.0[offset as usize..][..buf.len()]);
        Ok(())
    }
}

/// A backing file that fails.
#[derive(Debug)]
struct Broken(u64);

impl Below for Broken {
    fn size(&self) -> u64 {
        self.0
    }
    fn read_at(&self, _offset: u64, _buf: &mut [u8]) -> Result<()> {
        Err(Error::new(ErrorKind::Io, "the backing file is broken"))
    }
}

/// Makes the image of [`start`] with extended L2 entries.
fn extended(size: u64, base: u64) -> Start {
    let mut start = start(3, 14, size, base);
    start.clusters.extend([
        (7, Fill::Parts(7, 0x0000_ff00_8000_00ff)),
        (8, Fill::Parts(8, 0)),
        (9, Fill::Parts(9, 0x5555_5554_8888_8881)),
    ]);
    Start { extended: true, ..start }
}

fn start(version: u32, cluster_bits: u32, size: u64, base: u64) -> Start {
    let mut clusters = vec![(1, Fill::Data(1)), (3, Fill::Data(3))];
    if version >= 3 {
        clusters.extend([(5, Fill::Reserved(5)), (6, Fill::Zero)]);
    }
    Start { clusters, base, ..Start::new("file", version, cluster_bits, 4, size) }
}

/// Returns what the guest sees of the image of [`start`].
fn seen_at_start(start: &Start) -> Vec<u8> {
    let mut below = base_bytes(start.base);
    below.resize(start.size as usize, 0);
    spec::look(&start.bytes(), &below).unwrap().guest
}

fn open(file: &Arc<SimStorage>, base: u64) -> Qcow2 {
    match base {
        0 => Qcow2::open(file.clone()).unwrap(),
        _ => {
            let find = |backing: &BackingReference| {
                assert_eq!(backing.name, "base.raw");
                Ok(Box::new(Bytes(base_bytes(base))) as Box<dyn Below>)
            };
            Qcow2::open_above(file.clone(), find).unwrap()
        }
    }
}

fn assert_sound(file: &SimStorage, base: u64, wanted: &[u8], what: &str) {
    let mut below = base_bytes(base);
    below.resize(wanted.len(), 0);
    let seen = spec::look(&file.bytes(), &below).unwrap();
    assert_eq!(seen.verdict.all(), Vec::<String>::new(), "{what}");
    assert_eq!(seen.verdict.all_leaks(), 0, "{what}");
    let wrong = seen.guest.iter().zip(wanted).position(|(a, b)| a != b);
    assert_eq!((wrong, seen.guest.len()), (None, wanted.len()), "{what}: the first wrong byte");
    let report = Qcow2::check(file).unwrap();
    assert_eq!(
        (report.corruptions, report.leaks, report.check_errors),
        (0, 0, 0),
        "{what}: {:?}",
        report.findings
    );
}

/// Protects: every kind of request at random offsets has the same result as on a vector of bytes,
/// with closes and reopens in between. The storage knows the ordering rules and panics when one is
/// broken.
#[test]
fn random_requests_are_those_of_a_vector() {
    let seed = Random::of_test(1).0;
    let shapes = [
        (2, 9, 0),
        (3, 9, 0),
        (3, 12, 0),
        (2, 9, 20_000),
        (3, 9, 20_000),
        (3, 12, 100_000),
        (3, 9, 60_000),
        (3, 14, 0),
        (3, 14, 100_000),
        (3, 14, 400_000),
    ];
    for (version, cluster_bits, base) in shapes {
        let cluster_size = 1 << cluster_bits;
        // Small clusters give two L2 tables. With large ones the disk ends inside a cluster.
        let size = if cluster_bits == 9 { 80 * cluster_size } else { 20 * cluster_size + 512 };
        let what = format!(
            "CORDISK_SEED={seed}, version {version}, clusters of {cluster_size}, base of {base}"
        );
        let has_subclusters = cluster_bits == 14;
        let start = if has_subclusters {
            extended(size, base)
        } else {
            start(version, cluster_bits, size, base)
        };
        let (file, mut model) = (SimStorage::checked(start.bytes()), seen_at_start(&start));
        let mut random = Random(seed);
        let mut disk = open(&file, base);
        let whole = cluster_size;
        for step in 0..if has_subclusters { 1200 } else { 400u64 } {
            // Half of the requests have the size and the place of subclusters.
            let is_small = has_subclusters && random.below(2) == 0;
            let cluster_size = if is_small { whole / 32 } else { whole };
            let at = random.below(size);
            let most =
                if random.below(4) == 0 { size - at } else { (size - at).min(2 * cluster_size) };
            let (at, len) = match random.below(3) {
                0 => {
                    (at / cluster_size * cluster_size, (most / cluster_size * cluster_size).max(1))
                }
                _ => (at, 1 + random.below(most)),
            };
            let range = at..(at + len).min(size);
            let place = range.start as usize..range.end as usize;
            match random.below(12) {
                0..5 => {
                    let data: Vec<u8> = (0..range.end - range.start)
                        .map(|byte| (step * 7 + byte % 251) as u8 | 1)
                        .collect();
                    disk.write_at(at, &data).unwrap();
                    model[place].copy_from_slice(&data);
                }
                5..7 => {
                    disk.write_zeroes(range).unwrap();
                    model[place].fill(0);
                }
                7..9 => {
                    disk.discard(range).unwrap();
                    model[place].fill(0);
                }
                9 => disk.flush().unwrap(),
                10 if random.below(4) == 0 => {
                    disk.close().unwrap();
                    assert_sound(&file, base, &model, &what);
                    disk = open(&file, base);
                }
                _ => {
                    let mut buf = vec![0xee; place.len()];
                    disk.read_at(at, &mut buf).unwrap();
                    assert!(
                        buf == model[place],
                        "{what}: step {step}, a read of {len} bytes at {at}"
                    );
                }
            }
        }
        let mut all = vec![0xee; size as usize];
        disk.read_at(0, &mut all).unwrap();
        assert!(all == model, "{what}");
        disk.close().unwrap();
        assert_sound(&file, base, &model, &what);
    }
}

/// Protects: threads that write sectors of the same clusters, so that their allocations compete for
/// one cluster, lose no bytes.
#[test]
fn threads_that_share_clusters_lose_nothing() {
    const THREADS: u64 = 4;
    let size = 64 * 4096;
    let file = SimStorage::checked(Start::new("threads", 3, 12, 4, size).bytes());
    let disk = Qcow2::open(file.clone()).unwrap();
    for cluster in 0..64 {
        // One scope per cluster, so that a thread that panics ends the test.
        std::thread::scope(|scope| {
            for thread in 0..THREADS {
                let disk = &disk;
                scope.spawn(move || {
                    let sector = cluster * 8 + thread;
                    disk.write_at(sector * 512, &pattern(thread, sector)).unwrap();
                    if thread == cluster % THREADS {
                        disk.flush().unwrap();
                    }
                });
            }
        });
    }
    let wanted: Vec<u8> = (0..size / 512)
        .flat_map(
            |sector| if sector % 8 < THREADS { pattern(sector % 8, sector) } else { [0; 512] },
        )
        .collect();
    let mut all = vec![0xee; size as usize];
    disk.read_at(0, &mut all).unwrap();
    assert!(all == wanted);
    disk.close().unwrap();
    assert_sound(&file, 0, &wanted, "threads");
}

/// Protects: a disk that is dropped leaves the state of a crash. Flushed data is there, and the
/// next open gives back what was leaked.
#[test]
fn a_crash_loses_nothing_that_was_flushed() {
    let size = 64 * 512;
    let file = SimStorage::checked(Start::new("crash", 3, 9, 4, size).bytes());
    let disk = Qcow2::open(file.clone()).unwrap();
    disk.write_at(0, &[1; 4096]).unwrap();
    disk.flush().unwrap();
    disk.write_at(8192, &[2; 4096]).unwrap();
    disk.discard(0..512).unwrap();
    // The refcount of the discarded cluster is lowered in memory now, and on disk by the next pass.
    disk.flush().unwrap();
    disk.write_at(16384, &[3; 512]).unwrap();
    drop(disk);
    assert_eq!(file.open_mark().unwrap(), OpenMark::Present);
    assert!(Qcow2::check(&*file).unwrap().leaks > 0, "nothing was leaked, so nothing is tested");
    let mut wanted = vec![0; size as usize];
    wanted[512..4096].fill(1);
    wanted[8192..12288].fill(2);
    let disk = Qcow2::open(file.clone()).unwrap();
    let mut all = vec![0xee; size as usize];
    disk.read_at(0, &mut all).unwrap();
    assert!(all == wanted);
    disk.close().unwrap();
    assert_eq!(file.open_mark().unwrap(), OpenMark::Absent);
    assert_sound(&file, 0, &wanted, "after a crash");
}

/// Protects: after the first failed barrier no other is tried, because data that it covered may be
/// lost although the next one would succeed.
#[test]
fn a_failed_flush_stops_all_writes() {
    let file = SimStorage::new(Start::new("failed", 3, 9, 4, 64 * 512).bytes());
    let disk = Qcow2::open(file.clone()).unwrap();
    disk.write_at(0, &[1; 512]).unwrap();
    file.inject(Fault {
        matches: Box::new(|operation| operation.action == Action::Sync),
        after: 0,
        failure: HostFailure::Errno(5),
        times: Repeat::Once,
    });
    assert_eq!(disk.flush().unwrap_err().errno(), Some(5));
    assert!(!disk.is_usable());
    assert!(
        disk.flush().is_err()
            && disk.write_at(0, &[2; 512]).is_err()
            && disk.discard(0..512).is_err()
    );
    disk.read_at(0, &mut [0; 512]).unwrap();
    assert!(disk.close().is_err());
    assert_eq!(file.open_mark().unwrap(), OpenMark::Present);
}

/// Protects: if the caller never flushes, the disk writes its tables back before they grow without
/// bound.
#[test]
fn many_dirty_tables_are_written_back_without_a_flush() {
    let span = 512 << 20; // of one L2 table
    let file = SimStorage::new(Start::new("tables", 3, 16, 4, 700 * span).bytes());
    let disk = Qcow2::open(file.clone()).unwrap();
    file.record();
    let synced = (0..700).find(|table| {
        disk.write_at(table * span, &[1]).unwrap();
        file.recorded().iter().any(|recorded| matches!(recorded, sim::Recorded::Sync { .. }))
    });
    assert_eq!(synced, Some(512), "32 MiB of tables are dirty");
    disk.close().unwrap();
}

#[test]
fn what_cannot_be_done_is_refused() {
    let create = |bytes: Vec<u8>, size, cluster_size| {
        Qcow2::create(SimStorage::new(bytes), size, cluster_size).map(drop)
    };
    for (bytes, size, cluster_size) in [
        (vec![1], 1 << 20, 65536),
        (vec![], 1 << 20, 0),
        (vec![], 1 << 20, 3000),
        (vec![], 1 << 20, 256),
        (vec![], 1 << 20, 4 << 20),
        (vec![], u64::MAX, 65536),
        (vec![], 1 << 62, 512),
    ] {
        assert_eq!(
            create(bytes, size, cluster_size).unwrap_err().kind(),
            ErrorKind::InvalidArgument,
            "{size} {cluster_size}"
        );
    }
    let with_base = SimStorage::checked(start(3, 9, 64 * 512, 4096).bytes());
    let refused = Qcow2::open(with_base.clone()).unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::UnsupportedFeature);
    assert!(refused.to_string().contains("base.raw"), "{refused}");
    assert_eq!(
        with_base.open_mark().unwrap(),
        OpenMark::Absent,
        "an image that is refused is not changed"
    );

    let alone = SimStorage::checked(Start::new("alone", 3, 9, 4, 64 * 512).bytes());
    let never = |_: &BackingReference| unreachable!("there is no backing file");
    assert_eq!(
        Qcow2::open_above(alone.clone(), never).unwrap_err().kind(),
        ErrorKind::InvalidArgument
    );
    let disk = Qcow2::open(alone).unwrap();
    let end = disk.size();
    let refusals = [
        disk.read_at(end - 1, &mut [0; 2]),
        disk.read_at(u64::MAX, &mut [0; 2]),
        disk.write_at(end, &[0]),
        disk.write_zeroes(end - 1..end + 1),
        disk.discard(0..u64::MAX),
    ];
    for refused in refusals {
        assert_eq!(refused.unwrap_err().kind(), ErrorKind::InvalidArgument);
    }
    disk.write_at(end, &[]).unwrap();
    disk.discard(end..end).unwrap();
}

/// Protects: a failing backing file fails only the requests that need it.
#[test]
fn only_what_lies_below_needs_the_backing_file() {
    let start = start(3, 9, 64 * 512, 64 * 512);
    let file = SimStorage::checked(start.bytes());
    let disk = Qcow2::open_above(file.clone(), |_| Ok(Box::new(Broken(64 * 512)))).unwrap();
    let mut buf = [0; 512];
    assert_eq!(disk.read_at(0, &mut buf).unwrap_err().kind(), ErrorKind::Io);
    assert_eq!(
        disk.write_at(10, &[1]).unwrap_err().kind(),
        ErrorKind::Io,
        "the rest of the cluster lies below"
    );
    disk.read_at(512, &mut buf).unwrap();
    assert_eq!(buf, pattern(1, 1));
    disk.write_at(0, &[7; 512]).unwrap();
    disk.write_zeroes(1024..1536).unwrap();
    disk.discard(2048..4096).unwrap();
    let mut head = [0xee; 1536];
    disk.read_at(0, &mut head).unwrap();
    assert!(
        head[..512] == [7; 512] && head[512..1024] == pattern(1, 1) && head[1024..] == [0; 512]
    );
    disk.close().unwrap();
}

/// Protects: a qcow2 image below is read up to its end. If it needs a backing file itself, reads
/// that need that file are errors.
#[test]
fn an_image_lies_below_another() {
    let size = 64 * 512;
    let base = SimStorage::new(start(3, 9, size / 2, 0).bytes());
    let below = seen_at_start(&start(3, 9, size / 2, 0));
    let above = Start { base: 1, ..Start::new("above", 3, 9, 4, size) };
    let file = SimStorage::checked(above.bytes());
    let disk = Qcow2::open_above(file, |_| Ok(Box::new(ImageReader::open(base)?))).unwrap();
    disk.write_at(3 * 512 + 10, &[9; 4]).unwrap();
    let mut wanted = below;
    wanted.resize(size as usize, 0);
    wanted[3 * 512 + 10..][..4].fill(9);
    let mut all = vec![0xee; size as usize];
    disk.read_at(0, &mut all).unwrap();
    assert!(all == wanted);
    disk.close().unwrap();

    let chained = SimStorage::new(start(3, 9, size, 4096).bytes());
    let disk = Qcow2::open_above(SimStorage::checked(above.bytes()), |_| {
        Ok(Box::new(ImageReader::open(chained)?))
    })
    .unwrap();
    disk.read_at(512, &mut [0; 512]).unwrap();
    assert_eq!(disk.read_at(0, &mut [0; 512]).unwrap_err().kind(), ErrorKind::UnsupportedFeature);
}

/// Protects: QEMU reads an image that this crate has written to a file of the host.
#[test]
fn qemu_reads_what_was_written() {
    let scratch = tempfile::tempdir().unwrap();
    let path = scratch.path().join("disk.qcow2");
    let size = (3 << 20) + 512;
    let disk =
        Qcow2::create(Arc::new(FileStorage::create_new(&path).unwrap()), size, 65536).unwrap();
    let mut model = vec![0; size as usize];
    for (at, len, byte) in [(0, 512, 1), (65535, 2, 2), (1 << 20, 200_000, 3), (size - 512, 512, 4)]
    {
        disk.write_at(at, &vec![byte; len]).unwrap();
        model[at as usize..][..len].fill(byte);
    }
    disk.discard((1 << 20) + 65536..(1 << 20) + 131_072).unwrap();
    model[(1 << 20) + 65536..(1 << 20) + 131_072].fill(0);
    disk.close().unwrap();

    let report = Qcow2::check(&FileStorage::open(&path, Access::ReadOnly).unwrap()).unwrap();
    assert_eq!(
        (report.corruptions, report.leaks, report.check_errors),
        (0, 0, 0),
        "{:?}",
        report.findings
    );
    let qemu_img = |args: &[&str]| {
        std::process::Command::new("qemu-img").args(args).current_dir(scratch.path()).output()
    };
    let Ok(checked) = qemu_img(&["check", "-f", "qcow2", "disk.qcow2"]) else {
        assert!(std::env::var_os("CORDISK_REQUIRE_ALL").is_none(), "qemu-img is missing");
        return eprintln!("skipped: no qemu-img");
    };
    assert!(checked.status.success(), "{checked:?}");
    let converted =
        qemu_img(&["convert", "-f", "qcow2", "-O", "raw", "disk.qcow2", "disk.raw"]).unwrap();
    assert!(converted.status.success(), "{converted:?}");
    assert!(std::fs::read(scratch.path().join("disk.raw")).unwrap() == model);
}

/// Returns the host offsets, in bytes, of the entry of a guest cluster in the first L2 table, and
/// of its host cluster.
fn entry_of(image: &[u8], cluster: u64) -> (usize, u64) {
    let layout = spec::Layout::of(image).unwrap();
    let (_, table) = layout.l2_tables(image).next().unwrap();
    let at = (table + cluster * layout.l2_entry_size()) as usize;
    let descriptor = u64::from_be_bytes(image[at..at + 8].try_into().unwrap());
    (at, descriptor & 0x00ff_ffff_ffff_fe00)
}

/// Protects: R9, R10. A subcluster is written whose host cluster is counted twice: the cluster
/// moves with all its other subclusters, and the old one loses a reference and no byte.
#[test]
fn a_shared_cluster_moves_with_its_subclusters() {
    let start = extended(20 << 14, 400_000);
    let mut bytes = start.bytes();
    let (at, host) = entry_of(&bytes, 7);
    bytes[at] &= 0x7f;
    let block = spec::Layout::of(&bytes).unwrap().blocks(&bytes).next().unwrap().1 as usize;
    set_refcount(&mut bytes[block..block + (1 << 14)], 4, host >> 14, 2);
    let old = bytes[host as usize..][..1 << 14].to_vec();
    let file = SimStorage::checked(bytes);
    let mut model = seen_at_start(&start);
    let disk = open(&file, 400_000);
    // The second half of subcluster 3 (allocated), 4 (allocated) and the first half of 5.
    let place = (7 << 14) + 3 * 512 + 256..(7 << 14) + 5 * 512 + 256;
    disk.write_at(place.start as u64, &vec![0xab; place.len()]).unwrap();
    model[place].fill(0xab);
    // A part of it becomes zero while it is shared no more, and one that was zero is written.
    disk.write_zeroes((7 << 14) + 512..(7 << 14) + 1024).unwrap();
    model[(7 << 14) + 512..(7 << 14) + 1024].fill(0);
    disk.write_at((7 << 14) + 9 * 512, &[0xcd; 512]).unwrap();
    model[(7 << 14) + 9 * 512..][..512].fill(0xcd);
    disk.close().unwrap();
    let after = file.bytes();
    assert_ne!(entry_of(&after, 7).1, host);
    assert!(after[host as usize..][..1 << 14] == old, "the cluster of the others");
    let mut below = base_bytes(400_000);
    below.resize(model.len(), 0);
    let seen = spec::look(&after, &below).unwrap();
    assert_eq!((seen.verdict.errors, seen.verdict.leaks), (vec![], 1), "counted, and not named");
    assert!(seen.guest == model);
}

/// Protects: V30. What an extended entry cannot say is an error where it is used, for reads and
/// writes; the clusters beside it can be read.
#[test]
fn extended_entries_that_cannot_be_are_reported() {
    let start = extended(20 << 14, 400_000);
    let shown = seen_at_start(&start);
    let (_, host) = entry_of(&start.bytes(), 7);
    let named = 1 << 63 | host;
    for (descriptor, bitmap, what) in [
        (named, 1_u64 << 40 | 1 << 8, "both allocated and zero"),
        (0, 1, "without a host cluster"),
        (named | 1, 0xff, "zero flag"),
        (1 << 62 | host, 1 << 63, "compressed and has a subcluster bitmap"),
        (named | 0x200, 0xff, "not cluster aligned"),
    ] {
        let mut bytes = start.bytes();
        let (at, _) = entry_of(&bytes, 7);
        bytes[at..at + 8].copy_from_slice(&descriptor.to_be_bytes());
        bytes[at + 8..at + 16].copy_from_slice(&bitmap.to_be_bytes());
        let disk = open(&SimStorage::new(bytes.clone()), 400_000);
        let mut buf = vec![0; 6 << 14];
        disk.read_at(0, &mut buf).unwrap();
        assert!(buf == shown[..6 << 14], "{what}");
        for error in [
            disk.read_at(7 << 14, &mut [0; 512]).unwrap_err(),
            disk.write_at(7 << 14, &[0; 512]).unwrap_err(),
        ] {
            assert_eq!(error.kind(), ErrorKind::Corrupt, "{error}");
            assert!(error.to_string().contains(what), "{error}: {what}");
        }
        assert!(!disk.is_usable(), "{what}");
        let report = Qcow2::check(&*SimStorage::new(bytes)).unwrap();
        assert!(report.corruptions > 0 || what == "zero flag", "{what}: {report:?}");
    }
}
