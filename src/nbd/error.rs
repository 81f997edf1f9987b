//! The error type of this crate. Pure.

use std::fmt;
use std::io;

/// Most characters of an error message that come from a server.
const LONGEST_FOREIGN_TEXT: usize = 300;

/// The kind of failure of an [`NbdError`]. Callers branch on it, never on the text.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum NbdErrorKind {
    /// No connection could be made, or the server has refused to serve the export for a reason
    /// that is not one of the kinds below. Another attempt may succeed.
    Connect,
    /// The server has sent nothing, or next to nothing, for the stall timeout although requests
    /// were in flight. The connection is closed; the next request opens another one.
    Stalled,
    /// The connection has ended before the request was answered. The next request opens another
    /// one.
    Closed {
        /// The server had answered at least one request on that connection.
        answered: bool,
    },
    /// The server has answered the request with this error number (the NBD protocol uses Linux
    /// errno values, such as 5 for EIO). The connection is still usable.
    Server(u32),
    /// The server has violated the protocol, or speaks another one. The connection is closed.
    Protocol,
    /// TLS failed: refused by the server, demanded by the server, or a certificate is not trusted.
    Tls,
    /// The server has no export of this name, or does not let this client use it.
    NoExport,
    /// The export has another size than when the client was created.
    Changed,
    /// The deadline of the request has passed.
    Deadline,
    /// The sink has refused a piece.
    Sink,
    /// The request makes no sense: it reaches beyond the end, or the configuration is not valid.
    Argument,
}

/// An error of an NBD client: its kind and one line of text.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct NbdError {
    kind: NbdErrorKind,
    text: String,
}

/// Shorthand for results of this crate.
pub(crate) type Result<T, E = NbdError> = std::result::Result<T, E>;

impl NbdError {
    /// Creates an error. `text` is part of a sentence, in lower case, without a full stop.
    pub(crate) fn new(kind: NbdErrorKind, text: impl Into<String>) -> NbdError {
        NbdError { kind, text: text.into() }
    }

    /// Creates an error of the kind [`NbdErrorKind::Protocol`].
    pub(crate) fn protocol(text: impl fmt::Display) -> NbdError {
        NbdError::new(NbdErrorKind::Protocol, format!("the server violates the protocol: {text}"))
    }

    /// Creates an error for a deadline that has passed.
    pub(crate) fn deadline() -> NbdError {
        NbdError::new(NbdErrorKind::Deadline, "the deadline has passed before the server answered")
    }

    /// Returns the error with `name` and a colon in front of its text.
    pub(crate) fn with_name(mut self, name: &str) -> NbdError {
        self.text = format!("{name}: {}", self.text);
        self
    }

    /// The kind of failure.
    pub fn kind(&self) -> NbdErrorKind {
        self.kind
    }
}

impl fmt::Display for NbdError {
    /// Writes one line: control characters, which names and texts of servers may have, are
    /// escaped.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&one_line(&self.text))
    }
}

impl std::error::Error for NbdError {}

/// Returns `text` with its control characters escaped.
pub(crate) fn one_line(text: &str) -> String {
    let mut line = String::with_capacity(text.len());
    for c in text.chars() {
        if c.is_control() { line.extend(c.escape_default()) } else { line.push(c) }
    }
    line
}

/// Returns what a server has sent as a text for people in a form that is safe to print: ASCII, and
/// not long.
pub(crate) fn foreign(text: &[u8]) -> String {
    let mut line = text[..text.len().min(LONGEST_FOREIGN_TEXT)].escape_ascii().to_string();
    if text.len() > LONGEST_FOREIGN_TEXT {
        line.push_str("...");
    }
    line
}

/// Returns the text of an error of the operating system without the number that std appends.
pub(crate) fn io_text(error: &io::Error) -> String {
    let text = error.to_string();
    match (error.raw_os_error(), text.rfind(" (os error ")) {
        (Some(_), Some(at)) => text[..at].to_string(),
        _ => text,
    }
}

/// Returns the name of an error number of the NBD protocol.
pub(crate) fn errno_name(number: u32) -> String {
    match number {
        1 => "EPERM".into(),
        5 => "EIO".into(),
        12 => "ENOMEM".into(),
        22 => "EINVAL".into(),
        28 => "ENOSPC".into(),
        75 => "EOVERFLOW".into(),
        95 => "ENOTSUP".into(),
        108 => "ESHUTDOWN".into(),
        other => format!("error {other}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_of_a_server_stays_on_one_line() {
        let text = foreign(b"no\nsuch \x1b[31mexport\xff");
        assert_eq!(text, "no\\nsuch \\x1b[31mexport\\xff");
        assert_eq!(foreign(&[b'a'; 1000]).len(), LONGEST_FOREIGN_TEXT + 3);
        let error = NbdError::protocol("a\nb").with_name("ho\tst");
        assert_eq!(error.to_string(), "ho\\tst: the server violates the protocol: a\\nb");
    }
}
