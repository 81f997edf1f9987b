//! The log of the system: one datagram socket that is connected while paths can be looked up.
//!
//! Both protocols are a few lines, and are written here because of the sandbox. The crates for them
//! look the socket up by its path for each line (journal), make a memfd for a long one, which ends
//! a process in the sandbox, and stamp lines of syslog with UTC where local time is meant.

use std::io;
use std::os::unix::net::UnixDatagram;
use std::path::Path;
use std::time::Duration;

use jiff::Timestamp;
use jiff::tz::TimeZone;
use log::Level;

use super::Line;

/// systemd.journal-fields(7), native protocol: <https://systemd.io/JOURNAL_NATIVE_PROTOCOL/>.
const JOURNAL: &str = "/run/systemd/journal/socket";
/// What syslog(3) uses.
const SYSLOG: &str = "/dev/log";

/// The name of the program in the log.
const IDENTIFIER: &str = "cordisk";
/// Of system daemons (RFC 3164, section 4.1.1).
const FACILITY: u8 = 3;

/// A line that the log daemon does not take for so long is lost. Only threads wait that have no
/// request to answer.
const SEND_TIMEOUT: Duration = Duration::from_secs(1);

/// A connection to the journal or to syslog.
#[derive(Debug)]
pub(super) struct SystemLog {
    socket: UnixDatagram,
    protocol: Protocol,
}

#[derive(Debug)]
enum Protocol {
    Journal {
        /// What each line has beside its text, as it is sent.
        fields: String,
    },
    Syslog {
        zone: TimeZone,
    },
}

impl SystemLog {
    /// Connects to the journal, or else to syslog; `None` without both. `fields` go to the journal.
    pub(super) fn connect(fields: &[(&'static str, String)]) -> Option<SystemLog> {
        SystemLog::connect_at(Path::new(JOURNAL), Path::new(SYSLOG), fields)
    }

    pub(super) fn connect_at(journal: &Path, syslog: &Path, fields: &[(&'static str, String)]) -> Option<SystemLog> {
        let connected = |path: &Path| {
            let socket = UnixDatagram::unbound()?;
            socket.connect(path)?;
            socket.set_write_timeout(Some(SEND_TIMEOUT))?;
            io::Result::Ok(socket)
        };
        if let Ok(socket) = connected(journal) {
            let pid = std::process::id();
            let mut text = format!("SYSLOG_IDENTIFIER={IDENTIFIER}\nSYSLOG_PID={pid}\nSYSLOG_FACILITY={FACILITY}\n");
            for (name, value) in fields {
                text += &format!("{name}={}\n", crate::error::one_line(value));
            }
            return Some(SystemLog { socket, protocol: Protocol::Journal { fields: text } });
        }
        let socket = connected(syslog).ok()?;
        Some(SystemLog { socket, protocol: Protocol::Syslog { zone: TimeZone::system() } })
    }

    /// For users.
    pub(super) fn name(&self) -> &'static str {
        match self.protocol {
            Protocol::Journal { .. } => "journal",
            Protocol::Syslog { .. } => "syslog",
        }
    }

    /// Sends one line.
    ///
    /// # Errors
    /// Those of send(2).
    pub(super) fn send(&self, subject: &str, line: &Line) -> io::Result<()> {
        let separator = if subject.is_empty() { "" } else { ": " };
        let severity = severity(line.level);
        let message = match &self.protocol {
            // One line each, so that no value needs the form with a length.
            Protocol::Journal { fields } => {
                let Line { target, text, .. } = line;
                format!("PRIORITY={severity}\n{fields}TARGET={target}\nMESSAGE={subject}{separator}{text}\n")
            }
            Protocol::Syslog { zone } => {
                let time = Timestamp::try_from(line.time).unwrap_or_default().to_zoned(zone.clone());
                let (time, pid, priority) = (time.strftime("%b %e %H:%M:%S"), std::process::id(), FACILITY << 3 | severity);
                format!("<{priority}>{time} {IDENTIFIER}[{pid}]: {subject}{separator}{}", line.text)
            }
        };
        self.socket.send(message.as_bytes()).map(drop)
    }
}

/// syslog(3).
fn severity(level: Level) -> u8 {
    match level {
        Level::Error => 3,
        Level::Warn => 4,
        Level::Info => 6,
        Level::Debug | Level::Trace => 7,
    }
}
