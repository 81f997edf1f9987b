//! Checks whether the requests of the kernel are answered, through the transport itself.
//!
//! FUSE_NOTIFY_RETRIEVE makes the kernel send a request of its own (FUSE_NOTIFY_REPLY); over
//! io_uring it goes to the queue of the CPU that asks. The check thus covers the whole path of a
//! request. It needs no path name, no descriptor of the mounted file and no request of a client, so
//! it does not keep the mount busy, and the sandbox allows it.
//!
//! **Touches:** the session's /dev/fuse.
//! **Never:** runs on a serving thread, which would wait for itself (H29).
//! **Locks:** one leaf lock, the set of tokens that are in flight.

use std::collections::BTreeSet;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use parking_lot::{Condvar, Mutex};
use rustix::io::Errno;
use rustix::thread::CpuSet;

use super::wire;

/// Handle for the check. All clones ask the same session.
#[derive(Clone, Debug)]
pub struct Pulse {
    echoes: Arc<Echoes>,
    device: Arc<OwnedFd>,
    /// The CPUs to ask from, each of which has a queue; empty without io_uring.
    cpus: Arc<[usize]>,
}

/// The requests that a [`Pulse`] has asked the kernel for and that have not arrived.
#[derive(Debug, Default)]
pub(super) struct Echoes {
    state: Mutex<PulseState>,
    arrived: Condvar,
}

#[derive(Debug, Default)]
struct PulseState {
    next: u64,
    awaited: BTreeSet<u64>,
}

impl Echoes {
    /// Makes the set of a process. Its tokens are not those of an earlier process that has served
    /// the same session: the kernel may still hold requests for which that one has asked.
    pub(super) fn of_this_process() -> Echoes {
        let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        // A process asks less than 256 times in a microsecond. The number has 60 bits.
        let next = u64::try_from(since.as_micros()).unwrap_or_default() << 8;
        Echoes {
            state: Mutex::new(PulseState { next, ..PulseState::default() }),
            ..Echoes::default()
        }
    }

    /// Records the arrival of the request with this token.
    pub(super) fn arrived(&self, token: u64) {
        let was_awaited = self.state.lock().awaited.remove(&token);
        if was_awaited {
            self.arrived.notify_all();
        }
    }

    /// Returns the token for a request that nothing waits for.
    pub(super) fn unawaited(&self) -> u64 {
        let mut state = self.state.lock();
        let token = state.next;
        state.next = state.next.wrapping_add(1);
        token
    }

    fn expect(&self) -> u64 {
        let mut state = self.state.lock();
        let token = state.next;
        state.next = state.next.wrapping_add(1);
        state.awaited.insert(token);
        token
    }

    /// Waits until all of `tokens` have arrived, at most until `deadline`, and returns whether they
    /// have. Afterwards none of them is awaited any more.
    fn come(&self, tokens: &[u64], deadline: Instant) -> bool {
        let mut state = self.state.lock();
        while tokens.iter().any(|token| state.awaited.contains(token)) {
            if self.arrived.wait_until(&mut state, deadline).timed_out() {
                break;
            }
        }
        // `filter` removes each token; `any` would stop at the first one.
        tokens.iter().filter(|token| state.awaited.remove(token)).count() == 0
    }
}

impl Pulse {
    /// Makes the pulse of the session of `device`. With `queues`, each CPU that this thread may run
    /// on has a queue of its own.
    pub(super) fn new(echoes: &Arc<Echoes>, device: &Arc<OwnedFd>, queues: bool) -> Pulse {
        let mine = rustix::thread::sched_getaffinity(None).ok().filter(|_| queues);
        let cpus = mine.map_or_else(Arc::default, |set| {
            (0..CpuSet::MAX_CPU).filter(|&cpu| set.is_set(cpu)).collect()
        });
        Pulse { echoes: Arc::clone(echoes), device: Arc::clone(device), cpus }
    }

    /// Returns whether a request is answered within `timeout`; over io_uring, one request from each
    /// CPU. Also returns `true` if there is nothing to ask, because the disk is unmounted or the
    /// kernel does not support the notification.
    ///
    /// Must not be called on a thread that serves requests: it would wait for itself.
    pub fn is_felt(&self, timeout: Duration) -> bool {
        let deadline = Instant::now() + timeout;
        let before = rustix::thread::sched_getaffinity(None).ok().filter(|_| !self.cpus.is_empty());
        let mut tokens = Vec::new();
        let mut asked = Ok(());
        for cpu in self.cpus.iter().copied().map(Some).chain(self.cpus.is_empty().then_some(None)) {
            if let Some(cpu) = cpu {
                let mut one = CpuSet::new();
                one.set(cpu);
                // An offline CPU has no queue to check.
                if rustix::thread::sched_setaffinity(None, &one).is_err() {
                    continue;
                }
            }
            let token = self.echoes.expect();
            tokens.push(token);
            asked = rustix::io::retry_on_intr(|| {
                rustix::io::write(&self.device, &wire::retrieve(token))
            })
            .map(drop);
            if asked.is_err() {
                break;
            }
        }
        if let Some(before) = before {
            let _ = rustix::thread::sched_setaffinity(None, &before);
        }
        match asked {
            Ok(()) => self.echoes.come(&tokens, deadline),
            Err(errno) => {
                let _ = self.echoes.come(&tokens, Instant::now());
                // NOTCONN, NODEV, NOENT: the disk was unmounted. Other errors mean that the kernel
                // does not support the notification.
                if !matches!(errno, Errno::NOTCONN | Errno::NODEV | Errno::NOENT) {
                    log::debug!(
                        "asking over /dev/fuse: {}",
                        host::error::os_text(&io::Error::from(errno))
                    );
                }
                true
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_comes_in_time_is_felt_and_what_does_not_is_forgotten() {
        let echoes = Arc::new(Echoes::default());
        let (first, second) = (echoes.expect(), echoes.expect());
        assert!(!echoes.come(&[first, second], Instant::now()));
        assert!(echoes.state.lock().awaited.is_empty());
        // The first token arrives too late.
        echoes.arrived(first);

        let tokens = [echoes.expect(), echoes.expect()];
        let far = Instant::now() + Duration::from_secs(60);
        std::thread::scope(|scope| {
            let come = scope.spawn(|| echoes.come(&tokens, far));
            tokens.iter().for_each(|&token| echoes.arrived(token));
            assert!(come.join().unwrap());
        });
        let half = [echoes.expect(), echoes.expect()];
        echoes.arrived(half[1]);
        assert!(!echoes.come(&half, Instant::now()), "one is missing");
    }
}
