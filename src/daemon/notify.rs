//! What a service manager is told: the protocol of sd_notify(3), over a datagram socket that is connected before the sandbox is entered.
//!
//! The crates for this (`sd-notify`, `libsystemd`) make and connect a socket for every message, as the C library's own function does; in the sandbox there
//! is no socket(2) and no connect(2). The protocol is lines in a datagram.
//!
//! **Touches:** one socket, and the environment (read only: to change that of a process is unsafe where there are threads, so the variables are kept from the
//! processes that we start, [`VARIABLES`]). **Never:** waits for the manager longer than [`PATIENCE`].

use std::ffi::OsStr;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::time::Duration;

use crate::error::one_line;
use crate::{Error, ErrorKind, Result};

/// What a manager sets for the process that it has started, and for no other.
pub(super) const VARIABLES: [&str; 3] = [SOCKET, WATCHDOG, WATCHDOG_PROCESS];

const SOCKET: &str = "NOTIFY_SOCKET";
const WATCHDOG: &str = "WATCHDOG_USEC";
const WATCHDOG_PROCESS: &str = "WATCHDOG_PID";

/// How long a manager that takes no messages is waited for.
const PATIENCE: Duration = Duration::from_secs(5);

/// Whoever has started this process as a service.
#[derive(Debug)]
pub(super) struct Manager {
    socket: UnixDatagram,
    /// It ends us where it is told nothing for so long.
    pub watchdog: Option<Duration>,
}

impl Manager {
    /// Connects to the manager, if there is one: to be called before the sandbox is entered. One that cannot be reached is no reason not to serve.
    pub(super) fn connect() -> Option<Manager> {
        let address = std::env::var_os(SOCKET).filter(|address| !address.is_empty())?;
        let variable = |name| std::env::var(name).ok();
        let watchdog = watchdog_of(variable(WATCHDOG).as_deref(), variable(WATCHDOG_PROCESS).as_deref(), std::process::id());
        match Manager::at(&address, watchdog) {
            Ok(manager) => Some(manager),
            Err(error) => {
                log::warn!("{SOCKET} {}: {error}; the service manager is not told anything", address.display());
                None
            }
        }
    }

    fn at(address: &OsStr, watchdog: Option<Duration>) -> Result<Manager> {
        let failed = |error| Error::io("connect", error);
        let address = match address.as_bytes() {
            [b'@', name @ ..] => SocketAddr::from_abstract_name(name),
            [b'/', ..] => SocketAddr::from_pathname(address),
            _ => return Err(Error::new(ErrorKind::UnsupportedFeature, "neither a path nor an abstract name")),
        };
        let socket = UnixDatagram::unbound().map_err(failed)?;
        socket.connect_addr(&address.map_err(failed)?).map_err(failed)?;
        socket.set_write_timeout(Some(PATIENCE)).map_err(failed)?;
        Ok(Manager { socket, watchdog })
    }

    /// Tells it `lines`, each `NAME=VALUE`.
    pub(super) fn tell(&self, lines: &[&str]) {
        // Whatever an image is called, a line stays a line.
        let lines: Vec<String> = lines.iter().map(|line| one_line(line).to_string()).collect();
        if let Err(error) = self.socket.send(lines.join("\n").as_bytes()) {
            log::debug!("telling the service manager {lines:?}: {error}");
        }
    }
}

/// The interval of the watchdog, if there is one and it is for the process `this`.
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

    #[test]
    fn messages_arrive_by_path_and_by_abstract_name() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("notify");
        let name = format!("cordisk-test-{}", std::process::id());
        let abstract_name = SocketAddr::from_abstract_name(name.as_bytes()).unwrap();
        for (receiver, address) in [
            (UnixDatagram::bind(&path).unwrap(), path.clone().into_os_string()),
            (UnixDatagram::bind_addr(&abstract_name).unwrap(), format!("@{name}").into()),
        ] {
            receiver.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
            let manager = Manager::at(&address, None).unwrap();
            manager.tell(&["READY=1", "STATUS=two\nlines"]);
            let mut text = [0; 100];
            let len = receiver.recv(&mut text).unwrap();
            let text = str::from_utf8(&text[..len]).unwrap();
            assert_eq!(text.lines().count(), 2, "{text:?}");
            assert!(text.starts_with("READY=1\nSTATUS=two"), "{text:?}");
        }
        assert!(Manager::at(&dir.path().join("nobody").into_os_string(), None).is_err());
        assert!(Manager::at(OsStr::new("vsock:2:1234"), None).is_err());
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
