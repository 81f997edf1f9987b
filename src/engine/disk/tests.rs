//! Tests of the disk against a plain byte vector, above real files, with qemu-img as the judge.

use std::path::{Path, PathBuf};
use std::process::Command;

use super::*;

fn make(options: &CreateOptions) -> Result<()> {
    create(options, &Gate::default())
}
use crate::chain::Gate;
use crate::create::{CreateOptions, create};
use host::storage::{Access, FileStorage};
use qcow2::format::{BackingFormat, GuestOffset, Mapping};
use sim::random::Random;

mod changed_layers;
mod leak_finder;
mod subclusters;
mod successor;

fn drawn(random: &mut Random, len: usize) -> Vec<u8> {
    // Some runs are zeros, because zeros are detected when they are copied up.
    if random.below(4) == 0 {
        vec![0; len]
    } else {
        (0..len).map(|_| random.next() as u8).collect()
    }
}

fn options() -> DiskOptions {
    DiskOptions {
        read_only: false,
        copy_on_read: true,
        gate: Gate::default(),
        full_check: false,
        reserve: None,
    }
}

fn open(path: &Path) -> Disk {
    Disk::open(path, &options()).unwrap()
}

fn run(program: &str, args: &[&str]) -> String {
    let output = Command::new(program).args(args).output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned()
        + &String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{program} {args:?}: {text}");
    text
}

/// Asserts that the image has no corruption and no leak.
fn check(path: &Path) {
    run("qemu-img", &["check", "-f", "qcow2", &path.display().to_string()]);
}

/// The guest's bytes as QEMU reads them.
fn qemu_reads(path: &Path) -> Vec<u8> {
    let raw = path.with_extension("out");
    run(
        "qemu-img",
        &[
            "convert",
            "-f",
            "qcow2",
            "-O",
            "raw",
            &path.display().to_string(),
            &raw.display().to_string(),
        ],
    );
    std::fs::read(raw).unwrap()
}

fn overlay_on(base: &Path, format: &str, size: Option<u64>, qemu_options: &str) -> PathBuf {
    let overlay =
        base.with_file_name(format!("overlay-{}.qcow2", qemu_options.replace([',', '='], "-")));
    let size = size.map(|size| size.to_string());
    let mut args = vec!["create", "-q", "-f", "qcow2", "-b", base.to_str().unwrap(), "-F", format];
    if !qemu_options.is_empty() {
        args.extend(["-o", qemu_options]);
    }
    args.push(overlay.to_str().unwrap());
    args.extend(size.as_deref());
    run("qemu-img", &args);
    overlay
}

fn raw_base(dir: &Path, len: usize, random: &mut Random) -> (PathBuf, Vec<u8>) {
    let mut bytes = Vec::new();
    while bytes.len() < len {
        let piece = 1 + random.below(40_000) as usize;
        bytes.extend(drawn(random, piece.min(len - bytes.len())));
    }
    let path = dir.join("base.raw");
    std::fs::write(&path, &bytes).unwrap();
    (path, bytes)
}

/// Random reads, writes, zeroes, discards, populates, flushes and re-opens. At each re-open, QEMU
/// checks the image; at the end, QEMU also reads it.
fn model(qemu_options: &str, base_len: usize, size: u64, operations: u32, seed: u64) {
    let mut random = Random::of_test(seed);
    let dir = tempfile::tempdir().unwrap();
    let (base, bytes) = raw_base(dir.path(), base_len, &mut random);
    let overlay = overlay_on(&base, "raw", Some(size), qemu_options);
    let mut expected = bytes;
    expected.resize(size as usize, 0);
    let mut disk = open(&overlay);
    assert_eq!(disk.size(), size);
    for operation in 0..operations {
        let offset = random.below(size);
        let longest = 1 + random.below(300_000);
        let len = 1 + random.below((size - offset).min(longest));
        let range = offset as usize..(offset + len) as usize;
        match random.below(16) {
            0..=5 => {
                let data = drawn(&mut random, len as usize);
                disk.write(offset, &data).unwrap();
                expected[range].copy_from_slice(&data);
            }
            6..=9 => {
                let mut buf = vec![0xa5; len as usize];
                disk.read(offset, &mut buf).unwrap();
                assert!(
                    buf == expected[range],
                    "operation {operation}: read of {len} at {offset} with {qemu_options}"
                );
            }
            10 => {
                disk.write_zeroes(offset..offset + len).unwrap();
                expected[range].fill(0);
            }
            11 => {
                disk.discard(offset..offset + len).unwrap();
                expected[range].fill(0);
            }
            12..=13 => {
                disk.populate(offset..offset + len, usize::MAX).unwrap();
            }
            14 => disk.flush().unwrap(),
            _ => {
                disk.close().unwrap();
                drop(disk);
                check(&overlay);
                disk = open(&overlay);
            }
        }
    }
    disk.populate(0..size, usize::MAX).unwrap();
    disk.detach_backing(usize::MAX, None).unwrap();
    std::fs::remove_file(&base).unwrap();
    let mut all = vec![0; size as usize];
    disk.read(0, &mut all).unwrap();
    assert!(all == expected, "after detaching, {qemu_options}");
    disk.close().unwrap();
    drop(disk);
    check(&overlay);
    assert!(qemu_reads(&overlay) == expected, "QEMU after detaching, {qemu_options}");
}

#[test]
fn model_default() {
    model("", 3_000_000, 4 << 20, 300, 1);
}

#[test]
fn model_512_byte_clusters_grow_every_table() {
    model("cluster_size=512", 700_001, 1 << 20, 300, 2);
    model("cluster_size=512,refcount_bits=64", 900_001, 1 << 20, 200, 3);
}

#[test]
fn model_2_mib_clusters() {
    model("cluster_size=2M", 5_000_000, 9 << 20, 100, 4);
}

#[test]
fn model_version_2() {
    model("compat=0.10", 3_000_000, 4 << 20, 200, 5);
    model("compat=0.10,cluster_size=4k", 700_000, (1 << 20) + 512, 200, 6);
}

#[test]
fn model_every_refcount_width() {
    for (seed, bits) in [1, 2, 4, 8, 32, 64].into_iter().enumerate() {
        model(
            &format!("refcount_bits={bits},cluster_size=4k"),
            1_000_000,
            2 << 20,
            120,
            10 + seed as u64,
        );
    }
}

#[test]
fn model_base_longer_than_the_overlay() {
    model("cluster_size=4k", 2_000_000, (1 << 20) + 1536, 200, 7);
}

#[test]
fn model_subclusters() {
    model("extended_l2=on,cluster_size=16k", 700_001, (1 << 20) + 1536, 400, 8);
    model("extended_l2=on", 3_000_000, 4 << 20, 300, 9);
    model("extended_l2=on,cluster_size=2M,refcount_bits=64", 5_000_000, 9 << 20, 150, 10);
}

/// Protects: compressed clusters are read, and copied when they are written to. Both of their host
/// clusters then lose a reference. With subclusters, a part of a compressed cluster that becomes
/// zero leaves its other bytes.
#[test]
fn compressed_overlay_is_rewritten_without_leaks() {
    for (kind, cluster) in [
        ("zlib", "64k"),
        ("zstd", "64k"),
        ("zlib", "4k"),
        ("zlib", "2M"),
        ("zlib", "64k,extended_l2=on"),
        ("zstd", "16k,extended_l2=on"),
    ] {
        let mut random = Random::of_test(20);
        let dir = tempfile::tempdir().unwrap();
        let mut bytes = vec![0; 3 << 20];
        for (index, byte) in bytes.iter_mut().enumerate() {
            *byte = (index / 300) as u8;
        }
        let raw = dir.path().join("in.raw");
        std::fs::write(&raw, &bytes).unwrap();
        let image = dir.path().join("compressed.qcow2");
        let option = format!("compression_type={kind},cluster_size={cluster}");
        run(
            "qemu-img",
            &[
                "convert",
                "-c",
                "-f",
                "raw",
                "-O",
                "qcow2",
                "-o",
                &option,
                raw.to_str().unwrap(),
                image.to_str().unwrap(),
            ],
        );
        let disk = open(&image);
        let mut all = vec![0; bytes.len()];
        disk.read(0, &mut all).unwrap();
        assert!(all == bytes, "{option}");
        for _ in 0..60 {
            let offset = random.below(3 << 20);
            let len = (1 + random.below(100_000)).min((3 << 20) - offset);
            let data = drawn(&mut random, len as usize);
            disk.write(offset, &data).unwrap();
            bytes[offset as usize..(offset + len) as usize].copy_from_slice(&data);
            let zeros = offset / 2..offset / 2 + len / 2;
            let place = zeros.start as usize..zeros.end as usize;
            match random.below(10) {
                0 => disk.flush().unwrap(),
                1 => {
                    disk.write_zeroes(zeros).unwrap();
                    bytes[place].fill(0);
                }
                2 => {
                    disk.discard(zeros).unwrap();
                    bytes[place].fill(0);
                }
                _ => {}
            }
        }
        disk.discard(0..700_000).unwrap();
        bytes[..700_000].fill(0);
        disk.close().unwrap();
        drop(disk);
        check(&image);
        assert!(qemu_reads(&image) == bytes, "{option}");
    }
}

/// Protects: an image that grows to nearly 800 refcount blocks. Its refcount table moves, more than
/// once between two flushes.
#[test]
fn refcount_table_moves() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("grow.qcow2");
    run(
        "qemu-img",
        &[
            "create",
            "-q",
            "-f",
            "qcow2",
            "-o",
            "cluster_size=512,refcount_bits=64",
            path.to_str().unwrap(),
            "64M",
        ],
    );
    let disk = open(&path);
    let before = disk.reader().header().refcount_table_offset;
    let data: Vec<u8> = (0..24u32 << 20).map(|index| (index >> 9) as u8 | 1).collect();
    for (index, piece) in data.chunks(1 << 20).enumerate() {
        disk.write((index as u64) << 20, piece).unwrap();
    }
    disk.close().unwrap();
    assert_ne!(disk.reader().header().refcount_table_offset, before);
    drop(disk);
    check(&path);
    assert!(qemu_reads(&path)[..data.len()] == data);
    // A new open finds the moved table.
    let disk = open(&path);
    disk.write(40 << 20, &data[..1 << 20]).unwrap();
    disk.close().unwrap();
    drop(disk);
    check(&path);
}

#[test]
fn growing_moves_the_l1_table_and_hides_a_longer_base() {
    let mut random = Random::of_test(30);
    let dir = tempfile::tempdir().unwrap();
    let (base, bytes) = raw_base(dir.path(), 3 << 20, &mut random);
    let overlay = overlay_on(&base, "raw", Some((1 << 20) + 1536), "cluster_size=4k");
    let disk = open(&overlay);
    disk.write(4096, b"guest").unwrap();
    assert_eq!(disk.grow(1 << 20).unwrap_err().kind(), ErrorKind::InvalidArgument);
    assert_eq!(disk.grow((4 << 20) + 1).unwrap_err().kind(), ErrorKind::InvalidArgument);
    disk.grow(200 << 20).unwrap();
    disk.write(150 << 20, b"far out").unwrap();
    let mut expected = bytes;
    expected.truncate((1 << 20) + 1536);
    expected.resize(200 << 20, 0);
    expected[4096..4101].copy_from_slice(b"guest");
    expected[150 << 20..][..7].copy_from_slice(b"far out");
    let mut all = vec![0; 200 << 20];
    disk.read(0, &mut all).unwrap();
    assert!(all == expected);
    disk.close().unwrap();
    drop(disk);
    check(&overlay);
    assert!(qemu_reads(&overlay) == expected);
}

#[test]
fn read_only_changes_nothing_and_copies_nothing() {
    let mut random = Random::of_test(40);
    let dir = tempfile::tempdir().unwrap();
    let (base, bytes) = raw_base(dir.path(), 1 << 20, &mut random);
    let overlay = overlay_on(&base, "raw", None, "");
    let before = std::fs::read(&overlay).unwrap();
    let disk = Disk::open(&overlay, &DiskOptions { read_only: true, ..options() }).unwrap();
    let mut all = vec![0; 1 << 20];
    disk.read(0, &mut all).unwrap();
    assert!(all == bytes);
    assert_eq!(disk.write(0, b"x").unwrap_err().kind(), ErrorKind::ReadOnly);
    assert_eq!(disk.discard(0..65536).unwrap_err().kind(), ErrorKind::ReadOnly);
    assert_eq!(disk.populate(0..65536, 1).unwrap_err().kind(), ErrorKind::ReadOnly);
    disk.close().unwrap();
    assert!(std::fs::read(&overlay).unwrap() == before);
}

#[test]
fn partial_stream_keeps_the_base_and_its_relative_name() {
    let mut random = Random::of_test(50);
    let dir = tempfile::tempdir().unwrap();
    let (base, mut expected) = raw_base(dir.path(), 2 << 20, &mut random);
    let middle = dir.path().join("middle.qcow2");
    // The middle layer is shorter than the base. Beyond its end the disk is zero, and must stay so
    // when the layer is detached.
    let mid_size = (1 << 20) + 512;
    make(&CreateOptions {
        overlay: middle.clone(),
        base: "base.raw".into(),
        format: BackingFormat::Raw,
        size: Some(mid_size),
        cluster_size: 4096,
        extended_l2: false,
    })
    .unwrap();
    let disk = open(&middle);
    disk.write(100_000, b"middle").unwrap();
    disk.discard(200_000..300_000).unwrap();
    disk.close().unwrap();
    drop(disk);
    expected.truncate(mid_size as usize);
    expected.resize(2 << 20, 0);
    expected[100_000..100_006].copy_from_slice(b"middle");
    expected[200_000..300_000].fill(0);
    let overlay = dir.path().join("top.qcow2");
    make(&CreateOptions {
        overlay: overlay.clone(),
        base: "middle.qcow2".into(),
        format: BackingFormat::Qcow2,
        size: Some(2 << 20),
        cluster_size: 65536,
        extended_l2: false,
    })
    .unwrap();
    let _ = base;
    let disk = open(&overlay);
    assert_eq!(
        disk.detach_backing(1, None).unwrap_err().kind(),
        ErrorKind::InvalidArgument,
        "nothing was populated yet"
    );
    disk.populate(0..2 << 20, 1).unwrap();
    disk.detach_backing(1, None).unwrap();
    std::fs::remove_file(&middle).unwrap();
    let info = disk.info().unwrap();
    assert_eq!(info.backing.len(), 1);
    assert_eq!(info.backing[0].reference.name, "base.raw");
    let mut all = vec![0; 2 << 20];
    disk.read(0, &mut all).unwrap();
    assert!(all == expected);
    disk.close().unwrap();
    drop(disk);
    check(&overlay);
    assert!(qemu_reads(&overlay) == expected);
}

#[test]
fn seek_sees_through_the_chain() {
    let dir = tempfile::tempdir().unwrap();
    let base = dir.path().join("base.raw");
    let file = std::fs::File::create(&base).unwrap();
    file.set_len(1 << 20).unwrap();
    std::os::unix::fs::FileExt::write_all_at(&file, &[7; 4096], 512 << 10).unwrap();
    let overlay = overlay_on(&base, "raw", Some(2 << 20), "");
    let disk = open(&overlay);
    assert_eq!(disk.seek(0, Seek::Data).unwrap(), Some(512 << 10));
    assert_eq!(disk.seek(512 << 10, Seek::Hole).unwrap(), Some((512 << 10) + 4096));
    assert_eq!(disk.seek(600 << 10, Seek::Data).unwrap(), None);
    disk.write((2 << 20) - 1, b"x").unwrap();
    assert_eq!(disk.seek(600 << 10, Seek::Data).unwrap(), Some((2 << 20) - 65536));
    assert_eq!(disk.seek((2 << 20) - 100, Seek::Hole).unwrap(), Some(2 << 20));
    disk.discard(512 << 10..576 << 10).unwrap();
    assert_eq!(disk.seek(0, Seek::Data).unwrap(), Some((2 << 20) - 65536));
    disk.close().unwrap();
}

/// Protects: no write is lost among concurrent reads, writes, discards, flushes and a stream. Each
/// worker owns a third of the sectors and knows their content.
#[test]
fn concurrent_requests_never_lose_a_write() {
    const SIZE: u64 = 4 << 20;
    let mut random = Random::of_test(60);
    let dir = tempfile::tempdir().unwrap();
    let (base, bytes) = raw_base(dir.path(), SIZE as usize, &mut random);
    for option in ["cluster_size=4k", "", "compat=0.10,cluster_size=4k"] {
        let overlay = overlay_on(&base, "raw", None, option);
        let disk = open(&overlay);
        let seeds: Vec<u64> = (0..3).map(|_| random.next()).collect();
        let mut finals: Vec<Vec<u8>> = Vec::new();
        std::thread::scope(|scope| {
            let workers: Vec<_> = (0..3u64)
                .map(|worker| {
                    let (disk, mut mine, seed) = (&disk, bytes.clone(), seeds[worker as usize]);
                    scope.spawn(move || {
                        let mut random = Random(seed | 1);
                        for _ in 0..600 {
                            // Sectors of 512 bytes are assigned to the workers in turn, so all
                            // workers share every cluster.
                            let sector = random.below(SIZE / 512 / 3) * 3 + worker;
                            let range = (sector * 512) as usize..(sector * 512 + 512) as usize;
                            match random.below(4) {
                                0 | 1 => {
                                    let data = drawn(&mut random, 512);
                                    disk.write(range.start as u64, &data).unwrap();
                                    mine[range].copy_from_slice(&data);
                                }
                                2 => {
                                    disk.discard(range.start as u64..range.end as u64).unwrap();
                                    mine[range].fill(0);
                                }
                                _ => {
                                    let mut buf = [0; 512];
                                    disk.read(range.start as u64, &mut buf).unwrap();
                                    assert!(
                                        buf[..] == mine[range],
                                        "worker {worker}, sector {sector}, {option}"
                                    );
                                }
                            }
                        }
                        mine
                    })
                })
                .collect();
            scope.spawn(|| {
                for chunk in 0..SIZE / (64 << 10) {
                    disk.populate(chunk * (64 << 10)..(chunk + 1) * (64 << 10), usize::MAX)
                        .unwrap();
                    if chunk % 8 == 0 {
                        disk.flush().unwrap();
                    }
                }
                disk.detach_backing(usize::MAX, None).unwrap();
            });
            finals = workers.into_iter().map(|worker| worker.join().unwrap()).collect();
        });
        let mut expected = vec![0; SIZE as usize];
        for (sector, out) in expected.chunks_mut(512).enumerate() {
            out.copy_from_slice(&finals[sector % 3][sector * 512..sector * 512 + 512]);
        }
        disk.close().unwrap();
        assert!(disk.info().unwrap().backing.is_empty());
        drop(disk);
        check(&overlay);
        assert!(qemu_reads(&overlay) == expected, "{option}");
    }
}

/// Protects V28: the full check counts as QEMU does, and refuses an image that writing would
/// damage.
#[test]
fn full_check_agrees_with_qemu() {
    let mut random = Random::of_test(70);
    let dir = tempfile::tempdir().unwrap();
    let (base, _) = raw_base(dir.path(), 3 << 20, &mut random);
    let checked = DiskOptions { full_check: true, ..options() };
    for option in ["", "cluster_size=512,refcount_bits=64", "compat=0.10,cluster_size=4k"] {
        let overlay = overlay_on(&base, "raw", None, option);
        let disk = Disk::open(&overlay, &checked).unwrap();
        disk.populate(0..2 << 20, usize::MAX).unwrap();
        disk.discard(100_000..300_000).unwrap();
        disk.close().unwrap();
        drop(disk);
        assert_eq!(image_check(&overlay), (0, 0), "{option}");
        // Refcounts that are wrong: one too high, one too low, and one of an unused cluster.
        let mut bytes = std::fs::read(&overlay).unwrap();
        let field =
            |bytes: &[u8], at: usize| u64::from_be_bytes(bytes[at..at + 8].try_into().unwrap());
        let bits = if option.contains("64") { 64 } else { 16 };
        let cluster_size = 1 << u32::from_be_bytes(bytes[20..24].try_into().unwrap());
        let entries = cluster_size * 8 / bits;
        let table = field(&bytes, 48) as usize;
        let set = |bytes: &mut [u8], cluster: usize, value: u8| {
            let block = field(bytes, table + cluster / entries * 8) as usize;
            assert_ne!(block, 0);
            bytes[block + (cluster % entries + 1) * bits / 8 - 1] = value;
        };
        let l1 = field(&bytes, 40) as usize;
        let used = (field(&bytes, l1) & 0x00ff_ffff_ffff_fe00) as usize / cluster_size;
        set(&mut bytes, used, 2);
        std::fs::write(&overlay, &bytes).unwrap();
        // A cluster counted twice is a leak, and its COPIED bit is wrong.
        assert_eq!(image_check(&overlay), (1, 1), "{option}");
        let error = Disk::open(&overlay, &checked).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Corrupt);
        assert!(error.to_string().contains("qemu-img check -r all"), "{error}");
        set(&mut bytes, used, 0);
        std::fs::write(&overlay, &bytes).unwrap();
        assert_eq!(
            Disk::open(&overlay, &checked).unwrap_err().kind(),
            ErrorKind::Corrupt,
            "in use and not counted, {option}"
        );
        // An unused cluster that is counted is a leak, and no reason to refuse the image.
        set(&mut bytes, used, 1);
        bytes.resize(bytes.len().next_multiple_of(cluster_size) + cluster_size, 0);
        let last = bytes.len() / cluster_size - 1;
        if field(&bytes, table + last / entries * 8) != 0 {
            set(&mut bytes, last, 1);
            std::fs::write(&overlay, &bytes).unwrap();
            assert_eq!(image_check(&overlay), (0, 1), "{option}");
            Disk::open(&overlay, &checked).unwrap().close().unwrap();
            assert_eq!(image_check(&overlay), (0, 0), "{option}: what is leaked is given back");
        }
    }
}

/// Numbers of corruptions and leaks that cordisk's check finds.
fn image_check(path: &Path) -> (u64, u64) {
    let report = qcow2::image::check(&FileStorage::open(path, Access::ReadOnly).unwrap()).unwrap();
    (report.corruptions, report.leaks)
}

/// Protects H18: a grown disk never shows the base in its new range, not even after a kill. This
/// also holds if QEMU has written the last cluster of the smaller disk.
#[test]
fn growing_never_shows_the_base_even_when_killed() {
    for option in ["", "compat=0.10", "cluster_size=4k"] {
        let mut random = Random::of_test(80);
        let dir = tempfile::tempdir().unwrap();
        let (base, mut expected) = raw_base(dir.path(), 3 << 20, &mut random);
        let size = (1 << 20) + 512;
        let overlay = overlay_on(&base, "raw", Some(size), option);
        // QEMU copies up whole clusters, and with the last one the bytes beyond the end of the
        // disk.
        run("qemu-io", &["-f", "qcow2", "-c", "write -P 1 1M 512", overlay.to_str().unwrap()]);
        expected[1 << 20..size as usize].fill(1);
        expected[size as usize..].fill(0);
        let disk = open(&overlay);
        disk.grow(3 << 20).unwrap();
        let copy = dir.path().join("killed.qcow2");
        std::fs::copy(&overlay, &copy).unwrap();
        let copy = open(&copy);
        assert_eq!(copy.size(), 3 << 20);
        for disk in [disk, copy] {
            let mut all = vec![0; 3 << 20];
            disk.read(0, &mut all).unwrap();
            assert!(all == expected, "{option}");
            disk.close().unwrap();
            let path = disk.info().unwrap().path;
            drop(disk);
            assert!(qemu_reads(&path) == expected, "{option}");
        }
        check(&overlay);
    }
}

/// Protects: version 2 has no zero clusters, so a discard writes zeros only where the backing file
/// holds data. (Once, a trim of free space filled the host's file system.)
#[test]
fn discard_in_version_2_writes_only_what_it_must() {
    let dir = tempfile::tempdir().unwrap();
    let base = dir.path().join("base.raw");
    let file = std::fs::File::create(&base).unwrap();
    file.set_len(8 << 30).unwrap();
    std::os::unix::fs::FileExt::write_all_at(&file, &[7; 300_000], 1 << 30).unwrap();
    let overlay = overlay_on(&base, "raw", None, "compat=0.10");
    let disk = Disk::open(&overlay, &DiskOptions { copy_on_read: false, ..options() }).unwrap();
    disk.write(5 << 30, b"guest").unwrap();
    disk.discard(0..8 << 30).unwrap();
    let mut buf = vec![1; 1 << 20];
    for at in [0, (1 << 30) - 4096, 1 << 30, 5 << 30, (8 << 30) - (1 << 20)] {
        disk.read(at, &mut buf).unwrap();
        assert!(buf.iter().all(|&byte| byte == 0), "at {at}");
    }
    disk.close().unwrap();
    assert!(disk.allocated_size().unwrap() < 1 << 20, "{} bytes", disk.allocated_size().unwrap());
    drop(disk);
    check(&overlay);
}

/// Protects: a request that needs no backing file is completed without one, and one that needs it
/// changes nothing.
#[test]
fn what_needs_no_base_is_done_without_it() {
    const CLUSTER: u64 = 65536;
    let dir = tempfile::tempdir().unwrap();
    let base = dir.path().join("base.raw");
    std::fs::write(&base, vec![7; 1 << 20]).unwrap();
    let disk = open(&overlay_on(&base, "raw", None, ""));
    let whole = vec![1; 2 * CLUSTER as usize];
    // Whole clusters, which the base holds as well.
    let held = disk.hold_for_tests(3 * CLUSTER..4 * CLUSTER);
    let beside = std::thread::scope(|scope| {
        scope.spawn(|| disk.write_local(2 * CLUSTER, &whole).unwrap()).join().unwrap()
    });
    assert_eq!(beside, Local::Miss, "another request has one of the clusters");
    drop(held);
    assert_eq!(disk.write_local(2 * CLUSTER, &whole).unwrap(), Local::Done);
    let large = vec![1; 3 * CLUSTER as usize];
    assert_eq!(disk.write_local(9 * CLUSTER, &large).unwrap(), Local::Miss, "too long at once");
    assert_eq!(disk.write_without_base(2 * CLUSTER, &whole).unwrap(), Local::Done);
    // The first write begins inside a cluster of the overlay and ends with a whole new cluster. The
    // next ones end inside another cluster.
    assert_eq!(
        disk.write_without_base(7 * CLUSTER / 2, &vec![2; 3 * CLUSTER as usize / 2]).unwrap(),
        Local::Done
    );
    assert_eq!(
        disk.write_local(4 * CLUSTER, &vec![3; CLUSTER as usize + 1]).unwrap(),
        Local::Below
    );
    assert_eq!(
        disk.write_without_base(4 * CLUSTER, &vec![3; CLUSTER as usize + 1]).unwrap(),
        Local::Below
    );
    assert_eq!(disk.discard_without_base(6 * CLUSTER..8 * CLUSTER).unwrap(), Local::Done);
    assert_eq!(disk.write_zeroes_without_base(8 * CLUSTER..9 * CLUSTER).unwrap(), Local::Done);
    for edge in [
        9 * CLUSTER - 1..10 * CLUSTER + 1,
        9 * CLUSTER + 1..10 * CLUSTER,
        11 * CLUSTER + 1..11 * CLUSTER + 2,
    ] {
        assert_eq!(disk.discard_without_base(edge.clone()).unwrap(), Local::Below, "{edge:?}");
        assert_eq!(disk.write_zeroes_without_base(edge.clone()).unwrap(), Local::Below, "{edge:?}");
    }
    assert_eq!(
        disk.write_without_base(6 * CLUSTER + 5, &[4]).unwrap(),
        Local::Done,
        "what was discarded is zero around it"
    );
    assert_eq!(disk.seek_without_base(2 * CLUSTER, Seek::Data).unwrap(), Some(Some(2 * CLUSTER)));
    assert_eq!(disk.seek_without_base(7 * CLUSTER, Seek::Hole).unwrap(), Some(Some(7 * CLUSTER)));
    assert_eq!(
        disk.seek_without_base(7 * CLUSTER, Seek::Data).unwrap(),
        None,
        "the base decides what comes next"
    );
    let mut buf = vec![0; CLUSTER as usize];
    assert_eq!(disk.read_without_base(7 * CLUSTER / 2, &mut buf).unwrap(), Local::Done);
    assert!(buf.iter().all(|&byte| byte == 2));
    assert_eq!(disk.read_without_base(9 * CLUSTER, &mut buf).unwrap(), Local::Below);
    assert_eq!(disk.stats().backing_reads, RequestCount::default());

    let mut all = vec![0; 1 << 20];
    disk.read(0, &mut all).unwrap();
    let mut want = vec![7; 1 << 20];
    let mut put = |range: std::ops::Range<u64>, byte| {
        want[range.start as usize..range.end as usize].fill(byte)
    };
    put(2 * CLUSTER..7 * CLUSTER / 2, 1);
    put(7 * CLUSTER / 2..5 * CLUSTER, 2);
    put(6 * CLUSTER..9 * CLUSTER, 0);
    put(6 * CLUSTER + 5..6 * CLUSTER + 6, 4);
    // Requests that returned `Below` have written nothing, because they map their whole range
    // first.
    assert!(all == want);
}

/// Protects: a request is counted once, whether it is a hit or a miss that the blocking sibling
/// completes.
#[test]
fn requests_are_counted_once() {
    let dir = tempfile::tempdir().unwrap();
    let base = dir.path().join("base.raw");
    std::fs::write(&base, vec![7; 1 << 20]).unwrap();
    let disk = open(&overlay_on(&base, "raw", None, ""));
    assert_eq!(disk.stats(), DiskStats::default());
    let mut buf = vec![0; 4096];
    let count = |bytes, operations, failed| (bytes, operations, failed);
    let numbers = |count: RequestCount| (count.bytes, count.operations, count.failed);

    assert_eq!(disk.read_local(0, &mut buf).unwrap(), Local::Below);
    assert_eq!(disk.read_without_base(0, &mut buf).unwrap(), Local::Below);
    assert_eq!(disk.stats().reads, RequestCount::default(), "nothing was answered yet");
    disk.read(0, &mut buf).unwrap();
    assert_eq!(disk.read_local(0, &mut buf).unwrap(), Local::Done);
    let stats = disk.stats();
    assert_eq!(numbers(stats.reads), count(8192, 2, 0));
    assert_eq!(numbers(stats.backing_reads), count(65536, 1, 0), "the whole cluster, once");
    assert_eq!((stats.misses, stats.hits()), (1, 1));
    assert_eq!(stats.copied_up, CopyCount { bytes: 65536, operations: 1, failed: 0 });
    assert!(
        stats.reads.time >= stats.backing_reads.time
            && stats.backing_reads.time > std::time::Duration::ZERO
    );
    assert!(stats.idle.is_some());

    assert_eq!(disk.write_local(65536, &buf).unwrap(), Local::Below);
    assert_eq!(disk.write_without_base(65536, &buf).unwrap(), Local::Below);
    disk.write(65536, &buf).unwrap();
    // The edges are written by inner writes, but one request is counted.
    disk.write_zeroes(131_072 + 512..262_144 + 512).unwrap();
    disk.discard(0..65536).unwrap();
    disk.flush().unwrap();
    assert!(
        disk.read(1 << 20, &mut buf).is_err()
            && disk.write(1 << 20, &buf).is_err()
            && disk.discard(0..1 << 21).is_err()
    );
    let populated = disk.populate(0..1 << 20, usize::MAX).unwrap();
    let stats = disk.stats();
    assert_eq!(
        (stats.streamed, populated.copied),
        ((1 << 20) - 262_144 - 65536, (1 << 20) - 262_144 - 65536)
    );
    assert_eq!(
        (stats.misses, stats.copied_up.operations),
        (1, 1),
        "writes and streams are no reads"
    );
    assert_eq!(stats.commits, 1, "one flush, which had something to write");
    disk.flush_if_dirty().unwrap();
    assert_eq!(disk.stats().commits, 2);
    assert_eq!(numbers(stats.reads), count(8192, 2, 1));
    assert_eq!(numbers(stats.writes), count(4096 + 131_072, 2, 1));
    assert_eq!(numbers(stats.discards), count(65536, 1, 1));
    assert_eq!(numbers(stats.flushes), count(0, 1, 0));
    assert_eq!(stats.highest_written, 262_144 + 512);

    disk.count_flush_of_nothing();
    disk.count_flush_of_nothing();
    assert_eq!(numbers(disk.stats().flushes), count(0, 3, 0));
    let activity = disk.activity();
    // At once: the second read, the zeroes, the flushes of nothing. After a wait: the first read,
    // the write, the other flush.
    assert_eq!(activity.costs.map(|cost| cost.operations), [1, 1, 2, 1, 1, 1]);
    let [read, _, _, waited, ..] = activity.costs;
    assert_eq!(read.time + waited.time, stats.reads.time);
    assert!(!activity.is_waiting && !activity.is_flushing && activity.idle.is_some());
}

/// Protects: a discard of a part of an unallocated cluster copies nothing up if those bytes are
/// zeros below, as a hole or as data that must be read. If they are not zeros, the discard is exact
/// as well.
#[test]
fn edges_of_a_discard_are_copied_up_only_where_they_hide_something() {
    let dir = tempfile::tempdir().unwrap();
    let base = dir.path().join("base.raw");
    let file = std::fs::File::create(&base).unwrap();
    file.set_len(1 << 20).unwrap();
    let mut expected = vec![0; 1 << 20];
    // Cluster 1: data with written zeros in the middle. Cluster 3: data. All others: holes.
    expected[65_536..131_072].fill(1);
    expected[80_000..120_000].fill(0);
    expected[196_608..262_144].fill(3);
    std::os::unix::fs::FileExt::write_all_at(&file, &expected[65_536..131_072], 65_536).unwrap();
    std::os::unix::fs::FileExt::write_all_at(&file, &expected[196_608..262_144], 196_608).unwrap();
    let overlay = overlay_on(&base, "raw", None, "");
    let disk = Disk::open(&overlay, &DiskOptions { copy_on_read: false, ..options() }).unwrap();
    let is_local = |cluster: u64| {
        disk.reader().map(GuestOffset(cluster << 16), 1).unwrap().mapping != Mapping::Unallocated
    };
    let compare = |expected: &[u8]| {
        let mut got = vec![9; 1 << 20];
        disk.read(0, &mut got).unwrap();
        assert!(got == expected);
    };

    disk.discard(100..5_000).unwrap();
    disk.discard(80_000..120_000).unwrap();
    disk.write_zeroes(85_000..86_000).unwrap();
    assert!(!is_local(0) && !is_local(1), "nothing is hidden that is not zero anyway");
    compare(&expected);
    disk.discard(79_999..120_000).unwrap();
    expected[79_999] = 0;
    assert!(is_local(1), "one byte is");
    disk.discard(200_000..300_000).unwrap();
    expected[200_000..300_000].fill(0);
    assert!(is_local(3) && !is_local(4));
    compare(&expected);
    disk.close().unwrap();
    drop(disk);
    check(&overlay);
    assert!(qemu_reads(&overlay) == expected);
}

/// Protects: an image that was not closed is read from its disk: an open drops the host's cached
/// pages of it. `check` and `--full-check` do so with any image.
///
/// The file is large against what an open reads, so half of its pages are far more than that.
#[test]
fn what_the_host_has_in_memory_of_an_image_that_was_not_closed_is_dropped() {
    const MARK: &str = "user.cordisk.open";
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("image.qcow2");
    let overlay = dir.path().join("overlay.qcow2");
    let raw = dir.path().join("data.raw");
    let mut random = Random::of_test(7);
    // No byte is zero: zeros would take no space in the image.
    let content: Vec<u8> = (0..24 << 20).map(|_| random.next() as u8 | 1).collect();
    std::fs::write(&raw, content).unwrap();
    let text = |path: &Path| path.to_str().unwrap().to_string();
    run("qemu-img", &["convert", "-O", "qcow2", &text(&raw), &text(&image)]);
    run(
        "qemu-img",
        &["create", "-q", "-f", "qcow2", "-b", &text(&image), "-F", "qcow2", &text(&overlay)],
    );
    let file = std::fs::File::open(&image).unwrap();
    let set_mark = |is_set: bool| {
        let flags = rustix::fs::XattrFlags::empty();
        if is_set {
            rustix::fs::fsetxattr(&file, MARK, b"1", flags)
        } else {
            rustix::fs::fremovexattr(&file, MARK)
        }
    };
    if set_mark(true).is_err() {
        println!("skipped: no extended attributes here");
        return;
    }
    set_mark(false).unwrap();
    // fincore(1) asks with mincore(2), which reads nothing. A read with `RWF_NOWAIT` would start
    // readahead where it finds no page, and can then find the page that it has just read.
    let resident = || -> u64 {
        let counted = std::process::Command::new("fincore")
            .args(["--bytes", "--noheadings", "--output", "RES", &text(&image)])
            .output()
            .expect("fincore of util-linux");
        let printed = String::from_utf8(counted.stdout).unwrap();
        printed.trim().parse().unwrap_or_else(|_| panic!("fincore printed {printed:?}"))
    };
    let check = |repair| {
        qcow2::check::check(&qcow2::check::CheckOptions {
            image: image.clone(),
            repair,
            output: qcow2::check::Output::Json,
        })
    };
    let cases: [(&str, bool, &dyn Fn()); 6] = [
        ("for writing", true, &|| drop(Disk::open(&image, &options()).unwrap())),
        ("for reading", true, &|| {
            drop(Disk::open(&image, &DiskOptions { read_only: true, ..options() }).unwrap())
        }),
        ("as a backing file", true, &|| drop(Disk::open(&overlay, &options()).unwrap())),
        ("with a full check", false, &|| {
            drop(Disk::open(&image, &DiskOptions { full_check: true, ..options() }).unwrap())
        }),
        ("to be checked", false, &|| drop(check(None).unwrap())),
        ("to be repaired", false, &|| drop(check(Some(qcow2::check::Repair::Leaks)).unwrap())),
    ];
    for (what, is_marked, open) in cases {
        file.sync_all().unwrap();
        let size = std::fs::read(&image).unwrap().len() as u64;
        assert!(size > 24 << 20, "the image has {size} bytes");
        set_mark(true).unwrap();
        if !is_marked {
            set_mark(false).unwrap();
        }
        if resident() < size {
            println!("skipped, {what}: this host does not keep the whole file in memory");
            continue;
        }
        open();
        // What the open itself reads, and the kernel reads ahead of it, is less than half.
        let left = resident();
        assert!(left < size / 2, "opened {what}: {left} of {size} bytes are still in memory");
    }
}
