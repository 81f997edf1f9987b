//! Signals become events, on a thread of their own.

use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use crossbeam_channel::Sender;
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM, SIGWINCH, SIGXFSZ};
use signal_hook::iterator::{Handle, Signals};

use super::Event;
use crate::keeper::PASSED_ON;
use host::Result;
use host::error::Context;

/// How long the keeper may take to pass a signal on. If it takes longer, a signal that was sent to
/// all processes counts twice.
const PASSING_ON: Duration = Duration::from_secs(1);

/// Registered signal handlers: SIGTERM, SIGINT and SIGHUP no longer kill the process. Signals that
/// arrive are kept until [`Registered::start`].
pub(super) struct Registered(Signals);

/// The running signal thread; signals are received until this is dropped.
pub(super) struct Receiving(Handle);

impl Drop for Receiving {
    fn drop(&mut self) {
        self.0.close();
    }
}

/// Installs a handler for SIGXFSZ that does nothing. By default the signal kills the process; with
/// the handler, a write beyond the limit of file sizes fails with EFBIG, which is handled. The
/// signal is not set to "ignore", because child processes would inherit that. The standard library
/// ignores SIGPIPE already.
///
/// # Errors
/// The system refuses to install a handler.
pub(super) fn take_file_size() -> Result<()> {
    signal_hook::flag::register(SIGXFSZ, Arc::default()).map(drop).context(|| "signal handlers")
}

/// Registers handlers: SIGTERM, SIGINT and what the keeper passes on in their place become
/// [`Event::Terminate`], SIGHUP becomes [`Event::Hangup`], and SIGWINCH, which the keeper sends,
/// [`Event::HandOver`]. (A process without this handler ignores SIGWINCH.)
///
/// # Errors
/// The system refuses to install a handler.
pub(super) fn register() -> Result<Registered> {
    let passed_on = PASSED_ON.map(|(_, signal)| signal);
    let signals = [SIGTERM, SIGINT, SIGHUP, SIGWINCH].into_iter().chain(passed_on);
    Signals::new(signals).context(|| "signal handlers").map(Registered)
}

/// The way on which a signal has arrived.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Way {
    /// It was sent to this process.
    Direct,
    /// The keeper has passed it on.
    Keeper,
}

/// Tells signals to end from each other. A signal that was sent to all processes, as a shutdown
/// does, arrives twice, and must not count as the second one, which detaches a disk in use.
#[derive(Debug, Default)]
struct Twice(Option<(Way, Instant)>);

impl Twice {
    /// Whether a signal that arrives now on this way is another one than the last.
    fn is_another(&mut self, way: Way, now: Instant) -> bool {
        let same = self.0.is_some_and(|(last, at)| {
            last != way && now.saturating_duration_since(at) < PASSING_ON
        });
        self.0 = (!same).then_some((way, now));
        !same
    }
}

impl Registered {
    /// Starts the thread that sends pending and later signals to `events`. Must be called inside
    /// the sandbox.
    ///
    /// # Errors
    /// The system refuses to start a thread.
    pub(super) fn start(self, events: Sender<Event>) -> Result<Receiving> {
        let mut signals = self.0;
        let handle = signals.handle();
        let body = move || {
            let mut twice = Twice::default();
            for signal in signals.forever() {
                let passed_on = PASSED_ON.iter().find(|pair| pair.1 == signal);
                let (signal, way) =
                    passed_on.map_or((signal, Way::Direct), |pair| (pair.0, Way::Keeper));
                let event = match signal {
                    SIGTERM | SIGINT if twice.is_another(way, Instant::now()) => Event::Terminate,
                    SIGHUP => Event::Hangup,
                    SIGWINCH => Event::HandOver,
                    _ => continue,
                };
                log::info!("signal {signal}");
                let _ = events.send(event);
            }
        };
        thread::Builder::new()
            .name("signals".to_string())
            .spawn(body)
            .context(|| "starting the signal thread")?;
        Ok(Receiving(handle))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_signal_to_all_processes_counts_once() {
        let mut twice = Twice::default();
        let begin = Instant::now();
        let mut at =
            |way, milliseconds| twice.is_another(way, begin + Duration::from_millis(milliseconds));
        assert!(at(Way::Direct, 0) && !at(Way::Keeper, 10), "the first to all");
        assert!(at(Way::Keeper, 20) && !at(Way::Direct, 30), "the second to all");
        assert!(at(Way::Keeper, 40) && at(Way::Keeper, 50), "two to the keeper");
        assert!(at(Way::Direct, 1050), "and one to this process, later");
    }
}
