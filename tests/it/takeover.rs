//! The serving process is killed while programs use the disk: the keeper starts a successor, and no
//! program notices.

use std::fs;
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt};
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use rustix::fs::{Advice, FallocateFlags};
use rustix::io::Errno;
use rustix::process::{Pid, Signal, kill_process};
use serde_json::json;

use crate::after_death::is_marked;
use crate::hung_backing::Stopped;
use crate::support::daemon::{server_of, wait_for_death};
use crate::support::mounts::{LoopDevice, LoopMount};
use crate::support::{
    CLUSTER, Daemon, KIB, MIB, Mount, Ours, Rig, Rng, Scratch, assert_same, errno, mounts, poll,
    qemu, read_at, run_ok, wait_until,
};
use crate::transports::has_uring;

/// How long anything here may take.
const PATIENCE: Duration = Duration::from_secs(30);

/// The variable with the number of kills or upgrades under load.
const TAKEOVERS: &str = "CORDISK_TAKEOVERS";

/// How often a process is replaced under load: `usually`, unless the variable says otherwise.
pub(crate) fn takeovers(usually: u64) -> u64 {
    std::env::var(TAKEOVERS).ok().and_then(|number| number.parse().ok()).unwrap_or(usually)
}

/// Kills the serving process, and waits until another one serves. Returns that one.
pub(crate) fn kill(disk: &Daemon, server: Pid, signal: Signal) -> Pid {
    kill_process(server, signal).expect("the serving process lives");
    successor_of(disk, server)
}

/// Waits for the successor of `server`.
pub(crate) fn successor_of(disk: &Daemon, server: Pid) -> Pid {
    let next = poll(PATIENCE, || Some(server_of(disk.pid())).filter(|next| *next != server));
    next.unwrap_or_else(|| panic!("no successor:\n{}", disk.log()))
}

/// Whether this kernel sends requests again (Linux 6.9).
pub(crate) fn is_protected(disk: &Daemon) -> bool {
    let log = disk.log();
    let reason = log.lines().find(|line| line.contains("no other one takes the disk over"));
    if let Some(reason) = reason {
        eprintln!("skipped: {reason}");
    }
    reason.is_none()
}

/// A disk over /dev/fuse with what the sandbox allows.
pub(crate) fn start(rig: &Rig, args: &[&str]) -> Daemon {
    start_over("dev", rig, args)
}

pub(crate) fn start_over(transport: &str, rig: &Rig, args: &[&str]) -> Daemon {
    // The socket accepts before the keeper has everything that a successor needs.
    rig.mount().args(&["--transport", transport]).args(args).qmp().start_settled()
}

/// Protects: P17. A program that has the disk open reads and writes on after each kill, data that
/// was written and not flushed is there, and after the unmount the image has no errors and all of
/// it.
#[test]
fn an_open_file_goes_on() {
    requires!("/dev/fuse", "qemu-img");
    an_open_file_goes_on_over("dev");
}

/// The same over io_uring, where the kernel sends no request again.
#[test]
fn an_open_file_goes_on_over_io_uring() {
    requires!("/dev/fuse", "qemu-img");
    if has_uring() {
        an_open_file_goes_on_over("uring");
    }
}

fn an_open_file_goes_on_over(transport: &str) {
    let rig = Rig::new(8 * MIB);
    let mut expected = rig.content.clone();
    let disk = start_over(transport, &rig, &[]);
    if !is_protected(&disk) {
        return;
    }
    let file = disk.open();
    let before = file.metadata().expect("stat");
    let mut server = disk.server_pid();
    for life in 0..6_u8 {
        let at = u64::from(life) * MIB + 100 * KIB + 7;
        let data = [life + 1; 70_000];
        file.write_all_at(&data, at).expect("write");
        expected[at as usize..][..data.len()].copy_from_slice(&data);
        server = kill(&disk, server, Signal::KILL);
        assert_same("after the kill", &read_at(&file, 0, expected.len()), &expected);
        file.sync_data().expect("fdatasync");
    }
    let after = file.metadata().expect("stat");
    assert_eq!(
        (before.ino(), before.len(), before.mode()),
        (after.ino(), after.len(), after.mode())
    );
    drop(file);
    disk.umount();
    qemu::assert_not_corrupt(&rig.overlay);
    // What the dead processes have leaked is given back by the next mount.
    rig.mount().start().umount();
    rig.assert_overlay(&expected);
}

/// Protects: a read-only disk survives as well, and its image stays unlocked for other readers.
#[test]
fn a_read_only_disk_goes_on() {
    requires!("/dev/fuse", "qemu-img");
    let rig = Rig::new(MIB);
    let disk = start(&rig, &["--read-only"]);
    if !is_protected(&disk) {
        return;
    }
    let file = fs::File::open(disk.path()).expect("open");
    let server = kill(&disk, disk.server_pid(), Signal::KILL);
    assert_same("read-only", &read_at(&file, 0, rig.content.len()), &rig.content);
    assert_ne!(server, disk.server_pid());
    drop(file);
    disk.umount();
}

/// Protects: what chmod has changed is shown by the successor, QMP clients find the socket again,
/// `status` names the main process, and signals to it reach the successor.
#[test]
fn a_successor_looks_the_same() {
    requires!("/dev/fuse", "qemu-img");
    let rig = Rig::new(MIB);
    let mut disk = start(&rig, &[]);
    if !is_protected(&disk) {
        return;
    }
    fs::set_permissions(disk.path(), fs::Permissions::from_mode(0o400)).expect("chmod");
    let mode = || fs::metadata(disk.path()).expect("stat").mode() & 0o777;
    wait_until("chmod", || mode() == 0o400);
    drop(disk.client());
    kill(&disk, disk.server_pid(), Signal::KILL);
    assert_same("after the kill", &disk.read_all(), &rig.content);
    assert_eq!(mode(), 0o400);
    let jobs = disk.client().ok("query-block-jobs", json!({}));
    assert_eq!(jobs, json!([]), "the socket is there again");
    let named = disk.pid().as_raw_nonzero().to_string();
    let shown = rig.scratch.cordisk().arg("status").arg(disk.path()).output().expect("status");
    let shown = String::from_utf8_lossy(&shown.stdout).into_owned();
    assert!(shown.contains(&format!("process {named}")), "{shown}");
    disk.signal(Signal::TERM);
    disk.assert_clean_end();
}

/// Protects: a serving process that crashes again and again is not started for ever. The keeper
/// then prints one line, ends with status 1 and leaves the mount dead: ENOTCONN instead of an empty
/// placeholder.
#[test]
fn a_crash_loop_ends_with_a_dead_mount() {
    requires!("/dev/fuse", "qemu-img");
    let rig = Rig::new(MIB);
    let mut disk = start(&rig, &[]);
    if !is_protected(&disk) {
        return;
    }
    let file = disk.open();
    let mut server = disk.server_pid();
    for crash in 1..=5 {
        if crash > 1 {
            server = successor_of(&disk, server);
            // It serves.
            assert_same("between crashes", &read_at(&file, 0, 4096), &rig.content[..4096]);
        }
        kill_process(server, Signal::ABORT).expect("the serving process lives");
    }
    let status = disk.ended_within(PATIENCE).expect("the keeper ends");
    assert_eq!(status.code(), Some(1), "{}", disk.log());
    let log = disk.log();
    let said: Vec<&str> = log.lines().filter(|line| line.starts_with("cordisk: ")).collect();
    assert!(
        said.len() == 1 && said[0].contains("the serving process was killed (signal: 6 (SIGABRT)"),
        "{log}"
    );
    assert_eq!(errno(fs::File::open(disk.path())), Errno::NOTCONN);
    assert_eq!(errno(file.read_at(&mut [0], 0)), Errno::NOTCONN, "the connection has ended");
    drop(file);
    mounts::detach(disk.path());
    drop(disk);
    qemu::assert_not_corrupt(&rig.overlay);
    rig.mount().start().umount();
    rig.assert_overlay(&rig.content);
}

/// Protects: a successor that hangs while it opens the disk can be ended: the second SIGTERM to the
/// main process kills it, and no other one is started. Programs get ENOTCONN instead of waiting for
/// ever.
#[test]
fn a_successor_that_hangs_can_be_ended() {
    requires!("/dev/fuse", "qemu-img");
    let rig = Rig::new(MIB);
    let lower = start(&rig, &[]);
    let scratch = Scratch::new();
    let overlay = scratch.join("upper.qcow2");
    let base = lower.path().to_str().expect("UTF-8").to_owned();
    qemu::create(&overlay, None, "", Some((&base, "raw")));
    let mut upper = Mount::named(&scratch, &overlay, "upper").args(&["--transport", "dev"]).start();
    if !is_protected(&upper) {
        return;
    }
    let file = upper.open();
    // The kernel does not let a process end while the close of a file hangs, so the base hangs only
    // once the serving process has ended, and before another one opens the base.
    let keeper = Stopped::stop(upper.pid());
    let server = upper.server_pid();
    kill_process(server, Signal::KILL).expect("the serving process lives");
    wait_for_death(server);
    let stopped = Stopped::stop(lower.server_pid());
    drop(keeper);
    let hung = successor_of(&upper, server);
    // Two of one kind could be taken for one.
    upper.signal(Signal::TERM);
    upper.signal(Signal::HUP);
    upper.signal(Signal::INT);
    let status = upper.ended_within(PATIENCE).expect("the main process ends");
    assert_eq!(status.code(), Some(1), "{}", upper.log());
    wait_for_death(hung);
    assert_eq!(errno(file.read_at(&mut [0], 0)), Errno::NOTCONN);
    drop((file, stopped));
    mounts::detach(upper.path());
    drop(upper);
    lower.umount();
}

/// Protects: the requests of every thread that reads from the kernel survive the first kill of a
/// disk. Each thread has a descriptor of its own, whose requests end with an error when its last
/// duplicate is closed; a successor may share them out otherwise.
#[test]
fn requests_of_all_descriptors_go_on() {
    requires!("/dev/fuse", "qemu-img");
    const READERS: u64 = 16;
    let mut rng = Rng::for_test("requests of all descriptors go on");
    for round in 0..5 {
        let rig = Rig::new(32 * MIB);
        let disk = start(&rig, &["--no-copy-on-read"]);
        if !is_protected(&disk) {
            return;
        }
        let (done, enough) = (AtomicU64::new(0), rng.below(200));
        let clusters = rig.size() / CLUSTER;
        std::thread::scope(|scope| {
            for reader in 0..READERS {
                let (disk, rig, done) = (&disk, &rig, &done);
                scope.spawn(move || {
                    let file = disk.open();
                    // Each reads its own clusters, so that each read is a request.
                    for number in (reader..clusters).step_by(READERS as usize) {
                        let at = number * CLUSTER;
                        let want = &rig.content[at as usize..][..CLUSTER as usize];
                        let what = format!("round {round}, cluster {number}");
                        assert_same(&what, &read_at(&file, at, CLUSTER as usize), want);
                        done.fetch_add(1, Ordering::Relaxed);
                    }
                });
            }
            wait_until("some are read", || done.load(Ordering::Relaxed) >= enough);
            kill(&disk, disk.server_pid(), Signal::KILL);
        });
        disk.umount();
    }
}

/// Protects: P17 under load: fio writes checksummed blocks of several sizes at depth 16 with fsync
/// now and then and verifies them, while a stream and copy-on-read run, and the serving process is
/// killed at random moments: 0 I/O errors, 0 wrong bytes, and the image has no errors afterwards.
#[test]
fn fio_does_not_notice_kills() {
    requires!("/dev/fuse", "qemu-img", "fio");
    let kills = takeovers(100);
    let mut rng = Rng::for_test("fio does not notice kills");
    let rig = Rig::new(64 * MIB);
    let disk = start(&rig, &[]);
    if !is_protected(&disk) {
        return;
    }
    let mut server = disk.server_pid();
    // It takes longer than the kills, and goes on by itself after each.
    disk.client().ok("block-stream", json!({"device": "drive0", "speed": 2 * MIB}));
    under_fio(&rig, &disk, &mut rng, kills, || server = kill(&disk, server, Signal::KILL));
    assert_whole(&rig, disk);
}

/// Protects: P17, P4. What the killed processes have leaked is given back while the disk is
/// mounted: after fio was disturbed by kills, the last successor searches, and after the unmount
/// the image has no leaks and no mark of an open image, without another mount.
#[test]
fn leaks_of_killed_processes_are_given_back_without_another_mount() {
    requires!("/dev/fuse", "qemu-img", "fio");
    let mut rng = Rng::for_test("leaks of killed processes");
    let rig = Rig::new(64 * MIB);
    let disk = start(&rig, &[]);
    if !is_protected(&disk) {
        return;
    }
    let mut server = disk.server_pid();
    under_fio(&rig, &disk, &mut rng, 10, || server = kill(&disk, server, Signal::KILL));
    // A search that was not at its end when its process was killed says nothing. The line of the
    // last process is the first one after its takeover.
    kill(&disk, server, Signal::KILL);
    let said = "of the last process were given back";
    let last = || {
        let log = disk.log();
        let takeover = log.rfind("another one takes the disk over").unwrap_or(0);
        log[takeover..].contains(said)
    };
    wait_until("the search for leaks", last);
    disk.log().lines().filter(|line| line.contains(said)).for_each(|line| eprintln!("{line}"));
    let seen = disk.read_all();
    disk.umount();
    assert!(!is_marked(&rig.overlay), "the mark of an open image is there");
    rig.assert_overlay(&seen);
}

/// Protects: P17 for a file system: a compiler runs on ext4 on a loop device while the serving
/// process is killed again and again. The compiled program runs, the file system has no errors, and
/// every file is the same after the next mount.
#[test]
fn a_compiler_does_not_notice_kills() {
    requires!("/dev/fuse", "qemu-img", "root", "losetup", "mkfs.ext4", "e2fsck", "make", "cc");
    let rig = Rig::new(256 * MIB);
    let disk = start(&rig, &[]);
    if !is_protected(&disk) {
        return;
    }
    disk.client().ok("block-stream", json!({"device": "drive0", "speed": 8 * MIB}));
    let device = LoopDevice::attach_as(disk.path(), true);
    let dir = rig.scratch.dir("ext4");
    let ((mount, sums), kills) = with_kills(&disk, || {
        run_ok(Command::new("mkfs.ext4").arg("-q").arg(device.device()));
        let mount = LoopMount::on(device, "ext4", &dir);
        write_sources(&dir);
        for round in 0..3 {
            run_ok(Command::new("make").args(["-s", "-j2", "-C"]).arg(&dir));
            let said = run_ok(&mut Command::new(dir.join("program")));
            assert_eq!(said.trim(), PROGRAM_SAYS.to_string(), "round {round}");
            if round < 2 {
                run_ok(Command::new("make").args(["-s", "clean", "-C"]).arg(&dir));
                run_ok(Command::new("fstrim").arg(&dir));
            }
        }
        let sums = sums_of(&dir);
        (mount, sums)
    });
    eprintln!("{kills} kills under a compiler");
    assert!(kills >= 10, "{kills}");
    let device = mount.umount();
    run_ok(Command::new("e2fsck").args(["-f", "-n"]).arg(device.device()));
    device.detach();
    disk.umount();
    qemu::assert_not_corrupt(&rig.overlay);
    let disk = rig.mount().start();
    let mount = LoopMount::new(disk.path(), "ext4", &dir);
    assert_eq!(sums_of(&dir), sums);
    mount.umount().detach();
    disk.umount();
    qemu::assert_clean(&rig.overlay);
}

/// The checksums of all files.
fn sums_of(dir: &Path) -> String {
    let script = "find . -type f | sort | xargs sha256sum";
    run_ok(Command::new("sh").args(["-c", script]).current_dir(dir))
}

/// Number of source files of the program, and of functions in each.
const SOURCES: u64 = 24;
const FUNCTIONS: u64 = 150;
/// The sum of all numbers below SOURCES * FUNCTIONS.
const PROGRAM_SAYS: u64 = SOURCES * FUNCTIONS * (SOURCES * FUNCTIONS - 1) / 2;

/// Writes a program that prints [`PROGRAM_SAYS`].
fn write_sources(dir: &Path) {
    let mut main = String::from("#include <stdio.h>\n");
    let mut sum = String::from("0");
    for file in 0..SOURCES {
        let mut text = String::new();
        for function in 0..FUNCTIONS {
            let number = file * FUNCTIONS + function;
            text += &format!("static unsigned long n{number}(void) {{ return {number}ul; }}\n");
        }
        let calls = (0..FUNCTIONS).map(|function| format!("n{}()", file * FUNCTIONS + function));
        let calls: Vec<String> = calls.collect();
        text += &format!("unsigned long f{file}(void) {{ return {}; }}\n", calls.join(" + "));
        fs::write(dir.join(format!("f{file}.c")), text).expect("source");
        main += &format!("unsigned long f{file}(void);\n");
        sum += &format!(" + f{file}()");
    }
    main += &format!("int main(void) {{ printf(\"%lu\\n\", {sum}); return 0; }}\n");
    fs::write(dir.join("main.c"), main).expect("source");
    let objects: Vec<String> = (0..SOURCES).map(|file| format!("f{file}.o")).collect();
    let makefile = format!(
        "program: main.o {0}\n\tcc -o $@ $^\nclean:\n\trm -f program main.o {0}\n",
        objects.join(" ")
    );
    fs::write(dir.join("Makefile"), makefile).expect("Makefile");
}

/// Kills the serving process again and again until `work` is done. Returns its result and the
/// number of kills.
pub(crate) fn with_kills<T>(disk: &Daemon, work: impl FnOnce() -> T) -> (T, u64) {
    let is_done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let killer = scope.spawn(|| {
            let mut rng = Rng::for_test("moments of kills");
            let file = fs::File::open(disk.path()).expect("open");
            let size = file.metadata().expect("stat").len();
            let mut kills = 0;
            let mut server = disk.server_pid();
            while !is_done.load(Ordering::Relaxed) {
                server = kill(disk, server, Signal::KILL);
                kills += 1;
                // The next kill comes when the successor has answered so many reads.
                for _ in 0..=rng.below(100) {
                    let at = rng.below(size / 4096) * 4096;
                    rustix::fs::fadvise(&file, at, None, Advice::DontNeed).expect("advice");
                    read_at(&file, at, 4096);
                }
            }
            kills
        });
        // Set when a failure unwinds as well, so that the thread ends.
        let done = Done(&is_done);
        let result = work();
        drop(done);
        (result, killer.join().expect("killer"))
    })
}

/// Sets the flag when it is dropped.
pub(crate) struct Done<'a>(pub(crate) &'a AtomicBool);

impl Drop for Done<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// Unmounts a disk of which processes were killed, and asserts that its image has no errors and
/// what was read last. Leaks that no search has found are given back by the mount in between.
pub(crate) fn assert_whole(rig: &Rig, disk: Daemon) {
    let seen = disk.read_all();
    disk.umount();
    qemu::assert_not_corrupt(&rig.overlay);
    rig.mount().start().umount();
    rig.assert_overlay(&seen);
}

/// Calls `disturb` at random moments while fio writes checksummed blocks of several sizes at depth
/// 16, with fsync and discards now and then, and verifies them; at least `times`, and until fio has
/// ended. The disk of `rig` has 64 MiB, and fio uses the first 48.
///
/// # Panics
/// fio reports an error, or bytes that fio does not write change.
pub(crate) fn under_fio(
    rig: &Rig,
    disk: &Daemon,
    rng: &mut Rng,
    times: u64,
    mut disturb: impl FnMut(),
) {
    let (mut done, mut rounds) = (0, 0);
    let watch = disk.open();
    while done < times {
        rounds += 1;
        let printed = rig.scratch.join("fio.log");
        let mut fio = Command::new("fio");
        fio.current_dir(rig.scratch.path()).args([
            "--name=verify",
            "--ioengine=libaio",
            "--iodepth=16",
            "--direct=1",
            "--rw=randwrite",
            "--bsrange=4k-64k",
            "--verify=crc32c",
            "--do_verify=1",
            "--verify_fatal=1",
            "--verify_state_save=0",
            "--fsync=50",
            "--allow_file_create=0",
            "--size=48m",
            "--io_size=96m",
        ]);
        fio.arg(format!("--randseed={}", rng.below(1 << 31)));
        fio.arg(format!("--filename={}", disk.path().display()));
        let log = fs::File::create(&printed).expect("log");
        fio.stdin(Stdio::null()).stderr(log.try_clone().expect("log")).stdout(log);
        let mut fio = Ours(fio.spawn().expect("fio"));
        loop {
            // A moment that follows from what is served, not from a clock: so many reads.
            for _ in 0..rng.below(60) {
                let at = rng.below(8 * MIB / 4096) * 4096 + 48 * MIB;
                assert_same(
                    "bytes that fio does not write",
                    &read_at(&watch, at, 4096),
                    &rig.content[at as usize..][..4096],
                );
            }
            let ended = fio.0.try_wait().expect("wait");
            if let Some(status) = ended {
                let printed = fs::read_to_string(&printed).unwrap_or_default();
                assert!(
                    status.success(),
                    "fio, disturbed {done} times: {status}\n{printed}\n{}",
                    disk.log()
                );
                break;
            }
            // The last 8 MiB are discarded and written in turns; a discard of a raw file on FUSE is
            // fallocate(2).
            let at = 56 * MIB + rng.below(8 * MIB / CLUSTER) * CLUSTER;
            if rng.below(2) == 0 {
                punch(&watch, at, CLUSTER);
                disturb();
                let zeros = vec![0; CLUSTER as usize];
                assert_same("discarded", &read_at(&watch, at, CLUSTER as usize), &zeros);
            } else {
                let data = vec![rng.below(256) as u8; CLUSTER as usize];
                watch.write_all_at(&data, at).expect("write");
                disturb();
                assert_same("written", &read_at(&watch, at, CLUSTER as usize), &data);
            }
            done += 1;
        }
    }
    eprintln!("{done} times in {rounds} rounds of fio");
}

/// Discards a range as a guest's disk driver does.
fn punch(file: &fs::File, at: u64, len: u64) {
    let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    rustix::fs::fallocate(file, flags, at, len).expect("discard");
}
