//! Kills the daemon in every possible way, at random moments, many times on the same images, while
//! many threads of a guest write and a stream runs (P1 to P4, P14, P15). `CORDISK_KILL_CYCLES=N`
//! runs more cycles, with longer lives of the daemon.
//!
//! The ledger knows which values each sector may have afterwards; it is in this process, which
//! survives every kill (`support/ledger.rs`). fio takes part with its own checksums, but its saved
//! state cannot be used after a kill: it says which writes were completed, not which were flushed,
//! and a kill may lose the difference (P2). So one fio job runs to its end with an fsync, and a
//! kill must keep all of its data. A second fio job, on a range of its own, runs while the daemon
//! is killed.

use std::fs::{self, File, OpenOptions};
use std::ops::Range;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use rustix::fs::OFlags;
use rustix::process::Signal;
use serde_json::json;

use crate::support::ledger::{Hands, Ledger, SECTOR, Verified};
use crate::support::{
    Daemon, KIB, MIB, Mount, Pattern, Rng, Scratch, assert_same, poll, qemu, run_within, wait_until,
};

/// Cycles of an ordinary run; `CORDISK_KILL_CYCLES` sets another number.
const CYCLES: u64 = 50;
/// Longest life of a daemon in milliseconds, in an ordinary run and in a long one.
const SHORT_LIFE: u64 = 600;
const LONG_LIFE: u64 = 2000;
/// Maximum lives on one image: when the guest has written everywhere, tables no longer change.
const LIVES: u64 = 5;

/// Not a multiple of any cluster size, in bytes.
const SIZE: u64 = 24 * MIB + 3 * SECTOR;
/// The disk in order: a region for each of eight writers, one region for four writers together, a
/// region that is only read, fio's two ranges, and the end, which is only read too.
const OWN: u64 = 1536 * KIB;
const HANDS: u64 = 8;
const SHARED: Range<u64> = HANDS * OWN..HANDS * OWN + 3 * MIB;
const ONLY_READ: Range<u64> = SHARED.end..FIO[0].start;
const FIO: [Range<u64>; 2] = [21 * MIB..22 * MIB, 22 * MIB..23 * MIB];
const SHARERS: u64 = 4;

/// How a daemon ends.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
enum End {
    /// SIGKILL, like the out-of-memory killer.
    Kill,
    /// SIGKILL while fio writes as well.
    KillBesideFio,
    /// SIGABRT, like a failed assertion.
    Abort,
    /// SIGSTOP, then SIGKILL a little later.
    StopThenKill,
    /// SIGTERM twice while the disk is in use: everything acknowledged stays.
    Terminate,
    /// SIGKILL at the moment at which the test reads the completion of the stream.
    Completed,
    /// SIGKILL between the start of the process and its readiness.
    Starting,
}

fn choose(rng: &mut Rng) -> End {
    match rng.below(20) {
        0..7 => End::Kill,
        7..9 => End::KillBesideFio,
        9..11 => End::Abort,
        11..13 => End::StopThenKill,
        13..16 => End::Terminate,
        16..18 => End::Completed,
        _ => End::Starting,
    }
}

/// One overlay over its golden image, until a stream has made it independent.
struct Generation {
    scratch: Scratch,
    ledger: Ledger,
    options: &'static str,
    /// The whole disk at the last verification.
    content: Vec<u8>,
    lives: u64,
    /// Seed of the fio job that has finished; its data must survive every kill.
    fio_seed: Option<u64>,
}

impl Generation {
    fn new(rng: &mut Rng, number: u32) -> Generation {
        let scratch = Scratch::new();
        // Zeros among the data: copies detect them and make zero clusters.
        let mut golden = Pattern::new(number, 1).bytes(0, SIZE);
        for _ in 0..8 {
            let hole = rng.range(SIZE, 500_000);
            golden[usize::try_from(hole.start).expect("small")
                ..usize::try_from(hole.end).expect("small")]
                .fill(0);
        }
        scratch.write("golden.raw", &golden);
        let all = [
            "",
            "cluster_size=4k",
            "cluster_size=2M",
            "cluster_size=4k,compat=0.10",
            "cluster_size=512",
            "cluster_size=64k,refcount_bits=1",
            "cluster_size=64k,extended_l2=on",
        ];
        let options = all[usize::try_from(rng.below(all.len() as u64)).expect("small")];
        qemu::create(&scratch.join("overlay.qcow2"), None, options, Some(("golden.raw", "raw")));
        let content = golden.clone();
        Generation {
            scratch,
            ledger: Ledger::new(golden, number + 0x1000),
            options,
            content,
            lives: 0,
            fio_seed: None,
        }
    }

    fn overlay(&self) -> std::path::PathBuf {
        self.scratch.join("overlay.qcow2")
    }

    fn has_base(&self) -> bool {
        qemu::info(&self.overlay()).get("backing-filename").is_some()
    }

    /// Checks that the image has no corruption, every sector has an allowed value, the golden image
    /// is unchanged, and fio verifies its data.
    fn judge(&mut self, what: &str) -> Verified {
        qemu::assert_not_corrupt(&self.overlay());
        let golden = self.scratch.join("golden.raw");
        let aside = self.scratch.join("aside");
        let independent = !self.has_base();
        if independent {
            fs::rename(&golden, &aside).expect("put the golden image aside");
        }
        let raw = qemu::to_raw(&self.overlay(), &self.scratch.join("raw"));
        self.content = fs::read(&raw).expect("converted");
        if let Some(seed) = self.fio_seed {
            let done = run_within(
                fio(&self.scratch, &raw, &FIO[0], seed).arg("--verify_only"),
                Duration::from_secs(120),
            );
            assert!(
                done.status.success(),
                "{what}: fio finds that what it had flushed is gone: {}\n{}",
                done.stdout,
                done.stderr
            );
        }
        let ours = [0..FIO[0].start, FIO[1].end..SIZE];
        let verified = self.ledger.verify(what, &self.content, &ours);
        self.ledger.turn_the_page();
        let golden = if independent { aside } else { golden };
        assert_same(
            "the golden image must never change",
            &fs::read(golden).expect("golden"),
            self.ledger.golden(),
        );
        verified
    }
}

fn fio(scratch: &Scratch, disk: &Path, range: &Range<u64>, seed: u64) -> Command {
    let mut command = Command::new("fio");
    command.current_dir(scratch.path());
    command.args([
        "--name=torture",
        "--ioengine=libaio",
        "--iodepth=16",
        "--direct=1",
        "--rw=randwrite",
        "--bsrange=512-256k",
        "--thread",
    ]);
    command.args([
        "--fsync=32",
        "--end_fsync=1",
        "--verify=crc32c",
        "--verify_fatal=1",
        "--do_verify=0",
        "--verify_state_save=0",
    ]);
    command
        .args(["--allow_file_create=0", "--randrepeat=1", "--allrandrepeat=1"])
        .arg(format!("--randseed={seed}"));
    command.arg(format!("--filename={}", disk.display()));
    command
        .arg(format!("--offset={}", range.start))
        .arg(format!("--size={}", range.end - range.start));
    command
}

/// A running fio, killed when dropped.
struct Fio(Child);

impl Drop for Fio {
    fn drop(&mut self) {
        if poll(Duration::from_secs(10), || self.0.try_wait().ok().flatten()).is_none() {
            let _ = self.0.kill();
            let _ = self.0.wait();
            eprintln!("fio did not end with its disk");
        }
    }
}

/// Runs the daemon once, from the mount to its `end`.
fn live_and_die(generation: &mut Generation, rng: &mut Rng, cycle: u64, end: End, longest: u64) {
    let mount = Mount::named(&generation.scratch, &generation.overlay(), &format!("cycle{cycle}"))
        .qmp()
        .args(&["--no-resume"]);
    if end == End::Starting {
        let daemon = mount.spawn();
        std::thread::sleep(Duration::from_micros(rng.below(40_000)));
        daemon.kill9();
        return;
    }
    // Without copy-on-read, the whole disk can be read through the mount first.
    let looks_first = rng.below(3) == 0;
    let disk = mount.args(if looks_first { &["--no-copy-on-read"] } else { &[] }).start();
    if looks_first {
        assert_same("mounted again", &disk.read_all(), &generation.content);
    }
    let mut client = disk.client();
    let speed = match end {
        End::Completed => 0,
        _ => [MIB, 4 * MIB, 16 * MIB][usize::try_from(rng.below(3)).expect("small")],
    };
    client.ok("block-stream", json!({"device": "drive0", "speed": speed}));
    // Half of the daemons have a short life, in which nearly every write allocates.
    let longest = if rng.below(2) == 0 { longest / 8 } else { longest };
    let life = Duration::from_millis(10 + rng.below(longest - 10));
    let file = disk.open();
    let synced = i32::try_from(OFlags::DSYNC.bits()).expect("a flag");
    let synced: File = OpenOptions::new()
        .write(true)
        .custom_flags(synced)
        .open(disk.path())
        .expect("open with O_DSYNC");
    let ending = AtomicBool::new(false);
    let mut fio_seed = generation.fio_seed;
    let hands = Hands { ledger: &generation.ledger, file: &file, synced: &synced, ending: &ending };
    std::thread::scope(|scope| {
        let disk = disk; // a panic in this scope kills it, so that the threads below end
        let own = (0..HANDS).map(|hand| hand * OWN..(hand + 1) * OWN);
        for region in own.chain((0..SHARERS).map(|_| SHARED)) {
            let (hands, rng) = (&hands, Rng::new(rng.next()));
            scope.spawn(move || hands.write_until_the_end(rng, &region));
        }
        let (reader, reader_rng) = (&hands, Rng::new(rng.next()));
        scope.spawn(move || reader.read_until_the_end(reader_rng, &ONLY_READ));
        let mut killed_with_it = None;
        if end == End::KillBesideFio {
            let seed = rng.below(1 << 30);
            let done = run_within(
                &mut fio(&generation.scratch, disk.path(), &FIO[0], seed),
                Duration::from_secs(120),
            );
            assert!(done.status.success(), "fio: {}\n{}", done.stdout, done.stderr);
            fio_seed = Some(seed);
            let mut second = fio(&generation.scratch, disk.path(), &FIO[1], seed + 1);
            killed_with_it = Some(Fio(second
                .stdin(Stdio::null())
                .stdout(Stdio::null())
                .stderr(Stdio::null())
                .spawn()
                .expect("fio")));
        }
        if end == End::Completed {
            client.wait_completed();
        } else {
            std::thread::sleep(life);
        }
        ending.store(true, Ordering::SeqCst);
        bring_about(end, disk, &generation.ledger, rng);
        drop(killed_with_it);
    });
    generation.fio_seed = fio_seed;
    if end == End::Completed {
        qemu::assert_independent(&generation.overlay());
    }
}

fn bring_about(end: End, mut disk: Daemon, ledger: &Ledger, rng: &mut Rng) {
    match end {
        End::Kill | End::KillBesideFio | End::Completed | End::Starting => disk.kill9(),
        End::Abort => {
            // The main process stands still, so it starts no successor.
            disk.signal(Signal::STOP);
            disk.signal_server(Signal::ABORT);
            disk.kill9();
        }
        End::StopThenKill => {
            disk.signal_server(Signal::STOP);
            std::thread::sleep(Duration::from_millis(rng.below(50)));
            disk.kill9();
        }
        End::Terminate => {
            disk.signal(Signal::TERM);
            wait_until("the first SIGTERM is answered", || disk.log().contains("serving on"));
            disk.signal(Signal::TERM);
            disk.assert_clean_end();
        }
    }
    if end == End::Terminate {
        ledger.all_acknowledged_is_durable();
    }
}

/// Protects: P1 to P4, P14 and P15. Directly after every kill the image has no corruption. Data
/// that a flush, an O_DSYNC write or a clean end has acknowledged is there; every other sector is
/// old or new. Sectors that were never written have the content of the golden image. An image whose
/// stream has completed needs no backing file, and the next life continues with it.
#[test]
fn killed_over_and_over() {
    requires!("/dev/fuse", "qemu-img", "fio");
    let mut rng = Rng::for_test("killed over and over");
    let asked = std::env::var("CORDISK_KILL_CYCLES")
        .ok()
        .map(|text| text.parse().expect("CORDISK_KILL_CYCLES is a number"));
    let longest = if asked.is_some() { LONG_LIFE } else { SHORT_LIFE };
    let mut ends = std::collections::BTreeMap::<End, u64>::new();
    let mut total = Verified::default();
    let mut generation = Generation::new(&mut rng, 1);
    let mut generations = 1;
    for cycle in 0..asked.unwrap_or(CYCLES) {
        if generation.lives == LIVES || !generation.has_base() {
            generations += 1;
            generation = Generation::new(&mut rng, generations);
        }
        generation.lives += 1;
        let end = choose(&mut rng);
        live_and_die(&mut generation, &mut rng, cycle, end, longest);
        let what = format!("cycle {cycle}, \"{}\", after {end:?}", generation.options);
        let verified = generation.judge(&what);
        eprintln!("{what}: {verified:?}");
        *ends.entry(end).or_default() += 1;
        total += verified;
    }
    let cycles: u64 = ends.values().sum();
    eprintln!("{cycles} cycles on {generations} images: {ends:?}; {total:?}");
    assert!(
        cycles < CYCLES || total.durable > 0 && total.touched > total.durable,
        "nothing was put to the test: {total:?}"
    );
}
