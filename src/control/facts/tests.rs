use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::json;

use super::*;
use crate::json;
use crate::schema::tests::check_object;
use engine::map::{MapEntry, Page};
use qcow2::format::Qcow2Facts;

fn time() -> Timestamp {
    Timestamp { seconds: 7, microseconds: 8 }
}

fn plan() -> PlanFacts {
    PlanFacts {
        id: "j".into(),
        schedule: Some("08:00=1M".into()),
        finish_by: Some("06:00".into()),
        deadline: Some(time()),
        speed: 1,
        needed: Some(2),
        feasible: Some(true),
    }
}

fn progress() -> JobProgress {
    JobProgress {
        id: "j".into(),
        kind: "stream".into(),
        status: "running".into(),
        speed: 1,
        offset: 2,
        len: 3,
        bytes_copied: 4,
        bytes_zero: 5,
        bytes_skipped: 6,
        bytes_failed: 7,
        start_time: time(),
        rate: 8,
        bytes_left: Some(9),
        seconds_left: Some(10),
        error_detail: Some("b.raw at 7".into()),
        plan: Some(plan()),
    }
}

fn last_job() -> LastJob {
    LastJob {
        id: "j".into(),
        kind: "stream".into(),
        status: "null".into(),
        speed: 1,
        offset: 2,
        len: 3,
        bytes_copied: 4,
        bytes_zero: 5,
        bytes_skipped: 6,
        bytes_failed: 7,
        start_time: time(),
        arguments: json!({ "device": "j" }),
        result: "error".into(),
        end_time: time(),
        error: Some("Input/output error".into()),
        error_detail: Some("b.raw at 7".into()),
    }
}

fn status() -> DiskStatus {
    DiskStatus {
        device: "drive0".into(),
        image: "/i".into(),
        mountpoint: Some("/m".into()),
        pid: Some(1),
        version: Some("1".into()),
        start_time: Some(time()),
        size: 2,
        cluster_size: Some(3),
        allocated_size: Some(4),
        read_only: true,
        copy_on_read: Some(true),
        copy_on_read_paused: Some("reserve".into()),
        image_deleted: true,
        chain: vec![ChainLayer {
            filename: "/b".into(),
            format: "raw".into(),
            size: 5,
            deleted: true,
            changed: true,
        }],
        usable: Some(true),
        answering: Some(true),
        takeover: Some(TakeoverFacts {
            possible: false,
            reason: Some("the mount keeper has died".into()),
            count: 14,
            last: Some(time()),
        }),
        bytes: Some(DiskBytes { local: 6, zero: 7, remote: 8, age_ms: 9 }),
        requests: vec![RequestFacts {
            kind: "read".into(),
            operations: 1,
            bytes: 2,
            failed: 3,
            total_time_ns: 4,
            latency: vec![5],
        }],
        sources: vec![SourceStatus {
            name: "s3://b/k".into(),
            up: true,
            fetched_bytes: 1,
            requests: 2,
            retries: 3,
            latency_us: 4,
            cached_bytes: 5,
            last_error: Some("gone".into()),
        }],
        latency_bounds_ns: vec![10],
        backing_reads: BackingReads { operations: 1, bytes: 2, failed: 3, total_time_ns: 4 },
        hits: 11,
        misses: 12,
        copied_up: CopiedUp { operations: 1, bytes: 2, failed: 3 },
        brought: BroughtFacts { bytes: 1, used: 2, overwritten: 3 },
        waited: WaitedFacts { operations: 1, total_time_ns: 2 },
        commits: 13,
        jobs: vec![progress()],
        last_job: Some(last_job()),
        plan: Some(plan()),
        stream_kept_back: Some(StreamKeptBack { offset: 1, len: 2 }),
        metrics: Some("127.0.0.1:1".into()),
        log: Some("journal".into()),
        last_error: Some(GuestError {
            time: time(),
            operation: "read".into(),
            offset: Some(1),
            length: Some(2),
            message: "gone".into(),
        }),
        last_warning: Some(LogMessage {
            time: time(),
            level: "warning".into(),
            message: "no room".into(),
        }),
    }
}

fn block() -> BlockInfo {
    let base = ImageInfo { filename: "/b".into(), format: "raw".into(), ..ImageInfo::default() };
    let image = ImageInfo {
        filename: "/i".into(),
        format: "qcow2".into(),
        virtual_size: 1,
        actual_size: Some(2),
        cluster_size: Some(3),
        dirty_flag: true,
        backing_filename: Some("b".into()),
        full_backing_filename: Some("/b".into()),
        backing_filename_format: Some("raw".into()),
        format_specific: Some(ImageInfoSpecific::Qcow2(Qcow2Facts {
            compat: "1.1".into(),
            compression_type: "zlib".into(),
            lazy_refcounts: Some(true),
            refcount_bits: 16,
            corrupt: Some(true),
            extended_l2: Some(true),
        })),
        backing_image: Some(Box::new(base)),
    };
    BlockInfo {
        device: "drive0".into(),
        kind: "unknown".into(),
        removable: true,
        locked: true,
        inserted: Some(BlockDeviceInfo {
            file: "/i".into(),
            node_name: Some("overlay".into()),
            ro: true,
            drv: "qcow2".into(),
            backing_file: Some("/b".into()),
            backing_file_depth: 1,
            children: vec![BlockdevChild {
                child: "file".into(),
                node_name: Some("overlay-file".into()),
            }],
            active: true,
            encrypted: true,
            detect_zeroes: "off".into(),
            bps: 1,
            bps_rd: 2,
            bps_wr: 3,
            iops: 4,
            iops_rd: 5,
            iops_wr: 6,
            image,
            cache: BlockdevCacheInfo { writeback: true, direct: true, no_flush: true },
            write_threshold: 7,
        }),
        io_status: Some("ok".into()),
    }
}

/// Checks one struct. With all members set, it and all objects in it have exactly the members of
/// the schema's `object`. It is read as it was written, even with an unknown member.
fn check<T: Serialize + DeserializeOwned + PartialEq + std::fmt::Debug>(object: &str, whole: &T) {
    let mut value = json::value(whole);
    check_object(object, &value);
    value["x-unknown"] = json!([1]);
    assert_eq!(serde_json::from_value::<T>(value).unwrap(), *whole, "{object}");
}

/// Protects: the structs and the schema of the socket describe the same members.
#[test]
fn the_schema_has_the_members_of_the_structs() {
    check("DiskStatus", &status());
    check("JobProgress", &progress());
    check("LastJob", &last_job());
    check("Plan", &plan());
    let base = OrderBase { size: 1, head: "h".into(), pin: Some("p".into()) };
    let touch = FirstTouchFacts { offset: 1, length: 2, milliseconds: 3 };
    check("OrderPage", &OrderPage { base, complete: true, touches: vec![touch], next: Some(4) });
    check("DiskCells", &DiskCells { size: 1, cell_size: 2, local: vec![3], zero: vec![4] });
    let extent = MapEntry {
        start: 0,
        length: 1,
        depth: 2,
        present: true,
        zero: false,
        data: true,
        compressed: false,
        offset: Some(3),
    };
    check("DiskMap", &Page { extents: vec![extent], next: Some(4) });
    let job = BlockJobInfo {
        kind: "stream".into(),
        device: "j".into(),
        len: 1,
        offset: 2,
        busy: true,
        paused: true,
        speed: 3,
        io_status: "ok".into(),
        ready: false,
        status: "running".into(),
        auto_finalize: true,
        auto_dismiss: true,
        error: Some("Input/output error".into()),
    };
    check("BlockJobInfo", &job);
    check("BlockInfo", &block());
}

/// Protects: a client can read the replies of a daemon that is older than these members.
#[test]
fn a_daemon_may_tell_nothing() {
    fn nothing<T: DeserializeOwned + Default + PartialEq + std::fmt::Debug>() {
        assert_eq!(serde_json::from_value::<T>(json!({})).unwrap(), T::default());
    }
    nothing::<DiskStatus>();
    nothing::<JobProgress>();
    nothing::<LastJob>();
    nothing::<PlanFacts>();
    nothing::<BlockJobInfo>();
    nothing::<BlockInfo>();
    nothing::<BlockDeviceInfo>();
}

#[test]
fn a_wrong_clock_is_told_as_qemu_does() {
    let before = UNIX_EPOCH - Duration::from_secs(5);
    assert_eq!(json::value(&Timestamp::from(before)), json!({ "seconds": -1, "microseconds": -1 }));
    assert_eq!(Timestamp::from(before).time(), UNIX_EPOCH);
    let at = UNIX_EPOCH + Duration::from_micros(7_000_008);
    assert_eq!(Timestamp::from(at), time());
    assert_eq!(Timestamp::from(at).time(), at);
    assert_eq!(
        Timestamp { seconds: i64::MAX, microseconds: i64::MAX }.time(),
        UNIX_EPOCH,
        "beyond what can be told"
    );
}
