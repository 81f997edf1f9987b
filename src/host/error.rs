//! The error type of all crates. `export::errno` converts it to an errno and the crate `control` to
//! a QMP error class; no other code does.

use std::borrow::Cow;
use std::fmt::{self, Write};
use std::io;

use rustix::io::Errno;
use serde::{Deserialize, Serialize};

mod in_use;

pub use in_use::{Holder, InUse};

/// Shorthand for results of the workspace.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// The kind of failure of an [`Error`]. Callers branch on it, never on the text.
#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub enum ErrorKind {
    /// The bytes are not a qcow2 image, or violate a bound of the format at open.
    InvalidImage,
    /// The image uses a feature of the format that this program does not support.
    UnsupportedFeature,
    /// Metadata of an open image contradicts itself (`qemu-img check` calls it corruption).
    Corrupt,
    /// The request of the caller makes no sense.
    InvalidArgument,
    /// A change was requested of a disk or file that is open read-only.
    ReadOnly,
    /// No space is left, in the image or on the host.
    NoSpace,
    /// A file or object does not exist.
    NotFound,
    /// Another process or request uses the resource.
    Busy,
    /// The user may not do this: EACCES, EPERM, or a rule of this program.
    PermissionDenied,
    /// The reader of standard output has closed it (EPIPE), as `head` does after its last line.
    OutputClosed,
    /// An operation of the operating system failed; [`Error::errno`] has the errno.
    Io,
}

/// An error: its kind, one line of context, and its cause.
#[derive(Debug)]
pub struct Error {
    kind: ErrorKind,
    context: Cow<'static, str>,
    source: Option<Box<dyn std::error::Error + Send + Sync>>,
}

impl Error {
    /// Makes an error without a cause. `context` is part of a sentence, in lower case, without a
    /// full stop.
    pub fn new(kind: ErrorKind, context: impl Into<Cow<'static, str>>) -> Self {
        Error { kind, context: context.into(), source: None }
    }

    /// Wraps an operating system error. Its kind follows from the errno.
    pub fn io(context: impl Into<Cow<'static, str>>, source: io::Error) -> Self {
        const fn raw(errno: Errno) -> i32 {
            errno.raw_os_error()
        }
        const NOSPC: i32 = raw(Errno::NOSPC);
        const DQUOT: i32 = raw(Errno::DQUOT);
        const FBIG: i32 = raw(Errno::FBIG);
        const NOENT: i32 = raw(Errno::NOENT);
        const ROFS: i32 = raw(Errno::ROFS);
        const BUSY: i32 = raw(Errno::BUSY);
        const ACCES: i32 = raw(Errno::ACCESS);
        const PERM: i32 = raw(Errno::PERM);
        let kind = match source.raw_os_error() {
            Some(NOSPC | DQUOT | FBIG) => ErrorKind::NoSpace,
            Some(NOENT) => ErrorKind::NotFound,
            Some(ROFS) => ErrorKind::ReadOnly,
            Some(BUSY) => ErrorKind::Busy,
            Some(ACCES | PERM) => ErrorKind::PermissionDenied,
            _ => ErrorKind::Io,
        };
        Error { kind, context: context.into(), source: Some(Box::new(source)) }
    }

    /// Wraps an error of writing to standard output. The kind is [`ErrorKind::OutputClosed`] if the
    /// reader has closed it.
    pub fn standard_output(source: io::Error) -> Self {
        let is_closed = source.raw_os_error() == Some(Errno::PIPE.raw_os_error());
        let error = Error::io("standard output", source);
        if is_closed { Error { kind: ErrorKind::OutputClosed, ..error } } else { error }
    }

    /// Wraps any other error, with the kind `kind`.
    pub fn wrap(
        kind: ErrorKind,
        context: impl Into<Cow<'static, str>>,
        source: impl Into<Box<dyn std::error::Error + Send + Sync>>,
    ) -> Self {
        Error { kind, context: context.into(), source: Some(source.into()) }
    }

    /// Puts `context` in front, and keeps the kind and the cause.
    #[must_use]
    pub fn context(self, context: impl Into<Cow<'static, str>>) -> Self {
        Error { kind: self.kind, context: context.into(), source: Some(Box::new(self)) }
    }

    /// Adds which limit to raise if no process or thread could be started: EAGAIN of clone(2) and
    /// execve(2). Other errors stay as they are.
    #[must_use]
    pub fn explain_limit(self) -> Self {
        if self.kind != ErrorKind::Io || self.errno() != Some(Errno::AGAIN.raw_os_error()) {
            return self;
        }
        Error::new(
            self.kind,
            format!(
                "{self}: raise the limit of processes (ulimit -u, or TasksMax= of a systemd unit)"
            ),
        )
    }

    /// Returns the kind of failure.
    pub fn kind(&self) -> ErrorKind {
        self.kind
    }

    /// Returns the first cause of type `T` in the chain of causes, if there is one.
    pub fn cause<T: std::error::Error + 'static>(&self) -> Option<&T> {
        let mut cause: &(dyn std::error::Error + 'static) = self;
        loop {
            match cause.downcast_ref::<T>() {
                Some(found) => return Some(found),
                None => cause = cause.source()?,
            }
        }
    }

    /// Returns the errno of the operating system error in the chain of causes, if there is one.
    pub fn errno(&self) -> Option<i32> {
        let mut cause: &(dyn std::error::Error + 'static) = self;
        loop {
            if let Some(io) = cause.downcast_ref::<io::Error>() {
                return io.raw_os_error();
            }
            cause = cause.source()?;
        }
    }
}

impl fmt::Display for Error {
    /// Writes the whole chain on one line: `context: cause: cause`. Operating system errors lose
    /// their "(os error N)". Control characters, which file names may have, are escaped, so that a
    /// file name can neither forge a second line nor move the cursor of a terminal.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut line = OneLine(f);
        line.write_str(&self.context)?;
        match &self.source {
            Some(source) => match source.downcast_ref::<io::Error>() {
                Some(io) => write!(line, ": {}", os_text(io)),
                None => write!(line, ": {source}"),
            },
            None => Ok(()),
        }
    }
}

/// A writer that escapes control characters. Escaped text contains none, so nesting changes
/// nothing.
struct OneLine<'a, 'b>(&'a mut fmt::Formatter<'b>);

impl fmt::Write for OneLine<'_, '_> {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        for piece in text.split_inclusive(is_dangerous) {
            match piece.chars().next_back().filter(|&last| is_dangerous(last)) {
                Some(last) => write!(
                    self.0,
                    "{}{}",
                    &piece[..piece.len() - last.len_utf8()],
                    last.escape_default()
                )?,
                None => self.0.write_str(piece)?,
            }
        }
        Ok(())
    }
}

/// Longest line of a log or of standard error, in characters. Names from an image have at most 1023
/// bytes, paths at most 4096.
const LONGEST_LINE: usize = 8192;

/// Returns `text` in a form that is safe for a log or a terminal, even if an attacker has chosen
/// it: one line of at most 8192 characters, without characters that move a cursor or change a
/// colour or the direction of writing.
pub fn one_line(text: &str) -> String {
    let mut line = String::with_capacity(text.len());
    for c in text.chars().take(LONGEST_LINE) {
        if is_dangerous(c) { line.extend(c.escape_default()) } else { line.push(c) }
    }
    line
}

/// Returns whether `c` is a control character, a line or paragraph separator, invisible, or changes
/// the direction of writing.
fn is_dangerous(c: char) -> bool {
    c.is_control()
        || matches!(c, '\u{ad}' | '\u{61c}' | '\u{180e}' | '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2060}'..='\u{206f}' | '\u{feff}')
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.source.as_ref().map(|source| source.as_ref() as &(dyn std::error::Error + 'static))
    }
}

/// Returns the text of an operating system error as strerror(3) has it, such as `Input/output
/// error`, without the number that std appends.
pub fn os_text(error: &io::Error) -> String {
    let text = error.to_string();
    match (error.raw_os_error(), text.rfind(" (os error ")) {
        (Some(_), Some(at)) => text[..at].to_string(),
        _ => text,
    }
}

/// Adds context to a `Result` at the place where the path or offset is known.
pub trait Context<T> {
    /// Maps an error to an [`Error`] with `context` in front.
    ///
    /// # Errors
    /// The given error, wrapped.
    fn context<C: Into<Cow<'static, str>>>(self, context: impl FnOnce() -> C) -> Result<T>;
}

impl<T> Context<T> for io::Result<T> {
    fn context<C: Into<Cow<'static, str>>>(self, context: impl FnOnce() -> C) -> Result<T> {
        self.map_err(|error| Error::io(context(), error))
    }
}

impl<T> Context<T> for Result<T> {
    fn context<C: Into<Cow<'static, str>>>(self, context: impl FnOnce() -> C) -> Result<T> {
        self.map_err(|error| error.context(context()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn display_is_one_line_and_errno_is_found_through_the_chain() {
        let error = Error::io("L2 table at 0x50000", io::Error::from_raw_os_error(5))
            .context("overlay.qcow2");
        assert_eq!(error.to_string(), "overlay.qcow2: L2 table at 0x50000: Input/output error");
        assert_eq!(error.errno(), Some(5));
        assert_eq!(error.kind(), ErrorKind::Io);
        assert_eq!(Error::io("x", io::Error::from_raw_os_error(28)).kind(), ErrorKind::NoSpace);
        assert_eq!(
            Error::io("x", io::Error::from_raw_os_error(13)).kind(),
            ErrorKind::PermissionDenied
        );
    }

    /// Protects: EPIPE of standard output is distinguished from EPIPE of any other pipe or socket.
    #[test]
    fn only_standard_output_that_nobody_reads_is_closed() {
        let error = |errno| Error::standard_output(io::Error::from_raw_os_error(errno));
        assert_eq!(
            (error(32).kind(), error(32).to_string().as_str()),
            (ErrorKind::OutputClosed, "standard output: Broken pipe")
        );
        assert_eq!(error(28).kind(), ErrorKind::NoSpace);
        assert_eq!(Error::io("socket", io::Error::from_raw_os_error(32)).kind(), ErrorKind::Io);
    }

    #[test]
    fn a_line_of_the_log_is_one_line() {
        assert_eq!(
            one_line("a\nb\r\u{1b}[31m\u{202e}\u{2028}\u{9b}1m"),
            "a\\nb\\r\\u{1b}[31m\\u{202e}\\u{2028}\\u{9b}1m"
        );
        assert_eq!(one_line("\u{e9} \"x\" \\ 100%"), "\u{e9} \"x\" \\ 100%");
        assert_eq!(one_line(&one_line("\u{1b}")), "\\u{1b}", "once is enough");
        assert_eq!(one_line(&"x".repeat(LONGEST_LINE + 1)).len(), LONGEST_LINE);
    }

    #[test]
    fn control_characters_do_not_leave_the_line() {
        let inner = Error::io("b\u{1b}[31m\u{85}", io::Error::from_raw_os_error(2));
        let error =
            Error::new(ErrorKind::Io, "\u{e9} a\n\tcordisk: all is well\n").context("mount\r");
        assert_eq!(error.to_string(), "mount\\r: \u{e9} a\\n\\tcordisk: all is well\\n");
        assert_eq!(
            inner.context("a\\n").to_string(),
            "a\\n: b\\u{1b}[31m\\u{85}: No such file or directory"
        );
    }
}
