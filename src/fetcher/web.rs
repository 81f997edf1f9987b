//! Files of web servers: ranged GETs over HTTP and HTTPS, and PUTs of whole files.
//!
//! ```text
//! name of the file ─▶ server ─ 302 ─▶ another server ─ 206 ─▶ head is compared ─▶ sink
//!                                      └ remembered until it refuses
//! ```
//! A redirect goes around the list of servers that the user allowed, so it is followed under rules:
//! the same protocol or from http to https, five times at most, and not to an address of this host
//! or its link, unless the name itself is such an address. Headers of the configuration go to the
//! server of the name alone. Behind a proxy, the names of targets are resolved by the proxy, and
//! only addresses in their URLs are checked.
//!
//! **Touches:** the network by [`Wire`]; the file of headers. **Never:** sends a HEAD request;
//! follows a redirect of a PUT; prints a query.
//! **Locks:** `headers` and `target` are leaf locks, held for a copy.

use std::fmt;
use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::header::{ACCEPT_ENCODING, IF_MATCH, LOCATION, RANGE};
use http::{HeaderMap, HeaderName, HeaderValue, Method, StatusCode};
use object_store::client::{HttpRequest, HttpRequestBody, HttpResponseBody};
use parking_lot::Mutex;
use remote::pin::{Pin, Validator};
use remote::url::{Scheme, SourceUrl};
use url::Url;

use crate::config::{SourceSettings, SourcesConfig, secret};
use crate::connector::{AddressClass, Connector, Names, Protocols, Wire, failure};
use crate::head::Head;
use crate::network::Network;
use crate::source::{RemoteSource, Retry, Sink, SourceError, asked, pour};

/// Redirects that one request follows: mirrors use one or two.
const MOST_REDIRECTS: u32 = 5;

/// A file of a web server.
pub(crate) struct WebSource {
    url: SourceUrl,
    settings: SourceSettings,
    /// For the name itself.
    wire: Wire,
    /// For the targets of redirects.
    redirects: Wire,
    allowed: Names,
    network: Arc<Network>,
    stall_timeout: Duration,
    headers: Mutex<HeaderMap>,
    /// Where the redirects of the last answer led.
    target: Mutex<Option<Url>>,
}

impl fmt::Debug for WebSource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("WebSource").field("url", &self.url).finish_non_exhaustive()
    }
}

impl WebSource {
    pub(crate) fn open(url: &SourceUrl, config: &SourcesConfig) -> Result<WebSource, SourceError> {
        WebSource::with_names(url, config, Names::default())
    }

    fn with_names(
        url: &SourceUrl,
        config: &SourcesConfig,
        names: Names,
    ) -> Result<WebSource, SourceError> {
        let settings = config.settings(url);
        let connector = Connector::new(config, &settings)?;
        let class = url.url().host_str().and_then(AddressClass::of_host);
        let allowed = names.clone().of_redirects(class.unwrap_or(AddressClass::Ordinary));
        let protocols =
            if url.scheme() == Scheme::Https { Protocols::Https } else { Protocols::Both };
        Ok(WebSource {
            headers: Mutex::new(headers(&settings)?),
            wire: connector.wire(names, protocols)?,
            redirects: connector.wire(allowed.clone(), protocols)?,
            url: url.clone(),
            settings,
            allowed,
            network: Arc::clone(config.network()),
            stall_timeout: config.stall_timeout,
            target: Mutex::new(None),
        })
    }

    /// Asks for a range, and follows redirects.
    async fn get(
        &self,
        range: &Range<u64>,
        tag: Option<&str>,
    ) -> Result<(Head, HttpResponseBody), SourceError> {
        let remembered = self.target.lock().clone();
        if let Some(target) = remembered {
            let result = self.follow(target, range, tag).await;
            if let Ok((head, _)) = &result
                && (head.status.is_success() || head.status == StatusCode::TOO_MANY_REQUESTS)
            {
                return result;
            }
            // The target has expired, or its server is gone: the server of the name may know
            // another one. An error without an answer is the caller's to repeat.
            *self.target.lock() = None;
            result?;
        }
        self.follow(self.url.url().clone(), range, tag).await
    }

    /// Asks `url`, and where its answer leads.
    async fn follow(
        &self,
        mut url: Url,
        range: &Range<u64>,
        tag: Option<&str>,
    ) -> Result<(Head, HttpResponseBody), SourceError> {
        for _ in 0..=MOST_REDIRECTS {
            let (head, body) = self.ask(&url, range, tag).await?;
            if !head.is_redirect() {
                if url != *self.url.url() && head.status.is_success() {
                    *self.target.lock() = Some(url);
                }
                return Ok((head, body));
            }
            url = self.redirect(&url, &head)?;
        }
        Err(SourceError::new(Retry::Never, format!("more than {MOST_REDIRECTS} redirects")))
    }

    /// Whether `url` is on the server of the name.
    fn is_own(&self, url: &Url) -> bool {
        url.origin() == self.url.url().origin()
    }

    /// Makes a GET of `url`, with the headers of the configuration for the server of the name.
    fn request(&self, url: &Url, body: HttpRequestBody) -> Result<HttpRequest, SourceError> {
        let mut request = HttpRequest::new(body);
        *request.uri_mut() = url
            .as_str()
            .parse()
            .map_err(|error: http::uri::InvalidUri| SourceError::never("the URL", &error))?;
        if self.is_own(url) {
            request.headers_mut().extend(self.headers.lock().clone());
        }
        Ok(request)
    }

    /// One request.
    async fn ask(
        &self,
        url: &Url,
        range: &Range<u64>,
        tag: Option<&str>,
    ) -> Result<(Head, HttpResponseBody), SourceError> {
        let mut request = self.request(url, HttpRequestBody::empty())?;
        let headers = request.headers_mut();
        let value = |text: &str| {
            HeaderValue::from_str(text).map_err(|error| SourceError::never("the pin", &error))
        };
        headers.insert(RANGE, value(&format!("bytes={}-{}", range.start, range.end - 1))?);
        headers.insert(ACCEPT_ENCODING, HeaderValue::from_static("identity"));
        if let Some(tag) = tag {
            headers.insert(IF_MATCH, value(tag)?);
        }
        let wire = if self.is_own(url) { &self.wire } else { &self.redirects };
        let (head, response) = wire.exchange(request).await.map_err(|(error, _)| error)?;
        Ok((head, response.into_body()))
    }

    /// Where the redirect in `head` leads from `url`, if it may be followed.
    fn redirect(&self, url: &Url, head: &Head) -> Result<Url, SourceError> {
        let refused = |why: String| SourceError::new(Retry::Never, why);
        let status = head.status.as_u16();
        let target = head
            .headers
            .get(LOCATION)
            .and_then(|value| value.to_str().ok())
            .and_then(|location| url.join(location).ok())
            .ok_or_else(|| refused(format!("a redirect ({status}) without a usable Location")))?;
        let host = target.host_str().unwrap_or_default();
        let shown = format!("{}://{host}", target.scheme());
        match (url.scheme(), target.scheme()) {
            ("http", "http") | (_, "https") => {}
            _ => {
                return Err(refused(format!(
                    "a redirect ({status}) from {} to {shown} is not followed",
                    url.scheme()
                )));
            }
        }
        if !target.username().is_empty() || target.password().is_some() {
            return Err(refused(format!(
                "a redirect ({status}) to {shown} with a password is not followed"
            )));
        }
        if !self.allowed.allows_host(host) {
            return Err(refused(format!(
                "a redirect ({status}) leads to {shown}, which is an address of this host or its link"
            )));
        }
        Ok(target)
    }
}

impl RemoteSource for WebSource {
    fn look(&self) -> Result<Pin, SourceError> {
        let ask = async {
            let (head, _) = self.get(&(0..1), None).await?;
            head.pin(self.url.scheme(), None)
        };
        self.network.runtime()?.block_on(ask).map_err(|error| error.of(&self.url))
    }

    fn read(&self, pin: &Pin, range: Range<u64>, sink: &mut Sink<'_>) -> Result<(), SourceError> {
        let read = async {
            asked(pin, &range)?;
            let tag = match &pin.validator {
                Validator::Etag(tag) => Some(tag.as_str()),
                Validator::None => None,
                Validator::Version(_) | Validator::Generation(_) => {
                    return Err(SourceError::new(
                        Retry::Never,
                        "the pin is that of an object store, and this is a web server",
                    ));
                }
            };
            let (head, body) = self.get(&range, tag).await?;
            head.check(self.url.scheme(), pin, &range)?;
            let len = range.end - range.start;
            pour(body.bytes_stream(), len, self.stall_timeout, sink, |error| {
                failure(&error, "the answer")
            })
            .await
        };
        self.network.runtime()?.block_on(read).map_err(|error| error.of(&self.url))
    }

    fn write(&self, bytes: Bytes) -> Result<(), SourceError> {
        let write = async {
            let mut request = self.request(self.url.url(), bytes.into())?;
            *request.method_mut() = Method::PUT;
            let (head, _) = self.wire.exchange(request).await.map_err(|(error, _)| error)?;
            if head.is_redirect() {
                let status = head.status.as_u16();
                let text = format!("the redirect ({status}) of a request to write is not followed");
                return Err(SourceError::new(Retry::Never, text));
            }
            head.written()
        };
        self.network.runtime()?.block_on(write).map_err(|error| error.of(&self.url))
    }

    fn refresh(&self) -> Result<(), SourceError> {
        let headers = headers(&self.settings).map_err(|error| error.of(&self.url))?;
        *self.headers.lock() = headers;
        *self.target.lock() = None;
        Ok(())
    }
}

/// The lines `Name: value` of the file of headers.
fn headers(settings: &SourceSettings) -> Result<HeaderMap, SourceError> {
    let mut headers = HeaderMap::new();
    let Some(path) = &settings.header_file else {
        return Ok(headers);
    };
    let text = secret(path).map_err(|error| SourceError::never("header-file", &error))?;
    for (number, line) in text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty()) {
        let header = line.split_once(':').and_then(|(name, value)| {
            let name = HeaderName::from_bytes(name.trim().as_bytes()).ok()?;
            let mut value = HeaderValue::from_str(value.trim()).ok()?;
            value.set_sensitive(true);
            Some((name, value))
        });
        let (name, value) = header.ok_or_else(|| {
            SourceError::new(
                Retry::Never,
                format!("header-file {}: line {}: not Name: value", path.display(), number + 1),
            )
        })?;
        headers.append(name, value);
    }
    Ok(headers)
}

#[cfg(test)]
mod tests;
