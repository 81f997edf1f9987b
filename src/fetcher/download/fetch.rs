//! What a worker of a download does with one range: zeros, claims, requests, and what follows from
//! their errors.
//!
//! **Touches:** the server, the cache. **Never:** rests, or waits for another process, with a
//! claim.
//! **Locks:** as [`super`]. **Invariants:** a range is in the cache after a fetch without an error,
//! and a chunk of it is compared with the chunk list if there is one.

use std::io;
use std::ops::Range;
use std::time::{Duration, Instant};

use host::storage::{BlockStatus, Need};
use host::{Error, ErrorKind, Result};
use remote::cache::Claim;
use remote::sums::CHUNK;

use super::{Download, Failed, PART, Work, chunks, overlap};
use crate::health::{AfterFailure, Tries};
use crate::slots::MOST;
use crate::source::{Retry, SourceError};
use crate::space::full;
use crate::writer::Writer;

/// How long a worker waits before it looks again at a range that another fetcher of this host is
/// fetching. The time doubles while nothing of the range arrives, up to [`LONGEST_LOOK`].
const LOOK_AGAIN: Duration = Duration::from_millis(2);

/// The longest time of [`LOOK_AGAIN`].
const LONGEST_LOOK: Duration = Duration::from_millis(32);

/// How often a range is claimed again because write-back has failed meanwhile. A disk that fails
/// more often is broken.
const LOSSES: u32 = 4;

/// The most ranges of zeros that are remembered; those at the lowest offsets go first.
const MOST_ZEROS: usize = 1 << 16;

/// How far ahead the server is asked for ranges of zeros, in bytes.
const STATUS_AHEAD: u64 = 256 << 20;

/// The most questions for zeros at once. A server may answer each with one run only.
const MOST_QUESTIONS: u32 = 64;

/// The longest time of the questions for zeros: workers wait for the answers, and threads of the
/// guest for the workers. A server that takes longer is not asked again, because reading is faster.
const LONGEST_QUESTIONS: Duration = Duration::from_secs(5);

/// How far before its own range a worker asks for zeros, in bytes: parts that other workers have
/// taken earlier, and that have not come to ask.
const STATUS_BEFORE: u64 = MOST as u64 * PART;

/// A part of a range that is all zeros, or is read with one request.
struct Piece {
    range: Range<u64>,
    is_zero: bool,
}

/// What has ended a request before its end.
enum Ended {
    Cache(Error),
    Source(SourceError),
    /// A guest waits for something else.
    GaveWay,
}

impl Download {
    fn is_late(&self, range: &Range<u64>, begun: Instant) -> bool {
        self.deadline(range, begun).is_some_and(|deadline| Instant::now() >= deadline)
    }

    /// Brings a range into the cache. Ranges that another fetcher of this host is fetching are
    /// waited for.
    pub(super) fn fetch(&self, work: &Work) -> Result<(), Failed> {
        let Work { range, is_walk } = work;
        let of = |range: &Range<u64>| {
            let range = range.clone();
            move |error| Failed { range, error }
        };
        let begun = Instant::now();
        let (mut tries, mut losses) = (Tries::default(), 0);
        let (mut looked_at, mut look_again) = (range.start, LOOK_AGAIN);
        self.verify_present(range).map_err(of(range))?;
        while let Some(piece) = self.next_piece(range, *is_walk).map_err(of(range))? {
            let Piece { range: piece, is_zero } = piece;
            if looked_at != piece.start {
                (looked_at, look_again) = (piece.start, LOOK_AGAIN);
            }
            let claim = match self.cache.claim(&piece).map_err(of(&piece))? {
                Claim::Present => continue,
                Claim::Busy => {
                    self.wait_for_others(&piece, begun, look_again).map_err(of(&piece))?;
                    look_again = (look_again * 2).min(LONGEST_LOOK);
                    continue;
                }
                Claim::Got(claim) => claim,
            };
            if !is_zero && !self.health.try_ask() {
                drop(claim);
                let deadline = self.deadline(&piece, begun);
                // Another request may have begun to wait for the range meanwhile.
                if !self.health.wait_to_ask(deadline) && self.is_late(&piece, begun) {
                    return Err(self.unreachable()).map_err(of(&piece));
                }
                continue;
            }
            let asked = Instant::now();
            let (complete_to, ended) = if is_zero {
                match self.cache.mark_zero(&piece) {
                    Ok(()) => (piece.end, Ok(())),
                    Err(error) => (piece.start, Err(Ended::Cache(error))),
                }
            } else {
                self.ask(&piece, *is_walk)
            };
            drop(claim);
            if complete_to > piece.start {
                tries = Tries::default();
            }
            let missing = complete_to..piece.end;
            match ended {
                Ok(()) if is_zero => self.arrived(&piece, 0),
                Ok(()) => self.health.succeeded(),
                Err(Ended::Cache(error)) => {
                    if !is_zero {
                        self.health.succeeded();
                    }
                    match error.kind() {
                        // Write-back has failed since the range was claimed.
                        ErrorKind::Busy if losses < LOSSES => losses += 1,
                        // Each turn of the loop needs space that was made since the last one.
                        ErrorKind::NoSpace => {
                            if !(self.make_space)(asked).map_err(of(&missing))? {
                                return Err(full(&error)).map_err(of(&missing));
                            }
                        }
                        _ => return Err(error).map_err(of(&missing)),
                    }
                }
                Err(Ended::GaveWay) => {
                    self.health.succeeded();
                    // The part that is missing goes on when the guest is quiet. What threads wait
                    // for is queued by the end of this work.
                    self.state.lock().ahead.push(Need::Later, missing.start..range.end);
                    return Ok(());
                }
                Err(Ended::Source(error)) => {
                    if let Retry::Later { slow_down: true, .. } = error.retry {
                        self.state.lock().slots.slow_down(asked, Instant::now());
                    }
                    let is_damaged = matches!(error.retry, Retry::Damaged);
                    if complete_to > piece.start || is_damaged {
                        self.health.succeeded();
                    }
                    let deadline = self.deadline(&missing, begun);
                    match self.health.failed(&*self.source, &error, &mut tries, deadline) {
                        AfterFailure::Again(until) => self.health.rest(until),
                        // Only the chunk is damaged; the next ones may be healthy.
                        AfterFailure::Fail(error) if is_damaged => {
                            let chunk = missing.start..missing.end.min(missing.start + CHUNK);
                            return Err(error).map_err(of(&chunk));
                        }
                        AfterFailure::Fail(error) => return Err(error).map_err(of(&missing)),
                    }
                }
            }
        }
        self.verify_present(range).map_err(of(range))
    }

    /// The next part of a range that is not in the cache, in whole units: all zeros, or all to be
    /// read.
    fn next_piece(&self, range: &Range<u64>, asks_for_zeros: bool) -> Result<Option<Piece>> {
        let unit = self.unit();
        let len = range.end - range.start;
        let Some(missing) = self.cache.next_missing(range.start, len)? else { return Ok(None) };
        let start = missing.start / unit * unit;
        let end = missing.end.next_multiple_of(unit).min(self.pin.size);
        if asks_for_zeros {
            self.learn_zeros(&(start..end));
        }
        let (is_zero, end) = self.run_of(start, end);
        Ok(Some(Piece { range: start..end, is_zero }))
    }

    /// Waits a moment for the process or the thread that fetches a part of the range.
    fn wait_for_others(&self, piece: &Range<u64>, begun: Instant, pause: Duration) -> Result<()> {
        if self.is_late(piece, begun) {
            return Err(Error::new(
                ErrorKind::Io,
                format!(
                    "{}: another process of this host is fetching the range, and does not end",
                    self.health.facts().name
                ),
            ));
        }
        std::thread::sleep(pause);
        // What other processes have completed meanwhile is answered early.
        let mut state = self.state.lock();
        if state.waiting.iter().any(|waiting| overlap(&waiting.range, piece)) {
            self.answer_waiting(&mut state, piece, None);
        }
        Ok(())
    }

    /// Compares chunks that the cache holds with the chunk list, unless this process has compared
    /// them. A chunk that is not the one of the list leaves the cache, and is fetched again.
    fn verify_present(&self, range: &Range<u64>) -> Result<()> {
        let Some(sums) = &self.sums else { return Ok(()) };
        for chunk in chunks(range) {
            let bytes = sums.range(chunk);
            if self.verified.lock().contains(&chunk) || !self.cache.is_present(&bytes)? {
                continue;
            }
            let mut content = vec![0; (bytes.end - bytes.start) as usize];
            let read = self.cache.read_at(bytes.start, &mut content);
            if read.is_ok() && sums.verify(chunk, &content) {
                self.verified.lock().insert(chunk);
                self.answer_waiting(&mut self.state.lock(), &bytes, None);
            } else {
                let why = read.err().map_or_else(String::new, |error| format!(" ({error})"));
                log::warn!(
                    "{}: chunk {chunk} (1 MiB each) is damaged in the cache{why}, and is fetched again",
                    self.health.facts().name
                );
                self.cache.forget(&bytes)?;
            }
        }
        Ok(())
    }

    /// Makes one request for a range that this process has claimed. Returns up to where the range
    /// is in the cache now. A request of the walk ends early if a guest waits.
    fn ask(&self, range: &Range<u64>, is_walk: bool) -> (u64, Result<(), Ended>) {
        let mut writer = Writer::new(&self.cache, self.sums.as_ref(), range.clone());
        let asked = Instant::now();
        let mut is_first = true;
        let mut announced = range.start;
        let mut gave_way = false;
        let read = self.source.read(&self.pin, range.clone(), &mut |bytes| {
            if std::mem::take(&mut is_first) {
                self.health.answered(asked.elapsed());
            }
            self.health.arrived(bytes.len() as u64);
            let written = writer.write(bytes);
            // Also before a chunk that is damaged there can be complete ones.
            let complete = announced..writer.complete_to();
            if complete.start < complete.end {
                announced = complete.end;
                self.arrived(&complete, complete.end - complete.start);
                gave_way = is_walk && self.gives_way(&(announced..range.end));
            }
            match gave_way {
                true => written.and_then(|()| Err(io::Error::other("a guest waits"))),
                false => written,
            }
        });
        let failure = writer.take_failure();
        let ended = match failure {
            Some(error) => Err(Ended::Cache(error)),
            None if gave_way && read.is_err() => Err(Ended::GaveWay),
            None => writer.end(read).map_err(Ended::Source),
        };
        (writer.complete_to(), ended)
    }

    /// The run at `at`, up to `end`: whether it is known to be zero, and where it ends. If there is
    /// a chunk list, it alone says so.
    fn run_of(&self, at: u64, end: u64) -> (bool, u64) {
        if let Some(sums) = &self.sums {
            let mut chunks = chunks(&(at..end));
            let is_zero = chunks.next().is_some_and(|chunk| sums.is_zero(chunk));
            let other = chunks.find(|chunk| sums.is_zero(*chunk) != is_zero);
            return (is_zero, other.map_or(end, |chunk| sums.range(chunk).start));
        }
        let state = self.state.lock();
        let index = state.zeros.partition_point(|zeros| zeros.end <= at);
        match state.zeros.get(index) {
            Some(zeros) if zeros.start <= at => (true, zeros.end.min(end)),
            Some(zeros) => (false, zeros.start.min(end)),
            None => (false, end),
        }
    }

    /// Asks the server for zeros from the range on, unless it was asked before. Only whole units
    /// count: the rest is read. Another worker that comes meanwhile waits for the answer, and does
    /// not read zeros.
    fn learn_zeros(&self, range: &Range<u64>) {
        if self.sums.is_some() {
            return;
        }
        let unit = self.unit();
        let known_to = || self.state.lock().known_to;
        if range.end <= known_to() {
            return;
        }
        let _learning = self.learning.lock();
        let known_to = known_to();
        if range.end <= known_to {
            return;
        }
        let from = known_to.max(range.start.saturating_sub(STATUS_BEFORE) / unit * unit);
        let to = (from + STATUS_AHEAD).min(self.pin.size).max(range.end);
        let (holes, asked_to) = self.holes(from..to);
        let found = holes.into_iter().filter_map(|hole| {
            let start = hole.start.next_multiple_of(unit);
            let end = if hole.end == self.pin.size { hole.end } else { hole.end / unit * unit };
            (start < end).then_some(start..end)
        });
        let mut state = self.state.lock();
        state.known_to = asked_to.max(range.end);
        state.zeros.extend(found);
        state.zeros.sort_by_key(|zeros| zeros.start);
        let surplus = state.zeros.len().saturating_sub(MOST_ZEROS);
        state.zeros.drain(..surplus);
    }

    /// The holes of a range, and up to where the server has told of them. Neighbours are one hole.
    /// A server that cannot tell has no holes; one that never will is not asked again.
    fn holes(&self, range: Range<u64>) -> (Vec<Range<u64>>, u64) {
        let mut holes: Vec<Range<u64>> = Vec::new();
        let mut at = range.start;
        let asked = Instant::now();
        for _ in 0..MOST_QUESTIONS {
            if at >= range.end {
                break;
            }
            let runs = match self.source.status(&self.pin, at, range.end - at) {
                Ok(runs) if asked.elapsed() < LONGEST_QUESTIONS => runs,
                Ok(_) => return (holes, self.pin.size),
                Err(error) if matches!(error.retry, Retry::Never) => {
                    return (holes, self.pin.size);
                }
                Err(_) => return (holes, range.end),
            };
            let begun = at;
            for (status, len) in runs {
                let end = at.saturating_add(len).min(range.end);
                match holes.last_mut() {
                    _ if status != BlockStatus::Hole => {}
                    Some(last) if last.end == at => last.end = end,
                    _ => holes.push(at..end),
                }
                at = end;
            }
            if at == begun {
                return (holes, range.end);
            }
        }
        (holes, at)
    }
}
