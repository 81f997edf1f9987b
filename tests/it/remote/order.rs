//! The order in which a stream asks a server, and the order of a guest's first reads.

use std::ffi::OsStr;

use ::order::{BaseIdentity, Order, Touch};

use super::*;

pub(super) const SIZE: u64 = 32 * MIB;
const BLOCK: u64 = 64 * KIB;

/// What an order of this content belongs to.
fn identity(content: &[u8]) -> BaseIdentity {
    let read = |head: &mut [u8]| {
        head.copy_from_slice(&content[..head.len()]);
        Ok(())
    };
    BaseIdentity::of(content.len() as u64, read, None).expect("an identity")
}

/// The order of a synthetic guest: single blocks, from the end of the disk to its start.
fn order_of(content: &[u8], blocks: &[u64]) -> Vec<u8> {
    let touch = |&block: &u64| Touch { offset: block * BLOCK, len: BLOCK, at_ms: 0 };
    Order::from_touches(identity(content), blocks.iter().map(touch)).encode()
}

fn descending() -> Vec<u64> {
    (1..=12).rev().map(|block| block * 37 + 11).collect()
}

/// The position of the first request that asks for a byte of the block.
fn position(requests: &[Range<u64>], block: u64) -> usize {
    let asks = |range: &Range<u64>| range.start < (block + 1) * BLOCK && block * BLOCK < range.end;
    requests.iter().position(asks).unwrap_or_else(|| panic!("block {block}: {requests:?}"))
}

fn status(remote: &Remote, disk: &Daemon) -> serde_json::Value {
    let text = run_ok(remote.scratch.cordisk().args(["status", "--json"]).arg(disk.path()));
    let status: serde_json::Value = serde_json::from_str(&text).expect("JSON");
    status[0].clone()
}

fn is_streamed(remote: &Remote, disk: &Daemon) -> bool {
    status(remote, disk)["last-job"]["result"] == json!("success")
}

/// Protects: a stream asks for everything in the order beside the base before it asks for anything
/// else, and the disk has the right content.
#[test]
fn a_stream_brings_the_order_beside_the_base_first() {
    requires!("/dev/fuse", "qemu-img", "nginx", "openssl");
    let Some((server, remote)) = on_nginx(SIZE, "") else { return };
    let remote = remote.create();
    let blocks = descending();
    let order = order_of(&remote.content, &blocks);
    fs::write(server.root().join("golden/base.raw.order"), order).expect("the order");
    let before = asked_ranges(&server).len();
    let disk = remote.mount().start();
    wait_until("the order is there", || disk.log().contains("streams follow the order"));
    remote.stream(&disk);
    let requests = asked_ranges(&server).split_off(before);
    let is_known = |range: &&Range<u64>| {
        let head = range.start < 2 * BLOCK && range.end <= 2 * BLOCK;
        head || blocks
            .iter()
            .any(|block| block * BLOCK <= range.start && range.end <= (block + 1) * BLOCK)
    };
    let first_other = requests.iter().position(|range| !is_known(&range)).expect("the rest");
    for block in &blocks {
        assert!(position(&requests, *block) < first_other, "block {block}: {requests:?}");
    }
    assert_eq!(status(&remote, &disk)["chain"], json!([]));
    disk.umount();
    remote.assert_standalone(&remote.content);
}

/// Protects: `linear` ignores the order beside the base.
#[test]
fn a_linear_stream_follows_no_order() {
    requires!("/dev/fuse", "qemu-img", "nginx", "openssl");
    let Some((server, remote)) = on_nginx(SIZE, "") else { return };
    let remote = remote.create();
    let order = order_of(&remote.content, &descending());
    fs::write(server.root().join("golden/base.raw.order"), order).expect("the order");
    let before = asked_ranges(&server).len();
    let disk = remote.mount().args(&["--stream", "--order", "linear"]).start();
    wait_until("the stream is complete", || is_streamed(&remote, &disk));
    let requests = asked_ranges(&server).split_off(before);
    // The first block is read to find out which disk it is.
    let is_small = |range: &&Range<u64>| range.start > 0 && range.end - range.start == BLOCK;
    assert_eq!(requests.iter().filter(is_small).count(), 0, "{requests:?}");
    disk.umount();
    remote.assert_standalone(&remote.content);
}

/// Protects: what lies beside a guest's read is fetched, although the stream is far from it.
#[test]
fn a_stream_goes_where_the_guest_is() {
    requires!("/dev/fuse", "qemu-img", "nginx", "openssl");
    let Some((server, remote)) = on_nginx(SIZE, "") else { return };
    let remote = remote.create();
    // At one byte per second, the walk stays at the start of the disk.
    let disk = remote.mount().args(&["--stream", "--speed", "1"]).start();
    let mut guest = remote.guest(&disk);
    guest.check(20 * MIB + 300 * KIB..20 * MIB + 304 * KIB);
    let is_covered = |window: Range<u64>| {
        let requests = asked_ranges(&server);
        (window.start / BLOCK..window.end / BLOCK)
            .all(|block| requests.iter().any(|range| range.contains(&(block * BLOCK))))
    };
    wait_until("the neighbourhood of the read is fetched", || is_covered(20 * MIB..21 * MIB));
    assert!(!is_covered(24 * MIB..25 * MIB), "and what is far is not");
    // The guest reads on to the end of the window, which goes on.
    guest.check(20 * MIB + 900 * KIB..21 * MIB);
    wait_until("the next window is fetched", || is_covered(21 * MIB..22 * MIB));
    drop(guest.file);
    disk.umount();
}

/// Protects: `order save` has what the guest has read, in its order; the next disk of the base
/// follows it; and what the stream has brought and the guest has read is counted.
#[test]
fn the_order_of_one_machine_is_that_of_the_next() {
    requires!("/dev/fuse", "qemu-img", "nginx", "openssl");
    let Some((server, remote)) = on_nginx(SIZE, "") else { return };
    let remote = remote.create();
    let disk = remote.mount().start();
    let mut guest = remote.guest(&disk);
    let blocks = descending();
    let saved = remote.scratch.join("saved.order");
    let save = |disk: &Daemon| {
        let mut command = remote.scratch.cordisk();
        command.args(["order", "save", "-o"]).arg(&saved).arg(disk.path());
        command
    };
    let nothing = run_within(&mut save(&disk), PROMPT);
    assert_eq!(nothing.status.code(), Some(1), "{nothing:?}");
    assert!(nothing.stderr.contains("nothing of the base was read yet"), "{nothing:?}");
    for block in &blocks {
        guest.check(block * BLOCK + 4096..block * BLOCK + 8192);
    }
    run_ok(&mut save(&disk));
    let order = Order::decode(&fs::read(&saved).expect("the file")).expect("an order");
    let found: Vec<_> = order.ranges().iter().map(|range| (range.offset, range.len)).collect();
    let wanted: Vec<_> = blocks.iter().map(|block| (block * BLOCK, BLOCK)).collect();
    assert_eq!(found, wanted);
    assert!(order.base().pin.as_ref().is_some_and(|pin| pin.starts_with("etag ")), "{order:?}");
    drop(guest.file);
    disk.umount();

    let overlay = remote.scratch.join("second.qcow2");
    remote.create_at(&overlay);
    let name = saved.to_str().expect("UTF-8");
    let disk = remote.mount_as(&overlay, "drive1").args(&["--stream", "--order", name]).start();
    wait_until("the stream is complete", || is_streamed(&remote, &disk));
    let mut guest = remote.guest(&disk);
    for block in &blocks {
        guest.check(block * BLOCK + 4096..block * BLOCK + 8192);
    }
    let facts = status(&remote, &disk);
    assert_eq!((&facts["misses"], &facts["brought"]["used"]), (&json!(0), &json!(12 * BLOCK)));
    run_ok(&mut save(&disk));
    let again = Order::decode(&fs::read(&saved).expect("the file")).expect("an order");
    let offsets =
        |order: &Order| -> Vec<u64> { order.ranges().iter().map(|range| range.offset).collect() };
    assert_eq!(offsets(&again), offsets(&order), "what was brought is a first touch as well");
    drop(guest.file);
    disk.umount();
    drop(server);
}

/// Protects: `cache fill --order` brings what the order names, and little else, for a raw and for a
/// qcow2 base.
#[test]
fn a_cache_is_filled_with_the_order_alone() {
    requires!("/dev/fuse", "qemu-img", "nginx", "openssl");
    let Some((server, remote)) = on_nginx(SIZE, "") else { return };
    let order = order_of(&remote.content, &descending());
    let order = remote.scratch.write("boot.order", &order);
    let order = order.to_str().expect("UTF-8");
    let fill = |url: &str, more: &[&str]| {
        let mut command = remote.command(&["cache", "fill", url, "--order", order]);
        command.args(more);
        command
    };
    let done = run_ok(&mut fill(&remote.url, &[]));
    assert!(done.contains("768 KiB in 12 ranges are in the cache"), "{done}");
    let requests = asked_ranges(&server);
    for block in descending() {
        position(&requests, block);
    }
    let asked = asked_bytes(&server);
    assert!(asked <= 14 * BLOCK + 2 * BLOCK, "{asked}: {requests:?}");
    run_ok(&mut fill(&remote.url, &[]));
    // One byte is: that of the question which file it is.
    assert!(asked_bytes(&server) <= asked + 1, "what is there is not fetched again");

    let base = server.root().join("golden/base.raw");
    let image = base.with_extension("qcow2");
    let [base, image] = [&base, &image].map(|path| path.to_str().expect("UTF-8"));
    qemu::img(&["convert", "-f", "raw", "-O", "qcow2", base, image]);
    let url = remote.url.replace("base.raw", "base.qcow2");
    let refused = run_within(&mut fill(&url, &[]), PROMPT);
    assert_eq!(refused.status.code(), Some(1), "{refused:?}");
    assert!(refused.stderr.contains("-F qcow2"), "{refused:?}");
    run_ok(&mut fill(&url, &["-F", "qcow2"]));
    let list = run_ok(&mut remote.command(&["cache", "list", "--json"]));
    let files: serde_json::Value = serde_json::from_str(&list).expect("JSON");
    let of = |name: &str| -> u64 {
        let is_it = |file: &&serde_json::Value| file["name"] == json!(name);
        let files = files.as_array().expect("a list");
        files.iter().find(is_it).expect(name)["present"].as_u64().expect("bytes")
    };
    assert!(of(&url) >= 12 * BLOCK && of(&url) < SIZE / 8, "{list}");
    let other = vec![0x5a; SIZE as usize];
    let foreign = remote.scratch.write("foreign.order", &order_of(&other, &[7]));
    let foreign = foreign.to_str().expect("UTF-8");
    let mut command = remote.command(&["cache", "fill", &remote.url, "--order", foreign]);
    let refused = run_within(&mut command, PROMPT);
    assert_eq!(refused.status.code(), Some(1), "{refused:?}");
    assert!(refused.stderr.contains("foreign.order") && refused.stderr.contains("another disk"));
}

/// Protects: an order that is none, or that of another disk, costs a warning and nothing else; one
/// that the user has named and that is none is refused.
#[test]
fn a_wrong_order_is_left_out() {
    requires!("/dev/fuse", "qemu-img", "nginx", "openssl");
    let Some((server, remote)) = on_nginx(SIZE, "") else { return };
    let remote = remote.create();
    let place = server.root().join("golden/base.raw.order");
    let other = vec![0x5a; SIZE as usize];
    let foreign = order_of(&other, &[7]);
    let torn = order_of(&remote.content, &descending())[..40].to_vec();
    for (bytes, why) in [(foreign, "another disk"), (torn, ""), (vec![0x20; 100_000], "")] {
        fs::write(&place, &bytes).expect("the order");
        let disk = remote.mount().start();
        wait_until("the log says so", || {
            let log = disk.log();
            log.lines().any(|line| line.contains(".order is not used: ") && line.contains(why))
        });
        let mut guest = remote.guest(&disk);
        guest.check(9 * MIB..10 * MIB);
        drop(guest.file);
        disk.umount();
    }
    let garbage = remote.scratch.write("garbage", &[7; 5000]);
    let garbage = garbage.to_str().expect("UTF-8");
    let backing = ["--backing-url", remote.prefix()];
    let refusal = remote.refused(&[&["--order", garbage][..], &backing].concat());
    assert!(refusal.contains("garbage") && refusal.contains("cordisk order"), "{refusal}");
    let refusal = remote.refused(&[&["--order", "/nonexistent.order"][..], &backing].concat());
    assert!(refusal.contains("/nonexistent.order"), "{refusal}");
    let terminal = OsStr::new("order");
    let done = run_within(remote.scratch.cordisk().arg(terminal).args(["save", "/none"]), PROMPT);
    assert_eq!(done.status.code(), Some(1), "{done:?}");
}

/// A machine reads the blocks and leaves their order, and a stream of the next machine follows it.
pub(super) fn learns(remote: &Remote) {
    let mut disk = remote.mount().args(&["--learn"]).start();
    let mut guest = remote.guest(&disk);
    for block in descending() {
        guest.check(block * BLOCK..block * BLOCK + 4096);
    }
    drop(guest.file);
    crate::support::mounts::umount(disk.path());
    disk.assert_clean_end();
    let said = disk.log();
    assert!(said.contains("the order of the guest was left beside the base"), "{said}");
    let overlay = remote.scratch.join("second.qcow2");
    remote.create_at(&overlay);
    let disk = remote.mount_as(&overlay, "drive1").args(&["--stream", "--learn"]).start();
    wait_until("the order is there", || disk.log().contains("streams follow the order"));
    let said = disk.log();
    assert!(said.contains(": 12 ranges, 786432 bytes"), "{said}");
    wait_until("the stream is complete", || is_streamed(remote, &disk));
    remote.guest(&disk).check(descending()[0] * BLOCK..descending()[0] * BLOCK + 4096);
    disk.umount();
}

/// Protects: `--learn` leaves the order on a web server that takes files, and the next machine
/// follows it, also after a merge.
#[test]
fn a_machine_leaves_its_order_on_a_web_server() {
    requires!("/dev/fuse", "qemu-img", "nginx", "openssl");
    let taking = "location /golden/ { dav_methods PUT; }";
    let Some((server, remote)) = on_nginx(SIZE, taking) else { return };
    let remote = remote.create();
    learns(&remote);
    let order = server.root().join("golden/base.raw.order");
    let order = Order::decode(&fs::read(order).expect("the file")).expect("an order");
    let votes = |block: u64| {
        let range = order.ranges().iter().find(|range| range.offset == block * BLOCK);
        range.expect("the block").votes
    };
    assert_eq!(order.records(), 2);
    let blocks = descending();
    assert_eq!((votes(blocks[0]), votes(blocks[1])), (2, 1));
    assert_eq!(fs::read(server.root().join("golden/base.raw")).expect("base"), remote.content);
}

/// Protects: the same in an object store.
#[test]
fn a_machine_leaves_its_order_in_an_object_store() {
    requires!("/dev/fuse", "qemu-img", "radosgw", "ceph-mon", "ceph-osd", "python3");
    let Some(ceph) = test_servers::radosgw() else { return };
    let text = format!(
        "[[source]]\nprefix = \"s3://golden/\"\nendpoint = \"{}\"\nallow-http = true\n",
        ceph.endpoint
    );
    learns(&on_s3(&ceph, "images/base.raw", content(SIZE)).sources(&text).create());
}

/// Protects: a server that takes no files costs a warning, and the disk is closed all the same. A
/// disk without `--learn` writes nothing to a server.
#[test]
fn a_server_that_takes_no_order_is_named() {
    requires!("/dev/fuse", "qemu-img", "nginx", "openssl");
    let Some((server, remote)) = on_nginx(SIZE, "") else { return };
    let remote = remote.create();
    for (name, learn) in [("drive0", &["--learn"][..]), ("drive1", &[])] {
        let mut disk = remote.mount_as(&remote.overlay, name).args(learn).start();
        remote.guest(&disk).check(0..4096);
        crate::support::mounts::umount(disk.path());
        disk.assert_clean_end();
        let said = disk.log();
        let why = "golden/base.raw.order: the server takes no file there: 405 Method Not Allowed";
        assert_eq!(said.contains("no order is left beside the base"), !learn.is_empty(), "{said}");
        assert!(learn.is_empty() || said.contains(why), "{said}");
    }
    let puts = |requests: &[String]| requests.iter().filter(|line| line.starts_with("PUT")).count();
    assert_eq!(puts(&server.requests(1)), 1);
    assert!(!server.root().join("golden/base.raw.order").exists());
    assert_clean(&remote.overlay);
}

/// Protects: where no file can lie beside the base, the mount says what to do instead.
#[test]
fn an_order_has_no_place_beside_an_export() {
    requires!("/dev/fuse", "qemu-img", "nbdkit");
    let Some((_server, remote)) = on_nbdkit(SIZE) else { return };
    let remote = remote.create();
    let mut command = remote.command(&["mount", "--learn", "--backing-url", remote.prefix()]);
    let refused = run_within(command.arg(&remote.overlay).arg(remote.scratch.join("none")), PROMPT);
    assert_eq!(refused.status.code(), Some(1), "{refused:?}");
    let advice = "an NBD server has no files beside the base: save the order with cordisk order save, and name it with --order";
    assert!(refused.stderr.contains(advice), "{refused:?}");
    assert!(!remote.scratch.join("none").exists(), "the mountpoint was not left behind");
}
