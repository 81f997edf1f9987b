//! Tests of the line, with a fetcher on a thread that answers as a test says.

use std::os::fd::BorrowedFd;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};

use super::*;
use crate::pin::{Pin, Validator};
use host::storage::Need;

/// A test that hangs fails after this time.
const HANGS: Duration = Duration::from_secs(60);

/// The other end of a line.
struct FakeFetcher(OwnedFd);

impl FakeFetcher {
    fn receive(&self) -> FetchRequest {
        assert!(is_readable_for(&self.0, HANGS), "no request");
        packet::receive(&self.0, LONGEST).unwrap().expect("the line is closed").0
    }

    /// Receives a request to bring in a range: its number, the file and the offset.
    fn wanted(&self) -> (u64, u32, u64) {
        match self.receive() {
            FetchRequest::Want { id, file, offset, .. } => (id, file, offset),
            other => panic!("{other:?}"),
        }
    }

    /// Receives a request to open a file: its number, the file and the pin.
    fn opens(&self) -> (u64, u32, Option<Pin>) {
        match self.receive() {
            FetchRequest::Open { id, file, pin, .. } => (id, file, pin),
            other => panic!("{other:?}"),
        }
    }

    fn send(&self, reply: &FetchReply) {
        packet::send(&self.0, reply, LONGEST, &[]).unwrap();
    }

    fn have(&self, id: u64) {
        self.send(&FetchReply::Have { id });
    }

    fn opened(&self, id: u64) {
        let files = [tempfile::tempfile().unwrap(), tempfile::tempfile().unwrap()];
        let files: Vec<BorrowedFd<'_>> = files.iter().map(AsFd::as_fd).collect();
        let reply = FetchReply::Opened { id, pin: pin() };
        packet::send(&self.0, &reply, LONGEST, &files).unwrap();
    }
}

fn is_readable_for(socket: &OwnedFd, time: Duration) -> bool {
    let until = Instant::now() + time;
    while Instant::now() < until {
        if is_readable(socket, Some(until)) {
            return true;
        }
    }
    false
}

fn pin() -> Pin {
    Pin { size: 1 << 20, validator: Validator::Etag("\"1\"".into()), digest: None }
}

fn pair() -> (OwnedFd, OwnedFd) {
    host::packet::pair().unwrap()
}

/// A line, and the fetchers that it starts, in order.
fn line() -> (Arc<FetcherLine>, Receiver<FakeFetcher>) {
    let (started, fetchers) = channel();
    let started = Mutex::new(started);
    let start: Starter = Box::new(move || {
        let (near, far) = pair();
        let _ = started.lock().send(FakeFetcher(far));
        Ok(near.into())
    });
    (Arc::new(FetcherLine::new(start)), fetchers)
}

fn next(fetchers: &Receiver<FakeFetcher>) -> FakeFetcher {
    fetchers.recv_timeout(HANGS).expect("no fetcher is started")
}

fn open_request(id: u64, file: u32) -> FetchRequest {
    FetchRequest::Open {
        id,
        file,
        url: format!("s3://golden/{file}.raw"),
        pin: None,
        unpinned: false,
        digest: None,
        patience: None,
    }
}

fn soon() -> Option<Instant> {
    Some(Instant::now() + HANGS)
}

type Ends = Receiver<(u64, Result<()>)>;

/// Wants a byte at `offset` on a thread of its own, which tells how that ended.
fn want_on_thread(line: &Arc<FetcherLine>, offset: u64, ended: &Sender<(u64, Result<()>)>) {
    let (line, ended) = (Arc::clone(line), ended.clone());
    std::thread::spawn(move || {
        let _ = ended.send((offset, line.want(0, (offset, 1), Some(HANGS), soon())));
    });
}

fn ends_well(ends: &Ends, offset: u64) {
    let (ended, result) = ends.recv_timeout(HANGS).expect("no request ends");
    result.unwrap();
    assert_eq!(ended, offset);
}

/// Protects: each thread gets its own reply, whichever thread has received it, and after the leader
/// has ended another thread leads.
#[test]
fn replies_in_any_order_reach_their_threads() {
    let (line, fetchers) = line();
    let (ended, ends) = channel();
    want_on_thread(&line, 0, &ended);
    let fetcher = next(&fetchers);
    let mut ids = vec![fetcher.wanted().0];
    for offset in 1..6 {
        want_on_thread(&line, offset, &ended);
        let (id, _, wanted) = fetcher.wanted();
        assert_eq!(wanted, offset);
        ids.push(id);
    }
    // The thread of 3 does not lead; that of 0 does, and its end passes the lead on.
    for offset in [3, 0, 5, 1, 4, 2] {
        fetcher.have(ids[offset as usize]);
        ends_well(&ends, offset);
    }
    assert!(!line.state.lock().is_led);
}

#[test]
fn a_leader_that_reaches_its_deadline_passes_the_lead_on() {
    let (line, fetchers) = line();
    let (ended, ends) = channel();
    let leader = Arc::clone(&line);
    let leads = std::thread::spawn(move || {
        leader.want(0, (0, 1), None, Some(Instant::now() + Duration::from_millis(300)))
    });
    let fetcher = next(&fetchers);
    let late = fetcher.wanted().0;
    want_on_thread(&line, 1, &ended);
    let id = fetcher.wanted().0;
    let error = leads.join().unwrap().unwrap_err();
    assert!(error.to_string().contains("does not answer"), "{error}");
    // The reply that comes too late harms nobody.
    fetcher.have(late);
    fetcher.have(id);
    ends_well(&ends, 1);
}

#[test]
fn a_failure_has_the_kind_and_the_text_of_the_fetcher() {
    let (line, fetchers) = line();
    let asks = Arc::clone(&line);
    let asked = std::thread::spawn(move || asks.want(0, (0, 1), None, soon()));
    let fetcher = next(&fetchers);
    let id = fetcher.wanted().0;
    fetcher.send(&FetchReply::Log(1, "a record between the replies".into()));
    let failure = FetchFailure { kind: ErrorKind::Corrupt, text: "another file".into() };
    fetcher.send(&FetchReply::Failed { id, failure });
    let error = asked.join().unwrap().unwrap_err();
    assert_eq!((error.kind(), error.to_string()), (ErrorKind::Corrupt, "another file".into()));
}

/// Opens a file, and answers as a fetcher.
fn opened(line: &Arc<FetcherLine>, fetchers: &Receiver<FakeFetcher>) -> FakeFetcher {
    let opens = Arc::clone(line);
    let opening = std::thread::spawn(move || opens.open(soon(), open_request));
    let fetcher = next(fetchers);
    let (id, file, pinned) = fetcher.opens();
    assert_eq!((file, pinned), (0, None));
    fetcher.opened(id);
    let (file, _, descriptors) = opening.join().unwrap().unwrap();
    assert_eq!((file, descriptors.len()), (0, 2));
    fetcher
}

/// Protects: the end of a fetcher costs no request that waits, and no file.
#[test]
fn a_new_fetcher_opens_the_files_and_gets_the_requests_that_wait() {
    let (line, fetchers) = line();
    let fetcher = opened(&line, &fetchers);
    let (reopened, reopens) = channel();
    line.on_reopened(
        0,
        Box::new(move |descriptors| {
            let _ = reopened.send(descriptors.len());
            Ok(())
        }),
    );
    line.tell(&FetchRequest::WillNeed { file: 0, offset: 77, len: 1, need: Need::Later });
    assert!(matches!(fetcher.receive(), FetchRequest::WillNeed { offset: 77, .. }));
    let (ended, ends) = channel();
    for offset in [0, 1] {
        want_on_thread(&line, offset, &ended);
        fetcher.wanted();
    }
    drop(fetcher);
    let fetcher = next(&fetchers);
    let (id, file, pinned) = fetcher.opens();
    assert_eq!((file, pinned), (0, Some(pin())));
    let ids: BTreeMap<u64, u64> = [fetcher.wanted(), fetcher.wanted()]
        .into_iter()
        .map(|(id, _, offset)| (offset, id))
        .collect();
    assert!(matches!(fetcher.receive(), FetchRequest::WillNeed { offset: 77, .. }));
    fetcher.opened(id);
    assert_eq!(reopens.recv_timeout(HANGS), Ok(2));
    for offset in [1, 0] {
        fetcher.have(ids[&offset]);
        ends_well(&ends, offset);
    }
}

/// Protects: descriptors of a new fetcher that come before the file can take them are not lost.
#[test]
fn descriptors_wait_for_the_file_that_takes_them() {
    let (line, fetchers) = line();
    drop(opened(&line, &fetchers));
    let (ended, ends) = channel();
    want_on_thread(&line, 0, &ended);
    let fetcher = next(&fetchers);
    let (opening, ..) = fetcher.opens();
    let (id, ..) = fetcher.wanted();
    fetcher.opened(opening);
    fetcher.have(id);
    ends_well(&ends, 0);
    let (reopened, reopens) = channel();
    line.on_reopened(
        0,
        Box::new(move |descriptors| {
            let _ = reopened.send(descriptors.len());
            Ok(())
        }),
    );
    assert_eq!(reopens.try_recv(), Ok(2));
}

#[test]
fn messages_that_are_not_understood_end_the_fetcher() {
    let (line, fetchers) = line();
    let fetcher = opened(&line, &fetchers);
    let (ended, ends) = channel();
    want_on_thread(&line, 0, &ended);
    fetcher.wanted();
    rustix::net::send(&fetcher.0, b"{\"nonsense\":", rustix::net::SendFlags::empty()).unwrap();
    let second = next(&fetchers);
    second.opens();
    second.have(second.wanted().0);
    ends_well(&ends, 0);
}

#[test]
fn a_start_that_fails_is_told_before_the_first_file_and_repeated_after_it() {
    let starts = Arc::new(AtomicU32::new(0));
    let (counted, (started, fetchers)) = (Arc::clone(&starts), channel());
    let started = Mutex::new(started);
    let line = Arc::new(FetcherLine::new(Box::new(move || {
        // The first and the third start fail.
        if counted.fetch_add(1, Ordering::Relaxed) % 2 == 0 {
            return Err(Error::new(ErrorKind::NotFound, "no such program"));
        }
        let (near, far) = pair();
        let _ = started.lock().send(FakeFetcher(far));
        Ok(near.into())
    })));
    let error = line.open(soon(), open_request).unwrap_err();
    assert_eq!((error.kind(), error.to_string()), (ErrorKind::NotFound, "no such program".into()));
    let opens = Arc::clone(&line);
    let opening = std::thread::spawn(move || opens.open(soon(), open_request));
    let fetcher = next(&fetchers);
    let (id, file, _) = fetcher.opens();
    assert_eq!(file, 1, "the number of the file that was not opened is not used again");
    fetcher.opened(id);
    opening.join().unwrap().unwrap();
    drop(fetcher);
    let (ended, ends) = channel();
    want_on_thread(&line, 0, &ended);
    let fetcher = next(&fetchers);
    assert_eq!(starts.load(Ordering::Relaxed), 4);
    assert_eq!(fetcher.opens().1, 1);
    fetcher.have(fetcher.wanted().0);
    ends_well(&ends, 0);
}

/// Protects: a program that ends at once is reported instead of being started without end.
#[test]
fn fetchers_that_end_before_the_first_answer_are_reported() {
    let line = FetcherLine::new(Box::new(|| {
        Ok(StartedFetcher { socket: pair().0, before: Some("exit status: 127".into()) })
    }));
    let error = line.open(None, open_request).unwrap_err().to_string();
    assert!(error.contains("ends before it answers (exit status: 127)"), "{error}");
}

/// Protects: a fetcher that reads nothing delays no deadline, and what it was not told is sent
/// when it reads again.
#[test]
fn a_fetcher_that_is_slow_to_read_delays_no_deadline() {
    let (line, fetchers) = line();
    let fetcher = opened(&line, &fetchers);
    let hint = FetchRequest::WillNeed { file: 0, offset: 5, len: 1, need: Need::Later };
    loop {
        // The hints that the socket has no space for are lost, and the call returns.
        line.tell(&hint);
        let state = line.state.lock();
        let socket = state.socket.as_ref().unwrap();
        if !packet::try_send(&**socket, &hint, LONGEST, &[]).unwrap() {
            break;
        }
    }
    let error =
        line.want(0, (0, 1), None, Some(Instant::now() + Duration::from_millis(100))).unwrap_err();
    assert!(error.to_string().contains("does not answer"), "{error}");
    let (ended, ends) = channel();
    want_on_thread(&line, 1, &ended);
    want_on_thread(&line, 2, &ended);
    let mut ids = BTreeMap::new();
    while ids.len() < 2 {
        if let FetchRequest::Want { id, offset, .. } = fetcher.receive() {
            ids.insert(offset, id);
        }
    }
    for offset in [2, 1] {
        fetcher.have(ids[&offset]);
        ends_well(&ends, offset);
    }
}

#[test]
fn a_request_that_is_too_long_is_refused() {
    let (line, fetchers) = line();
    let _fetcher = opened(&line, &fetchers);
    let error = line
        .open(soon(), |id, file| FetchRequest::Open {
            id,
            file,
            url: "x".repeat(LONGEST),
            pin: None,
            unpinned: false,
            digest: None,
            patience: None,
        })
        .unwrap_err();
    assert_eq!(error.kind(), ErrorKind::InvalidArgument, "{error}");
}
