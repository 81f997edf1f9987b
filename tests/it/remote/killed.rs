//! The fetcher or the daemon is killed.

use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use super::*;

const SIZE: u64 = 16 * MIB;

/// Protects: reads go on when the fetcher is killed, again and again, and no byte is wrong.
#[test]
fn reads_go_on_when_the_fetcher_is_killed() {
    requires!("/dev/fuse", "qemu-img", "nginx", "openssl");
    let mut rng = Rng::for_test("reads_go_on_when_the_fetcher_is_killed");
    // Slow enough that reads are under way at each kill.
    let Some((_server, remote)) = on_nginx(SIZE, "limit_rate 8m;") else { return };
    let remote = remote.create();
    let disk = remote.mount().start();
    let is_over = AtomicBool::new(false);
    thread::scope(|scope| {
        let mut readers = Vec::new();
        for _ in 0..3 {
            let mut rng = Rng::new(rng.next());
            let (remote, disk, is_over) = (&remote, &disk, &is_over);
            readers.push(scope.spawn(move || {
                let mut guest = remote.guest(disk);
                while !is_over.load(Ordering::Acquire) {
                    random_reads(&mut guest, &mut rng, 1);
                }
            }));
        }
        let mut killed = Vec::new();
        for _ in 0..3 {
            // The next fetcher is started by a read that needs one.
            let requests = disk.log().matches("the fetcher has ended").count();
            let fetcher = fetcher_of(&disk);
            assert!(!killed.contains(&fetcher));
            kill_process(fetcher, Signal::KILL).expect("kill");
            killed.push(fetcher);
            let mut guest = remote.guest(&disk);
            let unread = SIZE - (killed.len() as u64) * MIB;
            guest.check(unread..unread + MIB);
            wait_until("a new fetcher", || {
                descendants(disk.pid()).into_iter().any(|pid| {
                    is_running(pid)
                        && fs::read_to_string(format!("/proc/{}/comm", pid.as_raw_nonzero()))
                            .is_ok_and(|name| name.trim() == "cordisk-fetcher")
                })
            });
            assert!(disk.log().matches("the fetcher has ended").count() >= requests);
        }
        is_over.store(true, Ordering::Release);
        for reader in readers {
            reader.join().expect("a reader");
        }
    });
    remote.stream(&disk);
    let mut guest = remote.guest(&disk);
    guest.check_all();
    drop(guest.file);
    disk.umount();
    remote.assert_standalone(&remote.content);
}

/// Protects: a stream goes on when the fetcher is killed.
#[test]
fn a_stream_goes_on_when_the_fetcher_is_killed() {
    requires!("/dev/fuse", "qemu-img", "nginx", "openssl");
    let Some((_server, remote)) = on_nginx(SIZE, "limit_rate 2m;") else { return };
    let remote = remote.create();
    let disk = remote.mount().start();
    thread::scope(|scope| {
        let stream = scope.spawn(|| remote.stream(&disk));
        let cache = || fs::read_dir(remote.cache()).expect("cache").flatten();
        wait_until("something is fetched", || {
            cache().any(|file| {
                use std::os::unix::fs::MetadataExt;
                file.file_name().to_string_lossy().ends_with(".data")
                    && file.metadata().is_ok_and(|data| data.blocks() > 0)
            })
        });
        kill_process(fetcher_of(&disk), Signal::KILL).expect("kill");
        stream.join().expect("the stream completes");
    });
    remote.guest(&disk).check_all();
    disk.umount();
    remote.assert_standalone(&remote.content);
}

/// Protects: no fetcher stays behind a daemon that was killed, and the next mount works.
#[test]
fn no_fetcher_stays_behind_a_daemon_that_was_killed() {
    requires!("/dev/fuse", "qemu-img", "nginx", "openssl");
    let Some((_server, remote)) = on_nginx(SIZE, "") else { return };
    let remote = remote.create();
    for _ in 0..2 {
        let disk = remote.mount().start();
        let mut guest = remote.guest(&disk);
        guest.check(MIB..3 * MIB);
        let fetcher = fetcher_of(&disk);
        let others = descendants(disk.pid());
        drop(guest.file);
        disk.kill9();
        wait_until("the fetcher ends", || !is_running(fetcher));
        wait_until("no process stays", || !others.iter().any(|pid| is_running(*pid)));
        assert!([Some(0), Some(3)].contains(&check_alone(&remote.overlay)), "corrupt");
    }
    let disk = remote.mount().start();
    remote.stream(&disk);
    remote.guest(&disk).check_all();
    disk.umount();
    remote.assert_standalone(&remote.content);
}
