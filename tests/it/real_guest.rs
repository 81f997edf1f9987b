//! A Linux kernel boots under QEMU from a mounted disk while the golden image below it is streamed,
//! with the software that users run.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use serde_json::json;

use crate::support::machine::{self, Machine};
use crate::support::{
    CORDISK, Daemon, MIB, Mount, Pattern, Rng, Scratch, assert_same, qemu, run_ok, run_within,
    sha256, wait_until,
};
use crate::takeover;

const DISK: u64 = 256 * MIB;
/// Files that the guest reads at its start, files that it does not use until its end, and files
/// that it overwrites in place.
const GOLDEN: [(&str, u32, u64); 3] =
    [("read", 4, 8 * MIB), ("hold", 4, 12 * MIB), ("change", 4, 16 * MIB)];
/// Speed of the stream in bytes per second. The files that the guest does not use take six minutes
/// at this speed, so the stream does not end before the test removes the limit.
const SLOW: u64 = 128 << 10;
/// Maximum number of rounds that fit the files that are overwritten.
const ROUNDS: u64 = 60;

/// Content of files by name, `golden/change/0`.
type Files = BTreeMap<String, Vec<u8>>;

/// Returns what the guest writes: the same as `generate` in real_guest_init.sh.
fn content(seed: u64, kind: &str, round: u64, lines: u64) -> Vec<u8> {
    (1..=lines).flat_map(|line| format!("{seed} {kind} {round} {line}\n").into_bytes()).collect()
}

/// A root file system and its files.
struct Golden {
    image: PathBuf,
    sum: String,
    files: Files,
}

impl Golden {
    /// Makes the file system without a mount, so that no root is needed.
    fn make(scratch: &Scratch, rng: &mut Rng) -> Golden {
        let root = scratch.dir("root");
        for dir in ["bin", "sbin", "proc", "sys", "dev", "run", "new"] {
            scratch.dir(&format!("root/{dir}"));
        }
        fs::copy(machine::BUSYBOX, root.join("bin/busybox")).expect("busybox");
        let mut files = Files::new();
        let seed = u32::try_from(rng.below(1 << 32)).expect("below 2^32");
        for (kind, count, size) in GOLDEN {
            scratch.dir(&format!("root/golden/{kind}"));
            for number in 0..count {
                let name = format!("golden/{kind}/{number}");
                let version = u32::try_from(files.len()).expect("few files");
                let content = Pattern::new(seed, version).bytes(0, size);
                fs::write(root.join(&name), &content).expect("golden file");
                files.insert(name, content);
            }
            let sums = run_ok(
                Command::new("sh")
                    .arg("-c")
                    .arg(format!("sha256sum golden/{kind}/*"))
                    .current_dir(&root),
            );
            fs::write(root.join(format!("sums.{kind}")), sums).expect("sums");
        }
        fs::write(root.join("sbin/init"), include_str!("real_guest_init.sh")).expect("init");
        run_ok(Command::new("chmod").arg("755").arg(root.join("sbin/init")));
        let image = scratch.join("golden.raw");
        fs::File::create(&image).and_then(|file| file.set_len(DISK)).expect("golden image");
        run_ok(
            Command::new("mkfs.ext4").args(["-q", "-F", "-m", "0", "-d"]).arg(&root).arg(&image),
        );
        fs::remove_dir_all(&root).expect("remove the tree");
        let sum = sha256(&image);
        Golden { image, sum, files }
    }

    fn assert_untouched(&self) {
        assert_eq!(sha256(&self.image), self.sum, "the golden image must never change");
    }

    /// Returns the files that must be on the disk after `rounds` rounds.
    fn after(&self, seed: u64, rounds: u64) -> Files {
        let mut files = self.files.clone();
        for round in 1..=rounds {
            files.insert(format!("new/{round}"), content(seed, "new", round, 12_000));
            let over = content(seed, "over", round, 6000);
            let at = usize::try_from(overwritten_at(round)).expect("small");
            files.get_mut(&format!("golden/change/{}", round % 4)).expect("golden")
                [at..at + over.len()]
                .copy_from_slice(&over);
        }
        files
    }
}

/// Returns the offset that a round overwrites: the same as `seek=` in real_guest_init.sh.
fn overwritten_at(round: u64) -> u64 {
    (round * 64 + 3) * 4096
}

/// An overlay above a golden image, and the parameters of this run.
struct Rack {
    scratch: Scratch,
    golden: Golden,
    overlay: PathBuf,
    seed: u64,
    /// The round after which the guest is killed, in the test that kills it.
    last: u64,
}

impl Rack {
    fn new(test: &str) -> Rack {
        let mut rng = Rng::for_test(test);
        let scratch = Scratch::new();
        let golden = Golden::make(&scratch, &mut rng);
        let overlay = scratch.join("overlay.qcow2");
        run_ok(Command::new(CORDISK).arg("create").arg(&overlay).args([
            "-b",
            "golden.raw",
            "-F",
            "raw",
        ]));
        Rack { scratch, golden, overlay, seed: rng.below(1_000_000), last: 2 + rng.below(4) }
    }

    fn boot(&self, disk: &Daemon, drive: &str) -> Machine {
        let words = format!("cordisk.seed={} cordisk.rounds={ROUNDS}", self.seed);
        Machine::boot(disk.path(), drive, &words, &self.scratch.join("qemu.log"))
    }

    /// Converts the overlay to a raw image with QEMU; returns it with the directory for its files.
    fn unpack(&self) -> (PathBuf, PathBuf) {
        (qemu::to_raw(&self.overlay, &self.scratch.join("raw")), self.scratch.dir("files"))
    }

    /// Checks the overlay, which the stream has made independent, after a guest that has written
    /// `rounds` rounds and `said` checksums.
    fn assert_complete(&self, rounds: u64, said: &[String]) {
        qemu::assert_independent(&self.overlay);
        self.golden.assert_untouched();
        fs::rename(&self.golden.image, self.scratch.join("moved away"))
            .expect("move the golden image away");
        let (raw, dir) = self.unpack();
        run_ok(Command::new("e2fsck").args(["-f", "-n"]).arg(&raw));
        let files = Rack::files_of(&raw, &dir);
        assert_same_files(&files, &self.golden.after(self.seed, rounds));
        // The files on the disk have the checksums that the guest computed at the end.
        let sums: Vec<(&str, &str)> =
            said.iter().filter_map(|line| line.strip_prefix("SUM ")?.split_once("  /")).collect();
        assert_eq!(
            sums.len() as u64,
            rounds + 4,
            "a sum for every file that was written: {said:?}"
        );
        for (sum, name) in sums {
            assert_eq!(sum, sha256(&dir.join(name)), "{name} as the guest read it");
        }
    }

    /// Extracts the files below `new` and `golden` from a raw image. debugfs(8) needs no mount.
    fn files_of(raw: &Path, dir: &Path) -> Files {
        for name in ["new", "golden"] {
            run_ok(
                Command::new("debugfs")
                    .arg("-R")
                    .arg(format!("rdump /{name} {}", dir.display()))
                    .arg(raw),
            );
        }
        let mut files = Files::new();
        let mut todo = vec![dir.join("new"), dir.join("golden")];
        while let Some(next) = todo.pop() {
            for entry in
                fs::read_dir(&next).unwrap_or_else(|error| panic!("{}: {error}", next.display()))
            {
                let path = entry.expect("entry").path();
                if path.is_dir() {
                    todo.push(path);
                } else {
                    let name =
                        path.strip_prefix(dir).expect("below").to_str().expect("UTF-8").to_owned();
                    files.insert(name, fs::read(&path).expect("a file that debugfs wrote"));
                }
            }
        }
        files
    }
}

fn assert_same_files(got: &Files, want: &Files) {
    for (name, content) in want {
        assert_same(name, got.get(name).unwrap_or_else(|| panic!("{name} is missing")), content);
    }
    let extra: Vec<&String> = got.keys().filter(|name| !want.contains_key(*name)).collect();
    assert!(extra.is_empty(), "these should not be there: {extra:?}");
}

/// Returns how many rounds the guest has written.
fn rounds_of(guest: &mut Machine, least: u64) -> u64 {
    let said = guest.wait_for("ROUNDS");
    let rounds = said.last().and_then(|line| line.strip_prefix("ROUNDS ")?.parse().ok());
    let rounds = rounds.expect("a number of rounds");
    assert!((least..=ROUNDS).contains(&rounds), "{rounds} rounds");
    rounds
}

/// Runs a guest: boot, read, write, power off. The stream is slow until the guest writes, then
/// fast, and ends while the guest still writes.
fn live_and_power_off(test: &str, drive: &str) {
    requires!(
        "/dev/fuse",
        "qemu-img",
        "qemu-io",
        "qemu-system-x86_64",
        "mkfs.ext4",
        "e2fsck",
        "debugfs",
        machine::KERNEL
    );
    let rack = Rack::new(test);
    let begin = Instant::now();
    let disk: Daemon = Mount::new(&rack.scratch, &rack.overlay).qmp().start();
    let mut client = disk.client();
    client.ok("block-stream", json!({"device": "drive0", "speed": SLOW}));
    let mut guest = rack.boot(&disk, drive);
    guest.wait_for("UP");
    eprintln!("from `cordisk mount` to the guest's init: {:.1} s", begin.elapsed().as_secs_f64());
    guest.wait_for("SYNCED 2");
    let job = client.job();
    assert_eq!(
        (job["status"].as_str(), job["speed"].as_u64()),
        (Some("running"), Some(SLOW)),
        "{job}"
    );
    assert!(
        job["offset"].as_u64() < job["len"].as_u64(),
        "the stream has to run while the guest writes: {job}"
    );
    assert_locked(disk.path());

    client.finish_job("drive0");
    assert!(guest.is_running(), "the stream has to end before the guest does");
    // The guest writes some more rounds after the backing file is gone.
    guest.wait_for("SYNCED 9");
    guest.type_line("enough");
    let rounds = rounds_of(&mut guest, 9);
    let said = guest.wait_for("DONE");
    guest.wait_power_off();

    drop(client);
    disk.umount();
    qemu::assert_clean(&rack.overlay);
    rack.assert_complete(rounds, &said);
}

/// QEMU locks the disk like any raw file: a second QEMU is refused.
fn assert_locked(disk: &Path) {
    let mut second = Command::new("qemu-io");
    let done = run_within(
        second.args(["-f", "raw", "-c", "read 0 512"]).arg(disk),
        Duration::from_secs(60),
    );
    assert!(
        !done.status.success() && done.stderr.contains(" lock"),
        "a second QEMU has to be refused: {done:?}"
    );
}

/// Protects: a guest whose disk bypasses the host's page cache (`cache=none`: O_DIRECT on the
/// mounted file, with Linux aio as libvirt sets it) reads every byte of the golden image and keeps
/// every byte that it writes while the stream runs and ends. Afterwards it does not need the golden
/// image.
#[test]
fn guest_lives_with_cache_none() {
    live_and_power_off("a guest with cache=none", "cache=none,aio=native");
}

/// Protects: the same where the host caches the guest's writes, and the guest's flush sends them to
/// the daemon.
#[test]
fn guest_lives_with_cache_writeback() {
    live_and_power_off("a guest with cache=writeback", "cache=writeback,aio=threads");
}

/// Protects: P17 for a guest that boots, reads, writes and trims while the serving process of its
/// disk is killed again and again: it notices nothing.
#[test]
fn guest_lives_through_kills() {
    requires!(
        "/dev/fuse",
        "qemu-img",
        "qemu-system-x86_64",
        "mkfs.ext4",
        "e2fsck",
        "debugfs",
        machine::KERNEL
    );
    let rack = Rack::new("a guest whose disk is taken over");
    let disk = Mount::new(&rack.scratch, &rack.overlay).args(&["--transport", "dev"]).qmp().start();
    if !takeover::is_protected(&disk) {
        return;
    }
    disk.client().ok("block-stream", json!({"device": "drive0", "speed": SLOW}));
    let mut guest = rack.boot(&disk, "cache=none,aio=native");
    let ((rounds, said), kills) = takeover::with_kills(&disk, || {
        guest.wait_for("SYNCED 4");
        guest.type_line("enough");
        let rounds = rounds_of(&mut guest, 4);
        (rounds, guest.wait_for("DONE"))
    });
    guest.wait_power_off();
    eprintln!("{kills} kills in the life of a guest");
    assert!(kills >= 20, "{kills}");
    // The first step of each serving process is free of charge, so the stream may be complete.
    let mut client = disk.client();
    let _ = client.execute("block-job-set-speed", json!({"device": "drive0", "speed": 0}));
    wait_until("the stream is complete", || client.ok("query-block-jobs", json!({})) == json!([]));
    assert_eq!(client.ok("x-query-last-job", json!({}))["result"], "success");
    drop(client);
    disk.umount();
    qemu::assert_not_corrupt(&rack.overlay);
    Mount::new(&rack.scratch, &rack.overlay).start().umount();
    qemu::assert_clean(&rack.overlay);
    rack.assert_complete(rounds, &said);
}

/// Protects: data that a guest has synced survives when QEMU and then the daemon are killed, in the
/// middle of writes and of a stream.
#[test]
fn what_a_killed_guest_had_synced_is_there() {
    requires!(
        "/dev/fuse",
        "qemu-img",
        "qemu-system-x86_64",
        "mkfs.ext4",
        "e2fsck",
        "debugfs",
        machine::KERNEL
    );
    let rack = Rack::new("a guest that is killed");
    let disk: Daemon = Mount::new(&rack.scratch, &rack.overlay).qmp().start();
    let mut client = disk.client();
    client.ok("block-stream", json!({"device": "drive0", "speed": SLOW}));
    let mut guest = rack.boot(&disk, "cache=none,aio=threads");
    let mut said = guest.wait_for(&format!("SYNCED {}", rack.last));
    assert_eq!(client.job()["status"], "running");
    said.extend(guest.kill9());
    disk.kill9();

    let synced: u64 = said
        .iter()
        .filter_map(|line| line.strip_prefix("SYNCED ")?.parse().ok())
        .max()
        .expect("at least two");
    eprintln!("{synced} rounds were synced");
    qemu::assert_not_corrupt(&rack.overlay);
    rack.golden.assert_untouched();
    let (raw, dir) = rack.unpack();
    // The guest's journal is replayed first, as at its next boot; then e2fsck must find no error.
    let replay = run_within(Command::new("e2fsck").arg("-p").arg(&raw), Duration::from_secs(60));
    assert!(replay.status.code().is_some_and(|code| code <= 1), "{replay:?}");
    run_ok(Command::new("e2fsck").args(["-f", "-n"]).arg(&raw));
    let mut files = Rack::files_of(&raw, &dir);
    let mut want = rack.golden.after(rack.seed, synced);
    // The files of the interrupted round may exist, in part or not at all; its ranges belong to no
    // other round.
    let cut = synced + 1;
    files.remove(&format!("new/{cut}"));
    let range = usize::try_from(overwritten_at(cut)).expect("small")
        ..usize::try_from(overwritten_at(cut + 1)).expect("small");
    for files in [&mut files, &mut want] {
        files.get_mut(&format!("golden/change/{}", cut % 4)).expect("golden")[range.clone()]
            .fill(0);
    }
    assert_same_files(&files, &want);
}
