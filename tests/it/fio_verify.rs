//! fio writes checksummed blocks in random order and reads them back, through the mount and through
//! a loop device, while a stream runs. Afterwards QEMU reads the same bytes from the image, and fio
//! verifies them.

use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use serde_json::json;

use crate::support::mounts::LoopDevice;
use crate::support::{Daemon, KIB, MIB, Rig, assert_same, qemu, run_ok, run_within};

/// One workload. Its random numbers repeat (fio's own seed), so that a later run can verify without
/// writing.
#[derive(Clone, Copy, Debug)]
struct Workload {
    block: u64,
    /// Bytes of the disk that the workload uses.
    size: u64,
    rw: &'static str,
    direct: bool,
}

fn fio(scratch: &Path, file: &Path, work: Workload, verify_only: bool) -> Command {
    let mut command = Command::new("fio");
    command.current_dir(scratch);
    command.args([
        "--name=verify",
        "--ioengine=psync",
        "--verify=crc32c",
        "--verify_fatal=1",
        "--do_verify=1",
        "--randrepeat=1",
    ]);
    command.args([
        "--allrandrepeat=1",
        "--verify_state_save=0",
        "--fsync=64",
        "--thread",
        "--allow_file_create=0",
    ]);
    command.arg(format!("--filename={}", file.display()));
    command
        .arg(format!("--rw={}", work.rw))
        .arg(format!("--bs={}", work.block))
        .arg(format!("--size={}", work.size));
    command.arg(format!("--direct={}", u8::from(work.direct)));
    if verify_only {
        command.arg("--verify_only");
    }
    command
}

fn run_fio(scratch: &Path, file: &Path, work: Workload, verify_only: bool) {
    let done = run_within(&mut fio(scratch, file, work, verify_only), Duration::from_secs(200));
    assert!(
        done.status.success(),
        "fio {work:?} (verify only: {verify_only}): {}\n{}{}",
        done.status,
        done.stdout,
        done.stderr
    );
}

/// Runs one workload on a fresh overlay while it is streamed at `speed`.
fn while_streaming(work: Workload, speed: u64) {
    eprintln!("{work:?} at speed {speed}");
    let rig = Rig::new(32 * MIB);
    let disk: Daemon = rig.mount().qmp().start();
    let mut client = disk.client();
    let mut child = {
        let mut command = fio(rig.scratch.path(), disk.path(), work, false);
        command.stdout(fs::File::create(rig.scratch.join("fio.log")).expect("log"));
        command.stderr(Stdio::null()).stdin(Stdio::null());
        command.spawn().expect("fio")
    };
    client.ok("block-stream", json!({"device": "drive0", "speed": speed}));
    let status = crate::support::poll(Duration::from_secs(200), || child.try_wait().expect("wait"));
    if status.is_none() {
        let _ = child.kill();
        let _ = child.wait();
    }
    let log = fs::read_to_string(rig.scratch.join("fio.log")).unwrap_or_default();
    assert!(
        status.is_some_and(|status| status.success()),
        "fio {work:?}: {status:?}\n{log}\n{}",
        disk.log()
    );
    client.finish_job("drive0");
    run_fio(rig.scratch.path(), disk.path(), work, true);
    let content = disk.read_all();
    // Bytes that fio did not write are those of the base.
    let rest =
        usize::try_from(work.size.next_multiple_of(work.block)).expect("small").min(content.len());
    assert_same("beyond the workload", &content[rest..], &rig.content[rest..]);
    drop(client);
    disk.umount();
    rig.assert_standalone(&content);
    let raw = qemu::to_raw(&rig.overlay, &rig.scratch.join("converted"));
    run_fio(rig.scratch.path(), &raw, work, true);
}

/// Protects: integrity of small requests: sectors, many of them in the same cluster, local and
/// missing.
#[test]
fn sectors_of_512_bytes() {
    requires!("/dev/fuse", "qemu-img", "fio");
    for speed in [0, 8 * MIB] {
        while_streaming(
            Workload { block: 512, size: 3 * MIB, rw: "randwrite", direct: true },
            speed,
        );
    }
}

/// Protects: integrity at the page size, over the whole disk.
#[test]
fn pages_of_4k() {
    requires!("/dev/fuse", "qemu-img", "fio");
    for speed in [0, 16 * MIB] {
        while_streaming(
            Workload { block: 4 * KIB, size: 32 * MIB, rw: "randrw", direct: true },
            speed,
        );
    }
}

/// Protects: integrity at the cluster size, where a write needs nothing from the base and races
/// with a copy of the same cluster.
#[test]
fn clusters_of_64k() {
    requires!("/dev/fuse", "qemu-img", "fio");
    for speed in [0, 16 * MIB] {
        while_streaming(
            Workload { block: 64 * KIB, size: 32 * MIB, rw: "randwrite", direct: true },
            speed,
        );
    }
}

/// Protects: integrity of blocks that are aligned neither to sectors nor to clusters.
#[test]
fn unaligned_blocks() {
    requires!("/dev/fuse", "qemu-img", "fio");
    for (block, speed) in [(5000, 0), (70_001, 16 * MIB)] {
        while_streaming(Workload { block, size: 16 * MIB, rw: "randwrite", direct: false }, speed);
    }
}

/// Protects: discards between writes, as an SSD gets them, through a loop device that turns them
/// into punched holes of the disk. Trimmed and rewritten blocks verify. Trimmed blocks read as
/// zeros before and after the end of the stream, never as the base.
#[test]
fn random_trims_through_a_loop_device() {
    requires!("/dev/fuse", "root", "qemu-img", "fio", "losetup");
    for (block, speed) in [(4 * KIB, 0), (64 * KIB, 16 * MIB), (512, 0)] {
        eprintln!("trims of {block} at speed {speed}");
        let rig = Rig::new(32 * MIB);
        let disk: Daemon = rig.mount().qmp().start();
        let mut client = disk.client();
        client.ok("block-stream", json!({"device": "drive0", "speed": speed}));
        let device = LoopDevice::attach(disk.path());
        let size = if block == 512 { MIB } else { 16 * MIB };
        let work = Workload { block, size, rw: "randtrimwrite", direct: true };
        run_fio(rig.scratch.path(), device.device(), work, false);
        let before = disk.read_all();
        // Then a region that fio has not used is trimmed, block by block in random order.
        let mut trim = Command::new("fio");
        trim.current_dir(rig.scratch.path());
        trim.args([
            "--name=trim",
            "--ioengine=psync",
            "--rw=randtrim",
            "--direct=1",
            "--thread",
            "--allow_file_create=0",
        ]);
        trim.arg(format!("--filename={}", device.device().display())).arg(format!("--bs={block}"));
        let trimmed = size.min(8 * MIB);
        run_ok(trim.arg(format!("--offset={}", 20 * MIB)).arg(format!("--size={trimmed}")));
        let mut want = before;
        let start = usize::try_from(20 * MIB).expect("small");
        want[start..start + usize::try_from(trimmed).expect("small")].fill(0);
        assert_same("after the trims", &disk.read_all(), &want);
        client.finish_job("drive0");
        assert_same("after the stream", &disk.read_all(), &want);
        device.detach();
        drop(client);
        disk.umount();
        rig.assert_standalone(&want);
    }
}
