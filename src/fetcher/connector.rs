//! The HTTP client below all sources: TLS, proxies, time limits, names, and errors without secrets.
//!
//! ```text
//! web ────────────────▶ Wire::exchange ─▶ reqwest ─▶ server
//! object_store ─ call ─▶ Wire (HttpService), which leaves a Record of what happened
//! ```
//! object_store hides the head of an answer and the kind of a failure, and puts whole URLs into its
//! errors. So a request carries a [`Record`] in its extensions, and the source reads that instead.
//!
//! **Touches:** sockets, DNS, the files of certificates. **Never:** follows a redirect; retries;
//! asks for compression; uses HTTP/2, where one lost packet stalls all requests.
//! **Locks:** one leaf lock in each record.

use std::error::Error;
use std::future::Future;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::path::Path;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures_util::StreamExt as _;
use object_store::ClientOptions;
use object_store::client::{
    ClientConfigKey, HttpClient, HttpConnector, HttpError, HttpErrorKind, HttpRequest,
    HttpResponse, HttpResponseBody, HttpService,
};
use parking_lot::Mutex;
use reqwest::dns::{Name, Resolve, Resolving};
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject as _;
use rustls::{ConfigBuilder, WantsVerifier};
use rustls_platform_verifier::BuilderVerifierExt as _;

use crate::config::{SourceSettings, SourcesConfig};
use crate::head::Head;
use crate::network::Network;
use crate::redact::{chain, text};
use crate::source::{Retry, SourceError};

/// Idle connections are closed before the server does it: S3 closes them after 10 seconds, and a
/// request on a connection that is being closed costs a round trip.
const IDLE: Duration = Duration::from_secs(8);

/// Bytes of the body of an error that are searched for its code.
const ERROR_BODY: usize = 16 << 10;

/// The longest time in which such a body comes. A server that trickles it must not hold the request
/// that finds out whether the server is back.
const ERROR_BODY_TIME: Duration = Duration::from_secs(2);

/// The result of a request, when the request was made by object_store.
#[derive(Clone, Debug, Default)]
pub(crate) struct Record(Arc<Mutex<Option<Result<Head, SourceError>>>>);

impl Record {
    /// What happened; `None` if the request was not made.
    pub(crate) fn take(&self) -> Option<Result<Head, SourceError>> {
        self.0.lock().take()
    }
}

/// An HTTP client.
#[derive(Clone, Debug)]
pub(crate) struct Wire {
    client: reqwest::Client,
    /// For the services of a cloud that give credentials: no proxy reaches them.
    direct: reqwest::Client,
}

impl Wire {
    /// Makes one request. The head of each answer is returned, also of a refusal.
    pub(crate) async fn exchange(
        &self,
        request: HttpRequest,
    ) -> Result<(Head, HttpResponse), (SourceError, HttpError)> {
        let host = request.uri().host().unwrap_or_default();
        let client = if is_metadata_host(host) { &self.direct } else { &self.client };
        let response =
            client.call(request).await.map_err(|error| (failure(&error, "the request"), error))?;
        let (parts, body) = response.into_parts();
        let mut head = Head { status: parts.status, headers: parts.headers.clone(), code: None };
        let is_error = parts.status.is_client_error() || parts.status.is_server_error();
        if !is_error {
            return Ok((head, HttpResponse::from_parts(parts, body)));
        }
        let body = beginning(body).await;
        head.code = error_code(&String::from_utf8_lossy(&body));
        // object_store puts the body of a refusal into its errors: the code is enough there.
        let body = head.code.clone().unwrap_or_default();
        Ok((head, HttpResponse::from_parts(parts, Bytes::from(body).into())))
    }
}

impl HttpService for Wire {
    // What the attribute async_trait, with which the trait is declared, makes of an async function.
    fn call<'me, 'future>(
        &'me self,
        request: HttpRequest,
    ) -> Pin<Box<dyn Future<Output = Result<HttpResponse, HttpError>> + Send + 'future>>
    where
        'me: 'future,
        Self: 'future,
    {
        Box::pin(async move {
            let record = request.extensions().get::<Record>().cloned();
            let (outcome, result) = match self.exchange(request).await {
                Ok((head, response)) => (Ok(head), Ok(response)),
                Err((error, cause)) => (Err(error), Err(cause)),
            };
            if let Some(record) = record {
                *record.0.lock() = Some(outcome);
            }
            result
        })
    }
}

/// The first bytes of the body of an error.
async fn beginning(body: HttpResponseBody) -> Vec<u8> {
    let mut stream = body.bytes_stream();
    let mut bytes = Vec::new();
    let fill = async {
        while let Some(Ok(piece)) = stream.next().await {
            let room = ERROR_BODY.saturating_sub(bytes.len());
            bytes.extend(piece.iter().take(room));
            if bytes.len() == ERROR_BODY {
                break;
            }
        }
    };
    // What has come by then is enough.
    let _ = tokio::time::timeout(ERROR_BODY_TIME, fill).await;
    bytes
}

/// The text of `<Code>`, the element that S3, Google and Azure have in common.
fn error_code(body: &str) -> Option<String> {
    let (_, rest) = body.split_once("<Code>")?;
    let (code, _) = rest.split_once("</Code>")?;
    let plain = code.len() <= 64 && code.bytes().all(|byte| byte.is_ascii_alphanumeric());
    (plain && !code.is_empty()).then(|| code.to_owned())
}

/// The error for a request or a body that failed. `what` names it.
pub(crate) fn failure(error: &HttpError, what: &str) -> SourceError {
    let found = |is: fn(&(dyn Error + 'static)) -> bool| chain(error).any(is);
    let refused = |error: &(dyn Error + 'static)| error.is::<ForbiddenAddress>();
    let unusable = |error: &(dyn Error + 'static)| {
        error.downcast_ref::<reqwest::Error>().is_some_and(reqwest::Error::is_builder)
    };
    let (retry, hint) = if found(is_tls_refusal) {
        (Retry::Never, "; set ca of the source if its certificate is from an authority of your own")
    } else if found(refused) || found(unusable) {
        (Retry::Never, "")
    } else {
        match error.kind() {
            HttpErrorKind::Request | HttpErrorKind::Interrupted => (Retry::AtOnce, ""),
            _ => (Retry::LATER, ""),
        }
    };
    SourceError::new(retry, format!("{what} failed: {}{hint}", text(error)))
}

/// Whether TLS failed in a way that stays: the certificate, or a server without TLS.
fn is_tls_refusal(error: &(dyn Error + 'static)) -> bool {
    use rustls::Error::{InvalidCertificate, InvalidMessage, PeerIncompatible};
    error.downcast_ref::<rustls::Error>().is_some_and(|error| {
        matches!(error, InvalidCertificate(_) | InvalidMessage(_) | PeerIncompatible(_))
    })
}

/// Makes the HTTP clients of one source.
#[derive(Clone)]
pub(crate) struct Connector {
    connect_timeout: Duration,
    stall_timeout: Duration,
    proxy: Option<String>,
    tls: rustls::ClientConfig,
}

impl std::fmt::Debug for Connector {
    /// Without the URL of the proxy, which contains a password.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Connector").finish_non_exhaustive()
    }
}

impl Connector {
    /// Reads the certificates of authorities.
    pub(crate) fn new(
        config: &SourcesConfig,
        settings: &SourceSettings,
    ) -> Result<Connector, SourceError> {
        Ok(Connector {
            connect_timeout: config.connect_timeout,
            stall_timeout: config.stall_timeout,
            proxy: settings.proxy.clone(),
            tls: tls(settings.ca.as_deref(), config.network())?,
        })
    }

    /// Makes a client that connects to what `names` allows.
    pub(crate) fn wire(&self, names: Names, protocols: Protocols) -> Result<Wire, SourceError> {
        let build = || {
            reqwest::Client::builder()
                .user_agent(concat!("cordisk/", env!("CARGO_PKG_VERSION")))
                .tls_backend_preconfigured(self.tls.clone())
                .redirect(reqwest::redirect::Policy::none())
                .referer(false)
                .http1_only()
                .https_only(protocols == Protocols::Https)
                .connect_timeout(self.connect_timeout)
                .read_timeout(self.stall_timeout)
                .pool_idle_timeout(IDLE)
                .dns_resolver(Arc::new(names.clone()))
        };
        let failed =
            |error: &reqwest::Error| SourceError::never("cannot make the HTTP client", error);
        let mut client = build();
        if let Some(proxy) = &self.proxy {
            let proxy = reqwest::Proxy::all(proxy)
                .map_err(|error| SourceError::never("proxy of the source", &error))?;
            client = client.proxy(proxy);
        }
        Ok(Wire {
            client: client.build().map_err(|error| failed(&error))?,
            direct: build().no_proxy().build().map_err(|error| failed(&error))?,
        })
    }
}

impl HttpConnector for Connector {
    fn connect(&self, options: &ClientOptions) -> object_store::Result<HttpClient> {
        let http = options.get_config_value(&ClientConfigKey::AllowHttp);
        let protocols =
            if http.as_deref() == Some("true") { Protocols::Both } else { Protocols::Https };
        match self.wire(Names::default(), protocols) {
            Ok(wire) => Ok(HttpClient::new(wire)),
            Err(error) => {
                Err(object_store::Error::Generic { store: "HTTP", source: Box::new(error) })
            }
        }
    }
}

/// The protocols that a client speaks.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Protocols {
    Https,
    Both,
}

/// TLS by ring, with the authorities of the file `ca`, or those of the host (`SSL_CERT_FILE`).
fn tls(ca: Option<&Path>, network: &Network) -> Result<rustls::ClientConfig, SourceError> {
    let failed = |error: &rustls::Error| SourceError::never("cannot set up TLS", error);
    let Some(ca) = ca else {
        return network
            .tls_of_host(|| Ok(tls_by_ring()?.with_platform_verifier()?.with_no_client_auth()))
            .map_err(|error| failed(&error));
    };
    let bad = |why: &dyn std::fmt::Display| {
        SourceError::new(Retry::Never, format!("ca {}: {why}", ca.display()))
    };
    let mut roots = rustls::RootCertStore::empty();
    for certificate in CertificateDer::pem_file_iter(ca).map_err(|error| bad(&error))? {
        let certificate = certificate.map_err(|error| bad(&error))?;
        roots.add(certificate).map_err(|error| bad(&error))?;
    }
    if roots.is_empty() {
        return Err(bad(&"the file contains no certificate"));
    }
    let builder = tls_by_ring().map_err(|error| failed(&error))?;
    Ok(builder.with_root_certificates(roots).with_no_client_auth())
}

/// The provider is named here, so that the process needs no default one.
fn tls_by_ring() -> Result<ConfigBuilder<rustls::ClientConfig, WantsVerifier>, rustls::Error> {
    rustls::ClientConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()))
        .with_safe_default_protocol_versions()
}

/// Addresses that a server on the internet must not send this host to.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum AddressClass {
    /// This host.
    Loopback,
    /// Link-local addresses, and the addresses at which clouds give out credentials.
    Local,
    /// All others.
    Ordinary,
}

impl AddressClass {
    pub(crate) fn of(address: IpAddr) -> AddressClass {
        match address.to_canonical() {
            IpAddr::V4(v4) if v4.is_loopback() || v4.octets()[0] == 0 => AddressClass::Loopback,
            // Alibaba and Azure have their services outside of the link-local range.
            IpAddr::V4(v4)
                if v4.is_link_local()
                    || v4.octets() == [100, 100, 100, 200]
                    || v4.octets() == [168, 63, 129, 16] =>
            {
                AddressClass::Local
            }
            IpAddr::V6(v6) if v6.is_loopback() || v6.is_unspecified() => AddressClass::Loopback,
            // fd00:ec2::/32 is where Amazon has its services.
            IpAddr::V6(v6)
                if v6.segments()[0] & 0xffc0 == 0xfe80
                    || v6.segments()[..2] == [0xfd00, 0x0ec2] =>
            {
                AddressClass::Local
            }
            _ => AddressClass::Ordinary,
        }
    }

    /// The class of the host of a URL, if it is an address, or a name that is reserved for this
    /// host (RFC 6761, section 6.3).
    pub(crate) fn of_host(host: &str) -> Option<AddressClass> {
        let bare = host.trim_start_matches('[').trim_end_matches(']');
        if let Ok(address) = bare.parse::<IpAddr>() {
            return Some(AddressClass::of(address));
        }
        let name = bare.trim_end_matches('.').to_ascii_lowercase();
        (name == "localhost" || name.ends_with(".localhost")).then_some(AddressClass::Loopback)
    }
}

/// Whether `host` is a service of a cloud that gives credentials to its virtual machines.
fn is_metadata_host(host: &str) -> bool {
    AddressClass::of_host(host) == Some(AddressClass::Local)
        || ["metadata", "metadata.google.internal"].contains(&host)
}

/// The address of a name is one that a redirect must not lead to.
#[derive(Debug)]
struct ForbiddenAddress(String);

impl std::fmt::Display for ForbiddenAddress {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "a redirect leads to {}, which is an address of this host or its link", self.0)
    }
}

impl Error for ForbiddenAddress {}

/// Resolves names of hosts. The address that is checked is the one that is connected to.
#[derive(Clone, Debug, Default)]
pub(crate) struct Names {
    /// `None`: all addresses are allowed. `Some`: ordinary ones, and those of this class.
    pub(crate) only: Option<AddressClass>,
    #[cfg(test)]
    pub(crate) known: Vec<(&'static str, SocketAddr)>,
}

impl Names {
    /// These names as redirects may lead to them: ordinary addresses, and those of class `also`.
    pub(crate) fn of_redirects(mut self, also: AddressClass) -> Names {
        self.only = Some(also);
        self
    }

    /// Whether a redirect to `host` may be followed. Names are checked when they are resolved.
    pub(crate) fn allows_host(&self, host: &str) -> bool {
        AddressClass::of_host(host).is_none_or(|class| self.allows(class))
    }

    fn allows(&self, class: AddressClass) -> bool {
        class == AddressClass::Ordinary || self.only.is_none_or(|only| only == class)
    }

    async fn look_up(&self, host: &str) -> io::Result<Vec<SocketAddr>> {
        #[cfg(test)]
        if let Some((_, address)) = self.known.iter().find(|(name, _)| *name == host) {
            return Ok(vec![*address]);
        }
        Ok(tokio::net::lookup_host((host, 0)).await?.collect())
    }
}

impl Resolve for Names {
    fn resolve(&self, name: Name) -> Resolving {
        let names = self.clone();
        Box::pin(async move {
            let host = name.as_str().to_owned();
            let mut found = names.look_up(&host).await?;
            found.retain(|address| names.allows(AddressClass::of(address.ip())));
            if found.is_empty() {
                return Err(Box::new(ForbiddenAddress(host)) as Box<dyn Error + Send + Sync>);
            }
            Ok(Box::new(found.into_iter()) as Box<dyn Iterator<Item = SocketAddr> + Send>)
        })
    }
}

#[cfg(test)]
mod tests;
