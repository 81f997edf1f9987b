//! One open remote file: the ranges that threads wait for, the ranges that the stream will need,
//! and the threads that bring them into the cache.
//!
//! ```text
//! Want ─▶ Download::want ─▶ urgent ─▶ a worker: claim ─▶ RemoteSource::read ─▶ data, map ─▶ Have
//! WillNeed ─▶ Download::will_need ─▶ ahead ─▶ a worker that takes parts only from this queue
//! ```
//! Urgent ranges have workers of their own, which the stream cannot use up. A range that a stream
//! waits for is in the queue `ahead`. How much of that queue is on its way at the same time depends
//! on the link and on the guest ([`crate::ahead`], [`crate::slots`]).
//!
//! **Touches:** the server, the cache. **Never:** puts a byte into the map of the cache that was
//! not compared with the pin, and with the chunk list if there is one.
//! **Locks:** `state`, never held across I/O on the network or a rest; below it `verified` and the
//! lock of [`Health`], both leaves.
//! `learning`, above `state`, is held while the server is asked for zeros, and never with a claim.
//! Replies go to a channel without a bound. No claim on the cache is held across a rest.
//! **Invariants:** a request that waits is answered: a part of its range is in `urgent` or in
//! `active`, or, if it is one of a stream, in `ahead`; and each end of a part looks at all requests
//! that wait. The thread `fetch-deadline` answers a request at its deadline, also if a server
//! stalls.

mod fetch;
#[cfg(test)]
mod tests;

use std::collections::BTreeSet;
use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crossbeam_channel::Sender;
use parking_lot::{Condvar, Mutex};

use host::storage::Need;
use host::{Error, ErrorKind, Result};
use remote::cache::{BLOCK, CacheObject};
use remote::pin::Pin;
use remote::sums::{CHUNK, ChunkList};
use remote::wire::{FetchFailure, FetchReply, SourceFacts};

use crate::ahead::{AheadQueue, Link, PART, SMALL_PART, Taken, overlap, subtract};
use crate::demand::{LARGEST, Sequences};
use crate::health::Health;
use crate::slots::Slots;
use crate::source::RemoteSource;

/// The most threads that fetch ranges for which a thread waits.
const URGENT_WORKERS: usize = 48;

/// How long a worker without work waits for some before it ends.
const IDLE: Duration = Duration::from_secs(30);

/// How long a range that no thread waits for is tried if the user waits for as long as the server
/// is away.
const PATIENCE: Duration = Duration::from_secs(60);

/// An open remote file.
pub struct Download {
    source: Arc<dyn RemoteSource>,
    pin: Pin,
    cache: CacheObject,
    sums: Option<ChunkList>,
    /// The chunks that this process has compared with the chunk list.
    verified: Mutex<BTreeSet<u64>>,
    health: Health,
    /// Whether ranges leave the cache when they are in the overlay.
    keeps_nothing: bool,
    /// How long a range that no thread waits for is tried.
    patience: Option<Duration>,
    /// [`IDLE`], which tests make shorter.
    idle: Duration,
    make_space: MakeSpace,
    /// Held by the worker that asks the server for zeros; the others for ranges that will be needed
    /// wait for the answer.
    learning: Mutex<()>,
    replies: Sender<FetchReply>,
    state: Mutex<DownloadState>,
    /// Wakes the workers for ranges that threads wait for.
    urgent_work: Condvar,
    /// Wakes the workers for ranges that will be needed.
    ahead_work: Condvar,
    /// Wakes the thread `fetch-deadline`.
    deadlines: Condvar,
}

/// Frees space in the cache that no disk uses. Returns whether there is more of it than there was
/// at the given time, when the caller began to write: another thread may have made it.
pub type MakeSpace = Box<dyn Fn(Instant) -> Result<bool> + Send + Sync>;

struct DownloadState {
    urgent: Vec<Range<u64>>,
    ahead: AheadQueue,
    active: Vec<Range<u64>>,
    waiting: Vec<WaitingRange>,
    sequences: Sequences,
    slots: Slots,
    /// Ranges of zeros, in order, up to `known_to`.
    zeros: Vec<Range<u64>>,
    known_to: u64,
    urgent_workers: Workers,
    ahead_workers: Workers,
    /// Whether the cache has bytes that no commit has made durable.
    is_new: bool,
    /// Ranges that are in the overlay, and could not leave the cache because of a request in
    /// flight.
    to_free: Vec<Range<u64>>,
    has_deadline_thread: bool,
    /// The time when the thread `fetch-deadline` looks at the requests that wait; `None` if it was
    /// told of no deadline.
    look_at: Option<Instant>,
}

#[derive(Default)]
struct Workers {
    alive: usize,
    idle: usize,
}

/// A range that a thread of another process waits for.
struct WaitingRange {
    id: u64,
    range: Range<u64>,
    deadline: Option<Instant>,
    /// It works for a stream.
    is_background: bool,
}

/// A part of a range that could not be fetched, and why. The rest of the range may be healthy.
struct Failed {
    range: Range<u64>,
    error: Error,
}

/// The queue that a worker takes ranges from.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Queue {
    Urgent,
    Ahead,
}

/// A range that a worker has taken off its queue.
struct Work {
    range: Range<u64>,
    /// It is for the walk of a stream: the server is asked for zeros around the range before it is
    /// read, and the request ends early if a guest waits.
    is_walk: bool,
}

/// What a [`Download`] is made of.
pub struct DownloadParts {
    /// The name, without what may be a secret.
    pub name: String,
    /// The file on its server.
    pub source: Arc<dyn RemoteSource>,
    /// What the file is pinned to.
    pub pin: Pin,
    /// The file of the cache.
    pub cache: CacheObject,
    /// The chunk list, if the pin names one.
    pub sums: Option<ChunkList>,
    /// Whether ranges leave the cache when they are in the overlay.
    pub keeps_nothing: bool,
    /// How long a range that no thread waits for is tried; `None` has a default.
    pub patience: Option<Duration>,
    /// Called when the file system of the cache is full.
    pub make_space: MakeSpace,
}

impl Download {
    /// Starts the downloads of one file.
    pub fn new(parts: DownloadParts, replies: Sender<FetchReply>) -> Arc<Download> {
        Download::with_idle(parts, replies, IDLE)
    }

    fn with_idle(
        parts: DownloadParts,
        replies: Sender<FetchReply>,
        idle: Duration,
    ) -> Arc<Download> {
        let DownloadParts { name, source, pin, cache, sums, keeps_nothing, patience, make_space } =
            parts;
        Arc::new(Download {
            source,
            pin,
            cache,
            sums,
            verified: Mutex::default(),
            health: Health::new(name),
            keeps_nothing,
            patience,
            idle,
            make_space,
            learning: Mutex::default(),
            replies,
            state: Mutex::new(DownloadState {
                urgent: Vec::new(),
                ahead: AheadQueue::default(),
                active: Vec::new(),
                waiting: Vec::new(),
                sequences: Sequences::default(),
                slots: Slots::new(Instant::now()),
                zeros: Vec::new(),
                known_to: 0,
                urgent_workers: Workers::default(),
                ahead_workers: Workers::default(),
                // Those of a fetcher that was killed; see `CacheObject::commit`.
                is_new: true,
                to_free: Vec::new(),
                has_deadline_thread: false,
                look_at: None,
            }),
            urgent_work: Condvar::new(),
            ahead_work: Condvar::new(),
            deadlines: Condvar::new(),
        })
    }

    /// What the file is pinned to.
    pub fn pin(&self) -> &Pin {
        &self.pin
    }

    /// What is known of the server and of the cache.
    pub fn facts(&self) -> SourceFacts {
        let cached_bytes = self.cache.present_bytes().unwrap_or(0);
        SourceFacts { cached_bytes, ..self.health.facts() }
    }

    /// The unit of fetches in bytes: a chunk of the list, or a block of the cache.
    fn unit(&self) -> u64 {
        if self.sums.is_some() { CHUNK } else { BLOCK }
    }

    /// The range in whole units, inside the file; `None` if it lies beyond its end.
    fn whole_units(&self, offset: u64, len: u64) -> Option<Range<u64>> {
        if offset >= self.pin.size {
            return None;
        }
        let unit = self.unit();
        let start = offset / unit * unit;
        let end = offset.checked_add(len)?.min(self.pin.size).checked_next_multiple_of(unit)?;
        let range = start..end.min(self.pin.size);
        (range.start < range.end).then_some(range)
    }

    /// Answers the request `id` when the range is in the cache, or with an error when `patience`
    /// is over. With `is_background` no guest waits: the range is queued behind what is needed soon
    /// or next, and before the rest of the walk.
    pub fn want(
        self: &Arc<Self>,
        id: u64,
        range: Range<u64>,
        patience: Option<Duration>,
        is_background: bool,
    ) {
        let len = range.end.saturating_sub(range.start);
        let Some(range) = self.whole_units(range.start, len) else {
            self.reply(FetchReply::Have { id });
            return;
        };
        let deadline = patience.map(|patience| Instant::now() + patience);
        let mut state = self.state.lock();
        if self.is_usable(&range) {
            drop(state);
            self.reply(FetchReply::Have { id });
            return;
        }
        if !is_background {
            state.ahead.guest_waits(Instant::now());
        }
        // What a stream waits for goes before the rest of its walk, also if it is queued already.
        for gap in state.not_on_their_way(range.clone(), false) {
            if self.is_usable(&gap) {
                continue;
            }
            let planned = match is_background {
                true => gap,
                false => state.sequences.plan(gap, self.unit(), self.pin.size),
            };
            for piece in state.not_on_their_way(planned, false) {
                if !self.is_usable(&piece) {
                    state.queue(piece, is_background);
                }
            }
        }
        if !state.is_on_its_way(&range, is_background) {
            // Another process has completed the range since it was looked at above.
            if self.is_usable(&range) {
                drop(state);
                self.reply(FetchReply::Have { id });
                return;
            }
            state.queue(range.clone(), is_background);
        }
        state.waiting.push(WaitingRange { id, range, deadline, is_background });
        let queue = if is_background { Queue::Ahead } else { Queue::Urgent };
        self.wake_workers(&mut state, queue);
        if let Some(deadline) = deadline {
            self.watch(&mut state, deadline);
        }
    }

    /// Makes sure that the thread `fetch-deadline` looks at the requests that wait at `deadline`.
    fn watch(self: &Arc<Self>, state: &mut DownloadState, deadline: Instant) {
        if state.look_at.is_some_and(|look_at| look_at <= deadline) {
            return;
        }
        state.look_at = Some(deadline);
        self.deadlines.notify_one();
        if !state.has_deadline_thread {
            let this = Arc::clone(self);
            let started = std::thread::Builder::new()
                .name("fetch-deadline".into())
                .spawn(move || this.hold_deadlines());
            match started {
                Ok(_) => state.has_deadline_thread = true,
                Err(error) => {
                    // The next request that waits tries again.
                    state.look_at = None;
                    log::warn!("a thread that fetches could not be started: {error}");
                }
            }
        }
    }

    /// The thread `fetch-deadline`: answers requests whose deadline has come.
    fn hold_deadlines(&self) {
        let mut state = self.state.lock();
        loop {
            let now = Instant::now();
            state.waiting.retain(|waiting| {
                let is_late = waiting.deadline.is_some_and(|deadline| now >= deadline);
                if is_late {
                    self.refuse(waiting.id, &self.unreachable());
                }
                !is_late
            });
            state.look_at = state.waiting.iter().filter_map(|waiting| waiting.deadline).min();
            match state.look_at {
                Some(look_at) => drop(self.deadlines.wait_until(&mut state, look_at)),
                None => self.deadlines.wait(&mut state),
            }
        }
    }

    /// Queues a range for the workers that fetch what the stream will need.
    pub fn will_need(self: &Arc<Self>, offset: u64, len: u64, need: Need) {
        let Some(range) = self.whole_units(offset, len) else { return };
        let mut state = self.state.lock();
        for gap in state.not_on_their_way(range, false) {
            let mut at = gap.start;
            while at < gap.end {
                let end = (at / PART * PART + PART).min(gap.end);
                if !self.is_usable(&(at..end)) {
                    state.ahead.push(need, at..end);
                }
                at = end;
            }
        }
        self.wake_workers(&mut state, Queue::Ahead);
    }

    /// Forgets the ranges that will be needed, unless they are being fetched or a stream waits for
    /// them.
    pub fn enough(&self) {
        let mut state = self.state.lock();
        let DownloadState { ahead, waiting, .. } = &mut *state;
        ahead.clear(|range| {
            waiting.iter().any(|waiting| waiting.is_background && overlap(&waiting.range, range))
        });
    }

    /// What is known of the way to the server.
    fn link(&self, state: &DownloadState) -> Link {
        Link {
            slots: state.slots.limit(),
            is_slowed: state.slots.is_slowed(Instant::now()),
            rate: state.slots.rate(),
            latency: self.health.shortest_latency(),
            part: self.source.part(),
            unit: self.unit(),
        }
    }

    /// Whether the range may be answered from the cache.
    fn is_usable(&self, range: &Range<u64>) -> bool {
        let verified = self.verified.lock();
        let is_verified =
            self.sums.is_none() || chunks(range).all(|chunk| verified.contains(&chunk));
        is_verified && self.cache.is_present(range).unwrap_or(false)
    }

    fn work(&self, queue: Queue) -> &Condvar {
        match queue {
            Queue::Urgent => &self.urgent_work,
            Queue::Ahead => &self.ahead_work,
        }
    }

    /// Wakes idle workers, or starts some. The lock on `state` is held by the caller.
    fn wake_workers(self: &Arc<Self>, state: &mut DownloadState, queue: Queue) {
        let (queued, most) = match queue {
            Queue::Urgent => (state.urgent.len(), URGENT_WORKERS),
            // Each worker wakes the next one when it has taken a part of a long range.
            Queue::Ahead => (state.ahead.len(), state.ahead.most_workers(&self.link(state))),
        };
        for _ in 0..queued.min(state.workers(queue).idle) {
            self.work(queue).notify_one();
        }
        while state.workers(queue).idle < queued && state.workers(queue).alive < most {
            let this = Arc::clone(self);
            let name = match queue {
                Queue::Urgent => "fetch-urgent",
                Queue::Ahead => "fetch-ahead",
            };
            let started =
                std::thread::Builder::new().name(name.into()).spawn(move || this.run(queue));
            if let Err(error) = started {
                log::warn!("a thread that fetches could not be started: {error}");
                if state.workers(queue).alive == 0 {
                    // No thread would ever take them.
                    let error = Error::io("a thread that fetches could not be started", error);
                    let is_stuck =
                        |waiting: &WaitingRange| queue == Queue::Urgent || waiting.is_background;
                    let (stuck, others) =
                        std::mem::take(&mut state.waiting).into_iter().partition(is_stuck);
                    state.waiting = others;
                    let stuck: Vec<WaitingRange> = stuck;
                    stuck.iter().for_each(|waiting| self.refuse(waiting.id, &error));
                    if queue == Queue::Urgent {
                        state.urgent.clear();
                    }
                }
                break;
            }
            let workers = state.workers(queue);
            workers.alive += 1;
            workers.idle += 1;
        }
    }

    /// One worker, which ends when it had no work for [`IDLE`].
    fn run(self: Arc<Self>, queue: Queue) {
        loop {
            let work = {
                let mut state = self.state.lock();
                let mut is_over = false;
                loop {
                    let taken = match queue {
                        Queue::Urgent => state.take_urgent(),
                        Queue::Ahead => {
                            let link = self.link(&state);
                            state.ahead.take(Instant::now(), &link)
                        }
                    };
                    if let Taken::Range(need, range) = taken {
                        state.workers(queue).idle -= 1;
                        state.active.push(range.clone());
                        if queue == Queue::Ahead {
                            self.wake_workers(&mut state, queue);
                        }
                        let is_walk = queue == Queue::Ahead && need == Need::Later;
                        break Work { range, is_walk };
                    }
                    if is_over {
                        // Under the same lock as the look at the queue: what is queued later finds
                        // no idle worker here, and starts one.
                        let workers = state.workers(queue);
                        (workers.alive, workers.idle) = (workers.alive - 1, workers.idle - 1);
                        return;
                    }
                    if queue == Queue::Ahead && state.active.is_empty() {
                        state.slots.idle(Instant::now());
                    }
                    let wait = match taken {
                        Taken::After(wait) => wait,
                        _ => self.idle,
                    };
                    let timed_out = self.work(queue).wait_for(&mut state, wait).timed_out();
                    is_over = timed_out && wait == self.idle;
                }
            };
            let fetched = self.fetch(&work);
            self.finish(work.range, fetched, queue);
        }
    }

    /// Ends the work on a range: answers the threads that wait for it.
    fn finish(self: &Arc<Self>, range: Range<u64>, fetched: Result<(), Failed>, queue: Queue) {
        let mut state = self.state.lock();
        if let Some(index) = state.active.iter().position(|active| *active == range) {
            state.active.swap_remove(index);
        }
        state.workers(queue).idle += 1;
        if queue == Queue::Ahead {
            state.ahead.ended(&range);
            state.slots.completed(Instant::now());
        }
        self.answer_waiting(&mut state, &range, fetched.as_ref().err());
        // The part beyond a failed one is fetched if a thread waits for it. Blocks can also leave
        // the cache again before their thread is answered: they are fetched again.
        let waiting: Vec<_> = state
            .waiting
            .iter()
            .map(|waiting| (waiting.range.clone(), waiting.is_background))
            .collect();
        for (range, is_background) in waiting {
            for gap in state.not_on_their_way(range.clone(), is_background) {
                if !self.is_usable(&gap) {
                    state.queue(gap, is_background);
                }
            }
            if !state.is_on_its_way(&range, is_background) {
                if self.is_usable(&range) {
                    self.answer_waiting(&mut state, &range, None);
                } else {
                    state.queue(range, is_background);
                }
            }
        }
        self.wake_workers(&mut state, Queue::Urgent);
        self.wake_workers(&mut state, Queue::Ahead);
        let to_free = std::mem::take(&mut state.to_free);
        drop(state);
        self.free(to_free);
    }

    /// Answers the requests that wait for a part of `range` and whose own range is complete, and,
    /// with the error, those that wait for what has failed.
    fn answer_waiting(
        &self,
        state: &mut DownloadState,
        range: &Range<u64>,
        failed: Option<&Failed>,
    ) {
        state.waiting.retain(|waiting| {
            if !overlap(&waiting.range, range) {
                return true;
            }
            if self.is_usable(&waiting.range) {
                self.reply(FetchReply::Have { id: waiting.id });
                return false;
            }
            match failed {
                Some(failed) if overlap(&waiting.range, &failed.range) => {
                    self.refuse(waiting.id, &failed.error);
                    false
                }
                _ => true,
            }
        });
    }

    /// The time when the last thread that waits for a part of the range gives up; `None` if one
    /// waits without end.
    fn deadline(&self, range: &Range<u64>, begun: Instant) -> Option<Instant> {
        let state = self.state.lock();
        let mut waiting =
            state.waiting.iter().filter(|waiting| overlap(&waiting.range, range)).peekable();
        if waiting.peek().is_none() {
            return Some(begun + self.patience.unwrap_or(PATIENCE));
        }
        waiting.map(|waiting| waiting.deadline).reduce(|a, b| Some(a?.max(b?))).flatten()
    }

    /// Notes that a range of the cache is complete, and answers the threads that waited for it.
    fn arrived(&self, range: &Range<u64>, bytes: u64) {
        if self.sums.is_some() {
            self.verified.lock().extend(chunks(range));
        }
        let mut state = self.state.lock();
        state.slots.arrived(bytes);
        state.is_new = true;
        if state.waiting.iter().any(|waiting| overlap(&waiting.range, range)) {
            self.answer_waiting(&mut state, range, None);
        }
    }

    /// Whether a request of the walk ends that has `left` to fetch.
    fn gives_way(&self, left: &Range<u64>) -> bool {
        let state = self.state.lock();
        let soon = left.start..left.start.saturating_add(SMALL_PART).min(left.end);
        state.ahead.gives_way(Instant::now(), left)
            && !state.waiting.iter().any(|waiting| overlap(&waiting.range, &soon))
    }

    /// Makes durable what is new in the cache.
    ///
    /// # Errors
    /// Those of [`CacheObject::commit`].
    pub fn commit(&self) -> Result<()> {
        let is_new = std::mem::take(&mut self.state.lock().is_new);
        if !is_new {
            return Ok(());
        }
        // After an error the blocks are absent, or the commit is to be tried again.
        self.cache.commit().inspect_err(|_| self.state.lock().is_new = true)
    }

    /// Frees a range that is in the overlay, if the cache keeps nothing.
    pub fn done(&self, offset: u64, len: u64) {
        let Some(end) = offset.checked_add(len).filter(|end| *end <= self.pin.size) else { return };
        if self.keeps_nothing {
            self.free(std::iter::once(offset..end));
        }
    }

    /// Frees ranges. Those that are claimed by a request in flight are freed when it ends.
    fn free(&self, ranges: impl IntoIterator<Item = Range<u64>>) {
        for range in ranges {
            match self.cache.punch(&range) {
                Ok(true) => {}
                Ok(false) => {
                    let mut state = self.state.lock();
                    if state.active.iter().any(|active| overlap(active, &range)) {
                        state.to_free.push(range);
                        continue;
                    }
                    // The request has ended meanwhile; its claim went before.
                    drop(state);
                    if let Err(error) = self.cache.punch(&range) {
                        log::debug!("{error}");
                    }
                }
                Err(error) => log::debug!("{error}"),
            }
        }
    }

    fn unreachable(&self) -> Error {
        let facts = self.health.facts();
        let why = facts.last_error.map_or_else(String::new, |(error, _)| format!(": {error}"));
        Error::new(
            ErrorKind::Io,
            format!("{}: the server does not answer in time{why}", facts.name),
        )
    }

    fn refuse(&self, id: u64, error: &Error) {
        let failure = FetchFailure { kind: error.kind(), text: error.to_string() };
        self.reply(FetchReply::Failed { id, failure });
    }

    fn reply(&self, reply: FetchReply) {
        // The receiver ends with the process.
        let _ = self.replies.send(reply);
    }
}

impl DownloadState {
    /// Takes an urgent range off its queue, with its neighbours.
    fn take_urgent(&mut self) -> Taken {
        if self.urgent.is_empty() {
            return Taken::Nothing;
        }
        let mut range = self.urgent.remove(0);
        // What is longer is fetched by several workers at the same time.
        while let Some(index) = self
            .urgent
            .iter()
            .position(|next| next.start == range.end && next.end - range.start <= LARGEST)
        {
            range.end = self.urgent.remove(index).end;
        }
        Taken::Range(Need::Soon, range)
    }

    fn workers(&mut self, queue: Queue) -> &mut Workers {
        match queue {
            Queue::Urgent => &mut self.urgent_workers,
            Queue::Ahead => &mut self.ahead_workers,
        }
    }

    /// Queues a range that a thread waits for.
    fn queue(&mut self, range: Range<u64>, is_background: bool) {
        if is_background {
            self.ahead.push_first(range);
        } else {
            self.ahead.withdraw(&range);
            self.urgent.push(range);
        }
    }

    /// Whether a part of the range is being fetched or is in `urgent`, or, for a request of the
    /// background, in `ahead`.
    fn is_on_its_way(&self, range: &Range<u64>, is_background: bool) -> bool {
        self.active.iter().chain(&self.urgent).any(|taken| overlap(taken, range))
            || is_background && self.ahead.overlaps(range)
    }

    /// The parts of a range for which [`DownloadState::is_on_its_way`] is false.
    fn not_on_their_way(&self, range: Range<u64>, is_background: bool) -> Vec<Range<u64>> {
        let mut parts = vec![range];
        for taken in self.active.iter().chain(&self.urgent) {
            parts = subtract(&parts, taken);
        }
        if is_background { self.ahead.without(parts) } else { parts }
    }
}

/// The chunks of the list that overlap a range.
fn chunks(range: &Range<u64>) -> Range<u64> {
    range.start / CHUNK..range.end.div_ceil(CHUNK)
}
