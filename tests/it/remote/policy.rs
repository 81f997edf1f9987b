//! What happens when the source is away: reads of what is missing fail after the deadline, or wait;
//! everything else goes on.

use std::os::unix::fs::FileExt;
use std::process::Stdio;
use std::sync::mpsc::channel;
use std::thread;
use std::time::Instant;

use rustix::io::Errno;

use super::*;
use crate::support::errno;

const SIZE: u64 = 16 * MIB;

/// The shortest and the longest time of a read that fails with `--source-timeout 2`. A request that
/// fails less than 100 ms before the deadline is not made again.
const DEADLINE: Range<Duration> = Duration::from_millis(1900)..Duration::from_secs(15);

/// Reads at `at` fail with EIO after the deadline; meanwhile the disk does everything that needs no
/// server. The fetcher must not have a part of the last 4 MiB.
fn fails_and_goes_on(remote: &Remote, disk: &Daemon, away: impl FnOnce()) {
    let mut guest = remote.guest(disk);
    guest.check(0..MIB);
    away();
    let missing = disk.open();
    no_read_ahead(&missing);
    let (started, starts) = channel();
    let reader = thread::spawn(move || {
        started.send(()).expect("the test waits");
        let begun = Instant::now();
        let found = errno(missing.read_at(&mut [0; 4096], 14 * MIB));
        (found, begun.elapsed())
    });
    starts.recv().expect("the reader starts");
    guest.check(0..MIB);
    guest.write(128 * KIB..256 * KIB);
    guest.write(8 * MIB..8 * MIB + 192 * KIB);
    guest.punch(9 * MIB..9 * MIB + 128 * KIB);
    guest.zero(10 * MIB..10 * MIB + 128 * KIB);
    guest.file.sync_all().expect("fsync while the source is away");
    guest.check(8 * MIB..8 * MIB + 192 * KIB);
    guest.check(9 * MIB..9 * MIB + 128 * KIB);
    assert!(!reader.is_finished(), "all that ran while the read waited");
    let (found, after) = reader.join().expect("the reader");
    assert_eq!(found, Errno::IO);
    assert!(DEADLINE.contains(&after), "the read failed after {after:?}");
    // A write to a part of a cluster needs the rest of it.
    let part = guest.file.write_at(&[1; 512], 15 * MIB + 4096);
    assert!(
        part.is_err() || guest.file.sync_all().is_err(),
        "a write to a part of a cluster that is missing"
    );
    guest.check(0..MIB);
    guest.file.sync_all().expect("fsync after the failures");
}

/// Protects: a server that does not answer, and does not refuse either.
#[test]
fn a_read_from_a_server_that_hangs_fails_after_the_deadline() {
    requires!("/dev/fuse", "qemu-img", "nginx", "openssl");
    let Some((server, remote)) = on_nginx(SIZE, "") else { return };
    let remote = remote.create();
    let options = ["--source-timeout", "2", "--on-source-error", "error"];
    let disk = remote.mount().args(&options).start();
    let pid = nginx_pid(&server);
    fails_and_goes_on(&remote, &disk, || kill_process(pid, Signal::STOP).expect("stop"));
    kill_process(pid, Signal::CONT).expect("continue");
    let mut guest = remote.guest(&disk);
    guest.check(14 * MIB..15 * MIB);
    drop(guest.file);
    disk.umount();
    assert_clean(&remote.overlay);
}

/// Protects: a server that is gone, so that each connection is refused.
#[test]
fn a_read_from_a_server_that_is_gone_fails_after_the_deadline() {
    requires!("/dev/fuse", "qemu-img", "nginx", "openssl");
    let Some((server, remote)) = on_nginx(SIZE, "") else { return };
    let remote = remote.create();
    let disk = remote.mount().args(&["--source-timeout", "2"]).start();
    fails_and_goes_on(&remote, &disk, || kill_server(nginx_pid(&server)));
    disk.umount();
    assert_clean(&remote.overlay);
}

/// Protects: the same with an NBD server, whose connection stays open while it hangs.
#[test]
fn a_read_from_an_nbd_server_that_hangs_fails_after_the_deadline() {
    requires!("/dev/fuse", "qemu-img", "nbdkit");
    let Some((server, remote)) = on_nbdkit(SIZE) else { return };
    let remote = remote.create();
    let disk = remote.mount().args(&["--source-timeout", "2"]).start();
    let pid = nbd_pid(&server);
    fails_and_goes_on(&remote, &disk, || kill_process(pid, Signal::STOP).expect("stop"));
    kill_process(pid, Signal::CONT).expect("continue");
    let mut guest = remote.guest(&disk);
    guest.check(14 * MIB..15 * MIB);
    drop(guest.file);
    disk.umount();
}

/// Reads what is missing while the source is away; it comes back, and the read succeeds.
fn waits(remote: &Remote, away: impl FnOnce(), comes_back: impl FnOnce() -> Option<Ours>) {
    let disk = remote.mount().args(&["--on-source-error", "wait"]).start();
    let mut guest = remote.guest(&disk);
    guest.check(0..MIB);
    away();
    let mut missing = remote.guest(&disk);
    let reader = thread::spawn(move || missing.check(14 * MIB..15 * MIB));
    // The read is known to wait when the daemon says that the source does not answer.
    wait_until("the daemon says so", || disk.log().contains("trying again"));
    assert!(!reader.is_finished(), "the read waits");
    guest.write(8 * MIB..8 * MIB + 128 * KIB);
    guest.file.sync_all().expect("fsync while the source is away");
    assert!(!reader.is_finished(), "the read waits");
    let _server = comes_back();
    reader.join().expect("the read has the right bytes");
    guest.check_all();
    drop(guest.file);
    disk.umount();
    assert_clean(&remote.overlay);
}

/// Protects: with `wait`, a read survives that the server ends and is started again.
#[test]
fn a_read_waits_for_a_server_that_is_started_again() {
    requires!("/dev/fuse", "qemu-img", "nginx", "openssl");
    let Some((server, remote)) = on_nginx(SIZE, "") else { return };
    let remote = remote.create();
    waits(&remote, || kill_server(nginx_pid(&server)), || Some(start_again(&server)));
}

/// Protects: the same for NBD, where a new connection must be made.
#[test]
fn a_read_waits_for_an_nbd_server_that_is_started_again() {
    requires!("/dev/fuse", "qemu-img", "nbdkit");
    let Some((server, remote)) = on_nbdkit(SIZE) else { return };
    let remote = remote.create();
    waits(
        &remote,
        || kill_server(nbd_pid(&server)),
        || {
            fs::remove_file(&server.socket).expect("the old socket");
            let mut again = Command::new("nbdkit");
            again.args(["-f", "-r", "-U"]).arg(&server.socket).arg("file").arg(remote.base_file());
            Some(Ours(again.stdin(Stdio::null()).spawn().expect("nbdkit")))
        },
    );
}

/// Protects: a server that hangs for a while and goes on; a stalled request is made again.
#[test]
fn a_read_waits_for_a_server_that_hangs() {
    requires!("/dev/fuse", "qemu-img", "nginx", "openssl");
    let Some((server, remote)) = on_nginx(SIZE, "") else { return };
    let remote = remote.sources("connect-timeout = 1\nstall-timeout = 1\n").create();
    let pid = nginx_pid(&server);
    waits(
        &remote,
        || kill_process(pid, Signal::STOP).expect("stop"),
        || {
            kill_process(pid, Signal::CONT).expect("continue");
            None
        },
    );
}
