//! Tests of a remote file, with a fetcher on a thread that fills a file of the cache.

use std::os::fd::AsFd;
use std::sync::mpsc::{Receiver, channel};

use parking_lot::Mutex;

use super::*;
use crate::cache::{BLOCK, CacheObject, Claim};
use crate::pin::Validator;
use crate::wire::LONGEST;
use host::packet;

const SIZE: u64 = 40 * BLOCK + 100;

/// A test that hangs fails after this time.
const HANGS: Duration = Duration::from_secs(60);

fn content(range: Range<u64>) -> Vec<u8> {
    range.map(|at| (at / 251 + at % 241) as u8 | 1).collect()
}

fn pin(digest: Option<&str>) -> Pin {
    let validator = Validator::Etag("\"1\"".into());
    Pin { size: SIZE, validator, digest: digest.map(str::to_owned) }
}

/// Brings a range into the cache.
fn fill(cache: &CacheObject, range: &Range<u64>) {
    if let Claim::Got(claim) = cache.claim(range).unwrap() {
        let range = claim.range();
        cache.write_at(range.start, &content(range.clone())).unwrap();
        cache.mark_present(&range).unwrap();
    }
}

/// What a fetcher does with a wanted range before it says that the range is there.
type Brings = Arc<dyn Fn(&CacheObject, &Range<u64>) + Send + Sync>;

/// The other end of the line: opens each file as the next of `caches`, which it keeps.
struct Fake {
    caches: Receiver<CacheObject>,
    wanted: std::sync::mpsc::Sender<Range<u64>>,
    done: std::sync::mpsc::Sender<Range<u64>>,
    brings: Brings,
}

impl Fake {
    fn serve(&self, socket: &OwnedFd, ends_after: Option<u32>) {
        let (mut cache, mut wants) = (None, 0);
        while let Ok(Some((request, _))) = packet::receive::<FetchRequest>(socket, LONGEST) {
            match request {
                FetchRequest::Open { id, digest, .. } => {
                    let opened = self.caches.recv().unwrap();
                    let (data, map) = opened.files_for_reader().unwrap();
                    let reply = FetchReply::Opened { id, pin: pin(digest.as_deref()) };
                    packet::send(socket, &reply, LONGEST, &[data.as_fd(), map.as_fd()]).unwrap();
                    cache = Some(opened);
                }
                FetchRequest::Want { id, offset, len, .. } => {
                    wants += 1;
                    if ends_after.is_some_and(|most| wants > most) {
                        return;
                    }
                    let range = offset..offset + len;
                    (self.brings)(cache.as_ref().expect("no file is open"), &range);
                    let _ = self.wanted.send(range);
                    packet::send(socket, &FetchReply::Have { id }, LONGEST, &[]).unwrap();
                }
                FetchRequest::Done { offset, len, .. } => {
                    let range = offset..offset + len;
                    cache.as_ref().expect("no file is open").punch(&range).unwrap();
                    let _ = self.done.send(range);
                }
                _ => {}
            }
        }
    }
}

struct RemoteBench {
    file: RemoteFile,
    caches: Vec<CacheObject>,
    wanted: Receiver<Range<u64>>,
    done: Receiver<Range<u64>>,
    _dir: tempfile::TempDir,
}

/// Opens a file over fetchers of which each ends with the want after `ends_after`. Each fetcher has
/// a file of the cache of its own.
fn bench(digest: Option<&str>, ends_after: Option<u32>, brings: Brings) -> RemoteBench {
    let dir = tempfile::tempdir().unwrap();
    let caches: Vec<_> =
        (0..2).map(|_| CacheObject::anonymous(dir.path(), SIZE).unwrap()).collect();
    let (give, taken) = channel();
    caches.iter().for_each(|cache| give.send(cache.clone()).unwrap());
    let ((told, wanted), (told_done, done)) = (channel(), channel());
    let fake = Fake { caches: taken, wanted: told, done: told_done, brings };
    let fake = Arc::new(Mutex::new(fake));
    let line = Arc::new(FetcherLine::new(Box::new(move || {
        let (near, far) = host::packet::pair().unwrap();
        let fake = Arc::clone(&fake);
        std::thread::spawn(move || fake.lock().serve(&far, ends_after));
        Ok(near.into())
    })));
    let name = SourceUrl::parse("s3://golden/base.raw").unwrap();
    let digest = digest.map(str::to_owned);
    let options = RemoteOptions { patience: Some(HANGS), unpinned: false, digest };
    let file = RemoteFile::open(&line, &name, None, &options).unwrap();
    RemoteBench { file, caches, wanted, done, _dir: dir }
}

impl RemoteBench {
    fn assert_reads(&self, range: Range<u64>) {
        let mut bytes = vec![0; (range.end - range.start) as usize];
        self.file.read_at(range.start, &mut bytes).unwrap();
        assert!(bytes == content(range.clone()), "the bytes of {range:?} are wrong");
    }

    /// The ranges that the fetcher was asked for since the last call.
    fn wanted(&self) -> Vec<Range<u64>> {
        self.wanted.try_iter().collect()
    }
}

#[test]
fn reads_bring_in_what_is_missing_and_are_zero_beyond_the_end() {
    let bench = bench(None, None, Arc::new(fill));
    bench.assert_reads(10..BLOCK + 10);
    assert_eq!(bench.wanted().len(), 1);
    bench.assert_reads(0..2 * BLOCK);
    assert_eq!(bench.wanted().len(), 0, "present blocks are asked for");
    let mut end = vec![1; 300];
    bench.file.read_at(SIZE - 100, &mut end).unwrap();
    assert!(end[..100] == content(SIZE - 100..SIZE) && end[100..].iter().all(|byte| *byte == 0));
    bench.file.bring_in(SIZE, 10).unwrap();
}

/// Protects: blocks that were punched, or lost by a failed write-back, are never read as zeros.
#[test]
fn blocks_that_have_gone_are_brought_in_again() {
    let bench = bench(None, None, Arc::new(fill));
    bench.assert_reads(0..4 * BLOCK);
    let mut bytes = vec![0; BLOCK as usize];
    assert!(bench.file.read_cached(BLOCK, &mut bytes));
    assert!(bytes == content(BLOCK..2 * BLOCK));
    assert!(bench.caches[0].punch(&(BLOCK..2 * BLOCK)).unwrap());
    assert!(!bench.file.read_cached(BLOCK, &mut bytes), "zeros of a hole");
    bench.wanted();
    bench.assert_reads(0..4 * BLOCK);
    assert_eq!(bench.wanted().len(), 1);
    assert!(bench.caches[0].punch(&(0..2 * BLOCK)).unwrap());
    // Without a try of `read_cached` before it.
    bench.assert_reads(0..2 * BLOCK);
}

/// Protects: `--cache none` frees what is in the overlay, and a read of it gets the same bytes.
#[test]
fn what_is_in_the_overlay_leaves_a_cache_that_keeps_nothing() {
    let bench = bench(None, None, Arc::new(fill));
    bench.assert_reads(0..4 * BLOCK);
    bench.file.done(0, 2 * BLOCK);
    bench.file.done(SIZE - 100, BLOCK);
    assert_eq!(bench.done.recv_timeout(HANGS), Ok(0..2 * BLOCK));
    assert_eq!(bench.done.recv_timeout(HANGS), Ok(SIZE - 100..SIZE));
    assert_eq!(bench.caches[0].present_bytes().unwrap(), 2 * BLOCK);
    let mut bytes = [0; 10];
    assert!(!bench.file.read_cached(0, &mut bytes));
    bench.assert_reads(0..4 * BLOCK);
    // Beyond the end there is nothing to free.
    bench.file.done(SIZE, BLOCK);
    assert!(bench.done.try_recv().is_err());
}

/// Protects: a new fetcher that keeps nothing has an empty file, which takes the place of the old.
#[test]
fn a_new_fetcher_with_another_file_fills_that() {
    let bench = bench(None, Some(1), Arc::new(fill));
    bench.assert_reads(0..BLOCK);
    bench.assert_reads(8 * BLOCK..9 * BLOCK);
    assert!(bench.caches[1].is_present(&(8 * BLOCK..9 * BLOCK)).unwrap());
    assert!(!bench.caches[0].is_present(&(8 * BLOCK..9 * BLOCK)).unwrap());
}

/// Protects: a fetcher that says "have" and has nothing ends in an error, not in a busy loop.
#[test]
fn a_fetcher_that_lies_is_an_error() {
    let bench = bench(None, None, Arc::new(|_, _| {}));
    let error = bench.file.read_at(0, &mut [0; 10]).unwrap_err();
    assert!(error.to_string().contains("has not what the fetcher says"), "{error}");
    assert_eq!(bench.wanted().len() as u32, TURNS);
}

/// Protects: what lies in the cache since earlier is not used before the fetcher has compared it
/// with the chunk list, neither bytes nor holes.
#[test]
fn chunks_are_used_when_the_fetcher_has_compared_them() {
    let bench = bench(Some(&"0".repeat(64)), None, Arc::new(fill));
    let hole = 16 * BLOCK..24 * BLOCK;
    {
        let cache = &bench.caches[0];
        fill(cache, &(0..BLOCK));
        let Claim::Got(_claim) = cache.claim(&hole).unwrap() else { panic!("no claim") };
        cache.mark_zero(&hole).unwrap();
    }
    let mut bytes = [0; 10];
    assert!(!bench.file.read_cached(0, &mut bytes));
    let (status, _) = bench.file.status(hole.start, BLOCK).unwrap();
    assert_eq!(status, BlockStatus::Data);
    bench.assert_reads(0..BLOCK);
    bench.file.bring_in(hole.start, 1).unwrap();
    assert_eq!(bench.wanted().len(), 2);
    assert!(bench.file.read_cached(0, &mut bytes));
    let (status, len) = bench.file.status(hole.start, BLOCK).unwrap();
    assert_eq!((status, len), (BlockStatus::Hole, BLOCK));
}
