//! A server that is killed under load, and is back after some time: 3 s, or `CORDISK_AWAY_SECONDS`.

use std::os::unix::fs::FileExt;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::Instant;

use rustix::io::Errno;

use super::*;
use crate::support::pattern::assert_same_at;

const SIZE: u64 = 32 * MIB;

/// What the writer uses; readers use the rest.
const WRITTEN: u64 = 8 * MIB;

const CLUSTER: u64 = 64 * KIB;

const READERS: usize = 4;

/// How long the server is away.
fn away() -> Duration {
    let seconds = std::env::var("CORDISK_AWAY_SECONDS");
    Duration::from_secs(seconds.map_or(3, |seconds| seconds.parse().expect("seconds")))
}

/// A read that has failed.
struct FailedRead {
    begun: Instant,
    took: Duration,
}

/// Four readers of what is not there yet, and a writer of whole clusters, around a kill of the
/// server. Returns the reads that have failed, and when the server was back.
fn under_load(test: &str, options: &[&str]) -> Option<(Vec<FailedRead>, Instant)> {
    let mut rng = Rng::for_test(test);
    let (server, remote) = on_nginx(SIZE, "limit_rate 16m;")?;
    let remote = remote.create();
    let disk = remote.mount().args(options).start();
    let (is_over, done, failed) =
        (AtomicBool::new(false), AtomicU64::new(0), Mutex::new(Vec::new()));
    let mut guest = remote.guest(&disk);
    let (back, again) = thread::scope(|scope| {
        for _ in 0..READERS {
            let mut rng = Rng::new(rng.next());
            let (remote, disk) = (&remote, &disk);
            let (is_over, done, failed) = (&is_over, &done, &failed);
            scope.spawn(move || {
                let file = disk.open();
                no_read_ahead(&file);
                while !is_over.load(Ordering::Acquire) {
                    let range = rng.range(SIZE - WRITTEN, 64 * KIB);
                    let range = range.start + WRITTEN..range.end + WRITTEN;
                    let want = &remote.content[range.start as usize..range.end as usize];
                    let mut bytes = vec![0; want.len()];
                    let begun = Instant::now();
                    match file.read_exact_at(&mut bytes, range.start) {
                        Ok(()) => {
                            assert_same_at("a read", range.start, &bytes, want);
                            done.fetch_add(1, Ordering::AcqRel);
                        }
                        Err(error) => {
                            assert_eq!(Errno::from_io_error(&error), Some(Errno::IO), "{error}");
                            let took = begun.elapsed();
                            failed.lock().expect("no panic").push(FailedRead { begun, took });
                        }
                    }
                }
            });
        }
        let (guest, mut rng) = (&mut guest, Rng::new(rng.next()));
        let is_over = &is_over;
        let writer = scope.spawn(move || {
            while !is_over.load(Ordering::Acquire) {
                let at = rng.below(WRITTEN / CLUSTER) * CLUSTER;
                guest.write(at..at + CLUSTER);
                guest.check(at..at + CLUSTER);
                guest.file.sync_data().expect("fdatasync");
            }
        });
        let some_reads = |what: &str| {
            let before = done.load(Ordering::Acquire);
            wait_until(what, || done.load(Ordering::Acquire) >= before + 20);
        };
        some_reads("reads before the kill");
        kill_server(nginx_pid(&server));
        thread::sleep(away());
        let again = start_again(&server);
        let back = Instant::now();
        some_reads("reads after the server is back");
        is_over.store(true, Ordering::Release);
        writer.join().expect("the writer");
        (back, again)
    });
    guest.check_all();
    drop(guest.file);
    drop(again);
    disk.umount();
    assert_clean(&remote.overlay);
    Some((failed.into_inner().expect("no panic"), back))
}

/// Protects: with `wait`, a guest sees no error while the server is away, and no wrong byte.
#[test]
fn a_server_that_is_killed_costs_time() {
    requires!("/dev/fuse", "qemu-img", "nginx", "openssl");
    let name = "a_server_that_is_killed_costs_time";
    let Some((failed, _)) = under_load(name, &["--on-source-error", "wait"]) else { return };
    assert_eq!(failed.len(), 0, "reads that failed");
}

/// Protects: with `error`, reads fail only after the deadline, writes of whole clusters never, and
/// nothing fails that begins when the server is back.
#[test]
fn a_server_that_is_killed_costs_reads_after_the_deadline() {
    requires!("/dev/fuse", "qemu-img", "nginx", "openssl");
    let deadline = Duration::from_secs((away().as_secs() / 3).max(1));
    let seconds = deadline.as_secs().to_string();
    let name = "a_server_that_is_killed_costs_reads_after_the_deadline";
    let Some((failed, back)) = under_load(name, &["--source-timeout", &seconds]) else { return };
    assert!(!failed.is_empty(), "no read has failed while the server was away");
    for FailedRead { begun, took } in failed {
        assert!(took >= deadline, "a read has failed after {took:?}");
        assert!(begun < back, "a read has failed that began when the server was back");
    }
}
