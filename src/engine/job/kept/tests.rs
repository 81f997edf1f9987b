//! What is kept of jobs, and when.

use std::sync::Arc;

use parking_lot::Mutex;

use super::super::{Failure, Force, JobEvent, Jobs, Outcome, Verb};
use super::*;

const CHUNK: u64 = 512 << 10;

fn spec(id: &str) -> JobSpec {
    JobSpec {
        id: id.into(),
        kind: "stream",
        len: 4 * CHUNK,
        speed: 7,
        auto_finalize: true,
        auto_dismiss: true,
        on_error: OnError::Stop,
        request: "r".into(),
    }
}

/// Jobs whose last text is in the second value.
fn keeping() -> (Jobs, Arc<Mutex<String>>) {
    let (jobs, text) = (Jobs::new(), Arc::new(Mutex::new(String::new())));
    let last = Arc::clone(&text);
    jobs.keep_with(Box::new(move |text| {
        *last.lock() = text.into();
        Ok(())
    }));
    (jobs, text)
}

fn parse(text: &Mutex<String>) -> KeptJobs {
    KeptJobs::parse(&text.lock()).unwrap()
}

/// What clients see of the jobs, apart from the progress and the rate.
fn seen(jobs: &Jobs) -> Vec<JobInfo> {
    let blur =
        |info: JobInfo| JobInfo { rate: 0, left: None, remaining: None, busy: false, ..info };
    jobs.query().into_iter().map(blur).collect()
}

/// Protects: each change that a client has made or could see is kept when the call that makes it
/// returns, and the next process shows the same jobs, in the same order, without an event.
#[test]
fn the_next_process_shows_the_same_jobs() {
    let (jobs, text) = keeping();
    let ended = jobs.create(JobSpec { auto_dismiss: false, ..spec("ended") }).unwrap();
    assert!(parse(&text).jobs.is_empty(), "nobody was told of it");
    ended.start();
    let failure =
        Failure { text: "Input/output error".into(), detail: "base: at 0".into(), no_space: false };
    ended.finish(Outcome::Failed(failure), || Ok(()));
    let stopped = jobs.create(spec("stopped")).unwrap();
    stopped.set_recipe("how".into());
    stopped.start();
    stopped.advance(CHUNK, Work { copied: 4096, ..Work::default() });
    stopped.error(&Failure { text: "x".into(), detail: "y".into(), no_space: true });
    let limited = jobs.create(JobSpec { auto_finalize: false, ..spec("limited") }).unwrap();
    limited.start();
    jobs.set_speed("limited", 4096).unwrap();
    let paused = jobs.create(spec("paused")).unwrap();
    paused.start();
    jobs.pause("paused").unwrap();

    let kept = parse(&text);
    let recipes: Vec<_> = kept.jobs.iter().map(|job| job.recipe.as_str()).collect();
    assert_eq!(recipes, ["", "", "how", ""]);
    let next = Jobs::new();
    let events = next.subscribe();
    let controls = next.restore(kept, "stream");
    let ids: Vec<_> = controls.iter().map(super::super::Control::id).collect();
    assert_eq!(ids, ["stopped", "limited", "paused"]);
    let mut expected = seen(&jobs);
    // The worker of a job that is to pause has stopped: it does not run any more.
    for paused in expected.iter_mut().filter(|job| job.paused) {
        paused.status = Status::Paused;
    }
    assert_eq!(seen(&next), expected);
    assert_eq!((next.last(), next.completed()), (jobs.last(), jobs.completed()));
    assert_eq!(events.try_iter().count(), 0);
    for id in ["paused", "stopped"] {
        next.resume(id).unwrap();
    }
    next.cancel("limited", Force::No).unwrap();
    next.apply("ended", Verb::Dismiss).unwrap();
    for control in controls {
        control.finish(Outcome::Cancelled, || Ok(()));
    }
    assert!(next.query().is_empty());
}

/// Protects: a job is kept as ended before any event says so, after its result has taken effect,
/// and a job that was cancelled is kept as that before the reply.
#[test]
fn an_end_is_kept_before_it_is_reported() {
    let (jobs, text) = keeping();
    let events = jobs.subscribe();
    let (kept, seen) = (Arc::clone(&text), events.clone());
    jobs.keep_with(Box::new(move |text| {
        let completed = |event: &JobEvent| matches!(event, JobEvent::Completed { .. });
        let reported = seen.try_iter().any(|batch| batch.events.iter().any(completed));
        let before = std::mem::replace(&mut *kept.lock(), text.into());
        assert!(!reported || before.contains("\"phase\":\"concluded\""), "{before}");
        Ok(())
    }));
    let control = jobs.create(JobSpec { auto_dismiss: false, ..spec("j") }).unwrap();
    control.start();
    control.finish(Outcome::Done, || {
        assert_eq!(parse(&text).jobs[0].phase, JobPhase::AtWork, "its result takes effect first");
        Ok(())
    });
    let ended = parse(&text);
    assert_eq!((ended.jobs[0].phase, ended.jobs[0].offset), (JobPhase::Concluded, 4 * CHUNK));
    assert_eq!((ended.completed.successful, ended.jobs[0].error.as_ref()), (1, None));
    assert_eq!(ended.last, Some(ended.jobs[0].clone()));

    let control = jobs.create(spec("k")).unwrap();
    control.start();
    jobs.cancel("k", Force::No).unwrap();
    assert!(parse(&text).jobs[0].cancelled);
    control.finish(Outcome::Cancelled, || Ok(()));
    let ended = parse(&text);
    assert_eq!((ended.jobs.len(), ended.completed.cancelled), (1, 1), "it was dismissed");
    assert_eq!(ended.last.map(|last| last.id), Some("k".to_string()));
}

/// Protects: a job that waits for its finalize waits for it in the next process, and is reported as
/// pending once; one whose finalize was confirmed takes effect there.
#[test]
fn a_pending_job_stays_pending() {
    for finalized in [false, true] {
        let (jobs, text) = keeping();
        let control = jobs.create(JobSpec { auto_finalize: false, ..spec("j") }).unwrap();
        control.start();
        let worker = std::thread::spawn(move || control.finish(Outcome::Done, || Ok(())));
        jobs.settle("none", std::time::Duration::ZERO);
        while parse(&text).jobs[0].phase != JobPhase::Pending {
            std::thread::yield_now();
        }
        let mut kept = parse(&text);
        assert!(!kept.jobs[0].finalize);
        kept.jobs[0].finalize = finalized;
        let next = Jobs::new();
        let events = next.subscribe();
        let control = next.restore(kept, "stream").pop().unwrap();
        assert_eq!(next.query()[0].status, Status::Pending);
        let other = std::thread::spawn(move || control.finish(Outcome::Done, || Ok(())));
        if !finalized {
            assert_eq!(events.try_iter().count(), 0);
            next.apply("j", Verb::Finalize).unwrap();
        }
        other.join().unwrap();
        let pending = |event: &JobEvent| matches!(event, JobEvent::Pending { .. });
        assert!(!events.try_iter().any(|batch| batch.events.iter().any(pending)));
        assert_eq!((next.completed().successful, next.query().len()), (1, 0));
        jobs.apply("j", Verb::Finalize).unwrap();
        worker.join().unwrap();
    }
}

/// Protects: the text stays below its limit, whatever a client sends, and says so if jobs are
/// missing; a process that ends by itself keeps nothing more.
#[test]
fn the_text_has_a_limit() {
    let (jobs, text) = keeping();
    let long = "x".repeat(LONGEST_KEPT_JOBS);
    let control = jobs.create(JobSpec { request: long.clone(), ..spec("j") }).unwrap();
    control.start();
    let kept = parse(&text);
    assert_eq!((kept.jobs[0].request.as_str(), kept.jobs[0].speed, kept.left_out), ("", 7, false));
    let other = jobs.create(spec(&long)).unwrap();
    other.start();
    let kept = parse(&text);
    assert!(kept.jobs.is_empty() && kept.left_out);
    other.finish(Outcome::Cancelled, || Ok(()));
    let kept = parse(&text);
    assert!(kept.left_out && kept.completed.cancelled == 1, "the last job is as long");
    let before = text.lock().clone();
    assert!(!jobs.cancel_all_and_wait(std::time::Duration::ZERO));
    control.finish(Outcome::Cancelled, || Ok(()));
    assert_eq!(*text.lock(), before);
}

#[test]
fn nonsense_is_refused() {
    let (jobs, text) = keeping();
    let control = jobs.create(spec("j")).unwrap();
    control.start();
    let text = text.lock().clone();
    assert_eq!(KeptJobs::parse("{}").unwrap(), KeptJobs::default());
    KeptJobs::parse(&text).unwrap();
    let fast = text.replace("\"speed\":7", "\"speed\":9223372036854775808");
    let job = text.split_once('[').and_then(|(_, rest)| rest.split_once(']')).unwrap().0;
    let twice = text.replace(job, &format!("{job},{job}"));
    let nameless = text.replace("\"id\":\"j\"", "\"id\":\"1\"");
    for nonsense in ["", "7", "{\"jobs\":[{}]}", &fast, &twice, &nameless, &text[..40]] {
        assert!(KeptJobs::parse(nonsense).is_err(), "{nonsense}");
    }
    control.finish(Outcome::Cancelled, || Ok(()));
}
