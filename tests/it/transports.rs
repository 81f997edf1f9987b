//! The two transports of requests from the kernel give the same answers.
//! (`CORDISK_TEST_TRANSPORT=uring` runs any other test over io_uring.)

use std::fs::{self, File};
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, SystemTime};

use rustix::fs::{OFlags, SeekFrom};
use rustix::io::Errno;
use rustix::process::{Pid, Signal};
use rustix::thread::CpuSet;
use serde_json::json;

use crate::support::{
    Daemon, KIB, MIB, Pattern, Rig, Rng, assert_same, errno, poll, qemu, run_within, wait_until,
};

const ENABLED: &str = "/sys/module/fuse/parameters/enable_uring";

/// Whether requests can come over io_uring. The switch applies to the whole machine, so the tests
/// set it only where `CORDISK_SWITCH_URING=1` allows it; `scripts/test.sh --switch-uring` does
/// that, and resets the switch afterwards. A kernel that is too old is no failure.
pub(crate) fn has_uring() -> bool {
    let on = || fs::read_to_string(ENABLED).is_ok_and(|text| text.starts_with('Y'));
    let may_switch = std::env::var("CORDISK_SWITCH_URING").is_ok_and(|value| value == "1");
    let _ = !on() && may_switch && fs::write(ENABLED, "Y").is_ok();
    if !on() {
        eprintln!(
            "skipped: no FUSE over io_uring in this kernel, or it is off ({ENABLED}; scripts/test.sh --switch-uring switches it on)"
        );
    }
    on()
}

/// Protects: a guest gets the same answers over each transport: data, holes, flushes, attributes,
/// errors; misses and hits, one after the other and in parallel.
#[test]
fn a_guest_sees_no_difference() {
    requires!("/dev/fuse", "qemu-img");
    for transport in ["dev", "uring"] {
        if transport == "uring" && !has_uring() {
            continue;
        }
        let rig = Rig::new(16 * MIB + 512);
        let disk = rig.mount().qmp().args(&["--transport", transport]).start();
        let mut guest = rig.guest(&disk);
        let mut rng = Rng::new(17);
        for _ in 0..400 {
            guest.step(&mut rng, 1500 * KIB);
        }
        guest.check_all();
        // The write is durable when it returns, and another descriptor sees it at once.
        let synced = File::options()
            .write(true)
            .custom_flags(OFlags::DSYNC.bits().cast_signed())
            .open(disk.path())
            .expect("open");
        let data = Pattern::new(3, 3).bytes(5 * MIB + 7, 100_000);
        synced.write_all_at(&data, 5 * MIB + 7).expect("write");
        guest.shadow[(5 * MIB + 7) as usize..][..data.len()].copy_from_slice(&data);
        guest.check_all();

        let size = rig.size();
        assert_eq!(guest.file.metadata().expect("stat").len(), size, "{transport}");
        assert_eq!(guest.file.read_at(&mut [0; 16], size).expect("read at the end"), 0);
        assert_eq!(errno(guest.file.write_at(&[1; 16], size)), Errno::NOSPC);
        assert_eq!(errno(guest.file.set_len(size - 512)), Errno::PERM);
        assert_eq!(
            errno(File::options().write(true).truncate(true).open(disk.path())),
            Errno::PERM
        );
        fs::set_permissions(disk.path(), fs::Permissions::from_mode(0o400)).expect("chmod");
        let time = SystemTime::UNIX_EPOCH + Duration::new(1_000_000_000, 123_456_789);
        guest.file.set_modified(time).expect("utimensat");
        let stat = guest.file.metadata().expect("stat");
        assert_eq!(
            (stat.mode() & 0o7777, stat.modified().expect("mtime")),
            (0o400, time),
            "{transport}"
        );
        assert!(rustix::fs::fstatvfs(&guest.file).expect("statvfs").f_blocks > 0);
        guest.punch(MIB..2 * MIB);
        assert_eq!(
            rustix::fs::seek(&guest.file, SeekFrom::Hole(MIB)).expect("lseek"),
            MIB,
            "{transport}"
        );
        guest.file.sync_all().expect("fsync");

        // Hits and misses of eight threads in parallel, while a stream runs.
        let mut client = disk.client();
        client.ok("block-stream", json!({"device": "drive0", "speed": 20_000_000}));
        let file = File::options().read(true).open(disk.path()).expect("root may");
        std::thread::scope(|scope| {
            for seed in 1..9u64 {
                let (file, shadow) = (&file, &guest.shadow);
                scope.spawn(move || {
                    let mut rng = Rng::new(seed);
                    for _ in 0..150 {
                        let range = rng.range(shadow.len() as u64, 700 * KIB);
                        let mut got = vec![0; (range.end - range.start) as usize];
                        file.read_exact_at(&mut got, range.start).expect("read");
                        assert_same(
                            "one of many readers",
                            &got,
                            &shadow[range.start as usize..range.end as usize],
                        );
                    }
                });
            }
        });
        let event = client.wait_event("BLOCK_JOB_COMPLETED");
        assert_eq!(event["data"]["offset"], event["data"]["len"], "{event}");
        client.ok("block_resize", json!({"device": "drive0", "size": 20 * MIB}));
        assert_eq!(file.metadata().expect("stat").len(), 20 * MIB, "{transport}");
        guest.shadow.resize(20 * MIB as usize, 0);
        guest.check_all();
        let want = std::mem::take(&mut guest.shadow);
        drop((guest, file, synced, client));
        disk.umount();
        rig.assert_standalone(&want);
    }
}

/// Protects: the owner of a disk (perhaps not the daemon's user) can set any times, and the daemon
/// continues. Times in the supported range are shown as they were set.
#[test]
fn any_times_can_be_set() {
    requires!("/dev/fuse", "qemu-img");
    for transport in ["dev", "uring"] {
        if transport == "uring" && !has_uring() {
            continue;
        }
        let rig = Rig::new(MIB);
        let disk = rig.mount().args(&["--transport", transport]).start();
        let file = disk.open();
        let seconds = [
            i64::MIN,
            i64::MIN + 1,
            -(1 << 62),
            -62_135_596_801,
            -1,
            0,
            1 << 34,
            253_402_300_800,
            1 << 62,
            i64::MAX,
        ];
        for (accessed, modified) in
            seconds.iter().flat_map(|&first| seconds.map(|second| (first, second)))
        {
            let [last_access, last_modification] = [(accessed, 999_999_999), (modified, 1)]
                .map(|(tv_sec, tv_nsec)| rustix::fs::Timespec { tv_sec, tv_nsec });
            rustix::fs::futimens(&file, &rustix::fs::Timestamps { last_access, last_modification })
                .unwrap_or_else(|error| panic!("{transport}, {accessed}, {modified}: {error}"));
        }
        let small = rustix::fs::Timespec { tv_sec: -5, tv_nsec: 7 };
        rustix::fs::futimens(
            &file,
            &rustix::fs::Timestamps { last_access: small, last_modification: small },
        )
        .expect("utimensat");
        assert_eq!(
            (file.metadata().expect("stat").mtime(), file.metadata().expect("stat").mtime_nsec()),
            (-5, 7),
            "{transport}"
        );
        assert_same("still served", &disk.read_all(), &rig.content);
        drop(file);
        disk.umount();
    }
}

/// Returns how often the threads whose name starts with `name` have run.
fn runs(pid: u32, name: &str) -> u64 {
    let threads = fs::read_dir(format!("/proc/{pid}/task"))
        .expect("threads")
        .map(|thread| thread.expect("thread").path());
    let named = threads.filter(|path| {
        fs::read_to_string(path.join("comm")).is_ok_and(|comm| comm.starts_with(name))
    });
    let count = |path: std::path::PathBuf| {
        fs::read_to_string(path.join("schedstat"))
            .ok()?
            .split_whitespace()
            .nth(2)?
            .parse::<u64>()
            .ok()
    };
    named.filter_map(count).sum()
}

/// Mounts the disk over io_uring. Returns it with its serving process and the file, open
/// for direct I/O.
fn over_uring(rig: &Rig) -> (Daemon, u32, File) {
    let disk = rig.mount().args(&["--transport", "uring"]).start();
    let pid = u32::try_from(disk.server_pid().as_raw_nonzero().get()).expect("a pid");
    let file = File::options()
        .read(true)
        .write(true)
        .custom_flags(OFlags::DIRECT.bits().cast_signed())
        .open(disk.path())
        .expect("open");
    (disk, pid, file)
}

/// Protects: requests that the second server of a queue takes are answered like any other: writes
/// and reads, large ones, and small ones that arrive at its entries. All entries are returned, so
/// that the disk can end. The run count of its thread shows that it took some.
#[test]
fn large_requests_side_by_side() {
    requires!("/dev/fuse", "qemu-img");
    if !has_uring() {
        return;
    }
    let (threads, rounds) = (8u64, 24u64);
    let rig = Rig::new(threads * MIB);
    let (disk, pid, file) = over_uring(&rig);
    let before = runs(pid, "fuse-lane");
    let mut want = rig.content.clone();
    std::thread::scope(|scope| {
        for (number, part) in want.chunks_mut(MIB as usize).enumerate() {
            let file = &file;
            scope.spawn(move || {
                let start = number as u64 * MIB;
                for round in 0..rounds {
                    // The whole range, and then one page of it, which arrives at the entry that was
                    // used last.
                    part.copy_from_slice(
                        &Pattern::new(number as u32, round as u32).bytes(start, MIB),
                    );
                    for range in [0..MIB, (round * 4 * KIB)..(round * 4 * KIB + 4 * KIB)] {
                        let bytes = &part[range.start as usize..range.end as usize];
                        assert_eq!(
                            direct(bytes, |aligned| file
                                .write_at(aligned, start + range.start)
                                .expect("write"))
                            .1,
                            bytes.len()
                        );
                        let (got, len) = direct(&vec![0; bytes.len()], |aligned| {
                            file.read_at(aligned, start + range.start).expect("read")
                        });
                        assert_eq!(len, bytes.len());
                        assert_same("what was just written", &got, bytes);
                    }
                }
            });
        }
    });
    assert!(runs(pid, "fuse-lane") > before, "all of it was done by the first servers");
    drop(file);
    disk.umount();
    assert_same("in the image", &qemu::read_all(&rig.overlay), &want);
}

/// Protects: the second server of a queue takes a part of the small requests while
/// several wait, and answers them like any other. The clients run on one processor, so
/// that the other queues are not in use. All entries are returned, so that the disk can
/// end.
#[test]
fn small_requests_side_by_side() {
    requires!("/dev/fuse", "qemu-img");
    let processors = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    if !has_uring() || processors < 2 {
        return;
    }
    let (threads, range) = (16u64, 64 * KIB);
    let rig = Rig::new(threads * range);
    let (disk, pid, file) = over_uring(&rig);
    let cpu = rustix::thread::sched_getcpu();
    let before = runs(pid, "fuse-lane");
    let is_over = AtomicBool::new(false);
    let mut want = rig.content.clone();
    std::thread::scope(|scope| {
        for (number, part) in want.chunks_mut(range as usize).enumerate() {
            let (file, is_over) = (&file, &is_over);
            scope.spawn(move || {
                let mut own = CpuSet::new();
                own.set(cpu);
                rustix::thread::sched_setaffinity(None, &own).expect("sched_setaffinity");
                let start = number as u64 * range;
                let mut round = 0;
                while !is_over.load(Ordering::Relaxed) {
                    let at = u64::from(round) * 4 * KIB % range;
                    let bytes = Pattern::new(number as u32, round).bytes(start + at, 4 * KIB);
                    part[at as usize..][..bytes.len()].copy_from_slice(&bytes);
                    let write = |aligned: &mut [u8]| file.write_at(aligned, start + at);
                    assert_eq!(direct(&bytes, |aligned| write(aligned).expect("write")).1, 4096);
                    let read = |aligned: &mut [u8]| file.read_at(aligned, start + at);
                    let (got, _) = direct(&[0; 4096], |aligned| read(aligned).expect("read"));
                    assert_same("what was just written", &got, &bytes);
                    round += 1;
                }
            });
        }
        let limit = Duration::from_secs(20);
        let has_run = poll(limit, || (runs(pid, "fuse-lane") > before + 100).then_some(()));
        is_over.store(true, Ordering::Relaxed);
        assert!(has_run.is_some(), "all of it was done by the first servers");
    });
    drop(file);
    disk.umount();
    assert_same("in the image", &qemu::read_all(&rig.overlay), &want);
}

/// Returns the memory in bytes in which the requests and replies of a serving process lie.
fn queue_memory(pid: u32) -> u64 {
    let smaps = fs::read_to_string(format!("/proc/{pid}/smaps")).expect("smaps");
    let mut lines = smaps.lines();
    let mut bytes = 0;
    while lines.any(|line| line.contains("/memfd:cordisk-requests")) {
        let resident = lines.find_map(|line| line.strip_prefix("Rss:")).expect("Rss");
        let kib = resident.trim().trim_end_matches(" kB").parse::<u64>().expect("a number");
        bytes += kib * KIB;
    }
    bytes
}

/// Whether a thread of this process sleeps in pwrite64(2).
fn sleeps_in_a_write(thread: Pid) -> bool {
    let pwrite64 = if cfg!(target_arch = "x86_64") { "18 " } else { "68 " };
    fs::read_to_string(format!("/proc/self/task/{thread}/syscall"))
        .is_ok_and(|call| call.starts_with(pwrite64))
}

/// Protects: an idle disk returns the memory that large requests used, and later requests lose no
/// data by that.
#[test]
fn an_idle_disk_gives_the_memory_of_its_queues_back() {
    requires!("/dev/fuse", "qemu-img");
    if !has_uring() {
        return;
    }
    let threads = 32u64;
    let rig = Rig::new(threads * MIB);
    let (disk, pid, file) = over_uring(&rig);
    // This read copies everything into the overlay, so that no other part of the program allocates
    // memory later.
    assert_same("all of it", &disk.read_all(), &rig.content);
    let mut want = rig.content.clone();
    // The kernel has a queue for each possible CPU.
    let cpus = fs::read_to_string("/sys/devices/system/cpu/possible").expect("possible CPUs");
    let last = cpus.trim().rsplit(['-', ',']).next().expect("a number");
    let at_rest = 3 * MIB * (last.parse::<u64>().expect("a number") + 1);
    for round in 0..2u32 {
        wait_until("the memory of what came before", || queue_memory(pid) <= at_rest);
        let before = queue_memory(pid);
        // The server is stopped until the kernel has all the writes, so that they are in flight at
        // the same time.
        let reached = poll(Duration::from_secs(60), || {
            for (number, part) in want.chunks_mut(MIB as usize).enumerate() {
                let start = number as u64 * MIB;
                part.copy_from_slice(&Pattern::new(number as u32, round + 5).bytes(start, MIB));
            }
            let (sender, writers) = crossbeam_channel::unbounded();
            disk.stop_server();
            std::thread::scope(|scope| {
                for (number, part) in want.chunks(MIB as usize).enumerate() {
                    let (file, start, sender) = (&file, number as u64 * MIB, &sender);
                    scope.spawn(move || {
                        sender.send(rustix::thread::gettid()).expect("send");
                        let written =
                            direct(part, |aligned| file.write_at(aligned, start).expect("write"));
                        assert_eq!(written.1, part.len());
                    });
                }
                let writers: Vec<_> = writers.iter().take(threads as usize).collect();
                let all_wait = poll(Duration::from_secs(20), || {
                    writers.iter().all(|thread| sleeps_in_a_write(*thread)).then_some(())
                });
                disk.signal_server(Signal::CONT);
                assert!(all_wait.is_some(), "not all writes reached the kernel");
            });
            (queue_memory(pid) >= before + 16 * MIB).then_some(())
        });
        assert!(
            reached.is_some(),
            "{} bytes of memory, {before} before, for {threads} requests of 1 MiB at a time",
            queue_memory(pid)
        );
        for (number, part) in want.chunks(MIB as usize).enumerate() {
            let (got, len) = direct(&vec![0; part.len()], |aligned| {
                file.read_at(aligned, number as u64 * MIB).expect("read")
            });
            assert_eq!(len, part.len());
            assert_same("what was just written", &got, part);
        }
        // A small request arrives at an entry that still has memory, and does not change the memory
        // of other entries.
        let (got, _) = direct(&[0; 4096], |aligned| file.read_at(aligned, 0).expect("read"));
        assert_same("a page", &got, &want[..4096]);
        wait_until("the memory is given back", || queue_memory(pid) <= before + MIB);
    }
    drop(file);
    assert_same("after it was given back", &disk.read_all(), &want);
    disk.umount();
    assert_same("in the image", &qemu::read_all(&rig.overlay), &want);
}

/// Calls `io` with a copy of the bytes that is aligned for direct I/O. Returns the copy afterwards
/// and the result of `io`.
fn direct(bytes: &[u8], io: impl FnOnce(&mut [u8]) -> usize) -> (Vec<u8>, usize) {
    let mut buffer = vec![0; bytes.len() + 4096];
    let start = buffer.as_ptr().align_offset(4096);
    let aligned = &mut buffer[start..start + bytes.len()];
    aligned.copy_from_slice(bytes);
    let len = io(aligned);
    (aligned.to_vec(), len)
}

/// Protects: `--transport uring` gives one line of error that says why io_uring is missing; the
/// default works without it.
#[test]
fn a_transport_that_is_not_there_is_an_error_only_for_who_insists() {
    requires!("/dev/fuse", "qemu-img");
    if fs::read_to_string(ENABLED).is_ok_and(|text| text.starts_with('Y')) {
        return; // the other test has switched it on
    }
    let rig = Rig::new(MIB);
    let mountpoint = rig.scratch.join("m");
    let mut command = rig.scratch.cordisk();
    command.args(["mount", "-f", "--transport", "uring"]).arg(&rig.overlay).arg(&mountpoint);
    let done = run_within(&mut command, Duration::from_secs(30));
    if done.stderr.contains("mounted") {
        return; // switched on meanwhile
    }
    assert_eq!(done.status.code(), Some(1), "{done:?}");
    assert!(
        done.stderr.lines().count() == 1 && done.stderr.contains("--transport uring: "),
        "{done:?}"
    );
    assert!(!mountpoint.exists());
    let disk = rig.mount().args(&["--transport", "auto", "--prefer", "speed"]).start();
    assert_same("over whatever there is", &disk.read_all(), &rig.content);
    disk.umount();
}
