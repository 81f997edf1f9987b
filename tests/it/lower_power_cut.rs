//! The power fails below the overlay: its file system is shut down during requests, without a flush
//! of its log (`xfs_io -x -c shutdown`; `-f` would flush it), as if the plug had been pulled. The
//! content of the page cache is lost, and so is the unwritten part of the journal (P4, P7, P13).
//! `CORDISK_POWER_CUTS=N` sets the number of cycles on each file system.
//!
//! btrfs is not tested, because it cannot be shut down before Linux 6.19.

use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use rustix::fs::OFlags;
use rustix::io::Errno;
use serde_json::json;

use crate::support::ledger::{Hands, Ledger, SECTOR, Verified};
use crate::support::mounts::{LoopMount, make_fs, umount};
use crate::support::{
    Daemon, KIB, MIB, Mount, Pattern, Rng, Scratch, assert_same, errno, qemu, read_at, run_ok,
};

const CYCLES: u64 = 5;
const SIZE: u64 = 12 * MIB + SECTOR;
const HANDS: u64 = 6;
const OWN: u64 = 1536 * KIB;
/// Behind the regions of the writers: no thread writes here.
const ONLY_READ: std::ops::Range<u64> = HANDS * OWN..SIZE;

/// A file system in a file, for the overlay only.
struct Lower {
    scratch: Scratch,
    fstype: &'static str,
}

impl Lower {
    fn new(fstype: &'static str, size: u64) -> Lower {
        let scratch = Scratch::new();
        make_fs(&scratch.join("lower.img"), fstype, size);
        scratch.dir("lower");
        Lower { scratch, fstype }
    }

    fn mount(&self) -> LoopMount {
        LoopMount::new(&self.scratch.join("lower.img"), self.fstype, &self.scratch.join("lower"))
    }

    fn cut_the_power(&self) {
        // -x enables the expert commands.
        run_ok(
            Command::new("xfs_io").args(["-x", "-c", "shutdown"]).arg(self.scratch.join("lower")),
        );
    }
}

/// Asserts that after the cut every write and flush fails, no request hangs, and clusters that only
/// the base holds can still be read.
fn assert_dead_to_writes(disk: &Daemon, file: &File, ledger: &Ledger) {
    assert_eq!(errno(file.sync_all()), Errno::IO, "a flush after the cut");
    for offset in [0, 3 * OWN, ONLY_READ.start] {
        assert_eq!(
            errno(file.write_all_at(&[1; 512], offset)),
            Errno::IO,
            "a write at {offset} after the cut"
        );
        assert_eq!(errno(file.sync_all()), Errno::IO, "and no flush succeeds again");
    }
    let mut client = disk.client();
    client.ok("query-block-jobs", json!({}));
    // XFS does not even report the size of a file any more; the reply is then an error, and the
    // query does not hang.
    if let Err(error) = client.execute("query-block", json!({})) {
        assert!(error.desc.contains("Input/output error"), "{error:?}");
    }
    // Local data is lost with its file system; all other data comes from the base.
    let mut buf = vec![0; 4096];
    for offset in (ONLY_READ.start..ONLY_READ.end - 4096).step_by(64 << 10) {
        match file.read_exact_at(&mut buf, offset) {
            Ok(()) => {
                let at = usize::try_from(offset).expect("small");
                assert_same("read after the cut", &buf, &ledger.golden()[at..at + buf.len()]);
            }
            Err(error) => assert_eq!(error.raw_os_error(), Some(Errno::IO.raw_os_error())),
        }
    }
}

fn power_cuts(fstype: &'static str, size: u64) {
    let mut rng = Rng::for_test(&format!("power cuts below {fstype}"));
    let lower = Lower::new(fstype, size);
    let golden = Pattern::new(60, 1).bytes(0, SIZE);
    let base = lower.scratch.write("golden.raw", &golden);
    let ledger = Ledger::new(golden, 61);
    let overlay = lower.scratch.join("lower/overlay.qcow2");
    let mut content = Vec::new();
    let mut total = Verified::default();
    let cycles = std::env::var("CORDISK_POWER_CUTS")
        .ok()
        .map_or(CYCLES, |text| text.parse().expect("CORDISK_POWER_CUTS is a number"));
    for cycle in 0..cycles {
        let mounted = lower.mount();
        if cycle % 5 == 0 {
            // Makes a new overlay, durable before the cycle begins. The ledger continues with the
            // content of the last one.
            let options = ["", "cluster_size=4k", "extended_l2=on", "cluster_size=512"]
                [usize::try_from(cycle / 5 % 4).expect("small")];
            let below = if content.is_empty() {
                base.clone()
            } else {
                lower.scratch.write("golden2.raw", &content)
            };
            let _ = fs::remove_file(&overlay);
            qemu::create(&overlay, None, options, Some((below.to_str().expect("UTF-8"), "raw")));
            run_ok(Command::new("sync").arg("-f").arg(&overlay));
        }
        let mut disk = Mount::named(&lower.scratch, &overlay, &format!("cycle{cycle}"))
            .args(&["--reserve", "0", "--no-resume"])
            .qmp()
            .start();
        let speed = [MIB, 8 * MIB][usize::try_from(cycle % 2).expect("small")];
        disk.client().ok("block-stream", json!({"device": "drive0", "speed": speed}));
        let file = disk.open();
        let synced = i32::try_from(OFlags::DSYNC.bits()).expect("a flag");
        let synced = OpenOptions::new()
            .write(true)
            .custom_flags(synced)
            .open(disk.path())
            .expect("open with O_DSYNC");
        let ending = AtomicBool::new(false);
        let hands = Hands { ledger: &ledger, file: &file, synced: &synced, ending: &ending };
        std::thread::scope(|scope| {
            for hand in 0..HANDS {
                let (hands, rng) = (&hands, Rng::new(rng.next()));
                scope
                    .spawn(move || hands.write_until_the_end(rng, &(hand * OWN..(hand + 1) * OWN)));
            }
            std::thread::sleep(Duration::from_millis(50 + rng.below(600)));
            ending.store(true, Ordering::SeqCst);
            lower.cut_the_power();
            // The writers end with an error, or the watchdog of the disk ends them and the test.
        });
        assert_dead_to_writes(&disk, &file, &ledger);
        drop((file, synced));
        umount(disk.path());
        let ended = disk
            .ended_within(Duration::from_secs(30))
            .expect("the daemon ends when it is unmounted");
        assert_eq!(
            ended.code(),
            Some(1),
            "not everything could be written back, and the exit status says so\n{}",
            disk.log()
        );
        drop(disk);
        mounted.umount().detach();

        let mounted = lower.mount();
        let what = format!("{fstype}, cycle {cycle}");
        qemu::assert_not_corrupt(&overlay);
        content = qemu::read_all(&overlay);
        let verified = ledger.verify(&what, &content, &[0..SIZE]);
        ledger.turn_the_page();
        eprintln!("{what}: {verified:?}");
        total += verified;
        // The disk can be mounted and written again.
        let disk = Mount::named(&lower.scratch, &overlay, &format!("after{cycle}"))
            .args(&["--no-copy-on-read", "--no-resume"])
            .start();
        assert_same("through a new mount", &disk.read_all(), &content);
        let file = disk.open();
        let again = read_at(&file, 0, 512);
        file.write_all_at(&again, 0)
            .and_then(|()| file.sync_all())
            .expect("writes are accepted again");
        drop(file);
        disk.umount();
        mounted.umount().detach();
    }
    eprintln!("{cycles} power cuts below {fstype}: {total:?}");
    assert!(
        cycles < CYCLES || total.durable > 0 && total.touched > total.durable,
        "nothing was put to the test: {total:?}"
    );
    assert_same("the base must never change", &fs::read(&base).expect("base"), ledger.golden());
}

/// Protects: P4 and P7 on ext4: flushed data is there, every other sector is old or new,
/// the image has no corruption, and after the cut no request hangs or wrongly succeeds.
/// There is so much free space that blocks are allocated ahead of new clusters.
#[test]
fn the_power_fails_below_ext4() {
    requires!("/dev/fuse", "root", "qemu-img", "losetup", "mkfs.ext4", "xfs_io");
    power_cuts("ext4", 1024 * MIB);
}

/// Protects: the same on XFS, which writes its log and its data in another order. (300 MiB is its
/// minimum size.)
#[test]
fn the_power_fails_below_xfs() {
    requires!("/dev/fuse", "root", "qemu-img", "losetup", "mkfs.xfs", "fs:xfs", "xfs_io");
    power_cuts("xfs", 300 * MIB);
}
