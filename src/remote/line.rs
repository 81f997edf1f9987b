//! The line to the fetcher: requests of many threads over one socket, and a new fetcher when the
//! old one has died.
//!
//! No thread of its own receives the replies, because the serving process asks before it may start
//! threads. Of the threads that wait for a reply, one at a time leads: it receives messages, hands
//! each reply to the thread that waits for it, and passes the lead on when it has its own reply. A
//! leader that finds the socket closed starts a new fetcher, opens all files again and repeats the
//! requests that wait.
//!
//! **Touches:** the socket. **Never:** waits past the deadline of a request.
//! **Locks:** `state`; it is held for a send only if the socket has space, so a fetcher that is
//! slow to read, or stopped, delays no deadline. Below it are the locks that a [`Reopened`] takes.
//! **Invariants:** if a request waits, a thread leads or has been told to lead. A request that the
//! socket had no space for is sent by the thread that waits for it.

use std::collections::BTreeMap;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};
use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::io::Errno;

use host::{Error, ErrorKind, Result, packet};

use crate::wire::{FetchFailure, FetchReply, FetchRequest, LONGEST, SourceFacts};

/// Starts a fetcher.
pub type Starter = Box<dyn Fn() -> Result<StartedFetcher> + Send + Sync>;

/// A fetcher that was started.
#[derive(Debug)]
pub struct StartedFetcher {
    /// The socket to it.
    pub socket: OwnedFd,
    /// Why the fetcher before it has ended, as far as that is known and was not in order.
    pub before: Option<String>,
}

impl From<OwnedFd> for StartedFetcher {
    fn from(socket: OwnedFd) -> StartedFetcher {
        StartedFetcher { socket, before: None }
    }
}

/// Takes the descriptors of a file that a new fetcher has opened again.
pub type Reopened = Box<dyn Fn(Vec<OwnedFd>) -> Result<()> + Send + Sync>;

/// The shortest time between two starts of a fetcher.
const RESTART_PAUSE: Duration = Duration::from_secs(1);

/// How long a thread waits before it sends again what the socket had no space for.
const SEND_AGAIN: Duration = Duration::from_millis(10);

/// So many fetchers in a row may end without any answer before the first file is open.
const STARTS_IN_VAIN: u32 = 3;

/// How long a leader waits for a message before it looks at its deadline again.
const LONGEST_WAIT: Duration = Duration::from_secs(1);

/// The line to the fetcher.
pub struct FetcherLine {
    start: Starter,
    state: Mutex<LineState>,
}

struct LineState {
    /// `None` while there is no fetcher.
    socket: Option<Arc<OwnedFd>>,
    /// The time before which no fetcher is started.
    not_before: Instant,
    /// The fetchers that were started since the last reply.
    starts: u32,
    /// Why there was no fetcher, if there was no reply since.
    trouble: Option<String>,
    last_id: u64,
    is_led: bool,
    waiting: BTreeMap<u64, Waiting>,
    files: Vec<LineFile>,
}

/// A request that waits for its reply.
struct Waiting {
    request: FetchRequest,
    /// What the request carries.
    memory: Option<OwnedFd>,
    /// False if the socket had no space.
    is_sent: bool,
    reply: Option<(FetchReply, Vec<OwnedFd>)>,
    /// The thread that waits must lead.
    must_lead: bool,
    wake: Arc<Condvar>,
}

/// An open file, as a new fetcher must open it.
#[derive(Default)]
struct LineFile {
    /// The request of the open, with the pin of its answer; `None` before the answer.
    open: Option<FetchRequest>,
    reopened: Option<Reopened>,
    /// Descriptors that came before `reopened` was set.
    missed: Option<Vec<OwnedFd>>,
    /// The last range that will be needed.
    will_need: Option<FetchRequest>,
}

impl LineState {
    /// Sends a request if there is a fetcher and the socket has space. Returns false if it has not.
    /// A fetcher that is gone counts as told: the next one is told of all requests that wait.
    ///
    /// # Errors
    /// The request is too long for a message.
    fn send(&self, request: &FetchRequest, memory: Option<&OwnedFd>) -> Result<bool> {
        let Some(socket) = &self.socket else { return Ok(true) };
        let memory: Vec<_> = memory.iter().map(AsFd::as_fd).collect();
        match packet::try_send(&**socket, request, LONGEST, &memory) {
            Err(error) if error.kind() != ErrorKind::InvalidArgument => {
                log::debug!("fetcher: {error}");
                Ok(true)
            }
            sent => sent,
        }
    }

    fn has_open_file(&self) -> bool {
        self.files.iter().any(|file| file.open.is_some())
    }
}

impl std::fmt::Debug for FetcherLine {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("FetcherLine").finish_non_exhaustive()
    }
}

impl FetcherLine {
    /// Makes a line; the fetcher is started by the first request.
    pub fn new(start: Starter) -> FetcherLine {
        FetcherLine {
            start,
            state: Mutex::new(LineState {
                socket: None,
                not_before: Instant::now(),
                starts: 0,
                trouble: None,
                last_id: 0,
                is_led: false,
                waiting: BTreeMap::new(),
                files: Vec::new(),
            }),
        }
    }

    /// Opens a file, and returns its number, the reply [`FetchReply::Opened`] and the descriptors.
    /// `request` makes the request from the number of the request and that of the file.
    ///
    /// # Errors
    /// The failure that the fetcher reports; the fetcher cannot be started; the deadline.
    pub fn open(
        &self,
        deadline: Option<Instant>,
        request: impl FnOnce(u64, u32) -> FetchRequest,
    ) -> Result<(u32, FetchReply, Vec<OwnedFd>)> {
        let file = {
            let mut state = self.state.lock();
            state.files.push(LineFile::default());
            (state.files.len() - 1) as u32
        };
        let (reply, descriptors) = self.ask(deadline, None, |id| request(id, file))?;
        match &reply {
            FetchReply::Opened { .. } => Ok((file, reply, descriptors)),
            _ => Err(unexpected(&reply)),
        }
    }

    /// Whether a file was opened over this line.
    pub fn has_files(&self) -> bool {
        !self.state.lock().files.is_empty()
    }

    /// Sets the function that takes the descriptors when a new fetcher has opened the file. If that
    /// has already happened, it is called at once.
    pub fn on_reopened(&self, file: u32, reopened: Reopened) {
        if let Some(known) = self.state.lock().files.get_mut(file as usize) {
            if let Some(Err(error)) = known.missed.take().map(&reopened) {
                log::error!("{error}");
            }
            known.reopened = Some(reopened);
        }
    }

    /// Waits until a range of a file is in the cache.
    ///
    /// # Errors
    /// The failure that the fetcher reports; the fetcher cannot be started; the deadline.
    pub fn want(
        &self,
        file: u32,
        (offset, len): (u64, u64),
        patience: Option<Duration>,
        deadline: Option<Instant>,
    ) -> Result<()> {
        let patience = patience.map(|patience| patience.as_millis() as u64);
        let background = host::background::is_marked();
        let want = |id| FetchRequest::Want { id, file, offset, len, patience, background };
        match self.ask(deadline, None, want)?.0 {
            FetchReply::Have { .. } => Ok(()),
            reply => Err(unexpected(&reply)),
        }
    }

    /// Sends a request that has no reply, and never waits: it is lost if the fetcher is slow to
    /// read, or ends. A new fetcher is told of the last [`FetchRequest::WillNeed`] of each file.
    pub fn tell(&self, request: &FetchRequest) {
        let mut state = self.state.lock();
        if let FetchRequest::WillNeed { file, .. } | FetchRequest::Enough { file } = request
            && let Some(known) = state.files.get_mut(*file as usize)
        {
            let is_needed = matches!(request, FetchRequest::WillNeed { .. });
            known.will_need = is_needed.then(|| request.clone());
        }
        if let Err(error) = state.send(request, None) {
            log::debug!("fetcher: {error}");
        }
    }

    /// The state of the open files, by number.
    ///
    /// # Errors
    /// As [`FetcherLine::want`].
    pub fn facts(&self, deadline: Instant) -> Result<Vec<(u32, SourceFacts)>> {
        match self.ask(Some(deadline), None, |id| FetchRequest::Facts { id })?.0 {
            FetchReply::Facts { files, .. } => Ok(files),
            reply => Err(unexpected(&reply)),
        }
    }

    /// Sends a request and waits for its reply. `memory` goes with the request.
    ///
    /// # Errors
    /// The failure that the fetcher reports; the fetcher cannot be started; the deadline.
    pub(crate) fn ask(
        &self,
        deadline: Option<Instant>,
        memory: Option<OwnedFd>,
        request: impl FnOnce(u64) -> FetchRequest,
    ) -> Result<(FetchReply, Vec<OwnedFd>)> {
        let mut state = self.state.lock();
        state.last_id += 1;
        let id = state.last_id;
        let own_wake = Arc::new(Condvar::new());
        let request = request(id);
        let is_sent = state.send(&request, memory.as_ref())?;
        let wake = Arc::clone(&own_wake);
        let waiting = Waiting { request, memory, is_sent, reply: None, must_lead: false, wake };
        state.waiting.insert(id, waiting);
        loop {
            let Some(waiting) = state.waiting.get_mut(&id) else {
                return Err(Error::new(ErrorKind::Io, "fetcher: a request was lost"));
            };
            if let Some(reply) = waiting.reply.take() {
                let led = waiting.must_lead;
                state.waiting.remove(&id);
                if led {
                    pass_on(&mut state);
                }
                return match reply.0 {
                    FetchReply::Failed { failure, .. } => {
                        Err(Error::new(failure.kind, failure.text))
                    }
                    _ => Ok(reply),
                };
            }
            if deadline.is_some_and(|deadline| Instant::now() >= deadline) {
                let led = waiting.must_lead;
                state.waiting.remove(&id);
                if led {
                    pass_on(&mut state);
                }
                let why = state.trouble.as_ref().map_or(String::new(), |why| format!(": {why}"));
                return Err(Error::new(ErrorKind::Io, format!("the fetcher does not answer{why}")));
            }
            let wait_until = if waiting.is_sent || sent_now(&mut state, id) {
                deadline
            } else {
                let again = Instant::now() + SEND_AGAIN;
                Some(deadline.map_or(again, |deadline| deadline.min(again)))
            };
            let must_lead = state.waiting.get(&id).is_some_and(|waiting| waiting.must_lead);
            if must_lead || !state.is_led {
                if let Some(waiting) = state.waiting.get_mut(&id) {
                    waiting.must_lead = true;
                }
                state.is_led = true;
                drop(state);
                let step = self.lead(wait_until);
                state = self.state.lock();
                if let Err(error) = step {
                    state.waiting.remove(&id);
                    pass_on(&mut state);
                    return Err(error);
                }
            } else {
                match wait_until {
                    Some(until) => drop(own_wake.wait_until(&mut state, until)),
                    None => own_wake.wait(&mut state),
                }
            }
        }
    }

    /// One step of the leader: receives one message, or starts a fetcher; returns at `until`.
    ///
    /// # Errors
    /// The fetcher cannot be started, and no file is open yet.
    fn lead(&self, until: Option<Instant>) -> Result<()> {
        let socket = self.state.lock().socket.clone();
        let Some(socket) = socket else { return self.start_again(until) };
        if !is_readable(&socket, until) {
            return Ok(());
        }
        match packet::receive::<FetchReply>(&*socket, LONGEST) {
            Ok(Some((reply, descriptors))) => self.hand_out(reply, descriptors),
            ended => {
                match ended {
                    Err(error) => log::warn!("the fetcher is not understood: {error}"),
                    _ => log::warn!("the fetcher has ended"),
                }
                let mut state = self.state.lock();
                state.socket = None;
            }
        }
        Ok(())
    }

    /// Gives a reply to the thread that waits for it.
    fn hand_out(&self, reply: FetchReply, descriptors: Vec<OwnedFd>) {
        if let FetchReply::Log(level, text) = &reply {
            let level = [log::Level::Error, log::Level::Warn, log::Level::Info]
                .get(level.saturating_sub(1))
                .copied()
                .unwrap_or(log::Level::Debug);
            log::log!(level, "{text}");
        }
        let Some(id) = reply.id() else { return };
        let mut state = self.state.lock();
        let state = &mut *state;
        state.starts = 0;
        state.trouble = None;
        if let Some(waiting) = state.waiting.get_mut(&id) {
            // From now on a new fetcher opens the file, also before the thread that waits runs.
            if let (FetchReply::Opened { pin, .. }, FetchRequest::Open { file, .. }) =
                (&reply, &waiting.request)
                && let Some(known) = state.files.get_mut(*file as usize)
            {
                let mut open = waiting.request.clone();
                if let FetchRequest::Open { id, file, pin: pinned, .. } = &mut open {
                    (*id, *pinned) = (REOPENING + u64::from(*file), Some(pin.clone()));
                }
                known.open = Some(open);
            }
            waiting.reply = Some((reply, descriptors));
            waiting.wake.notify_one();
        } else if let Some(file) = reopening(id).and_then(|number| state.files.get_mut(number)) {
            reopened(file, reply, descriptors);
        }
        // Other replies are those of requests that have reached their deadline.
    }

    /// Starts a fetcher, opens the files again and repeats the requests that wait.
    fn start_again(&self, until: Option<Instant>) -> Result<()> {
        let not_before = {
            let mut state = self.state.lock();
            if !state.has_open_file() && state.starts >= STARTS_IN_VAIN {
                state.starts = 0;
                let why = state.trouble.take().map_or(String::new(), |why| format!(" ({why})"));
                return Err(Error::new(
                    ErrorKind::Io,
                    format!(
                        "the fetcher ends before it answers{why}: install it in the same version as this program"
                    ),
                ));
            }
            state.not_before
        };
        let now = Instant::now();
        if now < not_before {
            let rest = until.map_or(not_before, |until| until.min(not_before));
            std::thread::sleep(rest.saturating_duration_since(now));
            return Ok(());
        }
        let started = (self.start)();
        let mut state = self.state.lock();
        state.not_before = Instant::now() + RESTART_PAUSE;
        let socket = match started {
            Ok(StartedFetcher { socket, before }) => {
                state.trouble = before.or(state.trouble.take());
                socket
            }
            Err(error) if !state.has_open_file() => return Err(error),
            Err(error) => {
                log::warn!("{error}");
                state.trouble = Some(error.to_string());
                return Ok(());
            }
        };
        state.starts = state.starts.saturating_add(1);
        state.socket = Some(Arc::new(socket));
        let opens = state.files.iter().filter_map(|file| file.open.as_ref());
        // A new socket has space for some hundred messages, and a chain has few files.
        let is_told = opens.map(|open| state.send(open, None)).all(|sent| matches!(sent, Ok(true)));
        if !is_told {
            log::warn!("the fetcher does not take the names of the files");
            state.socket = None;
            return Ok(());
        }
        let unanswered: Vec<_> = state
            .waiting
            .iter()
            .filter(|(_, waiting)| waiting.reply.is_none())
            .map(|(id, _)| *id)
            .collect();
        for id in unanswered {
            if !sent_now(&mut state, id)
                && let Some(waiting) = state.waiting.get(&id)
            {
                waiting.wake.notify_one();
            }
        }
        for will_need in state.files.iter().filter_map(|file| file.will_need.as_ref()) {
            let _ = state.send(will_need, None);
        }
        Ok(())
    }
}

/// Sends the request of a thread that waits. Returns whether the socket had space for it.
fn sent_now(state: &mut LineState, id: u64) -> bool {
    let Some(waiting) = state.waiting.get(&id) else { return true };
    // Requests that are too long were refused before they began to wait.
    let is_sent = state.send(&waiting.request, waiting.memory.as_ref()).unwrap_or(true);
    if let Some(waiting) = state.waiting.get_mut(&id) {
        waiting.is_sent = is_sent;
    }
    is_sent
}

/// The request number of the first file that a new fetcher opens again. Numbers of other requests
/// never reach it.
const REOPENING: u64 = 1 << 62;

/// The file that the request with this number opens again.
fn reopening(id: u64) -> Option<usize> {
    id.checked_sub(REOPENING).and_then(|number| usize::try_from(number).ok())
}

/// Takes the answer of a new fetcher to the opening of a file.
fn reopened(file: &mut LineFile, reply: FetchReply, descriptors: Vec<OwnedFd>) {
    let taken = match (reply, &file.reopened) {
        (FetchReply::Opened { .. }, Some(reopened)) => reopened(descriptors),
        (FetchReply::Opened { .. }, None) => {
            file.missed = Some(descriptors);
            Ok(())
        }
        (FetchReply::Failed { failure: FetchFailure { kind, text }, .. }, _) => {
            Err(Error::new(kind, text))
        }
        _ => Ok(()),
    };
    if let Err(error) = taken {
        log::error!("{error}");
    }
}

/// Ends the lead of the calling thread: one of the threads that wait leads from now on.
fn pass_on(state: &mut LineState) {
    state.is_led = false;
    if let Some(next) = state.waiting.values_mut().find(|waiting| waiting.reply.is_none()) {
        next.must_lead = true;
        state.is_led = true;
        next.wake.notify_one();
    }
}

/// Waits until the socket has a message or has ended, at most until `deadline` and at most
/// [`LONGEST_WAIT`].
fn is_readable(socket: &OwnedFd, deadline: Option<Instant>) -> bool {
    let wait = deadline.map_or(LONGEST_WAIT, |deadline| {
        deadline.saturating_duration_since(Instant::now()).min(LONGEST_WAIT)
    });
    let timeout =
        Timespec { tv_sec: wait.as_secs() as i64, tv_nsec: i64::from(wait.subsec_nanos()) };
    let mut polled = [PollFd::from_borrowed_fd(socket.as_fd(), PollFlags::IN)];
    match rustix::event::poll(&mut polled, Some(&timeout)) {
        Ok(ready) => ready > 0,
        Err(error) => error != Errno::INTR,
    }
}

pub(crate) fn unexpected(reply: &FetchReply) -> Error {
    Error::new(ErrorKind::Io, format!("the fetcher answered {reply:?}"))
}

#[cfg(test)]
mod tests;
