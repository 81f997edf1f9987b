//! The one error type of the engine. Converted to an errno in `fuse` and to a QMP class in `qmp`, nowhere else.

use std::borrow::Cow;
use std::fmt::{self, Write};
use std::io;

use rustix::io::Errno;
use serde::{Deserialize, Serialize};

mod in_use;

pub use in_use::{Holder, InUse};

/// Shorthand for results of the engine.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What kind of failure an [`Error`] is; callers branch on this, never on text.
#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub enum ErrorKind {
    /// The bytes are not a qcow2 image, or break a bound of the format at open.
    InvalidImage,
    /// A feature of the format that this program does not do.
    UnsupportedFeature,
    /// Metadata of an open image contradicts itself (`qemu-img check` word: corruption).
    Corrupt,
    /// The caller asked for something that makes no sense.
    InvalidArgument,
    /// A change was asked of something that is open read-only.
    ReadOnly,
    /// No space left, in the image or on the host.
    NoSpace,
    /// A file or object does not exist.
    NotFound,
    /// Somebody else uses the resource.
    Busy,
    /// An operation of the operating system failed; [`Error::errno`] says how.
    Io,
}

/// An error of the engine: its kind, one line of context, and the cause below it.
#[derive(Debug)]
pub struct Error {
    kind: ErrorKind,
    context: Cow<'static, str>,
    source: Option<Box<dyn std::error::Error + Send + Sync>>,
}

impl Error {
    /// An error without a cause. `context` is a whole sentence part, lower case, without a full stop.
    pub fn new(kind: ErrorKind, context: impl Into<Cow<'static, str>>) -> Self {
        Error { kind, context: context.into(), source: None }
    }

    /// Wraps an operating system error; its kind follows from the errno.
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
        let kind = match source.raw_os_error() {
            Some(NOSPC | DQUOT | FBIG) => ErrorKind::NoSpace,
            Some(NOENT) => ErrorKind::NotFound,
            Some(ROFS) => ErrorKind::ReadOnly,
            Some(BUSY) => ErrorKind::Busy,
            _ => ErrorKind::Io,
        };
        Error { kind, context: context.into(), source: Some(Box::new(source)) }
    }

    /// Wraps any other error under `kind`.
    pub fn wrap(
        kind: ErrorKind,
        context: impl Into<Cow<'static, str>>,
        source: impl Into<Box<dyn std::error::Error + Send + Sync>>,
    ) -> Self {
        Error { kind, context: context.into(), source: Some(source.into()) }
    }

    /// Puts `context` in front, keeping the kind and the cause.
    #[must_use]
    pub fn context(self, context: impl Into<Cow<'static, str>>) -> Self {
        Error { kind: self.kind, context: context.into(), source: Some(Box::new(self)) }
    }

    /// What kind of failure this is.
    pub fn kind(&self) -> ErrorKind {
        self.kind
    }

    /// The cause of this type, however deep it lies, if there is one.
    pub fn cause<T: std::error::Error + 'static>(&self) -> Option<&T> {
        let mut cause: &(dyn std::error::Error + 'static) = self;
        loop {
            match cause.downcast_ref::<T>() {
                Some(found) => return Some(found),
                None => cause = cause.source()?,
            }
        }
    }

    /// The errno of the operating system error at the bottom, if there is one.
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
    /// The whole chain on one line: `context: cause: cause`. Operating system errors lose their "(os error N)". Control characters, which
    /// file names may have, are escaped: nobody forges a second line or moves the cursor of a terminal with them.
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

/// Passes text on with control characters escaped. What is escaped already has none left, so nesting changes nothing.
struct OneLine<'a, 'b>(&'a mut fmt::Formatter<'b>);

impl fmt::Write for OneLine<'_, '_> {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        for piece in text.split_inclusive(is_dangerous) {
            match piece.chars().next_back().filter(|&last| is_dangerous(last)) {
                Some(last) => write!(self.0, "{}{}", &piece[..piece.len() - last.len_utf8()], last.escape_default())?,
                None => self.0.write_str(piece)?,
            }
        }
        Ok(())
    }
}

/// Longest line of a log or of standard error, in characters: names from an image are at most 1023 bytes, paths 4096.
const LONGEST_LINE: usize = 8192;

/// `text` as it may stand in a log and on a terminal, whoever has chosen it: one line, nothing that moves a cursor, changes a colour or the
/// direction of writing, at most 8192 characters.
pub fn one_line(text: &str) -> String {
    let mut line = String::with_capacity(text.len());
    for c in text.chars().take(LONGEST_LINE) {
        if is_dangerous(c) { line.extend(c.escape_default()) } else { line.push(c) }
    }
    line
}

/// Control characters, line and paragraph separators, and those that change the direction of writing or are not to be seen.
fn is_dangerous(c: char) -> bool {
    c.is_control()
        || matches!(c, '\u{ad}' | '\u{61c}' | '\u{180e}' | '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2060}'..='\u{206f}' | '\u{feff}')
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.source.as_ref().map(|source| source.as_ref() as &(dyn std::error::Error + 'static))
    }
}

/// The text of an operating system error as strerror(3) has it: `Input/output error`, without the number that std appends.
pub fn os_text(error: &io::Error) -> String {
    let text = error.to_string();
    match (error.raw_os_error(), text.rfind(" (os error ")) {
        (Some(_), Some(at)) => text[..at].to_string(),
        _ => text,
    }
}

/// Adds context to a `Result` where the path or offset is known.
pub trait Context<T> {
    /// Maps the error, if any, to an [`Error`] with `context` in front.
    ///
    /// # Errors
    /// The error given, wrapped.
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
        let error = Error::io("L2 table at 0x50000", io::Error::from_raw_os_error(5)).context("overlay.qcow2");
        assert_eq!(error.to_string(), "overlay.qcow2: L2 table at 0x50000: Input/output error");
        assert_eq!(error.errno(), Some(5));
        assert_eq!(error.kind(), ErrorKind::Io);
        assert_eq!(Error::io("x", io::Error::from_raw_os_error(28)).kind(), ErrorKind::NoSpace);
    }

    #[test]
    fn a_line_of_the_log_is_one_line() {
        assert_eq!(one_line("a\nb\r\u{1b}[31m\u{202e}\u{2028}\u{9b}1m"), "a\\nb\\r\\u{1b}[31m\\u{202e}\\u{2028}\\u{9b}1m");
        assert_eq!(one_line("\u{e9} \"x\" \\ 100%"), "\u{e9} \"x\" \\ 100%");
        assert_eq!(one_line(&one_line("\u{1b}")), "\\u{1b}", "once is enough");
        assert_eq!(one_line(&"x".repeat(LONGEST_LINE + 1)).len(), LONGEST_LINE);
    }

    #[test]
    fn control_characters_do_not_leave_the_line() {
        let inner = Error::io("b\u{1b}[31m\u{85}", io::Error::from_raw_os_error(2));
        let error = Error::new(ErrorKind::Io, "\u{e9} a\n\tcordisk: all is well\n").context("mount\r");
        assert_eq!(error.to_string(), "mount\\r: \u{e9} a\\n\\tcordisk: all is well\\n");
        assert_eq!(inner.context("a\\n").to_string(), "a\\n: b\\u{1b}[31m\\u{85}: No such file or directory");
    }
}
