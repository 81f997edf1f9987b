//! A base that does not answer: only those who need it wait for it.
//!
//! Daemon `lower` serves the base as a raw file, daemon `upper` has its overlay over that. SIGSTOP makes `lower` hang like a dead network
//! disk; SIGCONT brings it back.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::mpsc::channel;
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};
use serde_json::json;

use crate::support::{CLUSTER, MIB, Mount, Pattern, Scratch, assert_same, qemu, read_at, within};

/// Far more than the miss workers can be: if hung reads could use up what serves the others, they do.
const HUNG_READERS: u64 = 48;
const PATIENCE: Duration = Duration::from_secs(15);

/// A stopped process, which goes on when this is dropped: nothing that waits for it can hang the clean-up.
struct Stopped(Pid);

impl Stopped {
    fn stop(pid: Pid) -> Stopped {
        kill_process(pid, Signal::STOP).expect("SIGSTOP");
        Stopped(pid)
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

/// Protects: a slow or hung backing file never delays a read of what the overlay already holds, an in-place write, a flush, or the socket
/// (architecture D1.1); reads that need it wait, and get the right bytes when it comes back.
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
    let stopped = Stopped::stop(lower.pid());

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
    assert!(hung.recv_timeout(Duration::from_secs(1)).is_err(), "a cold read cannot be answered while the base hangs");

    // Everything local goes on, over and over.
    let path = upper.path().to_owned();
    let local = content[..at(4 * MIB)].to_vec();
    let answered = within(PATIENCE, move || {
        let file = File::options().read(true).write(true).open(path).expect("open");
        for round in 0..50u64 {
            let offset = round * 65_537 % (4 * MIB - 10_000);
            assert_same("local read", &read_at(&file, offset, 10_000), &local[at(offset)..at(offset) + 10_000]);
            file.write_all_at(&local[at(offset)..at(offset) + 512], offset).expect("in-place write");
        }
        file.sync_all().expect("fsync");
        assert_eq!(file.metadata().expect("stat").len(), 16 * MIB);
    });
    assert!(answered.is_some(), "what is local must be answered while the base hangs\n{}", upper.log());
    let socket = upper.socket().to_owned();
    let answered = within(PATIENCE, move || {
        let mut client = crate::support::QmpClient::connect(&socket);
        client.ok("query-block-jobs", json!({})) == json!([]) && client.ok("query-version", json!({})).is_object()
    });
    assert_eq!(answered, Some(true), "the socket must answer while the base hangs\n{}", upper.log());
    assert!(hung.try_recv().is_err(), "still hanging");

    drop(stopped);
    for _ in 0..HUNG_READERS {
        let (offset, result, buf) = hung.recv_timeout(PATIENCE * 2).expect("the hung reads complete");
        result.unwrap_or_else(|error| panic!("read at {offset} after the base came back: {error}"));
        assert_same("hung read", &buf, &content[at(offset)..at(offset) + 5000]);
    }
    assert_same("everything", &upper.read_all(), &content);
    drop(file);
    upper.umount();
    lower.umount();
    qemu::assert_clean(&overlay);
    qemu::assert_clean(&served);
}

/// Protects: a stream over a hung base can still be asked about and cancelled, and the guest's local I/O goes on; when the base is back,
/// a new stream finishes.
#[test]
fn a_stream_over_a_hung_base_does_not_take_the_disk_with_it() {
    requires!("/dev/fuse", "qemu-img");
    let scratch = Scratch::new();
    let size = 16 * MIB;
    let content = Pattern::new(41, 1).bytes(0, size);
    let served = scratch.join("served.qcow2");
    qemu::create_full(&served, size, "", Pattern::new(41, 1));
    let lower = Mount::named(&scratch, &served, "lower").start();
    let overlay = scratch.join("overlay.qcow2");
    let base = lower.path().to_str().expect("UTF-8").to_owned();
    qemu::create(&overlay, None, "", Some((&base, "raw")));
    let upper = Mount::named(&scratch, &overlay, "upper").qmp().start();
    let file = upper.open();
    assert_same("what becomes local", &read_at(&file, at(8 * MIB) as u64, at(MIB)), &content[at(8 * MIB)..at(9 * MIB)]);

    let stopped = Stopped::stop(lower.pid());
    let (socket, path) = (upper.socket().to_owned(), upper.path().to_owned());
    let local = content[at(8 * MIB)..at(9 * MIB)].to_vec();
    let answered = within(PATIENCE, move || {
        let mut client = crate::support::QmpClient::connect(&socket);
        client.ok("block-stream", json!({"device": "drive0"}));
        std::thread::sleep(Duration::from_millis(300));
        assert_eq!(client.job()["len"], json!(16 * MIB));
        let file = File::options().read(true).write(true).open(path).expect("open");
        assert_same("local read", &read_at(&file, 8 * MIB, at(MIB)), &local);
        file.write_all_at(&local[..512], 8 * MIB).expect("in-place write");
    });
    assert!(answered.is_some(), "disk and socket must answer while the stream hangs\n{}", upper.log());
    drop(stopped);

    let mut client = upper.client();
    if client.ok("query-block-jobs", json!({})) == json!([]) {
        client.ok("block-stream", json!({"device": "drive0"})); // it has finished already: this one has nothing to do
    }
    client.wait_completed();
    assert_same("everything", &upper.read_all(), &content);
    drop((file, client));
    // The overlay does not need the lower disk any more, and has let go of it.
    lower.umount();
    assert_same("everything, without the base", &upper.read_all(), &content);
    upper.umount();
    qemu::assert_clean(&overlay);
    qemu::assert_independent(&overlay);
    assert_same("overlay", &qemu::read_all(&overlay), &content);
}
