//! Processes that are killed, each with a successor that takes the disk over: a real kernel, its
//! page cache, file locks and a journal in a memfd.

use std::io::{Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;

use super::*;
use crate::disk::{CommitAge, CommitTimer, Inheritance};
use host::storage::MemoryFile;

/// Size of the disk, in bytes.
const SIZE: u64 = 4 << 20;
/// The variable that tells a test process that it is a successor.
const SUCCESSOR: &str = "CORDISK_TEST_SUCCESSOR";
/// The name of the test that such a process runs.
const TEST: &str = "disk::tests::successor::a_successor";

/// A request of a successor. It follows from its number.
#[derive(Clone, Copy, Debug)]
enum Request {
    Write(u64, u64),
    Discard(u64, u64),
    Zero(u64, u64),
    Flush,
}

fn request(seed: u64, number: u64) -> Request {
    let mut random = Random(sim::random::mix(seed ^ sim::random::mix(number)));
    let at = random.below(SIZE / 512 - 1) * 512;
    let len = 512 * (1 + random.below(400).min((SIZE - at) / 512 - 1));
    match random.below(12) {
        0 => Request::Flush,
        1 | 2 => Request::Discard(at, len),
        3 | 4 => Request::Zero(at, len),
        _ => Request::Write(at, len),
    }
}

fn byte_of(number: u64) -> u8 {
    number as u8 | 1
}

/// The guest's side of a request: what the disk holds afterwards.
fn apply(expected: &mut [u8], number: u64, request: Request) {
    match request {
        Request::Write(at, len) => {
            expected[at as usize..(at + len) as usize].fill(byte_of(number));
        }
        Request::Discard(at, len) | Request::Zero(at, len) => {
            expected[at as usize..(at + len) as usize].fill(0);
        }
        Request::Flush => {}
    }
}

/// A process that serves requests from `first` on until it is killed. It first says what it reads,
/// and then one byte for each request that is answered.
struct Successor(Child);

impl Successor {
    fn start(kept: &Kept, first: u64) -> Successor {
        let (ours, theirs) = host::packet::pair().unwrap();
        let program = std::env::current_exe().unwrap();
        let mut command = Command::new(program);
        command.args(["--exact", TEST, "--nocapture"]).env(SUCCESSOR, "1");
        let child =
            command.stdin(Stdio::from(theirs)).stdout(Stdio::piped()).spawn().expect("a successor");
        let message = (kept.overlay.clone(), kept.seed, first);
        let descriptors = [kept.image.as_fd(), kept.witness.as_fd(), kept.journal.as_fd()];
        host::packet::send(&ours, &message, 4096, &descriptors).unwrap();
        Successor(child)
    }
}

impl Drop for Successor {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// What outlives the processes.
struct Kept {
    overlay: std::path::PathBuf,
    seed: u64,
    image: OwnedFd,
    witness: std::fs::File,
    journal: MemoryFile,
}

/// The life of a successor. This is no test of its own: without the variable it does nothing.
#[test]
fn a_successor() {
    if std::env::var_os(SUCCESSOR).is_none() {
        return;
    }
    let ((overlay, seed, first), descriptors): ((std::path::PathBuf, u64, u64), _) =
        host::packet::receive(std::io::stdin(), 4096).unwrap().expect("a message");
    let mut descriptors = descriptors.into_iter();
    let mut next = || descriptors.next().expect("three descriptors");
    let (image, witness, journal) = (next(), next().into(), next());
    let journal = Arc::new(MemoryFile::of_descriptor(journal).unwrap());
    let from = Inheritance { image, witness, journal };
    let disk = Arc::new(Disk::take_over(&overlay, &options(), from).unwrap());
    let _timer = CommitTimer::start(&disk, CommitAge::new());
    let mut all = vec![0; SIZE as usize];
    // The test harness has printed to the same pipe before.
    let mut output = std::io::stdout();
    disk.read(0, &mut all).unwrap();
    output.write_all(b"\n#").and_then(|()| output.write_all(&all)).unwrap();
    output.flush().unwrap();
    for number in first.. {
        match request(seed, number) {
            Request::Write(at, len) => {
                disk.write(at, &vec![byte_of(number); len as usize]).unwrap();
            }
            Request::Discard(at, len) => disk.discard(at..at + len).unwrap(),
            Request::Zero(at, len) => disk.write_zeroes(at..at + len).unwrap(),
            Request::Flush => disk.flush().unwrap(),
        }
        output.write_all(b".").and_then(|()| output.flush()).unwrap();
        if number % 7 == 0 {
            let at = number * 65_536 % SIZE;
            disk.populate(at..SIZE.min(at + 65_536), usize::MAX).unwrap();
        }
    }
}

/// Protects: P17 and P12. The process is killed over and over between and inside of requests. Each
/// successor reads every answered byte, the image stays locked all the time, and at the end it has
/// no errors.
#[test]
fn killed_over_and_over_nothing_that_was_answered_is_lost() {
    let mut random = Random::of_test(11);
    let dir = tempfile::tempdir().unwrap();
    let base = dir.path().join("base.raw");
    let mut expected: Vec<u8> = (0..SIZE).map(|_| random.next() as u8).collect();
    std::fs::write(&base, &expected).unwrap();
    let overlay = overlay_on(&base, "raw", None, "cluster_size=4k");
    let journal = MemoryFile::new(1 << 20).unwrap();
    let shared = MemoryFile::of_descriptor(journal.as_fd().try_clone_to_owned().unwrap()).unwrap();
    let disk = Disk::open_journaled(&overlay, &options(), Arc::new(shared)).unwrap();
    let kept = Kept {
        image: disk.descriptor().unwrap(),
        witness: std::fs::File::options().read(true).write(true).open(&overlay).unwrap(),
        overlay,
        seed: random.next(),
        journal,
    };
    // As if the first process were killed: it does nothing more, and its destructor runs only at
    // the end of the test, to release the locks that this process shares with it.
    let first = disk;

    let (mut answered, kills) = (0, 40);
    for kill in 0..kills {
        let mut successor = Successor::start(&kept, answered);
        let mut output = successor.0.stdout.take().unwrap();
        let mut byte = [0];
        while byte != *b"#" {
            output.read_exact(&mut byte).expect("the successor takes over");
        }
        let mut found = vec![0; SIZE as usize];
        output.read_exact(&mut found).unwrap();
        // The request that was not answered has taken effect or not, sector by sector.
        let mut after = expected.clone();
        if kill > 0 {
            apply(&mut after, answered - 1, request(kept.seed, answered - 1));
        }
        for (sector, found) in found.chunks(512).enumerate() {
            let place = sector * 512..sector * 512 + 512;
            assert!(
                found == &expected[place.clone()] || found == &after[place],
                "kill {kill}: sector {sector} reads {:02x?}…",
                &found[..8]
            );
        }
        expected = found;
        if kill % 8 == 0 {
            let error = Disk::open(&kept.overlay, &options()).unwrap_err();
            assert_eq!(error.kind(), host::ErrorKind::Busy, "the locks stay: {error}");
        }
        let wanted = random.below(120);
        let mut count = 0;
        while count < wanted {
            output.read_exact(&mut byte).expect("an answer");
            count += 1;
        }
        successor.0.kill().unwrap();
        // What it has answered until it was dead is in the pipe.
        let mut rest = Vec::new();
        output.read_to_end(&mut rest).unwrap();
        count += rest.len() as u64;
        for number in answered..answered + count {
            apply(&mut expected, number, request(kept.seed, number));
        }
        // The next one was perhaps begun.
        answered += count + 1;
    }
    let journal = Arc::new(kept.journal);
    let inherit = || Inheritance {
        image: kept.image.try_clone().unwrap(),
        witness: kept.witness.try_clone().unwrap(),
        journal: Arc::clone(&journal) as Arc<dyn host::storage::SharedBytes>,
    };
    // A successor that fails after it has opened the disk leaves the locks to the next one.
    drop(Disk::take_over(&kept.overlay, &options(), inherit()).unwrap());
    let error = Disk::open(&kept.overlay, &options()).unwrap_err();
    assert_eq!(error.kind(), host::ErrorKind::Busy, "the locks stay: {error}");
    let disk = Disk::take_over(&kept.overlay, &options(), inherit()).unwrap();
    disk.close().unwrap();
    let mut found = vec![0; SIZE as usize];
    disk.read(0, &mut found).unwrap();
    drop((disk, first));
    // What the dead processes have leaked is found by the next open.
    let disk = Disk::open(&kept.overlay, &options()).unwrap();
    disk.close().unwrap();
    drop(disk);
    check(&kept.overlay);
    assert!(qemu_reads(&kept.overlay) == found);
    let size = std::fs::metadata(&kept.overlay).unwrap().len();
    assert!(size < 8 * SIZE, "the file has grown to {size} bytes");
    println!("{answered} requests, {kills} kills");
    assert!(answered > kills);
}
