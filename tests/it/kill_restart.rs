//! SIGKILL at critical moments. Data that was flushed, and the state that an event reported, must
//! be there afterwards (P1 to P4).

use std::fs::{self, OpenOptions};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::time::Duration;

use rustix::fs::{OFlags, fallocate};
use serde_json::json;

use crate::support::guest::PUNCH;
use crate::support::{CLUSTER, KIB, MIB, Pattern, Rig, Rng, assert_same, qemu};

/// Protects: P3. QEMU 10 loses the whole disk if it is killed right after the completion event (it
/// has written its header, but not its tables). The test kills cordisk the moment it reads the
/// event, deletes the base, and expects every byte, 20 times of 20, including the guest's own
/// writes, which were not flushed.
#[test]
fn killed_right_after_completion_every_byte_is_there() {
    requires!("/dev/fuse", "qemu-img");
    for round in 0..20u64 {
        let options = [
            "",
            "cluster_size=4k",
            "cluster_size=2M",
            "extended_l2=on",
            "compat=0.10",
            "cluster_size=512",
        ][usize::try_from(round % 6).expect("small")];
        let size = 2 * MIB + round * 50 * KIB;
        let rig = Rig::with(Pattern::new(30, 1).bytes(0, size), options);
        let disk = rig.mount().qmp().start();
        let mut guest = rig.guest(&disk);
        guest.write(70_000..200_000);
        guest.punch(MIB..MIB + 100_000);
        let reference = rig.scratch.write("reference", &guest.shadow);
        let mut client = disk.client();
        client.ok("block_stream", json!({"device": "drive0"}));
        client.wait_event("BLOCK_JOB_COMPLETED");
        disk.kill9();
        drop(guest.file);
        rig.remove_base();
        qemu::assert_not_corrupt(&rig.overlay);
        qemu::assert_independent(&rig.overlay);
        qemu::assert_compare(&rig.overlay, &reference);
        let disk = rig.mount().start();
        assert_same("and we can mount it again", &disk.read_all(), &guest.shadow);
        disk.umount();
        qemu::assert_not_corrupt(&rig.overlay);
    }
}

const SECTOR: u64 = 512;
const SEED: u32 = 31;
const BASE_VERSION: u32 = 1;
/// The version of a sector that was discarded: zeros.
const ZEROS: u32 = u32::MAX;

/// For every sector: the version that was flushed last, and the later versions, any of which may be
/// there after a kill.
struct Ledger {
    flushed: Vec<u32>,
    since: Vec<Vec<u32>>,
    version: u32,
}

impl Ledger {
    fn new(size: u64) -> Ledger {
        let sectors = usize::try_from(size / SECTOR).expect("small");
        Ledger {
            flushed: vec![BASE_VERSION; sectors],
            since: vec![Vec::new(); sectors],
            version: 100,
        }
    }

    /// Records a write before it is issued: a kill in the middle of it may keep it or lose it.
    fn writing(&mut self, sectors: std::ops::Range<u64>, version: u32) {
        for sector in sectors {
            self.since[usize::try_from(sector).expect("small")].push(version);
        }
    }

    /// Records a flush that has returned.
    fn flushed(&mut self) {
        for (flushed, since) in self.flushed.iter_mut().zip(&mut self.since) {
            if let Some(last) = since.pop() {
                *flushed = last;
                since.clear();
            }
        }
    }

    fn sector(version: u32, number: u64) -> Vec<u8> {
        if version == ZEROS {
            vec![0; 512]
        } else {
            Pattern::new(SEED, version).bytes(number * SECTOR, SECTOR)
        }
    }

    /// Checks that every sector has its flushed version or a later one; the versions that it finds
    /// become the starting point.
    fn verify(&mut self, content: &[u8]) {
        assert_eq!(content.len(), self.flushed.len() * 512);
        for (number, got) in content.chunks(512).enumerate() {
            let place = number as u64;
            let found = self.since[number]
                .iter()
                .rev()
                .copied()
                .find(|version| Ledger::sector(*version, place) == got);
            match found {
                Some(version) => self.flushed[number] = version,
                None => {
                    let what = format!(
                        "sector {number} (flushed version {}, since {:?})",
                        self.flushed[number], self.since[number]
                    );
                    let want = Ledger::sector(self.flushed[number], place);
                    crate::support::pattern::assert_same_at(&what, place * SECTOR, got, &want);
                }
            }
            self.since[number].clear();
        }
    }
}

/// Protects: P1, P2, P4 while a guest writes, discards, reads and flushes during a stream, and the
/// daemon is killed at a random moment. Flushed data is there after the restart, each sector has
/// the flushed or a later version, and the image has no corruption (leaks are allowed). Several
/// rounds use the same image, and at the end a stream completes.
#[test]
fn killed_in_the_middle_of_a_stream_flushed_data_is_there() {
    requires!("/dev/fuse", "qemu-img");
    let mut rng = Rng::for_test("killed in the middle of a stream");
    for options in [
        "cluster_size=64k",
        "cluster_size=64k,extended_l2=on",
        "cluster_size=512",
        "cluster_size=4k,compat=0.10",
        "cluster_size=2M",
    ] {
        let size = if options.contains("2M") { 24 * MIB } else { 8 * MIB };
        let rig = Rig::with(Pattern::new(SEED, BASE_VERSION).bytes(0, size), options);
        let mut ledger = Ledger::new(size);
        for round in 0..6 {
            // Each round starts a new stream.
            let disk = rig.mount().qmp().args(&["--no-resume"]).start();
            let mut client = disk.client();
            let speed = if round % 2 == 0 { 4 * MIB } else { 0 };
            client.ok("block-stream", json!({"device": "drive0", "speed": speed}));
            let (file, delay) = (disk.open(), Duration::from_millis(20 + rng.below(300)));
            let mut flushes = 0;
            std::thread::scope(|scope| {
                let guest = scope.spawn(|| {
                    loop {
                        let sectors = rng.range(size / SECTOR, 400);
                        let (offset, len) =
                            (sectors.start * SECTOR, (sectors.end - sectors.start) * SECTOR);
                        ledger.version += 1;
                        let version = ledger.version;
                        let done = match rng.below(8) {
                            0 => {
                                ledger.writing(sectors, ZEROS);
                                fallocate(&file, PUNCH, offset, len).is_ok()
                            }
                            1 => file
                                .read_at(&mut vec![0; usize::try_from(len).expect("small")], offset)
                                .is_ok(),
                            2 => {
                                let done = file.sync_data().is_ok();
                                if done {
                                    ledger.flushed();
                                    flushes += 1;
                                }
                                done
                            }
                            _ => {
                                let data = Pattern::new(SEED, version).bytes(offset, len);
                                ledger.writing(sectors, version);
                                file.write_all_at(&data, offset).is_ok()
                            }
                        };
                        if !done {
                            return; // killed
                        }
                    }
                });
                std::thread::sleep(delay);
                disk.kill9();
                guest.join().expect("guest");
            });
            eprintln!(
                "{options}, round {round}: killed after {delay:?}, {flushes} flushes, version {}",
                ledger.version
            );
            qemu::assert_not_corrupt(&rig.overlay);
            ledger.verify(&qemu::read_all(&rig.overlay));
        }
        let disk = rig.mount().qmp().args(&["--no-resume"]).start();
        let content = disk.read_all();
        ledger.verify(&content);
        let mut client = disk.client();
        client.ok("block-stream", json!({"device": "drive0"}));
        client.wait_completed();
        disk.umount();
        // If a stream completed in one of the rounds, the base was not needed afterwards; removing
        // it proves that too.
        rig.remove_base();
        qemu::assert_not_corrupt(&rig.overlay);
        qemu::assert_independent(&rig.overlay);
        assert_same("after the last stream", &qemu::read_all(&rig.overlay), &content);
    }
}

/// Protects: P1 on every path that promises durability, among them O_DSYNC and O_SYNC: on a
/// direct-I/O mount the kernel sends no fsync for them, only flags of the write. After an immediate
/// kill the data is there.
#[test]
fn every_way_to_flush_survives_a_kill() {
    requires!("/dev/fuse", "qemu-img");
    for way in ["fsync", "fdatasync", "close", "O_DSYNC", "O_SYNC", "RWF_DSYNC", "punch and fsync"]
    {
        eprintln!("{way}");
        let rig = Rig::new(2 * MIB);
        let disk = rig.mount().start();
        let flags = match way {
            "O_DSYNC" => OFlags::DSYNC,
            "O_SYNC" => OFlags::SYNC,
            _ => OFlags::empty(),
        };
        let flags = i32::try_from(flags.bits()).expect("flags fit");
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(flags)
            .open(disk.path())
            .expect("open");
        let mut want = rig.content.clone();
        let offset = 5 * CLUSTER - 1000; // two clusters that are not local, both in part
        let data = Pattern::new(32, 2).bytes(offset, 3000);
        let at = usize::try_from(offset).expect("small");
        match way {
            "punch and fsync" => {
                fallocate(&file, PUNCH, offset, 3000).expect("punch");
                want[at..at + 3000].fill(0);
            }
            "RWF_DSYNC" => {
                let slices = [std::io::IoSlice::new(&data)];
                let n =
                    rustix::io::pwritev2(&file, &slices, offset, rustix::io::ReadWriteFlags::DSYNC)
                        .expect("pwritev2");
                assert_eq!(n, data.len());
                want[at..at + 3000].copy_from_slice(&data);
            }
            _ => {
                file.write_all_at(&data, offset).expect("write");
                want[at..at + 3000].copy_from_slice(&data);
            }
        }
        match way {
            "fsync" | "punch and fsync" => file.sync_all().expect("fsync"),
            "fdatasync" => file.sync_data().expect("fdatasync"),
            "close" => drop(file.try_clone().expect("dup")), // closing any descriptor flushes
            _ => {}
        }
        disk.kill9();
        drop(file);
        qemu::assert_not_corrupt(&rig.overlay);
        assert_same(way, &qemu::read_all(&rig.overlay), &want);
    }
}

/// Protects: P2: data that no request flushed is durable after the commit interval (1 s; the test
/// waits three times as long).
#[test]
fn unflushed_writes_are_committed_by_the_timer() {
    requires!("/dev/fuse", "qemu-img");
    let rig = Rig::new(4 * MIB);
    let disk = rig.mount().start();
    let mut guest = rig.guest(&disk);
    guest.write(100_000..1_000_000);
    guest.punch(2 * MIB..3 * MIB);
    std::thread::sleep(Duration::from_secs(3));
    disk.kill9();
    drop(guest.file);
    qemu::assert_not_corrupt(&rig.overlay);
    assert_same("three seconds later", &qemu::read_all(&rig.overlay), &guest.shadow);
}

/// Protects: losing the copies of copy-on-read costs leaks at most, never content; and the dead
/// mount can be replaced at the same place.
#[test]
fn killed_after_copy_on_read_nothing_is_wrong() {
    requires!("/dev/fuse", "qemu-img");
    for options in ["", "cluster_size=512", "extended_l2=on"] {
        let rig = Rig::with(Pattern::new(33, 1).bytes(0, 4 * MIB), options);
        let disk = rig.mount().start();
        let path = disk.path().to_owned();
        assert_same("disk", &disk.read_all(), &rig.content);
        disk.kill9();
        assert!(path.exists(), "nobody was there to remove the placeholder");
        assert_eq!(
            fs::metadata(&path).expect("stat").len(),
            0,
            "and it is empty, so nobody takes it for the disk"
        );
        qemu::assert_not_corrupt(&rig.overlay);
        assert_same("overlay", &qemu::read_all(&rig.overlay), &rig.content);
        let disk = rig.mount().start();
        assert_same("mounted again", &disk.read_all(), &rig.content);
        disk.umount();
        qemu::assert_not_corrupt(&rig.overlay);
    }
}
