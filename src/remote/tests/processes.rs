//! Tests of the cache in several processes that are killed at any moment.
//!
//! A child is this test binary, run for the test [`child`] only, with a role in its environment. It
//! prints a line for each step, so that the parent kills it after a number of steps, at whatever
//! instruction it is then. `CORDISK_SEED` repeats the decisions of a run.
//!
//! These tests have a binary of their own: between fork and exec, a new child holds the open files
//! of its parent, and with them the locks that other tests expect to be released.

use std::io::{BufRead, BufReader, Write};
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::{Child, ChildStdout, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::SystemTime;

use cordisk_remote::cache::{BLOCK, CacheDirectory, CacheObject, CacheReader, Claim};
use cordisk_remote::pin::{Pin, Validator};
use cordisk_remote::url::SourceUrl;

const ROLE: &str = "CORDISK_CACHE_CHILD";
const DIRECTORY: &str = "CORDISK_CACHE_DIRECTORY";
const SEED: &str = "CORDISK_SEED";
/// Written by a child that fails, because the parent may kill it before it has ended.
const FAILED: &str = "failed";
const SIZE: u64 = 48 * BLOCK + 100;

fn url() -> SourceUrl {
    SourceUrl::parse("s3://golden/base.raw").unwrap()
}

fn pin(size: u64) -> Pin {
    Pin { size, validator: Validator::Etag("\"1\"".to_owned()), digest: None }
}

/// The bytes that the remote file has at `range`.
fn bytes(range: Range<u64>) -> Vec<u8> {
    range.map(|at| (at / 251 + at % 241) as u8 | 1).collect()
}

/// The bytes of a block.
fn block(index: u64) -> Range<u64> {
    index * BLOCK..(index * BLOCK + BLOCK).min(SIZE)
}

/// Waits until no process uses the cache. A child of the other test may hold files of this one
/// until its exec.
fn wait_for_release(cache: &CacheDirectory) {
    while cache.list().unwrap().iter().any(|facts| facts.in_use) {
        std::thread::yield_now();
    }
}

/// Random numbers (xorshift64*, Vigna 2016).
struct Random(u64);

impl Random {
    /// From the environment, or from the clock. The seed is printed.
    fn new() -> Random {
        let clock = || SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap().as_nanos();
        let seed =
            std::env::var(SEED).map_or_else(|_| clock() as u64, |seed| seed.parse().unwrap());
        eprintln!("{SEED}={seed}");
        Random(seed | 1)
    }

    fn below(&mut self, bound: u64) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 33) % bound
    }
}

/// A child. It is killed when this is dropped.
struct Killed {
    child: Child,
    output: BufReader<ChildStdout>,
}

impl Killed {
    fn start(role: &str, directory: &Path, random: &mut Random) -> Killed {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "child", "--nocapture"])
            .env(ROLE, role)
            .env(DIRECTORY, directory)
            .env(SEED, random.below(u64::MAX).to_string())
            .stdout(Stdio::piped())
            .stderr(Stdio::inherit())
            .spawn()
            .unwrap();
        let output = BufReader::new(child.stdout.take().unwrap());
        Killed { child, output }
    }

    /// Waits until the child has made a number of steps, or has ended.
    fn wait_for_steps(&mut self, steps: u64) {
        let mut line = String::new();
        let mut left = steps;
        while left > 0 && self.output.read_line(&mut line).unwrap() > 0 {
            left -= u64::from(line.ends_with("step\n"));
            line.clear();
        }
    }
}

impl Drop for Killed {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn nothing_failed(directory: &Path) {
    let failed = std::fs::read_to_string(directory.join(FAILED));
    assert!(failed.is_err(), "a child has failed: {}", failed.unwrap_or_default());
}

fn made_a_step() {
    // The parent may have closed the pipe.
    let _ = std::io::stdout().write_all(b"step\n");
}

/// Not a test of its own: what the children of the other tests do.
#[test]
fn child() {
    let Ok(role) = std::env::var(ROLE) else { return };
    let directory = std::env::var_os(DIRECTORY).unwrap();
    let failed = Path::new(&directory).join(FAILED);
    let hook = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |info| {
        let _ = std::fs::write(&failed, info.to_string());
        hook(info);
    }));
    let mut random = Random::new();
    match role.as_str() {
        "fetch" => fetch(Path::new(&directory), &mut random),
        "open" => open_again_and_again(Path::new(&directory), &mut random),
        "prune" => loop {
            CacheDirectory::open(Path::new(&directory), None).unwrap().prune(0).unwrap();
            made_a_step();
        },
        other => panic!("{other}"),
    }
}

/// Downloads everything that is missing, in a random order. Blocks get wrong bytes first.
fn fetch(directory: &Path, random: &mut Random) {
    let cache = CacheDirectory::open(directory, None).unwrap();
    let object = cache.object(&url(), &pin(SIZE)).unwrap();
    let owners = std::fs::File::options()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .open(directory.join("owners"))
        .unwrap();
    let me = std::process::id().to_be_bytes();
    while object.next_missing(0, SIZE).unwrap().is_some() {
        let from = random.below(SIZE);
        let range = from..(from + random.below(4 * BLOCK)).min(SIZE);
        if let Claim::Got(claimed) = object.claim(&range).unwrap() {
            let blocks = claimed.range().start / BLOCK..claimed.range().end.div_ceil(BLOCK);
            for index in blocks.clone() {
                owners.write_all_at(&me, index * 4).unwrap();
            }
            for index in blocks.clone() {
                let range = block(index);
                if !object.is_present(&range).unwrap() {
                    let right = bytes(range.clone());
                    let mut there = vec![0; right.len()];
                    object.read_at(range.start, &mut there).unwrap();
                    if there != right {
                        // No reader has seen this block. One that was present before, and is not
                        // any more, may still be known to the reader for a second.
                        object.write_at(range.start, &vec![0xaa; right.len()]).unwrap();
                        std::thread::yield_now();
                    }
                    object.write_at(range.start, &right).unwrap();
                    made_a_step();
                    match object.mark_present(&range) {
                        Err(error) if error.kind() == host::ErrorKind::Busy => {}
                        marked => marked.unwrap(),
                    }
                }
            }
            for index in blocks {
                let mut owner = [0; 4];
                owners.read_exact_at(&mut owner, index * 4).unwrap();
                assert_eq!(owner, me, "block {index} is claimed by two processes");
            }
        }
        if random.below(4) == 0 {
            object.commit().unwrap();
        }
        made_a_step();
    }
}

/// Opens the object, and tests that what it got is what others get by the same name.
fn open_again_and_again(directory: &Path, random: &mut Random) {
    let content = bytes(0..SIZE);
    let cache = CacheDirectory::open(directory, None).unwrap();
    loop {
        let object = cache.object(&url(), &pin(SIZE)).unwrap();
        let range = block(random.below(48));
        if let Claim::Got(_claimed) = object.claim(&range).unwrap() {
            object
                .write_at(range.start, &content[range.start as usize..range.end as usize])
                .unwrap();
            object.mark_present(&range).unwrap();
        }
        made_a_step();
        let other = cache.find(&url(), &pin(SIZE)).unwrap().expect("is in use");
        assert_eq!(
            other.is_present(&range).unwrap(),
            object.is_present(&range).unwrap(),
            "two files of one name"
        );
        assert_eq!(wrong_blocks_of(&other, &content), 0, "wrong bytes");
        made_a_step();
    }
}

fn wrong_blocks_of(object: &CacheObject, content: &[u8]) -> usize {
    let (data, map) = object.files_for_reader().unwrap();
    wrong_blocks(&CacheReader::new(data, map, SIZE).unwrap(), content)
}

/// Number of blocks that are present and have wrong bytes.
fn wrong_blocks(reader: &CacheReader, content: &[u8]) -> usize {
    let is_wrong = |index: &u64| {
        let range = block(*index);
        let mut buf = vec![0; (range.end - range.start) as usize];
        reader.is_present(&range).unwrap()
            && reader.read_at(range.start, &mut buf).is_ok()
            && buf != content[range.start as usize..range.end as usize]
    };
    (0..SIZE.div_ceil(BLOCK)).filter(is_wrong).count()
}

/// Protects: fetchers that download the same file and are killed at any moment never leave a
/// present block with wrong bytes, never claim the same block twice, and leave no claim behind. In
/// half of the rounds a reader keeps the object in use, and looks at it all the time.
#[test]
fn fetchers_are_killed_at_any_moment() {
    let mut random = Random::new();
    let content = bytes(0..SIZE);
    for round in 0..4 {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("cache");
        let cache = CacheDirectory::open(&path, None).unwrap();
        let reader = (round % 2 == 0).then(|| {
            let object = cache.object(&url(), &pin(SIZE)).unwrap();
            let (data, map) = object.files_for_reader().unwrap();
            CacheReader::new(data, map, SIZE).unwrap()
        });
        let ended = AtomicBool::new(false);
        std::thread::scope(|scope| {
            let looking = reader.as_ref().map(|reader| {
                scope.spawn(|| {
                    let mut looks = 0;
                    loop {
                        assert_eq!(wrong_blocks(reader, &content), 0, "wrong bytes");
                        looks += 1;
                        if ended.load(Ordering::Acquire) {
                            return looks;
                        }
                    }
                })
            });
            let mut children: Vec<Killed> =
                (0..3).map(|_| Killed::start("fetch", &path, &mut random)).collect();
            for _ in 0..4 {
                let at = random.below(3) as usize;
                children[at].wait_for_steps(random.below(20));
                let new = Killed::start("fetch", &path, &mut random);
                drop(std::mem::replace(&mut children[at], new));
            }
            drop(children);
            ended.store(true, Ordering::Release);
            nothing_failed(&path);
            assert!(looking.is_none_or(|looking| looking.join().unwrap() > 0));
        });
        // Once while a reader keeps what is not durable, and once without one.
        let object = cache.object(&url(), &pin(SIZE)).unwrap();
        assert_eq!(wrong_blocks_of(&object, &content), 0, "wrong bytes");
        drop((object, reader));
        wait_for_release(&cache);
        let object = cache.object(&url(), &pin(SIZE)).unwrap();
        assert_eq!(wrong_blocks_of(&object, &content), 0, "wrong bytes");
        while let Some(missing) = object.next_missing(0, SIZE).unwrap() {
            let Claim::Got(claimed) = object.claim(&missing).unwrap() else {
                panic!("a lost claim")
            };
            object.write_at(missing.start, &bytes(missing.clone())).unwrap();
            object.mark_present(&claimed.range()).unwrap();
        }
        object.commit().unwrap();
        assert_eq!(wrong_blocks_of(&object, &content), 0, "wrong bytes");
        assert_eq!(cache.list().unwrap()[0].durable_bytes, SIZE);
    }
}

/// Protects: objects that are opened while other processes prune the cache, and are killed in the
/// middle of it, are whole: all processes that open one name at a time get the same files.
#[test]
fn objects_are_opened_while_others_prune() {
    let mut random = Random::new();
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("cache");
    let cache = CacheDirectory::open(&path, None).unwrap();
    let roles = ["open", "open", "prune", "prune"];
    let mut children = roles.map(|role| Killed::start(role, &path, &mut random));
    for round in 0..16 {
        let at = round % roles.len();
        children[at].wait_for_steps(random.below(40));
        let new = Killed::start(roles[at], &path, &mut random);
        drop(std::mem::replace(&mut children[at], new));
    }
    drop(children);
    nothing_failed(&path);
    let object = cache.object(&url(), &pin(SIZE)).unwrap();
    assert_eq!(wrong_blocks_of(&object, &bytes(0..SIZE)), 0, "wrong bytes");
    assert_eq!(cache.prune(0).unwrap().objects, 0, "in use");
    drop(object);
    wait_for_release(&cache);
    cache.prune(0).unwrap();
    assert_eq!(std::fs::read_dir(&path).unwrap().count(), 0);
}
