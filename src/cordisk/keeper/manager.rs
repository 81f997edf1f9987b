//! The service manager that has started the keeper, and the thread that relays messages to it.
//!
//! A manager accepts messages of the main process of a service alone (`NotifyAccess=main`), and
//! that is the keeper. So the serving process writes its messages to a socket of the keeper, and a
//! thread of the keeper sends each of them on as it is. The thread does nothing else: an unmount
//! that hangs in the keeper stops no ping of the watchdog.
//!
//! **Touches:** the manager's socket, and the environment, which it only reads. Changing the
//! environment is unsafe in a process that has threads; so the variables are removed from the
//! environment of child processes instead ([`VARIABLES`]). **Never:** makes a message of its own;
//! waits for the manager longer than [`PATIENCE`] with one message. **Locks:** none.

use std::ffi::OsStr;
use std::os::fd::OwnedFd;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::thread;
use std::time::Duration;

use crossbeam_channel::{Receiver, bounded};
use rustix::net::RecvFlags;

use super::estate;
use host::error::Context;
use host::{Error, ErrorKind, Result};

/// The variables that a manager sets for the one process that it has started.
pub const VARIABLES: [&str; 6] =
    [SOCKET, WATCHDOG, WATCHDOG_PROCESS, estate::COUNT, estate::PROCESS, estate::NAMES];

const SOCKET: &str = "NOTIFY_SOCKET";
const WATCHDOG: &str = "WATCHDOG_USEC";
const WATCHDOG_PROCESS: &str = "WATCHDOG_PID";

/// How long a send waits for a manager that does not receive messages.
pub const PATIENCE: Duration = Duration::from_secs(5);

/// The longest message in bytes: the status line has two paths, each of at most 4096 bytes that
/// take four characters each where they cannot be printed.
const LONGEST: usize = 64 << 10;

/// The service manager that has started this process.
#[derive(Debug)]
pub(super) struct ManagerSocket {
    socket: UnixDatagram,
    /// The manager ends this process if it gets no `WATCHDOG=1` for this long.
    pub(super) watchdog: Option<Duration>,
}

/// A relay that runs. The channel is closed when the relay has ended.
#[derive(Debug)]
pub(super) struct Relay(Receiver<()>);

impl ManagerSocket {
    /// Connects to the manager, if there is one. A manager that cannot be reached costs a warning.
    pub(super) fn connect() -> Option<ManagerSocket> {
        let address = std::env::var_os(SOCKET).filter(|address| !address.is_empty())?;
        let variable = |name| std::env::var(name).ok();
        let watchdog = watchdog_of(
            variable(WATCHDOG).as_deref(),
            variable(WATCHDOG_PROCESS).as_deref(),
            std::process::id(),
        );
        match ManagerSocket::at(&address, watchdog) {
            Ok(manager) => Some(manager),
            Err(error) => {
                log::warn!(
                    "{SOCKET} {}: {error}; the service manager is not told anything",
                    address.display()
                );
                None
            }
        }
    }

    fn at(address: &OsStr, watchdog: Option<Duration>) -> Result<ManagerSocket> {
        let failed = |error| Error::io("connect", error);
        let address = match address.as_bytes() {
            [b'@', name @ ..] => SocketAddr::from_abstract_name(name),
            [b'/', ..] => SocketAddr::from_pathname(address),
            _ => {
                return Err(Error::new(
                    ErrorKind::UnsupportedFeature,
                    "neither a path nor an abstract name",
                ));
            }
        };
        let socket = UnixDatagram::unbound().map_err(failed)?;
        socket.connect_addr(&address.map_err(failed)?).map_err(failed)?;
        socket.set_write_timeout(Some(PATIENCE)).map_err(failed)?;
        Ok(ManagerSocket { socket, watchdog })
    }

    /// Returns the same connection, for the relay of one serving process.
    ///
    /// # Errors
    /// Those of fcntl(2).
    pub(super) fn try_clone(&self) -> Result<ManagerSocket> {
        let socket = self.socket.try_clone().context(|| "the socket of the service manager")?;
        Ok(ManagerSocket { socket, watchdog: self.watchdog })
    }

    /// Returns the connected socket.
    pub(super) fn into_socket(self) -> UnixDatagram {
        self.socket
    }

    /// Starts the thread that sends each message on. Returns the socket that takes messages; the
    /// thread ends when the socket is closed and all messages are sent.
    ///
    /// # Errors
    /// The socket or the thread cannot be made.
    pub(super) fn relay(self) -> Result<(OwnedFd, Relay)> {
        let what = || "the relay to the service manager";
        // This kind of socket keeps the boundaries of messages as a datagram socket does, and has
        // an end.
        let (ours, theirs) = host::packet::pair().context(what)?;
        let (ended, end) = bounded::<()>(0);
        let body = move || {
            let _ended = ended;
            let mut message = vec![0; LONGEST];
            loop {
                let received = rustix::io::retry_on_intr(|| {
                    rustix::net::recv(&ours, message.as_mut_slice(), RecvFlags::empty())
                });
                let len = match received {
                    Ok((0, _)) | Err(_) => return,
                    Ok((len, _)) => len,
                };
                if let Some(message) = message.get(..len)
                    && let Err(error) = self.socket.send(message)
                {
                    log::debug!("telling the service manager: {error}");
                }
            }
        };
        thread::Builder::new().name("relay".into()).spawn(body).context(what)?;
        Ok((theirs, Relay(end)))
    }
}

impl Relay {
    /// Waits until the last messages are sent, but no longer than one message may take. The other
    /// end of the socket is closed.
    pub(super) fn finish(self) {
        let _ = self.0.recv_timeout(PATIENCE);
    }
}

/// Returns the interval of the watchdog if there is one and it is for the process `this`.
fn watchdog_of(interval: Option<&str>, process: Option<&str>, this: u32) -> Option<Duration> {
    if process.is_some_and(|process| process.parse() != Ok(this)) {
        return None;
    }
    let micros = interval?.parse().ok().filter(|&micros: &u64| micros > 0)?;
    Some(Duration::from_micros(micros))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Protects: a message arrives as it was written, by path and by abstract name, also if the
    /// process that wrote it has ended meanwhile.
    #[test]
    fn messages_are_relayed_as_they_are() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("notify");
        let name = format!("cordisk-test-{}", std::process::id());
        let abstract_name = SocketAddr::from_abstract_name(name.as_bytes()).unwrap();
        for (receiver, address) in [
            (UnixDatagram::bind(&path).unwrap(), path.clone().into_os_string()),
            (UnixDatagram::bind_addr(&abstract_name).unwrap(), format!("@{name}").into()),
        ] {
            receiver.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
            let (socket, relay) = ManagerSocket::at(&address, None).unwrap().relay().unwrap();
            let messages = ["READY=1\nSTATUS=one".to_owned(), "x".repeat(40_000), "END".into()];
            for message in &messages {
                rustix::net::send(&socket, message.as_bytes(), rustix::net::SendFlags::NOSIGNAL)
                    .unwrap();
            }
            drop(socket);
            relay.finish();
            receiver.set_nonblocking(true).unwrap();
            for message in messages {
                let mut text = vec![0; LONGEST];
                let len = receiver.recv(&mut text).unwrap();
                assert!(text[..len] == *message.as_bytes(), "{len}");
            }
        }
        let nobody = dir.path().join("nobody").into_os_string();
        assert!(ManagerSocket::at(&nobody, None).is_err());
        assert!(ManagerSocket::at(OsStr::new("vsock:2:1234"), None).is_err());
    }

    #[test]
    fn the_watchdog_is_for_one_process() {
        let second = Some(Duration::from_secs(1));
        assert_eq!(watchdog_of(Some("1000000"), None, 7), second);
        assert_eq!(watchdog_of(Some("1000000"), Some("7"), 7), second);
        assert_eq!(watchdog_of(Some("1000000"), Some("8"), 7), None);
        assert_eq!(watchdog_of(Some("1000000"), Some("x"), 7), None);
        for none in [None, Some("0"), Some(""), Some("-1"), Some("soon")] {
            assert_eq!(watchdog_of(none, Some("7"), 7), None, "{none:?}");
        }
    }
}
