//! Many requests that wait for a source that is away, and the end of a daemon meanwhile.

use std::io;
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::sync::Arc;
use std::thread::{self, JoinHandle};

use rustix::io::Errno;

use super::*;
use crate::support::pattern::assert_same_at;

const SIZE: u64 = 32 * MIB;

/// More than the threads of the daemon that serve reads of backing files.
const READERS: u64 = 80;

/// One read of `READERS`, in the second half of the disk.
fn place(index: u64) -> u64 {
    SIZE / 2 + index * 3 * 64 * KIB + 100
}

type Reader = JoinHandle<(u64, io::Result<Vec<u8>>)>;

/// Starts reads that wait for the source.
fn start_readers(disk: &Daemon) -> Vec<Reader> {
    let file = Arc::new(disk.open());
    no_read_ahead(&file);
    (0..READERS)
        .map(|index| {
            let file = Arc::clone(&file);
            thread::spawn(move || {
                let mut bytes = vec![0; 5000];
                let read = file.read_exact_at(&mut bytes, place(index));
                (place(index), read.map(|()| bytes))
            })
        })
        .collect()
}

/// Waits until the reads have reached the fetcher: it then says that the source does not answer.
fn wait_until_they_wait(disk: &Daemon, readers: &[Reader]) {
    wait_until("the daemon says so", || disk.log().contains("trying again"));
    assert!(!readers.iter().any(JoinHandle::is_finished), "a read does not wait");
}

/// Protects: any number of reads may wait for the source; writes and discards of whole clusters,
/// and flushes, are done meanwhile, and all reads have the right bytes when the source is back.
#[test]
fn many_reads_that_wait_delay_nothing_else() {
    requires!("/dev/fuse", "qemu-img", "nginx", "openssl");
    let Some((server, remote)) = on_nginx(SIZE, "") else { return };
    let remote = remote.create();
    let disk = remote.mount().args(&["--on-source-error", "wait"]).start();
    let mut guest = remote.guest(&disk);
    guest.check(0..MIB);
    kill_server(nginx_pid(&server));
    let readers = start_readers(&disk);
    wait_until_they_wait(&disk, &readers);
    for round in 0..4 {
        let at = 4 * MIB + round * 512 * KIB;
        guest.write(at..at + 128 * KIB);
        guest.punch(at + 128 * KIB..at + 256 * KIB);
        guest.write(at + 130 * KIB..at + 131 * KIB);
        guest.zero(at + 256 * KIB..at + 320 * KIB);
        guest.file.sync_all().expect("fsync");
        guest.check(at..at + 320 * KIB);
    }
    assert!(!readers.iter().any(JoinHandle::is_finished), "a read does not wait");
    let _again = start_again(&server);
    for reader in readers {
        let (at, read) = reader.join().expect("a reader");
        let bytes = read.unwrap_or_else(|error| panic!("read at {at}: {error}"));
        assert_same_at(
            "a read that has waited",
            at,
            &bytes,
            &remote.content[at as usize..][..5000],
        );
    }
    guest.check_all();
    drop(guest.file);
    disk.umount();
    assert_clean(&remote.overlay);
}

/// Protects: a daemon ends although reads wait for the source without end.
#[test]
fn reads_that_wait_do_not_keep_the_daemon() {
    requires!("/dev/fuse", "qemu-img", "nginx", "openssl");
    let Some((server, remote)) = on_nginx(SIZE, "") else { return };
    let remote = remote.create();
    let mut disk = remote.mount().args(&["--on-source-error", "wait"]).start();
    let mut guest = remote.guest(&disk);
    guest.write(MIB..2 * MIB);
    kill_server(nginx_pid(&server));
    let fetcher = fetcher_of(&disk);
    let readers = start_readers(&disk);
    wait_until_they_wait(&disk, &readers);
    guest.write(2 * MIB..2 * MIB + 128 * KIB);
    disk.signal(Signal::TERM);
    wait_until("it is busy", || disk.log().contains("is in use: all is written back"));
    disk.signal(Signal::TERM);
    let ended = disk.ended_within(Duration::from_secs(30));
    assert!(ended.is_some(), "the daemon does not end\n{}", disk.log());
    wait_until("the fetcher ends", || !is_running(fetcher));
    for reader in readers {
        let (at, read) = reader.join().expect("a reader");
        assert!(read.is_err(), "the read at {at} has ended with an error");
    }
    drop(guest.file);
    assert!([Some(0), Some(3)].contains(&check_alone(&remote.overlay)), "corrupt");
    let _again = start_again(&server);
    let disk = remote.mount().start();
    let mut guest = Guest::new(disk.open(), guest.shadow, 1);
    guest.check_all();
    drop(guest.file);
    disk.umount();
}

/// Protects: a disk is unmounted cleanly while its stream waits for the source without end, and the
/// stream goes on after the next mount.
#[test]
fn a_stream_that_waits_does_not_keep_the_disk() {
    requires!("/dev/fuse", "qemu-img", "nginx", "openssl");
    let Some((server, remote)) = on_nginx(SIZE, "") else { return };
    let remote = remote.create();
    let disk = remote.mount().args(&["--on-source-error", "wait"]).start();
    let mut guest = remote.guest(&disk);
    guest.write(MIB..2 * MIB);
    kill_server(nginx_pid(&server));
    run_ok(remote.scratch.cordisk().arg("stream").arg(disk.path()));
    wait_until("the daemon says so", || disk.log().contains("trying again"));
    let shadow = guest.shadow;
    drop(guest.file);
    let mut disk = disk;
    mounts::umount(disk.path());
    disk.assert_clean_end();
    let log = disk.log();
    drop(disk);
    assert!(log.contains("is closed") && !log.contains("leaving without"), "{log}");
    assert_clean(&remote.overlay);
    let _again = start_again(&server);
    let disk = remote.mount().args(&["--no-resume"]).start();
    remote.stream(&disk);
    let mut guest = Guest::new(disk.open(), shadow, 1);
    guest.check_all();
    let shadow = guest.shadow;
    drop(guest.file);
    disk.umount();
    remote.assert_standalone(&shadow);
}

/// Asserts that a stream that waits for the source without end is paused and cancelled, with the
/// events of QEMU, and leaves the disk as it was.
fn obeys(remote: &Remote, server: &Nginx) {
    let disk = remote.mount().args(&["--on-source-error", "wait"]).qmp().start();
    kill_server(nginx_pid(server));
    run_ok(remote.scratch.cordisk().arg("stream").arg(disk.path()));
    wait_until("the daemon says so", || disk.log().contains("trying again"));
    let mut client = disk.client();
    client.ok("job-pause", json!({"id": "drive0"}));
    client.wait_status("paused");
    client.ok("job-resume", json!({"id": "drive0"}));
    client.ok("block-job-cancel", json!({"device": "drive0"}));
    let end = client.wait_event("BLOCK_JOB_CANCELLED");
    assert!(end["data"]["offset"].as_u64().is_some_and(|offset| offset < SIZE / 2), "{end}");
    let _again = start_again(server);
    let mut guest = remote.guest(&disk);
    guest.check_all();
    drop(guest.file);
    disk.umount();
    assert_clean(&remote.overlay);
}

/// Protects: a pause or a cancel of a stream does not wait for the source.
#[test]
fn a_stream_that_waits_is_cancelled() {
    requires!("/dev/fuse", "qemu-img", "nginx", "openssl");
    let Some((server, remote)) = on_nginx(SIZE, "") else { return };
    obeys(&remote.create(), &server);
}

/// Protects: the same if the stream waits for a table of an image.
#[test]
fn a_stream_that_waits_for_a_table_is_cancelled() {
    requires!("/dev/fuse", "qemu-img", "nginx", "openssl");
    let Some((server, remote)) = on_nginx(SIZE, "") else { return };
    let (raw, image) =
        (server.root().join("golden/base.raw"), server.root().join("golden/base.qcow2"));
    let [raw, image] = [&raw, &image].map(|path| path.to_str().expect("UTF-8"));
    // Each table maps 2 MiB, so most of them lie beyond what was fetched with the first ones.
    qemu::img(&["convert", "-f", "raw", "-O", "qcow2", "-o", "cluster_size=4k", raw, image]);
    let url = remote.url.replace("base.raw", "base.qcow2");
    let remote = Remote { url, format: "qcow2", ..remote };
    obeys(&remote.create(), &server);
}

/// Protects: what a stream has said that it will need is not fetched while it is paused, beyond the
/// parts that are in flight; when it goes on, it completes.
#[test]
fn a_paused_stream_fetches_nothing_more() {
    const LARGE: u64 = 96 * MIB;
    requires!("/dev/fuse", "qemu-img", "nginx", "openssl");
    // A part of 8 MiB takes a second.
    let Some((server, remote)) = on_nginx(LARGE, "limit_rate 8m;") else { return };
    let remote = remote.create();
    let disk = remote.mount().qmp().start();
    let mut client = disk.client();
    client.ok("block-stream", json!({"device": "drive0", "job-id": "drive0"}));
    client.ok("job-pause", json!({"id": "drive0"}));
    client.wait_status("paused");
    // nginx logs a request when it has been answered.
    let parts =
        || asked_ranges(&server).iter().filter(|range| range.end - range.start >= MIB).count();
    // What was in flight arrives within two seconds.
    let settled = || {
        let before = parts();
        client.listen(Duration::from_secs(3));
        (parts() == before).then_some(before)
    };
    let fetched = std::iter::repeat_with(settled).take(5).flatten().next();
    assert!(fetched.is_some_and(|parts| parts <= 8), "{fetched:?} of 12 parts were fetched");
    client.ok("job-resume", json!({"id": "drive0"}));
    client.wait_completed();
    disk.umount();
    remote.assert_standalone(&remote.content);
}

/// Protects: a cache without space makes reads of what is missing fail, and nothing else; no byte
/// is wrong; with space again, they succeed.
#[test]
fn a_cache_without_space_is_told() {
    requires!("/dev/fuse", "root", "qemu-img", "nginx", "openssl");
    let Some((_server, remote)) = on_nginx(SIZE, "") else { return };
    let space = mounts::MountGuard::tmpfs(&remote.cache(), 10 * MIB);
    fs::set_permissions(remote.cache(), fs::Permissions::from_mode(0o700)).expect("chmod");
    let remote = remote.create();
    let disk = remote.mount().start();
    let mut guest = remote.guest(&disk);
    let mut failed = 0;
    for at in (0..SIZE).step_by(64 << 10) {
        let mut bytes = vec![0; 64 << 10];
        match guest.file.read_exact_at(&mut bytes, at) {
            Ok(()) => {
                let want = &guest.shadow[at as usize..at as usize + bytes.len()];
                assert_same_at("a read", at, &bytes, want);
            }
            Err(error) => {
                failed += 1;
                let errno = Errno::from_io_error(&error);
                assert!(errno == Some(Errno::IO) || errno == Some(Errno::NOSPC), "{error}");
            }
        }
    }
    assert!(failed > 0, "32 MiB fit into 10 MiB");
    guest.write(5 * MIB..6 * MIB);
    guest.file.sync_all().expect("fsync");
    assert!(disk.log().contains("No space left"), "{}", disk.log());
    run_ok(Command::new("mount").args(["-o", "remount,size=64M"]).arg(remote.cache()));
    guest.check_all();
    drop(guest.file);
    disk.umount();
    assert_clean(&remote.overlay);
    space.umount();
}
