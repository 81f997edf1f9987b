//! The head of an HTTP answer: what it means, and whether it is an answer to the question that was
//! asked.
//!
//! ```text
//! GET bytes=a-b, If-Match ─▶ server ─▶ head ─ wanted ─▶ body ─▶ sink
//!                                        └─ refused ─▶ SourceError, body unread
//! ```
//! Some servers ignore `If-Match`, and some caches mix the head of one file with the size of
//! another. So each head is compared with the pin, whatever the request said.
//!
//! **Touches:** nothing. **Never:** reads a body. **Locks:** none.

use std::ops::Range;
use std::time::{Duration, SystemTime};

use http::header::{
    CONTENT_ENCODING, CONTENT_LENGTH, CONTENT_RANGE, CONTENT_TYPE, ETAG, RETRY_AFTER,
    TRANSFER_ENCODING,
};
use http::{HeaderMap, HeaderName, StatusCode};
use remote::pin::{Pin, Validator};
use remote::url::Scheme;

use crate::source::{Retry, SourceError};

/// Header of the version of an object in S3.
const S3_VERSION: HeaderName = HeaderName::from_static("x-amz-version-id");
/// Header of the generation of an object in Google Cloud Storage.
const GS_GENERATION: HeaderName = HeaderName::from_static("x-goog-generation");
/// Header of the version of a blob in Azure.
const AZ_VERSION: HeaderName = HeaderName::from_static("x-ms-version-id");

/// The head of an answer.
#[derive(Clone, Debug)]
pub(crate) struct Head {
    pub(crate) status: StatusCode,
    pub(crate) headers: HeaderMap,
    /// The code of an error in the body (`<Code>` of S3, Google and Azure), letters and digits.
    pub(crate) code: Option<String>,
}

/// A Content-Range: the range in bytes, which a refusal (416) lacks, and the size of the file.
#[derive(Debug, Eq, PartialEq)]
struct ContentRange {
    range: Option<Range<u64>>,
    total: u64,
}

impl Head {
    /// The pin that this answer to GET `bytes=0-0` gives. `version` is the version or generation
    /// that the name of the file demands.
    pub(crate) fn pin(&self, scheme: Scheme, version: Option<&str>) -> Result<Pin, SourceError> {
        if self.status == StatusCode::RANGE_NOT_SATISFIABLE
            && self.content_range().is_none_or(|content| content.total == 0)
        {
            return Err(SourceError::new(Retry::Never, "the file on the server is empty"));
        }
        let size = self.partial(&(0..1))?;
        let validator = match (scheme, self.version_of(scheme)) {
            (Scheme::Gs, Some(generation)) => Validator::Generation(generation),
            (Scheme::Gs, None) => {
                return Err(never("the answer has no generation (x-goog-generation)"));
            }
            (Scheme::S3, Some(found)) => Validator::Version(found),
            (Scheme::Az, Some(found)) if version.is_some() => Validator::Version(found),
            _ => self.etag().map_or(Validator::None, Validator::Etag),
        };
        if let (Some(version), Validator::Version(found) | Validator::Generation(found)) =
            (version, &validator)
            && version != found
        {
            return Err(never("the server answers with another version than the name demands"));
        }
        if version.is_some() && matches!(validator, Validator::Etag(_) | Validator::None) {
            return Err(never(
                "the name demands a version, and the server does not say which it has",
            ));
        }
        Ok(Pin { size, validator, digest: None })
    }

    /// Refuses this answer unless it begins exactly `range` of the content that `pin` names.
    pub(crate) fn check(
        &self,
        scheme: Scheme,
        pin: &Pin,
        range: &Range<u64>,
    ) -> Result<(), SourceError> {
        if self.status == StatusCode::RANGE_NOT_SATISFIABLE {
            let total = self.content_range().map(|content| content.total);
            if total.is_some_and(|total| total != pin.size) {
                return Err(changed(&format!("its size is not {} bytes any more", pin.size)));
            }
        }
        let total = self.partial(range)?;
        if total != pin.size {
            return Err(changed(&format!("it has {total} bytes instead of {}", pin.size)));
        }
        let (what, wanted, found) = match &pin.validator {
            Validator::Etag(tag) => ("entity tag", tag, self.raw(&ETAG)),
            Validator::Version(version) => ("version", version, self.version_of(scheme)),
            Validator::Generation(generation) => {
                ("generation", generation, self.version_of(scheme))
            }
            Validator::None => return Ok(()),
        };
        match found {
            Some(found) if found == *wanted => Ok(()),
            Some(_) => Err(changed(&format!("it has another {what}"))),
            None => Err(never(&format!(
                "an answer has no {what}, although the file is pinned to one: the server, or a proxy in between, drops it"
            ))),
        }
    }

    /// Refuses this answer to PUT unless the server has the file now.
    pub(crate) fn written(&self) -> Result<(), SourceError> {
        match self.status.as_u16() {
            200 | 201 | 204 => Ok(()),
            404 | 405 | 409 | 501 => {
                Err(never(&format!("the server takes no file there: {}", self.status_text())))
            }
            403 => Err(SourceError::new(
                Retry::Credentials,
                format!("the credentials of the source may not write: {}", self.status_text()),
            )),
            status @ (200..=299 | 304) => {
                Err(never(&format!("the answer {status} does not say that the file was written")))
            }
            _ => Err(self.refusal()),
        }
    }

    /// Whether this answer leads to another URL.
    pub(crate) fn is_redirect(&self) -> bool {
        matches!(self.status.as_u16(), 301 | 302 | 303 | 307 | 308)
    }

    /// Refuses an answer that is not 206 for exactly `range`. Returns the size of the whole file.
    fn partial(&self, range: &Range<u64>) -> Result<u64, SourceError> {
        if self.status != StatusCode::PARTIAL_CONTENT {
            return Err(self.refusal());
        }
        // A transfer encoding is undone on the way, but no library below undoes more than chunks.
        let is_coded = |name: HeaderName, plain: &str| {
            let mut values = self.headers.get_all(name).iter();
            values.any(|value| !value.as_bytes().eq_ignore_ascii_case(plain.as_bytes()))
        };
        if is_coded(CONTENT_ENCODING, "identity") || is_coded(TRANSFER_ENCODING, "chunked") {
            return Err(never("the server sends the file compressed, which has other offsets"));
        }
        let content = self.content_range().ok_or_else(|| {
            never("the answer 206 has no usable Content-Range with the size of the file")
        })?;
        if content.range.as_ref() != Some(range) {
            return Err(never(&format!(
                "the server answers with the range {} for the bytes {}-{}",
                self.raw(&CONTENT_RANGE).unwrap_or_default(),
                range.start,
                range.end - 1,
            )));
        }
        // Without the header, the body is chunked, and the bytes are counted as they arrive.
        if let Some(length) = self.headers.get(CONTENT_LENGTH) {
            let length = length.to_str().ok().and_then(|text| text.parse::<u64>().ok());
            if length != Some(range.end - range.start) {
                return Err(never("Content-Length and Content-Range of the answer contradict"));
            }
        }
        Ok(content.total)
    }

    /// The error for a status other than 206.
    fn refusal(&self) -> SourceError {
        let code = self.code.as_deref().unwrap_or_default();
        let (retry, hint) = match (self.status.as_u16(), code) {
            (200, _) if self.is_html() => (
                Retry::Never,
                "this is an HTML page instead of the file: is the URL that of a web page or a login?",
            ),
            (200, _) => (
                Retry::Never,
                "the server ignores ranges, which a remote base needs: use another server",
            ),
            (301 | 302 | 303 | 307 | 308, _) => {
                (Retry::Never, "the object is elsewhere: set region or endpoint of the source")
            }
            (400, "ExpiredToken" | "InvalidToken" | "TokenRefreshRequired") | (401, _) => {
                (Retry::Credentials, "renew the credentials of the source")
            }
            (400, "RequestTimeout") => (Retry::LATER, ""),
            (400, "AuthorizationHeaderMalformed") => (Retry::Never, "set the region of the source"),
            (403, "InvalidObjectState") => {
                (Retry::Never, "the object is archived: restore it first")
            }
            (403, "RequestTimeTooSkewed") => {
                (Retry::Credentials, "the clock of this host is wrong")
            }
            (403, _) => (
                Retry::Credentials,
                "the credentials of the source are missing, wrong or expired, as a signed URL can be",
            ),
            (404 | 410, _) => (Retry::Never, "the file does not exist"),
            (407, _) => (Retry::Never, "the proxy wants credentials: set proxy of the source"),
            (412, _) => return changed(&format!("the server answers {}", self.status_text())),
            (408 | 425, _) => (self.later(false), ""),
            (429 | 503, _) => (self.later(true), ""),
            (501 | 505, _) => (Retry::Never, ""),
            (500..=599, _) => (self.later(code == "SlowDown"), ""),
            _ => (Retry::Never, ""),
        };
        let colon = if hint.is_empty() { "" } else { ": " };
        SourceError::new(retry, format!("the server answers {}{colon}{hint}", self.status_text()))
    }

    fn status_text(&self) -> String {
        let code = self.code.as_ref().map(|code| format!(" ({code})")).unwrap_or_default();
        let reason = self.status.canonical_reason().unwrap_or_default();
        format!("{} {reason}", self.status.as_u16()).trim_end().to_owned() + &code
    }

    fn is_html(&self) -> bool {
        self.raw(&CONTENT_TYPE).is_some_and(|kind| kind.to_ascii_lowercase().contains("html"))
    }

    fn later(&self, slow_down: bool) -> Retry {
        let after = self.raw(&RETRY_AFTER).and_then(|text| retry_after(&text, SystemTime::now()));
        Retry::Later { after, slow_down }
    }

    /// A header that occurs once and is text.
    fn raw(&self, name: &HeaderName) -> Option<String> {
        let mut all = self.headers.get_all(name).iter();
        let first = all.next()?.to_str().ok()?.trim();
        all.next().is_none().then(|| first.to_owned())
    }

    /// The entity tag, if it is strong: one string in quotes (RFC 9110, section 8.8.3).
    fn etag(&self) -> Option<String> {
        self.raw(&ETAG).filter(|tag| {
            tag.strip_prefix('"')
                .and_then(|rest| rest.strip_suffix('"'))
                .is_some_and(|inner| !inner.is_empty() && !inner.contains('"'))
        })
    }

    fn version_of(&self, scheme: Scheme) -> Option<String> {
        let name = match scheme {
            Scheme::S3 => &S3_VERSION,
            Scheme::Gs => &GS_GENERATION,
            Scheme::Az => &AZ_VERSION,
            _ => return None,
        };
        // "null" is the version of objects from before the bucket had versions; it can change.
        self.raw(name).filter(|version| !version.is_empty() && version != "null")
    }

    fn content_range(&self) -> Option<ContentRange> {
        parse_content_range(&self.raw(&CONTENT_RANGE)?)
    }
}

fn never(text: &str) -> SourceError {
    SourceError::new(Retry::Never, text)
}

fn changed(why: &str) -> SourceError {
    SourceError::new(Retry::Changed, format!("the file on the server has changed: {why}"))
}

/// Parses `bytes A-B/SIZE` and `bytes */SIZE` (RFC 9110, section 14.4). A size of `*` is of no use.
fn parse_content_range(value: &str) -> Option<ContentRange> {
    let (unit, rest) = value.split_once(' ')?;
    if !unit.eq_ignore_ascii_case("bytes") {
        return None;
    }
    let (range, total) = rest.trim().split_once('/')?;
    let total = number(total)?;
    if range == "*" {
        return Some(ContentRange { range: None, total });
    }
    let (first, last) = range.split_once('-')?;
    let range = number(first)?..number(last)?.checked_add(1)?;
    (range.start < range.end && range.end <= total)
        .then_some(ContentRange { range: Some(range), total })
}

/// Digits alone: `u64::from_str` takes a sign as well.
fn number(text: &str) -> Option<u64> {
    text.bytes().all(|byte| byte.is_ascii_digit()).then(|| text.parse().ok()).flatten()
}

/// The pause that Retry-After asks for: seconds, or a date (RFC 9110, section 10.2.3).
fn retry_after(value: &str, now: SystemTime) -> Option<Duration> {
    if let Some(seconds) = number(value) {
        return Some(Duration::from_secs(seconds));
    }
    let date = httpdate::parse_http_date(value).ok()?;
    Some(date.duration_since(now).unwrap_or_default())
}

#[cfg(test)]
mod tests;
