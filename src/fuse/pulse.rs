//! Whether requests that the kernel sends are answered: asked through the transport itself.
//!
//! FUSE_NOTIFY_RETRIEVE makes the kernel send a request of its own (FUSE_NOTIFY_REPLY), over io_uring to
//! the queue of the CPU that asks. So the whole way there is walked, without a path, a descriptor of the
//! mounted file, or a request of a client: the mount is not kept busy, and the sandbox allows it.
//!
//! **Touches:** the session's /dev/fuse. **Never:** is asked by a thread that serves, which would wait for
//! itself (H29). **Locks:** one leaf lock, the set of tokens that are on their way.

use std::collections::BTreeSet;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};
use rustix::io::Errno;
use rustix::thread::CpuSet;

use super::wire;

/// Asks; clones ask the same session.
#[derive(Clone, Debug)]
pub struct Pulse {
    echoes: Arc<Echoes>,
    device: Arc<OwnedFd>,
    /// The CPUs to ask from, each of which has a queue; empty where there are no queues.
    cpus: Arc<[usize]>,
}

/// Requests of the kernel's own that have been asked for and have not come.
#[derive(Debug, Default)]
pub(super) struct Echoes {
    state: Mutex<State>,
    arrived: Condvar,
}

#[derive(Debug, Default)]
struct State {
    next: u64,
    awaited: BTreeSet<u64>,
}

impl Echoes {
    /// One has come.
    pub(super) fn arrived(&self, token: u64) {
        let was_awaited = self.state.lock().awaited.remove(&token);
        if was_awaited {
            self.arrived.notify_all();
        }
    }

    fn expect(&self) -> u64 {
        let mut state = self.state.lock();
        let token = state.next;
        state.next = state.next.wrapping_add(1);
        state.awaited.insert(token);
        token
    }

    /// Whether all of these come before `deadline`. They are not awaited any more afterwards.
    fn come(&self, tokens: &[u64], deadline: Instant) -> bool {
        let mut state = self.state.lock();
        while tokens.iter().any(|token| state.awaited.contains(token)) {
            if self.arrived.wait_until(&mut state, deadline).timed_out() {
                break;
            }
        }
        // Each of them: `any` would leave the rest.
        tokens.iter().filter(|token| state.awaited.remove(token)).count() == 0
    }
}

impl Pulse {
    /// For the session of `device`. `queues`: each CPU that this thread may run on has a queue of its own.
    pub(super) fn new(echoes: &Arc<Echoes>, device: &Arc<OwnedFd>, queues: bool) -> Pulse {
        let mine = rustix::thread::sched_getaffinity(None).ok().filter(|_| queues);
        let cpus = mine.map_or_else(Arc::default, |set| (0..CpuSet::MAX_CPU).filter(|&cpu| set.is_set(cpu)).collect());
        Pulse { echoes: Arc::clone(echoes), device: Arc::clone(device), cpus }
    }

    /// Whether a request is answered within `timeout`; over io_uring, one from each CPU. Also `true` where
    /// there is nothing to ask any more, since the disk is unmounted, or the kernel does not know how.
    ///
    /// Not for a thread that serves requests: it would wait for itself.
    pub fn is_felt(&self, timeout: Duration) -> bool {
        let deadline = Instant::now() + timeout;
        let before = rustix::thread::sched_getaffinity(None).ok().filter(|_| !self.cpus.is_empty());
        let mut tokens = Vec::new();
        let mut asked = Ok(());
        for cpu in self.cpus.iter().copied().map(Some).chain(self.cpus.is_empty().then_some(None)) {
            if let Some(cpu) = cpu {
                let mut one = CpuSet::new();
                one.set(cpu);
                // A CPU that is gone has nothing to answer.
                if rustix::thread::sched_setaffinity(None, &one).is_err() {
                    continue;
                }
            }
            let token = self.echoes.expect();
            tokens.push(token);
            asked = rustix::io::retry_on_intr(|| rustix::io::write(&self.device, &wire::retrieve(token))).map(drop);
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
                // NOTCONN, NODEV, NOENT: unmounted. Others are the kernel's way of not knowing it.
                if !matches!(errno, Errno::NOTCONN | Errno::NODEV | Errno::NOENT) {
                    log::debug!("asking over /dev/fuse: {}", crate::error::os_text(&io::Error::from(errno)));
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
        // Late.
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
