//! The error policies of a job (`on-error`), with real errors: a base that cannot be read at one
//! place while a flag file exists (`support/nbd.rs`), and an overlay on a full file system.

use std::fs;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::{Value, json};

use crate::support::nbd::{Fault, NbdFile};
use crate::support::{
    Daemon, KIB, MIB, Mount, Pattern, QmpClient, Scratch, assert_same, mounts, qemu, read_at,
    run_ok, wait_until,
};

const SIZE: u64 = 4 * MIB;
/// The step of a stream, in bytes.
const CHUNK: u64 = 512 * KIB;
/// One sector in the middle of the 4th chunk cannot be read.
const BAD: u64 = 3 * CHUNK + 200 * KIB;
const BAD_CHUNK: u64 = 3 * CHUNK;

/// A disk above a base that fails.
struct BadDisk {
    // Fields are dropped in this order.
    disk: Daemon,
    base: NbdFile,
    overlay: PathBuf,
    content: Vec<u8>,
    _scratch: Scratch,
}

impl BadDisk {
    fn new() -> BadDisk {
        let scratch = Scratch::new();
        let content = Pattern::new(70, 1).bytes(0, SIZE);
        let base = NbdFile::serve(&scratch, "base.raw", &content, &(BAD..BAD + 512));
        let overlay = scratch.join("overlay.qcow2");
        qemu::create(&overlay, None, "", Some(("base.raw", "raw")));
        let disk = Mount::new(&scratch, &overlay).args(&["--no-copy-on-read"]).qmp().start();
        base.fail(Fault::Read);
        BadDisk { disk, base, overlay, content, _scratch: scratch }
    }

    /// Asserts that the guest can read around the bad sector, and that the bad sector is an error.
    fn assert_guest_reads_around(&self) {
        let file = self.disk.open();
        for (offset, len) in
            [(0, CHUNK), (BAD_CHUNK, 64 * KIB), (BAD_CHUNK + CHUNK, 2 * CHUNK), (SIZE - 5000, 5000)]
        {
            let len = usize::try_from(len).expect("small");
            let at = usize::try_from(offset).expect("small");
            assert_same(
                "beside the bad place",
                &read_at(&file, offset, len),
                &self.content[at..at + len],
            );
        }
        let error = file.read_exact_at(&mut [0; 512], BAD).expect_err("the bad place itself");
        assert_eq!(error.raw_os_error(), Some(rustix::io::Errno::IO.raw_os_error()));
    }

    /// Asserts, after the base was repaired, that a new stream makes the overlay independent of the
    /// base.
    fn assert_a_new_job_finishes(self) {
        let mut client = self.disk.client();
        client.ok("block-stream", json!({"device": "drive0"}));
        client.wait_completed();
        self.finish(client);
    }

    fn finish(self, client: QmpClient) {
        drop(client);
        self.disk.umount();
        drop(self.base);
        qemu::assert_clean(&self.overlay);
        qemu::assert_independent(&self.overlay);
        assert_same("the overlay alone", &qemu::read_all(&self.overlay), &self.content);
    }
}

fn error_event(client: &mut QmpClient) -> Value {
    client.wait_event("BLOCK_JOB_ERROR")["data"].clone()
}

fn failed_at(offset: u64, error: &str) -> Value {
    json!({"type": "stream", "device": "drive0", "len": SIZE, "offset": offset, "speed": 0, "error": error})
}

fn backing_name(overlay: &Path) -> Option<Value> {
    let out = run_ok(
        Command::new("qemu-img").args(["info", "-U", "-f", "qcow2", "--output=json"]).arg(overlay),
    );
    serde_json::from_str::<Value>(&out).expect("JSON").get("backing-filename").cloned()
}

/// Protects: `report`, and `enospc` and `auto` for errors other than missing space: the job fails
/// at the start of its chunk, the backing link stays, good data is still read, and a later job
/// finishes.
#[test]
fn report_fails_at_the_start_of_the_chunk() {
    requires!("/dev/fuse", "qemu-img", "nbdkit", "nbdfuse");
    let bad = BadDisk::new();
    let mut client = bad.disk.client();
    for arguments in [
        json!({}),
        json!({"on-error": "report"}),
        json!({"on-error": "enospc"}),
        json!({"on-error": "auto"}),
    ] {
        let mut all = arguments.clone();
        all["device"] = json!("drive0");
        let heard = client.events.len();
        client.ok("block-stream", all);
        assert_eq!(
            error_event(&mut client),
            json!({"device": "drive0", "operation": "read", "action": "report"}),
            "{arguments}"
        );
        let data = client.wait_event("BLOCK_JOB_COMPLETED")["data"].clone();
        assert_eq!(data, failed_at(BAD_CHUNK, "Input/output error"), "{arguments}");
        client.wait_status("null");
        let want = [
            "created",
            "running",
            "BLOCK_JOB_ERROR",
            "aborting",
            "BLOCK_JOB_COMPLETED",
            "concluded",
            "null",
        ];
        assert_eq!(client.event_names()[heard..], want, "{arguments}");
        assert_eq!(backing_name(&bad.overlay), Some(json!("base.raw")), "{arguments}");
    }
    bad.assert_guest_reads_around();
    bad.base.repair(Fault::Read);
    drop(client);
    bad.assert_a_new_job_finishes();
}

/// Protects: `ignore` continues to the end, fails there, and never changes the header, because the
/// skipped data is only in the base.
#[test]
fn ignore_goes_on_and_keeps_the_link() {
    requires!("/dev/fuse", "qemu-img", "nbdkit", "nbdfuse");
    let bad = BadDisk::new();
    let before = crate::support::header::Header::load(&bad.overlay);
    let mut client = bad.disk.client();
    client.ok("block-stream", json!({"device": "drive0", "on-error": "ignore"}));
    assert_eq!(
        error_event(&mut client),
        json!({"device": "drive0", "operation": "read", "action": "ignore"})
    );
    let data = client.wait_event("BLOCK_JOB_COMPLETED")["data"].clone();
    assert_eq!(data, failed_at(SIZE, "Input/output error"));
    client.wait_status("null");
    let names = client.event_names();
    assert_eq!(names[..2], ["created", "running"]);
    assert!(names[2..names.len() - 4].iter().all(|name| name == "BLOCK_JOB_ERROR"), "{names:?}");
    assert_eq!(names[names.len() - 4..], ["aborting", "BLOCK_JOB_COMPLETED", "concluded", "null"]);
    let after = crate::support::header::Header::load(&bad.overlay);
    assert_eq!(
        (&after.backing, &after.extensions),
        (&before.backing, &before.extensions),
        "the link must stay"
    );
    bad.assert_guest_reads_around();
    bad.base.repair(Fault::Read);
    drop(client);
    bad.assert_a_new_job_finishes();
}

/// Protects: `stop` pauses at the failing chunk and reports the reason. If it is resumed too early,
/// it stops at the same chunk again. If it is resumed when the base is readable again, it retries
/// that chunk and finishes, and no data is missing.
#[test]
fn stop_tries_the_same_chunk_again() {
    requires!("/dev/fuse", "qemu-img", "nbdkit", "nbdfuse");
    let bad = BadDisk::new();
    let mut client = bad.disk.client();
    client.ok("block-stream", json!({"device": "drive0", "on-error": "stop"}));
    for resumed in [false, true] {
        assert_eq!(
            error_event(&mut client),
            json!({"device": "drive0", "operation": "read", "action": "stop"}),
            "resumed: {resumed}"
        );
        client.wait_status("paused");
        let job = client.job();
        let facts =
            (&job["status"], &job["io-status"], &job["offset"], &job["paused"], &job["busy"]);
        assert_eq!(
            facts,
            (&json!("paused"), &json!("failed"), &json!(BAD_CHUNK), &json!(true), &json!(false)),
            "{job}"
        );
        bad.assert_guest_reads_around();
        if !resumed {
            client.ok("job-resume", json!({"id": "drive0"}));
            client.wait_status("running");
        }
    }
    bad.base.repair(Fault::Read);
    client.ok("job-resume", json!({"id": "drive0"}));
    client.wait_status("running");
    let data = client.wait_completed();
    assert_eq!(
        data,
        json!({"type": "stream", "device": "drive0", "len": SIZE, "offset": SIZE, "speed": 0})
    );
    client.wait_status("null");
    let want = [
        "created",
        "running",
        "BLOCK_JOB_ERROR",
        "paused",
        "running",
        "BLOCK_JOB_ERROR",
        "paused",
        "running",
        "waiting",
        "pending",
        "BLOCK_JOB_COMPLETED",
        "concluded",
        "null",
    ];
    assert_eq!(client.event_names(), want);
    bad.finish(client);
}

/// Protects: a full file system below the overlay pauses a job with `enospc`, `auto` or `stop`, and
/// the event says that space is missing. The guest can still read; with space again the job
/// continues and finishes.
#[test]
fn want_of_space_pauses_the_job() {
    requires!("/dev/fuse", "qemu-img", "root");
    for policy in ["enospc", "auto", "stop"] {
        let scratch = Scratch::new();
        let content = Pattern::new(71, 1).bytes(0, SIZE);
        let base = scratch.write("base.raw", &content);
        let small = scratch.dir("small");
        // The scratch directory detaches this mount.
        run_ok(Command::new("mount").args(["-t", "tmpfs", "-o", "size=8M", "tmpfs"]).arg(&small));
        let overlay = small.join("overlay.qcow2");
        qemu::create(&overlay, None, "", Some((base.to_str().expect("UTF-8"), "raw")));
        let ballast = small.join("ballast");
        fs::write(&ballast, vec![1; usize::try_from(5 * MIB + 512 * KIB).expect("small")])
            .expect("ballast");
        let disk = Mount::new(&scratch, &overlay).qmp().start();
        let mut client = disk.client();
        client.ok("block-stream", json!({"device": "drive0", "on-error": policy}));
        // QEMU reports every error of a stream as `read`.
        assert_eq!(
            error_event(&mut client),
            json!({"device": "drive0", "operation": "read", "action": "stop"}),
            "{policy}"
        );
        client.wait_status("paused");
        wait_until("the job rests", || client.job()["busy"] == json!(false));
        let job = client.job();
        assert_eq!(
            (&job["status"], &job["io-status"]),
            (&json!("paused"), &json!("nospace")),
            "{policy}: {job}"
        );
        let offset = job["offset"].as_u64().expect("offset");
        assert!(offset.is_multiple_of(CHUNK) && (CHUNK..SIZE).contains(&offset), "{policy}: {job}");
        assert_same("the guest reads on", &disk.read_all(), &content);

        fs::remove_file(&ballast).expect("ballast");
        client.ok("job-resume", json!({"id": "drive0"}));
        client.wait_status("running");
        assert_eq!(client.wait_completed()["offset"], json!(SIZE), "{policy}");
        client.wait_status("null");
        assert_same("after the stream", &disk.read_all(), &content);
        drop(client);
        disk.umount();
        fs::remove_file(&base).expect("the base is not needed any more");
        qemu::assert_clean(&overlay);
        qemu::assert_independent(&overlay);
        assert_same("the overlay alone", &qemu::read_all(&overlay), &content);
        mounts::umount(&small);
    }
}
