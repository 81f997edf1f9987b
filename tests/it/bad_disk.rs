//! Host disks that fail: one sector of the base, a base that shrinks, an overlay that cannot be
//! written, an overlay whose flush fails (P5 to P9). `qmp_error_policy.rs` tests what a stream does
//! after errors.

use std::fs::{self, File};
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::time::Duration;

use rustix::io::Errno;
use serde_json::json;

use crate::support::mounts::umount;
use crate::support::nbd::{Fault, NbdFile};
use crate::support::{
    CLUSTER, Daemon, KIB, MIB, Mount, Pattern, Rig, Rng, Scratch, assert_same, errno, qemu,
    read_at, run_ok,
};

const SIZE: u64 = 4 * MIB;

fn at(offset: u64) -> usize {
    usize::try_from(offset).expect("small")
}

fn slice<'a>(content: &'a [u8], range: &Range<u64>) -> &'a [u8] {
    &content[at(range.start)..at(range.end)]
}

fn read(file: &File, range: &Range<u64>) -> std::io::Result<Vec<u8>> {
    let mut buf = vec![0xEE; at(range.end - range.start)];
    file.read_exact_at(&mut buf, range.start).map(|()| buf)
}

/// Reads random ranges: those that touch `bad` fail with EIO, all others return the right data.
fn assert_only_this_is_bad(file: &File, content: &[u8], bad: &Range<u64>, rng: &mut Rng) {
    let mut failed = 0;
    for _ in 0..300 {
        // Half of them are around the bad range.
        let range = match rng.below(2) {
            0 => rng.range(SIZE, 300_000),
            _ => {
                let part = rng.range(4 * CLUSTER, 40_000);
                let start = bad.start.saturating_sub(2 * CLUSTER);
                start + part.start..(start + part.end).min(SIZE)
            }
        };
        match read(file, &range) {
            Ok(got) => {
                assert!(
                    range.end <= bad.start || bad.end <= range.start,
                    "{range:?} touches {bad:?} and was read"
                );
                assert_same(&format!("{range:?}"), &got, slice(content, &range));
            }
            Err(error) => {
                assert_eq!(error.raw_os_error(), Some(Errno::IO.raw_os_error()), "{range:?}");
                assert!(
                    range.start < bad.end && bad.start < range.end,
                    "{range:?} does not touch {bad:?} and was not read"
                );
                failed += 1;
            }
        }
    }
    assert!(failed > 0, "the bad place was never met");
}

/// Protects: P8. One bad sector of 4 KiB in the base is EIO for requests that touch it and for no
/// others, and nothing of its cluster is copied up. A write that needs the rest of the cluster from
/// the base fails and changes nothing; a write of the whole cluster does not need the base. When
/// the sector is readable again, reads return it, and a stream completes.
#[test]
fn one_bad_sector_of_the_base() {
    requires!("/dev/fuse", "qemu-img", "nbdkit", "nbdfuse");
    let mut rng = Rng::for_test("one bad sector of the base");
    let scratch = Scratch::new();
    let mut content = Pattern::new(90, 1).bytes(0, SIZE);
    let bad = MIB + 3 * CLUSTER + 20 * KIB..MIB + 3 * CLUSTER + 24 * KIB;
    let cluster = MIB + 3 * CLUSTER..MIB + 4 * CLUSTER;
    let base = NbdFile::serve(&scratch, "base.raw", &content, &bad);
    let overlay = scratch.join("overlay.qcow2");
    qemu::create(&overlay, None, "", Some(("base.raw", "raw")));
    base.fail(Fault::Read);
    let disk = Mount::named(&scratch, &overlay, "bad").start();
    let file = disk.open();
    assert_only_this_is_bad(&file, &content, &bad, &mut rng);
    for offset in (0..SIZE).step_by(at(4 * KIB)) {
        let page = offset..offset + 4 * KIB;
        match read(&file, &page) {
            Ok(got) => assert_same("page", &got, slice(&content, &page)),
            Err(error) => assert_eq!(
                (page, error.raw_os_error()),
                (bad.clone(), Some(Errno::IO.raw_os_error()))
            ),
        }
    }
    // The rest of the cluster would have to come from the bad sector.
    let part = cluster.start + 5000;
    assert_eq!(errno(file.write_all_at(&[7; 3000], part)), Errno::IO);
    assert_same(
        "what was not overwritten",
        &read_at(&file, part, 3000),
        slice(&content, &(part..part + 3000)),
    );
    drop(file);
    disk.umount();
    qemu::assert_clean(&overlay);
    assert_eq!(
        qemu::local_ranges(&overlay),
        [0..cluster.start, cluster.end..SIZE],
        "all but the bad cluster was copied up"
    );

    // A write of the whole cluster needs nothing from the base, and hides the bad sector
    // permanently.
    let whole = scratch.join("whole.qcow2");
    qemu::create(&whole, None, "", Some(("base.raw", "raw")));
    let disk = Mount::named(&scratch, &whole, "whole").start();
    let file = disk.open();
    let mut want = content.clone();
    let data = Pattern::new(91, 2).bytes(cluster.start, CLUSTER);
    file.write_all_at(&data, cluster.start).expect("a whole cluster");
    want[at(cluster.start)..at(cluster.end)].copy_from_slice(&data);
    drop(file);
    assert_same("nothing is bad any more", &disk.read_all(), &want);
    disk.umount();

    base.repair(Fault::Read);
    let disk = Mount::named(&scratch, &overlay, "good").qmp().start();
    let file = disk.open();
    assert_same("good again", &read_at(&file, bad.start, 4096), slice(&content, &bad));
    file.write_all_at(&[7; 3000], part).expect("the rest of the cluster is there now");
    content[at(part)..at(part) + 3000].fill(7);
    drop(file);
    assert_same("all of it", &disk.read_all(), &content);
    let mut client = disk.client();
    client.ok("block-stream", json!({"device": "drive0"}));
    client.wait_completed();
    drop(client);
    disk.umount();
    drop(base);
    qemu::assert_clean(&overlay);
    qemu::assert_independent(&overlay);
    assert_same("the overlay alone", &qemu::read_all(&overlay), &content);
}

/// An overlay on a disk that can fail, above a base on a disk that does not.
struct BadOverlay {
    // Fields are dropped in this order.
    served: NbdFile,
    want: Vec<u8>,
    scratch: Scratch,
}

impl BadOverlay {
    fn new() -> BadOverlay {
        let scratch = Scratch::new();
        let want = Pattern::new(93, 1).bytes(0, SIZE);
        let base = scratch.write("base.raw", &want);
        let image = scratch.join("image");
        qemu::create(&image, None, "", Some((base.to_str().expect("UTF-8"), "raw")));
        // The image is as long as it will ever get, like on a block device.
        run_ok(std::process::Command::new("truncate").args(["-s", "8M"]).arg(&image));
        let served =
            NbdFile::serve(&scratch, "overlay", &fs::read(&image).expect("image"), &(0..0));
        BadOverlay { served, want, scratch }
    }

    fn mount(&self, name: &str) -> Daemon {
        Mount::named(&self.scratch, self.served.path(), name)
            .args(&["--reserve", "0"])
            .qmp()
            .start()
    }

    fn write(&mut self, file: &File, offset: u64, version: u32) {
        let data = Pattern::new(94, version).bytes(offset, 5000);
        file.write_all_at(&data, offset)
            .unwrap_or_else(|error| panic!("write at {offset}: {error}"));
        self.want[at(offset)..at(offset) + 5000].copy_from_slice(&data);
    }

    fn refuse(&self, file: &File, offset: u64) {
        assert_eq!(errno(file.write_all_at(&[9; 5000], offset)), Errno::IO, "write at {offset}");
    }
}

/// Protects: P5 and P6. While the overlay cannot be written, all reads succeed, of local and of
/// missing clusters. A write fails alone and changes no mapping; a stream fails and keeps the base.
/// When the disk works again, everything works without a new mount, and the image has no
/// corruption.
#[test]
fn an_overlay_that_cannot_be_written_for_a_while() {
    requires!("/dev/fuse", "qemu-img", "nbdkit", "nbdfuse");
    let mut bad = BadOverlay::new();
    let disk = bad.mount("disk");
    let file = disk.open();
    bad.write(&file, 10 * CLUSTER + 100, 2);
    assert_same(
        "a part is local",
        &read_at(&file, 0, at(4 * CLUSTER)),
        &bad.want[..at(4 * CLUSTER)],
    );
    file.sync_all().expect("fsync");

    bad.served.fail(Fault::Write);
    assert_same("local and cold", &disk.read_all(), &bad.want);
    assert!(disk.log().contains("copy-on-read failed"), "no copy was ever tried\n{}", disk.log());
    bad.refuse(&file, 20 * CLUSTER + 5);
    assert_same(
        "what was not written",
        &read_at(&file, 20 * CLUSTER, 9000),
        &bad.want[at(20 * CLUSTER)..at(20 * CLUSTER) + 9000],
    );
    let mut client = disk.client();
    client.ok("block-stream", json!({"device": "drive0"}));
    let event = client.wait_event("BLOCK_JOB_COMPLETED");
    assert_eq!(event["data"]["error"], "Input/output error", "{event}");
    assert_same("after the job", &disk.read_all(), &bad.want);

    bad.served.repair(Fault::Write);
    bad.write(&file, 20 * CLUSTER + 5, 3);
    file.sync_all().expect("a flush when the disk is good again");
    assert_same("good again", &disk.read_all(), &bad.want);
    client.ok("block-stream", json!({"device": "drive0"}));
    client.wait_completed();
    drop((file, client));
    disk.umount();
    qemu::assert_clean(bad.served.below());
    qemu::assert_independent(bad.served.below());
    assert_same("the overlay alone", &qemu::read_all(bad.served.below()), &bad.want);
}

/// Protects: P7. After one failed flush no flush and no write succeeds any more, even if the disk
/// works again, because the kernel does not say which writes the failed one has lost. Reads
/// continue, and the exit status reports the error. A new mount starts with all data that had been
/// flushed.
#[test]
fn a_flush_that_failed_is_final() {
    requires!("/dev/fuse", "qemu-img", "nbdkit", "nbdfuse");
    let mut bad = BadOverlay::new();
    let mut disk = bad.mount("first");
    let file = disk.open();
    bad.write(&file, 10 * CLUSTER + 100, 2);
    bad.write(&file, MIB, 3);
    file.sync_all().expect("fsync");
    bad.served.fail(Fault::Flush);
    // The write is in place, so that it is there whether or not it was flushed: this host does not
    // drop its page cache.
    bad.write(&file, MIB, 4);
    assert_eq!(errno(file.sync_all()), Errno::IO);
    bad.served.repair(Fault::Flush);
    for _ in 0..3 {
        assert_eq!(errno(file.sync_all()), Errno::IO, "never retried with success");
        bad.refuse(&file, MIB);
        bad.refuse(&file, 30 * CLUSTER);
    }
    assert_same("reads go on", &disk.read_all(), &bad.want);
    let mut client = disk.client();
    client.ok("block-stream", json!({"device": "drive0"}));
    let event = client.wait_event("BLOCK_JOB_COMPLETED");
    assert_eq!(event["data"]["error"], "Input/output error", "{event}");
    assert_eq!(event["data"]["offset"], 0, "{event}");
    drop((file, client));
    umount(disk.path());
    let status = disk.ended_within(Duration::from_secs(30)).expect("it ends");
    assert_eq!(status.code(), Some(1), "{}", disk.log());
    drop(disk);
    qemu::assert_not_corrupt(bad.served.below());

    let disk = bad.mount("second");
    let file = disk.open();
    assert_same("all that was flushed", &disk.read_all(), &bad.want);
    bad.write(&file, MIB, 5);
    file.sync_all().expect("a new mount begins anew");
    drop(file);
    disk.umount();
    qemu::assert_not_corrupt(bad.served.below());
    assert_same("in the end", &qemu::read_all(bad.served.below()), &bad.want);
}

/// Protects: P10: the first mount records the state of the base; the next mount warns if the state
/// has changed since, and only then.
#[test]
fn a_base_that_changed_between_two_mounts_is_warned_of() {
    requires!("/dev/fuse", "qemu-img");
    let rig = Rig::new(MIB);
    // The daemons of one scratch directory share a log.
    let warnings_after_a_mount = || {
        let disk = rig.mount().start();
        assert_same("whatever the base is like", &disk.read_all(), &rig.content);
        let warnings = disk.log().matches("a backing file was changed or exchanged").count();
        disk.umount();
        warnings
    };
    assert_eq!(warnings_after_a_mount(), 0, "nothing was noted yet");
    assert_eq!(warnings_after_a_mount(), 0, "nothing has changed");
    File::options()
        .write(true)
        .open(&rig.base)
        .expect("base")
        .set_modified(std::time::UNIX_EPOCH)
        .expect("another time");
    assert_eq!(warnings_after_a_mount(), 1, "the base has changed");
    assert_eq!(warnings_after_a_mount(), 2, "and nobody has said that it may");
    rustix::fs::removexattr(&rig.overlay, "user.cordisk.base").expect("accepted");
    assert_eq!(warnings_after_a_mount(), 2, "noted anew");
    rig.assert_overlay(&rig.content);
}

/// Protects: P8. One L2 entry that points outside the file makes only the cluster that it maps
/// unreadable, in a backing file and in an image that is mounted read-only. SEEK_DATA reports the
/// cluster as data, so that no copy skips it. An overlay above a base with such an entry can be
/// written, and a write hides the cluster.
#[test]
fn one_bad_table_entry() {
    requires!("/dev/fuse", "qemu-img");
    let mut rng = Rng::for_test("one bad table entry");
    let scratch = Scratch::new();
    let content = Pattern::new(93, 1).bytes(0, SIZE);
    let damaged = scratch.join("damaged.qcow2");
    qemu::create_full(&damaged, SIZE, "", Pattern::new(93, 1));
    let file = File::options().read(true).write(true).open(&damaged).expect("the image");
    let word = |at: u64| u64::from_be_bytes(read_at(&file, at, 8).try_into().expect("8 bytes"));
    let table = word(word(40)) & !(1 << 63);
    let bad = 20 * CLUSTER..21 * CLUSTER;
    file.write_all_at(&(1_u64 << 63 | 1 << 40).to_be_bytes(), table + 20 * 8).expect("the entry");

    let overlay = scratch.join("overlay.qcow2");
    qemu::create(&overlay, None, "", Some(("damaged.qcow2", "qcow2")));
    let disk = Mount::named(&scratch, &overlay, "above").start();
    let file = disk.open();
    assert_only_this_is_bad(&file, &content, &bad, &mut rng);
    assert_eq!(rustix::fs::seek(&file, rustix::fs::SeekFrom::Data(bad.start)), Ok(bad.start));
    let data = Pattern::new(94, 2).bytes(bad.start, CLUSTER);
    file.write_all_at(&data, bad.start).expect("the whole cluster");
    drop(file);
    let mut want = content.clone();
    want[at(bad.start)..at(bad.end)].copy_from_slice(&data);
    assert_same("nothing is bad any more", &disk.read_all(), &want);
    disk.umount();

    let disk = Mount::named(&scratch, &damaged, "itself").args(&["--read-only"]).start();
    let file = File::open(disk.path()).expect("the disk");
    assert_only_this_is_bad(&file, &content, &bad, &mut rng);
    let map = run_ok(scratch.cordisk().args(["map", "--json"]).arg(disk.path()));
    let map: serde_json::Value = serde_json::from_str(&map).expect("JSON");
    let run = map
        .as_array()
        .expect("runs")
        .iter()
        .find(|run| run["start"] == bad.start)
        .expect("a run of its own");
    assert_eq!(
        (&run["length"], &run["data"], &run["zero"]),
        (&json!(CLUSTER), &json!(true), &json!(false))
    );
    assert_eq!(run.get("offset"), None);
    drop(file);
    disk.umount();
}
