//! A Linux kernel boots from our disk, under QEMU, while the golden image below is streamed in: what users do, with all the software they use.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use serde_json::json;

use crate::support::machine::{self, Machine};
use crate::support::{CORDISK, Daemon, MIB, Mount, Pattern, Rng, Scratch, assert_same, qemu, run_ok, run_within, sha256};

const DISK: u64 = 256 * MIB;
/// Files that the guest reads at its start, files that it leaves alone until its end, files that it overwrites in place.
const GOLDEN: [(&str, u32, u64); 3] = [("read", 4, 8 * MIB), ("hold", 4, 12 * MIB), ("change", 4, 16 * MIB)];
/// Bytes per second. What the guest leaves alone lasts six minutes at this speed: the stream does not end before we say so.
const SLOW: u64 = 128 << 10;
/// The most rounds for which there is room in the files that are overwritten.
const ROUNDS: u64 = 60;

/// Content of files by name, `golden/change/0`.
type Files = BTreeMap<String, Vec<u8>>;

/// What the guest writes: `generate` of real_guest_init.sh.
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
    /// Made without mounting anything, so that no root is needed.
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
            let sums = run_ok(Command::new("sh").arg("-c").arg(format!("sha256sum golden/{kind}/*")).current_dir(&root));
            fs::write(root.join(format!("sums.{kind}")), sums).expect("sums");
        }
        fs::write(root.join("sbin/init"), include_str!("real_guest_init.sh")).expect("init");
        run_ok(Command::new("chmod").arg("755").arg(root.join("sbin/init")));
        let image = scratch.join("golden.raw");
        fs::File::create(&image).and_then(|file| file.set_len(DISK)).expect("golden image");
        run_ok(Command::new("mkfs.ext4").args(["-q", "-F", "-m", "0", "-d"]).arg(&root).arg(&image));
        fs::remove_dir_all(&root).expect("remove the tree");
        let sum = sha256(&image);
        Golden { image, sum, files }
    }

    fn assert_untouched(&self) {
        assert_eq!(sha256(&self.image), self.sum, "the golden image must never change");
    }

    /// What has to be on the disk after so many rounds.
    fn after(&self, seed: u64, rounds: u64) -> Files {
        let mut files = self.files.clone();
        for round in 1..=rounds {
            files.insert(format!("new/{round}"), content(seed, "new", round, 12_000));
            let over = content(seed, "over", round, 6000);
            let at = usize::try_from(overwritten_at(round)).expect("small");
            files.get_mut(&format!("golden/change/{}", round % 4)).expect("golden")[at..at + over.len()].copy_from_slice(&over);
        }
        files
    }
}

/// Where a round overwrites: `seek=` of real_guest_init.sh.
fn overwritten_at(round: u64) -> u64 {
    (round * 64 + 3) * 4096
}

/// An overlay over a golden image, and the numbers of this run.
struct Rack {
    scratch: Scratch,
    golden: Golden,
    overlay: PathBuf,
    seed: u64,
    /// The round after whose end the guest is killed, where it is.
    last: u64,
}

impl Rack {
    fn new(test: &str) -> Rack {
        let mut rng = Rng::for_test(test);
        let scratch = Scratch::new();
        let golden = Golden::make(&scratch, &mut rng);
        let overlay = scratch.join("overlay.qcow2");
        run_ok(Command::new(CORDISK).arg("create").arg(&overlay).args(["-b", "golden.raw", "-F", "raw"]));
        Rack { scratch, golden, overlay, seed: rng.below(1_000_000), last: 2 + rng.below(4) }
    }

    fn boot(&self, disk: &Daemon, drive: &str) -> Machine {
        let words = format!("cordisk.seed={} cordisk.rounds={ROUNDS}", self.seed);
        Machine::boot(disk.path(), drive, &words, &self.scratch.join("qemu.log"))
    }

    /// The file system inside of the overlay, as QEMU and e2fsprogs see it: its files, and the raw image that they are from.
    fn unpack(&self) -> (PathBuf, PathBuf) {
        (qemu::to_raw(&self.overlay, &self.scratch.join("raw")), self.scratch.dir("files"))
    }

    /// Files below `new` and `golden` in a raw image. debugfs(8) does not need a mount.
    fn files_of(raw: &Path, dir: &Path) -> Files {
        for name in ["new", "golden"] {
            run_ok(Command::new("debugfs").arg("-R").arg(format!("rdump /{name} {}", dir.display())).arg(raw));
        }
        let mut files = Files::new();
        let mut todo = vec![dir.join("new"), dir.join("golden")];
        while let Some(next) = todo.pop() {
            for entry in fs::read_dir(&next).unwrap_or_else(|error| panic!("{}: {error}", next.display())) {
                let path = entry.expect("entry").path();
                if path.is_dir() {
                    todo.push(path);
                } else {
                    let name = path.strip_prefix(dir).expect("below").to_str().expect("UTF-8").to_owned();
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

/// A whole life: boot, read, write, power off. The stream is slow until the guest writes, then fast, and ends while the guest writes still.
fn live_and_power_off(test: &str, drive: &str) {
    requires!("/dev/fuse", "qemu-img", "qemu-io", "qemu-system-x86_64", "mkfs.ext4", "e2fsck", "debugfs", machine::KERNEL);
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
    assert_eq!((job["status"].as_str(), job["speed"].as_u64()), (Some("running"), Some(SLOW)), "{job}");
    assert!(job["offset"].as_u64() < job["len"].as_u64(), "the stream has to run while the guest writes: {job}");
    assert_locked(disk.path());

    client.finish_job("drive0");
    assert!(guest.is_running(), "the stream has to end before the guest does");
    // Some more, now that there is nothing below.
    guest.wait_for("SYNCED 9");
    guest.type_line("enough");
    let rounds = guest.wait_for("ROUNDS").last().and_then(|line| line.strip_prefix("ROUNDS ")?.parse().ok()).expect("a number of rounds");
    assert!((9..=ROUNDS).contains(&rounds), "{rounds} rounds");
    let said = guest.wait_for("DONE");
    guest.wait_power_off();

    drop(client);
    disk.umount();
    qemu::assert_clean(&rack.overlay);
    qemu::assert_independent(&rack.overlay);
    rack.golden.assert_untouched();
    fs::rename(&rack.golden.image, rack.scratch.join("moved away")).expect("move the golden image away");
    let (raw, dir) = rack.unpack();
    run_ok(Command::new("e2fsck").args(["-f", "-n"]).arg(&raw));
    let files = Rack::files_of(&raw, &dir);
    assert_same_files(&files, &rack.golden.after(rack.seed, rounds));
    // What the guest read in the end is what is there.
    let sums: Vec<(&str, &str)> = said.iter().filter_map(|line| line.strip_prefix("SUM ")?.split_once("  /")).collect();
    assert_eq!(sums.len() as u64, rounds + 4, "a sum for every file that was written: {said:?}");
    for (sum, name) in sums {
        assert_eq!(sum, sha256(&dir.join(name)), "{name} as the guest read it");
    }
}

/// QEMU locks the disk as it locks any raw file: a second QEMU is refused.
fn assert_locked(disk: &Path) {
    let mut second = Command::new("qemu-io");
    let done = run_within(second.args(["-f", "raw", "-c", "read 0 512"]).arg(disk), Duration::from_secs(60));
    assert!(!done.status.success() && done.stderr.contains(" lock"), "a second QEMU has to be refused: {done:?}");
}

/// Protects: a guest whose disk bypasses the host's memory (`cache=none`: O_DIRECT on our file, with Linux aio as libvirt sets it) finds every byte
/// of the golden image, keeps every byte that it writes while the stream runs and ends, and needs the golden image no longer afterwards.
#[test]
fn guest_lives_with_cache_none() {
    live_and_power_off("a guest with cache=none", "cache=none,aio=native");
}

/// Protects: the same where the host caches what the guest writes, and the guest's flush is what brings it to us.
#[test]
fn guest_lives_with_cache_writeback() {
    live_and_power_off("a guest with cache=writeback", "cache=writeback,aio=threads");
}

/// Protects: what a guest has synced survives that QEMU and the daemon are killed, one after the other, in the middle of writes and of a stream.
#[test]
fn what_a_killed_guest_had_synced_is_there() {
    requires!("/dev/fuse", "qemu-img", "qemu-system-x86_64", "mkfs.ext4", "e2fsck", "debugfs", machine::KERNEL);
    let rack = Rack::new("a guest that is killed");
    let disk: Daemon = Mount::new(&rack.scratch, &rack.overlay).qmp().start();
    let mut client = disk.client();
    client.ok("block-stream", json!({"device": "drive0", "speed": SLOW}));
    let mut guest = rack.boot(&disk, "cache=none,aio=threads");
    let mut said = guest.wait_for(&format!("SYNCED {}", rack.last));
    assert_eq!(client.job()["status"], "running");
    said.extend(guest.kill9());
    disk.kill9();

    let synced: u64 = said.iter().filter_map(|line| line.strip_prefix("SYNCED ")?.parse().ok()).max().expect("at least two");
    eprintln!("{synced} rounds were synced");
    qemu::assert_not_corrupt(&rack.overlay);
    rack.golden.assert_untouched();
    let (raw, dir) = rack.unpack();
    // The guest's journal first, as at its next boot; then nothing may be wrong.
    let replay = run_within(Command::new("e2fsck").arg("-p").arg(&raw), Duration::from_secs(60));
    assert!(replay.status.code().is_some_and(|code| code <= 1), "{replay:?}");
    run_ok(Command::new("e2fsck").args(["-f", "-n"]).arg(&raw));
    let mut files = Rack::files_of(&raw, &dir);
    let mut want = rack.golden.after(rack.seed, synced);
    // The round that was cut off may be there, in part or not at all; its ranges belong to no other round.
    let cut = synced + 1;
    files.remove(&format!("new/{cut}"));
    let range = usize::try_from(overwritten_at(cut)).expect("small")..usize::try_from(overwritten_at(cut + 1)).expect("small");
    for files in [&mut files, &mut want] {
        files.get_mut(&format!("golden/change/{}", cut % 4)).expect("golden")[range.clone()].fill(0);
    }
    assert_same_files(&files, &want);
}
