//! The log of the system: a datagram socket, connected where paths can be looked up. That is before
//! the sandbox is entered, and in the keeper after the log daemon was restarted.
//!
//! Both protocols are implemented here because of the sandbox; each takes a few lines. The existing
//! crates look the socket up by its path for each line (journal), and create a memfd for a long
//! line. The sandbox kills a process that creates one. They also stamp syslog lines with UTC
//! instead of local time.

use std::io;
use std::os::unix::net::UnixDatagram;
use std::path::Path;
use std::time::Duration;

use jiff::Timestamp;
use jiff::tz::TimeZone;
use log::Level;

use serde::{Deserialize, Serialize};

use super::LogLine;
use host::Result;
use host::error::Context;

/// Socket of the journal's native protocol (systemd.journal-fields(7)):
/// <https://systemd.io/JOURNAL_NATIVE_PROTOCOL/>.
const JOURNAL: &str = "/run/systemd/journal/socket";
/// Socket of syslog(3).
const SYSLOG: &str = "/dev/log";

/// Name of the program in the log.
const IDENTIFIER: &str = "cordisk";
/// Facility of system daemons (RFC 3164, section 4.1.1).
const FACILITY: u8 = 3;

/// A line that the log daemon does not accept within this time is lost. Only threads that have no
/// request to answer wait for it.
const SEND_TIMEOUT: Duration = Duration::from_secs(1);

/// A log daemon of the system.
#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub enum Daemon {
    /// systemd-journald.
    Journal,
    /// A syslog daemon.
    Syslog,
}

impl Daemon {
    /// Connects a socket to the daemon.
    ///
    /// # Errors
    /// Those of socket(2) and connect(2), for example because the daemon does not run.
    pub fn connect(self) -> Result<UnixDatagram> {
        let path = match self {
            Daemon::Journal => JOURNAL,
            Daemon::Syslog => SYSLOG,
        };
        connect(Path::new(path)).context(|| path)
    }
}

/// Returns a socket that is connected to the one at `path`.
///
/// # Errors
/// Those of socket(2) and connect(2).
pub(super) fn connect(path: &Path) -> io::Result<UnixDatagram> {
    let socket = UnixDatagram::unbound()?;
    socket.connect(path)?;
    socket.set_write_timeout(Some(SEND_TIMEOUT))?;
    Ok(socket)
}

/// Whether a send has failed because the daemon has closed its socket: the kernel reports "refused"
/// once, and "not connected" from then on.
pub(super) fn is_disconnected(error: &io::Error) -> bool {
    use io::ErrorKind::{BrokenPipe, ConnectionRefused, ConnectionReset, NotConnected};
    matches!(error.kind(), ConnectionRefused | NotConnected | ConnectionReset | BrokenPipe)
}

/// A connection to the journal or to syslog.
#[derive(Debug)]
pub(super) struct SystemLog {
    socket: UnixDatagram,
    protocol: Protocol,
}

#[derive(Debug)]
enum Protocol {
    Journal {
        /// Fields of each line besides its text, in the form in which they are sent.
        fields: String,
    },
    Syslog {
        zone: TimeZone,
    },
}

impl SystemLog {
    /// Connects to the journal, or else to syslog; `None` if neither runs. `fields` are used for
    /// the journal only.
    pub(super) fn connect(fields: &[(&'static str, String)]) -> Option<SystemLog> {
        SystemLog::connect_at(Path::new(JOURNAL), Path::new(SYSLOG), fields)
    }

    pub(super) fn connect_at(
        journal: &Path,
        syslog: &Path,
        fields: &[(&'static str, String)],
    ) -> Option<SystemLog> {
        if let Ok(socket) = connect(journal) {
            let pid = std::process::id();
            let mut text = format!(
                "SYSLOG_IDENTIFIER={IDENTIFIER}\nSYSLOG_PID={pid}\nSYSLOG_FACILITY={FACILITY}\n"
            );
            for (name, value) in fields {
                text += &format!("{name}={}\n", host::error::one_line(value));
            }
            return Some(SystemLog { socket, protocol: Protocol::Journal { fields: text } });
        }
        let socket = connect(syslog).ok()?;
        Some(SystemLog { socket, protocol: Protocol::Syslog { zone: TimeZone::system() } })
    }

    /// Returns the name of the destination, for users.
    pub(super) fn name(&self) -> &'static str {
        match self.daemon() {
            Daemon::Journal => "journal",
            Daemon::Syslog => "syslog",
        }
    }

    /// Returns the daemon at the other end.
    pub(super) fn daemon(&self) -> Daemon {
        match self.protocol {
            Protocol::Journal { .. } => Daemon::Journal,
            Protocol::Syslog { .. } => Daemon::Syslog,
        }
    }

    /// Replaces the socket by one that is connected to the same daemon.
    pub(super) fn replace_socket(&mut self, socket: UnixDatagram) {
        self.socket = socket;
    }

    /// Sends one line.
    ///
    /// # Errors
    /// Those of send(2).
    pub(super) fn send(&self, subject: &str, line: &LogLine) -> io::Result<()> {
        let separator = if subject.is_empty() { "" } else { ": " };
        let severity = severity(line.level);
        let message = match &self.protocol {
            // Each field is one line, so that no value needs the form with a length.
            Protocol::Journal { fields } => {
                let LogLine { target, text, .. } = line;
                format!(
                    "PRIORITY={severity}\n{fields}TARGET={target}\nMESSAGE={subject}{separator}{text}\n"
                )
            }
            Protocol::Syslog { zone } => {
                let time =
                    Timestamp::try_from(line.time).unwrap_or_default().to_zoned(zone.clone());
                let (time, pid, priority) =
                    (time.strftime("%b %e %H:%M:%S"), std::process::id(), FACILITY << 3 | severity);
                format!("<{priority}>{time} {IDENTIFIER}[{pid}]: {subject}{separator}{}", line.text)
            }
        };
        self.socket.send(message.as_bytes()).map(drop)
    }
}

/// Returns the severity of syslog(3).
fn severity(level: Level) -> u8 {
    match level {
        Level::Error => 3,
        Level::Warn => 4,
        Level::Info => 6,
        Level::Debug | Level::Trace => 7,
    }
}
