//! Tests of the fetcher's side of the line, without a server.

use super::*;

/// A test that hangs fails after this time.
const HANGS: Duration = Duration::from_secs(60);

fn pin(size: u64) -> Pin {
    Pin { size, validator: Validator::Etag("\"1\"".into()), digest: None }
}

/// The name of a file on a server that refuses connections.
fn nowhere() -> String {
    "http://127.0.0.1:1/base.raw".to_owned()
}

/// A fetcher, its answers and its other replies.
fn fetcher(dir: &tempfile::TempDir) -> (Arc<Fetcher>, Receiver<Answer>, Receiver<FetchReply>) {
    let cache = CacheDirectory::open(&dir.path().join("cache"), None).unwrap();
    let (answers, to_send) = unbounded();
    let (replies, plain) = unbounded();
    let cache = Arc::new(CacheChoice::Shared(cache));
    let fetcher = Fetcher {
        permissions: Permissions {
            prefixes: vec![SourceUrl::parse_prefix("http://127.0.0.1:1/").unwrap()],
            writes_orders: false,
        },
        config: SourcesConfig::default(),
        space: SpaceMaker::new(&cache),
        cache,
        answers,
        replies,
        files: Mutex::default(),
    };
    (Arc::new(fetcher), to_send, plain)
}

fn open(id: u64, pin: Option<Pin>, digest: Option<String>) -> FetchRequest {
    let url = nowhere();
    FetchRequest::Open { id, file: 0, url, pin, unpinned: false, digest, patience: Some(100) }
}

fn want(id: u64) -> FetchRequest {
    FetchRequest::Want { id, file: 0, offset: 0, len: 1, patience: Some(100), background: false }
}

/// The number of the next reply, which is a failure, and its text.
fn failed(replies: &Receiver<FetchReply>) -> (u64, String) {
    match replies.recv_timeout(HANGS).expect("no reply") {
        FetchReply::Failed { id, failure } => (id, failure.text),
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_file_that_is_pinned_opens_without_its_server() {
    let dir = tempfile::tempdir().unwrap();
    let (fetcher, answers, replies) = fetcher(&dir);
    fetcher.take(open(7, Some(pin(1 << 20)), None), None);
    // A request that comes while the file is being opened waits for it.
    fetcher.take(want(8), None);
    let (answer, descriptors) = answers.recv_timeout(HANGS).unwrap();
    assert!(
        matches!(&answer, FetchReply::Opened { id: 7, pin: opened } if *opened == pin(1 << 20))
    );
    assert_eq!(descriptors.len(), 2);
    let (id, text) = failed(&replies);
    assert_eq!(id, 8, "{text}");
}

#[test]
fn a_file_that_is_not_pinned_needs_its_server() {
    let dir = tempfile::tempdir().unwrap();
    let (fetcher, _answers, replies) = fetcher(&dir);
    fetcher.take(open(7, None, None), None);
    fetcher.take(want(8), None);
    let mut ids = [failed(&replies).0, failed(&replies).0];
    ids.sort_unstable();
    assert_eq!(ids, [7, 8]);
    // A file that no request has named.
    fetcher.take(
        FetchRequest::Want { id: 9, file: 5, offset: 0, len: 1, patience: None, background: false },
        None,
    );
    let (id, text) = failed(&replies);
    assert!(id == 9 && text.contains("number 5"), "{text}");
}

/// Protects: a file that a new fetcher could not open while the server was away is not lost for the
/// life of that fetcher.
#[test]
fn a_file_that_could_not_be_opened_is_opened_again_when_it_is_wanted() {
    let dir = tempfile::tempdir().unwrap();
    let (fetcher, _answers, replies) = fetcher(&dir);
    fetcher.take(open(7, Some(pin(1 << 20)), Some("0".repeat(64))), None);
    assert_eq!(failed(&replies).0, 7);
    fetcher.take(want(8), None);
    assert_eq!(failed(&replies).0, 8, "refused at once");
    assert!(replies.is_empty());
    let mut files = fetcher.files.lock();
    let Some(Slot::Failed { at, .. }) = files.get_mut(&0) else { panic!("is not failed") };
    *at = at.checked_sub(OPEN_AGAIN).expect("the clock has just begun");
    drop(files);
    fetcher.take(want(9), None);
    let mut ids = [failed(&replies).0, failed(&replies).0];
    ids.sort_unstable();
    assert_eq!(ids, [7, 9], "the file is opened again, and both requests are answered");
}

#[test]
fn a_reply_that_is_too_long_does_not_end_the_line() {
    let (near, far) = host::packet::pair().unwrap();
    let ((_answers, to_send), (replies, plain)) = (unbounded(), unbounded());
    let (_records, to_log) = bounded(1);
    let long = "\u{1}".repeat(LONGEST);
    let failure = FetchFailure { kind: ErrorKind::Io, text: long.clone() };
    replies.send(FetchReply::Failed { id: 1, failure }).unwrap();
    let facts = remote::wire::SourceFacts { name: long, ..Default::default() };
    replies.send(FetchReply::Facts { id: 2, files: vec![(0, facts)] }).unwrap();
    replies.send(FetchReply::Have { id: 3 }).unwrap();
    drop(replies);
    send_all(&near, &to_send, &plain, &to_log);
    let next = || packet::receive::<FetchReply>(&far, LONGEST).unwrap().unwrap().0;
    assert!(matches!(next(), FetchReply::Failed { id: 1, .. }));
    assert!(matches!(next(), FetchReply::Failed { id: 2, .. }));
    assert!(matches!(next(), FetchReply::Have { id: 3 }));
}
