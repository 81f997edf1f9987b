//! Messages to a service manager: the protocol of sd_notify(3), over a socket of the keeper, which
//! sends them on. A manager accepts messages of the main process alone, and that is the keeper.
//!
//! The crates for this (`sd-notify`, `libsystemd`) create and connect a socket for every message,
//! as the C library's own function does. The sandbox permits neither socket(2) nor connect(2). The
//! protocol is lines of text in a datagram.
//!
//! **Touches:** one socket. **Never:** waits for the manager longer than [`MANAGER_PATIENCE`].

use std::io;
use std::os::fd::OwnedFd;
use std::time::Duration;

use rustix::net::SendFlags;
use rustix::net::sockopt::{Timeout, set_socket_timeout};

use crate::keeper::{Keeper, MANAGER_PATIENCE};
use host::Result;
use host::error::{Context, one_line};

/// The service manager that has started the keeper.
#[derive(Debug)]
pub(super) struct Manager {
    socket: OwnedFd,
    /// The manager ends the program if it gets no `WATCHDOG=1` for this long.
    pub watchdog: Option<Duration>,
}

impl Manager {
    /// Asks the keeper for the manager; `None` if there is none.
    ///
    /// # Errors
    /// The keeper has died, or cannot relay messages.
    pub(super) fn of(keeper: &Keeper) -> Result<Option<Manager>> {
        let Some((socket, watchdog)) = keeper.connect_manager()? else { return Ok(None) };
        set_socket_timeout(&socket, Timeout::Send, Some(MANAGER_PATIENCE))
            .map_err(io::Error::from)
            .context(|| "the socket for the service manager")?;
        Ok(Some(Manager { socket, watchdog }))
    }

    /// Sends `lines`, each `NAME=VALUE`, to the manager.
    pub(super) fn tell(&self, lines: &[&str]) {
        // `one_line` keeps a name with line breaks, such as that of an image, within its line.
        let lines: Vec<String> = lines.iter().map(|line| one_line(line).to_string()).collect();
        let message = lines.join("\n");
        let sent = rustix::net::send(&self.socket, message.as_bytes(), SendFlags::NOSIGNAL);
        if let Err(error) = sent {
            log::debug!("telling the service manager {lines:?}: {error}");
        }
    }
}

#[cfg(test)]
mod tests {
    use rustix::net::RecvFlags;

    use super::*;

    #[test]
    fn a_line_stays_one_line() {
        let (socket, receiver) = host::packet::pair().unwrap();
        let manager = Manager { socket, watchdog: None };
        manager.tell(&["READY=1", "STATUS=two\nlines"]);
        let mut text = [0; 100];
        let (len, _) =
            rustix::net::recv(&receiver, text.as_mut_slice(), RecvFlags::empty()).unwrap();
        let text = str::from_utf8(&text[..len]).unwrap();
        assert_eq!(text.lines().count(), 2, "{text:?}");
        assert!(text.starts_with("READY=1\nSTATUS=two"), "{text:?}");
    }
}
