//! A base that does not respond: only requests that need the base wait for it.
//!
//! The daemon `lower` serves the base as a raw file; the daemon `upper` has its overlay above that
//! file. SIGSTOP makes `lower` hang like a dead network disk; SIGCONT resumes it.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::process::Command;
use std::sync::mpsc::channel;
use std::time::Duration;

use rustix::fs::{FallocateFlags, SeekFrom};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};

use crate::support::{
    CLUSTER, Daemon, MIB, Mount, Pattern, QmpClient, Scratch, assert_same, poll, qemu, read_at,
    run_ok, wait_until, within,
};

/// Number of reads that hang: far more than the workers of the pool "below". If hanging reads could
/// use up the threads that serve other requests, these would do it.
const HUNG_READERS: u64 = 48;
const PATIENCE: Duration = Duration::from_secs(15);

/// A stopped process that is continued when this is dropped, so that no thread that waits for it
/// blocks the clean-up.
pub(crate) struct Stopped(Pid);

impl Stopped {
    /// Returns when every thread has stopped; a thread inside a system call stops a little later.
    pub(crate) fn stop(pid: Pid) -> Stopped {
        kill_process(pid, Signal::STOP).expect("SIGSTOP");
        let stopped = Stopped(pid);
        let tasks = format!("/proc/{}/task", pid.as_raw_nonzero());
        wait_until("all threads of the lower disk stand still", || {
            let mut stats = fs::read_dir(&tasks)
                .expect("threads")
                .filter_map(|task| fs::read_to_string(task.ok()?.path().join("stat")).ok());
            stats.all(|stat| stat.rsplit(')').next().is_some_and(|rest| rest.starts_with(" T")))
        });
        stopped
    }
}

impl Drop for Stopped {
    fn drop(&mut self) {
        let _ = kill_process(self.0, Signal::CONT);
    }
}

fn at(offset: u64) -> usize {
    usize::try_from(offset).expect("small")
}

/// Protects: a slow or hung backing file never delays a read of the overlay's own data, an in-place
/// write, a flush, or the socket (H27). Reads that need it wait, and return the right bytes when it
/// responds again.
#[test]
fn a_hung_base_stops_only_those_who_need_it() {
    requires!("/dev/fuse", "qemu-img");
    let scratch = Scratch::new();
    let size = 16 * MIB;
    let content = Pattern::new(40, 1).bytes(0, size);
    let served = scratch.join("served.qcow2");
    qemu::create_full(&served, size, "", Pattern::new(40, 1));
    let lower = Mount::named(&scratch, &served, "lower").start();
    let overlay = scratch.join("overlay.qcow2");
    let base = lower.path().to_str().expect("UTF-8").to_owned();
    qemu::create(&overlay, None, "", Some((&base, "raw")));
    let upper = Mount::named(&scratch, &overlay, "upper").qmp().start();

    let file = upper.open();
    assert_same("what becomes local", &read_at(&file, 0, at(4 * MIB)), &content[..at(4 * MIB)]);
    file.sync_all().expect("fsync");
    let stopped = Stopped::stop(lower.server_pid());

    let (sender, hung) = channel();
    for index in 0..HUNG_READERS {
        let (sender, path) = (sender.clone(), upper.path().to_owned());
        std::thread::spawn(move || {
            let offset = 4 * MIB + index * 3 * CLUSTER + 100;
            let mut buf = vec![0; 5000];
            let result = File::open(path).and_then(|file| file.read_exact_at(&mut buf, offset));
            let _ = sender.send((offset, result, buf));
        });
    }
    if let Ok((offset, result, _)) = hung.recv_timeout(Duration::from_secs(1)) {
        panic!("a cold read (at {offset}) cannot be answered while the base hangs: {result:?}");
    }

    // Local requests continue, in many rounds.
    let path = upper.path().to_owned();
    let local = content[..at(4 * MIB)].to_vec();
    let answered = within(PATIENCE, move || {
        let file = File::options().read(true).write(true).open(path).expect("open");
        for round in 0..50u64 {
            let offset = round * 65_537 % (4 * MIB - 10_000);
            assert_same(
                "local read",
                &read_at(&file, offset, 10_000),
                &local[at(offset)..at(offset) + 10_000],
            );
            file.write_all_at(&local[at(offset)..at(offset) + 512], offset)
                .expect("in-place write");
        }
        file.sync_all().expect("fsync");
        assert_eq!(file.metadata().expect("stat").len(), 16 * MIB);
    });
    assert!(
        answered.is_some(),
        "what is local must be answered while the base hangs\n{}",
        upper.log()
    );
    let socket = upper.socket().to_owned();
    let answered = within(PATIENCE, move || {
        let mut client = QmpClient::connect(&socket);
        client.ok("query-block-jobs", json!({})) == json!([])
            && client.ok("query-version", json!({})).is_object()
    });
    assert_eq!(
        answered,
        Some(true),
        "the socket must answer while the base hangs\n{}",
        upper.log()
    );
    assert!(hung.try_recv().is_err(), "still hanging");

    drop(stopped);
    for _ in 0..HUNG_READERS {
        let (offset, result, buf) =
            hung.recv_timeout(PATIENCE * 2).expect("the hung reads complete");
        result.unwrap_or_else(|error| panic!("read at {offset} after the base came back: {error}"));
        assert_same("hung read", &buf, &content[at(offset)..at(offset) + 5000]);
    }
    assert_same("everything", &upper.read_all(), &content);
    drop(file);
    upper.umount();
    qemu::assert_clean(&overlay); // opens the base as well
    lower.umount();
    qemu::assert_clean(&served);
}

/// The set-up of the other tests: `lower` serves 16 MiB, `upper` has an overlay above it, and the
/// 9th MiB is local.
struct Pair {
    // Fields are dropped in this order: the upper disk first.
    upper: Daemon,
    lower: Daemon,
    overlay: PathBuf,
    content: Vec<u8>,
    scratch: Scratch,
}

impl Pair {
    fn new() -> Pair {
        Pair::with(&[])
    }

    /// Creates the pair with more arguments for the upper disk.
    fn with(args: &[&str]) -> Pair {
        let scratch = Scratch::new();
        let content = Pattern::new(41, 1).bytes(0, 16 * MIB);
        let served = scratch.join("served.qcow2");
        qemu::create_full(&served, 16 * MIB, "", Pattern::new(41, 1));
        let lower = Mount::named(&scratch, &served, "lower").start();
        let overlay = scratch.join("overlay.qcow2");
        let base = lower.path().to_str().expect("UTF-8").to_owned();
        qemu::create(&overlay, None, "", Some((&base, "raw")));
        let upper = Mount::named(&scratch, &overlay, "upper").qmp().args(args).start();
        let local = read_at(&upper.open(), 8 * MIB, at(MIB));
        assert_same("what becomes local", &local, &content[at(8 * MIB)..at(9 * MIB)]);
        Pair { upper, lower, overlay, content, scratch }
    }

    /// Waits until the upper serving process is a zombie, and so has finished its own work. The
    /// kernel may still have to flush the base before it closes it, and that hangs in the lower
    /// disk as well.
    fn wait_until_upper_has_left(&self) {
        let stat = format!("/proc/{}/stat", self.upper.server_pid().as_raw_nonzero());
        let is_zombie = || {
            // The keeper has waited for it, and it is gone, if the kernel had nothing to flush.
            fs::read_to_string(&stat).map_or(true, |stat| {
                stat.rsplit(')').next().is_some_and(|rest| rest.starts_with(" Z"))
            })
        };
        assert!(
            poll(PATIENCE * 2, || is_zombie().then_some(())).is_some(),
            "it never ends\n{}",
            self.upper.log()
        );
    }

    /// Checks, after a stream, that the overlay does not need the lower disk any more, and that the
    /// upper daemon has closed it.
    fn finish(self) {
        assert_same("everything", &self.upper.read_all(), &self.content);
        self.lower.umount();
        assert_same("everything, without the base", &self.upper.read_all(), &self.content);
        self.upper.umount();
        qemu::assert_clean(&self.overlay);
        qemu::assert_independent(&self.overlay);
        assert_same("overlay", &qemu::read_all(&self.overlay), &self.content);
        drop(self.scratch);
    }
}

/// Protects: writes and discards of whole clusters, seeks and flushes complete while any number of
/// reads hangs in the base, over both transports.
#[test]
fn what_needs_no_base_is_done_while_reads_hang() {
    requires!("/dev/fuse", "qemu-img");
    for transport in ["dev", "uring"] {
        if transport == "uring" && !crate::transports::has_uring() {
            continue;
        }
        let pair = Pair::with(&["--transport", transport]);
        let stopped = Stopped::stop(pair.lower.server_pid());
        let (sender, hung) = channel();
        for index in 0..HUNG_READERS {
            let (sender, path) = (sender.clone(), pair.upper.path().to_owned());
            std::thread::spawn(move || {
                let offset = index * 2 * CLUSTER + 100;
                let mut buf = vec![0; 5000];
                let result = File::open(path).and_then(|file| file.read_exact_at(&mut buf, offset));
                let _ = sender.send((offset, result, buf));
            });
        }
        // All reads are in the daemon: each has called the base, or waits for a free worker.
        if let Ok((offset, result, _)) = hung.recv_timeout(Duration::from_secs(1)) {
            panic!("a cold read (at {offset}) cannot be answered while the base hangs: {result:?}");
        }
        let path = pair.upper.path().to_owned();
        let done = within(PATIENCE, move || {
            let file = File::options().read(true).write(true).open(path).expect("open");
            let hole = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
            for round in 0..4 {
                let at = 10 * MIB + round * 4 * CLUSTER;
                file.write_all_at(&vec![round as u8 + 1; CLUSTER as usize * 2], at)
                    .expect("a write of whole clusters that the base has");
                rustix::fs::fallocate(&file, hole, at + 2 * CLUSTER, CLUSTER)
                    .expect("a discard of a cluster that the base has");
                file.write_all_at(&[0xee; 10], at + 2 * CLUSTER + 7)
                    .expect("a write into what was discarded");
                rustix::fs::fallocate(&file, hole, at + 3 * CLUSTER, CLUSTER).expect("a discard");
                file.sync_all().expect("fsync");
                let (data, zeros) = (
                    rustix::fs::seek(&file, SeekFrom::Data(at)),
                    rustix::fs::seek(&file, SeekFrom::Hole(at)),
                );
                assert_eq!((data, zeros), (Ok(at), Ok(at + 3 * CLUSTER)));
            }
            rustix::fs::fallocate(&file, hole, 8 * MIB, CLUSTER)
                .expect("a discard of a local cluster");
            rustix::fs::fallocate(&file, FallocateFlags::ZERO_RANGE, 8 * MIB + CLUSTER, CLUSTER)
                .expect("zeros");
        });
        assert!(
            done.is_some(),
            "over {transport} what needs no base waits for it\n{}",
            pair.upper.log()
        );
        assert!(hung.try_recv().is_err(), "still hanging");
        drop(stopped);
        let mut want = pair.content.clone();
        let mut put = |start: u64, len: u64, byte: u8| want[at(start)..at(start + len)].fill(byte);
        for round in 0..4 {
            let start = 10 * MIB + round * 4 * CLUSTER;
            put(start, 2 * CLUSTER, round as u8 + 1);
            put(start + 2 * CLUSTER, 2 * CLUSTER, 0);
            put(start + 2 * CLUSTER + 7, 10, 0xee);
        }
        put(8 * MIB, 2 * CLUSTER, 0);
        for _ in 0..HUNG_READERS {
            let (offset, result, buf) =
                hung.recv_timeout(PATIENCE * 2).expect("the hung reads complete");
            result.unwrap_or_else(|error| {
                panic!("read at {offset} after the base came back: {error}")
            });
            assert_same("hung read", &buf, &want[at(offset)..at(offset) + 5000]);
        }
        assert_same("everything", &pair.upper.read_all(), &want);
        pair.upper.umount();
        qemu::assert_clean(&pair.overlay);
        pair.lower.umount();
    }
}

/// Protects: a stream over a hung base can still be queried and controlled, and the guest's local
/// I/O continues; the stream finishes when the base responds again.
#[test]
fn a_stream_over_a_hung_base_does_not_take_the_disk_with_it() {
    requires!("/dev/fuse", "qemu-img");
    let pair = Pair::new();
    let mut client = pair.upper.client();
    client.ok("block-stream", json!({"device": "drive0", "speed": 1}));
    let stopped = Stopped::stop(pair.lower.server_pid());
    let (path, local) =
        (pair.upper.path().to_owned(), pair.content[at(8 * MIB)..at(9 * MIB)].to_vec());
    let answered = within(PATIENCE, move || {
        // Without the limit, the stream runs into the hung base.
        client.ok("block-job-set-speed", json!({"device": "drive0", "speed": 0}));
        std::thread::sleep(Duration::from_millis(300));
        assert_eq!(client.job()["len"], json!(16 * MIB));
        let file = File::options().read(true).write(true).open(path).expect("open");
        assert_same("local read", &read_at(&file, 8 * MIB, at(MIB)), &local);
        file.write_all_at(&local[..512], 8 * MIB).expect("in-place write");
        client
    });
    let mut client = answered.unwrap_or_else(|| {
        panic!("disk and socket must answer while the stream hangs\n{}", pair.upper.log())
    });
    drop(stopped);
    client.wait_completed();
    drop(client);
    pair.finish();
}

/// Protects: commands that need nothing from the base do not wait for it: facts of the device, and
/// the start of a job.
#[test]
fn commands_do_not_wait_for_a_hung_base() {
    requires!("/dev/fuse", "qemu-img");
    let pair = Pair::new();
    // The kernel's cached attributes of the base must expire first, or the test would use them.
    std::thread::sleep(Duration::from_millis(1500));
    let stopped = Stopped::stop(pair.lower.server_pid());
    let ask = |command: &'static str, arguments: Value| {
        let socket = pair.upper.socket().to_owned();
        let answered = within(PATIENCE, move || QmpClient::connect(&socket).ok(command, arguments));
        assert!(
            answered.is_some(),
            "{command} must be answered while the base hangs\n{}",
            pair.upper.log()
        );
    };
    ask("query-block", json!({}));
    ask("block-stream", json!({"device": "drive0"}));
    let mut client = pair.upper.client();
    drop(stopped);
    if client.ok("query-block-jobs", json!({})) == json!([]) {
        // The job has finished already: this one has nothing to do.
        client.ok("block-stream", json!({"device": "drive0"}));
    }
    client.wait_completed();
    drop(client);
    pair.finish();
}

/// Protects: local clusters stay readable while a neighbouring cluster is being copied from a hung
/// base. A copy of one cluster must not delay a read of another, whether a reader asked for a large
/// range or the stream works on a large chunk.
#[test]
fn local_clusters_beside_a_hung_copy_are_read() {
    requires!("/dev/fuse", "qemu-img");
    for by in ["a reader", "the stream"] {
        eprintln!("{by}");
        let pair = Pair::new();
        let file = pair.upper.open();
        // One local cluster among missing ones, within the first chunk of a stream.
        let island = 5 * CLUSTER;
        assert_same(
            "what becomes local",
            &read_at(&file, island, 10),
            &pair.content[at(island)..at(island) + 10],
        );
        let mut client = pair.upper.client();
        let stopped = Stopped::stop(pair.lower.server_pid());
        let (sender, hung) = channel();
        if by == "a reader" {
            let path = pair.upper.path().to_owned();
            std::thread::spawn(move || {
                let mut buf = vec![0; at(16 * CLUSTER)];
                let result = File::open(path).and_then(|file| file.read_exact_at(&mut buf, 0));
                let _ = sender.send((result, buf));
            });
        } else {
            client.ok("block-stream", json!({"device": "drive0"}));
        }
        std::thread::sleep(Duration::from_millis(300));
        let local = file.try_clone().expect("dup");
        let answered = within(PATIENCE, move || read_at(&local, island + 1000, 4096));
        let answered = answered.unwrap_or_else(|| {
            panic!("a local cluster beside what {by} waits for must be answered")
        });
        assert_same(
            "local cluster",
            &answered,
            &pair.content[at(island) + 1000..at(island) + 5096],
        );
        drop(stopped);
        if by == "a reader" {
            let (result, buf) = hung.recv_timeout(PATIENCE * 2).expect("the hung read completes");
            result.expect("after the base came back");
            assert_same("hung read", &buf, &pair.content[..at(16 * CLUSTER)]);
            client.ok("block-stream", json!({"device": "drive0"}));
        }
        client.wait_completed();
        drop((file, client));
        pair.finish();
    }
}

/// Protects: a daemon ends although a read hangs in the base and a `block_resize` waits for that
/// read; the image keeps its size and its written data.
#[test]
fn a_resize_behind_a_hung_base_does_not_keep_the_daemon() {
    requires!("/dev/fuse", "qemu-img");
    let mut pair = Pair::new();
    let file = pair.upper.open();
    file.write_all_at(b"written", 8 * MIB).expect("write");
    file.sync_all().expect("fsync");
    let (mut client, hand) = (pair.upper.client(), pair.upper.client());
    let stopped = Stopped::stop(pair.lower.server_pid());
    let (sender, hung) = channel();
    std::thread::spawn(move || {
        let _ = sender.send(file.read_at(&mut [0; 512], 0));
    });
    std::thread::sleep(Duration::from_millis(500)); // until the read waits for the base
    client.send_raw("{\"execute\": \"block_resize\", \"arguments\": {\"device\": \"drive0\", \"size\": 33554432}}\n");
    client.listen(Duration::from_millis(500)); // until the resize waits for the read
    assert!(hung.try_recv().is_err(), "the read waits for the base");
    pair.upper.signal(Signal::TERM);
    wait_until("it is busy", || pair.upper.log().contains("is in use: all is written back"));
    pair.upper.signal(Signal::TERM);
    pair.wait_until_upper_has_left();
    assert!(pair.upper.log().contains("leaving without them"), "{}", pair.upper.log());
    assert!(hung.recv_timeout(PATIENCE).expect("the read ends").is_err());
    drop((stopped, client, hand));
    let status = pair.upper.ended_within(PATIENCE);
    assert_eq!(status.and_then(|status| status.code()), Some(0), "{}", pair.upper.log());
    qemu::assert_not_corrupt(&pair.overlay);
    let mut want = pair.content.clone();
    want[at(8 * MIB)..at(8 * MIB) + 7].copy_from_slice(b"written");
    assert_same("overlay, as large as before", &qemu::read_all(&pair.overlay), &want);
}

/// Protects: when a daemon with hanging requests ends, it does not touch a mount that has replaced
/// its own, although the kernel gives the new mount the device number of the old one.
#[test]
fn the_end_of_a_hung_daemon_leaves_the_next_mount_alone() {
    requires!("/dev/fuse", "qemu-img", "root");
    let mut pair = Pair::new();
    let content = Pattern::new(42, 1).bytes(0, MIB);
    let other = pair.scratch.join("other.qcow2");
    qemu::create_full(&other, MIB, "", Pattern::new(42, 1));
    let file = pair.upper.open();
    let stopped = Stopped::stop(pair.lower.server_pid());
    let (sender, hung) = channel();
    std::thread::spawn(move || {
        let result = file.read_at(&mut [0; 512], 0);
        drop(file);
        let _ = sender.send(result);
    });
    std::thread::sleep(Duration::from_millis(500)); // until the read waits for the base
    assert!(hung.try_recv().is_err(), "the read waits for the base");
    run_ok(Command::new("umount").args(["-f", "-l"]).arg(pair.upper.path()));
    assert!(hung.recv_timeout(PATIENCE).expect("the read ends").is_err());
    // The old daemon still waits for its request.
    let next = Mount::named(&pair.scratch, &other, "upper").start();
    assert!(
        !pair.upper.log().contains("leaving without them"),
        "too late: nothing is tested\n{}",
        pair.upper.log()
    );
    pair.wait_until_upper_has_left();
    assert!(pair.upper.log().contains("leaving without them"), "{}", pair.upper.log());
    assert!(next.is_mounted(), "the old daemon has detached it\n{}", next.log());
    assert_same("the next disk", &next.read_all(), &content);
    drop(stopped);
    let status = pair.upper.ended_within(PATIENCE);
    assert_eq!(status.and_then(|status| status.code()), Some(0), "{}", pair.upper.log());
    assert_same("the next disk", &next.read_all(), &content);
    next.umount();
    qemu::assert_not_corrupt(&pair.overlay);
}

/// Protects: status is reported while the base hangs and readers and a map query hang in it: over
/// QMP and to Prometheus, including a walk over the tables. A client that asks for the map waits
/// alone, and delays neither other clients nor the end of the daemon.
#[test]
fn how_things_are_is_told_while_the_base_hangs() {
    requires!("/dev/fuse", "qemu-img");
    let pair = Pair::with(&["--metrics", "127.0.0.1:0"]);
    let address = crate::support::metrics::address(&pair.upper);
    let stopped = Stopped::stop(pair.lower.server_pid());
    let mut client = pair.upper.client();
    client.send_raw("{\"execute\": \"x-query-map\"}\n");
    let (sender, hung) = channel();
    let path = pair.upper.path().to_owned();
    std::thread::spawn(move || {
        let _ = sender.send(File::open(path).and_then(|file| file.read_exact_at(&mut [0; 512], 0)));
    });
    client.listen(Duration::from_millis(1500));
    assert!(
        client.trace.len() == 2 && hung.try_recv().is_err(),
        "both wait for the base: {:?}",
        client.trace
    );

    let socket = pair.upper.socket().to_owned();
    let answered = within(PATIENCE, move || {
        let mut other = QmpClient::connect(&socket);
        let status = other.ok("x-query-status", json!({}));
        assert_eq!(
            (&status["bytes"]["local"], &status["bytes"]["remote"]),
            (&json!(MIB), &json!(15 * MIB))
        );
        let cells = other.ok("x-query-cells", json!({"cells": 16}));
        assert_eq!(
            (&cells["local"][8], &cells["local"][7], &cells["cell-size"]),
            (&json!(MIB), &json!(0), &json!(MIB))
        );
        crate::support::metrics::Scrape::of(address)
            .value("cordisk_disk_bytes", &[("state", "local")])
    });
    assert_eq!(answered, Some(MIB as f64), "nobody is to wait for the base\n{}", pair.upper.log());
    drop(stopped);
    hung.recv_timeout(PATIENCE).expect("the read ends").expect("read");
    let map = client.message(PATIENCE).expect("the map")["return"].clone();
    // The time limit of one query had expired, so the first page ends with its first run.
    let rest = client.ok("x-query-map", json!({"offset": map["next"]}));
    let ranges: Vec<_> = [&map, &rest]
        .into_iter()
        .flat_map(|page| page["extents"].as_array().expect("extents"))
        .collect();
    let ranges: Vec<_> = ranges
        .iter()
        .map(|extent| (extent["start"].clone(), extent["length"].clone(), extent["depth"].clone()))
        .collect();
    let expected = [(0, 8, 1), (8, 1, 0), (9, 7, 1)]
        .map(|(start, length, depth)| (json!(start * MIB), json!(length * MIB), json!(depth)));
    assert_eq!(ranges, expected);
    drop(client);
    pair.upper.umount();
    pair.lower.umount();
}

/// Protects: a client that waits for the map of a hung base does not prevent a clean end of the
/// daemon.
#[test]
fn a_hung_map_does_not_keep_the_daemon() {
    requires!("/dev/fuse", "qemu-img");
    let mut pair = Pair::new();
    let stopped = Stopped::stop(pair.lower.server_pid());
    let mut client = pair.upper.client();
    client.send_raw("{\"execute\": \"x-query-map\"}\n");
    client.listen(Duration::from_millis(500));
    assert_eq!(client.trace.len(), 2, "the map waits for the base: {:?}", client.trace);
    pair.upper.signal(Signal::TERM);
    pair.wait_until_upper_has_left();
    drop((stopped, client));
    let status = pair.upper.ended_within(PATIENCE);
    assert_eq!(status.and_then(|status| status.code()), Some(0), "{}", pair.upper.log());
    assert!(
        !pair.upper.log().contains("leaving without them"),
        "the disk was closed\n{}",
        pair.upper.log()
    );
    qemu::assert_clean(&pair.overlay);
}
