//! Whether the server of a file answers, when a failed request is made again, and what is told
//! about it.
//!
//! **Touches:** nothing; it waits. **Never:** lets a thread wait past its deadline.
//! **Locks:** one leaf lock, `state`; a thread that rests waits for it with a condition variable.
//! **Invariants:** while the server is away, one thread at a time asks it, and not before
//! `probe_at`; the first byte of the file ends that. A thread that waits with a deadline moves
//! `probe_at` to the middle of its time, but not before the end of a rest that the server has asked
//! for, so that its request does not fail without a try.

use std::time::{Duration, Instant, SystemTime};

use parking_lot::{Condvar, Mutex};

use host::{Error, ErrorKind, Result};
use remote::url::SourceUrl;
use remote::wire::SourceFacts;

use crate::source::{RemoteSource, Retry, SourceError};

/// The upper bound of the first rest before a request is made again; it doubles with each failure.
const FIRST_REST: Duration = Duration::from_millis(100);

/// The longest rest.
const LONGEST_REST: Duration = Duration::from_secs(5);

/// The longest rest that a server gets by asking for it (`Retry-After`). A server that asks for
/// more is asked again earlier than it wants.
const LONGEST_ASKED: Duration = Duration::from_secs(60);

/// After this many failures in a row one thread at a time tries the server.
const PROBE_AFTER: u32 = 3;

/// The state of one server, as one file sees it.
#[derive(Debug)]
pub struct Health {
    state: Mutex<HealthState>,
    changed: Condvar,
}

#[derive(Debug)]
struct HealthState {
    facts: SourceFacts,
    shortest: Option<Duration>,
    failures_in_a_row: u32,
    is_probing: bool,
    /// The time before which a server that is away is not asked.
    probe_at: Instant,
    /// The end of the rest that the server has asked for (`Retry-After`).
    asked_rest_ends: Instant,
    /// How often the server has answered after it was away.
    recoveries: u64,
}

impl HealthState {
    fn is_away(&self) -> bool {
        self.failures_in_a_row >= PROBE_AFTER
    }

    fn may_be_asked(&self, now: Instant) -> bool {
        !self.is_away() || (!self.is_probing && now >= self.probe_at)
    }
}

/// What a thread does after a failed request.
#[derive(Debug)]
pub enum AfterFailure {
    /// Make it again after [`Health::rest`] until this time.
    Again(Instant),
    /// Give up.
    Fail(Error),
}

/// The tries of one range, since its last bytes have arrived.
#[derive(Debug, Default)]
pub struct Tries {
    failures: u32,
    had_new_credentials: bool,
    was_damaged: bool,
}

impl Health {
    /// The state of a server that was not asked yet.
    pub fn new(name: String) -> Health {
        let facts = SourceFacts { name, up: true, ..SourceFacts::default() };
        Health {
            state: Mutex::new(HealthState {
                facts,
                shortest: None,
                failures_in_a_row: 0,
                is_probing: false,
                probe_at: Instant::now(),
                asked_rest_ends: Instant::now(),
                recoveries: 0,
            }),
            changed: Condvar::new(),
        }
    }

    /// The same for an open, whose caller tells the error: a server that is away is not logged.
    pub fn untold(name: String) -> Health {
        let health = Health::new(name);
        health.state.lock().facts.up = false;
        health
    }

    /// What is known of the server.
    pub fn facts(&self) -> SourceFacts {
        self.state.lock().facts.clone()
    }

    /// Whether this thread may ask the server now. After true the thread calls
    /// [`Health::succeeded`] or [`Health::failed`].
    pub fn try_ask(&self) -> bool {
        let mut state = self.state.lock();
        if !state.may_be_asked(Instant::now()) {
            return false;
        }
        state.is_probing = state.is_away();
        state.facts.requests += 1;
        true
    }

    /// Waits until [`Health::try_ask`] makes sense. Returns false at the deadline. If the server is
    /// not asked before, it is asked after half of the time, unless it has asked for a longer rest.
    pub fn wait_to_ask(&self, deadline: Option<Instant>) -> bool {
        let mut state = self.state.lock();
        let begun = Instant::now();
        let half = deadline.map(|deadline| begun + deadline.saturating_duration_since(begun) / 2);
        loop {
            let now = Instant::now();
            if let Some(half) = half.filter(|half| now < *half) {
                state.probe_at = state.probe_at.min(half.max(state.asked_rest_ends));
            }
            if state.may_be_asked(now) {
                return true;
            }
            if deadline.is_some_and(|deadline| now >= deadline) {
                return false;
            }
            let probe_at = (!state.is_probing).then_some(state.probe_at);
            match probe_at.into_iter().chain(deadline).min() {
                Some(until) => drop(self.changed.wait_until(&mut state, until)),
                None => self.changed.wait(&mut state),
            }
        }
    }

    /// Waits until a time, or until a server that was away answers another thread.
    pub fn rest(&self, until: Instant) {
        let mut state = self.state.lock();
        let recoveries = state.recoveries;
        while state.recoveries == recoveries && Instant::now() < until {
            self.changed.wait_until(&mut state, until);
        }
    }

    /// Notes the first byte of an answer. If the server was away, all threads may ask it now: the
    /// rest of this answer may take longer than they can wait.
    pub fn answered(&self, after: Duration) {
        let mut state = self.state.lock();
        if state.is_away() {
            // One more failure, and it is away again.
            state.failures_in_a_row = PROBE_AFTER - 1;
            state.is_probing = false;
            state.recoveries += 1;
            self.changed.notify_all();
        }
        state.shortest = Some(state.shortest.map_or(after, |before| before.min(after)));
        let us = after.as_micros() as u64;
        let facts = &mut state.facts;
        facts.latency_us = if facts.latency_us == 0 { us } else { (facts.latency_us * 7 + us) / 8 };
    }

    /// The shortest time from a request to the first byte of its answer; 0 before the first one.
    pub fn shortest_latency(&self) -> Duration {
        self.state.lock().shortest.unwrap_or_default()
    }

    /// Notes bytes that have arrived.
    pub fn arrived(&self, bytes: u64) {
        self.state.lock().facts.fetched_bytes += bytes;
    }

    /// Notes a request that succeeded.
    pub fn succeeded(&self) {
        let mut state = self.state.lock();
        if !state.facts.up {
            log::info!("{}: answers again", state.facts.name);
        }
        state.facts.up = true;
        if state.is_away() {
            state.recoveries += 1;
        }
        state.failures_in_a_row = 0;
        state.is_probing = false;
        self.changed.notify_all();
    }

    /// Notes a request that failed, and says when to make it again. `deadline` is the time when the
    /// last thread that waits for the range gives up; `None` if one waits without end.
    pub fn failed(
        &self,
        source: &dyn RemoteSource,
        error: &SourceError,
        tries: &mut Tries,
        deadline: Option<Instant>,
    ) -> AfterFailure {
        tries.failures += 1;
        let failures = tries.failures;
        let now = Instant::now();
        let (rest, name) = {
            let mut state = self.state.lock();
            state.is_probing = false;
            // Damage says nothing against the server, and a failure of the cache even less.
            if !matches!(error.retry, Retry::Local(_) | Retry::Damaged) {
                if matches!(error.retry, Retry::AtOnce | Retry::Later { .. }) {
                    state.failures_in_a_row = state.failures_in_a_row.saturating_add(1);
                    if state.facts.up && state.is_away() {
                        log::warn!("{}; trying again", error.about(&state.facts.name));
                        state.facts.up = false;
                    }
                } else {
                    // It answers, though not with the bytes.
                    state.facts.up = false;
                    state.failures_in_a_row = 0;
                }
                state.facts.last_error = Some((error.to_string(), seconds_since_1970()));
            }
            let rest = match error.retry {
                Retry::AtOnce if failures == 1 => Duration::ZERO,
                Retry::Later { after, .. } => {
                    let asked = after.unwrap_or_default().min(LONGEST_ASKED);
                    state.asked_rest_ends = state.asked_rest_ends.max(now + asked);
                    jittered(failures).max(asked)
                }
                _ => jittered(failures),
            };
            state.probe_at = now + rest.max(jittered(state.failures_in_a_row));
            self.changed.notify_all();
            (rest, state.facts.name.clone())
        };
        let fail = |text: String| AfterFailure::Fail(Error::new(ErrorKind::Io, text));
        let rest = match &error.retry {
            Retry::AtOnce | Retry::Later { .. } => rest,
            Retry::Credentials if !tries.had_new_credentials => {
                tries.had_new_credentials = true;
                if let Err(error) = source.refresh() {
                    return fail(error.about(&name));
                }
                Duration::ZERO
            }
            Retry::Damaged if !tries.was_damaged => {
                tries.was_damaged = true;
                Duration::ZERO
            }
            Retry::Local(local) => {
                let kind = Error::io("", copy_of(local)).kind();
                return AfterFailure::Fail(Error::new(kind, error.about(&name)));
            }
            Retry::Changed => {
                return AfterFailure::Fail(Error::new(
                    ErrorKind::Corrupt,
                    format!(
                        "{name}: is not the file that the disk was made with ({error}): what was not fetched yet is lost unless the old file comes back"
                    ),
                ));
            }
            Retry::Credentials | Retry::Damaged | Retry::Never => {
                return fail(error.about(&name));
            }
        };
        let left = deadline.map(|deadline| deadline.saturating_duration_since(now));
        let rest = match left {
            Some(left) if left <= FIRST_REST.min(rest) || is_asked_for(&error.retry, left) => {
                return fail(format!("{} (after {failures} tries)", error.about(&name)));
            }
            // One more try fits before the deadline.
            Some(left) => rest.min(left / 2),
            None => rest,
        };
        self.state.lock().facts.retries += 1;
        AfterFailure::Again(now + rest)
    }
}

/// Whether the server has asked for a rest that does not end before the deadline.
fn is_asked_for(retry: &Retry, left: Duration) -> bool {
    matches!(retry, Retry::Later { after: Some(after), .. } if (*after).min(LONGEST_ASKED) >= left)
}

fn copy_of(error: &std::io::Error) -> std::io::Error {
    match error.raw_os_error() {
        Some(errno) => std::io::Error::from_raw_os_error(errno),
        None => std::io::Error::from(error.kind()),
    }
}

/// A random rest with an upper bound that doubles with each failure ("full jitter"), so that many
/// hosts do not come back at the same moment.
fn jittered(failures: u32) -> Duration {
    use std::hash::{BuildHasher, Hasher};
    let bound = FIRST_REST
        .saturating_mul(1 << failures.saturating_sub(1).min(10))
        .min(LONGEST_REST)
        .as_micros() as u64;
    let random = std::hash::RandomState::new().build_hasher().finish();
    Duration::from_micros(random % bound.max(1))
}

fn seconds_since_1970() -> u64 {
    SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

/// Asks a server until it answers, until `deadline`, or until asking again makes no sense.
pub(crate) fn retried<T>(
    url: &SourceUrl,
    source: &dyn RemoteSource,
    deadline: Option<Instant>,
    ask: impl Fn() -> std::result::Result<T, SourceError>,
) -> Result<T> {
    let health = match deadline {
        Some(_) => Health::untold(url.to_string()),
        None => Health::new(url.to_string()),
    };
    let mut tries = Tries::default();
    loop {
        match ask() {
            Ok(answer) => return Ok(answer),
            Err(error) => match health.failed(source, &error, &mut tries, deadline) {
                AfterFailure::Again(until) => health.rest(until),
                AfterFailure::Fail(error) => return Err(error),
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use remote::pin::Pin;
    use std::ops::Range;

    #[derive(Debug)]
    struct NoServer;

    impl RemoteSource for NoServer {
        fn look(&self) -> Result<Pin, SourceError> {
            Err(SourceError::new(Retry::Never, "no server"))
        }

        fn read(
            &self,
            _: &Pin,
            _: Range<u64>,
            _: &mut crate::source::Sink<'_>,
        ) -> Result<(), SourceError> {
            Err(SourceError::new(Retry::Never, "no server"))
        }
    }

    fn fail(health: &Health, retry: Retry, deadline: Option<Instant>) -> AfterFailure {
        let error = SourceError::new(retry, "down");
        health.failed(&NoServer, &error, &mut Tries::default(), deadline)
    }

    #[test]
    fn one_thread_at_a_time_asks_a_server_that_is_away() {
        let health = Health::new("base.raw".into());
        for _ in 0..PROBE_AFTER {
            assert!(health.try_ask());
            assert!(matches!(fail(&health, Retry::LATER, None), AfterFailure::Again(_)));
        }
        assert!(!health.facts().up);
        assert!(health.wait_to_ask(None));
        assert!(health.try_ask());
        assert!(!health.try_ask(), "another thread asks already");
        assert!(!health.wait_to_ask(Some(Instant::now())), "the deadline");
        std::thread::scope(|scope| {
            let waiting = scope.spawn(|| health.wait_to_ask(None));
            health.rest(Instant::now());
            health.succeeded();
            assert!(waiting.join().unwrap());
        });
        assert!(health.facts().up);
        assert!(health.try_ask() && health.try_ask());
    }

    /// Protects: a server that is back, but needs long for the part with which one thread tries it,
    /// serves the other threads meanwhile.
    #[test]
    fn the_first_byte_lets_all_threads_ask_again() {
        let health = &Health::new("base.raw".into());
        for _ in 0..PROBE_AFTER {
            fail(health, Retry::LATER, None);
        }
        assert!(health.wait_to_ask(None) && health.try_ask());
        assert!(!health.wait_to_ask(Some(Instant::now() + Duration::from_millis(10))));
        std::thread::scope(|scope| {
            let hangs = Instant::now() + Duration::from_secs(60);
            let waiting = scope.spawn(move || health.wait_to_ask(Some(hangs)));
            health.answered(Duration::from_millis(1));
            assert!(waiting.join().unwrap());
        });
        assert!(health.try_ask() && health.try_ask());
        // A server that breaks each answer stays away.
        assert!(matches!(fail(health, Retry::LATER, None), AfterFailure::Again(_)));
        assert!(health.state.lock().is_away());
        health.succeeded();
        assert!(health.facts().up);
    }

    /// Protects: after a long time away, a request with a short deadline asks the server before it
    /// gives up, unless the server has asked for a rest.
    #[test]
    fn a_deadline_that_comes_before_the_next_probe_has_a_try_of_its_own() {
        let health = Health::new("base.raw".into());
        let far = Instant::now() + Duration::from_secs(3600);
        for _ in 0..PROBE_AFTER {
            fail(&health, Retry::LATER, None);
        }
        health.state.lock().probe_at = far;
        let begun = Instant::now();
        let soon = begun + Duration::from_millis(200);
        assert!(health.wait_to_ask(Some(soon)), "no try before the deadline");
        assert!(begun.elapsed() >= Duration::from_millis(100), "it asks at once");
        assert!(health.try_ask());

        let asked = Retry::Later { after: Some(Duration::from_secs(30)), slow_down: false };
        fail(&health, asked, None);
        assert!(!health.wait_to_ask(Some(Instant::now() + Duration::from_millis(50))));
    }

    #[test]
    fn a_rest_ends_when_the_server_answers_another_thread() {
        let health = Health::new("base.raw".into());
        for _ in 0..PROBE_AFTER {
            fail(&health, Retry::LATER, None);
        }
        let begun = Instant::now();
        std::thread::scope(|scope| {
            let resting = scope.spawn(|| health.rest(begun + Duration::from_secs(60)));
            while !resting.is_finished() {
                // The thread may not have begun to rest at the first turn.
                health.succeeded();
                for _ in 0..PROBE_AFTER {
                    fail(&health, Retry::LATER, None);
                }
                health.succeeded();
                std::thread::yield_now();
                if begun.elapsed() >= Duration::from_secs(60) {
                    break;
                }
            }
        });
        assert!(begun.elapsed() < Duration::from_secs(60), "rested until the end");
    }

    #[test]
    fn no_request_is_made_again_after_the_deadline() {
        let health = Health::new("base.raw".into());
        let now = Instant::now();
        assert!(matches!(fail(&health, Retry::LATER, Some(now)), AfterFailure::Fail(_)));
        let asked =
            |seconds| Retry::Later { after: Some(Duration::from_secs(seconds)), slow_down: false };
        let soon = Some(now + Duration::from_secs(30));
        assert!(matches!(fail(&health, asked(31), soon), AfterFailure::Fail(_)));
        let AfterFailure::Again(until) = fail(&health, asked(20), None) else { panic!("gives up") };
        assert!(until >= now + Duration::from_secs(20));
        let AfterFailure::Again(until) = fail(&health, asked(100_000), None) else {
            panic!("gives up")
        };
        assert!(until <= Instant::now() + LONGEST_ASKED);
    }

    #[test]
    fn the_upper_bound_of_rests_doubles_and_has_an_end() {
        for (failures, most) in [(1, 100), (2, 200), (5, 1600), (7, 5000), (u32::MAX, 5000)] {
            for _ in 0..100 {
                assert!(jittered(failures) < Duration::from_millis(most));
            }
        }
    }
}
