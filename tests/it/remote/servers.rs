//! The whole life of a disk above each kind of server: create, mount, read, write, stream, and then
//! the server is gone.

use std::fs;
use std::process::{Command, Stdio};

use super::*;

const SIZE: u64 = 12 * MIB;

/// Lives through everything; `stop` ends the server when all is streamed.
pub(super) fn live(remote: &Remote, test: &str, stop: impl FnOnce()) {
    let mut rng = Rng::for_test(test);
    assert!(remote.is_pinned(), "create stores what the base is pinned to");
    let disk = remote.mount().start();
    let mut guest = remote.guest(&disk);
    random_reads(&mut guest, &mut rng, 15);
    for _ in 0..20 {
        guest.step(&mut rng, 200 * KIB);
    }
    remote.stream(&disk);
    stop();
    guest.check_all();
    guest.write(MIB..2 * MIB);
    guest.file.sync_all().expect("fsync without the server");
    guest.check_all();
    let shadow = guest.shadow;
    drop(guest.file);
    disk.umount();
    remote.assert_standalone(&shadow);
}

/// Protects: a base on a web server is read, streamed, and then not needed any more.
#[test]
fn a_disk_above_http() {
    requires!("/dev/fuse", "qemu-img", "nginx", "openssl");
    let Some((server, remote)) = on_nginx(SIZE, "") else { return };
    let remote = remote.create();
    live(&remote, "a_disk_above_http", || drop(server));
}

/// Protects: TLS with an authority that the configuration of sources names.
#[test]
fn a_disk_above_https() {
    requires!("/dev/fuse", "qemu-img", "nginx", "openssl");
    let Some((server, remote)) = on_nginx(SIZE, "") else { return };
    let url = format!("https://localhost:{}/golden/base.raw", server.https);
    let remote = Remote { url, ..remote };
    let text = format!(
        "[[source]]\nprefix = \"https://localhost:{}/golden/\"\nca = \"{}\"\n",
        server.https,
        server.ca().display()
    );
    let remote = remote.sources(&text).create();
    live(&remote, "a_disk_above_https", || drop(server));
}

/// Protects: a base in an object store, with the endpoint from the configuration of sources and the
/// credentials from the environment of the command.
#[test]
fn a_disk_above_s3() {
    requires!("/dev/fuse", "qemu-img", "radosgw", "ceph-mon", "ceph-osd", "python3");
    let Some(ceph) = test_servers::radosgw() else { return };
    let remote = on_s3(&ceph, "images/base.raw", content(SIZE));
    let text = format!(
        "[[source]]\nprefix = \"s3://golden/\"\nendpoint = \"{}\"\nallow-http = true\n",
        ceph.endpoint
    );
    let remote = remote.sources(&text).create();
    live(&remote, "a_disk_above_s3", || drop(ceph));
}

/// Protects: NBD over a Unix socket, nbdkit as the server.
#[test]
fn a_disk_above_nbdkit_on_a_socket() {
    requires!("/dev/fuse", "qemu-img", "nbdkit");
    let Some((server, remote)) = on_nbdkit(SIZE) else { return };
    let remote = remote.create();
    live(&remote, "a_disk_above_nbdkit_on_a_socket", || drop(server));
}

/// Protects: NBD over TCP.
#[test]
fn a_disk_above_nbdkit_on_a_port() {
    requires!("/dev/fuse", "qemu-img", "nbdkit");
    let port = test_servers::free_port().to_string();
    let remote = Remote::new(&format!("nbd://127.0.0.1:{port}/disk"), content(SIZE));
    let mut command = Command::new("nbdkit");
    command.args(["-f", "-r", "-i", "127.0.0.1", "-p", &port, "-e", "disk", "file"]);
    let server =
        Ours(command.arg(remote.base_file()).stdin(Stdio::null()).spawn().expect("nbdkit"));
    wait_until("nbdkit listens", || {
        std::net::TcpStream::connect(format!("127.0.0.1:{port}")).is_ok()
    });
    let remote = remote.create();
    live(&remote, "a_disk_above_nbdkit_on_a_port", || drop(server));
}

/// Protects: NBD with block status, qemu-nbd above a qcow2 image with holes.
#[test]
fn a_disk_above_qemu_nbd_with_holes() {
    requires!("/dev/fuse", "qemu-img", "qemu-io", "qemu-nbd");
    let scratch = Scratch::new();
    let image = scratch.join("golden.qcow2");
    let pattern = Pattern::new(0x0DD, 1);
    qemu::create(&image, Some(SIZE), "", None);
    let filled = [0..MIB, 3 * MIB + 64 * KIB..5 * MIB, 11 * MIB + 512..SIZE];
    qemu::write_pattern(&image, pattern, &filled);
    let mut content = vec![0; SIZE as usize];
    for range in &filled {
        let bytes = &mut content[range.start as usize..range.end as usize];
        pattern.fill(range.start, bytes);
    }
    let path = image.to_str().expect("UTF-8");
    let Some(server) = test_servers::qemu_nbd(&["-r", "-f", "qcow2", "-e", "8", path]) else {
        return;
    };
    let remote = Remote::new(&server.url(""), content).create();
    live(&remote, "a_disk_above_qemu_nbd_with_holes", || drop(server));
}

/// Protects: a snapshot of a Ceph RBD image, over NBD. A stream reads nothing where the image has
/// no objects, and the later life of the image is not seen.
#[test]
fn a_disk_above_a_snapshot_of_rbd() {
    requires!("/dev/fuse", "qemu-img", "nbdkit", "nbdkit-plugin-python", "python3-rbd", "rbd");
    requires!("radosgw", "ceph-mon", "ceph-osd", "python3");
    let Some(ceph) = test_servers::radosgw() else { return };
    const RBD_SIZE: u64 = 24 * MIB;
    // Three objects of 4 MiB are missing, and a part of another one.
    let filled = [0..2 * MIB, 3 * MIB..4 * MIB, 16 * MIB..RBD_SIZE];
    let hole = 4 * MIB..16 * MIB;
    let mut content = vec![0; RBD_SIZE as usize];
    for range in &filled {
        let bytes = &mut content[range.start as usize..range.end as usize];
        Pattern::new(0x5BD, 1).fill(range.start, bytes);
    }
    let file = ceph.directory().join("golden.raw");
    fs::write(&file, &content).expect("image");
    ceph.rbd(&["import", file.to_str().expect("UTF-8"), "golden"]);
    ceph.rbd(&["snap", "create", "golden@v1"]);
    let log = ceph.directory().join("nbdkit.log");
    let more = ["--filter=log".to_owned(), format!("logfile={}", log.display())];
    let more = more.each_ref().map(String::as_str);
    let Some(server) = ceph.serve_snapshot("golden", "v1", &more) else { return };
    let remote = Remote::new(&server.url(""), content).create();
    // The image goes on without its snapshot.
    ceph.rbd(&["resize", "--size", "1M", "--allow-shrink", "golden"]);

    let streamed = remote.scratch.join("streamed.qcow2");
    remote.create_at(&streamed);
    let disk = remote.mount_as(&streamed, "streamed").start();
    remote.stream(&disk);
    let reads = reads_of_nbdkit(&log);
    let sum: u64 = reads.iter().map(|read| read.end - read.start).sum();
    let is_in_hole = |read: &&Range<u64>| read.start < hole.end && hole.start < read.end;
    let in_hole: Vec<_> = reads.iter().filter(is_in_hole).collect();
    assert!(in_hole.is_empty(), "reads of a hole: {in_hole:?}");
    assert!(sum >= RBD_SIZE - 13 * MIB, "{sum} bytes are too few to be all reads: {reads:?}");
    remote.guest(&disk).check_all();
    disk.umount();
    qemu::assert_clean(&streamed);
    qemu::assert_independent(&streamed);
    assert_same("as QEMU reads it", &qemu::read_all(&streamed), &remote.content);

    // Another disk reads at random before its stream, with nothing in its cache.
    let cache = remote.scratch.dir("cache2").display().to_string();
    let remote = Remote { options: vec!["--cache".into(), cache], ..remote };
    live(&remote, "a_disk_above_a_snapshot_of_rbd", || drop((server, ceph)));
}

/// The ranges of all requests to read in a log of nbdkit's filter `log`.
fn reads_of_nbdkit(log: &Path) -> Vec<Range<u64>> {
    let text = fs::read_to_string(log).expect("log of nbdkit");
    let number = |line: &str, name: &str| -> Option<u64> {
        let value = line.split(name).nth(1)?.split(' ').next()?;
        u64::from_str_radix(value.strip_prefix("0x")?, 16).ok()
    };
    let requests = text.lines().filter(|line| line.contains(" Read id="));
    requests
        .map(|line| {
            let start = number(line, "offset=").unwrap_or_else(|| panic!("{line}"));
            start..start + number(line, "count=").unwrap_or_else(|| panic!("{line}"))
        })
        .collect()
}

/// Protects: an image in qcow2 format on a web server, whose own backing file is a relative name on
/// the same server.
#[test]
fn a_disk_above_a_remote_chain() {
    requires!("/dev/fuse", "qemu-img", "qemu-io", "nginx", "openssl");
    let Some((server, remote)) = on_nginx(SIZE, "") else { return };
    let middle = server.root().join("golden/middle.qcow2");
    qemu::create(&middle, None, "", Some(("base.raw", "raw")));
    let pattern = Pattern::new(0x31D, 7);
    let ranges = [MIB..MIB + 300 * KIB, 7 * MIB..8 * MIB];
    qemu::write_pattern(&middle, pattern, &ranges);
    let mut content = remote.content.clone();
    for range in &ranges {
        pattern.fill(range.start, &mut content[range.start as usize..range.end as usize]);
    }
    let url = remote.url.replace("base.raw", "middle.qcow2");
    let remote = Remote { url, content, format: "qcow2", ..remote };
    let done = run_within(
        &mut remote.command(&["create", "-b", &remote.url, "-F", "qcow2", "refused.qcow2"]),
        PROMPT,
    );
    assert_refused(&done);
    let hint = format!("--backing-url {}", remote.prefix());
    assert!(done.stderr.contains(&hint), "the base of the image is not allowed yet: {done:?}");
    let prefix = remote.prefix().to_owned();
    let overlay = remote.overlay.to_str().expect("UTF-8");
    run_ok(
        remote
            .command(&["create", "-b", &remote.url, "-F", "qcow2", overlay])
            .args(["--backing-url", &prefix]),
    );
    live(&remote, "a_disk_above_a_remote_chain", || drop(server));
}
