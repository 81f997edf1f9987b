//! External events that end `top`: a signal, or the loss of the terminal.
//!
//! The library that reads keys never returns from a read at the end of the terminal's input, or
//! from a read that the terminal refuses. So two other threads watch for signals and for the
//! hangup. They end the process if the thread that draws does not.

use std::fs::File;
use std::io::{self, IsTerminal};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::Duration;

use ratatui::crossterm::terminal::disable_raw_mode;
use rustix::event::{PollFd, PollFlags, poll};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::iterator::Signals;

use host::Result;
use host::error::Context;

/// How long the drawing thread may take to notice a signal and restore the terminal.
const GRACE: Duration = Duration::from_secs(1);

/// The number of the received signal; 0 if there is none.
#[derive(Clone, Debug, Default)]
pub(super) struct TopEnding(Arc<AtomicUsize>);

impl TopEnding {
    /// Watches for SIGTERM, SIGINT and SIGHUP, and for a hangup of the terminal, even if SIGHUP is
    /// ignored.
    ///
    /// # Errors
    /// The system refuses handlers or threads, or there is no terminal to read from.
    pub(super) fn watch() -> Result<TopEnding> {
        let ending = TopEnding::default();
        let mut signals = Signals::new([SIGTERM, SIGINT, SIGHUP]).context(|| "signals")?;
        let seen = ending.clone();
        let on_signal = move || {
            let Some(number) = signals.forever().next() else { return };
            seen.0.store(usize::try_from(number).unwrap_or(1), Ordering::Relaxed);
            thread::sleep(GRACE);
            let _ = disable_raw_mode();
            std::process::exit(128 + number);
        };
        thread::Builder::new().name("signals".into()).spawn(on_signal).context(|| "a thread")?;
        let terminal = terminal().context(|| "the terminal")?;
        // The terminal has gone, so it cannot be restored and no message can be shown.
        let on_hangup = move || {
            wait_for_hangup(&terminal);
            std::process::exit(128 + SIGHUP);
        };
        thread::Builder::new().name("hangup".into()).spawn(on_hangup).context(|| "a thread")?;
        Ok(ending)
    }

    /// Returns the received signal, if any.
    pub(super) fn signal(&self) -> Option<usize> {
        Some(self.0.load(Ordering::Relaxed)).filter(|&number| number != 0)
    }
}

/// Returns the terminal that keys are read from: standard input, or the controlling terminal.
fn terminal() -> io::Result<OwnedFd> {
    let input = io::stdin();
    if input.is_terminal() {
        input.as_fd().try_clone_to_owned()
    } else {
        Ok(File::open("/dev/tty")?.into())
    }
}

/// Returns when the other side of `terminal` has closed, or when poll(2) fails.
fn wait_for_hangup(terminal: impl AsFd) {
    loop {
        // No events are requested: poll(2) always reports hangups and errors.
        let mut asked = [PollFd::new(&terminal, PollFlags::empty())];
        match poll(&mut asked, None) {
            Err(rustix::io::Errno::INTR) => {}
            Err(_) => return,
            Ok(_)
                if asked[0]
                    .revents()
                    .intersects(PollFlags::HUP | PollFlags::ERR | PollFlags::NVAL) =>
            {
                return;
            }
            Ok(_) => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_hangup_is_seen_and_a_key_is_none() {
        let (ours, theirs) = io::pipe().unwrap();
        let (sender, seen) = crossbeam_channel::bounded(1);
        let watching = thread::spawn(move || {
            wait_for_hangup(&ours);
            let _ = sender.send(());
        });
        io::Write::write_all(&mut &theirs, b"q").unwrap();
        assert!(seen.recv_timeout(Duration::from_millis(100)).is_err());
        drop(theirs);
        watching.join().unwrap();
    }
}
