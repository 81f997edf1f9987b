//! Signals become events, on a thread of their own.

use std::thread;

use crossbeam_channel::Sender;
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM, SIGXFSZ};
use signal_hook::iterator::{Handle, Signals};

use super::Event;
use crate::Result;
use crate::error::Context;

/// Handlers are in place: nothing kills the process any more. What arrives waits for [`Registered::start`].
pub(super) struct Registered(Signals);

/// Signals are received until this is dropped.
pub(super) struct Receiving(Handle);

impl Drop for Receiving {
    fn drop(&mut self) {
        self.0.close();
    }
}

/// SIGTERM and SIGINT become [`Event::Terminate`], SIGHUP [`Event::Hangup`]. SIGXFSZ is taken and
/// ignored: the write that follows fails with EFBIG, which is handled, and its default is to kill.
/// The standard library ignores SIGPIPE already.
///
/// # Errors
/// The system refuses handlers.
pub(super) fn register() -> Result<Registered> {
    Signals::new([SIGTERM, SIGINT, SIGHUP, SIGXFSZ]).context(|| "signal handlers").map(Registered)
}

impl Registered {
    /// Passes on what has arrived and what arrives, on a thread: to be called inside the sandbox.
    ///
    /// # Errors
    /// The system refuses threads.
    pub(super) fn start(self, events: Sender<Event>) -> Result<Receiving> {
        let mut signals = self.0;
        let handle = signals.handle();
        let body = move || {
            for signal in signals.forever() {
                let event = match signal {
                    SIGTERM | SIGINT => Event::Terminate,
                    SIGHUP => Event::Hangup,
                    _ => continue,
                };
                log::info!("signal {signal}");
                let _ = events.send(event);
            }
        };
        thread::Builder::new().name("signals".to_string()).spawn(body).context(|| "starting the signal thread")?;
        Ok(Receiving(handle))
    }
}
