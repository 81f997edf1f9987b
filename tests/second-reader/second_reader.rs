//! An independent second reader beside `qemu-img`: the crate `qcow2-rs` 0.1.6 reads images that
//! cordisk wrote.
//!
//! Two readers that share no code with cordisk or with each other must agree with a plain byte
//! vector. `qcow2-rs` can read version 3 images with clusters of 4 KiB or more, whose backing file
//! is qcow2, not shorter than the overlay, and named by an absolute path. The tests use such
//! images.
//!
//! The last tests show why the crate is a reader here and not the engine (`docs/engine.md`): a
//! write that it reported as flushed is lost after the next read of another place. They assert that
//! the defect still exists. If they fail, that document must be reviewed.

use std::path::{Path, PathBuf};
use std::process::Command;

use engine::chain::Gate;
use engine::create::{CreateOptions, create};
use engine::disk::{Disk, DiskOptions};
use qcow2::format::{BackingFormat, Header, L1Entry, Mapping};
use qcow2_rs::dev::{Qcow2Dev, Qcow2DevParams};
use qcow2_rs::helpers::Qcow2IoBuf;
use qcow2_rs::meta::{MappingSource, Qcow2Header};
use qcow2_rs::ops::Qcow2IoOps;
use qcow2_rs::utils::{qcow2_setup_dev_sync, qcow2_setup_dev_tokio, qcow2_setup_dev_uring};

const MIB: u64 = 1 << 20;

/// Skips the test with a reason when a program is missing; fails instead where all programs are
/// required (CI).
macro_rules! requires {
    ($($need:expr),+) => {
        if [$($need),+].into_iter().any(is_missing) {
            return;
        }
    };
}

/// The three ways in which qcow2-rs does its I/O.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum BackEnd {
    /// pread(2) and pwrite(2).
    Sync,
    /// tokio's file, on its blocking threads.
    Tokio,
    /// io_uring, where the kernel and its policy allow it.
    Uring,
}

impl BackEnd {
    /// Returns the back ends that work on this machine. If io_uring is disabled (seccomp,
    /// `kernel.io_uring_disabled`), this function says so on stderr; it is no error.
    pub fn available() -> Vec<BackEnd> {
        let mut all = vec![BackEnd::Sync, BackEnd::Tokio];
        if std::panic::catch_unwind(|| tokio_uring::start(async {})).is_ok() {
            all.push(BackEnd::Uring);
        } else {
            eprintln!(
                "qcow2-rs: its io_uring back end is left out, this machine does not offer io_uring"
            );
        }
        all
    }
}

/// Returns the whole virtual disk of a version 3 image, read by qcow2-rs with its synchronous back
/// end.
///
/// # Panics
/// If qcow2-rs cannot read the image; the head of this file says which images it can read.
pub fn read_all(path: &Path) -> Vec<u8> {
    read_all_with(BackEnd::Sync, path)
}

/// Like [`read_all`], with the given back end.
pub fn read_all_with(back_end: BackEnd, path: &Path) -> Vec<u8> {
    let params = Qcow2DevParams::new(9, None, None, true, false);
    match back_end {
        BackEnd::Sync => runtime().block_on(async {
            let dev = qcow2_setup_dev_sync(path, &params).expect("qcow2-rs opens");
            dev.qcow2_prep_io().await.expect("qcow2-rs loads tables");
            read_device(&dev).await
        }),
        BackEnd::Tokio => runtime().block_on(async {
            read_device(&qcow2_setup_dev_tokio(path, &params).await.expect("qcow2-rs opens")).await
        }),
        BackEnd::Uring => tokio_uring::start(async {
            read_device(&qcow2_setup_dev_uring(path, &params).await.expect("qcow2-rs opens")).await
        }),
    }
}

/// Reads one cluster per call, because a read of several clusters returns success and a short count
/// when one of them fails.
async fn read_device<T: Qcow2IoOps>(dev: &Qcow2Dev<T>) -> Vec<u8> {
    let size = dev.info.virtual_size();
    let step = dev.info.cluster_size() as u64;
    let mut all = Vec::with_capacity(usize::try_from(size).unwrap());
    let mut at = 0;
    while at < size {
        let len = usize::try_from(step.min(size - at)).unwrap();
        let mut buf = Qcow2IoBuf::<u8>::new(len);
        // qcow2-rs may report success without writing to the buffer; a buffer of zeros would hide
        // that.
        buf.fill(0xee);
        let read = dev
            .read_at(&mut buf, at)
            .await
            .unwrap_or_else(|error| panic!("qcow2-rs reads {len} bytes at {at}: {error}"));
        assert_eq!(read, len, "qcow2-rs read {read} of {len} bytes at {at}");
        all.extend_from_slice(&buf);
        at += len as u64;
    }
    all
}

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_current_thread().build().unwrap()
}

// ---- cordisk writes, qcow2-rs reads

#[test]
fn qcow2_rs_reads_what_the_disk_wrote() {
    requires!("qemu-img");
    // Sizes: a multiple of the cluster size, and one sector more than that (qcow2-rs reads whole
    // sectors only).
    for (cluster_size, size) in
        [(4096, 3 * MIB), (65536, 8 * MIB), (65536, 8 * MIB + 512), (2 * MIB, 16 * MIB)]
    {
        let scratch = tempfile::tempdir().unwrap();
        let (overlay, shadow) = busy_overlay(scratch.path(), cluster_size, size);
        for back_end in BackEnd::available() {
            let read = read_all_with(back_end, &overlay);
            assert_same(
                &format!("{back_end:?}, clusters of {cluster_size}, size {size}"),
                &read,
                &shadow,
            );
        }
        qemu_img_says_clean(&overlay);
        let raw = scratch.path().join("converted.raw");
        run_ok(
            Command::new("qemu-img")
                .args(["convert", "-f", "qcow2", "-O", "raw"])
                .args([&overlay, &raw]),
        );
        assert_same("qemu-img convert", &std::fs::read(raw).unwrap(), &shadow);
    }
}

/// Both decoders read the same bytes of a file and must agree in every field that both know.
#[test]
fn qcow2_rs_decodes_header_and_tables_as_we_do() {
    requires!("qemu-img");
    for cluster_size in [4096, 65536, 2 * MIB] {
        let scratch = tempfile::tempdir().unwrap();
        let (overlay, shadow) = busy_overlay(scratch.path(), cluster_size, 16 * MIB);
        assert_same("qcow2-rs", &read_all(&overlay), &shadow);
        let file = std::fs::read(&overlay).unwrap();
        let first = &file[..file.len().min(usize::try_from(cluster_size).unwrap())];
        let ours = Header::parse(first, file.len() as u64).unwrap();
        let theirs = Qcow2Header::from_buf(first).unwrap();
        assert_eq!(theirs.version(), ours.geometry.version());
        assert_eq!(theirs.cluster_bits(), ours.geometry.cluster_bits());
        assert_eq!(theirs.refcount_order(), ours.geometry.refcount_order());
        assert_eq!(theirs.size(), ours.geometry.size());
        assert_eq!(theirs.l1_table_offset(), ours.l1_table_offset);
        assert_eq!(theirs.l1_table_entries(), ours.l1_size as usize);
        assert_eq!(theirs.reftable_offset(), ours.refcount_table_offset);
        assert_eq!(theirs.reftable_clusters(), ours.refcount_table_clusters as usize);
        assert_eq!(theirs.nb_snapshots(), ours.nb_snapshots);
        assert_eq!(theirs.crypt_method(), 0);
        assert_eq!(theirs.compression_type(), 0);
        let backing = ours.backing.as_ref().expect("the overlay names its base");
        assert_eq!(theirs.backing_filename(), Some(&backing.name));
        assert_eq!(
            (backing.format, theirs.backing_format().map(String::as_str)),
            (Some(BackingFormat::Qcow2), Some("qcow2"))
        );

        let params = Qcow2DevParams::new(9, None, None, true, false);
        let mappings = runtime().block_on(async {
            let dev = qcow2_setup_dev_tokio(&overlay, &params).await.unwrap();
            let mut mappings = Vec::new();
            for at in (0..ours.geometry.size()).step_by(usize::try_from(cluster_size).unwrap()) {
                mappings.push(dev.get_mapping(at).await.unwrap());
            }
            mappings
        });
        let mut seen = Seen::default();
        for (cluster, theirs) in mappings.iter().enumerate() {
            let ours_here = our_mapping(&file, &ours, cluster as u64);
            let at = |host| ours.geometry.host_offset(host).0;
            let agree = match ours_here {
                Mapping::Unallocated => theirs.source == MappingSource::Backing,
                Mapping::Zero { reserved: None } => {
                    theirs.source == MappingSource::Zero
                        && theirs.cluster_offset.is_none()
                        && !theirs.copied
                }
                Mapping::Zero { reserved: Some((host, in_place)) } => {
                    theirs.source == MappingSource::Zero
                        && theirs.cluster_offset == Some(at(host))
                        && theirs.copied == in_place
                }
                Mapping::Data { host, in_place } => {
                    theirs.source == MappingSource::DataFile
                        && theirs.cluster_offset == Some(at(host))
                        && theirs.copied == in_place
                }
                Mapping::Compressed { .. } => false, // cordisk never writes one
            };
            assert!(
                agree,
                "guest cluster {cluster} of {cluster_size} bytes: we say {ours_here:?}, qcow2-rs says {theirs}"
            );
            match ours_here {
                Mapping::Unallocated => seen.unallocated += 1,
                Mapping::Zero { .. } => seen.zero += 1,
                Mapping::Data { in_place, .. } => {
                    assert!(
                        in_place,
                        "guest cluster {cluster}: a cluster that we allocated belongs to us alone (R9)"
                    );
                    seen.data += 1;
                }
                Mapping::Compressed { .. } => {}
            }
        }
        // The comparison is meaningful only if every kind occurred.
        assert!(seen.unallocated > 0 && seen.data > 0, "{seen:?}");
        assert!(seen.zero > 0 || cluster_size == 2 * MIB, "{seen:?}");
    }
}

#[derive(Debug, Default)]
struct Seen {
    unallocated: u32,
    zero: u32,
    data: u32,
}

/// Finds and decodes the L2 entry of a guest cluster with the module `format` alone.
fn our_mapping(file: &[u8], header: &Header, cluster: u64) -> Mapping {
    let geometry = &header.geometry;
    let entry = |table: u64, index: usize| {
        let at = usize::try_from(table).unwrap() + index * 8;
        u64::from_be_bytes(file[at..at + 8].try_into().unwrap())
    };
    let (l1_index, l2_index) = geometry.table_indexes(qcow2::format::GuestCluster(cluster));
    match L1Entry::decode(entry(header.l1_table_offset, l1_index), geometry).unwrap() {
        None => Mapping::Unallocated,
        Some(l1) => {
            assert!(
                l1.in_place,
                "the only reference to an L2 table that we wrote has COPIED set (R9)"
            );
            Mapping::decode(entry(geometry.host_offset(l1.table).0, l2_index), geometry).unwrap()
        }
    }
}

/// Makes an overlay above a qcow2 base, performs every kind of request on it, and closes it.
/// Returns it with the bytes that it must hold.
fn busy_overlay(directory: &Path, cluster_size: u64, size: u64) -> (PathBuf, Vec<u8>) {
    let len = usize::try_from(size).unwrap();
    let mut shadow: Vec<u8> =
        (0..len).map(|at| u8::try_from((at / 512 * 7 + at % 251) % 255 + 1).unwrap()).collect();
    shadow[len / 2..len * 5 / 8].fill(0); // copied up, this becomes zero clusters
    let raw = directory.join("base.raw");
    let base = directory.join("base.qcow2");
    std::fs::write(&raw, &shadow).unwrap();
    run_ok(
        Command::new("qemu-img").args(["convert", "-f", "raw", "-O", "qcow2"]).args([&raw, &base]),
    );
    std::fs::remove_file(raw).unwrap();

    let overlay = directory.join("overlay.qcow2");
    create_over(&overlay, &base, BackingFormat::Qcow2, None, cluster_size);
    let disk = open_disk(&overlay);
    assert_eq!(disk.size(), size);

    let mut write = |at: u64, len: usize, byte: u8| {
        let data = vec![byte; len];
        disk.write(at, &data).unwrap();
        shadow[usize::try_from(at).unwrap()..][..len].copy_from_slice(&data);
    };
    write(0, 512, 0xa1); // part of a cluster: the rest comes from the base
    write(cluster_size - 1, 2, 0xa2); // across a cluster boundary, odd length
    write(4 * cluster_size, usize::try_from(cluster_size).unwrap(), 0xa3); // one whole cluster
    write(4 * cluster_size + 100, 1000, 0xa4); // in place
    write(size - 512, 512, 0xa5); // the last sector
    for range in [2 * cluster_size..2 * cluster_size + 700, 5 * cluster_size..6 * cluster_size] {
        disk.write_zeroes(range.clone()).unwrap();
        shadow[usize::try_from(range.start).unwrap()..usize::try_from(range.end).unwrap()].fill(0);
    }
    let discarded = 4 * cluster_size + 50..5 * cluster_size; // the tail of a data cluster
    disk.discard(discarded.clone()).unwrap();
    shadow[usize::try_from(discarded.start).unwrap()..usize::try_from(discarded.end).unwrap()]
        .fill(0);
    // Copy-on-read: the overlay now holds the ranges that were read, some of them as zeros.
    for at in [len / 2, len * 9 / 16] {
        let mut buf = vec![0xee; 4096];
        disk.read(at as u64, &mut buf).unwrap();
        assert_same("a read through the disk", &buf, &shadow[at..at + 4096]);
    }
    disk.flush().unwrap();
    close(disk);
    (overlay, shadow)
}

// ---- why qcow2-rs is not the engine

const OLD: u8 = 0xbb;
const NEW: u8 = 0xaa;

/// The first defect of the list in docs/engine.md, in qcow2-rs 0.1.6: "a flushed write is lost
/// without an error".
///
/// The sequence on an overlay of 256 MiB: write 64 KiB at 0, flush, read 4 KiB at 100 MiB, flush;
/// every call succeeds. The crate keeps L2 tables in slices of 4 KiB, and the two offsets are in
/// different slices of one table. QEMU then finds the old data at 0, and a leaked cluster.
#[test]
fn qcow2_rs_0_1_6_still_loses_a_flushed_write() {
    requires!("qemu-img", "qemu-io");
    for back_end in BackEnd::available() {
        let scratch = tempfile::tempdir().unwrap();
        let overlay = old_base_and_overlay(scratch.path());
        let params = Qcow2DevParams::new(9, None, None, false, false);
        match back_end {
            BackEnd::Sync => runtime().block_on(async {
                let dev = qcow2_setup_dev_sync(&overlay, &params).unwrap();
                dev.qcow2_prep_io().await.unwrap();
                write_flush_read_flush(&dev).await;
            }),
            BackEnd::Tokio => runtime().block_on(async {
                write_flush_read_flush(&qcow2_setup_dev_tokio(&overlay, &params).await.unwrap())
                    .await
            }),
            BackEnd::Uring => tokio_uring::start(async {
                write_flush_read_flush(&qcow2_setup_dev_uring(&overlay, &params).await.unwrap())
                    .await
            }),
        }
        let lost = qemu_io_finds(&overlay, 0, 65536, OLD);
        let leaks = qemu_img_check(&overlay).leaks;
        assert!(
            lost && leaks >= 1,
            "qcow2-rs ({back_end:?}) kept the flushed write (old data: {lost}, leaked clusters: {leaks}): its first defect is gone, \
             so docs/engine.md wants to be measured again"
        );
    }
}

async fn write_flush_read_flush<T: Qcow2IoOps>(dev: &Qcow2Dev<T>) {
    let mut data = Qcow2IoBuf::<u8>::new(65536);
    data.fill(NEW);
    dev.write_at(&data, 0).await.expect("write");
    dev.flush_meta().await.expect("first flush");
    dev.fsync_range(0, usize::MAX).await.expect("first fsync");
    let mut elsewhere = Qcow2IoBuf::<u8>::new(4096);
    assert_eq!(dev.read_at(&mut elsewhere, 100 * MIB).await.expect("read"), 4096);
    dev.flush_meta().await.expect("second flush");
    dev.fsync_range(0, usize::MAX).await.expect("second fsync");
}

/// The same sequence with cordisk's engine. The test reads the overlay as it is on disk right after
/// the second flush, before anything is closed.
#[test]
fn cordisk_keeps_a_flushed_write_in_the_same_sequence() {
    requires!("qemu-img", "qemu-io");
    let scratch = tempfile::tempdir().unwrap();
    let overlay = old_base_and_overlay(scratch.path());
    let disk = open_disk(&overlay);
    disk.write(0, &[NEW; 65536]).unwrap();
    disk.flush().unwrap();
    let mut elsewhere = [0xee; 4096];
    disk.read(100 * MIB, &mut elsewhere).unwrap();
    assert_eq!(elsewhere, [OLD; 4096]);
    disk.flush().unwrap();

    let copy = scratch.path().join("after-flush.qcow2");
    std::fs::copy(&overlay, &copy).unwrap();
    assert!(qemu_io_finds(&copy, 0, 65536, NEW), "the write that was flushed is not there");
    assert!(qemu_io_finds(&copy, 65536, 65536, OLD), "its neighbour changed");
    assert_eq!(qemu_img_check(&copy).corruptions, 0);

    close(disk);
    assert!(qemu_io_finds(&overlay, 0, 65536, NEW), "the write is not there after close");
    qemu_img_says_clean(&overlay);
}

/// Makes a base of 256 MiB whose first MiB and whose 4 KiB at 100 MiB hold `OLD`, and an empty
/// overlay above it, with qemu-img, as in the report of the defect. The base is qcow2, because
/// qcow2-rs opens no other format.
fn old_base_and_overlay(directory: &Path) -> PathBuf {
    let base = directory.join("base.qcow2");
    run_ok(Command::new("qemu-img").args(["create", "-q", "-f", "qcow2"]).arg(&base).arg("256M"));
    let fill = [format!("write -q -P {OLD} 0 1M"), format!("write -q -P {OLD} 100M 64k")];
    run_ok(
        Command::new("qemu-io").args(["-f", "qcow2", "-c", &fill[0], "-c", &fill[1]]).arg(&base),
    );
    let overlay = directory.join("overlay.qcow2");
    run_ok(
        Command::new("qemu-img")
            .args(["create", "-q", "-f", "qcow2", "-F", "qcow2", "-b"])
            .args([&base, &overlay]),
    );
    overlay
}

// ---- helpers

fn is_missing(program: &str) -> bool {
    let path = std::env::var("PATH").unwrap_or_default();
    let missing = !path.split(':').any(|dir| Path::new(dir).join(program).is_file());
    let required = |name| std::env::var(name).is_ok_and(|value| value == "1" || value == "true");
    assert!(
        !(missing && (required("CI") || required("CORDISK_REQUIRE_ALL"))),
        "the program {program} is not installed"
    );
    if missing {
        eprintln!("skipped: the program {program} is not installed");
    }
    missing
}

fn run_ok(command: &mut Command) {
    let done = command.output().unwrap_or_else(|error| panic!("cannot start {command:?}: {error}"));
    assert!(done.status.success(), "{command:?}: {}", String::from_utf8_lossy(&done.stderr));
}

fn assert_same(what: &str, got: &[u8], want: &[u8]) {
    assert_eq!(got.len(), want.len(), "{what}: length");
    let first = got.iter().zip(want).position(|(got, want)| got != want);
    assert_eq!(
        first.map(|at| (at, got[at], want[at])),
        None,
        "{what}: the first byte that differs, what it is and what it should be"
    );
}

fn create_over(
    overlay: &Path,
    base: &Path,
    format: BackingFormat,
    size: Option<u64>,
    cluster_size: u64,
) {
    let base = base.to_str().unwrap().to_string();
    let options = CreateOptions {
        overlay: overlay.to_path_buf(),
        base,
        format,
        size,
        cluster_size,
        extended_l2: false,
    };
    create(&options, &engine::chain::Gate::default()).unwrap();
}

fn open_disk(overlay: &Path) -> Disk {
    Disk::open(
        overlay,
        &DiskOptions {
            read_only: false,
            copy_on_read: true,
            gate: Gate::default(),
            full_check: false,
            reserve: None,
        },
    )
    .unwrap()
}

/// Closes the disk and drops it, which releases the file and its locks, so that QEMU can open it.
#[allow(clippy::needless_pass_by_value)]
fn close(disk: Disk) {
    disk.close().unwrap();
}

struct Checked {
    corruptions: u64,
    leaks: u64,
}

fn qemu_img_check(image: &Path) -> Checked {
    let output = Command::new("qemu-img")
        .args(["check", "-f", "qcow2", "--output=json"])
        .arg(image)
        .output()
        .unwrap();
    let report: serde_json::Value =
        serde_json::from_slice(&output.stdout).unwrap_or_else(|error| {
            panic!("qemu-img check: {error}: {}", String::from_utf8_lossy(&output.stderr))
        });
    let number = |name: &str| report[name].as_u64().unwrap_or(0);
    assert_eq!(number("check-errors"), 0, "{report}");
    Checked { corruptions: number("corruptions"), leaks: number("leaks") }
}

fn qemu_img_says_clean(image: &Path) {
    let Checked { corruptions, leaks } = qemu_img_check(image);
    assert_eq!(
        (corruptions, leaks),
        (0, 0),
        "qemu-img check of {}: (corruptions, leaks)",
        image.display()
    );
}

/// Whether QEMU reads only `byte` in this range.
fn qemu_io_finds(image: &Path, at: u64, len: u64, byte: u8) -> bool {
    let read = format!("read -P {byte} {at} {len}");
    let output = Command::new("qemu-io")
        .args(["-r", "-f", "qcow2", "-c", &read])
        .arg(image)
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(
        text.contains(&format!("read {len}/{len} bytes")),
        "qemu-io: {text}{}",
        String::from_utf8_lossy(&output.stderr)
    );
    !text.contains("Pattern verification failed")
}
