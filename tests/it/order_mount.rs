//! `mount --order auto` and `mount --learn` above a base on this host.

use std::fs;
use std::process::Command;

use order::{BaseIdentity, Order, Touch};
use rustix::fs::{Advice, fadvise};
use serde_json::json;

use crate::support::{
    Daemon, KIB, MIB, Mount, Pattern, Scratch, assert_same, qemu, read_at, run_ok, run_within,
    wait_until,
};

const SIZE: u64 = 32 * MIB;
const BLOCK: u64 = 64 * KIB;

/// A base with data everywhere, and an overlay.
fn disk(scratch: &Scratch, name: &str) -> std::path::PathBuf {
    let base = scratch.join("base.raw");
    if !base.exists() {
        scratch.raw("base.raw", SIZE, Pattern::new(7, 1));
    }
    let overlay = scratch.join(name);
    let base = base.to_str().expect("UTF-8");
    run_ok(scratch.cordisk().args(["create", "-b", base, "-F", "raw"]).arg(&overlay));
    overlay
}

/// Reads a few bytes of each block.
fn touch(disk: &Daemon, blocks: &[u64]) {
    let file = disk.open();
    fadvise(&file, 0, None, Advice::Random).expect("fadvise");
    for block in blocks {
        let got = read_at(&file, block * BLOCK + 100, 1000);
        assert_same("the disk", &got, &Pattern::new(7, 1).bytes(block * BLOCK + 100, 1000));
    }
}

/// The order beside the base: offsets in blocks, and votes.
fn learned(scratch: &Scratch) -> Vec<(u64, u64, u32)> {
    let bytes = fs::read(scratch.join("base.raw.order")).expect("the order");
    let order = Order::decode(&bytes).expect("an order");
    order
        .ranges()
        .iter()
        .map(|range| (range.offset / BLOCK, range.len / BLOCK, range.votes))
        .collect()
}

/// Protects: a disk leaves the order of its guest beside the base, and the next one merges its own
/// with it. A disk of which nothing was read leaves nothing, and without the option none is left.
#[test]
fn a_disk_leaves_its_order_beside_the_base() {
    requires!("/dev/fuse", "qemu-img");
    let scratch = Scratch::new();
    let overlay = disk(&scratch, "one.qcow2");
    let mounted = Mount::named(&scratch, &overlay, "zero").start();
    touch(&mounted, &[3]);
    mounted.umount();
    assert!(!scratch.join("base.raw.order").exists());
    let overlay = disk(&scratch, "two.qcow2");
    let mounted = Mount::named(&scratch, &overlay, "idle").args(&["--learn"]).start();
    mounted.umount();
    assert!(!scratch.join("base.raw.order").exists());

    let mounted = Mount::named(&scratch, &overlay, "one").args(&["--learn"]).start();
    touch(&mounted, &[300, 20, 100]);
    mounted.umount();
    assert_eq!(learned(&scratch), [(300, 1, 1), (20, 1, 1), (100, 1, 1)]);

    // The stream of the second one follows the order of the first one; what it has brought counts
    // when the guest reads it.
    let overlay = disk(&scratch, "three.qcow2");
    let mounted = Mount::named(&scratch, &overlay, "two").args(&["--learn", "--stream"]).start();
    wait_until("the log says so", || mounted.log().contains("streams follow the order"));
    let status = || -> serde_json::Value {
        let text = run_ok(scratch.cordisk().args(["status", "--json"]).arg(mounted.path()));
        serde_json::from_str(&text).expect("JSON")
    };
    wait_until("the stream is complete", || status()[0]["last-job"]["result"] == json!("success"));
    touch(&mounted, &[300, 20, 7]);
    mounted.umount();
    let votes = learned(&scratch);
    assert_eq!(votes.len(), 4, "{votes:?}");
    for expected in [(300, 1, 2), (20, 1, 2), (100, 1, 1), (7, 1, 1)] {
        assert!(votes.contains(&expected), "{votes:?}");
    }
    let left: Vec<_> = fs::read_dir(scratch.path())
        .expect("scratch")
        .flatten()
        .filter(|entry| entry.file_name().to_string_lossy().contains(".part"))
        .collect();
    assert!(left.is_empty(), "{left:?}");
}

/// Protects: an order that belongs to another disk is neither followed nor merged with.
#[test]
fn the_order_of_another_disk_is_replaced() {
    requires!("/dev/fuse", "qemu-img");
    let scratch = Scratch::new();
    let overlay = disk(&scratch, "one.qcow2");
    let other = BaseIdentity { size: SIZE, head: [1; 32], pin: None };
    let touches = [Touch { offset: 0, len: BLOCK, at_ms: 0 }];
    scratch.write("base.raw.order", &Order::from_touches(other, touches).encode());
    let mounted = Mount::named(&scratch, &overlay, "one").args(&["--learn"]).start();
    wait_until("the log says so", || mounted.log().contains("base.raw.order is not used: "));
    touch(&mounted, &[9]);
    mounted.umount();
    assert_eq!(learned(&scratch), [(9, 1, 1)]);
}

/// Protects: without an order, `--order auto` follows what the file system says, and the stream
/// leaves the right disk.
#[test]
fn a_base_without_history_is_searched() {
    requires!("/dev/fuse", "qemu-img", "mkfs.ext4");
    let scratch = Scratch::new();
    let tree = scratch.dir("tree");
    fs::create_dir_all(tree.join("boot")).expect("tree");
    fs::create_dir_all(tree.join("srv")).expect("tree");
    fs::create_dir_all(tree.join("etc")).expect("tree");
    fs::create_dir_all(tree.join("usr/sbin")).expect("tree");
    fs::write(tree.join("etc/fstab"), "").expect("tree");
    fs::write(tree.join("usr/sbin/init"), "#!/bin/sh").expect("tree");
    fs::write(tree.join("boot/vmlinuz-6.1"), Pattern::new(1, 1).bytes(0, 3 * MIB)).expect("tree");
    fs::write(tree.join("boot/initrd.img-6.1"), Pattern::new(2, 1).bytes(0, 2 * MIB))
        .expect("tree");
    fs::write(tree.join("srv/other"), Pattern::new(3, 1).bytes(0, 9 * MIB)).expect("tree");
    let base = scratch.join("ext4.raw");
    let mut make = Command::new("mkfs.ext4");
    make.args(["-q", "-F", "-d"]).arg(&tree).arg(&base).arg("64M");
    let path = std::env::var("PATH").unwrap_or_default();
    run_ok(make.env("PATH", format!("{path}:/usr/sbin:/sbin")));
    let content = fs::read(&base).expect("base");
    let overlay = scratch.join("overlay.qcow2");
    let name = base.to_str().expect("UTF-8");
    run_ok(scratch.cordisk().args(["create", "-b", name, "-F", "raw"]).arg(&overlay));
    let mounted = Mount::new(&scratch, &overlay).args(&["--order", "auto"]).start();
    let found = || {
        let log = mounted.log();
        let line =
            log.lines().find(|line| line.contains("streams follow the files of the base"))?;
        line.rsplit(' ').nth(1)?.parse::<u64>().ok()
    };
    wait_until("the base is searched", || found().is_some());
    let bytes = found().expect("bytes");
    assert!((5 * MIB..9 * MIB).contains(&bytes), "kernel, initrd and metadata: {bytes}");
    run_ok(scratch.cordisk().args(["stream", "--wait"]).arg(mounted.path()));
    mounted.umount();
    assert_same("the overlay as QEMU reads it", &qemu::read_all(&overlay), &content);
    let refused = run_within(
        scratch.cordisk().args(["mount", "--read-only", "--learn"]).arg(&overlay).arg("/none"),
        std::time::Duration::from_secs(60),
    );
    assert_eq!(refused.status.code(), Some(2), "{refused:?}");
}
