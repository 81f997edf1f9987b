//! Backing files that are changed in place while a disk uses them (P9, P10), and backing files that
//! only change their names.

use std::fs::{self, File};
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::Path;

use rustix::io::Errno;
use serde_json::json;

use crate::support::{
    CLUSTER, Daemon, MIB, Mount, Pattern, Rig, Scratch, assert_same, errno, qemu, run_ok,
    run_within,
};

const SIZE: u64 = 4 * MIB;

type Change = fn(&Path);

fn writable(path: &Path) -> File {
    File::options().write(true).open(path).expect("base")
}

fn status(scratch: &Scratch, disk: &Daemon) -> String {
    run_ok(scratch.cordisk().arg("status").arg(disk.path()))
}

/// Protects: P9, P10. However the base is changed, reads of data that was not copied before fail
/// and return no data, not even zeros. Nothing is copied up, streams fail, the backing link stays,
/// and log, status and QMP name the file. Data in the overlay is read and written as before. With
/// the old content of the base and a new mount the disk is right.
#[test]
fn a_base_that_is_changed_in_place_is_an_error() {
    requires!("/dev/fuse", "qemu-img");
    let changes: [(&str, Change); 5] = [
        ("truncated", |base| writable(base).set_len(3 * MIB + 5000).expect("truncate")),
        ("truncated and grown again", |base| {
            writable(base).set_len(0).expect("truncate");
            writable(base).set_len(SIZE).expect("grow");
        }),
        ("written over", |base| {
            fs::write(base, Pattern::new(93, 1).bytes(0, SIZE)).expect("write")
        }),
        ("one byte of it written", |base| {
            writable(base).write_all_at(&[0], SIZE - 1).expect("write")
        }),
        ("made longer", |base| writable(base).set_len(SIZE + 512).expect("grow")),
    ];
    for (what, change) in changes {
        eprintln!("{what}");
        let rig = Rig::new(SIZE);
        let disk = rig.mount().qmp().start();
        let file = disk.open();
        let mut first = vec![0; 100_000];
        file.read_exact_at(&mut first, 0).expect("what the base still holds");
        file.sync_all().expect("sync");
        assert!(!status(&rig.scratch, &disk).contains("was changed"), "{what}");
        change(&rig.base);

        // No missing cluster is read, wherever it is; no write completes one from the base.
        for at in [2 * CLUSTER, MIB, 2 * MIB + 512, SIZE - 512] {
            assert_eq!(errno(file.read_exact_at(&mut [0; 512], at)), Errno::IO, "{what}: at {at}");
        }
        assert_eq!(errno(file.write_all_at(&[7; 100], MIB + 100)), Errno::IO, "{what}");
        assert_eq!(
            rustix::fs::seek(&file, rustix::fs::SeekFrom::Hole(MIB)),
            Err(Errno::IO),
            "{what}: a hole"
        );
        // Data in the overlay is readable, and a write that needs nothing from the base succeeds.
        let mut again = vec![0; first.len()];
        disk.open().read_exact_at(&mut again, 0).expect("it is in the overlay");
        assert_same(what, &again, &rig.content[..again.len()]);
        let whole = vec![9; usize::try_from(CLUSTER).expect("small")];
        file.write_all_at(&whole, 3 * MIB).expect("a whole cluster");
        file.sync_all().expect("nothing is wrong with the overlay");

        let shown = status(&rig.scratch, &disk);
        assert!(shown.contains("base.raw was changed while it is in use"), "{what}: {shown}");
        assert!(
            disk.log().contains("base.raw: was changed while it is in use as a backing file"),
            "{what}: {}",
            disk.log()
        );
        let mut client = disk.client();
        let facts = client.ok("x-query-status", json!({}));
        assert_eq!(facts["chain"][0]["changed"], true, "{what}");
        client.ok("block-stream", json!({"device": "drive0"}));
        let event = client.wait_event("BLOCK_JOB_COMPLETED");
        assert_eq!(event["data"]["error"], "Input/output error", "{what}: {event}");
        drop((file, client));
        disk.umount();

        assert_eq!(qemu::info(&rig.overlay)["backing-filename"], "base.raw", "{what}");
        assert_eq!(
            qemu::local_ranges(&rig.overlay),
            [0..2 * CLUSTER, 3 * MIB..3 * MIB + CLUSTER],
            "{what}"
        );
        fs::write(&rig.base, &rig.content).expect("the old content");
        let mut want = rig.content.clone();
        want[usize::try_from(3 * MIB).expect("small")..][..whole.len()].copy_from_slice(&whole);
        let disk = rig.mount().qmp().start();
        assert_same(what, &disk.read_all(), &want);
        let mut client = disk.client();
        client.ok("block-stream", json!({"device": "drive0"}));
        client.wait_completed();
        drop(client);
        disk.umount();
        rig.assert_standalone(&want);
    }
}

/// Protects: the same without copy-up: for a disk that is mounted read-only, or without
/// copy-on-read.
#[test]
fn disks_that_copy_nothing_up_notice_it_too() {
    requires!("/dev/fuse", "qemu-img");
    for option in ["--read-only", "--no-copy-on-read"] {
        let rig = Rig::new(MIB);
        let disk = rig.mount().args(&[option]).start();
        let file = File::open(disk.path()).expect("open");
        file.read_exact_at(&mut [0; 512], 0).expect("as long as the base is what it was");
        writable(&rig.base)
            .set_len(0)
            .and_then(|()| writable(&rig.base).set_len(MIB))
            .expect("all zeros");
        assert_eq!(errno(file.read_exact_at(&mut [0; 512], MIB / 2)), Errno::IO, "{option}");
        drop(file);
        disk.umount();
    }
}

/// Protects: a base that is renamed, linked, removed, given another mode or replaced by another
/// file of its name has not changed: the open file is read to the end of the stream.
#[test]
fn a_base_that_changes_only_its_name_is_read() {
    requires!("/dev/fuse", "qemu-img");
    let changes: [(&str, Change); 4] = [
        ("replaced", |base| {
            fs::write(base.with_extension("new"), Pattern::new(94, 1).bytes(0, SIZE))
                .expect("write");
            fs::rename(base.with_extension("new"), base).expect("rename");
        }),
        ("renamed", |base| fs::rename(base, base.with_extension("old")).expect("rename")),
        ("removed", |base| fs::remove_file(base).expect("remove")),
        ("linked", |base| {
            fs::hard_link(base, base.with_extension("link")).expect("link");
            fs::set_permissions(base, fs::Permissions::from_mode(0o600)).expect("chmod");
        }),
    ];
    for (what, change) in changes {
        let rig = Rig::new(SIZE);
        let disk = rig.mount().qmp().start();
        let mut first = [0; 512];
        disk.open().read_exact_at(&mut first, 0).expect("read");
        change(&rig.base);
        assert_same(what, &disk.read_all(), &rig.content);
        let mut client = disk.client();
        client.ok("block-stream", json!({"device": "drive0"}));
        client.wait_completed();
        assert_eq!(client.ok("x-query-status", json!({}))["chain"], json!([]), "{what}");
        drop(client);
        disk.umount();
        qemu::assert_independent(&rig.overlay);
        rig.assert_overlay(&rig.content);
    }
}

/// Protects: if only the file below a qcow2 layer was changed, the data of that layer is read, and
/// nothing else is.
#[test]
fn only_what_the_changed_layer_decides_is_an_error() {
    requires!("/dev/fuse", "qemu-img", "qemu-io");
    let rig = Rig::new(SIZE);
    qemu::io(&rig.overlay, &["write -P 5 1M 1M"]);
    let top = rig.scratch.join("top.qcow2");
    qemu::create(&top, None, "", Some(("overlay.qcow2", "qcow2")));
    let disk = Mount::new(&rig.scratch, &top).qmp().start();
    writable(&rig.base).write_all_at(&[1], 0).expect("write");
    let file = disk.open();
    let mut read = vec![0; 1 << 20];
    file.read_exact_at(&mut read, MIB).expect("the middle layer holds it");
    assert!(read.iter().all(|&byte| byte == 5));
    assert_eq!(errno(file.read_exact_at(&mut [0; 512], 2 * MIB)), Errno::IO);
    let chain = disk.client().ok("x-query-status", json!({}))["chain"].clone();
    assert_eq!((&chain[0]["changed"], &chain[1]["changed"]), (&json!(false), &json!(true)));
    // The same for the map: it reports an error instead of ranges that cannot be read.
    let map = run_within(
        rig.scratch.cordisk().arg("map").arg(disk.path()).arg("--json"),
        std::time::Duration::from_secs(60),
    );
    assert!(!map.status.success() && map.stderr.contains("base.raw"), "{map:?}");
    drop(file);
    disk.umount();
}
