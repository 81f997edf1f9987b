//! Life cycles of jobs, observed through events and the registry.

use std::sync::Arc;
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use crossbeam_channel::Receiver;

use super::*;

const CHUNK: u64 = 512 << 10;

fn spec(id: &str) -> JobSpec {
    JobSpec {
        id: id.into(),
        kind: "stream",
        len: 4 * CHUNK,
        speed: 0,
        auto_finalize: true,
        auto_dismiss: true,
        on_error: OnError::Report,
        request: "r".into(),
    }
}

fn done() -> Result<(), Failure> {
    Ok(())
}

/// A typical worker: a checkpoint before each chunk.
fn work(control: Control, len: u64) -> JoinHandle<()> {
    control.start();
    thread::spawn(move || {
        for _ in 0..len / CHUNK {
            if control.checkpoint(|| ()) == Next::Cancel {
                return control.finish(Outcome::Cancelled, || {
                    unreachable!("a cancelled job takes no effect")
                });
            }
            control.advance(CHUNK, Work { copied: CHUNK, ..Work::default() });
        }
        control.finish(Outcome::Done, done);
    })
}

fn words(events: &Receiver<Arc<Batch>>) -> Vec<String> {
    let word = |event: &JobEvent| match event {
        JobEvent::StatusChange { status, .. } => status.to_string(),
        JobEvent::Completed { progress, error } => {
            format!("COMPLETED {} {error:?}", progress.offset)
        }
        JobEvent::Cancelled { progress } => format!("CANCELLED {}", progress.offset),
        JobEvent::Error { action, .. } => format!("ERROR {action:?}"),
        JobEvent::Pending { .. } => "PENDING".into(),
        JobEvent::Ready { .. } => "READY".into(),
    };
    events.try_iter().flat_map(|batch| batch.events.iter().map(word).collect::<Vec<_>>()).collect()
}

fn wait_for(jobs: &Jobs, what: impl Fn(&JobInfo) -> bool) {
    let start = Instant::now();
    while !jobs.query().first().is_some_and(&what) {
        assert!(start.elapsed() < Duration::from_secs(10), "{:?}", jobs.query());
        thread::sleep(Duration::from_millis(1));
    }
}

#[test]
fn success() {
    let jobs = Jobs::new();
    let events = jobs.subscribe();
    work(jobs.create(spec("j")).unwrap(), 4 * CHUNK).join().unwrap();
    assert_eq!(
        words(&events),
        ["created", "running", "waiting", "pending", "COMPLETED 2097152 None", "concluded", "null"]
    );
    assert!(!jobs.is_busy());
    let last = jobs.last().unwrap();
    assert_eq!((last.status, last.error), (Status::Concluded, None));
}

/// Protects: a job that was reported as COMPLETED is no longer in the registry, because the batch
/// is sent and the job removed under one lock.
#[test]
fn a_completed_job_is_gone() {
    let jobs = Jobs::new();
    let events = jobs.subscribe();
    for _ in 0..200 {
        let worker = work(jobs.create(spec("j")).unwrap(), 0);
        while !events
            .recv()
            .unwrap()
            .events
            .iter()
            .any(|event| matches!(event, JobEvent::Completed { .. }))
        {}
        assert!(jobs.query().is_empty());
        worker.join().unwrap();
    }
}

#[test]
fn names_are_checked_and_newest_jobs_come_first() {
    let jobs = Jobs::new();
    let invalid =
        |id: &str| jobs.create(spec(id)).unwrap_err() == JobError::InvalidId { id: id.into() };
    assert!(invalid("") && invalid("1x") && invalid("a b") && invalid("-") && invalid("é"));
    let (_a, _b) = (jobs.create(spec("a-._9")).unwrap(), jobs.create(spec("b")).unwrap());
    assert_eq!(jobs.create(spec("b")).unwrap_err(), JobError::AlreadyInUse { id: "b".into() });
    assert_eq!(
        jobs.query().iter().map(|job| job.progress.id.as_str()).collect::<Vec<_>>(),
        ["b", "a-._9"]
    );
}

#[test]
fn a_slow_job_pauses_resumes_speeds_up_and_dies_at_once() {
    let jobs = Jobs::new();
    let events = jobs.subscribe();
    let start = Instant::now();
    let worker = work(jobs.create(JobSpec { speed: 1, ..spec("j") }).unwrap(), 4 * CHUNK);
    wait_for(&jobs, |job| !job.busy && job.progress.offset == CHUNK);
    assert_eq!(jobs.pause("j"), Ok(Worker::Asleep));
    wait_for(&jobs, |job| job.status == Status::Paused && job.paused && !job.busy);
    assert_eq!(jobs.pause("j"), Err(JobError::AlreadyPaused));
    assert_eq!(jobs.cancel("j", Force::No), Err(JobError::CurrentlyPaused { id: "j".into() }));
    jobs.resume("j").unwrap();
    assert_eq!(jobs.resume("j"), Err(JobError::NotPaused));
    jobs.set_speed("j", 0).unwrap();
    worker.join().unwrap();
    assert_eq!(
        words(&events)[2..],
        ["paused", "running", "waiting", "pending", "COMPLETED 2097152 None", "concluded", "null"]
    );

    let worker = work(jobs.create(JobSpec { speed: 1, ..spec("j") }).unwrap(), 4 * CHUNK);
    wait_for(&jobs, |job| !job.busy && job.progress.offset == CHUNK);
    jobs.pause("j").unwrap();
    jobs.cancel("j", Force::Yes).unwrap();
    worker.join().unwrap();
    assert_eq!(
        words(&events)[2..],
        ["paused", "running", "aborting", "CANCELLED 524288", "concluded", "null"]
    );
    assert_eq!(jobs.last().unwrap().error.as_deref(), Some("Operation canceled"));
    assert!(start.elapsed() < Duration::from_secs(10), "speed 1 would sleep for hours");
}

#[test]
fn the_speed_is_met() {
    let jobs = Jobs::new();
    let start = Instant::now();
    work(jobs.create(JobSpec { speed: 8 * CHUNK, ..spec("j") }).unwrap(), 4 * CHUNK)
        .join()
        .unwrap();
    let took = start.elapsed();
    assert!(
        took > Duration::from_millis(370) && took < Duration::from_secs(5),
        "3 chunks had to wait: {took:?}"
    );
}

#[test]
fn only_the_verbs_of_the_table_are_obeyed() {
    let jobs = Jobs::new();
    assert_eq!(jobs.apply("j", Verb::Pause), Err(JobError::NotFound));
    let control = jobs.create(spec("j")).unwrap();
    control.start();
    for verb in [Verb::Complete, Verb::Finalize, Verb::Dismiss] {
        assert_eq!(
            jobs.apply("j", verb),
            Err(JobError::VerbRefused { id: "j".into(), status: Status::Running, verb })
        );
    }
    control.finish(Outcome::Done, done);
}

#[test]
fn a_failed_job_tells_why() {
    let jobs = Jobs::new();
    let events = jobs.subscribe();
    let failure = Failure {
        text: "Input/output error".into(),
        detail: "b.raw at 7: Input/output error".into(),
        no_space: false,
    };
    let control = jobs.create(spec("j")).unwrap();
    control.start();
    control.advance(CHUNK, Work { copied: CHUNK, ..Work::default() });
    assert_eq!(control.error(&failure), ErrorAction::Report);
    control.finish(Outcome::Failed(failure.clone()), || unreachable!());
    let expected = [
        "created",
        "running",
        "ERROR Report",
        "aborting",
        "COMPLETED 524288 Some(\"Input/output error\")",
        "concluded",
        "null",
    ];
    assert_eq!(words(&events), expected);

    let control = jobs.create(spec("j")).unwrap();
    control.start();
    control.finish(Outcome::Done, || Err(failure));
    let expected = [
        "waiting",
        "pending",
        "aborting",
        "COMPLETED 2097152 Some(\"Input/output error\")",
        "concluded",
        "null",
    ];
    assert_eq!(words(&events)[2..], expected);
}

#[test]
fn errors_that_stop_wait_for_a_user() {
    let jobs = Jobs::new();
    for (on_error, no_space, expected) in [
        (OnError::Stop, false, ErrorAction::Stop),
        (OnError::Enospc, true, ErrorAction::Stop),
        (OnError::Enospc, false, ErrorAction::Report),
        (OnError::Auto, true, ErrorAction::Stop),
        (OnError::Auto, false, ErrorAction::Report),
        (OnError::Ignore, true, ErrorAction::Ignore),
        (OnError::Report, true, ErrorAction::Report),
    ] {
        let control = jobs.create(JobSpec { on_error, ..spec("j") }).unwrap();
        control.start();
        assert_eq!(control.error(&Failure { no_space, ..Failure::default() }), expected);
        let io_status = match (expected, no_space) {
            (ErrorAction::Stop, true) => IoStatus::NoSpace,
            (ErrorAction::Stop, false) => IoStatus::Failed,
            _ => IoStatus::Ok,
        };
        assert_eq!(jobs.query()[0].io_status, io_status);
        if expected == ErrorAction::Stop {
            let resuming = jobs.clone();
            let user = thread::spawn(move || {
                wait_for(&resuming, |job| job.status == Status::Paused);
                resuming.resume("j").unwrap();
            });
            assert_eq!(control.checkpoint(|| ()), Next::Continue);
            user.join().unwrap();
            assert_eq!(jobs.query()[0].io_status, IoStatus::Ok);
        }
        control.finish(Outcome::Done, done);
    }
}

#[test]
fn orders_to_finalize_and_dismiss_are_waited_for() {
    let jobs = Jobs::new();
    let events = jobs.subscribe();
    let worker = work(
        jobs.create(JobSpec { auto_finalize: false, auto_dismiss: false, ..spec("j") }).unwrap(),
        0,
    );
    wait_for(&jobs, |job| job.status == Status::Pending);
    assert_eq!(jobs.apply("j", Verb::Finalize), Ok(Worker::Asleep));
    jobs.settle("j", Duration::from_secs(10));
    assert_eq!(
        words(&events)[2..],
        ["waiting", "pending", "PENDING", "COMPLETED 2097152 None", "concluded"]
    );
    worker.join().unwrap();
    assert!(jobs.is_busy(), "it holds the disk until it is dismissed");
    jobs.apply("j", Verb::Dismiss).unwrap();
    assert_eq!(words(&events), ["null"]);

    let worker = work(jobs.create(JobSpec { auto_finalize: false, ..spec("j") }).unwrap(), 0);
    wait_for(&jobs, |job| job.status == Status::Pending);
    jobs.cancel("j", Force::No).unwrap();
    worker.join().unwrap();
    assert_eq!(words(&events)[5..], ["aborting", "CANCELLED 2097152", "concluded", "null"]);
}

#[test]
fn a_cancel_that_comes_too_late_does_nothing() {
    let jobs = Jobs::new();
    let events = jobs.subscribe();
    let control = jobs.create(spec("j")).unwrap();
    control.start();
    let late = jobs.clone();
    control.finish(Outcome::Done, move || {
        late.cancel("j", Force::Yes).unwrap();
        Ok(())
    });
    assert_eq!(words(&events)[4..], ["COMPLETED 2097152 None", "concluded", "null"]);

    let control = jobs.create(spec("j")).unwrap();
    control.start();
    jobs.cancel("j", Force::No).unwrap();
    control.finish(Outcome::Done, || unreachable!("cancelled before the work was over"));
    assert_eq!(words(&events)[2..], ["aborting", "CANCELLED 0", "concluded", "null"]);
}

#[test]
fn a_worker_that_dies_fails_its_job() {
    let jobs = Jobs::new();
    let events = jobs.subscribe();
    drop(jobs.create(spec("j")).unwrap());
    assert_eq!(words(&events), ["created", "null"], "never started: taken back");
    let control = jobs.create(spec("j")).unwrap();
    control.start();
    drop(control);
    let expected = [
        "aborting",
        "COMPLETED 0 Some(\"the job's worker ended without a result\")",
        "concluded",
        "null",
    ];
    assert_eq!(words(&events)[2..], expected);
}

#[test]
fn the_end_of_the_process_ends_all_jobs() {
    let jobs = Jobs::new();
    let events = jobs.subscribe();
    let slow = work(jobs.create(JobSpec { speed: 1, ..spec("slow") }).unwrap(), 4 * CHUNK);
    let paused = work(jobs.create(JobSpec { speed: 1, ..spec("paused") }).unwrap(), 4 * CHUNK);
    jobs.pause("paused").unwrap();
    work(jobs.create(JobSpec { auto_dismiss: false, ..spec("over") }).unwrap(), 0).join().unwrap();
    jobs.cancel_all_and_wait(Duration::from_secs(60));
    assert!(jobs.query().is_empty());
    assert_eq!(jobs.create(spec("j")).unwrap_err(), JobError::ShuttingDown);
    assert_eq!(words(&events).iter().filter(|word| *word == "null").count(), 3);
    slow.join().unwrap();
    paused.join().unwrap();
}

/// Protects: the worker learns how its job ended before the end becomes visible, because it has to
/// decide whether the job is started again. The end of the process does not count as a user's
/// cancel. A user's cancel that precedes it stays one, even if the worker has not obeyed it yet.
#[test]
fn a_worker_learns_how_its_job_has_ended() {
    let failure = || Failure { text: "no".into(), ..Failure::default() };
    let ended = |outcome: Outcome, before: &dyn Fn(&Jobs)| {
        let jobs = Jobs::new();
        let events = jobs.subscribe();
        let control = jobs.create(spec("j")).unwrap();
        control.start();
        before(&jobs);
        let mut how = None;
        control.finish_noting(outcome, done, |ending| {
            assert!(!words(&events).contains(&"concluded".to_string()));
            how = Some(ending);
        });
        how.unwrap()
    };
    // The worker is this thread, so there is nothing to wait for.
    let exit = |jobs: &Jobs| assert!(!jobs.cancel_all_and_wait(Duration::ZERO));
    let user = |jobs: &Jobs| {
        let _ = jobs.cancel("j", Force::Yes).unwrap();
    };
    assert_eq!(ended(Outcome::Done, &|_| ()), JobEnding::Completed);
    assert_eq!(ended(Outcome::Failed(failure()), &|_| ()), JobEnding::Failed);
    assert_eq!(ended(Outcome::Cancelled, &user), JobEnding::Cancelled);
    assert_eq!(ended(Outcome::Cancelled, &exit), JobEnding::Abandoned);
    let both = |jobs: &Jobs| {
        user(jobs);
        exit(jobs);
    };
    assert_eq!(ended(Outcome::Cancelled, &both), JobEnding::Cancelled);
    // Work that was complete when the process ended is not a success, because its result has not
    // taken effect.
    assert_eq!(ended(Outcome::Done, &exit), JobEnding::Abandoned);
    assert_eq!(ended(Outcome::Failed(failure()), &exit), JobEnding::Abandoned);
}

#[test]
fn a_hold_keeps_jobs_with_work_at_their_checkpoint() {
    let jobs = Jobs::new();
    let events = jobs.subscribe();
    let hold = jobs.hold();
    let worker = work(jobs.create(spec("j")).unwrap(), 4 * CHUNK);
    work(jobs.create(JobSpec { len: 0, ..spec("empty") }).unwrap(), CHUNK).join().unwrap();
    assert_eq!(words(&events).len(), 2 + 7);
    drop(hold);
    worker.join().unwrap();
    assert_eq!(words(&events).len(), 5);
}

#[test]
fn a_subscriber_that_does_not_read_blocks_nobody() {
    let jobs = Jobs::new();
    let stalled = jobs.subscribe();
    drop(jobs.subscribe());
    for _ in 0..1000 {
        work(jobs.create(spec("j")).unwrap(), 0).join().unwrap();
    }
    assert_eq!(words(&stalled).len(), 7000);
}

/// Protects: a worker hears of each pause before it waits for its end, also of a pause that
/// comes while it rests, and may ask the registry meanwhile.
#[test]
fn a_worker_hears_of_each_pause_before_it_waits() {
    let jobs = Jobs::new();
    let control = jobs.create(spec("j")).unwrap();
    control.start();
    let (sender, heard) = crossbeam_channel::unbounded();
    let registry = jobs.clone();
    let worker = thread::spawn(move || {
        let hears = || sender.send(registry.query()[0].paused).unwrap();
        let rested = control.rest(Duration::from_secs(3600), hears);
        let passed = control.checkpoint(hears);
        control.finish(Outcome::Cancelled, || unreachable!("it is cancelled"));
        (rested, passed)
    });
    wait_for(&jobs, |job| !job.busy);
    assert!(heard.is_empty(), "a rest is no pause");
    jobs.pause("j").unwrap();
    assert_eq!(heard.recv_timeout(Duration::from_secs(10)), Ok(true));
    jobs.resume("j").unwrap();
    // The rest goes on after each pause.
    jobs.pause("j").unwrap();
    wait_for(&jobs, |job| job.status == Status::Paused);
    jobs.resume("j").unwrap();
    jobs.cancel("j", Force::No).unwrap();
    assert_eq!(worker.join().unwrap(), (Next::Cancel, Next::Cancel));
    assert!(heard.is_empty(), "a pause within the same wait is no news");
}

/// Protects: a worker that rests obeys at once, as in a checkpoint, and a job with a speed does not
/// rest.
#[test]
fn a_rest_ends_when_anybody_wants_something() {
    const FOR_EVER: Duration = Duration::from_secs(3600);
    let limit = Duration::from_secs(10);
    let resting = |speed| {
        let jobs = Jobs::new();
        let control = jobs.create(JobSpec { speed, ..spec("j") }).unwrap();
        control.start();
        let (sender, ended) = crossbeam_channel::bounded(1);
        thread::spawn(move || {
            let next = control.rest(FOR_EVER, || ());
            control.finish(Outcome::Cancelled, || unreachable!("it is cancelled"));
            let _ = sender.send(next);
        });
        (jobs, ended)
    };
    let (jobs, ended) = resting(0);
    wait_for(&jobs, |job| !job.busy);
    jobs.cancel("j", Force::No).unwrap();
    assert_eq!(ended.recv_timeout(limit), Ok(Next::Cancel));

    let (jobs, ended) = resting(0);
    wait_for(&jobs, |job| !job.busy);
    jobs.pause("j").unwrap();
    assert_eq!(jobs.query()[0].status, Status::Paused, "it sleeps already");
    jobs.resume("j").unwrap();
    wait_for(&jobs, |job| job.status == Status::Running && !job.busy);
    jobs.set_speed("j", 1 << 30).unwrap();
    assert_eq!(ended.recv_timeout(limit), Ok(Next::Continue));

    let (_jobs, ended) = resting(1 << 30);
    assert_eq!(ended.recv_timeout(limit), Ok(Next::Continue), "its speed is its pace");

    let (jobs, ended) = resting(0);
    wait_for(&jobs, |job| !job.busy);
    assert!(jobs.cancel_all_and_wait(limit));
    assert_eq!(ended.recv_timeout(limit), Ok(Next::Cancel));
}

/// Protects: each job is counted once when it concludes, by its result, whether or not a client
/// queries it afterwards.
#[test]
fn those_that_have_ended_are_counted() {
    let jobs = Jobs::new();
    assert_eq!(jobs.completed(), Completed::default());
    work(jobs.create(spec("j")).unwrap(), 4 * CHUNK).join().unwrap();
    let kept = jobs.create(JobSpec { auto_dismiss: false, ..spec("j") }).unwrap();
    kept.start();
    kept.finish(Outcome::Failed(Failure { text: "no".into(), ..Failure::default() }), done);
    assert_eq!(jobs.completed(), Completed { successful: 1, failed: 1, cancelled: 0 });
    jobs.apply("j", Verb::Dismiss).unwrap();
    let cancelled = jobs.create(spec("j")).unwrap();
    cancelled.start();
    cancelled.finish(Outcome::Cancelled, || unreachable!());
    assert_eq!(jobs.completed(), Completed { successful: 1, failed: 1, cancelled: 1 });
}
