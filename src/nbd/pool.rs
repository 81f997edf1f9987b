//! The connections of a client: opened when they are needed, dropped when they have ended.
//!
//! The first connection, and the next one after all have ended, is made by a thread that has a
//! request; other threads wait for it and share its failure. Further connections are made by a
//! thread of their own, since requests can go on without them.
//!
//! **Locks:** the pool, then the table of a link. No lock is held while connecting.

use std::sync::Arc;
use std::sync::mpsc::Sender;
use std::thread;
use std::time::{Duration, Instant};

use parking_lot::Mutex;

use crate::NbdConfig;
use crate::buffers::BufferPool;
use crate::error::{NbdError, NbdErrorKind, Result, one_line};
use crate::handshake::Agreement;
use crate::link::{Changed, Link};
use crate::replies::{Event, MOST_IN_FLIGHT, NbdRequest, NotTaken};
use crate::tls::TlsSetup;

/// Requests in flight on each connection from which on another one is worth opening: half of what
/// it takes, so that the other one is ready before requests have to wait. The other half is for
/// callers that have no request in flight: a small read does not wait behind large ones.
const BUSY: usize = MOST_IN_FLIGHT / 2;
/// Time after a further connection has failed in which no other one is attempted.
const NO_MORE: Duration = Duration::from_secs(10);

/// Longest time that servers have to close connections after NBD_CMD_DISC.
const GOODBYE: Duration = Duration::from_secs(1);

/// What to do with a request while all connections are full, or busy.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum WhenFull {
    /// Wait for a place until the deadline of the request.
    Wait,
    /// Leave the request to the caller.
    Return,
}

/// The connections of a client.
#[derive(Debug)]
pub(crate) struct Pool {
    config: NbdConfig,
    tls: Option<TlsSetup>,
    /// The server in error messages.
    name: String,
    buffers: Arc<BufferPool>,
    changed: Arc<Changed>,
    state: Mutex<PoolState>,
}

#[derive(Debug, Default)]
struct PoolState {
    links: Vec<Arc<Link>>,
    /// Of the newest connection. Its size is that of the first one.
    agreement: Option<Agreement>,
    /// A thread makes the connection without which no request can go on.
    connecting: bool,
    /// Number of failed attempts, and the newest failure.
    failures: u64,
    failure: Option<NbdError>,
    /// A thread makes a further connection.
    adding: bool,
    no_more_until: Option<Instant>,
    closed: bool,
}

impl Pool {
    /// Makes the first connection.
    pub fn open(config: NbdConfig) -> Result<Arc<Pool>> {
        let name = format!("NBD server {}, export \"{}\"", config.address, config.export);
        let name = one_line(&name);
        let tls = config.tls.as_ref().map(TlsSetup::new).transpose();
        let tls = tls.map_err(|error| error.with_name(&name))?;
        let deadline = Instant::now().checked_add(config.connect_timeout);
        let pool = Arc::new(Pool {
            config,
            tls,
            name,
            buffers: Arc::default(),
            changed: Arc::default(),
            state: Mutex::default(),
        });
        let deadline = deadline.ok_or_else(|| pool.named(NbdError::deadline()))?;
        let (link, agreement) = pool.connect(deadline).map_err(|error| pool.named(error))?;
        pool.add(&mut pool.state.lock(), link, agreement);
        Ok(pool)
    }

    /// What was agreed on for the newest connection.
    pub fn agreement(&self) -> Option<Agreement> {
        self.state.lock().agreement
    }

    /// Returns `error` with the name of the server.
    pub fn named(&self, error: NbdError) -> NbdError {
        error.with_name(&self.name)
    }

    /// Sends `request` on the connection that has least to do. Returns `None` if all are busy and
    /// the caller does not want to wait.
    pub fn begin(
        self: &Arc<Self>,
        request: NbdRequest,
        events: &Sender<Event>,
        deadline: Instant,
        when_full: WhenFull,
    ) -> Result<Option<Arc<Link>>> {
        let failures = self.state.lock().failures;
        loop {
            let seen = self.changed.count();
            let now = Instant::now();
            if now >= deadline {
                return Err(NbdError::deadline());
            }
            let mut state = self.state.lock();
            state.links.retain(|link| link.check(now));
            let best = state.links.iter().min_by_key(|link| link.in_flight()).cloned();
            let mut end = deadline;
            if let Some(link) = best {
                if link.in_flight() >= BUSY {
                    self.add_another(&mut state, now);
                    if when_full == WhenFull::Return {
                        return Ok(None);
                    }
                }
                let stall = state.links.iter().filter_map(|link| link.stalls_at()).min();
                drop(state);
                match link.begin(request, events.clone()) {
                    Ok(()) => return Ok(Some(link)),
                    Err(NotTaken::Ended) => continue,
                    Err(NotTaken::Full) if when_full == WhenFull::Return => return Ok(None),
                    Err(NotTaken::Full) => {}
                }
                end = stall.map_or(end, |stall| stall.min(end));
            } else if when_full == WhenFull::Return {
                return Ok(None);
            } else if !state.connecting {
                // The failure of a thread that was waited for is not repeated by each that waited.
                if let Some(failure) = state.failure.as_ref().filter(|_| state.failures != failures)
                {
                    return Err(failure.clone());
                }
                state.connecting = true;
                drop(state);
                self.reconnect(deadline)?;
                continue;
            } else {
                drop(state); // another thread connects
            }
            self.changed.wait(seen, end);
        }
    }

    /// Ends all connections well.
    pub fn close(&self) {
        let links = {
            let mut state = self.state.lock();
            state.closed = true;
            std::mem::take(&mut state.links)
        };
        end_well(&links);
    }

    #[cfg(test)]
    pub fn in_flight(&self) -> usize {
        self.state.lock().links.iter().map(|link| link.in_flight()).sum()
    }

    #[cfg(test)]
    pub fn connections(&self) -> usize {
        let now = Instant::now();
        self.state.lock().links.iter().filter(|link| link.check(now)).count()
    }

    /// Makes the connection that all threads wait for.
    fn reconnect(&self, deadline: Instant) -> Result<()> {
        let now = Instant::now();
        let end =
            now.checked_add(self.config.connect_timeout).map_or(deadline, |end| end.min(deadline));
        let result = self.connect(end);
        let mut state = self.state.lock();
        state.connecting = false;
        let result = match result {
            Ok((link, agreement)) => {
                self.add(&mut state, link, agreement);
                Ok(())
            }
            // This says more about the deadline than about the server.
            Err(error) if error.kind() == NbdErrorKind::Connect && Instant::now() >= deadline => {
                Err(NbdError::new(NbdErrorKind::Deadline, error.to_string()))
            }
            Err(error) => {
                state.failures = state.failures.wrapping_add(1);
                state.failure = Some(error.clone());
                Err(error)
            }
        };
        drop(state);
        self.changed.bump();
        result
    }

    /// Starts a thread that makes a further connection, if that is allowed.
    fn add_another(self: &Arc<Self>, state: &mut PoolState, now: Instant) {
        let allowed = state.agreement.is_some_and(|agreement| agreement.multi_conn)
            && state.links.len() < self.config.connections
            && !state.adding
            && !state.closed
            && state.no_more_until.is_none_or(|end| end <= now);
        let Some(deadline) = now.checked_add(self.config.connect_timeout).filter(|_| allowed)
        else {
            return;
        };
        let pool = Arc::clone(self);
        let thread = thread::Builder::new().name("nbd-connect".into()).spawn(move || {
            let result = pool.connect(deadline);
            let mut state = pool.state.lock();
            state.adding = false;
            match result {
                Ok((link, _)) if state.closed => {
                    drop(state);
                    end_well(&[link]);
                }
                Ok((link, agreement)) => pool.add(&mut state, link, agreement),
                Err(error) => {
                    log::debug!("{}: no further connection: {error}", pool.name);
                    state.no_more_until = Instant::now().checked_add(NO_MORE);
                }
            }
            pool.changed.bump();
        });
        match thread {
            Ok(_) => state.adding = true,
            Err(error) => log::debug!("{}: no further connection: {error}", self.name),
        }
    }

    /// Makes a connection, and compares the size of the export with that of the first connection.
    fn connect(&self, deadline: Instant) -> Result<(Arc<Link>, Agreement)> {
        let (link, agreement) = Link::open(
            &self.config,
            self.tls.as_ref(),
            deadline,
            Arc::clone(&self.buffers),
            Arc::clone(&self.changed),
        )?;
        let size = self.agreement().map_or(agreement.size, |first| first.size);
        if size != agreement.size {
            end_well(&[link]);
            let text = format!("the export had {size} bytes and has {} now", agreement.size);
            return Err(NbdError::new(NbdErrorKind::Changed, text));
        }
        Ok((link, agreement))
    }

    fn add(&self, state: &mut PoolState, link: Arc<Link>, agreement: Agreement) {
        log::debug!("{}: connected: {agreement:?}", self.name);
        state.links.push(link);
        state.agreement = Some(agreement);
    }
}

/// Ends connections that take no more requests.
fn end_well(links: &[Arc<Link>]) {
    for link in links {
        link.say_goodbye();
    }
    let now = Instant::now();
    let end = now.checked_add(GOODBYE).unwrap_or(now);
    for link in links {
        link.finish(end);
    }
}
