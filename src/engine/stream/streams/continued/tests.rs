//! A stream is left by one process and continued by the next one. Both are here in one process: the
//! second has the registry, the streams and the image of its own.

use parking_lot::Mutex;

use super::super::super::tests::{simulated, wait_until};
use super::super::super::{StreamOptions, Streams};
use super::*;
use crate::job::{JobEvent, Jobs, Status, Verb};

/// The registry and streams of one process, and what it keeps and notes.
struct Life {
    jobs: Jobs,
    streams: Streams,
    kept: Arc<Mutex<String>>,
    note: Arc<Mutex<Option<String>>>,
}

impl Life {
    fn new() -> Life {
        let (jobs, note) = (Jobs::new(), Arc::new(Mutex::new(None)));
        let (kept, noted) = (Arc::new(Mutex::new(String::new())), Arc::clone(&note));
        let keep = move |text: Option<&str>| {
            *noted.lock() = text.map(str::to_owned);
            Ok(())
        };
        let streams = Streams::keeping(&jobs, "drive0", jiff::tz::TimeZone::UTC, Box::new(keep));
        Life { jobs, streams, kept, note }
    }

    fn keep(self) -> Life {
        let last = Arc::clone(&self.kept);
        self.jobs.keep_with(Box::new(move |text| {
            *last.lock() = text.into();
            Ok(())
        }));
        self
    }

    /// The next process, which has the same image or another one.
    fn next(text: &str, disk: &Arc<Disk>) -> Life {
        let next = Life::new();
        let kept = KeptStreams::read(text, disk, &Gate::default());
        assert!(kept.is_complete());
        next.streams.take_over(disk, kept, Priority::Normal);
        next.keep()
    }

    fn status(&self) -> Option<Status> {
        self.jobs.query().first().map(|job| job.status)
    }
}

fn options(id: &str) -> StreamOptions {
    StreamOptions { priority: Priority::Normal, ..StreamOptions::new(id) }
}

/// Returns what a process leaves that is killed when its stream of `options` has this status.
fn left(options: StreamOptions, status: Status) -> String {
    let (disk, _, _) = simulated(16, 4);
    let life = Life::new().keep();
    life.streams.start(&disk, options).unwrap();
    wait_until("the status", || life.status() == Some(status));
    if status == Status::Paused || status == Status::Running {
        life.jobs.set_speed("j", 77).unwrap();
    }
    let phase = if status == Status::Pending { "pending" } else { "at-work" };
    let phase = format!("\"phase\":\"{phase}\"");
    wait_until("the text", || life.kept.lock().contains(&phase));
    let left = life.kept.lock().clone();
    life.jobs.cancel_all_and_wait(std::time::Duration::from_secs(30));
    left
}

/// Protects: a stream that was at work, or paused, goes on under its id and with its speed, and
/// ends once: everything is copied, the chain is cut, and the note is gone.
#[test]
fn a_stream_goes_on_as_it_was() {
    for paused in [false, true] {
        let speed = 1; // one chunk, and then a rest of hours
        let text = left(
            StreamOptions { paused, speed, auto_dismiss: false, ..options("j") },
            if paused { Status::Paused } else { Status::Running },
        );
        let (disk, _, content) = simulated(16, 4);
        let next = Life::next(&text, &disk);
        let events = next.jobs.subscribe();
        let job = &next.jobs.query()[0];
        assert_eq!((job.progress.id.as_str(), job.progress.speed), ("j", 77));
        assert_eq!(job.status, if paused { Status::Paused } else { Status::Running });
        let note = next.note.lock().clone().expect("it is noted");
        assert!(note.contains("\"speed\":77") && note.contains(&format!("\"paused\":{paused}")));
        assert_eq!(
            next.streams.start(&disk, options("k")).unwrap_err().kind(),
            ErrorKind::Busy,
            "one stream"
        );
        if paused {
            next.jobs.resume("j").unwrap();
        }
        next.streams.set_speed("j", 0).unwrap();
        wait_until("the end", || next.status() == Some(Status::Concluded));
        let completed: Vec<_> = events
            .try_iter()
            .flat_map(|batch| batch.events.clone())
            .filter_map(|event| match event {
                JobEvent::Completed { progress, error } => {
                    Some((progress.offset, progress.len, error))
                }
                _ => None,
            })
            .collect();
        assert_eq!(completed, [(disk.size(), disk.size(), None)]);
        assert!(disk.info().unwrap().backing.is_empty() && next.note.lock().is_none());
        let mut read = vec![0; content.len()];
        disk.read(0, &mut read).unwrap();
        assert!(read == content);

        // The third process finds the ended job, and starts nothing.
        let text = next.kept.lock().clone();
        let third = Life::next(&text, &disk);
        assert_eq!(third.status(), Some(Status::Concluded));
        assert_eq!(third.jobs.completed().successful, 1);
        let ended = |life: &Life| life.jobs.last().map(|last| (last.progress, last.concluded));
        assert_eq!(ended(&third), ended(&next));
        third.jobs.apply("j", Verb::Dismiss).unwrap();
    }
}

/// Protects: a job that waits for its finalize copies what is missing before it cuts the chain: its
/// predecessor may have lost what it had copied. The image here is empty, which is the worst case.
#[test]
fn nothing_is_cut_before_it_is_copied() {
    let text = left(StreamOptions { auto_finalize: false, ..options("j") }, Status::Pending);
    let (disk, _, content) = simulated(16, 4);
    let next = Life::next(&text, &disk);
    assert_eq!(next.status(), Some(Status::Pending));
    assert_eq!(disk.info().unwrap().backing.len(), 1);
    next.jobs.apply("j", Verb::Finalize).unwrap();
    wait_until("the end", || next.jobs.query().is_empty());
    assert_eq!(next.jobs.last().and_then(|last| last.error), None);
    assert!(disk.info().unwrap().backing.is_empty());
    let mut read = vec![0; content.len()];
    disk.read(0, &mut read).unwrap();
    assert!(read == content);
}

/// Protects: a process that is killed after it has cut the chain, and before its job was kept as
/// ended, leaves a job that its successor ends, once and as a success; one that was cancelled is
/// not started again.
#[test]
fn a_cut_chain_is_the_end_and_so_is_a_cancel() {
    let running = StreamOptions { speed: 1, ..options("j") };
    let text = left(running, Status::Running);
    let (disk, _, _) = simulated(16, 4);
    let first = Life::new();
    first.streams.start(&disk, options("first")).unwrap();
    wait_until("the cut", || disk.info().unwrap().backing.is_empty() && !first.jobs.is_busy());
    let next = Life::next(&text, &disk);
    wait_until("the end", || !next.jobs.is_busy());
    let last = next.jobs.last().unwrap();
    assert_eq!(
        (last.progress.offset, last.progress.len, last.error),
        (disk.size(), disk.size(), None)
    );
    assert_eq!(next.jobs.completed().successful, 1);

    let (disk, _, _) = simulated(16, 4);
    let cancelled = text.replace("\"cancelled\":false", "\"cancelled\":true");
    assert_ne!(cancelled, text);
    let next = Life::next(&cancelled, &disk);
    wait_until("the end", || !next.jobs.is_busy());
    assert_eq!((next.jobs.completed().cancelled, disk.info().unwrap().backing.len()), (1, 1));
    assert!(next.note.lock().is_none());
}

/// Protects: a job that cannot go on, because its recipe is none, fails in the sight of clients;
/// and a text that is none leaves no job and says so.
#[test]
fn what_cannot_go_on_fails() {
    let text = left(StreamOptions { paused: true, ..options("j") }, Status::Paused);
    let (disk, _, _) = simulated(16, 4);
    let broken = text.replace("on-error\\\":\\\"report", "on-error\\\":\\\"never");
    assert_ne!(broken, text);
    let next = Life::next(&broken, &disk);
    assert!(!next.jobs.is_busy());
    let error = next.jobs.last().and_then(|last| last.error);
    assert_eq!(error.as_deref(), Some("on-error is none"));
    assert!(!KeptStreams::read("x", &disk, &Gate::default()).is_complete());
}
