//! Everything that can happen to a source, in any order, while guests write and streams run.

use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use rustix::io::Errno;

use super::*;
use crate::support::pattern::assert_same_at;

const SIZE: u64 = 24 * MIB;

/// Two disks of one cache, each with a guest and a stream, while fetchers are killed, and the
/// server hangs, or ends and is started again.
fn survive(test: &str, remote: &Remote, server: &Nginx) {
    let mut rng = Rng::for_test(test);
    let overlays = ["a", "b"].map(|name| remote.scratch.join(format!("{name}.qcow2")));
    overlays.iter().for_each(|overlay| remote.create_at(overlay));
    let disks = [0, 1].map(|number| {
        let mount = remote.mount_as(&overlays[number], &format!("drive{number}"));
        mount.args(&["--on-source-error", "wait"]).start()
    });
    let shadows = thread::scope(|scope| {
        let guests = disks.each_ref().map(|disk| {
            let mut rng = Rng::new(rng.next());
            scope.spawn(move || {
                let mut guest = remote.guest(disk);
                for _ in 0..150 {
                    guest.step(&mut rng, 400 * KIB);
                }
                guest.shadow
            })
        });
        let streams = disks.each_ref().map(|disk| {
            let mut stream = remote.scratch.cordisk();
            stream.args(["stream", "--wait", "--speed", "8M"]).arg(disk.path());
            scope.spawn(move || run_ok(&mut stream))
        });
        let mut running: Option<Ours> = None;
        for _ in 0..8 {
            match rng.below(4) {
                0 => {
                    let pid = running.as_ref().map_or_else(|| nginx_pid(server), Ours::pid);
                    kill_process(pid, Signal::STOP).expect("stop");
                    thread::sleep(Duration::from_millis(rng.below(1500)));
                    kill_process(pid, Signal::CONT).expect("continue");
                }
                1 => {
                    match running.take() {
                        Some(server) => drop(server),
                        None => kill_server(nginx_pid(server)),
                    }
                    thread::sleep(Duration::from_millis(rng.below(800)));
                    running = Some(start_again(server));
                    // The file of the process id is written by the new one.
                }
                number => {
                    let disk = &disks[number as usize - 2];
                    for pid in descendants(disk.pid()) {
                        let name =
                            fs::read_to_string(format!("/proc/{}/comm", pid.as_raw_nonzero()));
                        if name.is_ok_and(|name| name.trim() == "cordisk-fetcher") {
                            // It may have ended already.
                            let _ = kill_process(pid, Signal::KILL);
                        }
                    }
                }
            }
            thread::sleep(Duration::from_millis(rng.below(500)));
        }
        let shadows = guests.map(|guest| guest.join().expect("a guest"));
        streams.into_iter().for_each(|stream| drop(stream.join().expect("a stream")));
        shadows
    });
    for ((disk, shadow), overlay) in disks.into_iter().zip(shadows).zip(&overlays) {
        let mut guest = Guest::new(disk.open(), shadow, 1);
        guest.check_all();
        let shadow = guest.shadow;
        drop(guest.file);
        disk.umount();
        qemu::assert_independent(overlay);
        qemu::assert_clean(overlay);
        assert_same("the overlay as QEMU reads it", &qemu::read_all(overlay), &shadow);
    }
}

/// Protects: whatever happens to servers and fetchers, no byte is wrong and no request hangs.
#[test]
fn disks_survive_servers_and_fetchers() {
    requires!("/dev/fuse", "qemu-img", "nginx", "openssl");
    let Some((server, remote)) = on_nginx(SIZE, "limit_rate 4m;") else { return };
    let remote = remote.sources("connect-timeout = 1\nstall-timeout = 1\n");
    survive("disks_survive_servers_and_fetchers", &remote, &server);
}

/// Protects: the same with a chunk list, when blocks of the cache are compared again after each
/// start of a fetcher.
#[test]
fn disks_with_digests_survive_servers_and_fetchers() {
    requires!("/dev/fuse", "qemu-img", "nginx", "openssl");
    let Some((server, remote)) = on_nginx(SIZE, "limit_rate 4m;") else { return };
    let remote = remote.sources("connect-timeout = 1\nstall-timeout = 1\n");
    let digest = digest::publish(&server, &remote);
    let remote = remote.option("--base-digest", &digest);
    survive("disks_with_digests_survive_servers_and_fetchers", &remote, &server);
}

/// Protects: with a short deadline, reads fail while the source is away, and never have a wrong
/// byte; everything can be read when it is back.
#[test]
fn reads_fail_or_are_right() {
    requires!("/dev/fuse", "qemu-img", "nginx", "openssl");
    let mut rng = Rng::for_test("reads_fail_or_are_right");
    let Some((server, remote)) = on_nginx(SIZE, "limit_rate 8m;") else { return };
    let remote = remote.option("--source-timeout", "1").create();
    let disk = remote.mount().start();
    let is_over = AtomicBool::new(false);
    let mut running = None;
    thread::scope(|scope| {
        for _ in 0..4 {
            let mut rng = Rng::new(rng.next());
            let (remote, disk, is_over) = (&remote, &disk, &is_over);
            scope.spawn(move || {
                let file = disk.open();
                no_read_ahead(&file);
                while !is_over.load(Ordering::Acquire) {
                    let range = rng.range(SIZE, 200 * KIB);
                    let want = &remote.content[range.start as usize..range.end as usize];
                    let mut bytes = vec![0; want.len()];
                    match file.read_exact_at(&mut bytes, range.start) {
                        Ok(()) => assert_same_at("a read", range.start, &bytes, want),
                        Err(error) => {
                            assert_eq!(Errno::from_io_error(&error), Some(Errno::IO), "{error}");
                        }
                    }
                }
            });
        }
        for _ in 0..3 {
            match running.take() {
                Some(server) => drop::<Ours>(server),
                None => kill_server(nginx_pid(&server)),
            }
            thread::sleep(Duration::from_millis(rng.below(2000)));
            running = Some(start_again(&server));
            thread::sleep(Duration::from_millis(rng.below(500)));
        }
        is_over.store(true, Ordering::Release);
    });
    remote.guest(&disk).check_all();
    disk.umount();
    assert_clean(&remote.overlay);
}
