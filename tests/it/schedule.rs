//! Speeds by the time of day and by a deadline. The daemon's local time depends on its time zone,
//! which each test chooses to the second.

use std::fs::File;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use rustix::fs::fgetxattr;
use serde_json::{Value, json};

use crate::hung_backing::Stopped;
use crate::support::qmp::FIRST_STEP;
use crate::support::{
    MIB, Mount, Pattern, QmpClient, Rig, Scratch, assert_same, poll, qemu, run_ok, wait_until,
};

const GIB: u64 = 1 << 30;
/// Seconds until the deadline of these tests.
const IN: u64 = 600;
/// Maximum delay in seconds between the test's clock reading and the daemon's.
const LATE: u64 = 120;

/// Returns the seconds since 1970, and the time zone in which that moment is `hour:minute:second`.
fn when_it_is(hour: u64, minute: u64, second: u64) -> (u64, String) {
    const DAY: i64 = 24 * 3600;
    let now = SystemTime::now().duration_since(UNIX_EPOCH).expect("after 1970").as_secs();
    let wanted = i64::try_from(hour * 3600 + minute * 60 + second).expect("small");
    let mut ahead = wanted - i64::try_from(now % 86_400).expect("small");
    // The offset from Greenwich is at most 12 hours.
    if ahead > DAY / 2 {
        ahead -= DAY;
    } else if ahead < -DAY / 2 {
        ahead += DAY;
    }
    // In this notation a zone west of Greenwich is positive.
    let (sign, size) = if ahead > 0 { ('-', ahead) } else { ('+', -ahead) };
    (now, format!("TST{sign}{:02}:{:02}:{:02}", size / 3600, size / 60 % 60, size % 60))
}

fn speed(client: &mut QmpClient) -> u64 {
    client.job()["speed"].as_u64().expect("a number")
}

/// Returns the plan of the only job.
fn plan(client: &mut QmpClient) -> Option<Value> {
    client.ok("x-query-job-progress", json!({}))[0].get("plan").cloned()
}

/// Protects: the speed is that of the latest entry at or before the local time, from the start of
/// the job, and changes at the time of the next entry.
#[test]
fn a_schedule_is_followed() {
    requires!("/dev/fuse", "qemu-img");
    for (hour, want) in [(12, 7), (14, 9), (3, 9)] {
        let rig = Rig::new(2 * MIB);
        let (_, zone) = when_it_is(hour, 0, 0);
        let disk = rig
            .mount()
            .qmp()
            .env("TZ", &zone)
            .args(&["--stream", "--speed", "13:00=9,11:00=7"])
            .start_settled();
        let mut client = disk.client();
        assert_eq!(speed(&mut client), want, "at {hour}:00, {zone}");
        assert_eq!(
            plan(&mut client),
            Some(json!({"id": "drive0", "schedule": "13:00=9,11:00=7", "speed": want}))
        );
        disk.umount();
    }
    let rig = Rig::new(2 * MIB);
    let (_, zone) = when_it_is(12, 59, 50);
    let disk = rig
        .mount()
        .qmp()
        .env("TZ", &zone)
        .args(&["--stream", "--speed", "12:00=1,13:00=0"])
        .start_settled();
    let mut client = disk.client();
    client.wait_completed();
    assert_same("disk", &disk.read_all(), &rig.content);
    disk.umount();
    rig.assert_standalone(&rig.content);
}

/// Protects: the command line sets a schedule, a deadline or a speed, for a new stream and for a
/// running job; an invalid one starts nothing.
#[test]
fn plans_are_typed() {
    requires!("/dev/fuse", "qemu-img");
    let rig = Rig::new(8 * MIB);
    let disk = rig.mount().qmp().start_settled();
    let mut client = disk.client();
    let typed = |words: &[&str]| run_ok(rig.scratch.cordisk().args(words));
    let path = disk.path().to_str().expect("UTF-8");
    let wrong = rig
        .scratch
        .cordisk()
        .args(["stream", path, "--speed", "24:00=1"])
        .output()
        .expect("cordisk");
    assert_eq!((wrong.status.code(), client.ok("query-jobs", json!({}))), (Some(2), json!([])));
    typed(&["stream", path, "--speed", "00:00=7"]);
    assert_eq!(plan(&mut client), Some(json!({"id": "drive0", "schedule": "00:00=7", "speed": 7})));
    typed(&["job", "speed", path, "--finish-by", "06:00"]);
    let planned = plan(&mut client).expect("a plan");
    assert_eq!(
        (&planned["finish-by"], planned.get("schedule")),
        (&json!("06:00"), None),
        "{planned}"
    );
    typed(&["job", "speed", path, "9"]);
    assert_eq!((speed(&mut client), plan(&mut client)), (9, None));
    typed(&["job", "cancel", path]);
    typed(&["stream", path, "--finish-by", "06:00"]);
    assert_eq!(plan(&mut client).expect("a plan")["finish-by"], json!("06:00"));
    typed(&["job", "speed", path, "0"]);
    client.wait_completed();
    disk.umount();
    rig.assert_standalone(&rig.content);
}

/// Protects: a plan that a client sets controls a running job. A speed that a client sets ends the
/// plan, and stays. A request with neither plan keeps the speed.
#[test]
fn what_a_user_sets_last_counts() {
    requires!("/dev/fuse", "qemu-img");
    let rig = Rig::new(4 * MIB);
    let disk = rig.mount().qmp().start_settled();
    let mut client = disk.client();
    let set = |client: &mut QmpClient, name: &str, value: &str| {
        client.ok("x-job-set-plan", json!({"id": "drive0", name: value}))
    };
    client.ok("block-stream", json!({"device": "drive0", "speed": 1}));
    assert_eq!(client.wait_for_first_step(), FIRST_STEP);
    assert_eq!(plan(&mut client), None);
    set(&mut client, "schedule", "03:00=7");
    assert_eq!(
        (speed(&mut client), plan(&mut client).expect("a plan")["schedule"].clone()),
        (7, json!("03:00=7"))
    );
    client.ok("block-job-set-speed", json!({"device": "drive0", "speed": 5}));
    assert_eq!((speed(&mut client), plan(&mut client)), (5, None));
    // Longer than the interval at which a plan is evaluated, so that a plan still in force would
    // show.
    client.listen(Duration::from_millis(2500));
    assert_eq!((speed(&mut client), plan(&mut client)), (5, None));
    set(&mut client, "schedule", "03:00=3");
    set(&mut client, "schedule", "03:00=4");
    assert_eq!(speed(&mut client), 4);
    client.ok("x-job-set-plan", json!({"id": "drive0"}));
    assert_eq!((speed(&mut client), plan(&mut client)), (4, None));

    let mut refused = |arguments: Value| client.err("x-job-set-plan", arguments).desc;
    assert_eq!(refused(json!({"id": "nope", "schedule": "03:00=7"})), "Job not found");
    let both = refused(json!({"id": "drive0", "schedule": "03:00=7", "finish-by": "06:00"}));
    assert_eq!(both, "'schedule' and 'finish-by' cannot be specified at the same time");
    assert!(refused(json!({"id": "drive0", "schedule": "24:00=1"})).contains("08:00=20M,20:00=0"));
    assert!(refused(json!({"id": "drive0", "finish-by": "6"})).contains("HH:MM"));
    client.finish_job("drive0");
    assert_eq!(
        client.err("x-job-set-plan", json!({"id": "drive0", "finish-by": "06:00"})).desc,
        "Job not found"
    );
    disk.umount();
    rig.assert_standalone(&rig.content);
}

/// Protects: a deadline sets the speed that the remaining data needs, and is the same instant after
/// a restart in another time zone.
#[test]
fn a_deadline_sets_the_speed_that_it_needs() {
    requires!("/dev/fuse", "qemu-img");
    let scratch = Scratch::new();
    // Only the data to copy counts. 400 MiB of it are compressed and take little space here, and
    // the rest of the disk is unallocated.
    let data = 400 * MIB;
    let base = scratch.join("base.qcow2");
    qemu::create(&base, Some(16 * GIB), "", None);
    qemu::io(&base, &[format!("write -q -c -P 7 0 {data}")]);
    let overlay = scratch.join("overlay.qcow2");
    qemu::create(&overlay, None, "", Some(("base.qcow2", "qcow2")));
    let (now, zone) = when_it_is(12, 0, 0);
    let disk = Mount::new(&scratch, &overlay).qmp().env("TZ", &zone).start_settled();
    let mut client = disk.client();
    client.ok("block-stream", json!({"device": "drive0", "speed": 1}));
    assert_eq!(client.wait_for_first_step(), FIRST_STEP);
    let counted = poll(Duration::from_secs(60), || {
        client.ok("x-query-job-progress", json!({}))[0]["bytes-left"].as_u64()
    });
    client.ok("block-job-pause", json!({"device": "drive0"}));
    client.ok("x-job-set-plan", json!({"id": "drive0", "finish-by": "12:10"}));
    let left = data - FIRST_STEP;
    assert_eq!(counted, Some(left), "the holes do not count");
    // The speed is a twentieth more than needed, to finish half a minute early.
    let within = |speed: u64, most: u64| {
        speed >= left * 21 / 20 / (IN - 30) && speed <= left * 21 / 20 / (IN - 30 - most) + 1
    };
    let set = speed(&mut client);
    assert!(within(set, LATE), "{set}");
    let facts = plan(&mut client).expect("a plan");
    assert_eq!(
        (&facts["finish-by"], &facts["deadline"]["seconds"]),
        (&json!("12:10"), &json!(now + IN))
    );
    let needed = facts["needed"].as_u64().expect("a number");
    assert!(needed >= left / IN && needed <= left / (IN - LATE) + 1, "{facts}");
    assert_eq!(facts.get("feasible"), None, "nobody can tell of a job that is paused");
    drop(client);
    disk.kill9();

    if fgetxattr(File::open(&overlay).expect("image"), "user.cordisk.stream", &mut [0; 4096])
        .is_err()
    {
        eprintln!("skipped: no user attributes where scratch directories are");
        return;
    }
    let (_, elsewhere) = when_it_is(20, 0, 0);
    let disk =
        Mount::named(&scratch, &overlay, "again").qmp().env("TZ", &elsewhere).start_settled();
    let mut client = disk.client();
    let facts = plan(&mut client).expect("a plan");
    assert_eq!(
        (&facts["finish-by"], &facts["deadline"]["seconds"]),
        (&json!("12:10"), &json!(now + IN))
    );
    let set = speed(&mut client);
    assert!(
        set >= left * 21 / 20 / (IN - 30) && set <= 16 * GIB * 21 / 20 / (IN - 30 - 2 * LATE) + 1,
        "{set}"
    );
    disk.kill9();
}

/// Protects: if a deadline cannot be met, the log says so once, with both numbers, and the job
/// continues.
#[test]
fn a_deadline_that_cannot_be_met_is_told() {
    requires!("/dev/fuse", "qemu-img");
    let scratch = Scratch::new();
    let content = Pattern::new(81, 1).bytes(0, 8 * MIB);
    let served = scratch.join("served.qcow2");
    qemu::create_full(&served, 8 * MIB, "", Pattern::new(81, 1));
    let lower = Mount::named(&scratch, &served, "lower").start();
    let overlay = scratch.join("overlay.qcow2");
    qemu::create(&overlay, None, "", Some((lower.path().to_str().expect("UTF-8"), "raw")));
    let (_, zone) = when_it_is(12, 0, 0);
    let upper = Mount::named(&scratch, &overlay, "upper").qmp().env("TZ", &zone).start();
    let mut client = upper.client();
    let stopped = Stopped::stop(lower.server_pid());
    client.ok("block-stream", json!({"device": "drive0"}));
    client.ok("x-job-set-plan", json!({"id": "drive0", "finish-by": "13:00"}));
    let told = poll(Duration::from_secs(90), || {
        (plan(&mut client)?["feasible"] == json!(false)).then_some(())
    });
    assert!(told.is_some(), "{:?}", plan(&mut client));
    let log = upper.log();
    assert_eq!(
        log.matches("will not be finished by 13:00: it needs 2 KiB/s and runs at 0 KiB/s").count(),
        1,
        "{log}"
    );
    drop(stopped);
    client.finish_job("drive0");
    assert_same("disk", &upper.read_all(), &content);
    wait_until("the overlay stands alone", || {
        qemu::img(&["info", "-U", overlay.to_str().expect("UTF-8")]).find("backing file").is_none()
    });
    drop(client);
    upper.umount();
    lower.umount();
}
