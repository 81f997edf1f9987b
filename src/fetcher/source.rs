//! One file on a server, as the fetcher reads it.
//!
//! A [`RemoteSource`] makes one try for each call: it knows nothing of deadlines, and never asks
//! the same question twice. The caller does, with the [`Retry`] of the error.
//!
//! **Touches:** nothing itself; `web` and `object` make requests. **Never:** retries; hands a byte
//! to the caller before the head of the answer has been compared with the pin.
//! **Locks:** none. **Invariants:** no text of an error contains a secret of a name or of the
//! configuration.

use std::fmt;
use std::io;
use std::ops::Range;
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures_util::{Stream, StreamExt as _};
use host::storage::BlockStatus;
use remote::pin::Pin;
use remote::url::{Scheme, SourceUrl};

use crate::ahead::PART;
use crate::config::SourcesConfig;
use crate::object::ObjectSource;
use crate::redact::text;
use crate::web::WebSource;

/// Where the bytes of a range go. It is called on the thread that called [`RemoteSource::read`].
pub type Sink<'a> = dyn FnMut(&[u8]) -> io::Result<()> + 'a;

/// One file on a server. Threads may call all functions at the same time; each read is a request of
/// its own. No function may be called on a thread of a tokio runtime, because all of them block.
pub trait RemoteSource: Send + Sync + fmt::Debug {
    /// What one request for a stream fetches, in bytes, unless the link holds much more. A source
    /// that cannot end a request early asks for less than 8 MiB.
    fn part(&self) -> u64 {
        PART
    }

    /// Asks for the first byte, and returns the size and the identity that the file has now.
    ///
    /// The request is a GET of `bytes=0-0` and not a HEAD, because the signature of a presigned URL
    /// is valid for one method. [`remote::pin::Validator::None`] stands for a server that gives no
    /// identity or a weak entity tag: the caller refuses it, unless the user accepts files that
    /// are not pinned.
    ///
    /// # Errors
    /// [`SourceError`]. An empty file is one, with [`Retry::Never`].
    fn look(&self) -> Result<Pin, SourceError>;

    /// Reads `range` (offsets in bytes, not empty, below `pin.size`) of the content that `pin`
    /// names, and passes the bytes to `sink` in order, as they arrive.
    ///
    /// Status, Content-Range, Content-Length, total size and identity of the answer are compared
    /// with `pin` and `range` before the first byte goes to `sink`.
    ///
    /// # Errors
    /// [`SourceError`]. `sink` may have got a part of the bytes, all of them from the content that
    /// `pin` names: the caller asks for the rest. [`Retry::Local`] if `sink` failed.
    fn read(&self, pin: &Pin, range: Range<u64>, sink: &mut Sink<'_>) -> Result<(), SourceError>;

    /// Returns what the server says about the bytes from `offset` on of the content that `pin`
    /// names, for at most `max` bytes, without reading them: runs that follow each other, with
    /// their lengths in bytes. They may end early; the caller then asks for the rest. HTTP has no
    /// such question: all bytes are data.
    ///
    /// # Errors
    /// [`SourceError`]; with [`Retry::Changed`] the server has another file, about whose zeros
    /// nothing is said.
    fn status(
        &self,
        pin: &Pin,
        offset: u64,
        max: u64,
    ) -> Result<Vec<(BlockStatus, u64)>, SourceError> {
        let _ = (pin, offset);
        Ok(vec![(BlockStatus::Data, max)])
    }

    /// Writes the file as a whole, with these bytes. No reader gets a mix of the old file and the
    /// new one, as far as the server keeps to that.
    ///
    /// # Errors
    /// [`SourceError`]; with [`Retry::Never`] if the protocol or the server takes no files.
    fn write(&self, bytes: Bytes) -> Result<(), SourceError> {
        let _ = bytes;
        Err(SourceError::new(Retry::Never, "the protocol has no way to write a file"))
    }

    /// Reads files of credentials again, and forgets where redirects led. The caller does this once
    /// after [`Retry::Credentials`], because keys of limited lifetime are replaced in their files.
    ///
    /// # Errors
    /// [`SourceError`] if a file cannot be read; the source then keeps what it had.
    fn refresh(&self) -> Result<(), SourceError> {
        Ok(())
    }
}

/// What the caller may do after an error.
#[derive(Debug)]
pub enum Retry {
    /// The connection ended before the first byte of an answer, as an idle connection does that the
    /// server has closed. The same request may be made again at once, one time.
    AtOnce,
    /// The same request may succeed later. The caller increases its pause with each such error,
    /// unless bytes have arrived in between.
    Later {
        /// The pause that the server asks for (`Retry-After`, RFC 9110, section 10.2.3).
        after: Option<Duration>,
        /// The server has too much to do (429, or 503): the caller makes fewer requests at a time.
        slow_down: bool,
    },
    /// The same request will fail again.
    Never,
    /// The file on the server is not the one that the pin names.
    Changed,
    /// The bytes are not those of the chunk list. One more try makes sense.
    Damaged,
    /// The server refuses the credentials (401, 403, or a token that has expired). One more try
    /// after [`RemoteSource::refresh`] makes sense, and after that none.
    Credentials,
    /// The sink of the caller failed, with this error.
    Local(io::Error),
}

impl Retry {
    /// Later, without an opinion of the server.
    pub const LATER: Retry = Retry::Later { after: None, slow_down: false };
}

/// Why a request failed. The text is one line, with the causes, without secrets.
#[derive(Debug)]
pub struct SourceError {
    /// What the caller may do.
    pub retry: Retry,
    text: String,
}

impl SourceError {
    /// Makes an error. The caller makes sure that `text` contains no secret.
    pub fn new(retry: Retry, text: impl AsRef<str>) -> SourceError {
        SourceError { retry, text: host::error::one_line(text.as_ref()) }
    }

    /// Makes an error of the operating system, of the configuration or of a library, which no retry
    /// helps. URLs in the causes lose their queries.
    pub fn never(context: &str, cause: &(dyn std::error::Error + 'static)) -> SourceError {
        SourceError::new(Retry::Never, format!("{context}: {}", text(cause)))
    }

    /// The text with the name of the file in front, once.
    pub fn about(&self, name: &str) -> String {
        let text = &self.text;
        if text.starts_with(name) { text.clone() } else { format!("{name}: {text}") }
    }

    /// Puts the name of the file in front.
    #[must_use]
    pub fn of(self, url: &SourceUrl) -> SourceError {
        SourceError { text: host::error::one_line(&format!("{url}: {}", self.text)), ..self }
    }
}

impl fmt::Display for SourceError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

impl std::error::Error for SourceError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match &self.retry {
            Retry::Local(error) => Some(error),
            _ => None,
        }
    }
}

/// Opens the file at `url`: reads the files of its configuration, and makes no request.
///
/// # Errors
/// [`SourceError`] with [`Retry::Never`] for a configuration that cannot be used, and for the
/// protocols that are not HTTP.
pub fn open(url: &SourceUrl, config: &SourcesConfig) -> Result<Box<dyn RemoteSource>, SourceError> {
    let opened: Result<Box<dyn RemoteSource>, SourceError> = match url.scheme() {
        Scheme::Http | Scheme::Https => {
            WebSource::open(url, config).map(|source| Box::new(source) as Box<dyn RemoteSource>)
        }
        Scheme::S3 | Scheme::Gs | Scheme::Az => {
            ObjectSource::open(url, config).map(|source| Box::new(source) as Box<dyn RemoteSource>)
        }
        Scheme::Nbd | Scheme::Nbds | Scheme::NbdUnix => {
            Err(SourceError::new(Retry::Never, "is no name of HTTP or of an object store"))
        }
    };
    opened.map_err(|error| error.of(url))
}

/// Refuses a range that is empty or not inside the file that `pin` names.
pub(crate) fn asked(pin: &Pin, range: &Range<u64>) -> Result<(), SourceError> {
    if range.start < range.end && range.end <= pin.size {
        return Ok(());
    }
    Err(SourceError::new(
        Retry::Never,
        format!("the range {}..{} is not inside the {} bytes", range.start, range.end, pin.size),
    ))
}

/// The fewest bytes that an answer has to bring in the stall timeout. A server that sends a byte
/// now and then never stalls; with less than this, one block of the cache (64 KiB) takes longer
/// than two minutes, for which no thread of a guest waits.
const FEWEST: u64 = 4 << 10;

/// What an answer has brought in the time that was spent waiting for it.
struct Pace {
    stall_timeout: Duration,
    waited: Duration,
    bytes: u64,
}

impl Pace {
    /// Notes a piece. Returns whether the answer is too slow.
    fn is_too_slow(&mut self, waited: Duration, bytes: usize) -> bool {
        self.waited += waited;
        self.bytes += bytes as u64;
        if self.bytes >= FEWEST {
            (self.waited, self.bytes) = (Duration::ZERO, 0);
        }
        self.waited >= self.stall_timeout
    }
}

/// Passes the `len` bytes of a body to `sink`, and never more. An answer that brings less than
/// [`FEWEST`] bytes in `stall_timeout` has failed.
pub(crate) async fn pour<E>(
    mut body: impl Stream<Item = Result<Bytes, E>> + Unpin,
    len: u64,
    stall_timeout: Duration,
    sink: &mut Sink<'_>,
    failed: impl FnOnce(E) -> SourceError,
) -> Result<(), SourceError> {
    let mut left = len;
    let mut pace = Pace { stall_timeout, waited: Duration::ZERO, bytes: 0 };
    loop {
        let begun = Instant::now();
        let Some(piece) = body.next().await else { break };
        let waited = begun.elapsed();
        // An error after the head is never "at once": bytes of the answer may have arrived.
        let piece = match piece {
            Ok(piece) => piece,
            Err(error) => {
                let error = failed(error);
                return Err(match error.retry {
                    Retry::AtOnce => SourceError { retry: Retry::LATER, ..error },
                    _ => error,
                });
            }
        };
        left = left.checked_sub(piece.len() as u64).ok_or_else(|| {
            SourceError::new(Retry::Never, format!("the answer has more than {len} bytes"))
        })?;
        if !piece.is_empty() {
            sink(&piece).map_err(|error| {
                let text =
                    format!("the bytes could not be stored: {}", host::error::os_text(&error));
                SourceError::new(Retry::Local(error), text)
            })?;
        }
        if pace.is_too_slow(waited, piece.len()) && left > 0 {
            let seconds = stall_timeout.as_secs_f32();
            return Err(SourceError::new(
                Retry::LATER,
                format!("the answer brings less than {FEWEST} bytes in {seconds} seconds"),
            ));
        }
    }
    match left {
        0 => Ok(()),
        _ => Err(SourceError::new(
            Retry::LATER,
            format!("the answer ended after {} of {len} bytes", len - left),
        )),
    }
}
