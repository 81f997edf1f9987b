//! Tests with a server in memory, which fails, stalls and lies as a test says.

use std::collections::VecDeque;
use std::fmt;

use crossbeam_channel::{Receiver, unbounded};

use host::storage::BlockStatus;
use remote::cache::CacheDirectory;
use remote::pin::Validator;
use remote::url::SourceUrl;

use remote::cache::Claim;

use super::*;
use crate::source::{Retry, Sink, SourceError};

const MIB: u64 = 1 << 20;

/// A test that hangs fails after this time.
const HANGS: Duration = Duration::from_secs(60);

/// What the server does with one request.
type Act = Box<
    dyn FnOnce(&MemorySource, &Range<u64>, &mut Sink<'_>) -> Result<(), SourceError> + Send + Sync,
>;

/// A server in memory. Each request takes the next act; without one it is answered rightly.
#[derive(Default)]
struct MemorySource {
    acts: Mutex<VecDeque<Act>>,
    requests: Mutex<Vec<Range<u64>>>,
    refreshes: Mutex<u32>,
    hole: Option<Range<u64>>,
    /// Says that a question for holes has come, and answers when it is told to.
    answers_late: Option<(Sender<()>, Mutex<Receiver<()>>)>,
    /// A byte at this place is wrong in each answer.
    lie: Option<u64>,
}

impl fmt::Debug for MemorySource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("MemorySource")
    }
}

/// The content of the file.
fn content(range: Range<u64>) -> Vec<u8> {
    range.map(|at| (at / 251 + at % 241) as u8 | 1).collect()
}

impl MemorySource {
    /// Sends a range in pieces of an odd size.
    fn send(&self, range: Range<u64>, sink: &mut Sink<'_>) -> Result<(), SourceError> {
        let mut bytes = content(range.clone());
        if let Some(lie) = self.lie.filter(|lie| range.contains(lie)) {
            bytes[(lie - range.start) as usize] ^= 1;
        }
        for piece in bytes.chunks(100_001) {
            sink(piece).map_err(|error| {
                SourceError::new(Retry::Local(std::io::Error::other("sink")), error.to_string())
            })?;
        }
        Ok(())
    }

    fn requests(&self) -> Vec<Range<u64>> {
        self.requests.lock().clone()
    }
}

impl RemoteSource for MemorySource {
    fn look(&self) -> Result<Pin, SourceError> {
        Err(SourceError::new(Retry::Never, "not asked in these tests"))
    }

    fn read(&self, _: &Pin, range: Range<u64>, sink: &mut Sink<'_>) -> Result<(), SourceError> {
        self.requests.lock().push(range.clone());
        let act = self.acts.lock().pop_front();
        match act {
            Some(act) => act(self, &range, sink),
            None => self.send(range, sink),
        }
    }

    /// One run of each answer is cut off, as a server with many of them does.
    fn status(
        &self,
        _: &Pin,
        offset: u64,
        max: u64,
    ) -> Result<Vec<(BlockStatus, u64)>, SourceError> {
        if let Some((begun, may_end)) = &self.answers_late {
            let _ = begun.send(());
            let _ = may_end.lock().recv();
        }
        let hole = self.hole.clone().unwrap_or(0..0);
        Ok(match offset {
            at if hole.contains(&at) => vec![(BlockStatus::Hole, max.min(hole.end - at))],
            at if at < hole.start && hole.end < at + max => vec![
                (BlockStatus::Data, hole.start - at),
                (BlockStatus::Hole, (hole.end - hole.start) / 2),
                (BlockStatus::Hole, (hole.end - hole.start) / 4),
            ],
            at if at < hole.start => vec![(BlockStatus::Data, max.min(hole.start - at))],
            _ => vec![(BlockStatus::Data, max)],
        })
    }

    fn refresh(&self) -> Result<(), SourceError> {
        *self.refreshes.lock() += 1;
        Ok(())
    }
}

fn fails(retry: impl FnOnce() -> Retry + Send + Sync + 'static) -> Act {
    Box::new(|_, _, _| Err(SourceError::new(retry(), "fails as the test says")))
}

/// Sends so many bytes and ends.
fn cut(len: u64) -> Act {
    Box::new(move |source, range, sink| {
        source.send(range.start..range.start + len, sink)?;
        Err(SourceError::new(Retry::LATER, "cut as the test says"))
    })
}

/// Sends the bytes up to each of the offsets; stops there, says so, and waits for the gate.
fn stops_at(offsets: Vec<u64>) -> (Act, Receiver<u64>, Sender<()>) {
    let (say, stopped) = unbounded();
    let (gate, open) = unbounded();
    let act: Act = Box::new(move |source, range, sink| {
        let mut at = range.start;
        for offset in offsets {
            let offset = offset.clamp(at, range.end);
            source.send(at..offset, sink)?;
            at = offset;
            let _ = say.send(at);
            let _ = open.recv();
        }
        source.send(at..range.end, sink)
    });
    (act, stopped, gate)
}

fn pin(size: u64) -> Pin {
    Pin { size, validator: Validator::Etag("\"1\"".into()), digest: None }
}

struct Bench {
    source: Arc<MemorySource>,
    cache: CacheObject,
    download: Arc<Download>,
    replies: Receiver<FetchReply>,
    dir: Arc<tempfile::TempDir>,
}

impl Bench {
    fn new(size: u64, source: MemorySource) -> Bench {
        Bench::of(size, source, None, &Arc::new(tempfile::tempdir().unwrap()))
    }

    fn of(
        size: u64,
        source: MemorySource,
        sums: Option<ChunkList>,
        dir: &Arc<tempfile::TempDir>,
    ) -> Bench {
        let directory = CacheDirectory::open(&dir.path().join("cache"), None).unwrap();
        let url = SourceUrl::parse("s3://golden/base.raw").unwrap();
        let cache = directory.object(&url, &pin(size)).unwrap();
        Bench::with(cache, source, sums, dir)
    }

    /// As `--cache none` has it.
    fn that_keeps_nothing(size: u64, source: MemorySource) -> Bench {
        let dir = Arc::new(tempfile::tempdir().unwrap());
        Bench::with(CacheObject::anonymous(dir.path(), size).unwrap(), source, None, &dir)
    }

    fn with(
        cache: CacheObject,
        source: MemorySource,
        sums: Option<ChunkList>,
        dir: &Arc<tempfile::TempDir>,
    ) -> Bench {
        let source = Arc::new(source);
        let (sender, replies) = unbounded();
        let parts = DownloadParts {
            name: "base.raw".into(),
            source: Arc::clone(&source) as Arc<dyn RemoteSource>,
            pin: pin(cache.size()),
            cache: cache.clone(),
            sums,
            keeps_nothing: true,
            patience: Some(HANGS),
            make_space: Box::new(|_| Ok(false)),
        };
        let download = Download::with_idle(parts, sender, Duration::from_millis(20));
        Bench { source, cache, download, replies, dir: Arc::clone(dir) }
    }

    fn act(&self, act: Act) {
        self.source.acts.lock().push_back(act);
    }

    fn want(&self, id: u64, range: Range<u64>) {
        self.download.want(id, range, Some(HANGS), false);
    }

    /// The next reply: the number, and the failure.
    fn reply(&self) -> (u64, Option<FetchFailure>) {
        match self.replies.recv_timeout(HANGS).expect("no reply") {
            FetchReply::Have { id } => (id, None),
            FetchReply::Failed { id, failure } => (id, Some(failure)),
            other => panic!("{other:?}"),
        }
    }

    fn assert_have(&self, id: u64) {
        let (replied, failure) = self.reply();
        assert!(failure.is_none() && replied == id, "{replied} instead of {id}: {failure:?}");
    }

    fn assert_failed(&self, id: u64, kind: ErrorKind, text: &str) {
        let (replied, failure) = self.reply();
        let failure = failure.expect("has not failed");
        assert_eq!((replied, failure.kind), (id, kind), "{failure:?}");
        assert!(failure.text.contains(text), "{failure:?}");
    }

    fn assert_one_request(&self, range: Range<u64>) {
        let requests = self.source.requests();
        assert!(requests.len() == 1 && requests[0] == range, "{requests:?}");
    }

    fn assert_content(&self, range: Range<u64>) {
        assert!(self.cache.is_present(&range).unwrap(), "{range:?}");
        let mut bytes = vec![0; (range.end - range.start) as usize];
        self.cache.read_at(range.start, &mut bytes).unwrap();
        assert!(bytes == content(range.clone()), "the bytes of {range:?} are wrong");
    }
}

#[test]
fn requests_are_answered_as_their_bytes_arrive() {
    let bench = Bench::new(16 * MIB, MemorySource::default());
    let (act, stopped, gate) = stops_at(vec![256 << 10, 600 << 10]);
    bench.act(act);
    bench.want(7, 0..MIB);
    assert_eq!(stopped.recv_timeout(HANGS), Ok(256 << 10));
    bench.want(8, 64 << 10..128 << 10);
    bench.assert_have(8);
    bench.want(9, 512 << 10..(512 << 10) + 4096);
    gate.send(()).unwrap();
    bench.assert_have(9);
    assert_eq!(stopped.recv_timeout(HANGS), Ok(600 << 10));
    gate.send(()).unwrap();
    bench.assert_have(7);
    bench.assert_content(0..MIB);
    bench.assert_one_request(0..MIB);
}

#[test]
fn what_lies_beyond_the_end_is_there() {
    let size = 3 * BLOCK + 100;
    let bench = Bench::new(size, MemorySource::default());
    bench.want(1, size..size + 4096);
    bench.assert_have(1);
    assert_eq!(bench.source.requests(), []);
    bench.want(2, 3 * BLOCK..size + 4096);
    bench.assert_have(2);
    bench.assert_content(3 * BLOCK..size);
}

#[test]
fn neighbours_in_the_queue_are_fetched_together() {
    let bench = Bench::new(64 * MIB, MemorySource::default());
    let mut state = bench.download.state.lock();
    for range in [0..BLOCK, 4 * BLOCK..5 * BLOCK, BLOCK..2 * BLOCK, 2 * BLOCK..LARGEST + BLOCK] {
        state.queue(range, false);
    }
    let first = Taken::Range(Need::Soon, 0..2 * BLOCK);
    assert_eq!(state.take_urgent(), first, "the third one would be too long");
    assert_eq!(state.take_urgent(), Taken::Range(Need::Soon, 4 * BLOCK..5 * BLOCK));
}

#[test]
fn two_fetchers_of_a_host_fetch_each_block_once() {
    let dir = Arc::new(tempfile::tempdir().unwrap());
    let one = Bench::of(16 * MIB, MemorySource::default(), None, &dir);
    let two = Bench::of(16 * MIB, MemorySource::default(), None, &dir);
    let (act, stopped, gate) = stops_at(vec![256 << 10]);
    one.act(act);
    one.want(1, 0..MIB);
    assert_eq!(stopped.recv_timeout(HANGS), Ok(256 << 10));
    two.want(2, 0..MIB);
    two.want(3, 0..128 << 10);
    two.assert_have(3);
    gate.send(()).unwrap();
    one.assert_have(1);
    two.assert_have(2);
    two.assert_content(0..MIB);
    one.assert_one_request(0..MIB);
    assert_eq!(two.source.requests(), []);
}

/// Protects: another fetcher takes over what this one could not fetch, also while this one waits.
#[test]
fn no_claim_is_held_while_a_worker_rests() {
    let dir = Arc::new(tempfile::tempdir().unwrap());
    let one = Bench::of(16 * MIB, MemorySource::default(), None, &dir);
    let two = Bench::of(16 * MIB, MemorySource::default(), None, &dir);
    let (failed, has_failed) = unbounded();
    one.act(Box::new(move |_, _, _| {
        let _ = failed.send(());
        let retry = Retry::Later { after: Some(HANGS / 2), slow_down: false };
        Err(SourceError::new(retry, "come back later"))
    }));
    one.want(1, 0..BLOCK);
    has_failed.recv_timeout(HANGS).unwrap();
    two.want(2, 0..BLOCK);
    two.assert_have(2);
    two.assert_one_request(0..2 * BLOCK);
    two.assert_content(0..BLOCK);
}

#[test]
fn errors_are_sorted() {
    let bench = Bench::new(64 * MIB, MemorySource::default());
    for (id, retry, kind, text) in [
        (1, Retry::Never, ErrorKind::Io, "base.raw: fails as the test says"),
        (2, Retry::Changed, ErrorKind::Corrupt, "is not the file that the disk was made with"),
        (
            3,
            Retry::Later { after: Some(HANGS * 2), slow_down: false },
            ErrorKind::Io,
            "after 1 tries",
        ),
    ] {
        bench.act(fails(|| retry));
        bench.want(id, id * MIB..id * MIB + 4096);
        bench.assert_failed(id, kind, text);
        assert_eq!(bench.source.requests().len() as u64, id, "{text}");
    }
    for (id, retry) in [(4, Retry::AtOnce), (5, Retry::LATER), (6, Retry::LATER)] {
        bench.act(fails(|| retry));
        bench.want(id, id * MIB..id * MIB + 4096);
        bench.assert_have(id);
        bench.assert_content(id * MIB..id * MIB + 4096);
    }
    assert_eq!(bench.source.requests().len(), 3 + 2 * 3);
    let facts = bench.download.facts();
    assert_eq!((facts.requests, facts.retries, facts.up), (9, 3, true));
    assert!(facts.last_error.is_some());
}

#[test]
fn tries_end_before_the_deadline() {
    let bench = Bench::new(16 * MIB, MemorySource::default());
    for _ in 0..10_000 {
        bench.act(fails(|| Retry::LATER));
    }
    bench.download.want(1, 0..4096, Some(Duration::from_secs(2)), false);
    let (id, failure) = bench.reply();
    assert_eq!((id, failure.map(|failure| failure.kind)), (1, Some(ErrorKind::Io)));
    let requests = bench.source.requests().len();
    assert!((2..100).contains(&requests), "{requests} requests");
    assert!(!bench.download.facts().up);
}

/// Protects: while the part is on its way with which a server is tried that was away, other ranges
/// are fetched.
#[test]
fn a_server_that_is_back_serves_other_ranges_at_once() {
    let bench = Bench::new(64 * MIB, MemorySource::default());
    for _ in 0..3 {
        bench.act(fails(|| Retry::LATER));
    }
    let (act, stopped, gate) = stops_at(vec![BLOCK]);
    bench.act(act);
    bench.want(1, 0..MIB);
    assert_eq!(stopped.recv_timeout(HANGS), Ok(BLOCK));
    bench.want(2, 32 * MIB..33 * MIB);
    bench.assert_have(2);
    gate.send(()).unwrap();
    bench.assert_have(1);
    assert!(bench.download.facts().up);
}

/// Protects: workers without work end, and others start when there is some.
#[test]
fn workers_without_work_end() {
    let bench = Bench::new(64 * MIB, MemorySource::default());
    let alive = || {
        let mut state = bench.download.state.lock();
        [Queue::Urgent, Queue::Ahead].map(|queue| {
            let workers = state.workers(queue);
            assert!(workers.idle <= workers.alive);
            workers.alive
        })
    };
    for round in 0..4 {
        let at = round * 16 * MIB;
        bench.download.will_need(at, MIB, Need::Later);
        bench.want(round, at..at + 2 * MIB);
        bench.assert_have(round);
        bench.assert_content(at..at + 2 * MIB);
        let begun = Instant::now();
        while alive() != [0, 0] {
            assert!(begun.elapsed() < HANGS, "{:?} workers", alive());
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}

/// Protects: a server that stalls delays no request past its deadline, and the bytes are used when
/// they come all the same.
#[test]
fn a_request_is_answered_at_its_deadline_while_the_server_stalls() {
    let bench = Bench::new(16 * MIB, MemorySource::default());
    let (act, stopped, gate) = stops_at(vec![0]);
    bench.act(act);
    bench.download.want(1, 0..4096, None, false);
    stopped.recv_timeout(HANGS).unwrap();
    bench.want(2, 0..4096);
    bench.download.want(3, 0..4096, Some(Duration::from_millis(50)), false);
    bench.assert_failed(3, ErrorKind::Io, "does not answer in time");
    gate.send(()).unwrap();
    bench.assert_have(1);
    bench.assert_have(2);
}

/// Protects: answers that are cut again and again, and bring bytes each time, are no failure.
#[test]
fn an_answer_that_is_cut_goes_on_where_it_ended() {
    let bench = Bench::new(16 * MIB, MemorySource::default());
    for _ in 0..12 {
        bench.act(cut(BLOCK + 5));
    }
    bench.want(1, 0..MIB);
    bench.assert_have(1);
    bench.assert_content(0..MIB);
    let wanted: Vec<_> = (0..13).map(|step| step * BLOCK..MIB).collect();
    assert_eq!(bench.source.requests(), wanted);
    assert!(bench.download.facts().up);
}

#[test]
fn credentials_are_read_again_once() {
    let bench = Bench::new(16 * MIB, MemorySource::default());
    bench.act(fails(|| Retry::Credentials));
    bench.want(1, 0..4096);
    bench.assert_have(1);
    assert_eq!(*bench.source.refreshes.lock(), 1);
    bench.act(fails(|| Retry::Credentials));
    bench.act(fails(|| Retry::Credentials));
    bench.want(2, 8 * MIB..8 * MIB + 4096);
    bench.assert_failed(2, ErrorKind::Io, "fails as the test says");
    assert_eq!(*bench.source.refreshes.lock(), 2);
}

/// Protects: damaged bytes are never present, and harm no request for other bytes.
#[test]
fn a_damaged_chunk_is_fetched_twice_and_never_present() {
    let size = 3 * MIB;
    let sums = ChunkList::make(&mut &content(0..size)[..], size).unwrap();
    let source = MemorySource { lie: Some(MIB + 12_345), ..MemorySource::default() };
    let dir = Arc::new(tempfile::tempdir().unwrap());
    let bench = Bench::of(size, source, Some(sums), &dir);
    let (act, stopped, gate) = stops_at(vec![0]);
    bench.act(act);
    bench.want(1, 0..size);
    stopped.recv_timeout(HANGS).unwrap();
    bench.want(2, 0..MIB);
    bench.want(3, MIB..MIB + 4096);
    bench.want(4, 2 * MIB..3 * MIB);
    gate.send(()).unwrap();
    bench.assert_have(2);
    bench.assert_failed(1, ErrorKind::Io, "chunk 1 ");
    bench.assert_failed(3, ErrorKind::Io, "chunk 1 ");
    bench.assert_have(4);
    bench.assert_content(0..MIB);
    bench.assert_content(2 * MIB..size);
    assert_eq!(bench.cache.next_missing(MIB, MIB).unwrap(), Some(MIB..2 * MIB));
    assert_eq!(bench.source.requests(), [0..size, MIB..size, 2 * MIB..size]);
}

/// Protects: bytes that were damaged in the cache after they were written are fetched again.
#[test]
fn a_chunk_that_is_damaged_in_the_cache_is_fetched_again() {
    let size = 2 * MIB;
    let sums = ChunkList::make(&mut &content(0..size)[..], size).unwrap();
    let dir = Arc::new(tempfile::tempdir().unwrap());
    let bench = Bench::of(size, MemorySource::default(), Some(sums), &dir);
    for (chunk, flip) in [(0, 1), (1, 0)] {
        let range = chunk * MIB..(chunk + 1) * MIB;
        let Claim::Got(_claim) = bench.cache.claim(&range).unwrap() else { panic!("no claim") };
        let mut bytes = content(range.clone());
        bytes[777] ^= flip;
        bench.cache.write_at(range.start, &bytes).unwrap();
        bench.cache.mark_present(&range).unwrap();
    }
    bench.want(1, 0..size);
    bench.assert_have(1);
    bench.assert_content(0..size);
    bench.assert_one_request(0..MIB);
}

/// Protects: the chunk list decides what is zero, not the server.
#[test]
fn a_server_that_invents_zeros_is_not_believed_if_there_is_a_chunk_list() {
    let size = 8 * MIB;
    let sums = ChunkList::make(&mut &content(0..size)[..], size).unwrap();
    let source = MemorySource { hole: Some(0..size), ..MemorySource::default() };
    let dir = Arc::new(tempfile::tempdir().unwrap());
    let bench = Bench::of(size, source, Some(sums), &dir);
    let (act, stopped, gate) = stops_at(vec![0]);
    bench.act(act);
    bench.download.will_need(0, size, Need::Later);
    stopped.recv_timeout(HANGS).unwrap();
    bench.want(1, 0..size);
    gate.send(()).unwrap();
    bench.assert_have(1);
    bench.assert_content(0..size);
}

#[test]
fn zeros_are_not_read_and_what_is_on_its_way_is_not_asked_for_again() {
    let source = MemorySource { hole: Some(MIB..3 * MIB), ..MemorySource::default() };
    let bench = Bench::new(8 * MIB, source);
    let (act, stopped, gate) = stops_at(vec![BLOCK]);
    bench.act(act);
    bench.download.will_need(0, 8 * MIB, Need::Later);
    assert_eq!(stopped.recv_timeout(HANGS), Ok(BLOCK));
    bench.want(1, 0..8 * MIB);
    gate.send(()).unwrap();
    bench.assert_have(1);
    assert_eq!(bench.source.requests(), [0..MIB, 3 * MIB..8 * MIB]);
    bench.assert_content(0..MIB);
    bench.assert_content(3 * MIB..8 * MIB);
    let mut zeros = vec![1; 2 << 20];
    bench.cache.read_at(MIB, &mut zeros).unwrap();
    assert!(zeros.iter().all(|byte| *byte == 0));
}

/// Protects: workers do not read the zeros about which another worker is asking the server.
#[test]
fn zeros_are_not_read_while_the_server_is_asked_for_them() {
    let (begun, has_begun) = unbounded();
    let (gate, may_end) = unbounded();
    let answers_late = Some((begun, Mutex::new(may_end)));
    let source =
        MemorySource { hole: Some(PART..3 * PART), answers_late, ..MemorySource::default() };
    let bench = Bench::new(4 * PART, source);
    assert!(bench.download.state.lock().slots.limit() >= 4, "a worker for each part");
    bench.download.will_need(0, 4 * PART, Need::Later);
    has_begun.recv_timeout(HANGS).unwrap();
    while bench.download.state.lock().active.len() < 4 {
        std::thread::yield_now();
    }
    bench.want(1, 0..4 * PART);
    drop(gate);
    bench.assert_have(1);
    let mut requests = bench.source.requests();
    requests.sort_by_key(|range| range.start);
    assert_eq!(requests, [0..PART, 3 * PART..4 * PART]);
    bench.assert_content(3 * PART..4 * PART);
}

/// Protects: after a server has asked for less, all parts still come.
#[test]
fn a_server_that_asks_for_less_gets_fewer_requests() {
    let bench = Bench::new(6 * PART, MemorySource::default());
    for _ in 0..4 {
        bench.act(fails(|| Retry::Later { after: None, slow_down: true }));
    }
    bench.download.will_need(0, 6 * PART, Need::Later);
    bench.want(1, 5 * PART..6 * PART);
    bench.assert_have(1);
    bench.want(2, 0..6 * PART);
    bench.assert_have(2);
    assert!(bench.download.state.lock().slots.limit() <= 2);
    bench.assert_content(3 * PART - 10..3 * PART + 10);
}

/// Protects: bytes that were written while write-back failed are not trusted.
#[test]
fn a_range_is_fetched_again_if_write_back_fails_meanwhile() {
    /// Where the map file counts the failures (`remote::cache`), 64 bits in big-endian order.
    const LOST: u64 = 72;
    let bench = Bench::new(16 * MIB, MemorySource::default());
    let (act, stopped, gate) = stops_at(vec![0]);
    bench.act(act);
    bench.want(1, 0..BLOCK);
    stopped.recv_timeout(HANGS).unwrap();
    let entries = std::fs::read_dir(bench.dir.path().join("cache")).unwrap();
    let map = entries
        .map(|entry| entry.unwrap().path())
        .find(|path| path.extension().is_some_and(|extension| extension == "map"))
        .expect("no map");
    let map = std::fs::File::options().write(true).open(map).unwrap();
    std::os::unix::fs::FileExt::write_all_at(&map, &1_u64.to_be_bytes(), LOST).unwrap();
    gate.send(()).unwrap();
    bench.assert_have(1);
    bench.assert_content(0..BLOCK);
    assert_eq!(bench.source.requests(), [0..2 * BLOCK, 0..2 * BLOCK]);
}

#[test]
fn what_is_needed_no_more_is_not_begun() {
    let bench = Bench::new(10 * PART, MemorySource::default());
    let begun = bench.download.state.lock().slots.limit() as u64;
    let stops: Vec<_> = (0..begun)
        .map(|_| {
            let (act, stopped, gate) = stops_at(vec![0]);
            bench.act(act);
            (stopped, gate)
        })
        .collect();
    bench.download.will_need(0, 10 * PART, Need::Later);
    for (stopped, _) in &stops {
        stopped.recv_timeout(HANGS).unwrap();
    }
    bench.download.enough();
    for (_, gate) in &stops {
        gate.send(()).unwrap();
    }
    bench.want(1, 0..begun * PART);
    bench.assert_have(1);
    assert_eq!(bench.source.requests().len() as u64, begun);
    // The workers take up the next window.
    bench.download.will_need(8 * PART, 2 * PART, Need::Later);
    bench.want(2, 8 * PART..10 * PART);
    bench.assert_have(2);
    bench.assert_content(9 * PART - 10..9 * PART + 10);
}

/// Protects: what is in the overlay is freed, also if a request in flight holds it at first.
#[test]
fn what_is_in_the_overlay_is_freed_when_no_request_holds_it() {
    let bench = Bench::that_keeps_nothing(16 * MIB, MemorySource::default());
    let (act, stopped, gate) = stops_at(vec![256 << 10]);
    bench.act(act);
    bench.want(1, 0..MIB);
    stopped.recv_timeout(HANGS).unwrap();
    bench.want(2, 0..128 << 10);
    bench.assert_have(2);
    bench.download.done(0, 128 << 10);
    assert!(bench.cache.is_present(&(0..128 << 10)).unwrap(), "it is claimed");
    gate.send(()).unwrap();
    bench.assert_have(1);
    // The worker frees the range after it has answered; the next request is not held up by it.
    let begun = Instant::now();
    while bench.cache.present_bytes().unwrap() != MIB - (128 << 10) {
        assert!(begun.elapsed() < HANGS, "is not freed");
        std::thread::yield_now();
    }
    bench.download.done(MIB / 2, MIB / 2);
    assert_eq!(bench.cache.present_bytes().unwrap(), MIB / 2 - (128 << 10));
    bench.want(3, 0..MIB);
    bench.assert_have(3);
    bench.assert_content(0..MIB);
}

/// Protects: what a guest waits for overtakes what a stream waits for, and the stream is answered
/// all the same, also after everything that will be needed was taken back.
#[test]
fn a_guest_overtakes_a_stream_that_waits() {
    let bench = Bench::new(64 * MIB, MemorySource::default());
    let limit = bench.download.state.lock().slots.limit() as u64;
    let stops: Vec<_> = (0..limit)
        .map(|_| {
            let (act, stopped, gate) = stops_at(vec![0]);
            bench.act(act);
            (stopped, gate)
        })
        .collect();
    bench.download.will_need(0, limit * PART, Need::Later);
    for (stopped, _) in &stops {
        stopped.recv_timeout(HANGS).unwrap();
    }
    // All workers of the stream are busy.
    bench.download.want(1, 50 * MIB..50 * MIB + BLOCK, Some(HANGS), true);
    bench.download.want(2, 60 * MIB..60 * MIB + BLOCK, Some(HANGS), true);
    bench.want(3, 60 * MIB..60 * MIB + BLOCK);
    let mut replies = [bench.reply(), bench.reply()].map(|(id, failure)| (id, failure.is_none()));
    replies.sort_unstable();
    assert_eq!(replies, [(2, true), (3, true)]);
    bench.download.enough();
    for (_, gate) in &stops {
        gate.send(()).unwrap();
    }
    bench.assert_have(1);
    bench.assert_content(50 * MIB..50 * MIB + BLOCK);
}

/// Protects: a request of the walk ends when a guest waits, and what is missing of it comes later.
#[test]
fn a_request_of_the_walk_ends_when_a_guest_waits() {
    let bench = Bench::new(64 * MIB, MemorySource::default());
    let limit = bench.download.state.lock().slots.limit() as u64;
    bench.download.state.lock().ahead.pause = HANGS;
    let stops: Vec<_> = (0..limit)
        .map(|_| {
            let (act, stopped, gate) = stops_at(vec![BLOCK]);
            bench.act(act);
            (stopped, gate)
        })
        .collect();
    bench.download.will_need(0, limit * PART, Need::Later);
    for (stopped, _) in &stops {
        stopped.recv_timeout(HANGS).unwrap();
    }
    // The guest waits for the end of the first part.
    bench.want(1, PART - BLOCK..PART);
    for (_, gate) in &stops {
        gate.send(()).unwrap();
    }
    bench.assert_have(1);
    bench.assert_content(PART - BLOCK..PART);
    let requests = bench.source.requests();
    assert!(requests.iter().any(|range| range.contains(&(PART - 1)) && range.start > 0));
    // Other requests of the walk have ended as well, and go on.
    bench.download.state.lock().ahead.pause = Duration::ZERO;
    bench.download.want(2, 0..limit * PART, Some(HANGS), true);
    bench.assert_have(2);
    bench.assert_content(0..2 * PART);
    let requests = bench.source.requests();
    assert!(requests.len() as u64 > 2 * limit, "{requests:?}");
}
